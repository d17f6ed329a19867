//! What an accounting request (RFC 2866) tells of a line.
//!
//! A session is called by its BRAS and its Acct-Session-Id, which only that BRAS gives once; Acct-Multi-Session-Id,
//! which sessions share, is not looked at. Framed-IP-Netmask isn't either: it is that of the network that the
//! subscriber shares with others as often as his own. What is routed to him stands in Framed-Route.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};
use jiff::{SignedDuration, Timestamp};

use super::name::line_name;
use super::radius::Packet;
use crate::domain::subscriber::{Event, Facts, LONGEST_KEY, Report};
use crate::domain::{BitsPerSecond, Directed, LinkLayer, Name};

// RFC 2865
const USER_NAME: u8 = 1;
const NAS_IP_ADDRESS: u8 = 4;
const FRAMED_PROTOCOL: u8 = 7;
const FRAMED_IP_ADDRESS: u8 = 8;
const FRAMED_ROUTE: u8 = 22;
const CALLING_STATION_ID: u8 = 31;
const NAS_IDENTIFIER: u8 = 32;
// RFC 2866, 2869
const ACCT_STATUS_TYPE: u8 = 40;
const ACCT_DELAY_TIME: u8 = 41;
const ACCT_SESSION_ID: u8 = 44;
const EVENT_TIMESTAMP: u8 = 55;
const NAS_PORT_ID: u8 = 87;
// RFC 3162, 4818, 6911
const NAS_IPV6_ADDRESS: u8 = 95;
const FRAMED_IPV6_PREFIX: u8 = 97;
const FRAMED_IPV6_ROUTE: u8 = 99;
const DELEGATED_IPV6_PREFIX: u8 = 123;
const FRAMED_IPV6_ADDRESS: u8 = 168;

/// The ADSL Forum's number, and what it gave out (RFC 4679).
const ADSL_FORUM: u32 = 3_561;
const AGENT_CIRCUIT_ID: u8 = 1;
const AGENT_REMOTE_ID: u8 = 2;
const ACTUAL_DATA_RATE_UPSTREAM: u8 = 129;
const ACTUAL_DATA_RATE_DOWNSTREAM: u8 = 130;
const ACTUAL_INTERLEAVING_DELAY_UPSTREAM: u8 = 140;
const ACTUAL_INTERLEAVING_DELAY_DOWNSTREAM: u8 = 142;
const ACCESS_LOOP_ENCAPSULATION: u8 = 144;
const IWF_SESSION: u8 = 254;

/// Prefixes that a line has at most.
const MOST_ADDRESSES: usize = 16;
/// Longest interleaving delay that is believed, in ms: twice the most that G.993.2 lets be asked for.
const LONGEST_INTERLEAVING: u32 = 500;
/// How far a BRAS's clock may be off for what it says to be taken.
const CLOCK_ERROR: SignedDuration = SignedDuration::from_mins(5);
/// The same where nothing else says how long ago something was: what is older is a clock that was never set.
const LONGEST_AGO: SignedDuration = SignedDuration::from_hours(24);

/// What names a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineAttribute {
    /// User-Name.
    UserName,
    /// Calling-Station-Id.
    CallingStationId,
    /// NAS-Port-Id.
    NasPortId,
    /// Agent-Circuit-Id of the ADSL Forum.
    AgentCircuitId,
    /// Agent-Remote-Id of the ADSL Forum.
    AgentRemoteId,
}

impl LineAttribute {
    /// As the configuration calls them.
    pub const NAMES: [(&str, Self); 5] = [
        ("user-name", Self::UserName),
        ("calling-station-id", Self::CallingStationId),
        ("nas-port-id", Self::NasPortId),
        ("agent-circuit-id", Self::AgentCircuitId),
        ("agent-remote-id", Self::AgentRemoteId),
    ];

    fn of<'p>(self, packet: &Packet<'p>) -> Option<&'p [u8]> {
        match self {
            Self::UserName => packet.find(USER_NAME),
            Self::CallingStationId => packet.find(CALLING_STATION_ID),
            Self::NasPortId => packet.find(NAS_PORT_ID),
            Self::AgentCircuitId => packet.find_vendor(ADSL_FORUM, AGENT_CIRCUIT_ID),
            Self::AgentRemoteId => packet.find_vendor(ADSL_FORUM, AGENT_REMOTE_ID),
        }
    }
}

/// What came of reading a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Told {
    /// It tells this.
    Report(Report),
    /// It tells nothing that matters here, as it is expected to now and then.
    Nothing,
    /// It tells nothing that can be used, and repeating it won't help.
    Useless(&'static str),
}

