//! `cargo xtask bench`: builds bpfvs and runs the benchmark of the `tests` package as root.
//!
//! The datapath is optimised in every profile, and nothing else is timed, so the ordinary build will do. The figures are
//! printed, and written as JSON to `bench.json` in cargo's target directory, or where `--json` says.
//!
//! With `--write` the figures also go to `docs/bench`, and the tables into `docs/performance.md`. Its status is 1 if something got
//! worse than the last run there.
//!
//! `cargo xtask bench peers` measures bpfvs beside plain routing, nftables, HAProxy and nginx, with wrk and iperf3;
//! `cargo xtask bench table` a prototype of another connection table beside the kernel's hash map; `cargo xtask bench
//! contention` new connections on two CPUs at once.

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
    Table(Other),
    /// New connections on two CPUs at once: what they wait for
    Contention(Other),
}

/// What such a benchmark is told.
#[derive(clap::Args)]
struct Peers {
    /// Writes the table into docs/performance.md and the figures into docs/bench
    #[arg(long)]
    write: bool,
    #[command(flatten)]
    other: Other,
}

/// What other benchmarks are told.
#[derive(clap::Args)]
struct Other {
    /// Writes the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Further options of the benchmark itself (`-- --help` lists them)
    #[arg(last = true, value_name = "OPTIONS")]
    further: Vec<OsString>,
}

impl Other {
    /// Where the figures go.
    fn figures(&self, name: &str) -> PathBuf {
        self.json.clone().unwrap_or_else(|| target_directory().join(name).with_extension("json"))
    }
}

/// Builds and measures.
pub(crate) fn run(options: &Options) -> Result<()> {
    match &options.what {
        None => {}
        Some(What::Peers(Peers { write, other })) => {
            setup::programs(Purpose::Peers)?;
            return measure(
                Profile::Release,
                "peers",
                &other.figures("peers"),
                flag("--write", *write).iter().chain(&other.further),
            );
        }
        Some(What::Table(other)) => return measure(Profile::Debug, "table", &other.figures("table"), &other.further),
        Some(What::Contention(other)) => {
            setup::programs(Purpose::Test)?;
            return measure(Profile::Debug, "contention", &other.figures("contention"), &other.further);
        }
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
