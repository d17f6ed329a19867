//! The tests in tiers, cheap ones first, and the table at the end.
//!
//! host: unit, property and doc tests of the crates that need no root. object: checks of the
//! compiled kernel programs as a file. testrun: library tests that need root, most of them
//! BPF_PROG_TEST_RUN. netns: real packets between namespaces.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;

use crate::privilege;
use crate::setup::{Profile, Workspace, shown};
use crate::tally::{Tally, read_expected};

const EXPECTED_SKIPS: &str = "tests/expected-skips.txt";
/// Module path under which the library keeps the checks of the object file.
const OBJECT: &str = "object::";

/// A kind of tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tier {
    /// Unit, property and doc tests, without root
    Host,
    /// The compiled kernel programs as a file, without root
    Object,
    /// Loaded kernel programs and other library tests that need root
    Testrun,
    /// Real packets between network namespaces; needs root
    Netns,
}

/// How a tier ended.
enum Outcome {
    Ran { tally: Tally, succeeded: bool },
    NotRun(String),
}

/// Runs all tiers, or one, and prints the table. Returns whether everything ran and passed.
///
/// # Errors
/// When the product doesn't build or cargo can't be started.
pub(crate) fn run(
    workspace: &Workspace,
    only: Option<Tier>,
    filter: Option<&str>,
    runner: &str,
) -> Result<bool> {
    let expected = fs::read_to_string(workspace.file(EXPECTED_SKIPS))
        .with_context(|| format!("reading {EXPECTED_SKIPS}"))?;
    let expected = read_expected(&expected);

    // The test runner takes tests that match any of its filters, so a tier that is a filter itself
    // can't be narrowed; its tests then run in the host tier.
    ensure!(
        only != Some(Tier::Object) || filter.is_none(),
        "--tier object takes no filter; --tier host does"
    );
    let mut outcomes = Vec::new();
    for &tier in Tier::value_variants() {
        let is_asked = only.map_or(tier != Tier::Object || filter.is_none(), |only| only == tier);
        if is_asked {
            outcomes.push((tier, run_tier(workspace, tier, filter, runner)?));
        }
    }

    println!("\n{:<10}{:>8}{:>8}{:>9}", "tier", "passed", "failed", "skipped");
    let mut all_well = true;
    for (tier, outcome) in &outcomes {
        match outcome {
            Outcome::Ran { tally, .. } => println!(
                "{:<10}{:>8}{:>8}{:>9}",
                tier.name(),
                tally.passed(),
                tally.failed,
                tally.skips.len()
            ),
            Outcome::NotRun(_) => println!("{:<10}{:>8}{:>8}{:>9}", tier.name(), "-", "-", "-"),
        }
    }
    for (tier, outcome) in &outcomes {
        let name = tier.name();
        match outcome {
            Outcome::NotRun(reason) => {
                all_well = false;
                println!("{name} was not run: {reason}");
            }
            Outcome::Ran { tally, succeeded } => {
                for skip in &tally.skips {
                    println!("{name} skipped {skip}");
                }
                for skip in tally.unexpected_skips(&expected) {
                    all_well = false;
                    println!("{name}: this skip is not in {EXPECTED_SKIPS}: {skip}");
                }
                if !succeeded {
                    all_well = false;
                    println!("{name} FAILED");
                } else if tally.is_empty() && filter.is_none() {
                    all_well = false;
                    println!("{name} has no tests, which can't be right");
                }
            }
        }
    }
    Ok(all_well)
}

impl Tier {
    fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Object => "object",
            Self::Testrun => "testrun",
            Self::Netns => "netns",
        }
    }

    fn is_privileged(self) -> bool {
        matches!(self, Self::Testrun | Self::Netns)
    }
}

fn run_tier(workspace: &Workspace, tier: Tier, filter: Option<&str>, runner: &str) -> Result<Outcome> {
    if tier.is_privileged()
        && let Err(reason) = privilege::check(runner)
    {
        return Ok(Outcome::NotRun(format!("{reason:#}")));
    }
    let (selection, options): (&[&str], &[&str]) = match tier {
        Tier::Host if filter.is_some() => (&[], &[]),
        Tier::Host => (&[], &["--skip", OBJECT]),
        Tier::Object => (&["--package", "qos-userspace", "--lib"], &[OBJECT]),
        Tier::Testrun => (&["--package", "qos-userspace", "--lib"], &["--ignored", "--test-threads=1"]),
        // One at a time: each measures rates on all cores.
        Tier::Netns => (&["--package", "qos-tests"], &["--test-threads=1"]),
    };
    let mut test = workspace.cargo(["test", "--no-fail-fast"]);
    test.args(selection).arg("--").args(options);
    test.args(filter);
    if tier.is_privileged() && !runner.is_empty() {
        test.env(runner_variable()?, runner);
    }
    if tier == Tier::Netns {
        test.env("QOS_BIN_DIR", workspace.build_product(Profile::Dev)?);
    }
    watch(test)
}

/// Runs a test command, showing its output as it comes.
fn watch(mut test: Command) -> Result<Outcome> {
    let shown = shown(&test);
    eprintln!("+ {shown}");
    let mut child = test.stdout(Stdio::piped()).spawn().with_context(|| format!("starting `{shown}`"))?;
    let output = child.stdout.take().context("its output is a pipe")?;
    let mut tally = Tally::default();
    let mut bytes = Vec::new();
    let mut reader = BufReader::new(output);
    while reader.read_until(b'\n', &mut bytes).with_context(|| format!("reading from `{shown}`"))? > 0 {
        std::io::stdout().lock().write_all(&bytes).context("writing to the standard output")?;
        tally.line(String::from_utf8_lossy(&bytes).trim_end());
        bytes.clear();
    }
    let status = child.wait().with_context(|| format!("waiting for `{shown}`"))?;
    Ok(Outcome::Ran { tally, succeeded: status.success() })
}

/// The variable by which cargo starts test programs through another command.
fn runner_variable() -> Result<String> {
    let output = Command::new("rustc")
        .args(["--print", "host-tuple"])
        .output()
        .context("asking rustc for the host's target")?;
    let target = String::from_utf8(output.stdout).context("the host's target")?;
    Ok(format!("CARGO_TARGET_{}_RUNNER", target.trim().to_uppercase().replace('-', "_")))
}
