//! A prototype of another connection table ([`lb_common::lines`]), beside the kernel's hash map: what the bench of tables runs, and
//! what quarrels over few keys on several CPUs at once.
//!
//! All programs are run by `BPF_PROG_TEST_RUN` and do one thing with many flows, each of which has to wait for the one before, as
//! packets of one queue do. Nothing of it is attached anywhere.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![allow(clippy::needless_pass_by_value, reason = "the macros of aya-ebpf hand contexts over by value")]
#![allow(missing_docs, reason = "the macros of aya-ebpf add functions of their own to each program")]

use core::marker::PhantomData;

use aya_ebpf::{
    Global,
    cty::c_void,
    helpers::generated::{bpf_for_each_map_elem, bpf_get_prandom_u32, bpf_loop},
    macros::{map, raw_tracepoint},
    maps::{Array, HashMap},
    programs::RawTracePointContext,
};
use lb_common::{
    connection::{Connection, ConnectionKey, Leg},
    family::{Ipv4, Ipv6},
    lines::{self, Key, LINE, Memory, Refusal, Seed},
    quarrel::{Numbered, Run, connection, is_whole},
};
use lb_ebpf::atomic;

/// The array's memory can be mapped by userspace.
const MMAPABLE: u32 = 1 << 10;
/// An element's memory is taken when it is inserted.
const NO_PREALLOC: u32 = 1;
/// Insert, unless it is there.
const NOEXIST: u64 = 1;

/// The lines of each family. The bench chooses their number.
#[map]
static LINES_V4: Array<[u64; LINE]> = Array::with_max_entries(2, MMAPABLE);
#[map]
static LINES_V6: Array<[u64; LINE]> = Array::with_max_entries(2, MMAPABLE);
/// What finds no room in the lines.
#[map]
static STASH_V4: HashMap<ConnectionKey<Ipv4>, [u64; LINE]> = HashMap::with_max_entries(1 << 16, NO_PREALLOC);
#[map]
static STASH_V6: HashMap<ConnectionKey<Ipv6>, [u64; LINE]> = HashMap::with_max_entries(1 << 16, NO_PREALLOC);
/// The kernel's own, as the director has it.
#[map]
static HASH_V4: HashMap<ConnectionKey<Ipv4>, Connection> = HashMap::with_max_entries(1, 0);
#[map]
static HASH_V6: HashMap<ConnectionKey<Ipv6>, Connection> = HashMap::with_max_entries(1, 0);
/// How many lines there are in each family.
#[unsafe(no_mangle)]
static LINES: Global<[u32; 2]> = Global::new([2; 2]);
/// Where they begin to differ from everybody else's.
#[unsafe(no_mangle)]
static SEED: Global<Seed> = Global::new(Seed { home: [0; 11], second: [0; 11] });

/// What to do, for each thread of userspace.
#[map]
static RUNS: Array<Run> = Array::with_max_entries(16, MMAPABLE);
/// How often each of the few keys of a quarrel was inserted, less how often it was deleted.
#[map]
static COUNTS: Array<u64> = Array::with_max_entries(1 << 10, MMAPABLE);

/// A table, as the datapath asks for it.
trait Table {
    type Key: Numbered;

    /// Where the packets of a connection go.
    fn find(key: &Self::Key) -> Option<Leg>;
    /// The whole of it.
    fn read(key: &Self::Key) -> Option<Connection>;
    fn insert(key: &Self::Key, connection: &Connection) -> bool;
    fn remove(key: &Self::Key) -> bool;
}

/// The kernel's hash map.
struct Hash<A>(PhantomData<A>);
/// The lines.
struct Lines<A>(PhantomData<A>);

/// What a family has.
trait Family {
    type Key: Numbered + Key + 'static;
    const INDEX: usize;

    fn hash() -> &'static HashMap<Self::Key, Connection>;
    fn lines() -> &'static Array<[u64; LINE]>;
    fn stash() -> &'static HashMap<Self::Key, [u64; LINE]>;
}

