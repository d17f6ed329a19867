//! `qos doctor`: looks for what is wrong, and says what it costs and what to do.

use std::path::{Path, PathBuf};

use clap::Args;
use comfy_table::{Cell, Color};
use serde::de::IgnoredAny;

use super::CliError;
use super::client::{Answer, Client};
use super::output::Output;
use crate::api::doctor::{self, Check, Severity};
use crate::api::types::Listing;
use crate::config::{Config, DEFAULT_PATH};

/// Looks for what is wrong, and says what it costs and what to do
///
/// A running daemon is asked to look, as it sees what it works with. Where none runs, this process
/// looks itself at what can be seen without one; root sees more.
#[derive(Debug, Args)]
#[command(after_long_help = "Exit status: 0 all is well, 1 there are warnings, 4 there are errors")]
pub(super) struct Doctor {
    /// The configuration to look at where no daemon runs [default: /etc/qos/qos.toml if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub(super) fn run(verb: &Doctor, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    let answer = match client.get("/v1/doctor") {
        Ok(answer) => answer,
        Err(error @ CliError::Unreachable { .. }) => alone(verb, &error)?,
        Err(error) => return Err(error),
    };
    let checks = answer.typed::<Listing<Check>>()?.items;
    output.show(&answer, |output, _: IgnoredAny| print(output, &checks))?;
    match doctor::worst(&checks) {
        Severity::Ok => Ok(()),
        Severity::Warning => Err(CliError::Unhealthy { errors: false }),
        Severity::Error => Err(CliError::Unhealthy { errors: true }),
    }
}

/// What this process sees itself, in the form of the daemon's answer.
fn alone(verb: &Doctor, unreachable: &CliError) -> Result<Answer, CliError> {
    let path = verb.config.as_deref().or_else(|| Some(Path::new(DEFAULT_PATH)).filter(|path| path.exists()));
    let config = path.map(Config::load).transpose()?;
    let mut checks = doctor::examine(config.as_ref(), None);
    checks.push(Check::warning(
        "daemon",
        unreachable.to_string(),
        "what it has in the kernel, and what lines and levels ask for, is not looked at",
        "start it: qosd run",
    ));
    Answer::of(&Listing { items: checks })
}

fn print(output: &mut Output, checks: &[Check]) -> Result<(), CliError> {
    let mut table = output.table(&["", "CHECK", "FOUND", "WHAT IT COSTS", "WHAT TO DO"], &[]);
    for check in checks {
        let severity = match check.severity {
            Severity::Ok => Output::coloured("ok", Color::Green),
            Severity::Warning => Output::coloured("warning", Color::Yellow),
            Severity::Error => Output::coloured("error", Color::Red),
        };
        table.add_row([
            severity,
            Cell::new(&check.name),
            Cell::new(&check.found),
            Cell::new(check.cost.as_deref().unwrap_or_default()),
            Cell::new(check.mend.as_deref().unwrap_or_default()),
        ]);
    }
    output.wrap(&mut table);
    output.print(&table)
}
