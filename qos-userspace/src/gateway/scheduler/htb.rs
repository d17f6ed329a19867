//! Egress scheduling by the kernel's HTB classes, over routing netlink.
//!
//! What the tree comes to is in `class`, how one tree becomes another in `change`, how that is
//! written in `message`. Here is who keeps whom informed: what the kernel is believed to have, what
//! is sent, what is undone, and what a fresh look finds.
//!
//! **Revoking.** The class of an allocation that is no longer declared is deleted at once when
//! nothing waits in it. Otherwise it loses its guarantee at once, so that another may have it, and is
//! deleted by a later `apply` or `repair`, when it is empty or 250 ms have passed; what waits
//! then is lost. The caller has stopped new traffic before.
//!
//! **Failure.** The kernel carries out a batch to its end whatever fails in it, so each answer counts
//! by itself, and what succeeded is taken back in reverse order. A change that fails because the
//! kernel has something else than it is believed to have is tried once more from what it has.

mod change;
mod class;
mod filter;
mod message;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;

use self::change::{Change, changes};
use self::class::{Class, DEFAULT, Discipline, Id, Kind, Queue, ROOT};
use self::message::{Found, Qdisc};
use super::{ClassSlot, ClassStatistics, Drift, LineSlot, Part, Scheduler, SchedulerError, Tree};
use crate::gateway::link::{Framing, Link};
use crate::gateway::netlink::{Answer, BATCH, NetlinkError, Refusal, RouteSocket};

/// After so long a class that is to go is deleted with what waits in it.
const DRAIN: Duration = Duration::from_millis(250);

/// Former classes of lines that one repair deletes: each may take a millisecond, in which no grant is
/// carried out, and there may be thousands.
const AT_LEISURE: usize = 50;

/// How long one send may take: the packets of its CPU wait for it.
const SEND: Duration = Duration::from_millis(2);

/// Looks that a repair takes: deleting a class may show that its parent lacks a queue.
const REPAIR_PASSES: usize = 3;

/// Ethernet header, which HTB counts where the interface has one.
const ETHERNET_HEADER: u16 = 14;

/// Parent of a root qdisc (`TC_H_ROOT`).
const ROOT_PARENT: u32 = u32::MAX;

/// Which discipline the leaves get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LeafQueue {
    /// `fq_codel` where the kernel has it, else `bfifo`.
    #[default]
    Best,
    /// `fq_codel`, or an error.
    FqCodel,
    /// `bfifo`, which every kernel has.
    Fifo,
}

/// HTB on one interface.
///
/// Of the 8 priorities of allocations the last two, 6 and 7, are served alike: HTB has 8, and one of
/// them is the rest's. What a tree needs beyond the guarantees is what each line's rest is sure of.
#[derive(Debug)]
pub struct Htb {
    interface: String,
    index: u32,
    /// Bytes of link-layer header in front of the IP packet.
    header: u16,
    socket: RouteSocket,
    leaves: LeafQueue,
    /// The tree that was declared last; none: no tree yet.
    state: Option<State>,
    changes_sent: u64,
    /// What making, removing or equipping a class took the kernel the last time.
    step: Duration,
}

#[derive(Clone, Debug)]
struct State {
    kind: Kind,
    /// Classes that the kernel is believed to have.
    classes: BTreeMap<Id, Class>,
    /// Those among them that are to go, and by when.
    draining: BTreeMap<Id, Instant>,
    /// Whether the root has the filter that groups need.
    filter: bool,
}

/// Whose queueing discipline is the root of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootOwner {
    /// The kernel's own default, of that kind.
    Default(String),
    /// Ours.
    Ours,
    /// Somebody else's.
    Foreign {
        /// Its kind.
        kind: String,
        /// Its handle as `tc` prints it.
        handle: String,
    },
}

