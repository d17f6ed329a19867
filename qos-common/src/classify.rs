//! The classifier's rules: what a packet is to a rule, when a rule matches, and where it is kept.
//!
//! Every rule stands in one *table*, named by the prefix lengths of its look-up key, and there in
//! the list of one *slot*, chosen by a hash of direction, family and the masked addresses. Slots
//! are shared by all tables and by colliding keys; a rule is compared in full, so sharing costs
//! time and never a wrong answer. Lists are sorted, best rule first.

/// Direction of traffic, as seen from the subscriber.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// From the subscriber.
    Upstream = 0,
    /// To the subscriber.
    Downstream = 1,
}

impl Direction {
    /// Both directions, in the order of their numbers.
    pub const BOTH: [Self; 2] = [Self::Upstream, Self::Downstream];

    /// The direction of number `bit`; all but zero are downstream.
    #[inline(always)]
    #[must_use]
    pub const fn from_bit(bit: u32) -> Self {
        if bit == 0 { Self::Upstream } else { Self::Downstream }
    }
}

/// Address family of a packet or rule.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4 = 0,
    /// IPv6.
    V6 = 1,
}

/// An address, left-aligned in 128 bits: an IPv4 address fills the top 32 bits of `high`.
///
/// Both halves are in host order, so that a prefix is the top bits of a number.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    /// First 64 bits.
    pub high: u64,
    /// Last 64 bits; zero for IPv4.
    pub low: u64,
}

const _: () = assert!(size_of::<Address>() == 16);

impl Address {
    /// From the four bytes of an IPv4 address.
    #[inline(always)]
    #[must_use]
    pub const fn v4(octets: [u8; 4]) -> Self {
        Self { high: (u32::from_be_bytes(octets) as u64) << 32, low: 0 }
    }

    /// From the sixteen bytes of an IPv6 address.
    #[inline(always)]
    #[must_use]
    pub const fn v6(octets: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = octets;
        Self {
            high: u64::from_be_bytes([a, b, c, d, e, f, g, h]),
            low: u64::from_be_bytes([i, j, k, l, m, n, o, p]),
        }
    }

    /// The address with all but its first `length` bits cleared.
    #[inline(always)]
    #[must_use]
    pub const fn prefix(self, length: u32) -> Self {
        let (high, low) = masks(length);
        Self { high: self.high & high, low: self.low & low }
    }

    /// The address with the bits outside `mask` cleared.
    #[inline(always)]
    const fn masked(self, mask: Self) -> Self {
        Self { high: self.high & mask.high, low: self.low & mask.low }
    }

    /// Tells whether the first `length` bits are those of `other`.
    #[inline(always)]
    #[must_use]
    pub const fn shares_prefix(self, other: Self, length: u32) -> bool {
        let (high, low) = masks(length);
        (self.high ^ other.high) & high | (self.low ^ other.low) & low == 0
    }
}

/// Masks of the two halves of a prefix of `length` bits.
#[inline(always)]
const fn masks(length: u32) -> (u64, u64) {
    let high = if length > 64 { 64 } else { length };
    (top_bits(high), top_bits(length - high))
}

/// A number whose first `count` bits are ones; 0 to 64 of them.
#[inline(always)]
const fn top_bits(count: u32) -> u64 {
    // A shift by 64 is undefined: two halves of it have no branch either.
    let zeros = 64 - count;
    u64::MAX << (zeros / 2) << (zeros - zeros / 2)
}

/// The transport header could not be seen: a later fragment, or a chain of IPv6 extension headers
/// too long to follow. Rules match such a packet by its other fields.
pub const NO_TRANSPORT: u32 = 1;
/// The ports are not known, the protocol is: a later fragment whose first one was not seen.
pub const NO_PORTS: u32 = 2;

/// What the classifier sees of a packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Upstream or downstream, as [`Direction`].
    pub direction: u32,
    /// As [`Family`].
    pub family: u32,
    /// [`NO_TRANSPORT`], [`NO_PORTS`] or zero.
    pub unknown: u32,
    /// Source port in host order; zero for protocols without ports.
    pub source_port: u16,
    /// Destination port in host order; zero for protocols without ports.
    pub destination_port: u16,
    /// IP length in bytes: the whole packet from the IP header on.
    pub length: u16,
    /// IP protocol number, of the last header of an IPv6 chain.
    pub protocol: u8,
    /// Differentiated services code point.
    pub dscp: u8,
    /// Not used, zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<Key>() == 56);

