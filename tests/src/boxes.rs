//! Kinds of gateway boxes between the same two hosts: what differs is how the box is wired, what its
//! packets look like, and how `qosd` is told to attach.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;

use crate::daemon::{Config, Daemon};
use crate::netlink::is_unknown_device;
use crate::topology::{Device, LAN, Topology, WAN};
use crate::tunnel::Encapsulation;

/// The subscriber's addresses: IPv4, IPv6.
pub const HOME: [&str; 2] = ["192.0.2.10", "2001:db8:1::10"];
/// The provider's addresses, likewise.
pub const VIDEO: [&str; 2] = ["203.0.113.10", "2001:db8:2::10"];
/// The box's own addresses on the provider's side, where it has any; [`Kind::Nat`] translates the
/// subscriber's to the first.
pub const OUTSIDE: [&str; 2] = ["203.0.113.1", "2001:db8:2::1"];

/// Numbers of VLANs on the LAN and the WAN.
const VLANS: [u16; 2] = [100, 200];

/// A kind of gateway box.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// It routes both families between Ethernet links.
    Router,
    /// The same, with tc programs as filters on clsact.
    RouterClsact,
    /// The same, with XDP in the stack.
    RouterGeneric,
    /// The same, without XDP.
    RouterTc,
    /// It routes IPv6 only.
    RouterV6,
    /// It routes packets of up to 9,000 bytes.
    RouterJumbo,
    /// Two interfaces on either side, the traffic on the second ones.
    RouterFour,
    /// It translates the subscriber's IPv4 address; by nftables.
    Nat,
    /// A transparent bridge.
    Bridge,
    /// A bridge, VLAN tags on the frames.
    BridgeVlan,
    /// A bridge, two tags on the frames.
    BridgeQinq,
    /// A bridge with PPPoE sessions passing through.
    BridgePppoe,
    /// A router whose WAN is a tun device.
    Tun,
    /// A router whose WAN is a WireGuard device.
    Wireguard,
    /// A router whose WAN is a PPP device.
    Ppp,
    /// A router whose LAN and WAN are VLAN devices.
    VlanDevices,
    /// A router whose WAN is a bond of one link.
    Bond,
}

/// A box with its two hosts, `home` and `video`, and a `qosd` on it.
#[derive(Debug)]
pub struct BoxUnderTest {
    /// What it is.
    pub kind: Kind,
    /// Its daemon, dropped before the network.
    pub daemon: Daemon,
    /// Its hosts and the gateway.
    pub net: Topology,
}

