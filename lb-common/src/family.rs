//! IPv4 and IPv6, as types: every part of the datapath is written once and compiled for both.

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::wire::Plain;

/// An address as it stands in a header.
pub trait Address: Eq + Plain {
    /// IPVS's folding of an address into one number, in host order: the address itself for IPv4, the exclusive or of
    /// the four words for IPv6. All of IPVS's hashes begin with it.
    #[doc(alias = "ip_vs_sh_hashkey")]
    fn fold(&self) -> u32;

    /// The words of the address in network order; an IPv4 address fills the first.
    fn words(&self) -> [u32; 4];

    /// The opposite of [`Address::words`].
    fn from_words(words: &[u32; 4]) -> Self;

    /// The address that these words hold as one of IPv6: one of IPv4 is mapped ([`crate::packet::mapped`]).
    fn from_mapped(words: &[u32; 4]) -> Self;

    /// What a checksum over the words of this address has to gain when another takes its place (RFC 1624): not folded.
    fn difference(&self, new: &Self) -> u64;

    /// The network that the address belongs to. IPv4: by a netmask in network order; IPv6: by the length of a prefix.
    #[must_use]
    fn network(&self, netmask: u32) -> Self;

    /// The netmask of a prefix, as [`network`](Self::network) takes it. The length is at least 1.
    fn netmask(prefix: u8) -> u32;

    /// What a checksum over the words of this address adds up: not folded.
    fn sum(&self) -> u64;
}

/// An IPv4 address: the four bytes of the header, in memory order.
pub type Ipv4 = u32;

/// An IPv6 address: the sixteen bytes of the header as four words, in memory order.
pub type Ipv6 = [u32; 4];

/// An IPv4 address, as the datapath has it.
pub const fn ipv4(address: Ipv4Addr) -> Ipv4 {
    Ipv4::from_ne_bytes(address.octets())
}

/// An IPv6 address, as the datapath has it.
pub const fn ipv6(address: Ipv6Addr) -> Ipv6 {
    let bits = address.to_bits();
    [((bits >> 96) as u32).to_be(), ((bits >> 64) as u32).to_be(), ((bits >> 32) as u32).to_be(), (bits as u32).to_be()]
}

impl Address for Ipv4 {
    #[inline(always)]
    fn fold(&self) -> u32 {
        u32::from_be(*self)
    }

    #[inline(always)]
    fn words(&self) -> [u32; 4] {
        [*self, 0, 0, 0]
    }

    #[inline(always)]
    fn from_words(words: &[u32; 4]) -> Self {
        words[0]
    }

    #[inline(always)]
    fn from_mapped(words: &[u32; 4]) -> Self {
        words[3]
    }

    #[inline(always)]
    fn difference(&self, new: &Self) -> u64 {
        u64::from(!*self) + u64::from(*new)
    }

    #[inline(always)]
    fn network(&self, netmask: u32) -> Self {
        *self & netmask
    }

    #[inline(always)]
    fn netmask(prefix: u8) -> u32 {
        (u32::MAX << ((32 - u32::from(prefix)) & 31)).to_be()
    }

    #[inline(always)]
    fn sum(&self) -> u64 {
        u64::from(*self)
    }
}

impl Address for Ipv6 {
    #[inline(always)]
    fn fold(&self) -> u32 {
        u32::from_be(self[0] ^ self[1] ^ self[2] ^ self[3])
    }

    #[inline(always)]
    fn words(&self) -> [u32; 4] {
        *self
    }

    #[inline(always)]
    fn from_words(words: &[u32; 4]) -> Self {
        *words
    }

    #[inline(always)]
    fn from_mapped(words: &[u32; 4]) -> Self {
        *words
    }

    #[inline(always)]
    fn difference(&self, new: &Self) -> u64 {
        self[0].difference(&new[0]) + self[1].difference(&new[1]) + self[2].difference(&new[2]) + self[3].difference(&new[3])
    }

    #[inline(always)]
    fn network(&self, netmask: u32) -> Self {
        // The bits of the prefix that lie in a word: none, some, or all.
        let word = |number: u32| {
            let bits = netmask.saturating_sub(32 * number).min(32);
            self[number as usize] & ((u64::MAX << (32 - bits)) as u32).to_be()
        };
        [word(0), word(1), word(2), word(3)]
    }

    #[inline(always)]
    fn netmask(prefix: u8) -> u32 {
        prefix.into()
    }

    #[inline(always)]
    fn sum(&self) -> u64 {
        self[0].sum() + self[1].sum() + self[2].sum() + self[3].sum()
    }
}

/// `AF_INET`, as the kernel's helpers want it.
pub const AF_INET: u8 = 2;
/// `AF_INET6`, as the kernel's helpers want it.
pub const AF_INET6: u8 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_of_ipv4_may_have_holes() {
        let address = ipv4(Ipv4Addr::new(192, 0, 2, 77));
        for (mask, network) in
            [([255, 255, 255, 0], [192, 0, 2, 0]), ([255, 0, 255, 0], [192, 0, 2, 0]), ([0, 0, 0, 255], [0, 0, 0, 77])]
        {
            assert_eq!(address.network(u32::from_ne_bytes(mask)), u32::from_ne_bytes(network));
        }
    }

    #[test]
    fn prefixes_are_netmasks() {
        for prefix in 1..=32 {
            assert_eq!(Ipv4::netmask(prefix).to_le_bytes(), (u32::MAX << (32 - prefix)).to_be_bytes(), "{prefix}");
        }
    }

    #[test]
    fn networks_of_ipv6_begin_anywhere() {
        let address = Ipv6Addr::from_bits(u128::MAX);
        for length in 1..=128 {
            assert_eq!(ipv6(address).network(length), ipv6(Ipv6Addr::from_bits(u128::MAX << (128 - length))), "{length}");
        }
    }
}
