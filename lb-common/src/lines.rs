//! A connection table of cache lines: the prototype of another one than the kernel's hash map. Nothing of the datapath uses it
//! (`docs/decisions/connection-table.md` says why, and what it costs and gains).
//!
//! The table is an array of lines of 64 bytes. Where a key's entry may be follows from a hash with a secret seed: in the home line,
//! in its neighbour, in two lines of a second hash, or in the *stash*, an ordinary hash map for what finds no room. An entry never
//! moves. So the common look-up reads one line, and a listing or a sweep reads an array, from the kernel or by `mmap`.
//!
//! ```text
//! a line for IPv4:  | addresses | control | leg | standing || addresses | control | leg | standing |
//! a line for IPv6:  |      addresses: four words           | control    | leg     | standing | -   |
//! control:          | version: 22 | state: 2 | protocol: 8 | ports: 32 |
//! standing:         | overflow: 8 (of the line's first slot) | half open: 8 | flags: 8 | state: 8 | last seen: 32 |
//! ```
//!
//! Several CPUs insert, delete and read at once, nobody waits for anybody, and a program may be interrupted anywhere:
//!
//! * A slot is *free*, *claimed* (somebody writes it), *pending* (its key can be seen) or *live*. Each step is one compare-and-swap
//!   of the control word, whose version counts the claims: a reader that finds the same control word before and after has read one
//!   entry and not two halves.
//! * **No key twice.** Who inserts makes its entry pending, and only then looks for others of the same key. One that is live has
//!   won. Of two that are pending the one in the lower place wins: it takes the other's slot away, whose owner notices when its last
//!   compare-and-swap fails. Of two that insert at once, at least one sees the other, because a compare-and-swap is a fence.
//! * **No entry lost.** A live entry changes by its deletion alone, one compare-and-swap, of which one CPU is the winner.
//! * **A miss reads one line, too**, as long as that has no overflow: the number of entries that should be there and are elsewhere.
//!   It is counted up before such an entry becomes pending, and down after it is gone, so it is never too small.
//!
//! The order of memory accesses is that of x86: loads are not swapped with loads, nor stores with stores. Elsewhere the second look
//! at the control word would need a fence.
//!
//! The same code runs in eBPF programs, over mapped memory, and in a test with threads: [`Memory`] tells them apart.

use crate::{
    connection::{Connection, ConnectionKey},
    family::{Ipv4, Ipv6},
    local::Local,
    packet::transport::Ports,
    wire::plain,
};

/// Words of a line.
pub const LINE: usize = 8;

/// Secret numbers, without which nobody can tell which keys meet in a line. Each set is for one hash: a number to begin with, and one
/// for every half word of a key.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Seed {
    /// For the home line.
    pub home: [u64; 11],
    /// For the second one.
    pub second: [u64; 11],
}

plain! { Seed = 176 }

/// Why nothing was inserted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// There is one of that key, or another CPU is about to insert it.
    Exists,
    /// There is no room: the stash is full.
    Full,
}

/// What a key must tell.
pub trait Key: Copy + Eq {
    /// Words of its addresses.
    const ADDRESSES: usize;
    /// Words from one slot of a line to the next.
    const STRIDE: usize;

    /// A word of the addresses.
    fn address(&self, word: usize) -> u64;
    /// Ports and protocol: the low bits of the control word.
    fn identity(&self) -> u64;
    /// The key with these words.
    fn from_words(addresses: &[u64; 4], identity: u64) -> Self;
    /// A hash: the sum of products of secret numbers and half words, which for any two keys is the same under hardly any seed, and
    /// then a mixture, because sums of keys that follow each other would follow each other.
    fn hash(&self, number: impl Fn(usize) -> u64) -> u32;
}

/// Memory in which a table lies.
pub trait Memory<K> {
    /// A line, or the value of an entry of the stash.
    type Line: Copy;

