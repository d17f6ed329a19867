//! What the benchmark drives the programs with: each run takes the next packet of a list, writes its
//! headers into the frame, and goes on with the program that is measured. A packet that never
//! changes would measure nothing but warm caches.
#![no_std]
#![no_main]
#![expect(
    unreachable_pub,
    missing_docs,
    clippy::needless_pass_by_value,
    reason = "the macros of aya wrap entry points in public functions that hand a context over"
)]

#[expect(dead_code, reason = "the benchmark parses and nothing else")]
mod packet;
mod required;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::btf_maps::lpm_trie::Key as Prefix;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, ProgramArray};
use aya_ebpf::macros::{btf_map, classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};

use crate::packet::{Bytes, Packet, parse};

const MMAPABLE: usize = 1 << 10;
/// Ethernet, IPv6 and UDP; shorter headers have zeros behind them.
const HEADERS: usize = 62;
/// Ethernet, IPv4 and UDP, which is all that a frame of 60 bytes has room for.
const HEADERS_V4: usize = 42;
/// Has room for the headers that any kind of box forwards: two tags, IPv6, UDP.
const HEAD: usize = 96;

/// A packet of the list: Ethernet, IP and UDP headers, and the mark it comes with at tc.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Step {
    headers: [u8; HEADERS],
    reserved: [u8; 2],
    mark: u32,
}

/// The beginning of the one frame that [`bench_frame`] writes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; HEAD],
}

/// What a classifier sees of an IPv4 packet, as it stands in the frame.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    source: u32,
    destination: u32,
    ports: u32,
    protocol: u32,
}

/// The same of an IPv6 packet.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Flow6 {
    addresses: [u32; 8],
    ports: u32,
    protocol: u32,
}

#[btf_map(name = "steps")]
static STEPS: Array<Step, { 1 << 17 }, MMAPABLE> = Array::new();
/// Number of packets in the list.
#[btf_map(name = "length")]
static LENGTH: Array<u32, 1> = Array::new();
#[btf_map(name = "head")]
static HEADS: Array<Head, 1> = Array::new();
#[btf_map(name = "cursor")]
static CURSOR: PerCpuArray<u32, 1> = PerCpuArray::new();
/// The program that is measured, by XDP and by tc.
#[btf_map(name = "xdp_targets")]
static XDP_TARGETS: ProgramArray<1> = ProgramArray::new();
#[btf_map(name = "tc_targets")]
static TC_TARGETS: ProgramArray<1> = ProgramArray::new();
#[btf_map(name = "parsed")]
static PARSED: PerCpuArray<Packet, 1> = PerCpuArray::new();

/// The baselines of a look-up: the prefixes of destinations, and whole flows.
#[btf_map(name = "prefixes")]
static PREFIXES: LpmTrie<u32, u32, { 1 << 20 }> = LpmTrie::new();
#[btf_map(name = "flows")]
static FLOWS: HashMap<Flow, u32, { 1 << 17 }> = HashMap::new();
#[btf_map(name = "prefixes6")]
static PREFIXES6: LpmTrie<[u32; 4], u32, { 1 << 20 }> = LpmTrie::new();
#[btf_map(name = "flows6")]
static FLOWS6: HashMap<Flow6, u32, { 1 << 17 }> = HashMap::new();
/// What else a machine has in its caches: 8 MB, by lines, and where this CPU reads next.
#[btf_map(name = "others")]
static OTHERS: Array<Line, { 1 << OTHERS_BITS }, MMAPABLE> = Array::new();
#[btf_map(name = "other")]
static OTHER: PerCpuArray<u32, 1> = PerCpuArray::new();

const OTHERS_BITS: u32 = 17;
/// Lines read between two packets.
const OTHERS_READ: u32 = 32;

/// A line of the cache.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub struct Line {
    words: [u64; 8],
}

#[inline(always)]
fn next() -> Option<&'static Step> {
    let cursor = CURSOR.get_ptr_mut(0)?;
    let length = *LENGTH.get(0)?;
    // SAFETY: this CPU's own element, and bottom halves are off.
    let position = unsafe { *cursor };
    let following = position + 1;
    // SAFETY: as above.
    unsafe { *cursor = if following >= length { 0 } else { following } };
    STEPS.get(position)
}

#[inline(always)]
fn write(bytes: Bytes, step: &Step) {
    if let Some(place) = bytes.locate::<[u8; HEADERS]>(0) {
        // SAFETY: `locate` checked that all of it is in the packet.
        unsafe { *place = step.headers };
    } else if let (Some(place), Some(headers)) =
        (bytes.locate::<[u8; HEADERS_V4]>(0), step.headers.first_chunk())
    {
        // SAFETY: as above.
        unsafe { *place = *headers };
    }
}

/// Writes the next packet and goes on with the target; without one the packet goes to the stack.
#[xdp(frags)]
pub fn bench_xdp(ctx: XdpContext) -> u32 {
    go_on(&ctx)
}

/// The same as [`bench_xdp`] with caches that others use too.
#[xdp(frags)]
pub fn bench_cold(ctx: XdpContext) -> u32 {
    pollute();
    go_on(&ctx)
}

#[inline(always)]
fn go_on(ctx: &XdpContext) -> u32 {
    if let Some(step) = next() {
        write(Bytes::new(ctx.data(), ctx.data_end()), step);
    }
    // It returns only where there is no target.
    // SAFETY: nothing here has a drop method.
    unsafe { XDP_TARGETS.tail_call(ctx, 0) };
    XDP_PASS
}

