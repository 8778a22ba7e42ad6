//! How many instructions a packet costs from end to end, beside the kernel's own IPVS: in a virtual machine whose clock counts
//! instructions, so that the figures of different runs can be compared. See [`bpfvs_tests::chain`].
//!
//! `data/instructions.json` holds the committed figures. More than 5 % above them fails, so that nothing becomes slow unnoticed;
//! `BPFVS_INSTRUCTIONS_UPDATE=1` writes them anew.

use std::{collections::BTreeMap, env, fs, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    bpfvs, needs_bpfvs, needs_machines,
    speed::harness,
    vm::{Machine, Version, machine::ipvs},
};
use serde::{Deserialize, Serialize};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/instructions.json");
/// So many times fewer instructions than IPVS for a packet of an established connection, by XDP.
const FEWER: f64 = 4.5;
/// A figure may grow by so much before somebody has to say that it may.
const GROWTH: f64 = 1.05;

/// Instructions for a packet.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Cost {
    established: f64,
    new: f64,
}

#[test]
fn packets_cost_fewer_instructions_than_with_the_kernels_ipvs() -> Result<()> {
    needs_machines!([Version::V6_12]);
    needs_bpfvs!();
    let ways = ["ipvs -g", "ipvs -i", "xdp -g", "xdp -i"];
    let machine = Machine::new(Version::V6_12)?
        .modules(ipvs(Version::V6_12))
        .deterministic()
        .add(Path::new(env!("CARGO_BIN_EXE_chain")), "/usr/local/bin/chain")?
        .add(&bpfvs::binary()?, "/usr/local/bin/bpfvs")?
        .file("/root/floor", fs::read(harness::object()?)?)
        .deadline(Duration::from_secs(500));
    let outcome =
        machine.run("export BPFVS_BIN=/usr/local/bin/bpfvs BPFVS_FLOOR=/root/floor; chain ipvs -g -i && chain xdp -g -i")?;
    ensure!(outcome.status == 0, "the guest: status {}:\n{}", outcome.status, outcome.output);
    let lines: Vec<&str> = outcome.output.lines().filter(|line| line.starts_with('{')).collect();
    ensure!(lines.len() == ways.len(), "the guest printed:\n{}", outcome.output);
    let mut costs = BTreeMap::new();
    for (way, line) in ways.into_iter().zip(lines) {
        let cost: Cost = serde_json::from_str(line).with_context(|| format!("read {line}"))?;
        println!(
            "{way}: {:.0} instructions for a packet of an established connection, {:.0} for a new one",
            cost.established, cost.new
        );
        costs.insert(way.to_owned(), cost);
    }
    let ratio = costs["ipvs -g"].established / costs["xdp -g"].established;
    ensure!(ratio >= FEWER, "direct routing by XDP takes only {ratio:.2} times fewer instructions than by the kernel's IPVS");
    if env::var_os("BPFVS_INSTRUCTIONS_UPDATE").is_some() {
        return Ok(fs::write(FILE, serde_json::to_string_pretty(&costs)? + "\n")?);
    }
    let text = fs::read_to_string(FILE).with_context(|| format!("read {FILE}"))?;
    let committed: BTreeMap<String, Cost> = serde_json::from_str(&text).with_context(|| format!("read {FILE}"))?;
    for (way, cost) in costs.iter().filter(|(way, _)| !way.starts_with("ipvs")) {
        let before = committed.get(way).with_context(|| format!("{FILE} has no `{way}`; BPFVS_INSTRUCTIONS_UPDATE=1 writes it"))?;
        let growth = cost.established / before.established;
        ensure!(
            growth <= GROWTH,
            "`{way}`: {:.0} instructions instead of {:.0}; make it cheaper, or write the new figure down on purpose: BPFVS_INSTRUCTIONS_UPDATE=1",
            cost.established,
            before.established
        );
    }
    Ok(())
}
