//! The machine: rights, kernel, directories, socket.
//!
//! Whether a scheduler exists is tried in a network namespace that is made for it and gone afterwards:
//! module lists do not say what is built in, nor what loads.

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

use super::Check;
use crate::gateway::netlink::{NetlinkError, Refusal, RouteSocket};

/// Oldest kernel that works.
const OLDEST_KERNEL: (u32, u32) = (6, 1);
/// Space that the store should have, in bytes.
const LEAST_SPACE: u64 = 64 << 20;

/// What it costs that no daemon runs.
const NO_DAEMON: &str = "what is in the kernel goes on, but nothing can be granted or repaired";

/// What can be seen without a configuration. `bridges`: the box routes nothing.
pub(super) fn checks(bridges: bool) -> Vec<Check> {
    let mut checks = vec![privileges(), kernel(), btf(), jit(), forwarding(bridges)];
    checks.extend(schedulers());
    checks
}

fn privileges() -> Check {
    const NAME: &str = "privileges";
    match missing_capabilities() {
        None => Check::warning(
            NAME,
            "/proc/self/status does not tell",
            "what lacks rights shows only when it fails",
            "mount /proc",
        ),
        Some(missing) if missing.is_empty() => Check::ok(NAME, "all that qosd needs"),
        Some(missing) => Check::error(
            NAME,
            format!("this process lacks {}", missing.join(", ")),
            "nothing can be attached with these rights",
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
        Err(error) => {
            let found = format!("its release can't be read: {error}");
            return Check::warning(NAME, found, "it may be too old", "check it yourself: uname -r");
        }
    };
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST_KERNEL => Check::ok(NAME, release),
        (Some(_), Some(_)) => Check::error(
            NAME,
            format!("{release} is too old"),
            "its verifier refuses the programs, or it lacks what they call",
            format!("boot Linux {}.{} or later", OLDEST_KERNEL.0, OLDEST_KERNEL.1),
        ),
        _ => Check::warning(
            NAME,
            format!("{release} is no release as Linux has them"),
            "it may be too old",
            "check it yourself: uname -r",
        ),
    }
}

fn btf() -> Check {
    const NAME: &str = "BTF";
    const FILE: &str = "/sys/kernel/btf/vmlinux";
    if Path::new(FILE).exists() {
        Check::ok(NAME, FILE)
    } else {
        Check::error(
            NAME,
            format!("{FILE} is missing"),
            "the programs can't be loaded",
            "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y",
        )
    }
}

fn jit() -> Check {
    const NAME: &str = "BPF JIT";
    const FILE: &str = "/proc/sys/net/core/bpf_jit_enable";
    match fs::read_to_string(FILE) {
        Ok(text) if text.trim() == "0" => Check::warning(
            NAME,
            "off: programs are interpreted",
            "several times the work per packet",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        Ok(_) => Check::ok(NAME, "on"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Check::ok(NAME, "can't be seen from this network namespace")
        }
        Err(error) => Check::warning(
            NAME,
            format!("{FILE} can't be read: {error}"),
            "interpreted programs take several times the work per packet",
            "run as root",
        ),
    }
}

fn forwarding(bridges: bool) -> Check {
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
        _ if bridges => Check::ok(NAME, "off, which bridges don't need"),
        names => Check::warning(
            NAME,
            format!("off: {}", names.join(", ")),
            "packets of that family are not routed",
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
                "what is missing shows only when qosd starts",
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
                    format!("not there ({error}): short FIFOs take its place"),
                    "flows of one class are not kept apart: one that fills the queue delays the others",
                    module,
                ),
                (Err(error), "bfifo") if fq_codel => {
                    Check::ok(name, format!("not there ({error}), and not needed beside fq_codel"))
                }
                (Err(error), _) => Check::error(
                    name,
                    format!("not there: {error}"),
                    "nothing can be queued by class: qosd does not start",
                    module,
                ),
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

pub(super) fn bpffs(directory: &Path) -> Check {
    const NAME: &str = "bpffs";
    let Some(there) = directory.ancestors().find(|path| path.exists()) else {
        let found = format!("{} does not exist", directory.display());
        return Check::error(NAME, found, "programs can't be kept: qosd does not start", "mount /sys");
    };
    match statfs(there) {
        Ok(found) if found.filesystem_type() == BPF_FS_MAGIC => {
            Check::ok(NAME, directory.display().to_string())
        }
        Ok(_) => Check::error(
            NAME,
            format!("{} is not on a bpffs", directory.display()),
            "programs can't be kept: qosd does not start",
            "mount -t bpf bpf /sys/fs/bpf, or set `bpffs_dir` to a directory on one",
        ),
        Err(error) => {
            let found = format!("{} can't be looked at: {error}", there.display());
            Check::error(NAME, found, "programs may not be kept", "run as root")
        }
    }
}

pub(super) fn state_dir(directory: &Path) -> Check {
    const NAME: &str = "state directory";
    let Some(there) = directory.ancestors().find(|path| path.exists()) else {
        let found = format!("{} does not exist", directory.display());
        return Check::error(NAME, found, "nothing can be remembered: qosd does not start", "make it");
    };
    if let Err(error) = access(there, AccessFlags::W_OK | AccessFlags::X_OK) {
        return Check::error(
            NAME,
            format!("{} can't be written: {error}", there.display()),
            "every change is refused",
            "give qosd's user the right to write there, or set another `state_dir`",
        );
    }
    let space = statvfs(there).map(|found| found.blocks_available().saturating_mul(found.fragment_size()));
    match space {
        Ok(bytes) if bytes < LEAST_SPACE => Check::warning(
            NAME,
            format!("{}: {} MiB are left", directory.display(), bytes >> 20),
            "a full disk refuses every change",
            "make room",
        ),
        Ok(bytes) => Check::ok(NAME, format!("{}, {} MiB left", directory.display(), bytes >> 20)),
        Err(error) => Check::warning(
            NAME,
            format!("{}: free space can't be read: {error}", directory.display()),
            "a full disk refuses every change",
            "check it yourself",
        ),
    }
}

pub(super) fn socket(path: &Path) -> Check {
    const NAME: &str = "socket";
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let found = format!("{shown} is not there: no qosd runs");
            Check::warning(NAME, found, NO_DAEMON, "start it: qosd run")
        }
        Err(error) => {
            let found = format!("{shown} can't be looked at: {error}");
            Check::error(NAME, found, "nothing can be asked of qosd", "run as root")
        }
        Ok(metadata) if !metadata.file_type().is_socket() => {
            let found = format!("{shown} is not a socket");
            Check::error(NAME, found, "qosd does not start", "remove it, or set another `socket`")
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => Check::ok(NAME, format!("qosd answers on {shown}")),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Check::warning(
                NAME,
                format!("{shown} was left by a qosd that is no more"),
                NO_DAEMON,
                "start it: qosd run replaces the socket",
            ),
            Err(error) => Check::error(
                NAME,
                format!("{shown}: {error}"),
                "nothing can be asked of qosd",
                "run as root, or as a user that `allow_users` or `allow_groups` names",
            ),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

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
