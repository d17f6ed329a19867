//! The HTB classes that a [`Tree`] comes to: numbers, rates, bursts, priorities, queues. Pure.
//!
//! ```text
//! 5150:         root qdisc, default 5150:2
//! └ 5150:1      link: rate = ceil = capacity
//!   ├ 5150:2    default: what is on no line
//!   ├ leaf      line n, undivided, 0x2000 + n: rate = rest's minimum, ceil = its speed
//!   ├ inner     line n, divided, 0x10 + 2n: rate = guarantees + rest's minimum, ceil = its speed
//!   │ ├ leaf    its rest, 0x11 + 2n
//!   │ └ leaf    allocation m, 0x4000 + m: rate = guaranteed, ceil = maximum
//!   ├ leaf      allocation on no line
//!   └ leaf      group g of further lines, 0x3000 + g: rate = those of its lines, ceil = capacity
//!     └ M:      HTB of the group, which is as the root's: M:1, M:2, lines, their allocations
//! ```
//!
//! **Groups.** What a class costs to make grows with the classes that its HTB has, so each holds 1,024
//! lines (docs/adr/0011). The first of them are in the root; the n-th line of group g has the numbers
//! of line n, under the group's major number. Where there are no more lines there are no groups.
//!
//! **Division.** A line is one class until the first of its allocations has one (docs/adr/0015). From then
//! on it stays divided: what its rest had in the one class has moved, and would have to move back.
//!
//! **Priority.** HTB serves classes within their rate before those that borrow, and at either by one
//! of 8 priorities, equal ones in turn. The rest takes the last for itself, so that all excess of
//! allocations comes before it; that leaves 7 for 8 levels, and priorities 6 and 7 share one.
//!
//! **Length.** HTB charges the packet's length on the interface, which starts with the Ethernet
//! header where there is one, plus an overhead that can't be negative. So a line's overhead less that
//! header is what HTB adds; a line whose overhead is smaller is charged the difference too much. ATM
//! cells HTB rounds itself. PTM it does not know: rates are scaled by 64/65.

use std::collections::HashSet;
use std::fmt;
use std::sync::LazyLock;

use qos_common::abi::LINE_SLOTS;
use qos_common::length::{ETHERNET_OVERHEAD, LinkLayer, charged};

use crate::domain::units::BitsPerSecond;
use crate::gateway::scheduler::{ClassSlot, LineClass, LineSlot, Part, Tree};
use crate::manager::CLASS_SLOTS;
use crate::manager::capacity::{UNGUARANTEED_RATE, class_burst};

/// Major number of our root, of all its classes, and by which it is known as ours.
pub(super) const ROOT: u16 = 0x5150;
pub(super) const LINK: u16 = 1;
pub(super) const DEFAULT: u16 = 2;
const FIRST_LINE: u16 = 0x10;
const FIRST_UNDIVIDED: u16 = 0x2000;
/// Class of group 0, were there one.
pub(super) const FIRST_GROUP: u16 = 0x3000;
const FIRST_LEAF: u16 = 0x4000;
const LAST_LINE_SLOT: u16 = GROUP_LINES * (LAST_GROUP + 1);
const _: () = assert!(LAST_LINE_SLOT as u32 + 1 == LINE_SLOTS);
const LAST_LEAF_SLOT: u16 = 0x3fff;
const _: () = assert!(LAST_LEAF_SLOT as u32 + 1 == CLASS_SLOTS);

/// Lines of one group.
const GROUP_LINES: u16 = 1_024;
pub(super) const LAST_GROUP: u16 = 9;
/// From one group's major number to the next one's. The kernel keeps an interface's qdiscs in 16
/// lists (`qdisc_hash`) and walks one for each class that is not the root's: with this step all groups
/// are in the root's list, and [`queue_handle`] keeps the queues out of it.
pub(super) const GROUP_STEP: u16 = 469;

/// Bytes that equal classes send in turn. Not below the largest super-packet (64 KiB and the headers
/// of its segments): HTB takes a packet's length from the class's deficit, adds one quantum and never
/// looks at the deficit before it sends, so smaller quanta let it fall to −2 GiB, wrap, and give one
/// class 2 GiB in a row (seen on 6.18; `htb_dequeue_tree` in net/sched/sch_htb.c).
const QUANTUM: u32 = 70_000;

/// Priority of rest and default, HTB's last (`TC_HTB_NUMPRIO` is 8).
const LAST_PRIORITY: u32 = 7;

/// HTB's levels: leaves, then from the root downwards (`TC_HTB_MAXDEPTH` is 8).
const LEAF_LEVEL: u8 = 0;
const LINE_LEVEL: u8 = 6;
const LINK_LEVEL: u8 = 7;

/// What may wait in a byte-bounded FIFO, as time at the class's ceiling.
const FIFO_NS: u64 = 10_000_000;
/// A TCP sender's initial window (RFC 6928): a FIFO takes so many full packets …
const INITIAL_WINDOW: u64 = 10;
/// … unless they take longer than this …
const INITIAL_WINDOW_NS: u64 = 100_000_000;
/// … but so many in any case, or fast retransmit never sees its three duplicates.
const FEWEST_PACKETS: u64 = 4;

/// CoDel's target and interval where packets are short in time (RFC 8289, section 4.2).
const CODEL_TARGET_US: u64 = 5_000;
const CODEL_INTERVAL_US: u64 = 100_000;
/// fq_codel's hard limit, as time at the ceiling; CoDel keeps responsive traffic far below.
const FQ_CODEL_NS: u64 = 50_000_000;
/// Flow queues of a leaf, some 70 bytes each, whether used or not, in thousands of leaves; the
/// default class is one and has many subscribers' flows.
const FQ_CODEL_FLOWS: u32 = 128;
const FQ_CODEL_DEFAULT_FLOWS: u32 = 1_024;
/// The most that fq_codel takes as its memory limit.
const FQ_CODEL_MEMORY: u64 = 1 << 31;
/// Memory of a packet buffer over the packet's length, at worst some two for full packets.
const MEMORY_PER_BYTE: u64 = 2;

