//! What happens, in order, and what was measured of it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use qos_tests::traffic::{Flow, Latency, Measured};
use qos_userspace::domain::units::BitsPerSecond;
use qos_userspace::domain::{Allocation, AllocationId, Enforcement};
use qos_userspace::manager::report::{Counts, Statistics};

use crate::network::{Network, Running};
use crate::progress::Progress;
use crate::scenario::{Asked, CROWD, EVENT, GAME, Load, OTHERS, PATCH, Traffic, Way};

/// TCP needs a few round trips to find its rate, and queues a moment to fill.
const WARM_UP: Duration = Duration::from_secs(2);
/// Long enough for 2,000 packets of the game, whose 99th percentile is then the 20th worst.
const WINDOW: Duration = Duration::from_secs(6);
/// Before and after something ends.
const SHORT_WARM_UP: Duration = Duration::from_secs(1);
const SHORT_WINDOW: Duration = Duration::from_secs(3);
/// Life of the level that expires: through the measurement of all, and the revocation.
const LIFE: &str = "30s";
/// What a granted level ends by itself later than it should, at most.
const AFTER_EXPIRY: Duration = Duration::from_millis(200);

/// What was seen.
pub(crate) struct Results {
    /// Every allocation's traffic, as it was granted, in each direction.
    pub(crate) held: Vec<Held>,
    /// Traffic that nobody asked a level for.
    pub(crate) crowd: Vec<Free>,
    pub(crate) without_priority: Latency,
    pub(crate) with_priority: Latency,
    pub(crate) revoked: Ended,
    pub(crate) expired: Ended,
}

/// Traffic of an allocation.
pub(crate) struct Held {
    pub(crate) title: &'static str,
    pub(crate) allocation: Allocation,
    pub(crate) traffic: &'static Traffic,
    pub(crate) measured: Measured,
    /// Packets that the gateway dropped within the window.
    pub(crate) dropped: u64,
}

impl Held {
    pub(crate) fn guaranteed(&self) -> Option<BitsPerSecond> {
        let level = &self.allocation.level;
        self.of(level.guaranteed.down, level.guaranteed.up)
    }

    pub(crate) fn maximum(&self) -> Option<BitsPerSecond> {
        let level = &self.allocation.level;
        self.of(level.maximum.down, level.maximum.up)
    }

    pub(crate) fn enforcement(&self) -> Enforcement {
        self.allocation.level.enforcement
    }

    fn of<T>(&self, down: T, up: T) -> T {
        match self.traffic.way {
            Way::Down => down,
            Way::Up => up,
        }
    }
}

/// Traffic without an allocation.
pub(crate) struct Free {
    pub(crate) title: &'static str,
    pub(crate) traffic: &'static Traffic,
    pub(crate) measured: Measured,
}

/// What was left of an allocation's rate when it had ended.
pub(crate) struct Ended {
    pub(crate) title: &'static str,
    pub(crate) id: AllocationId,
    pub(crate) before: BitsPerSecond,
    pub(crate) after: BitsPerSecond,
}

