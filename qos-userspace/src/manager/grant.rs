//! Decisions on grants: who may claim what, for which line, at which level, and whether it fits.

use std::collections::{BTreeMap, HashMap};

use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use qos_common::classify::{Direction, Family, MAX_SELECTORS};
use qos_common::clock::Meter;

use super::capacity::{PRIORITIES, Share};
use super::choose::{Wanted, choose};
use super::decide::{check_rate, find_application, find_provider, free_slot, given, list};
use super::overlap::{Relation, allocation as allocation_of, precedence as precedence_of};
use super::state::{bound_of, line_delay_ns, link_delay_ns, microseconds, rules};
use super::{
    Change, Decision, GrantRequest, Refusal, RefusalCode, SlotKind, State, contract, direction_field,
    direction_word, segment, session,
};
use crate::domain::level::{DEFAULT_PRIORITY, LAST_PRIORITY, default_burst};
use crate::domain::{
    Allocation, AllocationId, Application, BitsPerSecond, ByteCount, DelayBound, Directed, DurationRange,
    Level, Name, Profile, ProfileStatus, Provider, ProviderKind, SMALLEST_IPV6_MTU, SMALLEST_MTU, Selector,
    Session, Status, dscp,
};

/// Longest time an allocation is granted for: 100 years.
pub(super) const LONGEST: SignedDuration = SignedDuration::from_hours(100 * 365 * 24 + 25 * 24);

/// Warnings about selectors that meet others, at most.
const MOST_OVERLAPS: usize = 8;
/// Rules that those of a request are compared with for such warnings, at most: a fraction of a millisecond.
const MOST_COMPARED: usize = 20_000;

pub(super) fn grant(state: &State, request: &GrantRequest, now: Timestamp) -> Result<Decision, Refusal> {
    let provider = find_provider(state, "provider", &request.provider)?;
    let application = match &request.application {
        Some(name) => Some(find_application(state, "application", &request.provider, name)?),
        None => None,
    };
    let profile = find_profile(state, request.profile.as_ref())?;
    check_selectors(&request.selectors)?;
    check_claims(provider, &request.selectors)?;
    let mut warnings = Vec::new();
    let session = line_of(state, &request.selectors, &mut warnings)?;
    if let Some(line) = session {
        session::check_up(state, line, now)?;
    }
    let wanted = resolve(state, request, profile)?;
    let allocation = Allocation {
        id: state.next_allocation,
        provider: request.provider.clone(),
        application: request.application.clone(),
        profile: request.profile.clone(),
        selectors: request.selectors.clone(),
        level: wanted.level.clone(),
        precedence: request.precedence,
        session: session.map(|session| session.name.clone()),
        delay_bound: Directed::default(),
        granted_at: now,
        expires_at: expiry(request.duration, profile, now)?,
        ended_at: None,
        status: Status::Available,
        reason: None,
        slot: free_slot(state, SlotKind::Allocation)?,
        class: None,
    };
    check_rules(state, &allocation, &mut warnings)?;
    let asker = Asker { state, provider, application, session };
    let chosen = choose(&asker, allocation, &wanted)?;
    warnings.extend(chosen.warnings);
    let allocation = chosen.allocation;
    let mut changes = Vec::new();
    for other in chosen.preempted {
        let reason = format!(
            "network terminated: preempted by allocation {} of provider {}, of priority {}",
            allocation.id, allocation.provider, allocation.level.priority
        );
        let line =
            other.session.as_ref().map_or_else(|| "the link".to_owned(), |line| format!("line {line}"));
        let id = other.id;
        warnings.push(format!("allocation {id} of provider {} on {line} ends: {reason}", other.provider));
        changes.push(Change::EndAllocation(other.ended(now, &reason)));
    }
    changes.push(Change::PutAllocation(allocation));
    Ok(Decision { changes, warnings })
}

/// Who asks, and for which line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asker<'a> {
    pub(super) state: &'a State,
    pub(super) provider: &'a Provider,
    pub(super) application: Option<&'a Application>,
    /// None: for the link.
    pub(super) session: Option<&'a Session>,
}

