//! ovf, weighted overflow: the heaviest server takes everything until it has more active connections than its weight says;
//! then the next one.
//!
//! IPVS asks for *more*, so a server of weight 3 gets four. When all are beyond, there is nobody. UDP's connections are
//! never active, so nothing ever flows over, as in IPVS.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

use super::{Algorithm, Arrivals, Candidate, Run, forecast};
use crate::director::model::Family;

/// Weighted overflow.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Overflow {}

impl Algorithm for Overflow {
    fn new(_flags: u8, _family: Family) -> Self {
        Self {}
    }

    fn is_dynamic(&self) -> bool {
        true
    }

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        let has_room = |server: &Candidate| server.eligible() && server.active <= server.weight;
        forecast::least(servers, arrivals, |server| has_room(server).then_some(Reverse(server.weight)))
    }
}
