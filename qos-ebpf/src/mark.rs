//! Re-marking: the DSCP of a packet on its way out.

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};
use qos_common::checksum::{replace_word, with_dscp};
use qos_common::classify::Family;

use crate::packet::{Bytes, Packet};

/// Writes the code point, leaving ECN alone. Returns whether the packet was changed.
#[inline(always)]
pub(crate) fn write_dscp(bytes: Bytes, packet: &Packet, dscp: u8) -> bool {
    if packet.key.dscp == dscp {
        return false;
    }
    // Two tags and PPPoE end at 30; the mask tells the verifier so.
    let network = packet.network as usize & 0x3f;
    if packet.key.family == Family::V4 as u32 {
        ipv4(bytes, network, dscp)
    } else {
        ipv6(bytes, network, dscp)
    }
}

#[inline(always)]
fn ipv4(bytes: Bytes, network: usize, dscp: u8) -> bool {
    let Some(header) = bytes.locate::<Ipv4Hdr>(network) else {
        return false;
    };
    // SAFETY: `locate` checked that the whole header is in the packet; it is made of bytes only.
    let header = unsafe { &mut *header };
    let old = u16::from_be_bytes([header.vihl, header.tos]);
    header.tos = with_dscp(header.tos, dscp);
    let new = u16::from_be_bytes([header.vihl, header.tos]);
    header.check = replace_word(u16::from_be_bytes(header.check), old, new).to_be_bytes();
    true
}

/// The traffic class stands across the first two bytes: four bits of each.
#[inline(always)]
fn ipv6(bytes: Bytes, network: usize, dscp: u8) -> bool {
    let Some(header) = bytes.locate::<Ipv6Hdr>(network) else {
        return false;
    };
    // SAFETY: as for IPv4.
    let header = unsafe { &mut *header };
    let class = with_dscp(header.vcf[0] << 4 | header.vcf[1] >> 4, dscp);
    header.vcf[0] = header.vcf[0] & 0xf0 | class >> 4;
    header.vcf[1] = header.vcf[1] & 0x0f | class << 4;
    true
}