/// A level that was granted, and its traffic.
struct Granted {
    title: &'static str,
    allocation: Allocation,
    flows: Vec<(&'static Traffic, Running)>,
}

/// Traffic that goes on after the story.
pub(crate) struct StillRunning {
    _granted: Vec<Granted>,
    _crowd: Vec<Running>,
}

/// Plays the whole story.
pub(crate) fn tell(network: &Network, progress: &mut Progress) -> Result<(Results, StillRunning)> {
    progress.step("granting levels, to providers and to addresses, and starting their traffic")?;
    let mut granted = Vec::new();
    for asked in OTHERS.iter().chain([&EVENT]) {
        granted.push(grant(network, progress, asked, asked.grant)?);
    }
    progress.step("overloading Anna's line and the link with traffic that nobody asked a level for")?;
    let crowd = CROWD.iter().map(|(_, traffic)| network.send(traffic)).collect::<Result<Vec<_>>>()?;
    let game = start(network, GAME.traffic)?;
    let patch = start(network, PATCH.traffic)?;

    progress.step("measuring the game's latency without a level of its own")?;
    let without = measure(progress, &[game[0].1.flow()], WARM_UP, WINDOW)?.remove(0);

    progress.step("granting the game its level, and another for a while only")?;
    granted.push(grant_to(network, progress, &GAME, GAME.grant, game)?);
    let lasting = format!("{} --for {LIFE}", PATCH.grant);
    granted.push(grant_to(network, progress, &PATCH, &lasting, patch)?);

    progress.step("measuring everybody under the same overload")?;
    let held = measure_all(network, progress, &granted, &crowd)?;
    let (held, crowd_results) = held;
    let with = latency_of(&held, GAME.title)?;

    let revoked = revoke(network, progress, &granted, &held)?;
    let expired = expire(network, progress, &granted, &held)?;

    let results = Results {
        held,
        crowd: crowd_results,
        without_priority: without.latency.context("no packet of the game arrived without its level")?,
        with_priority: with,
        revoked,
        expired,
    };
    Ok((results, StillRunning { _granted: granted, _crowd: crowd }))
}

fn start(network: &Network, traffic: &'static [Traffic]) -> Result<Vec<(&'static Traffic, Running)>> {
    traffic.iter().map(|traffic| Ok((traffic, network.send(traffic)?))).collect()
}

fn grant(
    network: &Network,
    progress: &mut Progress,
    asked: &'static Asked,
    arguments: &str,
) -> Result<Granted> {
    let flows = start(network, asked.traffic)?;
    grant_to(network, progress, asked, arguments, flows)
}

fn grant_to(
    network: &Network,
    progress: &mut Progress,
    asked: &'static Asked,
    arguments: &str,
    flows: Vec<(&'static Traffic, Running)>,
) -> Result<Granted> {
    let mut answer = network.qos(progress, &format!("grant {arguments}"))?;
    let allocation = serde_json::from_value(answer["result"].take())
        .with_context(|| format!("reading the allocation of {}", asked.title))?;
    Ok(Granted { title: asked.title, allocation, flows })
}

/// Watches flows over one window.
fn measure(
    progress: &mut Progress,
    flows: &[&dyn Flow],
    warm_up: Duration,
    window: Duration,
) -> Result<Vec<Measured>> {
    progress.wait("traffic settles", warm_up)?;
    for flow in flows {
        flow.begin();
    }
    progress.wait("measuring", window)?;
    for flow in flows {
        flow.end();
    }
    let measured = flows.iter().map(|flow| flow.collect()).collect::<Result<Vec<_>>>()?;
    for measured in &measured {
        ensure!(
            measured.receiver_dropped == 0,
            "this machine is too busy to measure: a receiving socket overran ({} packets)",
            measured.receiver_dropped
        );
    }
    Ok(measured)
}

fn measure_all(
    network: &Network,
    progress: &mut Progress,
    granted: &[Granted],
    crowd: &[Running],
) -> Result<(Vec<Held>, Vec<Free>)> {
    let flows: Vec<_> = granted
        .iter()
        .flat_map(|granted| granted.flows.iter().map(|(_, running)| running.flow()))
        .chain(crowd.iter().map(Running::flow))
        .collect();
    progress.wait("traffic settles", WARM_UP)?;
    let before = statistics(network)?;
    let mut measured = measure(progress, &flows, Duration::ZERO, WINDOW)?.into_iter();
    let after = statistics(network)?;
    let now = Timestamp::now();

    let mut held = Vec::new();
    for granted in granted {
        let Granted { title, allocation, flows } = granted;
        ensure!(
            allocation.expires_at.is_none_or(|end| end > now),
            "this machine is too busy: {title} expired before it was measured"
        );
        for (traffic, _) in flows {
            let counts = |statistics: &Statistics| {
                let counts = statistics.allocations.get(&allocation.id)?;
                Some(if traffic.way == Way::Down { counts.down } else { counts.up })
            };
            let dropped = |counts: Counts| counts.dropped.packets + counts.queue_dropped_packets;
            let (before, after) = counts(&before)
                .zip(counts(&after))
                .with_context(|| format!("`qos stats` has nothing of allocation {}", allocation.id))?;
            held.push(Held {
                title,
                allocation: allocation.clone(),
                traffic,
                measured: measured.next().context("a result for each flow")?,
                dropped: dropped(after) - dropped(before),
            });
        }
    }
    let crowd = CROWD
        .iter()
        .zip(measured)
        .map(|((title, traffic), measured)| Free { title, traffic, measured })
        .collect();
    ensure_offered(&held)?;
    Ok((held, crowd))
}

/// A promise can only be tested by traffic that asks for it.
fn ensure_offered(held: &[Held]) -> Result<()> {
    for held in held {
        if let Load::Udp(rate, _) = held.traffic.load {
            ensure!(
                held.measured.offered.0 as f64 >= 0.98 * rate.0 as f64,
                "this machine is too busy to measure: {} should send {rate}, and could send {} only",
                held.title,
                held.measured.offered
            );
        }
    }
    Ok(())
}

fn revoke(network: &Network, progress: &mut Progress, granted: &[Granted], held: &[Held]) -> Result<Ended> {
    let event = find(granted, EVENT.title)?;
    let id = event.allocation.id;
    progress.step("revoking the live event's level")?;
    network.qos(progress, &format!("revoke {id}"))?;
    let after = measure(progress, &[event.flows[0].1.flow()], SHORT_WARM_UP, SHORT_WINDOW)?.remove(0);
    let before = held_by(held, EVENT.title)?.measured.achieved;
    Ok(Ended { title: EVENT.title, id, before, after: after.achieved })
}

fn expire(network: &Network, progress: &mut Progress, granted: &[Granted], held: &[Held]) -> Result<Ended> {
    let patch = find(granted, PATCH.title)?;
    let id = patch.allocation.id;
    let end = patch.allocation.expires_at.context("the level was granted for a while only")?;
    progress.step("waiting for the game patch's level to expire")?;
    let flow = patch.flows[0].1.flow();
    let left = Duration::try_from(end.duration_since(Timestamp::now())).unwrap_or_default();
    // What it got before is what everybody saw then; it is measured again, since the event's level
    // has gone and the link's rest has grown.
    let spare = left.saturating_sub(SHORT_WINDOW + AFTER_EXPIRY);
    let before = if spare > Duration::ZERO {
        measure(progress, &[flow], spare.min(SHORT_WARM_UP), SHORT_WINDOW)?.remove(0).achieved
    } else {
        held_by(held, PATCH.title)?.measured.achieved
    };
    let left = Duration::try_from(end.duration_since(Timestamp::now())).unwrap_or_default();
    progress.wait("waiting for the end of the level", left + AFTER_EXPIRY)?;
    let after = measure(progress, &[flow], SHORT_WARM_UP, SHORT_WINDOW)?.remove(0);
    network.ask("status").context("the daemon must answer after an expiry")?;
    Ok(Ended { title: PATCH.title, id, before, after: after.achieved })
}

fn statistics(network: &Network) -> Result<Statistics> {
    serde_json::from_value(network.ask("stats")?).context("reading what `qos stats` says")
}

fn latency_of(held: &[Held], title: &str) -> Result<Latency> {
    held_by(held, title)?.measured.latency.clone().with_context(|| format!("no packet of {title} arrived"))
}

fn held_by<'h>(held: &'h [Held], title: &str) -> Result<&'h Held> {
    held.iter().find(|held| held.title == title).with_context(|| format!("{title} was not measured"))
}

fn find<'g>(granted: &'g [Granted], title: &str) -> Result<&'g Granted> {
    granted.iter().find(|granted| granted.title == title).with_context(|| format!("{title} was not granted"))
}
