//! What a master tells: the connections and templates that are news.
//!
//! IPVS decides with each packet; bpfvs walks through its tables, about once a second, and nothing of that is on the packets'
//! way. A walk shows each connection to [`Changes`], which remembers a fingerprint of what was told:
//!
//! ```text
//! TCP, SCTP    told when established, and with each later state; never before (a flood of SYN tells nothing)
//! UDP          told when it still has packets a walk after it was met (a question and its answer tell nothing)
//! template     told when it is made, when it becomes assured, when it leads elsewhere
//! all          told again each minute, or when half of their time is over, with the time that is left
//! ```
//!
//! That everything is told again heals what was lost on the way, and shows a backup that came later, within a minute, all
//! that there is: the protocol has neither acknowledgements nor a question. Each entry has a second of its own in the minute, so
//! that it is not all at once.

use std::{
    collections::HashSet,
    hash::{BuildHasher, Hash, RandomState},
};

use lb_common::{packet::protocol, sctp, tcp};

/// Seconds after which an entry is told again.
pub const REFRESH: u64 = 60;

/// What a walk meets.
#[derive(Clone, Copy, Debug)]
pub struct Sighting<K> {
    /// Its key in its table.
    pub key: K,
    /// Index of its real server.
    pub server: u32,
    /// What it is.
    pub subject: Subject,
    /// Seconds since its last packet; of a template, since its last new connection.
    pub idle: u32,
    /// Seconds that it lives without one.
    pub lifetime: u32,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Subject {
    /// A connection, by its protocol and state.
    Connection {
        /// The IP protocol.
        protocol: u8,
        /// Its state.
        state: u8,
    },
    /// A template.
    Template {
        /// Whether it is assured.
        assured: bool,
    },
}

impl Subject {
    /// Whether others are told of connections in such a state at all: as with IPVS.
    #[doc(alias = "ip_vs_sync_conn_needed")]
    fn is_told(self) -> bool {
        use {sctp::State as Sctp, tcp::State as Tcp};
        const TCP: [Tcp; 5] = [Tcp::Established, Tcp::FinWait, Tcp::Close, Tcp::CloseWait, Tcp::TimeWait];
        const SCTP: [Sctp; 5] =
            [Sctp::Established, Sctp::ShutdownSent, Sctp::ShutdownReceived, Sctp::ShutdownAckSent, Sctp::Closed];
        match self {
            Self::Connection { protocol: protocol::TCP, state } => TCP.iter().any(|told| *told as u8 == state),
            Self::Connection { protocol: protocol::SCTP, state } => SCTP.iter().any(|told| *told as u8 == state),
            _ => true,
        }
    }

    /// Whether it has to last a while before others are told: nothing else shows that it is worth it.
    const fn has_to_last(self) -> bool {
        matches!(self, Self::Connection { protocol: protocol::UDP, .. })
    }
}

/// What was told, and what a walk has met.
#[derive(Debug, Default)]
pub struct Changes {
    /// Fingerprints of what was told: as the last walk left them, and as this one finds them.
    told: [HashSet<u64>; 2],
    /// Fingerprints of what was met, but has to last.
    met: [HashSet<u64>; 2],
    /// When the last walk began and when this one did, in seconds.
    times: [u64; 2],
    random: RandomState,
}

impl Changes {
    /// A walk begins, so many seconds after any point in time.
    pub fn begin(&mut self, now: u64) {
        let last = self.times[1];
        self.times = [if last == 0 { now } else { last }, now];
        for sets in [&mut self.told, &mut self.met] {
            sets.swap(0, 1);
            sets[1].clear();
        }
    }

    /// Whether others have to be told of this entry now.
    pub fn takes(&mut self, sighting: &Sighting<impl Hash>) -> bool {
        if !sighting.subject.is_told() {
            return false;
        }
        let fingerprint = self.random.hash_one((&sighting.key, sighting.server, sighting.subject));
        if !self.told[0].contains(&fingerprint) && sighting.subject.has_to_last() {
            let has_packets = u64::from(sighting.idle) < self.times[1] - self.times[0];
            if !(has_packets && self.met[0].contains(&fingerprint)) {
                self.met[1].insert(fingerprint);
                return false;
            }
        }
        self.told[1].insert(fingerprint);
        !self.told[0].contains(&fingerprint) || self.is_due(fingerprint, sighting.lifetime)
    }

