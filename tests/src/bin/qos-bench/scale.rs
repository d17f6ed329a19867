//! Many lines and many shaped allocations with the real qosd: how long they take to come up, what a
//! grant takes at the kernel, and what packets notice of it.
//!
//! What a grant takes at the kernel is qosd's own time from the decision, written to the store, to the
//! end of all that is done in maps and trees (its log at `debug`). Packets are those of a paced flow on
//! a line of its own, watched in turns with and without grants and revokes going on.
//!
//! The baseline is the kernel alone: the same classes and queues on the same interfaces, asked for by
//! nothing but this program, and what each of these grants makes.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netlink_packet_core::{DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcMessage, TcOption};
use qos_tests::api::Client;
use qos_tests::daemon::{Config, Daemon};
use qos_tests::netlink::Netlink;
use qos_tests::topology::{LAN, Topology, WAN};
use qos_tests::traffic::{Measured, RunningUdp, UdpFlow};
use qos_userspace::domain::units::BitsPerSecond;
use serde::Serialize;
use serde_json::json;

use crate::gateway::CAPACITY;

/// Of the flow that is watched: packets of 200 bytes, four a millisecond.
const PACE: BitsPerSecond = BitsPerSecond(4 * 1_000 * 214 * 8);
const PACKET: u32 = 200;
/// A window without and one with grants, so often.
const ROUNDS: usize = 5;
const WINDOW: Duration = Duration::from_secs(3);
/// In which it is counted how long no packet came.
const BIN: Duration = Duration::from_micros(500);

/// Of 1 Mbit/s, on 20 Mbit/s, of which the line's rest has a part.
const MOST_ON_A_LINE: u32 = 16;

/// Parent of a root qdisc (`TC_H_ROOT`).
const ROOT_PARENT: u32 = u32::MAX;
/// Minor numbers of classes (docs/adr/0005, 0011 and 0015): of divided lines, of the others, and of
/// allocations.
const FIRST_LINE: u32 = 0x10;
const FIRST_UNDIVIDED: u32 = 0x2000;
const FIRST_LEAF: u32 = 0x4000;
/// Lines in the root, and in each group.
const GROUP_LINES: u32 = 1_024;
/// Between two grants of the baseline, which has neither requests nor a store.
const BARE_PAUSE: Duration = Duration::from_micros(500);

/// Everything that one run measured. Times are in milliseconds.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    kernel: String,
    cpus: usize,
    lines: u32,
    allocations: u32,
    /// From the first request to the answer of the last, one after the other, store included.
    lines_by_requests: f64,
    /// Of that, at the kernel.
    lines_by_requests_at_the_kernel: f64,
    /// From the start of qosd, with all lines in its store and nothing in the kernel, to its answer.
    lines_at_start: f64,
    /// The kernel alone, for what qosd had made then.
    lines_alone: f64,
    /// All grants, at the kernel.
    grants: Spread,
    /// The last tenth of them.
    last_grants: Spread,
    /// The kernel alone, for what each of them makes: three classes and two queues where it is the first on
    /// its line, else one of each.
    grants_alone: Spread,
    last_grants_alone: Spread,
    /// The last tenth, from request to answer.
    last_answers: Spread,
    /// Grants and revokes while all allocations are there, at the kernel.
    changes: Spread,
    /// The paced flow while nothing is granted, and while it is: a round each.
    quiet: Vec<Stream>,
    granting: Vec<Stream>,
    /// From the start of a qosd that takes over what is in the kernel to its answer.
    restart: f64,
    /// The same after `kill -9`.
    restart_after_kill: f64,
}

#[derive(Debug, Serialize)]
struct Spread {
    count: usize,
    median: f64,
    p99: f64,
    max: f64,
}

/// What a window of the paced flow showed.
#[derive(Debug, Serialize)]
struct Stream {
    /// Longest time without an arrival.
    silence: f64,
    p999_latency: f64,
    max_latency: f64,
    lost: u64,
}

