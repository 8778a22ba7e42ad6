//! Clients of persistent services go where the kernel's own IPVS leads them, and both remember the same: Linux 6.12 in a virtual
//! machine is the judge. What is compared, and how: see [`bpfvs_tests::differential::persistence`].
//!
//! `BPFVS_STORIES` says how many stories to play, `BPFVS_STORIES_SEED` from which seed on.

use std::{env, path::Path, thread};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    bpfvs::Bpfvs,
    differential::{
        persistence::{Record, Story},
        wire::Wire,
    },
    needs_bpfvs, needs_machines,
    test_run::Pinned,
    vm::{Machine, Version, machine::ipvs},
};

/// How many stories are played.
const STORIES: u64 = 30;
/// Of the stories about which the directors differ, so many are shown.
const SHOWN: usize = 3;

#[test]
fn clients_come_back_as_with_the_kernels_ipvs() -> Result<()> {
    needs_machines!([Version::V6_12]);
    needs_bpfvs!();
    let number = |name: &str, default| {
        env::var(name).map_or(Ok(default), |text| text.parse::<u64>().with_context(|| format!("read {name}")))
    };
    let (count, first) = (number("BPFVS_STORIES", STORIES)?, number("BPFVS_STORIES_SEED", fastrand::u32(..).into())?);
    println!("BPFVS_STORIES={count} BPFVS_STORIES_SEED={first}");
    let stories: Vec<_> = (first..first + count).map(Story::new).collect();

    let machine = Machine::new(Version::V6_12)?
        .modules(ipvs(Version::V6_12))
        .modules(&["nf_tables"])
        .add(Path::new(env!("CARGO_BIN_EXE_kernel_ipvs")), "/usr/local/bin/kernel_ipvs")?;
    let outcome = machine.run(&format!("kernel_ipvs {first} {count} --persistence"))?;
    ensure!(outcome.status == 0, "kernel_ipvs in the guest: status {}:\n{}", outcome.status, outcome.output);
    let read = |line| serde_json::from_str(line).with_context(|| format!("read what the guest printed: {line}"));
    let kernel: Vec<Record> = outcome.output.lines().map(read).collect::<Result<_>>()?;
    ensure!(kernel.len() == stories.len(), "the guest printed {} records for {count} stories", kernel.len());

    let wire = Wire::new()?;
    let bpfvs = Bpfvs::start(&wire.director, &["--interface", "eth0", "--max-connections", "65536"])?;
    Pinned::open(bpfvs.pins())?.lift_answer_limit()?;
    // In a thread of its own, which will stay on one CPU.
    let play = || stories.iter().map(|story| story.play(&bpfvs, &wire)).collect::<Result<Vec<_>>>();
    let records = thread::scope(|scope| scope.spawn(play).join().expect("a panic fails the test"))?;

    let packets: usize = records.iter().map(|record| record.sights.len()).sum();
    let entries: usize = records.iter().map(|record| record.entries.len()).sum();
    let templates = |of_marks: bool| {
        let of_these = stories.iter().zip(&records).filter(|(story, _)| !of_marks || story.is_of_a_mark());
        of_these.flat_map(|(_, record)| &record.entries).filter(|entry| entry.contains(":0 ")).count()
    };
    let (all, of_marks) = (templates(false), templates(true));
    println!("{count} stories, {packets} packets; in the end {entries} entries, {all} of them templates, {of_marks} of marks");
    ensure!(count < STORIES || of_marks > 0, "no story has left a template of a mark, so none was compared");
    let differences: Vec<_> = stories
        .iter()
        .zip(kernel.iter().zip(&records))
        .filter_map(|(story, (kernel, bpfvs))| story.difference(kernel, bpfvs))
        .collect();
    let shown = &differences[..differences.len().min(SHOWN)];
    ensure!(
        differences.is_empty(),
        "{} of {count} stories differ from IPVS; the first:\n\n{}",
        differences.len(),
        shown.join("\n")
    );
    Ok(())
}
