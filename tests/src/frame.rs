//! Frames, byte by byte, with right checksums.
//!
//! A [`Frame`] says what is special about it and is right in everything else:
//!
//! ```
//! use bpfvs_tests::frame::{Frame, SYN, check, ip};
//!
//! let syn = Frame::tcp("10.9.0.2:1000".parse()?, "10.99.0.1:80".parse()?, SYN);
//! assert_eq!(syn.build().len(), 14 + 20 + 20);
//! let odd = Frame { ttl: 1, vlans: vec![7, 8], options: 8, ..syn }.build();
//! assert_eq!(ip(&odd)?.len(), 20 + 8 + 20);
//! check(ip(&odd)?)?;
//! # anyhow::Ok(())
//! ```
//!
//! [`check`] is the other direction: whether all checksums of a packet that came out are right. Parsing is left to the eye:
//! tests compare bytes.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use lb_common::checksum::{finish, fold, sum};

/// TCP: no more data.
pub const FIN: u8 = 1;
/// TCP: the beginning.
pub const SYN: u8 = 2;
/// TCP: the end at once.
pub const RST: u8 = 4;
/// TCP: the acknowledgement counts.
pub const ACK: u8 = 16;

/// SCTP: the chunk that begins an association.
pub const INIT: u8 = 1;
/// SCTP: data.
pub const DATA: u8 = 0;

/// Protocol numbers.
mod protocol {
    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const ICMP: u8 = 1;
    pub(super) const IPIP: u8 = 4;
    pub(super) const TCP: u8 = 6;
    pub(super) const UDP: u8 = 17;
    pub(super) const IPV6: u8 = 41;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const ICMPV6: u8 = 58;
    pub(super) const DESTINATION_OPTIONS: u8 = 60;
    pub(super) const SCTP: u8 = 132;
}

/// Where frames come from.
pub const SOURCE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// Where they go: all zeros is the address of `lo`, by which frames come in in a test run, so the kernel takes them for its own.
pub const DESTINATION_MAC: [u8; 6] = [0; 6];

/// An IPv6 extension header of eight bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "the names are IPv6's own")]
pub enum Extension {
    HopByHop,
    DestinationOptions,
}

/// What a packet carries.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Transport {
    /// TCP with these flags.
    Tcp {
        /// Bits of the flags byte.
        flags: u8,
    },
    /// TCP, as a part of a conversation.
    Segment {
        /// Bits of the flags byte.
        flags: u8,
        /// The number of its first byte.
        sequence: u32,
        /// The number of the next byte that is expected.
        acknowledgement: u32,
        /// Options, a multiple of four bytes, at most 40.
        options: Vec<u8>,
    },
    /// UDP.
    Udp,
    /// SCTP with one chunk of this type.
    Sctp {
        /// The type of the first chunk.
        chunk: u8,
    },
    /// ICMP of either version, by the family.
    Icmp {
        /// The type.
        kind: u8,
        /// The code.
        code: u8,
        /// The four bytes after the checksum: for errors an MTU, for echoes identifier and number.
        rest: u32,
    },
    /// Anything else: the payload follows the IP header.
    Raw {
        /// The IP protocol.
        protocol: u8,
    },
}

