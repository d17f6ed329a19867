//! Rules as packets are compared with them: as small as they can be, since what a look-up costs is the
//! memory that it reads.
//!
//! Map `rules` is made of granules of 32 bytes. An IPv4 rule takes one; an IPv6 rule two, its addresses and
//! the rest. What few rules name, lengths and code points, is kept apart in an [`Extra`].
//! The rules of a list stand one behind the other, and the last is marked as such.

use crate::classify::{
    Address, CHECK_DSCP, CHECK_PORTS, CHECK_PROTOCOL, Family, Key, NO_PORTS, NO_TRANSPORT, Rule, has_ports,
    top_bits,
};

/// Flag of the last rule of a list.
const LAST: u8 = 1 << 7;

/// A piece of a rule, the value of map `rules`: half a cache line.
///
/// Of an IPv4 rule, or of the second granule of an IPv6 rule:
/// source and destination (32 bits each, IPv4 only); first source port, how many follow it, first
/// destination port, how many follow it (16 bits each); rank; slot (16), number of the extra (16),
/// protocol (8), flags (8), and for source and destination, 8 bits each, the bits that are left open
/// (IPv4) or the prefix length (IPv6). The first granule of an IPv6 rule has its two addresses.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Granule([u64; 4]);

const _: () = assert!(size_of::<Granule>() == 32);

/// Granules of a rule.
#[inline(always)]
#[must_use]
pub const fn granules(family: u32) -> u32 {
    1 + (family & 1)
}

/// What few rules name, a value of map `rule_extras`. The one of number zero is never looked at.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Extra {
    /// Shortest and longest IP length.
    pub lengths: [u16; 2],
    /// Code point, where `names_dscp` is not zero.
    pub dscp: u8,
    /// Not zero: the code point is compared.
    pub names_dscp: u8,
    /// Not used, zero.
    pub reserved: u16,
}

const _: () = assert!(size_of::<Extra>() == 8);

impl Extra {
    /// What a rule names of this; none for most.
    #[must_use]
    pub fn of(rule: &Rule) -> Option<Self> {
        let names_dscp = rule.checks & CHECK_DSCP != 0;
        if !names_dscp && rule.lengths == [0, u16::MAX] {
            return None;
        }
        let dscp = if names_dscp { rule.dscp } else { 0 };
        Some(Self { lengths: rule.lengths, dscp, names_dscp: u8::from(names_dscp), reserved: 0 })
    }

    /// Tells whether a packet is what is named.
    #[inline(always)]
    #[must_use]
    pub const fn matches(&self, key: &Key) -> bool {
        key.length >= self.lengths[0]
            && key.length <= self.lengths[1]
            && (self.names_dscp == 0 || self.dscp == key.dscp)
    }
}

/// What rules are compared with of a packet, worked out once.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// IPv4: both addresses, the source in the lower half.
    addresses: u64,
    source_port: u16,
    destination_port: u16,
    protocol: u8,
    /// Flags that a rule must not have.
    forbidden: u8,
    /// Not zero: the ports are not known.
    any_ports: u8,
    /// Not zero: nor is the protocol.
    any_protocol: u8,
}

const _: () = assert!(size_of::<Probe>() == 16);

impl Probe {
    /// Of a packet.
    #[inline(always)]
    #[must_use]
    pub const fn of(key: &Key) -> Self {
        let any_protocol = key.unknown & NO_TRANSPORT != 0;
        let portless = !any_protocol && !has_ports(key.protocol);
        Self {
            addresses: key.source.high >> 32 | key.destination.high >> 32 << 32,
            source_port: key.source_port,
            destination_port: key.destination_port,
            protocol: key.protocol,
            forbidden: if portless { CHECK_PORTS } else { 0 },
            any_ports: (key.unknown & (NO_TRANSPORT | NO_PORTS) != 0) as u8,
            any_protocol: any_protocol as u8,
        }
    }
}

impl Granule {
    const RANK: usize = 2;

