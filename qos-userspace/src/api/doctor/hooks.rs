//! Where an interface's packets are met, why there, and who else is on the way.

use std::io;

use super::Check;
use crate::gateway::chain::{Chain, Chains, Program};
use crate::gateway::clsact;
use crate::gateway::link::Link;
use crate::manager::report::{InterfaceStatus, Why};

/// What it costs to judge behind the driver.
const BEHIND_THE_DRIVER: &str = "what is dropped has cost the driver's and the stack's work already, and a \
    packet that GRO merged is policed as one";

/// Where ours are, and why there.
pub(super) fn programs(
    status: &InterfaceStatus,
    observing: bool,
    link: Option<&Link>,
    chains: Option<&Chains>,
) -> Check {
    let name = format!("programs on {}", status.name);
    if status.index.is_none() {
        return Check::error(
            name,
            "the interface does not exist",
            "nothing that goes by it is held",
            "make it; qosd attaches to it by itself",
        );
    }
    let judge = match (status.judged.as_str(), status.xdp.as_str()) {
        ("xdp", "generic") => "XDP in the stack",
        ("xdp", _) => "XDP in the driver",
        ("tc", _) => "tc ingress",
        ("egress", _) => "tc egress",
        _ => "nothing",
    };
    let why = status.why.map(|why| format!(": {}", reason(why, status, chains))).unwrap_or_default();
    let found = format!("{judge} judges{why}; tc programs on {}, scheduler {}", status.tc, status.scheduler);
    let missing = status.xdp == "none" || status.tc == "none" || (status.scheduler == "none" && !observing);
    if missing {
        return Check::error(
            name,
            found,
            "what goes by it is not all held",
            "run `qos reconcile` and see what qosd logs",
        );
    }
    let interface = &status.name;
    match status.why {
        _ if status.xdp == "generic" => Check::warning(
            name,
            found,
            "a copy of nearly every packet, and GRO; from Linux 6.9 on egress classifies each packet again",
            "xdp = \"auto\" in its [[interface]]",
        ),
        Some(Why::Foreign { .. }) => Check::warning(
            name,
            found,
            format!("what it drops or redirects never comes to us; {BEHIND_THE_DRIVER}"),
            format!(
                "leave it if it is to be there; else take it off (`ip link set dev {interface} xdp off`) and \
                 restart qosd"
            ),
        ),
        // A software device has none, and nothing can be done about it.
        Some(Why::Refused { .. })
            if link.and_then(|link| link.kind.as_deref()).is_some_and(|kind| kind != "veth") =>
        {
            Check::ok(name, found)
        }
        Some(Why::Refused { errno: Some(libc::EOPNOTSUPP) }) => Check::warning(
            name,
            found,
            BEHIND_THE_DRIVER,
            "a NIC whose driver has native XDP; levels hold without it: xdp = \"off\" says that you know",
        ),
        Some(Why::Refused { .. }) => Check::warning(
            name,
            found,
            BEHIND_THE_DRIVER,
            format!(
                "what drivers ask for: `ethtool -K {interface} lro off rx-gro-hw off`, a queue for each CPU, \
                 an MTU that fits a page; then restart qosd"
            ),
        ),
        _ => Check::ok(name, found),
    }
}

fn reason(why: Why, status: &InterfaceStatus, chains: Option<&Chains>) -> String {
    match why {
        Why::Best => "the driver runs it".to_owned(),
        Why::Configured => "the configuration says so".to_owned(),
        Why::Refused { errno: Some(libc::EOPNOTSUPP) } => "the driver has no XDP".to_owned(),
        Why::Refused { errno: Some(errno) } => {
            format!("the driver refused XDP ({})", io::Error::from_raw_os_error(errno))
        }
        Why::Refused { errno: None } => "the driver refused XDP".to_owned(),
        Why::NoEthernet => "its packets begin with their IP header, which XDP can't have".to_owned(),
        Why::Foreign { id } => {
            let there = chains.and_then(|chains| chains.xdp.as_ref()).filter(|program| program.id == id);
            let program = there.map_or_else(|| format!("program {id}"), shown);
            format!("XDP has somebody else's {program}, which stays")
        }
        Why::Nat => format!("NAT has still to put the addresses back of what comes by {}", status.name),
    }
}

