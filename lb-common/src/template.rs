//! Persistence: a client's template leads its new connections to the real server that it had before.
//!
//! ```text
//! service                 a client's template                         leads to
//! TCP 10.0.0.200:80       TCP 192.0.2.0/24 -> 10.0.0.200:80           a real server
//! TCP 10.0.0.200:0        TCP 192.0.2.0/24 -> 10.0.0.200:0            a real server, for every port
//! mark 10                  IP 192.0.2.0/24 -> the mark                a real server, for every address and port
//! ```
//!
//! The first connection of a client makes the template, in the kernel: whoever comes second reads what the first one wrote,
//! so that two CPUs never part a client. Each new connection starts its time again; the sweep deletes what is over. As long
//! as a template's connections live, it does. `ipvs-semantics.md`, sections 2.6 and 3.2.
//!
//! A template knows nothing of its connections, and they know of it only that there is one. A connection's template
//! is found by its key, with what the [`Scope`] of its real server says.

use crate::{
    connection::ConnectionKey,
    family::Address,
    service::{Service, flags as service_flags},
    wire::plain,
};

/// Whom a template is for: the key of the template table. Addresses and ports in network order.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct TemplateKey<A> {
    /// The client's network.
    pub client: A,
    /// The virtual address; of a service with a firewall mark, the mark (in network order) as its first word.
    pub vip: A,
    /// The virtual port; 0 if it does not matter.
    pub port: u16,
    /// The IP protocol; 0 if it does not matter.
    pub protocol: u8,
    /// Zero: map keys are compared as bytes. Not zero for one that was [left behind](Self::left_behind).
    pub zero: u8,
}

impl<A> TemplateKey<A> {
    /// Of one real server so many templates can be left behind that have a key in common.
    pub const LEFT_BEHIND: u8 = 4;

    /// The key of what a template was before it was given another real server, because it led nowhere. IPVS remembers such until their
    /// time is over, and so do we: they lead nobody, since no packet has this key. Of several they are told apart by a number, from 1
    /// on.
    #[inline(always)]
    #[must_use]
    pub const fn left_behind(self, server: u32, number: u8) -> Self
    where
        A: Copy,
    {
        Self { port: server as u16, zero: number | (server >> 16 << 7) as u8, ..self }
    }

    /// Whether it is such a key.
    pub const fn is_left_behind(&self) -> bool {
        self.zero != 0
    }
}

/// Where a client's new connections go, and until when.
#[doc(alias = "IP_VS_CONN_F_TEMPLATE")]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Template {
    /// A [`Choice`] as one word, so that it changes in one step.
    pub choice: u64,
    /// Ticks that the template lives after its last new connection.
    pub timeout: u32,
    /// Not 0: one of its connections was established.
    pub assured: u8,
    /// Not 0: one of its connections may be alive.
    pub held: u8,
    /// Not 0: the running sweep has met one of its connections.
    pub met: u8,
    /// Not 0: another director has told of it. See [`Template::is_synced`].
    pub synced: u8,
}

impl Template {
    /// What [`Template::synced`] is for one that another director tells of, and whose last new connection came then.
    pub const fn synced(last_seen: u32) -> u8 {
        (last_seen % 255) as u8 + 1
    }

    /// Whether another director has told of it, and no new connection has come here since: its time would be another.
    ///
    /// Once in 255 times it is said of one that has had a new connection, up to the next.
    pub const fn is_synced(&self) -> bool {
        self.synced == Self::synced(Choice::from_word(self.choice).last_seen)
    }
}

/// What a template says, and since when.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Choice {
    /// Index of the real server; [`Choice::OVER`] if the template is being deleted.
    pub server: u32,
    /// When the last new connection came, in jiffies (the low 32 bits).
    pub last_seen: u32,
}

impl Choice {
    /// In the place of a server: the template is being deleted.
    pub const OVER: u32 = u32::MAX;

    /// The choice in one word.
    #[inline(always)]
    pub const fn word(self) -> u64 {
        self.server as u64 | (self.last_seen as u64) << 32
    }

    /// Takes the word apart.
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        Self { server: word as u32, last_seen: (word >> 32) as u32 }
    }

    /// Ticks since the last new connection. One that came after `now` was read has come just now.
    #[inline(always)]
    pub const fn idle(self, now: u32) -> u32 {
        let idle = now.wrapping_sub(self.last_seen);
        if idle > u32::MAX - SKEW { 0 } else { idle }
    }
}

/// Ticks by which a clock that was read may be late.
const SKEW: u32 = 1 << 20;

