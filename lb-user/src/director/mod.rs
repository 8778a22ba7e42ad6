//! The director: virtual services, their real servers, and IPVS's rules about them.
//!
//! A [`Director`] does what [`model::Command`]s say, or refuses as IPVS would ([`rules`]), and keeps the datapath's maps
//! in step. It is a plain value: no thread, no clock, no file, no socket. The daemon owns it, gives it commands and the
//! time, and writes its [`state`] down.
//!
//! One command list is one step. Each service that it touched gets one new schedule at the end, however many servers
//! came and went: restoring thousands of lines compiles each service once. The order of things towards the datapath is
//! always such that the packet path meets whole services only:
//!
//! ```text
//! a service appears      schedule, then service
//! a service disappears   service, then schedule and servers
//! a server appears       server, then schedule
//! a server disappears    schedule, then server (which lives on in the trash as long as connections name it)
//! ```
//!
//! If the datapath has no room for a schedule, the service goes back to what it was before the list, and the list's
//! commands about it are refused.
//!
//! Schedules that depend on connections (dynamic schedulers, overload flags of `ipvsadm -x`/`-y`) are kept true by
//! [`Director::refresh`], which is called whenever connections come or go ([`live`]).

mod adopt;
mod commands;
mod commit;
pub mod difference;
mod indices;
mod live;
mod locals;
mod marks;
pub mod model;
pub mod paper;
mod place;
pub mod rules;
mod servers;
mod service;
pub mod state;
pub mod sysctl;
mod traffic;
mod trash;
mod views;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    net::IpAddr,
    time::Instant,
};

use lb_common::config::Config;
use tracing::warn;

use self::{
    commands::named_by,
    indices::Indices,
    marks::MarkRules,
    model::{MarkRule, Refusal, RefusalKind, ServiceId, Timeouts},
    service::Service,
    traffic::{ESTIMATOR_PERIOD, Overall},
    trash::Trash,
};
use crate::datapath::{self, Datapath};

/// The model of all services, and the datapath that follows it.
#[derive(Debug)]
pub struct Director<D> {
    datapath: D,
    config: Config,
    timeouts: Timeouts,
    sysctls: sysctl::Values,
    /// FULLNAT's local addresses for all services.
    locals: Vec<IpAddr>,
    services: BTreeMap<ServiceId, Service>,
    mark_rules: MarkRules,
    trash: Trash,
    overall: Overall,
    service_indices: Indices,
    server_indices: Indices,
    next_incarnation: u64,
    estimated: Option<Instant>,
    changed: bool,
    /// What schedulers that draw lots make them of.
    seed: u64,
}

impl<D: Datapath> Director<D> {
    /// A director without services. `config` holds the settings that are no command's business.
    pub fn new(datapath: D, config: Config) -> Result<Self, datapath::Error> {
        let mut director = Self {
            config,
            timeouts: Timeouts::default(),
            sysctls: sysctl::Values::default(),
            locals: Vec::new(),
            services: BTreeMap::new(),
            mark_rules: MarkRules::default(),
            trash: Trash::default(),
            overall: Overall::default(),
            service_indices: Indices::new(datapath.service_capacity()),
            server_indices: Indices::new(datapath.server_capacity()),
            next_incarnation: 0,
            estimated: None,
            changed: true,
            seed: seed(),
            datapath,
        };
        director.take_in_orphans()?;
        director.datapath.set_mark_rules(director.mark_rules.list())?;
        director.set_timeouts(&Timeouts::default())?;
        Ok(director)
    }

    /// Whether there is something to write to the state file since this was last asked.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// The mark rules, in the order of their marks.
    pub fn mark_rules(&self) -> &[MarkRule] {
        self.mark_rules.list()
    }

    /// The timeouts.
    pub fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// IPVS's sysctls.
    pub fn sysctls(&self) -> &sysctl::Values {
        &self.sysctls
    }

    /// Ticks of the kernel's clock in a second.
    pub fn clock_rate(&self) -> u32 {
        self.datapath.clock_rate()
    }

    /// How many services there are.
    pub fn service_count(&self) -> usize {
        self.services.len()
    }

    /// How many real servers there are, over all services.
    pub fn server_count(&self) -> usize {
        self.services.values().map(|service| service.servers.len()).sum()
    }

    /// To be called each second: refreshes, empties the trash, and feeds the estimators when their time has come.
    pub fn tick(&mut self, now: Instant) {
        self.refresh();
        self.datapath.clean_destinations();
        let datapath = &self.datapath;
        let idle = self.trash.take_idle(now, |index| named_by(datapath, index));
        self.forget_servers(idle);
        if self.estimated.is_none_or(|last| now.duration_since(last) >= ESTIMATOR_PERIOD) {
            self.estimated = Some(now);
            if let Err(error) = self.estimate() {
                warn!("rates are not brought up to date: {error}");
            }
        }
    }

    /// The datapath.
    pub fn datapath(&self) -> &D {
        &self.datapath
    }

    /// The datapath, for everything about it that is no director's business.
    pub fn datapath_mut(&mut self) -> &mut D {
        &mut self.datapath
    }

    /// The datapath, and nothing else.
    pub fn into_datapath(self) -> D {
        self.datapath
    }

    /// Whether there is any connection or template, as far as the live counters know.
    pub fn has_connections(&self) -> bool {
        let servers = self.services.values().flat_map(|service| &service.servers).map(|server| server.index);
        let mut all = servers.chain(self.trash.iter().map(|removed| removed.index));
        all.any(|index| self.datapath.counters(index).total != 0 || self.datapath.templates(index) != 0)
    }
}

/// A number that nobody foresees, and that is another one at each start.
fn seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

impl Refusal {
    /// What the datapath could not do, as an answer to a command.
    fn from_datapath(error: &datapath::Error) -> Self {
        let kind = match error {
            datapath::Error::Full { .. } => RefusalKind::NoRoom,
            datapath::Error::Kernel { .. } => RefusalKind::Failed,
        };
        Self { kind, message: error.to_string() }
    }
}

impl From<datapath::Error> for Refusal {
    fn from(error: datapath::Error) -> Self {
        Self::from_datapath(&error)
    }
}
