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

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    hash::{BuildHasher as _, Hasher as _, RandomState},
    net::IpAddr,
    path::Path,
    time::Instant,
};

use lb_common::{config::Config, local::SHARED, server::Counters, statistics::Statistics, tcp};
use tracing::warn;

use self::{
    indices::Indices,
    marks::MarkRules,
    model::{
        Command, MarkRule, Outcome, Refusal, RefusalKind, ServerConfig, ServerId, ServerView, ServiceConfig, ServiceId,
        ServiceView, Timeouts, Totals, Traffic,
    },
    rules::refuse,
    servers::Servers,
    service::{Server, Service},
    state::State,
    traffic::{ESTIMATOR_PERIOD, Estimator, Overall},
    trash::{Removed, Trash},
};
use crate::{
    datapath::{self, Datapath},
    scheduler::{Change, Run, Scheduler, flood},
};

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

/// What a list of commands has touched so far.
#[derive(Default)]
struct Pending {
    /// Services that need a new schedule.
    services: BTreeMap<ServiceId, Touched>,
    /// Servers that have to be retired once no schedule names them any more.
    retiring: BTreeSet<u32>,
    /// Indices of services that changed to another one: to be emptied.
    abandoned: Vec<u32>,
    /// All local addresses, once a new service has asked for them, and until they change.
    locals: Option<HashSet<IpAddr>>,
}

/// A touched service.
struct Touched {
    /// The service before the list; nothing if it is new.
    before: Option<Service>,
    /// Positions of the commands about it.
    commands: Vec<usize>,
    /// How many of the newest servers the scheduler has not been told of yet.
    untold: usize,
}

impl Touched {
    /// Tells the scheduler of new servers, one after the other as they came. They are told of together because the list of
    /// all servers, which goes with each, is made once.
    fn tell(&mut self, service: &mut Service) {
        let untold = std::mem::take(&mut self.untold);
        if untold == 0 {
            return;
        }
        let candidates = service.candidates();
        for newest in (0..untold).rev() {
            service.scheduler.servers_changed(&candidates[newest..], Change::Added);
        }
    }
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

    /// The director that wrote this state, come back. What the datapath still has stays as it is; schedules are
    /// published anew and go on exactly where they were. `path` is for the error's sake.
    pub fn adopt(datapath: D, config: Config, state: State, path: &Path) -> anyhow::Result<Self> {
        let mut service_indices = Indices::new(datapath.service_capacity());
        let mut server_indices = Indices::new(datapath.server_capacity());
        let mut services = BTreeMap::new();
        let mut trash = Trash::default();
        // Reading has made sure that everything is there once only: a claim fails for an index beyond the capacity.
        let too_large = |index: u32| state::Error::damaged(path, &format!("the index {index} is too large, or there twice"));
        for service in state.services {
            let indices = service.servers.iter().map(|server| server.index);
            if let Some(index) = indices.into_iter().find(|index| !server_indices.claim(*index)) {
                return Err(too_large(index).into());
            }
            if !service_indices.claim(service.index) {
                return Err(too_large(service.index).into());
            }
            services.insert(service.id, service);
        }
        for removed in state.trash {
            if !server_indices.claim(removed.index) {
                return Err(too_large(removed.index).into());
            }
            trash.insert(removed);
        }
        let mut director = Self {
            datapath,
            config,
            timeouts: state.timeouts,
            sysctls: state.sysctls,
            locals: state.locals,
            services,
            mark_rules: MarkRules::from(state.mark_rules),
            trash,
            overall: state.overall,
            service_indices,
            server_indices,
            next_incarnation: state.next_incarnation,
            estimated: None,
            changed: true,
            seed: seed(),
        };
        director.restore()?;
        Ok(director)
    }

