//! Upgrades to another version of the kernel programs and their maps, and the way back. Needs root.
#![expect(clippy::print_stdout, reason = "figures of tests, for whoever reads a failure")]
#![expect(clippy::unwrap_used, reason = "a test and what it calls fail by panicking")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use aya::maps::Array;
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
use qos_common::abi::ABI_VERSION;
use qos_tests::ask::Brief;
use qos_tests::daemon::{Config, Daemon};
use qos_tests::kernel::{Kernel, pinned_links};
use qos_tests::netlink::Netlink;
use qos_tests::netns::Namespace;
use qos_tests::topology::{HOST_LINK, LAN, Topology, WAN};
use qos_tests::traffic::{Flow, RunningUdp, UdpFlow, charged_length, watched};
use qos_userspace::domain::{AllocationId, BitsPerSecond};

const WARM_UP: Duration = Duration::from_millis(500);
/// What policed flows are held to.
const DOWN: BitsPerSecond = BitsPerSecond(8_000_000);
const UP: BitsPerSecond = BitsPerSecond(4_000_000);

/// The folder of the version to come, whose maps are laid out otherwise.
fn next() -> PathBuf {
    env::var_os("QOS_NEXT_DIR").map(PathBuf::from).expect("QOS_NEXT_DIR, which `cargo xtask test` sets")
}

/// Traffic through a gateway: policed both ways, shaped within a guarantee, and what is marked only.
struct Load {
    net: Topology,
    daemon: Daemon,
    flows: Vec<Watched>,
}

struct Watched {
    flow: RunningUdp,
    allocation: AllocationId,
    is_up: bool,
    limit: Option<BitsPerSecond>,
}

impl Load {
    /// `marked` packets a second are only marked, 10,000 are policed downstream, 3,000 are others.
    fn start(marked: u64) -> Self {
        let net = Topology::pair().unwrap();
        let config = Config { more: "reconcile_interval = \"1h\"".to_owned(), ..Config::default() };
        let daemon = Daemon::start(&net.gateway, &config).unwrap();
        for line in [
            "session add home --address 192.0.2.10 --down 500mbit --up 500mbit",
            "provider add video --kind application --network 203.0.113.0/24",
        ] {
            daemon.qos_line(line).unwrap();
        }
        let far = "203.0.113.0/24";
        let mut flows = Vec::new();
        for (port, is_up, packets, limit, level) in [
            (5_000, false, marked, None, "--max-down 400mbit --enforcement police --dscp 46"),
            (5_001, false, 10_000, Some(DOWN), "--max-down 8mbit --enforcement police"),
            (5_002, true, 2_000, Some(UP), "--max-up 4mbit --enforcement police"),
            (5_003, false, 1_000, None, "--guaranteed-down 5mbit --priority 0"),
        ] {
            let selector = match is_up {
                true => format!("up udp from 192.0.2.10 to {far}:{port}"),
                false => format!("down udp from {far} to 192.0.2.10:{port}"),
            };
            let grant = format!("--provider video --flow '{selector}' {level}");
            let allocation = daemon.grant(&grant).unwrap().id;
            let (home, video) = (net.subscriber("home"), net.provider("video"));
            let (from, to) = if is_up { (home, video) } else { (video, home) };
            let length = if is_up { 500 } else { 200 };
            let rate = BitsPerSecond(packets * u64::from(charged_length(length)) * 8);
            let flow = UdpFlow::new((from.v4(0), 0), (to.v4(0), port), rate).packet(length);
            let flow = flow.start(&from.namespace, &to.namespace).unwrap();
            flows.push(Watched { flow, allocation, is_up, limit });
        }
        thread::sleep(WARM_UP);
        Self { net, daemon, flows }
    }