/// Discipline of the leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Fifo,
    FqCodel,
}

/// Which class it is. In order, parents come before children and the root's classes before groups'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Id {
    /// 0: the root's.
    pub(super) group: u16,
    pub(super) minor: u16,
}

/// One class as HTB has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Class {
    pub(super) id: Id,
    /// Minor of the parent, which is of the same group; 0: that group's HTB.
    pub(super) parent: u16,
    /// 0 for leaves. Follows from the children that a class has.
    pub(super) level: u8,
    /// Bytes a second.
    pub(super) rate: u64,
    /// Bytes a second.
    pub(super) ceil: u64,
    pub(super) atm: bool,
    pub(super) overhead: u16,
    /// Smallest length that is charged.
    pub(super) mpu: u16,
    /// Burst at `rate`, in ticks of 64 ns.
    pub(super) buffer: u32,
    /// Burst at `ceil`, in ticks of 64 ns.
    pub(super) cbuffer: u32,
    pub(super) quantum: u32,
    pub(super) priority: u32,
    /// Queue of a leaf; none: an inner class, or a leaf with the kernel's own queue.
    pub(super) queue: Option<Queue>,
}

/// Queue of a leaf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Queue {
    /// Major number.
    pub(super) handle: u16,
    pub(super) discipline: Discipline,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Discipline {
    /// Limit in bytes.
    Fifo { limit: u32 },
    /// Limits in packets and bytes of memory, times in µs as the kernel gives them back.
    FqCodel { limit: u32, memory: u32, target: u32, interval: u32, flows: u32 },
    /// HTB of a group.
    Group,
    /// Not ours, by its name.
    Foreign(Box<str>),
}

impl Class {
    pub(super) fn is_leaf(&self) -> bool {
        self.level == LEAF_LEVEL
    }

    /// Whether it is the class of an allocation.
    pub(super) fn allocation(&self) -> Option<ClassSlot> {
        let minor = self.id.minor;
        (minor > FIRST_LEAF && minor <= FIRST_LEAF + LAST_LEAF_SLOT).then(|| ClassSlot(minor - FIRST_LEAF))
    }

    /// The line that it is all of; none: it is something else.
    pub(super) fn undivided(&self) -> Option<LineSlot> {
        let Id { group, minor } = self.id;
        self.id.is_undivided().then(|| LineSlot(group * GROUP_LINES + minor - FIRST_UNDIVIDED))
    }

    /// The divided line that it is the inner class of; none: it is something else.
    pub(super) fn divided(&self) -> Option<LineSlot> {
        let Id { group, minor } = self.id;
        let number = minor.checked_sub(FIRST_LINE)? / 2;
        let is_line = minor % 2 == 0 && (1..=GROUP_LINES).contains(&number);
        is_line.then(|| LineSlot(group * GROUP_LINES + number))
    }

    /// The class that it hangs on; none: it is the root's first.
    pub(super) fn parent(&self) -> Option<Id> {
        match self.id.group {
            0 => (self.parent != 0).then(|| Id::root(self.parent)),
            group if self.parent == 0 => Some(Id::root(FIRST_GROUP + group)),
            group => Some(Id { group, minor: self.parent }),
        }
    }

    /// How far it is above the leaves: children have less than their parents.
    pub(super) fn height(&self) -> u8 {
        match self.parent() {
            None => LINK_LEVEL + 2,
            Some(_) if self.is_group() => LINK_LEVEL + 1,
            Some(_) => self.level,
        }
    }

    /// Whether it is the class of a group.
    pub(super) fn is_group(&self) -> bool {
        self.id.group == 0 && (FIRST_GROUP + 1..=FIRST_GROUP + LAST_GROUP).contains(&self.id.minor)
    }

    /// The same class without its guarantee, so that another may have it while this one empties.
    pub(super) fn without_guarantee(&self) -> Self {
        let rate = bytes_per_second(UNGUARANTEED_RATE).min(self.rate);
        let scale =
            |ticks: u32| (u64::from(ticks) * self.rate.div_ceil(rate)).min(u64::from(u32::MAX)) as u32;
        Self { rate, buffer: scale(self.buffer), ..self.clone() }
    }

    /// Whether the kernel's class `other` has our parameters, as far as the kernel keeps them: an
    /// inner class has no quantum and no priority, and its level and queue follow from its children.
    pub(super) fn same_parameters(&self, other: &Self) -> bool {
        let leaves = self.is_leaf() && other.is_leaf();
        (self.rate, self.ceil, self.atm, self.overhead, self.mpu, self.buffer, self.cbuffer)
            == (other.rate, other.ceil, other.atm, other.overhead, other.mpu, other.buffer, other.cbuffer)
            && (!leaves || (self.quantum, self.priority) == (other.quantum, other.priority))
    }
}

impl Id {
    /// A class of the root.
    pub(super) const fn root(minor: u16) -> Self {
        Self { group: 0, minor }
    }

    /// The inner class of a line.
    pub(super) const fn line(slot: LineSlot) -> Self {
        let number = slot.0.wrapping_sub(1) % GROUP_LINES + 1;
        Self { group: group(slot), minor: FIRST_LINE + 2 * number }
    }

    /// The rest of a line.
    pub(super) const fn rest(slot: LineSlot) -> Self {
        let Self { group, minor } = Self::line(slot);
        Self { group, minor: minor + 1 }
    }

    /// The class of a line that is not divided.
    pub(super) const fn undivided(slot: LineSlot) -> Self {
        Self { group: group(slot), minor: FIRST_UNDIVIDED + slot.0.wrapping_sub(1) % GROUP_LINES + 1 }
    }

    pub(super) fn is_undivided(self) -> bool {
        (FIRST_UNDIVIDED + 1..=FIRST_UNDIVIDED + GROUP_LINES).contains(&self.minor)
    }

