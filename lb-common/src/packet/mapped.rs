//! IPv4 packets as IPv6 ones, and back (RFC 7915): what lies between a client of IPv6 and a real server that has IPv4 only.
//!
//! IPv4 addresses are told in IPv6 as sockets tell them, mapped:
//!
//! ```text
//! 10.0.0.230:7311 -> 10.0.0.5:80     IPv4, 20 bytes of header
//! ::ffff:10.0.0.230 -> ::ffff:10.0.0.5, ports and payload the same     IPv6, 40 bytes of header
//! ```
//!
//! What is put before an address to map it adds 0xffff to a checksum, which is nothing in one's complement. So transport
//! checksums are right before and after, and only the header is another. ICMP errors have other types and codes, too, and the
//! packet that they quote gets another header ([`IcmpHeader::as_ipv6`]).
//!
//! Not here: fragments, options and extension headers. A packet that has any is not told in the other version.

use super::{DONT_FRAGMENT, Ipv4Header, Ipv6Header, icmp::IcmpHeader, protocol};
use crate::{
    checksum,
    connection::ConnectionKey,
    family::{Address as _, Ipv4, Ipv6},
};

/// Bytes that the header of IPv6 has more.
pub const DIFFERENCE: usize = size_of::<Ipv6Header>() - size_of::<Ipv4Header>();

/// The least that every link of IPv6 takes (RFC 8200, 5).
const LEAST_MTU: u32 = 1280;

/// The third word of a mapped address; the first two are zero.
const THIRD: u32 = 0xffff_u32.to_be();

/// An address of IPv4 in IPv6.
#[inline(always)]
pub const fn map(address: Ipv4) -> Ipv6 {
    [0, 0, THIRD, address]
}

/// Whether an address of IPv6 stands for one of IPv4.
#[inline(always)]
pub const fn is_mapped(address: &Ipv6) -> bool {
    address[0] | address[1] | (address[2] ^ THIRD) == 0
}

/// Between whom, in IPv6.
#[inline(always)]
pub const fn map_key(key: &ConnectionKey<Ipv4>) -> ConnectionKey<Ipv6> {
    ConnectionKey { client: map(key.client), vip: map(key.vip), ports: key.ports, protocol: key.protocol }
}

impl Ipv4Header {
    /// The same header in IPv6. Nothing if it has options, or is that of a fragment.
    #[inline(always)]
    pub const fn as_ipv6(&self) -> Option<Ipv6Header> {
        let length = u16::from_be(self.length);
        if self.version_length != 0x45 || self.fragment & !DONT_FRAGMENT.to_be() != 0 || (length as usize) < size_of::<Self>() {
            return None;
        }
        Some(Ipv6Header {
            version_class_flow: (6 << 28 | (self.tos as u32) << 20).to_be(),
            payload_length: (length - size_of::<Self>() as u16).to_be(),
            next_header: if self.protocol == protocol::ICMP { protocol::ICMPV6 } else { self.protocol },
            hop_limit: self.ttl,
            source: map(self.source),
            destination: map(self.destination),
        })
    }
}

impl Ipv6Header {
    /// The same header in IPv4, if its addresses are mapped. Nothing if it has extensions, of which a fragment has one.
    #[inline(always)]
    pub fn as_ipv4(&self) -> Option<Ipv4Header> {
        let protocol = match self.next_header {
            known @ (protocol::TCP | protocol::UDP | protocol::SCTP) => known,
            protocol::ICMPV6 => protocol::ICMP,
            _ => return None,
        };
        let length = u16::from_be(self.payload_length).checked_add(size_of::<Ipv4Header>() as u16)?;
        Some(
            Ipv4Header {
                version_length: 0x45,
                tos: (u32::from_be(self.version_class_flow) >> 20) as u8,
                length: length.to_be(),
                id: 0,
                fragment: DONT_FRAGMENT.to_be(),
                ttl: self.hop_limit,
                protocol,
                checksum: 0,
                source: self.source[3],
                destination: self.destination[3],
            }
            .finished(),
        )
    }

    /// The same header of a packet that has so many bytes more.
    #[inline(always)]
    #[must_use]
    pub const fn longer(self, bytes: u16) -> Self {
        Self { payload_length: u16::from_be(self.payload_length).wrapping_add(bytes).to_be(), ..self }
    }

    /// The sum of its words.
    #[inline(always)]
    #[must_use]
    pub fn sum(&self) -> u64 {
        u64::from(self.version_class_flow)
            + u64::from(self.payload_length)
            + u64::from(u16::from_ne_bytes([self.next_header, self.hop_limit]))
            + self.source.sum()
            + self.destination.sum()
    }