    /// How many lines there are: an even number.
    fn lines(&self) -> u32;
    /// One of the secret numbers for the home line.
    fn home_number(&self, index: usize) -> u64;
    /// One of those for the second line.
    fn second_number(&self, index: usize) -> u64;
    /// A line.
    fn line(&self, index: u32) -> Option<Self::Line>;
    /// Reads a word.
    fn load(&self, line: Self::Line, word: usize) -> u64;
    /// Writes a word.
    fn store(&self, line: Self::Line, word: usize, value: u64);
    /// Writes the low 56 bits of a word, and leaves the others, which somebody may change at the same time.
    fn store_56(&self, line: Self::Line, word: usize, value: u64);
    /// Puts `new` where `old` stands, and says whether it stood there. A fence.
    fn compare_exchange(&self, line: Self::Line, word: usize, old: u64, new: u64) -> bool;
    /// Adds to a word. A fence.
    fn add(&self, line: Self::Line, word: usize, addend: u64);

    /// The value of an entry of the stash: a slot as in a line. It may be another key's by the time it is read.
    fn stashed(&self, key: &K) -> Option<Self::Line>;
    /// Puts a slot into the stash, unless there is one of that key.
    fn stash(&self, key: &K, slot: &[u64; LINE]) -> Result<(), Refusal>;
    /// Takes an entry out of the stash.
    fn unstash(&self, key: &K);
    /// A version for an entry of the stash.
    fn nonce(&self) -> u32;
}

/// Where an entry is.
#[derive(Clone, Copy, Debug)]
pub struct Place<L> {
    /// Its line, or its value in the stash.
    pub line: L,
    /// Word of the control; leg and standing follow.
    pub control: usize,
    /// Number of the place, in the order that decides between two that are pending.
    id: u64,
}

/// An entry that was found: its place, and what the control word was.
#[derive(Clone, Copy, Debug)]
pub struct Found<L> {
    /// Where it is.
    pub place: Place<L>,
    /// The control word.
    control: u64,
    /// Whether it is counted as overflow of its home line.
    away: bool,
}

const STATE: u32 = 40;
const FREE: u64 = 0;
const CLAIMED: u64 = 1 << STATE;
const PENDING: u64 = 2 << STATE;
const LIVE: u64 = 3 << STATE;
const STATES: u64 = 3 << STATE;
const IDENTITY: u64 = (1 << STATE) - 1;
const VERSION: u64 = 1 << (STATE + 2);
const VERSIONS: u64 = !(VERSION - 1);
/// One entry that is elsewhere, in the standing word of a line's first slot.
const OVERFLOW: u64 = 1 << 56;
/// The place of an entry of the stash is the highest.
const STASH: u64 = u64::MAX;

/// The lines of a key.
struct Way<L> {
    home: L,
    /// Indices: home, its neighbour, and the two of the second hash.
    indices: [u32; 4],
}

#[inline(always)]
fn way<K: Key, M: Memory<K>>(memory: &M, key: &K) -> Option<Way<M::Line>> {
    let home = index(key.hash(|index| memory.home_number(index)), memory.lines());
    Some(Way { home: memory.line(home)?, indices: [home, home ^ 1, 0, 0] })
}

/// The second hash is for the few that need it.
#[inline(always)]
fn extend<K: Key, M: Memory<K>>(memory: &M, key: &K, way: &mut Way<M::Line>) {
    let second = index(key.hash(|index| memory.second_number(index)), memory.lines());
    way.indices[2] = second;
    way.indices[3] = second ^ 1;
}

#[inline(always)]
const fn index(hash: u32, lines: u32) -> u32 {
    ((hash as u64 * lines as u64) >> 32) as u32
}

/// Whether entries that should be in this line are elsewhere.
#[inline(always)]
fn overflows<K: Key, M: Memory<K>>(memory: &M, home: M::Line) -> bool {
    memory.load(home, K::ADDRESSES + 2) >= OVERFLOW
}

