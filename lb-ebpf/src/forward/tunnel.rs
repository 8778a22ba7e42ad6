//! Tunnels: the packet travels to its real server inside another one. IP in IP, GUE and GRE, in all four combinations of
//! families. `ipvs-semantics.md`, section 5.3.

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use lb_common::{
    checksum,
    family::Ipv6,
    hash,
    packet::{
        DONT_FRAGMENT, Fragment, IpHeader, Network, Payload, V4, V6,
        ethernet::Link,
        protocol,
        transport::{Ports, UdpHeader},
    },
    reason::Reason,
    server::{Server, Tunnel, flags},
};
use lb_ebpf::packet::{Packet, Room};

use crate::maps::Family;

/// Bytes of a GUE header (version 0, no flags).
const GUE: usize = 4;
/// Bytes of a GRE header without, and of its checksum with the reserved field.
const GRE: usize = 4;
const GRE_CHECKSUM: usize = 4;
/// The GRE flag that says that there is a checksum.
const GRE_CHECKSUM_PRESENT: u16 = 0x8000;

/// The outer IP header, as far as both families have it in common.
struct Outer {
    protocol: u8,
    traffic_class: u8,
    ttl: u8,
    dont_fragment: bool,
    /// Bytes behind the IP header.
    length: usize,
}

/// IP in IP. Addresses the frame to the server's next hop.
#[inline(always)]
pub fn ipip<P: Packet, F: Family>(
    packet: &mut P,
    link: &Link,
    header: &IpHeader<&F::Address>,
    server: &Server,
) -> Result<(), Reason> {
    let outer = Outer::of::<P, F>(packet, header.offset, header.length)?;
    envelope(packet, link, server, server.flags, 0, &outer).map(drop)
}

/// GUE and GRE, which have a header of their own behind the outer IP header.
#[inline(always)]
pub fn with_header<P: Packet, F: Family>(packet: &mut P, link: &Link, server: &Server) -> Result<(), Reason> {
    let header = F::parse(packet, link.payload)?;
    let (tunnel, server_flags) = (server.tunnel, server.flags);
    let inner =
        if server_flags & flags::CHECKSUM != 0 && !packet.is_segmented() { inner_sum::<P, F>(packet, &header) } else { None };
    let mut outer = Outer::of::<P, F>(packet, header.offset, header.length)?;
    if tunnel == Tunnel::Gue as u8 {
        let source = source_port::<P, F>(packet, header.offset);
        outer.protocol = protocol::UDP;
        outer.length += size_of::<UdpHeader>() + GUE;
        let at = envelope(packet, link, server, server_flags, size_of::<UdpHeader>() + GUE, &outer)?;
        write_gue::<P, F>(packet, at, server, server_flags, source, outer.length as u16, inner)
    } else {
        let extra = if inner.is_some() { GRE + GRE_CHECKSUM } else { GRE };
        outer.protocol = protocol::GRE;
        outer.length += extra;
        let at = envelope(packet, link, server, server_flags, extra, &outer)?;
        write_gre::<P, F>(packet, at, inner)
    }
}

impl Outer {
    /// What the inner header, whose time to live is down by one already, says of the outer one.
    #[inline(always)]
    fn of<P: Packet, F: Family>(packet: &P, inner: usize, length: usize) -> Result<Self, Reason> {
        let carriage = F::carriage(packet, inner).ok_or(Reason::Malformed)?;
        Ok(Self {
            protocol: F::TUNNELLED,
            traffic_class: outer_class(carriage.traffic_class),
            ttl: carriage.ttl,
            dont_fragment: carriage.dont_fragment && F::HEADER == V4::HEADER,
            length,
        })
    }

    /// The header of IPv4, in words: bytes one by one would be many writes.
    #[inline(always)]
    fn v4(&self, server: &Server) -> [u32; V4::HEADER / 4] {
        let length = (self.length + V4::HEADER) as u16;
        let start = word(0x45, self.traffic_class, length.to_be());
        let id_fragment = if self.dont_fragment {
            word(0, 0, DONT_FRAGMENT.to_be())
        } else {
            // SAFETY: a helper without arguments.
            let [first, second, ..] = unsafe { bpf_get_prandom_u32() }.to_ne_bytes();
            word(first, second, 0)
        };
        let (source, destination) = (server.outer_source[0], server.address[0]);
        let sum = [start, id_fragment, word(self.ttl, self.protocol, 0), source, destination].into_iter().map(u64::from).sum();
        [start, id_fragment, word(self.ttl, self.protocol, checksum::finish(sum)), source, destination]
    }

    /// The header of IPv6, in words.
    #[inline(always)]
    fn v6(&self, server: &Server) -> [u64; V6::HEADER / 8] {
        let start = 6 << 60
            | u64::from(self.traffic_class) << 52
            | u64::from(self.length as u16) << 16
            | u64::from(self.protocol) << 8
            | u64::from(self.ttl);
        let [a, b, c, d] = server.outer_addresses();
        [start.to_be(), a, b, c, d]
    }
}

/// Two bytes and a half-word, as they stand in memory.
#[inline(always)]
const fn word(first: u8, second: u8, rest: u16) -> u32 {
    let [third, fourth] = rest.to_ne_bytes();
    u32::from_ne_bytes([first, second, third, fourth])
}

/// IPVS lets no "congestion experienced" out: the outer header only says that the flow is capable.
#[inline(always)]
const fn outer_class(inner: u8) -> u8 {
    // Both bits of the field stand for it; without the lower one they say "capable".
    inner - (inner & inner >> 1 & 1)
}