    /// The sum of the pseudo-header, with which the checksum of a payload begins. There are no extensions.
    #[inline(always)]
    #[must_use]
    pub fn pseudo_sum(&self) -> u64 {
        let protocol = u16::from(self.next_header).to_be();
        self.source.sum() + self.destination.sum() + u64::from(self.payload_length) + u64::from(protocol)
    }
}

impl Ipv4Header {
    /// The same header of a packet that has so many bytes less.
    #[inline(always)]
    #[must_use]
    pub fn shorter(self, bytes: u16) -> Self {
        Self { length: u16::from_be(self.length).wrapping_sub(bytes).to_be(), ..self }.finished()
    }

    /// The sum of its words, which is nothing if its checksum is right.
    #[inline(always)]
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.others() + u64::from(self.checksum)
    }

    /// The same header with the right checksum.
    #[inline(always)]
    fn finished(self) -> Self {
        Self { checksum: checksum::finish(self.others()), ..self }
    }

    /// The sum of all words but the checksum.
    #[inline(always)]
    fn others(&self) -> u64 {
        u64::from(u16::from_ne_bytes([self.version_length, self.tos]))
            + u64::from(self.length)
            + u64::from(self.id)
            + u64::from(self.fragment)
            + u64::from(u16::from_ne_bytes([self.ttl, self.protocol]))
            + self.source.sum()
            + self.destination.sum()
    }
}

/// What type, code and the rest of an ICMP error's header become.
type Fields = (u8, u8, u32);

impl IcmpHeader {
    /// The error of `ICMPv6` that says the same as this one of ICMP, still without a checksum. Nothing if there is none.
    #[inline(always)]
    pub const fn as_ipv6(&self) -> Option<Self> {
        // Port and protocol unreachable, administratively prohibited, too big; all else is no route.
        let fields: Fields = match (self.kind, self.code) {
            (3, 2) => (4, 1, 6),
            (3, 3) => (1, 4, 0),
            (3, 4) => (2, 0, wider(u32::from_be(self.rest) & 0xffff)),
            (3, 9 | 10 | 13 | 15) => (1, 1, 0),
            (3, 0..=12) => (1, 0, 0),
            (11, 0 | 1) => (3, self.code, 0),
            _ => return None,
        };
        Some(Self::of(fields))
    }

    /// The error of ICMP that says the same as this one of `ICMPv6`, still without a checksum. Nothing if there is none.
    #[inline(always)]
    pub const fn as_ipv4(&self) -> Option<Self> {
        let fields: Fields = match (self.kind, self.code) {
            (1, 0 | 2 | 3) => (3, 1, 0),
            (1, 1) => (3, 10, 0),
            (1, 4) => (3, 3, 0),
            (2, _) => (3, 4, narrower(u32::from_be(self.rest))),
            (3, 0 | 1) => (11, self.code, 0),
            (4, 1) => (3, 2, 0),
            _ => return None,
        };
        Some(Self::of(fields))
    }

    /// The sum of its words but the checksum.
    #[inline(always)]
    #[must_use]
    pub fn sum(&self) -> u64 {
        u64::from(u16::from_ne_bytes([self.kind, self.code])) + u64::from(self.rest)
    }

    /// This header with the checksum that it has in the place of another, whose checksum is known. `before` is the sum of all that
    /// the checksum covered before and does not any more, the old header included; `after` of what it covers anew, besides this header.
    #[inline(always)]
    #[must_use]
    pub fn corrected(self, checksum: u16, before: u64, after: u64) -> Self {
        let gained = u64::from(!checksum::fold(before)) + after + self.sum();
        Self { checksum: checksum::gain(checksum, gained), ..self }
    }

    #[inline(always)]
    const fn of((kind, code, rest): Fields) -> Self {
        Self { kind, code, checksum: 0, rest: rest.to_be() }
    }
}

/// What a packet of IPv6 may have so that it fits as one of IPv4. Very old routers do not tell (0).
#[inline(always)]
const fn wider(mtu: u32) -> u32 {
    let mtu = mtu + DIFFERENCE as u32;
    if mtu < LEAST_MTU { LEAST_MTU } else { mtu }
}

/// The opposite.
#[inline(always)]
const fn narrower(mtu: u32) -> u32 {
    let mtu = mtu.saturating_sub(DIFFERENCE as u32);
    if mtu > 0xffff { 0xffff } else { mtu }
}