/// A frame to build.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Frame {
    /// Address and port of the sender; the port counts where the transport has one.
    pub source: SocketAddr,
    /// Address and port of the receiver.
    pub destination: SocketAddr,
    /// VLAN identifiers, the outermost first. Two tags are 802.1ad and 802.1Q.
    pub vlans: Vec<u16>,
    /// Time to live or hop limit.
    pub ttl: u8,
    /// Type of service or traffic class, with the ECN bits.
    pub traffic_class: u8,
    /// IPv4: the packet must not be fragmented.
    pub dont_fragment: bool,
    /// Identification, where the header has one.
    pub id: u16,
    /// IPv4: bytes of options (no-operations), a multiple of four, at most 40.
    pub options: usize,
    /// IPv6: extension headers.
    pub extensions: Vec<Extension>,
    /// What the packet carries.
    pub transport: Transport,
    /// What the transport carries.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame of this transport, with nothing special.
    pub fn new(source: SocketAddr, destination: SocketAddr, transport: Transport) -> Self {
        Self {
            source,
            destination,
            vlans: Vec::new(),
            ttl: 64,
            traffic_class: 0,
            dont_fragment: true,
            id: 0x1234,
            options: 0,
            extensions: Vec::new(),
            transport,
            payload: Vec::new(),
        }
    }

    /// A TCP segment without data.
    pub fn tcp(source: SocketAddr, destination: SocketAddr, flags: u8) -> Self {
        Self::new(source, destination, Transport::Tcp { flags })
    }

    /// A UDP datagram with two bytes.
    pub fn udp(source: SocketAddr, destination: SocketAddr) -> Self {
        Self { payload: b"hi".to_vec(), ..Self::new(source, destination, Transport::Udp) }
    }

    /// An SCTP packet with one chunk.
    pub fn sctp(source: SocketAddr, destination: SocketAddr, chunk: u8) -> Self {
        Self::new(source, destination, Transport::Sctp { chunk })
    }

    /// An ICMP error that quotes a packet.
    pub fn error(source: IpAddr, destination: IpAddr, kind: u8, code: u8, rest: u32, quoted: &[u8]) -> Self {
        let transport = Transport::Icmp { kind, code, rest };
        Self { payload: quoted.to_vec(), ..Self::new((source, 0).into(), (destination, 0).into(), transport) }
    }

    /// The frame.
    pub fn build(&self) -> Vec<u8> {
        let segment = self.segment();
        self.ethernet(&self.packet_with(&segment, None))
    }

    /// The packet without the Ethernet header.
    pub fn packet(&self) -> Vec<u8> {
        self.packet_with(&self.segment(), None)
    }

    /// The packet in two fragments, the first with so many bytes (a multiple of eight) behind the IP header.
    ///
    /// # Panics
    /// If there are not so many bytes.
    pub fn fragments(&self, first: usize) -> [Vec<u8>; 2] {
        assert!(first.is_multiple_of(8), "a fragment's length is a multiple of eight");
        let segment = self.segment();
        let (head, tail) = segment.split_at(first);
        [(head, 0, true), (tail, first, false)].map(|(part, offset, more)| {
            let packet = self.packet_with(part, Some((offset as u16, more)));
            self.ethernet(&packet)
        })
    }

    fn ethernet(&self, packet: &[u8]) -> Vec<u8> {
        let ethertype: u16 = if self.destination.is_ipv4() { 0x0800 } else { 0x86dd };
        let mut frame = [DESTINATION_MAC, SOURCE_MAC].concat();
        for (position, vlan) in self.vlans.iter().enumerate() {
            let outer = position + 1 < self.vlans.len();
            frame.extend(if outer { 0x88a8_u16 } else { 0x8100 }.to_be_bytes());
            frame.extend(vlan.to_be_bytes());
        }
        frame.extend(ethertype.to_be_bytes());
        frame.extend(packet);
        frame
    }

    /// The IP protocol of the transport.
    fn protocol(&self) -> u8 {
        match self.transport {
            Transport::Tcp { .. } | Transport::Segment { .. } => protocol::TCP,
            Transport::Udp => protocol::UDP,
            Transport::Sctp { .. } => protocol::SCTP,
            Transport::Icmp { .. } if self.destination.is_ipv4() => protocol::ICMP,
            Transport::Icmp { .. } => protocol::ICMPV6,
            Transport::Raw { protocol } => protocol,
        }
    }

    /// Transport header and payload.
    fn segment(&self) -> Vec<u8> {
        let ports = [self.source.port().to_be_bytes(), self.destination.port().to_be_bytes()].concat();
        let (mut segment, checksum_at) = match &self.transport {
            Transport::Tcp { flags } => {
                let header = [&ports[..], &1000_u32.to_be_bytes(), &[0; 4], &[0x50, *flags, 0xff, 0xff], &[0; 4]].concat();
                (header, Some(16))
            }
            Transport::Segment { flags, sequence, acknowledgement, options } => {
                let numbers = [sequence.to_be_bytes(), acknowledgement.to_be_bytes()].concat();
                let length = ((20 + options.len()) / 4) as u8;
                ([&ports[..], &numbers, &[length << 4, *flags, 0xff, 0xff], &[0; 4], options].concat(), Some(16))
            }
            Transport::Udp => {
                let length = (8 + self.payload.len()) as u16;
                ([&ports[..], &length.to_be_bytes(), &[0; 2]].concat(), Some(6))
            }
            Transport::Sctp { chunk } => {
                let length = (4 + self.payload.len()) as u16;
                let [high, low] = length.to_be_bytes();
                ([&ports[..], &[0, 0, 0, 1], &[0; 4], &[*chunk, 0, high, low]].concat(), None)
            }
            Transport::Icmp { kind, code, rest } => ([&[*kind, *code, 0, 0], &rest.to_be_bytes()[..]].concat(), Some(2)),
            Transport::Raw { .. } => (Vec::new(), None),
        };
        segment.extend(&self.payload);
        if let Some(at) = checksum_at {
            let value = match finish(self.pseudo_sum(segment.len()) + sum(&segment)) {
                0 if self.transport == Transport::Udp => 0xffff,
                value => value,
            };
            segment[at..at + 2].copy_from_slice(&value.to_ne_bytes());
        }
        if matches!(self.transport, Transport::Sctp { .. }) {
            segment.resize(segment.len().next_multiple_of(4), 0);
            let checksum = crc32c(&segment);
            segment[8..12].copy_from_slice(&checksum.to_le_bytes());
        }
        segment
    }

    /// The sum over the pseudo-header; ICMP over IPv4 has none.
    fn pseudo_sum(&self, length: usize) -> u64 {
        if self.protocol() == protocol::ICMP {
            return 0;
        }
        pseudo_sum(&bytes_of(self.source.ip()), &bytes_of(self.destination.ip()), self.protocol(), length)
    }

    fn packet_with(&self, segment: &[u8], fragment: Option<(u16, bool)>) -> Vec<u8> {
        let mut packet = if self.destination.is_ipv4() {
            let length = (20 + self.options + segment.len()) as u16;
            let word = match fragment {
                Some((offset, more)) => (u16::from(more) << 13) | (offset / 8),
                None => u16::from(self.dont_fragment) << 14,
            };
            let mut header = vec![0x40 | ((20 + self.options) / 4) as u8, self.traffic_class];
            header.extend([length, self.id, word].map(u16::to_be_bytes).concat());
            header.extend([self.ttl, self.protocol(), 0, 0]);
            header.extend(bytes_of(self.source.ip()));
            header.extend(bytes_of(self.destination.ip()));
            header.extend(vec![1; self.options]);
            let checksum = finish(sum(&header));
            header[10..12].copy_from_slice(&checksum.to_ne_bytes());
            header
        } else {
            let mut kinds: Vec<u8> = self.extensions.iter().map(|extension| extension.number()).collect();
            kinds.extend(fragment.map(|_| protocol::FRAGMENT));
            kinds.push(self.protocol());
            let mut extensions = Vec::new();
            for pair in kinds.windows(2) {
                let [this, next] = [pair[0], pair[1]];
                match fragment {
                    Some((offset, more)) if this == protocol::FRAGMENT => {
                        extensions.extend([next, 0]);
                        extensions.extend((offset | u16::from(more)).to_be_bytes());
                        extensions.extend(u32::from(self.id).to_be_bytes());
                    }
                    // Padding of six bytes: PadN with four.
                    _ => extensions.extend([next, 0, 1, 4, 0, 0, 0, 0]),
                }
            }
            let mut header = (6_u32 << 28 | u32::from(self.traffic_class) << 20).to_be_bytes().to_vec();
            header.extend(((extensions.len() + segment.len()) as u16).to_be_bytes());
            header.extend([kinds[0], self.ttl]);
            header.extend(bytes_of(self.source.ip()));
            header.extend(bytes_of(self.destination.ip()));
            header.extend(extensions);
            header
        };
        packet.extend(segment);
        packet
    }
}

