//! Whom did this destination go to before? The caches of lblc and lblcr, as the datapath and the daemon share them.
//!
//! lblc and lblcr stand before transparent caches: connections go to addresses all over the world, and those to one address
//! shall meet the same real server, which has its pages already. So the datapath remembers, by (service, destination
//! address), which real servers took the last connections: a [`Destination`]. With lblc that is one; with lblcr it is a
//! set, which grows while its servers are too busy and shrinks after a day.
//!
//! ```text
//! a new connection ──► remembered, in its service, and not too busy? ──yes──► there
//!                                                            └──────no──────► the schedule's pick, which is remembered
//! ```
//!
//! What "too busy" is depends on live counters and on weights. The datapath reads the counters where it counts; the daemon
//! tells it of each server's [`Standing`], and of one server that is far from busy, the *witness*: IPVS leaves a busy
//! server only if some server of the service has less than half of the active connections that its weight allows.
//!
//! A destination may be remembered for longer than a real server's index is its own. So it remembers a *member*, the index
//! and its generation, which goes up when the index is dealt anew: [`Standing::member`].
//!
//! Everything is made to be changed in place by several CPUs at once. Each field is a word of its own, and whatever mixture
//! they leave behind names servers that are checked before they are used.

use crate::{server::Counters, wire::plain};

/// The key of a destination.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct DestinationKey<A> {
    /// Index of the service.
    pub service: u32,
    /// The address that the client's packet is sent to, in network order.
    pub address: A,
}

/// Real servers that one destination can have. IPVS has no limit. Here, in a set that is full, the one with the most to do
/// for its weight makes room for the next; and when all of them are busy the schedule is asked, as if there was no set.
pub const MEMBERS: usize = 14;

/// What is remembered of a destination.
#[doc(alias = "ip_vs_lblc_entry")]
#[doc(alias = "ip_vs_lblcr_entry")]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Destination {
    /// When a connection last asked, in jiffies (the low 32 bits).
    pub last_used: u32,
    /// When a member last came or went, in jiffies (the low 32 bits).
    pub last_changed: u32,
    /// The members, the newest first; then zeros.
    pub members: [u32; MEMBERS],
}

plain! {
    Destination = 64,
    DestinationKey<crate::family::Ipv4> = 8,
    DestinationKey<crate::family::Ipv6> = 20,
}

/// What the datapath has to know of a real server to judge whether it goes on serving a destination.
///
/// It stands in an array by the server's index. All of it is one word, so that one store changes it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Standing(u64);

/// Bits of a member that hold the index, increased by one so that no member is zero. The others hold the generation.
const INDEX_BITS: u32 = 18;

impl Standing {
    const GENERATION: u64 = (1 << (32 - INDEX_BITS)) - 1;
    const AVAILABLE: u64 = 1 << 14;
    const OVERLOADED: u64 = 1 << 15;

    /// The standing of a server that is in a service.
    pub const fn new(service: u16, weight: u32, overloaded: bool, generation: u32) -> Self {
        let overloaded = if overloaded { Self::OVERLOADED } else { 0 };
        let generation = generation as u64 & Self::GENERATION;
        Self((weight as u64) << 32 | (service as u64) << 16 | overloaded | Self::AVAILABLE | generation)
    }

    /// A word of the array.
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// The word for the array.
    pub const fn word(self) -> u64 {
        self.0
    }

    /// The same of a server that was removed from its service, and may come back.
    #[must_use]
    pub const fn removed(self) -> Self {
        Self(self.0 & !Self::AVAILABLE)
    }

    /// The same when the index is given to another server.
    #[must_use]
    pub const fn dealt_anew(self) -> Self {
        Self(self.0.wrapping_add(1) & Self::GENERATION)
    }

