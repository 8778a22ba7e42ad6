//! Address translation: an address and a port in a packet give way to others, and the checksums with them.
//!
//! ```text
//! request   client:40000 -> VIP:80         NAT: End::Destination, to RIP:8080
//! reply     RIP:8080 -> client:40000       NAT: End::Source, to VIP:80
//! request   client:40000 -> VIP:80         FULLNAT: both ends, to local:7311 -> RIP:8080
//! ```
//!
//! Checksums change by what the words have gained (RFC 1624), so that one that was wrong stays wrong. SCTP's is corrected
//! from the ports alone ([`crc32c`]). An ICMP error quotes a packet that went the other way, and the quote is translated with it.

use aya_ebpf::{cty::c_void, helpers::generated::bpf_loop};
use lb_common::{
    checksum,
    connection::ConnectionKey,
    crc32c::{self, Correction},
    family::Address,
    local::Local,
    packet::{
        Fragment, Ipv4Header, Network, Payload, V4, ethernet,
        icmp::IcmpHeader,
        protocol,
        transport::{Ports, SctpHeader, TcpHeader, UdpHeader},
    },
    reason::Reason,
    reply,
    server::Server,
};
use lb_ebpf::packet::{Checksum, Packet, REACH, Room, fixed, merged};

use crate::{local, maps::Family};

/// Which end of a packet is translated.
#[derive(Clone, Copy, Eq, PartialEq)]
#[repr(usize)]
pub enum End {
    Source = 0,
    Destination = 1,
}

