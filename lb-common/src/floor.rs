//! What the bench tells the harness around a program under test, and what both must agree on: which flow is whose.

use crate::{packet::transport::Ports, wire::plain};

/// One round of a measurement. Written by the bench, counted on by the harness.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Round {
    /// Length of the frame, in bytes.
    pub length: u32,
    /// Not 0: the frame is IPv6.
    pub is_v6: u16,
    /// Where the flow's client stands in the frame: a [`Role`].
    pub role: u16,
    /// The next flow's number.
    pub flow: u64,
    /// How many flows there are: a power of two.
    pub flows: u64,
    /// The (last word of the) first client's address, in host order.
    pub first_client: u32,
    /// The port that is not the client's, in network order; with more than one service, that of the first.
    pub port: u16,
    /// The first two bytes of the frame.
    pub start: u16,
    /// The next 52 bytes, to the end of a TCP header behind IPv4: in words that lie as those of IP headers do.
    pub headers: [u32; 13],
    /// The next 20 bytes, to the end of a TCP header behind IPv6.
    pub more_headers: [u32; 5],
    /// How many services there are, at ports in a row; a flow always goes to the same one.
    pub services: u32,
    /// Always zero.
    pub zero: u32,
}

/// What a flow's client is to a packet.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(u16)]
pub enum Role {
    /// Its sender.
    #[default]
    Source = 0,
    /// Its receiver.
    Destination = 1,
    /// The receiver of the packet that an ICMP error quotes.
    Quoted = 2,
}

impl Round {
    /// The client of a flow: the (last word of the) address in network order, and the ports of its packets.
    ///
    /// Numbers are scattered, so that neighbours in time are no neighbours in the table. Multiplying by an odd number and
    /// cutting to a power of two only changes the order: of so many flows in a row, none comes twice.
    #[inline(always)]
    pub const fn client(&self, flow: u64) -> (u32, Ports) {
        let client = (flow.wrapping_mul(0x9e37_79b1) & self.flows.wrapping_sub(1)) as u32;
        let address = self.first_client.wrapping_add(client >> 14);
        let port = match self.services {
            0 | 1 => self.port,
            services => u16::from_be(self.port).wrapping_add((client % services) as u16).to_be(),
        };
        (address.to_be(), Ports::new((10_000 + (client & 0x3fff) as u16).to_be(), port))
    }
}

plain! { Round = 112 }

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_flow_comes_once_in_a_lap() {
        for flows in [1, 1 << 10, 1 << 16] {
            let round = Round { flows, first_client: 0x0a10_0000, ..Round::default() };
            let clients: HashSet<_> = (7..7 + flows).map(|flow| round.client(flow)).collect();
            assert_eq!(clients.len() as u64, flows);
        }
    }
}
