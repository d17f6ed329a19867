//! The decision core: what is known, what is asked, what follows. Pure.
//!
//! [`decide`] reads the [`State`] and a [`Command`] and answers with a [`Decision`]: the changes to
//! write, or a refusal that names the field and the value. It does no IO and reads no clock; the
//! changes are written by a [`crate::store::Store`] in one transaction, applied to the state by
//! [`State::apply`], and carried into the kernel by a [`Gateway`].

use jiff::SignedDuration;
use serde::{Deserialize, Serialize};

use self::report::{Explanation, GatewayStatus, Statistics};
use crate::domain::{
    Allocation, AllocationId, ApiKey, Application, BitsPerSecond, Contract, Directed, Direction, KeyId,
    Level, Name, Profile, Provider, ProviderKind, Segment, Selector, Session,
};

pub mod capacity;
mod choose;
pub mod confine;
mod contract;
mod decide;
mod grant;
mod key;
mod overlap;
pub mod record;
mod refusal;
pub mod report;
mod segment;
mod session;
mod slots;
mod state;
pub mod subscriber;
#[cfg(test)]
pub(crate) mod tests;

pub use decide::decide;
pub use key::NewKey;
pub use refusal::{Refusal, RefusalCode};
pub use slots::{CLASS_SLOTS, LINE_SLOTS, SlotKind};
pub use state::State;

/// On which end of the lines the gateway stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LineSide {
    /// At the network's end: what it sends out of its LAN interfaces goes into the lines.
    #[default]
    Lan,
    /// At the subscriber's end: what it sends out of its WAN interfaces goes into the line.
    Wan,
}

/// Whether a request for which there is no room may end what was granted before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preempt {
    /// It may not.
    #[default]
    Never,
    /// It may end allocations of a later priority on the same line.
    LowerPriority,
}

/// What the network is, from the configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    /// Capacity of the link in each direction: that of the interfaces it is sent out of.
    pub link: Directed<BitsPerSecond>,
    /// Which direction goes into the lines.
    pub line_side: LineSide,
    /// Share of a line's speed that is used in the direction out of the line, 0 to 1.
    pub soft_share: f64,
    /// What the rest of a line is sure of; an eighth of the line's speed where that is less.
    pub line_rest: BitsPerSecond,
    /// What traffic on no known line is sure of; an eighth of the link's capacity where that is less.
    pub link_rest: BitsPerSecond,
    /// Largest IP packet, in bytes.
    pub mtu: u32,
    /// Rules that the classifier takes: a selector has one for each direction and family that it covers.
    pub max_rules: u32,
    /// Requests must name the address of a session.
    pub require_session: bool,
    /// Speed of a line whose source tells none.
    pub line_rate: Directed<Option<BitsPerSecond>>,
    /// Time after its last sign of life for which a session that a source reports counts as up.
    pub session_ttl: SignedDuration,
    /// Time for which what is granted on a line outlives it.
    pub session_grace: SignedDuration,
    /// Whether a request may end what was granted before.
    pub preempt: Preempt,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Command {
    /// Registers a provider.
    AddProvider(NewProvider),
    /// Removes a provider that has no allocation and no application.
    RemoveProvider {
        /// Its name.
        name: Name,
    },
    /// Registers an application of a provider.
    AddApplication {
        /// Whose it is.
        provider: Name,
        /// Its name.
        name: Name,
        /// What it may have of what its provider has.
        contract: Contract,
    },
    /// Changes the contract of a provider, or of one of its applications. What is granted stays.
    ChangeContract {
        /// Whose, or whose application's.
        provider: Name,
        /// The application; none: the provider's own.
        application: Option<Name>,
        /// What it may have from now on.
        contract: Contract,
        /// What it had when the asker looked; refused where it has changed since. None: whatever it was.
        was: Option<Contract>,
    },
    /// Removes an application that has no allocation.
    RemoveApplication {
        /// Whose it is.
        provider: Name,
        /// Its name.
        name: Name,
    },
    /// Names a line that is up.
    AddSession(NewSession),
    /// A line is up: names it, or says what it is now. What is granted on it follows, as far as it fits.
    StartSession(NewSession),
    /// A line is down. What is granted on it stays for the grace time.
    StopSession {
        /// Its name.
        name: Name,
    },
    /// Forgets a line that carries no allocation.
    RemoveSession {
        /// Its name.
        name: Name,
    },
    /// Names what lines share before the link, or changes what it carries.
    PutSegment(Segment),
    /// Forgets a segment that no session names.
    RemoveSegment {
        /// Its name.
        name: Name,
    },
    /// Names a level, or changes what a name stands for in later grants.
    PutProfile(Profile),
    /// Forgets a named level.
    RemoveProfile {
        /// Its name.
        name: Name,
    },
    /// Lets programs of a provider ask with an API key.
    AddKey(NewKey),
    /// Takes an API key no more.
    RemoveKey {
        /// Its number.
        id: KeyId,
    },
    /// Asks for an allocation.
    Grant(Box<GrantRequest>),
    /// Puts off the end of an allocation, as far as its profile allows.
    Extend {
        /// Its number.
        id: AllocationId,
        /// By how much.
        by: SignedDuration,
    },
    /// Ends an allocation.
    Revoke {
        /// Its number.
        id: AllocationId,
    },
    /// Ends what has expired.
    Expire,
}

