//! The network layouts that LVS how-to's teach, as namespaces: client, router, director, real servers.
//!
//! | layout | client | virtual address | real servers |
//! | --- | --- | --- | --- |
//! | [`Layout::OneSegment`] | behind the router | in the director's own net | in the same segment |
//! | [`Layout::SeveralSegments`] | behind the router | in a net that only the router sends to the director | in the same segment |
//! | [`Layout::Tunnel`] | behind the router | in the director's own net | in a segment of their own, behind the router |
//! | [`Layout::TwoArmed`] | beside the director | routed to the director by the client | behind the director |
//! | [`Layout::Masquerade`] | beside the director | the director's outer one, 192.168.74.204 | behind the director, their gateway |
//!
//! Every host has an IPv4 and an IPv6 address. The cables are veth pairs to bridges, which stand in a namespace of their
//! own; every host's interface is called `eth0`, a second one `eth1`.
//!
//! ```text
//!                       192.168.74.0/24             10.0.0.0/24
//! client 192.168.74.12 ──── outside ──── router ──── inside ──┬── director 10.0.0.204
//!                                  .207      10.0.0.207       ├── rs1 10.0.0.205
//!                                                             └── rs2 10.0.0.206 …
//! ```
//!
//! What is not here: real servers do not listen on anything, and the virtual address is not on them, until the test says
//! so ([`Lab::add_vip_to_servers`], or `bpfvs realserver setup`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use crate::{netns::Namespace, pass::PassProgram};

/// Which layout.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Layout {
    /// Direct routing; the virtual address belongs to the segment of director and real servers.
    OneSegment,
    /// Direct routing; the virtual address has a net of its own.
    SeveralSegments,
    /// Real servers that only a tunnel reaches.
    Tunnel,
    /// The director stands between clients and real servers.
    TwoArmed,
    /// The same; clients know the director's outer address only, and real servers know nothing of it.
    Masquerade,
}

/// An IP version.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "the names are the versions' own")]
pub enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ipv4, Self::Ipv6];
}

/// On which interface of the director the virtual addresses are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum VipPlace {
    /// On `lo`, as /32. IPv6 answers no neighbour solicitation for such an address, so the IPv6 one goes to `eth0` where
    /// others in the segment ask for it.
    Loopback,
    /// On `eth0`.
    Interface,
}

/// Whether network cards (here: veth devices) do the work of checksums and segmentation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Offloads {
    /// As they come up: checksums left out, TCP segments of up to 64 KiB.
    On,
    /// Every packet as it would be on a cable.
    Off,
}

/// An IPv4 address and its IPv6 twin.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Twins {
    /// The IPv4 address.
    pub ipv4: Ipv4Addr,
    /// Its twin.
    pub ipv6: Ipv6Addr,
}

impl Twins {
    /// The twin of this family.
    pub const fn of(self, family: Family) -> IpAddr {
        match family {
            Family::Ipv4 => IpAddr::V4(self.ipv4),
            Family::Ipv6 => IpAddr::V6(self.ipv6),
        }
    }
}

/// A net: its IPv4 prefix and its IPv6 twin, both with hosts numbered alike.
#[derive(Clone, Copy, Debug)]
struct Net {
    ipv4: [u8; 3],
    ipv6: u16,
}

impl Net {
    const fn host(self, number: u8) -> Twins {
        let [a, b, c] = self.ipv4;
        Twins {
            ipv4: Ipv4Addr::new(a, b, c, number),
            // fd00:<net>::<number>, the number as one reads it: .204 is ::204.
            ipv6: Ipv6Addr::new(0xfd00, self.ipv6, 0, 0, 0, 0, 0, read_as_hexadecimal(number)),
        }
    }
}

/// The number whose hexadecimal digits are the decimal digits of this one.
const fn read_as_hexadecimal(number: u8) -> u16 {
    let number = number as u16;
    (number / 100) << 8 | (number / 10 % 10) << 4 | (number % 10)
}

const OUTSIDE: Net = Net { ipv4: [192, 168, 74], ipv6: 0x74 };
const INSIDE: Net = Net { ipv4: [10, 0, 0], ipv6: 0x10 };
const VIRTUAL: Net = Net { ipv4: [192, 168, 10], ipv6: 0xa };
const FAR: Net = Net { ipv4: [10, 0, 1], ipv6: 0x11 };

/// The namespaces of a layout, wired.
#[derive(Debug)]
pub struct Lab {
    /// Which layout.
    pub layout: Layout,
    /// The client.
    pub client: Namespace,
    /// The router; in [`Layout::TwoArmed`] and [`Layout::Masquerade`] there is none.
    pub router: Option<Namespace>,
    /// The director.
    pub director: Namespace,
    /// The real servers.
    pub servers: Vec<Namespace>,
    /// The bridges.
    pub switches: Namespace,
    /// The virtual address.
    pub vip: Twins,
    /// The client's address.
    pub client_address: Twins,
    /// The director's inner address.
    pub director_address: Twins,
    /// The real servers' addresses.
    pub server_addresses: Vec<Twins>,
}

