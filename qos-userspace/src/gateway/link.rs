//! Network interfaces: what the gateway must know of one before it uses it. Nothing is changed here.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::Parseable as _;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp};

use super::netlink::{NetlinkError, RouteSocket, malformed};

/// A network interface, as it was when it was looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Name.
    pub name: String,
    /// Index.
    pub index: u32,
    /// Largest IP packet, in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Kind of a software interface, such as `veth` or `vlan`; none: hardware.
    pub kind: Option<String>,
    /// Whether it is the loopback interface.
    pub loopback: bool,
    /// What packets on it begin with.
    pub framing: Framing,
    /// Transmit queues.
    pub tx_queues: u32,
    /// Ethernet address.
    pub mac: Option<[u8; 6]>,
    /// Number of the XDP program that is attached to it.
    pub xdp_program: Option<u32>,
    /// Index of the bridge or bond that it is a port of.
    pub controller: Option<u32>,
    /// Index of the interface that it stands on, as a VLAN device does; none also where that is in
    /// another namespace.
    pub lower: Option<u32>,
}

/// An interface's own addresses that others can answer to: the first global one of each family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6.
    pub v6: Option<Ipv6Addr>,
}

impl Addresses {
    /// Reads those of all interfaces of the network namespace of the calling thread, by index.
    ///
    /// # Errors
    /// Where the kernel can't be asked.
    pub fn of_all() -> Result<HashMap<u32, Self>, LinkError> {
        let answer = |error: NetlinkError| LinkError::Addresses(error.to_string());
        let socket = RouteSocket::open().map_err(|error| answer(error.into()))?;
        let message = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let read = |all: &mut HashMap<u32, Self>, payload: &[u8]| {
            let message = AddressMessage::parse(payload).map_err(malformed)?;
            if message.header.scope != AddressScope::Universe {
                return Ok(());
            }
            let own = all.entry(message.header.index).or_default();
            // IPv4 has the own address in `Local`: on point-to-point links `Address` is the peer's.
            let find = |local| {
                message.attributes.iter().find_map(|attribute| match attribute {
                    AddressAttribute::Local(address) if local => Some(*address),
                    AddressAttribute::Address(address) if !local => Some(*address),
                    _ => None,
                })
            };
            match find(true).or_else(|| find(false)) {
                Some(IpAddr::V4(address)) => own.v4 = own.v4.or(Some(address)),
                Some(IpAddr::V6(address)) => own.v6 = own.v6.or(Some(address)),
                None => {}
            }
            Ok(())
        };
        socket.dump(&message, HashMap::new, read).map_err(answer)
    }
}

/// What packets of an interface begin with, as programs and queueing disciplines meet them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// An Ethernet header.
    Ethernet,
    /// The IP header: tun, ppp, wireguard and tunnels of IP in IP.
    Layer3,
    /// Something else: the hardware type, `ARPHRD_…` of linux/if_arp.h.
    Other(u16),
}

impl Framing {
    fn of(layer: LinkLayerType) -> Self {
        // linux/if_arp.h: ARPHRD_NONE, which this crate has no name for.
        const NONE: u16 = 0xfffe;
        match layer {
            // The loopback interface carries empty Ethernet headers.
            LinkLayerType::Ether | LinkLayerType::Loopback => Self::Ethernet,
            LinkLayerType::Ppp
            | LinkLayerType::Rawip
            | LinkLayerType::Tunnel
            | LinkLayerType::Tunnel6
            | LinkLayerType::Sit => Self::Layer3,
            other => match u16::from(other) {
                NONE => Self::Layer3,
                number => Self::Other(number),
            },
        }
    }
}

/// Why an interface could not be looked up.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// There is none of that name in this network namespace.
    #[error("interface {name} does not exist")]
    NotFound {
        /// The name.
        name: String,
    },
    /// The netlink socket could not be opened or used.
    #[error("looking up interface {name}: {source}")]
    Socket {
        /// The name.
        name: String,
        /// What went wrong.
        source: std::io::Error,
    },
    /// The addresses could not be read.
    #[error("reading the interfaces' addresses: {0}")]
    Addresses(String),
    /// The interfaces could not be listed.
    #[error("listing the interfaces: {0}")]
    List(String),
    /// The kernel refused, or its answer could not be read.
    #[error("looking up interface {name}: {reason}")]
    Answer {
        /// The name.
        name: String,
        /// What was wrong.
        reason: String,
    },
}

