//! The way to a real server, and the entries that tell the kernel about it.
//!
//! Netlink answers in routes, devices and neighbours. A [`Way`] is their essence for one address; together with a
//! [`Target`] it makes the entries of `SERVERS` and `NEXT_HOPS`. Pure functions: where ways come from is
//! [`super::resolve`]'s subject.
//!
//! ```text
//! 10.0.0.205 -> through eth0.7 (eth0, VLAN 7), next hop 10.0.0.205 at 02:00:00:00:02:05, at most 1500 bytes
//! ```

use std::net::IpAddr;

use lb_common::{
    family::{AF_INET, AF_INET6},
    hop::link_addresses,
    packet::mapped,
    server::{self, NextHop, Server, Status, flags},
};

use super::Target;
use crate::director::model::{Method, Tunnel, TunnelChecksum};

/// How packets get to an address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// Nobody knows.
    NoRoute,
    /// The address is the director's own.
    Local,
    /// Through a device.
    Through(Hop),
}

/// The first step of the way to an address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hop {
    /// The device that the route names.
    pub ifindex: u32,
    /// The device that frames leave by.
    pub port_ifindex: u32,
    /// As [`lb_common::hop::Hop::vlan`].
    pub vlan: u16,
    /// Bytes that the route, or else the device, allows.
    pub mtu: u32,
    /// MAC address of the device.
    pub source: [u8; 6],
    /// The gateway, or the address itself.
    pub next_hop: IpAddr,
    /// MAC address of the next hop; nothing if it is not known, or if XDP cannot use it.
    pub mac: Option<[u8; 6]>,
    /// The route's preferred source address.
    pub preferred_source: Option<IpAddr>,
    /// Whether XDP can send frames out of `port_ifindex` that came in by another device.
    pub redirects: bool,
}

/// The entry of `SERVERS`. A way that is not known yet makes a server without route.
pub fn server(target: &Target, way: Option<&Way>) -> Server {
    let mut server = Server {
        method: server::Method::Route as u8,
        status: Status::NoRoute as u8,
        address: words(target.address),
        port: target.port.to_be(),
        flags: if target.address.is_ipv6() { flags::IPV6 } else { 0 },
        ..Server::default()
    };
    if target.method == Method::Masquerade {
        server.method = server::Method::Masquerade as u8;
    }
    if let Method::FullNat { toa } = target.method {
        server.method = server::Method::FullNat as u8;
        if let (true, IpAddr::V4(address)) = (target.crosses(), target.address) {
            server.method = server::Method::Cross as u8;
            server.address = words(address.to_ipv6_mapped().into());
            server.flags |= flags::IPV6;
        }
        if toa {
            server.flags |= flags::TOA;
        }
    }
    if let Method::Tunnel(tunnel) = target.method {
        server.method = server::Method::Tunnel as u8;
        let (kind, checksum) = match tunnel {
            Tunnel::Ipip => (server::Tunnel::Ipip, false),
            Tunnel::Gue { port, checksum } => {
                server.tunnel_port = port.to_be();
                // Remote checksum offload means an ordinary checksum of the tunnel for packets whose own checksum is finished,
                // and those from the wire have a finished one. Only beside an unfinished one would IPVS add GUE's option.
                (server::Tunnel::Gue, checksum != TunnelChecksum::None)
            }
            Tunnel::Gre { checksum } => (server::Tunnel::Gre, checksum == TunnelChecksum::Full),
        };
        server.tunnel = kind as u8;
        if checksum {
            server.flags |= flags::CHECKSUM;
        }
    }
    match way {
        None | Some(Way::NoRoute) => {}
        Some(Way::Local) => {
            server.status = Status::Local as u8;
            server.hop.mtu = u16::MAX;
        }
        // A tunnel needs an address to send from.
        Some(Way::Through(hop)) if hop.preferred_source.is_none() && matches!(target.method, Method::Tunnel(_)) => {}
        Some(Way::Through(hop)) => {
            server.status = if hop.mac.is_some() { Status::Ready } else { Status::Unresolved } as u8;
            if hop.redirects {
                server.flags |= flags::REDIRECT;
            }
            server.hop.ifindex = hop.ifindex;
            server.hop.port_ifindex = hop.port_ifindex;
            server.hop.vlan = hop.vlan;
            server.hop.mtu = mtu(hop.mtu, target);
            server.hop.link = link_addresses(hop.mac.unwrap_or_default(), hop.source);
            server.outer_source = hop.preferred_source.map(words).unwrap_or_default();
        }
    }
    if matches!(target.method, Method::FullNat { .. }) {
        server.outer_source = [target.pool, 0, 0, 0];
    }
    server
}

