//! The classifier's rules: what a packet is to a rule, when a rule matches, and where it is kept.
//!
//! Rules of one direction and family stand in a few [`Table`]s. A table leads a packet to one list of rules:
//! by the [`Word`](crate::compact::Word) that a hash of the packet's addresses chooses, as many of their
//! first bits as the table says, or, in a table that looks at none of them, by its root, a [`Slot`]. A slot
//! is empty, a *list* of rules, best first, or a *fork*: some bits of one of the packet's fields choose among
//! further slots. Keys that collide share a word, and a rule is compared in full, so sharing costs time and
//! never a wrong answer.

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
pub(crate) const fn top_bits(count: u32) -> u64 {
    // A shift by 64 is undefined: two halves of it have no branch either.
    let zeros = 64 - count;
    u64::MAX << (zeros / 2) << (zeros - zeros / 2)
}

/// The transport header could not be seen: a later fragment, or a chain of IPv6 extension headers
/// too long to follow. Rules match such a packet by its other fields.
pub const NO_TRANSPORT: u32 = 1;
/// The ports are not known, the protocol is: a later fragment whose first one was not seen.
pub const NO_PORTS: u32 = 2;

/// What the classifier sees of a packet: eight words, of which forks choose bits.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Key {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
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
    /// Upstream or downstream, as [`Direction`].
    pub direction: u32,
    /// As [`Family`].
    pub family: u32,
    /// [`NO_TRANSPORT`], [`NO_PORTS`] or zero.
    pub unknown: u32,
    /// Not used, zero.
    pub reserved: [u32; 3],
}

const _: () = assert!(size_of::<Key>() == 64 && align_of::<Key>() == 8);

impl Key {
    /// One of the key's eight words; numbers above that count from the first again.
    #[inline(always)]
    #[must_use]
    pub const fn word(&self, number: u32) -> u64 {
        // SAFETY: a key is eight aligned words without padding, and the number is below that.
        unsafe { *(&raw const *self).cast::<u64>().add((number & 7) as usize) }
    }
}

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

/// One selector of one allocation, in one direction and family. See [`crate::compact`] for how it stands in
/// the map.
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

/// Number of the allocation, from a rule's rank.
#[inline(always)]
#[must_use]
pub const fn allocation_of(rank: u64) -> u64 {
    rank >> 12 & ((1 << 36) - 1)
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
/// Forks that a packet follows one behind the other in one table.
pub const MAX_FORKS: u32 = 8;

/// A table: how its slots are found, and the best rank of any rule in it. One cache line.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// Lowest rank in the table; [`Table::EMPTY`]'s where it holds no rule.
    pub best: u64,
    /// The only slot of a table that looks at no address; [`Slot::EMPTY`]: addresses are hashed.
    pub root: Slot,
    /// The bits of a source address that are in the key.
    pub source_mask: Address,
    /// The bits of a destination address that are in the key.
    pub destination_mask: Address,
    /// Makes the table's keys others than those of the same addresses in another table.
    pub salt: u64,
    /// Source prefix bits in the key.
    pub source_length: u32,
    /// Destination prefix bits in the key.
    pub destination_length: u32,
}

const _: () = assert!(size_of::<Table>() == 64);

impl Table {
    /// A place that holds no table.
    pub const EMPTY: Self = Self::hashed(0, 0, 0);

    /// A table without rules whose keys are prefixes of these lengths, at most 128.
    #[must_use]
    pub const fn hashed(source_length: u32, destination_length: u32, salt: u64) -> Self {
        let ones = Address { high: u64::MAX, low: u64::MAX };
        Self {
            best: u64::MAX,
            root: Slot::EMPTY,
            source_mask: ones.prefix(source_length),
            destination_mask: ones.prefix(destination_length),
            salt,
            source_length,
            destination_length,
        }
    }

