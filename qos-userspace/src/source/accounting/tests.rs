//! What is told by which attributes.

use proptest::prelude::*;

use super::*;
use crate::source::Secret;
use crate::source::radius::testing::{request, vendor};

type Attributes = Vec<(u8, Vec<u8>)>;

const START: u32 = 1;
const STOP: u32 = 2;
const NOW: i64 = 1_800_000_000;

fn status(status: u32) -> (u8, Vec<u8>) {
    (ACCT_STATUS_TYPE, status.to_be_bytes().to_vec())
}

fn word(kind: u8, number: u32) -> (u8, Vec<u8>) {
    (kind, number.to_be_bytes().to_vec())
}

fn session(more: Attributes) -> Attributes {
    let mut all = vec![
        status(START),
        (USER_NAME, b"dsl-7".to_vec()),
        (ACCT_SESSION_ID, b"0000A1".to_vec()),
        (NAS_IDENTIFIER, b"bras1".to_vec()),
        (FRAMED_IP_ADDRESS, vec![192, 0, 2, 10]),
    ];
    all.extend(more);
    all
}

fn told(attributes: &[(u8, Vec<u8>)], line: &[LineAttribute]) -> Told {
    let bytes = request(1, attributes, &Secret::from("s".to_owned()));
    let packet = Packet::parse(&bytes).expect("a packet");
    let now = Timestamp::from_second(NOW).expect("a time");
    read(&packet, [198, 51, 100, 1].into(), now, line, &"radius".parse().expect("a name"))
}

fn report(attributes: &[(u8, Vec<u8>)]) -> Report {
    match told(attributes, &[LineAttribute::UserName]) {
        Told::Report(report) => report,
        other => panic!("{other:?}"),
    }
}

