//! The "may be ours" filters: which virtual addresses are in use, and which real servers are masqueraded, one bit each.
//!
//! Addresses may share a bit, and an address may have many services; so each bit has a count of those that want
//! it, and is cleared when the last one goes. The kernel has a copy of the bitmap, which is written whole whenever a bit
//! changes (8 KiB; see [`lb_common::filter`]). The counts are the daemon's own: a new one counts the services that it finds.

use std::net::IpAddr;

use aya::maps::{Array, MapData, MapError};
use lb_common::filter::{BITS, LENGTH, WORDS, position};

use super::way::words;

/// The bitmap, as the kernel has it; behind it stands the word of exceptions.
pub type Bitmap = [u64; LENGTH];

/// The kernel's copy of the bitmap.
pub type Kernel = Array<MapData, Bitmap>;

/// The bitmap and its counts.
#[expect(missing_debug_implementations, reason = "aya's maps have none")]
pub struct Filter {
    bitmap: Box<Bitmap>,
    references: Vec<u32>,
    /// The kernel's copy; none in tests.
    kernel: Option<Kernel>,
}

impl Filter {
    /// Counts the addresses that are in use, and writes the bitmap.
    pub fn new(kernel: Option<Kernel>, addresses: impl Iterator<Item = IpAddr>) -> Result<Self, MapError> {
        let mut filter = Self { bitmap: Box::new([0; LENGTH]), references: vec![0; BITS as usize], kernel };
        for address in addresses {
            filter.count(address);
        }
        filter.publish()?;
        Ok(filter)
    }

    /// A service, or a masqueraded real server, has this address.
    pub fn add(&mut self, address: IpAddr) -> Result<(), MapError> {
        if self.count(address) { self.publish() } else { Ok(()) }
    }

    /// Counts an address. `true` if it is the first at its bit.
    fn count(&mut self, address: IpAddr) -> bool {
        let (index, mask) = place(address);
        let count = &mut self.references[bit(index, mask)];
        *count += 1;
        self.bitmap[index as usize] |= mask;
        *count == 1
    }

    /// One with this address is gone.
    pub fn remove(&mut self, address: IpAddr) -> Result<(), MapError> {
        let (index, mask) = place(address);
        let count = &mut self.references[bit(index, mask)];
        *count = count.saturating_sub(1);
        if *count > 0 {
            return Ok(());
        }
        self.bitmap[index as usize] &= !mask;
        self.publish()
    }

    /// Whether the kernel looks at packets to (or from) this address.
    pub fn contains(&self, address: IpAddr) -> bool {
        let (index, mask) = place(address);
        self.bitmap[index as usize] & mask != 0
    }

    /// Which packets are looked at whatever their addresses: [`lb_common::filter::exceptions`].
    pub fn set_exceptions(&mut self, bits: u64) -> Result<(), MapError> {
        let word = &mut self.bitmap[WORDS as usize];
        if std::mem::replace(word, bits) == bits { Ok(()) } else { self.publish() }
    }

    fn publish(&mut self) -> Result<(), MapError> {
        self.kernel.as_mut().map_or(Ok(()), |kernel| kernel.set(0, *self.bitmap, 0))
    }
}

fn place(address: IpAddr) -> (u32, u64) {
    match address {
        IpAddr::V4(_) => position(&words(address)[0]),
        IpAddr::V6(_) => position(&words(address)),
    }
}

const fn bit(index: u32, mask: u64) -> usize {
    (index * 64 + mask.trailing_zeros()) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn filter(addresses: &[IpAddr]) -> Filter {
        Filter::new(None, addresses.iter().copied()).expect("there is no kernel that could refuse")
    }

    #[test]
    fn a_bit_stays_until_its_last_service_goes() {
        let mut filter = filter(&[]);
        for vip in ["10.0.0.200", "2001:db8::200"].map(address) {
            assert!(!filter.contains(vip));
            filter.add(vip).unwrap();
            filter.add(vip).unwrap();
            filter.remove(vip).unwrap();
            assert!(filter.contains(vip));
            filter.remove(vip).unwrap();
            assert!(!filter.contains(vip));
            filter.remove(vip).unwrap();
            assert!(!filter.contains(vip), "removing too often does no harm");
        }
    }

    #[test]
    fn what_is_taken_over_is_counted() {
        let (known, unknown) = (address("10.0.0.200"), address("10.0.0.201"));
        let mut filter = filter(&[known, known]);
        assert!(filter.contains(known));
        assert!(!filter.contains(unknown));
        filter.remove(known).unwrap();
        assert!(filter.contains(known));
    }
}
