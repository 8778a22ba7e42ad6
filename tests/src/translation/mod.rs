//! Whether bpfvs translates addresses (`-m`) as the kernel's IPVS does: both get the same frames, and what comes out is
//! compared byte by byte.
//!
//! A [`Conversation`](conversation::Conversation) is what a client and a masqueraded real server send each other, made up
//! from a seed: handshakes, data, ends, fragments, wrong checksums, ICMP errors of either side and of routers between, and
//! packets that belong to nothing. IPVS hears it in a virtual machine, bpfvs on this one, both between the same two
//! [`Wires`](wires::Wires). At the end both list their connections and what they have counted.
//!
//! ```text
//! 10.9.0.0/16 ── frames ──► eth0 director: IPVS or bpfvs eth1 ◄── frames ── 10.2.0.0/16
//! clients     ◄─ frames ───      10.99.0.1 (VIP)              ─── frames ─► real servers
//! ```
//!
//! | subject | module |
//! | --- | --- |
//! | what is said, made up from a seed | [`conversation`] |
//! | the director's two wires | [`wires`] |
//! | a conversation becomes frames, and a record of what came out | [`player`] |
//! | where two records may differ, and whether they do elsewhere | [`verdict`] |
//!
//! IPVS's side is the program `kernel_nat` of this package, which makes up the same conversations in the guest. Offloads are
//! not here: raw frames have none. Real programs have.

pub mod conversation;
pub mod player;
pub mod verdict;
pub mod wires;
