//! Packets to explain: built from a 5-tuple, or read from hexadecimal digits or a capture.

use std::io::{self, Read};
use std::path::Path;

use etherparse::{
    EtherType, Ethernet2Header, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, TcpHeader, UdpHeader,
};
use pcap_file::pcap::PcapReader;
use pcap_file::pcapng::{Block, PcapNgReader};
use pcap_file::{DataLink, PcapError};

use super::args::Endpoint;
use crate::hex::{self, HexError};

const TCP: u8 = 6;
const UDP: u8 = 17;
const DCCP: u8 = 33;
const SCTP: u8 = 132;
const UDP_LITE: u8 = 136;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;

/// A packet and where it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) bytes: Vec<u8>,
    /// At its IP header; else at its Ethernet header.
    pub(super) layer3: bool,
}

/// Why there is no packet.
#[derive(Debug, thiserror::Error)]
pub(super) enum PacketError {
    #[error("source {source_endpoint} and destination {destination} are of different families")]
    Families { source_endpoint: Endpoint, destination: Endpoint },
    #[error("protocol {0} has no ports; leave them away")]
    NoPorts(u8),
    #[error("protocol {0} has ports; write the source and the destination as ADDRESS:PORT")]
    PortsMissing(u8),
    #[error("length {length}: the headers alone take {shortest} bytes, and an IP packet at most {longest}")]
    Length { length: u16, shortest: usize, longest: u16 },
    #[error("the digits are no packet: {0}")]
    Hex(#[from] HexError),
    #[error("cannot read {path}: {source}")]
    Read { path: String, source: io::Error },
    #[error("{path} is no capture: {source}")]
    Capture { path: String, source: PcapError },
    #[error("{path} holds {held} packets; there is no packet {wanted}")]
    NoSuchPacket { path: String, held: usize, wanted: usize },
    #[error(
        "{path}: packets with link type {link:?} can't be explained; capture on an Ethernet or tun interface"
    )]
    LinkType { path: String, link: DataLink },
}

/// What a packet is built from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flow {
    pub(super) protocol: u8,
    pub(super) source: Endpoint,
    pub(super) destination: Endpoint,
    pub(super) dscp: u8,
    /// IP length in bytes; none: the headers alone.
    pub(super) length: Option<u16>,
}

/// An Ethernet frame of a flow. Its checksums above IP are not right: nothing here looks at them.
pub(super) fn build(flow: Flow) -> Result<Packet, PacketError> {
    let transport = transport(flow)?;
    let payload = |header: usize| -> Result<Vec<u8>, PacketError> {
        let shortest = header + transport.len();
        let length = flow.length.map_or(shortest, usize::from);
        if length < shortest {
            let length = length as u16;
            return Err(PacketError::Length { length, shortest, longest: u16::MAX });
        }
        let mut payload = transport.clone();
        payload.resize(length - header, 0);
        Ok(payload)
    };

    let (ether_type, ip, payload) = match (flow.source.address, flow.destination.address) {
        (std::net::IpAddr::V4(source), std::net::IpAddr::V4(destination)) => {
            let payload = payload(Ipv4Header::MIN_LEN)?;
            let mut header = Ipv4Header {
                total_len: (Ipv4Header::MIN_LEN + payload.len()) as u16,
                time_to_live: 64,
                protocol: IpNumber(flow.protocol),
                source: source.octets(),
                destination: destination.octets(),
                ..Ipv4Header::default()
            };
            let mut bytes = header.to_bytes();
            bytes[1] = flow.dscp << 2;
            header.header_checksum = checksum(&bytes);
            bytes[10..12].copy_from_slice(&header.header_checksum.to_be_bytes());
            (EtherType::IPV4, bytes.to_vec(), payload)
        }
        (std::net::IpAddr::V6(source), std::net::IpAddr::V6(destination)) => {
            let payload = payload(Ipv6Header::LEN)?;
            let header = Ipv6Header {
                traffic_class: flow.dscp << 2,
                flow_label: Ipv6FlowLabel::ZERO,
                payload_length: payload.len() as u16,
                next_header: IpNumber(flow.protocol),
                hop_limit: 64,
                source: source.octets(),
                destination: destination.octets(),
            };
            (EtherType::IPV6, header.to_bytes().to_vec(), payload)
        }
        _ => {
            return Err(PacketError::Families {
                source_endpoint: flow.source,
                destination: flow.destination,
            });
        }
    };
    let ethernet =
        Ethernet2Header { source: [2, 0, 0, 0, 0, 1], destination: [2, 0, 0, 0, 0, 2], ether_type };
    let bytes = [ethernet.to_bytes().as_slice(), &ip, &payload].concat();
    Ok(Packet { bytes, layer3: false })
}

