//! `cargo xtask bench contention`: new connections on two CPUs at once.
//!
//! How it measures stands in [`bpfvs_tests::speed::contention`].

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{skip, speed::contention};
use clap::Parser;

/// Measure new connections on two CPUs at once: nanoseconds for each, the median and the minimum.
#[derive(Debug, Parser)]
struct Options {
    /// Write all figures to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often each has its turn.
    #[arg(long, value_name = "NUMBER", default_value_t = 40)]
    rounds: usize,
}

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(
        skip::is_root(),
        "the bench makes network namespaces and loads programs, which needs root: `cargo xtask bench contention`"
    );
    let figures = contention::measure(&[1, 16, 64], options.rounds)?;
    for line in &figures {
        println!("{line}");
    }
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&figures)? + "\n";
        fs::write(file, text).with_context(|| format!("write the figures to {}", file.display()))?;
    }
    Ok(())
}
