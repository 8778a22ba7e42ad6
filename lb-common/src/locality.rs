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
/// It stands in an array by the server's index, as one word: [`Standing::word`].
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Standing {
    /// The server's weight.
    pub weight: u32,
    /// The service that it belongs to.
    pub service: u16,
    /// It was not removed from its service.
    pub available: bool,
    /// It is above its threshold.
    pub overloaded: bool,
    /// How often its index was given to another, modulo 2^14.
    pub generation: u16,
}

/// Bits of a member that hold the index, increased by one so that no member is zero.
const INDEX_BITS: u32 = 18;
const GENERATION_MASK: u32 = (1 << (32 - INDEX_BITS)) - 1;
const AVAILABLE: u32 = 1 << 14;
const OVERLOADED: u32 = 1 << 15;

impl Standing {
    /// Takes a word apart.
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        let low = word as u32;
        Self {
            weight: (word >> 32) as u32,
            service: (low >> 16) as u16,
            available: low & AVAILABLE != 0,
            overloaded: low & OVERLOADED != 0,
            generation: (low & GENERATION_MASK) as u16,
        }
    }

    /// All of it in one word, so that one store changes it.
    pub const fn word(self) -> u64 {
        let available = if self.available { AVAILABLE } else { 0 };
        let overloaded = if self.overloaded { OVERLOADED } else { 0 };
        let low = (self.service as u32) << 16 | overloaded | available | self.generation as u32 & GENERATION_MASK;
        (self.weight as u64) << 32 | low as u64
    }

    /// How a destination remembers the server with this index while it has this standing.
    #[inline(always)]
    pub const fn member(self, index: u32) -> u32 {
        (self.generation as u32) << INDEX_BITS | (index + 1)
    }
}

/// Where the judgements find what they go by.
pub trait Servers {
    /// The standing of the server with this index; [`Standing::default`] if there is none.
    fn standing(&self, index: u32) -> Standing;

    /// Its connections.
    fn counters(&self, index: u32) -> Counters;

    /// Looks at every member of a set. The datapath has a loop of its own for it, which the verifier walks through only once.
    fn survey(&self, service: u32, destination: &Destination) -> Survey
    where
        Self: Sized,
    {
        let mut survey = Survey::nothing(0);
        (0..MEMBERS as u32).all(|position| survey.visit(position, service, destination, self));
        survey
    }
}

/// What a service's destinations have in common.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Index of the service.
    pub service: u32,
    /// A destination has a set of servers (lblcr) and not only one (lblc).
    pub replicas: bool,
    /// A set that has not changed for so many jiffies loses a member.
    #[doc(alias = "lblcr_expiration")]
    pub expiration: u32,
    /// Index of a server that is far from busy, or was when the daemon last looked; [`crate::schedule::NOBODY`] if none is.
    pub witness: u32,
}

/// A member of the service, looked up.
#[derive(Clone, Copy)]
struct Member {
    index: u32,
    standing: Standing,
    counters: Counters,
}

impl Member {
    /// The server that a destination remembers; nothing if its index was dealt anew.
    #[inline(always)]
    fn find<S: Servers>(member: u32, service: u32, servers: &S) -> Option<Self> {
        let index = (member & ((1 << INDEX_BITS) - 1)).checked_sub(1)?;
        let standing = servers.standing(index);
        let same = u32::from(standing.service) == service && u32::from(standing.generation) == member >> INDEX_BITS;
        same.then(|| Self { index, standing, counters: servers.counters(index) })
    }

    const fn share(&self) -> Share {
        Share { load: self.counters.load().cast_signed(), weight: self.standing.weight }
    }
}

/// How busy a server is for its weight.
#[derive(Clone, Copy)]
struct Share {
    load: i32,
    weight: u32,
}

impl Share {
    /// Compares crosswise, as IPVS does.
    #[inline(always)]
    const fn exceeds(self, other: Self) -> bool {
        self.load as i64 * other.weight as i64 > other.load as i64 * self.weight as i64
    }
}

impl Rules {
    /// Whether a server has too much to do while another has little.
    #[doc(alias = "is_overloaded")]
    #[inline(always)]
    fn is_busy<S: Servers>(&self, active: u32, weight: u32, servers: &S) -> bool {
        if active <= weight {
            return false;
        }
        let witness = servers.standing(self.witness);
        let present = witness.available && u32::from(witness.service) == self.service;
        present && u64::from(servers.counters(self.witness).active) * 2 < u64::from(witness.weight)
    }
}

