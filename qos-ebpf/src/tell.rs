//! What is done to packets for an allocation's MTU, in tc, whose helpers know of checksums that are yet to
//! be made: the segment size of a TCP connection that opens is lowered, and a packet that is too big is
//! turned into the answer to its sender.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::helpers::generated::{
    bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect, bpf_skb_adjust_room,
    bpf_skb_change_head, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use qos_common::abi::{TASK_MTU, directed};
use qos_common::classify::{Direction, Family};
use qos_common::mark::{Marked, Owner};
use qos_common::mss;

use crate::classify::LINK_ROOM;
use crate::limit::add;
use crate::maps;
use crate::packet::Packet;

/// Goes on to the next program, or with the stack: TCX_NEXT and TC_ACT_UNSPEC, linux/bpf.h.
pub(crate) const TC_NEXT: i32 = -1;
/// Drops the packet: TC_ACT_SHOT.
pub(crate) const TC_DROP: i32 = 2;
/// To the way in of the interface rather than out of it: BPF_F_INGRESS, linux/bpf.h.
const WAY_IN: u64 = 1;

// What is quoted of a packet that is above the MTU, and is there for that: of IPv4 what fills an answer of
// 576 bytes (RFC 1812, section 4.3.2.3), of IPv6 one of 1,280 (RFC 4443, section 2.4). In pieces that
// `bpf_csum_diff` takes: 512 bytes at most.
const QUOTE_V4: [u32; 3] = [512, 36, 0];
const QUOTE_V6: [u32; 3] = [512, 512, 208];
const ADDED_V4: u32 = 20 + 8;
const ADDED_V6: u32 = 40 + 8;

/// IPv4 and ICMP header of an answer.
#[repr(C, align(4))]
struct AnswerV4([u8; ADDED_V4 as usize]);

/// IPv6 and ICMPv6 header of an answer, and the pseudo-header's end.
#[repr(C, align(4))]
struct AnswerV6([u8; ADDED_V6 as usize]);

#[repr(C, align(4))]
struct PseudoEnd([u8; 8]);

/// Lowers the segment size that a packet announces to what packets of `mtu` bytes have room for, if it is
/// above that. The packet is the one in this CPU's search.
///
/// A global function: verified on its own, and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn qos_lower_mss(skb: *mut __sk_buff, mtu: u32) -> u32 {
    let Some(search) = maps::search() else { return 0 };
    let packet = &search.packet;
    let transport = packet.transport & 0xff;
    let largest = mss::largest_segment(mtu & TASK_MTU, packet.key.family == Family::V6 as u32);
    let mut header = [0_u8; 2];
    if !load(skb, transport + 12, &mut header) {
        return 0;
    }
    let header_length = u32::from(header[0] >> 4) * 4;
    // Without options it is 20 bytes long, with most of them 60.
    if header_length <= 20 {
        return 0;
    }
    let length = header_length - 20;
    let mut options = [0_u8; mss::LONGEST_OPTIONS];
    // SAFETY: the buffer is at least as long as the helper is told.
    let loaded =
        unsafe { bpf_skb_load_bytes(skb.cast(), transport + 20, options.as_mut_ptr().cast(), length) };
    if loaded != 0 {
        return 0;
    }
    let Some(at) = mss::find(&options, length as usize) else { return 0 };
    let place = transport + 20 + (at as u32 & 0x3f);
    let mut old = [0_u8; 2];
    if !load(skb, place, &mut old) || u16::from_be_bytes(old) <= largest {
        return 0;
    }
    let new = largest.to_be_bytes();
    // A size that stands across two words of the sum counts there with its bytes exchanged.
    let word = |bytes: [u8; 2]| {
        let word = u16::from_ne_bytes(bytes);
        u64::from(if at & 1 == 0 { word } else { word.swap_bytes() })
    };
    // SAFETY: helper calls on this program's own context; the buffer is as long as they are told.
    let done = unsafe {
        bpf_l4_csum_replace(skb.cast(), transport + 16, word(old), word(new), 2) == 0
            && bpf_skb_store_bytes(skb.cast(), place, new.as_ptr().cast(), 2, 0) == 0
    };
    u32::from(done)
}

