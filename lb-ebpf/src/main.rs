//! The director's datapath. It reads like the way of a packet:
//!
//! ```text
//! parse -> classify -> track -> pick -> forward -> account
//! ```
//!
//! [`pipeline`] below is that way, written once and compiled for two hooks (XDP, tc) and two families (IPv4, IPv6). Each
//! step is a module of its name. A step that cannot go on returns a [`Reason`], which is counted; what becomes of the
//! packet then follows from the reason alone.
//!
//! The common packet belongs to a known connection. For it the way is: one bit of the filter, one hash look-up (the
//! connection), one array read (the real server), the rewrite, one per-CPU counter. All else is marked cold and stands
//! in functions of its own, so that it costs the common packet neither registers nor cache.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![allow(missing_docs, reason = "the macros of aya-ebpf add functions of their own to each program")]

mod account;
mod answer;
mod atomic;
mod classify;
mod forward;
mod maps;
mod pick;
mod sweep;
mod track;

use answer::{Answer, answer};
use aya_ebpf::{
    EbpfContext,
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use lb_common::{
    packet::{
        V4, V6,
        ethernet::{self, Link},
    },
    reason::{Fate, Reason},
};
use lb_ebpf::packet::{Packet, TcBuffer, XdpFrame};

/// The fast way in, at the driver.
#[xdp]
pub fn xdp_director(context: XdpContext) -> u32 {
    // SAFETY: the context is the kernel's own.
    direct(&mut unsafe { XdpFrame::new(context.as_ptr()) }) as u32
}

/// The way in for what XDP cannot finish, and for devices where XDP does not pay. Attached at ingress.
#[classifier]
pub fn tc_director(context: TcContext) -> i32 {
    // SAFETY: the context is the kernel's own.
    direct(&mut unsafe { TcBuffer::new(context.as_ptr()) })
}

#[inline(always)]
fn direct<P: Packet>(packet: &mut P) -> i32 {
    let outcome = ethernet::parse(packet).and_then(|link| match link.ethertype {
        ethernet::IPV4 => pipeline::<P, V4>(packet, &link),
        ethernet::IPV6 => pipeline::<P, V6>(packet, &link),
        _ => Err(Reason::NotIp),
    });
    outcome.unwrap_or_else(|reason| account::leave::<P>(reason))
}

/// The way of a packet. The result is a verdict of the hook.
#[inline(always)]
fn pipeline<P: Packet, F: Answer>(packet: &mut P, link: &Link) -> Result<i32, Reason> {
    let header = F::parse(packet, link.payload)?;
    classify::may_be_ours(&header.destination)?;
    let payload = F::locate(packet, &header)?;
    let mut mtu = 0;
    let outcome = track::track::<P, F>(packet, &header, &payload).and_then(|tracked| {
        let server = forward::reachable::<P>(tracked.server)?;
        mtu = server.mtu();
        track::advance(&tracked);
        account::packet(tracked.server, header.length);
        forward::forward::<P, F>(packet, link, &header, &server)
    });
    match outcome {
        Err(why) if why.fate() == Fate::Answered => answer::<P, F>(packet, link, &header, &payload, why, mtu),
        outcome => outcome,
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// On the host the crate is only checked.
#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
