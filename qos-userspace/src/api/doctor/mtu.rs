//! How large packets may be on each interface, and interfaces that stand on one another.

use super::Check;
use super::lines::Lines;
use crate::gateway::link::{Framing, Link};

/// The least MTU of a link with IPv6 (RFC 8200, section 5).
const IPV6_LEAST: u32 = 1_280;
/// Plain Ethernet's less the 8 bytes of PPPoE (RFC 2516).
const PPPOE: u32 = 1_492;

/// `configured`: the interfaces of the configuration that exist. `all`: those of the namespace.
pub(super) fn checks(configured: &[Link], all: &[Link], lines: Option<&Lines>) -> Vec<Check> {
    let mut checks = Vec::new();
    checks.extend(sizes(configured));
    for link in configured {
        checks.extend(too_small(link));
        checks.extend(twice_tagged(link, all));
    }
    checks.extend(lines.and_then(|lines| granted(configured, lines)));
    checks.extend(named_twice(configured, all));
    checks
}

/// Packets that fit one interface and not another.
fn sizes(configured: &[Link]) -> Option<Check> {
    const NAME: &str = "MTU";
    let smallest = configured.iter().min_by_key(|link| link.mtu)?;
    let largest = configured.iter().max_by_key(|link| link.mtu)?;
    let text = configured.iter().map(|link| format!("{} {}", link.name, link.mtu));
    let text = text.collect::<Vec<_>>().join(", ");
    if smallest.mtu == largest.mtu {
        return Some(Check::ok(NAME, text));
    }
    let cost = format!(
        "packets of more than {} bytes from {} to {} are fragmented here, or refused and sent again smaller; \
         connections stall where the senders don't get \"fragmentation needed\" or \"packet too big\"; delays \
         are computed with the largest",
        smallest.mtu, largest.name, smallest.name
    );
    let clamp = format!(
        "nft add rule inet FILTER FORWARD oifname {} tcp flags syn tcp option maxseg size set rt mtu",
        smallest.name
    );
    let is_pppoe = smallest.mtu == PPPOE
        || smallest.framing == Framing::Layer3 && smallest.kind.as_deref() == Some("ppp");
    Some(if is_pppoe {
        Check::warning(
            NAME,
            format!("they differ, by PPPoE's 8 bytes or the like: {text}"),
            cost,
            format!("{clamp}; or grant levels with --mtu {}", smallest.mtu),
        )
    } else {
        Check::warning(
            NAME,
            format!("they differ: {text}"),
            cost,
            format!("ip link set dev {} mtu {}; or {clamp}", largest.name, smallest.mtu),
        )
    })
}

fn too_small(link: &Link) -> Option<Check> {
    (link.mtu < IPV6_LEAST).then(|| {
        Check::warning(
            format!("MTU of {}", link.name),
            format!("{}, below the {IPV6_LEAST} that IPv6 needs", link.mtu),
            "the kernel has no IPv6 on it",
            format!("ip link set dev {} mtu {IPV6_LEAST}, or do without IPv6", link.name),
        )
    })
}

/// A VLAN in a VLAN: there is room for one tag beside the MTU, not for two.
fn twice_tagged(link: &Link, all: &[Link]) -> Option<Check> {
    let is_vlan = |link: &&Link| link.kind.as_deref() == Some("vlan");
    let below = |link: &Link| all.iter().find(|other| Some(other.index) == link.lower);
    let middle = Some(link).filter(is_vlan).and_then(below).filter(is_vlan)?;
    let port = below(middle)?;
    let room = port.mtu.saturating_sub(4);
    (link.mtu > room).then(|| {
        Check::warning(
            format!("MTU of {}", link.name),
            format!("{}, with two VLAN tags on {}, whose MTU is {}", link.mtu, port.name, port.mtu),
            "there is room for one tag beside the MTU: many ports drop full packets with two",
            format!(
                "ip link set dev {} mtu {}, or ip link set dev {} mtu {room}",
                port.name,
                link.mtu + 4,
                link.name
            ),
        )
    })
}

/// Levels whose MTU no interface takes.
fn granted(configured: &[Link], lines: &Lines) -> Option<Check> {
    let smallest = configured.iter().min_by_key(|link| link.mtu)?;
    let above = lines.mtus.iter().filter(|(_, mtu)| u32::from(*mtu) > smallest.mtu);
    let above: Vec<_> = above.map(|(id, mtu)| format!("{id} ({mtu})")).collect();
    (!above.is_empty()).then(|| {
        Check::warning(
            "granted MTUs",
            format!(
                "above the {} bytes of {}: allocations {}",
                smallest.mtu,
                smallest.name,
                above.join(", ")
            ),
            "packets between the two sizes are the stack's to fragment or refuse, not the level's: new TCP \
             connections don't agree on what fits",
            format!(
                "grant them with --mtu {} or less, or ip link set dev {} mtu …",
                smallest.mtu, smallest.name
            ),
        )
    })
}

/// Interfaces of which one carries the packets of another.
fn named_twice(configured: &[Link], all: &[Link]) -> Vec<Check> {
    let mut checks = Vec::new();
    for upper in configured {
        for lower in configured.iter().filter(|lower| carries(lower.index, upper, all)) {
            let what = match upper.kind.as_deref() {
                Some(kind @ ("vlan" | "macvlan" | "ipvlan")) => format!("its {kind} device {}", upper.name),
                kind => format!("its {} {}", kind.unwrap_or("controller"), upper.name),
            };
            checks.push(Check::error(
                format!("interface {} below another", lower.name),
                format!("it is configured together with {what}"),
                "what goes by both is charged twice, so that its levels get half",
                format!("take one of the two out of the configuration: {} or {}", lower.name, upper.name),
            ));
        }
    }
    checks
}

