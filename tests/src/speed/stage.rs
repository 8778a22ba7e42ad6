//! The director under test, and its tables, filled.
//!
//! A daemon configures a director with one service for each method, and is then killed: programs and maps stay, as they
//! must, and nobody sweeps connections or writes to the maps between two samples. All connections are those of the first
//! service; which method they take is decided by writing the one or the other real server's entry, as the daemon made
//! it, into their real server's place. So one table serves all cases.
//!
//! Packets come in by `lo`, as in every test run. Out of the device that they came in by they go when the entry names
//! `lo` as the device; the daemon would never write that.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapError},
};
use lb_common::{
    connection::{Connection, ConnectionKey},
    family::{ipv4, ipv6},
    floor::Round,
    server::Server,
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

use super::{
    Path,
    harness::{Floor, Harness},
};
use crate::{
    bench::{Addresses, Bench, bracketed},
    frame::{ACK, Frame, SYN},
    lab::Family,
    test_run::Hook,
};

/// Ports of the two services, which are also those of their real servers.
const ROUTED: u16 = 80;
const TUNNELLED: u16 = 81;
/// The interface by which a test run's packets come in: `lo`.
pub(super) const INGRESS: u32 = 1;
/// Clients of the flows that are in the table, and of those that never were.
const KNOWN: u32 = 0x0a10_0000;
const UNKNOWN: u32 = 0x0a20_0000;
/// Connections that begin in one sample.
pub const NEW: u32 = 1 << 16;

/// The programs whose speed is compared.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Program {
    Nothing,
    Grown,
    Floor,
    Director,
}

/// A configured director, the harness, and what is in the tables.
pub struct Stage {
    bench: Bench,
    harness: Harness,
    /// By family: the entries that the daemon made for both methods.
    entries: [Entries; 2],
    servers: Array<MapData, Server>,
    /// By family: flows in the tables, of the director and of the floor.
    flows: [u64; 2],
}

/// A family's real servers.
#[derive(Clone, Copy, Debug)]
struct Entries {
    /// Index of the real server of all connections.
    index: u32,
    routed: Server,
    tunnelled: Server,
}

impl Stage {
    /// Starts a director, configures it, and kills its daemon.
    pub fn new(max_connections: u32) -> Result<Self> {
        let mut bench = Bench::new(&["--max-connections", &max_connections.to_string()])?;
        for family in Family::ALL {
            let addresses = Addresses::of(family);
            let vip = bracketed(addresses.vip);
            for (port, server, method) in [(ROUTED, addresses.servers[0], "-g"), (TUNNELLED, addresses.servers[1], "-i")] {
                bench.bpfvs.ipvsadm(&format!("-A -t {vip}:{port} -s rr"))?;
                bench.bpfvs.ipvsadm(&format!("-a -t {vip}:{port} -r {}:{port} {method}", bracketed(server)))?;
            }
        }
        bench.bpfvs.wait_for_servers()?;
        let indices = Family::ALL.map(|family| Addresses::of(family).servers.map(|server| bench.server_index(server)));
        bench.bpfvs.kill9()?;
        let servers: Array<MapData, Server> = Array::try_from(Map::Array(open(&bench, "SERVERS")?))?;
        let [four, six] = indices.map(|[routed, tunnelled]| -> Result<_> {
            let index = routed?;
            Ok(Entries { index, routed: servers.get(&index, 0)?, tunnelled: servers.get(&tunnelled?, 0)? })
        });
        let harness = Harness::load(max_connections)?;
        Ok(Self { bench, harness, entries: [four?, six?], servers, flows: [0; 2] })
    }

