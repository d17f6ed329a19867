//! Sampled debugging: one line for a packet, from programs of their own which take the place of the
//! plain ones while somebody listens. The plain ones have none of it.

use aya_ebpf::EbpfContext;
use aya_log_ebpf::info;
use core::net::Ipv4Addr;
use qos_common::abi::Outcome;
use qos_common::classify::Family;

use crate::classify::now_ns;
use crate::maps;

/// Shortest time between two lines of one CPU, in ns: up to 200 packets a second are all told, and a
/// flood is sampled.
const INTERVAL_NS: u64 = 5_000_000;

/// Tells of the packet that was just classified on this CPU.
#[inline(always)]
pub(crate) fn packet<C: EbpfContext>(ctx: &C, outcome: Outcome) {
    let (Some(last), Some(search)) = (maps::last_trace(), maps::search()) else {
        return;
    };
    let now = now_ns();
    if now.wrapping_sub(*last) < INTERVAL_NS {
        return;
    }
    *last = now;
    let key = &search.packet.key;
    let (outcome, direction, protocol) = (outcome as u32, key.direction, key.protocol);
    if key.family == Family::V4 as u32 {
        let source = Ipv4Addr::from_bits((key.source.high >> 32) as u32);
        let destination = Ipv4Addr::from_bits((key.destination.high >> 32) as u32);
        info!(
            ctx,
            "outcome={} direction={} protocol={} {:i}:{} {:i}:{} length={} slot={}",
            outcome,
            direction,
            protocol,
            source,
            key.source_port,
            destination,
            key.destination_port,
            key.length,
            search.slot
        );
    } else {
        info!(
            ctx,
            "outcome={} direction={} protocol={} {:x}{:x}:{} {:x}{:x}:{} length={} slot={}",
            outcome,
            direction,
            protocol,
            key.source.high,
            key.source.low,
            key.source_port,
            key.destination.high,
            key.destination.low,
            key.destination_port,
            key.length,
            search.slot
        );
    }
}
