//! Whom did the destination go to before? Picks for the services of lblc and lblcr.
//!
//! A destination that is remembered costs one look-up and a few array reads more than a pick of the cursor mode, whatever the
//! number of servers. One that is new, or whose servers are busy, takes the schedule's next pick and remembers it. Who is busy
//! is judged by [`lb_common::locality`], the same code that is tested on the host.

use aya_ebpf::{
    cty::c_void,
    helpers::generated::{bpf_jiffies64, bpf_loop},
};
use lb_common::{
    locality::{Destination, DestinationKey, MEMBERS, Rules, Servers, Standing, Survey},
    schedule::{INELIGIBLE, NOBODY, Pointer},
    server::Counters,
};

use crate::{
    maps::{CONFIG, COUNTERS, Family, HZ, RUNS, STANDINGS},
    pick,
};

/// The arrays of this datapath.
struct Arrays;

impl Servers for Arrays {
    #[inline(always)]
    fn standing(&self, index: u32) -> Standing {
        // SAFETY: an element of the array.
        STANDINGS.get_ptr(index).map_or_else(Standing::default, |word| Standing::from_word(unsafe { word.read_volatile() }))
    }

    #[inline(always)]
    fn counters(&self, index: u32) -> Counters {
        // SAFETY: an element of the array.
        COUNTERS.get_ptr(index).map_or_else(Counters::default, |word| Counters::from_word(unsafe { word.read_volatile() }))
    }

    #[inline(always)]
    fn survey(&self, service: u32, destination: &Destination) -> Survey {
        let mut walk = Walk { survey: Survey::nothing(unknown_zero(service)), destination, service };
        // SAFETY: the callback takes the context that is handed over here.
        unsafe { bpf_loop(MEMBERS as u32, step as *mut c_void, (&raw mut walk).cast(), 0) };
        walk.survey
    }
}

/// A zero that neither the compiler nor the verifier sees through.
#[inline(always)]
fn unknown_zero(mut unknown: u32) -> u32 {
    #[cfg(target_arch = "bpf")]
    // SAFETY: a register is subtracted from itself, by way of a copy.
    unsafe {
        let copy = unknown;
        core::arch::asm!("{unknown} ^= {copy}", unknown = inout(wreg) unknown, copy = in(wreg) copy, options(pure, nomem, nostack, preserves_flags));
    };
    unknown
}

/// A walk through the members of a set.
#[repr(C)]
struct Walk {
    survey: Survey,
    destination: *const Destination,
    service: u32,
}

/// One step of the walk; 1 ends it.
unsafe extern "C" fn step(position: u32, walk: *mut Walk) -> i64 {
    // SAFETY: the kernel hands over what `bpf_loop` was given.
    let walk = unsafe { &mut *walk };
    // SAFETY: an element of the map.
    let destination = unsafe { &*walk.destination };
    i64::from(!walk.survey.visit(position, walk.service, destination, &Arrays))
}

/// Picks a real server's index for a new connection to a destination, or [`NOBODY`].
#[inline(never)]
pub fn pick<F: Family>(service: u32, replicas: bool, destination: &F::Address) -> u32 {
    let Some(run) = pick::pointer(service) else { return NOBODY };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_jiffies64() } as u32;
    let key = DestinationKey { service, address: *destination };
    let known = F::destinations().get_ptr_mut(&key);
    let mut place = 1;
    if let Some(known) = known {
        let Some(rules) = rules(service, replicas, &run) else { return NOBODY };
        // SAFETY: an element of the map; it may become another destination's under our hands, but it stays memory, and what
        // is read from it is checked.
        match unsafe { (*known).choose(&rules, &Arrays, now) } {
            Ok(server) => return server,
            Err(instead) => place = instead,
        }
    }
    let Some(picked) = pick::next_pick(service, &run) else { return NOBODY };
    if picked & INELIGIBLE != 0 {
        return NOBODY;
    }
    let member = Arrays.standing(picked).member(picked);
    match known {
        // SAFETY: as above.
        Some(known) => unsafe { (*known).learn(member, place, now) },
        // If it fails, another CPU was faster, or the next connection will do it.
        None => remember::<F>(&key, member, now),
    }
    picked
}

/// Makes an entry. A function of its own, for the stack's sake.
#[inline(never)]
fn remember<F: Family>(key: &DestinationKey<F::Address>, member: u32, now: u32) {
    let _ = F::destinations().insert(key, &Destination::new(member, now), 1 /* BPF_NOEXIST */);
}

/// What the service's destinations have in common.
#[inline(always)]
fn rules(service: u32, replicas: bool, run: &Pointer) -> Option<Rules> {
    let header = RUNS.get_ptr(run.offset + 1)?;
    // SAFETY: an element of the array.
    let [_, witness] = unsafe { header.read() };
    let expiration = CONFIG.get(0)?.lblcr_expiration.wrapping_mul(HZ.load());
    Some(Rules { service, replicas, expiration, witness })
}
