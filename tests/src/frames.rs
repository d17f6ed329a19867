//! Frames made to order, for [`crate::capture::Injector`] and `qos explain`.

use std::net::IpAddr;

use anyhow::{Context as _, Result, bail};
use etherparse::{
    IpDscp, IpEcn, IpFragOffset, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv6Extensions,
    Ipv6FlowLabel, Ipv6Header, PacketBuilder, TcpHeader, UdpHeader,
};

use crate::netlink::Mac;

/// Protocol numbers (IANA).
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// GRE.
pub const GRE: u8 = 47;
/// ICMP for IPv6.
pub const ICMP6: u8 = 58;
/// SCTP.
pub const SCTP: u8 = 132;

/// A frame to be made: Ethernet without a tag, IPv4 or IPv6, and a payload.
#[derive(Clone, Debug)]
pub struct FrameSpec {
    /// Hardware addresses, source and destination.
    pub macs: (Mac, Mac),
    /// Source and destination, of one family.
    pub addresses: (IpAddr, IpAddr),
    /// Protocol number.
    pub protocol: u8,
    /// Source and destination port, where the protocol has any.
    pub ports: (u16, u16),
    /// 0 to 63.
    pub dscp: u8,
    /// 0 to 3.
    pub ecn: u8,
    /// IP length in bytes, headers included.
    pub length: u16,
    /// IPv4 options, a multiple of four bytes.
    pub options: Vec<u8>,
    /// Identification and fragment offset in units of eight bytes, and whether more follow. The
    /// payload is the fragment's alone; a later one has no ports.
    pub fragment: Option<(u16, u16, bool)>,
}

impl FrameSpec {
    /// A UDP packet of 100 bytes.
    #[must_use]
    pub fn udp(macs: (Mac, Mac), addresses: (IpAddr, IpAddr), ports: (u16, u16)) -> Self {
        Self {
            macs,
            addresses,
            protocol: UDP,
            ports,
            dscp: 0,
            ecn: 0,
            length: 100,
            options: Vec::new(),
            fragment: None,
        }
    }

    /// The frame, with right checksums (but for ICMP's and SCTP's, which nobody looks at on the way).
    ///
    /// # Errors
    /// Where the parts don't go together.
    pub fn build(&self) -> Result<Vec<u8>> {
        let header = match self.addresses.0 {
            IpAddr::V4(_) => 20 + self.options.len(),
            IpAddr::V6(_) => 40,
        };
        let size = usize::from(self.length).checked_sub(header).context("shorter than its IP header")?;
        let body = self.body(size)?;
        let ip = self.ip(size)?;
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(self.macs.0, self.macs.1)
            .ip(ip)
            .write(&mut frame, IpNumber(self.protocol), &body)
            .context("writing a frame")?;
        Ok(frame)
    }

    fn ip(&self, size: usize) -> Result<IpHeaders> {
        let dscp = IpDscp::try_new(self.dscp).context("DSCP")?;
        let ecn = IpEcn::try_new(self.ecn).context("ECN")?;
        match self.addresses {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut ip = Ipv4Header::new(
                    u16::try_from(size).context("payload")?,
                    64,
                    IpNumber(self.protocol),
                    source.octets(),
                    destination.octets(),
                )
                .context("IPv4 header")?;
                (ip.dscp, ip.ecn) = (dscp, ecn);
                ip.options = self.options.as_slice().try_into().context("IPv4 options")?;
                if let Some((id, offset, more)) = self.fragment {
                    ip.identification = id;
                    ip.fragment_offset = IpFragOffset::try_new(offset).context("fragment offset")?;
                    ip.more_fragments = more;
                    ip.dont_fragment = false;
                }
                Ok(IpHeaders::Ipv4(ip, Ipv4Extensions::default()))
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                if self.fragment.is_some() {
                    bail!("IPv6 fragments are left to the stack");
                }
                let ip = Ipv6Header {
                    traffic_class: self.dscp << 2 | self.ecn,
                    flow_label: Ipv6FlowLabel::try_new(0xa_bcde).context("flow label")?,
                    payload_length: u16::try_from(size).context("payload")?,
                    next_header: IpNumber(self.protocol),
                    hop_limit: 64,
                    source: source.octets(),
                    destination: destination.octets(),
                };
                Ok(IpHeaders::Ipv6(ip, Ipv6Extensions::default()))
            }
            _ => bail!("addresses of two families"),
        }
    }

    /// Transport header and payload, `size` bytes in all.
    fn body(&self, size: usize) -> Result<Vec<u8>> {
        let pattern = |size: usize| (0..size).map(|byte| byte as u8).collect::<Vec<_>>();
        if self.fragment.is_some_and(|(_, offset, _)| offset != 0) {
            return Ok(pattern(size));
        }
        let (source, destination) = self.ports;
        let shorter_by = |header: usize| size.checked_sub(header).context("shorter than its headers");
        let mut body = match self.protocol {
            UDP => {
                let payload = pattern(shorter_by(8)?);
                let udp = match self.addresses {
                    (IpAddr::V4(from), IpAddr::V4(to)) => UdpHeader::with_ipv4_checksum(
                        source,
                        destination,
                        &Ipv4Header::new(0, 64, IpNumber::UDP, from.octets(), to.octets())?,
                        &payload,
                    )?,
                    (IpAddr::V6(from), IpAddr::V6(to)) => {
                        let ip = Ipv6Header {
                            source: from.octets(),
                            destination: to.octets(),
                            ..Ipv6Header::default()
                        };
                        UdpHeader::with_ipv6_checksum(source, destination, &ip, &payload)?
                    }
                    _ => bail!("addresses of two families"),
                };
                [udp.to_bytes().as_slice(), &payload].concat()
            }
            TCP => {
                let payload = pattern(shorter_by(20)?);
                let mut tcp = TcpHeader::new(source, destination, 1, 1_024);
                tcp.ack = true;
                tcp.checksum = match self.addresses {
                    (IpAddr::V4(from), IpAddr::V4(to)) => {
                        tcp.calc_checksum_ipv4_raw(from.octets(), to.octets(), &payload)?
                    }
                    (IpAddr::V6(from), IpAddr::V6(to)) => {
                        tcp.calc_checksum_ipv6_raw(from.octets(), to.octets(), &payload)?
                    }
                    _ => bail!("addresses of two families"),
                };
                [tcp.to_bytes().as_slice(), &payload].concat()
            }
            SCTP => {
                let ports = u32::from(source) << 16 | u32::from(destination);
                [ports.to_be_bytes().as_slice(), &[0; 8]].concat()
            }
            ICMP => vec![8, 0, 0, 0, 0, 1, 0, 1],
            ICMP6 => vec![128, 0, 0, 0, 0, 1, 0, 1],
            _ => Vec::new(),
        };
        if body.len() > size {
            bail!("{size} bytes are too few for protocol {}", self.protocol);
        }
        body.extend(pattern(size - body.len()));
        Ok(body)
    }
}
