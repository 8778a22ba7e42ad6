//! tc buffers: what XDP cannot do, or what arrives where XDP costs more than it gives.
//!
//! The kernel has taken a frame's outer VLAN tag off by now; it stands beside the data. A packet may be larger than any
//! frame (TSO, GRO); it is cut into segments behind us.

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L4_GRE,
        BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
        TC_ACT_SHOT,
        bpf_adj_room_mode::{BPF_ADJ_ROOM_MAC, BPF_ADJ_ROOM_NET},
        bpf_redir_neigh,
    },
    cty::c_void,
    helpers::generated::{
        bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh, bpf_skb_adjust_room, bpf_skb_change_proto, bpf_skb_change_tail,
        bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes, bpf_skb_vlan_pop,
    },
};
use lb_common::{
    Plain, checksum as sum,
    hop::{Hop, KEEP_VLAN},
    packet::{
        Bytes,
        ethernet::{self, Link},
        mapped, protocol,
    },
    reason::Reason,
    server::NextHop,
};

use super::{Checksum, Packet, Room, Span, apart};

/// A socket buffer at the tc hook.
pub struct TcBuffer {
    context: *mut __sk_buff,
    span: Span,
}

/// Headers that must lie in the linear part of a buffer: Ethernet, two tags, the largest IPv4 or a plain IPv6 header,
/// TCP. Longer chains of IPv6 extensions are pulled in by the kernel long before; if not, they count as cut off.
const HEADERS: usize = 14 + 8 + 60 + 20;

/// The same for an ICMP error: Ethernet, two headers of IPv6, ICMP, and the ports.
const HEADERS_WITH_QUOTED: usize = 14 + 40 + 8 + 40 + 20;

impl TcBuffer {
    #[inline(always)]
    fn reload(&mut self) {
        // SAFETY: the kernel gave us the context.
        self.span = unsafe { Span::of(&raw const (*self.context).data, &raw const (*self.context).data_end) };
    }
}

impl Bytes for TcBuffer {
    #[inline(always)]
    fn read<T: Plain>(&self, offset: usize) -> Option<T> {
        self.span.read(offset)
    }

    #[inline(always)]
    fn opaque(&self, value: usize) -> usize {
        super::opaque(value, self.len())
    }

    /// The whole packet, not only the linear part.
    #[inline(always)]
    fn len(&self) -> usize {
        // SAFETY: the context is the kernel's.
        unsafe { (*self.context).len as usize }
    }
}

impl Packet for TcBuffer {
    const PASS: i32 = -1; // TC_ACT_UNSPEC: the next program on this hook goes on
    const DROP: i32 = TC_ACT_SHOT;
    const RESOLVES: bool = true;

    #[inline(always)]
    unsafe fn new(context: *mut c_void) -> Self {
        // SAFETY: the caller's promise.
        let mut buffer = unsafe { Self::view(context) };
        let linear = buffer.span.len();
        if linear < HEADERS && linear < buffer.len() {
            // SAFETY: the context is the kernel's; if it refuses, the bounds checks say so later.
            unsafe { bpf_skb_pull_data(buffer.context, HEADERS.min(buffer.len()) as u32) };
            buffer.reload();
        }
        buffer
    }

    #[inline(always)]
    unsafe fn view(context: *mut c_void) -> Self {
        let mut buffer = Self { context: context.cast(), span: Span { start: 0, end: 0 } };
        buffer.reload();
        buffer
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
        apart(Reason::Malformed)
    }

    #[inline(always)]
    unsafe fn load(&self, offset: u32, to: *mut u8, length: u32) -> bool {
        // SAFETY: the caller's promise, and the context is the kernel's.
        unsafe { bpf_skb_load_bytes(self.context.cast(), offset, to.cast(), length) == 0 }
    }

    #[inline(always)]
    fn fits_in_segments(&self, headers: usize, mtu: u16) -> bool {
        // SAFETY: the context is the kernel's.
        let segment = unsafe { (*self.context).gso_size } as usize;
        segment != 0 && headers + segment <= mtu as usize
    }

    #[inline(always)]
    fn is_segmented(&self) -> bool {
        // SAFETY: the context is the kernel's.
        unsafe { (*self.context).gso_size != 0 }
    }

