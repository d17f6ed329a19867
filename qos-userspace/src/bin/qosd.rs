//! The daemon: reads the command line and the configuration, and runs.

use std::io::{self, IsTerminal as _};
use std::process::ExitCode;

use clap::Parser as _;
use qos_userspace::api::socket::SocketError;
use qos_userspace::cli::qosd::{Configuration, Qosd, Run, Verb};
use qos_userspace::config::{Config, ConfigError};
use qos_userspace::daemon::{self, DaemonError};
use qos_userspace::gateway::Kernel;
use tracing_subscriber::EnvFilter;

// Documented in `qosd --help`; clap ends with 2 by itself.
const FAILED: u8 = 1;
const CONFIGURATION: u8 = 3;
const ANOTHER_RUNS: u8 = 4;

/// Why it ends otherwise than as it should.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("--log: {0}")]
    Log(#[from] tracing_subscriber::filter::ParseError),
    #[error(transparent)]
    Daemon(#[from] DaemonError),
}

fn main() -> ExitCode {
    let result = match Qosd::parse().verb {
        Verb::Run(arguments) => run(&arguments),
        Verb::Check(configuration) => check(&configuration),
    };
    let Err(failure) = result else { return ExitCode::SUCCESS };
    #[expect(clippy::print_stderr, reason = "the log may not have begun")]
    {
        eprintln!("qosd: {failure}");
    }
    ExitCode::from(match failure {
        Failure::Config(_) | Failure::Log(_) => CONFIGURATION,
        Failure::Daemon(DaemonError::Locked { .. } | DaemonError::Socket(SocketError::InUse { .. })) => {
            ANOTHER_RUNS
        }
        Failure::Daemon(_) => FAILED,
    })
}

fn run(arguments: &Run) -> Result<(), Failure> {
    let config = Config::load(&arguments.configuration.config)?;
    // aya tells of every relocation; who wants that says so with a filter of their own.
    let filter = EnvFilter::try_new(format!("aya=info,aya_obj=info,{}", arguments.log))?;
    let colour =
        io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colour).with_writer(io::stderr).init();
    Ok(daemon::run(config, Kernel::start)?)
}

fn check(configuration: &Configuration) -> Result<(), Failure> {
    Config::load(&configuration.config)?;
    #[expect(clippy::print_stdout, reason = "this is what was asked")]
    {
        println!("{} can be used", configuration.config.display());
    }
    Ok(())
}
