//! Levels of quality: what is asked for and given, per direction.

use serde::{Deserialize, Serialize};

use super::Direction;
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

/// Smallest MTU that a level may ask for, in bytes: every host takes IPv4 packets of this length (RFC
/// 791, section 3.1).
pub const SMALLEST_MTU: u16 = 576;

/// Smallest MTU of IPv6, in bytes (RFC 8200, section 5): hosts don't go below it.
pub const SMALLEST_IPV6_MTU: u16 = qos_common::abi::SMALLEST_IPV6_MTU as u16;

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
    /// Bytes that may come at once: of in-profile traffic where there is a guarantee, else of all
    /// ([`Level::maximum_burst`]).
    pub burst: Directed<Option<ByteCount>>,
    /// 0 is served first, 7 last.
    pub priority: u8,
    /// Longest delay that in-profile packets may meet between gateway and subscriber, in µs.
    pub delay_us: Option<u32>,
    /// Most by which the delays of two in-profile packets may differ there, in µs.
    pub jitter_us: Option<u32>,
    /// Largest share of in-profile packets that may be lost, 0 to 1.
    pub loss: Option<f64>,
    /// Code point written into the packets, 0 to 63.
    pub dscp: Option<u8>,
    /// Largest IP packet in bytes, [`SMALLEST_MTU`] and up.
    pub mtu: Option<u16>,
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
            jitter_us: None,
            loss: None,
            dscp: None,
            mtu: None,
            enforcement: Enforcement::default(),
            hard: false,
        }
    }
}

/// Time at the rate that makes the burst of a level that names none, in ns.
const DEFAULT_BURST_NS: u64 = 25_000_000;

/// The burst that a level has at `rate` if it names none: 25 ms, and two packets of `mtu` bytes at
/// least, so that the stalls of an ordinary sender cost it nothing.
#[must_use]
pub fn default_burst(rate: BitsPerSecond, mtu: u32) -> ByteCount {
    ByteCount(rate.bytes_in(DEFAULT_BURST_NS).max(2 * u64::from(mtu)))
}

impl Level {
    /// Bytes that may come at once at the maximum of `direction`; none: there is no maximum.
    ///
    /// A level with a guarantee spends its burst on in-profile traffic. Its maximum then tolerates
    /// what [`default_burst`] gives at the maximum's rate, where that is more.
    #[must_use]
    pub fn maximum_burst(&self, direction: Direction, mtu: u32) -> Option<ByteCount> {
        let maximum = (*self.maximum.get(direction))?;
        let usual = default_burst(maximum, mtu);
        let named = *self.burst.get(direction);
        Some(match (self.guaranteed.get(direction), named) {
            (None, Some(burst)) => burst,
            (Some(_), Some(burst)) => burst.max(usual),
            (_, None) => usual,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_burst_of_a_maximum() {
        // Guaranteed and maximum in kbit/s, the burst that is named, and what the maximum tolerates.
        for (guaranteed, maximum, burst, tolerated) in [
            (None, None, None, None),
            (Some(1_000), None, Some(5_000), None),
            (None, Some(8_000), None, Some(25_000)),
            (None, Some(8_000), Some(5_000), Some(5_000)),
            (None, Some(10), None, Some(3_000)),
            (Some(1_000), Some(8_000), Some(5_000), Some(25_000)),
            (Some(1_000), Some(8_000), Some(90_000), Some(90_000)),
        ] {
            let down = |kbit: u64| Directed { up: None, down: Some(BitsPerSecond(kbit * 1_000)) };
            let level = Level {
                guaranteed: guaranteed.map(down).unwrap_or_default(),
                maximum: maximum.map(down).unwrap_or_default(),
                burst: Directed { up: None, down: burst.map(ByteCount) },
                ..Level::default()
            };
            let found = level.maximum_burst(Direction::Downstream, 1_500);
            assert_eq!(found, tolerated.map(ByteCount), "{guaranteed:?} {maximum:?} {burst:?}");
            assert_eq!(level.maximum_burst(Direction::Upstream, 1_500), None);
        }
    }
}
