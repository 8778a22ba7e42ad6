//! Tunnels that end on a real server: IP in IP, GRE, and GUE (generic UDP encapsulation).
//!
//! A director that forwards by `tunnel` puts the client's packet, as it is, behind a header of its own. [`open`] finds the
//! client's packet again: what kind of tunnel it came through, where it begins, to whom it goes. It decides nothing:
//! whether that address is served here, and whether this tunnel may bring its packets, is [`Accepts`] and the program's
//! to judge.
//!
//! ```text
//! Ethernet | IPv4 or IPv6 |                 | IPv4 or IPv6 | TCP ...     IP in IP: protocol 4 or 41
//! Ethernet | IPv4 or IPv6 | GRE (4 or 8)    | IPv4 or IPv6 | TCP ...     protocol 47
//! Ethernet | IPv4 or IPv6 | UDP, GUE (8+4)  | IPv4 or IPv6 | TCP ...     protocol 17, to the port of the tunnel
//! ```
//!
//! Understood is what directors send: GRE without key and sequence number, GUE version 0 without options, and version 1,
//! which is no header at all (Linux calls it FOU). Anything else, and every fragment, is [`Outcome::NotTunnelled`] or
//! [`Outcome::Fragment`] and stays as it is. The checksums of the tunnel (GRE's, and UDP's) are not looked at: the packet
//! inside has its own.

use super::{Bytes, Fragment, IpHeader, Network, V4, V6, ethernet::Link, protocol, transport::UdpHeader};
use crate::{
    family::{Address, Ipv6},
    reason::Reason,
    wire::plain,
};

/// A GRE header without its optional fields; every field in network order.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct GreHeader {
    /// Which optional fields follow, and the version.
    pub flags: u16,
    /// Ethernet type of the packet inside.
    pub ethertype: u16,
}

/// The flag for a checksum (and two reserved bytes) behind a GRE header, in host order.
pub const GRE_CHECKSUM: u16 = 0x8000;

/// A GUE header without options; every field in network order.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct GueHeader {
    /// Version (2 bits), control message (1), length of the options in words (5).
    pub version_length: u8,
    /// IP protocol of the packet inside.
    pub protocol: u8,
    /// Which options follow.
    pub flags: u16,
}

/// How the packet was wrapped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum Kind {
    /// GRE.
    Gre = 1,
    /// GUE, or nothing but UDP.
    Gue = 2,
    /// Nothing between the two IP headers.
    Ipip = 4,
}

/// Which tunnels may bring packets to a virtual address: the value in the map of the decapsulation program.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Accepts {
    /// The sum of the accepted [`Kind`]s.
    pub kinds: u32,
    /// The UDP port of GUE, in network order.
    pub port: u16,
    /// Always zero.
    pub reserved: u16,
}

impl Accepts {
    /// Whether a packet that came through this tunnel is accepted.
    #[inline(always)]
    #[must_use]
    pub const fn allows(&self, opened: &Opened) -> bool {
        self.kinds & opened.kind as u32 != 0 && (opened.kind as u32 != Kind::Gue as u32 || self.port == opened.port)
    }
}

/// A packet inside a tunnel, found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Opened {
    /// The tunnel.
    pub kind: Kind,
    /// The UDP port to which a GUE packet went, in network order; 0 for others.
    pub port: u16,
    /// Where the packet inside begins.
    pub offset: usize,
    /// Whether the packet inside is IPv6.
    pub inner_v6: bool,
    /// To whom the packet inside goes: see [`key`].
    pub destination: Ipv6,
    /// Type of service or traffic class of the packet inside.
    pub inner_class: u8,
    /// Type of service or traffic class of the tunnel's header.
    pub outer_class: u8,
}

/// An address as the key of the decapsulation program's map: IPv4 as `::ffff:a.b.c.d`, which no packet carries.
#[inline(always)]
pub fn key<A: Address>(address: &A) -> Ipv6 {
    let words = address.words();
    if size_of::<A>() == size_of::<u32>() { [0, 0, 0xffff_u32.to_be(), words[0]] } else { words }
}

