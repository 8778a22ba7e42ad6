//! SIP: which call does a message belong to? [`lb_common::sip`] says what a Call-ID is, [`lb_common::call`] what is done with it.
//!
//! Only packets come here that would begin a connection to a service with `--pe sip`. What is found out is left for the program for odd
//! packets, which then meets the same packet as if nothing had happened, and finds the answer where it looks for the template:
//!
//! ```text
//! plain or odd way    no connection, a service with `--pe sip`, no answer yet
//! here                the Call-ID, the call's template, an answer
//! odd way             no connection, that service, the answer: a connection begins
//! ```
//!
//! IPVS drops what names no call; so does this. Of a datagram, the first [`CAPACITY`] bytes are read; of a fragmented one, the first
//! fragment.

use aya_ebpf::{cty::c_void, helpers::generated::bpf_loop};
use lb_common::{
    call::{CallId, Caller},
    config::SweptTable,
    packet::{
        Payload, V4, V6,
        ethernet::{self, Link},
        protocol,
        transport::UdpHeader,
    },
    reason::Reason,
    sip::Search,
};
use lb_ebpf::packet::{Packet, merged};

use crate::{
    account,
    maps::{Family, INQUIRIES},
    newcomers,
    outcome::Outcome,
    template,
    track::jiffies,
};

/// How much of a message is read: a power of two.
const CAPACITY: usize = 1 << 14;

/// A message, and the search through it.
#[repr(C)]
pub struct Inquiry {
    /// The message, and room for the last look at eight bytes at once.
    message: [u8; CAPACITY + 8],
    length: u32,
    search: Search,
    /// The [`Caller`], of either family.
    caller: [u32; 74],
}

impl Inquiry {
    #[inline(always)]
    fn caller<F: Family>(inquiry: *mut Self) -> *mut Caller<F::Address> {
        // SAFETY: an element of the map; the field is large enough for either family.
        unsafe { (&raw mut (*inquiry).caller).cast() }
    }
}

/// Finds out where a new connection's call goes. The result is a verdict of the hook, or which program goes on.
#[inline(always)]
pub fn read<P: Packet>(packet: &P) -> i32 {
    let answered = match ethernet::parse(packet) {
        Ok(Link { ethertype: ethernet::IPV4, payload, .. }) => answer::<P, V4>(packet, payload),
        Ok(Link { ethertype: ethernet::IPV6, payload, .. }) => answer::<P, V6>(packet, payload),
        Ok(_) => Err(Reason::NotIp),
        Err(why) => Err(why),
    };
    match answered {
        Ok(()) => Outcome::NEXT_ODD,
        Err(why) => account::leave::<P>(why),
    }
}

#[inline(always)]
fn answer<P: Packet, F: Family>(packet: &P, offset: usize) -> Result<(), Reason> {
    let header = F::parse(packet, offset)?;
    let payload = merged(packet, &F::transport(packet, &header)?);
    let Payload { offset, protocol: protocol::UDP, .. } = payload else { return Err(Reason::NoCallId) };
    let offset = offset + size_of::<UdpHeader>();
    let length = (packet.opaque(header.offset + header.length)).saturating_sub(offset);
    find::<P, F>(packet.context(), offset as u32, length as u32)
}

/// Reads the message, finds its Call-ID, and where that leads.
#[inline(always)]
fn find<P: Packet, F: Family>(context: *mut c_void, offset: u32, length: u32) -> Result<(), Reason> {
    let inquiry = INQUIRIES.get_ptr_mut(0).ok_or(Reason::Failed)?;
    // SAFETY: the context is the kernel's own; this CPU's element of the map, whose fields have room for what is loaded.
    unsafe {
        let packet = P::view(context);
        let message = (&raw mut (*inquiry).message).cast::<u8>();
        (*inquiry).length = load(&packet, offset, message, length, CAPACITY).ok_or(Reason::NoCallId)?;
        (*inquiry).search = Search::NEW;
        let mut at_hand = inquiry;
        bpf_loop((*inquiry).length, step as *mut c_void, (&raw mut at_hand).cast(), 0);
        let (start, length) = (*inquiry).search.found().ok_or(Reason::NoCallId)?;
        let caller = Inquiry::caller::<F>(inquiry);
        let call = &raw mut (*caller).key.call;
        call.write(CallId::NONE);
        let length = load(&packet, offset + start, call.cast(), length, size_of::<CallId>()).ok_or(Reason::NoCallId)?;
        (*call).length = length as u8;
        if template::answer::<F>(&raw mut (*caller).key) {
            (*caller).since = jiffies();
            let connection = template::noted::<F>().ok_or(Reason::Failed)?;
            F::callers().insert(&*connection, &*caller, 0).map_err(|_| Reason::TableFull)?;
            newcomers::note(if F::ETHERTYPE == ethernet::IPV4 { SweptTable::CallersV4 } else { SweptTable::CallersV6 });
        }
    }
    Ok(())
}

/// Copies so many bytes of the packet, or as many as there is room for: a power of two. Returns how many; nothing if it is none.
///
/// # Safety
/// There is as much room.
#[inline(always)]
unsafe fn load<P: Packet>(packet: &P, offset: u32, to: *mut u8, length: u32, room: usize) -> Option<u32> {
    if length == 0 {
        return None;
    }
    // In the form that the verifier understands: not none, and not more than there is room for.
    let last = packet.opaque((length as usize).min(room) - 1) & (room - 1);
    let length = last as u32 + 1;
    // SAFETY: the caller's promise.
    unsafe { packet.load(offset, to, length) }.then_some(length)
}

/// One step of the search; 1 ends it.
#[expect(clippy::cast_ptr_alignment, reason = "BPF's memory accesses need no alignment on the targets that we build for")]
unsafe extern "C" fn step(_: u32, at_hand: *mut *mut Inquiry) -> i64 {
    // SAFETY: the kernel hands over what `bpf_loop` was given.
    unsafe {
        let inquiry = *at_hand;
        let search = &raw mut (*inquiry).search;
        let position = (*search).position();
        if position >= (*inquiry).length {
            return 1;
        }
        let next = (&raw const (*inquiry).message).cast::<u8>().add(position as usize & (CAPACITY - 1));
        if (*search).pass(next.cast::<u64>().read()) {
            return 0;
        }
        (*search).take(next.read());
        (*search).is_over().into()
    }
}
