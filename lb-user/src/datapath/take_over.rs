//! What a backup takes over: entries of another director's messages become connections and templates.
//!
//! Everything stands in the tables as if the packets had come here: counted at its real server, with the entry for its replies
//! if it is masqueraded, and as old as the master says, so that it is over at the same time. [`flags::SYNCED`] marks it until
//! its first packet comes.
//!
//! | here is | and | then |
//! | --- | --- | --- |
//! | nothing | | it is made |
//! | the same | what is told is younger | state and time are taken over |
//! | another real server | what is told is younger, and active | it takes the place of what was here |
//! | anything | what is here is younger | it is left alone: the client's packets come here now |
//!
//! The packet path may change an entry in the same moment. What it loses then is one packet's change, and the sweep counts anew.

use std::{net::SocketAddr, sync::atomic::Ordering};

use anyhow::Context as _;
use aya::maps::{HashMap as MapHashMap, Map, MapData, MapError};
use lb_common::{
    Plain,
    config::{Config, SweptTable},
    connection::{Connection, ConnectionKey, flags},
    family::{Address, Ipv4, Ipv6},
    local::Local,
    packet::{protocol, transport::Ports},
    reply::{self, Reply},
    sctp,
    server::{Method, Server},
    tcp,
    template::{Choice, Template, TemplateKey},
};

use super::{
    connections::{Clock, lifetime},
    maps::Pins,
    shared::Words,
    way::words,
};
use crate::synchronisation::{
    LeftOut,
    message::{Entry, flags as entry_flags},
};

/// Where an entry belongs here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Place {
    /// Index of the real server.
    pub server: u32,
    /// Seconds of the service's persistence; 0: none.
    pub persistence: u32,
}

/// Seconds that everything is made older, so that it is never in the future of the kernel's clock, which may lag a little.
const SKEW: u32 = 1;

/// Seconds by which what is told has to be younger than what is known, if it is the same: all clocks here count whole seconds.
const NEWS: u32 = 2;

/// What has to be known beside the tables.
pub struct Surroundings<'a> {
    /// The settings.
    pub config: &'a Config,
    /// The present time.
    pub clock: Clock,
    /// The entry of a real server.
    pub server: &'a dyn Fn(u32) -> Option<Server>,
}

/// The tables that are written.
pub struct Successor {
    ipv4: Tables<Ipv4>,
    ipv6: Tables<Ipv6>,
    counters: Words,
    templates: Words,
    newcomers: Words,
}

/// The tables of a family.
struct Tables<A: Address>
where
    ConnectionKey<A>: aya::Pod,
    TemplateKey<A>: aya::Pod,
    Reply<A>: aya::Pod,
{
    connections: MapHashMap<MapData, ConnectionKey<A>, Connection>,
    replies: MapHashMap<MapData, ConnectionKey<A>, Reply<A>>,
    templates: MapHashMap<MapData, TemplateKey<A>, Template>,
}

const NO_EXIST: u64 = 1;
const EXIST: u64 = 2;

impl Successor {
    /// Opens the tables.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        Ok(Self {
            ipv4: Tables::open(pins, "V4")?,
            ipv6: Tables::open(pins, "V6")?,
            counters: Words::open(&pins.map("COUNTERS"))?,
            templates: Words::open(&pins.map("PERSISTED"))?,
            newcomers: Words::open(&pins.map("NEWCOMERS"))?,
        })
    }

    /// Takes an entry over. `surroundings` are the datapath's other parts, as they are now.
    pub fn take_over(&mut self, entry: &Entry, place: Place, surroundings: &Surroundings<'_>) -> Result<(), LeftOut> {
        let Self { ipv4, ipv6, counters, templates, newcomers } = self;
        let (outcome, table) = match (entry.vip.is_ipv4(), entry.is_template()) {
            (true, false) => (ipv4.take_connection(entry, place, surroundings, counters), SweptTable::ConnectionsV4),
            (false, false) => (ipv6.take_connection(entry, place, surroundings, counters), SweptTable::ConnectionsV6),
            (true, true) => (ipv4.take_template(entry, place, surroundings, templates), SweptTable::TemplatesV4),
            (false, true) => (ipv6.take_template(entry, place, surroundings, templates), SweptTable::TemplatesV6),
        };
        newcomers.store(table as u32, 1);
        outcome
    }
}