    /// The hash of a packet's or rule's addresses in this table.
    #[inline(always)]
    #[must_use]
    pub const fn hash(&self, family: u32, source: Address, destination: Address) -> u64 {
        const A: u64 = 0x9e37_79b9_7f4a_7c15;
        const B: u64 = 0xc2b2_ae3d_27d4_eb4f;
        let (source, destination) =
            (source.masked(self.source_mask), destination.masked(self.destination_mask));
        // Both IPv4 addresses are in the upper halves: nothing is lost by joining them.
        let mut hash = (source.high ^ destination.high.rotate_left(32) ^ self.salt).wrapping_mul(A);
        if family != Family::V4 as u32 {
            hash = (hash ^ hash >> 32 ^ destination.high).wrapping_mul(B);
            hash = (hash ^ hash >> 32 ^ source.low).wrapping_mul(A);
            hash = hash ^ hash >> 32 ^ destination.low;
        }
        (hash ^ hash >> 32).wrapping_mul(B)
    }
}

/// All tables of one direction and family, a value of map `tables`. Numbers of words, slots, granules and
/// extras in and below it are counted from where its half begins.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableSet {
    /// Tables; places without one are [`Table::EMPTY`].
    pub tables: [Table; MAX_TABLES],
    /// Places in use, from the first.
    pub used: u32,
    /// How far a hash is shifted to the right to be one of the words from `words` on; below 64.
    pub shift: u32,
    /// First of the words that hashes choose among.
    pub words: u32,
    /// First slot of the half.
    pub slots: u32,
    /// First granule of the half.
    pub rules: u32,
    /// First extra of the half.
    pub extras: u32,
}

const _: () = assert!(size_of::<TableSet>() == 64 * MAX_TABLES + 24);

impl TableSet {
    /// A set without tables.
    pub const EMPTY: Self = Self {
        tables: [Table::EMPTY; MAX_TABLES],
        used: 0,
        shift: 63,
        words: 0,
        slots: 0,
        rules: 0,
        extras: 0,
    };

    /// Where the word for a hash stands.
    #[inline(always)]
    #[must_use]
    pub const fn position(&self, hash: u64) -> u32 {
        hashed_position(self.words, self.shift, hash)
    }
}

/// The same of a set's fields.
#[inline(always)]
#[must_use]
pub const fn hashed_position(words: u32, shift: u32, hash: u64) -> u32 {
    words.wrapping_add((hash >> (shift & 63)) as u32)
}

/// Number of table sets: one for each direction and family.
pub const TABLE_SETS: u32 = 4;

/// Index of the table set of `direction` and `family`.
#[inline(always)]
#[must_use]
pub const fn table_set(direction: u32, family: u32) -> u32 {
    (direction & 1) << 1 | (family & 1)
}

/// Rules are laid out twice: packets look through one half while the other is prepared.
pub const HALVES: u32 = 2;

/// Where the table sets of a half begin; all but the lowest bit of `half` is left aside.
#[inline(always)]
#[must_use]
pub const fn half_sets(half: u64) -> u32 {
    (half as u32 & 1) * TABLE_SETS
}

/// What packets are led to: nothing, a list of rules, or a fork. One aligned word, replaced at once.
///
/// A list has its first granule in the lowest 32 bits and the number of its rules in the next 15. A fork has
/// the first of its children in the lowest 32 bits, then 6 bits of shift, 4 of width and 3 that number the
/// key's word.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Slot(u64);

const _: () = assert!(size_of::<Slot>() == 8);

/// Longest list of rules.
pub const MAX_LIST: u32 = (1 << 15) - 1;

impl Slot {
    /// A slot with no rule.
    pub const EMPTY: Self = Self(0);

    const SHIFT: u32 = 32;
    const WIDTH: u32 = 38;
    const WORD: u32 = 42;
    const UNKNOWN: u64 = 1 << 45;
    const FORK: u64 = 1 << 47;

    /// A list of `count` rules from granule `start` on, at most [`MAX_LIST`].
    #[must_use]
    pub const fn list(start: u32, count: u32) -> Self {
        Self((count as u64) << 32 | start as u64)
    }

    /// A fork: `width` bits (1 to 8) of the key's word, from bit `shift` on, choose among the slots from
    /// `base` on. With `unknown` there is one more behind them, for packets of which not all is known.
    #[must_use]
    pub const fn fork(base: u32, word: u32, shift: u32, width: u32, unknown: bool) -> Self {
        Self(
            Self::FORK
                | if unknown { Self::UNKNOWN } else { 0 }
                | (word as u64) << Self::WORD
                | (width as u64) << Self::WIDTH
                | (shift as u64) << Self::SHIFT
                | base as u64,
        )
    }

