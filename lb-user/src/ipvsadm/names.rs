//! Names of hosts and ports, both ways: for command lines (`www:http`) and for listings without `-n`.
//!
//! Ports are looked up in /etc/services, exactly: by name or alias and protocol, the case of letters matters. Hosts are
//! looked up by the C library, so /etc/hosts and DNS count as they do for every other program; a listing asks for each
//! address once.

use std::{
    cell::{OnceCell, RefCell},
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs},
};

/// `NI_NAMEREQD` of the C library: no name is an error, not the address in digits.
const NAME_REQUIRED: i32 = 8;

/// Looks names up, and remembers.
#[derive(Debug)]
pub(super) struct Names {
    /// Finds the first IPv4 address of a host.
    resolve: fn(&str) -> Option<Ipv4Addr>,
    ports: OnceCell<Vec<PortName>>,
    hosts: RefCell<HashMap<IpAddr, Option<String>>>,
}

/// A line of /etc/services.
#[derive(Debug)]
struct PortName {
    port: u16,
    protocol: String,
    /// The name, then its aliases.
    names: Vec<String>,
}

impl Names {
    /// The names that this machine knows.
    pub(super) fn of_system() -> Self {
        Self { resolve: system_host, ports: OnceCell::new(), hosts: RefCell::default() }
    }

    /// The port with this name. The protocol is `tcp`, `udp` or `sctp`.
    pub(super) fn port(&self, name: &str, protocol: &str) -> Option<u16> {
        let is_it = |line: &&PortName| line.protocol == protocol && line.names.iter().any(|known| known == name);
        self.ports().iter().find(is_it).map(|line| line.port)
    }

    /// The name of this port.
    pub(super) fn port_name(&self, port: u16, protocol: &str) -> Option<&str> {
        let line = self.ports().iter().find(|line| line.protocol == protocol && line.port == port)?;
        line.names.first().map(String::as_str)
    }

    /// The first IPv4 address of this host.
    pub(super) fn host(&self, name: &str) -> Option<Ipv4Addr> {
        (self.resolve)(name)
    }

    /// The name of the host with this address.
    pub(super) fn host_name(&self, address: IpAddr) -> Option<String> {
        let look_up = || {
            let socket = SocketAddr::new(address, 0);
            dns_lookup::getnameinfo(&socket, NAME_REQUIRED).ok().map(|(host, _)| host)
        };
        self.hosts.borrow_mut().entry(address).or_insert_with(look_up).clone()
    }

    fn ports(&self) -> &[PortName] {
        self.ports.get_or_init(|| port_names(&std::fs::read_to_string("/etc/services").unwrap_or_default()))
    }
}

/// Asks the C library for a host.
fn system_host(name: &str) -> Option<Ipv4Addr> {
    (name, 0).to_socket_addrs().ok()?.find_map(|address| match address {
        SocketAddr::V4(address) => Some(*address.ip()),
        SocketAddr::V6(_) => None,
    })
}

/// Reads the text of /etc/services: `name port/protocol alias ... # remark`.
fn port_names(text: &str) -> Vec<PortName> {
    let line = |line: &str| {
        let mut words = line.split('#').next()?.split_ascii_whitespace();
        let name = words.next()?;
        let (port, protocol) = words.next()?.split_once('/')?;
        let names = std::iter::once(name).chain(words).map(str::to_owned).collect();
        Some(PortName { port: port.parse().ok()?, protocol: protocol.to_owned(), names })
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
impl Names {
    /// No hosts, and the ports of this text: tests should not depend on the machine, nor wait for DNS.
    pub(super) fn of_test(services: &str) -> Self {
        Self { resolve: |_| None, ports: OnceCell::from(port_names(services)), hosts: RefCell::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_have_names_aliases_and_protocols() {
        let names = Names::of_test("# head\nhttp\t80/tcp\twww # web\ndomain 53/tcp\ndomain 53/udp\nbad\n");
        assert_eq!(names.port("http", "tcp"), Some(80));
        assert_eq!(names.port("www", "tcp"), Some(80));
        assert_eq!(names.port("HTTP", "tcp"), None);
        assert_eq!(names.port("http", "udp"), None);
        assert_eq!(names.port_name(53, "udp"), Some("domain"));
        assert_eq!(names.port_name(80, "udp"), None);
    }
}
