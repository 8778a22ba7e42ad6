//! How single things are written: addresses, services, servers and counters.
//!
//! Everything is byte for byte what the original prints, with two habits worth knowing: marks and weights are printed as
//! signed numbers, and IPv6 addresses in the form of `inet_ntop`, which differs from Rust's for `::192.0.2.8`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{names::Names, values::cut};
use crate::director::model::{Family, Method, Protocol, ServerId, ServiceId, Tunnel, TunnelChecksum};

/// The longest text of an address and a port, in bytes.
const LONGEST_ENDPOINT: usize = 59;

/// Writes `address:port` or `[address]:port`; with names, if given. Port names need a protocol.
pub(super) fn endpoint(address: IpAddr, port: u16, protocol: Option<&str>, names: Option<&Names>) -> String {
    let host = names.and_then(|names| names.host_name(address));
    let port_name = names.zip(protocol).and_then(|(names, protocol)| names.port_name(port, protocol));
    let port = port_name.map_or_else(|| port.to_string(), str::to_owned);
    let text = match (address, host) {
        (IpAddr::V4(_), Some(host)) => format!("{host}:{port}"),
        (IpAddr::V4(address), None) => format!("{address}:{port}"),
        (IpAddr::V6(_), Some(host)) => format!("[{host}]:{port}"),
        (IpAddr::V6(address), None) => format!("[{}]:{port}", ipv6(address)),
    };
    cut(&text, LONGEST_ENDPOINT).to_owned()
}

/// Writes an IPv6 address as `inet_ntop` does.
fn ipv6(address: Ipv6Addr) -> String {
    match address.segments() {
        [0, 0, 0, 0, 0, 0, high, low] if high != 0 => format!("::{}", Ipv4Addr::from(u32::from(high) << 16 | u32::from(low))),
        _ => address.to_string(),
    }
}

/// The protocol whose port names a service and its servers use; none for marks.
const fn port_protocol(service: &ServiceId) -> Option<&'static str> {
    match service {
        ServiceId::Address { protocol: Protocol::Tcp, .. } => Some("tcp"),
        ServiceId::Address { protocol: Protocol::Udp, .. } => Some("udp"),
        ServiceId::Address { protocol: Protocol::Sctp, .. } => Some("sctp"),
        ServiceId::Mark { .. } => None,
    }
}

/// A service in a listing: `TCP  192.0.2.1:80`, `FWM  7 IPv6`.
pub(super) fn service(service: &ServiceId, names: Option<&Names>) -> String {
    match *service {
        ServiceId::Address { protocol, address, port } => {
            let protocol = protocol.to_string();
            let text = format!("{protocol:<4} {}", endpoint(address, port, port_protocol(service), names));
            if address.is_ipv4() { cut(&text, 33).to_owned() } else { text }
        }
        ServiceId::Mark { mark, family } => {
            let family = if family == Family::Ipv6 { " IPv6" } else { "" };
            format!("FWM  {}{family}", mark.cast_signed())
        }
    }
}

/// A service on a command line: `-t 192.0.2.1:80`, `-f 7 -6`.
pub(super) fn service_option(service: &ServiceId, names: Option<&Names>) -> String {
    match *service {
        ServiceId::Address { protocol, address, port } => {
            let option = match protocol {
                Protocol::Tcp => "-t",
                Protocol::Udp => "-u",
                Protocol::Sctp => "--sctp-service",
            };
            format!("{option} {}", endpoint(address, port, port_protocol(service), names))
        }
        ServiceId::Mark { mark, family } => {
            let family = if family == Family::Ipv6 { " -6" } else { "" };
            format!("-f {}{family}", mark.cast_signed())
        }
    }
}

/// The address and port of a real server.
pub(super) fn server(server: &ServerId, service: &ServiceId, names: Option<&Names>) -> String {
    endpoint(server.address, server.port, port_protocol(service), names)
}

/// The name of a real server in a listing.
pub(super) fn server_column(id: &ServerId, service: &ServiceId, names: Option<&Names>) -> String {
    let text = server(id, service, names);
    match id.address {
        IpAddr::V4(_) => format!("{:<28}", cut(&text, 28)),
        IpAddr::V6(_) => format!("{text:<28}"),
    }
}

/// A persistence mask other than that of single clients.
pub(super) fn mask(mask: u32, family: Family) -> Option<String> {
    match family {
        Family::Ipv4 if mask != u32::MAX => Some(Ipv4Addr::from(mask).to_string()),
        Family::Ipv6 if mask != 128 => Some(mask.to_string()),
        _ => None,
    }
}

/// A forwarding method in a listing.
pub(super) const fn method(method: Method) -> &'static str {
    match method {
        Method::Route => "Route",
        Method::Tunnel(_) => "Tunnel",
        Method::Masquerade => "Masq",
        Method::FullNat { .. } => "FullNat",
    }
}

/// A tunnel in a listing.
pub(super) fn tunnel(method: Method) -> String {
    let sign = |checksum| match checksum {
        TunnelChecksum::None => "-c",
        TunnelChecksum::Full => "+c",
        TunnelChecksum::Remote => "r+c",
    };
    match method {
        Method::Route | Method::Masquerade | Method::FullNat { .. } => "n/a".to_owned(),
        Method::Tunnel(Tunnel::Ipip) => "ipip".to_owned(),
        Method::Tunnel(Tunnel::Gue { port, checksum }) => format!("gue:{port}:{}", sign(checksum)),
        Method::Tunnel(Tunnel::Gre { checksum }) => format!("gre:{}", sign(checksum)),
    }
}

/// A counter in nine columns: scaled by powers of a thousand and cut, or exact and as wide as it must be.
pub(super) fn counter(value: u64, exact: bool) -> String {
    match value {
        _ if exact && value >= 100_000_000 => format!(" {value}"),
        ..100_000_000 => format!("{value:9}"),
        100_000_000..1_000_000_000 => format!("{:8}K", value / 1_000),
        1_000_000_000..100_000_000_000 => format!("{:8}M", value / 1_000_000),
        100_000_000_000..100_000_000_000_000 => format!("{:8}G", value / 1_000_000_000),
        _ => format!("{:8}T", value / 1_000_000_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv6_addresses_are_those_of_inet_ntop() {
        for text in ["::", "::1", "::0.1.0.2", "::192.0.2.8", "::ffff:192.0.2.7", "2001:db8:1::4:0:0", "0:0:0:0:0:1::"] {
            let address: Ipv6Addr = text.parse().expect("an address");
            let wanted = if text.starts_with("0:") { "::1:0:0" } else { text };
            assert_eq!(ipv6(address), wanted);
        }
    }
}
