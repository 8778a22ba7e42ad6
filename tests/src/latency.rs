//! Does a sweep delay packets? Pings through a director, with its sweep at work and without.
//!
//! ```text
//! CPU 0   client ── c0 ═ d0 ┐                    ┌ d1 ═ s0 ── server
//! CPU 1                     └ director (tc, DR) ─┘
//! ```
//!
//! Client and server run on one CPU, with real-time priority, so that other work of the machine is none of their business. The director's
//! packets are handed to the CPU that is asked about (RPS), and the daemon is bound to the last one. In turns of a second it
//! may work, or it is stopped. Only turns in which the sweep came forward count.

use std::{
    fmt,
    net::UdpSocket,
    process::{Command, id},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData};
use lb_common::{
    config::SweepReport,
    connection::{Connection, ConnectionKey, flags},
    family::Ipv4,
    packet::transport::Ports,
    tcp,
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::signal::{Signal, kill},
    unistd::{Pid, gettid},
};

use crate::{bpfvs::Bpfvs, netns::Namespace, netns::run};

/// How long the daemon works, or is stopped: long enough for two spells of the sweep and the rests after them.
const TURN: Duration = Duration::from_secs(1);

/// Round-trip times.
#[derive(Clone, Debug, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    fn part(&self, thousandths: usize) -> f64 {
        let mut times = self.0.clone();
        times.sort_unstable();
        times.get(times.len() * thousandths / 1000).map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
    }
}

impl fmt::Display for Times {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p99, p999] = [500, 990, 999].map(|part| self.part(part));
        write!(formatter, "{:>8} pings: p50 {p50:6.1} us, p99 {p99:6.1} us, p99.9 {p999:6.1} us", self.0.len())
    }
}

/// Pings with so many connections in the table, and the director's packets on a CPU: while nobody sweeps, and while the sweep is at work
/// on the last one.
pub fn measure(connections: u32, cpu: usize, last: usize, turns: usize) -> Result<[Times; 2]> {
    let [client, director, server] = ["client", "director", "server"].map(Namespace::new);
    let (client, director, server) = (client?, director?, server?);
    director.connect("d0", &client, "c0")?;
    director.connect("d1", &server, "s0")?;
    director.ip("addr add 10.1.0.254/24 dev d0\naddr add 10.2.0.254/24 dev d1\nlink set d0 up\nlink set d1 up")?;
    director.sysctl(&[("net.ipv4.ip_forward", "1"), ("net.ipv4.conf.all.rp_filter", "0")])?;
    client.ip("addr add 10.1.0.1/24 dev c0\nlink set c0 up\nroute add default via 10.1.0.254")?;
    server.ip("addr add 10.2.0.1/24 dev s0\nlink set s0 up\naddr add 10.99.0.1/32 dev lo\nlink set lo up\nroute add default via 10.2.0.254")?;
    let room = connections.next_power_of_two().to_string();
    let bpfvs = Bpfvs::start(&director, &["--hook", "tc", "--max-connections", &room])?;
    bpfvs.ipvsadm("-A -u 10.99.0.1:7 -s rr")?;
    bpfvs.ipvsadm("-a -u 10.99.0.1:7 -r 10.2.0.1:7 -g")?;
    bpfvs.wait_for_servers()?;
    let set = format!("echo {:x} > /sys/class/net/d0/queues/rx-0/rps_cpus", 1 << cpu);
    run(Command::new("ip").args(["netns", "exec", director.name(), "sh", "-c", &set]))?;
    let pid = bpfvs.pid()?;
    run(Command::new("taskset").args(["-a", "-c", "-p", &last.to_string(), &pid.to_string()]))?;
    let maps = bpfvs.pins().join("maps");
    let map = |name: &str| MapData::from_pin(maps.join(name)).with_context(|| format!("open {name}"));
    let report: Array<MapData, SweepReport> = Map::Array(map("SWEEP")?).try_into()?;
    fill(&mut Map::HashMap(map("CONNECTIONS_V4")?).try_into()?, connections, report.get(&0, 0)?.jiffies as u32)?;
    let over = &AtomicBool::new(false);
    thread::scope(|scope| {
        let echo = scope.spawn(|| server.enter(|| answer(over)));
        let pings = client.enter(|| {
            hurry()?;
            let socket = UdpSocket::bind("10.1.0.1:0")?;
            socket.connect("10.99.0.1:7")?;
            socket.set_read_timeout(Some(Duration::from_secs(5)))?;
            let mut times = [Times::default(), Times::default()];
            for turn in 0..2 * turns {
                let works = turn % 2;
                kill(Pid::from_raw(pid.cast_signed()), [Signal::SIGSTOP, Signal::SIGCONT][works])?;
                let before = report.get(&0, 0)?.passed;
                let found = ping(&socket)?;
                let after = report.get(&0, 0)?.passed;
                if (after > before) == (works == 1) {
                    times[works].0.extend(found);
                }
            }
            kill(Pid::from_raw(pid.cast_signed()), Signal::SIGCONT)?;
            Ok(times)
        });
        over.store(true, Ordering::Relaxed);
        echo.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        pings
    })
}

/// Fills the table with connections that nobody uses, and that will not be over for long.
fn fill(table: &mut HashMap<MapData, ConnectionKey<Ipv4>, Connection>, connections: u32, now: u32) -> Result<()> {
    // One less: there has to be room for the pings'.
    for number in 1..connections {
        let ports = Ports::new(number as u16, 80_u16.to_be());
        let key = ConnectionKey { client: number.wrapping_mul(0x9e37_79b1), vip: 0x0a63_0063_u32.to_be(), ports, protocol: 6 };
        let state = tcp::State::Established as u8;
        let connection = Connection { server: 99, last_seen: now, state, flags: flags::ACTIVE, ..Connection::default() };
        table.insert(key, connection, 0).context("fill the table")?;
    }
    Ok(())
}

/// Goes to the first CPU, before everybody else there.
fn hurry() -> Result<()> {
    let mut first = CpuSet::new();
    first.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &first)?;
    run(Command::new("chrt").args(["--fifo", "--pid", "50", &gettid().to_string()])).map(|_| ())
}

fn answer(over: &AtomicBool) -> Result<()> {
    hurry()?;
    let socket = UdpSocket::bind("10.99.0.1:7")?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut buffer = [0; 8];
    while !over.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(&buffer[..length], from)?;
        }
    }
    Ok(())
}

/// Pings for a turn.
fn ping(socket: &UdpSocket) -> Result<Vec<Duration>> {
    let (begin, mut times, mut buffer) = (Instant::now(), Vec::new(), [0; 8]);
    while begin.elapsed() < TURN {
        let sent = Instant::now();
        socket.send(&id().to_ne_bytes())?;
        ensure!(socket.recv(&mut buffer)? == size_of::<u32>(), "an answer to something else has come");
        times.push(sent.elapsed());
        // Let others have the CPU, too.
        thread::sleep(Duration::from_micros(100));
    }
    Ok(times)
}
