//! What a master tells other directors: the connection tables, as entries of messages.
//!
//! A walk goes through all tables; [`Changes`] says what is news. Left out are connections that another director has told of
//! and that have had no packet here since, and those of removed real servers, which lead nowhere.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use aya::maps::{Array, MapData};
use lb_common::{
    Plain,
    config::Config,
    connection::{Connection, ConnectionKey, flags},
    family::{Address, Ipv4, Ipv6},
    packet::protocol,
    reply,
    server::{Method, Server, Status, flags as server_flags},
    template::{Choice, Scope, Template, TemplateKey},
};

use nix::time::{ClockId, clock_gettime};

use super::{
    connections::{Clock, lifetime},
    maps::Pins,
    system::for_each_entry,
    way::address,
};
use crate::synchronisation::{
    LeftOut,
    changes::{Changes, Sighting, Subject},
    message::{Entry, flags as entry_flags},
};

/// The tables that a walk goes through.
pub struct Teller {
    connections_v4: MapData,
    connections_v6: MapData,
    templates_v4: MapData,
    templates_v6: MapData,
    servers: Array<MapData, Server>,
    scopes: Array<MapData, Scope>,
    opened: Instant,
}

/// What a walk has found.
#[derive(Debug, Default)]
pub struct Told {
    /// What is news.
    pub entries: Vec<Entry>,
    /// What is news, but cannot be said.
    pub left_out: Vec<LeftOut>,
    /// Time of a processor that it took.
    pub took: Duration,
}

impl Told {
    fn push(&mut self, entry: Result<Entry, LeftOut>) {
        match entry {
            Ok(entry) if entry.is_expressible() => self.entries.push(entry),
            Ok(_) => self.left_out.push(LeftOut::OtherFamily),
            Err(reason) => self.left_out.push(reason),
        }
    }
}

impl Teller {
    /// Opens the tables.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        Ok(Self {
            connections_v4: pins.data("CONNECTIONS_V4")?,
            connections_v6: pins.data("CONNECTIONS_V6")?,
            templates_v4: pins.data("TEMPLATES_V4")?,
            templates_v6: pins.data("TEMPLATES_V6")?,
            servers: pins.typed("SERVERS")?,
            scopes: pins.typed("SCOPES")?,
            opened: Instant::now(),
        })
    }

    /// Goes through all tables once.
    pub fn walk(&self, config: &Config, clock: Clock, changes: &mut Changes) -> anyhow::Result<Told> {
        let begin = processor_time()?;
        changes.begin(1 + self.opened.elapsed().as_secs());
        let mut servers = Servers { teller: self, known: HashMap::new() };
        let mut told = Told::default();
        connections::<Ipv4>(&self.connections_v4, config, clock, &mut servers, changes, &mut told)?;
        connections::<Ipv6>(&self.connections_v6, config, clock, &mut servers, changes, &mut told)?;
        templates::<Ipv4>(&self.templates_v4, config, clock, &mut servers, changes, &mut told)?;
        templates::<Ipv6>(&self.templates_v6, config, clock, &mut servers, changes, &mut told)?;
        told.took = processor_time()?.saturating_sub(begin);
        Ok(told)
    }
}

/// Time of a processor that this thread has had.
fn processor_time() -> anyhow::Result<Duration> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("the clock cannot be read")?;
    Ok(time.into())
}

/// The real servers that a walk has met, with their services' marks. Each is read once.
struct Servers<'a> {
    teller: &'a Teller,
    known: HashMap<u32, Option<(Server, u32)>>,
}

impl Servers<'_> {
    /// A real server that packets are sent to, and the mark of its service.
    fn get(&mut self, index: u32) -> Option<(Server, u32)> {
        let Self { teller, known } = self;
        let read = || {
            let server = teller.servers.get(&index, 0).ok()?;
            let is_gone = server.status == Status::Free as u8 || server.status == Status::Removed as u8;
            (!is_gone).then_some((server, teller.scopes.get(&index, 0).ok()?.mark))
        };
        *known.entry(index).or_insert_with(read)
    }
}