macro_rules! family {
    ($address:ty, $index:expr, $hash:ident, $lines:ident, $stash:ident) => {
        impl Family for $address {
            type Key = ConnectionKey<$address>;
            const INDEX: usize = $index;

            #[inline(always)]
            fn hash() -> &'static HashMap<Self::Key, Connection> {
                &$hash
            }

            #[inline(always)]
            fn lines() -> &'static Array<[u64; LINE]> {
                &$lines
            }

            #[inline(always)]
            fn stash() -> &'static HashMap<Self::Key, [u64; LINE]> {
                &$stash
            }
        }
    };
}
family!(Ipv4, 0, HASH_V4, LINES_V4, STASH_V4);
family!(Ipv6, 1, HASH_V6, LINES_V6, STASH_V6);

impl<A: Family> Table for Hash<A> {
    type Key = A::Key;

    #[inline(always)]
    fn find(key: &A::Key) -> Option<Leg> {
        // SAFETY: an element of the map, which begins with its leg.
        A::hash().get_ptr(key).map(|known| unsafe { Leg(known.cast::<u64>().read()) })
    }

    #[inline(always)]
    fn read(key: &A::Key) -> Option<Connection> {
        // SAFETY: an element of the map.
        A::hash().get_ptr(key).map(|known| unsafe { *known })
    }

    #[inline(always)]
    fn insert(key: &A::Key, connection: &Connection) -> bool {
        A::hash().insert(key, connection, NOEXIST).is_ok()
    }

    #[inline(always)]
    fn remove(key: &A::Key) -> bool {
        A::hash().remove(key).is_ok()
    }
}

impl<A: Family> Table for Lines<A> {
    type Key = A::Key;

    #[inline(always)]
    fn find(key: &A::Key) -> Option<Leg> {
        let memory = Self(PhantomData);
        lines::find(&memory, key).map(|found| Leg(memory.load(found.place.line, found.place.control + 1)))
    }

    #[inline(always)]
    fn read(key: &A::Key) -> Option<Connection> {
        let memory = Self(PhantomData);
        lines::find(&memory, key).and_then(|found| lines::read(&memory, &found))
    }

    #[inline(always)]
    fn insert(key: &A::Key, connection: &Connection) -> bool {
        lines::insert(&Self(PhantomData), key, connection).is_ok()
    }

    #[inline(always)]
    fn remove(key: &A::Key) -> bool {
        lines::remove(&Self(PhantomData), key)
    }
}

impl<A: Family> Memory<A::Key> for Lines<A> {
    type Line = *mut u64;

    #[inline(always)]
    fn lines(&self) -> u32 {
        // SAFETY: the frozen words that userspace wrote before it loaded the programs.
        unsafe { (&raw const LINES).cast::<u32>().add(A::INDEX).read_volatile() }
    }

    #[inline(always)]
    fn home_number(&self, index: usize) -> u64 {
        // SAFETY: as above; there are eleven.
        unsafe { (&raw const SEED).cast::<u64>().add(index).read_volatile() }
    }

    #[inline(always)]
    fn second_number(&self, index: usize) -> u64 {
        // SAFETY: as above; behind the eleven for the home line.
        unsafe { (&raw const SEED).cast::<u64>().add(11 + index).read_volatile() }
    }

    #[inline(always)]
    fn line(&self, index: u32) -> Option<*mut u64> {
        A::lines().get_ptr_mut(index).map(<*mut [u64; LINE]>::cast)
    }

    #[inline(always)]
    fn load(&self, line: *mut u64, word: usize) -> u64 {
        // SAFETY: a word of a line.
        unsafe { line.add(word).read_volatile() }
    }

    #[inline(always)]
    fn store(&self, line: *mut u64, word: usize, value: u64) {
        // SAFETY: a word of a line.
        unsafe { line.add(word).write_volatile(value) }
    }

