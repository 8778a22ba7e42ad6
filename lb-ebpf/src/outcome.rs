//! How a packet's way ends: with a verdict of the hook, or with something rare that is still to be done.
//!
//! An outcome is one word, which is what a function can return without memory. The rare things are done by the outermost
//! function, after all others have returned: BPF gives 512 bytes of stack to a whole chain of calls, and each of these
//! functions needs a good part of it.
//!
//! ```text
//! verdict   0..31 the verdict
//! reply     nothing, or, with bit 57, 0..31 the verdict
//! wrap      0..31 the real server's index, 32..36 length of the Ethernet header, 37..48 outer VLAN
//! translate 0..23 the real server's index, 24..55 the local address and port
//! name      nothing: bits 58 and 59
//! answer    0..15 MTU, 16..31 length of the IP packet, 32..36 length of the Ethernet header, 40..47 the reason
//! bit 60: IPv6    bits 57..59, 61..63: which of them (61: the packet is odd, which is all)
//! ```

use lb_common::{
    connection::Leg,
    local::Local,
    packet::{Network, V4, V6, ethernet::Link},
    reason::{Fate, Reason},
};
use lb_ebpf::packet::Packet;

use crate::{
    account, answer, cross, forward,
    maps::{DEFERRED, Family},
    reply, toa,
};

/// What is left to do with a packet.
#[derive(Clone, Copy)]
pub struct Outcome(u64);

impl Outcome {
    const ATTENDED: u64 = 1 << 57;
    const REPLY: u64 = 1 << 58;
    const TRANSLATE: u64 = 1 << 59;
    const NAME: u64 = Self::REPLY | Self::TRANSLATE;
    /// Nothing is decided: the packet needs a closer look.
    pub const ODD: Self = Self(1 << 61);
    const WRAP: u64 = 1 << 62;
    const ANSWER: u64 = 1 << 63;
    const IS_V6: u64 = 1 << 60;

    /// The packet is done with.
    #[inline(always)]
    pub const fn verdict(verdict: i32) -> Self {
        Self(verdict as u32 as u64)
    }

    /// The packet is not for us, or ends here.
    #[inline(always)]
    pub fn left<P: Packet>(why: Reason) -> Self {
        Self::verdict(account::leave::<P>(why))
    }

    /// The packet is for no virtual address, but may be a reply.
    #[inline(always)]
    pub const fn reply<F: Family>() -> Self {
        Self(Self::REPLY | Self::family::<F>())
    }

    /// The packet is a reply that only has to be translated and sent.
    #[inline(always)]
    pub const fn translate_reply<F: Family>(verdict: i32) -> Self {
        Self(Self::ATTENDED | Self::family::<F>() | verdict as u32 as u64)
    }

    /// The packet is to be translated for a real server.
    #[inline(always)]
    pub const fn translate<F: Family>(leg: Leg) -> Self {
        let word = leg.server() as u64 & 0xff_ffff | (leg.local().0 as u64) << 24;
        Self(Self::TRANSLATE | Self::family::<F>() | word)
    }

    /// The packet is to be translated for a real server that has still to be told who its client is.
    #[inline(always)]
    pub const fn name<F: Family>() -> Self {
        Self(Self::NAME | Self::family::<F>())
    }

    /// Where a packet goes that is to be translated.
    #[inline(always)]
    const fn leg(self) -> Leg {
        Leg::new(self.0 as u32 & 0xff_ffff, Local((self.0 >> 24) as u32))
    }

    /// The packet is to be put into a tunnel that has a header of its own.
    #[inline(always)]
    pub const fn wrap<F: Family>(server: u32, link: &Link) -> Self {
        let link = (link.payload as u64 & 0x1f) << 32 | (link.vlan as u64 & 0xfff) << 37;
        Self(Self::WRAP | Self::family::<F>() | server as u64 | link)
    }

    /// The packet was not forwarded: its sender is told, if there is something to tell.
    #[inline(always)]
    pub fn refused<P: Packet, F: Family>(why: Reason, mtu: u16, link: &Link, length: usize) -> Self {
        if why.fate() != Fate::Answered {
            return Self::left::<P>(why);
        }
        let word = u64::from(mtu) | (length as u64 & 0xffff) << 16 | (link.payload as u64 & 0x1f) << 32 | (why as u64) << 40;
        Self(Self::ANSWER | Self::family::<F>() | word)
    }

    #[inline(always)]
    const fn family<F: Family>() -> u64 {
        if F::HEADER == <V6 as Network>::HEADER { Self::IS_V6 } else { 0 }
    }

    /// The same, however it came about: the verifier shall follow what is left to do once.
    #[inline(always)]
    pub fn merged<P: Packet>(self, packet: &P) -> Self {
        Self(packet.opaque(self.0 as usize) as u64)
    }

