//! `qos list` and `qos show`: allocations, one a line and one in full.

use clap::Args;
use jiff::Timestamp;

use super::CliError;
use super::client::Client;
use super::level;
use super::output::{Output, joined, microseconds, moment, or_dash};
use crate::api::types::Listing;
use crate::domain::{Allocation, BitsPerSecond, DelayBound, Name, Status};

/// Shows allocations, one a line
///
/// Rates are from the guaranteed to the maximum one.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  qos list --provider acme
  qos list --ended 20
  qos list -o json | jq '.items[].id'")]
pub(super) struct List {
    /// Only those of one provider
    #[arg(long, value_name = "NAME")]
    provider: Option<Name>,
    /// The last that ended instead, newest first
    #[arg(long, value_name = "COUNT", num_args = 0..=1, default_missing_value = "20")]
    ended: Option<u32>,
}

/// Shows one allocation in full
///
/// An ended one is found too while it is among the last thousand.
#[derive(Debug, Args)]
pub(super) struct Show {
    /// Its number
    id: u64,
}

pub(super) fn list(list: &List, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    let options = [
        list.provider.as_ref().map(|provider| format!("provider={provider}")),
        list.ended.map(|count| format!("ended={count}")),
    ];
    let query = joined(options.into_iter().flatten(), "&");
    let path =
        if query.is_empty() { "/v1/allocations".to_owned() } else { format!("/v1/allocations?{query}") };
    let ended = list.ended.is_some();
    output.show(&client.get(&path)?, |output, allocations: Listing<Allocation>| {
        let last = if ended { "REASON" } else { "EXPIRES" };
        let header = ["ID", "PROVIDER", "APP", "SESSION", "DOWN", "UP", "PRIORITY", last, "FLOWS"];
        let mut table = output.table(&header, &[0, 6]);
        for allocation in allocations.items {
            let level = &allocation.level;
            table.add_row([
                allocation.id.to_string(),
                allocation.provider.to_string(),
                or_dash(allocation.application.as_ref()),
                or_dash(allocation.session.as_ref()),
                rates(level.guaranteed.down, level.maximum.down),
                rates(level.guaranteed.up, level.maximum.up),
                level.priority.to_string(),
                if ended { or_dash(allocation.reason.as_ref()) } else { expires(&allocation) },
                flows(&allocation),
            ]);
        }
        output.print(&table)
    })
}

pub(super) fn show(show: &Show, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    output.show(&client.get(&format!("/v1/allocations/{}", show.id))?, |output, allocation: Allocation| {
        details(output, &allocation)
    })
}

/// Everything about an allocation.
pub(super) fn details(output: &mut Output, allocation: &Allocation) -> Result<(), CliError> {
    let mut pairs = vec![
        ("id", Some(allocation.id.to_string())),
        ("provider", Some(allocation.provider.to_string())),
        ("application", allocation.application.as_ref().map(Name::to_string)),
        ("session", allocation.session.as_ref().map(Name::to_string)),
        ("status", Some(status(allocation.status).to_owned())),
        ("reason", allocation.reason.clone()),
        ("flows", Some(joined(&allocation.selectors, "\n"))),
        ("precedence", Some(allocation.precedence.to_string())),
        ("profile", allocation.profile.as_ref().map(Name::to_string)),
    ];
    pairs.extend(level::pairs(&allocation.level));
    pairs.extend([
        ("delay bound down", allocation.delay_bound.down.map(bound)),
        ("delay bound up", allocation.delay_bound.up.map(bound)),
        ("jitter bound down", allocation.delay_bound.down.map(|bound| microseconds(bound.jitter_us()))),
        ("jitter bound up", allocation.delay_bound.up.map(|bound| microseconds(bound.jitter_us()))),
        ("granted", Some(moment(allocation.granted_at))),
        ("expires", Some(allocation.expires_at.map_or_else(|| "never".to_owned(), moment))),
        ("ended", allocation.ended_at.map(moment)),
    ]);
    output.pairs(pairs)
}

/// The whole, and the parts that there are.
fn bound(bound: DelayBound) -> String {
    let parts = [
        (bound.line_us, "of the line"),
        (bound.line_queue_us, "queued on it"),
        (bound.link_queue_us, "on the link"),
    ];
    let parts: Vec<_> = parts
        .into_iter()
        .filter(|(time, _)| *time > 0)
        .map(|(time, what)| format!("{} {what}", microseconds(time)))
        .collect();
    format!("{} ({})", microseconds(bound.whole_us), parts.join(", "))
}

fn status(status: Status) -> &'static str {
    match status {
        Status::Requested => "requested",
        Status::Available => "available",
        Status::Unavailable => "unavailable",
    }
}

/// From the guaranteed to the maximum rate.
fn rates(guaranteed: Option<BitsPerSecond>, maximum: Option<BitsPerSecond>) -> String {
    match (guaranteed, maximum) {
        (None, None) => "-".to_owned(),
        (Some(guaranteed), None) => format!("from {guaranteed}"),
        (None, Some(maximum)) => format!("up to {maximum}"),
        (Some(guaranteed), Some(maximum)) if guaranteed == maximum => maximum.to_string(),
        (Some(guaranteed), Some(maximum)) => format!("{guaranteed} to {maximum}"),
    }
}

/// The time that is left, in whole seconds.
fn expires(allocation: &Allocation) -> String {
    let Some(end) = allocation.expires_at else { return "never".to_owned() };
    let left = end.duration_since(Timestamp::now()).as_secs();
    if left <= 0 {
        return "now".to_owned();
    }
    let (days, hours, minutes, seconds) = (left / 86_400, left / 3_600 % 24, left / 60 % 60, left % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("in {seconds}s"),
        (0, 0, _) => format!("in {minutes}m{seconds:02}s"),
        (0, ..) => format!("in {hours}h{minutes:02}m"),
        _ => format!("in {days}d{hours:02}h"),
    }
}

/// The first flow, and how many more there are.
fn flows(allocation: &Allocation) -> String {
    match allocation.selectors.as_slice() {
        [] => "-".to_owned(),
        [only] => only.to_string(),
        [first, more @ ..] => format!("{first} (and {} more)", more.len()),
    }
}
