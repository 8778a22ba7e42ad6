//! The detour of new connections: while the firewall may give marks that name services, it must have seen a connection's first packet
//! before a service by address takes it. So XDP and tc leave such packets to the kernel, and routing rules lead those that the
//! firewall has not marked to the [mark device](super::mark_device) as well, where all marks are known.
//!
//! ```text
//! service TCP 10.0.0.200:80          rule: TCP to port 80        -> table 2621400080
//!                                    table 2621400080: 10.0.0.200 -> bpfvs-mark0
//! service TCP 10.0.0.201, all ports  rule: TCP                   -> table 2621400000
//! ```
//!
//! So there are as many rules as different ports, which the kernel reads one by one, and the addresses stand in tables, where it finds
//! one among thousands at once. Ports in a row make one rule; where there would be too many, one for all ports takes their place.
//! What is led in vain comes out of the device and goes on as if nothing had been.
//!
//! Marks that mark rules of our own give are known where packets come in. A mark that has such a rule is taken to have no others, so
//! for services that have only such marks nothing waits.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use anyhow::Context as _;
use aya::maps::{Array, MapData};
use futures_util::TryStreamExt as _;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::route::{RouteAddress, RouteAttribute, RouteMessage},
};

use super::{
    maps::Pins,
    mark_device::{Marks, is, route},
};
use crate::director::model::{Family, MarkRule, Protocol, ServiceId};

/// The table of all ports; behind it come those of each.
const TABLES: u32 = 2_621_400_000;
/// More would cost every packet that the kernel routes.
const MOST_RULES: usize = 64;

/// What the mark device is for.
#[derive(Debug, Default)]
pub struct Demand {
    /// The marks that name services.
    marks: Marks,
    /// Those that mark rules of our own give.
    ruled: Marks,
    /// The ports of services by address.
    services: BTreeMap<(Protocol, IpAddr), BTreeSet<u16>>,
}

impl Demand {
    /// There is a service. Says whether that matters to the mark device.
    pub fn add(&mut self, id: &ServiceId) -> bool {
        match *id {
            ServiceId::Mark { mark, family } => self.marks.insert((family, mark)),
            ServiceId::Address { protocol, address, port } => {
                self.services.entry((protocol, address)).or_default().insert(port) && self.waits(id.family())
            }
        }
    }

    /// There is no such service any more. Says whether that matters to the mark device.
    pub fn remove(&mut self, id: &ServiceId) -> bool {
        match *id {
            ServiceId::Mark { mark, family } => self.marks.remove(&(family, mark)),
            ServiceId::Address { protocol, address, port } => {
                let Some(ports) = self.services.get_mut(&(protocol, address)) else { return false };
                let removed = ports.remove(&port);
                if ports.is_empty() {
                    self.services.remove(&(protocol, address));
                }
                removed && self.waits(id.family())
            }
        }
    }

    /// These are the mark rules. Says whether that matters to the mark device.
    pub fn set_rules(&mut self, rules: &[MarkRule]) -> bool {
        let before = Family::ALL.map(|family| self.waits(family));
        self.ruled = rules.iter().map(|rule| (rule.destination.family(), rule.mark)).collect();
        before != Family::ALL.map(|family| self.waits(family))
    }

    /// The marks that name services.
    pub const fn marks(&self) -> &Marks {
        &self.marks
    }

    /// Whether services by address wait for marks: another is named by one that only the firewall can give.
    pub fn waits(&self, family: Family) -> bool {
        self.marks.difference(&self.ruled).any(|(of, _)| *of == family)
    }

    /// How new connections of these families' services by address are led.
    pub fn detour(&self, families: &BTreeSet<Family>) -> Detour {
        let mut detour = Detour::default();
        for family in families {
            let services = self.services.iter().filter(|((_, address), _)| Family::of(*address) == *family);
            let ranges: Vec<(Ports, IpAddr)> = services
                .flat_map(|((protocol, address), ports)| {
                    Ports::of(*protocol, *address, ports).into_iter().map(|ports| (ports, *address))
                })
                .collect();
            let fits = ranges.iter().map(|(ports, _)| ports).collect::<BTreeSet<_>>().len() <= MOST_RULES;
            for (ports, address) in ranges {
                let ports = if fits { ports } else { Ports { range: None, ..ports } };
                detour.rules.insert((*family, ports));
                detour.routes.insert((ports.table(), address));
            }
        }
        detour
    }
}

/// Ports that a routing rule names.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Ports {
    /// The protocol.
    pub protocol: Protocol,
    /// First and last of them; nothing for all.
    pub range: Option<(u16, u16)>,
}

