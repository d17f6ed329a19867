//! The classifier's rules in memory that the kernel programs read.
//!
//! The structure is described in `qos_common::classify`. It stands in the maps twice, as two *halves*:
//! packets look through one, in which single rules come and go, each by one aligned store; the other is for
//! laying all rules out anew, and one store makes packets look through it. That is how rules of an earlier
//! instance are taken over, how many rules come at once, and how a half that changes have made worse or
//! scattered is put in order, which goes on beside the changes.

mod cover;
mod field;
mod fork;
mod layout;
mod room;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::thread::JoinHandle;

use qos_common::abi::{EXTRA_ROOM, rule_room, slot_room, word_room};
use qos_common::classify::{
    HALVES, Key, MAX_FORKS, Rule, Slot, TABLE_SETS, Table, TableSet, allocation_of, half_sets, selector_of,
    table_set,
};
use qos_common::compact::{Extra, Granule, Probe, Word, granules};

use self::field::Window;
use self::layout::Layout;
use self::room::NoRoom;
use super::memory::{SharedArray, grace_period};
use crate::manager::report::ClassifierStatistics;
use crate::plural::counted;

/// Changes after which rules are laid out anew, where they are few.
const CHANGES: usize = 256;
/// Rules that are laid out anew within the change that asks for it; more than that beside other changes.
const AT_ONCE: usize = 2_000;

/// Why rules were not taken. What was there before is untouched.
#[derive(Debug, thiserror::Error)]
pub enum ClassifierError {
    /// There are too many rules.
    #[error("{asked} rules do not fit: {used} of {most} are in use")]
    Full {
        /// Rules that were to be added.
        asked: usize,
        /// Rules in use.
        used: usize,
        /// Rules that there is room for.
        most: usize,
    },
    /// The rules overlap so much that their lists and forks take more room than there is.
    #[error(
        "{0} rules overlap too much for the room that there is; revoke allocations whose selectors take many \
         addresses and ports"
    )]
    NoRoom(usize),
    /// A packet would have to be compared with too many of the rules.
    #[error(
        "a packet could have to be compared with {checks} rules, and max_checks is {limit}: {} selectors that \
         are there overlap these, such as {}; name narrower addresses or ports, or raise max_checks",
        .with.len(),
        named(.with)
    )]
    TooManyChecks {
        /// Rules that one packet could be compared with.
        checks: usize,
        /// What that may be.
        limit: usize,
        /// The rules in the longest list that the new ones would be in: numbers of their allocations, and
        /// which of their selectors.
        with: Vec<(u64, u32)>,
    },
    /// The kernel can't tell when a grace period has passed.
    #[error("membarrier: {0}")]
    Grace(#[from] std::io::Error),
    /// The thread that laid the rules out anew has ended early.
    #[error("laying out the rules ended early")]
    Thread,
}

/// Some selectors by the numbers of their allocations.
fn named(selectors: &[(u64, u32)]) -> String {
    let some: Vec<_> = selectors
        .iter()
        .take(5)
        .map(|(allocation, selector)| format!("selector {selector} of {allocation}"))
        .collect();
    some.join(", ")
}

/// What names a rule: its rank, direction and family.
type RuleName = (u64, u8, u8);

const fn name(rule: &Rule) -> RuleName {
    (rule.rank, rule.direction, rule.family)
}

/// The maps that hold rules, both halves of them.
#[derive(Debug)]
pub struct Maps {
    /// Map `rule_half`: its lowest bit is the half that packets look through.
    pub half: SharedArray<u64>,
    /// Map `tables`.
    pub tables: SharedArray<TableSet>,
    /// Map `rule_words`, two words in a value.
    pub words: SharedArray<u64>,
    /// Map `rule_slots`.
    pub slots: SharedArray<Slot>,
    /// Map `rules`.
    pub rules: SharedArray<Granule>,
    /// Map `rule_extras`.
    pub extras: SharedArray<Extra>,
}

