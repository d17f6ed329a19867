//! The command line: reads it, and does what it says.

use std::process::ExitCode;

use clap::Parser as _;
use qos_userspace::cli::output::Output;
use qos_userspace::cli::{self, Cli};
use qos_userspace::gateway::Kernel;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut output = Output::standard();
    let status = cli::run(cli, &mut output, &|config| Ok(Kernel::detach_leftovers(config)?));
    ExitCode::from(status)
}
