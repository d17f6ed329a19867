//! Flow selectors: which packets an allocation is for.
//!
//! A selector has a text form (`down udp from 198.51.100.0/24:5000-6000`, module [`grammar`]), a
//! JSON form with a member a field, and a kernel form ([`rules()`]). All of them go through
//! [`Selector::check`], so that one that could never match is refused where it is written.

use std::net::IpAddr;

use ipnet::IpNet;
use qos_common::classify::{Family, has_ports};
use serde::{Deserialize, Deserializer, Serialize};

use super::{Direction, dscp};

pub mod grammar;
mod rules;

pub use grammar::parse_flows;
pub use rules::rules;

/// Shortest IP packet, in bytes: an IPv4 header.
const SHORTEST_PACKET: u16 = 20;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;

/// An inclusive range of ports or lengths, first not above last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u16, u16)", into = "(u16, u16)")]
pub struct Range16 {
    first: u16,
    last: u16,
}

/// A range whose first value is above its last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the range {first}-{last} is inverted: the first value is above the last")]
pub struct InvertedRange {
    first: u16,
    last: u16,
}

impl Range16 {
    /// The range of every value.
    pub const ALL: Self = Self { first: 0, last: u16::MAX };

    /// The range from `first` to `last`, both included.
    ///
    /// # Errors
    /// Where `first` is above `last`.
    pub const fn new(first: u16, last: u16) -> Result<Self, InvertedRange> {
        if first > last { Err(InvertedRange { first, last }) } else { Ok(Self { first, last }) }
    }

    /// First value.
    #[must_use]
    pub const fn first(self) -> u16 {
        self.first
    }

    /// Last value.
    #[must_use]
    pub const fn last(self) -> u16 {
        self.last
    }
}

impl TryFrom<(u16, u16)> for Range16 {
    type Error = InvertedRange;

    fn try_from((first, last): (u16, u16)) -> Result<Self, InvertedRange> {
        Self::new(first, last)
    }
}

impl From<Range16> for (u16, u16) {
    fn from(range: Range16) -> Self {
        (range.first, range.last)
    }
}

/// Which packets. Every field that is open matches all of them; source and destination are those
/// of the packet, whatever its direction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Selector {
    /// Upstream or downstream; open: both.
    #[serde(with = "direction")]
    pub direction: Option<Direction>,
    /// IP protocol number.
    pub protocol: Option<u8>,
    /// Source prefix.
    pub source: Option<IpNet>,
    /// Destination prefix.
    pub destination: Option<IpNet>,
    /// Source ports; needs no protocol, but matches only those that have ports.
    pub source_ports: Option<Range16>,
    /// Destination ports, likewise.
    pub destination_ports: Option<Range16>,
    /// Differentiated services code point, 0 to 63.
    pub dscp: Option<u8>,
    /// IP length in bytes.
    pub lengths: Option<Range16>,
}

/// Why something is no selector. Every variant names the field and the value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// A word that has no place in a selector.
    #[error("`{word}` is not understood; expected {EXPECTED}{}", suggestion.as_ref().map(|word| format!(" (did you mean `{word}`?)")).unwrap_or_default())]
    UnknownWord {
        /// The word.
        word: String,
        /// A word that is close to it.
        suggestion: Option<&'static str>,
    },
    /// A field is given a second time.
    #[error("{field}: `{value}` comes after the {field} was already given")]
    Twice {
        /// The field.
        field: &'static str,
        /// Its second value.
        value: String,
    },
    /// The text ends, or goes on with something else, where a value is due.
    #[error("{field}: a value is missing behind `{after}`; expected {expected}")]
    Missing {
        /// The field.
        field: &'static str,
        /// The word it should follow.
        after: String,
        /// What may stand there.
        expected: &'static str,
    },
    /// No prefix.
    #[error(
        "{field}: `{value}` is not an address or prefix; expected 192.0.2.0/24, 192.0.2.7:443, [2001:db8::/32]:443 or :443"
    )]
    NotAPrefix {
        /// The field.
        field: &'static str,
        /// What stands there.
        value: String,
    },
    /// Bits are set behind the prefix length.
    #[error("{field}: `{value}` has bits set behind its prefix length; did you mean {meant}?")]
    HostBits {
        /// The field.
        field: &'static str,
        /// What stands there.
        value: IpNet,
        /// The prefix without them.
        meant: IpNet,
    },
    /// An IPv4 address in IPv6 dress, which no packet carries on the wire.
    #[error(
        "{field}: `{value}` is an IPv4 address in IPv6 form, which no packet carries; write the IPv4 address"
    )]
    Mapped {
        /// The field.
        field: &'static str,
        /// What stands there.
        value: IpNet,
    },
    /// No port, range of ports or range of lengths.
    #[error("{field}: `{value}` is not a number or range; expected {expected}")]
    NotARange {
        /// The field.
        field: &'static str,
        /// What stands there.
        value: String,
        /// What may stand there.
        expected: &'static str,
    },
    /// The first value is above the last.
    #[error("{field}: {reason}")]
    Inverted {
        /// The field.
        field: &'static str,
        /// Which range.
        #[source]
        reason: InvertedRange,
    },
    /// A range that no packet is in.
    #[error("{field}: no packet is in the range `{value}`; expected {expected}")]
    Nothing {
        /// The field.
        field: &'static str,
        /// The range.
        value: String,
        /// What may stand there.
        expected: &'static str,
    },
    /// Source and destination are of different families.
    #[error(
        "destination: `{destination}` can't go with the source `{source_prefix}`: one is IPv4, the other IPv6"
    )]
    Families {
        /// The source.
        source_prefix: IpNet,
        /// The destination.
        destination: IpNet,
    },
    /// The protocol is of the other family than the addresses.
    #[error("protocol: `{protocol}` is not carried between the addresses `{prefix}`; use {instead}")]
    FamilyOfProtocol {
        /// Name of the protocol.
        protocol: &'static str,
        /// A prefix of the other family.
        prefix: IpNet,
        /// Its counterpart.
        instead: &'static str,
    },
    /// Ports with a protocol that has none.
    #[error(
        "{field}: `{value}` can't go with protocol {protocol}, which has no ports; expected tcp, udp, sctp, dccp, udplite or no protocol"
    )]
    NoPorts {
        /// The field.
        field: &'static str,
        /// The ports.
        value: String,
        /// The protocol.
        protocol: String,
    },
    /// No code point.
    #[error("dscp: {0}")]
    Dscp(#[from] dscp::DscpError),
    /// A direction beside `between`, or `between` where one selector is wanted.
    #[error("direction: `{value}` can't stand here: `between` names both directions{hint}")]
    BothDirections {
        /// What stands there.
        value: String,
        /// What to do.
        hint: &'static str,
    },
}

