//! Sessions: lines that come, change, go and come back, and what becomes of the allocations on them.
//!
//! A line that goes keeps its allocations for the grace time. If it comes back by then they follow it, to
//! another address too; if it comes back slower than its guarantees, those of the worst priority end, the
//! youngest first, until the others fit.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use jiff::{SignedDuration, Timestamp};
use qos_common::abi::{MAX_LINE_LENGTHS, MAX_LINE_PREFIXES};
use qos_common::length::ETHERNET_OVERHEAD;

use super::capacity::{Load, PRIORITIES, SLOWEST_LINE, Share};
use super::decide::{check_prefixes, check_rate, exists, free_slot, list, only, refuse_in_use};
use super::state::{budget, line_delay_ns, link_delay_ns};
use super::{
    Change, Decision, Network, NewSession, Refusal, RefusalCode, SlotKind, State, direction_field,
    direction_word, segment,
};
use crate::domain::session::LONGEST_BRAS;
use crate::domain::{Allocation, AllocationId, BitsPerSecond, Direction, Name, Selector, Session};

/// Part of its time to live after which a sign of life is written down: before that it changes nothing.
pub(super) const SIGN_OF_LIFE_PART: i32 = 4;

impl Network {
    /// When a session has to be looked at: it is stale then, or its grace is over. None: never.
    pub(super) fn deadline(&self, session: &Session) -> Option<Timestamp> {
        match (session.down_since, session.seen_at) {
            (Some(down), _) => Some(after(down, self.session_grace)),
            (None, Some(seen)) => Some(after(seen, self.session_ttl)),
            (None, None) => None,
        }
    }

    /// Since when a session is down at `now`; none: it is up.
    #[must_use]
    pub fn down_since(&self, session: &Session, now: Timestamp) -> Option<Timestamp> {
        let stale = session.seen_at.map(|seen| after(seen, self.session_ttl)).filter(|stale| *stale <= now);
        session.down_since.or(stale)
    }
}

fn after(moment: Timestamp, time: SignedDuration) -> Timestamp {
    moment.checked_add(time).unwrap_or(Timestamp::MAX)
}

/// Names a line that is not known yet.
pub(super) fn add(state: &State, new: &NewSession, now: Timestamp) -> Result<Decision, Refusal> {
    if state.sessions.contains_key(&new.name) {
        return Err(exists("name", "session", &new.name));
    }
    start(state, new, now)
}

/// A line has come up, gives a sign of life, or has changed.
pub(super) fn start(state: &State, new: &NewSession, now: Timestamp) -> Result<Decision, Refusal> {
    put(state, new, now, now, false)
}

/// Brings a line into service that was last seen at `seen_at`. It goes again when its place is needed and it carries
/// nothing.
pub(super) fn open(
    state: &State,
    new: &NewSession,
    seen_at: Timestamp,
    now: Timestamp,
) -> Result<Decision, Refusal> {
    put(state, new, seen_at, now, true)
}

fn put(
    state: &State,
    new: &NewSession,
    seen_at: Timestamp,
    now: Timestamp,
    on_demand: bool,
) -> Result<Decision, Refusal> {
    check_values(new)?;
    let old = state.sessions.get(&new.name);
    let session = Session {
        name: new.name.clone(),
        addresses: new.addresses.clone(),
        rate: new.rate,
        link_layer: new.link_layer,
        overhead: new.overhead.unwrap_or(ETHERNET_OVERHEAD),
        delay_us: new.delay_us,
        loss_ppm: new.loss_ppm,
        segments: new.segments.clone(),
        bras: new.bras.clone(),
        source: new.source.clone(),
        seen_at: new.source.as_ref().map(|_| seen_at),
        down_since: None,
        on_demand: old.map_or(on_demand, |old| old.on_demand),
        slot: match old {
            Some(old) => old.slot,
            None => free_slot(state, SlotKind::Session)?,
        },
    };
    if old.is_some_and(|old| is_sign_of_life(&state.network, old, &session, now)) {
        return Ok(Decision { changes: Vec::new(), warnings: Vec::new() });
    }
    let displaced = displaced(state, &session)?;
    check_addresses(state, &session, old, &displaced)?;
    segment::check_of_session(state, &session.segments)?;
    let mut warnings = Vec::new();
    for direction in Direction::BOTH {
        admit_rest(state, &session, old, direction)?;
        let (rate, link) = (*session.rate.get(direction), *state.network.link.get(direction));
        if rate > link {
            let word = direction_word(direction);
            warnings.push(format!("line {} {word}: {rate} is above the link's {link}", session.name));
        }
    }
    warnings.extend(allocations_that_stay_on_the_link(state, &session));
    let mut changes = Vec::new();
    for other in displaced {
        let reason = format!("its address went to line {}", session.name);
        warnings.push(format!("line {}: {reason}; it is forgotten", other.name));
        changes.extend(give_up(state, other, now, &reason));
    }
    let mut followed = Vec::new();
    if let Some(old) = old {
        let (ended, moved) = carry_over(state, old, &session, now);
        for allocation in &ended {
            let reason = allocation.reason.as_deref().unwrap_or_default();
            warnings.push(format!("allocation {} ends: {reason}", allocation.id));
        }
        changes.extend(ended.into_iter().map(Change::EndAllocation));
        followed = moved;
    }
    changes.push(Change::PutSession(session));
    changes.extend(followed.into_iter().map(Change::PutAllocation));
    Ok(Decision { changes, warnings })
}

