//! The parser: from the bytes of a frame to what the classifier sees.
//!
//! Reads Ethernet, up to two VLAN tags, PPPoE sessions, IPv4 with options, IPv6 with extension
//! headers, and the ports of the protocols that have them. Headers are read by value, each after a
//! bounds check of its own. Nothing is written here.

use network_types::eth::EthHdr;
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};
use network_types::vlan::VlanHdr;
use qos_common::abi::{FragmentKey, Outcome};
use qos_common::classify::{Address, Family, Key, NO_PORTS, NO_TRANSPORT, has_ports};

/// Tags that the parser follows: an outer and an inner one.
const MAX_TAGS: usize = 2;
/// IPv6 extension headers that the parser follows.
const MAX_EXTENSIONS: usize = 6;

// EtherTypes in host order (IANA, IEEE 802 numbers).
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const QINQ: u16 = 0x88a8;
const QINQ_OLD: u16 = 0x9100;
const PPPOE_SESSION: u16 = 0x8864;

// IPv6 next-header values (IANA, protocol numbers).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;
const HIP: u8 = 139;
const SHIM6: u8 = 140;

/// Bytes of a packet, from the first to one past the last.
#[derive(Clone, Copy)]
pub(crate) struct Bytes {
    start: usize,
    end: usize,
}

impl Bytes {
    #[inline(always)]
    pub(crate) const fn new(start: usize, end: usize) -> Self {
        Self { start, end }
    }

    /// Number of bytes.
    #[inline(always)]
    pub(crate) const fn length(self) -> usize {
        self.end.wrapping_sub(self.start)
    }

    /// Reads a `T` at `offset`, if all of it is there. `T` is a header: integers and byte arrays.
    #[inline(always)]
    pub(crate) fn read<T: Copy>(self, offset: usize) -> Option<T> {
        // SAFETY: `locate` checked that the whole of T is within the packet, and any bytes are a T.
        self.locate::<T>(offset).map(|pointer| unsafe { pointer.read_unaligned() })
    }

    /// Pointer to a `T` at `offset`, if all of it is there. It may be unaligned.
    #[inline(always)]
    pub(crate) fn locate<T>(self, offset: usize) -> Option<*mut T> {
        let at = self.start + offset;
        // The verifier follows a comparison of pointers, not one of lengths.
        if at + size_of::<T>() > self.end { None } else { Some(at as *mut T) }
    }
}

/// What a packet is part of.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece {
    /// A whole packet.
    Whole,
    /// The first fragment of one.
    First,
    /// A later fragment.
    Later,
}

/// A packet that was read, filled in place.
#[repr(C)]
pub(crate) struct Packet {
    /// What the classifier sees.
    pub(crate) key: Key,
    /// Offset of the IP header.
    pub(crate) network: u32,
    /// Offset of what is behind the IP header and its extensions; zero where it was not found.
    pub(crate) transport: u32,
    /// IP length in bytes.
    pub(crate) ip_length: u32,
    /// Whole, or which fragment: a [`Piece`].
    pub(crate) piece: u32,
    /// Identification that all fragments of the packet share.
    pub(crate) id: u32,
    /// Not zero: a router may fragment it (RFC 791, "don't fragment" is not set).
    pub(crate) fragmentable: u32,
}

impl Packet {
    /// Begins anew, for a packet of `direction` that is yet to be read.
    #[inline(always)]
    pub(crate) fn begin(&mut self, direction: u32) {
        self.key.direction = direction;
        self.key.unknown = 0;
        self.key.source_port = 0;
        self.key.destination_port = 0;
        self.ip_length = 0;
        self.transport = 0;
        self.piece = Piece::Whole as u32;
        self.fragmentable = 0;
    }

    /// Key of the fragment table.
    #[inline(always)]
    pub(crate) fn fragment_key(&self) -> FragmentKey {
        FragmentKey {
            source: self.key.source,
            destination: self.key.destination,
            id: self.id,
            kind: u32::from(self.key.protocol) | self.key.family << 8 | self.key.direction << 16,
        }
    }
}

