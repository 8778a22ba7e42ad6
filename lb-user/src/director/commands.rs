//! What commands do: one list is one step ([`Director::execute`]).
//!
//! Each command changes the model at once, and notes what it has touched; [`commit`](super::commit) then brings the datapath in step.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
    time::Instant,
};

use lb_common::{server::Counters, statistics::Statistics, tcp};
use tracing::warn;

use super::{
    Director, locals,
    marks::MarkRules,
    model::{Command, Outcome, Refusal, RefusalKind, ServerConfig, ServerId, ServiceConfig, ServiceId, Timeouts, Totals},
    rules::{self, refuse},
    servers::Servers,
    service::{Server, Service},
    sysctl,
    traffic::Estimator,
    trash::Removed,
    views::{read_totals, totals_at_rest},
};
use crate::{
    datapath::{self, Datapath},
    scheduler::{Change, Scheduler},
};

/// What a list of commands has touched so far.
#[derive(Default)]
pub(super) struct Pending {
    /// Services that need a new schedule.
    pub(super) services: BTreeMap<ServiceId, Touched>,
    /// Servers that have to be retired once no schedule names them any more.
    pub(super) retiring: BTreeSet<u32>,
    /// Indices of services that changed to another one: to be emptied.
    pub(super) abandoned: Vec<u32>,
    /// All local addresses, once a new service has asked for them, and until they change.
    pub(super) locals: Option<HashSet<IpAddr>>,
}

/// A touched service.
pub(super) struct Touched {
    /// The service before the list; nothing if it is new.
    pub(super) before: Option<Service>,
    /// Positions of the commands about it.
    pub(super) commands: Vec<usize>,
    /// How many of the newest servers the scheduler has not been told of yet.
    pub(super) untold: usize,
}

impl Touched {
    /// Tells the scheduler of new servers, one after the other as they came. They are told of together because the list of
    /// all servers, which goes with each, is made once.
    pub(super) fn tell(&mut self, service: &mut Service) {
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

    pub(super) fn add_service(
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

    pub(super) fn remove_service(&mut self, id: &ServiceId, pending: &mut Pending) -> Result<(), Refusal> {
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

    pub(super) fn add_server(
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

    pub(super) fn remove_server(
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
    pub(super) fn bring_up_to_date(&mut self, id: &ServiceId) {
        if let Some(service) = self.services.get_mut(id) {
            service.advance(self.datapath.cursor(service.index));
        }
    }

    pub(super) fn zero(&mut self, id: &ServiceId) -> Result<(), Refusal> {
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

    pub(super) fn set_timeouts(&mut self, timeouts: &Timeouts) -> Result<(), datapath::Error> {
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

    pub(super) fn set_sysctls(&mut self, sysctls: sysctl::Values) -> Result<(), datapath::Error> {
        let mut config = self.config;
        sysctls.write_to(&mut config);
        self.datapath.configure(&config)?;
        self.config = config;
        self.sysctls = sysctls;
        Ok(())
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
    pub(super) fn forget_servers(&mut self, servers: Vec<Removed>) {
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

/// A server on its way into the trash.
pub(super) fn removed(service: &ServiceId, incarnation: u64, server: &Server, totals: Totals) -> Removed {
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
pub(super) fn named_by<D: Datapath>(datapath: &D, index: u32) -> u32 {
    datapath.counters(index).total.saturating_add(datapath.templates(index))
}

/// The scheduler that a configuration asks for, if the configuration can be had at all.
pub(super) fn scheduler(id: &ServiceId, config: &ServiceConfig) -> Result<Scheduler, Refusal> {
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
    rules::service_supported(id)?;
    scheduler
}

pub(super) fn no_such_service(id: &ServiceId) -> Refusal {
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