impl Extension {
    const fn number(self) -> u8 {
        match self {
            Self::HopByHop => protocol::HOP_BY_HOP,
            Self::DestinationOptions => protocol::DESTINATION_OPTIONS,
        }
    }
}

fn bytes_of(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn pseudo_sum(source: &[u8], destination: &[u8], protocol: u8, length: usize) -> u64 {
    sum(source) + sum(destination) + sum(&[0, protocol]) + sum(&(length as u32).to_be_bytes())
}

/// The checksum of SCTP (RFC 9260, appendix A), bit by bit.
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

/// A frame around a packet: what a recording of packets needs to be sent.
pub fn around(packet: &[u8]) -> Vec<u8> {
    let ethertype: u16 = if packet.first().is_some_and(|first| first >> 4 == 6) { 0x86dd } else { 0x0800 };
    [&DESTINATION_MAC[..], &SOURCE_MAC, &ethertype.to_be_bytes(), packet].concat()
}

/// The packet in a frame: what stands behind the Ethernet header and its VLAN tags.
pub fn ip(frame: &[u8]) -> Result<&[u8]> {
    let mut at = 12;
    loop {
        let ethertype = frame.get(at..at + 2).with_context(|| format!("a frame of {} bytes ends in its header", frame.len()))?;
        match u16::from_be_bytes([ethertype[0], ethertype[1]]) {
            0x8100 | 0x88a8 => at += 4,
            0x0800 | 0x86dd => return Ok(&frame[at + 2..]),
            other => bail!("ethertype {other:#06x} is no IP"),
        }
    }
}

/// Checks a packet as [`check`] does, and that it is the one that is wanted.
pub fn same(got: &[u8], wanted: &[u8]) -> Result<()> {
    check(got)?;
    ensure!(got == wanted, "the packet is another:\n  got    {got:02x?}\n  wanted {wanted:02x?}");
    Ok(())
}

/// Checks lengths and checksums of a packet, and of the packet in it if it is a tunnel's.
///
/// A packet is as long as its header says: what follows is complained about, too. Fragments and extension headers are
/// looked at no further.
pub fn check(packet: &[u8]) -> Result<()> {
    match packet.first().map(|first| first >> 4) {
        Some(4) => {
            let header = usize::from(packet[0] & 15) * 4;
            ensure!(header >= 20 && packet.len() >= header, "a packet of {} bytes ends in its header", packet.len());
            let length = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
            ensure!(length == packet.len(), "the IPv4 header says {length} bytes, there are {}", packet.len());
            ensure!(fold(sum(&packet[..header])) == 0xffff, "the checksum of the IPv4 header is wrong");
            if u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0 {
                return Ok(());
            }
            check_transport(packet[9], &packet[12..16], &packet[16..20], &packet[header..])
        }
        Some(6) => {
            ensure!(packet.len() >= 40, "a packet of {} bytes ends in its header", packet.len());
            let length = 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]]));
            ensure!(length == packet.len(), "the IPv6 header says {length} bytes, there are {}", packet.len());
            check_transport(packet[6], &packet[8..24], &packet[24..40], &packet[40..])
        }
        _ => bail!("this is no IP packet: {packet:02x?}"),
    }
}

