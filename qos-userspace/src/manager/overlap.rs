//! Rules of all allocations, to find those that a new one meets.

use std::collections::BTreeMap;

use qos_common::classify::{
    Address, CHECK_DSCP, CHECK_PORTS, CHECK_PROTOCOL, Direction, Rule, allocation_of, has_ports, table_set,
};

use crate::domain::AllocationId;

/// Rules by direction, family and the subscriber's side, by which they differ most.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RuleIndex {
    /// Each list is in the order of ranks, which no two rules of one place share.
    rules: BTreeMap<Place, Vec<Rule>>,
    /// How many rules there are of each direction, family and prefix length.
    lengths: BTreeMap<(u32, u8), usize>,
    count: usize,
}

/// Direction and family, the subscriber's prefix, its length.
type Place = (u32, u128, u8);

/// How an existing rule stands to a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Relation {
    /// The same packets.
    Identical,
    /// The existing one matches all packets that the new one does, and more.
    Covers,
    /// Some packets match both.
    Overlaps,
}

impl RuleIndex {
    /// Number of rules.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn add(&mut self, rule: Rule) {
        let place = place(&rule);
        let list = self.rules.entry(place).or_default();
        list.insert(list.partition_point(|known| known.rank < rule.rank), rule);
        *self.lengths.entry((place.0, place.2)).or_default() += 1;
        self.count += 1;
    }

    pub(super) fn remove(&mut self, rule: &Rule) {
        let place = place(rule);
        let Some(list) = self.rules.get_mut(&place) else { return };
        let Ok(at) = list.binary_search_by_key(&rule.rank, |known| known.rank) else { return };
        list.remove(at);
        if list.is_empty() {
            self.rules.remove(&place);
        }
        self.count -= 1;
        if let Some(number) = self.lengths.get_mut(&(place.0, place.2)) {
            *number -= 1;
            if *number == 0 {
                self.lengths.remove(&(place.0, place.2));
            }
        }
    }

    /// Calls `found` with every rule that some packet matches as well as `rule`: identical ones always, others
    /// until it has been compared with as many as `budget` says, which is lowered.
    pub(super) fn meet(&self, rule: &Rule, budget: &mut usize, mut found: impl FnMut(&Rule, Relation)) {
        let (set, near, length) = place(rule);
        let mut compare = |list: &[Rule]| {
            *budget = budget.saturating_sub(list.len());
            let goes_on = *budget > 0;
            for other in list.iter().filter(|other| overlaps(other, rule)) {
                let relation = if identical(other, rule) {
                    Relation::Identical
                } else if covers(other, rule) {
                    Relation::Covers
                } else {
                    Relation::Overlaps
                };
                found(other, relation);
            }
            goes_on
        };
        // Those of the same subscriber's prefix, among which the identical ones are.
        if !self.rules.get(&(set, near, length)).is_none_or(|list| compare(list)) {
            return;
        }
        let wider = self.lengths.range((set, 0)..(set, length)).map(|((_, length), _)| *length);
        for wider in wider {
            if let Some(list) = self.rules.get(&(set, near & mask(wider), wider))
                && !compare(list)
            {
                return;
            }
        }
        let inside = (set, near, 0)..=(set, near | !mask(length), u8::MAX);
        for ((.., narrower), list) in self.rules.range(inside) {
            if *narrower > length && !compare(list) {
                return;
            }
        }
    }
}

/// Precedence of a rule's allocation.
pub(super) fn precedence(rule: &Rule) -> u16 {
    u16::MAX - (rule.rank >> 48) as u16
}

/// The rule's allocation.
pub(super) fn allocation(rule: &Rule) -> AllocationId {
    AllocationId(allocation_of(rule.rank))
}

fn place(rule: &Rule) -> Place {
    let set = table_set(u32::from(rule.direction), u32::from(rule.family));
    let (near, length) = match Direction::from_bit(u32::from(rule.direction)) {
        Direction::Upstream => (rule.source, rule.source_length),
        Direction::Downstream => (rule.destination, rule.destination_length),
    };
    (set, number(near), length)
}

