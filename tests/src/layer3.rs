//! Links of the kernel's own whose packets begin with their IP header: WireGuard, and PPP in a PPPoE
//! session. Both ends are made at once, on the two ends of a wire that is up. Devices whose other end
//! is a program are in [`crate::tunnel`].

use std::ffi::c_int;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, bail};
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};

use crate::netlink::{Mac, Netlink};
use crate::netns::Namespace;

/// Bytes that either puts around a packet, at most.
pub const OVERHEAD: u32 = 80;

/// An end of a link that is to be made.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// Where.
    pub namespace: &'a Namespace,
    /// Its name.
    pub name: &'a str,
    /// The wire below it, which is up.
    pub wire: &'a str,
}

/// A private key each, and the public key that belongs to it (X25519, RFC 7748).
const KEYS: [([u8; 32], [u8; 32]); 2] = [
    (
        [0x11; 32],
        [
            0x7b, 0x4e, 0x90, 0x9b, 0xbe, 0x7f, 0xfe, 0x44, 0xc4, 0x65, 0xa2, 0x20, 0x03, 0x7d, 0x60, 0x8e,
            0xe3, 0x58, 0x97, 0xd3, 0x1e, 0xf9, 0x72, 0xf0, 0x7f, 0x74, 0x89, 0x2c, 0xb0, 0xf7, 0x3f, 0x13,
        ],
    ),
    (
        [0x22; 32],
        [
            0x0f, 0xaa, 0x68, 0x4e, 0xd2, 0x88, 0x67, 0xb9, 0x7f, 0x4a, 0x6a, 0x2d, 0xee, 0x5d, 0xf8, 0xce,
            0x97, 0x4e, 0x76, 0xb7, 0x01, 0x8e, 0x3f, 0x22, 0xa1, 0xc4, 0xcf, 0x26, 0x78, 0x57, 0x0f, 0x20,
        ],
    ),
];
/// Addresses of the wire's ends (RFC 2544's), and the port of both.
const OUTER: [[u8; 4]; 2] = [[198, 18, 0, 1], [198, 18, 0, 2]];
const PORT: u16 = 51_820;
/// Number of the PPPoE session.
const SESSION: u16 = 7;

/// Makes a WireGuard device at each end, which takes everything to the other. They are down.
///
/// # Errors
/// When the kernel has none.
pub fn wireguard(ends: [End<'_>; 2]) -> Result<()> {
    for (here, end) in ends.into_iter().enumerate() {
        let there = 1 - here;
        let mut netlink = Netlink::open(end.namespace)?;
        netlink.add_wireguard(end.name)?;
        let wire = netlink.link(end.wire)?.index;
        let [a, b, c, d] = OUTER[here];
        netlink
            .add_address(wire, format!("{a}.{b}.{c}.{d}/30").parse().context("an address of this file")?)?;
        let device = netlink.link(end.name)?.index;
        configure(end.namespace, device, &KEYS[here].0, &KEYS[there].1, OUTER[there])
            .with_context(|| format!("WireGuard device {}", end.name))?;
    }
    Ok(())
}

/// Tells a WireGuard device its key and its one peer (linux/wireguard.h).
fn configure(
    namespace: &Namespace,
    index: u32,
    private: &[u8; 32],
    peer: &[u8; 32],
    at: [u8; 4],
) -> Result<()> {
    const SET_DEVICE: u8 = 1;
    let socket = namespace.run(|| -> io::Result<Socket> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(socket)
    })?;
    // `struct sockaddr_in`.
    let mut endpoint = (libc::AF_INET as u16).to_ne_bytes().to_vec();
    endpoint.extend(PORT.to_be_bytes());
    endpoint.extend(at);
    endpoint.extend([0; 8]);
    let everything = [(libc::AF_INET, vec![0; 4]), (libc::AF_INET6, vec![0; 16])];
    let allowed: Vec<u8> = everything
        .into_iter()
        .flat_map(|(family, address)| {
            let parts =
                [attribute(1, &(family as u16).to_ne_bytes()), attribute(2, &address), attribute(3, &[0])];
            attribute(NESTED, &parts.concat())
        })
        .collect();
    let peer = [attribute(1, peer), attribute(4, &endpoint), attribute(NESTED | 9, &allowed)].concat();
    let device = [
        attribute(1, &index.to_ne_bytes()),
        attribute(3, private),
        attribute(6, &PORT.to_ne_bytes()),
        attribute(NESTED | 8, &attribute(NESTED, &peer)),
    ];
    let family = family_number(&socket, "wireguard")?;
    ask(&socket, family, SET_DEVICE, 1, &device.concat()).map(drop)
}

// linux/netlink.h
const NESTED: u16 = 1 << 15;
/// `struct nlmsghdr` and `struct genlmsghdr`.
const HEADERS: usize = 16 + 4;

