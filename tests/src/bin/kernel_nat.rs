//! Has conversations with the kernel's own IPVS between, and prints what came out and what was counted, as a line of JSON. It runs in the guest of a virtual machine: see [`bpfvs_tests::translation`].
//!
//! ```text
//! kernel_nat FIRST_SEED COUNT
//! ```

use anyhow::Result;
use bpfvs_tests::translation::{conversation::Conversation, player, wires::Wires};
use clap::Parser;

/// Have conversations with the kernel's own IPVS between.
#[derive(Debug, Parser)]
struct Options {
    /// The first conversation's seed.
    first: u64,
    /// How many conversations.
    count: u64,
}

fn main() -> Result<()> {
    let Options { first, count } = Options::parse();
    let conversations: Vec<_> = (first..first + count).map(Conversation::new).collect();
    let wires = Wires::new()?;
    player::set_up(&wires.director)?;
    let account = player::play(&conversations, &wires.director, &wires)?;
    println!("{}", serde_json::to_string(&account)?);
    Ok(())
}
