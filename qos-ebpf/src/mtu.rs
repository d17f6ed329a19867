//! The largest packet of an allocation: what is above it, and what a connection is told when it opens.
//! [`crate::tell`] does what is decided here.

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::programs::{TcContext, XdpContext};
use qos_common::abi::{
    ANSWER_BURST_NS, ANSWER_INTERVAL_NS, Allocation, LOWER_MSS, SMALLEST_IPV6_MTU, TELL_SENDER, directed,
};
use qos_common::classify::{Address, Direction, Family};

use crate::classify::{Search, now_ns, opposite_mtu};
use crate::limit::add;
use crate::maps;
use crate::packet::{Bytes, Packet, Piece};

/// The flag that opens a connection (RFC 9293, section 3.1).
const SYN: u8 = 2;

// Protocol numbers (IANA).
const ICMP: u8 = 1;
const TCP: u8 = 6;
const ICMPV6: u8 = 58;

/// Looks at this CPU's packet, which was classified: whether it is above its allocation's MTU and may not
/// be fragmented (not zero), and sets its task.
///
/// Global functions: the verifier follows their ways once, on their own.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn qos_mtu_frame(frame: *mut xdp_md) -> u32 {
    let ctx = XdpContext::new(frame);
    decide(Bytes::new(ctx.data(), ctx.data_end()))
}

/// As [`qos_mtu_frame`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn qos_mtu_skb(skb: *mut __sk_buff) -> u32 {
    let ctx = TcContext::new(skb);
    decide(Bytes::new(ctx.data(), ctx.data_end()))
}

#[inline(always)]
fn decide(bytes: Bytes) -> u32 {
    let Some(search) = maps::search() else { return 0 };
    let direction = Direction::from_bit(search.packet.key.direction);
    let record = directed(search.slot, direction);
    let own = match maps::allocation(record) {
        Some(allocation) if search.slot != 0 => mtu_of(allocation, search.packet.key.family),
        _ => 0,
    };
    if own != 0 && u32::from(search.packet.key.length) > own {
        return u32::from(refuse(search, record, own, bytes));
    }
    if search.packet.key.protocol == TCP && byte_behind_ip(&search.packet, bytes, 13) & SYN != 0 {
        watch_opening(own);
    }
    0
}

/// The byte at `offset`, up to 13, of what is behind the IP header; zero where it can't be seen.
#[inline(always)]
fn byte_behind_ip(packet: &Packet, bytes: Bytes, offset: usize) -> u8 {
    if packet.transport == 0 {
        return 0;
    }
    // The mask tells the verifier where it can be.
    let start = packet.transport as usize & 0xff;
    match bytes.read::<[u8; 2]>(start + (offset & !1)) {
        Some(pair) => pair[offset & 1],
        None => 0,
    }
}

/// Whether a packet would be refused. Nothing is counted or set.
#[inline(always)]
pub(crate) fn would_refuse(packet: &Packet, allocation: &Allocation) -> bool {
    let mtu = mtu_of(allocation, packet.key.family);
    mtu != 0 && u32::from(packet.key.length) > mtu && packet.fragmentable == 0
}

/// An allocation's MTU as a family has it; zero: any.
#[inline(always)]
pub(crate) fn mtu_of(allocation: &Allocation, family: u32) -> u32 {
    let mtu = u32::from(allocation.mtu);
    if mtu != 0 && mtu < SMALLEST_IPV6_MTU && family == Family::V6 as u32 { SMALLEST_IPV6_MTU } else { mtu }
}

/// Counts a packet above the MTU, and tells whether it is refused.
#[inline(always)]
fn refuse(search: &mut Search, record: u32, mtu: u32, bytes: Bytes) -> bool {
    let Some(clocks) = maps::clocks(record) else { return false };
    // SAFETY: points to a live element; all access to it is atomic.
    let (due, dropped, answered, passed) = unsafe {
        (
            &raw mut (*clocks).answers_due,
            &raw mut (*clocks).too_big_dropped,
            &raw mut (*clocks).too_big_answered,
            &raw mut (*clocks).too_big_passed,
        )
    };
    if search.packet.fragmentable != 0 {
        add(passed, 1);
        return false;
    }
    add(dropped, 1);
    if may_tell(&search.packet, bytes) && is_due(due) {
        add(answered, 1);
        search.task = TELL_SENDER | mtu;
    }
    true
}

/// Whether the next answer may be given; one that two CPUs give too much at once does no harm.
#[inline(always)]
fn is_due(clock: *mut u64) -> bool {
    let now = now_ns();
    // SAFETY: as in `refuse`.
    let due = unsafe { clock.read_volatile() };
    let due = if due > now { due } else { now };
    if due - now > ANSWER_BURST_NS {
        return false;
    }
    // SAFETY: as in `refuse`.
    unsafe { clock.write_volatile(due + ANSWER_INTERVAL_NS) };
    true
}

/// Whether the sender may be told of an error at all (RFC 1122, section 3.2.2; RFC 4443, section 2.4): not
/// of a later fragment, nor of another error, nor who is nobody.
#[inline(always)]
fn may_tell(packet: &Packet, bytes: Bytes) -> bool {
    let key = &packet.key;
    if packet.piece == Piece::Later as u32 || is_nobody(&key.source, key.family) {
        return false;
    }
    match key.protocol {
        // Echo request and reply.
        ICMP => matches!(byte_behind_ip(packet, bytes, 0), 0 | 8),
        // Informational messages.
        ICMPV6 => byte_behind_ip(packet, bytes, 0) >= 128,
        _ => true,
    }
}

/// Unspecified, multicast, or broadcast.
#[inline(always)]
fn is_nobody(address: &Address, family: u32) -> bool {
    let first = (address.high >> 56) as u8;
    if family == Family::V4 as u32 {
        first == 0 || first >= 224
    } else {
        address.high == 0 && address.low == 0 || first == 0xff
    }
}

/// Sets the task of a packet that opens a TCP connection whose traffic has an MTU, either way.
#[inline(always)]
fn watch_opening(own: u32) {
    let opposite = opposite_mtu();
    let mtu = if own == 0 || opposite != 0 && opposite < own { opposite } else { own };
    if mtu != 0
        && let Some(search) = maps::search()
    {
        search.task = LOWER_MSS | mtu;
    }
}
