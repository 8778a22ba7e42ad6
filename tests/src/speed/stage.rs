//! The director under test, and its tables, filled.
//!
//! A daemon configures a director with one service for each method, and is then killed: programs and maps stay, as they
//! must, and nobody sweeps connections or writes to the maps between two samples. All connections are those of the first
//! service; which method they take is decided by writing the one or the other real server's entry, as the daemon made
//! it, into their real server's place. So one table serves all cases, but for masqueraded connections, whose replies are
//! expected from their first packet on: for them it is filled anew.
//!
//! Packets come in by `lo`, as in every test run. Out of the device that they came in by they go when the entry names
//! `lo` as the device; the daemon would never write that.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData},
};
use lb_common::{
    config::Config,
    connection::{Connection, ConnectionKey},
    family::{Address, Ipv4, Ipv6, ipv4, ipv6},
    floor::{Role, Round},
    hop::{Device, Hop},
    local::{self, Local, LocalAddress},
    packet::{protocol, transport::Ports},
    reply::Reply,
    server::{Method, Server, Status},
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

use super::{
    Case, Path,
    harness::{Floor, Harness},
};
use crate::{
    bench::{Addresses, Bench, bracketed},
    frame::{ACK, Frame, SYN},
    lab::Family,
    test_run::{Hook, remove},
};

/// Ports of the services, which are also those of their real servers.
const ROUTED: u16 = 80;
const TUNNELLED: u16 = 81;
const MASQUERADED: u16 = 82;
const FULLNAT: u16 = 83;
const DATAGRAM: u16 = 84;
const PERSISTENT: u16 = 85;
const BY_RULE: u16 = 86;
const BY_MARK: u16 = 87;
const UNUSED: u16 = 88;
/// The marks of the services that are named by one.
const RULE: u32 = 10;
const MARK: u32 = 11;
/// The interface by which a test run's packets come in: `lo`.
pub(super) const INGRESS: u32 = 1;
/// Clients of the flows that are in the table, and of those that never were.
const KNOWN: u32 = 0x0a10_0000;
const UNKNOWN: u32 = 0x0a20_0000;
/// The first of the local addresses that connections begin with (IPv6: its last word), and how many they are: as many as can be.
const POOL: u32 = 0x0a30_0000;
const POOL_SIZE: u32 = local::POOL_SIZE as u32;
/// So many connections begin before their ports are given back to the pool: a quarter of what it has.
const PART: u64 = 1 << 20;
/// The first of those that they are given instead, which belong to no pool. A known client has the local address and port that are as
/// far from the first as its own are from those of the first client, so that replies can be made up without asking.
const LOCAL: u32 = 0x0a40_0000;
/// Its index, and how many there are for each family: with 2^14 ports each, enough for eight million flows.
const FIRST_LOCAL: u32 = 1 << 12;
const LOCALS: u32 = 512;
/// Connections that begin in one sample.
pub const NEW: u32 = 1 << 16;

/// The services: port, which of the two real servers, and how it is reached.
const METHODS: [(u16, usize, &str); 4] =
    [(ROUTED, 0, "-g"), (TUNNELLED, 1, "-i"), (MASQUERADED, 0, "-m"), (FULLNAT, 0, "-m --fullnat")];

/// The programs whose speed is compared.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Program {
    Nothing,
    Grown,
    Floor,
    Director,
    /// So many steps of a director's way.
    Steps(usize),
}

/// A configured director, the harness, and what is in the tables.
pub struct Stage {
    bench: Bench,
    harness: Harness,
    /// What makes the director lie elsewhere.
    _ballast: Vec<Harness>,
    /// By family: the entries that the daemon made for each method.
    entries: [Entries; 2],
    servers: Array<MapData, Server>,
    /// By family: what is in the tables, of the director and of the floor.
    flows: [Flows; 2],
}

/// Known connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Flows {
    count: u64,
    /// A value of [`Path::connections`].
    path: Path,
}