impl Ports {
    /// Those of an address. The kernel has no rules for ports up to the very last, so all take the place of these.
    fn of(protocol: Protocol, address: IpAddr, ports: &BTreeSet<u16>) -> Vec<Self> {
        let spans = |port: &u16| ServiceId::Address { protocol, address, port: *port }.spans_ports();
        if ports.contains(&u16::MAX) || ports.iter().any(spans) {
            return vec![Self { protocol, range: None }];
        }
        let mut ranges: Vec<(u16, u16)> = Vec::new();
        for port in ports {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == *port => *last = *port,
                _ => ranges.push((*port, *port)),
            }
        }
        ranges.into_iter().map(|range| Self { protocol, range: Some(range) }).collect()
    }

    /// The routing table with the addresses that have services there. Protocols, and ranges that begin alike, share one: that leads
    /// too much at most.
    pub fn table(self) -> u32 {
        TABLES + self.range.map_or(0, |(first, _)| u32::from(first))
    }
}

/// Rules, and what stands in the tables that they lead to.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Detour {
    /// The rules.
    pub rules: BTreeSet<(Family, Ports)>,
    routes: BTreeSet<(u32, IpAddr)>,
}

/// The detour as it is in the kernel.
#[expect(missing_debug_implementations, reason = "aya's maps have none")]
pub struct Detours {
    /// What the programs go by: for each family the device that nothing waits at.
    after_marks: Array<MapData, u32>,
    /// The routes, as soon as they are known.
    routes: Option<BTreeSet<(u32, IpAddr)>>,
}

impl Detours {
    /// Takes over what an earlier daemon made.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        Ok(Self { after_marks: pins.typed("AFTER_MARKS")?, routes: None })
    }

    /// New connections of other families than these begin where they come in.
    pub fn close(&mut self, but: &BTreeSet<Family>) -> anyhow::Result<()> {
        Family::ALL.into_iter().filter(|family| !but.contains(family)).try_for_each(|family| self.write(family, 0))
    }

    /// New connections of these families wait until they come out of this device.
    pub fn open_to(&mut self, exit: u32, families: &BTreeSet<Family>) -> anyhow::Result<()> {
        families.iter().try_for_each(|family| self.write(*family, exit))
    }

    fn write(&mut self, family: Family, exit: u32) -> anyhow::Result<()> {
        let index = u32::from(family == Family::Ipv6);
        self.after_marks.set(index, exit, 0).context("the programs cannot be told what to wait for")
    }

    /// Adds the routes that are missing.
    pub async fn add(&mut self, handle: &Handle, entrance: u32, detour: &Detour) -> anyhow::Result<()> {
        if detour.routes.is_empty() && self.routes.is_none() {
            return Ok(());
        }
        if self.routes.is_none() {
            self.routes = Some(list(handle).await?);
        }
        let known = self.routes.get_or_insert_default();
        for &(table, address) in detour.routes.difference(&known.clone()) {
            let message = route(entrance, Family::of(address), table, Some(address));
            match handle.route().add(message).execute().await {
                Err(error) if !is(&error, libc::EEXIST) => {
                    return Err(error).with_context(|| format!("the route for {address} into the mark device cannot be added"));
                }
                _ => known.insert((table, address)),
            };
        }
        Ok(())
    }

    /// Removes the routes that are too many, after the rules that led there.
    pub async fn remove(&mut self, handle: &Handle, entrance: u32, detour: &Detour) -> anyhow::Result<()> {
        let Some(known) = &mut self.routes else { return Ok(()) };
        for (table, address) in known.difference(&detour.routes).copied().collect::<Vec<_>>() {
            let message = route(entrance, Family::of(address), table, Some(address));
            match handle.route().del(message).execute().await {
                Err(error) if !is(&error, libc::ESRCH) => {
                    return Err(error).with_context(|| format!("the route for {address} into the mark device cannot be removed"));
                }
                _ => known.remove(&(table, address)),
            };
        }
        Ok(())
    }

    /// Somebody has removed a route.
    pub fn route_vanished(&mut self, message: &RouteMessage) {
        if let (Some(known), Some(route)) = (&mut self.routes, parse(message)) {
            known.remove(&route);
        }
    }

    /// Nobody knows which routes there are: the device is gone, or was down.
    pub fn forget_routes(&mut self) {
        self.routes = None;
    }
}