/// What a look at the kernel found.
struct Observed {
    root: Root,
    classes: Vec<Class>,
    filter: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Root {
    /// The kernel's default.
    Absent,
    Ours,
    /// Under our handle but with another default class, which HTB can't change.
    Unusable,
}

/// A change that failed, after `done` were made.
struct Failure {
    error: SchedulerError,
    done: Vec<Change>,
}

impl Htb {
    /// Prepares HTB for an interface of the calling thread's network namespace. Touches nothing.
    ///
    /// # Errors
    /// Where no netlink socket can be had.
    pub fn new(link: &Link, leaves: LeafQueue) -> Result<Self, SchedulerError> {
        Ok(Self {
            interface: link.name.clone(),
            index: link.index,
            header: if link.framing == Framing::Ethernet { ETHERNET_HEADER } else { 0 },
            socket: RouteSocket::open()?,
            leaves,
            state: None,
            changes_sent: 0,
            step: SEND,
        })
    }

    /// Requests so far that were to change something in the kernel.
    #[must_use]
    pub fn changes_sent(&self) -> u64 {
        self.changes_sent
    }

    /// Looks whose root the interface has.
    ///
    /// # Errors
    /// Where the kernel can't be asked.
    pub fn root(&self) -> Result<RootOwner, SchedulerError> {
        let qdiscs = self.qdiscs()?;
        let root = qdiscs.into_iter().find(|qdisc| qdisc.parent == ROOT_PARENT);
        Ok(match root {
            None => RootOwner::Default("none".to_owned()),
            Some(qdisc) if qdisc.handle == 0 => RootOwner::Default(qdisc.kind),
            Some(qdisc) if self.is_ours(&qdisc) => RootOwner::Ours,
            Some(qdisc) => {
                RootOwner::Foreign { handle: format!("{:x}:", qdisc.handle >> 16), kind: qdisc.kind }
            }
        })
    }

    /// Lines that the interface has divided; none where its root is not ours.
    ///
    /// # Errors
    /// Where the kernel can't be asked.
    pub fn divided(&self) -> Result<BTreeSet<LineSlot>, SchedulerError> {
        match self.observe() {
            Ok(observed) => Ok(observed.classes.iter().filter_map(Class::divided).collect()),
            Err(SchedulerError::ForeignRoot { .. }) => Ok(BTreeSet::new()),
            Err(error) => Err(error),
        }
    }

    /// Classes that the kernel is believed to have.
    #[must_use]
    pub fn class_count(&self) -> usize {
        self.state.as_ref().map_or(0, |state| state.classes.len())
    }
}

impl Scheduler for Htb {
    fn apply(&mut self, tree: &Tree) -> Result<(), SchedulerError> {
        self.apply_only(tree, None)
    }

    fn apply_part(&mut self, tree: &Tree, part: &Part) -> Result<(), SchedulerError> {
        self.apply_only(tree, Some(part))
    }

    fn repair(&mut self) -> Result<Vec<Drift>, SchedulerError> {
        let Some(mut state) = self.state.take() else { return Ok(Vec::new()) };
        let mut drifts = Vec::new();
        let result = self.repair_state(&mut state, &mut drifts);
        self.state = Some(state);
        result.map(|()| drifts)
    }

    fn statistics(&self) -> Result<Vec<(ClassSlot, ClassStatistics)>, SchedulerError> {
        let Some(state) = &self.state else { return Ok(Vec::new()) };
        // HTB counts what a queue refuses, not what fq_codel drops later: its own count has both.
        let mut drops = HashMap::new();
        if state.kind == Kind::FqCodel {
            drops.extend(self.qdiscs()?.into_iter().map(|qdisc| (qdisc.parent, qdisc.drops)));
        }
        let groups: BTreeSet<u16> = state.classes.keys().map(|id| id.group).collect();
        let found = self.found_classes(groups)?;
        let mut statistics: Vec<_> = found
            .into_iter()
            .filter(|found| !state.draining.contains_key(&found.class.id))
            .filter_map(|Found { class, mut statistics }| {
                let slot = class.allocation()?;
                if let Some(drops) = drops.get(&class.id.handle()) {
                    statistics.drops = statistics.drops.max(*drops);
                }
                Some((slot, statistics))
            })
            .collect();
        statistics.sort_by_key(|(slot, _)| *slot);
        Ok(statistics)
    }