impl Asker<'_> {
    /// Whether there is room for an allocation, as if those in `without` were gone. Fills in what follows from its
    /// level, and returns what the asker should know.
    ///
    /// # Errors
    /// The refusal, naming the limiting resource.
    pub(super) fn admit(
        &self,
        allocation: &mut Allocation,
        without: &[&Allocation],
    ) -> Result<Vec<String>, Refusal> {
        let mut warnings = Vec::new();
        allocation.class = class(self.state, allocation)?;
        contract::admit(self.state, self.provider, self.application, allocation, without)?;
        admit(self, allocation, without, &mut warnings)?;
        allocation.delay_bound = check_delay(self.state, self.session, allocation, without, &mut warnings)?;
        check_loss(self.session, allocation, &mut warnings)?;
        Ok(warnings)
    }

    /// The best priority that the contracts allow.
    pub(super) fn best_priority(&self) -> u8 {
        let application = self.application.map_or(0, |application| application.contract.best_priority);
        self.provider.contract.best_priority.max(application)
    }
}

/// The place among the class numbers of an allocation that needs one.
fn class(state: &State, allocation: &Allocation) -> Result<Option<u16>, Refusal> {
    if !allocation.needs_class() {
        return Ok(None);
    }
    let level = &allocation.level;
    free_slot(state, SlotKind::Class).map(Some).map_err(|mut refusal| {
        let (field, value) = match given(&level.guaranteed).next() {
            Some((direction, rate)) => {
                (format!("level.guaranteed.{}", direction_field(direction)), rate.to_string())
            }
            None => ("level.enforcement".to_owned(), "shape".to_owned()),
        };
        refusal.message = format!(
            "{field}: {value} takes a class of the scheduler, which holds {} allocations at most, and all of \
             these are in use: ask for `police` without a guarantee, which takes none",
            SlotKind::Class.last()
        );
        (refusal.field, refusal.value) = (Some(field), Some(value));
        refusal
    })
}

/// Checks a level that a profile stands for, as far as it can be checked without a request.
pub(super) fn check_profile(level: &Level) -> Result<(), Refusal> {
    if is_empty(level) {
        return Err(nothing_asked("level"));
    }
    check_level(level, false)
}

fn find_profile<'a>(state: &'a State, name: Option<&Name>) -> Result<Option<&'a Profile>, Refusal> {
    let Some(name) = name else { return Ok(None) };
    let Some(profile) = state.profiles.get(name) else {
        return Err(Refusal::unknown("profile", "profile", name, &mut state.profiles.keys()));
    };
    if profile.status != ProfileStatus::Active {
        let message = format!("profile: {name} is {}, and may not be asked for", profile.status.name());
        return Err(Refusal::new(RefusalCode::ProfileNotApplicable, "profile", name, message));
    }
    Ok(Some(profile))
}

fn check_selectors(selectors: &[Selector]) -> Result<(), Refusal> {
    if selectors.is_empty() {
        return Err(Refusal::invalid("selectors", "nothing", "is too little: name a selector at least"));
    }
    if selectors.len() > MAX_SELECTORS as usize {
        let reason = format!("are too many selectors: an allocation has {MAX_SELECTORS} at most");
        return Err(Refusal::invalid("selectors", selectors.len(), &reason));
    }
    let mut seen = HashMap::new();
    for (index, selector) in selectors.iter().enumerate() {
        if let Err(error) = selector.check() {
            let field = format!("selectors[{index}].{}", error.field());
            let message = format!("selectors[{index}].{error}");
            return Err(Refusal::new(RefusalCode::Invalid, field, error.value(), message));
        }
        if let Some(first) = seen.insert(selector, index) {
            let field = format!("selectors[{index}]");
            return Err(Refusal::invalid(
                field,
                format!("`{selector}`"),
                &format!("repeats selectors[{first}]"),
            ));
        }
    }
    Ok(())
}