/// The entry of `NEXT_HOPS`.
pub fn next_hop(way: Option<&Way>) -> NextHop {
    let Some(Way::Through(hop)) = way else { return NextHop::default() };
    let family = if hop.next_hop.is_ipv6() { AF_INET6 } else { AF_INET };
    NextHop { family: family.into(), address: words(hop.next_hop), zero: 0 }
}

/// The address of the real server of an entry.
pub fn server_address(server: &Server) -> IpAddr {
    address(server.address, server.flags & flags::IPV6 != 0).to_canonical()
}

/// The largest packet, from the inner IP header, that fits a way of `mtu` bytes.
fn mtu(mtu: u32, target: &Target) -> u16 {
    // Towards IPv4 they become shorter.
    let gained = if target.crosses() { mapped::DIFFERENCE as u32 } else { 0 };
    mtu.saturating_add(gained).saturating_sub(overhead(target)).min(u16::MAX.into()) as u16
}

/// Bytes that a target's tunnel adds (IPVS's numbers).
fn overhead(target: &Target) -> u32 {
    let outer = if target.address.is_ipv6() { 40 } else { 20 };
    match target.method {
        Method::Route | Method::Masquerade | Method::FullNat { .. } => 0,
        Method::Tunnel(Tunnel::Ipip) => outer,
        Method::Tunnel(Tunnel::Gue { .. }) => outer + 8 + 4,
        Method::Tunnel(Tunnel::Gre { checksum: TunnelChecksum::Full }) => outer + 8,
        Method::Tunnel(Tunnel::Gre { .. }) => outer + 4,
    }
}

/// An address as it stands in maps: four words in network order, IPv4 in the first.
pub fn words(address: IpAddr) -> [u32; 4] {
    match address {
        IpAddr::V4(address) => [u32::from_ne_bytes(address.octets()), 0, 0, 0],
        IpAddr::V6(address) => {
            let octets = address.octets();
            std::array::from_fn(|word| u32::from_ne_bytes(std::array::from_fn(|byte| octets[word * 4 + byte])))
        }
    }
}

