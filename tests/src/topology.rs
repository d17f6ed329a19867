//! The standard test network: subscribers, one gateway that routes, providers.
//!
//! ```text
//! subscriber ─eth0┐                                 ┌eth0─ provider
//! subscriber ─eth0┤ segment ─ lan0 gateway wan0 ─ segment ┤
//! subscriber ─eth0┘ (bridge)                 (bridge)└eth0─ provider
//! ```
//!
//! Each host is a namespace with as many addresses as wanted. A side with one host has no bridge:
//! `eth0` and `lan0` (or `wan0`) are the two ends of one veth pair. IPv4 and IPv6 are routed
//! between the sides, without NAT and without netfilter rules. Neighbours are learnt as usual (ARP,
//! neighbour discovery) before the network is handed out, and then kept.
//!
//! Addresses come from the documentation prefixes: subscribers in `192.0.2.0/24` and
//! `2001:db8:1::/48`, providers in `198.51.100.0/24`, `203.0.113.0/24` and `2001:db8:2::/48`. Any
//! other address works too; the gateway gets a route to it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use ipnet::IpNet;
use qos_userspace::domain::BitsPerSecond;

use crate::layer3::{self, End};
use crate::netlink::{Mac, Netlink, set_offloads};
use crate::netns::Namespace;
use crate::traffic::{RunningUdp, UdpFlow};
use crate::tunnel::{Encapsulation, Layer, Pump, Tunnel};

/// The gateway's interface to the subscribers.
pub const LAN: &str = "lan0";
/// The gateway's interface to the providers.
pub const WAN: &str = "wan0";
/// Every host's only interface.
pub const HOST_LINK: &str = "eth0";

const LAN_NETWORKS: [&str; 2] = ["192.0.2.1/24", "2001:db8:1::1/48"];
const WAN_NETWORKS: [&str; 3] = ["198.51.100.1/24", "203.0.113.1/24", "2001:db8:2::1/48"];
/// A segment's link to the gateway.
pub const UPLINK: &str = "uplink";
const BRIDGE: &str = "br0";
/// What is below a host's interface that is no link itself; below the gateway's `lan0` it is `wire-lan0`.
pub const WIRE: &str = "wire";
/// How long links and neighbours may take to come up.
const READY: Duration = Duration::from_secs(10);

/// A running test network. Dropping it removes everything.
#[derive(Debug)]
pub struct Topology {
    /// The namespace where `qosd` runs, with [`LAN`] and [`WAN`].
    pub gateway: Namespace,
    subscribers: Vec<Host>,
    providers: Vec<Host>,
    /// Held for their devices.
    _carriers: Carriers,
    /// Held for their bridges.
    segments: Vec<Namespace>,
}

/// What carries packets where no veth pair does.
#[derive(Debug, Default)]
struct Carriers {
    pumps: Vec<Pump>,
    /// Of PPP.
    sessions: Vec<OwnedFd>,
}

/// What an interface of the gateway is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// One end of a veth pair.
    Ethernet,
    /// A tun device: its packets begin with their IP header. Its side has one host.
    Tun,
    /// A VLAN device of that number on a veth pair, at the host too. Its side has one host.
    Vlan(u16),
    /// A bond of one veth link. Its side has one host.
    Bond,
    /// A WireGuard device over a veth pair, at the host too. Its side has one host.
    Wireguard,
    /// A PPP device over PPPoE on a veth pair, at the host too. Its side has one host.
    Ppp,
}

/// A subscriber's or provider's machine.
#[derive(Debug)]
pub struct Host {
    /// Its namespace, named as the host.
    pub namespace: Namespace,
    /// Its addresses, as they were given.
    pub addresses: Vec<IpAddr>,
    /// Hardware address of its [`HOST_LINK`].
    pub mac: Mac,
    /// Hardware address of the gateway's interface on its side.
    pub gateway_mac: Mac,
}

/// What a [`Topology`] is to be.
#[derive(Clone, Debug)]
pub struct Builder {
    subscribers: Vec<(String, Vec<String>)>,
    providers: Vec<(String, Vec<String>)>,
    mtu: u32,
    offloads: bool,
    devices: [(String, Device); 2],
    /// The gateway is a bridge, and the hosts wrap their packets.
    bridged: Option<Option<Encapsulation>>,
}

