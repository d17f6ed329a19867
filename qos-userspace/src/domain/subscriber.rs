//! Subscribers: the lines that sources tell of, whether anything is granted on them or not.

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::LinkLayer;
use super::level::Directed;
use super::name::Name;
use super::session::link_layer;
use super::units::BitsPerSecond;

/// Longest name that a source gives to one of its sessions, in bytes: that of a RADIUS attribute (RFC 2865).
pub const LONGEST_KEY: usize = 253;

/// What a source tells of a line that is up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// Prefixes of the subscriber, 1 to 16 of them.
    pub addresses: Vec<IpNet>,
    /// Speed of the line, in the line's own framing; none: not told, as `line_rate_up` and `line_rate_down` say.
    #[serde(default)]
    pub rate: Directed<Option<BitsPerSecond>>,
    /// How the line frames packets.
    #[serde(default, with = "link_layer")]
    pub link_layer: LinkLayer,
    /// Bytes above the IP length that a packet takes on the line, −64 to 256; none: 14.
    #[serde(default)]
    pub overhead: Option<i16>,
    /// Delay of the line itself, one way, in µs.
    #[serde(default)]
    pub delay_us: u32,
    /// Share of packets that the line loses, 0 to 1, in millionths.
    #[serde(default)]
    pub loss_ppm: u32,
    /// Segments that it is behind, 8 at most.
    #[serde(default)]
    pub segments: Vec<Name>,
    /// The BRAS that it ends at, 1 to 253 characters; none: not told.
    #[serde(default)]
    pub bras: Option<String>,
}

/// What happened to a line, as its source tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// It has come up, or is still up.
    Up {
        /// The line's lasting name: the same whenever it comes back, at whatever address.
        line: Name,
        /// What the source calls this session of it, 1 to 253 bytes; none: it does not tell sessions apart.
        #[serde(default)]
        key: Option<String>,
        /// What it is like now.
        #[serde(flatten)]
        facts: Facts,
    },
    /// A session of it has ended. One that another session has followed meanwhile changes nothing.
    Down {
        /// The line.
        line: Name,
        /// Which of its sessions; none: whichever it has.
        #[serde(default)]
        key: Option<String>,
    },
    /// All lines that end at a BRAS have gone: it was started again, or is about to stop.
    BrasDown {
        /// The BRAS.
        bras: String,
    },
}

/// What a source tells, and when it was so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Who tells; none: an operator, from whom no signs of life are expected.
    #[serde(default)]
    pub source: Option<Name>,
    /// When it was so. What is older than what is known of a line changes nothing.
    pub at: Timestamp,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// A line as it is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subscriber {
    /// Its lasting name.
    pub line: Name,
    /// Who told; none: an operator.
    pub source: Option<Name>,
    /// What the source calls the session that it has, or had last.
    pub key: Option<String>,
    /// What it is like, or was while it was up.
    #[serde(flatten)]
    pub facts: Facts,
    /// Since when that session is up.
    pub started_at: Timestamp,
    /// The last sign of life.
    pub seen_at: Timestamp,
    /// Since when it is down; none: it was not told to be.
    pub down_since: Option<Timestamp>,
    /// Why it is down, where its source did not say so itself.
    pub reason: Option<String>,
    /// Place of its last change among those of all lines; a later one is higher.
    pub sequence: u64,
}