/// The opposite of [`words`].
pub fn address(words: [u32; 4], ipv6: bool) -> IpAddr {
    if ipv6 {
        let mut octets = [0; 16];
        for (place, word) in octets.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        IpAddr::from(octets)
    } else {
        IpAddr::from(words[0].to_ne_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::director::model::Family;

    const IPV4: &str = "10.0.0.205";
    const IPV6: &str = "2001:db8::205";

    fn target(address: &str, method: Method) -> Target {
        let address: IpAddr = address.parse().expect("an address");
        Target { address, port: 80, method, pool: 0, clients: Family::of(address) }
    }

    fn hop(address: &str, mac: Option<[u8; 6]>) -> Way {
        Way::Through(Hop {
            ifindex: 7,
            port_ifindex: 3,
            vlan: 42,
            mtu: 1500,
            source: [2, 0, 0, 0, 0, 1],
            next_hop: address.parse().expect("an address"),
            mac,
            preferred_source: Some(address.parse().expect("an address")),
            redirects: true,
        })
    }

    #[test]
    fn tunnels_take_what_ipvs_says() {
        let gue = Tunnel::Gue { port: 6080, checksum: TunnelChecksum::Remote };
        let gre = |checksum| Tunnel::Gre { checksum };
        let cases = [
            (IPV4, Method::Route, 1500),
            (IPV6, Method::Route, 1500),
            (IPV4, Method::Tunnel(Tunnel::Ipip), 1480),
            (IPV6, Method::Tunnel(Tunnel::Ipip), 1460),
            (IPV4, Method::Tunnel(gue), 1468),
            (IPV6, Method::Tunnel(gue), 1448),
            (IPV4, Method::Tunnel(gre(TunnelChecksum::None)), 1476),
            (IPV4, Method::Tunnel(gre(TunnelChecksum::Full)), 1472),
        ];
        for (address, method, expected) in cases {
            assert_eq!(mtu(1500, &target(address, method)), expected, "{method:?} to {address}");
        }
    }

    #[test]
    fn an_mtu_fits_its_field() {
        assert_eq!(mtu(65_536, &target(IPV4, Method::Route)), u16::MAX);
        assert_eq!(mtu(10, &target(IPV4, Method::Tunnel(Tunnel::Ipip))), 0);
    }

    #[test]
    fn a_known_next_hop_makes_a_server_ready() {
        let target = target(IPV4, Method::Route);
        let ready = server(&target, Some(&hop(IPV4, Some([2, 0, 0, 0, 2, 5]))));
        assert_eq!(ready.status, Status::Ready as u8);
        assert_eq!(ready.hop.link.map(u32::to_ne_bytes).concat(), [2, 0, 0, 0, 2, 5, 2, 0, 0, 0, 0, 1]);
        assert_eq!(ready.address[0].to_ne_bytes(), [10, 0, 0, 205]);
        assert_eq!(ready.port.to_ne_bytes(), [0, 80]);
        assert_eq!((ready.hop.ifindex, ready.hop.port_ifindex, ready.hop.vlan), (7, 3, 42));
        let unresolved = server(&target, Some(&hop(IPV4, None)));
        assert_eq!(unresolved.status, Status::Unresolved as u8);
        assert_eq!(server(&target, None).status, Status::NoRoute as u8);
        assert_eq!(server(&target, Some(&Way::Local)).status, Status::Local as u8);
    }

    #[test]
    fn a_tunnel_without_a_source_address_has_no_way() {
        let Way::Through(mut hop) = hop(IPV6, Some([2; 6])) else { unreachable!("made above") };
        hop.preferred_source = None;
        let way = Way::Through(hop);
        assert_eq!(server(&target(IPV6, Method::Tunnel(Tunnel::Ipip)), Some(&way)).status, Status::NoRoute as u8);
        assert_eq!(server(&target(IPV6, Method::Route), Some(&way)).status, Status::Ready as u8);
    }

    #[test]
    fn a_server_of_ipv4_is_mapped_for_clients_of_ipv6() {
        let fullnat = target(IPV4, Method::FullNat { toa: false });
        let same = server(&fullnat, Some(&hop(IPV4, Some([2; 6]))));
        assert_eq!((same.method, same.hop.mtu, server_address(&same)), (server::Method::FullNat as u8, 1500, fullnat.address));
        let crossing = Target { clients: Family::Ipv6, ..fullnat };
        let cross = server(&crossing, Some(&hop(IPV4, Some([2; 6]))));
        assert_eq!((cross.method, cross.hop.mtu, server_address(&cross)), (server::Method::Cross as u8, 1520, fullnat.address));
        assert_eq!(address(cross.address, true).to_string(), "::ffff:10.0.0.205");
    }

    #[test]
    fn addresses_come_back() {
        for text in [IPV4, IPV6] {
            let original: IpAddr = text.parse().expect("an address");
            assert_eq!(address(words(original), original.is_ipv6()), original);
        }
    }

    #[test]
    fn the_next_hop_has_its_own_family() {
        let entry = next_hop(Some(&hop(IPV6, None)));
        assert_eq!((entry.family, entry.address), (10, words(IPV6.parse().expect("an address"))));
        assert_eq!(next_hop(Some(&Way::NoRoute)), NextHop::default());
    }
}
