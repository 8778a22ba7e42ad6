//! Replays what the kernel's IPVS did (`ipvs-vectors.json`) against the schedulers.
//!
//! Each case is driven as the daemon drives a service: compile, let the datapath take picks, and before anything changes
//! move the scheduler on by what was taken. To be sure that a restart changes nothing, the scheduler goes through its
//! serialised form before every change. Dynamic schedulers are driven twice: with runs that look far ahead, and with a new
//! run for each connection.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use lb_common::{
    family::{ipv4, ipv6},
    pick,
    schedule::{INELIGIBLE, NOBODY, position},
    server::Counters,
    service::{Mode, flags},
};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{Arrivals, Candidate, Change, Run, Scheduler, destinations::Destinations};
use crate::director::model::{Family, service_flags};

#[derive(Deserialize)]
struct Vectors {
    scheduler_cases: Vec<Case>,
    mh_tables: Vec<MaglevTable>,
    sh_tables: Vec<SourceTable>,
}

#[derive(Deserialize)]
struct Case {
    id: String,
    scheduler: String,
    flags: Vec<String>,
    family: String,
    proto: String,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
enum Step {
    Add {
        dest: String,
        addr: IpAddr,
        port: u16,
        weight: u32,
        #[serde(default)]
        u: u32,
        #[serde(default)]
        l: u32,
    },
    Set {
        dest: String,
        weight: Option<u32>,
        u: Option<u32>,
        l: Option<u32>,
    },
    Del {
        dest: String,
    },
    Arrive {
        expect: Vec<Option<String>>,
    },
    Packets {
        packets: Vec<Packet>,
    },
    Inactivate {
        conns: Vec<usize>,
    },
    Expire {
        conns: Vec<usize>,
    },
}

#[derive(Deserialize)]
struct Packet {
    src: IpAddr,
    sport: u16,
    dst: Option<IpAddr>,
    expect: Option<String>,
}

#[derive(Deserialize)]
struct MaglevTable {
    dests_in_add_order: Vec<Destination>,
    table_size: usize,
    first_64: Vec<u32>,
    count_per_dest: Vec<usize>,
    sha256_of_table_bytes: String,
}

#[derive(Deserialize)]
struct Destination {
    addr: IpAddr,
    port: u16,
    weight: u32,
}

#[derive(Deserialize)]
struct SourceTable {
    weights_in_add_order: Vec<u32>,
    first_32: Vec<u32>,
    count_per_dest: Vec<usize>,
}

fn vectors() -> Vectors {
    let path = std::env::var("BPFVS_VECTORS")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/ipvs-vectors.json").to_owned());
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path} cannot be read: {error}"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path} is not what it should be: {error}"))
}

/// A real server with its thresholds and connections, as IPVS keeps them (also while it is removed).
struct Server {
    candidate: Candidate,
    lower: u32,
}

/// What moves the overload flag.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Cause {
    Bound,
    Unbound,
    Edited,
}

impl Server {
    fn low_mark(&self) -> u32 {
        let upper = self.candidate.upper_threshold;
        if self.lower == 0 { upper - (upper >> 2) } else { self.lower }
    }

    fn update(&mut self, cause: Cause) {
        let (upper, low) = (self.candidate.upper_threshold, self.low_mark());
        if upper == 0 {
            self.candidate.overloaded = false;
        } else if self.candidate.total >= if cause == Cause::Bound { low } else { upper } {
            self.candidate.overloaded = true;
        } else if self.candidate.total < if cause == Cause::Unbound { upper } else { low } {
            self.candidate.overloaded = false;
        }
    }

    fn set_thresholds(&mut self, upper: u32, lower: u32) {
        if (self.candidate.upper_threshold, self.lower) != (upper, lower) {
            (self.candidate.upper_threshold, self.lower) = (upper, lower);
            self.update(Cause::Edited);
        }
    }
}

/// A connection that has a real server.
#[derive(Clone)]
struct Connection {
    server: String,
    active: bool,
}

