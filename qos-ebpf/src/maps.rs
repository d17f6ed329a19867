//! The maps, behind small typed functions. Nothing else in this crate names a map.
//!
//! Names are what `bpftool map` shows, cut to 15 characters by the kernel.

use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray};
use aya_ebpf::helpers::bpf_get_smp_processor_id;
use aya_ebpf::macros::btf_map;
use qos_common::abi::{
    ALLOCATION_SLOTS, APPLICATION_SLOTS, Allocation, Answer, Application, Clocks, Counters, EXTRA_ROOM,
    Fragment, FragmentKey, Interface, LINE_SLOTS, Line, LineClasses, LineKey, MAX_FRAGMENTS, MAX_INTERFACES,
    MAX_LINE_PREFIXES, MAX_RULES, Outcome, Outcomes, PROVIDER_SLOTS, Provider, Question, Settings, rule_room,
    slot_room, word_room,
};
use qos_common::classify::{Direction, HALVES, Slot, TABLE_SETS, TableSet, half_sets};
use qos_common::compact::{Extra, Granule, Word};

use crate::classify::{PACKET, Place, Search};

/// `BPF_F_MMAPABLE`, linux/bpf.h: userspace reads and writes the array in place.
const MMAPABLE: usize = 1 << 10;

/// Bits of an outcome's number.
const OUTCOME_BITS: u32 = 15;
const _: () = assert!(size_of::<Outcomes>() == (OUTCOME_BITS as usize + 1) * size_of::<u64>());

const DIRECTIONS: usize = 2;
const ALLOCATION_RECORDS: usize = ALLOCATION_SLOTS as usize * DIRECTIONS;
const PROVIDER_RECORDS: usize = PROVIDER_SLOTS as usize * DIRECTIONS;

#[btf_map(name = "settings")]
static SETTINGS: Array<Settings, 1> = Array::new();
/// In its lowest bit the half of the rules that packets look through; counts the changes of it.
#[btf_map(name = "rule_half")]
static RULE_HALF: Array<u64, 1, MMAPABLE> = Array::new();
/// The next five hold one half of the rules behind the other.
#[btf_map(name = "tables")]
static TABLES: Array<TableSet, { (HALVES * TABLE_SETS) as usize }, MMAPABLE> = Array::new();
/// Words, two in a value: the kernel rounds values up to 8 bytes.
#[btf_map(name = "rule_words")]
static RULE_WORDS: Array<[u32; 2], { (HALVES * word_room(MAX_RULES) / 2) as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "rule_slots")]
static RULE_SLOTS: Array<Slot, { (HALVES * slot_room(MAX_RULES)) as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "rules")]
static RULES: Array<Granule, { (HALVES * rule_room(MAX_RULES)) as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "rule_extras")]
static RULE_EXTRAS: Array<Extra, { (HALVES * EXTRA_ROOM) as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "allocations")]
static ALLOCATIONS: Array<Allocation, ALLOCATION_RECORDS, MMAPABLE> = Array::new();
#[btf_map(name = "clocks")]
static CLOCKS: Array<Clocks, ALLOCATION_RECORDS, MMAPABLE> = Array::new();
#[btf_map(name = "providers")]
static PROVIDERS: Array<Provider, { PROVIDER_SLOTS as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "provider_clocks")]
static PROVIDER_CLOCKS: Array<Clocks, PROVIDER_RECORDS, MMAPABLE> = Array::new();
#[btf_map(name = "applications")]
static APPLICATIONS: Array<Application, { APPLICATION_SLOTS as usize }, MMAPABLE> = Array::new();
/// A block of records for each possible CPU, sized by the loader.
#[btf_map(name = "counters")]
static COUNTERS: Array<Counters, ALLOCATION_RECORDS, MMAPABLE> = Array::new();
/// Likewise.
#[btf_map(name = "prov_counters")]
static PROVIDER_COUNTERS: Array<Counters, PROVIDER_RECORDS, MMAPABLE> = Array::new();
/// Likewise.
#[btf_map(name = "outcomes")]
static OUTCOME_COUNTERS: Array<Outcomes, 1, MMAPABLE> = Array::new();
#[btf_map(name = "interfaces")]
static INTERFACES: HashMap<u32, Interface, { MAX_INTERFACES as usize }> = HashMap::new();
#[btf_map(name = "lines")]
static LINES: HashMap<LineKey, Line, { MAX_LINE_PREFIXES as usize }> = HashMap::new();
#[btf_map(name = "line_classes")]
static LINE_CLASSES: Array<LineClasses, { LINE_SLOTS as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "fragments")]
static FRAGMENTS: LruHashMap<FragmentKey, Fragment, { MAX_FRAGMENTS as usize }> = LruHashMap::new();
/// One for packets, one for the program that explains: on kernels before 6.10 a test run may be
/// interrupted by a packet.
#[btf_map(name = "searches")]
static SEARCHES: PerCpuArray<Search, 2> = PerCpuArray::new();
#[btf_map(name = "trace_clock")]
static TRACE_CLOCK: PerCpuArray<u64, 1> = PerCpuArray::new();
#[btf_map(name = "question")]
static QUESTION: Array<Question, 1, MMAPABLE> = Array::new();
#[btf_map(name = "answer")]
static ANSWER: Array<Answer, 1, MMAPABLE> = Array::new();

