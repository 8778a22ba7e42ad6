//! What new connections cost when all CPUs begin some at the same time: the cursor, the counters, the insertion.
//!
//! Two CPUs run the tc program at once, each with new flows of its own. (With XDP's, the kernel waits before each run until all have
//! gone on, so that no two are at the same time.) What they share tells what costs how much:
//!
//! | case | they share |
//! | --- | --- |
//! | alone | nothing: the other CPU does not take part |
//! | far apart | the table of connections |
//! | neighbours | and the cache lines of two services' cursors and counters |
//! | one service, many real servers | and the cursor; a counter hardly ever |
//! | one service, two real servers | and the counters |
//!
//! A sample counts only if both CPUs had nothing else to do in it (its time by the clock is that of the CPU), and did it at the same
//! time. Samples are short, so that there are such ones on a machine that is busy; `chrt -f 10` makes sure of it.

use std::{
    fmt::{self, Display, Formatter},
    net::Ipv4Addr,
    sync::Barrier,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use lb_common::{
    connection::{Connection, ConnectionKey},
    family::ipv4,
    floor::Round,
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use serde::Serialize;

use super::{
    harness::{Floor, Harness},
    measure::{Nanoseconds, cpu_time},
    stage::{TCP, open, unknown_clients},
};
use crate::{
    bench::{Addresses, Bench},
    lab::Family,
    test_run::{Hook, remove},
};

/// Connections that begin in a sample.
const CONNECTIONS: u32 = 1 << 12;
/// Services between the first two and the last two, so that nothing of theirs is in the same cache line.
const BETWEEN: u16 = 32;
/// Real servers of the service that has many.
const MANY: u32 = 1000;
/// Ports.
const FIRST: u16 = 1000;
const NEIGHBOUR: u16 = 1001;
const FAR: u16 = FIRST + 2 + BETWEEN;
const LARGE: u16 = FAR + 1;
/// What the second CPU's clients are further on.
const OTHERS: u32 = 0x10_0000;

/// What both CPUs do.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Case {
    /// One CPU, alone.
    Alone,
    /// Two services that have nothing to do with each other.
    FarApart,
    /// Two services whose entries are beside each other.
    Neighbours,
    /// One service with many real servers.
    Many,
    /// One service with two real servers.
    Two,
}

impl Case {
    const ALL: [Self; 5] = [Self::Alone, Self::FarApart, Self::Neighbours, Self::Many, Self::Two];

    /// The ports that the CPUs' connections go to.
    const fn ports(self) -> (u16, Option<u16>) {
        match self {
            Self::Alone => (FIRST, None),
            Self::FarApart => (FIRST, Some(FAR)),
            Self::Neighbours => (FIRST, Some(NEIGHBOUR)),
            Self::Many => (LARGE, Some(LARGE)),
            Self::Two => (FIRST, Some(FIRST)),
        }
    }
}

/// What a new connection takes.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// What both CPUs do.
    pub case: Case,
    /// How many picks a CPU takes at once.
    pub picks_at_once: u32,
    /// Nanoseconds for each connection, less the harness.
    pub time: Nanoseconds,
    /// Samples in which nobody else was on either CPU.
    pub samples: usize,
}

impl Display for Cost {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self { case, picks_at_once, time, samples } = self;
        let words = match case {
            Case::Alone => "alone",
            Case::FarApart => "two services, far apart",
            Case::Neighbours => "two services, neighbours",
            Case::Many => "one service, 1000 real servers",
            Case::Two => "one service, two real servers",
        };
        write!(
            formatter,
            "{words:<32} {picks_at_once:>3} picks at once {:>8.1} ({:.1}) ns, {samples} samples",
            time.median, time.minimum
        )
    }
}

/// Measures all cases, with so many picks at once each, in turns.
pub fn measure(picks_at_once: &[u32], rounds: usize) -> Result<Vec<Cost>> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let cpus: Vec<usize> = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).take(2).collect();
    let &[one, other] = cpus.as_slice() else { anyhow::bail!("contention takes two CPUs, and this process may use {cpus:?}") };
    let benches: Vec<Bench> = picks_at_once.iter().map(|picks| prepare(*picks)).collect::<Result<_>>()?;
    let mut samples = vec![Vec::new(); benches.len() * Case::ALL.len()];
    let mut nothing = Vec::new();
    for round in 0..=rounds {
        let mut taken = samples.iter_mut();
        for bench in &benches {
            // What the harness costs is the same for all.
            let baseline = sample(bench, [one, other], (FIRST, None), true)?;
            nothing.extend(baseline);
            for case in Case::ALL {
                let samples = taken.next().context("there is a place for each")?;
                let found = sample(bench, [one, other], case.ports(), false).with_context(|| format!("{case:?}"))?;
                // The first round warms up.
                samples.extend(found.filter(|_| round > 0));
            }
        }
    }
    let nothing = Nanoseconds::of(nothing).context("there was no moment in which the CPU was free")?;
    let cases = picks_at_once.iter().flat_map(|picks| Case::ALL.map(|case| (*picks, case)));
    let cost = |((picks_at_once, case), samples): ((u32, Case), Vec<f64>)| {
        let count = samples.len();
        let time =
            Nanoseconds::of(samples).with_context(|| format!("{case:?}: there was no moment in which both CPUs were free"))?;
        Ok(Cost { case, picks_at_once, time: time.less(nothing), samples: count })
    };
    cases.zip(samples).map(cost).collect()
}

