//! Headers, and how a frame is taken apart.
//!
//! Parsing is written over the trait [`Bytes`], which the datapath implements for frames in the kernel (each read is a
//! bounds check that the verifier understands) and this crate for byte slices on the host, so that what runs in the
//! kernel is what the fuzzer sees. Nothing is copied but the fields that are asked for.
//!
//! The steps are those of the datapath, so that a foreign packet leaves as early as it can:
//! [`ethernet::parse`], then [`Network::parse`], then (after the filter) [`Network::transport`] and [`transport::parse`].
//! [`Network::plain`] is a short cut through the middle two for the packets that are nearly all.

pub mod ethernet;
pub mod icmp;
mod ipv4;
mod ipv6;
pub mod mapped;
pub mod transport;
pub mod tunnel;

use crate::{Plain as Wire, connection::ConnectionKey, family::Address, reason::Reason, wire};
pub use ipv4::{DONT_FRAGMENT, Ipv4Header, V4};
pub use ipv6::{FragmentHeader, Ipv6Header, V6};
use transport::{Ports, TcpHeader, UdpHeader};

/// IP protocol numbers.
pub mod protocol {
    #![expect(missing_docs, reason = "the names are IANA's")]
    pub const ICMP: u8 = 1;
    pub const IPIP: u8 = 4;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const IPV6: u8 = 41;
    pub const GRE: u8 = 47;
    pub const ICMPV6: u8 = 58;
    pub const SCTP: u8 = 132;
}

/// Something that headers can be read from.
pub trait Bytes {
    /// Reads a value at an offset, or nothing if it would reach beyond the end.
    fn read<T: Wire>(&self, offset: usize) -> Option<T>;

    /// Bytes from the beginning to the end.
    fn len(&self) -> usize;

    /// The same value, as one that the kernel's verifier knows nothing about: without it, the verifier follows every way
    /// that could have led to the value on its own, hundreds of thousands of steps for IPv6's extension headers.
    #[inline(always)]
    fn opaque(&self, value: usize) -> usize {
        value
    }

    /// Whether there is no byte at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Bytes for [u8] {
    #[expect(unsafe_code, reason = "the host's counterpart of the datapath's pointer read")]
    fn read<T: Wire>(&self, offset: usize) -> Option<T> {
        let bytes = self.get(offset..)?.get(..size_of::<T>())?;
        // SAFETY: `bytes` holds size_of::<T>() bytes, and a plain type takes every bit pattern.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    fn len(&self) -> usize {
        self.len()
    }
}

/// An IP header as far as both families have it in common.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct IpHeader<A> {
    /// Source address.
    pub source: A,
    /// Destination address.
    pub destination: A,
    /// Where the header begins.
    pub offset: usize,
    /// Length of the whole packet from the first byte of this header.
    pub length: usize,
}

impl<A> IpHeader<A> {
    /// The same with its addresses where they are.
    #[inline(always)]
    pub const fn as_ref(&self) -> IpHeader<&A> {
        IpHeader { source: &self.source, destination: &self.destination, offset: self.offset, length: self.length }
    }
}

/// What an IP header says of the packet's way. Read only where it is needed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Carriage {
    /// Type of service or traffic class, with the ECN bits.
    pub traffic_class: u8,
    /// Time to live or hop limit.
    pub ttl: u8,
    /// The packet must not be fragmented (always true for IPv6).
    pub dont_fragment: bool,
}

/// Where the transport header is, and whether there is one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Payload {
    /// Where the header begins.
    pub offset: usize,
    /// Its protocol.
    pub protocol: u8,
    /// Identification of the fragmented packet that this is part of.
    pub fragment_id: u32,
    /// Whether this is a part of a packet, and which.
    pub fragment: Fragment,
}

/// A plain packet, which nearly all are: see [`Network::plain`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Plain<A> {
    /// Source, destination, ports and protocol, which is TCP or UDP: the key of the connection that it belongs to.
    pub key: ConnectionKey<A>,
    /// Length of the whole packet from the first byte of the IP header.
    pub length: usize,
    /// As [`transport::Segment::event`].
    pub event: u8,
}

/// The two headers of a plain packet, to be read together: one check of the bounds. A UDP datagram that is too short for
/// that is not plain.
#[derive(Clone, Copy)]
#[repr(C)]
struct Headers<I> {
    ip: I,
    transport: TcpHeader,
}

wire::plain! { Headers<Ipv4Header> = 40, Headers<Ipv6Header> = 60 }

/// The event of a plain packet with an IP header of `before` bytes, or nothing if it is too short or not of TCP or UDP.
#[inline(always)]
const fn event(length: usize, before: usize, protocol: u8, transport: &TcpHeader) -> Option<u8> {
    let (least, event) = match protocol {
        protocol::TCP => (size_of::<TcpHeader>(), transport.flags),
        protocol::UDP => (size_of::<UdpHeader>(), transport::QUIET),
        _ => return None,
    };
    if length < before + least { None } else { Some(event) }
}

/// The last eight bytes of a [`ConnectionKey`].
#[inline(always)]
fn ports_protocol(ports: Ports, protocol: u8) -> u64 {
    wire::cast([ports.word(), u32::from(protocol)])
}

/// Which part of a packet this is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fragment {
    /// All of it.
    Whole,
    /// The first part: the transport header is here.
    First,
    /// A later part: it has no transport header.
    Later,
}

/// An IP version, as the parser and the datapath see it.
pub trait Network: 'static {
    /// The type of an address.
    type Address: Address;
    /// The Ethernet type, in host order.
    const ETHERTYPE: u16;
    /// The address family, as the kernel's helpers want it.
    const AF: u8;
    /// Bytes of the header without options and extensions.
    const HEADER: usize;
    /// Where the two addresses stand in the header.
    const ADDRESSES: usize;
    /// The protocol of this version's ICMP.
    const ICMP: u8;
    /// The protocol number of this version inside a tunnel.
    const TUNNELLED: u8;
    /// The most bytes that an ICMP error of this version may have, IP header included.
    const ICMP_ERROR_MAX: usize;

    /// Reads and checks the IP header at `offset`.
    fn parse<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Result<IpHeader<Self::Address>, Reason>;

    /// Reads how the packet whose header begins at `offset` wants to be carried.
    fn carriage<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Option<Carriage>;

    /// Reads the protocol that the IP header at `offset` names: that of an extension header, if there is one.
    fn protocol<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Option<u8>;

    /// Reads a plain packet: sound, nothing between the IP header at `offset` and the transport header, not a fragment, TCP
    /// or UDP. `None` for all others, which [`Network::parse`] and [`Network::transport`] look at closely.
    fn plain<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Option<Plain<Self::Address>>;

    /// Finds the transport header behind options or extension headers.
    fn transport<B: Bytes + ?Sized>(bytes: &B, header: &IpHeader<Self::Address>) -> Result<Payload, Reason>;

    /// Reads addresses and payload of the header that an ICMP error quotes: it may be cut off.
    fn quoted<B: Bytes + ?Sized>(bytes: &B, offset: usize) -> Option<(Self::Address, Self::Address, Payload)>;

    /// Whether this ICMP type reports an error about a packet that it quotes.
    fn is_error(icmp_type: u8) -> bool;
}
