//! The state and its derived sums: how changes are applied and undone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use jiff::Timestamp;
use qos_common::classify::Rule;

use super::capacity::{Load, PRIORITIES, Share};
use super::contract::TakenByParty;
use super::overlap::RuleIndex;
use super::segment::Promised;
use super::slots::{FreeSlots, SlotKind};
use super::{Change, Network};
use crate::domain::{
    Allocation, AllocationId, ApiKey, Application, BitsPerSecond, DelayBound, Directed, Direction, KeyId,
    Name, Profile, Provider, Segment, Session, selector,
};

/// Everything that decisions depend on.
///
/// It is read freely and changed by [`State::apply`] and [`State::set_network`] alone, which keep the sums
/// and indices that make a decision fast.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// The network; another comes by [`State::set_network`], as the sums depend on it.
    pub network: Network,
    /// Providers by name.
    pub providers: BTreeMap<Name, Provider>,
    /// Applications by provider and name.
    pub applications: BTreeMap<(Name, Name), Application>,
    /// Sessions by name.
    pub sessions: BTreeMap<Name, Session>,
    /// Segments by name.
    pub segments: BTreeMap<Name, Segment>,
    /// Profiles by name.
    pub profiles: BTreeMap<Name, Profile>,
    /// API keys by number.
    pub keys: BTreeMap<KeyId, ApiKey>,
    /// Allocations that are available, by number. Ended ones are history, in the store only.
    pub allocations: BTreeMap<AllocationId, Allocation>,
    /// The number the next allocation gets. It only grows, undone grants included.
    pub next_allocation: AllocationId,
    pub(super) slots: BTreeMap<SlotKind, FreeSlots>,
    pub(super) index: Index,
}

impl State {
    /// A state in which nothing is registered.
    #[must_use]
    pub fn new(network: Network) -> Self {
        let index = Index::new(&network);
        Self {
            network,
            providers: BTreeMap::new(),
            applications: BTreeMap::new(),
            sessions: BTreeMap::new(),
            segments: BTreeMap::new(),
            profiles: BTreeMap::new(),
            keys: BTreeMap::new(),
            allocations: BTreeMap::new(),
            next_allocation: AllocationId(1),
            slots: SlotKind::ALL.into_iter().map(|kind| (kind, FreeSlots::new(kind))).collect(),
            index,
        }
    }

    /// Puts another network in place, as when the configuration was loaded again; returns the one before.
    pub fn set_network(&mut self, network: Network) -> Network {
        let mut index = Index::new(&network);
        for session in self.sessions.values() {
            index.add_session(&network, session);
        }
        for allocation in self.allocations.values() {
            index.add(&network, session_of(&self.sessions, allocation), allocation);
        }
        self.index = index;
        std::mem::replace(&mut self.network, network)
    }

