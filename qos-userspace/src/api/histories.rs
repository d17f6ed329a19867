//! Long histories of the real service on a real store: whatever comes, in whatever order, with a clock that
//! steps and a process that ends between any two effects, nothing is promised twice and nothing is lost.
//!
//! What must be so is worked out by [`model`], from what was answered alone.

mod model;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use fastrand::Rng;
use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use tempfile::TempDir;

use self::model::Model;
use super::service::{Asked, Operations as _, Service, ServiceError};
use super::testing::{Crash, Recorder, config};
use crate::domain::{
    Allocation, AllocationId, Application, BitsPerSecond, ByteCount, Contract, Directed, DurationRange,
    Enforcement, Level, LinkLayer, Name, Profile, ProfileStatus, Provider, ProviderKind, Segment, Session,
    Subscriber, selector,
};
use crate::manager::record::{Record, RecordQuery};
use crate::manager::subscriber::SubscriberQuery;
use crate::manager::{
    Change, Command, Decision, GrantRequest, LevelRequest, Network, NewProvider, NewSession, RefusalCode,
    State, tests::content,
};
use crate::store::{SqliteStore, Store, StoreError};

/// Steps of a history: commands that are carried out together, ends of the process, starts.
const STEPS: usize = 10_000;

thread_local! {
    /// What the clock of this test's service says.
    static NOW: Cell<Timestamp> = const { Cell::new(Timestamp::UNIX_EPOCH) };
}

#[test]
fn ten_thousand_steps_keep_every_promise() {
    history(1, "");
}

#[test]
fn ten_thousand_steps_keep_every_promise_where_better_priorities_preempt() {
    history(2, "preempt = \"lower-priority\"\n");
}

#[test]
fn ten_thousand_steps_keep_every_promise_at_the_subscribers_end() {
    history(3, "line_side = \"wan\"\n");
}

fn history(seed: u64, more: &str) {
    println!("seed {seed}, {STEPS} steps");
    let mut town = Town::new(seed, more);
    for step in 0..STEPS {
        town.step(step);
    }
    println!("{:?}", town.tally);
    let Tally { granted, refused, full, crashes, unwritten, restarts, .. } = town.tally;
    for (what, count) in [
        ("granted", granted),
        ("refused", refused),
        ("refused for want of capacity", full),
        ("crashes", crashes),
        ("unwritten", unwritten),
        ("restarts", restarts),
    ] {
        assert!(count > 50, "{what}: {count} times only, so that this history says little");
    }
}

/// How often something has happened.
#[derive(Debug, Default)]
struct Tally {
    granted: usize,
    refused: usize,
    /// Refused for want of capacity, and held against the sums.
    full: usize,
    crashes: usize,
    unwritten: usize,
    kernel_refused: usize,
    restarts: usize,
}

/// What the store does next.
#[derive(Debug, Default)]
struct Plan {
    refuse: bool,
    /// The process ends at the next commit, which has been made or not.
    crash: Option<bool>,
    /// What was committed since this was emptied.
    written: Vec<Change>,
}

/// A real store that outlives the service, and does what is planned.
#[derive(Clone, Debug)]
struct Disk {
    inner: Arc<Mutex<SqliteStore>>,
    plan: Arc<Mutex<Plan>>,
}

impl Disk {
    fn inner(&self) -> MutexGuard<'_, SqliteStore> {
        self.inner.lock().unwrap()
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap()
    }
}

impl Store for Disk {
    fn load(&mut self, network: Network) -> Result<State, StoreError> {
        self.inner().load(network)
    }

    fn commit(&mut self, changes: &[Change], records: &[Record]) -> Result<(), StoreError> {
        let crash = {
            let mut plan = self.plan();
            if std::mem::take(&mut plan.refuse) {
                self.inner().roll_back();
                return Err(StoreError::Full { path: PathBuf::from("/qos.sqlite") });
            }
            plan.crash.take()
        };
        if crash == Some(false) {
            Crash::now();
        }
        self.inner().commit(changes, records)?;
        self.plan().written.extend_from_slice(changes);
        if crash == Some(true) {
            Crash::now();
        }
        Ok(())
    }

    fn history(&mut self, limit: usize) -> Result<Vec<Allocation>, StoreError> {
        self.inner().history(limit)
    }

    fn records(&mut self, query: &RecordQuery) -> Result<Vec<Record>, StoreError> {
        self.inner().records(query)
    }

