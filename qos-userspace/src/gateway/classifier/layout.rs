//! One half: rules laid out in tables, forks and lists, as packets look through them.
//!
//! A layout is made in memory of its own, and may be joined to a half of the maps: from then on each change
//! is made there too. Lists and forks are never changed where they stand: a new one is written into free
//! room, one word makes a slot lead there, and the old one's room is used again after a grace period.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use qos_common::abi::{RULE_ROOM, SLOT_ROOM};
use qos_common::classify::{
    ANY_TAG, Address, MAX_FORKS, MAX_TABLES, Rule, Slot, TABLE_SETS, Table, TableSet, half_sets,
    hashed_position, table_set,
};

use super::Maps;
use super::cover::{Plan, plan};
use super::field::{Packets, Way, Window, fields};
use super::fork::best_window;
use super::room::{NoRoom, Room};
use crate::gateway::memory::grace_period;

/// Rules that a planned list has at most, where forks can help it.
const LEAF: usize = 8;
/// Rules that a list may grow to before it is divided.
const LONG: usize = 16;
/// Copies of a tree's rules, on average.
const COPIES: usize = 8;
/// Lists of a tree that a rule may be copied into while another place is left for it.
const FEW_LEAVES: usize = 256;
/// Rules that packets without ports are compared with, of those that differ in their ports alone.
const UNKNOWN_RULES: usize = 64;
/// Fewest bits of the hashes' slots.
const FEWEST_BITS: u32 = 6;

/// Rules, laid out.
#[derive(Debug)]
pub(super) struct Layout {
    slots: Vec<Slot>,
    rules: Vec<Rule>,
    slot_room: Room,
    rule_room: Room,
    /// How many slots beyond the first hold the list that starts here.
    shared: HashMap<u32, u32>,
    sets: [Set; TABLE_SETS as usize],
    salts: u64,
    live: Option<Live>,
}

/// The half of the maps that a layout is joined to.
#[derive(Debug)]
struct Live {
    maps: Arc<Maps>,
    half: u64,
}

/// The tables of one direction and family.
#[derive(Debug, Default)]
struct Set {
    tables: Vec<State>,
    /// As in [`TableSet`].
    base: u32,
    shift: u32,
    /// How many hashes' slots have a list of each length.
    hashed_lists: BTreeMap<usize, usize>,
}

#[derive(Debug)]
struct State {
    table: Table,
    /// It hashes addresses.
    hashes: bool,
    ranks: BTreeSet<u64>,
    /// How many slots of its tree have a list of each length.
    lists: BTreeMap<usize, usize>,
}

/// Where a slot stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// The root of a table.
    Root(usize),
    Slot(u32),
}

/// A slot that leads to no further one.
#[derive(Debug)]
struct Leaf {
    place: Place,
    slot: Slot,
    way: Way,
}

impl Set {
    fn as_table_set(&self) -> TableSet {
        let mut set = TableSet::EMPTY;
        for (place, state) in set.tables.iter_mut().zip(&self.tables) {
            *place = state.table;
        }
        set.used = self.tables.len() as u32;
        set.base = self.base;
        set.shift = self.shift;
        set
    }

    fn position(&self, hash: u64) -> u32 {
        hashed_position(self.base, self.shift, hash)
    }

    fn count(&mut self, table: usize, slot: Slot, by: isize) {
        let lists =
            if self.tables[table].hashes { &mut self.hashed_lists } else { &mut self.tables[table].lists };
        if !slot.is_empty() && !slot.is_fork() {
            let count = lists.entry(slot.count() as usize).or_default();
            *count = count.saturating_add_signed(by);
            if *count == 0 {
                lists.remove(&(slot.count() as usize));
            }
        }
    }

    /// Most rules that a packet may be compared with.
    fn most_checks(&self) -> usize {
        let longest = |lists: &BTreeMap<usize, usize>| lists.keys().next_back().copied().unwrap_or(0);
        let of =
            |state: &State| if state.hashes { longest(&self.hashed_lists) } else { longest(&state.lists) };
        self.tables.iter().filter(|state| !state.ranks.is_empty()).map(of).sum()
    }
}

impl State {
    /// Tells whether the rule says all that the table's keys are made of.
    fn takes(&self, rule: &Rule) -> bool {
        self.table.source_length <= u32::from(rule.source_length)
            && self.table.destination_length <= u32::from(rule.destination_length)
    }
}

