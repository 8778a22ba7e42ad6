//! Schedulers: pure functions from real servers to the run that the kernel indexes.
//!
//! The kernel knows no algorithm. A [`Scheduler`] compiles the real servers of one service ([`Candidate`], newest first,
//! which is the order in which IPVS visits them) into a [`Run`]; the kernel takes pick after pick of it, or hashes into
//! it, and the choice is IPVS's, pick for pick. No scheduler does I/O, asks a clock or draws a random number.
//!
//! What a scheduler remembers between runs (rr: whom it chose last) is small and serialisable, and names servers by
//! their index in the datapath, so the sequence goes on exactly when the daemon comes back. This is how it is driven:
//!
//! ```
//! # use bpfvs::{director::model::Family, scheduler::{Arrivals, Candidate, Change, Scheduler}};
//! # let candidate = |index| Candidate {
//! #     index, address: [192, 0, 2, index as u8].into(), port: 80, weight: 1, last_weight: 1, overloaded: false,
//! #     upper_threshold: 0, active: 0, total: 0,
//! # };
//! let mut scheduler = Scheduler::from_name("rr", 0, Family::Ipv4).unwrap();
//! let mut servers = vec![candidate(7)];
//! scheduler.servers_changed(&servers, Change::Added);
//! let run = scheduler.compile(&servers, Arrivals::after(0)); // published; the kernel takes picks 0..5
//!
//! scheduler.advance(&servers, 5 - run.base); // first the past, with the servers as they were compiled
//! servers.insert(0, candidate(8)); // then the change
//! scheduler.servers_changed(&servers, Change::Added);
//! assert_eq!(scheduler.compile(&servers, Arrivals::after(5)).picks, [8, 7]);
//! ```
//!
//! A **dynamic** scheduler ([`Scheduler::is_dynamic`]) chooses by how many connections each server has. Its run is a
//! forecast: what IPVS would choose for the next [`Arrivals`], each counted ([`Candidate::bind`]) before the next is
//! chosen. It remembers nothing: who compiles the next run reads the live counters anew.
//!
//! To add a scheduler: write its file, and name it in the list at the end of this one.

#[cfg(test)]
mod destinations;
mod dh;
pub mod flood;
mod fo;
mod forecast;
mod lblc;
mod lc;
mod mh;
mod none;
mod nq;
mod ovf;
#[cfg(test)]
mod properties;
mod rr;
mod sed;
mod sh;
mod twos;
#[cfg(test)]
mod vectors;
mod wlc;
mod wrr;

use std::net::IpAddr;

use lb_common::service::Mode;
use serde::{Deserialize, Serialize};

use crate::director::model::Family;

/// The most picks in a run, unless the service has more servers than that.
pub const MAX_PICKS: usize = 65_536;

/// A compiled schedule. See [`lb_common::schedule`] for the shape in memory.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Run {
    /// Cursor mode: where the cursor stood when the run was made.
    pub base: u32,
    /// Cursor mode: how many of the picks happen once, before the rest repeats.
    pub head: u32,
    /// Indices of real servers, [`lb_common::schedule::NOBODY`] where there is none; empty if nobody takes connections.
    pub picks: Vec<u32>,
    /// The sequence goes on, but the run was cut off at [`MAX_PICKS`]. The kernel repeats it until it gets a fresh one,
    /// which it should before the cursor has passed `base + picks`.
    pub truncated: bool,
    /// Locality modes: what the kernel has to know beside the picks.
    pub locality: Option<Locality>,
}

/// By what the kernel judges whether a real server goes on serving a destination. See [`lb_common::locality`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Locality {
    /// The index of a server that is far from busy.
    pub witness: Option<u32>,
    /// All servers of the service.
    pub servers: Vec<Candidate>,
}

/// A real server, as schedulers see it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Candidate {
    /// Its index in the datapath's server array.
    pub index: u32,
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Its weight; 0 takes no new connections.
    pub weight: u32,
    /// The weight with which it was added, or the last one since then that was not 0: Maglev keeps a server's place with it.
    #[doc(alias = "ip_vs_dest.last_weight")]
    pub last_weight: u32,
    /// It has reached its upper threshold and not yet fallen below the lower one.
    #[doc(alias = "IP_VS_DEST_F_OVERLOAD")]
    pub overloaded: bool,
    /// With so many connections it is overloaded; 0: never.
    #[doc(alias = "ip_vs_dest.u_threshold")]
    pub upper_threshold: u32,
    /// How many of its connections are active now.
    #[doc(alias = "ip_vs_dest.activeconns")]
    pub active: u32,
    /// How many connections it has now.
    #[doc(alias = "ip_vs_dest.totalconns")]
    pub total: u32,
}

impl Candidate {
    /// Whether it takes new connections.
    pub const fn eligible(&self) -> bool {
        self.weight > 0 && !self.overloaded
    }

