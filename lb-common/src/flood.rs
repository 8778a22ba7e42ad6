//! A flood of packets that begin connections: what keeps it from taking the table away from those that mean it.
//!
//! A sender that forges its address begins connections and never goes on with them. So those are counted that have shown no more
//! than their beginning, and of these the table takes no more than a limit. What comes beyond it makes no entry: it goes to a real
//! server that its own addresses and ports choose, and so does all that follows of the same flow.
//!
//! ```text
//! SYN   no room        -> server of hash(client, ports, VIP), no entry
//! ACK   no connection  -> the same server; the entry is made now, if there is room in the table
//! ```
//!
//! *Half-open* is said of
//!
//! | protocol | connections of which was seen |
//! | --- | --- |
//! | TCP | a SYN (`SYN_RECV`), or no more than one ACK whose SYN made no entry (`SYNACK`) |
//! | SCTP | what comes before ESTABLISHED |
//! | UDP | one packet of the client, and none of the real server |
//!
//! The words here are shared by the packet path, which needs no daemon for any of this, and the daemon, which tells people.

use crate::{
    family::Address,
    hash::{MAGLEV_KEY_2, maglev},
    packet::{protocol, transport::Ports},
    sctp, tcp, udp,
};

/// Words of the shared array. Each begins a cache line of its own.
pub mod word {
    /// How many connections are half-open (signed: it may drift a little, until the sweep corrects it).
    pub const HALF_OPEN: u32 = 0;
    /// When a packet last found no room for its connection, in jiffies; 0: never.
    pub const LAST: u32 = 8;
    /// How many words there are.
    pub const COUNT: u32 = 16;
}

/// Seconds that a half-open connection lives in flood mode.
pub const HALF_OPEN_TIMEOUT: u32 = 5;

/// Seconds that flood mode lasts after the last packet that found no room.
pub const HOLD: u32 = 60;

/// How many half-open connections there may be, as a rule: an eighth of the table.
pub const fn default_limit(max_connections: u32) -> u32 {
    if max_connections < 8 { 1 } else { max_connections / 8 }
}

/// How many half-open connections each CPU may keep to itself before it tells the others: next to nothing beside the limit, but enough
/// for CPUs to share a cache line seldom. With small limits the count is exact.
pub const fn batch(limit: u32) -> u32 {
    match limit / 2048 {
        0 => 1,
        batch if batch > 64 => 64,
        batch => batch,
    }
}

/// Whether a connection in this state has shown no more than its beginning.
#[inline(always)]
pub const fn is_half_open(protocol: u8, state: u8) -> bool {
    const TCP: u16 = 1 << tcp::State::SynReceived as u16 | 1 << tcp::State::SynAck as u16 | 1 << tcp::State::SynSent as u16;
    const SCTP: u16 = (1 << sctp::State::Established as u16) - 2;
    let states = match protocol {
        protocol::TCP => TCP,
        protocol::SCTP => SCTP,
        _ => 1 << udp::State::First as u16,
    };
    states >> (state & 0xf) & 1 != 0
}

/// What a packet without a connection is to flood mode.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Part {
    /// It begins a connection.
    Beginning,
    /// It belongs to one that has begun before, and may make the entry now.
    Midst,
    /// It belongs to one that is about to end, or is nothing: it makes no entry.
    End,
}

impl Part {
    /// What a packet with this event is. Every packet of UDP may be the first.
    #[inline(always)]
    pub const fn of(protocol: u8, event: u8) -> Self {
        use tcp::flags::{ACK, FIN, RST, SYN};
        match protocol {
            protocol::TCP => match event & (SYN | FIN | RST | ACK) {
                ACK => Self::Midst,
                flags if flags & (SYN | RST) == SYN => Self::Beginning,
                _ => Self::End,
            },
            protocol::SCTP => match event {
                sctp::chunk::INIT => Self::Beginning,
                sctp::chunk::INIT_ACK
                | sctp::chunk::ABORT
                | sctp::chunk::SHUTDOWN
                | sctp::chunk::SHUTDOWN_ACK
                | sctp::chunk::SHUTDOWN_COMPLETE
                | sctp::chunk::ERROR => Self::End,
                _ => Self::Midst,
            },
            _ => Self::Beginning,
        }
    }
}

