//! The loaded programs, run by the kernel on one frame (`BPF_PROG_TEST_RUN`): what comes out, and what was counted.
//!
//! Everything is opened from the pins, as any other program on the machine could. A run takes place inside the director's
//! namespace; the frame comes in by its `lo`, interface 1, and nothing is really sent: a verdict of "redirect" is as far as
//! it goes.
//!
//! ```no_run
//! use bpfvs_tests::{bpfvs::Bpfvs, netns::Namespace, test_run::{Hook, Pinned}};
//!
//! let director = Namespace::new("director")?;
//! let bpfvs = Bpfvs::start(&director, &[])?;
//! let pinned = Pinned::open(bpfvs.pins())?;
//! let result = director.enter(|| pinned.run(Hook::Xdp, &[0; 64]))?;
//! println!("{:?}: {:02x?}", result.verdict, result.frame);
//! # anyhow::Ok(())
//! ```
//!
//! What this does not show: that the frame arrives. The namespace tests show it.

use std::{
    borrow::BorrowMut,
    fs, io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use aya::{
    Pod, TestRun, TestRunOptions,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray},
    programs::{ProgramFd, SchedClassifier, Xdp},
};
use aya_obj::programs::XdpAttachType;
use lb_common::{
    config::Config,
    connection::{Connection, ConnectionKey, FragmentKey},
    family::{Address, Ipv4, Ipv6, ipv4, ipv6},
    flood::word,
    local::Local,
    locality::{Destination, DestinationKey},
    packet::transport::Ports,
    reason::Reason,
    reply::Reply,
    schedule::{Pair, Pointer},
    server::{Counters, Server, Status},
    service::{Service, ServiceKey},
    statistics::Statistics,
    template::{Template, TemplateKey},
};

/// Bytes of the kernel's `struct __sk_buff`, and where its mark stands.
const SK_BUFF: usize = 192;
const SK_BUFF_MARK: usize = 8;

/// A tc program's context with a firewall mark.
pub fn marked(mark: u32) -> [u8; SK_BUFF] {
    let mut context = [0; SK_BUFF];
    context[SK_BUFF_MARK..SK_BUFF_MARK + 4].copy_from_slice(&mark.to_ne_bytes());
    context
}

/// Where the datapath takes frames.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "the names are the kernel's own")]
pub enum Hook {
    Xdp,
    Tc,
}

impl Hook {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Xdp, Self::Tc];
}

/// What a program decided, in one language for both hooks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// The kernel's own stack has it.
    Pass,
    /// It is dropped.
    Drop,
    /// It leaves by the interface that it came in by, or by another: XDP tells the two apart, tc does not.
    Send,
    /// Something that the datapath never answers.
    Other(u32),
}

impl Verdict {
    fn new(hook: Hook, value: u32) -> Self {
        match (hook, value) {
            (Hook::Xdp, 2) | (Hook::Tc, 0 | u32::MAX) => Self::Pass,
            (Hook::Xdp, 1) | (Hook::Tc, 2) => Self::Drop,
            (Hook::Xdp, 3 | 4) | (Hook::Tc, 7) => Self::Send,
            (_, other) => Self::Other(other),
        }
    }
}

/// What a run gave.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Run {
    /// The verdict.
    pub verdict: Verdict,
    /// The frame afterwards.
    pub frame: Vec<u8>,
}

/// Programs and maps of an instance, opened from its pins.
#[derive(Debug)]
pub struct Pinned {
    /// Only if an interface has it.
    xdp: Option<Xdp>,
    tc: SchedClassifier,
    maps: PathBuf,
}

impl Pinned {
    /// Opens the programs; maps are opened when they are asked for.
    pub fn open(pins: &Path) -> Result<Self> {
        let program = |name: &str| pins.join("programs").join(name);
        let path = program("xdp_director");
        let xdp = path.exists().then(|| Xdp::from_pin(&path, XdpAttachType::Interface));
        let xdp = xdp.transpose().context("open the pinned XDP program")?;
        let tc = SchedClassifier::from_pin(program("tc_director")).context("open the pinned tc program")?;
        Ok(Self { xdp, tc, maps: pins.join("maps") })
    }

