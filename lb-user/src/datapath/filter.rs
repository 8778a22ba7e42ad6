//! The "may be ours" filters: which virtual addresses are in use, and which real servers are masqueraded, one bit each.
//!
//! Addresses may share a bit, and an address may have many services; so each bit has a count of those that want
//! it, and is cleared when the last one goes. The bitmap is shared with the kernel (see [`lb_common::filter`]), the counts
//! are not: a new daemon counts the services that it finds.

use std::{net::IpAddr, sync::atomic::Ordering};

use lb_common::filter::{BITS, WORDS, position};

use super::{shared::Words, way::words};

/// The bitmap and its counts.
#[derive(Debug)]
pub struct Filter {
    bitmap: Words,
    references: Vec<u32>,
}

impl Filter {
    /// Counts the addresses that are in use, and makes the bitmap say the same.
    pub fn new(bitmap: Words, addresses: impl Iterator<Item = IpAddr>) -> Self {
        let mut filter = Self { bitmap, references: vec![0; BITS as usize] };
        addresses.for_each(|address| filter.add(address));
        for index in 0..WORDS {
            let first = index as usize * 64;
            let wanted = (0..64).filter(|bit| filter.references[first + bit] > 0).fold(0, |word, bit| word | 1 << bit);
            filter.bitmap.store(index, wanted);
        }
        filter
    }

    /// A service, or a masqueraded real server, has this address.
    pub fn add(&mut self, address: IpAddr) {
        let (index, mask) = place(address);
        let count = &mut self.references[bit(index, mask)];
        *count += 1;
        if let Some(word) = self.bitmap.word(index) {
            word.fetch_or(mask, Ordering::Release);
        }
    }

    /// One with this address is gone.
    pub fn remove(&mut self, address: IpAddr) {
        let (index, mask) = place(address);
        let count = &mut self.references[bit(index, mask)];
        *count = count.saturating_sub(1);
        if *count == 0
            && let Some(word) = self.bitmap.word(index)
        {
            word.fetch_and(!mask, Ordering::Release);
        }
    }

    /// Whether the kernel looks at packets to (or from) this address.
    pub fn contains(&self, address: IpAddr) -> bool {
        let (index, mask) = place(address);
        self.bitmap.load(index) & mask != 0
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

    #[test]
    fn a_bit_stays_until_its_last_service_goes() {
        let mut filter = Filter::new(Words::anonymous(WORDS), std::iter::empty());
        for vip in ["10.0.0.200", "2001:db8::200"].map(address) {
            assert!(!filter.contains(vip));
            filter.add(vip);
            filter.add(vip);
            filter.remove(vip);
            assert!(filter.contains(vip));
            filter.remove(vip);
            assert!(!filter.contains(vip));
            filter.remove(vip);
            assert!(!filter.contains(vip), "removing too often does no harm");
        }
    }

    #[test]
    fn a_bitmap_that_is_taken_over_says_what_the_services_say() {
        let bitmap = Words::anonymous(WORDS);
        for index in 0..WORDS {
            bitmap.store(index, u64::MAX);
        }
        let (known, unknown) = (address("10.0.0.200"), address("10.0.0.201"));
        let mut filter = Filter::new(bitmap, [known, known].into_iter());
        assert!(filter.contains(known));
        assert!(!filter.contains(unknown));
        filter.remove(known);
        assert!(filter.contains(known));
    }
}
