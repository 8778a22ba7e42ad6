//! What a daemon needs of the machine, looked at before anything is changed: rights, the kernel's age, a BPF file system.

use std::fs;

use anyhow::{Context, bail};
use nix::sys::utsname::uname;

use crate::bpf_file_system;

/// The oldest kernel that bpfvs is tested with.
const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// A capability: its number, and its name.
type Capability = (u32, &'static str);

const CAP_NET_ADMIN: Capability = (12, "CAP_NET_ADMIN");
const CAP_SYS_ADMIN: Capability = (21, "CAP_SYS_ADMIN");
const CAP_PERFMON: Capability = (38, "CAP_PERFMON");
const CAP_BPF: Capability = (39, "CAP_BPF");

/// Looks at everything; the first thing that is missing is the error. `entering`: another network namespace will be entered.
pub fn check(entering: bool) -> anyhow::Result<()> {
    let status = fs::read_to_string("/proc/self/status").context("cannot tell this process's rights; see that /proc is mounted")?;
    check_capabilities(effective_capabilities(&status), entering)?;
    let uname = uname().context("cannot tell the kernel's version")?;
    check_kernel(&uname.release().to_string_lossy())?;
    bpf_file_system::ensure().context("cannot run the daemon")
}

/// The bits of `CapEff`.
fn effective_capabilities(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default()
}

fn check_capabilities(effective: u64, entering: bool) -> anyhow::Result<()> {
    let has = |(bit, _): Capability| effective & (1 << bit) != 0;
    // CAP_SYS_ADMIN includes what CAP_BPF and CAP_PERFMON allow.
    let mut needed = if has(CAP_SYS_ADMIN) { vec![CAP_NET_ADMIN] } else { vec![CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON] };
    if entering {
        needed.push(CAP_SYS_ADMIN);
    }
    let missing: Vec<&str> = needed.into_iter().filter(|capability| !has(*capability)).map(|(_, name)| name).collect();
    if !missing.is_empty() {
        bail!("cannot run the daemon: this process has no {}; run it as root", missing.join(", no "));
    }
    Ok(())
}

fn check_kernel(release: &str) -> anyhow::Result<()> {
    let mut numbers = release.split(['.', '-', '+', '~']).map(|number| number.parse::<u32>().unwrap_or_default());
    let version = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    if version < OLDEST_KERNEL {
        let (major, minor) = OLDEST_KERNEL;
        bail!("cannot run the daemon: the kernel is Linux {release}, and bpfvs needs {major}.{minor} or later; use a newer kernel");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_rights_are_named() {
        let message = |bits, entering| match check_capabilities(bits, entering) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        let all = |capabilities: &[Capability]| capabilities.iter().map(|(bit, _)| 1u64 << bit).sum::<u64>();
        assert_eq!(
            message(0, false),
            "cannot run the daemon: this process has no CAP_NET_ADMIN, no CAP_BPF, no CAP_PERFMON; run it as root"
        );
        assert_eq!(message(all(&[CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON]), false), "");
        assert_eq!(message(all(&[CAP_NET_ADMIN, CAP_SYS_ADMIN]), true), "");
        assert!(message(all(&[CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON]), true).contains("no CAP_SYS_ADMIN;"));
        assert_eq!(effective_capabilities("Name:\tx\nCapEff:\t0000000000001000\n"), 1 << 12);
    }

    #[test]
    fn old_kernels_are_refused() {
        for release in ["6.1.0-13-amd64", "6.12", "7.0.0-rc1", "6.18.44+x"] {
            check_kernel(release).expect("it is new enough");
        }
        for release in ["5.15.0-91-generic", "6.0.9", "4.19", "?"] {
            let error = check_kernel(release).expect_err("it is too old").to_string();
            assert!(error.contains(release) && error.contains("6.1"), "{error}");
        }
    }
}
