//! The classifier's rules in memory that the kernel programs read.
//!
//! A rule is put into one table, and with it into the list of one index slot. Lists are never
//! changed where they stand: a new list is written into free room, one aligned word makes the slot
//! point to it, and the old list's room is used again only after a grace period. A packet therefore
//! sees the old list or the new one.
//!
//! Tables are chosen as rules come: the most specific table that keeps lists short, a new one while
//! there is a place for it. The structure is described in `qos_common::classify`.

use std::collections::{BTreeMap, HashMap};

use qos_common::abi::{MAX_RULES, RULE_ROOM};
use qos_common::classify::{
    Family, INDEX_SLOTS, IndexSlot, MAX_TABLES, Rule, TABLE_SETS, Table, TableSet, slot_of_rule, table_set,
};

use super::memory::{SharedArray, grace_period};

/// Longest list that a table is chosen for while another choice is left.
const SHORT_LIST: usize = 8;

/// Prefix lengths that tables are made with, so that rules of many lengths share a few.
const STEPS_V4: [u8; 5] = [32, 24, 16, 8, 0];
const STEPS_V6: [u8; 8] = [128, 96, 64, 56, 48, 32, 16, 0];

/// Why rules were not taken. What was there before is untouched.
#[derive(Debug, thiserror::Error)]
pub enum ClassifierError {
    /// There are too many rules.
    #[error("{asked} rules do not fit: {used} of {MAX_RULES} are in use")]
    Full {
        /// Rules that were to be added.
        asked: usize,
        /// Rules in use.
        used: usize,
    },
    /// The room for lists is too fragmented.
    #[error("no room for a list of {0} rules; revoke allocations with many selectors on the same addresses")]
    NoRoom(usize),
    /// The kernel can't tell when a grace period has passed.
    #[error("membarrier: {0}")]
    Grace(#[from] std::io::Error),
}

/// What names a rule: its rank, direction and family.
type RuleName = (u64, u8, u8);

/// The rules, and the three maps that hold them.
#[derive(Debug)]
pub struct Classifier {
    tables: SharedArray<TableSet>,
    index: SharedArray<IndexSlot>,
    rules: SharedArray<Rule>,
    sets: [Vec<TableState>; TABLE_SETS as usize],
    lists: HashMap<u32, List>,
    /// Where each rule stands: its set, table and slot.
    places: HashMap<RuleName, (usize, usize, u32)>,
    room: Room,
}

/// A table as userspace knows it.
#[derive(Debug)]
struct TableState {
    source_length: u8,
    destination_length: u8,
    /// Ranks of its rules and how many have each.
    ranks: BTreeMap<u64, u32>,
}

impl TableState {
    fn takes(&self, rule: &Rule) -> bool {
        self.source_length <= rule.source_length && self.destination_length <= rule.destination_length
    }

    fn as_table(&self) -> Table {
        let best = self.ranks.keys().next().copied().unwrap_or(u64::MAX);
        Table::new(best, u32::from(self.source_length), u32::from(self.destination_length))
    }
}

/// The rules of one index slot, best first, and where they stand.
#[derive(Debug, Default)]
struct List {
    start: u32,
    rules: Vec<Rule>,
}

impl Classifier {
    /// An empty classifier over the maps `tables`, `rule_index` and `rules`, which it clears.
    #[must_use]
    pub fn new(
        tables: SharedArray<TableSet>,
        index: SharedArray<IndexSlot>,
        rules: SharedArray<Rule>,
    ) -> Self {
        let room = Room::new(rules.length());
        let classifier = Self {
            tables,
            index,
            rules,
            sets: Default::default(),
            lists: HashMap::new(),
            places: HashMap::new(),
            room,
        };
        for set in 0..TABLE_SETS {
            classifier.tables.write(set, EMPTY_SET);
        }
        for slot in 0..INDEX_SLOTS {
            classifier.index.write(slot, IndexSlot::EMPTY);
        }
        classifier
    }