impl<A: Address> Tables<A>
where
    ConnectionKey<A>: aya::Pod + Plain,
    TemplateKey<A>: aya::Pod + Plain,
    Reply<A>: aya::Pod + Plain,
{
    fn open(pins: &Pins, family: &str) -> anyhow::Result<Self> {
        let data = |name: &str| pins.data(&format!("{name}_{family}")).map(Map::HashMap);
        let wrong = "the tables of connections are of another version";
        Ok(Self {
            connections: data("CONNECTIONS")?.try_into().context(wrong)?,
            replies: data("REPLIES")?.try_into().context(wrong)?,
            templates: data("TEMPLATES")?.try_into().context(wrong)?,
        })
    }

    fn take_connection(
        &mut self,
        entry: &Entry,
        place: Place,
        surroundings: &Surroundings<'_>,
        counters: &Words,
    ) -> Result<(), LeftOut> {
        let Surroundings { config, clock, server: entry_of } = *surroundings;
        let state = state(entry).ok_or(LeftOut::Unsupported)?;
        let server = entry_of(place.server).ok_or(LeftOut::NoServer)?;
        if server.method == Method::FullNat as u8 {
            return Err(LeftOut::FullNat);
        }
        let masqueraded = Method::translates(server.method);
        let key = connection_key::<A>(entry);
        let lifetime = lifetime(config, entry.protocol, state);
        let age = if entry.timeout == 0 { 0 } else { lifetime.saturating_sub(entry.timeout) };
        let set = |condition: bool, flag: u8| if condition { flag } else { 0 };
        let told = Connection {
            server: place.server,
            local: Local::NONE,
            last_seen: clock.ago(age + SKEW),
            state,
            flags: flags::SYNCED
                | set(entry.flags & entry_flags::INACTIVE == 0, flags::ACTIVE)
                | set(place.persistence != 0, flags::CONTROLLED)
                | if masqueraded { flags::MASQUERADED } else { flags::NO_OUTPUT },
            half_open: 0,
            prefix: 0,
        };
        if let Some(known) = found(self.connections.get(&key, 0))? {
            let is_over = known.flags & flags::LEAVING != 0
                || clock.remaining(known.last_seen, self::lifetime(config, entry.protocol, known.state)).is_none();
            let younger = told.last_seen.wrapping_sub(known.last_seen).cast_signed();
            let is_own = known.flags & flags::SYNCED == 0;
            if !is_over && is_own && younger <= 0 {
                return Err(LeftOut::Stale);
            }
            if !is_over && known.server == place.server {
                if known.state == state && younger <= (NEWS * config.hz).cast_signed() {
                    return Ok(());
                }
                // Its replies' entry stays as it is.
                return match self.connections.insert(key, Connection { half_open: known.half_open, ..told }, EXIST) {
                    Ok(()) => {
                        recount(counters, place.server, told.share().wrapping_sub(known.share()));
                        Ok(())
                    }
                    // It was over in this moment; the master will tell again.
                    Err(error) if is(&error, libc::ENOENT) => Ok(()),
                    Err(_) => Err(LeftOut::Kernel),
                };
            }
            // As with IPVS: this is the end of a connection whose client has a new one by now.
            if !is_over && told.flags & flags::ACTIVE == 0 {
                return Err(LeftOut::Stale);
            }
            // Whose replies go by a local address, the sweep knows.
            if known.local.is_some() {
                return Err(LeftOut::FullNat);
            }
            if self.connections.remove(&key).is_ok() {
                recount(counters, known.server, known.share().wrapping_neg());
            }
            if known.flags & flags::MASQUERADED != 0
                && let Some(server) = entry_of(known.server)
            {
                drop(self.replies.remove(&reply::key(&key, &server, key.client, key.ports.source())));
            }
        }
        // A reply must find its entry as soon as the connection is there. One of an older connection is overwritten.
        let reply_key = reply::key(&key, &server, key.client, key.ports.source());
        if masqueraded {
            let replied = self.replies.insert(reply_key, Reply::new(&key, place.server, 0), 0);
            replied.map_err(|error| refused(&error))?;
        }
        match self.connections.insert(key, told, NO_EXIST) {
            Ok(()) => {
                recount(counters, place.server, told.share());
                Ok(())
            }
            // A packet was faster, and knows better.
            Err(error) if is(&error, libc::EEXIST) => Err(LeftOut::Stale),
            Err(error) => {
                if masqueraded {
                    // The sweep never finds an entry that no connection leads to.
                    drop(self.replies.remove(&reply_key));
                }
                Err(refused(&error))
            }
        }
    }

    fn take_template(
        &mut self,
        entry: &Entry,
        place: Place,
        surroundings: &Surroundings<'_>,
        counts: &Words,
    ) -> Result<(), LeftOut> {
        let Surroundings { config, clock, .. } = *surroundings;
        // What is not persistent here asks no template.
        if place.persistence == 0 {
            return Err(LeftOut::NoService);
        }
        let lifetime = place.persistence.max(entry.timeout);
        let age = if entry.timeout == 0 { 0 } else { lifetime - entry.timeout };
        let last_seen = clock.ago(age + SKEW);
        let key = TemplateKey {
            client: A::from_words(&words(entry.client.ip())),
            vip: A::from_words(&words(entry.vip.ip())),
            port: entry.vip.port().to_be(),
            protocol: entry.protocol,
            zero: 0,
        };
        let mut told = Template {
            choice: Choice { server: place.server, last_seen }.word(),
            timeout: lifetime.saturating_mul(config.hz),
            assured: (entry.state != 0).into(),
            held: 0,
            met: 0,
            synced: Template::synced(last_seen),
        };
        let known = found(self.templates.get(&key, 0))?;
        if let Some(known) = known {
            let choice = Choice::from_word(known.choice);
            let is_over = known.held == 0 && clock.left(choice, known.timeout).is_none();
            let younger = last_seen.wrapping_sub(choice.last_seen).cast_signed();
            if !is_over && choice.server == place.server {
                if known.assured == told.assured && younger <= (NEWS * config.hz).cast_signed() {
                    return Ok(());
                }
                // Connections of its own may be alive here.
                told.held = known.held;
                told.met = known.met;
            }
            if !is_over && !known.is_synced() && younger <= 0 {
                return Err(LeftOut::Stale);
            }
        }
        self.templates.insert(key, told, 0).map_err(|error| refused(&error))?;
        if let Some(known) = known {
            recount(counts, Choice::from_word(known.choice).server, 1_u64.wrapping_neg());
        }
        recount(counts, place.server, 1);
        Ok(())
    }
}