fn number(address: Address) -> u128 {
    u128::from(address.high) << 64 | u128::from(address.low)
}

fn mask(length: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)
}

fn identical(a: &Rule, b: &Rule) -> bool {
    Rule { rank: 0, slot: 0, ..*a } == Rule { rank: 0, slot: 0, ..*b }
}

/// Tells whether every packet that matches `b` matches `a`.
fn covers(a: &Rule, b: &Rule) -> bool {
    let b_has_ports = b.checks & CHECK_PORTS != 0 || b.checks & CHECK_PROTOCOL != 0 && has_ports(b.protocol);
    a.source_length <= b.source_length
        && a.destination_length <= b.destination_length
        && a.source.shares_prefix(b.source, u32::from(a.source_length))
        && a.destination.shares_prefix(b.destination, u32::from(a.destination_length))
        && (a.checks & CHECK_PROTOCOL == 0 || b.checks & CHECK_PROTOCOL != 0 && a.protocol == b.protocol)
        && (a.checks & CHECK_PORTS == 0
            || b_has_ports
                && contains(a.source_ports, b.source_ports)
                && contains(a.destination_ports, b.destination_ports))
        && (a.checks & CHECK_DSCP == 0 || b.checks & CHECK_DSCP != 0 && a.dscp == b.dscp)
        && contains(a.lengths, b.lengths)
}

/// Tells whether some packet matches both.
fn overlaps(a: &Rule, b: &Rule) -> bool {
    let both = a.checks & b.checks;
    let portless = |a: &Rule, b: &Rule| {
        a.checks & CHECK_PORTS != 0 && b.checks & CHECK_PROTOCOL != 0 && !has_ports(b.protocol)
    };
    a.source.shares_prefix(b.source, u32::from(a.source_length.min(b.source_length)))
        && a.destination
            .shares_prefix(b.destination, u32::from(a.destination_length.min(b.destination_length)))
        && (both & CHECK_PROTOCOL == 0 || a.protocol == b.protocol)
        && !portless(a, b)
        && !portless(b, a)
        && intersect(a.source_ports, b.source_ports)
        && intersect(a.destination_ports, b.destination_ports)
        && (both & CHECK_DSCP == 0 || a.dscp == b.dscp)
        && intersect(a.lengths, b.lengths)
}

fn contains(a: [u16; 2], b: [u16; 2]) -> bool {
    a[0] <= b[0] && b[1] <= a[1]
}

