//! The kernel object: loading it, attaching its programs, and keeping both across restarts.
//!
//! Maps are pinned in a folder per ABI version, links in one beside it. A daemon that starts finds
//! them, loads its own programs over the same maps, and replaces the program of each link in one
//! step; dropping an [`Object`] leaves everything enforcing. Programs are pinned too, in a folder of the very
//! object that they come from: to have them verified again takes seconds, which the same object over the
//! same maps need not take. Only [`remove_pins`] ends that. Whoever
//! changes anything here holds [`lock_pins`].
//!
//! Where the maps there are another version's, it makes its own beside them. Programs of both run
//! until every link has its new one (`gateway::carry` tells what goes over); then
//! [`Object::retire_others`] removes the other maps. Whoever is killed before that leaves both, for the next
//! start to go on from.
//!
//! ```text
//! BPFFS_DIR/maps_2/settings …    BPFFS_DIR/links/4_xdp_native  4_ingress  4_egress …
//! BPFFS_DIR/programs_5f0c…/qos_xdp_lan …
//! ```
//!
//! Where tc programs are filters on `clsact`, a symbolic link `4_clsact` tells whether the queueing
//! discipline was made here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::maps::{MapData, MapError, MapInfo};
use aya::programs::links::{FdLink, LinkError, LinkOrder, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::xdp::XdpLink;
use aya::programs::{
    Program, ProgramError, ProgramFd, SchedClassifier, TcAttachType, TestRun as _, TestRunOptions, Xdp,
    XdpMode,
};
use aya::{Ebpf, EbpfLoader, Pod};
use aya_obj::programs::XdpAttachType;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{FsType, statfs};
use qos_common::abi::{ABI_VERSION, ALLOCATION_SLOTS, PROVIDER_SLOTS, rule_room, slot_room, word_room};
use qos_common::classify::HALVES;

use super::carry::{self, Carried};
use super::clsact::{self, Clsact, ClsactError};
use super::link::{Framing, Link};
use super::memory::{SharedArray, grace_period};
use super::trace::Tracer;
use super::{Role, TcHooks, XdpChoice};
use crate::manager::report::Why;

/// How long a program may take to leave its hook once nothing holds its link.
const TAKEN_OFF: Duration = Duration::from_secs(1);

/// Start of the names of our programs.
const PREFIX: &str = "qos_";
/// Start of the names of programs that are loaded when somebody traces.
const TRACING: &str = "qos_trace_";
/// Start of the names of folders of pinned programs.
const PROGRAMS: &str = "programs_";

/// The object, built by this crate's build script.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/qos-kernel"));

/// `BPF_FS_MAGIC`, linux/magic.h.
const BPF_FS: FsType = FsType(0xcafe_4a11);

/// Where bpffs is mounted by convention.
const BPFFS: &str = "/sys/fs/bpf";

/// Number of our filters where the kernel has no tcx.
const TC_HANDLE: TcHandle = TcHandle::new(0, clsact::HANDLE as u16);

/// Name of the symbolic link that tells of the `clsact` of an interface, behind its number, and where
/// it leads to: one that was made here, or found.
const CLSACT: &str = "clsact";
const OURS: &str = "ours";
const FOUND: &str = "found";

/// Both tc hooks.
const SIDES: [TcAttachType; 2] = [TcAttachType::Ingress, TcAttachType::Egress];

/// Why the object is not in the kernel as it should be.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// The BPF file system is not there.
    #[error("mounting the BPF file system on {path}: {reason}; do it beforehand: `mount -t bpf bpf {path}`")]
    Mount {
        /// Where it should be.
        path: String,
        /// What the kernel said.
        reason: nix::Error,
    },
    /// The pin directory lies elsewhere.
    #[error(
        "bpffs_dir {0} is not on a BPF file system; choose a directory below /sys/fs/bpf, or mount one there"
    )]
    NotBpffs(PathBuf),
    /// A file operation on a pin failed.
    #[error("{action} {path}: {reason}")]
    Pin {
        /// What was tried.
        action: &'static str,
        /// With which pin.
        path: PathBuf,
        /// What the kernel said.
        reason: io::Error,
    },
    /// Another instance works with the pins.
    #[error("another qosd works with {0}; stop it, or give this one its own `bpffs_dir` and interfaces")]
    InUse(PathBuf),
    /// A hook that takes one program has somebody else's.
    #[error(
        "interface {interface}: XDP program `{program}` (id {id}) is attached, which is not ours; \
         remove it with `ip link set dev {interface} xdp off`, detach the link that holds it, or set \
         `xdp = \"off\"` in [[interface]] to work beside it"
    )]
    ForeignProgram {
        /// Where.
        interface: String,
        /// Its name, as far as the kernel keeps it.
        program: String,
        /// Its number, as `bpftool prog` shows it.
        id: u32,
    },
    /// A pinned map has another shape than this version's.
    #[error(
        "the pinned map {path} has another shape ({found}) than this version's ({expected}); \
         `qos detach` removes it, with all enforcement, and the next start makes it anew"
    )]
    MapShape {
        /// The pin.
        path: PathBuf,
        /// Key size, value size and length that it has.
        found: String,
        /// Key size, value size and length that it should have.
        expected: String,
    },
    /// A pinned map's values are laid out otherwise than this version's, which has the same number.
    #[error(
        "the values of map {map} below {folder} are laid out otherwise than this version's; \
         `qos detach` removes it, with all enforcement, and the next start makes it anew"
    )]
    MapLayout {
        /// Its name.
        map: &'static str,
        /// Where the maps are.
        folder: PathBuf,
    },
    /// What another version counted can't be carried over.
    #[error("carrying over clocks and counters to {folder}: {reason}")]
    Carry {
        /// Where to.
        folder: PathBuf,
        /// Why not.
        reason: io::Error,
    },
    /// The kernel did not take the object.
    #[error("loading the kernel programs: {0}")]
    Load(#[source] Box<aya::EbpfError>),
    /// The kernel did not take one program.
    #[error("loading program {program}: {}", program_error(.reason))]
    Program {
        /// Its name.
        program: String,
        /// What the kernel said, the end of the verifier's log included.
        reason: Box<ProgramError>,
    },
    /// The object lacks something by that name.
    #[error("the kernel object has no {kind} `{name}`")]
    Missing {
        /// Map or program.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A map could not be used.
    #[error("map {map}: {reason}")]
    Map {
        /// Its name.
        map: &'static str,
        /// What went wrong.
        reason: Box<MapError>,
    },
    /// A map could not be mapped into memory.
    #[error("mapping {map} into memory: {reason}")]
    Memory {
        /// Its name.
        map: &'static str,
        /// What the kernel said.
        reason: io::Error,
    },
    /// The hooks of an interface can't be cleaned.
    #[error("interface {interface}: {source}")]
    Hooks {
        /// Its name.
        interface: String,
        /// Why not.
        source: ClsactError,
    },
    /// A program could not be attached.
    #[error("attaching {program} to {interface}: {reason}")]
    Attach {
        /// Its name.
        program: &'static str,
        /// Where.
        interface: String,
        /// What the kernel said.
        reason: String,
        /// Its error number, where it gave one.
        errno: Option<i32>,
    },
    /// A program could not be run on a packet.
    #[error("running {program}: {reason}")]
    Run {
        /// Its name.
        program: &'static str,
        /// What the kernel said.
        reason: Box<ProgramError>,
    },
}

impl ObjectError {
    pub(super) fn map(map: &'static str, reason: MapError) -> Self {
        Self::Map { map, reason: Box::new(reason) }
    }

    /// The kernel's error number, where a program could not be attached.
    const fn errno(&self) -> Option<i32> {
        match self {
            Self::Attach { errno, .. } => *errno,
            _ => None,
        }
    }
}

fn program_error(error: &ProgramError) -> String {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let tail: Vec<_> = log.lines().rev().take(12).collect();
            let tail: Vec<_> = tail.into_iter().rev().collect();
            format!("{io_error}; the verifier's last lines:\n{}", tail.join("\n"))
        }
        other => other.to_string(),
    }
}

