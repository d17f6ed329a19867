//! What the kernel holds of qos, read past the daemon: maps by their pins, classes and programs by
//! netlink and bpf(2). Two readings tell whether anything was touched.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use aya::Pod;
use aya::maps::{Array, HashMap, Map, MapData};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{SchedClassifier, TcAttachType};
use qos_common::abi::{
    ABI_VERSION, ALLOCATION_SLOTS, APPLICATION_SLOTS, Allocation, Application, Clocks, LINE_SLOTS, Line,
    LineClasses, LineKey, PROVIDER_SLOTS, Provider, Settings,
};
use qos_common::classify::Rule;
use qos_userspace::gateway::classifier::{self, rules_in};
use qos_userspace::gateway::memory::SharedArray;

use crate::daemon::Daemon;
use crate::netlink::{Netlink, TrafficControl};
use crate::netns::Namespace;
use crate::topology::{LAN, WAN};

/// The pinned maps of a daemon, whether it runs or not.
#[derive(Debug)]
pub struct Maps {
    folder: PathBuf,
}

/// What decides on packets. Clocks and counters, which packets change, are not in it, nor is where
/// in memory rules stand.
#[derive(Clone, Debug, PartialEq)]
pub struct Contents {
    /// Map `settings`.
    pub settings: Settings,
    /// Map `allocations`, without its free slots.
    pub allocations: BTreeMap<u32, Allocation>,
    /// Map `providers`, likewise.
    pub providers: BTreeMap<u32, Provider>,
    /// Map `applications`, likewise.
    pub applications: BTreeMap<u32, Application>,
    /// Map `lines`, by the bytes of its keys.
    pub lines: BTreeMap<String, Line>,
    /// Map `line_classes`, without its free slots.
    pub line_classes: BTreeMap<u32, LineClasses>,
    /// Rules that packets can be led to, by direction, family and rank.
    pub rules: BTreeMap<(u8, u8, u64), Rule>,
}

/// The kernel's whole view of a gateway.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// What the maps hold.
    pub maps: Contents,
    /// Classes of both interfaces with their parameters, without those that lines had until they were
    /// divided: they go when they are empty and nothing else is to be done.
    pub classes: Vec<TrafficControl>,
    /// Qdiscs of the namespace.
    pub qdiscs: Vec<TrafficControl>,
    /// Links by the name of their pin: number of the link and of its program.
    pub links: BTreeMap<String, (u32, u32)>,
}

impl Kernel {
    /// Reads everything.
    ///
    /// # Errors
    /// When something of it isn't there.
    pub fn read(daemon: &Daemon, gateway: &Namespace) -> Result<Self> {
        let mut netlink = Netlink::open(gateway)?;
        let mut classes = Vec::new();
        let mut qdiscs = netlink.qdiscs()?;
        for name in [LAN, WAN] {
            let index = netlink.link(name)?.index;
            // fq_codel shows its flows as classes.
            let found = netlink.classes(index)?.into_iter().filter(|class| class.kind == "htb");
            let (former, found) = without_former(found.collect());
            qdiscs.retain(|qdisc| qdisc.index.cast_unsigned() != index || !former.contains(&qdisc.parent));
            classes.extend(found);
        }
        Ok(Self {
            maps: Maps::of(daemon).contents()?,
            classes,
            qdiscs,
            links: pinned_links(daemon.bpffs_dir())?,
        })
    }

