//! Profiles: named levels, and how long they may be had.

use jiff::SignedDuration;
use serde::{Deserialize, Serialize};

use super::level::Level;
use super::name::Name;

/// A named level (CAMARA QoS profile).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Unique among profiles.
    pub name: Name,
    /// The level it stands for.
    pub level: Level,
    /// Whether new requests may name it.
    #[serde(default)]
    pub status: ProfileStatus,
    /// How long an allocation that names it may last, extensions counted.
    #[serde(default)]
    pub duration: DurationRange,
}

/// Whether a profile may be asked for (CAMARA `QosProfileStatusEnum`). What was granted with it stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProfileStatus {
    /// It may.
    #[default]
    Active,
    /// Not now.
    Inactive,
    /// Not any more.
    Deprecated,
}

impl ProfileStatus {
    /// All of them by name.
    pub const NAMES: [(Self, &str); 3] =
        [(Self::Active, "active"), (Self::Inactive, "inactive"), (Self::Deprecated, "deprecated")];

    /// Its name, as it stands in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(status, _)| *status == self).map_or("", |(_, name)| name)
    }

    /// The status of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(_, known)| *known == name).map(|(status, _)| *status)
    }
}

/// Durations from the shortest to the longest; an end that is none is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DurationRange {
    /// The shortest.
    pub shortest: Option<SignedDuration>,
    /// The longest. Where there is one a request must name its duration.
    pub longest: Option<SignedDuration>,
}
