//! `scale`: a director with as much of everything as it is made for. See [`bpfvs_tests::scale`].

use anyhow::{Result, ensure};
use bpfvs_tests::{
    latency::measure,
    scale::{FLOWS, Scale, Size},
    skip,
    speed::stage::last_cpu,
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
    /// Only ping through the director, in so many turns with the sweep at work and as many without
    #[arg(long, value_name = "TURNS")]
    latency: Option<usize>,
}

fn main() -> Result<()> {
    let Options { services, connections, latency } = Options::parse();
    ensure!(skip::is_root(), "it makes a network namespace and loads programs, which needs root");
    if let Some(turns) = latency {
        let last = last_cpu()?;
        for (what, cpu) in [("on the CPU that sweeps", last), ("on another", 0)] {
            let [without, with] = measure(u32::try_from(connections)?, cpu, last, turns)?;
            println!("packets {what}\n  without {without}\n  with    {with}");
        }
        return Ok(());
    }
    let busy = u32::try_from(connections / FLOWS)?.max(1);
    ensure!(busy <= services, "{connections} connections need {busy} services; name more by --services");
    let mut scale = Scale::new(Size { services, busy })?;
    let outcome = scale.run();
    // Even if it broke off: what was measured until then.
    print!("{scale}");
    outcome
}
