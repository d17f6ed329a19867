//! Packets as tc programs meet them: behind GRO, before segmentation, with the outer VLAN tag beside
//! them, and on some interfaces without an Ethernet header.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_MAC;
use aya_ebpf::helpers::generated::bpf_skb_load_bytes_relative;
use aya_ebpf::programs::TcContext;
use qos_common::abi::{Allocation, LAYER3, Outcome, Settings};
use qos_common::classify::Direction;
use qos_common::length::{LinkLayer, charged_segments};

use crate::classify::{PACKET, Search, classify};
use crate::limit::judge;
use crate::maps;
use crate::mtu::qos_mtu_skb;
use crate::packet::{Bytes, Packet, parse};
use crate::tell::lower_mss;

/// Bytes that the parser may need: Ethernet, two tags, PPPoE, an IPv6 header and some extensions.
const HEADERS: u32 = 192;

/// Protocol number (IANA).
const TCP: u8 = 6;
/// Length of a UDP header.
const UDP_HEADER: u32 = 8;

/// Reads, classifies and charges a packet. Returns what became of it and the slot of its allocation,
/// zero for none. `charged`: it was charged before, and only its allocation is not known any more.
#[inline(always)]
pub(crate) fn police(
    ctx: &TcContext,
    settings: &Settings,
    direction: Direction,
    charged: bool,
) -> (Outcome, u32) {
    if let Err(reason) = read(ctx, direction) {
        return (reason, 0);
    }
    // Not before: who reads has a reference of its own.
    let Some(place) = maps::place_of(PACKET) else {
        return (Outcome::MissingEntry, 0);
    };
    let search = place.search();
    search.packet.key.length = segment_length(ctx, &search.packet);
    let account = classify::<PACKET>(place);
    let search = place.search();
    let slot = if search.limits_only == 0 { search.slot } else { 0 };
    if settings.mtus != 0 {
        if qos_mtu_skb(ctx.skb.skb) != 0 {
            return (Outcome::TooBig, slot);
        }
        let Search { task, slot, .. } = *place.search();
        if task != 0 && settings.observe == 0 {
            lower_mss(ctx, task, slot, direction);
        }
    }
    let search = place.search();
    if charged {
        return (Outcome::LostMark, slot);
    }
    if search.slot == 0 {
        return (Outcome::Unclassified, 0);
    }
    let Some(account) = account else {
        return (Outcome::MissingEntry, 0);
    };
    let bytes = charge_of(ctx, &search.packet, account.allocation);
    (judge::<true>(account, direction, search.now_ns, bytes).outcome(), slot)
}

/// Reads the packet's headers into this CPU's search, pulling them into the linear part first if need
/// be.
#[inline(always)]
pub(crate) fn read(ctx: &TcContext, direction: Direction) -> Result<(), Outcome> {
    // SAFETY: a read of this program's own context.
    let layer3 = maps::interface(unsafe { (*ctx.skb.skb).ifindex }).flags & LAYER3;
    let direction = direction as u32;
    let mut outcome = qos_read(ctx.skb.skb, direction, layer3);
    if outcome != Outcome::Admitted as u32 && layer3 == 0 && lacks_ethernet(ctx) {
        outcome = qos_read(ctx.skb.skb, direction, LAYER3);
    }
    match Outcome::from_raw(outcome) {
        Outcome::Admitted => Ok(()),
        reason => Err(reason),
    }
}

/// As [`read`]. Returns [`Outcome::Admitted`] if the headers could be read, or why not. `layer3`, not zero:
/// they begin with the IP header.
///
/// A global function: the verifier follows the ways through the parser once, on their own, and not
/// again behind each way that leads here.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn qos_read(skb: *mut __sk_buff, direction: u32, layer3: u32) -> u32 {
    let Some(search) = maps::search() else {
        return Outcome::MissingEntry as u32;
    };
    search.begin(direction);
    let ctx = TcContext::new(skb);
    let length = ctx.len();
    if (ctx.data_end().wrapping_sub(ctx.data()) as u32) < HEADERS.min(length) {
        // A packet that can't be pulled is read as far as it goes.
        let _ = ctx.pull_data(HEADERS.min(length));
    }
    let bytes = Bytes::new(ctx.data(), ctx.data_end());
    match parse(bytes, layer3 != 0, length, &mut search.packet) {
        Ok(()) => Outcome::Admitted as u32,
        Err(reason) => reason as u32,
    }
}

