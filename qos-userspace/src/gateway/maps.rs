//! The maps of the object, typed. What must stand in them is decided in [`super::kernel`]; here is
//! how it gets there so that no packet meets a half-written record.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::sync::atomic::Ordering;

use aya::maps::{Array, HashMap, MapData, MapError};
use qos_common::abi::{
    ALLOCATION_SLOTS, Allocation, Answer, Application, Clocks, Counters, Interface, Line, LineClasses,
    LineKey, Outcomes, PROVIDER_SLOTS, Provider, Question, Settings, directed,
};
use qos_common::classify::Direction;
use qos_common::clock::{UNUSED, is_long_idle, ticks};

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

    /// Sets clocks that have not been in use for an hour to [`UNUSED`], at `now_ns` of CLOCK_MONOTONIC: they
    /// would come to look as if they were ahead. To be called at least every other hour.
    pub(super) fn lift_idle_clocks(&self, now_ns: u64) {
        for clocks in [&self.clocks, &self.provider_clocks] {
            (0..clocks.length()).for_each(|record| lift_if_idle(clocks, record, now_ns));
        }
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

/// A packet that moves a clock meanwhile is first: what it was charged stays.
fn lift_if_idle(clocks: &SharedArray<Clocks>, record: u32, now_ns: u64) {
    for offset in [offset_of!(Clocks, guaranteed), offset_of!(Clocks, maximum)] {
        let clock = clocks.word(record, offset);
        let found = clock.load(Ordering::Relaxed);
        if is_long_idle(found, ticks(now_ns)) {
            let _ = clock.compare_exchange(found, UNUSED, Ordering::Relaxed, Ordering::Relaxed);
        }
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::atomic::AtomicBool;
    use std::thread;
    use std::time::{Duration, Instant};

    use qos_common::abi::{IN_USE, MAX_RULES, POLICE};
    use qos_common::classify::{Address, Rule, rank};
    use qos_common::clock::Meter;

    use super::*;
    use crate::gateway::classifier::Classifier;
    use crate::gateway::kernel::monotonic_ns;
    use crate::gateway::object::remove_pins;

    const HOUR_NS: u64 = 3_600_000_000_000;

    /// The object over maps of its own, which go with it.
    struct Loaded {
        object: Option<Object>,
        pins: PathBuf,
    }

    impl Loaded {
        fn new(name: &str) -> Self {
            let pins = PathBuf::from(format!("/sys/fs/bpf/qos-test-{}-{name}", std::process::id()));
            let object = Object::load(&pins, MAX_RULES).expect("the object loads");
            Self { object: Some(object), pins }
        }

        fn object(&mut self) -> &mut Object {
            self.object.as_mut().expect("loaded until dropped")
        }
    }

    impl Drop for Loaded {
        fn drop(&mut self) {
            self.object.take();
            remove_pins(&self.pins).expect("the pins are removed");
        }
    }

    /// A clock that is behind by so much.
    fn behind(now_ns: u64, by_ns: u64) -> u64 {
        ticks(now_ns).wrapping_sub(ticks(by_ns))
    }

    #[test]
    #[ignore = "needs root"]
    fn clocks_that_are_long_idle_are_lifted_and_others_stand() {
        let mut loaded = Loaded::new("lift");
        let maps = Maps::new(loaded.object()).expect("maps");
        let now_ns = monotonic_ns();
        let idle = behind(now_ns, HOUR_NS + 1);
        let all = [&maps.clocks, &maps.provider_clocks];
        for clocks in all {
            for record in 0..clocks.length() {
                let clock = match record % 3 {
                    0 => idle,
                    1 => behind(now_ns, HOUR_NS - 1),
                    _ => behind(now_ns, 0).wrapping_add(ticks(1_000_000)),
                };
                let times = Clocks { guaranteed: clock, maximum: clock, ..Clocks::default() };
                clocks.write(record, Clocks { answers_due: 1, too_big_dropped: 1, ..times });
            }
        }
        let began = Instant::now();
        maps.lift_idle_clocks(now_ns);
        let lifted = began.elapsed();
        for clocks in all {
            for record in 0..clocks.length() {
                let found = clocks.read(record);
                let expected = match record % 3 {
                    0 => UNUSED,
                    1 => behind(now_ns, HOUR_NS - 1),
                    _ => behind(now_ns, 0).wrapping_add(ticks(1_000_000)),
                };
                assert_eq!((found.guaranteed, found.maximum), (expected, expected), "record {record}");
                assert_eq!((found.answers_due, found.too_big_dropped), (1, 1), "record {record}");
            }
        }
        let began = Instant::now();
        maps.lift_idle_clocks(now_ns);
        println!("a third of all clocks lifted in {lifted:?}, none in {:?}", began.elapsed());
    }

    /// 1,000 bytes of UDP to 198.51.100.1.
    fn datagram() -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0, 3, 232];
        frame.extend([0, 7, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 198, 51, 100, 1]);
        frame.extend([0; 980]);
        frame
    }

    #[test]
    #[ignore = "needs root"]
    fn a_clock_that_packets_move_while_it_is_lifted_loses_nothing() {
        let mut loaded = Loaded::new("race");
        let maps = Maps::new(loaded.object()).expect("maps");
        let mut classifier =
            Classifier::new(loaded.object().rule_maps().expect("rules")).expect("membarrier");
        let rule = Rule {
            destination: Address::v4([198, 51, 100, 1]),
            destination_length: 32,
            rank: rank(0, 1, 0),
            slot: 1,
            source_ports: [0, u16::MAX],
            destination_ports: [0, u16::MAX],
            lengths: [0, u16::MAX],
            ..Rule::default()
        };
        classifier.insert(&[rule]).expect("fits");
        let record = directed(1, Direction::Upstream);
        // Ten packets at once, and then one in eight seconds.
        let maximum = Meter::new(1_000, 10 * 1_000);
        let flags = IN_USE | POLICE;
        maps.allocations.write(
            record,
            Allocation { id: 1, expires_ns: u64::MAX, maximum, flags, ..Allocation::default() },
        );
        let counted = || maps.allocation_counters(1, Direction::Upstream);
        let (frame, stop) = (datagram(), AtomicBool::new(false));
        let (rounds, last) = thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    lift_if_idle(&maps.clocks, record, monotonic_ns());
                }
            });
            // The burst, and the packet that uses up its last byte.
            let (began, mut rounds, mut last) = (Instant::now(), 0, (11, 9));
            while began.elapsed() < Duration::from_secs(2) && last == (11, 9) {
                let before = counted();
                let clock = maps.clocks.word(record, offset_of!(Clocks, maximum));
                clock.store(behind(monotonic_ns(), 2 * HOUR_NS), Ordering::Relaxed);
                for _ in 0..20 {
                    // One at a time: for more, the kernel waits for a grace period.
                    loaded.object().run("qos_xdp_lan", &frame, 1).expect("runs");
                }
                let after = counted();
                last = (
                    after.excess_packets - before.excess_packets,
                    after.dropped_packets - before.dropped_packets,
                );
                rounds += 1;
            }
            stop.store(true, Ordering::Relaxed);
            (rounds, last)
        });
        println!("{rounds} rounds");
        assert_eq!(last, (11, 9), "passed and dropped in round {rounds}");
    }
}