    fn detach(&mut self) -> Result<(), SchedulerError> {
        let found = match self.observe() {
            // Not ours to remove, and then nothing of ours is there.
            Err(SchedulerError::ForeignRoot { .. } | SchedulerError::NoSuchInterface { .. }) => Root::Absent,
            observed => observed?.root,
        };
        if found != Root::Absent {
            self.delete_root()?;
        }
        self.state = None;
        Ok(())
    }

    fn default_class(&self) -> u32 {
        Id::root(DEFAULT).handle()
    }

    /// The root's own number: its direct queue, which is served at once (`htb_classify`,
    /// net/sched/sch_htb.c).
    fn direct_class(&self) -> u32 {
        u32::from(ROOT) << 16
    }

    fn rest_class(&self, line: LineSlot, divided: bool) -> u32 {
        if divided { Id::rest(line).handle() } else { Id::undivided(line).handle() }
    }

    fn leaf_class(&self, slot: ClassSlot, line: Option<LineSlot>) -> u32 {
        Id::leaf(slot, line).handle()
    }
}

impl Htb {
    /// Makes the kernel's tree equal to `tree`, or `only` a part of it.
    fn apply_only(&mut self, tree: &Tree, only: Option<&Part>) -> Result<(), SchedulerError> {
        if let Some(mut state) = self.state.take() {
            let result =
                self.finish_draining(&mut state, false).and_then(|()| self.advance(tree, only, &mut state));
            let Err(error) = result else {
                self.state = Some(state);
                return Ok(());
            };
            let believed: Vec<Class> = state.classes.values().cloned().collect();
            self.state = Some(state);
            if !matches!(error, SchedulerError::Refused { .. }) || self.has(&believed)? {
                return Err(error);
            }
            tracing::warn!(interface = self.interface, %error, "the kernel's tree was changed by somebody else");
        }
        let state = self.establish(tree)?;
        self.state = Some(state);
        Ok(())
    }

    /// Goes from what the kernel is believed to have to `tree`, or to `only` a part of it.
    fn advance(&mut self, tree: &Tree, only: Option<&Part>, state: &mut State) -> Result<(), SchedulerError> {
        let wanted = self.classes(tree, state.kind, only)?;
        let from = match only {
            None => state.classes.values().cloned().collect(),
            Some(part) => state.part(part, &wanted),
        };
        self.transit(state, &from, wanted).map_err(|failure| self.undo(failure))
    }

    /// Goes from what the kernel really has to `tree`: the first time, or after it turned out to be
    /// something else than believed.
    fn establish(&mut self, tree: &Tree) -> Result<State, SchedulerError> {
        let observed = self.observe()?;
        let kind = self.kind(&observed);
        // Whether the kernel has fq_codel is known when it refuses the first.
        match self.establish_with(tree, kind, observed) {
            Err(SchedulerError::NoSuchDiscipline { kind: "fq_codel", .. })
                if self.leaves == LeafQueue::Best =>
            {
                tracing::info!(interface = self.interface, "the kernel has no fq_codel, leaves get bfifo");
                let observed = self.observe()?;
                self.establish_with(tree, Kind::Fifo, observed)
            }
            result => result,
        }
    }

    fn establish_with(
        &mut self,
        tree: &Tree,
        kind: Kind,
        observed: Observed,
    ) -> Result<State, SchedulerError> {
        let wanted = self.classes(tree, kind, None)?;
        let filter = observed.filter;
        let from = self.with_root(observed)?;
        let mut state =
            State { kind, classes: by_id(from.iter().cloned()), draining: BTreeMap::new(), filter };
        match self.transit(&mut state, &from, wanted) {
            Ok(()) => Ok(state),
            Err(failure) if from.is_empty() => {
                if let Err(error) = self.delete_root() {
                    tracing::warn!(interface = self.interface, %error, "the root could not be taken back");
                }
                Err(failure.error)
            }
            Err(failure) => Err(self.undo(failure)),
        }
    }

