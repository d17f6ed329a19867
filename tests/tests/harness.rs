//! The harness itself: what it measures is right, and nothing of it stays behind. Needs root.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::panic::catch_unwind;
use std::process::Command;
use std::thread;
use std::time::Duration;

use etherparse::{EtherType, IpFragOffset, IpNumber, Ipv4Header, NetSlice, PacketBuilder};
use qos_tests::ask::{eventually, measure_undisturbed, undisturbed};
use qos_tests::capture::{Capture, Injector};
use qos_tests::netlink::{Counters, Netlink, set_offloads};
use qos_tests::netns::Namespace;
use qos_tests::topology::{HOST_LINK, Host, LAN, Topology, WAN, reach};
use qos_tests::traffic::{Flow, TcpFlow, UdpFlow, measure, sum_to, watched};
use qos_userspace::domain::units::BitsPerSecond;

const WARM_UP: Duration = Duration::from_millis(300);
const WINDOW: Duration = Duration::from_secs(1);
/// Until what a sender that pauses sent last has arrived.
const SETTLE: Duration = Duration::from_millis(200);

fn mbit(mbit: u64) -> BitsPerSecond {
    BitsPerSecond(mbit * 1_000_000)
}

fn to(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

fn counters(host: &Host) -> Counters {
    let mut netlink = Netlink::open(&host.namespace).expect("rtnetlink in a host");
    netlink.link(HOST_LINK).expect("every host has it").counters
}

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").expect("procfs is mounted").count()
}

fn threads() -> usize {
    fs::read_dir("/proc/self/task").expect("procfs is mounted").count()
}

#[test]
fn udp_at_20_mbit_over_one_veth_is_received_fully_and_measured_within_one_percent() {
    let (a, b) = (Namespace::new("a").unwrap(), Namespace::new("b").unwrap());
    Netlink::open(&a).unwrap().add_veth("eth0", "eth0", &b, 1_500).unwrap();
    for (namespace, addresses) in
        [(&a, ["192.0.2.1/24", "2001:db8::1/64"]), (&b, ["192.0.2.2/24", "2001:db8::2/64"])]
    {
        let mut netlink = Netlink::open(namespace).unwrap();
        let link = netlink.link("eth0").unwrap();
        netlink.set_up(link.index).unwrap();
        for address in addresses {
            netlink.add_address(link.index, address.parse().unwrap()).unwrap();
        }
        set_offloads(namespace, "eth0", false).unwrap();
    }
    for (from, target, packet) in [
        ("192.0.2.1", "192.0.2.2", 1_500),
        ("2001:db8::1", "2001:db8::2", 1_500),
        ("192.0.2.1", "192.0.2.2", 200),
        ("192.0.2.1", "192.0.2.2", 4_000),
        ("2001:db8::1", "2001:db8::2", 4_000),
    ] {
        let (from, target): (IpAddr, IpAddr) = (from.parse().unwrap(), target.parse().unwrap());
        reach(&a, &b, target).unwrap();
        let flow =
            UdpFlow::new(to(from, 0), to(target, 5_000), mbit(20)).packet(packet).start(&a, &b).unwrap();
        let measured = undisturbed(&flow, WARM_UP, 3 * WINDOW).unwrap();
        let case = format!("{packet} bytes to {target}: {measured:?}", measured = Brief(&measured));
        assert_eq!((measured.lost, measured.reordered, measured.receiver_dropped), (0, 0, 0), "{case}");
        assert_eq!(measured.received, measured.sent, "{case}");
        assert!((measured.ratio_to(mbit(20)) - 1.0).abs() < 0.01, "{case}");
        assert!((measured.ratio_to(measured.offered) - 1.0).abs() < 0.01, "{case}");
    }
}

#[test]
fn the_rate_is_what_the_receiving_link_counts() {
    let net = Topology::pair().unwrap();
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    for packet in [100, 1_500, 2_000] {
        let flow = UdpFlow::new(to(video.v4(0), 0), to(home.v4(0), 5_000), mbit(10))
            .packet(packet)
            .start(&video.namespace, &home.namespace)
            .unwrap();
        thread::sleep(WARM_UP);
        flow.set_rate(BitsPerSecond(0));
        thread::sleep(SETTLE);
        let before = counters(home);
        // It begins and ends at rest, so that both count the same packets however late either is.
        let measured = watched(&[&flow], || {
            flow.set_rate(mbit(10));
            thread::sleep(WINDOW);
            flow.set_rate(BitsPerSecond(0));
            thread::sleep(SETTLE);
        })
        .unwrap()
        .remove(0);
        let counted = (counters(home).rx_bytes - before.rx_bytes) as f64 * 8.0;
        let expected = measured.achieved.0 as f64 * measured.window.as_secs_f64();
        assert!((counted / expected - 1.0).abs() < 0.01, "{packet}: {counted} counted, {expected} measured");
    }
}

