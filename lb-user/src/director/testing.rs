//! A datapath in memory: what the director told it, and counters for tests to turn.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::{
    config::Config,
    schedule,
    server::{Counters, Status},
    service::Service,
    statistics::Statistics,
};

use super::model::Protocol;
use crate::{
    datapath::{Datapath, Error, Target},
    scheduler::Run,
};

/// What it was told. Tests change counters directly.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) services: BTreeMap<(Protocol, IpAddr, u16), Service>,
    pub(crate) schedules: BTreeMap<u32, Run>,
    pub(crate) cursors: BTreeMap<u32, u32>,
    pub(crate) servers: BTreeMap<u32, Target>,
    pub(crate) retired: BTreeSet<u32>,
    pub(crate) counters: BTreeMap<u32, Counters>,
    pub(crate) peaks: RefCell<BTreeMap<u32, u32>>,
    pub(crate) statistics: BTreeMap<u32, Statistics>,
    pub(crate) config: Option<Config>,
    /// Local addresses, by pool.
    pub(crate) pools: BTreeMap<u32, Vec<IpAddr>>,
    /// How often each service's schedule was published.
    pub(crate) published: BTreeMap<u32, usize>,
    /// Schedules with more picks than this do not fit; nothing for no limit.
    pub(crate) room: Option<usize>,
    /// Everything that was done to it, in order.
    pub(crate) journal: Vec<String>,
}

impl Memory {
    /// The next pick of a service, as the packet path would take it from its schedule in cursor mode.
    pub(crate) fn pick(&mut self, index: u32) -> Option<IpAddr> {
        let cursor = self.cursors.entry(index).or_default();
        let run = self.schedules.get(&index)?;
        let period = run.picks.len() as u32 - run.head;
        let position = schedule::position(*cursor, run.base, run.head, period)?;
        *cursor = cursor.wrapping_add(1);
        self.servers.get(&run.picks[position as usize]).map(|target| target.address)
    }
}

impl Datapath for Memory {
    fn service_capacity(&self) -> u32 {
        64
    }

    fn server_capacity(&self) -> u32 {
        64
    }

    fn set_service(&mut self, protocol: Protocol, address: IpAddr, port: u16, service: Service) -> Result<(), Error> {
        self.journal.push(format!("set_service {protocol} {address} {port}"));
        assert!(self.schedules.contains_key(&service.id), "the schedule comes first");
        self.services.insert((protocol, address, port), service);
        Ok(())
    }

    fn remove_service(&mut self, protocol: Protocol, address: IpAddr, port: u16) -> Result<(), Error> {
        self.journal.push(format!("remove_service {protocol} {address} {port}"));
        assert!(self.services.remove(&(protocol, address, port)).is_some(), "only what is there can be removed");
        Ok(())
    }

    fn publish(&mut self, service: u32, run: &Run) -> Result<(), Error> {
        self.journal.push(format!("publish {service} {:?}", run.picks));
        if self.room.is_some_and(|room| run.picks.len() > room) {
            return Err(Error::Full { what: "the table of schedules", limit: 0, advice: "have fewer servers" });
        }
        for pick in run.picks.iter().map(|pick| pick & !schedule::INELIGIBLE) {
            assert!(self.servers.contains_key(&pick), "a schedule names known servers only");
            assert!(!self.retired.contains(&pick), "a schedule names no retired server");
        }
        *self.published.entry(service).or_default() += 1;
        self.schedules.insert(service, run.clone());
        Ok(())
    }

    fn cursor(&self, service: u32) -> u32 {
        self.cursors.get(&service).copied().unwrap_or_default()
    }

    fn clock_rate(&self) -> u32 {
        250
    }

    fn set_server(&mut self, index: u32, target: &Target) -> Result<(), Error> {
        self.journal.push(format!("set_server {index} {}", target.address));
        self.retired.remove(&index);
        self.servers.insert(index, *target);
        Ok(())
    }

    fn retire_server(&mut self, index: u32) -> Result<(), Error> {
        self.journal.push(format!("retire_server {index}"));
        for run in self.services.values().filter_map(|service| self.schedules.get(&service.id)) {
            assert!(!run.picks.contains(&index), "a schedule still names the server");
        }
        self.retired.insert(index);
        Ok(())
    }

    fn free_server(&mut self, index: u32) -> Result<(), Error> {
        self.journal.push(format!("free_server {index}"));
        self.retired.remove(&index);
        self.servers.remove(&index);
        self.counters.remove(&index);
        self.statistics.remove(&index);
        Ok(())
    }

    fn reachability(&self, index: u32) -> Status {
        match () {
            () if self.retired.contains(&index) => Status::Removed,
            () if self.servers.contains_key(&index) => Status::Ready,
            () => Status::Free,
        }
    }

    fn counters(&self, index: u32) -> Counters {
        self.counters.get(&index).copied().unwrap_or_default()
    }

    fn take_peak(&self, index: u32) -> u32 {
        self.peaks.borrow_mut().remove(&index).unwrap_or_default()
    }

    fn statistics(&self, index: u32) -> Result<Statistics, Error> {
        Ok(self.statistics.get(&index).copied().unwrap_or_default())
    }

    fn services(&self) -> Result<Vec<(Protocol, IpAddr, u16)>, Error> {
        Ok(self.services.keys().copied().collect())
    }

    fn servers(&self) -> Result<Vec<u32>, Error> {
        Ok(self.servers.keys().copied().collect())
    }

    fn clean_destinations(&mut self) {}

    fn set_pool(&mut self, pool: u32, addresses: &[IpAddr]) -> Result<(), Error> {
        self.pools.insert(pool, addresses.to_vec());
        self.pools.retain(|_, addresses| !addresses.is_empty());
        Ok(())
    }

    fn pools(&self) -> Result<Vec<u32>, Error> {
        Ok(self.pools.keys().copied().collect())
    }

    fn configure(&mut self, config: &Config) -> Result<(), Error> {
        self.config = Some(*config);
        Ok(())
    }
}
