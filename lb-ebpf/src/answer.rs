//! ICMP errors that the director sends to clients: nobody serves this, the time to live ended, the packet is too big.
//! `ipvs-semantics.md`, sections 2.8, 5.1 and 5.4.
//!
//! The packet itself becomes the answer: it is cut to what an error may quote, gets an IP and an ICMP header in front, and
//! goes back to where it came from. Everything here is cold.

use aya_ebpf::{
    cty::c_void,
    helpers::generated::{bpf_csum_diff, bpf_get_prandom_u32, bpf_jiffies64},
};
use lb_common::{
    checksum,
    family::Ipv4,
    packet::{
        Ipv4Header, Network, V4, V6,
        ethernet::{self, EthernetHeader},
        icmp::{Error, IcmpHeader},
        protocol,
    },
    reason::Reason,
};
use lb_ebpf::packet::{Packet, fixed};

use crate::{
    account,
    maps::{ANSWERS, CONFIG, Family, HZ},
};

/// Time to live of what the director itself sends.
const TTL: u8 = 64;
/// Type of service of ICMP errors over IPv4, as Linux sends them: internetwork control.
const TOS: u8 = 0xc0;

/// Turns the packet, of which `length` bytes are the IP packet, into an ICMP error for its sender, and counts why.
#[inline(never)]
pub fn answer<P: Packet, F: Answer>(context: *mut c_void, link: u32, length: u32, why: u32, mtu: u16) -> i32 {
    // SAFETY: the context is the kernel's own.
    let mut packet = unsafe { P::new(context) };
    // The parser's offset, in a form that the verifier can bound.
    let (link, length) = (link as usize & 0x1f, length as usize & 0xffff);
    let sent = write::<P, F>(&mut packet, link, length, why, mtu).map(|why| {
        account::reason(why);
        packet.bounce()
    });
    sent.unwrap_or_else(account::leave::<P>)
}

/// What the sender is told.
#[inline(always)]
const fn error(why: u32, mtu: u16) -> Result<(Error, Reason), Reason> {
    match why {
        NO_ROUTE => Ok((Error::HostUnreachable, Reason::NoRoute)),
        NO_SERVER => Ok((Error::PortUnreachable, Reason::NoServer)),
        TOO_BIG => Ok((Error::TooBig(mtu), Reason::TooBig)),
        TTL_EXPIRED => Ok((Error::TimeExceeded, Reason::TtlExpired)),
        _ => Err(Reason::Failed),
    }
}

/// Makes the packet the answer.
#[inline(always)]
fn write<P: Packet, F: Answer>(packet: &mut P, link: usize, length: usize, why: u32, mtu: u16) -> Result<Reason, Reason> {
    let headers = F::HEADER + size_of::<IcmpHeader>();
    let keep = length.min(F::ICMP_ERROR_MAX - headers);
    let ethernet: EthernetHeader = packet.read(0).ok_or(Reason::Malformed)?;
    let tags: [u32; 2] = [packet.read(12).ok_or(Reason::Malformed)?, packet.read(16).ok_or(Reason::Malformed)?];
    if !within_limit() {
        return Err(Reason::AnswerLimit);
    }
    packet.reshape(link, keep, headers)?;
    packet.write(0, [ethernet.source, ethernet.destination])?;
    if link > ethernet::HEADER {
        packet.write(12, tags[0])?;
    }
    if link > ethernet::HEADER + ethernet::TAG {
        packet.write(16, tags[1])?;
    }
    packet.write_ethertype(link, F::ETHERTYPE)?;
    // Whatever link it is: the verifier shall follow the rest once.
    let link = packet.opaque(link) & 0x1f;
    let quoted = sum::<P>(packet.context(), (link + headers) as u32, (link + headers + keep) as u32);
    let (error, why) = error(why, mtu)?;
    F::write(packet, link, keep, quoted, error)?;
    Ok(why)
}

/// Counts an answer against this CPU's share of the present second.
#[inline(always)]
fn within_limit() -> bool {
    let (Some(config), Some(budget)) = (CONFIG.get(0), ANSWERS.get_ptr_mut(0)) else { return false };
    if config.answers_per_second == 0 {
        return true;
    }
    // SAFETY: a helper without arguments; this CPU's own element.
    unsafe {
        let now = bpf_jiffies64() as u32;
        let [began, sent] = &mut *budget;
        if now.wrapping_sub(*began) >= HZ.load() {
            *began = now;
            *sent = 0;
        }
        *sent += 1;
        *sent <= config.answers_per_second
    }
}

/// The sum of the `length` bytes that are quoted, at least an IP header. Blocks by a helper of the kernel, the rest by
/// words: a loop over all words would cost the verifier half a million steps.
#[inline(never)]
fn sum<P: Packet>(context: *mut c_void, from: u32, end: u32) -> u64 {
    // SAFETY: the context is the kernel's own.
    let packet = unsafe { P::view(context) };
    sum_range(&packet, from as usize, packet.opaque(end as usize)).unwrap_or(0)
}

