//! A packet in the kernel: an XDP frame or a tc buffer, behind one trait.
//!
//! Every access is checked against the end of the data, in the form that the verifier understands. Helpers of the
//! kernel that move data make all earlier pointers void; the implementations read both ends anew after each.

mod tc;
mod xdp;

use aya_ebpf::cty::c_void;
use lb_common::{
    Plain, checksum,
    hop::Hop,
    packet::{Bytes, Fragment, Payload, ethernet::Link},
    reason::Reason,
    server::NextHop,
};
pub use tc::TcBuffer;
pub use xdp::XdpFrame;

/// What a hook can do with a packet.
pub trait Packet: Bytes {
    /// Verdict: the kernel's own stack goes on with the packet.
    const PASS: i32;
    /// Verdict: the packet ends here.
    const DROP: i32;
    /// Whether the hook can leave the next hop's MAC address to the kernel's neighbour code.
    const RESOLVES: bool;

    /// The packet of a program's context, with its headers where they can be read.
    unsafe fn new(context: *mut c_void) -> Self;

    /// The packet of a program's context, as it is. Unlike `new` it never moves data, which would make the caller's
    /// pointers void.
    unsafe fn view(context: *mut c_void) -> Self;

    /// The context, to hand to functions of their own stack frame.
    fn context(&self) -> *mut c_void;

    /// A pointer into the packet, or nothing if the value would reach beyond the end.
    fn pointer<T: Plain>(&self, offset: usize) -> Option<*mut T>;

    /// Copies so many bytes of the packet, wherever they lie. `false`: they are not there.
    ///
    /// # Safety
    /// There is room for them.
    unsafe fn load(&self, offset: u32, to: *mut u8, length: u32) -> bool;

    /// Why a write is refused. How that is said decides where LLVM puts the refusals, and with them the common ways: with
    /// [`apart`], tc's replies of IPv4 took 55 ns instead of 63. That was in one place of the memory each; in others the same code
    /// takes 54 to 67 ns. At XDP it makes no difference that is sure.
    fn beyond_the_end() -> Reason;

    /// Writes a value, or says that it would reach beyond the end.
    #[inline(always)]
    fn write<T: Plain>(&mut self, offset: usize, value: T) -> Result<(), Reason> {
        let Some(pointer) = self.pointer::<T>(offset) else { return Err(Self::beyond_the_end()) };
        // SAFETY: `pointer` checked the bounds; BPF's memory accesses need no alignment on the targets that we build for.
        unsafe { pointer.write(value) };
        Ok(())
    }

    /// Writes the type of the payload, which stands right before it.
    #[inline(always)]
    fn write_ethertype(&mut self, payload: usize, ethertype: u16) -> Result<(), Reason> {
        // Hidden and masked: else LLVM goes back from a pointer to the payload, and Linux 6.1 allows no negative offset there.
        let at = self.opaque(payload - 2) & 0x1f;
        self.write(at, ethertype.to_be())
    }

    /// Whether a packet whose IP length is above `mtu` still fits because it will be cut into segments that do.
    fn fits_in_segments(&self, headers: usize, mtu: u16) -> bool;

    /// Whether the packet will be cut into segments behind us.
    fn is_segmented(&self) -> bool;

    /// Whether the hook can make room for headers in this frame. If not, nothing about the packet may be changed before it is
    /// left to the VLAN's own device.
    fn takes_headers(&self, link: &Link) -> bool;

    /// Makes `room` bytes for outer headers between the Ethernet and the IP header, and addresses the frame to the
    /// next hop, with the VLAN tag that its way wants. Returns where the (outer) IP header begins.
    fn address(&mut self, link: &Link, hop: &Hop, room: Room) -> Result<usize, Reason>;

    /// Whether the hook can send packets out of the hop's device at all; `redirects` says whether XDP can that came in by
    /// another one.
    fn reaches(&self, hop: &Hop, redirects: bool) -> bool;

    /// Sends the packet out of the hop's device.
    fn send(&self, hop: &Hop) -> i32;

    /// Sends the packet out of a device, to a next hop that the kernel has to resolve first. Nothing is sent before the
    /// program has ended.
    fn send_unresolved(&self, ifindex: u32, next_hop: &NextHop) -> i32;

    /// The index of the device that the packet came in by.
    fn interface(&self) -> u32;

    /// The packet's firewall mark; 0 for none.
    fn mark(&self) -> u32;

    /// Corrects a checksum after the packet was changed: `addresses` is what the words of the addresses have gained, which
    /// a pseudo-header repeats, and `ports` what other words have, neither folded. Whether the checksum is finished, or to be
    /// finished by a device, is the hook's to know; `pseudo_header` helps it to, the folded sum of the pseudo-header before
    /// the change.
    fn correct(
        &mut self,
        checksum: usize,
        addresses: u64,
        ports: u64,
        kind: Checksum,
        pseudo_header: Option<u16>,
    ) -> Result<(), Reason>;

    /// Corrects a finished checksum.
    #[inline(always)]
    fn correct_finished(&mut self, checksum: usize, gained: u64, kind: Checksum) -> Result<(), Reason> {
        let pointer = self.pointer::<u16>(checksum).ok_or(Reason::Malformed)?;
        // SAFETY: `pointer` checked the bounds.
        unsafe {
            let old = pointer.read();
            if kind == Checksum::Udp && old == 0 {
                return Ok(());
            }
            let new = checksum::gain(old, gained);
            pointer.write(if kind == Checksum::Udp && new == 0 { 0xffff } else { new });
        }
        Ok(())
    }

