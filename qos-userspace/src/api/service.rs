//! The service: state, store and gateway, changed together or not at all.
//!
//! A command is decided ([`manager::decide`]), applied to the state and carried into the kernel. All that
//! were asked for meanwhile go the same way, and are then committed to the store in one transaction; nobody
//! is answered before that (docs/adr/0022). Where the kernel refuses a command, or the store all of them, the
//! inverse goes back, so that store, state and kernel agree again. Everything here blocks and knows nothing
//! of HTTP; [`super::worker`] runs it on a thread of its own, one thing at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use tokio::sync::mpsc;
use tracing::{debug, error, info, warn};

use super::types::{Counted, Status};
use crate::config::Config;
use crate::domain::subscriber::{Event, Report};
use crate::domain::{Allocation, Direction, Name, Subscriber};
use crate::gateway::GatewayConfig;
use crate::manager::confine::Own;
use crate::manager::record::{Actor, Record, RecordQuery, Verdict, records};
use crate::manager::report::{Explanation, Statistics};
use crate::manager::subscriber::{self, Effect, Followed, SubscriberQuery, Taken, Told};
use crate::manager::{self, Change, Command, Decision, Gateway, Refusal, State};
use crate::source::SourcesStatus;
use crate::store::{Store, StoreError};

/// Ended allocations among which one that is asked for by number is looked for.
pub(super) const HISTORY_SEARCHED: usize = 1_000;
/// Time between two readings of the programs' debugging while somebody listens.
const TRACE_INTERVAL: Duration = Duration::from_millis(100);
/// Lines that wait for a slow listener; what comes on top is lost.
const TRACE_LINES: usize = 4_096;
/// Time for which a record of what changed nothing waits for a change that it can be written with.
const RECORDS_INTERVAL: Duration = Duration::from_secs(1);
/// Records that wait at most; the oldest go first where the store does not take any.
const MOST_RECORDS: usize = 10_000;
/// How long a line that is down is remembered, where it is not in service: a week.
const REMEMBERED: SignedDuration = SignedDuration::from_hours(7 * 24);
/// Time between two looks for lines that are to be forgotten.
const FORGET_INTERVAL: Duration = Duration::from_secs(600);
/// Lines that are forgotten at a time, so that nobody waits for long.
const MOST_FORGOTTEN: u32 = 1_000;
/// Wait after a sweep that failed, so that a full disk is not asked without pause.
const EXPIRY_RETRY: Duration = Duration::from_secs(1);

/// Why the service did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The request is refused; nothing was changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The store can't be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store did not take the change, nor those that were written with it; nothing was changed.
    #[error(transparent)]
    Unwritten(Arc<StoreError>),
    /// The kernel did not take it; store, state and kernel are as before.
    #[error("the kernel did not take the change, and nothing was changed: {}", chain(.0.as_ref()))]
    Kernel(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The kernel could not be read, repaired or cleaned.
    #[error("cannot {what}: {}", chain(.source.as_ref()))]
    Gateway {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// More was granted than the configuration has now; nothing was changed.
    #[error(
        "the configuration has less than what is granted: {}; what the kernel enforces is left as it is: \
         give back the capacity, or start with the old one and revoke",
        .0.join("; ")
    )]
    Overcommitted(Vec<String>),
    /// The file is no configuration; nothing was changed.
    #[error(transparent)]
    Config(crate::config::ConfigError),
    /// An interface can't be looked at; nothing was changed.
    #[error(transparent)]
    Interface(crate::gateway::link::LinkError),
    /// A new configuration differs in what can't be changed while the daemon runs; nothing was changed.
    #[error("{} can't change while qosd runs: restart it, which stops no enforcement", .0.join(", "))]
    NeedsRestart(Vec<String>),
    /// Everything was removed from the kernel, and the daemon is about to end.
    #[error("everything was removed from the kernel by `qos detach`, and qosd is stopping")]
    Detached,
}

/// An error and what caused it, in one line. Causes that the error already tells are left out.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn gateway_failed<E>(what: &'static str) -> impl FnOnce(E) -> ServiceError
where
    E: std::error::Error + Send + Sync + 'static,
{
    move |source| ServiceError::Gateway { what, source: Box::new(source) }
}

