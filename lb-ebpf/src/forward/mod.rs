//! Sending a packet to its real server: by direct routing, through a tunnel, or translated.

mod tunnel;

use aya_ebpf::cty::c_void;
use lb_common::{
    packet::{IpHeader, ethernet::Link},
    reason::Reason,
    server::{Method, Server, Status, Tunnel, flags},
};
use lb_ebpf::packet::{Packet, Room};

use crate::{
    account,
    maps::{Family, NEXT_HOPS, SERVERS},
    nat,
    outcome::Outcome,
};

/// A real server that packets can be sent to.
pub struct Reachable {
    index: u32,
    entry: &'static Server,
    status: u8,
}

impl Reachable {
    /// The largest packet that the way to the server takes, in bytes.
    #[inline(always)]
    pub fn mtu(&self) -> u16 {
        self.entry.hop.mtu
    }

    /// Sends a packet that is addressed already.
    #[inline(always)]
    fn send<P: Packet>(&self, packet: &P) -> Result<i32, Reason> {
        if P::RESOLVES && self.status == Status::Unresolved as u8 {
            let next_hop = NEXT_HOPS.get(self.index).ok_or(Reason::Unresolved)?;
            return Ok(packet.send_unresolved(self.entry.hop.ifindex, next_hop));
        }
        Ok(packet.send(&self.entry.hop))
    }
}

/// Finds the real server's entry, before anything is changed or counted.
#[inline(always)]
pub fn reachable<P: Packet>(packet: &P, index: u32) -> Result<Reachable, Reason> {
    let entry = SERVERS.get(index).ok_or(Reason::ServerRemoved)?;
    let status = entry.status;
    if status != Status::Ready as u8 {
        if status == Status::Removed as u8 || status == Status::Free as u8 {
            return Err(Reason::ServerRemoved);
        }
        if status == Status::Unresolved as u8 && !P::RESOLVES {
            return Err(Reason::Unresolved);
        }
    }
    if status == Status::Ready as u8 && !packet.reaches(&entry.hop, entry.flags & flags::REDIRECT != 0) {
        return Err(Reason::OtherDevice);
    }
    Ok(Reachable { index, entry, status })
}

/// Takes the packet to its real server.
#[inline(always)]
pub fn forward<P: Packet, F: Family, const PLAIN: bool>(
    packet: &mut P,
    link: &Link,
    header: &IpHeader<F::Address>,
    server: &Reachable,
) -> Result<Outcome, Reason> {
    if server.status != Status::Ready as u8 {
        if server.status == Status::Local as u8 {
            return Err(Reason::LocalServer);
        }
        if server.status == Status::NoRoute as u8 {
            return Err(Reason::NoRoute);
        }
    }
    let (method, mtu) = (server.entry.method, server.entry.hop.mtu);
    let too_big = header.length > mtu as usize && !packet.fits_in_segments(SEGMENT_HEADERS + F::HEADER, mtu);
    if !packet.takes_headers(link) && (too_big || method == Method::Tunnel as u8) {
        return Err(Reason::Vlan);
    }
    // Like IPVS: an error about a packet that is too big quotes its lowered time to live.
    F::age(packet, header.offset)?;
    if too_big {
        return Err(Reason::TooBig);
    }
    if method == Method::Route as u8 {
        packet.address(link, &server.entry.hop, Room::NONE)?;
    } else if method == Method::Masquerade as u8 {
        return Ok(Outcome::translate::<F>(server.index, PLAIN));
    } else if server.entry.tunnel == Tunnel::Ipip as u8 {
        tunnel::ipip::<P, F>(packet, link, header, server.entry)?;
    } else {
        return Ok(Outcome::wrap::<F>(server.index, link));
    }
    server.send(packet).map(Outcome::verdict)
}

/// Puts the packet into a tunnel with a header of its own, and sends it.
#[inline(never)]
pub fn wrap<P: Packet, F: Family>(context: *mut c_void, link: u32, vlan: u32, index: u32) -> i32 {
    // SAFETY: the context is the kernel's own.
    let mut packet = unsafe { P::view(context) };
    // The parser's offset, in a form that the verifier can bound.
    let link = Link { ethertype: F::ETHERTYPE, payload: link as usize & 0x1f, vlan: vlan as u16 };
    let sent = reachable(&packet, index).and_then(|server| {
        tunnel::with_header::<P, F>(&mut packet, &link, server.entry)?;
        server.send(&packet)
    });
    sent.unwrap_or_else(account::leave::<P>)
}

/// Translates a plain packet, and sends it.
#[inline(never)]
pub fn translate_plain<P: Packet, F: Family>(context: *mut c_void, index: u32) -> i32 {
    // SAFETY: the context is the kernel's own.
    let mut packet = unsafe { P::view(context) };
    let sent = reachable(&packet, index).and_then(|server| {
        nat::plain_request::<P, F>(&mut packet, server.entry)?;
        server.send(&packet)
    });
    sent.unwrap_or_else(account::leave::<P>)
}

/// Translates a packet of any shape, and sends it.
#[inline(never)]
pub fn translate<P: Packet, F: Family>(context: *mut c_void, index: u32) -> i32 {
    // SAFETY: the context is the kernel's own.
    let mut packet = unsafe { P::view(context) };
    let sent = reachable(&packet, index).and_then(|server| {
        nat::request::<P, F>(&mut packet, server.entry)?;
        server.send(&packet)
    });
    sent.unwrap_or_else(account::leave::<P>)
}

/// Bytes of a TCP header with the options that segments usually carry (timestamps).
const SEGMENT_HEADERS: usize = 32;
