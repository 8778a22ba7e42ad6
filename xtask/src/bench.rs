//! `cargo xtask bench`: builds bpfvs and runs the benchmark of the `tests` package as root.
//!
//! The datapath is optimised in every profile, and nothing else is timed, so the ordinary build will do. The figures are
//! printed, and written as JSON to `bench.json` in cargo's target directory, or where `--json` says.
//!
//! With `--write` the figures also go to `docs/bench`, and the tables into `docs/performance.md`. Its status is 1 if something got
//! worse than the last run there.
//!
//! `cargo xtask bench peers` measures bpfvs beside plain routing, nftables, HAProxy and nginx, with wrk and iperf3; `table` a
//! prototype of another connection table beside the kernel's hash map; `contention` new connections on two CPUs at once.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use anyhow::Result;

use crate::{
    build::{self, Profile},
    command::{as_root, assignment, cargo, run as execute, say, target_directory},
    setup::{self, Purpose},
};

/// What the benchmark is told.
#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: Option<What>,
    /// Fewer rounds, no table of a million flows, no crowds of services
    #[arg(long)]
    quick: bool,
    /// Writes the tables into docs/performance.md and the figures into docs/bench
    #[arg(long)]
    write: bool,
    /// Writes the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Further options of the benchmark itself (`-- --help` lists them)
    #[arg(last = true, value_name = "OPTIONS")]
    further: Vec<OsString>,
}

/// What else can be measured.
#[derive(clap::Subcommand)]
enum What {
    /// bpfvs beside plain routing, nftables, HAProxy and nginx: requests, throughput, CPU
    Peers(Peers),
    /// A prototype of another connection table beside the kernel's hash map: nanoseconds for each operation
    Table(Study),
    /// New connections on two CPUs at once: what they wait for
    Contention(Study),
}

impl What {
    /// The program of a study, and what it is told.
    const fn study(&self) -> Option<(&'static str, &Study)> {
        match self {
            Self::Peers(_) => None,
            Self::Table(study) => Some(("table", study)),
            Self::Contention(study) => Some(("contention", study)),
        }
    }
}

/// What the benchmark of a study is told.
#[derive(clap::Args)]
struct Study {
    /// Writes the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Further options of the benchmark itself (`-- --help` lists them)
    #[arg(last = true, value_name = "OPTIONS")]
    further: Vec<OsString>,
}

/// What the benchmark of peers is told.
#[derive(clap::Args)]
struct Peers {
    /// Writes the table into docs/performance.md and the figures into docs/bench
    #[arg(long)]
    write: bool,
    /// Writes the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Further options of the benchmark itself (`-- --help` lists them)
    #[arg(last = true, value_name = "OPTIONS")]
    further: Vec<OsString>,
}

/// Builds and measures.
pub(crate) fn run(options: &Options) -> Result<()> {
    if let Some(What::Peers(peers)) = &options.what {
        setup::programs(Purpose::Peers)?;
        let figures = peers.json.clone().unwrap_or_else(|| target_directory().join("peers.json"));
        return measure(Profile::Release, "peers", &figures, flag("--write", peers.write).iter().chain(&peers.further));
    }
    if let Some((name, study)) = options.what.as_ref().and_then(What::study) {
        setup::programs(Purpose::Test)?;
        let figures = study.json.clone().unwrap_or_else(|| target_directory().join(name).with_extension("json"));
        return measure(Profile::Debug, name, &figures, &study.further);
    }
    setup::programs(Purpose::Test)?;
    let figures = options.json.clone().unwrap_or_else(|| target_directory().join("bench.json"));
    let (quick, write) = (flag("--quick", options.quick), flag("--write", options.write));
    measure(Profile::Debug, "bench", &figures, quick.iter().chain(&write).chain(&options.further))
}

fn flag(name: &str, is_set: bool) -> Option<OsString> {
    is_set.then(|| name.into())
}

fn measure<'a>(profile: Profile, name: &str, figures: &Path, options: impl IntoIterator<Item = &'a OsString>) -> Result<()> {
    let program = build::bpfvs(profile)?;
    execute(cargo().args(["build", "--package", "bpfvs-tests", "--bin", name]))?;
    let mut command = as_root("env")?;
    command.arg(assignment("BPFVS_BIN", program.as_os_str()));
    // The build of bpfvs leaves it there, whatever the profile.
    let floor = target_directory().join("ebpf/bpfel-unknown-none/release/floor");
    command.arg(assignment("BPFVS_FLOOR", floor.as_os_str()));
    command.arg(target_directory().join("debug").join(name)).arg("--json").arg(figures);
    execute(command.args(options))?;
    say(&format!("The figures are in {}.", figures.display()));
    Ok(())
}
