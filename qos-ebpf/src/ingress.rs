//! The way in: XDP parses, classifies, polices and leaves the answer in front of the packet; tc
//! ingress moves it into the mark, where it survives routing. Where there is no XDP, tc ingress does
//! all of it.

use aya_ebpf::helpers::generated::bpf_xdp_adjust_meta;
use aya_ebpf::programs::{TcContext, XdpContext};
use qos_common::abi::{METADATA_MAGIC, Metadata, Outcome, Settings, TELL_SENDER};
use qos_common::classify::Direction;
use qos_common::length::{LinkLayer, charged};
use qos_common::mark::{Marked, Owner};

use crate::classify::{PACKET, Place, classify, now_ns};
use crate::egress::line_of;
use crate::limit::judge;
use crate::maps;
use crate::mtu::qos_mtu_frame;
use crate::packet::{Bytes, Packet, parse};
use crate::skb;
use crate::tell::{TC_NEXT, lower_mss, tell_sender};

/// Classifies and polices a frame that came in.
#[inline(always)]
pub(crate) fn xdp<const DIRECTION: u32>(ctx: &XdpContext) -> Outcome {
    let (Some(settings), Some(place)) = (maps::settings(), maps::place_of(PACKET)) else {
        return Outcome::MissingEntry;
    };
    // Without room for it, the packet loses its mark, and egress classifies it again.
    let carries = reserve_metadata(ctx);
    let bytes = Bytes::new(ctx.data(), ctx.data_end());
    let direction = Direction::from_bit(DIRECTION);
    let search = place.search();
    search.begin(DIRECTION);
    search.carries = u32::from(carries);
    let outcome = match parse(bytes, false, bytes.length() as u32, &mut search.packet) {
        Ok(()) => police(ctx, settings, place, direction, carries),
        Err(reason) => reason,
    };
    let search = place.search();
    let slot = if search.limits_only == 0 { search.slot } else { 0 };
    if carries {
        let task = if settings.observe == 0 { search.task } else { 0 };
        write_metadata(ctx, settings, answer(settings, &search.packet, outcome, direction, slot), task);
    }
    outcome
}

/// Whether the packet that XDP refused goes on to tc ingress all the same, to tell its sender.
#[inline(always)]
pub(crate) fn hands_over(outcome: Outcome) -> bool {
    outcome == Outcome::TooBig && maps::search().is_some_and(|search| search.carries != 0 && search.task != 0)
}

/// Classifies and polices a packet that came in where XDP does not, and marks it.
#[inline(always)]
pub(crate) fn tc<const DIRECTION: u32>(ctx: &TcContext) -> Outcome {
    let Some(settings) = maps::settings() else {
        return Outcome::MissingEntry;
    };
    let direction = Direction::from_bit(DIRECTION);
    let (outcome, slot) = skb::police(ctx, settings, direction, false);
    // What could be read of the headers is in this CPU's search.
    let Some(search) = maps::search() else {
        return Outcome::MissingEntry;
    };
    write_mark(ctx, settings, answer(settings, &search.packet, outcome, direction, slot));
    outcome
}

/// What the mark is to say. Observing, a packet that would be dropped goes on, and is nothing that
/// would be marked.
#[inline(always)]
fn answer(settings: &Settings, packet: &Packet, outcome: Outcome, direction: Direction, slot: u32) -> Marked {
    let over = matches!(outcome, Outcome::OverMaximum | Outcome::OverAggregate | Outcome::TooBig);
    let owner = if slot != 0 && !over {
        Owner::of_allocation(slot)
    } else if direction == Direction::Upstream && settings.marked_lines != 0 && packet.ip_length != 0 {
        // A packet that ends before its ports still has a line.
        Owner::of_line(line_of(settings, &packet.key, direction))
    } else {
        Owner::default()
    };
    Marked { direction, owner }
}

/// Classifies and charges the packet that was read. What egress is to classify again, for want of a
/// place for the answer, is looked at there for its MTU.
#[inline(always)]
fn police(
    ctx: &XdpContext,
    settings: &Settings,
    place: Place,
    direction: Direction,
    carries: bool,
) -> Outcome {
    let account = classify::<PACKET>(place);
    if settings.mtus != 0 && carries && qos_mtu_frame(ctx.ctx) != 0 {
        return Outcome::TooBig;
    }
    let search = place.search();
    if search.slot == 0 {
        return Outcome::Unclassified;
    }
    let Some(account) = account else {
        return Outcome::MissingEntry;
    };
    let layer = LinkLayer::from_raw(account.allocation.link_layer);
    let bytes = charged(search.packet.ip_length, account.allocation.overhead, layer);
    judge::<true>(account, direction, search.now_ns, bytes).outcome()
}

/// Makes room for the answer in front of the packet, unless an earlier run on this packet did.
#[inline(always)]
fn reserve_metadata(ctx: &XdpContext) -> bool {
    let (meta, data) = (ctx.metadata(), ctx.data());
    if meta + size_of::<Metadata>() <= data {
        // SAFETY: the comparison showed the verifier that the whole of it lies in front of the packet.
        let found = unsafe { (meta as *const Metadata).read_unaligned() };
        if found.magic == METADATA_MAGIC {
            return true;
        }
    }
    // SAFETY: a helper call on this program's own context.
    unsafe { bpf_xdp_adjust_meta(ctx.ctx, -(size_of::<Metadata>() as i32)) == 0 }
}

#[inline(always)]
fn write_metadata(ctx: &XdpContext, settings: &Settings, marked: Marked, task: u32) {
    let meta = ctx.metadata();
    if meta + size_of::<Metadata>() > ctx.data() {
        return;
    }
    let serial = if task == 0 { 0 } else { now_ns() as u32 };
    let answer = Metadata { magic: METADATA_MAGIC, mark: settings.mark.write(0, marked), task, serial };
    // SAFETY: the comparison showed the verifier that the whole of it lies in front of the packet.
    unsafe { (meta as *mut Metadata).write_unaligned(answer) };
}

/// Moves the answer of XDP into the mark, and does what XDP left to do. Returns the verdict.
#[inline(always)]
pub(crate) fn take_over(ctx: &TcContext) -> i32 {
    let Some(settings) = maps::settings() else {
        return TC_NEXT;
    };
    let skb = ctx.skb.skb;
    // SAFETY: reads of this program's own context.
    let (meta, data) = unsafe { ((*skb).data_meta as usize, (*skb).data as usize) };
    if meta + size_of::<Metadata>() > data {
        return TC_NEXT;
    }
    // SAFETY: the comparison showed the verifier that the whole of it lies in front of the packet.
    let metadata = unsafe { (meta as *const Metadata).read_unaligned() };
    if metadata.magic != METADATA_MAGIC {
        return TC_NEXT;
    }
    let Some(marked) = settings.mark.read(metadata.mark) else {
        return TC_NEXT;
    };
    write_mark(ctx, settings, marked);
    if metadata.task == 0 || skb::read(ctx, marked.direction).is_err() {
        return TC_NEXT;
    }
    if metadata.task & TELL_SENDER != 0 {
        return tell_sender(ctx, metadata.task, false);
    }
    lower_mss(ctx, metadata.task, marked.owner.allocation(), marked.direction);
    TC_NEXT
}

#[inline(always)]
fn write_mark(ctx: &TcContext, settings: &Settings, marked: Marked) {
    let skb = ctx.skb.skb;
    // SAFETY: `mark` is a field of this program's own context that programs of this type may write.
    unsafe { (*skb).mark = settings.mark.write((*skb).mark, marked) };
}