    /// Whether the entry's own second has come since the last walk.
    fn is_due(&self, fingerprint: u64, lifetime: u32) -> bool {
        let period = REFRESH.min(u64::from(lifetime) / 2).max(1);
        let rounds = |time: u64| (time + fingerprint % period) / period;
        rounds(self.times[1]) > rounds(self.times[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ESTABLISHED: u8 = tcp::State::Established as u8;
    const SYN_RECEIVED: u8 = tcp::State::SynReceived as u8;
    const FIN_WAIT: u8 = tcp::State::FinWait as u8;

    fn tcp(key: u32, state: u8) -> Sighting<u32> {
        Sighting { key, server: 1, subject: Subject::Connection { protocol: protocol::TCP, state }, idle: 0, lifetime: 900 }
    }

    /// Walks each second from one on; in each, the same is met. Says at which ones it is told.
    fn told(walks: std::ops::Range<u64>, changes: &mut Changes, sighting: impl Fn(u64) -> Sighting<u32>) -> Vec<u64> {
        let mut told = Vec::new();
        for now in walks {
            changes.begin(now);
            if changes.takes(&sighting(now)) {
                told.push(now);
            }
        }
        told
    }

    #[test]
    fn tcp_is_told_from_its_establishment_on() {
        let mut changes = Changes::default();
        assert!(told(100..105, &mut changes, |_| tcp(7, SYN_RECEIVED)).is_empty());
        assert_eq!(told(105..106, &mut changes, |_| tcp(7, ESTABLISHED)), [105]);
        assert_eq!(told(106..107, &mut changes, |_| tcp(7, FIN_WAIT)), [106]);
        // Another real server.
        assert_eq!(told(107..108, &mut changes, |_| Sighting { server: 2, ..tcp(7, FIN_WAIT) }), [107]);
        // It is gone, and there again.
        changes.begin(108);
        assert_eq!(told(109..110, &mut changes, |_| Sighting { server: 2, ..tcp(7, FIN_WAIT) }), [109]);
    }

    #[test]
    fn everything_is_told_again_each_minute() {
        for (lifetime, period) in [(900, 60), (120, 60), (10, 5), (1, 1)] {
            let mut changes = Changes::default();
            let told = told(100..400, &mut changes, |_| Sighting { idle: 50, lifetime, ..tcp(7, ESTABLISHED) });
            assert_eq!(told[0], 100);
            assert!(told[1] - told[0] <= period && told[1..].windows(2).all(|pair| pair[1] - pair[0] == period), "{told:?}");
        }
    }

    #[test]
    fn refreshes_are_spread_over_the_minute() {
        let mut changes = Changes::default();
        let mut most = 0;
        for now in 100..280 {
            changes.begin(now);
            let count = (0..6000).filter(|key| changes.takes(&tcp(*key, ESTABLISHED))).count();
            if now > 100 {
                most = most.max(count);
            }
        }
        assert!((100..200).contains(&most), "{most} of 6000 in one second");
    }

    #[test]
    fn udp_has_to_last() {
        let udp = |idle| Sighting { subject: Subject::Connection { protocol: protocol::UDP, state: 0 }, idle, ..tcp(7, 0) };
        let mut changes = Changes::default();
        // One question.
        assert!(told(100..230, &mut changes, |now| udp((now - 100) as u32)).is_empty());
        // A conversation.
        let mut changes = Changes::default();
        assert_eq!(told(100..110, &mut changes, |_| udp(0))[0], 101);
    }

    #[test]
    fn templates_are_told_at_once_and_when_they_change() {
        let template = |assured| Sighting { subject: Subject::Template { assured }, ..tcp(7, 0) };
        let mut changes = Changes::default();
        assert_eq!(told(100..101, &mut changes, |_| template(false)), [100]);
        assert_eq!(told(101..102, &mut changes, |_| template(true)), [101]);
    }
}
