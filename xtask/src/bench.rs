//! `cargo xtask bench`: builds bpfvs and runs the benchmark of the `tests` package as root.
//!
//! The datapath is optimised in every profile, and nothing else is timed, so the ordinary build will do. The figures are
//! printed, and written as JSON to `bench.json` in cargo's target directory, or where `--json` says.

use std::{ffi::OsString, path::PathBuf};

use anyhow::Result;

use crate::{
    build::{self, Profile},
    command::{as_root, assignment, cargo, run as execute, say, target_directory},
    setup::{self, Purpose},
};

/// What the benchmark is told.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Fewer rounds, and no table of a million flows
    #[arg(long)]
    quick: bool,
    /// Writes the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Further options of the benchmark itself (`-- --help` lists them)
    #[arg(last = true, value_name = "OPTIONS")]
    further: Vec<OsString>,
}

/// Builds and measures.
pub(crate) fn run(options: &Options) -> Result<()> {
    setup::programs(Purpose::Test)?;
    let program = build::bpfvs(Profile::Debug)?;
    execute(cargo().args(["build", "--package", "bpfvs-tests", "--bin", "bench"]))?;
    let figures = options.json.clone().unwrap_or_else(|| target_directory().join("bench.json"));
    let mut command = as_root("env")?;
    command.arg(assignment("BPFVS_BIN", program.as_os_str()));
    // The build of bpfvs leaves it there, whatever the profile.
    let floor = target_directory().join("ebpf/bpfel-unknown-none/release/floor");
    command.arg(assignment("BPFVS_FLOOR", floor.as_os_str()));
    command.arg(program.with_file_name("bench")).arg("--json").arg(&figures);
    if options.quick {
        command.arg("--quick");
    }
    execute(command.args(&options.further))?;
    say(&format!("The figures are in {}.", figures.display()));
    Ok(())
}
