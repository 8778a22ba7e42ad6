//! Fuzzing: frames from a generator that knows what must become of them, the same frames damaged, and plain noise.
//!
//! The generator builds frames with a library of its own kind and states the verdict from what it put in, not from the bytes,
//! so that parser and model are checked by something that shares no code with them.

use std::{net::IpAddr, vec, vec::Vec};

use etherparse::{
    EtherType, Icmpv4Type, Icmpv6Type, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, PacketBuilder, VlanId, icmpv4, icmpv6,
};
use proptest::prelude::*;

use super::{Model, Verdict, VirtualService};
use crate::{
    connection::ConnectionKey,
    packet::{Bytes, Fragment, Network, Payload, Plain, V4, V6, ethernet, protocol, transport},
    reason::Reason,
    sctp, tcp,
};

const VIP_4: [u8; 4] = [10, 99, 0, 1];
const VIP_6: [u8; 16] = [0xfd, 0x99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const OTHER_4: [u8; 4] = [10, 99, 0, 2];
const OTHER_6: [u8; 16] = [0xfd, 0x99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
const CLIENT_4: [u8; 4] = [10, 9, 0, 2];
const CLIENT_6: [u8; 16] = [0xfd, 0x09, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
const PORT: u16 = 80;
const MTU: u16 = 1400;

/// One service for each protocol and family, on the same port.
fn model() -> Model {
    let protocols = [protocol::TCP, protocol::UDP, protocol::SCTP];
    let vips: [IpAddr; 2] = [VIP_4.into(), VIP_6.into()];
    let service = |vip| protocols.map(|protocol| VirtualService { protocol, vip, port: PORT, mtu: MTU });
    Model { services: vips.into_iter().flat_map(service).collect(), settings: 0 }
}

/// What is in the packet behind the IP header.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Content {
    Tcp(u8),
    Udp,
    Sctp(u8),
    Echo,
    /// An ICMP error that quotes a TCP packet.
    Error,
    Gre,
}

/// What a frame is made of.
#[derive(Clone, Debug)]
struct Recipe {
    tags: usize,
    ipv6: bool,
    to_vip: bool,
    /// Of IPv4: bytes of IP options, in words; of IPv6: whether there are extension headers.
    options: usize,
    ttl: u8,
    source_port: u16,
    port: u16,
    content: Content,
    payload: usize,
}

fn recipe() -> impl Strategy<Value = Recipe> {
    let content = prop_oneof![
        4 => (0..64_u8).prop_map(Content::Tcp),
        2 => Just(Content::Tcp(tcp::flags::SYN)),
        2 => Just(Content::Udp),
        2 => prop_oneof![Just(sctp::chunk::INIT), 0..16_u8].prop_map(Content::Sctp),
        1 => Just(Content::Echo),
        1 => Just(Content::Error),
        1 => Just(Content::Gre),
    ];
    let often = |usual: u16, other: u16| prop_oneof![4 => Just(usual), 1 => Just(other)];
    (
        (0..3_usize, any::<bool>(), prop::bool::weighted(0.9), 0..11_usize),
        prop_oneof![4 => Just(64_u8), 1 => 0..4_u8],
        (often(40_000, 20), often(PORT, 81)),
        content,
        prop_oneof![4 => 0..100_usize, 1 => 1300..1500_usize],
    )
        .prop_map(|((tags, ipv6, to_vip, options), ttl, (source_port, port), content, payload)| Recipe {
            tags,
            ipv6,
            to_vip,
            options,
            ttl,
            source_port,
            port,
            content,
            payload,
        })
}

impl Recipe {
    /// The transport header, and what follows it; with the protocol.
    fn transport(&self) -> (u8, Vec<u8>) {
        let mut bytes = Vec::new();
        bytes.extend(self.source_port.to_be_bytes());
        bytes.extend(self.port.to_be_bytes());
        let number = match self.content {
            Content::Tcp(flags) => {
                bytes.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
                protocol::TCP
            }
            Content::Udp => {
                bytes.extend((self.payload as u16 + 8).to_be_bytes());
                bytes.extend([0, 0]);
                protocol::UDP
            }
            Content::Sctp(chunk) => {
                bytes.extend([0, 0, 0, 1, 0, 0, 0, 0, chunk, 0, 0, 4]);
                protocol::SCTP
            }
            Content::Echo | Content::Error | Content::Gre => return self.other(),
        };
        bytes.extend(vec![0; self.payload]);
        (number, bytes)
    }

    /// What is neither TCP, UDP nor SCTP.
    fn other(&self) -> (u8, Vec<u8>) {
        let body = vec![0; self.payload];
        let echo = etherparse::IcmpEchoHeader { id: 1, seq: 1 };
        let v4 = |kind, body| (protocol::ICMP, [etherparse::Icmpv4Header::new(kind).to_bytes().as_slice(), body].concat());
        let v6 = |kind, body| (protocol::ICMPV6, [etherparse::Icmpv6Header::new(kind).to_bytes().as_slice(), body].concat());
        match (self.content, self.ipv6) {
            (Content::Echo, false) => v4(Icmpv4Type::EchoRequest(echo), &body),
            (Content::Echo, true) => v6(Icmpv6Type::EchoRequest(echo), &body),
            (Content::Error, false) => {
                let error = Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port);
                v4(error, &quoted(PacketBuilder::ipv4(VIP_4, CLIENT_4, 60)))
            }
            (Content::Error, true) => {
                let error = Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port);
                v6(error, &quoted(PacketBuilder::ipv6(VIP_6, CLIENT_6, 60)))
            }
            _ => (protocol::GRE, body),
        }
    }

    /// The IP header with options or extensions.
    fn network(&self, number: u8, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.ipv6 {
            // Two extension headers of eight and sixteen bytes.
            let extensions: &[u8] = match self.options {
                0..5 => &[],
                _ => &[60, 0, 1, 4, 0, 0, 0, 0, number, 1, 1, 4, 0, 0, 0, 0, 1, 6, 0, 0, 0, 0, 0, 0],
            };
            let header = Ipv6Header {
                traffic_class: 0,
                flow_label: Ipv6FlowLabel::ZERO,
                payload_length: (extensions.len() + length) as u16,
                next_header: IpNumber(if extensions.is_empty() { number } else { 0 }),
                hop_limit: self.ttl,
                source: CLIENT_6,
                destination: if self.to_vip { VIP_6 } else { OTHER_6 },
            };
            bytes.extend(header.to_bytes());
            bytes.extend(extensions);
        } else {
            let destination = if self.to_vip { VIP_4 } else { OTHER_4 };
            let mut header = Ipv4Header::new(0, self.ttl, IpNumber(number), CLIENT_4, destination).expect("nothing is too long");
            header.options = vec![1; 4 * self.options].as_slice().try_into().expect("ten words of options are allowed");
            header.set_payload_len(length).expect("the payload is short");
            header.header_checksum = header.calc_header_checksum();
            bytes.extend(header.to_bytes());
        }
        bytes
    }

    fn frame(&self) -> Vec<u8> {
        let (number, transport) = self.transport();
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        let outer = if self.tags == 2 { EtherType::PROVIDER_BRIDGING } else { EtherType::VLAN_TAGGED_FRAME };
        for (tag, ethertype) in [outer, EtherType::VLAN_TAGGED_FRAME].into_iter().take(self.tags).enumerate() {
            frame.extend(ethertype.0.to_be_bytes());
            frame.extend(VlanId::try_new(7 + tag as u16).expect("a small number").value().to_be_bytes());
        }
        frame.extend((if self.ipv6 { EtherType::IPV6 } else { EtherType::IPV4 }).0.to_be_bytes());
        frame.extend(self.network(number, transport.len()));
        frame.extend(transport);
        frame
    }

    /// What must become of the frame.
    fn verdict(&self) -> Verdict {
        let (starts, protocol_position) = match self.content {
            Content::Tcp(flags) => (flags & (tcp::flags::SYN | tcp::flags::RST) == tcp::flags::SYN, 0),
            Content::Udp => (true, 1),
            Content::Sctp(chunk) => (chunk == sctp::chunk::INIT, 2),
            Content::Echo | Content::Gre if self.to_vip => return Verdict::Passed(Reason::NotTransport),
            Content::Error if self.to_vip => return Verdict::Passed(Reason::NoConnection),
            _ => (false, 0),
        };
        let (number, transport) = self.transport();
        let length = self.network(number, transport.len()).len() + transport.len();
        match () {
            () if !self.to_vip => Verdict::Passed(Reason::NotOurs),
            () if self.port != PORT => Verdict::Passed(Reason::NoService),
            () if !starts || self.source_port == 20 => Verdict::Passed(Reason::NoConnection),
            () if self.ttl <= 1 => Verdict::Answered(Reason::TtlExpired),
            () if length > MTU as usize => Verdict::Answered(Reason::TooBig),
            () => Verdict::Forwarded(if self.ipv6 { 3 } else { 0 } + protocol_position),
        }
    }
}

