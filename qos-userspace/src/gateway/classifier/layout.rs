//! One half: rules laid out in tables, forks and lists, as packets look through them.
//!
//! A layout is made in memory of its own, and may be joined to a half of the maps: from then on each change
//! is made there too. Lists and forks are never changed where they stand: a new one is written into free
//! room, one word makes a slot lead there, and the old one's room is used again after a grace period.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use qos_common::abi::{EXTRA_ROOM, rule_room, slot_room, word_room};
use qos_common::classify::{
    Address, Direction, MAX_FORKS, MAX_LIST, MAX_TABLES, Rule, Slot, TABLE_SETS, Table, TableSet, half_sets,
    hashed_position, table_set,
};
use qos_common::compact::{ANY_TAG, Extra, Granule, Word, granules};

use super::Maps;
use super::cover::{Plan, plan};
use super::field::{Packets, Way, Window, fields};
use super::fork::best_window;
use super::room::{NoRoom, Room};
use crate::gateway::memory::grace_period;
use crate::manager::direction_field;
use crate::manager::report::RuleSetStatistics;

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
    words: Vec<Word>,
    slots: Vec<Slot>,
    rules: Vec<Granule>,
    extras: Extras,
    word_room: Room,
    slot_room: Room,
    rule_room: Room,
    /// How many slots beyond the first hold the list that starts here.
    shared: HashMap<u32, u32>,
    sets: [Set; TABLE_SETS as usize],
    salts: u64,
    live: Option<Live>,
}

/// What few rules name, each once. None is taken out before all rules are laid out anew.
#[derive(Debug)]
struct Extras {
    all: Vec<Extra>,
    numbers: HashMap<Extra, u16>,
}

/// The half of the maps that a layout is joined to.
#[derive(Debug)]
struct Live {
    maps: Arc<Maps>,
    half: u32,
}

/// The tables of one direction and family.
#[derive(Debug, Default)]
struct Set {
    tables: Vec<State>,
    /// As in [`TableSet`].
    words: u32,
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
    Word(u32),
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
        set.words = self.words;
        set.shift = self.shift;
        set
    }

    fn position(&self, hash: u64) -> u32 {
        hashed_position(self.words, self.shift, hash)
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
    /// Tells whether the table has rules.
    fn is_used(&self) -> bool {
        !self.ranks.is_empty()
    }

    /// Tells whether the rule says all that the table's keys are made of.
    fn takes(&self, rule: &Rule) -> bool {
        self.table.source_length <= u32::from(rule.source_length)
            && self.table.destination_length <= u32::from(rule.destination_length)
    }
}

impl Extras {
    fn new() -> Self {
        // Number zero is none.
        Self { all: vec![Extra::default()], numbers: HashMap::new() }
    }

    /// Number of what a rule names; true where it is new.
    fn number(&mut self, rule: &Rule) -> Result<(u16, bool), NoRoom> {
        let Some(extra) = Extra::of(rule) else {
            return Ok((0, false));
        };
        if let Some(&number) = self.numbers.get(&extra) {
            return Ok((number, false));
        }
        let number = u16::try_from(self.all.len()).map_err(|_| NoRoom)?;
        self.all.push(extra);
        self.numbers.insert(extra, number);
        Ok((number, true))
    }
}

impl Layout {
    /// Lays rules out anew, each rank of them once in each set, where there is room for `most` of them.
    pub(super) fn build(rules: &[Rule], most: u32) -> Result<Self, NoRoom> {
        let mut layout = Self {
            words: Vec::new(),
            slots: Vec::new(),
            rules: Vec::new(),
            extras: Extras::new(),
            word_room: Room::new(word_room(most).min(Word::REACH)),
            slot_room: Room::new(slot_room(most).min(Word::REACH)),
            rule_room: Room::new(rule_room(most).min(Word::REACH)),
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
            let plan = plan(rules, members);
            layout.place(set, rules, &plan)?;
        }
        Ok(layout)
    }

