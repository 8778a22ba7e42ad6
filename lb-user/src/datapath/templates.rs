//! Templates of persistent services: shown, counted and flushed.
//!
//! The packet path makes them and the sweep deletes them ([`lb_common::template`] says what they are). What userspace adds is
//! how each real server's connections find theirs ([`Scope`]), and the wish to see or to lose them.

use std::{collections::HashMap, ops::ControlFlow, sync::atomic::Ordering};

use anyhow::Context as _;
use aya::maps::{Array, MapData};
use lb_common::{
    Plain,
    call::CallKey,
    family::{Address, Ipv4, Ipv6},
    server::Server,
    template::{Choice, Scope, Template, TemplateKey},
};

use super::{
    Error,
    connections::Clock,
    kernel_error,
    listing::Visit,
    maps::Pins,
    shared::Words,
    system::{for_each_entry, for_entries, take},
    way::{address, server_address},
};
use crate::director::model::{ConnectionView, EngineData, Family, ServiceId};

/// Seconds that a template is said to have left while its time is over, and the next sweep will give it more for the sake of
/// its connections.
const RESPITE: u32 = 60;

/// What stands in the place of ports where a template has been left behind, as in IPVS.
const LEFT_BEHIND: u16 = u16::MAX;

/// The templates, and how they are found.
pub struct Templates {
    ipv4: MapData,
    ipv6: MapData,
    calls_ipv4: MapData,
    calls_ipv6: MapData,
    counts: Words,
    scopes: Array<MapData, Scope>,
    /// What stands there, but for what is empty.
    known: HashMap<u32, Scope>,
}

impl Templates {
    /// Opens the tables.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        let mut known = HashMap::new();
        for_each_entry(&pins.data("SCOPES")?, |index: &u32, scope: &Scope| {
            if *scope != Scope::default() {
                known.insert(*index, *scope);
            }
        })
        .context("the scopes of templates cannot be read")?;
        Ok(Self {
            ipv4: pins.data("TEMPLATES_V4")?,
            ipv6: pins.data("TEMPLATES_V6")?,
            calls_ipv4: pins.data("CALLS_V4")?,
            calls_ipv6: pins.data("CALLS_V6")?,
            counts: Words::open(&pins.map("PERSISTED"))?,
            scopes: pins.typed("SCOPES")?,
            known,
        })
    }

    /// Says how the templates of a real server's connections are found.
    pub fn set_scope(&mut self, index: u32, scope: Scope) -> Result<(), Error> {
        if self.known.get(&index).copied().unwrap_or_default() == scope {
            return Ok(());
        }
        let failed = |error| kernel_error(format!("the scope of templates of real server {index} cannot be written"), error);
        self.scopes.set(index, scope, 0).map_err(failed)?;
        self.known.insert(index, scope);
        Ok(())
    }

    /// Forgets a real server.
    pub fn free(&mut self, index: u32) -> Result<(), Error> {
        self.set_scope(index, Scope::default())?;
        self.known.remove(&index);
        self.counts.store(index, 0);
        Ok(())
    }

    /// How many templates lead to a real server.
    pub fn count(&self, index: u32) -> u32 {
        self.counts.load(index) as u32
    }

    /// Deletes the templates of a service, or all.
    pub fn flush(&self, service: Option<&ServiceId>) -> anyhow::Result<()> {
        self.flush_table::<TemplateKey<Ipv4>>(&self.ipv4, service)?;
        self.flush_table::<TemplateKey<Ipv6>>(&self.ipv6, service)?;
        self.flush_table::<CallKey<Ipv4>>(&self.calls_ipv4, service)?;
        self.flush_table::<CallKey<Ipv6>>(&self.calls_ipv6, service)
    }

    fn flush_table<K: Key>(&self, table: &MapData, service: Option<&ServiceId>) -> anyhow::Result<()> {
        let mut keys = Vec::new();
        for_each_entry(table, |key: &K, _: &Template| {
            if service.is_none_or(|service| belongs(key.whom(), service)) {
                keys.push(*key);
            }
        })
        .context("the templates cannot be read")?;
        for key in keys {
            // The sweep may have been faster.
            let Some(template) = take::<_, Template>(table, &key).context("a template cannot be deleted")? else { continue };
            if let Some(count) = self.counts.word(Choice::from_word(template.choice).server) {
                count.fetch_sub(1, Ordering::AcqRel);
            }
        }
        Ok(())
    }
}

