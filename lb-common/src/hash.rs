//! The hashes of IPVS's hash schedulers, bit for bit.

/// Multiplicative hashing of a 32-bit number to its top `bits` bits, as sh and dh use it.
#[inline(always)]
pub const fn hash_32(value: u32, bits: u32) -> u32 {
    value.wrapping_mul(0x61c8_8647) >> (32 - bits)
}

/// Buckets of sh and dh, as a power of two.
#[doc(alias = "IP_VS_SH_TAB_BITS")]
pub const TABLE_BITS: u32 = 8;

/// Slots of a Maglev table.
#[doc(alias = "IP_VS_MH_TAB_SIZE")]
pub const MAGLEV_SLOTS: u32 = 4093;

/// Maglev's first hash key: offsets and look-ups.
pub const MAGLEV_KEY_1: u64 = 2_654_435_761;
/// Maglev's second hash key: the step of a permutation.
pub const MAGLEV_KEY_2: u64 = 2_654_446_892;

/// Maglev's hash: SipHash-1-3 over the four bytes of `value`, little endian, with the key twice `key`; its low 32 bits.
#[doc(alias = "hsiphash_1u32")]
#[inline(always)]
pub const fn maglev(key: u64, value: u32) -> u32 {
    // The four bytes do not fill a block, so the only block is the final one: length in the top byte, data below.
    let block = (4 << 56) | value as u64;
    let mut v =
        [key ^ 0x736f_6d65_7073_6575, key ^ 0x646f_7261_6e64_6f6d, key ^ 0x6c79_6765_6e65_7261, key ^ 0x7465_6462_7974_6573];
    v[3] ^= block;
    v = sip_round(v);
    v[0] ^= block;
    v[2] ^= 0xff;
    v = sip_round(sip_round(sip_round(v)));
    (v[0] ^ v[1] ^ v[2] ^ v[3]) as u32
}

#[inline(always)]
const fn sip_round([mut v0, mut v1, mut v2, mut v3]: [u64; 4]) -> [u64; 4] {
    v0 = v0.wrapping_add(v1);
    v1 = v1.rotate_left(13) ^ v0;
    v0 = v0.rotate_left(32);
    v2 = v2.wrapping_add(v3);
    v3 = v3.rotate_left(16) ^ v2;
    v0 = v0.wrapping_add(v3);
    v3 = v3.rotate_left(21) ^ v0;
    v2 = v2.wrapping_add(v1);
    v1 = v1.rotate_left(17) ^ v2;
    v2 = v2.rotate_left(32);
    [v0, v1, v2, v3]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_kernel() {
        // ipvs-vectors.json, hash_functions.
        assert_eq!(hash_32(168_361_986, 8), 66);
        assert_eq!(hash_32(3_405_803_783, 10), 499);
        assert_eq!(maglev(MAGLEV_KEY_1, 0), 492_468_162);
        assert_eq!(maglev(MAGLEV_KEY_2, 0), 4_169_286_463);
    }
}
