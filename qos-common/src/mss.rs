//! The maximum segment size that an end of a TCP connection announces (RFC 9293, section 3.7.1).

/// Longest options of a TCP header, in bytes.
pub const LONGEST_OPTIONS: usize = 40;

const END: u8 = 0;
const NO_OPERATION: u8 = 1;
const MAXIMUM_SEGMENT_SIZE: u8 = 2;
/// Its length, with kind and length.
const OPTION_LENGTH: u8 = 4;

/// IP and TCP headers without options.
const HEADERS_V4: u32 = 20 + 20;
const HEADERS_V6: u32 = 40 + 20;

/// Segment size at which packets are at most `mtu` bytes long, without options (RFC 6691).
#[inline(always)]
#[must_use]
pub const fn largest_segment(mtu: u32, is_v6: bool) -> u16 {
    let segment = mtu.saturating_sub(if is_v6 { HEADERS_V6 } else { HEADERS_V4 });
    if segment > 0xffff { u16::MAX } else { segment as u16 }
}

/// Offset of the announced size's two bytes among the first `length` bytes of a TCP header's options;
/// none where it announces none, or the options before it can't be followed.
#[inline(always)]
#[must_use]
pub fn find(options: &[u8; LONGEST_OPTIONS], length: usize) -> Option<usize> {
    let mut at = 0;
    // No option is shorter than one byte.
    for _ in 0..LONGEST_OPTIONS {
        if at >= length {
            return None;
        }
        let kind = *options.get(at)?;
        if kind == END {
            return None;
        }
        if kind == NO_OPERATION {
            at += 1;
            continue;
        }
        let own = *options.get(at + 1)?;
        let end = at + own as usize;
        if own < 2 || end > length {
            return None;
        }
        if kind == MAXIMUM_SEGMENT_SIZE {
            return if own == OPTION_LENGTH { Some(at + 2) } else { None };
        }
        at = end;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn padded(options: &[u8]) -> [u8; LONGEST_OPTIONS] {
        let mut all = [0; LONGEST_OPTIONS];
        all[..options.len()].copy_from_slice(options);
        all
    }

    #[test]
    fn the_size_is_found_wherever_it_stands() {
        for (options, expected) in [
            (&[2, 4, 5, 180][..], Some(2)),
            (&[1, 2, 4, 5, 180], Some(3)),
            (&[4, 2, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0, 2, 4, 5, 180], Some(14)),
            (&[1; 36], None),
            (&[], None),
            // Behind the end, of another length, cut off, and behind options that can't be followed.
            (&[0, 2, 4, 5, 180], None),
            (&[2, 5, 5, 180, 0], None),
            (&[2, 3, 5], None),
            (&[2, 4, 5], None),
            (&[2], None),
            (&[8, 0, 2, 4, 5, 180], None),
            (&[8, 1, 2, 4, 5, 180], None),
            (&[8, 200, 2, 4, 5, 180], None),
        ] {
            assert_eq!(find(&padded(options), options.len()), expected, "{options:?}");
        }
        let mut last = [1; LONGEST_OPTIONS];
        last[36..].copy_from_slice(&[2, 4, 5, 180]);
        assert_eq!(find(&last, LONGEST_OPTIONS), Some(38));
    }

    #[test]
    fn segments_fill_packets() {
        assert_eq!(largest_segment(1_500, false), 1_460);
        assert_eq!(largest_segment(1_280, true), 1_220);
        assert_eq!(largest_segment(20, true), 0);
        assert_eq!(largest_segment(100_000, false), u16::MAX);
    }

    proptest! {
        #[test]
        fn what_is_found_lies_within(options in prop::array::uniform32(any::<u8>()), length in 0usize..=32) {
            if let Some(at) = find(&padded(&options), length) {
                prop_assert!(at >= 2 && at + 2 <= length && options[at - 2] == 2 && options[at - 1] == 4);
            }
        }
    }
}
