//! `qos doctor`: looks at everything that has to be right and says what is not, and what to do.
//!
//! Looking changes nothing on the host. Whether a scheduler exists is tried in a network namespace
//! that is made for it and gone afterwards: module lists do not say what is built in, nor what loads.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, access};
use qos_common::length::{self, LinkLayer};
use serde::{Deserialize, Serialize};

use super::types::Status;
use crate::config::Config;
use crate::gateway::InterfaceConfig;
use crate::gateway::link::{Framing, Link, LinkError};
use crate::gateway::netlink::{NetlinkError, Refusal, RouteSocket};
use crate::gateway::port::Port;
use crate::manager::State;

/// Oldest kernel that works.
const OLDEST_KERNEL: (u32, u32) = (6, 1);
/// Space that the store should have, in bytes.
const LEAST_SPACE: u64 = 64 << 20;
/// Share of a table above which it counts as nearly full, in percent.
const NEARLY_FULL: u64 = 90;

/// What a check says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// It works, but not as well as it could, or it could not be looked at.
    Warning,
    /// It does not work.
    Error,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it is.
    pub severity: Severity,
    /// What was found.
    pub found: String,
    /// What to do.
    pub mend: Option<String>,
}

impl Check {
    fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self { name: name.into(), severity: Severity::Ok, found: found.into(), mend: None }
    }

    fn warning(name: impl Into<String>, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name: name.into(), severity: Severity::Warning, found: found.into(), mend: Some(mend.into()) }
    }

    fn error(name: impl Into<String>, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { severity: Severity::Error, ..Self::warning(name, found, mend) }
    }
}

/// What can be seen without a daemon. Without a configuration the machine only.
#[must_use]
pub fn local(config: Option<&Config>) -> Vec<Check> {
    let mut checks = vec![privileges(), kernel(), btf(), jit(), forwarding()];
    checks.extend(schedulers());
    let Some(config) = config else {
        checks.push(Check::warning(
            "configuration",
            "none was given, so interfaces and directories are not looked at",
            "name it with --config",
        ));
        return checks;
    };
    checks.push(bpffs(&config.gateway.bpffs_dir));
    checks.extend(interfaces(&config.gateway.interfaces));
    checks.push(state_dir(&config.state_dir));
    checks.push(socket(&config.socket));
    checks
}

/// What the daemon's own status says.
#[must_use]
pub fn daemon(status: &Status) -> Vec<Check> {
    let gateway = &status.gateway;
    let mut checks = Vec::new();

    let observing = gateway.mode == "observe";
    checks.push(if observing {
        Check::warning(
            "mode",
            "observe: nothing is dropped, delayed or marked",
            "set mode = \"enforce\" when you have seen enough, and restart qosd",
        )
    } else {
        Check::ok("mode", gateway.mode.as_str())
    });

    for interface in &gateway.interfaces {
        let name = format!("programs on {}", interface.name);
        let found = format!("xdp {}, tc {}, scheduler {}", interface.xdp, interface.tc, interface.scheduler);
        let missing = interface.xdp == "none"
            || interface.tc == "none"
            || (interface.scheduler == "none" && !observing);
        checks.push(if interface.index.is_none() {
            Check::error(name, "the interface does not exist", "make it; qosd attaches to it by itself")
        } else if missing {
            Check::error(name, found, "run `qos reconcile` and see what qosd logs")
        } else if interface.xdp == "generic" {
            Check::warning(
                name,
                found,
                "the driver has no native XDP: it works, at a lower packet rate and without GRO",
            )
        } else {
            Check::ok(name, found)
        });
    }

    for (name, (used, size), mend) in [
        ("rules", gateway.rules, "use fewer selectors, or wider ones"),
        ("allocations in the kernel", gateway.allocations, "revoke what is not needed"),
    ] {
        let found = format!("{used} of {size}");
        let nearly_full = u64::from(used) * 100 >= u64::from(size) * NEARLY_FULL;
        checks.push(if nearly_full { Check::warning(name, found, mend) } else { Check::ok(name, found) });
    }

    checks.push(match (&status.reconcile_error, gateway.repairs.last()) {
        (Some(error), _) => Check::error("kernel equals state", error.as_str(), "see what qosd logs"),
        (None, Some(last)) => Check::warning(
            "kernel equals state",
            format!("it does; {} repairs since the start, the last: {}", gateway.repairs.len(), last.what),
            "find out who else changes qdiscs, maps or programs on these interfaces",
        ),
        (None, None) => Check::ok("kernel equals state", "nothing had to be repaired"),
    });
    checks
}

