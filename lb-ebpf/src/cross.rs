//! Between IPv6 and IPv4: FULLNAT for clients of IPv6 whose real server has IPv4 only.
//!
//! All but the IP header is done by others, who take it for FULLNAT among addresses of IPv6, some of which are mapped
//! ([`lb_common::packet::mapped`]):
//!
//! ```text
//! request   [2001:db8::9]:40000 -> [2001:db8::80]:80                      the connection is found
//!           [::ffff:10.0.0.230]:7311 -> [::ffff:10.0.0.5]:80              translated (crate::nat)
//!           10.0.0.230:7311 -> 10.0.0.5:80                                here
//! reply     10.0.0.5:80 -> 10.0.0.230:7311                                an entry says that it crosses (crate::local)
//!           [::ffff:10.0.0.5]:80 -> [::ffff:10.0.0.230]:7311              here
//!           [2001:db8::80]:80 -> [2001:db8::9]:40000                      translated (crate::reply)
//! ```
//!
//! Checksums of transports do not notice: mapping an address changes no sum. An ICMP error becomes one of the other version,
//! with the packet that it quotes. What has no counterpart there is dropped (`untold`).

use aya_ebpf::cty::c_void;
use lb_common::{
    connection::{ConnectionKey, Leg},
    packet::{
        Fragment, Ipv4Header, Ipv6Header, Network, V4, V6, ethernet,
        icmp::IcmpHeader,
        mapped, protocol,
        transport::{Ports, UdpHeader},
    },
    reason::Reason,
    reply::flags,
};
use lb_ebpf::packet::{Packet, fixed};

use crate::{account, forward, maps::Family, outcome::Outcome, track};

/// Makes a translated packet one of IPv4, and sends it to its real server.
#[inline(never)]
pub fn request<P: Packet>(context: *mut c_void, leg: Leg) -> i32 {
    // SAFETY: the context is the kernel's own.
    let packet = &mut unsafe { P::view(context) };
    let sent = forward::reachable(packet, leg).and_then(|server| {
        to_ipv4(packet)?;
        server.send(packet)
    });
    sent.unwrap_or_else(account::leave::<P>)
}

#[inline(always)]
fn to_ipv4<P: Packet>(packet: &mut P) -> Result<(), Reason> {
    let at = payload(packet)?;
    let old: Ipv6Header = packet.read(at).ok_or(Reason::Malformed)?;
    let new = old.as_ipv4().ok_or(Reason::Untold)?;
    if new.protocol != protocol::ICMP {
        exchange(packet, at, ethernet::IPV4, 1)?;
        return packet.write(fixed(at), new);
    }
    let icmp: IcmpHeader = packet.read(fixed(at + V6::HEADER)).ok_or(Reason::Malformed)?;
    let quoted: Ipv6Header = packet.read(fixed(at + V6::HEADER + size_of::<IcmpHeader>())).ok_or(Reason::Malformed)?;
    let (Some(new_icmp), Some(new_quoted)) = (icmp.as_ipv4(), quoted.as_ipv4()) else { return Err(Reason::Untold) };
    let before = old.pseudo_sum() + icmp.sum() + quoted.sum();
    exchange(packet, at, ethernet::IPV4, 2)?;
    packet.write(fixed(at), new.shorter(mapped::DIFFERENCE as u16))?;
    packet.write(fixed(at + V4::HEADER), new_icmp.corrected(icmp.checksum, before, new_quoted.sum()))?;
    packet.write(fixed(at + V4::HEADER + size_of::<IcmpHeader>()), new_quoted)
}

/// Makes a reply one of IPv6, which is left to the program for translation, or refuses it.
#[inline(never)]
pub fn reply<P: Packet>(context: *mut c_void) -> Outcome {
    // SAFETY: the context is the kernel's own.
    let packet = &mut unsafe { P::view(context) };
    to_ipv6(packet).unwrap_or_else(Outcome::left::<P>)
}

#[inline(always)]
fn to_ipv6<P: Packet>(packet: &mut P) -> Result<Outcome, Reason> {
    let link = ethernet::parse(packet)?;
    if !packet.takes_headers(&link) {
        return Err(Reason::Vlan);
    }
    let at = payload(packet)?;
    let old: Ipv4Header = packet.read(at).ok_or(Reason::Malformed)?;
    let Some(new) = old.as_ipv6() else {
        remember_fragment(packet, at)?;
        return Err(Reason::Untold);
    };
    if old.protocol == protocol::ICMP {
        error_to_ipv6(packet, at, &new)?;
    } else {
        // IPv6 knows no datagram without a checksum.
        let checksum = fixed(at + V4::HEADER + UdpHeader::CHECKSUM);
        if old.protocol == protocol::UDP && packet.read::<u16>(checksum) == Some(0) {
            return Err(Reason::Untold);
        }
        if let Err((why, mtu)) = fits(packet, at, &old) {
            return Ok(Outcome::refused::<P, V4>(why, mtu, &link, u16::from_be(old.length).into()));
        }
        exchange(packet, at, ethernet::IPV6, 1)?;
        packet.write(fixed(at), new)?;
    }
    Ok(Outcome::verdict(Outcome::reply::<V6>().defer()))
}

