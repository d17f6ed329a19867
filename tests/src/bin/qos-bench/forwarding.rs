//! Packets a second through a gateway between two veth pairs.
//!
//! Each way of being a gateway has namespaces of its own, all made at once, and rounds go round them.
//! Packets come in by the LAN interface ([`crate::live`]).

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use qos_common::abi::MAX_RULES;
use qos_tests::netlink::{Link, Netlink};
use qos_tests::netns::Namespace;
use qos_tests::topology::{LAN, WAN};
use qos_userspace::domain::Direction;
use qos_userspace::domain::selector::{Range16, Selector};
use qos_userspace::gateway::Kernel;
use qos_userspace::gateway::object::remove_pins;
use qos_userspace::manager::State;
use serde::Serialize;

use crate::live::Path;
use crate::programs::{Driver, Step};
use crate::{gateway, median, nftables, world};

/// Rules of every gateway that has any, and flows that meet them.
const RULES: u32 = 1_000;
const FLOWS: u32 = 1_000;
/// Time of one round of one gateway.
const ROUND: Duration = Duration::from_millis(300);
/// The sink's interface.
const SINK_LINK: &str = "wan-peer";

/// What one gateway forwards.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    /// Median.
    pub(crate) packets_per_second: f64,
    /// Median over that of plain forwarding.
    pub(crate) ratio_to_plain: f64,
}

/// A router in a namespace of its own, between a source and a sink.
pub(crate) struct Router {
    pub(crate) namespace: Namespace,
    /// What packets come in by.
    pub(crate) lan: Link,
    sink: Namespace,
    _source: Namespace,
}

impl Router {
    /// Routes IPv4: whatever it has no other way for goes to the sink.
    pub(crate) fn new() -> Result<Self> {
        let (namespace, source, sink) =
            (Namespace::new("gateway")?, Namespace::new("source")?, Namespace::new("sink")?);
        namespace.set_sysctl("ipv4/ip_forward", "1")?;
        for key in ["ipv4/conf/all/rp_filter", "ipv4/conf/default/rp_filter"] {
            namespace.set_sysctl(key, "0")?;
        }
        let mut netlink = Netlink::open(&namespace)?;
        netlink.add_veth(LAN, "lan-peer", &source, 1_500)?;
        netlink.add_veth(WAN, SINK_LINK, &sink, 1_500)?;
        let (lan, wan) = (netlink.link(LAN)?, netlink.link(WAN)?);
        // Of networks that no rule names: what has an address is not forwarded.
        netlink.add_address(lan.index, "198.18.0.1/24".parse()?)?;
        netlink.add_address(wan.index, "198.18.1.1/24".parse()?)?;
        netlink.set_up(lan.index)?;
        netlink.set_up(wan.index)?;
        let mut at_source = Netlink::open(&source)?;
        let peer = at_source.link("lan-peer")?.index;
        at_source.set_up(peer)?;
        let mut at_sink = Netlink::open(&sink)?;
        let wan_peer = at_sink.link(SINK_LINK)?;
        at_sink.add_address(wan_peer.index, "198.18.1.2/24".parse()?)?;
        at_sink.set_up(wan_peer.index)?;
        netlink.add_route("0.0.0.0/0".parse()?, Some("198.18.1.2".parse()?), wan.index)?;
        Ok(Self { namespace, lan, sink, _source: source })
    }

    /// Sets what `driver` sends through this router, and ends it at the sink.
    pub(crate) fn drive(&self, driver: &mut Driver, steps: &[Step]) -> Result<()> {
        driver.set_steps(steps)?;
        driver.drop_at(&self.sink, SINK_LINK)
    }

    /// The way of what the driver sends.
    pub(crate) fn path(&self) -> Path<'_> {
        let lan = &self.lan;
        Path { gateway: &self.namespace, program: "bench_xdp", frame: &[0; 60], from: lan.index, to: WAN }
    }
}

/// A gateway, and what comes to it.
struct Gateway {
    name: &'static str,
    /// Dropped before the router.
    kernel: Option<Kernel>,
    router: Router,
    driver: Driver,
    pins: Option<PathBuf>,
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
        let router = Router::new()?;
        let mac = router.lan.mac;
        let steps: Vec<_> = world::flows(RULES, FLOWS)
            .into_iter()
            .map(|(rule, flow)| Step { headers: world::headers(rule, flow, mac), reserved: [0; 2], mark: 0 })
            .collect();
        let mut driver = Driver::load()?;
        router.drive(&mut driver, &steps)?;
        Ok(Self { name, kernel: None, router, driver, pins: None })
    }

    /// A router with our programs and as many policed allocations as there are rules.
    fn with_programs(name: &'static str, observe: bool) -> Result<Self> {
        let mut gateway = Self::plain(name)?;
        let pins = PathBuf::from(format!("/sys/fs/bpf/qos-bench-{}-{observe}", std::process::id()));
        gateway.pins = Some(pins.clone());
        let config = gateway::config(pins, observe, MAX_RULES);
        let state = state()?;
        let kernel = gateway.router.namespace.run(|| Kernel::start(&config, &state))?;
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
        Ok(match nftables::load(&self.router.namespace, &text)? {
            ControlFlow::Continue(_) => ControlFlow::Continue(()),
            ControlFlow::Break(reason) => ControlFlow::Break(reason),
        })
    }

    /// Packets a second that left the WAN interface during one round.
    fn run(&mut self) -> Result<f64> {
        let forwarded = self.driver.forward(&self.router.path(), ROUND).context(self.name)?;
        Ok(forwarded.per_second)
    }
}

/// One provider for all, and an allocation for each rule of [`world`].
fn state() -> Result<State> {
    let mut state = gateway::state(MAX_RULES);
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
