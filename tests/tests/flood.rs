//! Flood mode: what becomes of new connections when there are too many that have only begun, and of all others.
//!
//! The first half runs single frames through the loaded programs. The second half lets clients talk to real servers while a
//! flood runs through the same programs: the kernel calls them in a loop, with another client each time, faster than any
//! sender on this machine could. What the programs decide is not sent then, so the real servers have no part in the flood.
//!
//! `BPFVS_FLOOD_SECONDS` makes the floods longer than the moment that they last by default.

use std::{
    collections::HashMap,
    env,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    balanced::Balanced,
    bench::{Addresses, Bench, SERVER_MACS, bracketed, socket},
    bpfvs::{Bpfvs, http},
    frame::{ACK, DATA, FIN, Frame, INIT, RST, SYN},
    lab::{Family, Lab, Layout},
    needs, needs_bpfvs,
    netns::Namespace,
    programs::{UdpServer, ask_udp},
    speed::{harness::Harness, stage::round},
    test_run::{Hook, Pinned, Verdict},
    wait,
};
use lb_common::{connection::Connection, floor::Round, tcp::State};

/// The chunk of SCTP that a client proves itself with.
const COOKIE_ECHO: u8 = 10;

/// A bench with a service on port 80 of both families.
fn bench(arguments: &[&str], service: &str, server: &str) -> Result<Bench> {
    let bench = Bench::new(arguments)?;
    for protocol in ["t", "u", "-sctp-service"] {
        for family in Family::ALL {
            let addresses = Addresses::of(family);
            let vip = bracketed(addresses.vip);
            bench.bpfvs.ipvsadm(&format!("-A -{protocol} {vip}:80 {service}"))?;
            for address in addresses.servers {
                bench.bpfvs.ipvsadm(&format!("-a -{protocol} {vip}:80 -r {}:80 {server}", bracketed(address)))?;
            }
        }
    }
    bench.bpfvs.wait_for_servers()?;
    Ok(bench)
}

/// One of its hooks and families.
struct World<'a> {
    bench: &'a Bench,
    hook: Hook,
    vip: SocketAddr,
    client: IpAddr,
}

impl<'a> World<'a> {
    fn all(bench: &'a Bench) -> impl Iterator<Item = Self> {
        let worlds = Hook::ALL.into_iter().flat_map(|hook| Family::ALL.map(|family| (hook, family)));
        worlds.map(move |(hook, family)| {
            let addresses = Addresses::of(family);
            Self { bench, hook, vip: socket(addresses.vip, 80), client: socket(addresses.client, 1).ip() }
        })
    }

    /// Runs a frame that must go to a real server, and says to which.
    fn sent(&self, frame: &Frame) -> Result<usize> {
        let run = self.bench.director.enter(|| self.bench.pinned.run(self.hook, &frame.build()))?;
        ensure!(run.verdict == Verdict::Send, "{:?}: {:?} for {frame:?}", self.hook, run.verdict);
        SERVER_MACS.iter().position(|mac| run.frame[..6] == *mac).context("it goes to one of the servers")
    }

    fn passed(&self, frame: &Frame) -> Result<()> {
        let run = self.bench.director.enter(|| self.bench.pinned.run(self.hook, &frame.build()))?;
        ensure!(run.verdict == Verdict::Pass, "{:?}: {:?} for {frame:?}", self.hook, run.verdict);
        Ok(())
    }

    fn tcp(&self, port: u16, flags: u8) -> Frame {
        Frame::tcp(SocketAddr::new(self.client, port), self.vip, flags)
    }

    /// The connections of clients' ports.
    fn connections(&self) -> Result<HashMap<u16, Connection>> {
        let port = |ports: lb_common::packet::transport::Ports| u16::from_be(ports.source());
        Ok(if self.client.is_ipv4() {
            self.bench.pinned.connections_v4()?.iter().map(|(key, connection)| (port(key.ports), *connection)).collect()
        } else {
            self.bench.pinned.connections_v6()?.iter().map(|(key, connection)| (port(key.ports), *connection)).collect()
        })
    }

    /// Begins anew: without connections, and with flood mode off.
    fn forget(&self) -> Result<()> {
        self.bench.pinned.forget_connections()?;
        self.bench.pinned.forget_flood()
    }
}

