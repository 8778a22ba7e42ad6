//! What IPVS allows, and what this version can do.
//!
//! Each check answers with the refusal that a person sees. IPVS's own rules come first and in IPVS's order, so that a
//! program that knows the kernel meets the same error for the same mistake; what IPVS can do and bpfvs cannot yet is
//! refused last, with what to do instead. Nothing here looks at the model: whether a service or a server exists is
//! for the director to say.
//!
//! The network's own broadcast addresses are known to the routing table alone, so `10.0.0.255` passes here.

use std::net::IpAddr;

use super::model::{
    Family, Method, Persistence, Protocol, Refusal, RefusalKind, ServerConfig, ServerId, ServiceConfig, ServiceId, Timeouts,
    Tunnel, TunnelChecksum,
};
use crate::scheduler::Unknown;

/// The largest weight and threshold: IPVS keeps them as signed numbers.
const LARGEST: u32 = i32::MAX as u32;

/// The persistence engines.
const ENGINES: &[&str] = &["sip"];

/// The longest life of a template in seconds: 31 days, as with `ipvsadm`.
const LONGEST_PERSISTENCE: u32 = 31 * 86400;

/// Makes a refusal.
pub(super) fn refuse<T>(kind: RefusalKind, message: String) -> Result<T, Refusal> {
    Err(Refusal { kind, message })
}

/// The answer to the name of a scheduler that cannot be had.
pub(super) fn scheduler(unknown: &Unknown) -> Refusal {
    Refusal { kind: RefusalKind::SchedulerNotFound, message: format!("{unknown} (as in `-s rr`)") }
}

/// The rules about a service's persistence engine, which IPVS looks for right after the scheduler.
pub(super) fn engine(config: &ServiceConfig) -> Result<(), Refusal> {
    match &config.engine {
        Some(name) if !ENGINES.contains(&name.as_str()) => refuse(
            RefusalKind::SchedulerNotFound,
            format!("the persistence engine {name} cannot be used: there is none of this name; use sip, or leave it out"),
        ),
        _ => Ok(()),
    }
}

/// What this version cannot do for a service.
pub(super) fn service_supported(service: &ServiceId) -> Result<(), Refusal> {
    if let ServiceId::Mark { mark: 0, .. } = service {
        return refuse(
            RefusalKind::Invalid,
            format!("the service {service} cannot be set up: 0 stands for no mark; name a mark from 1 on"),
        );
    }
    Ok(())
}

/// IPVS's rules about a service by itself.
pub(super) fn service(service: &ServiceId, config: &ServiceConfig) -> Result<(), Refusal> {
    let invalid = |why: &str| refuse(RefusalKind::Invalid, format!("the service {service} cannot be set up: {why}"));
    match config.persistence {
        Some(Persistence { mask, .. }) if service.family() == Family::Ipv6 && !(1..=128).contains(&mask) => {
            invalid(&format!("{mask} is no length of an IPv6 prefix; use one from 1 to 128 (`-M`)"))
        }
        Some(Persistence { timeout, .. }) if !(1..=LONGEST_PERSISTENCE).contains(&timeout) => {
            invalid(&format!("a persistence of {timeout} s is out of range; use 1 to {LONGEST_PERSISTENCE} s (`-p`)"))
        }
        None if matches!(service, ServiceId::Address { port: 0, .. }) => invalid(
            "port 0 stands for all ports, which takes persistence to keep a client's connections together; add it (`-p`), or name a port",
        ),
        _ if config.one_packet && matches!(service, ServiceId::Address { protocol: Protocol::Tcp | Protocol::Sctp, .. }) => {
            invalid("each packet can be scheduled by itself with UDP only; leave that out (`-o`)")
        }
        _ => Ok(()),
    }
}