impl Topology {
    /// A network without hosts yet, MTU 1500, offloads off at the hosts.
    #[must_use]
    pub fn builder() -> Builder {
        Builder {
            subscribers: Vec::new(),
            providers: Vec::new(),
            mtu: 1_500,
            offloads: false,
            devices: [LAN, WAN].map(|name| (name.to_owned(), Device::Ethernet)),
            bridged: None,
        }
    }

    /// One subscriber `home` (192.0.2.10, 2001:db8:1::10) and one provider `video` (203.0.113.10,
    /// 2001:db8:2::10).
    ///
    /// # Errors
    /// Without root.
    pub fn pair() -> Result<Self> {
        Self::builder()
            .subscriber("home", &["192.0.2.10", "2001:db8:1::10"])
            .provider("video", &["203.0.113.10", "2001:db8:2::10"])
            .build()
    }

    /// The subscriber of that name.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn subscriber(&self, name: &str) -> &Host {
        find(&self.subscribers, name)
    }

    /// Starts a stream of 1,000-byte UDP packets from `video` to `home`, over IPv4.
    ///
    /// # Errors
    /// When its sockets can't be had.
    ///
    /// # Panics
    /// When one of the two is not there.
    pub fn stream(&self, port: u16, rate: BitsPerSecond) -> Result<RunningUdp> {
        let (home, video) = (self.subscriber("home"), self.provider("video"));
        UdpFlow::new((video.v4(0), 0), (home.v4(0), port), rate)
            .packet(1_000)
            .start(&video.namespace, &home.namespace)
    }

    /// The namespace of the bridge between the gateway's `link` and several hosts; [`UPLINK`] there leads
    /// to the gateway.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn segment(&self, link: &str) -> &Namespace {
        let name = segment_name(link);
        self.segments.iter().find(|segment| segment.name() == name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// The provider of that name.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn provider(&self, name: &str) -> &Host {
        find(&self.providers, name)
    }
}

impl Host {
    /// Both ways, so that both ends know each other's hardware address for each IP address.
    fn wait_until_reachable(&self, gateway: &Namespace, networks: &[IpNet]) -> Result<()> {
        for &address in &self.addresses {
            reach(gateway, &self.namespace, address)?;
            let theirs =
                networks.iter().map(IpNet::addr).find(|theirs| theirs.is_ipv4() == address.is_ipv4());
            reach(&self.namespace, gateway, theirs.context("each side has networks of both families")?)?;
        }
        Ok(())
    }

    /// The `n`th IPv4 address, from 0.
    ///
    /// # Panics
    /// When it has fewer.
    #[must_use]
    pub fn v4(&self, n: usize) -> Ipv4Addr {
        let v4 = self.addresses.iter().filter_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        });
        v4.clone()
            .nth(n)
            .unwrap_or_else(|| panic!("{} has {} IPv4 addresses", self.namespace.name(), v4.count()))
    }

    /// The `n`th IPv6 address, from 0.
    ///
    /// # Panics
    /// When it has fewer.
    #[must_use]
    pub fn v6(&self, n: usize) -> Ipv6Addr {
        let v6 = self.addresses.iter().filter_map(|address| match address {
            IpAddr::V6(v6) => Some(*v6),
            IpAddr::V4(_) => None,
        });
        v6.clone()
            .nth(n)
            .unwrap_or_else(|| panic!("{} has {} IPv6 addresses", self.namespace.name(), v6.count()))
    }
}

impl Builder {
    /// Adds a subscriber's machine.
    #[must_use]
    pub fn subscriber(mut self, name: &str, addresses: &[&str]) -> Self {
        self.subscribers.push((name.to_owned(), addresses.iter().map(ToString::to_string).collect()));
        self
    }

    /// Adds a provider's machine.
    #[must_use]
    pub fn provider(mut self, name: &str, addresses: &[&str]) -> Self {
        self.providers.push((name.to_owned(), addresses.iter().map(ToString::to_string).collect()));
        self
    }

    /// Sets the MTU of every link, in bytes.
    #[must_use]
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// Leaves the hosts' offloads on, so that the gateway meets GSO super-packets and checksums yet
    /// to be computed. They are off otherwise, and what crosses the links are wire packets.
    #[must_use]
    pub fn offloads(mut self, on: bool) -> Self {
        self.offloads = on;
        self
    }

    /// Says what the gateway's interfaces to the subscribers and to the providers are, and their
    /// names. Under other names there are [`LAN`] and [`WAN`] beside them, with nobody behind.
    #[must_use]
    pub fn devices(mut self, devices: [(&str, Device); 2]) -> Self {
        self.devices = devices.map(|(name, device)| (name.to_owned(), device));
        self
    }

