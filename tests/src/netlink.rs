//! Links, addresses and routes of one namespace, over rtnetlink; offloads by ethtool's ioctl.
//!
//! One request at a time, each acknowledged. Qdiscs and classes are only read here, since making
//! them is the product's work; a test that interferes with them uses [`Netlink::request`].

use std::ffi::c_char;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::IpNet;
use netlink_packet_core::{
    DefaultNla, Emitable as _, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use qos_userspace::domain::BitsPerSecond;

use crate::netns::Namespace;

/// A hardware address.
pub type Mac = [u8; 6];

/// A rtnetlink socket of one namespace.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    namespace: String,
    sequence: u32,
}

/// What a namespace says of one of its links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Name, such as `lan0`.
    pub name: String,
    /// Hardware address; zeros where it has none.
    pub mac: Mac,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Id of the XDP program attached, if any.
    pub xdp: Option<u32>,
    /// Since the link was made, as the device counts them: Ethernet frames without checksum, so
    /// the bytes are those that the limiting contract charges on plain Ethernet.
    pub counters: Counters,
}

/// Packets and bytes of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets that the device was given and did not send.
    pub tx_dropped: u64,
}

/// A filter on a clsact hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Interface index.
    pub index: i32,
    /// The hook.
    pub parent: u32,
    /// Priority in the upper 16 bits, protocol in the lower, in network order.
    pub info: u32,
    /// Its number at that priority.
    pub handle: u32,
    /// Of a BPF filter: the id of its program.
    pub program: Option<u32>,
}

/// A qdisc or class as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TrafficControl {
    /// Interface index.
    pub index: i32,
    /// `htb`, `clsact`, `noqueue`, …
    pub kind: String,
    /// Major number in the upper 16 bits, minor in the lower.
    pub handle: u32,
    /// Handle of the parent; `0xffff_ffff` at the root.
    pub parent: u32,
    /// Of a class: its parameters as the kernel writes them. Empty for a qdisc, whose options have
    /// counters among them.
    pub options: Vec<u8>,
}

impl Netlink {
    /// Opens a socket inside `namespace`.
    ///
    /// # Errors
    /// When the kernel refuses one.
    pub fn open(namespace: &Namespace) -> Result<Self> {
        let socket = namespace
            .run(|| -> std::io::Result<Socket> {
                let mut socket = Socket::new(NETLINK_ROUTE)?;
                socket.bind_auto()?;
                socket.connect(&SocketAddr::new(0, 0))?;
                socket.set_ext_ack(true)?;
                Ok(socket)
            })
            .with_context(|| format!("rtnetlink in namespace {}", namespace.name()))?;
        Ok(Self { socket, namespace: namespace.name().to_owned(), sequence: 0 })
    }