impl Maps {
    /// Memory of the same shape that no kernel sees, for so many rules.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn private(rules: u32) -> std::io::Result<Self> {
        Ok(Self {
            half: SharedArray::private(1)?,
            tables: SharedArray::private(HALVES * TABLE_SETS)?,
            words: SharedArray::private(HALVES * word_room(rules) / 2)?,
            slots: SharedArray::private(HALVES * slot_room(rules))?,
            rules: SharedArray::private(HALVES * rule_room(rules))?,
            extras: SharedArray::private(HALVES * EXTRA_ROOM)?,
        })
    }

    /// Rules that they are made for.
    #[must_use]
    pub const fn most(&self) -> u32 {
        (self.slot_room() - slot_room(0)) / 2
    }

    /// Memory of all of them, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.half.bytes()
            + self.tables.bytes()
            + self.words.bytes()
            + self.slots.bytes()
            + self.rules.bytes()
            + self.extras.bytes()
    }

    const fn word_room(&self) -> u32 {
        self.words.length() * 2 / HALVES
    }

    const fn slot_room(&self) -> u32 {
        self.slots.length() / HALVES
    }

    const fn rule_room(&self) -> u32 {
        self.rules.length() / HALVES
    }

    fn word(&self, position: u32) -> Word {
        Word::from_raw((self.words.read(position / 2) >> (position % 2 * 32)) as u32)
    }

    /// The tables that packets of a direction and family look through, as numbered by [`table_set`].
    fn table_set(&self, set: u32) -> TableSet {
        self.tables.read(half_sets(self.half.read(0)) + set)
    }

    /// Makes packets look through another layout. Another may be brought after a grace period.
    fn bring(self: &Arc<Self>, layout: &mut Layout) {
        let half = self.half.read(0).wrapping_add(1);
        layout.join(self, half as u32 & 1);
        self.half.write(0, half);
    }
}

/// The rules, and the maps that hold them.
#[derive(Debug)]
pub struct Classifier {
    maps: Arc<Maps>,
    layout: Layout,
    /// All rules.
    rules: HashMap<RuleName, Rule>,
    /// Most rules that a packet may be compared with once rules have been added.
    limit: usize,
    /// Changes since the rules were laid out, and how many rules that were.
    changes: usize,
    laid_out: usize,
    /// The rules are being laid out anew, as they were; and what has changed since: true for what came.
    next: Option<JoinHandle<Result<Layout, NoRoom>>>,
    journal: Vec<(Rule, bool)>,
}

impl Classifier {
    /// A classifier without rules. What the maps hold is not looked through any more.
    ///
    /// # Errors
    /// Where the kernel can't tell that nobody reads what was there.
    pub fn new(maps: Maps) -> Result<Self, ClassifierError> {
        Self::take_over(maps, &[])
    }

    /// A classifier over maps that an earlier instance may have filled, told which rules they must hold.
    ///
    /// Packets go on through what is there until all of `rules` can be found in the other half.
    ///
    /// # Errors
    /// Where the rules don't fit.
    pub fn take_over(maps: Maps, rules: &[Rule]) -> Result<Self, ClassifierError> {
        let most = maps.most();
        if rules.len() > most as usize {
            return Err(ClassifierError::Full { asked: rules.len(), used: 0, most: most as usize });
        }
        let mut layout = Layout::build(rules, most).map_err(|NoRoom| ClassifierError::NoRoom(rules.len()))?;
        let maps = Arc::new(maps);
        maps.bring(&mut layout);
        grace_period()?;
        Ok(Self {
            maps,
            layout,
            rules: rules.iter().map(|rule| (name(rule), *rule)).collect(),
            limit: usize::MAX,
            changes: 0,
            laid_out: rules.len(),
            next: None,
            journal: Vec::new(),
        })
    }

    /// Refuses rules from now on with which a packet may have to be compared with more than `limit`. What is
    /// there stays.
    pub const fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Number of rules.
    #[must_use]
    pub fn count(&self) -> usize {
        self.rules.len()
    }

    /// Most rules that one packet may be compared with: the longest lists of all tables of its direction
    /// and family together.
    #[must_use]
    pub fn worst_case(&self) -> usize {
        self.layout.most_checks()
    }

    /// What it is made of. What look-ups have cost is not known here.
    #[must_use]
    pub fn statistics(&self) -> ClassifierStatistics {
        ClassifierStatistics {
            rules: self.count() as u32,
            rules_most: self.maps.most(),
            memory_bytes: self.maps.bytes(),
            worst_case_comparisons: self.worst_case() as u32,
            max_checks: u32::try_from(self.limit).unwrap_or(u32::MAX),
            sets: self.layout.statistics(),
            ..ClassifierStatistics::default()
        }
    }

