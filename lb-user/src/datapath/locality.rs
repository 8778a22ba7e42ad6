//! What lblc and lblcr need in the kernel: the standings of real servers, and the destinations that remember them.
//!
//! ```text
//! STANDINGS[server]                     weight, service, flags, generation     written here, read by the packet path
//! DESTINATIONS_V4[service, address]     servers, when last asked for           written there, cleaned up here
//! ```
//!
//! Standings follow the schedules: they are written with each, a server that is in none any more is marked as removed, and
//! when its index is free the generation goes up, so that no destination means the server that gets it next.
//!
//! Destinations expire as IPVS's do, with its numbers ([`EXCESS`], [`IDLE`]): once a minute, a service that has too many of
//! them loses some that were not asked for lately; every half an hour all go that were not asked for in a day. One
//! thing is other than in IPVS: a table that is full pushes out the longest unused, and refuses none.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::Hash,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use aya::{
    Pod,
    maps::{Array, HashMap as MapHashMap, MapData},
};
use lb_common::{
    Plain,
    config::{Config, SweepReport},
    family::{Ipv4, Ipv6},
    locality::{Destination, DestinationKey, Standing},
    service::Mode,
};
use nix::time::{ClockId, clock_gettime};

use super::{
    connections::Clock,
    maps::{Pins, is_missing},
    shared::Words,
    system::for_each_entry,
};
use crate::scheduler::Locality;

/// Between two looks at destinations.
const PERIOD: Duration = Duration::from_secs(60);

/// Every so many looks, all destinations go that have expired.
const FULL_LOOK: u32 = 30;

/// More destinations of one service are too many.
#[doc(alias = "CONFIG_IP_VS_LBLC_TAB_BITS")]
const EXCESS: usize = 16_384;

/// At most so many go at one look because there are too many.
const AT_ONCE: usize = EXCESS / 2;

/// Seconds after which a destination may go if there are too many.
const IDLE: u32 = 360;

/// The standings of real servers, as they are published.
#[derive(Debug)]
pub struct Standings {
    words: Words,
    /// Services with a cache, and the indices of their servers.
    services: HashMap<u32, Vec<u32>>,
}

impl Standings {
    /// Takes over what is published already.
    pub fn new(words: Words) -> Self {
        let mut services: HashMap<u32, Vec<u32>> = HashMap::new();
        for index in 0..words.length() {
            let standing = Standing::from_word(words.load(index));
            if standing.is_available() {
                services.entry(standing.service()).or_default().push(index);
            }
        }
        Self { words, services }
    }

    /// Publishes the standings of a service's servers. Those that it had before and has no more are removed ones.
    pub fn publish(&mut self, service: u32, locality: &Locality) {
        let Ok(number) = u16::try_from(service) else { return };
        let indices = locality.servers.iter().map(|server| server.index).collect();
        let before = self.services.insert(service, indices).unwrap_or_default();
        for server in &locality.servers {
            let generation = Standing::from_word(self.words.load(server.index)).generation();
            self.write(server.index, Standing::new(number, server.weight, server.overloaded, generation));
        }
        let present: HashSet<u32> = locality.servers.iter().map(|server| server.index).collect();
        for index in before.into_iter().filter(|index| !present.contains(index)) {
            self.remove(service, index);
        }
    }

    /// A service has no cache any more. `false`: it had none.
    pub fn withdraw(&mut self, service: u32) -> bool {
        let Some(indices) = self.services.remove(&service) else { return false };
        for index in indices {
            self.remove(service, index);
        }
        true
    }

    /// The index of a server is free, and means another one from now on.
    pub fn free(&mut self, index: u32) {
        self.write(index, Standing::from_word(self.words.load(index)).dealt_anew());
    }

    /// Whether a service has a cache.
    pub fn contains(&self, service: u32) -> bool {
        self.services.contains_key(&service)
    }

    /// Whether no service has.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    fn remove(&self, service: u32, index: u32) {
        let standing = Standing::from_word(self.words.load(index));
        // It may be in another service's schedule already.
        if standing.service() == service {
            self.write(index, standing.removed());
        }
    }

    /// Writes what has changed only: schedules are published often, and the packet path reads on other CPUs.
    fn write(&self, index: u32, standing: Standing) {
        if self.words.load(index) != standing.word() {
            self.words.store(index, standing.word());
        }
    }
}