    /// The granules of a rule, the second one for IPv6 only. `extra` is the number of its [`Extra`], zero
    /// for none; `last`: it ends its list.
    #[must_use]
    pub fn of(rule: &Rule, extra: u16, last: bool) -> [Self; 2] {
        let is_v4 = rule.family == Family::V4 as u8;
        let span = |[first, last]: [u16; 2]| u64::from(first) | u64::from(last - first) << 16;
        let flags = rule.checks & (CHECK_PROTOCOL | CHECK_PORTS) | if last { LAST } else { 0 };
        // What is not compared is not kept, so that equal rules are equal here.
        let protocol = if rule.checks & CHECK_PROTOCOL == 0 { 0 } else { rule.protocol };
        let open = |length: u8| if is_v4 { 32 - length } else { length };
        let addresses = rule.source.high >> 32 | rule.destination.high >> 32 << 32;
        let rest = Self([
            if is_v4 { addresses } else { 0 },
            span(rule.source_ports) | span(rule.destination_ports) << 32,
            rule.rank,
            u64::from(rule.slot & 0xffff)
                | u64::from(extra) << 16
                | u64::from(protocol) << 32
                | u64::from(flags) << 40
                | u64::from(open(rule.source_length)) << 48
                | u64::from(open(rule.destination_length)) << 56,
        ]);
        if is_v4 {
            return [rest, Self::default()];
        }
        let Rule { source, destination, .. } = rule;
        [Self([source.high, source.low, destination.high, destination.low]), rest]
    }

    /// The rule again: the granules that [`Granule::of`] made, with what the rule's extra says.
    #[must_use]
    pub fn rule(granules: [Self; 2], direction: u8, family: u8, extra: Extra) -> Rule {
        let is_v4 = family == Family::V4 as u8;
        let [first, second] = granules;
        let rest = if is_v4 { first } else { second };
        let word = rest.0[3];
        let length =
            |shift: u32| (if is_v4 { 32 - (word >> shift & 0xff) } else { word >> shift & 0xff }) as u8;
        let ports = |word: u64| [word as u16, (word as u16).wrapping_add((word >> 16) as u16)];
        let (source, destination) = if is_v4 {
            (Address { high: first.0[0] << 32, low: 0 }, Address { high: first.0[0] >> 32 << 32, low: 0 })
        } else {
            let [a, b, c, d] = first.0;
            (Address { high: a, low: b }, Address { high: c, low: d })
        };
        let has_extra = rest.extra() != 0;
        let names_dscp = has_extra && extra.names_dscp != 0;
        Rule {
            source,
            destination,
            rank: rest.rank(),
            slot: rest.slot(),
            source_ports: ports(rest.0[1]),
            destination_ports: ports(rest.0[1] >> 32),
            lengths: if has_extra { extra.lengths } else { [0, u16::MAX] },
            source_length: length(48),
            destination_length: length(56),
            protocol: (word >> 32) as u8,
            dscp: if names_dscp { extra.dscp } else { 0 },
            checks: rest.flags() & !LAST | if names_dscp { CHECK_DSCP } else { 0 },
            family,
            direction,
            reserved: 0,
        }
    }

    /// Order among rules that match. Of an IPv6 rule's second granule, as what follows.
    #[inline(always)]
    #[must_use]
    pub const fn rank(&self) -> u64 {
        self.0[Self::RANK]
    }

    /// Slot of the allocation.
    #[inline(always)]
    #[must_use]
    pub const fn slot(&self) -> u32 {
        self.0[3] as u32 & 0xffff
    }

    /// Number of the rule's [`Extra`]; zero: it has none.
    #[inline(always)]
    #[must_use]
    pub const fn extra(&self) -> u32 {
        (self.0[3] >> 16) as u32 & 0xffff
    }

    /// Tells whether the list ends here.
    #[inline(always)]
    #[must_use]
    pub const fn is_last(&self) -> bool {
        self.flags() & LAST != 0
    }

    #[inline(always)]
    const fn flags(&self) -> u8 {
        (self.0[3] >> 40) as u8
    }

    /// Tells whether an IPv4 rule matches a packet of its direction, leaving its extra and expiry aside.
    #[inline(always)]
    #[must_use]
    pub const fn matches_v4(&self, probe: &Probe) -> bool {
        let differ = self.0[0] ^ probe.addresses;
        let word = self.0[3];
        // Open bits are 32 at most.
        (differ & 0xffff_ffff) >> (word >> 48 & 63) | differ >> 32 >> (word >> 56 & 63) == 0
            && self.takes_service(probe)
    }

    /// The same of an IPv6 rule: the second granule, asked with the first.
    #[inline(always)]
    #[must_use]
    pub const fn matches_v6(&self, first: &Self, key: &Key, probe: &Probe) -> bool {
        let word = self.0[3];
        let (source, destination) = ((word >> 48) as u32 & 0xff, (word >> 56) as u32);
        differ(key.source, first.0[0], first.0[1], source)
            | differ(key.destination, first.0[2], first.0[3], destination)
            == 0
            && self.takes_service(probe)
    }