const EXPECTED: &str = "up, down, a protocol, from, to, between, dscp, length or any";

impl SelectorError {
    /// The field of the selector that is wrong.
    #[must_use]
    pub const fn field(&self) -> &'static str {
        match self {
            Self::UnknownWord { .. } => "selector",
            Self::Twice { field, .. }
            | Self::Missing { field, .. }
            | Self::NotAPrefix { field, .. }
            | Self::HostBits { field, .. }
            | Self::Mapped { field, .. }
            | Self::NotARange { field, .. }
            | Self::Inverted { field, .. }
            | Self::Nothing { field, .. }
            | Self::NoPorts { field, .. } => field,
            Self::Families { .. } => "destination",
            Self::FamilyOfProtocol { .. } => "protocol",
            Self::Dscp(_) => "dscp",
            Self::BothDirections { .. } => "direction",
        }
    }

    /// What stands there.
    #[must_use]
    pub fn value(&self) -> String {
        match self {
            Self::UnknownWord { word, .. } => word.clone(),
            Self::Missing { after, .. } => after.clone(),
            Self::HostBits { value, .. } | Self::Mapped { value, .. } => value.to_string(),
            Self::Inverted { reason, .. } => format!("{}-{}", reason.first, reason.last),
            Self::Families { destination, .. } => destination.to_string(),
            Self::FamilyOfProtocol { protocol, .. } => (*protocol).to_owned(),
            Self::Dscp(error) => error.0.clone(),
            Self::Twice { value, .. }
            | Self::NotAPrefix { value, .. }
            | Self::NotARange { value, .. }
            | Self::Nothing { value, .. }
            | Self::NoPorts { value, .. }
            | Self::BothDirections { value, .. } => value.clone(),
        }
    }
}

impl Selector {
    /// Tells whether packets of `direction` can match.
    #[must_use]
    pub fn covers(&self, direction: Direction) -> bool {
        self.direction.is_none_or(|own| own == direction)
    }

    /// The subscriber's side of packets of `direction`; none: any address.
    #[must_use]
    pub const fn near(&self, direction: Direction) -> Option<IpNet> {
        match direction {
            Direction::Upstream => self.source,
            Direction::Downstream => self.destination,
        }
    }

    /// The side across the network of packets of `direction`; none: any address.
    #[must_use]
    pub const fn far(&self, direction: Direction) -> Option<IpNet> {
        match direction {
            Direction::Upstream => self.destination,
            Direction::Downstream => self.source,
        }
    }

