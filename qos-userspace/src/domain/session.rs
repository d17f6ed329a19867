//! Subscriber sessions: lines that are up, or were until a moment ago.

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::LinkLayer;
use super::level::Directed;
use super::name::Name;
use super::units::BitsPerSecond;

/// Longest name of a BRAS, in characters: that of a host (RFC 1035).
pub const LONGEST_BRAS: usize = 253;

/// A line, and who is behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Session {
    /// Unique among sessions.
    pub name: Name,
    /// Prefixes of the subscriber; no two sessions share an address.
    pub addresses: Vec<IpNet>,
    /// Speed of the line, in the line's own framing.
    pub rate: Directed<BitsPerSecond>,
    /// How the line frames packets.
    #[serde(with = "link_layer")]
    pub link_layer: LinkLayer,
    /// Bytes above the IP length that a packet takes on the line, −64 to 256.
    pub overhead: i16,
    /// Delay of the line itself, one way, in µs.
    pub delay_us: u32,
    /// Share of packets that the line loses, as measured; 0 to 1, in millionths.
    pub loss_ppm: u32,
    /// Segments that it is behind, 8 at most.
    #[serde(default)]
    pub segments: Vec<Name>,
    /// The BRAS that it ends at, 1 to 253 characters; none: not known.
    #[serde(default)]
    pub bras: Option<String>,
    /// What reports it; none: an operator named it, and no sign of life is expected.
    #[serde(default)]
    pub source: Option<Name>,
    /// When its source last said that it is up.
    #[serde(default)]
    pub seen_at: Option<Timestamp>,
    /// Since when it is down; none: it is up.
    #[serde(default)]
    pub down_since: Option<Timestamp>,
    /// It came into service with a grant, and goes when its place is needed and it carries nothing.
    #[serde(default)]
    pub on_demand: bool,
    /// Index of its class numbers, 1 to 10,240.
    pub slot: u16,
}

impl Session {
    /// Whether packets are treated alike on both: they differ in nothing but what is known of their life.
    #[must_use]
    pub fn is_same_line(&self, other: &Self) -> bool {
        let Self { bras, source, seen_at, down_since, on_demand, .. } = other.clone();
        Self { bras, source, seen_at, down_since, on_demand, ..self.clone() } == *other
    }
}

/// A link layer by name.
pub mod link_layer {
    use serde::{Deserialize, Deserializer, Serializer};

    use super::LinkLayer;

    /// The name of each link layer.
    pub const NAMES: [(LinkLayer, &str); 3] =
        [(LinkLayer::Ethernet, "ethernet"), (LinkLayer::Atm, "atm"), (LinkLayer::Ptm, "ptm")];

    /// The name of a link layer.
    #[must_use]
    pub fn name(layer: LinkLayer) -> &'static str {
        NAMES.iter().find(|(known, _)| *known == layer).map_or("", |(_, name)| name)
    }

    /// The link layer of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<LinkLayer> {
        NAMES.iter().find(|(_, known)| *known == name).map(|(layer, _)| *layer)
    }

    /// Writes the name.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(layer: &LinkLayer, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(name(*layer))
    }

    /// Reads a name.
    ///
    /// # Errors
    /// Where the name is not known.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<LinkLayer, D::Error> {
        let text = String::deserialize(deserializer)?;
        named(&text).ok_or_else(|| serde::de::Error::unknown_variant(&text, &["ethernet", "atm", "ptm"]))
    }
}
