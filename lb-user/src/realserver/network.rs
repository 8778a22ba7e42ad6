//! Addresses, interfaces and routes, by netlink.

use std::{io, net::IpAddr};

use anyhow::{Context, Result, anyhow};
use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkMessage, LinkXdp},
        route::{RouteAttribute, RouteType},
        tc::{TcAttribute, TcHandle},
    },
};

/// A connection to the kernel's network configuration, of the namespace that this thread is in.
pub(super) struct Network {
    handle: Handle,
}

/// A network interface.
#[derive(Clone, Debug)]
pub(super) struct Interface {
    /// Its number.
    pub(super) index: u32,
    /// Its name.
    pub(super) name: String,
    /// It is up.
    pub(super) is_up: bool,
    /// It is a loopback.
    pub(super) is_loopback: bool,
    /// It does not speak ARP: loopbacks and tunnels.
    pub(super) is_silent: bool,
    /// The largest packet.
    pub(super) mtu: u32,
    /// The XDP programs on it.
    pub(super) xdp: Vec<u32>,
}

/// An address of an interface.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    /// The address.
    pub(super) address: IpAddr,
    /// The length of its prefix.
    pub(super) prefix: u8,
    /// The interface.
    pub(super) interface: u32,
}

/// A kind of tunnel device, and the one that each namespace has once the kernel's module is there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Device {
    /// IPv4 in IPv4.
    Ipip,
    /// IPv6 in IPv4.
    Sit,
    /// IPv6 in IPv6.
    Ip6tnl,
    /// Anything in GRE in IPv4.
    Gre,
    /// Anything in GRE in IPv6.
    Ip6gre,
}

impl Device {
    /// The name of the device that takes every packet which no other one takes.
    pub(super) const fn fallback(self) -> &'static str {
        match self {
            Self::Ipip => "tunl0",
            Self::Sit => "sit0",
            Self::Ip6tnl => "ip6tnl0",
            Self::Gre => "gre0",
            Self::Ip6gre => "ip6gre0",
        }
    }

    const fn kind(self) -> InfoKind {
        match self {
            Self::Ipip => InfoKind::IpIp,
            Self::Sit => InfoKind::SitTun,
            Self::Ip6tnl => InfoKind::Ip6Tnl,
            Self::Gre => InfoKind::GreTun,
            Self::Ip6gre => InfoKind::GreTun6,
        }
    }
}

/// What came of trying to make a tunnel device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Made {
    /// It was made.
    Yes,
    /// The kernel has one already that takes the same packets.
    Exists,
    /// The kernel does not know this kind.
    Unsupported,
}

impl Network {
    /// Connects. Must be called inside the event loop.
    pub(super) fn connect() -> Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .context("cannot read the network configuration: the kernel refused a netlink socket; see the cause")?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// All interfaces.
    pub(super) async fn interfaces(&self) -> Result<Vec<Interface>> {
        let links: Vec<LinkMessage> =
            self.handle.link().get().execute().try_collect().await.map_err(|error| explain("list the interfaces", &error))?;
        Ok(links.iter().filter_map(interface).collect())
    }

    /// The interface with this name, if there is one.
    pub(super) async fn find(&self, name: &str) -> Result<Option<Interface>> {
        Ok(self.interfaces().await?.into_iter().find(|interface| interface.name == name))
    }

    /// The loopback interface.
    pub(super) async fn loopback(&self) -> Result<Interface> {
        let mut interfaces = self.interfaces().await?.into_iter();
        interfaces
            .find(|interface| interface.is_loopback)
            .ok_or_else(|| anyhow!("cannot find the loopback interface: this namespace has none; use another one"))
    }

    /// All addresses.
    pub(super) async fn addresses(&self) -> Result<Vec<Held>> {
        let addresses: Vec<AddressMessage> =
            self.handle.address().get().execute().try_collect().await.map_err(|error| explain("list the addresses", &error))?;
        Ok(addresses.iter().filter_map(held).collect())
    }

