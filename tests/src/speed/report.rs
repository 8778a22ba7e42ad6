//! What was measured: a table for people, and JSON for programs.

use std::{
    collections::BTreeMap,
    fmt::{self, Display, Formatter},
    fs,
    path::Path as File,
    process::Command,
    thread,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    Case, Path,
    crowd::Crowd,
    measure::{Figures, Nanoseconds},
    picks::PickCost,
    staleness::Staleness,
    steps::Step,
    target::{Standing, Target},
    verdict::Worse,
    weight::{Connections, Program},
};
use crate::{lab::Family, test_run::Hook};

/// All that is known of a measurement.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(bound(deserialize = "'de: 'static"))]
pub struct Report {
    /// Where it took place.
    pub machine: Machine,
    /// The commit of the source, with `-dirty` if it was changed since.
    pub commit: Option<String>,
    /// When: the day.
    pub day: String,
    /// The size of the connection tables.
    pub max_connections: u32,
    /// How often each program had its turn.
    pub rounds: usize,
    /// The CPU to which the measurement was bound.
    pub cpu: usize,
    /// How to read the figures.
    #[serde(skip_deserializing)]
    pub notes: &'static [&'static str],
    /// The figures, in nanoseconds per packet.
    pub cases: Vec<Line>,
    /// The steps of an established packet.
    pub steps: Vec<Step>,
    /// What many services and many real servers cost.
    pub crowds: Vec<Crowd>,
    /// New connections by scheduler and number of real servers.
    pub picks: Vec<PickCost>,
    /// How far schedules stray from IPVS's choices.
    pub staleness: Vec<Staleness>,
    /// What the verifier and the compiler made of the programs.
    pub programs: Vec<Program>,
    /// What the tables take.
    pub connections: Vec<Connections>,
    /// What got worse since the last committed run, if it was compared.
    pub worse: Vec<Worse>,
    /// What belongs here and was not measured.
    pub not_measured: Vec<String>,
}

impl Display for Report {
    /// What stands over the table.
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Machine { processor, processors, kernel, memory_gib, mitigations, load } = &self.machine;
        let or_unknown = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".to_owned());
        writeln!(
            formatter,
            "{}, {processors} processors, {memory_gib:.0} GiB, load {load}, kernel {}, bpfvs {}",
            or_unknown(processor),
            or_unknown(kernel),
            or_unknown(&self.commit)
        )?;
        for (weakness, mitigation) in mitigations {
            writeln!(formatter, "{weakness}: {mitigation}")?;
        }
        writeln!(formatter, "{} rounds on CPU {}, tables for {} connections\n", self.rounds, self.cpu, self.max_connections)?;
        self.notes.iter().try_for_each(|note| writeln!(formatter, "{note}"))
    }
}

/// A machine.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Machine {
    /// The processor's name.
    pub processor: Option<String>,
    /// How many processors this process may use.
    pub processors: usize,
    /// The kernel's release.
    pub kernel: Option<String>,
    /// Its memory.
    pub memory_gib: f64,
    /// What the kernel does against weaknesses of the processor that make calls and branches dearer.
    pub mitigations: BTreeMap<String, String>,
    /// How many programs wanted a processor when the measurement began.
    pub load: f64,
}

/// A case and its figures.
#[derive(Clone, Debug, Deserialize, Serialize)]
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
    /// What is wanted of it.
    pub target: Option<Target>,
    /// How it stands to that.
    pub standing: Option<Standing>,
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
            kernel: word("/proc/sys/kernel/osrelease"),
            memory_gib: memory(&fs::read_to_string("/proc/meminfo").unwrap_or_default()).unwrap_or_default(),
            mitigations: WEAKNESSES
                .into_iter()
                .filter_map(|name| Some((name.to_owned(), word(&format!("/sys/devices/system/cpu/vulnerabilities/{name}"))?)))
                .collect(),
            load: fs::read_to_string("/proc/loadavg")
                .ok()
                .and_then(|text| text.split_whitespace().next()?.parse().ok())
                .unwrap_or_default(),
        }
    }
}

/// Weaknesses of processors whose mitigations show in what a packet takes.
const WEAKNESSES: [&str; 4] = ["retbleed", "spec_rstack_overflow", "spectre_v1", "spectre_v2"];

