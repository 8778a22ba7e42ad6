//! twos, the power of two choices: of two servers drawn by lot, whoever has the least to do for its weight.
//!
//! A lot is a number from 0 to the sum of all weights; it falls on the first server at which the running sum reaches it:
//!
//! ```text
//! C=2 B=3 A=4     0 1 2 | 3 4 5 | 6 7 8 9
//!                   C       B        A
//! ```
//!
//! (0 is a lot, too, so the first server has one more than its weight. That is IPVS's way.)
//!
//! The lots of pick number n depend on n and on the seed of the run, and on nothing else: a run that is compiled anew has
//! the same lots for the picks that are still to come.

use std::iter::repeat_with;

use rand_pcg::{Pcg64, rand_core::Rng as _};
use serde::{Deserialize, Serialize};

use super::{Algorithm, Arrivals, Candidate, Run, forecast};
use crate::director::model::Family;

/// Power of two choices.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct TwoChoices {}

impl Algorithm for TwoChoices {
    fn new(_flags: u8, _family: Family) -> Self {
        Self {}
    }

    fn is_dynamic(&self) -> bool {
        true
    }

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        let mut lots = Pcg64::new(arrivals.seed.into(), 0);
        lots.advance(2 * u128::from(arrivals.base));
        let pairs = repeat_with(|| [lots.next_u64(), lots.next_u64()]);
        forecast::run(choose(servers, arrivals, pairs), arrivals)
    }
}

/// The servers among whom lots are drawn.
struct Urn {
    /// Positions of the eligible servers.
    positions: Vec<usize>,
    /// For each, the sum of the weights up to it.
    sums: Vec<u64>,
}

impl Urn {
    fn new(servers: &[Candidate]) -> Self {
        let positions: Vec<_> = (0..servers.len()).filter(|&position| servers[position].eligible()).collect();
        let weights = positions.iter().map(|&position| u64::from(servers[position].weight));
        let sums = weights.scan(0, |sum, weight| {
            *sum += weight;
            Some(*sum)
        });
        Self { sums: sums.collect(), positions }
    }

    /// The position of the server on which a lot falls, which is any number, brought down to those that there are.
    fn draw(&self, lot: u64) -> Option<usize> {
        let lots = self.sums.last()? + 1;
        let lot = ((u128::from(lot) * u128::from(lots)) >> u64::BITS) as u64;
        self.positions.get(self.sums.partition_point(|&sum| sum < lot)).copied()
    }
}

/// The picks for these arrivals, with these pairs of lots. They end early if nobody takes connections any more.
fn choose(servers: &[Candidate], arrivals: Arrivals, lots: impl Iterator<Item = [u64; 2]>) -> Vec<u32> {
    let mut servers = servers.to_vec();
    let mut urn = Urn::new(&servers);
    let choose = |[first, second]: [u64; 2]| {
        let (first, second) = (urn.draw(first)?, urn.draw(second)?);
        let chosen = if is_better(&servers[second], &servers[first]) { second } else { first };
        let server = &mut servers[chosen];
        server.bind(arrivals.active);
        let index = server.index;
        if !server.eligible() {
            urn = Urn::new(&servers);
        }
        Some(index)
    };
    lots.take(arrivals.count as usize).map_while(choose).collect()
}

/// Whether the second choice is preferred to the first. IPVS multiplies 32-bit numbers here, and lets them overflow.
fn is_better(second: &Candidate, first: &Candidate) -> bool {
    let crosswise = |one: &Candidate, other: &Candidate| one.weight.wrapping_mul(other.load()).cast_signed();
    crosswise(second, first) > crosswise(first, second)
}

#[cfg(test)]
mod tests {
    use super::{super::tests::candidates, *};

    /// The number that is brought down to this lot.
    fn lot(lot: u64, lots: u64) -> u64 {
        (u128::from(lot) << u64::BITS).div_ceil(u128::from(lots)) as u64
    }

    /// IPVS's decision in its own words: both lots are counted down by the weights.
    fn plain(servers: &[Candidate], mut lots: [i32; 2]) -> u32 {
        let mut choices: [Option<&Candidate>; 2] = [None; 2];
        for server in servers.iter().filter(|server| server.eligible()) {
            for (lot, choice) in lots.iter_mut().zip(&mut choices) {
                *lot -= server.weight.cast_signed();
                if *lot <= 0 && choice.is_none() {
                    *choice = Some(server);
                }
            }
        }
        let [first, second] = choices.map(|choice| choice.expect("no lot is above the sum"));
        let is_better = second.weight * first.load() > first.weight * second.load();
        if is_better { second.index } else { first.index }
    }

    #[test]
    fn every_pair_of_lots_falls_where_ipvs_puts_it() {
        let mut servers = candidates(&[2, 0, 3, 4, 1]);
        servers[4].overloaded = true;
        for (server, (active, total)) in servers.iter_mut().zip([(1, 3), (0, 0), (1, 1), (2, 2), (0, 0)]) {
            (server.active, server.total) = (active, total);
        }
        let arrivals = Arrivals { count: 1, ..Arrivals::after(0) };
        for (first, second) in (0..10).flat_map(|first| (0..10).map(move |second| (first, second))) {
            let chosen = choose(&servers, arrivals, std::iter::once([lot(first, 10), lot(second, 10)]));
            let expected = plain(&servers, [first as i32, second as i32]);
            assert_eq!(chosen, [expected], "lots {first} and {second}");
        }
    }

    #[test]
    fn a_server_at_its_threshold_is_out_of_the_urn() {
        let mut servers = candidates(&[1, 1]);
        servers[0].upper_threshold = 2;
        servers[1].upper_threshold = 1;
        let arrivals = Arrivals { count: 8, ..Arrivals::after(0) };
        let first_always = repeat_with(|| [0, 0]);
        assert_eq!(choose(&servers, arrivals, first_always), [1, 1, 0]);
    }

    #[test]
    fn a_run_that_is_compiled_anew_has_the_same_lots() {
        let servers = candidates(&[5, 3, 1]);
        let mut scheduler = TwoChoices {};
        let picks = scheduler.compile(&servers, Arrivals { count: 40, ..Arrivals::after(0) }).picks;
        let mut later = servers;
        for pick in &picks[..10] {
            later.iter_mut().find(|server| server.index == *pick).expect("it was chosen").bind(true);
        }
        let rest = scheduler.compile(&later, Arrivals { count: 30, ..Arrivals::after(10) }).picks;
        assert_eq!(rest, picks[10..]);
    }

    #[test]
    fn lots_are_fair() {
        let servers = candidates(&[1, 2, 1]);
        let arrivals = Arrivals { count: 4000, ..Arrivals::after(0) };
        let picks = TwoChoices {}.compile(&servers, arrivals).picks;
        let share = |index| picks.iter().filter(|&&pick| pick == index).count();
        assert!([share(2), share(0)].iter().all(|share| (950..1050).contains(share)), "{} {}", share(2), share(0));
        let mut other = TwoChoices {};
        assert_ne!(other.compile(&servers, Arrivals { seed: 1, ..arrivals }).picks, picks, "the seed counts");
    }
}