    /// Brings the datapath in step with an adopted model.
    ///
    /// The datapath may be younger than the state (the machine was restarted, or everything was taken away): counters that
    /// began anew are not compared with what the state remembers of the old ones.
    fn restore(&mut self) -> Result<(), datapath::Error> {
        let known_services: BTreeSet<ServiceId> = self.datapath.services()?.into_iter().collect();
        let known_servers: BTreeSet<u32> = self.datapath.servers()?.into_iter().collect();
        self.take_in_orphans()?;
        self.datapath.set_mark_rules(self.mark_rules.list())?;
        let (timeouts, sysctls) = (self.timeouts, self.sysctls);
        self.set_timeouts(&timeouts)?;
        self.set_sysctls(sysctls)?;
        if known_servers.is_empty() {
            self.overall = Overall::default();
        }
        for index in self.trash.retain(|removed| known_servers.contains(&removed.index)) {
            self.server_indices.give_back(index);
        }
        for removed in self.trash.iter() {
            self.datapath.retire_server(removed.index)?;
        }
        self.datapath.set_pool(SHARED, &self.locals)?;
        for service in self.services.values() {
            self.datapath.set_pool(service.pool(), &service.locals)?;
            for server in &service.servers {
                self.datapath.set_scope(server.index, service.scope(server))?;
                self.datapath.set_server(server.index, &service.target(server))?;
            }
        }
        self.datapath.write_servers()?;
        for service in self.services.values_mut() {
            for server in service.servers.iter_mut() {
                if !known_servers.contains(&server.index) {
                    server.joined = self.datapath.statistics(server.index)?.into();
                    server.zero = server.joined;
                }
            }
            if !known_services.contains(&service.id) {
                service.base = self.datapath.cursor(service.index);
                service.left_behind = Totals::default();
                service.zero = Totals::default();
            }
        }
        let ids: Vec<ServiceId> = self.services.keys().copied().collect();
        for id in ids {
            self.bring_up_to_date(&id);
            self.start_from_now(&id);
            self.publish_flood(&id)?;
            self.publish(&id)?;
        }
        Ok(())
    }

    /// Takes services away from the datapath that this director knows nothing of, and puts such servers into the trash: the
    /// last daemon stopped before it could write them down, or its state file is lost.
    fn take_in_orphans(&mut self) -> Result<(), datapath::Error> {
        for id in self.datapath.services()? {
            if !self.services.contains_key(&id) {
                warn!("removing {id} from the datapath: the state file knows nothing of it");
                self.datapath.remove_service(&id)?;
            }
        }
        let known: BTreeSet<u32> = self.services.values().map(Service::pool).collect();
        for pool in self.datapath.pools()? {
            if !known.contains(&pool) && (pool != SHARED || self.locals.is_empty()) {
                self.datapath.set_pool(pool, &[])?;
            }
        }
        for index in self.datapath.servers()? {
            if self.server_indices.claim(index) {
                self.datapath.retire_server(index)?;
                self.trash.insert(Removed {
                    owner: None,
                    index,
                    incarnation: 0,
                    overloaded: false,
                    totals: self.datapath.statistics(index)?.into(),
                    zero: Totals::default(),
                    idle_since: None,
                });
            }
        }
        self.datapath.write_servers()
    }

    /// Does commands in order. Each stands for itself: a refused one changes nothing and does not stop the others.
    pub fn execute(&mut self, commands: &[Command]) -> Vec<Outcome> {
        let mut pending = Pending::default();
        let mut outcomes: Vec<Outcome> = Vec::with_capacity(commands.len());
        for (position, command) in commands.iter().enumerate() {
            outcomes.push(match self.apply(command, position, &mut pending) {
                Ok(()) => Outcome::Ok,
                Err(refusal) => Outcome::Refused(refusal),
            });
        }
        self.commit(pending, &mut outcomes);
        self.changed |= outcomes.contains(&Outcome::Ok);
        outcomes
    }

    /// Whether there is something to write to the state file since this was last asked.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// What the state file has to say.
    pub fn state(&self) -> State {
        State {
            netns_cookie: self.config.netns_cookie,
            timeouts: self.timeouts,
            sysctls: self.sysctls,
            overall: self.overall,
            locals: self.locals.clone(),
            services: self.services.values().cloned().collect(),
            mark_rules: self.mark_rules.list().to_vec(),
            trash: self.trash.iter().cloned().collect(),
            next_incarnation: self.next_incarnation,
            sync_daemons: Vec::new(),
        }
    }

