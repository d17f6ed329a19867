//! The loaded programs, run on packets that are not sent (`BPF_PROG_TEST_RUN`).

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use qos_common::abi::{
    self, Allocation, Answer, Counters, IN_USE, Outcome, Outcomes, POLICE, Question, directed,
};
use qos_common::classify::{Address, CHECK_PORTS, Direction, Rule, rank};
use qos_common::clock::Meter;
use qos_common::mark::MarkLayout;
use qos_tests::random::{self, Random};
use qos_tests::reference::{self, Fragment};
use qos_userspace::gateway::classifier::{self, Classifier};
use qos_userspace::gateway::memory::SharedArray;
use qos_userspace::gateway::object::{Object, remove_pins};

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;

/// The object over maps of its own, which go with it.
struct Bench {
    object: Option<Object>,
    pins: PathBuf,
    allocations: SharedArray<Allocation>,
    counters: SharedArray<Counters>,
    question: SharedArray<Question>,
    answer: SharedArray<Answer>,
    classifier: Classifier,
}

impl Bench {
    fn new(name: &str) -> Self {
        let pins = PathBuf::from(format!("/sys/fs/bpf/qos-testrun-{}-{name}", std::process::id()));
        let mut object = Object::load(&pins, abi::MAX_RULES).expect("the object loads");
        let mut settings: aya::maps::Array<_, abi::Settings> = object.take("settings").expect("settings");
        let mark = MarkLayout::new(0x000f_ffff, 0).expect("20 bits");
        settings
            .set(0, abi::Settings { abi: abi::ABI_VERSION, mark, ..Default::default() }, 0)
            .expect("sets");
        let classifier = Classifier::new(object.rule_maps().expect("maps of rules")).expect("membarrier");
        Self {
            allocations: object.shared("allocations").expect("allocations"),
            counters: object.shared("counters").expect("counters"),
            question: object.shared("question").expect("question"),
            answer: object.shared("answer").expect("answer"),
            object: Some(object),
            pins,
            classifier,
        }
    }

    fn object(&mut self) -> &mut Object {
        self.object.as_mut().expect("loaded until dropped")
    }

    fn explain(&mut self, frame: &[u8]) -> Answer {
        self.object().explain(frame).expect("runs");
        self.answer.read(0)
    }

    /// Puts an allocation's record where packets find it.
    fn put(&self, slot: u32, direction: Direction, record: Allocation) {
        self.allocations.write(directed(slot, direction), record);
    }

    fn counted(&self, slot: u32, direction: Direction) -> Counters {
        let stride = abi::ALLOCATION_SLOTS * 2;
        (directed(slot, direction)..self.counters.length())
            .step_by(stride as usize)
            .fold(Counters::default(), |sum, index| sum.plus(&self.counters.read(index)))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.object.take();
        remove_pins(&self.pins).expect("the pins are removed");
    }
}