fn check_transport(protocol: u8, source: &[u8], destination: &[u8], segment: &[u8]) -> Result<()> {
    let pseudo = pseudo_sum(source, destination, protocol, segment.len());
    match protocol {
        protocol::IPIP | protocol::IPV6 => return check(segment).context("in the packet inside"),
        protocol::UDP if segment.get(6..8) == Some(&[0, 0]) => {}
        protocol::TCP | protocol::UDP | protocol::ICMPV6 => {
            ensure!(fold(pseudo + sum(segment)) == 0xffff, "the checksum of protocol {protocol} is wrong");
        }
        protocol::ICMP => ensure!(fold(sum(segment)) == 0xffff, "the checksum of ICMP is wrong"),
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).filter_map(|digit| char::from_digit(digit.into(), 16)).collect()
    }

    fn ends(family: u8) -> (SocketAddr, SocketAddr) {
        let text = if family == 4 { ["10.9.0.2:1000", "10.99.0.1:80"] } else { ["[fd09::2]:1000", "[fd99::1]:80"] };
        let [client, vip] = text.map(|address| address.parse().expect("the address is well-formed"));
        (client, vip)
    }

    #[test]
    fn equals_what_was_recorded_from_a_real_kernel() {
        // The first packets of nat-tcp4 and nat-udp6 in ipvs-vectors.json.
        let (client, vip) = ends(4);
        let syn = Frame { traffic_class: 0xb9, ..Frame::tcp(client, vip, SYN) };
        assert_eq!(hex(&syn.packet()), "45b9002812344000400613750a0900020a63000103e80050000003e8000000005002ffff93540000");
        let (client, vip) = ends(6);
        let addresses = "fd090000000000000000000000000002fd990000000000000000000000000001";
        assert_eq!(hex(&Frame::udp(client, vip).packet()), format!("60000000000a1140{addresses}03e80050000a98926869"));
    }

    #[test]
    fn passes_its_own_check() {
        for family in [4, 6] {
            let (client, vip) = ends(family);
            for transport in [
                Transport::Tcp { flags: ACK },
                Transport::Udp,
                Transport::Icmp { kind: 3, code: 4, rest: 1300 },
                Transport::Raw { protocol: 50 },
            ] {
                let plain = Frame { payload: vec![7; 33], ..Frame::new(client, vip, transport) };
                check(ip(&plain.build()).unwrap()).unwrap();
                let special = Frame { options: 12, vlans: vec![5, 6], traffic_class: 3, ..plain };
                check(ip(&special.build()).unwrap()).unwrap();
            }
        }
    }

    #[test]
    fn a_wrong_checksum_is_seen() {
        let (client, vip) = ends(4);
        let mut packet = Frame::tcp(client, vip, SYN).packet();
        packet[25] ^= 1;
        check(&packet).unwrap_err();
    }

    #[test]
    fn sctp_has_its_own_checksum() {
        // RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn fragments_share_the_packet() {
        for family in [4, 6] {
            let (client, vip) = ends(family);
            let whole = Frame { payload: vec![9; 100], extensions: vec![Extension::HopByHop], ..Frame::udp(client, vip) };
            let [first, second] = whole.fragments(48);
            let headers = if family == 4 { 20 } else { 40 + 8 + 8 };
            assert_eq!(ip(&first).unwrap().len(), headers + 48);
            assert_eq!(ip(&second).unwrap().len(), headers + 60);
        }
    }
}
