//! `cargo xtask`: everything that takes more than one `cargo` command, with its set-up.
//!
//! Every command installs what it needs (a nightly toolchain with `rust-src`, tools under the
//! target folder) and says exactly what can't be had and why. What a command runs is printed first.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it reports to whoever runs it")]

mod deb;
mod privilege;
mod programs;
mod setup;
mod tally;
mod tiers;

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};

use crate::deb::Package;
use crate::programs::HOST_PACKAGES;
use crate::setup::{Profile, Workspace};
use crate::tiers::Tier;

/// Builds, checks, tests and shows qos.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Builds the daemon `qosd`, with the kernel programs in it, and the command line `qos`
    Build {
        /// Builds them optimised
        #[arg(long)]
        release: bool,
    },
    /// Makes a Debian package of the optimised programs under target/debian
    Deb {
        /// Builds for this target, whose programs run on this machine: x86_64-unknown-linux-musl
        #[arg(long, value_name = "TRIPLE")]
        target: Option<String>,
        /// Last part of the package's version; raise it where the same version is packaged again
        #[arg(long, value_name = "TEXT", default_value = "1")]
        revision: String,
    },
    /// Lints userspace and the kernel programs; any warning is an error
    Clippy,
    /// Builds the documentation of the crates; any warning is an error
    Doc,
    /// Checks licences, sources and advisories of all dependencies
    Deny,
    /// Runs the tests, cheap tiers first
    Test {
        /// Only this tier
        #[arg(long, value_enum)]
        tier: Option<Tier>,
        /// Slow tests too, which take minutes each
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        runner: Runner,
        /// Only tests whose path contains this
        filter: Option<String>,
    },
    /// Shows the gateway at work in network namespaces
    Demo {
        #[command(flatten)]
        runner: Runner,
        /// Passed on to the demo: --keep, --json FILE
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Measures what packets cost
    Bench {
        #[command(flatten)]
        runner: Runner,
        /// Passed on to the benchmark: datapath, classify, growth, boxes, scale or manager, each with [--json FILE]
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        args: Vec<OsString>,
    },
}

#[derive(Args)]
struct Runner {
    /// Command that gives root to what needs it, such as "sudo -E"
    #[arg(long = "runner", value_name = "COMMAND", default_value = "")]
    command: String,
}

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    match Cli::parse().command {
        Verb::Build { release } => {
            let profile = if release { Profile::Release } else { Profile::Dev };
            workspace.set_up()?;
            let folder = workspace.build(profile, &[])?;
            eprintln!("{} and {}", folder.join("qosd").display(), folder.join("qos").display());
        }
        Verb::Deb { target, revision } => {
            workspace.set_up()?;
            if let Some(triple) = &target {
                workspace.set_up_target(triple)?;
            }
            let programs = workspace.build_for(target.as_deref(), Profile::Release, &[])?;
            let package = Package {
                programs: &programs,
                triple: target.as_deref(),
                revision: &revision,
                folder: &workspace.target("debian"),
                fast: false,
            };
            println!("{}", deb::make(&workspace, &package)?.display());
        }
        Verb::Clippy => {
            workspace.set_up()?;
            setup::run(workspace.cargo([
                "clippy",
                "--workspace",
                "--exclude",
                "qos-ebpf",
                "--all-targets",
                "--",
                "-Dwarnings",
            ]))?;
            // By itself: together with the rest of the workspace, features that need `std` would be
            // switched on for it.
            setup::run(workspace.nightly_cargo([
                "clippy",
                "--package",
                "qos-ebpf",
                "--lib",
                "--bins",
                "--release",
                "--target",
                "bpfel-unknown-none",
                "-Zbuild-std=core",
                "--",
                "-Dwarnings",
            ]))?;
        }
        Verb::Doc => {
            workspace.set_up()?;
            let mut doc = workspace.cargo(["doc", "--no-deps"]);
            doc.args(HOST_PACKAGES).env("RUSTDOCFLAGS", "-Dwarnings");
            setup::run(doc)?;
        }
        Verb::Deny => deny(&workspace)?,
        Verb::Test { tier, all, runner, filter } => {
            workspace.set_up()?;
            let passed = tiers::run(&workspace, tier, filter.as_deref(), all, &runner.command)?;
            return Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Verb::Demo { runner, args } => {
            privilege::check(&runner.command)
                .context("`cargo xtask demo` makes network namespaces and loads programs into the kernel")?;
            workspace.set_up()?;
            become_program(&workspace, "qos-demo", Profile::Dev, &runner.command, &args)?;
        }
        Verb::Bench { runner, args } => {
            privilege::check(&runner.command)
                .context("`cargo xtask bench` makes network namespaces and loads programs into the kernel")?;
            workspace.set_up()?;
            become_program(&workspace, "qos-bench", Profile::Release, &runner.command, &args)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds a program of `qos-tests` and the product beside it, and turns into the program, so that
/// signals reach it and nobody in between.
fn become_program(
    workspace: &Workspace,
    program: &str,
    profile: Profile,
    runner: &str,
    args: &[OsString],
) -> Result<()> {
    let folder = workspace.build(profile, &[program])?;
    let mut command = setup::through(runner, &folder.join(program));
    command.args(args).env("QOS_BIN_DIR", &folder);
    let shown = setup::shown(&command);
    eprintln!("+ {shown}");
    Err(command.exec()).with_context(|| format!("starting `{shown}`"))
}

/// Advisories need a database from the network; where it can't be had, that is said and the rest is
/// still checked.
fn deny(workspace: &Workspace) -> Result<()> {
    workspace.install(&setup::CARGO_DENY)?;
    setup::run(workspace.cargo(["deny", "check", "bans", "licenses", "sources"]))?;
    if setup::run(workspace.cargo(["deny", "fetch", "db"])).is_ok() {
        setup::run(workspace.cargo(["deny", "check", "advisories"]))
    } else {
        eprintln!("advisories are NOT checked: the advisory database can't be fetched (see above)");
        Ok(())
    }
}
