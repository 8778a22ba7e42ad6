//! Counting: what was forwarded, by real server; what was not, by reason.

use lb_common::reason::{Fate, Reason};
use lb_ebpf::packet::Packet;

use crate::maps::{REASONS, STATISTICS};

/// Counts a packet from a client for a real server. IPVS counts before it forwards, whatever becomes of the packet then.
#[inline(always)]
pub fn packet(server: u32, length: usize) {
    if let Some(statistics) = STATISTICS.get_ptr_mut(server) {
        // SAFETY: this CPU's own element; programs of one CPU do not interrupt each other.
        unsafe {
            (*statistics).packets_in += 1;
            (*statistics).bytes_in += length as u64;
        }
    }
}

/// Counts a packet of a real server for a client.
#[inline(always)]
pub fn reply(server: u32, length: usize) {
    if let Some(statistics) = STATISTICS.get_ptr_mut(server) {
        // SAFETY: as in `packet`.
        unsafe {
            (*statistics).packets_out += 1;
            (*statistics).bytes_out += length as u64;
        }
    }
}

/// Counts a scheduled connection for a real server.
#[inline(always)]
pub fn connection(server: u32) {
    if let Some(statistics) = STATISTICS.get_ptr_mut(server) {
        // SAFETY: as in `packet`.
        unsafe { (*statistics).connections += 1 };
    }
}

/// Counts a reason.
#[inline(always)]
pub fn reason(reason: Reason) {
    if let Some(counter) = REASONS.get_ptr_mut(reason as u32) {
        // SAFETY: as in `packet`.
        unsafe { *counter += 1 };
    }
}

/// Counts a reason and finds the verdict that goes with it.
#[inline(always)]
pub fn leave<P: Packet>(why: Reason) -> i32 {
    reason(why);
    match why.fate() {
        Fate::Passed | Fate::Forwarded => P::PASS,
        Fate::Dropped | Fate::Answered => P::DROP,
    }
}