/// What the lines say of packets: on ATM the last cell of a full packet may be nearly empty.
#[must_use]
pub fn lines(state: &State) -> Vec<Check> {
    const NAME: &str = "ATM cells";
    let mtu = state.network.mtu;
    let mut lines = BTreeMap::<i16, usize>::new();
    for session in state.sessions.values().filter(|session| session.link_layer == LinkLayer::Atm) {
        *lines.entry(session.overhead).or_default() += 1;
    }
    let advice = |(overhead, lines): (i16, usize)| {
        let unused = length::unused_in_cells(mtu, overhead);
        let found = format!("{lines} lines with an overhead of {overhead} bytes: a packet of {mtu} bytes");
        match length::largest_in_whole_cells(mtu, overhead) {
            Some(fits) if unused > 0 => Check::warning(
                NAME,
                format!("{found} leaves {unused} bytes of its last cell empty"),
                format!("grant levels there with --mtu {fits}, whose packets fill their cells"),
            ),
            _ => Check::ok(NAME, format!("{found} fills its cells")),
        }
    };
    lines.into_iter().map(advice).collect()
}

/// The worst of all checks.
#[must_use]
pub fn worst(checks: &[Check]) -> Severity {
    checks.iter().map(|check| check.severity).max().unwrap_or(Severity::Ok)
}

fn privileges() -> Check {
    const NAME: &str = "privileges";
    match missing_capabilities() {
        None => Check::warning(NAME, "/proc/self/status does not tell", "mount /proc"),
        Some(missing) if missing.is_empty() => Check::ok(NAME, "all that qosd needs"),
        Some(missing) => Check::error(
            NAME,
            format!("this process lacks {}", missing.join(", ")),
            "run as root, or start qosd and let it look: `qos doctor` asks it",
        ),
    }
}

/// Capabilities that qosd needs and this process lacks; none: the system does not tell.
pub(crate) fn missing_capabilities() -> Option<Vec<&'static str>> {
    // include/uapi/linux/capability.h
    const NEEDED: [(&str, u32); 3] = [("CAP_NET_ADMIN", 12), ("CAP_PERFMON", 38), ("CAP_BPF", 39)];
    const CAP_SYS_ADMIN: u32 = 21;
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let held = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    let held = u64::from_str_radix(held.trim(), 16).ok()?;
    let has = |capability: u32| held & 1 << capability != 0;
    let missing = NEEDED
        .iter()
        .filter(|(_, number)| !(has(*number) || has(CAP_SYS_ADMIN) && *number > CAP_SYS_ADMIN))
        .map(|(name, _)| *name);
    Some(missing.collect())
}

fn kernel() -> Check {
    const NAME: &str = "kernel";
    let release = match nix::sys::utsname::uname() {
        Ok(name) => name.release().to_string_lossy().into_owned(),
        Err(error) => return Check::warning(NAME, format!("its release can't be read: {error}"), "none"),
    };
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST_KERNEL => Check::ok(NAME, release),
        (Some(_), Some(_)) => Check::error(
            NAME,
            format!("{release} is too old"),
            format!("boot Linux {}.{} or later", OLDEST_KERNEL.0, OLDEST_KERNEL.1),
        ),
        _ => Check::warning(NAME, format!("{release} is no release as Linux has them"), "check it yourself"),
    }
}

fn btf() -> Check {
    const NAME: &str = "BTF";
    const FILE: &str = "/sys/kernel/btf/vmlinux";
    if Path::new(FILE).exists() {
        Check::ok(NAME, FILE)
    } else {
        Check::error(NAME, format!("{FILE} is missing"), "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y")
    }
}

