//! What is decided: case by case, and over generated histories.
#![expect(clippy::needless_pass_by_value, reason = "commands and requests are made where they are used")]

use std::collections::BTreeMap;
use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;

use super::record::{Actor, Record, records};
use super::state::rules;
use super::{
    Change, Command, Decision, GrantRequest, LevelRequest, LineSide, Network, NewProvider, NewSession,
    Preempt, Refusal, RefusalCode, SlotKind, State, capacity, decide,
};
use crate::domain::{
    Allocation, AllocationId, BitsPerSecond, ByteCount, Contract, Directed, Direction, DurationRange,
    Enforcement, Level, LinkLayer, Name, Profile, ProfileStatus, ProviderKind, Segment, Status, selector,
};

pub(crate) fn network() -> Network {
    Network {
        line_rate: Directed::default(),
        link: Directed { up: rate("1gbit"), down: rate("1gbit") },
        line_side: LineSide::Lan,
        soft_share: 0.95,
        line_rest: capacity::SMALLEST_REST,
        link_rest: capacity::SMALLEST_REST,
        mtu: 1_500,
        max_rules: qos_common::abi::MAX_RULES,
        require_session: false,
        session_ttl: SignedDuration::from_hours(1),
        session_grace: SignedDuration::from_mins(5),
        preempt: Preempt::Never,
    }
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn rate(text: &str) -> BitsPerSecond {
    text.parse().unwrap()
}

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn provider(text: &str, kind: ProviderKind, networks: &[&str]) -> NewProvider {
    NewProvider {
        name: name(text),
        kind,
        networks: networks.iter().map(|network| network.parse().unwrap()).collect(),
        contract: Contract::default(),
    }
}

fn add_application(provider: &str, text: &str) -> Command {
    Command::AddApplication { provider: name(provider), name: name(text), contract: Contract::default() }
}

fn session(text: &str, addresses: &[&str], down: &str, up: &str) -> NewSession {
    NewSession {
        name: name(text),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        rate: Directed { up: rate(up), down: rate(down) },
        link_layer: LinkLayer::Ethernet,
        overhead: None,
        delay_us: 0,
        loss_ppm: 0,
        segments: Vec::new(),
        bras: None,
        source: None,
    }
}

fn request(provider: &str, flows: &str) -> GrantRequest {
    GrantRequest {
        provider: name(provider),
        application: None,
        selectors: selector::parse_flows(flows).unwrap(),
        profile: None,
        level: LevelRequest { priority: Some(2), ..LevelRequest::default() },
        precedence: 0,
        duration: None,
    }
}

fn guaranteed(down: &str) -> LevelRequest {
    LevelRequest { guaranteed: Directed { up: None, down: Some(rate(down)) }, ..LevelRequest::default() }
}

fn carry_out(state: &mut State, command: Command) -> Decision {
    let decision = decide(state, &command, now()).unwrap_or_else(|refusal| panic!("{command:?}: {refusal}"));
    for change in &decision.changes {
        state.apply(change);
    }
    decision
}

fn grant(state: &mut State, request: GrantRequest) -> Allocation {
    let decision = carry_out(state, Command::Grant(Box::new(request)));
    let [Change::PutAllocation(allocation)] = &decision.changes[..] else { panic!("{decision:?}") };
    allocation.clone()
}

fn warnings(state: &State, request: GrantRequest) -> Vec<String> {
    decide(state, &Command::Grant(Box::new(request)), now()).unwrap().warnings
}

fn refused(state: &State, command: Command) -> Refusal {
    match decide(state, &command, now()) {
        Ok(decision) => panic!("{command:?} was granted: {decision:?}"),
        Err(refusal) => refusal,
    }
}

fn refused_grant(state: &State, request: GrantRequest) -> Refusal {
    refused(state, Command::Grant(Box::new(request)))
}

/// Providers of both kinds, a 20/5 Mbit/s line and a slower one that loses packets, a profile; and
/// the changes that made it.
pub(crate) fn town() -> (State, Vec<Change>) {
    let slow = NewSession {
        loss_ppm: 2_000,
        delay_us: 8_000,
        ..session("dsl-2", &["192.0.2.2/32"], "2mbit", "500kbit")
    };
    let guaranteed = Directed { up: None, down: Some(rate("1mbit")) };
    let voice = Profile {
        name: name("voice"),
        level: Level { guaranteed, loss: Some(0.1 + 0.2), priority: 1, ..Level::default() },
        status: ProfileStatus::Active,
        duration: DurationRange { shortest: None, longest: None },
    };
    let acme = provider("acme", ProviderKind::Application, &["198.51.100.0/24", "2001:db8:a::/48"]);
    let isp = provider("isp", ProviderKind::Network, &["192.0.2.0/24", "2001:db8:b::/48"]);
    let line = session("dsl-1", &["192.0.2.1/32", "2001:db8:b:1::/64"], "20mbit", "5mbit");
    let mut state = State::new(network());
    let changes = [
        Command::AddProvider(acme),
        Command::AddProvider(isp),
        add_application("acme", "video"),
        Command::AddSession(line),
        Command::AddSession(slow),
        Command::PutProfile(voice),
    ]
    .into_iter()
    .flat_map(|command| carry_out(&mut state, command).changes)
    .collect();
    (state, changes)
}

/// A small grant on line dsl-1, another one for each `number`.
pub(crate) fn grant_on_line(number: u32) -> Command {
    Command::Grant(Box::new(GrantRequest {
        level: guaranteed("2kbit"),
        duration: Some(SignedDuration::from_hours(1)),
        application: number.is_multiple_of(2).then(|| name("video")),
        ..request("acme", &format!("down udp from 198.51.100.0/24:{} to 192.0.2.1", number + 1))
    }))
}

/// Profile `call`, of one minute to two hours.
fn with_call() -> State {
    let mut state = town().0;
    let call = Profile {
        name: name("call"),
        level: Level { dscp: Some(46), ..Level::default() },
        status: ProfileStatus::Active,
        duration: DurationRange {
            shortest: Some(SignedDuration::from_mins(1)),
            longest: Some(SignedDuration::from_hours(2)),
        },
    };
    carry_out(&mut state, Command::PutProfile(call));
    state
}

fn call(duration: Option<SignedDuration>) -> GrantRequest {
    let (profile, level) = (Some(name("call")), LevelRequest::default());
    GrantRequest { profile, level, duration, ..request("acme", TO_DSL_1) }
}

#[test]
fn a_profile_says_how_long_and_whether() {
    let mut state = with_call();
    let ask = |state: &State, duration| refused(state, Command::Grant(Box::new(call(duration))));
    for (duration, text) in [
        (None, "duration: no end is asked for, and profile call lasts 2h at most"),
        (
            Some(SignedDuration::from_secs(59)),
            "duration: 59s is shorter than 1m, the shortest of profile call",
        ),
        (
            Some(SignedDuration::from_secs(7_201)),
            "duration: 2h 1s is longer than 2h, the longest of profile call",
        ),
    ] {
        let refusal = ask(&state, duration);
        assert_eq!((refusal.code, refusal.message.as_str()), (RefusalCode::DurationOutOfRange, text));
    }
    let hour = Some(SignedDuration::from_hours(1));
    let granted = grant(&mut state, call(hour));
    for status in [ProfileStatus::Inactive, ProfileStatus::Deprecated] {
        let profile = Profile { status, ..state.profiles[&name("call")].clone() };
        carry_out(&mut state, Command::PutProfile(profile));
        let refusal = ask(&state, hour);
        assert_eq!(refusal.code, RefusalCode::ProfileNotApplicable);
        assert!(refusal.message.contains(status.name()), "{refusal}");
        assert!(state.allocations.contains_key(&granted.id), "what was granted stays");
    }
    let upside_down = DurationRange {
        shortest: Some(SignedDuration::from_hours(2)),
        longest: Some(SignedDuration::from_hours(1)),
    };
    let profile = Profile { duration: upside_down, ..state.profiles[&name("call")].clone() };
    let refusal = refused(&state, Command::PutProfile(profile));
    assert_eq!(refusal.field.as_deref(), Some("duration.shortest"), "{refusal}");
}

#[test]
fn an_extension_ends_where_the_profile_does() {
    let mut state = with_call();
    let hours = SignedDuration::from_hours;
    let id = grant(&mut state, call(Some(hours(1)))).id;
    let extended = |state: &mut State, id, by| {
        let decision = carry_out(state, Command::Extend { id, by });
        (state.allocations[&id].expires_at.unwrap().to_string(), decision.warnings)
    };
    let by = SignedDuration::from_mins(30);
    assert_eq!(extended(&mut state, id, by), ("2026-01-01T01:30:00Z".to_owned(), vec![]));
    let cut = "extended to 2026-01-01T02:00:00Z: profile call lasts 2h at most".to_owned();
    for _ in 0..2 {
        assert_eq!(
            extended(&mut state, id, hours(1)),
            ("2026-01-01T02:00:00Z".to_owned(), vec![cut.clone()])
        );
    }
    // A profile that lasts less now takes nothing back.
    let shorter = DurationRange { shortest: None, longest: Some(hours(1)) };
    let profile = Profile { duration: shorter, ..state.profiles[&name("call")].clone() };
    carry_out(&mut state, Command::PutProfile(profile));
    assert_eq!(extended(&mut state, id, hours(1)).0, "2026-01-01T02:00:00Z");
    // Without its profile nothing limits it.
    carry_out(&mut state, Command::RemoveProfile { name: name("call") });
    assert_eq!(extended(&mut state, id, hours(1)), ("2026-01-01T03:00:00Z".to_owned(), vec![]));

    let forever = GrantRequest { level: guaranteed("1mbit"), ..request("acme", TO_DSL_1) };
    let forever = grant(&mut state, GrantRequest { precedence: 1, ..forever }).id;
    for (id, by, text) in [
        (id, hours(0), "by: 0s ends before it begins"),
        (id, hours(-1), "by: 1h ago ends before it begins"),
        (id, hours(100 * 366 * 24), "longer than 100 years"),
        (forever, hours(1), "has no end"),
        (AllocationId(9), hours(1), "id: allocation 9 was never granted"),
    ] {
        let refusal = refused(&state, Command::Extend { id, by });
        assert!(refusal.message.contains(text), "{refusal}");
    }
    carry_out(&mut state, Command::Revoke { id });
    assert!(refused(&state, Command::Extend { id, by }).message.contains("has ended already"));
}

/// Lines dsl-3 and dsl-4 of 20/5 Mbit/s behind one DSLAM of 12/3, of which 2 are nobody's downstream.
fn with_dslam() -> State {
    let mut state = town().0;
    let capacity = Directed { up: rate("3mbit"), down: rate("12mbit") };
    let rest = Directed { up: None, down: Some(rate("2mbit")) };
    carry_out(&mut state, Command::PutSegment(Segment { name: name("dslam"), capacity, rest }));
    for number in 3..=4 {
        let line = session(&format!("dsl-{number}"), &[&format!("192.0.2.{number}/32")], "20mbit", "5mbit");
        carry_out(&mut state, Command::AddSession(NewSession { segments: vec![name("dslam")], ..line }));
    }
    state
}

#[test]
fn lines_behind_a_segment_share_it() {
    let mut state = with_dslam();
    let to = |host: u8, level: &str| {
        let flows = format!("down udp from 198.51.100.0/24 to 192.0.2.{host}");
        GrantRequest { level: guaranteed(level), ..request("acme", &flows) }
    };
    let first = grant(&mut state, to(3, "6mbit")).id;
    grant(&mut state, to(4, "3mbit"));
    let refusal = refused_grant(&state, GrantRequest { precedence: 1, ..to(4, "2mbit") });
    assert_eq!(refusal.code, RefusalCode::InsufficientCapacity);
    assert_eq!(refusal.message, "segment dslam downstream: asked 2 Mbit/s, left 1 Mbit/s");
    grant(&mut state, to(1, "2mbit"));
    grant(&mut state, GrantRequest { precedence: 1, ..to(4, "1mbit") });
    assert_eq!(
        state.promised_on_segment(&name("dslam")),
        Directed { up: BitsPerSecond(0), down: rate("10mbit") }
    );
    carry_out(&mut state, Command::Revoke { id: first });
    assert_eq!(state.left_on_segment(&name("dslam"), Direction::Downstream, &[]), rate("6mbit"));

    // What carries less than it did is told of, and admits nothing more.
    let smaller = Segment { rest: Directed::default(), ..state.segments[&name("dslam")].clone() };
    let smaller = Segment { capacity: Directed { up: rate("3mbit"), down: rate("1mbit") }, ..smaller };
    let told = carry_out(&mut state, Command::PutSegment(smaller)).warnings;
    assert_eq!(told, ["downstream: 4 Mbit/s are promised already, 1 Mbit/s are there for it"]);
    assert_eq!(
        state.overcommitted_segments(),
        ["segment dslam downstream: 4 Mbit/s promised, 1 Mbit/s there"]
    );
    // The next start takes it as it is.
    assert_eq!(state.overcommitted(), [""; 0]);
    let refusal = refused_grant(&state, to(3, "1mbit"));
    assert_eq!(refusal.message, "segment dslam downstream: asked 1 Mbit/s, left 0 bit/s");
}

#[test]
fn segments_that_can_not_be_are_refused() {
    let state = with_dslam();
    let segment = |down: &str, rest: Option<&str>| {
        let capacity = Directed { up: rate("3mbit"), down: rate(down) };
        let rest = Directed { up: None, down: rest.map(rate) };
        Command::PutSegment(Segment { name: name("olt"), capacity, rest })
    };
    let behind = |names: &[&str]| {
        let line = session("dsl-9", &["192.0.2.9/32"], "20mbit", "5mbit");
        let segments = names.iter().map(|text| name(text)).collect();
        Command::AddSession(NewSession { segments, ..line })
    };
    for (command, field, text) in [
        (segment("0", None), "capacity.down", "is zero"),
        (segment("1mbit", Some("2mbit")), "rest.down", "is above the capacity of 1 Mbit/s"),
        (behind(&["dslan"]), "segments[0]", "there is no segment dslan (did you mean dslam?)"),
        (behind(&["dslam", "dslam"]), "segments[1]", "is named twice"),
        (behind(&["dslam"; 9]), "segments", "a line is behind 8 at most"),
        (Command::RemoveSegment { name: name("dslam") }, "name", "in use by session dsl-3, dsl-4"),
        (Command::RemoveSegment { name: name("olt") }, "name", "there is no segment olt"),
    ] {
        let refusal = refused(&state, command);
        assert_eq!(refusal.field.as_deref(), Some(field), "{refusal}");
        assert!(refusal.message.contains(text), "{refusal}");
    }
}

/// A command at another time, and what it changes.
fn carry_out_at(state: &mut State, command: Command, at: Timestamp) -> Decision {
    let decision = decide(state, &command, at).unwrap();
    decision.changes.iter().for_each(|change| state.apply(change));
    decision
}

fn ended(decision: &Decision) -> Vec<(u64, &str)> {
    let ended = decision.changes.iter().filter_map(|change| match change {
        Change::EndAllocation(allocation) => Some(allocation),
        _ => None,
    });
    ended.map(|allocation| (allocation.id.0, allocation.reason.as_deref().unwrap_or_default())).collect()
}

/// dsl-1 with three allocations on it: 8 Mbit/s at priority 1, 6 at 3, 2 at 3.
fn with_three() -> State {
    let mut state = town().0;
    for (port, level, priority) in [(1, "8mbit", 1), (2, "6mbit", 3), (3, "2mbit", 3)] {
        let level = LevelRequest { priority: Some(priority), ..guaranteed(level) };
        grant(&mut state, GrantRequest { level, ..request("acme", &format!("{TO_DSL_1}:{port}")) });
    }
    state
}

fn dsl_1(address: &str, down: &str) -> NewSession {
    session("dsl-1", &[address], down, "5mbit")
}

#[test]
fn a_line_that_comes_back_slower_sheds_the_worst_priority_first_and_of_that_the_youngest() {
    let state = with_three();
    for (speed, expected) in [
        ("20mbit", &[][..]),
        ("15mbit", &[(3, "line dsl-1 downstream: 16.008 Mbit/s were promised, 15 Mbit/s are there")][..]),
        ("10mbit", &[(3, "16.008"), (2, "14.008")][..]),
        ("5mbit", &[(3, "16.008"), (2, "14.008"), (1, "8.008")][..]),
    ] {
        let mut state = state.clone();
        let told = carry_out(&mut state, Command::StartSession(dsl_1("192.0.2.1/32", speed)));
        let ended = ended(&told);
        assert_eq!(ended.len(), expected.len(), "{speed}: {ended:?}");
        for ((id, reason), (expected, text)) in ended.iter().zip(expected) {
            assert!(id == expected && reason.contains(text), "{speed}: {id} {reason}");
        }
        assert_eq!(told.warnings.len(), expected.len(), "each is told: {:?}", told.warnings);
        check(&state);
        // And nothing is given back that was not there.
        assert_eq!(state.sessions[&name("dsl-1")].rate.down, rate(speed));
    }
}

#[test]
fn records_tell_what_followed_for_others() {
    let at = |seconds: i64| now().checked_add(SignedDuration::from_secs(seconds)).unwrap();
    let told = |state: &mut State, command: Command, at: Timestamp| -> Vec<String> {
        let decision = decide(state, &command, at).unwrap();
        let records = records(state, &command, &decision, &Actor::Daemon, at);
        for change in &decision.changes {
            state.apply(change);
        }
        let option = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        records
            .iter()
            .map(|record| {
                let id = option(record.allocation.map(|id| id.to_string()));
                let line = option(record.session.as_ref().map(ToString::to_string));
                format!("{} {line} {id}: {}", record.action, option(record.reason.clone()))
            })
            .collect()
    };
    let mut state = with_three();
    let slower = Command::StartSession(dsl_1("192.0.2.1/32", "15mbit"));
    let shed = told(&mut state, slower.clone(), at(0));
    assert!(shed[0].starts_with("start_session dsl-1 -: "), "{shed:?}");
    assert!(shed[1].starts_with("end dsl-1 3: network terminated: line dsl-1 downstream"), "{shed:?}");
    assert_eq!(shed.len(), 2);
    assert_eq!(told(&mut state, slower, at(1)), [""; 0], "nothing is new");

    let moved = told(&mut state, Command::StartSession(dsl_1("192.0.2.77/32", "15mbit")), at(2));
    let expected = [
        "start_session dsl-1 -: -",
        "move dsl-1 1: its line has other addresses",
        "move dsl-1 2: its line has other addresses",
    ];
    assert_eq!(moved, expected);
    let revoked = told(&mut state, Command::Revoke { id: AllocationId(1) }, at(4));
    assert_eq!(revoked, ["revoke dsl-1 1: -"]);
    told(&mut state, Command::StopSession { name: name("dsl-1") }, at(5));
    let gone = told(&mut state, Command::Expire, at(305));
    let expected = [
        "end dsl-1 2: network terminated: line dsl-1 was down since 2026-01-01T00:00:05Z",
        "remove_session dsl-1 -: down for the grace time",
    ];
    assert_eq!(gone, expected);
    assert_eq!(told(&mut state, Command::Expire, at(306)), [""; 0]);

    // Of many selectors a few are kept.
    let flows: Vec<_> =
        (1..=40).map(|port| format!("down udp from 198.51.100.0/24 to 192.0.2.2:{port}")).collect();
    let mut long = request("acme", &flows[0]);
    long.selectors = flows.iter().map(|flow| flow.parse().unwrap()).collect();
    let kept = |request: GrantRequest| {
        let command = Command::Grant(Box::new(request));
        Record::of_command(&state, &command, &Actor::User(None), at(306)).asked.unwrap()
    };
    let asked = kept(long.clone());
    assert_eq!(
        (asked["selectors"].as_array().unwrap().len(), &asked["selectors_left_out"]),
        (16, &24.into())
    );
    long.selectors.truncate(16);
    let mut whole = kept(long);
    assert_eq!(whole.get("selectors_left_out"), None);
    whole["selectors_left_out"] = 24.into();
    assert_eq!(asked, whole, "all else is the same");

    // A line that reports itself: only what it changes is kept.
    let reported = |line: &str| {
        let line = session(line, &["192.0.2.7/32"], "20mbit", "5mbit");
        Command::StartSession(NewSession { source: Some(name("radius")), ..line })
    };
    assert_eq!(told(&mut state, reported("one"), at(400)), ["start_session one -: -"]);
    assert_eq!(told(&mut state, reported("one"), at(400 + 900)), [""; 0], "a sign of life");
    let displaced = told(&mut state, reported("two"), at(1_400));
    assert_eq!(displaced[1..], ["remove_session one -: its addresses are those of line two"]);
    assert_eq!(told(&mut state, Command::Expire, at(1_400 + 3_600)), ["stop_session two -: no sign of life"]);
}

/// What is granted to acme on a flow to dsl-1.
fn ask(level: LevelRequest) -> GrantRequest {
    GrantRequest { level, ..request("acme", TO_DSL_1) }
}

#[test]
fn as_much_is_granted_as_there_is_down_to_what_is_of_use() {
    let (mut state, _) = town();
    grant(
        &mut state,
        GrantRequest { level: guaranteed("15mbit"), ..request("acme", &format!("{TO_DSL_1}:1")) },
    );
    let range = |least: &str, most: Option<&str>| LevelRequest {
        least: Directed { up: None, down: Some(rate(least)) },
        guaranteed: Directed { up: None, down: most.map(rate) },
        ..LevelRequest::default()
    };
    let left = state.left_on_line(&name("dsl-1"), Direction::Downstream, &[]);
    for (least, most, granted) in [
        ("1mbit", Some("2mbit"), rate("2mbit")),
        ("1mbit", Some("9mbit"), left),
        ("1mbit", None, rate("1mbit")),
    ] {
        let level = grant(&mut state.clone(), ask(range(least, most))).level;
        assert_eq!(level.guaranteed.down, Some(granted), "{least} to {most:?}");
    }
    let refusal = refused_grant(&state, ask(range("6mbit", Some("9mbit"))));
    assert_eq!(refusal.message, format!("line dsl-1 downstream: asked 6 Mbit/s, left {left}"));
    let offer = refusal.counter_offer.expect("an offer");
    assert_eq!(offer.guaranteed.down, Some(left));
    grant(&mut state, ask(*offer));
    for (level, field, text) in [
        (range("3mbit", Some("2mbit")), "level.least.down", "is above the guaranteed rate of 2 Mbit/s"),
        (range("0", None), "level.least.down", "is zero"),
    ] {
        let refusal = refused_grant(&state, ask(level));
        assert_eq!(refusal.field.as_deref(), Some(field), "{refusal}");
        assert!(refusal.message.contains(text) && refusal.counter_offer.is_none(), "{refusal}");
    }
}

#[test]
fn a_need_gets_the_latest_priority_and_the_largest_burst_that_keep_it() {
    let (mut state, _) = town();
    let level = LevelRequest { priority: Some(3), ..guaranteed("5mbit") };
    grant(&mut state, GrantRequest { level, ..request("acme", &format!("{TO_DSL_1}:1")) });
    let needs = |delay: u32| LevelRequest { delay_us: Some(delay), ..guaranteed("1mbit") };
    let mut before = (8, u64::MAX);
    let mut met = Vec::new();
    for delay in [60_000, 20_000, 12_000, 8_000, 6_000] {
        match decide(&state, &Command::Grant(Box::new(ask(needs(delay)))), now()) {
            Ok(decision) => {
                let Some(Change::PutAllocation(granted)) = decision.changes.first() else {
                    panic!("a grant")
                };
                assert!(granted.delay_bound.down.unwrap().whole_us <= delay);
                let cost = (granted.level.priority, granted.level.burst.down.unwrap().0);
                assert!(cost <= before, "a tighter need does not cost less: {cost:?} after {before:?}");
                before = cost;
                met.push(cost.0);
            }
            Err(refusal) => {
                let offer = refusal.counter_offer.expect("an offer");
                assert!(offer.delay_us.unwrap() > delay, "{offer:?}");
                grant(&mut state.clone(), ask(*offer));
            }
        }
    }
    assert_eq!(met.first(), Some(&7), "nothing has to come first: {met:?}");
    assert!(met.last() < Some(&3), "what has to come first does: {met:?}");
    // Who names a priority gets that one.
    let named = LevelRequest { priority: Some(5), ..needs(60_000) };
    assert_eq!(grant(&mut state, ask(named)).level.priority, 5);
}

#[test]
fn a_better_priority_preempts_where_the_operator_lets_it() {
    let mut state = with_three();
    let level = |rate: &str, priority: u8| LevelRequest { priority: Some(priority), ..guaranteed(rate) };
    let asked = |rate: &str, priority: u8| {
        Command::Grant(Box::new(GrantRequest {
            level: level(rate, priority),
            ..request("acme", &format!("{TO_DSL_1}:9"))
        }))
    };
    assert_eq!(refused(&state, asked("5mbit", 0)).code, RefusalCode::InsufficientCapacity);
    state.network.preempt = Preempt::LowerPriority;
    // 4 Mbit/s are left. Of the two of priority 3 the younger has 2, the older 6.
    for (rate, priority, expected) in [
        ("3mbit", 0, Ok(&[][..])),
        ("5mbit", 0, Ok(&[3][..])),
        ("5mbit", 3, Err(())),
        ("9mbit", 2, Ok(&[2][..])),
        ("11mbit", 2, Ok(&[2, 3][..])),
        ("11mbit", 0, Ok(&[2, 3][..])),
        ("19mbit", 0, Ok(&[1, 2, 3][..])),
        ("21mbit", 0, Err(())),
    ] {
        let mut state = state.clone();
        match (decide(&state, &asked(rate, priority), now()), expected) {
            (Ok(decision), Ok(expected)) => {
                let mut ids: Vec<_> = ended(&decision).into_iter().map(|(id, _)| id).collect();
                ids.sort_unstable();
                assert_eq!(ids, expected, "{rate} at {priority}");
                for (_, reason) in ended(&decision) {
                    let text = format!(
                        "network terminated: preempted by allocation 4 of provider acme, of priority {priority}"
                    );
                    assert_eq!(reason, text);
                }
                let told = decision.warnings.iter().filter(|text| text.contains("preempted")).count();
                assert_eq!(told, expected.len(), "{:?}", decision.warnings);
                decision.changes.iter().for_each(|change| state.apply(change));
                check(&state);
            }
            (Err(refusal), Err(())) => assert_eq!(refusal.code, RefusalCode::InsufficientCapacity),
            (found, _) => panic!("{rate} at {priority}: {found:?}"),
        }
    }
}

#[test]
fn a_jitter_budget_is_a_delay_budget_without_the_line_s_own_delay() {
    // dsl-2 has 8 ms of its own.
    let to = |port: u16, jitter: Option<u32>, delay: Option<u32>| {
        let burst = Directed { up: None, down: Some(ByteCount(3_000)) };
        let level = LevelRequest { jitter_us: jitter, delay_us: delay, burst, ..guaranteed("500kbit") };
        let level = LevelRequest { priority: Some(4), ..level };
        let flows = format!("down udp from 198.51.100.0/24 to 192.0.2.2:{port}");
        GrantRequest { level, ..request("acme", &flows) }
    };
    let mut state = town().0;
    let free = grant(&mut state.clone(), to(1, None, None)).delay_bound.down.unwrap();
    assert_eq!(free.line_us, 8_000);
    assert_eq!(free.jitter_us() + 8_000, free.whole_us);
    let parts = free.line_us + free.line_queue_us + free.link_queue_us;
    assert!((free.whole_us..free.whole_us + 2).contains(&parts), "{free:?}");
    let jitter = free.jitter_us();
    let refusal = refused_grant(&state, to(1, Some(jitter - 1), None));
    assert_eq!(refusal.field.as_deref(), Some("level.jitter_us"));
    let text = format!("line dsl-2 downstream: asked a jitter of {} µs, {jitter} µs is possible", jitter - 1);
    assert!(refusal.message.starts_with(&text), "{refusal}");
    let first = grant(&mut state, to(1, Some(jitter + 100), Some(1_000_000)));
    let refusal = refused_grant(&state, to(2, None, None));
    let text = format!(
        "would break the jitter budget of allocation {}: {} µs were promised",
        first.id,
        jitter + 100
    );
    assert!(refusal.message.contains(&text), "{refusal}");
    // Of a later priority it waits behind, and takes up the time of one packet.
    let loose = GrantRequest {
        level: LevelRequest { priority: Some(7), ..guaranteed("100kbit") },
        ..request("acme", "down udp from 198.51.100.0/24 to 192.0.2.1:9")
    };
    assert_eq!(refused_grant(&state, to(3, Some(0), None)).code, RefusalCode::Invalid);
    grant(&mut state, loose);
    check(&state);
}

#[test]
fn a_delay_budget_that_the_slower_line_does_not_keep_sheds_too() {
    let mut state = town().0;
    let level = LevelRequest { delay_us: Some(12_000), priority: Some(0), ..guaranteed("1mbit") };
    grant(&mut state, GrantRequest { level, ..request("acme", &format!("{TO_DSL_1}:1")) });
    let level = LevelRequest { priority: Some(5), ..guaranteed("1mbit") };
    grant(&mut state, GrantRequest { level, ..request("acme", &format!("{TO_DSL_1}:2")) });
    let told = carry_out(&mut state, Command::StartSession(dsl_1("192.0.2.1/32", "4mbit")));
    let ended = ended(&told);
    assert_eq!(ended[0].0, 2, "{ended:?}");
    assert!(ended[0].1.contains("the delay budget of allocation 1 would not hold"), "{ended:?}");
    check(&state);
}

#[test]
fn allocations_outlive_their_line_for_the_grace_time_and_follow_it() {
    let mut state = with_three();
    let at = |seconds: i64| now().checked_add(SignedDuration::from_secs(seconds)).unwrap();
    let told = carry_out_at(&mut state, Command::StopSession { name: name("dsl-1") }, at(0));
    assert_eq!(
        told.warnings,
        ["granted until 2026-01-01T00:05:00Z, unless the line comes back: allocation 1, 2, 3"]
    );
    let again = decide(&state, &Command::StopSession { name: name("dsl-1") }, at(9)).unwrap();
    assert_eq!(again.changes, [], "it is down already");
    let asked = Command::Grant(Box::new(GrantRequest {
        level: guaranteed("1mbit"),
        ..request("acme", &format!("{TO_DSL_1}:9"))
    }));
    let refusal = decide(&state, &asked, at(1)).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::SessionDown);
    assert_eq!(refusal.message, "line dsl-1: is down since 2026-01-01T00:00:00Z, ask again when it is up");
    assert_eq!(state.next_end(), Some(at(300)));
    assert_eq!(carry_out_at(&mut state, Command::Expire, at(299)).changes, []);

    let mut back = state.clone();
    let told = carry_out_at(&mut back, Command::StartSession(dsl_1("192.0.2.77/32", "20mbit")), at(299));
    assert_eq!(told.changes.len(), 4, "{:?}", told.changes);
    assert_eq!(back.next_end(), None);
    let moved = |port| format!("down udp from 198.51.100.0/24 to 192.0.2.77:{port}");
    let selectors: Vec<_> = back.allocations.values().map(|known| known.selectors[0].to_string()).collect();
    assert_eq!(selectors, [moved(1), moved(2), moved(3)]);
    assert_eq!(back.line_of("192.0.2.1".parse().unwrap()), None);
    check(&back);

    let told = carry_out_at(&mut state, Command::Expire, at(300));
    assert_eq!(told.changes.len(), 4, "{:?}", told.changes);
    assert_eq!(ended(&told)[0].1, "network terminated: line dsl-1 was down since 2026-01-01T00:00:00Z");
    assert!(!state.sessions.contains_key(&name("dsl-1")) && state.allocations.is_empty());
    assert_eq!(state.next_end(), None);
    check(&state);
}

