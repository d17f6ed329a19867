//! What the gateway promised, held against what was measured.

use std::time::Duration;

use qos_userspace::domain::units::BitsPerSecond;

use crate::report::{milliseconds, rate};
use crate::scenario::{LINES, LINK, Way};
use crate::story::{Held, Results};

/// Share of a guarantee that must arrive.
const GUARANTEE: f64 = 0.95;
/// Multiple of a maximum that must not be exceeded.
const MAXIMUM: f64 = 1.03;
/// Bound of the high-priority flow's 99th percentile.
pub(crate) const LATENCY: Duration = Duration::from_millis(5);

/// The promises that were not kept, each in a sentence.
pub(crate) fn broken(results: &Results) -> Vec<String> {
    let mut broken: Vec<_> = results.held.iter().filter_map(broken_by).collect();
    for Sum { name, way, capacity, carried, .. } in sums(results) {
        if exceeds(carried, capacity) {
            let word = if way == Way::Down { "downstream" } else { "upstream" };
            broken.push(format!("{name} {word} carried {}, and has {}", rate(carried), rate(capacity)));
        }
    }
    let p99 = results.with_priority.p99();
    if p99 > LATENCY {
        broken.push(format!(
            "the game's latency at the 99th percentile is {} with its level, and must be within {}",
            milliseconds(p99),
            milliseconds(LATENCY)
        ));
    }
    for (what, ended) in [("was revoked", &results.revoked), ("expired", &results.expired)] {
        if ended.after >= ended.before {
            broken.push(format!(
                "{} has {} after its level {what}, and had {} before",
                ended.title,
                rate(ended.after),
                rate(ended.before)
            ));
        }
    }
    broken
}

/// What is wrong with an allocation's traffic.
pub(crate) fn broken_by(held: &Held) -> Option<String> {
    let achieved = held.measured.achieved;
    let named = || format!("{} (allocation {})", held.title, held.allocation.id);
    if let Some(guaranteed) = held.guaranteed().filter(|rate| achieved.0 as f64 <= GUARANTEE * rate.0 as f64)
    {
        return Some(format!("{} got {} of the {} guaranteed", named(), rate(achieved), rate(guaranteed)));
    }
    let maximum = held.maximum().filter(|maximum| exceeds(achieved, *maximum))?;
    Some(format!("{} got {}, above the maximum of {}", named(), rate(achieved), rate(maximum)))
}

/// All traffic of a line or of the link in one direction.
pub(crate) struct Sum {
    pub(crate) name: &'static str,
    pub(crate) way: Way,
    pub(crate) capacity: BitsPerSecond,
    pub(crate) offered: BitsPerSecond,
    pub(crate) carried: BitsPerSecond,
}

/// What the measured traffic of each line, and of the link, comes to.
pub(crate) fn sums(results: &Results) -> Vec<Sum> {
    let held = results.held.iter().map(|held| (held.traffic, &held.measured));
    let all: Vec<_> = held.chain(results.crowd.iter().map(|free| (free.traffic, &free.measured))).collect();
    let sum = |name, subscriber: Option<&str>, way: Way, capacity| {
        let its = || {
            all.iter().filter(|(traffic, _)| {
                let near = if way == Way::Down { traffic.to.0 } else { traffic.from.0 };
                traffic.way == way && subscriber.is_none_or(|subscriber| near == subscriber)
            })
        };
        let offered = BitsPerSecond(its().map(|(_, measured)| measured.offered.0).sum());
        let carried = BitsPerSecond(its().map(|(_, measured)| measured.achieved.0).sum());
        Sum { name, way, capacity, offered, carried }
    };
    let lines = LINES.iter().flat_map(|line| {
        [
            sum(line.name, Some(line.subscriber), Way::Down, line.down),
            sum(line.name, Some(line.subscriber), Way::Up, line.up),
        ]
    });
    lines.chain([sum("link", None, Way::Down, LINK), sum("link", None, Way::Up, LINK)]).collect()
}

fn exceeds(achieved: BitsPerSecond, maximum: BitsPerSecond) -> bool {
    achieved.0 as f64 > MAXIMUM * maximum.0 as f64
}
