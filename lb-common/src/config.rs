//! The settings that the datapath reads: one entry, written by userspace.

use crate::wire::plain;

/// Changes whenever a map's layout does. A daemon refuses to adopt maps of another version.
pub const LAYOUT: u32 = 4;

/// Settings and the identity of an instance.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Config {
    /// [`LAYOUT`] of the maps.
    pub layout: u32,
    /// Bits of [`flags`].
    pub flags: u32,
    /// The cookie of the network namespace that the instance belongs to: inode numbers of namespaces are used again.
    pub netns_cookie: u64,
    /// Kernel clock ticks in a second (`CONFIG_HZ`).
    pub hz: u32,
    /// Seconds until a UDP connection expires.
    pub udp_timeout: u32,
    /// Seconds until a TCP connection expires, by [`crate::tcp::State`].
    pub tcp_timeouts: [u32; 16],
    /// Seconds until an SCTP connection expires, by [`crate::sctp::State`].
    pub sctp_timeouts: [u32; 16],
    /// IPVS's `conn_reuse_mode`.
    pub connection_reuse: u32,
    /// ICMP errors that each CPU may send in a second; 0 for no limit.
    pub answers_per_second: u32,
    /// IPVS's `lblc_expiration`: seconds until lblc forgets a destination that nobody asks for.
    pub lblc_expiration: u32,
    /// IPVS's `lblcr_expiration`: the same for lblcr, and seconds until a set of servers that does not change loses one.
    pub lblcr_expiration: u32,
    /// With so many half-open connections or more, what begins one makes no entry; see [`crate::flood`].
    pub half_open_limit: u32,
    /// So many of them, more or fewer, each CPU may keep to itself before it tells the others.
    pub half_open_batch: u32,
    /// With so many, nothing makes one any more that would be half-open.
    pub midst_limit: u32,
    /// Seconds that a half-open connection lives in flood mode, at most.
    pub half_open_timeout: u32,
    /// Seconds that flood mode lasts after the last packet that found no room.
    pub flood_hold: u32,
    /// Always zero.
    pub zero: u32,
}

/// Bits of [`Config::flags`].
pub mod flags {
    /// IPVS's `sloppy_tcp`: any TCP packet but a RST starts a connection.
    pub const SLOPPY_TCP: u32 = 1;
    /// IPVS's `sloppy_sctp`: any SCTP packet but an ABORT starts an association.
    pub const SLOPPY_SCTP: u32 = 2;
    /// IPVS's `expire_nodest_conn`: a connection of a removed server is scheduled anew.
    pub const EXPIRE_NODEST: u32 = 4;
    /// IPVS's `secure_tcp` = 3: flood mode is always on ([`crate::flood`]).
    pub const FLOOD_ALWAYS: u32 = 8;
    /// IPVS's `expire_quiescent_template`: a template of a real server with weight 0 is not used for new connections.
    pub const EXPIRE_QUIESCENT: u32 = 16;
    /// IPVS's `secure_tcp` = 0: there is no flood mode.
    pub const FLOOD_NEVER: u32 = 32;
    /// IPVS's `drop_entry` = 3: half-open connections always live as briefly as in flood mode.
    pub const HURRY_ALWAYS: u32 = 64;
    /// IPVS's `drop_entry` = 0: half-open connections live as long as ever, even in flood mode.
    pub const HURRY_NEVER: u32 = 128;
}

impl Config {
    /// IPVS's defaults, and those of flood mode but for the limits, which depend on the table.
    pub const DEFAULT: Self = Self {
        layout: LAYOUT,
        flags: 0,
        netns_cookie: 0,
        hz: 0,
        udp_timeout: 300,
        tcp_timeouts: crate::tcp::TIMEOUTS,
        sctp_timeouts: crate::sctp::TIMEOUTS,
        connection_reuse: 1,
        answers_per_second: 1000,
        lblc_expiration: 24 * 60 * 60,
        lblcr_expiration: 24 * 60 * 60,
        half_open_limit: u32::MAX,
        half_open_batch: 1,
        midst_limit: u32::MAX,
        half_open_timeout: crate::flood::HALF_OPEN_TIMEOUT,
        flood_hold: crate::flood::HOLD,
        zero: 0,
    };
}

plain! { Config = 192 }

/// What a run of the sweep found: the one entry of its result map.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct SweepReport {
    /// `jiffies` when it began.
    pub jiffies: u64,
    /// The monotonic clock when it began, in nanoseconds.
    pub monotonic_ns: u64,
    /// Connections looked at.
    pub examined: u64,
    /// Connections that were over, and are deleted.
    pub expired: u64,
    /// Half-open connections that are left.
    pub half_open: u64,
    /// Entries of all tables that were passed so far.
    pub passed: u64,
    /// `jiffies` when the present slice began, or later.
    pub slice: u64,
}

plain! { SweepReport = 56 }

/// The tables that a run of the sweep walks through, in this order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum SweptTable {
    ConnectionsV4,
    ConnectionsV6,
    CallersV4,
    CallersV6,
    TemplatesV4,
    TemplatesV6,
    CallsV4,
    CallsV6,
}
