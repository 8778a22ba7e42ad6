//! The devices that replies can leave by, as the packet path has to know them.
//!
//! The kernel tells the packet path by which device a reply goes to its client. If that is a VLAN, XDP has to send by its
//! parent and put the tag on; and it must not send by a device that takes no frames from XDP. That is what `DEVICES` says.
//!
//! ```text
//! eth0 -> eth0, keep tags      eth0.7 -> eth0, VLAN 7      br0 -> br0, not from XDP
//! ```

use std::collections::BTreeMap;

use aya::maps::{HashMap, MapData};
use lb_common::hop::Device;

use super::{
    Error, kernel_error,
    links::{self, Links},
    maps::Pins,
};

/// The map of devices.
#[derive(Debug)]
pub struct Devices {
    map: HashMap<MapData, u32, Device>,
    known: BTreeMap<u32, Device>,
}

impl Devices {
    /// Opens the map, with what an earlier daemon has left in it.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        let map: HashMap<MapData, u32, Device> = pins.typed("DEVICES")?;
        let known = map.iter().filter_map(Result::ok).collect();
        Ok(Self { map, known })
    }

    /// Makes the map say what netlink says.
    pub fn learn(&mut self, links: &Links) -> Result<(), Error> {
        let wanted = entries(links);
        for (index, device) in &wanted {
            if self.known.get(index) != Some(device) {
                let written = self.map.insert(index, device, 0);
                written.map_err(|error| kernel_error(format!("the device {index} cannot be written to its table"), error))?;
            }
        }
        for index in self.known.keys().filter(|index| !wanted.contains_key(index)) {
            // It may be gone already, which is what is wanted.
            let _ = self.map.remove(index);
        }
        self.known = wanted;
        Ok(())
    }
}

/// The devices that XDP can send by.
fn entries(links: &Links) -> BTreeMap<u32, Device> {
    let entry = |link| {
        let (port_ifindex, vlan) = links::port(links, link)?;
        let redirects = links.get(&port_ifindex)?.redirects;
        Some((link.index, Device { port_ifindex, vlan, redirects: redirects.into() }))
    };
    links.values().filter_map(entry).collect()
}
