//! What the scheduler and the number of real servers cost the packet path: nothing, if the design holds.
//!
//! The kernel indexes a run that the daemon has compiled. So a new connection should take the same time under every
//! scheduler, and with a thousand real servers as with two (whose entries stay in the first cache, which a thousand do not
//! quite). All services stand beside each other in one director, and take turns; its daemon is dead while they do.
//!
//! lblc and lblcr look first whom the destination went to before, which is one look-up more. Here there is one destination, the
//! VIP, and its real server is never too busy: what is measured is the pick of a destination that is remembered.

use std::{
    fmt::{self, Display, Formatter},
    net::Ipv4Addr,
};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData};
use lb_common::{
    connection::{Connection, ConnectionKey},
    family::ipv4,
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::{
    harness::{Floor, Harness},
    measure::{Nanoseconds, cpu_time},
    stage::{NEW, TCP, answer_at_once, limit_half_open, open, unknown_clients},
};
use crate::{
    bench::{Addresses, Bench},
    lab::Family,
    test_run::{Hook, remove},
};

/// All of them.
const SCHEDULERS: [&str; 14] = ["rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sed", "nq", "fo", "ovf", "twos", "sh", "dh", "mh"];
/// Numbers of real servers.
const SERVERS: [u32; 2] = [2, 1000];
/// The port of the first service; each has one of its own.
const FIRST_PORT: u16 = 1000;
/// Room in the table: for the connections of one sample.
const CONNECTIONS: u32 = 4 * NEW;
/// What XDP answers to send a frame back.
const XDP_TX: u32 = 3;

/// What a new connection takes.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct PickCost {
    /// The service's scheduler.
    pub scheduler: &'static str,
    /// How many real servers it has.
    pub servers: u32,
    /// Nanoseconds for each connection, less the harness.
    pub time: Nanoseconds,
}

impl Display for PickCost {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self { scheduler, servers, time } = self;
        write!(formatter, "{scheduler:<5} {servers:>5} real servers {:>8.1} ({:.1})", time.minimum, time.median)
    }
}

/// Measures all schedulers on this CPU.
pub fn measure(cpu: usize, rounds: usize) -> Result<Vec<PickCost>> {
    let mut bench = Bench::new(&["--max-connections", &CONNECTIONS.to_string(), "--max-half-open", "4294967295"])?;
    configure(&bench)?;
    bench.bpfvs.kill9()?;
    limit_half_open(&bench, u32::MAX)?;
    answer_at_once(&mut Array::try_from(Map::Array(open(&bench, "SERVERS")?))?, &[])?;
    let bench = &bench;
    bench.director.enter(move || {
        let mut only = CpuSet::new();
        only.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &only).with_context(|| format!("bind the measurement to CPU {cpu}"))?;
        take_turns(bench, rounds)
    })
}

/// The services, in the order of their ports.
fn services() -> impl Iterator<Item = (u16, &'static str, u32)> {
    let all = SCHEDULERS.into_iter().flat_map(|scheduler| SERVERS.map(|servers| (scheduler, servers)));
    (FIRST_PORT..).zip(all).map(|(port, (scheduler, servers))| (port, scheduler, servers))
}

fn configure(bench: &Bench) -> Result<()> {
    let most = SERVERS.into_iter().max().unwrap_or_default();
    let address = |number: u32| Ipv4Addr::from(0x0a01_0100 + number);
    let neighbours: Vec<_> =
        (0..most).map(|number| format!("neigh add {} lladdr 02:00:00:00:02:01 dev eth0 nud permanent", address(number))).collect();
    bench.director.ip(&neighbours.join("\n"))?;
    let vip = Addresses::of(Family::Ipv4).vip;
    let mut lines = Vec::new();
    for (port, scheduler, servers) in services() {
        lines.push(format!("-A -t {vip}:{port} -s {scheduler}"));
        // With small weights ovf would turn most of the connections away, and lblc and lblcr would leave real servers that have
        // more connections than that. Those of all rounds are still counted: nobody sweeps.
        let unit = if ["ovf", "lblc", "lblcr"].contains(&scheduler) { NEW << 8 } else { 1 };
        for number in 0..servers {
            lines.push(format!("-a -t {vip}:{port} -r {} -g -w {}", address(number), unit * (1 + number % 4)));
        }
    }
    bench.bpfvs.restore(&lines.join("\n"))?;
    bench.bpfvs.wait_for_servers()
}

fn take_turns(bench: &Bench, rounds: usize) -> Result<Vec<PickCost>> {
    let mut harness = Harness::load(1)?;
    let mut nothing = Vec::new();
    let mut samples = vec![Vec::new(); services().count()];
    for round in 0..=rounds {
        let baseline = sample(bench, &mut harness, None)?;
        let mut turn = Vec::new();
        for (port, scheduler, servers) in services() {
            turn.push(
                sample(bench, &mut harness, Some(port)).with_context(|| format!("measure {scheduler} with {servers} servers"))?,
            );
        }
        // The first round warms up.
        if round > 0 {
            nothing.push(baseline);
            samples.iter_mut().zip(turn).for_each(|(samples, taken)| samples.push(taken));
        }
    }
    let nothing = Nanoseconds::of(nothing).context("there was a round")?;
    let cost = |((_, scheduler, servers), samples)| {
        let time = Nanoseconds::of(samples).context("there was a round")?.less(nothing);
        Ok(PickCost { scheduler, servers, time })
    };
    services().zip(samples).map(cost).collect()
}

/// Nanoseconds for each of many new connections to a port; without one, what the harness itself takes.
fn sample(bench: &Bench, harness: &mut Harness, port: Option<u16>) -> Result<f64> {
    let (frame, round) = unknown_clients(port.unwrap_or(FIRST_PORT), 1);
    match port {
        Some(_) => harness.test(Hook::Xdp, bench.pinned.descriptor(Hook::Xdp)?)?,
        None => harness.test_floor(Hook::Xdp, Floor::Nothing)?,
    }
    harness.begin(&round)?;
    let begin = cpu_time()?;
    let verdict = harness.run(Hook::Xdp, &frame, NEW)?.return_value;
    let taken = cpu_time()?.saturating_sub(begin);
    ensure!(verdict == XDP_TX, "the verdict is {verdict} instead of {XDP_TX}: this is not the path to measure");
    if port.is_some() {
        let vip = ipv4(Addresses::of(Family::Ipv4).vip.parse()?);
        let clients = (0..u64::from(NEW)).map(|flow| round.client(flow));
        let keys = clients.map(|(client, ports)| ConnectionKey { client, vip, ports, protocol: TCP });
        let mut connections: HashMap<MapData, ConnectionKey<u32>, Connection> =
            HashMap::try_from(Map::HashMap(open(bench, "CONNECTIONS_V4")?))?;
        remove(&mut connections, keys)?;
    }
    Ok(taken.as_secs_f64() * 1e9 / f64::from(NEW))
}
