//! A model of the datapath for tests: what becomes of a single frame.
//!
//! The datapath is a program for the kernel; this is the same decision in a few lines for the host, over the same
//! parser. A test hands the same frame to both, and every difference is a fault of one of them.
//!
//! The model's world is small, so that one frame suffices: no connections yet, every service has one real server that is
//! ready, reached by direct routing, and takes connections, and answers are not limited. It says what becomes of the
//! frame, not how it looks afterwards. What several connections to several servers remember of each other is modelled apart:
//! [`locality`].

pub mod locality;

use core::net::IpAddr;
use std::vec::Vec;

use crate::{
    config,
    family::{Address, ipv4, ipv6},
    filter,
    packet::{
        Bytes, Fragment, IpHeader, Network, Payload, V4, V6,
        ethernet::{self, Link},
        icmp::IcmpHeader,
        protocol, transport,
    },
    reason::{Fate, Reason},
    sctp, tcp,
};

/// Virtual services, with one real server each.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// The services.
    pub services: Vec<VirtualService>,
    /// Settings: bits of [`config::flags`].
    pub settings: u32,
}

/// A virtual service and the way to its real server.
#[derive(Clone, Copy, Debug)]
pub struct VirtualService {
    /// The IP protocol.
    pub protocol: u8,
    /// The virtual address.
    pub vip: IpAddr,
    /// The virtual port, in host order.
    pub port: u16,
    /// The largest packet that fits the way to the real server.
    pub mtu: u16,
}

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// It is turned into an ICMP error and sent back.
    Answered(Reason),
    /// It is dropped.
    Dropped(Reason),
    /// It is sent to the real server of the service at this position.
    Forwarded(usize),
    /// The kernel's own stack has it, unchanged.
    Passed(Reason),
}

impl Model {
    /// What becomes of a frame.
    pub fn verdict(&self, frame: &[u8]) -> Verdict {
        let outcome = ethernet::parse(frame).and_then(|link| match link.ethertype {
            ethernet::IPV4 => self.route::<V4>(frame, &link),
            ethernet::IPV6 => self.route::<V6>(frame, &link),
            _ => Err(Reason::NotIp),
        });
        match outcome {
            Ok(service) => Verdict::Forwarded(service),
            Err(why) => match why.fate() {
                Fate::Answered => Verdict::Answered(why),
                Fate::Dropped => Verdict::Dropped(why),
                // Nothing is stateless here: a model has room for everything.
                Fate::Passed | Fate::Forwarded => Verdict::Passed(why),
            },
        }
    }

    fn route<N: Network>(&self, frame: &[u8], link: &Link) -> Result<usize, Reason> {
        let header = N::parse(frame, link.payload)?;
        if !self.may_be_ours(&header.destination) {
            return Err(Reason::NotOurs);
        }
        let payload = N::transport(frame, &header)?;
        if payload.fragment == Fragment::Later {
            return Err(Reason::FragmentUnknown);
        }
        if payload.protocol == N::ICMP {
            return Err(icmp::<N>(frame, &payload, header.offset + header.length));
        }
        let segment = transport::parse(frame, payload.offset, payload.protocol, header.offset + header.length)?;
        let port = u16::from_be(segment.ports.destination());
        let service = self.find::<N>(&header, payload.protocol, port).ok_or(Reason::NoService)?;
        if !self.may_begin(payload.protocol, segment.event) || u16::from_be(segment.ports.source()) == FTP_DATA {
            return Err(Reason::NoConnection);
        }
        if N::carriage(frame, header.offset).ok_or(Reason::Malformed)?.ttl <= 1 {
            return Err(Reason::TtlExpired);
        }
        if header.length > self.services[service].mtu as usize {
            return Err(Reason::TooBig);
        }
        Ok(service)
    }

    /// The filter, which lets foreign addresses through that share a bit with a virtual one (of either family).
    fn may_be_ours<A: Address>(&self, destination: &A) -> bool {
        let bit = |vip| match vip {
            IpAddr::V4(vip) => filter::position(&ipv4(vip)),
            IpAddr::V6(vip) => filter::position(&ipv6(vip)),
        };
        self.services.iter().any(|service| bit(service.vip) == filter::position(destination))
    }

    fn find<N: Network>(&self, header: &IpHeader<N::Address>, protocol: u8, port: u16) -> Option<usize> {
        let words = header.destination.words();
        let is = |vip| match vip {
            IpAddr::V4(vip) => N::ETHERTYPE == ethernet::IPV4 && ipv4(vip).words() == words,
            IpAddr::V6(vip) => N::ETHERTYPE == ethernet::IPV6 && ipv6(vip) == words,
        };
        self.services.iter().position(|service| service.protocol == protocol && service.port == port && is(service.vip))
    }

    fn may_begin(&self, protocol: u8, event: u8) -> bool {
        let sloppy = |setting| self.settings & setting != 0;
        match protocol {
            protocol::TCP if event & tcp::flags::RST != 0 => false,
            protocol::TCP => event & tcp::flags::SYN != 0 || sloppy(config::flags::SLOPPY_TCP),
            protocol::SCTP if event == sctp::chunk::ABORT => false,
            protocol::SCTP => event == sctp::chunk::INIT || sloppy(config::flags::SLOPPY_SCTP),
            _ => true,
        }
    }
}

/// Source port of FTP's data connections, which are never scheduled.
const FTP_DATA: u16 = 20;

/// How far into a frame the datapath looks for an ICMP header.
const ICMP_REACH: usize = 0x7ff;

/// An ICMP packet to a virtual address: without a connection there is nothing that it could be about.
fn icmp<N: Network>(frame: &[u8], payload: &Payload, end: usize) -> Reason {
    if payload.offset > ICMP_REACH {
        return Reason::Malformed;
    }
    let Some(header) = frame.read::<IcmpHeader>(payload.offset) else { return Reason::Malformed };
    if !N::is_error(header.kind) {
        return Reason::NotTransport;
    }
    match N::quoted(frame, payload.offset + size_of::<IcmpHeader>()) {
        Some((.., quoted)) if quoted.fragment == Fragment::Later => Reason::NoConnection,
        Some((.., quoted)) if frame[..end].read::<transport::Ports>(quoted.offset).is_some() => Reason::NoConnection,
        _ => Reason::Malformed,
    }
}

#[cfg(test)]
mod tests;
