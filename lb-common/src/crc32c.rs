//! SCTP's checksum (CRC-32C, RFC 9260) after a change of one word, from that word alone.
//!
//! A cyclic redundancy check is linear: the checksums of two packets of one length differ by the check of their difference.
//! Where only the ports change, the difference is one word and nothing but zeros behind it, and zeros only multiply: by a
//! power of x that depends on how many there are. So a packet need not be read to correct its checksum; one that was wrong
//! stays wrong by as much, and one that a device is still to fill in does no harm.
//!
//! What this does not do: a packet whose length is not known, which is a fragment's, cannot be corrected.

/// The polynomial, its bits reversed as the wire has them.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// The number one in that order: the constant term is the highest bit.
const ONE: u32 = 1 << 31;

/// Multiplies two polynomials, modulo the polynomial. Without branches: the kernel's verifier would follow both ways of each.
#[inline(always)]
const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 31;
    while bit >= 0 {
        product ^= b & 0_u32.wrapping_sub(a >> bit & 1);
        b = b >> 1 ^ POLYNOMIAL & 0_u32.wrapping_sub(b & 1);
        bit -= 1;
    }
    product
}

/// x to the power of 8 · 2^k: what 2^k bytes of zeros multiply by.
static ZEROS: [u32; 16] = {
    let mut powers = [ONE >> 8; 16];
    let mut k = 1;
    while k < powers.len() {
        powers[k] = multiply(powers[k - 1], powers[k - 1]);
        k += 1;
    }
    powers
};

/// Steps of a [`Correction`].
pub const STEPS: u32 = 16;

/// What a change of one word does to a packet's checksum, computed in [`STEPS`] steps: the kernel's verifier wants loops to be
/// somebody else's.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Correction {
    check: u32,
    behind: u32,
}

impl Correction {
    /// A word was changed by exclusive-or with `difference`, and `behind` bytes (less than 65,536) follow it. The word as it
    /// stands in memory, on a little-endian machine.
    #[inline(always)]
    pub fn new(difference: u32, behind: u32) -> Self {
        // The word itself is followed by as many zeros as a checksum is long: four bytes.
        Self { check: multiply(difference, ZEROS[2]), behind }
    }

    /// The zeros behind the word, as many as the step's bit of their number stands for.
    #[inline(always)]
    pub fn step(&mut self, step: u32) {
        let step = step & (STEPS - 1);
        let chosen = 0_u32.wrapping_sub(self.behind >> step & 1);
        self.check = multiply(self.check, ONE ^ (ONE ^ ZEROS[step as usize]) & chosen);
    }

    /// The checksum after all steps, from the one before the change; both as they stand in memory.
    #[inline(always)]
    pub const fn apply(&self, checksum: u32) -> u32 {
        checksum ^ self.check
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use proptest::prelude::*;

    use super::*;

    /// The definition, bit by bit.
    fn crc32c(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc: u32, _| if crc & 1 != 0 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 })
        })
    }

    #[test]
    fn the_definition_is_castagnolis() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    proptest! {
        #[test]
        fn an_update_equals_a_new_computation(mut packet in prop::collection::vec(any::<u8>(), 4..2000), difference: u32) {
            let before = crc32c(&packet);
            for (byte, change) in packet.iter_mut().zip(difference.to_le_bytes()) {
                *byte ^= change;
            }
            let mut correction = Correction::new(difference, (packet.len() - 4) as u32);
            (0..STEPS).for_each(|step| correction.step(step));
            prop_assert_eq!(correction.apply(before), crc32c(&packet));
        }
    }
}