    /// Makes the gateway a transparent bridge between one subscriber and one provider, which wrap
    /// their packets in `encapsulation`.
    #[must_use]
    pub fn bridged(mut self, encapsulation: Option<Encapsulation>) -> Self {
        self.bridged = Some(encapsulation);
        self
    }

    /// Makes the network.
    ///
    /// # Errors
    /// Without root, when an address can't be read, or when the kernel lacks a device.
    pub fn build(self) -> Result<Topology> {
        let gateway = Namespace::new("gateway")?;
        if let Some(encapsulation) = &self.bridged {
            return self.build_bridged(gateway, encapsulation.as_ref());
        }
        let mut segments = Vec::new();
        let mut carriers = Carriers::default();
        let [(lan, near), (wan, far)] = &self.devices;
        let mut side = |link: &str, device, networks: &[&str], hosts: &[_]| {
            self.build_side(&gateway, (link, device), networks, hosts, &mut segments, &mut carriers)
        };
        let subscribers = side(lan, *near, &LAN_NETWORKS, &self.subscribers)?;
        let providers = side(wan, *far, &WAN_NETWORKS, &self.providers)?;
        if [LAN, WAN] != [lan, wan] {
            let nobody = Namespace::new("nobody")?;
            let mut netlink = Netlink::open(&gateway)?;
            for link in [LAN, WAN].into_iter().filter(|link| ![lan, wan].contains(&&(*link).to_owned())) {
                netlink.add_veth(link, link, &nobody, self.mtu)?;
                let index = netlink.link(link)?.index;
                netlink.set_up(index)?;
                let mut beyond = Netlink::open(&nobody)?;
                let index = beyond.link(link)?.index;
                beyond.set_up(index)?;
            }
            segments.push(nobody);
        }
        gateway.set_sysctl("ipv4/ip_forward", "1")?;
        gateway.set_sysctl("ipv6/conf/all/forwarding", "1")?;
        for (hosts, networks) in [(&subscribers, &LAN_NETWORKS[..]), (&providers, &WAN_NETWORKS[..])] {
            for host in hosts {
                host.wait_until_reachable(&gateway, &parse_networks(networks)?)?;
            }
        }
        Ok(Topology { gateway, subscribers, providers, _carriers: carriers, segments })
    }

    /// Both hosts on one segment that leads through the gateway.
    fn build_bridged(&self, gateway: Namespace, encapsulation: Option<&Encapsulation>) -> Result<Topology> {
        let mut bridge = Bridge::new(&gateway)?;
        let sides = [(LAN, self.subscribers.as_slice()), (WAN, self.providers.as_slice())];
        let mut made = Vec::new();
        for (link, hosts) in sides {
            let [(name, addresses)] = hosts else { bail!("a bridged network has one host on either side") };
            let namespace = Namespace::new(name)?;
            let wire = if encapsulation.is_some() { WIRE } else { HOST_LINK };
            bridge.netlink.add_veth(link, wire, &namespace, self.mtu)?;
            bridge.take(link)?;
            let mut netlink = Netlink::open(&namespace)?;
            let wire = netlink.link(wire)?;
            set_offloads(&namespace, &wire.name, self.offloads)?;
            netlink.set_up(wire.index)?;
            made.push((namespace, parse_all(name, addresses)?, wire.mac));
        }
        let mut pumps = Vec::new();
        let macs = [(made[0].2, made[1].2), (made[1].2, made[0].2)];
        for ((namespace, ..), macs) in made.iter().zip(macs) {
            let Some(encapsulation) = encapsulation else { continue };
            let device = Tunnel::new(namespace, HOST_LINK, encapsulation.layer())?;
            let mut netlink = Netlink::open(namespace)?;
            let link = netlink.link(HOST_LINK)?;
            netlink.set_mtu(link.index, self.mtu - encapsulation.length())?;
            if encapsulation.layer() == Layer::Two {
                netlink.set_mac(link.index, macs.0)?;
            }
            pumps.push(Pump::around(device, namespace, WIRE, encapsulation, macs)?);
        }
        let mut hosts = made.into_iter().map(|(namespace, addresses, gateway_mac)| {
            let mac = self.set_up_host(&namespace, &addresses, &[])?;
            Ok(Host { namespace, addresses, mac, gateway_mac })
        });
        let both = hosts.by_ref().collect::<Result<Vec<_>>>()?;
        for (from, to) in [(&both[0], &both[1]), (&both[1], &both[0])] {
            for &address in &to.addresses {
                reach(&from.namespace, &to.namespace, address)?;
            }
        }
        drop(hosts);
        let [subscriber, provider] =
            <[Host; 2]>::try_from(both).map_err(|_| anyhow::anyhow!("two hosts were made"))?;
        Ok(Topology {
            gateway,
            subscribers: vec![subscriber],
            providers: vec![provider],
            _carriers: Carriers { pumps, sessions: Vec::new() },
            segments: Vec::new(),
        })
    }