/// A command that is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// What is asked.
    pub command: Command,
    /// Who asks.
    pub actor: Actor,
    /// It is only decided.
    pub dry_run: bool,
}

/// As the daemon asks by itself.
impl From<Command> for Asked {
    fn from(command: Command) -> Self {
        Self { command, actor: Actor::Daemon, dry_run: false }
    }
}

/// What the API asks of the service, whatever store and gateway stand behind it.
pub trait Operations {
    /// What is known.
    fn state(&self) -> &State;

    /// Decides commands, one after the other, and carries them out; what comes of all of them is written in one
    /// transaction. Answers for each in their order.
    ///
    /// # Errors
    /// Of each: where it is refused, or the kernel does not take it. Of all that changed something: where
    /// the store does not take them.
    fn execute_all(&mut self, asked: &[Asked]) -> Vec<Result<Decision, ServiceError>>;

    /// The same with one.
    ///
    /// # Errors
    /// As of each in [`Operations::execute_all`].
    fn execute(&mut self, asked: Asked) -> Result<Decision, ServiceError> {
        self.execute_all(&[asked]).pop().unwrap_or(Err(ServiceError::Detached))
    }

    /// Takes what a source tells, one after the other, in one transaction. Lines in service follow. When it returns
    /// all of it survives a loss of power. Answers for each in their order.
    ///
    /// # Errors
    /// Where the store can't be read or does not take it; nothing was changed then.
    fn take_reports(&mut self, reports: &[Report], actor: &Actor) -> Result<Vec<Taken>, ServiceError>;

    /// Lines that sources tell of.
    ///
    /// # Errors
    /// Where the store can't be read.
    fn subscribers(&mut self, query: &SubscriberQuery) -> Result<Vec<Subscriber>, ServiceError>;

    /// Keeps a record of what was done that is no command.
    fn record(&mut self, record: Record);

    /// What is kept of decisions, newest first.
    ///
    /// # Errors
    /// Where the store can't be read, or does not take what is not written yet.
    fn records(&mut self, query: &RecordQuery) -> Result<Vec<Record>, ServiceError>;

    /// The allocations that ended last, newest first.
    ///
    /// # Errors
    /// Where the store can't be read.
    fn history(&mut self, limit: usize) -> Result<Vec<Allocation>, ServiceError>;

    /// The daemon and its gateway as they are. Of sources it knows nothing.
    ///
    /// # Errors
    /// After [`Operations::detach`].
    fn status(&self) -> Result<Status, ServiceError>;

    /// All counters at this moment.
    ///
    /// # Errors
    /// Where they can't be read.
    fn statistics(&mut self) -> Result<Statistics, ServiceError>;

    /// What the loaded program would do with a packet.
    ///
    /// # Errors
    /// Where the program can't be run on it.
    fn explain(
        &mut self,
        direction: Direction,
        packet: &[u8],
        layer3: bool,
    ) -> Result<Explanation, ServiceError>;

    /// Makes the kernel equal to the state, and says what was not.
    ///
    /// # Errors
    /// Where the kernel can't be read, or a repair is refused.
    fn reconcile(&mut self) -> Result<Vec<String>, ServiceError>;

    /// What the daemon works with now.
    fn config(&self) -> &Config;

    /// Takes a new configuration, `mtu` being the largest IP packet of its interfaces in bytes. Returns
    /// what differs, by key.
    ///
    /// # Errors
    /// Where it can't be taken. All stays as it was.
    fn reload(&mut self, config: Config, mtu: u32) -> Result<Vec<String>, ServiceError>;

    /// Makes the kernel equal to the state if an interface has come, gone or changed.
    fn look_at_interfaces(&mut self);

    /// Listens to the programs' debugging, which is on as long as somebody does.
    ///
    /// # Errors
    /// Where the kernel refuses.
    fn trace(&mut self) -> Result<mpsc::Receiver<String>, ServiceError>;

    /// Removes everything from the kernel. Nothing can be asked of the service afterwards.
    ///
    /// # Errors
    /// Where something can't be removed.
    fn detach(&mut self) -> Result<(), ServiceError>;
}

