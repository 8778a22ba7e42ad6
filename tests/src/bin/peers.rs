//! `cargo xtask bench peers`: requests and throughput through bpfvs, and through those that people use instead.
//!
//! How it measures stands in [`bpfvs_tests::peers`].

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    peers::{
        load::{Bulk, Requests, bulk, requests},
        peer::Peer,
        stage::Stage,
    },
    skip,
    speed::report::{Machine, commit},
};
use clap::Parser;
use serde::Serialize;

/// Measure bpfvs beside its peers, in network namespaces of their own.
#[derive(Debug, Parser)]
struct Options {
    /// How long each load lasts, in seconds.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// How often each has its turn; the best counts.
    #[arg(long, default_value_t = 3)]
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
}

/// All that is known of a measurement.
#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    commit: Option<String>,
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
        seconds: options.seconds,
        rounds: options.rounds,
        connections: options.connections,
        peers: Vec::new(),
    };
    println!(
        "{:<20} {:>44} {:>44} {:>22}\n{:<20} {} {} {:>11} {:>10}",
        "",
        "requests over kept connections",
        "requests with a connection each",
        "bulk",
        "",
        heading(),
        heading(),
        "Gbit/s",
        "CPU s/GB"
    );
    for peer in Peer::all().into_iter().filter(|peer| peer.to_string().starts_with(&options.only)) {
        let line = measure(peer, &options).with_context(|| peer.to_string())?;
        println!(
            "{:<20} {} {} {:>11.2} {:>10.2}",
            line.peer,
            columns(&line.keep_alive),
            columns(&line.a_connection_each),
            line.bulk.gbits_per_second,
            line.bulk.cpu_s_per_gbyte
        );
        report.peers.push(line);
    }
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        fs::write(file, text).with_context(|| format!("write the figures to {}", file.display()))?;
    }
    Ok(())
}

fn heading() -> String {
    format!("{:>11} {:>9} {:>9} {:>12}", "1/s", "p50 us", "p99 us", "CPU us")
}

fn columns(requests: &Requests) -> String {
    let errors = if requests.errors > 0 { "!" } else { "" };
    let per_second = format!("{errors}{:.0}", requests.per_second);
    format!("{per_second:>11} {:>9.0} {:>9.0} {:>12.1}", requests.p50_us, requests.p99_us, requests.cpu_us)
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