/// Why a packet could not be read, as the [`Outcome`] that is counted.
pub(crate) type Unparsed = Outcome;

/// Reads a frame into `packet`. `layer3`: it begins with its IP header. `frame_length` is that of
/// the whole frame, of which `bytes` may hold only the beginning.
#[inline(always)]
pub(crate) fn parse(
    bytes: Bytes,
    layer3: bool,
    frame_length: u32,
    packet: &mut Packet,
) -> Result<(), Unparsed> {
    let (ether_type, network) = if layer3 {
        let version = bytes.read::<[u8; 2]>(0).ok_or(Outcome::Truncated)?[0] >> 4;
        (if version == 6 { IPV6 } else { IPV4 }, 0)
    } else {
        link_layer(bytes)?
    };
    match ether_type {
        IPV4 => ipv4(bytes, network, frame_length, packet),
        IPV6 => ipv6(bytes, network, frame_length, packet),
        _ => Err(Outcome::NotIp),
    }
}

/// EtherType of the payload behind Ethernet, tags and PPPoE, and its offset.
#[inline(always)]
fn link_layer(bytes: Bytes) -> Result<(u16, usize), Unparsed> {
    let ethernet = bytes.read::<EthHdr>(0).ok_or(Outcome::Truncated)?;
    let mut ether_type = u16::from_be(ethernet.ether_type);
    let mut offset = EthHdr::LEN;
    for _ in 0..MAX_TAGS {
        if !is_tag(ether_type) {
            break;
        }
        let tag = bytes.read::<VlanHdr>(offset).ok_or(Outcome::Truncated)?;
        ether_type = u16::from_be(tag.ether_type);
        offset += VlanHdr::LEN;
    }
    if is_tag(ether_type) {
        return Err(Outcome::TooManyTags);
    }
    if ether_type != PPPOE_SESSION {
        return Ok((ether_type, offset));
    }
    // RFC 2516, section 4: version and type 1, code 0 for session data, then the PPP protocol.
    let header = bytes.read::<[u8; 8]>(offset).ok_or(Outcome::Truncated)?;
    if header[0] != 0x11 || header[1] != 0 {
        return Err(Outcome::NotIp);
    }
    match u16::from_be_bytes([header[6], header[7]]) {
        0x0021 => Ok((IPV4, offset + 8)),
        0x0057 => Ok((IPV6, offset + 8)),
        _ => Err(Outcome::NotIp),
    }
}

#[inline(always)]
fn is_tag(ether_type: u16) -> bool {
    matches!(ether_type, VLAN | QINQ | QINQ_OLD)
}

#[inline(always)]
fn ipv4(bytes: Bytes, network: usize, frame_length: u32, packet: &mut Packet) -> Result<(), Unparsed> {
    let header = bytes.read::<Ipv4Hdr>(network).ok_or(Outcome::Truncated)?;
    let header_length = usize::from(header.vihl & 0xf) * 4;
    let ip_length = length_or_rest(u32::from(u16::from_be_bytes(header.tot_len)), network, frame_length);
    if header.vihl >> 4 != 4 || header_length < Ipv4Hdr::LEN || ip_length < header_length as u32 {
        return Err(Outcome::Malformed);
    }
    packet.key.source = Address::v4(header.src_addr);
    packet.key.destination = Address::v4(header.dst_addr);
    packet.key.family = Family::V4 as u32;
    packet.key.protocol = header.proto;
    packet.key.dscp = header.tos >> 2;
    packet.network = network as u32;
    set_length(packet, ip_length);
    let fragment = u16::from_be_bytes(header.frags);
    packet.id = u32::from(u16::from_be_bytes(header.id));
    packet.fragmentable = u32::from(fragment & 0x4000 == 0);
    if fragment & 0x1fff != 0 {
        packet.piece = Piece::Later as u32;
    } else if fragment & 0x2000 != 0 {
        packet.piece = Piece::First as u32;
    }
    transport(bytes, network + header_length, packet)
}