/// The slot of a line that holds a live entry of a key.
#[inline(always)]
fn search<K: Key, M: Memory<K>>(memory: &M, line: M::Line, key: &K, away: bool) -> Option<Found<M::Line>> {
    let mut first = 0;
    while first < LINE {
        let place = Place { line, control: first + K::ADDRESSES, id: 0 };
        let control = memory.load(line, place.control);
        if control & (IDENTITY | STATES) == key.identity() | LIVE && holds(memory, place, control, key) {
            return Some(Found { place, control, away });
        }
        first += K::STRIDE;
    }
    None
}

/// Whether the addresses of a slot are the key's, as long as its control word is this one.
#[inline(always)]
fn holds<K: Key, M: Memory<K>>(memory: &M, place: Place<M::Line>, control: u64, key: &K) -> bool {
    let mut differ = 0;
    let mut word = 0;
    while word < K::ADDRESSES {
        differ |= memory.load(place.line, place.control - K::ADDRESSES + word) ^ key.address(word);
        word += 1;
    }
    differ == 0 && memory.load(place.line, place.control) == control
}

/// The entry of a key. It may be deleted, and become another one, while the place is held: [`is_still`] tells.
#[inline(always)]
pub fn find<K: Key, M: Memory<K>>(memory: &M, key: &K) -> Option<Found<M::Line>> {
    let way = way(memory, key)?;
    let found = search(memory, way.home, key, false);
    if found.is_some() || !overflows::<K, M>(memory, way.home) {
        return found;
    }
    find_elsewhere(memory, key, way)
}

#[inline(always)]
fn find_elsewhere<K: Key, M: Memory<K>>(memory: &M, key: &K, mut way: Way<M::Line>) -> Option<Found<M::Line>> {
    extend(memory, key, &mut way);
    let mut step = 1;
    while step < way.indices.len() {
        // Both hashes may lead to the same pair; what is in the home line is no overflow of it.
        let away = way.indices[step] != way.indices[0];
        let found = search(memory, memory.line(way.indices[step])?, key, away);
        if found.is_some() {
            return found;
        }
        step += 1;
    }
    let place = Place { line: memory.stashed(key)?, control: K::ADDRESSES, id: STASH };
    let control = memory.load(place.line, place.control);
    let is_live = control & (IDENTITY | STATES) == key.identity() | LIVE && holds(memory, place, control, key);
    is_live.then_some(Found { place, control, away: true })
}

/// Whether what was read at a place since it was found is of one entry, the one that was found.
#[inline(always)]
pub fn is_still<K: Key, M: Memory<K>>(memory: &M, found: &Found<M::Line>) -> bool {
    memory.load(found.place.line, found.place.control) == found.control
}

/// The connection at a place, if it is still the one that was found.
#[inline(always)]
pub fn read<K: Key, M: Memory<K>>(memory: &M, found: &Found<M::Line>) -> Option<Connection> {
    let Place { line, control, .. } = found.place;
    let (leg, standing) = (memory.load(line, control + 1), memory.load(line, control + 2));
    is_still(memory, found).then_some(Connection {
        server: leg as u32,
        local: Local((leg >> 32) as u32),
        last_seen: standing as u32,
        state: (standing >> 32) as u8,
        flags: (standing >> 40) as u8,
        half_open: (standing >> 48) as u8,
        prefix: (standing >> 56) as u8,
    })
}

/// Leg and standing, as they stand in a slot.
#[inline(always)]
const fn words(connection: &Connection) -> [u64; 2] {
    let bytes = u32::from_le_bytes([connection.state, connection.flags, connection.half_open, connection.prefix]);
    let standing = connection.last_seen as u64 | (bytes as u64) << 32;
    [connection.leg().0, standing]
}