/// A command that is in the state and in the kernel, and has to be written.
struct CarriedOut {
    decision: Decision,
    /// What takes it back; none: nothing was changed.
    inverse: Option<Vec<Change>>,
    records: Vec<Record>,
}

/// State, store and gateway.
#[derive(Debug)]
pub struct Service<S, G> {
    config: Config,
    /// What time it is.
    clock: fn() -> Timestamp,
    started_at: Timestamp,
    state: State,
    store: S,
    /// None: it was detached.
    gateway: Option<G>,
    /// No sweep before, the last one having failed.
    sweep_not_before: Option<Instant>,
    reconcile_at: Instant,
    reconciled_at: Option<Timestamp>,
    reconcile_error: Option<String>,
    listeners: Vec<mpsc::Sender<String>>,
    /// Records that wait to be written with the next change.
    records: Vec<Record>,
    /// When those are written without one.
    records_at: Instant,
    forget_at: Instant,
}

impl<S: Store, G: Gateway<Config = GatewayConfig>> Service<S, G> {
    /// Loads the state, drops what expired meanwhile, starts the gateway on it and reconciles.
    /// `mtu` is the largest IP packet of the interfaces, in bytes.
    ///
    /// # Errors
    /// Where the store can't be read or written, or the kernel does not take the state.
    pub fn start(
        config: Config,
        mtu: u32,
        store: S,
        start_gateway: impl FnOnce(&State) -> Result<G, G::Error>,
    ) -> Result<Self, ServiceError> {
        Self::start_by(Timestamp::now, config, mtu, store, start_gateway)
    }

    /// The same by another clock.
    pub(super) fn start_by(
        clock: fn() -> Timestamp,
        config: Config,
        mtu: u32,
        mut store: S,
        start_gateway: impl FnOnce(&State) -> Result<G, G::Error>,
    ) -> Result<Self, ServiceError> {
        let begin = Instant::now();
        let mut state = store.load(config.network(mtu))?;
        debug!(took_ms = begin.elapsed().as_millis() as u64, "state read");
        let now = clock();
        let expired = manager::decide(&state, &Command::Expire, now)?;
        store.commit(&expired.changes, &records(&state, &Command::Expire, &expired, &Actor::Daemon, now))?;
        for change in &expired.changes {
            log(change);
            state.apply(change);
        }

        let overcommitted = state.overcommitted();
        if !overcommitted.is_empty() {
            return Err(ServiceError::Overcommitted(overcommitted));
        }
        for broken in state.broken_delays() {
            warn!("the configuration does not keep what was granted: {broken}");
        }
        for smaller in state.overcommitted_segments() {
            warn!("more is granted than there is: {smaller}");
        }
        let begin = Instant::now();
        let gateway = start_gateway(&state).map_err(gateway_failed("bring the kernel to the state"))?;
        debug!(took_ms = begin.elapsed().as_millis() as u64, "kernel brought to the state");
        let mut service = Self {
            config,
            clock,
            started_at: clock(),
            state,
            store,
            gateway: Some(gateway),
            sweep_not_before: None,
            reconcile_at: Instant::now(),
            reconciled_at: None,
            reconcile_error: None,
            listeners: Vec::new(),
            records: Vec::new(),
            records_at: Instant::now(),
            forget_at: Instant::now() + FORGET_INTERVAL,
        };
        let begin = Instant::now();
        service.reconcile()?;
        debug!(took_ms = begin.elapsed().as_millis() as u64, "kernel verified");
        Ok(service)
    }

    /// How long nothing has to be done unasked.
    pub(super) fn idle(&self) -> Duration {
        let mut idle = self.reconcile_at.min(self.forget_at).saturating_duration_since(Instant::now());
        if let Some(end) = self.state.next_end() {
            let until_end = Duration::try_from(end.duration_since((self.clock)())).unwrap_or_default();
            let blocked = self
                .sweep_not_before
                .map_or(Duration::ZERO, |instant| instant.saturating_duration_since(Instant::now()));
            idle = idle.min(until_end.max(blocked));
        }
        if !self.listeners.is_empty() {
            idle = idle.min(TRACE_INTERVAL);
        }
        if !self.records.is_empty() {
            idle = idle.min(self.records_at.saturating_duration_since(Instant::now()));
        }
        idle
    }