/// Programs of others on the hooks, and how ours sit beside them. `named`: [`programs`] has told of the
/// one of XDP.
pub(super) fn others(interface: &str, chains: &Chains, named: bool) -> Vec<Check> {
    let name = format!("others on {interface}");
    let (mut before, mut behind, mut hardware) = (Vec::new(), Vec::new(), Vec::new());
    if let Some(program) = chains.xdp.as_ref().filter(|program| !program.ours && !named) {
        before.push(format!("XDP {}", shown(program)));
    }
    for (side, chain) in [("ingress", &chains.ingress), ("egress", &chains.egress)] {
        let sides = sides(chain);
        before.extend(sides.before.into_iter().map(|program| format!("tc {side} {program}")));
        behind.extend(sides.behind.into_iter().map(|program| format!("tc {side} {program}")));
        let offloaded = chain.filters.iter().filter(|(filter, ours)| !ours && filter.in_hardware);
        hardware.extend(
            offloaded.map(|(filter, _)| format!("tc {side} {} of priority {}", filter.kind, filter.priority)),
        );
    }
    let list = |programs: &[String]| programs.join(", ");
    let mut found = Vec::new();
    if !before.is_empty() {
        found.push(format!("before ours: {}", list(&before)));
    }
    if !behind.is_empty() {
        found.push(format!("behind ours, with all that we pass: {}", list(&behind)));
    }
    let mut checks = vec![if before.is_empty() {
        let found = if behind.is_empty() { "no programs but ours".to_owned() } else { found.join("; ") };
        Check::ok(name.clone(), found)
    } else {
        Check::warning(
            name.clone(),
            found.join("; "),
            "a packet for which one of them ends the chain (TC_ACT_OK, TCX_PASS), or that it redirects, \
             does not come to ours there: past tc ingress it is classified at egress, past tc egress it \
             goes without its class",
            format!(
                "let them end with TC_ACT_UNSPEC (TCX_NEXT, -1), or attach them behind ours: on tcx with \
                 BPF_F_AFTER, as filters at a priority above {}; ours remove nobody",
                clsact::PRIORITY
            ),
        )
    }];
    if !hardware.is_empty() {
        checks.push(Check::error(
            format!("{name} in hardware"),
            list(&hardware),
            "packets that the NIC forwards, redirects or drops by itself are neither judged nor queued",
            format!("add these filters with skip_hw, or `ethtool -K {interface} hw-tc-offload off`"),
        ));
    }
    checks
}

/// Others before and behind the first of ours on a hook, in words. Where none is ours, all are before.
struct Sides {
    before: Vec<String>,
    behind: Vec<String>,
}

fn sides(chain: &Chain) -> Sides {
    let programs = chain.tcx.iter().map(|program| (shown(program), program.ours));
    let filters = chain.filters.iter().map(|(filter, ours)| {
        let what = match (&filter.name, filter.program) {
            (Some(name), Some(id)) => format!("filter `{name}` (id {id})"),
            _ => format!("filter {}", filter.kind),
        };
        (format!("{what} of priority {}", filter.priority), *ours)
    });
    let mut sides = Sides { before: Vec::new(), behind: Vec::new() };
    let mut met_ours = false;
    for (what, ours) in programs.chain(filters) {
        if ours {
            met_ours = true;
        } else if met_ours {
            sides.behind.push(what);
        } else {
            sides.before.push(what);
        }
    }
    sides
}