#[test]
fn a_rate_can_change_and_pause_while_the_flow_runs() {
    let net = Topology::pair().unwrap();
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let flow = UdpFlow::new(to(video.v6(0), 0), to(home.v6(0), 5_000), mbit(2))
        .start(&video.namespace, &home.namespace)
        .unwrap();
    for rate in [mbit(2), mbit(8), BitsPerSecond(0), mbit(1)] {
        flow.set_rate(rate);
        let measured = measure_undisturbed(&[(&flow, rate)], WARM_UP, WINDOW).unwrap().remove(0);
        let difference = measured.achieved.0.abs_diff(rate.0);
        assert!(difference <= rate.0 / 33, "asked {rate}, got {:?}", Brief(&measured));
        assert_eq!(measured.lost, 0, "{rate}");
        for part in measured.series(Duration::from_millis(500)) {
            assert!(part.0.abs_diff(rate.0) <= rate.0 / 10, "asked {rate}, got {part} for half a second");
        }
    }
}

#[test]
fn three_hundred_mbit_of_full_packets_go_through_the_gateway() {
    let net = Topology::pair().unwrap();
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let flow = UdpFlow::new(to(video.v4(0), 0), to(home.v4(0), 5_000), mbit(300))
        .start(&video.namespace, &home.namespace)
        .unwrap();
    let measured = measure_undisturbed(&[(&flow, mbit(300))], WARM_UP, WINDOW).unwrap().remove(0);
    println!("UDP at 300 Mbit/s: {:?}", Brief(&measured));
    assert_eq!(measured.receiver_dropped, 0);
    assert!(measured.lost * 1_000 <= measured.sent, "{:?}", Brief(&measured));
    assert!(measured.ratio_to(mbit(300)) > 0.98, "{:?}", Brief(&measured));
}

#[test]
fn tcp_in_bulk_through_the_gateway_is_measured_as_the_link_counts_it() {
    let net = Topology::pair().unwrap();
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    for (from, target, connections) in
        [(to(video.v4(0), 0), to(home.v4(0), 5_001), 1), (to(video.v6(0), 0), to(home.v6(0), 5_001), 4)]
    {
        let flow = TcpFlow::new(from, target)
            .connections(connections)
            .start(&video.namespace, &home.namespace)
            .unwrap();
        thread::sleep(WARM_UP);
        let before = counters(home);
        let measured = flow.measure(Duration::ZERO, WINDOW).unwrap();
        let counted = (counters(home).rx_bytes - before.rx_bytes) as f64 * 8.0;
        let expected = measured.achieved.0 as f64 * measured.window.as_secs_f64();
        println!("TCP to {target} over {connections}: {:?}", Brief(&measured));
        assert!((counted / expected - 1.0).abs() < 0.05, "{counted} counted, {expected} measured");
        assert!(measured.achieved > mbit(300), "{:?}", Brief(&measured));
    }
}

#[test]
fn tcp_fills_a_limited_path_and_its_series_averages_to_its_rate() {
    let net = Topology::pair().unwrap();
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    // 40 ms of queue: connections that slow down together don't empty it. 4 ms of tokens: a timer may be
    // as late as that, and the bucket still gives its rate.
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    let lan = netlink.link(LAN).unwrap().index;
    netlink.put_token_bucket(lan, mbit(100), 500_000, 50_000).unwrap();
    for (from, target) in
        [(to(video.v4(0), 0), to(home.v4(0), 5_001)), (to(video.v6(0), 0), to(home.v6(0), 5_001))]
    {
        let flow =
            TcpFlow::new(from, target).connections(4).start(&video.namespace, &home.namespace).unwrap();
        let measured = measure_undisturbed(&[(&flow, mbit(0))], 2 * WARM_UP, 2 * WINDOW).unwrap().remove(0);
        println!("TCP to {target}: {:?}", Brief(&measured));
        assert!((measured.ratio_to(mbit(100)) - 1.0).abs() < 0.02, "{:?}", Brief(&measured));
        let series = measured.series(measured.window / 8);
        let mean = series.iter().map(|part| part.0).sum::<u64>() as f64 / series.len() as f64;
        assert!((mean / measured.achieved.0 as f64 - 1.0).abs() < 0.03, "the series averages {mean}");
    }
}