    /// Families of the packets that can match.
    #[must_use]
    pub const fn families(&self) -> &'static [Family] {
        match (self.source, self.destination, self.protocol) {
            (Some(IpNet::V4(_)), ..) | (_, Some(IpNet::V4(_)), _) | (_, _, Some(ICMP)) => &[Family::V4],
            (Some(IpNet::V6(_)), ..) | (_, Some(IpNet::V6(_)), _) | (_, _, Some(ICMP6)) => &[Family::V6],
            _ => &[Family::V4, Family::V6],
        }
    }

    /// Checks that some packet can match, and that the selector says what it seems to say.
    ///
    /// # Errors
    /// Where it does not.
    pub fn check(&self) -> Result<(), SelectorError> {
        for (field, prefix) in [("source", self.source), ("destination", self.destination)] {
            if let Some(prefix) = prefix {
                check_prefix(field, prefix)?;
            }
        }
        if let (Some(source), Some(destination)) = (self.source, self.destination)
            && source.addr().is_ipv4() != destination.addr().is_ipv4()
        {
            return Err(SelectorError::Families { source_prefix: source, destination });
        }
        let wrong = |v4: bool| {
            self.source.into_iter().chain(self.destination).find(|prefix| prefix.addr().is_ipv4() == v4)
        };
        if let (Some(ICMP), Some(prefix)) = (self.protocol, wrong(false)) {
            return Err(SelectorError::FamilyOfProtocol { protocol: "icmp", prefix, instead: "icmp6" });
        }
        if let (Some(ICMP6), Some(prefix)) = (self.protocol, wrong(true)) {
            return Err(SelectorError::FamilyOfProtocol { protocol: "icmp6", prefix, instead: "icmp" });
        }
        for (field, ports) in
            [("source_ports", self.source_ports), ("destination_ports", self.destination_ports)]
        {
            let Some(ports) = ports else { continue };
            if ports.last() == 0 {
                let expected = "ports 1 to 65535";
                return Err(SelectorError::Nothing { field, value: ports.to_string(), expected });
            }
            if let Some(protocol) = self.protocol.filter(|protocol| !has_ports(*protocol)) {
                let (value, protocol) = (ports.to_string(), grammar::protocol_name(protocol));
                return Err(SelectorError::NoPorts { field, value, protocol });
            }
        }
        if let Some(dscp) = self.dscp.filter(|dscp| *dscp > dscp::MAX) {
            return Err(dscp::DscpError(dscp.to_string()).into());
        }
        if let Some(lengths) = self.lengths.filter(|lengths| lengths.last() < SHORTEST_PACKET) {
            let expected = "IP lengths from 20 bytes on";
            return Err(SelectorError::Nothing { field: "length", value: lengths.to_string(), expected });
        }
        Ok(())
    }
}

/// Checks that a prefix says what it seems to say: no bits behind its length, no IPv4 in IPv6 form.
///
/// # Errors
/// Where it does not; the error names `field`.
pub fn check_prefix(field: &'static str, prefix: IpNet) -> Result<(), SelectorError> {
    if prefix.trunc() != prefix {
        return Err(SelectorError::HostBits { field, value: prefix, meant: prefix.trunc() });
    }
    if let IpAddr::V6(address) = prefix.addr()
        && prefix.prefix_len() >= 96
        && address.to_ipv4_mapped().is_some()
    {
        return Err(SelectorError::Mapped { field, value: prefix });
    }
    Ok(())
}

impl<'de> Deserialize<'de> for Selector {
    /// Reads the members of the JSON form, or the text form.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Selector;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a selector, as an object or a text like `down udp from 198.51.100.0/24`")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Selector, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Selector, A::Error> {
                let fields = Fields::deserialize(serde::de::value::MapAccessDeserializer::new(map))?;
                let selector = Selector::from(fields);
                selector.check().map_err(serde::de::Error::custom)?;
                Ok(selector)
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

/// The members of the JSON form, not checked.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Fields {
    #[serde(with = "direction")]
    direction: Option<Direction>,
    protocol: Option<u8>,
    source: Option<IpNet>,
    destination: Option<IpNet>,
    source_ports: Option<Range16>,
    destination_ports: Option<Range16>,
    dscp: Option<u8>,
    lengths: Option<Range16>,
}

impl From<Fields> for Selector {
    fn from(fields: Fields) -> Self {
        Self {
            direction: fields.direction,
            protocol: fields.protocol,
            source: fields.source,
            destination: fields.destination,
            source_ports: fields.source_ports,
            destination_ports: fields.destination_ports,
            dscp: fields.dscp,
            lengths: fields.lengths,
        }
    }
}

/// A direction by name.
mod direction {
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Direction;

    pub(super) fn serialize<S: Serializer>(
        value: &Option<Direction>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            None => serializer.serialize_none(),
            Some(Direction::Upstream) => serializer.serialize_some("up"),
            Some(Direction::Downstream) => serializer.serialize_some("down"),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Direction>, D::Error> {
        match Option::<String>::deserialize(deserializer)?.as_deref() {
            None => Ok(None),
            Some("up") => Ok(Some(Direction::Upstream)),
            Some("down") => Ok(Some(Direction::Downstream)),
            Some(other) => Err(serde::de::Error::unknown_variant(other, &["up", "down"])),
        }
    }
}
