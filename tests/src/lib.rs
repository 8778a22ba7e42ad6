//! Black-box tests of bpfvs.
//!
//! This crate knows bpfvs as its users do: by its command line, by its API on a Unix socket, and by its pinned maps and
//! programs. Nothing here is linked with the daemon, and no part of the kernel is imitated: packets travel through
//! network namespaces, programs are run by the kernel, other kernels run in a virtual machine.
//!
//! | subject | module |
//! | --- | --- |
//! | namespaces, and commands in them | [`netns`] |
//! | the layouts of the LVS how-to's | [`lab`] |
//! | a layout with everything on: bpfvs, nginx | [`balanced`] |
//! | nginx, curl, socat, dnsmasq, vsftpd, iperf3, tcpdump | [`programs`] |
//! | bulk traffic in both directions | [`both_ways`] |
//! | bpfvs itself | [`bpfvs`] |
//! | frames, byte by byte | [`frame`] |
//! | a TCP client, segment by segment | [`caller`] |
//! | control groups, and processes in them | [`control_group`] |
//! | pinned programs, run on one frame | [`test_run`], with a director to do it on: [`mod@bench`] |
//! | connections that begin and end on it, for schedulers | [`arrivals`], and who should get them: [`book`] |
//! | nanoseconds per packet | [`speed`], and others beside bpfvs: [`peers`] |
//! | what a sweep does to packets meanwhile | [`latency`] |
//! | as many connections as a director is made for | [`scale`] |
//! | what a packet costs from end to end, in instructions | [`chain`] |
//! | another connection table beside the kernel's hash map | [`tables`] |
//! | a program for the far end of a veth pair | [`pass`] |
//! | other kernels | [`vm`] |
//! | bpfvs and the kernel's own IPVS, compared: what they choose | [`differential`] |
//! | the same: how they translate addresses | [`translation`] |
//! | conditions with a deadline | [`wait`] |
//! | tests that cannot run here | [`mod@skip`] |
//!
//! The tests need root, and they run beside each other: whatever a test makes has a name or a namespace of its own, and
//! goes away when its owner is dropped.

pub mod arrivals;
pub mod balanced;
pub mod bench;
pub mod book;
pub mod both_ways;
pub mod bpfvs;
pub mod caller;
pub mod chain;
pub mod control_group;
pub mod differential;
pub mod frame;
pub mod lab;
pub mod latency;
pub mod netns;
pub mod pass;
pub mod peers;
pub mod programs;
pub mod scale;
pub mod skip;
pub mod speed;
pub mod tables;
pub mod test_run;
pub mod translation;
pub mod vm;
pub mod wait;