    /// Every service, with its servers and their traffic.
    pub fn services(&self) -> Result<Vec<ServiceView>, datapath::Error> {
        self.services.values().map(|service| self.view(service)).collect()
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

    /// What all real servers together do, and those that were there before them.
    pub fn traffic(&self) -> Result<Traffic, datapath::Error> {
        let mut totals = self.totals_of_removed();
        for server in self.services.values().flat_map(|service| &service.servers) {
            totals = totals.plus(self.datapath.statistics(server.index)?.into());
        }
        Ok(Traffic { totals: totals.since(self.overall.zero), rates: self.overall.estimator.rates() })
    }

    /// What the real servers did that are not there any more.
    fn totals_of_removed(&self) -> Totals {
        self.trash.iter().fold(self.overall.forgotten, |sum, removed| sum.plus(removed.totals))
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

    fn apply(&mut self, command: &Command, position: usize, pending: &mut Pending) -> Result<(), Refusal> {
        match command {
            Command::AddService { service, config } => self.add_service(*service, config, position, pending),
            Command::EditService { service, config } => self.edit_service(*service, config, position, pending),
            Command::RemoveService { service } => self.remove_service(service, pending),
            Command::AddServer { service, server, config } => self.add_server(*service, *server, config, position, pending),
            Command::EditServer { service, server, config } => self.edit_server(service, server, config, position, pending),
            Command::RemoveServer { service, server } => self.remove_server(service, server, position, pending),
            Command::Clear => {
                let ids: Vec<ServiceId> = self.services.keys().copied().collect();
                ids.iter().try_for_each(|id| self.remove_service(id, pending))
            }
            Command::Zero { service: Some(id) } => self.zero(id),
            Command::Zero { service: None } => {
                let ids: Vec<ServiceId> = self.services.keys().copied().collect();
                ids.iter().try_for_each(|id| self.zero(id))?;
                self.overall.zero = self.traffic()?.totals.plus(self.overall.zero);
                self.overall.estimator = Estimator::from(self.overall.zero);
                Ok(())
            }
            Command::FlushTemplates { service } => {
                if let Some(id) = service
                    && !self.services.contains_key(id)
                {
                    return Err(no_such_service(id));
                }
                Ok(self.datapath.flush_templates(service.as_ref())?)
            }
            Command::AddMarkRule(rule) => self.change_mark_rules(|rules| rules.with(rule)),
            Command::RemoveMarkRule(rule) => self.change_mark_rules(|rules| rules.without(rule)),
            Command::SetTimeouts(timeouts) => {
                rules::timeouts(timeouts, self.datapath.clock_rate())?;
                Ok(self.set_timeouts(timeouts)?)
            }
            Command::SetSysctl { name, value } => {
                let sysctls = self.sysctls.with(name, *value)?;
                Ok(self.set_sysctls(sysctls)?)
            }
            Command::AddLocalAddress { address, service } => {
                pending.locals = None;
                self.add_local(*address, service.as_ref())
            }
            Command::RemoveLocalAddress { address, service } => {
                pending.locals = None;
                self.remove_local(*address, service.as_ref())
            }
            Command::StartSync(_) | Command::StopSync(_) => refuse(
                RefusalKind::Unsupported,
                "a director has no synchronisation daemons by itself; ask the daemon that runs it".to_owned(),
            ),
        }
    }

    fn change_mark_rules(&mut self, change: impl FnOnce(&MarkRules) -> Result<MarkRules, Refusal>) -> Result<(), Refusal> {
        let changed = change(&self.mark_rules)?;
        self.datapath.set_mark_rules(changed.list())?;
        self.mark_rules = changed;
        Ok(())
    }

    fn add_service(
        &mut self,
        id: ServiceId,
        config: &ServiceConfig,
        position: usize,
        pending: &mut Pending,
    ) -> Result<(), Refusal> {
        if self.services.contains_key(&id) {
            return refuse(
                RefusalKind::ServiceExists,
                format!("the service {id} cannot be added: it exists; edit it (`-E`), or remove it first (`-D`)"),
            );
        }
        if let ServiceId::Address { address, .. } = id
            && pending.locals.get_or_insert_with(|| self.local_addresses().map(|(local, _)| local).collect()).contains(&address)
        {
            return Err(locals::is_virtual(address));
        }
        let mut scheduler = scheduler(&id, config)?;
        scheduler.servers_changed(&[], Change::Started);
        let index = self.new_service_index(&id)?;
        self.next_incarnation += 1;
        let service = Service {
            id,
            config: config.clone(),
            index,
            incarnation: self.next_incarnation,
            scheduler,
            base: self.datapath.cursor(index),
            ahead: 0,
            stuck: false,
            lasts: None,
            flood: None,
            locals: Vec::new(),
            servers: Servers::default(),
            left_behind: Totals::default(),
            zero: Totals::default(),
            estimator: Estimator::from(Totals::default()),
        };
        self.services.insert(id, service);
        pending.services.insert(id, Touched { before: None, commands: vec![position], untold: 0 });
        Ok(())
    }

    fn edit_service(
        &mut self,
        id: ServiceId,
        config: &ServiceConfig,
        position: usize,
        pending: &mut Pending,
    ) -> Result<(), Refusal> {
        let old = self.services.get(&id).ok_or_else(|| no_such_service(&id))?;
        let mut scheduler = scheduler(&id, config)?;
        old.servers.iter().try_for_each(|server| rules::one_packet(&id, config, &server.id, server.config.method))?;
        let other_mode = scheduler.mode() != old.scheduler.mode();
        // IPVS leaves a scheduler alone that stays the same.
        let same = scheduler.name() == old.scheduler.name();
        // Persistence decides whether connections keep their port.
        let edited = Service { config: config.clone(), ..old.clone() };
        for server in &edited.servers {
            let target = edited.target(server);
            if target != old.target(server) {
                self.datapath.set_server(server.index, &target)?;
            }
        }
        // A schedule must not be read in the mode of another: the service moves to a new index, in one step.
        let index = if other_mode { Some(self.new_service_index(&id)?) } else { None };
        let touched = self.touch(&id, position, pending);
        let service = self.services.get_mut(&id).ok_or_else(|| no_such_service(&id))?;
        touched.tell(service);
        service.config = config.clone();
        if same {
            service.scheduler.set_flags(config.flags);
        } else {
            scheduler.servers_changed(&service.candidates(), Change::Started);
            service.scheduler = scheduler;
        }
        if let Some(index) = index {
            pending.abandoned.push(std::mem::replace(&mut service.index, index));
            service.base = self.datapath.cursor(index);
        }
        Ok(())
    }

    fn remove_service(&mut self, id: &ServiceId, pending: &mut Pending) -> Result<(), Refusal> {
        let service = self.services.get_mut(id).ok_or_else(|| no_such_service(id))?;
        let totals = totals_at_rest(&self.datapath, service)?;
        let published = pending.services.get(id).is_none_or(|touched| touched.before.is_some());
        if published {
            self.datapath.remove_service(id)?;
        }
        let (index, incarnation) = (service.index, service.incarnation);
        pending.services.remove(id);
        pending.abandoned.push(index);
        if let Some(service) = self.services.remove(id) {
            if !service.locals.is_empty() {
                pending.locals = None;
                if let Err(error) = self.datapath.set_pool(service.pool(), &[]) {
                    warn!("the local addresses of {id} keep their room: {error}");
                }
            }
            for (server, totals) in service.servers.iter().zip(totals) {
                pending.retiring.insert(server.index);
                self.trash.insert(removed(id, incarnation, server, totals));
            }
        }
        Ok(())
    }

    fn add_server(
        &mut self,
        service_id: ServiceId,
        id: ServerId,
        config: &ServerConfig,
        position: usize,
        pending: &mut Pending,
    ) -> Result<(), Refusal> {
        let service = self.services.get(&service_id).ok_or_else(|| no_such_service(&service_id))?;
        rules::server(&service_id, &id, config)?;
        if service.servers.contains(&id) {
            return refuse(
                RefusalKind::ServerExists,
                format!(
                    "the real server {id} cannot be added to {service_id}: it is there; edit it (`-e`), or remove it first (`-d`)"
                ),
            );
        }
        rules::server_address(&id)?;
        rules::server_supported(&id, config)?;
        rules::one_packet(&service_id, &service.config, &id, config.method)?;
        locals::suffices(&self.locals, &service.locals, &id, config.method)?;
        let incarnation = service.incarnation;
        let back = self.trash.take(service_id, id);
        let index = match &back {
            Some(removed) => removed.index,
            None => self.new_server_index(&id, &pending.retiring)?,
        };
        let mut server = Server {
            id,
            config: *config,
            index,
            last_weight: 0,
            overloaded: back.as_ref().is_some_and(|removed| removed.overloaded),
            live: Counters::default(),
            peak: 0,
            at_rest: None,
            joined: Totals::default(),
            zero: Totals::default(),
            estimator: Estimator::default(),
        };
        let target = self.services.get(&service_id).ok_or_else(|| no_such_service(&service_id))?.target(&server);
        // The counters of an index that was free are zero.
        let statistics = |datapath: &D| if back.is_some() { datapath.statistics(index) } else { Ok(Statistics::default()) };
        let outcome = self.datapath.set_server(index, &target).and_then(|()| statistics(&self.datapath));
        match outcome {
            Ok(statistics) => server.joined = statistics.into(),
            Err(error) => {
                match back {
                    Some(removed) => self.trash.insert(removed),
                    None => self.server_indices.give_back(index),
                }
                return Err(error.into());
            }
        }
        pending.retiring.remove(&index);
        server.zero = match back {
            Some(removed) if removed.incarnation == incarnation => removed.zero,
            _ => server.joined,
        };
        server.estimator = Estimator::from(server.joined);
        server.configure(config, &self.datapath);
        let touched = self.touch(&service_id, position, pending);
        touched.untold += 1;
        if let Some(service) = self.services.get_mut(&service_id) {
            service.servers.add(server);
        }
        Ok(())
    }

    fn edit_server(
        &mut self,
        service_id: &ServiceId,
        id: &ServerId,
        config: &ServerConfig,
        position: usize,
        pending: &mut Pending,
    ) -> Result<(), Refusal> {
        let service = self.services.get(service_id).ok_or_else(|| no_such_service(service_id))?;
        rules::server(service_id, id, config)?;
        let place = service.servers.position(id).ok_or_else(|| no_such_server(service_id, id))?;
        rules::server_supported(id, config)?;
        rules::one_packet(service_id, &service.config, id, config.method)?;
        locals::suffices(&self.locals, &service.locals, id, config.method)?;
        let mut server = service.servers[place].clone();
        let method = server.config.method;
        server.configure(config, &self.datapath);
        if method != config.method {
            self.datapath.set_server(server.index, &service.target(&server))?;
        }
        self.change_servers(service_id, position, pending, |servers| {
            servers[place] = server;
            Change::Edited { position: place }
        });
        Ok(())
    }

    fn remove_server(
        &mut self,
        service_id: &ServiceId,
        id: &ServerId,
        position: usize,
        pending: &mut Pending,
    ) -> Result<(), Refusal> {
        let service = self.services.get(service_id).ok_or_else(|| no_such_service(service_id))?;
        let place = service.servers.position(id).ok_or_else(|| no_such_server(service_id, id))?;
        let server = &service.servers[place];
        let (index, joined) = (server.index, server.joined);
        let totals = Totals::from(self.datapath.statistics(index)?);
        self.trash.insert(removed(service_id, service.incarnation, server, totals));
        pending.retiring.insert(index);
        self.change_servers(service_id, position, pending, |servers| {
            servers.remove(place);
            Change::Removed { position: place, index }
        });
        if let Some(service) = self.services.get_mut(service_id) {
            service.left_behind = service.left_behind.plus(totals.since(joined));
        }
        Ok(())
    }

    /// Changes the servers of a service, and tells its scheduler.
    fn change_servers(
        &mut self,
        id: &ServiceId,
        position: usize,
        pending: &mut Pending,
        change: impl FnOnce(&mut Servers) -> Change,
    ) {
        let touched = self.touch(id, position, pending);
        if let Some(service) = self.services.get_mut(id) {
            touched.tell(service);
            let change = change(&mut service.servers);
            service.scheduler.servers_changed(&service.candidates(), change);
        }
    }

    /// Notes that a command is about to change a service.
    fn touch<'a>(&mut self, id: &ServiceId, position: usize, pending: &'a mut Pending) -> &'a mut Touched {
        let touched = pending.services.entry(*id).or_insert_with(|| {
            self.bring_up_to_date(id);
            Touched { before: self.services.get(id).cloned(), commands: Vec::new(), untold: 0 }
        });
        touched.commands.push(position);
        touched
    }