/// How programs are attached to one interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Where what comes in is judged.
    pub judge: Judge,
    /// Why there.
    pub why: Why,
    /// tcx; false: clsact and netlink.
    pub tcx: bool,
    /// Some of it was there before.
    pub taken_over: bool,
}

/// Where what comes in by an interface is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judge {
    /// By XDP.
    Xdp(XdpHook),
    /// At tc ingress.
    Tc,
    /// Not there, but where it goes out.
    Egress,
}

impl Judge {
    /// The hooks of tc that have a program of ours.
    const fn sides(self) -> &'static [TcAttachType] {
        match self {
            Self::Egress => &[TcAttachType::Egress],
            Self::Xdp(_) | Self::Tc => &SIDES,
        }
    }

    /// The program for a hook of tc.
    const fn tc_program(self, role: Role, side: TcAttachType) -> &'static str {
        match (side, role, self) {
            (TcAttachType::Ingress, Role::Lan, Self::Tc) => "qos_judge_lan",
            (TcAttachType::Ingress, Role::Wan, Self::Tc) => "qos_judge_wan",
            (TcAttachType::Ingress, ..) => "qos_ingress",
            (_, Role::Lan, _) => "qos_egress_lan",
            (_, Role::Wan, _) => "qos_egress_wan",
        }
    }
}

/// Where an XDP program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpHook {
    /// In the driver.
    Native,
    /// In the stack, behind the driver.
    Generic,
}

impl XdpHook {
    const ALL: [Self; 2] = [Self::Native, Self::Generic];

    /// The name of its pin, behind the interface's number.
    const fn pin(self) -> &'static str {
        match self {
            Self::Native => "xdp_native",
            Self::Generic => "xdp_generic",
        }
    }

    const fn mode(self) -> XdpMode {
        match self {
            Self::Native => XdpMode::Driver,
            Self::Generic => XdpMode::Skb,
        }
    }
}

/// What is to be attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hooks {
    /// Which side of the gateway it is on.
    pub role: Role,
    /// Where tc programs are attached.
    pub tc: TcHooks,
    /// Where XDP programs are attached.
    pub xdp: XdpChoice,
    /// Whether what comes in is judged there; else where it goes out.
    pub judges: bool,
}

/// The object in the kernel.
#[derive(Debug)]
pub struct Object {
    ebpf: Ebpf,
    maps_dir: PathBuf,
    links_dir: PathBuf,
    /// The pinned maps and where their pins are.
    pinned: Vec<(PathBuf, MapData)>,
    /// The maps were there before.
    maps_taken_over: bool,
    /// Other versions' maps, which programs may still use.
    others: Vec<Other>,
    /// What is carried over to; none where there are no others.
    carried: Option<Carried>,
}

/// The maps of another version.
#[derive(Debug)]
struct Other {
    folder: PathBuf,
    /// None: they can't be read.
    carried: Option<Carried>,
}

impl Other {
    fn open(folder: PathBuf) -> Self {
        let carried = Carried::open(&folder);
        if let Err(reason) = &carried {
            // It must not keep the next version from starting: limits begin with full bursts.
            tracing::warn!(folder = %folder.display(), %reason, "clocks and counters are not carried over");
        }
        Self { folder, carried: carried.ok() }
    }
}

impl Object {
    /// Loads the object over the maps pinned below `bpffs_dir`, which it makes if they are not there, with
    /// room for `max_rules` rules. Maps of rules that were made for another number are made anew: programs
    /// that run keep theirs.
    ///
    /// # Errors
    /// Where there is no BPF file system, a pinned map has another shape, or the kernel refuses. Nothing
    /// is left then but what was there before.
    pub fn load(bpffs_dir: &Path, max_rules: u32) -> Result<Self, ObjectError> {
        mount_bpffs(bpffs_dir)?;
        let maps_dir = maps_dir(bpffs_dir);
        let was_there = maps_dir.exists();
        Self::load_over(bpffs_dir, &maps_dir, max_rules).inspect_err(|_| {
            // The next one would take some of the maps for all of them.
            if !was_there && let Err(error) = remove_maps(bpffs_dir) {
                tracing::warn!(%error, "what was made could not be removed");
            }
        })
    }

    fn load_over(bpffs_dir: &Path, maps_dir: &Path, max_rules: u32) -> Result<Self, ObjectError> {
        let links_dir = links_dir(bpffs_dir);
        for path in [maps_dir, &links_dir] {
            fs::create_dir_all(path).map_err(|reason| pin_error("creating", path, reason))?;
        }
        remove_folder(&carry::retired(bpffs_dir))?;
        let mut others = versions(bpffs_dir)?;
        others.remove(maps_dir);
        let other_layout =
            carry::leave_layouts(maps_dir).map_err(|reason| pin_error("creating", maps_dir, reason))?;
        if let Some(map) = other_layout {
            return Err(ObjectError::MapLayout { map, folder: maps_dir.to_path_buf() });
        }
        let shapes = shapes(max_rules)?;
        remove_rules_of_another_length(maps_dir, &shapes)?;
        let (mut maps_taken_over, mut all_maps_there) = (false, true);
        let mut loader = EbpfLoader::new();
        for (name, shape) in &shapes {
            let path = maps_dir.join(name);
            let is_there = has_shape(&path, *shape)?;
            all_maps_there &= is_there;
            if is_there {
                maps_taken_over = true;
            } else if let Some(shared) = carry::shared(&others, name, |info| Shape::of(info) == *shape) {
                let map = MapData::from_pin(&shared)
                    .map_err(|reason| pin_error("opening", &shared, io::Error::other(reason)))?;
                map.pin(&path).map_err(|reason| pin_error("pinning", &path, io::Error::other(reason)))?;
            }
            loader.map_max_entries(name, shape.length);
            loader.map_pin_path(name, path);
        }
        let mut ebpf = loader.load(OBJECT).map_err(|reason| ObjectError::Load(Box::new(reason)))?;
        // Programs over maps that are not these any more, or of another object, are of no use.
        let programs_dir = programs_dir(bpffs_dir);
        remove_programs(bpffs_dir, |folder| all_maps_there && *folder == programs_dir)?;
        fs::create_dir_all(&programs_dir).map_err(|reason| pin_error("creating", &programs_dir, reason))?;
        for (name, program) in ebpf.programs_mut().filter(|(name, _)| !name.starts_with(TRACING)) {
            take_or_load(&programs_dir.join(name), name, program)?;
        }
        let pinned = shapes.keys().map(|name| {
            let path = maps_dir.join(name);
            let map = MapData::from_pin(&path)
                .map_err(|reason| pin_error("opening", &path, io::Error::other(reason.to_string())))?;
            Ok((path, map))
        });
        let pinned = pinned.collect::<Result<_, ObjectError>>()?;
        let maps_dir = maps_dir.to_path_buf();
        let others: Vec<_> = others.into_iter().map(Other::open).collect();
        let carried = if others.is_empty() { None } else { Some(Carried::open(&maps_dir)) };
        let carried =
            carried.transpose().map_err(|reason| ObjectError::Carry { folder: maps_dir.clone(), reason })?;
        let object = Self { ebpf, maps_dir, links_dir, pinned, maps_taken_over, others, carried };
        object.carry(Carried::seed);
        object.remove_dead_links()?;
        Ok(object)
    }