fn connections<A: Address + std::hash::Hash>(
    table: &MapData,
    config: &Config,
    clock: Clock,
    servers: &mut Servers<'_>,
    changes: &mut Changes,
    told: &mut Told,
) -> anyhow::Result<()>
where
    ConnectionKey<A>: Plain,
{
    for_each_entry(table, |key: &ConnectionKey<A>, connection: &Connection| {
        if connection.flags & (flags::SYNCED | flags::LEAVING) != 0 {
            return;
        }
        let (transport, state) = (key.protocol as u8, connection.state);
        let (idle, lifetime) = (clock.seconds_since(connection.last_seen), lifetime(config, transport, state));
        let subject = Subject::Connection { protocol: transport, state };
        let sighting = Sighting { key: *key, server: connection.server, subject, idle, lifetime };
        if idle >= lifetime {
            return;
        }
        let Some((server, mark)) = servers.get(connection.server) else { return };
        if changes.takes(&sighting) {
            told.push(connection_entry(key, connection, &server, mark, lifetime - idle));
        }
    })
    .context("the connection table cannot be read")
}

fn connection_entry<A: Address>(
    key: &ConnectionKey<A>,
    connection: &Connection,
    server: &Server,
    mark: u32,
    timeout: u32,
) -> Result<Entry, LeftOut> {
    if connection.local.is_some() || server.method == Method::FullNat as u8 {
        return Err(LeftOut::FullNat);
    }
    let endpoint = |words: [u32; 4], port: u16| SocketAddr::new(address(words, is_ipv6::<A>()), u16::from_be(port));
    let port = reply::server_port(server, key.ports.destination());
    let set = |condition: bool, flag: u32| if condition { flag } else { 0 };
    // UDP has one state, which IPVS calls 0.
    let state = if key.protocol == u32::from(protocol::UDP) { 0 } else { connection.state.into() };
    Ok(Entry {
        protocol: key.protocol as u8,
        flags: method(server)
            | set(connection.flags & flags::NO_OUTPUT != 0, entry_flags::NO_OUTPUT)
            | set(connection.flags & flags::ACTIVE == 0, entry_flags::INACTIVE),
        state,
        client: endpoint(key.client.words(), key.ports.source()),
        vip: endpoint(key.vip.words(), key.ports.destination()),
        server: SocketAddr::new(server_address(server), u16::from_be(port)),
        mark,
        timeout,
    })
}

fn templates<A: Address + std::hash::Hash>(
    table: &MapData,
    config: &Config,
    clock: Clock,
    servers: &mut Servers<'_>,
    changes: &mut Changes,
    told: &mut Told,
) -> anyhow::Result<()>
where
    TemplateKey<A>: Plain,
{
    for_each_entry(table, |key: &TemplateKey<A>, template: &Template| {
        let choice = Choice::from_word(template.choice);
        let assured = template.assured != 0;
        let lifetime = template.timeout / config.hz.max(1);
        let idle = clock.seconds_since(choice.last_seen);
        // One whose time is over may live on for its connections; what it gets then, is told then.
        let (Some(_), false) = (clock.left(choice, template.timeout), template.is_synced() || key.is_left_behind()) else { return };
        let sighting = Sighting { key: *key, server: choice.server, subject: Subject::Template { assured }, idle, lifetime };
        let Some((server, mark)) = servers.get(choice.server) else { return };
        if changes.takes(&sighting) {
            told.push(Ok(template_entry(key, assured, &server, mark, lifetime.saturating_sub(idle).max(1))));
        }
    })
    .context("the templates cannot be read")
}

fn template_entry<A: Address>(key: &TemplateKey<A>, assured: bool, server: &Server, mark: u32, timeout: u32) -> Entry {
    let endpoint = |words: [u32; 4], port: u16| SocketAddr::new(address(words, is_ipv6::<A>()), u16::from_be(port));
    let no_output = if Method::translates(server.method) { 0 } else { entry_flags::NO_OUTPUT };
    let port = if key.port == 0 { 0 } else { reply::server_port(server, key.port) };
    Entry {
        protocol: key.protocol,
        flags: entry_flags::TEMPLATE | entry_flags::INACTIVE | no_output | method(server),
        state: assured.into(),
        client: endpoint(key.client.words(), 0),
        vip: endpoint(key.vip.words(), key.port),
        server: SocketAddr::new(server_address(server), u16::from_be(port)),
        mark,
        timeout,
    }
}

/// How packets are forwarded, in flags of an entry.
const fn method(server: &Server) -> u32 {
    const TUNNEL: u8 = Method::Tunnel as u8;
    const ROUTE: u8 = Method::Route as u8;
    match server.method {
        TUNNEL => entry_flags::TUNNEL,
        ROUTE => entry_flags::ROUTE,
        _ => entry_flags::MASQUERADE,
    }
}

fn server_address(server: &Server) -> IpAddr {
    address(server.address, server.flags & server_flags::IPV6 != 0)
}

const fn is_ipv6<A>() -> bool {
    size_of::<A>() == size_of::<Ipv6>()
}
