//! A network interface's port: carrier, speed, offloads and queues. [`super::link`] has the rest.
//!
//! Read by ioctl in the network namespace of the calling thread; `/sys/class/net` would show the
//! namespace that sysfs was mounted in.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::domain::BitsPerSecond;

// linux/ethtool.h: commands that read, the set of the features' names, the length of a name, and
// "speed not known".
const ETHTOOL_GSET: u32 = 0x01;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_GCHANNELS: u32 = 0x3c;
const ETH_SS_FEATURES: u32 = 4;
const ETH_GSTRING_LEN: usize = 32;
const SPEED_UNKNOWN: u32 = u32::MAX;
/// Features that can be asked for: as many as the kernel could ever have, so that a wrong count of its
/// own asks for no more.
const MOST_FEATURES: usize = 1_024;

/// The port of a network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// It has a carrier.
    pub carrier: bool,
    /// Speed of the port; none: the driver does not tell.
    pub speed: Option<BitsPerSecond>,
    /// What the driver and the stack do to packets, by the kernel's names (`rx-gro`); empty: not known.
    pub features: BTreeMap<String, Feature>,
    /// Its queues; none: the driver does not tell.
    pub channels: Option<Channels>,
}

/// An offload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// It is on.
    pub on: bool,
    /// It can be switched.
    pub switchable: bool,
}

/// Queues that packets are received and sent by; those that do both count for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channels {
    /// For receiving.
    pub receive: u32,
    /// For sending.
    pub send: u32,
    /// For receiving, at most.
    pub most_receive: u32,
    /// For both at once, at most; zero: the driver keeps them apart.
    pub most_combined: u32,
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
            features: request.features().unwrap_or_default(),
            channels: request.channels(),
        })
    }

    /// Whether a feature is on; one that is not known is not.
    #[must_use]
    pub fn has(&self, feature: &str) -> bool {
        self.features.get(feature).is_some_and(|feature| feature.on)
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

    /// Carries out an ethtool command, which says itself in the first word how long its answer is;
    /// none: not supported.
    fn ethtool(&mut self, words: &mut [u32]) -> Option<()> {
        let data = words.as_mut_ptr().cast();
        self.ioctl(libc::SIOCETHTOOL, |argument| argument.ifru_data = data).ok().map(drop)
    }

    fn features(&mut self) -> Option<BTreeMap<String, Feature>> {
        // struct ethtool_sset_info {command, reserved, u64 mask of sets, lengths of these}.
        let mut info = [ETHTOOL_GSSET_INFO, 0, 0, 0, 0];
        let mask = (1_u64 << ETH_SS_FEATURES).to_ne_bytes();
        info[2] = u32::from_ne_bytes([mask[0], mask[1], mask[2], mask[3]]);
        info[3] = u32::from_ne_bytes([mask[4], mask[5], mask[6], mask[7]]);
        self.ethtool(&mut info)?;
        let count = usize::try_from(info[4]).ok().filter(|count| (1..=MOST_FEATURES).contains(count))?;
        // struct ethtool_gstrings {command, set, length, names of 32 bytes}. The kernel writes as many
        // as it has, which is what it said.
        let mut names = vec![0; 3 + count * ETH_GSTRING_LEN / 4];
        names[..3].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES, info[4]]);
        self.ethtool(&mut names)?;
        // struct ethtool_gfeatures {command, blocks, {available, requested, active, never changed}…}:
        // a bit a feature.
        let blocks = count.div_ceil(32);
        let mut bits = vec![0; 2 + blocks * 4];
        bits[..2].copy_from_slice(&[ETHTOOL_GFEATURES, u32::try_from(blocks).ok()?]);
        self.ethtool(&mut bits)?;
        let names: Vec<u8> = names[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
        Some(named_features(&names, &bits[2..]))
    }

    fn channels(&mut self) -> Option<Channels> {
        // struct ethtool_channels {command, most receive, send, other, combined, the same as it is}.
        let mut words = [0; 9];
        words[0] = ETHTOOL_GCHANNELS;
        self.ethtool(&mut words)?;
        let [_, most_receive, _, _, most_combined, receive, send, _, combined] = words;
        Some(Channels { receive: receive + combined, send: send + combined, most_receive, most_combined })
    }

    fn speed(&mut self) -> Option<BitsPerSecond> {
        // struct ethtool_cmd: 44 bytes; `speed` is the u16 at byte 12, `speed_hi` the one at 28,
        // both in Mbit/s.
        let mut command = [0_u32; 11];
        command[0] = ETHTOOL_GSET;
        self.ethtool(&mut command)?;
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

/// Puts names of 32 bytes and blocks of four words (available, requested, active, never changed)
/// together.
fn named_features(names: &[u8], bits: &[u32]) -> BTreeMap<String, Feature> {
    let bit = |number: usize, word: usize| {
        bits.get(number / 32 * 4 + word).is_some_and(|word| word >> (number % 32) & 1 != 0)
    };
    let features = names.chunks_exact(ETH_GSTRING_LEN).enumerate().filter_map(|(number, name)| {
        let name = name.split(|byte| *byte == 0).next().filter(|name| !name.is_empty())?;
        let name = String::from_utf8_lossy(name).into_owned();
        Some((name, Feature { on: bit(number, 2), switchable: bit(number, 0) && !bit(number, 3) }))
    });
    features.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_read_by_name() {
        let mut names = vec![0; 34 * ETH_GSTRING_LEN];
        for (number, name) in [(0, "tx-scatter-gather"), (2, "rx-gro"), (33, "rx-lro")] {
            names[number * ETH_GSTRING_LEN..][..name.len()].copy_from_slice(name.as_bytes());
        }
        // Feature 0 is on and fixed, 2 on and free, 33 free and off.
        let features = named_features(&names, &[0b101, 0, 0b101, 0b001, 0b10, 0, 0, 0]);
        let feature = |on, switchable| Some(Feature { on, switchable });
        assert_eq!(features.len(), 3, "those without a name are left out: {features:?}");
        assert_eq!(features.get("tx-scatter-gather").copied(), feature(true, false));
        assert_eq!(features.get("rx-gro").copied(), feature(true, true));
        assert_eq!(features.get("rx-lro").copied(), feature(false, true));
    }

    #[test]
    fn the_loopback_has_features_and_no_queues_of_a_driver() {
        let port = Port::read("lo").expect("every namespace has one");
        assert!(port.features.contains_key("rx-gro") && port.features.contains_key("rx-lro"), "{port:?}");
        assert_eq!((port.has("loopback"), port.channels), (true, None), "{port:?}");
    }

    #[test]
    fn a_missing_interface_is_an_error() {
        Port::read("lo").expect("every namespace has one");
        for name in ["no-such-nic", "a-name-that-is-too-long", ""] {
            Port::read(name).expect_err(name);
        }
    }
}
