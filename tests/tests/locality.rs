//! lblc and lblcr in the kernel: the loaded programs and the living daemon against a model of IPVS ([`Locality`]).
//!
//! The schedulers are made for services with many destinations, which firewall marks will bring. Here the test itself tells
//! the datapath of further addresses of a service; everything else is as it is for users.
//!
//! `BPFVS_LOCALITY_SEED` chooses the script.

use std::{
    env,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    bench::{Addresses, Bench, bracketed},
    frame::{ACK, FIN, Frame, SYN},
    lab::Family,
    needs, needs_bpfvs,
    test_run::{Hook, Verdict},
    wait,
};
use fastrand::Rng;
use lb_common::model::locality::{Locality, Server};

/// Between two events: so long apart, every choice must be IPVS's.
const APART: Duration = Duration::from_millis(20);

/// Destinations of each service, its own address among them.
const DESTINATIONS: usize = 4;

/// A real server, in the model by its number.
struct RealServer {
    address: IpAddr,
    index: u32,
    upper_threshold: u32,
    present: bool,
}

/// A service, and what IPVS would make of it.
struct World<'a> {
    bench: &'a Bench,
    service: SocketAddr,
    destinations: Vec<IpAddr>,
    servers: Vec<RealServer>,
    ipvs: Locality<IpAddr>,
    began: Instant,
    next_client: u16,
    /// Clients whose connections are active, whither, and to whom.
    open: Vec<(SocketAddr, IpAddr, usize)>,
    buffer: Vec<u8>,
    story: String,
}

impl<'a> World<'a> {
    /// A service with real servers of these weights and upper thresholds.
    fn new(bench: &'a Bench, family: Family, port: u16, scheduler: &str, servers: &[(u32, u32)], expiration: u64) -> Result<Self> {
        let vip = Addresses::of(family).vip;
        let service = SocketAddr::new(vip.parse()?, port);
        bench.bpfvs.ipvsadm(&format!("-A -t {service} -s {scheduler}"))?;
        let mut world = Self {
            bench,
            service,
            destinations: vec![service.ip()],
            servers: Vec::new(),
            ipvs: Locality::new(scheduler == "lblcr", expiration),
            began: Instant::now(),
            next_client: 1024,
            open: Vec::new(),
            buffer: vec![0; 4096],
            story: format!("{scheduler}, {servers:?}:"),
        };
        for (number, &(weight, upper_threshold)) in servers.iter().enumerate() {
            let host = port % 100 * 100 + number as u16;
            let address = match family {
                Family::Ipv4 => format!("10.1.{}.{}", 1 + host / 100, 1 + host % 100),
                Family::Ipv6 => format!("fd01::2:{host:x}"),
            };
            bench.director.ip(&format!("neigh add {address} lladdr 02:00:00:00:02:01 dev eth0 nud permanent"))?;
            let name = bracketed(&address);
            bench.bpfvs.ipvsadm(&format!("-a -t {service} -r {name}:{port} -g -w {weight} -x {upper_threshold}"))?;
            let index = bench.server_index(&address)?;
            world.servers.push(RealServer { address: address.parse()?, index, upper_threshold, present: true });
            world.ipvs.add(number as u32, Server { weight, ..Server::default() });
        }
        for number in 1..DESTINATIONS {
            let address = match family {
                Family::Ipv4 => format!("10.200.{}.{number}", port % 100),
                Family::Ipv6 => format!("fd99:{}::{number}", port % 100),
            };
            world.destinations.push(address.parse()?);
            // Packets to this address are looked at.
            bench.bpfvs.ipvsadm(&format!("-A -t {}:9 -s rr", bracketed(&address)))?;
        }
        bench.bpfvs.wait_for_servers()?;
        bench.pinned.add_destinations(service, &world.destinations[1..])?;
        Ok(world)
    }

    fn send(&mut self, hook: Hook, client: SocketAddr, destination: IpAddr, flags: u8) -> Result<Verdict> {
        let frame = Frame::tcp(client, SocketAddr::new(destination, self.service.port()), flags).build();
        let pinned = &self.bench.pinned;
        let (verdict, _) = self.bench.director.enter(|| pinned.run_into(hook, &frame, &mut self.buffer))?;
        Ok(verdict)
    }

