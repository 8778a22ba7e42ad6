//! Runs the sweep, and corrects counters that have drifted.
//!
//! The sweep itself is done by programs in the kernel: they delete the connections that are over and count the others into `SWEPT`.
//! The daemon has them see table after table, a slice at a time, so that nobody else waits for the CPU longer than a slice takes:
//!
//! ```text
//! begin | slice, slice, slice … | slice …          | slice …        | slice …
//!       | CONNECTIONS_V4        | CONNECTIONS_V6   | TEMPLATES_V4   | TEMPLATES_V6
//! ```
//!
//! After some slices others have their turn, and after many of them it rests, so that a sweep takes a tenth of a CPU and no more,
//! however many connections there are (half of one while all that it meets is over): nobody waits for its end, because the packet path
//! looks at a connection's age itself.
//!
//! Then it compares: what `SWEPT` says of a real server and what its live counter says should be the
//! same. They differ for a moment because connections come and go during the walk, and they differ for good because two
//! CPUs raced for the same connection. Only the second is drift:
//!
//! ```text
//! run 1: live 105, counted 100 (3 came meanwhile)    a suspect, by -5
//! run 2: live 121, counted 117 (2 came meanwhile)    again, by -4: corrected by -4
//! ```
//!
//! A difference is corrected when two runs in succession saw it on the same side, by the smaller one, and only if it is larger than
//! what came and went during the second.

use std::{
    collections::HashMap,
    io::Read as _,
    os::fd::OwnedFd,
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use aya::{
    maps::{Array, MapData, PerCpuArray},
    programs::{RawTracePoint, RawTracePointRunOptions, TestRun as _},
};
use lb_common::{config::SweepReport, server::Counters, statistics::Statistics};
use nix::time::{ClockId, clock_gettime};

use super::{
    flood::Recount,
    maps::Pins,
    programs::{Programs, SWEPT_TABLES},
    shared::Words,
    system::{iterate, iterator},
};

/// What a run of the sweep did.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SweepOutcome {
    /// Connections looked at.
    pub examined: u64,
    /// Connections that were over, and are gone.
    pub expired: u64,
    /// Real servers whose counters were corrected.
    pub corrected: Vec<u32>,
    /// How long a CPU was busy with it.
    pub worked: Duration,
}

/// A difference between counted and live connections: of all, and of the active ones.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Drift {
    total: i64,
    active: i64,
}

impl Drift {
    fn between(counted: u64, live: u64) -> Self {
        let (counted, live) = (Counters::from_word(counted), Counters::from_word(live));
        Self {
            total: i64::from(counted.total.cast_signed()) - i64::from(live.total.cast_signed()),
            active: i64::from(counted.active.cast_signed()) - i64::from(live.active.cast_signed()),
        }
    }

    /// The part of this difference that an earlier one confirms, if it is beyond what came and went.
    fn confirmed(self, earlier: Self, churn: i64) -> Self {
        let agree = |now: i64, before: i64| {
            if now.signum() == before.signum() && now.abs() > churn { now.signum() * now.abs().min(before.abs()) } else { 0 }
        };
        Self { total: agree(self.total, earlier.total), active: agree(self.active, earlier.active) }
    }

    /// What to add to the counters' word.
    const fn word(self) -> u64 {
        (self.active << 32).wrapping_add(self.total).cast_unsigned()
    }
}

/// The sweep program and the tables that it needs. Can be run on any thread.
pub struct Sweeper {
    begin: RawTracePoint,
    /// In order.
    tables: Vec<Table>,
    newcomers: Words,
    report: Array<MapData, SweepReport>,
    statistics: PerCpuArray<MapData, Statistics>,
    counters: Words,
    swept: Words,
    suspects: HashMap<u32, Drift>,
    half_open: Recount,
}

