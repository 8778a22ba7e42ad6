//! A virtual service and its real servers, as the director keeps them.
//!
//! Everything here is written to the state file, but for the moving averages.

use std::net::IpAddr;

use lb_common::{
    server::Counters,
    service::{Service as ServiceEntry, flags},
    template::{Scope, scope_flags},
};
use serde::{Deserialize, Serialize};

use super::{
    model::{Family, Persistence, ServerConfig, ServerId, ServiceConfig, ServiceId, Totals},
    servers::Servers,
    traffic::Estimator,
};
use crate::{
    datapath::{Datapath, Target},
    scheduler::{Candidate, Scheduler},
};

/// A virtual service.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Service {
    /// Which.
    pub(super) id: ServiceId,
    /// How.
    pub(super) config: ServiceConfig,
    /// Its index in the datapath's arrays of schedules and cursors.
    pub(super) index: u32,
    /// Tells it from services of the same address that were there before.
    pub(super) incarnation: u64,
    /// The scheduler and where it stood when the cursor stood at `base`.
    pub(super) scheduler: Scheduler,
    /// Where the cursor stood when the schedule was published.
    pub(super) base: u32,
    /// How many arrivals its next schedule should at least look ahead, if it is a forecast.
    #[serde(skip)]
    pub(super) ahead: u32,
    /// Its last schedule could not be published.
    #[serde(skip)]
    pub(super) stuck: bool,
    /// After how many picks the schedule has to be made anew; nothing if it repeats for ever.
    #[serde(skip)]
    pub(super) lasts: Option<u32>,
    /// The table for flood mode, as it is published.
    #[serde(skip)]
    pub(super) flood: Option<Vec<u32>>,
    /// FULLNAT's local addresses, if it has any of its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) locals: Vec<IpAddr>,
    /// The real servers, the newest first.
    pub(super) servers: Servers,
    /// Traffic of servers that have left.
    #[serde(default, skip_serializing_if = "Totals::is_zero")]
    pub(super) left_behind: Totals,
    /// What the totals were at the last zeroing.
    #[serde(default, skip_serializing_if = "Totals::is_zero")]
    pub(super) zero: Totals,
    /// Rates.
    #[serde(skip)]
    pub(super) estimator: Estimator,
}

impl Service {
    /// The servers as schedulers see them.
    pub(super) fn candidates(&self) -> Vec<Candidate> {
        self.servers.iter().map(Server::candidate).collect()
    }

    /// Brings the scheduler to where the cursor stands.
    pub(super) fn advance(&mut self, cursor: u32) {
        let taken = cursor.wrapping_sub(self.base);
        if taken != 0 {
            if !self.scheduler.is_dynamic() {
                self.scheduler.advance(&self.candidates(), taken);
            }
            self.base = cursor;
        }
    }

    /// The datapath's name for its pool of local addresses. Its index may change, this does not.
    pub(super) const fn pool(&self) -> u32 {
        self.incarnation as u32
    }

    /// The service as the datapath sees it.
    pub(super) fn entry(&self) -> ServiceEntry {
        let set = |condition, flag| if condition { flag } else { 0 };
        let (persistence, netmask, prefix) = self.config.persistence.map_or((0, 0, 0), |Persistence { timeout, mask }| {
            let prefix = match self.id.family() {
                Family::Ipv6 => mask,
                Family::Ipv4 if mask.leading_ones() == mask.count_ones() => mask.count_ones(),
                Family::Ipv4 => 0,
            };
            (timeout, if self.id.family() == Family::Ipv4 { mask.to_be() } else { mask }, u8::try_from(prefix).unwrap_or(0))
        });
        ServiceEntry {
            id: self.index,
            mode: self.scheduler.mode() as u8,
            flags: self.scheduler.service_flags()
                | set(self.config.one_packet, flags::ONE_PACKET)
                | set(persistence > 0 && self.id.spans_ports(), flags::ANY_PORT)
                | set(persistence > 0 && self.id.is_ftp(), flags::FTP)
                | set(persistence > 0 && self.config.engine.is_some(), flags::SIP),
            prefix,
            zero: 0,
            mark: self.id.mark(),
            persistence,
            netmask,
        }
    }

    /// How the templates of a server's connections are found.
    pub(super) fn scope(&self, server: &Server) -> Scope {
        let scope = if self.config.persistence.is_some() {
            Scope::of(&self.entry())
        } else {
            Scope { mark: self.id.mark(), ..Scope::default() }
        };
        Scope { flags: scope.flags | if server.config.weight == 0 { scope_flags::QUIESCENT } else { 0 }, ..scope }
    }