#[test]
fn a_reported_line_that_gives_no_sign_of_life_is_down() {
    let mut state = town().0;
    let at = |minutes: i64| now().checked_add(SignedDuration::from_mins(minutes)).unwrap();
    let reported = || {
        let line = session("pppoe-7", &["192.0.2.7/32", "2001:db8:7::/56"], "20mbit", "5mbit");
        Command::StartSession(NewSession {
            source: Some(name("radius")),
            bras: Some("bras1".to_owned()),
            ..line
        })
    };
    carry_out_at(&mut state, reported(), at(0));
    assert_eq!(decide(&state, &reported(), at(14)).unwrap().changes, [], "too soon to be written down");
    assert_eq!(carry_out_at(&mut state, reported(), at(15)).changes.len(), 1);
    assert_eq!(state.next_end(), Some(at(75)));
    let flows = "down from 198.51.100.0/24 to 2001:db8:7:1::/64 udp";
    let flows = flows.replace("198.51.100.0/24", "2001:db8:ffff::/48");
    let networks = ["2001:db8:ffff::/48"];
    carry_out(&mut state, Command::AddProvider(provider("six", ProviderKind::Application, &networks)));
    let id = grant(&mut state, GrantRequest { level: guaranteed("1mbit"), ..request("six", &flows) }).id;
    assert_eq!(carry_out_at(&mut state, Command::Expire, at(74)).changes, []);
    carry_out_at(&mut state, Command::Expire, at(75));
    assert_eq!(state.sessions[&name("pppoe-7")].down_since, Some(at(75)));
    // It comes back with another prefix, of which the same part is meant.
    let line = session("pppoe-7", &["192.0.2.7/32", "2001:db8:900::/56"], "20mbit", "5mbit");
    let back = NewSession { source: Some(name("radius")), ..line.clone() };
    carry_out_at(&mut state, Command::StartSession(back), at(76));
    let part = state.allocations[&id].selectors[0].destination.unwrap();
    assert_eq!(part, "2001:db8:900:1::/64".parse().unwrap());
    // And with none.
    let line = NewSession { addresses: vec!["192.0.2.7/32".parse().unwrap()], ..line };
    let told = carry_out_at(&mut state, Command::StartSession(line), at(77));
    assert_eq!(ended(&told), [(id.0, "network terminated: line pppoe-7 has no such address any more")]);
    // Whoever slept through all of it finds nothing left to do at once.
    carry_out_at(&mut state, reported(), at(80));
    carry_out_at(&mut state, Command::Expire, at(10_000));
    assert!(!state.sessions.contains_key(&name("pppoe-7")));
}