/// The state of a connection whose entry a packet makes that did not begin it: half-open, and established by the next packet.
#[inline(always)]
pub const fn midst_state(protocol: u8) -> u8 {
    match protocol {
        protocol::TCP => tcp::State::SynAck as u8,
        protocol::SCTP => sctp::State::CookieWait as u8,
        _ => udp::State::First as u8,
    }
}

/// The number that chooses the real server of a flow; both ports 0 for a client with all its flows.
#[inline(always)]
pub fn flow<A: Address>(client: &A, vip: &A, ports: Ports) -> u32 {
    // Odd factors, so that addresses and ports that differ a little do not cancel each other out.
    let addresses = client.fold().wrapping_mul(0x9e37_79b1) ^ vip.fold().wrapping_mul(0x85eb_ca6b);
    maglev(MAGLEV_KEY_2, addresses.wrapping_add(ports.word().wrapping_mul(0xc2b2_ae35)))
}

/// The slot of a table that a [`flow`] goes by. The table has at least one.
#[inline(always)]
pub const fn slot(flow: u32, slots: u32) -> u32 {
    ((flow as u64 * slots as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    #[test]
    fn flows_spread_evenly_and_stay() {
        let slots = 61;
        let mut hits = vec![0_u32; slots as usize];
        let vip = u32::from_ne_bytes([192, 0, 2, 1]);
        for host in 0..100_u8 {
            for port in 0..610_u16 {
                let client = u32::from_ne_bytes([198, 51, 100, host]);
                let ports = Ports::new((40_000 + port).to_be(), 80_u16.to_be());
                let slot = slot(flow(&client, &vip, ports), slots);
                assert!(slot < slots);
                hits[slot as usize] += 1;
            }
        }
        assert!(hits.iter().all(|hits| (850..1150).contains(hits)), "{hits:?}");
    }

    #[test]
    fn what_has_only_begun_is_half_open() {
        for (protocol, state, half_open) in [
            (protocol::TCP, tcp::State::SynReceived as u8, true),
            (protocol::TCP, tcp::State::SynAck as u8, true),
            (protocol::TCP, tcp::State::Established as u8, false),
            (protocol::TCP, tcp::State::Close as u8, false),
            (protocol::SCTP, sctp::State::None as u8, false),
            (protocol::SCTP, sctp::State::Init1 as u8, true),
            (protocol::SCTP, sctp::State::CookieEchoed as u8, true),
            (protocol::SCTP, sctp::State::Established as u8, false),
            (protocol::UDP, udp::State::First as u8, true),
            (protocol::UDP, udp::State::Normal as u8, false),
        ] {
            assert_eq!(is_half_open(protocol, state), half_open, "protocol {protocol}, state {state}");
        }
    }

    #[test]
    fn the_packet_after_the_one_that_made_the_entry_establishes() {
        use crate::tcp::Direction::InputOnly;
        let state = midst_state(protocol::TCP);
        assert_eq!(tcp::next(false, InputOnly, state, tcp::flags::ACK), tcp::State::Established as u8);
        let state = midst_state(protocol::SCTP);
        for chunk in [sctp::chunk::DATA, sctp::chunk::COOKIE_ECHO] {
            assert_eq!(sctp::next(InputOnly, state, chunk), sctp::State::Established as u8);
        }
        assert!([protocol::TCP, protocol::SCTP, protocol::UDP].iter().all(|p| is_half_open(*p, midst_state(*p))));
    }

    #[test]
    fn a_packet_is_a_part_of_its_flow() {
        use tcp::flags::{ACK, FIN, RST, SYN};
        for (flags, part) in [
            (SYN, Part::Beginning),
            (ACK, Part::Midst),
            (SYN | ACK, Part::Beginning),
            (FIN | ACK, Part::End),
            (RST, Part::End),
            (SYN | RST, Part::End),
            (0, Part::End),
        ] {
            assert_eq!(Part::of(protocol::TCP, flags), part, "{flags:#x}");
        }
        assert_eq!(Part::of(protocol::SCTP, sctp::chunk::COOKIE_ECHO), Part::Midst);
        assert_eq!(Part::of(protocol::UDP, 0), Part::Beginning);
    }
}
