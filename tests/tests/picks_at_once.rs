//! `--picks-at-once`: a CPU takes several picks of a service from the cursor, and deals them one by one.
//!
//! Nothing may be dealt twice, or not at all, and each CPU deals in IPVS's order; only who of several CPUs gets which part of it is
//! chance. Without the option the order is exact, whatever CPU a connection comes by.

use std::{collections::BTreeMap, iter, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    arrivals::{self, Arrivals},
    bench::Bench,
    needs, needs_bpfvs, skip,
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// Picks that a CPU takes at once.
const AT_ONCE: usize = 16;

/// Real servers of these weights; returns their indices.
fn service(bench: &Bench, scheduler: &str, weights: &[u32]) -> Result<Vec<u32>> {
    let addresses = arrivals::servers(bench, 0..weights.len() as u16)?;
    let servers = addresses.iter().zip(weights).map(|(address, weight)| format!("-a -t 10.99.0.1:80 -r {address} -g -w {weight}"));
    let lines: Vec<_> = iter::once(format!("-A -t 10.99.0.1:80 -s {scheduler}")).chain(servers).collect();
    bench.bpfvs.restore(&lines.join("\n"))?;
    bench.bpfvs.wait_for_servers()?;
    addresses.iter().map(|address| bench.server_index(&address.to_string())).collect()
}

/// The first two CPUs that this process may use.
fn two_cpus() -> Result<Option<[usize; 2]>> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let mut cpus = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    Ok(cpus.next().zip(cpus.next()).map(|(one, other)| [one, other]))
}

fn go_to(cpu: usize) -> Result<()> {
    let mut only = CpuSet::new();
    only.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &only).with_context(|| format!("go to CPU {cpu}"))
}

/// So many connections, each by one of two CPUs. Who got them, with the CPU's number, 0 or 1.
fn deal(bench: &Bench, cpus: [usize; 2], connections: usize) -> Result<Vec<(usize, u32)>> {
    bench.director.enter(|| {
        let mut arrivals = Arrivals::new(bench)?;
        let connection = |_| {
            let cpu = fastrand::usize(..2);
            go_to(cpus[cpu])?;
            Ok((cpu, arrivals.open()?.server.context("a connection that nobody took")?))
        };
        (0..connections).map(connection).collect()
    })
}

fn counts(servers: impl Iterator<Item = u32>) -> BTreeMap<u32, usize> {
    servers.fold(BTreeMap::new(), |mut counts, server| {
        *counts.entry(server).or_default() += 1;
        counts
    })
}

#[test]
fn every_pick_is_dealt_once_and_each_cpu_keeps_the_order() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let Some(cpus) = two_cpus()? else { skip!("needs two CPUs") };
    for (at_once, scheduler, weights) in [(1, "wrr", &[4, 2, 1][..]), (AT_ONCE, "wrr", &[4, 2, 1]), (AT_ONCE, "rr", &[1; 3])] {
        let story = format!("{scheduler} with weights {weights:?}, {at_once} picks at once");
        // Each its own, because the cursor goes on counting.
        let bench = Bench::new(&["--picks-at-once", &at_once.to_string()])?;
        let servers = service(&bench, scheduler, weights)?;
        let period = weights.iter().sum::<u32>() as usize;
        let dealt = deal(&bench, cpus, 3 * AT_ONCE * period)?;
        let cursor = bench.pinned.first_cursor()? as usize;
        ensure!(cursor.is_multiple_of(at_once), "{story}: {cursor} picks were taken");
        let in_hand = cursor.checked_sub(dealt.len()).with_context(|| format!("{story}: {cursor} picks for {}", dealt.len()))?;
        ensure!(in_hand <= 2 * (at_once - 1), "{story}: {in_hand} picks are in two hands");
        let order = period_of(&dealt, period, at_once).with_context(|| format!("{story}: {dealt:?}"))?;
        let of_period = counts(order.iter().copied());
        for (server, weight) in servers.iter().zip(weights) {
            let got = of_period.get(server).copied().unwrap_or(0);
            ensure!(got == *weight as usize, "{story}: real server {server} has {got} picks of a period");
            // Over all, only what is in the CPUs' hands is missing.
            let all = dealt.iter().filter(|(_, dealt)| dealt == server).count();
            let due = dealt.len() * *weight as usize / period;
            ensure!(all.abs_diff(due) <= in_hand + 1, "{story}: real server {server} got {all} instead of {due}");
        }
    }
    Ok(())
}

/// The picks of a period, from those that CPUs dealt: every hand is a piece of its endless repetition.
fn period_of(dealt: &[(usize, u32)], period: usize, at_once: usize) -> Result<Vec<u32>> {
    // Without hands the CPUs deal as one.
    let by_cpu: Vec<Vec<u32>> = if at_once == 1 {
        vec![dealt.iter().map(|(_, server)| *server).collect()]
    } else {
        (0..2).map(|cpu| dealt.iter().filter(|(by, _)| *by == cpu).map(|(_, server)| *server).collect()).collect()
    };
    // Whoever came first got the first hand.
    let first = if at_once == 1 { 0 } else { dealt[0].0 };
    let order: Vec<u32> = by_cpu[first].iter().copied().take(period).collect();
    for servers in &by_cpu {
        for piece in servers.chunks(if at_once == 1 { servers.len() } else { at_once }) {
            let is_at = |start: usize| piece.iter().enumerate().all(|(at, server)| *server == order[(start + at) % period]);
            ensure!((0..period).any(is_at), "{piece:?} is no piece of {order:?}, again and again");
        }
    }
    Ok(order)
}

#[test]
fn a_forecast_is_followed_with_hands_too() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let Some(cpus) = two_cpus()? else { skip!("needs two CPUs") };
    let bench = Bench::new(&["--picks-at-once", &AT_ONCE.to_string()])?;
    let servers = service(&bench, "lc", &[1; 4])?;
    let mut got = counts(servers.iter().copied());
    bench.director.enter(|| {
        let mut arrivals = Arrivals::new(&bench)?;
        for step in 0..40 {
            // A hand is put away when a new forecast is published: connections that are apart go where IPVS would send them.
            bench.bpfvs.get("/v1/status")?;
            thread::sleep(Duration::from_millis(20));
            go_to(cpus[fastrand::usize(..2)])?;
            let server = arrivals.open()?.server.context("a connection that nobody took")?;
            *got.get_mut(&server).context("a real server of the service")? += 1;
            let (least, most) = (got.values().min(), got.values().max());
            ensure!(least.zip(most).is_some_and(|(least, most)| most - least <= 1), "step {step}: {got:?}");
        }
        Ok(())
    })
}