#[test]
fn latency_is_small_on_an_idle_path_and_shows_a_full_queue() {
    let net = Topology::pair().unwrap();
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let probe = UdpFlow::new(to(video.v4(0), 0), to(home.v4(0), 5_000), mbit(1))
        .packet(200)
        .start(&video.namespace, &home.namespace)
        .unwrap();
    let idle = probe.measure(WARM_UP, WINDOW).unwrap();
    let latency = idle.latency.expect("packets arrived");
    println!("idle: p50 {:?}, p99 {:?}, max {:?}", latency.p50(), latency.p99(), latency.max());
    assert_eq!(latency.count() as u64, idle.received);
    assert!(
        latency.p50() > Duration::ZERO && latency.p50() < Duration::from_millis(1),
        "{:?}",
        latency.p50()
    );
    assert!(latency.p50() <= latency.p99() && latency.p99() <= latency.max());

    // 10 Mbit/s with room for 50 kB: 40 ms once it is full, less 4 ms of tokens.
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    let lan = netlink.link(LAN).unwrap().index;
    netlink.put_token_bucket(lan, mbit(10), 52_500, 5_000).unwrap();
    let flood = UdpFlow::new(to(video.v4(0), 0), to(home.v4(0), 5_001), mbit(20))
        .start(&video.namespace, &home.namespace)
        .unwrap();
    let flows: [(&dyn Flow, BitsPerSecond); 2] = [(&probe, mbit(1)), (&flood, mbit(20))];
    let both = measure_undisturbed(&flows, WARM_UP, WINDOW).unwrap();
    let together = sum_to(&both, mbit(10));
    let [full, flood] = <[_; 2]>::try_from(both).unwrap();
    println!("full: {:?}; {:?}", Brief(&full), Brief(&flood));
    let latency = full.latency.expect("some of the packets arrived");
    assert!((35..=45).contains(&latency.p50().as_millis()), "{:?}", latency.p50());
    assert!((together - 1.0).abs() < 0.02, "{together}");
    assert!(full.lost + flood.lost > 0 && full.receiver_dropped + flood.receiver_dropped == 0);
    assert_eq!((flood.sent, full.sent), (flood.received + flood.lost, full.received + full.lost));
}

