//! Lines that sources tell of: what a report changes, and how a line comes into service.
//!
//! The session data store keeps every line that is told; millions of them, of which few carry anything. A line
//! comes into service, that is, it becomes a [`Session`](crate::domain::Session) with a place in the kernel,
//! with the first grant on it (docs/adr/0025).

use std::net::IpAddr;

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::decide::check_prefixes;
use super::grant::grant;
use super::session::{self, SIGN_OF_LIFE_PART, check_distinct, check_values};
use super::{
    Change, Command, Decision, GrantRequest, Network, NewSession, Refusal, RefusalCode, SlotKind, State,
    direction_field, direction_word,
};
use crate::domain::subscriber::{Facts, LONGEST_KEY};
use crate::domain::{BitsPerSecond, Directed, Direction, Name, Selector, Subscriber};

/// Most prefixes of one line.
const MOST_ADDRESSES: usize = 16;
/// Most segments that a line is behind.
const MOST_SEGMENTS: usize = 8;

/// What became of a report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", content = "why", rename_all = "snake_case")]
pub enum Taken {
    /// It is written; with what the source should know beside.
    Changed(Vec<String>),
    /// It says nothing new, or what has been overtaken by another report.
    Unchanged,
    /// It can't be so; nothing of it was written.
    Refused(String),
}

/// Which lines are looked for: those that all agrees with that is said here, in the order of their last changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SubscriberQuery {
    /// The one that has this address.
    pub address: Option<IpAddr>,
    /// The one of this name.
    pub line: Option<Name>,
    /// Those that end at this BRAS.
    pub bras: Option<String>,
    /// Those that this source tells of.
    pub source: Option<Name>,
    /// Those that are told to be up, or those that are not.
    pub up: Option<bool>,
    /// Those that changed after this place: where the answer before ended.
    pub after: u64,
    /// That many at most: 1 to [`SubscriberQuery::MOST`]; none: as many.
    pub limit: Option<u32>,
}

impl SubscriberQuery {
    /// Most lines of one answer.
    pub const MOST: u32 = 10_000;
}

/// What a report asks to be written.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// These lines, as they are now: the line's own first, then those that lost their addresses to it.
    Write(Vec<Subscriber>),
    /// The line is as it was, and was seen a moment ago: nothing to write so soon.
    SignOfLife,
    /// Overtaken by what is known, or known already.
    Nothing,
}

/// A session of a line that a source tells of.
#[derive(Clone, Copy, Debug)]
pub struct Told<'a> {
    /// Who tells.
    pub source: Option<&'a Name>,
    /// When it was so.
    pub at: Timestamp,
    /// The line.
    pub line: &'a Name,
    /// Which of its sessions.
    pub key: Option<&'a str>,
}

impl Told<'_> {
    /// Whether both name a session, and not the same.
    fn is_another_than(&self, known: &Subscriber) -> bool {
        self.key.zip(known.key.as_deref()).is_some_and(|(told, known)| told != known)
    }
}

/// A line is up. `known` is what is known of it, `holders` are other lines that have any of its addresses.
///
/// Of two lines that are told to have one address, the one whose session began later has it.
///
/// # Errors
/// Where a line can't be like that.
pub fn up(
    network: &Network,
    known: Option<&Subscriber>,
    holders: &[Subscriber],
    told: Told<'_>,
    facts: &Facts,
) -> Result<Effect, Refusal> {
    check(network, told, facts)?;
    let goes_on = known.filter(|known| known.down_since.is_none() && !told.is_another_than(known));
    let last = known.map(|known| known.down_since.map_or(known.seen_at, |down| down.max(known.seen_at)));
    if last.is_some_and(|last| told.at < last) {
        return Ok(Effect::Nothing);
    }
    let started_at = match (goes_on, known) {
        (Some(known), _) => known.started_at,
        // It lost its addresses to another line, and does not know.
        (None, Some(known)) if known.reason.is_some() && known.key.as_deref() == told.key => known.started_at,
        _ => told.at,
    };
    if holders.iter().any(|holder| holder.down_since.is_none() && holder.started_at > started_at) {
        return Ok(Effect::Nothing);
    }
    let now = Subscriber {
        line: told.line.clone(),
        source: told.source.cloned(),
        key: told.key.map(str::to_owned).or_else(|| goes_on.and_then(|known| known.key.clone())),
        facts: facts.clone(),
        started_at,
        seen_at: told.at,
        down_since: None,
        reason: None,
        sequence: 0,
    };
    if let Some(known) = goes_on
        && (Subscriber { seen_at: now.seen_at, sequence: 0, ..known.clone() }) == now
        && told.at.duration_since(known.seen_at) < network.session_ttl / SIGN_OF_LIFE_PART
    {
        return Ok(Effect::SignOfLife);
    }
    let mut written = vec![now];
    written.extend(holders.iter().map(|holder| Subscriber {
        facts: Facts { addresses: Vec::new(), ..holder.facts.clone() },
        down_since: holder.down_since.or(Some(told.at.max(holder.started_at))),
        reason: Some(format!("its address went to line {}", told.line)),
        ..holder.clone()
    }));
    Ok(Effect::Write(written))
}

