//! As many services, real servers and connections as a director is made for, in one that runs: are they all there, does each do
//! its part, and what do they cost?
//!
//! Packets are made in the kernel, by the [harness](crate::speed) of the bench, so that millions of connections take seconds. Each busy
//! service has client addresses of its own and [`FLOWS`] connections, each of which sends a SYN and an ACK. Addresses say who belongs
//! to whom, so that every line of a listing can be checked by itself:
//!
//! ```text
//! service 7     10.100.0.7:80     clients 10.16.0.28 … 10.16.0.31     real servers 10.64.0.70 … 10.64.0.79
//! ```

use std::{
    fmt, fs,
    io::{BufRead as _, BufReader},
    net::{Ipv4Addr, SocketAddrV4},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lb_common::floor::Round;
use serde_json::Value;

use crate::{
    bench::Bench,
    frame::{ACK, Frame, SYN},
    speed::{harness::Harness, stage::round},
    test_run::Hook,
    wait,
};

/// Connections of each busy service.
pub const FLOWS: u64 = 1 << 16;
/// Client addresses of each: an address has 2^14 ports.
const ADDRESSES: u32 = 4;
/// Real servers of each service.
const SERVERS: u32 = 10;
const VIPS: u32 = 0x0a64_0000;
const CLIENTS: u32 = 0x0a10_0000;
const REAL_SERVERS: u32 = 0x0a40_0000;
/// Those that take their place.
const OTHER_SERVERS: u32 = 0x0a48_0000;
/// Room for those that nobody asked for.
const SPARE: u64 = 1024;
const PORT: u16 = 80;
/// What nobody would wait for.
const SLOW: Duration = Duration::from_secs(300);

/// How much of everything.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Virtual services, each with ten real servers.
    pub services: u32,
    /// Services that have connections.
    pub busy: u32,
}

impl Size {
    /// How many connections there are.
    pub const fn connections(self) -> u64 {
        self.busy as u64 * FLOWS
    }
}

/// What it took.
#[derive(Clone, Debug, Default)]
#[expect(missing_docs, reason = "the names say it, and `Display` more")]
pub struct Cost {
    pub rules: Duration,
    pub ready: Duration,
    pub begin: Duration,
    pub established: Duration,
    pub sweep: Duration,
    pub listing: Duration,
    pub rules_again: Duration,
    pub expiry: Duration,
    /// The daemon's resident memory in bytes: with its rules, at most with connections, at most while they are listed.
    pub memory: [u64; 3],
    /// That of the command that lists.
    pub lister: u64,
}

/// A director of some size.
#[derive(Debug)]
pub struct Scale {
    bench: Bench,
    size: Size,
    /// What it has taken so far.
    pub cost: Cost,
}

impl Scale {
    /// Starts a director, and gives it its services and real servers.
    pub fn new(size: Size) -> Result<Self> {
        let room = (size.connections() + SPARE).next_power_of_two().to_string();
        // Not a flood: all of them mean it.
        let bench = Bench::new(&["--max-connections", &room, "--max-half-open", &room])?;
        bench.director.ip("route add 10.64.0.0/12 via 10.1.0.1")?;
        let mut scale = Self { bench, size, cost: Cost::default() };
        (scale.cost.rules, scale.cost.ready) = scale.load(REAL_SERVERS)?;
        scale.cost.memory[0] = scale.resident("VmRSS")?;
        Ok(scale)
    }

    fn load(&self, first: u32) -> Result<(Duration, Duration)> {
        let begin = Instant::now();
        self.bench.bpfvs.restore(&self.rules(first))?;
        let rules = begin.elapsed();
        let servers = self.size.services as usize * SERVERS as usize;
        wait::until("every real server to be ready", SLOW, || {
            self.bench.pinned.ready_servers().is_ok_and(|ready| ready >= servers)
        })?;
        Ok((rules, begin.elapsed()))
    }

    /// Rules with real servers from this address on.
    fn rules(&self, first: u32) -> String {
        let service = |service: u32| {
            let vip = Ipv4Addr::from(VIPS + service);
            let server = |server| format!("-a -t {vip}:{PORT} -r {} -g\n", Ipv4Addr::from(first + service * SERVERS + server));
            format!("-A -t {vip}:{PORT} -s rr\n") + &(0..SERVERS).map(server).collect::<String>()
        };
        (0..self.size.services).map(service).collect()
    }

