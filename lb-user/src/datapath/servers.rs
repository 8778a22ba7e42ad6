//! The real servers that the kernel knows: the director's targets joined with the ways that netlink found.
//!
//! Two sides write here: the director makes servers known, retires and frees them; the resolver
//! ([`super::resolve`]) learns ways. Each time the entries of `SERVERS` and `NEXT_HOPS` are made anew from both. Several
//! servers (of several services) may share an address, and then they share its way.
//!
//! The filter of sources follows the entries: a masqueraded server has its bit as long as it has an entry, so that a removed
//! one can still finish its sentences.
//!
//! Restoring a hundred thousand servers is a few system calls, not some for each: entries are made up, and written together.
//!
//! A retired server stays [`Status::Removed`] whatever netlink says, and needs no way any more.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Display,
    net::IpAddr,
};

use anyhow::Context as _;
use aya::maps::{Array, MapData};
use lb_common::server::{Method, NextHop, Server, Status, flags};

use super::{
    Error, Target,
    filter::{Bitmap, Filter},
    kernel_error,
    maps::Pins,
    system::{for_each_entry, write_entries},
    way::{self, Way},
};

/// The server array and what it is made of.
pub struct Servers {
    /// The same maps twice: aya does not lend what batches need.
    data: MapData,
    hop_data: MapData,
    entries: Array<MapData, Server>,
    next_hops: Array<MapData, NextHop>,
    /// What stands in `entries`, or will when it is written, but for what is free: nobody else writes there, and reading it back
    /// costs as much as writing.
    known: HashMap<u32, Server>,
    /// What is to be written.
    late: Vec<(u32, Server)>,
    late_hops: Vec<(u32, NextHop)>,
    /// Addresses that nobody masquerades any more once it is written.
    leaving: Vec<IpAddr>,
    /// The addresses of masqueraded servers.
    sources: Filter,
    /// The director's servers; nothing for one that was retired.
    targets: BTreeMap<u32, Option<Target>>,
    /// For each address in use: which servers have it, and the way, once there was an answer.
    ways: HashMap<IpAddr, (BTreeSet<u32>, Option<Way>)>,
}

impl Servers {
    /// Opens the arrays, and fills the filter of masqueraded servers.
    pub fn open(pins: &Pins, sources: Array<MapData, Bitmap>) -> anyhow::Result<Self> {
        let data = pins.data("SERVERS")?;
        let found = in_use(&data)?;
        let addresses = found.iter().flat_map(|(_, server)| heard_from(server));
        Ok(Self {
            sources: Filter::new(Some(sources), addresses).context("the filter of sources cannot be written")?,
            known: found.into_iter().collect(),
            hop_data: pins.data("NEXT_HOPS")?,
            late: Vec::new(),
            late_hops: Vec::new(),
            leaving: Vec::new(),
            data,
            entries: pins.typed("SERVERS")?,
            next_hops: pins.typed("NEXT_HOPS")?,
            targets: BTreeMap::new(),
            ways: HashMap::new(),
        })
    }

    /// Servers that fit.
    pub fn capacity(&self) -> u32 {
        self.entries.len()
    }

    /// Makes a server known, or changes it; [`Servers::write`] shows it to the packet path. Returns the addresses that have to be looked at: the new one, and one that may
    /// have lost its last server.
    pub fn set(&mut self, index: u32, target: Target) -> Result<Vec<IpAddr>, Error> {
        self.check(index)?;
        let mut concerned = Vec::new();
        let old = self.targets.insert(index, Some(target)).flatten().map(|old| old.address);
        if old != Some(target.address) {
            // First in, then out: an address that stays in use keeps its way.
            self.enter(index, target.address);
            if let Some(old) = old {
                self.leave(index, old);
                concerned.push(old);
            }
        }
        concerned.push(target.address);
        self.stage(index)?;
        Ok(concerned)
    }

    /// Marks a server as removed; [`Servers::write`] shows it to the packet path. Returns its address, which may need no way any more.
    pub fn retire(&mut self, index: u32) -> Result<Option<IpAddr>, Error> {
        self.check(index)?;
        let old = self.targets.insert(index, None).flatten();
        let entry = Server { status: Status::Removed as u8, ..self.known(index) };
        self.put(index, entry)?;
        Ok(old.map(|target| {
            self.leave(index, target.address);
            target.address
        }))
    }

    /// Forgets a server. Returns its address, which may need no way any more.
    pub fn free(&mut self, index: u32) -> Result<Option<IpAddr>, Error> {
        self.check(index)?;
        self.put(index, Server::default())?;
        self.late_hops.push((index, NextHop::default()));
        self.write()?;
        Ok(self.targets.remove(&index).flatten().map(|target| {
            self.leave(index, target.address);
            target.address
        }))
    }

    /// Takes over what the resolver found out about an address. To be written with what it finds out about others.
    pub fn learn(&mut self, address: IpAddr, way: Way) -> Result<(), Error> {
        let Some((indices, known)) = self.ways.get_mut(&address) else { return Ok(()) };
        if *known == Some(way) {
            return Ok(());
        }
        tracing::debug!(%address, ?way, "the way to a real server");
        *known = Some(way);
        indices.clone().into_iter().try_for_each(|index| self.stage(index))
    }

    /// Whether a server has this address.
    pub fn wants(&self, address: IpAddr) -> bool {
        self.ways.contains_key(&address)
    }

