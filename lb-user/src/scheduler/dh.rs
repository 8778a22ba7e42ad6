//! dh, destination hash: the address that a packet is sent to decides.
//!
//! The servers are dealt into 256 buckets one by one, whatever their weights, and a packet's destination is hashed to
//! a bucket ([`lb_common::pick::destination_bucket`]). A server that takes no connections keeps its buckets, and nobody
//! else serves them. A service of one virtual address has one destination, and so one server; dh is made for services of
//! a firewall mark, in front of caches.

use lb_common::{pick::BUCKETS, schedule::NOBODY, service::Mode};
use serde::{Deserialize, Serialize};

use super::{Algorithm, Arrivals, Candidate, Run};
use crate::director::model::Family;

/// Destination hash.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct DestinationHash {}

impl Algorithm for DestinationHash {
    fn new(_flags: u8, _family: Family) -> Self {
        Self {}
    }

    fn mode(&self) -> Mode {
        Mode::DestinationHash
    }

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        let dealt = servers.iter().cycle().map(|server| if server.eligible() { server.index } else { NOBODY });
        Run {
            base: arrivals.base,
            picks: dealt.chain(std::iter::repeat(NOBODY)).take(BUCKETS as usize).collect(),
            ..Run::default()
        }
    }
}