/// Client ports beyond the limit of half-open connections.
const BEYOND: std::ops::Range<u16> = 1100..1200;

#[test]
fn beyond_the_limit_the_flow_itself_chooses() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = bench(&["--max-connections", "4096", "--max-half-open", "8"], "-s rr", "-g")?;
    for world in World::all(&bench) {
        world.forget()?;
        // One that is established stays where it is, whatever comes.
        let old = world.sent(&world.tcp(999, SYN))?;
        world.sent(&world.tcp(999, ACK))?;
        for port in 1000..1008 {
            world.sent(&world.tcp(port, SYN))?;
        }
        ensure!(world.connections()?.len() == 9, "up to the limit each has an entry");
        let stateless = bench.bpfvs.reason("stateless")?;
        let places: Vec<usize> = BEYOND.map(|port| world.sent(&world.tcp(port, SYN))).collect::<Result<_>>()?;
        ensure!(world.connections()?.len() == 9, "beyond it none has");
        ensure!(bench.bpfvs.reason("stateless")? == stateless + 100, "and each is counted");
        ensure!((30..70).contains(&places.iter().sum::<usize>()), "both servers have a share: {places:?}");
        for (port, place) in BEYOND.zip(&places) {
            ensure!(world.sent(&world.tcp(port, SYN))? == *place, "a repetition goes where the first went");
        }
        for (port, place) in BEYOND.zip(&places).take(4) {
            for flags in [RST, FIN | ACK, ACK] {
                ensure!(world.sent(&world.tcp(port, flags))? == *place, "what follows goes there, too");
            }
            let entry = *world.connections()?.get(&port).context("the first ACK makes the entry")?;
            ensure!((entry.state, entry.half_open) == (State::SynAck as u8, 1), "{entry:?}");
            ensure!(world.sent(&world.tcp(port, ACK))? == *place, "it leads to the same server");
            let entry = *world.connections()?.get(&port).context("it stays")?;
            ensure!((entry.state, entry.half_open) == (State::Established as u8, 0), "{entry:?}");
        }
        // A flood of ACKs has its limit, too, and goes on without entries.
        let acks: Vec<usize> = (2000..2100).map(|port| world.sent(&world.tcp(port, ACK))).collect::<Result<_>>()?;
        ensure!(world.connections()?.len() == 9 + 4 + 8, "there are {} connections", world.connections()?.len());
        ensure!(world.sent(&world.tcp(2099, ACK | 8))? == acks[99], "they stay with their server");
        ensure!(world.sent(&world.tcp(999, ACK))? == old, "the old connection has not moved");
        ensure!(world.connections()?[&999].state == State::Established as u8, "nor changed");
        // The other protocols that a flood may speak.
        let [udp, sctp] = [|client, vip, _| Frame::udp(client, vip), Frame::sctp];
        let client = SocketAddr::new(world.client, 3000);
        let before = world.connections()?.len();
        let places = [world.sent(&udp(client, world.vip, 0))?, world.sent(&udp(client, world.vip, 0))?];
        ensure!(places[0] == places[1], "datagrams of one flow go to one server");
        let places = [INIT, COOKIE_ECHO, DATA].map(|chunk| world.sent(&sctp(client, world.vip, chunk)));
        let places = places.into_iter().collect::<Result<Vec<_>>>()?;
        ensure!(places.iter().all(|place| *place == places[0]), "chunks of one association go to one server: {places:?}");
        ensure!(world.connections()?.len() == before, "none of them found room");
    }
    Ok(())
}

#[test]
fn a_second_packet_proves_a_client_of_udp() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = bench(&["--max-connections", "4096", "--max-half-open", "4"], "-s rr", "-g")?;
    for world in World::all(&bench) {
        world.forget()?;
        let datagram = |port| Frame::udp(SocketAddr::new(world.client, port), world.vip);
        for port in 1000..1020 {
            for _ in 0..3 {
                world.sent(&datagram(port))?;
            }
        }
        ensure!(world.connections()?.len() == 20, "clients that go on take no room from others");
        ensure!(!flood(&bench.bpfvs)?.on, "that is no flood");
        for port in 1020..1040 {
            world.sent(&datagram(port))?;
        }
        ensure!(world.connections()?.len() == 24, "{} connections", world.connections()?.len());
        ensure!(flood(&bench.bpfvs)?.on, "that is one");
    }
    Ok(())
}