/// What became of a frame at a real server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum Outcome {
    /// The client's packet was taken out and given to the host.
    Decapsulated,
    /// The tunnel was congested, and the packet inside cannot say so: dropped (RFC 6040).
    Congested,
    /// The kernel could not take the header off: dropped.
    Failed,
    /// A fragment: passed.
    Fragment,
    /// A header is cut off or contradicts itself: passed.
    Malformed,
    /// The tunnel's header is addressed to another host, to which this one forwards: passed.
    NotHere,
    /// The packet inside is for an address that is not served here, or may not come this way: passed.
    NotServed,
    /// Not a packet in a tunnel: passed.
    NotTunnelled,
}

impl Outcome {
    /// Every outcome, in the order of their numbers, which is the order in the counter array.
    pub const ALL: &[Self] = &[
        Self::Decapsulated,
        Self::Congested,
        Self::Failed,
        Self::Fragment,
        Self::Malformed,
        Self::NotHere,
        Self::NotServed,
        Self::NotTunnelled,
    ];

    /// A short name for JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Decapsulated => "decapsulated",
            Self::Congested => "congested",
            Self::Failed => "failed",
            Self::Fragment => "fragment",
            Self::Malformed => "malformed",
            Self::NotHere => "not-here",
            Self::NotServed => "not-served",
            Self::NotTunnelled => "not-tunnelled",
        }
    }
}

impl From<Reason> for Outcome {
    /// What the shared parser says, in this program's words.
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        match reason {
            Reason::Malformed => Self::Malformed,
            _ => Self::NotTunnelled,
        }
    }
}

/// Looks for a packet inside the one that follows the link header.
#[inline(always)]
pub fn open<B: Bytes + ?Sized>(frame: &B, link: &Link) -> Result<Opened, Outcome> {
    match link.ethertype {
        V4::ETHERTYPE => open_outer::<V4, B>(frame, link.payload),
        V6::ETHERTYPE => open_outer::<V6, B>(frame, link.payload),
        _ => Err(Outcome::NotTunnelled),
    }
}

/// Takes the outer IP header off, and what the tunnel has behind it.
#[inline(always)]
fn open_outer<N: Network, B: Bytes + ?Sized>(frame: &B, offset: usize) -> Result<Opened, Outcome> {
    let outer = N::parse(frame, offset)?;
    let payload = N::transport(frame, &outer)?;
    if !matches!(payload.protocol, protocol::IPIP | protocol::IPV6 | protocol::GRE | protocol::UDP) {
        return Err(Outcome::NotTunnelled);
    }
    if !matches!(payload.fragment, Fragment::Whole) {
        return Err(Outcome::Fragment);
    }
    let (kind, port, inner, length) = match payload.protocol {
        protocol::GRE => {
            let (inner, length) = gre(frame, payload.offset)?;
            (Kind::Gre, 0, inner, length)
        }
        protocol::UDP => {
            let udp: UdpHeader = frame.read(payload.offset).ok_or(Outcome::Malformed)?;
            let (inner, length) = gue(frame, payload.offset + size_of::<UdpHeader>())?;
            (Kind::Gue, udp.ports.destination(), inner, size_of::<UdpHeader>() + length)
        }
        inner => (Kind::Ipip, 0, inner, 0),
    };
    let outer_class = N::carriage(frame, offset).ok_or(Outcome::Malformed)?.traffic_class;
    let found = Found { kind, port, offset: payload.offset + length, end: outer.offset + outer.length };
    if inner == protocol::IPV6 {
        open_inner::<V6, B>(frame, &found, true, outer_class)
    } else {
        open_inner::<V4, B>(frame, &found, false, outer_class)
    }
}

/// Between the two IP headers.
struct Found {
    kind: Kind,
    port: u16,
    offset: usize,
    /// Where the outer packet ends: the inner one must not reach beyond.
    end: usize,
}

