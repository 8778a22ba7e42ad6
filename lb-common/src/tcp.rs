//! TCP as IPVS follows it: eleven states, advanced by the flags of each packet.
//!
//! IPVS keeps one table for when it sees both directions (`Input`, `Output`) and one column set for when it sees the
//! client's half alone (`InputOnly`): direct routing and tunnels. `secure_tcp` swaps in a second, more suspicious table.
//! The tables below are IPVS's, cell by cell; `ipvs-vectors.json` replays 745 steps of the real kernel against them.

/// The state of a TCP connection; the numbers are IPVS's, which travel in its synchronisation messages.
#[doc(alias = "IP_VS_TCP_S_NONE")]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names are TCP's own")]
pub enum State {
    None = 0,
    Established = 1,
    SynSent = 2,
    SynReceived = 3,
    FinWait = 4,
    TimeWait = 5,
    Close = 6,
    CloseWait = 7,
    LastAck = 8,
    Listen = 9,
    SynAck = 10,
}

impl State {
    /// The states in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::None,
        Self::Established,
        Self::SynSent,
        Self::SynReceived,
        Self::FinWait,
        Self::TimeWait,
        Self::Close,
        Self::CloseWait,
        Self::LastAck,
        Self::Listen,
        Self::SynAck,
    ];

    /// The name that `ipvsadm -Lc` prints.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "NONE",
            Self::Established => "ESTABLISHED",
            Self::SynSent => "SYN_SENT",
            Self::SynReceived => "SYN_RECV",
            Self::FinWait => "FIN_WAIT",
            Self::TimeWait => "TIME_WAIT",
            Self::Close => "CLOSE",
            Self::CloseWait => "CLOSE_WAIT",
            Self::LastAck => "LAST_ACK",
            Self::Listen => "LISTEN",
            Self::SynAck => "SYNACK",
        }
    }
}

/// Seconds until a connection in each state expires (IPVS's defaults), by number; the rest is padding.
#[doc(alias = "tcp_timeouts")]
pub const TIMEOUTS: [u32; 16] = [2, 900, 120, 60, 120, 120, 10, 60, 30, 120, 120, 2, 2, 2, 2, 2];

/// Which half of the conversation a packet belongs to, and which halves are seen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Direction {
    /// From the client; answers pass the director, too.
    Input = 0,
    /// From the real server.
    Output = 1,
    /// From the client; answers take another way.
    InputOnly = 2,
}

/// Bits of the flags byte of a TCP header.
pub mod flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Begin a connection.
    pub const SYN: u8 = 0x02;
    /// End it at once.
    pub const RST: u8 = 0x04;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
}

/// The state after a packet with these TCP flags. `secure` selects IPVS's defence table.
#[doc(alias = "set_tcp_state")]
#[inline(always)]
pub fn next(secure: bool, direction: Direction, state: u8, tcp_flags: u8) -> u8 {
    let event = if tcp_flags & flags::RST != 0 {
        3
    } else if tcp_flags & flags::SYN != 0 {
        0
    } else if tcp_flags & flags::FIN != 0 {
        1
    } else if tcp_flags & flags::ACK != 0 {
        2
    } else {
        return State::Close as u8;
    };
    let row = (direction as usize * 4 + event) & 0xf;
    let table = if secure { &SECURE } else { &NORMAL };
    table[row][(state & 0xf) as usize]
}

/// Whether IPVS counts a connection in this state as active.
#[doc(alias = "tcp_state_active")]
#[inline(always)]
pub const fn is_active(state: u8) -> bool {
    const ACTIVE: u16 =
        1 << State::Established as u16 | 1 << State::SynSent as u16 | 1 << State::SynReceived as u16 | 1 << State::SynAck as u16;
    ACTIVE >> (state & 0xf) & 1 != 0
}

const NO: u8 = State::None as u8;
const ES: u8 = State::Established as u8;
const SS: u8 = State::SynSent as u8;
const SR: u8 = State::SynReceived as u8;
const FW: u8 = State::FinWait as u8;
const TW: u8 = State::TimeWait as u8;
const CL: u8 = State::Close as u8;
const CW: u8 = State::CloseWait as u8;
const LA: u8 = State::LastAck as u8;
const LI: u8 = State::Listen as u8;
const SA: u8 = State::SynAck as u8;