/// Lowers the segment size as the task of this CPU's packet says, and counts it.
#[inline(always)]
pub(crate) fn lower_mss(ctx: &TcContext, task: u32, slot: u32, direction: Direction) {
    if qos_lower_mss(ctx.skb.skb, task & TASK_MTU) != 0
        && let Some(clocks) = maps::clocks(directed(slot, direction))
    {
        // SAFETY: points to a live element; all access to it is atomic.
        add(unsafe { &raw mut (*clocks).mss_lowered }, 1);
    }
}

/// Tells the sender of this CPU's packet that it is above an MTU, by turning it into the answer. Returns
/// the verdict. `at_egress`: the packet is on its way out, and the answer is to come in there.
#[inline(always)]
pub(crate) fn tell_sender(ctx: &TcContext, task: u32, at_egress: bool) -> i32 {
    if let (Some(settings), Some(search)) = (maps::settings(), maps::search()) {
        let answered = Direction::from_bit(search.packet.key.direction ^ 1);
        // Judged already: it is not the subscriber's or provider's.
        let marked = Marked { direction: answered, owner: Owner::default() };
        // SAFETY: `mark` is a field of this program's own context that it may write.
        unsafe { (*ctx.skb.skb).mark = settings.mark.write((*ctx.skb.skb).mark, marked) };
    }
    qos_tell_sender(ctx.skb.skb, task & TASK_MTU, u32::from(at_egress)) as i32
}

/// As [`tell_sender`]. A global function: verified on its own, and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn qos_tell_sender(skb: *mut __sk_buff, mtu: u32, at_egress: u32) -> u32 {
    let Some(search) = maps::search() else { return TC_DROP as u32 };
    let is_v4 = search.packet.key.family == Family::V4 as u32;
    let network = search.packet.network & 0x3f;
    whole_length_of_segment(skb, &search.packet, network, is_v4);
    let (quote, added) = if is_v4 { (&QUOTE_V4, ADDED_V4) } else { (&QUOTE_V6, ADDED_V6) };
    let quoted = quote[0] + quote[1] + quote[2];
    // SAFETY: a helper call on this program's own context.
    if unsafe { bpf_skb_change_tail(skb.cast(), network + quoted, 0) } != 0 {
        return TC_DROP as u32;
    }
    let Some(sum) = sum_of_quote(skb, network, is_v4) else { return TC_DROP as u32 };
    // SAFETY: the buffer is as long as the helper is told.
    let read =
        unsafe { bpf_skb_load_bytes(skb.cast(), 0, search.link.as_mut_ptr().cast(), LINK_ROOM as u32) };
    if read != 0 || !make_room(skb, network, added) {
        return TC_DROP as u32;
    }
    if network != 0 && !write_link(skb, &mut search.link, network, added + quoted) {
        return TC_DROP as u32;
    }
    let packet = &search.packet;
    // SAFETY: a read of this program's own context.
    let index = unsafe { (*skb).ifindex };
    let written = if is_v4 {
        write_v4(skb, packet, network, mtu, sum, own_v4(index, packet, at_egress))
    } else {
        write_v6(skb, packet, network, mtu, sum, own_v6(index, packet, at_egress))
    };
    if !written {
        return TC_DROP as u32;
    }
    // SAFETY: the helper takes two numbers.
    unsafe { bpf_redirect(index, if at_egress != 0 { WAY_IN } else { 0 }) as u32 }
}

/// The gateway's address towards the sender, or where it has none there, or would not take a packet from
/// itself, the address that the packet was for.
#[inline(always)]
fn own_v4(index: u32, packet: &Packet, at_egress: u32) -> [u8; 4] {
    let own = maps::interface(index).v4;
    if at_egress != 0 || own == [0; 4] {
        ((packet.key.destination.high >> 32) as u32).to_be_bytes()
    } else {
        own
    }
}

#[inline(always)]
fn own_v6(index: u32, packet: &Packet, at_egress: u32) -> [u8; 16] {
    let own = maps::interface(index).v6;
    if at_egress != 0 || own == [0; 16] {
        octets(packet.key.destination.high, packet.key.destination.low)
    } else {
        own
    }
}

#[inline(always)]
fn octets(high: u64, low: u64) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h] = high.to_be_bytes();
    let [i, j, k, l, m, n, o, p] = low.to_be_bytes();
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