    /// Packets that devices have lost between the namespaces, because a CPU came too late to take them.
    fn overrun(&self) -> u64 {
        let (home, video) = (self.net.subscriber("home"), self.net.provider("video"));
        let links = [
            (&home.namespace, HOST_LINK),
            (&video.namespace, HOST_LINK),
            (&self.net.gateway, LAN),
            (&self.net.gateway, WAN),
        ];
        let dropped = |(namespace, link): (&Namespace, &str)| {
            Netlink::open(namespace).unwrap().link(link).unwrap().counters.tx_dropped
        };
        links.into_iter().map(dropped).sum()
    }

    fn is_all(&self, counted: u64, sent: u64, what: &str) {
        let overrun = self.overrun();
        assert!(
            counted <= sent && sent - counted <= overrun,
            "{what}: {counted} of {sent}, {overrun} overran"
        );
    }

    /// Does something while the flows are watched, and looks that none of them has noticed.
    fn undisturbed(mut self, what: impl FnOnce(&mut Daemon)) {
        let before = Kernel::read(&self.daemon, &self.net.gateway).unwrap();
        let outcomes = self.daemon.statistics().unwrap().outcomes;
        let flows: Vec<&dyn Flow> = self.flows.iter().map(|watched| &watched.flow as &dyn Flow).collect();
        let measured = watched(&flows, || {
            what(&mut self.daemon);
            thread::sleep(Duration::from_millis(500));
        })
        .unwrap();
        for (watched, measured) in self.flows.iter().zip(&measured) {
            println!("{:?}", Brief(measured));
            match watched.limit {
                // At such rates any busy process lets packets overtake each other: the sender is moved to
                // another CPU, whose backlog is shorter.
                None => assert!(measured.lost <= self.overrun(), "{:?}", Brief(measured)),
                // A clock begun anew would let 25 ms through at once, at each exchange of a version. A machine
                // that stops right within one lets what passed meanwhile through twice, that once.
                Some(limit) => {
                    let window = Duration::from_millis(250);
                    let peaks = measured.peaks(window, limit);
                    println!("limit {limit}, most in {window:?}: {:?}", &peaks[..3]);
                    let series = measured.series(window);
                    for (peak, tolerance) in peaks.iter().zip([1.11, 1.05]) {
                        assert!(peak.0 as f64 <= limit.0 as f64 * tolerance, "limit {limit}: {series:?}");
                    }
                    assert!((measured.ratio_to(limit) - 1.0).abs() < 0.03, "{:?}", Brief(measured));
                }
            }
        }
        for watched in &self.flows {
            watched.flow.set_rate(BitsPerSecond(0));
        }
        thread::sleep(Duration::from_millis(300));
        let now = self.daemon.statistics().unwrap();
        for watched in &self.flows {
            let counts = now.allocations[&watched.allocation];
            let counts = if watched.is_up { counts.up } else { counts.down };
            let counted = counts.passed.packets + counts.dropped.packets;
            self.is_all(counted, watched.flow.sent(), "what was counted of a flow");
        }
        let marked = now.allocations[&self.flows[0].allocation].down.marked.packets;
        self.is_all(marked, self.flows[0].flow.sent(), "what was marked");
        let delta = |outcome: &str| now.outcomes[outcome] - outcomes[outcome];
        // A router or neighbour solicitation now and then is nobody's.
        assert!(delta("unclassified") <= 10, "unclassified: {}", delta("unclassified"));
        for outcome in ["stale_mark", "missing_entry", "lost_mark", "truncated", "malformed"] {
            assert_eq!(delta(outcome), 0, "{outcome}");
        }
        let sent: u64 = self.flows.iter().map(|watched| watched.flow.sent()).sum();
        let judged = ["admitted", "over_maximum"].map(|outcome| now.outcomes[outcome]);
        self.is_all(judged.iter().sum(), sent, "outcomes");

        let after = Kernel::read(&self.daemon, &self.net.gateway).unwrap();
        assert_eq!(before.without_programs(), after.without_programs());
        assert_eq!(maps(self.daemon.bpffs_dir()), [format!("maps_{ABI_VERSION}")].into());
    }
}

