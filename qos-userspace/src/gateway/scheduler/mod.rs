//! Egress scheduling: what the tree of one interface is, and the trait of what builds it.
//!
//! The tree is declared, never commanded: the gateway says what must be there, the scheduler finds
//! the difference and touches nothing else. [`htb`] builds it from the kernel's HTB classes.

use std::collections::BTreeMap;

use crate::domain::units::{BitsPerSecond, ByteCount};
use qos_common::length::LinkLayer;

pub mod htb;

/// Place of an allocation among the class numbers, 1..16,384. Those that need no class have none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClassSlot(pub u16);

/// Slot of a line, 1..=10,240. A slot keeps its class numbers for as long as the line exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LineSlot(pub u16);

/// What is to be sent into one interface: link → lines → allocations and each line's rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Capacity of the interface: rate and ceiling of the whole tree.
    pub link: BitsPerSecond,
    /// What the default class is sure of.
    pub rest: BitsPerSecond,
    /// Largest IP packet of the interface, in bytes.
    pub mtu: u32,
    /// Lines, by slot, in ascending order, each slot once.
    pub lines: Vec<LineClass>,
    /// Allocations with a class of their own, by its place, in ascending order, each once.
    pub leaves: Vec<Leaf>,
}

impl Tree {
    /// Whether there is nothing to order: no line, and no allocation with a class.
    #[must_use]
    pub fn is_bare(&self) -> bool {
        self.lines.is_empty() && self.leaves.is_empty()
    }
}

/// What a tree has otherwise than the one declared before, by slot; none: it has not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Lines, those of the allocations below among them.
    pub lines: BTreeMap<LineSlot, Option<LineClass>>,
    /// Allocations.
    pub leaves: BTreeMap<ClassSlot, Option<Leaf>>,
}

impl Part {
    /// Whether there is no difference.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.leaves.is_empty()
    }

    /// Puts its entries into a tree and takes those out that were there.
    pub fn exchange(&mut self, tree: &mut Tree) {
        for (slot, entry) in &mut self.lines {
            let place = tree.lines.binary_search_by_key(slot, |line| line.slot);
            exchange(&mut tree.lines, place, entry);
        }
        for (slot, entry) in &mut self.leaves {
            let place = tree.leaves.binary_search_by_key(slot, |leaf| leaf.slot);
            exchange(&mut tree.leaves, place, entry);
        }
    }
}

fn exchange<T>(list: &mut Vec<T>, place: Result<usize, usize>, entry: &mut Option<T>) {
    match (place, entry.take()) {
        (Ok(place), Some(new)) => *entry = Some(std::mem::replace(&mut list[place], new)),
        (Ok(place), None) => *entry = Some(list.remove(place)),
        (Err(place), Some(new)) => list.insert(place, new),
        (Err(_), None) => {}
    }
}

/// A line: one class, or, where it is divided, an inner class and a leaf for all its traffic that no
/// allocation has a class for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineClass {
    /// Slot of the line.
    pub slot: LineSlot,
    /// What the line is sure of: its guarantees and its rest's minimum.
    pub rate: BitsPerSecond,
    /// What its rest is sure of.
    pub rest: BitsPerSecond,
    /// The line's speed, which nothing sent into it exceeds.
    pub ceil: BitsPerSecond,
    /// How the line frames packets.
    pub link_layer: LinkLayer,
    /// Bytes above the IP length that a packet takes on the line.
    pub overhead: i16,
    /// Whether there may be allocations on it.
    pub divided: bool,
}

/// An allocation's class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Its place among the class numbers.
    pub slot: ClassSlot,
    /// The line it is sent into; none: the allocation stands beside the lines, under the link.
    pub line: Option<LineSlot>,
    /// Guaranteed capacity; none: the smallest that the scheduler takes.
    pub guaranteed: Option<BitsPerSecond>,
    /// Maximum capacity; none: the line's or link's.
    pub maximum: Option<BitsPerSecond>,
    /// 0 is served first, 7 last; the rest comes after all of them.
    pub priority: u8,
    /// Most bytes that may wait; none: a few milliseconds at the class's rate.
    pub queue: Option<ByteCount>,
}

/// Difference between the tree that was declared and the one in the kernel, repaired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drift {
    /// What was wrong, with class numbers as `tc` prints them.
    pub what: String,
}

/// Counters of one class, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassStatistics {
    /// Packets sent.
    pub packets: u64,
    /// Bytes sent, with link-layer headers.
    pub bytes: u64,
    /// Packets dropped because the queue was full.
    pub drops: u64,
    /// Bytes waiting now.
    pub backlog: u64,
}