    /// An allocation on a line, or on none.
    pub(super) fn leaf(slot: ClassSlot, line: Option<LineSlot>) -> Self {
        Self { group: line.map_or(0, group), minor: FIRST_LEAF.wrapping_add(slot.0) }
    }

    /// The class that a handle names; none: it is not ours.
    pub(super) fn of_handle(handle: u32) -> Option<Self> {
        let above = ((handle >> 16) as u16).checked_sub(ROOT)?;
        let ours = above % GROUP_STEP == 0 && above / GROUP_STEP <= LAST_GROUP;
        ours.then_some(Self { group: above / GROUP_STEP, minor: handle as u16 })
    }

    /// The handle as a number: `skb->priority` of the class.
    pub(super) const fn handle(self) -> u32 {
        (group_major(self.group) as u32) << 16 | self.minor as u32
    }
}

/// The class as `tc` prints it.
impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}:{:x}", group_major(self.group), self.minor)
    }
}

const fn group(slot: LineSlot) -> u16 {
    slot.0.wrapping_sub(1) / GROUP_LINES
}

/// Major number of a group's HTB.
pub(super) const fn group_major(group: u16) -> u16 {
    ROOT.wrapping_add(GROUP_STEP.wrapping_mul(group))
}

/// Major number of a leaf's queue, which no two share: its class's minor, or one that the root's
/// classes leave free.
fn queue_handle(id: Id) -> u16 {
    let handle = match (id.group, id.minor) {
        (group, minor @ FIRST_UNDIVIDED..FIRST_GROUP) => {
            return UNDIVIDED_QUEUES[usize::from(group * GROUP_LINES + minor - FIRST_UNDIVIDED - 1)];
        }
        (0, minor) | (_, minor @ FIRST_LEAF..) => minor,
        (group, DEFAULT) => FIRST_GROUP + group,
        (group, rest) => (group + 2) * GROUP_LINES + (rest - FIRST_LINE) / 2,
    };
    if qdisc_list(handle) == qdisc_list(ROOT) { handle ^ 0x8000 } else { handle }
}

/// Major numbers of the queues of undivided lines: those that all other queues leave free.
static UNDIVIDED_QUEUES: LazyLock<Vec<u16>> = LazyLock::new(|| {
    let rests = (1..=LAST_LINE_SLOT).map(|slot| Id::rest(LineSlot(slot)));
    let defaults = (0..=LAST_GROUP).map(|group| Id { group, minor: DEFAULT });
    let leaves = (1..=LAST_LEAF_SLOT).map(|slot| Id::leaf(ClassSlot(slot), None));
    let taken: HashSet<u16> = rests.chain(defaults).chain(leaves).map(queue_handle).collect();
    // Zero is none, and the last one is that of ingress and clsact.
    let free = (1..u16::MAX).filter(|handle| qdisc_list(*handle) != qdisc_list(ROOT));
    free.filter(|handle| !taken.contains(handle)).take(usize::from(LAST_LINE_SLOT)).collect()
});

/// Which of the kernel's 16 lists has the qdiscs of a major number (`hash_32`, include/linux/hash.h).
const fn qdisc_list(major: u16) -> u16 {
    major.wrapping_mul(0x8647) >> 12
}

/// The classes of a tree in ascending order of their numbers, or what is wrong with the tree. `header`
/// is the interface's link-layer header in bytes. With `only`, those of some lines and allocations, of
/// these lines' allocations and groups; the tree is checked as a whole all the same.
pub(super) fn classes(
    tree: &Tree,
    header: u16,
    kind: Kind,
    only: Option<&Part>,
) -> Result<Vec<Class>, String> {
    let lines = LineIndex::new(tree)?;
    check(tree, &lines)?;
    let rates = line_rates(tree, &lines)?;
    let concerns = |slot: LineSlot| only.is_none_or(|part| part.lines.contains_key(&slot));
    let link = Framing::new(LinkLayer::Ethernet, ETHERNET_OVERHEAD, header, tree.mtu);
    let leaf = |id, parent, rate: BitsPerSecond, ceil: BitsPerSecond, framing| Class {
        priority: LAST_PRIORITY,
        queue: Some(queue(id, kind, ceil, None, framing)),
        ..class(id, parent, LEAF_LEVEL, rate.min(ceil), ceil, framing)
    };

    let mut classes = Vec::with_capacity(only.map_or(2 + 2 * tree.lines.len() + tree.leaves.len(), |_| 8));
    if only.is_none() {
        classes.push(class(Id::root(LINK), 0, LINK_LEVEL, tree.link, tree.link, link));
        classes.push(leaf(Id::root(DEFAULT), LINK, tree.rest, tree.link, link));
    }
    let mut groups = [Sum::default(); LAST_GROUP as usize + 1];
    for (line, rate) in tree.lines.iter().zip(&rates) {
        let sum = &mut groups[usize::from(group(line.slot))];
        *sum = Sum { lines: sum.lines + 1, rate: sum.rate + rate.0 };
        if !concerns(line.slot) {
            continue;
        }
        let framing = Framing::of(line, header, tree.mtu);
        if line.divided {
            let inner = Id::line(line.slot);
            classes.push(class(inner, LINK, LINE_LEVEL, *rate, line.ceil, framing));
            classes.push(leaf(Id::rest(line.slot), inner.minor, line.rest, line.ceil, framing));
        } else {
            classes.push(leaf(Id::undivided(line.slot), LINK, *rate, line.ceil, framing));
        }
    }
    for (number, sum) in (0..).zip(groups).skip(1) {
        if sum.lines == 0 || !only.is_none_or(|part| part.lines.keys().any(|slot| group(*slot) == number)) {
            continue;
        }
        let id = Id::root(FIRST_GROUP + number);
        let of = |minor| Id { group: number, minor };
        classes.push(Class {
            // So that all lines have equal turns, whether they are in the root or in a group.
            quantum: QUANTUM.saturating_mul(sum.lines),
            queue: Some(Queue { handle: group_major(number), discipline: Discipline::Group }),
            ..leaf(id, LINK, BitsPerSecond(sum.rate), tree.link, link)
        });
        classes.push(class(of(LINK), 0, LINK_LEVEL, tree.link, tree.link, link));
        classes.push(leaf(of(DEFAULT), LINK, UNGUARANTEED_RATE, tree.link, link));
    }
    for allocation in &tree.leaves {
        if !only.is_none_or(|part| part.leaves.contains_key(&allocation.slot))
            && !allocation.line.is_some_and(concerns)
        {
            continue;
        }
        let line = allocation.line.and_then(|slot| lines.find(tree, slot));
        let (parent, speed, framing) = line.map_or((LINK, tree.link, link), |line| {
            (Id::line(line.slot).minor, line.ceil, Framing::of(line, header, tree.mtu))
        });
        let id = Id::leaf(allocation.slot, allocation.line);
        let ceil = allocation.maximum.unwrap_or(speed).min(speed);
        let rate = guarantee(allocation.guaranteed).unwrap_or(UNGUARANTEED_RATE).min(ceil);
        classes.push(Class {
            priority: u32::from(allocation.priority).min(LAST_PRIORITY - 1),
            queue: Some(queue(id, kind, ceil, allocation.queue.map(|bytes| bytes.0), framing)),
            ..class(id, parent, LEAF_LEVEL, rate, ceil, framing)
        });
    }
    classes.sort_unstable_by_key(|class| class.id);
    Ok(classes)
}

