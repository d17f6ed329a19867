//! Decisions on everything but grants: what is registered, removed, revoked and expired.

use std::collections::BTreeSet;
use std::fmt;

use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use qos_common::abi::{MAX_LINE_LENGTHS, MAX_LINE_PREFIXES};
use qos_common::clock::{MAX_RATE, MIN_RATE};
use qos_common::length::ETHERNET_OVERHEAD;

use super::capacity::{PRIORITIES, SLOWEST_LINE, Share};
use super::contract::{Party, check_contract, left_behind};
use super::grant::{LONGEST, check_duration, check_profile, grant};
use super::state::{link_delay_ns, span};
use super::{
    Change, Command, Decision, NewProvider, NewSession, Refusal, RefusalCode, SlotKind, State,
    direction_field, direction_word, segment,
};
use crate::domain::selector::check_prefix;
use crate::domain::{
    Allocation, AllocationId, Application, BitsPerSecond, Contract, Directed, Direction, DurationRange, Name,
    Profile, Provider, Segment, Session,
};

/// Decides what follows from `command` at `now`. Nothing is changed by it.
///
/// A grant at the moment when another allocation expires still finds that one: whoever decides
/// grants lets [`Command::Expire`] go before.
///
/// # Errors
/// The refusal, naming the field and the value, and, where it is a matter of capacity, the limiting
/// resource with what is left of it.
pub fn decide(state: &State, command: &Command, now: Timestamp) -> Result<Decision, Refusal> {
    match command {
        Command::AddProvider(new) => add_provider(state, new),
        Command::RemoveProvider { name } => remove_provider(state, name),
        Command::AddApplication { provider, name, contract } => {
            add_application(state, provider, name, contract)
        }
        Command::ChangeContract { provider, application, contract, was } => {
            let party = Party { provider: provider.clone(), application: application.clone() };
            change_contract(state, &party, contract, was.as_ref())
        }
        Command::RemoveApplication { provider, name } => remove_application(state, provider, name),
        Command::AddSession(new) => add_session(state, new),
        Command::RemoveSession { name } => remove_session(state, name),
        Command::PutSegment(new) => segment::put(state, new),
        Command::RemoveSegment { name } => segment::remove(state, name),
        Command::PutProfile(profile) => put_profile(profile),
        Command::RemoveProfile { name } => remove_profile(state, name),
        Command::Grant(request) => grant(state, request, now),
        Command::Extend { id, by } => extend(state, *id, *by),
        Command::Revoke { id } => revoke(state, *id, now),
        Command::Expire => Ok(expire(state, now)),
    }
}

fn add_provider(state: &State, new: &NewProvider) -> Result<Decision, Refusal> {
    if state.providers.contains_key(&new.name) {
        return Err(exists("name", "provider", &new.name));
    }
    check_prefixes("networks", &new.networks)?;
    let mut warnings = Vec::new();
    check_contract(state, &new.contract, &mut warnings)?;
    for other in state.providers.values().filter(|other| other.kind == new.kind) {
        let shared = new.networks.iter().find(|network| {
            other.networks.iter().any(|known| known.contains(*network) || network.contains(known))
        });
        if let Some(shared) = shared {
            warnings.push(format!("networks: {shared} may be claimed by provider {} too", other.name));
        }
    }
    let provider = Provider {
        name: new.name.clone(),
        kind: new.kind,
        networks: new.networks.clone(),
        contract: new.contract.clone(),
        slot: free_slot(state, SlotKind::Provider)?,
    };
    Ok(Decision { changes: vec![Change::PutProvider(provider)], warnings })
}

fn remove_provider(state: &State, name: &Name) -> Result<Decision, Refusal> {
    find_provider(state, "name", name)?;
    let applications = state.applications.keys().filter(|(provider, _)| provider == name);
    refuse_in_use("provider", name, "application", applications.map(|(_, name)| name))?;
    let allocations = state.allocations.values().filter(|allocation| allocation.provider == *name);
    refuse_in_use("provider", name, "allocation", allocations.map(|allocation| allocation.id))?;
    Ok(only(Change::DeleteProvider(name.clone())))
}

fn add_application(
    state: &State,
    provider: &Name,
    name: &Name,
    contract: &Contract,
) -> Result<Decision, Refusal> {
    find_provider(state, "provider", provider)?;
    if state.applications.contains_key(&(provider.clone(), name.clone())) {
        return Err(exists("name", &format!("application of provider {provider}"), name));
    }
    let mut warnings = Vec::new();
    check_contract(state, contract, &mut warnings)?;
    let slot = free_slot(state, SlotKind::Application)?;
    let (provider, name, contract) = (provider.clone(), name.clone(), contract.clone());
    let application = Application { provider, name, contract, slot };
    Ok(Decision { changes: vec![Change::PutApplication(application)], warnings })
}

