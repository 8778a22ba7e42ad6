//! Sending a packet to its real server: by direct routing, or through a tunnel.

mod tunnel;

use lb_common::{
    packet::{IpHeader, ethernet::Link},
    reason::Reason,
    server::{Method, Server, Status},
};
use lb_ebpf::packet::{Packet, Room};

use crate::maps::{Family, NEXT_HOPS, SERVERS};

/// A real server that packets can be sent to.
pub struct Reachable {
    index: u32,
    entry: *const Server,
    status: u8,
}

impl Reachable {
    /// The largest packet that the way to the server takes, in bytes.
    #[inline(always)]
    pub fn mtu(&self) -> u16 {
        // SAFETY: an element of the array.
        unsafe { (*self.entry).mtu }
    }
}

/// Finds the real server's entry, before anything is changed or counted.
#[inline(always)]
pub fn reachable<P: Packet>(index: u32) -> Result<Reachable, Reason> {
    let entry = SERVERS.get_ptr(index).ok_or(Reason::ServerRemoved)?;
    // SAFETY: an element of the array.
    let status = unsafe { (*entry).status };
    if status != Status::Ready as u8 {
        if status == Status::Removed as u8 || status == Status::Free as u8 {
            return Err(Reason::ServerRemoved);
        }
        if status == Status::Unresolved as u8 && !P::RESOLVES {
            return Err(Reason::Unresolved);
        }
    }
    Ok(Reachable { index, entry, status })
}

/// Sends the packet.
#[inline(always)]
pub fn forward<P: Packet, F: Family>(
    packet: &mut P,
    link: &Link,
    header: &IpHeader<F::Address>,
    server: &Reachable,
) -> Result<i32, Reason> {
    if server.status != Status::Ready as u8 {
        if server.status == Status::Local as u8 {
            return Err(Reason::LocalServer);
        }
        if server.status == Status::NoRoute as u8 {
            return Err(Reason::NoRoute);
        }
    }
    F::age(packet, header.offset)?;
    // SAFETY: an element of the array.
    let (method, mtu) = unsafe { ((*server.entry).method, (*server.entry).mtu) };
    if header.length > mtu as usize && !packet.fits_in_segments(SEGMENT_HEADERS + F::HEADER, mtu) {
        return Err(Reason::TooBig);
    }
    if method == Method::Route as u8 {
        packet.address(link, server.entry, Room::NONE)?;
    } else {
        tunnel::wrap::<P, F>(packet, link, header, server.entry)?;
    }
    if P::RESOLVES && server.status == Status::Unresolved as u8 {
        let next_hop = NEXT_HOPS.get_ptr(server.index).ok_or(Reason::Unresolved)?;
        return Ok(packet.send_unresolved(server.entry, next_hop));
    }
    Ok(packet.send(server.entry))
}

/// Bytes of a TCP header with the options that segments usually carry (timestamps).
const SEGMENT_HEADERS: usize = 32;