    /// Carries out one change of a decision.
    ///
    /// A provider, application or session is put before what refers to it, and removed after.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::PutProvider(provider) => {
                let old = self.providers.insert(provider.name.clone(), provider.clone());
                self.exchange(SlotKind::Provider, old.map(|old| old.slot), Some(provider.slot));
            }
            Change::DeleteProvider(name) => {
                let old = self.providers.remove(name);
                self.exchange(SlotKind::Provider, old.map(|old| old.slot), None);
            }
            Change::PutApplication(application) => {
                let key = (application.provider.clone(), application.name.clone());
                let old = self.applications.insert(key, application.clone());
                self.exchange(SlotKind::Application, old.map(|old| old.slot), Some(application.slot));
            }
            Change::DeleteApplication(provider, name) => {
                let old = self.applications.remove(&(provider.clone(), name.clone()));
                self.exchange(SlotKind::Application, old.map(|old| old.slot), None);
            }
            Change::PutSession(session) => self.put_session(session),
            Change::DeleteSession(name) => {
                let old = self.sessions.remove(name);
                if let Some(old) = &old {
                    self.index.remove_session(&self.network, old);
                }
                self.exchange(SlotKind::Session, old.map(|old| old.slot), None);
            }
            Change::PutSegment(segment) => {
                self.segments.insert(segment.name.clone(), segment.clone());
            }
            Change::DeleteSegment(name) => {
                self.segments.remove(name);
            }
            Change::PutProfile(profile) => {
                self.profiles.insert(profile.name.clone(), profile.clone());
            }
            Change::DeleteProfile(name) => {
                self.profiles.remove(name);
            }
            Change::PutKey(key) => {
                self.keys.insert(key.id.clone(), key.clone());
            }
            Change::DeleteKey(id) => {
                self.keys.remove(id);
            }
            Change::PutAllocation(allocation) => {
                let old = self.forget(allocation.id);
                let old = old.map(|old| (old.slot, old.class));
                let session = session_of(&self.sessions, allocation);
                self.index.add(&self.network, session, allocation);
                self.allocations.insert(allocation.id, allocation.clone());
                self.next_allocation = self.next_allocation.max(AllocationId(allocation.id.0 + 1));
                self.exchange(SlotKind::Allocation, old.map(|(slot, _)| slot), Some(allocation.slot));
                self.exchange(SlotKind::Class, old.and_then(|(_, class)| class), allocation.class);
            }
            Change::EndAllocation(allocation) => {
                if let Some(old) = self.forget(allocation.id) {
                    self.exchange(SlotKind::Allocation, Some(old.slot), None);
                    self.exchange(SlotKind::Class, old.class, None);
                }
            }
        }
    }

    /// What undoes `changes`, none of which is applied yet.
    ///
    /// Applied after them it gives back everything but the order of the free slots and the next
    /// allocation's number: a grant that is undone has ended, and its number and slot are used up.
    #[must_use]
    pub fn inverse(&self, changes: &[Change]) -> Vec<Change> {
        changes.iter().rev().filter_map(|change| self.inverse_of(change)).collect()
    }

    fn inverse_of(&self, change: &Change) -> Option<Change> {
        Some(match change {
            Change::PutProvider(Provider { name, .. }) => match self.providers.get(name) {
                Some(old) => Change::PutProvider(old.clone()),
                None => Change::DeleteProvider(name.clone()),
            },
            Change::DeleteProvider(name) => Change::PutProvider(self.providers.get(name)?.clone()),
            Change::PutApplication(Application { provider, name, .. }) => {
                match self.applications.get(&(provider.clone(), name.clone())) {
                    Some(old) => Change::PutApplication(old.clone()),
                    None => Change::DeleteApplication(provider.clone(), name.clone()),
                }
            }
            Change::DeleteApplication(provider, name) => {
                Change::PutApplication(self.applications.get(&(provider.clone(), name.clone()))?.clone())
            }
            Change::PutSession(Session { name, .. }) => match self.sessions.get(name) {
                Some(old) => Change::PutSession(old.clone()),
                None => Change::DeleteSession(name.clone()),
            },
            Change::DeleteSession(name) => Change::PutSession(self.sessions.get(name)?.clone()),
            Change::PutSegment(Segment { name, .. }) => match self.segments.get(name) {
                Some(old) => Change::PutSegment(old.clone()),
                None => Change::DeleteSegment(name.clone()),
            },
            Change::DeleteSegment(name) => Change::PutSegment(self.segments.get(name)?.clone()),
            Change::PutProfile(Profile { name, .. }) => match self.profiles.get(name) {
                Some(old) => Change::PutProfile(old.clone()),
                None => Change::DeleteProfile(name.clone()),
            },
            Change::DeleteProfile(name) => Change::PutProfile(self.profiles.get(name)?.clone()),
            Change::PutKey(ApiKey { id, .. }) => match self.keys.get(id) {
                Some(old) => Change::PutKey(old.clone()),
                None => Change::DeleteKey(id.clone()),
            },
            Change::DeleteKey(id) => Change::PutKey(self.keys.get(id)?.clone()),
            Change::PutAllocation(allocation) => match self.allocations.get(&allocation.id) {
                Some(old) => Change::PutAllocation(old.clone()),
                None => Change::EndAllocation(allocation.ended(allocation.granted_at, "never in force")),
            },
            Change::EndAllocation(allocation) => {
                Change::PutAllocation(self.allocations.get(&allocation.id)?.clone())
            }
        })
    }

    /// Sets in which order slots that were used are given out again: `freed` first to last.
    pub(crate) fn restore_freed_slots(&mut self, freed: impl IntoIterator<Item = (SlotKind, u16)>) {
        for (kind, slot) in freed {
            self.exchange(kind, Some(slot), None);
        }
    }

    /// When the next allocation expires, or a session has to be looked at; it may have been before now.
    #[must_use]
    pub fn next_end(&self) -> Option<Timestamp> {
        let session = self.index.deadlines.first().map(|(at, _)| *at);
        self.index.expiries.first().map(|(end, _)| *end).into_iter().chain(session).min()
    }

    /// The session that has the address.
    #[must_use]
    pub fn line_of(&self, address: IpAddr) -> Option<&Name> {
        self.index.session_around(&IpNet::from(address))
    }

    /// Allocations on a line, by number.
    pub fn allocations_on(&self, session: &Name) -> impl Iterator<Item = &Allocation> {
        let ids = self.index.lines.get(session).into_iter().flat_map(|line| &line.allocations);
        ids.filter_map(|id| self.allocations.get(id))
    }

    /// Rate of a line's class: its guarantees, the smallest rate of its other classes, and what its
    /// rest is sure of. Zero where there is no such session.
    #[must_use]
    pub fn line_rate(&self, session: &Name, direction: Direction) -> BitsPerSecond {
        let line = self.index.lines.get(session);
        BitsPerSecond(line.map_or(0, |line| line.load.get(direction).rate))
    }

    /// Whether any allocation has a largest packet.
    #[must_use]
    pub fn has_mtu(&self) -> bool {
        self.index.mtus > 0
    }

    /// What of a line's speed is not promised, as if the allocations in `without` were gone. Zero where there
    /// is no such session.
    #[must_use]
    pub(super) fn left_on_line(
        &self,
        session: &Name,
        direction: Direction,
        without: &[&Allocation],
    ) -> BitsPerSecond {
        let Some(session) = self.sessions.get(session) else { return BitsPerSecond(0) };
        let load = self.line_load(session, direction, without).unwrap_or_default();
        load.left(self.network.line_speed(session, direction))
    }

    /// What a line carries without some allocations; none: it is not known.
    pub(super) fn line_load(
        &self,
        session: &Session,
        direction: Direction,
        without: &[&Allocation],
    ) -> Option<Load> {
        let mut load = *self.index.lines.get(&session.name)?.load.get(direction);
        for other in without.iter().filter(|other| other.session.as_ref() == Some(&session.name)) {
            if let Some(share) = Share::of(&self.network, Some(session), other, direction) {
                load.remove(&share);
            }
        }
        Some(load)
    }

    /// What the link carries without some allocations.
    pub(super) fn link_load(&self, direction: Direction, without: &[&Allocation]) -> Load {
        let mut load = *self.index.link.get(direction);
        for share in without.iter().filter_map(|other| Share::of(&self.network, None, other, direction)) {
            load.remove(&share);
        }
        load
    }

    /// What is guaranteed on the lines behind a segment.
    #[must_use]
    pub fn promised_on_segment(&self, segment: &Name) -> Directed<BitsPerSecond> {
        let Directed { up, down } = self.index.promised.of(segment);
        Directed { up: BitsPerSecond(up), down: BitsPerSecond(down) }
    }

    /// What of a segment may still be promised, likewise. Zero where there is no such segment.
    #[must_use]
    pub(super) fn left_on_segment(
        &self,
        segment: &Name,
        direction: Direction,
        without: &[&Allocation],
    ) -> BitsPerSecond {
        let there = self.segments.get(segment).map_or(0, |segment| segment.promisable(direction).0);
        let is_behind = |other: &&&Allocation| {
            session_of(&self.sessions, other).is_some_and(|session| session.segments.contains(segment))
        };
        let gone = without.iter().filter(is_behind);
        let gone: u64 =
            gone.filter_map(|other| *other.level.guaranteed.get(direction)).map(|rate| rate.0).sum();
        let promised = self.index.promised.of(segment).get(direction).saturating_sub(gone);
        BitsPerSecond(there.saturating_sub(promised))
    }

    /// What of the link's capacity is not promised, likewise.
    #[must_use]
    pub(super) fn left_on_link(&self, direction: Direction, without: &[&Allocation]) -> BitsPerSecond {
        self.link_load(direction, without).left(*self.network.link.get(direction))
    }

    /// Delay that in-profile packets of `allocation` stay within as things are; none where it has no
    /// guarantee in that direction, or the direction is not into the line.
    #[must_use]
    pub fn delay_bound(&self, allocation: &Allocation) -> Directed<Option<DelayBound>> {
        let direction = self.network.hard_direction();
        let mut bound = Directed::default();
        if allocation.has_class(direction) && allocation.level.guaranteed.get(direction).is_some() {
            let priority = allocation.level.priority;
            let line = allocation
                .session
                .as_ref()
                .and_then(|name| self.sessions.get(name).zip(self.index.lines.get(name)))
                .map(|(session, line)| (session, line.load.get(direction)));
            let link = self.index.link.get(direction);
            *bound.get_mut(direction) = Some(bound_of(&self.network, line, link, priority));
        }
        bound
    }

    /// Where more is promised than the network as configured has, one text each: after the
    /// configuration was changed under allocations that were granted before.
    #[must_use]
    pub fn overcommitted(&self) -> Vec<String> {
        let mut broken = Vec::new();
        let (rules, most) = (self.index.rules.count(), self.network.max_rules);
        if rules > most as usize {
            broken.push(format!("max_rules: {rules} are in use, {most} are there"));
        }
        for direction in Direction::BOTH {
            let word = super::direction_word(direction);
            let over = |what: &str, load: &Load, speed: BitsPerSecond| {
                let rate = BitsPerSecond(load.rate);
                (rate > speed).then(|| format!("{what} {word}: {rate} promised, {speed} there"))
            };
            broken.extend(over("link", self.index.link.get(direction), *self.network.link.get(direction)));
            for (name, line) in &self.index.lines {
                let Some(session) = self.sessions.get(name) else { continue };
                let speed = self.network.line_speed(session, direction);
                broken.extend(over(&format!("line {name}"), line.load.get(direction), speed));
            }
        }
        broken
    }

    /// Segments that carry less than is promised on them, one text each: after one was made smaller, which its
    /// asker was told of. What is promised stays.
    #[must_use]
    pub fn overcommitted_segments(&self) -> Vec<String> {
        let mut broken = Vec::new();
        for (name, segment) in &self.segments {
            for direction in Direction::BOTH {
                let promised = *self.promised_on_segment(name).get(direction);
                let there = segment.promisable(direction);
                if promised > there {
                    let word = super::direction_word(direction);
                    broken.push(format!("segment {name} {word}: {promised} promised, {there} there"));
                }
            }
        }
        broken
    }

    /// Delay budgets that the network as configured does not keep, one text each: likewise.
    #[must_use]
    pub fn broken_delays(&self) -> Vec<String> {
        let mut broken = Vec::new();
        let direction = self.network.hard_direction();
        for allocation in self.allocations.values() {
            let Some(bound) = *self.delay_bound(allocation).get(direction) else { continue };
            for (what, budget, possible) in [
                ("delay", allocation.level.delay_us, bound.whole_us),
                ("jitter", allocation.level.jitter_us, bound.jitter_us()),
            ] {
                if let Some(budget) = budget.filter(|budget| possible > *budget) {
                    broken.push(format!(
                        "allocation {}: a {what} of {budget} µs promised, {possible} µs possible",
                        allocation.id
                    ));
                }
            }
        }
        broken
    }

    fn put_session(&mut self, session: &Session) {
        // The allocations of a line that changes are taken off and put back.
        let carried: Vec<Allocation> = self.allocations_on(&session.name).cloned().collect();
        for allocation in &carried {
            self.index.remove(&self.network, session_of(&self.sessions, allocation), allocation);
        }
        let old = self.sessions.insert(session.name.clone(), session.clone());
        if let Some(old) = &old {
            self.index.remove_session(&self.network, old);
        }
        self.index.add_session(&self.network, session);
        for allocation in &carried {
            self.index.add(&self.network, Some(session), allocation);
        }
        self.exchange(SlotKind::Session, old.map(|old| old.slot), Some(session.slot));
    }

    fn forget(&mut self, id: AllocationId) -> Option<Allocation> {
        let old = self.allocations.remove(&id)?;
        self.index.remove(&self.network, session_of(&self.sessions, &old), &old);
        Some(old)
    }

    fn exchange(&mut self, kind: SlotKind, old: Option<u16>, new: Option<u16>) {
        let Some(free) = self.slots.get_mut(&kind) else { return };
        if let Some(old) = old.filter(|old| Some(*old) != new) {
            free.release(old);
        }
        if let Some(new) = new {
            free.take(new);
        }
    }
}

