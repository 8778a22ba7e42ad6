//! `cargo xtask bench`: where every claim about the datapath's speed comes from.
//!
//! How it measures stands in [`bpfvs_tests::speed`]. Its status is 1 if something got worse than the last committed run.

use std::{
    fmt::Display,
    fs, mem,
    path::{Path as File, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    lab::Family,
    skip,
    speed::{
        Case, Path, crowd, document,
        measure::{Effort, measure},
        picks,
        report::{Line, Machine, NOTES, PICKS, Report, commit},
        stage::{Act, Stage, last_cpu},
        staleness, steps,
        target::{Standing, obstacle},
        verdict::{Before, DIRECTORY},
        weight,
    },
    test_run::Hook,
};
use clap::Parser;

/// The table for the case that it is full.
const FULL: u32 = 1 << 10;
/// Flows in the largest table that is no exception.
const MILLION: u64 = 1 << 20;
/// Connections that a table has room for besides its flows.
const ROOM: u32 = 1 << 17;

/// Measure the datapath: nanoseconds per packet, instructions, bytes.
///
/// Makes network namespaces with directors of their own; nothing else on this machine is touched.
#[derive(Debug, Parser)]
struct Options {
    /// Fewer rounds, no table of a million flows, no crowds: a minute instead of some.
    #[arg(long)]
    quick: bool,
    /// Tables of 4 and 8 million flows, too; they take some 6 GiB of memory.
    #[arg(long)]
    large: bool,
    /// Write all figures to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the tables into docs/performance.md, and the figures into docs/bench if they are all.
    #[arg(long)]
    write: bool,
    /// Compare with this run; without it with the last one in docs/bench.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Go on with the figures in this file: only the steps, and cases that miss what they must keep to or got worse, are measured again,
    /// with programs that are loaded anew; the best counts. For machines whose other guests are noisy in turns.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "large", "only", "flows", "max_connections"])]
    again: Option<PathBuf>,
    /// How often each program has its turn.
    #[arg(long, value_name = "NUMBER")]
    rounds: Option<usize>,
    /// How often to load the programs anew, at most, for cases that miss what they must keep to or got worse; the best counts.
    #[arg(long, value_name = "NUMBER", default_value_t = 10)]
    loads: usize,
    /// Only cases whose line begins with this, as in `xdp IPv4`; `steps`, `crowds`, `picks`, `staleness` and `weight` are more.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Only with so many flows in the tables; powers of two.
    #[arg(long, value_name = "NUMBER", value_delimiter = ',')]
    flows: Vec<u64>,
    /// The CPU to measure on; without it the last one.
    #[arg(long, value_name = "NUMBER")]
    cpu: Option<usize>,
    /// The size of the connection tables; without it, what the largest number of flows needs. 4 and 8 million have tables of their own.
    #[arg(long, value_name = "NUMBER")]
    max_connections: Option<u32>,
}

impl Options {
    /// Whether something is to be measured besides the cases.
    fn wants(&self, what: &str) -> bool {
        what.starts_with(&self.only) && (self.again.is_none() || what == "steps")
    }

    /// The cases to measure, in an order in which tables have to be filled anew seldom.
    fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        let mut sizes = match self {
            Self { flows, .. } if !flows.is_empty() => flows.clone(),
            Self { quick: true, .. } => vec![1, 1 << 16],
            _ => vec![1, 1 << 10, 1 << 16, 1 << 17, MILLION],
        };
        if self.large {
            sizes.extend([1 << 22, 1 << 23]);
        }
        for family in Family::ALL {
            for connections in [Path::Routed, Path::Datagram, Path::Masqueraded, Path::FullNat] {
                for &flows in &sizes {
                    for hook in Hook::ALL {
                        let paths = Path::ALL.into_iter().filter(|path| path.connections() == connections && path.exists_at(hook));
                        cases.extend(paths.filter(|path| path.depends_on(flows)).map(|path| Case { hook, family, path, flows }));
                    }
                }
            }
        }
        cases.retain(|case| case.to_string().starts_with(&self.only));
        cases
    }

    /// The cases with a table that is full.
    fn full_cases(&self) -> Vec<Case> {
        let of = |family| Hook::ALL.map(|hook| Case { hook, family, path: Path::Full, flows: FULL.into() });
        Family::ALL.into_iter().flat_map(of).filter(|case| case.to_string().starts_with(&self.only)).collect()
    }
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    ensure!(skip::is_root(), "the bench makes network namespaces and loads programs, which needs root: `cargo xtask bench`");
    let rounds = options.rounds.unwrap_or(if options.quick { 3 } else { 5 }).max(1);
    let mut cases = options.cases();
    let most = cases.iter().map(|case| case.flows).filter(|flows| *flows <= MILLION).max().unwrap_or(1) as u32;
    let max_connections = options.max_connections.unwrap_or(most + ROOM);
    let cpu = options.cpu.map_or_else(last_cpu, Ok)?;
    let before = options.compare.as_deref().map_or_else(Before::last, |file| Before::read(file).map(Some))?;
    let new = || -> Result<_> {
        Ok(Report {
            machine: Machine::this(),
            commit: commit(),
            day: document::today()?,
            max_connections,
            rounds,
            cpu,
            notes: NOTES,
            cases: Vec::new(),
            steps: Vec::new(),
            crowds: Vec::new(),
            picks: Vec::new(),
            staleness: Vec::new(),
            programs: Vec::new(),
            connections: Vec::new(),
            worse: Vec::new(),
            not_measured: Vec::new(),
        })
    };
    let mut report = options.again.as_deref().map_or_else(new, Report::read)?;
    if let Some(file) = &options.again {
        let programs = weight::programs(Stage::new(FULL, 0)?.bench())?;
        ensure!(
            programs == report.programs,
            "{} has the figures of other programs than these; begin anew, without --again",
            file.display()
        );
        cases = report.cases.iter().map(Line::case).filter(|case| case.path != Path::Full).collect();
    }
    println!("{report}");
    if report.machine.load > 0.5 {
        println!("THIS MACHINE IS BUSY (load {}): ratios bear that to a degree, nanoseconds do not.\n", report.machine.load);
    }
    if !options.large && options.only.is_empty() && options.again.is_none() {
        report.not_measured.push("4 and 8 million flows: `--large` measures them, and takes some 6 GiB of memory".to_owned());
    }
    if options.quick {
        report
            .not_measured
            .push("tables of a thousand flows, 128 Ki and a million; 65,535 real servers and 10,000 services: --quick".to_owned());
    }
    let effort = Effort { rounds };
    packets(&options, &mut report, &cases, effort, before.as_ref())?;
    if options.wants("steps") {
        println!("\n{}", steps::heading());
        let all = |act: &mut Act<'_>| -> Result<Vec<_>> {
            let sizes = [1, 1 << 16].into_iter().map(|flows| steps::measure(act, flows, effort));
            Ok(sizes.collect::<Result<Vec<_>>>()?.concat())
        };
        let loads = (0..options.loads.max(1)).map(|load| Stage::new(1 << 17, load)?.enter(cpu, all));
        report.steps = steps::best(loads.collect::<Result<_>>()?);
        show(&report.steps);
    }
    if options.wants("crowds") {
        println!("\n{}", crowd::heading());
        report.crowds = crowd::measure(cpu, rounds, options.quick)?;
        show(&report.crowds);
    }
    if options.wants("picks") {
        println!("\n{PICKS}");
        report.picks = picks::measure(cpu, rounds)?;
        show(&report.picks);
    }
    if options.wants("staleness") {
        println!("\n{}", staleness::HEADING);
        for scheduler in staleness::SCHEDULERS {
            let line = staleness::measure(scheduler)?;
            println!("{line}");
            report.staleness.push(line);
        }
    }
    if options.wants("weight") {
        weigh(&mut report, cpu)?;
    }
    let code = conclude(&mut report, before.as_ref());
    let text = serde_json::to_string_pretty(&report)? + "\n";
    // A part of the figures would be nothing to compare the next run with.
    let committed = (options.write && options.only.is_empty()).then(|| File::new(DIRECTORY).join(format!("{}.json", report.day)));
    for file in options.json.iter().chain(&committed) {
        fs::write(file, &text).with_context(|| format!("write the figures to {}", file.display()))?;
    }
    if options.write {
        for (name, table) in report.tables() {
            document::write(name, &table)?;
        }
        println!("The tables are in {}.", document::FILE);
    }
    Ok(code)
}