    #[inline(always)]
    const fn takes_service(&self, probe: &Probe) -> bool {
        let (ports, word) = (self.0[1], self.0[3]);
        let flags = (word >> 40) as u8;
        if flags & probe.forbidden != 0 {
            return false;
        }
        if flags & CHECK_PROTOCOL != 0 && (word >> 32) as u8 != probe.protocol && probe.any_protocol == 0 {
            return false;
        }
        let source = probe.source_port.wrapping_sub(ports as u16);
        let destination = probe.destination_port.wrapping_sub((ports >> 32) as u16);
        source <= (ports >> 16) as u16 && destination <= (ports >> 48) as u16 || probe.any_ports != 0
    }
}

/// Bits of the first `length` in which an address differs from the two halves of another.
#[inline(always)]
const fn differ(address: Address, high: u64, low: u64, length: u32) -> u64 {
    let first = if length > 64 { 64 } else { length };
    (address.high ^ high) & top_bits(first) | (address.low ^ low) & top_bits(length - first)
}

/// What a hash leads to: nothing, a list of rules, or a fork. Half a value of map `rule_words`.
///
/// The lowest 23 bits say where: the first granule of a list, or the slot that has the fork. The next bit is
/// set for a fork; the upper 8 are the tag.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Word(u32);

/// Tag of a word with keys that differ in theirs.
pub const ANY_TAG: u8 = 1;

impl Word {
    /// A word that leads to nothing.
    pub const EMPTY: Self = Self(0);
    /// Places that a word can lead to.
    pub const REACH: u32 = 1 << 23;

    const FORK: u32 = Self::REACH;

    /// Leads to a list, below [`Word::REACH`].
    #[must_use]
    pub const fn list(start: u32, tag: u8) -> Self {
        Self((tag as u32) << 24 | start & (Self::REACH - 1))
    }

    /// Leads to the fork in a slot, below [`Word::REACH`].
    #[must_use]
    pub const fn fork(slot: u32, tag: u8) -> Self {
        Self(Self::list(slot, tag).0 | Self::FORK)
    }

    /// The tag of a hash: never [`ANY_TAG`], never zero.
    #[inline(always)]
    #[must_use]
    pub const fn tag_of(hash: u64) -> u8 {
        hash as u8 | 0x80
    }

    /// The word's tag.
    #[inline(always)]
    #[must_use]
    pub const fn tag(self) -> u8 {
        (self.0 >> 24) as u8
    }

    /// The same word for keys of another tag; an empty one stays empty.
    #[must_use]
    pub const fn with_tag(self, tag: u8) -> Self {
        if self.is_empty() { self } else { Self(self.0 & 0x00ff_ffff | (tag as u32) << 24) }
    }

    /// Tells whether a key of this hash may have rules here.
    #[inline(always)]
    #[must_use]
    pub const fn admits(self, hash: u64) -> bool {
        self.tag() == Self::tag_of(hash) || self.tag() == ANY_TAG
    }

    /// All bits where it leads to a list for keys of this hash alone, and none otherwise. Without a branch.
    #[inline(always)]
    #[must_use]
    pub const fn leads_on(self, hash: u64) -> u32 {
        // The tag, and the bit of a fork below it.
        let differ = (self.0 >> 23) ^ (Self::tag_of(hash) as u32) << 1;
        (differ.wrapping_sub(1) as i32 >> 31) as u32
    }

    /// Tells whether there is nothing.
    #[inline(always)]
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Tells whether it leads to a fork.
    #[inline(always)]
    #[must_use]
    pub const fn is_fork(self) -> bool {
        self.0 & Self::FORK != 0
    }

    /// Where it leads to.
    #[inline(always)]
    #[must_use]
    pub const fn start(self) -> u32 {
        self.0 & (Self::REACH - 1)
    }

    /// The word as it stands in memory.
    #[must_use]
    #[inline(always)]
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// The word that stands in memory as this.
    #[inline(always)]
    #[must_use]
    pub const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_rule() -> impl Strategy<Value = Rule> {
        let range = || {
            prop_oneof![
                Just([0, u16::MAX]),
                (any::<u16>(), any::<u16>()).prop_map(|(a, b)| [a.min(b), a.max(b)])
            ]
        };
        let side = || (any::<u128>(), 0u8..=128);
        (
            side(),
            side(),
            (range(), range(), range()),
            (any::<u8>(), 0u8..64, 0u8..8),
            any::<bool>(),
            any::<u64>(),
            any::<u16>(),
        )
            .prop_map(
                |(
                    source,
                    destination,
                    (source_ports, destination_ports, lengths),
                    (protocol, dscp, checks),
                    v6,
                    rank,
                    slot,
                )| {
                    let end = |(bits, length): (u128, u8)| {
                        let length = if v6 { length } else { length % 33 };
                        let address = if v6 {
                            Address::v6(bits.to_be_bytes())
                        } else {
                            Address::v4((bits as u32).to_be_bytes())
                        };
                        (address.prefix(u32::from(length)), length)
                    };
                    let ((source, source_length), (destination, destination_length)) =
                        (end(source), end(destination));
                    let (source_ports, destination_ports) = match checks & CHECK_PORTS {
                        0 => ([0, u16::MAX], [0, u16::MAX]),
                        _ => (source_ports, destination_ports),
                    };
                    Rule {
                        source,
                        destination,
                        source_length,
                        destination_length,
                        source_ports,
                        destination_ports,
                        lengths,
                        protocol: if checks & CHECK_PROTOCOL == 0 { 0 } else { protocol },
                        dscp: if checks & CHECK_DSCP == 0 { 0 } else { dscp },
                        checks,
                        rank,
                        slot: u32::from(slot),
                        family: u8::from(v6),
                        direction: 1,
                        reserved: 0,
                    }
                },
            )
    }