    /// Brings a service's scheduler to where its cursor stands.
    fn bring_up_to_date(&mut self, id: &ServiceId) {
        if let Some(service) = self.services.get_mut(id) {
            service.advance(self.datapath.cursor(service.index));
        }
    }

    /// Publishes what a list of commands has changed.
    fn commit(&mut self, pending: Pending, outcomes: &mut [Outcome]) {
        let Pending { services, mut retiring, mut abandoned, locals: _ } = pending;
        let mut unwritten = self.datapath.write_servers().err();
        for (id, mut touched) in services {
            if let Some(service) = self.services.get_mut(&id) {
                touched.tell(service);
            }
            self.start_from_now(&id);
            let published = unwritten
                .take()
                .map_or(Ok(()), Err)
                .and_then(|()| self.set_scopes(&id))
                .and_then(|()| self.publish_flood(&id))
                .and_then(|()| self.publish(&id));
            let Err(error) = published else { continue };
            self.roll_back(&id, touched.before, &mut retiring, &mut abandoned);
            self.set_flood_back(&id);
            for position in touched.commands {
                if outcomes[position] == Outcome::Ok {
                    outcomes[position] = Outcome::Refused(Refusal::from_datapath(&error));
                }
            }
        }
        // Those that were set back.
        if let Err(error) = self.datapath.write_servers() {
            warn!("real servers are not what they were: {error}");
        }
        for index in abandoned {
            let withdrawn = self.datapath.publish_flood(index, &[]);
            if let Err(error) = withdrawn.and_then(|()| self.datapath.publish(index, &Run::default())) {
                warn!("the schedule of a removed service keeps its room: {error}");
            }
            self.service_indices.give_back(index);
        }
        for index in retiring {
            if let Err(error) = self.datapath.retire_server(index) {
                warn!("connections to a removed server go on: {error}");
            }
        }
        if let Err(error) = self.datapath.write_servers() {
            warn!("connections to removed servers go on: {error}");
        }
    }