/// Nothing but a sign of life, so soon after the last one that it need not be written down.
fn is_sign_of_life(network: &Network, old: &Session, new: &Session, now: Timestamp) -> bool {
    old.down_since.is_none()
        && Session { seen_at: old.seen_at, ..new.clone() } == *old
        && old.seen_at.is_none_or(|seen| {
            (SignedDuration::ZERO..network.session_ttl / SIGN_OF_LIFE_PART)
                .contains(&now.duration_since(seen))
        })
}

/// A line has gone. What is granted on it stays for the grace time.
pub(super) fn stop(state: &State, name: &Name, now: Timestamp) -> Result<Decision, Refusal> {
    let session = find(state, name)?;
    if session.down_since.is_some() {
        return Ok(Decision { changes: Vec::new(), warnings: Vec::new() });
    }
    let mut warnings = Vec::new();
    if let Some(listed) = list(&mut state.allocations_on(name).map(|allocation| allocation.id)) {
        let end = after(now, state.network.session_grace);
        warnings.push(format!("granted until {end}, unless the line comes back: allocation {listed}"));
    }
    let session = Session { down_since: Some(now), ..session.clone() };
    Ok(Decision { changes: vec![Change::PutSession(session)], warnings })
}

/// Forgets a line that carries nothing.
pub(super) fn remove(state: &State, name: &Name) -> Result<Decision, Refusal> {
    find(state, name)?;
    let allocations = state.allocations_on(name).map(|allocation| allocation.id);
    refuse_in_use("session", name, "allocation", allocations)?;
    Ok(only(Change::DeleteSession(name.clone())))
}

/// What is due at `now`: stale lines count as down, and those that were down for the grace time are given
/// up. `ended` are allocations that end for another reason.
pub(super) fn expire(state: &State, now: Timestamp, ended: &BTreeSet<AllocationId>) -> Vec<Change> {
    let mut changes = Vec::new();
    let due = state.index.deadlines.iter().take_while(|(at, _)| *at <= now);
    for session in due.filter_map(|(_, name)| state.sessions.get(name)) {
        let Some(down) = state.network.down_since(session, now) else { continue };
        if after(down, state.network.session_grace) <= now {
            let reason = format!("network terminated: line {} was down since {down}", session.name);
            changes.extend(give_up(state, session, now, &reason).into_iter().filter(|change| {
                !matches!(change, Change::EndAllocation(allocation) if ended.contains(&allocation.id))
            }));
        } else if session.down_since.is_none() {
            changes.push(Change::PutSession(Session { down_since: Some(down), ..session.clone() }));
        }
    }
    changes
}

/// Refuses to grant anything on a line that is down.
pub(super) fn check_up(state: &State, session: &Session, now: Timestamp) -> Result<(), Refusal> {
    state.network.down_since(session, now).map_or(Ok(()), |down| Err(is_down(&session.name, down)))
}

pub(super) fn is_down(line: &Name, since: Timestamp) -> Refusal {
    let message = format!("line {line}: is down since {since}, ask again when it is up");
    Refusal::new(RefusalCode::SessionDown, "selectors", line, message)
}

fn find<'a>(state: &'a State, name: &Name) -> Result<&'a Session, Refusal> {
    state
        .sessions
        .get(name)
        .ok_or_else(|| Refusal::unknown("name", "session", name, &mut state.sessions.keys()))
}