    fn put_subscriber(&mut self, subscriber: &Subscriber) -> Result<(), StoreError> {
        self.inner().put_subscriber(subscriber)
    }

    fn roll_back(&mut self) {
        self.inner().roll_back();
    }

    fn subscriber(&mut self, line: &Name) -> Result<Option<Subscriber>, StoreError> {
        self.inner().subscriber(line)
    }

    fn subscribers_within(&mut self, prefix: &IpNet) -> Result<Vec<Subscriber>, StoreError> {
        self.inner().subscribers_within(prefix)
    }

    fn subscribers_at(&mut self, bras: &str, source: Option<&Name>) -> Result<Vec<Subscriber>, StoreError> {
        self.inner().subscribers_at(bras, source)
    }

    fn subscribers(&mut self, query: &SubscriberQuery) -> Result<Vec<Subscriber>, StoreError> {
        self.inner().subscribers(query)
    }

    fn forget_subscribers(&mut self, before: Timestamp, most: u32) -> Result<usize, StoreError> {
        self.inner().forget_subscribers(before, most)
    }
}

/// What the kernel was told to hold.
#[derive(Clone, Debug, Default, PartialEq)]
struct Enforced {
    providers: BTreeMap<Name, Provider>,
    applications: BTreeMap<(Name, Name), Application>,
    sessions: BTreeMap<Name, Session>,
    allocations: BTreeMap<AllocationId, Allocation>,
}

impl Enforced {
    fn of(state: &State) -> Self {
        let State { providers, applications, sessions, allocations, .. } = state.clone();
        Self { providers, applications, sessions, allocations }
    }

    fn fold(&mut self, change: Change) {
        match change {
            Change::PutProvider(provider) => drop(self.providers.insert(provider.name.clone(), provider)),
            Change::DeleteProvider(name) => drop(self.providers.remove(&name)),
            Change::PutApplication(application) => {
                let key = (application.provider.clone(), application.name.clone());
                self.applications.insert(key, application);
            }
            Change::DeleteApplication(provider, name) => drop(self.applications.remove(&(provider, name))),
            Change::PutSession(session) => drop(self.sessions.insert(session.name.clone(), session)),
            Change::DeleteSession(name) => drop(self.sessions.remove(&name)),
            Change::PutAllocation(allocation) => drop(self.allocations.insert(allocation.id, allocation)),
            Change::EndAllocation(allocation) => drop(self.allocations.remove(&allocation.id)),
            Change::PutSegment(_)
            | Change::DeleteSegment(_)
            | Change::PutProfile(_)
            | Change::DeleteProfile(_)
            | Change::PutKey(_)
            | Change::DeleteKey(_) => {}
        }
    }
}

/// A service with what is known of it, and the dice that decide what comes next.
struct Town {
    random: Rng,
    _folder: TempDir,
    config: crate::config::Config,
    disk: Disk,
    recorder: Recorder,
    service: Service<Disk, Recorder>,
    model: Model,
    enforced: Enforced,
    tally: Tally,
}