/// The daemon, the datapath and the connection table of one service.
struct Harness {
    scheduler: Scheduler,
    family: Family,
    /// For how many connections, of which kind, a run is compiled.
    arrivals: Arrivals,
    /// By name, removed ones too.
    known: BTreeMap<String, Server>,
    /// Names in IPVS's order.
    order: Vec<String>,
    compiled: Vec<Candidate>,
    run: Run,
    cursor: u32,
    destinations: Destinations,
    connections: Vec<Option<Connection>>,
}

impl Harness {
    fn new(case: &Case, ahead: u32) -> Self {
        let bit = |flag: &String| match flag.as_str() {
            "sh-fallback" | "mh-fallback" => service_flags::FLAG_1,
            "sh-port" | "mh-port" => service_flags::FLAG_2,
            other => panic!("{}: unknown flag {other}", case.id),
        };
        let flags = case.flags.iter().map(bit).fold(0, |all, bit| all | bit);
        let family = if case.family == "inet6" { Family::Ipv6 } else { Family::Ipv4 };
        let mut scheduler = Scheduler::from_name(&case.scheduler, flags, family).expect("it is in the list");
        scheduler.servers_changed(&[], Change::Started);
        let mut harness = Self {
            scheduler,
            family,
            arrivals: Arrivals { count: ahead, active: case.proto == "tcp", ..Arrivals::after(0) },
            known: BTreeMap::new(),
            order: Vec::new(),
            compiled: Vec::new(),
            run: Run::default(),
            cursor: u32::MAX - 7, // so that it wraps
            destinations: Destinations::default(),
            connections: Vec::new(),
        };
        harness.compile();
        harness
    }

    fn candidates(&self) -> Vec<Candidate> {
        self.order.iter().map(|name| self.known[name].candidate).collect()
    }

    fn settle(&mut self) {
        self.scheduler.advance(&self.compiled, self.cursor.wrapping_sub(self.run.base));
        self.run.base = self.cursor;
        let text = serde_json::to_string(&self.scheduler).expect("it is plain data");
        self.scheduler = serde_json::from_str(&text).expect("it was written a moment ago");
    }

    fn compile(&mut self) {
        self.compiled = self.candidates();
        self.run = self.scheduler.compile(&self.compiled, Arrivals { base: self.cursor, ..self.arrivals });
        assert!(!self.run.truncated);
    }

    fn change(&mut self, change: Change) {
        self.scheduler.servers_changed(&self.candidates(), change);
        self.compile();
    }

    fn name_of(&self, index: u32) -> Option<String> {
        self.known.iter().find(|(_, server)| server.candidate.index == index).map(|(name, _)| name.clone())
    }

    /// What the datapath does with the first packet of a connection.
    fn pick(&mut self, client: IpAddr, port: u16, destination: IpAddr) -> Option<String> {
        let flags = self.scheduler.service_flags();
        let value = match client {
            IpAddr::V4(client) => pick::client_value(&ipv4(client), port.to_be(), flags),
            IpAddr::V6(client) => pick::client_value(&ipv6(client), port.to_be(), flags),
        };
        let picks = &self.run.picks;
        let chosen = match self.scheduler.mode() {
            Mode::Cursor => {
                let position = position(self.cursor, self.run.base, self.run.head, picks.len() as u32 - self.run.head)?;
                self.cursor = self.cursor.wrapping_add(1);
                picks[position as usize]
            }
            mode @ (Mode::Locality | Mode::Replicas) => {
                let locality = self.run.locality.as_ref().expect("such a run has it");
                let live = |server: &Server| Counters { active: server.candidate.active, total: server.candidate.total };
                let counters = self.known.values().map(|server| (server.candidate.index, live(server))).collect();
                // Compiled for this connection.
                self.destinations.pick(mode, locality, &counters, destination, || {
                    self.cursor = self.cursor.wrapping_add(1);
                    picks[0]
                })
            }
            Mode::SourceHash => picks[pick::source_bucket(value) as usize],
            Mode::DestinationHash => match destination {
                IpAddr::V4(address) => picks[pick::destination_bucket(&ipv4(address)) as usize],
                IpAddr::V6(address) => picks[pick::destination_bucket(&ipv6(address)) as usize],
            },
            Mode::Maglev => {
                let first = pick::maglev_first(value);
                let mut chosen = picks[first as usize];
                if flags & flags::FALLBACK != 0 {
                    let mut k = 0;
                    while chosen != NOBODY && chosen & INELIGIBLE != 0 && k < pick::MAGLEV_ATTEMPTS {
                        chosen = picks[pick::maglev_next(value, first, k) as usize];
                        k += 1;
                    }
                }
                chosen
            }
        };
        if chosen & INELIGIBLE != 0 { None } else { self.name_of(chosen) }
    }

