//! Sending a packet to its real server: by direct routing, through a tunnel, or translated.

mod tunnel;

use aya_ebpf::cty::c_void;
use lb_common::{
    connection::{ConnectionKey, Leg},
    local::Local,
    packet::{
        IpHeader,
        ethernet::{self, Link},
    },
    reason::Reason,
    server::{Method, Server, Status, Tunnel, flags},
};
use lb_ebpf::packet::{Packet, Room, apart};

use crate::{
    account,
    maps::{Family, NEXT_HOPS, SERVERS},
    nat,
    outcome::Outcome,
};

/// A real server that packets can be sent to.
pub struct Reachable {
    leg: Leg,
    entry: &'static Server,
    /// The kernel's neighbour code must find the next hop.
    unresolved: bool,
}

impl Reachable {
    /// The largest packet that its way takes, counted from the IP header.
    #[inline(always)]
    pub const fn mtu(&self) -> u16 {
        self.entry.hop.mtu
    }

    /// Sends a packet that is addressed already.
    #[inline(always)]
    pub fn send<P: Packet>(&self, packet: &P) -> Result<i32, Reason> {
        if P::RESOLVES && self.unresolved {
            let next_hop = NEXT_HOPS.get(self.leg.server()).ok_or(Reason::Unresolved)?;
            return Ok(packet.send_unresolved(self.entry.hop.ifindex, next_hop));
        }
        Ok(packet.send(&self.entry.hop))
    }
}

/// Finds the real server's entry, before anything is changed or counted.
#[inline(always)]
pub fn reachable<P: Packet>(packet: &P, leg: Leg) -> Result<Reachable, Reason> {
    let Some(entry) = SERVERS.get(leg.server()) else { return Err(apart(Reason::ServerRemoved)) };
    let unresolved = entry.status != Status::Ready as u8;
    if unresolved {
        may_resolve::<P>(apart(entry.status))?;
    } else if !packet.reaches(&entry.hop, entry.flags & flags::REDIRECT != 0) {
        return Err(apart(Reason::OtherDevice));
    }
    Ok(Reachable { leg, entry, unresolved })
}

/// Whether packets can be sent to a server that is not ready, after all.
#[inline(always)]
fn may_resolve<P: Packet>(status: u8) -> Result<(), Reason> {
    const UNRESOLVED: u8 = Status::Unresolved as u8;
    const LOCAL: u8 = Status::Local as u8;
    const NO_ROUTE: u8 = Status::NoRoute as u8;
    match status {
        UNRESOLVED if P::RESOLVES => Ok(()),
        UNRESOLVED => Err(Reason::Unresolved),
        LOCAL => Err(Reason::LocalServer),
        NO_ROUTE => Err(Reason::NoRoute),
        _ => Err(Reason::ServerRemoved),
    }
}

/// The largest packet that takes the way to a real server: what the sender of a larger one is told.
#[inline(always)]
pub fn mtu(leg: Result<Leg, Reason>) -> u16 {
    leg.ok().and_then(|leg| SERVERS.get(leg.server())).map_or(0, |entry| entry.hop.mtu)
}

/// Takes the packet to its real server.
#[inline(always)]
pub fn forward<P: Packet, F: Family>(
    packet: &mut P,
    link: &Link,
    header: &IpHeader<&F::Address>,
    plain: Option<&ConnectionKey<F::Address>>,
    server: &Reachable,
) -> Result<Outcome, Reason> {
    let method = server.entry.method;
    let too_big = header.length > server.entry.hop.mtu as usize
        && !packet.fits_in_segments(SEGMENT_HEADERS + F::HEADER, server.entry.hop.mtu);
    if !packet.takes_headers(link) && (too_big || method == Method::Tunnel as u8 || method == Method::Cross as u8) {
        return Err(Reason::Vlan);
    }
    if let Some(key) = plain
        && Method::translates_in_place(method)
        && !too_big
    {
        nat::plain_request::<P, F>(packet, key, header.length, server.entry, server.leg.local())?;
        packet.address(link, &server.entry.hop, Room::NONE)?;
        return server.send(packet).map(Outcome::verdict);
    }
    // Like IPVS: an error about a packet that is too big quotes its lowered time to live.
    F::age(packet, header.offset)?;
    if too_big {
        return Err(apart(Reason::TooBig));
    }
    if method == Method::Route as u8 {
        packet.address(link, &server.entry.hop, Room::NONE)?;
    } else if Method::translates(method) {
        return Ok(Outcome::translate::<F>(server.leg));
    } else if server.entry.tunnel == Tunnel::Ipip as u8 {
        tunnel::ipip::<P, F>(packet, link, header, server.entry)?;
    } else {
        return Ok(Outcome::wrap::<F>(server.leg.server(), link));
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
    let sent = reachable(&packet, Leg::new(index, Local::NONE)).and_then(|server| {
        tunnel::with_header::<P, F>(&mut packet, &link, server.entry)?;
        server.send(&packet)
    });
    sent.unwrap_or_else(account::leave::<P>)
}

/// Translates a packet of any shape, and sends it.
#[inline(never)]
pub fn translate<P: Packet, F: Family>(context: *mut c_void, leg: Leg) -> i32 {
    // SAFETY: the context is the kernel's own.
    let mut packet = unsafe { P::view(context) };
    let sent = reachable(&packet, leg).and_then(|server| {
        nat::request::<P, F>(&mut packet, server.entry, leg.local())?;
        // It has mapped addresses now, and is still of IPv6.
        let crosses = F::ETHERTYPE == ethernet::IPV6 && server.entry.method == Method::Cross as u8;
        if crosses { Ok(Outcome::NEXT_CROSS) } else { server.send(&packet) }
    });
    sent.unwrap_or_else(account::leave::<P>)
}

/// Bytes of a TCP header with the options that segments usually carry (timestamps).
pub const SEGMENT_HEADERS: usize = 32;