/// Inserts a connection, unless there is one of that key.
#[inline(always)]
pub fn insert<K: Key, M: Memory<K>>(memory: &M, key: &K, connection: &Connection) -> Result<(), Refusal> {
    let mut way = way(memory, key).ok_or(Refusal::Full)?;
    if let Some(claimed) = claim::<K, M>(memory, way.home, way.indices[0]) {
        write(memory, claimed.place, key, connection);
        let pending = claimed.control & VERSIONS | PENDING | key.identity();
        return decide(memory, claimed, pending, key, &mut way);
    }
    extend(memory, key, &mut way);
    memory.add(way.home, K::ADDRESSES + 2, OVERFLOW);
    let outcome = insert_elsewhere(memory, key, connection, &mut way);
    if outcome.is_err() {
        memory.add(way.home, K::ADDRESSES + 2, OVERFLOW.wrapping_neg());
    }
    outcome
}

#[inline(always)]
fn insert_elsewhere<K: Key, M: Memory<K>>(
    memory: &M,
    key: &K,
    connection: &Connection,
    way: &mut Way<M::Line>,
) -> Result<(), Refusal> {
    let mut step = 1;
    while step < way.indices.len() {
        let index = way.indices[step];
        if index != way.indices[0]
            && let Some(claimed) = claim::<K, M>(memory, memory.line(index).ok_or(Refusal::Full)?, index)
        {
            write(memory, claimed.place, key, connection);
            let pending = claimed.control & VERSIONS | PENDING | key.identity();
            return decide(memory, claimed, pending, key, way);
        }
        step += 1;
    }
    let pending = u64::from(memory.nonce()) << (STATE + 2) | PENDING | key.identity();
    let mut slot = [0; LINE];
    let mut word = 0;
    while word < K::ADDRESSES {
        slot[word] = key.address(word);
        word += 1;
    }
    slot[K::ADDRESSES] = pending;
    [slot[K::ADDRESSES + 1], slot[K::ADDRESSES + 2]] = words(connection);
    memory.stash(key, &slot)?;
    let place = Place { line: memory.stashed(key).ok_or(Refusal::Full)?, control: K::ADDRESSES, id: STASH };
    // The entry is pending from its first moment; this is for the fence.
    let outcome = decide(memory, Found { place, control: pending, away: true }, pending, key, way);
    if outcome.is_err() {
        memory.unstash(key);
    }
    outcome
}

/// Claims a free slot of a line, if there is one.
#[inline(always)]
fn claim<K: Key, M: Memory<K>>(memory: &M, line: M::Line, index: u32) -> Option<Found<M::Line>> {
    let mut first = 0;
    while first < LINE {
        let place = Place { line, control: first + K::ADDRESSES, id: u64::from(index) * LINE as u64 + first as u64 };
        let old = memory.load(line, place.control);
        let control = (old & VERSIONS).wrapping_add(VERSION) | CLAIMED;
        if old & STATES == FREE && memory.compare_exchange(line, place.control, old, control) {
            return Some(Found { place, control, away: false });
        }
        first += K::STRIDE;
    }
    None
}

/// Writes a claimed slot.
#[inline(always)]
fn write<K: Key, M: Memory<K>>(memory: &M, place: Place<M::Line>, key: &K, connection: &Connection) {
    let mut word = 0;
    while word < K::ADDRESSES {
        memory.store(place.line, place.control - K::ADDRESSES + word, key.address(word));
        word += 1;
    }
    let [leg, standing] = words(connection);
    memory.store(place.line, place.control + 1, leg);
    memory.store_56(place.line, place.control + 2, standing);
}

/// Makes a written slot pending, and live if no other of the same key stands against it.
#[inline(always)]
fn decide<K: Key, M: Memory<K>>(
    memory: &M,
    claimed: Found<M::Line>,
    pending: u64,
    key: &K,
    way: &mut Way<M::Line>,
) -> Result<(), Refusal> {
    let Place { line, control, id } = claimed.place;
    if !memory.compare_exchange(line, control, claimed.control, pending) {
        return Err(Refusal::Exists);
    }
    if wins(memory, key, way, id) && memory.compare_exchange(line, control, pending, pending | LIVE) {
        return Ok(());
    }
    // Taken away already, or given up now.
    memory.compare_exchange(line, control, pending, pending & !STATES);
    Err(Refusal::Exists)
}

