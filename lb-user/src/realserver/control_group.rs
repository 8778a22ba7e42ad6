//! Control groups, version 2: the tree that every process has a place in, and where programs about sockets are attached.
//!
//! Systems with systemd mount the tree at `/sys/fs/cgroup`; those that still have version 1 beside it, at
//! `/sys/fs/cgroup/unified`. A group is known to the kernel by the inode number of its directory.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

/// A control group.
#[derive(Debug)]
pub(super) struct ControlGroup {
    /// Its directory.
    pub(super) path: PathBuf,
    /// Its number.
    pub(super) id: u64,
    /// The open directory, for the kernel.
    pub(super) file: File,
}

impl ControlGroup {
    /// The group of a directory; without one the root of the tree.
    pub(super) fn open(path: Option<&Path>) -> Result<Self> {
        let path = match path {
            Some(path) => path.to_path_buf(),
            None => root().context(
                "cannot find the control groups: no file system of the type cgroup2 is mounted; try `mount -t cgroup2 none /sys/fs/cgroup` as root",
            )?,
        };
        let file = File::open(&path).with_context(|| {
            format!(
                "cannot open the control group {}: see the cause; name a directory of the cgroup2 file system, and not from a shell of `ip netns exec`, which hides it",
                path.display()
            )
        })?;
        if !fstatfs(&file).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC) {
            let tree = root().map_or_else(|| "which is mounted nowhere".to_owned(), |root| format!("below {}", root.display()));
            bail!(
                "cannot use {} as a control group: it is not in the file system cgroup2; name a directory of that, {tree}",
                path.display()
            );
        }
        let id = file
            .metadata()
            .with_context(|| format!("cannot look at the control group {}: see the cause; run as root", path.display()))?
            .ino();
        Ok(Self { path, id, file })
    }
}

/// The directory of the group with this number, if it still exists.
pub(super) fn path_of(id: u64) -> Option<PathBuf> {
    find(root()?, id)
}

fn find(directory: PathBuf, id: u64) -> Option<PathBuf> {
    if fs::metadata(&directory).ok()?.ino() == id {
        return Some(directory);
    }
    let entries = fs::read_dir(&directory).ok()?.flatten();
    let groups = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    groups.map(|entry| entry.path()).find_map(|group| find(group, id))
}

/// Where the tree is mounted.
fn root() -> Option<PathBuf> {
    root_in(&fs::read_to_string("/proc/self/mounts").ok()?)
}

fn root_in(mounts: &str) -> Option<PathBuf> {
    // "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0"
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let place = words.next()?;
        (words.next() == Some("cgroup2")).then(|| place.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_found_beside_version_1() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n";
        assert_eq!(root_in(mounts), None);
        let both = format!("{mounts}cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n");
        assert_eq!(root_in(&both), Some("/sys/fs/cgroup/unified".into()));
    }

    #[test]
    fn a_directory_of_another_file_system_is_none() {
        let error = ControlGroup::open(Some(Path::new("/proc"))).expect_err("no control group");
        assert!(error.to_string().contains("/proc"), "{error:#}");
    }
}