    /// The server's weight.
    #[inline(always)]
    pub const fn weight(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Index of the service that it belongs to.
    #[inline(always)]
    pub const fn service(self) -> u32 {
        self.0 as u32 >> 16
    }

    /// It was not removed from its service.
    #[inline(always)]
    pub const fn is_available(self) -> bool {
        self.0 & Self::AVAILABLE != 0
    }

    /// It is above its threshold.
    #[inline(always)]
    pub const fn is_overloaded(self) -> bool {
        self.0 & Self::OVERLOADED != 0
    }

    /// How often its index was given to another, modulo 2^14.
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        (self.0 & Self::GENERATION) as u32
    }

    /// How a destination remembers the server with this index while it has this standing.
    #[inline(always)]
    pub const fn member(self, index: u32) -> u32 {
        self.generation() << INDEX_BITS | (index + 1)
    }
}

/// A service with a cache, as the judgements see it.
pub trait Service {
    /// Index of the service.
    fn index(&self) -> u32;

    /// Index of a server that is far from busy, or was when the daemon last looked; [`crate::schedule::NOBODY`] if none is.
    fn witness(&self) -> u32;

    /// A set that has not changed for so many jiffies loses a member.
    #[doc(alias = "lblcr_expiration")]
    fn expiration(&self) -> u32;

    /// Jiffies (the low 32 bits).
    fn now(&self) -> u32;

    /// The standing of the server with this index, if there is one.
    fn standing(&self, index: u32) -> Option<Standing>;

    /// Its connections.
    fn counters(&self, index: u32) -> Option<Counters>;

    /// Called at each turn of a loop. The datapath hinders the compiler from keeping what is in this memory in registers: the
    /// verifier would tell apart all ways that lead to the same place, and there are not enough of them.
    #[inline(always)]
    fn turn<T>(&self, memory: &mut T) {
        _ = memory;
    }
}

/// A server that a destination remembers; nothing if its index was dealt anew.
#[inline(always)]
fn find<S: Service>(member: u32, service: &S) -> Option<(u32, Standing)> {
    let index = (member & ((1 << INDEX_BITS) - 1)).wrapping_sub(1);
    let standing = service.standing(index)?;
    let same = standing.service() == service.index() && standing.generation() == member >> INDEX_BITS;
    same.then_some((index, standing))
}

/// Whether a server has too much to do while another has little.
#[doc(alias = "is_overloaded")]
#[inline(always)]
fn is_busy<S: Service>(active: u32, weight: u32, service: &S) -> bool {
    active > weight && has_room(service).unwrap_or(false)
}

/// Whether the witness still is far from busy.
#[inline(always)]
fn has_room<S: Service>(service: &S) -> Option<bool> {
    let witness = service.witness();
    let standing = service.standing(witness)?;
    let counters = service.counters(witness)?;
    let present = standing.is_available() && standing.service() == service.index();
    Some(present && u64::from(counters.active) * 2 < u64::from(standing.weight()))
}

/// Whether the first load is more for its weight than the second. Compares crosswise, as IPVS does.
#[inline(always)]
const fn exceeds(load: u32, weight: u32, other_load: u32, other_weight: u32) -> bool {
    load.cast_signed() as i64 * other_weight as i64 > other_load.cast_signed() as i64 * weight as i64
}

impl Destination {
    /// lblc: the server that takes a new connection to this destination. None: the schedule is asked, and what it names is
    /// remembered in the first place.
    ///
    /// Whether the server is above its threshold does not count.
    #[doc(alias = "ip_vs_lblc_schedule")]
    #[inline(always)]
    pub fn choose_only<S: Service>(&mut self, service: &S) -> Option<u32> {
        self.last_used = service.now();
        let (index, standing) = find(self.members[0], service)?;
        let counters = service.counters(index)?;
        let usable = standing.is_available() && standing.weight() > 0 && !is_busy(counters.active, standing.weight(), service);
        usable.then_some(index)
    }