#[test]
fn an_address_is_the_line_s_that_came_last_where_sources_say_so() {
    let mut state = with_three();
    let at = |source: Option<&str>, text: &str| {
        let line = session(text, &["192.0.2.0/28"], "20mbit", "5mbit");
        Command::StartSession(NewSession { source: source.map(name), ..line })
    };
    let refusal = refused(&state, at(Some("radius"), "new"));
    assert_eq!(refusal.code, RefusalCode::Conflict);
    assert!(refusal.message.contains("192.0.2.0/28 overlaps the addresses of session dsl-"), "{refusal}");
    for line in ["dsl-1", "dsl-2"] {
        carry_out(&mut state, Command::StopSession { name: name(line) });
    }
    let told = carry_out(&mut state, at(Some("radius"), "new"));
    assert_eq!(ended(&told).len(), 3);
    assert_eq!(ended(&told)[0].1, "its address went to line new");
    assert_eq!(state.line_of("192.0.2.1".parse().unwrap()), Some(&name("new")));
    check(&state);
    let told = carry_out(&mut state, at(Some("radacct"), "newer"));
    assert_eq!(told.warnings, ["line new: its address went to line newer; it is forgotten"]);
    assert!(refused(&state, at(None, "operator")).message.contains("of session newer"));
}

const TO_DSL_1: &str = "down udp from 198.51.100.0/24 to 192.0.2.1";

#[test]
fn a_grant_has_its_defaults_filled_in() {
    let mut state = town().0;
    let level = LevelRequest {
        guaranteed: Directed { up: Some(rate("1mbit")), down: Some(rate("8mbit")) },
        maximum: Directed { up: None, down: Some(rate("10mbit")) },
        ..LevelRequest::default()
    };
    let duration = Some(SignedDuration::from_hours(1));
    let flows = "between 192.0.2.1 and 198.51.100.0/24 udp";
    let asked = GrantRequest { level, duration, application: Some(name("video")), ..request("acme", flows) };
    let granted = grant(&mut state, asked);
    assert_eq!(granted.id, AllocationId(1));
    assert_eq!(granted.session, Some(name("dsl-1")));
    assert_eq!(granted.status, Status::Available);
    assert_eq!(granted.expires_at, Some("2026-01-01T01:00:00Z".parse().unwrap()));
    // 25 ms at 8 Mbit/s; two packets where that is more.
    assert_eq!(granted.level.burst, Directed { up: Some(ByteCount(3_125)), down: Some(ByteCount(25_000)) });
    assert_eq!(granted.level.maximum.up, None);
    assert_eq!(granted.level.enforcement, Enforcement::Shape);
    assert_eq!(granted.level.priority, 4);
    assert!(granted.delay_bound.down.is_some() && granted.delay_bound.up.is_none());
    assert_eq!(state.delay_bound(&granted), granted.delay_bound);
    assert_eq!(state.allocations.len(), 1);
}