/// The destinations of one family.
struct Table<A> {
    entries: MapHashMap<MapData, DestinationKey<A>, Destination>,
    data: MapData,
}

impl<A: Copy + Eq + Hash> Table<A>
where
    DestinationKey<A>: Plain + Pod,
{
    fn open(pins: &Pins, name: &str) -> anyhow::Result<Self> {
        Ok(Self { entries: pins.typed(name)?, data: pins.data(name)? })
    }

    /// Every entry's key and when it was last asked for.
    fn list(&self) -> anyhow::Result<Vec<(DestinationKey<A>, u32)>> {
        let mut all = Vec::new();
        for_each_entry(&self.data, |key: &DestinationKey<A>, entry: &Destination| all.push((*key, entry.last_used)))
            .context("the destinations of lblc cannot be read")?;
        Ok(all)
    }

    fn forget(&mut self, keys: impl IntoIterator<Item = DestinationKey<A>>) -> anyhow::Result<()> {
        for key in keys {
            match self.entries.remove(&key) {
                Err(error) if !is_missing(&error) => return Err(error).context("a destination of lblc cannot be forgotten"),
                // The packet path may have pushed it out.
                _ => {}
            }
        }
        Ok(())
    }

    fn forget_service(&mut self, service: u32) -> anyhow::Result<()> {
        let keys: Vec<_> = self.list()?.into_iter().map(|(key, _)| key).filter(|key| key.service == service).collect();
        self.forget(keys)
    }

    /// One look. `expiration` is that of a service, in seconds; nothing if the service has no cache.
    fn clean(&mut self, is_full_look: bool, clock: Clock, expiration: impl Fn(u32) -> Option<u32>) -> anyhow::Result<()> {
        let mut services: BTreeMap<u32, Vec<(u32, DestinationKey<A>)>> = BTreeMap::new();
        for (key, last_used) in self.list()? {
            services.entry(key.service).or_default().push((clock.seconds_since(last_used), key));
        }
        for (service, entries) in services {
            let expired = expired(entries, is_full_look, expiration(service));
            self.forget(expired)?;
        }
        Ok(())
    }
}

/// The keys of a service's destinations that have to go, of all with the seconds since they were last asked for.
fn expired<K>(mut entries: Vec<(u32, K)>, is_full_look: bool, expiration: Option<u32>) -> Vec<K> {
    let Some(expiration) = expiration else { return entries.into_iter().map(|(_, key)| key).collect() };
    let excess = entries.len().saturating_sub(EXCESS);
    let (least, count) = if is_full_look { (expiration, usize::MAX) } else { (IDLE, (excess * 4 / 3).min(AT_ONCE)) };
    entries.sort_by_key(|(idle, _)| std::cmp::Reverse(*idle));
    entries.into_iter().take(count).take_while(|(idle, _)| *idle >= least).map(|(_, key)| key).collect()
}

/// The destinations that the packet path remembers.
pub struct Destinations {
    ipv4: Table<Ipv4>,
    ipv6: Table<Ipv6>,
    report: Array<MapData, SweepReport>,
    last_look: Instant,
    looks: u32,
}

