//! For tests: what the datapath does for lblc and lblcr, by the same rules ([`lb_common::locality`]), in front of a run.

use std::{collections::HashMap, net::IpAddr};

use lb_common::{
    locality::{Destination, Service, Standing, Survey},
    schedule::NOBODY,
    server::Counters,
    service::Mode,
};

use super::Locality;

/// What the destinations of one service remember.
#[derive(Default)]
pub(super) struct Destinations {
    known: HashMap<IpAddr, Destination>,
}

/// The service as the datapath sees it: what was compiled, and the live counters.
struct Compiled<'a> {
    locality: &'a Locality,
    counters: &'a HashMap<u32, Counters>,
}

impl Service for Compiled<'_> {
    fn index(&self) -> u32 {
        0
    }

    fn witness(&self) -> u32 {
        self.locality.witness.unwrap_or(NOBODY)
    }

    fn expiration(&self) -> u32 {
        u32::MAX
    }

    fn now(&self) -> u32 {
        0
    }

    fn standing(&self, index: u32) -> Option<Standing> {
        let server = self.locality.servers.iter().find(|server| server.index == index)?;
        Some(Standing::new(0, server.weight, server.overloaded, 0))
    }

    fn counters(&self, index: u32) -> Option<Counters> {
        self.counters.get(&index).copied()
    }
}

impl Destinations {
    /// The server for a new connection: one that the destination remembers, or the one that the schedule names.
    pub(super) fn pick(
        &mut self,
        mode: Mode,
        locality: &Locality,
        counters: &HashMap<u32, Counters>,
        destination: IpAddr,
        scheduled: impl FnOnce() -> u32,
    ) -> u32 {
        let service = Compiled { locality, counters };
        let mut place = 1;
        if let Some(known) = self.known.get_mut(&destination) {
            let mut survey = Survey::default();
            let chosen =
                if mode == Mode::Replicas { known.choose_replica(&service, &mut survey) } else { known.choose_only(&service) };
            if let Some(chosen) = chosen {
                return chosen;
            }
            place = if mode == Mode::Replicas { survey.place() } else { place };
        }
        let scheduled = scheduled();
        if let Some(standing) = service.standing(scheduled) {
            self.known.entry(destination).or_default().learn(standing.member(scheduled), place, &service);
        }
        scheduled
    }
}
