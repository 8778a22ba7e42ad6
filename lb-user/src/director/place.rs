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