    /// A connection to a destination begins: both must choose the same server.
    fn arrive(&mut self, hook: Hook, destination: usize) -> Result<Option<usize>> {
        let family = if self.service.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 };
        let client = SocketAddr::new(Addresses::of(family).client.parse()?, self.next_client);
        self.next_client += 1;
        let address = self.destinations[destination];
        let expected = self.ipvs.pick(address, self.began.elapsed().as_millis() as u64).map(|number| number as usize);
        self.send(hook, client, address, SYN)?;
        let index = self.bench.pinned.server_of(client, self.service.port())?;
        let got = self.servers.iter().position(|server| Some(server.index) == index);
        write!(self.story, " {destination}->{got:?}")?;
        ensure!(got == expected, "{hook:?}: number {got:?} instead of {expected:?} after {}\n{:#?}", self.story, self.ipvs);
        if let Some(number) = got {
            let upper_threshold = self.servers[number].upper_threshold;
            let server = self.ipvs.server(number as u32);
            server.active += 1;
            server.total += 1;
            server.overloaded |= server.total == upper_threshold;
            self.open.push((client, address, number));
        }
        Ok(got)
    }

    /// The client has no more to say.
    fn finish(&mut self, hook: Hook, which: usize) -> Result<()> {
        let (client, destination, number) = self.open.swap_remove(which);
        write!(self.story, " finish({number})")?;
        self.send(hook, client, destination, FIN | ACK)?;
        // A removed server's connections stand still.
        if self.servers[number].present {
            self.ipvs.server(number as u32).active -= 1;
        }
        Ok(())
    }

    /// Somebody removes a server, or adds it back.
    fn toggle(&mut self, number: usize) -> Result<()> {
        let server = &mut self.servers[number];
        server.present ^= true;
        write!(self.story, " {}({number})", if server.present { "add" } else { "remove" })?;
        let line = format!("-t {} -r {}", self.service, SocketAddr::new(server.address, self.service.port()));
        if server.present {
            let known = *self.ipvs.server(number as u32);
            self.bench.bpfvs.ipvsadm(&format!("-a {line} -g -w {} -x {}", known.weight, server.upper_threshold))?;
            self.ipvs.add(number as u32, known);
            self.bench.bpfvs.wait_for_servers()
        } else {
            self.bench.bpfvs.ipvsadm(&format!("-d {line}"))?;
            self.ipvs.remove(number as u32);
            Ok(())
        }
    }

    /// Somebody changes a server's weight.
    fn weigh(&mut self, number: usize, weight: u32) -> Result<()> {
        let server = &self.servers[number];
        if server.present {
            write!(self.story, " weigh({number}, {weight})")?;
            let line = format!("-t {} -r {}", self.service, SocketAddr::new(server.address, self.service.port()));
            self.bench.bpfvs.ipvsadm(&format!("-e {line} -g -w {weight} -x {}", server.upper_threshold))?;
            self.ipvs.server(number as u32).weight = weight;
        }
        Ok(())
    }
}

#[test]
fn destinations_keep_their_servers_as_with_ipvs() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let seed = env::var("BPFVS_LOCALITY_SEED").map_or(Ok(fastrand::u64(..)), |text| text.parse())?;
    println!("BPFVS_LOCALITY_SEED={seed}");
    let mut random = Rng::with_seed(seed);
    let bench = Bench::new(&[])?;
    let mut worlds = Vec::new();
    for family in Family::ALL {
        for (port, scheduler) in [(8001, "lblc"), (8002, "lblcr")] {
            let servers: Vec<_> =
                (0..5).map(|_| (random.u32(0..5), if random.u8(..) < 80 { random.u32(3..12) } else { 0 })).collect();
            worlds.push(World::new(&bench, family, port, scheduler, &servers, u64::MAX)?);
        }
    }
    let complain = || format!("BPFVS_LOCALITY_SEED={seed}");
    for _ in 0..100 {
        thread::sleep(APART);
        // One event in each service.
        for world in &mut worlds {
            let hook = Hook::ALL[random.usize(..2)];
            match random.u8(..) {
                0..50 if !world.open.is_empty() => world.finish(hook, random.usize(..world.open.len())),
                50..56 => world.toggle(random.usize(..world.servers.len())),
                56..64 => world.weigh(random.usize(..world.servers.len()), random.u32(0..5)),
                // The first destination is hot.
                _ => world.arrive(hook, random.usize(..DESTINATIONS) * random.usize(..2)).map(|_| ()),
            }
            .with_context(complain)?;
        }
    }
    Ok(())
}

#[test]
fn a_set_that_does_not_change_loses_a_server() -> Result<()> {
    const EXPIRATION: Duration = Duration::from_secs(1);
    needs!(root);
    needs_bpfvs!();
    let bench = Bench::new(&[])?;
    let mut world = World::new(&bench, Family::Ipv4, 8002, "lblcr", &[(4, 0), (1, 0)], EXPIRATION.as_millis() as u64)?;
    bench.pinned.set_lblcr_expiration(EXPIRATION.as_secs() as u32)?;
    let mut went_to = Vec::new();
    for round in 0..8 {
        if round == 4 {
            thread::sleep(EXPIRATION + 5 * APART);
        }
        thread::sleep(APART);
        went_to.push(world.arrive(Hook::Tc, 0)?);
    }
    let remembered = world.ipvs.remembered(&world.destinations[0]);
    ensure!(remembered == [0], "after {went_to:?} the model's set is {remembered:?}, so this test tests nothing");
    Ok(())
}

#[test]
fn a_service_that_goes_forgets_its_destinations() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = Bench::new(&[])?;
    let mut lblc = World::new(&bench, Family::Ipv4, 8001, "lblc", &[(1, 0), (1, 0)], u64::MAX)?;
    let mut lblcr = World::new(&bench, Family::Ipv6, 8002, "lblcr", &[(1, 0), (1, 0)], u64::MAX)?;
    for destination in 0..3 {
        thread::sleep(APART);
        lblc.arrive(Hook::Tc, destination)?;
        lblcr.arrive(Hook::Xdp, destination)?;
    }
    ensure!(bench.pinned.destinations()? == 6, "{} destinations instead of 6", bench.pinned.destinations()?);
    bench.bpfvs.ipvsadm(&format!("-E -t {} -s wlc", lblc.service))?;
    wait::until("destinations to be forgotten", wait::SOON, || bench.pinned.destinations().is_ok_and(|count| count == 3))?;
    bench.bpfvs.ipvsadm(&format!("-D -t {}", lblcr.service))?;
    wait::until("destinations to be forgotten", wait::SOON, || bench.pinned.destinations().is_ok_and(|count| count == 0))
}