#[inline(always)]
pub(crate) fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

/// This CPU's memory for the packet at hand. A program runs to its end before another packet's
/// begins: bottom halves are off.
#[inline(always)]
pub(crate) fn search() -> Option<&'static mut Search> {
    search_of(PACKET)
}

/// The same by its number: [`PACKET`], or [`crate::classify::QUESTION`] for the program that explains,
/// which the daemon runs once at a time.
#[inline(always)]
pub(crate) fn search_of(number: u32) -> Option<&'static mut Search> {
    place_of(number).map(Place::search)
}

/// Where the search of a number stands.
#[inline(always)]
pub(crate) fn place_of(number: u32) -> Option<Place> {
    SEARCHES.get_ptr_mut(number).map(Place::new)
}

/// When all lines that this CPU wrote would have been due one by one, in ns of CLOCK_MONOTONIC.
#[inline(always)]
pub(crate) fn trace_clock() -> Option<&'static mut u64> {
    // SAFETY: as for `search`.
    TRACE_CLOCK.get_ptr_mut(0).map(|clock| unsafe { &mut *clock })
}

/// The tables of a direction and family that packets look through now.
#[inline(always)]
pub(crate) fn tables(set: u32) -> Option<&'static TableSet> {
    let half = RULE_HALF.get_ptr(0)?;
    // SAFETY: the map returned a pointer to its live, aligned element. Userspace replaces it by one store.
    let half = unsafe { half.read_volatile() };
    TABLES.get(half_sets(half) + set)
}

/// A slot, read at once.
#[inline(always)]
pub(crate) fn slot(position: u32) -> Slot {
    match RULE_SLOTS.get_ptr(position) {
        // SAFETY: the map returned a pointer to a live, aligned element. Userspace replaces it by
        // one aligned 64-bit store, so a volatile load sees the old or the new one.
        Some(pointer) => unsafe { pointer.read_volatile() },
        None => Slot::EMPTY,
    }
}

/// A word, read at once.
#[inline(always)]
pub(crate) fn word(position: u32) -> Word {
    let Some(pair) = RULE_WORDS.get_ptr(position / 2) else {
        return Word::EMPTY;
    };
    // SAFETY: the map returned a pointer to two live, aligned words. Userspace replaces both by one aligned
    // 64-bit store, so a volatile load sees the old or the new one.
    Word::from_raw(unsafe { pair.cast::<u32>().add((position & 1) as usize).read_volatile() })
}

#[inline(always)]
pub(crate) fn rule(granule: u32) -> Option<&'static Granule> {
    RULES.get(granule)
}

/// Reads of a rule what is never used, so that the rest of its line of the cache is there when it is.
#[inline(always)]
pub(crate) fn fetch_rule(granule: u32) {
    if let Some(pointer) = RULES.get_ptr(granule) {
        // SAFETY: the map returned a pointer to a live, aligned element.
        unsafe { pointer.cast::<u64>().read_volatile() };
    }
}

#[inline(always)]
pub(crate) fn extra(number: u32) -> Option<&'static Extra> {
    RULE_EXTRAS.get(number)
}

#[inline(always)]
pub(crate) fn allocation(record: u32) -> Option<&'static Allocation> {
    ALLOCATIONS.get(record)
}

/// What packets of one direction of an allocation are charged to by this CPU.
#[derive(Clone, Copy)]
pub(crate) struct Account {
    pub(crate) allocation: &'static Allocation,
    pub(crate) clocks: *mut Clocks,
    pub(crate) counters: *mut Counters,
}

/// The account of a record. Reads of each part of it what is not used, so that their lines of the cache are
/// on their way together.
#[inline(always)]
pub(crate) fn account(record: u32) -> Option<Account> {
    let (Some(allocation), Some(clocks), Some(counters)) =
        (ALLOCATIONS.get(record), clocks(record), counters(record))
    else {
        return None;
    };
    // SAFETY: the maps returned pointers to live, aligned elements.
    unsafe {
        (&raw const allocation.id).read_volatile();
        (&raw const (*clocks).maximum).read_volatile();
        (&raw const (*counters).excess_packets).read_volatile();
    }
    Some(Account { allocation, clocks, counters })
}