/// Measures the cases. Those that miss what they must keep to, or got worse, get another chance with programs that are loaded anew.
fn packets(options: &Options, report: &mut Report, cases: &[Case], effort: Effort, before: Option<&Before>) -> Result<()> {
    // What has a table of its own, is never missed.
    let full = if options.again.is_none() { options.full_cases() } else { Vec::new() };
    if cases.is_empty() && full.is_empty() {
        return Ok(());
    }
    println!("{}", Line::heading());
    let mut lines: Vec<(Case, Line)> = mem::take(&mut report.cases).into_iter().map(|line| (line.case(), line)).collect();
    for load in 1..=options.loads.max(1) {
        let is_due = |case: &&Case| match lines.iter().find(|(known, _)| known == *case) {
            None => true,
            Some((_, line)) => is_bad(line, **case, before),
        };
        let due: Vec<Case> = cases.iter().filter(is_due).copied().collect();
        let due_full: Vec<Case> = if load == 1 { full.clone() } else { Vec::new() };
        if due.is_empty() && due_full.is_empty() {
            break;
        }
        if load > 1 {
            println!("\nanother load of the programs, for {} cases that miss a must or got worse; the best counts", due.len());
        }
        // Few flows in a table for millions would lie further apart than in one that is made for them; and to make a table takes less
        // time than to take millions of connections out of one.
        let (large, due): (Vec<_>, Vec<_>) = due.into_iter().partition(|case| case.flows > MILLION);
        let for_large = large.iter().map(|case| case.flows as u32 + ROOM).max().unwrap_or(0);
        let large = large.chunk_by(|one, other| one.family == other.family && one.path.connections() == other.path.connections());
        let tables = [(due, report.max_connections)].into_iter().chain(large.map(|cases| (cases.to_vec(), for_large)));
        for (cases, max_connections) in tables.chain([(due_full, FULL)]).filter(|(cases, _)| !cases.is_empty()) {
            Stage::new(max_connections, load - 1)?.enter(report.cpu, |act| {
                for case in cases {
                    let figures = measure(act, case, effort)?;
                    let known = lines.iter_mut().find(|(known, _)| *known == case);
                    let figures = known.as_ref().map_or(figures, |(_, line)| line.figures.best(figures));
                    let line = Line::new(case, figures);
                    println!("{line}");
                    match known {
                        Some(known) => known.1 = line,
                        None => lines.push((case, line)),
                    }
                }
                Ok(())
            })?;
        }
    }
    report.worse = lines.iter().filter_map(|(case, line)| before?.of_case(*case, line)).collect();
    let missed: Vec<_> = lines
        .iter()
        .filter_map(|(case, line)| Some((case, line, line.target?, line.standing?)))
        .filter(|(.., standing)| *standing != Standing::Stretched)
        .collect();
    for (what, standing) in [("must", Standing::Missed), ("stretch", Standing::Met)] {
        println!("\n{what} missed:");
        for (case, line, target, _) in missed.iter().filter(|(.., is)| *is == standing) {
            let wanted = if standing == Standing::Missed { target.must } else { target.stretch.unwrap_or(target.must) };
            println!("  {case}: {:.1} of {wanted:.1}; {}", line.figures.director.minimum, obstacle(**case, &line.figures, target));
        }
    }
    report.cases = lines.into_iter().map(|(_, line)| line).collect();
    Ok(())
}

