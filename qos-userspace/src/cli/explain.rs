//! `qos explain`: what becomes of a packet, and why, by the loaded program itself.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::CliError;
use super::args::{Endpoint, code_point, protocol};
use super::client::Client;
use super::output::Output;
use super::packet::{self, Flow, Packet};
use crate::api::types::{DirectionName, ExplainRequest, Explained};
use crate::domain::selector::grammar::protocol_name;
use crate::domain::{BitsPerSecond, Direction, dscp};
use crate::hex;
use crate::manager::report::Explanation;
use crate::plural::counted;

/// Tells what becomes of a packet, and why
///
/// The loaded program itself classifies the packet and says what it would do at this moment;
/// nothing is charged or counted. The packet is built from addresses and ports, or given as
/// hexadecimal digits, or taken from a capture.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  qos explain --direction down --protocol udp --source 203.0.113.7:5004 --destination 192.0.2.10:4000
  qos explain --direction up --pcap trace.pcap --packet 3
  xclip -o | qos explain --direction down --hex - --layer3")]
pub(super) struct Explain {
    /// Which way the packet goes: from the subscriber, or to the subscriber
    #[arg(long, value_enum)]
    direction: Way,
    /// Protocol of the packet
    #[arg(long, value_name = "NAME", value_parser = protocol, requires = "source", required_unless_present_any = ["hex", "pcap"])]
    protocol: Option<u8>,
    /// Its source, with the port where the protocol has ports
    #[arg(long, value_name = "ADDRESS[:PORT]", requires = "destination")]
    source: Option<Endpoint>,
    /// Its destination, likewise
    #[arg(long, value_name = "ADDRESS[:PORT]", requires = "protocol")]
    destination: Option<Endpoint>,
    /// Its code point
    #[arg(long, value_name = "NAME", value_parser = code_point, requires = "protocol")]
    dscp: Option<u8>,
    /// Its IP length in bytes; else as short as can be
    #[arg(long, value_name = "BYTES", requires = "protocol")]
    length: Option<u16>,
    /// The packet in hexadecimal digits, from its Ethernet header; `-` reads standard input
    #[arg(long, value_name = "DIGITS", conflicts_with_all = ["protocol", "pcap"])]
    hex: Option<String>,
    /// The digits begin at the IP header
    #[arg(long, requires = "hex")]
    layer3: bool,
    /// A capture, pcap or pcapng
    #[arg(long, value_name = "FILE", conflicts_with = "protocol")]
    pcap: Option<PathBuf>,
    /// Which packet of the capture, from 1
    #[arg(long, value_name = "N", default_value_t = 1, requires = "pcap")]
    packet: usize,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Way {
    /// From the subscriber
    Up,
    /// To the subscriber
    Down,
}

pub(super) fn run(explain: &Explain, client: &mut Client, output: &mut Output) -> Result<(), CliError> {
    let packet = packet(explain)?;
    let request = ExplainRequest {
        direction: match explain.direction {
            Way::Up => DirectionName::Up,
            Way::Down => DirectionName::Down,
        },
        packet: hex::encode(&packet.bytes),
        layer3: packet.layer3,
    };
    output.show(&client.post("/v1/explain", &request)?, print)
}

fn packet(explain: &Explain) -> Result<Packet, CliError> {
    let read = match (explain, explain.protocol, explain.source, explain.destination) {
        (Explain { hex: Some(text), layer3, .. }, ..) => packet::from_hex(text, *layer3),
        (Explain { pcap: Some(path), packet, .. }, ..) => packet::from_capture(path, *packet),
        (_, Some(protocol), Some(source), Some(destination)) => packet::build(Flow {
            protocol,
            source,
            destination,
            dscp: explain.dscp.unwrap_or(0),
            length: explain.length,
        }),
        _ => {
            let message = "name the packet: --protocol, --source and --destination, or --hex, or --pcap";
            return Err(CliError::Usage(message.to_owned()));
        }
    };
    read.map_err(|error| CliError::Usage(error.to_string()))
}

fn print(output: &mut Output, explained: Explained) -> Result<(), CliError> {
    let Explained { explanation, allocation, line } = explained;
    let selector = allocation.as_ref().zip(explanation.selector).map(|(allocation, index)| {
        let text = allocation.selectors.get(index as usize).map(ToString::to_string).unwrap_or_default();
        format!("{index}: {text}")
    });
    let named = allocation.as_ref().map(|allocation| {
        let application = allocation.application.as_ref().map(|name| format!("/{name}")).unwrap_or_default();
        format!("{} of {}{application}", allocation.id, allocation.provider)
    });
    let level = allocation.as_ref().map(|allocation| {
        let direction =
            if explanation.direction == "up" { Direction::Upstream } else { Direction::Downstream };
        let rate = |name, rate: Option<BitsPerSecond>| rate.map(|rate| format!("{name} {rate}"));
        let parts = [
            rate("guaranteed", *allocation.level.guaranteed.get(direction)),
            rate("maximum", *allocation.level.maximum.get(direction)),
            Some(format!("priority {}", allocation.level.priority)),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    });
    let unmatched = allocation.is_none().then(|| "none: it shares what is left".to_owned());
    let profile = match (explanation.allocation, explanation.in_profile) {
        (None, _) => "",
        (Some(_), true) => ", in profile",
        (Some(_), false) => ", not in profile",
    };
    let way = explanation.way.join("\n");
    output.pairs(vec![
        ("packet", Some(as_read(&explanation))),
        ("allocation", named.or(unmatched)),
        ("selector", selector),
        ("level", level),
        ("outcome", Some(format!("{}{profile}", explanation.outcome.replace('_', " ")))),
        ("charged", Some(format!("{} bytes", explanation.charged))),
        (
            "line",
            Some(
                line.map_or_else(|| "none: no session has the subscriber's address".to_owned(), String::from),
            ),
        ),
        ("class", Some(explanation.class.unwrap_or_else(|| "none: it passes by all queues".to_owned()))),
        (
            "looked at",
            Some(format!(
                "{}, {}, {}; {} more had matched and are expired",
                counted(explanation.tables, "table"),
                counted(explanation.forks, "fork"),
                counted(explanation.rules, "rule"),
                explanation.expired
            )),
        ),
        ("way", (!way.is_empty()).then_some(way)),
    ])
}

/// The packet as the program read it.
fn as_read(explanation: &Explanation) -> String {
    let Some((source, destination)) = explanation.source.zip(explanation.destination) else {
        return format!("{}, could not be read", explanation.direction);
    };
    let endpoint = |address, port: Option<u16>| match port {
        Some(port) => SocketAddr::new(address, port).to_string(),
        None => address.to_string(),
    };
    let mut text = explanation.direction.clone();
    if let Some(protocol) = explanation.protocol {
        text.push(' ');
        text.push_str(&protocol_name(protocol));
    }
    text.push_str(&format!(
        " from {} to {}",
        endpoint(source, explanation.source_port),
        endpoint(destination, explanation.destination_port)
    ));
    if let Some(value) = explanation.dscp {
        text.push_str(&format!(" dscp {}", dscp::name(value)));
    }
    if let Some(length) = explanation.length {
        text.push_str(&format!(", {length} bytes"));
    }
    if explanation.fragment {
        text.push_str(", ports not seen");
    }
    text
}