/// What decisions need of the whole state, kept up to date change by change.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Index {
    /// All classes under the link: lines' rests, allocations, the default.
    pub(super) link: Directed<Load>,
    pub(super) lines: BTreeMap<Name, Line>,
    /// What allocations take of contracts.
    pub(super) taken: TakenByParty,
    /// What they take of segments.
    pub(super) promised: Promised,
    /// By priority: the delay that the link may add before a delay budget is broken, in ns. A line
    /// has one entry for its tightest budget, an allocation on no line one of its own.
    room: [BTreeSet<(u64, AllocationId)>; PRIORITIES],
    /// Sessions' prefixes by family and first address: the last address, and whose they are.
    addresses: BTreeMap<(bool, u128), (u128, Name)>,
    /// How many of sessions' prefixes have each family and length.
    pub(super) prefix_lengths: BTreeMap<(bool, u8), usize>,
    pub(super) rules: RuleIndex,
    pub(super) expiries: BTreeSet<(Timestamp, AllocationId)>,
    /// When sessions are stale, or their grace is over.
    pub(super) deadlines: BTreeSet<(Timestamp, Name)>,
    /// How many allocations have a largest packet.
    mtus: usize,
}

/// What a line carries.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Line {
    pub(super) load: Directed<Load>,
    allocations: BTreeSet<AllocationId>,
    /// Delay budgets by priority, in ns.
    budgets: [BTreeSet<(u64, AllocationId)>; PRIORITIES],
    /// The line's entries in [`Index::room`].
    room: [Option<(u64, AllocationId)>; PRIORITIES],
}

