//! Sampled debugging: one line for a packet, from programs of their own which take the place of the
//! plain ones while somebody listens. The plain ones have none of it.

use aya_ebpf::EbpfContext;
use aya_log_ebpf::info;
use core::net::Ipv4Addr;
use qos_common::abi::{Outcome, directed};
use qos_common::classify::{Address, Direction, Family};

use crate::classify::now_ns;
use crate::maps;

/// Time that one line of one CPU takes up, in ns: up to 200 packets a second are all told, and a flood
/// is sampled.
const INTERVAL_NS: u64 = 5_000_000;
/// Time that lines may be ahead of that, in ns: 100 packets at once are all told.
const BURST_NS: u64 = 100 * INTERVAL_NS;

/// Tells of the packet that was just classified on this CPU.
#[inline(always)]
pub(crate) fn packet<C: EbpfContext>(ctx: &C, outcome: Outcome) {
    let (Some(clock), Some(search)) = (maps::trace_clock(), maps::search()) else {
        return;
    };
    let now = now_ns();
    let due = if *clock > now { *clock } else { now };
    if due - now > BURST_NS {
        return;
    }
    *clock = due + INTERVAL_NS;
    let key = &search.packet.key;
    let (outcome, direction, protocol) = (outcome as u32, key.direction, key.protocol);
    let allocation = match maps::allocation(directed(search.slot, Direction::from_bit(direction))) {
        Some(allocation) => allocation.id,
        None => 0,
    };
    if key.family == Family::V4 as u32 {
        info!(
            ctx,
            "outcome={} direction={} protocol={} from {:i}:{} to {:i}:{} length {} allocation={}",
            outcome,
            direction,
            protocol,
            Ipv4Addr::from_bits((key.source.high >> 32) as u32),
            key.source_port,
            Ipv4Addr::from_bits((key.destination.high >> 32) as u32),
            key.destination_port,
            key.length,
            allocation
        );
    } else {
        info!(
            ctx,
            "outcome={} direction={} protocol={} from [{:i}]:{} to [{:i}]:{} length {} allocation={}",
            outcome,
            direction,
            protocol,
            octets(&key.source),
            key.source_port,
            octets(&key.destination),
            key.destination_port,
            key.length,
            allocation
        );
    }
}

#[inline(always)]
fn octets(address: &Address) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h] = address.high.to_be_bytes();
    let [i, j, k, l, m, n, o, p] = address.low.to_be_bytes();
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}
