//! `qos grant`: gives the packets of some flows a level.

use clap::Args;
use jiff::SignedDuration;

use super::CliError;
use super::args::Flow;
use super::client::Client;
use super::level::LevelArgs;
use super::list;
use super::output::Output;
use crate::domain::{Allocation, BitsPerSecond, Directed, Name, duration};
use crate::manager::{GrantRequest, LevelRequest};

/// Gives the packets of some flows a level
///
/// The daemon checks the request against the provider's networks, the session's line, the link and
/// what is granted already, and answers with the allocation or with the reason and what is left.
///
/// A flow is written
///   [up|down] [tcp|udp|sctp|icmp|icmp6|NUMBER] [from PREFIX[:PORTS]] [to PREFIX[:PORTS]]
///   [dscp NAME|N] [length A-B]
/// or, for both directions at once,
///   between SUBSCRIBER[:PORTS] and REMOTE[:PORTS] [PROTOCOL] [dscp …] [length …]
/// `up` comes from the subscriber, `down` goes to the subscriber. What is not said is open.
/// IPv6 with ports takes brackets: [2001:db8::/64]:443.
#[derive(Debug, Args)]
#[command(
    verbatim_doc_comment,
    after_long_help = "\
Examples:
  One hour of video for one subscriber, 5 Mbit/s sure and 10 at most:
    qos grant --provider acme --app video --flow 'down udp from 203.0.113.0/24:5000-5010 to 192.0.2.10' \\
        --guaranteed-down 5mbit --max-down 10mbit --priority 1 --for 1h

  A named level for a call, both directions:
    qos grant --provider acme --flow 'between 192.0.2.10 and 203.0.113.7:4000-4999 udp' --profile voice

  A hard limit for everything of a network's subscriber, dropped and not queued:
    qos grant --provider isp --flow 'down to 192.0.2.20' --max-down 50mbit --enforcement police

  As much as there is up to 5 Mbit/s, but no less than 2, and 15 ms of delay at most, whatever priority that takes:
    qos grant --provider acme --flow 'down udp from 203.0.113.7 to 192.0.2.10' --guaranteed-down 5mbit \\
        --least-down 2mbit --delay 15ms

  What would come of it:
    qos grant --provider acme --flow 'down to 192.0.2.10' --guaranteed-down 19mbit --dry-run"
)]
pub(super) struct Grant {
    /// Who asks
    #[arg(long, value_name = "NAME")]
    provider: Name,
    /// For which of its applications
    #[arg(long, value_name = "NAME")]
    app: Option<Name>,
    /// For which packets, see above; may be given several times
    #[arg(long = "flow", value_name = "FLOW", required = true)]
    flows: Vec<Flow>,
    /// A named level; what is said beside it goes before it
    #[arg(long, value_name = "NAME")]
    profile: Option<Name>,
    #[command(flatten)]
    level: LevelArgs,
    /// The smallest guarantee to the subscriber that is of use: as much of --guaranteed-down is granted as there is
    #[arg(long, value_name = "RATE", help_heading = "Level")]
    least_down: Option<BitsPerSecond>,
    /// The smallest guarantee from the subscriber that is of use
    #[arg(long, value_name = "RATE", help_heading = "Level")]
    least_up: Option<BitsPerSecond>,
    /// Among allocations that match one packet the highest wins, then the oldest [default: 0]
    #[arg(long, value_name = "N", help_heading = "Grant")]
    precedence: Option<u16>,
    /// For how long; else until it is revoked
    #[arg(long = "for", value_name = "DURATION", value_parser = duration::parse, help_heading = "Grant")]
    duration: Option<SignedDuration>,
}

pub(super) fn run(grant: Grant, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    let answer = client.post("/v1/allocations", &request(grant))?;
    output.outcome(&answer, |output, allocation: Allocation| {
        output.line(format_args!("granted {}", allocation.id))?;
        list::details(output, &allocation)
    })
}

fn request(grant: Grant) -> GrantRequest {
    GrantRequest {
        provider: grant.provider,
        application: grant.app,
        selectors: grant.flows.into_iter().flat_map(|flow| flow.0).collect(),
        profile: grant.profile,
        level: LevelRequest {
            least: Directed { up: grant.least_up, down: grant.least_down },
            ..grant.level.request()
        },
        precedence: grant.precedence.unwrap_or(0),
        duration: grant.duration,
    }
}