fn change_contract(
    state: &State,
    party: &Party,
    contract: &Contract,
    was: Option<&Contract>,
) -> Result<Decision, Refusal> {
    let provider = find_provider(state, "provider", &party.provider)?;
    let application = match &party.application {
        Some(name) => Some(find_application(state, "application", &party.provider, name)?),
        None => None,
    };
    let now = application.map_or(&provider.contract, |application| &application.contract);
    if was.is_some_and(|was| was != now) {
        let message =
            format!("contract of {party}: it was changed by somebody else meanwhile; look at it again");
        return Err(Refusal::new(RefusalCode::Conflict, "was", party, message));
    }
    let mut warnings = Vec::new();
    check_contract(state, contract, &mut warnings)?;
    warnings.extend(left_behind(state, party, contract));
    let contract = contract.clone();
    let change = match application {
        Some(application) => Change::PutApplication(Application { contract, ..application.clone() }),
        None => Change::PutProvider(Provider { contract, ..provider.clone() }),
    };
    Ok(Decision { changes: vec![change], warnings })
}

fn remove_application(state: &State, provider: &Name, name: &Name) -> Result<Decision, Refusal> {
    find_provider(state, "provider", provider)?;
    find_application(state, "name", provider, name)?;
    let allocations = state.allocations.values().filter(|allocation| {
        allocation.provider == *provider && allocation.application.as_ref() == Some(name)
    });
    refuse_in_use("application", name, "allocation", allocations.map(|allocation| allocation.id))?;
    Ok(only(Change::DeleteApplication(provider.clone(), name.clone())))
}

fn add_session(state: &State, new: &NewSession) -> Result<Decision, Refusal> {
    if state.sessions.contains_key(&new.name) {
        return Err(exists("name", "session", &new.name));
    }
    check_session_values(new)?;
    check_addresses(state, &new.addresses)?;
    segment::check_of_session(state, &new.segments)?;
    let session = Session {
        name: new.name.clone(),
        addresses: new.addresses.clone(),
        rate: new.rate,
        link_layer: new.link_layer,
        overhead: new.overhead.unwrap_or(ETHERNET_OVERHEAD),
        delay_us: new.delay_us,
        loss_ppm: new.loss_ppm,
        segments: new.segments.clone(),
        slot: free_slot(state, SlotKind::Session)?,
    };
    let mut warnings = Vec::new();
    for direction in Direction::BOTH {
        admit_rest(state, &session, direction)?;
        let (rate, link) = (*session.rate.get(direction), *state.network.link.get(direction));
        if rate > link {
            let word = direction_word(direction);
            warnings.push(format!("line {} {word}: {rate} is above the link's {link}", session.name));
        }
    }
    warnings.extend(allocations_that_stay_on_the_link(state, &session));
    Ok(Decision { changes: vec![Change::PutSession(session)], warnings })
}

fn check_session_values(new: &NewSession) -> Result<(), Refusal> {
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
    Ok(())
}

fn check_addresses(state: &State, addresses: &[IpNet]) -> Result<(), Refusal> {
    check_prefixes("addresses", addresses)?;
    for (index, address) in addresses.iter().enumerate() {
        let field = format!("addresses[{index}]");
        let twice = |other: &&IpNet| other.contains(address) || address.contains(*other);
        if let Some(other) = addresses.iter().take(index).find(twice) {
            return Err(Refusal::invalid(field, address, &format!("overlaps {other} of the same session")));
        }
        if let Some(other) = state.index.session_within(address) {
            let message = format!("{field}: {address} overlaps the addresses of session {other}");
            return Err(Refusal::new(RefusalCode::Conflict, field, address, message));
        }
    }
    let known: usize = state.index.prefix_lengths.values().sum();
    if known + addresses.len() > MAX_LINE_PREFIXES as usize {
        let message = format!(
            "addresses: {} more prefixes, and {known} of {MAX_LINE_PREFIXES} are in use",
            addresses.len()
        );
        return Err(Refusal::new(RefusalCode::InsufficientSlots, "addresses", addresses.len(), message));
    }
    for v4 in [true, false] {
        let mut lengths: BTreeSet<u8> =
            state.index.prefix_lengths.range((v4, 0)..=(v4, 128)).map(|((_, length), _)| *length).collect();
        for address in addresses.iter().filter(|address| address.addr().is_ipv4() == v4) {
            lengths.insert(address.prefix_len());
            if lengths.len() > MAX_LINE_LENGTHS {
                let family = if v4 { "IPv4" } else { "IPv6" };
                let message = format!(
                    "addresses: the prefix length of {address} would be the {}th of all sessions' {family} \
                     addresses, {MAX_LINE_LENGTHS} are possible",
                    lengths.len()
                );
                return Err(Refusal::new(RefusalCode::InsufficientSlots, "addresses", address, message));
            }
        }
    }
    Ok(())
}