/// A packet from a virtual address, as an ICMP error quotes it.
fn quoted(builder: etherparse::PacketBuilderStep<etherparse::IpHeaders>) -> Vec<u8> {
    let mut bytes = Vec::new();
    builder.tcp(PORT, 40_000, 1, 1000).write(&mut bytes, &[]).expect("memory does not refuse");
    bytes
}

/// Every function of the parser, at every place where it could be led.
fn parse_everything(bytes: &[u8], offset: usize) {
    fn family<N: Network<Address: core::fmt::Debug>>(bytes: &[u8], offset: usize) {
        let found = N::parse(bytes, offset).and_then(|header| {
            assert!(header.offset + header.length <= bytes.len(), "a packet does not end behind its frame");
            Ok((header, N::transport(bytes, &header)?))
        });
        let segment = |payload: Payload, end| transport::parse(bytes, payload.offset, payload.protocol, end);
        if let Some(Plain { key, length, event }) = N::plain(bytes, offset) {
            let (header, payload) = found.expect("a plain packet is sound");
            assert_eq!((header.offset, payload.fragment), (offset, Fragment::Whole), "a plain packet is whole");
            let segment = segment(payload, header.offset + header.length).expect("and so is its transport header");
            let protocol = payload.protocol.into();
            let slow = ConnectionKey { client: header.source, vip: header.destination, ports: segment.ports, protocol };
            assert_eq!((key, length, event), (slow, header.length, segment.event), "the short cut reads the same");
        }
        if let Ok((_, payload)) = found {
            let _ = segment(payload, bytes.len());
        }
        if let Some((.., payload)) = N::quoted(bytes, offset) {
            let _ = segment(payload, bytes.len());
        }
    }
    family::<V4>(bytes, offset);
    family::<V6>(bytes, offset);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_was_put_in_decides(recipe in recipe()) {
        prop_assert_eq!(model().verdict(&recipe.frame()), recipe.verdict());
    }

    #[test]
    fn damaged_frames_do_no_harm(
        recipe in recipe(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in any::<prop::sample::Index>(),
        cuts in any::<bool>(),
    ) {
        let mut frame = recipe.frame();
        for (position, byte) in damage {
            // Mostly the headers: that is where decisions are made.
            let reach = frame.len().min(96);
            frame[position.index(reach)] ^= byte;
        }
        if cuts {
            frame.truncate(cut.index(frame.len()));
        }
        let verdict = model().verdict(&frame);
        if let Ok(link) = ethernet::parse(frame.as_slice()) {
            parse_everything(&frame, link.payload);
            if let Verdict::Forwarded(service) = verdict {
                let (ttl, destination, vip): (_, _, &[u8]) = match link.ethertype {
                    ethernet::IPV4 => (8, 16..20, &VIP_4),
                    ethernet::IPV6 => (7, 24..40, &VIP_6),
                    other => return Err(TestCaseError::fail(std::format!("type {other:#x} was forwarded"))),
                };
                let packet = &frame[link.payload..];
                prop_assert!(packet[ttl] > 1);
                prop_assert_eq!(&packet[destination], vip);
                prop_assert_eq!(service >= 3, link.ethertype == ethernet::IPV6);
            }
        }
    }

    #[test]
    fn a_frame_that_is_cut_off_is_never_forwarded(recipe in recipe(), missing in any::<prop::sample::Index>()) {
        let frame = recipe.frame();
        let verdict = model().verdict(&frame[..missing.index(frame.len())]);
        prop_assert!(matches!(verdict, Verdict::Passed(Reason::Malformed)), "{verdict:?}");
    }

    #[test]
    fn noise_does_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300), offset in 0..320_usize) {
        let _ = model().verdict(&bytes);
        parse_everything(&bytes, offset);
        let _ = bytes.as_slice().read::<u64>(usize::MAX);
    }
}