    /// Has everything happen that this is about; the listing is left out if that is wanted.
    pub fn run(&mut self, lists: bool) -> Result<()> {
        self.connect()?;
        self.check_counters()?;
        self.sweep()?;
        if lists {
            self.list()?;
        }
        self.clear_and_restore()?;
        self.expire()
    }

    /// Begins all connections, and establishes them.
    fn connect(&mut self) -> Result<()> {
        let harness = &mut Harness::load(1)?;
        self.reset_peak()?;
        harness.test(Hook::Xdp, self.bench.pinned.descriptor(Hook::Xdp)?)?;
        for service in 0..self.size.busy {
            // One after the other: what is not established soon is over.
            self.cost.begin += self.send(harness, service, SYN)?;
            self.cost.established += self.send(harness, service, ACK)?;
        }
        self.cost.memory[1] = self.resident("VmHWM")?;
        Ok(())
    }

    /// Sends a packet of each connection of a service, and says how long the packets took.
    fn send(&self, harness: &mut Harness, service: u32, flags: u8) -> Result<Duration> {
        let (client, vip) = (SocketAddrV4::new(Ipv4Addr::from(first_client(service)), 1), vip(service));
        let frame = Frame { payload: vec![0; 10], ..Frame::tcp(client.into(), vip.into(), flags) }.build();
        harness.begin(&Round { flows: FLOWS, first_client: first_client(service), port: PORT.to_be(), ..round(&frame) })?;
        let run = self.bench.director.enter(|| harness.run(Hook::Xdp, &frame, FLOWS as u32))?;
        let verdict = run.return_value;
        ensure!(
            verdict == 3 || verdict == 4,
            "the packets of service {service} end with verdict {verdict}: they are not forwarded"
        );
        // The kernel's own clock: to begin a run takes it longer than some thousand packets.
        Ok(run.duration * FLOWS as u32)
    }

    /// Checks that each real server has got its share of connections and packets, and nothing but this.
    fn check_counters(&self) -> Result<()> {
        let services = self.bench.bpfvs.get("/v1/services")?;
        let services = services.as_array().context("the services are a list")?;
        ensure!(services.len() == self.size.services as usize, "{} services are left", services.len());
        for service in services {
            let servers = service["servers"].as_array().context("the servers are a list")?;
            let vip: Ipv4Addr = service["id"]["address"]["address"].as_str().context("a service has an address")?.parse()?;
            let is_busy = u32::from(vip) - VIPS < self.size.busy;
            let (least, most) = if is_busy { (FLOWS / u64::from(SERVERS), FLOWS.div_ceil(u64::from(SERVERS))) } else { (0, 0) };
            let mut sum = 0;
            for server in servers {
                let number = |name: &str| {
                    server["traffic"]["totals"][name].as_u64().with_context(|| format!("a server has no {name}: {server}"))
                };
                let (connections, packets) = (number("connections")?, number("packets_in")?);
                ensure!((least..=most).contains(&connections), "{vip}: {connections} connections of {least} to {most}");
                ensure!(packets == 2 * connections, "{vip}: {packets} packets of {connections} connections");
                ensure!(server["active"] == connections && server["inactive"] == 0, "{vip}: {server}");
                sum += connections;
            }
            ensure!(sum == if is_busy { FLOWS } else { 0 }, "{vip}: {sum} connections");
        }
        Ok(())
    }

    /// Waits until a sweep has seen all connections, and notes what it cost.
    fn sweep(&mut self) -> Result<()> {
        let status = self.wait_for_sweep(self.size.connections())?;
        self.cost.sweep = Duration::from_millis(status["sweep_milliseconds"].as_u64().context("the status tells of the sweep")?);
        Ok(())
    }

    fn wait_for_sweep(&self, connections: u64) -> Result<Value> {
        let mut status = Value::Null;
        wait::until(&format!("a sweep that leaves {connections} connections"), SLOW, || {
            status = self.bench.bpfvs.get("/v1/status").unwrap_or_default();
            status["connections"] == connections
        })
        .with_context(|| format!("the status is {status:#}"))?;
        Ok(status)
    }