    fn xdp(&self) -> Result<&Xdp> {
        self.xdp.as_ref().context("the XDP program was not loaded, because no interface wanted it: begin with `--hook xdp`")
    }

    /// A program, to be called by another.
    pub fn descriptor(&self, hook: Hook) -> Result<&ProgramFd> {
        let descriptor = match hook {
            Hook::Xdp => self.xdp()?.fd(),
            Hook::Tc => self.tc.fd(),
        };
        descriptor.with_context(|| format!("the {hook:?} program is not loaded"))
    }

    /// Runs a program on a frame, in the namespace of the calling thread.
    pub fn run(&self, hook: Hook, frame: &[u8]) -> Result<Run> {
        let mut buffer = vec![0; 4096];
        let (verdict, length) = self.run_into(hook, frame, &mut buffer)?;
        buffer.truncate(length);
        Ok(Run { verdict, frame: buffer })
    }

    /// As [`run`](Self::run), into a buffer of the caller: for millions of frames.
    pub fn run_into(&self, hook: Hook, frame: &[u8], buffer: &mut [u8]) -> Result<(Verdict, usize)> {
        let options = TestRunOptions { data_in: Some(frame), data_out: Some(buffer), ..TestRunOptions::new() };
        let result = match hook {
            Hook::Xdp => self.xdp()?.test_run(options),
            Hook::Tc => self.tc.test_run(options),
        };
        let result = result.with_context(|| format!("run the {hook:?} program on {} bytes", frame.len()))?;
        Ok((Verdict::new(hook, result.return_value), result.data_size_out as usize))
    }

    /// Runs the tc program on a frame with a firewall mark, in the namespace of the calling thread.
    pub fn run_marked(&self, frame: &[u8], mark: u32) -> Result<Verdict> {
        let options = TestRunOptions { data_in: Some(frame), ctx_in: Some(&marked(mark)), ..TestRunOptions::new() };
        let result = self.tc.test_run(options).with_context(|| format!("run the tc program on a frame marked {mark}"))?;
        Ok(Verdict::new(Hook::Tc, result.return_value))
    }

    fn map<T: TryFrom<Map>>(&self, name: &str, kind: fn(MapData) -> Map) -> Result<T>
    where
        T::Error: Into<anyhow::Error>,
    {
        let path = self.maps.join(name);
        let data = MapData::from_pin(&path).with_context(|| format!("open the pinned map {}", path.display()))?;
        T::try_from(kind(data)).map_err(Into::into).with_context(|| format!("the pinned map {name} is of another kind"))
    }

    /// Bytes of memory that a map takes, by the kernel's word.
    pub fn memory(&self, map: &str) -> Result<u64> {
        let data = MapData::from_pin(self.maps.join(map)).with_context(|| format!("open the pinned map {map}"))?;
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", data.fd().as_fd().as_raw_fd()))?;
        let bytes = text.lines().find_map(|line| line.strip_prefix("memlock:")).context("the kernel says what a map takes")?;
        Ok(bytes.trim().parse()?)
    }

    /// All reason counters, over all CPUs, in the order of [`Reason::ALL`].
    pub fn reasons(&self) -> Result<Vec<u64>> {
        let map: PerCpuArray<MapData, u64> = self.map("REASONS", Map::PerCpuArray)?;
        (0..Reason::ALL.len()).map(|index| Ok(map.get(&(index as u32), 0)?.iter().sum())).collect()
    }

    /// What went to the real server with this index, over all CPUs.
    pub fn statistics(&self, server: u32) -> Result<Statistics> {
        let map: PerCpuArray<MapData, Statistics> = self.map("STATISTICS", Map::PerCpuArray)?;
        let mut total = Statistics::default();
        for cpu in map.get(&server, 0)?.iter() {
            total.connections += cpu.connections;
            total.packets_in += cpu.packets_in;
            total.bytes_in += cpu.bytes_in;
            total.packets_out += cpu.packets_out;
            total.bytes_out += cpu.bytes_out;
        }
        Ok(total)
    }

