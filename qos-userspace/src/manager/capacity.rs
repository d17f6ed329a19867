//! Arithmetic of capacity and delay: what a class takes of its line and of the link, and how long
//! in-profile traffic may wait behind all of them.
//!
//! The gateway builds its tree from the same functions, so what is admitted is what is enforced.

use qos_common::length::{ETHERNET_OVERHEAD, LinkLayer, charged};

use super::{LineSide, Network};
use crate::domain::level::LAST_PRIORITY;
use crate::domain::{Allocation, BitsPerSecond, Direction, Session};

/// What a line's rest and the default class are sure of, at least: one full packet in 1.5 s, so that
/// a connection survives (and can report) any overload, while 100 lines cost less than 1 Mbit/s.
pub const SMALLEST_REST: BitsPerSecond = BitsPerSecond(8_000);

/// A rest is sure of one part in so many of its line or link at most.
const REST_PART: u64 = 8;

/// Slowest line, so that its rest is sure of [`SMALLEST_REST`].
pub const SLOWEST_LINE: BitsPerSecond = BitsPerSecond(64_000);

/// Rate of an allocation without a guarantee: HTB takes no class without a rate. One full packet in
/// 24 s, so that thousands of them don't eat into what others are guaranteed, and below the 60 s in
/// tokens after which HTB forgets what a class owes.
pub const UNGUARANTEED_RATE: BitsPerSecond = BitsPerSecond(512);

/// Time that a class may run ahead of its rate, in ns. HTB's watchdog is a high-resolution timer
/// whose softirq comes up to some 100 µs late on a busy CPU; what it is late beyond the burst is lost.
const CLASS_BURST_NS: u64 = 1_000_000;

/// Time by which the scheduler's timer may come late, in ns.
pub const TIMER_SLACK_NS: u64 = 1_000_000;

/// Priorities there are.
pub(super) const PRIORITIES: usize = LAST_PRIORITY as usize + 1;

/// HTB's burst of a class of `rate`, in bytes, `packet` being its largest packet as it is charged.
#[must_use]
pub fn class_burst(rate: BitsPerSecond, packet: u32) -> u64 {
    rate.bytes_in(CLASS_BURST_NS).max(u64::from(packet))
}

impl Network {
    /// The direction into the lines, where guarantees are hard.
    #[must_use]
    pub const fn hard_direction(&self) -> Direction {
        match self.line_side {
            LineSide::Lan => Direction::Downstream,
            LineSide::Wan => Direction::Upstream,
        }
    }

    /// Speed of a line as the gateway uses it: a little below its own in the direction out of it,
    /// so that the queue stands in the gateway.
    #[must_use]
    pub fn line_speed(&self, session: &Session, direction: Direction) -> BitsPerSecond {
        let rate = *session.rate.get(direction);
        if direction == self.hard_direction() { rate } else { rate.share(self.soft_share) }
    }

    /// What the rest of a line is sure of.
    #[must_use]
    pub fn line_rest(&self, session: &Session, direction: Direction) -> BitsPerSecond {
        self.line_rest.min(BitsPerSecond(session.rate.get(direction).0 / REST_PART))
    }

    /// What traffic on no known line is sure of.
    #[must_use]
    pub fn link_rest(&self, direction: Direction) -> BitsPerSecond {
        self.link_rest.min(BitsPerSecond(self.link.get(direction).0 / REST_PART))
    }

    /// Largest packet as it is charged on a line; on the link where there is none.
    fn largest_packet(&self, session: Option<&Session>) -> u32 {
        let (overhead, layer) = session.map_or((ETHERNET_OVERHEAD, LinkLayer::Ethernet), |session| {
            (session.overhead, session.link_layer)
        });
        charged(self.mtu, overhead, layer)
    }
}

/// What one class takes of its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    /// Its rate in bit/s.
    pub(super) rate: u64,
    /// Granted burst of in-profile traffic, in bytes, and its priority; none: it has no guarantee.
    pub(super) burst: Option<(u8, u64)>,
    /// Bytes that HTB may release for it at once: its burst and one packet.
    pub(super) at_once: u64,
}

impl Share {
    /// What the class of `allocation` takes of `session`'s line, or of the link where none is
    /// given; none: there is no such class.
    pub(super) fn of(
        network: &Network,
        session: Option<&Session>,
        allocation: &Allocation,
        direction: Direction,
    ) -> Option<Self> {
        if !allocation.has_class(direction) {
            return None;
        }
        let level = &allocation.level;
        let guaranteed = *level.guaranteed.get(direction);
        let rate = guaranteed.unwrap_or(UNGUARANTEED_RATE);
        let burst = level.burst.get(direction).map_or(0, |burst| burst.0);
        Some(Self {
            rate: rate.0,
            burst: guaranteed.map(|_| (level.priority.min(LAST_PRIORITY), burst)),
            at_once: at_once(rate, network.largest_packet(session)),
        })
    }

    /// What the rest of `session`'s line takes, of the line or of the link.
    pub(super) fn of_rest(network: &Network, session: &Session, direction: Direction, on_line: bool) -> Self {
        let rate = network.line_rest(session, direction);
        let packet = network.largest_packet(on_line.then_some(session));
        Self { rate: rate.0, burst: None, at_once: at_once(rate, packet) }
    }

    /// What the link's default class takes, for traffic on no known line.
    pub(super) fn of_default(network: &Network, direction: Direction) -> Self {
        let rate = network.link_rest(direction);
        Self { rate: rate.0, burst: None, at_once: at_once(rate, network.largest_packet(None)) }
    }
}

fn at_once(rate: BitsPerSecond, packet: u32) -> u64 {
    class_burst(rate, packet) + u64::from(packet)
}

/// What all classes of a line, or of the link, take together in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Load {
    /// Sum of their rates in bit/s.
    pub(super) rate: u64,
    /// Sums of the granted bursts by priority, in bytes.
    bursts: [u64; PRIORITIES],
    /// Sum of what HTB may release at once, in bytes.
    at_once: u64,
}

impl Load {
    pub(super) fn add(&mut self, share: &Share) {
        self.rate += share.rate;
        self.at_once += share.at_once;
        if let Some((priority, burst)) = share.burst {
            self.bursts[usize::from(priority)] += burst;
        }
    }

    pub(super) fn remove(&mut self, share: &Share) {
        self.rate -= share.rate;
        self.at_once -= share.at_once;
        if let Some((priority, burst)) = share.burst {
            self.bursts[usize::from(priority)] -= burst;
        }
    }

    pub(super) fn with(mut self, share: &Share) -> Self {
        self.add(share);
        self
    }

    /// What is left of `speed`.
    pub(super) fn left(&self, speed: BitsPerSecond) -> BitsPerSecond {
        BitsPerSecond(speed.0.saturating_sub(self.rate))
    }

    /// How long an in-profile packet of `priority` may wait where all this is sent at `speed`, in ns.
    pub(super) fn delay_ns(&self, speed: BitsPerSecond, priority: u8) -> u64 {
        let bursts: u64 = self.bursts.iter().take(usize::from(priority) + 1).sum();
        speed.time_of(bursts + self.at_once).saturating_add(TIMER_SLACK_NS)
    }
}