/// A provider names its own networks on its side of every flow: an application service provider on
/// the far side, a network service provider on the subscriber's.
fn check_claims(provider: &Provider, selectors: &[Selector]) -> Result<(), Refusal> {
    for (index, selector) in selectors.iter().enumerate() {
        for direction in Direction::BOTH.into_iter().filter(|direction| selector.covers(*direction)) {
            let (side, is_source) = match provider.kind {
                ProviderKind::Application => (selector.far(direction), direction == Direction::Downstream),
                ProviderKind::Network => (selector.near(direction), direction == Direction::Upstream),
            };
            if claimed(provider, selector, side) {
                continue;
            }
            let field = format!("selectors[{index}].{}", if is_source { "source" } else { "destination" });
            let value = side.map_or_else(|| "any address".to_owned(), |prefix| prefix.to_string());
            let networks = list(&mut provider.networks.iter()).unwrap_or_default();
            let hint = match selector.direction {
                None => format!(" ({}; say up or down, or between)", direction_word(direction)),
                Some(_) => String::new(),
            };
            let message = format!(
                "{field}: {value} is not within the networks of provider {}: {networks}{hint}",
                provider.name
            );
            return Err(Refusal::new(RefusalCode::Forbidden, field, value, message));
        }
    }
    Ok(())
}

fn claimed(provider: &Provider, selector: &Selector, side: Option<IpNet>) -> bool {
    let within = |prefix: &IpNet| provider.networks.iter().any(|network| network.contains(prefix));
    match side {
        Some(prefix) => within(&prefix),
        None => selector.families().iter().all(|family| {
            within(&match family {
                Family::V4 => IpNet::V4(ipnet::Ipv4Net::default()),
                Family::V6 => IpNet::V6(ipnet::Ipv6Net::default()),
            })
        }),
    }
}

/// The line of the selectors' subscriber side; none: they are for the link.
fn line_of<'a>(
    state: &'a State,
    selectors: &[Selector],
    warnings: &mut Vec<String>,
) -> Result<Option<&'a Session>, Refusal> {
    let mut first: Option<Option<&Name>> = None;
    let mut wide = None;
    for (index, selector) in selectors.iter().enumerate() {
        for direction in Direction::BOTH.into_iter().filter(|direction| selector.covers(*direction)) {
            let side = if direction == Direction::Upstream { "source" } else { "destination" };
            let field = format!("selectors[{index}].{side}");
            let near = selector.near(direction);
            let value = near.map_or_else(|| "any address".to_owned(), |prefix| prefix.to_string());
            let line = near.and_then(|prefix| state.index.session_around(&prefix));
            if line.is_none() {
                if state.network.require_session {
                    let message = format!("{field}: {value} is not within the addresses of one session");
                    return Err(Refusal::new(RefusalCode::NotFound, field, value, message));
                }
                wide.get_or_insert_with(|| value.clone());
            }
            match *first.get_or_insert(line) {
                same if same == line => {}
                other => {
                    let name = |line: Option<&Name>| {
                        line.map_or_else(|| "no single line".to_owned(), |name| format!("line {name}"))
                    };
                    let message = format!(
                        "{field}: {value} is on {}, selectors before it are on {}: an allocation is for one \
                         line, or for none (say up or down, or between)",
                        name(line),
                        name(other)
                    );
                    return Err(Refusal::new(RefusalCode::Invalid, field, value, message));
                }
            }
        }
    }
    if let Some(value) = wide.filter(|_| !state.sessions.is_empty()) {
        warnings.push(format!(
            "{value} on the subscriber's side is not within one session: the level is held on the link only"
        ));
    }
    Ok(first.flatten().and_then(|name| state.sessions.get(name)))
}