/// A director with the services, and without a daemon.
fn prepare(picks_at_once: u32) -> Result<Bench> {
    let (connections, picks_at_once) = ((16 * CONNECTIONS).to_string(), picks_at_once.to_string());
    // Nothing here is established: that many half-open connections would be a flood.
    let options = ["--max-connections", &connections, "--max-half-open", "4294967295", "--picks-at-once", &picks_at_once];
    let mut bench = Bench::new(&options)?;
    let vip = Addresses::of(Family::Ipv4).vip;
    let mut next = 0;
    let mut addresses = |count: u32| {
        let first = next;
        next += count;
        (first..next).map(|number| Ipv4Addr::from(0x0a01_0100 + number)).collect::<Vec<_>>()
    };
    let (mut lines, mut neighbours) = (Vec::new(), Vec::new());
    for port in FIRST..=LARGE {
        lines.push(format!("-A -t {vip}:{port} -s rr"));
        for address in addresses(if port == LARGE { MANY } else { 2 }) {
            neighbours.push(format!("neigh add {address} lladdr 02:00:00:00:02:01 dev eth0 nud permanent"));
            lines.push(format!("-a -t {vip}:{port} -r {address} -g"));
        }
    }
    bench.director.ip(&neighbours.join("\n"))?;
    bench.bpfvs.restore(&lines.join("\n"))?;
    bench.bpfvs.wait_for_servers()?;
    bench.bpfvs.kill9()?;
    Ok(bench)
}

/// When a CPU began and ended, if nobody disturbed it.
type Span = Option<[Instant; 2]>;

/// Nanoseconds for each of many connections of the first CPU, while the other one does the same; nothing if one of them was disturbed.
fn sample(bench: &Bench, cpus: [usize; 2], ports: (u16, Option<u16>), idle: bool) -> Result<Option<f64>> {
    let barrier = &Barrier::new(1 + usize::from(ports.1.is_some()));
    let run = |cpu: usize, port, first| -> Result<Span> {
        bench.director.enter(|| {
            let mut only = CpuSet::new();
            only.set(cpu)?;
            sched_setaffinity(Pid::from_raw(0), &only).with_context(|| format!("bind to CPU {cpu}"))?;
            one(bench, port, first, barrier, idle)
        })
    };
    let (mine, others) = thread::scope(|scope| {
        let other = ports.1.map(|port| scope.spawn(move || run(cpus[1], port, OTHERS)));
        let mine = run(cpus[0], ports.0, 0);
        (mine, other.map(|other| other.join().expect("it returns its error")))
    });
    let Some([begin, end]) = mine? else { return Ok(None) };
    let together = match others.transpose()? {
        None => end - begin,
        Some(None) => return Ok(None),
        Some(Some([others_begin, others_end])) => end.min(others_end).saturating_duration_since(begin.max(others_begin)),
    };
    let is_shared = together.as_secs_f64() > 0.9 * (end - begin).as_secs_f64();
    Ok(is_shared.then(|| (end - begin).as_secs_f64() * 1e9 / f64::from(CONNECTIONS)))
}

fn one(bench: &Bench, port: u16, first: u32, barrier: &Barrier, idle: bool) -> Result<Span> {
    const REDIRECTED: u32 = 7;
    let mut harness = Harness::load(1)?;
    let (frame, round) = unknown_clients(port, 1);
    let round = Round { first_client: round.first_client + first, ..round };
    if idle {
        harness.test_floor(Hook::Tc, Floor::Nothing)?;
    } else {
        harness.test(Hook::Tc, bench.pinned.descriptor(Hook::Tc)?)?;
    }
    harness.begin(&round)?;
    barrier.wait();
    // Awake at the same moment, and not only at the same time.
    for _ in 0..20_000 {
        std::hint::spin_loop();
    }
    let (busy, begin) = (cpu_time()?, Instant::now());
    let verdict = harness.run(Hook::Tc, &frame, CONNECTIONS)?.return_value;
    let (busy, end) = (cpu_time()?.saturating_sub(busy), Instant::now());
    ensure!(idle || verdict == REDIRECTED, "the verdict is {verdict} instead of {REDIRECTED}: this is not the path to measure");
    if !idle {
        let vip = ipv4(Addresses::of(Family::Ipv4).vip.parse()?);
        let clients = (0..u64::from(CONNECTIONS)).map(|flow| round.client(flow));
        let keys = clients.map(|(client, ports)| ConnectionKey { client, vip, ports, protocol: TCP });
        let mut connections: HashMap<MapData, ConnectionKey<u32>, Connection> =
            HashMap::try_from(Map::HashMap(open(bench, "CONNECTIONS_V4")?))?;
        remove(&mut connections, keys)?;
    }
    let undisturbed = (end - begin).as_secs_f64() < 1.03 * busy.as_secs_f64();
    Ok(undisturbed.then_some([begin, end]))
}