/// Names of the folders of maps.
fn maps(bpffs_dir: &Path) -> BTreeSet<String> {
    let names = fs::read_dir(bpffs_dir).unwrap().map(|entry| entry.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).filter(|name| name.starts_with("maps_")).collect()
}

/// Sends the daemon away and starts the one of another folder.
fn replace(daemon: &mut Daemon, folder: &Path) {
    daemon.terminate().unwrap();
    daemon.use_binaries(folder);
    daemon.restart().unwrap();
    let status = daemon.status().unwrap();
    assert!(status.gateway.taken_over);
    assert_eq!(status.gateway.repairs, [], "nothing was broken");
}

#[test]
fn an_upgrade_and_the_way_back_are_not_noticed_by_any_packet() {
    let load = Load::start(40_000);
    load.undisturbed(|daemon| {
        let this = daemon.binaries().to_owned();
        let links: Vec<_> = pinned_links(daemon.bpffs_dir()).unwrap().into_iter().collect();
        for (folder, version) in [
            (this.clone(), ABI_VERSION),
            (next(), ABI_VERSION + 1),
            (next(), ABI_VERSION + 1),
            (this.clone(), ABI_VERSION),
            (next(), ABI_VERSION + 1),
            (this, ABI_VERSION),
        ] {
            thread::sleep(Duration::from_millis(300));
            let programs: BTreeSet<u32> =
                pinned_links(daemon.bpffs_dir()).unwrap().values().map(|(_, program)| *program).collect();
            let is_same = daemon.binaries() == folder;
            replace(daemon, &folder);
            assert_eq!(daemon.status().unwrap().gateway.abi, version);
            assert_eq!(maps(daemon.bpffs_dir()), [format!("maps_{version}")].into());
            let now = pinned_links(daemon.bpffs_dir()).unwrap();
            // The same version takes its programs over too.
            assert!(now.values().all(|(_, program)| programs.contains(program) == is_same), "{now:?}");
            assert!(links.iter().all(|(name, (link, _))| now[name].0 == *link), "on the same links");
        }
    });
}

#[test]
fn a_version_that_the_verifier_refuses_leaves_the_one_before_enforcing() {
    let load = Load::start(10_000);
    load.undisturbed(|daemon| {
        let this = daemon.binaries().to_owned();
        for good in [this.clone(), next()] {
            let pins = pinned_links(daemon.bpffs_dir()).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let mut qosd = fs::read(good.join("qosd")).unwrap();
            spoil(&mut qosd, "qos_xdp_wan");
            fs::write(folder.path().join("qosd"), qosd).unwrap();
            fs::copy(good.join("qos"), folder.path().join("qos")).unwrap();
            let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(folder.path().join("qosd"), executable).unwrap();

            daemon.terminate().unwrap();
            daemon.use_binaries(folder.path());
            let error = format!("{:#}", daemon.restart().unwrap_err());
            assert!(error.contains("qos_xdp_wan") && error.contains("unknown opcode"), "{error}");
            thread::sleep(Duration::from_millis(500));
            assert_eq!(pinned_links(daemon.bpffs_dir()).unwrap(), pins, "links and programs");
            assert_eq!(maps(daemon.bpffs_dir()), [format!("maps_{ABI_VERSION}")].into());
            daemon.use_binaries(&this);
            daemon.restart().unwrap();
            assert_eq!(daemon.status().unwrap().gateway.repairs, []);
        }
    });
}

