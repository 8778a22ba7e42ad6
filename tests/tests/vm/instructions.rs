//! How many instructions a packet costs from end to end, beside the kernel's own IPVS: in a virtual machine whose clock counts
//! instructions, so that the figures of different runs can be compared. See [`bpfvs_tests::chain`].
//!
//! Half of such a figure is the wire: a director that sends everything back at once (`bare`) shows how much. What is compared is
//! what a director adds to that. `data/instructions.json` holds the committed figures. To add 5 % more than they say fails, so
//! that nothing becomes slow unnoticed; `BPFVS_INSTRUCTIONS_UPDATE=1` writes them anew, and the table in `docs/performance.md`.

use std::{collections::BTreeMap, env, fs, path::Path};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    bpfvs, needs_bpfvs, needs_machines,
    speed::{document, harness, steps::WORDS},
    vm::{Machine, Version, machine::ipvs},
};
use serde::{Deserialize, Serialize};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/instructions.json");
/// So many times fewer instructions than with IPVS for a packet of an established connection: by direct routing from end to end, by all
/// methods in what the director adds to the wire.
const FEWER: f64 = 4.5;
/// A figure may grow by so much before somebody has to say that it may.
const GROWTH: f64 = 1.05;

/// What direct routing may add to the wire for a packet of an established connection: 1500 in all were wanted on one that takes 1038.
const MOST: f64 = 1500.0 - 1038.0;
/// All ways.
const WAYS: [&str; 7] = ["bare", "ipvs -g", "ipvs -i", "ipvs -m", "xdp -g", "xdp -i", "xdp -m"];

/// Instructions for a packet.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Cost {
    established: f64,
    new: f64,
    /// Of a masqueraded real server.
    reply: Option<f64>,
}

/// A step of the way, and all before it.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Step {
    established: f64,
}

impl Cost {
    /// What it is more than another one.
    fn less(self, other: Self) -> Self {
        Self {
            established: self.established - other.established,
            new: self.new - other.new,
            reply: self.reply.map(|reply| reply - other.established),
        }
    }
}

#[test]
fn packets_cost_fewer_instructions_than_with_the_kernels_ipvs() -> Result<()> {
    needs_machines!([Version::V6_12]);
    needs_bpfvs!();
    let machine = Machine::new(Version::V6_12)?
        .modules(ipvs(Version::V6_12))
        .deterministic()
        .add(Path::new(env!("CARGO_BIN_EXE_chain")), "/usr/local/bin/chain")?
        .add(&bpfvs::binary()?, "/usr/local/bin/bpfvs")?
        .file("/root/floor", fs::read(harness::object()?)?);
    let outcome = machine
        .run("export BPFVS_BIN=/usr/local/bin/bpfvs BPFVS_FLOOR=/root/floor; chain bare && chain ipvs -g -i -m && chain xdp -g -i -m && chain steps")?;
    ensure!(outcome.status == 0, "the guest: status {}:\n{}", outcome.status, outcome.output);
    let lines: Vec<&str> = outcome.output.lines().filter(|line| line.starts_with('{')).collect();
    ensure!(lines.len() == WAYS.len() + WORDS.len(), "the guest printed:\n{}", outcome.output);
    let (lines, steps) = lines.split_at(WAYS.len());
    let mut costs = BTreeMap::new();
    for (way, line) in WAYS.into_iter().zip(lines.iter().copied()) {
        let cost: Cost = serde_json::from_str(line).with_context(|| format!("read {line}"))?;
        costs.insert(way.to_owned(), cost);
    }
    let steps = steps.iter().map(|line| Ok(serde_json::from_str::<Step>(line)?.established)).collect::<Result<Vec<_>>>()?;
    let steps = steps_table(&steps, &costs);
    println!("{}\n{steps}", table(&costs));
    let added = |costs: &BTreeMap<String, Cost>, way: &str| costs.get(way).map(|cost| cost.less(costs["bare"]));
    for method in ["-g", "-i", "-m"] {
        let of = |director: &str| added(&costs, &format!("{director} {method}")).context("all ways were measured");
        let (kernel, bpfvs) = (of("ipvs")?, of("xdp")?);
        let fewer = kernel.established / bpfvs.established;
        ensure!(fewer >= FEWER, "{method}: bpfvs adds only {fewer:.2} times fewer instructions than IPVS");
    }
    let fewer = costs["ipvs -g"].established / costs["xdp -g"].established;
    ensure!(fewer >= FEWER, "direct routing takes only {fewer:.2} times fewer instructions than IPVS, from end to end");
    let routed = added(&costs, "xdp -g").context("all ways were measured")?.established;
    ensure!(routed <= MOST, "direct routing adds {routed:.0} instructions to an established packet, and must not add {MOST:.0}");
    if env::var_os("BPFVS_INSTRUCTIONS_UPDATE").is_some() {
        document::write("instructions", &table(&costs))?;
        document::write("instructions-of-steps", &steps)?;
        return Ok(fs::write(FILE, serde_json::to_string_pretty(&costs)? + "\n")?);
    }
    let text = fs::read_to_string(FILE).with_context(|| format!("read {FILE}"))?;
    let committed: BTreeMap<String, Cost> = serde_json::from_str(&text).with_context(|| format!("read {FILE}"))?;
    for way in WAYS.into_iter().filter(|way| way.starts_with("xdp")) {
        let before =
            added(&committed, way).with_context(|| format!("{FILE} has no `{way}`; BPFVS_INSTRUCTIONS_UPDATE=1 writes it"))?;
        let now = added(&costs, way).context("all ways were measured")?;
        for (packet, before, now) in [
            ("an established connection", before.established, now.established),
            ("a new connection", before.new, now.new),
            ("a reply", before.reply.unwrap_or_default(), now.reply.unwrap_or_default()),
        ] {
            ensure!(
                now <= before * GROWTH,
                "`{way}` adds {now:.0} instructions instead of {before:.0} to a packet of {packet}; make it cheaper, or write the \
                 new figure down on purpose: BPFVS_INSTRUCTIONS_UPDATE=1"
            );
        }
    }
    Ok(())
}

