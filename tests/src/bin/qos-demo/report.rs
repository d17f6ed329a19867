//! The results: tables for people, a document for programs.

use std::time::Duration;

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets};
use qos_tests::traffic::{Latency, Measured};
use qos_userspace::domain::Enforcement;
use qos_userspace::domain::units::BitsPerSecond;
use serde::Serialize;

use crate::promises::{LATENCY, Sum, broken_by, sums};
use crate::scenario::{Load, Traffic, Way};
use crate::story::{Ended, Held, Results};

/// What `--json` writes. Rates are in the contract's length: IP length plus 14 bytes a packet.
#[derive(Serialize)]
pub(crate) struct Document {
    allocations: Vec<AllocationRow>,
    latency: LatencyRow,
    revoked: EndedRow,
    expired: EndedRow,
}

#[derive(Serialize)]
struct AllocationRow {
    id: u64,
    provider: String,
    direction: &'static str,
    enforcement: Enforcement,
    /// 0 where nothing is guaranteed.
    guaranteed_bps: u64,
    maximum_bps: u64,
    offered_bps: u64,
    achieved_bps: u64,
}

#[derive(Serialize)]
struct LatencyRow {
    with_priority_p50_us: u64,
    with_priority_p99_us: u64,
    without_p50_us: u64,
    without_p99_us: u64,
}

#[derive(Serialize)]
struct EndedRow {
    before_bps: u64,
    after_bps: u64,
}

