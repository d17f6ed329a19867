//! The machines of the demo, and the daemon on its gateway.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context as _, Result};
use qos_tests::daemon::{Config, Daemon};
use qos_tests::netns::Namespace;
use qos_tests::topology::{Host, Topology};
use qos_tests::traffic::{Flow, RunningTcp, RunningUdp, TcpFlow, UdpFlow};
use serde_json::Value;

use crate::progress::Progress;
use crate::scenario::{LINES, LINK, Line, Load, Machine, PROVIDERS, SERVERS, SUBSCRIBERS, Traffic};

/// Everything that stands before traffic runs. Dropping it takes it down, the daemon first.
pub(crate) struct Network {
    daemon: Daemon,
    pub(crate) topology: Topology,
}

/// A flow that runs until it is dropped.
pub(crate) enum Running {
    Udp(RunningUdp),
    Tcp(RunningTcp),
}

impl Running {
    pub(crate) fn flow(&self) -> &dyn Flow {
        match self {
            Self::Udp(flow) => flow,
            Self::Tcp(flow) => flow,
        }
    }
}

impl Network {
    /// Makes the machines, starts the daemon and registers lines and providers.
    pub(crate) fn start(progress: &mut Progress) -> Result<Self> {
        progress.step("making network namespaces: 3 subscribers, a gateway, 4 providers, the internet")?;
        let mut builder = Topology::builder();
        for Machine { name, addresses } in &SUBSCRIBERS {
            builder = builder.subscriber(name, addresses);
        }
        for Machine { name, addresses } in &SERVERS {
            builder = builder.provider(name, addresses);
        }
        let topology = builder.build()?;
        progress.step(&format!("starting qosd on the gateway, whose link has {LINK} each way"))?;
        let config = Config { lan_capacity: LINK, wan_capacity: LINK, ..Config::default() };
        let daemon = Daemon::start(&topology.gateway, &config)?;
        let network = Self { daemon, topology };

        progress.step("naming the subscribers' lines and the providers")?;
        for Line { name, subscriber, down, up } in &LINES {
            let addresses: Vec<_> = network
                .topology
                .subscriber(subscriber)
                .addresses
                .iter()
                .map(|address| format!("--address {address}"))
                .collect();
            let rates = format!("--down {}bit --up {}bit", down.0, up.0);
            network.qos(progress, &format!("session add {name} {} {rates}", addresses.join(" ")))?;
        }
        for provider in PROVIDERS {
            network.qos(progress, &format!("provider add {provider}"))?;
        }
        Ok(network)
    }

    /// Shows a `qos` command, runs it, and returns what it says.
    pub(crate) fn qos(&self, progress: &mut Progress, line: &str) -> Result<Value> {
        progress.command(&format!("qos {line}"))?;
        self.daemon.qos_line(line)
    }

    /// Runs `qos` unseen.
    pub(crate) fn ask(&self, line: &str) -> Result<Value> {
        self.daemon.qos_line(line)
    }

    /// The daemon.
    pub(crate) fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// Every machine with its namespace, the gateway first.
    pub(crate) fn namespaces(&self) -> Vec<(&'static str, &Namespace)> {
        let subscribers = SUBSCRIBERS
            .iter()
            .map(|machine| (machine.name, &self.topology.subscriber(machine.name).namespace));
        let servers =
            SERVERS.iter().map(|machine| (machine.name, &self.topology.provider(machine.name).namespace));
        [("gateway", &self.topology.gateway)].into_iter().chain(subscribers).chain(servers).collect()
    }

    /// Starts traffic; each flow has a port of its own.
    pub(crate) fn send(&self, traffic: &Traffic) -> Result<Running> {
        static PORT: AtomicU16 = AtomicU16::new(5_000);

        let (sender, receiver) = (self.host(traffic.from.0), self.host(traffic.to.0));
        let from = SocketAddr::new(address(traffic.from.1)?, 0);
        let to = SocketAddr::new(address(traffic.to.1)?, PORT.fetch_add(1, Ordering::Relaxed));
        let (sender, receiver) = (&sender.namespace, &receiver.namespace);
        Ok(match traffic.load {
            Load::Udp(rate, length) => {
                Running::Udp(UdpFlow::new(from, to, rate).packet(length).start(sender, receiver)?)
            }
            Load::Tcp(connections) => {
                Running::Tcp(TcpFlow::new(from, to).connections(connections).start(sender, receiver)?)
            }
        })
    }

    fn host(&self, name: &str) -> &Host {
        if SUBSCRIBERS.iter().any(|machine| machine.name == name) {
            self.topology.subscriber(name)
        } else {
            self.topology.provider(name)
        }
    }
}

fn address(text: &str) -> Result<IpAddr> {
    text.parse().with_context(|| format!("address `{text}` of the scenario"))
}