impl Index {
    fn new(network: &Network) -> Self {
        let mut link = Directed::<Load>::default();
        for direction in Direction::BOTH {
            link.get_mut(direction).add(&Share::of_default(network, direction));
        }
        Self {
            link,
            lines: BTreeMap::new(),
            taken: TakenByParty::default(),
            promised: Promised::default(),
            room: Default::default(),
            addresses: BTreeMap::new(),
            prefix_lengths: BTreeMap::new(),
            rules: RuleIndex::default(),
            expiries: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            mtus: 0,
        }
    }

    /// The session that holds all of `prefix`.
    pub(super) fn session_around(&self, prefix: &IpNet) -> Option<&Name> {
        let (v4, first, last) = span(prefix);
        let (_, (end, name)) =
            self.addresses.range(..=(v4, first)).next_back().filter(|(key, _)| key.0 == v4)?;
        (last <= *end).then_some(name)
    }

    /// Sessions that hold any address of `prefix`.
    pub(super) fn sessions_within(&self, prefix: &IpNet) -> impl Iterator<Item = &Name> {
        let (v4, first, last) = span(prefix);
        // Sessions share no address, so the one that begins last also ends last.
        let before = self.addresses.range(..=(v4, last)).rev();
        before.take_while(move |(key, (end, _))| key.0 == v4 && *end >= first).map(|(_, (_, name))| name)
    }

