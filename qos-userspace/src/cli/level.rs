//! The arguments of a level, which `qos grant` and `qos profile add` share, and its print.

use clap::{Args, ValueEnum};

use super::args::{code_point, delay, share};
use super::output::microseconds;
use crate::domain::{BitsPerSecond, ByteCount, Directed, Enforcement, Level, dscp};
use crate::manager::LevelRequest;

#[derive(Debug, Args)]
#[command(next_help_heading = "Level")]
pub(super) struct LevelArgs {
    /// Capacity to the subscriber that is there whatever others send
    #[arg(long, value_name = "RATE")]
    guaranteed_down: Option<BitsPerSecond>,
    /// Capacity to the subscriber that is never exceeded
    #[arg(long, value_name = "RATE")]
    max_down: Option<BitsPerSecond>,
    /// Capacity from the subscriber that is there whatever others send
    #[arg(long, value_name = "RATE")]
    guaranteed_up: Option<BitsPerSecond>,
    /// Capacity from the subscriber that is never exceeded
    #[arg(long, value_name = "RATE")]
    max_up: Option<BitsPerSecond>,
    /// Bytes that may come at once, to the subscriber
    #[arg(long, value_name = "SIZE")]
    burst_down: Option<ByteCount>,
    /// Bytes that may come at once, from the subscriber
    #[arg(long, value_name = "SIZE")]
    burst_up: Option<ByteCount>,
    /// What is served first: 0 before all, 7 last
    #[arg(long, value_name = "0-7", value_parser = clap::value_parser!(u8).range(0..=7))]
    priority: Option<u8>,
    /// What becomes of traffic above the maximum
    #[arg(long, value_enum)]
    enforcement: Option<Enforce>,
    /// Code point to write into the packets: EF, AF41, CS1 or 0 to 63
    #[arg(long, value_name = "NAME", value_parser = code_point)]
    dscp: Option<u8>,
    /// Largest IP packet, in bytes: lowers TCP's segment size, and answers larger packets as a router does
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(576..))]
    mtu: Option<u16>,
    /// Longest delay that in-profile packets may meet between here and the subscriber
    #[arg(long, value_name = "TIME", value_parser = delay)]
    delay: Option<u32>,
    /// Most by which the delays of two in-profile packets may differ between here and the subscriber
    #[arg(long, value_name = "TIME", value_parser = delay)]
    jitter: Option<u32>,
    /// Largest share of in-profile packets that may be lost: 0.001 or 0.1%
    #[arg(long, value_name = "SHARE", value_parser = share)]
    loss: Option<f64>,
    /// Refuse rather than give a guarantee that is soft in the direction out of the line
    #[arg(long)]
    hard: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Enforce {
    /// It is dropped where it is classified
    Police,
    /// It queues
    Shape,
}

impl LevelArgs {
    /// What is asked, everything else open.
    pub(super) fn request(&self) -> LevelRequest {
        LevelRequest {
            guaranteed: Directed { up: self.guaranteed_up, down: self.guaranteed_down },
            least: Directed::default(),
            maximum: Directed { up: self.max_up, down: self.max_down },
            burst: Directed { up: self.burst_up, down: self.burst_down },
            priority: self.priority,
            delay_us: self.delay,
            jitter_us: self.jitter,
            loss: self.loss,
            dscp: self.dscp,
            mtu: self.mtu,
            enforcement: self.enforcement.map(|enforcement| match enforcement {
                Enforce::Police => Enforcement::Police,
                Enforce::Shape => Enforcement::Shape,
            }),
            hard: self.hard.then_some(true),
        }
    }

    /// The level as it stands by itself, with the usual values where nothing is said.
    pub(super) fn level(&self) -> Level {
        let request = self.request();
        let usual = Level::default();
        Level {
            guaranteed: request.guaranteed,
            maximum: request.maximum,
            burst: request.burst,
            priority: request.priority.unwrap_or(usual.priority),
            delay_us: request.delay_us,
            jitter_us: request.jitter_us,
            loss: request.loss,
            dscp: request.dscp,
            mtu: request.mtu,
            enforcement: request.enforcement.unwrap_or(usual.enforcement),
            hard: request.hard.unwrap_or(usual.hard),
        }
    }
}

/// What of a level is bargained for, as the arguments that ask for it.
pub(super) fn bargain(level: &LevelRequest) -> String {
    let rate = |rate: BitsPerSecond| format!("{}bit", rate.0);
    let options = [
        ("--guaranteed-down", level.guaranteed.down.map(rate)),
        ("--guaranteed-up", level.guaranteed.up.map(rate)),
        ("--burst-down", level.burst.down.map(|burst| format!("{}B", burst.0))),
        ("--burst-up", level.burst.up.map(|burst| format!("{}B", burst.0))),
        ("--priority", level.priority.map(|priority| priority.to_string())),
        ("--delay", level.delay_us.map(|delay| format!("{delay}us"))),
        ("--jitter", level.jitter_us.map(|jitter| format!("{jitter}us"))),
        ("--loss", level.loss.map(|loss| loss.to_string())),
    ];
    let said = options.into_iter().filter_map(|(option, value)| Some(format!("{option} {}", value?)));
    said.collect::<Vec<_>>().join(" ")
}

pub(super) fn enforcement(enforcement: Enforcement) -> &'static str {
    match enforcement {
        Enforcement::Police => "police",
        Enforcement::Shape => "shape",
    }
}

/// A level as pairs of names and values.
pub(super) fn pairs(level: &Level) -> Vec<(&'static str, Option<String>)> {
    let text = |value: Option<BitsPerSecond>| value.map(|rate| rate.to_string());
    let size = |value: Option<ByteCount>| value.map(|size| size.to_string());
    vec![
        ("guaranteed down", text(level.guaranteed.down)),
        ("maximum down", text(level.maximum.down)),
        ("burst down", size(level.burst.down)),
        ("guaranteed up", text(level.guaranteed.up)),
        ("maximum up", text(level.maximum.up)),
        ("burst up", size(level.burst.up)),
        ("priority", Some(level.priority.to_string())),
        ("enforcement", Some(enforcement(level.enforcement).to_owned())),
        ("dscp", level.dscp.map(dscp::name)),
        ("mtu", level.mtu.map(|mtu| format!("{mtu} B"))),
        ("delay budget", level.delay_us.map(microseconds)),
        ("jitter budget", level.jitter_us.map(microseconds)),
        ("loss budget", level.loss.map(|share| format!("{} %", share * 100.0))),
        ("hard", level.hard.then(|| "yes".to_owned())),
    ]
}