#[inline(always)]
fn open_inner<N: Network, B: Bytes + ?Sized>(frame: &B, found: &Found, inner_v6: bool, outer_class: u8) -> Result<Opened, Outcome> {
    // UDP to any port comes here, and most of it is no tunnel: contradictions are not yet worth the word "malformed".
    let doubt = |_| if matches!(found.kind, Kind::Gue) { Outcome::NotTunnelled } else { Outcome::Malformed };
    let inner: IpHeader<N::Address> = N::parse(frame, found.offset).map_err(doubt)?;
    if inner.offset + inner.length > found.end {
        return Err(doubt(Reason::Malformed));
    }
    Ok(Opened {
        kind: found.kind,
        port: found.port,
        offset: found.offset,
        inner_v6,
        destination: key(&inner.destination),
        inner_class: N::carriage(frame, found.offset).ok_or(Outcome::Malformed)?.traffic_class,
        outer_class,
    })
}

/// The protocol inside GRE and the length of the header.
#[inline(always)]
fn gre<B: Bytes + ?Sized>(frame: &B, offset: usize) -> Result<(u8, usize), Outcome> {
    let header: GreHeader = frame.read(offset).ok_or(Outcome::Malformed)?;
    let length = match u16::from_be(header.flags) {
        0 => 4,
        GRE_CHECKSUM => 8,
        _ => return Err(Outcome::NotTunnelled),
    };
    match u16::from_be(header.ethertype) {
        V4::ETHERTYPE => Ok((protocol::IPIP, length)),
        V6::ETHERTYPE => Ok((protocol::IPV6, length)),
        _ => Err(Outcome::NotTunnelled),
    }
}

/// The protocol inside GUE and the length of the header.
#[inline(always)]
fn gue<B: Bytes + ?Sized>(frame: &B, offset: usize) -> Result<(u8, usize), Outcome> {
    let header: GueHeader = frame.read(offset).ok_or(Outcome::NotTunnelled)?;
    match (header.version_length, header.protocol, header.flags) {
        (0, protocol::IPIP | protocol::IPV6, 0) => Ok((header.protocol, 4)),
        // Version 1: the first bits are those of the IP header itself.
        (0x40..=0x4f, ..) => Ok((protocol::IPIP, 0)),
        (0x60..=0x6f, ..) => Ok((protocol::IPV6, 0)),
        _ => Err(Outcome::NotTunnelled),
    }
}

/// The ECN bits of a packet that leaves a tunnel (RFC 6040, section 4.2), or nothing if it has to be dropped: the tunnel
/// was congested, and a sender that does not know ECN can be told only by loss.
#[inline(always)]
#[must_use]
pub const fn congestion(outer: u8, inner: u8) -> Option<u8> {
    const NOT_CAPABLE: u8 = 0;
    const CAPABLE_1: u8 = 1;
    const CAPABLE_0: u8 = 2;
    const CONGESTED: u8 = 3;
    match (outer & 3, inner & 3) {
        (CONGESTED, NOT_CAPABLE) => None,
        (_, NOT_CAPABLE) => Some(NOT_CAPABLE),
        (CONGESTED, _) => Some(CONGESTED),
        (CAPABLE_1, CAPABLE_0) => Some(CAPABLE_1),
        (_, same) => Some(same),
    }
}

