//! `cargo xtask bench datapath`: what the programs cost a packet, and what is left of forwarding.
//! `cargo xtask bench boxes`: what each kind of box forwards, with qos and without.
//! `cargo xtask bench classify`: what the classifier costs a packet, beside one look-up in the kernel's maps.
//! `cargo xtask bench growth`: the same over the number of rules, and nftables; a table and a plot.
//! `cargo xtask bench scale`: how long lines and grants take when there are many.
//! `cargo xtask bench manager`: decisions and grants a second, and a start with everything.
//!
//! Every figure stands beside its baseline of the same run: machines are noisy, ratios less so. Those
//! of the data path and of boxes are medians over rounds that take turns.

mod boxes;
mod classify;
mod forward;
mod forwarding;
mod gateway;
mod growth;
mod live;
mod manager;
mod nftables;
mod plot;
mod programs;
mod rules;
mod scale;
mod world;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::builder::RangedU64ValueParser;
use clap::{Parser, Subcommand, ValueEnum as _};
use qos_tests::boxes::Kind;
use qos_tests::classbench::Plan;
use serde::Serialize;

#[derive(Debug, Parser)]
#[command(name = "qos-bench", about = "Benchmarks of qos; needs root")]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The kernel programs: ns a packet over an empty program, and packets a second forwarded.
    Datapath {
        /// Also writes the figures as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Rounds that the medians are taken over.
        #[arg(long, default_value_t = 9, value_parser = at_least_one())]
        rounds: usize,
    },
    /// Each kind of gateway box: packets a second forwarded without qos, and with it.
    Boxes {
        /// Also writes the figures as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Rounds that the medians are taken over.
        #[arg(long, default_value_t = 21, value_parser = at_least_one())]
        rounds: usize,
        /// Only this kind; may be said more than once.
        #[arg(long, value_enum)]
        only: Vec<Kind>,
    },
    /// The classifier under a rule set: ns a packet beside one look-up in the kernel's own maps, every answer
    /// compared with a linear search; how long rules take to come and go; memory.
    Classify {
        /// Rule set in ClassBench's format, plain or .gz; without one a set is made.
        #[arg(long, value_name = "FILE")]
        rules: Option<PathBuf>,
        /// Packets whose answers are compared too, in ClassBench's format, plain or .gz.
        #[arg(long, value_name = "FILE")]
        trace: Option<PathBuf>,
        /// Also writes the figures as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Rules of the set that is made.
        #[arg(long, default_value_t = 10_000, conflicts_with = "rules", value_parser = at_least_one())]
        count: usize,
        /// Rounds that the medians are taken over.
        #[arg(long, default_value_t = 9, value_parser = at_least_one())]
        rounds: usize,
        /// Measures the IPv6 set that is made of this one.
        #[arg(long, value_name = "PLAN", num_args = 0..=1, default_missing_value = "subnets")]
        ipv6: Option<Plan>,
        /// Also forwards packets between two veth pairs: with no rules, with these, and with these in a
        /// concatenated interval set of nftables.
        #[arg(long, conflicts_with = "ipv6")]
        forward: bool,
    },
    /// What a look-up costs over the number of rules, beside an LPM trie, a hash and a set of nftables of the
    /// same size.
    Growth {
        /// Also writes the figures as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Also draws them.
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
        /// Numbers of rules, with commas between them.
        #[arg(
            long,
            value_delimiter = ',',
            default_values_t = [10, 100, 1_000, 10_000, 100_000, 1_000_000],
            value_parser = at_least_one()
        )]
        counts: Vec<usize>,
        /// Rounds that the medians are taken over.
        #[arg(long, default_value_t = 5, value_parser = at_least_one())]
        rounds: usize,
    },
    /// The real qosd with many lines and many shaped allocations on one root.
    Scale {
        /// Also writes the figures as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Lines, each with a class in the tree of both interfaces.
        #[arg(long, default_value_t = 10_000)]
        lines: u32,
        /// Shaped allocations downstream, line after line, from the first again when all have one.
        #[arg(long, default_value_t = 8_000)]
        allocations: u32,
    },
    /// The service manager: decisions a second of its core, durable grants a second, a start with everything.
    Manager {
        /// Also writes the figures as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Rounds that the medians are taken over.
        #[arg(long, default_value_t = 5, value_parser = at_least_one())]
        rounds: usize,
        /// Allocations of the largest state and of the start; those of the kernel's slots are the most.
        #[arg(long, default_value_t = manager::LARGEST, value_parser = clap::value_parser!(u32).range(10..=i64::from(manager::LARGEST)))]
        most: u32,
    },
}

fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

/// Everything that one run measured.
#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    cpus: usize,
    rounds: usize,
    programs: Vec<programs::Figure>,
    forwarding: Vec<forwarding::Figure>,
    skipped: Vec<String>,
}

fn main() -> Result<()> {
    match Arguments::parse().what {
        What::Datapath { json, rounds } => datapath(json, rounds),
        What::Boxes { json, rounds, only } => {
            let kinds = if only.is_empty() { Kind::value_variants() } else { &only };
            let report = boxes::measure(kinds, rounds)?;
            boxes::print(&report);
            json.map_or(Ok(()), |path| write_json(&report, &path))
        }
        What::Classify { rules, trace, json, count, rounds, ipv6, forward } => {
            let options = classify::Options { rules, trace, count, rounds, ipv6, forward };
            let report = classify::measure(&options)?;
            classify::print(&report);
            json.map_or(Ok(()), |path| write_json(&report, &path))
        }
        What::Growth { json, svg, counts, rounds } => {
            let report = growth::measure(&counts, rounds)?;
            growth::print(&report);
            svg.map_or(Ok(()), |path| growth::draw(&report, &path))?;
            json.map_or(Ok(()), |path| write_json(&report, &path))
        }
        What::Scale { json, lines, allocations } => {
            let report = scale::measure(lines, allocations)?;
            scale::print(&report);
            json.map_or(Ok(()), |path| write_json(&report, &path))
        }
        What::Manager { json, rounds, most } => {
            let report = manager::measure(rounds, most)?;
            manager::print(&report);
            json.map_or(Ok(()), |path| write_json(&report, &path))
        }
    }
}

fn datapath(json: Option<PathBuf>, rounds: usize) -> Result<()> {
    let mut skipped = Vec::new();
    let programs = programs::measure(rounds)?;
    let forwarding = forwarding::measure(rounds, &mut skipped)?;
    let report = Report {
        kernel: nix::sys::utsname::uname()?.release().to_string_lossy().into_owned(),
        cpus: std::thread::available_parallelism()?.get(),
        rounds,
        programs,
        forwarding,
        skipped,
    };
    print(&report);
    json.map_or(Ok(()), |path| write_json(&report, &path))
}

fn write_json(report: &impl Serialize, path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(report)?;
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

#[expect(clippy::print_stdout, reason = "a program that reports to its terminal")]
fn print(report: &Report) {
    println!("kernel {}, {} CPUs, medians of {} rounds in turn\n", report.kernel, report.cpus, report.rounds);
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["program, headers changing from packet to packet", "ns a packet", "over empty"]);
    for figure in &report.programs {
        table.add_row([
            figure.name.clone(),
            format!("{:.0}", figure.ns),
            format!("{:+.0} ns", figure.ns_over_empty),
        ]);
    }
    println!("{table}\n");
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["gateway, one CPU, 60-byte packets, 1,000 flows", "packets/s", "of plain"]);
    for figure in &report.forwarding {
        table.add_row([
            figure.name.clone(),
            format!("{:.0}", figure.packets_per_second),
            format!("{:.2}×", figure.ratio_to_plain),
        ]);
    }
    println!("{table}");
    for line in &report.skipped {
        println!("skipped: {line}");
    }
}

/// Middle of several values.
fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A table that can be put into a document as it is.
fn markdown(header: &[String], rows: &[Vec<String>]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(header);
    table.add_rows(rows);
    format!("{table}\n")
}