#[test]
fn when_the_table_is_full_of_established_connections() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    for memory in ["at-start", "on-demand"] {
        let bench = bench(&["--max-connections", "64", "--max-half-open", "32", "--memory", memory], "-s rr", "-g")?;
        World::all(&bench).try_for_each(|world| a_full_table(&world))?;
    }
    Ok(())
}

fn a_full_table(world: &World<'_>) -> Result<()> {
    world.forget()?;
    let (mut established, mut stateless) = (Vec::new(), Vec::new());
    for port in 1000..1500 {
        let place = world.sent(&world.tcp(port, SYN))?;
        ensure!(world.sent(&world.tcp(port, ACK))? == place, "port {port} goes to one server");
        let entered = world.connections()?.contains_key(&port);
        if entered { &mut established } else { &mut stateless }.push((port, place));
    }
    ensure!(established.len() >= 60 && stateless.len() > 400, "{} and {}", established.len(), stateless.len());
    for (port, place) in stateless.iter().chain(&established) {
        for flags in [ACK, ACK | 8, FIN | ACK] {
            ensure!(world.sent(&world.tcp(*port, flags))? == *place, "port {port} stays with its server");
        }
    }
    ensure!(flood(&world.bench.bpfvs)?.on && world.bench.bpfvs.reason("table-full")? == 0, "nothing was dropped for it");
    Ok(())
}

#[test]
fn what_needs_an_entry_gets_one_while_there_is_room() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = bench(&["--max-connections", "64", "--max-half-open", "8"], "-s rr", "-m")?;
    for world in World::all(&bench) {
        world.forget()?;
        for port in 1000..1040 {
            world.sent(&world.tcp(port, SYN))?;
        }
        ensure!(world.connections()?.len() == 40, "each has an entry, beyond the limit, too");
        world.passed(&world.tcp(2000, ACK))?;
        let refused = (1040..1200).filter(|port| world.sent(&world.tcp(*port, SYN)).is_err()).count();
        ensure!(refused > 80 && bench.bpfvs.reason("table-full")? > 80, "only a full table refuses them: {refused}");
        ensure!(bench.bpfvs.reason("stateless")? == 0, "their replies would be nothing without entries");
    }
    Ok(())
}

#[test]
fn persistent_clients_stay_together() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = bench(&["--max-connections", "4096", "--max-half-open", "8"], "-s rr -p 300", "-g")?;
    for world in World::all(&bench) {
        world.forget()?;
        let known = world.sent(&world.tcp(900, SYN))?;
        let templates = || Ok::<_, anyhow::Error>(bench.pinned.templates_v4()?.len() + bench.pinned.templates_v6()?.len());
        let before = templates()?;
        for port in 1000..1100 {
            ensure!(world.sent(&world.tcp(port, SYN))? == known, "the template decides");
        }
        // Clients without one.
        let mut places = Vec::new();
        for host in 1..=16 {
            let client = match world.client {
                IpAddr::V4(address) => IpAddr::V4((address.to_bits() ^ host << 8).into()),
                IpAddr::V6(address) => IpAddr::V6((address.to_bits() ^ u128::from(host) << 32).into()),
            };
            let sent = |port, flags| world.sent(&Frame::tcp(SocketAddr::new(client, port), world.vip, flags));
            places.push(sent(1, SYN)?);
            for port in 1..20 {
                ensure!(sent(port, SYN)? == places[places.len() - 1], "a client has one server");
                ensure!(sent(port, ACK)? == places[places.len() - 1], "for what follows, too");
            }
        }
        ensure!(places.contains(&0) && places.contains(&1), "the clients are spread: {places:?}");
        ensure!(templates()? == before, "no template was made");
    }
    Ok(())
}

