//! A connection: one tracked flow from a client to a real server.
//!
//! The datapath makes entries, the sweep deletes them, userspace lists them. IPv4 and IPv6 have tables of their own, so
//! that the common key stays at 16 bytes.

use crate::{local::Local, packet::transport::Ports, server::Counters, wire::plain};

/// Who talks to whom: the key of the connection table. Made of words, see [`Ports`], and aligned so that two can be written at once.
#[doc(alias = "ip_vs_conn_param")]
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C, align(8))]
pub struct ConnectionKey<A> {
    /// The client's address, in network order.
    pub client: A,
    /// The virtual address, in network order.
    pub vip: A,
    /// The client's port (as source) and the virtual port (as destination).
    pub ports: Ports,
    /// The IP protocol: TCP, UDP or SCTP.
    pub protocol: u32,
}

/// What the datapath knows of a connection.
///
/// Written by the datapath, one 16-byte entry at a time, and by a daemon that takes over what another director tells. Two CPUs that meet the same flow may both write; every
/// value they can leave behind is a legal one, and the counters that depend on them are recounted by the sweep.
#[doc(alias = "ip_vs_conn")]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C, align(8))]
pub struct Connection {
    /// Index of the real server.
    pub server: u32,
    /// With FULLNAT, the local address and port.
    pub local: Local,
    /// When the last packet was seen, in jiffies (the low 32 bits); written at most once a second.
    pub last_seen: u32,
    /// State of the protocol: a [`crate::tcp::State`], [`crate::sctp::State`] or [`crate::udp::State`].
    pub state: u8,
    /// Bits of [`flags`].
    pub flags: u8,
    /// 1 if it is counted as half-open ([`crate::flood`]).
    pub half_open: u8,
    /// If a template chose the real server, the [`prefix`](crate::service::Service::prefix) by which that was found. 0: what the service
    /// has now.
    pub prefix: u8,
}

impl Connection {
    /// Real server and local address in one word: all that the common packet asks. They are its first eight bytes.
    #[inline(always)]
    pub const fn leg(&self) -> Leg {
        Leg::new(self.server, self.local)
    }

    /// What it adds to its real server's [`Counters`], as their word.
    #[inline(always)]
    pub const fn share(&self) -> u64 {
        if self.flags & flags::ACTIVE != 0 { Counters::TOTAL + Counters::ACTIVE } else { Counters::TOTAL }
    }
}

/// The way of a connection's packets behind the director: to which real server, from which local address and port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(transparent)]
pub struct Leg(pub u64);

impl Leg {
    /// To the real server with this index.
    #[inline(always)]
    pub const fn new(server: u32, local: Local) -> Self {
        Self(server as u64 | (local.0 as u64) << 32)
    }

    /// Index of the real server.
    #[inline(always)]
    pub const fn server(self) -> u32 {
        self.0 as u32
    }

    /// The local address and port, if there are.
    #[inline(always)]
    pub const fn local(self) -> Local {
        Local((self.0 >> 32) as u32)
    }
}

const _: () = assert!(
    core::mem::offset_of!(Connection, server) == 0
        && core::mem::offset_of!(Connection, local) == 4
        && cfg!(target_endian = "little"),
    "a leg is read from there"
);

/// Bits of [`Connection::flags`].
pub mod flags {
    /// Counted as an active connection of its real server.
    pub const ACTIVE: u8 = 1;
    /// Not a packet of the other direction was seen: the state machine goes by the client's packets alone.
    #[doc(alias = "IP_VS_CONN_F_NOOUTPUT")]
    pub const NO_OUTPUT: u8 = 2;
    /// A packet that neither begins nor ends anything changes nothing: the state machine need not be asked.
    pub const SETTLED: u8 = 4;
    /// The real server is masqueraded, by NAT or FULLNAT: its replies have an entry of their own ([`crate::reply`]).
    #[doc(alias = "IP_VS_CONN_F_MASQ")]
    pub const MASQUERADED: u8 = 8;
    /// A template chose the real server, and lives as long as the connection does ([`crate::template`]).
    pub const CONTROLLED: u8 = 16;
    /// The real server has still to be told who its client is ([`crate::toa`]): the connection is not settled before.
    pub const UNNAMED: u8 = 64;
    /// The connection is over: it makes way for a new one of the same client as soon as that has a real server.
    pub const LEAVING: u8 = 32;
    /// Another director has told of it, and no packet of its own has come here yet: the first one takes this flag away.
    #[doc(alias = "IP_VS_CONN_F_SYNC")]
    pub const SYNCED: u8 = 128;
}

/// Which packet a fragment belongs to: the key of the table that leads later fragments after the first.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct FragmentKey<A> {
    /// Source address.
    pub source: A,
    /// Destination address.
    pub destination: A,
    /// Identification, as in the header.
    pub id: u32,
    /// The IP protocol.
    pub protocol: u32,
}

plain! {
    FragmentKey<crate::family::Ipv4> = 16,
    FragmentKey<crate::family::Ipv6> = 40,
    ConnectionKey<crate::family::Ipv4> = 16,
    ConnectionKey<crate::family::Ipv6> = 40,
    Connection = 16,
}
