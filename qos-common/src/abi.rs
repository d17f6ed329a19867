//! Values of the BPF maps.
//!
//! Every type is `repr(C)` with natural alignment, named padding and a checked size, and is valid
//! for any bytes. A change to any of them, or to a map's key or length, raises [`ABI_VERSION`]. Fields
//! that are carried over from one version to another are found by their names: one whose meaning
//! changes gets another name.
//!
//! The feature `next` stands for a version to come, whose records have their fields in other places.
//! It is what tests upgrade to and go back from.

use crate::classify::{Direction, Key};
use crate::clock::Meter;
use crate::mark::MarkLayout;

/// Version of the maps' layout. Pinned maps of another version are not reused as they are.
pub const ABI_VERSION: u32 = 4 + cfg!(feature = "next") as u32;

/// Slots for allocations, slot zero ("none") among them.
pub const ALLOCATION_SLOTS: u32 = 1 << 16;
/// Slots for providers, slot zero ("none") among them.
pub const PROVIDER_SLOTS: u32 = 1 << 10;
/// Slots for applications, slot zero ("none") among them.
pub const APPLICATION_SLOTS: u32 = 1 << 12;
/// Slots for lines, slot zero ("none") among them.
pub const LINE_SLOTS: u32 = 10_241;
/// Rules the classifier takes, unless the configuration says another number.
pub const MAX_RULES: u32 = 1 << 17;
/// Least and most that a configuration may say.
pub const MAX_RULES_RANGE: core::ops::RangeInclusive<u32> = 1 << 10..=1 << 20;
/// Different pairs of lengths and code points in the rules of one half, and zero, which is none.
pub const EXTRA_ROOM: u32 = 1 << 16;

/// Words of one half for hashes to choose among, for so many rules.
#[must_use]
pub const fn word_room(rules: u32) -> u32 {
    // Twice as many as rules in each table set, rounded up to a power of two.
    4 * rules + 1_024
}

/// Slots of one half.
#[must_use]
pub const fn slot_room(rules: u32) -> u32 {
    2 * rules + 1_024
}

/// Granules of one half. Lists are copied when they change, the old copy is kept for a while, a rule may
/// stand in several lists, and one of IPv6 takes two.
#[must_use]
pub const fn rule_room(rules: u32) -> u32 {
    rules / 4 * 10 + 1_024
}

/// Subscriber prefixes of lines.
pub const MAX_LINE_PREFIXES: u32 = 1 << 15;
/// Interfaces of a gateway.
pub const MAX_INTERFACES: u32 = 1 << 8;
/// Distinct prefix lengths that lines of one family may have.
pub const MAX_LINE_LENGTHS: usize = 8;

/// Index of a slot's record for one direction, in maps that hold both.
#[inline(always)]
#[must_use]
pub const fn directed(slot: u32, direction: Direction) -> u32 {
    slot << 1 | direction as u32
}

/// Settings of the whole object, the only value of map `settings`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// [`ABI_VERSION`] of the writer.
    pub abi: u32,
    /// Non-zero: classify and count, never drop, delay or mark.
    pub observe: u32,
    /// Where in `skb->mark` the classification stands.
    pub mark: MarkLayout,
    /// Prefix lengths of lines' IPv4 addresses, longest first, in use up to `line_lengths_v4_used`.
    pub line_lengths_v4: [u8; MAX_LINE_LENGTHS],
    /// Prefix lengths of lines' IPv6 addresses, likewise.
    pub line_lengths_v6: [u8; MAX_LINE_LENGTHS],
    /// Number of IPv4 prefix lengths in use.
    pub line_lengths_v4_used: u32,
    /// Number of IPv6 prefix lengths in use.
    pub line_lengths_v6_used: u32,
    /// `skb->priority` of traffic on no known line, upstream and downstream; zero leaves it alone.
    pub default_class: [u32; 2],
    /// Non-zero: an allocation has an MTU.
    pub mtus: u32,
    /// Non-zero: upstream, the mark of what no allocation takes names its line. Addresses are rewritten
    /// before it leaves.
    pub marked_lines: u32,
}

const _: () = assert!(size_of::<Settings>() == 60);

/// The allocation has a level in this direction.
pub const IN_USE: u8 = 1;
/// Traffic over the maximum is dropped where it is classified.
pub const POLICE: u8 = 2;
/// Traffic over the maximum queues at egress.
pub const SHAPE: u8 = 4;
/// Packets are re-marked with the allocation's code point.
pub const MARK_DSCP: u8 = 8;