fn connection_key<A: Address>(entry: &Entry) -> ConnectionKey<A> {
    let address = |endpoint: SocketAddr| A::from_words(&words(endpoint.ip()));
    ConnectionKey {
        client: address(entry.client),
        vip: address(entry.vip),
        ports: Ports::new(entry.client.port().to_be(), entry.vip.port().to_be()),
        protocol: entry.protocol.into(),
    }
}

/// The state of a connection, if there is such a one.
fn state(entry: &Entry) -> Option<u8> {
    let states = match entry.protocol {
        protocol::TCP => tcp::State::ALL.len(),
        protocol::SCTP => sctp::State::ALL.len(),
        protocol::UDP => 1,
        _ => 0,
    };
    u8::try_from(entry.state).ok().filter(|state| usize::from(*state) < states)
}

fn recount(words: &Words, server: u32, change: u64) {
    if let Some(word) = words.word(server) {
        word.fetch_add(change, Ordering::AcqRel);
    }
}

fn found<T>(outcome: Result<T, MapError>) -> Result<Option<T>, LeftOut> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(_) => Err(LeftOut::Kernel),
    }
}

fn is(error: &MapError, code: i32) -> bool {
    matches!(error, MapError::SyscallError(error) if error.io_error.raw_os_error() == Some(code))
}

fn refused(error: &MapError) -> LeftOut {
    if is(error, libc::E2BIG) || is(error, libc::ENOMEM) { LeftOut::TableFull } else { LeftOut::Kernel }
}