impl Lab {
    /// Wires a layout with so many real servers, the virtual address on the director's loopback.
    pub fn new(layout: Layout, servers: u8) -> Result<Self> {
        Self::with_vip_on(layout, servers, VipPlace::Loopback)
    }

    /// Wires a layout and says where on the director the virtual address is.
    pub fn with_vip_on(layout: Layout, servers: u8, place: VipPlace) -> Result<Self> {
        let server_net = if layout == Layout::Tunnel { FAR } else { INSIDE };
        let mut lab = Self {
            layout,
            client: Namespace::new("client")?,
            router: if matches!(layout, Layout::TwoArmed | Layout::Masquerade) { None } else { Some(Namespace::new("router")?) },
            director: Namespace::new("director")?,
            servers: (1..=servers).map(|number| Namespace::new(&format!("rs{number}"))).collect::<Result<_>>()?,
            switches: Namespace::new("switches")?,
            vip: match layout {
                Layout::SeveralSegments => VIRTUAL.host(204),
                Layout::Masquerade => OUTSIDE.host(204),
                _ => INSIDE.host(200),
            },
            client_address: OUTSIDE.host(12),
            director_address: INSIDE.host(204),
            // 10.0.0.205, .206, then .208: .207 is the router.
            server_addresses: [205, 206, 208, 209, 210, 211].into_iter().take(servers.into()).map(|n| server_net.host(n)).collect(),
        };
        lab.switches.ip("link add outside type bridge\nlink add inside type bridge\nlink add far type bridge\nlink set outside up\nlink set inside up\nlink set far up")?;
        lab.wire()?;
        lab.place_vip(place)?;
        Ok(lab)
    }

    fn wire(&mut self) -> Result<()> {
        let near_director = self.director_address;
        self.plug(&self.client, "eth0", "outside", "client", self.client_address)?;
        self.plug(&self.director, "eth0", "inside", "director", near_director)?;
        self.director.sysctl(&FORWARDING)?;
        let gateway = if let Some(router) = &self.router {
            let (outside, inside) = (OUTSIDE.host(207), INSIDE.host(207));
            self.plug(router, "eth0", "inside", "router-in", inside)?;
            self.plug(router, "eth1", "outside", "router-out", outside)?;
            router.sysctl(&FORWARDING)?;
            // A router that redirects the client's packets would tell it about a net where it does not live.
            router.sysctl(&[("net.ipv4.conf.all.send_redirects", "0"), ("net.ipv4.conf.eth0.send_redirects", "0")])?;
            default_route(&self.client, outside)?;
            default_route(&self.director, inside)?;
            if self.layout == Layout::SeveralSegments {
                route(router, self.vip, near_director)?;
            }
            if self.layout == Layout::Tunnel {
                self.plug(router, "eth2", "far", "router-far", FAR.host(207))?;
                FAR.host(207)
            } else {
                inside
            }
        } else if self.layout == Layout::Masquerade {
            self.plug(&self.director, "eth1", "outside", "director-out", self.vip)?;
            near_director
        } else {
            let outside = OUTSIDE.host(207);
            self.plug(&self.director, "eth1", "outside", "director-out", outside)?;
            default_route(&self.client, outside)?;
            // The real servers' answers come from an address that the director has itself.
            self.director.sysctl(&[("net.ipv4.conf.all.accept_local", "1"), ("net.ipv4.conf.eth0.accept_local", "1")])?;
            near_director
        };
        let bridge = if self.layout == Layout::Tunnel { "far" } else { "inside" };
        for (number, (server, address)) in self.servers.iter().zip(&self.server_addresses).enumerate() {
            self.plug(server, "eth0", bridge, &format!("rs{}", number + 1), *address)?;
            default_route(server, gateway)?;
        }
        Ok(())
    }

    /// Plugs a host's new interface into a bridge and gives it an address.
    fn plug(&self, host: &Namespace, interface: &str, bridge: &str, port: &str, address: Twins) -> Result<()> {
        host.connect(interface, &self.switches, port)?;
        self.switches.ip(&format!("link set {port} master {bridge}"))?;
        host.ip(&format!("addr add {}/24 dev {interface}\naddr add {}/64 dev {interface} nodad", address.ipv4, address.ipv6))
    }

    fn place_vip(&self, place: VipPlace) -> Result<()> {
        if self.layout == Layout::Masquerade {
            return Ok(());
        }
        let ipv4_device = if place == VipPlace::Loopback { "lo" } else { "eth0" };
        let asked_for = matches!(self.layout, Layout::OneSegment | Layout::Tunnel);
        let ipv6_device = if asked_for { "eth0" } else { ipv4_device };
        // A preferred lifetime of 0, as keepalived has it: else the director would talk to real servers from this address,
        // which is their own.
        self.director.ip(&format!(
            "addr add {}/32 dev {ipv4_device}\naddr add {}/128 dev {ipv6_device} nodad preferred_lft 0",
            self.vip.ipv4, self.vip.ipv6
        ))
    }

