//! The same levels on every kind of gateway box, with real traffic between real stacks. Needs root;
//! a kind whose devices the kernel lacks skips.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test and what it calls fail by panicking")]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use clap::ValueEnum as _;
use qos_tests::ask::{Brief, measure_undisturbed, send_for, since};
use qos_tests::boxes::{BoxUnderTest, Kind, OUTSIDE};
use qos_tests::capture::{Capture, Frame};
use qos_tests::kernel::programs;
use qos_tests::skip::skip;
use qos_tests::topology::{HOST_LINK, Host};
use qos_tests::traffic::{Flow, RunningTcp, RunningUdp, TcpFlow, UdpFlow};
use qos_userspace::domain::{AllocationId, BitsPerSecond};

const WARM_UP: Duration = Duration::from_millis(700);
const WINDOW: Duration = Duration::from_secs(2);
/// The contract's tolerance.
const TOLERANCE: f64 = 0.03;
/// The subscriber's line, either way.
const LINE: u64 = 40;

fn mbit(mbit: u64) -> BitsPerSecond {
    BitsPerSecond(mbit * 1_000_000)
}

/// One test a kind, so that each is named where it fails or skips.
macro_rules! kinds {
    ($($name:ident: $kind:ident,)+) => {$(
        #[test]
        fn $name() {
            levels_hold(stringify!($name), Kind::$kind);
        }
    )+

        #[test]
        fn every_kind_has_a_test() {
            assert_eq!([$(Kind::$kind),+], Kind::value_variants());
        }
    };
}

kinds! {
    a_router_holds_levels: Router,
    a_router_with_clsact_holds_levels: RouterClsact,
    a_router_with_generic_xdp_holds_levels: RouterGeneric,
    a_router_without_xdp_holds_levels: RouterTc,
    a_router_of_ipv6_only_holds_levels: RouterV6,
    a_router_of_jumbo_frames_holds_levels: RouterJumbo,
    a_router_with_four_interfaces_holds_levels: RouterFour,
    a_nat_gateway_holds_levels: Nat,
    a_bridge_holds_levels: Bridge,
    a_bridge_of_vlan_tagged_frames_holds_levels: BridgeVlan,
    a_bridge_of_twice_tagged_frames_holds_levels: BridgeQinq,
    a_bridge_of_pppoe_sessions_holds_levels: BridgePppoe,
    a_router_with_a_tun_device_holds_levels: Tun,
    a_router_with_a_wireguard_device_holds_levels: Wireguard,
    a_router_with_a_ppp_device_holds_levels: Ppp,
    a_router_with_vlan_devices_holds_levels: VlanDevices,
    a_router_with_a_bond_holds_levels: Bond,
}

/// A side of a flow.
#[derive(Clone, Copy)]
struct Side<'a> {
    host: &'a Host,
    address: IpAddr,
}

impl Suite<'_> {
    /// Sender and receiver of what goes `up` or `down`.
    fn sides(&self, direction: &str, v6: bool) -> [Side<'_>; 2] {
        let [home, video] = self.0.addresses(v6);
        let near = Side { host: self.0.net.subscriber("home"), address: home };
        let far = Side { host: self.0.net.provider("video"), address: video };
        if direction == "up" { [near, far] } else { [far, near] }
    }

    /// Grants `level` to what goes to `port` of the receiver.
    fn grant(&self, direction: &str, protocol: &str, v6: bool, port: u16, level: &str) -> AllocationId {
        let [from, to] = self.sides(direction, v6).map(|side| side.address);
        let to = if v6 { format!("[{to}]") } else { to.to_string() };
        let flow = format!("{direction} {protocol} from {from} to {to}:{port}");
        self.0.daemon.grant(&format!("--provider video --flow '{flow}' {level}")).unwrap().id
    }

    fn udp(&self, direction: &str, v6: bool, port: u16, rate: BitsPerSecond) -> RunningUdp {
        let [from, to] = self.sides(direction, v6);
        let length = if self.0.kind == Kind::RouterJumbo { 8_000 } else { 1_000 };
        UdpFlow::new(SocketAddr::new(from.address, 0), SocketAddr::new(to.address, port), rate)
            .packet(length)
            .start(&from.host.namespace, &to.host.namespace)
            .unwrap()
    }

    fn tcp(&self, direction: &str, v6: bool, port: u16) -> RunningTcp {
        let [from, to] = self.sides(direction, v6);
        TcpFlow::new(SocketAddr::new(from.address, 0), SocketAddr::new(to.address, port))
            .start(&from.host.namespace, &to.host.namespace)
            .unwrap()
    }
}

