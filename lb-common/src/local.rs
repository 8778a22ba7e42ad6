//! Local addresses: where the connections of FULLNAT come from, as real servers see them.
//!
//! ```text
//! request   192.168.74.12:40000 -> 192.168.74.204:80     becomes   10.0.0.230:7311 -> 10.0.0.205:80
//! reply     10.0.0.205:80 -> 10.0.0.230:7311             becomes   192.168.74.204:80 -> 192.168.74.12:40000
//! ```
//!
//! A connection is told from all others to the same real server by its local address and port, and has them to itself as long
//! as it lives. [`Walk`] says in which order a new connection tries them; who has which is the table of replies' to say
//! ([`crate::reply`]).

use crate::wire::plain;

/// The first local port: below are those of well-known services.
pub const FIRST_PORT: u16 = 1024;

/// How many ports a local address has, for each real server, port and protocol.
pub const PORTS: u32 = (1 << 16) - FIRST_PORT as u32;

/// A local address and port, in one word; or none of either.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(transparent)]
pub struct Local(pub u32);

impl Local {
    /// A connection without: its real server sees the client's own address.
    pub const NONE: Self = Self(0);

    /// The address with this index and a port in network order, never 0.
    #[inline(always)]
    pub const fn new(address: u16, port: u16) -> Self {
        Self((address as u32) << 16 | port as u32)
    }

    /// Index of the address.
    #[inline(always)]
    pub const fn address(self) -> u32 {
        self.0 >> 16
    }

    /// The port, in network order.
    #[inline(always)]
    pub const fn port(self) -> u16 {
        self.0 as u16
    }

    /// Whether there is one.
    #[inline(always)]
    pub const fn is_some(self) -> bool {
        self.0 != 0
    }
}

/// A local address, by its index. Written by userspace, once: an index keeps its address, so that connections may go on naming
/// it when no pool has it any more.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct LocalAddress {
    /// The address in network order; IPv4 mapped ([`crate::packet::mapped`]), because clients may have IPv6. Zero for none.
    pub address: [u32; 4],
}

/// How many addresses a pool can have.
pub const POOL_SIZE: usize = 64;

/// The local addresses of one family that new connections choose from: one pool for all services, or a service's own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Pool {
    /// How many.
    pub count: u32,
    /// Their indices.
    pub addresses: [u16; POOL_SIZE],
}

/// Which pool: its key.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct PoolKey {
    /// The service's index, or [`SHARED`].
    pub service: u32,
    /// `AF_INET` or `AF_INET6`: that of the real servers.
    pub family: u32,
}

/// [`PoolKey::service`] of the pool of all services that have none of their own.
pub const SHARED: u32 = u32::MAX;

/// A walk through all ports of all addresses of a pool, each once, in an order of its own.
///
/// Its first steps are as good as random, so that a port that was given back rests as long as possible, and that a pool that
/// is half full takes two steps on the average.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Walk {
    first: u32,
    stride: u32,
}

impl Walk {
    /// The walk that two random numbers stand for.
    #[inline(always)]
    pub const fn new(first: u32, stride: u32) -> Self {
        // The number of ports is 2^10 * 3^2 * 7: a stride that is one above a multiple of 42 has no factor in common with it.
        Self { first: first % PORTS, stride: stride % (PORTS / 42) * 42 + 1 }
    }

    /// Where a step leads in a pool of `addresses`, which are not 0: the place of the address, and the port in host order.
    #[inline(always)]
    pub const fn step(&self, step: u32, addresses: u32) -> (u32, u16) {
        let round = step / addresses % PORTS;
        // At most 64511 * 64512, which is less than 2^32.
        let port = (self.first + round * self.stride) % PORTS;
        ((step + self.first) % addresses, port as u16 + FIRST_PORT)
    }
}

plain! {
    Local = 4,
    LocalAddress = 16,
    Pool = 132,
    PoolKey = 8,
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_walk_meets_every_port_of_every_address_once() {
        for (first, stride, addresses) in [(0, 0, 1), (64_511, 1535, 1), (77, 1536, 2), (u32::MAX, u32::MAX, 3), (5, 7, 7)] {
            let walk = Walk::new(first, stride);
            let met: HashSet<_> = (0..PORTS * addresses).map(|step| walk.step(step, addresses)).collect();
            assert_eq!(met.len() as u32, PORTS * addresses, "{first}, {stride}, {addresses}");
            assert!(met.iter().all(|(address, port)| *address < addresses && *port >= FIRST_PORT));
        }
    }

    #[test]
    fn a_local_address_and_port_fit_one_word() {
        let local = Local::new(65_535, 1024_u16.to_be());
        assert_eq!((local.address(), local.port()), (65_535, 1024_u16.to_be()));
        assert!(local.is_some() && !Local::NONE.is_some());
    }
}