    /// Does what is due unasked: ends what expired, reconciles, passes debugging on.
    pub(super) fn tick(&mut self) {
        if self.gateway.is_none() {
            return;
        }
        self.sweep();
        if self.reconcile_at <= Instant::now() {
            // Kept for the status and logged there; the next one comes in its time.
            let _ = self.reconcile();
        }
        if self.forget_at <= Instant::now() {
            self.forget();
        }
        self.pass_trace_on();
        if !self.records.is_empty() && self.records_at <= Instant::now() {
            self.write_records();
        }
    }

    fn forget(&mut self) {
        let before = (self.clock)().checked_sub(REMEMBERED).unwrap_or(Timestamp::MIN);
        let wait = match self.store.forget_subscribers(before, MOST_FORGOTTEN) {
            Ok(forgotten) if forgotten == MOST_FORGOTTEN as usize => RECORDS_INTERVAL,
            Ok(_) => FORGET_INTERVAL,
            Err(error) => {
                error!("cannot forget lines that have long been down, and will try again: {error}");
                FORGET_INTERVAL
            }
        };
        self.forget_at = Instant::now() + wait;
    }

    #[cfg(test)]
    pub(super) const fn store_mut(&mut self) -> &mut S {
        &mut self.store
    }

    /// Writes what waits to be written, before the thread ends.
    pub(super) fn close(&mut self) {
        self.write_records();
    }

    fn keep(&mut self, records: impl IntoIterator<Item = Record>) {
        if self.records.is_empty() {
            self.records_at = Instant::now() + RECORDS_INTERVAL;
        }
        self.records.extend(records);
        let over = self.records.len().saturating_sub(MOST_RECORDS);
        self.records.drain(..over);
    }

    fn write_records(&mut self) {
        if let Err(error) = self.try_write_records() {
            error!("cannot write the history of decisions, and will try again: {error}");
            self.records_at = Instant::now() + RECORDS_INTERVAL;
        }
    }

    fn try_write_records(&mut self) -> Result<(), StoreError> {
        if !self.records.is_empty() {
            self.store.commit(&[], &self.records)?;
            self.records.clear();
        }
        Ok(())
    }

    fn sweep(&mut self) {
        let due = self.state.next_end().is_some_and(|end| end <= (self.clock)());
        let blocked = self.sweep_not_before.is_some_and(|instant| Instant::now() < instant);
        if !due || blocked {
            return;
        }
        self.sweep_not_before = None;
        match self.execute(Command::Expire.into()) {
            // The kernel forgot it by its own clock already.
            Ok(decision) if !decision.changes.is_empty() => {}
            Ok(_) => self.sweep_not_before = Some(Instant::now() + EXPIRY_RETRY),
            Err(error) => {
                error!("cannot write that allocations have expired: {error}");
                self.sweep_not_before = Some(Instant::now() + EXPIRY_RETRY);
            }
        }
    }

    fn pass_trace_on(&mut self) {
        let Some(gateway) = &mut self.gateway else { return };
        if self.listeners.is_empty() {
            return;
        }
        for line in gateway.traced() {
            for listener in &self.listeners {
                // A listener that does not keep up loses lines rather than holding the service up.
                let _ = listener.try_send(line.clone());
            }
        }
        self.listeners.retain(|listener| !listener.is_closed());
        if self.listeners.is_empty() {
            info!("trace off: the last listener left");
            if let Err(error) = gateway.trace(false) {
                error!("cannot turn the programs' debugging off: {error}");
            }
        }
    }

    /// Applies committed changes to what is kept in memory.
    fn remember(&mut self, changes: &[Change]) {
        for change in changes {
            self.state.apply(change);
        }
    }