impl Flows {
    const NONE: Self = Self { count: 0, path: Path::Routed };

    /// The port of the real server, where replies come from; nothing if they do not pass the director.
    const fn server_port(self) -> Option<u16> {
        match self.path {
            Path::Masqueraded => Some(MASQUERADED),
            Path::FullNat => Some(FULLNAT),
            _ => None,
        }
    }
}

/// A family's real servers.
#[derive(Clone, Copy, Debug)]
struct Entries {
    /// Index of the real server of all connections.
    index: u32,
    routed: Server,
    tunnelled: Server,
    masqueraded: Server,
    fullnat: Server,
}

impl Stage {
    /// Starts a director, configures it, and kills its daemon.
    ///
    /// The kernel puts programs where there is room first. So that those of each `load` lie elsewhere than those of the others, which
    /// makes up to a fifth of their time, others are loaded before, and stay.
    pub fn new(max_connections: u32, load: usize) -> Result<Self> {
        let ballast = (0..load).map(|_| Harness::load(1)).collect::<Result<_>>()?;
        // New connections come by the thousand here, and that is no flood.
        let most = max_connections.to_string();
        let mut bench = Bench::new(&["--max-connections", &most, "--max-half-open", "4294967295"])?;
        // The way to the IPv4 clients; those of IPv6 are of the bench's own net.
        bench.director.ip("route add 10.16.0.0/12 via 10.1.0.254")?;
        for family in Family::ALL {
            let all = (0..POOL_SIZE).map(|number| local_of(family, POOL + number).map(|address| address.to_string()));
            bench.bpfvs.succeed(&["localaddr", "add", &all.collect::<Result<Vec<_>>>()?.join(",")])?;
            let addresses = Addresses::of(family);
            let vip = bracketed(addresses.vip);
            let server = addresses.servers[0];
            let six = if family == Family::Ipv6 { " -6" } else { "" };
            for (service, options) in [
                (format!("-u {vip}:{DATAGRAM}"), "-s rr"),
                (format!("-t {vip}:{PERSISTENT}"), "-s rr -p 3000"),
                (format!("-f {RULE}{six}"), "-s rr"),
                (format!("-f {MARK}{six}"), "-s rr"),
            ] {
                bench.bpfvs.ipvsadm(&format!("-A {service} {options}"))?;
                bench.bpfvs.ipvsadm(&format!("-a {service} -r {server} -g"))?;
            }
            // The second one has a rule that nobody asks for: else services by address would wait for the firewall.
            for (mark, port) in [(RULE, BY_RULE), (MARK, UNUSED)].map(|(mark, port)| (mark.to_string(), port.to_string())) {
                bench.bpfvs.succeed(&["mark", "add", &mark, "--dst", addresses.vip, "--proto", "tcp", "--ports", &port])?;
            }
            for (port, server, method) in METHODS.map(|(port, server, method)| (port, addresses.servers[server], method)) {
                bench.bpfvs.ipvsadm(&format!("-A -t {vip}:{port} -s rr"))?;
                bench.bpfvs.ipvsadm(&format!("-a -t {vip}:{port} -r {}:{port} {method}", bracketed(server)))?;
            }
        }
        bench.bpfvs.wait_for_servers()?;
        let index = |family, (port, server, _): (u16, usize, _)| bench.server_index_at(Addresses::of(family).servers[server], port);
        let indices = Family::ALL.map(|family| METHODS.map(|method| index(family, method)));
        bench.bpfvs.kill9()?;
        let mut servers: Array<MapData, Server> = Array::try_from(Map::Array(open(&bench, "SERVERS")?))?;
        let [four, six] = indices.map(|[routed, tunnelled, masqueraded, fullnat]| -> Result<_> {
            let entry = |index| servers.get(&index, 0);
            let index = routed?;
            let (masqueraded, fullnat) = (entry(masqueraded?)?, entry(fullnat?)?);
            Ok(Entries { index, routed: entry(index)?, tunnelled: entry(tunnelled?)?, masqueraded, fullnat })
        });
        let (four, six) = (four?, six?);
        limit_half_open(&bench, u32::MAX)?;
        add_locals(&bench)?;
        answer_at_once(&mut servers, &[four.index, six.index])?;
        // Replies, too, shall leave by the device that they come in by.
        let mut devices: HashMap<MapData, u32, Device> = HashMap::try_from(Map::HashMap(open(&bench, "DEVICES")?))?;
        for (ifindex, device) in devices.iter().collect::<Result<Vec<_>, _>>()? {
            devices.insert(ifindex, Device { port_ifindex: INGRESS, ..device }, 0)?;
        }
        // The floor has requests and replies in one table.
        let harness = Harness::load(2 * max_connections)?;
        Ok(Self { bench, harness, _ballast: ballast, entries: [four, six], servers, flows: [Flows::NONE; 2] })
    }

