//! A listing of all connections and templates: shown one after the other, never held all at once.
//!
//! There may be millions, and whoever reads them may be slow or have had enough. So a listing is something of its own, which goes
//! through the tables on a thread of its own while the daemon goes on with its work:
//!
//! ```text
//! daemon:  listing = datapath.listing()          a few files
//! thread:  listing.show(&mut |view| …)           a thousand entries in memory at a time
//! ```
//!
//! It knows the real servers as they stood in the kernel when the first of their connections was shown.

use std::{
    collections::HashMap,
    ops::ControlFlow,
    sync::{Arc, Mutex},
};

use aya::maps::MapData;
use lb_common::{
    call::CallKey,
    config::Config,
    family::{Ipv4, Ipv6},
    server::{Server, Status},
    template::TemplateKey,
};

use super::{
    connections::{Clock, Connections},
    maps::Pins,
    resolve::lock,
    servers::Servers,
    templates,
};
use crate::director::model::ConnectionView;

/// Takes a connection or a template, and says whether it wants another.
pub type Visit<'a> = &'a mut dyn FnMut(ConnectionView) -> ControlFlow<()>;

/// The entries of real servers, each as it stood when somebody asked for it first. The servers are locked for a moment only.
pub fn known_servers(servers: Arc<Mutex<Servers>>) -> impl FnMut(u32) -> Option<Server> {
    let mut known = HashMap::new();
    move |index| {
        let look = || lock(&servers).entry(index).ok().filter(|entry: &Server| entry.status != Status::Free as u8);
        *known.entry(index).or_insert_with(look)
    }
}

/// What is to be listed.
pub struct Listing {
    connections: Connections,
    templates: [MapData; 2],
    calls: [MapData; 2],
    servers: Arc<Mutex<Servers>>,
    config: Config,
    clock: Clock,
}

impl Listing {
    /// Opens the tables.
    pub fn open(pins: &Pins, servers: Arc<Mutex<Servers>>, config: Config, clock: Clock) -> anyhow::Result<Self> {
        let templates = [pins.data("TEMPLATES_V4")?, pins.data("TEMPLATES_V6")?];
        let calls = [pins.data("CALLS_V4")?, pins.data("CALLS_V6")?];
        Ok(Self { connections: Connections::open(pins)?, templates, calls, servers, config, clock })
    }

    /// Shows all connections, then all templates, until somebody has enough.
    pub fn show(self, visit: Visit<'_>) -> anyhow::Result<()> {
        let Self { connections, templates: [ipv4, ipv6], calls: [calls_ipv4, calls_ipv6], servers, config, clock } = self;
        let server = &mut known_servers(servers);
        if connections.list(&config, clock, server, visit)?.is_continue()
            && templates::show::<TemplateKey<Ipv4>>(&ipv4, clock, server, visit)?.is_continue()
            && templates::show::<TemplateKey<Ipv6>>(&ipv6, clock, server, visit)?.is_continue()
            && templates::show::<CallKey<Ipv4>>(&calls_ipv4, clock, server, visit)?.is_continue()
        {
            let _ = templates::show::<CallKey<Ipv6>>(&calls_ipv6, clock, server, visit)?;
        }
        Ok(())
    }
}