/// A box under test.
struct Suite<'a>(&'a BoxUnderTest);

/// What is to come of a flow.
struct Expected<'a> {
    case: String,
    flow: &'a dyn Flow,
    offered: BitsPerSecond,
    due: BitsPerSecond,
}

/// Measures flows at once and compares each with what is due to it.
fn check(kind: Kind, expected: &[Expected<'_>]) {
    let watched: Vec<_> = expected.iter().map(|one| (one.flow, one.offered)).collect();
    let measured = measure_undisturbed(&watched, WARM_UP, WINDOW).unwrap();
    let mut wrong = Vec::new();
    for (one, measured) in expected.iter().zip(&measured) {
        let off = measured.ratio_to(one.due) - 1.0;
        let line = format!("{kind:?} {}: {:+.2} %, {:?}", one.case, off * 100.0, Brief(measured));
        println!("{line}");
        if off.abs() > TOLERANCE {
            wrong.push(line);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The suite: what every kind of box must do.
fn levels_hold(test: &str, kind: Kind) {
    let started = match BoxUnderTest::start(kind).unwrap() {
        Ok(started) => started,
        Err(reason) => return skip(test, &reason),
    };
    let under_test = Suite(&started);
    programs_are_where_they_should_be(&started);
    let addresses: Vec<_> =
        kind.families().iter().map(|v6| format!("--address {}", started.addresses(*v6)[0])).collect();
    for line in [
        format!("session add home {} --down {LINE}mbit --up {LINE}mbit", addresses.join(" ")),
        "provider add video --kind application --network 203.0.113.0/24 --network 2001:db8:2::/48".to_owned(),
    ] {
        started.daemon.qos_line(&line).unwrap();
    }
    udp_is_policed_shaped_and_marked(&under_test);
    tcp_is_shaped(&under_test);
    a_guarantee_is_kept_while_the_line_is_full(&under_test);
    what_the_box_sends_and_receives_itself_is_held_and_counted_once(&under_test);
    // Last: hosts remember what they learn of a path.
    an_mtu_is_kept_by_connections_that_were_open_before(&under_test);
    let outcomes = started.daemon.statistics().unwrap().outcomes;
    for outcome in ["lost_mark", "malformed", "truncated", "too_many_tags", "missing_entry"] {
        // Behind generic XDP kernels from 6.9 on lose every mark, and egress classifies again.
        if kind == Kind::RouterGeneric && outcome == "lost_mark" {
            continue;
        }
        assert_eq!(outcomes[outcome], 0, "{kind:?} {outcome}: {outcomes:?}");
    }
}

fn programs_are_where_they_should_be(started: &BoxUnderTest) {
    let status = started.daemon.status().unwrap();
    for (link, expected) in started.kind.links().into_iter().zip(started.kind.expected()) {
        let found = status.gateway.interfaces.iter().find(|interface| interface.name == link).unwrap();
        let shown = (found.judged.as_str(), found.xdp.as_str(), found.framing.as_deref().unwrap());
        assert_eq!(shown, expected, "{:?} {link}: {found:?}", started.kind);
        // Kernels before 6.6 have no tcx, and none to ask about.
        let has_tcx = programs(&started.net.gateway, link).is_ok();
        assert_eq!(found.tc == "clsact", started.kind == Kind::RouterClsact || !has_tcx, "{found:?}");
    }
}

fn udp_is_policed_shaped_and_marked(under_test: &Suite<'_>) {
    let kind = under_test.0.kind;
    let mut port = 5_000;
    let mut flows = Vec::new();
    for &v6 in kind.families() {
        for (direction, enforcement, rate, dscp) in [
            ("down", "police", 2, 34),
            ("down", "shape", 3, 46),
            ("up", "police", 2, 34),
            ("up", "shape", 3, 46),
        ] {
            port += 1;
            let level = format!("--max-{direction} {rate}mbit --enforcement {enforcement} --dscp {dscp}");
            let id = under_test.grant(direction, "udp", v6, port, &level);
            let flow = under_test.udp(direction, v6, port, mbit(2 * rate));
            let case = format!("{direction} UDP {enforcement} IPv{}", if v6 { 6 } else { 4 });
            flows.push((case, id, flow, rate, direction, port, dscp));
        }
    }
    let all: Vec<_> = flows
        .iter()
        .map(|(case, _, flow, rate, ..)| Expected {
            case: case.clone(),
            flow,
            offered: mbit(2 * rate),
            due: mbit(*rate),
        })
        .collect();
    check(kind, &all);
    for (case, id, _, _, direction, port, dscp) in &flows {
        let [_, to] = under_test.sides(direction, kind.families()[0]);
        let capture = Capture::open(&to.host.namespace, HOST_LINK).unwrap();
        let frame = capture
            .find(Duration::from_secs(2), |frame| frame.ports().is_some_and(|ports| ports.1 == *port))
            .unwrap()
            .unwrap_or_else(|| panic!("{kind:?} {case}: captured"));
        assert_eq!(frame.dscp(), Some(*dscp), "{kind:?} {case}");
        frame.verify_checksums().unwrap();
        under_test.0.daemon.revoke(*id).unwrap();
    }
    // Nobody's any more, and there is room for all of it.
    let free: Vec<_> = flows
        .iter()
        .map(|(case, _, flow, rate, ..)| Expected {
            case: format!("{case}, revoked"),
            flow,
            offered: mbit(2 * rate),
            due: mbit(2 * rate),
        })
        .collect();
    check(kind, &free);
}

fn tcp_is_shaped(under_test: &Suite<'_>) {
    let kind = under_test.0.kind;
    let mut port = 6_000;
    let mut flows = Vec::new();
    for &v6 in kind.families() {
        for direction in ["down", "up"] {
            port += 1;
            let level = format!("--max-{direction} 4mbit --enforcement shape");
            under_test.grant(direction, "tcp", v6, port, &level);
            flows.push((direction, v6, under_test.tcp(direction, v6, port)));
        }
    }
    let all: Vec<_> = flows
        .iter()
        .map(|(direction, v6, flow)| Expected {
            case: format!("{direction} TCP shape IPv{}", if *v6 { 6 } else { 4 }),
            flow,
            offered: BitsPerSecond(0),
            due: mbit(4),
        })
        .collect();
    check(kind, &all);
}

/// By "packet too big" and "fragmentation needed" alone: what was open before has shaken hands.
fn an_mtu_is_kept_by_connections_that_were_open_before(under_test: &Suite<'_>) {
    const MTU: u16 = 1_300;
    let kind = under_test.0.kind;
    let mut port = 6_100;
    for &v6 in kind.families() {
        for direction in ["down", "up"] {
            port += 1;
            let case = format!("{kind:?} {direction} IPv{}", if v6 { 6 } else { 4 });
            let [_, to] = under_test.sides(direction, v6);
            let flow = under_test.tcp(direction, v6, port);
            let capture = Capture::open(&to.host.namespace, HOST_LINK).unwrap();
            let largest = |capture: &Capture| {
                let frames = capture.collect(Duration::from_millis(300)).unwrap();
                let of_flow =
                    frames.iter().filter(|frame| frame.ports().is_some_and(|ports| ports.1 == port));
                of_flow.filter_map(Frame::ip_length).max().unwrap_or_default()
            };
            let before = largest(&capture);
            // What a host learnt of the path by the first direction may serve it in the second too.
            assert!(before > MTU || direction == "up", "{case}: packets of {before} bytes before");
            let level = format!("--max-{direction} 8mbit --mtu {MTU}");
            let id = under_test.grant(direction, "tcp", v6, port, &level);
            std::thread::sleep(Duration::from_millis(500));
            let capture = Capture::open(&to.host.namespace, HOST_LINK).unwrap();
            let after = largest(&capture);
            assert!((1_000..=MTU).contains(&after), "{case}: packets of {after} bytes under the MTU");
            let measured = flow.measure(Duration::ZERO, Duration::from_millis(500)).unwrap();
            assert!(measured.goodput > mbit(2), "{case}: {:?}", Brief(&measured));
            let counts = under_test.0.daemon.counts(id).unwrap();
            let counts = if direction == "up" { counts.up.mtu } else { counts.down.mtu };
            let told = counts.dropped_packets > 0 && counts.senders_told > 0;
            assert!(told || before <= MTU, "{case}: {counts:?}");
            println!("{case}: {before} bytes, then {after}; {counts:?}");
            under_test.0.daemon.revoke(id).unwrap();
            drop(flow);
        }
    }
}

/// Traffic of the gateway's own addresses, on boxes that have any. What has no level is left alone.
fn what_the_box_sends_and_receives_itself_is_held_and_counted_once(under_test: &Suite<'_>) {
    const OFFERED: BitsPerSecond = BitsPerSecond(6_000_000);
    let Suite(started) = under_test;
    let kind = started.kind;
    if !kind.has_addresses() {
        return;
    }
    let mut port = 7_100;
    let mut flows = Vec::new();
    for &v6 in kind.families() {
        let own: IpAddr = OUTSIDE[usize::from(v6)].parse().unwrap();
        let home = started.addresses(v6)[0];
        let (gateway, subscriber) = (&started.net.gateway, &started.net.subscriber("home").namespace);
        for (direction, level) in [
            ("up", None),
            ("down", None),
            ("up", Some((2, "police"))),
            ("down", Some((2, "police"))),
            ("down", Some((3, "shape"))),
        ] {
            port += 1;
            let up = direction == "up";
            let (from, to) = if up { (home, own) } else { (own, home) };
            let (source, sink) = if up { (subscriber, gateway) } else { (gateway, subscriber) };
            let target = SocketAddr::new(to, port);
            let id = level.map(|(rate, enforcement)| {
                let flow = format!("{direction} udp from {from} to {target}");
                let level = format!("--max-{direction} {rate}mbit --enforcement {enforcement}");
                started.daemon.grant(&format!("--provider video --flow '{flow}' {level}")).unwrap().id
            });
            let flow = UdpFlow::new(SocketAddr::new(from, 0), target, OFFERED)
                .packet(1_000)
                .start(source, sink)
                .unwrap();
            let case = format!("{direction} {level:?}, {from} to {to}");
            flows.push((case, flow, level.map_or(OFFERED, |(rate, _)| mbit(rate)), id, up));
        }
    }
    let all: Vec<_> = flows
        .iter()
        .map(|(case, flow, due, ..)| Expected { case: case.clone(), flow, offered: OFFERED, due: *due })
        .collect();
    check(kind, &all);

    for (_, flow, ..) in &flows {
        flow.set_rate(BitsPerSecond(0));
    }
    std::thread::sleep(Duration::from_millis(200));
    let granted = flows.iter().filter_map(|(case, flow, _, id, up)| Some((case, flow, (*id)?, *up)));
    std::thread::scope(|scope| {
        for (case, flow, id, up) in granted {
            let counts = move || {
                let counts = started.daemon.counts(id).unwrap();
                if up { counts.up } else { counts.down }
            };
            scope.spawn(move || {
                let before = counts();
                let measured = send_for(flow, OFFERED, Duration::from_secs(1)).unwrap();
                let counted = since(&before, &counts());
                println!("{kind:?} {case}: {:?}, counted {counted:?}", Brief(&measured));
                let all = counted.passed.packets + counted.dropped.packets;
                assert_eq!(all, measured.sent, "{kind:?} {case}: {counted:?}");
                let left = counted.passed.packets - counted.queue_dropped_packets;
                assert_eq!(left, measured.received, "{kind:?} {case}: {counted:?}");
                started.daemon.revoke(id).unwrap();
            });
        }
    });
}

fn a_guarantee_is_kept_while_the_line_is_full(under_test: &Suite<'_>) {
    let kind = under_test.0.kind;
    let v6 = kind.families()[0];
    let level = "--guaranteed-down 6mbit --max-down 8mbit --priority 0";
    under_test.grant("down", "udp", v6, 7_000, level);
    let sure = under_test.udp("down", v6, 7_000, mbit(5));
    let flood = under_test.udp("down", v6, 7_001, mbit(60));
    check(
        kind,
        &[
            Expected { case: "guaranteed".to_owned(), flow: &sure, offered: mbit(5), due: mbit(5) },
            Expected { case: "the rest".to_owned(), flow: &flood, offered: mbit(60), due: mbit(LINE - 5) },
        ],
    );
}
