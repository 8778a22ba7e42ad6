//! How far schedules stray from IPVS's choices when connections come faster than the daemon can look.
//!
//! 20,000 connections begin in a second, and each ends a tenth of a second later. A real server is stopped (weight 0) and
//! started again. Beside the director a [`book`](crate::book) is kept in which every connection goes where IPVS would send it at
//! that moment, with the counters of the book. The figure is the difference between the director's active connections and the
//! book's, for the server where it is largest.
//!
//! ```text
//! SYN number 7      director: server 2, book: server 3
//! FIN number 7      director: server 2 has one less, book: server 3 has one less
//! each millisecond  the largest difference over all servers
//! ```
//!
//! Of the schedulers that go by connections, those take part that spread them. fo and ovf fill one server after the other.
//! twos draws lots. lblc and lblcr go by the live counters, and where they do not they are wlc.

use std::{
    collections::VecDeque,
    fmt::{self, Display, Formatter},
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    arrivals::{self, Arrivals, Connection},
    bench::Bench,
    book::{Entry, choice},
};

/// The schedulers that are measured.
pub const SCHEDULERS: [&str; 4] = ["lc", "wlc", "sed", "nq"];
/// What the lines are about.
pub const HEADING: &str = "how far active connections differ from IPVS's while one server is stopped and started";

const SERVICE: &str = "-t 10.99.0.1:80";
/// Weights of the real servers, the newest first.
const WEIGHTS: [u32; 4] = [1, 2, 3, 4];
/// The one that is stopped and started.
const STOPPED: usize = 2;
/// New connections in a second.
const RATE: u32 = 20_000;
/// How many connections are open at a time.
const OPEN: usize = 2000;
/// How long it goes on.
const PERIOD: Duration = Duration::from_secs(6);
/// The server stands still in the third and fourth second.
const STOP: Duration = Duration::from_secs(2);
const START: Duration = Duration::from_secs(4);

/// How far the active connections of the director were from those of IPVS.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Staleness {
    /// The service's scheduler.
    pub scheduler: &'static str,
    /// New connections in a second.
    pub rate: u32,
    /// The mean over time of the largest difference of a server.
    pub mean: f64,
    /// What 99 of 100 moments stay below.
    pub most_moments: u32,
    /// The largest difference at all.
    pub largest: u32,
    /// Active connections of the largest server, for comparison.
    pub active: u32,
}

impl Display for Staleness {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self { scheduler, rate, mean, most_moments, largest, active } = self;
        write!(
            formatter,
            "{scheduler:<5} {rate:>6} new connections a second, {OPEN} open: by {mean:.1} in the mean, {most_moments} in 99 of 100 \
             moments, {largest} at most, of {active}"
        )
    }
}

/// A connection of the director, and where the book has it.
struct Pair {
    connection: Connection,
    entry: usize,
}

/// Runs the script.
pub fn measure(scheduler: &'static str) -> Result<Staleness> {
    let bench = Bench::new(&["--max-half-open", "4294967295"])?;
    let addresses = arrivals::servers(&bench, 0..WEIGHTS.len() as u16)?;
    bench.bpfvs.ipvsadm(&format!("-A {SERVICE} -s {scheduler}"))?;
    for (address, weight) in addresses.iter().zip(WEIGHTS).rev() {
        bench.bpfvs.ipvsadm(&format!("-a {SERVICE} -r {address} -g -w {weight}"))?;
    }
    bench.bpfvs.wait_for_servers()?;
    let indices = addresses.iter().map(|address| bench.server_index(&address.to_string())).collect::<Result<Vec<_>>>()?;
    bench.director.enter(|| run(&bench, scheduler, &indices, addresses[STOPPED]))
}

/// Gives the real server that is stopped and started another weight.
fn weigh(bench: &Bench, address: Ipv4Addr, weight: u32) -> Result<()> {
    let service = json!({"address": {"protocol": "tcp", "address": "10.99.0.1", "port": 80}});
    let server = json!({"address": address, "port": 80});
    let edit = json!({"service": service, "server": server, "config": {"method": "route", "weight": weight}});
    let answer = bench.bpfvs.post("/v1/commands", &json!([{"edit_server": edit}]))?;
    ensure!(answer == json!(["ok"]), "the daemon answered {answer}");
    Ok(())
}

fn run(bench: &Bench, scheduler: &'static str, indices: &[u32], stopped: Ipv4Addr) -> Result<Staleness> {
    let mut arrivals = Arrivals::new(bench)?;
    let mut book: Vec<_> = WEIGHTS.iter().map(|&weight| Entry { weight, ..Entry::default() }).collect();
    let mut open: VecDeque<Pair> = VecDeque::new();
    let (mut differences, mut most_active) = (Vec::new(), 0);
    let mut commands = VecDeque::from([(STOP, 0), (START, WEIGHTS[STOPPED])]);
    let begin = Instant::now();
    let mut begun = 0;
    while begin.elapsed() < PERIOD {
        // Between two arrivals, so that the book knows when; those that are due meanwhile come in a burst.
        if let Some(&(when, weight)) = commands.front()
            && begin.elapsed() >= when
        {
            commands.pop_front();
            weigh(bench, stopped, weight)?;
            book[STOPPED].weight = weight;
        }
        let due = (begin.elapsed().as_micros() * u128::from(RATE) / 1_000_000) as u32;
        if begun >= due {
            thread::sleep(Duration::from_micros(200));
            continue;
        }
        while begun < due {
            begun += 1;
            let entry = choice(scheduler, book.iter()).context("some server takes connections")?;
            let client = arrivals.begin()?;
            book[entry].active += 1;
            book[entry].total += 1;
            open.push_back(Pair { connection: Connection { client, server: None }, entry });
            if open.len() > OPEN
                && let Some(oldest) = open.pop_front()
            {
                arrivals.finish(&oldest.connection)?;
                book[oldest.entry].active -= 1;
            }
            // Each millisecond.
            if begun % (RATE / 1000) == 0 {
                let mut largest = 0;
                for (entry, &index) in book.iter().zip(indices) {
                    largest = largest.max(bench.pinned.counters(index)?.active.abs_diff(entry.active));
                    most_active = most_active.max(entry.active);
                }
                differences.push(largest);
            }
        }
    }
    differences.sort_unstable();
    Ok(Staleness {
        scheduler,
        rate: (u128::from(begun) * 1_000_000 / begin.elapsed().as_micros()) as u32,
        mean: f64::from(differences.iter().sum::<u32>()) / f64::from(differences.len() as u32),
        most_moments: differences.get(differences.len() * 99 / 100).copied().unwrap_or_default(),
        largest: differences.last().copied().unwrap_or_default(),
        active: most_active,
    })
}
