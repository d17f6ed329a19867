//! The classifier: from a key to the allocation it belongs to.
//!
//! Up to sixteen tables are looked into; one that can't hold a better rule than the one found is passed
//! over. See `qos_common::classify` for the structure. A list of any length is scanned to its end, so that
//! the answer is always right.

use core::ffi::{c_long, c_void};

use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::bpf_loop;
use qos_common::abi::{FRAGMENT_AGE_NS, Fragment, directed};
use qos_common::classify::{
    Direction, Family, Key, MAX_FORKS, MAX_LIST, Slot, Table, TableSet, selector_of, table_set,
};
use qos_common::compact::{Probe, Word};

use crate::maps::{self, Account};
use crate::mtu::mtu_of;
use crate::packet::{Packet, Piece};

/// A packet, the state of its look-up, and the result.
///
/// It stands in memory of this CPU's own ([`maps::search_of`]) rather than on the stack: the verifier
/// forgets what it knew of a value that goes through a map, so the ways through the parser do not
/// multiply with those through what follows.
#[repr(C)]
pub(crate) struct Search {
    pub(crate) packet: Packet,
    /// Rank of the best rule so far; `u64::MAX` for none.
    pub(crate) rank: u64,
    /// Time in ns of CLOCK_MONOTONIC, read when a rule has matched; zero before.
    pub(crate) now_ns: u64,
    // What is cleared for each packet is not one run of fields: LLVM would make a call of it.
    /// The next rule of the list that is scanned.
    granule: u32,
    /// Slot of the allocation; zero for none.
    pub(crate) slot: u32,
    /// Not zero: rules of allocations that don't live at `now_ns` are passed over.
    living: u32,
    /// First extra of the half that is looked through.
    extras: u32,
    /// Tables looked into.
    pub(crate) tables: u32,
    /// Forks followed.
    pub(crate) forks: u32,
    /// Not zero: there is room for the answer in front of the packet.
    pub(crate) carries: u32,
    /// Rules compared.
    pub(crate) rules: u32,
    /// Rules that matched and whose allocation has ended.
    pub(crate) expired: u32,
    /// What rules are compared with.
    probe: Probe,
    /// Not zero: the packet is held to limits only, and gets no priority and no marking.
    pub(crate) limits_only: u32,
    /// What tc is to do with the packet, as in [`qos_common::abi::Metadata`].
    pub(crate) task: u32,
    /// Words of tables that are looked into next, and behind each as much of its hash.
    ahead: [u64; AHEAD],
    /// The packet's link-layer header, while it is written anew.
    pub(crate) link: [u8; LINK_ROOM],
}

/// Where a search stands. Copied at will, unlike a reference: what is called may write the search too.
#[derive(Clone, Copy)]
pub(crate) struct Place(*mut Search);

impl Place {
    /// Of a pointer to this CPU's own live element of the map of searches.
    #[inline(always)]
    pub(crate) fn new(pointer: *mut Search) -> Self {
        Self(pointer)
    }

    /// The search. Its reference is not to be used behind a call that has the place as well.
    #[inline(always)]
    pub(crate) fn search(self) -> &'static mut Search {
        // SAFETY: the element lives as long as its map, and no other CPU has it.
        unsafe { &mut *self.0 }
    }
}

/// Number of the search of packets.
pub(crate) const PACKET: u32 = 0;
/// Number of that of the program that explains.
pub(crate) const QUESTION: u32 = 1;

/// Longest link-layer header that is read: Ethernet, two tags, PPPoE.
pub(crate) const LINK_ROOM: usize = 32;

impl Search {
    /// Begins anew, for a packet of `direction` that is yet to be read.
    #[inline(always)]
    pub(crate) fn begin(&mut self, direction: u32) {
        self.packet.begin(direction);
        self.rank = u64::MAX;
        self.now_ns = 0;
        self.slot = 0;
        self.living = 0;
        self.tables = 0;
        self.forks = 0;
        self.rules = 0;
        self.expired = 0;
        self.limits_only = 0;
        self.task = 0;
    }

    /// The record of the packet's direction in maps that hold both.
    #[inline(always)]
    fn record(&self, slot: u32) -> u32 {
        directed(slot, Direction::from_bit(self.packet.key.direction))
    }
}

/// Finds the allocation of the packet that was read into the search of that number, which stands at that
/// place, and lets later fragments follow their first one. Nothing is remembered of what is not a packet.
///
/// Returns what the packet is charged to; nothing where the search has no slot.
#[inline(always)]
pub(crate) fn classify<const WHOSE: u32>(place: Place) -> Option<Account> {
    let search = place.search();
    if search.packet.piece == Piece::Later as u32 && follow(search) {
        return account(search);
    }
    find::<WHOSE>(place);
    let search = place.search();
    let mut found = account(search);
    if let Some(Account { allocation, .. }) = found {
        // The clock is read when all that came before is there: the account is on its way together.
        search.now_ns = now_ns();
        if !allocation.lives(search.now_ns) {
            among_living::<WHOSE>(place);
            found = account(place.search());
        }
    }
    let search = place.search();
    if WHOSE == PACKET {
        maps::count_look_up(search);
        if search.packet.piece == Piece::First as u32 {
            remember(search);
        }
    }
    found
}

