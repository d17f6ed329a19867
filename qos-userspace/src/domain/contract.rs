//! Contracts: what a provider, or one of its applications, may have.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::level::Directed;
use super::name::Name;
use super::units::BitsPerSecond;

/// What a provider or one of its applications may have. What is not said is open.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Contract {
    /// Most that all its allocations together may be guaranteed.
    pub guaranteed: Directed<Option<BitsPerSecond>>,
    /// Most that all its allocations together may carry, and so be guaranteed. A provider's traffic above it
    /// is dropped; of an application the maxima that its allocations ask for are summed.
    pub maximum: Directed<Option<BitsPerSecond>>,
    /// The best priority that its allocations may have; 0: any.
    pub best_priority: u8,
    /// The profiles that it may ask for, and nothing without one of them; none: all, and levels of its own.
    pub profiles: Option<BTreeSet<Name>>,
    /// Most allocations at once.
    pub allocations: Option<u32>,
}