#[inline(always)]
fn ipv6(bytes: Bytes, network: usize, frame_length: u32, packet: &mut Packet) -> Result<(), Unparsed> {
    let header = bytes.read::<Ipv6Hdr>(network).ok_or(Outcome::Truncated)?;
    if header.vcf[0] >> 4 != 6 {
        return Err(Outcome::Malformed);
    }
    let payload = u32::from(u16::from_be_bytes(header.payload_len));
    // Zero: a jumbogram (RFC 2675) or a super-packet above 64 KiB.
    let announced = if payload == 0 { 0 } else { payload + Ipv6Hdr::LEN as u32 };
    packet.key.source = Address::v6(header.src_addr);
    packet.key.destination = Address::v6(header.dst_addr);
    packet.key.family = Family::V6 as u32;
    packet.key.dscp = (header.vcf[0] << 2 | header.vcf[1] >> 6) & 0x3f;
    packet.network = network as u32;
    set_length(packet, length_or_rest(announced, network, frame_length));
    let mut protocol = header.next_hdr;
    let mut offset = network + Ipv6Hdr::LEN;
    for _ in 0..MAX_EXTENSIONS {
        if !is_extension(protocol) {
            break;
        }
        let start = bytes.read::<[u8; 8]>(offset).ok_or(Outcome::Truncated)?;
        let kind = protocol;
        protocol = start[0];
        offset += match kind {
            FRAGMENT => 8,
            // RFC 4302, section 2.2: in 4-byte units, minus 2.
            AUTHENTICATION => (usize::from(start[1]) + 2) * 4,
            // RFC 8200, section 4: in 8-byte units, not counting the first.
            _ => (usize::from(start[1]) + 1) * 8,
        };
        if kind == FRAGMENT {
            let fragment = u16::from_be_bytes([start[2], start[3]]);
            packet.id = u32::from_be_bytes([start[4], start[5], start[6], start[7]]);
            if fragment & 0xfff8 != 0 {
                packet.piece = Piece::Later as u32;
                break;
            }
            if fragment & 1 != 0 {
                packet.piece = Piece::First as u32;
            }
        }
    }
    packet.key.protocol = protocol;
    if is_extension(protocol) {
        // A longer chain than is followed, or a later fragment that continues one.
        packet.key.unknown = NO_TRANSPORT;
        return Ok(());
    }
    transport(bytes, offset, packet)
}

#[inline(always)]
fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS | MOBILITY | HIP | SHIM6
    )
}

/// Fills in the ports, or that they are not known.
#[inline(always)]
fn transport(bytes: Bytes, offset: usize, packet: &mut Packet) -> Result<(), Unparsed> {
    packet.transport = offset as u32;
    if !has_ports(packet.key.protocol) {
        return Ok(());
    }
    if packet.piece == Piece::Later as u32 {
        packet.key.unknown = NO_PORTS;
        return Ok(());
    }
    let ports = bytes.read::<[u8; 4]>(offset).ok_or(Outcome::Truncated)?;
    packet.key.source_port = u16::from_be_bytes([ports[0], ports[1]]);
    packet.key.destination_port = u16::from_be_bytes([ports[2], ports[3]]);
    Ok(())
}

/// The announced length, or where it is zero that of the rest of the frame.
#[inline(always)]
fn length_or_rest(announced: u32, network: usize, frame_length: u32) -> u32 {
    if announced == 0 { frame_length.saturating_sub(network as u32) } else { announced }
}

#[inline(always)]
fn set_length(packet: &mut Packet, ip_length: u32) {
    packet.ip_length = ip_length;
    packet.key.length = if ip_length > 0xffff { u16::MAX } else { ip_length as u16 };
}
