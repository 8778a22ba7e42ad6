//! Where a packet's pick stands in a schedule that is indexed by a hash: sh, dh and mh, bit for bit as in IPVS.
//!
//! Userspace compiles the tables, the datapath looks them up, and both (and the tests) do it with these functions:
//!
//! | scheduler | table | pick |
//! | --- | --- | --- |
//! | sh | 256 buckets, fallback already worked in | [`source_bucket`] |
//! | dh | 256 buckets | [`destination_bucket`] |
//! | mh | 4093 slots, some marked [`crate::schedule::INELIGIBLE`] | [`maglev_first`], then [`maglev_next`] if the service falls back |
//!
//! Maglev's fallback depends on the client and not only on the slot, so it cannot be worked into the table:
//!
//! ```
//! use lb_common::{pick, schedule::INELIGIBLE, service::flags};
//! # let table = [INELIGIBLE | 1; 4093];
//! let value = pick::client_value(&u32::from_ne_bytes([192, 0, 2, 1]), 4711_u16.to_be(), flags::FALLBACK);
//! let first = pick::maglev_first(value);
//! let mut slot = first;
//! for k in 0..pick::MAGLEV_ATTEMPTS {
//!     if table[slot as usize] & INELIGIBLE == 0 {
//!         break;
//!     }
//!     slot = pick::maglev_next(value, first, k);
//! }
//! ```
//!
//! Only constants divide, nothing indexes and nothing panics: the verifier has nothing to ask.

use crate::{
    family::Address,
    hash::{MAGLEV_KEY_1, MAGLEV_SLOTS, TABLE_BITS, hash_32, maglev},
    service::flags,
};

/// Buckets of sh and dh.
pub const BUCKETS: u32 = 1 << TABLE_BITS;

/// How many slots Maglev's fallback tries after the first, before it gives up.
pub const MAGLEV_ATTEMPTS: u32 = MAGLEV_SLOTS;

/// The number that sh and mh hash: the client's address, and with the flag [`flags::PORT`] the client's port, which is
/// given in network order.
#[doc(alias = "ip_vs_sh_get_port")]
#[doc(alias = "ip_vs_mh_get_port")]
#[inline(always)]
pub fn client_value<A: Address>(client: &A, client_port: u16, service_flags: u8) -> u32 {
    let port = if service_flags & flags::PORT != 0 { u16::from_be(client_port) } else { 0 };
    client.fold().wrapping_add(port as u32)
}

/// The bucket of sh for a [`client_value`].
#[doc(alias = "ip_vs_sh_hashkey")]
#[inline(always)]
pub const fn source_bucket(value: u32) -> u32 {
    hash_32(value, TABLE_BITS)
}

/// The bucket that sh-fallback tries as number `k`, if the server of the first `bucket` takes no connections. `k` begins
/// with 0.
#[doc(alias = "ip_vs_sh_get_fallback")]
#[inline(always)]
pub const fn source_next(bucket: u32, k: u32) -> u32 {
    bucket.wrapping_mul(2).wrapping_add(k) & (BUCKETS - 1)
}

/// The bucket of dh for a packet's destination.
#[doc(alias = "ip_vs_dh_hashkey")]
#[inline(always)]
pub fn destination_bucket<A: Address>(destination: &A) -> u32 {
    hash_32(destination.fold(), TABLE_BITS)
}

/// The slot of mh for a [`client_value`].
#[doc(alias = "ip_vs_mh_hashkey")]
#[inline(always)]
pub const fn maglev_first(value: u32) -> u32 {
    maglev(MAGLEV_KEY_1, value) % MAGLEV_SLOTS
}

/// The slot that mh-fallback tries as number `k`, if the server of the first slot takes no connections. `k` begins
/// with 0 and stays below [`MAGLEV_ATTEMPTS`]; an empty slot ends the search.
#[doc(alias = "ip_vs_mh_get_fallback")]
#[inline(always)]
pub const fn maglev_next(value: u32, first_slot: u32, k: u32) -> u32 {
    maglev_first(value.wrapping_add(k.wrapping_add(first_slot) % MAGLEV_SLOTS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_counts_only_with_its_flag() {
        let client = 0x0a09_0002_u32.to_be();
        assert_eq!(client_value(&client, 5_u16.to_be(), flags::FALLBACK), 0x0a09_0002);
        assert_eq!(client_value(&client, 5_u16.to_be(), flags::PORT), 0x0a09_0007);
        assert_eq!(client_value(&u32::MAX, 2_u16.to_be(), flags::PORT), 1, "the sum wraps");
    }

    #[test]
    fn every_bucket_and_slot_is_in_its_table() {
        for value in (0..u32::MAX).step_by(65_521) {
            let slot = maglev_first(value);
            assert!(slot < MAGLEV_SLOTS && maglev_next(value, slot, MAGLEV_ATTEMPTS - 1) < MAGLEV_SLOTS);
            assert!(source_bucket(value) < BUCKETS && source_next(source_bucket(value), 255) < BUCKETS);
            assert!(destination_bucket(&value) < BUCKETS);
        }
    }

    #[test]
    fn the_fallback_of_sh_meets_every_bucket_once() {
        let mut met = [false; BUCKETS as usize];
        for k in 0..BUCKETS {
            met[source_next(77, k) as usize] = true;
        }
        assert_eq!(met, [true; BUCKETS as usize]);
        assert_eq!(source_next(77, 0), 154);
    }
}