pub(crate) fn measure(lines: u32, allocations: u32) -> Result<Report> {
    ensure!(lines >= 2, "two lines at least: one of them is watched");
    ensure!(
        (10..=(lines - 1) * MOST_ON_A_LINE).contains(&allocations),
        "10 allocations at least, and at most {MOST_ON_A_LINE} on each line but the one that is watched"
    );
    let net = Topology::builder()
        .subscriber("watched", &["192.0.2.10"])
        .provider("video", &["203.0.113.10"])
        .build()?;
    let config = Config { lan_capacity: CAPACITY, wan_capacity: CAPACITY, ..Config::default() };
    let mut daemon = Daemon::prepare(&net.gateway, &config)?;
    let mut log = Log::default();
    start(&mut daemon)?;
    let mut client = Client::connect(&daemon.socket())?;
    let provider = json!({"name": "video", "kind": "application", "networks": ["203.0.113.0/24"]});
    post(&mut client, "/v1/providers", &provider)?;
    post(&mut client, "/v1/sessions", &session("watched", "192.0.2.10"))?;

    log.read(&daemon)?;
    let begin = Instant::now();
    for number in 1..lines {
        post(&mut client, "/v1/sessions", &session(&format!("line-{number}"), &address(number)))?;
    }
    let lines_by_requests = milliseconds(begin.elapsed());
    let lines_by_requests_at_the_kernel = log.read(&daemon)?.iter().sum();

    daemon.kill()?;
    let mut netlink = Netlink::open(&net.gateway)?;
    let Alone { lines: lines_alone, grants: mut grants_alone } = alone(&mut netlink, allocations)?;
    let _ = fs::remove_dir_all(daemon.bpffs_dir());
    let lines_at_start = start(&mut daemon)?;

    let mut client = Client::connect(&daemon.socket())?;
    log.read(&daemon)?;
    let mut answers = Vec::new();
    let mut ids = Vec::new();
    for number in 0..allocations {
        let begin = Instant::now();
        ids.push(grant(&mut client, number, lines)?);
        answers.push(milliseconds(begin.elapsed()));
    }
    let mut grants = log.read(&daemon)?;
    let last_tenth = |times: &[f64]| spread(&mut times[times.len() * 9 / 10..].to_vec());
    let (last_grants, last_answers) = (last_tenth(&grants), last_tenth(&answers));
    let last_grants_alone = last_tenth(&grants_alone);

    let (one, video) = (net.subscriber("watched"), net.provider("video"));
    let flow = UdpFlow::new((video.v4(0), 0), (one.v4(0), 5_000), PACE)
        .packet(PACKET)
        .start(&video.namespace, &one.namespace)?;
    let (mut quiet, mut granting) = (Vec::new(), Vec::new());
    let mut changes = Vec::new();
    for round in 0..ROUNDS {
        quiet.push(watch(&flow)?);
        log.read(&daemon)?;
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let change = || again(&mut client, &mut ids, round * allocations as usize / ROUNDS, lines, &stop);
            let changing = scope.spawn(change);
            let stream = watch(&flow);
            stop.store(true, Ordering::SeqCst);
            changing.join().map_err(|_| anyhow::anyhow!("the thread that grants panicked"))??;
            granting.push(stream?);
            anyhow::Ok(())
        })?;
        changes.append(&mut log.read(&daemon)?);
    }
    drop(flow);

    daemon.terminate()?;
    let restart = start(&mut daemon)?;
    daemon.kill()?;
    let restart_after_kill = start(&mut daemon)?;
    Ok(Report {
        kernel: nix::sys::utsname::uname()?.release().to_string_lossy().into_owned(),
        cpus: thread::available_parallelism()?.get(),
        lines,
        allocations,
        lines_by_requests,
        lines_by_requests_at_the_kernel,
        lines_at_start,
        lines_alone,
        grants: spread(&mut grants),
        last_grants,
        grants_alone: spread(&mut grants_alone),
        last_grants_alone,
        last_answers,
        changes: spread(&mut changes),
        quiet,
        granting,
        restart,
        restart_after_kill,
    })
}

