//! The director's datapath. It reads like the way of a packet:
//!
//! ```text
//! parse -> classify -> track -> pick -> forward -> account
//! ```
//!
//! That way is written once and compiled for two hooks (XDP, tc) and two families (IPv4, IPv6). Each step is a module of
//! its name. A step that cannot go on returns a [`Reason`], which is counted; what becomes of the packet then follows
//! from the reason alone.
//!
//! The common packet is [`plain`] and belongs to a known connection. For it the way is: one bit of the filter, one hash
//! look-up (the connection), one array read (the real server), the rewrite, one per-CPU counter. All else ([`odd`] packets,
//! new connections, answers) stands in functions and programs of its own, so that it costs the common packet neither registers nor
//! cache.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![allow(clippy::needless_pass_by_value, reason = "the macros of aya-ebpf hand contexts over by value")]
#![allow(clippy::needless_borrows_for_generic_args, reason = "keys and values by value would be copied once more on the stack")]
#![allow(missing_docs, reason = "the macros of aya-ebpf add functions of their own to each program")]
#![allow(
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "verdicts and lengths change sign at the border to the helpers"
)]

mod account;
mod answer;
mod bell;
mod classify;
mod cross;
mod flood;
mod forward;
mod local;
mod locality;
mod maps;
mod nat;
mod newcomers;
mod outcome;
mod pick;
mod reply;
mod sip;
mod sweep;
mod table;
mod template;
mod toa;
mod track;