    /// Puts the virtual address on every real server's loopback, silent on ARP, as each how-to for direct routing says.
    pub fn add_vip_to_servers(&self) -> Result<()> {
        for server in &self.servers {
            server.sysctl(&[
                ("net.ipv4.conf.all.arp_ignore", "1"),
                ("net.ipv4.conf.all.arp_announce", "2"),
                ("net.ipv4.conf.lo.arp_ignore", "1"),
                ("net.ipv4.conf.lo.arp_announce", "2"),
            ])?;
            server.ip(&format!("addr add {}/32 dev lo\naddr add {}/128 dev lo nodad", self.vip.ipv4, self.vip.ipv6))?;
        }
        Ok(())
    }

    /// Another director beside the first, without the virtual addresses; in [`Layout::Masquerade`] it is nobody's gateway.
    pub fn second_director(&self) -> Result<Namespace> {
        let second = Namespace::new("second")?;
        self.plug(&second, "eth0", "inside", "second", INSIDE.host(203))?;
        if self.layout == Layout::Masquerade {
            self.plug(&second, "eth1", "outside", "second-out", OUTSIDE.host(203))?;
        } else if self.router.is_some() {
            default_route(&second, INSIDE.host(207))?;
        }
        second.sysctl(&FORWARDING)?;
        second.sysctl(&[("net.ipv4.conf.all.send_redirects", "0"), ("net.ipv4.conf.eth0.send_redirects", "0")])?;
        Ok(second)
    }

    /// Takes the addresses that clients and real servers know from the first director, and gives them to the second, as a
    /// program for hot standby does.
    pub fn fail_over(&self, second: &Namespace) -> Result<()> {
        let moved: &[(Twins, &str)] = match self.layout {
            Layout::Masquerade => &[(self.vip, "eth1"), (self.director_address, "eth0")],
            _ => &[(self.vip, "eth0")],
        };
        for (twins, device) in moved {
            for address in Family::ALL.map(|family| twins.of(family)) {
                let devices = self.director.run("ip", ["-oneline", "addr", "show", "to", &address.to_string()])?;
                for line in devices.lines() {
                    let mut words = line.split_whitespace().skip(1);
                    let (Some(device), Some(address)) = (words.next(), words.nth(1)) else { continue };
                    self.director.ip(&format!("addr del {address} dev {device}"))?;
                }
                let (length, nodad) = if address.is_ipv4() { (24, "") } else { (64, "nodad") };
                second.ip(&format!("addr add {address}/{length} dev {device} {nodad}"))?;
            }
        }
        // Instead of gratuitous ARP.
        let mut neighbours = self.router.iter().chain([&self.client]).chain(&self.servers);
        neighbours.try_for_each(|host| host.ip("neigh flush all"))
    }

    /// Every host with an interface in this lab, and that interface.
    pub fn interfaces(&self) -> Vec<(&Namespace, &'static str)> {
        let mut all = vec![(&self.client, "eth0"), (&self.director, "eth0")];
        if let Some(router) = &self.router {
            all.extend([(router, "eth0"), (router, "eth1")]);
            if self.layout == Layout::Tunnel {
                all.push((router, "eth2"));
            }
        } else {
            all.push((&self.director, "eth1"));
        }
        all.extend(self.servers.iter().map(|server| (server, "eth0")));
        all
    }

    /// Switches the offloads of every host.
    pub fn set_offloads(&self, offloads: Offloads) -> Result<()> {
        let state = if offloads == Offloads::On { "on" } else { "off" };
        for (host, interface) in self.interfaces() {
            host.run("ethtool", ["-K", interface, "tx", state, "tso", state, "gso", state, "gro", state])?;
        }
        Ok(())
    }

    /// Makes XDP on the director's veth devices behave as on hardware, until the result is dropped: see [`pass`](crate::pass).
    ///
    /// Senders compute their checksums, because XDP hands frames on without the mark that says they are incomplete.
    pub fn prepare_for_xdp(&self) -> Result<PassProgram> {
        for (host, interface) in self.interfaces() {
            host.run("ethtool", ["-K", interface, "tx", "off"])?;
        }
        let ports: &[&str] = if self.router.is_some() { &["director"] } else { &["director", "director-out"] };
        PassProgram::attach(&self.switches, ports)
    }
}

const FORWARDING: [(&str, &str); 2] = [("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1")];

fn default_route(host: &Namespace, gateway: Twins) -> Result<()> {
    host.ip(&format!("route add default via {}\nroute add ::/0 via {}", gateway.ipv4, gateway.ipv6))
}

fn route(host: &Namespace, destination: Twins, gateway: Twins) -> Result<()> {
    host.ip(&format!(
        "route add {}/32 via {}\nroute add {}/128 via {}",
        destination.ipv4, gateway.ipv4, destination.ipv6, gateway.ipv6
    ))
}