    /// All addresses that servers have.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.ways.keys().copied().collect()
    }

    /// How a server can be reached now.
    pub fn status(&self, index: u32) -> Status {
        status(self.known(index).status)
    }

    /// The entry of a server, as it was written.
    fn known(&self, index: u32) -> Server {
        self.known.get(&index).copied().unwrap_or_default()
    }

    /// The entry of a server, as the kernel has it.
    pub fn entry(&self, index: u32) -> Result<Server, Error> {
        self.entries.get(&index, 0).map_err(|error| failed("read", index, error))
    }

    /// The entry of a server's next hop, as the kernel has it.
    pub fn next_hop(&self, index: u32) -> Result<NextHop, Error> {
        self.next_hops.get(&index, 0).map_err(|error| failed("read", index, error))
    }

    /// Every entry in use, whoever made it.
    pub fn in_use(&self) -> Result<Vec<(u32, Server)>, Error> {
        in_use(&self.data)
    }

    /// Whether packets from this address are looked at.
    pub fn may_reply(&self, address: IpAddr) -> bool {
        self.sources.contains(address)
    }

    fn enter(&mut self, index: u32, address: IpAddr) {
        self.ways.entry(address).or_default().0.insert(index);
    }

    fn leave(&mut self, index: u32, address: IpAddr) {
        if let Some((indices, _)) = self.ways.get_mut(&address) {
            indices.remove(&index);
            if indices.is_empty() {
                self.ways.remove(&address);
            }
        }
    }

    /// Makes up a server's entries from its target and the way to it, to be written with others.
    fn stage(&mut self, index: u32) -> Result<(), Error> {
        let Some(Some(target)) = self.targets.get(&index).copied() else { return Ok(()) };
        let way = self.ways.get(&target.address).and_then(|(_, way)| way.as_ref());
        let mut server = way::server(&target, way);
        if way.is_none() {
            // Not asked yet. What an earlier daemon wrote is better than nothing, and likely still true.
            let found = self.known(index);
            if same_target(&found, &server) && [Status::Ready, Status::Unresolved, Status::Local].contains(&status(found.status)) {
                server = found;
            }
        } else {
            self.late_hops.push((index, way::next_hop(way)));
        }
        self.put(index, server)
    }

    fn put(&mut self, index: u32, entry: Server) -> Result<(), Error> {
        let (old, new) = (heard_from(&self.known(index)), heard_from(&entry));
        for &source in new.difference(&old) {
            self.sources.add(source).map_err(|error| failed("heard", index, error))?;
        }
        if entry.status == Status::Free as u8 {
            self.known.remove(&index);
        } else {
            self.known.insert(index, entry);
        }
        self.late.push((index, entry));
        self.leaving.extend(old.difference(&new));
        Ok(())
    }

    /// Writes all entries that were made up and not yet written. If it fails, the next time tries again.
    pub fn write(&mut self) -> Result<(), Error> {
        let failed = |error| kernel_error("the table of real servers cannot be written", error);
        write_entries(&self.hop_data, &self.late_hops).map_err(failed)?;
        self.late_hops.clear();
        write_entries(&self.data, &self.late).map_err(failed)?;
        self.late.clear();
        for address in std::mem::take(&mut self.leaving) {
            self.sources
                .remove(address)
                .map_err(|error| kernel_error(format!("the real server {address} cannot be left unheard"), error))?;
        }
        Ok(())
    }

    fn check(&self, index: u32) -> Result<(), Error> {
        if index < self.capacity() {
            return Ok(());
        }
        Err(Error::Full {
            what: "the table of real servers",
            limit: self.capacity(),
            advice: "remove real servers that are not needed",
        })
    }
}

/// Every entry in use of a server array.
fn in_use(data: &MapData) -> Result<Vec<(u32, Server)>, Error> {
    let mut found = Vec::new();
    for_each_entry(data, |index: &u32, server: &Server| {
        if server.status != Status::Free as u8 {
            found.push((*index, *server));
        }
    })
    .map_err(|error| kernel_error("the table of real servers cannot be read", error))?;
    Ok(found)
}

/// Where a server's replies come from, if they pass the director. What XDP has made a packet of IPv6 tc may have to send.
fn heard_from(server: &Server) -> BTreeSet<IpAddr> {
    let masqueraded = server.status != Status::Free as u8 && Method::translates(server.method);
    let as_seen = [way::server_address(server), way::address(server.address, server.flags & flags::IPV6 != 0)];
    as_seen.into_iter().filter(|_| masqueraded).collect()
}

fn failed(what: &str, index: u32, error: impl Display) -> Error {
    kernel_error(format!("entry {index} of the table of real servers cannot be {what}"), error)
}

fn same_target(one: &Server, other: &Server) -> bool {
    let key = |server: &Server| {
        (
            server.method,
            server.tunnel,
            server.flags & (flags::IPV6 | flags::CHECKSUM | flags::TOA),
            server.address,
            server.port,
            server.tunnel_port,
        )
    };
    key(one) == key(other)
}

/// Reads a status.
pub const fn status(number: u8) -> Status {
    match number {
        1 => Status::NoRoute,
        2 => Status::Ready,
        3 => Status::Unresolved,
        4 => Status::Local,
        5 => Status::Removed,
        _ => Status::Free,
    }
}
