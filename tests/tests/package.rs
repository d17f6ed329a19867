//! The Debian package in a copy of this machine: real `dpkg`, real scripts, the real unit under a real
//! systemd, and real traffic that is held to a level all the while. Needs root.
//!
//! `cargo xtask test --tier package` makes two versions of the package and names them in `QOS_DEB`
//! and `QOS_DEB_NEWER`.

#![expect(clippy::unwrap_used, reason = "the helpers of a test end it where something is not as it must be")]

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use qos_tests::ask::{Brief, eventually, undisturbed};
use qos_tests::kernel::{pinned_links, programs};
use qos_tests::machine::Machine;
use qos_tests::netlink::{Netlink, TrafficControl};
use qos_tests::skip::skip;
use qos_tests::topology::{LAN, Topology, WAN};
use qos_tests::traffic::RunningUdp;
use qos_userspace::domain::units::BitsPerSecond;
use serde_json::Value;

const CONFIG: &str = r#"# Written by the operator.
allow_groups = ["qos"]
reconcile_interval = "500ms"

[[interface]]
name = "lan0"
role = "lan"
capacity = "1Gbit/s"

[[interface]]
name = "wan0"
role = "wan"
capacity = "1Gbit/s"
"#;
/// The least capabilities: CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF.
const CAPABILITIES: u64 = 1 << 12 | 1 << 38 | 1 << 39;

/// Traffic through a gateway that is a copy of this machine.
struct Gateway {
    machine: Machine,
    net: Topology,
    flow: RunningUdp,
    older: PathBuf,
    newer: PathBuf,
}

/// What other than qos may be on the gateway's interfaces.
type Found = (Vec<TrafficControl>, [(Option<u32>, Vec<u32>, Vec<u32>); 2]);

impl Gateway {
    /// None, and says so, where this machine can't be that.
    fn new(test: &str, boot: impl FnOnce(&Topology) -> anyhow::Result<Machine>) -> Option<Self> {
        let (Some(older), Some(newer)) = (env::var_os("QOS_DEB"), env::var_os("QOS_DEB_NEWER")) else {
            skip(test, "no packages were made: there is no dpkg-shlibdeps (Debian package dpkg-dev)");
            return None;
        };
        let net = Topology::pair().unwrap();
        let machine = match boot(&net) {
            Ok(machine) => machine,
            Err(error) => {
                skip(test, &format!("no copy of this machine: {error:#}"));
                return None;
            }
        };
        let flow = net.stream(5_000, BitsPerSecond(5_000_000)).unwrap();
        Some(Self { machine, net, flow, older: older.into(), newer: newer.into() })
    }

    /// Runs a command line, split at blanks, and returns what it prints; errors are the answer's `Err`.
    #[expect(clippy::print_stdout, reason = "a failed test needs what scripts said")]
    fn try_run(&self, line: &str) -> Result<String, String> {
        let mut words = line.split(' ');
        let mut command = Command::new(words.next().unwrap());
        command.args(words).env("DEBIAN_FRONTEND", "noninteractive");
        let output = self.machine.output(&mut command).unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        println!("# {line}\n{out}\n{err}");
        if output.status.success() { Ok(out) } else { Err(format!("{}: {out}\n{err}", output.status)) }
    }

    fn run(&self, line: &str) -> String {
        self.try_run(line).unwrap_or_else(|error| panic!("{line}: {error}\n{}", self.journal()))
    }