/// A row for each direction and event, a column for each state; the last four rows and five columns are padding, so
/// that an index needs a mask and not a check.
type Table = [[u8; 16]; 16];

#[rustfmt::skip]
static NORMAL: Table = [
        // NO  ES  SS  SR  FW  TW  CL  CW  LA  LI  SA
        // INPUT
        [SR, ES, ES, SR, SR, SR, SR, SR, SR, SR, SR, NO, NO, NO, NO, NO], // SYN
        [CL, CW, SS, TW, TW, TW, CL, CW, LA, LI, TW, NO, NO, NO, NO, NO], // FIN
        [ES, ES, SS, ES, FW, TW, CL, CW, CL, LI, ES, NO, NO, NO, NO, NO], // ACK
        [CL, CL, CL, SR, CL, CL, CL, CL, LA, LI, SR, NO, NO, NO, NO, NO], // RST
        // OUTPUT
        [SS, ES, SS, SR, SS, SS, SS, SS, SS, LI, SR, NO, NO, NO, NO, NO], // SYN
        [TW, FW, SS, TW, FW, TW, CL, TW, LA, LI, TW, NO, NO, NO, NO, NO], // FIN
        [ES, ES, SS, ES, FW, TW, CL, CW, LA, ES, ES, NO, NO, NO, NO, NO], // ACK
        [CL, CL, SS, CL, CL, TW, CL, CL, CL, CL, CL, NO, NO, NO, NO, NO], // RST
        // INPUT_ONLY
        [SR, ES, ES, SR, SR, SR, SR, SR, SR, SR, SR, NO, NO, NO, NO, NO], // SYN
        [CL, FW, SS, TW, FW, TW, CL, CW, LA, LI, TW, NO, NO, NO, NO, NO], // FIN
        [ES, ES, SS, ES, FW, TW, CL, CW, CL, LI, ES, NO, NO, NO, NO, NO], // ACK
        [CL, CL, CL, SR, CL, CL, CL, CL, LA, LI, CL, NO, NO, NO, NO, NO], // RST
        [NO; 16], [NO; 16], [NO; 16], [NO; 16],
];

#[rustfmt::skip]
static SECURE: Table = [
        // NO  ES  SS  SR  FW  TW  CL  CW  LA  LI  SA
        // INPUT
        [SR, ES, ES, SR, SR, SR, SR, SR, SR, SR, SA, NO, NO, NO, NO, NO], // SYN
        [CL, CW, SS, TW, TW, TW, CL, CW, LA, LI, SA, NO, NO, NO, NO, NO], // FIN
        [ES, ES, SS, SR, FW, TW, CL, CW, CL, LI, SA, NO, NO, NO, NO, NO], // ACK
        [CL, CL, CL, SR, CL, CL, CL, CL, LA, LI, CL, NO, NO, NO, NO, NO], // RST
        // OUTPUT
        [SS, ES, SS, SA, SS, SS, SS, SS, SS, LI, SA, NO, NO, NO, NO, NO], // SYN
        [TW, FW, SS, TW, FW, TW, CL, TW, LA, LI, TW, NO, NO, NO, NO, NO], // FIN
        [ES, ES, SS, ES, FW, TW, CL, CW, LA, ES, ES, NO, NO, NO, NO, NO], // ACK
        [CL, CL, SS, CL, CL, TW, CL, CL, CL, CL, CL, NO, NO, NO, NO, NO], // RST
        // INPUT_ONLY
        [SA, ES, ES, SR, SA, SA, SA, SA, SA, SA, SA, NO, NO, NO, NO, NO], // SYN
        [CL, FW, SS, TW, FW, TW, CL, CW, LA, LI, TW, NO, NO, NO, NO, NO], // FIN
        [ES, ES, SS, ES, FW, TW, CL, CW, CL, LI, ES, NO, NO, NO, NO, NO], // ACK
        [CL, CL, CL, SR, CL, CL, CL, CL, LA, LI, CL, NO, NO, NO, NO, NO], // RST
        [NO; 16], [NO; 16], [NO; 16], [NO; 16],
];
