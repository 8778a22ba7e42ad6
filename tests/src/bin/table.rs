//! `cargo xtask bench table`: a prototype of another connection table beside the kernel's hash map, in one run.
//!
//! What the figures mean, and what was decided: `docs/decisions/connection-table.md`.

#![expect(clippy::cast_precision_loss, reason = "counts that are divided for people to read")]

use std::{fs, path::PathBuf, time::Instant};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    skip,
    speed::stage::last_cpu,
    tables::{Sizes, Tables, UserKey},
};
use clap::Parser;
use lb_common::{
    connection::ConnectionKey,
    family::{Ipv4, Ipv6},
    lines::{self, LINE, Memory as _},
    quarrel::Run,
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use serde::Serialize;

/// Measure a table of cache lines beside the kernel's hash map: nanoseconds for each operation.
#[derive(Debug, Parser)]
struct Options {
    /// Write all figures to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often each has its turn.
    #[arg(long, value_name = "NUMBER", default_value_t = 7)]
    rounds: usize,
    /// The CPU to measure on; without it the last one.
    #[arg(long, value_name = "NUMBER")]
    cpu: Option<usize>,
    /// How full the lines are, in per cent of their slots [default: IPv4 75, IPv6 60].
    #[arg(long, value_name = "PER CENT", value_parser = clap::value_parser!(u32).range(10..=90))]
    load: Option<u32>,
    /// Nothing larger than this many flows.
    #[arg(long, value_name = "NUMBER", default_value_t = 4 << 20)]
    flows: u64,
}

/// Operations in a sample.
const SAMPLE: u64 = 1 << 17;

/// What was measured of one size: each the minimum over all rounds, in nanoseconds by the clock, less what the harness takes.
#[derive(Debug, Serialize)]
struct Line {
    family: &'static str,
    flows: u64,
    table: &'static str,
    /// Entries of slots, in per cent; of the hash map, of its capacity.
    load: u32,
    /// A look-up of a flow that is there.
    hit: f64,
    /// A look-up of one that is not.
    miss: f64,
    /// An insertion, the mean over all flows while they came, in no order.
    fill: f64,
    /// An insertion into a table with so many flows. The hash map takes elements that were deleted just before.
    insert: f64,
    /// And a deletion.
    remove: f64,
    /// A walk over all, for each entry, in the kernel.
    walk: Option<f64>,
    /// The same in userspace, by mapped memory.
    walk_mapped: Option<f64>,
    /// Bytes of memory for each entry.
    bytes: Option<f64>,
    /// Entries in the stash, in per cent.
    stash: f64,
}

/// What stands above the lines: nanoseconds, bytes for each entry, and how many entries are in the stash.
const HEADING: &str = "family   flows table   load     hit    miss    fill  insert  remove    walk  mapped   bytes   stash";

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(skip::is_root(), "the bench loads programs, which needs root: `cargo xtask bench table`");
    let mut only = CpuSet::new();
    let cpu = options.cpu.map_or_else(last_cpu, Ok)?;
    only.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &only).with_context(|| format!("bind the measurement to CPU {cpu}"))?;
    println!("{HEADING}");
    let mut figures = Vec::new();
    for flows in [1, 1 << 10, 1 << 16, 1 << 20, 4 << 20].into_iter().filter(|flows| *flows <= options.flows) {
        figures.extend(measure::<ConnectionKey<Ipv4>>("IPv4", flows, options.load.unwrap_or(75), options.rounds)?);
        figures.extend(measure::<ConnectionKey<Ipv6>>("IPv6", flows, options.load.unwrap_or(60), options.rounds)?);
    }
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&figures)? + "\n";
        fs::write(file, text).with_context(|| format!("write the figures to {}", file.display()))?;
    }
    Ok(())
}

