//! A director with two wires, whose far ends are in our hands.
//!
//! | who | IPv4 | IPv6 | wire |
//! | --- | --- | --- | --- |
//! | clients, behind a router | 10.9.0.0/17 | `fd09::/64` | `eth0` |
//! | clients that a narrow way leads to | 10.9.128.0/17 | `fd09:0:0:1::/64` | `eth0` |
//! | VIP | 10.99.0.1 | `fd99::1` | |
//! | director | 10.1.255.1, 10.2.255.1 | `fd01::1:1`, `fd02::1:1` | both |
//! | real server N | 10.2.0.N | `fd02::N` | `eth1` |
//!
//! As on [`differential::wire`](crate::differential::wire), nobody but the director exists, and when a last frame that it only
//! routes has come out, everything has that ever will.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv, send},
};
use serde::{Deserialize, Serialize};

use crate::{differential::wire::raw_socket, frame::Frame, lab::Family, netns::Namespace, wait};

/// A side of the director.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Side {
    Client,
    Server,
}

impl Side {
    const ALL: [Self; 2] = [Self::Client, Self::Server];

    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }

    /// The director's hardware address on this side.
    const fn director(self) -> [u8; 6] {
        [2, 0, 0, 0, 0, 1 + self as u8]
    }

    /// The hardware address of everybody on this side.
    const fn others(self) -> [u8; 6] {
        [2, 0, 0, 0, 1, 1 + self as u8]
    }
}

/// The largest packet that a narrow way takes.
pub const NARROW: u32 = 1300;

/// The virtual address.
pub fn vip(family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => Ipv4Addr::new(10, 99, 0, 1).into(),
        Family::Ipv6 => Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 1).into(),
    }
}

/// A client's address.
pub fn client(family: Family, number: u16, narrow: bool) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    match family {
        Family::Ipv4 => Ipv4Addr::new(10, 9, high & 0x7f | if narrow { 0x80 } else { 0 }, low).into(),
        Family::Ipv6 => Ipv6Addr::new(0xfd09, 0, 0, narrow.into(), 0, 0, 0, number).into(),
    }
}

/// A real server's address.
pub fn server(family: Family, number: u8) -> IpAddr {
    match family {
        Family::Ipv4 => Ipv4Addr::new(10, 2, 0, number).into(),
        Family::Ipv6 => Ipv6Addr::new(0xfd02, 0, 0, 0, 0, 0, 0, number.into()).into(),
    }
}

/// Numbers of real servers that exist; those from [`NARROW_SERVERS`] on are behind a narrow way.
pub const SERVERS: u8 = 16;
/// The first real server behind a narrow way.
pub const NARROW_SERVERS: u8 = 9;
/// The real server to which the last frame goes.
const LAST: u8 = 253;

/// A director's namespace, and the far ends of its wires.
#[derive(Debug)]
pub struct Wires {
    /// The director.
    pub director: Namespace,
    /// Holds the far ends, `eth0` and `eth1`.
    pub outside: Namespace,
    sockets: [OwnedFd; 2],
}

