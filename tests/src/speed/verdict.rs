//! This run beside the last committed one, and what must never get worse.
//!
//! Compared is what does not depend on the machine: ratios to the floors of the same run, verified instructions, bytes of machine
//! code. Nanoseconds are shown, and nothing fails because of them.

use std::{
    fmt::{self, Display, Formatter},
    fs,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    Case,
    report::{Line, Report},
    weight::{Connections, Program},
};
use crate::{lab::Family, test_run::Hook};

/// Where committed runs are.
pub const DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/bench");
/// So much may a ratio grow: two runs of the same programs differ by as much.
const RATIO: f64 = 1.2;
/// The same with so many flows that memory decides.
const RATIO_COLD: f64 = 1.4;
/// With so many flows the tables are about as large as the last cache, and what other guests leave of that decides: ratios between 0.9
/// and 1.4 have been seen of the same machine code. They are not compared.
const LAST_CACHE: RangeInclusive<u64> = 1 << 16..=1 << 17;
/// So much may a count grow.
const COUNT: f64 = 1.05;
/// What direct routing may cost at XDP, in floors, whatever it did cost before.
const ROUTED: f64 = 1.3;

/// What a committed run says.
#[derive(Debug, Deserialize)]
pub struct Before {
    /// Where it stands.
    #[serde(skip)]
    pub file: PathBuf,
    cases: Vec<Known>,
    #[serde(default)]
    programs: Vec<Program>,
    #[serde(default)]
    connections: Vec<Connections>,
}

/// A committed case.
#[derive(Debug, Deserialize)]
struct Known {
    hook: String,
    ip: u8,
    path: super::Path,
    flows: u64,
    ratio: Option<Ratio>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Ratio {
    minimum: f64,
}

/// Something that got worse.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Worse {
    /// What.
    pub what: String,
    /// What it was.
    pub before: f64,
    /// What it is.
    pub now: f64,
    /// What it may be.
    pub limit: f64,
}

impl Display for Worse {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self { what, before, now, limit } = self;
        write!(formatter, "{what}: {now:.2}, was {before:.2}, and may be {limit:.2}")
    }
}

impl Before {
    /// The last committed run, if there is one: files are named after days.
    pub fn last() -> Result<Option<Self>> {
        let mut files: Vec<PathBuf> =
            fs::read_dir(DIRECTORY).into_iter().flatten().filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
        files.retain(|file| is_day(file));
        files.sort();
        files.pop().map(|file| Self::read(&file)).transpose()
    }

    /// A run.
    pub fn read(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        let before: Self =
            serde_json::from_str(&text).with_context(|| format!("{} has no figures of `cargo xtask bench`", file.display()))?;
        Ok(Self { file: file.to_owned(), ..before })
    }

    /// Whether a case's ratio to its floor is worse than it was, or than it may be at all.
    pub fn of_case(&self, case: Case, line: &Line) -> Option<Worse> {
        let now = line.figures.ratio?.minimum;
        let known = self.cases.iter().find(|known| known.is(line)).and_then(|known| known.ratio);
        let what = format!("{case}: floors");
        let routed = case.path == super::Path::Routed && case.hook == Hook::Xdp && case.family == Family::Ipv4 && case.flows == 1;
        if routed && now > ROUTED {
            return Some(Worse { what, before: known.map_or(f64::NAN, |known| known.minimum), now, limit: ROUTED });
        }
        let before = known?.minimum;
        let limit = before * if case.flows > 1 << 10 { RATIO_COLD } else { RATIO };
        // What each packet costs that is a run of its own is noise by half.
        let comparable = case.repeats() && !LAST_CACHE.contains(&case.flows);
        (comparable && now > limit).then_some(Worse { what, before, now, limit })
    }

    /// What else got worse.
    pub fn of_counts(&self, report: &Report) -> Vec<Worse> {
        let mut worse = Vec::new();
        let mut compare = |what: String, before: f64, now: f64| {
            let limit = before * COUNT;
            if now > limit {
                worse.push(Worse { what, before, now, limit });
            }
        };
        for now in &report.programs {
            if let Some(before) = self.programs.iter().find(|before| before.name == now.name) {
                compare(format!("{}: verified instructions", now.name), before.verified.into(), now.verified.into());
                compare(format!("{}: bytes of machine code", now.name), before.machine_code.into(), now.machine_code.into());
            }
        }
        for now in &report.connections {
            if let Some(before) = self.connections.iter().find(|before| before.table == now.table) {
                compare(format!("{}: bytes for each connection", now.table), before.bytes, now.bytes);
            }
        }
        worse
    }
}

impl Known {
    fn is(&self, line: &Line) -> bool {
        self.hook == line.hook && self.ip == line.ip && self.path == line.path && self.flows == line.flows
    }
}

/// Whether a file is named after a day, as in `2026-11-21.json`.
fn is_day(file: &Path) -> bool {
    let Some(day) = file.file_name().and_then(|name| name.to_str()?.strip_suffix(".json")) else { return false };
    day.len() == 10
        && day.bytes().enumerate().all(|(at, byte)| if matches!(at, 4 | 7) { byte == b'-' } else { byte.is_ascii_digit() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_runs_can_be_read() {
        assert!(is_day(Path::new("docs/bench/2026-11-21.json")) && !is_day(Path::new("docs/bench/2026-11-21-peers.json")));
        let before = Before::last().expect("what is committed is well-formed").expect("there is a committed run");
        assert!(before.cases.iter().any(|case| case.ratio.is_some()), "{before:?}");
    }
}
