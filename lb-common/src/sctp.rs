//! SCTP as IPVS follows it: fourteen states, advanced by the type of a packet's first chunk.

/// The state of an SCTP association; the numbers are IPVS's.
#[doc(alias = "IP_VS_SCTP_S_NONE")]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names are IPVS's own")]
pub enum State {
    None = 0,
    Init1 = 1,
    Init = 2,
    CookieSent = 3,
    CookieReplied = 4,
    CookieWait = 5,
    Cookie = 6,
    CookieEchoed = 7,
    Established = 8,
    ShutdownSent = 9,
    ShutdownReceived = 10,
    ShutdownAckSent = 11,
    Rejected = 12,
    Closed = 13,
}

impl State {
    /// The states in the order of their numbers.
    pub const ALL: [Self; 14] = [
        Self::None,
        Self::Init1,
        Self::Init,
        Self::CookieSent,
        Self::CookieReplied,
        Self::CookieWait,
        Self::Cookie,
        Self::CookieEchoed,
        Self::Established,
        Self::ShutdownSent,
        Self::ShutdownReceived,
        Self::ShutdownAckSent,
        Self::Rejected,
        Self::Closed,
    ];

    /// The name that `ipvsadm -Lc` prints.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "NONE",
            Self::Init1 => "INIT1",
            Self::Init => "INIT",
            Self::CookieSent => "C-SENT",
            Self::CookieReplied => "C-REPLIED",
            Self::CookieWait => "C-WAIT",
            Self::Cookie => "COOKIE",
            Self::CookieEchoed => "C-ECHOED",
            Self::Established => "ESTABLISHED",
            Self::ShutdownSent => "S-SENT",
            Self::ShutdownReceived => "S-RECEIVED",
            Self::ShutdownAckSent => "S-ACK-SENT",
            Self::Rejected => "REJECTED",
            Self::Closed => "CLOSED",
        }
    }
}

/// Seconds until an association in each state expires, by number; the rest is padding.
#[doc(alias = "sctp_timeouts")]
pub const TIMEOUTS: [u32; 16] = [2, 4, 61, 61, 61, 61, 61, 61, 900, 61, 61, 61, 4, 61, 2, 2];

/// Types of chunks (RFC 9260) that begin, end or move an association.
pub mod chunk {
    #![expect(missing_docs, reason = "the names are SCTP's own")]
    pub const DATA: u8 = 0;
    pub const INIT: u8 = 1;
    pub const INIT_ACK: u8 = 2;
    pub const ABORT: u8 = 6;
    pub const SHUTDOWN: u8 = 7;
    pub const SHUTDOWN_ACK: u8 = 8;
    pub const ERROR: u8 = 9;
    pub const COOKIE_ECHO: u8 = 10;
    pub const COOKIE_ACK: u8 = 11;
    pub const SHUTDOWN_COMPLETE: u8 = 14;
}

/// The state after a packet whose first chunk is of this type. Unknown types count as data.
///
/// The caller reports [`chunk::ABORT`] for a cookie chunk that an abort chunk follows.
#[doc(alias = "set_sctp_state")]
#[inline(always)]
pub fn next(direction: crate::tcp::Direction, state: u8, first_chunk: u8) -> u8 {
    let event = match first_chunk {
        chunk::INIT => 1,
        chunk::INIT_ACK => 2,
        chunk::COOKIE_ECHO => 3,
        chunk::COOKIE_ACK => 4,
        chunk::SHUTDOWN => 5,
        chunk::SHUTDOWN_ACK => 6,
        chunk::SHUTDOWN_COMPLETE => 7,
        chunk::ERROR => 8,
        chunk::ABORT => 9,
        _ => 0,
    };
    let row = (direction as usize * 16 + event) & 0x3f;
    TABLE[row][(state & 0xf) as usize]
}

/// Whether IPVS counts an association in this state as active.
#[inline(always)]
pub const fn is_active(state: u8) -> bool {
    state == State::Established as u8
}

const NO: u8 = State::None as u8;
const I1: u8 = State::Init1 as u8;
const IN: u8 = State::Init as u8;
const CS: u8 = State::CookieSent as u8;
const CR: u8 = State::CookieReplied as u8;
const CW: u8 = State::CookieWait as u8;
const CO: u8 = State::Cookie as u8;
const CE: u8 = State::CookieEchoed as u8;
const ES: u8 = State::Established as u8;
const SS: u8 = State::ShutdownSent as u8;
const SR: u8 = State::ShutdownReceived as u8;
const SA: u8 = State::ShutdownAckSent as u8;
const RJ: u8 = State::Rejected as u8;
const CL: u8 = State::Closed as u8;

