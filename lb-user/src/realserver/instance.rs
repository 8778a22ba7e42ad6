//! The network namespace that a command works in, and the places that belong to it.
//!
//! Every namespace has a state file and a directory of pins of its own, named by the instance: `main` in the namespace of
//! process 1, else `netns-<inode>`, also where process 1 cannot be looked at.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

/// Where state files live.
const RUN: &str = "/run/bpfvs";
/// Where programs and maps are pinned.
const PINS: &str = "/sys/fs/bpf/bpfvs";

/// A network namespace that this thread is in.
#[derive(Debug)]
pub(super) struct Instance {
    name: String,
}

impl Instance {
    /// Enters the namespace, if one is named, and finds out which one this is.
    pub(super) fn enter(netns: Option<&str>) -> Result<Self> {
        if let Some(netns) = netns {
            let path = if netns.contains('/') { PathBuf::from(netns) } else { Path::new("/run/netns").join(netns) };
            let file = File::open(&path).with_context(|| {
                format!(
                    "cannot enter the network namespace {netns}: {} cannot be opened; `ip netns list` shows those that exist",
                    path.display()
                )
            })?;
            setns(file, CloneFlags::CLONE_NEWNET).with_context(|| {
                format!(
                    "cannot enter the network namespace {netns}: the kernel refused {}; run as root and name a network namespace",
                    path.display()
                )
            })?;
        }
        let inode = |path: &str| fs::metadata(path).map(|metadata| metadata.ino());
        let own = inode("/proc/thread-self/ns/net")
            .context("cannot find out the network namespace: /proc/thread-self/ns/net cannot be read; mount /proc")?;
        // Not everybody may look at process 1. Then the number serves as the name: two namespaces must never share a state.
        let initial = inode("/proc/1/ns/net").ok();
        Ok(Self { name: if initial == Some(own) { "main".into() } else { format!("netns-{own}") } })
    }

    /// What was changed in this namespace.
    pub(super) fn state_file(&self) -> PathBuf {
        Path::new(RUN).join(format!("realserver-{}.json", self.name))
    }

    /// Where the program for an interface is pinned. By index, because names may contain dots and bpffs refuses them.
    pub(super) fn pins(&self, interface: u32) -> PathBuf {
        Path::new(PINS).join(&self.name).join(format!("realserver-{interface}"))
    }
}

/// Where the programs of control groups are pinned: one place for all namespaces, which control groups know nothing of.
pub(super) fn control_group_pins() -> PathBuf {
    Path::new(PINS).join("toa")
}

/// Removes the pins of a program that is attached no more, and the directories that are empty then.
pub(super) fn remove_pins(pins: &Path) -> Result<()> {
    if pins.exists() {
        fs::remove_dir_all(pins).with_context(|| format!("cannot remove {}: the kernel refused; run as root", pins.display()))?;
    }
    if let Some(parent) = pins.parent() {
        remove_empty_directories(parent);
    }
    Ok(())
}

/// Removes the directories of the pins as far as they are empty: the instance's and bpfvs's own.
fn remove_empty_directories(pins: &Path) {
    for directory in pins.ancestors().take_while(|directory| directory.starts_with(PINS)) {
        if fs::remove_dir(directory).is_err() {
            break;
        }
    }
}
