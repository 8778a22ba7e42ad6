//! `scale`: a director with as much of everything as it is made for. See [`bpfvs_tests::scale`].

use anyhow::{Result, ensure};
use bpfvs_tests::{
    scale::{FLOWS, Scale, Size},
    skip,
};
use clap::Parser;

/// Load a director with services, real servers and connections, and check that all are there and do their part.
#[derive(Debug, Parser)]
struct Options {
    /// Virtual services, with ten real servers each
    #[arg(long, default_value_t = 10_000)]
    services: u32,
    /// Connections, about
    #[arg(long, default_value_t = 8_000_000)]
    connections: u64,
}

fn main() -> Result<()> {
    let Options { services, connections } = Options::parse();
    ensure!(skip::is_root(), "it makes a network namespace and loads programs, which needs root");
    let busy = u32::try_from(connections / FLOWS)?.max(1);
    ensure!(busy <= services, "{connections} connections need {busy} services; name more by --services");
    let mut scale = Scale::new(Size { services, busy })?;
    scale.connect()?;
    scale.check_counters()?;
    scale.sweep()?;
    scale.list()?;
    scale.clear_and_restore()?;
    scale.expire()?;
    print!("{scale}");
    Ok(())
}
