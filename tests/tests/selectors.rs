//! Selectors on the wire: which allocation a packet is counted to, field by field, and that `qos
//! explain` says the same. Needs root.
#![expect(clippy::unwrap_used, reason = "a test and what it calls fail by panicking")]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use qos_tests::capture::Injector;
use qos_tests::daemon::{Config, Daemon};
use qos_tests::frames::{FrameSpec, GRE, ICMP, ICMP6, SCTP, TCP, UDP};
use qos_tests::topology::{HOST_LINK, Host, Topology};
use qos_userspace::domain::{AllocationId, Direction};

/// Packets of a kind that are sent.
const PACKETS: u64 = 5;
/// How long a packet takes to be counted, generously.
const SETTLE: Duration = Duration::from_millis(30);

fn address(host: &Host, v6: bool) -> IpAddr {
    if v6 { host.v6(0).into() } else { host.v4(0).into() }
}

/// A gateway with `home` on a line and a provider `video` that owns the far side.
struct Bed {
    net: Topology,
    daemon: Daemon,
}

impl Bed {
    fn new() -> Self {
        let net = Topology::pair().unwrap();
        let daemon = Daemon::start(&net.gateway, &Config::default()).unwrap();
        for line in [
            "session add line --address 192.0.2.10 --address 2001:db8:1::10 --down 100mbit --up 100mbit",
            "provider add video --kind application --network 203.0.113.0/24 --network 2001:db8:2::/48",
        ] {
            daemon.qos_line(line).unwrap();
        }
        Self { net, daemon }
    }

    /// Grants the flow a level that never drops here. `{near}` and `{far}` are the two addresses.
    fn grant(&self, flow: &str, v6: bool, more: &str) -> AllocationId {
        let flow = self.filled(flow, v6);
        let direction = if flow.starts_with("up") { "up" } else { "down" };
        self.daemon
            .grant(&format!(
                "--provider video --flow '{flow}' --max-{direction} 50mbit --enforcement police {more}"
            ))
            .unwrap()
            .id
    }

    fn filled(&self, flow: &str, v6: bool) -> String {
        let (near, far) = self.ends(v6);
        let shown = |address: IpAddr| if v6 { format!("[{address}]") } else { address.to_string() };
        flow.replace("{near}", &shown(near)).replace("{far}", &shown(far))
    }

    fn ends(&self, v6: bool) -> (IpAddr, IpAddr) {
        (address(self.net.subscriber("home"), v6), address(self.net.provider("video"), v6))
    }

    /// A UDP packet of 100 bytes from port 4000 to port 5000.
    fn frame(&self, direction: Direction, v6: bool) -> FrameSpec {
        let (home, video) = (self.net.subscriber("home"), self.net.provider("video"));
        let (from, to) = if direction == Direction::Upstream { (home, video) } else { (video, home) };
        let macs = (from.mac, from.gateway_mac);
        FrameSpec::udp(macs, (address(from, v6), address(to, v6)), (4_000, 5_000))
    }

    /// Packets that each allocation has passed in a direction.
    fn passed(&self, direction: Direction) -> BTreeMap<AllocationId, u64> {
        let all = self.daemon.statistics().unwrap().allocations;
        all.into_iter()
            .map(|(id, counts)| {
                let counts = if direction == Direction::Upstream { counts.up } else { counts.down };
                (id, counts.passed.packets)
            })
            .collect()
    }

    /// Sends the frame some times and tells the one allocation that it was counted to. What is
    /// explained must be the same and count nothing.
    fn counted_to(&self, direction: Direction, spec: &FrameSpec) -> Option<AllocationId> {
        let host = match direction {
            Direction::Upstream => self.net.subscriber("home"),
            Direction::Downstream => self.net.provider("video"),
        };
        let frame = spec.build().unwrap();
        let injector = Injector::open(&host.namespace, HOST_LINK).unwrap();
        let before = self.passed(direction);
        let explained = self.daemon.explain(direction, &frame).unwrap().explanation.allocation;
        for _ in 0..PACKETS {
            injector.send(&frame).unwrap();
        }
        thread::sleep(SETTLE);
        let after = self.passed(direction);
        let moved: Vec<_> = after
            .iter()
            .filter_map(|(id, count)| Some((*id, count - before[id])).filter(|(_, count)| *count > 0))
            .collect();
        assert!(moved.len() <= 1, "several allocations counted {spec:?}: {moved:?}");
        for (id, count) in &moved {
            assert_eq!(*count, PACKETS, "allocation {id} counted {spec:?}");
        }
        let counted = moved.first().map(|(id, _)| *id);
        assert_eq!(explained, counted, "explained and counted differ: {spec:?}");
        counted
    }
}

type Change = fn(&mut FrameSpec);