/// A file of one line.
fn word(file: &str) -> Option<String> {
    fs::read_to_string(file).ok().map(|text| text.trim().to_owned())
}

/// GiB of memory, as `/proc/meminfo` says.
fn memory(information: &str) -> Option<f64> {
    let kibibytes = information.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.split_whitespace().next()?;
    Some(kibibytes.parse::<f64>().ok()? / f64::from(1 << 20))
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
        let target = Target::of(case);
        let standing = target.map(|target| target.standing(&figures));
        Self { hook, ip, path: case.path, flows: case.flows, repeated: case.repeats(), target, standing, figures }
    }

    /// What was measured.
    pub fn case(&self) -> Case {
        let hook = if self.hook == "xdp" { Hook::Xdp } else { Hook::Tc };
        let family = if self.ip == 4 { Family::Ipv4 } else { Family::Ipv6 };
        Case { hook, family, path: self.path, flows: self.flows }
    }

    /// The names of the columns, over the lines.
    pub fn heading() -> String {
        format!(
            "{:<4} {:<4} {:<32} {:>8} {:>16} {:>16} {:>13} {:>13} {:<7}",
            "hook", "IP", "packet", "flows", "floor", "director", "ratio", "must/stretch", "met"
        )
    }

    /// What is wanted, and whether it is met.
    fn wanted(&self) -> (String, String) {
        let text = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        (text(self.target.map(|target| target.to_string())), text(self.standing.map(|standing| standing.to_string())))
    }
}

impl Display for Line {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Figures { floor, director, ratio, .. } = self.figures;
        let mark = if self.repeated { "" } else { " *" };
        let (target, standing) = self.wanted();
        write!(
            formatter,
            "{:<4} IPv{} {:<32} {:>8} {:>16} {:>16} {:>13} {target:>13} {standing:<7}",
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

/// A time: the minimum, and the median in parentheses.
fn time(time: Nanoseconds) -> String {
    format!("{:.1} ({:.1})", time.minimum, time.median)
}

impl Report {
    /// An earlier run, that this program wrote.
    pub fn read(file: &File) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        // For good: names in it are used like those of the program itself.
        let report: Self = serde_json::from_str(text.leak())
            .with_context(|| format!("{} has no figures of `cargo xtask bench`", file.display()))?;
        Ok(Self { notes: NOTES, ..report })
    }

    /// Where and when, in a sentence.
    pub fn provenance(&self) -> String {
        let Machine { processor, processors, kernel, load, .. } = &self.machine;
        format!(
            "{}, {processors} processors (load {load}), Linux {}, commit {}, {}.",
            processor.as_deref().unwrap_or("unknown processor"),
            kernel.as_deref().unwrap_or("unknown"),
            self.commit.as_deref().unwrap_or("unknown"),
            self.day
        )
    }

    /// All tables, for the documentation: name and text.
    pub fn tables(&self) -> Vec<(&'static str, String)> {
        let source = format!("{} `cargo xtask bench`, figures in `docs/bench/{}.json`.", self.provenance(), self.day);
        let block = |heading: &str, lines: Vec<String>| format!("{source}\n\n```text\n{heading}\n{}\n```\n", lines.join("\n"));
        let lines = |items: &[&dyn Display]| items.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut tables = Vec::new();
        let mut add = |name, heading: String, items: Vec<String>| {
            if !items.is_empty() {
                tables.push((name, block(&heading, items)));
            }
        };
        add("packets", Line::heading(), self.cases.iter().map(ToString::to_string).collect());
        add("steps", super::steps::heading(), self.steps.iter().map(ToString::to_string).collect());
        add("crowds", super::crowd::heading(), self.crowds.iter().map(ToString::to_string).collect());
        add("picks", PICKS.to_owned(), self.picks.iter().map(ToString::to_string).collect());
        let weights = lines(&self.programs.iter().map(|program| program as &dyn Display).collect::<Vec<_>>());
        add("programs", Program::heading(), weights);
        let weights = lines(&self.connections.iter().map(|table| table as &dyn Display).collect::<Vec<_>>());
        add("memory", Connections::heading(), weights);
        tables
    }
}

/// What stands over the lines of schedulers.
pub const PICKS: &str = "new connections at xdp, by scheduler and number of real servers";
