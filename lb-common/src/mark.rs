//! What a mark rule says of packets, where it is no single port of a single address: the keys of the table of networks.
//!
//! The table finds the longest prefix. Protocol and port stand before the address, so that a prefix always spans them whole, and
//! a network is asked for twice: for the packet's port, then for all ports.
//!
//! ```text
//! TCP port 80 to 10.1.0.0/16      06 00 0050 0a01          48 bits
//! TCP to 10.1.2.3, all ports      06 00 0000 0a010203      64 bits
//! ```

use crate::wire::plain;

/// Where a packet goes, as far as mark rules can tell packets apart. Port and address in network order.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[repr(C)]
pub struct Destination<A> {
    /// The IP protocol.
    pub protocol: u8,
    /// Always zero.
    pub zero: u8,
    /// The port; 0 for all.
    pub port: u16,
    /// The address, or the network's.
    pub address: A,
}

/// Bits before the address.
pub const BITS_BEFORE_ADDRESS: u32 = 32;

plain! {
    Destination<crate::family::Ipv4> = 8,
    Destination<crate::family::Ipv6> = 20,
}
