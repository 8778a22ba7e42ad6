//! Local addresses and ports: a FULLNAT connection gets one of its own before it begins.
//!
//! The entry for its replies is the claim: who inserts it has the port, towards this real server and in this protocol, until
//! the entry is deleted with the connection. There is no other list of what is taken, so nothing can contradict it.
//!
//! Where to look first is drawn by lot, so that CPUs do not meet. A search ends after [`TRIES`], which finds a port as long as
//! some 2 % are free. Once in a tenth of a second each CPU may go on through a whole address, so that the last port is found, too,
//! but a flood at a full pool cannot have the processor. Such a search also takes back what was never given back: when two CPUs
//! end and begin the same connection at once, a claim may be left without one.

use aya_ebpf::{
    cty::c_void,
    helpers::generated::{bpf_get_prandom_u32, bpf_loop},
};
use lb_common::{
    connection::{Connection, ConnectionKey},
    family::Address,
    local::{Local, POOL_SIZE, PORTS, Pool, PoolKey, SHARED, Walk},
    packet::{Network as _, V4, transport::Ports},
    reason::Reason,
    reply::{self, Reply, flags},
    server::{Method, Server},
};

use crate::{
    atomic,
    maps::{Family, HZ, LOCALS, POOLS, SEARCHES, SERVERS, TAKING_BACK},
    table::EEXIST,
    track,
};

/// Tries of a common search.
const TRIES: u32 = 256;

/// Answer of [`claim`]: every port that was tried is taken, or there is no pool.
const EXHAUSTED: u32 = 1 << 16;
/// Answer of [`claim`]: the table of replies is full.
const FULL: u32 = 2 << 16;

/// The local address and port of a new connection to a real server; none if the server sees clients' own.
#[inline(always)]
pub fn of_new<F: Family>(key: &ConnectionKey<F::Address>, server: u32) -> Result<Local, Reason> {
    if SERVERS.get(server).is_none_or(|entry| !Method::hides_clients(entry.method)) {
        return Ok(Local::NONE);
    }
    match claim::<F>(key, server) {
        EXHAUSTED => Err(Reason::LocalPorts),
        FULL => Err(Reason::TableFull),
        local => Ok(Local(local)),
    }
}

/// The address that an index stands for.
#[inline(always)]
pub fn address<F: Family>(local: Local) -> Option<F::Address> {
    LOCALS.get(local.address()).map(|entry| F::Address::from_mapped(&entry.address))
}

/// What a search would insert, for one CPU: too large for the stack.
#[repr(C)]
pub struct Claim<A> {
    key: ConnectionKey<A>,
    entry: Reply<A>,
}

/// A search for a free port.
#[repr(C)]
struct Search<A> {
    claim: *mut Claim<A>,
    pool: *const Pool,
    walk: Walk,
    /// An answer of [`claim`].
    found: u32,
    steps: u32,
    thorough: u64,
}

/// Claims a local address and port by making the entry for the replies.
#[inline(never)]
fn claim<F: Family>(key: &ConnectionKey<F::Address>, server: u32) -> u32 {
    let (Some(entry), Some(searched)) = (SERVERS.get(server), SEARCHES.get_ptr_mut(0)) else { return EXHAUSTED };
    let (Some(pool), Some(claim)) = (pool::<F>(entry), F::claims().get_ptr_mut(0)) else { return EXHAUSTED };
    // SAFETY: helpers without arguments; this CPU's own elements.
    let (walk, idle) = unsafe {
        (*claim).key = reply::key(key, entry, key.client, 0);
        (*claim).entry = Reply::new(key, server, flags::LOCAL);
        (*claim).entry.last_seen = track::jiffies();
        if entry.method == Method::Cross as u8
            && let Some(twin) = V4::claims().get_ptr_mut(0)
        {
            (*twin).entry = Reply::new(&V4::no_key(), server, flags::LOCAL | flags::CROSS);
        }
        (Walk::new(bpf_get_prandom_u32(), bpf_get_prandom_u32()), track::jiffies().wrapping_sub(*searched))
    };
    let thorough = idle >= HZ.load() / 10;
    let mut search = Search { claim, pool, walk, found: EXHAUSTED, steps: 0, thorough: thorough.into() };
    let tries = if thorough { PORTS } else { TRIES };
    // SAFETY: the callback takes the context that is handed over here; this CPU's own element.
    unsafe {
        bpf_loop(tries, attempt::<F> as *mut c_void, (&raw mut search).cast(), 0);
        if thorough && search.steps >= TRIES {
            *searched = track::jiffies();
        }
    }
    search.found
}

