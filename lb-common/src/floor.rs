//! What the bench tells the harness around a program under test.

use crate::wire::plain;

/// One round of a measurement. Written by the bench, counted on by the harness.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Round {
    /// Length of the frame, in bytes.
    pub length: u32,
    /// Not 0: the frame is IPv6.
    pub is_v6: u32,
    /// The next flow's number.
    pub flow: u64,
    /// How many flows there are.
    pub flows: u64,
    /// The (last word of the) first client's address, in host order.
    pub first_client: u32,
    /// Always zero.
    pub zero: u32,
    /// The first 56 bytes of the frame.
    pub headers: [u64; 7],
    /// The next 24 bytes, for IPv6.
    pub more_headers: [u64; 3],
}

plain! { Round = 112 }