    /// Decides a command and carries it out but for the store. What changes nothing is kept for the history.
    fn carry_out(&mut self, asked: &Asked, now: Timestamp) -> Result<CarriedOut, ServiceError> {
        let result = self.try_carry_out(asked, now);
        if let Err(error) = &result
            && !asked.dry_run
        {
            let record = Record::of_command(&self.state, &asked.command, &asked.actor, now);
            let (verdict, code) = match error {
                ServiceError::Refused(refusal) => (Verdict::Refused, Some(refusal.code)),
                _ => (Verdict::Failed, None),
            };
            self.keep([record.without_effect(verdict, code, error.to_string())]);
        }
        let Some(own) = Own::of(&asked.actor) else { return result };
        match result {
            Ok(mut done) => {
                for warning in &mut done.decision.warnings {
                    *warning = own.told(&self.state, warning);
                }
                Ok(done)
            }
            Err(ServiceError::Refused(refusal)) => Err(own.told_refusal(&self.state, refusal).into()),
            Err(error) => Err(error),
        }
    }

    /// Decides a command. A grant on a line that is known, and not in service, brings it there.
    fn decide(&mut self, command: &Command, now: Timestamp) -> Result<Decision, ServiceError> {
        if let Command::Grant(request) = command
            && let Some(prefix) = subscriber::unserved(&self.state, &request.selectors)
            && let [known] = &self.store.subscribers_within(&prefix)?[..]
            && known.facts.addresses.iter().any(|address| address.contains(&prefix))
        {
            return Ok(subscriber::grant_on(&mut self.state, request, known, now)?);
        }
        Ok(manager::decide(&self.state, command, now)?)
    }

    /// The line that has to leave service before what is asked brings another there; none: there is room.
    fn to_make_room_for(&self, asked: &Asked) -> Option<Name> {
        let Command::Grant(request) = &asked.command else { return None };
        if asked.dry_run || subscriber::unserved(&self.state, &request.selectors).is_none() {
            return None;
        }
        subscriber::idle_line(&self.state).cloned()
    }

    fn try_carry_out(&mut self, asked: &Asked, now: Timestamp) -> Result<CarriedOut, ServiceError> {
        if let Some(own) = Own::of(&asked.actor) {
            own.may_ask(&self.state, &asked.command)?;
        }
        let decision = self.decide(&asked.command, now)?;
        let gateway = self.gateway.as_ref().ok_or(ServiceError::Detached)?;
        if asked.dry_run
            && let Some(refusal) = gateway.would_refuse(&decision.changes)
        {
            return Err(refusal.into());
        }
        if asked.dry_run || decision.changes.is_empty() {
            return Ok(CarriedOut { decision, inverse: None, records: Vec::new() });
        }
        let records = records(&self.state, &asked.command, &decision, &asked.actor, now);
        let inverse = self.state.inverse(&decision.changes);
        self.remember(&decision.changes);
        let gateway = self.gateway.as_mut().ok_or(ServiceError::Detached)?;
        let start = Instant::now();
        if let Err(refused) = gateway.apply(&self.state, &decision.changes, &inverse) {
            self.remember(&inverse);
            let refusal = G::refusal(&refused);
            return Err(refusal.map_or_else(|| ServiceError::Kernel(Box::new(refused)), ServiceError::from));
        }
        debug!(took_us = start.elapsed().as_micros() as u64, "in the kernel");
        Ok(CarriedOut { decision, inverse: Some(inverse), records })
    }