    /// What `other` has otherwise, in words; empty where they are equal.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        if self.maps.settings != other.maps.settings {
            differences.push(format!("settings: {:?}, {:?}", self.maps.settings, other.maps.settings));
        }
        differ("allocation", &self.maps.allocations, &other.maps.allocations, &mut differences);
        differ("provider", &self.maps.providers, &other.maps.providers, &mut differences);
        differ("application", &self.maps.applications, &other.maps.applications, &mut differences);
        differ("line", &self.maps.lines, &other.maps.lines, &mut differences);
        differ("classes of line", &self.maps.line_classes, &other.maps.line_classes, &mut differences);
        differ("rule", &self.maps.rules, &other.maps.rules, &mut differences);
        differ("link", &self.links, &other.links, &mut differences);
        for (what, one, two) in
            [("class", &self.classes, &other.classes), ("qdisc", &self.qdiscs, &other.qdiscs)]
        {
            let named = |list: &[TrafficControl]| -> BTreeMap<String, TrafficControl> {
                list.iter().map(|it| (format!("{} {:x}", it.index, it.handle), it.clone())).collect()
            };
            differ(what, &named(one), &named(two), &mut differences);
        }
        differences
    }

    /// Without the numbers of programs, which change when a new daemon takes over.
    #[must_use]
    pub fn without_programs(mut self) -> Self {
        for (_, program) in self.links.values_mut() {
            *program = 0;
        }
        self
    }
}

/// Handles of classes of lines that have been divided since (docs/adr/0015), and the other classes.
fn without_former(found: Vec<TrafficControl>) -> (Vec<u32>, Vec<TrafficControl>) {
    let handles: BTreeSet<u32> = found.iter().map(|class| class.handle).collect();
    let is_former = |handle: u32| {
        let line = (handle & 0xffff).wrapping_sub(0x2000);
        (1..=1_024).contains(&line) && handles.contains(&(handle & 0xffff_0000 | (0x10 + 2 * line)))
    };
    let (former, found): (Vec<_>, Vec<_>) = found.into_iter().partition(|class| is_former(class.handle));
    (former.into_iter().map(|class| class.handle).collect(), found)
}

const fn rule_name(rule: &Rule) -> (u8, u8, u64) {
    (rule.direction, rule.family, rule.rank)
}

fn differ<K: Ord + Debug, V: PartialEq + Debug>(
    what: &str,
    one: &BTreeMap<K, V>,
    two: &BTreeMap<K, V>,
    differences: &mut Vec<String>,
) {
    for (key, value) in one {
        match two.get(key) {
            Some(other) if other == value => {}
            other => differences.push(format!("{what} {key:?}: {value:?}, {other:?}")),
        }
    }
    differences
        .extend(two.keys().filter(|key| !one.contains_key(*key)).map(|key| format!("{what} {key:?} is new")));
}

impl Maps {
    /// Those of a daemon.
    #[must_use]
    pub fn of(daemon: &Daemon) -> Self {
        Self { folder: daemon.bpffs_dir().join(format!("maps_{ABI_VERSION}")) }
    }

    /// What decides on packets.
    ///
    /// # Errors
    /// When a map isn't pinned.
    pub fn contents(&self) -> Result<Contents> {
        let rules = classifier::Maps {
            half: self.shared("rule_half")?,
            tables: self.shared("tables")?,
            words: self.shared("rule_words")?,
            slots: self.shared("rule_slots")?,
            rules: self.shared("rules")?,
            extras: self.shared("rule_extras")?,
        };
        let settings: Array<MapData, Settings> =
            Array::try_from(Map::Array(self.open("settings")?)).context("map settings")?;
        let lines: HashMap<MapData, LineKey, Line> =
            HashMap::try_from(Map::HashMap(self.open("lines")?)).context("map lines")?;
        Ok(Contents {
            settings: settings.get(&0, 0).context("map settings")?,
            allocations: self.in_use("allocations", ALLOCATION_SLOTS * 2)?,
            providers: self.in_use("providers", PROVIDER_SLOTS)?,
            applications: self.in_use("applications", APPLICATION_SLOTS)?,
            line_classes: self.in_use("line_classes", LINE_SLOTS)?,
            lines: lines
                .iter()
                .map(|entry| entry.map(|(key, line)| (format!("{key:?}"), line)).context("map lines"))
                .collect::<Result<_>>()?,
            rules: rules_in(&rules).into_iter().map(|rule| (rule_name(&rule), rule)).collect(),
        })
    }