use aya_ebpf::{
    EbpfContext,
    cty::c_void,
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use lb_common::{
    connection::{ConnectionKey, Leg},
    packet::{
        Fragment, IpHeader, Payload, Plain, V4, V6,
        ethernet::{self, Link},
    },
    reason::Reason,
};
use lb_ebpf::{
    atomic,
    packet::{Packet, TcBuffer, XdpFrame},
};
use maps::{Family, TC_NEXT, XDP_NEXT, next};
use outcome::Outcome;

/// The fast way in, at the driver.
#[xdp]
pub fn xdp_director(context: XdpContext) -> u32 {
    // SAFETY: the context is the kernel's own.
    let verdict = direct(&mut unsafe { XdpFrame::new(context.as_ptr()) });
    next_xdp(&context, verdict)
}

/// The way of an odd packet: one of any shape.
///
/// This and the translation are programs of their own, which the others call last: each has a stack of its own, and its own share
/// of the verifier's patience.
#[xdp]
pub fn xdp_odd(context: XdpContext) -> u32 {
    // SAFETY: the context is the kernel's own.
    let verdict = any(&unsafe { XdpFrame::view(context.as_ptr()) });
    next_xdp(&context, verdict)
}

/// The translation of what is neither plain nor quiet.
#[xdp]
pub fn xdp_translate(context: XdpContext) -> u32 {
    // SAFETY: the context is the kernel's own.
    let verdict = Outcome::resume(&unsafe { XdpFrame::view(context.as_ptr()) });
    next_xdp(&context, verdict)
}

/// The translation between IPv6 and IPv4: what the one above leaves.
#[xdp]
pub fn xdp_cross(context: XdpContext) -> u32 {
    // SAFETY: the context is the kernel's own.
    let verdict = Outcome::resume_cross(&unsafe { XdpFrame::view(context.as_ptr()) });
    next_xdp(&context, verdict)
}

/// What finds the Call-ID of SIP messages, for services that keep calls together.
#[xdp]
pub fn xdp_sip(context: XdpContext) -> u32 {
    // SAFETY: the context is the kernel's own.
    let verdict = sip::read(&unsafe { XdpFrame::view(context.as_ptr()) });
    next_xdp(&context, verdict)
}

#[inline(always)]
fn next_xdp(context: &XdpContext, verdict: i32) -> u32 {
    // SAFETY: the map is a program array, whose programs have the same kind of context.
    match verdict {
        Outcome::NEXT_ODD => unsafe { XDP_NEXT.tail_call(context, next::ODD) },
        Outcome::NEXT_TRANSLATE => unsafe { XDP_NEXT.tail_call(context, next::TRANSLATE) },
        Outcome::NEXT_CROSS => unsafe { XDP_NEXT.tail_call(context, next::CROSS) },
        Outcome::NEXT_SIP => unsafe { XDP_NEXT.tail_call(context, next::SIP) },
        _ => return verdict as u32,
    }
    // There is no such program as long as no real server needs it.
    account::leave::<XdpFrame>(Reason::NotOurs) as u32
}

/// The way in for what XDP cannot finish, and for devices where XDP does not pay. Attached at ingress.
#[classifier]
pub fn tc_director(context: TcContext) -> i32 {
    // SAFETY: the context is the kernel's own.
    let verdict = direct(&mut unsafe { TcBuffer::new(context.as_ptr()) });
    next_tc(&context, verdict)
}

/// The same at tc.
#[classifier]
pub fn tc_odd(context: TcContext) -> i32 {
    // SAFETY: the context is the kernel's own.
    let verdict = any(&unsafe { TcBuffer::view(context.as_ptr()) });
    next_tc(&context, verdict)
}

/// The same at tc.
#[classifier]
pub fn tc_translate(context: TcContext) -> i32 {
    // SAFETY: the context is the kernel's own.
    let verdict = Outcome::resume(&unsafe { TcBuffer::view(context.as_ptr()) });
    next_tc(&context, verdict)
}

/// The same at tc.
#[classifier]
pub fn tc_cross(context: TcContext) -> i32 {
    // SAFETY: the context is the kernel's own.
    let verdict = Outcome::resume_cross(&unsafe { TcBuffer::view(context.as_ptr()) });
    next_tc(&context, verdict)
}

/// The same at tc.
#[classifier]
pub fn tc_sip(context: TcContext) -> i32 {
    // SAFETY: the context is the kernel's own.
    let verdict = sip::read(&unsafe { TcBuffer::view(context.as_ptr()) });
    next_tc(&context, verdict)
}

#[inline(always)]
fn next_tc(context: &TcContext, verdict: i32) -> i32 {
    // SAFETY: as in `next_xdp`.
    match verdict {
        Outcome::NEXT_ODD => unsafe { TC_NEXT.tail_call(context, next::ODD) },
        Outcome::NEXT_TRANSLATE => unsafe { TC_NEXT.tail_call(context, next::TRANSLATE) },
        Outcome::NEXT_CROSS => unsafe { TC_NEXT.tail_call(context, next::CROSS) },
        Outcome::NEXT_SIP => unsafe { TC_NEXT.tail_call(context, next::SIP) },
        _ => return verdict,
    }
    account::leave::<TcBuffer>(Reason::NotOurs)
}

#[inline(always)]
fn direct<P: Packet>(packet: &mut P) -> i32 {
    // As they stand in the frame: so the constants are turned round once and for all, and not the type of each packet.
    const IPV4: u16 = ethernet::IPV4.to_be();
    const IPV6: u16 = ethernet::IPV6.to_be();
    const VLAN: u16 = ethernet::VLAN.to_be();
    const SERVICE_VLAN: u16 = ethernet::SERVICE_VLAN.to_be();
    let outcome = match ethernet::parse_plain(packet).map(u16::to_be) {
        Ok(IPV4) => plain::<P, V4>(packet),
        Ok(IPV6) => plain::<P, V6>(packet),
        Ok(VLAN | SERVICE_VLAN) => Ok(Outcome::ODD),
        Ok(_) => Err(Reason::NotIp),
        Err(why) => Err(why),
    };
    outcome.unwrap_or_else(Outcome::left::<P>).settle(packet)
}

/// The way of a plain packet: no VLAN tag, no IP options or extension headers, no fragment, TCP or UDP. Everything is
/// where it always is, which makes this way short. One that is an exception to the filter counts as odd.
#[inline(always)]
fn plain<P: Packet, F: Family>(packet: &mut P) -> Result<Outcome, Reason> {
    let link = Link::plain(F::ETHERTYPE);
    // Taken apart: the key lies in memory, where look-ups find it, the rest need not.
    let Some(Plain { key, length, event }) = F::plain(packet, link.payload) else { return Ok(Outcome::ODD) };
    let key = &key;
    if !classify::may_be_ours(&key.vip) {
        return match () {
            () if classify::is_excepted::<P, F>(packet) => Ok(Outcome::ODD),
            () if classify::may_be_reply(&key.client) => reply::plain::<P, F>(packet, key, length, event),
            () => Err(Reason::NotOurs),
        };
    }
    let leg = track::connection::<P, F>(packet, key, event, Fragment::Whole);
    let header = IpHeader { source: &key.client, destination: &key.vip, offset: link.payload, length };
    Ok(deliver::<P, F>(packet, &link, &header, Some(key), true, leg))
}

#[inline(always)]
fn any<P: Packet>(packet: &P) -> i32 {
    let outcome = match ethernet::parse(packet) {
        Ok(Link { ethertype: ethernet::IPV4, .. }) => odd::<P, V4>(packet.context()),
        Ok(Link { ethertype: ethernet::IPV6, .. }) => odd::<P, V6>(packet.context()),
        Ok(_) => Outcome::left::<P>(Reason::NotIp),
        Err(why) => Outcome::left::<P>(why),
    };
    outcome.merged(packet).settle(packet)
}

#[inline(never)]
fn odd<P: Packet, F: Family>(context: *mut c_void) -> Outcome {
    // SAFETY: the context is the kernel's own.
    let packet = &mut unsafe { P::view(context) };
    odd_of::<P, F>(packet).unwrap_or_else(Outcome::left::<P>)
}

#[inline(always)]
fn odd_of<P: Packet, F: Family>(packet: &mut P) -> Result<Outcome, Reason> {
    let link = ethernet::parse(packet)?;
    let header = F::parse(packet, link.payload)?;
    if !classify::may_be_ours(&header.destination) && !classify::is_excepted::<P, F>(packet) {
        // ICMP errors come from routers, too: whether they are about a request, only the packet that they quote tells.
        let may_be_reply = F::protocol(packet, header.offset) == Some(F::ICMP) || classify::may_be_reply(&header.source);
        return if may_be_reply { Ok(Outcome::reply::<F>()) } else { Err(Reason::NotOurs) };
    }
    let Payload { offset, protocol, fragment, .. } = F::transport(packet, &header)?;
    // Never an error about an error, nor about a later fragment (RFC 1122, 3.2.2).
    let answerable = protocol != F::ICMP && fragment != Fragment::Later;
    let leg = track::anything::<P, F>(packet, &header, offset, protocol, fragment);
    Ok(deliver::<P, F>(packet, &link, &header.as_ref(), None, answerable, leg))
}

/// The second half of either way: the packet's real server is known, or why there is none. `plain` is the key of a plain packet's
/// connection.
#[inline(always)]
fn deliver<P: Packet, F: Family>(
    packet: &mut P,
    link: &Link,
    header: &IpHeader<&F::Address>,
    plain: Option<&ConnectionKey<F::Address>>,
    answerable: bool,
    leg: Result<Leg, Reason>,
) -> Outcome {
    match to_server::<P, F>(packet, link, header, plain, leg) {
        Ok(outcome) => outcome,
        Err(Reason::Unnamed) => Outcome::name::<F>(),
        Err(Reason::NoCallId) => Outcome::verdict(Outcome::NEXT_SIP),
        // That has switched flood mode on, in which there is a way: once more from the beginning.
        Err(Reason::TableFull) if plain.is_some() => Outcome::ODD,
        // An address that looks like a virtual one to the filter may be that of a client.
        Err(Reason::NoService) if classify::may_be_reply(header.source) => Outcome::reply::<F>(),
        // It was an exception to the filter, and for nobody.
        Err(why) if plain.is_none() && leaves_unnoticed(why) && !classify::may_be_ours(header.destination) => Outcome::reply::<F>(),
        Err(why) if answerable => {
            let mtu = if why == Reason::TooBig { forward::mtu(leg) } else { 0 };
            Outcome::refused::<P, F>(why, mtu, link, header.length)
        }
        Err(why) => Outcome::left::<P>(why),
    }
}

/// Whether nothing was found that a packet belongs to.
#[inline(always)]
const fn leaves_unnoticed(why: Reason) -> bool {
    matches!(why, Reason::FragmentUnknown | Reason::NoConnection | Reason::NoService | Reason::NotTransport)
}

#[inline(always)]
fn to_server<P: Packet, F: Family>(
    packet: &mut P,
    link: &Link,
    header: &IpHeader<&F::Address>,
    plain: Option<&ConnectionKey<F::Address>>,
    leg: Result<Leg, Reason>,
) -> Result<Outcome, Reason> {
    let leg = leg?;
    let server = match forward::reachable(packet, leg) {
        // IPVS counts a packet that it only cannot send.
        Err(why @ (Reason::LocalServer | Reason::NoRoute)) => {
            account::packet(leg.server(), header.length);
            return Err(why);
        }
        server => server?,
    };
    account::packet(leg.server(), header.length);
    forward::forward::<P, F>(packet, link, header, plain, &server)
}

lb_ebpf::object!();
