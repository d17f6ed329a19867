//! Packets a second through a gateway between two veth pairs.
//!
//! Each way of being a gateway has namespaces of its own, all made at once, and rounds go round them.
//! Packets come in by the LAN interface ([`crate::live`]).

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use qos_tests::netlink::Netlink;
use qos_tests::netns::Namespace;
use qos_userspace::domain::Direction;
use qos_userspace::domain::selector::{Range16, Selector};
use qos_userspace::gateway::Kernel;
use qos_userspace::gateway::object::remove_pins;
use qos_userspace::manager::State;
use serde::Serialize;

use crate::gateway;
use crate::live::Path;
use crate::median;
use crate::programs::{Driver, Step};
use crate::world;

/// Rules of every gateway that has any, and flows that meet them.
const RULES: u32 = 1_000;
const FLOWS: u32 = 1_000;
/// Time of one round of one gateway.
const ROUND: Duration = Duration::from_millis(300);

/// What one gateway forwards.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    /// Median.
    pub(crate) packets_per_second: f64,
    /// Median over that of plain forwarding.
    pub(crate) ratio_to_plain: f64,
}

/// A gateway, and what stands around it.
struct Gateway {
    name: &'static str,
    namespace: Namespace,
    driver: Driver,
    lan: u32,
    kernel: Option<Kernel>,
    pins: Option<PathBuf>,
    _sink: Namespace,
    _source: Namespace,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.kernel.take();
        if let Some(pins) = &self.pins {
            // What can't be removed is named by the next run, which finds it.
            let _ = remove_pins(pins);
        }
    }
}

/// Measures all gateways. What this machine lacks is said in `skipped`.
pub(crate) fn measure(rounds: usize, skipped: &mut Vec<String>) -> Result<Vec<Figure>> {
    let mut gateways = vec![
        Gateway::plain("plain kernel forwarding")?,
        Gateway::with_programs("qos, observe mode, 1000 rules", true)?,
        Gateway::with_programs("qos, police, 1000 rules", false)?,
    ];
    let mut nft = Gateway::plain("nftables, 1000 limits in a map")?;
    match nft.load_nftables()? {
        ControlFlow::Continue(()) => gateways.push(nft),
        ControlFlow::Break(reason) => skipped.push(reason),
    }
    let mut samples = vec![Vec::new(); gateways.len()];
    // The first round resolves neighbours and warms caches.
    for round in 0..=rounds {
        for (gateway, samples) in gateways.iter_mut().zip(&mut samples) {
            let rate = gateway.run()?;
            if round > 0 {
                samples.push(rate);
            }
        }
    }
    let medians: Vec<f64> = samples.iter_mut().map(|values| median(values)).collect();
    Ok(gateways
        .iter()
        .zip(&medians)
        .map(|(gateway, rate)| Figure {
            name: gateway.name.to_owned(),
            packets_per_second: *rate,
            ratio_to_plain: rate / medians[0],
        })
        .collect())
}

impl Gateway {
    /// A router without anything.
    fn plain(name: &'static str) -> Result<Self> {
        let (namespace, source, sink) =
            (Namespace::new("gateway")?, Namespace::new("source")?, Namespace::new("sink")?);
        namespace.set_sysctl("ipv4/ip_forward", "1")?;
        for key in ["ipv4/conf/all/rp_filter", "ipv4/conf/default/rp_filter"] {
            namespace.set_sysctl(key, "0")?;
        }
        let mut netlink = Netlink::open(&namespace)?;
        netlink.add_veth("lan0", "lan-peer", &source, 1_500)?;
        netlink.add_veth("wan0", "wan-peer", &sink, 1_500)?;
        let (lan, wan) = (netlink.link("lan0")?, netlink.link("wan0")?);
        netlink.add_address(lan.index, "10.64.0.1/14".parse()?)?;
        netlink.add_address(wan.index, "198.51.100.1/24".parse()?)?;
        netlink.set_up(lan.index)?;
        netlink.set_up(wan.index)?;
        Netlink::open(&source)?.set_up(Netlink::open(&source)?.link("lan-peer")?.index)?;
        let mut at_sink = Netlink::open(&sink)?;
        let wan_peer = at_sink.link("wan-peer")?;
        at_sink.add_address(wan_peer.index, "198.51.100.2/24".parse()?)?;
        at_sink.set_up(wan_peer.index)?;
        netlink.add_route("203.0.113.0/24".parse()?, Some("198.51.100.2".parse()?), wan.index)?;
        let mut driver = Driver::load()?;
        let mac = lan.mac;
        let steps: Vec<_> = world::flows(RULES, FLOWS)
            .into_iter()
            .map(|(rule, flow)| Step { headers: world::headers(rule, flow, mac), reserved: [0; 2], mark: 0 })
            .collect();
        driver.set_steps(&steps)?;
        driver.drop_at(&sink, "wan-peer")?;
        Ok(Self {
            name,
            namespace,
            driver,
            lan: lan.index,
            kernel: None,
            pins: None,
            _sink: sink,
            _source: source,
        })
    }

