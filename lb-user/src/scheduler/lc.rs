//! lc, least connection: whoever has the least to do, whatever the weights.
//!
//! An active connection counts as 256 and every connection as one more ([`Candidate::load`]), so that the active ones
//! decide, and among equals the others. A server of weight 0 takes none.

use serde::{Deserialize, Serialize};

use super::{Algorithm, Arrivals, Candidate, Run, forecast};
use crate::director::model::Family;

/// Least connection.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct LeastConnection {}

impl Algorithm for LeastConnection {
    fn new(_flags: u8, _family: Family) -> Self {
        Self {}
    }

    fn is_dynamic(&self) -> bool {
        true
    }

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        forecast::least(servers, arrivals, |server| server.eligible().then(|| server.load()))
    }
}
