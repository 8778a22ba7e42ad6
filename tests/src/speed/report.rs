//! What was measured: a table for people, and JSON for programs.

use std::{
    fmt::{self, Display, Formatter},
    fs,
    process::Command,
    thread,
};

use serde::Serialize;

use super::{Case, Path, measure::Figures, picks::PickCost, staleness::Staleness};
use crate::{lab::Family, test_run::Hook};

/// All that is known of a measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where it took place.
    pub machine: Machine,
    /// The commit of the source, with `-dirty` if it was changed since.
    pub commit: Option<String>,
    /// The size of the connection tables.
    pub max_connections: u32,
    /// How often each program had its turn.
    pub rounds: usize,
    /// The CPU to which the measurement was bound.
    pub cpu: usize,
    /// How to read the figures.
    pub notes: &'static [&'static str],
    /// The figures, in nanoseconds per packet.
    pub cases: Vec<Line>,
    /// New connections by scheduler and number of real servers.
    pub picks: Vec<PickCost>,
    /// How far schedules stray from IPVS's choices.
    pub staleness: Vec<Staleness>,
}

impl Display for Report {
    /// What stands over the table.
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Machine { processor, processors, kernel } = &self.machine;
        let or_unknown = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".to_owned());
        writeln!(
            formatter,
            "{}, {processors} processors, kernel {}, bpfvs {}",
            or_unknown(processor),
            or_unknown(kernel),
            or_unknown(&self.commit)
        )?;
        writeln!(formatter, "{} rounds on CPU {}, tables for {} connections\n", self.rounds, self.cpu, self.max_connections)?;
        self.notes.iter().try_for_each(|note| writeln!(formatter, "{note}"))
    }
}

/// A machine.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's name.
    pub processor: Option<String>,
    /// How many processors this process may use.
    pub processors: usize,
    /// The kernel's release.
    pub kernel: Option<String>,
}

/// A case and its figures.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// `xdp` or `tc`.
    pub hook: &'static str,
    /// 4 or 6.
    pub ip: u8,
    /// What the packets went through.
    pub path: Path,
    /// Flows in the table.
    pub flows: u64,
    /// Whether the kernel repeated the program within one run.
    pub repeated: bool,
    /// What it took.
    #[serde(flatten)]
    pub figures: Figures,
}

/// What one has to know to read the figures.
pub const NOTES: &[&str] = &[
    "Nanoseconds per packet by BPF_PROG_TEST_RUN, less what the harness takes with a program that does nothing; minimum of many short \
     samples (the median in parentheses). The harness, the floor and the director take turns.",
    "The floor parses, finds the connection by one hash hit (or inserts it, if it is new), writes the next hop's addresses and sends: \
     XDP by XDP_TX, tc by bpf_redirect.",
    "For XDP, the real server's device is the one that the packet came in by (the bench writes that into its entry), so that director \
     and floor both end with XDP_TX; `other device` is the entry as the daemon wrote it, which costs the director a call of bpf_redirect.",
    "TUN at tc (marked *): each packet is a run of its own, timed by the kernel around the program, because a buffer that was put into a \
     tunnel cannot be put into one again. Caches and branch predictors are colder there; compare with the floor of the same line only.",
    "New connections: 65536 SYNs of unknown clients in a sample, inserted into a table that holds as many flows as the column says, and \
     deleted again before the next sample.",
];

impl Machine {
    /// This one.
    pub fn this() -> Self {
        let information = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = information.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Self {
            processor: name.map(|(_, name)| name.trim().to_owned()),
            processors: thread::available_parallelism().map_or(1, Into::into),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|release| release.trim().to_owned()),
        }
    }
}

/// The commit of the source that this was built from.
pub fn commit() -> Option<String> {
    let mut git = Command::new("git");
    // The repository belongs to the user, and this runs as root.
    git.args(["-c", concat!("safe.directory=", env!("CARGO_MANIFEST_DIR"), "/.."), "-C", env!("CARGO_MANIFEST_DIR")]);
    let output = git.args(["describe", "--always", "--dirty", "--abbrev=12"]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl Line {
    /// A line of the report.
    pub fn new(case: Case, figures: Figures) -> Self {
        let hook = match case.hook {
            Hook::Xdp => "xdp",
            Hook::Tc => "tc",
        };
        let ip = match case.family {
            Family::Ipv4 => 4,
            Family::Ipv6 => 6,
        };
        Self { hook, ip, path: case.path, flows: case.flows, repeated: case.repeats(), figures }
    }

    /// The names of the columns, over the lines.
    pub fn heading() -> String {
        format!("{:<4} {:<4} {:<30} {:>8} {:>16} {:>16} {:>13}", "hook", "IP", "packet", "flows", "floor", "director", "ratio")
    }
}

impl Display for Line {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Figures { floor, director, ratio, .. } = self.figures;
        let time = |time: super::measure::Nanoseconds| format!("{:.1} ({:.1})", time.minimum, time.median);
        let mark = if self.repeated { "" } else { " *" };
        write!(
            formatter,
            "{:<4} IPv{} {:<30} {:>8} {:>16} {:>16} {:>13}",
            self.hook,
            self.ip,
            format!("{}{mark}", self.path.words()),
            self.flows,
            floor.map_or_else(|| "-".to_owned(), time),
            time(director),
            ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{:.2} ({:.2})", ratio.minimum, ratio.median)),
        )
    }
}
