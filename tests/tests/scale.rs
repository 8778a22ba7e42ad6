//! Five thousand real servers and 65,536 connections: they are all there, and the daemon's memory does not grow with
//! connections. `cargo run -p bpfvs-tests --bin scale` does the same with eight million.

use anyhow::{Result, ensure};
use bpfvs_tests::{
    needs, needs_bpfvs,
    scale::{Scale, Size},
};

/// What the daemon may take more for any number of connections: what it shows at a time.
const GROWTH: u64 = 8 << 20;

#[test]
fn connections_cost_the_daemon_nothing() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let mut scale = Scale::new(Size { services: 500, busy: 4 })?;
    scale.run()?;
    print!("{scale}");
    ensure!(scale.growth() <= GROWTH, "the daemon's memory has grown by {} bytes: {:?}", scale.growth(), scale.cost.memory);
    Ok(())
}