impl Kind {
    /// Families of addresses that its traffic has: IPv4 `false`, IPv6 `true`.
    #[must_use]
    pub const fn families(self) -> &'static [bool] {
        match self {
            Self::Nat => &[false],
            Self::RouterV6 => &[true],
            _ => &[false, true],
        }
    }

    /// Where each interface's incoming packets are judged, and how XDP and framing show in its
    /// status: LAN, WAN.
    #[must_use]
    pub const fn expected(self) -> [(&'static str, &'static str, &'static str); 2] {
        const NATIVE: (&str, &str, &str) = ("xdp", "native", "ethernet");
        const GENERIC: (&str, &str, &str) = ("xdp", "generic", "ethernet");
        match self {
            Self::RouterGeneric => [GENERIC, GENERIC],
            Self::RouterTc | Self::VlanDevices => [("tc", "unused", "ethernet"); 2],
            Self::Nat => [NATIVE, ("egress", "unused", "ethernet")],
            Self::Tun | Self::Wireguard | Self::Ppp => [NATIVE, ("tc", "unused", "layer3")],
            _ => [NATIVE, NATIVE],
        }
    }

    /// Whether it routes, and so has addresses; else it bridges.
    #[must_use]
    pub const fn has_addresses(self) -> bool {
        !matches!(self, Self::Bridge | Self::BridgeVlan | Self::BridgeQinq | Self::BridgePppoe)
    }

    /// Names of the interfaces that its traffic goes by: LAN, WAN.
    #[must_use]
    pub const fn links(self) -> [&'static str; 2] {
        match self {
            Self::RouterFour => ["lan1", "wan1"],
            _ => [LAN, WAN],
        }
    }

    /// What is around its packets on the wire: LAN, WAN.
    #[must_use]
    pub fn encapsulation(self) -> [Option<Encapsulation>; 2] {
        let tags = |tags: &[(u16, u16)]| Some(Encapsulation::Tags(tags.to_vec()));
        let both = match self {
            Self::BridgeVlan => tags(&[(0x8100, VLANS[0])]),
            Self::BridgeQinq => tags(&[(0x88a8, VLANS[0]), (0x8100, 7)]),
            Self::BridgePppoe => Some(Encapsulation::Pppoe(9)),
            Self::VlanDevices => return VLANS.map(|number| tags(&[(0x8100, number)])),
            _ => None,
        };
        [both.clone(), both]
    }

    /// Builds the network, or says why this machine can't.
    ///
    /// # Errors
    /// Without root.
    pub fn build(self) -> Result<Result<Topology, String>> {
        let [first, second] = match self {
            Self::RouterV6 => [&HOME[1..], &VIDEO[1..]],
            _ => [&HOME[..], &VIDEO[..]],
        };
        let builder = Topology::builder().subscriber("home", first).provider("video", second);
        let net = match self {
            Self::RouterJumbo => builder.mtu(9_000).build()?,
            Self::RouterFour => {
                builder.devices([("lan1", Device::Ethernet), ("wan1", Device::Ethernet)]).build()?
            }
            _ if !self.has_addresses() => builder.bridged(self.encapsulation()[0].clone()).build()?,
            Self::Tun => builder.devices([(LAN, Device::Ethernet), (WAN, Device::Tun)]).build()?,
            Self::VlanDevices | Self::Bond | Self::Wireguard | Self::Ppp => {
                let devices = match self {
                    Self::Bond => [(LAN, Device::Ethernet), (WAN, Device::Bond)],
                    Self::Wireguard => [(LAN, Device::Ethernet), (WAN, Device::Wireguard)],
                    Self::Ppp => [(LAN, Device::Ethernet), (WAN, Device::Ppp)],
                    _ => [(LAN, Device::Vlan(VLANS[0])), (WAN, Device::Vlan(VLANS[1]))],
                };
                match builder.devices(devices).build() {
                    Ok(net) => net,
                    Err(error) if is_unknown_device(&error) => {
                        return Ok(Err(format!("this kernel has no such device: {error:#}")));
                    }
                    Err(error) => return Err(error),
                }
            }
            _ => builder.build()?,
        };
        if self == Self::Nat
            && let Err(reason) = masquerade(&net)?
        {
            return Ok(Err(reason));
        }
        Ok(Ok(net))
    }

    /// What `qosd` is told, but for its folders.
    #[must_use]
    pub fn config(self) -> Config {
        let mut config = Config::default();
        let mut each = String::new();
        match self {
            Self::RouterClsact => config.more = "tc_hooks = \"clsact\"".to_owned(),
            Self::RouterGeneric => each.push_str("xdp = \"generic\""),
            Self::RouterTc => each.push_str("xdp = \"off\""),
            Self::Nat => config.more = "nat = true".to_owned(),
            Self::RouterFour => {
                config.interfaces = vec![(LAN, "lan"), ("lan1", "lan"), (WAN, "wan"), ("wan1", "wan")];
            }
            _ => {}
        }
        config.each_interface = each;
        config
    }
}

impl BoxUnderTest {
    /// Builds a box and starts `qosd` on it, or says why this machine can't.
    ///
    /// # Errors
    /// Without root.
    pub fn start(kind: Kind) -> Result<Result<Self, String>> {
        let net = match kind.build()? {
            Ok(net) => net,
            Err(reason) => return Ok(Err(reason)),
        };
        let daemon = Daemon::start(&net.gateway, &kind.config())?;
        Ok(Ok(Self { kind, daemon, net }))
    }

    /// Address of the subscriber as the gateway's LAN sees it, and of the provider.
    #[must_use]
    pub fn addresses(&self, v6: bool) -> [IpAddr; 2] {
        let [home, video] = [self.net.subscriber("home"), self.net.provider("video")];
        if v6 { [home.v6(0).into(), video.v6(0).into()] } else { [home.v4(0).into(), video.v4(0).into()] }
    }
}

/// Puts source NAT on the WAN; says why not where there is no `nft`.
fn masquerade(net: &Topology) -> Result<Result<(), String>> {
    let mut rules = String::from("add table ip nat\n");
    rules.push_str("add chain ip nat out { type nat hook postrouting priority srcnat; }\n");
    write!(rules, "add rule ip nat out oifname {WAN} masquerade").context("writing to a String")?;
    let mut command = Command::new("nft");
    command.arg(rules);
    let Ok(output) = net.gateway.output(command) else {
        return Ok(Err("no `nft` (Debian package nftables)".to_owned()));
    };
    ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
    Ok(Ok(()))
}