/// The level that is asked for: the request, then the profile, then what is usual.
fn resolve(state: &State, request: &GrantRequest, profile: Option<&Profile>) -> Result<Wanted, Refusal> {
    let asked = &request.level;
    let mut least = Directed::default();
    let mut is_burst_open = Directed::default();
    let base = profile.map(|profile| profile.level.clone()).unwrap_or_default();
    let mut level = Level {
        priority: asked.priority.unwrap_or(base.priority),
        delay_us: asked.delay_us.or(base.delay_us),
        jitter_us: asked.jitter_us.or(base.jitter_us),
        loss: asked.loss.or(base.loss),
        dscp: asked.dscp.or(base.dscp),
        mtu: asked.mtu.or(base.mtu),
        enforcement: asked.enforcement.unwrap_or(base.enforcement),
        hard: asked.hard.unwrap_or(base.hard),
        ..Level::default()
    };
    for direction in Direction::BOTH {
        let covered = request.selectors.iter().any(|selector| selector.covers(direction));
        *level.guaranteed.get_mut(direction) =
            pick("guaranteed", direction, covered, &asked.guaranteed, &base.guaranteed)?;
        *level.maximum.get_mut(direction) =
            pick("maximum", direction, covered, &asked.maximum, &base.maximum)?;
        *level.burst.get_mut(direction) = pick("burst", direction, covered, &asked.burst, &base.burst)?;
        *is_burst_open.get_mut(direction) = level.burst.get(direction).is_none();
        *least.get_mut(direction) = pick("least", direction, covered, &asked.least, &Directed::default())?;
    }
    check_least(&level, &least)?;
    if is_empty(&level) && asked.priority.is_none() && least == Directed::default() {
        return Err(nothing_asked(if profile.is_some() { "profile" } else { "level" }));
    }
    let has_guarantees = least != Directed::default();
    check_level(&level, has_guarantees)?;
    check_mtu(&level, &request.selectors)?;
    for direction in Direction::BOTH {
        let guaranteed = level.guaranteed.get(direction).or(*least.get(direction));
        let rate = guaranteed.or(*level.maximum.get(direction));
        let burst = *level.burst.get(direction);
        let granted = rate.map(|rate| burst.unwrap_or_else(|| default_burst(rate, state.network.mtu)));
        *level.burst.get_mut(direction) = granted;
        check_burst(state, direction, burst, rate)?;
    }
    let is_priority_open = asked.priority.is_none() && profile.is_none();
    Ok(Wanted { level, least, is_priority_open, is_burst_open })
}

/// Checks the smallest rates that are of use against the others.
fn check_least(level: &Level, least: &Directed<Option<BitsPerSecond>>) -> Result<(), Refusal> {
    for (direction, least) in given(least) {
        let field = format!("level.least.{}", direction_field(direction));
        check_rate(&field, least)?;
        let others = [("guaranteed", &level.guaranteed), ("maximum", &level.maximum)];
        for (word, rate) in others.map(|(word, rates)| (word, *rates.get(direction))) {
            if let Some(rate) = rate.filter(|rate| *rate < least) {
                return Err(Refusal::invalid(field, least, &format!("is above the {word} rate of {rate}")));
            }
        }
    }
    Ok(())
}

/// What the request says, or the profile. A profile may say more than the selectors need.
fn pick<T: Copy + std::fmt::Display>(
    field: &str,
    direction: Direction,
    covered: bool,
    asked: &Directed<Option<T>>,
    base: &Directed<Option<T>>,
) -> Result<Option<T>, Refusal> {
    match *asked.get(direction) {
        Some(value) if !covered => {
            let reason = format!("is for {} traffic, which no selector matches", direction_word(direction));
            Err(Refusal::invalid(format!("level.{field}.{}", direction_field(direction)), value, &reason))
        }
        Some(value) => Ok(Some(value)),
        None => Ok(base.get(direction).filter(|_| covered)),
    }
}

fn is_empty(level: &Level) -> bool {
    level.guaranteed == Directed::default()
        && level.maximum == Directed::default()
        && level.dscp.is_none()
        && level.mtu.is_none()
        && level.priority == DEFAULT_PRIORITY
}

fn nothing_asked(field: &str) -> Refusal {
    Refusal::invalid(
        field,
        "nothing",
        "is asked for: name a guaranteed or maximum rate, a priority, a dscp or an mtu",
    )
}

