//! The tables by which new connections find their service: by address, by firewall mark, and by mark rules.
//!
//! The packet path looks once, so that mark rules cost it nothing: a rule for single ports of an address stands in the table
//! of services, as more keys of the service that its mark names. Only rules for networks, or for all ports, have a table of
//! their own, which tells the mark.
//!
//! ```text
//! service FWM 10, TCP 192.0.2.1:25
//! rule    192.0.2.1 TCP 80,443 -> 10             TCP 192.0.2.1:80, TCP 192.0.2.1:443 -> entry of FWM 10
//! rule    198.51.100.0/24 TCP 80 -> 10           TCP port 80 to 198.51.100.0/24 -> mark 10
//! ```
//!
//! As in IPVS a mark goes before an address: where both a service and a rule claim a key, the rule has it, as long as there is a
//! service of its mark. A rule whose mark names no service does nothing.
//!
//! [`Services`] also keeps the filter: every address of these tables is in it.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    net::IpAddr,
};

use anyhow::Context as _;
use aya::maps::{
    HashMap as MapHashMap, MapData, MapError,
    lpm_trie::{Key, LpmTrie},
};
use lb_common::{
    family::{Ipv4, Ipv6},
    filter::exceptions,
    mark::{BITS_BEFORE_ADDRESS, Destination},
    service::{Service, ServiceKey},
};

use super::{
    Error,
    filter::Filter,
    kernel_error,
    maps::Pins,
    system::for_each_entry,
    way::{address, words},
};
use crate::director::model::{Family, MarkRule, Network, Protocol, ServiceId};

/// Keys of the table of services, as `lb-ebpf` makes it.
const KEYS: u32 = 1 << 17;
/// Entries of the table of networks.
const NETWORKS: u32 = 1 << 16;

/// What the table of networks tells: which packets to a network.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
struct Place {
    network: Network,
    protocol: Protocol,
    /// 0 for all.
    port: u16,
}

/// The tables, and what is in them.
pub struct Services {
    maps: Maps,
    filter: Filter,
    /// Services that the director has.
    wanted: Wanted,
    /// Keys that mark rules claim, and for which mark.
    claimed: HashMap<ServiceId, u32>,
    /// What stands in the table of services.
    written: HashMap<ServiceId, Service>,
    /// What stands in the table of networks.
    networks: HashMap<Place, u32>,
}

/// Services, and how many of them have each index: a service that changes its kind has two for a moment.
#[derive(Default)]
struct Wanted {
    services: HashMap<ServiceId, Service>,
    indices: HashMap<u32, u32>,
}

impl Wanted {
    fn insert(&mut self, id: ServiceId, service: Service) -> Option<Service> {
        *self.indices.entry(service.id).or_default() += 1;
        let before = self.services.insert(id, service);
        before.inspect(|before| self.forget(before.id))
    }

    fn remove(&mut self, id: &ServiceId) -> Option<Service> {
        let service = self.services.remove(id);
        service.inspect(|service| self.forget(service.id))
    }

