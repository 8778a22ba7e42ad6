//! The end of a list of commands: new schedules for the services that it touched, or all of it undone for those that find no room.

use std::collections::BTreeSet;

use tracing::warn;

use super::{
    Director,
    commands::{Pending, removed},
    model::{Outcome, Refusal, ServiceId},
    service::Service,
};
use crate::{
    datapath::{self, Datapath},
    scheduler::{Run, flood},
};

impl<D: Datapath> Director<D> {
    /// Publishes what a list of commands has changed.
    pub(super) fn commit(&mut self, pending: Pending, outcomes: &mut [Outcome]) {
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
    pub(super) fn publish(&mut self, id: &ServiceId) -> Result<(), datapath::Error> {
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
}
