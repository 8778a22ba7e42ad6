//! What a set of virtual addresses needs from the host, as data.
//!
//! | need | why |
//! | --- | --- |
//! | the VIP on `lo`, /32 or /128 | the host accepts packets for it; the prefix says that nothing else is behind it |
//! | `arp_ignore` 1 | no answer to "who has the VIP?" on an interface that does not have it itself |
//! | `arp_announce` 2 | the VIP is not named as sender in the host's own questions, which routers learn from |
//! | `rp_filter` 2 instead of 1 | packets from a tunnel come from clients to whom another way leads back |
//! | a tunnel device, up, or the program | the client's packet is taken out of the tunnel |
//!
//! For the settings of ARP and of the reverse path the kernel takes the larger value of `all` and the interface, so a stricter value
//! that stands there already is left alone where it serves as well.

use std::net::IpAddr;

use super::{
    Hook,
    state::{Arrival, Change, Vip},
    sysctl,
};

/// A setting, and which values serve.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Setting {
    /// Its path below `/proc/sys`.
    pub(super) key: String,
    /// Whose `all` counts as well.
    pub(super) wanted: Wanted,
}

/// What a setting must be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Wanted {
    /// `arp_announce`: 2.
    Announce,
    /// `arp_ignore`: 1, or the stricter 2. (3 is another thing: it answers for all but addresses of scope host.)
    Ignore,
    /// `rp_filter`: anything but strict, judged by the effective value.
    LooseReversePath,
}

impl Wanted {
    /// The value that `setup` writes.
    pub(super) const fn value(self) -> &'static str {
        match self {
            Self::Ignore => "1",
            Self::Announce | Self::LooseReversePath => "2",
        }
    }

    /// Whether this value serves.
    pub(super) const fn is_met(self, value: i64) -> bool {
        match self {
            Self::Announce => value == 2,
            Self::Ignore => matches!(value, 1 | 2),
            Self::LooseReversePath => value != 1,
        }
    }

    /// Its name below an interface.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Announce => "arp_announce",
            Self::Ignore => "arp_ignore",
            Self::LooseReversePath => "rp_filter",
        }
    }
}

/// The settings that these addresses need. IPv6 needs none.
pub(super) fn settings(vips: &[Vip]) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut add = |interface: &str, wanted: Wanted| {
        let setting = Setting { key: sysctl::ipv4(interface, wanted.name()), wanted };
        if !settings.contains(&setting) {
            settings.push(setting);
        }
    };
    for vip in vips.iter().filter(|vip| vip.address.is_ipv4()) {
        for interface in ["all", "lo", &vip.interface] {
            add(interface, Wanted::Ignore);
            add(interface, Wanted::Announce);
        }
        for interface in unwrapping_interfaces(vip) {
            add(interface, Wanted::LooseReversePath);
        }
    }
    settings
}

/// The interfaces where the client's packets appear after they left the tunnel.
pub(super) fn unwrapping_interfaces(vip: &Vip) -> Vec<&str> {
    match &vip.arrival {
        Arrival::Route => Vec::new(),
        Arrival::Device { devices } => devices.iter().map(String::as_str).collect(),
        Arrival::Program { .. } => vec![&vip.interface],
    }
}

/// Where these addresses need the program.
pub(super) fn programs(vips: &[Vip]) -> Vec<(&str, Hook)> {
    let mut programs = Vec::new();
    for vip in vips {
        if let Arrival::Program { hook, .. } = vip.arrival
            && !programs.contains(&(vip.interface.as_str(), hook))
        {
            programs.push((vip.interface.as_str(), hook));
        }
    }
    programs
}

/// Whether these addresses need what was changed here.
pub(super) fn needs(vips: &[Vip], change: &Change) -> bool {
    match change {
        Change::Address { address } => vips.iter().any(|vip| vip.address == *address),
        Change::Sysctl { key, .. } => settings(vips).iter().any(|setting| setting.key == *key),
        Change::DeviceMade { name } | Change::DeviceUp { name } => {
            vips.iter().any(|vip| matches!(&vip.arrival, Arrival::Device { devices } if devices.contains(name)))
        }
        Change::Program(attachment) => programs(vips).contains(&(attachment.interface.as_str(), attachment.hook)),
        Change::Qdisc { interface } => programs(vips).iter().any(|(name, hook)| name == interface && *hook != Hook::Xdp),
    }
}

/// The length of a prefix that holds one address.
pub(super) const fn prefix(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::realserver::TunnelType;

    fn vip(address: &str, arrival: Arrival) -> Vip {
        Vip { address: address.parse().expect("an address"), interface: "eth0".into(), arrival }
    }

    fn keys(vips: &[Vip]) -> Vec<String> {
        settings(vips).into_iter().map(|setting| sysctl::dotted(&setting.key)).collect()
    }

    #[test]
    fn direct_routing_hides_the_address_from_arp() {
        let expected = ["all", "lo", "eth0"]
            .map(|interface| ["arp_ignore", "arp_announce"].map(|name| format!("net.ipv4.conf.{interface}.{name}")))
            .concat();
        assert_eq!(keys(&[vip("10.0.0.200", Arrival::Route), vip("10.0.0.201", Arrival::Route)]), expected);
        assert!(keys(&[vip("fd00::200", Arrival::Route)]).is_empty(), "IPv6 needs no settings");
    }

    #[test]
    fn the_reverse_path_matters_where_packets_leave_the_tunnel() {
        let program = Arrival::Program { hook: Hook::Tc, tunnel: TunnelType::Gre, port: 0 };
        assert!(keys(&[vip("10.0.0.200", program)]).contains(&"net.ipv4.conf.eth0.rp_filter".to_owned()));
        let device = Arrival::Device { devices: vec!["tunl0".into()] };
        let keys = keys(&[vip("10.0.0.200", device)]);
        assert!(keys.contains(&"net.ipv4.conf.tunl0.rp_filter".to_owned()));
        assert!(!keys.contains(&"net.ipv4.conf.eth0.rp_filter".to_owned()));
    }

    #[test]
    fn what_another_address_needs_stays() {
        let sysctl = Change::Sysctl { key: sysctl::ipv4("all", "arp_ignore"), before: "0".into(), set: "1".into() };
        assert!(needs(&[vip("10.0.0.200", Arrival::Route)], &sysctl));
        assert!(!needs(&[vip("fd00::200", Arrival::Route)], &sysctl));
        let address = Change::Address { address: "10.0.0.201".parse().expect("an address") };
        assert!(!needs(&[vip("10.0.0.200", Arrival::Route)], &address));
    }

    #[test]
    fn stricter_values_serve_where_they_mean_the_same() {
        assert!(Wanted::Ignore.is_met(2) && !Wanted::Ignore.is_met(3) && !Wanted::Ignore.is_met(0));
        assert!(Wanted::Announce.is_met(2) && !Wanted::Announce.is_met(1));
        assert!(Wanted::LooseReversePath.is_met(0) && Wanted::LooseReversePath.is_met(2) && !Wanted::LooseReversePath.is_met(1));
    }
}
