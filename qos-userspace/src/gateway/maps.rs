//! The maps of the object, typed. What must stand in them is decided in [`super::kernel`]; here is
//! how it gets there so that no packet meets a half-written record.

use std::collections::BTreeMap;

use aya::maps::{Array, HashMap, MapData, MapError};
use qos_common::abi::{
    ALLOCATION_SLOTS, Allocation, Answer, Application, Clocks, Counters, Interface, Line, LineClasses,
    LineKey, Outcomes, PROVIDER_SLOTS, Provider, Question, Settings, directed,
};
use qos_common::classify::Direction;

use super::memory::SharedArray;
use super::object::{Object, ObjectError};

/// Difference of two expiries that is nothing but the jitter of reading two clocks, in ns.
const EXPIRY_JITTER_NS: u64 = 50_000_000;

/// The maps, but for those of the classifier.
pub(super) struct Maps {
    settings: Array<MapData, Settings>,
    allocations: SharedArray<Allocation>,
    clocks: SharedArray<Clocks>,
    providers: SharedArray<Provider>,
    provider_clocks: SharedArray<Clocks>,
    applications: SharedArray<Application>,
    counters: SharedArray<Counters>,
    provider_counters: SharedArray<Counters>,
    outcomes: SharedArray<Outcomes>,
    interfaces: HashMap<MapData, u32, Interface>,
    lines: HashMap<MapData, LineKey, Line>,
    line_classes: SharedArray<LineClasses>,
    question: SharedArray<Question>,
    answer: SharedArray<Answer>,
}

impl std::fmt::Debug for Maps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Maps").finish_non_exhaustive()
    }
}

impl Maps {
    pub(super) fn new(object: &mut Object) -> Result<Self, ObjectError> {
        Ok(Self {
            settings: object.take("settings")?,
            allocations: object.shared("allocations")?,
            clocks: object.shared("clocks")?,
            providers: object.shared("providers")?,
            provider_clocks: object.shared("provider_clocks")?,
            applications: object.shared("applications")?,
            counters: object.shared("counters")?,
            provider_counters: object.shared("prov_counters")?,
            outcomes: object.shared("outcomes")?,
            interfaces: object.take("interfaces")?,
            lines: object.take("lines")?,
            line_classes: object.shared("line_classes")?,
            question: object.shared("question")?,
            answer: object.shared("answer")?,
        })
    }

    /// The settings as they stand.
    pub(super) fn settings(&self) -> Result<Settings, ObjectError> {
        self.settings.get(&0, 0).map_err(|reason| ObjectError::map("settings", reason))
    }

    /// Writes the settings, unless they stand there already. Tells whether they differed.
    pub(super) fn put_settings(&mut self, settings: &Settings) -> Result<bool, ObjectError> {
        let differs = self.settings()? != *settings;
        if differs {
            self.settings.set(0, settings, 0).map_err(|reason| ObjectError::map("settings", reason))?;
        }
        Ok(differs)
    }

    /// Makes a slot hold the records of an allocation's two directions, none where it has no level.
    /// Clocks and counters begin anew when the slot changes hands. Tells whether anything differed.
    pub(super) fn put_allocation(&self, slot: u16, records: [Option<Allocation>; 2]) -> bool {
        let mut differed = false;
        for (direction, wanted) in Direction::BOTH.into_iter().zip(records) {
            let index = directed(u32::from(slot), direction);
            let wanted = wanted.unwrap_or_default();
            let found = self.allocations.read(index);
            if same_allocation(&found, &wanted) {
                continue;
            }
            differed = true;
            if (Allocation { expires_ns: wanted.expires_ns, ..found }) == wanted {
                // One word, seen at once.
                self.allocations.write(index, wanted);
                continue;
            }
            // Out of use first, so that no packet is judged by half of each record.
            self.allocations.write(index, Allocation { flags: 0, ..found });
            if found.id != wanted.id {
                self.clocks.write(index, Clocks::default());
                clear_counters(&self.counters, index, ALLOCATION_SLOTS * 2);
            }
            self.allocations.write(index, Allocation { flags: 0, ..wanted });
            self.allocations.write(index, wanted);
        }
        differed
    }

    /// The records of an allocation's slot, of both directions; none: there is none in use.
    pub(super) fn allocation(&self, slot: u16) -> [Option<Allocation>; 2] {
        Direction::BOTH.map(|direction| {
            let record = self.allocations.read(directed(u32::from(slot), direction));
            (record != Allocation::default()).then_some(record)
        })
    }

    /// Gives records that are in use other classes: one word of each, seen at once.
    pub(super) fn change_classes(&self, slot: u16, records: [Option<Allocation>; 2]) {
        for (direction, wanted) in Direction::BOTH.into_iter().zip(records) {
            let index = directed(u32::from(slot), direction);
            let found = self.allocations.read(index);
            if let Some(wanted) = wanted.filter(|wanted| wanted.id == found.id && wanted.class != found.class)
            {
                self.allocations.write(index, Allocation { class: wanted.class, ..found });
            }
        }
    }

    /// Likewise for a provider.
    pub(super) fn put_provider(&self, slot: u16, wanted: Provider) -> bool {
        let index = u32::from(slot);
        let found = self.providers.read(index);
        if found == wanted {
            return false;
        }
        if found.name != wanted.name {
            for direction in Direction::BOTH {
                self.provider_clocks.write(directed(index, direction), Clocks::default());
                clear_counters(&self.provider_counters, directed(index, direction), PROVIDER_SLOTS * 2);
            }
        }
        self.providers.write(index, wanted);
        true
    }

