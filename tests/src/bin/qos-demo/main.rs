//! `qos-demo`: the gateway at work in network namespaces.
//!
//! It makes subscribers, a gateway and providers, starts the real `qosd`, grants levels with the
//! real `qos`, sends real traffic, and prints what arrived. `cargo xtask demo` builds and runs it;
//! it exits with 1 where a promise was not kept, and cleans up whatever happens.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people to watch")]

mod interrupt;
mod network;
mod play;
mod progress;
mod promises;
mod report;
mod scenario;
mod story;

use std::fs::File;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Parser;

use crate::interrupt::Interrupted;
use crate::network::Network;
use crate::progress::Progress;

/// Shows the gateway at work: real traffic between network namespaces, held to granted levels
#[derive(Parser)]
#[command(name = "qos-demo", bin_name = "cargo xtask demo", disable_help_subcommand = true)]
struct Cli {
    /// Leaves network, daemon and traffic running for play, until Ctrl-C
    #[arg(long)]
    keep: bool,
    /// Writes the measured figures to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What a shell reports of a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("interrupted; everything the demo made is gone");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Tells whether every promise was kept.
fn run(cli: &Cli) -> Result<bool> {
    interrupt::catch()?;
    // Before the work: a path that can't be written should not be found out after it.
    let json = cli
        .json
        .as_ref()
        .map(|path| File::create(path).with_context(|| format!("creating {}", path.display())))
        .transpose()?;
    let began = Instant::now();
    let mut progress = Progress::new();
    let network = Network::start(&mut progress)?;
    let (results, running) = story::tell(&network, &mut progress)?;
    progress.finish();

    let broken = promises::broken(&results);
    report::print(&results, &broken, began.elapsed())?;
    if let Some(mut file) = json {
        serde_json::to_writer_pretty(&mut file, &report::document(&results)?)
            .map_err(io::Error::from)
            .and_then(|()| writeln!(file))
            .with_context(|| format!("writing {}", cli.json.clone().unwrap_or_default().display()))?;
    }
    if cli.keep {
        play::explain(&network, &results)?;
        interrupt::wait();
        println!("\ncleaning up");
    }
    drop(running);
    Ok(broken.is_empty())
}