    /// Makes the root if it is not there. Returns the classes it has.
    fn with_root(&mut self, observed: Observed) -> Result<Vec<Class>, SchedulerError> {
        if observed.root == Root::Ours {
            return Ok(observed.classes);
        }
        if observed.root == Root::Unusable {
            self.delete_root()?;
        }
        self.change_root(
            "add root qdisc",
            RouteNetlinkMessage::NewQueueDiscipline(message::root(self.index)),
            NLM_F_CREATE | NLM_F_EXCL,
        )?;
        Ok(Vec::new())
    }

    fn delete_root(&mut self) -> Result<(), SchedulerError> {
        let message = RouteNetlinkMessage::DelQueueDiscipline(message::root_name(self.index));
        self.change_root("delete root qdisc", message, 0)
    }

    fn change_root(
        &mut self,
        action: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), SchedulerError> {
        let action = format!("{action} {ROOT:x}:");
        self.changes_sent += 1;
        let answers = self.socket.request([(message, flags)]).map_err(|error| self.error(&action, error))?;
        for answer in answers {
            answer.result.map_err(|refusal| self.refused(action.clone(), &refusal, Some("htb")))?;
        }
        Ok(())
    }

    /// Makes `wanted` of `from`, which is a part of `state` or all of it, except that classes with
    /// something in them only lose their guarantee.
    fn transit(&mut self, state: &mut State, from: &[Class], mut wanted: Vec<Class>) -> Result<(), Failure> {
        let failure = |error| Failure { error, done: Vec::new() };
        if !state.filter && wanted.iter().any(Class::is_group) {
            self.add_filter().map_err(failure)?;
            state.filter = true;
        }
        let mut draining = BTreeMap::new();
        let leaving = leaving(from, &wanted);
        if !leaving.is_empty() {
            let unknown: Vec<Id> =
                leaving.iter().map(|class| class.id).filter(|id| !state.draining.contains_key(id)).collect();
            let backlogs = self.backlogs(&unknown).map_err(failure)?;
            for class in leaving {
                let until = state.draining.get(&class.id).copied();
                // A line's traffic comes by its former class until the caller has told it of the other.
                let waits = class.undivided().is_some()
                    || backlogs.get(&class.id).is_some_and(|waiting| *waiting > 0);
                if until.is_some() || waits {
                    draining.insert(class.id, until.unwrap_or_else(|| Instant::now() + DRAIN));
                    wanted.push(class.without_guarantee());
                }
            }
            wanted.sort_by_key(|class| class.id);
        }
        self.carry_out(changes(from, &wanted))?;
        for class in from {
            state.classes.remove(&class.id);
            state.draining.remove(&class.id);
        }
        state.classes.extend(by_id(wanted));
        state.draining.extend(draining);
        Ok(())
    }

    /// Sends changes, a batch at a time, and stops behind the batch in which one fails.
    fn carry_out(&mut self, changes: Vec<Change>) -> Result<(), Failure> {
        let mut done = Vec::with_capacity(changes.len());
        let mut changes = changes.into_iter().peekable();
        while changes.peek().is_some() {
            let mut batch: Vec<Change> = Vec::new();
            let mut time = Duration::ZERO;
            while let Some(change) = changes.next_if(|_| batch.len() < BATCH && time < SEND) {
                if change.is_slow() {
                    time += self.step;
                }
                batch.push(change);
            }
            let slow = batch.iter().filter(|change| change.is_slow()).count();
            let requests = batch.iter().map(|change| self.request(change));
            let start = Instant::now();
            let answers = match self.socket.request(requests) {
                Ok(answers) => answers,
                Err(error) => {
                    let action = batch.first().map(Change::action).unwrap_or_default();
                    let error = self.error(&action, error);
                    return Err(Failure { error, done });
                }
            };
            if slow > 0 {
                self.step = start.elapsed() / slow as u32;
            }
            self.changes_sent += batch.len() as u64;
            let mut failed = None;
            for (change, Answer { result, .. }) in batch.into_iter().zip(answers) {
                match result {
                    Ok(()) => done.push(change),
                    Err(refusal) => {
                        failed.get_or_insert_with(|| {
                            self.refused(change.action(), &refusal, discipline(&change))
                        });
                    }
                }
            }
            if let Some(error) = failed {
                return Err(Failure { error, done });
            }
        }
        Ok(())
    }

