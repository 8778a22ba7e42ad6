//! What programs of bpfvs share: a frame's access, room, and way out ([`packet`]), and words that CPUs change at once ([`atomic`]).
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

pub mod atomic;
pub mod packet;

/// What every object needs besides its programs: a licence that the kernel accepts (some of its helpers are for GPL
/// programs only), a panic handler that is never reached, and on the host, where the crate is only checked, a `main`.
#[macro_export]
macro_rules! object {
    () => {
        #[cfg(target_arch = "bpf")]
        #[panic_handler]
        fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
            loop {}
        }

        #[cfg(target_arch = "bpf")]
        #[unsafe(link_section = "license")]
        #[unsafe(no_mangle)]
        static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

        #[cfg(not(target_arch = "bpf"))]
        fn main() {}
    };
}