/// Makes room for the answer's headers in front of the packet.
#[inline(always)]
fn make_room(skb: *mut __sk_buff, network: u32, added: u32) -> bool {
    // SAFETY: helper calls on this program's own context.
    let result = unsafe {
        if network == 0 {
            // The kernel takes off what it believes to be in front of the IP header, and must know that
            // this begins sooner.
            bpf_skb_adjust_room(skb.cast(), added as i32, BPF_ADJ_ROOM_MAC, 0)
        } else {
            // The other helper knows no PPPoE, and no second tag.
            bpf_skb_change_head(skb.cast(), added, 0)
        }
    };
    result == 0
}

/// Makes the header of a super-packet that of its first segment, which is what is quoted.
#[inline(always)]
fn whole_length_of_segment(skb: *mut __sk_buff, packet: &Packet, network: u32, is_v4: bool) {
    // SAFETY: a read of this program's own context.
    if unsafe { (*skb).gso_segs } <= 1 {
        return;
    }
    let (place, length) = if is_v4 {
        (network + 2, packet.key.length)
    } else {
        (network + 4, packet.key.length.saturating_sub(40))
    };
    let new = length.to_be_bytes();
    let mut old = [0_u8; 2];
    if !load(skb, place, &mut old) {
        return;
    }
    let word = |bytes: [u8; 2]| u64::from(u16::from_ne_bytes(bytes));
    // SAFETY: helper calls on this program's own context; the buffer is as long as they are told. What
    // fails leaves the quote as it was.
    unsafe {
        if is_v4 {
            bpf_l3_csum_replace(skb.cast(), network + 10, word(old), word(new), 2);
        }
        bpf_skb_store_bytes(skb.cast(), place, new.as_ptr().cast(), 2, 0);
    }
}

/// One's complement sum of what is quoted, not folded.
#[inline(always)]
fn sum_of_quote(skb: *mut __sk_buff, network: u32, is_v4: bool) -> Option<u32> {
    let ctx = TcContext::new(skb);
    let quoted = if is_v4 { 548 } else { 1_232 };
    ctx.pull_data(network + quoted).ok()?;
    let start = ctx.data() + network as usize;
    if is_v4 {
        if start + 548 > ctx.data_end() {
            return None;
        }
        add_up(start, &QUOTE_V4)
    } else {
        if start + 1_232 > ctx.data_end() {
            return None;
        }
        add_up(start, &QUOTE_V6)
    }
}

/// Adds up pieces that the caller has shown to be there.
#[inline(always)]
fn add_up(start: usize, pieces: &[u32; 3]) -> Option<u32> {
    let mut sum = 0_i64;
    let mut at = start;
    for &piece in pieces {
        if piece == 0 {
            break;
        }
        // SAFETY: the caller compared the end of the pieces with that of the packet.
        sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, at as *mut u32, piece, sum as u32) };
        if sum < 0 {
            return None;
        }
        at += piece as usize;
    }
    Some(sum as u32)
}

/// Checksum from a sum that is not folded, in the order of the packet.
#[inline(always)]
fn checksum(sum: u32) -> [u8; 2] {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_ne_bytes()
}

/// Adds `length` bytes of this program's own memory, aligned to words, to a sum.
#[inline(always)]
fn plus(sum: u32, bytes: *const u8, length: u32) -> u32 {
    // SAFETY: the callers pass buffers of that length.
    unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, bytes as *mut u32, length, sum) as u32 }
}

/// Writes the link-layer header back, from the packet's receiver to its sender.
#[inline(always)]
fn write_link(skb: *mut __sk_buff, link: &mut [u8; LINK_ROOM], network: u32, ip_length: u32) -> bool {
    for i in 0..6 {
        link.swap(i, i + 6);
    }
    // RFC 2516: the length in front of the PPP protocol counts that too.
    let length = (ip_length as u16 + 2).to_be_bytes();
    if network == 22 && link[12] == 0x88 && link[13] == 0x64 {
        link[18] = length[0];
        link[19] = length[1];
    } else if network == 26 && link[16] == 0x88 && link[17] == 0x64 {
        link[22] = length[0];
        link[23] = length[1];
    } else if network == 30 && link[20] == 0x88 && link[21] == 0x64 {
        link[26] = length[0];
        link[27] = length[1];
    }
    // In pieces of known lengths: the verifier of 6.1 can't see that a length is not zero.
    let mut written = store_link(skb, link, 0, 14);
    for i in 0..4 {
        let at = 14 + 4 * i;
        if network > at {
            written &= store_link(skb, link, at, 4);
        }
    }
    written
}

