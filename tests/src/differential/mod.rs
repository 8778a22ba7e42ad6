//! Whether bpfvs decides as the kernel's IPVS does: both get the same arrivals, and what they do is compared packet by packet.
//!
//! A [`Script`](script::Script) is one virtual service with its real servers, and what happens to it, all made up from a
//! seed: connections begin and end, weights change, real servers come and go. Its [rounds](script::Round) lie 20 ms apart.
//! IPVS plays it in a virtual machine, bpfvs on this one, both on the same [`Wire`](wire::Wire): raw frames in, and out come
//! frames whose destination says which real server was chosen. At the end both list their services, counters included.
//!
//! ```text
//! outside ──── frames ────► eth0 director: IPVS or bpfvs
//! 10.9.0.0/16 ◄── frames to 02:00:00:00:01:NN, real server NN
//! ```
//!
//! Scripts know nothing of each other, so many are played side by side: in each round every one of them has its turn, and
//! within each of them arrivals are still 20 ms apart.
//!
//! | subject | module |
//! | --- | --- |
//! | what happens, made up from a seed | [`script`] |
//! | the director's one wire | [`wire`] |
//! | a script becomes frames, and frames become answers | [`player`] |
//! | whether two directors agree, and how they do not | [`verdict`] |
//! | clients of persistent services that come back | [`persistence`] |
//! | SIP messages that those send | [`sip`] |
//! | what monitoring reads | [`proc`] |
//!
//! IPVS's side is the program `kernel_ipvs` of this package, which makes up the same scripts in the guest.

pub mod persistence;
pub mod player;
pub mod proc;
pub mod script;
pub mod sip;
pub mod verdict;
pub mod wire;
