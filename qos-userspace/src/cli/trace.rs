//! `qos trace`: the programs' sampled debugging.

use clap::Args;

use super::CliError;
use super::client::Client;
use super::output::Output;

/// Prints the programs' sampled debugging as it comes
///
/// Debugging is on as long as somebody listens, and costs the packet path nothing else. It samples:
/// not every packet leaves a line.
#[derive(Debug, Args)]
pub(super) struct Trace {}

pub(super) fn run(client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    client.stream("/v1/trace", |piece| output.bytes(piece))
}