    /// The director.
    pub const fn bench(&self) -> &Bench {
        &self.bench
    }

    /// Does something in a thread that is bound to one CPU and lives in the director's namespace, as test runs must.
    pub fn enter<T: Send>(&mut self, cpu: usize, work: impl FnOnce(&mut Act<'_>) -> Result<T> + Send) -> Result<T> {
        let Self { bench, harness, entries, servers, flows, .. } = self;
        let bench = &*bench;
        bench.director.enter(move || {
            let mut only = CpuSet::new();
            only.set(cpu)?;
            sched_setaffinity(Pid::from_raw(0), &only).with_context(|| format!("bind the measurement to CPU {cpu}"))?;
            work(&mut Act { bench, harness, entries, servers, flows })
        })
    }
}

/// Says how many half-open connections there may be before flood mode begins. The bench makes more than any director should see.
pub(super) fn limit_half_open(bench: &Bench, limit: u32) -> Result<()> {
    let mut settings: Array<MapData, Config> = Array::try_from(Map::Array(open(bench, "CONFIG")?))?;
    let config = settings.get(&0, 0)?;
    settings.set(0, Config { half_open_limit: limit, midst_limit: limit, ..config }, 0).context("write the settings")
}

/// Writes the local addresses that are in no pool, as those are that were taken out of it.
fn add_locals(bench: &Bench) -> Result<()> {
    let mut addresses: Array<MapData, LocalAddress> = Array::try_from(Map::Array(open(bench, "LOCALS")?))?;
    for family in Family::ALL {
        for number in 0..LOCALS {
            let address = match local_of(family, LOCAL + number)? {
                IpAddr::V4(address) => ipv6(address.to_ipv6_mapped()),
                IpAddr::V6(address) => ipv6(address),
            };
            addresses.set(first_local(family) + number, LocalAddress { address }, 0).context("write a local address")?;
        }
    }
    Ok(())
}

/// Lets packets to every real server that is routed to directly leave by the device that they came in by, but to `others`.
pub(super) fn answer_at_once(servers: &mut Array<MapData, Server>, others: &[u32]) -> Result<()> {
    for index in (0..servers.len()).filter(|index| !others.contains(index)) {
        let entry = servers.get(&index, 0)?;
        if entry.status == Status::Ready as u8 && entry.method == Method::Route as u8 {
            let hop = Hop { ifindex: INGRESS, port_ifindex: INGRESS, ..entry.hop };
            servers.set(index, Server { hop, ..entry }, 0)?;
        }
    }
    Ok(())
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
    flows: &'a mut [Flows; 2],
}

impl Act<'_> {
    /// Makes ready for a path of a family, with so many flows in the tables: a power of two.
    pub fn set(&mut self, family: Family, path: Path, flows: u64) -> Result<()> {
        let wanted = Flows { count: flows, path: path.connections() };
        if self.flows[family as usize] != wanted {
            self.direct(family, wanted.path)?;
            limit_half_open(self.bench, u32::MAX)?;
            self.fill(family, wanted)?;
        }
        limit_half_open(self.bench, if path == Path::Flood { 0 } else { u32::MAX })?;
        // What found no room lately keeps flood mode on.
        self.bench.pinned.forget_flood()?;
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
            Program::Steps(steps) => self.harness.test_floor(hook, Floor::Steps(steps)),
            Program::Director => self.harness.test(hook, self.bench.pinned.descriptor(hook)?),
        }
    }

    /// What real-server entry the connections of a family lead to.
    fn direct(&mut self, family: Family, path: Path) -> Result<()> {
        let Entries { index, routed, tunnelled, masqueraded, fullnat } = self.entries[family as usize];
        let mut server = match path {
            Path::Tunnelled => tunnelled,
            Path::Masqueraded | Path::Replied => masqueraded,
            Path::FullNat | Path::FullNatReplied => fullnat,
            _ => routed,
        };
        if path != Path::RoutedElsewhere {
            server.hop.ifindex = INGRESS;
            server.hop.port_ifindex = INGRESS;
        }
        self.servers.set(index, server, 0).context("write the real server's entry")?;
        self.harness.set_server(&server)
    }

    /// Makes connections until so many are in the tables, or begins anew if there are more, or others.
    fn fill(&mut self, family: Family, wanted: Flows) -> Result<()> {
        let present = self.flows[family as usize];
        if present.count > wanted.count || present.path != wanted.path {
            for program in [Program::Director, Program::Floor] {
                self.forget(family, Packets::known(present.path, ACK, present.count), program)?;
            }
        }
        let [syn, ack] = [SYN, ACK].map(|flags| Packets::known(wanted.path, flags, wanted.count));
        let mut laps = vec![(Program::Director, syn), (Program::Director, ack), (Program::Floor, ack)];
        if wanted.server_port().is_some() {
            let reply = ack.replies(wanted.path);
            laps.extend([(Program::Director, reply), (Program::Floor, reply)]);
        }
        // Part by part: what has only begun would be over before the last connection has.
        for first in (0..wanted.count).step_by(PART as usize) {
            let part = first..wanted.count.min(first + PART);
            for (lap, (program, packets)) in laps.iter().enumerate() {
                let (frame, round) = packets.template(family);
                self.test(Hook::Xdp, *program)?;
                self.harness.begin(&Round { flow: first, ..round })?;
                let sent = self.harness.run(Hook::Xdp, &frame, (part.end - part.start) as u32)?.return_value;
                ensure!(sent == 3, "filling the tables ended with verdict {sent} of {program:?} instead of XDP_TX for {packets:?}");
                if lap == 0 && wanted.path == Path::FullNat {
                    self.relocate(family, part.clone().map(|flow| round.client(flow)))?;
                }
            }
        }
        self.flows[family as usize] = wanted;
        Ok(())
    }

    /// Takes the connections out again that began in a sample.
    pub fn forget_new(&mut self, case: Case, program: Program) -> Result<()> {
        self.forget(case.family, Packets::of(case.path, case.flows), program)
    }

    fn forget(&mut self, family: Family, packets: Packets, program: Program) -> Result<()> {
        let (_, round) = packets.template(family);
        let clients = (0..packets.flows).map(|flow| round.client(flow));
        match family {
            Family::Ipv4 => self.remove::<Ipv4>(family, program, clients, &Keys::of_v4(packets.protocol())?),
            Family::Ipv6 => self.remove::<Ipv6>(family, program, clients, &Keys::of_v6(packets.protocol())?),
        }
    }

    /// Gives the FULLNAT connections of some clients the local addresses and ports that replies are made up for.
    fn relocate(&self, family: Family, clients: impl Iterator<Item = (u32, Ports)>) -> Result<()> {
        match family {
            Family::Ipv4 => self.relocate_of::<Ipv4>(family, clients, &Keys::of_v4(TCP)?),
            Family::Ipv6 => self.relocate_of::<Ipv6>(family, clients, &Keys::of_v6(TCP)?),
        }
    }

    fn relocate_of<A>(&self, family: Family, clients: impl Iterator<Item = (u32, Ports)>, keys: &Keys<A>) -> Result<()>
    where
        A: Address,
        ConnectionKey<A>: Pod,
        Reply<A>: Pod,
    {
        let mut connections = self.table::<ConnectionKey<A>, Connection>("CONNECTIONS", family)?;
        let mut replies = self.table::<ConnectionKey<A>, Reply<A>>("REPLIES", family)?;
        // IPv4's were added first.
        let first_of_pool = if family == Family::Ipv4 { 0 } else { POOL_SIZE };
        for (client, ports) in clients {
            let key = keys.request(client, ports);
            let connection = connections.get(&key, 0).context("a connection that was just made")?;
            let number = u32::from_be(client).wrapping_sub(KNOWN);
            let local = Local::new(u16::try_from(first_local(family) + number)?, ports.source());
            if connection.local == local {
                continue;
            }
            let old = POOL.wrapping_add(connection.local.address()).wrapping_sub(first_of_pool).to_be();
            let old = keys.reply(old, FULLNAT, connection.local.port());
            let reply = replies.get(&old, 0).context("the entry for the replies of a connection that was just made")?;
            replies.remove(&old)?;
            connections.insert(key, Connection { local, ..connection }, 0)?;
            replies.insert(keys.reply(local_word(client), FULLNAT, ports.source()), reply, 0)?;
        }
        Ok(())
    }

    fn remove<A>(
        &mut self,
        family: Family,
        program: Program,
        clients: impl Iterator<Item = (u32, Ports)> + Clone,
        keys: &Keys<A>,
    ) -> Result<()>
    where
        A: Address,
        ConnectionKey<A>: Pod,
        Reply<A>: Pod,
    {
        let requests = clients.clone().map(|(client, ports)| keys.request(client, ports));
        let flows = self.flows[family as usize];
        let to = move |client| if flows.path == Path::FullNat { local_word(client) } else { client };
        let reply = |port| move |(client, ports): (u32, Ports)| keys.reply(to(client), port, ports.source());
        let replies = flows.server_port().map(|port| clients.map(reply(port))).into_iter().flatten();
        match program {
            Program::Nothing | Program::Grown | Program::Steps(_) => Ok(()),
            Program::Floor => remove(&mut self.harness.connections::<_, Connection>(family)?, requests.chain(replies)),
            Program::Director => {
                remove(&mut self.table::<_, Connection>("CONNECTIONS", family)?, requests)?;
                remove(&mut self.table::<_, Reply<A>>("REPLIES", family)?, replies)
            }
        }
    }

    fn table<K: Pod, V: Pod>(&self, name: &str, family: Family) -> Result<HashMap<MapData, K, V>> {
        let version = match family {
            Family::Ipv4 => "V4",
            Family::Ipv6 => "V6",
        };
        Ok(HashMap::try_from(Map::HashMap(open(self.bench, &format!("{name}_{version}"))?))?)
    }
}