    /// Does what is left. The result is a verdict of the hook.
    #[inline(always)]
    pub fn settle<P: Packet>(self, packet: &P) -> i32 {
        if self.0 >> 32 == 0 {
            return self.0 as i32;
        }
        if self.0 & Self::ODD.0 != 0 {
            return Self::NEXT_ODD;
        }
        if self.0 & (Self::REPLY | Self::TRANSLATE) != 0 {
            return self.defer();
        }
        if self.0 & Self::IS_V6 != 0 { self.finish::<P, V6>(packet) } else { self.finish::<P, V4>(packet) }
    }

    /// In the place of a verdict: the program for odd packets goes on.
    pub const NEXT_ODD: i32 = i32::MIN;
    /// In the place of a verdict: the program for translation goes on.
    pub const NEXT_TRANSLATE: i32 = i32::MIN + 1;
    /// In the place of a verdict: the program that makes packets of the other version goes on.
    pub const NEXT_CROSS: i32 = i32::MIN + 2;
    /// In the place of a verdict: the program that reads SIP goes on, and then that for odd packets.
    pub const NEXT_SIP: i32 = i32::MIN + 3;

    /// Leaves what is left to the program for translation.
    #[inline(always)]
    pub fn defer(self) -> i32 {
        if let Some(word) = DEFERRED.get_ptr_mut(0) {
            // SAFETY: this CPU's own element.
            unsafe { *word = self.0 };
        }
        Self::NEXT_TRANSLATE
    }

    /// Does what was left to the program for translation.
    #[inline(always)]
    pub fn resume<P: Packet>(packet: &P) -> i32 {
        let Some(word) = DEFERRED.get_ptr(0) else { return P::PASS };
        // SAFETY: this CPU's own element.
        let outcome = Self(unsafe { *word });
        let outcome = match outcome.0 & Self::NAME {
            Self::NAME => outcome.named::<P>(packet),
            Self::REPLY if outcome.0 & Self::IS_V6 != 0 => Self::reply_of::<P, V6>(packet),
            Self::REPLY => Self::reply_of::<P, V4>(packet),
            _ => outcome,
        };
        let outcome = outcome.merged(packet);
        if outcome.0 & Self::TRANSLATE != 0 {
            let (context, leg) = (packet.context(), outcome.leg());
            let is_v6 = outcome.0 & Self::IS_V6 != 0;
            return if is_v6 { forward::translate::<P, V6>(context, leg) } else { forward::translate::<P, V4>(context, leg) };
        }
        if outcome.0 & Self::ANSWER == 0 {
            return outcome.0 as i32;
        }
        if outcome.0 & Self::IS_V6 != 0 { outcome.answer::<P, V6>(packet) } else { outcome.answer::<P, V4>(packet) }
    }

    /// Does what was left to the program that makes packets of the other version: the packet was translated for a real server, or
    /// it is a reply.
    #[inline(always)]
    pub fn resume_cross<P: Packet>(packet: &P) -> i32 {
        let Some(word) = DEFERRED.get_ptr(0) else { return P::PASS };
        // SAFETY: this CPU's own element.
        let outcome = Self(unsafe { *word });
        if outcome.0 & Self::TRANSLATE != 0 {
            return cross::request::<P>(packet.context(), outcome.leg());
        }
        let outcome = cross::reply::<P>(packet.context()).merged(packet);
        if outcome.0 & Self::ANSWER == 0 { outcome.0 as i32 } else { outcome.answer::<P, V4>(packet) }
    }

    #[inline(always)]
    fn named<P: Packet>(self, packet: &P) -> Self {
        if self.0 & Self::IS_V6 != 0 { toa::request::<P, V6>(packet.context()) } else { toa::request::<P, V4>(packet.context()) }
    }

    #[inline(always)]
    fn reply_of<P: Packet, F: Family>(packet: &P) -> Self {
        let outcome = reply::attend::<P, F>(packet.context()).merged(packet);
        if outcome.0 & Self::ATTENDED == 0 { outcome } else { reply::deliver::<P, F>(packet.context(), outcome.0 as i32) }
    }

    #[inline(always)]
    fn finish<P: Packet, F: answer::Answer>(self, packet: &P) -> i32 {
        let link = (self.0 >> 32) as u32 & 0x1f;
        if self.0 & Self::WRAP != 0 {
            return forward::wrap::<P, F>(packet.context(), link, (self.0 >> 37) as u32 & 0xfff, self.0 as u32);
        }
        self.answer::<P, F>(packet)
    }

    #[inline(always)]
    fn answer<P: Packet, F: answer::Answer>(self, packet: &P) -> i32 {
        let link = (self.0 >> 32) as u32 & 0x1f;
        let (length, why) = ((self.0 >> 16) as u32 & 0xffff, (self.0 >> 40) as u32 & 0xff);
        answer::answer::<P, F>(packet.context(), link, length, why, self.0 as u16)
    }
}
