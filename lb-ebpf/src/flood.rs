//! Flood mode: what begins a connection and finds no room goes where its addresses and ports say ([`lb_common::flood`]).
//!
//! The packet path decides alone, and asks for new connections only. Two words are all that it keeps: how many connections are
//! half-open, and when a packet last found no room. The mode is on as long as the latter is not long ago. While it is on, every
//! new connection goes by the flow's number, with or without an entry: so it does not matter which of its packets makes one.
//!
//! What needs an entry for its replies (NAT, FULLNAT) gets one as long as the table has room.

use aya_ebpf::helpers::generated::bpf_jiffies64;
use lb_common::{
    config::{Config, flags as settings},
    flood::{Part, slot, word},
    reason::Reason,
    schedule::NOBODY,
    server::Method,
};

use crate::{
    account, atomic, bell,
    maps::{CONFIG, FLOOD, FLOODS, HALF_OPEN, HZ, SERVERS},
    pick, track,
};

/// Answer of [`pick`]: the packet begins nothing, and its flow would need an entry for replies.
pub const NEEDS_ENTRY: u32 = NOBODY - 4;

/// Counts a connection that has become half-open, or no longer is. Both are 0 or 1.
#[inline(always)]
pub fn count(before: u8, after: u8) {
    flood_count(u32::from(after).wrapping_sub(before.into()));
}

#[unsafe(no_mangle)]
extern "C" fn flood_count(change: u32) -> u32 {
    if change == 0 {
        return 0;
    }
    let (Some(config), Some(half_open), Some(own)) = (CONFIG.get(0), FLOOD.get_ptr_mut(word::HALF_OPEN), HALF_OPEN.get_ptr_mut(0))
    else {
        return 0;
    };
    // Each CPU keeps its own count for a while: the line that all share moves between them less often.
    // SAFETY: elements of the arrays. The CPU's own may be changed by what interrupts this, so it is changed atomically, too.
    unsafe {
        let change = change as i32 as i64 as u64;
        let kept = atomic::fetch_add(own, change).wrapping_add(change);
        if (kept as i64).unsigned_abs() >= u64::from(config.half_open_batch) {
            atomic::add(own, kept.wrapping_neg());
            atomic::add(half_open, kept);
        }
    }
    0
}

/// Whether there is room for another connection that is half-open.
#[inline(always)]
fn has_room(limit: u32) -> bool {
    // SAFETY: an element of the array.
    FLOOD.get_ptr(word::HALF_OPEN).is_none_or(|half_open| unsafe { half_open.read_volatile() as i64 } < i64::from(limit))
}

/// Notes that a packet has found no room: the mode is on from now, if there is such a mode.
#[inline(always)]
fn declare() {
    if let Some(last) = FLOOD.get_ptr_mut(word::LAST) {
        // SAFETY: an element of the array, and a helper without arguments.
        unsafe {
            let now = bpf_jiffies64();
            // In a flood, all CPUs come here all the time.
            if last.read_volatile() != now {
                last.write_volatile(now);
            }
        }
    }
}

/// Whether the mode is on.
#[inline(always)]
fn lasts(config: &Config) -> bool {
    let Some(last) = FLOOD.get_ptr(word::LAST) else { return false };
    // SAFETY: an element of the array, and a helper without arguments.
    let (last, now) = unsafe { (last.read_volatile(), bpf_jiffies64()) };
    last != 0 && now.wrapping_sub(last) < u64::from(config.flood_hold) * u64::from(HZ.load())
}

/// What is to become of a packet that has no connection: see [`admission`].
pub const LEFT: u32 = 0;
/// The same: it is scheduled.
pub const SCHEDULED: u32 = 1;
/// The same: it goes by its flow's number.
pub const FLOODED: u32 = 2;

/// Whether a packet that has no connection begins one, and whether it goes by its flow's number. If it is only now that there is no
/// room, the mode begins.
#[inline(always)]
pub fn admission(protocol: u8, event: u8) -> u32 {
    flood_admission(protocol.into(), event.into())
}