/// The rule names a protocol.
pub const CHECK_PROTOCOL: u8 = 1;
/// The rule names a range of ports; a packet of a protocol without ports does not match.
pub const CHECK_PORTS: u8 = 2;
/// The rule names a code point.
pub const CHECK_DSCP: u8 = 4;

/// IP protocols that carry ports: TCP, UDP, DCCP, SCTP and UDP-Lite (IANA protocol numbers).
#[inline(always)]
#[must_use]
pub const fn has_ports(protocol: u8) -> bool {
    matches!(protocol, 6 | 17 | 33 | 132 | 136)
}

/// One selector of one allocation, in one direction and family. One cache line.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Source prefix, cleared behind its length.
    pub source: Address,
    /// Destination prefix, cleared behind its length.
    pub destination: Address,
    /// Order among rules that match: lowest first. See [`rank`].
    pub rank: u64,
    /// Slot of the allocation.
    pub slot: u32,
    /// First and last source port.
    pub source_ports: [u16; 2],
    /// First and last destination port.
    pub destination_ports: [u16; 2],
    /// Shortest and longest IP length.
    pub lengths: [u16; 2],
    /// Length of the source prefix in bits.
    pub source_length: u8,
    /// Length of the destination prefix in bits.
    pub destination_length: u8,
    /// IP protocol, where [`CHECK_PROTOCOL`] is set.
    pub protocol: u8,
    /// Code point, where [`CHECK_DSCP`] is set.
    pub dscp: u8,
    /// Which fields are compared.
    pub checks: u8,
    /// As [`Family`].
    pub family: u8,
    /// As [`Direction`].
    pub direction: u8,
    /// Not used, zero.
    pub reserved: u8,
}

const _: () = assert!(size_of::<Rule>() == 64);

/// Selectors an allocation may have.
pub const MAX_SELECTORS: u32 = 1 << 12;

/// Order of a rule: higher precedence first, then the older allocation (the lower id), then the
/// earlier selector.
///
/// `allocation` is held to 36 bits and `selector` to [`MAX_SELECTORS`].
#[must_use]
pub const fn rank(precedence: u16, allocation: u64, selector: u32) -> u64 {
    let allocation = if allocation >> 36 != 0 { (1 << 36) - 1 } else { allocation };
    let selector = if selector >= MAX_SELECTORS { MAX_SELECTORS - 1 } else { selector };
    ((u16::MAX - precedence) as u64) << 48 | allocation << 12 | selector as u64
}

/// Index of the selector within its allocation, from a rule's rank.
#[inline(always)]
#[must_use]
pub const fn selector_of(rank: u64) -> u32 {
    (rank & 0xfff) as u32
}

impl Rule {
    /// Tells whether the rule matches a packet, leaving expiry aside.
    #[inline(always)]
    #[must_use]
    pub const fn matches(&self, key: &Key) -> bool {
        if self.family as u32 != key.family || self.direction as u32 != key.direction {
            return false;
        }
        if !self.source.shares_prefix(key.source, self.source_length as u32)
            || !self.destination.shares_prefix(key.destination, self.destination_length as u32)
            || !within(key.length, self.lengths)
        {
            return false;
        }
        if self.checks & CHECK_DSCP != 0 && self.dscp != key.dscp {
            return false;
        }
        if key.unknown & NO_TRANSPORT != 0 {
            return true;
        }
        if self.checks & CHECK_PROTOCOL != 0 && self.protocol != key.protocol {
            return false;
        }
        if self.checks & CHECK_PORTS == 0 {
            return true;
        }
        has_ports(key.protocol)
            && (key.unknown & NO_PORTS != 0
                || within(key.source_port, self.source_ports)
                    && within(key.destination_port, self.destination_ports))
    }
}

#[inline(always)]
const fn within(value: u16, range: [u16; 2]) -> bool {
    let [first, last] = range;
    value >= first && value <= last
}

/// Tables of one direction and family.
pub const MAX_TABLES: usize = 16;

/// A table: the prefix lengths of its keys, and the best rank of any rule in it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// Lowest rank in the table; [`Table::EMPTY`]'s where it holds no rule.
    pub best: u64,
    /// The bits of a source address that are in the key.
    pub source_mask: Address,
    /// The bits of a destination address that are in the key.
    pub destination_mask: Address,
    /// Source prefix bits in the key.
    pub source_length: u32,
    /// Destination prefix bits in the key.
    pub destination_length: u32,
}

const _: () = assert!(size_of::<Table>() == 48);

impl Table {
    /// A place that holds no table.
    pub const EMPTY: Self = Self::new(u64::MAX, 0, 0);