#[cfg(test)]
mod tests {
    use std::vec;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        checksum::{fold, sum},
        packet::{Network as _, V6},
    };

    /// A packet without options that is no fragment, as bytes of its header.
    fn header(tos: u8, length: u16, ttl: u8, protocol: u8, source: u32, destination: u32) -> Ipv4Header {
        let header = Ipv4Header {
            version_length: 0x45,
            tos,
            length: length.to_be(),
            id: 0,
            fragment: DONT_FRAGMENT.to_be(),
            ttl,
            protocol,
            checksum: 0,
            source,
            destination,
        };
        header.finished()
    }

    #[expect(unsafe_code, reason = "a header as it stands in a packet")]
    fn bytes<T: crate::Plain>(header: &T) -> &[u8] {
        // SAFETY: the type is plain.
        unsafe { core::slice::from_raw_parts(core::ptr::from_ref(header).cast(), size_of::<T>()) }
    }

    proptest! {
        #[test]
        fn there_and_back_is_the_same(
            tos: u8, length in 20_u16..1500, ttl: u8, protocol in prop::sample::select(vec![1_u8, 6, 17, 132]), source: u32, destination: u32,
        ) {
            let ipv4 = header(tos, length, ttl, protocol, source, destination);
            prop_assert_eq!(fold(sum(bytes(&ipv4))), 0xffff);
            let ipv6 = ipv4.as_ipv6().expect("it is plain");
            prop_assert!(is_mapped(&ipv6.source) && is_mapped(&ipv6.destination));
            prop_assert_eq!(ipv6.as_ipv4(), Some(ipv4));
            // A transport checksum need not change.
            prop_assert_eq!(fold(ipv6.source.sum() + ipv6.destination.sum() + 1), fold(source.sum() + destination.sum() + 1));
            let mut frame = bytes(&ipv6).to_vec();
            frame.resize(usize::from(length) + DIFFERENCE, 0);
            let parsed = V6::parse(&frame[..], 0).expect("it is a header");
            prop_assert_eq!((parsed.length, frame[7]), (usize::from(length) + DIFFERENCE, ttl));
            let shorter = ipv4.shorter(20);
            prop_assert_eq!(fold(sum(bytes(&shorter))), 0xffff);
        }
    }

    #[test]
    fn what_only_one_version_has_is_refused() {
        let plain = header(0, 60, 64, protocol::UDP, 1, 2);
        assert_eq!(Ipv4Header { version_length: 0x46, ..plain }.as_ipv6(), None, "options");
        assert_eq!(Ipv4Header { fragment: 0x2000_u16.to_be(), ..plain }.as_ipv6(), None, "a first fragment");
        assert_eq!(Ipv4Header { fragment: 7_u16.to_be(), ..plain }.as_ipv6(), None, "a later fragment");
        assert_eq!(Ipv4Header { length: 19_u16.to_be(), ..plain }.as_ipv6(), None, "no header");
        assert!(Ipv4Header { fragment: 0, ..plain }.as_ipv6().is_some(), "it may be fragmented");
        let ipv6 = plain.as_ipv6().expect("it is plain");
        for next_header in [0, 43, 44, 60] {
            assert_eq!(Ipv6Header { next_header, ..ipv6 }.as_ipv4(), None, "extension {next_header}");
        }
        assert_eq!(Ipv6Header { payload_length: 65_530_u16.to_be(), ..ipv6 }.as_ipv4(), None, "it is too long");
    }

    #[test]
    fn errors_say_the_same() {
        let icmp = |kind, code, rest: u32| IcmpHeader { kind, code, checksum: 0, rest: rest.to_be() };
        for (ipv4, ipv6) in [
            ((3, 1, 0), Some((1, 0, 0))),
            ((3, 2, 0), Some((4, 1, 6))),
            ((3, 3, 0), Some((1, 4, 0))),
            ((3, 4, 1400), Some((2, 0, 1420))),
            ((3, 4, 0), Some((2, 0, 1280))),
            ((3, 13, 0), Some((1, 1, 0))),
            ((3, 14, 0), None),
            ((4, 0, 0), None),
            ((11, 0, 0), Some((3, 0, 0))),
            ((12, 0, 0), None),
        ] {
            let (kind, code, rest) = ipv4;
            assert_eq!(icmp(kind, code, rest).as_ipv6(), ipv6.map(|(kind, code, rest)| icmp(kind, code, rest)), "{ipv4:?}");
        }
        for (ipv6, ipv4) in [
            ((1, 0, 0), Some((3, 1, 0))),
            ((1, 1, 0), Some((3, 10, 0))),
            ((1, 4, 0), Some((3, 3, 0))),
            ((1, 5, 0), None),
            ((2, 0, 1400), Some((3, 4, 1380))),
            ((2, 0, 70_000), Some((3, 4, 65_535))),
            ((3, 1, 0), Some((11, 1, 0))),
            ((4, 0, 0), None),
            ((128, 0, 0), None),
        ] {
            let (kind, code, rest) = ipv6;
            assert_eq!(icmp(kind, code, rest).as_ipv4(), ipv4.map(|(kind, code, rest)| icmp(kind, code, rest)), "{ipv6:?}");
        }
    }
}
