//! Tests that cannot run on this machine say so, loudly, and are counted.
//!
//! A test that needs what the machine does not have ends with [`skip!`](crate::skip!), or begins with
//! [`needs!`](crate::needs!). The line goes to standard error past the test harness's capture, so that a green run that
//! tested nothing does not look like one that tested all. With `BPFVS_TESTS_MUST_RUN=1`, as in CI, a skip is a failure.
//!
//! ```no_run
//! # fn test() {
//! bpfvs_tests::needs!(root, "nginx", "curl");
//! # }
//! ```

use std::{
    env, fs,
    io::Write,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
};

static SKIPPED: AtomicUsize = AtomicUsize::new(0);

/// Ends a test that cannot run here, with the reason. Tests return a `Result<()>`.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)+) => {{
        $crate::skip::announce(module_path!(), &format!($($reason)+));
        return Ok(());
    }};
}

/// Ends the test with [`skip!`](crate::skip!) unless it runs as root (if `root` comes first) and the named programs exist.
#[macro_export]
macro_rules! needs {
    (root $(, $program:literal)* $(,)?) => {
        if !$crate::skip::is_root() {
            $crate::skip!("needs root");
        }
        $(
            if $crate::skip::find($program).is_none() {
                $crate::skip!("needs the program {}", $program);
            }
        )*
    };
}

/// Ends the test with [`skip!`](crate::skip!) unless this machine can start virtual ones with these kernels; without any: with
/// each that there is.
#[macro_export]
macro_rules! needs_machines {
    () => {
        $crate::needs_machines!($crate::vm::Version::ALL)
    };
    ($versions:expr) => {
        $crate::needs!(root);
        if let Some(obstacle) = $crate::vm::machine::obstacle() {
            $crate::skip!("{obstacle}");
        }
        for version in $versions {
            if let Err(error) = $crate::vm::Kernel::get(version) {
                $crate::skip!("{error:#}");
            }
        }
    };
}

/// Ends a test that the running kernel has no code for, while another test does the same on a kernel that has it. This is no
/// failure in CI, because nothing that could be installed would help: `skip_kernel!("vm::kernels::vlan", "no VLANs")`.
#[macro_export]
macro_rules! skip_kernel {
    ($instead:literal, $($reason:tt)+) => {{
        $crate::skip::print(module_path!(), &format!("this kernel cannot: {}; {} tests it on another", format!($($reason)+), $instead));
        return Ok(());
    }};
}

/// Prints the reason and counts. Use [`skip!`](crate::skip!).
///
/// # Panics
/// If `BPFVS_TESTS_MUST_RUN` is set: then nothing may be skipped.
pub fn announce(test: &str, reason: &str) {
    let name = print(test, reason);
    assert!(env::var_os("BPFVS_TESTS_MUST_RUN").is_none(), "BPFVS_TESTS_MUST_RUN is set, but {name} cannot run here: {reason}");
}

/// Prints the reason past the test harness's capture and counts. Returns the test's name.
pub fn print(test: &str, reason: &str) -> String {
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    let name = std::thread::current().name().unwrap_or(test).to_owned();
    // Not eprintln!: the test harness captures that of a passing test.
    let _ = writeln!(std::io::stderr().lock(), "SKIPPED {test}::{name}: {reason} ({count} skipped so far in this run)");
    name
}

/// Whether this process may do what tests do to networks.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Where a program is: in the search path, or where distributions keep what only root uses.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| fs::metadata(candidate).is_ok_and(|metadata| metadata.is_file()))
}
