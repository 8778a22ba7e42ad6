//! A schedule: the run of real servers that userspace compiles for a service and the datapath indexes.
//!
//! All runs live in one big array of pairs of `u32` (array maps round elements up to 8 bytes). A service points at its
//! run by one 8-byte word, [`Pointer`], which is published by one store. A run begins with two pairs of header:
//!
//! ```text
//! pair 0: base, head      base = where the cursor stood when the run was made
//! pair 1: period, witness
//! pair 2: server, server  the picks, two to a pair
//! ```
//!
//! A run of the cursor mode is `head` picks that happen once, and then `period` picks that repeat: that shape holds
//! the exact sequence of every static scheduler, whose state must return sooner or later. Hash modes use the
//! picks as their table (`head` = 0, `period` = its size). The locality modes have a run of the cursor mode for destinations
//! that are new, and a *witness* ([`crate::locality`]); elsewhere that is [`NOBODY`].

use crate::wire::plain;

/// Two picks, or two words of header.
pub type Pair = [u32; 2];

/// Pairs before the first pick.
pub const HEADER: u32 = 2;

/// A pick that names no server: the service has nobody to take the connection.
pub const NOBODY: u32 = u32::MAX;

/// Set in a pick of a Maglev table: the server is there but takes no new connections.
pub const INELIGIBLE: u32 = 1 << 31;

/// Where a service's run stands. Published by one 8-byte store.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Pointer {
    /// Index of the run's first pair.
    pub offset: u32,
    /// Picks in the run; 0: nobody.
    pub picks: u32,
}

/// The position of a cursor's pick in its run.
///
/// `base`, `head` and `period` are the run's header; the cursor counts modulo 2^32. `None` if the run is empty.
#[inline(always)]
pub fn position(cursor: u32, base: u32, head: u32, period: u32) -> Option<u32> {
    let taken = cursor.wrapping_sub(base);
    if taken < head {
        return Some(taken);
    }
    if period == 0 {
        return None;
    }
    Some(head + (taken - head) % period)
}

plain! { Pointer = 8 }

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn head_once_then_period() {
        let walk = |n| position(n, 10, 2, 3);
        let positions = [10, 11, 12, 13, 14, 15, 16].map(walk);
        assert_eq!(positions, [0, 1, 2, 3, 4, 2, 3].map(Some));
    }

    #[test]
    fn the_cursor_may_wrap() {
        assert_eq!(position(1, u32::MAX, 0, 5), Some(2));
    }

    #[test]
    fn an_empty_run_has_no_position() {
        assert_eq!(position(7, 7, 0, 0), None);
    }
}