/// Ends what a line carries, and forgets it.
fn give_up(state: &State, session: &Session, now: Timestamp, reason: &str) -> Vec<Change> {
    let allocations = state.allocations_on(&session.name);
    let ended = allocations.map(|allocation| Change::EndAllocation(allocation.ended(now, reason)));
    ended.chain([Change::DeleteSession(session.name.clone())]).collect()
}

pub(super) fn check_values(new: &NewSession) -> Result<(), Refusal> {
    for direction in Direction::BOTH {
        let (field, rate) = (format!("rate.{}", direction_field(direction)), *new.rate.get(direction));
        check_rate(&field, rate)?;
        if rate < SLOWEST_LINE {
            let why = format!("is too slow for a line: at least {SLOWEST_LINE}");
            return Err(Refusal::invalid(field, rate, &why));
        }
    }
    if let Some(overhead) = new.overhead.filter(|overhead| !(-64..=256).contains(overhead)) {
        return Err(Refusal::invalid("overhead", overhead, "is out of range: -64 to 256 bytes"));
    }
    if new.loss_ppm > 1_000_000 {
        return Err(Refusal::invalid("loss_ppm", new.loss_ppm, "is out of range: 0 to 1000000"));
    }
    if let Some(bras) = new.bras.as_ref().filter(|bras| bras.is_empty() || bras.len() > LONGEST_BRAS) {
        let why = format!("is out of range: 1 to {LONGEST_BRAS} characters");
        return Err(Refusal::invalid("bras", format!("`{bras}`"), &why));
    }
    Ok(())
}

/// Other lines that lose their addresses to this one: those that are down, those that came into service with a
/// grant, and, where sources report both, whichever came before. An operator's line keeps its addresses while it is up.
fn displaced<'a>(state: &'a State, session: &Session) -> Result<Vec<&'a Session>, Refusal> {
    check_prefixes("addresses", &session.addresses)?;
    check_distinct(&session.addresses)?;
    let mut others = BTreeMap::new();
    for (index, address) in session.addresses.iter().enumerate() {
        let field = format!("addresses[{index}]");
        for name in state.index.sessions_within(address).filter(|name| **name != session.name) {
            let Some(other) = state.sessions.get(name) else { continue };
            let gives_way = other.on_demand || (other.source.is_some() && session.source.is_some());
            if other.down_since.is_none() && !gives_way {
                let message = format!("{field}: {address} overlaps the addresses of session {name}");
                return Err(Refusal::new(RefusalCode::Conflict, field, address, message));
            }
            others.insert(name, other);
        }
    }
    Ok(others.into_values().collect())
}

/// Refuses addresses of one line that overlap.
pub(super) fn check_distinct(addresses: &[IpNet]) -> Result<(), Refusal> {
    for (index, address) in addresses.iter().enumerate() {
        let twice = |other: &&IpNet| other.contains(address) || address.contains(*other);
        if let Some(other) = addresses.iter().take(index).find(twice) {
            let field = format!("addresses[{index}]");
            return Err(Refusal::invalid(field, address, &format!("overlaps {other} of the same session")));
        }
    }
    Ok(())
}

/// Looks for room among the prefixes of all lines, without those that go.
fn check_addresses(
    state: &State,
    session: &Session,
    old: Option<&Session>,
    displaced: &[&Session],
) -> Result<(), Refusal> {
    let mut lengths = state.index.prefix_lengths.clone();
    for gone in old.into_iter().chain(displaced.iter().copied()).flat_map(|other| &other.addresses) {
        if let Some(count) = lengths.get_mut(&(gone.addr().is_ipv4(), gone.prefix_len())) {
            *count -= 1;
        }
    }
    let known: usize = lengths.values().sum();
    if known + session.addresses.len() > MAX_LINE_PREFIXES as usize {
        let message = format!(
            "addresses: {} more prefixes, and {known} of {MAX_LINE_PREFIXES} are in use",
            session.addresses.len()
        );
        return Err(Refusal::new(
            RefusalCode::InsufficientSlots,
            "addresses",
            session.addresses.len(),
            message,
        ));
    }
    for v4 in [true, false] {
        let used = lengths.iter().filter(|((family, _), count)| *family == v4 && **count > 0);
        let mut used: BTreeSet<u8> = used.map(|((_, length), _)| *length).collect();
        for address in session.addresses.iter().filter(|address| address.addr().is_ipv4() == v4) {
            used.insert(address.prefix_len());
            if used.len() > MAX_LINE_LENGTHS {
                let family = if v4 { "IPv4" } else { "IPv6" };
                let message = format!(
                    "addresses: the prefix length of {address} would be the {}th of all sessions' {family} \
                     addresses, {MAX_LINE_LENGTHS} are possible",
                    used.len()
                );
                return Err(Refusal::new(RefusalCode::InsufficientSlots, "addresses", address, message));
            }
        }
    }
    Ok(())
}