#[test]
fn ipvs_knobs_shape_it() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = bench(&["--max-connections", "64", "--max-half-open", "8", "--flood-hold", "1"], "-s rr", "-g")?;
    let set = |what: &str| bench.bpfvs.succeed(&["sysctl", "-w", what]).map(drop);
    for world in World::all(&bench) {
        set("secure_tcp=0")?;
        world.forget()?;
        let refused = (1000..1200).filter(|port| world.sent(&world.tcp(*port, SYN)).is_err()).count();
        ensure!(refused > 100 && !flood(&bench.bpfvs)?.on, "0: there is no such mode");
        set("secure_tcp=3")?;
        world.forget()?;
        let place = world.sent(&world.tcp(1000, SYN))?;
        ensure!(world.connections()?.is_empty() && flood(&bench.bpfvs)?.on, "3: it is always on");
        ensure!(world.sent(&world.tcp(1000, ACK))? == place && world.connections()?.len() == 1, "the ACK makes the entry");
    }
    set("secure_tcp=1")?;
    // The mode ends by itself; then an ACK of nobody's is nobody's.
    wait::until("flood mode to end", wait::SOON, || flood(&bench.bpfvs).is_ok_and(|flood| !flood.on))?;
    let world = World::all(&bench).next().context("there are hooks")?;
    world.forget()?;
    world.passed(&world.tcp(1000, ACK))?;
    // Half-open connections go soon, if that is wanted.
    set("drop_entry=3")?;
    world.sent(&world.tcp(1000, SYN))?;
    world.sent(&world.tcp(1001, SYN))?;
    world.sent(&world.tcp(1001, ACK))?;
    wait::until("the half-open connection to go", wait::SOON, || world.connections().is_ok_and(|left| !left.contains_key(&1000)))?;
    ensure!(world.connections()?.contains_key(&1001), "the established one stays");
    let text = bench.bpfvs.output(&["sysctl", "-w", "drop_packet=1"])?;
    let text = String::from_utf8_lossy(&text.stderr).into_owned();
    ensure!(text.contains("secure_tcp"), "{text}");
    Ok(())
}

/// What `status` says of it.
#[derive(Clone, Copy, Debug)]
struct Flood {
    on: bool,
    half_open: u64,
}

fn flood(bpfvs: &Bpfvs) -> Result<Flood> {
    let status = bpfvs.get("/v1/status")?;
    let on = status["flood"]["on"].as_bool().with_context(|| format!("no flood in {status}"))?;
    Ok(Flood { on, half_open: status["flood"]["half_open"].as_u64().context("a number")? })
}

/// Connections that move data while the flood runs.
const CONNECTIONS: usize = 1000;
/// Connections that begin while it runs.
const NEWCOMERS: usize = 200;
/// What the table holds, and of how many half-open connections flood mode begins.
const CAPACITY: u64 = 65_536;
const LIMIT: u64 = CAPACITY / 8;

