//! wrr, weighted round robin: the eligible servers take turns, and one of weight 4 gets twice as many as one of weight 2.
//!
//! IPVS passes over the servers again and again, with a bar that falls by the greatest common divisor of the weights
//! after each pass and is put up again below 1. Whoever reaches the bar is chosen in that pass:
//!
//! ```text
//! weights C=2 B=3 A=4, the bar at   4   3     2       1
//!                         chosen:   A   B A   C B A   C B A   and again from 4
//! ```
//!
//! Any change of the servers starts a new pass, but leaves the bar where it is. Servers are added one by one, and the
//! first of them puts the bar at 1, so the sequence of a new service begins with a plain round: `C B A`, and then `A B A ...`.
//!
//! From any position the picks repeat after one full fall of the bar, in which a server is chosen weight / divisor times:
//! that is the run. Weights may be as large as 2^31 - 1; then the run is cut off. Bars that nobody reaches are
//! jumped over, and a pass looks only at those who reach its bar, so that a pick costs little whatever the weights are.

use std::{cmp::Reverse, collections::BTreeSet, ops::Bound};

use lb_common::schedule::NOBODY;
use serde::{Deserialize, Serialize};

use super::{Algorithm, Arrivals, Candidate, Change, MAX_PICKS, Run};
use crate::director::model::Family;

/// Weighted round robin.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct WeightedRoundRobin {
    /// [`Candidate::index`] of the server where the pass has come to; nothing: it begins at the head.
    #[doc(alias = "ip_vs_wrr_mark.cl")]
    last: Option<u32>,
    /// What a weight must reach in this pass; 0 before there is a server of any weight.
    #[doc(alias = "ip_vs_wrr_mark.cw")]
    bar: u32,
}

/// The greatest common divisor of two numbers; that of 0 and any number is the number.
pub(super) const fn greatest_common_divisor(mut a: u32, mut b: u32) -> u32 {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Where the bar begins, and by how much it falls. The weights of overloaded servers count, too.
#[derive(Clone, Copy)]
struct Bars {
    /// The highest bar; 0 if all weights are 0. Such that the last bar is 1.
    #[doc(alias = "ip_vs_wrr_mark.mw")]
    highest: u32,
    /// Between two bars.
    #[doc(alias = "ip_vs_wrr_mark.di")]
    step: u32,
}

impl Bars {
    fn of(servers: &[Candidate]) -> Self {
        let weights = || servers.iter().map(|server| server.weight);
        let step = weights().fold(0, greatest_common_divisor).max(1);
        Self { highest: weights().max().unwrap_or(0).saturating_sub(step - 1), step }
    }

    /// A bar as it can be. Any other comes from a state file that does not belong to these servers.
    const fn legal(self, bar: u32) -> u32 {
        if bar == 0 || bar > self.highest { self.highest } else { (bar - 1) / self.step * self.step + 1 }
    }

    /// The bar after this one.
    const fn below(self, bar: u32) -> u32 {
        if bar > self.step { bar - self.step } else { self.highest }
    }
}

/// The choices from a position on, without end.
struct Walk<'a> {
    servers: &'a [Candidate],
    bars: Bars,
    bar: u32,
    /// Where the pass has come to; nothing: it begins at the head.
    position: Option<usize>,
    /// Positions of the eligible servers, the heaviest first; never empty.
    heaviest: Vec<usize>,
    /// The first so many of them reach the bar, and stand in `reaching`, too.
    reached: usize,
    reaching: BTreeSet<usize>,
}

impl<'a> Walk<'a> {
    /// Nothing if no server is eligible.
    fn new(servers: &'a [Candidate], state: &WeightedRoundRobin) -> Option<Self> {
        let mut heaviest: Vec<usize> = (0..servers.len()).filter(|&position| servers[position].eligible()).collect();
        heaviest.sort_unstable_by_key(|&position| Reverse(servers[position].weight));
        if heaviest.is_empty() {
            return None;
        }
        let position = state.last.and_then(|last| servers.iter().position(|server| server.index == last));
        let bars = Bars::of(servers);
        let bar = bars.legal(state.bar);
        let mut walk = Self { servers, bars, bar, position, heaviest, reached: 0, reaching: BTreeSet::new() };
        walk.admit();
        Some(walk)
    }