    /// Removes the maps of other versions, once all links have this object's programs, and takes over
    /// what those have counted.
    ///
    /// # Errors
    /// Where a pin can't be removed, or the kernel can't tell when the other programs have ended.
    pub fn retire_others(&mut self) -> Result<(), ObjectError> {
        if self.others.is_empty() {
            return Ok(());
        }
        grace_period().map_err(|reason| ObjectError::Carry { folder: self.maps_dir.clone(), reason })?;
        self.carry(Carried::fold);
        while let Some(Other { folder, .. }) = self.others.pop() {
            tracing::info!(folder = %folder.display(), "another version's maps go: its programs are replaced");
            let retired = carry::retired(folder.parent().unwrap_or(&folder));
            fs::rename(&folder, &retired).map_err(|reason| pin_error("renaming", &folder, reason))?;
            remove_folder(&retired)?;
        }
        self.carried = None;
        Ok(())
    }

    /// Removes the maps again that [`Object::load`] made beside another version's. For a start that has
    /// failed before anything was attached.
    ///
    /// # Errors
    /// Where a pin can't be removed.
    pub fn abandon(self) -> Result<(), ObjectError> {
        if self.maps_taken_over {
            return Ok(());
        }
        // They hold the maps.
        self.maps_dir.parent().map_or(Ok(()), |bpffs_dir| remove_programs(bpffs_dir, |_| false))?;
        remove_folder(&self.maps_dir)
    }

    /// Carries over from each other version to this one's maps.
    fn carry(&self, how: impl Fn(&Carried, &Carried)) {
        if let Some(own) = &self.carried {
            self.others.iter().filter_map(|other| other.carried.as_ref()).for_each(|other| how(own, other));
        }
    }

