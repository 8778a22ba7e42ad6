//! Clients of persistent services go where the kernel's own IPVS leads them, and both remember the same: Linux 6.12 in a virtual
//! machine is the judge. What is compared, and how: see [`bpfvs_tests::differential::persistence`]. On the way, `bpfvs proc` and
//! `bpfvs sysctl` are held against IPVS's files ([`bpfvs_tests::differential::proc`]).
//!
//! `BPFVS_STORIES` says how many stories to play, `BPFVS_STORIES_SEED` from which seed on.

use std::{env, path::Path, thread};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    bpfvs::Bpfvs,
    differential::{
        persistence::{Record, Story},
        proc::{self, Files},
        wire::Wire,
    },
    needs_bpfvs, needs_machines,
    test_run::Pinned,
    vm::{Machine, Version, machine::ipvs},
    wait::undisturbed,
};

/// How many stories are played.
const STORIES: u64 = 46;
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
        .modules(&["nf_tables", "ip_vs_pe_sip"])
        .add(Path::new(env!("CARGO_BIN_EXE_kernel_ipvs")), "/usr/local/bin/kernel_ipvs")?
        // On a busy machine, connections would be over before their story is.
        .deterministic();
    // Where the values are that IPVS has at its start, and then what a few packets make of its files.
    let script = format!(
        "for file in /proc/sys/net/ipv4/vs/*; do echo ${{file##*/}} $(cat $file); done
         echo
         kernel_ipvs 0 0 --proc && kernel_ipvs {first} {count} --persistence"
    );
    let outcome = machine.run(&script)?;
    ensure!(outcome.status == 0, "kernel_ipvs in the guest: status {}:\n{}", outcome.status, outcome.output);
    let (sysctls, output) = outcome.output.split_once("\n\n").context("the sysctls")?;
    let (files, output) = output.split_once('\n').context("the files of /proc/net")?;
    let read = |line| serde_json::from_str(line).with_context(|| format!("read what the guest printed: {line}"));
    let kernel: Vec<Record> = output.lines().map(read).collect::<Result<_>>()?;
    ensure!(kernel.len() == stories.len(), "the guest printed {} records for {count} stories", kernel.len());

    let files = serde_json::from_str(files)?;
    let records = undisturbed(|| {
        let wire = Wire::new()?;
        let bpfvs = Bpfvs::start(&wire.director, &["--interface", "eth0", "--max-connections", "65536"])?;
        Pinned::open(bpfvs.pins())?.lift_answer_limit()?;
        shows_what_the_kernel_shows(&bpfvs, &wire, sysctls, &files)?;
        // In a thread of its own, which will stay on one CPU.
        let play = || stories.iter().map(|story| story.play(&bpfvs, &wire)).collect::<Result<Vec<_>>>();
        thread::scope(|scope| scope.spawn(play).join().expect("a panic fails the test"))
    })?;

    let packets: usize = records.iter().map(|record| record.sights.len()).sum();
    let entries: usize = records.iter().map(|record| record.entries.len()).sum();
    let templates = |of_marks: bool| {
        let of_these = stories.iter().zip(&records).filter(|(story, _)| !of_marks || story.is_of_a_mark());
        of_these.flat_map(|(_, record)| &record.entries).filter(|entry| entry.contains(":0 ")).count()
    };
    let (all, of_marks) = (templates(false), templates(true));
    let calls = records.iter().flat_map(|record| &record.entries).filter(|entry| entry.contains(" sip ")).count();
    println!(
        "{count} stories, {packets} packets; in the end {entries} entries, {all} of them templates, {of_marks} of marks, {calls} of calls"
    );
    let left = records.iter().flat_map(|record| &record.entries).filter(|entry| entry.contains(":65535")).count();
    println!("{left} templates lead nowhere");
    ensure!(count < STORIES || of_marks > 0, "no story has left a template of a mark, so none was compared");
    ensure!(count < STORIES || calls > 0, "no story has left a template of a call, so none was compared");
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

/// `bpfvs proc` prints the files of /proc/net, and `bpfvs sysctl` knows all sysctls, with IPVS's defaults.
fn shows_what_the_kernel_shows(bpfvs: &Bpfvs, wire: &Wire, sysctls: &str, kernel: &Files) -> Result<()> {
    let clock_rate = bpfvs.get("/v1/status")?["clock_rate"].as_u64().context("the clock rate")?;
    let own = proc::play(bpfvs, wire, clock_rate)?;
    let pairs = [(&kernel.services, &own.services), (&kernel.connections, &own.connections), (&kernel.statistics, &own.statistics)];
    for (kernel, own) in pairs {
        ensure!(kernel == own, "IPVS:\n{}\nbpfvs:\n{}", kernel.join("\n"), own.join("\n"));
    }
    bpfvs.ipvsadm("-C")?;

    let listed = bpfvs.get("/v1/sysctls")?;
    let listed = listed.as_array().context("a list of sysctls")?;
    let names: Vec<_> = listed.iter().filter_map(|sysctl| sysctl["name"].as_str()).collect();
    let (known, defaults): (Vec<_>, Vec<_>) = sysctls.lines().filter_map(|line| line.split_once(' ')).unzip();
    ensure!(names == known, "IPVS has {known:?}, bpfvs {names:?}");
    for (sysctl, default) in listed.iter().zip(defaults) {
        let own = sysctl["default"].as_u64();
        // The defence is on here: it drops nobody.
        let differs = ["drop_entry", "secure_tcp"].contains(&sysctl["name"].as_str().context("a name")?);
        ensure!(own.is_none() || differs || own == default.parse().ok(), "{sysctl}: IPVS has {default}");
    }
    Ok(())
}