    /// What it has to do, as IPVS counts it: 256 for each active connection, and 1 for each of all.
    #[doc(alias = "ip_vs_dest_conn_overhead")]
    pub const fn load(&self) -> u32 {
        (self.active << 8).wrapping_add(self.total)
    }

    /// Counts a new connection, as IPVS does when it binds one to a server. `active` is [`Arrivals::active`].
    #[doc(alias = "ip_vs_bind_dest")]
    pub const fn bind(&mut self, active: bool) {
        self.total = self.total.wrapping_add(1);
        self.active = self.active.wrapping_add(active as u32);
        self.overloaded |= self.total == self.upper_threshold;
    }
}

/// The new connections for which a run is compiled.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Arrivals {
    /// Where the cursor stands before the first of them.
    pub base: u32,
    /// How many a dynamic scheduler looks ahead. Others compile what repeats, and do not ask.
    pub count: u32,
    /// Whether they are active from their first packet: TCP's are, UDP's never, SCTP's only when they are established.
    pub active: bool,
    /// What a scheduler that draws lots makes them of.
    pub seed: u64,
}

impl Arrivals {
    /// A few TCP connections.
    pub const fn after(base: u32) -> Self {
        Self { base, count: 64, active: true, seed: 0 }
    }
}

/// What happened to the servers of a service. The servers that come with it are those afterwards.
///
/// A change of [`Candidate::overloaded`] alone is none of these: it only asks for a new run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Change {
    /// The service got this scheduler, and may have servers already.
    Started,
    /// The first server is new.
    Added,
    /// A server is gone.
    Removed {
        /// Where it stood.
        position: usize,
        /// Its [`Candidate::index`].
        index: u32,
    },
    /// The server at this position was edited.
    Edited {
        /// Where it stands.
        position: usize,
    },
}

/// There is no scheduler of this name.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("scheduler \"{0}\" cannot be used: there is no scheduler of this name; use one of {names}", names = listed())]
pub struct Unknown(String);

/// The names in [`Scheduler::NAMES`], for people, who seldom want none.
fn listed() -> String {
    let names: Vec<_> = Scheduler::NAMES.iter().copied().filter(|name| *name != "none").collect();
    names.join(", ")
}

/// What every scheduler does. The public face is [`Scheduler`], which documents each of these.
trait Algorithm {
    /// The scheduler of a new service. The flags are bits of [`crate::director::model::service_flags`].
    fn new(flags: u8, family: Family) -> Self
    where
        Self: Sized;

    fn mode(&self) -> Mode {
        Mode::Cursor
    }

    fn service_flags(&self) -> u8 {
        0
    }

    fn set_flags(&mut self, _flags: u8) {}

    fn servers_changed(&mut self, _servers: &[Candidate], _change: Change) {}

    fn advance(&mut self, _servers: &[Candidate], _taken: u32) {}

    fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run;

    fn is_dynamic(&self) -> bool {
        false
    }
}

/// Defines [`Scheduler`] from the list of all schedulers: name, type, and what it does in a few words.
macro_rules! schedulers {
    ($($name:literal = $module:ident::$variant:ident, $doc:literal;)+) => {
        /// The scheduler of a service, with what it remembers.
        #[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
        #[serde(tag = "name")]
        pub enum Scheduler {$(
            #[doc = $doc]
            #[serde(rename = $name)]
            $variant($module::$variant),
        )+}

        impl Scheduler {
            /// Every scheduler's name.
            pub const NAMES: &[&str] = &[$($name),+];

            /// The scheduler of this name, as it starts. The flags are bits of
            /// [`crate::director::model::service_flags`]; the family is that of the service.
            pub fn from_name(name: &str, flags: u8, family: Family) -> Result<Self, Unknown> {
                match name {
                    $($name => Ok(Self::$variant(Algorithm::new(flags, family))),)+
                    _ => Err(Unknown(name.to_owned())),
                }
            }

            /// Its name, as IPVS spells it.
            pub const fn name(&self) -> &'static str {
                match self { $(Self::$variant(_) => $name),+ }
            }

            fn algorithm(&self) -> &dyn Algorithm {
                match self { $(Self::$variant(algorithm) => algorithm),+ }
            }

            fn algorithm_mut(&mut self) -> &mut dyn Algorithm {
                match self { $(Self::$variant(algorithm) => algorithm),+ }
            }
        }
    };
}

impl Scheduler {
    /// How the kernel indexes the runs.
    pub fn mode(&self) -> Mode {
        self.algorithm().mode()
    }

    /// What else the kernel must know to index the runs: bits of [`lb_common::service::flags`].
    pub fn service_flags(&self) -> u8 {
        self.algorithm().service_flags()
    }