    /// Says how the templates of a service's connections are found.
    fn set_scopes(&mut self, id: &ServiceId) -> Result<(), datapath::Error> {
        let Some(service) = self.services.get(id) else { return Ok(()) };
        service.servers.iter().try_for_each(|server| self.datapath.set_scope(server.index, service.scope(server)))
    }

    /// Compiles and publishes the schedule of a service, from its [`Service::base`] on, and then the service.
    fn publish(&mut self, id: &ServiceId) -> Result<(), datapath::Error> {
        let Some(service) = self.services.get_mut(id) else { return Ok(()) };
        let run = service.scheduler.compile(&service.candidates(), service.arrivals(self.seed));
        self.datapath.publish(service.index, &run)?;
        service.lasts = run.truncated.then_some(run.picks.len() as u32);
        self.datapath.set_service(id, service.entry())
    }

    /// Compiles the table that a service has for flood mode, and publishes it unless it is there already.
    pub(super) fn publish_flood(&mut self, id: &ServiceId) -> Result<(), datapath::Error> {
        let Some(service) = self.services.get_mut(id) else { return Ok(()) };
        let table = flood::table(&service.candidates(), id.family());
        if service.flood.as_ref() != Some(&table) {
            self.datapath.publish_flood(service.index, &table)?;
            service.flood = Some(table);
        }
        Ok(())
    }

