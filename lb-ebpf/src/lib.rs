//! What every program of bpfvs needs of a frame: access, room, and a way out. See [`packet`].
#![no_std]
#![allow(
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "verdicts and lengths change sign at the border to the helpers"
)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![expect(
    clippy::missing_safety_doc,
    reason = "one contract for all: the context is the one that the kernel gave to the running program"
)]

pub mod packet;