/// Makes an ICMP error one of IPv6.
#[inline(always)]
fn error_to_ipv6<P: Packet>(packet: &mut P, at: usize, new: &Ipv6Header) -> Result<(), Reason> {
    let icmp: IcmpHeader = packet.read(fixed(at + V4::HEADER)).ok_or(Reason::Malformed)?;
    let quoted: Ipv4Header = packet.read(fixed(at + V4::HEADER + size_of::<IcmpHeader>())).ok_or(Reason::Malformed)?;
    let (Some(new_icmp), Some(new_quoted)) = (icmp.as_ipv6(), quoted.as_ipv6()) else { return Err(Reason::Untold) };
    let new = new.longer(mapped::DIFFERENCE as u16);
    let after = new.pseudo_sum() + new_quoted.sum();
    exchange(packet, at, ethernet::IPV6, 2)?;
    packet.write(fixed(at), new)?;
    packet.write(fixed(at + V6::HEADER), new_icmp.corrected(icmp.checksum, icmp.sum() + quoted.sum(), after))?;
    packet.write(fixed(at + V6::HEADER + size_of::<IcmpHeader>()), new_quoted)
}

/// Whether a reply may go on as one of IPv6. If not, why, and for what it is too big. The real server has to hear of it in IPv4, so
/// that is looked at here; while nobody knows the way to the client, everything fits.
#[inline(always)]
fn fits<P: Packet>(packet: &P, at: usize, header: &Ipv4Header) -> Result<(), (Reason, u16)> {
    let ports: Ports = packet.read(fixed(at + V4::HEADER)).ok_or((Reason::Malformed, 0))?;
    let key = ConnectionKey { client: header.source, vip: header.destination, ports, protocol: header.protocol.into() };
    let known = V6::replies().get_ptr(&mapped::map_key(&key)).ok_or((Reason::NotOurs, 0))?;
    // SAFETY: an element of the map; it may become another reply's under our hands, but it stays memory.
    let (found, mtu) = unsafe { ((*known).flags & flags::KNOWN != 0, (*known).hop.mtu) };
    let length = u16::from_be(header.length) as usize + mapped::DIFFERENCE;
    if header.ttl <= 1 {
        Err((Reason::TtlExpired, 0))
    } else if found && length > mtu as usize && !packet.fits_in_segments(forward::SEGMENT_HEADERS + V6::HEADER, mtu) {
        Err((Reason::TooBig, mtu.wrapping_sub(mapped::DIFFERENCE as u16)))
    } else {
        Ok(())
    }
}

/// Remembers a first fragment, so that the later ones are counted as what they are.
#[inline(always)]
fn remember_fragment<P: Packet>(packet: &P, at: usize) -> Result<(), Reason> {
    let payload = V4::transport(packet, &V4::parse(packet, at)?)?;
    if payload.fragment == Fragment::First {
        let ports: Ports = packet.read(fixed(payload.offset)).ok_or(Reason::Malformed)?;
        track::remember_first_fragment::<P, V4>(packet.context(), at as u32, ports);
    }
    Ok(())
}

/// Where the IP header begins, in a form of which the verifier knows no more than it needs.
#[inline(always)]
fn payload<P: Packet>(packet: &P) -> Result<usize, Reason> {
    Ok(packet.opaque(ethernet::parse(packet)?.payload) & 0x1f)
}

/// Changes the version of a packet whose IP header begins at `at`, and writes what stands before that. Offsets are hidden from
/// LLVM, which would leave their checks to that of the header.
#[inline(always)]
fn exchange<P: Packet>(packet: &mut P, at: usize, ethertype: u16, headers: usize) -> Result<(), Reason> {
    let addresses: [u32; 3] = packet.read(fixed(0)).ok_or(Reason::Malformed)?;
    let tags: [u32; 2] = packet.read(fixed(12)).ok_or(Reason::Malformed)?;
    packet.change_version(ethertype, headers)?;
    packet.write(fixed(0), addresses)?;
    if at > ethernet::HEADER {
        packet.write(fixed(12), tags[0])?;
    }
    if at > ethernet::HEADER + ethernet::TAG {
        packet.write(fixed(16), tags[1])?;
    }
    packet.write_ethertype(at, ethertype)
}
