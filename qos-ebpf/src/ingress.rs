//! The way in: XDP parses, classifies, polices and leaves the answer in front of the packet; tc
//! ingress moves it into the mark, where it survives routing. Where there is no XDP, tc ingress does
//! all of it.

use aya_ebpf::helpers::generated::bpf_xdp_adjust_meta;
use aya_ebpf::programs::{TcContext, XdpContext};
use qos_common::abi::{METADATA_MAGIC, Metadata, Outcome, Settings, directed};
use qos_common::classify::Direction;
use qos_common::length::{LinkLayer, charged};
use qos_common::mark::Marked;

use crate::classify::{Search, classify};
use crate::limit::judge;
use crate::maps;
use crate::packet::{Bytes, parse};
use crate::skb;

/// Classifies and polices a frame that came in.
#[inline(always)]
pub(crate) fn xdp<const DIRECTION: u32>(ctx: &XdpContext) -> Outcome {
    let (Some(settings), Some(search)) = (maps::settings(), maps::search()) else {
        return Outcome::MissingEntry;
    };
    // Without room for it, the packet loses its mark, and egress classifies it again.
    let carries = reserve_metadata(ctx);
    let bytes = Bytes::new(ctx.data(), ctx.data_end());
    let direction = Direction::from_bit(DIRECTION);
    search.begin(DIRECTION);
    search.carries = u32::from(carries);
    let outcome = match parse(bytes, false, bytes.length() as u32, &mut search.packet) {
        Ok(()) => police(search, direction),
        Err(reason) => reason,
    };
    let slot = if search.limits_only == 0 { search.slot } else { 0 };
    if search.carries != 0 {
        write_metadata(ctx, settings, answer(outcome, direction, slot));
    }
    outcome
}

/// Classifies and polices a packet that came in where XDP does not, and marks it.
#[inline(always)]
pub(crate) fn tc<const DIRECTION: u32>(ctx: &TcContext) -> Outcome {
    let Some(settings) = maps::settings() else {
        return Outcome::MissingEntry;
    };
    let direction = Direction::from_bit(DIRECTION);
    let (outcome, slot) = skb::police(ctx, direction, false);
    write_mark(ctx, settings, answer(outcome, direction, slot));
    outcome
}

/// What the mark is to say. Observing, a packet that would be dropped goes on, and is nothing that
/// would be marked.
#[inline(always)]
fn answer(outcome: Outcome, direction: Direction, slot: u32) -> Marked {
    let over = matches!(outcome, Outcome::OverMaximum | Outcome::OverAggregate);
    Marked { direction, slot: if over { 0 } else { slot } }
}

/// Classifies and charges the packet that was read.
#[inline(always)]
fn police(search: &mut Search, direction: Direction) -> Outcome {
    classify::<true>(search);
    if search.slot == 0 {
        return Outcome::Unclassified;
    }
    let Some(allocation) = maps::allocation(directed(search.slot, direction)) else {
        return Outcome::MissingEntry;
    };
    let layer = LinkLayer::from_raw(allocation.link_layer);
    let bytes = charged(search.packet.ip_length, allocation.overhead, layer);
    judge::<true>(allocation, search.slot, direction, search.now_ns, bytes).outcome()
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
fn write_metadata(ctx: &XdpContext, settings: &Settings, marked: Marked) {
    let meta = ctx.metadata();
    if meta + size_of::<Metadata>() > ctx.data() {
        return;
    }
    // SAFETY: the comparison showed the verifier that the whole of it lies in front of the packet.
    unsafe {
        (meta as *mut Metadata)
            .write_unaligned(Metadata { magic: METADATA_MAGIC, mark: settings.mark.write(0, marked) });
    }
}

/// Moves the answer of XDP into the mark.
#[inline(always)]
pub(crate) fn take_over(ctx: &TcContext) {
    let Some(settings) = maps::settings() else {
        return;
    };
    let skb = ctx.skb.skb;
    // SAFETY: reads of this program's own context.
    let (meta, data) = unsafe { ((*skb).data_meta as usize, (*skb).data as usize) };
    if meta + size_of::<Metadata>() > data {
        return;
    }
    // SAFETY: the comparison showed the verifier that the whole of it lies in front of the packet.
    let metadata = unsafe { (meta as *const Metadata).read_unaligned() };
    if metadata.magic != METADATA_MAGIC {
        return;
    }
    if let Some(marked) = settings.mark.read(metadata.mark) {
        write_mark(ctx, settings, marked);
    }
}

#[inline(always)]
fn write_mark(ctx: &TcContext, settings: &Settings, marked: Marked) {
    let skb = ctx.skb.skb;
    // SAFETY: `mark` is a field of this program's own context that programs of this type may write.
    unsafe { (*skb).mark = settings.mark.write((*skb).mark, marked) };
}