/// Classes that there may be of a part of a tree, except of other allocations on its lines.
pub(super) fn ids(part: &Part) -> impl Iterator<Item = Id> {
    let lines = part.lines.keys().flat_map(|slot| [Id::undivided(*slot), Id::line(*slot), Id::rest(*slot)]);
    let groups = (1..=LAST_GROUP).filter(|number| part.lines.keys().any(|slot| group(*slot) == *number));
    let groups = groups.flat_map(|group| {
        [Id::root(FIRST_GROUP + group), Id { group, minor: LINK }, Id { group, minor: DEFAULT }]
    });
    let leaves = part.leaves.keys().flat_map(|slot| {
        let Id { minor, .. } = Id::leaf(*slot, None);
        (0..=LAST_GROUP).map(move |group| Id { group, minor })
    });
    lines.chain(groups).chain(leaves)
}

/// What the lines of a group come to.
#[derive(Clone, Copy, Default)]
struct Sum {
    lines: u32,
    /// Bits a second.
    rate: u64,
}

/// Where in a tree each line is.
struct LineIndex(Vec<u16>);

impl LineIndex {
    const NONE: u16 = u16::MAX;

    /// Checks the slots of lines.
    fn new(tree: &Tree) -> Result<Self, String> {
        let mut index = vec![Self::NONE; usize::from(LAST_LINE_SLOT) + 1];
        let mut before = 0;
        for (place, line) in (0..).zip(&tree.lines) {
            let slot = line.slot.0;
            if slot == 0 || slot > LAST_LINE_SLOT {
                return Err(format!("line slot {slot} is not within 1 and {LAST_LINE_SLOT}"));
            }
            if slot <= before {
                return Err(format!("line slot {slot} is out of order or there twice"));
            }
            before = slot;
            index[usize::from(slot)] = place;
        }
        Ok(Self(index))
    }

    fn place(&self, slot: LineSlot) -> Option<usize> {
        self.0.get(usize::from(slot.0)).filter(|place| **place != Self::NONE).map(|place| usize::from(*place))
    }

    fn find<'a>(&self, tree: &'a Tree, slot: LineSlot) -> Option<&'a LineClass> {
        self.place(slot).and_then(|place| tree.lines.get(place))
    }
}

/// How HTB is told to count a packet.
#[derive(Clone, Copy)]
struct Framing {
    layer: LinkLayer,
    /// What HTB adds to the length on the interface.
    added: u16,
    /// Charge of the largest packet.
    largest: u32,
}

impl Framing {
    fn new(layer: LinkLayer, overhead: i16, header: u16, mtu: u32) -> Self {
        let added = (i32::from(overhead) - i32::from(header)).max(0) as u16;
        // What HTB will charge it, which is more than the line's own where `added` was cut off at 0.
        let counted = i32::from(header) + i32::from(added);
        Self { layer, added, largest: charged(mtu, counted.min(i16::MAX.into()) as i16, layer) }
    }

    fn of(line: &LineClass, header: u16, mtu: u32) -> Self {
        Self::new(line.link_layer, line.overhead, header, mtu)
    }
}

fn class(
    id: Id,
    parent: u16,
    level: u8,
    rate: BitsPerSecond,
    ceil: BitsPerSecond,
    framing: Framing,
) -> Class {
    let bytes = |rate: BitsPerSecond| {
        let bytes = bytes_per_second(rate);
        // 64 bytes of payload take 65 on the line; the largest rates stay below 2^56.
        if framing.layer == LinkLayer::Ptm { (bytes * 64 / 65).max(1) } else { bytes }
    };
    let ticks = |rate| {
        let nanoseconds = u128::from(class_burst(rate, framing.largest)) * 1_000_000_000
            / u128::from(bytes_per_second(rate));
        nanoseconds.div_ceil(64).min(u128::from(u32::MAX)) as u32
    };
    Class {
        id,
        parent,
        level,
        rate: bytes(rate),
        ceil: bytes(ceil),
        atm: framing.layer == LinkLayer::Atm,
        overhead: framing.added,
        mpu: 0,
        buffer: ticks(rate),
        cbuffer: ticks(ceil),
        quantum: QUANTUM.max(framing.largest),
        priority: 0,
        queue: None,
    }
}

