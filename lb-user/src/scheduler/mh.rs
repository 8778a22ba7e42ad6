//! mh, Maglev hash: the client's address decides, and with `mh-port` its port; little moves when a server comes or goes.
//!
//! Each server has a sequence of its own through all 4093 slots of a table, made from its address and port. The servers
//! take turns (heavy ones several in a row) and claim the next free slot of their sequence until no slot is left. A
//! client is hashed to a slot ([`lb_common::pick::maglev_first`]).
//!
//! A server that takes no connections keeps its slots ([`INELIGIBLE`] is set in its picks), even with weight 0: the
//! table is made from the last weight that was not 0, so that quiescing a server moves only its own clients. With
//! `mh-fallback` the kernel looks for another slot ([`lb_common::pick::maglev_next`]); without, nobody takes them.
//!
//! IPVS makes no table for more servers than slots: the table from before the server too many stays.

use std::net::IpAddr;

use lb_common::{
    hash::{MAGLEV_KEY_1, MAGLEV_KEY_2, MAGLEV_SLOTS, maglev},
    schedule::{INELIGIBLE, NOBODY},
    service::{self, Mode},
};
use serde::{Deserialize, Serialize};

use super::{Algorithm, Arrivals, Candidate, Change, Run};
use crate::director::model::{Family, service_flags};

/// Slots of the table, as a length.
const SLOTS: usize = MAGLEV_SLOTS as usize;

/// Bits of weight that are kept: a server takes at most 2^6 - 1 slots in a row.
#[doc(alias = "IP_VS_MH_TAB_BITS")]
const WEIGHT_BITS: u32 = 6;

/// Maglev hash.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Maglev {
    /// Bits of [`service_flags`].
    flags: u8,
    /// The service's family.
    family: Family,
    /// The table that stays while there are more servers than slots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kept: Option<Vec<u32>>,
}

/// A server's sequence through the slots, and how far it has come.
#[derive(Clone, Copy)]
pub(super) struct Sequence {
    pub(super) index: u32,
    pub(super) slot: u32,
    pub(super) step: u32,
    pub(super) turns: u32,
}

impl Maglev {
    /// The slots of these servers, which are no more than slots, by index; eligible or not.
    fn table(&self, servers: &[Candidate]) -> Vec<u32> {
        fill(self.sequences(servers), MAGLEV_SLOTS)
    }

    fn sequences(&self, servers: &[Candidate]) -> Vec<Sequence> {
        let weights: Vec<u32> = servers.iter().map(|server| server.last_weight).collect();
        let sequence = |(server, turns): (&Candidate, u32)| {
            let value = fold(server.address, self.family).wrapping_add(u32::from(server.port));
            Sequence {
                index: server.index,
                slot: maglev(MAGLEV_KEY_1, value) % MAGLEV_SLOTS,
                step: maglev(MAGLEV_KEY_2, value) % (MAGLEV_SLOTS - 1) + 1,
                turns,
            }
        };
        servers.iter().zip(turns(&weights)).filter(|(server, _)| server.last_weight > 0).map(sequence).collect()
    }
}

/// Lets servers take turns with the slots of a table, whose number is a prime.
pub(super) fn fill(mut sequences: Vec<Sequence>, slots: u32) -> Vec<u32> {
    let mut table = vec![NOBODY; slots as usize];
    if sequences.is_empty() {
        return table;
    }
    let mut free = slots;
    loop {
        for sequence in &mut sequences {
            for _ in 0..sequence.turns {
                while table[sequence.slot as usize] != NOBODY {
                    sequence.slot = (sequence.slot + sequence.step) % slots;
                }
                table[sequence.slot as usize] = sequence.index;
                free -= 1;
                if free == 0 {
                    return table;
                }
            }
        }
    }
}

/// How many turns in a row servers with these weights take.
pub(super) fn turns(weights: &[u32]) -> Vec<u32> {
    let divisor = weights.iter().copied().fold(0, super::wrr::greatest_common_divisor).max(1);
    let heaviest = weights.iter().max().unwrap_or(&0) / divisor;
    let shift = (u32::BITS - heaviest.leading_zeros()).saturating_sub(WEIGHT_BITS);
    weights.iter().map(|weight| ((weight / divisor) >> shift).max(1)).collect()
}

