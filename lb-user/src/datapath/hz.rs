//! How many ticks make a second: the kernel's `CONFIG_HZ`.
//!
//! The packet path tells time in jiffies, because they cost a nanosecond and the clocks cost twenty. Connections have
//! timeouts in seconds, so somebody must know the rate, and the kernel has no call that tells it. But it starts to count at
//! `2^32 - 300 * HZ` when the machine starts, so one look at both clocks shows which rate fits:
//!
//! ```text
//! up for 1000 s, jiffies = 2^32 + 175 000   ->   (1000 - 300) * 250   ->   HZ = 250
//! ```
//!
//! Around the 300th second after the start all rates fit; then two looks, a moment apart, decide.

use lb_common::config::SweepReport;

/// The rates that a kernel can be built with.
pub const RATES: [u32; 4] = [100, 250, 300, 1000];

/// Seconds after the start at which jiffies pass 2^32.
const WRAP_SECONDS: i128 = 300;
const NANOSECONDS: i128 = 1_000_000_000;

/// The rate that explains what the clocks say; nothing in the seconds in which every rate does.
pub fn from_start(report: &SweepReport) -> Option<u32> {
    let since_wrap = i128::from(report.monotonic_ns) - WRAP_SECONDS * NANOSECONDS;
    // The clocks need not start at the same instant: a few seconds of difference must not matter.
    if since_wrap.abs() < 20 * NANOSECONDS {
        return None;
    }
    nearest((i128::from(report.jiffies) - (1 << 32)) * NANOSECONDS, since_wrap)
}

/// The rate that explains how far the clocks moved between two looks; nothing if they were too close for an answer.
pub fn from_two(earlier: &SweepReport, later: &SweepReport) -> Option<u32> {
    let elapsed = i128::from(later.monotonic_ns) - i128::from(earlier.monotonic_ns);
    if elapsed < NANOSECONDS / 10 {
        return None;
    }
    nearest((i128::from(later.jiffies) - i128::from(earlier.jiffies)) * NANOSECONDS, elapsed)
}

/// The rate whose number of ticks in `elapsed` is nearest to the one seen.
fn nearest(ticks_by_nanoseconds: i128, elapsed: i128) -> Option<u32> {
    RATES.into_iter().min_by_key(|rate| (ticks_by_nanoseconds - i128::from(*rate) * elapsed).abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(rate: u32, milliseconds: u64) -> SweepReport {
        let jiffies = (1_u64 << 32) - u64::from(rate) * 300 + milliseconds * u64::from(rate) / 1000;
        SweepReport { jiffies, monotonic_ns: milliseconds * 1_000_000, ..SweepReport::default() }
    }

    #[test]
    fn one_look_tells_the_rate() {
        for rate in RATES {
            for seconds in [1, 30, 279, 321, 4_000, 100_000_000] {
                assert_eq!(from_start(&look(rate, seconds * 1000)), Some(rate), "{rate} Hz after {seconds} s");
            }
        }
    }

    #[test]
    fn clocks_that_start_apart_do_not_matter() {
        for rate in RATES {
            let mut report = look(rate, 330_000);
            report.monotonic_ns -= 400_000_000;
            assert_eq!(from_start(&report), Some(rate));
        }
    }

    #[test]
    fn near_the_wrap_it_takes_two_looks() {
        for rate in RATES {
            assert_eq!(from_start(&look(rate, 300_000)), None);
            assert_eq!(from_two(&look(rate, 299_990), &look(rate, 300_190)), Some(rate));
            assert_eq!(from_two(&look(rate, 299_990), &look(rate, 300_000)), None);
        }
    }
}