/// Checks each value by itself, and the rates against each other.
fn check_level(level: &Level, has_guarantees: bool) -> Result<(), Refusal> {
    for (word, rates) in [("guaranteed", &level.guaranteed), ("maximum", &level.maximum)] {
        for (direction, rate) in given(rates) {
            check_rate(&format!("level.{word}.{}", direction_field(direction)), rate)?;
        }
    }
    for (direction, guaranteed) in given(&level.guaranteed) {
        if let Some(maximum) = level.maximum.get(direction).filter(|maximum| *maximum < guaranteed) {
            let field = format!("level.guaranteed.{}", direction_field(direction));
            return Err(Refusal::invalid(field, guaranteed, &format!("is above the maximum of {maximum}")));
        }
    }
    if level.priority > LAST_PRIORITY {
        return Err(Refusal::invalid(
            "level.priority",
            level.priority,
            "is out of range: 0 (first) to 7 (last)",
        ));
    }
    if let Some(value) = level.dscp.filter(|value| *value > dscp::MAX) {
        return Err(Refusal::invalid("level.dscp", value, "is out of range: 0 to 63"));
    }
    if let Some(value) = level.mtu.filter(|value| *value < SMALLEST_MTU) {
        let reason = format!("is less than {SMALLEST_MTU}, which every host must be able to receive");
        return Err(Refusal::invalid("level.mtu", value, &reason));
    }
    let guarantees = has_guarantees || level.guaranteed != Directed::default();
    if let Some(loss) = level.loss {
        if !(0.0..=1.0).contains(&loss) {
            return Err(Refusal::invalid("level.loss", loss, "is out of range: 0 to 1"));
        }
        if !guarantees {
            return Err(Refusal::invalid("level.loss", loss, "can be kept for guaranteed traffic only"));
        }
    }
    for (field, time) in [("level.delay_us", level.delay_us), ("level.jitter_us", level.jitter_us)] {
        let Some(time) = time else { continue };
        if time == 0 {
            return Err(Refusal::invalid(field, time, "is zero: no packet takes no time"));
        }
        if !guarantees {
            return Err(Refusal::invalid(field, time, "can be kept for guaranteed traffic only"));
        }
    }
    Ok(())
}

/// IPv6 hosts take no MTU below IPv6's smallest from anybody.
fn check_mtu(level: &Level, selectors: &[Selector]) -> Result<(), Refusal> {
    let Some(mtu) = level.mtu.filter(|mtu| *mtu < SMALLEST_IPV6_MTU) else { return Ok(()) };
    let prefixes = selectors.iter().flat_map(|selector| [selector.source, selector.destination]).flatten();
    match prefixes.into_iter().find(|prefix| prefix.addr().is_ipv6()) {
        Some(prefix) => {
            let reason =
                format!("is less than {SMALLEST_IPV6_MTU}, the smallest of IPv6, and {prefix} is selected");
            Err(Refusal::invalid("level.mtu", mtu, &reason))
        }
        None => Ok(()),
    }
}

fn check_burst(
    state: &State,
    direction: Direction,
    asked: Option<ByteCount>,
    rate: Option<BitsPerSecond>,
) -> Result<(), Refusal> {
    let Some(burst) = asked else { return Ok(()) };
    let field = format!("level.burst.{}", direction_field(direction));
    let Some(rate) = rate else {
        return Err(Refusal::invalid(field, burst, "has no guaranteed or maximum rate beside it"));
    };
    if burst.0 < u64::from(state.network.mtu) {
        let reason = format!("is less than one packet of {} B", state.network.mtu);
        return Err(Refusal::invalid(field, burst, &reason));
    }
    let largest = ByteCount(Meter::largest_burst(rate.0));
    if burst > largest {
        return Err(Refusal::invalid(field, burst, &format!("is above {largest}, the largest at {rate}")));
    }
    Ok(())
}

/// Checks a duration by itself.
pub(super) fn check_duration(field: &str, duration: SignedDuration) -> Result<(), Refusal> {
    let value = format!("{duration:#}");
    if !duration.is_positive() {
        return Err(Refusal::invalid(field, value, "ends before it begins: name a time from now on"));
    }
    if duration > LONGEST {
        return Err(Refusal::invalid(field, value, "is longer than 100 years: leave it out for no end"));
    }
    Ok(())
}

fn expiry(
    duration: Option<SignedDuration>,
    profile: Option<&Profile>,
    now: Timestamp,
) -> Result<Option<Timestamp>, Refusal> {
    if let Some(duration) = duration {
        check_duration("duration", duration)?;
    }
    if let Some(profile) = profile {
        check_range(duration, profile)?;
    }
    let Some(duration) = duration else { return Ok(None) };
    now.checked_add(duration).map(Some).map_err(|_| {
        Refusal::invalid("duration", format!("{duration:#}"), "ends after the last date there is")
    })
}

