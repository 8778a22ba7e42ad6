//! Network devices, as netlink describes them.
//!
//! [`Link`] is what the datapath wants to know of a device: whether it is up, whether XDP pays on it, whether it has MAC
//! addresses, and whether it is a VLAN of another. Everything comes from netlink: `/sys/class/net` shows the namespace
//! that it was mounted in, which need not be ours.

use std::collections::BTreeMap;

use futures_util::TryStreamExt as _;
use lb_common::hop::KEEP_VLAN;
use rtnetlink::{
    Handle,
    packet_route::{
        AddressFamily,
        link::{
            InfoData, InfoKind, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp, VlanProtocol,
            XdpAttached,
        },
    },
};

/// A network device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is switched on.
    pub up: bool,
    /// Whether it is the loopback device.
    pub loopback: bool,
    /// Whether it is made by software (veth, bridge, tun, VLAN, ...).
    pub virtual_device: bool,
    /// Whether XDP can send frames out of it that came in by another device.
    pub redirects: bool,
    /// Its MAC address, if it is an Ethernet device whose neighbours have addresses of their own.
    pub mac: Option<[u8; 6]>,
    /// The largest packet that it sends.
    pub mtu: u32,
    /// If it is a VLAN.
    pub vlan: Option<Vlan>,
    /// Whether XDP runs in generic mode, if it runs.
    pub generic_xdp: Option<bool>,
}

/// What a VLAN device is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Vlan {
    /// Index of the device whose frames carry the tag; nothing if that is in another network namespace.
    pub parent: Option<u32>,
    /// The identifier.
    pub id: u16,
    /// Whether the tag is an ordinary one (802.1Q).
    pub ordinary: bool,
}

impl Link {
    /// Reads a message. Nothing if it is not about a device as such (bridges report on their ports by the same messages).
    pub fn parse(message: &LinkMessage) -> Option<Self> {
        if message.header.interface_family != AddressFamily::Unspec {
            return None;
        }
        let flags = message.header.flags;
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            up: flags.contains(LinkFlags::Up),
            loopback: flags.contains(LinkFlags::Loopback),
            virtual_device: false,
            redirects: true,
            mac: None,
            mtu: 0,
            vlan: None,
            generic_xdp: None,
        };
        let addressed =
            message.header.link_layer_type == LinkLayerType::Ether && !flags.intersects(LinkFlags::Noarp | LinkFlags::Pointopoint);
        let (mut parent, mut elsewhere) = (None, false);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Address(address) if addressed => link.mac = address.as_slice().try_into().ok(),
                LinkAttribute::Link(index) => parent = Some(*index),
                LinkAttribute::LinkNetNsId(_) => elsewhere = true,
                LinkAttribute::LinkInfo(infos) => {
                    for info in infos {
                        match info {
                            LinkInfo::Kind(kind) => {
                                link.virtual_device = true;
                                link.redirects = *kind == InfoKind::Veth;
                                if *kind == InfoKind::Vlan && link.vlan.is_none() {
                                    link.vlan = Some(Vlan { parent: None, id: 0, ordinary: false });
                                }
                            }
                            LinkInfo::Data(InfoData::Vlan(data)) => link.vlan = Some(vlan(data)),
                            _ => {}
                        }
                    }
                }
                LinkAttribute::Xdp(parts) => {
                    for part in parts {
                        match part {
                            LinkXdp::Attached(XdpAttached::SocketBuffer) => link.generic_xdp = Some(true),
                            LinkXdp::Attached(XdpAttached::Driver | XdpAttached::Hardware) => link.generic_xdp = Some(false),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if let Some(vlan) = &mut link.vlan {
            vlan.parent = parent.filter(|_| !elsewhere);
        }
        Some(link)
    }
}

fn vlan(data: &[InfoVlan]) -> Vlan {
    let mut vlan = Vlan { parent: None, id: 0, ordinary: true };
    for part in data {
        match part {
            InfoVlan::Id(id) => vlan.id = *id,
            InfoVlan::Protocol(protocol) => vlan.ordinary = *protocol == VlanProtocol::Ieee8021Q,
            _ => {}
        }
    }
    vlan
}

/// Which device frames leave by that are sent to `link`, and what [`lb_common::hop::Hop::vlan`] they carry there.
///
/// Nothing if they carry two tags, or leave by a device of another network namespace.
pub fn port(links: &Links, link: &Link) -> Option<(u32, u16)> {
    match link.vlan {
        Some(vlan) => {
            let parent = links.get(&vlan.parent?)?;
            (vlan.ordinary && parent.vlan.is_none()).then_some((parent.index, vlan.id))
        }
        // A packet that came by a VLAN of this port and leaves untagged has to lose its tag.
        None if links.values().any(|other| other.vlan.is_some_and(|vlan| vlan.parent == Some(link.index))) => Some((link.index, 0)),
        None => Some((link.index, KEEP_VLAN)),
    }
}

/// The devices of the network namespace, by index.
pub type Links = BTreeMap<u32, Link>;

/// Asks for all devices.
pub async fn list(handle: &Handle) -> Result<Links, rtnetlink::Error> {
    let messages: Vec<_> = handle.link().get().execute().try_collect().await?;
    Ok(messages.iter().filter_map(Link::parse).map(|link| (link.index, link)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, vlan: Option<Vlan>) -> Link {
        let name = format!("eth{index}");
        Link {
            index,
            name,
            up: true,
            loopback: false,
            virtual_device: false,
            redirects: true,
            mac: None,
            mtu: 1500,
            vlan,
            generic_xdp: None,
        }
    }

    #[test]
    fn frames_leave_by_the_parent_of_a_vlan() {
        let vlan = |parent, id| Some(Vlan { parent, id, ordinary: true });
        let provider = Some(Vlan { parent: Some(1), id: 12, ordinary: false });
        let devices = [
            link(1, None),
            link(2, None),
            link(10, vlan(Some(1), 7)),
            link(11, vlan(Some(10), 8)),
            link(12, provider),
            link(13, vlan(None, 9)),
            link(14, vlan(Some(99), 9)),
        ];
        let links: Links = devices.into_iter().map(|link| (link.index, link)).collect();
        let port = |index| port(&links, &links[&index]);
        assert_eq!(port(1), Some((1, 0)), "a port with VLANs");
        assert_eq!(port(2), Some((2, KEEP_VLAN)), "a port without");
        assert_eq!(port(10), Some((1, 7)), "a VLAN");
        assert_eq!(port(11), None, "a VLAN in a VLAN");
        assert_eq!(port(12), None, "a provider's VLAN");
        assert_eq!(port(13), None, "a VLAN of a device elsewhere");
        assert_eq!(port(14), None, "a VLAN of a device that is gone");
    }
}
