//! Control groups of our own, and processes that live in them.
//!
//! A socket belongs for ever to the group of the process that made it. So a server is started in the group, and not moved
//! there.
//!
//! ```no_run
//! use bpfvs_tests::{control_group::ControlGroup, netns::{Namespace, Process}};
//!
//! let (server, group) = (Namespace::new("server")?, ControlGroup::new()?);
//! let nginx = Process::spawn(group.command(&server, "nginx").arg("-v"))?;
//! # anyhow::Ok(())
//! ```

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result};

use crate::{netns::Namespace, wait};

/// A control group that goes away with its owner; its processes have to be gone before.
#[derive(Debug)]
pub struct ControlGroup {
    path: PathBuf,
}

impl ControlGroup {
    /// Makes a group below the root of the cgroup2 file system, which is an error if there is none: see [`root`].
    pub fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = root().context("no file system of the type cgroup2 is mounted")?;
        let path = root.join(format!("bpfvst-{}-{number}", process::id()));
        fs::create_dir(&path).with_context(|| format!("make the control group {}", path.display()))?;
        Ok(Self { path })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A command that will run in the group and in a namespace.
    pub fn command(&self, namespace: &Namespace, program: impl AsRef<OsStr>) -> Command {
        let mut command = namespace.command("sh");
        command.args(["-c", r#"echo $$ > "$0/cgroup.procs" && exec "$@""#]).arg(&self.path).arg(program);
        command
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        // The kernel may need a moment to bury the last process.
        if wait::until("the control group to be empty", wait::SOON, || fs::remove_dir(&self.path).is_ok()).is_err() {
            eprintln!("the control group {} stays behind: somebody lives in it", self.path.display());
        }
    }
}

/// Where the cgroup2 file system is mounted.
pub fn root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut lines = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    lines.find(|words| words.get(2) == Some(&"cgroup2")).map(|words| words[1].into())
}

/// Ends the test with [`skip!`](crate::skip!) unless there are control groups of version 2.
#[macro_export]
macro_rules! needs_control_groups {
    () => {
        if $crate::control_group::root().is_none() {
            $crate::skip!("needs control groups of version 2: no file system of the type cgroup2 is mounted");
        }
    };
}
