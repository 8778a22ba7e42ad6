//! Network devices, as netlink describes them.
//!
//! [`Link`] is what the datapath wants to know of a device: whether it is up, whether XDP pays on it, whether it has MAC
//! addresses, and whether it is a VLAN of another. Everything comes from netlink: `/sys/class/net` shows the namespace
//! that it was mounted in, which need not be ours.

use std::collections::BTreeMap;

use futures_util::TryStreamExt as _;
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

/// The devices of the network namespace, by index.
pub type Links = BTreeMap<u32, Link>;

/// Asks for all devices.
pub async fn list(handle: &Handle) -> Result<Links, rtnetlink::Error> {
    let messages: Vec<_> = handle.link().get().execute().try_collect().await?;
    Ok(messages.iter().filter_map(Link::parse).map(|link| (link.index, link)).collect())
}
