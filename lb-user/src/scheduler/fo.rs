//! fo, weighted failover: the heaviest server takes everything. The next one stands in when it has weight 0 or has
//! reached its threshold.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

use super::{Algorithm, Arrivals, Candidate, Run, forecast};
use crate::director::model::Family;

/// Weighted failover.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Failover {}

impl Algorithm for Failover {
    fn new(_flags: u8, _family: Family) -> Self {
        Self {}
    }

    /// Thresholds end its turn, and they are reached by connections.
    fn is_dynamic(&self) -> bool {
        true
    }

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        forecast::least(servers, arrivals, |server| server.eligible().then_some(Reverse(server.weight)))
    }
}