    /// Writes what a report changes, to be committed, and finds what lines in service have to follow.
    fn take_report(
        &mut self,
        report: &Report,
        actor: &Actor,
        now: Timestamp,
    ) -> Result<Followed, StoreError> {
        // A clock that is ahead must not make what comes later look old.
        let (source, at) = (report.source.as_ref(), report.at.min(now));
        let mut written = Vec::new();
        match &report.event {
            Event::Up { line, key, facts } => {
                let known = self.store.subscriber(line)?;
                let mut holders = BTreeMap::new();
                for address in &facts.addresses {
                    let found = self.store.subscribers_within(address)?;
                    holders.extend(found.into_iter().map(|holder| (holder.line.clone(), holder)));
                }
                holders.remove(line);
                let holders: Vec<_> = holders.into_values().collect();
                let told = Told { source, at, line, key: key.as_deref() };
                match subscriber::up(&self.state.network, known.as_ref(), &holders, told, facts) {
                    Ok(Effect::Write(lines)) => written = lines,
                    Ok(Effect::SignOfLife) => {
                        let known = known.iter().next();
                        let follow = |known| subscriber::follow_sign_of_life(&self.state, known);
                        return Ok(known.map_or(Followed::NOTHING, follow));
                    }
                    Ok(Effect::Nothing) => {}
                    Err(refusal) => {
                        let record =
                            Record { session: Some(line.clone()), ..Record::new(now, actor, "report") };
                        let (verdict, code) = (Verdict::Refused, Some(refusal.code));
                        self.keep([record.without_effect(verdict, code, refusal.to_string())]);
                        return Ok(Followed::refused(&refusal));
                    }
                }
            }
            Event::Down { line, key } => {
                let known = self.store.subscriber(line)?;
                let told = Told { source, at, line, key: key.as_deref() };
                if let Effect::Write(lines) = subscriber::down(known.as_ref(), told) {
                    written = lines;
                }
            }
            Event::BrasDown { bras } => {
                for known in self.store.subscribers_at(bras, source)? {
                    if let Effect::Write(lines) = subscriber::bras_down(&known, at) {
                        written.extend(lines);
                    }
                }
            }
        }
        // Those that lost an address let go of it first.
        for line in written.iter().rev() {
            self.store.put_subscriber(line)?;
        }
        Ok(subscriber::follow(&self.state, &written))
    }

    /// Takes changes back that are in the state and in the kernel, and could not be written.
    fn take_back(&mut self, changes: &[Change], inverse: &[Change]) {
        self.remember(inverse);
        let Some(gateway) = &mut self.gateway else { return };
        if let Err(error) = gateway.apply(&self.state, inverse, changes) {
            error!(
                "the kernel did not take a change back that could not be written, and is tried again: {error}"
            );
            self.reconcile_at = Instant::now();
        }
    }
}

impl<S: Store, G: Gateway<Config = GatewayConfig>> Operations for Service<S, G> {
    fn state(&self) -> &State {
        &self.state
    }

    fn execute_all(&mut self, asked: &[Asked]) -> Vec<Result<Decision, ServiceError>> {
        let now = (self.clock)();
        let (mut carried_out, mut is_asked) = (Vec::new(), Vec::new());
        for asked in asked {
            if let Some(idle) = self.to_make_room_for(asked) {
                carried_out.push(self.carry_out(&Command::RemoveSession { name: idle }.into(), now));
                is_asked.push(false);
            }
            carried_out.push(self.carry_out(asked, now));
            is_asked.push(true);
        }
        let answered = |all: Vec<Result<CarriedOut, ServiceError>>| {
            let asked = all.into_iter().zip(is_asked).filter(|(_, is_asked)| *is_asked);
            asked.map(|(answer, _)| answer.map(|done| done.decision)).collect()
        };
        let done = || carried_out.iter().flatten().filter_map(|done| Some((done, done.inverse.as_ref()?)));
        let changes: Vec<Change> = done().flat_map(|(done, _)| &done.decision.changes).cloned().collect();
        if changes.is_empty() {
            return answered(carried_out);
        }
        let waiting = self.records.len();
        self.records.extend(done().flat_map(|(done, _)| &done.records).cloned());
        let Err(error) = self.store.commit(&changes, &self.records) else {
            self.records.clear();
            changes.iter().for_each(log);
            return answered(carried_out);
        };
        for (done, inverse) in done().collect::<Vec<_>>().into_iter().rev() {
            self.take_back(&done.decision.changes, inverse);
        }
        let unwritten = self.records.split_off(waiting);
        let commands = unwritten.into_iter().filter(|record| record.asked.is_some());
        self.keep(commands.map(|record| record.without_effect(Verdict::Failed, None, error.to_string())));
        let error = Arc::new(error);
        let answers = carried_out.into_iter().map(|answer| match answer {
            Ok(done) if done.inverse.is_some() => Err(ServiceError::Unwritten(Arc::clone(&error))),
            answer => answer,
        });
        answered(answers.collect())
    }

