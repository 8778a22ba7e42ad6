//! What the numbers of services and of real servers cost the packet path: what the caches do not hold, and nothing else, if the
//! design holds.
//!
//! One director has all of it: a virtual address with many services at ports in a row, and services with many real servers. Flows
//! are spread over the services, and by `rr` over the real servers. All real servers are behind one gateway: to the datapath
//! each is an entry of its own all the same.
//!
//! ```text
//! 10000 services      ports 20000 to 29999, two real servers each
//! 65535 real servers  port 1002, one service
//! ```

use std::{
    fmt::{self, Display, Formatter},
    net::Ipv4Addr,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData};
use lb_common::{
    connection::{Connection, ConnectionKey},
    family::ipv4,
    floor::Round,
    server::Server,
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::{
    harness::{Floor, Harness},
    measure::{Nanoseconds, cpu_time},
    stage::{NEW, TCP, answer_at_once, known_clients, limit_half_open, open, unknown_clients},
};
use crate::{
    bench::{Addresses, Bench},
    frame::{ACK, SYN},
    lab::Family,
    test_run::{Hook, remove},
    wait,
};

/// Room in the table: for established flows, and for the connections of a sample.
const CONNECTIONS: u32 = 8 * NEW;
/// Established flows of each crowd.
const FLOWS: u64 = 1 << 16;
/// How long it may take until the daemon knows the way to all of them.
const READY: Duration = Duration::from_secs(120);
/// What XDP answers to send a frame back.
const XDP_TX: u32 = 3;

/// A number of services, each with so many real servers.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// The port of the first service.
    port: u16,
    services: u32,
    servers: u32,
}

/// The last two fill the tables; they are left out of a quick run.
const SHAPES: [Shape; 5] = [
    Shape { port: 1000, services: 1, servers: 2 },
    Shape { port: 1001, services: 1, servers: 1000 },
    Shape { port: 2000, services: 1000, servers: 2 },
    Shape { port: 1002, services: 1, servers: 65_535 },
    Shape { port: 20_000, services: 10_000, servers: 2 },
];

/// What a packet takes in a crowd.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Crowd {
    /// How many services the flows are spread over.
    pub services: u32,
    /// How many real servers each service has.
    pub servers: u32,
    /// Nanoseconds for a new connection, less the harness.
    pub new: Nanoseconds,
    /// Nanoseconds for a packet of one of 65,536 established connections, less the harness.
    pub established: Nanoseconds,
}

impl Display for Crowd {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self { services, servers, new, established } = self;
        let time = |time: &Nanoseconds| format!("{:.1} ({:.1})", time.minimum, time.median);
        write!(formatter, "{services:>8} {servers:>13} {:>18} {:>18}", time(new), time(established))
    }
}

/// The names of the columns.
pub fn heading() -> String {
    format!("{:>8} {:>13} {:>18} {:>18}", "services", "servers each", "new connection", "established")
}

/// Measures all on this CPU; `is_quick`, without the largest.
pub fn measure(cpu: usize, rounds: usize, is_quick: bool) -> Result<Vec<Crowd>> {
    let shapes = if is_quick { &SHAPES[..3] } else { &SHAPES[..] };
    let mut bench = Bench::new(&["--max-connections", &CONNECTIONS.to_string()])?;
    configure(&bench, shapes)?;
    bench.bpfvs.kill9()?;
    limit_half_open(&bench, u32::MAX)?;
    answer_at_once(&mut Array::<_, Server>::try_from(Map::Array(open(&bench, "SERVERS")?))?, &[])?;
    let bench = &bench;
    bench.director.enter(move || {
        let mut only = CpuSet::new();
        only.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &only).with_context(|| format!("bind the measurement to CPU {cpu}"))?;
        let mut harness = Harness::load(1)?;
        shapes.iter().map(|shape| take_turns(bench, &mut harness, *shape, rounds)).collect()
    })
}

fn configure(bench: &Bench, shapes: &[Shape]) -> Result<()> {
    bench.director.ip("route add 10.128.0.0/9 via 10.1.0.254")?;
    let vip = Addresses::of(Family::Ipv4).vip;
    let mut address = Ipv4Addr::new(10, 128, 0, 0).to_bits();
    let servers = shapes.iter().map(|shape| shape.services * shape.servers).sum::<u32>() as usize;
    let mut lines = Vec::new();
    for shape in shapes {
        for service in 0..shape.services {
            let port = u32::from(shape.port) + service;
            lines.push(format!("-A -t {vip}:{port} -s rr"));
            for _ in 0..shape.servers {
                lines.push(format!("-a -t {vip}:{port} -r {} -g", Ipv4Addr::from_bits(address)));
                address += 1;
            }
        }
    }
    bench.bpfvs.restore(&lines.join("\n"))?;
    // Not by the API, which would print all of them again and again.
    wait::until("all real servers to be ready", READY, || bench.pinned.ready_servers().is_ok_and(|ready| ready >= servers))
}

fn take_turns(bench: &Bench, harness: &mut Harness, shape: Shape, rounds: usize) -> Result<Crowd> {
    let Shape { port, services, servers } = shape;
    let known = |flags| known_clients(flags, port, services, FLOWS);
    harness.test(Hook::Xdp, bench.pinned.descriptor(Hook::Xdp)?)?;
    for flags in [SYN, ACK] {
        run(harness, &known(flags), FLOWS as u32)?;
    }
    let (syn, ack) = (unknown_clients(port, services), known(ACK));
    let (mut new, mut established, mut nothing) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        harness.test_floor(Hook::Xdp, Floor::Nothing)?;
        let baseline = run(harness, &ack, NEW)?;
        harness.test(Hook::Xdp, bench.pinned.descriptor(Hook::Xdp)?)?;
        // A lap that is not timed, so that no connection has to be written to.
        run(harness, &ack, FLOWS as u32)?;
        let samples = [run(harness, &ack, NEW)?, run(harness, &syn, NEW)?];
        forget(bench, &syn.1)?;
        // The first round warms up.
        if round > 0 {
            nothing.push(baseline);
            established.push(samples[0]);
            new.push(samples[1]);
        }
    }
    let nothing = Nanoseconds::of(nothing).context("there was a round")?;
    let net = |samples| Ok::<_, anyhow::Error>(Nanoseconds::of(samples).context("there was a round")?.less(nothing));
    Ok(Crowd { services, servers, new: net(new)?, established: net(established)? })
}

/// Nanoseconds for each of so many packets.
fn run(harness: &mut Harness, (frame, round): &(Vec<u8>, Round), packets: u32) -> Result<f64> {
    harness.begin(round)?;
    let begin = cpu_time()?;
    let verdict = harness.run(Hook::Xdp, frame, packets)?.return_value;
    let taken = cpu_time()?.saturating_sub(begin);
    ensure!(verdict == XDP_TX, "the verdict is {verdict} instead of {XDP_TX}: this is not the path to measure");
    Ok(taken.as_secs_f64() * 1e9 / f64::from(packets))
}

fn forget(bench: &Bench, round: &Round) -> Result<()> {
    let vip = ipv4(Addresses::of(Family::Ipv4).vip.parse()?);
    let clients = (0..u64::from(NEW)).map(|flow| round.client(flow));
    let keys = clients.map(|(client, ports)| ConnectionKey { client, vip, ports, protocol: TCP });
    let mut connections: HashMap<MapData, ConnectionKey<u32>, Connection> =
        HashMap::try_from(Map::HashMap(open(bench, "CONNECTIONS_V4")?))?;
    remove(&mut connections, keys)
}