/// The header above IP.
fn transport(flow: Flow) -> Result<Vec<u8>, PacketError> {
    let has_ports = matches!(flow.protocol, TCP | UDP | DCCP | SCTP | UDP_LITE);
    let (source, destination) = match (flow.source.port, flow.destination.port) {
        (Some(source), Some(destination)) if has_ports => (source, destination),
        (None, None) if !has_ports => (0, 0),
        _ if has_ports => return Err(PacketError::PortsMissing(flow.protocol)),
        _ => return Err(PacketError::NoPorts(flow.protocol)),
    };
    Ok(match flow.protocol {
        TCP => TcpHeader::new(source, destination, 0, u16::MAX).to_bytes().to_vec(),
        UDP => UdpHeader { source_port: source, destination_port: destination, length: 8, checksum: 0 }
            .to_bytes()
            .to_vec(),
        // Ports stand first in all of them; the rest of a common header is 8 bytes or less.
        _ if has_ports => {
            let ports = u32::from(source) << 16 | u32::from(destination);
            [ports.to_be_bytes().as_slice(), &[0; 8]].concat()
        }
        // Echo request: type, code, checksum, identifier, sequence.
        ICMP => vec![8, 0, 0, 0, 0, 0, 0, 0],
        ICMP6 => vec![128, 0, 0, 0, 0, 0, 0, 0],
        _ => Vec::new(),
    })
}

fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    // A header of 20 bytes overflows 16 bits by less than 10: one more fold is enough.
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

/// A packet from hexadecimal digits; those of standard input where `text` is `-`.
pub(super) fn from_hex(text: &str, layer3: bool) -> Result<Packet, PacketError> {
    let mut read = String::new();
    let text = if text == "-" {
        io::stdin()
            .read_to_string(&mut read)
            .map_err(|source| PacketError::Read { path: "standard input".to_owned(), source })?;
        &read
    } else {
        text
    };
    Ok(Packet { bytes: hex::decode(text)?, layer3 })
}

/// Packet `wanted`, from 1, of a pcap or pcapng file.
pub(super) fn from_capture(path: &Path, wanted: usize) -> Result<Packet, PacketError> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|source| PacketError::Read { path: name.clone(), source })?;
    // Section header block of pcapng.
    let (held, found) = if bytes.starts_with(&[0x0a, 0x0d, 0x0d, 0x0a]) {
        from_pcapng(&bytes, wanted)
    } else {
        from_pcap(&bytes, wanted)
    }
    .map_err(|source| PacketError::Capture { path: name.clone(), source })?;
    let Some((link, bytes)) = found else {
        return Err(PacketError::NoSuchPacket { path: name, held, wanted });
    };
    match link {
        DataLink::ETHERNET => Ok(Packet { bytes, layer3: false }),
        DataLink::RAW | DataLink::IPV4 | DataLink::IPV6 => Ok(Packet { bytes, layer3: true }),
        link => Err(PacketError::LinkType { path: name, link }),
    }
}

/// How many packets were seen, and the wanted one.
type Found = (usize, Option<(DataLink, Vec<u8>)>);

fn from_pcap(bytes: &[u8], wanted: usize) -> Result<Found, PcapError> {
    let mut reader = PcapReader::new(bytes)?;
    let link = reader.header().datalink;
    let mut held = 0;
    while let Some(packet) = reader.next_packet() {
        let packet = packet?;
        held += 1;
        if held == wanted {
            return Ok((held, Some((link, packet.data.into_owned()))));
        }
    }
    Ok((held, None))
}