    /// The delay budgets that break if the link adds `delay_ns` for `priority`.
    pub(super) fn broken_on_link(
        &self,
        priority: usize,
        delay_ns: u64,
    ) -> impl Iterator<Item = AllocationId> {
        self.room[priority].iter().take_while(move |(room, _)| *room < delay_ns).map(|(_, id)| *id)
    }

    fn add_session(&mut self, network: &Network, session: &Session) {
        let line = self.lines.entry(session.name.clone()).or_default();
        for direction in Direction::BOTH {
            line.load.get_mut(direction).add(&Share::of_rest(network, session, direction, true));
            self.link.get_mut(direction).add(&Share::of_rest(network, session, direction, false));
        }
        for prefix in &session.addresses {
            let (v4, first, last) = span(prefix);
            self.addresses.insert((v4, first), (last, session.name.clone()));
            *self.prefix_lengths.entry((v4, prefix.prefix_len())).or_default() += 1;
        }
        self.deadlines.extend(network.deadline(session).map(|at| (at, session.name.clone())));
    }

    fn remove_session(&mut self, network: &Network, session: &Session) {
        self.lines.remove(&session.name);
        for direction in Direction::BOTH {
            self.link.get_mut(direction).remove(&Share::of_rest(network, session, direction, false));
        }
        for prefix in &session.addresses {
            let (v4, first, _) = span(prefix);
            self.addresses.remove(&(v4, first));
            decrement(&mut self.prefix_lengths, &(v4, prefix.prefix_len()));
        }
        if let Some(at) = network.deadline(session) {
            self.deadlines.remove(&(at, session.name.clone()));
        }
    }