/// IPVS's folding of a server's address: as for clients, but an IPv6 server of an IPv4 service shows only its first
/// four bytes.
pub(super) fn fold(address: IpAddr, service: Family) -> u32 {
    match (address, service) {
        (IpAddr::V4(address), _) => address.to_bits(),
        (IpAddr::V6(address), Family::Ipv4) => (address.to_bits() >> 96) as u32,
        (IpAddr::V6(address), Family::Ipv6) => {
            let bits = address.to_bits();
            (bits >> 96) as u32 ^ (bits >> 64) as u32 ^ (bits >> 32) as u32 ^ bits as u32
        }
    }
}

impl Algorithm for Maglev {
    fn new(flags: u8, family: Family) -> Self {
        Self { flags, family, kept: None }
    }

    fn mode(&self) -> Mode {
        Mode::Maglev
    }

    fn service_flags(&self) -> u8 {
        let bit = |asked, bit| if self.flags & asked != 0 { bit } else { 0 };
        bit(service_flags::FLAG_1, service::flags::FALLBACK) | bit(service_flags::FLAG_2, service::flags::PORT)
    }

    fn set_flags(&mut self, flags: u8) {
        self.flags = flags;
    }

    fn servers_changed(&mut self, servers: &[Candidate], change: Change) {
        if servers.len() <= SLOTS {
            self.kept = None;
        } else if self.kept.is_none() {
            // The server too many: the table is that of the others. If there never was one, it is empty.
            let others = if change == Change::Added { &servers[1..] } else { &[] };
            self.kept = Some(if others.len() <= SLOTS { self.table(others) } else { vec![NOBODY; SLOTS] });
        }
    }

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        let mut picks = self.kept.clone().unwrap_or_else(|| self.table(servers));
        let mut eligible: Vec<u32> = servers.iter().filter(|server| server.eligible()).map(|server| server.index).collect();
        eligible.sort_unstable();
        for pick in &mut picks {
            if *pick != NOBODY && eligible.binary_search(pick).is_err() {
                *pick |= INELIGIBLE;
            }
        }
        Run { base: arrivals.base, picks, ..Run::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::candidates, *};

    #[test]
    fn a_quiesced_server_keeps_its_slots() {
        let mut servers = candidates(&[1, 2, 3]);
        let mut mh = Maglev::new(0, Family::Ipv4);
        let before = mh.compile(&servers, Arrivals::after(0)).picks;
        servers[1].weight = 0;
        let after = mh.compile(&servers, Arrivals::after(0)).picks;
        for (before, after) in before.iter().zip(after) {
            assert_eq!(after, if *before == 1 { 1 | INELIGIBLE } else { *before });
        }
    }

    #[test]
    fn the_old_table_stays_when_there_are_more_servers_than_slots() {
        let mut servers = candidates(&vec![1; SLOTS]);
        let mut mh = Maglev::new(0, Family::Ipv4);
        let before = mh.compile(&servers, Arrivals::after(0)).picks;
        assert_eq!(before.iter().collect::<std::collections::HashSet<_>>().len(), SLOTS, "everybody has a slot");
        let mut newest = servers[0];
        for extra in 1..=2 {
            newest.index += 1;
            newest.address = [10, 2, 0, extra].into();
            servers.insert(0, newest);
            mh.servers_changed(&servers, Change::Added);
            assert_eq!(mh.compile(&servers, Arrivals::after(0)).picks, before);
        }
        for _ in 0..2 {
            let removed = servers.remove(0).index;
            mh.servers_changed(&servers, Change::Removed { position: 0, index: removed });
        }
        assert_eq!(mh.kept, None);
    }

    #[test]
    fn an_ipv6_server_of_an_ipv4_service_shows_four_bytes() {
        let address = "2001:db8::1".parse().expect("an address");
        assert_eq!(fold(address, Family::Ipv4), 0x2001_0db8);
        assert_eq!(fold(address, Family::Ipv6), 0x2001_0db9);
    }
}