    /// The clocks of one direction of a slot.
    ///
    /// # Errors
    /// When the map isn't pinned.
    pub fn clocks(&self, index: u32) -> Result<Clocks> {
        Ok(self.shared("clocks")?.read(index))
    }

    /// The memory of an array map, to read and to spoil.
    ///
    /// # Errors
    /// When it isn't pinned.
    pub fn shared<T: Pod>(&self, name: &str) -> Result<SharedArray<T>> {
        use std::os::fd::AsFd as _;
        let map = self.open(name)?;
        let length = map.info().context("its length")?.max_entries();
        SharedArray::of_map(map.fd().as_fd(), length).with_context(|| format!("memory of map {name}"))
    }

    fn in_use<T: Pod + Default + PartialEq>(&self, name: &str, length: u32) -> Result<BTreeMap<u32, T>> {
        let memory: SharedArray<T> = self.shared(name)?;
        let entries = (0..length).map(|index| (index, memory.read(index)));
        Ok(entries.filter(|(_, value)| *value != T::default()).collect())
    }

    fn open(&self, name: &str) -> Result<MapData> {
        MapData::from_pin(self.folder.join(name)).with_context(|| format!("pinned map {name}"))
    }
}

/// The links pinned below `bpffs_dir`, by the names of their pins: numbers of link and program.
///
/// # Errors
/// When one can't be read.
pub fn pinned_links(bpffs_dir: &Path) -> Result<BTreeMap<String, (u32, u32)>> {
    let folder = bpffs_dir.join("links");
    let mut links = BTreeMap::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))? {
        let entry = entry.context("a pin")?;
        let link = FdLink::from(PinnedLink::from_pin(entry.path()).context("opening a pinned link")?);
        let info = link.info().context("asking for a link")?;
        links.insert(entry.file_name().to_string_lossy().into_owned(), (info.id(), info.program_id()));
    }
    Ok(links)
}

/// Detaches a pinned link as `bpftool link detach` does; the pin stays.
///
/// # Errors
/// When it isn't pinned, or the kernel refuses.
pub fn detach_link(pin: &Path) -> Result<()> {
    const BPF_OBJ_GET: libc::c_long = 7;
    const BPF_LINK_DETACH: libc::c_long = 34;
    let path = std::ffi::CString::new(pin.to_str().context("a path in UTF-8")?).context("a path")?;
    let get = [path.as_ptr() as u64, 0];
    // SAFETY: the attributes (pathname, bpf_fd, file_flags) and the path outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, get.as_ptr(), 16) };
    if fd < 0 {
        bail!("opening {}: {}", pin.display(), std::io::Error::last_os_error());
    }
    let link = u32::try_from(fd).context("a descriptor")?;
    // SAFETY: the attribute (link_fd) outlives the call; the descriptor is ours to close.
    let result = unsafe {
        let result = libc::syscall(libc::SYS_bpf, BPF_LINK_DETACH, &raw const link, 4);
        libc::close(link.cast_signed());
        result
    };
    if result < 0 {
        bail!("detaching {}: {}", pin.display(), std::io::Error::last_os_error());
    }
    Ok(())
}

/// Numbers of the programs attached to a link: XDP, tcx ingress, tcx egress.
///
/// # Errors
/// When there is no such link.
pub fn programs(namespace: &Namespace, link: &str) -> Result<(Option<u32>, Vec<u32>, Vec<u32>)> {
    let xdp = Netlink::open(namespace)?.link(link)?.xdp;
    let tcx = |side| -> Result<Vec<u32>> {
        let (_, found) = namespace
            .run(|| SchedClassifier::query_tcx(link, side))
            .with_context(|| format!("the tcx programs of {link}"))?;
        Ok(found.into_iter().map(|program| program.id()).collect())
    };
    Ok((xdp, tcx(TcAttachType::Ingress)?, tcx(TcAttachType::Egress)?))
}
