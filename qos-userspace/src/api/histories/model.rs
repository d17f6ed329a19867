//! What must be so, worked out from scratch: lists of what was answered, and sums over all of them.
//!
//! Nothing here is kept up to date or looked up in an index, and no function of the manager's sums is used: it is
//! slow, and can be seen to be right.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use crate::domain::{
    Allocation, AllocationId, BitsPerSecond, Contract, Directed, Direction, Enforcement, Level, Name,
    Provider, Segment, Session, Status,
};
use crate::manager::{Change, Command, Decision, GrantRequest, LineSide, Network, Refusal, State};

/// Rate of a class without a guarantee, in bit/s (docs/admission.md).
const UNGUARANTEED: u64 = 512;

/// What was answered.
#[derive(Clone, Debug)]
pub(super) struct Model {
    network: Network,
    providers: BTreeMap<Name, Provider>,
    applications: BTreeMap<(Name, Name), Contract>,
    segments: BTreeMap<Name, Segment>,
    sessions: BTreeMap<Name, Session>,
    pub(super) allocations: BTreeMap<AllocationId, Allocation>,
    /// Highest number of an allocation that was ever answered.
    last: AllocationId,
}

/// What is taken of something, and what it has: bit/s, or allocations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Taken {
    taken: u64,
    limit: u64,
}

/// By what is taken of: `line s1 Downstream`.
pub(super) type Sums = BTreeMap<String, Taken>;

impl Model {
    pub(super) fn new(network: Network) -> Self {
        Self {
            network,
            providers: BTreeMap::new(),
            applications: BTreeMap::new(),
            segments: BTreeMap::new(),
            sessions: BTreeMap::new(),
            allocations: BTreeMap::new(),
            last: AllocationId(0),
        }
    }

    /// Notes what has changed.
    pub(super) fn fold(&mut self, changes: &[Change]) {
        for change in changes {
            match change.clone() {
                Change::PutProvider(provider) => {
                    self.providers.insert(provider.name.clone(), provider);
                }
                Change::DeleteProvider(name) => {
                    self.providers.remove(&name);
                }
                Change::PutApplication(application) => {
                    let key = (application.provider, application.name);
                    self.applications.insert(key, application.contract);
                }
                Change::DeleteApplication(provider, name) => {
                    self.applications.remove(&(provider, name));
                }
                Change::PutSession(session) => {
                    self.sessions.insert(session.name.clone(), session);
                }
                Change::DeleteSession(name) => {
                    self.sessions.remove(&name);
                }
                Change::PutSegment(segment) => {
                    self.segments.insert(segment.name.clone(), segment);
                }
                Change::DeleteSegment(name) => {
                    self.segments.remove(&name);
                }
                Change::PutProfile(_)
                | Change::DeleteProfile(_)
                | Change::PutKey(_)
                | Change::DeleteKey(_) => {}
                Change::PutAllocation(allocation) => {
                    self.last = self.last.max(allocation.id);
                    self.allocations.insert(allocation.id, allocation);
                }
                Change::EndAllocation(allocation) => {
                    self.allocations.remove(&allocation.id);
                }
            }
        }
    }

    /// Holds a decision against what was asked, and notes it.
    pub(super) fn accept(&mut self, command: &Command, decision: &Decision, now: Timestamp) {
        let put: Vec<&Allocation> = decision.changes.iter().filter_map(put).collect();
        let ended: BTreeSet<AllocationId> = decision.changes.iter().filter_map(ended).collect();
        let gone = |id: &AllocationId| self.allocations.get(id);
        assert!(ended.iter().all(|id| gone(id).is_some()), "ended twice: {decision:?}");
        match command {
            Command::Grant(request) => {
                let [granted] = put[..] else { panic!("{decision:?}") };
                assert!(granted.id > self.last, "{} was given out before", granted.id);
                let asked = (&request.provider, &request.selectors, &request.application);
                assert_eq!((&granted.provider, &granted.selectors, &granted.application), asked);
                assert_eq!(granted.expires_at, request.duration.map(|duration| now + duration));
                let gives_way =
                    |id| gone(id).is_some_and(|other| other.level.priority > granted.level.priority);
                assert!(ended.iter().all(gives_way), "{decision:?}");
            }
            Command::Revoke { id } => {
                assert_eq!((put.len(), ended), (0, BTreeSet::from([*id])));
            }
            Command::Extend { id, .. } => {
                let [extended] = put[..] else { panic!("{decision:?}") };
                let before = &self.allocations[id];
                assert!(extended.id == *id && extended.expires_at >= before.expires_at, "{decision:?}");
                assert_eq!(Allocation { expires_at: before.expires_at, ..extended.clone() }, *before);
            }
            Command::Expire => assert_eq!((put.len(), ended), (0, self.due(now))),
            Command::StartSession(_) | Command::AddSession(_) => {
                assert!(put.iter().all(|moved| self.allocations.contains_key(&moved.id)), "{decision:?}");
            }
            _ => assert_eq!((put.len(), ended.len()), (0, 0), "{command:?}: {decision:?}"),
        }
        self.fold(&decision.changes);
    }

