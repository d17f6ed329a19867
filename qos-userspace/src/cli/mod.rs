//! The command line `qos`: one module per verb, one HTTP request behind most of them.
//!
//! A verb reads its arguments into the API's types, asks the daemon, and prints what it says: as a
//! table for people, or, with `-o json`, the API's object unchanged. Nothing is decided here.

use std::io;
use std::path::PathBuf;

use clap::{Args, CommandFactory as _, Parser, Subcommand};

mod app;
mod args;
mod client;
mod completions;
mod contract;
mod decisions;
mod detach;
mod doctor;
mod explain;
mod extend;
mod grant;
mod key;
mod level;
mod list;
mod man;
pub mod output;
mod packet;
mod profile;
mod provider;
pub mod qosd;
mod reconcile;
mod reload;
mod revoke;
mod segment;
mod session;
mod stats;
mod status;
mod subscribers;
mod trace;

use crate::api::types::ErrorBody;
use crate::config::{ConfigError, DEFAULT_SOCKET};
use crate::gateway::GatewayConfig;
use client::Client;
use output::{Format, Output};

const EXIT_STATUS: &str = "\
Exit status:
  0  done
  1  refused by the daemon; nothing was changed
  2  the command line is wrong
  3  the daemon can't be reached
  4  an internal error, or the kernel refused
`qos doctor`: 0 all is well, 1 there are warnings, 4 there are errors";

const LONG_ABOUT: &str = "\
Gives levels of quality of service to the traffic of providers, and shows what becomes of it.

A provider is registered with the networks it may claim, a session names a subscriber's line, and a \
grant gives the packets of some flows a level: guaranteed and maximum capacity per direction, \
priority, delay, marking. The daemon qosd checks every request against what is left, and enforces \
what it grants in the kernel.

Rates are written 20mbit, 1.5Gbit/s or 64000 (bit/s); sizes 300kB or 64KiB; durations 90s, 15m, \
1h 30m or 2 days.";

const EXAMPLES: &str = "\
Examples:
  qos provider add acme --kind application --network 203.0.113.0/24
  qos session add dsl-0042 --address 192.0.2.10 --down 20mbit --up 2mbit
  qos grant --provider acme --flow 'down udp from 203.0.113.0/24 to 192.0.2.10' \\
      --guaranteed-down 5mbit --max-down 10mbit --priority 1 --for 1h
  qos list
  qos stats --watch
  qos revoke 1
";

/// Asks for, shows and ends levels of quality of service
#[derive(Debug, Parser)]
#[command(
    name = "qos",
    version,
    long_about = LONG_ABOUT,
    after_help = EXIT_STATUS,
    after_long_help = format!("{EXAMPLES}\n{EXIT_STATUS}"),
    propagate_version = true,
    max_term_width = 100
)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Args)]
struct Global {
    /// The socket that qosd listens on
    #[arg(long, global = true, help_heading = "Global", value_name = "PATH", env = "QOS_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// How to print: tables for people, or the API's JSON
    #[arg(short, long, global = true, help_heading = "Global", value_enum, value_name = "FORMAT", default_value_t = Format::Table)]
    output: Format,
    /// Only say what would come of a change, and change nothing
    #[arg(long, global = true, help_heading = "Global")]
    dry_run: bool,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Who may ask for levels
    #[command(subcommand)]
    Provider(provider::Verb),
    /// Programs of a provider
    #[command(subcommand)]
    App(app::Verb),
    /// Subscribers' lines that are up
    #[command(subcommand)]
    Session(session::Verb),
    /// What lines share before the link
    #[command(subcommand)]
    Segment(segment::Verb),
    /// API keys of providers' programs
    #[command(subcommand)]
    Key(key::Verb),
    /// Named levels
    #[command(subcommand)]
    Profile(profile::Verb),
    // What each of these is for is said where its arguments are.
    Grant(Box<grant::Grant>),
    Extend(extend::Extend),
    Revoke(revoke::Revoke),
    List(list::List),
    Show(list::Show),
    Decisions(decisions::Decisions),
    Stats(stats::Stats),
    Explain(explain::Explain),
    Doctor(doctor::Doctor),
    Status(status::Status),
    Reconcile(reconcile::Reconcile),
    Reload(reload::Reload),
    Trace(trace::Trace),
    Detach(detach::Detach),
    Completions(completions::Completions),
    Man(man::Man),
}

impl Verb {
    /// Refuses to try what is either done or not.
    fn check_dry_run(&self, dry_run: bool) -> Result<(), CliError> {
        let what = match self {
            Self::Reconcile(_) => "reconcile",
            Self::Reload(_) => "reload",
            Self::Trace(_) => "trace",
            Self::Detach(_) => "detach",
            _ => return Ok(()),
        };
        if !dry_run {
            return Ok(());
        }
        Err(CliError::Usage(format!("`qos {what}` can't be tried: leave --dry-run out")))
    }
}