    /// A classifier over maps that an earlier instance filled, told which rules they must hold.
    ///
    /// The maps keep serving packets as they are until `rules` has been laid out; then every table
    /// and slot is replaced, one word at a time, so that no packet misses a rule that both have.
    ///
    /// # Errors
    /// Where the rules don't fit.
    pub fn take_over(
        tables: SharedArray<TableSet>,
        index: SharedArray<IndexSlot>,
        memory: SharedArray<Rule>,
        rules: &[Rule],
    ) -> Result<Self, ClassifierError> {
        let plan = |length| SharedArray::private(length).map_err(ClassifierError::Grace);
        let mut new = Self::new(plan_tables()?, plan_index()?, plan(memory.length())?);
        // Room that the old lists occupy is not free until nobody reads them any longer.
        let mut occupied: Vec<_> =
            (0..INDEX_SLOTS).map(|slot| index.read(slot)).filter(|slot| slot.count() > 0).collect();
        occupied.sort_unstable_by_key(|slot| slot.start());
        for slot in &occupied {
            new.room.reserve(slot.start(), slot.count());
        }
        new.insert(rules)?;
        for list in new.lists.values() {
            write_list(&memory, list);
        }
        // While both sets of tables are in force a packet may look through either: first the
        // tables of both, then the lists, then the new tables alone.
        let old_sets: Vec<_> = (0..TABLE_SETS).map(|set| tables.read(set)).collect();
        for (number, old) in old_sets.iter().enumerate() {
            if let Some(both) = union(old, &new.tables.read(number as u32)) {
                tables.write(number as u32, both);
            }
        }
        for slot in 0..INDEX_SLOTS {
            let (old, planned) = (index.read(slot), new.index.read(slot));
            if old != planned {
                index.write(slot, planned);
            }
        }
        for set in 0..TABLE_SETS {
            tables.write(set, new.tables.read(set));
        }
        grace_period()?;
        new.room.release_retired();
        for slot in occupied {
            new.room.release(slot.start(), slot.count());
        }
        Ok(Self { tables, index, rules: memory, ..new })
    }

    /// Number of rules.
    #[must_use]
    pub fn count(&self) -> usize {
        self.places.len()
    }

    /// Most rules that one packet may be compared with: for each direction and family the longest
    /// lists of all its tables together.
    #[must_use]
    pub fn worst_case(&self) -> usize {
        let mut longest: HashMap<(usize, usize), usize> = HashMap::new();
        for (set, table, slot) in self.places.values() {
            let length = self.lists.get(slot).map_or(0, |list| list.rules.len());
            let entry = longest.entry((*set, *table)).or_default();
            *entry = length.max(*entry);
        }
        (0..TABLE_SETS as usize)
            .map(|number| longest.iter().filter(|((set, _), _)| *set == number).map(|(_, n)| n).sum())
            .max()
            .unwrap_or(0)
    }