    fn take_reports(&mut self, reports: &[Report], actor: &Actor) -> Result<Vec<Taken>, ServiceError> {
        let now = (self.clock)();
        let taken = reports.iter().map(|report| self.take_report(report, actor, now)).collect();
        let taken: Result<Vec<Followed>, StoreError> = taken;
        let taken = taken.inspect_err(|_| self.store.roll_back())?;
        let commands = taken.iter().flat_map(|followed| &followed.commands);
        let asked: Vec<Asked> = commands
            .map(|command| Asked { command: command.clone(), actor: actor.clone(), dry_run: false })
            .collect();
        let mut answers = self.execute_all(&asked);
        if let Some(at) = answers.iter().position(|answer| matches!(answer, Err(ServiceError::Unwritten(_))))
        {
            return Err(answers.swap_remove(at).expect_err("it is one"));
        }
        // Where no line in service had to follow.
        self.store.commit(&[], &[])?;
        let mut answers = answers.into_iter();
        let told = taken.into_iter().map(|followed| {
            let Followed { mut taken, commands } = followed;
            let own = answers.by_ref().take(commands.len()).flat_map(|answer| match answer {
                Ok(decision) => decision.warnings,
                Err(error) => vec![format!("in service it stays as it was: {error}")],
            });
            // Those of a sign of life are taken too, for they are no other report's.
            let own: Vec<String> = own.collect();
            if let Taken::Changed(warnings) = &mut taken {
                warnings.extend(own);
            }
            taken
        });
        Ok(told.collect())
    }

    fn subscribers(&mut self, query: &SubscriberQuery) -> Result<Vec<Subscriber>, ServiceError> {
        Ok(self.store.subscribers(query)?)
    }

    fn record(&mut self, record: Record) {
        self.keep([record]);
    }

    fn records(&mut self, query: &RecordQuery) -> Result<Vec<Record>, ServiceError> {
        self.try_write_records()?;
        Ok(self.store.records(query)?)
    }

    fn history(&mut self, limit: usize) -> Result<Vec<Allocation>, ServiceError> {
        Ok(self.store.history(limit)?)
    }