    /// Cuts the packet to `keep` bytes behind its Ethernet header of `link` bytes, and makes `grow` bytes of room in
    /// between; the Ethernet header has to be written again.
    fn reshape(&mut self, link: usize, keep: usize, grow: usize) -> Result<(), Reason>;

    /// Takes the difference of IPv6's header to IPv4's away from the packet, or adds it, by what `ethertype` it shall have: as many
    /// times as it has `headers`. What stands there then, from the first byte of the frame to the end of the last header, has to be
    /// written again.
    fn change_version(&mut self, ethertype: u16, headers: usize) -> Result<(), Reason>;

    /// Makes `bytes` bytes of room at `offset`, which is even. They hold anything.
    fn insert(&mut self, offset: usize, bytes: usize) -> Result<(), Reason>;

    /// Sends the packet back out of the device that it came in by.
    fn bounce(&self) -> i32;
}

/// The part of a packet that programs can read and write: from its first byte to the end of the data, or of the linear
/// part of it.
#[derive(Clone, Copy)]
struct Span {
    start: usize,
    end: usize,
}

impl Span {
    /// Reads both ends from a context, whose type is the caller's. They must be read by volatile loads: otherwise LLVM
    /// keeps them as 32-bit numbers across calls, and the verifier then no longer knows them as packet pointers.
    #[inline(always)]
    unsafe fn of(data: *const u32, data_end: *const u32) -> Self {
        // SAFETY: the caller's promise: two fields of the kernel's context.
        unsafe { Self { start: data.read_volatile() as usize, end: data_end.read_volatile() as usize } }
    }

    /// The comparison by which the verifier learns how far the pointer may reach.
    #[inline(always)]
    fn pointer<T: Plain>(&self, offset: usize) -> Option<*mut T> {
        let pointer = self.start + offset;
        if pointer + size_of::<T>() > self.end { None } else { Some(pointer as *mut T) }
    }

    #[inline(always)]
    fn read<T: Plain>(&self, offset: usize) -> Option<T> {
        // SAFETY: `pointer` checked the bounds.
        self.pointer::<T>(offset).map(|pointer| unsafe { pointer.read() })
    }

    #[inline(always)]
    const fn len(&self) -> usize {
        self.end - self.start
    }
}

/// Which checksum.
#[derive(Clone, Copy, Eq, PartialEq)]
pub enum Checksum {
    /// TCP's.
    Tcp,
    /// UDP's: 0 means that there is none, and stays.
    Udp,
}

/// Room for outer headers, and what they will be: tc has to know, so that big packets are cut right.
#[derive(Clone, Copy)]
pub struct Room {
    /// Bytes; 0 for none.
    pub bytes: usize,
    /// Ethernet type of the outer header, in host order.
    pub ethertype: u16,
    /// IP protocol behind the outer IP header.
    pub protocol: u8,
}

impl Room {
    /// No outer header.
    pub const NONE: Self = Self { bytes: 0, ethertype: 0, protocol: 0 };
}

/// What a rare way results in. Without it, LLVM makes the result ready before it asks whether that way is taken, and every packet
/// pays for it. Here the rare way does something of its own, though it means nothing.
#[inline(always)]
pub fn apart<T>(result: T) -> T {
    // SAFETY: a register that nobody uses. (No instruction at all would be two lines of debugging information in one place.)
    #[cfg(target_arch = "bpf")]
    unsafe {
        core::arch::asm!("{0} = 0", out(reg) _, options(nomem, nostack, preserves_flags))
    };
    result
}

/// An offset that is known only at run time, ready for one access. LLVM computes pointers to neighbouring fields from each
/// other, and checks one where it uses another; the verifier takes such pointers for unrelated. Here LLVM sees no neighbours.
#[inline(always)]
pub fn fixed(offset: usize) -> usize {
    #[cfg(target_arch = "bpf")]
    {
        let mut offset = offset;
        // SAFETY: a register is copied to itself. (No instruction at all would be two lines of debugging information in one place.)
        unsafe { core::arch::asm!("{0} = {0}", inout(reg) offset, options(pure, nomem, nostack, preserves_flags)) };
        offset
    }
    #[cfg(not(target_arch = "bpf"))]
    offset
}

/// A payload of which the verifier only knows that it begins within the reach of the parser: however the parser found it, what
/// follows is verified once.
#[inline(always)]
pub fn merged<B: Bytes>(packet: &B, payload: &Payload) -> Payload {
    let word = payload.offset & REACH | (payload.protocol as usize) << 16 | (payload.fragment as usize) << 24;
    let word = packet.opaque(word);
    let fragment = match word >> 24 & 3 {
        0 => Fragment::Whole,
        1 => Fragment::First,
        _ => Fragment::Later,
    };
    let fragment_id = packet.opaque(payload.fragment_id as usize) as u32;
    Payload { offset: word & REACH, protocol: (word >> 16) as u8, fragment_id, fragment }
}

/// How far into a frame a transport header may begin, beyond what parsers walk: a mask, which is what the verifier understands.
pub const REACH: usize = 0x7ff;

/// A value as one that the verifier knows nothing about: exclusive-or with something unknown, twice.
#[cfg(target_arch = "bpf")]
#[inline(always)]
fn opaque(value: usize, unknown: usize) -> usize {
    let mut value = value;
    // SAFETY: arithmetic on registers.
    unsafe {
        core::arch::asm!("{value} ^= {unknown}", "{value} ^= {unknown}", value = inout(reg) value, unknown = in(reg) unknown,
            options(pure, nomem, nostack, preserves_flags));
    }
    value
}

/// On the host the crate is only checked.
#[cfg(not(target_arch = "bpf"))]
const fn opaque(value: usize, _unknown: usize) -> usize {
    value
}
