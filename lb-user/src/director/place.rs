//! Where a connection of another director belongs here: in which service, at which real server.
//!
//! Services are found as IPVS finds them, the mark first, then the address, then what takes all ports. A real server is found by
//! its address and port; one that keeps its clients' ports, by its address alone. What is not found is left out: whoever
//! told of it tells again, and by then it may be there.

use super::{
    Director,
    model::{Family, Protocol, ServerId, ServiceId},
    service::Service,
};
use crate::{
    datapath::{Datapath, take_over::Place},
    synchronisation::{
        LeftOut,
        message::{Entry, flags},
    },
};

/// The port of FTP's control connections, and the first that any user may listen at.
const FTP: u16 = 21;
const FTP_DATA: u16 = 20;
const UNPRIVILEGED: u16 = 1024;

impl<D: Datapath> Director<D> {
    /// Finds the place of an entry.
    #[doc(alias = "ip_vs_find_dest")]
    pub fn place(&self, entry: &Entry) -> Result<Place, LeftOut> {
        let service = self.service_of(entry).ok_or(LeftOut::NoService)?;
        let server = server_of(service, entry).ok_or(LeftOut::NoServer)?;
        Ok(Place { server, persistence: service.config.persistence.map_or(0, |persistence| persistence.timeout) })
    }

    fn service_of(&self, entry: &Entry) -> Option<&Service> {
        let (address, port) = (entry.vip.ip(), entry.vip.port());
        let by_mark = ServiceId::Mark { mark: entry.mark, family: Family::of(address) };
        let protocol = Protocol::of_number(entry.protocol);
        let by_port = |port| protocol.and_then(|protocol| self.services.get(&ServiceId::Address { protocol, address, port }));
        let may_be_ftp = protocol == Some(Protocol::Tcp) && (port == 0 || port == FTP_DATA || port >= UNPRIVILEGED);
        let marked = if entry.mark == 0 { None } else { self.services.get(&by_mark) };
        marked.or_else(|| by_port(port)).or_else(|| by_port(FTP).filter(|_| may_be_ftp)).or_else(|| by_port(0))
    }
}

/// The index of an entry's real server.
fn server_of(service: &Service, entry: &Entry) -> Option<u32> {
    let (address, port) = (entry.server.ip(), entry.server.port());
    let keeps_port = entry.mark != 0 && entry.flags & flags::METHOD != flags::MASQUERADE;
    let ports = if keeps_port { [0, port] } else { [port, 0] };
    let by_port = |port| service.servers.index(&ServerId { address, port });
    let by_address = || service.servers.iter().find(|server| server.id.address == address).map(|server| server.index);
    ports.into_iter().find_map(by_port).or_else(|| if service.id.spans_ports() { by_address() } else { None })
}

#[cfg(test)]
mod tests {
    use lb_common::config::Config;

    use super::*;
    use crate::director::{
        model::{Command, Method, Persistence, ServerConfig, ServiceConfig},
        testing::Memory,
    };

    fn entry(protocol: u8, vip: &str, server: &str, mark: u32, flags: u32) -> Entry {
        let address = |text: &str| text.parse().expect("an address");
        let client = address(if vip.starts_with('[') { "[2001:db8::9]:1000" } else { "192.0.2.9:1000" });
        Entry { protocol, flags, state: 1, client, vip: address(vip), server: address(server), mark, timeout: 60 }
    }

    #[test]
    fn services_and_servers_are_found_as_in_ipvs() {
        let mut director = Director::new(Memory::default(), Config::DEFAULT).expect("memory refuses nothing");
        let tcp = |address: &str, port| ServiceId::Address {
            protocol: Protocol::Tcp,
            address: address.parse().expect("an address"),
            port,
        };
        let services = [
            (tcp("10.0.0.200", 80), "10.0.0.1", 8080, 0),
            (tcp("10.0.0.200", 0), "10.0.0.2", 0, 300),
            (tcp("10.0.0.201", 21), "10.0.0.3", 21, 300),
            (ServiceId::Mark { mark: 7, family: Family::Ipv4 }, "10.0.0.4", 80, 60),
            (tcp("2001:db8::200", 80), "2001:db8::1", 80, 0),
        ];
        let mut commands = Vec::new();
        for (service, server, port, timeout) in services {
            let persistence = (timeout != 0).then_some(Persistence { timeout, mask: u32::MAX });
            let config = ServiceConfig { scheduler: "rr".to_owned(), flags: 0, persistence, one_packet: false, engine: None };
            commands.push(Command::AddService { service, config });
            let server = ServerId { address: server.parse().expect("an address"), port };
            let config = ServerConfig { method: Method::Masquerade, weight: 1, upper_threshold: 0, lower_threshold: 0 };
            commands.push(Command::AddServer { service, server, config });
        }
        let outcomes = director.execute(&commands);
        assert!(outcomes.iter().all(|outcome| *outcome == crate::director::model::Outcome::Ok), "{outcomes:?}");

        let place = |server, persistence| Ok(Place { server, persistence });
        let template = flags::TEMPLATE;
        for (found, expected) in [
            (entry(6, "10.0.0.200:80", "10.0.0.1:8080", 0, 0), place(0, 0)),
            (entry(6, "10.0.0.200:80", "10.0.0.1:80", 0, 0), Err(LeftOut::NoServer)),
            (entry(17, "10.0.0.200:80", "10.0.0.1:8080", 0, 0), Err(LeftOut::NoService)),
            (entry(6, "10.0.0.202:80", "10.0.0.1:8080", 0, 0), Err(LeftOut::NoService)),
            // All ports.
            (entry(6, "10.0.0.200:443", "10.0.0.2:443", 0, 0), place(1, 300)),
            (entry(6, "10.0.0.200:0", "10.0.0.2:0", 0, template), place(1, 300)),
            // FTP's data connections, and its template for all ports.
            (entry(6, "10.0.0.201:2000", "10.0.0.3:2000", 0, 0), place(2, 300)),
            (entry(6, "10.0.0.201:0", "10.0.0.3:0", 0, template), place(2, 300)),
            (entry(6, "10.0.0.201:80", "10.0.0.3:80", 0, 0), Err(LeftOut::NoService)),
            // The mark goes before the address, and an unknown one means nothing.
            (entry(6, "10.0.0.200:80", "10.0.0.4:80", 7, 0), place(3, 60)),
            (entry(17, "10.0.0.9:53", "10.0.0.4:53", 7, flags::ROUTE), place(3, 60)),
            (entry(0, "0.0.0.7:0", "10.0.0.4:0", 7, template), place(3, 60)),
            (entry(6, "10.0.0.200:80", "10.0.0.1:8080", 8, 0), place(0, 0)),
            (entry(6, "[2001:db8::200]:80", "[2001:db8::1]:80", 0, 0), place(4, 0)),
        ] {
            assert_eq!(director.place(&found), expected, "{found:?}");
        }
    }
}
