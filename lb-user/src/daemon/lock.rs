//! One daemon for each network namespace.
//!
//! The lock is a name in the abstract namespace of Unix sockets, which every network namespace has for itself: whoever
//! listens at `@bpfvs` is the daemon. The kernel takes the name away when the process ends, however it ends.

use std::{
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
};

use anyhow::{Context, bail};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

/// The name, after the zero byte that makes it abstract.
const NAME: &[u8] = b"bpfvs";

/// Held as long as the daemon lives.
#[derive(Debug)]
pub struct Lock {
    _listener: UnixListener,
}

impl Lock {
    /// Takes the lock of this process's network namespace. If another has it, the error says who.
    pub fn take() -> anyhow::Result<Self> {
        Self::take_name(NAME)
    }

    pub(super) fn take_name(name: &[u8]) -> anyhow::Result<Self> {
        let address = SocketAddr::from_abstract_name(name).context("the name of the lock is no socket's name")?;
        match UnixListener::bind_addr(&address) {
            Ok(listener) => Ok(Self { _listener: listener }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let holder = holder(&address).map_or_else(String::new, |pid| format!(", process {pid}"));
                bail!(
                    "this network namespace has a daemon already{holder}; stop it with `bpfvs stop` (`--socket` if it does not \
                     listen at the usual place), or use another namespace"
                )
            }
            Err(error) => {
                Err(error).context("cannot take the lock that keeps a second daemon out; see that Unix sockets are allowed")
            }
        }
    }
}

/// The process that listens at an address, if it can be told.
fn holder(address: &SocketAddr) -> Option<i32> {
    let stream = UnixStream::connect_addr(address).ok()?;
    let credentials = getsockopt(&stream, PeerCredentials).ok()?;
    // 0: a process of another PID namespace.
    Some(credentials.pid()).filter(|pid| *pid > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_the_first_is() {
        let name = format!("bpfvs-test-{}", std::process::id());
        let first = Lock::take_name(name.as_bytes()).expect("the name is new");
        let error = Lock::take_name(name.as_bytes()).expect_err("it is taken").to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(first);
        Lock::take_name(name.as_bytes()).expect("it was given back");
    }
}
