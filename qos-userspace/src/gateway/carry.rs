//! What is carried over from the maps of other versions.
//!
//! Each version of the maps' layout has its maps in a folder of its own, so that the programs of the
//! version before are not disturbed while the next one's are made ready. Most of what maps hold follows
//! from the state and is written anew. What does not, clocks and counters and whose they are, is carried
//! over here. A map that is laid out alike in both versions is shared by them; otherwise values are
//! carried from field to field of the same name. Beside its maps a version leaves where their fields
//! are, as targets of symbolic links, for there are no other texts on a BPF file system: with that a
//! version carries over from newer ones too, which it can know nothing of.
//!
//! ```text
//! BPFFS_DIR/maps_2/clocks    maps_2/clocks_layout -> "64 guaranteed:0:8 maximum:8:8 …"
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::mem::offset_of;
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::{MapData, MapInfo};
use qos_common::abi::{
    Allocation, Clocks, Counters, Fragment, FragmentKey, OUTCOMES, Outcome, Outcomes, Provider,
};
use qos_common::clock::{further, ticks};

use super::kernel::{monotonic_ns, outcome_name};
use super::memory::RawArray;

/// Start of the name of a version's folder; its number follows.
const FOLDER: &str = "maps_";
/// End of the name of the link that tells a map's layout.
const LAYOUT: &str = "_layout";

/// What becomes of a field's values where two versions have counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fold {
    /// Whose the record is. Other fields are carried where both have the same owner.
    Owner,
    /// A clock, in ticks: the one that is further ahead.
    Clock,
    /// A point in time, in ns: the later one.
    Latest,
    /// A count: both together.
    Sum,
    /// Not carried: the map is shared, or begins empty.
    Not,
}

/// A field of a map's values.
#[derive(Clone, Debug)]
struct Field {
    name: &'static str,
    offset: usize,
    length: usize,
    fold: Fold,
}

/// How the values of a map are laid out.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// Name of the map.
    map: &'static str,
    size: usize,
    fields: Vec<Field>,
}

impl Layout {
    /// Name of the map.
    #[cfg(test)]
    pub(super) const fn map(&self) -> &'static str {
        self.map
    }

    /// Programs of two versions may use the same map, if it is laid out alike in both.
    fn is_shared(&self) -> bool {
        self.fields.iter().all(|field| field.fold != Fold::Owner)
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.size)?;
        self.fields
            .iter()
            .try_for_each(|field| write!(f, " {}:{}:{}", field.name, field.offset, field.length))
    }
}

/// Length of what a function leads to.
const fn length<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! layout {
    ($map:literal, $($record:ident { $($field:ident: $fold:ident),+ $(,)? }),+) => {
        Layout {
            map: $map,
            size: [$(size_of::<$record>()),+].iter().sum(),
            fields: vec![$($(Field {
                name: stringify!($field),
                offset: offset_of!($record, $field),
                length: length(|record: &$record| &record.$field),
                fold: Fold::$fold,
            }),+),+],
        }
    };
}

macro_rules! clocks {
    ($map:literal) => {
        layout!(
            $map,
            Clocks {
                guaranteed: Clock,
                maximum: Clock,
                answers_due: Latest,
                too_big_dropped: Sum,
                too_big_answered: Sum,
                too_big_passed: Sum,
                mss_lowered: Sum,
            }
        )
    };
}

macro_rules! counters {
    ($map:literal) => {
        layout!(
            $map,
            Counters {
                in_profile_packets: Sum,
                in_profile_bytes: Sum,
                excess_packets: Sum,
                excess_bytes: Sum,
                dropped_packets: Sum,
                dropped_bytes: Sum,
                marked_packets: Sum,
                marked_bytes: Sum,
            }
        )
    };
}