// Here and below: global functions of numbers, which the verifier looks at once, and whose answers are numbers like others to it.

#[unsafe(no_mangle)]
extern "C" fn flood_admission(protocol: u32, event: u32) -> u32 {
    let Some(config) = CONFIG.get(0) else { return LEFT };
    if config.flags & settings::FLOOD_NEVER == 0 {
        if !admits_beginning(config) {
            declare();
            return FLOODED;
        }
        if lasts(config) {
            return FLOODED;
        }
    }
    if track::may_begin(protocol as u8, event as u8, config.flags) { SCHEDULED } else { LEFT }
}

/// Whether a packet that begins a connection makes an entry.
#[inline(always)]
fn admits_beginning(config: &Config) -> bool {
    config.flags & settings::FLOOD_ALWAYS == 0 && has_room(config.half_open_limit)
}

/// Ticks that a half-open connection lives at most.
#[inline(always)]
pub fn half_open_lifetime() -> u32 {
    flood_half_open_lifetime()
}

#[unsafe(no_mangle)]
extern "C" fn flood_half_open_lifetime() -> u32 {
    let Some(config) = CONFIG.get(0) else { return u32::MAX };
    let hurries = config.flags & settings::HURRY_ALWAYS != 0 || config.flags & settings::HURRY_NEVER == 0 && lasts(config);
    if hurries { config.half_open_timeout.saturating_mul(HZ.load()) } else { u32::MAX }
}

/// Picks the real server of a flow from the service's own table: an index, [`NOBODY`], or [`NEEDS_ENTRY`].
#[inline(always)]
pub fn pick(service: u32, flow: u32, part: Part) -> u32 {
    flood_pick(service, flow, part as u32)
}

#[unsafe(no_mangle)]
extern "C" fn flood_pick(service: u32, flow: u32, part: u32) -> u32 {
    let picked = FLOODS.get_ptr(service).and_then(pick::pointer_at).and_then(|run| pick::at(run.offset, slot(flow, run.picks)));
    match picked {
        None | Some(NOBODY) => {
            bell::ring();
            NOBODY
        }
        Some(server) if part != Part::Beginning as u32 && needs_entry(server) => NEEDS_ENTRY,
        Some(server) => server,
    }
}

/// Whether a real server's replies pass the director, and are nothing without an entry.
#[inline(always)]
pub fn needs_entry(server: u32) -> bool {
    SERVERS.get(server).is_some_and(|server| Method::translates(server.method))
}

/// Whether a packet makes an entry. Only then is it looked at more closely.
#[inline(always)]
pub fn admits(protocol: u8, event: u8) -> bool {
    flood_admits(protocol.into(), event.into()) != 0
}

#[unsafe(no_mangle)]
extern "C" fn flood_admits(protocol: u32, event: u32) -> u32 {
    let Some(config) = CONFIG.get(0) else { return 1 };
    let admitted = match Part::of(protocol as u8, event as u8) {
        Part::Beginning => admits_beginning(config),
        Part::Midst => has_room(config.midst_limit),
        Part::End => false,
    };
    admitted.into()
}

/// Counts a packet that goes on without an entry.
#[inline(always)]
pub fn pass(server: u32, protocol: u8, event: u8) {
    flood_pass(server, protocol.into(), event.into());
}

#[unsafe(no_mangle)]
extern "C" fn flood_pass(server: u32, protocol: u32, event: u32) -> u32 {
    account::reason(Reason::Stateless);
    // One that is another part of its flow says nothing about the room that is left for new ones.
    if Part::of(protocol as u8, event as u8) == Part::Beginning {
        account::connection(server);
        declare();
    }
    0
}

/// Notes that the table is full.
#[inline(always)]
pub fn full() {
    flood_full();
}

#[unsafe(no_mangle)]
extern "C" fn flood_full() -> u32 {
    declare();
    0
}