/// A session of a line has ended.
#[must_use]
pub fn down(known: Option<&Subscriber>, told: Told<'_>) -> Effect {
    let Some(known) = known.filter(|known| known.down_since.is_none()) else { return Effect::Nothing };
    if told.is_another_than(known) || told.at < known.started_at {
        return Effect::Nothing;
    }
    Effect::Write(vec![Subscriber { down_since: Some(told.at), ..known.clone() }])
}

/// The BRAS of a line that is up has gone.
#[must_use]
pub fn bras_down(known: &Subscriber, at: Timestamp) -> Effect {
    if known.down_since.is_some() || at < known.seen_at {
        return Effect::Nothing;
    }
    let bras = known.facts.bras.as_deref().unwrap_or_default();
    let reason = Some(format!("BRAS {bras} was started again, or is about to stop"));
    Effect::Write(vec![Subscriber { down_since: Some(at), reason, ..known.clone() }])
}

fn check(network: &Network, told: Told<'_>, facts: &Facts) -> Result<(), Refusal> {
    if let Some(key) = told.key.filter(|key| key.is_empty() || key.len() > LONGEST_KEY) {
        let why = format!("is out of range: 1 to {LONGEST_KEY} bytes");
        return Err(Refusal::invalid("key", format!("`{key}`"), &why));
    }
    if facts.addresses.len() > MOST_ADDRESSES {
        let why = format!("are too many: a line has {MOST_ADDRESSES} prefixes at most");
        return Err(Refusal::invalid("addresses", facts.addresses.len(), &why));
    }
    if facts.segments.len() > MOST_SEGMENTS {
        let why = format!("are too many: a line is behind {MOST_SEGMENTS} at most");
        return Err(Refusal::invalid("segments", facts.segments.len(), &why));
    }
    check_prefixes("addresses", &facts.addresses)?;
    check_distinct(&facts.addresses)?;
    // What is not told is looked at when the line comes into service.
    let rate = |direction| {
        facts
            .rate
            .get(direction)
            .or(*network.line_rate.get(direction))
            .unwrap_or(*network.link.get(direction))
    };
    let rate = Directed { up: rate(Direction::Upstream), down: rate(Direction::Downstream) };
    check_values(&new_session(told.line, told.source, facts, rate))
}

fn new_session(
    line: &Name,
    source: Option<&Name>,
    facts: &Facts,
    rate: Directed<BitsPerSecond>,
) -> NewSession {
    NewSession {
        name: line.clone(),
        addresses: facts.addresses.clone(),
        rate,
        link_layer: facts.link_layer,
        overhead: facts.overhead,
        delay_us: facts.delay_us,
        loss_ppm: facts.loss_ppm,
        segments: facts.segments.clone(),
        bras: facts.bras.clone(),
        source: source.cloned(),
    }
}

/// The line as a session to bring into service.
///
/// # Errors
/// Where its speed is not known.
pub fn line(network: &Network, known: &Subscriber) -> Result<NewSession, Refusal> {
    let rate = |direction| {
        known.facts.rate.get(direction).or(*network.line_rate.get(direction)).ok_or_else(|| {
            let (line, field) = (&known.line, direction_field(direction));
            let message = format!(
                "line {line}: its {} rate is not known: have its source tell it, or set `line_rate_{field}`",
                direction_word(direction)
            );
            Refusal::new(RefusalCode::NotFound, format!("rate.{field}"), "nothing", message)
        })
    };
    let rate = Directed { up: rate(Direction::Upstream)?, down: rate(Direction::Downstream)? };
    Ok(new_session(&known.line, known.source.as_ref(), &known.facts, rate))
}

impl Network {
    /// Since when a line is down at `now`; none: it is up.
    #[must_use]
    pub fn subscriber_down_since(&self, known: &Subscriber, now: Timestamp) -> Option<Timestamp> {
        let stale = known.seen_at.checked_add(self.session_ttl).unwrap_or(Timestamp::MAX);
        known.down_since.or((known.source.is_some() && stale <= now).then_some(stale))
    }
}

/// A prefix on the subscriber's side of a request that no line in service has; none: all have one, or the
/// request is for no line.
#[must_use]
pub fn unserved(state: &State, selectors: &[Selector]) -> Option<IpNet> {
    let near = selectors.iter().flat_map(|selector| {
        let covered = Direction::BOTH.into_iter().filter(|direction| selector.covers(*direction));
        covered.filter_map(|direction| selector.near(direction))
    });
    near.into_iter().next().filter(|prefix| state.index.session_around(prefix).is_none())
}

