//! The client's address in a TCP option (TOA, "TCP option address"), for real servers behind FULLNAT.
//!
//! FULLNAT replaces the client's address by one of the director's, so a real server no longer knows who its client is.
//! The director says it in an option of the client's first segments, in the format of Alibaba's LVS and DPVS:
//!
//! ```text
//! kind 254 | length  8 | port (2) | IPv4 address (4)
//! kind 254 | length 20 | port (2) | IPv6 address (16)         all in network order
//! ```
//!
//! The director puts it in front of all other options, and [`find`] stops at the first of its kind: one that a client forged
//! stands behind it and is never seen.

use crate::{
    family::{Address, Ipv6},
    packet::Bytes,
    wire::plain,
};

/// The kind of the option: one of the two that are free for experiments.
pub const KIND: u8 = 254;

/// The length of a TCP header without options.
const TCP_HEADER: usize = 20;
/// The length of the longest TCP header.
const LONGEST_HEADER: usize = 60;
/// Kind, length and port, which stand before the address.
const BEFORE_ADDRESS: usize = 4;

/// The length of the option for an address of this family.
#[must_use]
pub const fn length<A: Address>() -> usize {
    BEFORE_ADDRESS + size_of::<A>()
}

/// Who the client is, as its option says.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Client {
    /// The address; IPv4 as `::ffff:a.b.c.d` (see [`mapped`]).
    pub address: Ipv6,
    /// The port, in network order.
    pub port: u16,
    /// Always zero.
    pub reserved: u16,
}

plain!(Client = 20);

impl Client {
    /// The IPv4 address of an IPv4 client.
    #[inline(always)]
    #[must_use]
    pub const fn ipv4(&self) -> Option<u32> {
        let [first, second, third, last] = self.address;
        if first | second == 0 && third == MAPPED { Some(last) } else { None }
    }
}

/// The third word of every IPv4 address that is written as an IPv6 one.
const MAPPED: u32 = 0xffff_u32.to_be();

/// An IPv4 address in the form of an IPv6 one.
#[inline(always)]
#[must_use]
pub const fn mapped(address: u32) -> Ipv6 {
    [0, 0, MAPPED, address]
}

/// Looks for the option in a TCP header, which begins with the first byte and of which nothing but options may follow.
#[inline(always)]
pub fn find<B: Bytes + ?Sized>(header: &B) -> Option<Client> {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    let mut at = TCP_HEADER;
    // The shortest options have one byte.
    for _ in TCP_HEADER..LONGEST_HEADER {
        match header.read::<u8>(at)? {
            END => return None,
            NO_OPERATION => at += 1,
            KIND => return read(header, at),
            _ => match header.read::<u8>(at + 1)? {
                0 | 1 => return None,
                length => at += usize::from(length),
            },
        }
        if at >= LONGEST_HEADER {
            return None;
        }
        // For the verifier, which would otherwise follow each sum of lengths on its own.
        at &= 63;
    }
    None
}

#[inline(always)]
fn read<B: Bytes + ?Sized>(header: &B, at: usize) -> Option<Client> {
    let length = header.read::<u8>(at + 1)?;
    let address = if usize::from(length) == self::length::<u32>() {
        mapped(header.read(at + BEFORE_ADDRESS)?)
    } else if usize::from(length) == self::length::<Ipv6>() {
        header.read(at + BEFORE_ADDRESS)?
    } else {
        return None;
    };
    Some(Client { address, port: header.read(at + 2)?, reserved: 0 })
}

/// What a real server did with an option.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum Outcome {
    /// Programs see the client that it names.
    Taken,
    /// It came from an address that nobody trusts, and programs see that address.
    Untrusted,
    /// A program asked an IPv4 socket for a client that has IPv6, and saw the director's address.
    Unshowable,
}

impl Outcome {
    /// Every outcome, in the order of their numbers, which is the order in the counter array.
    pub const ALL: &[Self] = &[Self::Taken, Self::Untrusted, Self::Unshowable];
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    const IPV4: [u8; 8] = [254, 8, 0x30, 0x39, 192, 0, 2, 1];

    fn header(options: &[u8]) -> Vec<u8> {
        [&[0; TCP_HEADER], options].concat()
    }

    fn ipv4(last: u8) -> Client {
        Client { address: mapped(u32::from_ne_bytes([192, 0, 2, last])), port: 12345_u16.to_be(), reserved: 0 }
    }

    #[test]
    fn both_families_are_read() {
        assert_eq!(find(&header(&IPV4)[..]), Some(ipv4(1)));
        assert_eq!(ipv4(1).ipv4(), Some(u32::from_ne_bytes([192, 0, 2, 1])));
        let address: [u8; 16] = core::array::from_fn(|byte| byte as u8 + 1);
        let found = find(&header(&[&[254, 20, 0x30, 0x39], &address[..]].concat())[..]).expect("a client");
        assert_eq!(found.address.map(u32::to_ne_bytes).concat(), address);
        assert_eq!((found.port, found.ipv4()), (12345_u16.to_be(), None));
    }

    #[test]
    fn it_may_stand_behind_others_and_the_first_counts() {
        let timestamps = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
        let mut forged = IPV4;
        forged[7] = 66;
        assert_eq!(find(&header(&[&timestamps[..], &IPV4].concat())[..]), Some(ipv4(1)));
        assert_eq!(find(&header(&[&IPV4[..], &forged].concat())[..]), Some(ipv4(1)));
        assert_eq!(find(&header(&[&[254, 4, 0xf9, 0x89], &forged[..]].concat())[..]), None, "an experiment of another kind");
    }

    #[test]
    fn nonsense_is_no_client() {
        for options in [&[][..], &[1; 40], &[0, 0, 0, 0, 254, 8, 1, 1, 1, 1, 1, 1], &[5, 0], &[5, 1], &[5, 255], &IPV4[..7], &[254]]
        {
            assert_eq!(find(&header(options)[..]), None, "{options:?}");
        }
        assert_eq!(find(&[0_u8; 19][..]), None);
    }
}
