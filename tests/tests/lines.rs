//! The prototype of another connection table, in the kernel: programs on all CPUs, and userspace by mapped memory, quarrel over few
//! keys in few lines.
//!
//! The same with threads, which the host interrupts anywhere, is in `lb-common/src/lines/tests.rs`.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    needs,
    tables::{Sizes, Tables, UserKey},
};
use lb_common::{
    connection::ConnectionKey,
    family::{Ipv4, Ipv6},
    lines,
    quarrel::{Run, is_whole},
};

/// Threads in the kernel; they share the CPUs.
const THREADS: usize = 4;
/// What each of them does in one run of its program, between which others come to the CPU.
const STEPS: u64 = 2_000;
/// So many entries userspace has to delete.
const SWEPT: u32 = 300;

/// No key is there twice, none is lost, none is torn, and every line knows what it has elsewhere.
fn quarrel<K: UserKey + Hash + Send + Sync>(keys: u32, lines_of_64_bytes: u32, stash: u32) -> Result<()> {
    let sizes = Sizes { lines: [lines_of_64_bytes; 2], stash, hash: [1; 2] };
    let tables = &Tables::load(sizes)?;
    let counts = &tables.words("COUNTS")?;
    let mapped = &tables.lines::<K>()?;
    let program = &format!("quarrel_{}", K::SUFFIX.to_lowercase());
    let number_of = |met: &K| (0..keys).find(|number| K::of(*number) == *met).context("a key that nobody inserted");
    let is_over = &AtomicBool::new(false);
    thread::scope(|scope| {
        let run = Run { flows: keys.into(), ..Run::default() };
        let work = move |thread| -> Result<Run> {
            let mut total = run;
            while !is_over.load(Ordering::Relaxed) {
                total = tables.run(program, thread, total, STEPS)?;
            }
            Ok(total)
        };
        let workers: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || work(thread))).collect();
        let mut swept = 0;
        let mut sweep = || -> Result<()> {
            let deadline = Instant::now() + Duration::from_secs(60);
            while swept < SWEPT {
                for index in 0..lines_of_64_bytes {
                    let mut outcome = Ok(());
                    lines::visit(mapped, index, |met: &K, found| {
                        let Some(known) = lines::read(mapped, found) else { return };
                        outcome = number_of(met).and_then(|number| {
                            ensure!(is_whole(number, &known), "torn: {known:?} of {number}");
                            if known.server.is_multiple_of(8) && lines::remove_found(mapped, met, found) {
                                counts.at(number as usize).fetch_sub(1, Ordering::SeqCst);
                                swept += 1;
                            }
                            Ok(())
                        });
                    });
                    outcome?;
                }
                ensure!(Instant::now() < deadline, "userspace has deleted {swept} entries in a minute");
            }
            Ok(())
        };
        let outcome = sweep();
        is_over.store(true, Ordering::Relaxed);
        let mut inserted = 0;
        for worker in workers {
            let done = worker.join().expect("a worker returns its error")?;
            ensure!(done.torn == 0, "{} entries were torn", done.torn);
            inserted += done.done;
        }
        outcome?;
        println!("{keys} keys in {lines_of_64_bytes} lines: {inserted} insertions, {swept} deleted by userspace");
        ensure!(inserted > 1000, "{inserted} insertions are no quarrel");
        Ok(())
    })?;
    let mut met = HashMap::new();
    for index in 0..lines_of_64_bytes {
        lines::visit(mapped, index, |key: &K, _| *met.entry(*key).or_insert(0) += 1);
    }
    for key in tables.stashed::<K>()? {
        *met.entry(key).or_insert(0) += 1;
    }
    for number in 0..keys {
        let (count, met) = (counts.at(number as usize).load(Ordering::SeqCst), met.get(&K::of(number)).copied().unwrap_or(0));
        ensure!(count == met && count <= 1, "key {number} was inserted {count} times more than deleted, and is there {met} times");
    }
    // Found, and deleted, and nothing remains.
    let lowercase = K::SUFFIX.to_lowercase();
    let run = Run { flows: keys.into(), ..Run::default() };
    let live = met.len() as u64;
    let removed = tables.run(&format!("lines_remove_{lowercase}"), 0, run, keys.into())?.done;
    ensure!(removed == live, "{removed} of {live} entries were found");
    let words = tables.words(&format!("LINES_{}", K::SUFFIX))?;
    for line in 0..lines_of_64_bytes as usize {
        let overflow = words.at(line * lines::LINE + K::ADDRESSES + 2).load(Ordering::SeqCst) >> 56;
        ensure!(overflow == 0, "line {line} still believes that {overflow} of its entries are elsewhere");
    }
    Ok(())
}

#[test]
fn cpus_quarrel_over_ipv4_keys() -> Result<()> {
    needs!(root);
    quarrel::<ConnectionKey<Ipv4>>(2, 2, 8)?;
    quarrel::<ConnectionKey<Ipv4>>(32, 4, 64)?;
    quarrel::<ConnectionKey<Ipv4>>(32, 4, 4)?;
    quarrel::<ConnectionKey<Ipv4>>(16, 16, 8)
}

#[test]
fn cpus_quarrel_over_ipv6_keys() -> Result<()> {
    needs!(root);
    quarrel::<ConnectionKey<Ipv6>>(2, 2, 8)?;
    quarrel::<ConnectionKey<Ipv6>>(32, 8, 64)?;
    quarrel::<ConnectionKey<Ipv6>>(32, 8, 4)
}
