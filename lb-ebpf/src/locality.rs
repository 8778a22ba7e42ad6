//! Whom did the destination go to before? Picks for the services of lblc and lblcr.
//!
//! A destination that is remembered costs one look-up and a few array reads more than a pick of the cursor mode, whatever the
//! number of servers. One that is new, or whose servers are busy, takes the schedule's next pick and remembers it. Who is busy
//! is judged by [`lb_common::locality`], the same code that is tested on the host.
//!
//! The stack is full when a new connection comes here: kernels before 6.7 count 32 bytes for the smallest function, and there
//! is room for one. So there is one function, and what it has to keep in mind stands in a map, the [`Case`] of this CPU.

use aya_ebpf::helpers::generated::bpf_jiffies64;
use lb_common::{
    locality::{Destination, DestinationKey, Service, Standing, Survey},
    schedule::{INELIGIBLE, NOBODY},
    server::Counters,
};

use crate::{
    maps::{CASES, CONFIG, COUNTERS, Family, HZ, RUNS, STANDINGS},
    pick,
};

/// What is known of the connection for which a server is wanted.
#[repr(C)]
pub struct Case {
    /// The [`DestinationKey`], of either family. The first word is the index of the service.
    key: [u32; 5],
    survey: Survey,
    /// An entry for a destination that is new. Nothing but its times and its first member is ever written.
    fresh: Destination,
}

/// The service of a case.
struct Local(*mut Case);

impl Service for Local {
    #[inline(always)]
    fn index(&self) -> u32 {
        // SAFETY: an element of the map. Volatile, so that it does not take up the stack.
        unsafe { (&raw const (*self.0).key[0]).read_volatile() }
    }

    #[inline(always)]
    fn witness(&self) -> u32 {
        let header = pick::pointer(self.index()).and_then(|run| RUNS.get_ptr(run.offset + 1));
        // SAFETY: an element of the array.
        header.map_or(NOBODY, |header| unsafe { header.read() }[1])
    }

    #[inline(always)]
    fn expiration(&self) -> u32 {
        CONFIG.get(0).map_or(u32::MAX, |config| config.lblcr_expiration.wrapping_mul(HZ.load()))
    }

    #[inline(always)]
    fn now(&self) -> u32 {
        now()
    }

    #[inline(always)]
    fn standing(&self, index: u32) -> Option<Standing> {
        standing(index)
    }

    #[inline(always)]
    fn counters(&self, index: u32) -> Option<Counters> {
        // SAFETY: an element of the array.
        COUNTERS.get_ptr(index).map(|word| Counters::from_word(unsafe { word.read_volatile() }))
    }

    #[inline(always)]
    fn turn(&self, survey: &mut Survey) {
        let survey = core::ptr::from_mut(survey);
        #[cfg(target_arch = "bpf")]
        // SAFETY: a register is copied to itself; the compiler must believe that the memory behind it is read and written.
        unsafe {
            core::arch::asm!("{0} = {0}", in(reg) survey, options(nostack, preserves_flags));
        };
        _ = survey;
    }
}

#[inline(always)]
fn standing(index: u32) -> Option<Standing> {
    // SAFETY: an element of the array.
    STANDINGS.get_ptr(index).map(|word| Standing::from_word(unsafe { word.read_volatile() }))
}

#[inline(always)]
fn now() -> u32 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_jiffies64() as u32 }
}

/// Picks a real server's index for a new connection to a destination, or [`NOBODY`].
#[inline(never)]
pub fn pick<F: Family>(service: u32, replicas: bool, destination: &F::Address) -> u32 {
    let Some(case) = CASES.get_ptr_mut(0) else { return NOBODY };
    // SAFETY: elements of maps. A destination may become another one under our hands, but it stays memory, and what is read
    // from it is checked. A case is this CPU's alone.
    unsafe {
        let key = (&raw mut (*case).key).cast::<DestinationKey<F::Address>>();
        key.write(DestinationKey { service, address: *destination });
        let known = F::destinations().get_ptr_mut(&*key);
        let mut place = 1;
        if let Some(known) = known {
            let chosen = if replicas {
                let chosen = (*known).choose_replica(&Local(case), &mut (*case).survey);
                place = (*case).survey.place();
                chosen
            } else {
                (*known).choose_only(&Local(case))
            };
            if let Some(server) = chosen {
                return server;
            }
        }
        let service = Local(case).index();
        let Some(picked) = pick::pointer(service).and_then(|run| pick::next_pick(service, &run)) else { return NOBODY };
        if picked & INELIGIBLE != 0 {
            return NOBODY;
        }
        let Some(standing) = standing(picked) else { return NOBODY };
        let member = standing.member(picked);
        if let Some(known) = known {
            (*known).learn(member, place, now());
        } else {
            let fresh = &mut (*case).fresh;
            (fresh.last_used, fresh.last_changed, fresh.members[0]) = (now(), now(), member);
            // If it fails, another CPU was faster, or the next connection will do it.
            let _ = F::destinations().insert(&*key, &*fresh, 1 /* BPF_NOEXIST */);
        }
        picked
    }
}