impl Link {
    /// Looks an interface up in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Where there is none of that name, or the kernel can't be asked.
    pub fn by_name(name: &str) -> Result<Self, LinkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        Self::look_up(message, name)
    }

    /// The same by its index.
    ///
    /// # Errors
    /// Where there is none of that index, or the kernel can't be asked.
    pub fn by_index(index: u32) -> Result<Self, LinkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        Self::look_up(message, &format!("number {index}"))
    }

    /// All of them.
    ///
    /// # Errors
    /// Where the kernel can't be asked.
    pub fn all() -> Result<Vec<Self>, LinkError> {
        let answer = |error: NetlinkError| LinkError::List(error.to_string());
        let socket = RouteSocket::open().map_err(|error| answer(error.into()))?;
        let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let read = |all: &mut Vec<Self>, payload: &[u8]| {
            all.push(Self::read(LinkMessage::parse(payload).map_err(malformed)?));
            Ok(())
        };
        socket.dump(&message, Vec::new, read).map_err(answer)
    }

    fn look_up(message: LinkMessage, name: &str) -> Result<Self, LinkError> {
        Self::ask(message).map_err(|error| match error {
            NetlinkError::Refused(refusal) if refusal.errno == libc::ENODEV => {
                LinkError::NotFound { name: name.to_owned() }
            }
            NetlinkError::Socket(source) => LinkError::Socket { name: name.to_owned(), source },
            other => LinkError::Answer { name: name.to_owned(), reason: other.to_string() },
        })
    }

    fn ask(message: LinkMessage) -> Result<Self, NetlinkError> {
        let socket = RouteSocket::open()?;
        let mut answers = socket.request([(RouteNetlinkMessage::GetLink(message), 0)])?;
        let answer = answers.pop().ok_or_else(|| malformed("no answer"))?;
        answer.result.map_err(NetlinkError::Refused)?;
        let payload = answer.payloads.first().ok_or_else(|| malformed("no interface in the answer"))?;
        Ok(Self::read(LinkMessage::parse(payload).map_err(malformed)?))
    }

    fn read(message: LinkMessage) -> Self {
        let layer = message.header.link_layer_type;
        let mut link = Self {
            name: String::new(),
            index: message.header.index,
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            kind: None,
            loopback: layer == LinkLayerType::Loopback,
            framing: Framing::of(layer),
            tx_queues: 1,
            mac: None,
            xdp_program: None,
            controller: None,
            lower: None,
        };
        let mut elsewhere = false;
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::NumTxQueues(queues) => link.tx_queues = queues,
                LinkAttribute::Controller(index) => link.controller = Some(index),
                LinkAttribute::Link(index) => link.lower = Some(index),
                LinkAttribute::LinkNetNsId(_) => elsewhere = true,
                LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok(),
                LinkAttribute::Xdp(parts) => {
                    link.xdp_program = parts.into_iter().find_map(|part| match part {
                        LinkXdp::ProgId(id) => Some(id),
                        _ => None,
                    });
                }
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.into_iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        link.lower = link.lower.filter(|_| !elsewhere);
        link
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_found_and_others_are_not() {
        let link = Link::by_name("lo").expect("every namespace has one");
        assert_eq!(
            (link.name.as_str(), link.index, link.loopback, link.framing),
            ("lo", 1, true, Framing::Ethernet)
        );
        assert_eq!(link.mac, Some([0; 6]));
        assert_eq!(Link::by_index(1).expect("the same"), link);
        assert!(Link::all().expect("a list").contains(&link));
        let error = Link::by_index(0x7fff_fff0).expect_err("there is none");
        assert_eq!(error.to_string(), "interface number 2147483632 does not exist");
        let error = Link::by_name("no-such-if").expect_err("there is none");
        assert_eq!(error.to_string(), "interface no-such-if does not exist");
    }
}