/// The rest of a line is sure of a little, which the link must have; and it is one class more to
/// wait for.
fn admit_rest(state: &State, session: &Session, direction: Direction) -> Result<(), Refusal> {
    let field = format!("rate.{}", direction_field(direction));
    let rate = *session.rate.get(direction);
    let share = Share::of_rest(&state.network, session, direction, false);
    let left = state.left_on_link(direction);
    if share.rate > left.0 {
        let asked = BitsPerSecond(share.rate);
        let message = format!(
            "link {}: asked {asked} for the rest of line {}, left {left}",
            direction_word(direction),
            session.name
        );
        return Err(Refusal::new(RefusalCode::InsufficientCapacity, field, rate, message));
    }
    if direction == state.network.hard_direction() {
        let load = state.index.link.get(direction).with(&share);
        for priority in 0..PRIORITIES {
            let delay = link_delay_ns(&state.network, &load, priority as u8);
            if let Some(id) = state.index.broken_on_link(priority, delay) {
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

fn remove_session(state: &State, name: &Name) -> Result<Decision, Refusal> {
    if !state.sessions.contains_key(name) {
        return Err(Refusal::unknown("name", "session", name, &mut state.sessions.keys()));
    }
    let allocations = state.allocations_on(name).map(|allocation| allocation.id);
    refuse_in_use("session", name, "allocation", allocations)?;
    Ok(only(Change::DeleteSession(name.clone())))
}

fn put_profile(profile: &Profile) -> Result<Decision, Refusal> {
    check_profile(&profile.level)?;
    let DurationRange { shortest, longest } = profile.duration;
    for (field, duration) in [("duration.shortest", shortest), ("duration.longest", longest)] {
        if let Some(duration) = duration {
            check_duration(field, duration)?;
        }
    }
    if let (Some(shortest), Some(longest)) = (shortest, longest)
        && shortest > longest
    {
        let reason = format!("is above the longest, {longest:#}");
        return Err(Refusal::invalid("duration.shortest", format!("{shortest:#}"), &reason));
    }
    Ok(only(Change::PutProfile(profile.clone())))
}

fn remove_profile(state: &State, name: &Name) -> Result<Decision, Refusal> {
    if !state.profiles.contains_key(name) {
        return Err(Refusal::unknown("name", "profile", name, &mut state.profiles.keys()));
    }
    Ok(only(Change::DeleteProfile(name.clone())))
}

/// Moves the end, as far as the profile that was named allows: what goes beyond is cut off and told.
fn extend(state: &State, id: AllocationId, by: SignedDuration) -> Result<Decision, Refusal> {
    let allocation = find_allocation(state, id)?;
    check_duration("by", by)?;
    let value = format!("{by:#}");
    let Some(end) = allocation.expires_at else {
        return Err(Refusal::invalid("by", value, &format!("changes nothing: allocation {id} has no end")));
    };
    let asked = end.checked_add(by).ok().filter(|end| end.duration_since(allocation.granted_at) <= LONGEST);
    let Some(asked) = asked else {
        return Err(Refusal::invalid("by", value, &format!("makes allocation {id} longer than 100 years")));
    };
    let profile = allocation.profile.as_ref().and_then(|name| state.profiles.get(name));
    let longest = profile.and_then(|profile| Some((&profile.name, profile.duration.longest?)));
    let (mut until, mut warnings) = (asked, Vec::new());
    if let Some((profile, longest)) = longest {
        // An end that was granted before the profile changed stays.
        let last = allocation.granted_at.checked_add(longest).unwrap_or(asked).max(end);
        if asked > last {
            until = last;
            warnings.push(format!("extended to {until}: profile {profile} lasts {longest:#} at most"));
        }
    }
    let extended = Allocation { expires_at: Some(until), ..allocation.clone() };
    Ok(Decision { changes: vec![Change::PutAllocation(extended)], warnings })
}

fn revoke(state: &State, id: AllocationId, now: Timestamp) -> Result<Decision, Refusal> {
    let allocation = find_allocation(state, id)?;
    Ok(only(Change::EndAllocation(allocation.ended(now, "revoked"))))
}

fn find_allocation(state: &State, id: AllocationId) -> Result<&Allocation, Refusal> {
    state.allocations.get(&id).ok_or_else(|| {
        let was = id.0 > 0 && id < state.next_allocation;
        let reason = if was { "has ended already" } else { "was never granted" };
        Refusal::new(RefusalCode::NotFound, "id", id, format!("id: allocation {id} {reason}"))
    })
}

fn expire(state: &State, now: Timestamp) -> Decision {
    let due = state.index.expiries.iter().take_while(|(at, _)| *at <= now);
    let changes = due
        .filter_map(|(_, id)| state.allocations.get(id))
        .map(|allocation| Change::EndAllocation(allocation.ended(now, "expired")))
        .collect();
    Decision { changes, warnings: Vec::new() }
}

pub(super) fn only(change: Change) -> Decision {
    Decision { changes: vec![change], warnings: Vec::new() }
}

pub(super) fn find_provider<'a>(state: &'a State, field: &str, name: &Name) -> Result<&'a Provider, Refusal> {
    state
        .providers
        .get(name)
        .ok_or_else(|| Refusal::unknown(field, "provider", name, &mut state.providers.keys()))
}

pub(super) fn find_segment<'a>(state: &'a State, field: &str, name: &Name) -> Result<&'a Segment, Refusal> {
    state
        .segments
        .get(name)
        .ok_or_else(|| Refusal::unknown(field, "segment", name, &mut state.segments.keys()))
}