/// What the keys of connections have in common.
struct Keys<A> {
    protocol: u32,
    vip: A,
    server: A,
    /// The address of a client, or a local one, of which this is the (last) word.
    address: fn(u32) -> A,
}

impl Keys<Ipv4> {
    fn of_v4(protocol: u32) -> Result<Self> {
        let addresses = Addresses::of(Family::Ipv4);
        let (vip, server) = (ipv4(addresses.vip.parse()?), ipv4(addresses.servers[0].parse()?));
        Ok(Self { protocol, vip, server, address: |word| word })
    }
}

impl Keys<Ipv6> {
    fn of_v6(protocol: u32) -> Result<Self> {
        let addresses = Addresses::of(Family::Ipv6);
        let (vip, server) = (ipv6(addresses.vip.parse()?), ipv6(addresses.servers[0].parse()?));
        Ok(Self { protocol, vip, server, address: client_v6 })
    }
}

impl<A: Copy> Keys<A> {
    fn request(&self, client: u32, ports: Ports) -> ConnectionKey<A> {
        ConnectionKey { client: (self.address)(client), vip: self.vip, ports, protocol: self.protocol }
    }

    /// The key of replies to an address and a port in network order.
    fn reply(&self, to: u32, server_port: u16, port: u16) -> ConnectionKey<A> {
        let ports = Ports::new(server_port.to_be(), port);
        ConnectionKey { client: self.server, vip: (self.address)(to), ports, protocol: self.protocol }
    }
}

