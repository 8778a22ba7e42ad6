//! sed, shortest expected delay: whoever would have the least to do for its weight, with the new connection counted in.
//!
//! Only active connections count. An idle server of weight 1 stands at 1/1, one of weight 4 at 1/4: unlike with wlc, the
//! heavy one begins. UDP's connections are never active, so the heaviest server takes all of them, as in IPVS.

use serde::{Deserialize, Serialize};

use super::{
    Algorithm, Arrivals, Candidate, Run,
    forecast::{self, PerWeight},
};
use crate::director::model::Family;

/// Shortest expected delay.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ShortestExpectedDelay {}

impl Algorithm for ShortestExpectedDelay {
    fn new(_flags: u8, _family: Family) -> Self {
        Self {}
    }

    fn is_dynamic(&self) -> bool {
        true
    }

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        forecast::least(servers, arrivals, |server| server.eligible().then(|| delay(server)))
    }
}

/// What a connection has to expect of an eligible server.
pub(super) const fn delay(server: &Candidate) -> PerWeight {
    PerWeight::new(server.active.wrapping_add(1), server)
}
