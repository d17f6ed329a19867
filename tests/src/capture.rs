//! Frames as they are on a link: captured, and injected byte by byte.
//!
//! Parsing is `etherparse`'s; what is here checks what qos may have broken (DSCP, ECN, checksums).

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use etherparse::{LinkSlice, NetSlice, SlicedPacket, TransportSlice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

use crate::netlink::Netlink;
use crate::netns::Namespace;

const RECEIVE_BUFFER: usize = 32 << 20;
/// Largest frame that is kept whole: a GSO super-packet.
const LARGEST: usize = 65_536 + 64;

/// All frames of one link, in both directions, from the moment it is opened.
#[derive(Debug)]
pub struct Capture {
    socket: OwnedFd,
}

/// Puts raw frames on a link.
#[derive(Debug)]
pub struct Injector {
    socket: OwnedFd,
}

/// A captured frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// From the Ethernet header on, a VLAN tag that the kernel took off included; from the IP header on
    /// where the link has no Ethernet.
    pub bytes: Vec<u8>,
    /// Whether it begins with its IP header.
    pub layer3: bool,
    /// Whether the captured link's own namespace sent it.
    pub outgoing: bool,
}

impl Capture {
    /// Opens a capture on `link` of `namespace`.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn open(namespace: &Namespace, link: &str) -> Result<Self> {
        let socket = packet_socket(namespace, link)?;
        setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).context("SO_RCVBUFFORCE")?;
        let on: libc::c_int = 1;
        // SAFETY: the option is an int, which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_AUXDATA,
                (&raw const on).cast(),
                size_of_val(&on) as u32,
            )
        };
        ensure!(result == 0, "PACKET_AUXDATA: {}", io::Error::last_os_error());
        Ok(Self { socket })
    }

    /// The next frame, or `None` when none comes within `limit`.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn next(&self, limit: Duration) -> Result<Option<Frame>> {
        let limit = PollTimeout::try_from(limit).context("time to wait for a frame")?;
        let mut waiting = [PollFd::new(std::os::fd::AsFd::as_fd(&self.socket), PollFlags::POLLIN)];
        if poll(&mut waiting, limit).context("waiting for a frame")? == 0 {
            return Ok(None);
        }
        self.receive().map(Some).context("receiving a frame")
    }

    /// The next frame that `wanted` takes, or `None` when none comes within `limit`; others are
    /// dropped.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn find(&self, limit: Duration, mut wanted: impl FnMut(&Frame) -> bool) -> Result<Option<Frame>> {
        let deadline = Instant::now() + limit;
        loop {
            match self.next(deadline.saturating_duration_since(Instant::now()))? {
                Some(frame) if wanted(&frame) => return Ok(Some(frame)),
                Some(_) if Instant::now() < deadline => {}
                _ => return Ok(None),
            }
        }
    }

    /// Everything that comes within `time`.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn collect(&self, time: Duration) -> Result<Vec<Frame>> {
        let mut frames = Vec::new();
        self.find(time, |frame| {
            frames.push(frame.clone());
            false
        })?;
        Ok(frames)
    }

    fn receive(&self) -> io::Result<Frame> {
        let mut bytes = vec![0_u8; LARGEST];
        let mut control = [0_u64; 8];
        let mut vector = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: zeros are valid for these C structures.
        let (mut from, mut message): (libc::sockaddr_ll, libc::msghdr) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = size_of_val(&from) as u32;
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: everything the message points to outlives the call.
        let length = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, 0) };
        if length < 0 {
            return Err(io::Error::last_os_error());
        }
        bytes.truncate(length.unsigned_abs());
        if let Some(tag) = stripped_tag(&message) {
            bytes.splice(12..12, tag);
        }
        let layer3 = from.sll_hatype != libc::ARPHRD_ETHER && from.sll_hatype != libc::ARPHRD_LOOPBACK;
        Ok(Frame { bytes, layer3, outgoing: from.sll_pkttype == libc::PACKET_OUTGOING })
    }
}

