//! Floors: the smallest programs that do a part of a director's work. The bench measures them beside the datapath.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#[cfg(not(target_arch = "bpf"))]
fn main() {}
