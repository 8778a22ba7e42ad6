//! A datapath on paper: it forwards nothing, and has room for everything.
//!
//! A [`super::Director`] over it says what a list of commands would come to, without a daemon and without changing anything:
//! `bpfvs restore` asks it before it begins. What only the real one knows (whether there is room) stays open.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::{
    config::Config,
    server::{Counters, Status},
    service::Service,
    statistics::Statistics,
    template::Scope,
};

use super::model::{MarkRule, ServiceId};
use crate::{
    datapath::{Datapath, Error, Target},
    scheduler::Run,
};

/// Ticks per second of the slowest clock that Linux is built with: the longest timeouts are allowed.
const CLOCK_RATE: u32 = 100;

/// What it was told, as far as it is asked about it.
#[derive(Debug, Default)]
pub struct Paper {
    services: BTreeSet<ServiceId>,
    servers: BTreeSet<u32>,
    pools: BTreeMap<u32, Vec<IpAddr>>,
}

impl Datapath for Paper {
    fn service_capacity(&self) -> u32 {
        u32::MAX
    }

    fn server_capacity(&self) -> u32 {
        u32::MAX
    }

    fn set_service(&mut self, id: &ServiceId, _service: Service) -> Result<(), Error> {
        self.services.insert(*id);
        Ok(())
    }

    fn remove_service(&mut self, id: &ServiceId) -> Result<(), Error> {
        self.services.remove(id);
        Ok(())
    }

    fn set_mark_rules(&mut self, _rules: &[MarkRule]) -> Result<(), Error> {
        Ok(())
    }

    fn publish(&mut self, _service: u32, _run: &Run) -> Result<(), Error> {
        Ok(())
    }

    fn cursor(&self, _service: u32) -> u32 {
        0
    }

    fn clock_rate(&self) -> u32 {
        CLOCK_RATE
    }

    fn set_server(&mut self, index: u32, _target: &Target) -> Result<(), Error> {
        self.servers.insert(index);
        Ok(())
    }

    fn retire_server(&mut self, _index: u32) -> Result<(), Error> {
        Ok(())
    }

    fn free_server(&mut self, index: u32) -> Result<(), Error> {
        self.servers.remove(&index);
        Ok(())
    }

    fn set_scope(&mut self, _index: u32, _scope: Scope) -> Result<(), Error> {
        Ok(())
    }

    fn templates(&self, _index: u32) -> u32 {
        0
    }

    fn flush_templates(&mut self, _service: Option<&ServiceId>) -> Result<(), Error> {
        Ok(())
    }

    fn reachability(&self, _index: u32) -> Status {
        Status::NoRoute
    }

    fn counters(&self, _index: u32) -> Counters {
        Counters::default()
    }

    fn take_peak(&self, _index: u32) -> u32 {
        0
    }

    fn statistics(&self, _index: u32) -> Result<Statistics, Error> {
        Ok(Statistics::default())
    }

    fn services(&self) -> Result<Vec<ServiceId>, Error> {
        Ok(self.services.iter().copied().collect())
    }

    fn servers(&self) -> Result<Vec<u32>, Error> {
        Ok(self.servers.iter().copied().collect())
    }

    fn set_pool(&mut self, pool: u32, addresses: &[IpAddr]) -> Result<(), Error> {
        self.pools.insert(pool, addresses.to_vec());
        self.pools.retain(|_, addresses| !addresses.is_empty());
        Ok(())
    }

    fn pools(&self) -> Result<Vec<u32>, Error> {
        Ok(self.pools.keys().copied().collect())
    }

    fn clean_destinations(&mut self) {}

    fn configure(&mut self, _config: &Config) -> Result<(), Error> {
        Ok(())
    }
}