#[inline(always)]
pub(crate) fn clocks(record: u32) -> Option<*mut Clocks> {
    CLOCKS.get_ptr_mut(record)
}

#[inline(always)]
pub(crate) fn provider(slot: u32) -> Option<&'static Provider> {
    PROVIDERS.get(slot)
}

#[inline(always)]
pub(crate) fn provider_clocks(record: u32) -> Option<*mut Clocks> {
    PROVIDER_CLOCKS.get_ptr_mut(record)
}

/// This CPU's counters of a direction of an allocation.
#[inline(always)]
pub(crate) fn counters(record: u32) -> Option<*mut Counters> {
    COUNTERS.get_ptr_mut(cpu() * ALLOCATION_RECORDS as u32 + record)
}

/// This CPU's counters of a direction of a provider.
#[inline(always)]
pub(crate) fn provider_counters(record: u32) -> Option<*mut Counters> {
    PROVIDER_COUNTERS.get_ptr_mut(cpu() * PROVIDER_RECORDS as u32 + record)
}

#[inline(always)]
fn cpu() -> u32 {
    // SAFETY: the helper takes nothing and has no effect.
    unsafe { bpf_get_smp_processor_id() as u32 }
}

/// Counts what became of a packet.
#[inline(always)]
pub(crate) fn count(outcome: Outcome) {
    let number = outcome as u32;
    // SAFETY: it was written just now. Read back, it is not known to be small to the compiler, which
    // would leave out the bound that the verifier asks for.
    let number = unsafe { (&raw const number).read_volatile() } & OUTCOME_BITS;
    if let Some(counts) = OUTCOME_COUNTERS.get_ptr_mut(cpu()) {
        // SAFETY: the map returned a pointer to this CPU's element, which has a place for that number,
        // and bottom halves are off.
        unsafe { *counts.cast::<u64>().add(number as usize) += 1 };
    }
}

/// Counts what a look-up took.
#[inline(always)]
pub(crate) fn count_look_up(search: &Search) {
    if let Some(counts) = OUTCOME_COUNTERS.get_ptr_mut(cpu()) {
        // SAFETY: as in `count`.
        let counts = unsafe { &mut *counts };
        counts.look_ups += 1;
        counts.tables += u64::from(search.tables);
        counts.forks += u64::from(search.forks);
        counts.rules += u64::from(search.rules);
    }
}

/// What is known of an interface; nothing of one that is not the gateway's.
#[inline(always)]
pub(crate) fn interface(index: u32) -> Interface {
    match INTERFACES.get_ptr(index) {
        // SAFETY: the value is copied at once; one that is deleted meanwhile is freed after a grace
        // period, and one that is replaced is another element.
        Some(pointer) => unsafe { *pointer },
        None => Interface { flags: 0, v4: [0; 4], v6: [0; 16] },
    }
}

#[inline(always)]
pub(crate) fn line(key: &LineKey) -> Option<Line> {
    // SAFETY: the value is copied at once; one that is deleted meanwhile is freed after a grace
    // period, and one that is replaced is one word.
    LINES.get_ptr(key).map(|pointer| unsafe { *pointer })
}

/// Class of the rest of a line; zero where there is none, and for slot zero.
#[inline(always)]
pub(crate) fn rest_class(line: u32, direction: Direction) -> u32 {
    match LINE_CLASSES.get(line) {
        Some(classes) if line != 0 => classes.rest[direction as usize],
        _ => 0,
    }
}

#[inline(always)]
pub(crate) fn fragment(key: &FragmentKey) -> Option<Fragment> {
    // SAFETY: copied at once. An element reused by another packet in between has another id, and
    // the caller compares the allocation's id before it believes the slot.
    FRAGMENTS.get_ptr(key).map(|pointer| unsafe { *pointer })
}

/// Remembers a first fragment. Where the table is full the least recently used entry makes room; an
/// insertion that fails all the same leaves later fragments to be matched by their other fields,
/// which holds them to limits.
#[inline(always)]
pub(crate) fn remember_fragment(key: &FragmentKey, value: &Fragment) -> bool {
    FRAGMENTS.insert(key, value, 0).is_ok()
}

#[inline(always)]
pub(crate) fn question() -> Option<&'static Question> {
    QUESTION.get(0)
}

#[inline(always)]
pub(crate) fn answer() -> Option<*mut Answer> {
    ANSWER.get_ptr_mut(0)
}

/// Keeps maps that only userspace writes and people read in the object.
#[used]
static APPLICATIONS_IN_OBJECT: &Array<Application, { APPLICATION_SLOTS as usize }, MMAPABLE> = &APPLICATIONS;