    /// What must end at `now`: what is over, and what is on a line that was down for too long.
    fn due(&self, now: Timestamp) -> BTreeSet<AllocationId> {
        let lost = |allocation: &Allocation| {
            let line = allocation.session.as_ref().map(|name| &self.sessions[name]);
            line.is_some_and(|line| self.is_lost(line, now))
        };
        let over = |allocation: &Allocation| allocation.expires_at.is_some_and(|end| end <= now);
        let due = self.allocations.values().filter(|allocation| over(allocation) || lost(allocation));
        due.map(|allocation| allocation.id).collect()
    }

    fn is_lost(&self, line: &Session, now: Timestamp) -> bool {
        let stale = line.seen_at.map(|seen| seen + self.network.session_ttl).filter(|stale| *stale <= now);
        let down = line.down_since.or(stale);
        down.is_some_and(|down| down + self.network.session_grace <= now)
    }

    /// What the next start at `now` leaves of it.
    pub(super) fn restart(&mut self, now: Timestamp) {
        for id in self.due(now) {
            self.allocations.remove(&id);
        }
        let lost: Vec<Name> = self
            .sessions
            .values()
            .filter(|line| self.is_lost(line, now))
            .map(|line| line.name.clone())
            .collect();
        for name in lost {
            self.sessions.remove(&name);
        }
        for line in self.sessions.values_mut().filter(|line| line.down_since.is_none()) {
            let stale = line.seen_at.map(|seen| seen + self.network.session_ttl);
            line.down_since = stale.filter(|stale| *stale <= now);
        }
    }

    /// Whether a state has what was answered, and nothing else.
    pub(super) fn assert_is(&self, state: &State) {
        assert_eq!(state.allocations, self.allocations);
        assert_eq!(state.sessions, self.sessions);
        assert_eq!(state.segments, self.segments);
        assert_eq!(state.providers, self.providers);
        let applications =
            state.applications.iter().map(|(key, known)| (key.clone(), known.contract.clone()));
        assert_eq!(applications.collect::<BTreeMap<_, _>>(), self.applications);
        assert!(state.next_allocation > self.last);
    }

    /// All sums, each over all allocations.
    pub(super) fn sums(&self) -> Sums {
        let mut sums = Sums::new();
        let mut sum = |what: String, taken: u64, limit: u64| {
            sums.insert(what, Taken { taken, limit });
        };
        let all = || self.allocations.values();
        for direction in Direction::BOTH {
            let side = |rates: &Directed<Option<_>>| *rates.get(direction);
            let guaranteed = |allocation: &Allocation| bits(side(&allocation.level.guaranteed)).unwrap_or(0);
            let maximum = |allocation: &Allocation| bits(side(&allocation.level.maximum)).unwrap_or(0);
            let class = |allocation: &Allocation| class_rate(allocation, direction);
            let promisable = |contract: &Contract| {
                let most = [bits(side(&contract.guaranteed)), bits(side(&contract.maximum))];
                most.into_iter().flatten().min().unwrap_or(u64::MAX)
            };
            for (name, provider) in &self.providers {
                let own = all().filter(|other| other.provider == *name).map(guaranteed).sum();
                sum(format!("provider {name} {direction:?}"), own, promisable(&provider.contract));
            }
            for ((provider, name), contract) in &self.applications {
                let own = || {
                    let own = all().filter(|other| other.provider == *provider);
                    own.filter(|other| other.application.as_ref() == Some(name))
                };
                let what = format!("application {provider}/{name} {direction:?}");
                sum(
                    format!("{what} maximum"),
                    own().map(maximum).sum(),
                    bits(side(&contract.maximum)).unwrap_or(u64::MAX),
                );
                sum(what, own().map(guaranteed).sum(), promisable(contract));
            }
            for (name, line) in &self.sessions {
                let own = all().filter(|other| other.session.as_ref() == Some(name));
                let rest = self.rest(line, direction);
                let into = match self.network.line_side {
                    LineSide::Lan => Direction::Downstream,
                    LineSide::Wan => Direction::Upstream,
                };
                let speed = *line.rate.get(direction);
                let speed = if direction == into { speed } else { speed.share(self.network.soft_share) };
                sum(format!("line {name} {direction:?}"), rest + own.map(class).sum::<u64>(), speed.0);
            }
            for (name, segment) in &self.segments {
                let behind = all().filter(|other| {
                    let line = other.session.as_ref().map(|line| &self.sessions[line]);
                    line.is_some_and(|line| line.segments.contains(name))
                });
                let nobodys = bits(side(&segment.rest)).unwrap_or(0);
                let there = segment.capacity.get(direction).0 - nobodys;
                sum(format!("segment {name} {direction:?}"), behind.map(guaranteed).sum(), there);
            }
            let rests: u64 = self.sessions.values().map(|line| self.rest(line, direction)).sum();
            let link = self.network.link.get(direction).0;
            let others = self.network.link_rest.0.min(link / 8);
            sum(format!("link {direction:?}"), others + rests + all().map(class).sum::<u64>(), link);
        }
        for (name, provider) in &self.providers {
            let own = all().filter(|other| other.provider == *name).count() as u64;
            let most = provider.contract.allocations.map_or(u64::MAX, u64::from);
            sum(format!("allocations of {name}"), own, most);
        }
        for ((provider, name), contract) in &self.applications {
            let own = all().filter(|other| other.provider == *provider);
            let own = own.filter(|other| other.application.as_ref() == Some(name)).count() as u64;
            sum(
                format!("allocations of {provider}/{name}"),
                own,
                contract.allocations.map_or(u64::MAX, u64::from),
            );
        }
        sums
    }

