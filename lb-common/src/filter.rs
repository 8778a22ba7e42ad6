//! The "may be ours" filter: one bit per hashed address, so that foreign packets leave after a single array read.
//!
//! A bitmap of [`BITS`] bits stands in an array map of 64-bit words. Userspace sets the bit of every virtual address;
//! the datapath tests the bit of a packet's destination. A set bit promises nothing (addresses may share it), a clear
//! one proves that no service has the address.
//!
//! Firewall marks are an [exception](exceptions): a packet may belong to a service whatever its destination. Behind the bitmap
//! stands a word that says which such packets there can be. As a rule it is 0.

use crate::family::Address;

/// Bits in the filter.
pub const BITS: u32 = 1 << 16;
/// Words of 64 bits, which is how the map is laid out.
pub const WORDS: u32 = BITS / 64;
/// All words: behind the bitmap stands the one of the [`exceptions`].
pub const LENGTH: usize = WORDS as usize + 1;

/// Bits of the last word: which packets are looked at although no service has their destination.
pub mod exceptions {
    /// Packets with a firewall mark, because some service is named by a mark.
    pub const MARKED: u64 = 1;
    /// All packets, because there is a mark rule for a network.
    pub const ALL: u64 = 1 << 1;
    /// Not an exception by itself: there are mark rules that only the table of networks knows.
    pub const NETWORKS: u64 = 1 << 2;

    /// The bits of a family.
    #[inline(always)]
    pub const fn of(is_ipv6: bool, bits: u64) -> u64 {
        if is_ipv6 { bits << 8 } else { bits }
    }
}

/// Where an address stands: the index of the word, and the mask of the bit within it.
#[inline(always)]
pub fn position<A: Address>(address: &A) -> (u32, u64) {
    // Fibonacci hashing: the high bits of the product depend on every bit of the address.
    let bit = address.fold().wrapping_mul(0x9e37_79b1) >> 16;
    (bit >> 6, 1 << (bit & 63))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_do_not_share_a_bit() {
        let mut words = [0u64; WORDS as usize];
        for last in 0..=255u32 {
            let (word, bit) = position(&u32::to_be(0x0a00_0000 | last));
            assert_eq!(words[word as usize] & bit, 0, "10.0.0.{last} shares its bit");
            words[word as usize] |= bit;
        }
    }
}