/// IPVS's rules about a server that stands by itself: before it is looked for among the others.
pub(super) fn server(service: &ServiceId, server: &ServerId, config: &ServerConfig) -> Result<(), Refusal> {
    crossing(service, server, config.method)?;
    if service.family() != Family::of(server.address) && !matches!(config.method, Method::Tunnel(_) | Method::FullNat { .. }) {
        return refuse(
            RefusalKind::Invalid,
            format!(
                "the real server {server} cannot serve {service}: their address families differ, and only a tunnel leads from \
                 one to the other; use the method tunnel (`-i`)"
            ),
        );
    }
    let limits = [
        ("weight", config.weight, RefusalKind::OutOfRange),
        ("upper threshold", config.upper_threshold, RefusalKind::Invalid),
        ("lower threshold", config.lower_threshold, RefusalKind::Invalid),
    ];
    for (name, value, kind) in limits {
        if value > LARGEST {
            return refuse(
                kind,
                format!("the {name} {value} of the real server {server} is out of range; use a number from 0 to {LARGEST}"),
            );
        }
    }
    if config.lower_threshold > config.upper_threshold {
        return refuse(
            RefusalKind::OutOfRange,
            format!(
                "the lower threshold {} of the real server {server} is above its upper threshold {}; set the upper one (`-x`) at \
                 least as high",
                config.lower_threshold, config.upper_threshold
            ),
        );
    }
    if let Method::Tunnel(Tunnel::Gue { port: 0, .. }) = config.method {
        return refuse(
            RefusalKind::Invalid,
            format!(
                "the GUE tunnel to the real server {server} has port 0, where nobody listens; name its UDP port (`--tun-port`)"
            ),
        );
    }
    Ok(())
}

/// What FULLNAT cannot do for clients of one family and a server of the other.
fn crossing(service: &ServiceId, server: &ServerId, method: Method) -> Result<(), Refusal> {
    let fault = match (service.family(), Family::of(server.address), method) {
        (Family::Ipv4, Family::Ipv6, Method::FullNat { .. }) => {
            "FULLNAT leads from IPv6 to IPv4 and not the other way; name the server's IPv4 address, or use the method tunnel (`-i`)"
        }
        (Family::Ipv6, Family::Ipv4, Method::FullNat { toa: true }) => {
            "a program with a socket of IPv4 cannot be shown clients' IPv6 addresses; leave that out (`--toa`)"
        }
        _ => return Ok(()),
    };
    refuse(RefusalKind::Unsupported, format!("the real server {server} cannot serve {service}: {fault}"))
}

/// IPVS's rule about the address of a new server.
pub(super) fn server_address(server: &ServerId) -> Result<(), Refusal> {
    let fault = match server.address {
        IpAddr::V4(address) if address.is_unspecified() => "is the address of nobody",
        IpAddr::V4(address) if address.is_broadcast() => "is the broadcast address",
        IpAddr::V6(address) if address.is_unspecified() => "is the address of nobody",
        IpAddr::V6(address) if address.is_unicast_link_local() => "is link-local and means something on one link only",
        address if address.is_multicast() => "is a multicast address",
        _ => return Ok(()),
    };
    refuse(
        RefusalKind::Invalid,
        format!("the real server {server} cannot be added: {} {fault}; name a unicast address", server.address),
    )
}

/// What this version cannot do for a server.
pub(super) fn server_supported(server: &ServerId, config: &ServerConfig) -> Result<(), Refusal> {
    match config.method {
        Method::Tunnel(Tunnel::Gre { checksum: TunnelChecksum::Remote }) => refuse(
            RefusalKind::Unsupported,
            format!(
                "the tunnel to the real server {server} cannot offload its checksum: GRE has no remote checksum offload; use a GUE tunnel \
                 (`--tun-type gue`), a full checksum (`--tun-csum`) or none (`--tun-nocsum`)"
            ),
        ),
        Method::Route | Method::Masquerade | Method::FullNat { .. } | Method::Tunnel(_) => Ok(()),
    }
}

/// Whether a server can belong to a service that takes each packet for itself, or not. Each packet would claim a local port, and no
/// connection would ever give it back.
pub(super) fn one_packet(service: &ServiceId, config: &ServiceConfig, server: &ServerId, method: Method) -> Result<(), Refusal> {
    if !config.one_packet || !matches!(method, Method::FullNat { .. }) {
        return Ok(());
    }
    refuse(
        RefusalKind::Unsupported,
        format!(
            "the real server {server} cannot serve {service} by FULLNAT while the service schedules each packet by itself: a local port \
             belongs to a connection, and there would be none; use the method masquerade (`-m`), or the service without that (`-o`)"
        ),
    )
}

/// IPVS's rule about timeouts: 31 bits count the ticks of the kernel's clock, of which there are `clock_rate` in a second.
pub(super) fn timeouts(timeouts: &Timeouts, clock_rate: u32) -> Result<(), Refusal> {
    let longest = LARGEST / clock_rate.max(1);
    for (name, seconds) in [("tcp", timeouts.tcp), ("tcpfin", timeouts.tcp_fin), ("udp", timeouts.udp)] {
        if seconds > longest {
            return refuse(
                RefusalKind::Invalid,
                format!("the {name} timeout of {seconds} s is too long for the kernel's clock; use at most {longest} s"),
            );
        }
    }
    Ok(())
}