impl Wires {
    /// Makes director and wires. Whoever balances in the director is not there yet.
    pub fn new() -> Result<Self> {
        let (director, outside) = (Namespace::new("director")?, Namespace::new("outside")?);
        // Nothing but our frames shall be on the wires.
        outside.sysctl(&[("net.ipv6.conf.default.disable_ipv6", "1")])?;
        director.connect("eth0", &outside, "eth0")?;
        director.connect("eth1", &outside, "eth1")?;
        let mut commands = format!(
            "link set eth0 address 02:00:00:00:00:01
            link set eth1 address 02:00:00:00:00:02
            addr add 10.1.255.1/16 dev eth0
            addr add fd01::1:1/64 dev eth0 nodad
            addr add 10.2.255.1/16 dev eth1
            addr add fd02::1:1/64 dev eth1 nodad
            neigh add 10.1.0.254 lladdr 02:00:00:00:01:01 dev eth0 nud permanent
            neigh add fd01::fe lladdr 02:00:00:00:01:01 dev eth0 nud permanent
            addr add 10.99.0.1/32 dev lo
            addr add fd99::1/128 dev lo nodad
            route add 10.9.0.0/17 via 10.1.0.254
            route add 10.9.128.0/17 via 10.1.0.254 mtu lock {NARROW}
            route add fd09::/64 via fd01::fe
            route add fd09:0:0:1::/64 via fd01::fe mtu lock {NARROW}
            "
        );
        for number in (1..=SERVERS).chain([LAST]) {
            for family in Family::ALL {
                let address = server(family, number);
                writeln!(commands, "neigh add {address} lladdr 02:00:00:00:01:02 dev eth1 nud permanent")?;
                if number >= NARROW_SERVERS && number != LAST {
                    let prefix = if family == Family::Ipv4 { 32 } else { 128 };
                    writeln!(commands, "route add {address}/{prefix} dev eth1 mtu lock {NARROW}")?;
                }
            }
        }
        director.ip(&commands)?;
        for interface in ["eth0", "eth1"] {
            // No checksum is left to a device that has nothing to do it with.
            director.run("ethtool", ["-K", interface, "tx", "off"])?;
        }
        director.sysctl(&[
            ("net.ipv4.ip_forward", "1"),
            ("net.ipv6.conf.all.forwarding", "1"),
            ("net.ipv4.conf.all.send_redirects", "0"),
            ("net.ipv4.conf.eth0.send_redirects", "0"),
            ("net.ipv4.conf.eth1.send_redirects", "0"),
            // Every error is to be heard.
            ("net.ipv4.icmp_ratemask", "0"),
            ("net.ipv6.icmp.ratelimit", "0"),
        ])?;
        let (client, server) = outside.enter(|| anyhow::Ok((raw_socket("eth0")?, raw_socket("eth1")?)))?;
        Ok(Self { director, outside, sockets: [client, server] })
    }

    /// Sends frames one after the other, and returns the packets that came out, by side. Stay on one CPU meanwhile.
    pub fn exchange(&self, from: Side, frames: &[Vec<u8>]) -> Result<[Vec<Vec<u8>>; 2]> {
        for frame in frames {
            self.send(from, frame)?;
        }
        let (near, far) = (client(Family::Ipv4, u16::MAX, false), server(Family::Ipv4, LAST));
        self.send(Side::Client, &Frame::udp((near, 9).into(), (far, 9).into()).build())?;
        let to_server = self.receive(Side::Server, true)?;
        Ok([self.receive(Side::Client, false)?, to_server])
    }

    fn send(&self, from: Side, frame: &[u8]) -> Result<()> {
        let frame = [&from.director(), &from.others(), &frame[12..]].concat();
        send(self.sockets[from as usize].as_raw_fd(), &frame, MsgFlags::empty()).context("send a frame to the director")?;
        Ok(())
    }

    /// All packets up to the last one, or all that are there.
    fn receive(&self, side: Side, up_to_last: bool) -> Result<Vec<Vec<u8>>> {
        let flags = if up_to_last { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
        let begin = Instant::now();
        let mut packets = Vec::new();
        let mut buffer = [0; 2048];
        loop {
            match recv(self.sockets[side as usize].as_raw_fd(), &mut buffer, flags) {
                // Not what the director says to groups of hosts on its own behalf.
                Ok(length) if length > 14 + 20 && buffer[..6] == side.others() => {
                    ensure!(buffer[6..12] == side.director(), "a frame of somebody else came out: {:02x?}", &buffer[..length]);
                    let packet = &buffer[14..length];
                    // Ports 9, as nobody else has them.
                    if packet[0] == 0x45 && packet[9] == 17 && packet[20..24] == [0, 9, 0, 9] {
                        return Ok(packets);
                    }
                    packets.push(packet.to_vec());
                }
                Err(Errno::EAGAIN) if !up_to_last => return Ok(packets),
                Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => return Err(error).context("receive a frame from the director"),
            }
            ensure!(begin.elapsed() < wait::SOON, "the director does not even route to the {side:?}; it has sent {packets:02x?}");
        }
    }
}

const _: () = assert!(Side::ALL[0] as usize == 0 && Side::ALL[1] as usize == 1, "sockets are found by their side");
