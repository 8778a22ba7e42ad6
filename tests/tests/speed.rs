//! The price of the common packet: of an established IPv4 connection.
//!
//! Its limit is a ratio to a floor that is measured in turns with it (parse, one hash hit, new hardware addresses, out), so that
//! it holds on any machine. It is an upper bound that bears noise: other programs can only make a sample longer, so of
//! several attempts the best one counts. `cargo xtask bench` has the figures.

use anyhow::{Result, ensure};
use bpfvs_tests::{
    lab::Family,
    needs, needs_bpfvs,
    speed::{
        Case, Path,
        measure::{Effort, measure},
        stage::{Stage, last_cpu},
    },
    test_run::Hook,
};

/// What the director may cost, in floors. FULLNAT has an array more to read; its best attempts are at 1.37 to 1.41.
const LIMITS: [(Hook, Path, f64); 9] = [
    (Hook::Xdp, Path::Routed, 1.3),
    (Hook::Xdp, Path::Masqueraded, 1.4),
    (Hook::Xdp, Path::Replied, 1.4),
    (Hook::Tc, Path::Masqueraded, 1.4),
    (Hook::Tc, Path::Replied, 1.4),
    (Hook::Xdp, Path::FullNat, 1.45),
    (Hook::Xdp, Path::FullNatReplied, 1.45),
    (Hook::Tc, Path::FullNat, 1.45),
    (Hook::Tc, Path::FullNatReplied, 1.45),
];
/// How often to try.
const ATTEMPTS: usize = 14;

#[test]
fn an_established_connection_costs_little_more_than_the_floor() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let mut best = LIMITS.map(|_| f64::INFINITY);
    for attempt in 1..=ATTEMPTS {
        let mut slow = best.iter_mut().zip(LIMITS).filter(|(best, (.., limit))| **best > *limit).peekable();
        if slow.peek().is_none() {
            break;
        }
        Stage::new(10_000, attempt - 1)?.enter(last_cpu()?, |act| {
            for (best, (hook, path, _)) in slow {
                let case = Case { hook, family: Family::Ipv4, path, flows: 1 };
                let figures = measure(act, case, Effort { rounds: 15 })?;
                let ratio = figures.ratio.map_or(f64::INFINITY, |ratio| ratio.minimum);
                println!("attempt {attempt}: {case}: {ratio:.2} floors; {figures:?}");
                *best = best.min(ratio);
            }
            Ok(())
        })?;
    }
    let slow: Vec<_> = best.iter().zip(LIMITS).filter(|(best, (.., limit))| **best > *limit).collect();
    ensure!(slow.is_empty(), "packets of established connections cost more floors than they may: {slow:?}");
    Ok(())
}
