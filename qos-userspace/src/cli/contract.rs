//! The arguments of a contract, which providers and applications share, and its print.

use std::str::FromStr;

use clap::Args;

use super::output::{joined, or_dash};
use crate::domain::{BitsPerSecond, Contract, Directed, Name};

/// A value, or `none`, which opens what was limited before.
#[derive(Clone, Debug)]
pub(super) struct Limit<T>(Option<T>);

impl<T: FromStr> FromStr for Limit<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        if text == "none" { Ok(Self(None)) } else { text.parse().map(|value| Self(Some(value))) }
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Contract")]
pub(super) struct ContractArgs {
    /// Most that all its allocations together may be guaranteed to subscribers; none: no limit
    #[arg(long, value_name = "RATE")]
    guaranteed_down: Option<Limit<BitsPerSecond>>,
    /// Most that all its allocations together may be guaranteed from subscribers; none: no limit
    #[arg(long, value_name = "RATE")]
    guaranteed_up: Option<Limit<BitsPerSecond>>,
    /// What all its allocations together may carry to subscribers; none: no limit
    #[arg(long, value_name = "RATE")]
    max_down: Option<Limit<BitsPerSecond>>,
    /// What all its allocations together may carry from subscribers; none: no limit
    #[arg(long, value_name = "RATE")]
    max_up: Option<Limit<BitsPerSecond>>,
    /// The best priority that it may ask for: 0 is the best of all
    #[arg(long, value_name = "0-7", value_parser = clap::value_parser!(u8).range(0..=7))]
    best_priority: Option<u8>,
    /// The only profiles that it may ask for, with commas between them; all: any level
    #[arg(long, value_name = "NAMES", value_parser = profiles)]
    profiles: Option<Limit<Vec<Name>>>,
    /// Most allocations at once; none: no limit
    #[arg(long, value_name = "N")]
    allocations: Option<Limit<u32>>,
}

fn profiles(text: &str) -> Result<Limit<Vec<Name>>, String> {
    if text == "all" {
        return Ok(Limit(None));
    }
    let names = text.split(',').map(|name| name.trim().parse().map_err(|error| format!("{error}")));
    names.collect::<Result<_, _>>().map(|names| Limit(Some(names)))
}

impl ContractArgs {
    /// `before` with what is said.
    pub(super) fn applied_to(self, before: &Contract) -> Contract {
        let rate = |said: Option<Limit<BitsPerSecond>>, before: Option<BitsPerSecond>| match said {
            Some(Limit(said)) => said,
            None => before,
        };
        Contract {
            guaranteed: Directed {
                up: rate(self.guaranteed_up, before.guaranteed.up),
                down: rate(self.guaranteed_down, before.guaranteed.down),
            },
            maximum: Directed {
                up: rate(self.max_up, before.maximum.up),
                down: rate(self.max_down, before.maximum.down),
            },
            best_priority: self.best_priority.unwrap_or(before.best_priority),
            profiles: match self.profiles {
                Some(Limit(names)) => names.map(|names| names.into_iter().collect()),
                None => before.profiles.clone(),
            },
            allocations: match self.allocations {
                Some(Limit(said)) => said,
                None => before.allocations,
            },
        }
    }
}

/// A contract as pairs of names and values.
pub(super) fn pairs(contract: &Contract) -> Vec<(&'static str, Option<String>)> {
    let text = |rate: Option<BitsPerSecond>| rate.map(|rate| rate.to_string());
    vec![
        ("guaranteed down", text(contract.guaranteed.down)),
        ("maximum down", text(contract.maximum.down)),
        ("guaranteed up", text(contract.guaranteed.up)),
        ("maximum up", text(contract.maximum.up)),
        ("best priority", (contract.best_priority > 0).then(|| contract.best_priority.to_string())),
        ("profiles", contract.profiles.as_ref().map(|names| joined(names, ", "))),
        ("allocations", contract.allocations.map(|most| format!("{most} at most"))),
    ]
}

/// Header of a contract's cells in tables.
pub(super) const HEADER: [&str; 7] =
    ["GUARANTEED DOWN", "MAX DOWN", "GUARANTEED UP", "MAX UP", "BEST PRIORITY", "PROFILES", "ALLOCATIONS"];

/// A contract as cells.
pub(super) fn cells(contract: &Contract) -> [String; 7] {
    [
        or_dash(contract.guaranteed.down),
        or_dash(contract.maximum.down),
        or_dash(contract.guaranteed.up),
        or_dash(contract.maximum.up),
        contract.best_priority.to_string(),
        contract.profiles.as_ref().map_or_else(|| "all".to_owned(), |names| joined(names, ", ")),
        or_dash(contract.allocations),
    ]
}
