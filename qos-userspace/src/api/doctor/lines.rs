//! What the lines and levels ask of packets, and what that comes to: cells, overheads, MTUs.

use std::collections::BTreeMap;

use qos_common::length::{self, ETHERNET_OVERHEAD, LinkLayer};

use super::Check;
use crate::domain::{AllocationId, Enforcement};
use crate::manager::State;
use crate::plural::counted;

/// Bytes of the largest packet that GRO makes.
const LARGEST_MERGED: u32 = 65_535;

/// Lines and levels, as far as they ask something of interfaces.
#[derive(Clone, Debug, Default)]
pub(super) struct Lines {
    /// Largest IP packet of the gateway, in bytes.
    pub(super) mtu: u32,
    /// Lines on ATM, by overhead.
    pub(super) atm: BTreeMap<i16, Atm>,
    /// How many lines have an overhead below the Ethernet header, by overhead.
    pub(super) below_ethernet: BTreeMap<i16, usize>,
    /// MTUs that levels have.
    pub(super) mtus: Vec<(AllocationId, u16)>,
    /// Allocations that are policed.
    pub(super) policed: usize,
}

/// Lines on ATM with one overhead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Atm {
    /// How many.
    lines: usize,
    /// Allocations on them.
    allocations: usize,
    /// Those among them whose largest packets leave bytes of their last cell empty.
    wasteful: usize,
}

impl Lines {
    pub(super) fn of(state: &State) -> Self {
        let mtu = state.network.mtu;
        let mut lines = Self { mtu, ..Self::default() };
        for session in state.sessions.values() {
            if session.link_layer == LinkLayer::Atm {
                lines.atm.entry(session.overhead).or_default().lines += 1;
            }
            if session.overhead < ETHERNET_OVERHEAD {
                *lines.below_ethernet.entry(session.overhead).or_default() += 1;
            }
        }
        for allocation in state.allocations.values() {
            let level = &allocation.level;
            lines.policed += usize::from(level.enforcement == Enforcement::Police);
            lines.mtus.extend(level.mtu.map(|mtu| (allocation.id, mtu)));
            let session = allocation.session.as_ref().and_then(|name| state.sessions.get(name));
            if let Some(session) = session.filter(|session| session.link_layer == LinkLayer::Atm) {
                let atm = lines.atm.entry(session.overhead).or_default();
                let largest = level.mtu.map_or(mtu, |own| mtu.min(u32::from(own)));
                atm.allocations += 1;
                atm.wasteful += usize::from(better_size(largest, session.overhead).is_some());
            }
        }
        lines
    }
}

pub(super) fn checks(lines: &Lines) -> Vec<Check> {
    let mut checks: Vec<_> =
        lines.atm.iter().map(|(overhead, atm)| cells(lines.mtu, *overhead, *atm)).collect();
    checks.extend(lines.below_ethernet.iter().map(|(overhead, count)| {
        let more = ETHERNET_OVERHEAD - overhead;
        Check::warning(
            "line overhead",
            format!("{} of {overhead} bytes, less than the Ethernet header", counted(*count, "line")),
            format!(
                "the scheduler can't take bytes off: where they leave by Ethernet, {more} bytes too much are \
                 charged for each packet, {} of a full one and {} of one of 64 bytes",
                percent(share(more, lines.mtu, *overhead)),
                percent(share(more, 64, *overhead)),
            ),
            "if the line's frames are Ethernet's, give its session --overhead 14 or more; if they are not, \
             leave it: packets are slowed by that much",
        )
    }));
    checks
}

/// On ATM the last cell of a full packet may be nearly empty.
fn cells(mtu: u32, overhead: i16, atm: Atm) -> Check {
    const NAME: &str = "ATM cells";
    let unused = length::unused_in_cells(mtu, overhead);
    let found = format!(
        "{} with an overhead of {overhead} bytes: a packet of {mtu} bytes",
        counted(atm.lines, "line")
    );
    if unused == 0 {
        return Check::ok(NAME, format!("{found} fills its cells"));
    }
    let found = format!("{found} leaves {unused} bytes of its last cell empty");
    let Some(fits) = better_size(mtu, overhead) else {
        return Check::ok(NAME, format!("{found}, fewer than smaller ones would cost"));
    };
    let Atm { allocations, wasteful, .. } = atm;
    if wasteful == 0 {
        return Check::ok(NAME, format!("{found}; levels with --mtu {fits} fill theirs, {allocations} do"));
    }
    Check::warning(
        NAME,
        format!("{found}, and {wasteful} of {allocations} levels there allow it"),
        format!("{} of what full packets take of such a line", percent(waste(mtu, fits, overhead))),
        format!("grant levels there with --mtu {fits}, whose packets fill their cells"),
    )
}