    /// Makes a veth pair: `name` here, `peer` in `peer_namespace`. Both are down.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn add_veth(&mut self, name: &str, peer: &str, peer_namespace: &Namespace, mtu: u32) -> Result<()> {
        let mut other = LinkMessage::default();
        other.attributes = vec![
            LinkAttribute::IfName(peer.to_owned()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::NetNsFd(peer_namespace.as_fd().as_raw_fd()),
        ];
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
            ]),
        ];
        self.create(RouteNetlinkMessage::NewLink(link))
            .with_context(|| format!("veth {}/{name} to {}/{peer}", self.namespace, peer_namespace.name()))
    }

    /// Makes a bridge. It is down.
    ///
    /// # Errors
    /// When the kernel has no bridge or the name is taken.
    pub fn add_bridge(&mut self, name: &str) -> Result<()> {
        self.add_device(name, None, vec![LinkInfo::Kind(InfoKind::Bridge)])
    }

    /// Makes a bond that has no links yet. It is down.
    ///
    /// # Errors
    /// When the kernel has no bonds or the name is taken.
    pub fn add_bond(&mut self, name: &str) -> Result<()> {
        self.add_device(name, None, vec![LinkInfo::Kind(InfoKind::Bond)])
    }

    /// Makes a VLAN device on the link `below`. It is down.
    ///
    /// # Errors
    /// When the kernel has no VLAN devices or the name is taken.
    pub fn add_vlan(&mut self, name: &str, below: u32, number: u16) -> Result<()> {
        let data = InfoData::Vlan(vec![InfoVlan::Id(number)]);
        self.add_device(name, Some(below), vec![LinkInfo::Kind(InfoKind::Vlan), LinkInfo::Data(data)])
    }

    /// Makes a WireGuard device, which knows nobody yet. It is down.
    ///
    /// # Errors
    /// When the kernel has no WireGuard or the name is taken.
    pub fn add_wireguard(&mut self, name: &str) -> Result<()> {
        self.add_device(name, None, vec![LinkInfo::Kind(InfoKind::Wireguard)])
    }

    /// Makes a macvlan device on the link `below`. It is down.
    ///
    /// # Errors
    /// When the kernel has no macvlan devices or the name is taken.
    pub fn add_macvlan(&mut self, name: &str, below: u32) -> Result<()> {
        self.add_device(name, Some(below), vec![LinkInfo::Kind(InfoKind::MacVlan)])
    }

    fn add_device(&mut self, name: &str, below: Option<u32>, info: Vec<LinkInfo>) -> Result<()> {
        let mut link = LinkMessage::default();
        link.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        link.attributes.extend(below.map(LinkAttribute::Link));
        let what = format!("device {}/{name}: {info:?}", self.namespace);
        link.attributes.push(LinkAttribute::LinkInfo(info));
        self.create(RouteNetlinkMessage::NewLink(link)).context(what)
    }

    /// The link of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn link(&mut self, name: &str) -> Result<Link> {
        self.links()?
            .into_iter()
            .find(|link| link.name == name)
            .with_context(|| format!("no link {name} in namespace {}", self.namespace))
    }

    /// All links, by index.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn links(&mut self) -> Result<Vec<Link>> {
        let answers = self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(link) => Some(read_link(&link)),
                _ => None,
            })
            .collect())
    }

    /// Sets a link up.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn set_up(&mut self, index: u32) -> Result<()> {
        self.set_flag(index, LinkFlags::Up)
    }

    /// Sets a link down.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn set_down(&mut self, index: u32) -> Result<()> {
        self.set_flag(index, LinkFlags::empty())
    }

    fn set_flag(&mut self, index: u32, up: LinkFlags) -> Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = up;
        link.header.change_mask = LinkFlags::Up;
        self.change(RouteNetlinkMessage::SetLink(link)).with_context(|| format!("link {index} {up:?}"))
    }

    /// Sets a link's hardware address.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn set_mac(&mut self, index: u32, mac: Mac) -> Result<()> {
        self.set_attribute(index, LinkAttribute::Address(mac.to_vec()))
    }

    /// Sets a link's MTU in bytes.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<()> {
        self.set_attribute(index, LinkAttribute::Mtu(mtu))
    }

    /// Makes a link a port of a bridge or bond.
    ///
    /// # Errors
    /// When either doesn't exist.
    pub fn set_controller(&mut self, index: u32, controller: u32) -> Result<()> {
        self.set_attribute(index, LinkAttribute::Controller(controller))
    }

    /// Renames a link.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn rename(&mut self, index: u32, name: &str) -> Result<()> {
        self.set_attribute(index, LinkAttribute::IfName(name.to_owned()))
    }

    fn set_attribute(&mut self, index: u32, attribute: LinkAttribute) -> Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        let what = format!("link {}/{index}: {attribute:?}", self.namespace);
        link.attributes = vec![attribute];
        self.change(RouteNetlinkMessage::SetLink(link)).context(what)
    }

    /// Deletes a link; a veth's other end goes with it.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn delete_link(&mut self, index: u32) -> Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        self.change(RouteNetlinkMessage::DelLink(link))
            .with_context(|| format!("deleting link {}/{index}", self.namespace))
    }

    /// Adds an address, usable at once.
    ///
    /// # Errors
    /// When the link has it already.
    pub fn add_address(&mut self, index: u32, address: IpNet) -> Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(address.addr());
        message.header.prefix_len = address.prefix_len();
        message.header.index = index;
        if address.addr().is_ipv6() {
            message.header.flags = AddressHeaderFlags::Nodad;
        }
        message.attributes =
            vec![AddressAttribute::Address(address.addr()), AddressAttribute::Local(address.addr())];
        self.create(RouteNetlinkMessage::NewAddress(message))
            .with_context(|| format!("address {address} on {}/{index}", self.namespace))
    }

    /// Adds a route out of link `index`, by `gateway` or, without one, to neighbours. The gateway
    /// is taken to be on the link whatever its address.
    ///
    /// # Errors
    /// When the route exists already.
    pub fn add_route(&mut self, destination: IpNet, gateway: Option<IpAddr>, index: u32) -> Result<()> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(destination.addr());
        message.header.destination_prefix_length = destination.prefix_len();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.kind = RouteType::Unicast;
        message.header.scope = RouteScope::Link;
        message.attributes = vec![
            RouteAttribute::Destination(route_address(destination.network())),
            RouteAttribute::Oif(index),
        ];
        if let Some(gateway) = gateway {
            message.header.scope = RouteScope::Universe;
            message.header.flags = RouteFlags::Onlink;
            message.attributes.push(RouteAttribute::Gateway(route_address(gateway)));
        }
        self.create(RouteNetlinkMessage::NewRoute(message))
            .with_context(|| format!("route to {destination} in {}", self.namespace))
    }

    /// All qdiscs of the namespace, sorted.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn qdiscs(&mut self) -> Result<Vec<TrafficControl>> {
        let answers = self.dump(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()))?;
        Ok(traffic_control(answers))
    }

    /// All classes of link `index`, sorted.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn classes(&mut self, index: u32) -> Result<Vec<TrafficControl>> {
        let mut message = TcMessage::default();
        message.header.index = index.cast_signed();
        let answers = self.dump(RouteNetlinkMessage::GetTrafficClass(message))?;
        Ok(traffic_control(answers))
    }

    /// Filters on the clsact hooks of link `index`: ingress, then egress.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn filters(&mut self, index: u32) -> Result<Vec<Filter>> {
        let mut found = Vec::new();
        for minor in [TcHandle::MIN_INGRESS, TcHandle::MIN_EGRESS] {
            let mut message = TcMessage::default();
            message.header.index = index.cast_signed();
            message.header.parent = TcHandle { major: u16::MAX, minor };
            let answers = self.dump(RouteNetlinkMessage::GetTrafficFilter(message))?;
            found.extend(answers.into_iter().filter_map(Filter::read));
        }
        Ok(found)
    }

    fn create(&mut self, message: RouteNetlinkMessage) -> Result<()> {
        self.request(message, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL).map(drop)
    }

    fn change(&mut self, message: RouteNetlinkMessage) -> Result<()> {
        self.request(message, NLM_F_ACK).map(drop)
    }

    fn dump(&mut self, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>> {
        self.request(message, NLM_F_DUMP)
    }

    /// Puts a token bucket in the place of a link's root, as an operator's script would: of `rate`, with
    /// a FIFO of `room` bytes and a burst of `burst`.
    ///
    /// # Errors
    /// When the kernel refuses, or `rate` is above 32 Gbit/s.
    pub fn put_token_bucket(&mut self, index: u32, rate: BitsPerSecond, room: u32, burst: u32) -> Result<()> {
        // linux/pkt_sched.h: struct tc_tbf_qopt {rate, peak rate, limit, buffer, mtu} and its attributes.
        const PARMS: u16 = 1;
        const BURST: u16 = 6;
        let mut parms = Vec::new();
        // struct tc_ratespec {cell_log, link layer, overhead, cell align, smallest packet, bytes/s}.
        parms.extend([0, 1, 0, 0, 0xff, 0xff, 0, 0]);
        parms.extend(u32::try_from(rate.0 / 8).context("a rate above 32 Gbit/s")?.to_ne_bytes());
        parms.extend([0; 12]);
        parms.extend(room.to_ne_bytes());
        parms.extend([0; 8]);
        let mut message = root(index);
        message.attributes = vec![
            TcAttribute::Kind("tbf".to_owned()),
            TcAttribute::Options(vec![
                TcOption::Other(DefaultNla::new(PARMS, parms)),
                TcOption::Other(DefaultNla::new(BURST, burst.to_ne_bytes().to_vec())),
            ]),
        ];
        let new = RouteNetlinkMessage::NewQueueDiscipline(message);
        self.request(new, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE).map(drop)
    }

    /// Puts a `clsact` queueing discipline on a link, and on its ingress hook a filter of `priority` that
    /// runs `program`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn put_filter(
        &mut self,
        index: u32,
        priority: u16,
        name: &str,
        program: BorrowedFd<'_>,
    ) -> Result<()> {
        // linux/pkt_cls.h: TCA_BPF_… and TCA_BPF_FLAG_ACT_DIRECT.
        const FD: u16 = 6;
        const NAME: u16 = 7;
        const FLAGS: u16 = 8;
        const ACT_DIRECT: u32 = 1;
        const ETH_P_ALL: u16 = 3;
        let mut message = root(index);
        message.header.parent = TcHandle::CLSACT;
        message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
        message.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
        self.request(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_ACK | NLM_F_CREATE)?;
        let mut message = root(index);
        message.header.parent = TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS };
        message.header.info = u32::from(priority) << 16 | u32::from(ETH_P_ALL.to_be());
        let option = |kind, bytes: &[u8]| TcOption::Other(DefaultNla::new(kind, bytes.to_vec()));
        message.attributes = vec![
            TcAttribute::Kind("bpf".to_owned()),
            TcAttribute::Options(vec![
                option(FD, &program.as_raw_fd().to_ne_bytes()),
                option(NAME, &[name.as_bytes(), b"\0"].concat()),
                option(FLAGS, &ACT_DIRECT.to_ne_bytes()),
            ]),
        ];
        self.create(RouteNetlinkMessage::NewTrafficFilter(message))
    }

    /// Bytes that wait in the root queueing discipline of a link.
    ///
    /// # Errors
    /// When there is none but the kernel's own.
    pub fn backlog(&mut self, index: u32) -> Result<u32> {
        let answers = self.dump(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()))?;
        let found = answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewQueueDiscipline(message)
                if message.header.index == index.cast_signed() && message.header.parent == TcHandle::ROOT =>
            {
                message.attributes.into_iter().find_map(|attribute| match attribute {
                    TcAttribute::Stats(statistics) => Some(statistics.backlog),
                    _ => None,
                })
            }
            _ => None,
        });
        found.with_context(|| format!("no root qdisc on {}/{index}", self.namespace))
    }

    /// Deletes the root queueing discipline of a link.
    ///
    /// # Errors
    /// When there is none but the kernel's own.
    pub fn delete_root(&mut self, index: u32) -> Result<()> {
        self.request(RouteNetlinkMessage::DelQueueDiscipline(root(index)), NLM_F_ACK).map(drop)
    }

    /// Sends one request and collects the answers up to the acknowledgement or the end of the dump;
    /// `flags` besides `NLM_F_REQUEST` has `NLM_F_ACK` or `NLM_F_DUMP`.
    ///
    /// # Errors
    /// What the kernel refuses, as the [`std::io::Error`] of its number.
    pub fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<Vec<RouteNetlinkMessage>> {
        self.sequence += 1;
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0).context("sending to rtnetlink")?;

        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full().context("receiving from rtnetlink")?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .context("reading rtnetlink's answer")?;
                let length = (answer.header.length as usize).next_multiple_of(4).min(rest.len());
                rest = &rest[length..];
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io().into()),
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Noop => {}
                    other => bail!("rtnetlink answered {other:?}"),
                }
            }
        }
    }
}

