//! `qos reload`: has the daemon read its configuration again.

use clap::Args;

use super::CliError;
use super::client::Client;
use super::output::Output;
use crate::api::types::Listing;

/// Has the daemon read its configuration again
///
/// Interfaces, capacities, shares, defaults and modes are changed in place; traffic that they do not concern
/// is not touched. A configuration that can't be taken is refused whole, and the daemon goes on as it was.
/// Directories, the socket, who may use it, and the bits of the mark need a restart. SIGHUP does the same.
#[derive(Debug, Args)]
pub(super) struct Reload {}

pub(super) fn run(client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    let answer = client.post("/v1/reload", &serde_json::Map::new())?;
    output.show(&answer, |output, changed: Listing<String>| {
        if changed.items.is_empty() {
            return output.line("the configuration is as it was");
        }
        changed.items.iter().try_for_each(|key| output.line(format_args!("changed: {key}")))
    })
}
