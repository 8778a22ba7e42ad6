//! Why packets left without being forwarded: the counters of [`Reason`], summed over all CPUs.

use anyhow::Context as _;
use aya::maps::{MapData, PerCpuArray};
use lb_common::reason::{Fate, Reason};

use super::maps::Pins;
use crate::director::model::ReasonView;

/// The reason counters.
pub struct Reasons {
    counters: PerCpuArray<MapData, u64>,
}

impl Reasons {
    /// Opens the counters.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        Ok(Self { counters: pins.typed("REASONS")? })
    }

    /// Reads every counter.
    pub fn list(&self) -> anyhow::Result<Vec<ReasonView>> {
        Reason::ALL
            .iter()
            .map(|reason| {
                let name = reason.name();
                let values =
                    self.counters.get(&(*reason as u32), 0).with_context(|| format!("the counter of {name} cannot be read"))?;
                let fate = match reason.fate() {
                    Fate::Answered => "answered",
                    Fate::Dropped => "dropped",
                    Fate::Forwarded => "forwarded",
                    Fate::Passed => "passed",
                };
                Ok(ReasonView {
                    name: name.to_owned(),
                    fate: fate.to_owned(),
                    text: reason.text().to_owned(),
                    packets: values.iter().sum(),
                })
            })
            .collect()
    }
}