    /// A new connection that stays.
    fn connect(&mut self, client: IpAddr, port: u16, destination: IpAddr) -> Option<String> {
        let is_local = matches!(self.scheduler.mode(), Mode::Locality | Mode::Replicas);
        let used_up = self.cursor.wrapping_sub(self.run.base) >= self.arrivals.count;
        if self.scheduler.is_dynamic() && (is_local || used_up) {
            self.compile();
        }
        let chosen = self.pick(client, port, destination);
        let active = self.arrivals.active;
        self.connections.push(chosen.clone().map(|server| Connection { server, active }));
        if let Some(name) = &chosen {
            let server = self.server(name);
            let overloaded = server.candidate.overloaded;
            server.candidate.active += u32::from(active);
            server.candidate.total += 1;
            if server.candidate.total == server.candidate.upper_threshold {
                server.update(Cause::Bound);
            }
            // A forecast knows this beforehand.
            let flipped = server.candidate.overloaded != overloaded;
            if flipped && !self.scheduler.is_dynamic() {
                self.settle();
                self.compile();
            }
        }
        chosen
    }

    /// A connection is not active any more.
    fn inactivate(&mut self, number: usize) {
        let connection = self.connections[number - 1].as_mut().expect("only connections with a server come to rest");
        if std::mem::take(&mut connection.active) {
            let name = connection.server.clone();
            self.server(&name).candidate.active -= 1;
        }
    }

    /// A connection is over.
    fn expire(&mut self, number: usize) {
        self.inactivate(number);
        let connection = self.connections[number - 1].take().expect("only connections with a server expire");
        let server = self.server(&connection.server);
        server.candidate.total -= 1;
        if server.candidate.total + 1 == server.low_mark() {
            server.update(Cause::Unbound);
        }
    }

    fn server(&mut self, name: &str) -> &mut Server {
        self.known.get_mut(name).expect("it was chosen from the known")
    }

    fn step(&mut self, id: &str, step: &Step) {
        let (client, vip): (IpAddr, IpAddr) = match self.family {
            Family::Ipv4 => ([10, 9, 0, 2].into(), [10, 99, 0, 1].into()),
            Family::Ipv6 => ([0xfd09, 0, 0, 0, 0, 0, 0, 2].into(), [0xfd99, 0, 0, 0, 0, 0, 0, 1].into()),
        };
        match step {
            Step::Add { dest, addr, port, weight, u, l } => {
                self.settle();
                let next_index = 100 + 3 * self.known.len() as u32;
                let server = self.known.entry(dest.clone()).or_insert_with(|| Server {
                    candidate: Candidate {
                        index: next_index,
                        address: *addr,
                        port: *port,
                        weight: 0,
                        last_weight: 0,
                        overloaded: false,
                        upper_threshold: 0,
                        active: 0,
                        total: 0,
                    },
                    lower: 0,
                });
                server.candidate.weight = *weight;
                server.candidate.last_weight = *weight;
                server.set_thresholds(*u, *l);
                self.order.insert(0, dest.clone());
                self.change(Change::Added);
            }
            Step::Set { dest, weight, u, l } => {
                self.settle();
                let position = self.order.iter().position(|name| name == dest).expect("only present servers are edited");
                let server = self.known.get_mut(dest).expect("present servers are known");
                let candidate = &mut server.candidate;
                candidate.weight = weight.unwrap_or(candidate.weight);
                candidate.last_weight = if candidate.weight > 0 { candidate.weight } else { candidate.last_weight };
                server.set_thresholds(u.unwrap_or(server.candidate.upper_threshold), l.unwrap_or(server.lower));
                self.change(Change::Edited { position });
            }
            Step::Del { dest } => {
                self.settle();
                let position = self.order.iter().position(|name| name == dest).expect("only present servers are removed");
                self.order.remove(position);
                self.change(Change::Removed { position, index: self.known[dest].candidate.index });
            }
            Step::Arrive { expect } => {
                let got: Vec<_> = expect.iter().map(|_| self.connect(client, 1000, vip)).collect();
                assert_eq!(&got, expect, "{id}");
            }
            Step::Packets { packets } => {
                for (number, packet) in packets.iter().enumerate() {
                    let got = self.connect(packet.src, packet.sport, packet.dst.unwrap_or(vip));
                    assert_eq!(got, packet.expect, "{id}: packet {number} from {} port {}", packet.src, packet.sport);
                }
            }
            Step::Inactivate { conns } => {
                self.settle();
                for number in conns {
                    self.inactivate(*number);
                }
                self.compile();
            }
            Step::Expire { conns } => {
                self.settle();
                for number in conns {
                    self.expire(*number);
                }
                self.compile();
            }
        }
    }
}

