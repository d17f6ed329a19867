//! `qos stats`: what was counted, and the rates between two readings.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use clap::Args;
use comfy_table::Table;

use super::CliError;
use super::client::Client;
use super::output::Output;
use crate::api::types::Listing;
use crate::domain::{Allocation, AllocationId, BitsPerSecond, ByteCount, Direction};
use crate::manager::report::{ClassifierStatistics, Count, Counts, DirectedCounts, MtuCounts, Statistics};
use crate::plural::counted;

/// Shows what was counted, and rates
///
/// Bytes are counted in the contract's length: the IP length of each packet plus the line's
/// overhead, in cells where the line is ATM. Without --watch the totals since each allocation and
/// provider was set up are shown, with --watch the rates since the last reading.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  qos stats
  qos stats --watch
  qos stats --watch 5 -o json")]
pub(super) struct Stats {
    /// Show rates, again and again, until interrupted; every second, or as many as are given
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = interval)]
    watch: Option<Duration>,
}

fn interval(text: &str) -> Result<Duration, String> {
    text.parse::<f64>()
        .ok()
        .filter(|seconds| (0.1..=3_600.0).contains(seconds))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| format!("`{text}` is not a time in seconds from 0.1 to 3600"))
}

pub(super) fn run(stats: &Stats, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    match stats.watch {
        None => output.show(&client.get("/v1/statistics")?, |output, now: Statistics| {
            let allocations = allocations(client)?;
            output.line(text(&totals(output, &now, &allocations), &now))
        }),
        Some(interval) => watch(interval, client, output),
    }
}

fn watch(interval: Duration, client: &Client, output: &mut Output) -> Result<(), CliError> {
    let mut before: Option<Statistics> = None;
    loop {
        let answer = client.get("/v1/statistics")?;
        if output.is_json() {
            output.json_line(&answer)?;
        } else {
            let now: Statistics = answer.typed()?;
            if let Some(before) = &before {
                let allocations = allocations(client)?;
                refresh(output, &text(&rates(output, before, &now, &allocations), &now))?;
            } else if output.terminal {
                refresh(output, "measuring …\n")?;
            }
            before = Some(now);
        }
        thread::sleep(interval);
    }
}

/// Prints in place on a terminal, below the last elsewhere.
fn refresh(output: &mut Output, text: &str) -> Result<(), CliError> {
    if !output.terminal {
        return output.line(text);
    }
    // Line by line over what is there, and only then the rest: clearing first would flicker.
    let mut screen = String::from("\x1b[H");
    for line in text.lines() {
        screen.push_str(line);
        screen.push_str("\x1b[K\n");
    }
    screen.push_str("\x1b[J");
    Ok(output.bytes(screen.as_bytes())?)
}

fn allocations(client: &Client) -> Result<BTreeMap<AllocationId, Allocation>, CliError> {
    let listing: Listing<Allocation> = client.get("/v1/allocations")?.typed()?;
    Ok(listing.items.into_iter().map(|allocation| (allocation.id, allocation)).collect())
}

/// A direction of something that is counted.
struct Row<'s> {
    /// Number of the allocation, if it is one, and provider.
    names: Vec<String>,
    direction: &'static str,
    counts: &'s Counts,
    before: Counts,
}

/// Rows of the allocations, and of the providers. Directions in which nothing can match or was
/// counted are left out.
fn rows<'s>(
    before: &Statistics,
    now: &'s Statistics,
    allocations: &BTreeMap<AllocationId, Allocation>,
) -> [Vec<Row<'s>>; 2] {
    let directions = |names: Vec<String>,
                      now: &'s DirectedCounts,
                      before: Option<&DirectedCounts>,
                      covers: &dyn Fn(Direction) -> bool| {
        let before = before.copied().unwrap_or_default();
        [
            ("down", Direction::Downstream, &now.down, before.down),
            ("up", Direction::Upstream, &now.up, before.up),
        ]
        .into_iter()
        .filter(|(_, direction, counts, _)| covers(*direction) || **counts != Counts::default())
        .map(|(direction, _, counts, before)| Row { names: names.clone(), direction, counts, before })
        .collect::<Vec<_>>()
    };
    let of_allocations = now.allocations.iter().flat_map(|(id, counts)| {
        let allocation = allocations.get(id);
        let provider = allocation.map_or_else(|| "(ended)".to_owned(), |known| known.provider.to_string());
        directions(vec![id.to_string(), provider], counts, before.allocations.get(id), &|direction| {
            allocation.is_some_and(|allocation| allocation.covers(direction))
        })
    });
    let of_providers = now.providers.iter().flat_map(|(name, counts)| {
        directions(vec![name.to_string()], counts, before.providers.get(name), &|_| false)
    });
    [of_allocations.collect(), of_providers.collect()]
}