pub(super) fn find_application<'a>(
    state: &'a State,
    field: &str,
    provider: &Name,
    name: &Name,
) -> Result<&'a Application, Refusal> {
    state.applications.get(&(provider.clone(), name.clone())).ok_or_else(|| {
        let own = state.applications.keys().filter(|(owner, _)| owner == provider);
        let what = format!("application of provider {provider} called");
        Refusal::unknown(field, &what, name, &mut own.map(|(_, name)| name))
    })
}

/// Refuses rates that no clock holds: 1 kbit/s to 400 Gbit/s.
pub(super) fn check_rate(field: &str, rate: BitsPerSecond) -> Result<(), Refusal> {
    if rate.0 == 0 {
        Err(Refusal::invalid(field, rate, "is zero: a rate is 1 kbit/s to 400 Gbit/s"))
    } else if (MIN_RATE..=MAX_RATE).contains(&rate.0) {
        Ok(())
    } else {
        Err(Refusal::invalid(field, rate, "is out of range: 1 kbit/s to 400 Gbit/s"))
    }
}

/// The slot that has been free for the longest.
pub(super) fn free_slot(state: &State, kind: SlotKind) -> Result<u16, Refusal> {
    state.slots.get(&kind).and_then(super::slots::FreeSlots::first).ok_or_else(|| Refusal {
        code: RefusalCode::InsufficientSlots,
        field: None,
        value: None,
        message: format!("all {} {} slots are in use", kind.last(), kind.name()),
    })
}

fn check_prefixes(field: &'static str, prefixes: &[IpNet]) -> Result<(), Refusal> {
    if prefixes.is_empty() {
        return Err(Refusal::invalid(field, "nothing", "is too little: name a prefix at least"));
    }
    let mut seen = BTreeSet::new();
    for (index, prefix) in prefixes.iter().enumerate() {
        let indexed = format!("{field}[{index}]");
        if let Err(error) = check_prefix(field, *prefix) {
            return Err(Refusal::new(RefusalCode::Invalid, indexed, prefix, error.to_string()));
        }
        if !seen.insert((span(prefix), prefix.prefix_len())) {
            return Err(Refusal::invalid(indexed, prefix, "is named twice"));
        }
    }
    Ok(())
}

fn exists(field: &str, what: &str, name: &Name) -> Refusal {
    Refusal::new(RefusalCode::Conflict, field, name, format!("{field}: there is a {what} {name} already"))
}

pub(super) fn refuse_in_use<T: fmt::Display>(
    what: &str,
    name: &Name,
    by: &str,
    mut users: impl Iterator<Item = T>,
) -> Result<(), Refusal> {
    match list(&mut users) {
        None => Ok(()),
        Some(listed) => Err(Refusal::new(
            RefusalCode::Conflict,
            "name",
            name,
            format!("name: {what} {name} is in use by {by} {listed}"),
        )),
    }
}

/// The first few, and how many more; none: there are none.
pub(super) fn list<T: fmt::Display>(items: &mut impl Iterator<Item = T>) -> Option<String> {
    const SHOWN: usize = 5;
    let shown: Vec<_> = items.by_ref().take(SHOWN).map(|item| item.to_string()).collect();
    let more = items.count();
    match (shown.is_empty(), more) {
        (true, _) => None,
        (false, 0) => Some(shown.join(", ")),
        (false, more) => Some(format!("{} and {more} more", shown.join(", "))),
    }
}

/// A rate for each direction that has one, with the direction.
pub(super) fn given<T: Copy>(values: &Directed<Option<T>>) -> impl Iterator<Item = (Direction, T)> {
    let values = *values;
    Direction::BOTH.into_iter().filter_map(move |direction| Some((direction, (*values.get(direction))?)))
}
