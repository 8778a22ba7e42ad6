//! Which real server takes a new connection? The kernel knows no algorithm: userspace has compiled the answer into a run
//! of picks, and the service says how to index it ([`Mode`]).
//!
//! lblc and lblcr ask first whom the destination went to before: [`locality`].

use aya_ebpf::{cty::c_void, helpers::generated::bpf_loop};
use lb_common::{
    pick,
    schedule::{self, Hand, INELIGIBLE, NOBODY, Pointer},
    service::{Mode, Service, flags},
};

use crate::{
    atomic, locality,
    maps::{CURSORS, Family, HAND_COUNT, HANDS, PICKS_AT_ONCE, RUNS, SCHEDULES},
};

/// Picks a real server's index for a client, or nobody.
#[inline(always)]
pub fn pick<F: Family>(service: *const Service, client: &F::Address, client_port: u16, vip: &F::Address) -> Option<u32> {
    // SAFETY: an element of the service map.
    let service = unsafe { *service };
    let run = pointer(service.id)?;
    if service.mode >= Mode::Locality as u8 {
        return locality::pick::<F>(service.id, service.mode == Mode::Replicas as u8, &run, vip);
    }
    let value = pick::client_value(client, client_port, service.flags);
    let picked = if service.mode == Mode::SourceHash as u8 {
        at(run.offset, pick::source_bucket(value))?
    } else if service.mode == Mode::DestinationHash as u8 {
        at(run.offset, pick::destination_bucket(vip))?
    } else if service.mode == Mode::Maglev as u8 {
        maglev(&run, value, service.flags & flags::FALLBACK != 0)?
    } else {
        next_pick(service.id, &run)?
    };
    (picked != NOBODY && picked & INELIGIBLE == 0).then_some(picked)
}

/// The service's run. One read of eight bytes: userspace publishes it by one store.
#[inline(always)]
pub fn pointer(service: u32) -> Option<Pointer> {
    pointer_at(SCHEDULES.get_ptr(service)?)
}

/// A run, by the word that says where it stands: an element of an array.
#[inline(always)]
pub fn pointer_at(word: *const u64) -> Option<Pointer> {
    // SAFETY: an element of the array.
    let word = unsafe { word.read_volatile() };
    let pointer = Pointer { offset: word as u32, picks: (word >> 32) as u32 };
    (pointer.picks != 0).then_some(pointer)
}

/// The next pick of a run in cursor mode.
#[inline(always)]
pub fn next_pick(service: u32, run: &Pointer) -> Option<u32> {
    at(run.offset, next(service, run)?)
}

/// A pick of a run.
#[inline(always)]
pub fn at(run: u32, position: u32) -> Option<u32> {
    let pair = RUNS.get_ptr(run + schedule::HEADER + position / 2)?;
    // SAFETY: an element of the array.
    let [even, odd] = unsafe { pair.read() };
    Some(if position & 1 == 0 { even } else { odd })
}

/// Advances the cursor, and finds its position in the run.
#[inline(always)]
fn next(service: u32, run: &Pointer) -> Option<u32> {
    let at_once = PICKS_AT_ONCE.load();
    let cursor = if at_once > 1 {
        deal(service, run.offset, at_once)
    } else {
        let cursor = CURSORS.get_ptr_mut(service)?;
        // SAFETY: an element of the array.
        unsafe { atomic::fetch_add(cursor, 1) as u32 }
    };
    let header = RUNS.get_ptr(run.offset)?;
    // SAFETY: as above.
    let [base, head] = unsafe { header.read() };
    let period = run.picks.saturating_sub(head);
    schedule::position(cursor, base, head, period)
}

/// The cursor of the next pick that this CPU has in hand. If it has none, it takes so many.
///
/// Not part of its caller, whose place on the stack is small.
#[inline(never)]
fn deal(service: u32, run: u32, picks: u32) -> u32 {
    let (Some(hand), Some(header), Some(cursor)) =
        (HANDS.get_ptr_mut(service & (HAND_COUNT - 1)), RUNS.get_ptr(run), CURSORS.get_ptr_mut(service))
    else {
        return 0;
    };
    // SAFETY: elements of the arrays; the first is this CPU's own.
    unsafe {
        let [base, _] = header.read();
        let held = if (*hand).holds(service, base) {
            *hand
        } else {
            Hand::taken(service, atomic::fetch_add(cursor, picks.into()) as u32, picks)
        };
        let (next, left) = held.deal();
        hand.write(left);
        next
    }
}

/// Looks a client up in a Maglev table. With fallback, an ineligible server sends it on along a walk that depends on
/// the client alone.
#[inline(always)]
fn maglev(run: &Pointer, value: u32, fallback: bool) -> Option<u32> {
    let first = pick::maglev_first(value);
    let picked = at(run.offset, first)?;
    if picked & INELIGIBLE == 0 || picked == NOBODY || !fallback {
        return Some(picked);
    }
    let mut walk = Walk { run: run.offset, value, first, picked: NOBODY };
    // SAFETY: the callback takes the context that is handed over here.
    unsafe { bpf_loop(pick::MAGLEV_ATTEMPTS, step as *mut c_void, (&raw mut walk).cast(), 0) };
    Some(walk.picked)
}

/// A walk through a Maglev table.
#[repr(C)]
struct Walk {
    run: u32,
    value: u32,
    first: u32,
    picked: u32,
}

/// One step of the walk; 1 ends it.
unsafe extern "C" fn step(k: u32, walk: *mut Walk) -> i64 {
    // SAFETY: the kernel hands over what `bpf_loop` was given.
    unsafe {
        let slot = pick::maglev_next((*walk).value, (*walk).first, k);
        let Some(picked) = at((*walk).run, slot) else { return 1 };
        if picked == NOBODY {
            return 1;
        }
        if picked & INELIGIBLE == 0 {
            (*walk).picked = picked;
            return 1;
        }
    }
    0
}
