//! The bell: a change of the live counters wakes the daemon, which may have to compile schedules anew.
//!
//! The daemon looks at the counters in shared memory. As long as they change it looks again and again, and needs no bell.
//! When they have come to rest it says that it sleeps, looks once more, and waits. The next change rings:
//!
//! ```text
//! daemon:   SLEEPING = 1, read the counters, wait          a change: add to a counter, read SLEEPING, clear it, ring
//! ```
//!
//! Each side writes before it reads, so at least one of them sees the other. A daemon that is gone is rung for once.

use aya_ebpf::bindings::BPF_RB_FORCE_WAKEUP;

use crate::maps::{BELL, SLEEPING};

/// Wakes the daemon if it sleeps. To be called after a counter has changed.
#[inline(always)]
pub fn ring() {
    let Some(sleeping) = SLEEPING.get_ptr_mut(0) else { return };
    // SAFETY: an element of the array; two CPUs that both find it set ring twice, which does no harm.
    unsafe {
        if sleeping.read_volatile() != 0 {
            sleeping.write_volatile(0);
            wake();
        }
    }
}

#[inline(never)]
fn wake() {
    // Full means that it has been rung already.
    let _ = BELL.output::<u64>(0, u64::from(BPF_RB_FORCE_WAKEUP));
}