fn from_pcapng(bytes: &[u8], wanted: usize) -> Result<Found, PcapError> {
    let mut reader = PcapNgReader::new(bytes)?;
    let mut held = 0;
    loop {
        let (interface, data) = match reader.next_block() {
            None => return Ok((held, None)),
            Some(block) => match block? {
                Block::EnhancedPacket(packet) => (packet.interface_id as usize, packet.data.into_owned()),
                Block::SimplePacket(packet) => (0, packet.data.into_owned()),
                _ => continue,
            },
        };
        held += 1;
        if held == wanted {
            let link = reader.interfaces().get(interface).map_or(DataLink::ETHERNET, |known| known.linktype);
            return Ok((held, Some((link, data))));
        }
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};

    use super::*;

    fn flow(protocol: u8, source: &str, destination: &str) -> Flow {
        Flow {
            protocol,
            source: source.parse().expect("endpoint"),
            destination: destination.parse().expect("endpoint"),
            dscp: 46,
            length: None,
        }
    }

    #[test]
    fn what_is_built_reads_back() {
        for (protocol, source, destination, length) in [
            (UDP, "203.0.113.7:5004", "192.0.2.10:4000", Some(1_500)),
            (TCP, "[2001:db8::1]:443", "[2001:db8:7::2]:50000", None),
            (ICMP, "203.0.113.7", "192.0.2.10", Some(84)),
            (SCTP, "203.0.113.7:9", "192.0.2.10:10", None),
        ] {
            let packet = build(Flow { length, ..flow(protocol, source, destination) }).expect("built");
            let sliced = SlicedPacket::from_ethernet(&packet.bytes).expect("a packet");
            let (dscp, ip_length) = match sliced.net.expect("IP") {
                NetSlice::Ipv4(ip) => {
                    assert_eq!(ip.header().to_header().calc_header_checksum(), ip.header().header_checksum());
                    (ip.header().dcp().value(), ip.header().total_len())
                }
                NetSlice::Ipv6(ip) => (ip.header().traffic_class() >> 2, 40 + ip.header().payload_length()),
                NetSlice::Arp(_) => panic!("no ARP was asked for"),
            };
            assert_eq!((dscp, ip_length as usize), (46, packet.bytes.len() - 14));
            if let Some(length) = length {
                assert_eq!(ip_length, length);
            }
            match sliced.transport {
                Some(TransportSlice::Udp(udp)) => {
                    assert_eq!((udp.source_port(), udp.destination_port()), (5_004, 4_000));
                }
                Some(TransportSlice::Tcp(tcp)) => {
                    assert_eq!((tcp.source_port(), tcp.destination_port()), (443, 50_000));
                }
                _ => assert!(protocol == ICMP || protocol == SCTP),
            }
        }
    }

    #[test]
    fn what_cannot_be_built_is_said() {
        for (flow, expected) in [
            (flow(UDP, "192.0.2.1:1", "[2001:db8::1]:2"), "are of different families"),
            (flow(UDP, "192.0.2.1", "192.0.2.2:2"), "protocol 17 has ports"),
            (flow(ICMP, "192.0.2.1:1", "192.0.2.2:2"), "protocol 1 has no ports"),
            (
                Flow { length: Some(27), ..flow(UDP, "192.0.2.1:1", "192.0.2.2:2") },
                "length 27: the headers alone take 28 bytes",
            ),
        ] {
            let error = build(flow).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn captures_are_read() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("two.pcap");
        let header = PcapHeader { datalink: DataLink::RAW, ..PcapHeader::default() };
        let mut writer =
            PcapWriter::with_header(std::fs::File::create(&path).expect("made"), header).expect("header");
        for data in [[0x45, 1], [0x45, 2]] {
            writer.write_packet(&PcapPacket::new(std::time::Duration::ZERO, 2, &data)).expect("written");
        }
        drop(writer);
        assert_eq!(from_capture(&path, 2).expect("there"), Packet { bytes: vec![0x45, 2], layer3: true });
        let error = from_capture(&path, 3).expect_err("too far").to_string();
        assert!(error.ends_with("holds 2 packets; there is no packet 3"), "{error}");
        std::fs::write(&path, "no capture at all, just text").expect("written");
        assert!(matches!(from_capture(&path, 1), Err(PacketError::Capture { .. })));
    }
}
