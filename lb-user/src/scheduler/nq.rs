//! nq, never queue: the first server without active connections, whatever its weight; if all have some, as with sed.
//!
//! UDP's connections are never active, so the first server takes all of them, as in IPVS.

use serde::{Deserialize, Serialize};

use super::{
    Algorithm, Arrivals, Candidate, Run,
    forecast::{self, PerWeight},
    sed,
};
use crate::director::model::Family;

/// Never queue.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct NeverQueue {}

/// Idle servers are all alike, and better than busy ones.
#[derive(Eq, Ord, PartialEq, PartialOrd)]
enum Queue {
    Idle,
    Busy(PerWeight),
}

impl Algorithm for NeverQueue {
    fn new(_flags: u8, _family: Family) -> Self {
        Self {}
    }

    fn is_dynamic(&self) -> bool {
        true
    }

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        let queue = |server: &Candidate| if server.active == 0 { Queue::Idle } else { Queue::Busy(sed::delay(server)) };
        forecast::least(servers, arrivals, |server| server.eligible().then(|| queue(server)))
    }
}