fn jit() -> Check {
    const NAME: &str = "BPF JIT";
    const FILE: &str = "/proc/sys/net/core/bpf_jit_enable";
    match fs::read_to_string(FILE) {
        Ok(text) if text.trim() == "0" => Check::warning(
            NAME,
            "off: programs are interpreted, several times slower",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        Ok(_) => Check::ok(NAME, "on"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Check::ok(NAME, "can't be seen from this network namespace")
        }
        Err(error) => Check::warning(NAME, format!("{FILE} can't be read: {error}"), "run as root"),
    }
}

fn forwarding() -> Check {
    const NAME: &str = "forwarding";
    let off: Vec<_> = [
        ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
        ("net.ipv6.conf.all.forwarding", "/proc/sys/net/ipv6/conf/all/forwarding"),
    ]
    .into_iter()
    .filter(|(_, file)| fs::read_to_string(file).is_ok_and(|text| text.trim() == "0"))
    .map(|(name, _)| name)
    .collect();
    match off.as_slice() {
        [] => Check::ok(NAME, "on"),
        names => Check::warning(
            NAME,
            format!("off: {}", names.join(", ")),
            "where this box routes that family: sysctl -w NAME=1",
        ),
    }
}

/// Whether the kernel has the schedulers that are used.
fn schedulers() -> Vec<Check> {
    let trial = thread::Builder::new().name("qos-doctor".to_owned()).spawn(|| {
        // Only this thread enters the namespace, which goes when the thread ends.
        unshare(CloneFlags::CLONE_NEWNET)?;
        // HTB: TCA_HTB_INIT with struct tc_htb_glob {version 3, rate2quantum 10, 0, 0, 0}.
        let glob: Vec<u8> = [3_u32, 10, 0, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        const TCA_HTB_INIT: u16 = 2;
        Ok::<_, nix::Error>([
            ("htb", try_qdisc("htb", vec![TcOption::Other(DefaultNla::new(TCA_HTB_INIT, glob))])),
            ("fq_codel", try_qdisc("fq_codel", Vec::new())),
            ("bfifo", try_qdisc("bfifo", Vec::new())),
        ])
    });
    let results = trial.map_err(|error| error.to_string()).and_then(|thread| match thread.join() {
        Ok(results) => results.map_err(|error| error.to_string()),
        Err(_) => Err("the trial failed".to_owned()),
    });
    let results = match results {
        Ok(results) => results,
        // As the packaged service runs: with all that qosd needs, and no more.
        Err(_) if missing_capabilities().is_some_and(|missing| missing.is_empty()) => {
            let found = "not tried, which takes CAP_SYS_ADMIN; `programs on` tells what is in use";
            return vec![Check::ok("schedulers", found)];
        }
        Err(error) => {
            return vec![Check::warning(
                "schedulers",
                format!("not looked at: cannot make a network namespace: {error}"),
                "run as root",
            )];
        }
    };
    let fq_codel = results.iter().any(|(kind, result)| *kind == "fq_codel" && result.is_ok());
    results
        .into_iter()
        .map(|(kind, result)| {
            let name = format!("scheduler {kind}");
            let module = format!("install the module sch_{kind} of this kernel");
            let result = result.map_err(|error| match error {
                NetlinkError::Refused(Refusal { text: Some(text), .. }) => text,
                other => other.to_string(),
            });
            match (result, kind) {
                (Ok(()), _) => Check::ok(name, "there"),
                (Err(error), "fq_codel") => Check::warning(
                    name,
                    format!("not there ({error}): short queues without it, but flows of one class are not kept apart"),
                    module,
                ),
                (Err(error), "bfifo") if fq_codel => {
                    Check::ok(name, format!("not there ({error}), and not needed beside fq_codel"))
                }
                (Err(error), _) => Check::error(name, format!("not there: {error}"), module),
            }
        })
        .collect()
}

/// Puts a qdisc on the loopback of the thread's network namespace.
fn try_qdisc(kind: &str, options: Vec<TcOption>) -> Result<(), NetlinkError> {
    const LOOPBACK: i32 = 1;
    let mut message = TcMessage::with_index(LOOPBACK);
    message.header.parent = TcHandle::ROOT;
    message.attributes.push(TcAttribute::Kind(kind.to_owned()));
    if !options.is_empty() {
        message.attributes.push(TcAttribute::Options(options));
    }
    let request = RouteNetlinkMessage::NewQueueDiscipline(message);
    let answers = RouteSocket::open()?.request([(request, NLM_F_CREATE | NLM_F_REPLACE)])?;
    answers.into_iter().try_for_each(|answer| answer.result.map_err(NetlinkError::Refused))
}

fn bpffs(directory: &Path) -> Check {
    const NAME: &str = "bpffs";
    let Some(there) = directory.ancestors().find(|path| path.exists()) else {
        return Check::error(NAME, format!("{} does not exist", directory.display()), "mount /sys");
    };
    match statfs(there) {
        Ok(found) if found.filesystem_type() == BPF_FS_MAGIC => {
            Check::ok(NAME, directory.display().to_string())
        }
        Ok(_) => Check::error(
            NAME,
            format!("{} is not on a bpffs", directory.display()),
            "mount -t bpf bpf /sys/fs/bpf, or set `bpffs_dir` to a directory on one",
        ),
        Err(error) => {
            Check::error(NAME, format!("{} can't be looked at: {error}", there.display()), "run as root")
        }
    }
}

fn interfaces(configured: &[InterfaceConfig]) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut mtus = Vec::new();
    for interface in configured {
        let name = format!("interface {}", interface.name);
        match Link::by_name(&interface.name) {
            Ok(found) => {
                mtus.push((interface.name.as_str(), found.mtu));
                checks.extend(link(&name, interface, &found));
            }
            Err(error @ LinkError::NotFound { .. }) => checks.push(Check::error(
                name,
                error.to_string(),
                "correct `name` in [[interface]], or make the interface",
            )),
            Err(error) => checks.push(Check::error(name, error.to_string(), "run as root")),
        }
    }
    if let [(_, first), rest @ ..] = mtus.as_slice() {
        let text = mtus.iter().map(|(name, mtu)| format!("{name} {mtu}")).collect::<Vec<_>>().join(", ");
        checks.push(if rest.iter().all(|(_, mtu)| mtu == first) {
            Check::ok("MTU", text)
        } else {
            Check::warning(
                "MTU",
                format!("they differ: {text}"),
                "give all interfaces one MTU, or packets are fragmented or refused here; delays are \
                 computed with the largest",
            )
        });
    }
    checks
}

fn link(name: &str, interface: &InterfaceConfig, found: &Link) -> Vec<Check> {
    if let Framing::Other(number) = found.framing {
        return vec![Check::error(
            name,
            format!("its packets begin with neither an Ethernet nor an IP header (hardware type {number})"),
            "name the interface that carries IP",
        )];
    }
    if !found.up {
        return vec![Check::error(name, "it is down", format!("ip link set {} up", interface.name))];
    }
    let port = match Port::read(&interface.name) {
        Ok(port) => port,
        Err(error) => {
            return vec![Check::error(name, format!("its port can't be read: {error}"), "run as root")];
        }
    };
    let mut checks = vec![match port.speed {
        _ if !port.carrier => Check::error(name, "it has no carrier", "check the cable and the other end"),
        Some(speed) if interface.capacity > speed => Check::warning(
            name,
            format!("its capacity is set to {}, the port has {speed}", interface.capacity),
            "set `capacity` to what can really be sent, or nothing is guaranteed",
        ),
        speed => {
            let port = speed.map(|speed| format!(", the port has {speed}")).unwrap_or_default();
            Check::ok(name, format!("up, capacity {}{port}", interface.capacity))
        }
    }];
    checks.extend(merging(name, &interface.name, &port));
    checks
}

fn merging(name: &str, interface: &str, port: &Port) -> Vec<Check> {
    let mut checks = Vec::new();
    if port.lro == Some(true) {
        checks.push(Check::warning(
            format!("{name} LRO"),
            "on: packets are merged beyond repair before they are forwarded",
            format!("ethtool -K {interface} lro off"),
        ));
    }
    if let Some(gro) = port.gro {
        let found = if gro {
            "on: less work per packet; on ATM lines and with overhead the scheduler counts a merged \
             packet once, so its rates are a little high"
        } else {
            "off: every packet is counted exactly, at more work per packet"
        };
        checks.push(Check::ok(format!("{name} GRO"), found));
    }
    checks
}

fn state_dir(directory: &Path) -> Check {
    const NAME: &str = "state directory";
    let Some(there) = directory.ancestors().find(|path| path.exists()) else {
        return Check::error(NAME, format!("{} does not exist", directory.display()), "make it");
    };
    if let Err(error) = access(there, AccessFlags::W_OK | AccessFlags::X_OK) {
        return Check::error(
            NAME,
            format!("{} can't be written: {error}", there.display()),
            "give qosd's user the right to write there, or set another `state_dir`",
        );
    }
    let space = statvfs(there).map(|found| found.blocks_available().saturating_mul(found.fragment_size()));
    match space {
        Ok(bytes) if bytes < LEAST_SPACE => Check::warning(
            NAME,
            format!("{}: {} MiB are left", directory.display(), bytes >> 20),
            "make room: a full disk refuses every change",
        ),
        Ok(bytes) => Check::ok(NAME, format!("{}, {} MiB left", directory.display(), bytes >> 20)),
        Err(error) => Check::warning(
            NAME,
            format!("{}: free space can't be read: {error}", directory.display()),
            "check it yourself",
        ),
    }
}

fn socket(path: &Path) -> Check {
    const NAME: &str = "socket";
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Check::warning(NAME, format!("{shown} is not there: no qosd runs"), "start it: qosd run")
        }
        Err(error) => Check::error(NAME, format!("{shown} can't be looked at: {error}"), "run as root"),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            Check::error(NAME, format!("{shown} is not a socket"), "remove it, or set another `socket`")
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => Check::ok(NAME, format!("qosd answers on {shown}")),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Check::warning(
                NAME,
                format!("{shown} was left by a qosd that is no more"),
                "start it: qosd run replaces the socket",
            ),
            Err(error) => Check::error(
                NAME,
                format!("{shown}: {error}"),
                "run as root, or as a user that `allow_users` or `allow_groups` names",
            ),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(text, Path::new("qos.toml")).expect("valid")
    }

    fn found<'c>(checks: &'c [Check], name: &str) -> &'c Check {
        checks.iter().find(|check| check.name == name).unwrap_or_else(|| panic!("{name} in {checks:?}"))
    }

    #[test]
    fn what_is_wrong_is_an_error_with_a_mend() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let file = directory.path().join("file");
        fs::write(&file, "").expect("written");
        let checks = local(Some(&config(&format!(
            r#"
state_dir = "{0}/state"
socket = "{0}/file"
bpffs_dir = "{0}/bpf"
[[interface]]
name = "lo"
role = "lan"
capacity = "1Gbit/s"
[[interface]]
name = "no-such-nic"
role = "wan"
capacity = "1Gbit/s"
"#,
            directory.path().display()
        ))));
        for (name, severity) in [
            ("BTF", Severity::Ok),
            ("kernel", Severity::Ok),
            ("interface no-such-nic", Severity::Error),
            ("bpffs", Severity::Error),
            ("socket", Severity::Error),
        ] {
            let check = found(&checks, name);
            assert_eq!(check.severity, severity, "{check:?}");
            assert_eq!(check.mend.is_some(), severity != Severity::Ok, "{check:?}");
        }
        assert_eq!(worst(&checks), Severity::Error);
        assert!(!directory.path().join("state").exists(), "looking changes nothing");
    }

    #[test]
    fn sockets_are_told_apart() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("qosd.sock");
        assert_eq!(socket(&path).severity, Severity::Warning);
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("bound");
        assert_eq!(socket(&path).severity, Severity::Ok);
        drop(listener);
        assert!(socket(&path).found.contains("left by a qosd that is no more"));
    }

    #[test]
    fn a_missing_scheduler_is_told_from_one_that_is_there() {
        let trial = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .map(|()| (try_qdisc("pfifo", Vec::new()), try_qdisc("qos_none", Vec::new())))
        });
        match trial.join().expect("no panic") {
            Ok((there, missing)) => {
                there.expect("every kernel has pfifo");
                assert!(
                    matches!(missing, Err(NetlinkError::Refused(refusal)) if refusal.errno == libc::ENOENT)
                );
            }
            Err(error) => eprintln!("skipped: no network namespace can be made: {error}"),
        }
    }
}