    /// A server as the datapath sees it. Where a client's template is for many ports, connections keep theirs.
    pub(super) fn target(&self, server: &Server) -> Target {
        let is_own = match self.id {
            ServiceId::Address { port, .. } => port != 0 && port != server.id.port,
            ServiceId::Mark { .. } => false,
        };
        let keeps_port = self.config.persistence.is_some() && self.id.spans_ports() && !is_own;
        let port = if keeps_port { 0 } else { server.id.port };
        let (pool, clients) = (self.pool(), self.id.family());
        Target { address: server.id.address, port, method: server.config.method, pool, clients }
    }

    /// The totals since it was added.
    pub(super) fn totals(&self, mut of_server: impl FnMut(&Server) -> Totals) -> Totals {
        let sum = |sum: Totals, server| sum.plus(of_server(server).since(server.joined));
        self.servers.iter().fold(self.left_behind, sum)
    }
}

/// A real server.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Server {
    /// Which.
    pub(super) id: ServerId,
    /// How.
    pub(super) config: ServerConfig,
    /// Its index in the datapath's array.
    pub(super) index: u32,
    /// Its weight, or the last one that was not 0.
    pub(super) last_weight: u32,
    /// Too many connections: it gets no new ones.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) overloaded: bool,
    /// Its connections when they were last read.
    #[serde(skip)]
    pub(super) live: Counters,
    /// How many connections it had for a moment before they were last read; 0: no more than then.
    #[serde(skip)]
    pub(super) peak: u32,
    /// Its totals since it has had no connections.
    #[serde(skip)]
    pub(super) at_rest: Option<Totals>,
    /// What its totals were when it came to the service.
    #[serde(default, skip_serializing_if = "Totals::is_zero")]
    pub(super) joined: Totals,
    /// What its totals were at the last zeroing.
    #[serde(default, skip_serializing_if = "Totals::is_zero")]
    pub(super) zero: Totals,
    /// Rates.
    #[serde(skip)]
    pub(super) estimator: Estimator,
}

impl Server {
    /// The server as schedulers see it.
    fn candidate(&self) -> Candidate {
        Candidate {
            index: self.index,
            address: self.id.address,
            port: self.id.port,
            weight: self.config.weight,
            last_weight: self.last_weight,
            overloaded: self.overloaded,
            upper_threshold: self.config.upper_threshold,
            active: self.live.active,
            total: self.live.total,
        }
    }

    /// Gives it another configuration. What was before does not count.
    pub(super) fn configure(&mut self, config: &ServerConfig, datapath: &impl Datapath) {
        self.config = *config;
        if config.weight > 0 {
            self.last_weight = config.weight;
        }
        self.live = datapath.counters(self.index);
        datapath.take_peak(self.index);
        self.peak = 0;
        self.overloaded = self.is_overloaded();
    }

    /// Whether it has too many connections, as far as they are known.
    pub(super) fn is_overloaded(&self) -> bool {
        let peak = self.peak.max(self.live.total);
        overloaded(&self.config, self.live.total, overloaded(&self.config, peak, self.overloaded))
    }
}

/// Whether a server with a total of so many connections has too many, if it was (not) `overloaded` so far. IPVS sets the flag when the upper
/// threshold is reached, and clears it below the lower one, which is three quarters of the upper one if there is none.
fn overloaded(config: &ServerConfig, total: u32, overloaded: bool) -> bool {
    let upper = config.upper_threshold;
    let lower = if config.lower_threshold == 0 { upper - (upper >> 2) } else { config.lower_threshold };
    match total {
        _ if upper == 0 => false,
        _ if total >= upper => true,
        _ if total >= lower => overloaded,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::director::model::Method;

    /// The flag after each of these numbers of connections.
    fn flags(upper_threshold: u32, lower_threshold: u32, totals: &[u32]) -> Vec<bool> {
        let config = ServerConfig { method: Method::Route, weight: 1, upper_threshold, lower_threshold };
        let mut flag = false;
        let step = |&total| {
            flag = overloaded(&config, total, flag);
            flag
        };
        totals.iter().map(step).collect()
    }

    #[test]
    fn without_thresholds_nobody_is_overloaded() {
        assert_eq!(flags(0, 0, &[0, 1_000_000]), [false, false]);
    }

    #[test]
    fn three_quarters_stand_in_for_the_lower_threshold() {
        assert_eq!(flags(3, 0, &[2, 3, 4, 3, 2]), [false, true, true, true, false]);
    }

    #[test]
    fn a_lower_threshold_opens_the_server_below_it() {
        assert_eq!(flags(4, 2, &[3, 4, 3, 2, 1, 2, 3]), [false, true, true, true, false, false, false]);
    }
}
