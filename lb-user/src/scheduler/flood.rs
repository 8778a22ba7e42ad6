//! The table that every service has for flood mode, whatever its scheduler: a flow's number finds its real server there.
//!
//! It is Maglev's ([`super::mh`]), so that little moves when a server comes or goes in the midst of a flood; but of all who take new
//! connections by their present weights, and only as large as they need it: ten thousand services shall fit. (When there are so many
//! more servers that it has to be larger, much moves; that concerns flows which have no entry in this moment.)
//!
//! | servers | slots | bytes |
//! | --- | --- | --- |
//! | 1 | 1 | 4 |
//! | 2 | 61 | 244 |
//! | 100 | 2039 | 8 KiB |
//! | 65 535 | 131 071 | 512 KiB |

use lb_common::hash::{MAGLEV_KEY_1, MAGLEV_KEY_2, maglev};

use super::{
    Candidate,
    mh::{Sequence, fill, fold, turns},
};
use crate::director::model::Family;

/// Numbers of slots: primes below the powers of two.
const SIZES: [u32; 12] = [61, 127, 251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521, 131_071];

/// How many slots there should be for each turn of a server.
const SLOTS_A_TURN: u32 = 16;

/// The picks of a service with these servers; none if nobody takes connections.
pub fn table(servers: &[Candidate], family: Family) -> Vec<u32> {
    let mut eligible: Vec<&Candidate> = servers.iter().filter(|server| server.eligible()).collect();
    match eligible[..] {
        [] => return Vec::new(),
        [only] => return vec![only.index],
        _ => {}
    }
    // Maglev's servers take turns; whoever came last to the service must not make others move.
    eligible.sort_unstable_by_key(|server| (server.address, server.port));
    let weights: Vec<u32> = eligible.iter().map(|server| server.weight).collect();
    let turns = turns(&weights);
    let wanted = turns.iter().sum::<u32>().saturating_mul(2).max((turns.len() as u32).saturating_mul(SLOTS_A_TURN));
    let slots = SIZES.into_iter().find(|size| *size >= wanted).unwrap_or(SIZES[SIZES.len() - 1]);
    let sequence = |(server, turns): (&&Candidate, u32)| {
        let value = fold(server.address, family).wrapping_add(u32::from(server.port));
        Sequence {
            index: server.index,
            slot: maglev(MAGLEV_KEY_1, value) % slots,
            step: maglev(MAGLEV_KEY_2, value) % (slots - 1) + 1,
            turns,
        }
    };
    fill(eligible.iter().zip(turns).map(sequence).collect(), slots)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{super::tests::candidates, *};

    fn shares(table: &[u32]) -> BTreeMap<u32, usize> {
        let mut shares = BTreeMap::new();
        for pick in table {
            *shares.entry(*pick).or_default() += 1;
        }
        shares
    }

    #[test]
    fn it_is_as_large_as_it_has_to_be() {
        assert!(table(&[], Family::Ipv4).is_empty());
        assert!(table(&candidates(&[0, 0]), Family::Ipv4).is_empty());
        assert_eq!(table(&candidates(&[0, 7]), Family::Ipv4), [0]);
        for (servers, slots) in [(2, 61), (3, 61), (4, 127), (100, 2039), (10_000, 131_071)] {
            assert_eq!(table(&candidates(&vec![1; servers]), Family::Ipv4).len(), slots, "{servers} servers");
        }
    }

    #[test]
    fn weights_count() {
        let shares = shares(&table(&candidates(&[1, 3, 0]), Family::Ipv4));
        assert_eq!(shares.len(), 2);
        assert!((14..=17).contains(&shares[&2]) && (44..=47).contains(&shares[&1]), "{shares:?}");
    }

    #[test]
    fn little_moves_when_a_server_leaves() {
        let servers = candidates(&[1; 10]);
        let before = table(&servers, Family::Ipv4);
        let after = table(&servers[1..], Family::Ipv4);
        let gone = servers[0].index;
        let moved = before.iter().zip(&after).filter(|(before, after)| **before != gone && before != after).count();
        assert!(before.len() == after.len() && moved < before.len() / 5, "{moved} of {}", before.len());
    }
}
