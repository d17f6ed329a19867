//! The rules and packets of the benchmark: many providers, many subscribers, one rule for each pair.

use qos_common::classify::{Address, CHECK_PORTS, CHECK_PROTOCOL, Direction, Family, Rule, rank};
use qos_tests::classbench::Tuple;
use qos_tests::random::Random;

/// First UDP port of a rule, and how many it covers.
pub(crate) const PORTS: (u16, u16) = (5_000, 100);

/// First bytes of the addresses of a router and its neighbours: benchmarks have 198.18.0.0/15 (RFC 2544).
pub(crate) const ROUTER: [u8; 2] = [198, 18];

/// Headers of a packet, as the driving program writes them: Ethernet, IPv6 and eight bytes as of UDP. Behind
/// shorter ones are zeros.
pub(crate) const HEADERS: usize = 62;

/// Subscriber of rule `number`, 10.64.0.0/14.
pub(crate) fn subscriber(number: u32) -> [u8; 4] {
    (0x0a40_0000 + 16 + number).to_be_bytes()
}

/// Provider of rule `number`, one of 64 in 203.0.113.0/24 and its neighbours.
pub(crate) fn provider(number: u32) -> [u8; 4] {
    [203, 0, 113, (number % 64) as u8 + 1]
}

/// Upstream rule `number`: from one subscriber to one provider's /32, UDP, a range of ports.
pub(crate) fn rule(number: u32) -> Rule {
    Rule {
        source: Address::v4(subscriber(number)),
        source_length: 32,
        destination: Address::v4(provider(number)),
        destination_length: 32,
        rank: rank(0, u64::from(number) + 1, 0),
        slot: number + 1,
        source_ports: [0, u16::MAX],
        destination_ports: [PORTS.0, PORTS.0 + PORTS.1 - 1],
        lengths: [0, u16::MAX],
        protocol: 17,
        checks: CHECK_PROTOCOL | CHECK_PORTS,
        direction: Direction::Upstream as u8,
        ..Rule::default()
    }
}

/// A packet of a flow that matches rule `number`.
pub(crate) fn headers(number: u32, flow: u32, mac: [u8; 6]) -> [u8; HEADERS] {
    let addresses = [subscriber(number), provider(number)].map(u32::from_be_bytes);
    let ports = [10_000 + (flow % 50_000) as u16, PORTS.0 + (flow % u32::from(PORTS.1)) as u16];
    frame(mac, &Tuple::v4(addresses, ports, 17))
}

/// Ethernet to `mac`, IP, and eight bytes as of UDP, of a frame of [`frame_length`] bytes.
pub(crate) fn frame(mac: [u8; 6], packet: &Tuple) -> [u8; HEADERS] {
    let mut bytes = [0; HEADERS];
    bytes[..6].copy_from_slice(&mac);
    bytes[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
    let transport = match packet.family {
        Family::V4 => {
            bytes[12..14].copy_from_slice(&[8, 0]);
            bytes[14..18].copy_from_slice(&[0x45, 0, 0, 46]);
            bytes[22..24].copy_from_slice(&[64, packet.protocol]);
            bytes[26..30].copy_from_slice(&packet.source.to_be_bytes()[..4]);
            bytes[30..34].copy_from_slice(&packet.destination.to_be_bytes()[..4]);
            let sum: u32 =
                bytes[14..34].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
            let sum = (sum & 0xffff) + (sum >> 16);
            bytes[24..26].copy_from_slice(&(!((sum & 0xffff) as u16 + (sum >> 16) as u16)).to_be_bytes());
            34
        }
        Family::V6 => {
            bytes[12..14].copy_from_slice(&[0x86, 0xdd]);
            bytes[14..22].copy_from_slice(&[0x60, 0, 0, 0, 0, 10, packet.protocol, 64]);
            bytes[22..38].copy_from_slice(&packet.source.to_be_bytes());
            bytes[38..54].copy_from_slice(&packet.destination.to_be_bytes());
            54
        }
    };
    let length = frame_length(&bytes) - transport;
    bytes[transport..transport + 2].copy_from_slice(&packet.source_port.to_be_bytes());
    bytes[transport + 2..transport + 4].copy_from_slice(&packet.destination_port.to_be_bytes());
    bytes[transport + 4..transport + 6].copy_from_slice(&(length as u16).to_be_bytes());
    bytes
}

/// Bytes of the frame that has these headers.
pub(crate) fn frame_length(headers: &[u8; HEADERS]) -> usize {
    if headers[12..14] == [0x86, 0xdd] { 64 } else { 60 }
}

/// `flows` flows over `rules` rules, in an order that no prefetcher guesses.
pub(crate) fn flows(rules: u32, flows: u32) -> Vec<(u32, u32)> {
    let mut list: Vec<_> = (0..flows)
        .map(|flow| ((u64::from(flow) * u64::from(rules) / u64::from(flows)) as u32, flow))
        .collect();
    Random::new(7).shuffle(&mut list);
    list
}