/// The IPv6 address of a client, by its last word.
fn client_v6(word: u32) -> Ipv6 {
    let [a, b, c, _] = ipv6(Addresses::of(Family::Ipv6).client.parse().expect("the bench's addresses are well-formed"));
    [a, b, c, word]
}

/// The local address of a known client, by their (last) words in network order.
const fn local_word(client: u32) -> u32 {
    u32::from_be(client).wrapping_sub(KNOWN).wrapping_add(LOCAL).to_be()
}

/// The index of a family's first local address that is in no pool.
const fn first_local(family: Family) -> u32 {
    FIRST_LOCAL + family as u32 * LOCALS
}

/// A local address, by its (last) word in host order.
fn local_of(family: Family, word: u32) -> Result<IpAddr> {
    let client: IpAddr = Addresses::of(family).client.parse()?;
    Ok(match client {
        IpAddr::V4(_) => IpAddr::V4(word.into()),
        IpAddr::V6(client) => IpAddr::V6((client.to_bits() >> 32 << 32 | u128::from(word)).into()),
    })
}

pub(super) const TCP: u32 = protocol::TCP as u32;
const UDP: u32 = protocol::UDP as u32;

pub(super) fn open(bench: &Bench, name: &str) -> Result<MapData> {
    let path = bench.bpfvs.pins().join("maps").join(name);
    MapData::from_pin(&path).with_context(|| format!("open the pinned map {}", path.display()))
}