/// Layouts of the maps that something is carried over from.
pub(super) static LAYOUTS: LazyLock<Vec<Layout>> = LazyLock::new(|| {
    let packets = Outcome::ALL.into_iter().map(|outcome| Field {
        name: outcome_name(outcome),
        offset: offset_of!(Outcomes, packets) + outcome as usize * size_of::<u64>(),
        length: size_of::<u64>(),
        fold: Fold::Sum,
    });
    debug_assert_eq!(packets.len(), OUTCOMES as usize, "every outcome");
    let look_ups = [
        ("look_ups", offset_of!(Outcomes, look_ups)),
        ("tables", offset_of!(Outcomes, tables)),
        ("forks", offset_of!(Outcomes, forks)),
        ("rules", offset_of!(Outcomes, rules)),
    ];
    let look_ups =
        look_ups.map(|(name, offset)| Field { name, offset, length: size_of::<u64>(), fold: Fold::Sum });
    vec![
        layout!("allocations", Allocation { id: Owner }),
        layout!("providers", Provider { name: Owner }),
        clocks!("clocks"),
        clocks!("provider_clocks"),
        counters!("counters"),
        counters!("prov_counters"),
        Layout { map: "outcomes", size: size_of::<Outcomes>(), fields: packets.chain(look_ups).collect() },
        layout!(
            "fragments",
            FragmentKey { source: Not, destination: Not, id: Not, kind: Not },
            Fragment { seen_ns: Not, allocation: Not, slot: Not, selector: Not }
        ),
    ]
});

fn layout_of(map: &str) -> Option<&'static Layout> {
    LAYOUTS.iter().find(|layout| layout.map == map)
}

/// Owners, how many records of its own each has in the other two maps, clocks, and counters.
const TABLES: [(&str, u32, &str, &str); 2] =
    [("allocations", 1, "clocks", "counters"), ("providers", 2, "provider_clocks", "prov_counters")];

/// The folder of a version's maps.
pub(super) fn folder(bpffs_dir: &Path, version: u32) -> PathBuf {
    bpffs_dir.join(format!("{FOLDER}{version}"))
}

/// Where a version's folder goes in one step when it is no longer used, to be removed there.
pub(super) fn retired(bpffs_dir: &Path) -> PathBuf {
    bpffs_dir.join(format!("{FOLDER}retired"))
}

/// Folders of all versions' maps below `bpffs_dir`.
///
/// # Errors
/// Where they can't be listed.
pub(super) fn folders(bpffs_dir: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(bpffs_dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let version = name.to_str().and_then(|name| name.strip_prefix(FOLDER));
        if version.is_some_and(|version| version.parse::<u32>().is_ok()) {
            found.insert(entry.path());
        }
    }
    Ok(found)
}

/// Leaves the layouts in a version's folder, and tells of a map whose layout there is another: somebody
/// has changed one and kept the version.
///
/// # Errors
/// Where a link can't be made.
pub(super) fn leave_layouts(folder: &Path) -> io::Result<Option<&'static str>> {
    for layout in LAYOUTS.iter() {
        let path = folder.join(format!("{}{LAYOUT}", layout.map));
        match symlink(layout.to_string(), &path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if read_layout(folder, layout.map).as_deref() != Some(&layout.to_string()) {
                    return Ok(Some(layout.map));
                }
            }
            made => made?,
        }
    }
    Ok(None)
}

fn read_layout(folder: &Path, map: &str) -> Option<String> {
    let target = fs::read_link(folder.join(format!("{map}{LAYOUT}"))).ok()?;
    target.into_os_string().into_string().ok()
}

/// The pin of a map of another version that has the same layout and, as `is_same_shape` says, shape.
pub(super) fn shared(
    others: &BTreeSet<PathBuf>,
    map: &str,
    is_same_shape: impl Fn(&MapInfo) -> bool,
) -> Option<PathBuf> {
    let layout = layout_of(map).filter(|layout| layout.is_shared())?.to_string();
    let pins = others.iter().rev().filter(|folder| read_layout(folder, map).as_ref() == Some(&layout));
    pins.map(|folder| folder.join(map))
        .find(|pin| MapInfo::from_pin(pin).is_ok_and(|info| is_same_shape(&info)))
}

/// The values of a map, and where their fields are.
#[derive(Debug)]
struct Values {
    /// The kernel's number of the map.
    id: u32,
    memory: RawArray,
    /// Offset and length of each.
    fields: BTreeMap<String, (usize, usize)>,
}

impl Values {
    /// None: there is no such map, or it does not say how it is laid out.
    fn open(folder: &Path, map: &str) -> io::Result<Option<Self>> {
        let pin = folder.join(map);
        let Some(layout) = read_layout(folder, map).filter(|_| pin.exists()) else {
            return Ok(None);
        };
        let data = MapData::from_pin(&pin).map_err(io::Error::other)?;
        let info = data.info().map_err(io::Error::other)?;
        let mut parts = layout.split(' ');
        let size = parts.next().and_then(|size| size.parse::<usize>().ok());
        let fields: Option<BTreeMap<_, _>> = parts.map(read_field).collect();
        let Some(fields) = fields.filter(|fields| {
            size == Some(info.value_size() as usize)
                && fields.values().all(|(offset, length)| {
                    offset.checked_add(*length).is_some_and(|end| end <= info.value_size() as usize)
                })
        }) else {
            return Err(io::Error::other(format!("{} can't be read as `{layout}`", pin.display())));
        };
        let memory = RawArray::of_map(data.fd().as_fd(), info.value_size(), info.max_entries())?;
        Ok(Some(Self { id: info.id(), memory, fields }))
    }

