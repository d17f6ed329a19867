//! `qos extend`: puts off the end of an allocation.

use clap::Args;
use jiff::SignedDuration;

use super::CliError;
use super::client::Client;
use super::output::Output;
use crate::api::types::Extension;
use crate::domain::{Allocation, duration};

/// Puts off the end of an allocation
///
/// The profile that it was asked for with may limit how long it lasts in all: what goes beyond is cut off, and told.
#[derive(Debug, Args)]
#[command(after_long_help = "Example:\n  qos extend 12 --by 30m")]
pub(super) struct Extend {
    /// Number of the allocation
    id: u64,
    /// By how much
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    by: SignedDuration,
}

pub(super) fn run(extend: &Extend, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    let path = format!("/v1/allocations/{}/extend", extend.id);
    let answer = client.post(&path, &Extension { by: extend.by })?;
    output.outcome(&answer, |output, allocation: Allocation| {
        let end = allocation.expires_at.map_or_else(|| "no end".to_owned(), |end| end.to_string());
        output.line(format_args!("{} lasts until {end}", allocation.id))
    })
}
