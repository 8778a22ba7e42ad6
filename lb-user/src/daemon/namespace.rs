//! Network namespaces: entering one, and the names of things that belong to it.
//!
//! One daemon serves one network namespace. Sockets, pins and state files are named by the instance, `main` in the initial
//! namespace and `netns-<inode>` in others, so that daemon and command line find each other without a word:
//!
//! ```text
//! initial namespace   /run/bpfvs/bpfvs.sock             /sys/fs/bpf/bpfvs/main
//! others              /run/bpfvs/netns-4026532300.sock  /sys/fs/bpf/bpfvs/netns-4026532300
//! ```
//!
//! Inode numbers are used again when a namespace has gone; its cookie is not, and tells whether what was found under a
//! name is really this namespace's.

use std::{
    fs::{self, File},
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::datapath::netns_cookie;

/// Where sockets and state files are.
pub const RUN_DIRECTORY: &str = "/run/bpfvs";

/// Where maps, programs and links are pinned.
pub const PIN_DIRECTORY: &str = "/sys/fs/bpf/bpfvs";

/// Where `ip netns` keeps its namespaces.
const NAMED_NAMESPACES: &str = "/run/netns";

// To compare with `/proc/1/ns/net` would be simpler, but the kernel lets only those look there who have all rights of
// process 1, which command lines have not, and in a container not even root.

/// The inode of the initial network namespace since Linux 6.18 (`NET_NS_INIT_INO` in `include/uapi/linux/nsfs.h`); before, it
/// had any number, but that of none of the others.
const INITIAL_INODE: u64 = 0xefff_fff9;

/// The cookie of the initial network namespace up to Linux 6.17: it is the first that gets one (`setup_net` in
/// `net/core/net_namespace.c`). Since then the number belongs to no network namespace.
const INITIAL_COOKIE: u64 = 1;

/// The network namespace of this process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Identity {
    /// Its inode number; nothing in the initial namespace.
    inode: Option<u64>,
}

impl Identity {
    /// The identity of the namespace that this process is in.
    pub fn current() -> anyhow::Result<Self> {
        let own = fs::metadata("/proc/self/ns/net").context("cannot tell the network namespace; see that /proc is mounted")?;
        let initial = own.ino() == INITIAL_INODE || cookie()? == INITIAL_COOKIE;
        Ok(Self { inode: (!initial).then_some(own.ino()) })
    }

    /// The name of the instance.
    pub fn name(&self) -> String {
        match self.inode {
            None => "main".to_owned(),
            Some(inode) => format!("netns-{inode}"),
        }
    }

    /// Where the daemon listens unless it was told otherwise.
    pub fn socket(&self) -> PathBuf {
        let name = match self.inode {
            None => "bpfvs.sock".to_owned(),
            Some(_) => format!("{}.sock", self.name()),
        };
        Path::new(RUN_DIRECTORY).join(name)
    }

    /// Where the state is written unless another file is named.
    pub fn state_file(&self) -> PathBuf {
        Path::new(RUN_DIRECTORY).join(format!("{}.json", self.name()))
    }

    /// Where maps, programs and links are pinned.
    pub fn pins(&self) -> PathBuf {
        Path::new(PIN_DIRECTORY).join(self.name())
    }
}

/// Enters a network namespace: a name as `ip netns` knows it, or a path. Has to come before any other thread is made, as each
/// thread has its own.
pub fn enter(namespace: &str) -> anyhow::Result<()> {
    let path = if namespace.contains('/') { PathBuf::from(namespace) } else { Path::new(NAMED_NAMESPACES).join(namespace) };
    let file = File::open(&path).map_err(|error| {
        anyhow!(
            "cannot enter the network namespace {namespace}: {} cannot be opened ({error}); see `ip netns list`",
            path.display()
        )
    })?;
    setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|error| {
        anyhow!(
            "cannot enter the network namespace {namespace}: the kernel refuses ({}); see that {} is a network namespace and that \
             you are root",
            error.desc(),
            path.display()
        )
    })
}

/// The cookie of the network namespace that this process is in (Linux 5.14).
pub fn cookie() -> anyhow::Result<u64> {
    netns_cookie().context("cannot tell the cookie of the network namespace; bpfvs needs Linux 6.1 or later")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_namespace() {
        let (main, other) = (Identity { inode: None }, Identity { inode: Some(7) });
        assert_eq!(main.socket(), Path::new("/run/bpfvs/bpfvs.sock"));
        assert_eq!(main.pins(), Path::new("/sys/fs/bpf/bpfvs/main"));
        assert_eq!(main.state_file(), Path::new("/run/bpfvs/main.json"));
        assert_eq!(other.socket(), Path::new("/run/bpfvs/netns-7.sock"));
        assert_eq!(other.pins(), Path::new("/sys/fs/bpf/bpfvs/netns-7"));
        assert_eq!(other.state_file(), Path::new("/run/bpfvs/netns-7.json"));
    }

    #[test]
    fn a_namespace_has_a_cookie_that_stays() {
        let first = cookie().expect("the kernel is not too old");
        assert_ne!(first, 0);
        assert_eq!(first, cookie().expect("it answered before"));
    }

    #[test]
    fn a_namespace_that_is_not_there_is_an_error_in_words() {
        let error = enter("no-such-namespace").expect_err("there is none").to_string();
        assert!(error.contains("no-such-namespace") && error.contains("/run/netns/") && error.contains("ip netns list"), "{error}");
    }
}