#[test]
fn classifier_agrees_with_linear_search() {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
    };
    let (sets, packets) = (number("QOS_TEST_SETS", 1_000), number("QOS_TEST_PACKETS", 10_000));
    let seed = number("QOS_TEST_SEED", 1);
    let mut bench = Bench::new("linear");
    let mut rules: Vec<Rule> = Vec::new();
    let (mut matched, mut unread, mut passed_over) = (0u64, 0u64, 0u64);
    for set in 0..sets {
        let mut random = Random::new(seed.wrapping_mul(1_000_003).wrapping_add(set));
        bench.classifier.remove(&rules).expect("removes");
        let allocations = if set % 100 == 99 { 2_000 } else { 1 + random.below(60) };
        rules.clear();
        for id in 1..=allocations {
            let expired = random.once_in(6);
            for direction in Direction::BOTH {
                let expires_ns = if expired { 1 } else { u64::MAX };
                let record = Allocation { id, expires_ns, flags: IN_USE, ..Default::default() };
                bench.put(id as u32, direction, record);
            }
            for selector in 0..=random.below(3) as u32 {
                rules.push(random::rule(&mut random, id, selector, id as u32));
            }
        }
        bench.classifier.insert(&rules).expect("fits");
        for direction in Direction::BOTH {
            bench.question.write(0, Question { direction: direction as u32, layer3: 0 });
            for packet in 0..packets / 2 {
                let frame = random::frame(&mut random);
                let answer = bench.explain(&frame);
                let context =
                    || format!("seed {seed}, set {set}, packet {packet} {direction:?}: {frame:02x?}");
                match reference::parse(&frame, direction as u32) {
                    Err(outcome) => {
                        assert_eq!(answer.parsed, 0, "{}", context());
                        assert_eq!(answer.outcome, outcome as u32, "{outcome:?}: {}", context());
                        unread += 1;
                    }
                    Ok((key, _)) => {
                        assert_eq!((answer.parsed, answer.key), (1, key), "{}", context());
                        let live = |rule: &Rule| {
                            bench.allocations.read(directed(rule.slot, direction)).expires_ns == u64::MAX
                        };
                        let expected = reference::classify(&rules, &key, live);
                        let found = (answer.slot != 0).then_some((answer.rank, answer.slot));
                        assert_eq!(found, expected.map(|rule| (rule.rank, rule.slot)), "{}", context());
                        if answer.expired == 0 && answer.tables != 0 {
                            let way = classifier::way(bench.classifier.maps(), &key);
                            assert_eq!(way.len(), answer.tables as usize, "{way:?}, {}", context());
                        }
                        matched += u64::from(expected.is_some());
                        passed_over += u64::from(answer.expired);
                    }
                }
            }
        }
    }
    println!(
        "{sets} rule sets × {packets} packets: {matched} matched, {unread} could not be read, {passed_over} expired rules passed over"
    );
    assert!(
        matched > sets * packets / 10 && unread > sets * packets / 20 && passed_over > 0,
        "the world is too thin"
    );
}

/// Destination 198.51.100.`host`, upstream.
fn rule_to(host: u8, slot: u32) -> Rule {
    Rule {
        destination: Address::v4([198, 51, 100, host]),
        destination_length: 32,
        rank: rank(0, u64::from(slot), 0),
        slot,
        source_ports: [0, u16::MAX],
        destination_ports: [0, u16::MAX],
        lengths: [0, u16::MAX],
        ..Rule::default()
    }
}

/// A UDP datagram to 198.51.100.`host` whose IP header announces `ip_length`.
fn datagram(host: u8, ip_length: u16, port: u16) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0];
    frame.extend(ip_length.to_be_bytes());
    frame.extend([0, 7, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 198, 51, 100, host]);
    frame.extend(40_000u16.to_be_bytes());
    frame.extend(port.to_be_bytes());
    frame.extend([0; 24]);
    frame
}

fn policed(id: u64, rate: u64, burst: u64) -> Allocation {
    Allocation {
        id,
        expires_ns: u64::MAX,
        maximum: Meter::new(rate, burst),
        flags: IN_USE | POLICE,
        overhead: 14,
        ..Default::default()
    }
}

/// Bytes that passed while a packet of `ip_length` was offered without a pause for about a second,
/// and the time it took in ns.
fn flood(object: &mut Object, ip_length: u16) -> u64 {
    let frame = datagram(1, ip_length, 9);
    let start = Instant::now();
    while start.elapsed().as_millis() < 1_500 {
        object.run("qos_xdp_lan", &frame, 20_000).expect("runs");
    }
    start.elapsed().as_nanos() as u64
}