    /// lblcr: the same by a set of servers. None: the survey knows the place for what the schedule names.
    #[doc(alias = "ip_vs_lblcr_schedule")]
    #[inline(always)]
    pub fn choose_replica<S: Service>(&mut self, service: &S, survey: &mut Survey) -> Option<u32> {
        self.last_used = service.now();
        *survey = Survey::default();
        for _ in 0..MEMBERS {
            service.turn(survey);
            if !survey.visit(self, service) {
                break;
            }
        }
        service.turn(survey);
        if survey.known > 1 && survey.most_weight > 0 && service.now().wrapping_sub(self.last_changed) > service.expiration() {
            self.forget(survey.most_place);
            self.last_changed = service.now();
            (survey.stale, survey.occupied) = (0, survey.occupied - 1);
        }
        let exhausted = survey.occupied as usize == MEMBERS && survey.least_active > survey.least_weight;
        let usable = survey.least_weight > 0 && !exhausted && !is_busy(survey.least_active, survey.least_weight, service);
        usable.then_some(survey.least_index)
    }

    /// Remembers a server, unless it is remembered already, before all others. Whoever had the place is forgotten.
    #[inline(always)]
    pub fn learn<S: Service>(&mut self, member: u32, place: u32, service: &S) {
        for position in 0..MEMBERS {
            service.turn(self);
            if self.members[position] == member {
                return;
            }
        }
        let mut newer = member;
        for position in 0..MEMBERS {
            service.turn(self);
            newer = core::mem::replace(&mut self.members[position], newer);
            if position as u32 + 1 == place {
                break;
            }
        }
        self.last_changed = service.now();
    }

    /// Forgets the member at a place.
    #[inline(always)]
    fn forget(&mut self, place: u32) {
        let mut older = 0;
        for (position, member) in (1..=MEMBERS as u32).rev().zip(self.members.iter_mut().rev()) {
            older = core::mem::replace(member, older);
            if position == place {
                break;
            }
        }
    }
}

/// What a look at all members of a set shows. Places count from 1, and 0 is none.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Survey {
    /// Places that are taken.
    occupied: u32,
    /// Members that the service still knows, and be it as removed ones.
    known: u32,
    /// The place of a member that it does not know any more.
    stale: u32,
    /// Who goes when one has to: the one with the most to do for its weight. Weight 0: nobody.
    most_place: u32,
    most_load: u32,
    most_weight: u32,
    /// Who is to take the connection: the one with the least to do, of those who may. Weight 0: nobody.
    least_index: u32,
    least_active: u32,
    least_load: u32,
    least_weight: u32,
}

plain! { Survey = 40 }

impl Survey {
    /// Takes in the next member. `false`: there is none. Of equals, the first counts.
    #[inline(always)]
    fn visit<S: Service>(&mut self, destination: &Destination, service: &S) -> bool {
        let next = destination.members.get(self.occupied as usize);
        let Some(&member) = next.filter(|member| **member != 0) else { return false };
        self.occupied += 1;
        if self.judge(member, service).is_none() {
            self.stale = self.occupied;
        }
        true
    }

    #[inline(always)]
    fn judge<S: Service>(&mut self, member: u32, service: &S) -> Option<()> {
        let (index, standing) = find(member, service)?;
        let counters = service.counters(index)?;
        self.known += 1;
        let (load, weight) = (counters.load(), standing.weight());
        if weight > 0 && (self.most_weight == 0 || exceeds(load, weight, self.most_load, self.most_weight)) {
            (self.most_place, self.most_load, self.most_weight) = (self.occupied, load, weight);
        }
        let may = weight > 0 && standing.is_available() && !standing.is_overloaded();
        if may && (self.least_weight == 0 || exceeds(self.least_load, self.least_weight, load, weight)) {
            (self.least_index, self.least_active) = (index, counters.active);
            (self.least_load, self.least_weight) = (load, weight);
        }
        Some(())
    }

    /// Where the next member goes: after the last, or to the place of one that is of no use.
    #[inline(always)]
    pub const fn place(&self) -> u32 {
        if self.stale != 0 {
            self.stale
        } else if (self.occupied as usize) < MEMBERS {
            self.occupied + 1
        } else if self.most_place != 0 {
            self.most_place
        } else {
            self.occupied
        }
    }
}

#[cfg(test)]
mod tests;