fn intersect(a: [u16; 2], b: [u16; 2]) -> bool {
    a[0] <= b[1] && b[0] <= a[1]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::selector::rules;

    fn rule(text: &str, id: u64) -> Vec<Rule> {
        rules(&text.parse().unwrap(), 0, 0, AllocationId(id), 1)
    }

    #[test]
    fn relations_of_pairs() {
        use Relation::{Covers, Identical, Overlaps};
        for (old, new, expected) in [
            ("up tcp from 192.0.2.0/24", "up tcp from 192.0.2.0/24", Some(Identical)),
            ("up from 192.0.2.0/24", "up tcp from 192.0.2.7", Some(Covers)),
            ("up", "up tcp from 192.0.2.7", Some(Covers)),
            ("up tcp from 192.0.2.7", "up from 192.0.2.0/24", Some(Overlaps)),
            ("up to :80", "up tcp to :80", Some(Covers)),
            ("up to :80", "up icmp", None),
            ("up to :1-65535", "up tcp", Some(Overlaps)),
            ("up to :0-65535", "up tcp", Some(Covers)),
            ("up to :0-65535", "up", Some(Overlaps)),
            ("up to :80", "up from :1000", Some(Overlaps)),
            ("up tcp to :80-90", "up tcp to :85-95", Some(Overlaps)),
            ("up tcp to :80-90", "up tcp to :91", None),
            ("up tcp", "up udp", None),
            ("up tcp", "down tcp", None),
            ("up dscp EF", "up dscp CS0", None),
            ("up dscp EF", "up", Some(Overlaps)),
            ("up length 20-100", "up length 50-60", Some(Covers)),
            ("up from 192.0.2.0/24 to 198.51.100.7", "up from 192.0.2.7 to 198.51.100.0/24", Some(Overlaps)),
            ("up from 192.0.2.0/24", "up from 192.0.3.0/24", None),
            ("down to 2001:db8::/32", "down to 2001:db8:1::/48", Some(Covers)),
            ("down to 2001:db8:1::/48", "down to 2001:db8::/32", Some(Overlaps)),
        ] {
            let mut index = RuleIndex::default();
            for rule in rule(old, 1) {
                index.add(rule);
            }
            let mut found = Vec::new();
            for rule in rule(new, 2) {
                index.meet(&rule, &mut { usize::MAX }, |_, relation| found.push(relation));
            }
            assert_eq!(found.into_iter().max(), expected, "{old} / {new}");
            for rule in rule(old, 1) {
                index.remove(&rule);
            }
            assert_eq!(index, RuleIndex::default(), "{old}");
        }
    }

    #[test]
    fn a_budget_bounds_the_search_and_identical_rules_are_found_all_the_same() {
        let mut index = RuleIndex::default();
        for id in 1..=1_000 {
            let (a, b) = (id / 256, id % 256);
            rule(&format!("up udp from 10.0.{a}.{b} to 192.0.2.0/24"), id)
                .into_iter()
                .for_each(|rule| index.add(rule));
        }
        rule("up udp to 192.0.2.7", 2_000).into_iter().for_each(|rule| index.add(rule));
        let met = |text: &str, budget: usize| {
            let (mut left, mut found) = (budget, Vec::new());
            for rule in rule(text, 3_000) {
                index.meet(&rule, &mut left, |_, relation| found.push(relation));
            }
            (left, found)
        };
        let (left, found) = met("up udp to 192.0.2.7", 100);
        assert_eq!((left, found.first()), (0, Some(&Relation::Identical)));
        assert!(found.len() <= 100, "{}", found.len());
        let (left, found) = met("up udp to 192.0.2.7", 10_000);
        assert!(left > 0 && found.len() == 1_001, "{left} left, {}", found.len());
        assert_eq!(met("up udp from 10.0.1.1 to 192.0.2.0/24", 1).1.first(), Some(&Relation::Identical));
    }

    proptest! {
        #[test]
        fn the_index_finds_what_comparing_all_pairs_finds(
            seeds in prop::collection::vec((0u8..4, 0u8..4, 0u8..4, 0u8..3), 1..40)
        ) {
            // Few addresses and lengths, so that pairs meet in every way.
            let text = |&(a, length, b, way): &(u8, u8, u8, u8)| {
                let net = format!("10.0.{a}.0/24").parse::<ipnet::Ipv4Net>().unwrap();
                let net = ipnet::Ipv4Net::new(net.addr(), [0, 8, 23, 24][usize::from(length)]).unwrap().trunc();
                let far = ["any", "192.0.2.0/24:80", "192.0.2.7", ":80-90"][usize::from(b)];
                match way {
                    0 => format!("up from {net} to {far}"),
                    1 => format!("down from {far} to {net}"),
                    _ => format!("tcp from {net} to {far}"),
                }
            };
            let all: Vec<Rule> = seeds.iter().enumerate()
                .flat_map(|(id, seed)| rule(&text(seed), id as u64 + 1)).collect();
            let mut index = RuleIndex::default();
            for rule in &all { index.add(*rule); }
            for rule in &all {
                let mut found = Vec::new();
                index.meet(rule, &mut { usize::MAX }, |other, _| {
                    found.push((other.rank, other.direction, other.family));
                });
                let mut expected: Vec<_> = all.iter()
                    .filter(|other| other.direction == rule.direction && other.family == rule.family)
                    .filter(|other| overlaps(other, rule))
                    .map(|other| (other.rank, other.direction, other.family)).collect();
                found.sort_unstable();
                expected.sort_unstable();
                prop_assert_eq!(found, expected);
            }
        }
    }
}