    /// Pins again what somebody has unpinned, and returns the names of those maps. Programs and this
    /// instance hold them all the while; without the pin the next instance would begin anew.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn repin_maps(&self) -> Result<Vec<String>, ObjectError> {
        let mut again = Vec::new();
        for (path, map) in self.pinned.iter().filter(|(path, _)| !path.exists()) {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder).map_err(|reason| pin_error("creating", folder, reason))?;
            }
            map.pin(path).map_err(|reason| pin_error("pinning", path, io::Error::other(reason)))?;
            again.extend(path.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
        Ok(again)
    }

    /// Removes the pins of links that lead nowhere: their interface has gone, or somebody detached
    /// them.
    ///
    /// # Errors
    /// Where a pin can't be removed.
    pub fn remove_dead_links(&self) -> Result<(), ObjectError> {
        for path in links_of(&self.links_dir) {
            if pinned_target(&path).map_err(|reason| pin_error("opening", &path, reason))? == Some(0) {
                fs::remove_file(&path).map_err(|reason| pin_error("removing", &path, reason))?;
            }
        }
        Ok(())
    }

    /// Refuses an interface whose XDP hook has somebody else's program, where it is to have ours, or
    /// has one of another instance.
    ///
    /// # Errors
    /// In these cases.
    pub fn refuse_foreign(&self, link: &Link, xdp: XdpChoice) -> Result<(), ObjectError> {
        match self.foreign_xdp(link) {
            Some((id, program))
                if matches!(xdp, XdpChoice::Native | XdpChoice::Generic) || program.starts_with(PREFIX) =>
            {
                Err(ObjectError::ForeignProgram { interface: link.name.clone(), program, id })
            }
            _ => Ok(()),
        }
    }

    /// Id and name of somebody else's program on the XDP hook of an interface.
    fn foreign_xdp(&self, link: &Link) -> Option<(u32, String)> {
        let id = link.xdp_program?;
        let ours = XdpHook::ALL
            .iter()
            .any(|hook| pinned_target(&self.pin(link.index, hook.pin())).ok().flatten() == Some(link.index));
        if ours {
            return None;
        }
        Some((id, program_name(id).unwrap_or_else(|| "?".to_owned())))
    }

    /// Tells whether the maps were there before, with all that they hold.
    #[must_use]
    pub const fn maps_taken_over(&self) -> bool {
        self.maps_taken_over
    }

    /// Tells whether maps were there before, this version's or another's, and programs may run.
    #[must_use]
    pub fn takes_over(&self) -> bool {
        self.maps_taken_over || !self.others.is_empty()
    }

    /// The memory of an array map made with `BPF_F_MMAPABLE`.
    ///
    /// # Errors
    /// Where there is no such map, or it can't be mapped.
    pub fn shared<T: Pod>(&self, map: &'static str) -> Result<SharedArray<T>, ObjectError> {
        let Some(aya::maps::Map::Array(data)) = self.ebpf.map(map) else {
            return Err(ObjectError::Missing { kind: "array map", name: map.to_owned() });
        };
        let info = data.info().map_err(|reason| ObjectError::map(map, reason))?;
        assert_eq!(info.value_size() as usize, size_of::<T>(), "value size of map {map}");
        SharedArray::of_map(data.fd().as_fd(), info.max_entries())
            .map_err(|reason| ObjectError::Memory { map, reason })
    }

    /// The maps that hold rules.
    ///
    /// # Errors
    /// As [`Object::shared`].
    pub fn rule_maps(&self) -> Result<super::classifier::Maps, ObjectError> {
        Ok(super::classifier::Maps {
            half: self.shared("rule_half")?,
            tables: self.shared("tables")?,
            words: self.shared("rule_words")?,
            slots: self.shared("rule_slots")?,
            rules: self.shared("rules")?,
            extras: self.shared("rule_extras")?,
        })
    }

    /// Takes a map out of the object, as one of aya's types.
    ///
    /// # Errors
    /// Where there is none, or it is of another type.
    pub fn take<M>(&mut self, map: &'static str) -> Result<M, ObjectError>
    where
        M: TryFrom<aya::maps::Map, Error = MapError>,
    {
        let missing = || ObjectError::Missing { kind: "map", name: map.to_owned() };
        let data = self.ebpf.take_map(map).ok_or_else(missing)?;
        M::try_from(data).map_err(|reason| ObjectError::map(map, reason))
    }

    /// Attaches the programs of an interface, or takes over the links that are pinned for it. What is
    /// attached already is left as it is, but for its program, which becomes this object's.
    ///
    /// # Errors
    /// Where the kernel refuses; programs that were attached stay attached.
    pub fn attach(&mut self, interface: &Link, hooks: Hooks) -> Result<Attachment, ObjectError> {
        self.refuse_foreign(interface, hooks.xdp)?;
        fs::create_dir_all(&self.links_dir)
            .map_err(|reason| pin_error("creating", &self.links_dir, reason))?;
        let place = Place { link: interface };
        // Egress first and ingress before XDP: a packet that carries an answer finds its reader.
        let (tcx, egress_kept) = self.attach_tc(place, hooks, Judge::Egress, TcAttachType::Egress)?;
        if !hooks.judges {
            self.remove_xdp(interface, &XdpHook::ALL)?;
            self.remove_ingress(interface)?;
            let judge = Judge::Egress;
            return Ok(Attachment { judge, why: Why::Nat, tcx, taken_over: egress_kept });
        }
        let xdp = if interface.framing == Framing::Ethernet { hooks.xdp } else { XdpChoice::Off };
        let foreign = self.foreign_xdp(interface);
        let mut why = match &foreign {
            _ if interface.framing != Framing::Ethernet => Why::NoEthernet,
            _ if hooks.xdp != XdpChoice::Auto => Why::Configured,
            Some((id, _)) => Why::Foreign { id: *id },
            None => Why::Best,
        };
        let tried: &[XdpHook] = match xdp {
            XdpChoice::Native => &[XdpHook::Native],
            XdpChoice::Generic => &[XdpHook::Generic],
            XdpChoice::Off => &[],
            XdpChoice::Auto if foreign.is_some() => &[],
            // Not in the stack: what tc ingress does there costs less (ADR 0012).
            XdpChoice::Auto => &[XdpHook::Native],
        };
        let unwanted: Vec<_> = XdpHook::ALL.into_iter().filter(|hook| !tried.contains(hook)).collect();
        self.remove_xdp(interface, &unwanted)?;
        if !tried.is_empty() {
            let behind = Judge::Xdp(XdpHook::Native);
            let (_, ingress_kept) = self.attach_tc(place, hooks, behind, TcAttachType::Ingress)?;
            match self.attach_xdp(place, xdp_program(hooks.role), tried) {
                Ok((hook, xdp_kept)) => {
                    let taken_over = egress_kept || ingress_kept || xdp_kept;
                    return Ok(Attachment { judge: Judge::Xdp(hook), why, tcx, taken_over });
                }
                Err(error) if xdp == XdpChoice::Auto => {
                    why = Why::Refused { errno: error.errno() };
                    tracing::info!(interface = interface.name, %error, "no native XDP: tc ingress judges");
                }
                Err(error) => return Err(error),
            }
        }
        let (_, ingress_kept) = self.attach_tc(place, hooks, Judge::Tc, TcAttachType::Ingress)?;
        Ok(Attachment { judge: Judge::Tc, why, tcx, taken_over: egress_kept || ingress_kept })
    }

    /// Takes our XDP programs off, which an earlier configuration attached.
    fn remove_xdp(&self, interface: &Link, hooks: &[XdpHook]) -> Result<(), ObjectError> {
        remove_xdp_pins(&self.links_dir, interface, hooks)
    }

    /// Takes our program off tc ingress, likewise.
    fn remove_ingress(&self, interface: &Link) -> Result<(), ObjectError> {
        remove_pin(&self.pin(interface.index, clsact::name(TcAttachType::Ingress)))?;
        remove_filter(interface, TcAttachType::Ingress)
            .map_err(|source| ObjectError::Hooks { interface: interface.name.clone(), source })
    }

    /// Replaces the program of an interface that judges by one that also tells of packets, or puts the
    /// plain one back. No packet is missed in between.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn trace(
        &mut self,
        interface: &Link,
        hooks: Hooks,
        attachment: Attachment,
        on: bool,
    ) -> Result<(), ObjectError> {
        let place = Place { link: interface };
        match attachment.judge {
            Judge::Xdp(hook) => {
                let program = match (hooks.role, on) {
                    (Role::Lan, true) => "qos_trace_lan",
                    (Role::Wan, true) => "qos_trace_wan",
                    (role, false) => xdp_program(role),
                };
                load(program, self.program(program)?)?;
                self.attach_xdp(place, program, &[hook]).map(drop)
            }
            Judge::Tc => {
                let program = match (hooks.role, on) {
                    (Role::Lan, true) => "qos_trace_j_lan",
                    (Role::Wan, true) => "qos_trace_j_wan",
                    (role, false) => Judge::Tc.tc_program(role, TcAttachType::Ingress),
                };
                load(program, self.program(program)?)?;
                self.attach_tc_program(place, hooks.tc, program, TcAttachType::Ingress).map(drop)
            }
            // Egress meets what others have judged too.
            Judge::Egress => Ok(()),
        }
    }

    /// The reader of what tracing programs tell; there is one.
    ///
    /// # Errors
    /// Where it was taken before.
    pub(super) fn tracer(&mut self) -> Result<Tracer, ObjectError> {
        Tracer::new(&mut self.ebpf)
            .map_err(|_| ObjectError::Missing { kind: "map", name: "AYA_LOGS".to_owned() })
    }

    /// Names the hooks of an interface that have lost our program.
    #[must_use]
    pub fn missing(&self, interface: &Link, role: Role, attachment: Attachment) -> Vec<&'static str> {
        let index = interface.index;
        let is_pinned = |hook| pinned_target(&self.pin(index, hook)).ok().flatten() == Some(index);
        let mut missing = Vec::new();
        if let Judge::Xdp(hook) = attachment.judge
            && !is_pinned(hook.pin())
        {
            missing.push("xdp");
        }
        for &side in attachment.judge.sides() {
            let is_there = if attachment.tcx {
                is_pinned(clsact::name(side))
            } else {
                let program = attachment.judge.tc_program(role, side);
                match Clsact::open(interface).and_then(|hooks| hooks.filter(side)) {
                    Ok(found) => {
                        found.is_some_and(|found| Some(found.program) == self.tc_program_id(program))
                    }
                    // What can't be asked is not known to be missing.
                    Err(_) => true,
                }
            };
            if !is_there {
                missing.push(if side == TcAttachType::Ingress { "tc ingress" } else { "tc egress" });
            }
        }
        missing
    }

    /// Id of a program for a tc hook.
    fn tc_program_id(&self, program: &str) -> Option<u32> {
        match self.ebpf.program(program) {
            Some(Program::SchedClassifier(program)) => program.info().ok().map(|info| info.id()),
            _ => None,
        }
    }

    /// Descriptor of a loaded program, for a table of tail calls.
    ///
    /// # Errors
    /// Where there is no such program.
    pub fn program_fd(&self, program: &'static str) -> Result<&ProgramFd, ObjectError> {
        let fd = match self.ebpf.program(program) {
            Some(Program::Xdp(program)) => program.fd().ok(),
            Some(Program::SchedClassifier(program)) => program.fd().ok(),
            _ => None,
        };
        fd.ok_or_else(|| ObjectError::Missing { kind: "program", name: program.to_owned() })
    }

    /// Runs a program on a packet that is not sent (`BPF_PROG_TEST_RUN`), `repeat` times. Returns its
    /// verdict and the time of one run in ns. Maps are used as by any packet.
    ///
    /// # Errors
    /// Where the kernel refuses the packet: it takes those of 14 bytes to about a page.
    pub fn run(
        &mut self,
        program: &'static str,
        packet: &[u8],
        repeat: u32,
    ) -> Result<(u32, u64), ObjectError> {
        let run_error = |reason| ObjectError::Run { program, reason: Box::new(reason) };
        let options = TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::default() };
        let result = match self.ebpf.program_mut(program) {
            Some(Program::Xdp(program)) => program.test_run(options),
            Some(Program::SchedClassifier(program)) => program.test_run(options),
            _ => return Err(ObjectError::Missing { kind: "program", name: program.to_owned() }),
        }
        .map_err(run_error)?;
        Ok((result.return_value, u64::from(result.duration.subsec_nanos())))
    }

    /// Runs the program that explains on a packet. It writes its answer into a map.
    ///
    /// # Errors
    /// As [`Object::run`].
    pub fn explain(&mut self, packet: &[u8]) -> Result<(), ObjectError> {
        self.run("qos_explain", packet, 1).map(|_| ())
    }

    fn attach_xdp(
        &mut self,
        place: Place<'_>,
        program: &'static str,
        hooks: &[XdpHook],
    ) -> Result<(XdpHook, bool), ObjectError> {
        for &hook in hooks {
            let pin = self.pin(place.link.index, hook.pin());
            if let Some(link) = take_pinned(&pin, place.link.index)? {
                self.carry(Carried::set_clocks);
                let link = XdpLink::try_from(link).map_err(|reason| place.error(program, &reason))?;
                let xdp: &mut Xdp = self.program(program)?;
                let id = xdp.attach_to_link(link).map_err(|reason| place.error(program, &reason))?;
                // The pin holds it; were it held here too, removing the pin would not end it.
                drop(xdp.take_link(id).map_err(|reason| place.error(program, &reason))?);
                self.carry(Carried::set_clocks);
                return Ok((hook, true));
            }
        }
        let index = place.link.index;
        let xdp: &mut Xdp = self.program(program)?;
        let mut first_error = None;
        let attached = hooks.iter().find_map(|&hook| match xdp.attach_to_if_index(index, hook.mode()) {
            Ok(id) => Some((id, hook)),
            Err(error) => {
                // The first reason is the one that matters.
                first_error.get_or_insert_with(|| place.error(program, &error));
                None
            }
        });
        let Some((id, hook)) = attached else {
            return Err(first_error.unwrap_or_else(|| place.error(program, &io::Error::other("no hook"))));
        };
        let link = xdp.take_link(id).map_err(|reason| place.error(program, &reason))?;
        let link = FdLink::try_from(link).map_err(|reason| place.error(program, &reason))?;
        link.pin(self.pin(index, hook.pin())).map_err(|reason| place.error(program, &reason))?;
        Ok((hook, false))
    }

    fn attach_tc(
        &mut self,
        place: Place<'_>,
        hooks: Hooks,
        judge: Judge,
        side: TcAttachType,
    ) -> Result<(bool, bool), ObjectError> {
        let attached = self.attach_tc_program(place, hooks.tc, judge.tc_program(hooks.role, side), side);
        self.carry(Carried::set_clocks);
        attached
    }

    fn attach_tc_program(
        &mut self,
        place: Place<'_>,
        hooks: TcHooks,
        program: &'static str,
        side: TcAttachType,
    ) -> Result<(bool, bool), ObjectError> {
        let pin = self.pin(place.link.index, clsact::name(side));
        let old = take_pinned(&pin, place.link.index)?;
        self.carry(Carried::set_clocks);
        if hooks == TcHooks::Clsact {
            let kept = self.attach_clsact(place, program, side)?;
            if old.is_some() {
                fs::remove_file(&pin).map_err(|reason| pin_error("removing", &pin, reason))?;
            }
            return Ok((false, kept || old.is_some()));
        }
        let classifier: &mut SchedClassifier = self.program(program)?;
        if let Some(link) = old {
            let link = SchedClassifierLink::try_from(link).map_err(|reason| place.error(program, &reason))?;
            let id = classifier.attach_to_link(link).map_err(|reason| place.error(program, &reason))?;
            drop(classifier.take_link(id).map_err(|reason| place.error(program, &reason))?);
            return Ok((true, true));
        }
        let options = TcAttachOptions::TcxOrder(LinkOrder::default());
        match classifier.attach_with_options(&place.link.name, side, options) {
            Ok(id) => {
                let link = classifier.take_link(id).map_err(|reason| place.error(program, &reason))?;
                let link = FdLink::try_from(link).map_err(|reason| place.error(program, &reason))?;
                link.pin(pin).map_err(|reason| place.error(program, &reason))?;
                // The configuration may have said clsact before.
                remove_filter(place.link, side).map_err(|reason| place.error(program, &reason))?;
                Ok((true, false))
            }
            Err(reason) if lacks_tcx(&reason) => Ok((false, self.attach_clsact(place, program, side)?)),
            Err(reason) => Err(place.error(program, &reason)),
        }
    }

    /// Attaches by netlink to clsact, over our own filter if an earlier instance left it. Tells whether
    /// one did.
    fn attach_clsact(
        &mut self,
        place: Place<'_>,
        program: &'static str,
        side: TcAttachType,
    ) -> Result<bool, ObjectError> {
        let hooks = Clsact::open(place.link).map_err(|reason| place.error(program, &reason))?;
        let made = hooks.establish().map_err(|reason| place.error(program, &reason))?;
        let marker = self.pin(place.link.index, CLSACT);
        if made || fs::symlink_metadata(&marker).is_err() {
            // One of an interface that had this number before.
            let _ = fs::remove_file(&marker);
            let whose = if made { OURS } else { FOUND };
            symlink(whose, &marker).map_err(|reason| pin_error("creating", &marker, reason))?;
        }
        let found = hooks.filter(side).map_err(|reason| place.error(program, &reason))?;
        if let Some(filter) = found.as_ref().filter(|filter| !filter.is_ours()) {
            let foreign = ClsactError::Foreign { side: clsact::name(side), program: filter.program };
            return Err(place.error(program, &foreign));
        }
        let classifier: &mut SchedClassifier = self.program(program)?;
        let options = NlOptions { priority: clsact::PRIORITY, handle: TC_HANDLE, classid: None };
        let name = &place.link.name;
        let attached = if found.is_some() {
            SchedClassifierLink::attached(name, side, clsact::PRIORITY, TC_HANDLE, None)
                .map_err(ProgramError::IOError)
                .and_then(|link| classifier.attach_to_link(link))
        } else {
            classifier.attach_with_options(name, side, TcAttachOptions::Netlink(options))
        };
        let id = attached.map_err(|reason| match &reason {
            ProgramError::TcError(TcError::NetlinkError(error))
                if error.raw_os_error() == Some(libc::ENOENT) =>
            {
                place.error(program, &ClsactError::NoSuchClassifier)
            }
            _ => place.error(program, &reason),
        })?;
        // Dropping it would detach the filter.
        std::mem::forget(classifier.take_link(id).map_err(|reason| place.error(program, &reason))?);
        Ok(found.is_some())
    }

    fn program<'a, P>(&'a mut self, name: &'static str) -> Result<P, ObjectError>
    where
        P: TryFrom<&'a mut Program>,
    {
        self.ebpf
            .program_mut(name)
            .and_then(|program| P::try_from(program).ok())
            .ok_or_else(|| ObjectError::Missing { kind: "program", name: name.to_owned() })
    }

    fn pin(&self, index: u32, hook: &str) -> PathBuf {
        self.links_dir.join(format!("{index}_{hook}"))
    }
}

