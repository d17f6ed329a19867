//! What NIC and stack do to packets before ours see them.

use super::Check;
use super::lines::{self, Lines};
use crate::gateway::port::Port;
use crate::plural::counted;

/// `judged`: where what comes in is judged, as the status says; none: not known.
pub(super) fn checks(
    interface: &str,
    port: &Port,
    judged: Option<&str>,
    lines: Option<&Lines>,
) -> Vec<Check> {
    if port.features.is_empty() {
        let found = "the driver does not tell";
        return vec![Check::ok(format!("offloads of {interface}"), found)];
    }
    let off = |feature: &str| match port.features.get(feature) {
        Some(known) if !known.switchable => format!("the driver does not let {feature} be switched off"),
        _ => format!("ethtool -K {interface} {feature} off"),
    };
    let warning = |feature: &str, found: &str, cost: String| {
        Check::warning(format!("{feature} of {interface}"), format!("on: {found}"), cost, off(feature))
    };
    let mut checks = Vec::new();
    if port.has("rx-lro") {
        checks.push(warning(
            "rx-lro",
            "the NIC merges packets beyond repair",
            "what was merged can't be forwarded as it came: packets that are too long, and connections that \
             stall; XDP and selectors by length see the wrong length"
                .to_owned(),
        ));
    }
    if port.has("rx-gro-hw") {
        checks.push(warning(
            "rx-gro-hw",
            "the NIC merges packets before XDP",
            "a merged packet is policed as one, and many drivers refuse XDP beside it".to_owned(),
        ));
    }
    checks.extend(gro(interface, port, judged, lines, off("rx-gro")));
    if port.has("rx-gro-list") {
        checks.push(warning(
            "rx-gro-list",
            "packets are merged as a list, each with its own header",
            "a level's code point and segment size are written into the first of each list only".to_owned(),
        ));
    }
    if port.has("rx-gro") && port.has("rx-udp-gro-forwarding") {
        checks.push(warning(
            "rx-udp-gro-forwarding",
            "UDP packets that are forwarded are merged too",
            "packets of calls and games wait for each other, and leave and are dropped in bursts".to_owned(),
        ));
    }
    if port.has("hw-tc-offload") {
        checks.push(warning(
            "hw-tc-offload",
            "filters and flowtables may be put into the NIC",
            "what it forwards by itself is neither judged nor queued".to_owned(),
        ));
    }
    if port.has("rx-vlan-hw-parse") && judged == Some("xdp") {
        // Selectors do not look at tags, and lengths are those of IP.
        checks.push(Check::ok(
            format!("rx-vlan-hw-parse of {interface}"),
            "on: XDP does not see the outer tag of a VLAN; tc does, and no level depends on it",
        ));
    }
    if checks.is_empty() {
        checks.push(Check::ok(format!("offloads of {interface}"), "none that hurts"));
    }
    checks
}

/// Merging in software: hurts where lengths must be exact, and where the police meets what was merged.
fn gro(
    interface: &str,
    port: &Port,
    judged: Option<&str>,
    lines: Option<&Lines>,
    off: String,
) -> Option<Check> {
    let name = format!("rx-gro of {interface}");
    let known = port.features.get("rx-gro")?;
    if !known.on {
        return Some(Check::ok(name, "off: every packet is counted exactly, at more work per packet"));
    }
    let found = "on: packets are merged, for less work per packet";
    let mut costs = Vec::new();
    if let Some(lines) = lines {
        let worst = lines.atm.keys().map(|overhead| lines::merged_undercount(lines.mtu, *overhead));
        if let Some(worst) = worst.max_by(f64::total_cmp) {
            costs.push(format!(
                "the scheduler rounds a merged packet to ATM cells once: full packets are counted up to {} too \
                 low, so that a queue may build up in the line; small ones more",
                lines::percent(worst.max(0.0))
            ));
        }
        if judged == Some("tc") && lines.policed > 0 {
            costs.push(format!(
                "{} here: merged packets are dropped whole, up to 64 KiB at once",
                counted(lines.policed, "policed level")
            ));
        }
    }
    Some(if costs.is_empty() {
        Check::ok(name, format!("{found}; no line or level here needs them one by one"))
    } else {
        Check::warning(name, found, costs.join("; "), off)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::Severity;
    use super::super::lines::Atm;
    use super::*;
    use crate::gateway::port::Feature;

    fn port(on: &[&str]) -> Port {
        let features = [
            "rx-lro",
            "rx-gro-hw",
            "rx-gro",
            "rx-gro-list",
            "rx-udp-gro-forwarding",
            "hw-tc-offload",
            "rx-vlan-hw-parse",
        ];
        let features = features.map(|name| {
            (name.to_owned(), Feature { on: on.contains(&name), switchable: name != "rx-gro-hw" })
        });
        Port { carrier: true, speed: None, features: features.into(), channels: None }
    }

    fn warnings(checks: &[Check]) -> Vec<&str> {
        let warnings = checks.iter().filter(|check| check.severity == Severity::Warning);
        warnings.map(|check| check.name.as_str()).collect()
    }

    #[test]
    fn each_offload_that_hurts_has_its_warning() {
        for (on, expected) in [
            (&[][..], &[][..]),
            (&["rx-vlan-hw-parse", "rx-gro"], &[]),
            (&["rx-lro"], &["rx-lro of eth0"]),
            (&["rx-gro-hw"], &["rx-gro-hw of eth0"]),
            (&["rx-gro-list"], &["rx-gro-list of eth0"]),
            (&["hw-tc-offload"], &["hw-tc-offload of eth0"]),
            // Without GRO it does nothing.
            (&["rx-udp-gro-forwarding"], &[]),
            (&["rx-gro", "rx-udp-gro-forwarding"], &["rx-udp-gro-forwarding of eth0"]),
        ] {
            assert_eq!(warnings(&checks("eth0", &port(on), Some("xdp"), None)), expected, "{on:?}");
        }
        let mend = |feature| checks("eth0", &port(&[feature]), None, None).remove(0).mend;
        assert_eq!(mend("rx-lro").as_deref(), Some("ethtool -K eth0 rx-lro off"));
        assert!(mend("rx-gro-hw").is_some_and(|mend| mend.contains("does not let")));
        let silent = Port { features: BTreeMap::new(), ..port(&[]) };
        assert_eq!(warnings(&checks("eth0", &silent, None, None)), [""; 0]);
    }

    #[test]
    fn gro_hurts_on_atm_and_where_a_policer_meets_what_it_made() {
        let atm = Lines { mtu: 1_500, atm: BTreeMap::from([(32, Atm::default())]), ..Lines::default() };
        let policed = Lines { mtu: 1_500, policed: 2, ..Lines::default() };
        for (on, judged, lines, expected) in [
            (true, "xdp", &atm, true),
            (false, "xdp", &atm, false),
            (true, "xdp", &policed, false),
            (true, "tc", &policed, true),
            (false, "tc", &policed, false),
        ] {
            let port = port(if on { &["rx-gro"] } else { &[] });
            let found = checks("eth0", &port, Some(judged), Some(lines));
            assert_eq!(!warnings(&found).is_empty(), expected, "{found:?}");
        }
        let found = checks("eth0", &port(&["rx-gro"]), Some("tc"), Some(&atm)).remove(0);
        assert!(found.cost.is_some_and(|cost| cost.contains("1.4 % too low")));
    }
}