impl Town {
    fn new(seed: u64, more: &str) -> Self {
        NOW.set("2026-01-01T00:00:00Z".parse().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let more = format!("{more}require_session = false\nsession_ttl = \"40s\"\nsession_grace = \"20s\"\n");
        let config = config(folder.path(), &more);
        let store = SqliteStore::open(folder.path().join("qos.sqlite")).unwrap();
        // What is lost with the power is another test's.
        store.set_synchronous("off");
        let disk = Disk { inner: Arc::new(Mutex::new(store)), plan: Arc::default() };
        let recorder = Recorder::default();
        let service = Service::start_by(
            || NOW.get(),
            config.clone(),
            1_500,
            disk.clone(),
            |state| recorder.start(state),
        );
        Self {
            random: Rng::with_seed(seed),
            _folder: folder,
            model: Model::new(config.network(1_500)),
            service: service.unwrap(),
            config,
            disk,
            recorder,
            enforced: Enforced::default(),
            tally: Tally::default(),
        }
    }

    fn step(&mut self, step: usize) {
        self.pass_time();
        if self.one_in(60) {
            self.restart();
        } else {
            let count = self.random.usize(1..=4);
            let commands: Vec<Command> = (0..count).map(|_| self.any_command()).collect();
            let asked: Vec<Asked> = commands.into_iter().map(Asked::from).collect();
            self.plan_a_fault();
            self.carry_out(&asked);
        }
        self.check(step);
        if step.is_multiple_of(1_000) {
            println!("{step}: {} allocations", self.model.allocations.len());
        }
    }

    /// Some seconds, or an hour forth or back.
    fn pass_time(&mut self) {
        let seconds = match self.random.u32(0..200) {
            0 => 3_600,
            1 => -3_600,
            2..=5 => self.random.i64(-30..0),
            _ => self.random.i64(0..4),
        };
        NOW.set(NOW.get() + SignedDuration::from_secs(seconds));
    }

    fn one_in(&mut self, times: u32) -> bool {
        self.random.u32(0..times) == 0
    }

    /// Lets something fail in what comes next, or the process end there.
    fn plan_a_fault(&mut self) {
        let place = self.random.usize(0..3);
        let mut record = self.recorder.record();
        match self.random.u32(0..60) {
            0 => self.disk.plan().refuse = true,
            // What could not be written is not taken back by the kernel either.
            1 => {
                self.disk.plan().refuse = true;
                record.refuse_after = Some(place);
            }
            2 => record.refuse = 1,
            3 => record.crash = Some((place, false)),
            4 => record.crash = Some((place, true)),
            5 => self.disk.plan().crash = Some(false),
            6 => self.disk.plan().crash = Some(true),
            _ => {}
        }
    }

    /// Takes back what was planned and has not come; returns whether the kernel was to refuse for good.
    fn forget_faults(&mut self) -> bool {
        *self.disk.plan() = Plan::default();
        let mut record = self.recorder.record();
        (record.refuse, record.crash) = (0, None);
        record.refuse_after.take().is_some()
    }

    fn carry_out(&mut self, asked: &[Asked]) {
        let refuses = self.disk.plan().refuse;
        let done = catch_unwind(AssertUnwindSafe(|| self.service.execute_all(asked)));
        let Ok(answers) = done else {
            self.tally.crashes += 1;
            // Nobody was answered; what the store has took effect.
            let written = std::mem::take(&mut self.disk.plan().written);
            self.model.fold(&written);
            return self.start_again();
        };
        let is_unwritten = refuses && !self.disk.plan().refuse;
        for (Asked { command, .. }, answer) in asked.iter().zip(&answers) {
            self.judge(command, answer, is_unwritten);
        }
        self.recorded();
        if self.forget_faults() {
            self.repair();
        }
    }

    /// Holds an answer against the model, which knows what was answered before.
    fn judge(&mut self, command: &Command, answer: &Result<Decision, ServiceError>, is_unwritten: bool) {
        match answer {
            Ok(decision) => {
                assert!(
                    !is_unwritten || decision.changes.is_empty(),
                    "answered and not written: {decision:?}"
                );
                let before = self.model.sums();
                self.model.accept(command, decision, NOW.get());
                self.model.assert_kept(&before);
                self.tally.granted += usize::from(matches!(command, Command::Grant(_)));
            }
            Err(ServiceError::Refused(refusal)) => {
                self.tally.refused += 1;
                let Command::Grant(request) = command else { return };
                let level = &request.level;
                let is_plain = level.least == Directed::default()
                    && (level.delay_us, level.jitter_us, &request.profile) == (None, None, &None);
                if refusal.code == RefusalCode::InsufficientCapacity && is_plain && !is_unwritten {
                    self.model.assert_full(request, refusal);
                    self.tally.full += 1;
                }
            }
            Err(ServiceError::Unwritten(_)) => {
                assert!(is_unwritten, "{command:?}");
                self.tally.unwritten += 1;
            }
            Err(ServiceError::Kernel(_)) => self.tally.kernel_refused += 1,
            Err(error) => panic!("{command:?}: {error}"),
        }
    }

    /// Notes what the kernel was told.
    fn recorded(&mut self) {
        for change in std::mem::take(&mut self.recorder.record().applied) {
            self.enforced.fold(change);
        }
    }

    /// The kernel holds what could not be taken back until it is reconciled, which the service wants at once.
    fn repair(&mut self) {
        if self.enforced != Enforced::of(self.service.state()) {
            assert!(self.service.idle().is_zero(), "it waits with a repair");
        }
        self.service.reconcile().unwrap();
        let reconciled = self.recorder.record().reconciled_with.take();
        self.enforced = Enforced::of(&reconciled.expect("it was reconciled"));
    }

    /// Ends in order, and starts again.
    fn restart(&mut self) {
        self.tally.restarts += 1;
        self.service.close();
        self.start_again();
    }

    /// Starts on what the store holds. Now and then the process ends once more while it starts.
    fn start_again(&mut self) {
        self.forget_faults();
        self.recorder.record().applied.clear();
        if self.one_in(10) {
            self.disk.plan().crash = Some(self.random.bool());
        }
        let start = |town: &Self| {
            let (config, disk) = (town.config.clone(), town.disk.clone());
            Service::start_by(|| NOW.get(), config, 1_500, disk, |state| town.recorder.start(state))
        };
        let started = match catch_unwind(AssertUnwindSafe(|| start(self))) {
            Ok(started) => started,
            Err(_) => start(self),
        };
        self.service = started.unwrap();
        self.model.restart(NOW.get());
        let started_with = self.recorder.record().started_with.take();
        self.enforced = Enforced::of(&started_with.expect("the gateway was started"));
    }

    /// State, store, kernel and what was answered are one.
    fn check(&self, step: usize) {
        let state = self.service.state();
        self.model.assert_is(state);
        self.model.assert_kept(&self.model.sums());
        // What the store has is compared at each start too; to read it takes longer than all the rest.
        if step.is_multiple_of(10) {
            let loaded = self.disk.inner().load(state.network.clone()).unwrap();
            self.model.assert_is(&loaded);
            assert!(content(&loaded) == content(state), "the store has something else than the state");
        }
        assert_eq!(self.enforced, Enforced::of(state), "the kernel has something else than the state");
        assert_eq!(state.broken_delays(), [""; 0]);
    }

    fn any_command(&mut self) -> Command {
        let provider = name("p", self.random.u8(1..=3));
        let line = self.random.u8(1..=5);
        match self.random.u32(0..100) {
            0..=47 => Command::Grant(Box::new(self.any_grant(provider))),
            48..=61 => Command::Revoke { id: self.any_id() },
            62..=69 => {
                let by = SignedDuration::from_secs(self.random.i64(1..200));
                Command::Extend { id: self.any_id(), by }
            }
            70..=79 => Command::StartSession(self.any_line(line)),
            80 => Command::AddSession(self.any_line(line)),
            81 | 82 => Command::StopSession { name: name("s", line) },
            83 => Command::RemoveSession { name: name("s", line) },
            84 | 85 => Command::PutSegment(self.any_segment()),
            86 => Command::RemoveSegment { name: name("g", self.random.u8(1..=2)) },
            87 | 88 => Command::AddProvider(NewProvider {
                name: provider,
                kind: if self.random.bool() { ProviderKind::Application } else { ProviderKind::Network },
                networks: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
                contract: self.any_contract(),
            }),
            89 => Command::RemoveProvider { name: provider },
            90 | 91 => {
                Command::AddApplication { provider, name: name("app", 1), contract: self.any_contract() }
            }
            92 => Command::RemoveApplication { provider, name: name("app", 1) },
            93 => Command::ChangeContract {
                provider,
                application: self.random.bool().then(|| name("app", 1)),
                contract: self.any_contract(),
                was: None,
            },
            94 => Command::PutProfile(self.any_profile()),
            95 => Command::RemoveProfile { name: name("gold", 1) },
            _ => Command::Expire,
        }
    }

    /// One that is there, if any is, or one that may have been.
    fn any_id(&mut self) -> AllocationId {
        let count = self.model.allocations.len();
        if count == 0 || self.one_in(8) {
            return AllocationId(self.random.u64(1..5_000));
        }
        let place = self.random.usize(0..count);
        *self.model.allocations.keys().nth(place).expect("there are so many")
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.random.usize(0..values.len())]
    }