/// Whether the pending entry at a place prevails over all others of its key.
#[inline(always)]
fn wins<K: Key, M: Memory<K>>(memory: &M, key: &K, way: &mut Way<M::Line>, id: u64) -> bool {
    if !wins_in(memory, way.home, way.indices[0], key, id) {
        return false;
    }
    if !overflows::<K, M>(memory, way.home) {
        return true;
    }
    extend(memory, key, way);
    let mut step = 1;
    while step < way.indices.len() {
        let Some(line) = memory.line(way.indices[step]) else { return false };
        if !wins_in(memory, line, way.indices[step], key, id) {
            return false;
        }
        step += 1;
    }
    if id == STASH {
        return true;
    }
    let Some(line) = memory.stashed(key) else { return true };
    let place = Place { line, control: K::ADDRESSES, id: STASH };
    let control = memory.load(line, place.control);
    !is_claimant(memory, place, control, key) || prevails::<K, M>(memory, place, control, id)
}

/// The same, over those in one line.
#[inline(always)]
fn wins_in<K: Key, M: Memory<K>>(memory: &M, line: M::Line, index: u32, key: &K, id: u64) -> bool {
    let mut first = 0;
    while first < LINE {
        let other = u64::from(index) * LINE as u64 + first as u64;
        let place = Place { line, control: first + K::ADDRESSES, id: other };
        let control = memory.load(line, place.control);
        if other != id && is_claimant(memory, place, control, key) && !prevails::<K, M>(memory, place, control, id) {
            return false;
        }
        first += K::STRIDE;
    }
    true
}

/// Whether a slot with this control word holds a live or pending entry of a key.
#[inline(always)]
fn is_claimant<K: Key, M: Memory<K>>(memory: &M, place: Place<M::Line>, control: u64, key: &K) -> bool {
    control & IDENTITY == key.identity() && control & PENDING != 0 && holds(memory, place, control, key)
}

/// Whether a pending entry at `id` prevails over one of the same key elsewhere, whose control word was this one.
#[inline(always)]
fn prevails<K: Key, M: Memory<K>>(memory: &M, other: Place<M::Line>, control: u64, id: u64) -> bool {
    match control & STATES {
        LIVE => false,
        PENDING if other.id < id => false,
        // Taken away; or it is live by now, or gone.
        PENDING => {
            memory.compare_exchange(other.line, other.control, control, control & !STATES)
                || memory.load(other.line, other.control) != control | LIVE
        }
        _ => true,
    }
}

/// Deletes an entry. Of several that do it at once, one is told `true`.
#[inline(always)]
pub fn remove<K: Key, M: Memory<K>>(memory: &M, key: &K) -> bool {
    find(memory, key).is_some_and(|found| remove_found(memory, key, &found))
}

/// Deletes the entry that was found, if it is still there.
#[inline(always)]
pub fn remove_found<K: Key, M: Memory<K>>(memory: &M, key: &K, found: &Found<M::Line>) -> bool {
    let Place { line, control, id } = found.place;
    if !memory.compare_exchange(line, control, found.control, found.control & !STATES) {
        return false;
    }
    if found.away {
        if id == STASH {
            memory.unstash(key);
        }
        if let Some(way) = way(memory, key) {
            memory.add(way.home, K::ADDRESSES + 2, OVERFLOW.wrapping_neg());
        }
    }
    true
}

/// Calls a function with each live entry of a line, which is that one's only for as long as [`is_still`] or [`read`] says so.
#[inline(always)]
pub fn visit<K: Key, M: Memory<K>>(memory: &M, index: u32, mut visit: impl FnMut(&K, &Found<M::Line>)) {
    let Some(line) = memory.line(index) else { return };
    let mut first = 0;
    while first < LINE {
        let place = Place { line, control: first + K::ADDRESSES, id: 0 };
        let control = memory.load(line, place.control);
        if control & STATES == LIVE {
            let mut addresses = [0; 4];
            let mut word = 0;
            while word < K::ADDRESSES {
                addresses[word] = memory.load(line, first + word);
                word += 1;
            }
            let key = K::from_words(&addresses, control & IDENTITY);
            let mut found = Found { place, control, away: false };
            if is_still(memory, &found) {
                found.away = self::index(key.hash(|index| memory.home_number(index)), memory.lines()) != index;
                visit(&key, &found);
            }
        }
        first += K::STRIDE;
    }
}