#[test]
fn sixteen_addresses_and_several_hosts_on_each_side_reach_each_other() {
    let many: Vec<String> = (10..26).map(|host| format!("192.0.2.{host}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let net = Topology::builder()
        .subscriber("flats", &many)
        .subscriber("farm", &["192.0.2.100", "2001:db8:1:100::1"])
        .provider("video", &["203.0.113.10", "2001:db8:2:a::1"])
        .provider("games", &["198.51.100.10", "2001:db8:2:b::1"])
        // Outside the documentation prefixes of its side.
        .provider("carrier", &["198.18.0.1"])
        .build()
        .unwrap();
    let (flats, farm) = (net.subscriber("flats"), net.subscriber("farm"));
    let (video, games, carrier) = (net.provider("video"), net.provider("games"), net.provider("carrier"));

    let mut flows = Vec::new();
    for n in 0..16 {
        let (ours, provider) = (flats.v4(n), if n % 2 == 0 { video } else { games });
        let (from, target) = (to(provider.v4(0), 0), to(ours, 5_000));
        flows.push(UdpFlow::new(from, target, mbit(1)).start(&provider.namespace, &flats.namespace).unwrap());
    }
    for (from, from_host, target, target_host) in [
        (to(games.v6(0), 0), games, to(farm.v6(0), 5_000), farm),
        (to(farm.v6(0), 0), farm, to(video.v6(0), 5_000), video),
        (to(farm.v4(0), 0), farm, to(carrier.v4(0), 5_000), carrier),
    ] {
        flows.push(
            UdpFlow::new(from, target, mbit(1)).start(&from_host.namespace, &target_host.namespace).unwrap(),
        );
    }
    let offered: Vec<(&dyn Flow, _)> = flows.iter().map(|flow| (flow as &dyn Flow, mbit(1))).collect();
    for (flow, measured) in flows.iter().zip(measure_undisturbed(&offered, WARM_UP, WINDOW).unwrap()) {
        let case = format!("{}: {:?}", flow.source(), Brief(&measured));
        assert!(measured.received > 0 && measured.lost == 0, "{case}");
        assert!((measured.ratio_to(measured.offered) - 1.0).abs() < 0.03, "{case}");
    }
}

#[test]
fn marks_and_checksums_are_seen_on_the_wire() {
    let net = Topology::pair().unwrap();
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    for (from, target) in
        [(to(video.v4(0), 0), to(home.v4(0), 5_000)), (to(video.v6(0), 0), to(home.v6(0), 5_000))]
    {
        let capture = Capture::open(&net.gateway, LAN).unwrap();
        let udp = UdpFlow::new(from, target, mbit(1)).dscp(46);
        let tcp = TcpFlow::new(from, target).dscp(34);
        let _udp = udp.start(&video.namespace, &home.namespace).unwrap();
        let _tcp = tcp.start(&video.namespace, &home.namespace).unwrap();
        for (is_udp, dscp) in [(true, 46), (false, 34)] {
            let frame = capture
                .find(Duration::from_secs(2), |frame| {
                    frame.outgoing
                        && frame.addresses() == Some((from.ip(), target.ip()))
                        && frame.ports().is_some_and(|ports| ports.1 == target.port())
                        && frame.headers().and_then(|headers| headers.net).is_some_and(|net| match net {
                            NetSlice::Ipv4(ip) => (ip.header().protocol() == IpNumber::UDP) == is_udp,
                            NetSlice::Ipv6(ip) => (ip.header().next_header() == IpNumber::UDP) == is_udp,
                            NetSlice::Arp(_) => false,
                        })
                })
                .unwrap()
                .expect("the flow runs");
            assert_eq!(frame.dscp(), Some(dscp), "{from} to {target}");
            frame.verify_checksums().unwrap();
        }
    }
}

#[test]
fn injected_frames_arrive_as_they_were_made() {
    let net = Topology::pair().unwrap();
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let capture = Capture::open(&home.namespace, HOST_LINK).unwrap();
    let tagged = Capture::open(&net.gateway, WAN).unwrap();
    let injector = Injector::open(&video.namespace, HOST_LINK).unwrap();

    let mut ip = Ipv4Header::new(64, 64, IpNumber::UDP, video.v4(0).octets(), home.v4(0).octets()).unwrap();
    ip.fragment_offset = IpFragOffset::try_new(185).unwrap();
    ip.identification = 4_711;
    let mut fragment = Vec::new();
    let later = PacketBuilder::ethernet2(video.mac, video.gateway_mac)
        .ip(etherparse::IpHeaders::Ipv4(ip, etherparse::Ipv4Extensions::default()));
    later.write(&mut fragment, IpNumber::UDP, &[7; 64]).unwrap();
    injector.send(&fragment).unwrap();
    let seen = capture
        .find(Duration::from_secs(2), |frame| {
            matches!(frame.headers().and_then(|headers| headers.net),
                Some(NetSlice::Ipv4(ip)) if ip.header().identification() == 4_711)
        })
        .unwrap()
        .expect("the gateway forwards a fragment");
    assert_eq!(&seen.bytes[34..], &[7; 64]);
    assert_eq!(seen.bytes[20..22], fragment[20..22], "the fragment's offset");

    let mut vlan = Vec::new();
    PacketBuilder::ethernet2(video.mac, video.gateway_mac)
        .single_vlan(etherparse::VlanId::try_new(7).unwrap())
        .ipv4(video.v4(0).octets(), home.v4(0).octets(), 64)
        .udp(1, 2)
        .write(&mut vlan, &[1, 2, 3, 4])
        .unwrap();
    injector.send(&vlan).unwrap();
    let seen = tagged
        .find(Duration::from_secs(2), |frame| {
            frame.bytes[12..14] == EtherType::VLAN_TAGGED_FRAME.0.to_be_bytes()
        })
        .unwrap()
        .expect("the tag is put back");
    assert_eq!(seen.bytes, vlan);
}

#[test]
fn a_dropped_namespace_takes_its_links_along() {
    let a = Namespace::new("a").unwrap();
    let b = Namespace::new("b").unwrap();
    let mut netlink = Netlink::open(&a).unwrap();
    netlink.add_veth("eth0", "eth0", &b, 1_500).unwrap();
    assert!(netlink.link("eth0").is_ok());
    drop(b);
    eventually(Duration::from_secs(10), "the veth of a closed namespace is gone", || {
        netlink.link("eth0").is_err()
    });
    assert_eq!(netlink.links().unwrap().len(), 1, "lo alone is left");
}

#[test]
fn nothing_is_left_behind_even_by_a_panic() {
    let host_links = || {
        let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        text.lines().skip(2).filter_map(|line| line.split(':').next()).map(str::to_owned).collect::<Vec<_>>()
    };
    // Starts the one thread that stays: the spawner of children.
    let warm = Namespace::new("warm").unwrap();
    let mut first = warm.spawn(Command::new("true")).unwrap();
    assert!(first.wait(Duration::from_secs(10)).unwrap().success());
    drop((first, warm));
    let before = (open_descriptors(), threads(), host_links());

    let child = std::sync::atomic::AtomicU32::new(0);
    let panic = catch_unwind(|| {
        let net = Topology::pair().unwrap();
        let (home, video) = (net.subscriber("home"), net.provider("video"));
        let mut command = Command::new("sleep");
        command.arg("1000");
        let process = net.gateway.spawn(command).unwrap();
        child.store(process.id(), std::sync::atomic::Ordering::SeqCst);
        let udp = UdpFlow::new(to(video.v4(0), 0), to(home.v4(0), 5_000), mbit(5))
            .start(&video.namespace, &home.namespace)
            .unwrap();
        let tcp = TcpFlow::new(to(home.v4(0), 0), to(video.v4(0), 80))
            .start(&home.namespace, &video.namespace)
            .unwrap();
        let capture = Capture::open(&net.gateway, LAN).unwrap();
        let all = measure(&[&udp, &tcp], Duration::ZERO, WARM_UP).unwrap();
        assert!(all.iter().all(|measured| measured.received > 0) && capture.next(WARM_UP).unwrap().is_some());
        panic!("as a failed test would");
    });
    let message = panic.expect_err("it panics").downcast::<&str>().expect("the message above");
    assert_eq!(*message, "as a failed test would");

    assert_eq!((open_descriptors(), threads(), host_links()), before);
    let process = format!("/proc/{}", child.into_inner());
    assert!(!fs::exists(&process).unwrap(), "{process} runs on");
}

#[test]
fn a_child_runs_in_the_namespace_and_settings_stay_in_it() {
    let namespace = Namespace::new("a").unwrap();
    namespace.set_sysctl("ipv4/ip_forward", "1").unwrap();
    assert_eq!(namespace.sysctl("ipv4/ip_forward").unwrap(), "1");
    let other = Namespace::new("b").unwrap();
    assert_eq!(other.sysctl("ipv4/ip_forward").unwrap(), "0");

    let mut readlink = Command::new("readlink");
    readlink.arg("/proc/self/ns/net");
    let child = namespace.output(readlink).unwrap();
    let ours = namespace.run(|| fs::read_link("/proc/thread-self/ns/net").unwrap());
    assert_eq!(String::from_utf8_lossy(&child.stdout).trim(), ours.to_str().unwrap());
    let host = fs::read_link("/proc/thread-self/ns/net").unwrap();
    assert_ne!(ours, host);
    assert_eq!(fs::read_link(namespace.path()).unwrap(), ours);
}

/// Shows a result without its arrivals.
struct Brief<'a>(&'a qos_tests::traffic::Measured);

impl std::fmt::Debug for Brief<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let m = self.0;
        write!(
            f,
            "offered {}, achieved {}, payload {}, sent {}, received {}, lost {}, reordered {}, overran {}",
            m.offered, m.achieved, m.goodput, m.sent, m.received, m.lost, m.reordered, m.receiver_dropped
        )?;
        match &m.latency {
            Some(latency) => write!(f, ", p50 {:?}, p99 {:?}", latency.p50(), latency.p99()),
            None => Ok(()),
        }
    }
}