/// Whether a packet of an Ethernet interface begins with its IP header all the same. Behind a generic
/// XDP program it does at tc ingress, where the kernel had to copy it: the copy forgets the length of
/// the Ethernet header (linux/net/core/skbuff.c, skb_pp_cow_data, 6.9 to 6.18).
#[inline(always)]
fn lacks_ethernet(ctx: &TcContext) -> bool {
    let mut ethernet = [0_u8; 14];
    // SAFETY: the helper writes at most that many bytes into the buffer.
    let result = unsafe {
        bpf_skb_load_bytes_relative(
            ctx.skb.skb.cast(),
            0,
            ethernet.as_mut_ptr().cast(),
            ethernet.len() as u32,
            BPF_HDR_START_MAC,
        )
    };
    let bytes = Bytes::new(ctx.data(), ctx.data_end());
    result == 0 && bytes.read::<[u8; 14]>(0).is_some_and(|start| start != ethernet)
}

/// Segments of a GSO super-packet; one for any other packet.
#[inline(always)]
fn segments(ctx: &TcContext) -> u32 {
    // SAFETY: a read of this program's own context.
    unsafe { (*ctx.skb.skb).gso_segs }.max(1)
}

/// IP length and transport headers that each segment of a super-packet repeats. At egress `wire_len`
/// counts them once for each segment (linux/net/core/dev.c, qdisc_pkt_len_init, 6.1); at ingress it
/// does not, and they are read.
#[inline(always)]
fn repeated_headers(ctx: &TcContext, packet: &Packet, segments: u32) -> u32 {
    // SAFETY: a read of this program's own context.
    let wire_length = unsafe { (*ctx.skb.skb).wire_len };
    let extra = wire_length.saturating_sub(ctx.len());
    if extra != 0 {
        return (extra / (segments - 1)).saturating_sub(packet.network);
    }
    let network = packet.transport.saturating_sub(packet.network);
    if packet.key.protocol != TCP {
        return network + UDP_HEADER;
    }
    // The mask tells the verifier where it can be.
    let offset = (packet.transport as usize & 0xff) + 12;
    let data_offset = Bytes::new(ctx.data(), ctx.data_end()).read::<[u8; 2]>(offset);
    network + u32::from(data_offset.map_or(5, |bytes| bytes[0] >> 4)) * 4
}

/// IP length of a packet as it is on the wire.
#[inline(always)]
fn segment_length(ctx: &TcContext, packet: &Packet) -> u16 {
    let segments = segments(ctx);
    if segments == 1 {
        return packet.key.length;
    }
    // SAFETY: a read of this program's own context.
    let payload = unsafe { (*ctx.skb.skb).gso_size };
    repeated_headers(ctx, packet, segments).saturating_add(payload).min(0xffff) as u16
}

/// Bytes that the packet is charged on the allocation's line.
#[inline(always)]
pub(crate) fn charge_of(ctx: &TcContext, packet: &Packet, allocation: &Allocation) -> u32 {
    let layer = LinkLayer::from_raw(allocation.link_layer);
    let segments = segments(ctx);
    if segments == 1 {
        return charged_segments(packet.ip_length, 0, 1, 0, allocation.overhead, layer);
    }
    let header = repeated_headers(ctx, packet, segments);
    // SAFETY: a read of this program's own context.
    let payload = unsafe { (*ctx.skb.skb).gso_size };
    charged_segments(packet.ip_length, header, segments, payload, allocation.overhead, layer)
}
