//! Flow selectors: which packets an allocation is for.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::Direction;

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
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
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