#[inline(always)]
fn sum_range<P: Packet>(packet: &P, mut from: usize, end: usize) -> Option<u64> {
    let mut total = 0;
    for _ in 0..V6::ICMP_ERROR_MAX / BLOCK {
        from = packet.opaque(from) & REACH;
        if from + BLOCK > end {
            break;
        }
        let block = packet.pointer::<[u8; BLOCK]>(from)?;
        // SAFETY: `pointer` checked the bounds.
        total = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, block.cast(), BLOCK as u32, total as u32) } as u64;
        from += BLOCK;
    }
    for _ in 0..BLOCK / 4 {
        from = packet.opaque(from) & REACH;
        if from + 4 > end {
            break;
        }
        total += u64::from(packet.read::<u32>(from)?);
        from += 4;
    }
    from = packet.opaque(from) & REACH;
    if from + 2 <= end {
        total += u64::from(packet.read::<u16>(from)?);
        from += 2;
    }
    if from < end {
        // The last byte, with the one before it: the verifier follows no single-byte read behind a variable offset.
        let [_, last] = packet.read::<[u8; 2]>(from - 1)?;
        total += u64::from(u16::from_ne_bytes([last, 0]));
    }
    Some(total)
}

/// Offsets within an answer stay below this; a mask, which is what the verifier understands.
const REACH: usize = 0x7ff;
/// Bytes that are summed at once.
const BLOCK: usize = 64;
const NO_ROUTE: u32 = Reason::NoRoute as u32;
const NO_SERVER: u32 = Reason::NoServer as u32;
const TOO_BIG: u32 = Reason::TooBig as u32;
const TTL_EXPIRED: u32 = Reason::TtlExpired as u32;

/// How a family writes an error.
pub trait Answer: Family {
    /// Writes IP and ICMP header in front of `keep` quoted bytes with the sum `quoted`. The addresses are read where the
    /// quoted header stands: copies would not fit on the stack.
    fn write<P: Packet>(packet: &mut P, at: usize, keep: usize, quoted: u64, error: Error) -> Result<(), Reason>;
}

impl Answer for V4 {
    #[inline(always)]
    fn write<P: Packet>(packet: &mut P, at: usize, keep: usize, quoted: u64, error: Error) -> Result<(), Reason> {
        let mut icmp = error.v4();
        icmp.checksum = checksum::finish(quoted + icmp.sum());
        let behind = at + Self::HEADER + size_of::<IcmpHeader>();
        let [source, destination]: [Ipv4; 2] = packet.read(fixed(behind + Self::ADDRESSES)).ok_or(Reason::Failed)?;
        let length = ((Self::HEADER + size_of::<IcmpHeader>() + keep) as u16).to_be();
        // SAFETY: a helper without arguments.
        let id = unsafe { bpf_get_prandom_u32() } as u16;
        let sum = u64::from(u16::from_ne_bytes([0x45, TOS]))
            + u64::from(length)
            + u64::from(id)
            + u64::from(u16::from_ne_bytes([TTL, protocol::ICMP]))
            + u64::from(source)
            + u64::from(destination);
        packet.write(
            fixed(at),
            Ipv4Header {
                version_length: 0x45,
                tos: TOS,
                length,
                id,
                fragment: 0,
                ttl: TTL,
                protocol: protocol::ICMP,
                checksum: checksum::finish(sum),
                source: destination,
                destination: source,
            },
        )?;
        packet.write(fixed(at + Self::HEADER), icmp)
    }
}

impl Answer for V6 {
    #[inline(always)]
    fn write<P: Packet>(packet: &mut P, at: usize, keep: usize, quoted: u64, error: Error) -> Result<(), Reason> {
        let mut icmp = error.v6();
        let behind = at + Self::HEADER + size_of::<IcmpHeader>();
        let length = ((size_of::<IcmpHeader>() + keep) as u16).to_be();
        let mut sum = quoted + icmp.sum() + u64::from(length) + u64::from(u16::from(protocol::ICMPV6).to_be());
        for word in 0..4 {
            let from = packet.read::<u32>(fixed(behind + Self::ADDRESSES + 4 * word)).ok_or(Reason::Failed)?;
            let to = packet.read::<u32>(fixed(behind + Self::ADDRESSES + 16 + 4 * word)).ok_or(Reason::Failed)?;
            sum += u64::from(from) + u64::from(to);
            packet.write(fixed(at + Self::ADDRESSES + 4 * word), to)?;
            packet.write(fixed(at + Self::ADDRESSES + 16 + 4 * word), from)?;
        }
        icmp.checksum = checksum::finish(sum);
        packet.write(fixed(at), (6_u32 << 28).to_be())?;
        packet.write(fixed(at + 4), length)?;
        packet.write(fixed(at + 6), [protocol::ICMPV6, TTL])?;
        packet.write(fixed(at + Self::HEADER), icmp)
    }
}
