//! XDP frames.

use aya_ebpf::{
    bindings::{xdp_action, xdp_md},
    cty::c_void,
    helpers::generated::{bpf_redirect, bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_load_bytes},
};
use lb_common::{
    Plain,
    hop::{Hop, KEEP_VLAN},
    packet::{
        Bytes,
        ethernet::{self, Link},
        mapped,
    },
    reason::Reason,
    server::NextHop,
};

use super::{Checksum, Packet, Room, Span, apart};

/// A frame at the XDP hook.
pub struct XdpFrame {
    context: *mut xdp_md,
    span: Span,
}

impl XdpFrame {
    #[inline(always)]
    fn reload(&mut self) {
        // SAFETY: the kernel gave us the context.
        self.span = unsafe { Span::of(&raw const (*self.context).data, &raw const (*self.context).data_end) };
    }

    /// Moves the beginning of the frame: outward for positive numbers.
    #[inline(always)]
    fn grow(&mut self, bytes: i32) -> Result<(), Reason> {
        // SAFETY: the context is the kernel's; a refusal changes nothing.
        if unsafe { bpf_xdp_adjust_head(self.context, -bytes) } != 0 {
            return Err(apart(Reason::Failed));
        }
        self.reload();
        Ok(())
    }
}

impl Bytes for XdpFrame {
    #[inline(always)]
    fn read<T: Plain>(&self, offset: usize) -> Option<T> {
        self.span.read(offset)
    }

    #[inline(always)]
    fn opaque(&self, value: usize) -> usize {
        super::opaque(value, self.len())
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.span.len()
    }
}

impl Packet for XdpFrame {
    const PASS: i32 = xdp_action::XDP_PASS as i32;
    const DROP: i32 = xdp_action::XDP_DROP as i32;
    const RESOLVES: bool = false;

    #[inline(always)]
    unsafe fn new(context: *mut c_void) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self::view(context) }
    }

    #[inline(always)]
    unsafe fn view(context: *mut c_void) -> Self {
        let mut frame = Self { context: context.cast(), span: Span { start: 0, end: 0 } };
        frame.reload();
        frame
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.context.cast()
    }

    #[inline(always)]
    fn pointer<T: Plain>(&self, offset: usize) -> Option<*mut T> {
        self.span.pointer(offset)
    }

    #[inline(always)]
    fn beyond_the_end() -> Reason {
        Reason::Malformed
    }

    #[inline(always)]
    unsafe fn load(&self, offset: u32, to: *mut u8, length: u32) -> bool {
        // SAFETY: the caller's promise, and the context is the kernel's.
        unsafe { bpf_xdp_load_bytes(self.context, offset, to.cast(), length) == 0 }
    }

    /// A frame at this hook is never larger than a device takes.
    #[inline(always)]
    fn fits_in_segments(&self, _headers: usize, _mtu: u16) -> bool {
        false
    }

    #[inline(always)]
    fn is_segmented(&self) -> bool {
        false
    }

    #[inline(always)]
    fn takes_headers(&self, _link: &Link) -> bool {
        true
    }

    #[inline(always)]
    fn address(&mut self, link: &Link, hop: &Hop, room: Room) -> Result<usize, Reason> {
        let vlan = hop.vlan;
        let keeps_tags = vlan == KEEP_VLAN || (vlan == link.vlan && link.payload <= ethernet::HEADER + ethernet::TAG);
        if room.bytes == 0 && keeps_tags {
            self.write(0, hop.link)?;
            return Ok(link.payload);
        }
        if link.payload == ethernet::HEADER && keeps_tags {
            self.grow(room.bytes as i32)?;
            // The header, and two bytes of the room.
            let Some(words) = self.pointer::<[u32; 4]>(0) else { return Err(apart(Reason::Malformed)) };
            let words = words.cast::<u32>();
            // SAFETY: `pointer` checked the bounds.
            unsafe {
                words.cast::<[u32; 3]>().write(hop.link);
                words.add(3).cast::<u16>().write(room.ethertype.to_be());
            }
            return Ok(ethernet::HEADER);
        }
        let tags = if keeps_tags { KEEP_VLAN } else { vlan };
        let ethertype = if room.bytes == 0 { link.ethertype } else { room.ethertype };
        let payload = retag(self.context, link.payload as u32, tags, room.bytes as u32, ethertype);
        self.reload();
        if payload == 0 {
            return Err(apart(Reason::Failed));
        }
        let payload = payload as usize & 0x1f;
        self.write(0, hop.link)?;
        Ok(payload)
    }

    #[inline(always)]
    fn reaches(&self, hop: &Hop, redirects: bool) -> bool {
        redirects || self.interface() == hop.port_ifindex
    }

    #[inline(always)]
    fn send(&self, hop: &Hop) -> i32 {
        let port = hop.port_ifindex;
        // SAFETY: a helper that takes numbers.
        if port == self.interface() { xdp_action::XDP_TX as i32 } else { unsafe { bpf_redirect(port, 0) as i32 } }
    }

    #[inline(always)]
    fn send_unresolved(&self, _ifindex: u32, _next_hop: &NextHop) -> i32 {
        Self::PASS
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: the context is the kernel's.
        unsafe { (*self.context).ingress_ifindex }
    }

    /// Marks are set later.
    #[inline(always)]
    fn mark(&self) -> u32 {
        0
    }

    /// A frame from the wire has finished checksums.
    #[inline(always)]
    fn correct(
        &mut self,
        checksum: usize,
        addresses: u64,
        ports: u64,
        kind: Checksum,
        _pseudo_header: Option<u16>,
    ) -> Result<(), Reason> {
        self.correct_finished(checksum, addresses + ports, kind)
    }

    #[inline(always)]
    fn reshape(&mut self, link: usize, keep: usize, grow: usize) -> Result<(), Reason> {
        let cut = (link + keep) as i32 - self.len() as i32;
        // SAFETY: the context is the kernel's; a refusal changes nothing.
        if cut < 0 && unsafe { bpf_xdp_adjust_tail(self.context, cut) } != 0 {
            return Err(Reason::Failed);
        }
        self.grow(grow as i32)
    }

    #[inline(always)]
    fn change_version(&mut self, ethertype: u16, headers: usize) -> Result<(), Reason> {
        let bytes = (mapped::DIFFERENCE * headers) as i32;
        self.grow(if ethertype == ethernet::IPV4 { -bytes } else { bytes })
    }

    /// Moves what stands before the room to the front, because that is less than what stands behind it.
    #[inline(always)]
    fn insert(&mut self, offset: usize, bytes: usize) -> Result<(), Reason> {
        // Hidden: the verifier shall not learn from each step how large the offset is then.
        let moved = move_to_front(self.context, self.opaque(offset) as u32, bytes as u32);
        self.reload();
        if moved { Ok(()) } else { Err(Reason::Failed) }
    }

    #[inline(always)]
    fn bounce(&self) -> i32 {
        xdp_action::XDP_TX as i32
    }
}

