//! The gateway: makes the kernel do what the state says, and tells what it does.
//!
//! What must stand in the maps and trees follows from the state alone, so that carrying out a change, taking over at start and repairing drift are one piece of code.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::thread;

use ipnet::IpNet;
use jiff::Timestamp;
use nix::fcntl::Flock;
use nix::time::{ClockId, clock_gettime};
use qos_common::abi::{
    self, JUDGED, LAYER3, Line, LineClasses, LineKey, MAX_LINE_LENGTHS, Outcome, Question, Settings,
};
use qos_common::classify::{Address, Direction, Family, Rule, selector_of};
use qos_common::clock::Meter;
use qos_common::length::{ETHERNET_OVERHEAD, LinkLayer};
use qos_common::mark::MarkLayout;

use super::classifier::{self, Classifier, ClassifierError};
use super::link::{Addresses, Framing, Link, LinkError};
use super::maps::Maps;
use super::object::{
    Attachment, Hooks, Judge, Object, ObjectError, XdpHook, lock_pins, pinned_interfaces, remove_interface,
    remove_pins,
};
use super::scheduler::htb::{Htb, LeafQueue};
use super::scheduler::{ClassSlot, Leaf, LineClass, LineSlot, Part, Scheduler as _, SchedulerError, Tree};
use super::trace::Tracer;
use super::{Role, TcHooks, XdpChoice};
use crate::domain::selector::rules;
use crate::domain::{Allocation, AllocationId, BitsPerSecond, Enforcement, Name, ProviderKind, Session};
use crate::manager::report::{
    ClassifierStatistics, Counts, DirectedCounts, Explanation, GatewayStatus, InterfaceStatus, RepairReport,
    Statistics,
};
use crate::manager::{Change, Gateway, Refusal, RefusalCode, SlotKind, State};

/// Repairs that are remembered.
const REPAIRS_KEPT: usize = 100;

/// Time by which the clock of a shaped maximum may run ahead, in ns: more than any queue at egress
/// holds, so that the queue is the limit, and the clock only keeps what the queue will drop from
/// the provider's aggregate.
const SHAPED_SLACK_NS: u64 = 150_000_000;
/// Packets by which it may, however slow the class is.
const SHAPED_SLACK_PACKETS: u64 = 8;
/// Time that a provider's aggregate may be exceeded at once, in ns.
const AGGREGATE_BURST_NS: u64 = 25_000_000;

/// Bytes of a packet that can be explained. linux/net/bpf/test_run.c, 6.1: an Ethernet header at
/// least, a page less headroom at most.
pub const PACKET_LENGTHS: RangeInclusive<usize> = 14..=3_520;

/// What the gateway is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct GatewayConfig {
    /// Its interfaces.
    pub interfaces: Vec<InterfaceConfig>,
    /// Where programs, maps and links are pinned.
    pub bpffs_dir: PathBuf,
    /// Classify and count only.
    pub observe: bool,
    /// Bits of `skb->mark` that are ours: one run of at least 20.
    pub mark_mask: u32,
    /// Where tc programs are attached.
    pub tc_hooks: TcHooks,
    /// The box translates subscribers' addresses between LAN and WAN.
    pub nat: bool,
    /// Rules that the classifier takes.
    pub max_rules: u32,
    /// Most rules that one packet may have to be compared with once another allocation is granted.
    pub max_checks: u32,
}

/// Largest IP packet of plain Ethernet, in bytes (RFC 894).
const ETHERNET_MTU: u32 = 1_500;

impl GatewayConfig {
    /// The largest IP packet that any of the interfaces takes now, in bytes: delays are computed with it.
    /// Ethernet's where none of them is there.
    ///
    /// # Errors
    /// Where the kernel can't be asked.
    pub fn largest_mtu(&self) -> Result<u32, LinkError> {
        let mut largest = None;
        for interface in &self.interfaces {
            match Link::by_name(&interface.name) {
                Ok(link) => largest = largest.max(Some(link.mtu)),
                Err(LinkError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(largest.unwrap_or(ETHERNET_MTU))
    }
}

/// An interface of the gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceConfig {
    /// Its name.
    pub name: String,
    /// Which side it is on.
    pub role: Role,
    /// Its capacity.
    pub capacity: BitsPerSecond,
    /// Where XDP programs are attached.
    pub xdp: XdpChoice,
}

/// Why the kernel does not do what was decided.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The programs or maps could not be used.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The rules did not fit.
    #[error("classifier: {0}")]
    Classifier(#[from] ClassifierError),
    /// The tree was refused.
    #[error(transparent)]
    Scheduler(#[from] SchedulerError),
    /// An interface could not be used.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// An interface whose packets can't be read.
    #[error(
        "interface {0}: its packets begin with neither an Ethernet nor an IP header (hardware type {1}), \
         and can't be read"
    )]
    Framing(String, u16),
    /// The mark's bits are unusable.
    #[error("mark_mask {0:#010x} is not one run of at least 20 bits")]
    MarkMask(u32),
    /// There are more prefix lengths of lines than the programs try.
    #[error(
        "the sessions' {family} addresses have {found} different prefix lengths, more than {MAX_LINE_LENGTHS}"
    )]
    LineLengths {
        /// IPv4 or IPv6.
        family: &'static str,
        /// How many.
        found: usize,
    },
    /// A packet to explain is too short or too long to be run.
    #[error(
        "a packet of {0} bytes can't be run: {first} to {last} can",
        first = PACKET_LENGTHS.start(),
        last = PACKET_LENGTHS.end()
    )]
    PacketLength(usize),
}

/// The programs, maps and trees of this gateway. Dropping it leaves them enforcing.
#[derive(Debug)]
pub struct Kernel {
    config: GatewayConfig,
    mark: MarkLayout,
    object: Object,
    maps: Maps,
    classifier: Classifier,
    interfaces: Vec<Interface>,
    repairs: VecDeque<RepairReport>,
    taken_over: bool,
    allocations: u32,
    /// Lines that are divided, upstream and downstream.
    divided: Divided,
    /// Nobody else works with the pins.
    _lock: Flock<File>,
    /// None until somebody traces.
    tracer: Option<Tracer>,
}

/// An interface as it is now.
#[derive(Debug)]
struct Interface {
    config: InterfaceConfig,
    /// None: it has gone, or is yet to come.
    link: Option<Link>,
    attachment: Option<Attachment>,
    /// None in observe mode, and while the interface has gone.
    scheduler: Option<Htb>,
    tree: Option<Tree>,
}

/// Lines that have been divided for an allocation, by direction.
type Divided = [BTreeSet<LineSlot>; 2];

/// A line that is divided in a direction.
#[derive(Debug)]
struct Division {
    direction: Direction,
    slot: LineSlot,
    session: Name,
}

/// How a tree was before it was changed.
#[derive(Debug)]
enum Before {
    /// It was not changed, or there was none.
    Nothing,
    Part(Part),
    Tree(Tree),
}

impl Interface {
    /// One that nothing was done to yet.
    const fn new(config: InterfaceConfig, link: Option<Link>) -> Self {
        Self { config, link, attachment: None, scheduler: None, tree: None }
    }

    /// The direction of what is sent out of it.
    const fn egress(&self) -> Direction {
        match self.config.role {
            Role::Lan => Direction::Downstream,
            Role::Wan => Direction::Upstream,
        }
    }
}

