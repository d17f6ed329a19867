//! 65,000 allocations at once on one gateway, 8,000 of them shaped: granted, listed, counted, held, taken
//! over by a new start while traffic flows, and revoked. What each step takes is printed. Needs root.
#![expect(clippy::print_stdout, reason = "figures of tests, for whoever reads them")]
#![expect(clippy::unwrap_used, reason = "a test and what it calls fail by panicking")]

use std::thread;
use std::time::{Duration, Instant};

use qos_tests::api::Client;
use qos_tests::ask::{Brief, undisturbed};
use qos_tests::daemon::{Config, Daemon};
use qos_tests::kernel::Kernel;
use qos_tests::topology::Topology;
use qos_tests::traffic::{Flow, RunningUdp, UdpFlow, watched};
use qos_userspace::domain::units::BitsPerSecond;
use serde_json::{Value, json};

const ALLOCATIONS: u32 = 65_000;
/// Every eighth one shapes, until there are 8,000.
const SHAPED: u32 = 8_000;
const LINES: u32 = 1_000;
const WARM_UP: Duration = Duration::from_millis(500);
const WINDOW: Duration = Duration::from_secs(1);

/// Allocations of the subscriber that is there: the first, one in the middle and the last, with what they
/// are held to in Mbit/s. The first shapes.
const WATCHED: [(u32, u64); 3] = [(0, 4), (ALLOCATIONS / 2, 6), (ALLOCATIONS - 1, 8)];

fn mbit(number: u64) -> BitsPerSecond {
    BitsPerSecond(number * 1_000_000)
}

fn prefix(line: u32) -> String {
    format!("10.{}.{}", 64 + line / 256, line % 256)
}

fn shapes(number: u32) -> bool {
    number.is_multiple_of(8) && number / 8 < SHAPED
}

fn request(number: u32) -> Value {
    let (to, rate) = match WATCHED.iter().find(|(watched, _)| *watched == number) {
        Some((_, rate)) => (format!("192.0.2.10:{}", port(number)), *rate),
        None => (format!("{}.{}", prefix(number % LINES), number / LINES), 1),
    };
    json!({
        "provider": "video",
        "selectors": [format!("down udp from 203.0.113.0/24 to {to}")],
        "level": {
            "maximum": {"down": format!("{rate}mbit")},
            "enforcement": if shapes(number) { "shape" } else { "police" },
        },
    })
}

fn port(number: u32) -> u16 {
    5_000 + (number / 10) as u16
}

fn ask(client: &mut Client, method: &str, path: &str, body: Option<&Value>, status: u16) -> Value {
    let answer = client.ask(method, path, body).unwrap();
    assert_eq!(answer.status, status, "{method} {path}: {}", answer.error("message"));
    answer.body
}

/// Prints what many of one kind took: in all, and the first and the last thousand each.
fn report(what: &str, times: &[Duration]) {
    let median = |times: &[Duration]| {
        let mut sorted = times.to_vec();
        sorted.sort_unstable();
        sorted[sorted.len() / 2]
    };
    println!(
        "{} {what} in {:.1?}: the first thousand {:.0?} each, the last {:.0?}",
        times.len(),
        times.iter().sum::<Duration>(),
        median(&times[..1_000]),
        median(&times[times.len() - 1_000..])
    );
}

fn timed<T>(what: &str, act: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let result = act();
    println!("{what}: {:.1?}", began.elapsed());
    result
}

fn are_held(flows: &[(RunningUdp, u64)], when: &str) {
    for (flow, limit) in flows {
        let held = undisturbed(flow, WARM_UP, WINDOW).unwrap();
        println!("{when}: {:?} of {limit} Mbit/s", Brief(&held));
        assert!((held.ratio_to(mbit(*limit)) - 1.0).abs() < 0.06, "{when}: {:?}", Brief(&held));
    }
}