impl Layout {
    /// Lays rules out anew, each rank of them once in each set.
    pub(super) fn build(rules: &[Rule]) -> Result<Self, NoRoom> {
        let mut layout = Self {
            slots: Vec::new(),
            rules: Vec::new(),
            slot_room: Room::new(SLOT_ROOM),
            rule_room: Room::new(RULE_ROOM),
            shared: HashMap::new(),
            sets: Default::default(),
            salts: rules.len() as u64,
            live: None,
        };
        let mut members: [Vec<u32>; TABLE_SETS as usize] = Default::default();
        for (rule, number) in rules.iter().zip(0..) {
            members[set_of(rule)].push(number);
        }
        for (set, mut members) in members.into_iter().enumerate() {
            members.sort_unstable_by_key(|&member| rules[member as usize].rank);
            let family = set as u8 & 1;
            let plan = plan(rules, members);
            layout.place(set, family, rules, &plan)?;
        }
        Ok(layout)
    }

    fn place(&mut self, set: usize, family: u8, rules: &[Rule], plan: &Plan) -> Result<(), NoRoom> {
        let ranks = |members: &[u32]| members.iter().map(|&member| rules[member as usize].rank).collect();
        let hashed: usize = plan.hashed.iter().map(|(_, members)| members.len()).sum();
        let bits = (2 * hashed).next_power_of_two().ilog2().max(FEWEST_BITS);
        let base = self.take_slots(1 << bits)?;
        self.sets[set].base = base;
        self.sets[set].shift = 64 - bits;
        // Position, number of the rule and tag: the rules of a slot come together, best first.
        let mut placed = Vec::with_capacity(hashed);
        for ((source, destination), members) in &plan.hashed {
            let table = Table::hashed(u32::from(*source), u32::from(*destination), self.salt());
            for &member in members {
                let rule = &rules[member as usize];
                let hash = table.hash(u32::from(family), rule.source, rule.destination);
                placed.push((self.sets[set].position(hash), rule.rank, member, Slot::tag_of(hash)));
            }
            self.add_table(set, table, true, ranks(members));
        }
        placed.sort_unstable();
        for group in placed.chunk_by(|one, other| one.0 == other.0) {
            let members: Vec<u32> = group.iter().map(|&(_, _, member, _)| member).collect();
            let tag = group[0].3;
            let tag = if group.iter().all(|entry| entry.3 == tag) { tag } else { ANY_TAG };
            let slot = if members.len() > LONG {
                self.grow(set, 0, rules, &members, &Way::default(), COPIES * members.len())?
            } else {
                self.list(rules, &members)?
            };
            self.sets[set].count(0, slot, 1);
            self.write_slot(group[0].0, slot.with_tag(tag));
        }
        for members in &plan.trees {
            let number = self.add_table(set, Table::hashed(0, 0, 0), false, ranks(members));
            let root =
                self.grow(set, number, rules, members, &Way::default(), COPIES * members.len() + 64)?;
            self.sets[set].tables[number].table.root = root;
            self.sets[set].count(number, root, 1);
        }
        Ok(())
    }

