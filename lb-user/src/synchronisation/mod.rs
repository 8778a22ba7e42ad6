//! Synchronisation: one director tells others what connections it has, so that they can go on with them.
//!
//! ```text
//! master: connection tables -> what is news -> messages -> UDP multicast     backup: messages -> connection tables
//!         (datapath::synced)   (changes)       (message)   (channel)
//! ```
//!
//! The messages are those of IPVS's own synchronisation daemons, version 1, so that the other director may be a kernel's IPVS
//! as well as bpfvs. Who runs what, and the counting, is the daemon's business ([`crate::daemon::synchronisation`]).
//!
//! What the protocol cannot say is not synchronised: local addresses of FULLNAT, real servers of another family than their
//! service. Nobody signs messages: the network between directors has to be one that only directors are in.

pub mod changes;
pub mod channel;
pub mod message;

use std::net::{IpAddr, Ipv4Addr};

use self::message::Fault;

/// The multicast group of IPVS's synchronisation.
pub const GROUP: IpAddr = IpAddr::V4(Ipv4Addr::new(224, 0, 0, 81));

/// The port of IPVS's synchronisation.
pub const PORT: u16 = 8848;

/// Why something was not told, or not taken over.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum LeftOut {
    /// A message could not be sent.
    NotSent,
    /// A message's parts do not add up.
    Malformed,
    /// A message is of another version of the protocol.
    Version,
    /// A message has another sync id.
    OtherSyncId,
    /// A connection has what bpfvs does not understand: FTP's shifted sequence numbers, a persistence engine's data, an
    /// unknown protocol or state.
    Unsupported,
    /// A connection of FULLNAT: its local address and port cannot be said.
    FullNat,
    /// The real server is of another family than its service, which cannot be said.
    OtherFamily,
    /// There is no such service here.
    NoService,
    /// The service has no such real server here.
    NoServer,
    /// What is known here is younger.
    Stale,
    /// A table is full.
    TableFull,
    /// The kernel refused.
    Kernel,
}

impl LeftOut {
    /// Its name in counters.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotSent => "not_sent",
            Self::Malformed => "malformed",
            Self::Version => "version",
            Self::OtherSyncId => "other_sync_id",
            Self::Unsupported => "unsupported",
            Self::FullNat => "fullnat",
            Self::OtherFamily => "other_family",
            Self::NoService => "no_service",
            Self::NoServer => "no_server",
            Self::Stale => "stale",
            Self::TableFull => "table_full",
            Self::Kernel => "kernel",
        }
    }
}

impl From<Fault> for LeftOut {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Malformed => Self::Malformed,
            Fault::Version => Self::Version,
            Fault::Unsupported => Self::Unsupported,
        }
    }
}