fn totals(output: &Output, now: &Statistics, allocations: &BTreeMap<AllocationId, Allocation>) -> [Table; 2] {
    tables(
        output,
        rows(&Statistics::default(), now, allocations),
        ["PASSED", "PACKETS", "IN PROFILE", "EXCESS", "DROPPED", "QUEUE DROPS", "MARKED"],
        |Row { counts, .. }| {
            [
                size(counts.passed),
                counts.passed.packets.to_string(),
                size(counts.in_profile),
                size(counts.excess),
                size(counts.dropped),
                counts.queue_dropped_packets.to_string(),
                size(counts.marked),
            ]
        },
    )
}

fn rates(
    output: &Output,
    before: &Statistics,
    now: &Statistics,
    allocations: &BTreeMap<AllocationId, Allocation>,
) -> [Table; 2] {
    let seconds = now.at_ns.saturating_sub(before.at_ns).max(1) as f64 / 1e9;
    let per_second = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
    let rate = |now: Count, before: Count| {
        BitsPerSecond(round_to_three_digits(per_second(now.bytes, before.bytes) * 8.0)).to_string()
    };
    tables(
        output,
        rows(before, now, allocations),
        ["RATE", "PACKETS/S", "IN PROFILE", "EXCESS", "DROPPED", "QUEUE DROPS/S", "MARKED"],
        |Row { counts, before, .. }| {
            [
                rate(counts.passed, before.passed),
                format!("{:.0}", per_second(counts.passed.packets, before.passed.packets)),
                rate(counts.in_profile, before.in_profile),
                rate(counts.excess, before.excess),
                rate(counts.dropped, before.dropped),
                format!("{:.0}", per_second(counts.queue_dropped_packets, before.queue_dropped_packets)),
                rate(counts.marked, before.marked),
            ]
        },
    )
}