/// Checks a duration against those that the profile has.
fn check_range(duration: Option<SignedDuration>, profile: &Profile) -> Result<(), Refusal> {
    let DurationRange { shortest, longest } = profile.duration;
    let name = &profile.name;
    let reason = match (duration, shortest, longest) {
        (Some(asked), Some(shortest), _) if asked < shortest => {
            format!("is shorter than {shortest:#}, the shortest of profile {name}")
        }
        (Some(asked), _, Some(longest)) if asked > longest => {
            format!("is longer than {longest:#}, the longest of profile {name}")
        }
        (None, _, Some(longest)) => format!("is asked for, and profile {name} lasts {longest:#} at most"),
        _ => return Ok(()),
    };
    let value = duration.map_or_else(|| "no end".to_owned(), |asked| format!("{asked:#}"));
    let message = format!("duration: {value} {reason}");
    Err(Refusal::new(RefusalCode::DurationOutOfRange, "duration", value, message))
}

/// Looks for room among the rules, and for rules of others that the new ones meet.
fn check_rules(state: &State, allocation: &Allocation, warnings: &mut Vec<String>) -> Result<(), Refusal> {
    let rules: Vec<_> = rules(allocation).collect();
    let used = state.index.rules.count();
    let most = state.network.max_rules;
    if used + rules.len() > most as usize {
        let message = format!(
            "selectors: {} more rules in the kernel, and {used} of {most} are in use (max_rules)",
            rules.len()
        );
        return Err(Refusal::new(RefusalCode::InsufficientSlots, "selectors", rules.len(), message));
    }
    // By selector: its rules, and those that are an older allocation's to the letter.
    let mut repeated: BTreeMap<u32, (usize, usize)> = BTreeMap::new();
    let mut twin: BTreeMap<u32, AllocationId> = BTreeMap::new();
    let mut met: BTreeMap<(u32, AllocationId), (Relation, bool)> = BTreeMap::new();
    let mut budget = MOST_COMPARED;
    for rule in &rules {
        let selector = qos_common::classify::selector_of(rule.rank);
        let mut is_repeated = false;
        state.index.rules.meet(rule, &mut budget, |other, relation| {
            let id = allocation_of(other);
            let other_wins = precedence_of(other) >= allocation.precedence;
            if relation == Relation::Identical && other_wins {
                is_repeated = true;
                twin.entry(selector).or_insert(id);
            }
            let entry = met.entry((selector, id)).or_insert((relation, other_wins));
            entry.0 = entry.0.min(relation);
        });
        let counts = repeated.entry(selector).or_default();
        counts.0 += 1;
        counts.1 += usize::from(is_repeated);
    }
    for (selector, (rules, hidden)) in repeated {
        if rules == hidden
            && let Some(id) = twin.get(&selector)
        {
            let text = named(allocation, selector);
            let message = format!(
                "selectors[{selector}]: `{text}` is a selector of allocation {id}, which came first and has no \
                 lower precedence"
            );
            return Err(Refusal::new(RefusalCode::Conflict, format!("selectors[{selector}]"), text, message));
        }
    }
    let more = met.len().saturating_sub(MOST_OVERLAPS);
    for ((selector, id), (relation, other_wins)) in met.into_iter().take(MOST_OVERLAPS) {
        let text = named(allocation, selector);
        let what = match (relation, other_wins) {
            (Relation::Identical | Relation::Covers, true) => "is hidden by",
            (Relation::Overlaps, true) => "gives way, where they overlap, to",
            (_, false) => "goes, where they overlap, before",
        };
        warnings.push(format!("selectors[{selector}]: `{text}` {what} allocation {id}"));
    }
    if more > 0 {
        warnings.push(format!("selectors: {more} more overlaps with other allocations"));
    }
    if budget == 0 {
        let text = "selectors: too many other selectors are near these to look for all overlaps; `qos explain` \
                    tells of a packet which one takes it";
        warnings.push(text.to_owned());
    }
    Ok(())
}

fn named(allocation: &Allocation, selector: u32) -> String {
    allocation.selectors.get(selector as usize).map(ToString::to_string).unwrap_or_default()
}