impl Sweeper {
    /// Opens the pinned program and tables.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        Ok(Self {
            begin: Programs::sweep(pins)?,
            tables: SWEPT_TABLES
                .map(|(program, table)| Table::open(pins, program, table))
                .into_iter()
                .collect::<anyhow::Result<_>>()?,
            newcomers: Words::open(&pins.map("NEWCOMERS"))?,
            report: pins.typed("SWEEP")?,
            statistics: pins.typed("STATISTICS")?,
            counters: Words::open(&pins.map("COUNTERS"))?,
            swept: Words::open(&pins.map("SWEPT"))?,
            suspects: HashMap::new(),
            half_open: Recount::open(pins)?,
        })
    }

    /// Begins a sweep, and does nothing else. The report tells the kernel's clocks.
    pub fn begin(&self) -> anyhow::Result<SweepReport> {
        self.begin
            .test_run(RawTracePointRunOptions::new())
            .context("the kernel does not run the sweep; it needs version 5.10 and CAP_BPF")?;
        self.report()
    }

    /// Has the programs see all entries.
    fn walk(&mut self) -> anyhow::Result<SweepReport> {
        let mut report = self.begin()?;
        let mut pace = Pace::begin()?;
        for index in 0..self.tables.len() {
            let newcomers = self.newcomers.take(index as u32) != 0;
            let table = &self.tables[index];
            if table.is_empty && !newcomers {
                continue;
            }
            table.walk(&mut pace, || self.report()).with_context(|| format!("the sweep broke off in {}", table.name))?;
            let passed = report.passed;
            report = self.report()?;
            self.tables[index].is_empty = report.passed == passed;
        }
        Ok(report)
    }

    /// What the last run reported, whoever ran it.
    pub fn report(&self) -> anyhow::Result<SweepReport> {
        self.report.get(&0, 0).context("the report of the sweep cannot be read")
    }

    /// Deletes the connections that are over, and corrects counters.
    pub fn run(&mut self) -> anyhow::Result<SweepOutcome> {
        let begin = cpu_time()?;
        for index in 0..self.swept.length() {
            if self.swept.load(index) != 0 {
                self.swept.store(index, 0);
            }
        }
        let mut before = HashMap::new();
        for index in self.suspects.keys() {
            before.insert(*index, (self.opened(*index)?, self.counters.load(*index)));
        }
        let half_open = self.half_open.before()?;
        let report = self.walk()?;
        self.half_open.after(half_open, report.half_open)?;
        let mut corrected = Vec::new();
        let earlier = std::mem::take(&mut self.suspects);
        for index in 0..self.counters.length() {
            let (counted, live) = (self.swept.load(index), self.counters.load(index));
            let mut drift = Drift::between(counted, live);
            if drift == Drift::default() {
                continue;
            }
            if let (Some(suspicion), Some((opened, was))) = (earlier.get(&index), before.get(&index)) {
                let change = Drift::between(live, *was);
                let opened = i64::try_from(self.opened(index)?.wrapping_sub(*opened)).unwrap_or(i64::MAX);
                let churn = opened.saturating_add(change.total.abs().max(change.active.abs()));
                let correction = drift.confirmed(*suspicion, churn);
                if correction != Drift::default()
                    && let Some(word) = self.counters.word(index)
                {
                    word.fetch_add(correction.word(), Ordering::AcqRel);
                    tracing::info!(server = index, ?correction, "connection counters had drifted");
                    corrected.push(index);
                    drift = Drift { total: drift.total - correction.total, active: drift.active - correction.active };
                }
            }
            if drift != Drift::default() {
                self.suspects.insert(index, drift);
            }
        }
        Ok(SweepOutcome {
            examined: report.examined,
            expired: report.expired,
            corrected,
            worked: cpu_time()?.saturating_sub(begin),
        })
    }

    /// Connections that were ever scheduled to a server.
    fn opened(&self, index: u32) -> anyhow::Result<u64> {
        let values =
            self.statistics.get(&index, 0).with_context(|| format!("the statistics of real server {index} cannot be read"))?;
        Ok(values.iter().map(|value| value.connections).sum())
    }
}

/// A table that is swept.
struct Table {
    name: &'static str,
    /// Has a program see its entries.
    iterator: OwnedFd,
    /// Whether the last walk found nothing.
    is_empty: bool,
}

