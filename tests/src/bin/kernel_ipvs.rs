//! Plays scripts on the kernel's own IPVS, and prints what it did with each as a line of JSON. It runs in the guest of a
//! virtual machine: see [`bpfvs_tests::differential`].
//!
//! ```text
//! kernel_ipvs FIRST_SEED COUNT                   schedulers
//! kernel_ipvs FIRST_SEED COUNT --persistence     templates
//! kernel_ipvs 0 0 --proc                         what monitoring reads
//! ```

use anyhow::Result;
use bpfvs_tests::differential::{persistence::Story, player, proc, script::Script, wire::Wire};
use clap::Parser;

/// Play scripts on the kernel's own IPVS.
#[derive(Debug, Parser)]
struct Options {
    /// The first script's seed.
    first: u64,
    /// How many scripts.
    count: u64,
    /// Stories of persistent services.
    #[arg(long)]
    persistence: bool,
    /// What monitoring reads.
    #[arg(long)]
    proc: bool,
}

/// Ticks in a second of Debian's kernels.
const CLOCK_RATE: u64 = 250;

fn main() -> Result<()> {
    let Options { first, count, persistence, proc } = Options::parse();
    let wire = Wire::new()?;
    if proc {
        println!("{}", serde_json::to_string(&proc::play(&wire.director, &wire, CLOCK_RATE)?)?);
        return Ok(());
    }
    if persistence {
        for seed in first..first + count {
            println!("{}", serde_json::to_string(&Story::new(seed).play(&wire.director, &wire)?)?);
        }
        return Ok(());
    }
    let scripts: Vec<_> = (first..first + count).map(Script::new).collect();
    for record in player::play(&scripts, &wire.director, &wire)? {
        println!("{}", serde_json::to_string(&record)?);
    }
    Ok(())
}