    fn place(&mut self, set: usize, rules: &[Rule], plan: &Plan) -> Result<(), NoRoom> {
        let ranks = |members: &[u32]| members.iter().map(|&member| rules[member as usize].rank).collect();
        let hashed: usize = plan.hashed.iter().map(|(_, members)| members.len()).sum();
        let bits = (2 * hashed).next_power_of_two().ilog2().max(FEWEST_BITS);
        self.sets[set].words = self.take_words(1 << bits)?;
        self.sets[set].shift = 64 - bits;
        // Position, number of the rule and tag: the rules of a word come together, best first.
        let mut placed = Vec::with_capacity(hashed);
        for ((source, destination), members) in &plan.hashed {
            let table = Table::hashed(u32::from(*source), u32::from(*destination), self.salt());
            for &member in members {
                let rule = &rules[member as usize];
                let hash = table.hash(family_of(set), rule.source, rule.destination);
                placed.push((self.sets[set].position(hash), rule.rank, member, Word::tag_of(hash)));
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
                self.list(set, rules, &members)?
            };
            self.sets[set].count(0, slot, 1);
            let word = self.word_for(slot, tag)?;
            self.write_word(group[0].0, word);
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

    /// A word that leads to what a slot leads to. A fork is kept in a slot of its own.
    fn word_for(&mut self, slot: Slot, tag: u8) -> Result<Word, NoRoom> {
        if !slot.is_fork() {
            return Ok(if slot.is_empty() { Word::EMPTY } else { Word::list(slot.start(), tag) });
        }
        let position = self.take_slots(1)?;
        self.write_slot(position, slot);
        Ok(Word::fork(position, tag))
    }

    /// What a word leads to.
    fn slot_of(&self, set: usize, word: Word) -> Slot {
        if word.is_fork() {
            return self.slots[word.start() as usize];
        }
        if word.is_empty() {
            return Slot::EMPTY;
        }
        let step = granules(family_of(set));
        let mut count = 1;
        while !self.rules[(word.start() + count * step) as usize - 1].is_last() {
            count += 1;
        }
        Slot::list(word.start(), count)
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
        let family = family_of(set) as u8;
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
            let slot = self.list(set, rules, members)?;
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
    fn list(&mut self, set: usize, rules: &[Rule], members: &[u32]) -> Result<Slot, NoRoom> {
        let list: Vec<Rule> = members.iter().map(|&member| rules[member as usize]).collect();
        self.write_list(set, &list)
    }

    fn write_list(&mut self, set: usize, list: &[Rule]) -> Result<Slot, NoRoom> {
        let Some(last) = list.last() else {
            return Ok(Slot::EMPTY);
        };
        let count = list.len() as u32;
        if count > MAX_LIST {
            return Err(NoRoom);
        }
        let step = granules(family_of(set)) as usize;
        let mut packed = Vec::with_capacity(list.len() * step);
        for rule in list {
            let (extra, is_new) = self.extras.number(rule)?;
            if let Some(live) = self.live.as_ref().filter(|_| is_new) {
                live.maps.extras.write(live.extras() + u32::from(extra), self.extras.all[usize::from(extra)]);
            }
            packed.extend(&Granule::of(rule, extra, rule.rank == last.rank)[..step]);
        }
        let start = self.take_rules(packed.len() as u32)?;
        self.rules[start as usize..start as usize + packed.len()].copy_from_slice(&packed);
        if let Some(live) = &self.live {
            for (granule, position) in packed.iter().zip(live.rules() + start..) {
                live.maps.rules.write(position, *granule);
            }
        }
        Ok(Slot::list(start, count))
    }

    fn take_rules(&mut self, count: u32) -> Result<u32, NoRoom> {
        let start = self.rule_room.take_or_wait(count, || nobody_reads(self.live.as_ref()))?;
        let end = (start + count) as usize;
        self.rules.resize(end.max(self.rules.len()), Granule::default());
        Ok(start)
    }

    /// Takes `count` words, all empty.
    fn take_words(&mut self, count: u32) -> Result<u32, NoRoom> {
        let start = self.word_room.take(count).ok_or(NoRoom)?;
        self.words.resize(self.words.len().max((start + count) as usize), Word::EMPTY);
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
            live.maps.slots.write(live.slots() + position, slot);
        }
    }

    fn write_word(&mut self, position: u32, word: Word) {
        self.words[position as usize] = word;
        if let Some(live) = &self.live {
            live.maps.words.write((live.words() + position) / 2, self.pair(position / 2));
        }
    }

    /// Two words that stand in one value.
    fn pair(&self, number: u32) -> u64 {
        let at = number as usize * 2;
        u64::from(self.words[at].raw()) | u64::from(self.words[at + 1].raw()) << 32
    }

    /// What has changed of a set's tables, word by word: what each packet reads of them at once.
    fn write_tables(&self, set: usize) {
        if let Some(live) = &self.live {
            live.maps
                .tables
                .update(half_sets(u64::from(live.half)) + set as u32, &live.table_set(&self.sets[set]));
        }
    }

    /// Puts a list in its place, which has no fork; a word gets the tag.
    fn write(&mut self, set: usize, place: Place, list: Slot, tag: u8) {
        match place {
            Place::Root(table) => {
                self.sets[set].tables[table].table.root = list;
                self.write_tables(set);
            }
            Place::Slot(position) => self.write_slot(position, list),
            Place::Word(position) => {
                let word = if list.is_empty() { Word::EMPTY } else { Word::list(list.start(), tag) };
                self.write_word(position, word);
            }
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
                None => self.rule_room.retire(slot.start(), slot.count() * granules(family_of(set))),
            }
        }
    }

    fn rules_of(&self, set: usize, list: Slot) -> Vec<Rule> {
        let (direction, family) = ((set >> 1) as u8, family_of(set));
        let step = granules(family) as usize;
        let packed = &self.rules[list.start() as usize..][..list.count() as usize * step];
        packed
            .chunks_exact(step)
            .map(|rule| {
                let rest = &rule[step - 1];
                let extra = self.extras.all[rest.extra() as usize];
                Granule::rule([rule[0], *rest], direction, family as u8, extra)
            })
            .collect()
    }

    /// The slots that packets of a rule may be led to in a table; none if they are more than `limit`.
    fn leaves(&self, set: usize, table: usize, rule: &Rule, limit: usize) -> Option<Vec<Leaf>> {
        let state = &self.sets[set].tables[table];
        let (place, slot) = if state.hashes {
            let hash = state.table.hash(u32::from(rule.family), rule.source, rule.destination);
            let position = self.sets[set].position(hash);
            (Place::Word(position), self.slot_of(set, self.words[position as usize]))
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
        let tag = self.admit(set, table, rule);
        let changed = self.change(set, &leaves, |mut list, unknown| {
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
        let changed = self.change(set, &leaves, |mut list, _| {
            // In one direction and family a rank names one rule.
            list.retain(|other| other.rank != rule.rank);
            list
        })?;
        let tag = self.admit(set, table, rule);
        self.publish(set, table, &leaves, &changed, tag);
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
        set: usize,
        leaves: &[Leaf],
        change: impl Fn(Vec<Rule>, bool) -> Vec<Rule>,
    ) -> Result<Vec<Slot>, NoRoom> {
        let mut made: HashMap<(u64, bool), Slot> = HashMap::new();
        let mut changed = Vec::with_capacity(leaves.len());
        for leaf in leaves {
            let unknown = leaf.way.packets == Packets::Unknown;
            let name = (leaf.slot.raw(), unknown);
            let slot = match made.get(&name) {
                Some(&slot) => {
                    if !slot.is_empty() {
                        *self.shared.entry(slot.start()).or_default() += 1;
                    }
                    slot
                }
                None => {
                    let list = change(self.rules_of(set, leaf.slot), unknown);
                    match self.write_list(set, &list) {
                        Ok(slot) => {
                            made.insert(name, slot);
                            slot
                        }
                        Err(error) => {
                            let step = granules(family_of(set));
                            for slot in made.into_values().filter(|slot| !slot.is_empty()) {
                                self.shared.remove(&slot.start());
                                self.rule_room.release(slot.start(), slot.count() * step);
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

    /// Puts changed lists in their places; what was there is given back.
    fn publish(&mut self, set: usize, table: usize, leaves: &[Leaf], changed: &[Slot], tag: u8) {
        for (leaf, &slot) in leaves.iter().zip(changed) {
            self.write(set, leaf.place, slot, tag);
            self.sets[set].count(table, leaf.slot, -1);
            self.sets[set].count(table, slot, 1);
            self.drop_slot(set, table, leaf.slot);
        }
    }

    /// Makes the word that a rule is led by admit its packets. Returns the word's tag.
    fn admit(&mut self, set: usize, table: usize, rule: &Rule) -> u8 {
        let state = &self.sets[set].tables[table];
        if !state.hashes {
            return ANY_TAG;
        }
        let hash = state.table.hash(u32::from(rule.family), rule.source, rule.destination);
        let position = self.sets[set].position(hash);
        let (word, tag) = (self.words[position as usize], Word::tag_of(hash));
        if word.is_empty() || word.tag() == tag {
            return tag;
        }
        if word.tag() != ANY_TAG {
            self.write_word(position, word.with_tag(ANY_TAG));
        }
        ANY_TAG
    }

    /// Divides the list at the end of a way by forks, if that helps.
    fn divide(&mut self, set: usize, table: usize, leaf: &Leaf) {
        let slot = match leaf.place {
            Place::Root(table) => self.sets[set].tables[table].table.root,
            Place::Slot(position) => self.slots[position as usize],
            Place::Word(position) => self.slot_of(set, self.words[position as usize]),
        };
        let rules = self.rules_of(set, slot);
        let members: Vec<u32> = (0..rules.len() as u32).collect();
        let Ok(grown) = self.grow(set, table, &rules, &members, &leaf.way, COPIES * rules.len() + 64) else {
            // Its rules are found where they are.
            return;
        };
        if !grown.is_fork() || self.put_fork(set, leaf.place, grown).is_err() {
            self.drop_slot(set, table, grown);
            return;
        }
        self.sets[set].count(table, slot, -1);
        self.drop_slot(set, table, slot);
    }

    /// Puts a fork in the place of a list.
    fn put_fork(&mut self, set: usize, place: Place, fork: Slot) -> Result<(), NoRoom> {
        match place {
            Place::Root(table) => {
                self.sets[set].tables[table].table.root = fork;
                self.write_tables(set);
            }
            Place::Slot(position) => self.write_slot(position, fork),
            Place::Word(position) => {
                let word = self.word_for(fork, self.words[position as usize].tag())?;
                self.write_word(position, word);
            }
        }
        Ok(())
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

    /// The longest list that packets of one of these rules may be led to, without the rules themselves.
    pub(super) fn longest_list_with(&self, rules: &[Rule]) -> Vec<Rule> {
        let mut longest: Option<(usize, Slot)> = None;
        for rule in rules {
            let set = set_of(rule);
            let holds = |state: &State| state.ranks.contains(&rule.rank);
            let Some(table) = self.sets[set].tables.iter().position(holds) else { continue };
            for leaf in self.leaves(set, table, rule, usize::MAX).unwrap_or_default() {
                if longest.is_none_or(|(_, slot)| slot.count() < leaf.slot.count()) {
                    longest = Some((set, leaf.slot));
                }
            }
        }
        let mut list = longest.map(|(set, slot)| self.rules_of(set, slot)).unwrap_or_default();
        list.retain(|rule| !rules.iter().any(|new| new.rank == rule.rank));
        list
    }

    /// What the tables of each direction and family hold.
    pub(super) fn statistics(&self) -> Vec<RuleSetStatistics> {
        let sets = self.sets.iter().enumerate().filter(|(_, set)| set.tables.iter().any(State::is_used));
        sets.map(|(number, set)| {
            let (hashed, trees): (Vec<_>, Vec<_>) =
                set.tables.iter().filter(|state| state.is_used()).partition(|state| state.hashes);
            let rules = |tables: &[&State]| tables.iter().map(|state| state.ranks.len() as u32).sum();
            let longest = |lists: &BTreeMap<usize, usize>| {
                lists.last_key_value().map_or((0, 0), |(length, count)| (*length as u32, *count as u32))
            };
            RuleSetStatistics {
                direction: direction_field(Direction::from_bit(number as u32 >> 1)).to_owned(),
                family: if family_of(number) == 0 { "ipv4" } else { "ipv6" }.to_owned(),
                hash_tables: hashed.len() as u32,
                hashed_rules: rules(&hashed),
                trees: trees.len() as u32,
                tree_rules: rules(&trees),
                longest_hashed: longest(&set.hashed_lists),
                longest_in_trees: trees.iter().map(|state| longest(&state.lists)).max().unwrap_or_default(),
                worst_case_comparisons: set.most_checks() as u32,
            }
        })
        .collect()
    }

    /// Most rules that a packet may be compared with.
    pub(super) fn most_checks(&self) -> usize {
        self.sets.iter().map(Set::most_checks).max().unwrap_or(0)
    }

    /// Writes everything into a half of the maps; from now on it is kept there too. Packets don't look
    /// through that half now.
    pub(super) fn join(&mut self, maps: &Arc<Maps>, half: u32) {
        let live = Live { maps: Arc::clone(maps), half };
        for (granule, position) in self.rules.iter().zip(live.rules()..) {
            maps.rules.write(position, *granule);
        }
        for (extra, position) in self.extras.all.iter().zip(live.extras()..) {
            maps.extras.write(position, *extra);
        }
        for (slot, position) in self.slots.iter().zip(live.slots()..) {
            maps.slots.write(position, *slot);
        }
        for number in 0..self.words.len() as u32 / 2 {
            maps.words.write(live.words() / 2 + number, self.pair(number));
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
        for (set, number) in self.sets.iter().zip(half_sets(u64::from(live.half))..) {
            if maps.tables.put(number, live.table_set(set)) {
                wrong.push(format!("tables[{number}] differed from the rules in force"));
            }
        }
        for (granule, position) in self.rules.iter().zip(live.rules()..) {
            if maps.rules.put(position, *granule) {
                wrong.push(format!("rules[{position}] differed from the rule in force"));
            }
        }
        for (extra, position) in self.extras.all.iter().zip(live.extras()..) {
            if maps.extras.put(position, *extra) {
                wrong.push(format!("rule_extras[{position}] differed from what rules name"));
            }
        }
        for (slot, position) in self.slots.iter().zip(live.slots()..) {
            if maps.slots.put(position, *slot) {
                wrong.push(format!("rule_slots[{position}] led to the wrong rules"));
            }
        }
        for number in 0..self.words.len() as u32 / 2 {
            let position = live.words() / 2 + number;
            if maps.words.put(position, self.pair(number)) {
                wrong.push(format!("rule_words[{position}] led to the wrong rules"));
            }
        }
    }
}

impl Live {
    fn words(&self) -> u32 {
        self.half * self.maps.word_room()
    }

    fn slots(&self) -> u32 {
        self.half * self.maps.slot_room()
    }

    fn rules(&self) -> u32 {
        self.half * self.maps.rule_room()
    }

    const fn extras(&self) -> u32 {
        self.half * EXTRA_ROOM
    }

    fn table_set(&self, set: &Set) -> TableSet {
        let mut set = set.as_table_set();
        set.words += self.words();
        set.slots = self.slots();
        set.rules = self.rules();
        set.extras = self.extras();
        set
    }
}

/// Waits until no packet reads what was replaced in the maps before the call. Memory of a layout's own is
/// read by none.
fn nobody_reads(live: Option<&Live>) -> bool {
    live.is_none() || grace_period().is_ok()
}

const fn family_of(set: usize) -> u32 {
    set as u32 & 1
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