    /// Does something in a thread that is bound to one CPU and lives in the director's namespace, as test runs must.
    pub fn enter<T: Send>(&mut self, cpu: usize, work: impl FnOnce(&mut Act<'_>) -> Result<T> + Send) -> Result<T> {
        let Self { bench, harness, entries, servers, flows } = self;
        let bench = &*bench;
        bench.director.enter(move || {
            let mut only = CpuSet::new();
            only.set(cpu)?;
            sched_setaffinity(Pid::from_raw(0), &only).with_context(|| format!("bind the measurement to CPU {cpu}"))?;
            work(&mut Act { bench, harness, entries, servers, flows })
        })
    }
}

/// The last CPU that this process may use: the first ones get the interrupts.
pub fn last_cpu() -> Result<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    (0..CpuSet::count()).rev().find(|cpu| allowed.is_set(*cpu).unwrap_or(false)).context("this process may use some CPU")
}

/// The stage, from within the director's namespace.
pub struct Act<'a> {
    bench: &'a Bench,
    harness: &'a mut Harness,
    entries: &'a [Entries; 2],
    servers: &'a mut Array<MapData, Server>,
    flows: &'a mut [u64; 2],
}

impl Act<'_> {
    /// Makes ready for a path of a family, with so many flows in the tables: a power of two.
    pub fn set(&mut self, family: Family, path: Path, flows: u64) -> Result<()> {
        self.direct(family, Path::Routed)?;
        if self.flows[family as usize] != flows {
            self.fill(family, flows)?;
        }
        self.direct(family, path)
    }

    /// The harness.
    pub fn harness(&mut self) -> &mut Harness {
        self.harness
    }

    /// Puts a program under test.
    pub fn test(&mut self, hook: Hook, program: Program) -> Result<()> {
        match program {
            Program::Nothing => self.harness.test_floor(hook, Floor::Nothing),
            Program::Grown => self.harness.test_floor(hook, Floor::Grown),
            Program::Floor => self.harness.test_floor(hook, Floor::Forward),
            Program::Director => self.harness.test(hook, self.bench.pinned.descriptor(hook)?),
        }
    }

    /// What real-server entry the connections of a family lead to.
    fn direct(&mut self, family: Family, path: Path) -> Result<()> {
        let Entries { index, routed, tunnelled } = self.entries[family as usize];
        let mut server = if path == Path::Tunnelled { tunnelled } else { routed };
        if path != Path::RoutedElsewhere {
            server.ifindex = INGRESS;
            server.port_ifindex = INGRESS;
        }
        self.servers.set(index, server, 0).context("write the real server's entry")?;
        self.harness.set_server(&server)
    }

    /// Makes connections until so many are in the tables, or begins anew if there are more.
    fn fill(&mut self, family: Family, flows: u64) -> Result<()> {
        if self.flows[family as usize] > flows {
            self.forget(family, KNOWN, self.flows[family as usize], Program::Director)?;
            self.forget(family, KNOWN, self.flows[family as usize], Program::Floor)?;
        }
        for (program, flags) in [(Program::Director, SYN), (Program::Director, ACK), (Program::Floor, ACK)] {
            let (frame, round) = frame(family, flags, KNOWN, flows, false);
            self.test(Hook::Xdp, program)?;
            self.harness.begin(&round)?;
            let sent = self.harness.run(Hook::Xdp, &frame, flows as u32)?.return_value;
            ensure!(sent == 3, "filling the tables ended with verdict {sent} of {program:?} instead of XDP_TX");
        }
        self.flows[family as usize] = flows;
        Ok(())
    }

    /// Takes the connections out again that began in a sample.
    pub fn forget_new(&mut self, family: Family, program: Program) -> Result<()> {
        self.forget(family, UNKNOWN, u64::from(NEW), program)
    }

    fn forget(&mut self, family: Family, first_client: u32, flows: u64, program: Program) -> Result<()> {
        if !matches!(program, Program::Floor | Program::Director) {
            return Ok(());
        }
        let addresses = Addresses::of(family);
        let (_, round) = frame(family, SYN, first_client, flows, false);
        let clients = (0..flows).map(|flow| round.client(flow));
        match family {
            Family::Ipv4 => {
                let vip = ipv4(addresses.vip.parse()?);
                let keys = clients.map(|(client, ports)| ConnectionKey { client, vip, ports, protocol: TCP });
                match program {
                    Program::Director => remove(&mut self.connections("CONNECTIONS_V4")?, keys),
                    _ => remove(&mut self.harness.connections::<_, Connection>(family)?, keys),
                }
            }
            Family::Ipv6 => {
                let vip = ipv6(addresses.vip.parse()?);
                let [a, b, c, _] = ipv6(addresses.client.parse()?);
                let keys = clients.map(|(client, ports)| ConnectionKey { client: [a, b, c, client], vip, ports, protocol: TCP });
                match program {
                    Program::Director => remove(&mut self.connections("CONNECTIONS_V6")?, keys),
                    _ => remove(&mut self.harness.connections::<_, Connection>(family)?, keys),
                }
            }
        }
    }

    fn connections<K: Pod>(&self, name: &str) -> Result<HashMap<MapData, K, Connection>> {
        Ok(HashMap::try_from(Map::HashMap(open(self.bench, name)?))?)
    }
}

