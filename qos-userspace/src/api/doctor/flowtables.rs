//! Short cuts of netfilter: what they go past.
//!
//! A flowtable takes packets at netfilter's ingress hook, behind XDP and tc ingress of the device that it
//! names, and sends them out of the device of the route, by its tc egress and its queues
//! (net/netfilter/nf_flow_table_ip.c, 6.1). It looks through the tags and bridges of its devices, so that
//! devices above those never see what comes in. In hardware all that is gone.

use super::Check;
use crate::gateway::flowtable::{Flowtable, FlowtableError};
use crate::gateway::link::Link;

pub(super) fn checks(
    flowtables: Result<Vec<Flowtable>, FlowtableError>,
    configured: &[Link],
    all: &[Link],
) -> Vec<Check> {
    const NAME: &str = "flowtables";
    let flowtables = match flowtables {
        Ok(flowtables) => flowtables,
        Err(error) => {
            return vec![Check::warning(
                NAME,
                format!("not looked at: {error}"),
                "one in hardware would forward packets past all levels",
                "run as root, or see `nft list flowtables`",
            )];
        }
    };
    let checks: Vec<_> =
        flowtables.iter().filter_map(|flowtable| check(flowtable, configured, all)).collect();
    if checks.is_empty() { vec![Check::ok(NAME, "none on these interfaces")] } else { checks }
}

fn check(flowtable: &Flowtable, configured: &[Link], all: &[Link]) -> Option<Check> {
    let name = format!("flowtable {} {}", flowtable.table, flowtable.name);
    let taken: Vec<_> =
        configured.iter().filter(|link| flowtable.takes(link)).map(|link| link.name.as_str()).collect();
    // Devices above what it takes, which it goes past.
    let above = configured.iter().filter(|link| {
        let is_below = |other: &&Link| {
            Some(other.index) == link.lower && link.kind.as_deref() != Some("veth")
                || other.controller == Some(link.index)
        };
        all.iter().filter(is_below).any(|below| flowtable.takes(below))
    });
    let above: Vec<_> = above.map(|link| link.name.as_str()).collect();
    if taken.is_empty() && above.is_empty() {
        return None;
    }
    let devices = flowtable.devices.join(", ");
    Some(if flowtable.hardware {
        Check::error(
            name,
            format!("in hardware (flags offload), on {devices}"),
            "where the NIC takes a flow, its packets are neither judged nor queued, counted or marked",
            "declare it without `flags offload`: in software it goes by our programs and queues",
        )
    } else if above.is_empty() {
        Check::ok(
            name,
            format!(
                "in software, on {devices}: it takes packets behind our ingress and sends them by our egress \
                 and queues; past netfilter's forward hooks only"
            ),
        )
    } else {
        Check::warning(
            name,
            format!("in software, on {devices}, beneath {}", above.join(", ")),
            format!(
                "packets that come by {} go past its ingress hooks: they are classified at egress, at more \
                 work, and a bridge's own egress is gone past too",
                above.join(", ")
            ),
            "configure the devices that it names, or take them out of it",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        Link { name: name.to_owned(), index, ..Link::by_name("lo").expect("every box has it") }
    }

    #[test]
    fn each_kind_of_flowtable_is_judged() {
        let port = link(2, "eth0");
        let vlan = Link { kind: Some("vlan".to_owned()), lower: Some(2), ..link(3, "eth0.5") };
        let all = [port.clone(), vlan.clone()];
        let flowtable = |device: &str, hardware| Flowtable {
            table: "filter".to_owned(),
            name: "fast".to_owned(),
            devices: vec![device.to_owned()],
            hardware,
        };
        for (configured, device, hardware, name, severity) in [
            (&port, "eth1", true, "flowtables", Severity::Ok),
            (&port, "eth0", false, "flowtable filter fast", Severity::Ok),
            (&port, "eth0", true, "flowtable filter fast", Severity::Error),
            (&vlan, "eth0", false, "flowtable filter fast", Severity::Warning),
            (&vlan, "eth0", true, "flowtable filter fast", Severity::Error),
            (&vlan, "eth0.5", false, "flowtable filter fast", Severity::Ok),
        ] {
            let found = checks(Ok(vec![flowtable(device, hardware)]), std::slice::from_ref(configured), &all);
            let shown: Vec<_> = found.iter().map(|check| (check.name.as_str(), check.severity)).collect();
            assert_eq!(shown, [(name, severity)], "{device} {hardware}: {found:?}");
        }
    }
}
