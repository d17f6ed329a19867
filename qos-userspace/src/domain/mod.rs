//! Providers, applications, sessions, levels and allocations as plain types.
//!
//! What comes from outside becomes one of these once, at the edge, or is refused there with the
//! field and the value; nothing behind the edge checks again. No IO, no kernel, no store.

pub mod allocation;
pub mod contract;
pub mod dscp;
pub mod duration;
pub mod key;
pub mod level;
pub mod name;
pub mod profile;
pub mod provider;
pub mod segment;
pub mod selector;
pub mod session;
pub mod subscriber;
pub mod units;

pub use allocation::{Allocation, AllocationId, DelayBound, Status};
pub use contract::Contract;
pub use key::{ApiKey, KeyHash, KeyId};
pub use level::{Directed, Enforcement, Level, SMALLEST_IPV6_MTU, SMALLEST_MTU};
pub use name::Name;
pub use profile::{DurationRange, Profile, ProfileStatus};
pub use provider::{Application, Provider, ProviderKind};
pub use segment::Segment;
pub use selector::Selector;
pub use session::Session;
pub use subscriber::Subscriber;
pub use units::{BitsPerSecond, ByteCount};

pub use qos_common::classify::Direction;
pub use qos_common::length::LinkLayer;