/// The template of a case's packets, and what the wrapper makes of it.
pub fn template(family: Family, path: Path, flows: u64) -> (Vec<u8>, Round) {
    Packets::of(path, flows).template(family)
}

/// The firewall's mark on a case's packets; 0 for none.
pub const fn mark(path: Path) -> u32 {
    if matches!(path, Path::ByMark) { MARK } else { 0 }
}

/// The template of SYNs of clients that are in no table, to `services` ports of the IPv4 address in a row.
pub fn unknown_clients(port: u16, services: u32) -> (Vec<u8>, Round) {
    many(Packets { port, ..Packets::request(SYN, UNKNOWN, u64::from(NEW)) }, services)
}

/// The same of segments of so many clients that are in the table.
pub fn known_clients(flags: u8, port: u16, services: u32, flows: u64) -> (Vec<u8>, Round) {
    many(Packets { port, ..Packets::request(flags, KNOWN, flows) }, services)
}

fn many(packets: Packets, services: u32) -> (Vec<u8>, Round) {
    let (frame, round) = packets.template(Family::Ipv4);
    (frame, Round { services, ..round })
}

/// Packets of a round: in frames of 64 bytes for IPv4, 84 for IPv6, but for ICMP errors.
#[derive(Clone, Copy, Debug)]
struct Packets {
    /// TCP's; without them it is UDP.
    flags: Option<u8>,
    first_client: u32,
    flows: u64,
    /// The virtual port.
    port: u16,
    /// They go to an address that nobody balances.
    are_foreign: bool,
    /// They come from the real server, with this method.
    replies: Option<Path>,
    /// They are ICMP errors about what goes back from the virtual address.
    are_errors: bool,
}