/// Measures both tables with so many flows, the lines at this load.
fn measure<K: UserKey>(family: &'static str, flows: u64, load: u32, rounds: usize) -> Result<[Line; 2]> {
    // Few flows have new ones beside them.
    let slots = (flows * 100).div_ceil(load.into()).max(1 << 14);
    let lines = (slots * K::STRIDE as u64).div_ceil(LINE as u64).next_multiple_of(2) as u32;
    // New flows need room, too.
    let hash = (flows + SAMPLE) as u32;
    let stash = (flows / 8 + SAMPLE) as u32;
    let mut sizes = Sizes { lines: [2; 2], stash, hash: [1; 2] };
    (sizes.lines[K::INDEX], sizes.hash[K::INDEX]) = (lines, hash);
    let tables = Tables::load(sizes)?;
    let suffix = K::SUFFIX.to_lowercase();
    let run = |name: &str, flows, flow, part, times: u64| -> Result<(Run, f64)> {
        let begin = Instant::now();
        let run = Run { flow, flows, part, ..Run::default() };
        let done = tables.run(&format!("{name}_{suffix}"), 0, run, times)?;
        Ok((done, begin.elapsed().as_secs_f64() * 1e9 / times as f64))
    };
    let mut fill = [0.0; 3];
    for (place, table) in [(1, "hash"), (2, "lines")] {
        let begin = Instant::now();
        for first in (0..flows).step_by(1 << 22) {
            let times = (flows - first).min(1 << 22);
            let done = run(&format!("{table}_insert"), flows, first, 0, times)?.0.done;
            ensure!(done == times, "{done} of {times} {family} flows have come into the {table}");
        }
        fill[place] = begin.elapsed().as_secs_f64() * 1e9 / flows as f64;
    }
    let stashed = tables.stashed::<K>()?.len() as f64 / flows as f64;
    let mut least = [[f64::INFINITY; 6]; 3];
    // New flows, as many as there is room for.
    let fresh = SAMPLE.min(flows / 64).max(2048);
    for round in 0..rounds as u64 {
        let flow = round * SAMPLE;
        for (place, table) in ["nothing", "hash", "lines"].into_iter().enumerate() {
            let least = &mut least[place];
            let mut note = |at: usize, taken: f64| least[at] = least[at].min(taken);
            if table == "nothing" {
                note(0, run("nothing", flows, flow, 0, SAMPLE)?.1);
                continue;
            }
            let (done, taken) = run(&format!("{table}_find"), flows, flow, 0, SAMPLE)?;
            ensure!(done.done == SAMPLE, "{} of {SAMPLE} flows were found in the {table}", done.done);
            note(0, taken);
            let (done, taken) = run(&format!("{table}_find"), flows, flow, 1 << 28, SAMPLE)?;
            ensure!(done.done == 0, "{} flows were found that nobody inserted", done.done);
            note(1, taken);
            // So many that many samples are no longer than others.
            let (mut inserted, mut removed) = (f64::INFINITY, f64::INFINITY);
            for part in 0..(SAMPLE / fresh).min(8) {
                let (done, taken) = run_new(&run, &format!("{table}_insert"), fresh, part)?;
                ensure!(done == fresh, "{done} of {fresh} new flows came into the {table}");
                inserted = inserted.min(taken);
                let (done, taken) = run_new(&run, &format!("{table}_remove"), fresh, part)?;
                ensure!(done == fresh, "{done} of {fresh} new flows were in the {table}");
                removed = removed.min(taken);
            }
            note(2, inserted);
            note(3, removed);
            let walked = if table == "lines" { u64::from(lines).min(1 << 23) } else { 1 };
            let (done, taken) = run(&format!("{table}_walk"), flows, 0, 0, walked)?;
            note(4, taken * walked as f64 / done.done as f64);
        }
        let mapped = tables.lines::<K>()?;
        let begin = Instant::now();
        let mut met = 0_u64;
        for index in 0..mapped.lines() {
            lines::visit(&mapped, index, |_: &K, found| met += u64::from(lines::read(&mapped, found).is_some()));
        }
        least[2][5] = least[2][5].min(begin.elapsed().as_secs_f64() * 1e9 / met as f64);
    }
    let nothing = least[0][0];
    let value = size_of::<K>() as f64;
    // The kernel's element: its head, key and value, each rounded up, and a bucket of 16 bytes for each.
    let of_hash = 48.0 + value + 16.0 + 16.0 * hash.next_power_of_two() as f64 / f64::from(hash);
    let of_lines = f64::from(lines) * 64.0 / flows as f64 + stashed * (48.0 + value + 64.0 + 16.0);
    // Of a table that is much larger than its few flows, these say nothing.
    let is_full = |figure| (slots * u64::from(load) / 100 <= flows + 1).then_some(figure);
    let line = |place: usize, table, load, bytes, walk_mapped: Option<f64>| {
        let [hit, miss, insert, remove, walk, _] = least[place];
        Line {
            family,
            flows,
            table,
            load,
            hit: hit - nothing,
            miss: miss - nothing,
            fill: fill[place] - nothing,
            insert: insert - nothing,
            remove: remove - nothing,
            walk: is_full(walk),
            walk_mapped: walk_mapped.and_then(is_full),
            bytes: is_full(bytes),
            stash: if table == "lines" { 100.0 * stashed } else { 0.0 },
        }
    };
    let figures = [line(1, "hash", 100, of_hash, None), line(2, "lines", load, of_lines, Some(least[2][5]))];
    for Line { family, flows, table, load, hit, miss, fill, insert, remove, walk, walk_mapped, bytes, stash } in &figures {
        let [walk, mapped, bytes] =
            [walk, walk_mapped, bytes].map(|figure| figure.map_or_else(|| "-".to_owned(), |figure| format!("{figure:.1}")));
        println!(
            "{family} {flows:>9} {table:<5} {load:>4} % {hit:>7.1} {miss:>7.1} {fill:>7.1} {insert:>7.1} {remove:>7.1} {walk:>7} {mapped:>7} {bytes:>7} {stash:>5.1} %"
        );
    }
    Ok(figures)
}

/// Does something with flows that are in no table otherwise.
fn run_new(run: &impl Fn(&str, u64, u64, u64, u64) -> Result<(Run, f64)>, name: &str, fresh: u64, part: u64) -> Result<(u64, f64)> {
    let (done, taken) = run(name, SAMPLE, part * fresh, 1 << 29, fresh)?;
    Ok((done.done, taken))
}
