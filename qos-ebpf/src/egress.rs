//! The way out: the class that the packet queues in, and its code point. A packet that no hook of
//! ours has seen, made on the box or come in elsewhere, is classified and policed here. One whose
//! mark was lost is classified again, and not charged again.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use qos_common::abi::{Allocation, IN_USE, LineKey, MARK_DSCP, Outcome, Settings, directed};
use qos_common::classify::{Direction, Family, Key};
use qos_common::length::{LinkLayer, charged_segments};

use crate::classify::{Search, classify};
use crate::limit::{count_marked, judge};
use crate::maps;
use crate::mark::write_dscp;
use crate::packet::{Bytes, Packet, parse};

/// Bytes that the parser may need: Ethernet, two tags, PPPoE, an IPv6 header and some extensions.
const HEADERS: u32 = 192;

/// Gives a packet its class and code point. The outcome says whether it may leave.
#[inline(always)]
pub(crate) fn run<const DIRECTION: u32>(ctx: &TcContext) -> Outcome {
    let Some(settings) = maps::settings() else {
        return Outcome::MissingEntry;
    };
    let direction = Direction::from_bit(DIRECTION);
    // SAFETY: a read of this program's own context.
    let mark = unsafe { (*ctx.skb.skb).mark };
    let marked = settings.mark.read(mark).filter(|marked| marked.direction == direction);
    let (outcome, slot) = match marked {
        Some(marked) => (Outcome::Admitted, marked.slot),
        None => {
            let (outcome, slot) = police(ctx, direction);
            maps::count(outcome);
            (outcome, slot)
        }
    };
    if matches!(outcome, Outcome::OverMaximum | Outcome::OverAggregate) {
        return outcome;
    }
    let allocation = match slot {
        0 => None,
        slot => maps::allocation(directed(slot, direction)).filter(|found| found.flags & IN_USE != 0),
    };
    send(ctx, settings, allocation, slot, direction, marked.is_none());
    if slot != 0 && allocation.is_none() {
        maps::count(Outcome::StaleMark);
    }
    outcome
}

/// Reads, classifies and charges a packet that carries no mark of ours. Returns what became of it
/// and the slot of its allocation, zero for none.
#[inline(always)]
fn police(ctx: &TcContext, direction: Direction) -> (Outcome, u32) {
    if qos_read(ctx.skb.skb, direction as u32) == 0 {
        return (Outcome::Unclassified, 0);
    }
    // Not before: who reads has a reference of its own.
    let Some(search) = maps::search() else {
        return (Outcome::MissingEntry, 0);
    };
    search.packet.key.length = segment_length(ctx, &search.packet);
    classify::<true>(search);
    // SAFETY: a read of this program's own context.
    if maps::judged_at(unsafe { (*ctx.skb.skb).ingress_ifindex }) {
        return (Outcome::LostMark, if search.limits_only == 0 { search.slot } else { 0 });
    }
    if search.slot == 0 {
        return (Outcome::Unclassified, 0);
    }
    let Some(allocation) = maps::allocation(directed(search.slot, direction)) else {
        return (Outcome::MissingEntry, 0);
    };
    let bytes = charge_of(ctx, &search.packet, allocation);
    let outcome = judge::<true>(allocation, search.slot, direction, search.now_ns, bytes).outcome();
    (outcome, if search.limits_only == 0 { search.slot } else { 0 })
}

/// Sets class and code point; observing, only counts what would be marked. `was_read`: what could
/// be read of the headers is in this CPU's search.
#[inline(always)]
fn send(
    ctx: &TcContext,
    settings: &Settings,
    allocation: Option<&'static Allocation>,
    slot: u32,
    direction: Direction,
    was_read: bool,
) {
    let observes = settings.observe != 0;
    let remark = allocation.filter(|allocation| allocation.flags & MARK_DSCP != 0);
    let mut class = match allocation {
        Some(allocation) => allocation.class,
        None => 0,
    };
    let lines = !observes && settings.line_lengths_v4_used | settings.line_lengths_v6_used != 0;
    if remark.is_some() || class == 0 && lines {
        if !was_read {
            qos_read(ctx.skb.skb, direction as u32);
        }
        // Addresses come first: a packet that ends before its ports still has a line.
        if let Some(Search { packet, .. }) = maps::search().filter(|search| search.packet.ip_length != 0) {
            if class == 0 && lines {
                class = line_class(settings, &packet.key, direction);
            }
            if let Some(allocation) = remark {
                remark_packet(ctx, packet, allocation, slot, direction, observes);
            }
        }
    }
    if class == 0 {
        class = settings.default_class[direction as usize];
    }
    if class != 0 && !observes {
        // SAFETY: `priority` is a field that programs of this type may write.
        unsafe { (*ctx.skb.skb).priority = class };
    }
}

