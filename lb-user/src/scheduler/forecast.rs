//! What a dynamic scheduler would choose for the next connections, if none ended meanwhile.
//!
//! IPVS looks at all servers for each connection and takes the one that is best by some measure. Of a thousand servers
//! only the one that was chosen looks different to the next connection, so a heap finds the sequence: the best server
//! stands on top; it is chosen, gets the connection, and sinks to its new place.
//!
//! ```text
//! wlc, weights C=1 B=2, nobody busy      top: C 0/1, B 0/2     C   (a tie: C comes first)
//!                                        top: B 0/2, C 257/1   B
//!                                        top: B 257/2, C 257/1 B
//! ```
//!
//! A measure is a function from a server to something that can be ordered, the best being the least; a server without one
//! takes no connections. Of equals, IPVS takes the first in its order, and so does this.
//!
//! When a forecast is used up and no other has come (the daemon is late, or dead), its picks are taken again, without those
//! that named nobody: it is better to pass a threshold than to turn clients away for ever.

use std::{
    cmp::{Ordering, Reverse},
    collections::{BinaryHeap, binary_heap::PeekMut},
};

use lb_common::schedule::NOBODY;

use super::{Arrivals, Candidate, Run};

/// The run for these arrivals: each takes the server of the least measure.
pub(super) fn least<M: Ord>(servers: &[Candidate], arrivals: Arrivals, measure: impl Fn(&Candidate) -> Option<M>) -> Run {
    let mut servers = servers.to_vec();
    let measured = servers.iter().enumerate();
    let measured = measured.filter_map(|(position, server)| Some(Reverse((measure(server)?, position))));
    let mut heap: BinaryHeap<_> = measured.collect();
    let picks = (0..arrivals.count).map_while(|_| {
        let mut best = heap.peek_mut()?;
        let server = &mut servers[best.0.1];
        server.bind(arrivals.active);
        match measure(server) {
            Some(measure) => best.0.0 = measure,
            None => drop(PeekMut::pop(best)),
        }
        Some(server.index)
    });
    run(picks.collect(), arrivals)
}

/// The run of forecast picks, which may end early: then there is nobody for the arrivals after them.
pub(super) fn run(picks: Vec<u32>, arrivals: Arrivals) -> Run {
    let base = arrivals.base;
    let refused = (arrivals.count as usize).saturating_sub(picks.len());
    if refused == 0 || picks.is_empty() {
        return Run { base, picks, ..Run::default() };
    }
    let again = picks.clone();
    let mut picks = picks;
    picks.resize(arrivals.count as usize, NOBODY);
    picks.extend(again);
    Run { base, head: arrivals.count, picks, truncated: false, locality: None }
}

/// How busy a server is for its weight. Compared as IPVS compares: crosswise, without a division.
#[derive(Clone, Copy, Debug)]
pub(super) struct PerWeight {
    load: i32,
    weight: u32,
}

impl PerWeight {
    /// The load of this server by its weight, which is not 0.
    pub(super) const fn new(load: u32, server: &Candidate) -> Self {
        Self { load: load.cast_signed(), weight: server.weight }
    }
}

impl Ord for PerWeight {
    fn cmp(&self, other: &Self) -> Ordering {
        let crosswise = |one: &Self, other: &Self| i64::from(one.load) * i64::from(other.weight);
        crosswise(self, other).cmp(&crosswise(other, self))
    }
}

impl PartialOrd for PerWeight {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for PerWeight {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for PerWeight {}

#[cfg(test)]
mod tests {
    use super::{super::tests::candidates, *};

    fn arrivals(count: u32) -> Arrivals {
        Arrivals { count, ..Arrivals::after(7) }
    }

    #[test]
    fn of_equals_the_first_is_chosen() {
        let servers = candidates(&[1, 1, 1]);
        let run = least(&servers, arrivals(7), |server| Some(server.active / 2));
        assert_eq!(run.picks, [2, 2, 1, 1, 0, 0, 2]);
        assert_eq!((run.base, run.head), (7, 0));
    }

    #[test]
    fn after_the_last_room_there_is_nobody_and_then_the_forecast_again() {
        let mut servers = candidates(&[1, 1]);
        servers[0].upper_threshold = 2;
        servers[1].upper_threshold = 1;
        let run = least(&servers, arrivals(5), |server| server.eligible().then_some(server.total));
        assert_eq!(run.picks, [1, 0, 1, NOBODY, NOBODY, 1, 0, 1]);
        assert_eq!(run.head, 5);
    }

    #[test]
    fn shares_are_compared_exactly() {
        let mut server = candidates(&[i32::MAX as u32])[0];
        let share = |load, server: &Candidate| PerWeight::new(load, server);
        let heavy = share(i32::MAX as u32, &server);
        server.weight -= 1;
        assert!(share(i32::MAX as u32, &server) > heavy);
        assert!(share(i32::MAX as u32 - 1, &server) == heavy, "both are 1");
    }
}