#[test]
fn clocks_hold_both_ends_of_the_range() {
    // (bit/s, IP length): the announced length is what is charged, so that few packets exceed any
    // rate. A tenth of a second of burst bridges the pauses between runs.
    for (rate, ip_length) in
        [(1_000, 28), (1_000_000, 1_500), (10_000_000_000, 65_000), (400_000_000_000, 65_000)]
    {
        let burst = (rate / 80).max(100);
        // A machine that is slow for a moment offers less than the highest rate, and one that stops for longer than
        // the burst lasts lets less pass: one of several runs has to reach the rate, none may exceed it.
        let reached = (0..8).any(|_| {
            let mut bench = Bench::new(&format!("rate-{rate}"));
            bench.classifier.insert(&[rule_to(1, 1)]).expect("fits");
            bench.put(1, Direction::Upstream, policed(1, rate, burst));
            let time_ns = flood(bench.object(), ip_length);
            let counted = bench.counted(1, Direction::Upstream);
            let due = rate as f64 / 8e9 * time_ns as f64;
            let most = due * 1.0001 + burst as f64 + 2.0 * f64::from(ip_length + 14);
            let passed = counted.excess_bytes as f64;
            println!("{rate} bit/s: {passed} bytes passed in {time_ns} ns, {due:.0} due, burst {burst}");
            assert!(passed <= most, "{rate} bit/s: {passed} bytes passed, {most} may");
            counted.dropped_packets > 0 && passed >= due * 0.99
        });
        assert!(reached, "{rate} bit/s was never reached");
    }
}

#[test]
fn two_threads_on_one_clock_conserve_the_rate() {
    let rate = 10_000_000_000u64;
    let burst = rate / 80;
    let mut bench = Bench::new("threads");
    bench.classifier.insert(&[rule_to(1, 1)]).expect("fits");
    bench.put(1, Direction::Upstream, policed(1, rate, burst));
    let mut other =
        Object::load(&bench.pins, abi::MAX_RULES).expect("a second copy of the programs over the same maps");
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| flood(&mut other, 9_000));
        flood(bench.object(), 9_000);
    });
    let time_ns = start.elapsed().as_nanos() as u64;
    let counted = bench.counted(1, Direction::Upstream);
    let due = rate as f64 / 8e9 * time_ns as f64;
    let most = due * 1.0001 + burst as f64 + 2.0 * 9_014.0;
    println!("two threads: {} bytes passed, {due:.0} due", counted.excess_bytes);
    assert!(counted.dropped_packets > 0, "more was offered");
    assert!(counted.excess_bytes as f64 <= most, "{} bytes passed, {most} may", counted.excess_bytes);
    assert!(
        counted.excess_bytes as f64 >= due * 0.97,
        "{} bytes passed, {due} were due",
        counted.excess_bytes
    );
}

/// A rule that comes and goes: for one of the `hosts` after 198.51.100.0 or a prefix around it, for all ports or
/// some. It is worse than rules of a higher precedence than 0.
fn passing_rule(random: &mut Random, number: u64, hosts: u64) -> Rule {
    let host = Address::v4((0xc633_6401 + random.below(hosts) as u32).to_be_bytes());
    let source_length = random.choose(&[0, 24, 32]);
    let length = random.choose(&[0, 8, 16, 24, 30, 32, 32, 32, 32, 32]);
    let port = random.below(60_000) as u16;
    let (checks, destination_ports) =
        random.choose(&[(0, [0, u16::MAX]), (CHECK_PORTS, [port, port]), (CHECK_PORTS, [port, port + 99])]);
    Rule {
        source: Address::v4([192, 0, 2, 1]).prefix(source_length),
        source_length: source_length as u8,
        destination: host.prefix(length),
        destination_length: length as u8,
        destination_ports,
        checks,
        rank: rank(0, 1_000 + number, 0),
        ..rule_to(0, 9)
    }
}

