//! A director with one wire, whose far end is in our hands: raw frames go in, raw frames come out.
//!
//! | who | IPv4 | IPv6 | hardware address |
//! | --- | --- | --- | --- |
//! | clients, behind a router | 10.9.0.0/16 | `fd09::/64` | `02:00:00:00:01:fe` |
//! | VIPs | 10.99.0.0/16 | `fd99::/64` | `02:00:00:00:00:01` |
//! | director | 10.1.255.1 | `fd01::1:1` | `02:00:00:00:00:01` |
//! | real server NN | 10.1.0.NN | `fd01::NN` | `02:00:00:00:01:NN` |
//!
//! Nobody but the director exists: permanent neighbour entries give everybody else a hardware address, and what is sent to
//! it is ours to read.
//!
//! The wire keeps the order, and everything in the kernel happens while a frame is delivered, on the CPU that has sent it.
//! So when a last frame, which the director only routes, has come out, everything has that ever will: see [`Wire::exchange`].

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike as _, bind, recv, send, setsockopt, socket,
            sockopt,
        },
        time::TimeVal,
    },
};

use crate::{frame::Frame, netns::Namespace, wait};

/// The hardware address of the director.
const DIRECTOR: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// What the hardware addresses of all others begin with; then comes the host's number.
const HOSTS: [u8; 5] = [2, 0, 0, 0, 1];
/// The host to which the director routes the last frame of an exchange.
const LAST: u8 = 253;
/// The router before the clients.
const ROUTER: u8 = 254;

/// A director's namespace, and the far end of its wire.
#[derive(Debug)]
pub struct Wire {
    /// The director.
    pub director: Namespace,
    /// Holds the wire's far end.
    _outside: Namespace,
    socket: OwnedFd,
}

/// Both ends of a packet, by which an answer is told from others.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Flow {
    /// Whose packet it is.
    pub client: SocketAddr,
    /// To what it was sent.
    pub vip: SocketAddr,
}

/// What came out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Sight {
    /// The packet, on its way to this real server.
    Forwarded(Flow, u8),
    /// "Port unreachable" about the packet.
    Refused(Flow),
    /// The director's own stack has answered the packet.
    Stack(Flow),
}

impl Wire {
    /// Makes director and wire. Whoever balances in the director is not there yet.
    pub fn new() -> Result<Self> {
        let (director, outside) = (Namespace::new("director")?, Namespace::new("outside")?);
        // Nothing but our frames shall be on the wire.
        outside.sysctl(&[("net.ipv6.conf.default.disable_ipv6", "1")])?;
        director.connect("eth0", &outside, "eth0")?;
        let mut commands = "link set eth0 address 02:00:00:00:00:01
            addr add 10.1.255.1/16 dev eth0
            addr add fd01::1:1/64 dev eth0 nodad
            route add local 10.99.0.0/16 dev lo
            route add local fd99::/64 dev lo
            route add 10.9.0.0/16 via 10.1.0.254
            route add fd09::/64 via fd01::fe
            "
        .to_owned();
        for number in 1..=ROUTER {
            for address in
                [IpAddr::from(Ipv4Addr::new(10, 1, 0, number)), Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, number.into()).into()]
            {
                writeln!(commands, "neigh add {address} lladdr 02:00:00:00:01:{number:02x} dev eth0 nud permanent")?;
            }
        }
        director.ip(&commands)?;
        director.sysctl(&[
            ("net.ipv4.ip_forward", "1"),
            ("net.ipv6.conf.all.forwarding", "1"),
            ("net.ipv4.conf.all.send_redirects", "0"),
            ("net.ipv4.conf.eth0.send_redirects", "0"),
            // Every refusal is to be heard.
            ("net.ipv4.icmp_ratemask", "0"),
            ("net.ipv6.icmp.ratelimit", "0"),
        ])?;
        let socket = outside.enter(|| raw_socket("eth0"))?;
        Ok(Self { director, _outside: outside, socket })
    }

    /// Sends frames one after the other, and returns what the director made of them. Stay on one CPU meanwhile.
    pub fn exchange(&self, frames: &[Frame]) -> Result<Vec<Sight>> {
        let last = Frame::udp("10.9.255.254:9".parse()?, SocketAddr::new(Ipv4Addr::new(10, 1, 0, LAST).into(), 9));
        let mut sights = Vec::new();
        for frame in frames.iter().chain([&last]) {
            let mut bytes = frame.build();
            bytes[..6].copy_from_slice(&DIRECTOR);
            bytes[6..11].copy_from_slice(&HOSTS);
            bytes[11] = ROUTER;
            send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty()).context("send a frame to the director")?;
        }
        let begin = Instant::now();
        loop {
            let mut frame = [0; 2048];
            match recv(self.socket.as_raw_fd(), &mut frame, MsgFlags::empty()) {
                Ok(length) => match sight(&frame[..length]) {
                    Some(Sight::Forwarded(_, LAST)) => return Ok(sights),
                    other => sights.extend(other),
                },
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => return Err(error).context("receive a frame from the director"),
            }
            ensure!(begin.elapsed() < wait::SOON, "the director does not even route; it has sent {sights:?}");
        }
    }
}