/// Moves the beginning of a frame outward, and the first `length` bytes with it. `false`: that is refused.
#[inline(never)]
fn move_to_front(context: *mut xdp_md, length: u32, bytes: u32) -> bool {
    // SAFETY: the context is the kernel's own.
    let mut frame = unsafe { XdpFrame::view(context.cast()) };
    let bytes = bytes as usize & 0x3f;
    if length as usize > HEADERS || frame.grow(bytes as i32).is_err() {
        return false;
    }
    for word in 0..HEADERS / 2 {
        let at = 2 * word;
        if at >= length as usize {
            return true;
        }
        let Some(value) = frame.read::<u16>(at + bytes) else { return false };
        if frame.write(at, value).is_err() {
            return false;
        }
    }
    true
}

/// The longest headers that bytes can be inserted behind: Ethernet, two tags, the largest IPv4 or a plain IPv6 header, TCP.
const HEADERS: usize = 14 + 8 + 60 + 20;

/// The slow part of `address`: the frame has tags to keep, to change, to add or to remove. Returns where the IP header
/// begins, or 0 if it was refused.
#[inline(never)]
fn retag(context: *mut xdp_md, link: u32, vlan: u16, room: u32, ethertype: u16) -> u32 {
    // SAFETY: the context is the kernel's own.
    let mut frame = unsafe { XdpFrame::view(context.cast()) };
    let link = link as usize & 0x1f;
    retag_frame(&mut frame, link, vlan, room as usize & 0x3f, ethertype).unwrap_or(0) as u32
}

#[inline(always)]
fn retag_frame(frame: &mut XdpFrame, link: usize, vlan: u16, room: usize, ethertype: u16) -> Result<usize, Reason> {
    let mut tags: [u32; 2] = [frame.read(12).ok_or(Reason::Malformed)?, frame.read(16).ok_or(Reason::Malformed)?];
    let payload = match vlan {
        KEEP_VLAN => link,
        0 => ethernet::HEADER,
        _ => ethernet::HEADER + ethernet::TAG,
    };
    if vlan != KEEP_VLAN {
        tags[0] = (u32::from(ethernet::VLAN) << 16 | u32::from(vlan)).to_be();
    }
    frame.grow((payload + room) as i32 - link as i32)?;
    if payload > ethernet::HEADER {
        frame.write(12, tags[0])?;
    }
    if payload > ethernet::HEADER + ethernet::TAG {
        frame.write(16, tags[1])?;
    }
    frame.write_ethertype(payload, ethertype)?;
    Ok(payload)
}
