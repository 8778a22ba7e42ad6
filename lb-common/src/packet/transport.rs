//! TCP, UDP and SCTP, as far as balancing needs them: ports, and what moves the connection's state.

use super::{Bytes, protocol};
use crate::{reason::Reason, sctp, tcp::flags, wire::plain};

/// The ports, which TCP, UDP and SCTP have in the same place: source, then destination, each in network order. One word,
/// because a key that is written by halves and read by words stalls the processor's store buffer.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(transparent)]
pub struct Ports(u32);

impl Ports {
    /// Two ports in network order.
    #[inline(always)]
    pub const fn new(source: u16, destination: u16) -> Self {
        let [a, b] = source.to_ne_bytes();
        let [c, d] = destination.to_ne_bytes();
        Self(u32::from_ne_bytes([a, b, c, d]))
    }

    /// The source port, in network order.
    #[inline(always)]
    pub const fn source(self) -> u16 {
        let [a, b, _, _] = self.0.to_ne_bytes();
        u16::from_ne_bytes([a, b])
    }

    /// The destination port, in network order.
    #[inline(always)]
    pub const fn destination(self) -> u16 {
        let [_, _, c, d] = self.0.to_ne_bytes();
        u16::from_ne_bytes([c, d])
    }

    /// Both in one word, as they stand in memory.
    #[inline(always)]
    pub const fn word(self) -> u32 {
        self.0
    }

    /// What a checksum over both ports has to gain when others take their place (RFC 1624): not folded.
    #[inline(always)]
    pub const fn difference(self, new: Self) -> u64 {
        (!self.0) as u64 + new.0 as u64
    }

    /// The bits in which two pairs of ports differ, as they stand in memory.
    #[inline(always)]
    pub const fn changed(self, new: Self) -> u32 {
        self.0 ^ new.0
    }

    #[must_use]
    /// These ports, with `other` in the place of each that is 0.
    #[inline(always)]
    pub const fn or(self, other: Self) -> Self {
        let source = if self.source() == 0 { other.source() } else { self.source() };
        let destination = if self.destination() == 0 { other.destination() } else { self.destination() };
        Self::new(source, destination)
    }

    #[must_use]
    /// The same ports, seen from the other side.
    #[inline(always)]
    pub const fn reversed(self) -> Self {
        Self(self.0.rotate_left(16))
    }
}

/// A TCP header without options; every field in network order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct TcpHeader {
    /// The ports.
    pub ports: Ports,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// Length of the header in words (high four bits).
    pub length: u8,
    /// Bits of [`crate::tcp::flags`].
    pub flags: u8,
    /// Receive window.
    pub window: u16,
    /// Checksum.
    pub checksum: u16,
    /// Urgent pointer.
    pub urgent: u16,
}

impl TcpHeader {
    /// Where the checksum stands.
    pub const CHECKSUM: usize = 16;
}

impl UdpHeader {
    /// Where the checksum stands.
    pub const CHECKSUM: usize = 6;
}

impl SctpHeader {
    /// Where the checksum stands.
    pub const CHECKSUM: usize = 8;
}

/// A UDP header; every field in network order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct UdpHeader {
    /// The ports.
    pub ports: Ports,
    /// Length of header and data.
    pub length: u16,
    /// Checksum, or 0 for none.
    pub checksum: u16,
}

/// An SCTP header and the beginning of its first chunk; every field in network order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct SctpHeader {
    /// The ports.
    pub ports: Ports,
    /// Verification tag.
    pub tag: u32,
    /// Checksum (CRC-32C).
    pub checksum: u32,
    /// Type of the first chunk.
    pub chunk: u8,
    /// Flags of the first chunk.
    pub chunk_flags: u8,
    /// Length of the first chunk.
    pub chunk_length: u16,
}

/// The ports of a packet, and its event for the protocol's state machine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    /// Source and destination port.
    pub ports: Ports,
    /// TCP: the flags; SCTP: the type of the first chunk; UDP: [`QUIET`].
    pub event: u8,
}

/// The event of a packet that can neither begin nor end anything: of every UDP datagram, and of a TCP segment that carries
/// none of the flags that could.
pub const QUIET: u8 = flags::ACK;

/// Whether a packet with this event can neither begin nor end anything: a bare TCP acknowledgement (with or without data), any
/// UDP datagram. SCTP's events are other numbers; its connections are never left alone.
#[inline(always)]
pub const fn is_quiet(event: u8) -> bool {
    event & (flags::FIN | flags::SYN | flags::RST | flags::ACK) == QUIET
}

/// Reads the transport header, which must lie before `end`, the end of the IP packet: what stands behind is padding. Any
/// protocol but the three is not ours.
#[inline(always)]
pub fn parse<B: Bytes + ?Sized>(bytes: &B, offset: usize, protocol: u8, end: usize) -> Result<Segment, Reason> {
    let room = end.saturating_sub(offset);
    match protocol {
        protocol::TCP if room < size_of::<TcpHeader>() => Err(Reason::Malformed),
        protocol::UDP if room < size_of::<UdpHeader>() => Err(Reason::Malformed),
        protocol::SCTP if room < size_of::<SctpHeader>() => Err(Reason::Malformed),
        protocol::TCP => {
            let header: TcpHeader = bytes.read(offset).ok_or(Reason::Malformed)?;
            Ok(Segment { ports: header.ports, event: header.flags })
        }
        protocol::UDP => {
            let header: UdpHeader = bytes.read(offset).ok_or(Reason::Malformed)?;
            Ok(Segment { ports: header.ports, event: QUIET })
        }
        protocol::SCTP => {
            let header: SctpHeader = bytes.read(offset).ok_or(Reason::Malformed)?;
            Ok(Segment { ports: header.ports, event: sctp_event(bytes, offset, &header) })
        }
        _ => Err(Reason::NotTransport),
    }
}

/// The chunk that counts: the first, but an abort behind a cookie wins.
#[inline(always)]
fn sctp_event<B: Bytes + ?Sized>(bytes: &B, offset: usize, header: &SctpHeader) -> u8 {
    if matches!(header.chunk, sctp::chunk::COOKIE_ECHO | sctp::chunk::COOKIE_ACK) {
        // The mask also bounds the offset for the verifier, far beyond any cookie.
        let length = (u16::from_be(header.chunk_length) as usize + 3) & 0x3ffc;
        // Type and flags: the verifier follows no single-byte read behind a variable offset.
        if let Some([sctp::chunk::ABORT, _]) = bytes.read::<[u8; 2]>(offset + 12 + length) {
            return sctp::chunk::ABORT;
        }
    }
    header.chunk
}

plain! { Ports = 4, TcpHeader = 20, UdpHeader = 8, SctpHeader = 16 }
