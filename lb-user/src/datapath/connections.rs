//! Lists connections, for people.
//!
//! The tables hold what the packet path needs: indices, ticks, numbers of states. Here they become addresses, seconds and
//! names. Entries that are over but not swept yet are left out.
//!
//! A listing is no snapshot: connections come and go while it is made.

use std::{collections::HashMap, net::IpAddr, ops::ControlFlow, time::Duration};

use anyhow::Context as _;
use aya::maps::MapData;
use lb_common::{
    Plain,
    config::{Config, SweepReport},
    connection::{Connection, ConnectionKey, flags},
    family::{Address, Ipv4, Ipv6},
    local::PORTS,
    reply, sctp,
    server::Server,
    tcp,
    template::Choice,
};

use nix::time::{ClockId, clock_gettime};

use super::{
    capacity::Tables,
    listing::Visit,
    maps::{BPF_F_NO_PREALLOC, Pins},
    system::{for_each_entry, for_entries},
    way::{address, server_address},
};
use crate::director::model::{ConnectionView, LocalUsage, TableMemory};

/// The connection tables.
#[derive(Debug)]
pub struct Connections {
    ipv4: MapData,
    ipv6: MapData,
    tables: Tables,
}

impl Connections {
    /// Opens the tables.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        let ipv4 = pins.data("CONNECTIONS_V4")?;
        let info = ipv4.info().context("the kernel does not describe the connection table")?;
        let memory = if info.map_flags() & BPF_F_NO_PREALLOC == 0 { TableMemory::AtStart } else { TableMemory::OnDemand };
        Ok(Self { ipv4, ipv6: pins.data("CONNECTIONS_V6")?, tables: Tables { max_connections: info.max_entries(), memory } })
    }

    /// How they were made.
    pub const fn tables(&self) -> Tables {
        self.tables
    }

    /// How much of the local addresses, here by their indices, is in use. `server` tells the entry of a real server.
    pub fn local_usage(
        &self,
        server: &mut dyn FnMut(u32) -> Option<Server>,
        locals: &[IpAddr],
    ) -> anyhow::Result<HashMap<IpAddr, LocalUsage>> {
        let mut counts = HashMap::new();
        count_locals::<Ipv4>(&self.ipv4, server, locals, &mut counts)?;
        count_locals::<Ipv6>(&self.ipv6, server, locals, &mut counts)?;
        let mut usage: HashMap<IpAddr, LocalUsage> = HashMap::new();
        for ((address, ..), count) in counts {
            let usage = usage.entry(address).or_default();
            usage.used += u64::from(count);
            usage.free = usage.free.min(PORTS.saturating_sub(count));
        }
        Ok(usage)
    }

    /// Shows all connections that are not over. `server` tells the entry of a real server.
    pub fn list(
        &self,
        config: &Config,
        clock: Clock,
        server: &mut dyn FnMut(u32) -> Option<Server>,
        visit: Visit<'_>,
    ) -> anyhow::Result<ControlFlow<()>> {
        if show::<Ipv4>(&self.ipv4, config, clock, server, visit)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        show::<Ipv6>(&self.ipv6, config, clock, server, visit)
    }
}

/// Who shares the ports of a local address: it, and a real server's address, port and protocol.
type Sharing = (IpAddr, IpAddr, u16, u32);

fn count_locals<A: Address>(
    table: &MapData,
    server: &mut dyn FnMut(u32) -> Option<Server>,
    locals: &[IpAddr],
    counts: &mut HashMap<Sharing, u32>,
) -> anyhow::Result<()>
where
    ConnectionKey<A>: Plain,
{
    for_each_entry(table, |key: &ConnectionKey<A>, connection: &Connection| {
        if connection.local.is_some()
            && let (Some(server), Some(local)) = (server(connection.server), locals.get(connection.local.address() as usize))
        {
            let port = reply::server_port(&server, key.ports.destination());
            *counts.entry((*local, server_address(&server), port, key.protocol)).or_default() += 1;
        }
    })
    .context("the connection table cannot be read")
}

fn show<A: Address>(
    table: &MapData,
    config: &Config,
    clock: Clock,
    server: &mut dyn FnMut(u32) -> Option<Server>,
    visit: Visit<'_>,
) -> anyhow::Result<ControlFlow<()>>
where
    ConnectionKey<A>: Plain,
{
    const NEXT: ControlFlow<()> = ControlFlow::Continue(());
    let ipv6 = size_of::<A>() == size_of::<Ipv6>();
    for_entries(table, |key: &ConnectionKey<A>, connection: &Connection| {
        let transport = key.protocol as u8;
        let Some(expires) = clock.remaining(connection.last_seen, lifetime(config, transport, connection.state)) else {
            return NEXT;
        };
        let Some(entry) = server(connection.server) else { return NEXT };
        let (server, server_port) = (server_address(&entry), u16::from_be(entry.port));
        let (protocol, state) = names(transport, connection.state);
        visit(ConnectionView {
            protocol: protocol.to_owned(),
            expires,
            state: state.to_owned(),
            client: address(key.client.words(), ipv6),
            client_port: u16::from_be(key.ports.source()),
            vip: address(key.vip.words(), ipv6),
            vip_port: u16::from_be(key.ports.destination()),
            server,
            // A server without a port takes the virtual one.
            server_port: if server_port == 0 { u16::from_be(key.ports.destination()) } else { server_port },
            active: connection.flags & flags::ACTIVE != 0,
            template: false,
            engine: None,
        })
    })
    .context("the connection table cannot be read")
}