/// Writes a piece of the link-layer header, which has it.
#[inline(always)]
fn store_link(skb: *mut __sk_buff, link: &[u8; LINK_ROOM], at: u32, length: u32) -> bool {
    // SAFETY: the callers' pieces end within the buffer.
    unsafe { bpf_skb_store_bytes(skb.cast(), at, link.as_ptr().add(at as usize).cast(), length, 0) == 0 }
}

/// IPv4 header and ICMP "fragmentation needed" (RFC 1191, section 4).
#[inline(always)]
fn write_v4(skb: *mut __sk_buff, packet: &Packet, network: u32, mtu: u32, sum: u32, own: [u8; 4]) -> bool {
    let mut answer = AnswerV4([0; ADDED_V4 as usize]);
    let bytes = &mut answer.0;
    bytes[0] = 0x45;
    // Internetwork control, as the kernel's own.
    bytes[1] = 0xc0;
    bytes[2..4].copy_from_slice(&576_u16.to_be_bytes());
    bytes[6] = 0x40;
    bytes[8] = 64;
    bytes[9] = 1;
    bytes[12..16].copy_from_slice(&own);
    bytes[16..20].copy_from_slice(&((packet.key.source.high >> 32) as u32).to_be_bytes());
    bytes[20] = 3;
    bytes[21] = 4;
    bytes[26..28].copy_from_slice(&(mtu as u16).to_be_bytes());
    let header = checksum(plus(0, bytes.as_ptr(), 20));
    bytes[10..12].copy_from_slice(&header);
    // SAFETY: behind the first 20 of 28 bytes.
    let message = checksum(plus(sum, unsafe { bytes.as_ptr().add(20) }, 8));
    bytes[22..24].copy_from_slice(&message);
    // SAFETY: the buffer is as long as the helper is told.
    unsafe { bpf_skb_store_bytes(skb.cast(), network, bytes.as_ptr().cast(), ADDED_V4, 0) == 0 }
}

/// IPv6 header and ICMPv6 "packet too big" (RFC 4443, section 3.2).
#[inline(always)]
fn write_v6(skb: *mut __sk_buff, packet: &Packet, network: u32, mtu: u32, sum: u32, own: [u8; 16]) -> bool {
    let mut answer = AnswerV6([0; ADDED_V6 as usize]);
    let bytes = &mut answer.0;
    bytes[0] = 0x60;
    bytes[4..6].copy_from_slice(&1_240_u16.to_be_bytes());
    bytes[6] = 58;
    bytes[7] = 64;
    bytes[8..24].copy_from_slice(&own);
    bytes[24..40].copy_from_slice(&octets(packet.key.source.high, packet.key.source.low));
    bytes[40] = 2;
    bytes[44..48].copy_from_slice(&mtu.to_be_bytes());
    let mut end = PseudoEnd([0; 8]);
    end.0[2..4].copy_from_slice(&1_240_u16.to_be_bytes());
    end.0[7] = 58;
    // SAFETY: the addresses and the message, behind the first 8 of 48 bytes.
    let sum = plus(sum, unsafe { bytes.as_ptr().add(8) }, 40);
    let message = checksum(plus(sum, end.0.as_ptr(), 8));
    bytes[42..44].copy_from_slice(&message);
    // SAFETY: the buffer is as long as the helper is told.
    unsafe { bpf_skb_store_bytes(skb.cast(), network, bytes.as_ptr().cast(), ADDED_V6, 0) == 0 }
}

#[inline(always)]
fn load(skb: *mut __sk_buff, offset: u32, bytes: &mut [u8; 2]) -> bool {
    // SAFETY: the buffer is as long as the helper is told.
    unsafe { bpf_skb_load_bytes(skb.cast(), offset, bytes.as_mut_ptr().cast(), 2) == 0 }
}