pub(super) const TCP: u32 = 6;

pub(super) fn open(bench: &Bench, name: &str) -> Result<MapData> {
    let path = bench.bpfvs.pins().join("maps").join(name);
    MapData::from_pin(&path).with_context(|| format!("open the pinned map {}", path.display()))
}

pub(super) fn remove<T: std::borrow::BorrowMut<MapData>, K: Pod>(
    connections: &mut HashMap<T, K, Connection>,
    keys: impl Iterator<Item = K>,
) -> Result<()> {
    for key in keys {
        match connections.remove(&key) {
            Ok(()) | Err(MapError::KeyNotFound) => {}
            Err(error) => return Err(error).context("take a connection out of its table"),
        }
    }
    Ok(())
}

/// The template of a case's packets, and what the wrapper makes of it.
pub fn template(family: Family, path: Path, flows: u64) -> (Vec<u8>, Round) {
    match path {
        Path::New => frame(family, SYN, UNKNOWN, u64::from(NEW), false),
        _ => frame(family, ACK, KNOWN, flows, path == Path::NotOurs),
    }
}

/// The template of SYNs of clients that are in no table, to a port of the IPv4 address.
pub fn unknown_clients(port: u16) -> (Vec<u8>, Round) {
    frame_to(port, Family::Ipv4, SYN, UNKNOWN, u64::from(NEW), false)
}

/// The template of packets from these clients: frames of 64 bytes for IPv4, 84 for IPv6.
fn frame(family: Family, flags: u8, first_client: u32, flows: u64, foreign: bool) -> (Vec<u8>, Round) {
    frame_to(ROUTED, family, flags, first_client, flows, foreign)
}

fn frame_to(port: u16, family: Family, flags: u8, first_client: u32, flows: u64, foreign: bool) -> (Vec<u8>, Round) {
    let addresses = Addresses::of(family);
    let socket = |address: &str, port| SocketAddr::new(address.parse().expect("the bench's addresses are well-formed"), port);
    let destination = socket(if foreign { addresses.foreign } else { addresses.vip }, port);
    let frame = Frame { payload: vec![0; 10], ..Frame::tcp(socket(addresses.client, 1), destination, flags) }.build();
    let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|byte| frame.get(at + byte).copied().unwrap_or(0)));
    let round = Round {
        length: frame.len() as u32,
        is_v6: u32::from(family == Family::Ipv6),
        flow: 0,
        flows,
        first_client,
        vip_port: port.to_be(),
        start: u16::from_ne_bytes([frame[0], frame[1]]),
        headers: std::array::from_fn(|at| word(2 + 4 * at)),
        more_headers: std::array::from_fn(|at| word(54 + 4 * at)),
    };
    (frame, round)
}