plain! { Accepts = 8, GreHeader = 4, GueHeader = 4 }

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use crate::packet::ethernet;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    const VIP4: [u8; 4] = [10, 0, 0, 200];
    const VIP6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0];

    fn v4(protocol: u8, destination: [u8; 4], class: u8, payload: &[u8]) -> Vec<u8> {
        let length = (20 + payload.len()) as u16;
        let mut packet = vec![0x45, class, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0, 192, 0, 2, 1];
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        packet.extend(destination);
        packet.extend(payload);
        packet
    }

    fn v6(next: u8, destination: [u8; 16], class: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60 | class >> 4, class << 4, 0, 0];
        packet.extend((payload.len() as u16).to_be_bytes());
        packet.extend([next, 64]);
        packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        packet.extend(destination);
        packet.extend(payload);
        packet
    }

    fn inner(v6_inside: bool) -> Vec<u8> {
        if v6_inside { v6(17, VIP6, 2, &[0; 12]) } else { v4(17, VIP4, 2, &[0; 12]) }
    }

    fn wrapped(kind: Kind, v6_inside: bool) -> (u8, Vec<u8>) {
        let inside = inner(v6_inside);
        let protocol = if v6_inside { protocol::IPV6 } else { protocol::IPIP };
        let ethertype = if v6_inside { ethernet::IPV6 } else { ethernet::IPV4 };
        match kind {
            Kind::Ipip => (protocol, inside),
            Kind::Gre => (protocol::GRE, [&[0, 0], &ethertype.to_be_bytes()[..], &inside].concat()),
            Kind::Gue => {
                let length = (12 + inside.len()) as u16;
                let udp = [[0x30, 0x39], 5555_u16.to_be_bytes(), length.to_be_bytes(), [0, 0]].concat();
                (protocol::UDP, [&udp[..], &[0, protocol, 0, 0], &inside].concat())
            }
        }
    }

    fn outer(v6_outside: bool, protocol: u8, payload: &[u8]) -> (Link, Vec<u8>) {
        let (ethertype, packet) = if v6_outside {
            (ethernet::IPV6, v6(protocol, [1; 16], 3, payload))
        } else {
            (ethernet::IPV4, v4(protocol, [10, 0, 0, 5], 3, payload))
        };
        let frame = [&[0; ethernet::HEADER][..], &packet].concat();
        (Link { ethertype, payload: ethernet::HEADER, vlan: 0 }, frame)
    }

    fn vip(v6_inside: bool) -> Ipv6 {
        let bytes: [u8; 16] =
            if v6_inside { VIP6 } else { [&[0; 10][..], &[0xff, 0xff], &VIP4].concat().try_into().expect("16 bytes") };
        core::array::from_fn(|word| u32::from_ne_bytes(core::array::from_fn(|byte| bytes[word * 4 + byte])))
    }

    #[test]
    fn every_tunnel_opens_in_all_family_combinations() {
        for kind in [Kind::Ipip, Kind::Gre, Kind::Gue] {
            for (v6_outside, v6_inside) in [(false, false), (false, true), (true, false), (true, true)] {
                let (protocol, payload) = wrapped(kind, v6_inside);
                let (link, frame) = outer(v6_outside, protocol, &payload);
                let opened = open(&frame[..], &link).expect("a tunnel");
                assert_eq!(frame[opened.offset..], inner(v6_inside), "{kind:?} {v6_outside} {v6_inside}");
                assert_eq!(opened.kind, kind);
                assert_eq!(opened.port, if kind == Kind::Gue { 5555_u16.to_be() } else { 0 });
                assert_eq!(opened.inner_v6, v6_inside);
                assert_eq!(opened.destination, vip(v6_inside));
                assert_eq!((opened.outer_class, opened.inner_class), (3, 2));
            }
        }
    }

    #[test]
    fn gre_with_a_checksum_opens_and_with_a_key_does_not() {
        let inside = inner(false);
        let (link, frame) = outer(false, protocol::GRE, &[&[0x80, 0, 8, 0, 1, 2, 0, 0], &inside[..]].concat());
        assert_eq!(frame[open(&frame[..], &link).expect("a tunnel").offset..], inside);
        let (link, frame) = outer(false, protocol::GRE, &[&[0x20, 0, 8, 0, 1, 2, 0, 0], &inside[..]].concat());
        assert_eq!(open(&frame[..], &link), Err(Outcome::NotTunnelled));
    }

    #[test]
    fn gue_version_1_is_no_header() {
        let inside = inner(true);
        let udp = [0x30, 0x39, 0x15, 0xb3, 0, (8 + inside.len()) as u8, 0, 0];
        let (link, frame) = outer(true, protocol::UDP, &[&udp[..], &inside].concat());
        let opened = open(&frame[..], &link).expect("a tunnel");
        assert_eq!(frame[opened.offset..], inside);
    }

    #[test]
    fn fragments_and_contradictions_stay() {
        let (protocol, payload) = wrapped(Kind::Ipip, false);
        let (link, mut frame) = outer(false, protocol, &payload);
        frame[ethernet::HEADER + 6] = 0x20;
        assert_eq!(open(&frame[..], &link), Err(Outcome::Fragment));
        frame[ethernet::HEADER + 6] = 0;
        let inner_length = ethernet::HEADER + 20 + 3;
        frame[inner_length] += 1;
        assert_eq!(open(&frame[..], &link), Err(Outcome::Malformed), "the inner packet is longer than the outer one");
        frame[inner_length] -= 1;
        assert_eq!(open(&frame[..frame.len() - 1], &link), Err(Outcome::Malformed));
        let (link, frame) = outer(false, protocol::TCP, &payload);
        assert_eq!(open(&frame[..], &link), Err(Outcome::NotTunnelled));
    }

    #[test]
    fn an_address_accepts_only_its_tunnels() {
        let (protocol, payload) = wrapped(Kind::Gue, false);
        let (link, frame) = outer(false, protocol, &payload);
        let opened = open(&frame[..], &link).expect("a tunnel");
        let port = 5555_u16.to_be();
        assert!(Accepts { kinds: Kind::Gue as u32, port, reserved: 0 }.allows(&opened));
        assert!(!Accepts { kinds: Kind::Gue as u32, port: 53, reserved: 0 }.allows(&opened));
        assert!(!Accepts { kinds: Kind::Ipip as u32 | Kind::Gre as u32, port, reserved: 0 }.allows(&opened));
    }

    /// RFC 6040, figure 4: rows are the inner packet's bits, columns the outer's, both in the order Not-ECT, ECT(0), ECT(1), CE.
    #[test]
    fn congestion_is_the_table_of_rfc_6040() {
        let order = [0, 2, 1, 3];
        let table = [
            [Some(0), Some(0), Some(0), None],
            [Some(2), Some(2), Some(1), Some(3)],
            [Some(1), Some(1), Some(1), Some(3)],
            [Some(3), Some(3), Some(3), Some(3)],
        ];
        for (inner, row) in order.iter().zip(table) {
            for (outer, expected) in order.iter().zip(row) {
                assert_eq!(congestion(0xa0 | outer, 0x50 | inner), expected, "outer {outer}, inner {inner}");
            }
        }
    }

    #[test]
    fn outcomes_are_numbered_by_position() {
        for (position, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(*outcome as usize, position);
        }
    }

    proptest! {
        #[test]
        fn a_packet_that_was_found_lies_inside_the_frame(
            kind in prop::sample::select(vec![Kind::Ipip, Kind::Gre, Kind::Gue]),
            v6_inside: bool,
            v6_outside: bool,
            changes in prop::collection::vec((14_usize..110, any::<u8>()), 0..4),
            cut in 0_usize..40,
        ) {
            let (protocol, payload) = wrapped(kind, v6_inside);
            let (link, mut frame) = outer(v6_outside, protocol, &payload);
            for (at, byte) in changes {
                if let Some(place) = frame.get_mut(at) {
                    *place = byte;
                }
            }
            frame.truncate(frame.len() - cut);
            if let Ok(opened) = open(&frame[..], &link) {
                let rest = &frame[opened.offset..];
                let (version, shortest) = if opened.inner_v6 { (6, 40) } else { (4, 20) };
                prop_assert!(rest.len() >= shortest);
                prop_assert_eq!(rest[0] >> 4, version);
                prop_assert!(opened.offset >= link.payload + 20);
            }
        }
    }
}
