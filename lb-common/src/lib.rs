//! What the datapath in the kernel and the daemon in userspace must agree on.
//!
//! Everything here is a layout, a constant or a pure function: no I/O, no clock, no allocation. The eBPF programs
//! (`lb-ebpf`) and the daemon (`lb-user`) both import this crate, so a header is parsed, a checksum updated and a TCP
//! state advanced by one piece of code, which is unit-tested and fuzzed on the host.
//!
//! | subject | module |
//! | --- | --- |
//! | address families | [`family`] |
//! | what stands in the maps | [`connection`], [`reply`], [`service`], [`server`], [`hop`], [`local`], [`schedule`], [`locality`], [`template`], [`call`], [`statistics`], [`config`] |
//! | why a packet left | [`reason`] |
//! | a prototype of another connection table | [`lines`] |
//! | headers and their parsing | [`packet`] |
//! | Internet checksums, SCTP's | [`checksum`], [`crc32c`] |
//! | IPVS's hashes, and picking by them | [`hash`], [`pick`] |
//! | protocol state machines | [`tcp`], [`sctp`], [`udp`] |
//! | what keeps a flood from the connection tables | [`flood`] |
//! | the "may be ours" filter | [`filter`] |
//! | mark rules for networks | [`mark`] |
//! | the client's address in a TCP option | [`toa`] |
//! | the Call-ID of a SIP message | [`sip`] |
//! | what the datapath must do with a frame (on the host only) | `model` |
//!
//! Byte order: a field that mirrors a header is in network order and its documentation says so; all others are in host order.
#![no_std]
#![deny(unsafe_code)]

#[cfg(any(test, feature = "user"))]
extern crate std;

pub mod call;
pub mod checksum;
pub mod config;
pub mod connection;
pub mod crc32c;
pub mod family;
pub mod filter;
pub mod flood;
pub mod floor;
pub mod hash;
pub mod hop;
pub mod lines;
pub mod local;
pub mod locality;
pub mod mark;
#[cfg(any(test, feature = "user"))]
pub mod model;
pub mod packet;
pub mod pick;
pub mod quarrel;
pub mod reason;
pub mod reply;
pub mod schedule;
pub mod sctp;
pub mod server;
pub mod service;
pub mod sip;
pub mod statistics;
pub mod tcp;
pub mod template;
pub mod toa;
pub mod udp;
mod wire;

pub use wire::Plain;
