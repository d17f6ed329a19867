//! The kernel side as userspace sees it: programs, maps and schedulers, kept equal to the state.

use std::path::PathBuf;

use serde::Serialize;

use crate::domain::BitsPerSecond;
use crate::manager::LineSide;

pub mod nic;
pub mod report;
pub mod scheduler;

/// Which way an interface looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Towards the subscribers.
    Lan,
    /// Towards the providers.
    Wan,
}

/// An interface that traffic is held to its levels on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InterfaceConfig {
    /// Its name.
    pub name: String,
    /// Which way it looks.
    pub role: Role,
    /// What it can send.
    pub capacity: BitsPerSecond,
}

/// What the gateway has to know beyond the state.
#[derive(Clone, Debug, PartialEq)]
pub struct GatewayConfig {
    /// At least one of each role, no name twice.
    pub interfaces: Vec<InterfaceConfig>,
    /// Directory on a bpffs for links and maps.
    pub bpffs_dir: PathBuf,
    /// Say what would be done, and do nothing to packets.
    pub observe: bool,
    /// Run of at least 18 bits of `skb->mark` that is ours.
    pub mark_mask: u32,
    /// On which end of the lines the gateway stands.
    pub line_side: LineSide,
    /// Share of a line's speed that is used in the direction out of the line, above 0 up to 1.
    pub soft_share: f64,
}
