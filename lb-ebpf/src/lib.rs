//! What every program of bpfvs needs of a frame: access, room, and a way out. See [`packet`].
#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![expect(
    clippy::missing_safety_doc,
    reason = "one contract for all: the context is the one that the kernel gave to the running program"
)]

pub mod packet;