#[test]
fn look_ups_on_all_cpus_are_right_while_rules_come_and_go() {
    let mut bench = Bench::new("hammer");
    for slot in [1, 2, 3, 9] {
        bench.put(slot, Direction::Upstream, policed(u64::from(slot), 400_000_000_000, 1_000_000_000));
    }
    // To .1 there is always one best rule. To .2 a better one comes and goes, and there is another behind it.
    let best = |host, slot, precedence| Rule { rank: rank(precedence, 1, slot), ..rule_to(host, slot) };
    let toggled = best(2, 2, 8);
    bench.classifier.insert(&[best(1, 1, 9), best(2, 3, 7)]).expect("fits");
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut copies: Vec<Object> = (0..cpus)
        .map(|_| {
            Object::load(&bench.pins, abi::MAX_RULES).expect("a copy of the programs over the same maps")
        })
        .collect();
    let stop = AtomicBool::new(false);
    let (runs, updates) = std::thread::scope(|scope| {
        let hammers: Vec<_> = copies
            .iter_mut()
            .map(|object| {
                let stop = &stop;
                scope.spawn(move || {
                    let mut runs = 0;
                    while !stop.load(Ordering::SeqCst) {
                        for host in [1, 2] {
                            object.run("qos_xdp_lan", &datagram(host, 1_000, 9), 2_000).expect("runs");
                        }
                        runs += 2_000;
                    }
                    runs
                })
            })
            .collect();
        let mut random = Random::new(11);
        let mut passing = Vec::new();
        let mut updates = 0u64;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(6) {
            for _ in 0..40 {
                let rule = passing_rule(&mut random, updates, 2);
                bench.classifier.insert(&[rule]).expect("fits");
                passing.push(rule);
                updates += 1;
            }
            bench.classifier.insert(&[toggled]).expect("fits");
            while passing.len() > 600 {
                let at = random.below(passing.len() as u64) as usize;
                bench.classifier.remove(&[passing.swap_remove(at)]).expect("fits");
                updates += 1;
            }
            bench.classifier.remove(&[toggled]).expect("fits");
            updates += 2;
        }
        stop.store(true, Ordering::SeqCst);
        let runs: u64 = hammers.into_iter().map(|hammer| hammer.join().expect("no panic")).sum();
        (runs, updates)
    });
    drop(copies);
    let counted = |slot| {
        let counted = bench.counted(slot, Direction::Upstream);
        counted.excess_packets + counted.dropped_packets
    };
    println!(
        "{runs} packets each on {cpus} CPUs, {updates} updates: {} and {} of the second",
        counted(2),
        counted(3)
    );
    assert_eq!(counted(1), runs, "to .1: some were not taken by the rule that was always there");
    assert_eq!(counted(2) + counted(3), runs, "to .2: some were taken by neither rule");
    assert!(counted(2) > 0 && counted(3) > 0, "the rule came and went");
    assert!(bench.classifier.repair().is_empty());
}

