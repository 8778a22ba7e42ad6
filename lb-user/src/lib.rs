//! Everything behind the one binary `bpfvs`.
//!
//! Data flows one way: the command lines ([`cli`], [`ipvsadm`]) speak to the daemon through its [`api`]; the API's
//! requests change the [`director`], the model of services and real servers with IPVS's rules; the director compiles
//! schedules ([`scheduler`]) and hands all to the [`datapath`], which alone knows maps, programs and netlink.
//! [`synchronisation`] is what directors tell each other. [`realserver`] is for the other machines: it sets real servers up and needs no daemon.
#![deny(unsafe_code)]

pub mod api;
pub mod bpf_file_system;
pub mod cli;
pub mod daemon;
pub mod datapath;
pub mod director;
pub mod ipvsadm;
pub mod realserver;
pub mod scheduler;
pub mod synchronisation;
