//! Refusals: what is told to an asker who does not get what was asked.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::LevelRequest;
use crate::domain::Name;

/// What kind of refusal it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// A value is wrong by itself or together with others of the request.
    Invalid,
    /// Something that the request names does not exist.
    NotFound,
    /// It exists already, or is in use.
    Conflict,
    /// The profile has no allocations of such a duration.
    DurationOutOfRange,
    /// The profile may not be asked for.
    ProfileNotApplicable,
    /// The line is down.
    SessionDown,
    /// The provider may not claim these addresses.
    Forbidden,
    /// More than is left, or than this network can promise.
    InsufficientCapacity,
    /// The kernel's maps, which are of a fixed size, are full.
    InsufficientSlots,
    /// A packet might have to be compared with more selectors than the configuration allows.
    TooManyChecks,
}

impl RefusalCode {
    /// All of them with their names.
    pub const NAMES: [(Self, &'static str); 10] = [
        (Self::Invalid, "invalid"),
        (Self::NotFound, "not_found"),
        (Self::Conflict, "conflict"),
        (Self::DurationOutOfRange, "duration_out_of_range"),
        (Self::ProfileNotApplicable, "profile_not_applicable"),
        (Self::SessionDown, "session_down"),
        (Self::Forbidden, "forbidden"),
        (Self::InsufficientCapacity, "insufficient_capacity"),
        (Self::InsufficientSlots, "insufficient_slots"),
        (Self::TooManyChecks, "too_many_checks"),
    ];

    /// The name, as it stands in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(code, _)| *code == self).map_or("", |(_, name)| name)
    }

    /// The code of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(_, known)| *known == name).map(|(code, _)| *code)
    }
}

/// A refusal, naming the field and the value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refusal {
    /// What kind it is.
    pub code: RefusalCode,
    /// The field of the command, as in `level.guaranteed.down` or `selectors[2].source`.
    pub field: Option<String>,
    /// What stands there.
    pub value: Option<String>,
    /// The whole story in one line.
    pub message: String,
    /// The best that could be had instead, as it would have to be asked for.
    #[serde(default)]
    pub counter_offer: Option<Box<LevelRequest>>,
}

impl std::error::Error for Refusal {}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Refusal {
    /// A refusal of what stands in `field`.
    pub(super) fn new(
        code: RefusalCode,
        field: impl Into<String>,
        value: impl fmt::Display,
        message: String,
    ) -> Self {
        Self { code, field: Some(field.into()), value: Some(value.to_string()), message, counter_offer: None }
    }

    /// A wrong value: the message is `field: value` and the reason.
    pub(super) fn invalid(field: impl Into<String>, value: impl fmt::Display, reason: &str) -> Self {
        let field = field.into();
        let message = format!("{field}: {value} {reason}");
        Self::new(RefusalCode::Invalid, field, value, message)
    }

    /// A name that is not known, with the one that was perhaps meant.
    pub(super) fn unknown(
        field: &str,
        what: &str,
        name: &Name,
        known: &mut dyn Iterator<Item = &Name>,
    ) -> Self {
        let meant = known
            .map(Name::as_str)
            .map(|known| (strsim::osa_distance(known, name.as_str()), known))
            .filter(|(edits, known)| *edits <= 2 && *edits < known.len().min(name.as_str().len()))
            .min()
            .map(|(_, known)| format!(" (did you mean {known}?)"))
            .unwrap_or_default();
        Self::new(RefusalCode::NotFound, field, name, format!("{field}: there is no {what} {name}{meant}"))
    }
}
