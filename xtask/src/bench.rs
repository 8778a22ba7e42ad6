//! `cargo xtask bench`: builds the optimised program and runs the benchmark of the `tests` package as root.
//!
//! Options after the command belong to the benchmark (`cargo xtask bench -- --help`). Its figures are printed, and written
//! as JSON to `bench.json` in cargo's target directory.

use std::ffi::OsString;

use anyhow::Result;

use crate::{
    build::{self, Profile},
    command::{as_root, assignment, cargo, run as execute, say, target_directory},
    setup::{self, Purpose},
};

/// What the benchmark is told.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Options of the benchmark itself
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
    options: Vec<OsString>,
}

/// Builds and measures.
pub(crate) fn run(options: &Options) -> Result<()> {
    setup::programs(Purpose::Test)?;
    let program = build::bpfvs(Profile::Release)?;
    execute(cargo().args(["build", "--release", "--package", "bpfvs-tests", "--bin", "bench"]))?;
    let figures = target_directory().join("bench.json");
    let mut command = as_root("env")?;
    command.arg(assignment("BPFVS_BIN", program.as_os_str()));
    command.arg(program.with_file_name("bench")).arg("--json").arg(&figures).args(&options.options);
    execute(&mut command)?;
    say(&format!("The figures are in {}.", figures.display()));
    Ok(())
}
