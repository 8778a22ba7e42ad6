//! A model of lblc and lblcr for tests: IPVS's rules (`ipvs-semantics.md`, 1.13) for one service, sentence by sentence.
//!
//! It has nothing of what [`crate::locality`] has for speed: no words, no generations, no witness, no limit of a set. It looks
//! at every server each time. A test asks it for a pick, counts the connection where it went, and asks the datapath the same.
//!
//! ```
//! use lb_common::model::locality::{Locality, Server};
//!
//! let mut lblc = Locality::new(false, u64::MAX);
//! lblc.add(1, Server { weight: 1, ..Server::default() });
//! lblc.add(2, Server { weight: 1, ..Server::default() });
//! assert_eq!(lblc.pick("example.org", 0), Some(2)); // the newest of the idle
//! lblc.server(2).total += 1;
//! assert_eq!(lblc.pick("example.net", 0), Some(1)); // a new address: wlc
//! assert_eq!(lblc.pick("example.org", 0), Some(2));
//! ```

use core::hash::Hash;
use std::{
    collections::{BTreeMap, HashMap},
    vec,
    vec::Vec,
};

/// A real server.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Server {
    /// Its weight.
    pub weight: u32,
    /// It is above its threshold.
    pub overloaded: bool,
    /// Active connections.
    pub active: u32,
    /// All connections.
    pub total: u32,
}

impl Server {
    /// What IPVS calls overhead.
    fn load(&self) -> i64 {
        i64::from(self.active) * 256 + i64::from(self.total)
    }

    /// Whether it has more to do than another, for its weight.
    fn exceeds(&self, other: &Self) -> bool {
        self.load() * i64::from(other.weight) > other.load() * i64::from(self.weight)
    }
}

/// A service with one of the two schedulers.
#[derive(Clone, Debug)]
pub struct Locality<D> {
    replicas: bool,
    expiration: u64,
    /// By name; those that were removed, too.
    servers: BTreeMap<u32, Server>,
    /// Names in IPVS's order, the newest first.
    order: Vec<u32>,
    cache: HashMap<D, Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    set: Vec<u32>,
    last_modified: u64,
}

impl<D: Eq + Hash> Locality<D> {
    /// A service without servers: lblc, or lblcr with this `lblcr_expiration` in ticks of the caller's clock.
    pub fn new(replicas: bool, expiration: u64) -> Self {
        Self { replicas, expiration, servers: BTreeMap::new(), order: Vec::new(), cache: HashMap::new() }
    }

    /// Adds a server, or one back that was removed.
    pub fn add(&mut self, name: u32, server: Server) {
        self.order.insert(0, name);
        self.servers.insert(name, server);
    }

    /// Removes a server. Its connections are still counted.
    pub fn remove(&mut self, name: u32) {
        self.order.retain(|other| *other != name);
    }

    /// A server, removed or not, to be changed. It must have been added.
    ///
    /// # Panics
    /// If it was not.
    pub fn server(&mut self, name: u32) -> &mut Server {
        self.servers.get_mut(&name).expect("the server was added")
    }

    /// Names of the servers that are there, in IPVS's order.
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// The names that a destination remembers, the newest first.
    pub fn remembered(&self, destination: &D) -> &[u32] {
        self.cache.get(destination).map_or(&[], |entry| &entry.set)
    }

    /// The server for a new connection. The caller counts it.
    pub fn pick(&mut self, destination: D, now: u64) -> Option<u32> {
        let Some(mut entry) = self.cache.remove(&destination) else {
            let chosen = self.weighted_least()?;
            self.cache.insert(destination, Entry { set: vec![chosen], last_modified: now });
            return Some(chosen);
        };
        let chosen = if self.replicas { self.pick_replica(&mut entry, now) } else { self.pick_only(&mut entry) };
        self.cache.insert(destination, entry);
        chosen
    }

    fn pick_only(&self, entry: &mut Entry) -> Option<u32> {
        let name = entry.set[0];
        if self.order.contains(&name) && self.servers[&name].weight > 0 && !self.is_busy(name) {
            return Some(name);
        }
        let chosen = self.weighted_least()?;
        entry.set[0] = chosen;
        Some(chosen)
    }

    fn pick_replica(&self, entry: &mut Entry, now: u64) -> Option<u32> {
        let least = self.least_of(&entry.set);
        if entry.set.len() > 1 && now - entry.last_modified > self.expiration {
            let weighty = entry.set.iter().copied().filter(|name| self.servers[name].weight > 0);
            let most = weighty.reduce(|most, name| if self.servers[&name].exceeds(&self.servers[&most]) { name } else { most });
            if let Some(most) = most {
                entry.set.retain(|name| *name != most);
                entry.last_modified = now;
            }
        }
        if let Some(least) = least
            && !self.is_busy(least)
        {
            return Some(least);
        }
        let chosen = self.weighted_least()?;
        if !entry.set.contains(&chosen) {
            entry.set.insert(0, chosen);
            entry.last_modified = now;
        }
        Some(chosen)
    }

    /// The choice of wlc.
    pub fn weighted_least(&self) -> Option<u32> {
        self.least_of(&self.order)
    }

    /// The first of the least busy that take connections.
    fn least_of(&self, names: &[u32]) -> Option<u32> {
        let may = |name: &u32| {
            let server = &self.servers[name];
            !server.overloaded && server.weight > 0 && self.order.contains(name)
        };
        let names = names.iter().copied().filter(may);
        names.reduce(|least, name| if self.servers[&least].exceeds(&self.servers[&name]) { name } else { least })
    }

    fn is_busy(&self, name: u32) -> bool {
        let has_room = |name: &u32| u64::from(self.servers[name].active) * 2 < u64::from(self.servers[name].weight);
        self.servers[&name].active > self.servers[&name].weight && self.order.iter().any(has_room)
    }
}