/// What the kernel took by itself, in milliseconds.
struct Alone {
    lines: f64,
    grants: Vec<f64>,
}

/// Makes all classes and queues of both interfaces anew, and some more, and removes everything.
fn alone(netlink: &mut Netlink, allocations: u32) -> Result<Alone> {
    let indices = [netlink.link(LAN)?.index, netlink.link(WAN)?.index];
    let qdiscs = netlink.qdiscs()?;
    let mut requests = Vec::new();
    for index in indices {
        let kinds: HashMap<u32, (u32, &str)> = qdiscs
            .iter()
            .filter(|qdisc| qdisc.index == index.cast_signed())
            .map(|qdisc| (qdisc.parent, (qdisc.handle, qdisc.kind.as_str())))
            .collect();
        let (root, _) = kinds.get(&ROOT_PARENT).context("qosd had made no root")?;
        requests.push(queue(index, ROOT_PARENT, *root, "htb"));
        // By number: parents come before children, and the root's classes before the groups'.
        for found in netlink.classes(index)? {
            requests.push(class(index, found.parent, found.handle));
            if let Some((handle, kind)) = kinds.get(&found.handle) {
                requests.push(queue(index, found.handle, *handle, kind));
            }
        }
    }
    indices.into_iter().try_for_each(|index| netlink.delete_root(index))?;

    let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    let begin = Instant::now();
    for request in requests {
        netlink.request(request, flags)?;
    }
    let lines = milliseconds(begin.elapsed());

    let is_line = |minor| (FIRST_UNDIVIDED + 1..=FIRST_UNDIVIDED + GROUP_LINES).contains(&minor);
    let classes = netlink.classes(indices[0])?;
    let bare: Vec<_> = classes.iter().filter(|class| is_line(class.handle & 0xffff)).skip(1).collect();
    // Numbers of queues that nobody has.
    let taken: HashSet<u32> = qdiscs.iter().map(|qdisc| qdisc.handle >> 16).collect();
    let mut free = (1..0xffff).filter(|major| !taken.contains(major) && !is_listed_with_the_root(*major));
    let mut number = || free.next().map(|major| major << 16).context("no number is left for a queue");
    let mut grants = Vec::new();
    for (slot, (nth, line)) in (1..=allocations).zip(bare.iter().enumerate().cycle()) {
        let first = slot as usize == nth + 1;
        let major = line.handle & 0xffff_0000;
        let inner = major | (FIRST_LINE + 2 * ((line.handle & 0xffff) - FIRST_UNDIVIDED));
        let (rest, leaf) = (inner + 1, major | (FIRST_LEAF + slot));
        let (rest_queue, leaf_queue) = (number()?, number()?);
        thread::sleep(BARE_PAUSE);
        let begin = Instant::now();
        if first {
            netlink.request(class(indices[0], line.parent, inner), flags)?;
            netlink.request(class(indices[0], inner, rest), flags)?;
            netlink.request(queue(indices[0], rest, rest_queue, "bfifo"), flags)?;
        }
        netlink.request(class(indices[0], inner, leaf), flags)?;
        netlink.request(queue(indices[0], leaf, leaf_queue, "bfifo"), flags)?;
        grants.push(milliseconds(begin.elapsed()));
    }
    ensure!(grants.len() == allocations as usize, "there is no line among the classes");
    indices.into_iter().try_for_each(|index| netlink.delete_root(index))?;
    Ok(Alone { lines, grants })
}

/// Whether a qdisc of this major number makes the list longer that is walked for each class (docs/adr/0011;
/// `hash_32` with 4 bits, include/linux/hash.h, of the handle).
const fn is_listed_with_the_root(major: u32) -> bool {
    const fn list(major: u32) -> u32 {
        (major << 16).wrapping_mul(0x61c8_8647) >> 28
    }
    list(major) == list(0x5150)
}

