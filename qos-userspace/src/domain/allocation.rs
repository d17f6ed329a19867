//! Allocations: granted requests.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Direction;
use super::level::{Directed, Enforcement, Level};
use super::name::Name;
use super::selector::Selector;

/// Number of an allocation, from 1, never used twice. A lower one is older.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AllocationId(pub u64);

impl fmt::Display for AllocationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where an allocation stands (CAMARA QosStatus).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Asked for, not decided.
    Requested,
    /// Granted and enforced.
    Available,
    /// Ended; the reason says how.
    Unavailable,
}

/// A granted request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Allocation {
    /// Its number.
    pub id: AllocationId,
    /// Who asked.
    pub provider: Name,
    /// The provider's application, where it named one.
    pub application: Option<Name>,
    /// The profile the level was taken from, where one was named.
    pub profile: Option<Name>,
    /// Which packets, one to 4,096 selectors.
    pub selectors: Vec<Selector>,
    /// What was granted, profile resolved and defaults filled in.
    pub level: Level,
    /// Among allocations that match one packet the highest wins, then the oldest.
    pub precedence: u16,
    /// The session whose line carries it; none: any line, under the link.
    pub session: Option<Name>,
    /// Delay that in-profile packets stay within, computed at admission.
    #[serde(default)]
    pub delay_bound: Directed<Option<DelayBound>>,
    /// When it was granted.
    pub granted_at: Timestamp,
    /// When it ends; none: with its revocation.
    pub expires_at: Option<Timestamp>,
    /// When it ended; none: it has not.
    #[serde(default)]
    pub ended_at: Option<Timestamp>,
    /// Where it stands.
    pub status: Status,
    /// Why it stands there: how it ended.
    pub reason: Option<String>,
    /// Index in the kernel's maps, 1 to 65,535.
    pub slot: u16,
    /// Place among the class numbers at egress, 1 to 16,383; none: it needs none.
    #[serde(default)]
    pub class: Option<u16>,
}

/// The longest delay that in-profile packets may meet between gateway and subscriber, and its parts, in µs. Each
/// is rounded up for itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DelayBound {
    /// All of it.
    pub whole_us: u32,
    /// The delay of the line itself, which is always there.
    pub line_us: u32,
    /// Behind what else the line carries.
    pub line_queue_us: u32,
    /// Behind what else the link carries.
    pub link_queue_us: u32,
}

impl DelayBound {
    /// Most by which the delays of two packets may differ, in µs.
    #[must_use]
    pub const fn jitter_us(&self) -> u32 {
        self.whole_us.saturating_sub(self.line_us)
    }
}

impl Allocation {
    /// Tells whether packets of `direction` can match any of the selectors.
    #[must_use]
    pub fn covers(&self, direction: Direction) -> bool {
        self.selectors.iter().any(|selector| selector.covers(direction))
    }

    /// Tells whether traffic of `direction` has a class of its own at egress. What is policed and
    /// has no guarantee shares its line's rest.
    #[must_use]
    pub fn has_class(&self, direction: Direction) -> bool {
        self.covers(direction)
            && (self.level.enforcement == Enforcement::Shape
                || self.level.guaranteed.get(direction).is_some())
    }

    /// Tells whether traffic of any direction has a class of its own at egress.
    #[must_use]
    pub fn needs_class(&self) -> bool {
        Direction::BOTH.into_iter().any(|direction| self.has_class(direction))
    }

    /// The allocation as it is when it has ended.
    #[must_use]
    pub fn ended(&self, at: Timestamp, reason: &str) -> Self {
        Self {
            status: Status::Unavailable,
            reason: Some(reason.to_owned()),
            ended_at: Some(at),
            ..self.clone()
        }
    }
}
