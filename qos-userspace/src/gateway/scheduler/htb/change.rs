//! The difference between two trees as single changes, in an order that never lets the rates of
//! children exceed their parent's, and how each is undone. Pure.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::fmt;

use super::class::{Class, Discipline, Id, Queue};
use crate::domain::units::{BitsPerSecond, ByteCount};

/// One message to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Makes a class, without its queue.
    Add(Class),
    /// Gives a class other parameters.
    Alter { from: Class, to: Class },
    /// Removes a class with its queue.
    Remove(Class),
    /// Gives a leaf a queue in place of the one it has, or of the kernel's own.
    Queue { id: Id, from: Option<Queue>, to: Queue },
    /// Gives a leaf the kernel's own queue.
    Unqueue { id: Id, from: Queue },
}

impl Change {
    /// The changes, in order, that take this one back.
    pub(super) fn inverse(self) -> Vec<Self> {
        match self {
            Self::Add(class) => vec![Self::Remove(class)],
            Self::Alter { from, to } => vec![Self::Alter { from: to, to: from }],
            Self::Remove(class) => added(class),
            Self::Queue { id, from: None, to } => vec![Self::Unqueue { id, from: to }],
            Self::Queue { id, from: Some(from), to } => queued(id, Some(to), from),
            Self::Unqueue { id, from } => vec![Self::Queue { id, from: None, to: from }],
        }
    }

    /// Whether it costs the kernel the more the more classes or queues there are.
    pub(super) fn is_slow(&self) -> bool {
        !matches!(self, Self::Alter { .. })
    }

    /// What was done, for an error.
    pub(super) fn action(&self) -> String {
        match self {
            Self::Add(class) => format!("add class {}", class.id),
            Self::Alter { to, .. } => format!("change class {}", to.id),
            Self::Remove(class) => format!("delete class {}", class.id),
            Self::Queue { id, to, .. } => format!("set the queue of class {id} to {to}"),
            Self::Unqueue { id, .. } => format!("remove the queue of class {id}"),
        }
    }

    /// What was wrong when this repairs it; none: a part of another one.
    pub(super) fn drift(&self) -> Option<String> {
        match self {
            Self::Add(class) => Some(format!("class {} was missing", class.id)),
            Self::Alter { from, to } => Some(format!("class {} had {}", to.id, altered(from, to))),
            Self::Remove(class) => Some(format!("class {} was not declared", class.id)),
            Self::Queue { id, from: Some(from), to } => {
                Some(format!("the queue of class {id} was {from} instead of {to}"))
            }
            Self::Queue { id, from: None, .. } => Some(format!("the queue of class {id} was missing")),
            Self::Unqueue { .. } => None,
        }
    }
}

/// The changes that make `to` of `from`. Both are in ascending order of class numbers, and `to` has
/// parents before children.
///
/// First what takes away, children before parents, then what gives, parents before children: so at
/// no time do children have more than they had or will have, nor a parent less.
pub(super) fn changes(from: &[Class], to: &[Class]) -> Vec<Change> {
    let doomed = doomed(from, to);
    let mut taken = Vec::new();
    let mut given = Vec::new();
    for pair in pairs(from, to) {
        match pair {
            (Some(was), None) => taken.push(Change::Remove(was.clone())),
            (None, Some(will)) => given.extend(added(will.clone())),
            (Some(was), Some(will)) if doomed.contains(&was.id) => {
                taken.push(Change::Remove(was.clone()));
                given.extend(added(will.clone()));
            }
            (Some(was), Some(will)) => {
                if !will.same_parameters(was) {
                    let change = Change::Alter { from: was.clone(), to: will.clone() };
                    if will.rate < was.rate { taken.push(change) } else { given.push(change) }
                }
                // A class that has children can't have a queue; it gets one when they are gone.
                if let Some(queue) = &will.queue
                    && was.is_leaf()
                    && was.queue != will.queue
                {
                    given.extend(queued(will.id, was.queue.clone(), queue.clone()));
                }
            }
            (None, None) => {}
        }
    }
    taken.sort_by_key(|change| match change {
        Change::Remove(class) | Change::Alter { from: class, .. } => (class.height(), Reverse(class.id)),
        _ => (0, Reverse(Id::root(0))),
    });
    taken.append(&mut given);
    taken
}