/// The queue of a leaf whose ceiling is `ceil`; `bytes` overrides how much may wait.
fn queue(id: Id, kind: Kind, ceil: BitsPerSecond, bytes: Option<u64>, framing: Framing) -> Queue {
    let packet = u64::from(framing.largest);
    let limit = |ns| {
        bytes.unwrap_or_else(|| {
            let window = (INITIAL_WINDOW * packet).min(ceil.bytes_in(INITIAL_WINDOW_NS));
            ceil.bytes_in(ns).max(window).max(FEWEST_PACKETS * packet)
        })
    };
    let discipline = match kind {
        Kind::Fifo => Discipline::Fifo { limit: saturate(limit(FIFO_NS).max(packet)) },
        Kind::FqCodel => {
            let limit = limit(FQ_CODEL_NS).max(packet);
            // A target below the time of one packet and a half would drop from a queue of one.
            let target = CODEL_TARGET_US.max(ceil.time_of(packet * 3 / 2) / 1_000);
            let interval = CODEL_INTERVAL_US.max(target * (CODEL_INTERVAL_US / CODEL_TARGET_US));
            Discipline::FqCodel {
                limit: saturate(limit.div_ceil(packet)),
                memory: saturate((limit * MEMORY_PER_BYTE).min(FQ_CODEL_MEMORY)),
                target: codel_time(target),
                interval: codel_time(interval),
                flows: if id.minor == DEFAULT { FQ_CODEL_DEFAULT_FLOWS } else { FQ_CODEL_FLOWS },
            }
        }
    };
    Queue { handle: queue_handle(id), discipline }
}

/// The µs that the kernel gives back when it was told so many: CoDel keeps units of 1,024 ns.
fn codel_time(microseconds: u64) -> u32 {
    let kept = saturate(microseconds.saturating_mul(1_000) >> 10);
    // Half the range: the kernel compares these times as signed numbers.
    saturate((u64::from(kept.min(u32::MAX / 2)) << 10) / 1_000)
}

fn saturate(value: u64) -> u32 {
    value.min(u64::from(u32::MAX)) as u32
}

fn bytes_per_second(rate: BitsPerSecond) -> u64 {
    (rate.0 / 8).max(1)
}

fn guarantee(guaranteed: Option<BitsPerSecond>) -> Option<BitsPerSecond> {
    guaranteed.filter(|rate| rate.0 > 0)
}

/// What each line is sure of: as declared, but not less than its leaves' guarantees and its rest.
fn line_rates(tree: &Tree, lines: &LineIndex) -> Result<Vec<BitsPerSecond>, String> {
    let mut guarantees = vec![0_u64; tree.lines.len()];
    let mut total = tree.rest.0;
    for leaf in &tree.leaves {
        let guaranteed = guarantee(leaf.guaranteed).unwrap_or_default().0;
        match leaf.line {
            None => total = total.saturating_add(guaranteed),
            Some(slot) => {
                if let Some(index) = lines.place(slot) {
                    guarantees[index] = guarantees[index].saturating_add(guaranteed);
                }
            }
        }
    }
    let mut rates = Vec::with_capacity(tree.lines.len());
    for (line, guaranteed) in tree.lines.iter().zip(guarantees) {
        if guaranteed > line.ceil.0 {
            let guaranteed = BitsPerSecond(guaranteed);
            return Err(format!(
                "line slot {}: guarantees of {guaranteed} exceed its ceiling of {}",
                line.slot.0, line.ceil
            ));
        }
        let rate = line.rate.0.max(guaranteed.saturating_add(line.rest.0)).min(line.ceil.0);
        total = total.saturating_add(rate);
        rates.push(BitsPerSecond(rate));
    }
    if total > tree.link.0 {
        let total = BitsPerSecond(total);
        return Err(format!("guarantees and lines' rests of {total} exceed the link's {}", tree.link));
    }
    Ok(rates)
}

