//! The way out: the class that the packet queues in, and its code point. A packet that no hook of
//! ours has seen, made on the box or come in elsewhere, is classified and policed here. One whose
//! mark was lost is classified again, and not charged again.

use aya_ebpf::programs::TcContext;
use qos_common::abi::{Allocation, IN_USE, JUDGED, LineKey, MARK_DSCP, Outcome, Settings, directed};
use qos_common::classify::{Direction, Family, Key};
use qos_common::mark::Owner;

use crate::classify::Search;
use crate::limit::count_marked;
use crate::maps;
use crate::mark::write_dscp;
use crate::packet::{Bytes, Packet};
use crate::skb::{charge_of, police, read};

/// Gives a packet its class and code point. The outcome says whether it may leave.
#[inline(always)]
pub(crate) fn run<const DIRECTION: u32>(ctx: &TcContext) -> Outcome {
    let Some(settings) = maps::settings() else {
        return Outcome::MissingEntry;
    };
    let direction = Direction::from_bit(DIRECTION);
    // SAFETY: reads of this program's own context.
    let (mark, came_in) = unsafe { ((*ctx.skb.skb).mark, (*ctx.skb.skb).ingress_ifindex) };
    let marked = settings.mark.read(mark);
    let here = marked.filter(|marked| marked.direction == direction);
    let (outcome, owner) = match here {
        Some(marked) => (Outcome::Admitted, marked.owner),
        None => {
            // A mark of the other direction is not lost: from a subscriber to another. What was made on
            // the box came in by no interface.
            let lost = marked.is_none() && came_in != 0 && maps::interface(came_in).flags & JUDGED != 0;
            let (outcome, slot) = police(ctx, settings, direction, lost);
            maps::count(outcome);
            (outcome, Owner::of_allocation(slot))
        }
    };
    if matches!(outcome, Outcome::OverMaximum | Outcome::OverAggregate | Outcome::TooBig) {
        return outcome;
    }
    let slot = owner.allocation();
    let allocation = match slot {
        0 => None,
        slot => maps::allocation(directed(slot, direction)).filter(|found| found.flags & IN_USE != 0),
    };
    send(ctx, settings, allocation, owner, direction, here.is_none());
    if slot != 0 && allocation.is_none() {
        maps::count(Outcome::StaleMark);
    }
    outcome
}

/// Sets class and code point; observing, only counts what would be marked. `allocation`: the owner's.
/// `was_read`: what could be read of the headers is in this CPU's search.
#[inline(always)]
fn send(
    ctx: &TcContext,
    settings: &Settings,
    allocation: Option<&'static Allocation>,
    owner: Owner,
    direction: Direction,
    was_read: bool,
) {
    let observes = settings.observe != 0;
    let remark = allocation.filter(|allocation| allocation.flags & MARK_DSCP != 0);
    let mut class = match allocation {
        Some(allocation) => allocation.class,
        None => maps::rest_class(owner.line(), direction),
    };
    let lines = !observes && settings.line_lengths_v4_used | settings.line_lengths_v6_used != 0;
    if remark.is_some() || class == 0 && lines {
        if !was_read {
            // As far as it can be: addresses come first.
            let _ = read(ctx, direction);
        }
        // A packet that ends before its ports still has a line.
        if let Some(Search { packet, .. }) = maps::search().filter(|search| search.packet.ip_length != 0) {
            if class == 0 && lines {
                class = maps::rest_class(line_of(settings, &packet.key, direction), direction);
            }
            if let Some(allocation) = remark {
                remark_packet(ctx, packet, allocation, owner.allocation(), direction, observes);
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
    match maps::rest_class(line_of(settings, key, direction), direction) {
        0 => settings.default_class[direction as usize],
        class => class,
    }
}

/// Slot of the line that the packet's subscriber is on; zero where none is known.
#[inline(never)]
pub(crate) fn line_of(settings: &Settings, key: &Key, direction: Direction) -> u32 {
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
            return line.slot;
        }
    }
    0
}