/// The size of packets that takes less of an ATM line than `mtu` for the same bytes; none where there is
/// none: smaller packets repeat the overhead more often.
fn better_size(mtu: u32, overhead: i16) -> Option<u32> {
    length::largest_in_whole_cells(mtu, overhead).filter(|fits| waste(mtu, *fits, overhead) > 0.0)
}

/// Share of a line that full packets waste, compared with those of `fits` bytes, which fill their cells.
fn waste(mtu: u32, fits: u32, overhead: i16) -> f64 {
    let cost = |ip_length| f64::from(length::charged(ip_length, overhead, LinkLayer::Atm));
    1.0 - cost(fits) * f64::from(mtu) / (cost(mtu) * f64::from(fits))
}

/// Share by which the scheduler counts merged packets too low on ATM: it adds the overhead, and rounds
/// to cells, once for all of them. Negative: too high.
pub(super) fn merged_undercount(mtu: u32, overhead: i16) -> f64 {
    let segments = (LARGEST_MERGED / mtu.max(1)).max(1);
    let ethernet = u32::from(ETHERNET_OVERHEAD.unsigned_abs());
    let counted = length::charged(segments * (mtu + ethernet) - ethernet, overhead, LinkLayer::Atm);
    let due = segments * length::charged(mtu, overhead, LinkLayer::Atm);
    1.0 - f64::from(counted) / f64::from(due)
}

/// What `more` bytes are of a packet on a line.
fn share(more: i16, ip_length: u32, overhead: i16) -> f64 {
    f64::from(more) / f64::from(length::charged(ip_length, overhead, LinkLayer::Ethernet).max(1))
}

pub(super) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    #[test]
    fn cells_are_worth_a_warning_where_a_level_wastes_them() {
        // 1,500 + 32 bytes take 32 cells of 48, which have room for 1,536; 1,500 + 36 fill them.
        let of =
            |overhead, allocations, wasteful| cells(1_500, overhead, Atm { lines: 2, allocations, wasteful });
        let none = of(32, 0, 0);
        assert_eq!(none.severity, Severity::Ok);
        assert!(none.found.contains("2 lines") && none.found.contains("leaves 4 bytes"), "{none:?}");
        assert!(none.found.contains("--mtu 1456"), "{none:?}");
        let wasteful = of(32, 3, 1);
        assert_eq!(wasteful.severity, Severity::Warning);
        assert!(wasteful.found.contains("1 of 3 levels"), "{wasteful:?}");
        assert!(wasteful.mend.as_ref().is_some_and(|mend| mend.contains("--mtu 1456")), "{wasteful:?}");
        assert_eq!(of(32, 3, 0).severity, Severity::Ok);
        assert_eq!(
            of(36, 3, 0).found,
            "2 lines with an overhead of 36 bytes: a packet of 1500 bytes fills its cells"
        );
    }

    #[test]
    fn waste_is_what_the_empty_part_of_the_last_cell_costs() {
        // 1,500 bytes in 32 cells, 1,456 in 31: 46.875 and 46.968 a cell.
        let expected = 1.0 - (31.0 * 1_500.0) / (32.0 * 1_456.0);
        assert!((waste(1_500, 1_456, 32) - expected).abs() < 1e-12);
        // One byte too many takes a whole cell.
        assert!(waste(1_493, 1_492, 44) > 0.029, "{}", waste(1_493, 1_492, 44));
        assert_eq!(better_size(1_493, 44), Some(1_492));
        assert_eq!(better_size(1_492, 44), None);
        // One byte is empty, and packets one cell shorter would repeat the overhead more often.
        assert_eq!(better_size(1_500, 35), None);
    }

    #[test]
    fn merged_packets_are_counted_too_low_on_atm() {
        // 43 packets of 1,500 bytes: 43 × 1,514 + 18 bytes are 1,357 cells, 43 × 32 are 1,376.
        let share = merged_undercount(1_500, 32);
        assert!((share - (1.0 - 1_357.0 / 1_376.0)).abs() < 1e-12, "{share}");
        // One packet is counted as it is.
        assert!(merged_undercount(65_000, 32).abs() < 1e-12);
    }
}
