//! Other kernels, and the kernel's own IPVS, in a virtual machine.
//!
//! The machine that runs the tests has one kernel, and perhaps no `ip_vs`. Debian's packages hold others with all their
//! modules; QEMU boots them without any privilege in the host, without KVM and without a network, in some seconds.
//!
//! ```no_run
//! use bpfvs_tests::vm::{Machine, Version};
//!
//! let outcome = Machine::new(Version::V6_12)?.modules(&["ip_vs", "ip_vs_rr"]).run("ipvsadm -A -t 192.0.2.1:80 -s rr; ipvsadm -Ln")?;
//! assert_eq!(outcome.status, 0, "{}", outcome.output);
//! # anyhow::Ok(())
//! ```
//!
//! The guest is this host's programs (busybox, bash, iproute2, ipvsadm, … with their libraries) in an archive in memory,
//! and a script. What it prints comes back with its status; nothing else does.
//!
//! | part | module |
//! | --- | --- |
//! | a kernel package, fetched once and kept | [`kernel`] |
//! | the guest's files | [`initramfs`] |
//! | starting QEMU and waiting for it | [`machine`] |
//!
//! By hand: `cargo run -p bpfvs-tests --bin vm -- --kernel 6.1 script.sh`.

pub mod initramfs;
pub mod kernel;
pub mod machine;

pub use kernel::{Kernel, Version};
pub use machine::{Machine, Outcome};