fn shown(program: &Program) -> String {
    match &program.name {
        Some(name) => format!("program `{name}` (id {})", program.id),
        None => format!("program {}", program.id),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;
    use crate::domain::BitsPerSecond;
    use crate::gateway::clsact::Listed;

    fn program(id: u32, ours: bool) -> Program {
        Program { id, name: Some(format!("p{id}")), ours }
    }

    fn filter(priority: u16, in_hardware: bool) -> Listed {
        Listed { priority, kind: "flower".to_owned(), program: None, name: None, in_hardware }
    }

    fn status(judged: &str, xdp: &str, why: Option<Why>) -> InterfaceStatus {
        InterfaceStatus {
            name: "eth0".to_owned(),
            role: "lan".to_owned(),
            capacity: BitsPerSecond(1_000_000_000),
            index: Some(2),
            framing: Some("ethernet".to_owned()),
            judged: judged.to_owned(),
            why,
            xdp: xdp.to_owned(),
            tc: "tcx".to_owned(),
            scheduler: "htb".to_owned(),
            classes: 2,
        }
    }

    #[test]
    fn each_reason_is_told_and_has_its_severity() {
        let hardware = Link { kind: None, ..Link::by_name("lo").expect("every box has it") };
        let vlan = Link { kind: Some("vlan".to_owned()), ..hardware.clone() };
        for (judged, xdp, why, link, severity, part) in [
            (
                "xdp",
                "native",
                Why::Best,
                &hardware,
                Severity::Ok,
                "XDP in the driver judges: the driver runs it",
            ),
            ("xdp", "generic", Why::Configured, &hardware, Severity::Warning, "XDP in the stack judges"),
            (
                "tc",
                "unused",
                Why::Configured,
                &hardware,
                Severity::Ok,
                "tc ingress judges: the configuration",
            ),
            ("tc", "unused", Why::NoEthernet, &hardware, Severity::Ok, "begin with their IP header"),
            (
                "tc",
                "unused",
                Why::Foreign { id: 7 },
                &hardware,
                Severity::Warning,
                "somebody else's program 7",
            ),
            ("egress", "unused", Why::Nat, &hardware, Severity::Ok, "tc egress judges: NAT"),
            ("tc", "unused", Why::Refused { errno: Some(95) }, &vlan, Severity::Ok, "the driver has no XDP"),
            ("tc", "unused", Why::Refused { errno: Some(95) }, &hardware, Severity::Warning, "has no XDP"),
            (
                "tc",
                "unused",
                Why::Refused { errno: Some(22) },
                &hardware,
                Severity::Warning,
                "Invalid argument",
            ),
        ] {
            let check = programs(&status(judged, xdp, Some(why)), false, Some(link), None);
            assert_eq!(check.severity, severity, "{check:?}");
            assert!(check.found.contains(part), "{part}: {check:?}");
        }
    }

    #[test]
    fn what_is_not_there_is_an_error_unless_nothing_is_to_be_held() {
        let bare =
            InterfaceStatus { scheduler: "none".to_owned(), ..status("xdp", "native", Some(Why::Best)) };
        assert_eq!(programs(&bare, false, None, None).severity, Severity::Error);
        assert_eq!(programs(&bare, true, None, None).severity, Severity::Ok);
        assert_eq!(programs(&status("none", "none", None), true, None, None).severity, Severity::Error);
    }

    #[test]
    fn others_are_before_or_behind_ours() {
        let chain = Chain {
            tcx: vec![program(1, false), program(2, true), program(3, false)],
            filters: vec![(filter(7, false), false)],
        };
        let found = sides(&chain);
        assert_eq!(found.before, ["program `p1` (id 1)"]);
        assert_eq!(found.behind, ["program `p3` (id 3)", "filter flower of priority 7"]);
        // Filters come after all of tcx.
        let chain = Chain { tcx: vec![program(1, false)], filters: vec![(filter(9, false), true)] };
        assert_eq!(sides(&chain).before, ["program `p1` (id 1)"]);

        let chains = |ingress, xdp| Chains { xdp, ingress, egress: Chain::default() };
        let ours = Chain { tcx: vec![program(2, true)], filters: Vec::new() };
        let only = others("eth0", &chains(ours.clone(), Some(program(4, true))), false);
        assert_eq!(only, [Check::ok("others on eth0", "no programs but ours")]);
        let foreign = others("eth0", &chains(ours.clone(), Some(program(4, false))), false);
        assert_eq!(foreign[0].severity, Severity::Warning);
        assert_eq!(others("eth0", &chains(ours.clone(), Some(program(4, false))), true).len(), 1);
        let offloaded = Chain { filters: vec![(filter(7, true), false)], ..ours };
        let checks = others("eth0", &chains(offloaded, None), false);
        assert_eq!(checks[1].severity, Severity::Error, "{checks:?}");
        assert!(checks[1].found.contains("tc ingress flower of priority 7"), "{checks:?}");
    }
}