    fn salt(&mut self) -> u64 {
        self.salts = self.salts.wrapping_add(1);
        self.salts.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    fn add_table(&mut self, set: usize, table: Table, hashes: bool, ranks: BTreeSet<u64>) -> usize {
        let best = ranks.first().copied().unwrap_or(u64::MAX);
        let state = State { table: Table { best, ..table }, hashes, ranks, lists: BTreeMap::new() };
        let tables = &mut self.sets[set].tables;
        match tables.iter().position(|state| state.ranks.is_empty()) {
            Some(free) => {
                tables[free] = state;
                free
            }
            None => {
                tables.push(state);
                tables.len() - 1
            }
        }
    }

    /// Makes a list of rules, or a tree over them. `members` are in the order of their ranks.
    ///
    /// Lists below are counted for the table; the slot that comes back is the caller's to count.
    fn grow(
        &mut self,
        set: usize,
        table: usize,
        rules: &[Rule],
        members: &[u32],
        way: &Way,
        budget: usize,
    ) -> Result<Slot, NoRoom> {
        let mut made = HashMap::new();
        self.grow_below(set, table, rules, members, way, budget, &mut made)
    }

    #[expect(clippy::too_many_arguments, reason = "what stays the same below is not worth a type")]
    fn grow_below(
        &mut self,
        set: usize,
        table: usize,
        rules: &[Rule],
        members: &[u32],
        way: &Way,
        budget: usize,
        made: &mut HashMap<Vec<u32>, Slot>,
    ) -> Result<Slot, NoRoom> {
        let family = set as u8 & 1;
        let window = if members.len() > LEAF && way.depth < MAX_FORKS {
            best_window(rules, members, family, way, budget)
        } else {
            None
        };
        let Some(window) = window else {
            if let Some(&slot) = made.get(members) {
                *self.shared.entry(slot.start()).or_default() += 1;
                return Ok(slot);
            }
            let slot = self.list(rules, members)?;
            if !slot.is_empty() {
                made.insert(members.to_vec(), slot);
            }
            return Ok(slot);
        };
        let field = fields(family)[window.field];
        let splits = way.packets == Packets::All && field.may_be_unknown();
        let mut children = vec![Vec::new(); window.choices() as usize];
        for &member in members {
            let span = way.span(fields(family), window.field, &rules[member as usize]);
            let (from, count) = window.chosen(span);
            for choice in from..from + count {
                children[(choice & (window.choices() - 1)) as usize].push(member);
            }
        }
        if splits {
            children.push(without_ports(rules, members));
        }
        let copies: usize = children.iter().map(Vec::len).sum();
        let base = self.take_slots(children.len() as u32)?;
        let fork = Slot::fork(base, field.word, field.shift + window.shift, window.width, splits);
        for (child, choice) in children.iter().zip(0..) {
            let share = (budget * child.len()).div_ceil(copies.max(1));
            let way = way.through(window, choice, splits);
            match self.grow_below(set, table, rules, child, &way, share, made) {
                Ok(slot) => {
                    self.sets[set].count(table, slot, 1);
                    self.write_slot(base + choice, slot);
                }
                Err(error) => {
                    self.drop_slot(set, table, fork);
                    return Err(error);
                }
            }
        }
        Ok(fork)
    }

    /// Writes a list, rules in the order of `members`.
    fn list(&mut self, rules: &[Rule], members: &[u32]) -> Result<Slot, NoRoom> {
        let list: Vec<Rule> = members.iter().map(|&member| rules[member as usize]).collect();
        self.write_list(&list)
    }

    fn write_list(&mut self, list: &[Rule]) -> Result<Slot, NoRoom> {
        if list.is_empty() {
            return Ok(Slot::EMPTY);
        }
        let count = list.len() as u32;
        if count > qos_common::classify::MAX_LIST {
            return Err(NoRoom);
        }
        let start = self.take_rules(count)?;
        for (rule, position) in list.iter().zip(start..) {
            self.rules[position as usize] = *rule;
            if let Some(live) = &self.live {
                live.maps.rules.write(live.rules() + position, *rule);
            }
        }
        Ok(Slot::list(start, count))
    }

    fn take_rules(&mut self, count: u32) -> Result<u32, NoRoom> {
        let start = self.rule_room.take_or_wait(count, || nobody_reads(self.live.as_ref()))?;
        let end = (start + count) as usize;
        self.rules.resize(end.max(self.rules.len()), Rule::default());
        Ok(start)
    }

    /// Takes `count` slots, all empty.
    fn take_slots(&mut self, count: u32) -> Result<u32, NoRoom> {
        let start = self.slot_room.take_or_wait(count, || nobody_reads(self.live.as_ref()))?;
        let end = (start + count) as usize;
        self.slots.resize(end.max(self.slots.len()), Slot::EMPTY);
        for position in start..start + count {
            self.write_slot(position, Slot::EMPTY);
        }
        Ok(start)
    }

    fn write_slot(&mut self, position: u32, slot: Slot) {
        self.slots[position as usize] = slot;
        if let Some(live) = &self.live {
            live.maps.slots.write(live.slots() + position, live.moved(slot));
        }
    }

    fn write_tables(&self, set: usize) {
        if let Some(live) = &self.live {
            live.maps.tables.write(half_sets(live.half) + set as u32, live.moved_set(&self.sets[set]));
        }
    }

    /// Puts a slot in its place.
    fn write(&mut self, set: usize, place: Place, slot: Slot) {
        match place {
            Place::Root(table) => {
                self.sets[set].tables[table].table.root = slot;
                self.write_tables(set);
            }
            Place::Slot(position) => self.write_slot(position, slot),
        }
    }

    /// Gives back what a slot leads to, once nobody reads it.
    fn drop_slot(&mut self, set: usize, table: usize, slot: Slot) {
        if slot.is_fork() {
            let choices = (1 << slot.width()) + u32::from(slot.has_unknown());
            for position in slot.start()..slot.start() + choices {
                let child = self.slots[position as usize];
                self.sets[set].count(table, child, -1);
                self.drop_slot(set, table, child);
            }
            self.slot_room.retire(slot.start(), choices);
        } else if !slot.is_empty() {
            match self.shared.get_mut(&slot.start()) {
                Some(others) if *others > 1 => *others -= 1,
                Some(_) => {
                    self.shared.remove(&slot.start());
                }
                None => self.rule_room.retire(slot.start(), slot.count()),
            }
        }
    }

    fn rules_of(&self, list: Slot) -> &[Rule] {
        &self.rules[list.start() as usize..(list.start() + list.count()) as usize]
    }

    /// The slots that packets of a rule may be led to in a table; none if they are more than `limit`.
    fn leaves(&self, set: usize, table: usize, rule: &Rule, limit: usize) -> Option<Vec<Leaf>> {
        let state = &self.sets[set].tables[table];
        let (place, slot) = if state.hashes {
            let hash = state.table.hash(u32::from(rule.family), rule.source, rule.destination);
            let position = self.sets[set].position(hash);
            (Place::Slot(position), self.slots[position as usize])
        } else {
            (Place::Root(table), state.table.root)
        };
        let mut leaves = Vec::new();
        self.walk(rule, Leaf { place, slot, way: Way::default() }, limit, &mut leaves).then_some(leaves)
    }

    fn walk(&self, rule: &Rule, at: Leaf, limit: usize, leaves: &mut Vec<Leaf>) -> bool {
        if !at.slot.is_fork() {
            leaves.push(at);
            return leaves.len() <= limit;
        }
        let Some(window) = Window::of(at.slot, rule.family) else {
            return false;
        };
        let (from, count) = window.chosen(at.way.span(fields(rule.family), window.field, rule));
        let splits = at.slot.has_unknown();
        let known = (from..from + count).map(|choice| choice & (window.choices() - 1));
        known.chain(splits.then_some(window.choices())).all(|choice| {
            let position = at.slot.start() + choice;
            let leaf = Leaf {
                place: Place::Slot(position),
                slot: self.slots[position as usize],
                way: at.way.through(window, choice, splits),
            };
            self.walk(rule, leaf, limit, leaves)
        })
    }

    /// Adds a rule whose rank is new to its set.
    pub(super) fn insert(&mut self, rule: &Rule) -> Result<(), NoRoom> {
        let set = set_of(rule);
        let table = match self.choose(set, rule) {
            Some(table) => table,
            None => self.add_table(set, Table::hashed(0, 0, 0), false, BTreeSet::new()),
        };
        let leaves = self.leaves(set, table, rule, usize::MAX).ok_or(NoRoom)?;
        let tag = self.tag(set, table, rule);
        let changed = self.change(&leaves, |list, unknown| {
            let mut list = list.to_vec();
            list.insert(list.partition_point(|other| other.rank < rule.rank), *rule);
            if unknown { deduplicated(&list) } else { list }
        })?;
        // The table first: a list that no table leads to is not found.
        let state = &mut self.sets[set].tables[table];
        state.ranks.insert(rule.rank);
        state.table.best = state.table.best.min(rule.rank);
        self.write_tables(set);
        self.publish(set, table, &leaves, &changed, tag);
        for (leaf, slot) in leaves.iter().zip(changed) {
            let count = slot.count() as usize;
            if !slot.is_empty() && count > LONG && (count == LONG + 1 || count.is_power_of_two()) {
                self.divide(set, table, leaf);
            }
        }
        Ok(())
    }

    /// Removes a rule; one that is not there is passed over.
    pub(super) fn remove(&mut self, rule: &Rule) -> Result<(), NoRoom> {
        let set = set_of(rule);
        let holds = |state: &State| state.ranks.contains(&rule.rank);
        let Some(table) = self.sets[set].tables.iter().position(holds) else {
            return Ok(());
        };
        let leaves = self.leaves(set, table, rule, usize::MAX).ok_or(NoRoom)?;
        let changed = self.change(&leaves, |list, _| {
            // In one direction and family a rank names one rule.
            list.iter().filter(|other| other.rank != rule.rank).copied().collect()
        })?;
        self.publish(set, table, &leaves, &changed, None);
        let state = &mut self.sets[set].tables[table];
        state.ranks.remove(&rule.rank);
        state.table.best = state.ranks.first().copied().unwrap_or(u64::MAX);
        if state.ranks.is_empty() && !state.hashes {
            let root = std::mem::replace(&mut state.table.root, Slot::EMPTY);
            self.sets[set].count(table, root, -1);
            self.drop_slot(set, table, root);
        }
        self.write_tables(set);
        Ok(())
    }

    /// The slots as they will be; lists that are the same stay one.
    fn change(
        &mut self,
        leaves: &[Leaf],
        change: impl Fn(&[Rule], bool) -> Vec<Rule>,
    ) -> Result<Vec<Slot>, NoRoom> {
        let mut made: HashMap<(u64, bool), Slot> = HashMap::new();
        let mut changed = Vec::with_capacity(leaves.len());
        for leaf in leaves {
            let unknown = leaf.way.packets == Packets::Unknown;
            let name = (leaf.slot.with_tag(ANY_TAG).raw(), unknown);
            let slot = match made.get(&name) {
                Some(&slot) => {
                    if !slot.is_empty() {
                        *self.shared.entry(slot.start()).or_default() += 1;
                    }
                    slot
                }
                None => {
                    let list = change(self.rules_of(leaf.slot), unknown);
                    match self.write_list(&list) {
                        Ok(slot) => {
                            made.insert(name, slot);
                            slot
                        }
                        Err(error) => {
                            for slot in made.into_values().filter(|slot| !slot.is_empty()) {
                                self.shared.remove(&slot.start());
                                self.rule_room.release(slot.start(), slot.count());
                            }
                            return Err(error);
                        }
                    }
                }
            };
            changed.push(slot);
        }
        Ok(changed)
    }

    /// Puts changed slots in their places; what was there is given back.
    fn publish(&mut self, set: usize, table: usize, leaves: &[Leaf], changed: &[Slot], tag: Option<u16>) {
        for (leaf, &slot) in leaves.iter().zip(changed) {
            let tag = match tag {
                Some(tag) if leaf.slot.is_empty() => tag,
                Some(tag) if leaf.slot.tag() == tag => tag,
                Some(_) => ANY_TAG,
                None => leaf.slot.tag(),
            };
            // Slots below a fork or at a root have no tag.
            let tag = if leaf.way.depth > 0 || matches!(leaf.place, Place::Root(_)) { ANY_TAG } else { tag };
            self.write(set, leaf.place, slot.with_tag(tag));
            self.sets[set].count(table, leaf.slot, -1);
            self.sets[set].count(table, slot, 1);
            self.drop_slot(set, table, leaf.slot);
        }
    }

    fn tag(&self, set: usize, table: usize, rule: &Rule) -> Option<u16> {
        let state = &self.sets[set].tables[table];
        let hash = || state.table.hash(u32::from(rule.family), rule.source, rule.destination);
        state.hashes.then(|| Slot::tag_of(hash()))
    }

    /// Divides the list at the end of a way by forks, if that helps.
    fn divide(&mut self, set: usize, table: usize, leaf: &Leaf) {
        let slot = match leaf.place {
            Place::Root(table) => self.sets[set].tables[table].table.root,
            Place::Slot(position) => self.slots[position as usize],
        };
        let rules = self.rules_of(slot).to_vec();
        let members: Vec<u32> = (0..rules.len() as u32).collect();
        let Ok(grown) = self.grow(set, table, &rules, &members, &leaf.way, COPIES * rules.len() + 64) else {
            // Its rules are found where they are.
            return;
        };
        if grown.is_fork() {
            self.write(set, leaf.place, grown.with_tag(slot.tag()));
            self.sets[set].count(table, slot, -1);
            self.drop_slot(set, table, slot);
        } else {
            self.drop_slot(set, table, grown);
        }
    }

    /// The table that a rule costs packets least in; none: a new one.
    fn choose(&self, set: usize, rule: &Rule) -> Option<usize> {
        let tables = &self.sets[set].tables;
        let mut best = None;
        for (number, state) in tables.iter().enumerate() {
            if state.ranks.is_empty() || !state.takes(rule) {
                continue;
            }
            let Some(leaves) = self.leaves(set, number, rule, FEW_LEAVES) else {
                continue;
            };
            let longest = leaves.iter().map(|leaf| leaf.slot.count()).max().unwrap_or(0) as usize;
            let cost = (longest / LEAF, leaves.len(), longest);
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, number));
            }
        }
        let is_full = tables.iter().filter(|state| !state.ranks.is_empty()).count() >= MAX_TABLES;
        match best {
            Some((_, number)) => Some(number),
            None if is_full => tables.iter().rposition(|state| state.takes(rule)),
            None => None,
        }
    }

    /// Most rules that a packet may be compared with.
    pub(super) fn most_checks(&self) -> usize {
        self.sets.iter().map(Set::most_checks).max().unwrap_or(0)
    }

    /// Writes everything into a half of the maps; from now on it is kept there too. Packets don't look
    /// through that half now.
    pub(super) fn join(&mut self, maps: &Arc<Maps>, half: u64) {
        let live = Live { maps: Arc::clone(maps), half };
        for (rule, position) in self.rules.iter().zip(live.rules()..) {
            maps.rules.write(position, *rule);
        }
        for (slot, position) in self.slots.iter().zip(live.slots()..) {
            maps.slots.write(position, live.moved(*slot));
        }
        self.live = Some(live);
        for set in 0..self.sets.len() {
            self.write_tables(set);
        }
    }

    /// Compares the maps with the layout that they were joined to, and puts right what differs.
    pub(super) fn repair(&self, wrong: &mut Vec<String>) {
        let Some(live) = &self.live else {
            return;
        };
        let maps = &live.maps;
        for (set, number) in self.sets.iter().zip(half_sets(live.half)..) {
            let wanted = live.moved_set(set);
            if maps.tables.read(number) != wanted {
                maps.tables.write(number, wanted);
                wrong.push(format!("tables[{number}] differed from the rules in force"));
            }
        }
        for (rule, position) in self.rules.iter().zip(live.rules()..) {
            if maps.rules.read(position) != *rule {
                maps.rules.write(position, *rule);
                wrong.push(format!("rules[{position}] differed from the rule in force"));
            }
        }
        for (slot, position) in self.slots.iter().zip(live.slots()..) {
            let wanted = live.moved(*slot);
            if maps.slots.read(position) != wanted {
                maps.slots.write(position, wanted);
                wrong.push(format!("rule_slots[{position}] led to the wrong rules"));
            }
        }
    }
}