/// The program that judges what comes in.
const fn xdp_program(role: Role) -> &'static str {
    match role {
        Role::Lan => "qos_xdp_lan",
        Role::Wan => "qos_xdp_wan",
    }
}

/// Loads a program, unless it is loaded.
fn load(name: &str, program: &mut Program) -> Result<(), ObjectError> {
    let loaded = match program {
        Program::Xdp(program) if program.fd().is_err() => program.load(),
        Program::SchedClassifier(program) if program.fd().is_err() => program.load(),
        Program::Xdp(_) | Program::SchedClassifier(_) => Ok(()),
        other => panic!("program {name} of the embedded object has type {:?}", other.prog_type()),
    };
    loaded.map_err(|reason| ObjectError::Program { program: name.to_owned(), reason: Box::new(reason) })
}

/// Takes a program that is pinned; loads it where it is not, and pins it.
fn take_or_load(pin: &Path, name: &str, program: &mut Program) -> Result<(), ObjectError> {
    let program_error = |reason| ObjectError::Program { program: name.to_owned(), reason: Box::new(reason) };
    if !pin.exists() {
        load(name, program)?;
        return program.pin(pin).map_err(|reason| pin_error("pinning", pin, io::Error::other(reason)));
    }
    *program = match program {
        Program::Xdp(_) => Xdp::from_pin(pin, XdpAttachType::Interface).map(Program::Xdp),
        _ => SchedClassifier::from_pin(pin).map(Program::SchedClassifier),
    }
    .map_err(program_error)?;
    Ok(())
}