/// One direction of an allocation: its level as the kernel holds traffic to it. One cache line.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allocation {
    /// Maximum capacity. For shaped traffic its burst covers the queue at egress, so that the
    /// provider is not charged for what the queue will drop.
    #[cfg(feature = "next")]
    pub maximum: Meter,
    /// Id of the allocation; zero where the slot is free.
    pub id: u64,
    /// When it ends, in ns of CLOCK_MONOTONIC; `u64::MAX` for never.
    pub expires_ns: u64,
    /// Guaranteed capacity.
    pub guaranteed: Meter,
    /// Maximum capacity. For shaped traffic its burst covers the queue at egress, so that the
    /// provider is not charged for what the queue will drop.
    #[cfg(not(feature = "next"))]
    pub maximum: Meter,
    /// Class at egress, as `skb->priority`; zero: that of the packet's line.
    pub class: u32,
    /// Slot of the provider.
    pub provider: u16,
    /// Slot of the application; zero: none.
    pub application: u16,
    /// Largest IP packet in bytes; zero: any.
    pub mtu: u16,
    /// Bytes a packet takes on the line above its IP length.
    pub overhead: i16,
    /// [`IN_USE`], [`POLICE`], [`SHAPE`], [`MARK_DSCP`].
    pub flags: u8,
    /// As [`crate::length::LinkLayer`].
    pub link_layer: u8,
    /// Code point written where [`MARK_DSCP`] is set.
    pub dscp: u8,
    /// Not used, zero.
    pub reserved: u8,
}

const _: () = assert!(size_of::<Allocation>() == 64);

impl Allocation {
    /// Whether it is in use at a time, in ns of CLOCK_MONOTONIC.
    #[inline(always)]
    #[must_use]
    pub const fn lives(&self, now_ns: u64) -> bool {
        self.flags & IN_USE != 0 && self.expires_ns > now_ns
    }
}

/// Running clocks of one direction of an allocation, or of a provider's aggregate, and counts of what
/// is too rare to be counted for each CPU. A cache line, so that two of them never share one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clocks {
    /// Not used, zero.
    #[cfg(feature = "next")]
    pub reserved: u64,
    /// Clock of the guaranteed capacity; not used by providers.
    pub guaranteed: u64,
    /// Clock of the maximum or aggregate capacity.
    pub maximum: u64,
    /// When all answers to packets above the MTU would have been due one by one, in ns of
    /// CLOCK_MONOTONIC.
    pub answers_due: u64,
    /// Packets above the MTU that may not be fragmented: dropped.
    pub too_big_dropped: u64,
    /// Those of them whose sender was told.
    pub too_big_answered: u64,
    /// Packets above the MTU that may be fragmented: passed.
    pub too_big_passed: u64,
    /// TCP handshake packets whose segment size was lowered.
    pub mss_lowered: u64,
    /// Not used, zero.
    #[cfg(not(feature = "next"))]
    pub reserved: u64,
}

const _: () = assert!(size_of::<Clocks>() == 64);

/// Smallest MTU that IPv6 hosts accept, in bytes (RFC 8200, section 5).
pub const SMALLEST_IPV6_MTU: u32 = 1_280;

/// Longest name kept in a map, in bytes of UTF-8; shorter ones are padded with zeros.
pub const NAME_LENGTH: usize = 32;

/// A provider, and what all its allocations together may carry.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Provider {
    /// Aggregate maximum upstream and downstream; unset: no limit.
    pub aggregate: [Meter; 2],
    /// Start of its name.
    pub name: [u8; NAME_LENGTH],
    /// 0: the slot is free, 1: application service provider, 2: network service provider.
    pub kind: u32,
    /// Not used, zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<Provider>() == 72);

/// An application of a provider.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Application {
    /// Start of its name.
    pub name: [u8; NAME_LENGTH],
    /// Slot of its provider; zero where the slot is free.
    pub provider: u32,
    /// Not used, zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<Application>() == 40);

/// What one CPU counted of one direction of an allocation or provider. One cache line.
///
/// What passed is `in_profile` plus `excess`. In observe mode `dropped` and `marked` say what would
/// have been.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets whose code point was rewritten.
    #[cfg(feature = "next")]
    pub marked_packets: u64,
    /// Their charged bytes.
    #[cfg(feature = "next")]
    pub marked_bytes: u64,
    /// Packets within the guaranteed capacity.
    pub in_profile_packets: u64,
    /// Their charged bytes.
    pub in_profile_bytes: u64,
    /// Packets above the guaranteed and within the maximum capacity.
    pub excess_packets: u64,
    /// Their charged bytes.
    pub excess_bytes: u64,
    /// Packets dropped by a limit.
    pub dropped_packets: u64,
    /// Their charged bytes.
    pub dropped_bytes: u64,
    /// Packets whose code point was rewritten.
    #[cfg(not(feature = "next"))]
    pub marked_packets: u64,
    /// Their charged bytes.
    #[cfg(not(feature = "next"))]
    pub marked_bytes: u64,
}

