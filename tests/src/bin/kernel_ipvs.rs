//! Plays scripts on the kernel's own IPVS, and prints what it did with each as a line of JSON. It runs in the guest of a
//! virtual machine: see [`bpfvs_tests::differential`].
//!
//! ```text
//! kernel_ipvs FIRST_SEED COUNT
//! ```

use anyhow::Result;
use bpfvs_tests::differential::{player, script::Script, wire::Wire};
use clap::Parser;

/// Play scripts on the kernel's own IPVS.
#[derive(Debug, Parser)]
struct Options {
    /// The first script's seed.
    first: u64,
    /// How many scripts.
    count: u64,
}

fn main() -> Result<()> {
    let Options { first, count } = Options::parse();
    let scripts: Vec<_> = (first..first + count).map(Script::new).collect();
    let wire = Wire::new()?;
    for record in player::play(&scripts, &wire.director, &wire)? {
        println!("{}", serde_json::to_string(&record)?);
    }
    Ok(())
}