/// Writes the allocation's code point, or only counts what would be marked.
#[inline(always)]
fn remark_packet(
    ctx: &TcContext,
    packet: &Packet,
    allocation: &Allocation,
    slot: u32,
    direction: Direction,
    observes: bool,
) {
    let marked = if observes {
        packet.key.dscp != allocation.dscp
    } else {
        write_dscp(Bytes::new(ctx.data(), ctx.data_end()), packet, allocation.dscp)
    };
    if marked {
        count_marked(allocation, slot, direction, charge_of(ctx, packet, allocation));
    }
}

/// Class of what no allocation has a class for: the rest of the line that the packet's subscriber is
/// on, or where none is known the link's.
#[inline(always)]
pub(crate) fn rest_class(settings: &Settings, key: &Key, direction: Direction) -> u32 {
    match line_class(settings, key, direction) {
        0 => settings.default_class[direction as usize],
        class => class,
    }
}

/// Class of the rest of the line that the packet's subscriber is on; zero where none is known.
#[inline(never)]
fn line_class(settings: &Settings, key: &Key, direction: Direction) -> u32 {
    let subscriber = match direction {
        Direction::Upstream => key.source,
        Direction::Downstream => key.destination,
    };
    let (lengths, used) = if key.family == Family::V4 as u32 {
        (&settings.line_lengths_v4, settings.line_lengths_v4_used)
    } else {
        (&settings.line_lengths_v6, settings.line_lengths_v6_used)
    };
    #[expect(clippy::needless_range_loop, reason = "the verifier follows an index with a constant bound")]
    for i in 0..lengths.len() {
        if i as u32 >= used {
            break;
        }
        let length = u32::from(lengths[i]);
        let key = LineKey { address: subscriber.prefix(length), length, family: key.family };
        if let Some(line) = maps::line(&key) {
            return line.rest_class[direction as usize];
        }
    }
    0
}

/// Reads the packet's headers into this CPU's search, pulling them into the linear part first if need
/// be, and tells whether they could be read.
///
/// A global function: the verifier follows the ways through the parser once, on their own, and not
/// again behind each way that leads here.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn qos_read(skb: *mut __sk_buff, direction: u32) -> u32 {
    let Some(search) = maps::search() else {
        return 0;
    };
    search.begin(direction);
    let ctx = TcContext::new(skb);
    let length = ctx.len();
    if (ctx.data_end().wrapping_sub(ctx.data()) as u32) < HEADERS.min(length) {
        // A packet that can't be pulled is read as far as it goes.
        let _ = ctx.pull_data(HEADERS.min(length));
    }
    let bytes = Bytes::new(ctx.data(), ctx.data_end());
    u32::from(parse(bytes, false, length, &mut search.packet).is_ok())
}

/// Segments of a GSO super-packet; one for any other packet.
#[inline(always)]
fn segments(ctx: &TcContext) -> u32 {
    // SAFETY: a read of this program's own context.
    unsafe { (*ctx.skb.skb).gso_segs }.max(1)
}

/// IP length and transport headers that each segment repeats. At egress `wire_len` counts them once
/// for each segment (linux/net/core/dev.c, qdisc_pkt_len_init, 6.1).
#[inline(always)]
fn repeated_headers(ctx: &TcContext, packet: &Packet, segments: u32) -> u32 {
    // SAFETY: a read of this program's own context.
    let wire_length = unsafe { (*ctx.skb.skb).wire_len };
    let extra = wire_length.saturating_sub(ctx.len());
    (extra / (segments - 1)).saturating_sub(packet.network)
}

/// IP length of a packet as it will be on the wire.
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
fn charge_of(ctx: &TcContext, packet: &Packet, allocation: &Allocation) -> u32 {
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
