//! Flood mode, as the daemon sees it: two words that the packet path keeps ([`lb_common::flood`]).
//!
//! The packet path needs nothing of this. The daemon reads the words to tell people, and corrects the count of half-open connections
//! after a sweep: it drifts when two CPUs meet the same connection at once.
//!
//! Connections come and go while the sweep walks, in a flood by the thousand. So what it counted is held against what the word said
//! before and after, and a difference counts only beyond both:
//!
//! ```text
//! before 1000, after 1010, counted 1004      no drift
//! before 1000, after 1010, counted  990      10 too many: taken away if the next sweep finds so, too
//! ```

use std::sync::atomic::Ordering;

use anyhow::Context as _;
use aya::maps::{MapData, PerCpuArray};
use lb_common::{
    config::{Config, SweepReport, flags},
    flood::word,
};

use super::{connections::Clock, maps::Pins, shared::Words};
use crate::director::model::FloodView;

/// The words.
pub struct Flood {
    words: Words,
    /// What each CPU has not added to its word yet.
    kept: PerCpuArray<MapData, u64>,
}

impl Flood {
    /// Opens them.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        Ok(Self { words: Words::open(&pins.map("FLOOD"))?, kept: pins.typed("HALF_OPEN")? })
    }

    /// How many connections are half-open.
    pub fn half_open(&self) -> anyhow::Result<i64> {
        let kept = self.kept.get(&0, 0).context("what CPUs count of half-open connections cannot be read")?;
        let told = self.words.load(word::HALF_OPEN);
        Ok(kept.iter().fold(told, |sum, kept| sum.wrapping_add(*kept)).cast_signed())
    }

    /// How it is, and why. `report` is the last sweep's, for its clocks.
    pub fn view(&self, config: &Config, report: &SweepReport) -> anyhow::Result<FloodView> {
        let last = self.words.load(word::LAST);
        let since = if last == 0 { None } else { Some(Clock::ticks(report, config.hz)?.saturating_sub(last)) };
        let hold = u64::from(config.flood_hold) * u64::from(config.hz);
        let never = config.flags & flags::FLOOD_NEVER != 0;
        Ok(FloodView {
            on: !never && (config.flags & flags::FLOOD_ALWAYS != 0 || since.is_some_and(|ticks| ticks < hold)),
            half_open: self.half_open()?.max(0).cast_unsigned(),
            limit: config.half_open_limit,
        })
    }
}

/// Corrects the count of half-open connections.
pub struct Recount {
    flood: Flood,
    suspicion: i64,
}

impl Recount {
    /// Opens the words.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        Ok(Self { flood: Flood::open(pins)?, suspicion: 0 })
    }

    /// What the word says, to be asked before the sweep.
    pub fn before(&self) -> anyhow::Result<i64> {
        self.flood.half_open()
    }

    /// Takes in what the sweep counted.
    pub fn after(&mut self, before: i64, counted: u64) -> anyhow::Result<()> {
        let drift = drift(before, self.flood.half_open()?, counted.cast_signed());
        let correction = confirmed(drift, std::mem::replace(&mut self.suspicion, drift));
        if correction != 0
            && let Some(word) = self.flood.words.word(word::HALF_OPEN)
        {
            word.fetch_add(correction.cast_unsigned(), Ordering::AcqRel);
            self.suspicion = 0;
            tracing::debug!(correction, "the count of half-open connections had drifted");
        }
        Ok(())
    }
}

/// By how much was counted more, or less, than the word said before and after.
fn drift(before: i64, after: i64, counted: i64) -> i64 {
    counted - counted.clamp(before.min(after), before.max(after))
}

/// The part of a difference that an earlier one confirms.
fn confirmed(now: i64, before: i64) -> i64 {
    if now.signum() == before.signum() { now.signum() * now.abs().min(before.abs()) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_beyond_both_is_drift() {
        assert_eq!(drift(1000, 1010, 1004), 0);
        assert_eq!(drift(1010, 1000, 1004), 0);
        assert_eq!(drift(1000, 1010, 990), -10);
        assert_eq!(drift(-3, -3, 0), 3);
        assert_eq!(drift(7, 7, 7), 0);
    }

    #[test]
    fn two_sweeps_have_to_agree() {
        assert_eq!((confirmed(-10, -4), confirmed(-4, -10)), (-4, -4));
        assert_eq!((confirmed(-10, 4), confirmed(5, 0), confirmed(0, 5)), (0, 0, 0));
    }
}