    /// Lists all connections, and checks each line.
    fn list(&mut self) -> Result<()> {
        self.reset_peak()?;
        let begin = Instant::now();
        let mut lister = self.bench.bpfvs.command("ipvsadm").arg("-Lnc").stdout(Stdio::piped()).spawn()?;
        let output = BufReader::new(lister.stdout.take().context("the pipe was just made")?);
        let mut lines = 0;
        for line in output.lines().skip(2) {
            check_line(&line?)?;
            lines += 1;
            if lines == self.size.connections() * 9 / 10 {
                self.cost.lister = resident(lister.id(), "VmHWM")?;
            }
        }
        ensure!(lister.wait()?.success(), "ipvsadm -Lnc failed");
        ensure!(lines == self.size.connections(), "{lines} connections of {} are listed", self.size.connections());
        self.cost.listing = begin.elapsed();
        self.cost.memory[2] = self.resident("VmHWM")?;
        Ok(())
    }

    /// Clears all rules, and restores them with other real servers, while the connections of the old ones are there.
    fn clear_and_restore(&mut self) -> Result<()> {
        self.bench.bpfvs.ipvsadm("-C")?;
        (self.cost.rules_again, _) = self.load(OTHER_SERVERS)?;
        Ok(())
    }

    /// Lets all connections expire.
    fn expire(&mut self) -> Result<()> {
        self.bench.bpfvs.ipvsadm("--set 1 1 1")?;
        let begin = Instant::now();
        self.wait_for_sweep(0)?;
        self.cost.expiry = begin.elapsed();
        Ok(())
    }

    /// How much the daemon's memory has grown with connections, in bytes.
    pub fn growth(&self) -> u64 {
        let [rules, connected, listed] = self.cost.memory;
        connected.max(listed).saturating_sub(rules)
    }

    fn resident(&self, what: &str) -> Result<u64> {
        resident(self.bench.bpfvs.pid()?, what)
    }

    /// Forgets what the daemon's memory was at most.
    fn reset_peak(&self) -> Result<()> {
        let path = format!("/proc/{}/clear_refs", self.bench.bpfvs.pid()?);
        fs::write(&path, "5").with_context(|| format!("write to {path}"))
    }
}

fn first_client(service: u32) -> u32 {
    CLIENTS + service * ADDRESSES
}

fn vip(service: u32) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::from(VIPS + service), PORT)
}

/// Bytes of memory that a process has, as a line of `/proc/PID/status` says.
fn resident(pid: u32, what: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(what)?.strip_prefix(':'))
        .with_context(|| format!("{path} has no {what}"))?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes << 10)
}

/// Checks that a line is about an established connection of a service's own client to one of its real servers.
fn check_line(line: &str) -> Result<()> {
    let words: Vec<_> = line.split_whitespace().collect();
    let [protocol, _, state, client, vip, server] = words[..] else { anyhow::bail!("not the line of a connection: {line}") };
    let address = |text: &str| text.parse().map(|socket: SocketAddrV4| u32::from(*socket.ip())).with_context(|| line.to_owned());
    let service = address(vip)?.wrapping_sub(VIPS);
    let is_right = address(client)?.wrapping_sub(CLIENTS) / ADDRESSES == service
        && (address(server)?.wrapping_sub(REAL_SERVERS)) / SERVERS == service;
    ensure!(protocol == "TCP" && state == "ESTABLISHED" && is_right, "a wrong connection: {line}");
    Ok(())
}

impl fmt::Display for Scale {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cost { rules, ready, begin, established, sweep, listing, rules_again, expiry, memory, lister } = &self.cost;
        let connections = self.size.connections();
        let each = |time: &Duration| format!("{} ns each", time.as_nanos() / u128::from(connections));
        let seconds = |time: &Duration| format!("{:.2} s", time.as_secs_f64());
        let mebibytes = |bytes: u64| format!("{} MiB", bytes >> 20);
        let [with_rules, connected, listed] = memory.map(mebibytes);
        let servers = self.size.services * SERVERS;
        for (what, value) in [
            (format!("{} services, {servers} real servers restored", self.size.services), seconds(rules)),
            ("… until every real server is ready".to_owned(), seconds(ready)),
            (format!("{connections} connections begun"), each(begin)),
            ("… established".to_owned(), each(established)),
            ("a sweep, CPU".to_owned(), format!("{}, {}", seconds(sweep), each(sweep))),
            ("listed by ipvsadm -Lnc".to_owned(), seconds(listing)),
            ("all rules cleared, and restored with other real servers".to_owned(), seconds(rules_again)),
            ("all connections expired".to_owned(), seconds(expiry)),
            ("the daemon's resident memory".to_owned(), format!("{with_rules}, with connections {connected}, listing {listed}")),
            ("ipvsadm's resident memory".to_owned(), mebibytes(*lister)),
        ] {
            writeln!(formatter, "{what:<56}{value}")?;
        }
        Ok(())
    }
}
