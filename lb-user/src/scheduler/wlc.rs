//! wlc, weighted least connection, which is what `ipvsadm` takes if nobody says otherwise: whoever has the least to do
//! for its weight.
//!
//! What counts is [`Candidate::load`], as with lc, divided by the weight. As long as nobody is busy all shares are 0, and
//! the first server is chosen, however light it is:
//!
//! ```text
//! A=4 B=3 C=2, added in this order:   C B A A B C A B A ...
//! ```

use serde::{Deserialize, Serialize};

use super::{
    Algorithm, Arrivals, Candidate, Run,
    forecast::{self, PerWeight},
};
use crate::director::model::Family;

/// Weighted least connection.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct WeightedLeastConnection {}

impl Algorithm for WeightedLeastConnection {
    fn new(_flags: u8, _family: Family) -> Self {
        Self {}
    }

    fn is_dynamic(&self) -> bool {
        true
    }

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        forecast::least(servers, arrivals, measure)
    }
}

/// How busy a server is; nothing if it takes no connections.
pub(super) fn measure(server: &Candidate) -> Option<PerWeight> {
    server.eligible().then(|| PerWeight::new(server.load(), server))
}
