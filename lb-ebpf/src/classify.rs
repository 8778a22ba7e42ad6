//! Is the packet for us? One array read answers for almost all that are not.

use lb_common::{family::Address, filter, reason::Reason};

use crate::maps::FILTER;

/// Lets a packet through whose destination may be a virtual address.
#[inline(always)]
pub fn may_be_ours<A: Address>(destination: &A) -> Result<(), Reason> {
    let (word, bit) = filter::position(destination);
    match FILTER.get(word) {
        Some(bits) if bits & bit != 0 => Ok(()),
        _ => Err(Reason::NotOurs),
    }
}
