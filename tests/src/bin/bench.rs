//! `cargo xtask bench`: nanoseconds per packet, for each hook, family, path and size of the connection table.
//!
//! How it measures stands in [`bpfvs_tests::speed`].

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    lab::Family,
    skip,
    speed::{
        Case, Path,
        measure::{Effort, measure},
        picks,
        report::{Line, Machine, NOTES, Report, commit},
        stage::{Stage, last_cpu},
        staleness,
    },
    test_run::Hook,
};
use clap::Parser;

/// Measure the datapath: nanoseconds per packet.
///
/// Makes a network namespace with a director of its own; nothing else on this machine is touched.
#[derive(Debug, Parser)]
struct Options {
    /// Fewer rounds, and no table of a million flows: half a minute instead of some.
    #[arg(long)]
    quick: bool,
    /// Write all figures to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often each program has its turn.
    #[arg(long, value_name = "NUMBER")]
    rounds: Option<usize>,
    /// Only cases whose line begins with this, as in `xdp IPv4`; `picks` and `staleness` are two more.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// The CPU to measure on; without it the last one.
    #[arg(long, value_name = "NUMBER")]
    cpu: Option<usize>,
    /// The size of the connection tables; it takes some 500 bytes of memory for each, with both families and the floor's.
    #[arg(long, value_name = "NUMBER")]
    max_connections: Option<u32>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(skip::is_root(), "the bench makes a network namespace and loads programs, which needs root: `cargo xtask bench`");
    let sizes: &[u64] = if options.quick { &[1, 1 << 16] } else { &[1, 1 << 16, 1 << 20] };
    let rounds = options.rounds.unwrap_or(if options.quick { 5 } else { 15 }).max(1);
    let max_connections = options.max_connections.unwrap_or(if options.quick { 500_000 } else { 2_500_000 });
    let cpu = options.cpu.map_or_else(last_cpu, Ok)?;
    let mut report = Report {
        machine: Machine::this(),
        commit: commit(),
        max_connections,
        rounds,
        cpu,
        notes: NOTES,
        cases: Vec::new(),
        picks: Vec::new(),
        staleness: Vec::new(),
    };
    println!("{report}");
    report.cases = packets(&options, sizes, rounds, max_connections, cpu)?;
    if "picks".starts_with(&options.only) {
        println!("\nnew connections at xdp, by scheduler and number of real servers");
        report.picks = picks::measure(cpu, rounds)?;
        report.picks.iter().for_each(|line| println!("{line}"));
    }
    if "staleness".starts_with(&options.only) {
        println!("\n{}", staleness::HEADING);
        for scheduler in staleness::SCHEDULERS {
            let line = staleness::measure(scheduler)?;
            println!("{line}");
            report.staleness.push(line);
        }
    }
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        fs::write(file, text).with_context(|| format!("write the figures to {}", file.display()))?;
    }
    Ok(())
}

/// The cases that begin with what was asked for.
fn packets(options: &Options, sizes: &[u64], rounds: usize, max_connections: u32, cpu: usize) -> Result<Vec<Line>> {
    let mut cases = Vec::new();
    for family in Family::ALL {
        for &flows in sizes {
            for hook in Hook::ALL {
                let all = Path::all(hook).iter().map(|&path| Case { hook, family, path, flows });
                cases.extend(all.filter(|case| case.to_string().starts_with(&options.only)));
            }
        }
    }
    if cases.is_empty() {
        return Ok(Vec::new());
    }
    println!("{}", Line::heading());
    Stage::new(max_connections)?.enter(cpu, |act| {
        let mut lines = Vec::new();
        for case in cases {
            let line = Line::new(case, measure(act, case, Effort { rounds })?);
            println!("{line}");
            lines.push(line);
        }
        Ok(lines)
    })
}
