//! The objects of the API beyond those of the domain, as they stand in JSON.

use std::path::PathBuf;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::domain::subscriber::Report;
use crate::domain::{
    Allocation, BitsPerSecond, Contract, Directed, DurationRange, KeyId, Level, Name, ProfileStatus, Selector,
};
use crate::manager::report::{Explanation, GatewayStatus};
use crate::manager::{LevelRequest, LineSide};
use crate::source::SourcesStatus;

/// Several objects.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Listing<T> {
    /// In the order of their names or numbers.
    pub items: Vec<T>,
}

/// What came of a command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome<T> {
    /// The object as it was written; after a removal, as it was before.
    pub result: T,
    /// What the asker should know, though the command was carried out.
    pub warnings: Vec<String>,
    /// Nothing was changed: this is what would have come of it.
    pub dry_run: bool,
}

/// An application to register, below its provider.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewApplication {
    /// Unique among the provider's applications.
    pub name: Name,
    /// What it may have of what its provider has.
    #[serde(default)]
    pub contract: Contract,
}

/// Another contract.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContractChange {
    /// What the provider or application may have from now on.
    pub contract: Contract,
    /// What it had when the asker looked: the change is refused where somebody else changed it meanwhile.
    /// Left out: whatever it had.
    #[serde(default)]
    pub was: Option<Contract>,
}

/// What a source tells, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reports {
    /// 10,000 at most.
    pub reports: Vec<Report>,
}

/// A segment to write; its name is in the path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewSegment {
    /// What it carries.
    pub capacity: Directed<BitsPerSecond>,
    /// What of it is not promised to anybody.
    #[serde(default)]
    pub rest: Directed<Option<BitsPerSecond>>,
}

/// A segment, and what is promised on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentReport {
    /// Unique among segments.
    pub name: Name,
    /// What it carries.
    pub capacity: Directed<BitsPerSecond>,
    /// What of it is not promised to anybody.
    pub rest: Directed<Option<BitsPerSecond>>,
    /// What is guaranteed on all lines behind it.
    pub promised: Directed<BitsPerSecond>,
}

/// A named level to write; its name is in the path.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewProfile {
    /// The level that the name stands for.
    pub level: Level,
    /// Whether new requests may name it.
    #[serde(default)]
    pub status: ProfileStatus,
    /// How long an allocation that names it may last, extensions counted.
    #[serde(default)]
    pub duration: DurationRange,
}

/// An API key to make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewApiKey {
    /// Whose it is.
    pub provider: Name,
    /// The one application of the provider that it is for; left out: for all.
    #[serde(default)]
    pub application: Option<Name>,
    /// With it nothing can be changed.
    #[serde(default)]
    pub read_only: bool,
    /// Until when it is taken; left out: until it is removed.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
}

/// An API key, without what it is recognised by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKeyReport {
    /// Its number.
    pub id: KeyId,
    /// Whose it is.
    pub provider: Name,
    /// The one application of the provider that it is for; none: for all.
    pub application: Option<Name>,
    /// With it nothing can be changed.
    pub read_only: bool,
    /// When it was made.
    pub created_at: Timestamp,
    /// Until when it is taken; none: until it is removed.
    pub expires_at: Option<Timestamp>,
    /// The key itself: only in the answer to the request that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

/// A request of a provider for an allocation: that of the operator's API, but for what follows from who asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnRequest {
    /// Left out: the provider that asks, which is the only one that may stand here.
    #[serde(default)]
    pub provider: Option<Name>,
    /// For which of its applications; left out: for the one that the client is for, if it is for one.
    #[serde(default)]
    pub application: Option<Name>,
    /// For which packets.
    pub selectors: Vec<Selector>,
    /// The profile that what `level` leaves open is taken from.
    #[serde(default)]
    pub profile: Option<Name>,
    /// What is asked.
    #[serde(default)]
    pub level: LevelRequest,
    /// Among allocations that match one packet the highest wins.
    #[serde(default)]
    pub precedence: u16,
    /// For how long; left out: until revoked.
    #[serde(default)]
    pub duration: Option<SignedDuration>,
}

/// A line that carries something of a provider's, as that provider sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineReport {
    /// Its name.
    pub name: Name,
    /// Since when it is down; none: it is up.
    pub down_since: Option<Timestamp>,
}

/// By how much the end of an allocation is put off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extension {
    /// As text: `"30m"`, `"PT30M"`.
    pub by: SignedDuration,
}

/// A packet to explain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExplainRequest {
    /// `up` or `down`.
    pub direction: DirectionName,
    /// The packet, two hexadecimal digits a byte.
    pub packet: String,
    /// The packet begins at its IP header; else at its Ethernet header.
    #[serde(default)]
    pub layer3: bool,
}

/// A direction by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DirectionName {
    /// From the subscriber.
    Up,
    /// To the subscriber.
    Down,
}

impl From<DirectionName> for crate::domain::Direction {
    fn from(name: DirectionName) -> Self {
        match name {
            DirectionName::Up => Self::Upstream,
            DirectionName::Down => Self::Downstream,
        }
    }
}

/// Why a packet is treated as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explained {
    /// What the loaded program says.
    pub explanation: Explanation,
    /// The allocation that matched.
    pub allocation: Option<Allocation>,
    /// The line that the packet's subscriber is on.
    pub line: Option<Name>,
}

/// The daemon and its gateway as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Of qosd.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// When it started.
    pub started_at: Timestamp,
    /// Directory of the database.
    pub state_dir: PathBuf,
    /// Directory of pinned links and maps.
    pub bpffs_dir: PathBuf,
    /// On which end of the lines the gateway stands.
    pub line_side: LineSide,
    /// Capacity of the link.
    pub link: Directed<BitsPerSecond>,
    /// Requests must name the address of a session.
    pub require_session: bool,
    /// How many of each there are.
    pub counted: Counted,
    /// When the kernel was last found equal to the state, or made so.
    pub reconciled_at: Option<Timestamp>,
    /// Why it could not be made so since.
    pub reconcile_error: Option<String>,
    /// The gateway.
    pub gateway: GatewayStatus,
    /// What tells of lines.
    #[serde(default)]
    pub sources: SourcesStatus,
}

/// How many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// Providers.
    pub providers: usize,
    /// Applications of all providers.
    pub applications: usize,
    /// Sessions.
    pub sessions: usize,
    /// Profiles.
    pub profiles: usize,
    /// Allocations that are available.
    pub allocations: usize,
}

/// What is answered to a request that was not carried out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ErrorAnswer {
    /// What is wrong.
    pub error: ErrorBody,
}

/// What is wrong with a request, or went wrong with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// One word that programs tell cases by; see `docs/api.md`.
    pub code: String,
    /// What was wrong, with what, and what to do.
    pub message: String,
    /// The field of the request that it is about, such as `level.maximum.down`.
    pub field: Option<String>,
    /// The value of that field.
    pub value: Option<String>,
    /// The best level that could be had instead, as it would have to be asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counter_offer: Option<Box<LevelRequest>>,
}
