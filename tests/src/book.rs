//! A book of connections: whom IPVS would give the next one, in few words.
//!
//! The kernel's IPVS compares with arithmetic of its own and walks over lists. What comes of that is short to say for
//! schedulers that go by connections, and said here once more, independently of bpfvs.
//!
//! ```
//! use bpfvs_tests::book::{Entry, choice};
//!
//! let [busy, idle] = [3, 0].map(|active| Entry { weight: 1, active, total: active, ..Entry::default() });
//! assert_eq!(choice("wlc", [&busy, &idle].into_iter()), Some(1));
//! ```

use std::cmp::Reverse;

/// A real server.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Entry {
    /// Its weight.
    pub weight: u32,
    /// With so many connections it takes no more; 0: never. There is no way back here.
    pub upper_threshold: u32,
    /// Its active connections.
    pub active: u32,
    /// All its connections.
    pub total: u32,
}

/// Which of the real servers, the newest first, takes the next connection.
///
/// # Panics
/// If the scheduler is not one of `lc`, `wlc`, `sed`, `nq`, `fo` and `ovf`.
pub fn choice<'a>(scheduler: &str, newest_first: impl Iterator<Item = &'a Entry> + Clone) -> Option<usize> {
    let takes = |entry: &Entry| entry.weight > 0 && (entry.upper_threshold == 0 || entry.total < entry.upper_threshold);
    let load = |entry: &Entry| u64::from(entry.active * 256 + entry.total);
    let delay = |entry: &Entry| u64::from(entry.active + 1);
    let able = newest_first.enumerate().filter(|(_, entry)| takes(entry));
    let least = |burden: &dyn Fn(&Entry) -> u64| {
        let crosswise = |one: &Entry, other: &Entry| burden(one) * u64::from(other.weight);
        able.clone().min_by(|(_, one), (_, other)| crosswise(one, other).cmp(&crosswise(other, one)))
    };
    let chosen = match scheduler {
        "lc" => able.clone().min_by_key(|(_, entry)| load(entry)),
        "wlc" => least(&load),
        "sed" => least(&delay),
        "nq" => able.clone().find(|(_, entry)| entry.active == 0).or_else(|| least(&delay)),
        "fo" => able.clone().min_by_key(|(_, entry)| Reverse(entry.weight)),
        "ovf" => able.clone().filter(|(_, entry)| entry.active <= entry.weight).min_by_key(|(_, entry)| Reverse(entry.weight)),
        other => unreachable!("{other} is not in the book"),
    };
    chosen.map(|(position, _)| position)
}