/// The routes in our tables.
async fn list(handle: &Handle) -> anyhow::Result<BTreeSet<(u32, IpAddr)>> {
    let mut found = BTreeSet::new();
    let questions =
        [RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(), RouteMessageBuilder::<std::net::Ipv6Addr>::new().build()];
    for question in questions {
        let mut routes = handle.route().get(question).execute();
        while let Some(message) = routes.try_next().await.context("the routes cannot be listed")? {
            found.extend(parse(&message));
        }
    }
    Ok(found)
}

/// Reads a route; nothing if it is in no table of ours.
fn parse(message: &RouteMessage) -> Option<(u32, IpAddr)> {
    let tables = TABLES..=TABLES + u32::from(u16::MAX);
    let table = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) if tables.contains(table) => Some(*table),
        _ => None,
    })?;
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    })?;
    Some((table, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(services: &[&str]) -> Demand {
        let mut demand = Demand::default();
        for text in services {
            let (protocol, socket) = text.split_once(' ').expect("protocol and address");
            let socket: std::net::SocketAddr = socket.parse().expect("address and port");
            let protocol = if protocol == "TCP" { Protocol::Tcp } else { Protocol::Udp };
            demand.add(&ServiceId::Address { protocol, address: socket.ip(), port: socket.port() });
        }
        demand
    }

    fn detour(demand: &Demand) -> (Vec<Ports>, Vec<(u32, IpAddr)>) {
        let Detour { rules, routes } = demand.detour(&BTreeSet::from([Family::Ipv4]));
        (rules.into_iter().map(|(_, ports)| ports).collect(), routes.into_iter().collect())
    }

    #[test]
    fn each_port_has_a_rule_and_each_address_a_route() {
        let demand = demand(&["TCP 10.0.0.1:80", "TCP 10.0.0.2:80", "TCP 10.0.0.1:81", "UDP 10.0.0.1:53", "TCP [fd00::1]:80"]);
        let [one, two]: [IpAddr; 2] = [[10, 0, 0, 1].into(), [10, 0, 0, 2].into()];
        let ports = |protocol, first, last| Ports { protocol, range: Some((first, last)) };
        let rules = vec![ports(Protocol::Tcp, 80, 80), ports(Protocol::Tcp, 80, 81), ports(Protocol::Udp, 53, 53)];
        assert_eq!(detour(&demand), (rules, vec![(TABLES + 53, one), (TABLES + 80, one), (TABLES + 80, two)]));
    }

    #[test]
    fn what_has_other_ports_or_the_last_has_all() {
        for services in [
            ["TCP 10.0.0.1:0", "TCP 10.0.0.1:80"],
            ["TCP 10.0.0.1:20", "TCP 10.0.0.1:21"],
            ["TCP 10.0.0.1:9", "TCP 10.0.0.1:65535"],
        ] {
            let all = Ports { protocol: Protocol::Tcp, range: None };
            assert_eq!(detour(&demand(&services)), (vec![all], vec![(TABLES, [10, 0, 0, 1].into())]), "{services:?}");
        }
    }

    #[test]
    fn there_are_never_many_rules() {
        let services: Vec<String> = (1..500).map(|number| format!("TCP 10.0.{}.1:{}", number % 7, 2 * number)).collect();
        let (rules, routes) = detour(&demand(&services.iter().map(String::as_str).collect::<Vec<_>>()));
        assert_eq!(rules, [Ports { protocol: Protocol::Tcp, range: None }]);
        assert_eq!(routes.len(), 7);
    }

    #[test]
    fn nothing_waits_for_marks_that_we_give() {
        use crate::director::model::Network;
        let mut demand = demand(&["TCP 10.0.0.1:80"]);
        assert!(!demand.waits(Family::Ipv4));
        let mark = |mark| ServiceId::Mark { mark, family: Family::Ipv4 };
        assert!(demand.add(&mark(10)) && demand.waits(Family::Ipv4) && !demand.waits(Family::Ipv6));
        let rule = |mark| MarkRule {
            mark,
            destination: Network { address: [10, 0, 0, 1].into(), prefix: 32 },
            protocol: None,
            ports: Vec::new(),
        };
        assert!(demand.set_rules(&[rule(10)]) && !demand.waits(Family::Ipv4));
        assert!(demand.add(&mark(11)) && demand.waits(Family::Ipv4));
        assert!(!demand.set_rules(&[rule(10), rule(12)]) && demand.waits(Family::Ipv4));
        assert!(demand.remove(&mark(11)) && !demand.waits(Family::Ipv4));
        let service = ServiceId::Address { protocol: Protocol::Tcp, address: [10, 0, 0, 1].into(), port: 80 };
        assert!(!demand.remove(&service) && demand.services.is_empty());
    }
}
