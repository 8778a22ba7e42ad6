//! What messages leave and come by: a UDP socket of one interface.
//!
//! Both ends are bound to the interface, so that no route is needed for the group, and nothing is heard from elsewhere. They
//! are made in the network namespace of the thread that makes them, which is the one that the daemon serves.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use nix::{
    net::if_::if_nametoindex,
    sys::socket::{setsockopt, sockopt::RcvBufForce},
};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};
use tokio::net::UdpSocket;

use crate::director::model::{SyncDaemon, SyncRole};

/// Bytes of messages that may wait for a backup: what a master sends in one go.
const BACKLOG: usize = 8 << 20;

/// Bytes of IP and UDP headers.
const IPV4_HEADERS: u32 = 28;
const IPV6_HEADERS: u32 = 48;

/// The packets that every link can carry, as a master takes for granted.
const USUAL_MTU: u32 = 1500;
/// A backup hears messages up to this size at least.
const SHORTEST_HEARD: u16 = 1024;
const LONGEST_PACKET: u32 = u16::MAX as u32;

/// Opens the socket of a synchronisation daemon. Needs a tokio runtime around it.
pub fn open(daemon: &SyncDaemon) -> io::Result<UdpSocket> {
    let index = if_nametoindex(daemon.interface.as_str())?;
    let domain = if daemon.group.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    socket.bind_device(Some(daemon.interface.as_bytes()))?;
    let group = SocketAddr::new(daemon.group, daemon.port);
    match daemon.role {
        SyncRole::Master => {
            match daemon.group {
                IpAddr::V4(_) => {
                    socket.set_multicast_loop_v4(false)?;
                    socket.set_multicast_ttl_v4(daemon.ttl.into())?;
                    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)).into())?;
                }
                IpAddr::V6(_) => {
                    socket.set_multicast_loop_v6(false)?;
                    socket.set_multicast_hops_v6(daemon.ttl.into())?;
                    socket.set_multicast_if_v6(index)?;
                    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)).into())?;
                }
            }
            socket.connect(&group.into())?;
        }
        SyncRole::Backup => {
            socket.set_reuse_address(true)?;
            setsockopt(&socket, RcvBufForce, &BACKLOG)?;
            socket.bind(&group.into())?;
            match daemon.group {
                IpAddr::V4(group) => socket.join_multicast_v4_n(&group, &InterfaceIndexOrAddress::Index(index))?,
                IpAddr::V6(group) => socket.join_multicast_v6(&group, index)?,
            }
        }
    }
    UdpSocket::from_std(socket.into())
}

/// The largest message of a daemon on an interface with this MTU: as asked for, or as suits it.
pub fn max_length(daemon: &SyncDaemon, mtu: u32) -> u16 {
    let headers = if daemon.group.is_ipv4() { IPV4_HEADERS } else { IPV6_HEADERS };
    let (least, mtu) = match daemon.role {
        SyncRole::Master => (1, USUAL_MTU),
        SyncRole::Backup => (SHORTEST_HEARD, mtu.clamp(USUAL_MTU, LONGEST_PACKET)),
    };
    match daemon.max_length {
        0 => (mtu - headers) as u16,
        asked => asked.clamp(least, (LONGEST_PACKET - headers) as u16),
    }
}

#[cfg(test)]
mod tests {
    use SyncRole::{Backup, Master};

    use super::*;

    #[test]
    fn messages_are_as_long_as_with_ipvs() {
        let daemon = |role, group: &str, max_length| SyncDaemon {
            group: group.parse().expect("an address"),
            max_length,
            ..SyncDaemon::new(role, "eth0".to_owned())
        };
        for (role, group, asked, mtu, expected) in [
            (Master, "224.0.0.81", 0, 1500, 1472),
            (Master, "224.0.0.81", 0, 9000, 1472),
            (Master, "ff02::99", 0, 1500, 1452),
            (Master, "224.0.0.81", 1, 1500, 1),
            (Backup, "224.0.0.81", 0, 9000, 8972),
            (Backup, "224.0.0.81", 0, 65_536, 65_507),
            (Backup, "ff02::99", 0, 576, 1452),
            (Backup, "224.0.0.81", 1, 1500, 1024),
            (Backup, "ff02::99", 65_507, 1500, 65_487),
        ] {
            assert_eq!(max_length(&daemon(role, group, asked), mtu), expected, "{role} {group} {asked} {mtu}");
        }
    }

    #[tokio::test]
    async fn an_interface_that_is_not_there_is_an_error() {
        for role in SyncRole::ALL {
            let error = open(&SyncDaemon::new(role, "nosuch0".to_owned())).expect_err("there is none");
            assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        }
    }
}