/// Classes that have to go: not wanted, wanted under another parent, or under one that has to go.
fn doomed(from: &[Class], to: &[Class]) -> HashSet<Id> {
    let mut doomed: HashSet<Id> = pairs(from, to)
        .filter_map(|pair| match pair {
            (Some(was), None) => Some(was.id),
            (Some(was), Some(will)) if was.parent != will.parent => Some(was.id),
            _ => None,
        })
        .collect();
    // Only inner classes and groups take others with them; the tree is at most HTB's 8 levels deep, twice.
    if from.iter().any(|class| class.height() > 0 && doomed.contains(&class.id)) {
        loop {
            let below: Vec<Id> = from
                .iter()
                .filter(|class| !doomed.contains(&class.id))
                .filter(|class| class.parent().is_some_and(|parent| doomed.contains(&parent)))
                .map(|class| class.id)
                .collect();
            if below.is_empty() {
                break;
            }
            doomed.extend(below);
        }
    }
    doomed
}

/// Both trees side by side, by class number.
fn pairs<'a>(
    from: &'a [Class],
    to: &'a [Class],
) -> impl Iterator<Item = (Option<&'a Class>, Option<&'a Class>)> {
    let (mut from, mut to) = (from.iter().peekable(), to.iter().peekable());
    std::iter::from_fn(move || {
        let pair = match (from.peek(), to.peek()) {
            (None, None) => return None,
            (Some(was), Some(will)) if was.id == will.id => (from.next(), to.next()),
            (Some(was), Some(will)) if was.id > will.id => (None, to.next()),
            (None, _) => (None, to.next()),
            (_, _) => (from.next(), None),
        };
        Some(pair)
    })
}

fn added(class: Class) -> Vec<Change> {
    let queue = class.queue.clone().map(|to| Change::Queue { id: class.id, from: None, to });
    std::iter::once(Change::Add(class)).chain(queue).collect()
}

fn queued(id: Id, from: Option<Queue>, to: Queue) -> Vec<Change> {
    match from {
        // The kernel changes a discipline's limits in place, but neither its kind nor its flows.
        Some(from) if from.handle == to.handle && !from.discipline.becomes(&to.discipline) => {
            vec![Change::Unqueue { id, from }, Change::Queue { id, from: None, to }]
        }
        from => vec![Change::Queue { id, from, to }],
    }
}

impl Discipline {
    /// Whether the kernel can change this one in place into `other`.
    fn becomes(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Fifo { .. }, Self::Fifo { .. }) => true,
            (Self::FqCodel { flows, .. }, Self::FqCodel { flows: others, .. }) => flows == others,
            _ => false,
        }
    }
}

impl fmt::Display for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.discipline {
            Discipline::Fifo { limit } => {
                write!(f, "bfifo {:x}: of {}", self.handle, ByteCount((*limit).into()))
            }
            Discipline::FqCodel { limit, target, flows, .. } => {
                write!(f, "fq_codel {:x}: of {limit} packets, target {target} µs, {flows} flows", self.handle)
            }
            Discipline::Group => write!(f, "htb {:x}:", self.handle),
            Discipline::Foreign(kind) => write!(f, "{kind} {:x}:", self.handle),
        }
    }
}

