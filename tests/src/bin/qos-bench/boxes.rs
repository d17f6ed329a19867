//! Packets a second through each kind of gateway box, with the real qosd and without.
//!
//! The boxes are those of the tests ([`Kind`]). Of each kind there are four alike that differ in what
//! qosd does on them, and rounds go round them, either direction. One flow: what costs is the way of a
//! packet through this kind of box; caches are warm. Many flows are `bench datapath`'s.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::programs::{ProgramFd, loaded_programs};
use clap::ValueEnum as _;
use qos_tests::api::Client;
use qos_tests::boxes::{HOME, Kind, OUTSIDE, VIDEO};
use qos_tests::daemon::Daemon;
use qos_tests::frames::FrameSpec;
use qos_tests::netlink::{Link, Mac, Netlink};
use qos_tests::topology::{HOST_LINK, Host, Topology, WIRE};
use qos_tests::tunnel::Layer;
use qos_userspace::domain::{AllocationId, BitsPerSecond};
use serde::Serialize;
use serde_json::json;

use crate::live::Path;
use crate::median;
use crate::programs::Driver;

const CAPACITY: BitsPerSecond = BitsPerSecond(100_000_000_000);
/// Of levels and lines: more than one CPU forwards.
const RATE: &str = "50gbit";
/// Time of one round of one box and direction: short, so that what disturbs the machine disturbs all.
const ROUND: Duration = Duration::from_millis(100);
/// IP length of packets; that of jumbo frames is what a live frame has room for.
const LENGTH: u16 = 100;
const JUMBO: u16 = 3_000;
/// Allocations that nothing matches, each with a rule up and one down.
const RULES: u32 = 1_000;
/// Ports of the subscriber and the provider.
const PORTS: [u16; 2] = [4_000, 5_000];
const DIRECTIONS: [&str; 2] = ["up", "down"];

/// Everything that one run measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    kernel: String,
    cpus: usize,
    rounds: usize,
    figures: Vec<Figure>,
    skipped: Vec<String>,
}

/// One kind of box and direction.
#[derive(Debug, Serialize)]
struct Figure {
    kind: String,
    direction: &'static str,
    /// Where qosd judges these packets.
    judged: String,
    /// Bytes of a frame.
    frame: usize,
    /// Packets a second without qos.
    plain: Range,
    with_qos: Vec<Cost>,
}

/// What is left with qos.
#[derive(Debug, Serialize)]
struct Cost {
    what: &'static str,
    packets_per_second: Range,
    /// Over what the box without qos forwarded in the same round.
    ratio_to_plain: Range,
    /// Nanoseconds a packet more than without qos in the same round.
    added_ns: Range,
}

#[derive(Debug, Serialize)]
struct Range {
    median: f64,
    min: f64,
    max: f64,
}

impl Range {
    fn of(mut values: Vec<f64>) -> Self {
        let median = median(&mut values);
        let at = |place: Option<&f64>| place.copied().unwrap_or(f64::NAN);
        Self { median, min: at(values.first()), max: at(values.last()) }
    }
}

/// What qosd does on a box.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// There is none.
    Plain,
    /// One policed allocation matches, below its rate.
    Grant,
    /// The same, and the subscriber has a line.
    Line,
    /// Nothing matches.
    Rules,
}

impl Work {
    const WITH_QOS: [Self; 3] = [Self::Grant, Self::Line, Self::Rules];

    const fn name(self) -> &'static str {
        match self {
            Self::Plain => "no qos",
            Self::Grant => "one policed grant",
            Self::Line => "the same on a line",
            Self::Rules => "no match, 1,000 rules",
        }
    }
}

/// One box.
struct Gateway {
    work: Work,
    /// Dropped before the network.
    daemon: Option<Daemon>,
    net: Topology,
    ways: Vec<Way>,
}

/// One direction through it.
struct Way {
    direction: &'static str,
    judged: String,
    frame: Vec<u8>,
    from: u32,
    to: &'static str,
    /// What the driving program goes on with.
    target: ProgramFd,
    allocation: Option<AllocationId>,
    forwarded: u64,
    rates: Vec<f64>,
}