    /// The same for a service that was set back: what is published may be of the one that failed.
    fn set_flood_back(&mut self, id: &ServiceId) {
        let Some(service) = self.services.get_mut(id) else { return };
        service.flood = None;
        if let Err(error) = self.publish_flood(id) {
            warn!("the table of {id} for flood mode is not what it was: {error}");
        }
    }

    /// Makes a service again what it was before a list of commands.
    fn roll_back(&mut self, id: &ServiceId, before: Option<Service>, retiring: &mut BTreeSet<u32>, abandoned: &mut Vec<u32>) {
        let Some(after) = self.services.remove(id) else { return };
        let kept: BTreeSet<u32> = before.iter().flat_map(|service| &service.servers).map(|server| server.index).collect();
        for server in &after.servers {
            if !kept.contains(&server.index) {
                retiring.insert(server.index);
                // It was there for this list of commands only.
                self.trash.insert(removed(id, after.incarnation, server, server.joined));
            }
        }
        for (service, server) in before.iter().flat_map(|service| service.servers.iter().map(move |server| (service, server))) {
            retiring.remove(&server.index);
            self.trash.take(*id, server.id);
            let set_back = self.datapath.set_scope(server.index, service.scope(server));
            if let Err(error) = set_back.and_then(|()| self.datapath.set_server(server.index, &service.target(server))) {
                warn!("the real server {} could not be set back: {error}", server.id);
            }
        }
        match before {
            Some(mut service) => {
                // Local addresses are no part of the schedule that failed.
                service.locals = after.locals;
                if service.index != after.index {
                    abandoned.retain(|index| *index != service.index);
                    abandoned.push(after.index);
                }
                self.services.insert(*id, service);
            }
            None => abandoned.push(after.index),
        }
    }

    fn add_local(&mut self, address: IpAddr, service: Option<&ServiceId>) -> Result<(), Refusal> {
        let is_virtual = |id: &ServiceId| matches!(id, ServiceId::Address { address: vip, .. } if *vip == address);
        if self.services.keys().any(is_virtual) {
            return Err(locals::is_virtual(address));
        }
        let (pool, addresses) = self.local_pool(service)?;
        locals::may_add(address, service, addresses)?;
        let mut wanted = addresses.clone();
        wanted.push(address);
        self.set_local_pool(service, pool, wanted)
    }