/// Names each parameter that differs: "rate 1 Mbit/s instead of 2 Mbit/s, priority 3 instead of 0".
fn altered(from: &Class, to: &Class) -> String {
    let rate = |bytes: u64| BitsPerSecond(bytes.saturating_mul(8)).to_string();
    let layer = |atm| if atm { "ATM" } else { "Ethernet" }.to_owned();
    let leaves = from.is_leaf() && to.is_leaf();
    [
        ("rate", from.rate != to.rate, rate(from.rate), rate(to.rate)),
        ("ceiling", from.ceil != to.ceil, rate(from.ceil), rate(to.ceil)),
        ("link layer", from.atm != to.atm, layer(from.atm), layer(to.atm)),
        ("overhead", from.overhead != to.overhead, from.overhead.to_string(), to.overhead.to_string()),
        ("mpu", from.mpu != to.mpu, from.mpu.to_string(), to.mpu.to_string()),
        ("burst ticks", from.buffer != to.buffer, from.buffer.to_string(), to.buffer.to_string()),
        ("ceiling burst ticks", from.cbuffer != to.cbuffer, from.cbuffer.to_string(), to.cbuffer.to_string()),
        ("quantum", leaves && from.quantum != to.quantum, from.quantum.to_string(), to.quantum.to_string()),
        (
            "priority",
            leaves && from.priority != to.priority,
            from.priority.to_string(),
            to.priority.to_string(),
        ),
    ]
    .into_iter()
    .filter(|(_, differs, ..)| *differs)
    .map(|(what, _, was, will)| format!("{what} {was} instead of {will}"))
    .collect::<Vec<_>>()
    .join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;
    use qos_common::length::LinkLayer;

    use super::super::class::{Kind, classes, ids};
    use super::*;
    use crate::gateway::scheduler::{ClassSlot, Leaf, LineClass, LineSlot, Part, Tree};
    use crate::manager::capacity::{SMALLEST_REST, UNGUARANTEED_RATE};

    /// A valid tree: each line's guarantees and rest within its rate, all within the link.
    fn tree() -> impl Strategy<Value = Tree> {
        // Two in the root, two in the first group, one in the second.
        let slots = prop::sample::select(vec![1_u16, 2, 1_025, 1_026, 2_049]);
        let lines = prop::collection::btree_map(slots, (1..40_u64, 0..3_u8, any::<bool>()), 0..4);
        let leaves = prop::collection::btree_map(
            1..=12_u16,
            (0..5_u16, prop::option::of(1..5_u64), prop::option::of(5..50_u64), 0..8_u8),
            0..10,
        );
        (lines, leaves, 200..300_u64).prop_map(|(lines, leaves, link)| {
            let megabits = |n: u64| BitsPerSecond(n * 1_000_000);
            let mut lines: Vec<LineClass> = lines
                .into_iter()
                .map(|(slot, (spare, layer, divided))| LineClass {
                    slot: LineSlot(slot),
                    rate: SMALLEST_REST,
                    rest: SMALLEST_REST,
                    ceil: megabits(50 + spare),
                    link_layer: LinkLayer::from_raw(layer),
                    overhead: 14 + i16::from(layer),
                    divided,
                })
                .collect();
            let leaves: Vec<Leaf> = leaves
                .into_iter()
                .map(|(slot, (line, guaranteed, maximum, priority))| Leaf {
                    slot: ClassSlot(slot),
                    line: lines.get(usize::from(line)).map(|line| line.slot),
                    guaranteed: guaranteed.map(megabits),
                    maximum: maximum.map(megabits),
                    priority,
                    queue: None,
                })
                .collect();
            for line in &mut lines {
                line.divided |= leaves.iter().any(|leaf| leaf.line == Some(line.slot));
            }
            Tree { link: megabits(link), rest: SMALLEST_REST, mtu: 1_500, lines, leaves }
        })
    }

    /// What a kernel would have after a change; panics where it would refuse.
    fn carry_out(kernel: &mut BTreeMap<Id, Class>, change: &Change) {
        match change {
            Change::Add(class) => {
                if let Some(parent) = class.parent() {
                    let parent = kernel.get(&parent).unwrap_or_else(|| panic!("{change:?}: no parent"));
                    assert!(!parent.is_group() || parent.queue.is_some(), "{change:?}: no HTB");
                }
                let bare = Class { queue: None, ..class.clone() };
                assert_eq!(kernel.insert(class.id, bare), None, "{change:?}: is there");
            }
            Change::Alter { from, to } => {
                let class = kernel.get_mut(&to.id).expect("class to change");
                assert_eq!(class.rate, from.rate);
                *class = Class { queue: class.queue.clone(), ..to.clone() };
            }
            Change::Remove(class) => {
                assert!(
                    kernel.values().all(|child| child.parent() != Some(class.id)),
                    "{change:?}: has children"
                );
                kernel.remove(&class.id).expect("class to delete");
            }
            Change::Queue { id, to, .. } => {
                kernel.get_mut(id).expect("class of the queue").queue = Some(to.clone());
            }
            Change::Unqueue { id, .. } => {
                let queue = kernel.get_mut(id).and_then(|class| class.queue.take());
                assert!(queue.is_some(), "{change:?}: has none");
            }
        }
    }

    fn over_committed(kernel: &BTreeMap<Id, Class>) -> Option<String> {
        // Rates of those that are promised nothing are not part of the sum.
        let unpromised = UNGUARANTEED_RATE.0 / 8;
        kernel.values().filter(|parent| !parent.is_leaf()).find_map(|parent| {
            let children =
                kernel.values().filter(|child| child.parent() == Some(parent.id) && child.id.minor != 2);
            let sum: u64 = children.map(|child| child.rate).filter(|rate| *rate > unpromised).sum();
            // In a group the link stands for the group's class.
            let limit = match parent.parent().and_then(|id| kernel.get(&id)) {
                Some(group) if group.is_group() => group,
                _ => parent,
            };
            (sum > limit.rate).then(|| format!("{} has {}, its children {sum}", limit.id, limit.rate))
        })
    }

    proptest! {
        #[test]
        fn any_tree_becomes_any_other_and_back(from in tree(), to in tree(), stop in 0..200_usize) {
            let from = classes(&from, 14, Kind::Fifo, None).expect("valid");
            let to = classes(&to, 14, Kind::Fifo, None).expect("valid");
            let mut kernel: BTreeMap<Id, Class> = from.iter().map(|class| (class.id, class.clone())).collect();
            let changes = changes(&from, &to);
            for change in &changes {
                carry_out(&mut kernel, change);
                prop_assert_eq!(over_committed(&kernel), None, "after {:?} of {:#?}", change, changes);
            }
            prop_assert_eq!(kernel.values().cloned().collect::<Vec<_>>(), to.clone());
            prop_assert!(super::changes(&to, &to).is_empty());

            // Fails behind some change: what was done is undone.
            let mut kernel: BTreeMap<Id, Class> = from.iter().map(|class| (class.id, class.clone())).collect();
            let done: Vec<Change> = changes.into_iter().take(stop).collect();
            for change in &done {
                carry_out(&mut kernel, change);
            }
            for change in done.into_iter().rev().flat_map(Change::inverse) {
                carry_out(&mut kernel, &change);
                prop_assert_eq!(over_committed(&kernel), None, "undoing {:?}", change);
            }
            prop_assert_eq!(kernel.into_values().collect::<Vec<_>>(), from);
        }

        #[test]
        fn a_part_is_what_differs_of_the_whole(from in tree(), to in tree()) {
            let to = Tree { link: from.link, ..to };
            let lines = differing(&from.lines, &to.lines, |line| line.slot);
            let leaves = differing(&from.leaves, &to.leaves, |leaf| leaf.slot);
            let mut part = Part {
                lines: lines.into_iter().map(|slot| (slot, get(&to.lines, |line| line.slot == slot))).collect(),
                leaves: leaves.into_iter().map(|slot| (slot, get(&to.leaves, |leaf| leaf.slot == slot))).collect(),
            };
            let changed = from.leaves.iter().chain(&to.leaves).filter(|leaf| part.leaves.contains_key(&leaf.slot));
            let lines = changed.filter_map(|leaf| leaf.line).collect::<BTreeSet<_>>();
            part.lines.extend(lines.into_iter().map(|slot| (slot, get(&to.lines, |line| line.slot == slot))));
            let mut tree = from.clone();
            let mut entries = part.clone();
            entries.exchange(&mut tree);
            prop_assert_eq!(&tree, &Tree { rest: tree.rest, ..to.clone() });
            entries.exchange(&mut tree);
            prop_assert_eq!(&tree, &from);
            prop_assert_eq!(&entries, &part);
            let from = classes(&from, 14, Kind::Fifo, None).expect("valid");
            let wanted = classes(&to, 14, Kind::Fifo, Some(&part)).expect("valid");
            let all = classes(&to, 14, Kind::Fifo, None).expect("valid");
            let ids: BTreeSet<Id> = ids(&part).chain(wanted.iter().map(|class| class.id)).collect();
            let before: Vec<Class> = from.iter().filter(|class| ids.contains(&class.id)).cloned().collect();
            prop_assert_eq!(changes(&before, &wanted), changes(&from, &all));
        }
    }

    fn get<T: Clone>(list: &[T], is: impl Fn(&T) -> bool) -> Option<T> {
        list.iter().find(|entry| is(entry)).cloned()
    }

    /// Slots whose entry is not the same, or in one list only.
    fn differing<T: PartialEq, S: Ord + Copy>(from: &[T], to: &[T], slot: fn(&T) -> S) -> BTreeSet<S> {
        let only = |these: &[T], those: &[T]| -> Vec<S> {
            these.iter().filter(|entry| !those.contains(entry)).map(slot).collect()
        };
        only(from, to).into_iter().chain(only(to, from)).collect()
    }

    #[test]
    fn a_queue_is_changed_in_place_where_the_kernel_can() {
        let fifo = |handle, limit| Queue { handle, discipline: Discipline::Fifo { limit } };
        let fair = |flows| Queue {
            handle: 0x4001,
            discipline: Discipline::FqCodel { limit: 10, memory: 1, target: 1, interval: 1, flows },
        };
        let foreign = Queue { handle: 0x4001, discipline: Discipline::Foreign("pfifo".into()) };
        for (what, from, to, changes) in [
            ("another limit", fifo(0x4001, 1), fifo(0x4001, 2), 1),
            ("somebody's, with a handle of its own", fifo(1, 1), fifo(0x4001, 1), 1),
            ("somebody's, with our handle", foreign, fifo(0x4001, 1), 2),
            ("another kind", fifo(0x4001, 1), fair(128), 2),
            ("other flows", fair(64), fair(128), 2),
        ] {
            assert_eq!(queued(Id::root(0x4001), Some(from), to).len(), changes, "{what}");
        }
    }
}
