//! No scheduler (`ipvsadm -s none`): the service exists, but nobody takes its new connections.

use serde::{Deserialize, Serialize};

use super::{Algorithm, Arrivals, Candidate, Run};
use crate::director::model::Family;

/// No scheduler.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Nobody {}

impl Algorithm for Nobody {
    fn new(_flags: u8, _family: Family) -> Self {
        Self {}
    }

    fn compile(&mut self, _servers: &[Candidate], arrivals: Arrivals) -> Run {
        Run { base: arrivals.base, ..Run::default() }
    }
}
