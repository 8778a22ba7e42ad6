//! The real servers of one service: the newest first, each once.
//!
//! IPVS's schedulers walk over them in this order, and people add them one by one, thousands of them from a file. Both
//! shall cost little: adding one, and finding out whether it is there already, take the same time however many there are.
//! Finding the place of one takes a walk.

use std::{
    collections::{HashMap, VecDeque, vec_deque},
    ops::{Index, IndexMut},
};

use serde::{Deserialize, Serialize, Serializer};

use super::{model::ServerId, service::Server};

/// The real servers of a service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(from = "VecDeque<Server>")]
pub(super) struct Servers {
    order: VecDeque<Server>,
    indices: HashMap<ServerId, u32>,
}

impl Servers {
    /// Whether this one is there.
    pub(super) fn contains(&self, id: &ServerId) -> bool {
        self.indices.contains_key(id)
    }

    /// The index in the datapath's array of the server with this name.
    pub(super) fn index(&self, id: &ServerId) -> Option<u32> {
        self.indices.get(id).copied()
    }

    /// Where a server stands in the order.
    pub(super) fn position(&self, id: &ServerId) -> Option<usize> {
        if !self.contains(id) {
            return None;
        }
        self.order.iter().position(|server| server.id == *id)
    }

    /// Puts a new one before all others.
    pub(super) fn add(&mut self, server: Server) {
        self.indices.insert(server.id, server.index);
        self.order.push_front(server);
    }

    /// Takes one out.
    pub(super) fn remove(&mut self, place: usize) {
        if let Some(server) = self.order.remove(place) {
            self.indices.remove(&server.id);
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    /// All, the newest first.
    pub(super) fn iter(&self) -> vec_deque::Iter<'_, Server> {
        self.order.iter()
    }

    /// All, the newest first. Whoever changes one leaves its address, port and index alone.
    pub(super) fn iter_mut(&mut self) -> vec_deque::IterMut<'_, Server> {
        self.order.iter_mut()
    }
}

impl Index<usize> for Servers {
    type Output = Server;

    fn index(&self, place: usize) -> &Server {
        &self.order[place]
    }
}

/// Whoever changes a server leaves its address, port and index alone.
impl IndexMut<usize> for Servers {
    fn index_mut(&mut self, place: usize) -> &mut Server {
        &mut self.order[place]
    }
}

impl<'a> IntoIterator for &'a Servers {
    type Item = &'a Server;
    type IntoIter = vec_deque::Iter<'a, Server>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl From<VecDeque<Server>> for Servers {
    fn from(order: VecDeque<Server>) -> Self {
        let indices = order.iter().map(|server| (server.id, server.index)).collect();
        Self { order, indices }
    }
}

impl Serialize for Servers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.order.serialize(serializer)
    }
}
