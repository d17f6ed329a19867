//! nftables, to compare with: rules as it has them are a set of concatenated intervals at the ingress hook of an interface, which is
//! the earliest place it has.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::ops::{ControlFlow, RangeInclusive};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use qos_tests::classbench::{Prefix, TupleRule};
use qos_tests::netns::Namespace;
use qos_tests::topology::LAN;

/// How long loading may take.
const TIME: Duration = Duration::from_secs(120);

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accept,
    Drop,
}

/// Those of IPv4 rules that one set holds, in their order, which is what decides where several match.
///
/// The kernel refuses an element whose first or last packet lies in one that is there
/// (`nft_pipapo_insert`, net/netfilter/nft_set_pipapo.c, Linux 6.1). A rule that begins before another and
/// ends behind it may follow it.
pub(crate) fn holdable(rules: &[TupleRule]) -> Vec<TupleRule> {
    // By the lengths of both prefixes, then by the prefixes.
    let mut there: BTreeMap<[u8; 2], HashMap<[u128; 2], Vec<TupleRule>>> = BTreeMap::new();
    let is_in = |corner: [u128; 2], ports: [u16; 2], protocol: u8, rule: &TupleRule| {
        rule.source.contains(corner[0])
            && rule.destination.contains(corner[1])
            && between(rule.source_ports).contains(&ports[0])
            && between(rule.destination_ports).contains(&ports[1])
            && rule.protocol.is_none_or(|named| named == protocol)
    };
    let mut held = Vec::new();
    for rule in rules {
        let corners = [0, 1].map(|end| {
            let addresses = [rule.source, rule.destination].map(|prefix| ends(prefix)[end]);
            let ports = [rule.source_ports[end], rule.destination_ports[end]];
            (addresses, ports, rule.protocol.unwrap_or([0, u8::MAX][end]))
        });
        let is_refused = there.iter().any(|(lengths, table)| {
            corners.iter().any(|(addresses, ports, protocol)| {
                let key = [0, 1].map(|side| ends(first_bits(addresses[side], lengths[side]))[0]);
                let list = table.get(&key).map_or(&[][..], Vec::as_slice);
                list.iter().any(|rule| is_in(*addresses, *ports, *protocol, rule))
            })
        });
        if !is_refused {
            let table = there.entry([rule.source.length, rule.destination.length]).or_default();
            table.entry([rule.source.bits, rule.destination.bits]).or_default().push(*rule);
            held.push(*rule);
        }
    }
    held
}

/// First and last address of an IPv4 prefix.
fn ends(prefix: Prefix) -> [u128; 2] {
    [
        prefix.bits,
        prefix.bits | (u128::from(u32::MAX) << 96) & u128::MAX.checked_shr(prefix.length.into()).unwrap_or(0),
    ]
}

fn first_bits(address: u128, length: u8) -> Prefix {
    Prefix { bits: address & !u128::MAX.checked_shr(length.into()).unwrap_or(0), length }
}

fn between([first, last]: [u16; 2]) -> RangeInclusive<u16> {
    first..=last
}

/// A rule set: what the set has gets `verdict`, and is counted; the rest gets `rest`.
pub(crate) fn text(rules: &[TupleRule], verdict: Verdict, rest: Verdict) -> Result<String> {
    let name = |verdict| if verdict == Verdict::Accept { "accept" } else { "drop" };
    let mut text = String::from("table netdev bench {\n");
    if !rules.is_empty() {
        text.push_str(
            "set rules { type ipv4_addr . ipv4_addr . inet_service . inet_service . inet_proto; \
             flags interval; elements = {\n",
        );
        for rule in rules {
            let [source, destination] = [rule.source, rule.destination]
                .map(|prefix| range(ends(prefix).map(|bits| Ipv4Addr::from_bits((bits >> 96) as u32))));
            let [from, to] = [rule.source_ports, rule.destination_ports].map(range);
            let protocol = range(rule.protocol.map_or([0, u8::MAX], |protocol| [protocol; 2]));
            writeln!(text, "{source} . {destination} . {from} . {to} . {protocol},")?;
        }
        text.push_str("}\n}\n");
    }
    writeln!(
        text,
        "chain ingress {{ type filter hook ingress device {LAN} priority 0; policy {};",
        name(rest)
    )?;
    if !rules.is_empty() {
        writeln!(
            text,
            "ip saddr . ip daddr . th sport . th dport . meta l4proto @rules counter {}",
            name(verdict)
        )?;
    }
    text.push_str("}\n}\n");
    Ok(text)
}

fn range<T: PartialEq + std::fmt::Display>([first, last]: [T; 2]) -> String {
    if first == last { first.to_string() } else { format!("{first}-{last}") }
}

/// Loads a rule set; returns how long it took, or why there is none.
pub(crate) fn load(namespace: &Namespace, text: &str) -> Result<ControlFlow<String, Duration>> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), text)?;
    let complaints = tempfile::NamedTempFile::new()?;
    let mut command = Command::new("nft");
    command
        .arg("-f")
        .arg(file.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(complaints.reopen()?);
    let begin = Instant::now();
    let Ok(mut nft) = namespace.run(|| command.spawn()) else {
        return Ok(ControlFlow::Break("nftables: no `nft` on this machine".to_owned()));
    };
    let status = loop {
        if let Some(status) = nft.try_wait()? {
            break status;
        }
        if begin.elapsed() > TIME {
            nft.kill()?;
            nft.wait()?;
            let reason = format!("nftables: nft had not loaded them after {} s", TIME.as_secs());
            return Ok(ControlFlow::Break(reason));
        }
        thread::sleep(Duration::from_millis(10));
    };
    if status.success() {
        return Ok(ControlFlow::Continue(begin.elapsed()));
    }
    let reason = std::fs::read_to_string(complaints.path())?;
    let reason = reason.lines().next().unwrap_or("");
    Ok(ControlFlow::Break(format!("nftables: nft refused the rule set: {reason}")))
}

/// Packets that the set has had.
pub(crate) fn counted(namespace: &Namespace) -> Result<u64> {
    let mut command = Command::new("nft");
    command.args(["list", "chain", "netdev", "bench", "ingress"]).stdin(Stdio::null());
    let output = namespace.output(command)?;
    ensure!(output.status.success(), "nft list: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let count = text.split_once("counter packets ").and_then(|(_, rest)| rest.split(' ').next());
    count.context("nft shows no counter")?.parse().context("nft's counter")
}
