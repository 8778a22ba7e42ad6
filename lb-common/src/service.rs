//! A virtual service, as the datapath sees it: (protocol, address, port), or a firewall mark, to a schedule.

use crate::{family::Address, wire::plain};

/// What a packet must be addressed to, or be marked with. Address and port in network order.
#[doc(alias = "ip_vs_service")]
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct ServiceKey<A> {
    /// The virtual address (VIP).
    pub vip: A,
    /// The virtual port.
    pub port: u16,
    /// The IP protocol.
    pub protocol: u8,
    /// Always zero: map keys are compared as bytes.
    pub zero: u8,
}

impl<A: Address> ServiceKey<A> {
    /// The key of the service that a firewall mark names: the mark in the place of an address, of a protocol that no balanced
    /// packet has.
    #[inline(always)]
    pub fn of_mark(mark: u32) -> Self {
        Self { vip: A::from_words(&[mark, 0, 0, 0]), port: 0, protocol: 0, zero: 0 }
    }
}

/// A virtual service. Written by userspace, read by the datapath on a connection's first packet.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Service {
    /// Index into the schedule and cursor arrays.
    pub id: u32,
    /// How the schedule is indexed: a [`Mode`].
    pub mode: u8,
    /// Bits of [`flags`].
    pub flags: u8,
    /// Length of the prefix by which persistence takes clients for one; 0 if the netmask is none, or has holes.
    pub prefix: u8,
    /// Always zero.
    pub zero: u8,
    /// The firewall mark that names the service; 0: none.
    pub mark: u32,
    /// Seconds that a client stays with its real server; 0: not at all.
    pub persistence: u32,
    /// Whom persistence takes for one client. IPv4: the netmask, in network order; IPv6: the length of the prefix.
    pub netmask: u32,
}

/// How a service's schedule is indexed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Mode {
    /// By a cursor that every new connection advances (rr, wrr and the dynamic schedulers).
    Cursor = 0,
    /// By IPVS's hash of the destination address (dh).
    DestinationHash = 1,
    /// By the Maglev hash of the client's address (mh).
    Maglev = 2,
    /// By IPVS's hash of the client's address (sh).
    SourceHash = 3,
    /// By the one server that the destination went to before, else by the cursor (lblc). See [`crate::locality`].
    Locality = 4,
    /// By the set of servers that the destination went to before, else by the cursor (lblcr).
    Replicas = 5,
}

/// Bits of [`Service::flags`].
pub mod flags {
    /// Hash schedulers: when the hashed real server takes no connections, look for another.
    #[doc(alias = "IP_VS_SVC_F_SCHED_MH_FALLBACK")]
    pub const FALLBACK: u8 = 1;
    /// Hash schedulers: the client's port takes part in the hash.
    #[doc(alias = "IP_VS_SVC_F_SCHED_SH_PORT")]
    #[doc(alias = "IP_VS_SVC_F_SCHED_MH_PORT")]
    pub const PORT: u8 = 2;
    /// Each UDP datagram is scheduled by itself, and leaves no connection behind.
    #[doc(alias = "IP_VS_SVC_F_ONEPACKET")]
    pub const ONE_PACKET: u8 = 4;
    /// Persistent services: a client stays with its real server on all ports of the virtual address.
    pub const ANY_PORT: u8 = 8;
    /// FTP's control connections, whose clients have data connections to other ports.
    pub const FTP: u8 = 16;
    /// Persistent services: it is calls that stay with their real servers. See [`crate::call`].
    pub const SIP: u8 = 32;
}

plain! {
    ServiceKey<crate::family::Ipv4> = 8,
    ServiceKey<crate::family::Ipv6> = 20,
    Service = 20,
}
