//! The kernel form of a selector: one rule for each direction and family that it leaves open.

use std::net::IpAddr;

use ipnet::IpNet;
use qos_common::classify::{Address, CHECK_DSCP, CHECK_PORTS, CHECK_PROTOCOL, Family, Rule, rank};

use super::{Range16, Selector};
use crate::domain::{AllocationId, Direction};

/// The rules of `selector`, the one at `index` of allocation `id` in `slot`: one to four, by
/// direction, then by family.
///
/// The selector is taken as checked ([`Selector::check`]).
#[must_use]
pub fn rules(selector: &Selector, index: u32, precedence: u16, id: AllocationId, slot: u16) -> Vec<Rule> {
    let mut checks = 0;
    if selector.protocol.is_some() {
        checks |= CHECK_PROTOCOL;
    }
    if selector.source_ports.is_some() || selector.destination_ports.is_some() {
        checks |= CHECK_PORTS;
    }
    if selector.dscp.is_some() {
        checks |= CHECK_DSCP;
    }
    let (source, source_length) = prefix(selector.source);
    let (destination, destination_length) = prefix(selector.destination);
    let rule = Rule {
        source,
        destination,
        rank: rank(precedence, id.0, index),
        slot: u32::from(slot),
        source_ports: range(selector.source_ports),
        destination_ports: range(selector.destination_ports),
        lengths: range(selector.lengths),
        source_length,
        destination_length,
        protocol: selector.protocol.unwrap_or(0),
        dscp: selector.dscp.unwrap_or(0),
        checks,
        ..Rule::default()
    };
    Direction::BOTH
        .into_iter()
        .filter(|direction| selector.covers(*direction))
        .flat_map(|direction| {
            selector.families().iter().map(move |family: &Family| Rule {
                direction: direction as u8,
                family: *family as u8,
                ..rule
            })
        })
        .collect()
}

fn range(range: Option<Range16>) -> [u16; 2] {
    let range = range.unwrap_or(Range16::ALL);
    [range.first(), range.last()]
}

fn prefix(prefix: Option<IpNet>) -> (Address, u8) {
    prefix.map_or((Address::default(), 0), |prefix| {
        let address = match prefix.addr() {
            IpAddr::V4(address) => Address::v4(address.octets()),
            IpAddr::V6(address) => Address::v6(address.octets()),
        };
        (address.prefix(u32::from(prefix.prefix_len())), prefix.prefix_len())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Vec<Rule> {
        rules(&text.parse().unwrap(), 3, 7, AllocationId(9), 12)
    }

    #[test]
    fn what_is_left_open_becomes_several_rules() {
        for (text, expected) in [
            ("any", &[(0, 0), (0, 1), (1, 0), (1, 1)][..]),
            ("up", &[(0, 0), (0, 1)]),
            ("down from 192.0.2.0/24", &[(1, 0)]),
            ("to ::/0", &[(0, 1), (1, 1)]),
            ("up icmp", &[(0, 0)]),
            ("down icmp6", &[(1, 1)]),
            ("up udp to :53", &[(0, 0), (0, 1)]),
        ] {
            let found: Vec<_> = of(text).iter().map(|rule| (rule.direction, rule.family)).collect();
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn every_field_arrives() {
        let found = of("down udp from 198.51.100.0/24:5000-6000 to 192.0.2.7 dscp EF length 100-200");
        let expected = Rule {
            source: Address::v4([198, 51, 100, 0]),
            destination: Address::v4([192, 0, 2, 7]),
            rank: rank(7, 9, 3),
            slot: 12,
            source_ports: [5_000, 6_000],
            destination_ports: [0, u16::MAX],
            lengths: [100, 200],
            source_length: 24,
            destination_length: 32,
            protocol: 17,
            dscp: 46,
            checks: CHECK_PROTOCOL | CHECK_PORTS | CHECK_DSCP,
            family: 0,
            direction: 1,
            reserved: 0,
        };
        assert_eq!(found, [expected]);
    }

    #[test]
    fn open_fields_are_not_compared() {
        let [rule] = of("up to 2001:db8::/32")[..] else { panic!("one rule") };
        assert_eq!(
            (rule.checks, rule.lengths, rule.source_length, rule.destination_length),
            (0, [0, u16::MAX], 0, 32)
        );
    }
}