    /// How many real servers packets can be sent to. For many real servers quicker than the API.
    pub fn ready_servers(&self) -> Result<usize> {
        let map: Array<MapData, Server> = self.map("SERVERS", Map::Array)?;
        let ready = map.iter().filter(|server| server.as_ref().is_ok_and(|server| server.status == Status::Ready as u8));
        Ok(ready.count())
    }

    /// Connections of the real server with this index.
    pub fn counters(&self, server: u32) -> Result<Counters> {
        let map: Array<MapData, u64> = self.map("COUNTERS", Map::Array)?;
        Ok(Counters::from_word(map.get(&server, 0)?))
    }

    /// Says that the real server with this index has no connections.
    pub fn forget_counters(&self, server: u32) -> Result<()> {
        let mut map: Array<MapData, u64> = self.map("COUNTERS", Map::Array)?;
        Ok(map.set(server, 0, 0)?)
    }

    /// Whether the daemon sleeps, and the forecast of the service with this index is for the connections from now on.
    pub fn is_at_rest(&self, service: u32) -> Result<bool> {
        let sleeping: Array<MapData, u64> = self.map("SLEEPING", Map::Array)?;
        let cursors: Array<MapData, u64> = self.map("CURSORS", Map::Array)?;
        let schedules: Array<MapData, Pointer> = self.map("SCHEDULES", Map::Array)?;
        let runs: Array<MapData, Pair> = self.map("RUNS", Map::Array)?;
        let run = schedules.get(&service, 0)?;
        let [base, _] = runs.get(&run.offset, 0)?;
        Ok(sleeping.get(&0, 0)? == 1 && cursors.get(&service, 0)? as u32 == base)
    }