    /// The maps.
    #[must_use]
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Adds rules; a packet sees each of them from the moment it is in its list. One that is there already,
    /// by its rank, is replaced. The rules of an allocation come together.
    ///
    /// # Errors
    /// Where they don't all fit, or a packet might have to be compared with too many; none is added then.
    pub fn insert(&mut self, rules: &[Rule]) -> Result<(), ClassifierError> {
        self.has_room(rules)?;
        self.follow()?;
        let checks = self.worst_case();
        let before: Vec<_> = rules.iter().map(|rule| self.rules.insert(name(rule), *rule)).collect();
        let many = rules.len() > AT_ONCE && rules.len() > self.laid_out / 2;
        let result = if many { self.lay_out() } else { self.insert_each(rules, &before) };
        let result = result.and_then(|()| self.stay_within_limit(rules, checks));
        if result.is_err() {
            for (rule, before) in rules.iter().zip(before).rev() {
                match before {
                    Some(before) => self.rules.insert(name(rule), before),
                    None => self.rules.remove(&name(rule)),
                };
            }
            self.lay_out()?;
        }
        result
    }

    /// Tells whether [`Classifier::insert`] would take rules, and adds none. Where they could bring a packet
    /// above the limit, all rules are laid out for the answer.
    ///
    /// # Errors
    /// As of [`Classifier::insert`].
    pub fn would_take(&self, rules: &[Rule]) -> Result<(), ClassifierError> {
        self.has_room(rules)?;
        let before = self.worst_case();
        // A rule makes the longest list of one table longer by one at most.
        if before + rules.len() <= self.limit.max(before) {
            return Ok(());
        }
        let new: HashSet<_> = rules.iter().map(name).collect();
        let others = self.rules.values().filter(|rule| !new.contains(&name(rule)));
        let all: Vec<Rule> = others.chain(rules).copied().collect();
        let layout =
            Layout::build(&all, self.maps.most()).map_err(|NoRoom| ClassifierError::NoRoom(all.len()))?;
        self.is_within_limit(&layout, rules, before)
    }

    fn has_room(&self, rules: &[Rule]) -> Result<(), ClassifierError> {
        let new = rules.iter().filter(|rule| !self.rules.contains_key(&name(rule))).count();
        let (used, most) = (self.rules.len(), self.maps.most() as usize);
        if used + new > most {
            return Err(ClassifierError::Full { asked: rules.len(), used, most });
        }
        Ok(())
    }

    /// Tells that a packet may have to be compared with too many rules, and with more than before.
    fn stay_within_limit(&mut self, new: &[Rule], before: usize) -> Result<(), ClassifierError> {
        if self.worst_case() <= self.limit.max(before) {
            return Ok(());
        }
        // Laid out with all that there is they may take fewer.
        self.lay_out()?;
        self.is_within_limit(&self.layout, new, before)
    }

    fn is_within_limit(&self, layout: &Layout, new: &[Rule], before: usize) -> Result<(), ClassifierError> {
        let checks = layout.most_checks();
        if checks <= self.limit.max(before) {
            return Ok(());
        }
        let list = layout.longest_list_with(new);
        let with = list.iter().map(|rule| (allocation_of(rule.rank), selector_of(rule.rank))).collect();
        Err(ClassifierError::TooManyChecks { checks, limit: self.limit, with })
    }

    fn insert_each(&mut self, rules: &[Rule], before: &[Option<Rule>]) -> Result<(), ClassifierError> {
        for (rule, before) in rules.iter().zip(before) {
            let mut result = Ok(());
            if let Some(before) = before {
                result = self.layout.remove(before).map(|()| self.note(before, false));
            }
            match result.and_then(|()| self.layout.insert(rule)) {
                Ok(()) => self.note(rule, true),
                // All that is to be there goes into the other half.
                Err(NoRoom) => return self.lay_out(),
            }
        }
        self.after_changes()
    }

    /// Removes rules. Those that are not there are passed over.
    ///
    /// # Errors
    /// Where the shortened lists find no room.
    pub fn remove(&mut self, rules: &[Rule]) -> Result<(), ClassifierError> {
        self.follow()?;
        let there: Vec<Rule> = rules.iter().filter_map(|rule| self.rules.remove(&name(rule))).collect();
        if there.len() > AT_ONCE && there.len() > self.laid_out / 2 {
            return self.lay_out();
        }
        for rule in &there {
            match self.layout.remove(rule) {
                Ok(()) => self.note(rule, false),
                Err(NoRoom) => return self.lay_out(),
            }
        }
        self.after_changes()
    }

    fn note(&mut self, rule: &Rule, came: bool) {
        self.changes += 1;
        if self.next.is_some() {
            self.journal.push((*rule, came));
        }
    }

