//! What the director tells of itself: services and real servers with their counters.

use super::{
    Director,
    model::{ServerView, ServiceView, Totals, Traffic},
    service::{Server, Service},
};
use crate::datapath::{self, Datapath};

impl<D: Datapath> Director<D> {
    /// Every service, with its servers and their traffic.
    pub fn services(&self) -> Result<Vec<ServiceView>, datapath::Error> {
        self.services.values().map(|service| self.view(service)).collect()
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

    pub(super) fn estimate(&mut self) -> Result<(), datapath::Error> {
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
}

/// The totals of a service's servers, in order.
pub(super) fn read_totals<D: Datapath>(datapath: &D, service: &Service) -> Result<Vec<Totals>, datapath::Error> {
    service.servers.iter().map(|server| datapath.statistics(server.index).map(Totals::from)).collect()
}

/// The totals of a service's servers, in order. To read them takes a system call, so that a server without connections is asked
/// once only: what it had then it still has, unless packets need no connection.
pub(super) fn totals_at_rest<D: Datapath>(datapath: &D, service: &mut Service) -> Result<Vec<Totals>, datapath::Error> {
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

/// A status in words.
pub(super) fn reachability(status: lb_common::server::Status) -> &'static str {
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