#[test]
fn each_outcome_has_its_verdict() {
    let mut bench = Bench::new("verdicts");
    bench.classifier.insert(&[rule_to(1, 1), rule_to(2, 2), rule_to(3, 3), rule_to(4, 4)]).expect("fits");
    bench.put(1, Direction::Upstream, policed(1, 1_000_000_000, 1_000_000));
    // The first packet uses up the burst of the second; nothing is left of it for the next second.
    bench.put(2, Direction::Upstream, policed(2, 1_000, 0));
    let providers: SharedArray<abi::Provider> = bench.object().shared("providers").expect("providers");
    let aggregate = [Meter::new(1_000, 0), Meter::UNSET];
    providers.write(7, abi::Provider { aggregate, kind: 1, ..Default::default() });
    bench.put(3, Direction::Upstream, Allocation { provider: 7, ..policed(3, 1_000_000_000, 1_000_000) });
    bench.put(4, Direction::Upstream, Allocation { provider: 9_999, ..policed(4, 1_000_000_000, 1_000_000) });
    let mut truncated = datagram(1, 1_000, 9);
    truncated.truncate(30);
    let mut malformed = datagram(1, 1_000, 9);
    malformed[14] = 0x43;
    let tags = [&[0u8; 12][..], &[0x81, 0, 0, 1, 0x81, 0, 0, 1, 0x81, 0, 0, 1], &[0; 20]].concat();
    let arp = [&[0u8; 12][..], &[8, 6], &[0; 28]].concat();
    let cases: [(&str, Vec<u8>, u32, Outcome); 10] = [
        ("admitted", datagram(1, 1_000, 9), XDP_PASS, Outcome::Admitted),
        ("unclassified", datagram(99, 1_000, 9), XDP_PASS, Outcome::Unclassified),
        ("first of a slow one", datagram(2, 1_000, 9), XDP_PASS, Outcome::Admitted),
        ("over its maximum", datagram(2, 1_000, 9), XDP_DROP, Outcome::OverMaximum),
        ("first of a slow provider", datagram(3, 1_000, 9), XDP_PASS, Outcome::Admitted),
        ("over its provider's aggregate", datagram(3, 1_000, 9), XDP_DROP, Outcome::OverAggregate),
        ("truncated", truncated, XDP_PASS, Outcome::Truncated),
        ("malformed", malformed, XDP_PASS, Outcome::Malformed),
        ("too many tags", tags, XDP_PASS, Outcome::TooManyTags),
        ("ARP", arp, XDP_PASS, Outcome::NotIp),
    ];
    let outcomes: SharedArray<Outcomes> = bench.object().shared("outcomes").expect("outcomes");
    let count = |outcome: Outcome| -> u64 {
        (0..outcomes.length()).map(|cpu| outcomes.read(cpu).packets[outcome as usize]).sum()
    };
    for (name, frame, verdict, outcome) in cases {
        let before = count(outcome);
        let (found, _) = bench.object().run("qos_xdp_lan", &frame, 1).expect("runs");
        assert_eq!((found, count(outcome) - before), (verdict, 1), "{name}");
    }
    let (found, _) = bench.object().run("qos_xdp_lan", &datagram(4, 1_000, 9), 1).expect("runs");
    assert_eq!((found, count(Outcome::MissingEntry)), (XDP_PASS, 1), "a provider beyond the map");
    // The other direction has no rules.
    let (found, _) = bench.object().run("qos_xdp_wan", &datagram(2, 1_000, 9), 1).expect("runs");
    assert_eq!(found, XDP_PASS, "downstream");
}

#[test]
fn later_fragments_follow_their_first() {
    let mut bench = Bench::new("fragments");
    let mut web = rule_to(1, 1);
    (web.checks, web.protocol, web.destination_ports) = (3, 17, [80, 80]);
    let mut other = rule_to(1, 2);
    (other.checks, other.protocol, other.destination_ports) = (3, 17, [90, 90]);
    bench.classifier.insert(&[web, other]).expect("fits");
    for slot in [1, 2] {
        bench.put(slot, Direction::Upstream, policed(u64::from(slot), 1_000_000_000, 1_000_000));
    }
    let piece = |port: u16, id: u8, fragment: u16| {
        let mut frame = datagram(1, 500, port);
        frame[19] = id;
        frame[20..22].copy_from_slice(&fragment.to_be_bytes());
        frame
    };
    let mut passed = |frame: &[u8]| {
        bench.object().run("qos_xdp_lan", frame, 1).expect("runs");
        [1, 2].map(|slot| bench.counted(slot, Direction::Upstream).excess_packets)
    };
    assert_eq!(passed(&piece(90, 5, 0x2000)), [0, 1], "the first has ports");
    assert_eq!(
        passed(&piece(80, 5, 0x2040)),
        [0, 2],
        "a later one follows it, whatever stands where ports would"
    );
    assert_eq!(passed(&piece(80, 5, 0x0080)), [0, 3], "so does the last");
    assert_eq!(
        passed(&piece(90, 6, 0x2040)),
        [1, 3],
        "without its first it is held to what it may belong to"
    );
    assert_eq!(passed(&piece(70, 7, 0x2000)), [1, 3], "a first that nothing matches");
    assert_eq!(passed(&piece(80, 7, 0x2040)), [1, 3], "is followed too");
    // The allocation has gone: the later fragments are anybody's again.
    bench.put(2, Direction::Upstream, Allocation::default());
    bench.object().run("qos_xdp_lan", &piece(80, 5, 0x2040), 1).expect("runs");
    assert_eq!(bench.counted(1, Direction::Upstream).excess_packets, 2);
    let fragment = reference::parse(&piece(80, 5, 0x2040), 0).expect("reads").1;
    assert_eq!(fragment, Fragment::Later);
}
