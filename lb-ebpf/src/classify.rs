//! Is the packet for us? One read of memory answers for almost all that are not.

use lb_common::{family::Address, filter, reason::Reason};

use crate::maps::FILTER;

/// Lets a packet through whose destination may be a virtual address.
#[inline(always)]
pub fn may_be_ours<A: Address>(destination: &A) -> Result<(), Reason> {
    let (word, bit) = filter::position(destination);
    if FILTER.word(word) & bit == 0 { Err(Reason::NotOurs) } else { Ok(()) }
}