    fn status(&self) -> Result<Status, ServiceError> {
        let gateway = self.gateway.as_ref().ok_or(ServiceError::Detached)?.status();
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started_at: self.started_at,
            state_dir: self.config.state_dir.clone(),
            bpffs_dir: self.config.gateway.bpffs_dir.clone(),
            line_side: self.config.line_side,
            link: self.state.network.link,
            require_session: self.config.require_session,
            counted: Counted {
                providers: self.state.providers.len(),
                applications: self.state.applications.len(),
                sessions: self.state.sessions.len(),
                profiles: self.state.profiles.len(),
                allocations: self.state.allocations.len(),
            },
            reconciled_at: self.reconciled_at,
            reconcile_error: self.reconcile_error.clone(),
            gateway,
            sources: SourcesStatus::default(),
        })
    }

    fn statistics(&mut self) -> Result<Statistics, ServiceError> {
        let gateway = self.gateway.as_mut().ok_or(ServiceError::Detached)?;
        let begin = Instant::now();
        let result = gateway.statistics(&self.state).map_err(gateway_failed("read the counters"));
        debug!(took_ms = begin.elapsed().as_secs_f64() * 1e3, "counters read");
        result
    }

    fn explain(
        &mut self,
        direction: Direction,
        packet: &[u8],
        layer3: bool,
    ) -> Result<Explanation, ServiceError> {
        let gateway = self.gateway.as_mut().ok_or(ServiceError::Detached)?;
        gateway.explain(direction, packet, layer3).map_err(gateway_failed("run the program on this packet"))
    }

    fn reconcile(&mut self) -> Result<Vec<String>, ServiceError> {
        let gateway = self.gateway.as_mut().ok_or(ServiceError::Detached)?;
        let result = gateway.reconcile(&self.state).map_err(gateway_failed("bring the kernel to the state"));
        self.reconcile_at = Instant::now() + self.config.reconcile_interval;
        match &result {
            Ok(_) => {
                self.reconciled_at = Some((self.clock)());
                self.reconcile_error = None;
            }
            Err(failed) => {
                error!("{failed}");
                self.reconcile_error = Some(failed.to_string());
            }
        }
        result
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn reload(&mut self, config: Config, mtu: u32) -> Result<Vec<String>, ServiceError> {
        let gateway = self.gateway.as_mut().ok_or(ServiceError::Detached)?;
        let differences = self.config.differences(&config);
        if !differences.restart.is_empty() {
            return Err(ServiceError::NeedsRestart(differences.restart));
        }
        let before = self.state.set_network(config.network(mtu));
        let overcommitted = self.state.overcommitted();
        if !overcommitted.is_empty() {
            self.state.set_network(before);
            return Err(ServiceError::Overcommitted(overcommitted));
        }
        if let Err(refused) = gateway.reconfigure(&config.gateway, &self.state) {
            self.state.set_network(before);
            if let Err(error) = gateway.reconfigure(&self.config.gateway, &self.state) {
                error!("cannot go back to the configuration as it was, and will try again: {error}");
            }
            self.reconcile_at = Instant::now();
            return Err(ServiceError::Kernel(Box::new(refused)));
        }
        for broken in self.state.broken_delays() {
            warn!("the configuration does not keep what was granted: {broken}");
        }
        self.config = config;
        // Repairs are kept for the status, and logged.
        let _ = self.reconcile();
        Ok(differences.live)
    }

    fn look_at_interfaces(&mut self) {
        let changed = match self.gateway.as_ref().map(G::interfaces_changed) {
            Some(Ok(changed)) => changed,
            Some(Err(error)) => {
                warn!("cannot look at the interfaces: {error}");
                false
            }
            None => false,
        };
        if changed {
            // Kept for the status and logged there.
            let _ = self.reconcile();
        }
    }

    fn trace(&mut self) -> Result<mpsc::Receiver<String>, ServiceError> {
        let gateway = self.gateway.as_mut().ok_or(ServiceError::Detached)?;
        if self.listeners.is_empty() {
            gateway.trace(true).map_err(gateway_failed("turn the programs' debugging on"))?;
            info!("trace on");
        }
        let (sender, receiver) = mpsc::channel(TRACE_LINES);
        self.listeners.push(sender);
        Ok(receiver)
    }

    fn detach(&mut self) -> Result<(), ServiceError> {
        let gateway = self.gateway.take().ok_or(ServiceError::Detached)?;
        self.listeners.clear();
        gateway.detach().map_err(gateway_failed("remove everything from the kernel"))?;
        warn!("detached: nothing is enforced");
        Ok(())
    }
}

fn log(change: &Change) {
    match change {
        Change::PutProvider(provider) => info!(provider = %provider.name, "provider written"),
        Change::DeleteProvider(name) => info!(provider = %name, "provider removed"),
        Change::PutApplication(application) => {
            info!(provider = %application.provider, application = %application.name, "application written");
        }
        Change::DeleteApplication(provider, name) => {
            info!(%provider, application = %name, "application removed");
        }
        Change::PutSession(session) => info!(session = %session.name, "session written"),
        Change::DeleteSession(name) => info!(session = %name, "session removed"),
        Change::PutSegment(segment) => info!(segment = %segment.name, "segment written"),
        Change::DeleteSegment(name) => info!(segment = %name, "segment removed"),
        Change::PutProfile(profile) => info!(profile = %profile.name, "profile written"),
        Change::DeleteProfile(name) => info!(profile = %name, "profile removed"),
        Change::PutKey(key) => info!(key = %key.id, provider = %key.provider, "API key added"),
        Change::DeleteKey(id) => info!(key = %id, "API key removed"),
        Change::PutAllocation(allocation) => {
            let until = allocation.expires_at.map(tracing::field::display);
            info!(id = %allocation.id, provider = %allocation.provider, until, "granted");
            debug!(?allocation);
        }
        Change::EndAllocation(allocation) => {
            let reason = allocation.reason.as_deref().unwrap_or("no reason given");
            info!(id = %allocation.id, provider = %allocation.provider, reason, "ended");
        }
    }
}
