//! `cargo xtask`: set-up, build, demo, test and bench of bpfvs; everything that a person types.
//!
//! Each command first sees to what it needs ([`setup`]), builds as the user who typed it ([`build`]), and becomes root, with
//! sudo, only for what needs root. Every command that runs is printed. As this is the first thing that a newcomer
//! compiles, it depends on nothing that bpfvs itself does not need, with the same features, so that nothing is compiled
//! twice; and it knows bpfvs only by its command line.

mod attach;
mod bench;
mod build;
mod command;
mod demo;
mod package;
mod setup;
mod test;
#[path = "../../lb-ebpf/toolchain.rs"]
mod toolchain;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

/// Set-up, build, demo, test and bench of bpfvs.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    /// Finds or installs what the build needs; every other command does so, too
    Setup,
    /// Builds bpfvs
    Build(build::Options),
    /// Builds bpfvs and runs its daemon on this machine's interfaces, until Ctrl-C
    Attach(attach::Options),
    /// Shows balanced HTTP requests in network namespaces of its own
    Demo(demo::Options),
    /// Runs all checks and tests
    Test(test::Options),
    /// Measures the verifier's work for each program and compares it with the committed budget
    Budget(test::BudgetOptions),
    /// Runs the golden cases of ipvsadm; the last line says how many passed
    Golden(test::GoldenOptions),
    /// Measures the datapath: nanoseconds per packet
    Bench(bench::Options),
    /// Makes the manual pages
    Man,
    /// Makes a Debian package
    Deb(package::Options),
}

fn main() -> ExitCode {
    match run(Command::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Setup => setup::setup()?,
        Command::Build(options) => build::run(&options)?,
        Command::Attach(options) => attach::run(&options)?,
        Command::Demo(options) => return demo::run(&options),
        Command::Test(options) => return test::run(&options),
        Command::Budget(options) => test::budget(options)?,
        Command::Golden(options) => test::golden(&options)?,
        Command::Bench(options) => bench::run(&options)?,
        Command::Man => package::man()?,
        Command::Deb(options) => package::run(&options)?,
    }
    Ok(ExitCode::SUCCESS)
}