/// A selector, packets that it takes and packets that it leaves, each by what differs from a UDP
/// packet of 100 bytes from port 4000 to port 5000.
struct Case {
    flow: &'static str,
    takes: &'static [(&'static str, Change)],
    leaves: &'static [(&'static str, Change)],
}

const CASES: [Case; 10] = [
    Case {
        flow: "udp from {far} to {near}:5000-5010",
        takes: &[
            ("the first port", |_| {}),
            ("a port between", |frame| frame.ports.1 = 5_005),
            ("the last port", |frame| frame.ports.1 = 5_010),
            ("another source port", |frame| frame.ports.0 = 1),
        ],
        leaves: &[
            ("a port below", |frame| frame.ports.1 = 4_999),
            ("a port above", |frame| frame.ports.1 = 5_011),
            ("TCP", |frame| frame.protocol = TCP),
        ],
    },
    Case {
        flow: "udp from {far}:4000-4001 to {near}",
        takes: &[("the first port", |_| {}), ("the last port", |frame| frame.ports.0 = 4_001)],
        leaves: &[
            ("a port below", |frame| frame.ports.0 = 3_999),
            ("a port above", |frame| frame.ports.0 = 4_002),
        ],
    },
    Case {
        flow: "from {far} to {near}:5000",
        takes: &[
            ("UDP", |_| {}),
            ("TCP", |frame| frame.protocol = TCP),
            ("SCTP", |frame| frame.protocol = SCTP),
        ],
        leaves: &[("GRE, which has no ports", |frame| frame.protocol = GRE)],
    },
    Case {
        flow: "from {far} to {near} dscp EF",
        takes: &[
            ("EF", |frame| frame.dscp = 46),
            ("EF with ECN", |frame| (frame.dscp, frame.ecn) = (46, 3)),
            ("EF of another protocol", |frame| (frame.dscp, frame.protocol) = (46, GRE)),
        ],
        leaves: &[
            ("no code point", |_| {}),
            ("a bit less", |frame| frame.dscp = 44),
            ("a bit more", |frame| frame.dscp = 47),
        ],
    },
    Case {
        flow: "from {far} to {near} dscp 0",
        takes: &[("no code point", |_| {})],
        leaves: &[("code point 1", |frame| frame.dscp = 1)],
    },
    Case {
        flow: "from {far} to {near} length 100-200",
        takes: &[("the shortest", |_| {}), ("the longest", |frame| frame.length = 200)],
        leaves: &[
            ("a byte less", |frame| frame.length = 99),
            ("a byte more", |frame| frame.length = 201),
            ("a full packet", |frame| frame.length = 1_500),
        ],
    },
    Case {
        flow: "gre from {far} to {near}",
        takes: &[("GRE", |frame| frame.protocol = GRE)],
        leaves: &[("UDP", |_| {}), ("GRE's neighbour", |frame| frame.protocol = GRE + 1)],
    },
    Case {
        flow: "sctp from {far} to {near}:5000",
        takes: &[("SCTP", |frame| frame.protocol = SCTP)],
        leaves: &[("UDP", |_| {}), ("another port", |frame| (frame.protocol, frame.ports.1) = (SCTP, 5_001))],
    },
    Case {
        flow: "253 from {far} to {near}",
        takes: &[("a protocol by its number", |frame| frame.protocol = 253)],
        leaves: &[("another", |frame| frame.protocol = 254)],
    },
    Case {
        flow: "udp from {far}:4000 to {near}:5000 dscp AF41 length 64-128",
        takes: &[("all fields", |frame| frame.dscp = 34)],
        leaves: &[
            ("another code point", |_| {}),
            ("another length", |frame| (frame.dscp, frame.length) = (34, 129)),
            ("another port", |frame| (frame.dscp, frame.ports.0) = (34, 4_001)),
            ("another protocol", |frame| (frame.dscp, frame.protocol) = (34, TCP)),
        ],
    },
];

#[test]
fn a_selector_takes_what_it_says_and_nothing_else() {
    let bed = Bed::new();
    for v6 in [false, true] {
        for Case { flow, takes, leaves } in CASES {
            let id = bed.grant(&format!("down {flow}"), v6, "");
            for (packets, wanted) in [(takes, Some(id)), (leaves, None)] {
                for (packet, change) in packets {
                    let mut spec = bed.frame(Direction::Downstream, v6);
                    change(&mut spec);
                    let counted = bed.counted_to(Direction::Downstream, &spec);
                    assert_eq!(counted, wanted, "`{flow}`, {packet}: {spec:?}");
                }
            }
            // The same packet the other way is none of its own.
            let turned = bed.frame(Direction::Upstream, v6);
            assert_eq!(bed.counted_to(Direction::Upstream, &turned), None, "`{flow}`, upstream");
            bed.daemon.revoke(id).unwrap();
        }
    }
}

