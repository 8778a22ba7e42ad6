//! How fast the datapath is: nanoseconds per packet, beside floors.
//!
//! The kernel runs a program many times over (`BPF_PROG_TEST_RUN`), and the CPU time of this thread tells how long it took.
//! What makes a figure of it:
//!
//! * A repeated run hands a program its own output. So not the program itself is run, but a wrapper, which undoes the change,
//!   writes the next flow into the packet, and tail-calls the program under test (`lb-ebpf/src/bin/floor.rs`).
//! * The wrapper costs as much as the smallest datapath. It is measured with a program that does nothing, and subtracted.
//! * A busy machine is slow in turns. Nothing, floor and director take turns too, in many short samples; figures are compared
//!   only with those of the same turns, and the minimum counts: other programs can only make a sample longer.
//! * One flow flatters: perfect branches, everything in the first cache. So there are tables of three sizes, walked in no
//!   order. Each sample follows a lap through all flows that is not timed, so that a connection's time of last use, which is
//!   written once a second, is as fresh as traffic keeps it.
//!
//! The floor is the least that a director must do: parse, one hash hit, the next hop's hardware addresses, out. For new
//! connections it inserts into its table.
//!
//! | subject | module |
//! | --- | --- |
//! | the director under test, its tables filled | [`stage`] |
//! | the harness and the floors, loaded | [`harness`] |
//! | samples, and what they come to | [`measure`] |
//! | what each step of an established packet costs | [`steps`] |
//! | what the scheduler and the number of real servers cost a new connection | [`picks`] |
//! | what the numbers of services and of real servers cost | [`crowd`] |
//! | what new connections cost on two CPUs at once | [`contention`] |
//! | how far a living daemon's schedules stray from IPVS's choices | [`staleness`] |
//! | what the kernel knows of programs and tables: instructions, bytes | [`weight`] |
//! | what is wanted | [`target`] |
//! | the table for people, the file for programs | [`report`] |
//! | this run beside the last committed one | [`verdict`] |
//! | tables in the documentation | [`document`] |
//!
//! What this does not measure: drivers, queues, the memory of a network card; several CPUs at once only in [`contention`].

pub mod contention;
pub mod crowd;
pub mod document;
pub mod harness;
pub mod measure;
pub mod picks;
pub mod report;
pub mod stage;
pub mod staleness;
pub mod steps;
pub mod target;
pub mod verdict;
pub mod weight;

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};

use crate::{lab::Family, test_run::Hook};

/// What a packet goes through.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// To an address that nobody balances.
    NotOurs,
    /// Of a known connection, by direct routing, out of the device that it came in by.
    Routed,
    /// The same over UDP.
    Datagram,
    /// The same, out of another device: XDP has to call a helper for it. tc always has to.
    RoutedElsewhere,
    /// Of a known connection, by IP in IP, out of the device that it came in by.
    Tunnelled,
    /// Of a known connection, from the client to a masqueraded real server with a port of its own.
    Masqueraded,
    /// The same, from the real server to the client.
    Replied,
    /// Of a known connection, from the client to a real server that sees a local address.
    FullNat,
    /// The same, from the real server to the client.
    FullNatReplied,
    /// The first of a connection.
    New,
    /// The same, of a client whose template knows the real server.
    Persistent,
    /// The same, for a service that a mark rule names.
    ByRule,
    /// The same, for a service that a firewall's mark on the packet names.
    ByMark,
    /// The first of a connection for which there is no room in the table: it is forwarded without an entry.
    Full,
    /// The same, because too many connections are half-open.
    Flood,
    /// An ICMP error about a known connection.
    Error,
}

impl Path {
    /// All.
    pub const ALL: [Self; 16] = [
        Self::NotOurs,
        Self::Routed,
        Self::Datagram,
        Self::RoutedElsewhere,
        Self::Tunnelled,
        Self::Masqueraded,
        Self::Replied,
        Self::FullNat,
        Self::FullNatReplied,
        Self::New,
        Self::Persistent,
        Self::ByRule,
        Self::ByMark,
        Self::Full,
        Self::Flood,
        Self::Error,
    ];