/// Why a verb did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The daemon refused.
    #[error("{}", .0.message)]
    Refused(ErrorBody),
    /// The daemon failed, or its kernel refused.
    #[error("{}", .0.message)]
    Failed(ErrorBody),
    /// The arguments do not go together.
    #[error("{0}")]
    Usage(String),
    /// The daemon can't be reached.
    #[error("cannot reach qosd on {}: {reason}", socket.display())]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// Why not, and what to do.
        reason: String,
    },
    /// The daemon answers what this program does not understand.
    #[error("qosd's answer is not understood: {0}; are `qos` and `qosd` of one version?")]
    Answer(String),
    /// A configuration can't be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Everything could not be removed without a daemon.
    #[error("cannot remove everything from the kernel: {0}")]
    Detach(Box<dyn std::error::Error + Send + Sync>),
    /// The system refuses.
    #[error("cannot {what}: {source}")]
    System {
        /// What was attempted, with what.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// The output can't be written.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
    /// Checks of `qos doctor` found something; it was printed.
    #[error("{} found", if *errors { "errors" } else { "warnings" })]
    Unhealthy {
        /// Worse than warnings.
        errors: bool,
    },
}

impl CliError {
    /// The exit status, as `qos --help` has them.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            Self::Refused(_) | Self::Unhealthy { errors: false } => 1,
            Self::Usage(_) => 2,
            Self::Unreachable { .. } => 3,
            Self::Failed(_)
            | Self::Answer(_)
            | Self::Config(_)
            | Self::Detach(_)
            | Self::System { .. }
            | Self::Output(_)
            | Self::Unhealthy { errors: true } => 4,
        }
    }

    /// Whether it still has to be told: not where the output is gone, or tells it already.
    fn is_news(&self) -> bool {
        !matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
            && !matches!(self, Self::Unhealthy { .. })
    }
}

/// Removes everything from the kernel without a daemon.
pub type DetachLeftovers<'f> =
    &'f dyn Fn(&GatewayConfig) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// Carries out a command line, and returns its exit status. `detach_leftovers` is for `qos detach`
/// where no daemon runs.
pub fn run(cli: Cli, output: &mut Output, detach_leftovers: DetachLeftovers<'_>) -> u8 {
    output.set_format(cli.global.output);
    let result = cli
        .verb
        .check_dry_run(cli.global.dry_run)
        .and_then(|()| Client::new(cli.global.socket, cli.global.dry_run))
        .and_then(|mut client| dispatch(cli.verb, &mut client, output, detach_leftovers));
    match result {
        Ok(()) => 0,
        Err(error) => {
            if error.is_news() {
                output.error(&error);
            }
            error.exit_status()
        }
    }
}

fn dispatch(
    verb: Verb,
    client: &mut Client,
    output: &mut Output,
    detach_leftovers: DetachLeftovers<'_>,
) -> Result<(), CliError> {
    match verb {
        Verb::Provider(verb) => provider::run(verb, client, output),
        Verb::App(verb) => app::run(verb, client, output),
        Verb::Session(verb) => session::run(verb, client, output),
        Verb::Segment(verb) => segment::run(verb, client, output),
        Verb::Key(verb) => key::run(verb, client, output),
        Verb::Profile(verb) => profile::run(verb, client, output),
        Verb::Grant(verb) => grant::run(*verb, client, output),
        Verb::Extend(verb) => extend::run(&verb, client, output),
        Verb::Revoke(verb) => revoke::run(&verb, client, output),
        Verb::List(verb) => list::list(&verb, client, output),
        Verb::Show(verb) => list::show(&verb, client, output),
        Verb::Decisions(verb) => decisions::run(&verb, client, output),
        Verb::Stats(verb) => stats::run(&verb, client, output),
        Verb::Explain(verb) => explain::run(&verb, client, output),
        Verb::Doctor(verb) => doctor::run(&verb, client, output),
        Verb::Status(status::Status {}) => status::run(client, output),
        Verb::Reconcile(reconcile::Reconcile {}) => reconcile::run(client, output),
        Verb::Reload(reload::Reload {}) => reload::run(client, output),
        Verb::Trace(trace::Trace {}) => trace::run(client, output),
        Verb::Detach(verb) => detach::run(&verb, client, output, detach_leftovers),
        Verb::Completions(verb) => completions::run(&verb, output),
        Verb::Man(verb) => man::run(&verb, output),
    }
}

/// The whole command line, as clap sees it.
fn command() -> clap::Command {
    Cli::command()
}

#[cfg(test)]
mod tests;