impl Key for ConnectionKey<Ipv4> {
    const ADDRESSES: usize = 1;
    const STRIDE: usize = 4;

    #[inline(always)]
    fn address(&self, _: usize) -> u64 {
        self.client as u64 | (self.vip as u64) << 32
    }

    #[inline(always)]
    fn identity(&self) -> u64 {
        identity(self)
    }

    #[inline(always)]
    fn from_words(addresses: &[u64; 4], identity: u64) -> Self {
        let [addresses, ..] = *addresses;
        Self { client: addresses as u32, vip: (addresses >> 32) as u32, ports: ports(identity), protocol: (identity >> 32) as u32 }
    }

    #[inline(always)]
    fn hash(&self, number: impl Fn(usize) -> u64) -> u32 {
        let products = number(1).wrapping_mul(self.client as u64).wrapping_add(number(2).wrapping_mul(self.vip as u64));
        mix(hash_identity(self, &number).wrapping_add(products))
    }
}

impl Key for ConnectionKey<Ipv6> {
    const ADDRESSES: usize = 4;
    const STRIDE: usize = LINE;

    #[inline(always)]
    fn address(&self, word: usize) -> u64 {
        let address = if word < 2 { &self.client } else { &self.vip };
        let half = 2 * (word % 2);
        address[half] as u64 | (address[half + 1] as u64) << 32
    }

    #[inline(always)]
    fn identity(&self) -> u64 {
        identity(self)
    }

    #[inline(always)]
    fn from_words(addresses: &[u64; 4], identity: u64) -> Self {
        let address = |low: u64, high: u64| [low as u32, (low >> 32) as u32, high as u32, (high >> 32) as u32];
        let [a, b, c, d] = *addresses;
        Self { client: address(a, b), vip: address(c, d), ports: ports(identity), protocol: (identity >> 32) as u32 }
    }

    #[inline(always)]
    fn hash(&self, number: impl Fn(usize) -> u64) -> u32 {
        let mut sum = hash_identity(self, &number);
        sum = sum.wrapping_add(number(1).wrapping_mul(self.client[0] as u64));
        sum = sum.wrapping_add(number(2).wrapping_mul(self.vip[0] as u64));
        let mut word = 1;
        while word < 4 {
            sum = sum.wrapping_add(number(3 + 2 * word).wrapping_mul(self.client[word] as u64));
            sum = sum.wrapping_add(number(4 + 2 * word).wrapping_mul(self.vip[word] as u64));
            word += 1;
        }
        mix(sum)
    }
}

#[inline(always)]
const fn identity<A>(key: &ConnectionKey<A>) -> u64 {
    let ports = key.ports.source() as u64 | (key.ports.destination() as u64) << 16;
    ports | (key.protocol as u64 & 0xff) << 32
}

#[inline(always)]
const fn ports(identity: u64) -> Ports {
    Ports::new(identity as u16, (identity >> 16) as u16)
}

#[inline(always)]
const fn mix(sum: u64) -> u32 {
    let sum = (sum ^ sum >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    ((sum ^ sum >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93) >> 32) as u32
}

#[inline(always)]
fn hash_identity<A>(key: &ConnectionKey<A>, number: &impl Fn(usize) -> u64) -> u64 {
    let identity = identity(key);
    let sum = number(0).wrapping_add(number(3).wrapping_mul(identity & 0xffff_ffff));
    sum.wrapping_add(number(4).wrapping_mul(identity >> 32))
}

#[cfg(test)]
mod tests;
