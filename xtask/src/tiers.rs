//! The tests in tiers, cheap ones first, and the table at the end.
//!
//! host: unit, property and doc tests of the crates that need no root. object: checks of the
//! compiled kernel programs as a file (`object::` of the library). testrun: the library's ignored
//! tests, which need root, and `tests/tests/testrun.rs`. netns: all other tests of `tests`, with
//! real packets between namespaces. package: the Debian package, installed in a copy of this machine
//! that is gone afterwards.
//!
//! A test of `tests` that takes minutes is ignored with a reason that begins with `slow: `. It is left out,
//! and told of, unless all are asked for.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;

use crate::privilege;
use crate::programs::{Program, Programs, TESTS};
use crate::setup::{Workspace, shown, succeeds};
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
    /// Install, upgrade, remove and purge the Debian package; needs root
    Package,
}

/// How a tier ended.
enum Outcome {
    Ran { tally: Tally, succeeded: bool },
    NotRun(String),
}

/// Runs all tiers, or one, with the slow tests if `all`, and prints the table. Returns whether everything ran and passed.
///
/// # Errors
/// When the product doesn't build or cargo can't be started.
pub(crate) fn run(
    workspace: &Workspace,
    only: Option<Tier>,
    filter: Option<&str>,
    all: bool,
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
    let programs = Programs::build(workspace)?;
    let mut outcomes = Vec::new();
    for &tier in Tier::value_variants() {
        let is_asked = only.map_or(tier != Tier::Object || filter.is_none(), |only| only == tier);
        if is_asked {
            outcomes.push((tier, run_tier(&programs, tier, filter, all, runner)?));
        }
    }

    println!("\n{:<10}{:>8}{:>8}{:>9}{:>10}", "tier", "passed", "failed", "skipped", "left out");
    let mut all_well = true;
    for (tier, outcome) in &outcomes {
        match outcome {
            Outcome::Ran { tally, .. } => println!(
                "{:<10}{:>8}{:>8}{:>9}{:>10}",
                tier.name(),
                tally.passed(),
                tally.failed,
                tally.skips.len(),
                tally.left_out.len()
            ),
            Outcome::NotRun(_) => {
                println!("{:<10}{:>8}{:>8}{:>9}{:>10}", tier.name(), "-", "-", "-", "-");
            }
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
                for test in &tally.left_out {
                    println!("{name} left out, for it is slow (--all runs it): {test}");
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
            Self::Package => "package",
        }
    }

    fn is_privileged(self) -> bool {
        matches!(self, Self::Testrun | Self::Netns | Self::Package)
    }
}

fn run_tier(
    programs: &Programs<'_>,
    tier: Tier,
    filter: Option<&str>,
    all: bool,
    runner: &str,
) -> Result<Outcome> {
    if tier.is_privileged()
        && let Err(reason) = privilege::check(runner)
    {
        return Ok(Outcome::NotRun(format!("{reason:#}")));
    }
    let runner = if tier.is_privileged() { runner } else { "" };
    // One at a time: each measures rates on all cores.
    let mut one_by_one = vec!["--test-threads=1"];
    if all {
        one_by_one.push("--include-ignored");
    }
    let commands = match tier {
        Tier::Host => {
            let not_object: &[&str] = if filter.is_some() { &[] } else { &["--skip", OBJECT] };
            let mut commands = programs.commands(runner, |program| program.package != TESTS, not_object);
            commands.push(programs.doc_tests());
            commands
        }
        Tier::Object => programs.commands(runner, Program::is_product_library, &[OBJECT]),
        Tier::Testrun => {
            let mut commands =
                programs.commands(runner, Program::is_product_library, &["--ignored", "--test-threads=1"]);
            commands.extend(programs.commands(runner, Program::is_testrun, &one_by_one));
            commands
        }
        Tier::Netns => {
            let wanted = |program: &Program| {
                program.package == TESTS && !program.is_testrun() && !program.is_package()
            };
            let mut commands = programs.commands(runner, wanted, &one_by_one);
            let next = programs.next_version()?;
            for command in &mut commands {
                command.env("QOS_NEXT_DIR", &next);
            }
            commands
        }
        Tier::Package => {
            let mut commands = programs.commands(runner, Program::is_package, &one_by_one);
            // Elsewhere the tests say that they are skipped.
            if succeeds(Command::new("dpkg-shlibdeps").arg("--version")) {
                let [older, newer] = programs.packages()?;
                for command in &mut commands {
                    command.env("QOS_DEB", &older).env("QOS_DEB_NEWER", &newer);
                }
            }
            commands
        }
    };
    let mut tally = Tally::default();
    let mut succeeded = true;
    for mut command in commands {
        succeeded &= watch(command.args(filter), &mut tally)?;
    }
    Ok(Outcome::Ran { tally, succeeded })
}

/// Runs a test command, showing its output as it comes; returns whether it succeeded.
fn watch(test: &mut Command, tally: &mut Tally) -> Result<bool> {
    let shown = shown(test);
    println!("\n+ {shown}");
    let mut child = test.stdout(Stdio::piped()).spawn().with_context(|| format!("starting `{shown}`"))?;
    let output = child.stdout.take().context("its output is a pipe")?;
    let mut bytes = Vec::new();
    let mut reader = BufReader::new(output);
    while reader.read_until(b'\n', &mut bytes).with_context(|| format!("reading from `{shown}`"))? > 0 {
        std::io::stdout().lock().write_all(&bytes).context("writing to the standard output")?;
        tally.line(String::from_utf8_lossy(&bytes).trim_end());
        bytes.clear();
    }
    let status = child.wait().with_context(|| format!("waiting for `{shown}`"))?;
    if !status.success() {
        println!("`{shown}` ended with {status}");
    }
    Ok(status.success())
}
