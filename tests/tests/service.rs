//! `qosd` as a service manager runs it: without root, told on, and watched. Needs root.

#![expect(clippy::unwrap_used, reason = "the helpers of a test end it where something is not as it must be")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use qos_tests::ask::{Brief, eventually, undisturbed};
use qos_tests::daemon::{Config, Daemon};
use qos_tests::kernel::programs;
use qos_tests::skip::skip;
use qos_tests::topology::{LAN, Topology};
use qos_userspace::domain::units::BitsPerSecond;

/// Nobody's number, on any distribution.
const NOBODY: u32 = 65_534;
/// What the packaged unit gives.
const CAPABILITIES: &str = "-all,+net_admin,+bpf,+perfmon";

const SESSION: &str = "session add home --address 192.0.2.10 --down 100mbit --up 100mbit";
const PROVIDER: &str = "provider add video --kind application --network 203.0.113.0/24";
const GRANT: &str = "--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --max-down 1mbit --guaranteed-down 500kbit";

/// Starts `daemon` as nobody with three capabilities.
fn restart_unprivileged(daemon: &mut Daemon) {
    let folder = daemon.config_path().parent().unwrap().to_owned();
    // The checkout may be root's alone.
    let binary = folder.join("qosd");
    fs::copy(daemon.binaries().join("qosd"), &binary).unwrap();
    fs::create_dir_all(daemon.bpffs_dir()).unwrap();
    for path in [folder.as_path(), daemon.bpffs_dir()] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    daemon
        .restart_with(|command| {
            let mut unprivileged = Command::new("setpriv");
            unprivileged
                .args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")])
                .args(["--clear-groups", "--no-new-privs"])
                .args(
                    ["--inh-caps", "--ambient-caps", "--bounding-set"]
                        .map(|set| format!("{set}={CAPABILITIES}")),
                )
                .arg(&binary)
                .args(command.get_args())
                .stdin(std::process::Stdio::null());
            let log = || fs::File::options().create(true).append(true).open(folder.join("qosd.log")).unwrap();
            unprivileged.stdout(log()).stderr(log());
            *command = unprivileged;
        })
        .unwrap();
}

#[test]
fn three_capabilities_are_all_that_it_needs() {
    let mode = fs::metadata("/sys/fs/bpf").unwrap().permissions().mode();
    if mode & 0o001 == 0 {
        let reason = "/sys/fs/bpf is root's alone; the test of the package has its own";
        return skip("three_capabilities_are_all_that_it_needs", reason);
    }
    for tc_hooks in ["auto", "clsact"] {
        let net = Topology::pair().unwrap();
        let flow = net.stream(5_000, BitsPerSecond(5_000_000)).unwrap();
        let more = format!("tc_hooks = \"{tc_hooks}\"\nreconcile_interval = \"200ms\"");
        let mut daemon = Daemon::prepare(&net.gateway, &Config { more, ..Config::default() }).unwrap();
        restart_unprivileged(&mut daemon);
        let process = fs::read_to_string(format!("/proc/{}/status", daemon.id().unwrap())).unwrap();
        let effective = process.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim();
        assert_eq!(u64::from_str_radix(effective, 16).unwrap(), 1 << 12 | 1 << 38 | 1 << 39);
        assert_eq!(fs::metadata(daemon.state_dir()).unwrap().uid(), NOBODY);

        daemon.qos_line(SESSION).unwrap();
        daemon.qos_line(PROVIDER).unwrap();
        let allocation = daemon.grant(GRANT).unwrap();
        let held = || {
            let held = undisturbed(&flow, Duration::from_millis(500), Duration::from_secs(1)).unwrap();
            assert!((held.ratio_to(BitsPerSecond(1_000_000)) - 1.0).abs() < 0.06, "{:?}", Brief(&held));
        };
        held();
        assert!(daemon.counts(allocation.id).unwrap().down.dropped.packets > 0);
        let explain =
            "explain --direction down --protocol udp --source 203.0.113.10:1 --destination 192.0.2.10:5000";
        assert_eq!(daemon.qos_line(explain).unwrap()["allocation"]["id"], allocation.id.0);
        daemon.qos_line("reconcile").unwrap();
        let doctor = daemon.qos_output(["doctor"]).unwrap();
        let doctor = String::from_utf8(doctor.stdout).unwrap();
        assert!(!doctor.contains("\"error\"") && !doctor.contains("not looked at"), "{doctor}");
        assert_eq!(doctor.matches("no programs but ours").count(), 2, "{doctor}");

        // It repairs, and takes over what it made itself.
        fs::remove_dir_all(daemon.bpffs_dir().join("links")).unwrap();
        eventually(Duration::from_secs(10), "the repair", || {
            programs(&net.gateway, LAN).unwrap().0.is_some()
                && !daemon.status().unwrap().gateway.repairs.is_empty()
        });
        held();
        daemon.kill().unwrap();
        held();
        restart_unprivileged(&mut daemon);
        assert!(daemon.status().unwrap().gateway.taken_over);
        assert_eq!(daemon.status().unwrap().reconcile_error, None);
        held();
        let log = fs::read_to_string(daemon.log_path()).unwrap();
        assert!(!log.contains("EPERM") && !log.contains("not permitted"), "{log}");
        daemon.qos(["detach", "--yes"]).unwrap();
        assert!(daemon.wait(Duration::from_secs(5)).unwrap().success());
        assert_eq!(programs(&net.gateway, LAN).unwrap().0, None);
    }
}

