//! Clocks that nobody used for long, on the maps of a real `qosd`. Their arithmetic is tested with
//! `qos_common::clock`. Needs root.
#![expect(clippy::unwrap_used, reason = "a test and what it calls fail by panicking")]

use nix::time::{ClockId, clock_gettime};
use qos_common::abi::{Clocks, directed};
use qos_common::classify::Direction;
use qos_common::clock::{UNUSED, ticks};
use qos_tests::ask::Brief;
use qos_tests::daemon::{Config, Daemon};
use qos_tests::kernel::Maps;
use qos_tests::topology::Topology;
use qos_tests::traffic::watched;
use qos_userspace::domain::BitsPerSecond;
use qos_userspace::gateway::memory::SharedArray;
use serde_json::json;

/// A clock that was last used so many minutes ago.
fn used_before(minutes: u64) -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    let now_ns = now.tv_sec().cast_unsigned() * 1_000_000_000 + now.tv_nsec().cast_unsigned();
    ticks(now_ns).wrapping_sub(ticks(minutes * 60_000_000_000))
}

#[test]
fn a_reconciliation_resets_clocks_that_are_long_idle_and_leaves_those_in_use() {
    let net = Topology::pair().unwrap();
    let config = Config { more: "reconcile_interval = \"1h\"".to_owned(), ..Config::default() };
    let daemon = Daemon::start(&net.gateway, &config).unwrap();
    for line in [
        "session add home --address 192.0.2.10 --down 50mbit --up 50mbit",
        "provider add video --kind application --network 203.0.113.0/24 --max-down 40mbit",
    ] {
        daemon.qos_line(line).unwrap();
    }
    let level = "--guaranteed-down 1mbit --max-down 4mbit --enforcement police";
    let records = [5_000, 5_001].map(|port| {
        let flow = format!("down udp from 203.0.113.0/24 to 192.0.2.10:{port}");
        let granted = daemon.grant(&format!("--provider video --flow '{flow}' {level}")).unwrap();
        directed(u32::from(granted.slot), Direction::Downstream)
    });
    let maps = Maps::of(&daemon);
    let provider = *maps.contents().unwrap().providers.keys().next().unwrap();
    let provider = directed(provider, Direction::Downstream);
    let clocks: SharedArray<Clocks> = maps.shared("clocks").unwrap();
    let provider_clocks: SharedArray<Clocks> = maps.shared("provider_clocks").unwrap();

    let at = |clock| Clocks { guaranteed: clock, maximum: clock, ..Clocks::default() };
    let (long_ago, lately) = (used_before(150), used_before(50));
    clocks.write(records[0], at(long_ago));
    clocks.write(records[1], at(lately));
    provider_clocks.write(provider, at(long_ago));
    assert_eq!(daemon.qos_line("reconcile").unwrap()["items"], json!([]), "it is no repair");
    assert_eq!(clocks.read(records[0]), at(UNUSED));
    assert_eq!(clocks.read(records[1]), at(lately));
    assert_eq!(provider_clocks.read(provider), at(UNUSED));

    // One that packets move is left to them: it lets through what it would.
    let flow = net.stream(5_000, BitsPerSecond(8_000_000)).unwrap();
    let reconcile = || {
        for _ in 0..100 {
            daemon.qos_line("reconcile").unwrap();
        }
    };
    watched(&[&flow], reconcile).unwrap();
    let held = watched(&[&flow], reconcile).unwrap().remove(0);
    let ratio = held.ratio_to(BitsPerSecond(4_000_000));
    assert!((ratio - 1.0).abs() < 0.03, "{:?}", Brief(&held));
}