    fn build_side(
        &self,
        gateway: &Namespace,
        (link, device): (&str, Device),
        networks: &[&str],
        hosts: &[(String, Vec<String>)],
        segments: &mut Vec<Namespace>,
        carriers: &mut Carriers,
    ) -> Result<Vec<Host>> {
        let made = hosts
            .iter()
            .map(|(name, addresses)| Ok((Namespace::new(name)?, parse_all(name, addresses)?)))
            .collect::<Result<Vec<_>>>()?;

        let mut netlink = Netlink::open(gateway)?;
        match made.as_slice() {
            [] => bail!("no host behind {link}"),
            [(only, _)] => match device {
                Device::Ethernet => netlink.add_veth(link, HOST_LINK, only, self.mtu)?,
                Device::Tun => {
                    let here = Tunnel::new(gateway, link, Layer::Three)?;
                    let there = Tunnel::new(only, HOST_LINK, Layer::Three)?;
                    carriers.pumps.push(Pump::between(here, there)?);
                }
                Device::Vlan(number) => {
                    let wire = format!("{WIRE}-{link}");
                    netlink.add_veth(&wire, WIRE, only, self.mtu)?;
                    for (namespace, name, wire) in [(gateway, link, wire.as_str()), (only, HOST_LINK, WIRE)] {
                        let mut netlink = Netlink::open(namespace)?;
                        let below = netlink.link(wire)?.index;
                        netlink.set_up(below)?;
                        netlink.add_vlan(name, below, number)?;
                    }
                }
                Device::Bond => {
                    let wire = format!("{WIRE}-{link}");
                    netlink.add_bond(link)?;
                    netlink.add_veth(&wire, HOST_LINK, only, self.mtu)?;
                    let (bond, below) = (netlink.link(link)?.index, netlink.link(&wire)?.index);
                    netlink.set_controller(below, bond)?;
                    netlink.set_up(below)?;
                }
                Device::Wireguard | Device::Ppp => {
                    let wire = format!("{WIRE}-{link}");
                    netlink.add_veth(&wire, WIRE, only, self.mtu + layer3::OVERHEAD)?;
                    let ends = [
                        End { namespace: gateway, name: link, wire: &wire },
                        End { namespace: only, name: HOST_LINK, wire: WIRE },
                    ];
                    for end in ends {
                        let mut netlink = Netlink::open(end.namespace)?;
                        let below = netlink.link(end.wire)?.index;
                        netlink.set_up(below)?;
                    }
                    match device {
                        Device::Ppp => carriers.sessions.extend(layer3::ppp(ends)?),
                        _ => layer3::wireguard(ends)?,
                    }
                    for end in ends {
                        let mut netlink = Netlink::open(end.namespace)?;
                        let index = netlink.link(end.name)?.index;
                        netlink.set_mtu(index, self.mtu)?;
                    }
                }
            },
            _ if device != Device::Ethernet => bail!("{device:?} leads to one host only"),
            _ => {
                let segment = Namespace::new(&segment_name(link))?;
                let mut bridge = Bridge::new(&segment)?;
                netlink.add_veth(link, UPLINK, &segment, self.mtu)?;
                bridge.take(UPLINK)?;
                for (index, (host, _)) in made.iter().enumerate() {
                    let port = format!("port{index}");
                    Netlink::open(host)?.add_veth(HOST_LINK, &port, &segment, self.mtu)?;
                    bridge.take(&port)?;
                }
                segments.push(segment);
            }
        }

        let inside = netlink.link(link)?;
        keep_neighbours(gateway, link)?;
        netlink.set_up(inside.index)?;
        let networks = parse_networks(networks)?;
        for network in &networks {
            netlink.add_address(inside.index, *network)?;
        }

        made.into_iter()
            .map(|(namespace, addresses)| {
                for &address in &addresses {
                    if !networks.iter().any(|network| network.contains(&address)) {
                        netlink.add_route(address.into(), None, inside.index)?;
                    }
                }
                let mac = self.set_up_host(&namespace, &addresses, &networks)?;
                Ok(Host { namespace, addresses, mac, gateway_mac: inside.mac })
            })
            .collect()
    }