    /// A table whose keys are prefixes of these lengths, at most 128, and whose best rule has this
    /// rank.
    #[must_use]
    pub const fn new(best: u64, source_length: u32, destination_length: u32) -> Self {
        let ones = Address { high: u64::MAX, low: u64::MAX };
        Self {
            best,
            source_mask: ones.prefix(source_length),
            destination_mask: ones.prefix(destination_length),
            source_length,
            destination_length,
        }
    }
}

/// All tables of one direction and family, the value of map `tables` at [`table_set`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableSet {
    /// Tables; places without one are [`Table::EMPTY`].
    pub tables: [Table; MAX_TABLES],
    /// Places in use, from the first.
    pub used: u32,
    /// Not used, zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<TableSet>() == 48 * MAX_TABLES + 8);

/// Number of table sets: one for each direction and family.
pub const TABLE_SETS: u32 = 4;

/// Index of the table set of `direction` and `family`.
#[inline(always)]
#[must_use]
pub const fn table_set(direction: u32, family: u32) -> u32 {
    (direction & 1) << 1 | (family & 1)
}

/// Number of slots in the index over all tables, a power of two.
pub const INDEX_SLOTS: u32 = 1 << 16;

/// A slot of the index: where the list of its rules begins, and how many they are.
///
/// One aligned 64-bit word, replaced at once.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndexSlot(u64);

const _: () = assert!(size_of::<IndexSlot>() == 8);

impl IndexSlot {
    /// A slot with no rule.
    pub const EMPTY: Self = Self(0);

    /// A list of `count` rules from `start` on.
    #[must_use]
    pub const fn new(start: u32, count: u32) -> Self {
        Self((count as u64) << 32 | start as u64)
    }

    /// Index of the first rule.
    #[inline(always)]
    #[must_use]
    pub const fn start(self) -> u32 {
        self.0 as u32
    }

    /// Number of rules.
    #[inline(always)]
    #[must_use]
    pub const fn count(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The slot as it stands in memory.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }
}

/// Slot of the index for a key of a table: `source` and `destination` are already cleared behind
/// the table's prefix lengths.
///
/// Multiplies and folds: five multiplications, no table, no loop.
#[inline(always)]
#[must_use]
pub const fn index_slot(set: u32, source: Address, destination: Address, lengths: u32) -> u32 {
    const A: u64 = 0x9e37_79b9_7f4a_7c15;
    const B: u64 = 0xc2b2_ae3d_27d4_eb4f;
    let mut hash = (source.high ^ A).wrapping_mul(B) ^ (destination.high ^ B).wrapping_mul(A).rotate_left(31);
    hash = hash.wrapping_add(
        (source.low.rotate_left(17) ^ destination.low).wrapping_mul(B) ^ destination.low.wrapping_mul(A),
    );
    hash = (hash ^ hash >> 29 ^ (lengths as u64) << 2 ^ set as u64).wrapping_mul(A);
    (hash >> 48) as u32 & (INDEX_SLOTS - 1)
}

/// Slot of the index for `key` in `table`.
#[inline(always)]
#[must_use]
pub const fn slot_of_key(key: &Key, table: &Table) -> u32 {
    slot_of(table_set(key.direction, key.family), key.source, key.destination, table)
}

/// Slot of the index in which `rule` is found through `table`, whose lengths are at most its own.
#[must_use]
pub const fn slot_of_rule(rule: &Rule, table: &Table) -> u32 {
    slot_of(table_set(rule.direction as u32, rule.family as u32), rule.source, rule.destination, table)
}

