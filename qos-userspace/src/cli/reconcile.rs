//! `qos reconcile`: compares the kernel with what is granted, now.

use clap::Args;

use super::CliError;
use super::client::Client;
use super::output::Output;
use crate::api::types::Listing;

/// Compares the kernel with what is granted, and repairs it
///
/// The daemon does so by itself every few seconds; this does it now and says what was wrong.
#[derive(Debug, Args)]
pub(super) struct Reconcile {}

pub(super) fn run(client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    let answer = client.post("/v1/reconcile", &serde_json::Map::new())?;
    output.show(&answer, |output, repairs: Listing<String>| {
        if repairs.items.is_empty() {
            return output.line("the kernel is as it should be");
        }
        repairs.items.iter().try_for_each(|repair| output.line(format_args!("repaired: {repair}")))
    })
}
