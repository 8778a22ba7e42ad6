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

/// Picks of one service's run that a CPU has taken from the cursor at once, and deals one by one.
///
/// One cursor for all CPUs gives every pick to exactly one of them, in order; but each connection then waits for the cursor's
/// cache line, which the other CPUs want, too. With so many picks in hand, only each so-manyth connection does.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Hand {
    /// The service.
    pub service: u32,
    /// The cursor of the next pick.
    pub next: u32,
    /// How many picks are left.
    pub left: u32,
    /// Always zero.
    pub zero: u32,
}

impl Hand {
    /// Whether the next pick is of this service, and of the run that begins at this cursor: what was taken from an older run is
    /// worth nothing.
    #[inline(always)]
    pub const fn holds(&self, service: u32, base: u32) -> bool {
        self.left != 0 && self.service == service && self.next.wrapping_sub(base).cast_signed() >= 0
    }

    /// A hand of so many picks, of which the first is to be dealt at once.
    #[inline(always)]
    pub const fn taken(service: u32, cursor: u32, picks: u32) -> Self {
        Self { service, next: cursor, left: picks, zero: 0 }
    }

    /// The cursor of the next pick, and what is left.
    #[inline(always)]
    pub const fn deal(self) -> (u32, Self) {
        (self.next, Self { next: self.next.wrapping_add(1), left: self.left - 1, ..self })
    }
}

plain! { Pointer = 8, Hand = 16 }

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
    fn hands_deal_every_pick_once() {
        // Three CPUs take four picks at a time from one cursor, and come in no order.
        let (mut cursor, mut hands) = (u32::MAX - 5, [Hand::default(); 3]);
        let base = cursor;
        let mut dealt = std::vec::Vec::new();
        for arrival in 0..120_u32 {
            let hand = &mut hands[(arrival * arrival / 3 % 3) as usize];
            if !hand.holds(7, base) {
                *hand = Hand::taken(7, cursor, 4);
                cursor = cursor.wrapping_add(4);
            }
            let next;
            (next, *hand) = hand.deal();
            dealt.push(next.wrapping_sub(base));
        }
        let left: u32 = hands.iter().map(|hand| hand.left).sum();
        dealt.sort_unstable();
        dealt.dedup();
        assert_eq!(dealt.len(), 120, "a pick was dealt twice");
        assert_eq!(120 + left, cursor.wrapping_sub(base), "a pick was lost");
    }

    #[test]
    fn a_hand_of_another_service_or_run_is_worth_nothing() {
        let hand = Hand::taken(7, 100, 16);
        assert!(hand.holds(7, 100) && hand.holds(7, 90));
        assert!(!hand.holds(8, 100) && !hand.holds(7, 101));
        assert!(!Hand::taken(7, 100, 0).holds(7, 100));
    }

    #[test]
    fn an_empty_run_has_no_position() {
        assert_eq!(position(7, 7, 0, 0), None);
    }
}