    /// The TCP connection of an IPv4 client to a virtual address, if there is one.
    pub fn connection_v4(&self, client: SocketAddr, vip: SocketAddr) -> Result<Option<Connection>> {
        let (IpAddr::V4(client_address), IpAddr::V4(vip_address)) = (client.ip(), vip.ip()) else { return Ok(None) };
        let ports = Ports::new(client.port().to_be(), vip.port().to_be());
        let key = ConnectionKey { client: ipv4(client_address), vip: ipv4(vip_address), ports, protocol: 6 };
        let map: HashMap<MapData, ConnectionKey<Ipv4>, Connection> = self.map("CONNECTIONS_V4", Map::HashMap)?;
        match map.get(&key, 0) {
            Ok(connection) => Ok(Some(connection)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("look a connection up"),
        }
    }

    /// Who has a client's TCP connection to this port of any address: the index of the real server.
    pub fn server_of(&self, client: SocketAddr, port: u16) -> Result<Option<u32>> {
        fn find<A: Address>(connections: &[(ConnectionKey<A>, Connection)], client: A, ports: Ports) -> Option<u32> {
            let is = |key: &ConnectionKey<A>| key.client == client && key.ports == ports && key.protocol == 6;
            connections.iter().find(|(key, _)| is(key)).map(|(_, connection)| connection.server)
        }
        let ports = Ports::new(client.port().to_be(), port.to_be());
        Ok(match client.ip() {
            IpAddr::V4(address) => find(&self.connections_v4()?, ipv4(address), ports),
            IpAddr::V6(address) => find(&self.connections_v6()?, ipv6(address), ports),
        })
    }

    /// The local address and port of a client's connection to this port of any address, in whatever protocol it is.
    pub fn local_of(&self, client: SocketAddr, port: u16) -> Result<Option<Local>> {
        fn find<A: Address>(connections: &[(ConnectionKey<A>, Connection)], client: A, ports: Ports) -> Option<Local> {
            let is = |key: &ConnectionKey<A>| key.client == client && key.ports == ports;
            connections.iter().find(|(key, _)| is(key)).map(|(_, connection)| connection.local)
        }
        let ports = Ports::new(client.port().to_be(), port.to_be());
        Ok(match client.ip() {
            IpAddr::V4(address) => find(&self.connections_v4()?, ipv4(address), ports),
            IpAddr::V6(address) => find(&self.connections_v6()?, ipv6(address), ports),
        })
    }

    /// How many replies are expected, of both families.
    pub fn replies(&self) -> Result<usize> {
        let ipv4: HashMap<MapData, ConnectionKey<Ipv4>, Reply<Ipv4>> = self.map("REPLIES_V4", Map::HashMap)?;
        let ipv6: HashMap<MapData, ConnectionKey<Ipv6>, Reply<Ipv6>> = self.map("REPLIES_V6", Map::HashMap)?;
        Ok(ipv4.keys().count() + ipv6.keys().count())
    }

    /// Lets the datapath take a TCP service's address and port for one with many addresses, as a firewall mark can be. There must
    /// be some other service at each of the addresses, or their packets never get so far. What the daemon does to the service
    /// later is not done to the others.
    pub fn add_destinations(&self, service: SocketAddr, destinations: &[IpAddr]) -> Result<()> {
        let mut ipv4_services = self.map("SERVICES_V4", Map::HashMap)?;
        let mut ipv6_services = self.map("SERVICES_V6", Map::HashMap)?;
        for destination in destinations {
            match (service.ip(), destination) {
                (IpAddr::V4(vip), IpAddr::V4(other)) => {
                    copy_service(&mut ipv4_services, ipv4(vip), ipv4(*other), service.port())?;
                }
                (IpAddr::V6(vip), IpAddr::V6(other)) => {
                    copy_service(&mut ipv6_services, ipv6(vip), ipv6(*other), service.port())?;
                }
                _ => bail!("{service} and {destination} are of two families"),
            }
        }
        Ok(())
    }

    /// Changes `lblcr_expiration`, until the daemon writes the settings anew.
    pub fn set_lblcr_expiration(&self, seconds: u32) -> Result<()> {
        let mut map: Array<MapData, Config> = self.map("CONFIG", Map::Array)?;
        let config = map.get(&0, 0)?;
        map.set(0, Config { lblcr_expiration: seconds, ..config }, 0).context("change the settings in the pinned map")
    }

    /// How many destinations are remembered, of both families.
    pub fn destinations(&self) -> Result<usize> {
        let ipv4: HashMap<MapData, DestinationKey<Ipv4>, Destination> = self.map("DESTINATIONS_V4", Map::LruHashMap)?;
        let ipv6: HashMap<MapData, DestinationKey<Ipv6>, Destination> = self.map("DESTINATIONS_V6", Map::LruHashMap)?;
        Ok(ipv4.keys().count() + ipv6.keys().count())
    }

    /// Sets bits of the settings ([`lb_common::config::flags`]), until the daemon writes the settings anew.
    pub fn set_flags(&self, flags: u32) -> Result<()> {
        let mut map: Array<MapData, Config> = self.map("CONFIG", Map::Array)?;
        let config = map.get(&0, 0)?;
        map.set(0, Config { flags, ..config }, 0).context("change the settings in the pinned map")
    }

    /// How many picks the first service has dealt.
    pub fn first_cursor(&self) -> Result<u32> {
        let map: Array<MapData, u64> = self.map("CURSORS", Map::Array)?;
        Ok(map.get(&0, 0)? as u32)
    }

    /// The IPv4 templates.
    pub fn templates_v4(&self) -> Result<Vec<(TemplateKey<Ipv4>, Template)>> {
        entries(&self.map("TEMPLATES_V4", Map::HashMap)?)
    }

    /// The IPv6 templates.
    pub fn templates_v6(&self) -> Result<Vec<(TemplateKey<Ipv6>, Template)>> {
        entries(&self.map("TEMPLATES_V6", Map::HashMap)?)
    }

    /// The IPv4 connections.
    pub fn connections_v4(&self) -> Result<Vec<(ConnectionKey<Ipv4>, Connection)>> {
        entries(&self.map("CONNECTIONS_V4", Map::HashMap)?)
    }

    /// The IPv6 connections.
    pub fn connections_v6(&self) -> Result<Vec<(ConnectionKey<Ipv6>, Connection)>> {
        entries(&self.map("CONNECTIONS_V6", Map::HashMap)?)
    }

    /// Takes all connections out of the tables, so that recordings that use the same ports can follow each other. The
    /// counters of real servers do not notice until the next sweep.
    pub fn forget_connections(&self) -> Result<()> {
        clear::<ConnectionKey<Ipv4>, Connection>(&mut self.map("CONNECTIONS_V4", Map::HashMap)?)?;
        clear::<ConnectionKey<Ipv6>, Connection>(&mut self.map("CONNECTIONS_V6", Map::HashMap)?)?;
        clear::<ConnectionKey<Ipv4>, Reply<Ipv4>>(&mut self.map("REPLIES_V4", Map::HashMap)?)?;
        clear::<ConnectionKey<Ipv6>, Reply<Ipv6>>(&mut self.map("REPLIES_V6", Map::HashMap)?)
    }

    /// Takes the connections out alone, and leaves the entries for their replies: as nothing should, but two CPUs at once may.
    pub fn lose_connections(&self) -> Result<()> {
        clear::<ConnectionKey<Ipv4>, Connection>(&mut self.map("CONNECTIONS_V4", Map::HashMap)?)
    }

    /// Says that no connection is half-open, and that none ever found the table without room.
    pub fn forget_flood(&self) -> Result<()> {
        let mut map: Array<MapData, u64> = self.map("FLOOD", Map::Array)?;
        map.set(word::HALF_OPEN, 0, 0)?;
        Ok(map.set(word::LAST, 0, 0)?)
    }

    /// Forgets which packets' first fragments were seen.
    pub fn forget_fragments(&self) -> Result<()> {
        clear::<FragmentKey<Ipv4>, u32>(&mut self.map("FRAGMENTS_V4", Map::LruHashMap)?)?;
        clear::<FragmentKey<Ipv6>, u32>(&mut self.map("FRAGMENTS_V6", Map::LruHashMap)?)
    }

    /// Lets the datapath send as many ICMP errors as there are reasons to.
    pub fn lift_answer_limit(&self) -> Result<()> {
        let mut map: Array<MapData, Config> = self.map("CONFIG", Map::Array)?;
        let config = map.get(&0, 0)?;
        map.set(0, Config { answers_per_second: 0, ..config }, 0).context("change the settings in the pinned map")
    }
}

fn entries<K: Pod, V: Pod>(map: &HashMap<MapData, K, V>) -> Result<Vec<(K, V)>> {
    map.iter().map(|entry| entry.context("read an entry of a map")).collect()
}

/// Makes a service known at another address, too.
fn copy_service<A>(map: &mut HashMap<MapData, ServiceKey<A>, Service>, vip: A, other: A, port: u16) -> Result<()>
where
    ServiceKey<A>: Pod,
{
    let key = |vip| ServiceKey { vip, port: port.to_be(), protocol: 6, zero: 0 };
    let service = map.get(&key(vip), 0).context("look the service up")?;
    map.insert(key(other), service, 0).context("add a destination to the service")
}

fn clear<K: Pod, V: Pod>(map: &mut HashMap<MapData, K, V>) -> Result<()> {
    let keys: Vec<K> = map.keys().collect::<Result<_, _>>()?;
    remove(map, keys)
}

/// Deletes keys, of which some may be gone by then: the sweep is at work, too.
pub(crate) fn remove<T: BorrowMut<MapData>, K: Pod, V: Pod>(
    map: &mut HashMap<T, K, V>,
    keys: impl IntoIterator<Item = K>,
) -> Result<()> {
    for key in keys {
        match map.remove(&key) {
            Err(error) if !is_missing(&error) => return Err(error).context("take a connection out of its table"),
            _ => {}
        }
    }
    Ok(())
}

/// Whether it is about a key that is not there: aya has a word for it, but a deletion hands on the kernel's.
fn is_missing(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(error) => error.io_error.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}
