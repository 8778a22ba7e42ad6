//! Is the packet for us? One read of memory answers for almost all that are not.

use lb_common::{family::Address, filter};

use crate::maps::{FILTER, SOURCES};

/// Whether a packet may be for a virtual address, by its destination.
#[inline(always)]
pub fn may_be_ours<A: Address>(destination: &A) -> bool {
    let (word, bit) = filter::position(destination);
    FILTER.word(word) & bit != 0
}

/// Whether a packet may be the reply of a masqueraded real server, by its source. Asked only of packets that are addressed to
/// no virtual address.
#[inline(always)]
pub fn may_be_reply<A: Address>(source: &A) -> bool {
    let (word, bit) = filter::position(source);
    // SAFETY: an element of the map, and a word within it by the mask.
    SOURCES.get_ptr(0).is_some_and(|bitmap| unsafe { *bitmap.cast::<u64>().add((word & (filter::WORDS - 1)) as usize) } & bit != 0)
}
