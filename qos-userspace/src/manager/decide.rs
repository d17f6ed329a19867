//! Decisions on everything but grants: what is registered, removed, revoked and expired.

use std::collections::BTreeSet;
use std::fmt;

use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use qos_common::clock::{MAX_RATE, MIN_RATE};

use super::contract::{Party, check_contract, left_behind};
use super::grant::{LONGEST, check_duration, check_profile, grant};
use super::state::span;
use super::{
    Change, Command, Decision, NewProvider, Refusal, RefusalCode, SlotKind, State, key, segment, session,
};
use crate::domain::selector::check_prefix;
use crate::domain::{
    Allocation, AllocationId, Application, BitsPerSecond, Contract, Directed, Direction, DurationRange, Name,
    Profile, Provider, Segment,
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
        Command::AddSession(new) => session::add(state, new, now),
        Command::StartSession(new) => session::start(state, new, now),
        Command::StopSession { name } => session::stop(state, name, now),
        Command::RemoveSession { name } => session::remove(state, name),
        Command::PutSegment(new) => segment::put(state, new),
        Command::RemoveSegment { name } => segment::remove(state, name),
        Command::PutProfile(profile) => put_profile(profile),
        Command::RemoveProfile { name } => remove_profile(state, name),
        Command::AddKey(new) => key::add(state, new, now),
        Command::RemoveKey { id } => key::remove(state, id),
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
    key::refuse_while_there(state, name, None)?;
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
    key::refuse_while_there(state, provider, Some(name))?;
    Ok(only(Change::DeleteApplication(provider.clone(), name.clone())))
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
    let due: Vec<_> = due.filter_map(|(_, id)| state.allocations.get(id)).collect();
    let ends = due.iter().map(|allocation| Change::EndAllocation(allocation.ended(now, "expired")));
    let mut changes: Vec<_> = ends.collect();
    let due: BTreeSet<AllocationId> = due.into_iter().map(|allocation| allocation.id).collect();
    changes.extend(session::expire(state, now, &due));
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
        counter_offer: None,
    })
}

pub(super) fn check_prefixes(field: &'static str, prefixes: &[IpNet]) -> Result<(), Refusal> {
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

pub(super) fn exists(field: &str, what: &str, name: &Name) -> Refusal {
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