#[test]
fn what_is_said_goes_before_the_profile() {
    let mut state = town().0;
    let profile = Some(name("voice"));
    let plain = GrantRequest {
        profile: profile.clone(),
        level: LevelRequest::default(),
        ..request("acme", TO_DSL_1)
    };
    let granted = grant(&mut state, plain);
    assert_eq!((granted.level.guaranteed.down, granted.level.priority), (Some(rate("1mbit")), 1));
    let level = LevelRequest { priority: Some(3), ..guaranteed("2mbit") };
    let changed = GrantRequest { profile, level, precedence: 1, ..request("acme", TO_DSL_1) };
    let granted = grant(&mut state, changed);
    assert_eq!((granted.level.guaranteed.down, granted.level.priority), (Some(rate("2mbit")), 3));
    // A profile that is removed or changed leaves what was granted alone.
    carry_out(&mut state, Command::RemoveProfile { name: name("voice") });
    assert_eq!(state.allocations.len(), 2);
}

#[test]
fn bad_requests_are_refused_with_field_and_value() {
    use RefusalCode::{Forbidden, InsufficientCapacity, Invalid, NotFound};
    let state = town().0;
    let base = || request("acme", TO_DSL_1);
    let level = |level: LevelRequest| GrantRequest { level, ..base() };
    let lasting = |seconds| GrantRequest { duration: Some(SignedDuration::from_secs(seconds)), ..base() };
    let flows = |text: &str| GrantRequest { selectors: selector::parse_flows(text).unwrap(), ..base() };
    let maximum = |down: &str| LevelRequest {
        maximum: Directed { up: None, down: Some(rate(down)) },
        ..LevelRequest::default()
    };
    let burst = |bytes| LevelRequest {
        burst: Directed { up: None, down: Some(ByteCount(bytes)) },
        ..guaranteed("1mbit")
    };
    let by_hand = |selector| GrantRequest { selectors: vec![selector], ..base() };
    let selector: selector::Selector = TO_DSL_1.parse().unwrap();
    let cases: Vec<(GrantRequest, RefusalCode, &str, &str, &str)> = vec![
        (request("acne", TO_DSL_1), NotFound, "provider", "acne", "did you mean acme?"),
        (
            GrantRequest { application: Some(name("vidoe")), ..base() },
            NotFound,
            "application",
            "vidoe",
            "did you mean video?",
        ),
        (
            GrantRequest { profile: Some(name("gold")), ..base() },
            NotFound,
            "profile",
            "gold",
            "there is no profile gold",
        ),
        (GrantRequest { selectors: vec![], ..base() }, Invalid, "selectors", "nothing", "name a selector"),
        (
            GrantRequest { selectors: vec![selector.clone(); 2], ..base() },
            Invalid,
            "selectors[1]",
            "`down udp from 198.51.100.0/24 to 192.0.2.1`",
            "repeats selectors[0]",
        ),
        (
            GrantRequest { selectors: vec![selector.clone(); 5_000], ..base() },
            Invalid,
            "selectors",
            "5000",
            "4096 at most",
        ),
        (
            by_hand(selector::Selector {
                source: Some("198.51.100.1/24".parse().unwrap()),
                ..selector.clone()
            }),
            Invalid,
            "selectors[0].source",
            "198.51.100.1/24",
            "did you mean 198.51.100.0/24?",
        ),
        (
            by_hand(selector::Selector { dscp: Some(64), ..selector.clone() }),
            Invalid,
            "selectors[0].dscp",
            "64",
            "0 to 63",
        ),
        (
            flows("down from 203.0.113.0/24 to 192.0.2.1"),
            Forbidden,
            "selectors[0].source",
            "203.0.113.0/24",
            "networks of provider acme: 198.51.100.0/24",
        ),
        (flows("down to 192.0.2.1"), Forbidden, "selectors[0].source", "any address", "is not within"),
        (
            flows("down from 198.51.0.0/16 to 192.0.2.1"),
            Forbidden,
            "selectors[0].source",
            "198.51.0.0/16",
            "is not within",
        ),
        (
            flows("from 198.51.100.0/24"),
            Forbidden,
            "selectors[0].destination",
            "any address",
            "say up or down, or between",
        ),
        (
            request("isp", "down from 198.51.100.0/24 to 203.0.113.9"),
            Forbidden,
            "selectors[0].destination",
            "203.0.113.9/32",
            "provider isp",
        ),
        (level(LevelRequest::default()), Invalid, "level", "nothing", "name a guaranteed"),
        (
            level(LevelRequest { loss: Some(0.1), ..LevelRequest::default() }),
            Invalid,
            "level",
            "nothing",
            "name a guaranteed",
        ),
        (level(guaranteed("0")), Invalid, "level.guaranteed.down", "0 bit/s", "is zero"),
        (level(maximum("0")), Invalid, "level.maximum.down", "0 bit/s", "is zero"),
        (level(guaranteed("999")), Invalid, "level.guaranteed.down", "999 bit/s", "1 kbit/s to 400 Gbit/s"),
        (level(maximum("401gbit")), Invalid, "level.maximum.down", "401 Gbit/s", "1 kbit/s to 400 Gbit/s"),
        (
            level(guaranteed("2gbit")),
            InsufficientCapacity,
            "level.guaranteed.down",
            "2 Gbit/s",
            "line dsl-1 downstream: asked 2 Gbit/s, left 19.992 Mbit/s",
        ),
        (
            level(LevelRequest {
                maximum: Directed { up: None, down: Some(rate("1mbit")) },
                ..guaranteed("2mbit")
            }),
            Invalid,
            "level.guaranteed.down",
            "2 Mbit/s",
            "above the maximum of 1 Mbit/s",
        ),
        (
            level(LevelRequest {
                guaranteed: Directed { up: Some(rate("1mbit")), down: None },
                ..LevelRequest::default()
            }),
            Invalid,
            "level.guaranteed.up",
            "1 Mbit/s",
            "no selector matches",
        ),
        (
            level(LevelRequest { priority: Some(8), ..LevelRequest::default() }),
            Invalid,
            "level.priority",
            "8",
            "0 (first) to 7",
        ),
        (
            level(LevelRequest { dscp: Some(64), ..LevelRequest::default() }),
            Invalid,
            "level.dscp",
            "64",
            "0 to 63",
        ),
        (level(burst(0)), Invalid, "level.burst.down", "0 B", "less than one packet"),
        (level(burst(1 << 50)), Invalid, "level.burst.down", "1125.9 TB", "the largest at"),
        (
            level(LevelRequest {
                burst: Directed { up: None, down: Some(ByteCount(9_000)) },
                priority: Some(1),
                ..LevelRequest::default()
            }),
            Invalid,
            "level.burst.down",
            "9 kB",
            "no guaranteed or maximum rate",
        ),
        (
            level(LevelRequest { delay_us: Some(0), ..guaranteed("1mbit") }),
            Invalid,
            "level.delay_us",
            "0",
            "is zero",
        ),
        (
            level(LevelRequest { delay_us: Some(9_000), ..maximum("1mbit") }),
            Invalid,
            "level.delay_us",
            "9000",
            "guaranteed traffic only",
        ),
        (
            level(LevelRequest { delay_us: Some(900), ..guaranteed("1mbit") }),
            InsufficientCapacity,
            "level.delay_us",
            "900",
            "line dsl-1 downstream: asked a delay of 900 µs",
        ),
        (
            level(LevelRequest { loss: Some(1.5), ..guaranteed("1mbit") }),
            Invalid,
            "level.loss",
            "1.5",
            "0 to 1",
        ),
        (
            level(LevelRequest { loss: Some(f64::NAN), ..guaranteed("1mbit") }),
            Invalid,
            "level.loss",
            "NaN",
            "0 to 1",
        ),
        (
            GrantRequest {
                level: LevelRequest { loss: Some(0.001), ..guaranteed("1mbit") },
                ..flows("down from 198.51.100.7 to 192.0.2.2")
            },
            InsufficientCapacity,
            "level.loss",
            "0.001",
            "line dsl-2: asked a loss of at most 0.001, the line loses 0.002",
        ),
        (lasting(0), Invalid, "duration", "0s", "ends before it begins"),
        (lasting(-3_600), Invalid, "duration", "1h ago", "ends before it begins"),
        (lasting(101 * 366 * 86_400), Invalid, "duration", "887184h", "longer than 100 years"),
        (lasting(i64::MAX), Invalid, "duration", "2562047788015215h 30m 7s", "longer than 100 years"),
    ];
    for (asked, code, field, value, said) in cases {
        let refusal = refused_grant(&state, asked);
        let found = (refusal.code, refusal.field.as_deref(), refusal.value.as_deref());
        assert_eq!(found, (code, Some(field), Some(value)), "{refusal}");
        assert!(refusal.message.contains(said), "{refusal}");
    }
}

#[test]
fn an_allocation_is_for_one_line_or_for_the_link() {
    let mut state = town().0;
    let flows = |texts: &[&str]| GrantRequest {
        selectors: texts.iter().flat_map(|text| selector::parse_flows(text).unwrap()).collect(),
        ..request("acme", TO_DSL_1)
    };
    let both = flows(&["down from 198.51.100.7 to 192.0.2.1", "down from 198.51.100.7 to 192.0.2.2"]);
    let refusal = refused_grant(&state, both);
    assert_eq!(refusal.field.as_deref(), Some("selectors[1].destination"));
    assert!(refusal.message.contains("is on line dsl-2, selectors before it are on line dsl-1"), "{refusal}");
    let mixed = flows(&["down from 198.51.100.7", "down from 198.51.100.7 to 192.0.2.2"]);
    assert!(refused_grant(&state, mixed).message.contains("no single line"));

    // Both families of one line.
    let one = grant(
        &mut state,
        flows(&["down from 198.51.100.7 to 192.0.2.1", "down from 2001:db8:a::/48 to 2001:db8:b:1::7"]),
    );
    assert_eq!(one.session, Some(name("dsl-1")));
    let wide = flows(&["down from 198.51.100.7 to 192.0.2.0/24"]);
    assert!(warnings(&state, wide.clone()).iter().any(|text| text.contains("held on the link only")));
    assert_eq!(grant(&mut state, wide).session, None);

    state.network.require_session = true;
    for (text, value) in [
        ("down from 198.51.100.8", "any address"),
        ("down from 198.51.100.8 to 192.0.2.9", "192.0.2.9/32"),
        ("down from 198.51.100.8 to 192.0.2.0/24", "192.0.2.0/24"),
    ] {
        let refusal = refused_grant(&state, flows(&[text]));
        assert_eq!(
            (refusal.code, refusal.value.as_deref()),
            (RefusalCode::NotFound, Some(value)),
            "{refusal}"
        );
    }
}

#[test]
fn capacity_is_given_out_once() {
    let mut state = town().0;
    let asked = |flows: &str, down: &str| GrantRequest { level: guaranteed(down), ..request("acme", flows) };
    grant(&mut state, asked("down from 198.51.100.1 to 192.0.2.1", "7.492mbit"));
    let refusal = refused_grant(&state, asked("down from 198.51.100.2 to 192.0.2.1", "20mbit"));
    assert_eq!(refusal.message, "line dsl-1 downstream: asked 20 Mbit/s, left 12.5 Mbit/s");
    assert_eq!(refusal.value.as_deref(), Some("20 Mbit/s"));
    let all = grant(&mut state, asked("down from 198.51.100.2 to 192.0.2.1", "12.5mbit"));
    assert_eq!(state.left_on_line(&name("dsl-1"), Direction::Downstream, &[]), rate("0"));
    assert_eq!(state.line_rate(&name("dsl-1"), Direction::Downstream), rate("20mbit"));
    assert_eq!(
        refused_grant(&state, request("acme", "down from 198.51.100.3 to 192.0.2.1")).message,
        "line dsl-1 downstream: asked 512 bit/s, left 0 bit/s"
    );
    carry_out(&mut state, Command::Revoke { id: all.id });
    assert_eq!(state.left_on_line(&name("dsl-1"), Direction::Downstream, &[]), rate("12.5mbit"));
    grant(&mut state, request("acme", "down from 198.51.100.3 to 192.0.2.1"));
    assert_eq!((state.overcommitted(), state.broken_delays()), (vec![], vec![]));

    // The link: what is left of 1 Gbit/s after 7.492 Mbit/s, three rests and a class without a guarantee.
    let refusal = refused_grant(&state, asked("down from 198.51.100.9", "1gbit"));
    assert_eq!(refusal.message, "link downstream: asked 1 Gbit/s, left 992.483 Mbit/s");
}

