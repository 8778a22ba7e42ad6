//! What routers say about tunnels that are too wide for them.
//!
//! A tunnelled packet carries the director's address as its source, so a router on the way to a real server that cannot
//! pass it on reports to the director, not to the client. The packet path knows nothing of such reports; the daemon
//! listens to them ([`Reports`]) and narrows the way to the real server. The client's next packet that is too big is then
//! answered by the packet path, with the narrower MTU less the tunnel's own headers.
//!
//! ```text
//! router -> director: ICMP fragmentation needed, MTU 1400, about "10.0.0.204 > 10.0.0.205: IPIP"
//! client -> director: 1480 bytes, do not fragment
//! director -> client: ICMP fragmentation needed, MTU 1380
//! ```
//!
//! As the kernel does for its own routes, what was learned is forgotten after ten minutes ([`LIFETIME`]). Reports about
//! addresses that have no tunnel, and those below what IP guarantees, are not believed.
//!
//! Other errors about tunnels (unreachable, time exceeded) are not passed on to clients.

use std::{io, net::IpAddr, time::Duration};

use lb_common::{
    checksum,
    packet::{Bytes as _, Network, V4, V6, icmp::IcmpHeader, protocol},
};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use tokio::net::UdpSocket;

use super::way;

/// How long a report counts (the kernel's `mtu_expires`).
pub const LIFETIME: Duration = Duration::from_secs(600);
/// The smallest MTU that is believed: RFC 1191's plateau for real networks, and IPv6's minimum.
const SMALLEST_V4: u32 = 552;
const SMALLEST_V6: u32 = 1280;

/// A router's report: packets to this address must not be larger.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Report {
    /// The real server.
    pub address: IpAddr,
    /// Bytes, from the outer IP header.
    pub mtu: u32,
}

/// The two sockets that hear the ICMP errors of this network namespace.
pub struct Reports {
    v4: Option<UdpSocket>,
    v6: Option<UdpSocket>,
}

impl Reports {
    /// Begins to listen. A family whose socket cannot be opened stays unheard, which the log says.
    pub fn listen() -> Self {
        let open = |family, protocol| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let opened = socket(family, SockType::Raw, flags, protocol).map_err(io::Error::from);
            // Raw sockets read as datagram sockets do, and that is a type that tokio knows.
            let opened = opened.and_then(|socket| UdpSocket::from_std(socket.into()));
            opened
                .inspect_err(
                    |error| tracing::warn!(%error, ?family, "routers' reports about tunnels cannot be heard (CAP_NET_RAW)"),
                )
                .ok()
        };
        Self { v4: open(AddressFamily::Inet, SockProtocol::Icmp), v6: open(AddressFamily::Inet6, SockProtocol::IcmpV6) }
    }

    /// The next report about a tunnel.
    pub async fn next(&self) -> Report {
        loop {
            let report = tokio::select! {
                packet = receive(self.v4.as_ref()) => read_v4(&packet),
                packet = receive(self.v6.as_ref()) => read_v6(&packet),
            };
            if let Some(report) = report {
                return report;
            }
        }
    }
}

/// The next packet of a socket; never, without one.
async fn receive(socket: Option<&UdpSocket>) -> Vec<u8> {
    let Some(socket) = socket else { return std::future::pending().await };
    let mut buffer = vec![0; 2048];
    loop {
        match socket.recv(&mut buffer).await {
            Ok(length) => {
                buffer.truncate(length);
                return buffer;
            }
            Err(error) => tracing::debug!(%error, "an ICMP socket reports"),
        }
    }
}