    fn set_up_host(&self, namespace: &Namespace, addresses: &[IpAddr], networks: &[IpNet]) -> Result<Mac> {
        let mut netlink = Netlink::open(namespace)?;
        let link = netlink.link(HOST_LINK)?;
        keep_neighbours(namespace, HOST_LINK)?;
        if !self.offloads {
            set_offloads(namespace, HOST_LINK, false)?;
        }
        netlink.set_up(link.index)?;
        for &address in addresses {
            // Host prefixes: everything else, neighbours too, is reached by the gateway.
            netlink.add_address(link.index, address.into())?;
        }
        for (any, is_v4) in [("0.0.0.0/0", true), ("::/0", false)] {
            let gateway = networks.iter().map(IpNet::addr).find(|address| address.is_ipv4() == is_v4);
            if addresses.iter().any(|address| address.is_ipv4() == is_v4) {
                netlink.add_route(any.parse().context("a network of this file")?, gateway, link.index)?;
            }
        }
        Ok(link.mac)
    }
}

fn segment_name(link: &str) -> String {
    format!("segment of {link}")
}

struct Bridge {
    netlink: Netlink,
    index: u32,
}

impl Bridge {
    fn new(segment: &Namespace) -> Result<Self> {
        let mut netlink = Netlink::open(segment)?;
        netlink.add_bridge(BRIDGE)?;
        let index = netlink.link(BRIDGE)?.index;
        netlink.set_up(index)?;
        Ok(Self { netlink, index })
    }

    fn take(&mut self, port: &str) -> Result<()> {
        let port = self.netlink.link(port)?.index;
        self.netlink.set_controller(port, self.index)?;
        self.netlink.set_up(port)
    }
}

/// A neighbour once learnt isn't probed again while a test floods its link.
fn keep_neighbours(namespace: &Namespace, link: &str) -> Result<()> {
    for family in ["ipv4", "ipv6"] {
        for (key, value) in [
            ("base_reachable_time_ms", "86400000"),
            ("delay_first_probe_time", "86400"),
            ("retrans_time_ms", "100"),
        ] {
            namespace.set_sysctl(&format!("{family}/neigh/{link}/{key}"), value)?;
        }
    }
    Ok(())
}

/// Sends datagrams to `target`, an address of `to`, until one arrives. Links come up in the
/// background and neighbours have to be learnt; a [`Topology`] has done this for all its hosts.
///
/// # Errors
/// When none arrives within ten seconds.
pub fn reach(from: &Namespace, to: &Namespace, target: IpAddr) -> Result<()> {
    let any: IpAddr =
        if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let bound = |namespace: &Namespace, address: IpAddr| {
        namespace
            .run(|| UdpSocket::bind((address, 0)))
            .with_context(|| format!("binding {address} in namespace {}", namespace.name()))
    };
    let (sender, receiver) = (bound(from, any)?, bound(to, target)?);
    receiver.set_read_timeout(Some(Duration::from_millis(20))).context("SO_RCVTIMEO")?;
    let address = receiver.local_addr().context("the receiver's address")?;
    let deadline = Instant::now() + READY;
    while Instant::now() < deadline {
        // An error is an earlier datagram's; the next one tells.
        let _ = sender.send_to(&[], address);
        if receiver.recv_from(&mut [0; 8]).is_ok() {
            return Ok(());
        }
    }
    bail!("{} doesn't reach {target} of {} within {READY:?}", from.name(), to.name());
}

fn parse_networks(networks: &[&str]) -> Result<Vec<IpNet>> {
    networks.iter().map(|network| network.parse().context("a network of this file")).collect()
}

fn parse_all(host: &str, addresses: &[String]) -> Result<Vec<IpAddr>> {
    addresses
        .iter()
        .map(|address| address.parse().with_context(|| format!("address `{address}` of host {host}")))
        .collect()
}

fn find<'a>(hosts: &'a [Host], name: &str) -> &'a Host {
    hosts
        .iter()
        .find(|host| host.namespace.name() == name)
        .unwrap_or_else(|| panic!("the test network has no host {name}"))
}