#[test]
fn a_provider_stays_within_its_contract() {
    let mut state = town().0;
    let contract = Contract { maximum: down_only("10mbit"), ..Contract::default() };
    let new = NewProvider { contract, ..provider("tiny", ProviderKind::Application, &["203.0.113.0/24"]) };
    carry_out(&mut state, Command::AddProvider(new));
    let asked = |flows: &str, down: &str| GrantRequest { level: guaranteed(down), ..request("tiny", flows) };
    grant(&mut state, asked("down from 203.0.113.1 to 192.0.2.1", "6mbit"));
    assert_eq!(
        refused_grant(&state, asked("down from 203.0.113.2 to 192.0.2.1", "5mbit")).message,
        "contract of provider tiny, guaranteed downstream: asked 5 Mbit/s, left 4 Mbit/s of 10 Mbit/s"
    );
    let level =
        LevelRequest { maximum: Directed { up: None, down: Some(rate("15mbit")) }, ..guaranteed("1mbit") };
    let found =
        warnings(&state, GrantRequest { level, ..request("tiny", "down from 203.0.113.3 to 192.0.2.1") });
    assert_eq!(
        found,
        ["downstream: the maximum of 15 Mbit/s can't be reached, the provider's contract has 10 Mbit/s"]
    );
}

fn down_only(down: &str) -> Directed<Option<BitsPerSecond>> {
    Directed { up: None, down: Some(rate(down)) }
}

/// A provider `tiny` with an application `chat`, and who is asked for under which contracts.
fn contracted(contract: Contract, application: Contract) -> State {
    let mut state = town().0;
    let new = NewProvider { contract, ..provider("tiny", ProviderKind::Application, &["203.0.113.0/24"]) };
    carry_out(&mut state, Command::AddProvider(new));
    let (provider, text) = (name("tiny"), name("chat"));
    carry_out(&mut state, Command::AddApplication { provider, name: text, contract: application });
    state
}

/// What `tiny` asks for one of its servers.
fn asked_of(server: u8, level: LevelRequest, application: Option<&str>) -> GrantRequest {
    let flows = format!("down from 203.0.113.{server} to 192.0.2.1");
    GrantRequest { level, application: application.map(name), ..request("tiny", &flows) }
}

#[test]
fn different_contracts_answer_the_same_request_differently() {
    let open = Contract::default;
    let guaranteed_most = Contract { guaranteed: down_only("3mbit"), ..open() };
    let maximum_most = Contract { maximum: down_only("3mbit"), ..open() };
    let level = LevelRequest { maximum: down_only("2mbit"), ..guaranteed("2mbit") };
    let unbounded = guaranteed("1mbit");
    let profiles = |names: &[&str]| Some(names.iter().map(|text| name(text)).collect());
    type Case<'a> = (Contract, Contract, Option<&'a str>, LevelRequest, Result<u32, (RefusalCode, &'a str)>);
    let cases: Vec<Case<'_>> = vec![
        (open(), open(), None, level.clone(), Ok(2)),
        (
            guaranteed_most.clone(),
            open(),
            None,
            level.clone(),
            Err((
                RefusalCode::InsufficientCapacity,
                "contract of provider tiny, guaranteed downstream: asked 2 Mbit/s, left 1 Mbit/s of 3 Mbit/s",
            )),
        ),
        (open(), guaranteed_most.clone(), None, level.clone(), Ok(2)),
        (
            open(),
            guaranteed_most,
            Some("chat"),
            level.clone(),
            Err((
                RefusalCode::InsufficientCapacity,
                "contract of application chat of provider tiny, guaranteed downstream: asked 2 Mbit/s, left 1 Mbit/s of 3 Mbit/s",
            )),
        ),
        (maximum_most.clone(), open(), None, unbounded.clone(), Ok(2)),
        (
            open(),
            maximum_most,
            Some("chat"),
            unbounded,
            Err((
                RefusalCode::Invalid,
                "level.maximum.down: nothing is asked for, and the contract of application chat of provider tiny sums maxima to 3 Mbit/s: name one",
            )),
        ),
        (
            Contract { best_priority: 5, ..open() },
            open(),
            None,
            level.clone(),
            Err((
                RefusalCode::Forbidden,
                "level.priority: 4 is better than 5, the best in the contract of provider tiny",
            )),
        ),
        (Contract { best_priority: 4, ..open() }, open(), None, level.clone(), Ok(2)),
        (
            Contract { profiles: profiles(&["voice"]), ..open() },
            open(),
            None,
            level.clone(),
            Err((
                RefusalCode::Forbidden,
                "profile: none is not in the contract of provider tiny, which has voice",
            )),
        ),
        (
            Contract { profiles: profiles(&[]), ..open() },
            open(),
            None,
            level.clone(),
            Err((
                RefusalCode::Forbidden,
                "profile: none is not in the contract of provider tiny, which has no profile",
            )),
        ),
        (
            Contract { allocations: Some(0), ..open() },
            open(),
            None,
            level.clone(),
            Err((
                RefusalCode::InsufficientCapacity,
                "contract of provider tiny: asked one allocation more, and 0 of 0 are in use",
            )),
        ),
        (
            open(),
            Contract { allocations: Some(1), ..open() },
            Some("chat"),
            level,
            Err((
                RefusalCode::InsufficientCapacity,
                "contract of application chat of provider tiny: asked one allocation more, and 1 of 1 are in use",
            )),
        ),
    ];
    for (provider, application, asker, level, expected) in cases {
        let case = format!("{provider:?} {application:?} {asker:?}");
        let mut state = contracted(provider, application);
        let mut outcome = Ok(0);
        // The second is asked beside the first.
        for server in 1..=2 {
            let asked = Command::Grant(Box::new(asked_of(server, level.clone(), asker)));
            match decide(&state, &asked, now()) {
                Ok(decision) => {
                    decision.changes.iter().for_each(|change| state.apply(change));
                    outcome = outcome.map(|granted| granted + 1);
                }
                Err(refusal) => {
                    outcome = Err((refusal.code, refusal.message));
                    break;
                }
            }
        }
        assert_eq!(outcome, expected.map_err(|(code, message)| (code, message.to_owned())), "{case}");
    }
}

#[test]
fn a_changed_contract_leaves_what_is_granted_and_tells_what_it_would_not_admit() {
    let mut state = contracted(Contract::default(), Contract::default());
    for server in 1..=2 {
        grant(&mut state, asked_of(server, guaranteed("2mbit"), Some("chat")));
    }
    let change = |application: Option<&str>, contract: Contract, was: Option<Contract>| {
        let (provider, application) = (name("tiny"), application.map(name));
        Command::ChangeContract { provider, application, contract, was }
    };
    let narrow = Contract { guaranteed: down_only("3mbit"), best_priority: 5, ..Contract::default() };
    for asker in [None, Some("chat")] {
        let decision =
            decide(&state, &change(asker, narrow.clone(), Some(Contract::default())), now()).unwrap();
        let [summary, first, second] = &decision.warnings[..] else { panic!("{:?}", decision.warnings) };
        assert_eq!(summary, "guaranteed downstream: 4 Mbit/s in use, 3 Mbit/s in the contract");
        for (id, text) in [(1, first), (2, second)] {
            assert!(text.starts_with(&format!("allocation {id} on line dsl-1: level.priority: 4")), "{text}");
        }
    }
    carry_out(&mut state, change(None, narrow.clone(), None));
    assert_eq!(state.allocations.len(), 2);
    let refusal =
        decide(&state, &change(None, Contract::default(), Some(Contract::default())), now()).unwrap_err();
    assert_eq!((refusal.code, refusal.field.as_deref()), (RefusalCode::Conflict, Some("was")));
    carry_out(&mut state, change(None, Contract::default(), Some(narrow)));
    for (contract, field) in [
        (Contract { best_priority: 8, ..Contract::default() }, "contract.best_priority"),
        (Contract { profiles: Some([name("nothing")].into()), ..Contract::default() }, "contract.profiles"),
        (
            Contract { guaranteed: down_only("2mbit"), maximum: down_only("1mbit"), ..Contract::default() },
            "contract.guaranteed.down",
        ),
    ] {
        let refusal = decide(&state, &change(None, contract, None), now()).unwrap_err();
        assert_eq!(refusal.field.as_deref(), Some(field), "{refusal}");
    }
}

#[test]
fn out_of_the_line_a_guarantee_is_soft() {
    let state = town().0;
    let level = LevelRequest {
        guaranteed: Directed { up: Some(rate("1mbit")), down: None },
        ..LevelRequest::default()
    };
    let up = |level| GrantRequest { level, ..request("acme", "up from 192.0.2.1 to 198.51.100.7") };
    assert_eq!(
        warnings(&state, up(level.clone())),
        ["upstream: the guarantee is soft, the gateway does not send into the line"]
    );
    let refusal = refused_grant(&state, up(LevelRequest { hard: Some(true), ..level.clone() }));
    assert_eq!(
        (refusal.code, refusal.field.as_deref()),
        (RefusalCode::InsufficientCapacity, Some("level.hard"))
    );
    let refusal = refused_grant(&state, up(LevelRequest { delay_us: Some(50_000), ..level.clone() }));
    assert_eq!(refusal.field.as_deref(), Some("level.delay_us"));
    // 95 % of 5 Mbit/s, less 8 kbit/s for the rest.
    let level = LevelRequest {
        guaranteed: Directed { up: Some(rate("4.8mbit")), down: None },
        ..LevelRequest::default()
    };
    assert_eq!(
        refused_grant(&state, up(level)).message,
        "line dsl-1 upstream: asked 4.8 Mbit/s, left 4.742 Mbit/s"
    );

    // At the subscriber's end it is the other way round.
    let mut state = State::new(Network { line_side: LineSide::Wan, ..network() });
    carry_out(
        &mut state,
        Command::AddProvider(provider("acme", ProviderKind::Application, &["198.51.100.0/24"])),
    );
    carry_out(&mut state, Command::AddSession(session("dsl-1", &["192.0.2.1/32"], "20mbit", "5mbit")));
    let level = LevelRequest {
        guaranteed: Directed { up: Some(rate("4.9mbit")), down: None },
        hard: Some(true),
        delay_us: Some(50_000),
        ..LevelRequest::default()
    };
    let granted = grant(&mut state, up(level));
    assert!(granted.delay_bound.up.is_some_and(|bound| bound.whole_us <= 50_000));
}