    /// The kernel makes room directly behind the Ethernet header: a tag within the data would end up inside the tunnel.
    #[inline(always)]
    fn takes_headers(&self, link: &Link) -> bool {
        link.payload == ethernet::HEADER
    }

    #[inline(always)]
    fn address(&mut self, link: &Link, hop: &Hop, room: Room) -> Result<usize, Reason> {
        // SAFETY: the context is the kernel's.
        let tagged = unsafe { (*self.context).vlan_present != 0 };
        if tagged && hop.vlan != KEEP_VLAN {
            // SAFETY: the context is the kernel's. The VLAN's own device puts the right tag on.
            if unsafe { bpf_skb_vlan_pop(self.context) } != 0 {
                return Err(Reason::Failed);
            }
            self.reload();
        }
        if room.bytes != 0 {
            if !self.takes_headers(link) {
                return Err(Reason::Vlan);
            }
            let outer = if room.ethertype == ethernet::IPV4 { BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 } else { BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 };
            let transport = match room.protocol {
                protocol::UDP => BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
                protocol::GRE => BPF_F_ADJ_ROOM_ENCAP_L4_GRE,
                _ => 0,
            };
            let flags = BPF_F_ADJ_ROOM_FIXED_GSO | outer | transport;
            // SAFETY: the context is the kernel's; a refusal changes nothing.
            if unsafe { bpf_skb_adjust_room(self.context, room.bytes as i32, BPF_ADJ_ROOM_MAC, flags as u64) } != 0 {
                return Err(Reason::Failed);
            }
            self.reload();
            self.write(12, room.ethertype.to_be())?;
        }
        self.write(0, hop.link)?;
        Ok(link.payload)
    }

    #[inline(always)]
    fn reaches(&self, _hop: &Hop, _redirects: bool) -> bool {
        true
    }

    #[inline(always)]
    fn send(&self, hop: &Hop) -> i32 {
        // SAFETY: a helper that takes numbers.
        unsafe { bpf_redirect(hop.ifindex, 0) as i32 }
    }

    #[inline(always)]
    fn send_unresolved(&self, ifindex: u32, next_hop: &NextHop) -> i32 {
        // SAFETY: zeros are a value of the structure; the kernel reads it and forgets it.
        unsafe {
            let mut to: bpf_redir_neigh = core::mem::zeroed();
            to.nh_family = next_hop.family;
            to.__bindgen_anon_1.ipv6_nh = next_hop.address;
            bpf_redirect_neigh(ifindex, &raw mut to, size_of::<bpf_redir_neigh>() as i32, 0) as i32
        }
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: the context is the kernel's.
        unsafe { (*self.context).ifindex }
    }

    #[inline(always)]
    fn mark(&self) -> u32 {
        // SAFETY: the context is the kernel's.
        unsafe { (*self.context).mark }
    }

    /// Only the kernel knows whether a checksum is finished. If not, it is the sum of the pseudo-header alone, and the
    /// addresses count the other way round. So one that is no such sum is finished, and the kernel need not be asked. (A
    /// finished one may equal that sum by chance; therefore it is asked otherwise.)
    #[inline(always)]
    fn correct(
        &mut self,
        checksum: usize,
        addresses: u64,
        ports: u64,
        kind: Checksum,
        pseudo_header: Option<u16>,
    ) -> Result<(), Reason> {
        if let Some(unfinished) = pseudo_header
            && !self.is_segmented()
            && self.read::<u16>(checksum) != Some(unfinished)
        {
            return self.correct_finished(checksum, addresses + ports, kind);
        }
        let kind = if kind == Checksum::Udp { BPF_F_MARK_MANGLED_0 } else { 0 };
        let corrected = correct_unfinished(self.context, checksum as u32, addresses, ports, kind);
        self.reload();
        if corrected { Ok(()) } else { Err(Reason::Failed) }
    }