fn tables(
    output: &Output,
    rows: [Vec<Row<'_>>; 2],
    columns: [&str; 7],
    values: impl Fn(&Row<'_>) -> [String; 7],
) -> [Table; 2] {
    let table = |rows: Vec<Row<'_>>, names: &[&str]| {
        let header: Vec<_> = names.iter().copied().chain([""]).chain(columns).collect();
        // All but the provider and the direction are numbers.
        let right: Vec<_> =
            (0..header.len()).filter(|index| !matches!(header[*index], "PROVIDER" | "")).collect();
        let mut table = output.table(&header, &right);
        for row in rows {
            let names = row.names.iter().cloned().chain([row.direction.to_owned()]);
            table.add_row(names.chain(values(&row)));
        }
        table
    };
    let [of_allocations, of_providers] = rows;
    [table(of_allocations, &["ID", "PROVIDER"]), table(of_providers, &["PROVIDER"])]
}

fn size(count: Count) -> String {
    ByteCount(round_to_three_digits(count.bytes as f64)).to_string()
}

/// More digits than anybody reads in a table that moves.
fn round_to_three_digits(value: f64) -> u64 {
    if value < 1_000.0 {
        return value.round() as u64;
    }
    let unit = 10_f64.powf(value.log10().floor() - 2.0);
    ((value / unit).round() * unit).round() as u64
}

/// The tables that have rows, and what became of all packets.
fn text(tables: &[Table], now: &Statistics) -> String {
    let tables = tables.iter().filter(|table| !table.is_empty()).map(Table::trim_fmt);
    tables
        .chain([outcomes(now)])
        .chain(above_mtu(now))
        .chain([classifier(now)])
        .collect::<Vec<_>>()
        .join("\n\n")
}

/// What the classifier is made of and what it costs.
fn classifier(now: &Statistics) -> String {
    let ClassifierStatistics {
        rules,
        rules_most,
        memory_bytes,
        worst_case_comparisons,
        max_checks,
        look_ups,
        ..
    } = now.classifier;
    let mut lines = vec![format!(
        "classifier: {rules} of {rules_most} rules in {}, at most {worst_case_comparisons} comparisons a packet \
         (requests are refused above {max_checks})",
        ByteCount(round_to_three_digits(memory_bytes as f64))
    )];
    if look_ups > 0 {
        let each = |count: u64| count as f64 / look_ups as f64;
        lines.push(format!(
            "{look_ups} look-ups, each in {:.1} tables, {:.1} forks and {:.1} rules on average",
            each(now.classifier.tables),
            each(now.classifier.forks),
            each(now.classifier.comparisons)
        ));
    }
    lines.extend(now.classifier.sets.iter().map(|set| {
        let mut line = format!(
            "{} {}: {} in {}, longest list {}",
            set.direction,
            set.family,
            counted(set.hashed_rules, "rule"),
            counted(set.hash_tables, "hash table"),
            set.longest_hashed.0
        );
        if set.trees > 0 {
            line += &format!(
                "; {} in {} that each packet goes through, longest list {}",
                counted(set.tree_rules, "rule"),
                counted(set.trees, "tree"),
                set.longest_in_trees.0
            );
        }
        line
    }));
    lines.join("\n")
}

/// What was done for the MTU of allocations, where anything was.
fn above_mtu(now: &Statistics) -> Option<String> {
    let both =
        now.allocations.iter().flat_map(|(id, counts)| [(id, "down", counts.down), (id, "up", counts.up)]);
    let lines: Vec<_> = both
        .filter(|(.., counts)| counts.mtu != MtuCounts::default())
        .map(|(id, direction, Counts { mtu, .. })| {
            format!(
                "mtu of {id} {direction}: {} packets too big and dropped, {} senders told, {} that may be \
                 fragmented passed, {} handshakes lowered",
                mtu.dropped_packets, mtu.senders_told, mtu.passed_packets, mtu.mss_lowered
            )
        })
        .collect();
    (!lines.is_empty()).then(|| lines.join("\n"))
}

/// What became of all packets.
fn outcomes(now: &Statistics) -> String {
    let parts: Vec<_> = now
        .outcomes
        .iter()
        .filter(|(_, packets)| **packets > 0)
        .map(|(outcome, packets)| format!("{} {packets}", outcome.replace('_', " ")))
        .collect();
    if parts.is_empty() { "no packet seen".to_owned() } else { format!("packets: {}", parts.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_rounded_to_what_is_read() {
        for (value, expected) in [
            (0.4, 0),
            (999.6, 1_000),
            (1_234.0, 1_230),
            (19_999_999.0, 20_000_000),
            (12_345_678.0, 12_300_000),
        ] {
            assert_eq!(round_to_three_digits(value), expected, "{value}");
        }
    }

    #[test]
    fn rates_are_the_difference_of_two_readings() {
        let count = |bytes, packets| Counts {
            passed: Count { packets, bytes },
            in_profile: Count { packets, bytes },
            ..Counts::default()
        };
        let reading = |at_ns, bytes, packets| Statistics {
            at_ns,
            allocations: [(
                AllocationId(7),
                DirectedCounts { down: count(bytes, packets), up: Counts::default() },
            )]
            .into(),
            ..Statistics::default()
        };
        let output = Output::to(std::io::sink(), std::io::sink());
        let [allocations, providers] = rates(
            &output,
            &reading(1_000_000_000, 1_000_000, 100),
            &reading(3_000_000_000, 6_000_000, 5_100),
            &BTreeMap::new(),
        );
        let text = allocations.trim_fmt();
        let row: Vec<_> = text.lines().nth(1).expect("one row").split_whitespace().collect();
        assert_eq!(row[..6], ["7", "(ended)", "down", "20", "Mbit/s", "2500"], "{text}");
        assert!(providers.is_empty());
    }
}