#[test]
fn parts_of_packets() {
    let recipe = Recipe {
        tags: 0,
        ipv6: false,
        to_vip: true,
        options: 0,
        ttl: 64,
        source_port: 40_000,
        port: PORT,
        content: Content::Udp,
        payload: 64,
    };
    let mut frame = recipe.frame();
    let fragment = ethernet::HEADER + 6;
    frame[fragment..fragment + 2].copy_from_slice(&[0x20, 0]);
    assert_eq!(model().verdict(&frame), Verdict::Forwarded(1), "the first part has the ports");
    frame[fragment..fragment + 2].copy_from_slice(&[0x20, 1]);
    assert_eq!(model().verdict(&frame), Verdict::Passed(Reason::FragmentUnknown));
}

#[test]
fn sloppy_services_begin_anywhere_but_at_an_end() {
    let recipe = |content| Recipe {
        tags: 0,
        ipv6: true,
        to_vip: true,
        options: 0,
        ttl: 64,
        source_port: 40_000,
        port: PORT,
        content,
        payload: 0,
    };
    let mut sloppy = model();
    sloppy.settings = crate::config::flags::SLOPPY_TCP | crate::config::flags::SLOPPY_SCTP;
    let verdict = |content| sloppy.verdict(&recipe(content).frame());
    assert_eq!(verdict(Content::Tcp(tcp::flags::ACK)), Verdict::Forwarded(3));
    assert_eq!(verdict(Content::Tcp(tcp::flags::RST)), Verdict::Passed(Reason::NoConnection));
    assert_eq!(verdict(Content::Sctp(sctp::chunk::DATA)), Verdict::Forwarded(5));
    assert_eq!(verdict(Content::Sctp(sctp::chunk::ABORT)), Verdict::Passed(Reason::NoConnection));
}
