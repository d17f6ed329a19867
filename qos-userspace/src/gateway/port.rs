//! A network interface's port: carrier, speed and offloads. [`super::link`] has the rest.
//!
//! Read by ioctl in the network namespace of the calling thread; `/sys/class/net` would show the
//! namespace that sysfs was mounted in.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::domain::BitsPerSecond;

// linux/ethtool.h: commands that read, the flag of LRO, and "speed not known".
const ETHTOOL_GSET: u32 = 0x01;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_GGRO: u32 = 0x2b;
const ETH_FLAG_LRO: u32 = 1 << 15;
const SPEED_UNKNOWN: u32 = u32::MAX;

/// The port of a network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// It has a carrier.
    pub carrier: bool,
    /// Speed of the port; none: the driver does not tell.
    pub speed: Option<BitsPerSecond>,
    /// Merges packets in software as they come in; none: not known.
    pub gro: Option<bool>,
    /// Merges packets in hardware as they come in; none: not known.
    pub lro: Option<bool>,
}

impl Port {
    /// Reads the port of an interface.
    ///
    /// # Errors
    /// Where there is no such interface, or the kernel refuses.
    pub fn read(interface: &str) -> io::Result<Self> {
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        let mut request = Request { socket, name: name_bytes(interface)? };
        // SAFETY: SIOCGIFFLAGS writes this member.
        let flags = i32::from(unsafe { request.ioctl(libc::SIOCGIFFLAGS, |_| {})?.ifru_flags });
        Ok(Self {
            carrier: flags & libc::IFF_RUNNING != 0,
            speed: request.speed(),
            gro: request.ethtool_value(ETHTOOL_GGRO).map(|value| value != 0),
            lro: request.ethtool_value(ETHTOOL_GFLAGS).map(|flags| flags & ETH_FLAG_LRO != 0),
        })
    }
}

fn name_bytes(name: &str) -> io::Result<[libc::c_char; libc::IFNAMSIZ]> {
    let mut bytes = [0; libc::IFNAMSIZ];
    // The last byte stays zero.
    if name.is_empty() || name.len() >= bytes.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in bytes.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(bytes)
}

struct Request {
    socket: OwnedFd,
    name: [libc::c_char; libc::IFNAMSIZ],
}

impl Request {
    fn ioctl(
        &mut self,
        command: libc::c_ulong,
        prepare: impl FnOnce(&mut libc::__c_anonymous_ifr_ifru),
    ) -> io::Result<libc::__c_anonymous_ifr_ifru> {
        // SAFETY: all zeros is a value of this union of integers, addresses and pointers.
        let mut argument: libc::__c_anonymous_ifr_ifru = unsafe { std::mem::zeroed() };
        prepare(&mut argument);
        let mut request = libc::ifreq { ifr_name: self.name, ifr_ifru: argument };
        // SAFETY: the commands used here take a `struct ifreq` and write into nothing else than it
        // and, for SIOCETHTOOL, the buffer that `prepare` points to, which outlives the call and has
        // the size that its ethtool command asks for.
        let result = unsafe { libc::ioctl(self.socket.as_raw_fd(), command as _, &raw mut request) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(request.ifr_ifru) }
    }

    /// What an ethtool command of the `struct ethtool_value` kind answers; none: not supported.
    fn ethtool_value(&mut self, command: u32) -> Option<u32> {
        let mut value = [command, 0];
        let data = value.as_mut_ptr().cast();
        self.ioctl(libc::SIOCETHTOOL, |argument| argument.ifru_data = data).ok()?;
        Some(value[1])
    }

    fn speed(&mut self) -> Option<BitsPerSecond> {
        // struct ethtool_cmd: 44 bytes; `speed` is the u16 at byte 12, `speed_hi` the one at 28,
        // both in Mbit/s.
        let mut command = [0_u32; 11];
        command[0] = ETHTOOL_GSET;
        let data = command.as_mut_ptr().cast();
        self.ioctl(libc::SIOCETHTOOL, |argument| argument.ifru_data = data).ok()?;
        let half = |word: u32| {
            let bytes = word.to_ne_bytes();
            u32::from(u16::from_ne_bytes([bytes[0], bytes[1]]))
        };
        match half(command[7]) << 16 | half(command[3]) {
            0 | SPEED_UNKNOWN => None,
            // 16 bits of ones is how drivers older than `speed_hi` say it.
            0xffff => None,
            mbit => Some(BitsPerSecond(u64::from(mbit) * 1_000_000)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_interface_is_an_error() {
        Port::read("lo").expect("every namespace has one");
        for name in ["no-such-nic", "a-name-that-is-too-long", ""] {
            Port::read(name).expect_err(name);
        }
    }
}
