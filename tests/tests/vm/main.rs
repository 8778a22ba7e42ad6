//! What needs a virtual machine: other kernels, and the kernel's own IPVS beside bpfvs.
//!
//! | | |
//! | --- | --- |
//! | [`machine`] | the virtual machine itself, without bpfvs |
//! | [`kernels`] | bpfvs on the oldest kernel and on Debian's newer one |
//! | [`instructions`] | what a packet costs, beside the kernel's IPVS |
//! | [`nat`] | packets are translated as by the kernel's IPVS |
//! | [`persistence`] | clients come back as with the kernel's IPVS |
//!
//! They are one program, so that there is always a machine that boots while another one is waited for. `vm_schedulers.rs` is by
//! itself: its arrivals are 20 ms apart, which nobody must disturb.

mod instructions;
mod kernels;
mod machine;
mod nat;
mod persistence;
