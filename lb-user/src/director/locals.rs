//! Local addresses: which FULLNAT has, and for whom.
//!
//! ```text
//! shared             10.0.0.230, 2001:db8:2::230     of every service that has none of its own
//! tcp 10.0.0.200:80  10.0.0.231, 10.0.0.232          of this service alone
//! ```
//!
//! Real servers take local addresses of their own family. A FULLNAT server without one would refuse every client, so there
//! never is one: it cannot be added before its local address, nor can the address be taken away while the server needs it.

use std::net::IpAddr;

use lb_common::local::{POOL_SIZE, SHARED};

use super::{
    Director,
    commands::no_such_service,
    model::{Family, Method, Refusal, RefusalKind, ServerId, ServiceId},
    rules::refuse,
    service::Service,
};
use crate::datapath::Datapath;

impl<D: Datapath> Director<D> {
    pub(super) fn add_local(&mut self, address: IpAddr, service: Option<&ServiceId>) -> Result<(), Refusal> {
        let is_virtual = |id: &ServiceId| matches!(id, ServiceId::Address { address: vip, .. } if *vip == address);
        if self.services.keys().any(is_virtual) {
            return Err(self::is_virtual(address));
        }
        let (pool, addresses) = self.local_pool(service)?;
        may_add(address, service, addresses)?;
        let mut wanted = addresses.clone();
        wanted.push(address);
        self.set_local_pool(service, pool, wanted)
    }

    pub(super) fn remove_local(&mut self, address: IpAddr, service: Option<&ServiceId>) -> Result<(), Refusal> {
        let (pool, addresses) = self.local_pool(service)?;
        let mut wanted = addresses.clone();
        let Some(place) = wanted.iter().position(|known| *known == address) else {
            let owner = owner(service);
            let message =
                format!("the local address {address} cannot be removed: {owner} has none of this name; see `bpfvs localaddr list`");
            return refuse(RefusalKind::NoSuchLocalAddress, message);
        };
        wanted.remove(place);
        if let Some(service) = service.and_then(|id| self.services.get(id)) {
            may_remove(address, &self.locals, [(service, wanted.as_slice())])?;
        } else {
            let services = self.services.values().map(|service| (service, service.locals.as_slice()));
            may_remove(address, &wanted, services)?;
        }
        self.set_local_pool(service, pool, wanted)
    }

    /// A service's own local addresses, or those of all services, with the datapath's name for them.
    fn local_pool(&self, service: Option<&ServiceId>) -> Result<(u32, &Vec<IpAddr>), Refusal> {
        let Some(id) = service else { return Ok((SHARED, &self.locals)) };
        let service = self.services.get(id).ok_or_else(|| no_such_service(id))?;
        Ok((service.pool(), &service.locals))
    }

    fn set_local_pool(&mut self, service: Option<&ServiceId>, pool: u32, addresses: Vec<IpAddr>) -> Result<(), Refusal> {
        self.datapath.set_pool(pool, &addresses)?;
        match service {
            None => self.locals = addresses,
            Some(id) => {
                if let Some(service) = self.services.get_mut(id) {
                    service.locals = addresses;
                }
            }
        }
        Ok(())
    }

    /// FULLNAT's local addresses, those of all services first.
    pub fn local_addresses(&self) -> impl Iterator<Item = (IpAddr, Option<ServiceId>)> {
        let own = self.services.values().flat_map(|service| service.locals.iter().map(|address| (*address, Some(service.id))));
        self.locals.iter().map(|address| (*address, None)).chain(own)
    }
}

/// The addresses of one family.
fn of_family(addresses: &[IpAddr], family: Family) -> impl Iterator<Item = &IpAddr> {
    addresses.iter().filter(move |address| Family::of(**address) == family)
}

/// In words, whose the addresses are.
pub(super) fn owner(service: Option<&ServiceId>) -> String {
    service.map_or_else(|| "all services".to_owned(), |service| format!("the service {service}"))
}

/// Whether an address can be a local one at all, beside those of `pool`.
fn may_add(address: IpAddr, service: Option<&ServiceId>, pool: &[IpAddr]) -> Result<(), Refusal> {
    let refused =
        |kind, why: &str| refuse(kind, format!("the local address {address} cannot be added for {}: {why}", owner(service)));
    let fault = match address {
        IpAddr::V4(address) if address.is_unspecified() || address.is_broadcast() => Some("it is nobody's own"),
        IpAddr::V6(address) if address.is_unspecified() => Some("it is nobody's own"),
        IpAddr::V6(address) if address.is_unicast_link_local() => Some("it is link-local and means something on one link only"),
        address if address.is_multicast() => Some("it is a multicast address"),
        address if address.is_loopback() => Some("real servers cannot answer to the loopback"),
        _ => None,
    };
    if let Some(fault) = fault {
        return refused(RefusalKind::Invalid, &format!("{fault}; name a unicast address of this host"));
    }
    if pool.contains(&address) {
        return refused(RefusalKind::LocalAddressExists, "it is there; see `bpfvs localaddr list`");
    }
    if of_family(pool, Family::of(address)).count() >= POOL_SIZE {
        let why = format!("there are {POOL_SIZE} of its family already; remove one, or give a service addresses of its own");
        return refused(RefusalKind::NoRoom, &why);
    }
    Ok(())
}

/// The refusal of a local address that is a virtual one: replies to it could not be told from requests.
pub(super) fn is_virtual(address: IpAddr) -> Refusal {
    Refusal {
        kind: RefusalKind::Invalid,
        message: format!(
            "{address} cannot be both a virtual and a local address: replies to it could not be told from clients' requests; \
             give FULLNAT an address of its own"
        ),
    }
}

/// Whether a real server has a local address to be reached from, if it needs one.
pub(super) fn suffices(shared: &[IpAddr], own: &[IpAddr], server: &ServerId, method: Method) -> Result<(), Refusal> {
    let family = Family::of(server.address);
    let found = of_family(own, family).chain(of_family(shared, family)).next().is_some();
    if found || !matches!(method, Method::FullNat { .. }) {
        return Ok(());
    }
    let name = match family {
        Family::Ipv4 => "IPv4",
        Family::Ipv6 => "IPv6",
    };
    refuse(
        RefusalKind::NoLocalAddress,
        format!(
            "the real server {server} cannot be reached by FULLNAT: there is no local {name} address for it to see in the place of \
             clients'; add one first (`bpfvs localaddr add ADDRESS`)"
        ),
    )
}

/// Whether a local address may go: no server of these services needs it. `shared` and the services' own are those that stay.
fn may_remove<'a>(
    address: IpAddr,
    shared: &[IpAddr],
    services: impl IntoIterator<Item = (&'a Service, &'a [IpAddr])>,
) -> Result<(), Refusal> {
    for (service, own) in services {
        for server in &service.servers {
            if suffices(shared, own, &server.id, server.config.method).is_err() {
                return refuse(
                    RefusalKind::Invalid,
                    format!(
                        "the local address {address} cannot be removed: it is the last one for the real server {} of {}, which is \
                         reached by FULLNAT; remove the server, or add another local address first",
                        server.id, service.id
                    ),
                );
            }
        }
    }
    Ok(())
}
