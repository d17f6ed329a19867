//! Shared segments: what lines have in common between themselves and the link.

use serde::{Deserialize, Serialize};

use super::level::Directed;
use super::name::Name;
use super::units::BitsPerSecond;

/// Most segments that a line is behind.
pub const MOST_SEGMENTS: usize = 8;

/// A part of the access network that lines share: the uplink of a DSLAM or of an OLT. Sessions name theirs.
/// What is guaranteed on all their lines together fits into it; the gateway does not shape it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// Unique among segments.
    pub name: Name,
    /// What it carries.
    pub capacity: Directed<BitsPerSecond>,
    /// What of it is not promised to anybody.
    #[serde(default)]
    pub rest: Directed<Option<BitsPerSecond>>,
}

impl Segment {
    /// What may be promised in a direction.
    #[must_use]
    pub fn promisable(&self, direction: super::Direction) -> BitsPerSecond {
        let rest = self.rest.get(direction).map_or(0, |rest| rest.0);
        BitsPerSecond(self.capacity.get(direction).0.saturating_sub(rest))
    }
}