    /// A word of a record, if it has that field.
    fn word(&self, record: u32, field: &str) -> Option<&AtomicU64> {
        let (offset, length) = *self.fields.get(field)?;
        (length == size_of::<u64>() && offset % size_of::<u64>() == 0)
            .then(|| self.memory.word(record, offset))
    }
}

/// `name:offset:length`.
fn read_field(text: &str) -> Option<(String, (usize, usize))> {
    let mut parts = text.split(':');
    let field = (parts.next()?.to_owned(), (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?));
    parts.next().is_none().then_some(field)
}

/// Clocks and counters of one kind of owner.
#[derive(Debug)]
struct Table {
    owners: Values,
    owner: &'static str,
    /// Records that each owner has.
    each: u32,
    clocks: Values,
    counters: Values,
}

/// What one version's maps hold that is carried over.
#[derive(Debug)]
pub(super) struct Carried {
    tables: [Option<Table>; TABLES.len()],
    outcomes: Option<Values>,
}

impl Carried {
    /// What is in a version's folder. A map that is missing there has nothing to carry over.
    ///
    /// # Errors
    /// Where a map is not as its layout says.
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        let owner_of = |map| {
            let mut fields = layout_of(map).into_iter().flat_map(|layout| &layout.fields);
            fields.find(|field| field.fold == Fold::Owner).map_or("", |field| field.name)
        };
        let mut tables = [const { None }; TABLES.len()];
        for (table, (owners, each, clocks, counters)) in tables.iter_mut().zip(TABLES) {
            let open = |map| Values::open(folder, map);
            if let (Some(owned), Some(clocks), Some(counters)) =
                (open(owners)?, open(clocks)?, open(counters)?)
            {
                *table = Some(Table { owners: owned, owner: owner_of(owners), each, clocks, counters });
            }
        }
        Ok(Self { tables, outcomes: Values::open(folder, "outcomes")? })
    }

    /// Puts owners where there are none yet, so that what is written next finds their clocks.
    pub(super) fn seed(&self, earlier: &Self) {
        for (table, earlier) in self.pairs(earlier) {
            for slot in 0..table.slots(earlier) {
                if table.owner(slot).is_none()
                    && let Some(owner) = earlier.owner(slot)
                {
                    table.put_owner(slot, &owner);
                    table.fold_clocks(earlier, slot, &[Fold::Clock, Fold::Latest], |_, then| then);
                }
            }
        }
    }

    /// Sets clocks to where those of the other version stand, which its programs move on.
    pub(super) fn set_clocks(&self, earlier: &Self) {
        // What passes between the first clock and the exchange of a program counts once instead of twice, and
        // to look at every slot takes longer than to set a few clocks: which they are is found out before.
        let mut common = Vec::new();
        for (table, earlier) in self.pairs(earlier).filter(|(table, earlier)| table.has_other_clocks(earlier))
        {
            common.extend(table.common(earlier).map(|slot| (table, earlier, slot)));
        }
        common.into_iter().for_each(|(table, earlier, slot)| table.fold_times(earlier, slot));
    }

    /// Adds what the programs of another version have counted, and takes it away there. These programs
    /// must have ended.
    pub(super) fn fold(&self, earlier: &Self) {
        for (table, earlier) in self.pairs(earlier) {
            table.fold(earlier);
        }
        if let (Some(outcomes), Some(earlier)) = (&self.outcomes, &earlier.outcomes)
            && outcomes.id != earlier.id
        {
            let fields = fields("outcomes", &[Fold::Sum]);
            let spare = outcomes.memory.length().saturating_sub(1);
            for cpu in 0..earlier.memory.length() {
                add_up(&fields, (outcomes, spare), (earlier, cpu));
            }
        }
    }

    fn pairs<'a>(&'a self, earlier: &'a Self) -> impl Iterator<Item = (&'a Table, &'a Table)> {
        self.tables
            .iter()
            .zip(&earlier.tables)
            .filter_map(|(table, earlier)| table.as_ref().zip(earlier.as_ref()))
    }
}

