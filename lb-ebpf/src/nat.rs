//! Address translation: an address and a port in a packet give way to others, and the checksums with them.
//!
//! ```text
//! request   client:40000 -> VIP:80         End::Destination, to RIP:8080
//! reply     RIP:8080 -> client:40000       End::Source, to VIP:80
//! ```
//!
//! Checksums change by what the words have gained (RFC 1624), so that one that was wrong stays wrong. SCTP's is corrected
//! from the ports alone ([`crc32c`]). An ICMP error quotes a packet that went the other way, and the quote is translated with it.

use aya_ebpf::{cty::c_void, helpers::generated::bpf_loop};
use lb_common::{
    checksum,
    crc32c::{self, Correction},
    family::Address,
    packet::{
        Fragment, IpHeader, Ipv4Header, Network, Payload, Plain, V4,
        ethernet::{self, Link},
        icmp::IcmpHeader,
        protocol,
        transport::{Ports, SctpHeader, TcpHeader, UdpHeader},
    },
    reason::Reason,
    reply,
    server::Server,
};
use lb_ebpf::packet::{Checksum, Packet, REACH, Room, fixed, merged};

use crate::maps::Family;

/// Which end of a packet is translated.
#[derive(Clone, Copy, Eq, PartialEq)]
#[repr(usize)]
pub enum End {
    Source = 0,
    Destination = 1,
}

impl End {
    const fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }

    #[inline(always)]
    const fn of<A: Copy>(self, header: &IpHeader<A>) -> A {
        match self {
            Self::Source => header.source,
            Self::Destination => header.destination,
        }
    }

    #[inline(always)]
    const fn port(self, ports: Ports) -> u16 {
        match self {
            Self::Source => ports.source(),
            Self::Destination => ports.destination(),
        }
    }
}

/// Translates one end of a plain packet, and takes one off its time to live. Everything is where it always is, and what was read of it is at hand.
#[inline(always)]
pub fn translate_plain<P: Packet, F: Family>(
    packet: &mut P,
    plain: &Plain<F::Address>,
    end: End,
    new: &F::Address,
    new_port: u16,
) -> Result<(), Reason> {
    let Plain { header, protocol, segment } = plain;
    let ip = ethernet::HEADER;
    let transport = ip + F::HEADER;
    let (addresses, old_port) = (end.of(header).difference(new), end.port(segment.ports));
    F::age_and_gain(packet, ip, addresses)?;
    packet.write(ip + F::ADDRESSES + end as usize * size_of::<F::Address>(), *new)?;
    packet.write(transport + 2 * end as usize, new_port)?;
    let ports = u64::from(!old_port) + u64::from(new_port);
    let length = (header.length - F::HEADER) as u16;
    let pseudo_header =
        header.source.sum() + header.destination.sum() + u64::from(length.to_be()) + u64::from(u16::from(*protocol).to_be());
    let pseudo_header = Some(checksum::fold(pseudo_header));
    if *protocol == protocol::TCP {
        packet.correct(transport + TcpHeader::CHECKSUM, addresses, ports, Checksum::Tcp, pseudo_header)
    } else {
        packet.correct(transport + UdpHeader::CHECKSUM, addresses, ports, Checksum::Udp, pseudo_header)
    }
}

/// Translates one end of a TCP, UDP or SCTP packet of any shape; a later fragment has no port.
#[inline(always)]
pub fn translate<P: Packet, F: Family>(
    packet: &mut P,
    header: &IpHeader<F::Address>,
    payload: &Payload,
    end: End,
    new: &F::Address,
    new_port: u16,
) -> Result<(), Reason> {
    let addresses = end.of(header).difference(new);
    write_address::<P, F>(packet, header.offset, end, new, addresses)?;
    if payload.fragment == Fragment::Later {
        return Ok(());
    }
    let at = payload.offset;
    let old: Ports = packet.read(fixed(at)).ok_or(Reason::Malformed)?;
    let old_port = end.port(old);
    packet.write(fixed(at + 2 * end as usize), new_port)?;
    let ports = u64::from(!old_port) + u64::from(new_port);
    match payload.protocol {
        protocol::TCP => packet.correct(at + TcpHeader::CHECKSUM, addresses, ports, Checksum::Tcp, None),
        protocol::UDP => packet.correct(at + UdpHeader::CHECKSUM, addresses, ports, Checksum::Udp, None),
        protocol::SCTP if old_port != new_port => {
            if payload.fragment != Fragment::Whole {
                return Err(Reason::SctpFragment);
            }
            let length = (header.offset + header.length).wrapping_sub(at);
            let difference = u32::from(old_port ^ new_port) << (16 * end as u32);
            let checksum = fixed(at + SctpHeader::CHECKSUM);
            let old: u32 = packet.read(checksum).ok_or(Reason::Malformed)?;
            packet.write(checksum, corrected(old, difference, (length as u32).wrapping_sub(4)))
        }
        _ => Ok(()),
    }
}

/// SCTP's checksum after a change of the ports, which `behind` bytes follow.
#[inline(never)]
fn corrected(checksum: u32, difference: u32, behind: u32) -> u32 {
    let mut correction = Correction::new(difference, behind & 0xffff);
    // SAFETY: the callback takes the context that is handed over here.
    unsafe { bpf_loop(crc32c::STEPS, step as *mut c_void, (&raw mut correction).cast(), 0) };
    correction.apply(checksum)
}