impl Packets {
    const fn request(flags: u8, first_client: u32, flows: u64) -> Self {
        Self { flags: Some(flags), first_client, flows, port: ROUTED, are_foreign: false, replies: None, are_errors: false }
    }

    /// Of connections in the table, from the client.
    const fn known(connections: Path, flags: u8, flows: u64) -> Self {
        let known = Self::request(flags, KNOWN, flows);
        if matches!(connections, Path::Datagram) { Self { flags: None, port: DATAGRAM, ..known } } else { known }
    }

    /// A case's.
    fn of(path: Path, flows: u64) -> Self {
        let known = Self::known(path.connections(), ACK, flows);
        let to = |port| Self { port, ..Self::request(SYN, UNKNOWN, u64::from(NEW)) };
        match path {
            Path::New | Path::Full | Path::Flood => to(ROUTED),
            Path::Persistent => to(PERSISTENT),
            Path::ByRule => to(BY_RULE),
            Path::ByMark => to(BY_MARK),
            Path::NotOurs => Self { are_foreign: true, ..known },
            Path::Error => Self { are_errors: true, ..known },
            Path::Replied | Path::FullNatReplied => known.replies(path.connections()),
            Path::Routed | Path::RoutedElsewhere | Path::Datagram | Path::Tunnelled | Path::Masqueraded | Path::FullNat => known,
        }
    }

    /// The replies to these packets.
    const fn replies(self, path: Path) -> Self {
        Self { replies: Some(path), ..self }
    }

    const fn protocol(self) -> u32 {
        if self.flags.is_some() { TCP } else { UDP }
    }

    fn template(self, family: Family) -> (Vec<u8>, Round) {
        let addresses = Addresses::of(family);
        let socket = |address: &str, port| SocketAddr::new(address.parse().expect("the bench's addresses are well-formed"), port);
        let client = socket(addresses.client, 1);
        let (source, destination, port) = if let Some(path) = self.replies {
            let port = if path == Path::FullNat { FULLNAT } else { MASQUERADED };
            (socket(addresses.servers[0], port), client, port)
        } else {
            (client, socket(if self.are_foreign { addresses.foreign } else { addresses.vip }, self.port), self.port)
        };
        let frame = match self.flags {
            Some(flags) => Frame { payload: vec![0; 10], ..Frame::tcp(source, destination, flags) },
            None => Frame { payload: vec![0; 22], ..Frame::udp(source, destination) },
        };
        let frame = if self.are_errors {
            // Host unreachable; of IPv6, no route to the destination.
            let (kind, code) = if family == Family::Ipv4 { (3, 1) } else { (1, 0) };
            let quoted = Frame { source: destination, destination: source, ..frame }.packet();
            let router: SocketAddr = socket(addresses.client, 0);
            Frame::error(router.ip(), destination.ip(), kind, code, 0, &quoted)
        } else {
            frame
        };
        let frame = frame.build();
        let role = match () {
            () if self.are_errors => Role::Quoted,
            () if self.replies.is_some() => Role::Destination,
            () => Role::Source,
        };
        let round = Round {
            is_v6: u16::from(family == Family::Ipv6),
            role: role as u16,
            flow: 0,
            flows: self.flows,
            first_client: if self.replies == Some(Path::FullNat) { LOCAL } else { self.first_client },
            port: port.to_be(),
            ..round(&frame)
        };
        (frame, round)
    }
}

/// A round with the headers of a frame, which has at least those of TCP over IPv4.
pub fn round(frame: &[u8]) -> Round {
    let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|byte| frame.get(at + byte).copied().unwrap_or(0)));
    Round {
        length: frame.len() as u32,
        start: u16::from_ne_bytes([frame[0], frame[1]]),
        headers: std::array::from_fn(|at| word(2 + 4 * at)),
        more_headers: std::array::from_fn(|at| word(54 + 4 * at)),
        ..Round::default()
    }
}