    fn add_filter(&mut self) -> Result<(), SchedulerError> {
        let action = format!("add filter to {ROOT:x}:");
        let program = filter::load()?;
        let message = message::filter(self.index, program.as_raw_fd() as u32);
        let request = (RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE | NLM_F_EXCL);
        self.changes_sent += 1;
        let answers = self.socket.request([request]).map_err(|error| self.error(&action, error))?;
        for answer in answers {
            answer.result.map_err(|refusal| self.refused(action.clone(), &refusal, None))?;
        }
        Ok(())
    }

    fn undo(&mut self, failure: Failure) -> SchedulerError {
        let inverse: Vec<Change> = failure.done.into_iter().rev().flat_map(Change::inverse).collect();
        if let Err(second) = self.carry_out(inverse) {
            // The next call finds out what the kernel has.
            tracing::warn!(interface = self.interface, error = %second.error, "a change could not be taken back");
        }
        failure.error
    }

    fn request(&self, change: &Change) -> (RouteNetlinkMessage, u16) {
        let index = self.index;
        match change {
            Change::Add(class) => (
                RouteNetlinkMessage::NewTrafficClass(message::class(index, class)),
                NLM_F_CREATE | NLM_F_EXCL,
            ),
            Change::Alter { to, .. } => (RouteNetlinkMessage::NewTrafficClass(message::class(index, to)), 0),
            Change::Remove(class) => {
                (RouteNetlinkMessage::DelTrafficClass(message::class_name(index, class.id)), 0)
            }
            Change::Queue { id, from, to } => {
                let new = from.as_ref().is_none_or(|from| from.handle != to.handle);
                let message = message::queue(index, *id, to, new);
                (RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_REPLACE)
            }
            Change::Unqueue { id, from } => {
                (RouteNetlinkMessage::DelQueueDiscipline(message::queue_name(index, *id, from)), 0)
            }
        }
    }

    /// Deletes the classes that are to go and are empty or overdue, former ones of lines only at leisure and
    /// some at a time. One that can't be deleted is tried again the next time.
    fn finish_draining(&mut self, state: &mut State, leisure: bool) -> Result<(), SchedulerError> {
        let draining = state.draining.iter().map(|(id, until)| (*id, *until));
        let (mut former, mut due): (Vec<_>, Vec<_>) = draining.partition(|(id, _)| id.is_undivided());
        former.truncate(if leisure { AT_LEISURE } else { 0 });
        due.append(&mut former);
        if due.is_empty() {
            return Ok(());
        }
        let ids: Vec<Id> = due.iter().map(|(id, _)| *id).collect();
        let backlogs = self.backlogs(&ids)?;
        let now = Instant::now();
        let mut gone: HashSet<Id> = HashSet::new();
        for (id, until) in &due {
            match backlogs.get(id) {
                None => {
                    gone.insert(*id);
                }
                Some(waiting) if *waiting == 0 || *until <= now => {
                    let class = state.classes.get(id);
                    let removal = class.cloned().map(Change::Remove).into_iter().collect();
                    match self.carry_out(removal) {
                        Ok(()) => {
                            gone.insert(*id);
                        }
                        Err(failure) => {
                            tracing::warn!(interface = self.interface, error = %failure.error, "will be tried again");
                        }
                    }
                }
                Some(_) => {}
            }
        }
        for id in gone {
            state.draining.remove(&id);
            state.classes.remove(&id);
        }
        Ok(())
    }

