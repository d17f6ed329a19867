//! Traffic with plain sockets, and what of it arrived.
//!
//! A flow runs from `start` until it is dropped: [`UdpFlow`] is paced, [`TcpFlow`] sends what the
//! path takes. [`measure`] watches any number of running flows over one window.
//!
//! Rates are in the limiting contract's length on plain Ethernet: IP length of each wire packet
//! plus 14 bytes.

mod socket;
mod tcp;
mod udp;

use std::cmp::Reverse;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use qos_common::length::{ETHERNET_OVERHEAD, LinkLayer, charged};
use qos_userspace::domain::units::BitsPerSecond;

pub use tcp::{RunningTcp, TcpFlow};
pub use udp::{RunningUdp, UdpFlow};

use crate::stops::Watch;

/// Share of a window that is taken into account at most where the machine stopped.
const MOST_STOPPED: f64 = 0.5;

/// A running flow that can be watched. [`watched`] calls the three in order.
pub trait Flow {
    /// Opens the window.
    fn begin(&self);
    /// Closes the window; the flow runs on.
    fn end(&self);
    /// Waits for what was still on its way, up to a second, and gives the result.
    ///
    /// # Errors
    /// When the flow's sockets failed.
    fn collect(&self) -> Result<Measured>;
}

/// What became of a flow within one window.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Length of the window.
    pub window: Duration,
    /// Rate that was sent.
    pub offered: BitsPerSecond,
    /// Rate that arrived within the window.
    pub achieved: BitsPerSecond,
    /// Payload rate that arrived within the window, without headers and, for TCP, duplicates.
    pub goodput: BitsPerSecond,
    /// Packets sent within the window; for TCP, segments with data.
    pub sent: u64,
    /// How many of those arrived, whenever; for TCP, segments that arrived within the window.
    pub received: u64,
    /// How many of those didn't arrive; for TCP, retransmissions.
    pub lost: u64,
    /// Which UDP packet of the window is the first that is missing, from zero on.
    pub first_lost: Option<u64>,
    /// UDP packets that arrived behind a later one.
    pub reordered: u64,
    /// UDP packets that reached the receiving host and overran its socket. They are not in `lost`.
    /// Not zero means that the machine was too busy to measure.
    pub receiver_dropped: u64,
    /// Share of the window for which the machine was seen to stop; zero where nobody watched it.
    pub stopped: f64,
    /// One-way latency of the UDP packets sent within the window that arrived.
    pub latency: Option<Latency>,
    /// When the window began, in ns of the clock that `arrivals` uses.
    began: u64,
    /// Time in ns and charged bytes.
    arrivals: Vec<(u64, u32)>,
}

impl Measured {
    /// The rate that arrived in each `bin` of the window; a last bin that isn't whole is left out.
    /// TCP's arrivals are accurate to a few milliseconds.
    #[must_use]
    pub fn series(&self, bin: Duration) -> Vec<BitsPerSecond> {
        let bins = (self.window.as_nanos() / bin.as_nanos()) as usize;
        let mut bytes = vec![0_u64; bins];
        for &(at, length) in &self.arrivals {
            if let Some(bytes) = bytes.get_mut((u128::from(at - self.began) / bin.as_nanos()) as usize) {
                *bytes += u64::from(length);
            }
        }
        bytes.into_iter().map(|bytes| rate(bytes, bin)).collect()
    }

    /// The most that arrived in a `bin` of a flow held to `limit`, as [`Measured::peaks`] has it.
    #[must_use]
    pub fn peak(&self, bin: Duration, limit: BitsPerSecond) -> BitsPerSecond {
        self.peaks(bin, limit).first().copied().unwrap_or_default()
    }

    /// What arrived in each `bin` of a flow held to `limit`, the most first. What the bin before has less than
    /// that is not counted against a bin: a machine that stops for a moment hands over late what was let
    /// through in time.
    #[must_use]
    pub fn peaks(&self, bin: Duration, limit: BitsPerSecond) -> Vec<BitsPerSecond> {
        let series = self.series(bin);
        let late = series.windows(2).map(|pair| pair[1].0.saturating_sub(limit.0.saturating_sub(pair[0].0)));
        let mut peaks: Vec<_> = series.first().map(|first| first.0).into_iter().chain(late).collect();
        peaks.sort_unstable_by_key(|&peak| Reverse(peak));
        peaks.into_iter().map(BitsPerSecond).collect()
    }

    /// `achieved` divided by `expected`; 1 is as expected. Time for which the machine stopped is not counted:
    /// nobody can send then. What is above all the same is told as it is.
    #[must_use]
    pub fn ratio_to(&self, expected: BitsPerSecond) -> f64 {
        made_good(self.achieved.0 as f64 / expected.0 as f64, self.stopped)
    }
}

/// What all together achieved, divided by `expected`, as [`Measured::ratio_to`] says it of one.
#[must_use]
pub fn sum_to(measured: &[Measured], expected: BitsPerSecond) -> f64 {
    let achieved: u64 = measured.iter().map(|measured| measured.achieved.0).sum();
    let stopped = measured.iter().map(|measured| measured.stopped).fold(0.0, f64::max);
    made_good(achieved as f64 / expected.0 as f64, stopped)
}

