//! What the gateway tells of itself: counters, status, and why a packet is treated as it is.

use std::collections::BTreeMap;

use qos_common::abi::{Clocks, Counters};
use serde::{Deserialize, Serialize};

use crate::domain::{AllocationId, BitsPerSecond, Name};

/// Packets and charged bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes in the contract's length.
    pub bytes: u64,
}

/// What was counted of one direction of an allocation or provider since it was set up. In observe
/// mode `dropped` and `marked` say what would have been.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// In profile and excess together.
    pub passed: Count,
    /// Dropped by a limit where the packet was classified.
    pub dropped: Count,
    /// Packets dropped because the queue at egress was full; shaped allocations only.
    pub queue_dropped_packets: u64,
    /// Re-marked with another code point.
    pub marked: Count,
    /// Within the guaranteed capacity.
    pub in_profile: Count,
    /// Above the guaranteed and within the maximum capacity.
    pub excess: Count,
    /// What was done for the largest packet of the level; of allocations only.
    #[serde(default)]
    pub mtu: MtuCounts,
}

/// What was done for an allocation's MTU in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MtuCounts {
    /// Packets above it that may not be fragmented: dropped, and not counted elsewhere.
    pub dropped_packets: u64,
    /// Those of them whose sender was told; answers are limited to 200 a second.
    pub senders_told: u64,
    /// Packets above it that may be fragmented: passed.
    pub passed_packets: u64,
    /// TCP handshakes whose segment size was lowered.
    pub mss_lowered: u64,
}

impl From<Clocks> for MtuCounts {
    fn from(clocks: Clocks) -> Self {
        Self {
            dropped_packets: clocks.too_big_dropped,
            senders_told: clocks.too_big_answered,
            passed_packets: clocks.too_big_passed,
            mss_lowered: clocks.mss_lowered,
        }
    }
}

impl From<Counters> for Counts {
    fn from(counters: Counters) -> Self {
        let in_profile = Count { packets: counters.in_profile_packets, bytes: counters.in_profile_bytes };
        let excess = Count { packets: counters.excess_packets, bytes: counters.excess_bytes };
        Self {
            passed: Count {
                packets: in_profile.packets + excess.packets,
                bytes: in_profile.bytes + excess.bytes,
            },
            dropped: Count { packets: counters.dropped_packets, bytes: counters.dropped_bytes },
            queue_dropped_packets: 0,
            marked: Count { packets: counters.marked_packets, bytes: counters.marked_bytes },
            in_profile,
            excess,
            mtu: MtuCounts::default(),
        }
    }
}

/// Counts of both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectedCounts {
    /// From the subscriber.
    pub up: Counts,
    /// To the subscriber.
    pub down: Counts,
}

/// All counters at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// When they were read, in ns of CLOCK_MONOTONIC: the difference of two gives rates.
    pub at_ns: u64,
    /// By allocation.
    pub allocations: BTreeMap<AllocationId, DirectedCounts>,
    /// By provider.
    pub providers: BTreeMap<Name, DirectedCounts>,
    /// Packets by what became of them ([`qos_common::abi::Outcome`], snake case).
    pub outcomes: BTreeMap<String, u64>,
    /// The classifier.
    #[serde(default)]
    pub classifier: ClassifierStatistics,
}

/// What the classifier is made of, and what it has cost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassifierStatistics {
    /// Rules: a selector has one for each direction and family that it covers.
    pub rules: u32,
    /// How many it takes.
    pub rules_most: u32,
    /// Memory of its maps, in bytes.
    pub memory_bytes: u64,
    /// Most rules that one packet may be compared with.
    pub worst_case_comparisons: u32,
    /// What that may be: `max_checks` of the configuration.
    pub max_checks: u32,
    /// Look-ups of packets in it.
    pub look_ups: u64,
    /// Tables that they looked into.
    pub tables: u64,
    /// Forks that they followed.
    pub forks: u64,
    /// Rules that they compared.
    pub comparisons: u64,
    /// Where rules are, by direction and family; those that have any.
    pub sets: Vec<RuleSetStatistics>,
}

/// The rules of one direction and family.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleSetStatistics {
    /// `up` or `down`.
    pub direction: String,
    /// `ipv4` or `ipv6`.
    pub family: String,
    /// Tables that hash addresses: one line of the cache each, for a packet.
    pub hash_tables: u32,
    /// Rules in them.
    pub hashed_rules: u32,
    /// Trees, for rules that no hash table holds: each packet goes through them, fork by fork.
    pub trees: u32,
    /// Rules in them.
    pub tree_rules: u32,
    /// Longest list of rules at the end of a hash, with the number of lists as long.
    pub longest_hashed: (u32, u32),
    /// Longest list at the end of a tree's forks, likewise.
    pub longest_in_trees: (u32, u32),
    /// Most rules that one of its packets may be compared with.
    pub worst_case_comparisons: u32,
}

