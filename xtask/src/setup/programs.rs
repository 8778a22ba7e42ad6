//! Programs that the demo and the tests call.
//!
//! They are looked for by their own names, so that any package will do that brings them; only what is not there is
//! installed.

use std::fs;

use anyhow::{Result, bail};

use super::{debian, debian::Apt};
use crate::command::{as_root, find, path, run, say};

/// What the programs are for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Purpose {
    /// `cargo xtask demo`
    Demo,
    /// `cargo xtask test` and `bench`: more programs than the demo needs
    Test,
    /// The tests in a virtual machine: more again
    Machine,
    /// `cargo xtask bench peers`: whom bpfvs is compared with, too
    Peers,
}

/// A program, the Debian package that brings it, and the first purpose that needs it.
const PROGRAMS: [(&str, &str, Purpose); 25] = [
    ("curl", "curl", Purpose::Demo),
    ("ip", "iproute2", Purpose::Demo),
    ("nginx", "nginx-light", Purpose::Demo),
    ("nsenter", "util-linux", Purpose::Demo),
    ("sysctl", "procps", Purpose::Demo),
    ("busybox", "busybox-static", Purpose::Test),
    ("dnsmasq", "dnsmasq-base", Purpose::Test),
    ("ethtool", "ethtool", Purpose::Test),
    ("iperf3", "iperf3", Purpose::Test),
    ("iptables-legacy", "iptables", Purpose::Test),
    ("iptables-nft", "iptables", Purpose::Test),
    ("nft", "nftables", Purpose::Test),
    ("ping", "iputils-ping", Purpose::Test),
    ("socat", "socat", Purpose::Test),
    ("tcpdump", "tcpdump", Purpose::Test),
    ("traceroute", "traceroute", Purpose::Test),
    ("vsftpd", "vsftpd", Purpose::Test),
    ("cpio", "cpio", Purpose::Machine),
    ("ipvsadm", "ipvsadm", Purpose::Machine),
    ("modprobe", "kmod", Purpose::Machine),
    ("qemu-system-x86_64", "qemu-system-x86", Purpose::Machine),
    ("xz", "xz-utils", Purpose::Machine),
    ("haproxy", "haproxy", Purpose::Peers),
    ("wrk", "wrk", Purpose::Peers),
    ("/usr/lib/nginx/modules/ngx_stream_module.so", "libnginx-mod-stream", Purpose::Peers),
];

/// Installs what is missing of the programs for a purpose.
pub(crate) fn programs(purpose: Purpose) -> Result<()> {
    let missing: Vec<_> = PROGRAMS.iter().filter(|(name, _, first)| *first <= purpose && !there(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.iter().map(|(name, ..)| *name).collect::<Vec<_>>().join(", ");
    say(&format!("Programs that are missing: {names}."));
    let Some(apt) = Apt::find() else {
        bail!("{names} cannot be installed here, as this is no Debian: install them by hand, then run this command again");
    };
    let without_nginx = !debian::installed("nginx-common");
    apt.install(&missing.iter().map(|(_, package, _)| (*package).to_owned()).collect::<Vec<_>>())?;
    if without_nginx && debian::installed("nginx-common") && find("systemctl").is_some() {
        // The demo's web servers are processes of its own; the package's service would take port 80 at the next start.
        run(as_root("systemctl")?.args(["disable", "nginx.service"]))?;
    }
    match missing.iter().find(|(name, ..)| !there(name)) {
        Some((name, package, _)) => {
            bail!("{name} is still missing, though {package} was installed: the path is {}", path().display())
        }
        None => Ok(()),
    }
}

fn there(name: &str) -> bool {
    match find(name) {
        // Alone in a virtual machine's first file system, it finds no libraries.
        Some(busybox) if name == "busybox" => fs::read(busybox).is_ok_and(|program| !contains(&program, b"/ld-linux")),
        found => found.is_some(),
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}
