//! Telling a real server behind FULLNAT who its client is: [`lb_common::toa`].
//!
//! Every segment of the client names it, from the one that completes the handshake to the first that the server answers
//! ([`reply`]). Until then a connection is not settled, so the common packet never comes here. The option is inserted in front of all others,
//! so that a forged one is never the first; a segment that has no room for it is dropped, because it could complete the handshake with a
//! forged one alone.
//!
//! Packets that are to be cut into segments (GSO, at tc) go without: the option would stand in each, and they would be too long.
//! The segment that completes the handshake has no data with nearly all clients, and carries the option then.
//!
//! So that full-sized segments have room for the option, the client is told a smaller segment size ([`lower_segment_size`]).

use aya_ebpf::cty::c_void;
use lb_common::{
    Plain as Wire,
    connection::ConnectionKey,
    family::Address,
    packet::{
        Bytes, Fragment, Ipv4Header, Network, V4, ethernet, protocol,
        transport::{self, TcpHeader},
    },
    reason::Reason,
    tcp,
    toa::{self, KIND},
};
use lb_ebpf::packet::{Checksum, Packet, REACH, fixed, merged};

use crate::{account, forward, maps::Family, outcome::Outcome};

/// Where the number of the next expected byte stands in the TCP header.
const ACKNOWLEDGEMENT: usize = 8;
/// The word of the TCP header with its length and the flags, and where its options begin.
const LENGTH_FLAGS: usize = 12;
const OPTIONS: usize = size_of::<TcpHeader>();
/// The words of the longest TCP header.
const LONGEST_HEADER: usize = 15;

/// Tells a real server who the client of a segment is. The segment is still to be translated, says the outcome, if nothing is in
/// the way.
#[inline(never)]
pub fn request<P: Packet, F: Family>(context: *mut c_void) -> Outcome {
    deliver::<P, F>(context).unwrap_or_else(Outcome::left::<P>)
}

#[inline(always)]
fn deliver<P: Packet, F: Family>(context: *mut c_void) -> Result<Outcome, Reason> {
    // SAFETY: the context is the kernel's own.
    let packet = &mut unsafe { P::view(context) };
    let link = ethernet::parse(packet)?;
    let header = F::parse(packet, link.payload)?;
    let payload = merged(packet, &F::transport(packet, &header)?);
    if payload.protocol != protocol::TCP || payload.fragment != Fragment::Whole {
        return Err(Reason::Unnamed);
    }
    let ports = transport::parse(packet, payload.offset, payload.protocol, header.offset + header.length)?.ports;
    let key = ConnectionKey { client: header.source, vip: header.destination, ports, protocol: protocol::TCP.into() };
    // SAFETY: an element of the map; it may become another connection's under our hands, but it stays memory.
    let leg = unsafe { (*F::connections().find(&key).ok_or(Reason::NoConnection)?).leg() };
    let mtu = match forward::reachable(packet, leg) {
        Ok(server) => server.mtu(),
        Err(why) => {
            if matches!(why, Reason::LocalServer | Reason::NoRoute) {
                account::packet(leg.server(), header.length);
            }
            return Ok(Outcome::refused::<P, F>(why, 0, &link, header.length));
        }
    };
    account::packet(leg.server(), header.length);
    let room = if packet.is_segmented() { 0 } else { toa::length::<F::Address>() as u16 };
    let too_big =
        header.length + room as usize > mtu as usize && !packet.fits_in_segments(forward::SEGMENT_HEADERS + F::HEADER, mtu);
    let aged = F::age(packet, header.offset);
    if let Err(why) = aged.and(if too_big { Err(Reason::TooBig) } else { Ok(()) }) {
        return Ok(Outcome::refused::<P, F>(why, mtu - room, &link, header.length));
    }
    if room != 0 {
        insert::<P, F>(context, header.offset as u32, payload.offset as u32, header.length as u32, ports.source())?;
    } else if names_somebody::<P>(context, payload.offset as u32) {
        return Err(Reason::Unnamed);
    }
    Ok(Outcome::translate::<F>(leg))
}

/// Whether a segment has such an option already. In a function of its own, so that its many ways meet again for the verifier.
#[inline(never)]
fn names_somebody<P: Packet>(context: *mut c_void, transport: u32) -> bool {
    // SAFETY: the context is the kernel's own.
    let packet = &unsafe { P::view(context) };
    Header::of(packet, transport as usize & REACH).is_ok_and(|header| toa::find(&header).is_some())
}