/// Reads a request that came from `peer` at `now`. Its line is named by the first of `line` that it has.
pub(crate) fn read(
    packet: &Packet<'_>,
    peer: IpAddr,
    now: Timestamp,
    line: &[LineAttribute],
    source: &Name,
) -> Told {
    let bras = bras(packet, peer);
    let up = match number(packet.find(ACCT_STATUS_TYPE)) {
        // Start, Interim-Update
        Some(1 | 3) => true,
        // Stop
        Some(2) => false,
        // Accounting-On, Accounting-Off
        Some(7 | 8) => {
            return Told::Report(Report {
                source: Some(source.clone()),
                at: moment(packet, now),
                event: Event::BrasDown { bras },
            });
        }
        Some(_) => return Told::Nothing,
        None => return Told::Useless("no Acct-Status-Type"),
    };
    let text = line.iter().find_map(|attribute| attribute.of(packet));
    let Some(line) = text.and_then(line_name) else {
        return Told::Useless("none of the attributes that `line` of [radius] names");
    };
    let key = packet.find(ACCT_SESSION_ID).map(|id| key(&bras, id));
    let event = if up {
        let addresses = addresses(packet);
        if addresses.is_empty() {
            // It has none yet; an interim update will bring it.
            return Told::Nothing;
        }
        let (link_layer, overhead) = framing(packet);
        let facts = Facts {
            addresses,
            rate: Directed {
                up: rate(packet, ACTUAL_DATA_RATE_UPSTREAM),
                down: rate(packet, ACTUAL_DATA_RATE_DOWNSTREAM),
            },
            link_layer,
            overhead,
            delay_us: delay_us(packet),
            bras: Some(bras),
            ..Facts::default()
        };
        Event::Up { line, key, facts }
    } else {
        Event::Down { line, key }
    };
    Told::Report(Report { source: Some(source.clone()), at: moment(packet, now), event })
}

/// Who terminates the line: as it calls itself, else its address, else where the packet came from.
fn bras(packet: &Packet<'_>, peer: IpAddr) -> String {
    if let Some(name) = packet.find(NAS_IDENTIFIER).map(text).filter(|name| !name.is_empty()) {
        return name;
    }
    let v4 = packet.find(NAS_IP_ADDRESS).and_then(v4).map(IpAddr::V4);
    let v6 = || packet.find(NAS_IPV6_ADDRESS).and_then(v6).map(IpAddr::V6);
    v4.or_else(v6).unwrap_or(peer).to_string()
}

/// At most 253 characters: an attribute has no more bytes.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_matches(|c: char| c.is_control() || c.is_whitespace()).to_owned()
}

/// Where both are too long for a key, a shorter one that is as good.
fn key(bras: &str, id: &[u8]) -> String {
    let key = format!("{bras}/{}", text(id));
    if key.len() <= LONGEST_KEY {
        return key;
    }
    line_name(key.as_bytes()).map_or_else(String::new, String::from)
}

/// When it was so. The BRAS's clock is believed where it agrees with how long the BRAS says that it has been trying
/// to tell; what lies ahead is now.
fn moment(packet: &Packet<'_>, now: Timestamp) -> Timestamp {
    let event = number(packet.find(EVENT_TIMESTAMP))
        .and_then(|seconds| Timestamp::from_second(i64::from(seconds)).ok());
    let delay = number(packet.find(ACCT_DELAY_TIME)).map(|seconds| SignedDuration::from_secs(seconds.into()));
    let tried = delay.and_then(|delay| now.checked_sub(delay).ok());
    let (near, error) = tried.map_or((now, LONGEST_AGO), |tried| (tried, CLOCK_ERROR));
    match event {
        Some(event) if event.duration_since(near).abs() <= error => event.min(now),
        _ => near,
    }
}

/// What belongs to the subscriber, each part once.
fn addresses(packet: &Packet<'_>) -> Vec<IpNet> {
    let hosts = packet.all(FRAMED_IP_ADDRESS).filter_map(v4).filter(is_assigned).map(IpAddr::V4);
    let hosts6 = packet.all(FRAMED_IPV6_ADDRESS).filter_map(v6).map(IpAddr::V6);
    let prefixes = packet.all(FRAMED_IPV6_PREFIX).chain(packet.all(DELEGATED_IPV6_PREFIX)).filter_map(prefix);
    let routes = packet.all(FRAMED_ROUTE).chain(packet.all(FRAMED_IPV6_ROUTE)).filter_map(route);
    let all = hosts.chain(hosts6).map(IpNet::from).chain(prefixes.map(IpNet::V6)).chain(routes);
    without_parts(all)
}