/// Sixteen rows for each direction, one for each event, and a column for each state; what is left over is padding, so
/// that an index needs a mask and not a check.
#[rustfmt::skip]
static TABLE: [[u8; 16]; 64] = [
        // NO  I1  IN  CS  CR  CW  CO  CE  ES  SS  SR  SA  RJ  CL
        // INPUT
        [ES, I1, IN, CS, CR, CW, CO, CE, ES, SS, SR, SA, RJ, CL, NO, NO], // DATA
        [I1, IN, IN, CS, CR, CW, CO, CE, ES, SS, SR, SA, IN, IN, NO, NO], // INIT
        [CW, CW, CW, CS, CR, CO, CO, CE, ES, SS, SR, SA, RJ, CL, NO, NO], // INIT_ACK
        [CR, IN, IN, CR, CR, CW, CO, CE, ES, SS, SR, SA, RJ, CL, NO, NO], // COOKIE_ECHO
        [ES, I1, IN, CS, CR, CW, CO, ES, ES, SS, SR, SA, RJ, CL, NO, NO], // COOKIE_ACK
        [SR, I1, IN, CS, CR, CW, CO, CE, SR, SS, SR, SA, RJ, CL, NO, NO], // SHUTDOWN
        [CL, IN, IN, CS, CR, CW, CO, CE, ES, CL, SR, CL, RJ, CL, NO, NO], // SHUTDOWN_ACK
        [CL, CL, CL, CS, CR, CW, CO, CE, ES, SS, SR, CL, RJ, CL, NO, NO], // SHUTDOWN_COMPLETE
        [CL, I1, IN, CS, CR, CW, CO, CL, ES, SS, SR, SA, RJ, CL, NO, NO], // ERROR
        [CL, CL, CL, CL, CL, RJ, CL, CL, CL, CL, CL, CL, CL, CL, NO, NO], // ABORT
        [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16],
        // OUTPUT
        [ES, I1, IN, CS, CR, CW, CO, CE, ES, SS, SR, SA, RJ, CL, NO, NO], // DATA
        [CW, CW, CW, CW, CW, CW, CW, CW, ES, CW, CW, CW, CW, CW, NO, NO], // INIT
        [CS, CS, CS, CS, CR, CW, CO, CE, ES, SS, SR, SA, RJ, CL, NO, NO], // INIT_ACK
        [CE, CE, CE, CE, CE, CE, CE, CE, ES, SS, SR, SA, RJ, CL, NO, NO], // COOKIE_ECHO
        [ES, ES, ES, ES, ES, ES, ES, ES, ES, SS, SR, SA, RJ, CL, NO, NO], // COOKIE_ACK
        [SS, SS, SS, SS, SS, SS, SS, SS, SS, SS, SR, SA, RJ, CL, NO, NO], // SHUTDOWN
        [SA, SA, SA, SA, SA, CW, CO, CE, ES, SA, SA, SA, RJ, CL, NO, NO], // SHUTDOWN_ACK
        [CL, I1, IN, CS, CR, CW, CO, CE, ES, SS, SR, SA, RJ, CL, NO, NO], // SHUTDOWN_COMPLETE
        [CL, CL, CL, CL, CL, CW, CO, CE, ES, SS, SR, SA, RJ, CL, NO, NO], // ERROR
        [CL, RJ, CL, CL, CL, CL, CL, CL, CL, CL, CL, CL, CL, CL, NO, NO], // ABORT
        [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16],
        // INPUT_ONLY
        [ES, I1, IN, CS, CR, ES, CO, CE, ES, SS, SR, SA, RJ, CL, NO, NO], // DATA
        [I1, IN, IN, IN, IN, IN, CO, CE, ES, SS, SR, SA, IN, IN, NO, NO], // INIT
        [CE, CE, CE, CE, CE, CE, CO, CE, ES, SS, SR, SA, RJ, CL, NO, NO], // INIT_ACK
        [ES, ES, ES, ES, ES, ES, CO, CE, ES, SS, SR, SA, RJ, CL, NO, NO], // COOKIE_ECHO
        [ES, I1, IN, ES, ES, CW, ES, ES, ES, SS, SR, SA, RJ, CL, NO, NO], // COOKIE_ACK
        [SR, I1, IN, CS, CR, CW, CO, CE, SR, SS, SR, SA, RJ, CL, NO, NO], // SHUTDOWN
        [CL, IN, IN, CS, CR, CW, CO, CE, CL, CL, SR, CL, RJ, CL, NO, NO], // SHUTDOWN_ACK
        [CL, CL, CL, CL, CL, CW, CO, CE, ES, SS, CL, CL, RJ, CL, NO, NO], // SHUTDOWN_COMPLETE
        [CL, I1, IN, CS, CR, CW, CO, CE, ES, SS, SR, SA, RJ, CL, NO, NO], // ERROR
        [CL, CL, CL, CL, CL, RJ, CL, CL, CL, CL, CL, CL, CL, CL, NO, NO], // ABORT
        [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16],
        // padding
        [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16], [NO; 16],
];