impl Injector {
    /// Opens `link` of `namespace`; [`crate::topology::Host`] has the addresses that frames need.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn open(namespace: &Namespace, link: &str) -> Result<Self> {
        Ok(Self { socket: packet_socket(namespace, link)? })
    }

    /// Sends a frame, from the Ethernet header on, exactly as it is.
    ///
    /// # Errors
    /// When the link is down or the frame longer than its MTU.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: the buffer outlives the call.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("injecting a frame of {} bytes", frame.len()));
        }
        Ok(())
    }
}

impl Frame {
    /// The frame's headers; `None` where it isn't a frame that can be read.
    #[must_use]
    pub fn headers(&self) -> Option<SlicedPacket<'_>> {
        if self.layer3 {
            SlicedPacket::from_ip(&self.bytes).ok()
        } else {
            SlicedPacket::from_ethernet(&self.bytes).ok()
        }
    }

    /// Source and destination address of the IP packet within.
    #[must_use]
    pub fn addresses(&self) -> Option<(IpAddr, IpAddr)> {
        match self.headers()?.net? {
            NetSlice::Ipv4(ip) => {
                Some((ip.header().source_addr().into(), ip.header().destination_addr().into()))
            }
            NetSlice::Ipv6(ip) => {
                Some((ip.header().source_addr().into(), ip.header().destination_addr().into()))
            }
            NetSlice::Arp(_) => None,
        }
    }

    /// Length of the IP packet within, as it says itself.
    #[must_use]
    pub fn ip_length(&self) -> Option<u16> {
        match self.headers()?.net? {
            NetSlice::Ipv4(ip) => Some(ip.header().total_len()),
            NetSlice::Ipv6(ip) => Some(ip.header().payload_length() + 40),
            NetSlice::Arp(_) => None,
        }
    }

    /// Source and destination port, where the packet has any.
    #[must_use]
    pub fn ports(&self) -> Option<(u16, u16)> {
        match self.headers()?.transport? {
            TransportSlice::Udp(udp) => Some((udp.source_port(), udp.destination_port())),
            TransportSlice::Tcp(tcp) => Some((tcp.source_port(), tcp.destination_port())),
            _ => None,
        }
    }

    /// DSCP of the IP packet, 0 to 63.
    #[must_use]
    pub fn dscp(&self) -> Option<u8> {
        self.traffic_class().map(|class| class >> 2)
    }

    /// ECN bits of the IP packet, 0 to 3.
    #[must_use]
    pub fn ecn(&self) -> Option<u8> {
        self.traffic_class().map(|class| class & 3)
    }

    fn traffic_class(&self) -> Option<u8> {
        match self.headers()?.net? {
            NetSlice::Ipv4(ip) => Some(ip.header().dcp().value() << 2 | ip.header().ecn().value()),
            NetSlice::Ipv6(ip) => Some(ip.header().traffic_class()),
            NetSlice::Arp(_) => None,
        }
    }

    /// Checks the IPv4 header's checksum and, in an unfragmented packet, that of UDP or TCP.
    ///
    /// Transport checksums are wrong by design where the sender leaves them to its NIC
    /// ([`crate::topology::Builder::offloads`]).
    ///
    /// # Errors
    /// Says which checksum is wrong, with both values.
    pub fn verify_checksums(&self) -> Result<()> {
        let headers = self.headers().context("not a frame that can be read")?;
        ensure!(self.layer3 || matches!(headers.link, Some(LinkSlice::Ethernet2(_))), "not Ethernet");
        let net = headers.net.context("not an IP packet")?;
        if let NetSlice::Ipv4(ip) = &net {
            let (found, computed) =
                (ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
            ensure!(found == computed, "IPv4 header checksum is {found:#06x}, computed {computed:#06x}");
        }
        let (name, found, computed) = match (&headers.transport, &net) {
            (Some(TransportSlice::Udp(udp)), NetSlice::Ipv4(ip)) => (
                "UDP",
                udp.checksum(),
                udp.to_header().calc_checksum_ipv4(&ip.header().to_header(), udp.payload())?,
            ),
            (Some(TransportSlice::Udp(udp)), NetSlice::Ipv6(ip)) => (
                "UDP",
                udp.checksum(),
                udp.to_header().calc_checksum_ipv6(&ip.header().to_header(), udp.payload())?,
            ),
            (Some(TransportSlice::Tcp(tcp)), NetSlice::Ipv4(ip)) => (
                "TCP",
                tcp.checksum(),
                tcp.to_header().calc_checksum_ipv4(&ip.header().to_header(), tcp.payload())?,
            ),
            (Some(TransportSlice::Tcp(tcp)), NetSlice::Ipv6(ip)) => (
                "TCP",
                tcp.checksum(),
                tcp.to_header().calc_checksum_ipv6(&ip.header().to_header(), tcp.payload())?,
            ),
            _ => return Ok(()),
        };
        ensure!(found == computed, "{name} checksum is {found:#06x}, computed {computed:#06x}");
        Ok(())
    }
}