impl End {
    #[inline(always)]
    const fn of<A>(self, key: &ConnectionKey<A>) -> &A {
        match self {
            Self::Source => &key.client,
            Self::Destination => &key.vip,
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

/// Translates one end of a plain packet, and takes one off its time to live. Everything is where it always is, and what was read
/// of it is at hand.
#[inline(always)]
pub fn translate_plain<P: Packet, F: Family>(
    packet: &mut P,
    key: &ConnectionKey<F::Address>,
    length: usize,
    end: End,
    new: &F::Address,
    new_port: u16,
) -> Result<(), Reason> {
    let ip = ethernet::HEADER;
    let (addresses, old_port) = (end.of(key).difference(new), end.port(key.ports));
    F::age_and_gain(packet, ip, addresses)?;
    packet.write(ip + F::ADDRESSES + end as usize * size_of::<F::Address>(), *new)?;
    packet.write(ip + F::HEADER + 2 * end as usize, new_port)?;
    correct_plain::<P, F>(packet, key, length, addresses, u64::from(!old_port) + u64::from(new_port))
}

/// Translates both ends of a plain packet, and takes one off its time to live.
#[inline(always)]
pub fn translate_plain_both<P: Packet, F: Family>(
    packet: &mut P,
    key: &ConnectionKey<F::Address>,
    length: usize,
    source: &F::Address,
    destination: &F::Address,
    ports: Ports,
) -> Result<(), Reason> {
    let ip = ethernet::HEADER;
    let addresses = key.client.difference(source) + key.vip.difference(destination);
    F::age_and_gain(packet, ip, addresses)?;
    packet.write(ip + F::ADDRESSES, *source)?;
    packet.write(ip + F::ADDRESSES + size_of::<F::Address>(), *destination)?;
    packet.write(ip + F::HEADER, ports)?;
    correct_plain::<P, F>(packet, key, length, addresses, key.ports.difference(ports))
}

/// Corrects the checksum of a plain packet, whose addresses and ports were as `key` says.
#[inline(always)]
fn correct_plain<P: Packet, F: Family>(
    packet: &mut P,
    key: &ConnectionKey<F::Address>,
    length: usize,
    addresses: u64,
    ports: u64,
) -> Result<(), Reason> {
    let ConnectionKey { client, vip, protocol, .. } = key;
    let transport = ethernet::HEADER + F::HEADER;
    let length = (length - F::HEADER) as u16;
    let pseudo_header = client.sum() + vip.sum() + u64::from(length.to_be()) + u64::from((*protocol as u16).to_be());
    let pseudo_header = Some(checksum::fold(pseudo_header));
    if *protocol == u32::from(protocol::TCP) {
        packet.correct(transport + TcpHeader::CHECKSUM, addresses, ports, Checksum::Tcp, pseudo_header)
    } else {
        packet.correct(transport + UdpHeader::CHECKSUM, addresses, ports, Checksum::Udp, pseudo_header)
    }
}

/// What a packet gets for its addresses and ports; a port of 0 stands for the one that it has. Addresses by reference: copies
/// would not fit on the stack.
pub struct Ends<'a, A> {
    pub source: &'a A,
    pub destination: &'a A,
    pub ports: Ports,
}

/// Translates both ends of a packet of any shape, or its destination alone if it `keeps_sender`. In a function of its own, for
/// the sake of the stack: the packet is parsed again.
#[inline(never)]
pub fn translate<P: Packet, F: Family>(context: *mut c_void, new: &Ends<'_, F::Address>, keeps_sender: bool) -> Result<(), Reason> {
    // SAFETY: the context is the kernel's own.
    let packet = &mut unsafe { P::view(context) };
    let link = ethernet::parse(packet)?;
    let header = F::parse(packet, link.payload)?;
    let payload = merged(packet, &F::transport(packet, &header)?);
    if payload.protocol == F::ICMP {
        return translate_error::<P, F>(context, header.offset as u32, payload.offset as u32, new, keeps_sender);
    }
    // What the parser has read of the addresses is read again: it would not fit on the stack until then.
    let mut addresses = replace_address::<P, F>(packet, header.offset, End::Destination, new.destination)?;
    if !keeps_sender {
        addresses += replace_address::<P, F>(packet, header.offset, End::Source, new.source)?;
    }
    let end = header.offset + header.length;
    translate_transport(packet, end, &payload, addresses, new.ports)
}

/// Translates the ports of a TCP, UDP or SCTP packet that ends at `end`, and corrects its checksum, which covers `addresses` that have
/// gained so much; a later fragment has neither.
#[inline(always)]
fn translate_transport<P: Packet>(
    packet: &mut P,
    end: usize,
    payload: &Payload,
    addresses: u64,
    ports: Ports,
) -> Result<(), Reason> {
    if payload.fragment == Fragment::Later {
        return Ok(());
    }
    let at = payload.offset;
    let old: Ports = packet.read(fixed(at)).ok_or(Reason::Malformed)?;
    let new = ports.or(old);
    packet.write(fixed(at), new)?;
    let ports = old.difference(new);
    match payload.protocol {
        protocol::TCP => packet.correct(at + TcpHeader::CHECKSUM, addresses, ports, Checksum::Tcp, None),
        protocol::UDP => packet.correct(at + UdpHeader::CHECKSUM, addresses, ports, Checksum::Udp, None),
        protocol::SCTP if old != new => {
            if payload.fragment != Fragment::Whole {
                return Err(Reason::SctpFragment);
            }
            let length = end.wrapping_sub(at);
            let checksum = fixed(at + SctpHeader::CHECKSUM);
            let value: u32 = packet.read(checksum).ok_or(Reason::Malformed)?;
            packet.write(checksum, corrected(value, old.changed(new), (length as u32).wrapping_sub(4)))
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

/// Translates an ICMP error, whose headers begin at `header` and `icmp`, and the packet that it quotes, which went the other
/// way. If it `keeps_sender`, who reports stays as it is, and so does whom the quoted packet went to.
#[inline(never)]
fn translate_error<P: Packet, F: Family>(
    context: *mut c_void,
    header: u32,
    icmp: u32,
    new: &Ends<'_, F::Address>,
    keeps_sender: bool,
) -> Result<(), Reason> {
    // SAFETY: the context is the kernel's own.
    let packet = &mut unsafe { P::view(context) };
    // The parsers' offsets, in a form that the verifier can bound.
    let (header, icmp) = (header as usize & 0x1f, icmp as usize & REACH);
    let at = icmp + size_of::<IcmpHeader>();
    let (.., payload) = F::quoted(packet, at).ok_or(Reason::Malformed)?;
    let ports = fixed(merged(packet, &payload).offset);
    let old: Ports = packet.read(ports).ok_or(Reason::Malformed)?;
    let new_ports = new.ports.reversed().or(old);
    packet.write(ports, new_ports)?;
    let mut addresses = replace_address::<P, F>(packet, header, End::Destination, new.destination)?;
    addresses += replace_address::<P, F>(packet, at, End::Source, new.destination)?;
    if !keeps_sender {
        addresses += replace_address::<P, F>(packet, header, End::Source, new.source)?;
        addresses += replace_address::<P, F>(packet, at, End::Destination, new.source)?;
    }
    // Over the quoted IPv4 header it changes nothing: that one's own checksum makes up for the address.
    let gained = old.difference(new_ports) + if F::HEADER == V4::HEADER { 0 } else { addresses };
    let at = fixed(icmp + IcmpHeader::CHECKSUM);
    let old: u16 = packet.read(at).ok_or(Reason::Malformed)?;
    packet.write(at, checksum::gain(old, gained))
}

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
        packet.write(at, gain(old.into(), gained) as u16)?;
    }
    Ok(())
}

/// A checksum after a difference. In a function of its own, for the sake of the stack.
#[inline(never)]
fn gain(checksum: u32, gained: u64) -> u32 {
    checksum::gain(checksum as u16, gained).into()
}

/// Translates a plain packet from a client, and takes one off its time to live.
#[inline(always)]
pub fn plain_request<P: Packet, F: Family>(
    packet: &mut P,
    key: &ConnectionKey<F::Address>,
    length: usize,
    server: &Server,
    local: Local,
) -> Result<(), Reason> {
    let port = reply::server_port(server, key.ports.destination());
    let address = F::Address::from_words(&server.address);
    if local.is_some() {
        let source = local::address::<F>(local).ok_or(Reason::Failed)?;
        return translate_plain_both::<P, F>(packet, key, length, &source, &address, Ports::new(local.port(), port));
    }
    translate_plain::<P, F>(packet, key, length, End::Destination, &address, port)
}

/// Translates a packet of any shape from a client, and addresses the frame to the real server's next hop. Its time to live is
/// down by one already.
#[inline(always)]
pub fn request<P: Packet, F: Family>(packet: &mut P, server: &Server, local: Local) -> Result<(), Reason> {
    let destination = F::Address::from_words(&server.address);
    let source = if local.is_some() { local::address::<F>(local).ok_or(Reason::Failed)? } else { destination };
    let ends = Ends { source: &source, destination: &destination, ports: Ports::new(local.port(), server.port) };
    translate::<P, F>(packet.context(), &ends, !local.is_some())?;
    // The kernel may have moved the packet.
    // SAFETY: the context is the kernel's own.
    *packet = unsafe { P::view(packet.context()) };
    let link = ethernet::parse(packet)?;
    packet.address(&link, &server.hop, Room::NONE).map(drop)
}
