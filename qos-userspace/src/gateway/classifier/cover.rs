//! Which tables rules are laid out in.

use std::collections::BTreeSet;

use qos_common::classify::Rule;

/// Rules of one key that a hashed table takes at most.
const PER_KEY: u8 = 8;
/// Hashed tables at most: the rest is for trees, those that are planned and those that come.
const MAX_HASHED: usize = 8;
/// Share of the rules that is worth a table of its own.
const WORTH: usize = 50;
/// Fewer rules than that are worth none.
const FEW: usize = 16;
/// Prefix lengths of one side that are tried.
const LENGTHS: usize = 10;
/// Prefixes shorter than that are wide.
const WIDE: u8 = 4;
/// Port ranges of more ports than that are wide.
const WIDE_PORTS: u16 = 256;

/// How rules are spread over tables: numbers of rules, in the order that they came in.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Tables that hash so many bits of source and destination.
    pub(super) hashed: Vec<((u8, u8), Vec<u32>)>,
    /// Tables with a tree.
    pub(super) trees: Vec<Vec<u32>>,
}

/// Spreads rules over tables. `members` are their numbers in `rules`.
pub(super) fn plan(rules: &[Rule], members: Vec<u32>) -> Plan {
    let mut plan = Plan::default();
    let all = members.len();
    let mut rest = members;
    while rest.len() >= FEW && plan.hashed.len() < MAX_HASHED {
        let Some((counts, covered)) = best_counts(rules, &rest) else {
            break;
        };
        if covered * WORTH < all || covered < FEW {
            break;
        }
        let (taken, left): (Vec<_>, Vec<_>) = rest
            .into_iter()
            .partition(|&member| counts.key(&rules[member as usize]).is_some_and(|key| counts.is_few(key)));
        plan.hashed.push((counts.lengths, taken));
        rest = left;
    }
    plan.trees = by_wideness(rules, rest);
    plan
}

/// The counts for the lengths whose table takes most of the rules, and how many it takes.
fn best_counts(rules: &[Rule], members: &[u32]) -> Option<(Counts, usize)> {
    let mut pairs = Vec::new();
    let sources = common_lengths(members.iter().map(|&member| rules[member as usize].source_length));
    let destinations =
        common_lengths(members.iter().map(|&member| rules[member as usize].destination_length));
    let mut histogram = vec![0u32; 129 * 129];
    for &member in members {
        let rule = &rules[member as usize];
        histogram[usize::from(rule.source_length) * 129 + usize::from(rule.destination_length)] += 1;
    }
    for &source in &sources {
        for &destination in &destinations {
            if (source, destination) != (0, 0) {
                let long = |from: u8| usize::from(from)..129;
                let eligible: u32 =
                    long(source).map(|s| histogram[s * 129..][long(destination)].iter().sum::<u32>()).sum();
                pairs.push((eligible as usize, (source, destination)));
            }
        }
    }
    pairs.sort_unstable_by_key(|&(eligible, (s, d))| std::cmp::Reverse((eligible, s.saturating_add(d))));
    let mut best: Option<(Counts, usize)> = None;
    for (eligible, lengths) in pairs {
        let bits = |(s, d): (u8, u8)| u32::from(s) + u32::from(d);
        if best.as_ref().is_some_and(|(_, covered)| eligible < *covered) {
            break;
        }
        let counts = Counts::of(rules, members, lengths);
        let covered = counts.covered();
        let is_better =
            |(other, most): &(Counts, usize)| (covered, bits(lengths)) > (*most, bits(other.lengths));
        if best.as_ref().is_none_or(is_better) {
            best = Some((counts, covered));
        }
    }
    best
}

/// Zero, and the lengths at equal steps through all of them.
fn common_lengths(lengths: impl Iterator<Item = u8>) -> BTreeSet<u8> {
    let mut all: Vec<u8> = lengths.collect();
    all.sort_unstable();
    let mut common: BTreeSet<u8> = all.iter().copied().collect();
    if common.len() > LENGTHS {
        common = (0..LENGTHS).map(|step| all[step * (all.len() - 1) / (LENGTHS - 1)]).collect();
    }
    common.insert(0);
    common
}

/// About how many rules each key has. Keys that collide count as one.
struct Counts {
    lengths: (u8, u8),
    counts: Vec<u8>,
    shift: u32,
}

impl Counts {
    fn of(rules: &[Rule], members: &[u32], lengths: (u8, u8)) -> Self {
        let bits = (members.len() * 4).next_power_of_two().ilog2().max(6);
        let mut counts = Self { lengths, counts: vec![0; 1 << bits], shift: 64 - bits };
        for &member in members {
            if let Some(key) = counts.key(&rules[member as usize]) {
                counts.counts[key] = counts.counts[key].saturating_add(1);
            }
        }
        counts
    }

    fn key(&self, rule: &Rule) -> Option<usize> {
        let (source, destination) = self.lengths;
        if rule.source_length < source || rule.destination_length < destination {
            return None;
        }
        let table = qos_common::classify::Table::hashed(u32::from(source), u32::from(destination), 0);
        Some((table.hash(u32::from(rule.family), rule.source, rule.destination) >> self.shift) as usize)
    }

    fn is_few(&self, key: usize) -> bool {
        self.counts[key] <= PER_KEY
    }

    fn covered(&self) -> usize {
        self.counts.iter().filter(|&&count| count <= PER_KEY).map(|&count| usize::from(count)).sum()
    }
}

/// Rules that are wide in the same fields: they would be copied into all leaves of others.
fn by_wideness(rules: &[Rule], members: Vec<u32>) -> Vec<Vec<u32>> {
    let mut groups: [Vec<u32>; 8] = Default::default();
    for member in members {
        let rule = &rules[member as usize];
        let [source, destination] = [rule.source_length < WIDE, rule.destination_length < WIDE];
        let many = |[first, last]: [u16; 2]| {
            rule.checks & qos_common::classify::CHECK_PORTS == 0 || last - first > WIDE_PORTS
        };
        let group = match (source, destination) {
            (true, true) => {
                3 + usize::from(many(rule.source_ports)) + 2 * usize::from(many(rule.destination_ports))
            }
            _ => usize::from(source) + 2 * usize::from(destination),
        };
        groups[group].push(member);
    }
    groups.into_iter().filter(|group| !group.is_empty()).collect()
}