    fn journal(&self) -> String {
        let journal = self.machine.output(Command::new("journalctl").args(["--no-pager", "--lines=60"]));
        journal.map_or_else(
            |error| error.to_string(),
            |output| String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    }

    fn install(&self, package: &Path) {
        self.try_install(package).unwrap_or_else(|error| panic!("{error}\n{}", self.journal()));
    }

    fn try_install(&self, package: &Path) -> Result<String, String> {
        self.machine.copy_in(package, "/root/qos.deb").unwrap();
        self.try_run("dpkg --install /root/qos.deb")
    }

    /// Changes a package's script, as a version with a mistake in it would have it.
    fn spoil(&self, package: &Path, script: &str, text: &str) {
        self.machine.copy_in(package, "/root/qos.deb").unwrap();
        self.run("rm -rf /root/unpacked");
        self.run("dpkg-deb --raw-extract /root/qos.deb /root/unpacked");
        let path = format!("/root/unpacked/DEBIAN/{script}");
        let old = self.machine.read(&path).unwrap_or_else(|_| "#!/bin/sh\n".to_owned());
        self.machine.write(&path, old.replacen('\n', &format!("\n{text}\n"), 1)).unwrap();
        self.run(&format!("chmod 755 {path}"));
        self.run("dpkg-deb -Znone --build /root/unpacked /root/spoilt.deb");
    }

    /// Version and state, such as `0.1.0-1:installed`.
    fn installed(&self) -> String {
        self.run("dpkg-query --show --showformat=${Version}:${db:Status-Status} qos")
    }

    fn version(&self, package: &Path) -> String {
        self.machine.copy_in(package, "/root/asked.deb").unwrap();
        self.run("dpkg-deb --field /root/asked.deb Version")
    }

    fn property(&self, name: &str) -> String {
        self.run(&format!("systemctl show --property={name} --value qosd.service"))
    }

    fn qos(&self, line: &str) -> Value {
        let text = self.run(&format!("qos -o json {line}"));
        serde_json::from_str(&text).unwrap_or(Value::Null)
    }

    fn grant(&self) {
        for (verb, arguments) in [
            (
                "session",
                vec!["add", "home", "--address", "192.0.2.10", "--down", "100mbit", "--up", "100mbit"],
            ),
            ("provider", vec!["add", "video", "--kind", "application", "--network", "203.0.113.0/24"]),
            (
                "grant",
                vec![
                    "--provider",
                    "video",
                    "--flow",
                    "down udp from 203.0.113.0/24 to 192.0.2.10:5000",
                    "--max-down",
                    "1mbit",
                    "--guaranteed-down",
                    "500kbit",
                ],
            ),
        ] {
            let output = self.machine.output(Command::new("qos").arg(verb).args(arguments)).unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }

    /// Holds the database while the daemon's worker wants to write to it, which waits for two seconds.
    fn hang(&self) {
        self.machine.run(|| {
            let database = rusqlite::Connection::open("/var/lib/qos/qos.sqlite").unwrap();
            database.execute_batch("BEGIN IMMEDIATE").unwrap();
            let mut asked = Command::new("qos")
                .args("provider add games --kind application --network 198.51.100.0/24".split(' '))
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            assert!(!asked.wait().unwrap().success(), "the database is held");
        });
    }

    /// Traffic of 5 Mbit/s gets the 1 Mbit/s that it was granted.
    fn assert_held(&self) {
        let held = self.measured();
        assert!((held.ratio_to(BitsPerSecond(1_000_000)) - 1.0).abs() < 0.06, "{:?}", Brief(&held));
    }

    fn measured(&self) -> qos_tests::traffic::Measured {
        undisturbed(&self.flow, Duration::from_millis(500), Duration::from_secs(1)).unwrap()
    }

    /// The pinned links, by name: number of link and of program.
    fn links(&self) -> BTreeMap<String, (u32, u32)> {
        self.machine.run(|| pinned_links(Path::new("/sys/fs/bpf/qos"))).unwrap()
    }

    fn found(&self) -> Found {
        let qdiscs = Netlink::open(&self.net.gateway).unwrap().qdiscs().unwrap();
        (qdiscs, [LAN, WAN].map(|name| programs(&self.net.gateway, name).unwrap()))
    }
}

#[test]
fn a_package_is_installed_upgraded_removed_and_purged_under_systemd() {
    let test = "a_package_is_installed_upgraded_removed_and_purged_under_systemd";
    let Some(gateway) = Gateway::new(test, |net| Machine::boot(&net.gateway)) else { return };
    let before = gateway.found();
    let (older, newer) = (gateway.older.clone(), gateway.newer.clone());

    // Installed, it waits for its configuration.
    gateway.install(&older);
    assert_eq!(gateway.installed(), format!("{}:installed", gateway.version(&older)));
    assert_eq!(gateway.run("systemctl is-enabled qosd"), "enabled");
    assert_eq!(gateway.property("ActiveState"), "inactive");
    assert_eq!(gateway.property("ConditionResult"), "no");
    for page in ["man1/qos.1.gz", "man1/qos-provider-add.1.gz", "man8/qosd.8.gz"] {
        assert!(gateway.machine.exists(&format!("/usr/share/man/{page}")), "{page}");
    }
    gateway.run("systemd-analyze verify qosd.service");

    // With one it starts, as a user of its own with three capabilities.
    gateway.machine.write("/etc/qos/qos.toml", CONFIG).unwrap();
    gateway.run("systemctl start qosd");
    assert_eq!(gateway.property("ActiveState"), "active");
    assert_eq!(gateway.property("StatusText"), "enforcing 0 allocations on lan0, wan0");
    let pid = gateway.property("MainPID");
    let status = gateway.machine.read(&format!("/proc/{pid}/status")).unwrap();
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    let uid = gateway.run("id --user qosd");
    assert!(field("Uid:").split('\t').all(|one| one == uid), "{status}");
    for set in ["CapEff:", "CapPrm:", "CapBnd:", "CapAmb:"] {
        assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), CAPABILITIES, "{set} {status}");
    }
    assert_eq!((field("NoNewPrivs:").as_str(), field("Seccomp:").as_str()), ("1", "2"));
    assert_eq!(gateway.run("stat --format=%U:%G:%a /run/qos/qosd.sock"), "qosd:qos:660");
    assert_eq!(gateway.run("stat --format=%U:%a /var/lib/qos"), "qosd:700");
    gateway.grant();
    gateway.assert_held();
    eventually(Duration::from_secs(20), "the status tells of the allocation", || {
        gateway.property("StatusText") == "enforcing 1 allocation on lan0, wan0"
    });
    let doctor = gateway.try_run("qos doctor").unwrap_or_else(|text| text);
    assert!(!doctor.contains("error  "), "{doctor}");