/// A netlink attribute, padded.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Number of a family of generic netlink (linux/genetlink.h).
fn family_number(socket: &Socket, name: &str) -> Result<u16> {
    const CONTROLLER: u16 = 0x10;
    const GET_FAMILY: u8 = 3;
    const FAMILY_ID: u16 = 1;
    const FAMILY_NAME: u16 = 2;
    let asked = attribute(FAMILY_NAME, format!("{name}\0").as_bytes());
    let answer = ask(socket, CONTROLLER, GET_FAMILY, 2, &asked)?;
    let mut rest = answer.get(HEADERS..).unwrap_or_default();
    while let Some((header, behind)) = rest.split_at_checked(4) {
        let [length, kind] = [0, 2].map(|at| u16::from_ne_bytes([header[at], header[at + 1]]));
        if let (FAMILY_ID, [low, high, ..]) = (kind, behind) {
            return Ok(u16::from_ne_bytes([*low, *high]));
        }
        rest = rest.get(usize::from(length.max(4)).next_multiple_of(4)..).unwrap_or_default();
    }
    bail!("generic netlink has no family `{name}`")
}

/// Sends a request; returns the answer before the acknowledgement, if there is one.
fn ask(socket: &Socket, family: u16, command: u8, version: u8, attributes: &[u8]) -> Result<Vec<u8>> {
    const ERROR: u16 = 2;
    const REQUEST_AND_ACK: u16 = 1 | 4;
    let mut message = ((HEADERS + attributes.len()) as u32).to_ne_bytes().to_vec();
    message.extend(family.to_ne_bytes());
    message.extend(REQUEST_AND_ACK.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([command, version, 0, 0]);
    message.extend(attributes);
    socket.send(&message, 0).context("sending to generic netlink")?;
    let mut found = Vec::new();
    loop {
        let (answer, _) = socket.recv_from_full().context("receiving from generic netlink")?;
        match answer.get(4..6) {
            Some(kind) if kind == ERROR.to_ne_bytes() => {
                let number = answer.get(16..20).context("a short acknowledgement")?;
                let number = i32::from_ne_bytes(number.try_into().context("four bytes")?);
                return if number == 0 {
                    Ok(found)
                } else {
                    Err(io::Error::from_raw_os_error(-number).into())
                };
            }
            _ => found = answer,
        }
    }
}

/// Makes a PPP device at each end of a PPPoE session that nobody negotiated. They are down, and go
/// when what is returned is dropped.
///
/// # Errors
/// When the kernel has none.
pub fn ppp(ends: [End<'_>; 2]) -> Result<Vec<OwnedFd>> {
    let mut macs = [Mac::default(); 2];
    for (mac, end) in macs.iter_mut().zip(ends) {
        *mac = Netlink::open(end.namespace)?.link(end.wire)?.mac;
    }
    let mut held = Vec::new();
    for (end, beyond) in ends.into_iter().zip([macs[1], macs[0]]) {
        let (unit, descriptors) = end.namespace.run(|| ppp_unit(end.wire, beyond))?;
        held.extend(descriptors);
        let mut netlink = Netlink::open(end.namespace)?;
        let index = netlink.link(&format!("ppp{unit}"))?.index;
        netlink.rename(index, end.name)?;
    }
    Ok(held)
}

/// Makes a device `pppN` of the calling thread's namespace over `wire` to the hardware address
/// `beyond`; returns N and what holds it.
fn ppp_unit(wire: &str, beyond: Mac) -> Result<(c_int, [OwnedFd; 3])> {
    // linux/if_pppox.h, linux/ppp-ioctl.h
    const AF_PPPOX: c_int = 24;
    const GET_CHANNEL: libc::c_ulong = 0x8004_7437;
    const ATTACH_CHANNEL: libc::c_ulong = 0x4004_7438;
    const CONNECT: libc::c_ulong = 0x4004_743a;
    const NEW_UNIT: libc::c_ulong = 0xc004_743e;
    // SAFETY: no pointers.
    let session = unsafe { libc::socket(AF_PPPOX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if session < 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: a descriptor that nobody else owns.
    let session = unsafe { OwnedFd::from_raw_fd(session) };
    // `struct sockaddr_pppox`, packed: family, protocol (PPPoE is 0), session, hardware address, device.
    let mut address = (AF_PPPOX as u16).to_ne_bytes().to_vec();
    address.extend([0; 4]);
    address.extend(SESSION.to_be_bytes());
    address.extend(beyond);
    address.extend(wire.as_bytes());
    address.resize(2 + 4 + 2 + 6 + libc::IFNAMSIZ, 0);
    // SAFETY: the address is read, and outlives the call.
    let result = unsafe {
        libc::connect(session.as_raw_fd(), address.as_ptr().cast(), address.len() as libc::socklen_t)
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("a PPPoE session over {wire}"));
    }
    let ioctl = |fd: c_int, request: libc::c_ulong, number: &mut c_int| -> Result<()> {
        // SAFETY: each of these requests reads or writes one int, which outlives the call.
        match unsafe { libc::ioctl(fd, request as _, std::ptr::from_mut(number)) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()).with_context(|| format!("ioctl {request:#x} of PPP")),
        }
    };
    let open = || File::options().read(true).write(true).open("/dev/ppp");
    let (channel, device) = (OwnedFd::from(open()?), OwnedFd::from(open()?));
    let (mut number, mut unit) = (0, -1);
    ioctl(session.as_raw_fd(), GET_CHANNEL, &mut number)?;
    ioctl(channel.as_raw_fd(), ATTACH_CHANNEL, &mut number)?;
    ioctl(device.as_raw_fd(), NEW_UNIT, &mut unit)?;
    ioctl(channel.as_raw_fd(), CONNECT, &mut unit)?;
    Ok((unit, [session, channel, device]))
}