/// A provider to register.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewProvider {
    /// Unique among providers.
    pub name: Name,
    /// Application or network service provider.
    pub kind: ProviderKind,
    /// Prefixes it may claim.
    pub networks: Vec<ipnet::IpNet>,
    /// What it may have.
    #[serde(default)]
    pub contract: Contract,
}

/// A session to name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewSession {
    /// Unique among sessions.
    pub name: Name,
    /// Prefixes of the subscriber.
    pub addresses: Vec<ipnet::IpNet>,
    /// Speed of the line.
    pub rate: Directed<BitsPerSecond>,
    /// How the line frames packets.
    #[serde(default, with = "crate::domain::session::link_layer")]
    pub link_layer: crate::domain::LinkLayer,
    /// Bytes above the IP length; none: 14.
    #[serde(default)]
    pub overhead: Option<i16>,
    /// Delay of the line itself, in µs.
    #[serde(default)]
    pub delay_us: u32,
    /// Share of packets the line loses, in millionths.
    #[serde(default)]
    pub loss_ppm: u32,
    /// Segments that it is behind, 8 at most.
    #[serde(default)]
    pub segments: Vec<Name>,
    /// The BRAS that it ends at: 1 to 253 characters.
    #[serde(default)]
    pub bras: Option<String>,
    /// What reports it, from which signs of life are expected; none: an operator names it.
    #[serde(default)]
    pub source: Option<Name>,
}

/// A request for an allocation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantRequest {
    /// Who asks.
    pub provider: Name,
    /// For which of its applications.
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
    /// For how long; none: until revoked.
    #[serde(default)]
    pub duration: Option<SignedDuration>,
}

/// A level with every field open: what is said here goes before the profile.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LevelRequest {
    /// Guaranteed capacity.
    pub guaranteed: Directed<Option<BitsPerSecond>>,
    /// The smallest guaranteed capacity that is of use: as much up to `guaranteed` is granted as there is.
    pub least: Directed<Option<BitsPerSecond>>,
    /// Maximum capacity.
    pub maximum: Directed<Option<BitsPerSecond>>,
    /// Bytes that may come at once.
    pub burst: Directed<Option<crate::domain::ByteCount>>,
    /// 0 first, 7 last.
    pub priority: Option<u8>,
    /// Delay budget in µs.
    pub delay_us: Option<u32>,
    /// Jitter budget in µs.
    pub jitter_us: Option<u32>,
    /// Loss budget, 0 to 1.
    pub loss: Option<f64>,
    /// Code point to write.
    pub dscp: Option<u8>,
    /// Largest IP packet in bytes.
    pub mtu: Option<u16>,
    /// Queue or drop.
    pub enforcement: Option<crate::domain::Enforcement>,
    /// Refuse rather than give a soft guarantee.
    pub hard: Option<bool>,
}

impl LevelRequest {
    /// Asks for a level as it is.
    #[must_use]
    pub fn of(level: &Level) -> Self {
        Self {
            guaranteed: level.guaranteed,
            least: Directed::default(),
            maximum: level.maximum,
            burst: level.burst,
            priority: Some(level.priority),
            delay_us: level.delay_us,
            jitter_us: level.jitter_us,
            loss: level.loss,
            dscp: level.dscp,
            mtu: level.mtu,
            enforcement: Some(level.enforcement),
            hard: Some(level.hard),
        }
    }
}