    proptest! {
        #[test]
        fn a_rule_comes_back(rule in any_rule(), number in 1u16.., last in any::<bool>()) {
            let extra = Extra::of(&rule);
            let packed = Granule::of(&rule, if extra.is_some() { number } else { 0 }, last);
            prop_assert_eq!(Granule::rule(packed, rule.direction, rule.family, extra.unwrap_or_default()), rule);
            prop_assert_eq!(packed[usize::from(rule.family)].is_last(), last);
        }

        /// Packets that differ from one that the rule matches in one place.
        #[test]
        fn matches_what_the_rule_matches(
            rule in any_rule(), (flip, value) in (0usize..14, any::<u128>()), unknown in 0u32..4,
            protocol in prop_oneof![Just(6u8), Just(17), Just(1), any::<u8>()],
        ) {
            let bits = |address: Address| u128::from(address.high) << 64 | u128::from(address.low);
            let address = |number: u128| {
                if rule.family == 1 { Address::v6(number.to_be_bytes()) } else { Address::v4(((number >> 96) as u32).to_be_bytes()) }
            };
            let mut key = Key {
                source: rule.source, destination: rule.destination,
                source_port: rule.source_ports[0], destination_port: rule.destination_ports[1],
                length: rule.lengths[1], protocol: if rule.checks & CHECK_PROTOCOL != 0 { rule.protocol } else { protocol },
                dscp: rule.dscp, direction: 1, family: u32::from(rule.family), unknown, reserved: [0; 3],
            };
            match flip {
                0 => key.source = address(bits(key.source) ^ 1 << (value % 128)),
                1 => key.destination = address(bits(key.destination) ^ 1 << (value % 128)),
                2 => key.source_port = rule.source_ports[0].wrapping_sub(1),
                3 => key.source_port = rule.source_ports[1].wrapping_add(1),
                4 => key.destination_port = rule.destination_ports[1].wrapping_add(1),
                5 => key.destination_port = value as u16,
                6 => key.length = value as u16,
                7 => key.protocol = value as u8,
                8 => key.dscp = value as u8 & 63,
                9 => key.source = address(value),
                10 => key.destination = address(value),
                _ => {}
            }
            let extra = Extra::of(&rule);
            let packed = Granule::of(&rule, u16::from(extra.is_some()), true);
            let probe = Probe::of(&key);
            let matches = match rule.family {
                0 => packed[0].matches_v4(&probe),
                _ => packed[1].matches_v6(&packed[0], &key, &probe),
            } && extra.is_none_or(|extra| extra.matches(&key));
            prop_assert_eq!(matches, rule.matches(&key));
        }
    }

    #[test]
    fn a_word_says_what_was_put_into_it() {
        let list = Word::list(Word::REACH - 1, Word::tag_of(5));
        assert_eq!((list.start(), list.is_fork(), list.tag()), (Word::REACH - 1, false, 0x85));
        assert!(list.admits(5) && list.admits(0x85) && !list.admits(6) && !Word::EMPTY.admits(0));
        let fork = Word::fork(0, ANY_TAG);
        assert!(fork.is_fork() && !fork.is_empty() && fork.admits(77));
        assert_eq!((list.leads_on(5), list.leads_on(0x85), list.leads_on(6)), (u32::MAX, u32::MAX, 0));
        let own_fork = Word::fork(3, Word::tag_of(5));
        assert_eq!([own_fork, list.with_tag(ANY_TAG), Word::EMPTY].map(|word| word.leads_on(5)), [0; 3]);
        assert_eq!(list.with_tag(ANY_TAG), Word::list(Word::REACH - 1, ANY_TAG));
        assert_eq!(Word::EMPTY.with_tag(9), Word::EMPTY);
        assert_eq!(Word::from_raw(fork.raw()), fork);
    }
}
