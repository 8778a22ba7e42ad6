//! The replies of a masqueraded real server (NAT, FULLNAT): what they look like when they come, and where they go.
//!
//! ```text
//! request   192.168.74.12:40000 -> 192.168.74.204:80     becomes   … -> 10.0.0.205:8080     a connection
//! reply     10.0.0.205:8080 -> 192.168.74.12:40000       becomes   192.168.74.204:80 -> …   a reply's entry
//! ```
//!
//! The table's key is source and destination of a reply: a [`ConnectionKey`] with the real server where a request has
//! its client. With FULLNAT, replies go to a local address ([`crate::local`]), and who makes the entry has its port. The entry holds all that a reply needs which begins or ends nothing; state and time are the connection's.

use crate::{
    connection::{Connection, ConnectionKey},
    family::Address,
    hop::Hop,
    packet::transport::Ports,
    server::Server,
    wire::plain,
};

/// What the datapath knows of the replies of a connection. Written by the datapath alone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Reply<A> {
    /// The virtual address, in network order.
    pub vip: A,
    /// The client's address, in network order.
    pub client: A,
    /// The client's port (as source) and the virtual port (as destination).
    pub ports: Ports,
    /// What the real server's SYN has acknowledged: the low 16 bits, in host order. Noted for servers that are told who
    /// their clients are ([`crate::toa`]).
    pub acknowledged: u16,
    /// Always zero.
    pub zero: u8,
    /// Bits of [`flags`].
    pub flags: u8,
    /// Index of the real server.
    pub server: u32,
    /// When a reply last moved the connection on, in jiffies (the low 32 bits); at most once a second.
    pub last_seen: u32,
    /// The way to the client.
    pub hop: Hop,
}

/// Bits of [`Reply::flags`].
pub mod flags {
    /// As [`crate::connection::flags::SETTLED`], when a reply last looked.
    pub const SETTLED: u8 = 1;
    /// [`super::Reply::hop`] is known.
    pub const KNOWN: u8 = 2;
    /// XDP can send frames out of the hop's port that came in by another one.
    pub const REDIRECT: u8 = 4;
    /// Replies come to a local address: the client's has to take its place.
    pub const LOCAL: u8 = 8;
    /// The client has IPv6: the entry holds nothing but the claim to the local port, and the true one stands under the same key,
    /// mapped, among those of IPv6 ([`crate::packet::mapped`]).
    pub const CROSS: u8 = 16;
}

/// The port of the real server that a connection to a virtual port leads to, both in network order: a server without a
/// port takes the virtual one.
#[inline(always)]
pub const fn server_port(server: &Server, virtual_port: u16) -> u16 {
    if server.port == 0 { virtual_port } else { server.port }
}

/// Under which key the replies of a connection are found, whose real server takes `client` and `client_port` for its client:
/// they are the client's own, or local ones.
#[inline(always)]
pub fn key<A: Address>(connection: &ConnectionKey<A>, server: &Server, client: A, client_port: u16) -> ConnectionKey<A> {
    let port = server_port(server, connection.ports.destination());
    ConnectionKey {
        client: A::from_words(&server.address),
        vip: client,
        ports: Ports::new(port, client_port),
        protocol: connection.protocol,
    }
}

impl<A: Address> Reply<A> {
    /// The entry of a new connection, whose way back nobody has looked for yet.
    #[inline(always)]
    pub fn new(connection: &ConnectionKey<A>, server: u32, flags: u8) -> Self {
        Self {
            vip: connection.vip,
            client: connection.client,
            ports: connection.ports,
            acknowledged: 0,
            zero: 0,
            flags,
            server,
            last_seen: 0,
            hop: Hop::default(),
        }
    }

    /// The key of the connection that a reply of this protocol belongs to.
    #[inline(always)]
    pub const fn connection(&self, protocol: u32) -> ConnectionKey<A> {
        ConnectionKey { client: self.client, vip: self.vip, ports: self.ports, protocol }
    }

    /// The ports of a reply for the client.
    #[inline(always)]
    pub const fn reply_ports(&self) -> Ports {
        self.ports.reversed()
    }

    /// Whether this is the entry of that connection.
    #[inline(always)]
    pub fn belongs(&self, connection: &Connection) -> bool {
        self.server == connection.server
    }
}

plain! {
    Reply<crate::family::Ipv4> = 48,
    Reply<crate::family::Ipv6> = 72,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{family::Ipv4, packet::protocol};

    fn connection() -> ConnectionKey<Ipv4> {
        let ports = Ports::new(40_000_u16.to_be(), 80_u16.to_be());
        ConnectionKey { client: 1, vip: 2, ports, protocol: protocol::TCP.into() }
    }

    #[test]
    fn a_reply_leads_back_to_its_connection() {
        for (port, server_port) in [(8080_u16, 8080_u16), (0, 80)] {
            let server = Server { address: [3, 0, 0, 0], port: port.to_be(), ..Server::default() };
            let connection = connection();
            let reply = key(&connection, &server, connection.client, connection.ports.source());
            let ports = Ports::new(server_port.to_be(), 40_000_u16.to_be());
            assert_eq!(reply, ConnectionKey { client: 3, vip: 1, ports, protocol: protocol::TCP.into() });
            assert_eq!(Reply::new(&connection, 7, 0).connection(reply.protocol), connection);
        }
    }
}