    #[inline(always)]
    fn store_56(&self, line: *mut u64, word: usize, value: u64) {
        // SAFETY: a word of a line.
        unsafe {
            line.add(word).cast::<u32>().write_volatile(value as u32);
            line.add(word).cast::<u16>().add(2).write_volatile((value >> 32) as u16);
            line.add(word).cast::<u8>().add(6).write_volatile((value >> 48) as u8);
        }
    }

    #[inline(always)]
    fn compare_exchange(&self, line: *mut u64, word: usize, old: u64, new: u64) -> bool {
        // SAFETY: a word of a line.
        unsafe { atomic::compare_exchange(line.add(word), old, new) == old }
    }

    #[inline(always)]
    fn add(&self, line: *mut u64, word: usize, addend: u64) {
        // SAFETY: a word of a line.
        unsafe { atomic::add(line.add(word), addend) }
    }

    #[inline(always)]
    fn stashed(&self, key: &A::Key) -> Option<*mut u64> {
        A::stash().get_ptr_mut(key).map(<*mut [u64; LINE]>::cast)
    }

    #[inline(always)]
    fn stash(&self, key: &A::Key, slot: &[u64; LINE]) -> Result<(), Refusal> {
        match A::stash().insert(key, slot, NOEXIST) {
            Ok(()) => Ok(()),
            Err(-17) => Err(Refusal::Exists),
            Err(_) => Err(Refusal::Full),
        }
    }

    #[inline(always)]
    fn unstash(&self, key: &A::Key) {
        let _ = A::stash().remove(key);
    }

    #[inline(always)]
    fn nonce(&self) -> u32 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_get_prandom_u32() }
    }
}

/// Calls a function for so many flows.
#[inline(always)]
fn repeat(context: &RawTracePointContext, act: unsafe extern "C" fn(u32, *mut Run) -> i64) -> i32 {
    let (times, thread): (u64, u64) = (context.arg(0), context.arg(1));
    let Some(run) = RUNS.get_ptr_mut(thread as u32) else { return 0 };
    // SAFETY: this thread's element; the callback takes the context that is handed over here.
    unsafe {
        let mut local = *run;
        bpf_loop(times as u32, act as *mut c_void, (&raw mut local).cast(), 0);
        *run = local;
    }
    0
}

/// What the harness itself costs.
unsafe extern "C" fn nothing(_: u32, run: *mut Run) -> i64 {
    // SAFETY: the kernel hands over what `bpf_loop` was given; so below.
    unsafe {
        (*run).torn ^= u64::from((*run).number());
        (*run).flow += 1;
        (*run).done += 1;
    }
    0
}

unsafe extern "C" fn find<T: Table>(_: u32, run: *mut Run) -> i64 {
    // SAFETY: as above.
    unsafe {
        let known = T::find(&T::Key::of((*run).number()));
        // Of all connections of the bench the server is 0; neither the compiler nor the processor know.
        let server = known.map_or(0, Leg::server);
        (*run).flow += 1 + u64::from(server);
        (*run).done += u64::from(known.is_some());
    }
    0
}

unsafe extern "C" fn insert<T: Table>(_: u32, run: *mut Run) -> i64 {
    // SAFETY: as above.
    unsafe {
        let inserted = T::insert(&T::Key::of((*run).number()), &Connection::default());
        (*run).flow += 1;
        (*run).done += u64::from(inserted);
    }
    0
}

unsafe extern "C" fn remove<T: Table>(_: u32, run: *mut Run) -> i64 {
    // SAFETY: as above.
    unsafe {
        let removed = T::remove(&T::Key::of((*run).number()));
        (*run).flow += 1;
        (*run).done += u64::from(removed);
    }
    0
}

