//! `qos detach`: removes everything from the kernel, with the daemon or without one.

use std::io::{self, BufRead as _, IsTerminal as _};
use std::path::PathBuf;

use clap::Args;
use serde::de::IgnoredAny;

use super::client::{Answer, Client};
use super::output::Output;
use super::{CliError, DetachLeftovers};
use crate::config::{Config, DEFAULT_PATH};
use crate::daemon;

/// Removes everything from the kernel and stops the daemon
///
/// Programs, maps, and schedulers go; nothing is enforced any more. What is granted stays in the
/// state directory, and comes back with the next `qosd run`. Where no daemon runs, what an earlier
/// one left in the kernel is removed; its configuration says where that is.
#[derive(Debug, Args)]
pub(super) struct Detach {
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    /// The configuration of the daemon that is no more
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
}

pub(super) fn run(
    detach: &Detach,
    client: &mut Client,
    output: &mut Output,
    detach_leftovers: DetachLeftovers<'_>,
) -> Result<(), CliError> {
    if !detach.yes && !confirmed(output)? {
        return output.line("nothing was changed");
    }
    match client.post("/v1/detach", &serde_json::Map::new()) {
        Ok(answer) => output.show(&answer, |output, _: IgnoredAny| output.line("detached; qosd is stopping")),
        Err(CliError::Unreachable { .. }) => {
            let config = Config::load(&detach.config)?;
            // A daemon that does not answer may be about to start, or listen on another socket.
            let _lock = daemon::lock(&config).map_err(|error| CliError::Detach(Box::new(error)))?;
            detach_leftovers(&config.gateway).map_err(CliError::Detach)?;
            output.show(&Answer::of(&())?, |output, _: IgnoredAny| {
                output.line("detached what an earlier qosd left in the kernel")
            })
        }
        Err(error) => Err(error),
    }
}

fn confirmed(output: &mut Output) -> Result<bool, CliError> {
    if !io::stdin().is_terminal() {
        return Err(CliError::Usage("there is nobody to ask; say --yes".to_owned()));
    }
    output.bytes(b"Nothing will be enforced any more. Detach? [y/N] ")?;
    let mut answer = String::new();
    io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|source| CliError::System { what: "read your answer".to_owned(), source })?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
