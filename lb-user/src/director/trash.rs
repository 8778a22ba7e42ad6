//! Removed servers whose connections may still be alive.
//!
//! IPVS keeps a removed real server, with its counters, as long as connections name it. Whoever adds the same server to the
//! same service again in time gets it back, and its connections go on as if nothing had happened. A server that has been
//! without connections for [`IDLE`] is forgotten, and its index can be used again; after [`SHORTEST_IDLE`], if indices run short.
//!
//! Servers that the datapath has but no state file tells of are kept here, too: nobody can get them back, but their
//! indices must not be given away while connections name them.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::model::{ServerId, ServiceId, Totals};

/// How long a removed server has to be without connections before it is forgotten.
pub(super) const IDLE: Duration = Duration::from_secs(120);

/// The same if its index is wanted: by then, no packet is under way that has picked it before it was removed.
const SHORTEST_IDLE: Duration = Duration::from_millis(100);
/// How many are forgotten at a time, because somebody waits.
const HANDFUL: usize = 1024;

/// A removed server.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Removed {
    /// Its service when it was removed, and who it is; nothing if that is not known.
    pub(super) owner: Option<(ServiceId, ServerId)>,
    /// Its index in the datapath's array.
    pub(super) index: u32,
    /// [`super::service::Service::incarnation`] of that service.
    pub(super) incarnation: u64,
    /// Whether it had too many connections.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) overloaded: bool,
    /// What its totals were when it was removed. Since then there have been no more: its packets are dropped.
    #[serde(default)]
    pub(super) totals: Totals,
    /// What its totals were at the last zeroing.
    #[serde(default, skip_serializing_if = "Totals::is_zero")]
    pub(super) zero: Totals,
    /// Since when it has had no connections; from the beginning, as long as nobody has looked.
    #[serde(skip)]
    pub(super) idle_since: Option<Instant>,
}

/// All removed servers, by index and by owner.
#[derive(Clone, Debug, Default)]
pub(super) struct Trash {
    by_index: BTreeMap<u32, Removed>,
    indices: BTreeMap<(ServiceId, ServerId), u32>,
}

impl Trash {
    /// Puts a server in.
    pub(super) fn insert(&mut self, removed: Removed) {
        if let Some(owner) = removed.owner {
            self.indices.insert(owner, removed.index);
        }
        self.by_index.insert(removed.index, removed);
    }

    /// Takes a server back.
    pub(super) fn take(&mut self, service: ServiceId, server: ServerId) -> Option<Removed> {
        let index = self.indices.remove(&(service, server))?;
        self.by_index.remove(&index)
    }

    /// Takes out every server that has been without connections and templates for long enough.
    pub(super) fn take_idle(&mut self, now: Instant, mut connections: impl FnMut(u32) -> u32) -> Vec<Removed> {
        let mut idle = Vec::new();
        for removed in self.by_index.values_mut() {
            if connections(removed.index) > 0 {
                removed.idle_since = None;
            } else if now.duration_since(*removed.idle_since.get_or_insert(now)) >= IDLE {
                idle.push(removed.index);
            }
        }
        idle.into_iter().filter_map(|index| self.remove(index)).collect()
    }

    /// Takes out some servers without connections and templates whose indices are wanted, of those for which `may_go` says yes.
    pub(super) fn take_some(&mut self, now: Instant, may_go: impl Fn(u32) -> bool) -> Vec<Removed> {
        let rested = |since: Instant| now.duration_since(since) >= SHORTEST_IDLE;
        let idle = self.by_index.values().filter(|removed| removed.idle_since.is_some_and(rested));
        let idle: Vec<u32> = idle.map(|removed| removed.index).filter(|index| may_go(*index)).take(HANDFUL).collect();
        idle.into_iter().filter_map(|index| self.remove(index)).collect()
    }

    /// Forgets servers for which `keep` says no, and gives back their indices.
    pub(super) fn retain(&mut self, keep: impl Fn(&Removed) -> bool) -> Vec<u32> {
        let gone: Vec<u32> = self.by_index.values().filter(|removed| !keep(removed)).map(|removed| removed.index).collect();
        for index in &gone {
            self.remove(*index);
        }
        gone
    }

    fn remove(&mut self, index: u32) -> Option<Removed> {
        let removed = self.by_index.remove(&index)?;
        if let Some(owner) = removed.owner {
            self.indices.remove(&owner);
        }
        Some(removed)
    }

    /// Every removed server.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Removed> {
        self.by_index.values()
    }
}
