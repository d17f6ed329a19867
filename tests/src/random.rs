//! Random frames and rules over a small world, so that they meet. The same seed gives the same ones.

use qos_common::classify::{Address, CHECK_DSCP, CHECK_PORTS, CHECK_PROTOCOL, Family, Rule, rank};

/// Splitmix64 (Steele, Lea and Flood 2014): a few lines that every seed suits.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Numbers of this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `bound`, which is not zero.
    pub const fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// True once in `times`.
    pub const fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of several.
    pub fn choose<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Brings a list into random order.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

const PORTS: [u16; 6] = [0, 53, 80, 443, 5_000, 65_535];
const PROTOCOLS: [u8; 7] = [6, 17, 132, 1, 58, 47, 33];

/// An address of the small world: eight networks of four hosts, and now and then any at all.
fn address(random: &mut Random, family: Family) -> Address {
    let (net, host) = (random.below(8) as u8, random.below(4) as u8);
    match (family, random.once_in(20)) {
        (Family::V4, false) => Address::v4([10, net, net ^ 3, host]),
        (Family::V4, true) => Address::v4((random.next() as u32).to_be_bytes()),
        (Family::V6, false) => {
            let mut octets = [0; 16];
            octets[..4].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8]);
            (octets[6], octets[9], octets[15]) = (net, net, host);
            Address::v6(octets)
        }
        (Family::V6, true) => Address { high: random.next(), low: random.next() },
    }
}

fn prefix_length(random: &mut Random, family: Family) -> u8 {
    let most = if family == Family::V4 { 32 } else { 128 };
    match random.below(6) {
        0 => 0,
        1 => most,
        2 => random.below(u64::from(most) + 1) as u8,
        _ => random.choose(if family == Family::V4 { &[8, 16, 24, 31] } else { &[32, 48, 56, 64] }),
    }
}

fn range(random: &mut Random, values: &[u16]) -> [u16; 2] {
    let (a, b) = (random.choose(values), random.choose(values));
    [a.min(b), a.max(b)]
}

/// A rule of allocation `id`, which has slot `slot`.
pub fn rule(random: &mut Random, id: u64, selector: u32, slot: u32) -> Rule {
    let family = if random.once_in(2) { Family::V4 } else { Family::V6 };
    let (source_length, destination_length) = (prefix_length(random, family), prefix_length(random, family));
    let mut rule = Rule {
        source: address(random, family).prefix(u32::from(source_length)),
        destination: address(random, family).prefix(u32::from(destination_length)),
        rank: rank(random.below(3) as u16, id, selector),
        slot,
        source_ports: [0, u16::MAX],
        destination_ports: [0, u16::MAX],
        lengths: [0, u16::MAX],
        source_length,
        destination_length,
        family: family as u8,
        direction: random.below(2) as u8,
        ..Rule::default()
    };
    if random.once_in(2) {
        rule.checks |= CHECK_PROTOCOL;
        rule.protocol = random.choose(&PROTOCOLS);
    }
    if random.once_in(3) {
        rule.checks |= CHECK_PORTS;
        rule.source_ports = range(random, &PORTS);
        rule.destination_ports = range(random, &PORTS);
    }
    if random.once_in(8) {
        rule.checks |= CHECK_DSCP;
        rule.dscp = random.choose(&[0, 46, 34]);
    }
    if random.once_in(8) {
        rule.lengths = range(random, &[0, 40, 100, 1_500, 65_535]);
    }
    rule
}