    // An upgrade restarts the daemon and leaves the links where they are.
    let links = gateway.links();
    gateway.install(&newer);
    assert_eq!(gateway.installed(), format!("{}:installed", gateway.version(&newer)));
    assert_eq!(gateway.property("ActiveState"), "active");
    assert_ne!(gateway.property("MainPID"), pid);
    let numbers =
        |links: &BTreeMap<String, (u32, u32)>| links.values().map(|link| link.0).collect::<Vec<_>>();
    assert_eq!(numbers(&gateway.links()), numbers(&links), "links were made anew");
    assert_eq!(gateway.qos("status")["gateway"]["taken_over"], true);
    assert_eq!(gateway.machine.read("/etc/qos/qos.toml").unwrap(), CONFIG);
    gateway.assert_held();

    // So does the way back.
    gateway.install(&older);
    assert_eq!(numbers(&gateway.links()), numbers(&links), "links were made anew");
    gateway.assert_held();

    // A version that can't be unpacked changes nothing.
    gateway.spoil(&newer, "preinst", "exit 1");
    gateway.try_run("dpkg --install /root/spoilt.deb").unwrap_err();
    assert_eq!(gateway.installed(), format!("{}:installed", gateway.version(&older)));
    assert_eq!(numbers(&gateway.links()), numbers(&links), "links were made anew");
    gateway.assert_held();

    // One that can't be configured is, once what was in its way has gone.
    gateway.spoil(&newer, "postinst", "[ ! -e /run/in-the-way ] || exit 1");
    gateway.machine.write("/run/in-the-way", "").unwrap();
    gateway.try_run("dpkg --install /root/spoilt.deb").unwrap_err();
    assert_eq!(gateway.installed(), format!("{}:half-configured", gateway.version(&newer)));
    gateway.assert_held();
    gateway.run("rm /run/in-the-way");
    gateway.run("dpkg --configure qos");
    assert_eq!(gateway.installed(), format!("{}:installed", gateway.version(&newer)));
    assert_eq!(gateway.property("ActiveState"), "active");
    gateway.assert_held();

    // Killed, it comes back by itself and takes over.
    let pid = gateway.property("MainPID");
    gateway.run(&format!("kill -KILL {pid}"));
    eventually(Duration::from_secs(20), "the restart", || {
        gateway.property("ActiveState") == "active"
            && !["0", &pid].contains(&gateway.property("MainPID").as_str())
    });
    assert_eq!(numbers(&gateway.links()), numbers(&links), "links were made anew");

