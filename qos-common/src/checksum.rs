//! Incremental update of the Internet checksum (RFC 1624, equation 3).

/// Checksum `check` of a header in which one 16-bit word changed from `old` to `new`.
///
/// All three in the byte order of the packet; the sum is the same in either (RFC 1071, section 2).
#[inline(always)]
#[must_use]
pub const fn replace_word(check: u16, old: u16, new: u16) -> u16 {
    let sum = !check as u32 + !old as u32 + new as u32;
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// DS field with the code point replaced and the two ECN bits as they were (RFC 2474, RFC 3168).
#[inline(always)]
#[must_use]
pub const fn with_dscp(ds_field: u8, dscp: u8) -> u8 {
    (dscp << 2) | (ds_field & 0b11)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Checksum of a whole header, its checksum field taken as zero.
    fn checksum(words: &[u16]) -> u16 {
        let mut sum: u32 = words.iter().map(|&word| u32::from(word)).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    proptest! {
        #[test]
        fn update_agrees_with_a_full_sum(mut words in prop::collection::vec(any::<u16>(), 9..30), at in 0usize..9, new in any::<u16>()) {
            // The first word of an IPv4 header is never zero, so the sum is never +0.
            words[8] |= 0x4500;
            let check = checksum(&words);
            let old = words[at % 8];
            words[at % 8] = new;
            prop_assert_eq!(replace_word(check, old, new), checksum(&words));
        }

        #[test]
        fn ecn_bits_are_untouched(field in any::<u8>(), dscp in 0u8..64) {
            let marked = with_dscp(field, dscp);
            prop_assert_eq!(marked & 3, field & 3);
            prop_assert_eq!(marked >> 2, dscp);
        }
    }
}