/// Names of protocol and state, as `ipvsadm -Lc` prints them.
fn names(protocol: u8, state: u8) -> (&'static str, &'static str) {
    match protocol {
        6 => ("TCP", tcp::State::ALL.get(state as usize).map_or("ERR!", |state| state.name())),
        132 => ("SCTP", sctp::State::ALL.get(state as usize).map_or("?", |state| state.name())),
        _ => ("UDP", "UDP"),
    }
}

/// Seconds that a connection in this state lives without a packet.
pub(super) fn lifetime(config: &Config, protocol: u8, state: u8) -> u32 {
    let state = usize::from(state & 0xf);
    match protocol {
        6 => config.tcp_timeouts[state],
        132 => config.sctp_timeouts[state],
        _ => config.udp_timeout,
    }
}

/// The kernel's tick counter, as far as userspace can know it.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    jiffies: u32,
    hz: u32,
}

impl Clock {
    /// The present time. Never ahead of the kernel's.
    pub fn read(report: &SweepReport, hz: u32) -> anyhow::Result<Self> {
        Ok(Self { jiffies: Self::ticks(report, hz)? as u32, hz: hz.max(1) })
    }

    /// The whole of the present time, in ticks.
    pub fn ticks(report: &SweepReport, hz: u32) -> anyhow::Result<u64> {
        let monotonic = clock_gettime(ClockId::CLOCK_MONOTONIC).context("the clock cannot be read")?;
        Ok(Self::ticks_at(report, Duration::from(monotonic).as_nanos() as u64, hz))
    }

    /// Goes on from both clocks as the sweep saw them.
    pub fn now(report: &SweepReport, monotonic_ns: u64, hz: u32) -> Self {
        Self { jiffies: Self::ticks_at(report, monotonic_ns, hz) as u32, hz: hz.max(1) }
    }

    fn ticks_at(report: &SweepReport, monotonic_ns: u64, hz: u32) -> u64 {
        let elapsed = u128::from(monotonic_ns.saturating_sub(report.monotonic_ns));
        report.jiffies.wrapping_add((elapsed * u128::from(hz) / 1_000_000_000) as u64)
    }

    /// Whole seconds since a tick.
    pub fn seconds_since(self, tick: u32) -> u32 {
        self.jiffies.wrapping_sub(tick).cast_signed().max(0).cast_unsigned() / self.hz
    }

    /// The tick so many seconds ago.
    pub fn ago(self, seconds: u32) -> u32 {
        self.jiffies.wrapping_sub(seconds.wrapping_mul(self.hz))
    }

    /// Seconds that are left of a lifetime that began at a tick; nothing if it is over.
    pub(super) fn remaining(self, since: u32, lifetime: u32) -> Option<u32> {
        // A packet that came after this clock was read is younger than nothing.
        let idle = self.jiffies.wrapping_sub(since).cast_signed();
        let left = i64::from(lifetime) * i64::from(self.hz) - i64::from(idle.max(0));
        u32::try_from(left / i64::from(self.hz)).ok().filter(|_| left > 0)
    }

    /// Whole seconds that are left of so many ticks since a choice was made; nothing if they are over.
    pub fn left(self, choice: Choice, ticks: u32) -> Option<u32> {
        ticks.checked_sub(choice.idle(self.jiffies)).filter(|left| *left > 0).map(|left| left / self.hz)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_run_down() {
        let clock = Clock { jiffies: 1000, hz: 250 };
        assert_eq!(clock.remaining(1000, 900), Some(900));
        assert_eq!(clock.remaining(750, 900), Some(899));
        assert_eq!((clock.seconds_since(500), clock.seconds_since(1001)), (2, 0));
        assert_eq!(clock.remaining(1010, 900), Some(900));
        assert_eq!(clock.remaining(500, 2), None);
        assert_eq!(Clock { jiffies: 5, hz: 250 }.remaining(0_u32.wrapping_sub(245), 10), Some(9));
    }

    #[test]
    fn the_clock_goes_on() {
        let report = SweepReport { jiffies: 0xffff_ffff, monotonic_ns: 1_000_000_000, ..SweepReport::default() };
        assert_eq!(Clock::now(&report, 2_000_000_000, 250).jiffies, 249);
    }
}