    fn add(&mut self, network: &Network, session: Option<&Session>, allocation: &Allocation) {
        for direction in Direction::BOTH {
            if let Some(share) = Share::of(network, None, allocation, direction) {
                self.link.get_mut(direction).add(&share);
            }
        }
        self.taken.add(allocation);
        if let Some(session) = session {
            self.promised.add(session, allocation);
            let line = self.lines.entry(session.name.clone()).or_default();
            line.allocations.insert(allocation.id);
            for direction in Direction::BOTH {
                if let Some(share) = Share::of(network, Some(session), allocation, direction) {
                    line.load.get_mut(direction).add(&share);
                }
            }
        }
        if let Some((priority, budget)) = budget(network, session, allocation) {
            match session.and_then(|session| self.lines.get_mut(&session.name)) {
                Some(line) => line.budgets[priority].insert((budget, allocation.id)),
                None => self.room[priority].insert((budget, allocation.id)),
            };
        }
        for rule in rules(allocation) {
            self.rules.add(rule);
        }
        self.expiries.extend(allocation.expires_at.map(|at| (at, allocation.id)));
        self.mtus += usize::from(allocation.level.mtu.is_some());
        self.refresh_room(network, session);
    }

    fn remove(&mut self, network: &Network, session: Option<&Session>, allocation: &Allocation) {
        for direction in Direction::BOTH {
            if let Some(share) = Share::of(network, None, allocation, direction) {
                self.link.get_mut(direction).remove(&share);
            }
        }
        self.taken.remove(allocation);
        if let Some(session) = session {
            self.promised.remove(session, allocation);
        }
        if let Some(line) = session.and_then(|session| self.lines.get_mut(&session.name)) {
            line.allocations.remove(&allocation.id);
            for direction in Direction::BOTH {
                if let Some(share) = Share::of(network, session, allocation, direction) {
                    line.load.get_mut(direction).remove(&share);
                }
            }
        }
        if let Some((priority, budget)) = budget(network, session, allocation) {
            match session.and_then(|session| self.lines.get_mut(&session.name)) {
                Some(line) => line.budgets[priority].remove(&(budget, allocation.id)),
                None => self.room[priority].remove(&(budget, allocation.id)),
            };
        }
        for rule in rules(allocation) {
            self.rules.remove(&rule);
        }
        if let Some(at) = allocation.expires_at {
            self.expiries.remove(&(at, allocation.id));
        }
        self.mtus -= usize::from(allocation.level.mtu.is_some());
        self.refresh_room(network, session);
    }