/// Looks for capacity: the line's, its segments', the link's.
fn admit(
    asker: &Asker<'_>,
    allocation: &Allocation,
    without: &[&Allocation],
    warnings: &mut Vec<String>,
) -> Result<(), Refusal> {
    let Asker { state, provider, session, .. } = *asker;
    let level = &allocation.level;
    for direction in Direction::BOTH {
        let guaranteed = *level.guaranteed.get(direction);
        let word = direction_word(direction);
        let soft = direction != state.network.hard_direction();
        if let Some(guaranteed) = guaranteed.filter(|_| soft) {
            if level.hard {
                let message = format!(
                    "level.hard: {word} traffic comes out of the line, where the gateway can't order it: a \
                     guarantee of {guaranteed} is soft there"
                );
                return Err(Refusal::new(RefusalCode::InsufficientCapacity, "level.hard", true, message));
            }
            warnings.push(format!("{word}: the guarantee is soft, the gateway does not send into the line"));
        }
        if let Some(share) = Share::of(&state.network, session, allocation, direction) {
            let asked = BitsPerSecond(share.rate);
            if let Some(session) = session {
                let left = state.left_on_line(&session.name, direction, without);
                refuse_beyond(&format!("line {}", session.name), allocation, direction, asked, left)?;
                if let Some(guaranteed) = guaranteed {
                    segment::admit(state, session, direction, guaranteed, without)?;
                }
            }
            let left = state.left_on_link(direction, without);
            refuse_beyond("link", allocation, direction, asked, left)?;
        } else if allocation.covers(direction) && level.priority != DEFAULT_PRIORITY {
            warnings.push(format!(
                "{word}: priority {} says nothing, policed traffic without a guarantee shares the line's rest",
                level.priority
            ));
        }
        warn_of_maximum(state, provider, session, level, direction, warnings);
    }
    Ok(())
}

fn refuse_beyond(
    resource: &str,
    allocation: &Allocation,
    direction: Direction,
    asked: BitsPerSecond,
    left: BitsPerSecond,
) -> Result<(), Refusal> {
    if asked <= left {
        return Ok(());
    }
    let message = format!("{resource} {}: asked {asked}, left {left}", direction_word(direction));
    let field = match allocation.level.guaranteed.get(direction) {
        Some(_) => format!("level.guaranteed.{}", direction_field(direction)),
        None => "level".to_owned(),
    };
    Err(Refusal::new(RefusalCode::InsufficientCapacity, field, asked, message))
}

fn warn_of_maximum(
    state: &State,
    provider: &Provider,
    session: Option<&Session>,
    level: &Level,
    direction: Direction,
    warnings: &mut Vec<String>,
) {
    let Some(maximum) = *level.maximum.get(direction) else { return };
    let line = session
        .map(|session| (format!("line {}", session.name), state.network.line_speed(session, direction)));
    let contract =
        provider.contract.maximum.get(direction).map(|most| ("provider's contract".to_owned(), most));
    let limits =
        line.into_iter().chain([("link".to_owned(), *state.network.link.get(direction))]).chain(contract);
    if let Some((what, speed)) = limits.min_by_key(|(_, speed)| *speed).filter(|(_, speed)| *speed < maximum)
    {
        warnings.push(format!(
            "{}: the maximum of {maximum} can't be reached, the {what} has {speed}",
            direction_word(direction)
        ));
    }
}