/// The rest of a line is sure of a little, which the link must have; and it is one class more to
/// wait for.
fn admit_rest(
    state: &State,
    session: &Session,
    old: Option<&Session>,
    direction: Direction,
) -> Result<(), Refusal> {
    let network = &state.network;
    let share = Share::of_rest(network, session, direction, false);
    let mut load = *state.index.link.get(direction);
    if let Some(old) = old {
        let was = Share::of_rest(network, old, direction, false);
        if was == share {
            return Ok(());
        }
        load.remove(&was);
    }
    let field = format!("rate.{}", direction_field(direction));
    let rate = *session.rate.get(direction);
    let left = load.left(*network.link.get(direction));
    if share.rate > left.0 {
        let asked = BitsPerSecond(share.rate);
        let message = format!(
            "link {}: asked {asked} for the rest of line {}, left {left}",
            direction_word(direction),
            session.name
        );
        return Err(Refusal::new(RefusalCode::InsufficientCapacity, field, rate, message));
    }
    if direction == network.hard_direction() {
        let load = load.with(&share);
        for priority in 0..PRIORITIES {
            let delay = link_delay_ns(network, &load, priority as u8);
            let is_own = |id: &AllocationId| {
                state.allocations.get(id).is_some_and(|known| known.session.as_ref() == Some(&session.name))
            };
            // What is on this line itself is looked at beside its other classes.
            if let Some(id) = state.index.broken_on_link(priority, delay).find(|id| !is_own(id)) {
                let message =
                    format!("line {} would break the delay budget of allocation {id}", session.name);
                return Err(Refusal::new(RefusalCode::InsufficientCapacity, field, rate, message));
            }
        }
    }
    Ok(())
}

fn allocations_that_stay_on_the_link(state: &State, session: &Session) -> Option<String> {
    let inside = |prefix: IpNet| session.addresses.iter().any(|address| address.contains(&prefix));
    let mut ids = state
        .allocations
        .values()
        .filter(|allocation| allocation.session.is_none())
        .filter(|allocation| {
            allocation.selectors.iter().any(|selector| {
                Direction::BOTH.into_iter().any(|direction| {
                    selector.covers(direction) && selector.near(direction).is_some_and(inside)
                })
            })
        })
        .map(|allocation| allocation.id);
    let listed = list(&mut ids)?;
    Some(format!(
        "granted before line {} was known, and held on the link only until granted anew: allocation {listed}",
        session.name
    ))
}

/// What becomes of a line's allocations when it changes: those that end, and those that follow it to
/// another address. All others stay as they are.
fn carry_over(
    state: &State,
    old: &Session,
    new: &Session,
    now: Timestamp,
) -> (Vec<Allocation>, Vec<Allocation>) {
    let (mut ended, mut staying) = (Vec::new(), Vec::new());
    let mut followed = BTreeMap::new();
    for allocation in state.allocations_on(&old.name) {
        let selectors = allocation.selectors.iter().map(|selector| follow(selector, old, new));
        match selectors.collect::<Option<Vec<_>>>() {
            None => {
                let reason = format!("network terminated: line {} has no such address any more", old.name);
                ended.push(allocation.ended(now, &reason));
            }
            Some(selectors) => {
                staying.push(allocation);
                if selectors != allocation.selectors {
                    followed.insert(allocation.id, Allocation { selectors, ..allocation.clone() });
                }
            }
        }
    }
    for (allocation, why) in shed(state, old, new, staying) {
        followed.remove(&allocation.id);
        ended.push(allocation.ended(now, &format!("network terminated: {why}")));
    }
    (ended, followed.into_values().collect())
}

/// The selector with the line's new addresses in the place of its old ones; none: it has none like them.
fn follow(selector: &Selector, old: &Session, new: &Session) -> Option<Selector> {
    let moved = |prefix: Option<IpNet>| match prefix {
        Some(prefix) => moved(prefix, old, new).map(Some),
        None => Some(None),
    };
    Some(Selector {
        source: moved(selector.source)?,
        destination: moved(selector.destination)?,
        ..selector.clone()
    })
}