impl Destinations {
    /// Opens the pinned tables.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        Ok(Self {
            ipv4: Table::open(pins, "DESTINATIONS_V4")?,
            ipv6: Table::open(pins, "DESTINATIONS_V6")?,
            report: pins.typed("SWEEP")?,
            last_look: Instant::now(),
            looks: 1,
        })
    }

    /// Forgets all destinations of a service.
    pub fn forget_service(&mut self, service: u32) -> anyhow::Result<()> {
        self.ipv4.forget_service(service)?;
        self.ipv6.forget_service(service)
    }

    /// Looks for destinations that have expired, if it is time to. `mode` is that of a service with a cache.
    pub fn clean(&mut self, config: &Config, mode: impl Fn(u32) -> Option<Mode>) -> anyhow::Result<()> {
        if self.last_look.elapsed() < PERIOD {
            return Ok(());
        }
        self.last_look = Instant::now();
        let is_full_look = self.looks.is_multiple_of(FULL_LOOK);
        self.looks += 1;
        let report = self.report.get(&0, 0).context("the report of the sweep cannot be read")?;
        let monotonic = clock_gettime(ClockId::CLOCK_MONOTONIC).context("the clock cannot be read")?;
        let clock = Clock::now(&report, Duration::from(monotonic).as_nanos() as u64, config.hz);
        let expiration = |service| {
            let replicas = mode(service)? == Mode::Replicas;
            Some(if replicas { config.lblcr_expiration } else { config.lblc_expiration })
        };
        self.ipv4.clean(is_full_look, clock, expiration)?;
        self.ipv6.clean(is_full_look, clock, expiration)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::Candidate;

    fn locality(indices: &[u32]) -> Locality {
        let server = |&index| Candidate {
            index,
            address: [192, 0, 2, 1].into(),
            port: 80,
            weight: 7,
            last_weight: 7,
            overloaded: index == 3,
            upper_threshold: 0,
            active: 0,
            total: 0,
        };
        Locality { witness: None, servers: indices.iter().map(server).collect() }
    }

    fn standing(standings: &Standings, index: u32) -> Standing {
        Standing::from_word(standings.words.load(index))
    }

    #[test]
    fn standings_follow_the_schedule() {
        let mut standings = Standings::new(Words::anonymous(8));
        standings.publish(5, &locality(&[2, 3]));
        assert_eq!(standing(&standings, 2), Standing::new(5, 7, false, 0));
        assert_eq!(standing(&standings, 3), Standing::new(5, 7, true, 0));
        standings.publish(5, &locality(&[2]));
        assert_eq!(standing(&standings, 3), Standing::new(5, 7, true, 0).removed());
        standings.publish(6, &locality(&[4]));
        standings.publish(6, &locality(&[2, 4]));
        assert!(standings.withdraw(5));
        assert_eq!(standing(&standings, 2), Standing::new(6, 7, false, 0), "it has moved");
        assert!(!standings.withdraw(5));
    }

    #[test]
    fn a_free_index_means_nobody_that_is_remembered() {
        let mut standings = Standings::new(Words::anonymous(8));
        standings.publish(5, &locality(&[2]));
        let member = standing(&standings, 2).member(2);
        standings.publish(5, &locality(&[]));
        standings.publish(5, &locality(&[2]));
        assert_eq!(standing(&standings, 2).member(2), member, "it came back");
        standings.publish(5, &locality(&[]));
        standings.free(2);
        standings.publish(5, &locality(&[2]));
        assert_ne!(standing(&standings, 2).member(2), member, "it is another one");
    }

    #[test]
    fn standings_that_are_found_are_taken_over() {
        let words = Words::anonymous(8);
        words.store(1, Standing::new(4, 1, false, 0).word());
        words.store(2, Standing::new(4, 1, false, 0).removed().word());
        let mut standings = Standings::new(words);
        assert!(standings.contains(4));
        standings.publish(4, &locality(&[]));
        assert!(!standing(&standings, 1).is_available());
    }

    /// Destinations that were not asked for so many seconds, named by that.
    fn idle(seconds: impl IntoIterator<Item = u32>) -> Vec<(u32, u32)> {
        seconds.into_iter().map(|seconds| (seconds, seconds)).collect()
    }

    #[test]
    fn destinations_expire_after_their_time() {
        assert_eq!(expired(idle([5, 100, 99]), true, Some(100)), [100]);
        assert_eq!(expired(idle([5, 1_000_000]), false, Some(100)), [0_u32; 0], "not at this look");
        assert_eq!(expired(idle([0, 3]), false, None).len(), 2, "without a cache all go");
    }

    #[test]
    fn too_many_destinations_lose_the_idle() {
        let excess = EXCESS as u32 + 300;
        assert_eq!(expired(idle(0..excess), false, Some(u32::MAX)).len(), 400, "a third more than is too many");
        assert_eq!(expired(idle((0..excess).map(|idle| idle % 370)), false, Some(u32::MAX)).len(), 400);
        assert!(expired(idle((0..excess).map(|idle| idle % 360)), false, Some(u32::MAX)).is_empty(), "all are in use");
        assert_eq!(expired(idle(0..3 * excess), false, Some(u32::MAX)).len(), AT_ONCE);
    }
}
