//! Samples, and what they come to.
//!
//! A round takes one sample, or a few, of each program in turn: nothing, the floor, the director. A figure is the least or
//! the median of all rounds' samples, less that of nothing. A frame that has grown costs the wrapper more than one that has
//! not: nothing in a grown frame has its turn, too, and half of the difference (the other half is the growing) is the wrapper's.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::{
    Case, Path,
    stage::{Act, NEW, Program, mark, template},
};
use crate::test_run::Hook;

/// Packets in a sample of what can be repeated.
const PACKETS: u32 = 1 << 15;
/// Packets in a sample where each is a run of its own.
const SINGLE_PACKETS: u16 = 500;
/// Samples in a turn, at most: with a large table the lap before them is what takes time.
const SAMPLES: u64 = 16;
/// The largest number of flows that a lap goes through. Of more flows each comes so seldom that it is attended to each time: there each
/// turn has flows of its own, which nobody has seen for a while.
const LAP: u64 = 1 << 20;

/// So much longer may nothing take in one load of the programs than in another.
const DISTURBED: f64 = 1.03;

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// How often each program has its turn with a large table; with a small one, whose turns are shorter, more often.
    pub rounds: usize,
}

impl Effort {
    fn rounds(self, case: Case) -> usize {
        match case.flows {
            _ if case.path.is_new() => self.rounds,
            0..=0xff => 10 * self.rounds,
            0x100..=0xffff => 5 * self.rounds,
            0x1_0000..=0xf_ffff => 2 * self.rounds,
            0x10_0000..=LAP => self.rounds.div_ceil(3),
            _ => self.rounds,
        }
    }
}

/// Nanoseconds per packet.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Nanoseconds {
    /// The least of all samples.
    pub minimum: f64,
    /// Their median.
    pub median: f64,
}

impl Nanoseconds {
    pub(super) fn of(mut samples: Vec<f64>) -> Option<Self> {
        samples.sort_by(f64::total_cmp);
        Some(Self { minimum: *samples.first()?, median: *samples.get(samples.len() / 2)? })
    }

    /// The better one of each.
    #[must_use]
    pub const fn best(self, other: Self) -> Self {
        Self { minimum: self.minimum.min(other.minimum), median: self.median.min(other.median) }
    }

    /// Whether a load, in which nothing took this long, was disturbed: in the other one it took less. What is subtracted there is too
    /// much, and its figures would flatter.
    pub(super) fn is_disturbed(self, other: Self) -> bool {
        self.minimum > DISTURBED * other.minimum
    }

    pub(super) fn less(self, other: Self) -> Self {
        Self { minimum: self.minimum - other.minimum, median: self.median - other.median }
    }

    fn between(self, other: Self) -> Self {
        Self { minimum: f64::midpoint(self.minimum, other.minimum), median: f64::midpoint(self.median, other.median) }
    }

    fn over(self, other: Self) -> Self {
        Self { minimum: self.minimum / other.minimum, median: self.median / other.median }
    }
}

/// What a case came to.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Figures {
    /// The harness alone, in nanoseconds per packet.
    pub nothing: Nanoseconds,
    /// The floor, less the harness. There is none for packets that are not ours.
    pub floor: Option<Nanoseconds>,
    /// The director, less the harness.
    pub director: Nanoseconds,
    /// Director by floor.
    pub ratio: Option<Nanoseconds>,
    /// Samples of each.
    pub samples: usize,
}

impl Figures {
    /// These and those of another load of the same programs: where they lie in memory makes up to a fifth of their time, and who
    /// measures cannot choose. The better one of each counts, but nothing of a load that was disturbed.
    #[must_use]
    pub fn best(self, other: Self) -> Self {
        let samples = self.samples + other.samples;
        match () {
            () if self.nothing.is_disturbed(other.nothing) => return Self { samples, ..other },
            () if other.nothing.is_disturbed(self.nothing) => return Self { samples, ..self },
            () => {}
        }
        let floor = self.floor.zip(other.floor).map(|(one, other)| one.best(other));
        let director = self.director.best(other.director);
        let ratio = floor.map(|floor| director.over(floor));
        Self { nothing: self.nothing.best(other.nothing), floor, director, ratio, samples }
    }
}

/// Measures a case.
pub fn measure(act: &mut Act<'_>, case: Case, effort: Effort) -> Result<Figures> {
    act.set(case.family, case.path, case.flows)?;
    let programs: &[Program] = match case.path {
        path if !path.has_floor() => &[Program::Nothing, Program::Director],
        Path::Tunnelled if case.hook == Hook::Xdp => &[Program::Nothing, Program::Grown, Program::Floor, Program::Director],
        _ => &[Program::Nothing, Program::Floor, Program::Director],
    };
    let [mut nothing, mut grown, mut floor, mut director] = [const { Vec::new() }; 4];
    for round in 0..=effort.rounds(case) {
        for &program in programs {
            let taken = turn(act, case, program, round).with_context(|| format!("measure {program:?} in {case:?}"))?;
            // The first round warms up.
            let samples = match program {
                Program::Nothing => &mut nothing,
                Program::Grown => &mut grown,
                Program::Floor | Program::Steps(_) => &mut floor,
                Program::Director => &mut director,
            };
            if round > 0 {
                samples.extend(taken);
            }
        }
    }
    let count = nothing.len();
    let [nothing, grown, floor, director] = [nothing, grown, floor, director].map(Nanoseconds::of);
    let nothing = nothing.context("there was a round")?;
    let floor = floor.map(|floor| floor.less(nothing));
    let director = director.context("there was a round")?;
    let director = director.less(grown.map_or(nothing, |grown| grown.between(nothing)));
    Ok(Figures { nothing, floor, director, ratio: floor.map(|floor| director.over(floor)), samples: count })
}