    /// Whether there is such a packet at a hook. tc always sends by a helper, so that another device is nothing special there; XDP
    /// sees no firewall's mark.
    pub const fn exists_at(self, hook: Hook) -> bool {
        match self {
            Self::RoutedElsewhere => matches!(hook, Hook::Xdp),
            Self::ByMark => matches!(hook, Hook::Tc),
            _ => true,
        }
    }

    /// With how many flows in the table a measurement says something new, of these.
    pub const fn depends_on(self, flows: u64) -> bool {
        match self {
            // These do without a look-up, or are another one's with a call more.
            Self::NotOurs | Self::RoutedElsewhere => flows == 1,
            Self::Routed => true,
            Self::Tunnelled | Self::Datagram | Self::Masqueraded | Self::Replied | Self::FullNat | Self::FullNatReplied => {
                !matches!(flows, 0x2_0000 | 0x40_0000)
            }
            Self::New | Self::Persistent | Self::ByRule | Self::ByMark | Self::Flood | Self::Error => {
                matches!(flows, 1 | 0x1_0000 | 0x10_0000 | 0x80_0000)
            }
            Self::Full => false,
        }
    }

    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::NotOurs => "not ours",
            Self::Routed => "established, DR",
            Self::Datagram => "established, DR, UDP",
            Self::RoutedElsewhere => "established, DR, other device",
            Self::Tunnelled => "established, TUN (IPIP)",
            Self::Masqueraded => "established, NAT, request",
            Self::Replied => "established, NAT, reply",
            Self::FullNat => "established, FULLNAT, request",
            Self::FullNatReplied => "established, FULLNAT, reply",
            Self::New => "new connection",
            Self::Persistent => "new connection, persistent",
            Self::ByRule => "new connection, mark rule",
            Self::ByMark => "new connection, firewall's mark",
            Self::Full => "new connection, table full",
            Self::Flood => "new connection, flood mode",
            Self::Error => "ICMP error",
        }
    }
}

impl Path {
    /// How the connections are forwarded that the tables must hold for it: those of the first are as good for all whose replies
    /// do not pass the director.
    #[must_use]
    pub const fn connections(self) -> Self {
        match self {
            Self::Masqueraded | Self::Replied => Self::Masqueraded,
            Self::FullNat | Self::FullNatReplied => Self::FullNat,
            Self::Datagram => Self::Datagram,
            _ => Self::Routed,
        }
    }

    /// Whether the packet begins a connection, which then is in the table.
    pub const fn is_new(self) -> bool {
        matches!(self, Self::New | Self::Persistent | Self::ByRule | Self::ByMark)
    }

    /// Whether the packet is of a connection that is in the table.
    pub const fn is_known(self) -> bool {
        !self.is_new() && !matches!(self, Self::NotOurs | Self::Full | Self::Flood)
    }

    /// Whether there is a floor: something smaller that does the same.
    pub const fn has_floor(self) -> bool {
        !matches!(self, Self::NotOurs | Self::Full | Self::Flood | Self::Error)
    }
}

/// One thing to measure.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Case {
    /// Where the packet comes in.
    pub hook: Hook,
    /// Its IP version.
    pub family: Family,
    /// What it goes through.
    pub path: Path,
    /// Flows in the table: a power of two.
    pub flows: u64,
}

impl Case {
    /// The IP version, in words.
    pub const fn ip(&self) -> &'static str {
        match self.family {
            Family::Ipv4 => "IPv4",
            Family::Ipv6 => "IPv6",
        }
    }

    /// Whether the kernel may repeat the program within one run. What tc has put into a tunnel stays marked as such, and
    /// cannot be put into one again: there each packet is a run of its own.
    pub fn repeats(&self) -> bool {
        !(self.hook == Hook::Tc && self.path == Path::Tunnelled)
    }
}

impl Display for Case {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let hook = match self.hook {
            Hook::Xdp => "xdp",
            Hook::Tc => "tc",
        };
        write!(formatter, "{hook} {} {} with {} flows", self.ip(), self.path.words(), self.flows)
    }
}