#[test]
fn icmp_and_the_other_direction_are_selected_by_protocol() {
    let bed = Bed::new();
    for (v6, protocol, name) in [(false, ICMP, "icmp"), (true, ICMP6, "icmp6")] {
        let up = bed.grant(&format!("up {name} from {{near}} to {{far}}"), v6, "");
        let udp = bed.grant("up udp from {near}:4000 to {far}", v6, "");
        let frame = |protocol: u8| FrameSpec { protocol, ..bed.frame(Direction::Upstream, v6) };
        assert_eq!(bed.counted_to(Direction::Upstream, &frame(protocol)), Some(up), "{name}");
        assert_eq!(bed.counted_to(Direction::Upstream, &frame(UDP)), Some(udp), "UDP beside {name}");
        assert_eq!(bed.counted_to(Direction::Upstream, &frame(TCP)), None, "TCP beside {name}");
        bed.daemon.revoke(up).unwrap();
        bed.daemon.revoke(udp).unwrap();
    }
}

#[test]
fn precedence_decides_then_age_and_the_next_takes_over() {
    let bed = Bed::new();
    for v6 in [false, true] {
        let wide = bed.grant("down from {far} to {near}", v6, "");
        let younger = bed.grant("down udp from {far} to {near}:5000", v6, "");
        let low = bed.grant("down udp from {far}:4000 to {near}:5000", v6, "--precedence 1");
        let high = bed.grant("down from {far} to {near} length 100", v6, "--precedence 9");
        let as_high = bed.grant("down udp from {far}:4000-4005 to {near}", v6, "--precedence 9");
        let frame = bed.frame(Direction::Downstream, v6);
        // The highest precedence, the older of two; then the others as those before them go.
        for winner in [high, as_high, low, wide, younger] {
            assert_eq!(bed.counted_to(Direction::Downstream, &frame), Some(winner), "IPv6 {v6}");
            bed.daemon.revoke(winner).unwrap();
        }
        assert_eq!(bed.counted_to(Direction::Downstream, &frame), None, "IPv6 {v6}: all are gone");
    }
}

#[test]
fn an_allocation_of_several_selectors_takes_what_any_of_them_says() {
    let bed = Bed::new();
    let flows = [
        "down udp from {far} to {near}:5000",
        "down tcp from {far} to {near}:443",
        "down gre from {far} to {near}",
    ];
    let flows: Vec<_> = flows.iter().map(|flow| format!("--flow '{}'", bed.filled(flow, false))).collect();
    let id = bed
        .daemon
        .grant(&format!("--provider video {} --max-down 10mbit --enforcement police", flows.join(" ")))
        .unwrap()
        .id;
    for (protocol, port, wanted, selector) in
        [(UDP, 5_000, Some(id), 0), (TCP, 443, Some(id), 1), (GRE, 0, Some(id), 2), (TCP, 5_000, None, 0)]
    {
        let spec = FrameSpec { protocol, ports: (4_000, port), ..bed.frame(Direction::Downstream, false) };
        assert_eq!(bed.counted_to(Direction::Downstream, &spec), wanted, "{spec:?}");
        let explained = bed.daemon.explain(Direction::Downstream, &spec.build().unwrap()).unwrap();
        assert_eq!(explained.explanation.selector, wanted.map(|_| selector), "{spec:?}");
    }
}

/// A later fragment whose first was not seen has no ports; a port rule holds it to its limits all
/// the same, but gives it nothing.
#[test]
fn a_stray_fragment_does_not_escape_a_port_rule() {
    let bed = Bed::new();
    let id = bed.grant("down udp from {far} to {near}:5000", false, "--dscp EF");
    let fragment = |id: u16, offset: u16, more: bool| FrameSpec {
        length: 500,
        fragment: Some((id, offset, more)),
        ..bed.frame(Direction::Downstream, false)
    };
    assert_eq!(bed.counted_to(Direction::Downstream, &fragment(7, 60, false)), Some(id), "a stray one");
    let marked = || bed.daemon.counts(id).unwrap().down.marked.packets;
    assert_eq!(marked(), 0, "it is not marked");
    assert_eq!(bed.counted_to(Direction::Downstream, &fragment(8, 0, true)), Some(id), "a first one");
    assert_eq!(bed.counted_to(Direction::Downstream, &fragment(8, 60, false)), Some(id), "its later one");
    assert_eq!(marked(), 2 * PACKETS, "both are marked");
    let other = FrameSpec { ports: (4_000, 6_000), ..fragment(9, 0, true) };
    assert_eq!(bed.counted_to(Direction::Downstream, &other), None, "another port's first one");
    assert_eq!(bed.counted_to(Direction::Downstream, &fragment(9, 60, false)), None, "and its later one");
}