/// A line that came into service with a grant and carries nothing any more, when no other has room beside it;
/// none: there is room, or all of them carry something.
#[must_use]
pub fn idle_line(state: &State) -> Option<&Name> {
    if state.slots.get(&SlotKind::Session)?.first().is_some() {
        return None;
    }
    let idle = state
        .sessions
        .values()
        .filter(|session| session.on_demand && state.allocations_on(&session.name).next().is_none());
    idle.min_by_key(|session| (session.down_since.is_none(), session.seen_at)).map(|session| &session.name)
}

/// Decides a grant on a line that is not in service yet, and brings it there. `state` is as before afterwards.
///
/// # Errors
/// The refusal: of the line, or of the grant.
pub fn grant_on(
    state: &mut State,
    request: &GrantRequest,
    known: &Subscriber,
    now: Timestamp,
) -> Result<Decision, Refusal> {
    if let Some(down) = state.network.subscriber_down_since(known, now) {
        return Err(session::is_down(&known.line, down));
    }
    let new = line(&state.network, known)?;
    let slots = state.slots.get(&SlotKind::Session).cloned();
    let mut undo = Vec::new();
    if let Some(idle) = idle_line(state).cloned() {
        try_out(state, &[Change::DeleteSession(idle)], &mut undo);
    }
    let result = session::open(state, &new, known.seen_at, now).and_then(|mut opened| {
        try_out(state, &opened.changes, &mut undo);
        let granted = grant(state, request, now)?;
        opened.changes.extend(granted.changes);
        opened.warnings.extend(granted.warnings);
        Ok(opened)
    });
    for change in &undo {
        state.apply(change);
    }
    if let Some(slots) = slots {
        state.slots.insert(SlotKind::Session, slots);
    }
    result
}

/// Applies changes, and puts what takes them back before what is in `undo` already.
fn try_out(state: &mut State, changes: &[Change], undo: &mut Vec<Change>) {
    undo.splice(..0, state.inverse(changes));
    for change in changes {
        state.apply(change);
    }
}

/// What a report comes to, and what lines in service have to do about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Followed {
    /// What the source is told.
    pub taken: Taken,
    /// What brings lines in service to what is known now.
    pub commands: Vec<Command>,
}

impl Followed {
    /// It says nothing new.
    pub const NOTHING: Self = Self { taken: Taken::Unchanged, commands: Vec::new() };

    /// Nothing of it was written.
    #[must_use]
    pub fn refused(refusal: &Refusal) -> Self {
        Self { taken: Taken::Refused(refusal.to_string()), commands: Vec::new() }
    }
}

/// What follows for lines in service from lines that were written, the first of them that which was told of.
#[must_use]
pub fn follow(state: &State, written: &[Subscriber]) -> Followed {
    if written.is_empty() {
        return Followed::NOTHING;
    }
    let (mut warnings, mut commands) = (Vec::new(), Vec::new());
    let mut is_taken_over = false;
    for (place, known) in written.iter().enumerate() {
        let lost = known.reason.as_ref().filter(|_| place > 0 && written[0].down_since.is_none());
        if let Some(reason) = lost {
            warnings.push(format!("line {} is down: {reason}", known.line));
        }
        let session = state.sessions.get(&known.line);
        if let Some(session) = session.filter(|session| session.source != known.source) {
            let named = match &session.source {
                Some(source) => format!("source {source} tells of it"),
                None => "an operator named it".to_owned(),
            };
            warnings.push(format!("in service line {} stays as it was: {named}", known.line));
        } else if known.down_since.is_some() {
            // A line that takes over the addresses of another in service ends that one.
            if session.is_some() && !is_taken_over {
                commands.push(Command::StopSession { name: known.line.clone() });
            }
        } else if session.is_some() || overlaps_any(state, known) {
            is_taken_over = session.is_none();
            match line(&state.network, known) {
                Ok(new) => commands.push(Command::StartSession(new)),
                Err(refusal) => warnings.push(format!("in service it stays as it was: {refusal}")),
            }
        }
    }
    Followed { taken: Taken::Changed(warnings), commands }
}

fn overlaps_any(state: &State, known: &Subscriber) -> bool {
    let addresses = &known.facts.addresses;
    addresses.iter().any(|address| state.index.sessions_within(address).next().is_some())
}

/// What follows for a line in service that was seen again as it was.
#[must_use]
pub fn follow_sign_of_life(state: &State, known: &Subscriber) -> Followed {
    let in_service = state.sessions.get(&known.line).filter(|session| session.source == known.source);
    let command = in_service.and_then(|_| line(&state.network, known).ok()).map(Command::StartSession);
    Followed { commands: command.into_iter().collect(), ..Followed::NOTHING }
}
