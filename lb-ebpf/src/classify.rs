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
    SOURCES.word(word) & bit != 0
}