/// Measures kinds of boxes one after the other.
pub(crate) fn measure(kinds: &[Kind], rounds: usize) -> Result<Report> {
    ensure!(rounds > 0, "one round at least");
    let mut report = Report {
        kernel: nix::sys::utsname::uname()?.release().to_string_lossy().into_owned(),
        cpus: std::thread::available_parallelism()?.get(),
        rounds,
        figures: Vec::new(),
        skipped: Vec::new(),
    };
    for kind in kinds {
        measure_kind(*kind, &mut report).with_context(|| name(*kind))?;
    }
    Ok(report)
}

fn name(kind: Kind) -> String {
    kind.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn measure_kind(kind: Kind, report: &mut Report) -> Result<()> {
    let mut driver = Driver::load()?;
    let mut gateways = Vec::new();
    for work in [Work::Plain].into_iter().chain(Work::WITH_QOS) {
        match Gateway::new(kind, work, &mut driver)? {
            Ok(gateway) => gateways.push(gateway),
            Err(reason) => {
                report.skipped.push(format!("{}: {reason}", name(kind)));
                return Ok(());
            }
        }
    }
    if is_layer3(kind) {
        let reason = "live frames come in with an Ethernet header; going up they are counted where the device takes them";
        report.skipped.push(format!("{}, down: {reason}", name(kind)));
    }
    // The first round warms caches, and lets masquerading learn of the flow before it is answered.
    for round in 0..=report.rounds {
        for gateway in &mut gateways {
            gateway.run(&mut driver, round > 0)?;
        }
    }
    for gateway in &gateways {
        gateway.all_was_matched()?;
    }
    let ways = gateways[0].ways.len();
    report.figures.extend((0..ways).map(|way| figure(kind, &gateways, way)));
    Ok(())
}

fn figure(kind: Kind, gateways: &[Gateway], way: usize) -> Figure {
    let [plain, with_qos @ ..] = gateways else { unreachable!("one box without qos is made first") };
    let plain = &plain.ways[way];
    let cost = |gateway: &Gateway| {
        let rates = &gateway.ways[way].rates;
        let rounds = || rates.iter().zip(&plain.rates);
        Cost {
            what: gateway.work.name(),
            packets_per_second: Range::of(rates.clone()),
            ratio_to_plain: Range::of(rounds().map(|(with, plain)| with / plain).collect()),
            added_ns: Range::of(rounds().map(|(with, plain)| 1e9 / with - 1e9 / plain).collect()),
        }
    };
    Figure {
        kind: name(kind),
        direction: plain.direction,
        judged: with_qos[0].ways[way].judged.clone(),
        frame: plain.frame.len(),
        plain: Range::of(plain.rates.clone()),
        with_qos: with_qos.iter().map(cost).collect(),
    }
}

impl Gateway {
    fn new(kind: Kind, work: Work, driver: &mut Driver) -> Result<Result<Self, String>> {
        let net = match kind.build()? {
            Ok(net) => net,
            Err(reason) => return Ok(Err(reason)),
        };
        let daemon = match work {
            Work::Plain => None,
            _ => Some(start(kind, &net)?),
        };
        let hosts = [net.subscriber("home"), net.provider("video")];
        for host in hosts {
            end_at(host, driver)?;
        }
        let mut netlink = Netlink::open(&net.gateway)?;
        let directions = if is_layer3(kind) { &DIRECTIONS[..1] } else { &DIRECTIONS };
        let mut ways = Vec::new();
        for (&direction, [here, there]) in directions.iter().zip([[0, 1], [1, 0]]) {
            let link = kind.links()[here];
            let mut way = Way {
                direction,
                judged: String::new(),
                frame: frame(kind, [hosts[here], hosts[there]], direction)?,
                from: wire(&mut netlink, &format!("{WIRE}-{link}"), link)?.index,
                to: kind.links()[there],
                target: driver.own_fd("bench_empty")?,
                allocation: None,
                forwarded: 0,
                rates: Vec::new(),
            };
            if let Some(daemon) = &daemon {
                let status = daemon.status()?.gateway;
                let interface = status.interfaces.iter().find(|interface| interface.name == link);
                let interface = interface.with_context(|| format!("qosd has no {link}"))?;
                way.judged = match interface.judged.as_str() {
                    "xdp" => format!("XDP {}, {}", interface.xdp, interface.tc),
                    judged => format!("{judged}, {}", interface.tc),
                };
                if interface.xdp == "native" {
                    way.target = xdp_program(&netlink.link(link)?)?;
                }
            }
            ways.push(way);
        }
        let mut gateway = Self { work, daemon, net, ways };
        gateway.set_up(kind)?;
        Ok(Ok(gateway))
    }

    /// Gives the daemon its work.
    fn set_up(&mut self, kind: Kind) -> Result<()> {
        let Some(daemon) = &self.daemon else { return Ok(()) };
        let v6 = is_v6(kind);
        let [home, video] = [HOME, VIDEO].map(|addresses| addresses[usize::from(v6)]);
        daemon.qos_line(&format!("provider add video --kind application --network {video}"))?;
        if self.work == Work::Line {
            daemon.qos_line(&format!("session add home --address {home} --down {RATE} --up {RATE}"))?;
        }
        let flow = |subscriber: &str, direction| {
            let ends = [(subscriber, PORTS[0]), (video, PORTS[1])].map(|(address, port)| match v6 {
                true => format!("[{address}]:{port}"),
                false => format!("{address}:{port}"),
            });
            let [from, to] = if direction == "up" { [&ends[0], &ends[1]] } else { [&ends[1], &ends[0]] };
            format!("{direction} udp from {from} to {to}")
        };
        if self.work == Work::Rules {
            let mut client = Client::connect(&daemon.socket())?;
            for number in 0..RULES {
                let subscriber = if v6 {
                    format!("2001:db8:40::{number:x}")
                } else {
                    std::net::Ipv4Addr::from(0x0a40_0000 + number).to_string()
                };
                let body = json!({
                    "provider": "video",
                    "selectors": DIRECTIONS.map(|direction| flow(&subscriber, direction)),
                    "level": {"maximum": {"down": RATE, "up": RATE}, "enforcement": "police"},
                });
                let answer = client.ask("POST", "/v1/allocations", Some(&body))?;
                ensure!(answer.status == 201, "{body}: {} {}", answer.status, answer.body);
            }
            return Ok(());
        }
        for way in &mut self.ways {
            let (flow, direction) = (flow(home, way.direction), way.direction);
            let level =
                format!("--provider video --flow '{flow}' --max-{direction} {RATE} --enforcement police");
            way.allocation = Some(daemon.grant(&level)?.id);
        }
        Ok(())
    }

    /// One round, each direction.
    fn run(&mut self, driver: &mut Driver, counts: bool) -> Result<()> {
        for way in &mut self.ways {
            driver.set_frame(&way.frame)?;
            driver.set_target(&way.target, true)?;
            let path = Path {
                gateway: &self.net.gateway,
                program: "bench_frame",
                frame: &way.frame,
                from: way.from,
                to: way.to,
            };
            let forwarded = driver
                .forward(&path, ROUND)
                .with_context(|| format!("{}, {}", self.work.name(), way.direction))?;
            way.forwarded += forwarded.left;
            if counts {
                way.rates.push(forwarded.per_second);
            }
        }
        Ok(())
    }

    /// What was measured must have been what it is called.
    fn all_was_matched(&self) -> Result<()> {
        let Some(daemon) = &self.daemon else { return Ok(()) };
        let statistics = daemon.statistics()?;
        for (way, allocation) in self.ways.iter().filter_map(|way| Some((way, way.allocation?))) {
            let counts = statistics
                .allocations
                .get(&allocation)
                .with_context(|| format!("no counts of {allocation}"))?;
            let counts = if way.direction == "up" { &counts.up } else { &counts.down };
            ensure!(
                counts.passed.packets >= way.forwarded && counts.dropped.packets == 0,
                "{}, {}: {} packets left, counted were {counts:?}",
                self.work.name(),
                way.direction,
                way.forwarded,
            );
        }
        if self.work == Work::Rules {
            let matched = statistics
                .allocations
                .values()
                .find(|counts| counts.up.passed.packets + counts.down.passed.packets > 0);
            ensure!(matched.is_none(), "{}: an allocation matched: {matched:?}", self.work.name());
        }
        Ok(())
    }
}

fn start(kind: Kind, net: &Topology) -> Result<Daemon> {
    let mut config = kind.config();
    (config.lan_capacity, config.wan_capacity) = (CAPACITY, CAPACITY);
    config.more.push_str("\nrequire_session = false");
    Daemon::start(&net.gateway, &config)
}

/// Whether packets have no Ethernet header on the WAN.
fn is_layer3(kind: Kind) -> bool {
    kind.expected()[1].2 == "layer3"
}

fn is_v6(kind: Kind) -> bool {
    kind.families()[0]
}

/// The link `below`, or `name` where there is none.
fn wire(netlink: &mut Netlink, below: &str, name: &str) -> Result<Link> {
    let links = netlink.links()?;
    let find = |name: &str| links.iter().find(|link| link.name == name).cloned();
    find(below).or_else(|| find(name)).with_context(|| format!("no link {name}"))
}

/// Ends what comes to a host.
fn end_at(host: &Host, driver: &mut Driver) -> Result<()> {
    let mut netlink = Netlink::open(&host.namespace)?;
    let link = wire(&mut netlink, WIRE, HOST_LINK)?;
    // A tun device has no XDP; one that is down refuses what the pump brings.
    if link.mac == Mac::default() {
        return netlink.set_down(link.index);
    }
    driver.drop_at(&host.namespace, &link.name)
}

/// A packet as the gateway receives it.
fn frame(kind: Kind, [from, to]: [&Host; 2], direction: &str) -> Result<Vec<u8>> {
    let v6 = usize::from(is_v6(kind));
    let up = direction == "up";
    let addresses = match (kind, up) {
        (_, true) => [HOME[v6], VIDEO[v6]],
        (Kind::Nat, false) => [VIDEO[v6], OUTSIDE[v6]],
        (_, false) => [VIDEO[v6], HOME[v6]],
    };
    let [source, destination]: [Result<IpAddr, _>; 2] = addresses.map(str::parse);
    let macs = match kind.has_addresses() {
        true => (from.mac, from.gateway_mac),
        // Of the wires, which a bridge joins.
        false => (from.gateway_mac, to.gateway_mac),
    };
    let ports = if up { (PORTS[0], PORTS[1]) } else { (PORTS[1], PORTS[0]) };
    let length = if kind == Kind::RouterJumbo { JUMBO } else { LENGTH };
    let packet = FrameSpec { length, ..FrameSpec::udp(macs, (source?, destination?), ports) }.build()?;
    let around = kind.encapsulation()[usize::from(!up)].clone();
    Ok(match around.as_ref().map(|around| (around, around.layer())) {
        None => packet,
        Some((around, Layer::Two)) => around.wrap(&packet, macs),
        Some((around, Layer::Three)) => around.wrap(&packet[14..], macs),
    })
}

/// The XDP program of a link.
fn xdp_program(link: &Link) -> Result<ProgramFd> {
    for program in loaded_programs() {
        let program = program?;
        if Some(program.id()) == link.xdp {
            return Ok(program.fd()?);
        }
    }
    anyhow::bail!("{} has no XDP program", link.name)
}

#[expect(clippy::print_stdout, reason = "a program that reports to its terminal")]
pub(crate) fn print(report: &Report) {
    let Report { kernel, cpus, rounds, .. } = report;
    println!(
        "kernel {kernel}, {cpus} CPUs, medians (least to most) of {rounds} rounds in turn; one flow, one CPU\n"
    );
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    let header = ["box", "way", "judged", "bytes", "no qos, packets/s"].into_iter();
    table.set_header(header.chain(Work::WITH_QOS.map(Work::name)));
    for figure in &report.figures {
        let mut row = vec![
            figure.kind.clone(),
            figure.direction.to_owned(),
            figure.judged.clone(),
            figure.frame.to_string(),
            format!("{:.0}", figure.plain.median),
        ];
        row.extend(figure.with_qos.iter().map(|cost| {
            let Range { median, min, max } = &cost.ratio_to_plain;
            format!("{median:.2}× ({min:.2} to {max:.2}) {:+.0} ns", cost.added_ns.median)
        }));
        table.add_row(row);
    }
    println!("{table}");
    for line in &report.skipped {
        println!("skipped: {line}");
    }
}