/// A frame: valid, truncated or corrupted, of every combination of headers that the parser knows and
/// some that it does not.
pub fn frame(random: &mut Random) -> Vec<u8> {
    let family = if random.once_in(2) { Family::V4 } else { Family::V6 };
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    for _ in 0..random.choose(&[0, 0, 0, 1, 2, 3]) {
        frame.extend(random.choose(&[0x8100u16, 0x88a8, 0x9100]).to_be_bytes());
        frame.extend((random.next() as u16).to_be_bytes());
    }
    let (ether_type, ppp) = if family == Family::V4 { (0x0800u16, 0x0021u16) } else { (0x86dd, 0x0057) };
    match random.below(12) {
        0 => {
            frame.extend(0x8864u16.to_be_bytes());
            frame.extend([random.choose(&[0x11, 0x11, 0x21]), random.choose(&[0, 0, 9]), 0, 1, 0, 60]);
            frame.extend(random.choose(&[ppp, ppp, 0xc021]).to_be_bytes());
        }
        1 => frame.extend(random.choose(&[0x0806u16, 0x88cc, 0x0800, 0x86dd]).to_be_bytes()),
        _ => frame.extend(ether_type.to_be_bytes()),
    }
    match family {
        Family::V4 => ipv4(random, &mut frame),
        Family::V6 => ipv6(random, &mut frame),
    }
    frame.resize(frame.len() + random.below(40) as usize, 0);
    if random.once_in(5) {
        frame.truncate(14 + random.below(frame.len() as u64 - 13) as usize);
    }
    if random.once_in(5) {
        for _ in 0..=random.below(3) {
            let at = random.below(frame.len() as u64) as usize;
            frame[at] = random.next() as u8;
        }
    }
    frame.resize(frame.len().max(14), 0);
    frame
}

fn ipv4(random: &mut Random, frame: &mut Vec<u8>) {
    let words = random.choose(&[5u8, 5, 5, 6, 10, 15]);
    let length = random.choose(&[40u16, 100, 1_500, 65_535, 0]);
    let tos = random.choose(&[0, 46, 34, 10]) << 2 | random.below(4) as u8;
    let fragment = random.choose(&[0u16, 0, 0, 0x4000, 0x2000, 0x2001, 0x0007]);
    let protocol = random.choose(&PROTOCOLS);
    frame.extend([0x40 | words, tos]);
    frame.extend(length.to_be_bytes());
    frame.extend((random.below(4) as u16).to_be_bytes());
    frame.extend(fragment.to_be_bytes());
    frame.extend([64, protocol, 0, 0]);
    for _ in 0..2 {
        frame.extend(((address(random, Family::V4).high >> 32) as u32).to_be_bytes());
    }
    frame.resize(frame.len() + usize::from(words - 5) * 4, 1);
    transport(random, frame);
}

fn ipv6(random: &mut Random, frame: &mut Vec<u8>) {
    let extensions: Vec<u8> = (0..random.choose(&[0, 0, 0, 1, 2, 6, 7]))
        .map(|_| random.choose(&[0, 43, 44, 51, 60, 135, 139, 140]))
        .collect();
    let last = random.choose(&[6, 17, 132, 58, 59, 47]);
    let class = random.choose(&[0u8, 46, 34]) << 2 | random.below(4) as u8;
    frame.extend([0x60 | class >> 4, class << 4, 0, 1]);
    frame.extend(random.choose(&[60u16, 1_460, 0]).to_be_bytes());
    frame.extend([extensions.first().copied().unwrap_or(last), 64]);
    for _ in 0..2 {
        let address = address(random, Family::V6);
        frame.extend(address.high.to_be_bytes());
        frame.extend(address.low.to_be_bytes());
    }
    for (position, kind) in extensions.iter().enumerate() {
        let next = extensions.get(position + 1).copied().unwrap_or(last);
        match kind {
            44 => {
                frame.extend([next, 0]);
                frame.extend(random.choose(&[0u16, 1, 8, 1_449]).to_be_bytes());
                frame.extend((random.below(4) as u32).to_be_bytes());
            }
            51 => {
                frame.extend([next, 2]);
                frame.resize(frame.len() + 14, 0);
            }
            _ => {
                let units = random.below(3) as u8;
                frame.extend([next, units]);
                frame.resize(frame.len() + 6 + usize::from(units) * 8, 0);
            }
        }
    }
    transport(random, frame);
}

fn transport(random: &mut Random, frame: &mut Vec<u8>) {
    for _ in 0..2 {
        frame.extend(random.choose(&PORTS).to_be_bytes());
    }
    frame.resize(frame.len() + 16, 0);
}