/// Whether packets of `upper` go by the interface of that index too.
fn carries(index: u32, upper: &Link, all: &[Link]) -> bool {
    // Interfaces below one at a time; no stack is deeper than there are interfaces.
    let mut above = vec![upper.index];
    let mut next = 0;
    while let Some(current) = above.get(next).copied() {
        next += 1;
        let stands_on = all.iter().find(|link| link.index == current).and_then(|link| {
            link.lower.filter(|_| matches!(link.kind.as_deref(), Some("vlan" | "macvlan" | "ipvlan")))
        });
        let ports = all.iter().filter(|link| link.controller == Some(current)).map(|link| link.index);
        for below in ports.chain(stands_on) {
            if !above.contains(&below) {
                above.push(below);
            }
        }
    }
    above[1..].contains(&index)
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;
    use crate::domain::AllocationId;

    fn link(index: u32, name: &str, mtu: u32) -> Link {
        let lo = Link::by_name("lo").expect("every box has it");
        Link { name: name.to_owned(), index, mtu, loopback: false, ..lo }
    }

    fn of_kind(kind: &str, link: Link) -> Link {
        Link { kind: Some(kind.to_owned()), ..link }
    }

    #[test]
    fn sizes_that_differ_are_told_with_the_command_for_the_smaller() {
        let (jumbo, plain) = (link(2, "lan0", 9_000), link(3, "wan0", 1_500));
        assert_eq!(sizes(&[plain.clone(), plain.clone()]).map(|check| check.severity), Some(Severity::Ok));
        assert_eq!(sizes(&[]), None);
        let differ = sizes(&[jumbo, plain.clone()]).expect("a check");
        assert_eq!(differ.severity, Severity::Warning);
        assert!(differ.cost.is_some_and(|cost| cost.contains("more than 1500 bytes from lan0 to wan0")));
        assert!(differ.mend.is_some_and(|mend| mend.starts_with("ip link set dev lan0 mtu 1500")));
        let dsl = sizes(&[plain, link(4, "ppp0", 1_492)]).expect("a check");
        assert!(dsl.found.contains("PPPoE"), "{dsl:?}");
        assert!(dsl.mend.is_some_and(|mend| mend.contains("oifname ppp0") && mend.contains("--mtu 1492")));
    }

    #[test]
    fn two_tags_need_room_and_one_does_not() {
        let port = link(2, "eth0", 1_500);
        let outer = of_kind("vlan", Link { lower: Some(2), ..link(3, "eth0.100", 1_500) });
        let inner = of_kind("vlan", Link { lower: Some(3), ..link(4, "eth0.100.7", 1_500) });
        let all = [port.clone(), outer.clone(), inner.clone()];
        assert_eq!(twice_tagged(&port, &all), None);
        assert_eq!(twice_tagged(&outer, &all), None);
        let warned = twice_tagged(&inner, &all).expect("a warning");
        assert!(
            warned
                .mend
                .is_some_and(|mend| mend.contains("eth0 mtu 1504") && mend.contains("eth0.100.7 mtu 1496"))
        );
        assert_eq!(twice_tagged(&Link { mtu: 1_496, ..inner }, &all), None);
    }

    #[test]
    fn an_interface_and_what_stands_on_it_are_told() {
        let bond = of_kind("bond", link(9, "bond0", 1_500));
        let port = Link { controller: Some(9), ..link(2, "eth0", 1_500) };
        let vlan = of_kind("vlan", Link { lower: Some(9), ..link(3, "bond0.5", 1_500) });
        let veth = of_kind("veth", Link { lower: Some(2), ..link(4, "veth0", 1_500) });
        let all = [bond.clone(), port.clone(), vlan.clone(), veth.clone()];
        for (configured, expected) in [
            (vec![port.clone(), bond.clone()], Some("interface eth0 below another")),
            (vec![vlan.clone(), bond], Some("interface bond0 below another")),
            // By way of the bond, which is not configured.
            (vec![vlan.clone(), port.clone()], Some("interface eth0 below another")),
            // The other end of a pair is no interface below.
            (vec![veth, port], None),
            (vec![vlan], None),
        ] {
            let found = named_twice(&configured, &all);
            assert_eq!(found.first().map(|check| check.name.as_str()), expected, "{configured:?}");
            assert!(found.iter().all(|check| check.severity == Severity::Error), "{found:?}");
        }
    }

    #[test]
    fn mtus_that_are_too_large_or_too_small_are_told() {
        let links = [link(2, "lan0", 1_500), link(3, "wan0", 1_500)];
        let lines = |mtu| Lines { mtus: vec![(AllocationId(4), mtu)], ..Lines::default() };
        assert_eq!(granted(&links, &lines(1_500)), None);
        let above = granted(&links, &lines(1_600)).expect("a warning");
        assert!(above.found.contains("allocations 4 (1600)"), "{above:?}");
        assert_eq!(too_small(&links[0]), None);
        assert!(too_small(&link(2, "lan0", 1_279)).is_some());
    }
}