/// What can be said of each field alone.
fn check(tree: &Tree, lines: &LineIndex) -> Result<(), String> {
    let too_slow = |rate: BitsPerSecond| rate.0 < 8;
    if too_slow(tree.link) {
        return Err(format!("link capacity {} is below 8 bit/s", tree.link));
    }
    if tree.mtu == 0 {
        return Err("largest packet is 0 bytes".to_owned());
    }
    for line in &tree.lines {
        let slot = line.slot.0;
        if too_slow(line.ceil) {
            return Err(format!("line slot {slot}: ceiling {} is below 8 bit/s", line.ceil));
        }
        if line.rate > line.ceil {
            return Err(format!("line slot {slot}: rate {} exceeds its ceiling of {}", line.rate, line.ceil));
        }
    }
    for (index, leaf) in tree.leaves.iter().enumerate() {
        let slot = leaf.slot.0;
        if slot == 0 || slot > LAST_LEAF_SLOT {
            return Err(format!("class slot {slot} is not within 1 and {LAST_LEAF_SLOT}"));
        }
        if index > 0 && tree.leaves[index - 1].slot >= leaf.slot {
            return Err(format!("class slot {slot} is out of order or there twice"));
        }
        if let Some(line) = leaf.line {
            let Some(found) = lines.find(tree, line) else {
                return Err(format!("class slot {slot}: there is no line slot {}", line.0));
            };
            if !found.divided {
                return Err(format!("class slot {slot}: line slot {} is not divided", line.0));
            }
        }
        if leaf.priority > 7 {
            return Err(format!("class slot {slot}: priority {} is above 7", leaf.priority));
        }
        if let Some(maximum) = leaf.maximum {
            if too_slow(maximum) {
                return Err(format!("class slot {slot}: maximum {maximum} is below 8 bit/s"));
            }
            if let Some(guaranteed) = leaf.guaranteed
                && guaranteed > maximum
            {
                return Err(format!("class slot {slot}: guaranteed {guaranteed} exceeds maximum {maximum}"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::units::ByteCount;
    use crate::gateway::scheduler::Leaf;
    use crate::manager::capacity::SMALLEST_REST;

    const MEGABIT: u64 = 1_000_000;

    fn line(slot: u16) -> LineClass {
        LineClass {
            slot: LineSlot(slot),
            rate: BitsPerSecond(6 * MEGABIT),
            rest: SMALLEST_REST,
            ceil: BitsPerSecond(20 * MEGABIT),
            link_layer: LinkLayer::Ethernet,
            overhead: ETHERNET_OVERHEAD,
            divided: true,
        }
    }

    fn leaf(slot: u16, line: Option<u16>) -> Leaf {
        Leaf {
            slot: ClassSlot(slot),
            line: line.map(LineSlot),
            guaranteed: Some(BitsPerSecond(5 * MEGABIT)),
            maximum: Some(BitsPerSecond(10 * MEGABIT)),
            priority: 0,
            queue: None,
        }
    }

    fn tree() -> Tree {
        Tree {
            link: BitsPerSecond(1_000 * MEGABIT),
            rest: SMALLEST_REST,
            mtu: 1_500,
            lines: vec![line(1), line(1_024)],
            leaves: vec![leaf(1, Some(1)), leaf(2, None), leaf(16_383, Some(1_024))],
        }
    }

    fn fifo_limit(class: &Class) -> u32 {
        match class.queue.as_ref().expect("a leaf has a queue").discipline {
            Discipline::Fifo { limit } => limit,
            ref other => panic!("{other:?}"),
        }
    }

    #[test]
    fn numbers_and_parents() {
        let classes = classes(&tree(), 14, Kind::Fifo, None).expect("valid");
        let found: Vec<_> = classes.iter().map(|class| (class.id.minor, class.parent, class.level)).collect();
        let expected = [
            (1, 0, 7),
            (2, 1, 0),
            (0x12, 1, 6),
            (0x13, 0x12, 0),
            (0x810, 1, 6),
            (0x811, 0x810, 0),
            (0x4001, 0x12, 0),
            (0x4002, 1, 0),
            (0x7fff, 0x810, 0),
        ];
        assert_eq!(found, expected);
        assert!(classes.iter().all(|class| class.id.group == 0));
        let allocation = Id::root(0x4001);
        assert_eq!((allocation.handle(), allocation.to_string().as_str()), (0x5150_4001, "5150:4001"));
    }

    #[test]
    fn a_line_that_is_not_divided_is_one_class() {
        let mut tree = tree();
        tree.lines.extend([1_025, 10_240].map(|slot| LineClass { divided: false, ..line(slot) }));
        tree.lines[1].divided = false;
        tree.leaves.truncate(2);
        let all = classes(&tree, 14, Kind::Fifo, None).expect("valid");
        let found: Vec<_> = all
            .iter()
            .filter_map(|class| Some((class.undivided()?.0, class.id.to_string(), class.parent, class.level)))
            .collect();
        let expected = [(1_024, "5150:2400"), (1_025, "5325:2001"), (10_240, "61cd:2400")]
            .map(|(slot, id)| (slot, id.to_owned(), 1, 0));
        assert_eq!(found, expected);
        let (line, class) =
            (&tree.lines[1], all.iter().find(|class| class.undivided().is_some()).expect("is there"));
        assert_eq!(
            (class.rate * 8, class.ceil * 8, class.priority),
            (line.rate.0, line.ceil.0, LAST_PRIORITY)
        );
        let divided: Vec<_> = all.iter().filter_map(Class::divided).collect();
        assert_eq!(divided, [LineSlot(1)]);
    }

    #[test]
    fn lines_above_1024_are_in_groups() {
        let mut tree = tree();
        tree.lines.extend([line(1_025), line(2_048), line(2_049)]);
        tree.leaves[1].line = Some(LineSlot(1_025));
        let classes = classes(&tree, 14, Kind::Fifo, None).expect("valid");
        let found: Vec<_> = classes
            .iter()
            .filter(|class| class.is_group() || class.id.group > 0)
            .map(|class| (class.id.to_string(), class.parent().expect("has one").to_string(), class.level))
            .collect();
        let expected = [
            ("5150:3001", "5150:1", 0),
            ("5150:3002", "5150:1", 0),
            ("5325:1", "5150:3001", 7),
            ("5325:2", "5325:1", 0),
            ("5325:12", "5325:1", 6),
            ("5325:13", "5325:12", 0),
            ("5325:810", "5325:1", 6),
            ("5325:811", "5325:810", 0),
            ("5325:4002", "5325:12", 0),
            ("54fa:1", "5150:3002", 7),
            ("54fa:2", "54fa:1", 0),
            ("54fa:12", "54fa:1", 6),
            ("54fa:13", "54fa:12", 0),
        ];
        assert_eq!(found, expected.map(|(id, parent, level)| (id.to_owned(), parent.to_owned(), level)));
        // Each group is sure of what its lines are, and has a turn for each of them.
        let groups: Vec<_> = classes.iter().filter(|class| class.is_group()).collect();
        assert_eq!([groups[0].rate, groups[1].rate], [2 * 750_000, 750_000]);
        assert_eq!([groups[0].quantum, groups[1].quantum], [2 * QUANTUM, QUANTUM]);
        for class in groups {
            let queue = class.queue.as_ref().expect("an HTB");
            assert_eq!((&queue.discipline, class.priority, class.ceil), (&Discipline::Group, 7, 125_000_000));
            let handle = u32::from(queue.handle) << 16;
            assert_eq!(Id::of_handle(handle), Some(Id { group: class.id.minor - FIRST_GROUP, minor: 0 }));
        }
    }

    #[test]
    fn no_two_queues_share_a_number() {
        let mut tree = tree();
        tree.link = BitsPerSecond(u64::MAX);
        tree.lines = (1..=LAST_LINE_SLOT).map(line).collect();
        tree.leaves = (1..=LAST_LEAF_SLOT)
            .map(|slot| leaf(slot, (slot % 2 == 0).then_some(slot % 9_000 + 1)))
            .collect();
        tree.leaves.iter_mut().for_each(|leaf| leaf.guaranteed = None);
        let classes = classes(&tree, 14, Kind::Fifo, None).expect("valid");
        // While a line is being divided both of its classes are there.
        let undivided = (1..=LAST_LINE_SLOT).map(|slot| queue_handle(Id::undivided(LineSlot(slot))));
        let mut handles: Vec<u16> = classes
            .iter()
            .filter_map(|class| class.queue.as_ref())
            .map(|queue| queue.handle)
            .chain([ROOT])
            .chain(undivided)
            .collect();
        let queues = handles.len();
        assert_eq!(
            queues,
            1 + 1 + 2 * 9 + 2 * 10_240 + 16_383,
            "root, default, groups and theirs, rests, undivided lines, leaves"
        );
        handles.sort_unstable();
        handles.dedup();
        assert_eq!(handles.len(), queues);
        // The list that is walked for each class of a group has nothing but groups.
        let walked = handles.iter().filter(|handle| qdisc_list(**handle) == qdisc_list(ROOT));
        assert_eq!(walked.count(), usize::from(LAST_GROUP) + 1);
        let ids: Vec<Id> = classes.iter().map(|class| class.id).collect();
        assert!(ids.is_sorted() && ids.iter().all(|id| Id::of_handle(id.handle()) == Some(*id)));
    }

    #[test]
    fn handles_that_are_not_ours() {
        for handle in [0x5150, 0x514f_0001, 0x5151_0001, 0x5324_0001, 0x63a2_0001, 0x8001_0001, u32::MAX] {
            assert_eq!(Id::of_handle(handle), None, "{handle:x}");
        }
    }

    #[test]
    fn rates_ceilings_and_bursts() {
        let classes = classes(&tree(), 14, Kind::Fifo, None).expect("valid");
        let by = |minor| classes.iter().find(|class| class.id == Id::root(minor)).expect("is there");
        for (minor, rate, ceil) in [
            (1, 125_000_000, 125_000_000),
            (2, 1_000, 125_000_000),
            (0x12, 750_000, 2_500_000),
            (0x13, 1_000, 2_500_000),
            (0x4001, 625_000, 1_250_000),
        ] {
            assert_eq!((by(minor).rate, by(minor).ceil), (rate, ceil), "{}", Id::root(minor));
        }
        // 1 ms where that is more than a packet of 1,514 bytes, else the packet.
        assert_eq!(by(1).buffer, 1_000_000 / 64);
        assert_eq!(by(0x4001).buffer, (1_514_u32 * 1_600).div_ceil(64));
        assert_eq!(by(0x13).buffer, 1_514_000_000 / 64);
        assert_eq!(class_burst(BitsPerSecond(20 * MEGABIT), 1_514), 2_500);
    }

    #[test]
    fn a_line_has_what_its_leaves_were_promised() {
        let mut tree = tree();
        tree.lines[0].rate = BitsPerSecond(0);
        let classes = classes(&tree, 14, Kind::Fifo, None).expect("valid");
        assert_eq!(classes[2].rate, 625_000 + 1_000, "5 Mbit/s and the rest");
    }

    #[test]
    fn the_rest_is_last_and_six_and_seven_share() {
        for (priority, expected) in [(0, 0), (5, 5), (6, 6), (7, 6)] {
            let mut tree = tree();
            tree.leaves[0].priority = priority;
            let classes = classes(&tree, 14, Kind::Fifo, None).expect("valid");
            assert_eq!(classes[6].priority, expected, "priority {priority}");
            assert_eq!((classes[1].priority, classes[3].priority), (7, 7), "default and rest");
        }
    }

    #[test]
    fn without_guarantee_or_maximum() {
        let mut tree = tree();
        tree.leaves[0].guaranteed = None;
        tree.leaves[0].maximum = None;
        tree.leaves[1].maximum = None;
        let classes = classes(&tree, 14, Kind::Fifo, None).expect("valid");
        assert_eq!((classes[6].rate, classes[6].ceil), (64, 2_500_000), "the line's");
        assert_eq!(classes[7].ceil, 125_000_000, "the link's");
        let lowered = classes[7].without_guarantee();
        assert_eq!((lowered.rate, lowered.ceil), (64, 125_000_000));
        assert_eq!(lowered.without_guarantee(), lowered);
    }

    /// HTB charges (length on the interface + overhead), in cells where the line is ATM
    /// (`psched_l2t_ns`), at the class's rate. That must take as long as the line takes.
    #[test]
    fn htb_charges_what_the_line_takes() {
        let atm = LinkLayer::Atm;
        for (header, layer, overhead, allowed) in [
            (14, LinkLayer::Ethernet, 14, 0.0),
            (14, LinkLayer::Ethernet, 38, 0.0),
            (14, atm, 32, 0.0),
            (14, atm, 40, 0.0),
            (0, atm, 10, 0.0),
            (0, LinkLayer::Ethernet, 14, 0.0),
            // One byte in 65 is rounded up for each packet.
            (14, LinkLayer::Ptm, 22, 0.025),
        ] {
            let mut tree = tree();
            tree.lines[0] = LineClass { link_layer: layer, overhead, ..line(1) };
            let classes = classes(&tree, header, Kind::Fifo, None).expect("valid");
            for class in [&classes[2], &classes[3], &classes[6]] {
                for ip in [28, 40, 64, 65, 576, 1_492, 1_500] {
                    let length = ip + u32::from(header) + u32::from(class.overhead);
                    let counted = if class.atm { length.div_ceil(48) * 53 } else { length };
                    let takes = f64::from(counted) / class.ceil as f64;
                    let speed = if class.id.minor == 0x4001 { 10 } else { 20 } * MEGABIT / 8;
                    let line = f64::from(charged(ip, overhead, layer)) / speed as f64;
                    let off = (takes - line).abs() / line;
                    assert!(off <= allowed + 1e-6, "{ip} on {layer:?} + {overhead}: off by {off}");
                }
            }
        }
        let mut tree = tree();
        tree.lines[0].overhead = 0;
        let classes = classes(&tree, 14, Kind::Fifo, None).expect("valid");
        assert_eq!(classes[2].overhead, 0, "less than the header can't be told");
    }

    #[test]
    fn queues_fit_the_rate() {
        for (megabits, ms, bytes) in [
            // Packets of 1,514: four, 100 ms, ten, 10 ms.
            (0.064, None, 6_056),
            (1.0, None, 12_500),
            (10.0, None, 15_140),
            (100.0, None, 125_000),
            (10.0, Some(40_000), 40_000),
            (10.0, Some(1), 1_514),
        ] {
            let mut tree = tree();
            let maximum = BitsPerSecond((megabits * 1e6) as u64);
            tree.leaves[1] =
                Leaf { guaranteed: None, maximum: Some(maximum), queue: ms.map(ByteCount), ..leaf(2, None) };
            let classes = classes(&tree, 14, Kind::Fifo, None).expect("valid");
            assert_eq!(fifo_limit(&classes[7]), bytes, "{megabits} Mbit/s");
        }
    }

    #[test]
    fn fq_codel_waits_for_a_packet_and_a_half_at_least() {
        for (megabits, packets, target) in [(100, 413, 5_000), (1, 9, 18_168)] {
            let mut tree = tree();
            tree.leaves[1] =
                Leaf { guaranteed: None, maximum: Some(BitsPerSecond(megabits * MEGABIT)), ..leaf(2, None) };
            let classes = classes(&tree, 14, Kind::FqCodel, None).expect("valid");
            let Some(Queue { discipline: Discipline::FqCodel { limit, target: kept, flows, .. }, .. }) =
                classes[7].queue
            else {
                panic!("{:?}", classes[7])
            };
            assert_eq!((limit, flows), (packets, 128), "{megabits} Mbit/s");
            assert!((target - 2..=target).contains(&kept), "{megabits} Mbit/s: {kept}");
            assert_eq!(codel_time(u64::from(kept) + 1), kept, "as the kernel gives it back");
        }
    }

    #[test]
    fn the_largest_rates() {
        let mut tree = tree();
        tree.link = BitsPerSecond(400_000 * MEGABIT);
        tree.leaves[1].guaranteed = Some(BitsPerSecond(100_000 * MEGABIT));
        tree.leaves[1].maximum = None;
        let classes = classes(&tree, 14, Kind::Fifo, None).expect("valid");
        assert_eq!((classes[7].rate, classes[7].ceil), (12_500_000_000, 50_000_000_000));
        assert_eq!((classes[0].buffer, fifo_limit(&classes[7])), (15_625, 500_000_000));
    }

    #[test]
    fn rests_are_sure_of_what_is_declared() {
        let mut tree = tree();
        (tree.rest, tree.lines[0].rest) = (BitsPerSecond(3 * MEGABIT), BitsPerSecond(2 * MEGABIT));
        let classes = classes(&tree, 14, Kind::Fifo, None).expect("valid");
        let rate = |minor| classes.iter().find(|class| class.id.minor == minor).map(|class| class.rate * 8);
        assert_eq!((rate(DEFAULT), rate(0x13)), (Some(3 * MEGABIT), Some(2 * MEGABIT)));
        // The line: 5 Mbit/s guaranteed and its rest.
        assert_eq!(rate(0x12), Some(7 * MEGABIT));
    }

    type Spoil = fn(&mut Tree);

    #[test]
    fn trees_that_contradict_themselves() {
        let cases: [(&str, Spoil); 15] = [
            ("link capacity 0 bit/s is below 8 bit/s", |tree| tree.link = BitsPerSecond(0)),
            ("largest packet is 0 bytes", |tree| tree.mtu = 0),
            ("line slot 0 is not within 1 and 10240", |tree| tree.lines[0].slot = LineSlot(0)),
            ("line slot 10241 is not within 1 and 10240", |tree| tree.lines[1].slot = LineSlot(10_241)),
            ("line slot 1 is out of order or there twice", |tree| tree.lines[1].slot = LineSlot(1)),
            ("line slot 1: ceiling 0 bit/s is below", |tree| tree.lines[0].ceil = BitsPerSecond(0)),
            ("line slot 1: rate 6 Mbit/s exceeds its ceiling of 5 Mbit/s", |tree| {
                tree.lines[0].ceil = BitsPerSecond(5 * MEGABIT);
            }),
            ("class slot 0 is not within 1 and 16383", |tree| tree.leaves[0].slot = ClassSlot(0)),
            ("class slot 16384 is not within", |tree| tree.leaves[2].slot = ClassSlot(16_384)),
            ("class slot 1 is out of order", |tree| tree.leaves[1].slot = ClassSlot(1)),
            ("class slot 1: there is no line slot 7", |tree| tree.leaves[0].line = Some(LineSlot(7))),
            ("class slot 1: priority 8 is above 7", |tree| tree.leaves[0].priority = 8),
            ("class slot 1: guaranteed 5 Mbit/s exceeds maximum 4 Mbit/s", |tree| {
                tree.leaves[0].maximum = Some(BitsPerSecond(4 * MEGABIT));
            }),
            ("line slot 1: guarantees of 21 Mbit/s exceed its ceiling of 20 Mbit/s", |tree| {
                tree.leaves[0].guaranteed = Some(BitsPerSecond(21 * MEGABIT));
                tree.leaves[0].maximum = None;
            }),
            ("guarantees and lines' rests of 17.008 Mbit/s exceed the link's 16 Mbit/s", |tree| {
                tree.link = BitsPerSecond(16 * MEGABIT);
            }),
        ];
        for (expected, spoil) in cases {
            let mut tree = tree();
            spoil(&mut tree);
            let error = classes(&tree, 14, Kind::Fifo, None).expect_err(expected);
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