/// Why the kernel does not have the tree that was declared.
#[derive(Debug, thiserror::Error)]
pub enum SchedulerError {
    /// The netlink socket could not be opened or used.
    #[error("netlink socket: {0}")]
    Socket(#[from] std::io::Error),
    /// The kernel refused a request.
    #[error("{interface}: {action}: {reason}")]
    Refused {
        /// Interface by name.
        interface: String,
        /// What was asked, with class numbers as `tc` prints them.
        action: String,
        /// The kernel's own words, or the error's name.
        reason: String,
        /// The error number, positive.
        errno: i32,
    },
    /// The kernel lacks a queueing discipline.
    #[error("{interface}: this kernel has no `{kind}` queueing discipline (module sch_{kind}); {advice}")]
    NoSuchDiscipline {
        /// Interface by name.
        interface: String,
        /// Name of the discipline.
        kind: &'static str,
        /// What to do about it.
        advice: &'static str,
    },
    /// The tree contradicts itself; nothing was sent.
    #[error("{interface}: {what}")]
    Invalid {
        /// Interface by name.
        interface: String,
        /// What is wrong, with the slot and the value.
        what: String,
    },
    /// Somebody else's queueing discipline is on the interface. It is left alone.
    #[error(
        "{interface}: the root queueing discipline is {kind} {handle}, which is not ours; \
         remove it with `tc qdisc del dev {interface} root`"
    )]
    ForeignRoot {
        /// Interface by name.
        interface: String,
        /// Its kind.
        kind: String,
        /// Its handle as `tc` prints it.
        handle: String,
    },
    /// The interface is gone.
    #[error("interface {interface} does not exist")]
    NoSuchInterface {
        /// Interface by name.
        interface: String,
    },
    /// An answer could not be understood.
    #[error("{interface}: the kernel's answer to {action} could not be read: {reason}")]
    Malformed {
        /// Interface by name.
        interface: String,
        /// What was asked.
        action: String,
        /// What was wrong with it.
        reason: String,
    },
}

/// Builds and keeps the tree of one interface.
///
/// Class numbers follow from slots alone ([`Scheduler::rest_class`], [`Scheduler::leaf_class`]), so
/// that a restarted daemon and the kernel programs agree on them without asking.
pub trait Scheduler: Send {
    /// Makes the kernel's tree equal to `tree`, touching only what differs from the tree declared
    /// last. The first call takes over a tree that an earlier instance left.
    ///
    /// # Errors
    /// Where the kernel refuses a step, every step of this call that was made is undone as far as
    /// the kernel lets it, and the tree declared last stays the one that is compared with.
    fn apply(&mut self, tree: &Tree) -> Result<(), SchedulerError>;

    /// The same where `tree` differs from the one declared last in nothing but the slots of `part`:
    /// asks the kernel for no more than that.
    ///
    /// # Errors
    /// As [`Scheduler::apply`].
    fn apply_part(&mut self, tree: &Tree, part: &Part) -> Result<(), SchedulerError>;

    /// Compares the kernel's tree with the one declared last and repairs what differs.
    ///
    /// # Errors
    /// Where the kernel can't be asked, or refuses the repair.
    fn repair(&mut self) -> Result<Vec<Drift>, SchedulerError>;

    /// Counters of the classes of allocations that have one.
    ///
    /// # Errors
    /// Where the kernel can't be asked.
    fn statistics(&self) -> Result<Vec<(ClassSlot, ClassStatistics)>, SchedulerError>;

    /// Removes everything this scheduler made and leaves the interface as it was found.
    ///
    /// # Errors
    /// Where the kernel refuses.
    fn detach(&mut self) -> Result<(), SchedulerError>;

    /// `skb->priority` of traffic on no known line.
    fn default_class(&self) -> u32;

    /// `skb->priority` of traffic that passes by all classes, while there is nothing to order.
    fn direct_class(&self) -> u32;

    /// `skb->priority` of the rest of a line, divided or not. Behind an [`Scheduler::apply`] that divides it
    /// both are there until [`Scheduler::repair`], which removes the former when it is empty.
    fn rest_class(&self, line: LineSlot, divided: bool) -> u32;

    /// `skb->priority` of the class of an allocation on a line, or on none.
    fn leaf_class(&self, slot: ClassSlot, line: Option<LineSlot>) -> u32;
}