    // Hung, it is ended, and comes back likewise.
    let drop_in = "/run/systemd/system/qosd.service.d";
    gateway.run(&format!("mkdir -p {drop_in}"));
    gateway.machine.write(&format!("{drop_in}/watchdog.conf"), "[Service]\nWatchdogSec=1s\n").unwrap();
    gateway.run("systemctl daemon-reload");
    gateway.run("systemctl restart qosd");
    let pid = gateway.property("MainPID");
    gateway.hang();
    eventually(Duration::from_secs(20), "the restart", || {
        gateway.property("ActiveState") == "active"
            && !["0", &pid].contains(&gateway.property("MainPID").as_str())
    });
    assert!(gateway.journal().contains("Watchdog timeout"), "{}", gateway.journal());
    assert_eq!(numbers(&gateway.links()), numbers(&links), "links were made anew");
    gateway.run(&format!("rm -r {drop_in}"));
    gateway.run("systemctl daemon-reload");
    gateway.run("systemctl restart qosd");

    // Detached, it stays away until it is started.
    gateway.run("qos detach --yes");
    eventually(Duration::from_secs(10), "the end", || gateway.property("ActiveState") == "inactive");
    assert_eq!(gateway.property("Result"), "success");
    assert_eq!(gateway.found(), before);
    gateway.run("systemctl start qosd");
    gateway.assert_held();

    // What can't be detached is not removed: nothing would be left to detach it.
    gateway.machine.write("/etc/qos/qos.toml", "spoilt").unwrap();
    gateway.try_run("dpkg --remove qos").unwrap_err();
    assert_eq!(gateway.links().len(), 6);
    gateway.machine.write("/etc/qos/qos.toml", CONFIG).unwrap();

    // Removed, it takes everything out of the kernel, and leaves what was configured and granted.
    gateway.run("dpkg --remove qos");
    assert_eq!(gateway.found(), before);
    assert!(!gateway.machine.exists("/usr/sbin/qosd"));
    assert!(!gateway.machine.exists("/sys/fs/bpf/qos"));
    assert_eq!(gateway.machine.read("/etc/qos/qos.toml").unwrap(), CONFIG);
    assert_eq!(gateway.measured().lost, 0);
    gateway.install(&newer);
    assert_eq!(gateway.property("ActiveState"), "active");
    gateway.assert_held();

    // Purged, nothing of it is left.
    gateway.run("dpkg --purge qos");
    assert_eq!(gateway.found(), before);
    for path in ["/etc/qos", "/var/lib/qos", "/run/qos", "/sys/fs/bpf/qos", "/usr/share/doc/qos"] {
        assert!(!gateway.machine.exists(path), "{path}");
    }
    gateway.try_run("systemctl is-enabled qosd").unwrap_err();
}

#[test]
fn a_package_does_without_systemd() {
    let test = "a_package_does_without_systemd";
    let Some(gateway) = Gateway::new(test, |net| Machine::without_systemd(&net.gateway)) else { return };
    let before = gateway.found();
    let start = || {
        let mut command = Command::new("qosd");
        command.arg("run").stderr(Stdio::null());
        let child = gateway.machine.spawn(command).unwrap();
        eventually(Duration::from_secs(60), "the daemon", || gateway.try_run("qos status").is_ok());
        child
    };
    gateway.install(&gateway.older);
    gateway.machine.write("/etc/qos/qos.toml", CONFIG).unwrap();
    let mut daemon = start();
    gateway.grant();
    gateway.assert_held();

    // An upgrade doesn't touch it; who started it starts the new one.
    let links = gateway.links();
    gateway.install(&gateway.newer);
    assert!(daemon.try_wait().unwrap().is_none(), "the daemon goes on");
    assert_eq!(gateway.links(), links);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    gateway.assert_held();
    let mut daemon = start();
    gateway.assert_held();

    // Removed with a daemon that runs: it detaches and ends.
    gateway.run("dpkg --remove qos");
    assert!(daemon.wait().unwrap().success());
    assert_eq!(gateway.found(), before);
    assert_eq!(gateway.machine.read("/etc/qos/qos.toml").unwrap(), CONFIG);

    // And with one that was killed.
    gateway.install(&gateway.newer);
    let mut daemon = start();
    gateway.assert_held();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    gateway.run("dpkg --purge qos");
    assert_eq!(gateway.found(), before);
    for path in ["/etc/qos", "/var/lib/qos", "/sys/fs/bpf/qos"] {
        assert!(!gateway.machine.exists(path), "{path}");
    }
}