impl Table {
    fn open(pins: &Pins, program: &str, name: &'static str) -> anyhow::Result<Self> {
        let iterator = iterator(Programs::iterator(pins, program)?.fd()?, &pins.data(name)?)
            .with_context(|| format!("the kernel lets no program see the entries of {name}"))?;
        Ok(Self { name, iterator, is_empty: false })
    }

    fn walk(&self, pace: &mut Pace, report: impl Fn() -> anyhow::Result<SweepReport>) -> anyhow::Result<()> {
        let mut slices = iterate(&self.iterator)?;
        while slices.read(&mut [0])? > 0 {
            pace.keep(&report)?;
        }
        Ok(())
    }
}

/// Work and rest by turns.
struct Pace {
    /// When the present turn began.
    turn: Instant,
    /// What a CPU had done for this thread when the present spell began.
    since: Duration,
    passed: u64,
    expired: u64,
}

impl Pace {
    /// So long somebody who wants this CPU, too, waits for it at most.
    const TURN: Duration = Duration::from_micros(500);
    /// Longer than this nobody works without a rest. Each spell begins with caches that have forgotten where the table lies: in spells of
    /// half a millisecond a walk through eight million entries takes half as long again.
    const SPELL: Duration = Duration::from_millis(50);
    /// How many times as long as the work the rest is. What deletes much rests less: somebody may wait for the room.
    const LONGEST_REST: u32 = 9;

    fn begin() -> anyhow::Result<Self> {
        Ok(Self { turn: Instant::now(), since: cpu_time()?, passed: 0, expired: 0 })
    }

    /// Lets others have their turn, or rests, if it is time. What others do meanwhile is no work of this thread.
    fn keep(&mut self, report: impl Fn() -> anyhow::Result<SweepReport>) -> anyhow::Result<()> {
        if self.turn.elapsed() < Self::TURN {
            return Ok(());
        }
        let worked = cpu_time()?.saturating_sub(self.since);
        if worked < Self::SPELL {
            thread::yield_now();
        } else {
            let report = report()?;
            let (passed, expired) = (report.passed - self.passed, report.expired - self.expired);
            thread::sleep(worked * Self::rest(passed, expired));
            (self.since, self.passed, self.expired) = (cpu_time()?, report.passed, report.expired);
        }
        self.turn = Instant::now();
        Ok(())
    }

    /// How many times as long to rest after so many entries have been passed, and so many of them deleted.
    fn rest(passed: u64, expired: u64) -> u32 {
        let kept = passed.saturating_sub(expired);
        (u64::from(Self::LONGEST_REST) * kept / passed.max(1)).max(1) as u32
    }
}

/// How long a CPU was busy with this thread.
fn cpu_time() -> anyhow::Result<Duration> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("the clock of this thread cannot be read")?;
    Ok(time.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(active: u32, total: u32) -> u64 {
        u64::from(active) << 32 | u64::from(total)
    }

    #[test]
    fn a_correction_makes_live_what_was_counted() {
        let cases = [((3, 5), (4, 9)), ((0, 0), (2, 2)), ((7, 7), (0, 3)), ((1, 4), (2, 3)), ((5, 5), (u32::MAX, 4))];
        for (counted, live) in cases.map(|(counted, live)| (word(counted.0, counted.1), word(live.0, live.1))) {
            assert_eq!(live.wrapping_add(Drift::between(counted, live).word()), counted);
        }
    }

    #[test]
    fn what_deletes_much_rests_less() {
        let rests = [(1000, 0), (1000, 500), (1000, 1000), (0, 0), (1, 2)].map(|(passed, expired)| Pace::rest(passed, expired));
        assert_eq!(rests, [9, 4, 1, 1, 1]);
    }

    #[test]
    fn only_what_two_runs_agree_on_is_drift() {
        let drift = |total| Drift { total, active: 0 };
        assert_eq!(drift(-4).confirmed(drift(-5), 2), drift(-4));
        assert_eq!(drift(-5).confirmed(drift(-4), 2), drift(-4));
        assert_eq!(drift(4).confirmed(drift(-5), 0), drift(0));
        assert_eq!(drift(-4).confirmed(drift(-5), 4), drift(0));
        assert_eq!(drift(-4).confirmed(drift(0), 0), drift(0));
    }
}
