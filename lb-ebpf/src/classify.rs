//! Is the packet for us, and for which service? One read of memory answers the first for almost all that are not.
//!
//! The second is asked for new connections only. The order is IPVS's (`ipvs-semantics.md`, 3.1): the service of the packet's
//! protocol, address and port, else that of FTP's control connections, else that of all ports.

use lb_common::{
    connection::ConnectionKey,
    family::Address,
    filter,
    packet::protocol,
    service::{Service, ServiceKey, flags},
};

use crate::maps::{FILTER, Family, SOURCES};

/// Whether a packet may be for a virtual address, by its destination.
#[inline(always)]
pub fn may_be_ours<A: Address>(destination: &A) -> bool {
    let (word, bit) = filter::position(destination);
    FILTER.word(word) & bit != 0
}

/// Whether a packet may be the reply of a masqueraded real server, by its source. Asked only of packets that are addressed to
/// no virtual address.
#[inline(always)]
pub fn may_be_reply<A: Address>(source: &A) -> bool {
    let (word, bit) = filter::position(source);
    SOURCES.word(word) & bit != 0
}

/// The service of a new connection.
#[inline(always)]
pub fn service<F: Family>(connection: &ConnectionKey<F::Address>) -> Option<*const Service> {
    let (port, protocol) = (connection.ports.destination(), connection.protocol as u8);
    let mut key = ServiceKey { vip: connection.vip, port, protocol, zero: 0 };
    if let Some(service) = F::services().get_ptr(&key) {
        return Some(service);
    }
    if protocol == protocol::TCP && is_ftp_data(u16::from_be(port)) {
        key.port = FTP.to_be();
        let service = F::services().get_ptr(&key);
        // SAFETY: an element of the map.
        if service.is_some_and(|service| unsafe { (*service).flags & flags::FTP != 0 }) {
            return service;
        }
    }
    key.port = 0;
    F::services().get_ptr(&key)
}

/// The port of FTP's control connections.
pub const FTP: u16 = 21;

/// Whether FTP may use a port for data: the server's own, or one that it has told its client.
#[inline(always)]
const fn is_ftp_data(port: u16) -> bool {
    port == FTP - 1 || port >= 1024
}