/// Whether a link could not be made because the kernel has no such kind.
#[must_use]
pub fn is_unknown_device(error: &anyhow::Error) -> bool {
    // net/core/rtnetlink.c; of a socket, net/socket.c; of /dev/ppp, fs/char_dev.c, or there is no such file.
    let unknown = [libc::EOPNOTSUPP, libc::EAFNOSUPPORT, libc::ENXIO, libc::ENOENT];
    let number = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
    number.is_some_and(|number| unknown.contains(&number))
}

/// Switches segmentation, receive aggregation and transmit checksums of a link on or off.
///
/// Off at the ends of the traffic, what crosses the links are real wire packets.
///
/// # Errors
/// When there is no such link.
pub fn set_offloads(namespace: &Namespace, link: &str, on: bool) -> Result<()> {
    /// `struct ethtool_value` of linux/ethtool.h.
    #[repr(C)]
    struct EthtoolValue {
        command: u32,
        data: u32,
    }
    // linux/ethtool.h. Without transmit checksums the kernel itself clears TSO, whose order here is
    // therefore free.
    const SET: [(&str, u32); 4] = [
        ("receive aggregation (GRO)", 0x2c),
        ("segmentation (GSO)", 0x24),
        ("TCP segmentation (TSO)", 0x1f),
        ("transmit checksums", 0x17),
    ];

    let order: Box<dyn Iterator<Item = &(&str, u32)>> =
        if on { Box::new(SET.iter().rev()) } else { Box::new(SET.iter()) };
    for &(what, command) in order {
        let mut value = EthtoolValue { command, data: u32::from(on) };
        if let Err(error) = ethtool(namespace, link, (&raw mut value).cast()) {
            // What a device does not have is off.
            if on || error.raw_os_error() != Some(libc::EOPNOTSUPP) {
                return Err(error)
                    .with_context(|| format!("setting {what} of {}/{link} to {on}", namespace.name()));
            }
        }
    }
    Ok(())
}