impl Table {
    /// Slots that both have.
    fn slots(&self, earlier: &Self) -> u32 {
        self.owners.memory.length().min(earlier.owners.memory.length())
    }

    /// Whose a slot is; none: nobody's.
    fn owner(&self, slot: u32) -> Option<Vec<u8>> {
        let &(offset, length) = self.owners.fields.get(self.owner)?;
        let owner = self.owners.memory.read(slot, offset, length);
        owner.iter().any(|byte| *byte != 0).then_some(owner)
    }

    /// One of another length is another version's idea of an owner, and is left out.
    fn put_owner(&self, slot: u32, owner: &[u8]) {
        if let Some(&(offset, length)) = self.owners.fields.get(self.owner)
            && length == owner.len()
        {
            self.owners.memory.write(slot, offset, owner);
        }
    }

    fn fold(&self, earlier: &Self) {
        for slot in self.common(earlier) {
            self.fold_times(earlier, slot);
            if self.has_other_clocks(earlier) {
                let fields = fields("clocks", &[Fold::Sum]);
                for record in self.records(earlier, slot) {
                    add_up(&fields, (&self.clocks, record), (&earlier.clocks, record));
                }
            }
            if self.counters.id != earlier.counters.id {
                self.fold_counters(earlier, slot);
            }
        }
    }

    /// False: both versions move the same clocks, and nothing is to be carried.
    fn has_other_clocks(&self, earlier: &Self) -> bool {
        self.clocks.id != earlier.clocks.id
    }

    /// Slots that have the same owner in both.
    fn common(&self, earlier: &Self) -> impl Iterator<Item = u32> {
        let is_common =
            |slot: &u32| self.owner(*slot).is_some_and(|owner| earlier.owner(*slot) == Some(owner));
        (0..self.slots(earlier)).filter(is_common)
    }

    fn fold_times(&self, earlier: &Self, slot: u32) {
        let now = ticks(monotonic_ns());
        self.fold_clocks(earlier, slot, &[Fold::Clock], |one, other| further(one, other, now));
        self.fold_clocks(earlier, slot, &[Fold::Latest], u64::max);
    }

    /// A slot's records in the other two maps.
    fn records(&self, earlier: &Self, slot: u32) -> Range<u32> {
        let both = self.clocks.memory.length().min(earlier.clocks.memory.length());
        slot * self.each..((slot + 1) * self.each).min(both)
    }

    /// Makes points in time of a slot what `how` makes of both.
    fn fold_clocks(&self, earlier: &Self, slot: u32, folds: &[Fold], how: impl Fn(u64, u64) -> u64) {
        if !self.has_other_clocks(earlier) {
            return;
        }
        let fields = fields("clocks", folds);
        for record in self.records(earlier, slot) {
            for field in &fields {
                if let (Some(now), Some(then)) =
                    (self.clocks.word(record, field), earlier.clocks.word(record, field))
                {
                    let then = then.load(Ordering::Relaxed);
                    let _ =
                        now.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| Some(how(now, then)));
                }
            }
        }
    }

    /// Counters have a block of records for each CPU, which that CPU alone writes, and one behind them
    /// for what is carried over.
    fn fold_counters(&self, earlier: &Self, slot: u32) {
        let fields = fields("counters", &[Fold::Sum]);
        let (block, earlier_block) = (self.clocks.memory.length(), earlier.clocks.memory.length());
        let spare = self.counters.memory.length().saturating_sub(block);
        for record in self.records(earlier, slot) {
            for then in (record..earlier.counters.memory.length()).step_by(earlier_block as usize) {
                add_up(&fields, (&self.counters, spare + record), (&earlier.counters, then));
            }
        }
    }
}

/// Names of the fields of a map that are carried over in these ways.
fn fields(map: &str, folds: &[Fold]) -> Vec<&'static str> {
    let fields = layout_of(map).into_iter().flat_map(|layout| &layout.fields);
    fields.filter(|field| folds.contains(&field.fold)).map(|field| field.name).collect()
}