    /// Bytes waiting in each of some classes; those that do not exist are left out.
    fn backlogs(&self, ids: &[Id]) -> Result<HashMap<Id, u64>, SchedulerError> {
        let action = "get class";
        let mut backlogs = HashMap::with_capacity(ids.len());
        for batch in ids.chunks(BATCH) {
            let requests = batch.iter().map(|id| {
                let message = message::class_name(self.index, *id);
                // Without ECHO, kernels before 6.8 tell it to the subscribers of the group only.
                (RouteNetlinkMessage::GetTrafficClass(message), NLM_F_ECHO)
            });
            let answers = self.socket.request(requests).map_err(|error| self.error(action, error))?;
            for (id, answer) in batch.iter().zip(answers) {
                match answer.result {
                    Ok(()) => {}
                    Err(refusal) if refusal.errno == libc::ENOENT => continue,
                    Err(refusal) => {
                        return Err(self.refused(format!("{action} {id}"), &refusal, None));
                    }
                }
                for payload in &answer.payloads {
                    let found = message::read_class(self.index, payload);
                    if let Some(found) = found.map_err(|error| self.error(action, error))? {
                        backlogs.insert(found.class.id, found.statistics.backlog);
                    }
                }
            }
        }
        Ok(backlogs)
    }

    /// Looks at root, classes and queues.
    fn observe(&self) -> Result<Observed, SchedulerError> {
        let qdiscs = self.qdiscs()?;
        let root = qdiscs.iter().find(|qdisc| qdisc.parent == ROOT_PARENT && qdisc.handle != 0);
        let root = match root {
            None => Root::Absent,
            Some(qdisc) if !self.is_ours(qdisc) => {
                return Err(SchedulerError::ForeignRoot {
                    interface: self.interface.clone(),
                    kind: qdisc.kind.clone(),
                    handle: format!("{:x}:", qdisc.handle >> 16),
                });
            }
            Some(qdisc) if qdisc.default_class == Some(u32::from(DEFAULT)) => Root::Ours,
            Some(_) => Root::Unusable,
        };
        if root != Root::Ours {
            return Ok(Observed { root, classes: Vec::new(), filter: false });
        }
        let groups: BTreeSet<u16> = qdiscs
            .iter()
            .filter(|qdisc| qdisc.discipline == Discipline::Group)
            .filter_map(|qdisc| Id::of_handle(qdisc.handle).map(|id| id.group))
            .collect();
        let filter = self.has_filter()?;
        let mut queues: HashMap<u32, Queue> = qdiscs
            .into_iter()
            .map(|qdisc| {
                (qdisc.parent, Queue { handle: (qdisc.handle >> 16) as u16, discipline: qdisc.discipline })
            })
            .collect();
        let mut classes: Vec<Class> = self
            .found_classes(groups)?
            .into_iter()
            .map(|Found { class, .. }| Class { queue: queues.remove(&class.id.handle()), ..class })
            .collect();
        classes.sort_by_key(|class| class.id);
        Ok(Observed { root, classes, filter })
    }

    fn is_ours(&self, root: &Qdisc) -> bool {
        root.kind == "htb" && root.handle == self.direct_class()
    }

    fn qdiscs(&self) -> Result<Vec<Qdisc>, SchedulerError> {
        let found = self.socket.qdiscs(self.index, message::read_qdisc);
        found.map_err(|error| self.error("list qdiscs", error))
    }

    /// The classes of some groups, the root's among them as group 0.
    fn found_classes(&self, groups: BTreeSet<u16>) -> Result<Vec<Found>, SchedulerError> {
        let mut classes = Vec::new();
        for group in groups {
            let message = RouteNetlinkMessage::GetTrafficClass(message::all_classes(self.index, group));
            let found = self.socket.dump(&message, Vec::new, |list, payload| {
                list.extend(message::read_class(self.index, payload)?);
                Ok(())
            });
            classes.append(&mut found.map_err(|error| self.error("list classes", error))?);
        }
        Ok(classes)
    }