/// One step of a quarrel: something is done with a key that others do something with, too.
unsafe extern "C" fn quarrel<T: Table>(_: u32, run: *mut Run) -> i64 {
    // SAFETY: as above.
    unsafe {
        let chance = bpf_get_prandom_u32();
        let number = (chance >> 8) & ((*run).flows as u32 - 1);
        let Some(count) = COUNTS.get_ptr_mut(number) else { return 1 };
        let key = T::Key::of(number);
        match chance & 3 {
            0 | 1 => {
                if T::insert(&key, &connection(number, chance >> 16)) {
                    atomic::add(count, 1);
                    (*run).done += 1;
                }
            }
            2 => {
                if T::remove(&key) {
                    atomic::add(count, 1_u64.wrapping_neg());
                }
            }
            _ => {
                if T::read(&key).is_some_and(|known| !is_whole(number, &known)) {
                    (*run).torn += 1;
                }
            }
        }
    }
    0
}

/// Walks over the kernel's hash map, and looks at every entry as the sweep does.
unsafe extern "C" fn visit_hash<K>(_: *mut c_void, _: *const K, connection: *const Connection, run: *mut Run) -> i64 {
    // SAFETY: the kernel hands over an element of the map, and the context that it was given.
    unsafe {
        (*run).done += 1;
        (*run).torn += u64::from((*connection).last_seen);
    }
    0
}

/// Looks at one line as the sweep does.
unsafe extern "C" fn visit_line<A: Family>(index: u32, run: *mut Run) -> i64 {
    let memory = Lines::<A>(PhantomData);
    lines::visit(&memory, index, |_: &A::Key, found| {
        if let Some(known) = lines::read(&memory, found) {
            // SAFETY: as above.
            unsafe {
                (*run).done += 1;
                (*run).torn += u64::from(known.last_seen);
            }
        }
    });
    0
}

macro_rules! programs {
    ($($name:ident: $act:expr;)*) => {$(
        #[raw_tracepoint]
        pub fn $name(context: RawTracePointContext) -> i32 {
            repeat(&context, $act)
        }
    )*};
}
programs! {
    nothing_v4: nothing;
    nothing_v6: nothing;
    hash_find_v4: find::<Hash<Ipv4>>;
    hash_find_v6: find::<Hash<Ipv6>>;
    hash_insert_v4: insert::<Hash<Ipv4>>;
    hash_insert_v6: insert::<Hash<Ipv6>>;
    hash_remove_v4: remove::<Hash<Ipv4>>;
    hash_remove_v6: remove::<Hash<Ipv6>>;
    lines_find_v4: find::<Lines<Ipv4>>;
    lines_find_v6: find::<Lines<Ipv6>>;
    lines_insert_v4: insert::<Lines<Ipv4>>;
    lines_insert_v6: insert::<Lines<Ipv6>>;
    lines_remove_v4: remove::<Lines<Ipv4>>;
    lines_remove_v6: remove::<Lines<Ipv6>>;
    lines_walk_v4: visit_line::<Ipv4>;
    lines_walk_v6: visit_line::<Ipv6>;
    quarrel_v4: quarrel::<Lines<Ipv4>>;
    quarrel_v6: quarrel::<Lines<Ipv6>>;
}

#[raw_tracepoint]
pub fn hash_walk_v4(context: RawTracePointContext) -> i32 {
    walk_hash::<Ipv4>(&context)
}

#[raw_tracepoint]
pub fn hash_walk_v6(context: RawTracePointContext) -> i32 {
    walk_hash::<Ipv6>(&context)
}

#[inline(always)]
fn walk_hash<A: Family>(context: &RawTracePointContext) -> i32 {
    let thread: u64 = context.arg(1);
    let Some(run) = RUNS.get_ptr_mut(thread as u32) else { return 0 };
    let map = core::ptr::from_ref(A::hash()).cast_mut().cast::<c_void>();
    // SAFETY: this thread's element, which is the context of a callback that takes what the kernel hands over for this map.
    unsafe {
        let mut local = *run;
        bpf_for_each_map_elem(map, visit_hash::<A::Key> as *mut c_void, (&raw mut local).cast(), 0);
        *run = local;
    }
    0
}

lb_ebpf::object!();