/// Removes the pins of XDP links of an interface, and waits until the kernel has taken their program off:
/// it does so some time after the pin has gone (bpf_free_inode, kernel/bpf/inode.c), and the hook takes no
/// other before.
fn remove_xdp_pins(links_dir: &Path, interface: &Link, hooks: &[XdpHook]) -> Result<(), ObjectError> {
    let pins = hooks.iter().map(|hook| links_dir.join(format!("{}_{}", interface.index, hook.pin())));
    let pins: Vec<_> = pins.filter(|pin| pin.exists()).collect();
    if pins.is_empty() {
        return Ok(());
    }
    let program = || Link::by_index(interface.index).ok().and_then(|link| link.xdp_program);
    let before = program();
    pins.iter().try_for_each(|pin| remove_pin(pin))?;
    let began = Instant::now();
    while before.is_some() && program() == before && began.elapsed() < TAKEN_OFF {
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Removes a pin, if it is there.
fn remove_pin(pin: &Path) -> Result<(), ObjectError> {
    match fs::remove_file(pin) {
        Err(reason) if reason.kind() != io::ErrorKind::NotFound => Err(pin_error("removing", pin, reason)),
        _ => Ok(()),
    }
}

/// Removes our filter on clsact, if there is one.
fn remove_filter(interface: &Link, side: TcAttachType) -> Result<(), ClsactError> {
    if Clsact::open(interface)?.filter(side)?.is_some_and(|filter| filter.is_ours()) {
        // Detached when dropped.
        drop(SchedClassifierLink::attached(&interface.name, side, clsact::PRIORITY, TC_HANDLE, None)?);
    }
    Ok(())
}

/// An interface, for messages.
#[derive(Clone, Copy)]
struct Place<'a> {
    link: &'a Link,
}

impl Place<'_> {
    fn error(self, program: &'static str, reason: &dyn std::error::Error) -> ObjectError {
        // The library's errors name the call; the kernel's word stands in their source.
        let mut text = reason.to_string();
        let mut source = reason.source();
        let mut errno = None;
        while let Some(cause) = source {
            errno = errno.or_else(|| cause.downcast_ref::<io::Error>()?.raw_os_error());
            if !text.contains(&cause.to_string()) {
                text = format!("{text}: {cause}");
            }
            source = cause.source();
        }
        ObjectError::Attach { program, interface: self.link.name.clone(), reason: text, errno }
    }
}

/// The right to change what is pinned below `bpffs_dir`, until it is dropped or the process ends.
/// Makes the directory.
///
/// # Errors
/// Where another instance has it, or there is no BPF file system.
pub fn lock_pins(bpffs_dir: &Path) -> Result<Flock<File>, ObjectError> {
    mount_bpffs(bpffs_dir)?;
    fs::create_dir_all(bpffs_dir).map_err(|reason| pin_error("creating", bpffs_dir, reason))?;
    let folder = File::open(bpffs_dir).map_err(|reason| pin_error("opening", bpffs_dir, reason))?;
    Flock::lock(folder, FlockArg::LockExclusiveNonblock).map_err(|(_, reason)| match reason {
        nix::Error::EWOULDBLOCK => ObjectError::InUse(bpffs_dir.to_path_buf()),
        other => pin_error("locking", bpffs_dir, other.into()),
    })
}

/// Indices of the interfaces that have links or filters of ours, by what is below `bpffs_dir`.
///
/// # Errors
/// Where a pin can't be read.
pub fn pinned_interfaces(bpffs_dir: &Path) -> Result<BTreeSet<u32>, ObjectError> {
    let mut found = BTreeSet::new();
    for path in links_of(&links_dir(bpffs_dir)) {
        if fs::read_link(&path).is_ok() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            found.extend(name.split('_').next().and_then(|number| number.parse::<u32>().ok()));
            continue;
        }
        let target = pinned_target(&path).map_err(|reason| pin_error("opening", &path, reason))?;
        found.extend(target.filter(|index| *index != 0));
    }
    Ok(found)
}

/// Takes our programs off one interface, and the queueing discipline that was made for them.
///
/// # Errors
/// Where a pin can't be removed, or the kernel can't be asked.
pub fn remove_interface(bpffs_dir: &Path, interface: &Link) -> Result<(), ObjectError> {
    let prefix = format!("{}_", interface.index);
    let marker = links_dir(bpffs_dir).join(format!("{prefix}{CLSACT}"));
    let made = fs::read_link(&marker).is_ok_and(|target| target == Path::new(OURS));
    // XDP goes before what reads its answers.
    remove_xdp_pins(&links_dir(bpffs_dir), interface, &XdpHook::ALL)?;
    for path in links_of(&links_dir(bpffs_dir)) {
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)) {
            fs::remove_file(&path).map_err(|reason| pin_error("removing", &path, reason))?;
        }
    }
    let filters = SIDES.into_iter().try_for_each(|side| remove_filter(interface, side));
    let hooks = filters.and_then(|()| Clsact::open(interface));
    hooks
        .and_then(|hooks| if made { hooks.remove_unused() } else { Ok(()) })
        .map_err(|source| ObjectError::Hooks { interface: interface.name.clone(), source })
}

fn links_dir(bpffs_dir: &Path) -> PathBuf {
    bpffs_dir.join("links")
}

/// Paths of the pinned links.
fn links_of(links_dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(links_dir);
    entries.map_or_else(|_| Vec::new(), |entries| entries.flatten().map(|entry| entry.path()).collect())
}

/// Removes every pin below `bpffs_dir`. The kernel ends what nothing else holds: programs leave their
/// hooks, maps and clocks are gone. Filters on clsact are [`remove_interface`]'s.
///
/// # Errors
/// Where a pin can't be removed.
pub fn remove_pins(bpffs_dir: &Path) -> Result<(), ObjectError> {
    if !bpffs_dir.exists() {
        return Ok(());
    }
    remove_programs(bpffs_dir, |_| false)?;
    let other_folders = [links_dir(bpffs_dir), carry::retired(bpffs_dir)];
    for folder in other_folders.into_iter().chain(versions(bpffs_dir)?) {
        remove_folder(&folder)?;
    }
    remove_maps(bpffs_dir)
}

/// Removes the pins of this version's maps, and the folders that are empty then.
fn remove_maps(bpffs_dir: &Path) -> Result<(), ObjectError> {
    remove_programs(bpffs_dir, |_| false)?;
    remove_folder(&maps_dir(bpffs_dir))?;
    let _ = fs::remove_dir(links_dir(bpffs_dir));
    // The directory itself may be shared, or the mount point.
    if bpffs_dir != Path::new(BPFFS) {
        let _ = fs::remove_dir(bpffs_dir);
    }
    Ok(())
}

/// Removes a folder of pins, if it is there.
fn remove_folder(folder: &Path) -> Result<(), ObjectError> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let path = entry.path();
        fs::remove_file(&path).map_err(|reason| pin_error("removing", &path, reason))?;
    }
    fs::remove_dir(folder).map_err(|reason| pin_error("removing", folder, reason))
}