    #[inline(always)]
    fn reshape(&mut self, link: usize, keep: usize, grow: usize) -> Result<(), Reason> {
        if link != ethernet::HEADER {
            return Err(Reason::Vlan);
        }
        // SAFETY: the context is the kernel's; a refusal changes nothing that matters, the packet is dropped.
        unsafe {
            if bpf_skb_change_tail(self.context, (link + keep) as u32, 0) != 0 {
                return Err(Reason::Failed);
            }
            if bpf_skb_adjust_room(self.context, grow as i32, BPF_ADJ_ROOM_MAC, 0) != 0 {
                return Err(Reason::Failed);
            }
            bpf_skb_pull_data(self.context, (link + grow + keep) as u32);
        }
        self.reload();
        Ok(())
    }

    /// The kernel does it to the packet's own header, and sees to large ones that are to be cut; the quoted header is as room behind
    /// that one.
    #[inline(always)]
    fn change_version(&mut self, ethertype: u16, headers: usize) -> Result<(), Reason> {
        const DIFFERENCE: i32 = mapped::DIFFERENCE as i32;
        // SAFETY: the context is the kernel's; a refusal leaves a packet that is dropped.
        unsafe {
            if bpf_skb_change_proto(self.context, ethertype.to_be(), 0) != 0 {
                return Err(Reason::Failed);
            }
            let quoted = if ethertype == ethernet::IPV4 { -DIFFERENCE } else { DIFFERENCE };
            if headers == 2 && bpf_skb_adjust_room(self.context, quoted, BPF_ADJ_ROOM_NET, 0) != 0 {
                return Err(Reason::Failed);
            }
            bpf_skb_pull_data(self.context, HEADERS_WITH_QUOTED.min(self.len()) as u32);
        }
        self.reload();
        Ok(())
    }

    /// Moves what stands behind the room to the end: an unfinished checksum begins at a place that is counted from the front.
    #[inline(always)]
    fn insert(&mut self, offset: usize, bytes: usize) -> Result<(), Reason> {
        if !move_to_end(self.context, offset as u32, bytes as u32) {
            return Err(Reason::Failed);
        }
        self.reload();
        Ok(())
    }

    #[inline(always)]
    fn bounce(&self) -> i32 {
        // SAFETY: the context is the kernel's.
        unsafe { bpf_redirect((*self.context).ingress_ifindex, 0) as i32 }
    }
}

/// Has the kernel correct a checksum that may not be finished. `false`: it refused. In a function of its own, for the sake of the
/// stack.
#[inline(never)]
fn correct_unfinished(context: *mut __sk_buff, checksum: u32, addresses: u64, ports: u64, kind: u32) -> bool {
    let replace = |difference: u16, flags: u32| {
        // SAFETY: the context is the kernel's; a refusal changes nothing.
        unsafe { bpf_l4_csum_replace(context, checksum, 0, difference.into(), (flags | kind).into()) == 0 }
    };
    let ports = sum::fold(ports);
    // Zero has two faces in one's complement.
    replace(sum::fold(addresses), BPF_F_PSEUDO_HDR) && (ports == 0 || ports == 0xffff || replace(ports, 0))
}

/// Bytes that are moved at once.
const CHUNK: usize = 128;
/// Enough for frames of 9000 bytes.
const CHUNKS: usize = 72;

/// Makes a buffer longer, and moves all bytes from `offset` on by that much. `false`: the kernel refused. In a function of its
/// own, for the sake of the stack.
#[inline(never)]
fn move_to_end(context: *mut __sk_buff, offset: u32, bytes: u32) -> bool {
    // SAFETY: the context is the kernel's; what is refused leaves a packet that is dropped.
    unsafe {
        let mut end = (*context).len;
        if bpf_skb_change_tail(context, end + bytes, 0) != 0 {
            return false;
        }
        let mut chunk = [0_u8; CHUNK];
        let place = (&raw mut chunk).cast::<c_void>();
        for _ in 0..CHUNKS {
            if end <= offset {
                return true;
            }
            // One to 128, in a form from which every verifier sees both bounds, and that all steps have in common.
            let length = (super::opaque((end - offset).min(CHUNK as u32) as usize - 1, end as usize) & (CHUNK - 1)) as u32 + 1;
            end -= length;
            if bpf_skb_load_bytes(context.cast(), end, place, length) != 0
                || bpf_skb_store_bytes(context, end + bytes, place, length, u64::from(BPF_F_RECOMPUTE_CSUM)) != 0
            {
                return false;
            }
        }
        end <= offset
    }
}
