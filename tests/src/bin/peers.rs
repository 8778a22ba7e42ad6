//! `cargo xtask bench peers`: requests and throughput through bpfvs, and through those that people use instead.
//!
//! How it measures stands in [`bpfvs_tests::peers`].

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    peers::{
        load::{Bulk, Requests, bulk, requests},
        peer::Peer,
        stage::Stage,
    },
    skip,
    speed::{
        document,
        report::{Machine, commit},
        verdict::DIRECTORY,
    },
};
use clap::Parser;
use serde::Serialize;

/// Measure bpfvs beside its peers, in network namespaces of their own.
#[derive(Debug, Parser)]
struct Options {
    /// How long each load lasts, in seconds.
    #[arg(long, default_value_t = 2)]
    seconds: u32,
    /// How often each has its turn; the best counts.
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Connections at a time.
    #[arg(long, default_value_t = 50)]
    connections: u32,
    /// Only peers whose name begins with this, as in `bpfvs NAT`.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Write all figures to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the table into docs/performance.md, and the figures into docs/bench.
    #[arg(long)]
    write: bool,
}

/// All that is known of a measurement.
#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    commit: Option<String>,
    day: String,
    seconds: u32,
    rounds: usize,
    connections: u32,
    peers: Vec<Line>,
}

/// A peer and its figures, each the best of the rounds.
#[derive(Debug, Serialize)]
struct Line {
    peer: String,
    keep_alive: Requests,
    a_connection_each: Requests,
    bulk: Bulk,
}

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(skip::is_root(), "the bench makes network namespaces and loads programs, which needs root: `cargo xtask bench peers`");
    ensure!(options.rounds > 0 && options.seconds > 0, "a measurement takes at least a round of a second");
    let mut report = Report {
        machine: Machine::this(),
        commit: commit(),
        day: document::today()?,
        seconds: options.seconds,
        rounds: options.rounds,
        connections: options.connections,
        peers: Vec::new(),
    };
    if report.machine.load > 0.5 {
        println!("THIS MACHINE IS BUSY (load {}): the table says what it is busy with.\n", report.machine.load);
    }
    println!("{}", heading());
    for peer in Peer::all().into_iter().filter(|peer| peer.to_string().starts_with(&options.only)) {
        let line = measure(peer, &options).with_context(|| peer.to_string())?;
        println!("{}", row(&line, report.peers.first()));
        report.peers.push(line);
    }
    let text = serde_json::to_string_pretty(&report)? + "\n";
    let committed = options.write.then(|| Path::new(DIRECTORY).join(format!("{}-peers.json", report.day)));
    for file in options.json.iter().chain(&committed) {
        fs::write(file, &text).with_context(|| format!("write the figures to {}", file.display()))?;
    }
    if options.write {
        document::write("peers", &report.table())?;
        println!("The table is in {}.", document::FILE);
    }
    Ok(())
}

impl Report {
    /// The table, for the documentation.
    fn table(&self) -> String {
        let Machine { processor, processors, kernel, load, .. } = &self.machine;
        let known = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".to_owned());
        let rows: Vec<_> = self.peers.iter().map(|line| row(line, self.peers.first())).collect();
        format!(
            "{}, {processors} processors (load {load}), Linux {}, commit {}, {}. `cargo xtask bench peers`, the best of {} times {} s, {} \
             connections; figures in `docs/bench/{}-peers.json`.\n\n```text\n{}\n{}\n```\n",
            known(processor),
            known(kernel),
            known(&self.commit),
            self.day,
            self.rounds,
            self.seconds,
            self.connections,
            self.day,
            heading(),
            rows.join("\n")
        )
    }
}

/// The names of the columns, in two lines.
fn heading() -> String {
    let requests = format!("{:>10} {:>7} {:>7} {:>7} {:>7}", "1/s", "p50 us", "p99 us", "CPU us", "own us");
    format!(
        "{:<18} {:>42} {:>42} {:>17}\n{:<18} {requests} {requests} {:>8} {:>8}",
        "", "requests over kept connections", "requests with a connection each", "bulk", "", "Gbit/s", "CPU s/GB"
    )
}

/// A peer's row. Its own share of the CPU is what it takes more than the first, which is plain routing.
fn row(line: &Line, first: Option<&Line>) -> String {
    let first = first.unwrap_or(line);
    format!(
        "{:<18} {} {} {:>8.2} {:>8.2}",
        line.peer,
        columns(&line.keep_alive, &first.keep_alive),
        columns(&line.a_connection_each, &first.a_connection_each),
        line.bulk.gbits_per_second,
        line.bulk.cpu_s_per_gbyte
    )
}

fn columns(requests: &Requests, first: &Requests) -> String {
    let errors = if requests.errors > 0 { "!" } else { "" };
    let per_second = format!("{errors}{:.0}", requests.per_second);
    let Requests { p50_us, p99_us, cpu_us, .. } = requests;
    format!("{per_second:>10} {p50_us:>7.0} {p99_us:>7.0} {cpu_us:>7.1} {:>7.1}", cpu_us - first.cpu_us)
}

fn measure(peer: Peer, options: &Options) -> Result<Line> {
    let stage = Stage::new(peer)?;
    let load = |keep_alive| requests(stage.client(), stage.target, keep_alive, options.connections, options.seconds);
    let rounds = |keep_alive| -> Result<Requests> {
        let all = (0..options.rounds).map(|_| load(keep_alive)).collect::<Result<Vec<_>>>()?;
        all.into_iter().min_by(|one, other| one.cpu_us.total_cmp(&other.cpu_us)).context("there is at least one round")
    };
    let keep_alive = rounds(true)?;
    let a_connection_each = rounds(false)?;
    let all = (0..options.rounds).map(|_| bulk(stage.client(), stage.target, options.seconds)).collect::<Result<Vec<_>>>()?;
    let bulk = all
        .into_iter()
        .max_by(|one, other| one.gbits_per_second.total_cmp(&other.gbits_per_second))
        .context("there is at least one round")?;
    Ok(Line { peer: peer.to_string(), keep_alive, a_connection_each, bulk })
}
