//! Levels of quality: what is asked for and given, per direction.

use serde::{Deserialize, Serialize};

use super::Direction;
use super::name::Name;
use super::units::{BitsPerSecond, ByteCount};

/// A value for each direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Directed<T> {
    /// From the subscriber.
    #[serde(default)]
    pub up: T,
    /// To the subscriber.
    #[serde(default)]
    pub down: T,
}

impl<T> Directed<T> {
    /// The value of one direction.
    pub const fn get(&self, direction: Direction) -> &T {
        match direction {
            Direction::Upstream => &self.up,
            Direction::Downstream => &self.down,
        }
    }

    /// The value of one direction, to change.
    pub const fn get_mut(&mut self, direction: Direction) -> &mut T {
        match direction {
            Direction::Upstream => &mut self.up,
            Direction::Downstream => &mut self.down,
        }
    }
}

/// What becomes of traffic above the maximum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Enforcement {
    /// It queues at egress.
    #[default]
    Shape,
    /// It is dropped where it is classified.
    Police,
}

/// Lowest urgency of an allocation; 0 is the highest.
pub const LAST_PRIORITY: u8 = 7;

/// Priority of an allocation that asks for none.
pub const DEFAULT_PRIORITY: u8 = 4;

/// A level of quality. Everything that is not said is open.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Level {
    /// Capacity that is there whatever others send. Charged length, see the limiting contract.
    pub guaranteed: Directed<Option<BitsPerSecond>>,
    /// Capacity that is never exceeded.
    pub maximum: Directed<Option<BitsPerSecond>>,
    /// Bytes that may come at once.
    pub burst: Directed<Option<ByteCount>>,
    /// 0 is served first, 7 last.
    pub priority: u8,
    /// Longest delay that in-profile packets may meet between gateway and subscriber, in µs.
    pub delay_us: Option<u32>,
    /// Largest share of in-profile packets that may be lost, 0 to 1.
    pub loss: Option<f64>,
    /// Code point written into the packets, 0 to 63.
    pub dscp: Option<u8>,
    /// Queue or drop above the maximum.
    pub enforcement: Enforcement,
    /// The guarantee must hold although the gateway does not send into the line in that direction.
    pub hard: bool,
}

impl Default for Level {
    fn default() -> Self {
        Self {
            guaranteed: Directed::default(),
            maximum: Directed::default(),
            burst: Directed::default(),
            priority: DEFAULT_PRIORITY,
            delay_us: None,
            loss: None,
            dscp: None,
            enforcement: Enforcement::default(),
            hard: false,
        }
    }
}

/// A named level.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Unique among profiles.
    pub name: Name,
    /// The level it stands for.
    pub level: Level,
}