    /// Likewise for an application.
    pub(super) fn put_application(&self, slot: u16, wanted: Application) -> bool {
        let differs = self.applications.read(u32::from(slot)) != wanted;
        if differs {
            self.applications.write(u32::from(slot), wanted);
        }
        differs
    }

    /// Makes the map of interfaces hold exactly `wanted`, by their indices.
    pub(super) fn put_interfaces(&mut self, wanted: &BTreeMap<u32, Interface>) -> Result<(), ObjectError> {
        let error = |reason| ObjectError::map("interfaces", reason);
        let found: BTreeMap<u32, Interface> =
            self.interfaces.iter().collect::<Result<_, _>>().map_err(error)?;
        for (index, interface) in wanted {
            if found.get(index) != Some(interface) {
                self.interfaces.insert(index, interface, 0).map_err(error)?;
            }
        }
        for index in found.keys().filter(|index| !wanted.contains_key(*index)) {
            self.interfaces.remove(index).map_err(error)?;
        }
        Ok(())
    }

    /// The lines as they stand.
    pub(super) fn lines(&self) -> Result<std::collections::HashMap<LineKey, Line>, ObjectError> {
        self.lines.iter().map(|entry| entry.map_err(|reason| ObjectError::map("lines", reason))).collect()
    }

    /// Makes the map of lines hold exactly `wanted`. Tells how many entries differed.
    pub(super) fn put_lines(
        &mut self,
        wanted: &std::collections::HashMap<LineKey, Line>,
    ) -> Result<usize, ObjectError> {
        let error = |reason| ObjectError::map("lines", reason);
        let found = self.lines()?;
        let mut differed = 0;
        for (key, line) in wanted {
            if found.get(key) != Some(line) {
                self.lines.insert(key, line, 0).map_err(error)?;
                differed += 1;
            }
        }
        for key in found.keys().filter(|key| !wanted.contains_key(*key)) {
            self.lines.remove(key).map_err(error)?;
            differed += 1;
        }
        Ok(differed)
    }

    /// The line that a prefix leads to; none: there is none.
    pub(super) fn line(&self, key: &LineKey) -> Result<Option<Line>, ObjectError> {
        match self.lines.get(key, 0) {
            Ok(line) => Ok(Some(line)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(reason) => Err(ObjectError::map("lines", reason)),
        }
    }

    /// Makes a prefix lead to a line, or to none.
    pub(super) fn put_line(&mut self, key: &LineKey, line: Option<Line>) -> Result<(), ObjectError> {
        let result = match line {
            Some(line) => self.lines.insert(key, line, 0),
            None => self.lines.remove(key),
        };
        match result {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(reason) => Err(ObjectError::map("lines", reason)),
        }
    }

    /// Classes of a line, by its slot.
    pub(super) fn classes_of_line(&self, slot: u16) -> LineClasses {
        self.line_classes.read(u32::from(slot))
    }

    /// Gives a line's slot its classes: each is one word, seen at once. Tells whether they differed.
    pub(super) fn put_line_classes(&self, slot: u16, wanted: LineClasses) -> bool {
        let differs = self.line_classes.read(u32::from(slot)) != wanted;
        if differs {
            self.line_classes.write(u32::from(slot), wanted);
        }
        differs
    }

    /// Counters of one direction of an allocation's slot, all CPUs together.
    pub(super) fn allocation_counters(&self, slot: u16, direction: Direction) -> Counters {
        sum_counters(&self.counters, directed(u32::from(slot), direction), ALLOCATION_SLOTS * 2)
    }

    /// Clocks of one direction of an allocation's slot, and what is counted beside them.
    pub(super) fn allocation_clocks(&self, slot: u16, direction: Direction) -> Clocks {
        self.clocks.read(directed(u32::from(slot), direction))
    }

    /// Counters of one direction of a provider's slot, all CPUs together.
    pub(super) fn provider_counters(&self, slot: u16, direction: Direction) -> Counters {
        sum_counters(&self.provider_counters, directed(u32::from(slot), direction), PROVIDER_SLOTS * 2)
    }

    /// Packets by what became of them, and what their look-ups took, all CPUs together.
    pub(super) fn outcomes(&self) -> Outcomes {
        let mut sums = Outcomes::default();
        for index in 0..self.outcomes.length() {
            let counted = self.outcomes.read(index);
            for (sum, packets) in sums.packets.iter_mut().zip(counted.packets) {
                *sum += packets;
            }
            sums.look_ups += counted.look_ups;
            sums.tables += counted.tables;
            sums.forks += counted.forks;
            sums.rules += counted.rules;
        }
        sums
    }

    /// Sets the question that the explaining program answers when it is run.
    pub(super) fn ask(&self, question: Question) {
        self.question.write(0, question);
    }

    /// The answer of its last run.
    pub(super) fn answer(&self) -> Answer {
        self.answer.read(0)
    }
}

/// Equal but for the jitter of expiries, which are computed anew from the wall clock each time.
fn same_allocation(found: &Allocation, wanted: &Allocation) -> bool {
    found.expires_ns.abs_diff(wanted.expires_ns) < EXPIRY_JITTER_NS
        && Allocation { expires_ns: wanted.expires_ns, ..*found } == *wanted
}

fn sum_counters(counters: &SharedArray<Counters>, index: u32, stride: u32) -> Counters {
    (index..counters.length())
        .step_by(stride as usize)
        .fold(Counters::default(), |sum, index| sum.plus(&counters.read(index)))
}

fn clear_counters(counters: &SharedArray<Counters>, index: u32, stride: u32) {
    for index in (index..counters.length()).step_by(stride as usize) {
        counters.write(index, Counters::default());
    }
}