/// Switches one offload of a link on or off, by the kernel's name for it (`rx-gro`).
///
/// # Errors
/// When there is no such link or offload, or it can't be switched.
pub fn set_feature(namespace: &Namespace, link: &str, feature: &str, on: bool) -> Result<()> {
    // linux/ethtool.h: commands, the set of the features' names, the length of a name.
    const GSTRINGS: u32 = 0x1b;
    const SFEATURES: u32 = 0x3b;
    const FEATURES: u32 = 4;
    const LENGTH: usize = 32;
    // struct ethtool_gstrings, with room for more than there are.
    let mut names = vec![0_u32; 3 + 256 * LENGTH / 4];
    names[..2].copy_from_slice(&[GSTRINGS, FEATURES]);
    ethtool(namespace, link, names.as_mut_ptr().cast()).context("the names of the offloads")?;
    let count = names[2] as usize;
    let names: Vec<u8> = names[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let is_it = |name: &[u8]| name.split(|byte| *byte == 0).next() == Some(feature.as_bytes());
    let number = names.chunks(LENGTH).take(count).position(is_it);
    let number = number.with_context(|| format!("there is no offload {feature}"))?;
    // struct ethtool_sfeatures {command, blocks, {valid, requested}…}.
    let blocks = count.div_ceil(32);
    let mut bits = vec![0; 2 + blocks * 2];
    bits[..2].copy_from_slice(&[SFEATURES, blocks as u32]);
    bits[2 + number / 32 * 2] = 1 << (number % 32);
    bits[3 + number / 32 * 2] = u32::from(on) << (number % 32);
    let result = ethtool(namespace, link, bits.as_mut_ptr().cast());
    // Positive: some of it was not taken.
    let refused = result.with_context(|| format!("setting {feature} of {link} to {on}"))?;
    ensure!(refused == 0, "{feature} of {}/{link} can't be set to {on}", namespace.name());
    Ok(())
}

/// Sets the number of queues that a link has for receiving and for sending.
///
/// # Errors
/// When the driver refuses.
pub fn set_queues(namespace: &Namespace, link: &str, receive: u32, send: u32) -> Result<()> {
    // linux/ethtool.h: struct ethtool_channels {command, four maxima, receive, send, other, combined}.
    const SCHANNELS: u32 = 0x3d;
    let mut words = [SCHANNELS, 0, 0, 0, 0, receive, send, 0, 0];
    ethtool(namespace, link, words.as_mut_ptr().cast())
        .map(drop)
        .with_context(|| format!("{receive} and {send} queues for {}/{link}", namespace.name()))
}

/// Calls ethtool on a link with what one of its commands takes.
fn ethtool(namespace: &Namespace, link: &str, data: *mut c_char) -> std::io::Result<i32> {
    let mut name = [0 as c_char; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(link.as_bytes()) {
        *to = from.cast_signed();
    }
    let socket = namespace.run(|| std::net::UdpSocket::bind("127.0.0.1:0"))?;
    let mut request =
        libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: data } };
    // SAFETY: SIOCETHTOOL reads the name and what is behind the pointer, which has the length that its
    // command asks for; both live until the call returns.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}

fn read_link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: Mac::default(),
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        xdp: None,
        counters: Counters::default(),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().unwrap_or_default(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Stats64(stats) => {
                link.counters = Counters {
                    rx_packets: stats.rx_packets,
                    rx_bytes: stats.rx_bytes,
                    tx_packets: stats.tx_packets,
                    tx_bytes: stats.tx_bytes,
                    tx_dropped: stats.tx_dropped,
                };
            }
            LinkAttribute::Xdp(xdp) => {
                link.xdp = xdp.iter().find_map(|part| match part {
                    LinkXdp::ProgId(id) => Some(*id),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}

fn traffic_control(answers: Vec<RouteNetlinkMessage>) -> Vec<TrafficControl> {
    let mut found: Vec<_> = answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewQueueDiscipline(message) => Some((message, false)),
            RouteNetlinkMessage::NewTrafficClass(message) => Some((message, true)),
            _ => None,
        })
        .map(|(message, is_class)| TrafficControl {
            index: message.header.index,
            kind: message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    TcAttribute::Kind(kind) => Some(kind.clone()),
                    _ => None,
                })
                .unwrap_or_default(),
            handle: message.header.handle.into(),
            parent: message.header.parent.into(),
            options: if is_class { options(&message) } else { Vec::new() },
        })
        .collect();
    found.sort();
    found
}

fn options(message: &TcMessage) -> Vec<u8> {
    let options = message.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let mut bytes = Vec::new();
    for option in options.flatten() {
        let start = bytes.len();
        bytes.resize(start + option.buffer_len(), 0);
        option.emit(&mut bytes[start..]);
    }
    bytes
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    }
}

impl Filter {
    /// None: it is the head of a chain.
    fn read(answer: RouteNetlinkMessage) -> Option<Self> {
        let RouteNetlinkMessage::NewTrafficFilter(message) = answer else { return None };
        let options = message.attributes.iter().filter_map(|attribute| match attribute {
            TcAttribute::Options(options) => Some(options),
            _ => None,
        });
        let program = options.flatten().find_map(|option| match option {
            TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
            _ => None,
        });
        let handle = u32::from(message.header.handle);
        (handle != 0).then(|| Self {
            index: message.header.index,
            parent: message.header.parent.into(),
            info: message.header.info,
            handle,
            program,
        })
    }
}

/// Names the root of a link.
fn root(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message.header.parent = TcHandle::ROOT;
    message
}