    /// Adds rules; a packet sees each of them from the moment it is in its list.
    ///
    /// # Errors
    /// Where they don't all fit; none is added then.
    pub fn insert(&mut self, rules: &[Rule]) -> Result<(), ClassifierError> {
        if self.places.len() + rules.len() > MAX_RULES as usize {
            return Err(ClassifierError::Full { asked: rules.len(), used: self.places.len() });
        }
        for (done, rule) in rules.iter().enumerate() {
            if let Err(error) = self.insert_one(rule) {
                self.remove(&rules[..done])?;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Removes rules. Those that are not there are passed over.
    ///
    /// # Errors
    /// Where the shortened lists find no room.
    pub fn remove(&mut self, rules: &[Rule]) -> Result<(), ClassifierError> {
        for rule in rules {
            self.remove_one(rule)?;
        }
        Ok(())
    }

    /// Compares the maps with what they must hold, and puts right what differs. Returns what was
    /// wrong.
    pub fn repair(&mut self) -> Vec<String> {
        let mut wrong = Vec::new();
        for number in 0..TABLE_SETS {
            let wanted = as_set(&self.sets[number as usize]);
            if self.tables.read(number) != wanted {
                self.tables.write(number, wanted);
                wrong.push(format!("tables[{number}] differed from the rules in force"));
            }
        }
        for list in self.lists.values() {
            for (rule, position) in list.rules.iter().zip(list.start..) {
                if self.rules.read(position) != *rule {
                    self.rules.write(position, *rule);
                    wrong.push(format!("rules[{position}] differed from the rule in force"));
                }
            }
        }
        for slot in 0..INDEX_SLOTS {
            let wanted = self.lists.get(&slot).map_or(IndexSlot::EMPTY, List::as_slot);
            if self.index.read(slot) != wanted {
                self.index.write(slot, wanted);
                wrong.push(format!("rule_index[{slot}] pointed to the wrong rules"));
            }
        }
        wrong
    }

    fn insert_one(&mut self, rule: &Rule) -> Result<(), ClassifierError> {
        let name = (rule.rank, rule.direction, rule.family);
        if self.places.contains_key(&name) {
            self.remove_one(rule)?;
        }
        let set = table_set(u32::from(rule.direction), u32::from(rule.family)) as usize;
        let (table, slot) = self.choose(set, rule);
        let mut rules = self.lists.get(&slot).map(|list| list.rules.clone()).unwrap_or_default();
        let at = rules.partition_point(|other| other.rank < rule.rank);
        rules.insert(at, *rule);
        let start = self.allocate(rules.len())?;
        *self.sets[set][table].ranks.entry(rule.rank).or_default() += 1;
        // The table first: a list that no table leads to is not found.
        self.publish_tables(set);
        self.publish_list(slot, List { start, rules });
        self.places.insert(name, (set, table, slot));
        Ok(())
    }

    fn remove_one(&mut self, rule: &Rule) -> Result<(), ClassifierError> {
        let name = (rule.rank, rule.direction, rule.family);
        let Some(&(set, table, slot)) = self.places.get(&name) else {
            return Ok(());
        };
        let mut rules = self.lists.get(&slot).map(|list| list.rules.clone()).unwrap_or_default();
        rules.retain(|other| (other.rank, other.direction, other.family) != name);
        let start = self.allocate(rules.len())?;
        self.publish_list(slot, List { start, rules });
        self.places.remove(&name);
        let ranks = &mut self.sets[set][table].ranks;
        if let Some(count) = ranks.get_mut(&rule.rank) {
            *count -= 1;
            if *count == 0 {
                ranks.remove(&rule.rank);
            }
        }
        self.publish_tables(set);
        Ok(())
    }

    /// Index of the table that a rule goes into, made if need be, and the slot it leads to.
    fn choose(&mut self, set: usize, rule: &Rule) -> (usize, u32) {
        let best = self.sets[set]
            .iter()
            .enumerate()
            .filter(|(_, table)| table.takes(rule) && !table.ranks.is_empty())
            .map(|(number, table)| {
                let slot = slot_of_rule(rule, &table.as_table());
                let length = self.lists.get(&slot).map_or(0, |list| list.rules.len());
                let bits = u32::from(table.source_length) + u32::from(table.destination_length);
                (number, slot, length, bits)
            })
            .min_by_key(|&(_, _, length, bits)| (length / SHORT_LIST, u32::MAX - bits));
        if let Some((number, slot, length, _)) = best
            && length < SHORT_LIST
        {
            return (number, slot);
        }
        let family = if rule.family == Family::V6 as u8 { Family::V6 } else { Family::V4 };
        let stepped = (step(family, rule.source_length), step(family, rule.destination_length));
        let exact = (rule.source_length, rule.destination_length);
        // The last place is kept for the table that takes every rule.
        for lengths in [stepped, exact, (0, 0)] {
            if let Some(number) = self.make_table(set, lengths) {
                return (number, slot_of_rule(rule, &self.sets[set][number].as_table()));
            }
        }
        match best {
            Some((number, slot, ..)) => (number, slot),
            None => unreachable!("the last place takes the table of length 0, which takes every rule"),
        }
    }

    /// Makes a table of these lengths, unless there is one or no place is left for it.
    fn make_table(&mut self, set: usize, lengths: (u8, u8)) -> Option<usize> {
        let tables = &mut self.sets[set];
        let in_use = |table: &TableState| !table.ranks.is_empty();
        if tables
            .iter()
            .any(|table| in_use(table) && (table.source_length, table.destination_length) == lengths)
        {
            return None;
        }
        let state =
            TableState { source_length: lengths.0, destination_length: lengths.1, ranks: BTreeMap::new() };
        let places = if lengths == (0, 0) { MAX_TABLES } else { MAX_TABLES - 1 };
        if tables.iter().filter(|table| in_use(table)).count() >= places {
            return None;
        }
        match tables.iter().position(|table| !in_use(table)) {
            Some(free) => {
                tables[free] = state;
                Some(free)
            }
            None => {
                tables.push(state);
                Some(tables.len() - 1)
            }
        }
    }

    fn publish_tables(&mut self, set: usize) {
        self.tables.write(set as u32, as_set(&self.sets[set]));
    }

    fn publish_list(&mut self, slot: u32, list: List) {
        write_list(&self.rules, &list);
        self.index.write(slot, list.as_slot());
        let old =
            if list.rules.is_empty() { self.lists.remove(&slot) } else { self.lists.insert(slot, list) };
        if let Some(old) = old {
            self.room.retire(old.start, old.rules.len() as u32);
        }
    }

    /// Finds room for a list, waiting for a grace period if old lists must make it.
    fn allocate(&mut self, length: usize) -> Result<u32, ClassifierError> {
        let length = length as u32;
        if let Some(start) = self.room.take(length) {
            return Ok(start);
        }
        grace_period()?;
        self.room.release_retired();
        self.room.take(length).ok_or(ClassifierError::NoRoom(length as usize))
    }
}

impl List {
    fn as_slot(&self) -> IndexSlot {
        IndexSlot::new(self.start, self.rules.len() as u32)
    }
}

const EMPTY_SET: TableSet = TableSet { tables: [Table::EMPTY; MAX_TABLES], used: 0, reserved: 0 };

fn as_set(states: &[TableState]) -> TableSet {
    let mut set = EMPTY_SET;
    for (place, state) in set.tables.iter_mut().zip(states) {
        *place = state.as_table();
    }
    set.used = states.len() as u32;
    set
}

/// Tables of both sets, if they fit.
fn union(old: &TableSet, new: &TableSet) -> Option<TableSet> {
    let in_use = |set: &TableSet| set.tables[..(set.used as usize).min(MAX_TABLES)].to_vec();
    let mut tables = in_use(new);
    for table in in_use(old) {
        let same = |other: &&mut Table| {
            (other.source_length, other.destination_length) == (table.source_length, table.destination_length)
        };
        match tables.iter_mut().find(same) {
            Some(other) => other.best = other.best.min(table.best),
            None => tables.push(table),
        }
    }
    if tables.len() > MAX_TABLES {
        return None;
    }
    let mut both = EMPTY_SET;
    both.used = tables.len() as u32;
    for (place, table) in both.tables.iter_mut().zip(tables) {
        *place = table;
    }
    Some(both)
}

fn write_list(memory: &SharedArray<Rule>, list: &List) {
    for (rule, position) in list.rules.iter().zip(list.start..) {
        memory.write(position, *rule);
    }
}

fn plan_tables() -> Result<SharedArray<TableSet>, ClassifierError> {
    Ok(SharedArray::private(TABLE_SETS)?)
}

fn plan_index() -> Result<SharedArray<IndexSlot>, ClassifierError> {
    Ok(SharedArray::private(INDEX_SLOTS)?)
}

/// The longest step that is not above `length`.
fn step(family: Family, length: u8) -> u8 {
    let steps: &[u8] = match family {
        Family::V4 => &STEPS_V4,
        Family::V6 => &STEPS_V6,
    };
    steps.iter().copied().find(|&step| step <= length).unwrap_or(0)
}

/// Free room for lists: first fit over runs that are joined when they meet.
#[derive(Debug)]
struct Room {
    /// Free runs: start and length.
    free: BTreeMap<u32, u32>,
    /// Runs that programs may still read.
    retired: Vec<(u32, u32)>,
}

impl Room {
    fn new(length: u32) -> Self {
        Self { free: BTreeMap::from([(0, length.min(RULE_ROOM))]), retired: Vec::new() }
    }

    /// Start of a run of `length`; zero needs none.
    fn take(&mut self, length: u32) -> Option<u32> {
        if length == 0 {
            return Some(0);
        }
        let (start, free) = self.free.iter().map(|(s, f)| (*s, *f)).find(|&(_, free)| free >= length)?;
        self.free.remove(&start);
        if free > length {
            self.free.insert(start + length, free - length);
        }
        Some(start)
    }

    /// Takes a certain run out of what is free, as far as it is.
    fn reserve(&mut self, start: u32, length: u32) {
        let end = start.saturating_add(length);
        let overlapping: Vec<_> =
            self.free.range(..end).map(|(s, f)| (*s, *f)).filter(|&(s, f)| s + f > start).collect();
        for (run, free) in overlapping {
            self.free.remove(&run);
            if run < start {
                self.free.insert(run, start - run);
            }
            if run + free > end {
                self.free.insert(end, run + free - end);
            }
        }
    }

    fn retire(&mut self, start: u32, length: u32) {
        if length > 0 {
            self.retired.push((start, length));
        }
    }

    fn release_retired(&mut self) {
        for (start, length) in std::mem::take(&mut self.retired) {
            self.release(start, length);
        }
    }

    fn release(&mut self, mut start: u32, mut length: u32) {
        if let Some((&before, &free)) = self.free.range(..start).next_back()
            && before + free == start
        {
            self.free.remove(&before);
            start = before;
            length += free;
        }
        if let Some(free) = self.free.remove(&(start + length)) {
            length += free;
        }
        self.free.insert(start, length);
    }
}

/// Finds the rule that a packet matches as the kernel does, from the maps alone; for tests and for
/// checking a take-over. Rules of expired allocations are the caller's to leave out.
#[must_use]
pub fn look_up(
    tables: &SharedArray<TableSet>,
    index: &SharedArray<IndexSlot>,
    rules: &SharedArray<Rule>,
    key: &qos_common::classify::Key,
) -> Option<Rule> {
    let set = tables.read(table_set(key.direction, key.family));
    let mut best: Option<Rule> = None;
    for table in &set.tables[..(set.used as usize).min(MAX_TABLES)] {
        if best.is_some_and(|best| table.best >= best.rank) {
            continue;
        }
        let list = index.read(qos_common::classify::slot_of_key(key, table));
        for position in (list.start()..).take(list.count() as usize) {
            let rule = rules.read(position);
            if best.is_some_and(|best| rule.rank >= best.rank) {
                break;
            }
            if rule.matches(key) {
                best = Some(rule);
                break;
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use qos_common::classify::{Address, CHECK_PORTS, CHECK_PROTOCOL, Key, rank};

    fn empty() -> Classifier {
        Classifier::new(
            plan_tables().expect("memory"),
            plan_index().expect("memory"),
            SharedArray::private(RULE_ROOM).expect("memory"),
        )
    }

    fn open_rule(id: u64) -> Rule {
        Rule {
            rank: rank(0, id, 0),
            slot: id as u32,
            source_ports: [0, u16::MAX],
            destination_ports: [0, u16::MAX],
            lengths: [0, u16::MAX],
            ..Rule::default()
        }
    }

    /// Rules over a small world, so that they overlap.
    fn any_rule() -> impl Strategy<Value = Rule> {
        let lengths = prop_oneof![Just(0u8), Just(8), Just(16), Just(24), Just(31), Just(32), 0u8..=32];
        (
            (0u8..4, 0u8..4, 0u8..4, 0u8..4),
            (lengths.clone(), lengths),
            prop_oneof![Just(None), (0u16..4).prop_map(Some)],
            any::<bool>(),
            0u8..2,
        )
            .prop_map(|(octets, (source_length, destination_length), port, tcp, direction)| {
                let (a, b, c, d) = octets;
                let mut rule = open_rule(0);
                rule.source = Address::v4([10, a, b, c]).prefix(u32::from(source_length));
                rule.destination = Address::v4([10, d, c, a]).prefix(u32::from(destination_length));
                rule.source_length = source_length;
                rule.destination_length = destination_length;
                rule.direction = direction;
                if tcp {
                    rule.checks |= CHECK_PROTOCOL;
                    rule.protocol = 6;
                }
                if let Some(port) = port {
                    rule.checks |= CHECK_PORTS;
                    rule.destination_ports = [port, port + 1];
                }
                rule
            })
    }

    fn any_key() -> impl Strategy<Value = Key> {
        ((0u8..4, 0u8..4, 0u8..4, 0u8..4), 0u16..5, any::<bool>(), 0u32..2).prop_map(
            |((a, b, c, d), port, tcp, direction)| Key {
                source: Address::v4([10, a, b, c]),
                destination: Address::v4([10, d, c, a]),
                direction,
                family: 0,
                unknown: 0,
                source_port: 9,
                destination_port: port,
                length: 100,
                protocol: if tcp { 6 } else { 17 },
                dscp: 0,
                reserved: 0,
            },
        )
    }

    fn by_linear_search(rules: &[Rule], key: &Key) -> Option<Rule> {
        rules.iter().filter(|rule| rule.matches(key)).min_by_key(|rule| rule.rank).copied()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn agrees_with_linear_search_through_any_history(
            steps in prop::collection::vec((any_rule(), any::<bool>(), any::<u16>()), 1..200),
            keys in prop::collection::vec(any_key(), 50),
        ) {
            let mut classifier = empty();
            let mut rules: Vec<Rule> = Vec::new();
            for (id, (mut rule, add, victim)) in (1u64..).zip(steps) {
                if add || rules.is_empty() {
                    rule.rank = rank(victim % 3, id, 0);
                    rule.slot = id as u32;
                    classifier.insert(&[rule]).expect("fits");
                    rules.push(rule);
                } else {
                    let victim = rules.swap_remove(usize::from(victim) % rules.len());
                    classifier.remove(&[victim]).expect("fits");
                }
            }
            prop_assert_eq!(classifier.count(), rules.len());
            prop_assert!(classifier.repair().is_empty());
            for key in &keys {
                let found = look_up(&classifier.tables, &classifier.index, &classifier.rules, key);
                prop_assert_eq!(found, by_linear_search(&rules, key));
            }
        }
    }

    #[test]
    fn ten_thousand_rules_of_one_address_are_held_and_found() {
        let mut classifier = empty();
        let rules: Vec<Rule> = (1..=10_000)
            .map(|id| Rule {
                checks: CHECK_PORTS,
                destination_ports: [id as u16, id as u16],
                ..open_rule(id)
            })
            .collect();
        classifier.insert(&rules).expect("fits");
        assert_eq!(classifier.worst_case(), 10_000);
        let key = Key { destination_port: 9_999, protocol: 17, ..zero_key() };
        let found = look_up(&classifier.tables, &classifier.index, &classifier.rules, &key);
        assert_eq!(found.map(|rule| rule.slot), Some(9_999));
    }

    #[test]
    fn more_rules_than_fit_are_refused_whole() {
        let mut classifier = empty();
        let rules: Vec<Rule> = (1..=u64::from(MAX_RULES) + 1).map(spread).collect();
        let error = classifier.insert(&rules).expect_err("one too many");
        assert!(matches!(error, ClassifierError::Full { used: 0, .. }), "{error}");
        assert_eq!(classifier.count(), 0);
        classifier.insert(&rules[1..]).expect("exactly full");
        assert!(matches!(classifier.insert(&rules[..1]), Err(ClassifierError::Full { .. })));
        // Room is used again, however often rules come and go.
        for _ in 0..3 {
            classifier.remove(&rules[1..]).expect("removes");
            classifier.insert(&rules[1..]).expect("fits again");
        }
        assert!(classifier.repair().is_empty());
    }

    #[test]
    fn what_somebody_changed_is_put_right_and_named() {
        let mut classifier = empty();
        let rule = spread(7);
        classifier.insert(&[rule]).expect("fits");
        let (_, _, slot) = classifier.places[&(rule.rank, 0, 0)];
        let start = classifier.lists[&slot].start;
        classifier.index.write(slot, IndexSlot::EMPTY);
        classifier.index.write(slot ^ 1, IndexSlot::new(3, 9));
        classifier.rules.write(start, Rule::default());
        classifier.tables.write(0, EMPTY_SET);
        assert_eq!(classifier.repair().len(), 4);
        assert!(classifier.repair().is_empty());
    }

    #[test]
    fn a_take_over_serves_the_new_rules_and_reuses_room() {
        let mut old = empty();
        let rules: Vec<Rule> = (1..=5_000).map(spread).collect();
        old.insert(&rules).expect("fits");
        let Classifier { tables, index, rules: memory, .. } = old;
        let mut new = Classifier::take_over(tables, index, memory, &rules[1_000..]).expect("fits");
        assert!(new.repair().is_empty());
        for rule in &rules {
            let key = Key { destination: rule.destination, ..zero_key() };
            let found = look_up(&new.tables, &new.index, &new.rules, &key);
            let expected = by_linear_search(&rules[1_000..], &key);
            assert_eq!(found, expected);
        }
        let free: u32 = new.room.free.values().sum();
        assert_eq!(free, RULE_ROOM - 4_000, "no room was lost");
    }

    /// A rule for one destination host of its own.
    fn spread(id: u64) -> Rule {
        Rule {
            destination: Address::v4((0x0a00_0000 + id as u32).to_be_bytes()),
            destination_length: 32,
            ..open_rule(id)
        }
    }

    fn zero_key() -> Key {
        Key {
            source: Address::default(),
            destination: Address::default(),
            direction: 0,
            family: 0,
            unknown: 0,
            source_port: 0,
            destination_port: 0,
            length: 100,
            protocol: 17,
            dscp: 0,
            reserved: 0,
        }
    }
}