/// Prefixes without those that lie in another, in their order and 16 at most.
pub(super) fn without_parts(prefixes: impl Iterator<Item = IpNet>) -> Vec<IpNet> {
    let mut kept = Vec::<IpNet>::new();
    for prefix in prefixes.map(|prefix| prefix.trunc()) {
        if prefix.prefix_len() > 0
            && !prefix.addr().is_unspecified()
            && !kept.iter().any(|other| other.contains(&prefix))
        {
            kept.retain(|other| !prefix.contains(other));
            kept.push(prefix);
        }
    }
    kept.truncate(MOST_ADDRESSES);
    kept
}

/// The two that are none stand for "as the subscriber likes" and "as the BRAS likes" (RFC 2865, section 5.8).
pub(super) fn is_assigned(address: &Ipv4Addr) -> bool {
    !address.is_broadcast() && *address != Ipv4Addr::new(255, 255, 255, 254)
}

/// A prefix as RFC 3162 writes it: a reserved byte, the length, and as many bytes as it needs at least.
fn prefix(value: &[u8]) -> Option<Ipv6Net> {
    let [_, length, bytes @ ..] = value else { return None };
    if bytes.len() > 16 || usize::from(*length) > bytes.len() * 8 {
        return None;
    }
    let mut address = [0; 16];
    address[..bytes.len()].copy_from_slice(bytes);
    Ipv6Net::new(address.into(), *length).ok()
}

/// The first word of a route; one without a length is of an address.
fn route(value: &[u8]) -> Option<IpNet> {
    let word = std::str::from_utf8(value).ok()?.split_ascii_whitespace().next()?;
    word.parse().ok().or_else(|| word.parse::<IpAddr>().ok().map(IpNet::from))
}

fn rate(packet: &Packet<'_>, kind: u8) -> Option<BitsPerSecond> {
    let rate = number(packet.find_vendor(ADSL_FORUM, kind)).filter(|rate| *rate > 0)?;
    Some(BitsPerSecond(rate.into()))
}

/// The larger of both directions: a line has one delay.
fn delay_us(packet: &Packet<'_>) -> u32 {
    let both = [ACTUAL_INTERLEAVING_DELAY_UPSTREAM, ACTUAL_INTERLEAVING_DELAY_DOWNSTREAM];
    let told = both.iter().filter_map(|kind| number(packet.find_vendor(ADSL_FORUM, *kind)));
    told.filter(|ms| *ms <= LONGEST_INTERLEAVING).max().unwrap_or_default() * 1_000
}

/// How the line frames packets, and how many bytes that takes, where it is told whole.
fn framing(packet: &Packet<'_>) -> (LinkLayer, Option<i16>) {
    let Some([data_link, outer, inner]) =
        packet.find_vendor(ADSL_FORUM, ACCESS_LOOP_ENCAPSULATION).and_then(|value| value.first_chunk::<3>())
    else {
        return (LinkLayer::default(), None);
    };
    // Where the access node makes PPPoE of PPPoA there is none on the line.
    let pppoe = number(packet.find(FRAMED_PROTOCOL)) == Some(1)
        && packet.find_vendor(ADSL_FORUM, IWF_SESSION).is_none();
    let session = if pppoe { 8 } else { 0 };
    let ethernet = session
        + match outer {
            // One tag.
            2 => 14 + 4,
            _ => 14,
        };
    match data_link {
        // The trailer of AAL5 is 8 bytes, LLC and SNAP 8, RFC 2684's padding of bridged frames 2, an FCS 4.
        1 => {
            let bytes = match inner {
                1 => 8 + 4 + 2,
                2 => 8 + 2,
                3 => 8 + 8,
                4 => 8,
                5 => 8 + 8 + 2 + 4 + ethernet,
                6 => 8 + 8 + 2 + ethernet,
                7 => 8 + 2 + 4 + ethernet,
                8 => 8 + 2 + ethernet,
                _ => return (LinkLayer::Atm, None),
            };
            (LinkLayer::Atm, Some(bytes))
        }
        // Of Ethernet on a DSL line: its FCS 4, and PTM's start and check bytes and CRC 4.
        2 => (LinkLayer::Ptm, Some(ethernet + 4 + 4)),
        _ => (LinkLayer::default(), None),
    }
}

fn number(value: Option<&[u8]>) -> Option<u32> {
    value?.try_into().ok().map(u32::from_be_bytes)
}

fn v4(value: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(value).ok().map(Ipv4Addr::from)
}

fn v6(value: &[u8]) -> Option<Ipv6Addr> {
    <[u8; 16]>::try_from(value).ok().map(Ipv6Addr::from)
}

#[cfg(test)]
mod tests;