    /// A router with our programs and as many policed allocations as there are rules.
    fn with_programs(name: &'static str, observe: bool) -> Result<Self> {
        let mut gateway = Self::plain(name)?;
        let pins = PathBuf::from(format!("/sys/fs/bpf/qos-bench-{}-{observe}", std::process::id()));
        gateway.pins = Some(pins.clone());
        let config = gateway::config(pins, observe);
        let state = state()?;
        let kernel = gateway.namespace.run(|| Kernel::start(&config, &state))?;
        gateway.driver.set_target(kernel.object().program_fd("qos_xdp_lan")?, true)?;
        gateway.kernel = Some(kernel);
        Ok(gateway)
    }

    /// The same limits by nftables: a named limit for each subscriber, found by one map look-up.
    fn load_nftables(&mut self) -> Result<ControlFlow<String>> {
        use std::fmt::Write as _;
        let mut text = String::from("table ip qos {\n");
        for number in 0..RULES {
            writeln!(text, "limit l{number} {{ rate over 12500 mbytes/second burst 1 mbytes; }}")?;
        }
        text.push_str(
            "map limits { type ipv4_addr . ipv4_addr . inet_service : limit; flags interval; elements = {\n",
        );
        for number in 0..RULES {
            let [from, to] =
                [world::subscriber(number), world::provider(number)].map(std::net::Ipv4Addr::from);
            writeln!(
                text,
                "{from} . {to} . {}-{} : \"l{number}\",",
                world::PORTS.0,
                world::PORTS.0 + world::PORTS.1 - 1
            )?;
        }
        text.push_str(
            "}\n}\nchain forward { type filter hook forward priority 0; \
             limit name ip saddr . ip daddr . udp dport map @limits drop\n}\n}\n",
        );
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), text)?;
        let mut command = Command::new("nft");
        command.arg("-f").arg(file.path()).stdin(Stdio::null());
        let Ok(output) = self.namespace.output(command) else {
            return Ok(ControlFlow::Break("nftables: no `nft` on this machine".to_owned()));
        };
        if output.status.success() {
            return Ok(ControlFlow::Continue(()));
        }
        let reason = String::from_utf8_lossy(&output.stderr);
        Ok(ControlFlow::Break(format!(
            "nftables: nft refused the rule set: {}",
            reason.lines().next().unwrap_or("")
        )))
    }

    /// Packets a second that left the WAN interface during one round.
    fn run(&mut self) -> Result<f64> {
        let path = Path {
            gateway: &self.namespace,
            program: "bench_xdp",
            frame: &[0; 60],
            from: self.lan,
            to: "wan0",
        };
        self.driver.forward(&path, ROUND).map(|(_, rate)| rate).context(self.name)
    }
}

/// One provider for all, and an allocation for each rule of [`world`].
fn state() -> Result<State> {
    let mut state = gateway::state();
    gateway::add_provider(&mut state, "bench", "203.0.113.0/24".parse()?)?;
    for number in 0..RULES {
        let [source, destination] = [world::subscriber(number), world::provider(number)]
            .map(|octets| ipnet::IpNet::from(std::net::IpAddr::from(octets)));
        let selector = Selector {
            direction: Some(Direction::Upstream),
            protocol: Some(17),
            source: Some(source),
            destination: Some(destination),
            destination_ports: Some(Range16::new(world::PORTS.0, world::PORTS.0 + world::PORTS.1 - 1)?),
            ..Selector::default()
        };
        gateway::grant(&mut state, "bench", vec![selector], 0)?;
    }
    Ok(state)
}