/// A class as slow as HTB's smallest: its parameters cost nothing.
fn class(index: u32, parent: u32, handle: u32) -> RouteNetlinkMessage {
    // linux/pkt_sched.h: struct tc_htb_opt.
    const PARMS: u16 = 1;
    const RATE: u32 = 1_000;
    let mut parameters = Vec::new();
    for _ in ["rate", "ceil"] {
        // struct tc_ratespec {cell_log, link layer, overhead, cell align, smallest packet, bytes/s}.
        parameters.extend([0, 1, 0, 0, 0xff, 0xff, 0, 0]);
        parameters.extend(RATE.to_ne_bytes());
    }
    for word in [100_000_u32, 100_000, 70_000, 0, 0] {
        parameters.extend(word.to_ne_bytes());
    }
    let options = TcAttribute::Options(vec![TcOption::Other(DefaultNla::new(PARMS, parameters))]);
    RouteNetlinkMessage::NewTrafficClass(message(index, parent, handle, "htb", options))
}

/// A qdisc that is as large as qosd's of that kind.
fn queue(index: u32, parent: u32, handle: u32, kind: &str) -> RouteNetlinkMessage {
    const HTB_INIT: u16 = 2;
    const FQ_CODEL_FLOWS: u16 = 5;
    let nested = |kind, words: &[u32]| {
        let bytes = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        TcAttribute::Options(vec![TcOption::Other(DefaultNla::new(kind, bytes))])
    };
    let options = match kind {
        "htb" => nested(HTB_INIT, &[3, 10, 2, 0, 0]),
        "fq_codel" => nested(FQ_CODEL_FLOWS, &[128]),
        _ => TcAttribute::Other(DefaultNla::new(2, 60_000_u32.to_ne_bytes().to_vec())),
    };
    RouteNetlinkMessage::NewQueueDiscipline(message(index, parent, handle, kind, options))
}

fn message(index: u32, parent: u32, handle: u32, kind: &str, options: TcAttribute) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message.header.parent = parent.into();
    message.header.handle = handle.into();
    message.attributes = vec![TcAttribute::Kind(kind.to_owned()), options];
    message
}

/// Starts qosd and returns how long it took to answer.
fn start(daemon: &mut Daemon) -> Result<f64> {
    let begin = Instant::now();
    daemon.restart_with(|command| {
        command.args(["--log", "info,qos_userspace::api=debug"]);
    })?;
    Ok(milliseconds(begin.elapsed()))
}

/// What qosd wrote since the last look.
#[derive(Default)]
struct Log {
    seen: usize,
}

impl Log {
    /// Times at the kernel, in milliseconds.
    fn read(&mut self, daemon: &Daemon) -> Result<Vec<f64>> {
        let text = fs::read_to_string(daemon.log_path()).context("qosd's log")?;
        let new = text.get(self.seen..).unwrap_or_default();
        let times = new.lines().filter_map(|line| {
            let (_, time) = line.split_once("took_us=")?;
            time.trim().parse::<f64>().ok()
        });
        let times = times.map(|microseconds| microseconds / 1e3).collect();
        self.seen = text.len();
        Ok(times)
    }
}

fn address(number: u32) -> String {
    std::net::Ipv4Addr::from(0x0a40_0000 + number).to_string()
}

fn session(name: &str, address: &str) -> serde_json::Value {
    json!({"name": name, "addresses": [format!("{address}/32")], "rate": {"down": "20mbit", "up": "5mbit"}})
}

fn post(client: &mut Client, path: &str, body: &serde_json::Value) -> Result<serde_json::Value> {
    let answer = client.ask("POST", path, Some(body))?;
    ensure!(answer.status == 201, "POST {path} {body}: {} {}", answer.status, answer.body);
    Ok(answer.body)
}

/// Grants shaped allocation `number`, from zero on, line after line; returns its id.
fn grant(client: &mut Client, number: u32, lines: u32) -> Result<u64> {
    let (turn, line) = (number / (lines - 1), 1 + number % (lines - 1));
    let answer = post(
        client,
        "/v1/allocations",
        &json!({
            "provider": "video",
            "selectors": [format!("down udp from 203.0.113.10 to {}:{}", address(line), 5_000 + turn)],
            "level": {"guaranteed": {"down": "1mbit"}, "maximum": {"down": "5mbit"}, "enforcement": "shape"},
        }),
    )?;
    answer["result"]["id"].as_u64().with_context(|| format!("no id in {answer}"))
}

