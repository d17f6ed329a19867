//! `qos status`: the daemon and its gateway.

use clap::Args;

use super::CliError;
use super::client::Client;
use super::output::{Output, moment};
use crate::api::types;
use crate::manager::LineSide;
use crate::source::RadiusStatistics;
use crate::source::radacct::RadacctStatus;

/// Shows the daemon and its gateway
#[derive(Debug, Args)]
pub(super) struct Status {}

pub(super) fn run(client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    output.show(&client.get("/v1/status")?, print)
}

fn print(output: &mut Output, status: types::Status) -> Result<(), CliError> {
    let types::Status { counted, gateway, sources, .. } = status;
    let reconciled = match (status.reconciled_at, status.reconcile_error) {
        (_, Some(error)) => format!("no: {error}"),
        (Some(at), None) => format!("yes, {}", moment(at)),
        (None, None) => "not yet".to_owned(),
    };
    let line_side = match status.line_side {
        LineSide::Lan => "lan: guarantees downstream are hard",
        LineSide::Wan => "wan: guarantees upstream are hard",
    };
    output.pairs(vec![
        (
            "qosd",
            Some(format!("{}, process {}, since {}", status.version, status.pid, moment(status.started_at))),
        ),
        ("kernel", Some(gateway.kernel)),
        ("mode", Some(gateway.mode)),
        (
            "programs",
            Some(format!(
                "ABI {}, {}",
                gateway.abi,
                if gateway.taken_over { "taken over from an earlier qosd" } else { "attached afresh" }
            )),
        ),
        ("line side", Some(line_side.to_owned())),
        ("link", Some(format!("down {}, up {}", status.link.down, status.link.up))),
        ("providers", Some(format!("{}, with {} applications", counted.providers, counted.applications))),
        ("sessions", Some(counted.sessions.to_string())),
        ("profiles", Some(counted.profiles.to_string())),
        (
            "allocations",
            Some(format!(
                "{} ({} of {} in the kernel)",
                counted.allocations, gateway.allocations.0, gateway.allocations.1
            )),
        ),
        (
            "rules",
            Some(format!(
                "{} of {}, at most {} compared for a packet",
                gateway.rules.0, gateway.rules.1, gateway.worst_case_comparisons
            )),
        ),
        ("kernel equals state", Some(reconciled)),
        ("state", Some(status.state_dir.display().to_string())),
        ("pinned at", Some(status.bpffs_dir.display().to_string())),
        ("RADIUS", sources.radius.map(radius)),
        ("radacct", sources.radacct.map(radacct)),
    ])?;

    output.line("")?;
    let header = ["INTERFACE", "ROLE", "CAPACITY", "INDEX", "XDP", "TC", "SCHEDULER", "CLASSES"];
    let mut table = output.table(&header, &[2, 3, 7]);
    for interface in gateway.interfaces {
        table.add_row([
            interface.name,
            interface.role,
            interface.capacity.to_string(),
            interface.index.map_or_else(|| "missing".to_owned(), |index| index.to_string()),
            interface.xdp,
            interface.tc,
            interface.scheduler,
            interface.classes.to_string(),
        ]);
    }
    output.print(&table)?;

    if gateway.repairs.is_empty() {
        return Ok(());
    }
    output.line("")?;
    let mut table = output.table(&["REPAIRED", "WHAT WAS WRONG"], &[]);
    for repair in gateway.repairs {
        table.add_row([moment(repair.at), repair.what]);
    }
    output.print(&table)
}

fn radius(statistics: RadiusStatistics) -> String {
    let RadiusStatistics { received, acknowledged, repeated, refused, dropped } = statistics;
    let reasons = [
        ("unknown client", dropped.unknown_client),
        ("wrong secret", dropped.wrong_secret),
        ("malformed", dropped.malformed),
        ("no accounting", dropped.other_code),
        ("in progress", dropped.in_progress),
        ("too many", dropped.overload),
        ("not written", dropped.unwritten),
    ];
    let reasons: Vec<_> = reasons
        .iter()
        .filter(|(_, count)| *count > 0)
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect();
    let dropped = if reasons.is_empty() { "none".to_owned() } else { reasons.join(", ") };
    format!(
        "{received} packets, {acknowledged} acknowledged ({repeated} repeated, {refused} of no use), dropped: {dropped}"
    )
}

fn radacct(status: RadacctStatus) -> String {
    let RadacctStatus { read_at, error, open, contested, told, refused, unusable } = status;
    let read = match (read_at, error) {
        (Some(at), None) => format!("read {}", moment(at)),
        (Some(at), Some(error)) => format!("not read since {}: {error}", moment(at)),
        (None, Some(error)) => format!("not read: {error}"),
        (None, None) => "not read yet".to_owned(),
    };
    format!(
        "{read}; {open} open, {contested} of them with an address or line that another has; told {told} times, \
         {refused} refused; {unusable} rows of no use"
    )
}