    /// The service was edited and kept its scheduler, but has these flags now (bits of
    /// [`crate::director::model::service_flags`]).
    pub fn set_flags(&mut self, flags: u8) {
        self.algorithm_mut().set_flags(flags);
    }

    /// The servers of the service changed, and are these now.
    pub fn servers_changed(&mut self, servers: &[Candidate], change: Change) {
        self.algorithm_mut().servers_changed(servers, change);
    }

    /// The kernel has taken so many picks (of the run that was compiled last) since the last call. The servers are those
    /// for which the run was compiled, with the overload flags of then.
    ///
    /// Costs no more than compiling the run did, however large the number is.
    pub fn advance(&mut self, servers: &[Candidate], taken: u32) {
        self.algorithm_mut().advance(servers, taken);
    }

    /// The run for the next connections.
    pub fn compile(&mut self, servers: &[Candidate], arrivals: Arrivals) -> Run {
        self.algorithm_mut().compile(servers, arrivals)
    }

    /// Whether the run depends on the live counters: it must be compiled anew when they change.
    pub fn is_dynamic(&self) -> bool {
        self.algorithm().is_dynamic()
    }
}

schedulers! {
    "rr" = rr::RoundRobin, "Round robin: one after the other.";
    "wrr" = wrr::WeightedRoundRobin, "Weighted round robin: one after the other, the heavy ones more often.";
    "lc" = lc::LeastConnection, "Least connection: who has the least to do.";
    "wlc" = wlc::WeightedLeastConnection, "Weighted least connection: who has the least to do for its weight.";
    "lblc" = lblc::LocalityBased, "Locality-based least connection: where the destination went before, else as with wlc.";
    "lblcr" = lblc::LocalityBasedReplicated, "The same with a set of servers for each destination.";
    "sed" = sed::ShortestExpectedDelay, "Shortest expected delay: who has the least to do for its weight, the new connection counted in.";
    "nq" = nq::NeverQueue, "Never queue: who is idle, else as with sed.";
    "fo" = fo::Failover, "Weighted failover: the heaviest, as long as it takes connections.";
    "ovf" = ovf::Overflow, "Weighted overflow: the heaviest that has no more active connections than its weight.";
    "twos" = twos::TwoChoices, "Power of two choices: of two that are drawn by lot, who has the least to do for its weight.";
    "sh" = sh::SourceHash, "Source hash: by the client's address.";
    "dh" = dh::DestinationHash, "Destination hash: by the address that the packet is sent to.";
    "mh" = mh::Maglev, "Maglev hash: by the client's address, and little moves when a server comes or goes.";
    "none" = none::Nobody, "No scheduler: nobody is ever chosen.";
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Candidates with these weights in IPVS's order; the first has the highest index, as the newest.
    pub(super) fn candidates(weights: &[u32]) -> Vec<Candidate> {
        let count = weights.len() as u32;
        (0..count)
            .zip(weights)
            .map(|(position, &weight)| {
                let index = count - 1 - position;
                Candidate {
                    index,
                    address: (0x0a01_0001 + index).to_be_bytes().into(),
                    port: 8080,
                    weight,
                    last_weight: weight,
                    overloaded: false,
                    upper_threshold: 0,
                    active: 0,
                    total: 0,
                }
            })
            .collect()
    }

    #[test]
    fn every_scheduler_of_ipvs_is_known_and_no_other() {
        for name in Scheduler::NAMES {
            let scheduler = Scheduler::from_name(name, 0, Family::Ipv4).expect("it is in the list");
            assert_eq!(scheduler.name(), *name);
        }
        let error = Scheduler::from_name("rrr", 0, Family::Ipv4).expect_err("there is no such scheduler");
        assert_eq!(
            error.to_string(),
            "scheduler \"rrr\" cannot be used: there is no scheduler of this name; use one of rr, wrr, \
             lc, wlc, lblc, lblcr, sed, nq, fo, ovf, twos, sh, dh, mh"
        );
    }

    #[test]
    fn without_servers_nobody_is_chosen() {
        for name in Scheduler::NAMES {
            let mut scheduler = Scheduler::from_name(name, 0, Family::Ipv6).expect("it is in the list");
            scheduler.servers_changed(&[], Change::Started);
            let run = scheduler.compile(&[], Arrivals::after(3));
            assert!(run.picks.iter().all(|&pick| pick == lb_common::schedule::NOBODY), "{name}");
            scheduler.advance(&[], u32::MAX);
        }
    }

    #[test]
    fn the_kernel_learns_what_it_needs() {
        let flags = |name, flags| Scheduler::from_name(name, flags, Family::Ipv4).expect("it exists").service_flags();
        assert_eq!(flags("mh", 3), 3);
        assert_eq!(flags("sh", 3), lb_common::service::flags::PORT, "the fallback of sh is worked into its table");
        assert_eq!(flags("rr", 3), 0);
    }
}
