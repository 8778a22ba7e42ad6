//! Ethernet with up to two VLAN tags.

use super::Bytes;
use crate::{reason::Reason, wire::plain};

/// Bytes of an Ethernet header without tags.
pub const HEADER: usize = 14;
/// Bytes of a VLAN tag.
pub const TAG: usize = 4;

/// Ethernet type of IPv4.
pub const IPV4: u16 = 0x0800;
/// Ethernet type of IPv6.
pub const IPV6: u16 = 0x86dd;
/// Ethernet type of a customer VLAN tag (802.1Q).
pub const VLAN: u16 = 0x8100;
/// Ethernet type of a service VLAN tag (802.1ad).
pub const SERVICE_VLAN: u16 = 0x88a8;

/// An Ethernet header.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct EthernetHeader {
    /// To whom.
    pub destination: [u16; 3],
    /// From whom.
    pub source: [u16; 3],
    /// Type of what follows, in network order.
    pub ethertype: u16,
}

/// What follows the type of a VLAN tag.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct VlanTag {
    /// Priority and VLAN identifier, in network order.
    pub control: u16,
    /// Type of what follows, in network order.
    pub ethertype: u16,
}

/// How a frame begins.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Link {
    /// Type of the payload, in host order.
    pub ethertype: u16,
    /// Where the payload begins.
    pub payload: usize,
    /// The outer tag's VLAN identifier; 0 if the frame has no tag.
    pub vlan: u16,
}

impl Link {
    /// A frame without tags.
    #[inline(always)]
    pub const fn plain(ethertype: u16) -> Self {
        Self { ethertype, payload: HEADER, vlan: 0 }
    }
}

const fn is_tag(ethertype: u16) -> bool {
    ethertype == VLAN.to_be() || ethertype == SERVICE_VLAN.to_be()
}

/// The type of a frame, be it a tag's or the payload's. Frames to a group of hosts are not for a director.
#[inline(always)]
pub fn parse_plain<B: Bytes + ?Sized>(frame: &B) -> Result<u16, Reason> {
    let header: EthernetHeader = frame.read(0).ok_or(Reason::Malformed)?;
    if header.destination[0] & 0x01_u16.to_le() != 0 {
        return Err(Reason::NotIp);
    }
    Ok(u16::from_be(header.ethertype))
}

/// Takes the Ethernet header and its tags off. Frames to a group of hosts are not for a director.
#[inline(always)]
pub fn parse<B: Bytes + ?Sized>(frame: &B) -> Result<Link, Reason> {
    let ethertype = parse_plain(frame)?;
    if !is_tag(ethertype.to_be()) {
        return Ok(Link::plain(ethertype));
    }
    let outer: VlanTag = frame.read(HEADER).ok_or(Reason::Malformed)?;
    let vlan = u16::from_be(outer.control) & 0x0fff;
    if !is_tag(outer.ethertype) {
        return Ok(Link { ethertype: u16::from_be(outer.ethertype), payload: HEADER + TAG, vlan });
    }
    let inner: VlanTag = frame.read(HEADER + TAG).ok_or(Reason::Malformed)?;
    Ok(Link { ethertype: u16::from_be(inner.ethertype), payload: HEADER + 2 * TAG, vlan })
}

plain! { EthernetHeader = 14, VlanTag = 4 }
