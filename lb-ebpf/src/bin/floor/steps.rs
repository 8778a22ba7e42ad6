//! A director's way of an established packet, in steps: each program goes one step further than the one before it, and then
//! sends the packet back. What a program takes more than the one before is the price of its last step.
//!
//! ```text
//! step_1_xdp    parse
//! step_2_xdp    parse, filter
//! step_3_xdp    parse, filter, connection
//! ...
//! ```
//!
//! The steps are written as the director writes them, but for direct routing over IPv4 alone: no other way has to be kept open, so
//! the director itself is somewhat dearer than the last of them.

use core::cell::UnsafeCell;

use aya_ebpf::{
    EbpfContext, Global,
    bindings::xdp_action,
    helpers::generated::bpf_jiffies64,
    macros::{map, xdp},
    maps::PerCpuArray,
    programs::XdpContext,
};
use lb_common::{
    connection::flags,
    filter,
    packet::{
        Bytes as _, Ipv4Header, Network as _, Plain, V4, ethernet,
        transport::{self, Ports},
    },
    reason::Reason,
    server::Status,
    statistics::Statistics,
};
use lb_ebpf::packet::{Packet as _, XdpFrame};

use crate::{FLOOR_SERVERS, FLOOR_V4};

/// As the director's own, but a bit that is *not* set stands for a virtual address: nobody has to fill it.
#[unsafe(no_mangle)]
static STEP_FILTER: Filter = Filter(UnsafeCell::new([0; filter::LENGTH]));
/// Kernel clock ticks until a connection is written to again. About a second: it only has to be looked at.
#[unsafe(no_mangle)]
static STEP_TICKS: Global<u32> = Global::new(250);
#[map]
static STEP_STATISTICS: PerCpuArray<Statistics> = PerCpuArray::with_max_entries(16, 0);

#[repr(transparent)]
struct Filter(UnsafeCell<[u64; filter::LENGTH]>);

// SAFETY: nobody writes it.
unsafe impl Sync for Filter {}

const PARSE: u32 = 1;
const FILTER: u32 = 2;
const CONNECTION: u32 = 3;
const FRESHNESS: u32 = 4;
const SERVER: u32 = 5;
const STATISTICS: u32 = 6;

/// Goes so many steps.
#[inline(always)]
fn walk<const STEPS: u32>(frame: &mut XdpFrame) -> Result<(), Reason> {
    if ethernet::parse_plain(frame)? != ethernet::IPV4 {
        return Err(Reason::NotIp);
    }
    let Plain { key, length, event } = V4::plain(frame, ethernet::HEADER).ok_or(Reason::NotIp)?;
    if STEPS == PARSE {
        // So that all of it is really read.
        let word = key.client ^ key.vip ^ ports(key.ports) ^ key.protocol ^ length as u32;
        return if word == 0 { Err(Reason::NotIp) } else { Ok(()) };
    }
    let (word, bit) = filter::position(&key.vip);
    // SAFETY: within the array by the mask.
    let word = unsafe { STEP_FILTER.0.get().cast::<u64>().add((word & (filter::WORDS - 1)) as usize).read_volatile() };
    if word & bit != 0 {
        return Err(Reason::NotOurs);
    }
    if STEPS == FILTER {
        let word = key.client ^ ports(key.ports) ^ key.protocol ^ length as u32;
        return if word == 0 { Err(Reason::NotIp) } else { Ok(()) };
    }
    let known = FLOOR_V4.get_ptr_mut(&key).ok_or(Reason::NoConnection)?;
    if STEPS == CONNECTION {
        return Ok(());
    }
    // SAFETY: a helper without arguments; an element of the map.
    let server = unsafe {
        let now = bpf_jiffies64() as u32;
        let idle = now.wrapping_sub((*known).last_seen);
        if (*known).flags & flags::SETTLED == 0 || !transport::is_quiet(event) || idle >= STEP_TICKS.load() {
            (*known).flags = flags::SETTLED;
            (*known).last_seen = now;
        }
        (*known).server
    };
    if STEPS == FRESHNESS {
        return if server == u32::MAX { Err(Reason::ServerRemoved) } else { Ok(()) };
    }
    let entry = FLOOR_SERVERS.get(server).ok_or(Reason::ServerRemoved)?;
    if entry.status != Status::Ready as u8 || !frame.reaches(&entry.hop, false) {
        return Err(Reason::OtherDevice);
    }
    if STEPS == SERVER {
        return Ok(());
    }
    if let Some(statistics) = STEP_STATISTICS.get_ptr_mut(server) {
        // SAFETY: this CPU's own element.
        unsafe {
            (*statistics).packets_in += 1;
            (*statistics).bytes_in += length as u64;
        }
    }
    if STEPS == STATISTICS {
        return Ok(());
    }
    let lives: u32 = frame.read(ethernet::HEADER + Ipv4Header::TTL).ok_or(Reason::Malformed)?;
    if lives & 0xff <= 1 || length > entry.hop.mtu as usize {
        return Err(Reason::TtlExpired);
    }
    let carry = if lives >= 0xfffe_0000 { 0x1_0000 } else { 0 };
    frame.write(ethernet::HEADER + Ipv4Header::TTL, lives.wrapping_add(0x1_0000 - 1).wrapping_add(carry))?;
    frame.write(0, entry.hop.link)
}

#[inline(always)]
fn ports(ports: Ports) -> u32 {
    u32::from(ports.source()) << 16 | u32::from(ports.destination())
}

macro_rules! steps {
    ($($name:ident = $steps:literal)*) => {
        $(
            #[xdp]
            pub fn $name(context: XdpContext) -> u32 {
                // SAFETY: the context is the kernel's own.
                let walked = walk::<$steps>(&mut unsafe { XdpFrame::view(context.as_ptr()) });
                if walked.is_ok() { xdp_action::XDP_TX } else { xdp_action::XDP_PASS }
            }
        )*
    };
}

steps! {
    step_1_xdp = 1
    step_2_xdp = 2
    step_3_xdp = 3
    step_4_xdp = 4
    step_5_xdp = 5
    step_6_xdp = 6
    step_7_xdp = 7
}