/// How long a flood runs, at least.
fn seconds() -> u64 {
    env::var("BPFVS_FLOOD_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}

/// Floods the director's program until it is told to end. Returns how many packets that were.
fn pour(director: &Namespace, pins: &Path, hook: Hook, frame: &Frame, ended: &AtomicBool) -> Result<u64> {
    const AT_ONCE: u32 = 1 << 14;
    director.enter(|| {
        let pinned = Pinned::open(pins)?;
        let mut harness = Harness::load(1)?;
        harness.test(hook, pinned.descriptor(hook)?)?;
        let frame = frame.build();
        let port = u16::from_ne_bytes([frame[36], frame[37]]);
        // 198.18.0.0/15 is for tests like this one.
        harness.begin(&Round { flows: 1 << 30, first_client: 0xc612_0000, port, ..round(&frame) })?;
        let mut packets = 0;
        while !ended.load(Ordering::Relaxed) {
            harness.run(hook, &frame, AT_ONCE)?;
            packets += u64::from(AT_ONCE);
        }
        Ok(packets)
    })
}

/// Asks on a connection, and returns the name of the server that answers.
fn ask(connection: &mut TcpStream) -> Result<String> {
    connection.write_all(b"GET / HTTP/1.1\r\nHost: vip\r\n\r\n")?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n") || !answer.windows(4).any(|end| end == b"\r\n\r\n") || answer.ends_with(b"\r\n\r\n") {
        let mut part = [0; 1024];
        let length = connection.read(&mut part)?;
        ensure!(length > 0, "the connection was closed after {:?}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&part[..length]);
    }
    let text = String::from_utf8_lossy(&answer).into_owned();
    Ok(text.lines().last().unwrap_or_default().to_owned())
}

fn connect(vip: SocketAddr) -> Result<TcpStream> {
    let connection = TcpStream::connect_timeout(&vip, Duration::from_secs(5)).context("connect")?;
    connection.set_read_timeout(Some(Duration::from_secs(5)))?;
    connection.set_nodelay(true)?;
    Ok(connection)
}

/// Active and inactive connections of all real servers of a port.
fn counters(bpfvs: &Bpfvs, port: u16) -> Result<(u64, u64)> {
    let services = bpfvs.get("/v1/services")?;
    let services = services.as_array().context("a list")?.iter().filter(|service| service["id"]["address"]["port"] == port);
    let servers: Vec<_> = services.filter_map(|service| service["servers"].as_array()).flatten().collect();
    let sum = |name: &str| servers.iter().filter_map(|server| server[name].as_u64()).sum();
    Ok((sum("active"), sum("inactive")))
}

fn balanced(hook: &str) -> Result<(Balanced, Option<bpfvs_tests::pass::PassProgram>)> {
    let lab = Lab::new(Layout::OneSegment, 4)?;
    let pass = if hook == "xdp" { Some(lab.prepare_for_xdp()?) } else { None };
    let arguments = ["--hook", hook, "--flood-hold", "2", "--max-connections", "65536"];
    let balanced = Balanced::in_lab(lab, &arguments)?;
    balanced.service("rr", &["-g"; 4])?;
    Ok((balanced, pass))
}

fn syn_flood(name: &str, hook: Hook) -> Result<()> {
    let (balanced, _pass) = balanced(name)?;
    let vip = SocketAddr::new(balanced.lab.vip.of(Family::Ipv4), 80);
    let client = &balanced.lab.client;
    let mut connections = client.enter(|| (0..CONNECTIONS).map(|_| connect(vip)).collect::<Result<Vec<_>>>())?;
    let names: Vec<String> = connections.iter_mut().map(ask).collect::<Result<_>>()?;
    ensure!(counters(&balanced.bpfvs, 80)? == (CONNECTIONS as u64, 0), "{:?}", counters(&balanced.bpfvs, 80)?);

    let ended = AtomicBool::new(false);
    let frame = Frame { payload: vec![0; 12], ..Frame::tcp("198.18.0.1:1".parse()?, vip, SYN) };
    let begin = Instant::now();
    let (director, pins) = (&balanced.lab.director, balanced.bpfvs.pins());
    let (poured, held, arrived) = thread::scope(|scope| {
        let flood = scope.spawn(|| pour(director, pins, hook, &frame, &ended));
        let mut talk = || -> Result<(u64, usize)> {
            wait::until("the log to tell of the flood", wait::SOON, || balanced.bpfvs.log().contains("flood mode begins"))?;
            ensure!(self::flood(&balanced.bpfvs)?.on, "and the status");
            ensure!(balanced.bpfvs.succeed(&["status"])?.contains("ON ("), "in words, too");
            let (_, page) = http(&balanced.bpfvs.socket(), "GET", "/metrics", None)?;
            ensure!(page.contains("bpfvs_flood_mode 1\n"), "and the metrics: {page}");
            let (mut rounds, mut arrived) = (0, 0);
            while rounds == 0 || begin.elapsed() < Duration::from_secs(seconds()) {
                for (number, (connection, name)) in connections.iter_mut().zip(&names).enumerate() {
                    let answer = ask(connection).with_context(|| format!("connection {number} is lost"))?;
                    ensure!(answer == *name, "connection {number} came to {answer} instead of {name}");
                }
                rounds += 1;
                if rounds == 1 {
                    let newcomer = || connect(vip).and_then(|mut connection| ask(&mut connection)).is_ok();
                    arrived = client.enter(|| (0..NEWCOMERS).filter(|_| newcomer()).count());
                }
            }
            let tracked = balanced.bpfvs.get("/v1/connections")?.as_array().map_or(0, Vec::len) as u64;
            ensure!(tracked <= 2 * LIMIT + CONNECTIONS as u64 + NEWCOMERS as u64, "the table has {tracked} connections");
            Ok((rounds, arrived))
        };
        let talked = talk();
        ended.store(true, Ordering::Relaxed);
        let poured = flood.join().expect("it does not panic")?;
        let (rounds, arrived) = talked?;
        Ok::<_, anyhow::Error>((poured, rounds, arrived))
    })?;
    let rate = u128::from(poured) * 1000 / begin.elapsed().as_millis().max(1);
    let stateless = balanced.bpfvs.reason("stateless")?;
    println!(
        "{name}: {rate} SYNs a second, {stateless} without an entry; {CONNECTIONS} connections moved data {held} times; {arrived} of {NEWCOMERS} newcomers arrived"
    );
    ensure!(arrived * 100 >= NEWCOMERS * 99, "{arrived} of {NEWCOMERS} new connections got through");
    ensure!(stateless > poured / 2, "{stateless} of {poured}");

    wait::until("flood mode to end", wait::SOON, || flood(&balanced.bpfvs).is_ok_and(|flood| !flood.on))?;
    wait::until("the log to tell of its end", wait::SOON, || balanced.bpfvs.log().contains("flood mode ends"))?;
    // What the flood left half-open goes, if not by its short life then by its long one; here the former is asked for.
    balanced.bpfvs.succeed(&["sysctl", "-w", "drop_entry=3"])?;
    wait::until("the half-open connections to go", wait::SOON, || flood(&balanced.bpfvs).is_ok_and(|flood| flood.half_open == 0))?;
    let (active, inactive) = counters(&balanced.bpfvs, 80)?;
    ensure!(active == CONNECTIONS as u64 && inactive <= NEWCOMERS as u64, "{active} active, {inactive} inactive connections");
    for (connection, name) in connections.iter_mut().zip(&names) {
        ensure!(ask(connection)? == *name, "a connection was lost after the flood");
    }
    Ok(())
}

#[test]
fn a_syn_flood_at_xdp() -> Result<()> {
    needs!(root, "nginx", "ethtool");
    needs_bpfvs!();
    syn_flood("xdp", Hook::Xdp)
}

#[test]
fn a_syn_flood_at_tc() -> Result<()> {
    needs!(root, "nginx");
    needs_bpfvs!();
    syn_flood("tc", Hook::Tc)
}

#[test]
fn a_flood_of_datagrams() -> Result<()> {
    needs!(root, "nginx", "socat");
    needs_bpfvs!();
    let (balanced, _pass) = balanced("tc")?;
    balanced.service_on("-u", 5353, "rr", &["-g"; 4])?;
    let (vip, client) = (balanced.lab.vip.of(Family::Ipv4), &balanced.lab.client);
    let servers = balanced.lab.servers.iter().zip(["rs1", "rs2", "rs3", "rs4"]);
    let _servers = servers.map(|(server, name)| UdpServer::start(server, vip, 5353, name)).collect::<Result<Vec<_>>>()?;
    let ended = AtomicBool::new(false);
    let frame = Frame { payload: vec![0; 24], ..Frame::udp("198.18.0.1:1".parse()?, SocketAddr::new(vip, 5353)) };
    let mut connection = client.enter(|| connect(SocketAddr::new(vip, 80)))?;
    let name = ask(&mut connection)?;
    let (director, pins) = (&balanced.lab.director, balanced.bpfvs.pins());
    thread::scope(|scope| {
        let flood = scope.spawn(|| pour(director, pins, Hook::Tc, &frame, &ended));
        let mut talk = || -> Result<()> {
            wait::until("flood mode to begin", wait::SOON, || self::flood(&balanced.bpfvs).is_ok_and(|flood| flood.on))?;
            for _ in 0..10 {
                ask_udp(client, vip, 5353).context("a client of the flooded service")?;
                ensure!(ask(&mut connection)? == name, "the connection of another service stays");
            }
            let tracked = balanced.bpfvs.get("/v1/connections")?.as_array().map_or(0, Vec::len) as u64;
            ensure!(tracked <= LIMIT + 100, "the table has {tracked} connections");
            Ok(())
        };
        let talked = talk();
        ended.store(true, Ordering::Relaxed);
        flood.join().expect("it does not panic")?;
        talked
    })?;
    wait::until("flood mode to end", wait::SOON, || flood(&balanced.bpfvs).is_ok_and(|flood| !flood.on))
}