#[test]
fn the_service_manager_is_told_and_misses_signs_of_life_of_a_daemon_that_hangs() {
    const WATCHDOG: Duration = Duration::from_millis(500);
    let net = Topology::pair().unwrap();
    let mut daemon = Daemon::prepare(&net.gateway, &Config::default()).unwrap();
    let path = daemon.config_path().with_file_name("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    // The lines of the next message.
    let next = || {
        let mut buffer = [0; 4_096];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).trim().to_owned()
    };
    let until = |wanted: &str| {
        let seen: Vec<_> = std::iter::repeat_with(next).take(100).take_while(|line| line != wanted).collect();
        assert!(seen.len() < 100, "no {wanted} among {seen:?}");
        seen
    };
    daemon
        .restart_with(|command| {
            let limit = WATCHDOG.as_micros().to_string();
            command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", limit);
        })
        .unwrap();
    assert_eq!(until("READY=1"), Vec::<String>::new(), "told before it is ready");
    until("STATUS=enforcing 0 allocations on lan0, wan0");
    daemon.qos_line(SESSION).unwrap();
    daemon.qos_line(PROVIDER).unwrap();
    daemon.grant(GRANT).unwrap();
    until("STATUS=enforcing 1 allocation on lan0, wan0");

    let gaps = |time: Duration| {
        let began = Instant::now();
        let mut last = Instant::now();
        let mut longest = Duration::ZERO;
        while began.elapsed() < time {
            until("WATCHDOG=1");
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
        longest
    };
    let longest = gaps(Duration::from_secs(2));
    assert!(longest < WATCHDOG, "{longest:?}");

    // Somebody holds the database: the daemon's worker waits for it, for two seconds.
    let database = rusqlite::Connection::open(daemon.state_dir().join("qos.sqlite")).unwrap();
    database.execute_batch("BEGIN IMMEDIATE").unwrap();
    let longest = thread::scope(|scope| {
        let asked = scope
            .spawn(|| daemon.qos_line("provider add games --kind application --network 198.51.100.0/24"));
        let longest = gaps(Duration::from_secs(3));
        asked.join().unwrap().unwrap_err();
        longest
    });
    assert!(longest > WATCHDOG * 3, "{longest:?}");
    database.execute_batch("ROLLBACK").unwrap();
    let longest = gaps(Duration::from_secs(1));
    assert!(longest < WATCHDOG, "{longest:?}");

    daemon.signal(nix::sys::signal::Signal::SIGTERM).unwrap();
    until("STOPPING=1\nSTATUS=stopping");
    assert!(daemon.wait(Duration::from_secs(5)).unwrap().success());
}