#[test]
fn a_granted_delay_budget_is_not_broken_by_later_grants() {
    let mut state = town().0;
    let asked = |host: u8, level| GrantRequest {
        level,
        ..request("acme", &format!("down from 198.51.100.{host} to 192.0.2.1"))
    };
    let urgent = LevelRequest { delay_us: Some(10_000), priority: Some(0), ..guaranteed("2mbit") };
    let first = grant(&mut state, asked(1, urgent));
    assert!(first.delay_bound.down.unwrap().whole_us <= 10_000);

    // A lower priority's burst is not waited for, one of the same is.
    let bursty = |priority| LevelRequest {
        burst: Directed { up: None, down: Some(ByteCount(100_000)) },
        priority: Some(priority),
        ..guaranteed("2mbit")
    };
    let refusal = refused_grant(&state, asked(2, bursty(0)));
    assert_eq!(
        (refusal.code, refusal.field.as_deref()),
        (RefusalCode::InsufficientCapacity, Some("level.burst.down"))
    );
    assert!(
        refusal.message.contains("would break the delay budget of allocation 1: 10000 µs were promised"),
        "{refusal}"
    );
    grant(&mut state, asked(2, bursty(1)));

    // Every class may have a packet and HTB's burst under way: some day one is too many.
    let mut refusal = None;
    for host in 3..50 {
        let asked = asked(host, LevelRequest { priority: Some(7), ..LevelRequest::default() });
        match decide(&state, &Command::Grant(Box::new(asked)), now()) {
            Ok(decision) => decision.changes.iter().for_each(|change| state.apply(change)),
            Err(refused) => {
                refusal = Some(refused);
                break;
            }
        }
        let bound = state.delay_bound(&first).down.unwrap().whole_us;
        assert!(bound <= 10_000, "{bound}");
    }
    let refusal = refusal.expect("a refusal");
    assert!(refusal.message.contains("would break the delay budget of allocation 1"), "{refusal}");
    assert_eq!((state.overcommitted(), state.broken_delays()), (vec![], vec![]));

    // Policed traffic without a guarantee has no class, and so adds no delay.
    let policed = LevelRequest {
        maximum: Directed { up: None, down: Some(rate("1mbit")) },
        enforcement: Some(Enforcement::Police),
        ..LevelRequest::default()
    };
    grant(&mut state, asked(99, policed));
}

#[test]
fn a_delay_budget_holds_against_the_whole_link() {
    // A slow link, so that other lines' classes are felt.
    let mut state =
        State::new(Network { link: Directed { up: rate("50mbit"), down: rate("50mbit") }, ..network() });
    carry_out(
        &mut state,
        Command::AddProvider(provider("acme", ProviderKind::Application, &["198.51.100.0/24"])),
    );
    for line in 1..=4 {
        carry_out(
            &mut state,
            Command::AddSession(session(
                &format!("dsl-{line}"),
                &[&format!("192.0.2.{line}/32")],
                "40mbit",
                "5mbit",
            )),
        );
    }
    let asked = |line: u8, host: u8, level| GrantRequest {
        level,
        ..request("acme", &format!("down from 198.51.100.{host} to 192.0.2.{line}"))
    };
    let urgent = LevelRequest { delay_us: Some(15_000), priority: Some(0), ..guaranteed("2mbit") };
    let first = grant(&mut state, asked(1, 1, urgent));
    let bursty = LevelRequest {
        burst: Directed { up: None, down: Some(ByteCount(60_000)) },
        priority: Some(0),
        ..guaranteed("2mbit")
    };
    let refusal = refused_grant(&state, asked(2, 2, bursty));
    assert!(refusal.message.contains("would break the delay budget of allocation 1"), "{refusal}");
    let mut sessions = 4;
    let refusal = loop {
        sessions += 1;
        assert!(sessions < 200, "a line more is always let in");
        let new =
            session(&format!("dsl-{sessions}"), &[&format!("192.0.2.{sessions}/32")], "40mbit", "5mbit");
        match decide(&state, &Command::AddSession(new), now()) {
            Ok(decision) => decision.changes.iter().for_each(|change| state.apply(change)),
            Err(refusal) => break refusal,
        }
        assert!(state.delay_bound(&first).down.unwrap().whole_us <= 15_000);
    };
    assert!(refusal.message.contains("would break the delay budget of allocation 1"), "{refusal}");
}

#[test]
fn selectors_that_meet_others_are_told_of() {
    let mut state = town().0;
    let asked = |flows: &str, precedence| GrantRequest { precedence, ..request("acme", flows) };
    grant(&mut state, asked("down udp from 198.51.100.0/24", 5));
    for (flows, precedence, said) in [
        ("down udp from 198.51.100.0/24", 5, None),
        ("down udp from 198.51.100.0/24", 4, None),
        ("down udp from 198.51.100.0/24", 6, Some("goes, where they overlap, before allocation 1")),
        ("down udp from 198.51.100.7", 5, Some("is hidden by allocation 1")),
        ("down udp from 198.51.100.7", 6, Some("goes, where they overlap, before allocation 1")),
        (
            "down from 198.51.100.7 to 203.0.113.0/24",
            0,
            Some("gives way, where they overlap, to allocation 1"),
        ),
    ] {
        let asked = asked(flows, precedence);
        match said {
            Some(said) => {
                let found = warnings(&state, asked);
                assert!(found.iter().any(|text| text.contains(said)), "{flows} {precedence}: {found:?}");
            }
            None => {
                let refusal = refused_grant(&state, asked);
                assert_eq!(
                    (refusal.code, refusal.field.as_deref()),
                    (RefusalCode::Conflict, Some("selectors[0]"))
                );
                assert!(refusal.message.contains("is a selector of allocation 1"), "{refusal}");
            }
        }
    }
    assert!(
        !warnings(&state, asked("down tcp from 198.51.100.0/24", 0))
            .iter()
            .any(|text| text.contains("selectors[0]"))
    );
}

#[test]
fn warnings_say_what_will_not_come_true() {
    let state = town().0;
    let level = LevelRequest {
        maximum: Directed { up: None, down: Some(rate("30mbit")) },
        ..LevelRequest::default()
    };
    assert_eq!(
        warnings(&state, GrantRequest { level, ..request("acme", TO_DSL_1) }),
        ["downstream: the maximum of 30 Mbit/s can't be reached, the line dsl-1 has 20 Mbit/s"]
    );
    let level =
        LevelRequest { priority: Some(0), enforcement: Some(Enforcement::Police), ..LevelRequest::default() };
    let found = warnings(&state, GrantRequest { level, ..request("acme", TO_DSL_1) });
    assert!(found[0].starts_with("downstream: priority 0 says nothing"), "{found:?}");
    let fast = session("fibre", &["192.0.2.200/32"], "2gbit", "100mbit");
    let found = decide(&state, &Command::AddSession(fast), now()).unwrap().warnings;
    assert_eq!(found, ["line fibre downstream: 2 Gbit/s is above the link's 1 Gbit/s"]);
}

#[test]
fn registrations_are_checked() {
    use RefusalCode::{Conflict, Invalid, NotFound};
    let mut state = town().0;
    let granted =
        grant(&mut state, GrantRequest { application: Some(name("video")), ..request("acme", TO_DSL_1) });
    assert_eq!(granted.id.0, 1);
    let kind = ProviderKind::Application;
    let limited = |down: &str| NewProvider {
        contract: Contract { maximum: down_only(down), ..Contract::default() },
        ..provider("new", kind, &["203.0.113.0/24"])
    };
    let line = |addresses: &[&str]| Command::AddSession(session("new", addresses, "10mbit", "1mbit"));
    let with = |change: fn(&mut NewSession)| {
        let mut new = session("new", &["203.0.113.1/32"], "10mbit", "1mbit");
        change(&mut new);
        Command::AddSession(new)
    };
    let profile = |level| {
        let (status, duration) = (ProfileStatus::Active, DurationRange::default());
        Command::PutProfile(Profile { name: name("new"), level, status, duration })
    };
    let cases: Vec<(Command, RefusalCode, &str, &str, &str)> = vec![
        (
            Command::AddProvider(provider("acme", kind, &["203.0.113.0/24"])),
            Conflict,
            "name",
            "acme",
            "already",
        ),
        (Command::AddProvider(provider("new", kind, &[])), Invalid, "networks", "nothing", "name a prefix"),
        (
            Command::AddProvider(provider("new", kind, &["203.0.113.9/24"])),
            Invalid,
            "networks[0]",
            "203.0.113.9/24",
            "did you mean 203.0.113.0/24?",
        ),
        (
            Command::AddProvider(provider("new", kind, &["::ffff:203.0.113.9/128"])),
            Invalid,
            "networks[0]",
            "::ffff:203.0.113.9/128",
            "IPv4 address in IPv6 form",
        ),
        (
            Command::AddProvider(provider("new", kind, &["203.0.113.0/24", "203.0.113.0/24"])),
            Invalid,
            "networks[1]",
            "203.0.113.0/24",
            "named twice",
        ),
        (Command::AddProvider(limited("0")), Invalid, "contract.maximum.down", "0 bit/s", "is zero"),
        (
            Command::AddProvider(limited("500gbit")),
            Invalid,
            "contract.maximum.down",
            "500 Gbit/s",
            "400 Gbit/s",
        ),
        (Command::RemoveProvider { name: name("nobody") }, NotFound, "name", "nobody", "no provider nobody"),
        (
            Command::RemoveProvider { name: name("acme") },
            Conflict,
            "name",
            "acme",
            "in use by application video",
        ),
        (add_application("nobody", "x"), NotFound, "provider", "nobody", "no provider"),
        (add_application("acme", "video"), Conflict, "name", "video", "already"),
        (
            Command::RemoveApplication { provider: name("acme"), name: name("games") },
            NotFound,
            "name",
            "games",
            "no application",
        ),
        (
            Command::RemoveApplication { provider: name("acme"), name: name("video") },
            Conflict,
            "name",
            "video",
            "in use by allocation 1",
        ),
        (
            Command::AddSession(session("dsl-1", &["203.0.113.1/32"], "1mbit", "1mbit")),
            Conflict,
            "name",
            "dsl-1",
            "already",
        ),
        (line(&[]), Invalid, "addresses", "nothing", "name a prefix"),
        (line(&["203.0.113.1/24"]), Invalid, "addresses[0]", "203.0.113.1/24", "203.0.113.0/24"),
        (
            line(&["203.0.113.0/24", "203.0.113.7/32"]),
            Invalid,
            "addresses[1]",
            "203.0.113.7/32",
            "overlaps 203.0.113.0/24",
        ),
        (line(&["192.0.2.1/32"]), Conflict, "addresses[0]", "192.0.2.1/32", "session dsl-1"),
        (
            line(&["203.0.113.1/32", "192.0.2.0/24"]),
            Conflict,
            "addresses[1]",
            "192.0.2.0/24",
            "session dsl-2",
        ),
        (line(&["2001:db8:b:1::7/128"]), Conflict, "addresses[0]", "2001:db8:b:1::7/128", "session dsl-1"),
        (with(|new| new.rate.up = BitsPerSecond(0)), Invalid, "rate.up", "0 bit/s", "is zero"),
        (
            with(|new| new.rate.down = BitsPerSecond(500_000_000_000)),
            Invalid,
            "rate.down",
            "500 Gbit/s",
            "400 Gbit/s",
        ),
        (
            with(|new| new.rate.up = BitsPerSecond(63_999)),
            Invalid,
            "rate.up",
            "63.999 kbit/s",
            "is too slow for a line: at least 64 kbit/s",
        ),
        (with(|new| new.overhead = Some(300)), Invalid, "overhead", "300", "-64 to 256"),
        (with(|new| new.loss_ppm = 1_000_001), Invalid, "loss_ppm", "1000001", "0 to 1000000"),
        (Command::RemoveSession { name: name("dsl-9") }, NotFound, "name", "dsl-9", "did you mean dsl-1?"),
        (Command::RemoveSession { name: name("dsl-1") }, Conflict, "name", "dsl-1", "in use by allocation 1"),
        (profile(Level::default()), Invalid, "level", "nothing", "name a guaranteed"),
        (
            profile(Level { priority: 9, ..Level::default() }),
            Invalid,
            "level.priority",
            "9",
            "0 (first) to 7",
        ),
        (profile(Level { dscp: Some(70), ..Level::default() }), Invalid, "level.dscp", "70", "0 to 63"),
        (Command::RemoveProfile { name: name("gold") }, NotFound, "name", "gold", "no profile gold"),
        (Command::Revoke { id: AllocationId(7) }, NotFound, "id", "7", "was never granted"),
    ];
    for (command, code, field, value, said) in cases {
        let refusal = refused(&state, command);
        let found = (refusal.code, refusal.field.as_deref(), refusal.value.as_deref());
        assert_eq!(found, (code, Some(field), Some(value)), "{refusal}");
        assert!(refusal.message.contains(said), "{refusal}");
    }
    carry_out(&mut state, Command::Revoke { id: granted.id });
    assert!(refused(&state, Command::Revoke { id: granted.id }).message.contains("has ended already"));
    for command in [
        Command::RemoveApplication { provider: name("acme"), name: name("video") },
        Command::RemoveProvider { name: name("acme") },
        Command::RemoveSession { name: name("dsl-1") },
    ] {
        carry_out(&mut state, command);
    }
}