/// Inserts the option into a segment.
#[inline(never)]
fn insert<P: Packet, F: Family>(context: *mut c_void, header: u32, transport: u32, length: u32, port: u16) -> Result<(), Reason> {
    // SAFETY: the context is the kernel's own.
    let packet = &mut unsafe { P::view(context) };
    let (header, transport) = (header as usize & 0x1f, transport as usize & REACH);
    let client: F::Address = packet.read(fixed(header + F::ADDRESSES)).ok_or(Reason::Malformed)?;
    let room = toa::length::<F::Address>();
    let words = room / 4;
    let old: u16 = packet.read(fixed(transport + LENGTH_FLAGS)).ok_or(Reason::Malformed)?;
    // The length stands in the upper half of the first byte.
    if usize::from(u16::from_be(old) >> 12) + words > LONGEST_HEADER {
        return Err(Reason::Unnamed);
    }
    packet.insert(transport + OPTIONS, room)?;
    let new = (u16::from_be(old) + ((words as u16) << 12)).to_be();
    packet.write(fixed(transport + LENGTH_FLAGS), new)?;
    let kind = u16::from_ne_bytes([KIND, room as u8]);
    let option = transport + OPTIONS;
    packet.write(fixed(option), kind)?;
    packet.write(fixed(option + 2), port)?;
    packet.write(fixed(option + 4), client)?;
    lengthen::<P, F>(packet, header, room as u16)?;
    // The pseudo-header has the length of the segment.
    let before = (header + length as usize).wrapping_sub(transport) as u16;
    let pseudo_header = difference(before.to_be(), before.wrapping_add(room as u16).to_be());
    let content = difference(old, new) + u64::from(kind) + u64::from(port) + client.sum();
    packet.correct(transport + TcpHeader::CHECKSUM, pseudo_header, content, Checksum::Tcp, None)
}

/// Corrects the length in an IP header, and its checksum, if it has one.
#[inline(always)]
fn lengthen<P: Packet, F: Family>(packet: &mut P, header: usize, room: u16) -> Result<(), Reason> {
    let is_v4 = F::HEADER == <V4 as Network>::HEADER;
    let at = fixed(header + if is_v4 { 2 } else { 4 });
    let old: u16 = packet.read(at).ok_or(Reason::Malformed)?;
    let new = u16::from_be(old).wrapping_add(room).to_be();
    packet.write(at, new)?;
    if is_v4 {
        let at = fixed(header + Ipv4Header::CHECKSUM);
        let checksum: u16 = packet.read(at).ok_or(Reason::Malformed)?;
        packet.write(at, lb_common::checksum::update(checksum, old, new))?;
    }
    Ok(())
}

/// Looks at a segment of a real server, which ends at `end`: whether it proves that the server has been told who the client is.
///
/// A server whose connection is complete sends data, or the end, or acknowledges more than its SYN did, which `acknowledged`
/// remembers. Before that, it may repeat that acknowledgement, if the client sends something unexpected: this proves nothing.
#[inline(never)]
pub fn reply<P: Packet, F: Family>(context: *mut c_void, transport: u32, end: u32, acknowledged: *mut u16) -> Result<bool, Reason> {
    // SAFETY: the context is the kernel's own.
    let packet = &mut unsafe { P::view(context) };
    let transport = transport as usize & REACH;
    let word: u16 = packet.read(fixed(transport + LENGTH_FLAGS)).ok_or(Reason::Malformed)?;
    let number: u32 = packet.read(fixed(transport + ACKNOWLEDGEMENT)).ok_or(Reason::Malformed)?;
    let (word, number) = (u16::from_be(word), u32::from_be(number) as u16);
    let (words, event) = (usize::from(word >> 12), word as u8);
    if event & tcp::flags::SYN == 0 {
        let has_data = end as usize > transport + words * 4;
        // SAFETY: a field of an element of the map.
        let more = number != unsafe { *acknowledged };
        return Ok(event & tcp::flags::RST == 0 && (has_data || more || event & tcp::flags::FIN != 0));
    }
    // SAFETY: a field of an element of the map.
    unsafe { *acknowledged = number };
    if words > OPTIONS / 4 {
        lower_segment_size::<P, F>(packet, transport)?;
    }
    Ok(false)
}

/// Lowers the segment size in a SYN of the real server, so that the client's segments have room for the option. The size has to be
/// the first option, where all systems put it.
#[inline(always)]
fn lower_segment_size<P: Packet, F: Family>(packet: &mut P, transport: usize) -> Result<(), Reason> {
    const SIZE: u32 = 2 << 24 | 4 << 16;
    let at = fixed(transport + OPTIONS);
    let old: u32 = packet.read(at).ok_or(Reason::Malformed)?;
    let (kind, size) = (u32::from_be(old) & 0xffff_0000, u32::from_be(old) & 0xffff);
    let room = toa::length::<F::Address>() as u32;
    if kind != SIZE || size <= room {
        return Ok(());
    }
    let new = (kind | (size - room)).to_be();
    packet.write(at, new)?;
    packet.correct(transport + TcpHeader::CHECKSUM, 0, u64::from(!old) + u64::from(new), Checksum::Tcp, None)
}

/// What a checksum has to gain when one word takes the place of another.
#[inline(always)]
fn difference(old: u16, new: u16) -> u64 {
    u64::from(!old) + u64::from(new)
}

/// A TCP header within a packet.
struct Header<'a, P> {
    packet: &'a P,
    at: usize,
    length: usize,
}

impl<'a, P: Packet> Header<'a, P> {
    #[inline(always)]
    fn of(packet: &'a P, at: usize) -> Result<Self, Reason> {
        let word: u16 = packet.read(fixed(at + LENGTH_FLAGS)).ok_or(Reason::Malformed)?;
        Ok(Self { packet, at, length: usize::from(u16::from_be(word) >> 12) * 4 })
    }
}

impl<P: Packet> Bytes for Header<'_, P> {
    #[inline(always)]
    fn read<T: Wire>(&self, offset: usize) -> Option<T> {
        if offset + size_of::<T>() > self.length { None } else { self.packet.read(fixed(self.at + offset)) }
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.length
    }
}