    fn rest(&self, line: &Session, direction: Direction) -> u64 {
        self.network.line_rest.0.min(line.rate.get(direction).0 / 8)
    }

    /// Checks that nothing is promised twice: what has more promised than it has (it was made smaller) has no more
    /// than `before`.
    pub(super) fn assert_kept(&self, before: &Sums) {
        for (what, Taken { taken, limit }) in self.sums() {
            let was = before.get(&what).map_or(0, |before| before.taken);
            let may_exceed = !what.starts_with("line ") && !what.starts_with("link ");
            assert!(taken <= limit || may_exceed && taken <= was, "{what}: {taken} of {limit}, {was} before");
        }
    }

    /// Checks that what was refused for want of capacity would not have fitted, as far as sums say it: `request` names
    /// its whole level, with neither a delay nor a range.
    pub(super) fn assert_full(&self, request: &GrantRequest, refusal: &Refusal) {
        if refusal.message.contains("would break the") {
            return;
        }
        let near = request.selectors.iter().find_map(|selector| {
            let covered = Direction::BOTH.into_iter().find(|direction| selector.covers(*direction))?;
            selector.near(covered)
        });
        let has = |line: &&Session| {
            near.is_some_and(|near| line.addresses.iter().any(|address| address.contains(&near)))
        };
        let session = self.sessions.values().find(has).map(|line| line.name.clone());
        let level = Level {
            guaranteed: request.level.guaranteed,
            maximum: request.level.maximum,
            enforcement: request.level.enforcement.unwrap_or_default(),
            ..Level::default()
        };
        let asked = Allocation {
            id: AllocationId(u64::MAX),
            provider: request.provider.clone(),
            application: request.application.clone(),
            profile: None,
            selectors: request.selectors.clone(),
            level,
            precedence: 0,
            session,
            delay_bound: Directed::default(),
            granted_at: Timestamp::UNIX_EPOCH,
            expires_at: None,
            ended_at: None,
            status: Status::Available,
            reason: None,
            slot: 0,
            class: None,
        };
        let mut with = self.clone();
        with.allocations.insert(asked.id, asked);
        let before = self.sums();
        let grows_beyond =
            |(what, after): (&String, &Taken)| after.taken > after.limit && before[what] != *after;
        assert!(with.sums().iter().any(grows_beyond), "{request:?} would fit: {refusal}");
    }
}

fn put(change: &Change) -> Option<&Allocation> {
    match change {
        Change::PutAllocation(allocation) => Some(allocation),
        _ => None,
    }
}

fn ended(change: &Change) -> Option<AllocationId> {
    match change {
        Change::EndAllocation(allocation) => Some(allocation.id),
        _ => None,
    }
}

fn bits(rate: Option<BitsPerSecond>) -> Option<u64> {
    rate.map(|rate| rate.0)
}

/// What an allocation takes of its line and of the link.
fn class_rate(allocation: &Allocation, direction: Direction) -> u64 {
    if !allocation.selectors.iter().any(|selector| selector.covers(direction)) {
        return 0;
    }
    let other = if allocation.level.enforcement == Enforcement::Shape { UNGUARANTEED } else { 0 };
    bits(*allocation.level.guaranteed.get(direction)).unwrap_or(other)
}
