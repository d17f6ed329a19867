//! Flowtables of nftables: flows that netfilter forwards by a short cut. Nothing is changed here.

use std::io;

use netlink_packet_core::{NetlinkSerializable, NlasIterator};

use super::link::Link;
use super::netlink::{NetlinkError, Refusal, RouteSocket, malformed};

// linux/netfilter/nfnetlink.h and nf_tables.h.
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETFLOWTABLE: u16 = 23;
const NFTA_FLOWTABLE_TABLE: u16 = 1;
const NFTA_FLOWTABLE_NAME: u16 = 2;
const NFTA_FLOWTABLE_HOOK: u16 = 3;
const NFTA_FLOWTABLE_FLAGS: u16 = 7;
const NFTA_FLOWTABLE_HOOK_DEVS: u16 = 3;
const NFTA_DEVICE_NAME: u16 = 1;
const NFTA_DEVICE_PREFIX: u16 = 2;
const NFT_FLOWTABLE_HW_OFFLOAD: u32 = 1;
/// `struct nfgenmsg`: family, version, resource.
const NFGENMSG: usize = 4;

/// A flowtable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flowtable {
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// Names of the devices by which packets come that it takes; a `*` at the end stands for anything.
    pub devices: Vec<String>,
    /// Flows are given to the devices' hardware where it takes them.
    pub hardware: bool,
}

/// Why they can't be listed.
#[derive(Debug, thiserror::Error)]
#[error("the flowtables of nftables: {0}")]
pub struct FlowtableError(String);

impl Flowtable {
    /// Lists those of the network namespace of the calling thread; none where the kernel has no
    /// nftables.
    ///
    /// # Errors
    /// Where the kernel can't be asked.
    pub fn all() -> Result<Vec<Self>, FlowtableError> {
        Self::ask().or_else(|error| match error {
            // No netfilter netlink, or nobody in it who answers for nftables.
            NetlinkError::Socket(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => {
                Ok(Vec::new())
            }
            NetlinkError::Refused(Refusal { errno: libc::EINVAL | libc::EOPNOTSUPP, .. }) => Ok(Vec::new()),
            other => Err(FlowtableError(other.to_string())),
        })
    }

    fn ask() -> Result<Vec<Self>, NetlinkError> {
        let socket = RouteSocket::open_netfilter().map_err(|error: io::Error| NetlinkError::from(error))?;
        socket.dump(&GetFlowtables, Vec::new, |all: &mut Vec<Self>, payload| {
            all.push(Self::read(payload)?);
            Ok(())
        })
    }

    fn read(payload: &[u8]) -> Result<Self, NetlinkError> {
        let attributes =
            payload.get(NFGENMSG..).ok_or_else(|| malformed("a flowtable of less than four bytes"))?;
        let mut flowtable = Self::default();
        for attribute in NlasIterator::new(attributes) {
            let attribute = attribute.map_err(malformed)?;
            match attribute.kind() {
                NFTA_FLOWTABLE_TABLE => flowtable.table = text(attribute.value()),
                NFTA_FLOWTABLE_NAME => flowtable.name = text(attribute.value()),
                NFTA_FLOWTABLE_HOOK => flowtable.devices = devices(attribute.value())?,
                NFTA_FLOWTABLE_FLAGS => {
                    let flags = attribute.value().first_chunk().map_or(0, |flags| u32::from_be_bytes(*flags));
                    flowtable.hardware = flags & NFT_FLOWTABLE_HW_OFFLOAD != 0;
                }
                _ => {}
            }
        }
        Ok(flowtable)
    }

    /// Whether it takes packets that come by an interface.
    #[must_use]
    pub fn takes(&self, link: &Link) -> bool {
        self.devices.iter().any(|device| match device.strip_suffix('*') {
            Some(prefix) => link.name.starts_with(prefix),
            None => *device == link.name,
        })
    }
}

fn devices(hook: &[u8]) -> Result<Vec<String>, NetlinkError> {
    let mut names = Vec::new();
    for attribute in NlasIterator::new(hook) {
        let attribute = attribute.map_err(malformed)?;
        if attribute.kind() != NFTA_FLOWTABLE_HOOK_DEVS {
            continue;
        }
        for device in NlasIterator::new(attribute.value()) {
            let device = device.map_err(malformed)?;
            match device.kind() {
                NFTA_DEVICE_NAME => names.push(text(device.value())),
                NFTA_DEVICE_PREFIX => names.push(text(device.value()) + "*"),
                _ => {}
            }
        }
    }
    Ok(names)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

/// `NFT_MSG_GETFLOWTABLE` of all families and tables.
#[derive(Clone)]
struct GetFlowtables;

impl NetlinkSerializable for GetFlowtables {
    fn message_type(&self) -> u16 {
        NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETFLOWTABLE
    }

    fn buffer_len(&self) -> usize {
        NFGENMSG
    }

    fn serialize(&self, buffer: &mut [u8]) {
        // Family, version and resource are all zero: NFPROTO_UNSPEC, NFNETLINK_V0.
        buffer[..NFGENMSG].fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn named(kind: u16, name: &str) -> Vec<u8> {
        attribute(kind, &[name.as_bytes(), b"\0"].concat())
    }

    /// As nf_tables_fill_flowtable_info of net/netfilter/nf_tables_api.c writes it.
    fn message(flags: Option<u32>) -> Vec<u8> {
        const NESTED: u16 = 0x8000;
        let devices = [
            named(NFTA_DEVICE_NAME, "lan0"),
            named(NFTA_DEVICE_NAME, "wan0"),
            named(NFTA_DEVICE_PREFIX, "ppp"),
        ]
        .concat();
        let hook = [
            attribute(1, &0_u32.to_be_bytes()),
            attribute(2, &(-5_i32).to_be_bytes()),
            attribute(NESTED | NFTA_FLOWTABLE_HOOK_DEVS, &devices),
        ]
        .concat();
        let flags = flags.map(|flags| attribute(NFTA_FLOWTABLE_FLAGS, &flags.to_be_bytes()));
        [
            vec![1, 0, 0, 9],
            named(NFTA_FLOWTABLE_TABLE, "filter"),
            named(NFTA_FLOWTABLE_NAME, "fast"),
            attribute(4, &1_u32.to_be_bytes()),
            flags.unwrap_or_default(),
            attribute(NESTED | NFTA_FLOWTABLE_HOOK, &hook),
        ]
        .concat()
    }

    #[test]
    fn flowtables_are_read() {
        let devices = ["lan0", "wan0", "ppp*"].map(str::to_owned).to_vec();
        for (flags, hardware) in [(None, false), (Some(0), false), (Some(2), false), (Some(3), true)] {
            let (table, name) = ("filter".to_owned(), "fast".to_owned());
            let expected = Flowtable { table, name, devices: devices.clone(), hardware };
            assert_eq!(Flowtable::read(&message(flags)).expect("readable"), expected);
        }
        let whole = message(Some(1));
        assert!(Flowtable::read(&whole[..2]).is_err(), "shorter than its header");
        assert!(Flowtable::read(&whole[..whole.len() - 6]).is_err(), "cut off in its last attribute");
    }

    #[test]
    fn a_name_with_a_star_stands_for_many() {
        let flowtable = Flowtable::read(&message(None)).expect("readable");
        let link =
            |name: &str| Link { name: name.to_owned(), ..Link::by_name("lo").expect("every box has it") };
        for (name, expected) in [("lan0", true), ("lan01", false), ("ppp0", true), ("eth0", false)] {
            assert_eq!(flowtable.takes(&link(name)), expected, "{name}");
        }
    }
}