/// Whether all together got `least` to `most`, but for `tolerance`, a share of either. Time for which the machine
/// stopped is not counted against `least`.
#[must_use]
pub fn are_within(
    measured: &[Measured],
    (least, most): (BitsPerSecond, BitsPerSecond),
    tolerance: f64,
) -> bool {
    let achieved: u64 = measured.iter().map(|measured| measured.achieved.0).sum();
    let is_enough = least.0 == 0 || sum_to(measured, least) >= 1.0 - tolerance;
    is_enough && achieved as f64 <= most.0 as f64 * (1.0 + tolerance)
}

/// What a share of a rate would be without the share of the time for which the machine stopped: at most 1, or as
/// it is.
#[must_use]
pub fn made_good(share: f64, stopped: f64) -> f64 {
    if share < 1.0 { (share / (1.0 - stopped)).min(1.0) } else { share }
}

/// One-way latencies, exact: every packet counts.
///
/// From just before the system call that sends a packet (or its burst of a few) to its arrival in
/// the receiving host's stack, as the kernel stamps it; the receiving program's own delay is not in
/// it. Both ends read this machine's `CLOCK_REALTIME`, the clock of those stamps.
#[derive(Clone, Debug)]
pub struct Latency {
    /// In ns, sorted, not empty.
    sorted: Vec<u64>,
}

impl Latency {
    fn new(mut nanoseconds: Vec<u64>) -> Option<Self> {
        nanoseconds.sort_unstable();
        (!nanoseconds.is_empty()).then_some(Self { sorted: nanoseconds })
    }

    /// The smallest latency that at least `share` (0 to 1) of the packets kept to.
    #[must_use]
    pub fn percentile(&self, share: f64) -> Duration {
        let rank = (share * self.sorted.len() as f64).ceil() as usize;
        Duration::from_nanos(self.sorted[rank.clamp(1, self.sorted.len()) - 1])
    }

    /// The median.
    #[must_use]
    pub fn p50(&self) -> Duration {
        self.percentile(0.50)
    }

    /// The 99th percentile.
    #[must_use]
    pub fn p99(&self) -> Duration {
        self.percentile(0.99)
    }

    /// The largest.
    #[must_use]
    pub fn max(&self) -> Duration {
        self.percentile(1.0)
    }

    /// How many packets there were.
    #[must_use]
    pub fn count(&self) -> usize {
        self.sorted.len()
    }
}

/// Lets `warm_up` pass, then watches all `flows` over the same `window`. Results are in the order
/// of the flows.
///
/// # Errors
/// When a flow's sockets failed.
pub fn measure(flows: &[&dyn Flow], warm_up: Duration, window: Duration) -> Result<Vec<Measured>> {
    thread::sleep(warm_up);
    watched(flows, || thread::sleep(window))
}

/// Watches all `flows`, and the machine, while something is done. Results are in the order of the flows.
///
/// # Errors
/// When a flow's sockets failed.
pub fn watched(flows: &[&dyn Flow], what: impl FnOnce()) -> Result<Vec<Measured>> {
    let (stopped, ()) = stopped_while(|| {
        flows.iter().for_each(|flow| flow.begin());
        what();
        flows.iter().for_each(|flow| flow.end());
    })?;
    let collected = flows.iter().map(|flow| flow.collect().map(|measured| Measured { stopped, ..measured }));
    collected.collect()
}

/// The share of the time that something takes for which the machine stopped, a half at most, and what comes of it.
///
/// # Errors
/// When the processors can't be watched.
pub fn stopped_while<T>(what: impl FnOnce() -> T) -> Result<(f64, T)> {
    let (watch, began) = (Watch::start()?, Instant::now());
    let result = what();
    let ended = Instant::now();
    Ok((watch.stopped()?.share_of(&(began..ended)).min(MOST_STOPPED), result))
}

/// What an IP packet of `ip_length` bytes is charged, in bytes.
#[must_use]
pub fn charged_length(ip_length: u32) -> u32 {
    charged(ip_length, ETHERNET_OVERHEAD, LinkLayer::Ethernet)
}

fn rate(bytes: u64, time: Duration) -> BitsPerSecond {
    BitsPerSecond((bytes as f64 * 8.0 / time.as_secs_f64()).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_exact() {
        let latency = Latency::new((1..=200).rev().collect()).expect("200 samples");
        assert_eq!(latency.p50(), Duration::from_nanos(100));
        assert_eq!(latency.p99(), Duration::from_nanos(198));
        assert_eq!(latency.max(), Duration::from_nanos(200));
        assert_eq!(latency.percentile(0.0), Duration::from_nanos(1));
        assert!(Latency::new(Vec::new()).is_none());
    }

    #[test]
    fn a_series_counts_each_arrival_in_its_bin() {
        let measured = Measured {
            window: Duration::from_millis(25),
            offered: BitsPerSecond(0),
            achieved: BitsPerSecond(0),
            goodput: BitsPerSecond(0),
            sent: 0,
            received: 0,
            lost: 0,
            reordered: 0,
            first_lost: None,
            receiver_dropped: 0,
            stopped: 0.0,
            latency: None,
            began: 1_000,
            arrivals: vec![(1_000, 100), (10_000_999, 50), (10_001_000, 25), (24_000_000, 999)],
        };
        assert_eq!(
            measured.series(Duration::from_millis(10)),
            [BitsPerSecond(120_000), BitsPerSecond(20_000)]
        );
    }
}