/// What one step more costs, from the bare wire to the director.
fn steps_table(steps: &[f64], costs: &BTreeMap<String, Cost>) -> String {
    let mut lines = vec!["| step of an established packet, DR | instructions |\n| --- | --- |".to_owned()];
    let mut before = costs["bare"].established;
    let director = ("what the director keeps open besides", costs["xdp -g"].established);
    for (step, until) in WORDS.into_iter().zip(steps.iter().copied()).chain([director]) {
        lines.push(format!("| {step} | {:.0} |", until - before));
        before = until;
    }
    lines.join("\n")
}

/// The figures for people: from end to end, and in parentheses what a director adds to the bare wire.
fn table(costs: &BTreeMap<String, Cost>) -> String {
    let bare = costs["bare"];
    let mut lines = vec!["| | established | reply | new connection |\n| --- | --- | --- | --- |".to_owned()];
    lines.push(format!("| bare wire | {:.0} | | {:.0} |", bare.established, bare.new));
    for (method, words) in [("-g", "DR"), ("-i", "TUN"), ("-m", "NAT")] {
        let [kernel, bpfvs] = ["ipvs", "xdp"].map(|director| costs[&format!("{director} {method}")]);
        let column = |of: fn(Cost) -> Option<f64>, cost: Cost| {
            let all = of(cost).zip(of(cost.less(bare)));
            all.map_or(String::new(), |(all, added)| format!("{all:.0} ({added:.0})"))
        };
        let columns: [fn(Cost) -> Option<f64>; 3] = [|cost| Some(cost.established), |cost| cost.reply, |cost| Some(cost.new)];
        for (who, cost) in [("IPVS", kernel), ("bpfvs", bpfvs)] {
            let [one, two, three] = columns.map(|of| column(of, cost));
            lines.push(format!("| {who}, {words} | {one} | {two} | {three} |"));
        }
        let fewer = columns.map(|of| {
            let all = of(kernel).zip(of(bpfvs)).zip(of(kernel.less(bare)).zip(of(bpfvs.less(bare))));
            all.map_or(String::new(), |((kernel, bpfvs), (more, less))| {
                format!("**{:.1}** (**{:.1}**)", kernel / bpfvs, more / less)
            })
        });
        lines.push(format!("| times fewer | {} | {} | {} |", fewer[0], fewer[1], fewer[2]));
    }
    lines.join("\n")
}