/// A program's turn, of this number: a lap that is not timed, and samples.
pub(super) fn turn(act: &mut Act<'_>, case: Case, program: Program, number: usize) -> Result<Vec<f64>> {
    let Case { hook, family, path, flows } = case;
    let (frame, mut round) = template(family, path, flows);
    if flows > LAP {
        round.flow = number as u64 * SAMPLES * u64::from(PACKETS);
    } else if path.is_known() && !matches!(program, Program::Nothing | Program::Grown) {
        act.test(Hook::Xdp, program)?;
        act.harness().begin(&round)?;
        act.harness().run(Hook::Xdp, &frame, flows as u32)?;
    }
    act.test(hook, program)?;
    act.harness().begin(&round)?;
    let verdict = verdict(case, program);
    if path.is_new() {
        let sample = repeated(act, case, &frame, NEW, verdict);
        act.forget_new(case, program)?;
        return Ok(vec![sample?]);
    }
    if !case.repeats() {
        return Ok(vec![singles(act, hook, &frame, verdict)?]);
    }
    (0..(flows / u64::from(PACKETS)).clamp(1, SAMPLES)).map(|_| repeated(act, case, &frame, PACKETS, verdict)).collect()
}

/// Nanoseconds per packet of one run that repeats the program, by the CPU time of this thread.
fn repeated(act: &mut Act<'_>, case: Case, frame: &[u8], packets: u32, verdict: u32) -> Result<f64> {
    let begin = cpu_time()?;
    let result = act.harness().run_marked(case.hook, frame, packets, mark(case.path))?;
    let taken = cpu_time()?.saturating_sub(begin);
    expect(verdict, result.return_value)?;
    Ok(taken.as_secs_f64() * 1e9 / f64::from(packets))
}

/// The CPU time that this thread has used.
pub(super) fn cpu_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// What a packet typically takes that is a run of its own, by the kernel's own clock around the program: a system call costs
/// far more than the program. The mean of the middle half: that clock may be as coarse as ten nanoseconds.
fn singles(act: &mut Act<'_>, hook: Hook, frame: &[u8], verdict: u32) -> Result<f64> {
    let mut taken = Vec::with_capacity(SINGLE_PACKETS.into());
    for _ in 0..SINGLE_PACKETS {
        let result = act.harness().run(hook, frame, 1)?;
        expect(verdict, result.return_value)?;
        taken.push(result.duration.as_secs_f64() * 1e9);
    }
    taken.sort_by(f64::total_cmp);
    let middle = taken.iter().skip(usize::from(SINGLE_PACKETS / 4)).take(usize::from(SINGLE_PACKETS / 2));
    Ok(middle.sum::<f64>() / f64::from(SINGLE_PACKETS / 2))
}

/// What a program must answer, as the hook's number.
fn verdict(case: Case, program: Program) -> u32 {
    const XDP_PASS: u32 = 2;
    const XDP_TX: u32 = 3;
    const XDP_REDIRECT: u32 = 4;
    const TC_ACT_UNSPEC: u32 = u32::MAX;
    const TC_ACT_REDIRECT: u32 = 7;
    match (case.hook, program, case.path) {
        (Hook::Xdp, Program::Director, Path::NotOurs) => XDP_PASS,
        (Hook::Tc, Program::Director, Path::NotOurs) => TC_ACT_UNSPEC,
        (Hook::Xdp, Program::Director, Path::RoutedElsewhere) => XDP_REDIRECT,
        (Hook::Tc, Program::Director | Program::Floor, _) => TC_ACT_REDIRECT,
        _ => XDP_TX,
    }
}

fn expect(wanted: u32, verdict: u32) -> Result<()> {
    ensure!(verdict == wanted, "the verdict is {verdict} instead of {wanted}: this is not the path to measure");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disturbed_load_flatters_nobody() {
        let figures = |nothing, director| {
            let of = |minimum| Nanoseconds { minimum, median: minimum };
            Figures { nothing: of(nothing), floor: Some(of(35.0)), director: of(director), ratio: None, samples: 1 }
        };
        let (quiet, disturbed) = (figures(43.0, 46.0), figures(48.0, 41.0));
        for best in [quiet.best(disturbed), disturbed.best(quiet)] {
            assert_eq!((best.nothing.minimum, best.director.minimum, best.samples), (43.0, 46.0, 2));
        }
        assert!(quiet.best(figures(43.5, 44.0)).director.minimum < 45.0, "both loads count");
    }
}