/// How the templates of a real server's connections are found. Written by userspace for each real server of a persistent
/// service; of others it says no more than the mark, which other directors have to be told, and whether the weight is 0.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Scope {
    /// As [`Service::netmask`].
    pub netmask: u32,
    /// As [`Service::mark`].
    pub mark: u32,
    /// Bits of [`scope_flags`].
    pub flags: u32,
    /// Always zero.
    pub zero: u32,
}

/// Bits of [`Scope::flags`].
pub mod scope_flags {
    /// As [`crate::service::flags::ANY_PORT`].
    pub const ANY_PORT: u32 = 1;
    /// The real server's weight is 0.
    pub const QUIESCENT: u32 = 2;
}

impl Scope {
    /// The scope of a service's templates.
    #[inline(always)]
    pub const fn of(service: &Service) -> Self {
        let any_port = service.flags & service_flags::ANY_PORT != 0;
        let flags = if any_port { scope_flags::ANY_PORT } else { 0 };
        Self { netmask: service.netmask, mark: service.mark, flags, zero: 0 }
    }

    /// The same for a connection that found its template by a prefix, which may have been another then; 0: it was not.
    #[inline(always)]
    #[must_use]
    pub fn at<A: Address>(self, prefix: u8) -> Self {
        if prefix == 0 { self } else { Self { netmask: A::netmask(prefix), ..self } }
    }

    /// The key of the template that controls a connection.
    #[inline(always)]
    pub fn key<A: Address>(&self, connection: &ConnectionKey<A>) -> TemplateKey<A> {
        let client = connection.client.network(self.netmask);
        if self.mark != 0 {
            return TemplateKey { client, vip: A::from_words(&[self.mark.to_be(), 0, 0, 0]), port: 0, protocol: 0, zero: 0 };
        }
        let any_port = self.flags & scope_flags::ANY_PORT != 0;
        let port = if any_port { 0 } else { connection.ports.destination() };
        TemplateKey { client, vip: connection.vip, port, protocol: connection.protocol as u8, zero: 0 }
    }
}

plain! {
    TemplateKey<crate::family::Ipv4> = 12,
    TemplateKey<crate::family::Ipv6> = 36,
    Template = 16,
    Scope = 16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        family::{Ipv4, ipv4},
        packet::{protocol, transport::Ports},
    };

    fn connection(port: u16) -> ConnectionKey<Ipv4> {
        let ports = Ports::new(40_000_u16.to_be(), port.to_be());
        ConnectionKey {
            client: ipv4([192, 0, 2, 77].into()),
            vip: ipv4([10, 0, 0, 200].into()),
            ports,
            protocol: protocol::TCP.into(),
        }
    }

    #[test]
    fn templates_are_as_wide_as_their_service() {
        let service = Service { netmask: ipv4([255, 255, 255, 0].into()), ..Service::default() };
        let one_port = Scope::of(&service).key(&connection(80));
        assert_eq!((one_port.client, one_port.port), (ipv4([192, 0, 2, 0].into()), 80_u16.to_be()));
        assert_ne!(one_port, Scope::of(&service).key(&connection(81)));

        let any_port = Scope::of(&Service { flags: service_flags::ANY_PORT, ..service });
        assert_eq!(any_port.key(&connection(80)), any_port.key(&connection(81)));
        assert_eq!(any_port.key(&connection(80)).protocol, protocol::TCP);

        let edited = Scope { netmask: u32::MAX, ..Scope::of(&service) };
        assert_ne!(edited.key(&connection(80)), one_port);
        assert_eq!(edited.at::<Ipv4>(24).key(&connection(80)), one_port);
        assert_eq!(edited.at::<Ipv4>(0), edited);

        let mark = Scope::of(&Service { mark: 10, ..service });
        let other = ConnectionKey { vip: 1, protocol: protocol::UDP.into(), ..connection(53) };
        assert_eq!(mark.key(&connection(80)), mark.key(&other));
        assert_eq!(mark.key(&other).vip, ipv4([0, 0, 0, 10].into()));
    }

    #[test]
    fn no_packet_has_the_key_of_what_is_left_behind() {
        let key = Scope::of(&Service::default()).key(&connection(80));
        let [one, other] = [7, 0x1_0007].map(|server| key.left_behind(server, 1));
        assert!(!key.is_left_behind() && one.is_left_behind() && other.is_left_behind());
        assert_ne!(one, other);
        assert_ne!(one, key.left_behind(7, TemplateKey::<Ipv4>::LEFT_BEHIND));
    }

    #[test]
    fn a_choice_is_one_word() {
        let choice = Choice { server: 7, last_seen: u32::MAX };
        assert_eq!(Choice::from_word(choice.word()), choice);
        assert_eq!((choice.idle(4), choice.idle(u32::MAX), choice.idle(u32::MAX - 3)), (5, 0, 0));
    }
}