impl Destination {
    /// A destination that a member has just begun to serve.
    pub fn new(member: u32, now: u32) -> Self {
        let mut members = [0; MEMBERS];
        members[0] = member;
        Self { last_used: now, last_changed: now, members }
    }

    /// The server that takes a new connection to this destination. If none shall, the place, counted from 1, where
    /// [`Destination::learn`] is to remember the one that the schedule names.
    #[doc(alias = "ip_vs_lblc_schedule")]
    #[doc(alias = "ip_vs_lblcr_schedule")]
    #[inline(always)]
    pub fn choose<S: Servers>(&mut self, rules: &Rules, servers: &S, now: u32) -> Result<u32, u32> {
        if self.last_used != now {
            self.last_used = now;
        }
        if rules.replicas { self.choose_replica(rules, servers, now) } else { self.choose_only(rules, servers).ok_or(1) }
    }

    /// lblc does not ask whether the server is above its threshold.
    #[inline(always)]
    fn choose_only<S: Servers>(&self, rules: &Rules, servers: &S) -> Option<u32> {
        let Member { index, standing, counters } = Member::find(self.members[0], rules.service, servers)?;
        let usable = standing.available && standing.weight > 0 && !rules.is_busy(counters.active, standing.weight, servers);
        usable.then_some(index)
    }

    #[inline(always)]
    fn choose_replica<S: Servers>(&mut self, rules: &Rules, servers: &S, now: u32) -> Result<u32, u32> {
        let survey = servers.survey(rules.service, self);
        let mut place = survey.place();
        if survey.known > 1 && now.wrapping_sub(self.last_changed) > rules.expiration && survey.most.weight > 0 {
            self.forget(survey.most_place);
            self.last_changed = now;
            place = survey.occupied;
        }
        let Survey { least, least_index, least_active, .. } = survey;
        let exhausted = survey.occupied as usize == MEMBERS && least_active > least.weight;
        let usable = least.weight > 0 && !exhausted && !rules.is_busy(least_active, least.weight, servers);
        if usable { Ok(least_index) } else { Err(place) }
    }

    /// Remembers a server, unless it is remembered already, before all others. Whoever had the place is forgotten.
    #[inline(always)]
    pub fn learn(&mut self, member: u32, place: u32, now: u32) {
        if self.members.contains(&member) {
            return;
        }
        let mut newer = member;
        for (position, here) in (1..).zip(&mut self.members) {
            newer = core::mem::replace(here, newer);
            if position == place {
                break;
            }
        }
        self.last_changed = now;
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
pub struct Survey {
    /// Places that are taken.
    occupied: u32,
    /// Members that the service still knows, and be it as removed ones.
    known: u32,
    /// The place of a member that it does not know any more.
    stale: u32,
    /// Who is to take the connection: the least share of those who may. Weight 0: nobody.
    least: Share,
    least_index: u32,
    least_active: u32,
    /// Who goes when one has to: the greatest share of all. Weight 0: nobody.
    most: Share,
    most_place: u32,
}

impl Survey {
    /// What is seen before the first look. `zero` is a zero; the datapath has one that the verifier knows nothing about, so
    /// that what comes out of a look is to the verifier what went into it.
    #[inline(always)]
    pub const fn nothing(zero: u32) -> Self {
        Self {
            occupied: zero,
            known: zero,
            stale: zero,
            least: Share { load: zero.cast_signed(), weight: zero },
            least_index: zero,
            least_active: zero,
            most: Share { load: zero.cast_signed(), weight: zero },
            most_place: zero,
        }
    }

    /// Takes in the next member. `false`: there is none. Of equals, the first counts.
    #[inline(always)]
    pub fn visit<S: Servers>(&mut self, position: u32, service: u32, destination: &Destination, servers: &S) -> bool {
        let Some(&member) = destination.members.get(position as usize).filter(|member| **member != 0) else { return false };
        let place = position + 1;
        self.occupied = place;
        match Member::find(member, service, servers) {
            Some(member) => self.judge(place, &member),
            None => self.stale = place,
        }
        true
    }

    #[inline(always)]
    fn judge(&mut self, place: u32, member: &Member) {
        self.known += 1;
        let share = member.share();
        if share.weight == 0 {
            return;
        }
        if self.most.weight == 0 || share.exceeds(self.most) {
            (self.most, self.most_place) = (share, place);
        }
        let may = member.standing.available && !member.standing.overloaded;
        if may && (self.least.weight == 0 || self.least.exceeds(share)) {
            (self.least, self.least_index, self.least_active) = (share, member.index, member.counters.active);
        }
    }

    /// Where the next member goes: after the last, or to the place of one that is of no use.
    const fn place(&self) -> u32 {
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