/// Bounds the delay of in-profile traffic, and holds it against the budget that is asked for and
/// against those that were granted before.
fn check_delay(
    state: &State,
    session: Option<&Session>,
    allocation: &Allocation,
    without: &[&Allocation],
    warnings: &mut Vec<String>,
) -> Result<Directed<Option<DelayBound>>, Refusal> {
    let network = &state.network;
    let direction = network.hard_direction();
    let word = direction_word(direction);
    let level = &allocation.level;
    let mut bound = Directed::default();
    let is_guaranteed = level.guaranteed.get(direction).is_some();
    let budgets = [("delay", level.delay_us), ("jitter", level.jitter_us)];
    for (what, budget) in budgets {
        let Some(budget) = budget else { continue };
        if !is_guaranteed {
            let field = format!("level.{what}_us");
            let message = format!(
                "{field}: {budget} µs can be kept {word} only, into the line, and no guarantee is asked there"
            );
            return Err(Refusal::new(RefusalCode::InsufficientCapacity, field, budget, message));
        }
        if given(&level.guaranteed).count() > 1 {
            warnings.push(format!("the {what} budget is kept {word} only, into the line"));
        }
        if session.is_none() {
            warnings.push(format!("the {what} budget is kept on the link only: the line is not known"));
        }
    }
    let Some(on_link) = Share::of(network, None, allocation, direction) else { return Ok(bound) };
    let link = state.link_load(direction, without).with(&on_link);
    let line = session.and_then(|session| {
        let line = state.index.lines.get(&session.name)?;
        let share = Share::of(network, Some(session), allocation, direction)?;
        Some((session, line, state.line_load(session, direction, without)?.with(&share)))
    });
    let goes = |id: &AllocationId| without.iter().any(|other| other.id == *id);
    let delays: [(u64, u64); PRIORITIES] = std::array::from_fn(|priority| {
        let on_link = link_delay_ns(network, &link, priority as u8);
        let on_line = line
            .as_ref()
            .map_or(0, |(session, _, load)| line_delay_ns(network, session, load, priority as u8));
        (on_link, on_line.saturating_add(on_link))
    });
    if is_guaranteed {
        let line = line.as_ref().map(|(session, _, load)| (*session, load));
        let own = bound_of(network, line, &link, level.priority);
        *bound.get_mut(direction) = Some(own);
        for ((what, budget), possible) in budgets.into_iter().zip([own.whole_us, own.jitter_us()]) {
            let Some(budget) = budget.filter(|budget| possible > *budget) else { continue };
            let place = session.map_or_else(|| "link".to_owned(), |session| format!("line {}", session.name));
            let message = format!(
                "{place} {word}: asked a {what} of {budget} µs, {possible} µs is possible behind what is granted \
                 there (a smaller burst or a better priority lowers it)"
            );
            let field = format!("level.{what}_us");
            return Err(Refusal::new(RefusalCode::InsufficientCapacity, field, budget, message));
        }
    }
    for (priority, (on_link, whole)) in delays.iter().enumerate() {
        let on_line =
            line.as_ref().and_then(|(_, line, _)| line.broken(priority, *whole).find(|id| !goes(id)));
        let on_the_link = || state.index.broken_on_link(priority, *on_link).find(|id| !goes(id));
        let broken = match on_line {
            Some(id) => Some((id, *whole)),
            None => on_the_link().map(|id| (id, *on_link)),
        };
        if let Some((id, delay)) = broken {
            return Err(breaks_a_promise(state, allocation, id, delay));
        }
    }
    Ok(bound)
}

fn breaks_a_promise(state: &State, allocation: &Allocation, id: AllocationId, delay_ns: u64) -> Refusal {
    let direction = state.network.hard_direction();
    let other = state.allocations.get(&id);
    let line = other.and_then(|other| state.sessions.get(other.session.as_ref()?));
    let line_us = line.map_or(0, |line| line.delay_us);
    let possible = microseconds(delay_ns);
    // Of two budgets the tighter one breaks first.
    let (what, budget, possible) = match other.map(|other| (other.level.delay_us, other.level.jitter_us)) {
        Some((delay, Some(jitter))) if delay.is_none_or(|delay| jitter.saturating_add(line_us) < delay) => {
            ("jitter", jitter, possible.saturating_sub(line_us))
        }
        Some((Some(delay), _)) => ("delay", delay, possible),
        _ => ("delay", 0, possible),
    };
    let (field, value) = match allocation.level.burst.get(direction) {
        Some(burst) => (format!("level.burst.{}", direction_field(direction)), burst.to_string()),
        None => ("level".to_owned(), "a class of its own".to_owned()),
    };
    let message = format!(
        "{field}: {value} would break the {what} budget of allocation {id}: {budget} µs were promised, {} µs \
         would be possible",
        possible.max(budget.saturating_add(1))
    );
    Refusal::new(RefusalCode::InsufficientCapacity, field, value, message)
}

/// In-profile traffic meets no loss of ours, so the line's own decides.
fn check_loss(
    session: Option<&Session>,
    allocation: &Allocation,
    warnings: &mut Vec<String>,
) -> Result<(), Refusal> {
    let Some(loss) = allocation.level.loss else { return Ok(()) };
    let Some(session) = session else {
        warnings.push("the loss budget is kept on the link only: the line is not known".to_owned());
        return Ok(());
    };
    if loss * 1e6 < f64::from(session.loss_ppm) {
        let measured = f64::from(session.loss_ppm) / 1e6;
        let message =
            format!("line {}: asked a loss of at most {loss}, the line loses {measured}", session.name);
        return Err(Refusal::new(RefusalCode::InsufficientCapacity, "level.loss", loss, message));
    }
    Ok(())
}