/// Reads what a raw IPv4 socket hands over: the IP header, then ICMP.
fn read_v4(packet: &[u8]) -> Option<Report> {
    const FRAGMENTATION_NEEDED: (u8, u8) = (3, 4);
    let header = V4::parse(packet, 0).ok()?;
    let payload = V4::transport(packet, &header).ok()?;
    let icmp: IcmpHeader = packet.read(payload.offset)?;
    // Raw IPv4 sockets hear packets before the kernel has looked at their checksum.
    if checksum::fold(checksum::sum(packet.get(payload.offset..header.length)?)) != 0xffff {
        return None;
    }
    if (icmp.kind, icmp.code) != FRAGMENTATION_NEEDED {
        return None;
    }
    let mtu = u32::from_be(icmp.rest) & 0xffff;
    about_tunnel::<V4>(packet, payload.offset, |destination| way::address([destination, 0, 0, 0], false), mtu, SMALLEST_V4)
}

/// Reads what a raw `ICMPv6` socket hands over: ICMP alone.
fn read_v6(packet: &[u8]) -> Option<Report> {
    const PACKET_TOO_BIG: u8 = 2;
    let icmp: IcmpHeader = packet.read(0)?;
    if icmp.kind != PACKET_TOO_BIG {
        return None;
    }
    about_tunnel::<V6>(packet, 0, |destination| way::address(destination, true), u32::from_be(icmp.rest), SMALLEST_V6)
}

/// The destination of the quoted packet, if that is a tunnel's.
fn about_tunnel<N: Network>(
    packet: &[u8],
    icmp: usize,
    address: impl Fn(N::Address) -> IpAddr,
    mtu: u32,
    smallest: u32,
) -> Option<Report> {
    let (_, destination, quoted) = N::quoted(packet, icmp + size_of::<IcmpHeader>())?;
    let tunnelled = matches!(quoted.protocol, protocol::IPIP | protocol::IPV6 | protocol::GRE | protocol::UDP);
    (tunnelled && mtu >= smallest).then(|| Report { address: address(destination), mtu })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ICMP fragmentation needed with MTU 1400, from a router to 10.0.0.204, about its IPIP packet to 10.0.0.205.
    const NEEDED: [u8; 56] = [
        0x45, 0, 0, 56, 0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 207, 10, 0, 0, 204, // IP
        3, 4, 0x8d, 0x41, 0, 0, 0x05, 0x78, // ICMP
        0x45, 0, 0x05, 0xdc, 0, 0, 0x40, 0, 63, 4, 0, 0, 10, 0, 0, 204, 10, 0, 0, 205, // the quoted outer header
        0x45, 0, 0x05, 0xc8, 0, 0, 0x40, 0, // and what it carries
    ];

    fn with(changes: &[(usize, u8)]) -> Option<Report> {
        let mut packet = NEEDED;
        for (offset, value) in changes {
            packet[*offset] = *value;
        }
        packet[22..24].fill(0);
        let checksum = checksum::finish(checksum::sum(&packet[20..]));
        packet[22..24].copy_from_slice(&checksum.to_ne_bytes());
        read_v4(&packet)
    }

    #[test]
    fn a_report_names_the_real_server() {
        assert_eq!(read_v4(&NEEDED), with(&[]));
        assert_eq!(with(&[]), Some(Report { address: [10, 0, 0, 205].into(), mtu: 1400 }));
    }

    #[test]
    fn other_packets_are_no_reports() {
        assert_eq!(with(&[(21, 1)]), None, "host unreachable");
        assert_eq!(with(&[(37, 6)]), None, "about TCP");
        assert_eq!(with(&[(26, 0), (27, 68)]), None, "an MTU that no network has");
        assert_eq!(read_v4(&NEEDED[..30]), None, "cut off");
        let mut damaged = NEEDED;
        damaged[27] ^= 1;
        assert_eq!(read_v4(&damaged), None, "a wrong checksum");
    }

    #[test]
    fn ipv6_reports_have_no_ip_header() {
        let mut packet = vec![2, 0, 0, 0, 0, 0, 0x05, 0x50];
        packet.extend([0x60, 0, 0, 0, 0x05, 0xb4, 41, 63]);
        packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4]);
        packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]);
        assert_eq!(read_v6(&packet), Some(Report { address: "fd00::5".parse().expect("an address"), mtu: 1360 }));
        packet[0] = 1;
        assert_eq!(read_v6(&packet), None, "unreachable");
    }
}
