//! The BPF file system: where pins live, which keep maps, programs and links when no process does.
//!
//! Distributions with systemd mount it at boot; where nobody did (containers, small systems), [`ensure`] does. It does not
//! in a shell of `ip netns exec`: that hides the real one behind a `/sys` of its own, and pins made there would
//! vanish with the shell.

use std::{fs, path::Path};

use anyhow::{Context, bail};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// Where it is mounted.
pub const PATH: &str = "/sys/fs/bpf";

/// Sees to it that the BPF file system is mounted. The error is one sentence.
pub fn ensure() -> anyhow::Result<()> {
    if is_mounted(Path::new(PATH)) {
        return Ok(());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if let Some(namespace) = shell_of(&mounts, |name| Path::new("/run/netns").join(name).exists()) {
        bail!(
            "cannot pin anything at {PATH}: this shell was made by `ip netns exec {namespace}`, which hides the BPF file system; \
             leave it and say `--netns {namespace}`"
        );
    }
    mount(Some("bpf"), PATH, Some("bpf"), MsFlags::empty(), None::<&str>).with_context(|| {
        format!("no BPF file system is mounted at {PATH}, and it cannot be mounted; try `mount -t bpf bpf {PATH}` as root")
    })?;
    tracing::info!("mounted the BPF file system at {PATH}");
    Ok(())
}

fn is_mounted(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}

/// The network namespace of the `ip netns exec` that this process runs under: it mounts a `/sys` whose source is its name.
fn shell_of(mounts: &str, is_namespace: impl Fn(&str) -> bool) -> Option<&str> {
    // "36 35 0:21 / /sys rw,relatime shared:7 - sysfs NAME rw": the last mount at /sys is the one that is seen.
    let last = mounts.lines().rfind(|line| line.split(' ').nth(4) == Some("/sys"))?;
    let mut source = last.split(" - ").nth(1)?.split(' ');
    (source.next() == Some("sysfs")).then(|| source.next()).flatten().filter(|name| is_namespace(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_file_system_is_none_for_bpf() {
        assert!(!is_mounted(Path::new("/proc")));
    }

    #[test]
    fn shells_of_ip_netns_exec_are_recognised() {
        let usual = "23 28 0:21 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n24 28 0:22 / /proc rw - proc proc rw\n";
        let shell = format!("{usual}99 28 0:77 / /sys rw,relatime - sysfs blue rw\n");
        let is_namespace = |name: &str| name == "blue";
        assert_eq!(shell_of(usual, is_namespace), None);
        assert_eq!(shell_of(&shell, is_namespace), Some("blue"));
        assert_eq!(shell_of(&shell, |_| false), None, "a mount of that name that is no namespace");
    }
}
