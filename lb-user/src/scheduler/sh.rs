//! sh, source hash: the client's address decides, and with `sh-port` its port.
//!
//! The servers are dealt into 256 buckets, each as many in a row as its weight says, again and again until all are full;
//! a weight of 0 still takes one. A client is hashed to a bucket ([`lb_common::pick::source_bucket`]):
//!
//! ```text
//! weights C=2 B=3 A=4:  C C B B B A A A A C C B B B ...
//! ```
//!
//! If the bucket's server takes no connections, nobody does, unless the service has `sh-fallback`: then a walk over the
//! other buckets finds somebody. Where the walk ends depends on the bucket alone, so the compiled table has the end of
//! the walk in it, and the kernel need not walk.

use lb_common::{
    pick::{BUCKETS, source_next},
    schedule::NOBODY,
    service::{self, Mode},
};
use serde::{Deserialize, Serialize};

use super::{Algorithm, Arrivals, Candidate, Run};
use crate::director::model::{Family, service_flags};

/// Source hash.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct SourceHash {
    /// Bits of [`service_flags`].
    flags: u8,
}

/// The buckets as they are dealt, eligible or not.
pub(super) fn deal(servers: &[Candidate]) -> impl Iterator<Item = &Candidate> {
    let turn = |server| std::iter::repeat_n(server, Candidate::weight_or_one(server) as usize);
    servers.iter().cycle().flat_map(turn).take(BUCKETS as usize)
}

impl Candidate {
    const fn weight_or_one(&self) -> u32 {
        if self.weight == 0 { 1 } else { self.weight }
    }
}

impl Algorithm for SourceHash {
    fn new(flags: u8, _family: Family) -> Self {
        Self { flags }
    }

    fn mode(&self) -> Mode {
        Mode::SourceHash
    }

    fn service_flags(&self) -> u8 {
        if self.flags & service_flags::FLAG_2 != 0 { service::flags::PORT } else { 0 }
    }

    fn set_flags(&mut self, flags: u8) {
        self.flags = flags;
    }

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        let buckets: Vec<&Candidate> = deal(servers).collect();
        let chosen = |bucket| buckets.get(bucket as usize).filter(|server| server.eligible()).map(|server| server.index);
        let fallback = self.flags & service_flags::FLAG_1 != 0;
        let pick = |bucket| {
            let walk = || (0..BUCKETS).find_map(|k| chosen(source_next(bucket, k)));
            chosen(bucket).or_else(|| fallback.then(walk).flatten()).unwrap_or(NOBODY)
        };
        Run { base: arrivals.base, picks: (0..BUCKETS).map(pick).collect(), ..Run::default() }
    }
}
