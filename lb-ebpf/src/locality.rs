//! Whom did the destination go to before? Picks for the services of lblc and lblcr.
//!
//! A destination that is remembered costs one look-up and a few array reads more than a pick of the cursor mode, whatever the
//! number of servers. One that is new, or whose servers are busy, takes the schedule's next pick and remembers it. Who is busy
//! is judged by [`lb_common::locality`], the same code that is tested on the host.
//!
//! The stack is full when a new connection comes here. There is room for 32 bytes, which kernels before 6.7 count for the
//! smallest function. So no function here calls another, and what has to be kept in mind stands in a map, the [`Case`] of
//! this CPU.

use aya_ebpf::helpers::generated::bpf_jiffies64;
use lb_common::{
    locality::{Destination, DestinationKey, Service, Standing, Survey},
    packet::{V4, V6, ethernet},
    schedule::{INELIGIBLE, NOBODY, Pointer},
    server::Counters,
};

use crate::{
    maps::{CASES, CONFIG, COUNTERS, Family, HZ, RUNS, STANDINGS},
    pick,
};

/// What is known of the connection for which a server is wanted.
#[repr(C)]
pub struct Case {
    /// In the first place, where it needs no pointer of its own.
    survey: Survey,
    /// Index of the service. It stands in the key, too, but behind another pointer.
    service: u32,
    /// The [`DestinationKey`], of either family.
    key: [u32; 5],
    /// Where the destination is to remember the server.
    place: u32,
    /// An entry for a destination that is new. Nothing but its times and its first member is ever written.
    fresh: Destination,
}

/// The service of a case.
struct Local(*const Case);

impl Service for Local {
    #[inline(always)]
    fn index(&self) -> u32 {
        // SAFETY: an element of the map. Volatile, so that it is not kept on the stack.
        unsafe { (&raw const (*self.0).service).read_volatile() }
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
    fn turn<T>(&self, memory: &mut T) {
        let memory = core::ptr::from_mut(memory);
        #[cfg(target_arch = "bpf")]
        // SAFETY: a register is copied to itself; the compiler must believe that the memory behind it is read and written.
        unsafe {
            core::arch::asm!("{0} = {0}", in(reg) memory, options(nostack, preserves_flags));
        };
        _ = memory;
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

/// Picks a real server's index for a new connection to a destination.
#[inline(always)]
pub fn pick<F: Family>(service: u32, replicas: bool, run: &Pointer, destination: &F::Address) -> Option<u32> {
    let case = CASES.get_ptr_mut(0)?;
    let key = DestinationKey { service, address: *destination };
    // SAFETY: an element of the map; the key is large enough for either family.
    unsafe {
        (*case).service = service;
        (&raw mut (*case).key).cast::<DestinationKey<F::Address>>().write(key);
    }
    let is_ipv4 = F::ETHERTYPE == ethernet::IPV4;
    let chosen = if is_ipv4 { choose_ipv4(replicas.into()) } else { choose_ipv6(replicas.into()) };
    if chosen != NOBODY {
        return Some(chosen);
    }
    let picked = pick::next_pick(service, run).filter(|picked| picked & INELIGIBLE == 0)?;
    if is_ipv4 {
        learn_ipv4(picked)
    } else {
        learn_ipv6(picked)
    };
    Some(picked)
}

/// The functions for each family. They are global and take nothing but numbers: so the verifier looks at each once, and not
/// once for each way that leads to it.
macro_rules! global {
    ($family:ty, $choose:ident, $learn:ident) => {
        #[unsafe(no_mangle)]
        extern "C" fn $choose(replicas: u32) -> u32 {
            choose::<$family>(replicas != 0).unwrap_or(NOBODY)
        }

        #[unsafe(no_mangle)]
        extern "C" fn $learn(picked: u32) -> u32 {
            learn::<$family>(picked).is_some().into()
        }
    };
}
global!(V4, choose_ipv4, learn_ipv4);
global!(V6, choose_ipv6, learn_ipv6);

/// The server that the destination of the case went to before, if it shall go there again.
#[inline(always)]
fn choose<F: Family>(replicas: bool) -> Option<u32> {
    let case = CASES.get_ptr_mut(0)?;
    let known = find::<F>(case)?;
    // SAFETY: elements of maps. A destination may become another one under our hands, but it stays memory, and what is read
    // from it is checked. A case is this CPU's alone.
    unsafe {
        if !replicas {
            (*case).place = 1;
            return (*known).choose_only(&Local(case));
        }
        let chosen = (*known).choose_replica(&Local(case), &mut (*case).survey);
        (*case).place = (*case).survey.place();
        chosen
    }
}

/// Remembers who got the connection of the case.
#[inline(always)]
fn learn<F: Family>(picked: u32) -> Option<()> {
    let case = CASES.get_ptr_mut(0)?;
    let member = standing(picked)?.member(picked);
    // SAFETY: as above.
    unsafe {
        if let Some(known) = find::<F>(case) {
            (*known).learn(member, (*case).place, &Local(case));
            return Some(());
        }
        let fresh = &mut (*case).fresh;
        (fresh.last_used, fresh.last_changed, fresh.members[0]) = (now(), now(), member);
        // If it fails, another CPU was faster, or the next connection will do it.
        F::destinations().insert(&*key::<F>(case), &*fresh, 1 /* BPF_NOEXIST */).ok()
    }
}

#[inline(always)]
fn find<F: Family>(case: *const Case) -> Option<*mut Destination> {
    // SAFETY: an element of the map.
    F::destinations().get_ptr_mut(unsafe { &*key::<F>(case) })
}

#[inline(always)]
const fn key<F: Family>(case: *const Case) -> *const DestinationKey<F::Address> {
    // SAFETY: an element of the map.
    unsafe { (&raw const (*case).key).cast() }
}