#[test]
fn kills_at_any_moment_of_an_upgrade_lose_nothing() {
    const KILLS: u32 = 100;
    let load = Load::start(4_000);
    load.undisturbed(|daemon| {
        let this = daemon.binaries().to_owned();
        let folders = [next(), this.clone()];
        let began = Instant::now();
        replace(daemon, &folders[0]);
        replace(daemon, &folders[1]);
        let start = began.elapsed() / 2;
        daemon.kill().unwrap();
        let mut left = BTreeSet::new();
        for kill in 0..KILLS {
            // Two starts of each version at each moment: the second finds what the first has left.
            daemon.use_binaries(&folders[kill as usize / 2 % 2]);
            daemon.launch().unwrap();
            thread::sleep(start * kill / KILLS);
            daemon.kill().unwrap();
            left.insert(maps(daemon.bpffs_dir()));
        }
        println!("starts of {start:?}; found after kills: {left:?}");
        assert!(left.len() > 1, "some kills were half-way");
        daemon.use_binaries(&this);
        daemon.restart().unwrap();
        assert_eq!(daemon.status().unwrap().gateway.repairs, []);
    });
}

#[test]
fn maps_that_nobody_knows_are_replaced() {
    let net = Topology::pair().unwrap();
    let mut daemon = Daemon::prepare(&net.gateway, &Config::default()).unwrap();
    let folder = daemon.bpffs_dir().join("maps_99");
    fs::create_dir_all(&folder).unwrap();
    for map in ["allocations", "clocks", "counters", "outcomes", "later"] {
        Array::<_, u64>::create(3, 0).unwrap().pin(folder.join(map)).unwrap();
    }
    // One says nothing of its layout, the others what can't be so.
    for (map, layout) in
        [("allocations", "8 id:0:8"), ("clocks", "8 guaranteed:4096:8"), ("outcomes", "nothing of the kind")]
    {
        std::os::unix::fs::symlink(layout, folder.join(format!("{map}_layout"))).unwrap();
    }
    daemon.restart().unwrap();
    assert!(daemon.log_tail().contains("clocks and counters are not carried over"), "{}", daemon.log_tail());
    assert_eq!(maps(daemon.bpffs_dir()), [format!("maps_{ABI_VERSION}")].into());
    daemon.qos_line("provider add video --kind application --network 203.0.113.0/24").unwrap();
    daemon.qos_line("session add home --address 192.0.2.10 --down 500mbit --up 500mbit").unwrap();
    let flow = "down udp from 203.0.113.0/24 to 192.0.2.10";
    daemon.grant(&format!("--provider video --flow '{flow}' --max-down 8mbit")).unwrap();

    // This version's number on maps that are not its own.
    daemon.terminate().unwrap();
    let own = daemon.bpffs_dir().join(format!("maps_{ABI_VERSION}"));
    fs::remove_file(own.join("clocks_layout")).unwrap();
    std::os::unix::fs::symlink("64 somewhere:0:8", own.join("clocks_layout")).unwrap();
    let links = pinned_links(daemon.bpffs_dir()).unwrap();
    let error = format!("{:#}", daemon.restart().unwrap_err());
    assert!(error.contains("map clocks") && error.contains("`qos detach`"), "{error}");
    assert_eq!(pinned_links(daemon.bpffs_dir()).unwrap(), links, "what runs goes on");
}

/// Makes the first instruction of a program, in the object that a `qosd` embeds, one that there is not.
fn spoil(qosd: &mut [u8], program: &str) {
    // Class 64, little endian, version 1; e_machine EM_BPF (elf.h).
    let is_object = |at: &usize| {
        qosd[*at..].starts_with(b"\x7fELF\x02\x01\x01") && qosd.get(at + 18..at + 20) == Some(&[247, 0])
    };
    let at = (0..qosd.len()).find(is_object).expect("qosd embeds an object");
    let file = object::File::parse(&qosd[at..]).unwrap();
    let symbol = file.symbols().find(|symbol| symbol.name() == Ok(program)).expect("the program");
    let section = file.section_by_index(symbol.section_index().unwrap()).unwrap();
    let (offset, _) = section.file_range().unwrap();
    let instruction = at + (offset + symbol.address()) as usize;
    qosd[instruction] = 0xff;
}