    /// Says anew how much delay of the link the budgets on `session`'s line leave room for.
    fn refresh_room(&mut self, network: &Network, session: Option<&Session>) {
        let direction = network.hard_direction();
        let Some(session) = session else { return };
        let Some(line) = self.lines.get_mut(&session.name) else { return };
        for priority in 0..PRIORITIES {
            if let Some(entry) = line.room[priority].take() {
                self.room[priority].remove(&entry);
            }
            let Some((budget, id)) = line.budgets[priority].first() else { continue };
            let delay = line_delay_ns(network, session, line.load.get(direction), priority as u8);
            let entry = (budget.saturating_sub(delay), *id);
            line.room[priority] = Some(entry);
            self.room[priority].insert(entry);
        }
    }
}

impl Line {
    /// The delay budgets of `priority` that a delay of `delay_ns` breaks.
    pub(super) fn broken(&self, priority: usize, delay_ns: u64) -> impl Iterator<Item = AllocationId> {
        let broken = self.budgets[priority].iter().take_while(move |(budget, _)| *budget < delay_ns);
        broken.map(|(_, id)| *id)
    }
}

fn session_of<'a>(sessions: &'a BTreeMap<Name, Session>, allocation: &Allocation) -> Option<&'a Session> {
    sessions.get(allocation.session.as_ref()?)
}

/// Rules of all selectors of `allocation`.
pub(super) fn rules(allocation: &Allocation) -> impl Iterator<Item = Rule> {
    let Allocation { id, slot, precedence, .. } = *allocation;
    (0..)
        .zip(&allocation.selectors)
        .flat_map(move |(index, selector)| selector::rules(selector, index, precedence, id, slot))
}

/// Priority and delay budget in ns of an allocation whose delay can be bounded. A jitter budget is one that begins
/// behind the delay of the line itself.
pub(super) fn budget(
    network: &Network,
    session: Option<&Session>,
    allocation: &Allocation,
) -> Option<(usize, u64)> {
    let bounded = allocation.covers(network.hard_direction())
        && allocation.level.guaranteed.get(network.hard_direction()).is_some();
    let line = session.map_or(0, |session| u64::from(session.delay_us));
    let jitter = allocation.level.jitter_us.map(|jitter| u64::from(jitter) + line);
    let budget = allocation.level.delay_us.map(u64::from).into_iter().chain(jitter).min();
    let budget = budget.filter(|_| bounded)?;
    Some((usize::from(allocation.level.priority).min(PRIORITIES - 1), budget * 1_000))
}

/// The bound and its parts for a priority, given what a line and the link carry.
pub(super) fn bound_of(
    network: &Network,
    line: Option<(&Session, &Load)>,
    link: &Load,
    priority: u8,
) -> DelayBound {
    let own = line.map_or(0, |(session, _)| session.delay_us);
    let on_line = line.map_or(0, |(session, load)| line_delay_ns(network, session, load, priority));
    let on_link = link_delay_ns(network, link, priority);
    DelayBound {
        whole_us: microseconds(on_link.saturating_add(on_line)),
        line_us: own,
        line_queue_us: microseconds(on_line.saturating_sub(u64::from(own) * 1_000)),
        link_queue_us: microseconds(on_link),
    }
}

/// Delay that in-profile packets of `priority` may meet on a line that carries `load`, in ns.
pub(super) fn line_delay_ns(network: &Network, session: &Session, load: &Load, priority: u8) -> u64 {
    let speed = network.line_speed(session, network.hard_direction());
    load.delay_ns(speed, priority).saturating_add(u64::from(session.delay_us) * 1_000)
}

/// Delay that they may meet on the link, in ns.
pub(super) fn link_delay_ns(network: &Network, load: &Load, priority: u8) -> u64 {
    load.delay_ns(*network.link.get(network.hard_direction()), priority)
}

/// Rounds up to µs; what does not fit is longer than an hour.
pub(super) fn microseconds(ns: u64) -> u32 {
    u32::try_from(ns.div_ceil(1_000)).unwrap_or(u32::MAX)
}

/// Family (true for IPv4), first and last address of a prefix.
pub(super) fn span(prefix: &IpNet) -> (bool, u128, u128) {
    let number = |address: IpAddr| match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    };
    (prefix.addr().is_ipv4(), number(prefix.network()), number(prefix.broadcast()))
}

fn decrement<K: Ord>(counts: &mut BTreeMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}