/// Folder of the programs of this object.
fn programs_dir(bpffs_dir: &Path) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    OBJECT.hash(&mut hasher);
    bpffs_dir.join(format!("{PROGRAMS}{:016x}", hasher.finish()))
}

/// Unpins programs, but in the folders that are to be kept. Those that are attached stay.
fn remove_programs(bpffs_dir: &Path, keeps: impl Fn(&PathBuf) -> bool) -> Result<(), ObjectError> {
    let Ok(entries) = fs::read_dir(bpffs_dir) else { return Ok(()) };
    let folders = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(PROGRAMS));
    let mut gone = folders.map(|entry| entry.path()).filter(|folder| !keeps(folder));
    gone.try_for_each(|folder| remove_folder(&folder))
}

/// Folder of this version's maps.
fn maps_dir(bpffs_dir: &Path) -> PathBuf {
    carry::folder(bpffs_dir, ABI_VERSION)
}

/// Folders of all versions' maps.
fn versions(bpffs_dir: &Path) -> Result<BTreeSet<PathBuf>, ObjectError> {
    carry::folders(bpffs_dir).map_err(|reason| pin_error("listing", bpffs_dir, reason))
}

/// Makes sure that `bpffs_dir` lies on a BPF file system, mounting the conventional one if need be.
fn mount_bpffs(bpffs_dir: &Path) -> Result<(), ObjectError> {
    let is_bpffs = |path: &Path| statfs(path).is_ok_and(|stat| stat.filesystem_type() == BPF_FS);
    let existing = |path: &Path| path.ancestors().find(|path| path.exists()).map(Path::to_path_buf);
    if existing(bpffs_dir).is_some_and(|path| is_bpffs(&path)) {
        return Ok(());
    }
    if !bpffs_dir.starts_with(BPFFS) {
        return Err(ObjectError::NotBpffs(bpffs_dir.to_path_buf()));
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
        .map_err(|reason| ObjectError::Mount { path: BPFFS.to_owned(), reason })
}

/// The maps that hold rules, as in [`Object::rule_maps`].
pub const RULE_MAPS: [&str; 6] = ["rule_half", "tables", "rule_words", "rule_slots", "rules", "rule_extras"];

/// Key size, value size and length of a map.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shape {
    key: u32,
    value: u32,
    length: u32,
}

impl Shape {
    fn of(map: &MapInfo) -> Self {
        Self { key: map.key_size(), value: map.value_size(), length: map.max_entries() }
    }

    fn of_pin(path: &Path) -> Result<Self, ObjectError> {
        MapInfo::from_pin(path)
            .map(|info| Self::of(&info))
            .map_err(|reason| pin_error("opening", path, io::Error::other(reason.to_string())))
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "keys of {} bytes, values of {}, {} of them", self.key, self.value, self.length)
    }
}

/// Shapes of the object's maps that are kept across restarts.
fn shapes(max_rules: u32) -> Result<BTreeMap<String, Shape>, ObjectError> {
    // A block of records for each CPU, and one for what is carried over from other versions.
    let blocks = possible_cpus() + 1;
    let lengths = [
        ("counters", ALLOCATION_SLOTS * 2 * blocks),
        ("prov_counters", PROVIDER_SLOTS * 2 * blocks),
        ("outcomes", blocks),
        ("rule_words", HALVES * word_room(max_rules) / 2),
        ("rule_slots", HALVES * slot_room(max_rules)),
        ("rules", HALVES * rule_room(max_rules)),
    ];
    let object = aya_obj::Object::parse(OBJECT)
        .map_err(|reason| ObjectError::Load(Box::new(aya::EbpfError::ParseError(reason))))?;
    // Sections of the compiler, and the log of a trace, begin with a dot or in capitals.
    let kept = |name: &str| name.starts_with(|c: char| c.is_ascii_lowercase());
    Ok(object
        .maps
        .into_iter()
        .filter(|(name, _)| kept(name))
        .map(|(name, map)| {
            let own = lengths.iter().find(|(other, _)| *other == name);
            let length = own.map_or(map.max_entries(), |(_, length)| *length);
            (name, Shape { key: map.key_size(), value: map.value_size(), length })
        })
        .collect())
}

/// Unpins the maps of rules, all of them, where one was made for another number of rules. What they hold is
/// laid out anew at each start.
fn remove_rules_of_another_length(
    maps_dir: &Path,
    shapes: &BTreeMap<String, Shape>,
) -> Result<(), ObjectError> {
    let pins = RULE_MAPS.map(|name| (maps_dir.join(name), shapes.get(name)));
    let there: Vec<_> = pins.iter().filter(|(path, _)| path.exists()).collect();
    let mut differs = false;
    for (path, shape) in &there {
        let found = Shape::of_pin(path)?;
        differs |= shape.is_some_and(|shape| {
            (found.key, found.value) == (shape.key, shape.value) && found.length != shape.length
        });
    }
    for (path, _) in there.iter().filter(|_| differs) {
        fs::remove_file(path).map_err(|reason| pin_error("removing", path, reason))?;
    }
    Ok(())
}

/// Tells whether a map is pinned at `path`, and refuses one of another shape: it would be read
/// beyond its end.
fn has_shape(path: &Path, expected: Shape) -> Result<bool, ObjectError> {
    if !path.exists() {
        return Ok(false);
    }
    let found = Shape::of_pin(path)?;
    if found == expected {
        return Ok(true);
    }
    Err(ObjectError::MapShape {
        path: path.to_path_buf(),
        found: found.to_string(),
        expected: expected.to_string(),
    })
}

/// Takes a pinned link, if it is one of this interface. A link of a device that has gone is removed.
fn take_pinned(pin: &Path, index: u32) -> Result<Option<FdLink>, ObjectError> {
    match pinned_target(pin).map_err(|reason| pin_error("opening", pin, reason))? {
        None => return Ok(None),
        Some(target) if target == index => {}
        Some(_) => {
            fs::remove_file(pin).map_err(|reason| pin_error("removing", pin, reason))?;
            return Ok(None);
        }
    }
    match PinnedLink::from_pin(pin) {
        Ok(link) => Ok(Some(FdLink::from(link))),
        Err(LinkError::SyscallError(error)) => Err(pin_error("opening", pin, error.io_error)),
        Err(other) => Err(pin_error("opening", pin, io::Error::other(other.to_string()))),
    }
}

/// Interface index that a pinned link is attached to; zero if it was detached, none if there is no
/// such pin. The kernel tells in the descriptor's fdinfo.
fn pinned_target(pin: &Path) -> io::Result<Option<u32>> {
    match link_field(pin, "ifindex:") {
        Ok(target) => Ok(Some(target.unwrap_or(0))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A number that the kernel tells of a pinned link; none: it does not tell that of this one.
fn link_field(pin: &Path, name: &str) -> io::Result<Option<u32>> {
    let fd = open_pin(pin)?;
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    Ok(text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()))
}

/// Ids of the programs that links of ours, pinned below `bpffs_dir`, hold on an interface. What can't be
/// read is left out.
pub fn pinned_programs(bpffs_dir: &Path, index: u32) -> BTreeSet<u32> {
    let prefix = format!("{index}_");
    let is_theirs =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix));
    let pins = links_of(&links_dir(bpffs_dir)).into_iter().filter(is_theirs);
    pins.filter_map(|pin| link_field(&pin, "prog_id:").ok().flatten()).collect()
}