    /// Compares the maps with what they must hold, and puts right what differs. Returns what was
    /// wrong.
    pub fn repair(&mut self) -> Vec<String> {
        let mut wrong = Vec::new();
        if let Err(error) = self.follow() {
            wrong.push(format!("the rules could not be laid out anew: {error}"));
        }
        self.layout.repair(&mut wrong);
        wrong
    }

    /// Goes on with laying out the rules anew, where that is under way or due.
    ///
    /// # Errors
    /// Where it failed.
    pub fn follow(&mut self) -> Result<(), ClassifierError> {
        if self.next.as_ref().is_some_and(JoinHandle::is_finished) { self.finish() } else { Ok(()) }
    }

    /// Waits for rules that are being laid out anew.
    ///
    /// # Errors
    /// Where that failed.
    pub fn finish(&mut self) -> Result<(), ClassifierError> {
        let Some(next) = self.next.take() else {
            return Ok(());
        };
        let journal = std::mem::take(&mut self.journal);
        let layout = next.join().map_err(|_| ClassifierError::Thread)?;
        let followed = layout.and_then(|mut layout| {
            for (rule, came) in &journal {
                if *came { layout.insert(rule)? } else { layout.remove(rule)? }
            }
            Ok(layout)
        });
        match followed {
            Ok(layout) => self.switch(layout),
            // What is in force stays. It is tried again after as many changes.
            Err(NoRoom) => {
                self.changes = 0;
                Ok(())
            }
        }
    }

    fn after_changes(&mut self) -> Result<(), ClassifierError> {
        if self.next.is_some() || self.changes < CHANGES.max(self.laid_out / 4) {
            return Ok(());
        }
        if self.rules.len() <= AT_ONCE {
            return self.lay_out();
        }
        let (rules, most) = (self.all(), self.maps.most());
        self.journal.clear();
        self.changes = 0;
        self.next = Some(std::thread::spawn(move || Layout::build(&rules, most)));
        Ok(())
    }

    fn all(&self) -> Vec<Rule> {
        self.rules.values().copied().collect()
    }

    /// Lays all rules out anew, now.
    fn lay_out(&mut self) -> Result<(), ClassifierError> {
        // What is under way has not all the rules, or it is about to be followed by this.
        self.next = None;
        self.journal.clear();
        let rules = self.all();
        let layout =
            Layout::build(&rules, self.maps.most()).map_err(|NoRoom| ClassifierError::NoRoom(rules.len()))?;
        self.switch(layout)
    }

    /// Makes packets look through another layout of the rules.
    fn switch(&mut self, mut layout: Layout) -> Result<(), ClassifierError> {
        self.maps.bring(&mut layout);
        self.layout = layout;
        self.laid_out = self.rules.len();
        self.changes = 0;
        // The half that packets have left is written next time.
        Ok(grace_period()?)
    }
}

/// What a packet meets in one table.
struct Met<'t> {
    number: usize,
    table: &'t Table,
    /// Where its hash leads to; none: the table is a tree.
    word: Option<(Word, u64)>,
    /// The forks that it follows, one behind the other.
    forks: Vec<Slot>,
    /// How many rules of the list it is compared with; none: there is no list.
    compared: Option<u32>,
    found: Option<Rule>,
}

