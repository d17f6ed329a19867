//! `qos session`: subscribers' lines that are up.

use clap::builder::TypedValueParser;
use clap::{Args, Subcommand};
use ipnet::IpNet;

use super::args::{delay, one_of, prefix, share};
use super::client::Client;
use super::output::{Output, joined, microseconds};
use super::{CliError, subscribers};
use crate::api::types::Listing;
use crate::domain::session::link_layer;
use crate::domain::{BitsPerSecond, Directed, LinkLayer, Name, Session};
use crate::manager::NewSession;

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Names a line that is up
    ///
    /// The line is the bottleneck that grants are admitted against and the queues stand before.
    /// Its speed is that of its own framing: on ADSL (ATM) the sync rate, cells included.
    #[command(after_long_help = "\
Examples:
  qos session add dsl-0042 --address 192.0.2.10 --down 20mbit --up 2mbit \\
      --link-layer atm --overhead 32 --delay 8ms --loss 0.1%
  qos session add fibre-7 --address 192.0.2.20 --address 2001:db8:7::/56 --down 1gbit --up 200mbit")]
    Add(Add),
    /// Says that a line is up, and what it is now
    ///
    /// A line that is not known is named. What is granted on one that is known follows it to other
    /// addresses. Where it has become too slow for what is guaranteed on it, allocations end, the worst
    /// priority first and of that the youngest, until the others fit; each is told as a warning.
    #[command(after_long_help = "\
Examples:
  qos session start dsl-0042 --address 192.0.2.77 --down 16mbit --up 2mbit --bras bras1
  qos session start dsl-0042 --address 192.0.2.77 --down 12mbit --up 2mbit --dry-run")]
    Start(Add),
    /// Says that a line is down
    ///
    /// What is granted on it stays for the grace time (`session_grace` of the configuration), in case
    /// that the line comes back; then it ends, and the line is forgotten.
    Stop {
        /// Its name
        name: Name,
    },
    /// Shows all lines in service
    List,
    /// Shows one line in service
    Show {
        /// Its name
        name: Name,
    },
    /// Forgets a line that carries no allocation
    Remove {
        /// Its name
        name: Name,
    },
    Import(subscribers::Import),
    Find(subscribers::Find),
    Changes(subscribers::Changes),
}

#[derive(Debug, Args)]
pub(super) struct Add {
    /// Its name: 1 to 32 of a-z A-Z 0-9 . _ -
    name: Name,
    /// An address or prefix of the subscriber; may be given several times
    #[arg(long = "address", value_name = "PREFIX", required = true, value_parser = prefix, value_delimiter = ',')]
    addresses: Vec<IpNet>,
    /// Speed to the subscriber
    #[arg(long, value_name = "RATE")]
    down: BitsPerSecond,
    /// Speed from the subscriber
    #[arg(long, value_name = "RATE")]
    up: BitsPerSecond,
    /// How the line frames packets
    #[arg(long, value_parser = framing(), default_value = link_layer::name(LinkLayer::default()))]
    link_layer: LinkLayer,
    /// Bytes that a packet takes on the line above its IP length [default: 14]
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    overhead: Option<i16>,
    /// Delay of the line itself, one way
    #[arg(long, value_name = "TIME", value_parser = delay)]
    delay: Option<u32>,
    /// Share of packets that the line loses, as measured: 0.001 or 0.1%
    #[arg(long, value_name = "SHARE", value_parser = share)]
    loss: Option<f64>,
    /// A segment that the line is behind, such as its DSLAM's uplink; may be given several times
    #[arg(long = "segment", value_name = "NAME", value_delimiter = ',')]
    segments: Vec<Name>,
    /// The BRAS that the line ends at
    #[arg(long, value_name = "NAME")]
    bras: Option<String>,
}

fn framing() -> impl TypedValueParser<Value = LinkLayer> {
    let means =
        ["Whole packets", "Cells of 53 bytes with 48 of payload (ADSL)", "65 bytes for each 64 (VDSL2)"];
    one_of(link_layer::NAMES, means)
}

pub(super) fn run(verb: Verb, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    match verb {
        Verb::Add(add) => {
            let answer = client.post("/v1/sessions", &request(add))?;
            output.outcome(&answer, |output, session: Session| {
                output.line(format_args!("session {} added", session.name))
            })
        }
        Verb::Start(add) => {
            let new = request(add);
            let answer = client.put(&format!("/v1/sessions/{}", new.name), &new)?;
            output.outcome(&answer, |output, session: Session| {
                output.line(format_args!("session {} is up", session.name))
            })
        }
        Verb::Stop { name } => {
            let answer = client.post(&format!("/v1/sessions/{name}/stop"), &())?;
            output.outcome(&answer, |output, session: Session| {
                output.line(format_args!("session {} is down", session.name))
            })
        }
        Verb::List => output.show(&client.get("/v1/sessions")?, |output, sessions: Listing<Session>| {
            let mut table =
                output.table(&["NAME", "STATE", "DOWN", "UP", "LINK LAYER", "ADDRESSES"], &[2, 3]);
            for session in sessions.items {
                table.add_row([
                    session.name.to_string(),
                    if session.down_since.is_some() { "down" } else { "up" }.to_owned(),
                    session.rate.down.to_string(),
                    session.rate.up.to_string(),
                    link_layer::name(session.link_layer).to_owned(),
                    joined(&session.addresses, ", "),
                ]);
            }
            output.print(&table)
        }),
        Verb::Show { name } => {
            output.show(&client.get(&format!("/v1/sessions/{name}"))?, |output, session: Session| {
                output.pairs(vec![
                    ("name", Some(session.name.to_string())),
                    ("addresses", Some(joined(&session.addresses, "\n"))),
                    ("down", Some(session.rate.down.to_string())),
                    ("up", Some(session.rate.up.to_string())),
                    ("link layer", Some(link_layer::name(session.link_layer).to_owned())),
                    ("overhead", Some(format!("{} bytes", session.overhead))),
                    ("delay", Some(microseconds(session.delay_us))),
                    ("loss", Some(format!("{} %", f64::from(session.loss_ppm) / 10_000.0))),
                    ("BRAS", session.bras),
                    ("reported by", session.source.map(|source| source.to_string())),
                    ("last seen", session.seen_at.map(|at| at.to_string())),
                    ("down since", session.down_since.map(|at| at.to_string())),
                    ("segments", (!session.segments.is_empty()).then(|| joined(&session.segments, ", "))),
                ])
            })
        }
        Verb::Import(import) => subscribers::import(&import, client, output),
        Verb::Find(find) => subscribers::find(&find, client, output),
        Verb::Changes(changes) => subscribers::changes(&changes, client, output),
        Verb::Remove { name } => {
            let answer = client.delete(&format!("/v1/sessions/{name}"))?;
            output.outcome(&answer, |output, session: Session| {
                output.line(format_args!("session {} removed", session.name))
            })
        }
    }
}

fn request(add: Add) -> NewSession {
    NewSession {
        name: add.name,
        addresses: add.addresses,
        rate: Directed { up: add.up, down: add.down },
        link_layer: add.link_layer,
        overhead: add.overhead,
        delay_us: add.delay.unwrap_or(0),
        loss_ppm: add.loss.map_or(0, |share| (share * 1e6).round() as u32),
        segments: add.segments,
        bras: add.bras,
        source: None,
    }
}
