//! lblc and lblcr, locality-based least connection: connections to one address meet the same real server, as long as that has
//! not too much to do. Made for transparent caches, where each real server need not have every page.
//!
//! Who served an address before is known to the kernel alone, which decides by rules of [`lb_common::locality`]. What it needs
//! for that is compiled here: a run of wlc for addresses that are new or whose servers are busy, the weights, and a *witness*.
//!
//! ```text
//! lblc, weights A=2 B=2    a.example  B B B      more than its weight, and A is idle:
//!                          a.example  A          A it is, from now on
//! lblcr                    a.example  A or B     whoever of both has less to do
//! ```
//!
//! Of all servers that are far from busy the witness is the farthest, so that it will be one for the longest time.

use lb_common::{schedule::NOBODY, service::Mode};
use serde::{Deserialize, Serialize};

use super::{Algorithm, Arrivals, Candidate, Locality, Run, forecast, wlc};
use crate::director::model::Family;

/// Locality-based least connection.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct LocalityBased {}

impl Algorithm for LocalityBased {
    fn new(_flags: u8, _family: Family) -> Self {
        Self {}
    }

    fn mode(&self) -> Mode {
        Mode::Locality
    }

    fn is_dynamic(&self) -> bool {
        true
    }

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        compile(servers, arrivals)
    }
}

/// Locality-based least connection with replication.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct LocalityBasedReplicated {}

impl Algorithm for LocalityBasedReplicated {
    fn new(_flags: u8, _family: Family) -> Self {
        Self {}
    }

    fn mode(&self) -> Mode {
        Mode::Replicas
    }

    fn is_dynamic(&self) -> bool {
        true
    }

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        compile(servers, arrivals)
    }
}

fn compile(servers: &[Candidate], arrivals: Arrivals) -> Run {
    let mut run = forecast::least(servers, arrivals, wlc::measure);
    if run.picks.is_empty() {
        // There may be addresses whose server is above its threshold, and lblc does not mind.
        run.picks.push(NOBODY);
    }
    let room = |server: &&Candidate| i64::from(server.weight) - 2 * i64::from(server.active);
    let witness = servers.iter().max_by_key(room).filter(|server| room(server) > 0);
    run.locality = Some(Locality { witness: witness.map(|server| server.index), servers: servers.to_vec() });
    run
}

#[cfg(test)]
mod tests {
    use super::{super::tests::candidates, *};

    fn witness(servers: &[Candidate]) -> Option<u32> {
        compile(servers, Arrivals::after(0)).locality.and_then(|locality| locality.witness)
    }

    #[test]
    fn the_witness_has_the_most_room() {
        let mut servers = candidates(&[1, 5, 0, 7]);
        assert_eq!(witness(&servers), Some(0));
        servers[3].active = 2;
        assert_eq!(witness(&servers), Some(2));
        (servers[0].active, servers[1].active, servers[3].active) = (1, 3, 4);
        assert_eq!(witness(&servers), None, "half of its weight is enough");
        assert_eq!(witness(&[]), None);
    }

    #[test]
    fn a_service_where_nobody_takes_connections_has_a_run_all_the_same() {
        let mut servers = candidates(&[1]);
        servers[0].overloaded = true;
        let run = compile(&servers, Arrivals::after(3));
        assert_eq!((run.base, &run.picks[..]), (3, &[NOBODY][..]));
    }
}