/// The document of what was measured.
pub(crate) fn document(results: &Results) -> Result<Document> {
    let allocations = results
        .held
        .iter()
        .map(|held| {
            Ok(AllocationRow {
                id: held.allocation.id.0,
                provider: held.allocation.provider.to_string(),
                direction: word(held.traffic.way),
                enforcement: held.enforcement(),
                guaranteed_bps: held.guaranteed().unwrap_or_default().0,
                maximum_bps: held.maximum().context("every level of the demo has a maximum")?.0,
                offered_bps: held.measured.offered.0,
                achieved_bps: held.measured.achieved.0,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let microseconds = |time: Duration| time.as_micros() as u64;
    let ended = |ended: &Ended| EndedRow { before_bps: ended.before.0, after_bps: ended.after.0 };
    Ok(Document {
        allocations,
        latency: LatencyRow {
            with_priority_p50_us: microseconds(results.with_priority.p50()),
            with_priority_p99_us: microseconds(results.with_priority.p99()),
            without_p50_us: microseconds(results.without_priority.p50()),
            without_p99_us: microseconds(results.without_priority.p99()),
        },
        revoked: ended(&results.revoked),
        expired: ended(&results.expired),
    })
}

/// Prints everything for people.
pub(crate) fn print(results: &Results, broken: &[String], took: Duration) -> Result<()> {
    println!();
    println!(
        "Levels, and what their traffic got (Mbit/s; packets dropped at the gateway; one-way latency in ms):"
    );
    println!("{}", levels(results).trim_fmt());
    println!();
    println!("Traffic without a level (packets lost):");
    println!("{}", crowd(results).trim_fmt());
    println!();
    println!("Lines and link, all their traffic together:");
    println!("{}", capacities(results).trim_fmt());
    println!();
    println!("Latency of the game on Anna's overloaded line, 1,500-byte packets:");
    println!("{}", latencies(results).trim_fmt());
    println!();
    for (what, ended) in [("was revoked", &results.revoked), ("expired", &results.expired)] {
        println!(
            "{}: {} with its level, {} after allocation {} {what}",
            ended.title,
            rate(ended.before),
            rate(ended.after),
            ended.id
        );
    }
    println!();
    if broken.is_empty() {
        println!(
            "Every promise was kept: guarantees to 95 %, maxima to 103 %, latency within {}. Took {:.0} s.",
            milliseconds(LATENCY),
            took.as_secs_f64()
        );
    } else {
        println!("NOT every promise was kept:");
        for promise in broken {
            println!("  {promise}");
        }
    }
    Ok(())
}

fn levels(results: &Results) -> Table {
    let header = [
        "ID",
        "PROVIDER",
        "FOR",
        "WAY",
        "SENDS",
        "HELD BY",
        "GUARANTEED",
        "MAXIMUM",
        "OFFERED",
        "ACHIEVED",
        "DROPS",
        "P50",
        "P99",
        "",
    ];
    let mut table = table(&header, &[0, 6, 7, 8, 9, 10, 11, 12]);
    for held in &results.held {
        let Held { title, allocation, traffic, measured, dropped } = held;
        let [p50, p99] = latency(measured.latency.as_ref());
        table.add_row([
            allocation.id.to_string(),
            allocation.provider.to_string(),
            (*title).to_owned(),
            word(traffic.way).to_owned(),
            sends(traffic).to_owned(),
            match held.enforcement() {
                Enforcement::Shape => "shape",
                Enforcement::Police => "police",
            }
            .to_owned(),
            held.guaranteed().map_or_else(|| "-".to_owned(), mbit),
            held.maximum().map_or_else(|| "-".to_owned(), mbit),
            mbit(measured.offered),
            mbit(measured.achieved),
            dropped.to_string(),
            p50,
            p99,
            if broken_by(held).is_none() { "kept" } else { "BROKEN" }.to_owned(),
        ]);
    }
    table
}

fn crowd(results: &Results) -> Table {
    let mut table =
        table(&["FOR", "WAY", "SENDS", "OFFERED", "ACHIEVED", "LOST", "P50", "P99"], &[3, 4, 5, 6, 7]);
    for free in &results.crowd {
        let Measured { offered, achieved, lost, ref latency, .. } = free.measured;
        let [p50, p99] = self::latency(latency.as_ref());
        table.add_row([
            free.title.to_owned(),
            word(free.traffic.way).to_owned(),
            sends(free.traffic).to_owned(),
            mbit(offered),
            mbit(achieved),
            lost.to_string(),
            p50,
            p99,
        ]);
    }
    table
}

fn capacities(results: &Results) -> Table {
    let mut table = table(&["", "WAY", "CAPACITY", "OFFERED", "CARRIED"], &[2, 3, 4]);
    for Sum { name, way, capacity, offered, carried } in sums(results) {
        table.add_row([name.to_owned(), word(way).to_owned(), mbit(capacity), mbit(offered), mbit(carried)]);
    }
    table
}

fn latencies(results: &Results) -> Table {
    let mut table = table(&["", "P50", "P99", "PACKETS"], &[1, 2, 3]);
    for (name, latency) in
        [("without a level", &results.without_priority), ("with its level", &results.with_priority)]
    {
        table.add_row([
            name.to_owned(),
            milliseconds(latency.p50()),
            milliseconds(latency.p99()),
            latency.count().to_string(),
        ]);
    }
    table
}

fn table(header: &[&str], right: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().copied());
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    for &index in right {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn latency(latency: Option<&Latency>) -> [String; 2] {
    let text = |time: Duration| format!("{:.2}", time.as_secs_f64() * 1e3);
    latency.map_or_else(
        || ["-".to_owned(), "-".to_owned()],
        |latency| [text(latency.p50()), text(latency.p99())],
    )
}

fn sends(traffic: &Traffic) -> &'static str {
    match (traffic.load, traffic.to.1.contains(':')) {
        (Load::Udp(..), false) => "UDP",
        (Load::Udp(..), true) => "UDP, IPv6",
        (Load::Tcp(_), false) => "TCP",
        (Load::Tcp(_), true) => "TCP, IPv6",
    }
}

fn word(way: Way) -> &'static str {
    match way {
        Way::Up => "up",
        Way::Down => "down",
    }
}

fn mbit(rate: BitsPerSecond) -> String {
    format!("{:.2}", rate.0 as f64 / 1e6)
}

/// A rate as people read it.
pub(crate) fn rate(rate: BitsPerSecond) -> String {
    format!("{} Mbit/s", mbit(rate))
}

/// A time as people read it.
pub(crate) fn milliseconds(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}