const fn is_ipv6<A>() -> bool {
    size_of::<A>() == size_of::<Ipv6>()
}

/// A key of templates.
pub trait Key: Plain + Copy {
    /// The type of an address.
    type Address: Address;

    /// Whom it is for.
    fn whom(&self) -> &TemplateKey<Self::Address>;

    /// The call that it is for, if it is for one.
    fn call(&self) -> Option<EngineData> {
        None
    }
}

impl<A: Address> Key for TemplateKey<A>
where
    Self: Plain,
{
    type Address = A;

    fn whom(&self) -> &TemplateKey<A> {
        self
    }
}

impl<A: Address> Key for CallKey<A>
where
    Self: Plain,
{
    type Address = A;

    fn whom(&self) -> &TemplateKey<A> {
        &self.whom
    }

    fn call(&self) -> Option<EngineData> {
        Some(EngineData { name: "sip".to_owned(), data: String::from_utf8_lossy(self.call.text()).into_owned() })
    }
}

/// Shows all templates of a table that are not over. `server` tells the entry of a real server.
pub fn show<K: Key>(
    table: &MapData,
    clock: Clock,
    server: &mut dyn FnMut(u32) -> Option<Server>,
    visit: Visit<'_>,
) -> anyhow::Result<ControlFlow<()>> {
    const NEXT: ControlFlow<()> = ControlFlow::Continue(());
    for_entries(table, |place: &K, template: &Template| {
        let key = place.whom();
        let choice = Choice::from_word(template.choice);
        let respite = (template.held != 0).then_some(RESPITE);
        let Some(expires) = clock.left(choice, template.timeout).or(respite) else { return NEXT };
        let Some(entry) = server(choice.server) else { return NEXT };
        visit(ConnectionView {
            protocol: protocol_name(key.protocol).to_owned(),
            expires,
            state: if template.assured != 0 { "ASSURED" } else { "NONE" }.to_owned(),
            client: address(key.client.words(), is_ipv6::<K::Address>()),
            client_port: 0,
            vip: address(key.vip.words(), is_ipv6::<K::Address>()),
            vip_port: if key.is_left_behind() { LEFT_BEHIND } else { u16::from_be(key.port) },
            server: server_address(&entry),
            server_port: match (key.port, entry.port) {
                _ if key.is_left_behind() => LEFT_BEHIND,
                (0, _) => 0,
                (port, 0) | (_, port) => u16::from_be(port),
            },
            active: false,
            template: true,
            engine: place.call(),
        })
    })
    .context("the templates cannot be read")
}

/// The protocol of a template; `IP` if it is for all.
const fn protocol_name(number: u8) -> &'static str {
    match number {
        6 => "TCP",
        17 => "UDP",
        132 => "SCTP",
        _ => "IP",
    }
}

/// Whether a template is of a service. One that was left behind is of all services of its address: it does not know its port.
fn belongs<A: Address>(key: &TemplateKey<A>, service: &ServiceId) -> bool {
    if (service.family() == Family::Ipv6) != is_ipv6::<A>() {
        return false;
    }
    match *service {
        ServiceId::Address { protocol, address: vip, port } => {
            key.protocol == protocol.number()
                && address(key.vip.words(), is_ipv6::<A>()) == vip
                && (key.is_left_behind() || u16::from_be(key.port) == if service.spans_ports() { 0 } else { port })
        }
        ServiceId::Mark { mark, .. } => key.protocol == 0 && u32::from_be(key.vip.words()[0]) == mark,
    }
}
