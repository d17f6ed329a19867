//! Charged length: what a packet costs on the line.

/// Line overhead, in bytes above the IP length, that makes a charge agree with the kernel's own
/// counters on plain Ethernet.
pub const ETHERNET_OVERHEAD: i16 = 14;

/// Payload of an ATM cell, in bytes (ITU-T I.361).
const CELL_PAYLOAD: u32 = 48;
/// Length of an ATM cell on the line, in bytes.
const CELL: u32 = 53;

/// How a line frames what it carries. The numbers are those of the map values.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LinkLayer {
    /// Frames as they are: Ethernet, fibre, cable.
    #[default]
    Ethernet = 0,
    /// ATM cells of 53 bytes with 48 of payload, the last one padded (ADSL).
    Atm = 1,
    /// PTM's 64/65-octet encapsulation (VDSL2, IEEE 802.3 clause 61.3.3).
    Ptm = 2,
}

impl LinkLayer {
    /// Reads the number of a map value; one that is not known counts as Ethernet.
    #[inline(always)]
    #[must_use]
    pub const fn from_raw(raw: u8) -> Self {
        match raw {
            1 => Self::Atm,
            2 => Self::Ptm,
            _ => Self::Ethernet,
        }
    }
}

/// Bytes that one packet of `ip_length` takes on a line with `overhead` bytes of encapsulation.
///
/// A negative overhead lowers the length, down to zero at most.
#[inline(always)]
#[must_use]
pub const fn charged(ip_length: u32, overhead: i16, link_layer: LinkLayer) -> u32 {
    let framed = ip_length as i64 + overhead as i64;
    let framed = if framed < 0 { 0 } else { framed as u32 };
    match link_layer {
        LinkLayer::Ethernet => framed,
        LinkLayer::Atm => framed.div_ceil(CELL_PAYLOAD) * CELL,
        LinkLayer::Ptm => framed + framed.div_ceil(64),
    }
}

/// Bytes that a packet of `ip_length` leaves unused of its last ATM cell.
#[must_use]
pub const fn unused_in_cells(ip_length: u32, overhead: i16) -> u32 {
    let framed = ip_length as i64 + overhead as i64;
    if framed <= 0 { 0 } else { (CELL_PAYLOAD - framed as u32 % CELL_PAYLOAD) % CELL_PAYLOAD }
}

/// The largest IP length up to `mtu` that leaves nothing of its cells unused; none where there is none.
#[must_use]
pub const fn largest_in_whole_cells(mtu: u32, overhead: i16) -> Option<u32> {
    let framed = mtu as i64 + overhead as i64;
    let whole = framed - framed % CELL_PAYLOAD as i64 - overhead as i64;
    if framed > 0 && whole > 0 && whole <= mtu as i64 { Some(whole as u32) } else { None }
}

/// Bytes that a GSO super-packet takes: each of its `segments` repeats `header` bytes (IP and
/// transport) and its own line overhead. All but the last carry `segment` bytes of payload.
///
/// `ip_length` is that of the super-packet, as the stack sees it, headers counted once.
#[inline(always)]
#[must_use]
pub const fn charged_segments(
    ip_length: u32,
    header: u32,
    segments: u32,
    segment: u32,
    overhead: i16,
    link_layer: LinkLayer,
) -> u32 {
    if segments <= 1 {
        return charged(ip_length, overhead, link_layer);
    }
    let payload = ip_length.saturating_sub(header);
    let last = payload.saturating_sub((segments - 1).saturating_mul(segment));
    (segments - 1).saturating_mul(charged(header + segment, overhead, link_layer))
        + charged(header + last, overhead, link_layer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_of_well_known_packets() {
        // PPPoE over LLC/SNAP bridged ATM: 32 bytes with AAL5's trailer above the IP packet.
        for (ip, overhead, cells) in
            [(40, 32, 2), (64, 32, 2), (65, 32, 3), (1_492, 32, 32), (1_500, 10, 32), (1_500, 40, 33)]
        {
            assert_eq!(charged(ip, overhead, LinkLayer::Atm), cells * 53, "{ip} + {overhead}");
        }
    }

    #[test]
    fn whole_cells() {
        for (mtu, overhead, unused, fits) in [
            (1_500, 32, 4, Some(1_456)),
            (1_504, 32, 0, Some(1_504)),
            (1_500, -20, 8, Some(1_460)),
            (20, 0, 28, None),
        ] {
            assert_eq!(unused_in_cells(mtu, overhead), unused, "{mtu} + {overhead}");
            assert_eq!(largest_in_whole_cells(mtu, overhead), fits, "{mtu} + {overhead}");
            if let Some(fits) = fits {
                assert_eq!(unused_in_cells(fits, overhead), 0);
            }
        }
        assert_eq!((unused_in_cells(10, -20), largest_in_whole_cells(10, -20)), (0, None));
    }

    #[test]
    fn ethernet_and_ptm() {
        assert_eq!(charged(1_500, ETHERNET_OVERHEAD, LinkLayer::Ethernet), 1_514);
        assert_eq!(charged(20, -40, LinkLayer::Ethernet), 0);
        assert_eq!(charged(1_500, 22, LinkLayer::Ptm), 1_522 + 24);
        assert_eq!(charged(0, 0, LinkLayer::Atm), 0);
    }

    #[test]
    fn a_super_packet_costs_what_its_segments_cost() {
        // 10 full segments of 1,448 and one of 100, 52 bytes of headers each.
        let ip_length = 52 + 10 * 1_448 + 100;
        for layer in [LinkLayer::Ethernet, LinkLayer::Atm, LinkLayer::Ptm] {
            let each = 10 * charged(1_500, 14, layer) + charged(152, 14, layer);
            assert_eq!(charged_segments(ip_length, 52, 11, 1_448, 14, layer), each);
        }
        assert_eq!(charged_segments(1_500, 40, 1, 0, 14, LinkLayer::Ethernet), 1_514);
    }
}