/// Makes room for the outer IP header and `extra` bytes, addresses the frame, and writes the outer IP header. Returns where the
/// `extra` bytes begin.
#[inline(always)]
fn envelope<P: Packet>(
    packet: &mut P,
    link: &Link,
    server: &Server,
    server_flags: u8,
    extra: usize,
    outer: &Outer,
) -> Result<usize, Reason> {
    if server_flags & flags::IPV6 != 0 {
        let room = Room { bytes: V6::HEADER + extra, ethertype: V6::ETHERTYPE, protocol: outer.protocol };
        let at = packet.address(link, &server.hop, room)?;
        packet.write(at, outer.v6(server))?;
        Ok(at + V6::HEADER)
    } else {
        let room = Room { bytes: V4::HEADER + extra, ethertype: V4::ETHERTYPE, protocol: outer.protocol };
        let at = packet.address(link, &server.hop, room)?;
        packet.write(at, outer.v4(server))?;
        Ok(at + V4::HEADER)
    }
}

/// Writes UDP and GUE headers. Without an inner sum the checksum stays 0, which means none.
#[inline(always)]
fn write_gue<P: Packet, F: Family>(
    packet: &mut P,
    at: usize,
    server: &Server,
    server_flags: u8,
    source: u16,
    length: u16,
    inner: Option<u16>,
) -> Result<(), Reason> {
    let destination = server.tunnel_port;
    let gue = u32::from_ne_bytes([0, F::TUNNELLED, 0, 0]);
    let mut udp = UdpHeader { ports: Ports::new(source, destination), length: length.to_be(), checksum: 0 };
    if let Some(inner) = inner {
        let mut sum = u64::from(inner)
            + u64::from(gue)
            + u64::from(source)
            + u64::from(destination)
            // Once for the header, once for the pseudo header.
            + 2 * u64::from(udp.length)
            + u64::from(u16::from(protocol::UDP).to_be());
        sum += if server_flags & flags::IPV6 != 0 {
            sum_words(&server.outer_source) + sum_words(&server.address)
        } else {
            u64::from(server.outer_source[0]) + u64::from(server.address[0])
        };
        udp.checksum = match checksum::finish(sum) {
            0 => 0xffff,
            checksum => checksum,
        };
    }
    packet.write(at, udp)?;
    packet.write(at + size_of::<UdpHeader>(), gue)
}

/// Writes a GRE header, with a checksum if there is an inner sum.
#[inline(always)]
fn write_gre<P: Packet, F: Family>(packet: &mut P, at: usize, inner: Option<u16>) -> Result<(), Reason> {
    let ethertype = F::ETHERTYPE.to_be();
    let Some(inner) = inner else {
        packet.write(at, 0u16)?;
        return packet.write(at + 2, ethertype);
    };
    let present = GRE_CHECKSUM_PRESENT.to_be();
    packet.write(at, present)?;
    packet.write(at + 2, ethertype)?;
    packet.write(at + 4, checksum::finish(u64::from(inner) + u64::from(present) + u64::from(ethertype)))?;
    packet.write(at + 6, 0u16)
}

/// A stable port for each flow, from the usual ephemeral range, so that networks can spread flows by it.
#[inline(always)]
fn source_port<P: Packet, F: Family>(packet: &P, at: usize) -> u16 {
    // With options or extension headers this word is not the ports, but as a rule still the same for each packet of a flow.
    let ports: u32 = packet.read(at + F::HEADER).unwrap_or(0);
    let flow = sum_addresses::<P, F>(packet, at).unwrap_or(0) ^ u64::from(ports.rotate_left(7));
    (0x8000 | hash::hash_32((flow ^ (flow >> 32)) as u32, 14) as u16).to_be()
}

/// The sum of the words of both addresses.
#[inline(always)]
fn sum_addresses<P: Packet, F: Family>(packet: &P, at: usize) -> Option<u64> {
    let mut sum = 0;
    for word in 0..size_of::<[F::Address; 2]>() / 4 {
        sum += u64::from(packet.read::<u32>(at + F::ADDRESSES + 4 * word)?);
    }
    Some(sum)
}

#[inline(always)]
fn sum_words(address: &Ipv6) -> u64 {
    u64::from(address[0]) + u64::from(address[1]) + u64::from(address[2]) + u64::from(address[3])
}

/// The sum of all bytes of the inner packet, from its headers alone: a TCP or UDP segment together with its pseudo header
/// sums to all ones if its checksum is right, and so does an IPv4 header. (The kernel calls this local checksum offload.)
/// That holds as well for a segment whose checksum is still to be filled in by a device. `None`: no way to know.
#[inline(always)]
fn inner_sum<P: Packet, F: Family>(packet: &P, header: &IpHeader<F::Address>) -> Option<u16> {
    let Payload { protocol, offset: behind, fragment, .. } = F::transport(packet, header).ok()?;
    let offset = header.offset + F::HEADER;
    if behind != offset || fragment != Fragment::Whole || !matches!(protocol, protocol::TCP | protocol::UDP) {
        return None;
    }
    if protocol == protocol::UDP && packet.read::<UdpHeader>(offset)?.checksum == 0 {
        return None;
    }
    let addresses = sum_addresses::<P, F>(packet, header.offset)?;
    let segment = (header.length + header.offset - offset) as u16;
    let pseudo = addresses + u64::from(segment.to_be()) + u64::from(u16::from(protocol).to_be());
    let ip = if F::HEADER == V4::HEADER {
        0
    } else {
        addresses + u64::from(packet.read::<u32>(header.offset)?) + u64::from(packet.read::<u32>(header.offset + 4)?)
    };
    Some(checksum::fold(ip + u64::from(!checksum::fold(pseudo))))
}