/// Revokes and grants anew, line after line from `first` on.
fn again(client: &mut Client, ids: &mut [u64], first: usize, lines: u32, stop: &AtomicBool) -> Result<()> {
    for number in (0..ids.len()).cycle().skip(first) {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let path = format!("/v1/allocations/{}", ids[number]);
        let answer = client.ask("DELETE", &path, None)?;
        ensure!(answer.status == 200, "DELETE {path}: {} {}", answer.status, answer.body);
        ids[number] = grant(client, number as u32, lines)?;
    }
    Ok(())
}

fn watch(flow: &RunningUdp) -> Result<Stream> {
    let measured = flow.measure(Duration::from_millis(200), WINDOW)?;
    let latency = measured.latency.as_ref().context("no packet of the watched flow arrived")?;
    Ok(Stream {
        silence: silence(&measured),
        p999_latency: milliseconds(latency.percentile(0.999)),
        max_latency: milliseconds(latency.max()),
        lost: measured.lost,
    })
}

fn silence(measured: &Measured) -> f64 {
    let (mut longest, mut now) = (0, 0);
    for rate in measured.series(BIN) {
        now = if rate.0 == 0 { now + 1 } else { 0 };
        longest = longest.max(now);
    }
    f64::from(longest) * milliseconds(BIN)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn spread(values: &mut [f64]) -> Spread {
    values.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| {
        let place = (values.len() as f64 * share) as usize;
        values.get(place.min(values.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
    };
    Spread { count: values.len(), median: at(0.5), p99: at(0.99), max: at(1.0) }
}

#[expect(clippy::print_stdout, reason = "a program that reports to its terminal")]
pub(crate) fn print(report: &Report) {
    let Report { kernel, cpus, lines, allocations, .. } = report;
    println!("kernel {kernel}, {cpus} CPUs, {lines} lines, {allocations} shaped allocations on one root\n");
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["lines up, both interfaces", "s"]);
    for (what, time) in [
        ("by requests, one after the other", report.lines_by_requests),
        ("of that, at the kernel", report.lines_by_requests_at_the_kernel),
        ("qosd started with all lines, nothing in the kernel", report.lines_at_start),
        ("the kernel alone, for the same classes", report.lines_alone),
        ("restarted with everything", report.restart),
        ("the same after kill -9", report.restart_after_kill),
    ] {
        table.add_row([what.to_owned(), format!("{:.2}", time / 1e3)]);
    }
    println!("{table}\n");
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["grants", "number", "median ms", "p99 ms", "max ms"]);
    for (what, spread) in [
        ("at the kernel, all", &report.grants),
        ("at the kernel, the last tenth", &report.last_grants),
        ("the kernel alone, for the same classes, all", &report.grants_alone),
        ("the kernel alone, the last tenth", &report.last_grants_alone),
        ("answered, the last tenth", &report.last_answers),
        ("at the kernel, revokes and grants with all there", &report.changes),
    ] {
        let number = |value: f64| format!("{value:.2}");
        let Spread { count, median, p99, max } = spread;
        table.add_row([what.to_owned(), count.to_string(), number(*median), number(*p99), number(*max)]);
    }
    println!("{table}\n");
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["paced flow, median of rounds", "silence ms", "p99.9 ms", "max ms", "lost"]);
    for (what, streams) in [("nothing granted", &report.quiet), ("grants and revokes", &report.granting)] {
        let median = |pick: fn(&Stream) -> f64| {
            format!("{:.2}", crate::median(&mut streams.iter().map(pick).collect::<Vec<_>>()))
        };
        table.add_row([
            what.to_owned(),
            median(|stream| stream.silence),
            median(|stream| stream.p999_latency),
            median(|stream| stream.max_latency),
            streams.iter().map(|stream| stream.lost).sum::<u64>().to_string(),
        ]);
    }
    println!("{table}");
}