/// Takes a packet through the rules as the kernel does. Returns the rule that it matches. Rules of expired
/// allocations are the caller's to leave out.
fn walk(maps: &Maps, key: &Key, mut meet: impl FnMut(Met<'_>)) -> Option<Rule> {
    let set = maps.table_set(table_set(key.direction, key.family));
    let mut best: Option<Rule> = None;
    for (number, table) in set.tables.iter().take(set.used as usize).enumerate() {
        let rank = best.map_or(u64::MAX, |best| best.rank);
        if table.best >= rank {
            continue;
        }
        let mut met = Met { number, table, word: None, forks: Vec::new(), compared: None, found: None };
        let (mut slot, mut start) = (table.root, None);
        if slot.is_empty() {
            let hash = table.hash(key.family, key.source, key.destination);
            let word = maps.word(set.position(hash));
            met.word = Some((word, hash));
            match word {
                _ if !word.admits(hash) => {}
                _ if word.is_fork() => slot = maps.slots.read(set.slots + word.start()),
                _ => start = Some(word.start()),
            }
        }
        for _ in 0..MAX_FORKS {
            if slot.is_fork() {
                met.forks.push(slot);
                slot = maps.slots.read(set.slots + slot.child(key));
            }
        }
        assert!(!slot.is_fork(), "too many forks");
        if let Some(start) = start.or_else(|| (!slot.is_empty()).then(|| slot.start())) {
            let (compared, found) = scan(maps, &set, key, start, rank);
            met.compared = Some(compared);
            met.found = found;
            best = found.or(best);
        }
        meet(met);
    }
    best
}

/// Compares a packet with the rules of a list, as long as they are better than `rank`. Returns how many were,
/// and the one that matches.
fn scan(maps: &Maps, set: &TableSet, key: &Key, start: u32, rank: u64) -> (u32, Option<Rule>) {
    let probe = Probe::of(key);
    let step = granules(key.family);
    let mut compared = 0;
    for granule in (set.rules + start..).step_by(step as usize) {
        let (first, rest) = (maps.rules.read(granule), maps.rules.read(granule + step - 1));
        compared += 1;
        if rest.rank() >= rank {
            break;
        }
        let extra = maps.extras.read(set.extras + rest.extra());
        let matches = match step {
            1 => rest.matches_v4(&probe),
            _ => rest.matches_v6(&first, key, &probe),
        };
        if matches && (rest.extra() == 0 || extra.matches(key)) {
            let rule = Granule::rule([first, rest], key.direction as u8, key.family as u8, extra);
            return (compared, Some(rule));
        }
        if rest.is_last() {
            break;
        }
    }
    (compared, None)
}

/// Finds the rule that a packet matches as the kernel does; for tests and for checking a take-over. Rules of
/// expired allocations are the caller's to leave out.
#[must_use]
pub fn look_up(maps: &Maps, key: &Key) -> Option<Rule> {
    walk(maps, key, |_| {})
}

/// The way of a packet through the rules, in words: a line for each table that it is looked for in.
#[must_use]
pub fn way(maps: &Maps, key: &Key) -> Vec<String> {
    let mut lines = Vec::new();
    walk(maps, key, |met| lines.push(met.in_words(key.family as u8)));
    lines
}

impl Met<'_> {
    fn in_words(&self, family: u8) -> String {
        let Table { source_length, destination_length, .. } = self.table;
        let mut line = format!("table {}: ", self.number + 1);
        line += &match self.word {
            None => "tree".to_owned(),
            Some(_) => format!("hash of source/{source_length} and destination/{destination_length}"),
        };
        for window in self.forks.iter().filter_map(|fork| Window::of(*fork, family)) {
            line += &format!(", fork on {}", window.in_words(family));
        }
        match (self.compared, self.word) {
            (Some(count), _) => line += &format!(", {} compared", counted(count, "rule")),
            (None, Some((word, hash))) if !word.is_empty() && !word.admits(hash) => {
                line += ", other addresses there";
            }
            (None, _) => line += ", no rules there",
        }
        line += &match (self.found, self.compared) {
            (Some(rule), _) => {
                format!(", matches selector {} of {}", selector_of(rule.rank), allocation_of(rule.rank))
            }
            (None, Some(_)) => ", none matches".to_owned(),
            (None, None) => String::new(),
        };
        line
    }
}