/// One interface of the gateway as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStatus {
    /// Its name.
    pub name: String,
    /// `lan` or `wan`.
    pub role: String,
    /// Its capacity.
    pub capacity: BitsPerSecond,
    /// Its index; none: it does not exist now.
    pub index: Option<u32>,
    /// What its packets begin with: `ethernet`, or `layer3` for the IP header.
    pub framing: Option<String>,
    /// Where what comes in is judged: `xdp`, `tc` ingress, or `egress`, where it goes out; `none`.
    pub judged: String,
    /// Why there; none where nothing is attached.
    pub why: Option<Why>,
    /// How XDP is attached: `native` or `generic`; `unused` where something else judges; `none`.
    pub xdp: String,
    /// How the tc programs are attached: `tcx`, `clsact` or `none`.
    pub tc: String,
    /// Scheduler at egress: `htb` or `none`.
    pub scheduler: String,
    /// Classes that the scheduler keeps for allocations and lines.
    pub classes: usize,
}

/// Why what comes in by an interface is judged where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Why {
    /// The driver runs XDP.
    Best,
    /// The configuration says so.
    Configured,
    /// The driver refused the program.
    Refused {
        /// The kernel's error number, where it gave one.
        errno: Option<i32>,
    },
    /// Its packets begin with their IP header: XDP has no hook there.
    NoEthernet,
    /// Somebody else's XDP program has the hook.
    Foreign {
        /// Its number, as `bpftool prog` shows it.
        id: u32,
    },
    /// Its packets have the addresses of NAT until they leave by the other side.
    Nat,
}

/// Something that was not as it should be, and was repaired.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairReport {
    /// When.
    pub at: jiff::Timestamp,
    /// What was wrong.
    pub what: String,
}

/// The gateway as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayStatus {
    /// `enforce` or `observe`.
    pub mode: String,
    /// Version of the maps' layout.
    pub abi: u32,
    /// Release of the kernel.
    pub kernel: String,
    /// The programs were taken over from an earlier instance, not attached afresh.
    pub taken_over: bool,
    /// Its interfaces.
    pub interfaces: Vec<InterfaceStatus>,
    /// Rules in the classifier, and how many it takes.
    pub rules: (u32, u32),
    /// Most rules that one packet may be compared with.
    pub worst_case_comparisons: u32,
    /// Allocations in the kernel, and how many it takes.
    pub allocations: (u32, u32),
    /// The last things that were repaired, newest last.
    pub repairs: Vec<RepairReport>,
}

/// Why a packet is treated as it is, by the loaded program itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// What would become of it now ([`qos_common::abi::Outcome`], snake case).
    pub outcome: String,
    /// The allocation that matched.
    pub allocation: Option<AllocationId>,
    /// The index of its selector that matched.
    pub selector: Option<u32>,
    /// Within the guaranteed capacity now.
    pub in_profile: bool,
    /// Bytes that would be charged.
    pub charged: u32,
    /// Class at egress as `tc` prints it, `5150:4001`; none: the packet passes by all classes.
    pub class: Option<String>,
    /// What the program read: `up`/`down`, addresses, protocol, ports, code point, length.
    pub direction: String,
    /// Source address; none: the packet could not be read.
    pub source: Option<std::net::IpAddr>,
    /// Destination address.
    pub destination: Option<std::net::IpAddr>,
    /// IP protocol number.
    pub protocol: Option<u8>,
    /// Source port.
    pub source_port: Option<u16>,
    /// Destination port.
    pub destination_port: Option<u16>,
    /// Code point.
    pub dscp: Option<u8>,
    /// IP length in bytes.
    pub length: Option<u16>,
    /// Ports or protocol could not be seen: a later fragment, or too long a header chain.
    pub fragment: bool,
    /// Tables that were looked into.
    pub tables: u32,
    /// Forks followed in them.
    pub forks: u32,
    /// Rules that were compared.
    pub rules: u32,
    /// Rules that matched and were passed over, their allocation having expired.
    pub expired: u32,
    /// The way through the classifier, a line for each table that was looked into.
    #[serde(default)]
    pub way: Vec<String>,
}