fn facts(attributes: &[(u8, Vec<u8>)]) -> Facts {
    match report(attributes).event {
        Event::Up { facts, .. } => facts,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_start_tells_of_a_line_that_is_up() {
    let told = serde_json::to_value(report(&session(Vec::new()))).expect("JSON");
    let expected = serde_json::json!({
        "source": "radius", "at": "2027-01-15T08:00:00Z", "event": "up", "line": "dsl-7", "key": "bras1/0000A1",
        "addresses": ["192.0.2.10/32"], "rate": {"up": null, "down": null}, "link_layer": "ethernet",
        "overhead": null, "delay_us": 0, "loss_ppm": 0, "segments": [], "bras": "bras1"
    });
    assert_eq!(told, expected);
}

#[test]
fn a_stop_ends_the_session_that_it_names() {
    let mut attributes = session(Vec::new());
    attributes[0] = status(STOP);
    let line = "dsl-7".parse().expect("a name");
    assert_eq!(report(&attributes).event, Event::Down { line, key: Some("bras1/0000A1".to_owned()) });
}

#[test]
fn a_bras_that_starts_or_stops_takes_its_lines_with_it() {
    for (what, attributes, bras) in [
        ("its name", vec![status(7), (NAS_IDENTIFIER, b"bras1".to_vec()), (4, vec![10, 0, 0, 1])], "bras1"),
        (
            "its address",
            vec![status(8), (NAS_IDENTIFIER, b" \0".to_vec()), (4, vec![10, 0, 0, 1])],
            "10.0.0.1",
        ),
        ("its IPv6 address", vec![status(7), (95, Ipv6Addr::LOCALHOST.octets().to_vec())], "::1"),
        ("an address of 5 bytes", vec![status(7), (4, vec![10, 0, 0, 1, 1])], "198.51.100.1"),
        ("where it came from", vec![status(8)], "198.51.100.1"),
    ] {
        assert_eq!(report(&attributes).event, Event::BrasDown { bras: bras.to_owned() }, "{what}");
    }
}

#[test]
fn what_tells_nothing_is_told_apart_from_what_is_useless() {
    let mut without_address = session(Vec::new());
    without_address.pop();
    let user = [LineAttribute::UserName];
    assert_eq!(told(&without_address, &user), Told::Nothing, "no address yet");
    let mut chosen_by_the_bras = without_address.clone();
    chosen_by_the_bras.push((FRAMED_IP_ADDRESS, vec![255, 255, 255, 254]));
    assert_eq!(told(&chosen_by_the_bras, &user), Told::Nothing);
    for other in [9, 10, 15] {
        assert_eq!(told(&[status(other)], &user), Told::Nothing, "status {other}");
    }
    assert!(matches!(told(&session(Vec::new())[1..], &user), Told::Useless(_)), "no status");
    assert!(matches!(told(&session(Vec::new()), &[LineAttribute::NasPortId]), Told::Useless(_)), "no line");
}

#[test]
fn the_first_attribute_that_is_there_names_the_line() {
    let circuit = b"Access-Node-7 atm 1/1/03/42:8.35";
    let attributes =
        session(vec![vendor(ADSL_FORUM, AGENT_CIRCUIT_ID, circuit), (NAS_PORT_ID, b"xe-0.7".to_vec())]);
    for (line, expected) in [
        (vec![LineAttribute::UserName], "dsl-7"),
        (vec![LineAttribute::CallingStationId, LineAttribute::NasPortId], "xe-0.7"),
        (vec![LineAttribute::AgentCircuitId, LineAttribute::UserName], "Access-Node-7-atm-1-1-"),
    ] {
        let Told::Report(Report { event: Event::Up { line, .. }, .. }) = told(&attributes, &line) else {
            panic!("no line")
        };
        assert!(line.as_str().starts_with(expected), "{line}");
    }
}

#[test]
fn all_that_is_the_subscribers_is_told_once() {
    let prefix = |kind, length: u8, text: &str| {
        let address: Ipv6Addr = text.parse().expect("an address");
        (kind, [&[0, length], &address.octets()[..usize::from(length).div_ceil(8)]].concat())
    };
    let attributes = session(vec![
        (9, vec![255, 255, 255, 0]),
        (FRAMED_IP_ADDRESS, vec![192, 0, 2, 10]),
        prefix(FRAMED_IPV6_PREFIX, 64, "2001:db8:1:2::"),
        (FRAMED_IPV6_ADDRESS, "2001:db8:1:2::7".parse::<Ipv6Addr>().expect("an address").octets().to_vec()),
        (FRAMED_IPV6_ADDRESS, "2001:db8:9::7".parse::<Ipv6Addr>().expect("an address").octets().to_vec()),
        prefix(DELEGATED_IPV6_PREFIX, 56, "2001:db8:2:300::"),
        (FRAMED_ROUTE, b"198.51.100.0/29 192.0.2.10 1".to_vec()),
        (FRAMED_ROUTE, b"0.0.0.0/0 192.0.2.10".to_vec()),
        (FRAMED_IPV6_ROUTE, b"2001:db8:3::/48 :: 1".to_vec()),
        (FRAMED_IPV6_PREFIX, vec![0, 129, 1]),
        (FRAMED_IPV6_PREFIX, vec![0, 64, 1]),
        (FRAMED_IPV6_PREFIX, vec![0]),
        (FRAMED_IPV6_ADDRESS, vec![1, 2, 3]),
    ]);
    let all: Vec<_> = facts(&attributes).addresses.iter().map(ToString::to_string).collect();
    let expected = [
        "192.0.2.10/32",
        "2001:db8:9::7/128",
        "2001:db8:1:2::/64",
        "2001:db8:2:300::/56",
        "198.51.100.0/29",
        "2001:db8:3::/48",
    ];
    assert_eq!(all, expected);
}

#[test]
fn rates_and_delay_are_those_of_the_adsl_forum() {
    let vsa = |kind, number: u32| vendor(ADSL_FORUM, kind, &number.to_be_bytes());
    let told = facts(&session(vec![
        vsa(ACTUAL_DATA_RATE_UPSTREAM, 1_184_000),
        vsa(ACTUAL_DATA_RATE_DOWNSTREAM, 17_696_000),
        vsa(ACTUAL_INTERLEAVING_DELAY_UPSTREAM, 4),
        vsa(ACTUAL_INTERLEAVING_DELAY_DOWNSTREAM, 8),
    ]));
    let expected = Directed { up: Some(BitsPerSecond(1_184_000)), down: Some(BitsPerSecond(17_696_000)) };
    assert_eq!((told.rate, told.delay_us), (expected, 8_000));
    let strange = facts(&session(vec![
        vsa(ACTUAL_DATA_RATE_UPSTREAM, 0),
        vendor(ADSL_FORUM, ACTUAL_DATA_RATE_DOWNSTREAM, &[1, 2]),
        vsa(ACTUAL_INTERLEAVING_DELAY_UPSTREAM, u32::MAX),
    ]));
    assert_eq!((strange.rate, strange.delay_us), (Directed::default(), 0));
}

/// The overheads are those that tc-cake(8) has for the same framings.
#[test]
fn the_encapsulation_of_the_loop_says_link_layer_and_overhead() {
    let (ppp, interworking) = (word(FRAMED_PROTOCOL, 1), vendor(ADSL_FORUM, IWF_SESSION, &[]));
    for (name, bytes, more, expected) in [
        ("pppoa-llc", [1, 0, 1], vec![ppp.clone()], (LinkLayer::Atm, Some(14))),
        ("pppoa-vcmux", [1, 0, 2], vec![ppp.clone(), interworking], (LinkLayer::Atm, Some(10))),
        ("ipoa-llcsnap", [1, 0, 3], vec![], (LinkLayer::Atm, Some(16))),
        ("ipoa-vcmux", [1, 0, 4], vec![], (LinkLayer::Atm, Some(8))),
        ("bridged-llcsnap", [1, 1, 6], vec![], (LinkLayer::Atm, Some(32))),
        ("bridged-llcsnap with FCS", [1, 1, 5], vec![], (LinkLayer::Atm, Some(36))),
        ("bridged-vcmux", [1, 1, 8], vec![], (LinkLayer::Atm, Some(24))),
        ("pppoe-llcsnap", [1, 1, 6], vec![ppp.clone()], (LinkLayer::Atm, Some(40))),
        ("pppoe-vcmux", [1, 0, 8], vec![ppp.clone()], (LinkLayer::Atm, Some(32))),
        ("pppoe-ptm", [2, 1, 0], vec![ppp], (LinkLayer::Ptm, Some(30))),
        ("bridged-ptm", [2, 0, 0], vec![], (LinkLayer::Ptm, Some(22))),
        ("bridged-ptm, tagged", [2, 2, 0], vec![], (LinkLayer::Ptm, Some(26))),
        ("ATM, nothing more", [1, 0, 0], vec![], (LinkLayer::Atm, None)),
        ("nothing", [0, 0, 0], vec![], (LinkLayer::Ethernet, None)),
    ] {
        let mut attributes = session(more);
        attributes.push(vendor(ADSL_FORUM, ACCESS_LOOP_ENCAPSULATION, &bytes));
        let told = facts(&attributes);
        assert_eq!((told.link_layer, told.overhead), expected, "{name}");
    }
}

#[test]
fn the_time_is_that_of_the_event_where_it_can_be_believed() {
    let now = u32::try_from(NOW).expect("fits");
    let (event, delay) = (|at| word(EVENT_TIMESTAMP, at), |seconds| word(ACCT_DELAY_TIME, seconds));
    for (name, more, expected) in [
        ("nothing", vec![], now),
        ("a delay", vec![delay(30)], now - 30),
        ("an event", vec![event(now - 40)], now - 40),
        ("both agree", vec![event(now - 29), delay(30)], now - 29),
        ("a clock that is ahead", vec![event(now + 100), delay(0)], now),
        ("a clock that is far ahead", vec![event(now + 9_000), delay(10)], now - 10),
        ("a clock that is behind", vec![event(now - 7_200), delay(10)], now - 10),
        ("a clock that was never set", vec![event(86_400)], now),
        ("an event of three bytes", vec![(EVENT_TIMESTAMP, vec![1, 2, 3])], now),
    ] {
        assert_eq!(report(&session(more)).at.as_second(), i64::from(expected), "{name}");
    }
}

#[test]
fn a_key_is_never_too_long_and_tells_sessions_apart() {
    let long = |last: u8| {
        let mut attributes = session(Vec::new());
        attributes[2].1 = [vec![b'x'; 250], vec![last]].concat();
        match report(&attributes).event {
            Event::Up { key: Some(key), .. } => key,
            other => panic!("{other:?}"),
        }
    };
    assert!(long(1).len() <= LONGEST_KEY);
    assert_ne!(long(b'1'), long(b'2'));
}

proptest! {
    #[test]
    fn any_attributes_are_read(
        values in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..40)), 0..12),
        status_type in 0..20_u32,
    ) {
        let mut attributes = session(Vec::new());
        attributes[0] = status(status_type);
        attributes.extend(values.into_iter().filter(|(kind, _)| *kind != 80));
        if let Told::Report(Report { event: Event::Up { facts, .. }, .. }) =
            told(&attributes, &[LineAttribute::UserName])
        {
            prop_assert!((1..=MOST_ADDRESSES).contains(&facts.addresses.len()));
        }
    }
}