/// Whether a case deserves another chance.
fn is_bad(line: &Line, case: Case, before: Option<&Before>) -> bool {
    line.standing == Some(Standing::Missed) || before.is_some_and(|before| before.of_case(case, line).is_some())
}

fn show(lines: &[impl Display]) {
    for line in lines {
        println!("{line}");
    }
}

fn weigh(report: &mut Report, cpu: usize) -> Result<()> {
    const CAPACITY: u32 = 1 << 20;
    let mut stage = Stage::new(CAPACITY, 0)?;
    report.programs = weight::programs(stage.bench())?;
    report.connections = weight::tables(&mut stage, cpu, CAPACITY)?;
    println!("\n{}", weight::Program::heading());
    show(&report.programs);
    println!("\n{}", weight::Connections::heading());
    show(&report.connections);
    Ok(())
}

/// Says what was not measured, and what got worse than before.
fn conclude(report: &mut Report, before: Option<&Before>) -> ExitCode {
    for what in &report.not_measured {
        println!("\nNOT MEASURED: {what}");
    }
    let Some(before) = before else {
        println!("\nThere is no committed run in docs/bench to compare with.");
        return ExitCode::SUCCESS;
    };
    let counts = before.of_counts(report);
    report.worse.extend(counts);
    println!("\nBeside {}:", before.file.display());
    if report.worse.is_empty() {
        println!("nothing got worse: ratios to the floors, verified instructions, machine code, bytes for each connection.");
        return ExitCode::SUCCESS;
    }
    for worse in &report.worse {
        println!("WORSE {worse}");
    }
    ExitCode::FAILURE
}