    /// How many choices until they repeat.
    fn period(&self) -> u64 {
        self.heaviest.iter().map(|&position| u64::from(self.servers[position].weight / self.bars.step)).sum()
    }

    /// Lets those who reach the bar take part in the pass.
    fn admit(&mut self) {
        while let Some(&position) = self.heaviest.get(self.reached)
            && self.servers[position].weight >= self.bar
        {
            self.reaching.insert(position);
            self.reached += 1;
        }
    }

    /// Begins the next pass in which anybody is chosen.
    fn next_pass(&mut self) {
        self.position = None;
        let bar = self.bars.below(self.bar);
        if bar >= self.bar {
            self.reaching.clear();
            self.reached = 0;
        }
        let reachable = self.servers[self.heaviest[0]].weight;
        let unreachable = bar.saturating_sub(reachable).div_ceil(self.bars.step);
        self.bar = bar - unreachable * self.bars.step;
        self.admit();
    }
}

impl Iterator for Walk<'_> {
    type Item = usize;

    /// The position of the server that is chosen next.
    fn next(&mut self) -> Option<usize> {
        loop {
            let behind = self.position.map_or(Bound::Unbounded, Bound::Excluded);
            if let Some(&position) = self.reaching.range((behind, Bound::Unbounded)).next() {
                self.position = Some(position);
                return Some(position);
            }
            self.next_pass();
        }
    }
}

impl WeightedRoundRobin {
    /// Nobody was eligible, though there are weights: where IPVS's search ends.
    fn search_in_vain(&mut self, bars: Bars) {
        if self.last.is_none() || self.bar > bars.step {
            self.last = None;
            self.bar = bars.highest;
        } else {
            // It began in the last pass, and went once all around, down to where it began.
            self.bar = 1;
        }
    }
}

/// How many picks the run of a walk has, and whether that is all of the period.
fn length(walk: &Walk<'_>) -> (usize, bool) {
    let limit = MAX_PICKS.max(walk.servers.len());
    match usize::try_from(walk.period()) {
        Ok(period) if period <= limit => (period, true),
        _ => (limit, false),
    }
}

impl Algorithm for WeightedRoundRobin {
    fn new(_flags: u8, _family: Family) -> Self {
        Self { last: None, bar: 0 }
    }

    fn servers_changed(&mut self, servers: &[Candidate], _change: Change) {
        let bars = Bars::of(servers);
        self.last = None;
        if self.bar > bars.highest || self.bar == 0 {
            self.bar = bars.highest;
        } else if bars.step > 1 {
            self.bar = self.bar / bars.step * bars.step + 1;
        }
    }

    fn advance(&mut self, servers: &[Candidate], taken: u32) {
        let Some(mut walk) = Walk::new(servers, self) else {
            let bars = Bars::of(servers);
            if bars.highest > 0 && taken > 0 {
                self.search_in_vain(bars);
            }
            return;
        };
        let (picks, _) = length(&walk);
        if taken > 0 {
            // The last of the picks that were taken, in the run: the state is where the search for it ended.
            self.last = walk.nth((taken as usize - 1) % picks).map(|position| servers[position].index);
            self.bar = walk.bar;
        }
    }

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        let Some(walk) = Walk::new(servers, self) else {
            // A search in vain moves the pass on, so it must be counted: it is a pick of its own.
            let picks = if Bars::of(servers).highest > 0 { vec![NOBODY] } else { Vec::new() };
            return Run { base: arrivals.base, picks, ..Run::default() };
        };
        let (picks, complete) = length(&walk);
        let picks = walk.take(picks).map(|position| servers[position].index).collect();
        Run { base: arrivals.base, picks, truncated: !complete, ..Run::default() }
    }
}
