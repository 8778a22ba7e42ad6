//! A real server, as the datapath sees it: everything that forwarding needs, in one cache line.

use core::mem::offset_of;

use crate::{hop::Hop, wire::plain};

/// A real server's entry in the server array. Written by userspace, which keeps it true from netlink.
///
/// MAC addresses, network addresses and ports are in network (memory) order.
#[doc(alias = "ip_vs_dest")]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Server {
    /// A [`Method`].
    pub method: u8,
    /// A [`Status`].
    pub status: u8,
    /// A [`Tunnel`]; means something only with [`Method::Tunnel`].
    pub tunnel: u8,
    /// Bits of [`flags`].
    pub flags: u8,
    /// How frames to the server leave; its MTU counts from the (inner) IP header.
    pub hop: Hop,
    /// Source address of a tunnel's outer header; IPv4 in the first word. With FULLNAT, the first word is the service's index,
    /// which may have a pool of local addresses of its own.
    pub outer_source: [u32; 4],
    /// The real server's address, which is where tunnels end; IPv4 in the first word, but mapped with [`Method::Cross`].
    pub address: [u32; 4],
    /// UDP port of a GUE tunnel.
    pub tunnel_port: u16,
    /// The real server's port.
    pub port: u16,
}

impl Server {
    /// Source and destination of a tunnel's outer header of IPv6, in words that are as wide as can be written.
    #[inline(always)]
    #[expect(unsafe_code, reason = "two fields are read as one")]
    #[expect(clippy::cast_ptr_alignment, reason = "who reads asks for no alignment, or needs none")]
    pub const fn outer_addresses(&self) -> [u64; 4] {
        const SOURCE: usize = offset_of!(Server, outer_source);
        const { assert!(offset_of!(Self, address) == SOURCE + size_of::<[u32; 4]>()) };
        // SAFETY: both fields are words without padding, one behind the other. On the BPF target no access needs an alignment; on
        // the host this one asks for none.
        unsafe {
            let addresses = (&raw const *self).byte_add(SOURCE).cast::<[u64; 4]>();
            if cfg!(target_arch = "bpf") { addresses.read() } else { addresses.read_unaligned() }
        }
    }
}

/// How packets reach a real server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Method {
    /// Rewrite the destination MAC address (direct routing, `-g`).
    #[doc(alias = "IP_VS_CONN_F_DROUTE")]
    Route = 0,
    /// Put the packet into another (IP tunnel, `-i`).
    #[doc(alias = "IP_VS_CONN_F_TUNNEL")]
    Tunnel = 1,
    /// FULLNAT between a client of IPv6 and a real server of IPv4: the packet becomes one of the other version, too
    /// ([`crate::packet::mapped`]).
    Cross = 2,
    /// Rewrite the destination address and port, and the source of the replies (NAT, `-m`).
    #[doc(alias = "IP_VS_CONN_F_MASQ")]
    Masquerade = 3,
    /// Rewrite both addresses and ports: the real server sees a local address of the director (FULLNAT).
    FullNat = 4,
}

impl Method {
    /// Whether a server with this method has its packets translated, and its replies pass the director.
    #[inline(always)]
    pub const fn translates(method: u8) -> bool {
        method >= Self::Cross as u8
    }

    /// Whether that can be done where the packet is found, if it is a plain one.
    #[inline(always)]
    pub const fn translates_in_place(method: u8) -> bool {
        method >= Self::Masquerade as u8
    }

    /// Whether the server sees local addresses in the place of clients'.
    #[inline(always)]
    pub const fn hides_clients(method: u8) -> bool {
        method == Self::FullNat as u8 || method == Self::Cross as u8
    }
}

/// Whether packets can be sent to a real server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Status {
    /// No server has this index.
    Free = 0,
    /// There is no route to the server.
    NoRoute = 1,
    /// Route and next hop are known.
    Ready = 2,
    /// The route is known, the next hop's MAC address not yet: the kernel's neighbour code has to send the packet.
    Unresolved = 3,
    /// The server is the director itself.
    Local = 4,
    /// Removed from its service while connections still name it.
    #[doc(alias = "IP_VS_DEST_F_AVAILABLE")]
    Removed = 5,
}

/// How a tunnelled packet is wrapped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Tunnel {
    /// IP in IP.
    #[doc(alias = "IP_VS_CONN_F_TUNNEL_TYPE_IPIP")]
    Ipip = 0,
    /// Generic UDP encapsulation, version 0.
    #[doc(alias = "IP_VS_CONN_F_TUNNEL_TYPE_GUE")]
    Gue = 1,
    /// Generic routing encapsulation, version 0.
    #[doc(alias = "IP_VS_CONN_F_TUNNEL_TYPE_GRE")]
    Gre = 2,
}

/// Bits of [`Server::flags`].
pub mod flags {
    /// The real server's address is IPv6.
    pub const IPV6: u8 = 1;
    /// GUE and GRE: fill in the outer checksum.
    #[doc(alias = "IP_VS_TUNNEL_ENCAP_FLAG_CSUM")]
    pub const CHECKSUM: u8 = 2;
    /// XDP can send frames out of the hop's port that came in by another one.
    pub const REDIRECT: u8 = 4;
    /// FULLNAT: the server is told who its TCP clients are ([`crate::toa`]).
    pub const TOA: u8 = 8;
}

/// Where an unresolved server's packets go: what the kernel's neighbour code has to resolve. Read only on that way.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct NextHop {
    /// `AF_INET` or `AF_INET6`.
    pub family: u32,
    /// The address in network order; IPv4 in the first word.
    pub address: [u32; 4],
    /// Always zero.
    pub zero: u32,
}

/// The live connection counters of one real server, as they stand in an array that userspace maps into its memory.
///
/// Both counters share one 64-bit word, so that one atomic addition keeps them together.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counters {
    /// Connections in an active state.
    pub active: u32,
    /// All connections.
    pub total: u32,
}

impl Counters {
    /// Added to the word when an active connection appears.
    pub const ACTIVE: u64 = 1 << 32;
    /// Added to the word when any connection appears.
    pub const TOTAL: u64 = 1;

    /// Takes the word apart.
    pub const fn from_word(word: u64) -> Self {
        Self { active: (word >> 32) as u32, total: word as u32 }
    }

    /// What `ipvsadm` calls `InActConn`.
    pub const fn inactive(self) -> u32 {
        self.total.saturating_sub(self.active)
    }

    /// What the server has to do, as IPVS counts it: 256 for each active connection, and 1 for each of all.
    #[doc(alias = "ip_vs_dest_conn_overhead")]
    #[inline(always)]
    pub const fn load(self) -> u32 {
        (self.active << 8).wrapping_add(self.total)
    }
}

plain! { Server = 64, NextHop = 24 }