    /// One of the rates, or none.
    fn maybe(&mut self, share: f64, rates: &[&str]) -> Option<BitsPerSecond> {
        (self.random.f64() < share).then(|| self.one_of(rates).parse().unwrap())
    }

    fn any_grant(&mut self, provider: Name) -> GrantRequest {
        let (host, port) = (4 * self.random.u8(1..=5), self.random.u16(1..=60));
        let flows = match self.random.u8(0..8) {
            0 => format!("between 10.0.0.{host} and 198.51.100.0/24:{port} tcp"),
            1 => format!("up from 10.0.0.{host}/30 to :{port}"),
            2 => format!("down from 2001:db8:ffff::/48 to 2001:db8:{}::/48 dscp {port}", host / 4),
            3 => format!("down from 198.51.100.{port}"),
            _ => format!("down udp from :{port} to 10.0.0.{host}"),
        };
        let selectors = selector::parse_flows(&flows).unwrap();
        let covers = |direction| selectors.iter().any(|selector| selector.covers(direction));
        let [up, down] = crate::domain::Direction::BOTH.map(covers);
        let rates = ["1kbit", "30kbit", "700kbit", "3mbit", "8mbit"];
        let directed = |town: &mut Self, share: f64, rates: &[&str]| Directed {
            up: town.maybe(share, rates).filter(|_| up),
            down: town.maybe(share, rates).filter(|_| down),
        };
        let level = LevelRequest {
            guaranteed: directed(self, 0.7, &rates),
            least: if self.one_in(8) {
                directed(self, 0.5, &["1kbit", "500kbit"])
            } else {
                Directed::default()
            },
            maximum: directed(self, 0.3, &["8mbit", "20mbit", "30mbit"]),
            burst: Directed { up: None, down: (down && self.one_in(8)).then_some(ByteCount(20_000)) },
            priority: Some(self.random.u8(0..=7)),
            delay_us: self.one_in(8).then(|| self.one_of(&[15_000, 40_000, 400_000])),
            jitter_us: self.one_in(10).then(|| self.one_of(&[12_000, 30_000])),
            enforcement: self.random.bool().then_some(Enforcement::Police),
            ..LevelRequest::default()
        };
        GrantRequest {
            provider,
            application: self.one_in(4).then(|| name("app", 1)),
            selectors,
            profile: self.one_in(12).then(|| name("gold", 1)),
            level,
            precedence: self.random.u16(0..3),
            duration: (!self.one_in(4)).then(|| SignedDuration::from_secs(self.random.i64(1..400))),
        }
    }