/// A socket that sends and receives whole frames by an interface of this thread's namespace.
pub(crate) fn raw_socket(interface: &str) -> Result<OwnedFd> {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        .context("open a packet socket, which needs root")?;
    let addresses = getifaddrs()?.filter(|address| address.interface_name == interface).filter_map(|address| address.address);
    let link = addresses.into_iter().find(|address| address.family() == Some(AddressFamily::Packet));
    let link = link.with_context(|| format!("there is no interface {interface}"))?;
    bind(socket.as_raw_fd(), &link).with_context(|| format!("bind a packet socket to {interface}"))?;
    // A full round comes out before the first frame of it is read.
    setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20)).context("make room for received frames")?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 100_000)).context("limit the wait for a frame")?;
    Ok(socket)
}

/// What a frame tells, if it is about a packet of ours.
fn sight(frame: &[u8]) -> Option<Sight> {
    // Not what the director says to groups of hosts on its own behalf.
    let receiver = *frame.strip_prefix(&HOSTS)?.first()?;
    let packet = frame.get(14..)?;
    let (protocol, payload) = if packet.first()? >> 4 == 4 {
        (*packet.get(9)?, packet.get(usize::from(packet[0] & 15) * 4..)?)
    } else {
        (*packet.get(6)?, packet.get(40..)?)
    };
    match (protocol, payload.first_chunk()?) {
        (1, [3, 3]) | (58, [1, 4]) => Some(Sight::Refused(flow(payload.get(8..)?)?)),
        (1 | 58, _) => None,
        _ if receiver == ROUTER => {
            let Flow { client: vip, vip: client } = flow(packet)?;
            Some(Sight::Stack(Flow { client, vip }))
        }
        _ => Some(Sight::Forwarded(flow(packet)?, receiver)),
    }
}

/// Both ends of a packet without options or extension headers, which ours have not.
fn flow(packet: &[u8]) -> Option<Flow> {
    let port = |at: usize| Some(u16::from_be_bytes(*packet.get(at..)?.first_chunk()?));
    if packet.first()? >> 4 == 4 {
        let address = |at: usize| Some(IpAddr::from(*packet.get(at..)?.first_chunk::<4>()?));
        Some(Flow { client: (address(12)?, port(20)?).into(), vip: (address(16)?, port(22)?).into() })
    } else {
        let address = |at: usize| Some(IpAddr::from(*packet.get(at..)?.first_chunk::<16>()?));
        Some(Flow { client: (address(8)?, port(40)?).into(), vip: (address(24)?, port(42)?).into() })
    }
}