#[test]
#[ignore = "slow: 65,000 allocations are granted and revoked one by one"]
fn sixty_five_thousand_allocations_are_held_and_survive_a_restart() {
    let net = Topology::pair().unwrap();
    let config = Config { more: "reconcile_interval = \"1h\"".to_owned(), ..Config::default() };
    let mut daemon = Daemon::start(&net.gateway, &config).unwrap();
    let mut client = Client::connect(&daemon.socket()).unwrap();
    daemon.qos_line("provider add video --kind application --network 203.0.113.0/24").unwrap();
    daemon.qos_line("session add home --address 192.0.2.10 --down 100mbit --up 50mbit").unwrap();
    for line in 0..LINES {
        let addresses = [format!("{}.0/24", prefix(line))];
        let rate = json!({"down": "20mbit", "up": "5mbit"});
        let session = json!({"name": format!("line-{line}"), "addresses": addresses, "rate": rate});
        ask(&mut client, "POST", "/v1/sessions", Some(&session), 201);
    }

    let (mut policed, mut shaped) = (Vec::new(), Vec::new());
    for number in 0..ALLOCATIONS {
        let request = request(number);
        let began = Instant::now();
        ask(&mut client, "POST", "/v1/allocations", Some(&request), 201);
        if shapes(number) { &mut shaped } else { &mut policed }.push(began.elapsed());
    }
    report("grants that police", &policed);
    report("grants that shape", &shaped);

    let listed = timed("qos list -o json", || daemon.qos(["list"]).unwrap());
    let listed = listed["items"].as_array().unwrap();
    assert_eq!(listed.len(), ALLOCATIONS as usize);
    let classes = listed.iter().filter(|allocation| !allocation["class"].is_null()).count();
    assert_eq!(classes, SHAPED as usize);
    let counted = timed("qos stats -o json", || daemon.qos(["stats"]).unwrap());
    assert_eq!(counted["allocations"].as_object().unwrap().len(), ALLOCATIONS as usize);
    timed("GET /v1/statistics", || ask(&mut client, "GET", "/v1/statistics", None, 200));
    assert_eq!(timed("qos reconcile", || daemon.qos(["reconcile"]).unwrap())["items"], json!([]));

    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let flows = WATCHED.map(|(number, limit)| {
        let flow =
            UdpFlow::new((video.v4(0), 0), (home.v4(0), port(number)), mbit(limit * 3 / 2)).packet(1_000);
        (flow.start(&video.namespace, &home.namespace).unwrap(), limit)
    });
    are_held(&flows, "granted");

    let before = Kernel::read(&daemon, &net.gateway).unwrap();
    for how in ["SIGTERM", "kill -9"] {
        let all: Vec<_> = flows.iter().map(|(flow, _)| flow as &dyn Flow).collect();
        let measured = watched(&all, || {
            if how == "SIGTERM" {
                daemon.terminate().unwrap();
            } else {
                daemon.kill().unwrap();
            }
            timed(&format!("restart behind {how}, until all is enforced and verified"), || {
                daemon
                    .restart_with(|command| {
                        command.args(["--log", "info,qos_userspace::api::service=debug"]);
                    })
                    .unwrap();
            });
            thread::sleep(WARM_UP);
        })
        .unwrap();
        for (measured, (_, limit)) in measured.iter().zip(&flows) {
            println!("meanwhile: {:?} of {limit} Mbit/s", Brief(measured));
            // A clock or a queue begun anew would let more through at once.
            let window = Duration::from_millis(250);
            let (most, series) = (measured.peak(window, mbit(*limit)), measured.series(window));
            assert!(most.0 as f64 <= mbit(*limit).0 as f64 * 1.05, "{limit} Mbit/s: {series:?}");
        }
        daemon.qos(["stats"]).unwrap();
        let log = daemon.log_tail();
        for line in log.lines().filter_map(|line| line.split_once("DEBUG ")).map(|(_, line)| line) {
            println!("  {line}");
        }
        let status = daemon.status().unwrap();
        assert!(status.gateway.taken_over);
        assert_eq!((status.gateway.allocations.0, status.reconcile_error), (ALLOCATIONS, None));
        assert_eq!(status.gateway.repairs, [], "nothing was broken");
        let after = Kernel::read(&daemon, &net.gateway).unwrap();
        assert_eq!(before.clone().without_programs().differences(&after.without_programs()), [""; 0]);
    }
    are_held(&flows, "taken over");
    drop(flows);

    let mut client = Client::connect(&daemon.socket()).unwrap();
    let mut times = Vec::new();
    for id in 1..=ALLOCATIONS {
        let began = Instant::now();
        ask(&mut client, "DELETE", &format!("/v1/allocations/{id}"), None, 200);
        times.push(began.elapsed());
    }
    report("revokes", &times);
    let status = daemon.status().unwrap();
    assert_eq!((status.gateway.allocations.0, status.gateway.rules.0), (0, 0));
    assert_eq!(daemon.qos(["reconcile"]).unwrap()["items"], json!([]));
}
