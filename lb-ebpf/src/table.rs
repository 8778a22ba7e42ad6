//! The table of connections: all that the datapath asks of it.
//!
//! Parse, pick and forward know these four operations and nothing else, so another kind of table can take this one's place
//! (`docs/decisions/connection-table.md` says what such a one would have to do). This one is the kernel's own hash map: a look-up
//! takes no lock, an insertion or deletion locks one bucket, and an element that is deleted under a reader's hands stays memory of
//! this table.

use aya_ebpf::maps::HashMap;
use lb_common::{
    config::SweptTable,
    connection::{Connection, ConnectionKey},
    family::Ipv4,
};

use crate::newcomers;

const BPF_NOEXIST: u64 = 1;
pub const EEXIST: i32 = -17;

/// Why a connection was not inserted.
#[derive(Clone, Copy, PartialEq)]
pub enum Refusal {
    /// There is one of that key: another CPU was faster.
    Exists,
    /// There is no room, or no memory.
    Full,
}

/// The connections of one family, by key.
#[repr(transparent)]
pub struct Connections<A>(HashMap<ConnectionKey<A>, Connection>);

impl<A> Connections<A> {
    /// An empty table for so many connections, whose memory is taken at once.
    pub const fn with_capacity(capacity: u32) -> Self {
        Self(HashMap::with_max_entries(capacity, 0))
    }

    /// The connection of a key. It may be deleted, and become another one, while the pointer is held.
    #[inline(always)]
    pub fn find(&self, key: &ConnectionKey<A>) -> Option<*mut Connection> {
        self.0.get_ptr_mut(key)
    }

    /// Inserts a connection, unless there is one of that key.
    #[inline(always)]
    pub fn insert(&self, key: &ConnectionKey<A>, connection: &Connection) -> Result<(), Refusal> {
        match self.0.insert(key, connection, BPF_NOEXIST) {
            Ok(()) => {
                newcomers::note(if size_of::<A>() == size_of::<Ipv4>() {
                    SweptTable::ConnectionsV4
                } else {
                    SweptTable::ConnectionsV6
                });
                Ok(())
            }
            Err(EEXIST) => Err(Refusal::Exists),
            Err(_) => Err(Refusal::Full),
        }
    }

    /// Deletes a connection. Of several CPUs that do it at once, one is told `true`.
    #[inline(always)]
    pub fn remove(&self, key: &ConnectionKey<A>) -> bool {
        self.0.remove(key).is_ok()
    }
}
