//! The kernel side as userspace sees it: programs, maps and schedulers, kept equal to the state.

mod carry;
pub mod chain;
pub mod classifier;
pub mod clsact;
pub mod flowtable;
pub mod kernel;
pub mod link;
mod maps;
pub mod memory;
pub(crate) mod netlink;
pub mod object;
pub mod port;
pub mod scheduler;
mod trace;

/// Which side of the gateway an interface is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Towards subscribers.
    Lan,
    /// Towards providers.
    Wan,
}

/// Where tc programs are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TcHooks {
    /// tcx where the kernel has it (Linux 6.6), filters on clsact elsewhere.
    #[default]
    Auto,
    /// Filters on clsact.
    Clsact,
}

/// Where XDP programs are attached to an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XdpChoice {
    /// In the driver; not at all where it can't, packets have no Ethernet header, or somebody else's
    /// program is there.
    #[default]
    Auto,
    /// In the driver.
    Native,
    /// In the stack.
    Generic,
    /// Not at all: tc ingress judges.
    Off,
}

pub use kernel::{GatewayConfig, GatewayError, InterfaceConfig, Kernel, PACKET_LENGTHS};