#[test]
fn what_has_expired_ends() {
    let mut state = town().0;
    let lasting = |host: u8, seconds| GrantRequest {
        duration: Some(SignedDuration::from_secs(seconds)),
        ..request("acme", &format!("down from 198.51.100.{host} to 192.0.2.1"))
    };
    for (host, seconds) in [(1, 60), (2, 30), (3, 90)] {
        grant(&mut state, lasting(host, seconds));
    }
    grant(&mut state, request("acme", "down from 198.51.100.9 to 192.0.2.1"));
    let at = |seconds| now().checked_add(SignedDuration::from_secs(seconds)).unwrap();
    assert_eq!(decide(&state, &Command::Expire, at(29)).unwrap().changes, []);
    let ended = decide(&state, &Command::Expire, at(60)).unwrap().changes;
    let found: Vec<_> = ended
        .iter()
        .map(|change| match change {
            Change::EndAllocation(ended) => {
                (ended.id.0, ended.status, ended.reason.as_deref(), ended.ended_at)
            }
            other => panic!("{other:?}"),
        })
        .collect();
    let expected = |id| (id, Status::Unavailable, Some("expired"), Some(at(60)));
    assert_eq!(found, [expected(2), expected(1)]);
}

#[test]
fn full_maps_are_refused() {
    let mut state = State::new(network());
    for number in 1..=1_023 {
        carry_out(
            &mut state,
            Command::AddProvider(provider(
                &format!("p{number}"),
                ProviderKind::Application,
                &["0.0.0.0/0", "::/0"],
            )),
        );
    }
    let one_more = Command::AddProvider(provider("one-more", ProviderKind::Application, &["0.0.0.0/0"]));
    let refusal = refused(&state, one_more.clone());
    assert_eq!(
        (refusal.code, refusal.message.as_str()),
        (RefusalCode::InsufficientSlots, "all 1023 provider slots are in use")
    );
    carry_out(&mut state, Command::RemoveProvider { name: name("p77") });
    carry_out(&mut state, one_more);
    assert_eq!(state.providers[&name("one-more")].slot, 77);

    // 4,096 selectors that are open in family and direction are 16,384 rules: eight times that is all.
    for eighth in 0..8u16 {
        let ports = 4_096 * eighth + 1..=4_096 * (eighth + 1);
        let flows: Vec<_> = ports.map(|port| format!("udp to :{port}").parse().unwrap()).collect();
        grant(&mut state, GrantRequest { selectors: flows, ..request("p1", "any") });
    }
    let refusal = refused_grant(&state, request("p1", "up tcp"));
    assert_eq!(refusal.code, RefusalCode::InsufficientSlots);
    assert!(
        refusal.message.contains("2 more rules in the kernel, and 131072 of 131072 are in use"),
        "{refusal}"
    );

    // The ninth prefix length of one family.
    for length in 0..8 {
        let address = format!("{}.0.0.0/{}", 100 + length, 32 - length);
        carry_out(
            &mut state,
            Command::AddSession(session(&format!("s{length}"), &[&address], "1mbit", "1mbit")),
        );
    }
    let refusal = refused(&state, Command::AddSession(session("s9", &["120.0.0.0/8"], "1mbit", "1mbit")));
    assert_eq!(
        (refusal.code, refusal.value.as_deref()),
        (RefusalCode::InsufficientSlots, Some("120.0.0.0/8"))
    );
    carry_out(&mut state, Command::AddSession(session("s9", &["120.0.0.0/32"], "1mbit", "1mbit")));
}

#[test]
fn what_needs_a_class_is_refused_where_none_is_left_and_the_rest_is_granted() {
    let mut state = town().0;
    let asked = |number: u32, enforcement| {
        let near = std::net::Ipv4Addr::from(0x0a00_0000 + number);
        let level = LevelRequest {
            maximum: Directed { up: None, down: Some(rate("1mbit")) },
            enforcement: Some(enforcement),
            ..LevelRequest::default()
        };
        GrantRequest { level, ..request("acme", &format!("down from 198.51.100.0/24 to {near}")) }
    };
    let policed = grant(&mut state, asked(0, Enforcement::Police));
    assert_eq!((policed.slot, policed.class), (1, None));
    for number in 1..=16_383 {
        let shaped = grant(&mut state, asked(number, Enforcement::Shape));
        assert_eq!((shaped.slot, shaped.class), (number as u16 + 1, Some(number as u16)));
    }
    let refusal = refused_grant(&state, asked(16_384, Enforcement::Shape));
    assert_eq!(
        (refusal.code, refusal.field.as_deref()),
        (RefusalCode::InsufficientSlots, Some("level.enforcement"))
    );
    assert_eq!(
        refusal.message,
        "level.enforcement: shape takes a class of the scheduler, which holds 16383 allocations at most, and all of \
         these are in use: ask for `police` without a guarantee, which takes none"
    );
    let mut sure = asked(16_384, Enforcement::Police);
    sure.level.guaranteed.down = Some(rate("1mbit"));
    let refusal = refused_grant(&state, sure);
    assert_eq!(
        (refusal.field.as_deref(), refusal.value.as_deref()),
        (Some("level.guaranteed.down"), Some("1 Mbit/s"))
    );
    let policed = grant(&mut state, asked(16_384, Enforcement::Police));
    assert_eq!((policed.slot, policed.class), (16_385, None));

    // The class that has been free for the longest goes first, whatever slots are free.
    for id in [100, 50] {
        carry_out(&mut state, Command::Revoke { id: AllocationId(id) });
    }
    let next = grant(&mut state, asked(99, Enforcement::Shape));
    assert_eq!((next.slot, next.class), (16_386, Some(99)));
}

#[test]
fn slots_of_allocations_wait_their_turn() {
    let mut state = town().0;
    let asked = |host: u8| request("acme", &format!("down from 198.51.100.{host} to 192.0.2.1"));
    let first = grant(&mut state, asked(1));
    carry_out(&mut state, Command::Revoke { id: first.id });
    let second = grant(&mut state, asked(1));
    assert_eq!((first.slot, second.slot), (1, 2), "a freed slot is not given out at once");
    assert_eq!(second.id.0, 2, "a number is never used twice");
}

#[test]
fn rests_are_kept_from_what_can_be_guaranteed() {
    let mut state = State::new(Network { line_rest: rate("1mbit"), link_rest: rate("100mbit"), ..network() });
    carry_out(&mut state, Command::AddSession(session("dsl-1", &["192.0.2.1/32"], "20mbit", "2mbit")));
    let left =
        |direction| (state.left_on_line(&name("dsl-1"), direction, &[]), state.left_on_link(direction, &[]));
    assert_eq!(left(Direction::Downstream), (rate("19mbit"), rate("899mbit")));
    // An eighth of 2 Mbit/s, of which 95 % are used in the soft direction.
    assert_eq!(left(Direction::Upstream), (rate("1.65mbit"), rate("899.75mbit")));
}

#[test]
fn a_configuration_that_shrank_is_told_of() {
    let mut state = town().0;
    grant(
        &mut state,
        GrantRequest {
            level: LevelRequest { delay_us: Some(40_000), ..guaranteed("18mbit") },
            ..request("acme", TO_DSL_1)
        },
    );
    assert_eq!((state.overcommitted(), state.broken_delays()), (vec![], vec![]));
    let mut smaller =
        State::new(Network { link: Directed { up: rate("1gbit"), down: rate("10mbit") }, ..network() });
    for change in everything(&state) {
        smaller.apply(&change);
    }
    assert_eq!(smaller.overcommitted(), ["link downstream: 18.024 Mbit/s promised, 10 Mbit/s there"]);
    let delays = smaller.broken_delays();
    assert!(delays[0].starts_with("allocation 1: a delay of 40000 µs promised"), "{delays:?}");
    let refusal = refused_grant(
        &smaller,
        GrantRequest { level: guaranteed("1mbit"), ..request("acme", "down from 198.51.100.9 to 192.0.2.2") },
    );
    assert_eq!(refusal.message, "link downstream: asked 1 Mbit/s, left 0 bit/s");
}

/// Changes that make a state out of nothing.
fn everything(state: &State) -> Vec<Change> {
    let providers = state.providers.values().cloned().map(Change::PutProvider);
    let applications = state.applications.values().cloned().map(Change::PutApplication);
    let segments = state.segments.values().cloned().map(Change::PutSegment);
    let sessions = state.sessions.values().cloned().map(Change::PutSession);
    let profiles = state.profiles.values().cloned().map(Change::PutProfile);
    let keys = state.keys.values().cloned().map(Change::PutKey);
    let allocations = state.allocations.values().cloned().map(Change::PutAllocation);
    let registered = providers.chain(applications).chain(segments).chain(sessions).chain(profiles);
    registered.chain(keys).chain(allocations).collect()
}

// Histories.

/// A history over a small world, in which names, addresses and capacity meet often.
pub(crate) fn any_history() -> impl Strategy<Value = Vec<Command>> {
    let segments = (any_segment(1), any_segment(2));
    let registered = (any_provider(1), any_provider(2), any_session(1), any_session(2), any_session(3));
    let commands = prop::collection::vec(any_command(), 1..80);
    (segments, registered, commands).prop_map(|((g1, g2), (p1, p2, s1, s2, s3), commands)| {
        [g1, g2, p1, p2, s1, s2, s3].into_iter().chain(commands).collect()
    })
}

fn any_rate(weight: f64, rates: &'static [&'static str]) -> impl Strategy<Value = Option<BitsPerSecond>> {
    prop::option::weighted(weight, prop::sample::select(rates).prop_map(rate))
}

fn any_rates(
    weights: (f64, f64),
    rates: &'static [&'static str],
) -> impl Strategy<Value = Directed<Option<BitsPerSecond>>> {
    (any_rate(weights.0, rates), any_rate(weights.1, rates)).prop_map(|(up, down)| Directed { up, down })
}

fn any_provider(number: u8) -> impl Strategy<Value = Command> {
    (any::<bool>(), any_contract()).prop_map(move |(application, contract)| {
        let kind = if application { ProviderKind::Application } else { ProviderKind::Network };
        let networks = &["0.0.0.0/0", "::/0"];
        Command::AddProvider(NewProvider { contract, ..provider(&format!("p{number}"), kind, networks) })
    })
}

fn any_contract() -> impl Strategy<Value = Contract> {
    let maximum = any_rates((0.3, 0.3), &["3mbit", "8mbit", "30mbit"]);
    let guaranteed = any_rates((0.2, 0.2), &["1mbit", "2mbit"]);
    let allocations = prop::option::weighted(0.2, 0u32..4);
    (maximum, guaranteed, 0u8..3, allocations).prop_map(
        |(maximum, guaranteed, best_priority, allocations)| Contract {
            guaranteed,
            maximum,
            best_priority,
            profiles: None,
            allocations,
        },
    )
}

fn any_segment(number: u8) -> impl Strategy<Value = Command> {
    let up = prop::sample::select(&["4mbit", "900kbit"]).prop_map(rate);
    let down = prop::sample::select(&["25mbit", "6mbit"]).prop_map(rate);
    let rest = any_rates((0.3, 0.3), &["100kbit", "700kbit"]);
    (up, down, rest).prop_map(move |(up, down, rest)| {
        let capacity = Directed { up, down };
        Command::PutSegment(Segment { name: name(&format!("g{number}")), capacity, rest })
    })
}

fn any_session(number: u8) -> impl Strategy<Value = Command> {
    any_line(number).prop_map(Command::AddSession)
}

/// A line whose addresses are its own, or another's.
fn any_line(number: u8) -> impl Strategy<Value = NewSession> {
    let speed = [("20mbit", "5mbit"), ("8mbit", "2mbit"), ("30mbit", "30mbit"), ("640kbit", "64kbit")];
    let behind = prop::sample::subsequence(vec![name("g1"), name("g2")], 0..=2);
    let place = prop_oneof![4 => Just(number), 1 => 1u8..=6];
    let source = prop::option::of(Just(name("radius")));
    (prop::sample::select(speed.to_vec()), any::<bool>(), any::<bool>(), behind, place, source).prop_map(
        move |((down, up), slow, narrow, segments, place, source)| {
            let address = format!("10.0.0.{}/{}", 4 * place, if narrow { 32 } else { 30 });
            NewSession {
                delay_us: u32::from(slow) * 5_000,
                link_layer: if slow { LinkLayer::Atm } else { LinkLayer::Ethernet },
                segments,
                source,
                ..session(&format!("s{number}"), &[&address, &format!("2001:db8:{place}::/48")], down, up)
            }
        },
    )
}