fn packet_socket(namespace: &Namespace, link: &str) -> Result<OwnedFd> {
    use std::os::fd::FromRawFd as _;

    let index = Netlink::open(namespace)?.link(link)?.index;
    let every_protocol = (libc::ETH_P_ALL as u16).to_be();
    let open = || {
        // SAFETY: opens a descriptor that nobody else owns.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: zeros are valid for this C structure.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = every_protocol;
        address.sll_ifindex = index.cast_signed();
        // SAFETY: the address outlives the call.
        let result = unsafe { libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32) };
        if result == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
    };
    namespace.run(open).with_context(|| format!("packet socket on {}/{link}", namespace.name()))
}

/// The outer VLAN tag, which the kernel hands over beside the frame (packet(7), `PACKET_AUXDATA`).
fn stripped_tag(message: &libc::msghdr) -> Option<[u8; 4]> {
    /// `TP_STATUS_VLAN_VALID` and `TP_STATUS_VLAN_TPID_VALID` of linux/if_packet.h.
    const TCI_VALID: u32 = 1 << 4;
    const TPID_VALID: u32 = 1 << 6;
    // SAFETY: the kernel has filled the control buffer that the header points to and set its
    // length; the macros stay within it.
    let auxiliary: libc::tpacket_auxdata = unsafe {
        let control = libc::CMSG_FIRSTHDR(message);
        if control.is_null()
            || (*control).cmsg_level != libc::SOL_PACKET
            || (*control).cmsg_type != libc::PACKET_AUXDATA
        {
            return None;
        }
        libc::CMSG_DATA(control).cast::<libc::tpacket_auxdata>().read_unaligned()
    };
    if auxiliary.tp_status & TCI_VALID == 0 {
        return None;
    }
    let tpid = if auxiliary.tp_status & TPID_VALID == 0 { 0x8100 } else { auxiliary.tp_vlan_tpid };
    let ([a, b], [c, d]) = (tpid.to_be_bytes(), auxiliary.tp_vlan_tci.to_be_bytes());
    Some([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    fn udp_frame() -> Vec<u8> {
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
            .ipv4([192, 0, 2, 10], [203, 0, 113, 10], 64)
            .udp(1_234, 5_000);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, b"payload").expect("writing to a Vec");
        bytes
    }

    #[test]
    fn a_right_frame_verifies_and_a_changed_one_does_not() {
        let frame = |bytes| Frame { bytes, layer3: false, outgoing: false };
        let right = frame(udp_frame());
        right.verify_checksums().unwrap();
        assert_eq!(right.ports(), Some((1_234, 5_000)));
        assert_eq!((right.dscp(), right.ecn()), (Some(0), Some(0)));

        for (offset, what) in [(14 + 1, "IPv4 header checksum"), (14 + 20 + 8, "UDP checksum")] {
            let mut bytes = udp_frame();
            bytes[offset] ^= 0xb8;
            let error = frame(bytes).verify_checksums().expect_err("one bit differs").to_string();
            assert!(error.starts_with(what), "{error}");
        }
    }
}