const _: () = assert!(size_of::<Counters>() == 64);

impl Counters {
    /// Adds what another CPU counted.
    #[must_use]
    pub const fn plus(&self, other: &Self) -> Self {
        Self {
            in_profile_packets: self.in_profile_packets.wrapping_add(other.in_profile_packets),
            in_profile_bytes: self.in_profile_bytes.wrapping_add(other.in_profile_bytes),
            excess_packets: self.excess_packets.wrapping_add(other.excess_packets),
            excess_bytes: self.excess_bytes.wrapping_add(other.excess_bytes),
            dropped_packets: self.dropped_packets.wrapping_add(other.dropped_packets),
            dropped_bytes: self.dropped_bytes.wrapping_add(other.dropped_bytes),
            marked_packets: self.marked_packets.wrapping_add(other.marked_packets),
            marked_bytes: self.marked_bytes.wrapping_add(other.marked_bytes),
        }
    }
}

/// What became of a packet, as its place in [`Outcomes`] (both directions). Counted where the packet
/// was judged: in the hook that it came in by, or at egress where it came in by none.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// An allocation matched and no limit was exceeded.
    Admitted = 0,
    /// No allocation matched.
    Unclassified = 1,
    /// Dropped by the allocation's maximum.
    OverMaximum = 2,
    /// Dropped by the provider's aggregate.
    OverAggregate = 3,
    /// Not IPv4 or IPv6: ARP, PPPoE discovery and the like.
    NotIp = 4,
    /// Ends before the headers that it announces.
    Truncated = 5,
    /// More VLAN tags than a parser follows.
    TooManyTags = 6,
    /// The allocation that a mark names has gone: the packet passes unclassified.
    StaleMark = 7,
    /// Came in by a hook of ours, and the mark that told what it is was lost on the way: classified
    /// again at egress, and charged once. Counted at egress, beside what it was judged to be.
    LostMark = 8,
    /// A map entry that must exist does not.
    MissingEntry = 9,
    /// The IP header contradicts itself: version, header length or total length.
    Malformed = 10,
    /// Dropped: larger than the allocation's MTU, and not to be fragmented.
    TooBig = 11,
}

/// Number of [`Outcome`]s.
pub const OUTCOMES: u32 = 12;

/// What one CPU counted of packets by their [`Outcome`], and of their look-ups. Two cache lines.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// Packets, in the order of the outcomes' numbers.
    pub packets: [u64; OUTCOMES as usize],
    /// Look-ups in the rules.
    pub look_ups: u64,
    /// Tables that they looked into.
    pub tables: u64,
    /// Forks that they followed.
    pub forks: u64,
    /// Rules that they compared.
    pub rules: u64,
}

const _: () = assert!(size_of::<Outcomes>() == 128);

impl Outcome {
    /// All outcomes, in the order of their numbers.
    pub const ALL: [Self; OUTCOMES as usize] = [
        Self::Admitted,
        Self::Unclassified,
        Self::OverMaximum,
        Self::OverAggregate,
        Self::NotIp,
        Self::Truncated,
        Self::TooManyTags,
        Self::StaleMark,
        Self::LostMark,
        Self::MissingEntry,
        Self::Malformed,
        Self::TooBig,
    ];

    /// The outcome of that number; one that is none counts as a missing entry.
    #[inline(always)]
    #[must_use]
    pub const fn from_raw(raw: u32) -> Self {
        match raw {
            0 => Self::Admitted,
            1 => Self::Unclassified,
            2 => Self::OverMaximum,
            3 => Self::OverAggregate,
            4 => Self::NotIp,
            5 => Self::Truncated,
            6 => Self::TooManyTags,
            7 => Self::StaleMark,
            8 => Self::LostMark,
            10 => Self::Malformed,
            11 => Self::TooBig,
            _ => Self::MissingEntry,
        }
    }
}

/// Key of map `lines`: a subscriber's prefix.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LineKey {
    /// Address, cleared behind `length`.
    pub address: crate::classify::Address,
    /// Prefix length in bits.
    pub length: u32,
    /// As [`crate::classify::Family`].
    pub family: u32,
}

const _: () = assert!(size_of::<LineKey>() == 24);

/// The line that a subscriber's prefix is on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Line {
    /// Slot of the line.
    pub slot: u32,
}

const _: () = assert!(size_of::<Line>() == 4);

/// A line, as egress knows it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineClasses {
    /// Class of the line's rest, as `skb->priority`, upstream and downstream; zero: there is none.
    pub rest: [u32; 2],
}