#[test]
fn every_choice_is_the_kernels() {
    let mut cases: HashMap<String, usize> = HashMap::new();
    for case in vectors().scheduler_cases.iter().filter(|case| Scheduler::NAMES.contains(&case.scheduler.as_str())) {
        for ahead in [64, 1] {
            let mut harness = Harness::new(case, ahead);
            for step in &case.steps {
                harness.step(&case.id, step);
            }
        }
        *cases.entry(case.scheduler.clone()).or_default() += 1;
    }
    for name in ["rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sed", "nq", "fo", "ovf", "sh", "dh", "mh"] {
        assert!(cases.contains_key(name), "no case for {name} was found");
    }
}

/// Candidates from servers in the order in which they were added; the index is the number in that order.
fn added(servers: &[Destination]) -> Vec<Candidate> {
    let candidate = |(index, server): (usize, &Destination)| Candidate {
        index: index as u32,
        address: server.addr,
        port: server.port,
        weight: server.weight,
        last_weight: server.weight,
        overloaded: false,
        upper_threshold: 0,
        active: 0,
        total: 0,
    };
    servers.iter().enumerate().map(candidate).rev().collect()
}

fn counts(picks: &[u32], servers: usize) -> Vec<usize> {
    (0..servers).map(|server| picks.iter().filter(|&&pick| pick == server as u32).count()).collect()
}

#[test]
fn maglev_tables_are_the_kernels() {
    let tables = vectors().mh_tables;
    assert!(!tables.is_empty());
    for table in tables {
        let servers = added(&table.dests_in_add_order);
        let mut scheduler = Scheduler::from_name("mh", 0, Family::of(servers[0].address)).expect("it is in the list");
        let picks = scheduler.compile(&servers, Arrivals::after(0)).picks;
        assert_eq!(picks.len(), table.table_size);
        assert_eq!(picks[..64], table.first_64);
        assert_eq!(counts(&picks, servers.len()), table.count_per_dest);
        let bytes: Vec<u8> = picks.iter().map(|&pick| pick as u8).collect();
        assert_eq!(format!("{:x}", Sha256::digest(&bytes)), table.sha256_of_table_bytes);
    }
}

#[test]
fn source_hash_tables_are_the_kernels() {
    let tables = vectors().sh_tables;
    assert!(!tables.is_empty());
    for table in tables {
        let weights: Vec<u32> = table.weights_in_add_order.iter().rev().copied().collect();
        let servers = super::tests::candidates(&weights);
        // These tables show who was dealt a bucket, eligible or not.
        let picks: Vec<u32> = super::sh::deal(&servers).map(|server| server.index).collect();
        assert_eq!(picks[..32], table.first_32);
        assert_eq!(counts(&picks, servers.len()), table.count_per_dest);
    }
}