#[inline(always)]
fn account(search: &Search) -> Option<Account> {
    if search.slot == 0 { None } else { maps::account(search.record(search.slot)) }
}

/// Finds the rule of the packet, whether its allocation still lives or not.
#[inline(always)]
pub(crate) fn find<const WHOSE: u32>(place: Place) {
    let search = place.search();
    search.limits_only = search.packet.key.unknown;
    qos_look_up(WHOSE);
}

/// Looks once more, and passes over what has ended. Out of line: what has ended is soon removed, unless
/// nobody is there to do so.
#[inline(never)]
fn among_living<const WHOSE: u32>(place: Place) {
    let search = place.search();
    search.rank = u64::MAX;
    search.slot = 0;
    search.living = 1;
    qos_look_up(WHOSE);
}

/// Takes over what the first fragment was classified as, if that is known and still holds. Kept out
/// of line: fragments are rare, and the key has a stack frame of its own.
#[inline(never)]
fn follow(search: &mut Search) -> bool {
    let Some(first) = maps::fragment(&search.packet.fragment_key()) else {
        return false;
    };
    search.now_ns = now_ns();
    if search.now_ns.wrapping_sub(first.seen_ns) > FRAGMENT_AGE_NS {
        return false;
    }
    if first.allocation != 0 {
        match maps::allocation(search.record(first.slot)) {
            Some(allocation) if allocation.id == first.allocation && allocation.lives(search.now_ns) => {}
            _ => return false,
        }
        search.slot = first.slot;
        search.rank = u64::from(first.selector);
    }
    true
}

#[inline(never)]
fn remember(search: &mut Search) -> bool {
    let mut first = Fragment { seen_ns: now_ns(), allocation: 0, slot: search.slot, selector: 0 };
    if search.slot != 0 {
        first.selector = selector_of(search.rank);
        if let Some(allocation) = maps::allocation(search.record(search.slot)) {
            first.allocation = allocation.id;
        }
    }
    maps::remember_fragment(&search.packet.fragment_key(), &first)
}

/// MTU of the allocation that answers to this packet belong to; zero: any. Who calls this has no
/// reference to the search.
///
/// Out of line: connections open rarely.
#[inline(never)]
pub(crate) fn opposite_mtu() -> u32 {
    let Some(place) = maps::place_of(PACKET) else { return 0 };
    let search = place.search();
    let (rank, slot) = (search.rank, search.slot);
    turn(&mut search.packet.key);
    search.now_ns = now_ns();
    among_living::<PACKET>(place);
    let search = place.search();
    let mtu = match maps::allocation(search.record(search.slot)) {
        Some(allocation) if search.slot != 0 => mtu_of(allocation, search.packet.key.family),
        _ => 0,
    };
    turn(&mut search.packet.key);
    search.rank = rank;
    search.slot = slot;
    mtu
}

/// Exchanges the ends of a key.
#[inline(always)]
fn turn(key: &mut Key) {
    let (source, source_port) = (key.source, key.source_port);
    key.source = key.destination;
    key.destination = source;
    key.source_port = key.destination_port;
    key.destination_port = source_port;
    key.direction ^= 1;
}

/// Finds the rule of the packet in the search of that number, and says so there.
///
/// A global function: the verifier follows its ways once, on their own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn qos_look_up(whose: u32) -> u32 {
    let Some(search) = maps::search_of(whose) else { return 0 };
    let key = &search.packet.key;
    let family = key.family;
    let Some(set) = maps::tables(table_set(key.direction, family)) else { return 0 };
    search.probe = Probe::of(key);
    if family == Family::V4 as u32 {
        tables::<false>(search, set);
    } else {
        tables::<true>(search, set);
    }
    search.slot
}

/// Tables whose words are read before the first of them is acted on: what the memory takes for one is
/// what it takes for all of them.
const AHEAD: usize = 4;

#[inline(always)]
fn tables<const V6: bool>(search: &mut Search, set: &TableSet) {
    let mut left = set.used;
    for tables in set.tables.chunks_exact(AHEAD) {
        if left == 0 {
            break;
        }
        for (table, place) in tables.iter().zip(0..AHEAD) {
            if table.best < search.rank && root(table).is_empty() {
                search.ahead[place] = word::<V6>(search, set, table);
            }
        }
        for (table, place) in tables.iter().zip(0..AHEAD) {
            if left == 0 {
                break;
            }
            left -= 1;
            if table.best >= search.rank {
                continue;
            }
            search.tables += 1;
            if let Some(list) = list(search, set, root(table), search.ahead[place]) {
                scan::<V6>(search, set, list);
            }
        }
    }
}

