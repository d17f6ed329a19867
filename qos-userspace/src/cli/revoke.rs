//! `qos revoke`: ends allocations.

use clap::Args;

use super::CliError;
use super::client::Client;
use super::output::Output;
use crate::domain::Allocation;

/// Ends allocations
///
/// Each is ended by itself: where one can't be, the others are, and the exit status tells.
#[derive(Debug, Args)]
#[command(after_long_help = "Example:\n  qos revoke 12 13")]
pub(super) struct Revoke {
    /// Numbers of the allocations
    #[arg(required = true, value_name = "ID")]
    ids: Vec<u64>,
}

pub(super) fn run(revoke: &Revoke, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    let mut first_error = None;
    for id in &revoke.ids {
        let result = client.delete(&format!("/v1/allocations/{id}")).and_then(|answer| {
            output.outcome(&answer, |output, allocation: Allocation| {
                output.line(format_args!("revoked {}", allocation.id))
            })
        });
        match result {
            Ok(()) => {}
            // The others would meet the same.
            Err(error @ (CliError::Unreachable { .. } | CliError::Output(_))) => return Err(error),
            Err(error) => match &first_error {
                None => first_error = Some(error),
                Some(_) => output.error(&error),
            },
        }
    }
    first_error.map_or(Ok(()), Err)
}
