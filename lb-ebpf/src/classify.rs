//! Is the packet for us, and for which service? One read of memory answers the first for almost all that are not.
//!
//! The second is asked for new connections only. The order is IPVS's (`ipvs-semantics.md`, 3.1): the service of the packet's
//! firewall mark, else that of its protocol, address and port, else that of FTP's control connections, else that of all ports.

use aya_ebpf::maps::lpm_trie::Key;
use lb_common::{
    connection::ConnectionKey,
    family::Address,
    filter::{self, exceptions},
    mark::{BITS_BEFORE_ADDRESS, Destination},
    packet::{Fragment, ethernet, protocol},
    service::{Service, ServiceKey, flags},
};
use lb_ebpf::packet::Packet;

use crate::maps::{AFTER_MARKS, FILTER, Family, SOURCES};

/// Whether a packet may be for a virtual address, by its destination.
#[inline(always)]
pub fn may_be_ours<A: Address>(destination: &A) -> bool {
    let (word, bit) = filter::position(destination);
    FILTER.word(word) & bit != 0
}

/// Whether a packet may be for a service although its destination is no virtual address: because of its firewall mark, or
/// because a mark rule is for a network.
#[inline(always)]
pub fn is_excepted<P: Packet, F: Family>(packet: &P) -> bool {
    FILTER.excepts::<F>(exceptions::ALL) || packet.mark() != 0 && FILTER.excepts::<F>(exceptions::MARKED)
}

/// Whether a packet may be the reply of a masqueraded real server, by its source. Asked only of packets that are addressed to
/// no virtual address.
#[inline(always)]
pub fn may_be_reply<A: Address>(source: &A) -> bool {
    let (word, bit) = filter::position(source);
    SOURCES.word(word) & bit != 0
}

/// Where a packet comes from, as far as marks go by it: its mark, and the device that it came in by, in one word.
#[derive(Clone, Copy)]
pub struct Origin(u64);

impl Origin {
    /// A fragment has no device. It waits for no mark: the kernel's routing rules do not see ports in fragments, and it would not come
    /// back.
    #[inline(always)]
    pub fn of<P: Packet>(packet: &P, fragment: Fragment) -> Self {
        let interface = if fragment == Fragment::Whole { packet.interface() } else { 0 };
        Self(u64::from(interface) << 32 | u64::from(packet.mark()))
    }

    /// The firewall mark.
    #[inline(always)]
    pub const fn mark(self) -> u32 {
        self.0 as u32
    }

    #[inline(always)]
    const fn interface(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// Whether a new connection of this service must not begin here, because a firewall may give its packet a mark that names another: it
/// comes back when that has been asked.
#[inline(always)]
pub fn waits<F: Family>(service: *const Service, origin: Origin) -> bool {
    let interface = origin.interface();
    let after_marks = AFTER_MARKS.get(u32::from(F::ETHERTYPE == ethernet::IPV6)).copied().unwrap_or(0);
    // SAFETY: an element of the map.
    after_marks != 0 && after_marks != interface && interface != 0 && unsafe { (*service).mark == 0 }
}

/// The service of a new connection, whose first packet has this firewall mark.
#[inline(always)]
pub fn service<F: Family>(connection: &ConnectionKey<F::Address>, mark: u32) -> Option<*const Service> {
    if let Some(service) = of_mark::<F>(mark) {
        // So the packets that follow are found before a firewall has marked them, and ICMP errors about them, which none marks.
        let (word, bit) = filter::position(&connection.vip);
        FILTER.set(word, bit);
        return Some(service);
    }
    if FILTER.excepts::<F>(exceptions::NETWORKS)
        && let Some(service) = of_mark::<F>(mark_by_rule::<F>(connection))
    {
        return Some(service);
    }
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

#[inline(always)]
fn of_mark<F: Family>(mark: u32) -> Option<*const Service> {
    if mark == 0 { None } else { F::services().get_ptr(&ServiceKey::of_mark(mark)) }
}

/// The mark that a rule gives to the packets of a connection; 0 for none. In a function of its own, for the sake of the stack.
#[inline(never)]
fn mark_by_rule<F: Family>(connection: &ConnectionKey<F::Address>) -> u32 {
    let destination =
        Destination { protocol: connection.protocol as u8, zero: 0, port: connection.ports.destination(), address: connection.vip };
    let mut key = Key::new(BITS_BEFORE_ADDRESS + 8 * size_of::<F::Address>() as u32, destination);
    if let Some(mark) = F::networks().get(&key) {
        return *mark;
    }
    key.data.port = 0;
    F::networks().get(&key).copied().unwrap_or(0)
}