#[inline(always)]
fn root(table: &Table) -> Slot {
    // SAFETY: it is a live, aligned word, which userspace replaces by one store.
    unsafe { (&raw const table.root).read_volatile() }
}

/// The word that the packet's addresses lead to in a table, with their hash behind it. Sees to it that the
/// rule which it leads to is on its way, where it leads to one for this hash: without a branch, which nobody
/// could guess, so where it doesn't the half's first rule is asked for.
#[inline(always)]
fn word<const V6: bool>(search: &Search, set: &TableSet, table: &Table) -> u64 {
    let key = &search.packet.key;
    let hash = table.hash(u32::from(V6), key.source, key.destination);
    let word = maps::word(set.position(hash));
    maps::fetch_rule(set.rules.wrapping_add(word.start() & word.leads_on(hash)));
    u64::from(word.raw()) | hash << 32
}

/// First granule of the list that the packet is led to by a table; none: it is empty.
#[inline(always)]
fn list(search: &mut Search, set: &TableSet, root: Slot, ahead: u64) -> Option<u32> {
    let (mut slot, word) = (root, Word::from_raw(ahead as u32));
    if slot.is_empty() {
        if !word.admits(ahead >> 32) {
            return None;
        }
        if !word.is_fork() {
            return Some(set.rules.wrapping_add(word.start()));
        }
        slot = maps::slot(set.slots.wrapping_add(word.start()));
    }
    for _ in 0..MAX_FORKS {
        if !slot.is_fork() {
            break;
        }
        search.forks += 1;
        slot = maps::slot(set.slots.wrapping_add(slot.child(&search.packet.key)));
    }
    if slot.is_empty() || slot.is_fork() { None } else { Some(set.rules.wrapping_add(slot.start())) }
}

/// Rules that are compared before the kernel's own loop goes on: most lists have one.
const AT_ONCE: u32 = 5;

/// Compares the rules of a list, until one matches or none can be better than what was found.
#[inline(always)]
fn scan<const V6: bool>(search: &mut Search, set: &TableSet, list: u32) {
    search.extras = set.extras;
    search.granule = list;
    for _ in 0..AT_ONCE {
        if compare::<V6>(search) {
            return;
        }
    }
    // A loop of this program would be verified step by step. The helper takes nothing but a pointer to the
    // stack.
    let mut state = core::ptr::from_mut(search);
    let step = if V6 { step_v6 } else { step_v4 };
    // SAFETY: the callback has the type that the helper calls, and `state` outlives the call.
    unsafe { bpf_loop(MAX_LIST, step as *mut c_void, (&raw mut state).cast(), 0) };
}

unsafe extern "C" fn step_v4(_: u32, state: *mut c_void) -> c_long {
    // SAFETY: `scan` passes a pointer to its own pointer to this CPU's `Search`.
    let search = unsafe { &mut **state.cast::<*mut Search>() };
    c_long::from(compare::<false>(search))
}

unsafe extern "C" fn step_v6(_: u32, state: *mut c_void) -> c_long {
    // SAFETY: as above.
    let search = unsafe { &mut **state.cast::<*mut Search>() };
    c_long::from(compare::<true>(search))
}

/// Compares the next rule of the list; returns whether that ends the scan.
#[inline(always)]
fn compare<const V6: bool>(search: &mut Search) -> bool {
    let granule = search.granule;
    let Some(first) = maps::rule(granule) else {
        return true;
    };
    let (rule, matches) = if V6 {
        let Some(second) = maps::rule(granule.wrapping_add(1)) else {
            return true;
        };
        search.granule = granule.wrapping_add(2);
        (second, second.matches_v6(first, &search.packet.key, &search.probe))
    } else {
        search.granule = granule.wrapping_add(1);
        (first, first.matches_v4(&search.probe))
    };
    search.rules += 1;
    // Lists are sorted: no better rule follows.
    if rule.rank() >= search.rank {
        return true;
    }
    if !matches || rule.extra() != 0 && !extra_matches(search, rule.extra()) {
        return rule.is_last();
    }
    if search.living != 0 && !lives(search, rule.slot()) {
        search.expired += 1;
        return rule.is_last();
    }
    search.rank = rule.rank();
    search.slot = rule.slot();
    true
}

#[inline(always)]
fn lives(search: &Search, slot: u32) -> bool {
    maps::allocation(search.record(slot)).is_some_and(|allocation| allocation.lives(search.now_ns))
}

/// Few rules name lengths or code points.
#[inline(always)]
fn extra_matches(search: &Search, number: u32) -> bool {
    maps::extra(search.extras.wrapping_add(number)).is_some_and(|extra| extra.matches(&search.packet.key))
}

#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: the helper takes nothing and has no effect.
    unsafe { bpf_ktime_get_ns() }
}
