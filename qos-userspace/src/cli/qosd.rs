//! The command line of the daemon. It is here rather than in the binary so that `qos man` knows it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::DEFAULT_PATH;

const EXIT_STATUS: &str = "\
Exit status:
  0  stopped by a signal or by `qos detach`; with `check`, the configuration can be used
  1  could not start, or ended by an error
  2  the command line is wrong
  3  the configuration can't be used
  4  another qosd runs";

/// Holds the traffic of providers to the levels that they were granted
///
/// Decides on requests for levels of quality of service, and enforces what it grants in the kernel,
/// with XDP, TC and HTB. It is asked over a Unix socket; see qos(1).
///
/// When it stops, or is killed, the programs in the kernel go on enforcing, and the next qosd takes
/// them over. Only `qos detach` removes them.
#[derive(Debug, Parser)]
#[command(name = "qosd", version, after_help = EXIT_STATUS, max_term_width = 100)]
pub struct Qosd {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What `qosd` can do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Runs until SIGTERM, SIGINT or `qos detach`
    Run(Run),
    /// Reads the configuration, says whether it can be used, and ends
    Check(Configuration),
}

/// Arguments of `qosd run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Where the configuration is.
    #[command(flatten)]
    pub configuration: Configuration,
    /// What to log to standard error: error, warn, info, debug, trace, or a filter such as
    /// `qos_userspace::api=debug`
    #[arg(long, value_name = "FILTER", env = "RUST_LOG", default_value = "info")]
    pub log: String,
}

/// Where the configuration is.
#[derive(Debug, Args)]
pub struct Configuration {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    pub config: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        super::Qosd::command().debug_assert();
    }
}