    fn remove_local(&mut self, address: IpAddr, service: Option<&ServiceId>) -> Result<(), Refusal> {
        let (pool, addresses) = self.local_pool(service)?;
        let mut wanted = addresses.clone();
        let Some(place) = wanted.iter().position(|known| *known == address) else {
            let owner = locals::owner(service);
            let message =
                format!("the local address {address} cannot be removed: {owner} has none of this name; see `bpfvs localaddr list`");
            return refuse(RefusalKind::NoSuchLocalAddress, message);
        };
        wanted.remove(place);
        if let Some(service) = service.and_then(|id| self.services.get(id)) {
            locals::may_remove(address, &self.locals, [(service, wanted.as_slice())])?;
        } else {
            let services = self.services.values().map(|service| (service, service.locals.as_slice()));
            locals::may_remove(address, &wanted, services)?;
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

    fn zero(&mut self, id: &ServiceId) -> Result<(), Refusal> {
        let datapath = &self.datapath;
        let service = self.services.get_mut(id).ok_or_else(|| no_such_service(id))?;
        let totals = read_totals(datapath, service)?;
        for (server, totals) in service.servers.iter_mut().zip(&totals) {
            server.zero = *totals;
            server.estimator = Estimator::from(*totals);
        }
        let mut totals = totals.into_iter();
        service.zero = service.totals(|_| totals.next().unwrap_or_default());
        service.estimator = Estimator::from(service.zero);
        Ok(())
    }

    fn set_timeouts(&mut self, timeouts: &Timeouts) -> Result<(), datapath::Error> {
        let keep = |new: u32, old: u32| if new == 0 { old } else { new };
        let timeouts = Timeouts {
            tcp: keep(timeouts.tcp, self.timeouts.tcp),
            tcp_fin: keep(timeouts.tcp_fin, self.timeouts.tcp_fin),
            udp: keep(timeouts.udp, self.timeouts.udp),
        };
        let mut config = self.config;
        config.tcp_timeouts[tcp::State::Established as usize] = timeouts.tcp;
        config.tcp_timeouts[tcp::State::FinWait as usize] = timeouts.tcp_fin;
        config.udp_timeout = timeouts.udp;
        self.datapath.configure(&config)?;
        self.config = config;
        self.timeouts = timeouts;
        Ok(())
    }

    fn set_sysctls(&mut self, sysctls: sysctl::Values) -> Result<(), datapath::Error> {
        let mut config = self.config;
        sysctls.write_to(&mut config);
        self.datapath.configure(&config)?;
        self.config = config;
        self.sysctls = sysctls;
        Ok(())
    }

    fn estimate(&mut self) -> Result<(), datapath::Error> {
        let mut overall = self.totals_of_removed();
        for service in self.services.values_mut() {
            let totals = totals_at_rest(&self.datapath, service)?;
            for (server, totals) in service.servers.iter_mut().zip(&totals) {
                server.estimator.tick(*totals);
                overall = overall.plus(*totals);
            }
            let mut totals = totals.into_iter();
            let sum = service.totals(|_| totals.next().unwrap_or_default());
            service.estimator.tick(sum);
        }
        self.overall.estimator.tick(overall);
        Ok(())
    }

    /// Whether there is any connection or template, as far as the live counters know.
    pub fn has_connections(&self) -> bool {
        let servers = self.services.values().flat_map(|service| &service.servers).map(|server| server.index);
        let mut all = servers.chain(self.trash.iter().map(|removed| removed.index));
        all.any(|index| self.datapath.counters(index).total != 0 || self.datapath.templates(index) != 0)
    }

    fn view(&self, service: &Service) -> Result<ServiceView, datapath::Error> {
        let totals = read_totals(&self.datapath, service)?;
        let servers = service.servers.iter().zip(&totals).map(|(server, totals)| {
            let counters = self.datapath.counters(server.index);
            ServerView {
                id: server.id,
                config: server.config,
                active: counters.active,
                inactive: counters.inactive(),
                persistent: self.datapath.templates(server.index),
                traffic: Traffic { totals: totals.since(server.zero), rates: server.estimator.rates() },
                reachability: reachability(self.datapath.reachability(server.index)).to_owned(),
                index: server.index,
            }
        });
        let servers = servers.collect();
        let mut totals = totals.into_iter();
        let sum = service.totals(|_| totals.next().unwrap_or_default());
        Ok(ServiceView {
            id: service.id,
            config: service.config.clone(),
            traffic: Traffic { totals: sum.since(service.zero), rates: service.estimator.rates() },
            servers,
        })
    }

    fn new_service_index(&mut self, id: &ServiceId) -> Result<u32, Refusal> {
        let capacity = self.service_indices.capacity();
        self.service_indices.take().ok_or_else(|| Refusal {
            kind: RefusalKind::NoRoom,
            message: format!("the service {id} cannot be added: there are {capacity} services already; remove some"),
        })
    }

    /// The index of a new real server. `retiring` are those whose removal the datapath has not heard of yet.
    fn new_server_index(&mut self, id: &ServerId, retiring: &BTreeSet<u32>) -> Result<u32, Refusal> {
        if let Some(index) = self.server_indices.take() {
            return Ok(index);
        }
        let datapath = &self.datapath;
        let may_go = |index| !retiring.contains(&index) && named_by(datapath, index) == 0;
        let idle = self.trash.take_some(Instant::now(), may_go);
        self.forget_servers(idle);
        let capacity = self.server_indices.capacity();
        self.server_indices.take().ok_or_else(|| Refusal {
            kind: RefusalKind::NoRoom,
            message: format!(
                "the real server {id} cannot be added: there are {capacity} already, with removed ones that still have connections; \
                 remove some, and wait until their connections are over"
            ),
        })
    }

    /// Forgets servers that were taken out of the trash, for good.
    fn forget_servers(&mut self, servers: Vec<Removed>) {
        for removed in servers {
            match self.datapath.free_server(removed.index) {
                Ok(()) => {
                    self.server_indices.give_back(removed.index);
                    self.overall.forgotten = self.overall.forgotten.plus(removed.totals);
                    self.changed = true;
                }
                Err(error) => {
                    warn!("a removed server stays for now: {error}");
                    self.trash.insert(removed);
                }
            }
        }
    }
}

/// A number that nobody foresees, and that is another one at each start.
fn seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// The totals of a service's servers, in order.
fn read_totals<D: Datapath>(datapath: &D, service: &Service) -> Result<Vec<Totals>, datapath::Error> {
    service.servers.iter().map(|server| datapath.statistics(server.index).map(Totals::from)).collect()
}

/// The totals of a service's servers, in order. To read them takes a system call, so that a server without connections is asked
/// once only: what it had then it still has, unless packets need no connection.
fn totals_at_rest<D: Datapath>(datapath: &D, service: &mut Service) -> Result<Vec<Totals>, datapath::Error> {
    let one_packet = service.config.one_packet;
    let read = |server: &mut Server| {
        let at_rest = !one_packet && datapath.counters(server.index).total == 0;
        if let (true, Some(totals)) = (at_rest, server.at_rest) {
            return Ok(totals);
        }
        let totals = Totals::from(datapath.statistics(server.index)?);
        server.at_rest = at_rest.then_some(totals);
        Ok(totals)
    };
    service.servers.iter_mut().map(read).collect()
}

/// A server on its way into the trash.
fn removed(service: &ServiceId, incarnation: u64, server: &Server, totals: Totals) -> Removed {
    Removed {
        owner: Some((*service, server.id)),
        index: server.index,
        incarnation,
        overloaded: server.overloaded,
        totals,
        zero: server.zero,
        idle_since: Some(Instant::now()),
    }
}

/// How many connections and templates name a real server.
fn named_by<D: Datapath>(datapath: &D, index: u32) -> u32 {
    datapath.counters(index).total.saturating_add(datapath.templates(index))
}

/// The scheduler that a configuration asks for, if the configuration can be had at all.
fn scheduler(id: &ServiceId, config: &ServiceConfig) -> Result<Scheduler, Refusal> {
    let scheduler = Scheduler::from_name(&config.scheduler, config.flags, id.family());
    let scheduler = scheduler.map_err(|unknown| rules::scheduler(&unknown));
    // What IPVS would refuse, too, comes first.
    if let Err(refusal) = &scheduler
        && refusal.kind == RefusalKind::SchedulerNotFound
    {
        return scheduler;
    }
    rules::engine(config)?;
    rules::service(id, config)?;
    rules::service_supported(id, config)?;
    scheduler
}

fn no_such_service(id: &ServiceId) -> Refusal {
    Refusal {
        kind: RefusalKind::NoSuchService,
        message: format!("there is no service {id}; see `bpfvs service list`, or add it first"),
    }
}

fn no_such_server(service: &ServiceId, id: &ServerId) -> Refusal {
    Refusal {
        kind: RefusalKind::NoSuchServer,
        message: format!("the service {service} has no real server {id}; see `bpfvs server list`, or add it first"),
    }
}

/// A status in words.
fn reachability(status: lb_common::server::Status) -> &'static str {
    use lb_common::server::Status;
    match status {
        Status::Ready => "ready",
        Status::Unresolved => "unresolved",
        Status::NoRoute => "no route",
        Status::Local => "local",
        Status::Free => "free",
        Status::Removed => "removed",
    }
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