    fn has_filter(&self) -> Result<bool, SchedulerError> {
        let message = RouteNetlinkMessage::GetTrafficFilter(message::all_filters(self.index));
        self.socket
            .dump(
                &message,
                || false,
                |found, payload| {
                    *found |= message::is_filter(self.index, payload)?;
                    Ok(())
                },
            )
            .map_err(|error| self.error("list filters", error))
    }

    /// Whether the kernel has exactly these classes.
    fn has(&self, classes: &[Class]) -> Result<bool, SchedulerError> {
        let observed = self.observe()?;
        Ok(observed.root == Root::Ours && changes(&observed.classes, classes).is_empty())
    }

    fn repair_state(&mut self, state: &mut State, drifts: &mut Vec<Drift>) -> Result<(), SchedulerError> {
        self.finish_draining(state, true)?;
        for _ in 0..REPAIR_PASSES {
            let observed = self.observe()?;
            let ours = observed.root == Root::Ours;
            if !ours {
                let what = match observed.root {
                    Root::Unusable => "had another default class",
                    Root::Absent | Root::Ours => "was missing",
                };
                let what =
                    format!("root qdisc {ROOT:x}: {what}, and its {} classes with it", state.classes.len());
                drifts.push(Drift { what });
            }
            let filter = observed.filter;
            let observed = self.with_root(observed)?;
            let grouped = state.classes.values().any(Class::is_group);
            if grouped && !filter {
                if ours && state.filter {
                    drifts.push(Drift { what: format!("the filter of {ROOT:x}: was missing") });
                }
                self.add_filter()?;
            }
            state.filter = filter || grouped;
            // A class that is to go and that somebody else deleted is no loss.
            let there: HashSet<Id> = observed.iter().map(|class| class.id).collect();
            state.classes.retain(|id, _| there.contains(id) || !state.draining.contains_key(id));
            state.draining.retain(|id, _| there.contains(id));
            let declared: Vec<Class> = state.classes.values().cloned().collect();
            let repairs = changes(&observed, &declared);
            if repairs.is_empty() {
                return Ok(());
            }
            if ours {
                drifts.extend(described(&repairs));
            }
            self.carry_out(repairs).map_err(|failure| failure.error)?;
        }
        Ok(())
    }

    fn classes(&self, tree: &Tree, kind: Kind, only: Option<&Part>) -> Result<Vec<Class>, SchedulerError> {
        class::classes(tree, self.header, kind, only)
            .map_err(|what| SchedulerError::Invalid { interface: self.interface.clone(), what })
    }

    /// The discipline for the leaves: of a tree that is taken over, the one it has.
    fn kind(&self, observed: &Observed) -> Kind {
        let default = observed.classes.iter().find(|class| class.id == Id::root(DEFAULT));
        let queue = default.and_then(|class| class.queue.as_ref());
        match (self.leaves, queue.map(|queue| &queue.discipline)) {
            (LeafQueue::Fifo, _) | (LeafQueue::Best, Some(Discipline::Fifo { .. })) => Kind::Fifo,
            (LeafQueue::FqCodel, _) | (LeafQueue::Best, _) => Kind::FqCodel,
        }
    }

    fn error(&self, action: &str, error: NetlinkError) -> SchedulerError {
        match error {
            NetlinkError::Socket(error) => SchedulerError::Socket(error),
            NetlinkError::Malformed(reason) => SchedulerError::Malformed {
                interface: self.interface.clone(),
                action: action.to_owned(),
                reason,
            },
            NetlinkError::Refused(refusal) => self.refused(action.to_owned(), &refusal, None),
        }
    }

