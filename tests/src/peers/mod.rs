//! bpfvs beside its peers: the same clients, the same servers, the same wires, and each time somebody else between them.
//!
//! ```text
//! client ── eth1, the virtual address ── director ── eth0 ──┬── rs1: nginx, iperf3
//!                                                           └── rs2: nginx
//! ```
//!
//! The director is the real servers' router, so that every packet in both directions passes it, whoever balances; with direct
//! routing and tunnels the answers are routed by the kernel's stack. `cargo xtask bench peers` is the command.
//!
//! | | |
//! | --- | --- |
//! | [`peer`] | who can stand between |
//! | [`stage`] | the network around it |
//! | [`load`] | what is sent through it, and what that took |

pub mod load;
pub mod peer;
pub mod stage;