#[inline(always)]
const fn slot_of(set: u32, source: Address, destination: Address, table: &Table) -> u32 {
    index_slot(
        set,
        source.masked(table.source_mask),
        destination.masked(table.destination_mask),
        table.source_length << 8 | table.destination_length,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn open_rule() -> Rule {
        Rule {
            source_ports: [0, u16::MAX],
            destination_ports: [0, u16::MAX],
            lengths: [0, u16::MAX],
            ..Rule::default()
        }
    }

    fn packet() -> Key {
        Key {
            source: Address::v4([192, 0, 2, 1]),
            destination: Address::v4([198, 51, 100, 7]),
            direction: Direction::Upstream as u32,
            family: Family::V4 as u32,
            unknown: 0,
            source_port: 40_000,
            destination_port: 443,
            length: 1_500,
            protocol: 6,
            dscp: 0,
            reserved: 0,
        }
    }

    #[test]
    fn each_field_narrows_the_match() {
        let rule = open_rule;
        let cases: [(&str, Rule, bool); 16] = [
            ("open", rule(), true),
            ("other family", Rule { family: 1, ..rule() }, false),
            ("other direction", Rule { direction: 1, ..rule() }, false),
            (
                "source prefix",
                Rule { source: Address::v4([192, 0, 2, 0]), source_length: 24, ..rule() },
                true,
            ),
            (
                "other source",
                Rule { source: Address::v4([192, 0, 3, 0]), source_length: 24, ..rule() },
                false,
            ),
            (
                "host",
                Rule { destination: Address::v4([198, 51, 100, 7]), destination_length: 32, ..rule() },
                true,
            ),
            (
                "other host",
                Rule { destination: Address::v4([198, 51, 100, 6]), destination_length: 32, ..rule() },
                false,
            ),
            ("protocol", Rule { checks: CHECK_PROTOCOL, protocol: 6, ..rule() }, true),
            ("other protocol", Rule { checks: CHECK_PROTOCOL, protocol: 17, ..rule() }, false),
            ("last port", Rule { checks: CHECK_PORTS, destination_ports: [1, 443], ..rule() }, true),
            (
                "past the last port",
                Rule { checks: CHECK_PORTS, destination_ports: [1, 442], ..rule() },
                false,
            ),
            ("source port", Rule { checks: CHECK_PORTS, source_ports: [40_001, 40_002], ..rule() }, false),
            ("code point", Rule { checks: CHECK_DSCP, dscp: 0, ..rule() }, true),
            ("other code point", Rule { checks: CHECK_DSCP, dscp: 46, ..rule() }, false),
            ("length", Rule { lengths: [1_500, 1_500], ..rule() }, true),
            ("too long", Rule { lengths: [0, 1_499], ..rule() }, false),
        ];
        for (name, rule, expected) in cases {
            assert_eq!(rule.matches(&packet()), expected, "{name}");
        }
    }

    #[test]
    fn a_fragment_does_not_escape_a_port_rule() {
        let rule = Rule {
            checks: CHECK_PROTOCOL | CHECK_PORTS,
            protocol: 6,
            destination_ports: [80, 80],
            ..open_rule()
        };
        assert!(!rule.matches(&packet()));
        assert!(rule.matches(&Key { unknown: NO_PORTS, ..packet() }));
        assert!(!rule.matches(&Key { unknown: NO_PORTS, protocol: 17, ..packet() }));
        assert!(rule.matches(&Key { unknown: NO_TRANSPORT, protocol: 60, ..packet() }));
    }

    #[test]
    fn ports_are_of_protocols_that_have_them() {
        let rule = Rule { checks: CHECK_PORTS, ..open_rule() };
        assert!(!rule.matches(&Key { protocol: 1, source_port: 0, destination_port: 0, ..packet() }));
        assert!(rule.matches(&Key { protocol: 132, ..packet() }));
    }

    #[test]
    fn rank_orders_by_precedence_then_age_then_selector() {
        let ordered = [rank(9, 5, 0), rank(9, 5, 1), rank(9, 6, 0), rank(8, 1, 0), rank(0, u64::MAX, 0)];
        assert!(ordered.is_sorted());
        assert_eq!(selector_of(rank(3, 77, 12)), 12);
    }

    proptest! {
        #[test]
        fn prefixes_agree_with_128_bit_numbers(a in any::<u128>(), b in any::<u128>(), length in 0u32..=128) {
            let (left, right) = (Address::v6(a.to_be_bytes()), Address::v6(b.to_be_bytes()));
            let mask = if length == 0 { 0 } else { u128::MAX << (128 - length) };
            prop_assert_eq!(left.shares_prefix(right, length), (a ^ b) & mask == 0);
            prop_assert_eq!(left.prefix(length), Address::v6((a & mask).to_be_bytes()));
        }

        #[test]
        fn a_matching_packet_looks_where_the_rule_is_kept(
            source in any::<u128>(), destination in any::<u128>(),
            lengths in (0u8..=128, 0u8..=128), cut in (0u8..=128, 0u8..=128),
        ) {
            let rule = Rule {
                source: Address::v6(source.to_be_bytes()).prefix(u32::from(lengths.0)),
                destination: Address::v6(destination.to_be_bytes()).prefix(u32::from(lengths.1)),
                source_length: lengths.0, destination_length: lengths.1, family: 1, ..open_rule()
            };
            let table =
                Table::new(0, u32::from(cut.0.min(lengths.0)), u32::from(cut.1.min(lengths.1)));
            let key = Key {
                source: Address::v6(source.to_be_bytes()), destination: Address::v6(destination.to_be_bytes()),
                family: 1, ..packet()
            };
            prop_assert!(rule.matches(&key));
            prop_assert_eq!(slot_of_rule(&rule, &table), slot_of_key(&key, &table));
        }
    }
}