    /// Adds an address with the prefix of a host. For IPv6 it is usable at once: nobody else is asked whether he has it,
    /// because the director does.
    pub(super) async fn add_address(&self, interface: u32, address: IpAddr, prefix: u8) -> Result<()> {
        let mut request = self.handle.address().add(interface, address, prefix);
        if address.is_ipv6() {
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        request.execute().await.map_err(|error| explain(&format!("add {address}/{prefix} to lo"), &error))
    }

    /// Removes an address, if it is there.
    pub(super) async fn remove_address(&self, interface: u32, address: IpAddr, prefix: u8) -> Result<bool> {
        let addresses: Vec<AddressMessage> =
            self.handle.address().get().execute().try_collect().await.map_err(|error| explain("list the addresses", &error))?;
        let wanted = |message: &AddressMessage| {
            held(message).is_some_and(|held| held.interface == interface && held.address == address && held.prefix == prefix)
        };
        match addresses.into_iter().find(wanted) {
            None => Ok(false),
            Some(message) => {
                let deleted = self.handle.address().del(message).execute().await;
                deleted.map_err(|error| explain(&format!("remove {address}/{prefix} from lo"), &error))?;
                Ok(true)
            }
        }
    }

    /// Sets an interface up or down.
    pub(super) async fn set_up(&self, interface: &Interface, up: bool) -> Result<()> {
        let builder = LinkUnspec::new_with_index(interface.index);
        let message = if up { builder.up() } else { builder.down() }.build();
        let word = if up { "up" } else { "down" };
        self.handle.link().set(message).execute().await.map_err(|error| explain(&format!("set {} {word}", interface.name), &error))
    }

    /// Makes a tunnel device that takes packets from everybody. The kernel loads its module for that, which may bring a
    /// device of that sort with it.
    pub(super) async fn make_device(&self, device: Device, name: &str) -> Result<Made> {
        let message = LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(device.kind()).name(name).build();
        match self.handle.link().add(message).execute().await {
            Ok(()) => Ok(Made::Yes),
            Err(error) => match errno(&error) {
                Some(libc::EEXIST) => Ok(Made::Exists),
                Some(libc::EOPNOTSUPP | libc::ENODEV) => Ok(Made::Unsupported),
                _ => Err(explain(&format!("make the tunnel device {name}"), &error)),
            },
        }
    }

    /// Removes an interface.
    pub(super) async fn remove_interface(&self, interface: &Interface) -> Result<()> {
        let removed = self.handle.link().del(interface.index).execute().await;
        removed.map_err(|error| explain(&format!("remove the device {}", interface.name), &error))
    }

    /// Removes the clsact qdisc of an interface.
    pub(super) async fn remove_clsact(&self, interface: &Interface) -> Result<()> {
        let mut request = self.handle.qdisc().del(interface.index.cast_signed());
        let message = request.message_mut();
        message.header.parent = TcHandle::CLSACT;
        message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
        message.attributes.push(TcAttribute::Kind("clsact".into()));
        request.execute().await.map_err(|error| explain(&format!("remove the clsact qdisc of {}", interface.name), &error))
    }

    /// Whether the interface's ingress has a BPF filter of this priority.
    pub(super) async fn has_filter(&self, interface: &Interface, priority: u16) -> Result<bool> {
        let request = self.handle.traffic_filter(interface.index.cast_signed()).get().ingress();
        let filters: Vec<_> = request
            .execute()
            .try_collect()
            .await
            .map_err(|error| explain(&format!("list the tc filters of {}", interface.name), &error))?;
        Ok(filters.iter().any(|filter| {
            filter.header.info >> 16 == u32::from(priority)
                && filter.attributes.iter().any(|attribute| matches!(attribute, TcAttribute::Kind(kind) if kind == "bpf"))
        }))
    }

    /// The interfaces of the default routes of a family. A default route over several next hops names all of them.
    pub(super) async fn default_routes(&self, ipv6: bool) -> Result<Vec<u32>> {
        let message = if ipv6 {
            RouteMessageBuilder::<std::net::Ipv6Addr>::new().build()
        } else {
            RouteMessageBuilder::<std::net::Ipv4Addr>::new().build()
        };
        let mut routes = Box::pin(self.handle.route().get(message).execute());
        let mut interfaces = Vec::new();
        while let Some(route) = routes.next().await {
            let route = route.map_err(|error| explain("list the routes", &error))?;
            if route.header.destination_prefix_length != 0 || route.header.kind != RouteType::Unicast {
                continue;
            }
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Oif(interface) => interfaces.push(*interface),
                    RouteAttribute::MultiPath(hops) => interfaces.extend(hops.iter().map(|hop| hop.interface_index)),
                    _ => {}
                }
            }
        }
        Ok(interfaces)
    }
}

fn interface(message: &LinkMessage) -> Option<Interface> {
    let name = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })?;
    let mtu = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    let xdp = message.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::Xdp(xdp) => Some(xdp),
        _ => None,
    });
    let programs = xdp.flatten().filter_map(|xdp| match xdp {
        LinkXdp::ProgId(program) | LinkXdp::DrvProgId(program) | LinkXdp::SkbProgId(program) => Some(*program),
        _ => None,
    });
    let flags = message.header.flags;
    Some(Interface {
        index: message.header.index,
        name,
        is_up: flags.contains(LinkFlags::Up),
        is_loopback: flags.contains(LinkFlags::Loopback),
        is_silent: flags.intersects(LinkFlags::Loopback | LinkFlags::Noarp),
        mtu: mtu.unwrap_or_default(),
        xdp: programs.collect(),
    })
}

/// IPv4 names the local address `Local` (`Address` is the peer's), IPv6 has only `Address`.
fn held(message: &AddressMessage) -> Option<Held> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    Some(Held { address: local.or(address)?, prefix: message.header.prefix_len, interface: message.header.index })
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(message.raw_code().abs()),
        _ => None,
    }
}

/// What failed, why, and what to do.
fn explain(what: &str, error: &rtnetlink::Error) -> anyhow::Error {
    let advice = match errno(error) {
        Some(libc::EPERM | libc::EACCES) => "run as root (CAP_NET_ADMIN)",
        Some(libc::ENODEV) => "the interface went away; see `ip link`",
        _ => "see `ip address` and `ip link` for what stands in the way",
    };
    let why = errno(error).map_or_else(|| error.to_string(), |code| io::Error::from_raw_os_error(code).to_string());
    anyhow!("cannot {what}: the kernel says {why}; {advice}")
}