fn any_command() -> impl Strategy<Value = Command> {
    let provider_name = || (1u8..=3).prop_map(|number| name(&format!("p{number}")));
    let line = (1u8..=4, 1u16..=12, 0u8..8).prop_map(|(number, port, form)| {
        let host = 4 * number;
        match form {
            0 => format!("between 10.0.0.{host} and 198.51.100.0/24:{port} tcp"),
            1 => format!("between 10.0.0.{host} and any"),
            2 => format!("up from 10.0.0.{host}/30 to :{port}"),
            3 => format!("down from 2001:db8:ffff::/48 to 2001:db8:{number}::/48 dscp {port}"),
            4 => format!("down from 198.51.100.{port}"),
            5 => "any".to_owned(),
            _ => format!("down udp from :{port} to 10.0.0.{host}"),
        }
    });
    let rates = &["1kbit", "30kbit", "700kbit", "3mbit", "8mbit", "30mbit"];
    let level = (
        any_rates((0.2, 0.7), rates),
        any_rates((0.1, 0.2), &["1kbit", "500kbit"]),
        any_rates((0.1, 0.2), rates),
        prop::option::of(0u8..=7),
        prop::option::weighted(0.2, prop::sample::select(&[6_000u32, 15_000, 40_000, 400_000])),
        prop::option::weighted(0.2, prop::sample::select(&[4_000u32, 12_000, 30_000])),
        any::<bool>(),
        prop::option::weighted(0.2, prop::sample::select(&[1_500u64, 20_000])),
    )
        .prop_map(|(guaranteed, least, maximum, priority, delay_us, jitter_us, police, burst)| {
            LevelRequest {
                guaranteed,
                least,
                maximum,
                priority,
                delay_us,
                jitter_us,
                burst: Directed { up: None, down: burst.map(ByteCount) },
                enforcement: police.then_some(Enforcement::Police),
                ..LevelRequest::default()
            }
        });
    let lasting = prop::option::of(1i64..100);
    let granted = (provider_name(), line, level, 0u16..3, lasting).prop_map(
        |(provider, flows, level, precedence, seconds)| {
            let duration = seconds.map(SignedDuration::from_secs);
            let asked = GrantRequest { level, precedence, duration, ..request(provider.as_str(), &flows) };
            Command::Grant(Box::new(asked))
        },
    );
    prop_oneof![
        1 => (1u8..=3).prop_flat_map(any_provider),
        1 => provider_name().prop_map(|name| Command::RemoveProvider { name }),
        1 => provider_name().prop_map(|provider| add_application(provider.as_str(), "app")),
        1 => provider_name().prop_map(|provider| Command::RemoveApplication { provider, name: name("app") }),
        1 => (1u8..=4).prop_flat_map(any_session),
        2 => (1u8..=4).prop_flat_map(any_line).prop_map(Command::StartSession),
        1 => (1u8..=4).prop_map(|number| Command::StopSession { name: name(&format!("s{number}")) }),
        1 => (1u8..=4).prop_map(|number| Command::RemoveSession { name: name(&format!("s{number}")) }),
        20 => granted,
        5 => prop_oneof![
            1 => (1u8..=2).prop_map(|number| Command::RemoveSegment { name: name(&format!("g{number}")) }),
            2 => (1u64..30, 1i64..100).prop_map(|(id, seconds)| {
                Command::Extend { id: AllocationId(id), by: SignedDuration::from_secs(seconds) }
            }),
            3 => (1u64..30).prop_map(|id| Command::Revoke { id: AllocationId(id) }),
        ],
        1 => Just(Command::Expire),
    ]
}

/// Checks a state against sums made afresh from its allocations alone.
fn check(state: &State) {
    let network = &state.network;
    for direction in Direction::BOTH {
        let guaranteed_of =
            |allocation: &&Allocation| allocation.level.guaranteed.get(direction).map_or(0, |rate| rate.0);
        let mut on_link = 0;
        for session in state.sessions.values() {
            let own =
                state.allocations.values().filter(|other| other.session.as_ref() == Some(&session.name));
            let speed = network.line_speed(session, direction);
            let sum = own.map(|other| guaranteed_of(&other)).sum::<u64>() + capacity::SMALLEST_REST.0;
            assert!(sum <= speed.0, "line {} {direction:?}: {sum} of {speed}", session.name);
            on_link += capacity::SMALLEST_REST.0;
        }
        for segment in state.segments.values() {
            let is_behind = |line: &Name| state.sessions[line].segments.contains(&segment.name);
            let behind =
                state.allocations.values().filter(|other| other.session.as_ref().is_some_and(is_behind));
            let sum: u64 = behind.map(|other| guaranteed_of(&other)).sum();
            let there = segment.promisable(direction);
            assert!(sum <= there.0, "segment {} {direction:?}: {sum} of {there}", segment.name);
        }
        on_link += state.allocations.values().map(|other| guaranteed_of(&other)).sum::<u64>();
        assert!(on_link <= network.link.get(direction).0, "link {direction:?}: {on_link}");
        for provider in state.providers.values() {
            let own = || state.allocations.values().filter(|other| other.provider == provider.name);
            let sum: u64 = own().map(|other| guaranteed_of(&other)).sum();
            let Contract { guaranteed, maximum, best_priority, allocations, .. } = &provider.contract;
            for most in [guaranteed.get(direction), maximum.get(direction)].into_iter().flatten() {
                assert!(sum <= most.0, "provider {}: {sum} of {most}", provider.name);
            }
            assert!(own().all(|allocation| allocation.level.priority >= *best_priority));
            assert!(allocations.is_none_or(|most| own().count() <= most as usize));
        }
    }
    assert_eq!((state.overcommitted(), state.broken_delays()), (vec![], vec![]));
    let total: usize = state.allocations.values().map(|allocation| rules(allocation).count()).sum();
    assert_eq!(state.index.rules.count(), total);
    let slots = |kind: SlotKind| -> Vec<u16> {
        match kind {
            SlotKind::Provider => state.providers.values().map(|item| item.slot).collect(),
            SlotKind::Application => state.applications.values().map(|item| item.slot).collect(),
            SlotKind::Session => state.sessions.values().map(|item| item.slot).collect(),
            SlotKind::Allocation => state.allocations.values().map(|item| item.slot).collect(),
            SlotKind::Class => state.allocations.values().filter_map(|item| item.class).collect(),
        }
    };
    for kind in SlotKind::ALL {
        let mut used = slots(kind);
        used.sort_unstable();
        let taken: Vec<_> = state.slots[&kind].taken().into_iter().collect();
        assert_eq!(taken, used, "{} slots are each taken once", kind.name());
    }
}

/// What an undone decision must give back: all but the order of free slots and the next number.
pub(crate) fn content(state: &State) -> impl PartialEq + std::fmt::Debug {
    let taken: BTreeMap<_, _> = state.slots.iter().map(|(kind, free)| (*kind, free.taken())).collect();
    (
        (state.providers.clone(), state.applications.clone(), state.sessions.clone()),
        (
            state.segments.clone(),
            state.profiles.clone(),
            state.allocations.clone(),
            state.index.clone(),
            taken,
        ),
    )
}

/// What a state saved as `state` is once it is loaded into `network`.
fn loaded(state: &State, network: Network) -> State {
    let mut loaded = State::new(network);
    for change in everything(state) {
        loaded.apply(&change);
    }
    loaded
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn histories_keep_every_promise(
        link in prop::sample::select(vec!["25mbit", "60mbit", "1gbit"]),
        wan in any::<bool>(),
        preempts in any::<bool>(),
        commands in any_history(),
    ) {
        let line_side = if wan { LineSide::Wan } else { LineSide::Lan };
        let mut state = State::new(Network {
            link: Directed { up: rate(link), down: rate(link) },
            line_side,
            session_ttl: SignedDuration::from_secs(40),
            session_grace: SignedDuration::from_secs(20),
            preempt: if preempts { Preempt::LowerPriority } else { Preempt::Never },
            ..network()
        });
        let mut last_id = 0;
        for (step, command) in commands.iter().enumerate() {
            let now = now().checked_add(SignedDuration::from_secs(3 * step as i64)).unwrap();
            let decision = match decide(&state, command, now) {
                Ok(decision) => decision,
                Err(Refusal { counter_offer: Some(level), .. }) => {
                    let Command::Grant(request) = command else { panic!("an offer for {command:?}") };
                    let offered = GrantRequest { level: *level, ..(**request).clone() };
                    let offered = decide(&state, &Command::Grant(Box::new(offered.clone())), now);
                    prop_assert!(offered.is_ok(), "what was offered is refused: {:?}", offered);
                    continue;
                }
                Err(_) => continue,
            };
            if let Command::Grant(request) = command {
                for change in &decision.changes {
                    match change {
                        Change::EndAllocation(other) => {
                            prop_assert!(preempts && other.level.priority > request.level.priority.unwrap_or(4));
                        }
                        Change::PutAllocation(granted) => {
                            let least = request.level.least.down;
                            prop_assert!(least.is_none_or(|least| granted.level.guaranteed.down >= Some(least)));
                        }
                        _ => {}
                    }
                }
            }
            if *command == Command::Expire {
                let left = decision.changes.iter().fold(state.clone(), |mut state, change| {
                    state.apply(change);
                    state
                });
                prop_assert!(left.next_end().is_none_or(|end| end > now), "{:?} is due still", left.next_end());
            }
            let inverse = state.inverse(&decision.changes);
            let before = state.clone();
            for change in &decision.changes {
                state.apply(change);
                if let Change::PutAllocation(allocation) = change && matches!(command, Command::Grant(_)) {
                    prop_assert!(allocation.id.0 > last_id);
                    last_id = allocation.id.0;
                    let bound = allocation.delay_bound;
                    prop_assert_eq!(state.delay_bound(allocation), bound);
                }
            }
            check(&state);
            let mut undone = state.clone();
            for change in &inverse {
                undone.apply(change);
            }
            prop_assert!(content(&undone) == content(&before), "{:?} undone by {:?}", decision.changes, inverse);
            // A state that is loaded decides as the one that was saved, and so does one whose network changes.
            prop_assert!(loaded(&state, state.network.clone()).index == state.index, "after {:?}", decision.changes);
            if step % 8 == 0 {
                let changed = Network { line_rest: rate("2mbit"), line_side: LineSide::Lan, ..state.network.clone() };
                let mut other = state.clone();
                let before = other.set_network(changed.clone());
                prop_assert!(other.index == loaded(&state, changed).index, "after {:?}", decision.changes);
                other.set_network(before);
                prop_assert!(other == state, "after {:?}", decision.changes);
            }
        }
    }
}

#[test]
fn time_of_a_grant_among_ten_thousand() {
    let mut state =
        State::new(Network { link: Directed { up: rate("100gbit"), down: rate("100gbit") }, ..network() });
    carry_out(
        &mut state,
        Command::AddProvider(provider("acme", ProviderKind::Application, &["198.51.100.0/24"])),
    );
    for line in 0..5_000u32 {
        let address = format!("10.0.{}.{}/32", line / 250, line % 250);
        carry_out(
            &mut state,
            Command::AddSession(session(&format!("dsl-{line}"), &[&address], "100mbit", "50mbit")),
        );
    }
    let asked = |line: u32, host: u32| GrantRequest {
        level: LevelRequest { delay_us: Some(200_000), ..guaranteed("1mbit") },
        ..request("acme", &format!("down udp from 198.51.100.{host} to 10.0.{}.{}", line / 250, line % 250))
    };
    let started = Instant::now();
    for number in 0..10_000 {
        grant(&mut state, asked(number % 5_000, number / 5_000));
    }
    let filling = started.elapsed();
    let command = Command::Grant(Box::new(asked(4_321, 9)));
    let started = Instant::now();
    for _ in 0..100 {
        decide(&state, &command, now()).unwrap();
    }
    println!(
        "decide and apply of 10,000 grants: {:.1} µs each; decide among 10,000: {:.1} µs",
        filling.as_secs_f64() * 1e6 / 1e4,
        started.elapsed().as_secs_f64() * 1e6 / 100.0
    );
}
