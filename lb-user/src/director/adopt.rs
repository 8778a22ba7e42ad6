//! A new director takes over what an earlier one has left: its state, and what is at work in the datapath.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use lb_common::{config::Config, local::SHARED};
use tracing::warn;

use super::{
    Director,
    indices::Indices,
    marks::MarkRules,
    model::{ServiceId, Totals},
    seed,
    service::Service,
    state::{self, State},
    traffic::Overall,
    trash::{Removed, Trash},
};
use crate::datapath::{self, Datapath};

impl<D: Datapath> Director<D> {
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
    pub(super) fn take_in_orphans(&mut self) -> Result<(), datapath::Error> {
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
}