/// Reads lines at random places (Marsaglia's xorshift of 32 bits).
#[inline(always)]
fn pollute() {
    let Some(state) = OTHER.get_ptr_mut(0) else { return };
    // SAFETY: this CPU's own element, and bottom halves are off.
    let mut number = unsafe { *state } | 1;
    for _ in 0..OTHERS_READ {
        number ^= number << 13;
        number ^= number >> 17;
        number ^= number << 5;
        if let Some(line) = OTHERS.get_ptr(number >> (32 - OTHERS_BITS)) {
            // SAFETY: the map returned a pointer to its live element.
            unsafe { (&raw const (*line).words[0]).read_volatile() };
        }
    }
    // SAFETY: as above.
    unsafe { *state = number };
}

/// One look-up of the destination among prefixes.
#[xdp(frags)]
pub fn bench_lpm(ctx: XdpContext) -> u32 {
    let destination = Bytes::new(ctx.data(), ctx.data_end()).read::<u32>(30);
    match destination.and_then(|address| PREFIXES.get(&Prefix::new(32, address))) {
        Some(_) => XDP_PASS,
        None => XDP_DROP,
    }
}

/// One look-up of the whole flow.
#[xdp(frags)]
pub fn bench_hash(ctx: XdpContext) -> u32 {
    match flow(Bytes::new(ctx.data(), ctx.data_end())).and_then(|flow| FLOWS.get_ptr(flow)) {
        Some(_) => XDP_PASS,
        None => XDP_DROP,
    }
}

/// As [`bench_lpm`], of IPv6 packets.
#[xdp(frags)]
pub fn bench_lpm6(ctx: XdpContext) -> u32 {
    let destination = Bytes::new(ctx.data(), ctx.data_end()).read::<[u32; 4]>(38);
    match destination.and_then(|address| PREFIXES6.get(&Prefix::new(128, address))) {
        Some(_) => XDP_PASS,
        None => XDP_DROP,
    }
}

/// As [`bench_hash`], of IPv6 packets.
#[xdp(frags)]
pub fn bench_hash6(ctx: XdpContext) -> u32 {
    match flow6(Bytes::new(ctx.data(), ctx.data_end())).and_then(|flow| FLOWS6.get_ptr(flow)) {
        Some(_) => XDP_PASS,
        None => XDP_DROP,
    }
}

#[inline(always)]
fn flow(bytes: Bytes) -> Option<Flow> {
    // Behind an Ethernet header: the protocol, both addresses, both ports.
    let protocol = u32::from(bytes.read::<[u8; 2]>(23)?[0]);
    let [source, destination, ports] = bytes.read::<[u32; 3]>(26)?;
    Some(Flow { source, destination, ports, protocol })
}

#[inline(always)]
fn flow6(bytes: Bytes) -> Option<Flow6> {
    let protocol = u32::from(bytes.read::<[u8; 2]>(20)?[0]);
    let addresses = bytes.read::<[u32; 8]>(22)?;
    let ports = bytes.read::<u32>(54)?;
    Some(Flow6 { addresses, ports, protocol })
}

/// Writes the same packet always, whatever its headers are, and goes on with the target: the stack
/// changes what is in a frame, and a live frame comes back as it was left.
#[xdp(frags)]
pub fn bench_frame(ctx: XdpContext) -> u32 {
    if let Some(head) = HEADS.get(0)
        && let Some(place) = Bytes::new(ctx.data(), ctx.data_end()).locate::<[u8; HEAD]>(0)
    {
        // SAFETY: `locate` checked that all of it is in the packet.
        unsafe { *place = head.bytes };
    }
    // SAFETY: nothing here has a drop method.
    unsafe { XDP_TARGETS.tail_call(&ctx, 0) };
    XDP_PASS
}

/// The same as [`bench_xdp`] at tc, with the packet's mark.
#[classifier]
pub fn bench_tc(ctx: TcContext) -> i32 {
    if let Some(step) = next() {
        write(Bytes::new(ctx.data(), ctx.data_end()), step);
        // SAFETY: `mark` is a field that programs of this type may write.
        unsafe { (*ctx.skb.skb).mark = step.mark };
    }
    // SAFETY: as above.
    unsafe { TC_TARGETS.tail_call(&ctx, 0) };
    -1
}

/// The baseline: what a program that does nothing costs.
#[xdp(frags)]
pub fn bench_empty(_ctx: XdpContext) -> u32 {
    XDP_PASS
}

/// The baseline at tc.
#[classifier]
pub fn bench_empty_tc(_ctx: TcContext) -> i32 {
    -1
}

/// The parser alone.
#[xdp(frags)]
pub fn bench_parse(ctx: XdpContext) -> u32 {
    if let Some(packet) = PARSED.get_ptr_mut(0) {
        // SAFETY: this CPU's own element, and bottom halves are off.
        let packet = unsafe { &mut *packet };
        packet.begin(0);
        let bytes = Bytes::new(ctx.data(), ctx.data_end());
        if parse(bytes, false, bytes.length() as u32, packet).is_err() {
            return XDP_DROP;
        }
    }
    XDP_PASS
}

/// Where forwarded packets end; ARP goes to the stack.
#[xdp(frags)]
pub fn bench_drop(ctx: XdpContext) -> u32 {
    match Bytes::new(ctx.data(), ctx.data_end()).read::<[u8; 14]>(0) {
        Some([.., 8, 6]) => XDP_PASS,
        _ => XDP_DROP,
    }
}