/// Name of a loaded program, as far as the kernel keeps it; none where there is no such program, or
/// without CAP_SYS_ADMIN, which looking it up takes.
pub fn program_name(id: u32) -> Option<String> {
    let found = aya::programs::loaded_programs().flatten().find(|program| program.id() == id)?;
    found.name_as_str().filter(|name| !name.is_empty()).map(str::to_owned)
}

/// `BPF_OBJ_GET` of bpf(2): aya's own opens a link, but does not lend its descriptor.
fn open_pin(pin: &Path) -> io::Result<OwnedFd> {
    const BPF_OBJ_GET: libc::c_long = 7;
    #[repr(C)]
    struct Attributes {
        pathname: u64,
        bpf_fd: u32,
        file_flags: u32,
    }
    let path = std::ffi::CString::new(pin.as_os_str().as_bytes()).map_err(io::Error::other)?;
    let attributes = Attributes { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: the attributes and the path they point to outlive the call, which only reads them.
    let fd =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attributes, size_of::<Attributes>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Tells whether the kernel is too old for tcx (before 6.6).
fn lacks_tcx(error: &ProgramError) -> bool {
    matches!(error, ProgramError::SyscallError(error) if error.io_error.raw_os_error() == Some(libc::EINVAL))
}

/// CPUs that the kernel may ever use: it numbers them from zero.
fn possible_cpus() -> u32 {
    aya::util::nr_cpus().map_or(1, |cpus| cpus as u32)
}

fn pin_error(action: &'static str, path: &Path, reason: io::Error) -> ObjectError {
    ObjectError::Pin { action, path: path.to_path_buf(), reason }
}

#[cfg(test)]
mod tests {
    use qos_common::abi::{MAX_RULES, MAX_RULES_RANGE};

    use super::*;

    /// A pin directory of this test's own, removed when dropped.
    struct Pins(PathBuf);

    impl Pins {
        fn new(name: &str) -> Self {
            Self(PathBuf::from(BPFFS).join(format!("qos-test-{}-{name}", std::process::id())))
        }
    }

    impl Drop for Pins {
        fn drop(&mut self) {
            remove_pins(&self.0).expect("pins are removed");
        }
    }

    #[test]
    fn the_file_has_what_the_kernel_asks_of_it() {
        let file = aya_obj::Object::parse(OBJECT).expect("an ELF file with BPF programs");
        assert_eq!(file.license.to_str(), Ok("Dual MIT/GPL"), "one that may call GPL-only helpers");
        assert!(file.btf.is_some() && file.btf_ext.is_some(), "type and line information");
        assert!(!file.programs.is_empty() && !file.maps.is_empty());
        for name in file.maps.keys().filter(|name| !name.starts_with('.')) {
            // BPF_OBJ_NAME_LEN of linux/bpf.h (6.1), the final zero included: a longer one is cut.
            assert!(name.len() < 16, "{name} is too long for the name of a map");
        }
    }

    #[cfg(not(feature = "next"))]
    #[test]
    fn maps_that_change_change_the_version() {
        let mut found = format!("version {ABI_VERSION}\n");
        let file = aya_obj::Object::parse(OBJECT).expect("an ELF file with BPF programs");
        let maps: BTreeMap<_, _> = file.maps.iter().collect();
        for (name, map) in maps.into_iter().filter(|(name, _)| name.starts_with(|c: char| c.is_lowercase())) {
            let shape = Shape { key: map.key_size(), value: map.value_size(), length: map.max_entries() };
            found.push_str(&format!("{name}: {shape}\n"));
        }
        for layout in carry::LAYOUTS.iter() {
            found.push_str(&format!("{}: {layout}\n", layout.map()));
        }
        let kept = include_str!("maps.txt");
        assert!(
            found == kept,
            "the maps have changed: raise ABI_VERSION (qos-common/src/abi.rs) if this version was ever \
             installed, and make qos-userspace/src/gateway/maps.txt this:\n{found}"
        );
    }

    #[test]
    #[ignore = "needs root"]
    fn every_program_passes_the_verifier() {
        let pins = Pins::new("load");
        let mut object = Object::load(&pins.0, MAX_RULES).expect("loads");
        for name in ["qos_trace_lan", "qos_trace_wan", "qos_trace_j_lan", "qos_trace_j_wan"] {
            let program = object.ebpf.program_mut(name).expect("is in the object");
            let is_loaded = match program {
                Program::Xdp(program) => program.fd().is_ok(),
                Program::SchedClassifier(program) => program.fd().is_ok(),
                other => panic!("{name} has type {:?}", other.prog_type()),
            };
            assert!(!is_loaded, "{name} is loaded when somebody traces");
            load(name, program).unwrap_or_else(|error| panic!("{error}"));
        }
        let names: Vec<_> = object.ebpf.programs().map(|(name, _)| name.to_owned()).collect();
        for name in [
            "qos_xdp_lan",
            "qos_xdp_wan",
            "qos_ingress",
            "qos_judge_lan",
            "qos_judge_wan",
            "qos_egress_lan",
            "qos_egress_wan",
            "qos_explain",
        ] {
            assert!(names.iter().any(|other| other == name), "{name} is in the object: {names:?}");
        }
        for (name, program) in object.ebpf.programs() {
            let info = match program {
                Program::Xdp(program) => program.info(),
                Program::SchedClassifier(program) => program.info(),
                other => panic!("{name} has type {:?}", other.prog_type()),
            }
            .expect("info");
            println!("{name}: {:?} instructions verified", info.verified_instruction_count());
        }
    }

    #[test]
    #[ignore = "needs root"]
    fn maps_are_taken_over_and_another_shape_is_refused() {
        let pins = Pins::new("maps");
        let first = Object::load(&pins.0, MAX_RULES).expect("loads");
        assert!(!first.maps_taken_over());
        first
            .shared::<qos_common::abi::Clocks>("clocks")
            .expect("maps")
            .write(5, qos_common::abi::Clocks { guaranteed: 77, ..Default::default() });
        drop(first);
        let second = Object::load(&pins.0, MAX_RULES).expect("loads again");
        assert!(second.maps_taken_over());
        assert_eq!(second.shared::<qos_common::abi::Clocks>("clocks").expect("maps").read(5).guaranteed, 77);
        drop(second);
        // Rules for which there is another number of places go anew, and nothing else does.
        for most in [MAX_RULES / 2, *MAX_RULES_RANGE.end(), MAX_RULES] {
            let other = Object::load(&pins.0, most).expect("loads with another number of rules");
            assert_eq!(other.rule_maps().expect("maps").most(), most);
            assert!(other.maps_taken_over());
            let clocks = other.shared::<qos_common::abi::Clocks>("clocks").expect("maps");
            assert_eq!(clocks.read(5).guaranteed, 77);
        }
        let settings = maps_dir(&pins.0).join("settings");
        fs::remove_file(&settings).expect("removes");
        aya::maps::Array::<_, u64>::create(3, 0)
            .expect("creates")
            .pin(&settings)
            .expect("pins a map of another shape");
        let error = Object::load(&pins.0, MAX_RULES).expect_err("another shape").to_string();
        assert!(error.contains("values of 8, 3 of them") && error.contains("qos detach"), "{error}");
    }

    #[test]
    #[ignore = "needs root"]
    fn a_directory_off_bpffs_is_refused() {
        let error =
            Object::load(Path::new("/tmp/qos-not-bpffs"), MAX_RULES).expect_err("not a bpffs").to_string();
        assert!(error.contains("is not on a BPF file system"), "{error}");
    }
}
