//! Masquerading makes of packets what the kernel's own IPVS makes of them, byte for byte: the same conversations through both.
//!
//! Linux 6.12 in a virtual machine is the judge; bpfvs plays on this machine, by tc and by XDP. What is compared, and how: see
//! [`bpfvs_tests::translation`]. `BPFVS_CONVERSATIONS` says how many to have, `BPFVS_CONVERSATIONS_SEED` from which seed on; to
//! see one again that failed:
//!
//! ```text
//! BPFVS_CONVERSATIONS=1 BPFVS_CONVERSATIONS_SEED=12345 cargo test -p bpfvs-tests --test vm nat -- --nocapture
//! ```

use std::{env, path::Path, thread, time::Instant};

use anyhow::{Context, Result, bail, ensure};
use bpfvs_tests::{
    bpfvs::Bpfvs,
    needs_bpfvs, needs_machines,
    pass::PassProgram,
    test_run::Pinned,
    translation::{
        conversation::Conversation,
        player::{self, Account},
        verdict::{difference, difference_of_statistics},
        wires::Wires,
    },
    vm::{Machine, Version, machine::ipvs},
    wait::undisturbed,
};

/// How many conversations are had.
const CONVERSATIONS: u64 = 300;
/// Of those about which the directors differ, so many are shown.
const SHOWN: usize = 3;

#[test]
fn packets_are_translated_as_by_the_kernels_ipvs() -> Result<()> {
    needs_machines!([Version::V6_12]);
    needs_bpfvs!();
    let number = |name: &str, default| {
        env::var(name).map_or(Ok(default), |text| text.parse::<u64>().with_context(|| format!("read {name}")))
    };
    let count = number("BPFVS_CONVERSATIONS", CONVERSATIONS)?;
    let first = number("BPFVS_CONVERSATIONS_SEED", fastrand::u32(..).into())?;
    println!("BPFVS_CONVERSATIONS={count} BPFVS_CONVERSATIONS_SEED={first}");
    let conversations: Vec<_> = (first..first + count).map(Conversation::new).collect();

    let begin = Instant::now();
    let kernel = kernel(first, count)?;
    println!("IPVS has had {count} conversations after {:.1} s", begin.elapsed().as_secs_f32());
    for hook in ["tc", "xdp"] {
        let begin = Instant::now();
        let bpfvs = undisturbed(|| bpfvs(&conversations, hook))?;
        println!("bpfvs has had them by {hook} after {:.1} s", begin.elapsed().as_secs_f32());
        judge(&conversations, &kernel, &bpfvs).with_context(|| format!("{hook}, BPFVS_CONVERSATIONS_SEED={first}"))?;
    }
    Ok(())
}

fn kernel(first: u64, count: u64) -> Result<Account> {
    let machine = Machine::new(Version::V6_12)?
        .modules(ipvs(Version::V6_12))
        .add(Path::new(env!("CARGO_BIN_EXE_kernel_nat")), "/usr/local/bin/kernel_nat")?
        // A closed connection lives for ten seconds; on a busy machine, it would be over before it is listed.
        .deterministic();
    let outcome = machine.run(&format!("kernel_nat {first} {count}"))?;
    ensure!(outcome.status == 0, "kernel_nat in the guest: status {}:\n{}", outcome.status, outcome.output);
    let account: Account = serde_json::from_str(&outcome.output).context("read what the guest printed")?;
    ensure!(account.records.len() as u64 == count, "the guest printed {} records for {count} conversations", account.records.len());
    Ok(account)
}

fn bpfvs(conversations: &[Conversation], hook: &str) -> Result<Account> {
    let wires = Wires::new()?;
    let _pass = if hook == "xdp" { Some(PassProgram::attach(&wires.outside, &["eth0", "eth1"])?) } else { None };
    let arguments = ["--interface", "eth0", "--interface", "eth1", "--hook", hook, "--max-connections", "65536"];
    let bpfvs = Bpfvs::start(&wires.director, &arguments)?;
    player::set_up(&bpfvs)?;
    bpfvs.wait_for_servers()?;
    Pinned::open(bpfvs.pins())?.lift_answer_limit()?;
    // In a thread of its own, which will stay on one CPU.
    let play = || player::play(conversations, &bpfvs, &wires);
    thread::scope(|scope| scope.spawn(play).join().expect("a panic fails the test"))
}

/// Fails if the two differ, and shows how.
fn judge(conversations: &[Conversation], kernel: &Account, bpfvs: &Account) -> Result<()> {
    let both = conversations.iter().zip(kernel.records.iter().zip(&bpfvs.records));
    let differences: Vec<_> = both.filter_map(|(conversation, (kernel, bpfvs))| difference(conversation, kernel, bpfvs)).collect();
    if !differences.is_empty() {
        let shown = &differences[..differences.len().min(SHOWN)];
        bail!("{} of {} conversations differ from IPVS; the first:\n\n{}", differences.len(), conversations.len(), shown.join("\n"))
    }
    difference_of_statistics(conversations, kernel, bpfvs)?.map_or(Ok(()), |difference| bail!(difference))
}
