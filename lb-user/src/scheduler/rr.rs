//! rr, round robin: the eligible servers take turns, whatever their weights.
//!
//! The state is the server that was chosen last. The next one is the first eligible server behind it; behind the last
//! server comes the first. A new server stands at the head, so it is met when the round begins again:
//!
//! ```text
//! A, B, C added in this order:  C B A C B A ...
//! ```

use serde::{Deserialize, Serialize};

use super::{Algorithm, Arrivals, Candidate, Change, Run};
use crate::director::model::Family;

/// Round robin.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RoundRobin {
    /// [`Candidate::index`] of the server that was chosen last; nothing: the round begins at the head.
    last: Option<u32>,
}

impl RoundRobin {
    /// One round from here on: the eligible servers, first those behind the last choice, then those up to it.
    fn round<'a>(&self, servers: &'a [Candidate]) -> impl Iterator<Item = &'a Candidate> + Clone + use<'a> {
        let last = self.last.and_then(|last| servers.iter().position(|server| server.index == last));
        let (before, behind) = servers.split_at(last.map_or(0, |last| last + 1));
        behind.iter().chain(before).filter(|server| server.eligible())
    }
}

impl Algorithm for RoundRobin {
    fn new(_flags: u8, _family: Family) -> Self {
        Self { last: None }
    }

    /// Only the removal of the last choice matters: its predecessor takes its place.
    fn servers_changed(&mut self, servers: &[Candidate], change: Change) {
        if let Change::Removed { position, index } = change
            && self.last == Some(index)
        {
            self.last = position.checked_sub(1).and_then(|before| servers.get(before)).map(|server| server.index);
        }
    }

    fn advance(&mut self, servers: &[Candidate], taken: u32) {
        let mut round = self.round(servers);
        let turns = round.clone().count();
        if turns > 0 && taken > 0 {
            self.last = round.nth((taken as usize - 1) % turns).map(|server| server.index);
        }
    }

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        Run { base: arrivals.base, picks: self.round(servers).map(|server| server.index).collect(), ..Run::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::candidates, *};

    #[test]
    fn the_predecessor_takes_the_place_of_a_removed_server() {
        let mut servers = candidates(&[1, 1, 1, 1]);
        let mut rr = RoundRobin { last: Some(1) };
        let removed = servers.remove(2).index;
        rr.servers_changed(&servers, Change::Removed { position: 2, index: removed });
        assert_eq!(rr.last, Some(2));
        rr.last = Some(3);
        let removed = servers.remove(0).index;
        rr.servers_changed(&servers, Change::Removed { position: 0, index: removed });
        assert_eq!(rr.last, None);
        assert_eq!(rr.compile(&servers, Arrivals::after(0)).picks, [2, 0]);
    }
}