    /// A line whose addresses are its own, or another's.
    fn any_line(&mut self, number: u8) -> NewSession {
        let speeds = [("20mbit", "5mbit"), ("8mbit", "2mbit"), ("30mbit", "30mbit"), ("640kbit", "64kbit")];
        let (down, up) = self.one_of(&speeds);
        let place = if self.one_in(6) { self.random.u8(1..=6) } else { number };
        let segments = [name("g", 1), name("g", 2)].into_iter().filter(|_| self.random.bool()).collect();
        NewSession {
            name: name("s", number),
            addresses: vec![
                format!("10.0.0.{}/30", 4 * place).parse().unwrap(),
                format!("2001:db8:{place}::/48").parse().unwrap(),
            ],
            rate: Directed { up: up.parse().unwrap(), down: down.parse().unwrap() },
            link_layer: if self.one_in(4) { LinkLayer::Atm } else { LinkLayer::Ethernet },
            overhead: None,
            delay_us: if self.one_in(4) { 5_000 } else { 0 },
            loss_ppm: 0,
            segments,
            bras: None,
            source: self.one_in(3).then(|| name("radius", 1)),
        }
    }

    fn any_segment(&mut self) -> Segment {
        let capacity = Directed {
            up: self.one_of(&["9mbit", "4mbit"]).parse().unwrap(),
            down: self.one_of(&["25mbit", "12mbit"]).parse().unwrap(),
        };
        let rest = Directed { up: self.maybe(0.3, &["700kbit"]), down: self.maybe(0.3, &["700kbit"]) };
        Segment { name: name("g", self.random.u8(1..=2)), capacity, rest }
    }

    fn any_contract(&mut self) -> Contract {
        Contract {
            guaranteed: Directed {
                up: self.maybe(0.3, &["2mbit"]),
                down: self.maybe(0.4, &["10mbit", "20mbit"]),
            },
            maximum: Directed { up: None, down: self.maybe(0.2, &["20mbit", "90mbit"]) },
            best_priority: self.one_of(&[0, 0, 0, 2]),
            profiles: self.one_in(20).then(BTreeSet::new),
            allocations: self.one_in(4).then(|| self.random.u32(5..30)),
        }
    }

    fn any_profile(&mut self) -> Profile {
        let guaranteed = Directed { up: None, down: Some(self.one_of(&["1mbit", "2mbit"]).parse().unwrap()) };
        Profile {
            name: name("gold", 1),
            level: Level { guaranteed, priority: 1, ..Level::default() },
            status: self.one_of(&[ProfileStatus::Active, ProfileStatus::Active, ProfileStatus::Deprecated]),
            duration: DurationRange {
                shortest: None,
                longest: self.random.bool().then_some(SignedDuration::from_mins(10)),
            },
        }
    }
}

fn name(text: &str, number: u8) -> Name {
    format!("{text}{number}").parse().unwrap()
}
