//! What each step of an established packet costs: direct routing, IPv4, XDP.
//!
//! The programs of `lb-ebpf/src/bin/floor/steps.rs` go one step further each, and take turns. The last line is the director
//! itself: what it takes more than the last step is the price of all the ways that it keeps open besides.

use std::fmt::{self, Display, Formatter};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    Case, Path,
    harness::STEPS,
    measure::{Effort, Nanoseconds, turn},
    stage::{Act, Program},
};
use crate::{lab::Family, test_run::Hook};

/// The steps, in words.
pub const WORDS: [&str; STEPS.len()] = [
    "Ethernet, IP and TCP headers: read and checked",
    "the filter: is the destination a virtual address?",
    "the connection: key, hash, look-up",
    "its freshness: state, last packet, the kernel's ticks",
    "the real server's entry: ready, and at this device?",
    "statistics of this CPU",
    "time to live, checksum, hardware addresses",
];
/// Turns: these are few cases, and differences of single nanoseconds.
const EFFORT: usize = 3;

/// What a step costs.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Step {
    /// What is done.
    pub step: &'static str,
    /// Flows in the table.
    pub flows: u64,
    /// The harness alone, in nanoseconds per packet.
    pub nothing: Nanoseconds,
    /// Nanoseconds from the beginning to the end of this step, less the harness.
    pub until: Nanoseconds,
    /// The step's own.
    pub own: f64,
}

impl Display for Step {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self { step, flows, until, own, .. } = self;
        write!(formatter, "{step:<56} {flows:>8} {own:>8.1} {:>8.1} ({:.1})", until.minimum, until.median)
    }
}

impl Step {
    /// As [`Figures::best`](super::measure::Figures::best).
    fn best(self, other: Self) -> Self {
        match () {
            () if self.nothing.is_disturbed(other.nothing) => other,
            () if other.nothing.is_disturbed(self.nothing) => self,
            () => Self { nothing: self.nothing.best(other.nothing), until: self.until.best(other.until), ..self },
        }
    }
}

/// The names of the columns.
pub fn heading() -> String {
    format!("{:<56} {:>8} {:>8} {:>8}", "step of an established packet (xdp IPv4, DR)", "flows", "own ns", "until")
}

/// The steps of several loads of the same programs: the best of each, because where programs lie in memory makes a difference.
pub fn best(loads: Vec<Vec<Step>>) -> Vec<Step> {
    let Some(mut steps) = loads.into_iter().reduce(|best, other| {
        let both = best.into_iter().zip(other);
        both.map(|(one, other)| one.best(other)).collect()
    }) else {
        return Vec::new();
    };
    let (mut before, mut flows) = (0.0, 0);
    for step in &mut steps {
        // Each size begins with nothing.
        let last = if step.flows == flows { before } else { 0.0 };
        step.own = step.until.minimum - last;
        (before, flows) = (step.until.minimum, step.flows);
    }
    steps
}

/// Measures the steps with so many flows in the table.
pub fn measure(act: &mut Act<'_>, flows: u64, effort: Effort) -> Result<Vec<Step>> {
    let case = Case { hook: Hook::Xdp, family: Family::Ipv4, path: Path::Routed, flows };
    act.set(case.family, case.path, flows)?;
    let programs: Vec<_> =
        [Program::Nothing].into_iter().chain((1..=WORDS.len()).map(Program::Steps)).chain([Program::Director]).collect();
    let mut samples = vec![Vec::new(); programs.len()];
    for round in 0..=EFFORT * effort.rounds {
        for (&program, samples) in programs.iter().zip(&mut samples) {
            let taken = turn(act, case, program, round).with_context(|| format!("measure {program:?} with {flows} flows"))?;
            // The first round warms up.
            if round > 0 {
                samples.extend(taken);
            }
        }
    }
    let mut times = samples.into_iter().map(|samples| Nanoseconds::of(samples).context("there was a round"));
    let nothing = times.next().context("there is a first program")??;
    WORDS
        .into_iter()
        .chain(["the director: what it keeps open besides"])
        .zip(times)
        .map(|(step, time)| Ok(Step { step, flows, nothing, until: time?.less(nothing), own: f64::NAN }))
        .collect()
}