const _: () = assert!(size_of::<LineClasses>() == 8);

/// Key of map `fragments`: what all fragments of a packet have in common.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source address.
    pub source: crate::classify::Address,
    /// Destination address.
    pub destination: crate::classify::Address,
    /// Identification.
    pub id: u32,
    /// Protocol in the low byte, family in the next, direction in the next.
    pub kind: u32,
}

const _: () = assert!(size_of::<FragmentKey>() == 40);

/// What the first fragment of a packet was classified as.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fragment {
    /// When it was seen, in ns of CLOCK_MONOTONIC.
    pub seen_ns: u64,
    /// Id of the allocation; zero: none matched.
    pub allocation: u64,
    /// Slot of the allocation.
    pub slot: u32,
    /// Rank's selector part.
    pub selector: u32,
}

const _: () = assert!(size_of::<Fragment>() == 24);

/// How long a first fragment speaks for the later ones (RFC 8200, section 4.5: 60 seconds to
/// reassemble; Linux keeps 30), in ns.
pub const FRAGMENT_AGE_NS: u64 = 30_000_000_000;

/// Packets whose fragments are followed at once.
pub const MAX_FRAGMENTS: u32 = 8_192;

/// Packets that come in by the interface are judged there; what goes out without a mark has lost it.
pub const JUDGED: u32 = 1;
/// Packets on the interface begin with their IP header.
pub const LAYER3: u32 = 2;

/// An interface of the gateway, under its index in map `interfaces`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// [`JUDGED`], [`LAYER3`].
    pub flags: u32,
    /// Its IPv4 address, in network order; zeros: none.
    pub v4: [u8; 4],
    /// Its global IPv6 address; zeros: none.
    pub v6: [u8; 16],
}

const _: () = assert!(size_of::<Interface>() == 24);

/// What `explain` asks, the only value of map `question`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Question {
    /// As [`Direction`].
    pub direction: u32,
    /// Non-zero: the packet begins with its IP header.
    pub layer3: u32,
}

const _: () = assert!(size_of::<Question>() == 8);

/// What the explaining program answers, the only value of map `answer`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What the classifier saw; meaningless where `parsed` is zero.
    pub key: Key,
    /// Id of the allocation that matched; zero: none.
    pub allocation: u64,
    /// Rank of the rule that matched.
    pub rank: u64,
    /// As [`Outcome`]: what would become of the packet now.
    pub outcome: u32,
    /// Slot of the allocation that matched.
    pub slot: u32,
    /// Non-zero: the packet was read.
    pub parsed: u32,
    /// Non-zero: within the guaranteed capacity.
    pub in_profile: u32,
    /// Bytes that would be charged.
    pub charged: u32,
    /// Class at egress.
    pub class: u32,
    /// Tables that were looked into.
    pub tables: u32,
    /// Forks that were followed.
    pub forks: u32,
    /// Rules that were compared.
    pub rules: u32,
    /// Rules that matched and whose allocation has expired.
    pub expired: u32,
}

const _: () = assert!(size_of::<Answer>() == 120);

/// "QOS1": tells our metadata from what another XDP program may have written.
pub const METADATA_MAGIC: u32 = 0x514f_5331;

/// Metadata in front of a packet, from XDP to tc ingress of the same interface.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// [`METADATA_MAGIC`].
    pub magic: u32,
    /// The classification, as it goes into `skb->mark`.
    pub mark: u32,
    /// What is still to be done, with [`LOWER_MSS`] or [`TELL_SENDER`], and the MTU in the low 16 bits;
    /// zero: nothing.
    pub task: u32,
    /// Differs from packet to packet where there is a task, so that GRO merges none of them.
    pub serial: u32,
}

const _: () = assert!(size_of::<Metadata>() == 16);

/// The packet opens a TCP connection: lower its segment size.
pub const LOWER_MSS: u32 = 1 << 16;
/// The packet is above the MTU: tell its sender instead of passing it on.
pub const TELL_SENDER: u32 = 1 << 17;
/// Part of [`Metadata::task`] that is the MTU.
pub const TASK_MTU: u32 = 0xffff;

/// Time that one answer to a packet above the MTU takes up, for each direction of an allocation, in ns:
/// up to 200 a second.
pub const ANSWER_INTERVAL_NS: u64 = 5_000_000;
/// Time that answers may be ahead of that, in ns: 50 at once.
pub const ANSWER_BURST_NS: u64 = 50 * ANSWER_INTERVAL_NS;

/// Class id of a minor number under a qdisc's major one (`TC_H_MAKE`, linux/pkt_sched.h).
#[must_use]
pub const fn class_id(major: u16, minor: u16) -> u32 {
    (major as u32) << 16 | minor as u32
}
