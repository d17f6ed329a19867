//! A plain parser and classifier to hold the kernel programs against: written from the RFCs and the
//! contract, slow, and sharing no code with them but the shape of a key.

use qos_common::abi::Outcome;
use qos_common::classify::{Address, Key, NO_PORTS, NO_TRANSPORT, Rule};

/// What the parser says of a frame.
pub type Read = Result<(Key, Fragment), Outcome>;

/// Which piece of a packet a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// All of it.
    Whole,
    /// The first of several.
    First,
    /// A later one.
    Later,
}

/// Reads an Ethernet frame.
///
/// # Errors
/// The outcome that a frame which can't be read is counted as.
pub fn parse(frame: &[u8], direction: u32) -> Read {
    if frame.len() < 14 {
        return Err(Outcome::Truncated);
    }
    let mut at = 12;
    let mut ether_type = word(frame, at)?;
    at += 2;
    let mut tags = 0;
    while [0x8100, 0x88a8, 0x9100].contains(&ether_type) {
        if tags == 2 {
            return Err(Outcome::TooManyTags);
        }
        need(frame, at, 4)?;
        ether_type = word(frame, at + 2)?;
        at += 4;
        tags += 1;
    }
    if ether_type == 0x8864 {
        need(frame, at, 8)?;
        if frame[at] != 0x11 || frame[at + 1] != 0 {
            return Err(Outcome::NotIp);
        }
        ether_type = match word(frame, at + 6)? {
            0x0021 => 0x0800,
            0x0057 => 0x86dd,
            _ => return Err(Outcome::NotIp),
        };
        at += 8;
    }
    match ether_type {
        0x0800 => ipv4(frame, at, direction),
        0x86dd => ipv6(frame, at, direction),
        _ => Err(Outcome::NotIp),
    }
}

fn ipv4(frame: &[u8], at: usize, direction: u32) -> Read {
    need(frame, at, 20)?;
    let header = &frame[at..];
    let header_length = usize::from(header[0] & 15) * 4;
    let mut length = usize::from(word(header, 2)?);
    if length == 0 {
        length = frame.len() - at;
    }
    if header[0] >> 4 != 4 || header_length < 20 || length < header_length {
        return Err(Outcome::Malformed);
    }
    let flags = word(header, 6)?;
    let fragment = match (flags & 0x1fff, flags & 0x2000) {
        (0, 0) => Fragment::Whole,
        (0, _) => Fragment::First,
        _ => Fragment::Later,
    };
    let mut key = Key {
        source: Address::v4(header[12..16].try_into().expect("four bytes")),
        destination: Address::v4(header[16..20].try_into().expect("four bytes")),
        direction,
        family: 0,
        unknown: 0,
        source_port: 0,
        destination_port: 0,
        length: length.min(65_535) as u16,
        protocol: header[9],
        dscp: header[1] >> 2,
        reserved: [0; 3],
    };
    ports(frame, at + header_length, fragment, &mut key)?;
    Ok((key, fragment))
}

fn ipv6(frame: &[u8], at: usize, direction: u32) -> Read {
    need(frame, at, 40)?;
    let header = &frame[at..];
    if header[0] >> 4 != 6 {
        return Err(Outcome::Malformed);
    }
    let mut length = usize::from(word(header, 4)?);
    length = if length == 0 { frame.len() - at } else { length + 40 };
    let mut key = Key {
        source: Address::v6(header[8..24].try_into().expect("sixteen bytes")),
        destination: Address::v6(header[24..40].try_into().expect("sixteen bytes")),
        direction,
        family: 1,
        unknown: 0,
        source_port: 0,
        destination_port: 0,
        length: length.min(65_535) as u16,
        protocol: header[6],
        dscp: (word(header, 0)? >> 6) as u8 & 63,
        reserved: [0; 3],
    };
    let mut fragment = Fragment::Whole;
    let mut next = at + 40;
    for _ in 0..6 {
        let kind = key.protocol;
        if !is_extension(kind) {
            break;
        }
        need(frame, next, 8)?;
        key.protocol = frame[next];
        let units = usize::from(frame[next + 1]);
        if kind == 44 {
            let offset = word(frame, next + 2)?;
            next += 8;
            if offset >> 3 != 0 {
                fragment = Fragment::Later;
                break;
            }
            if offset & 1 != 0 {
                fragment = Fragment::First;
            }
        } else if kind == 51 {
            next += (units + 2) * 4;
        } else {
            next += (units + 1) * 8;
        }
    }
    if is_extension(key.protocol) {
        key.unknown = NO_TRANSPORT;
    } else {
        ports(frame, next, fragment, &mut key)?;
    }
    Ok((key, fragment))
}

fn is_extension(protocol: u8) -> bool {
    [0, 43, 44, 51, 60, 135, 139, 140].contains(&protocol)
}

fn ports(frame: &[u8], at: usize, fragment: Fragment, key: &mut Key) -> Result<(), Outcome> {
    if ![6, 17, 33, 132, 136].contains(&key.protocol) {
        return Ok(());
    }
    if fragment == Fragment::Later {
        key.unknown = NO_PORTS;
        return Ok(());
    }
    need(frame, at, 4)?;
    key.source_port = word(frame, at)?;
    key.destination_port = word(frame, at + 2)?;
    Ok(())
}

fn need(frame: &[u8], at: usize, bytes: usize) -> Result<(), Outcome> {
    if at + bytes > frame.len() { Err(Outcome::Truncated) } else { Ok(()) }
}

fn word(frame: &[u8], at: usize) -> Result<u16, Outcome> {
    need(frame, at, 2)?;
    Ok(u16::from_be_bytes([frame[at], frame[at + 1]]))
}

/// Tells whether a rule matches, field by field, with prefixes as numbers of 128 bits.
#[must_use]
pub fn matches(rule: &Rule, key: &Key) -> bool {
    let whole = |address: Address| u128::from(address.high) << 64 | u128::from(address.low);
    let prefix = |rule: Address, key: Address, length: u8| {
        length == 0 || (whole(rule) ^ whole(key)) >> (128 - u32::from(length)) == 0
    };
    let has_ports = [6, 17, 33, 132, 136].contains(&key.protocol);
    let within = |value: u16, range: [u16; 2]| (range[0]..=range[1]).contains(&value);
    let transport_known = key.unknown & NO_TRANSPORT == 0;
    let ports_known = key.unknown & (NO_TRANSPORT | NO_PORTS) == 0;
    u32::from(rule.family) == key.family
        && u32::from(rule.direction) == key.direction
        && prefix(rule.source, key.source, rule.source_length)
        && prefix(rule.destination, key.destination, rule.destination_length)
        && within(key.length, rule.lengths)
        && (rule.checks & 4 == 0 || rule.dscp == key.dscp)
        && (rule.checks & 1 == 0 || !transport_known || rule.protocol == key.protocol)
        && (rule.checks & 2 == 0
            || !transport_known
            || has_ports
                && (!ports_known
                    || within(key.source_port, rule.source_ports)
                        && within(key.destination_port, rule.destination_ports)))
}

/// The best rule that matches and is live, by linear search.
#[must_use]
pub fn classify<'a>(rules: &'a [Rule], key: &Key, live: impl Fn(&Rule) -> bool) -> Option<&'a Rule> {
    rules.iter().filter(|rule| matches(rule, key) && live(rule)).min_by_key(|rule| rule.rank)
}