/// All rules that packets can be led to, one that several slots lead to as often.
#[must_use]
pub fn rules_in(maps: &Maps) -> Vec<Rule> {
    let mut rules = Vec::new();
    for number in 0..TABLE_SETS {
        let set = maps.table_set(number);
        let (direction, family) = ((number >> 1) as u8, number & 1);
        let tables = set.tables.iter().take(set.used as usize).filter(|table| table.best != u64::MAX);
        let (roots, hashed): (Vec<_>, Vec<_>) =
            tables.map(|table| table.root).partition(|root| !root.is_empty());
        let mut slots = roots;
        let mut lists = Vec::new();
        if !hashed.is_empty() {
            for position in (set.words..).take(1 << (64 - set.shift)) {
                match maps.word(position) {
                    word if word.is_empty() => {}
                    word if word.is_fork() => slots.push(maps.slots.read(set.slots + word.start())),
                    word => lists.push(word.start()),
                }
            }
        }
        while let Some(slot) = slots.pop() {
            if slot.is_fork() {
                let children = (1 << slot.width()) + u32::from(slot.has_unknown());
                let children = (set.slots + slot.start()..).take(children as usize);
                slots.extend(children.map(|child| maps.slots.read(child)));
            } else if !slot.is_empty() {
                lists.push(slot.start());
            }
        }
        let step = granules(family);
        for list in lists {
            for granule in (set.rules + list..).step_by(step as usize) {
                let (first, rest) = (maps.rules.read(granule), maps.rules.read(granule + step - 1));
                let extra = maps.extras.read(set.extras + rest.extra());
                rules.push(Granule::rule([first, rest], direction, family as u8, extra));
                if rest.is_last() {
                    break;
                }
            }
        }
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use qos_common::abi::MAX_RULES;
    use qos_common::classify::{Address, CHECK_PORTS, CHECK_PROTOCOL, Key, rank};

    fn empty() -> Classifier {
        Classifier::new(Maps::private(MAX_RULES).expect("memory")).expect("membarrier")
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
                reserved: [0; 3],
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
                let found = look_up(classifier.maps(), key);
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
        // Packets without ports are compared with the best few.
        assert_eq!(classifier.worst_case(), 64);
        let key = Key { destination_port: 9_999, protocol: 17, ..zero_key() };
        let found = look_up(classifier.maps(), &key);
        assert_eq!(found.map(|rule| rule.slot), Some(9_999));
    }

    #[test]
    fn rules_that_cost_a_packet_too_much_are_refused_whole_and_by_name() {
        let mut classifier = empty();
        // The same packets, all of them.
        let same: Vec<Rule> = (1..=40).map(open_rule).collect();
        classifier.set_limit(20);
        classifier.insert(&same[..20]).expect("as many as may be");
        for new in [&same[20..21], &same[20..]] {
            let foreseen = classifier.would_take(new).expect_err("one too many");
            let error = classifier.insert(new).expect_err("one too many");
            assert_eq!(foreseen.to_string(), error.to_string());
            let ClassifierError::TooManyChecks { checks, limit: 20, with } = &error else {
                panic!("{error}")
            };
            assert_eq!((*checks, with.len()), (20 + new.len(), 20));
            assert!(error.to_string().contains("selector 0 of 1, selector 0 of 2"), "{error}");
            assert_eq!((classifier.count(), classifier.worst_case()), (20, 20));
            assert!(classifier.repair().is_empty());
        }
        let elsewhere = Rule { direction: 1, ..open_rule(21) };
        classifier.would_take(&[elsewhere]).expect("on other packets' way");
        classifier.insert(&[elsewhere]).expect("on other packets' way");
        // What is there stays, and may become less, not more.
        classifier.set_limit(10);
        let least = Rule { destination: Address::v4([10; 4]), destination_length: 32, ..open_rule(50) };
        assert!(matches!(classifier.insert(&[open_rule(30)]), Err(ClassifierError::TooManyChecks { .. })));
        classifier.remove(&same[..15]).expect("fits");
        classifier.insert(&[least]).expect("few are left");
        assert!(classifier.worst_case() <= 10);
    }

    #[test]
    fn the_way_of_a_packet_is_told_as_it_goes() {
        let mut classifier = empty();
        let port = |id: u64| Rule {
            destination: Address::v4([10, 0, 0, 1]),
            destination_length: 32,
            checks: CHECK_PORTS,
            destination_ports: [id as u16; 2],
            ..open_rule(id)
        };
        classifier.insert(&(1..=5_000).map(port).collect::<Vec<_>>()).expect("fits");
        let key = Key {
            destination: Address::v4([10, 0, 0, 1]),
            destination_port: 4_000,
            protocol: 17,
            ..zero_key()
        };
        let said = way(classifier.maps(), &key);
        let [line] = &said[..] else { panic!("{said:?}") };
        assert!(line.starts_with("table 1: tree, fork on bits "), "{line}");
        assert!(line.contains(" of the destination port, "), "{line}");
        assert!(line.ends_with("compared, matches selector 0 of 4000"), "{line}");
        let said = way(classifier.maps(), &Key { destination_port: 6_000, ..key });
        assert!(said[0].ends_with(", no rules there") || said[0].ends_with(", none matches"), "{said:?}");
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
        let maps = classifier.maps();
        let number = half_sets(maps.half.read(0));
        let set = maps.tables.read(number);
        maps.words.write(set.words / 2 + 3, 9);
        maps.rules.write(set.rules + set.tables[0].root.start(), Granule::default());
        maps.tables.write(number, TableSet::EMPTY);
        assert_eq!(classifier.repair().len(), 3);
        assert!(classifier.repair().is_empty());
    }

    #[test]
    fn a_take_over_serves_the_new_rules() {
        let mut old = empty();
        let rules: Vec<Rule> = (1..=5_000).map(spread).collect();
        old.insert(&rules).expect("fits");
        let Classifier { maps, layout, .. } = old;
        drop(layout);
        let maps = Arc::try_unwrap(maps).expect("nobody else has it");
        let mut new = Classifier::take_over(maps, &rules[1_000..]).expect("fits");
        assert!(new.repair().is_empty());
        for rule in &rules {
            let key = Key { destination: rule.destination, ..zero_key() };
            let expected = by_linear_search(&rules[1_000..], &key);
            assert_eq!(look_up(new.maps(), &key), expected);
        }
    }

    /// A set that is made to be hard, and packets that suit its rules.
    fn hard_set(name: &str) -> (Vec<Rule>, Vec<Key>) {
        let pair = |id: u64| Rule {
            source: Address::v4([10, 0, 0, 1]),
            source_length: 32,
            destination: Address::v4([10, 0, 0, 2]),
            destination_length: 32,
            ..open_rule(id)
        };
        let ports = |id: u64, first: u64, last: u64| Rule {
            checks: CHECK_PORTS,
            destination_ports: [first as u16, last as u16],
            ..pair(id)
        };
        let on_pair = |number: u64| Key {
            source: Address::v4([10, 0, 0, 1]),
            destination: Address::v4([10, 0, 0, 2]),
            destination_port: (number * 131) as u16,
            source_port: (number * 17) as u16,
            protocol: 17,
            ..zero_key()
        };
        // Weyl's sequence: spread evenly, and the same each time.
        let weyl = |number: u64| number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let anywhere = |number: u64| Key {
            source: Address::v4(((weyl(number) >> 32) as u32).to_be_bytes()),
            destination: Address::v4((weyl(number) as u32).to_be_bytes()),
            ..on_pair(number)
        };
        let far = |number: u64, family: u8| match family {
            0 => Address::v4((weyl(number) as u32).to_be_bytes()),
            _ => Address { high: weyl(number), low: weyl(number + 7) },
        };
        let nested = |family: u8, most: u64| {
            (0..=most).map(move |length| Rule {
                destination: far(1, family).prefix(length as u32),
                destination_length: length as u8,
                family,
                ..open_rule(most + 1 - length)
            })
        };
        match name {
            "one bucket: lengths of packets on one pair" => {
                let rules = (1..=2_000).map(|id| Rule { lengths: [id as u16, id as u16 + 9], ..pair(id) });
                (rules.collect(), (0..2_000).map(|n| Key { length: n as u16, ..on_pair(n) }).collect())
            }
            "uniform prefix lengths" => {
                let rules = (1..=20_000u64).map(|id| {
                    let (source_length, destination_length) = ((id % 33) as u8, (id / 33 % 33) as u8);
                    Rule {
                        source: far(id, 0).prefix(u32::from(source_length)),
                        destination: far(id + 9, 0).prefix(u32::from(destination_length)),
                        source_length,
                        destination_length,
                        ..open_rule(id)
                    }
                });
                (rules.collect(), (0..2_000).map(anywhere).collect())
            }
            "64k single ports on one pair" => (
                (1..=65_535).map(|port| ports(port, port, port)).collect(),
                (0..2_000).map(on_pair).collect(),
            ),
            "hundreds of ranges on one pair" => {
                let rules = (1..=600).map(|id| {
                    let first = weyl(id) % 60_000;
                    ports(id, first, first + weyl(id + 1) % 5_000)
                });
                (rules.collect(), (0..2_000).map(on_pair).collect())
            }
            "nested prefixes" => {
                let packets = (0..33).map(|length| Key {
                    destination: Address { high: far(1, 0).high ^ 1 << (63 - length.min(31)), low: 0 },
                    ..zero_key()
                });
                (nested(0, 32).collect(), packets.collect())
            }
            "nested prefixes of IPv6" => {
                let address = far(1, 1);
                let packets = (0..128u32).map(|bit| {
                    let (high, low) = if bit < 64 { (1 << (63 - bit), 0) } else { (0, 1 << (127 - bit)) };
                    let destination = Address { high: address.high ^ high, low: address.low ^ low };
                    Key { destination, family: 1, ..zero_key() }
                });
                (nested(1, 128).collect(), packets.collect())
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn sets_that_are_made_to_be_hard_are_answered_right_within_a_bound() {
        let mut costs = Vec::new();
        for (name, most) in [
            // No field but the length tells them apart, and ten of them take each packet.
            ("one bucket: lengths of packets on one pair", 24),
            ("uniform prefix lengths", 250),
            // Packets without ports are compared with the best few.
            ("64k single ports on one pair", 64),
            ("hundreds of ranges on one pair", 96),
            ("nested prefixes", 33),
            ("nested prefixes of IPv6", 129),
        ] {
            let (mut rules, packets) = hard_set(name);
            let mut classifier = empty();
            classifier.insert(&rules).expect("fits");
            let check = |classifier: &Classifier, rules: &[Rule]| {
                for key in &packets {
                    let expected = by_linear_search(rules, key);
                    assert_eq!(look_up(classifier.maps(), key), expected, "{name}: {key:?}");
                }
            };
            check(&classifier, &rules);
            let laid_out = classifier.worst_case();
            // One by one, as they come and go in operation.
            let gone: Vec<Rule> = rules.iter().step_by(2).take(300).copied().collect();
            for rule in &gone {
                classifier.remove(&[*rule]).expect("fits");
            }
            rules.retain(|rule| !gone.contains(rule));
            check(&classifier, &rules);
            for rule in &gone {
                classifier.insert(&[*rule]).expect("fits");
            }
            rules.extend(gone);
            check(&classifier, &rules);
            assert!(classifier.repair().is_empty(), "{name}");
            println!(
                "{name}: {} rules, {laid_out} comparisons at most, {} after changes",
                rules.len(),
                classifier.worst_case()
            );
            costs.push((name, laid_out.max(classifier.worst_case()), most));
        }
        let above: Vec<_> = costs.into_iter().filter(|(_, found, most)| found > most).collect();
        assert!(above.is_empty(), "{above:?}");
    }

    /// A rule that overlaps some others, of any kind that its number makes it.
    fn scattered(id: u64) -> Rule {
        let mut random = fastrand::Rng::with_seed(id);
        let mut end = |few: u32| {
            let length = [0, 8, 16, 20, 24, 28, 32, 32][random.usize(0..8)];
            let host = 0x0a00_0000 + random.u32(0..few) * 0x101;
            (Address::v4(host.to_be_bytes()).prefix(u32::from(length)), length)
        };
        let ((source, source_length), (destination, destination_length)) = (end(2_000), end(20_000));
        let port = random.u16(0..3_000);
        Rule {
            source,
            source_length,
            destination,
            // One in many takes all there is.
            destination_length: destination_length.max(8),
            checks: CHECK_PORTS,
            destination_ports: [port, port + random.u16(0..50)],
            slot: (id & 0xffff) as u32,
            ..open_rule(id)
        }
    }

    #[test]
    #[ignore = "takes most of a minute: the testrun tier runs it"]
    fn a_million_updates_leave_no_growth() {
        const KEPT: u64 = 5_000;
        const REPLACED: u64 = 500_000;
        let mut classifier = empty();
        let mut there: std::collections::VecDeque<Rule> = (1..=KEPT).map(scattered).collect();
        classifier.insert(&Vec::from(there.clone())).expect("fits");
        let mut random = fastrand::Rng::with_seed(7);
        let mut worst = classifier.worst_case();
        for id in KEPT + 1..=KEPT + REPLACED {
            let (gone, new) = (there.pop_front().expect("some"), scattered(id));
            classifier.remove(&[gone]).expect("fits");
            classifier.insert(&[new]).expect("fits");
            there.push_back(new);
            worst = worst.max(classifier.worst_case());
            if id % 20_000 == 0 {
                let rules = Vec::from(there.clone());
                for _ in 0..100 {
                    let near = there[random.usize(0..KEPT as usize)];
                    let key = Key {
                        source: near.source,
                        destination: near.destination,
                        destination_port: near.destination_ports[0],
                        ..zero_key()
                    };
                    assert_eq!(
                        look_up(classifier.maps(), &key),
                        by_linear_search(&rules, &key),
                        "{id}: {key:?}"
                    );
                }
            }
        }
        classifier.finish().expect("laid out");
        assert_eq!(classifier.count(), KEPT as usize);
        assert!(classifier.repair().is_empty());
        println!("{REPLACED} replaced, a packet was compared with {worst} rules at most");
        // All of the room is there still.
        let more: Vec<Rule> = (1..=u64::from(MAX_RULES) - KEPT)
            .map(|id| Rule { rank: rank(0, id + 10_000_000, 0), ..spread(id) })
            .collect();
        for rules in more.chunks(1_000) {
            classifier.insert(rules).expect("room for as many as ever");
        }
        assert_eq!(classifier.count(), MAX_RULES as usize);
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
            reserved: [0; 3],
        }
    }
}