/// One change of the state, to be written with all others of its decision or not at all.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A provider was added or changed.
    PutProvider(Provider),
    /// A provider was removed.
    DeleteProvider(Name),
    /// An application was added.
    PutApplication(Application),
    /// An application was removed.
    DeleteApplication(Name, Name),
    /// A session was added or changed.
    PutSession(Session),
    /// A session was removed.
    DeleteSession(Name),
    /// A segment was added or changed.
    PutSegment(Segment),
    /// A segment was removed.
    DeleteSegment(Name),
    /// A profile was added or changed.
    PutProfile(Profile),
    /// A profile was removed.
    DeleteProfile(Name),
    /// An API key was added.
    PutKey(ApiKey),
    /// An API key was removed.
    DeleteKey(KeyId),
    /// An allocation was granted.
    PutAllocation(Allocation),
    /// An allocation ended: its last state, for the history.
    EndAllocation(Allocation),
}

/// What follows from a command.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// What to write, all or nothing.
    pub changes: Vec<Change>,
    /// What the asker is told beyond the changes: a limit that will not be reached, a soft
    /// guarantee, a selector hidden by another allocation's.
    pub warnings: Vec<String>,
}

/// Carries decisions into the kernel, and tells what becomes of the packets there.
pub trait Gateway {
    /// Why the kernel does not do what was decided.
    type Error: std::error::Error + Send + Sync + 'static;
    /// What it is made of.
    type Config;

    /// Carries out `changes`, which `state` already contains. `inverse` is what takes them back
    /// ([`State::inverse`]): it tells how what they concern was before.
    ///
    /// # Errors
    /// Where a step is refused; the kernel is then as before the call.
    fn apply(&mut self, state: &State, changes: &[Change], inverse: &[Change]) -> Result<(), Self::Error>;

    /// What is told to the asker where an error of [`Gateway::apply`] is no fault, but follows from what was
    /// asked.
    fn refusal(_error: &Self::Error) -> Option<Refusal> {
        None
    }

    /// Why [`Gateway::apply`] would refuse `changes`; none: as far as can be told without doing it, it
    /// would not. Nothing is changed.
    fn would_refuse(&self, _changes: &[Change]) -> Option<Refusal> {
        None
    }

    /// Becomes what `config` says, under a state that agrees with it. What is the same in both goes on
    /// undisturbed.
    ///
    /// # Errors
    /// Where a step is refused; the caller goes back to the configuration before.
    fn reconfigure(&mut self, config: &Self::Config, state: &State) -> Result<(), Self::Error>;

    /// Tells whether an interface has come, gone or changed since the last look.
    ///
    /// # Errors
    /// Where the gateway can't tell.
    fn interfaces_changed(&self) -> Result<bool, Self::Error>;

    /// Compares the kernel with `state`, repairs what differs, and says what it repaired.
    ///
    /// # Errors
    /// Where the kernel can't be read, or a repair is refused.
    fn reconcile(&mut self, state: &State) -> Result<Vec<String>, Self::Error>;

    /// All counters at this moment.
    ///
    /// # Errors
    /// Where they can't be read.
    fn statistics(&mut self, state: &State) -> Result<Statistics, Self::Error>;

    /// What the loaded program would do with a packet, at no charge. `packet` begins at its
    /// Ethernet header, or at its IP header where `layer3` is set.
    ///
    /// # Errors
    /// Where the program can't be run on it.
    fn explain(
        &mut self,
        direction: Direction,
        packet: &[u8],
        layer3: bool,
    ) -> Result<Explanation, Self::Error>;

    /// The gateway as it is.
    fn status(&self) -> GatewayStatus;

    /// Turns the programs' sampled debugging on or off.
    ///
    /// # Errors
    /// Where the kernel refuses.
    fn trace(&mut self, on: bool) -> Result<(), Self::Error>;

    /// The lines of debugging since the last call, oldest first.
    fn traced(&mut self) -> Vec<String>;

    /// Removes everything from the kernel.
    ///
    /// # Errors
    /// Where something can't be removed; the rest is.
    fn detach(self) -> Result<(), Self::Error>
    where
        Self: Sized;
}

/// `upstream` or `downstream`.
pub(crate) const fn direction_word(direction: Direction) -> &'static str {
    match direction {
        Direction::Upstream => "upstream",
        Direction::Downstream => "downstream",
    }
}

/// `up` or `down`, as fields are called.
pub(crate) const fn direction_field(direction: Direction) -> &'static str {
    match direction {
        Direction::Upstream => "up",
        Direction::Downstream => "down",
    }
}