/// The pool of a server's service: its own, or the shared one.
#[inline(always)]
fn pool<F: Family>(server: &Server) -> Option<*const Pool> {
    let family = if server.method == Method::Cross as u8 { V4::AF } else { F::AF }.into();
    POOLS
        .get_ptr(PoolKey { service: server.outer_source[0], family })
        .or_else(|| POOLS.get_ptr(PoolKey { service: SHARED, family }))
}

/// Makes a claim to a port that connections of IPv4 share, too, known among them. One that fails has made none.
///
/// For a client of IPv6 with a real server of IPv4 there are two entries: the one that counts, under mapped addresses, and one
/// among those of IPv4 that only takes the port, and says that there is another. The latter comes first and goes last.
#[inline(always)]
fn reserve<F: Family>(key: &ConnectionKey<F::Address>) -> Result<(), i32> {
    let Some(unmapped) = F::unmapped(key) else { return Ok(()) };
    let Some(twin) = V4::claims().get_ptr_mut(0) else { return Ok(()) };
    // SAFETY: this CPU's own element.
    unsafe {
        (*twin).key = unmapped;
        V4::replies().insert(&(*twin).key, &(*twin).entry, 1 /* BPF_NOEXIST */)
    }
}

/// Deletes an entry for replies, and with it the claim to a local port. `false`: there is none.
#[inline(always)]
pub fn release<F: Family>(key: &ConnectionKey<F::Address>) -> bool {
    let released = F::replies().remove(key).is_ok();
    if released {
        free::<F>(key);
    }
    released
}

/// Takes back what [`reserve`] did.
#[inline(always)]
fn free<F: Family>(key: &ConnectionKey<F::Address>) {
    if let Some(unmapped) = F::unmapped(key) {
        let _ = V4::replies().remove(&unmapped);
    }
}

/// Whether a claim is a second old or more, and nobody's.
#[inline(always)]
fn is_left_over<F: Family>(taken: *const Reply<F::Address>, protocol: u32, local: Local) -> bool {
    // SAFETY: elements of the maps; they may become others' under our hands, but they stay memory.
    unsafe {
        let idle = track::jiffies().wrapping_sub((*taken).last_seen);
        let of_connection = |known: *mut Connection| (*known).local == local;
        let own = (*taken).flags & flags::CROSS == 0;
        own && idle >= HZ.load() && !F::connections().find(&(*taken).connection(protocol)).is_some_and(of_connection)
    }
}

/// Deletes a claim that is left over. One CPU at a time: else one could delete what the other has just claimed.
#[inline(always)]
fn take_back<F: Family>(claim: *const Claim<F::Address>, local: Local) -> bool {
    let Some(busy) = TAKING_BACK.get_ptr_mut(0) else { return false };
    // SAFETY: elements of maps.
    unsafe {
        let key = &(*claim).key;
        let alone = atomic::fetch_add(busy, 1) == 0;
        let left_over = |taken| is_left_over::<F>(taken, key.protocol, local);
        let deleted = alone && F::replies().get_ptr(key).is_some_and(left_over) && release::<F>(key);
        atomic::add(busy, 1_u64.wrapping_neg());
        deleted
    }
}

/// Tries one address and port; 1 ends the search.
unsafe extern "C" fn attempt<F: Family>(step: u32, search: *mut Search<F::Address>) -> i64 {
    // SAFETY: the kernel hands over what `bpf_loop` was given; the pool is an element of the map.
    unsafe {
        let search = &mut *search;
        search.steps = step;
        let count = (*search.pool).count;
        if count == 0 {
            return 1;
        }
        let (place, port) = search.walk.step(step, count);
        let index = (*search.pool).addresses[place as usize & (POOL_SIZE - 1)];
        let local = Local::new(index, port.to_be());
        let Some(address) = address::<F>(local) else { return 1 };
        let claim = search.claim;
        (*claim).key.vip = address;
        (*claim).key.ports = Ports::new((*claim).key.ports.source(), local.port());
        if let Some(taken) = F::replies().get_ptr(&(*claim).key)
            && (search.thorough == 0 || !is_left_over::<F>(taken, (*claim).key.protocol, local) || !take_back::<F>(claim, local))
        {
            return 0;
        }
        let inserted = match reserve::<F>(&(*claim).key) {
            Ok(()) => {
                let inserted = F::replies().insert(&(*claim).key, &(*claim).entry, 1 /* BPF_NOEXIST */);
                if inserted.is_err() {
                    free::<F>(&(*claim).key);
                }
                inserted
            }
            refused => refused,
        };
        match inserted {
            Ok(()) => search.found = local.0,
            // Another CPU was faster, or a connection of IPv4 has the port.
            Err(EEXIST) => return 0,
            Err(_) => search.found = FULL,
        }
    }
    1
}
