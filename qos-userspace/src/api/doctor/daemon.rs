//! What the daemon's own status says of the whole gateway.

use super::Check;
use crate::api::types::Status;
use crate::plural::counted;

/// Share of a table above which it counts as nearly full, in percent.
const NEARLY_FULL: u64 = 90;

pub(super) fn checks(status: &Status) -> Vec<Check> {
    let gateway = &status.gateway;
    let mut checks = Vec::new();
    checks.push(if gateway.mode == "observe" {
        Check::warning(
            "mode",
            "observe: packets are classified and counted",
            "nothing is dropped, delayed or marked: no level is held",
            "set mode = \"enforce\" when you have seen enough, and restart qosd",
        )
    } else {
        Check::ok("mode", gateway.mode.as_str())
    });
    for (name, (used, size), mend) in [
        ("rules", gateway.rules, "use fewer selectors, or wider ones"),
        ("allocations in the kernel", gateway.allocations, "revoke what is not needed"),
    ] {
        let found = format!("{used} of {size}");
        let nearly_full = u64::from(used) * 100 >= u64::from(size) * NEARLY_FULL;
        checks.push(if nearly_full {
            Check::warning(name, found, "requests are refused when it is full", mend)
        } else {
            Check::ok(name, found)
        });
    }
    checks.push(match (&status.reconcile_error, gateway.repairs.last()) {
        (Some(error), _) => Check::error(
            "kernel equals state",
            error.as_str(),
            "what was granted is not all held",
            "mend what it names, then `qos reconcile`",
        ),
        (None, Some(last)) => Check::warning(
            "kernel equals state",
            format!(
                "it does; {} since the start, the last: {}",
                counted(gateway.repairs.len(), "repair"),
                last.what
            ),
            "until each repair levels were not held there",
            "find out who else changes qdiscs, maps or programs on these interfaces",
        ),
        (None, None) => Check::ok("kernel equals state", "nothing had to be repaired"),
    });
    checks
}