impl Kernel {
    /// Loads the programs, or takes over those that are pinned, and makes the kernel do what `state`
    /// says.
    ///
    /// # Errors
    /// Where another instance runs, or anything is refused. What was not there before is then removed
    /// again, and what was goes on enforcing. An interface that is missing is waited for.
    pub fn start(config: &GatewayConfig, state: &State) -> Result<Self, GatewayError> {
        let mark = MarkLayout::new(config.mark_mask, 0).ok_or(GatewayError::MarkMask(config.mark_mask))?;
        let links = config.interfaces.iter().map(|interface| found_link(&interface.name));
        let links = links.collect::<Result<Vec<_>, _>>()?;
        let lock = lock_pins(&config.bpffs_dir)?;
        let mut object = Object::load(&config.bpffs_dir, config.max_rules)?;
        // Before anything is made on an interface: what is there may be another instance's.
        let mut there = config.interfaces.iter().zip(&links);
        let foreign =
            there.find_map(|(interface, link)| object.refuse_foreign(link.as_ref()?, interface.xdp).err());
        if let Some(error) = foreign {
            if object.takes_over() {
                object.abandon()?;
            } else {
                remove_pins(&config.bpffs_dir)?;
            }
            return Err(error.into());
        }
        let maps = Maps::new(&mut object)?;
        let memory = object.rule_maps()?;
        let classifier = if object.maps_taken_over() {
            Classifier::take_over(memory, &all_rules(state))?
        } else {
            Classifier::new(memory)?
        };
        let interfaces =
            config.interfaces.iter().zip(links).map(|(config, link)| Interface::new(config.clone(), link));
        let mut kernel = Self {
            config: config.clone(),
            mark,
            taken_over: object.takes_over(),
            object,
            maps,
            classifier,
            interfaces: interfaces.collect(),
            repairs: VecDeque::new(),
            allocations: 0,
            divided: Divided::default(),
            tracer: None,
            _lock: lock,
        };
        match kernel.establish(state) {
            Ok(()) => Ok(kernel),
            Err(error) => {
                let nothing_runs = kernel.interfaces.iter().all(|interface| interface.attachment.is_none());
                let undone = match kernel.taken_over {
                    false => kernel.detach(),
                    true if nothing_runs => kernel.object.abandon().map_err(GatewayError::from),
                    true => Ok(()),
                };
                if let Err(second) = undone {
                    tracing::warn!(error = %second, "what was made could not be removed");
                }
                Err(error)
            }
        }
    }

    /// Becomes what another configuration says; `state` agrees with that. Interfaces and classes that are
    /// the same in both are not touched.
    ///
    /// # Errors
    /// Where an interface can't be used, or anything is refused. What was done stays: the caller goes back
    /// by configuring as before.
    pub fn reconfigure(&mut self, config: &GatewayConfig, state: &State) -> Result<(), GatewayError> {
        // All that can be refused beforehand, before anything is touched.
        let mut links = Vec::new();
        for interface in &config.interfaces {
            let link = found_link(&interface.name)?;
            if let Some(link) = &link {
                self.object.refuse_foreign(link, interface.xdp)?;
            }
            links.push(link);
        }
        let mut before = std::mem::take(&mut self.interfaces);
        let hooks_before: Vec<_> = before.iter().map(|interface| self.hooks(&interface.config)).collect();
        self.config = config.clone();
        self.classifier.set_limit(config.max_checks as usize);
        let mut changed = Vec::new();
        for (config, link) in config.interfaces.iter().zip(links) {
            let same = before.iter().position(|interface| {
                let is_there =
                    interface.link.as_ref().map(|link| link.index) == link.as_ref().map(|link| link.index);
                interface.config.name == config.name && interface.config.role == config.role && is_there
            });
            let interface = match same {
                Some(number) => {
                    changed.push(hooks_before.get(number) != Some(&self.hooks(config)));
                    let new = Interface::new(config.clone(), None);
                    Interface { config: config.clone(), ..std::mem::replace(&mut before[number], new) }
                }
                None => {
                    changed.push(true);
                    Interface::new(config.clone(), link)
                }
            };
            self.interfaces.push(interface);
        }
        // Of another role, or not configured any more: what is there goes before anything else comes.
        let kept = self.interfaces.iter().filter(|interface| interface.attachment.is_some());
        let kept: Vec<_> =
            kept.filter_map(|interface| interface.link.as_ref().map(|link| link.index)).collect();
        for left in leftovers(&self.config, kept.into_iter())? {
            leave_alone(&self.config, &left)?;
        }
        // As they are behind that.
        for interface in self.interfaces.iter_mut().filter(|interface| interface.attachment.is_none()) {
            interface.link = found_link(&interface.config.name)?;
        }
        for number in 0..self.interfaces.len() {
            self.schedule(number, state)?;
        }
        self.reconcile_maps(state)?;
        for (number, changed) in changed.into_iter().enumerate() {
            if changed || self.interfaces[number].attachment.is_none() {
                self.attach(number)?;
            }
        }
        self.put_interfaces()
    }

