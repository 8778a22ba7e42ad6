//! A director on its own, for running frames through its loaded programs.
//!
//! One namespace with one wire. The addresses are those of the recordings in `tests/data/ipvs-vectors.json`:
//!
//! | who | IPv4 | IPv6 |
//! | --- | --- | --- |
//! | client | 10.9.0.2 | `fd09::2` |
//! | virtual address | 10.99.0.1 | `fd99::1` |
//! | real servers | 10.1.0.1, 10.1.0.2 | `fd01::1`, `fd01::2` |
//! | director | 10.1.255.1 | `fd01::1:1` |
//!
//! Nobody lives at these addresses: permanent neighbour entries make them reachable, as far as bpfvs can see, and a test run
//! sends nothing.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{bpfvs::Bpfvs, lab::Family, netns::Namespace, test_run::Pinned};

/// The hardware addresses of the two real servers.
pub const SERVER_MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 1, 1], [2, 0, 0, 0, 1, 2]];

/// The hardware address of the router towards the clients.
pub const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 1, 0xfe];

/// The MTU of the wire.
pub const MTU: u16 = 1500;

/// A director whose programs are run on single frames.
#[derive(Debug)]
pub struct Bench {
    /// The daemon. First, because it has to go before its namespace does.
    pub bpfvs: Bpfvs,
    /// Its programs and maps.
    pub pinned: Pinned,
    /// The director.
    pub director: Namespace,
    /// The hardware address of its one interface.
    pub director_mac: [u8; 6],
}

/// The addresses of one family, as text.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names are the project's words")]
pub struct Addresses {
    pub client: &'static str,
    pub vip: &'static str,
    pub servers: [&'static str; 2],
    pub director: &'static str,
    /// A host of the servers' net that does not answer for its address.
    pub silent_server: &'static str,
    /// An address to which there is no route.
    pub unroutable: &'static str,
    /// An address that nobody balances.
    pub foreign: &'static str,
}

impl Addresses {
    /// Those of a family.
    pub const fn of(family: Family) -> Self {
        match family {
            Family::Ipv4 => Self {
                client: "10.9.0.2",
                vip: "10.99.0.1",
                servers: ["10.1.0.1", "10.1.0.2"],
                director: "10.1.255.1",
                silent_server: "10.1.0.77",
                unroutable: "203.0.113.1",
                foreign: "10.99.0.2",
            },
            Family::Ipv6 => Self {
                client: "fd09::2",
                vip: "fd99::1",
                servers: ["fd01::1", "fd01::2"],
                director: "fd01::1:1",
                silent_server: "fd01::77",
                unroutable: "2001:db8::1",
                foreign: "fd99::2",
            },
        }
    }
}

/// An address of the bench, with a port.
///
/// # Panics
/// If the text is no address.
pub fn socket(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().expect("the bench's addresses are well-formed"), port)
}

/// An address as `ipvsadm` wants it: brackets around IPv6.
pub fn bracketed(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

impl Bench {
    /// Makes the namespace and starts the daemon in it.
    pub fn new(arguments: &[&str]) -> Result<Self> {
        let director = Namespace::new("bench")?;
        director.ip("link add eth0 type veth peer name far
             link set eth0 up
             link set far up
             addr add 10.1.255.1/16 dev eth0
             addr add fd01::1:1/64 dev eth0 nodad
             addr add 10.99.0.1/32 dev lo
             addr add fd99::1/128 dev lo nodad
             route add 10.9.0.0/24 via 10.1.0.254
             route add fd09::/64 via fd01::fe
             neigh add 10.1.0.1 lladdr 02:00:00:00:01:01 dev eth0 nud permanent
             neigh add 10.1.0.2 lladdr 02:00:00:00:01:02 dev eth0 nud permanent
             neigh add 10.1.0.254 lladdr 02:00:00:00:01:fe dev eth0 nud permanent
             neigh add fd01::1 lladdr 02:00:00:00:01:01 dev eth0 nud permanent
             neigh add fd01::2 lladdr 02:00:00:00:01:02 dev eth0 nud permanent
             neigh add fd01::fe lladdr 02:00:00:00:01:fe dev eth0 nud permanent")?;
        director.sysctl(&[("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1")])?;
        let mut all = vec!["--interface", "eth0", "--hook", "xdp"];
        all.extend(arguments);
        let bpfvs = Bpfvs::start(&director, &all)?;
        let pinned = Pinned::open(bpfvs.pins())?;
        let director_mac = director.mac("eth0")?;
        Ok(Self { bpfvs, pinned, director, director_mac })
    }

    /// How many templates lead to each real server, in the order in which they are listed. That none is listed is an error.
    pub fn template_counts(&self) -> Result<Vec<u32>> {
        let listed = self.bpfvs.ipvsadm("-Ln --persistent-conn")?;
        let (_, servers) = listed.split_once("-> RemoteAddress").with_context(|| format!("no title in {listed}"))?;
        let count = |line: &str| line.split_whitespace().nth(3).and_then(|count| count.parse().ok());
        let counts = servers
            .lines()
            .filter(|line| line.contains("->"))
            .map(|line| count(line).with_context(|| format!("{line} has no number of templates")))
            .collect::<Result<Vec<_>>>()?;
        ensure!(!counts.is_empty(), "no real server is listed: {listed}");
        Ok(counts)
    }

    /// The index of the real server with this address, in whatever service has it first.
    pub fn server_index(&self, address: &str) -> Result<u32> {
        self.find_server(address, |_| true)
    }

    /// The same for one with a port, too.
    pub fn server_index_at(&self, address: &str, port: u16) -> Result<u32> {
        self.find_server(address, |server| server["port"] == port)
    }

    fn find_server(&self, address: &str, fits: impl Fn(&Value) -> bool) -> Result<u32> {
        let wanted: IpAddr = address.parse()?;
        let services = self.bpfvs.get("/v1/services")?;
        let mut servers = services.as_array().into_iter().flatten().filter_map(|service| service["servers"].as_array()).flatten();
        let is_wanted = |server: &Value| server["address"].as_str().is_some_and(|text| text.parse() == Ok(wanted));
        let found = servers.find(|server| is_wanted(server) && fits(server));
        let index =
            found.and_then(|server| server["index"].as_u64()).with_context(|| format!("no server {address} in {services:#}"))?;
        Ok(u32::try_from(index)?)
    }
}