/// Adds the counts of one record to those of another, and clears them.
fn add_up(fields: &[&str], (to, record): (&Values, u32), (from, earlier): (&Values, u32)) {
    for field in fields {
        if let (Some(now), Some(then)) = (to.word(record, field), from.word(earlier, field)) {
            now.fetch_add(then.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use aya::Pod;
    use aya::maps::Array;

    use super::*;

    /// A version's folder on the BPF file system, removed when dropped.
    struct Folder(PathBuf);

    impl Folder {
        /// With maps for so many allocations, and counters of two CPUs.
        fn new(name: &str, slots: u32) -> Self {
            let folder = PathBuf::from(format!("/sys/fs/bpf/qos-test-{}-{name}", std::process::id()));
            fs::create_dir_all(&folder).expect("a folder");
            array::<Allocation>(&folder, "allocations", 2 * slots);
            array::<Clocks>(&folder, "clocks", 2 * slots);
            array::<Counters>(&folder, "counters", 3 * 2 * slots);
            leave_layouts(&folder).expect("layouts");
            Self(folder)
        }

        fn values(&self, map: &str) -> Values {
            Values::open(&self.0, map).expect("readable").expect("there")
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).expect("removed");
        }
    }

    fn array<T: Pod>(folder: &Path, name: &str, length: u32) {
        const BPF_F_MMAPABLE: u32 = 1 << 10;
        let array = Array::<_, T>::create(length, BPF_F_MMAPABLE).expect("a map");
        array.pin(folder.join(name)).expect("pinned");
    }

    #[test]
    #[ignore = "needs root"]
    fn clocks_and_counters_are_carried_between_maps_of_different_lengths() {
        for (earlier, now) in [(4, 16), (16, 4)] {
            let (before, after) = (Folder::new("before", earlier), Folder::new("after", now));
            let (owners, clocks, counters) =
                (before.values("allocations"), before.values("clocks"), before.values("counters"));
            let set = |values: &Values, record: u32, field: &str, value: u64| {
                values.word(record, field).expect("a word").store(value, Ordering::Relaxed);
            };
            // Two directions of the last slot that both have, on two CPUs.
            let records = [2 * 3, 2 * 3 + 1];
            for record in records {
                set(&owners, record, "id", 77);
                set(&clocks, record, "maximum", 1_000 + u64::from(record));
                for cpu in 0..2 {
                    set(&counters, cpu * 2 * earlier + record, "excess_bytes", 50 + u64::from(cpu * record));
                }
            }
            let carried = Carried::open(&after.0).expect("opened");
            let earlier = Carried::open(&before.0).expect("opened");
            carried.seed(&earlier);
            carried.fold(&earlier);
            let (clocks, counters) = (after.values("clocks"), after.values("counters"));
            let get = |values: &Values, record, field| {
                values.word(record, field).expect("a word").load(Ordering::Relaxed)
            };
            for record in 0..2 * now {
                let (clock, counted) = match record {
                    6 | 7 => (1_000 + u64::from(record), 100 + u64::from(record)),
                    _ => (0, 0),
                };
                assert_eq!(get(&clocks, record, "maximum"), clock, "record {record} of {now} slots");
                let sum: u64 = (0..3).map(|cpu| get(&counters, cpu * 2 * now + record, "excess_bytes")).sum();
                assert_eq!(sum, counted, "record {record} of {now} slots");
            }
        }
    }

    #[test]
    #[ignore = "needs root"]
    fn of_two_clocks_the_one_further_ahead_is_carried_on_also_where_the_other_is_the_larger_number() {
        let (before, after) = (Folder::new("ahead-before", 1), Folder::new("ahead-after", 1));
        let now = ticks(monotonic_ns());
        let ahead = now.wrapping_add(ticks(60_000_000_000));
        // Idle since half of the counter's range: a larger number for half of the time.
        let idle = now.wrapping_sub(1 << 63);
        for (folder, guaranteed, maximum) in [(&before, ahead, idle), (&after, idle, ahead)] {
            let (owners, clocks) = (folder.values("allocations"), folder.values("clocks"));
            for record in 0..2 {
                owners.word(record, "id").expect("a word").store(77, Ordering::Relaxed);
                clocks.word(record, "guaranteed").expect("a word").store(guaranteed, Ordering::Relaxed);
                clocks.word(record, "maximum").expect("a word").store(maximum, Ordering::Relaxed);
            }
        }
        let carried = Carried::open(&after.0).expect("opened");
        carried.set_clocks(&Carried::open(&before.0).expect("opened"));
        let clocks = after.values("clocks");
        for (record, field) in [(0, "guaranteed"), (0, "maximum"), (1, "guaranteed"), (1, "maximum")] {
            let clock = clocks.word(record, field).expect("a word").load(Ordering::Relaxed);
            assert_eq!(clock, ahead, "{field} of record {record}");
        }
    }
}