    /// Tells whether an interface has come, gone, become another, or takes other packets, since the last
    /// look.
    ///
    /// # Errors
    /// Where the kernel can't be asked.
    pub fn interfaces_changed(&self) -> Result<bool, GatewayError> {
        for interface in &self.interfaces {
            let found = found_link(&interface.config.name)?;
            let facts = |link: &Link| (link.index, link.mtu, link.framing);
            if found.as_ref().map(facts) != interface.link.as_ref().map(facts) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Compares the kernel with the state and repairs what differs. Returns what was wrong; that and
    /// what is wrong with an interface that can't be repaired is in the status too.
    ///
    /// # Errors
    /// Where something could not be repaired; the rest is.
    pub fn reconcile(&mut self, state: &State) -> Result<Vec<String>, GatewayError> {
        // Before all that may fail.
        self.maps.lift_idle_clocks(monotonic_ns());
        let mut wrong = Vec::new();
        let mut failed = None;
        for number in 0..self.interfaces.len() {
            if let Err(error) = self.reconcile_interface(number, state, &mut wrong) {
                failed.get_or_insert(error);
            }
        }
        match self.remove_leftovers() {
            Ok(names) => {
                wrong.extend(names.into_iter().map(|name| format!("interface {name} is not configured")));
            }
            Err(error) => {
                failed.get_or_insert(error);
            }
        }
        if let Err(error) = self.reconcile_pins(state, &mut wrong) {
            failed.get_or_insert(error);
        }
        let now = Timestamp::now();
        for what in &wrong {
            tracing::warn!("repaired: {what}");
            if self.repairs.len() == REPAIRS_KEPT {
                self.repairs.pop_front();
            }
            self.repairs.push_back(RepairReport { at: now, what: what.clone() });
        }
        failed.map_or(Ok(wrong), Err)
    }

    /// Reads all counters.
    ///
    /// # Errors
    /// Where a map or the scheduler can't be read.
    pub fn statistics(&mut self, state: &State) -> Result<Statistics, GatewayError> {
        let at_ns = monotonic_ns();
        let Self { maps, interfaces, .. } = self;
        // The kernel takes longer to tell of thousands of classes than the maps take to be read.
        let (drops, mut allocations) = thread::scope(|scope| {
            let drops = scope.spawn(|| queue_drops(interfaces));
            let counts = |allocation: &Allocation, direction| Counts {
                mtu: maps.allocation_clocks(allocation.slot, direction).into(),
                ..Counts::from(maps.allocation_counters(allocation.slot, direction))
            };
            let allocations = state.allocations.values().map(|allocation| {
                let [up, down] = Direction::BOTH.map(|direction| counts(allocation, direction));
                (allocation.id, DirectedCounts { up, down })
            });
            let allocations: Vec<_> = allocations.collect();
            (drops.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), allocations)
        });
        let drops = drops?;
        for (allocation, (_, counts)) in state.allocations.values().zip(&mut allocations) {
            if let Some(class) = allocation.class {
                let [up, down] = drops.each_ref().map(|drops| drops.get(&ClassSlot(class)).copied());
                counts.up.queue_dropped_packets = up.unwrap_or(0);
                counts.down.queue_dropped_packets = down.unwrap_or(0);
            }
        }
        // Of what is in order a map is made at once.
        let allocations = allocations.into_iter().collect();
        let mut statistics = Statistics { at_ns, allocations, ..Statistics::default() };
        for provider in state.providers.values() {
            let counts = DirectedCounts {
                up: self.maps.provider_counters(provider.slot, Direction::Upstream).into(),
                down: self.maps.provider_counters(provider.slot, Direction::Downstream).into(),
            };
            statistics.providers.insert(provider.name.clone(), counts);
        }
        let outcomes = self.maps.outcomes();
        for (outcome, count) in Outcome::ALL.into_iter().zip(outcomes.packets) {
            statistics.outcomes.insert(outcome_name(outcome).to_owned(), count);
        }
        statistics.classifier = ClassifierStatistics {
            look_ups: outcomes.look_ups,
            tables: outcomes.tables,
            forks: outcomes.forks,
            comparisons: outcomes.rules,
            ..self.classifier.statistics()
        };
        Ok(statistics)
    }

    /// Asks the loaded program what it would do with a packet, which is not sent and not charged.
    /// `layer3`: it begins with its IP header, not with Ethernet.
    ///
    /// # Errors
    /// Where the packet can't be run.
    pub fn explain(
        &mut self,
        direction: Direction,
        packet: &[u8],
        layer3: bool,
    ) -> Result<Explanation, GatewayError> {
        if !PACKET_LENGTHS.contains(&packet.len()) {
            return Err(GatewayError::PacketLength(packet.len()));
        }
        self.maps.ask(Question { direction: direction as u32, layer3: u32::from(layer3) });
        self.object.explain(packet)?;
        let answer = self.maps.answer();
        // A later fragment goes the way of its first one.
        let looks = answer.parsed != 0 && answer.tables != 0;
        let way = if looks { classifier::way(self.classifier.maps(), &answer.key) } else { Vec::new() };
        Ok(explanation(direction, &answer, way))
    }

    /// The programs, for those who measure them.
    #[must_use]
    pub const fn object(&self) -> &Object {
        &self.object
    }

    /// Tells how the gateway is.
    #[must_use]
    pub fn status(&self) -> GatewayStatus {
        GatewayStatus {
            mode: if self.config.observe { "observe" } else { "enforce" }.to_owned(),
            abi: abi::ABI_VERSION,
            kernel: nix::sys::utsname::uname()
                .map_or_else(|_| String::new(), |name| name.release().to_string_lossy().into_owned()),
            taken_over: self.taken_over,
            interfaces: self.interfaces.iter().map(interface_status).collect(),
            rules: (self.classifier.count() as u32, self.classifier.maps().most()),
            worst_case_comparisons: self.classifier.worst_case() as u32,
            allocations: (self.allocations, abi::ALLOCATION_SLOTS - 1),
            repairs: self.repairs.iter().cloned().collect(),
        }
    }

    /// Removes everything from the kernel.
    ///
    /// # Errors
    /// Where something can't be removed; the rest is.
    pub fn detach(mut self) -> Result<(), GatewayError> {
        let mut first_error = None;
        for interface in &mut self.interfaces {
            // A start that failed may not have come to each tree.
            if let Some(scheduler) = &mut interface.scheduler
                && let Err(error) = scheduler.detach()
            {
                first_error.get_or_insert(error.into());
            }
            if let Some(link) = &interface.link
                && let Err(error) = remove_interface(&self.config.bpffs_dir, link)
            {
                first_error.get_or_insert(error.into());
            }
        }
        remove_pins(&self.config.bpffs_dir)?;
        first_error.map_or(Ok(()), Err)
    }

    /// Removes what an instance that no longer runs left in the kernel.
    ///
    /// # Errors
    /// Where something can't be removed.
    pub fn detach_leftovers(config: &GatewayConfig) -> Result<(), GatewayError> {
        let _lock = lock_pins(&config.bpffs_dir)?;
        let mut configured = Vec::new();
        for interface in &config.interfaces {
            match Link::by_name(&interface.name) {
                Ok(link) => configured.push(link),
                Err(LinkError::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        for link in leftovers(config, configured.iter().map(|link| link.index))?.iter().chain(&configured) {
            leave_alone(config, link)?;
        }
        Ok(remove_pins(&config.bpffs_dir)?)
    }

    /// Brings the kernel from whatever it holds to what the state says. Maps before programs, rules
    /// last: a packet never meets a rule whose allocation is not there.
    fn establish(&mut self, state: &State) -> Result<(), GatewayError> {
        self.find_divided(state)?;
        for number in 0..self.interfaces.len() {
            self.schedule(number, state)?;
        }
        self.reconcile_maps(state)?;
        if self.classifier.count() == 0 {
            self.classifier.insert(&all_rules(state))?;
        }
        for number in 0..self.interfaces.len() {
            if self.interfaces[number].link.is_none() {
                let name = &self.interfaces[number].config.name;
                tracing::warn!("interface {name} does not exist; it is attached to when it appears");
            }
            self.attach(number)?;
        }
        // What was granted is enforced, whatever it costs.
        self.classifier.set_limit(self.config.max_checks as usize);
        self.remove_leftovers()?;
        Ok(self.object.retire_others()?)
    }

    /// Takes everything of ours off interfaces that are not configured, or not by their name of now.
    fn remove_leftovers(&self) -> Result<Vec<String>, GatewayError> {
        let configured =
            self.interfaces.iter().filter_map(|interface| interface.link.as_ref().map(|link| link.index));
        let mut names = Vec::new();
        for left in leftovers(&self.config, configured)? {
            tracing::info!(interface = left.name, "not configured: our programs and classes go");
            leave_alone(&self.config, &left)?;
            names.push(left.name);
        }
        Ok(names)
    }

    fn attach(&mut self, number: usize) -> Result<(), GatewayError> {
        // How to read its packets, before the first one comes.
        self.put_interfaces()?;
        let hooks = self.hooks(&self.interfaces[number].config);
        let interface = &mut self.interfaces[number];
        if let Some(link) = &interface.link {
            interface.attachment = Some(self.object.attach(link, hooks)?);
            self.put_interfaces()?;
        }
        Ok(())
    }

    fn hooks(&self, interface: &InterfaceConfig) -> Hooks {
        let role = interface.role;
        // Behind NAT a subscriber's address can't be seen before it is put back, on the way out.
        let judges = !(self.config.nat && role == Role::Wan);
        Hooks { role, tc: self.config.tc_hooks, xdp: interface.xdp, judges }
    }

    /// Tells the programs how packets of each interface begin, and by which they come in judged.
    fn put_interfaces(&mut self) -> Result<(), GatewayError> {
        let addresses = Addresses::of_all()?;
        let records = self.interfaces.iter().filter_map(|interface| {
            let link = interface.link.as_ref()?;
            let layer3 = if link.framing == Framing::Layer3 { LAYER3 } else { 0 };
            let judge = interface.attachment.map_or(Judge::Egress, |at| at.judge);
            let judged = if judge == Judge::Egress { 0 } else { JUDGED };
            // A port answers in the name of its bridge.
            let indices = [Some(link.index), link.controller].into_iter().flatten();
            let own: Vec<_> = indices.filter_map(|index| addresses.get(&index)).collect();
            let v4 = own.iter().find_map(|own| own.v4).map_or([0; 4], |address| address.octets());
            let v6 = own.iter().find_map(|own| own.v6).map_or([0; 16], |address| address.octets());
            Some((link.index, abi::Interface { flags: layer3 | judged, v4, v6 }))
        });
        let records: BTreeMap<_, _> = records.collect();
        Ok(self.maps.put_interfaces(&records)?)
    }

    /// Finds out which lines are divided: those that an earlier instance has left so, and those that have
    /// to be.
    fn find_divided(&mut self, state: &State) -> Result<(), GatewayError> {
        for interface in &self.interfaces {
            if let Some(link) = interface.link.as_ref().filter(|_| !self.config.observe) {
                let found = Htb::new(link, LeafQueue::Best)?.divided()?;
                self.divided[interface.egress() as usize].extend(found);
            }
        }
        let slots: BTreeSet<_> = state.sessions.values().map(|session| LineSlot(session.slot)).collect();
        for direction in Direction::BOTH {
            let divided = &mut self.divided[direction as usize];
            divided.retain(|slot| slots.contains(slot));
            let dividing = state.allocations.values().filter_map(|of| dividing(state, of, direction));
            divided.extend(dividing.map(|session| LineSlot(session.slot)));
        }
        Ok(())
    }

    /// Declares the tree of an interface to its scheduler. In observe mode there is none, and one
    /// that an enforcing instance left is removed.
    fn schedule(&mut self, number: usize, state: &State) -> Result<(), GatewayError> {
        let observe = self.config.observe;
        let interface = &mut self.interfaces[number];
        let Some(link) = &interface.link else {
            return Ok(());
        };
        if observe {
            interface.scheduler = None;
            interface.tree = None;
            return Ok(Htb::new(link, LeafQueue::Best)?.detach()?);
        }
        let tree = tree(state, &self.divided, interface.egress(), interface.config.capacity, link.mtu);
        let scheduler = match &mut interface.scheduler {
            Some(scheduler) => scheduler,
            None => interface.scheduler.insert(Htb::new(link, LeafQueue::Best)?),
        };
        scheduler.apply(&tree)?;
        interface.tree = Some(tree);
        Ok(())
    }

    fn reconcile_interface(
        &mut self,
        number: usize,
        state: &State,
        wrong: &mut Vec<String>,
    ) -> Result<(), GatewayError> {
        let name = self.interfaces[number].config.name.clone();
        let before = self.interfaces[number].link.as_ref().map(|link| link.index);
        let Some(link) = found_link(&name)? else {
            let interface = &mut self.interfaces[number];
            interface.attachment = None;
            interface.scheduler = None;
            if interface.link.take().is_some() {
                wrong.push(format!("interface {name} has gone"));
                self.object.remove_dead_links()?;
            }
            return Ok(());
        };
        let interface = &mut self.interfaces[number];
        if before != Some(link.index) {
            wrong.push(format!("interface {name} appeared as number {}; attached", link.index));
            interface.attachment = None;
            interface.scheduler = None;
            self.object.remove_dead_links()?;
        }
        let mtu_before = self.interfaces[number].tree.as_ref().map(|tree| tree.mtu);
        if self.interfaces[number].scheduler.is_some() && mtu_before.is_some_and(|mtu| mtu != link.mtu) {
            wrong.push(format!("interface {name} takes packets of up to {} bytes", link.mtu));
            self.interfaces[number].link = Some(link.clone());
            self.schedule(number, state)?;
        }
        self.interfaces[number].link = Some(link);
        // The tree before the programs, as at the start; but each is repaired whatever ails the other.
        let scheduled = match &mut self.interfaces[number].scheduler {
            Some(scheduler) => scheduler
                .repair()
                .map(|drift| wrong.extend(drift.into_iter().map(|drift| format!("{name}: {}", drift.what))))
                .map_err(GatewayError::from)
                // What changes don't tell: another MTU, or one that could not be taken back anywhere.
                .and_then(|()| self.schedule(number, state)),
            None if !self.config.observe => self.schedule(number, state),
            None => Ok(()),
        };
        self.reattach(number, wrong)?;
        scheduled
    }

    /// Attaches what an interface lacks.
    fn reattach(&mut self, number: usize, wrong: &mut Vec<String>) -> Result<(), GatewayError> {
        let interface = &self.interfaces[number];
        if let (Some(attachment), Some(link)) = (interface.attachment, &interface.link) {
            let missing = self.object.missing(link, interface.config.role, attachment);
            if missing.is_empty() {
                return Ok(());
            }
            let name = &interface.config.name;
            wrong.push(format!("{name}: {} had lost our program; attached again", missing.join(", ")));
        }
        self.attach(number)
    }

    fn reconcile_pins(&mut self, state: &State, wrong: &mut Vec<String>) -> Result<(), GatewayError> {
        let again = self.object.repin_maps()?;
        wrong.extend(again.into_iter().map(|map| format!("map {map} was not pinned")));
        self.put_interfaces()?;
        wrong.extend(self.reconcile_maps(state)?);
        wrong.extend(self.classifier.repair());
        Ok(())
    }

    /// Makes every map but the classifier's equal to the state.
    fn reconcile_maps(&mut self, state: &State) -> Result<Vec<String>, GatewayError> {
        let mut wrong = self.reconcile_registered(state)?;
        let allocations: HashMap<u16, _> =
            state.allocations.values().map(|known| (known.slot, known)).collect();
        for slot in 1..=SlotKind::Allocation.last() {
            let records = allocations.get(&slot).map(|known| self.records(state, known)).unwrap_or_default();
            if self.maps.put_allocation(slot, records) {
                wrong.push(format!("map allocations, slot {slot}, differed"));
            }
        }
        self.allocations = allocations.len() as u32;
        Ok(wrong)
    }

    /// Makes the settings and the maps of lines, providers and applications equal to the state.
    fn reconcile_registered(&mut self, state: &State) -> Result<Vec<String>, GatewayError> {
        let mut wrong = Vec::new();
        let settings = self.settings(state)?;
        if self.maps.put_settings(&settings)? {
            wrong.push("map settings differed".to_owned());
        }
        // A line has its classes before a prefix leads to it.
        let sessions: HashMap<u16, _> =
            state.sessions.values().map(|session| (session.slot, session)).collect();
        for slot in 1..abi::LINE_SLOTS as u16 {
            let classes = sessions.get(&slot).map(|session| self.line_classes(session)).unwrap_or_default();
            if self.maps.put_line_classes(slot, classes) {
                wrong.push(format!("map line_classes[{slot}] differed"));
            }
        }
        let lines = self.maps.put_lines(&all_lines(state))?;
        if lines > 0 {
            wrong.push(format!("map lines differed in {lines} entries"));
        }
        let providers: HashMap<u16, _> = state.providers.values().map(|known| (known.slot, known)).collect();
        for slot in 1..abi::PROVIDER_SLOTS as u16 {
            let record = providers.get(&slot).map(|known| provider_record(known)).unwrap_or_default();
            if self.maps.put_provider(slot, record) {
                wrong.push(format!("map providers[{slot}] differed"));
            }
        }
        let applications: HashMap<u16, _> =
            state.applications.values().map(|known| (known.slot, known)).collect();
        for slot in 1..abi::APPLICATION_SLOTS as u16 {
            let record = applications
                .get(&slot)
                .map(|known| application_record(state, &known.provider, &known.name))
                .unwrap_or_default();
            if self.maps.put_application(slot, record) {
                wrong.push(format!("map applications[{slot}] differed"));
            }
        }
        Ok(wrong)
    }

    fn settings(&self, state: &State) -> Result<Settings, GatewayError> {
        let mut settings = self.with_defaults(
            state,
            Settings {
                abi: abi::ABI_VERSION,
                observe: u32::from(self.config.observe),
                mark: self.mark,
                marked_lines: u32::from(self.config.nat && !self.config.observe),
                ..Settings::default()
            },
        );
        let addresses = || state.sessions.values().flat_map(|session| &session.addresses);
        let v4 = addresses().filter(|net| matches!(net, IpNet::V4(_))).map(IpNet::prefix_len);
        let v6 = addresses().filter(|net| matches!(net, IpNet::V6(_))).map(IpNet::prefix_len);
        settings.line_lengths_v4_used = put_lengths("IPv4", v4, &mut settings.line_lengths_v4)?;
        settings.line_lengths_v6_used = put_lengths("IPv6", v6, &mut settings.line_lengths_v6)?;
        Ok(settings)
    }

    /// The settings with what follows from the trees and the allocations: the class of what is on no line,
    /// and whether there is an MTU to look at.
    fn with_defaults(&self, state: &State, mut settings: Settings) -> Settings {
        settings.mtus = u32::from(state.has_mtu());
        for interface in &self.interfaces {
            if let (Some(scheduler), Some(tree)) = (&interface.scheduler, &interface.tree) {
                settings.default_class[interface.egress() as usize] =
                    if tree.is_bare() { scheduler.direct_class() } else { scheduler.default_class() };
            }
        }
        settings
    }

    /// Classes of a line's rest.
    fn line_classes(&self, session: &Session) -> LineClasses {
        let mut classes = LineClasses::default();
        for interface in &self.interfaces {
            if let Some(scheduler) = &interface.scheduler {
                classes.rest[interface.egress() as usize] =
                    self.rest_class(scheduler, session, interface.egress());
            }
        }
        classes
    }

    fn rest_class(&self, scheduler: &Htb, session: &Session, direction: Direction) -> u32 {
        let slot = LineSlot(session.slot);
        scheduler.rest_class(slot, self.divided[direction as usize].contains(&slot))
    }

    /// Records of an allocation, upstream and downstream.
    fn records(&self, state: &State, allocation: &Allocation) -> [Option<abi::Allocation>; 2] {
        Direction::BOTH.map(|direction| self.record(state, allocation, direction))
    }

    fn record(
        &self,
        state: &State,
        allocation: &Allocation,
        direction: Direction,
    ) -> Option<abi::Allocation> {
        if !allocation.selectors.iter().any(|selector| selector.covers(direction)) {
            return None;
        }
        let session = allocation.session.as_ref().and_then(|name| state.sessions.get(name));
        let level = &allocation.level;
        let mtu = state.network.mtu;
        let burst = level.burst.get(direction).unwrap_or_default();
        let maximum_burst = level.maximum_burst(direction, mtu).unwrap_or_default();
        let guaranteed = *level.guaranteed.get(direction);
        let maximum = *level.maximum.get(direction);
        let enforce = match level.enforcement {
            Enforcement::Police => abi::POLICE,
            Enforcement::Shape => abi::SHAPE,
        };
        let slack = match level.enforcement {
            Enforcement::Police => 0,
            Enforcement::Shape => shaped_slack(maximum.unwrap_or_default(), mtu),
        };
        let name = allocation.application.as_ref();
        let application =
            name.and_then(|name| state.applications.get(&(allocation.provider.clone(), name.clone())));
        Some(abi::Allocation {
            id: allocation.id.0,
            expires_ns: allocation.expires_at.map_or(u64::MAX, monotonic_at),
            guaranteed: guaranteed.map_or(Meter::UNSET, |rate| Meter::new(rate.0, burst.0)),
            maximum: maximum.map_or(Meter::UNSET, |rate| Meter::new(rate.0, maximum_burst.0 + slack)),
            flags: abi::IN_USE | enforce | if level.dscp.is_some() { abi::MARK_DSCP } else { 0 },
            class: self.class(allocation, session, direction),
            provider: state.providers.get(&allocation.provider).map_or(0, |known| known.slot),
            application: application.map_or(0, |known| known.slot),
            overhead: session.map_or(ETHERNET_OVERHEAD, |session| session.overhead),
            link_layer: session.map_or(LinkLayer::Ethernet, |session| session.link_layer) as u8,
            dscp: level.dscp.unwrap_or_default(),
            mtu: level.mtu.unwrap_or_default(),
            reserved: 0,
        })
    }

    /// Class that an allocation's packets queue in: its own, else that of its line's rest; zero
    /// leaves it to the line of each packet.
    fn class(&self, allocation: &Allocation, session: Option<&Session>, direction: Direction) -> u32 {
        let scheduler = self
            .interfaces
            .iter()
            .filter(|interface| interface.egress() == direction)
            .find_map(|interface| interface.scheduler.as_ref());
        let Some(scheduler) = scheduler else { return 0 };
        match (class_slot(allocation, direction), session) {
            (Some(slot), _) => scheduler.leaf_class(slot, session.map(|session| LineSlot(session.slot))),
            (None, Some(session)) => self.rest_class(scheduler, session, direction),
            (None, None) => 0,
        }
    }

    /// Carries out one change in the maps but the classifier's. What ends leaves its record behind, so that it can be
    /// taken back with its clocks and counters; [`Kernel::forget`] removes it.
    fn apply_to_maps(
        &mut self,
        state: &State,
        former: &Former<'_>,
        change: &Change,
        log: &mut Vec<Overwritten>,
    ) -> Result<(), GatewayError> {
        match change {
            Change::PutProvider(provider) => {
                self.maps.put_provider(provider.slot, provider_record(provider));
            }
            Change::PutApplication(application) => {
                let record = application_record(state, &application.provider, &application.name);
                self.maps.put_application(application.slot, record);
            }
            Change::PutSession(session) => {
                self.put_line_classes(session.slot, self.line_classes(session), log);
                let former = former.sessions.get(&session.name).into_iter().flat_map(|old| &old.addresses);
                for gone in former.filter(|net| !session.addresses.contains(net)) {
                    self.put_line(line_key(*gone), None, log)?;
                }
                for net in &session.addresses {
                    self.put_line(line_key(*net), Some(line(session)), log)?;
                }
                // Their framing is the line's.
                for allocation in state.allocations_on(&session.name) {
                    self.put_allocation(allocation.slot, self.records(state, allocation), log);
                }
            }
            Change::DeleteSession(name) => {
                if let Some(session) = former.sessions.get(name) {
                    for net in &session.addresses {
                        self.put_line(line_key(*net), None, log)?;
                    }
                    self.put_line_classes(session.slot, LineClasses::default(), log);
                }
            }
            Change::PutAllocation(allocation) => {
                self.put_allocation(allocation.slot, self.records(state, allocation), log);
            }
            Change::EndAllocation(allocation) => {
                // What is on its way still goes to its line, or to the rest of the link.
                let rest = |record: abi::Allocation| abi::Allocation { class: 0, ..record };
                let records = self.maps.allocation(allocation.slot).map(|record| record.map(rest));
                self.put_allocation(allocation.slot, records, log);
            }
            // What these leave behind is named by the state alone.
            Change::DeleteProvider(_) | Change::DeleteApplication(..) => {
                self.reconcile_registered(state)?;
            }
            Change::PutSegment(_)
            | Change::PutKey(_)
            | Change::DeleteKey(_)
            | Change::DeleteSegment(_)
            | Change::PutProfile(_)
            | Change::DeleteProfile(_) => {}
        }
        Ok(())
    }

    fn put_allocation(&self, slot: u16, records: [Option<abi::Allocation>; 2], log: &mut Vec<Overwritten>) {
        log.push(Overwritten::Allocation(slot, self.maps.allocation(slot)));
        self.maps.put_allocation(slot, records);
    }

    fn put_line_classes(&self, slot: u16, classes: LineClasses, log: &mut Vec<Overwritten>) {
        log.push(Overwritten::LineClasses(slot, self.maps.classes_of_line(slot)));
        self.maps.put_line_classes(slot, classes);
    }

    fn put_line(
        &mut self,
        key: LineKey,
        line: Option<Line>,
        log: &mut Vec<Overwritten>,
    ) -> Result<(), GatewayError> {
        let before = self.maps.line(&key)?;
        if before != line {
            log.push(Overwritten::Line(key, before));
            self.maps.put_line(&key, line)?;
        }
        Ok(())
    }

    /// Removes what is left of an allocation or a line that has ended.
    fn forget(&mut self, former: &Former<'_>, change: &Change) {
        match change {
            Change::EndAllocation(allocation) => {
                self.maps.put_allocation(allocation.slot, [None, None]);
            }
            Change::DeleteSession(name) => {
                // A line that takes its slot begins undivided.
                if let Some(session) = former.sessions.get(name) {
                    self.divided.iter_mut().for_each(|divided| {
                        divided.remove(&LineSlot(session.slot));
                    });
                }
            }
            _ => {}
        }
    }

    /// Writes back what was overwritten, the last first.
    fn restore(&mut self, log: Vec<Overwritten>) {
        for overwritten in log.into_iter().rev() {
            match overwritten {
                Overwritten::Allocation(slot, records) => {
                    self.maps.put_allocation(slot, records);
                }
                Overwritten::LineClasses(slot, classes) => {
                    self.maps.put_line_classes(slot, classes);
                }
                Overwritten::Line(key, line) => {
                    if let Err(error) = self.maps.put_line(&key, line) {
                        tracing::warn!(%error, "a change of the map of lines could not be taken back");
                    }
                }
            }
        }
    }

    /// Brings the trees to what the state says after `changes`. What they had in the place of what was
    /// changed is put into `before`, interface by interface.
    fn schedule_all(
        &mut self,
        state: &State,
        former: &Former<'_>,
        changes: &[&Change],
        before: &mut Vec<Before>,
    ) -> Result<(), GatewayError> {
        for number in 0..self.interfaces.len() {
            let interface = &mut self.interfaces[number];
            let mtu = interface.link.as_ref().map(|link| link.mtu);
            let mut part = tree_part(state, &self.divided, interface.egress(), former, changes);
            match (&mut interface.scheduler, &mut interface.tree) {
                (None, _) => before.push(Before::Nothing),
                (Some(_), Some(tree)) if mtu == Some(tree.mtu) && part.is_empty() => {
                    before.push(Before::Nothing);
                }
                (Some(scheduler), Some(tree)) if mtu == Some(tree.mtu) => {
                    part.exchange(tree);
                    if let Err(error) = scheduler.apply_part(tree, &part) {
                        part.exchange(tree);
                        return Err(error.into());
                    }
                    before.push(Before::Part(part));
                }
                (_, tree) => {
                    let tree = tree.clone();
                    self.schedule(number, state)?;
                    before.push(tree.map_or(Before::Nothing, Before::Tree));
                }
            }
        }
        Ok(())
    }

    /// Goes back to trees as they were.
    fn schedule_again(&mut self, before: Vec<Before>) {
        for (interface, before) in self.interfaces.iter_mut().zip(before) {
            let (Some(scheduler), Some(tree)) = (&mut interface.scheduler, &mut interface.tree) else {
                continue;
            };
            let result = match before {
                Before::Nothing => Ok(()),
                Before::Tree(old) => scheduler.apply(&old).map(|()| *tree = old),
                Before::Part(mut part) => {
                    part.exchange(tree);
                    let result = scheduler.apply_part(tree, &part);
                    if result.is_err() {
                        part.exchange(tree);
                    }
                    result
                }
            };
            if let Err(error) = result {
                tracing::warn!(%error, "a change of the tree could not be taken back");
            }
        }
    }

    /// Counts lines as divided that changes put the first class of an allocation on; returns these.
    fn divide(&mut self, state: &State, changes: &[&Change]) -> Vec<Division> {
        let mut new = Vec::new();
        for change in changes {
            let Change::PutAllocation(allocation) = change else { continue };
            for direction in Direction::BOTH {
                let session = dividing(state, allocation, direction);
                new.extend(
                    session
                        .filter(|session| self.divided[direction as usize].insert(LineSlot(session.slot)))
                        .map(|session| Division {
                            direction,
                            slot: LineSlot(session.slot),
                            session: session.name.clone(),
                        }),
                );
            }
        }
        new
    }

    /// Takes that back.
    fn unite(&mut self, lines: &[Division]) {
        for line in lines {
            self.divided[line.direction as usize].remove(&line.slot);
        }
    }

    /// Sends the rests of lines that have been divided, or are so no more, to their classes of now.
    fn move_rests(&mut self, state: &State, lines: &[Division]) {
        let names: BTreeSet<_> = lines.iter().map(|line| &line.session).collect();
        for session in names.into_iter().filter_map(|name| state.sessions.get(name)) {
            self.maps.put_line_classes(session.slot, self.line_classes(session));
            for allocation in state.allocations_on(&session.name) {
                self.maps.change_classes(allocation.slot, self.records(state, allocation));
            }
        }
    }

    /// Carries out changes, the first `ends` of which end something. `done` says afterwards how far that went.
    fn carry_out(
        &mut self,
        state: &State,
        former: &Former<'_>,
        (changes, ends): (&[&Change], usize),
        done: &mut Done,
    ) -> Result<(), GatewayError> {
        // Packets leave a class before it goes, and find it before they come. Rules go and come together:
        // many are laid out at once.
        let (gone, new) = changed_rules(changes, former);
        self.classifier.remove(&gone)?;
        done.removed = gone;
        for change in &changes[..ends] {
            self.apply_to_maps(state, former, change, &mut done.ended)?;
        }
        done.divided = self.divide(state, changes);
        self.schedule_all(state, former, changes, &mut done.trees)?;
        self.move_rests(state, &done.divided);
        // The first class that there is takes the rest of the traffic behind it.
        let lines =
            changes.iter().any(|change| matches!(change, Change::PutSession(_) | Change::DeleteSession(_)));
        let settings =
            if lines { self.settings(state)? } else { self.with_defaults(state, self.maps.settings()?) };
        self.maps.put_settings(&settings)?;
        for change in &changes[ends..] {
            self.apply_to_maps(state, former, change, &mut done.put)?;
        }
        Ok(self.classifier.insert(&new)?)
    }

    /// Takes back what was carried out, the last first.
    fn take_back(&mut self, state: &State, done: Done, settings: &Settings) -> Result<(), GatewayError> {
        self.restore(done.put);
        self.maps.put_settings(settings)?;
        self.unite(&done.divided);
        self.move_rests(state, &done.divided);
        self.schedule_again(done.trees);
        self.restore(done.ended);
        if !done.removed.is_empty() {
            self.classifier.insert(&done.removed)?;
        }
        Ok(())
    }
}

/// What changes replace or end, as it was before them.
#[derive(Debug, Default)]
struct Former<'a> {
    sessions: HashMap<&'a Name, &'a Session>,
    allocations: HashMap<AllocationId, &'a Allocation>,
}

impl<'a> Former<'a> {
    /// From what takes the changes back.
    fn of(inverse: &'a [Change]) -> Self {
        let mut former = Self::default();
        for change in inverse {
            match change {
                Change::PutSession(session) => {
                    former.sessions.insert(&session.name, session);
                }
                Change::PutAllocation(allocation) => {
                    former.allocations.insert(allocation.id, allocation);
                }
                _ => {}
            }
        }
        former
    }
}

/// What stood in a place of a map that was written to.
#[derive(Debug)]
enum Overwritten {
    Allocation(u16, [Option<abi::Allocation>; 2]),
    LineClasses(u16, LineClasses),
    Line(LineKey, Option<Line>),
}

/// How far changes were carried out, and what was there before.
#[derive(Debug, Default)]
struct Done {
    /// Rules that were removed.
    removed: Vec<Rule>,
    /// By what ended.
    ended: Vec<Overwritten>,
    /// Lines that were divided.
    divided: Vec<Division>,
    /// By interface.
    trees: Vec<Before>,
    /// By what came or changed.
    put: Vec<Overwritten>,
}

/// The rules that go with what ends or changes, and those that come.
fn changed_rules(changes: &[&Change], former: &Former<'_>) -> (Vec<Rule>, Vec<Rule>) {
    let (mut gone, mut new) = (Vec::new(), Vec::new());
    for change in changes {
        match change {
            Change::EndAllocation(allocation) => gone.extend(allocation_rules(allocation)),
            Change::PutAllocation(allocation) => match former.allocations.get(&allocation.id) {
                Some(old) if old.selectors == allocation.selectors => {}
                old => {
                    gone.extend(old.into_iter().flat_map(|old| allocation_rules(old)));
                    new.extend(allocation_rules(allocation));
                }
            },
            _ => {}
        }
    }
    (gone, new)
}

impl Gateway for Kernel {
    type Error = GatewayError;
    type Config = GatewayConfig;

    fn reconfigure(&mut self, config: &GatewayConfig, state: &State) -> Result<(), GatewayError> {
        Self::reconfigure(self, config, state)
    }

    fn apply(&mut self, state: &State, changes: &[Change], inverse: &[Change]) -> Result<(), GatewayError> {
        let (mut ordered, others): (Vec<_>, Vec<_>) = changes
            .iter()
            .partition(|change| matches!(change, Change::EndAllocation(_) | Change::DeleteSession(_)));
        let ends = ordered.len();
        let former = Former::of(inverse);
        // What is known of a line's life is nothing to packets.
        ordered.extend(others.into_iter().filter(|change| match change {
            Change::PutSession(session) => {
                former.sessions.get(&session.name).is_none_or(|old| !old.is_same_line(session))
            }
            _ => true,
        }));
        let settings = self.maps.settings()?;
        let mut done = Done::default();
        let result = self.carry_out(state, &former, (&ordered, ends), &mut done);
        if result.is_ok() {
            ordered[..ends].iter().for_each(|change| self.forget(&former, change));
            self.allocations = state.allocations.len() as u32;
        } else if let Err(error) = self.take_back(state, done, &settings) {
            tracing::warn!(%error, "a change of the maps could not be taken back");
        }
        result
    }

    fn refusal(error: &GatewayError) -> Option<Refusal> {
        let GatewayError::Classifier(classifier) = error else { return None };
        let code = match classifier {
            ClassifierError::TooManyChecks { .. } => RefusalCode::TooManyChecks,
            ClassifierError::Full { .. } | ClassifierError::NoRoom(_) => RefusalCode::InsufficientSlots,
            ClassifierError::Grace(_) | ClassifierError::Thread => return None,
        };
        let (field, message) = (Some("selectors".to_owned()), classifier.to_string());
        Some(Refusal { code, field, value: None, message, counter_offer: None })
    }

    fn would_refuse(&self, changes: &[Change]) -> Option<Refusal> {
        let granted = changes.iter().filter_map(|change| match change {
            Change::PutAllocation(allocation) => Some(allocation),
            _ => None,
        });
        let rules: Vec<_> = granted.flat_map(allocation_rules).collect();
        let error = self.classifier.would_take(&rules).err()?;
        <Self as Gateway>::refusal(&error.into())
    }

    fn interfaces_changed(&self) -> Result<bool, GatewayError> {
        Self::interfaces_changed(self)
    }

    fn reconcile(&mut self, state: &State) -> Result<Vec<String>, GatewayError> {
        Self::reconcile(self, state)
    }

    fn statistics(&mut self, state: &State) -> Result<Statistics, GatewayError> {
        Self::statistics(self, state)
    }

    fn explain(
        &mut self,
        direction: Direction,
        packet: &[u8],
        layer3: bool,
    ) -> Result<Explanation, GatewayError> {
        Self::explain(self, direction, packet, layer3)
    }

    fn status(&self) -> GatewayStatus {
        Self::status(self)
    }

    fn trace(&mut self, on: bool) -> Result<(), GatewayError> {
        if on && self.tracer.is_none() {
            self.tracer = Some(self.object.tracer()?);
        }
        for interface in &self.interfaces {
            if let (Some(link), Some(attachment)) = (&interface.link, interface.attachment) {
                self.object.trace(link, self.hooks(&interface.config), attachment, on)?;
            }
        }
        Ok(())
    }

    fn traced(&mut self) -> Vec<String> {
        self.tracer.as_mut().map(Tracer::take).unwrap_or_default()
    }

    fn detach(self) -> Result<(), GatewayError> {
        Self::detach(self)
    }
}

/// An interface that programs and a tree can be put on; none: there is none of that name.
fn found_link(name: &str) -> Result<Option<Link>, GatewayError> {
    match Link::by_name(name) {
        Ok(Link { framing: Framing::Other(number), .. }) => {
            Err(GatewayError::Framing(name.to_owned(), number))
        }
        Ok(link) => Ok(Some(link)),
        Err(LinkError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Interfaces that have programs of ours and are not among `configured` ones: the configuration has
/// changed since.
fn leftovers(
    config: &GatewayConfig,
    configured: impl Iterator<Item = u32>,
) -> Result<Vec<Link>, GatewayError> {
    let mut indices = pinned_interfaces(&config.bpffs_dir)?;
    for index in configured {
        indices.remove(&index);
    }
    let links = indices.into_iter().map(Link::by_index);
    Ok(links.filter(|link| !matches!(link, Err(LinkError::NotFound { .. }))).collect::<Result<_, _>>()?)
}

/// Takes everything of ours off an interface.
fn leave_alone(config: &GatewayConfig, link: &Link) -> Result<(), GatewayError> {
    let scheduler = Htb::new(link, LeafQueue::Best)?.detach();
    remove_interface(&config.bpffs_dir, link)?;
    Ok(scheduler?)
}

/// The tree of what is sent in one direction.
fn tree(state: &State, divided: &Divided, direction: Direction, link: BitsPerSecond, mtu: u32) -> Tree {
    let mut lines: Vec<_> =
        state.sessions.values().map(|session| line_class(state, divided, session, direction)).collect();
    lines.sort_unstable_by_key(|line| line.slot);
    let mut leaves: Vec<_> =
        state.allocations.values().filter_map(|allocation| leaf(state, allocation, direction)).collect();
    leaves.sort_unstable_by_key(|leaf| leaf.slot);
    Tree { link, rest: state.network.link_rest(direction), mtu, lines, leaves }
}

/// What the tree of one direction has after `changes` where they concern it.
fn tree_part(
    state: &State,
    divided: &Divided,
    direction: Direction,
    former: &Former<'_>,
    changes: &[&Change],
) -> Part {
    let mut part = Part::default();
    let put_line = |part: &mut Part, name: &Name| {
        if let Some(session) = state.sessions.get(name) {
            let line = line_class(state, divided, session, direction);
            part.lines.insert(line.slot, Some(line));
        }
    };
    for change in changes {
        match change {
            Change::PutSession(session) => put_line(&mut part, &session.name),
            Change::DeleteSession(name) => {
                let slot = former.sessions.get(name).map(|session| LineSlot(session.slot));
                part.lines.extend(slot.map(|slot| (slot, None)));
            }
            Change::PutAllocation(allocation) | Change::EndAllocation(allocation) => {
                let Some(slot) = class_slot(allocation, direction) else { continue };
                if let Some(name) = &allocation.session {
                    put_line(&mut part, name);
                }
                // What ends comes first, and its class may have been given to what comes.
                let live = state.allocations.get(&allocation.id);
                part.leaves.insert(slot, live.and_then(|live| leaf(state, live, direction)));
            }
            Change::PutProvider(_)
            | Change::DeleteProvider(_)
            | Change::PutApplication(_)
            | Change::DeleteApplication(..)
            | Change::PutSegment(_)
            | Change::DeleteSegment(_)
            | Change::PutKey(_)
            | Change::DeleteKey(_)
            | Change::PutProfile(_)
            | Change::DeleteProfile(_) => {}
        }
    }
    part
}

/// The line that an allocation divides in a direction; none: it has no class there, or is on none.
fn dividing<'a>(state: &'a State, allocation: &Allocation, direction: Direction) -> Option<&'a Session> {
    let session = allocation.session.as_ref().filter(|_| allocation.has_class(direction))?;
    state.sessions.get(session)
}

fn line_class(state: &State, divided: &Divided, session: &Session, direction: Direction) -> LineClass {
    let slot = LineSlot(session.slot);
    LineClass {
        slot,
        divided: divided[direction as usize].contains(&slot),
        rate: state.line_rate(&session.name, direction),
        rest: state.network.line_rest(session, direction),
        ceil: state.network.line_speed(session, direction),
        link_layer: session.link_layer,
        overhead: session.overhead,
    }
}

/// Place among the class numbers of an allocation; none: it has no class in that direction.
fn class_slot(allocation: &Allocation, direction: Direction) -> Option<ClassSlot> {
    allocation.class.filter(|_| allocation.has_class(direction)).map(ClassSlot)
}

/// The leaf of an allocation that has a class.
fn leaf(state: &State, allocation: &Allocation, direction: Direction) -> Option<Leaf> {
    let slot = class_slot(allocation, direction)?;
    let session = allocation.session.as_ref().and_then(|name| state.sessions.get(name));
    Some(Leaf {
        slot,
        line: session.map(|session| LineSlot(session.slot)),
        guaranteed: *allocation.level.guaranteed.get(direction),
        maximum: *allocation.level.maximum.get(direction),
        priority: allocation.level.priority,
        queue: None,
    })
}

/// Bytes by which the clock of a shaped maximum may run ahead.
fn shaped_slack(maximum: BitsPerSecond, mtu: u32) -> u64 {
    maximum.bytes_in(SHAPED_SLACK_NS) + SHAPED_SLACK_PACKETS * u64::from(mtu)
}

fn all_rules(state: &State) -> Vec<Rule> {
    state.allocations.values().flat_map(allocation_rules).collect()
}

fn allocation_rules(allocation: &Allocation) -> Vec<Rule> {
    (0..)
        .zip(&allocation.selectors)
        .flat_map(|(index, selector)| {
            rules(selector, index, allocation.precedence, allocation.id, allocation.slot)
        })
        .collect()
}

fn provider_record(provider: &crate::domain::Provider) -> abi::Provider {
    let meter =
        |direction| {
            provider.contract.maximum.get(direction).map_or(Meter::UNSET, |rate| {
                Meter::new(rate.0, rate.bytes_in(AGGREGATE_BURST_NS).max(2 * 1_514))
            })
        };
    abi::Provider {
        name: padded(&provider.name),
        aggregate: Direction::BOTH.map(meter),
        kind: match provider.kind {
            ProviderKind::Application => 1,
            ProviderKind::Network => 2,
        },
        reserved: 0,
    }
}

fn application_record(state: &State, provider: &Name, name: &Name) -> abi::Application {
    abi::Application {
        name: padded(name),
        provider: state.providers.get(provider).map_or(0, |known| u32::from(known.slot)),
        reserved: 0,
    }
}

fn padded(name: &Name) -> [u8; abi::NAME_LENGTH] {
    let mut bytes = [0; abi::NAME_LENGTH];
    for (place, byte) in bytes.iter_mut().zip(name.as_str().bytes()) {
        *place = byte;
    }
    bytes
}

/// Writes the distinct lengths, longest first, and returns how many they are.
fn put_lengths(
    family: &'static str,
    lengths: impl Iterator<Item = u8>,
    places: &mut [u8; MAX_LINE_LENGTHS],
) -> Result<u32, GatewayError> {
    let mut distinct: Vec<u8> = lengths.collect();
    distinct.sort_unstable_by(|a, b| b.cmp(a));
    distinct.dedup();
    if distinct.len() > places.len() {
        return Err(GatewayError::LineLengths { family, found: distinct.len() });
    }
    for (place, length) in places.iter_mut().zip(&distinct) {
        *place = *length;
    }
    Ok(distinct.len() as u32)
}

fn all_lines(state: &State) -> HashMap<LineKey, Line> {
    let lines = state.sessions.values();
    lines.flat_map(|session| session.addresses.iter().map(|net| (line_key(*net), line(session)))).collect()
}

fn line(session: &Session) -> Line {
    Line { slot: u32::from(session.slot) }
}

fn line_key(net: IpNet) -> LineKey {
    let (address, family) = match net.network() {
        IpAddr::V4(address) => (Address::v4(address.octets()), Family::V4),
        IpAddr::V6(address) => (Address::v6(address.octets()), Family::V6),
    };
    LineKey { address, length: u32::from(net.prefix_len()), family: family as u32 }
}

fn interface_status(interface: &Interface) -> InterfaceStatus {
    let attachment = interface.attachment.filter(|_| interface.link.is_some());
    let tree = interface.tree.as_ref().filter(|_| interface.scheduler.is_some());
    InterfaceStatus {
        name: interface.config.name.clone(),
        role: match interface.config.role {
            Role::Lan => "lan",
            Role::Wan => "wan",
        }
        .to_owned(),
        capacity: interface.config.capacity,
        index: interface.link.as_ref().map(|link| link.index),
        framing: interface
            .link
            .as_ref()
            .map(|link| if link.framing == Framing::Layer3 { "layer3" } else { "ethernet" }.to_owned()),
        judged: match attachment.map(|at| at.judge) {
            Some(Judge::Xdp(_)) => "xdp",
            Some(Judge::Tc) => "tc",
            Some(Judge::Egress) => "egress",
            None => "none",
        }
        .to_owned(),
        why: attachment.map(|at| at.why),
        xdp: match attachment.map(|at| at.judge) {
            Some(Judge::Xdp(XdpHook::Native)) => "native",
            Some(Judge::Xdp(XdpHook::Generic)) => "generic",
            Some(Judge::Tc | Judge::Egress) => "unused",
            None => "none",
        }
        .to_owned(),
        tc: attachment.map_or("none", |at| if at.tcx { "tcx" } else { "clsact" }).to_owned(),
        scheduler: if tree.is_some() { "htb" } else { "none" }.to_owned(),
        classes: interface.scheduler.as_ref().map_or(0, Htb::class_count),
    }
}

/// Packets that queues at egress dropped, by direction and class.
fn queue_drops(interfaces: &mut [Interface]) -> Result<[HashMap<ClassSlot, u64>; 2], SchedulerError> {
    let mut drops: [HashMap<ClassSlot, u64>; 2] = Default::default();
    for interface in interfaces {
        let Some(scheduler) = &interface.scheduler else { continue };
        for (slot, class) in scheduler.statistics()? {
            *drops[interface.egress() as usize].entry(slot).or_default() += class.drops;
        }
    }
    Ok(drops)
}

fn explanation(direction: Direction, answer: &abi::Answer, way: Vec<String>) -> Explanation {
    let key = (answer.parsed != 0).then_some(&answer.key);
    let matched = answer.allocation != 0;
    let address = |address: Address, family: u32| {
        if family == Family::V4 as u32 {
            IpAddr::V4(Ipv4Addr::from((address.high >> 32) as u32))
        } else {
            IpAddr::V6(Ipv6Addr::from(u128::from(address.high) << 64 | u128::from(address.low)))
        }
    };
    Explanation {
        outcome: Outcome::ALL
            .into_iter()
            .find(|outcome| *outcome as u32 == answer.outcome)
            .map_or("unknown", outcome_name)
            .to_owned(),
        allocation: matched.then_some(AllocationId(answer.allocation)),
        selector: matched.then(|| selector_of(answer.rank)),
        in_profile: answer.in_profile != 0,
        charged: answer.charged,
        class: (answer.class & 0xffff != 0)
            .then(|| format!("{:x}:{:x}", answer.class >> 16, answer.class & 0xffff)),
        direction: match direction {
            Direction::Upstream => "up",
            Direction::Downstream => "down",
        }
        .to_owned(),
        source: key.map(|key| address(key.source, key.family)),
        destination: key.map(|key| address(key.destination, key.family)),
        protocol: key.map(|key| key.protocol),
        source_port: key.map(|key| key.source_port),
        destination_port: key.map(|key| key.destination_port),
        dscp: key.map(|key| key.dscp),
        length: key.map(|key| key.length),
        fragment: key.is_some_and(|key| key.unknown != 0),
        tables: answer.tables,
        forks: answer.forks,
        rules: answer.rules,
        expired: answer.expired,
        way,
    }
}

pub(super) const fn outcome_name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Admitted => "admitted",
        Outcome::Unclassified => "unclassified",
        Outcome::OverMaximum => "over_maximum",
        Outcome::OverAggregate => "over_aggregate",
        Outcome::NotIp => "not_ip",
        Outcome::Truncated => "truncated",
        Outcome::TooManyTags => "too_many_tags",
        Outcome::StaleMark => "stale_mark",
        Outcome::LostMark => "lost_mark",
        Outcome::MissingEntry => "missing_entry",
        Outcome::Malformed => "malformed",
        Outcome::TooBig => "too_big",
    }
}

/// Now, in ns of CLOCK_MONOTONIC: the clock of the kernel programs.
pub(super) fn monotonic_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

/// A moment of the wall clock, in ns of CLOCK_MONOTONIC; 1 for one that has passed since boot.
fn monotonic_at(moment: Timestamp) -> u64 {
    let ahead = moment.duration_since(Timestamp::now()).as_nanos();
    let at = i128::from(monotonic_ns()) + ahead;
    u64::try_from(at.max(1)).unwrap_or(u64::MAX)
}