    fn forget(&mut self, index: u32) {
        if let Entry::Occupied(mut count) = self.indices.entry(index) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

struct Maps {
    services_v4: MapHashMap<MapData, ServiceKey<Ipv4>, Service>,
    services_v6: MapHashMap<MapData, ServiceKey<Ipv6>, Service>,
    networks_v4: LpmTrie<MapData, Destination<Ipv4>, u32>,
    networks_v6: LpmTrie<MapData, Destination<Ipv6>, u32>,
}

impl Services {
    /// Takes over what stands in the tables, and fills the programs' filter.
    pub fn open(pins: &Pins, filter: super::filter::Kernel) -> anyhow::Result<Self> {
        let written = read_services(pins)?;
        let maps = Maps {
            services_v4: pins.typed("SERVICES_V4")?,
            services_v6: pins.typed("SERVICES_V6")?,
            networks_v4: pins.typed("NETWORKS_V4")?,
            networks_v6: pins.typed("NETWORKS_V6")?,
        };
        let networks = maps.read_networks().context("the table of networks cannot be read")?;
        let addresses = written.keys().filter_map(host).chain(networks.keys().filter_map(|place| place.network.host()));
        let filter = Filter::new(Some(filter), addresses).context("the filter cannot be written")?;
        // What has a mark at an address was put there by a rule.
        let by_rule = |id: &ServiceId, service: &Service| service.mark != 0 && id.mark() == 0;
        let mut wanted = Wanted::default();
        for (id, service) in written.iter().filter(|(id, service)| !by_rule(id, service)) {
            wanted.insert(*id, *service);
        }
        let claimed =
            written.iter().filter(|(id, service)| by_rule(id, service)).map(|(id, service)| (*id, service.mark)).collect();
        let mut services = Self { maps, filter, wanted, claimed, written, networks };
        services.publish_exceptions().context("the filter cannot be written")?;
        Ok(services)
    }

    /// The services that the director has, or that an earlier one had.
    pub fn iter(&self) -> impl Iterator<Item = (&ServiceId, &Service)> {
        self.wanted.services.iter()
    }

    /// Whether one of these services has this index.
    pub fn has_index(&self, index: u32) -> bool {
        self.wanted.indices.contains_key(&index)
    }

    /// Whether packets to this address are looked at.
    pub fn filter_contains(&self, address: IpAddr) -> bool {
        self.filter.contains(address)
    }

    /// Makes a service known, or changes it.
    pub fn set(&mut self, id: &ServiceId, service: Service) -> Result<(), Error> {
        let before = self.wanted.insert(*id, service);
        if before == Some(service) && self.written.get(id) == Some(&service) {
            return Ok(());
        }
        let result = self.write_all(&self.keys_of(id));
        if result.is_err() {
            match before {
                Some(before) => self.wanted.insert(*id, before),
                None => self.wanted.remove(id),
            };
        }
        result
    }

    /// Takes a service away. Nothing if there was none.
    pub fn remove(&mut self, id: &ServiceId) -> Result<Option<Service>, Error> {
        let Some(service) = self.wanted.remove(id) else { return Ok(None) };
        self.write_all(&self.keys_of(id))?;
        Ok(Some(service))
    }

    /// Puts these mark rules in the place of those that there were. If it fails, the old ones are back.
    pub fn set_rules(&mut self, rules: &[MarkRule]) -> Result<(), Error> {
        let (mut claimed, mut networks) = (HashMap::new(), HashMap::new());
        for rule in rules {
            for protocol in rule.protocols() {
                match rule.destination.host() {
                    Some(address) if !rule.ports.is_empty() => {
                        claimed.extend(rule.each_port().map(|port| (ServiceId::Address { protocol, address, port }, rule.mark)));
                    }
                    _ => {
                        let place = |port| Place { network: rule.destination, protocol, port };
                        networks.extend(rule.each_port().map(|port| (place(port), rule.mark)));
                        if rule.ports.is_empty() {
                            networks.insert(place(0), rule.mark);
                        }
                    }
                }
            }
        }
        let old_claims = std::mem::replace(&mut self.claimed, claimed);
        let old_networks = self.networks.clone();
        let result = self.write_claims(&old_claims).and_then(|()| self.write_networks(&networks));
        if result.is_err() {
            let new_claims = std::mem::replace(&mut self.claimed, old_claims);
            // What there was room for before, there is room for again.
            self.write_claims(&new_claims)?;
            self.write_networks(&old_networks)?;
        }
        result
    }

    /// The keys whose entries depend on a service.
    fn keys_of(&self, id: &ServiceId) -> Vec<ServiceId> {
        if id.mark() == 0 {
            return vec![*id];
        }
        let is_claimed = |(key, mark): &(&ServiceId, &u32)| **mark == id.mark() && key.family() == id.family();
        let claimed = self.claimed.iter().filter(is_claimed).map(|(key, _)| *key);
        std::iter::once(*id).chain(claimed).collect()
    }

    fn write_claims(&mut self, before: &HashMap<ServiceId, u32>) -> Result<(), Error> {
        let keys: HashSet<ServiceId> = self.claimed.keys().chain(before.keys()).copied().collect();
        self.write_all(&keys.into_iter().collect::<Vec<_>>())
    }

    fn write_all(&mut self, keys: &[ServiceId]) -> Result<(), Error> {
        keys.iter().try_for_each(|key| self.write(key))?;
        // Most services come and go without one.
        if keys.iter().all(|key| key.mark() == 0) {
            return Ok(());
        }
        self.publish_exceptions().map_err(|error| kernel_error("the exceptions of the filter cannot be written", error))
    }

    /// Makes the table say of a key what it should.
    fn write(&mut self, key: &ServiceId) -> Result<(), Error> {
        let by_rule =
            self.claimed.get(key).and_then(|mark| self.wanted.services.get(&ServiceId::Mark { mark: *mark, family: key.family() }));
        let wanted = by_rule.or_else(|| self.wanted.services.get(key)).copied();
        let written = self.written.get(key).copied();
        if wanted == written {
            return Ok(());
        }
        let Some(service) = wanted else {
            self.written.remove(key);
            if let Some(address) = host(key) {
                let taken = self.filter.remove(address);
                taken.map_err(|error| kernel_error(format!("the virtual address {address} cannot be taken back"), error))?;
            }
            let removed = self.maps.remove_service(key);
            return removed.map_err(|error| kernel_error(format!("the service {key} cannot be removed"), error));
        };
        if let Err(error) = self.maps.insert_service(key, service) {
            if self.written.len() as u32 >= KEYS {
                let advice = "remove services, or ports of mark rules";
                return Err(Error::Full { what: "the table of services", limit: KEYS, advice });
            }
            return Err(kernel_error(format!("the service {key} cannot be written"), error));
        }
        self.written.insert(*key, service);
        match host(key) {
            Some(address) if written.is_none() => {
                let made = self.filter.add(address);
                made.map_err(|error| kernel_error(format!("the virtual address {address} cannot be made known"), error))
            }
            _ => Ok(()),
        }
    }

    fn write_networks(&mut self, wanted: &HashMap<Place, u32>) -> Result<(), Error> {
        let stale: Vec<Place> = self.networks.keys().filter(|place| !wanted.contains_key(place)).copied().collect();
        for place in stale {
            self.networks.remove(&place);
            let forgotten = self.maps.remove_network(&place).map_err(|error| error.to_string());
            let taken =
                place.network.host().map_or(Ok(()), |address| self.filter.remove(address)).map_err(|error| error.to_string());
            forgotten
                .and(taken)
                .map_err(|error| kernel_error(format!("the mark rule for {} cannot be removed", place.network), error))?;
        }
        for (place, mark) in wanted {
            if self.networks.get(place) == Some(mark) {
                continue;
            }
            if let Err(error) = self.maps.insert_network(place, *mark) {
                if self.networks.len() as u32 >= NETWORKS {
                    let advice = "name fewer ports in mark rules for networks, or all of them";
                    return Err(Error::Full { what: "the table of networks", limit: NETWORKS, advice });
                }
                return Err(kernel_error(format!("the mark rule for {} cannot be written", place.network), error));
            }
            if self.networks.insert(*place, *mark).is_none()
                && let Some(address) = place.network.host()
            {
                let made = self.filter.add(address);
                made.map_err(|error| kernel_error(format!("the address {address} cannot be made known"), error))?;
            }
        }
        self.publish_exceptions().map_err(|error| kernel_error("the exceptions of the filter cannot be written", error))
    }

    /// Tells the programs which packets to look at whatever their destination.
    fn publish_exceptions(&mut self) -> Result<(), MapError> {
        let of = |family, bits| exceptions::of(family == Family::Ipv6, bits);
        let marked = self.wanted.services.keys().filter(|id| id.mark() != 0).map(|id| of(id.family(), exceptions::MARKED));
        let networks = self.networks.keys().map(|place| {
            let all = if place.network.host().is_none() { exceptions::ALL } else { 0 };
            of(place.network.family(), exceptions::NETWORKS | all)
        });
        let bits = marked.chain(networks).fold(0, std::ops::BitOr::bitor);
        self.filter.set_exceptions(bits)
    }
}

impl Maps {
    fn insert_service(&mut self, id: &ServiceId, service: Service) -> Result<(), MapError> {
        match id.family() {
            Family::Ipv4 => self.services_v4.insert(key_v4(id), service, 0),
            Family::Ipv6 => self.services_v6.insert(key_v6(id), service, 0),
        }
    }

    fn remove_service(&mut self, id: &ServiceId) -> Result<(), MapError> {
        match id.family() {
            Family::Ipv4 => self.services_v4.remove(&key_v4(id)),
            Family::Ipv6 => self.services_v6.remove(&key_v6(id)),
        }
    }

    fn insert_network(&mut self, place: &Place, mark: u32) -> Result<(), MapError> {
        match place.network.family() {
            Family::Ipv4 => self.networks_v4.insert(&network_key(place, words(place.network.address)[0]), mark, 0),
            Family::Ipv6 => self.networks_v6.insert(&network_key(place, words(place.network.address)), mark, 0),
        }
    }

    fn remove_network(&mut self, place: &Place) -> Result<(), MapError> {
        match place.network.family() {
            Family::Ipv4 => self.networks_v4.remove(&network_key(place, words(place.network.address)[0])),
            Family::Ipv6 => self.networks_v6.remove(&network_key(place, words(place.network.address))),
        }
    }

    fn read_networks(&self) -> Result<HashMap<Place, u32>, MapError> {
        let ipv4 = self.networks_v4.iter().map(|entry| {
            entry.map(|(key, mark)| {
                let Destination { protocol, port, address: network, .. } = key.data();
                (place(key.prefix_len(), protocol, port, address([network, 0, 0, 0], false)), mark)
            })
        });
        let ipv6 = self.networks_v6.iter().map(|entry| {
            entry.map(|(key, mark)| {
                let Destination { protocol, port, address: network, .. } = key.data();
                (place(key.prefix_len(), protocol, port, address(network, true)), mark)
            })
        });
        let known = |entry: Result<(Option<Place>, u32), MapError>| match entry {
            Ok((place, mark)) => place.map(|place| Ok((place, mark))),
            Err(error) => Some(Err(error)),
        };
        ipv4.chain(ipv6).filter_map(known).collect()
    }
}

/// The address that a service's packets are sent to, if there is only one.
const fn host(id: &ServiceId) -> Option<IpAddr> {
    match id {
        ServiceId::Address { address, .. } => Some(*address),
        ServiceId::Mark { .. } => None,
    }
}

fn key_v4(id: &ServiceId) -> ServiceKey<Ipv4> {
    match *id {
        ServiceId::Address { protocol, address, port } => service_key(protocol, words(address)[0], port),
        ServiceId::Mark { mark, .. } => ServiceKey::of_mark(mark),
    }
}

fn key_v6(id: &ServiceId) -> ServiceKey<Ipv6> {
    match *id {
        ServiceId::Address { protocol, address, port } => service_key(protocol, words(address), port),
        ServiceId::Mark { mark, .. } => ServiceKey::of_mark(mark),
    }
}

fn service_key<A>(protocol: Protocol, vip: A, port: u16) -> ServiceKey<A> {
    ServiceKey { vip, port: port.to_be(), protocol: protocol.number(), zero: 0 }
}

fn network_key<A>(place: &Place, address: A) -> Key<Destination<A>>
where
    Destination<A>: aya::Pod,
{
    let destination = Destination { protocol: place.protocol.number(), zero: 0, port: place.port.to_be(), address };
    Key::new(BITS_BEFORE_ADDRESS + u32::from(place.network.prefix), destination)
}

fn place(prefix: u32, protocol: u8, port: u16, address: IpAddr) -> Option<Place> {
    let prefix = u8::try_from(prefix.checked_sub(BITS_BEFORE_ADDRESS)?).ok()?;
    Some(Place { network: Network { address, prefix }, protocol: Protocol::of_number(protocol)?, port: u16::from_be(port) })
}

/// What an earlier daemon left in the tables of services.
fn read_services(pins: &Pins) -> anyhow::Result<HashMap<ServiceId, Service>> {
    const FAILED: &str = "the table of services cannot be read";
    let id = |vip: IpAddr, protocol, port| match Protocol::of_number(protocol) {
        Some(protocol) => ServiceId::Address { protocol, address: vip, port: u16::from_be(port) },
        None => ServiceId::Mark { mark: words(vip)[0], family: Family::of(vip) },
    };
    let mut services = HashMap::new();
    for_each_entry(&pins.data("SERVICES_V4")?, |key: &ServiceKey<Ipv4>, service: &Service| {
        services.insert(id(address([key.vip, 0, 0, 0], false), key.protocol, key.port), *service);
    })
    .context(FAILED)?;
    for_each_entry(&pins.data("SERVICES_V6")?, |key: &ServiceKey<Ipv6>, service: &Service| {
        services.insert(id(address(key.vip, true), key.protocol, key.port), *service);
    })
    .context(FAILED)?;
    Ok(services)
}
