//! IPv6, with extension headers and fragments.

use super::{Bytes, Carriage, Fragment, Headers, IpHeader, Network, Payload, Plain, ethernet, event, ports_protocol, protocol};
use crate::{
    family::{AF_INET6, Ipv6},
    reason::Reason,
    wire::{self, plain},
};

/// An IPv6 header; every field in network order.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Ipv6Header {
    /// Version (4 bits), traffic class (8), flow label (20).
    pub version_class_flow: u32,
    /// Length of what follows this header.
    pub payload_length: u16,
    /// Protocol of what follows.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source address.
    pub source: Ipv6,
    /// Destination address.
    pub destination: Ipv6,
}

/// The extension header of a fragment; every field in network order.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct FragmentHeader {
    /// Protocol of what follows.
    pub next_header: u8,
    /// Always zero.
    pub reserved: u8,
    /// Offset in units of eight bytes (high 13 bits), two reserved bits, and the flag "more fragments".
    pub offset_more: u16,
    /// Identification of the packet.
    pub id: u32,
}

/// The beginning of the other extension headers.
#[derive(Clone, Copy)]
#[repr(C)]
struct Extension {
    next_header: u8,
    length: u8,
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// Extension headers that are looked behind; a packet with more is not ours to judge.
const EXTENSIONS: usize = 6;

/// How far into a frame the walk goes: a bound that the verifier needs, far beyond what routers let through.
const REACH: usize = 2047;

/// IP version 6.
#[derive(Clone, Copy, Debug)]
pub struct V6;

/// Walks the extension headers.
#[inline(always)]
fn walk<B: Bytes + ?Sized>(bytes: &B, mut protocol: u8, mut offset: usize) -> Option<Payload> {
    let mut fragment = Fragment::Whole;
    let mut fragment_id = 0;
    for _ in 0..EXTENSIONS {
        offset = bytes.opaque(offset);
        if offset > REACH {
            return None;
        }
        match protocol {
            FRAGMENT => {
                let header: FragmentHeader = bytes.read(offset)?;
                let offset_more = u16::from_be(header.offset_more);
                fragment_id = header.id;
                if offset_more & 0xfff8 != 0 {
                    return Some(Payload {
                        offset: offset + 8,
                        protocol: header.next_header,
                        fragment_id,
                        fragment: Fragment::Later,
                    });
                }
                // Neither offset nor more to come: an "atomic" fragment, which is a whole packet (RFC 6946).
                if offset_more & 1 != 0 {
                    fragment = Fragment::First;
                }
                protocol = header.next_header;
                offset += 8;
            }
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                let header: Extension = bytes.read(offset)?;
                protocol = header.next_header;
                offset += (header.length as usize + 1) * 8;
            }
            AUTHENTICATION => {
                let header: Extension = bytes.read(offset)?;
                protocol = header.next_header;
                offset += (header.length as usize + 2) * 4;
            }
            _ => return Some(Payload { offset, protocol, fragment_id, fragment }),
        }
    }
    None
}

/// The version, where it stands in the first word.
const VERSION: u32 = 0x6000_0000_u32.to_be();
const VERSION_MASK: u32 = 0xf000_0000_u32.to_be();

impl Network for V6 {
    type Address = Ipv6;
    const ETHERTYPE: u16 = ethernet::IPV6;
    const AF: u8 = AF_INET6;
    const HEADER: usize = 40;
    const ADDRESSES: usize = 8;
    const ICMP: u8 = protocol::ICMPV6;
    const TUNNELLED: u8 = protocol::IPV6;
    const ICMP_ERROR_MAX: usize = 1280;

    #[inline(always)]
    fn parse<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Result<IpHeader<Ipv6>, Reason> {
        let header: Ipv6Header = bytes.read(offset).ok_or(Reason::Malformed)?;
        let word = u32::from_be(header.version_class_flow);
        let length = Self::HEADER + u16::from_be(header.payload_length) as usize;
        if word >> 28 != 6 || offset + length > bytes.len() {
            return Err(Reason::Malformed);
        }
        Ok(IpHeader { source: header.source, destination: header.destination, offset, length })
    }

    #[inline(always)]
    fn carriage<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Option<Carriage> {
        let header: Ipv6Header = bytes.read(offset)?;
        let traffic_class = (u32::from_be(header.version_class_flow) >> 20) as u8;
        Some(Carriage { traffic_class, ttl: header.hop_limit, dont_fragment: true })
    }

    #[inline(always)]
    fn protocol<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Option<u8> {
        bytes.read(offset).map(|header: Ipv6Header| header.next_header)
    }

    #[inline(always)]
    fn plain<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Option<Plain<Ipv6>> {
        let Headers::<Ipv6Header> { ip, transport } = bytes.read(offset)?;
        let length = Self::HEADER + u16::from_be(ip.payload_length) as usize;
        if ip.version_class_flow & VERSION_MASK != VERSION || offset + length > bytes.len() {
            return None;
        }
        let event = event(length, Self::HEADER, ip.next_header, &transport)?;
        // Two words at once, to be written at once.
        let [a, b, c, d]: [u64; 4] = bytes.read(offset + Self::ADDRESSES)?;
        let key = wire::cast([a, b, c, d, ports_protocol(transport.ports, ip.next_header)]);
        Some(Plain { key, length, event })
    }

    #[inline(always)]
    fn transport<B: Bytes + ?Sized>(bytes: &B, header: &IpHeader<Ipv6>) -> Result<Payload, Reason> {
        let ip: Ipv6Header = bytes.read(header.offset).ok_or(Reason::Malformed)?;
        walk(bytes, ip.next_header, header.offset + Self::HEADER).ok_or(Reason::Malformed)
    }

    #[inline(always)]
    fn quoted<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Option<(Ipv6, Ipv6, Payload)> {
        let header: Ipv6Header = bytes.read(offset)?;
        if u32::from_be(header.version_class_flow) >> 28 != 6 {
            return None;
        }
        let payload = walk(bytes, header.next_header, offset + Self::HEADER)?;
        Some((header.source, header.destination, payload))
    }

    /// Every type below 128.
    #[inline(always)]
    fn is_error(icmp_type: u8) -> bool {
        icmp_type < 128
    }
}

plain! { Ipv6Header = 40, FragmentHeader = 8, Extension = 2 }
