//! `qos completions`: what makes a shell complete the command line.

use clap::Args;
use clap_complete::Shell;

use super::output::Output;
use super::{CliError, command};

/// Prints a completion script for a shell
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  qos completions bash > /usr/share/bash-completion/completions/qos
  qos completions zsh > \"${fpath[1]}/_qos\"
  qos completions fish > ~/.config/fish/completions/qos.fish")]
pub(super) struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(completions: &Completions, output: &mut Output) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(completions.shell, &mut command(), "qos", &mut script);
    Ok(output.bytes(&script)?)
}
