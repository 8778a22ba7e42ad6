//! What the bench of connection tables and its eBPF programs agree on: which flow is whose, and what to do with so many of them.
//! See [`crate::lines`].

use crate::{
    connection::{Connection, ConnectionKey},
    family::{Ipv4, Ipv6},
    local::Local,
    packet::{protocol, transport::Ports},
    wire::plain,
};

/// What a run of a program does. Written by userspace, counted on by the program.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Run {
    /// The next flow's number.
    pub flow: u64,
    /// How many flows there are: a power of two.
    pub flows: u64,
    /// What is added to a flow's number once it has been scattered: flows of another part are others.
    pub part: u64,
    /// How many things came out as they should.
    pub done: u64,
    /// How many entries were read that are not of one connection.
    pub torn: u64,
}

impl Run {
    /// The number of a flow. Numbers are scattered, so that neighbours in time are none in the table.
    #[inline(always)]
    pub const fn number(&self) -> u32 {
        (self.flow.wrapping_mul(0x9e37_79b1) & self.flows.wrapping_sub(1)).wrapping_add(self.part) as u32
    }
}

/// The key of a flow.
pub trait Numbered {
    /// Whose number this is.
    fn of(number: u32) -> Self;
}

impl Numbered for ConnectionKey<Ipv4> {
    #[inline(always)]
    fn of(number: u32) -> Self {
        let client = (0x0a10_0000 + (number >> 14)).to_be();
        Self { client, vip: 0x0a63_0001_u32.to_be(), ports: ports(number), protocol: protocol::TCP as u32 }
    }
}

impl Numbered for ConnectionKey<Ipv6> {
    #[inline(always)]
    fn of(number: u32) -> Self {
        let network = 0xfd09_0000_u32.to_be();
        let client = [network, 0, 0, (0x10_0000 + (number >> 14)).to_be()];
        Self { client, vip: [0xfd99_0000_u32.to_be(), 0, 0, 1_u32.to_be()], ports: ports(number), protocol: protocol::TCP as u32 }
    }
}

#[inline(always)]
const fn ports(number: u32) -> Ports {
    Ports::new((10_000 + (number & 0x3fff) as u16).to_be(), 80_u16.to_be())
}

/// A connection whose every field follows from its flow's number, 16 bits, and 16 others: whoever reads one knows whether it is whole.
#[inline(always)]
pub const fn connection(number: u32, other: u32) -> Connection {
    let server = number << 16 | other & 0xffff;
    Connection {
        server,
        local: Local(!server),
        last_seen: server ^ 0x5555,
        state: server as u8,
        flags: !server as u8,
        half_open: 1,
        prefix: 0,
    }
}

/// Whether it is one of this flow, and whole.
#[inline(always)]
pub const fn is_whole(number: u32, known: &Connection) -> bool {
    let server = known.server;
    server >> 16 == number & 0xffff
        && known.local.0 == !server
        && known.last_seen == server ^ 0x5555
        && known.state == server as u8
        && known.flags == !server as u8
        && known.half_open == 1
}

plain! { Run = 40 }
