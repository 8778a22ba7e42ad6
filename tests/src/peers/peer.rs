//! Who can stand between clients and real servers.

use std::fmt::{self, Display, Formatter};

use crate::test_run::Hook;

/// How bpfvs forwards.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "the names are those of the field")]
pub enum Method {
    Route,
    Tunnel,
    Masquerade,
    FullNat,
}

impl Method {
    /// All.
    pub const ALL: [Self; 4] = [Self::Route, Self::Tunnel, Self::Masquerade, Self::FullNat];

    /// What `ipvsadm -a` is told.
    pub const fn options(self) -> &'static str {
        match self {
            Self::Route => "-g",
            Self::Tunnel => "-i",
            Self::Masquerade => "-m",
            Self::FullNat => "-m --fullnat",
        }
    }
}

/// Who stands between.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Peer {
    /// Nobody: the client asks the first real server, and the kernel routes.
    Routing,
    /// The kernel's DNAT, taking turns by `numgen`.
    Nftables,
    /// HAProxy, `mode tcp`, as many threads as there are CPUs.
    Haproxy,
    /// nginx's `stream` module, as many workers as there are CPUs.
    Nginx,
    /// bpfvs.
    Bpfvs(Method, Hook),
}

impl Peer {
    /// All, in the order of the table. The first is what the others are compared with.
    pub fn all() -> Vec<Self> {
        let ours = Hook::ALL.into_iter().flat_map(|hook| Method::ALL.map(|method| Self::Bpfvs(method, hook)));
        [Self::Routing, Self::Nftables, Self::Haproxy, Self::Nginx].into_iter().chain(ours).collect()
    }
}

impl Display for Peer {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self::Bpfvs(method, hook) = self else {
            return formatter.pad(match self {
                Self::Routing => "routing alone",
                Self::Nftables => "nftables DNAT",
                Self::Haproxy => "HAProxy, mode tcp",
                Self::Nginx | Self::Bpfvs(..) => "nginx stream",
            });
        };
        let method = match method {
            Method::Route => "DR",
            Method::Tunnel => "TUN",
            Method::Masquerade => "NAT",
            Method::FullNat => "FULLNAT",
        };
        let hook = if *hook == Hook::Xdp { "XDP" } else { "tc" };
        formatter.pad(&format!("bpfvs {method}, {hook}"))
    }
}