    /// The error for a refusal; `kind` is the discipline that the request was to make.
    fn refused(&self, action: String, refusal: &Refusal, kind: Option<&'static str>) -> SchedulerError {
        let interface = self.interface.clone();
        // Linux 6.2 reworded it.
        let unknown = matches!(
            refusal.text.as_deref(),
            Some("Specified qdisc kind is unknown" | "Specified qdisc not found")
        );
        match (refusal.errno, kind) {
            (libc::ENODEV, _) => SchedulerError::NoSuchInterface { interface },
            (libc::ENOENT, Some(kind)) if unknown => SchedulerError::NoSuchDiscipline {
                interface,
                kind,
                advice: match kind {
                    "htb" => "install the kernel's extra modules, or grant without shaping",
                    _ => "install the kernel's extra modules, or let the scheduler choose",
                },
            },
            (errno, _) => SchedulerError::Refused { interface, action, reason: refusal.reason(), errno },
        }
    }
}

impl State {
    /// What there is of a part of the tree that is to become `wanted`.
    fn part(&self, part: &Part, wanted: &[Class]) -> Vec<Class> {
        let mut ids: BTreeSet<Id> = class::ids(part).collect();
        ids.extend(wanted.iter().map(|class| class.id));
        // What still drains below goes with a line.
        let below: Vec<Id> = self
            .draining
            .keys()
            .filter(|id| {
                let parent = self.classes.get(*id).and_then(Class::parent);
                parent.is_some_and(|parent| ids.contains(&parent))
            })
            .copied()
            .collect();
        ids.extend(below);
        ids.iter().filter_map(|id| self.classes.get(id)).cloned().collect()
    }
}

fn by_id(classes: impl IntoIterator<Item = Class>) -> BTreeMap<Id, Class> {
    classes.into_iter().map(|class| (class.id, class)).collect()
}

/// Classes in `from` of allocations that are no longer wanted while what they hang on is, and of lines that
/// are now divided. An allocation that is wanted in another group goes at once: it can't have its queue's
/// number twice.
fn leaving<'a>(from: &'a [Class], wanted: &[Class]) -> Vec<&'a Class> {
    let wants = |id| wanted.binary_search_by_key(&id, |class| class.id).is_ok();
    let elsewhere: HashSet<ClassSlot> = wanted.iter().filter_map(Class::allocation).collect();
    let is_leaving = |class: &&Class| match (class.allocation(), class.undivided()) {
        (Some(slot), _) => class.is_leaf() && !elsewhere.contains(&slot) && class.parent().is_some_and(wants),
        (_, Some(line)) => wants(Id::rest(line)),
        _ => false,
    };
    from.iter().filter(is_leaving).collect()
}

/// What was wrong, one text for each class.
fn described(repairs: &[Change]) -> Vec<Drift> {
    let ids = |pick: fn(&Change) -> Option<Id>| repairs.iter().filter_map(pick).collect::<HashSet<Id>>();
    let added = ids(|change| if let Change::Add(class) = change { Some(class.id) } else { None });
    let removed = ids(|change| if let Change::Remove(class) = change { Some(class.id) } else { None });
    repairs
        .iter()
        .filter_map(|change| match change {
            Change::Remove(class) if added.contains(&class.id) => None,
            Change::Add(class) if removed.contains(&class.id) => {
                Some(format!("class {} was elsewhere in the tree", class.id))
            }
            Change::Queue { id, .. } if added.contains(id) => None,
            other => other.drift(),
        })
        .map(|what| Drift { what })
        .collect()
}

/// Name of the discipline that a change makes.
fn discipline(change: &Change) -> Option<&'static str> {
    match change {
        Change::Queue { to, .. } => match to.discipline {
            Discipline::Fifo { .. } => Some("bfifo"),
            Discipline::FqCodel { .. } => Some("fq_codel"),
            Discipline::Group => Some("htb"),
            Discipline::Foreign(_) => None,
        },
        Change::Add(_) | Change::Alter { .. } | Change::Remove(_) | Change::Unqueue { .. } => None,
    }
}
