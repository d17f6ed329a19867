//! `qos man`: the manual pages of `qos`, its verbs, and `qosd`.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory as _};
use clap_mangen::Man as Page;

use super::output::Output;
use super::qosd::Qosd;
use super::{CliError, command};

/// Writes the manual pages
///
/// Without a directory the page of `qos` itself is printed.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:\n  qos man ./pages\n  qos man | man -l -")]
pub(super) struct Man {
    /// Directory for the pages of `qos` and each of its verbs (section 1), and of `qosd` (section 8)
    directory: Option<PathBuf>,
}

pub(super) fn run(man: &Man, output: &mut Output) -> Result<(), CliError> {
    let Some(directory) = &man.directory else {
        let mut page = Vec::new();
        Page::new(command()).render(&mut page)?;
        return Ok(output.bytes(&page)?);
    };
    write(directory).map_err(|source| CliError::System {
        what: format!("write the manual pages to {}", directory.display()),
        source,
    })
}

fn write(directory: &Path) -> std::io::Result<()> {
    fs::create_dir_all(directory)?;
    clap_mangen::generate_to(command(), directory)?;
    let mut daemon = Qosd::command().disable_help_subcommand(true);
    daemon.build();
    write_daemon(&daemon, directory)
}

/// Daemons have section 8.
fn write_daemon(command: &Command, directory: &Path) -> std::io::Result<()> {
    command.get_subcommands().try_for_each(|verb| write_daemon(verb, directory))?;
    Page::new(command.clone()).section("8").generate_to(directory).map(drop)
}