unsafe extern "C" fn step(number: u32, correction: *mut Correction) -> i64 {
    // SAFETY: the kernel hands over what `bpf_loop` was given.
    unsafe { (*correction).step(number) };
    0
}

/// Translates one end of an ICMP error, whose headers begin at `header` and `icmp`, and the other end of the packet that it
/// quotes. Which end follows from the port: bit 16 stands for an error to a real server, and then a port of 0 for the quoted one.
#[inline(never)]
pub fn translate_error<P: Packet, F: Family>(
    context: *mut c_void,
    header: u32,
    icmp: u32,
    new: &F::Address,
    new_port: u32,
) -> Result<(), Reason> {
    // SAFETY: the context is the kernel's own.
    let packet = &mut unsafe { P::view(context) };
    // The parsers' offsets, in a form that the verifier can bound.
    let (header, icmp) = (header as usize & 0x1f, icmp as usize & REACH);
    let end = if new_port & TO_SERVER != 0 { End::Destination } else { End::Source };
    let at = icmp + size_of::<IcmpHeader>();
    let (.., payload) = F::quoted(packet, at).ok_or(Reason::Malformed)?;
    let ports = fixed(merged(packet, &payload).offset);
    let old: Ports = packet.read(ports).ok_or(Reason::Malformed)?;
    let old = end.other().port(old);
    let new_port = if new_port as u16 == 0 { old } else { new_port as u16 };
    packet.write(fixed(ports + 2 * end.other() as usize), new_port)?;
    let outer = replace_address::<P, F>(packet, header, end, new)?;
    let inner = replace_address::<P, F>(packet, at, end.other(), new)?;
    let ports = u64::from(!old) + u64::from(new_port);
    // Over the quoted IPv4 header it changes nothing: that one's own checksum makes up for the address.
    let gained = if F::HEADER == V4::HEADER { ports } else { ports + outer + inner };
    let at = fixed(icmp + IcmpHeader::CHECKSUM);
    let old: u16 = packet.read(at).ok_or(Reason::Malformed)?;
    packet.write(at, checksum::gain(old, gained))
}

/// Bit of a port: the packet goes to a real server.
const TO_SERVER: u32 = 1 << 16;

/// Replaces an address in an IP header, and says what the words have gained.
#[inline(always)]
fn replace_address<P: Packet, F: Family>(packet: &mut P, header: usize, end: End, new: &F::Address) -> Result<u64, Reason> {
    let at = fixed(header + F::ADDRESSES + end as usize * size_of::<F::Address>());
    let gained = packet.read::<F::Address>(at).ok_or(Reason::Malformed)?.difference(new);
    write_address::<P, F>(packet, header, end, new, gained)?;
    Ok(gained)
}

/// Writes an address into an IP header, and corrects the header's checksum, if it has one.
#[inline(always)]
fn write_address<P: Packet, F: Family>(
    packet: &mut P,
    header: usize,
    end: End,
    new: &F::Address,
    gained: u64,
) -> Result<(), Reason> {
    packet.write(fixed(header + F::ADDRESSES + end as usize * size_of::<F::Address>()), *new)?;
    if F::HEADER == V4::HEADER {
        let at = fixed(header + Ipv4Header::CHECKSUM);
        let old: u16 = packet.read(at).ok_or(Reason::Malformed)?;
        packet.write(at, checksum::gain(old, gained))?;
    }
    Ok(())
}

/// Translates a plain packet from a client, and takes one off its time to live.
#[inline(always)]
pub fn plain_request<P: Packet, F: Family>(packet: &mut P, plain: &Plain<F::Address>, server: &Server) -> Result<(), Reason> {
    let port = reply::server_port(server, plain.segment.ports.destination());
    translate_plain::<P, F>(packet, plain, End::Destination, &F::Address::from_words(&server.address), port)
}

/// Translates a packet of any shape from a client, and addresses the frame to the real server's next hop. Its time to live is
/// down by one already.
#[inline(always)]
pub fn request<P: Packet, F: Family>(packet: &mut P, server: &Server) -> Result<(), Reason> {
    let link = ethernet::parse(packet)?;
    let header = F::parse(packet, link.payload)?;
    let payload = merged(packet, &F::transport(packet, &header)?);
    if payload.protocol != F::ICMP {
        return to_server::<P, F>(packet, &link, &header, &payload, server);
    }
    let address = F::Address::from_words(&server.address);
    let port = TO_SERVER | u32::from(server.port);
    translate_error::<P, F>(packet.context(), header.offset as u32, payload.offset as u32, &address, port)?;
    packet.address(&link, &server.hop, Room::NONE).map(drop)
}

#[inline(always)]
fn to_server<P: Packet, F: Family>(
    packet: &mut P,
    link: &Link,
    header: &IpHeader<F::Address>,
    payload: &Payload,
    server: &Server,
) -> Result<(), Reason> {
    let virtual_port = match payload.fragment {
        // It has none.
        Fragment::Later => 0,
        Fragment::Whole | Fragment::First => packet.read::<Ports>(payload.offset).ok_or(Reason::Malformed)?.destination(),
    };
    let address = F::Address::from_words(&server.address);
    translate::<P, F>(packet, header, payload, End::Destination, &address, reply::server_port(server, virtual_port))?;
    packet.address(link, &server.hop, Room::NONE).map(drop)
}
