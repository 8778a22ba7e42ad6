//! The first step of a packet's way out: towards a real server, or back to a client.
//!
//! All that a frame needs to leave is known beforehand, so that sending it asks nobody: the device, the VLAN, both MAC
//! addresses, and how large a packet may be.

use crate::wire::plain;

/// How frames leave towards their next hop. MAC addresses are in memory order.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Hop {
    /// The device that the route names; with VLANs the VLAN device. tc sends here.
    pub ifindex: u32,
    /// The device that frames leave by: the VLAN's parent, else the same as `ifindex`. XDP sends here.
    pub port_ifindex: u32,
    /// The VLAN that frames carry on `port_ifindex`: an identifier, 0 for none, or [`KEEP_VLAN`].
    pub vlan: u16,
    /// The largest packet that fits the way, in bytes.
    pub mtu: u16,
    /// How frames begin: the MAC addresses of the next hop and of the device that they leave by. See [`link_addresses`].
    pub link: [u32; 3],
}

/// [`Hop::vlan`]: leave the tags of the packet as they are.
pub const KEEP_VLAN: u16 = 0xffff;

/// The first twelve bytes of an Ethernet header, as words.
pub const fn link_addresses(next_hop: [u8; 6], source: [u8; 6]) -> [u32; 3] {
    let first = u32::from_ne_bytes([next_hop[0], next_hop[1], next_hop[2], next_hop[3]]);
    let second = u32::from_ne_bytes([next_hop[4], next_hop[5], source[0], source[1]]);
    let third = u32::from_ne_bytes([source[2], source[3], source[4], source[5]]);
    [first, second, third]
}

/// What XDP has to know of a device that a route names: the key is its index. Written by userspace, for every device.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Device {
    /// As [`Hop::port_ifindex`].
    pub port_ifindex: u32,
    /// As [`Hop::vlan`].
    pub vlan: u16,
    /// Not 0: XDP can send frames out of the port that came in by another one.
    pub redirects: u16,
}

plain! { Hop = 24, Device = 8 }
