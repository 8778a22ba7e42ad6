//! Internet checksums (RFC 1071), computed and updated (RFC 1624).
//!
//! Words are summed as they stand in memory: the one's complement sum does not care about byte order as long as the
//! result is stored the same way.

/// Folds a sum of words of 16 or 32 bits into 16 bits: at most 65,535 words, which no packet has.
///
/// So three steps do. The first leaves at most 2^32 + 65,533, the second at most 0x1fffe, and the third, which adds a carry of at most
/// one, no carry any more.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum + (sum >> 16)) as u16
}

/// The checksum field for a sum: its complement.
#[inline(always)]
pub const fn finish(sum: u64) -> u16 {
    !fold(sum)
}

/// The checksum after one 16-bit word changed from `old` to `new` (RFC 1624, equation 3).
#[inline(always)]
pub fn update(checksum: u16, old: u16, new: u16) -> u16 {
    finish(u64::from(!checksum) + u64::from(!old) + u64::from(new))
}

/// The checksum after a difference (see [`crate::family::Address::difference`]), folded or not.
#[inline(always)]
pub const fn gain(checksum: u16, difference: u64) -> u16 {
    finish(!checksum as u64 + difference)
}

/// The sum of a block; an odd last byte counts as if a zero followed.
pub fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<2>();
    let mut total: u64 = words.iter().map(|word| u64::from(u16::from_ne_bytes(*word))).sum();
    if let [last] = rest {
        total += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, as long as it takes.
    fn folded(mut sum: u64) -> u16 {
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn sums_are_folded_whatever_they_carry() {
        const MOST: u64 = 65_535 * 0xffff_ffff;
        let edges =
            [0, 0xffff, 0x1_0000, 0x1_ffff, 0xffff_0000, 0xffff_ffff, 0x1_0000_0000, 0x1_0000_ffff, 0x1_ffff_ffff, 0x2_0000_0000];
        for edge in edges.into_iter().chain([0xffff_ffff_0000, 0xfffe_ffff_0000, 0xfffe_ffff_ffff, MOST]) {
            for sum in (edge.saturating_sub(3)..=edge + 3).filter(|sum| *sum <= MOST) {
                assert_eq!(fold(sum), folded(sum), "{sum:#x}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_sum_is_folded(sum in 0..=65_535_u64 * 0xffff_ffff) {
            prop_assert_eq!(fold(sum), folded(sum));
        }

        #[test]
        fn incremental_equals_recomputed(mut bytes in prop::collection::vec(any::<u8>(), 20..64), at in 0usize..10, new: [u8; 2]) {
            let at = at * 2;
            let before = finish(sum(&bytes));
            let old = [bytes[at], bytes[at + 1]];
            bytes[at..at + 2].copy_from_slice(&new);
            let updated = update(before, u16::from_ne_bytes(old), u16::from_ne_bytes(new));
            let recomputed = finish(sum(&bytes));
            // 0 and 0xffff are the same number in one's complement; only an all-zero block tells them apart.
            prop_assert!(updated == recomputed || (updated ^ recomputed) == 0xffff);
        }

        #[test]
        fn a_block_with_its_checksum_sums_to_all_ones(bytes in prop::collection::vec(any::<u8>(), 2..200)) {
            let bytes = &bytes[..bytes.len() & !1];
            let check = finish(sum(bytes));
            prop_assert_eq!(fold(sum(bytes) + u64::from(check)), 0xffff);
        }
    }
}