    /// Tells whether there is no rule.
    #[inline(always)]
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Tells whether it is a fork.
    #[inline(always)]
    #[must_use]
    pub const fn is_fork(self) -> bool {
        self.0 & Self::FORK != 0
    }

    /// A list's first granule, or a fork's first child.
    #[inline(always)]
    #[must_use]
    pub const fn start(self) -> u32 {
        self.0 as u32
    }

    /// Number of rules of a list.
    #[inline(always)]
    #[must_use]
    pub const fn count(self) -> u32 {
        (self.0 >> 32) as u32 & MAX_LIST
    }

    /// Of a fork: the number of the key's word.
    #[inline(always)]
    #[must_use]
    pub const fn word(self) -> u32 {
        (self.0 >> Self::WORD) as u32 & 7
    }

    /// Of a fork: the lowest bit that chooses.
    #[inline(always)]
    #[must_use]
    pub const fn shift(self) -> u32 {
        (self.0 >> Self::SHIFT) as u32 & 63
    }

    /// Of a fork: the number of bits that choose.
    #[inline(always)]
    #[must_use]
    pub const fn width(self) -> u32 {
        (self.0 >> Self::WIDTH) as u32 & 15
    }

    /// Of a fork: there is a child for packets of which not all is known.
    #[inline(always)]
    #[must_use]
    pub const fn has_unknown(self) -> bool {
        self.0 & Self::UNKNOWN != 0
    }

    /// Of a fork: where the slot for a packet stands.
    #[inline(always)]
    #[must_use]
    pub const fn child(self, key: &Key) -> u32 {
        let choices = 1u32 << self.width();
        let chosen = if self.has_unknown() && key.unknown != 0 {
            choices
        } else {
            (key.word(self.word()) >> self.shift()) as u32 & (choices - 1)
        };
        self.start().wrapping_add(chosen)
    }

    /// The slot as it stands in memory.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The slot that stands in memory as this.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }
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
            reserved: [0; 3],
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
            let table = Table::hashed(u32::from(cut.0.min(lengths.0)), u32::from(cut.1.min(lengths.1)), 7);
            let key = Key {
                source: Address::v6(source.to_be_bytes()), destination: Address::v6(destination.to_be_bytes()),
                family: 1, ..packet()
            };
            prop_assert!(rule.matches(&key));
            prop_assert_eq!(
                table.hash(1, rule.source, rule.destination),
                table.hash(1, key.source, key.destination)
            );
        }
    }
    #[test]
    fn words_of_a_key_have_its_fields_where_forks_look() {
        let key = Key { dscp: 46, ..packet() };
        assert_eq!(key.word(0), key.source.high);
        assert_eq!(key.word(3), key.destination.low);
        let service = key.word(4);
        assert_eq!((service & 0xffff, service >> 16 & 0xffff), (40_000, 443));
        assert_eq!((service >> 32 & 0xffff, service >> 48 & 0xff, service >> 56), (1_500, 6, 46));
        let fork = Slot::fork(100, 4, 16, 8, true);
        assert_eq!(fork.child(&key), 100 + (443 & 0xff));
        assert_eq!(fork.child(&Key { unknown: NO_PORTS, ..key }), 100 + 256);
        assert_eq!(Slot::fork(9, 2, 56, 8, false).child(&Key { unknown: NO_PORTS, ..key }), 9 + 198);
    }

    #[test]
    fn a_slot_says_what_was_put_into_it() {
        let list = Slot::list(u32::MAX, MAX_LIST);
        assert_eq!((list.start(), list.count(), list.is_fork()), (u32::MAX, MAX_LIST, false));
        let fork = Slot::fork(u32::MAX, 7, 63, 8, true);
        assert!(fork.is_fork() && fork.has_unknown() && !fork.is_empty());
        assert_eq!((fork.start(), fork.word(), fork.shift(), fork.width()), (u32::MAX, 7, 63, 8));
        assert!(Slot::from_raw(Slot::EMPTY.raw()).is_empty());
    }
}
