//! The classifier alone, for the benchmark: it runs over the maps of a gateway that is loaded.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(
    unreachable_pub,
    missing_docs,
    dead_code,
    clippy::needless_pass_by_value,
    reason = "the macros of aya wrap entry points in public functions that hand a context over, and the \
              look-up is all that is used of the programs"
)]
#![expect(internal_features, reason = "BPF has no stable atomics; these compile to its own instructions")]

mod classify;
mod limit;
mod maps;
mod mtu;
mod packet;
mod required;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::btf_maps::Array;
use aya_ebpf::macros::{btf_map, xdp};
use aya_ebpf::programs::XdpContext;
use qos_common::classify::{Address, Direction, Family, selector_of};

use crate::classify::{PACKET, Search, find};
use crate::packet::Bytes;

const MMAPABLE: usize = 1 << 10;
/// Packets whose answers are kept.
const ANSWERS: usize = 1 << 17;

/// What a packet was classified as.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    slot: u32,
    selector: u32,
}

#[btf_map(name = "bench_answers")]
static FOUND: Array<Answer, ANSWERS, MMAPABLE> = Array::new();
/// Where the next answer goes.
#[btf_map(name = "bench_found")]
static NEXT: Array<u32, 1, MMAPABLE> = Array::new();

/// The look-up alone, of the addresses, ports and protocol of an IP packet behind an Ethernet header.
/// Whether what was found still lives is left aside.
#[xdp(frags)]
pub fn bench_classify(ctx: XdpContext) -> u32 {
    match look_up(Bytes::new(ctx.data(), ctx.data_end())) {
        Some(search) if search.slot != 0 => XDP_PASS,
        _ => XDP_DROP,
    }
}

/// The same, and keeps what was found. For one CPU at a time.
#[xdp(frags)]
pub fn bench_answer(ctx: XdpContext) -> u32 {
    let (Some(search), Some(next)) = (look_up(Bytes::new(ctx.data(), ctx.data_end())), NEXT.get_ptr_mut(0))
    else {
        return XDP_DROP;
    };
    // SAFETY: the map returned a pointer to its live element, which nobody else writes now.
    let position = unsafe { *next };
    if let Some(place) = FOUND.get_ptr_mut(position) {
        let selector = if search.slot == 0 { 0 } else { selector_of(search.rank) };
        // SAFETY: as above.
        unsafe { *place = Answer { slot: search.slot, selector } };
    }
    // SAFETY: as above.
    unsafe { *next = position + 1 };
    XDP_PASS
}

#[inline(always)]
fn look_up(bytes: Bytes) -> Option<&'static mut Search> {
    let place = maps::place_of(PACKET)?;
    let search = place.search();
    search.begin(Direction::Upstream as u32);
    let key = &mut search.packet.key;
    let ports = match bytes.read::<[u8; 2]>(12)? {
        [0x86, 0xdd] => {
            let [source, destination] = bytes.read::<[[u8; 16]; 2]>(22)?;
            key.source = Address::v6(source);
            key.destination = Address::v6(destination);
            key.family = Family::V6 as u32;
            key.protocol = bytes.read::<[u8; 2]>(20)?[0];
            bytes.read::<[u16; 2]>(54)?
        }
        _ => {
            let [source, destination] = bytes.read::<[[u8; 4]; 2]>(26)?;
            key.source = Address::v4(source);
            key.destination = Address::v4(destination);
            key.family = Family::V4 as u32;
            key.protocol = bytes.read::<[u8; 2]>(23)?[0];
            bytes.read::<[u16; 2]>(34)?
        }
    };
    key.source_port = u16::from_be(ports[0]);
    key.destination_port = u16::from_be(ports[1]);
    key.length = 46;
    key.dscp = 0;
    find::<PACKET>(place);
    let search = place.search();
    maps::count_look_up(search);
    Some(search)
}