fn moved(prefix: IpNet, old: &Session, new: &Session) -> Option<IpNet> {
    let Some(from) = old.addresses.iter().find(|address| address.contains(&prefix)) else {
        return Some(prefix);
    };
    if new.addresses.iter().any(|address| address.contains(&prefix)) {
        return Some(prefix);
    }
    // The first address of a family takes the place of the first, and so on.
    let of_family = |addresses: &[IpNet]| -> Vec<IpNet> {
        addresses.iter().filter(|net| net.addr().is_ipv4() == prefix.addr().is_ipv4()).copied().collect()
    };
    let place = of_family(&old.addresses).iter().position(|address| address == from)?;
    let candidates = of_family(&new.addresses);
    let to = candidates.get(place).or_else(|| candidates.first())?;
    if prefix == *from {
        return Some(*to);
    }
    if from.prefix_len() != to.prefix_len() {
        return None;
    }
    match (prefix, to) {
        (IpNet::V4(part), IpNet::V4(to)) => {
            let host = u32::from(part.network()) & u32::from(to.hostmask());
            Ipv4Net::new((u32::from(to.network()) | host).into(), part.prefix_len()).ok().map(IpNet::V4)
        }
        (IpNet::V6(part), IpNet::V6(to)) => {
            let host = u128::from(part.network()) & u128::from(to.hostmask());
            Ipv6Net::new((u128::from(to.network()) | host).into(), part.prefix_len()).ok().map(IpNet::V6)
        }
        _ => None,
    }
}

/// Which of the allocations have to end so that the others fit on the line as it is now, and why: the
/// worst priority first, of that the youngest.
fn shed<'a>(
    state: &State,
    old: &Session,
    new: &Session,
    mut staying: Vec<&'a Allocation>,
) -> Vec<(&'a Allocation, String)> {
    staying.sort_by_key(|allocation| (allocation.level.priority, allocation.granted_at, allocation.id));
    let mut shed = Vec::new();
    for direction in Direction::BOTH {
        while let Some(why) = misfit(state, old, new, direction, &staying) {
            let takes = |allocation: &&Allocation| allocation.has_class(direction);
            let Some(place) = staying.iter().rposition(takes) else { break };
            shed.push((staying.remove(place), why));
        }
    }
    shed
}

/// Why the allocations don't all fit on the line in a direction; none: they do.
fn misfit(
    state: &State,
    old: &Session,
    new: &Session,
    direction: Direction,
    staying: &[&Allocation],
) -> Option<String> {
    let (network, word) = (&state.network, direction_word(direction));
    let mut load = Load::default();
    load.add(&Share::of_rest(network, new, direction, true));
    for allocation in staying {
        if let Some(share) = Share::of(network, Some(new), allocation, direction) {
            load.add(&share);
        }
    }
    let speed = network.line_speed(new, direction);
    if load.rate > speed.0 {
        let promised = BitsPerSecond(load.rate);
        return Some(format!("line {} {word}: {promised} were promised, {speed} are there", new.name));
    }
    for segment in &new.segments {
        let there = state.segments.get(segment)?.promisable(direction);
        let guaranteed =
            |allocation: &Allocation| allocation.level.guaranteed.get(direction).map_or(0, |rate| rate.0);
        let own: u64 = staying.iter().map(|allocation| guaranteed(allocation)).sum();
        let before: u64 = match old.segments.contains(segment) {
            true => state.allocations_on(&old.name).map(guaranteed).sum(),
            false => 0,
        };
        let promised = BitsPerSecond(state.promised_on_segment(segment).get(direction).0 - before + own);
        if promised > there {
            return Some(format!("segment {segment} {word}: {promised} were promised, {there} are there"));
        }
    }
    if direction != network.hard_direction() {
        return None;
    }
    // What ends relieves the link as well; that it was there is on the safe side.
    let link = state.index.link.get(direction);
    staying.iter().find_map(|allocation| {
        let (priority, budget) = budget(network, Some(new), allocation)?;
        let delay =
            line_delay_ns(network, new, &load, priority as u8) + link_delay_ns(network, link, priority as u8);
        (delay > budget).then(|| {
            format!(
                "line {} {word}: the delay budget of allocation {} would not hold",
                new.name, allocation.id
            )
        })
    })
}
