//! IPv4, with options and fragments.

use super::{Bytes, Carriage, Fragment, Headers, IpHeader, Network, Payload, Plain, ethernet, event, ports_protocol, protocol};
use crate::{
    family::AF_INET,
    reason::Reason,
    wire::{self, plain},
};

/// An IPv4 header without options; every field in network order.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Ipv4Header {
    /// Version (high four bits) and length of the header in words.
    pub version_length: u8,
    /// Type of service and ECN.
    pub tos: u8,
    /// Length of the packet.
    pub length: u16,
    /// Identification of a fragmented packet.
    pub id: u16,
    /// Flags (high three bits) and offset of a fragment in units of eight bytes.
    pub fragment: u16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol of the payload.
    pub protocol: u8,
    /// Checksum of the header.
    pub checksum: u16,
    /// Source address.
    pub source: u32,
    /// Destination address.
    pub destination: u32,
}

impl Ipv4Header {
    /// Where the checksum stands.
    pub const CHECKSUM: usize = 10;
    /// Where the time to live stands; protocol and checksum follow.
    pub const TTL: usize = 8;
}

/// Do not fragment.
pub const DONT_FRAGMENT: u16 = 0x4000;
/// More fragments follow.
const MORE_FRAGMENTS: u16 = 0x2000;
/// Offset of this fragment.
const FRAGMENT_OFFSET: u16 = 0x1fff;

/// Version and length of a header without options.
const PLAIN: u8 = 0x45;

/// IP version 4.
#[derive(Clone, Copy, Debug)]
pub struct V4;

/// Bytes of a header, from its first byte; fewer than 20 contradict themselves.
#[inline(always)]
fn header_length(version_length: u8) -> Option<usize> {
    let length = (version_length & 0xf) as usize * 4;
    (version_length >> 4 == 4 && length >= V4::HEADER).then_some(length)
}

#[inline(always)]
fn payload(header: &Ipv4Header, offset: usize) -> Payload {
    let fragment = u16::from_be(header.fragment);
    let fragment = if fragment & (MORE_FRAGMENTS | FRAGMENT_OFFSET) == 0 {
        Fragment::Whole
    } else if fragment & FRAGMENT_OFFSET == 0 {
        Fragment::First
    } else {
        Fragment::Later
    };
    Payload { offset, protocol: header.protocol, fragment_id: header.id as u32, fragment }
}

impl Network for V4 {
    type Address = u32;
    const ETHERTYPE: u16 = ethernet::IPV4;
    const AF: u8 = AF_INET;
    const HEADER: usize = 20;
    const ADDRESSES: usize = 12;
    const ICMP: u8 = protocol::ICMP;
    const TUNNELLED: u8 = protocol::IPIP;
    const ICMP_ERROR_MAX: usize = 576;

    #[inline(always)]
    fn parse<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Result<IpHeader<u32>, Reason> {
        let header: Ipv4Header = bytes.read(offset).ok_or(Reason::Malformed)?;
        let length = u16::from_be(header.length) as usize;
        let header_length = header_length(header.version_length).ok_or(Reason::Malformed)?;
        if length < header_length || offset + length > bytes.len() {
            return Err(Reason::Malformed);
        }
        Ok(IpHeader { source: header.source, destination: header.destination, offset, length })
    }

    #[inline(always)]
    fn carriage<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Option<Carriage> {
        let header: Ipv4Header = bytes.read(offset)?;
        let dont_fragment = header.fragment & DONT_FRAGMENT.to_be() != 0;
        Some(Carriage { traffic_class: header.tos, ttl: header.ttl, dont_fragment })
    }

    #[inline(always)]
    fn protocol<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Option<u8> {
        bytes.read(offset).map(|header: Ipv4Header| header.protocol)
    }

    #[inline(always)]
    fn plain<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Option<Plain<u32>> {
        let Headers::<Ipv4Header> { ip, transport } = bytes.read(offset)?;
        let length = u16::from_be(ip.length) as usize;
        let whole = ip.fragment & (MORE_FRAGMENTS | FRAGMENT_OFFSET).to_be() == 0;
        if ip.version_length != PLAIN || !whole || offset + length > bytes.len() {
            return None;
        }
        let event = event(length, Self::HEADER, ip.protocol, &transport)?;
        // Both addresses at once, to be written at once.
        let addresses: u64 = bytes.read(offset + Self::ADDRESSES)?;
        let key = wire::cast([addresses, ports_protocol(transport.ports, ip.protocol)]);
        Some(Plain { key, length, event })
    }

    #[inline(always)]
    fn transport<B: Bytes + ?Sized>(bytes: &B, header: &IpHeader<u32>) -> Result<Payload, Reason> {
        let ip: Ipv4Header = bytes.read(header.offset).ok_or(Reason::Malformed)?;
        Ok(payload(&ip, header.offset + (ip.version_length & 0xf) as usize * 4))
    }

    #[inline(always)]
    fn quoted<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Option<(u32, u32, Payload)> {
        let header: Ipv4Header = bytes.read(offset)?;
        let length = header_length(header.version_length)?;
        Some((header.source, header.destination, payload(&header, offset + length)))
    }

    /// Destination unreachable, source quench, time exceeded: those that IPVS relays.
    #[inline(always)]
    fn is_error(icmp_type: u8) -> bool {
        matches!(icmp_type, 3 | 4 | 11)
    }
}

plain! { Ipv4Header = 20 }
