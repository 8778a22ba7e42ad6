//! ICMP errors: those that arrive about a balanced flow, and those that a director sends.

use crate::wire::plain;

/// An ICMP or `ICMPv6` header; the quoted packet follows.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct IcmpHeader {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// Checksum, in network order.
    pub checksum: u16,
    /// What the type makes of it (an MTU, or nothing), in network order.
    pub rest: u32,
}

impl IcmpHeader {
    /// Where the checksum stands.
    pub const CHECKSUM: usize = 2;
}

/// The errors that a director sends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Error {
    /// There is no way to the real server.
    HostUnreachable,
    /// Nobody serves this.
    PortUnreachable,
    /// The packet's time to live ended.
    TimeExceeded,
    /// The packet does not fit; carries the MTU in bytes.
    TooBig(u16),
}

impl Error {
    /// Type, code and the rest of the header, for IPv4.
    #[inline(always)]
    pub const fn v4(self) -> IcmpHeader {
        let (kind, code, rest) = match self {
            Self::HostUnreachable => (3, 1, 0),
            Self::PortUnreachable => (3, 3, 0),
            Self::TimeExceeded => (11, 0, 0),
            Self::TooBig(mtu) => (3, 4, mtu as u32),
        };
        IcmpHeader { kind, code, checksum: 0, rest: rest.to_be() }
    }

    /// Type, code and the rest of the header, for IPv6.
    #[inline(always)]
    pub const fn v6(self) -> IcmpHeader {
        let (kind, code, rest) = match self {
            Self::HostUnreachable => (1, 3, 0),
            Self::PortUnreachable => (1, 4, 0),
            Self::TimeExceeded => (3, 0, 0),
            Self::TooBig(mtu) => (2, 0, mtu as u32),
        };
        IcmpHeader { kind, code, checksum: 0, rest: rest.to_be() }
    }
}

plain! { IcmpHeader = 8 }