impl Live {
    const fn rules(&self) -> u32 {
        (self.half as u32 & 1) * RULE_ROOM
    }

    const fn slots(&self) -> u32 {
        (self.half as u32 & 1) * SLOT_ROOM
    }

    /// A slot as it stands in the maps, where this half may begin behind the other.
    const fn moved(&self, slot: Slot) -> Slot {
        let by = if slot.is_fork() { self.slots() } else { self.rules() };
        if slot.is_empty() { slot } else { Slot::from_raw(slot.raw() + by as u64) }
    }

    fn moved_set(&self, set: &Set) -> TableSet {
        let mut moved = set.as_table_set();
        moved.base += self.slots();
        for table in &mut moved.tables {
            table.root = self.moved(table.root);
        }
        moved
    }
}

/// Waits until no packet reads what was replaced in the maps before the call. Memory of a layout's own is
/// read by none.
fn nobody_reads(live: Option<&Live>) -> bool {
    live.is_none() || grace_period().is_ok()
}

const fn set_of(rule: &Rule) -> usize {
    table_set(rule.direction as u32, rule.family as u32) as usize
}

/// What packets without ports see of a rule, but for its allocation.
type Shape = (Address, Address, u8, u8, [u16; 2], Option<u8>, Option<u8>, bool);

fn shape(rule: &Rule) -> Shape {
    use qos_common::classify::{CHECK_DSCP, CHECK_PORTS, CHECK_PROTOCOL};
    (
        rule.source,
        rule.destination,
        rule.source_length,
        rule.destination_length,
        rule.lengths,
        (rule.checks & CHECK_PROTOCOL != 0).then_some(rule.protocol),
        (rule.checks & CHECK_DSCP != 0).then_some(rule.dscp),
        rule.checks & CHECK_PORTS != 0,
    )
}

/// Of rules that differ in their ports alone the best of each allocation, and of those the best few:
/// packets without ports see no other.
fn deduplicated(list: &[Rule]) -> Vec<Rule> {
    let numbers: Vec<u32> = (0..list.len() as u32).collect();
    without_ports(list, &numbers).into_iter().map(|number| list[number as usize]).collect()
}

fn without_ports(rules: &[Rule], members: &[u32]) -> Vec<u32> {
    let mut seen: HashMap<Shape, HashSet<u32>> = HashMap::new();
    let mut first = members.to_vec();
    first.retain(|&member| {
        let rule = &rules[member as usize];
        let slots = seen.entry(shape(rule)).or_default();
        slots.len() < UNKNOWN_RULES && slots.insert(rule.slot)
    });
    first
}
