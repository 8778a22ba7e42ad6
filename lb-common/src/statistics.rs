//! Traffic counters, kept per CPU and per real server. A service's numbers are the sum over its servers.

use crate::wire::plain;

/// What went through for one real server. Bytes count from the IP header, before encapsulation.
#[doc(alias = "ip_vs_counters")]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Statistics {
    /// Connections scheduled.
    pub connections: u64,
    /// Packets from clients.
    pub packets_in: u64,
    /// Bytes from clients.
    pub bytes_in: u64,
    /// Packets to clients that passed the director.
    pub packets_out: u64,
    /// Bytes to clients that passed the director.
    pub bytes_out: u64,
}

plain! { Statistics = 40 }
