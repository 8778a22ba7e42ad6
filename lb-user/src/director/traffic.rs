//! Traffic counters as people see them: since the last zeroing, and per second.
//!
//! The datapath's counters only ever grow. Zeroing (`ipvsadm -Z`) therefore remembers where they stood, and what is shown
//! is the difference. Rates are IPVS's: every two seconds a moving average takes in a quarter of what is new.
//!
//! ```text
//! packets, connections:  e += ((delta << 9) - e) >> 2      shown (e + 511) >> 10
//! bytes:                 e += ((delta << 4) - e) >> 2      shown (e + 15) >> 5
//! ```

use std::time::Duration;

use lb_common::statistics::Statistics;
use serde::{Deserialize, Serialize};

use super::model::Totals;

/// How often the estimators have to be fed: their constants stand for this period.
pub(super) const ESTIMATOR_PERIOD: Duration = Duration::from_secs(2);

impl From<Statistics> for Totals {
    fn from(statistics: Statistics) -> Self {
        let Statistics { connections, packets_in, bytes_in, packets_out, bytes_out } = statistics;
        Self { connections, packets_in, packets_out, bytes_in, bytes_out }
    }
}

impl Totals {
    /// Whether there was nothing at all.
    pub(super) fn is_zero(&self) -> bool {
        *self == Self::default()
    }

    /// What came on top of `earlier`; nothing where there is less now, because the counters began anew.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        self.zip(earlier, u64::saturating_sub)
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        self.zip(other, u64::wrapping_add)
    }

    fn zip(self, other: Self, operation: fn(u64, u64) -> u64) -> Self {
        Self {
            connections: operation(self.connections, other.connections),
            packets_in: operation(self.packets_in, other.packets_in),
            packets_out: operation(self.packets_out, other.packets_out),
            bytes_in: operation(self.bytes_in, other.bytes_in),
            bytes_out: operation(self.bytes_out, other.bytes_out),
        }
    }
}

/// What all real servers together have done, those among them that are forgotten.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(super) struct Overall {
    /// The totals of those that are forgotten.
    pub(super) forgotten: Totals,
    /// What the totals were at the last zeroing.
    pub(super) zero: Totals,
    /// Rates.
    #[serde(skip)]
    pub(super) estimator: Estimator,
}

/// The moving averages of one service or real server, or of all.
#[doc(alias = "ip_vs_estimator")]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Estimator {
    /// The totals at the last tick; nothing before the first, so that old traffic does not count as new.
    last: Option<Totals>,
    /// The averages, scaled as in the module's table.
    scaled: Totals,
}

impl Estimator {
    /// Starts anew from these totals.
    pub(super) fn from(totals: Totals) -> Self {
        Self { last: Some(totals), scaled: Totals::default() }
    }

    /// Takes in the totals of now.
    pub(super) fn tick(&mut self, totals: Totals) {
        let delta = totals.since(self.last.replace(totals).unwrap_or(totals));
        let Totals { connections, packets_in, packets_out, bytes_in, bytes_out } = &mut self.scaled;
        for (average, delta, shift) in [
            (connections, delta.connections, 9),
            (packets_in, delta.packets_in, 9),
            (packets_out, delta.packets_out, 9),
            (bytes_in, delta.bytes_in, 4),
            (bytes_out, delta.bytes_out, 4),
        ] {
            let step = (delta << shift).wrapping_sub(*average).cast_signed() >> 2;
            *average = average.wrapping_add_signed(step);
        }
    }

    /// The averages per second.
    pub(super) fn rates(&self) -> Totals {
        let count = |average: u64| (average + 511) >> 10;
        let bytes = |average: u64| (average + 15) >> 5;
        Totals {
            connections: count(self.scaled.connections),
            packets_in: count(self.scaled.packets_in),
            packets_out: count(self.scaled.packets_out),
            bytes_in: bytes(self.scaled.bytes_in),
            bytes_out: bytes(self.scaled.bytes_out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_fades_as_in_the_kernel() {
        let burst = Totals { connections: 800, bytes_in: 24_000, ..Totals::default() };
        let mut estimator = Estimator::from(Totals::default());
        let mut shown = Vec::new();
        for _ in 0..7 {
            estimator.tick(burst);
            shown.push((estimator.rates().connections, estimator.rates().bytes_in));
        }
        assert_eq!(shown, [(100, 3000), (75, 2250), (56, 1687), (42, 1266), (32, 949), (24, 712), (18, 534)]);
    }

    #[test]
    fn old_traffic_is_not_new_to_a_new_daemon() {
        let mut estimator = Estimator::default();
        estimator.tick(Totals { packets_in: 1_000_000, ..Totals::default() });
        assert_eq!(estimator.rates(), Totals::default());
    }
}
