//! Providers and their applications.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::contract::Contract;
use super::name::Name;

/// What a provider is, and so which side of a flow is its own to claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProviderKind {
    /// Serves an application from its own networks: claims the far side of a flow.
    Application,
    /// Serves subscribers over this network: claims the near side, the subscribers' addresses.
    Network,
}

/// Who asks for levels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provider {
    /// Unique among providers.
    pub name: Name,
    /// Application or network service provider.
    pub kind: ProviderKind,
    /// Prefixes that its selectors may name on its side of a flow.
    pub networks: Vec<IpNet>,
    /// What it may have.
    pub contract: Contract,
    /// Index in the kernel's map, 1 to 1,023.
    pub slot: u16,
}

/// A program of a provider, which may have levels of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Application {
    /// The provider whose it is.
    pub provider: Name,
    /// Unique among the provider's applications.
    pub name: Name,
    /// What it may have of what its provider has.
    pub contract: Contract,
    /// Index in the kernel's map, 1 to 4,095.
    pub slot: u16,
}
