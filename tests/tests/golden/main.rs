//! The golden cases of ipvsadm: what the real program said over the real IPVS, byte for byte.
//!
//! A case is a file of shell lines and the transcript of them (`tests/data/ipvsadm-golden`, form: head of `run-golden` there).
//! Each runs against a daemon of its own, in a network of its own, some beside each other. Two lists name the cases that need
//! not pass, each with the reason: `tests/data/golden-differences.json` those that bpfvs answers otherwise on purpose (each
//! stands in docs/ipvsadm.md, too), `tests/data/golden-pending.txt` those that wait for something. The test fails if a case
//! differs that is on neither list, and if one passes that is. Cases of printing (`format/`) are a test of `lb-user`.
//!
//! ```text
//! cargo test -p bpfvs-tests --test golden             all; the last line is `golden: P of N passed`
//! cargo test -p bpfvs-tests --test golden -- 70 89-   those with such a text in the name, with the differences of listed ones
//! cargo xtask golden DIRECTORY                        those of another directory: BPFVS_GOLDEN names it
//! ```
//!
//! A case says what it needs of the machine (`#@ needs sctp`); one that does not get it is run in a virtual machine that has it
//! ([`guest`]), or else skipped, loudly. This has no test harness, because the cases are data, not functions.

mod guest;

use std::{
    collections::BTreeMap,
    env, fs,
    fs::File,
    io::{Read, Seek},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{self, Command, ExitCode, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use bpfvs_tests::{
    bpfvs::{self, Bpfvs},
    netns::{Namespace, run},
    skip,
};
use serde::Deserialize;

/// What cases may need of the machine, and a line of shell that finds out whether it is there, in the director's namespace.
/// Other needs are the implementation's.
const NEEDS: [(&str, &str); 5] = [
    ("names", "grep -q '^http-alt' /etc/services"),
    ("nft", "nft list tables"),
    ("sctp", "{ modprobe -q sctp; grep -q ^SCTP /proc/net/protocols; }"),
    ("setpriv", "command -v setpriv"),
    (
        "tunnels",
        "ip link add probe4 type ipip local 192.0.2.1 && ip link add probe6 type ip6tnl local 2001:db8::1 && ip link del probe4 && ip link del probe6",
    ),
];

/// The namespaces that the labs are made of.
const HOSTS: [&str; 6] = ["client", "dir", "rs1", "rs2", "rs3", "sw"];

fn main() -> ExitCode {
    // Options are the test harness's; all that is left are parts of names.
    let wanted: Vec<String> = env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    match golden(&wanted) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("FAIL golden: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the cases whose names contain one of these texts; all if there is none.
fn golden(wanted: &[String]) -> Result<bool> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
    let mut pending = read_pending(&data.join("golden-pending.txt"))?;
    pending.extend(read_differences(&data.join("golden-differences.json"))?);
    let directory = data.join("ipvsadm-golden");
    let own = Case::read_all(&directory)?;
    if let Some(name) = pending.keys().find(|name| !own.iter().any(|case| case.name == **name)) {
        bail!("a list of differences names {name}, and there is no such case");
    }
    let promise = format!("{} of {} golden cases", own.len() - pending.len(), own.len());
    let read_me = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md"))?;
    ensure!(read_me.contains(&promise), "README.md should say that {promise} pass");
    let all = match env::var_os("BPFVS_GOLDEN") {
        Some(other) => Case::read_all(Path::new(&other))?.into_iter().map(|case| case.with_needs_of(&own)).collect(),
        None => own,
    };
    let cases: Vec<_> =
        all.into_iter().filter(|case| wanted.is_empty() || wanted.iter().any(|part| case.name.contains(part))).collect();
    let missing = ["ip", "nsenter", "perl", "setsid"].into_iter().find(|program| skip::find(program).is_none());
    let obstacle = match (skip::is_root(), missing, bpfvs::binary()) {
        (false, ..) => Some("needs root".to_owned()),
        (_, Some(program), _) => Some(format!("needs the program {program}")),
        (.., Err(error)) => Some(format!("{error:#}")),
        _ => None,
    };
    if let Some(reason) = obstacle {
        skip::announce("golden", &reason);
        return Ok(true);
    }
    let programs = programs(&directory)?;
    let next = AtomicUsize::new(0);
    let verdicts = Mutex::new(BTreeMap::new());
    let workers = thread::available_parallelism().map_or(1, usize::from).min(cases.len());
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let verdict = judge(case, pending.get(&case.name), &directory, programs.path(), !wanted.is_empty());
                    verdicts.lock().expect("nobody panics with it").insert(case.name.clone(), verdict);
                }
            });
        }
    });
    let mut verdicts = verdicts.into_inner().expect("nobody panicked with it");
    let skipped: Vec<_> =
        verdicts.iter().filter(|(_, verdict)| **verdict == Verdict::Skipped).map(|(name, _)| name.as_str()).collect();
    if !skipped.is_empty() {
        match guest::obstacle() {
            None => {
                println!("in a virtual machine:");
                let others = guest::judge(&skipped, env::var_os("BPFVS_GOLDEN").as_ref().map(Path::new))?;
                verdicts.extend(others);
            }
            Some(obstacle) => skipped.iter().for_each(|name| println!("SKIPPED golden {name}: {obstacle}")),
        }
    }
    let count = |wanted| verdicts.values().filter(|verdict| **verdict == wanted).count();
    println!("{} failed, {} pending, {} skipped", count(Verdict::Failed), count(Verdict::Pending), count(Verdict::Skipped));
    println!("golden: {} of {} passed", count(Verdict::Passed), verdicts.len());
    Ok(count(Verdict::Failed) == 0)
}

/// What came of a case.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    Passed,
    Pending,
    Skipped,
    Failed,
}

/// Runs a case, and prints what came of it.
fn judge(case: &Case, pending: Option<&String>, directory: &Path, programs: &Path, talkative: bool) -> Verdict {
    let name = &case.name;
    let outcome = case.run(directory, programs).and_then(|outcome| match outcome {
        Outcome::Lacking(need) => Ok(Err(need)),
        Outcome::Transcript(transcript) => case.difference(&transcript).map(Ok),
    });
    // One print for each case: they run beside each other.
    match (outcome, pending) {
        (Err(error), _) => {
            println!("FAIL {name}: {error:#}");
            Verdict::Failed
        }
        (Ok(Err(need)), _) => {
            println!("{name}: this machine lacks {need}");
            Verdict::Skipped
        }
        (Ok(Ok(None)), None) => {
            println!("ok   {name}");
            Verdict::Passed
        }
        (Ok(Ok(None)), Some(_)) => {
            println!("FAIL {name}: it passes; take it off the list of tests/data that names it");
            Verdict::Failed
        }
        (Ok(Ok(Some(difference))), None) => {
            println!("FAIL {name}\n{difference}");
            Verdict::Failed
        }
        (Ok(Ok(Some(difference))), Some(reason)) => {
            println!("pending {name}: {reason}{}", if talkative { format!("\n{difference}") } else { String::new() });
            Verdict::Pending
        }
    }
}

/// A difference that is wanted.
#[derive(Deserialize)]
struct Difference {
    /// What docs/ipvsadm.md calls it.
    name: String,
    /// The case that shows it, if one does.
    case: Option<String>,
    reason: String,
}

/// Reads the list of wanted differences, and gives back the cases of this test with their reasons.
fn read_differences(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let differences: Vec<Difference> = serde_json::from_str(&text).with_context(|| format!("understand {}", path.display()))?;
    let documentation = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/ipvsadm.md"))?;
    if let Some(missing) = differences.iter().find(|difference| !documentation.contains(&difference.name)) {
        bail!("docs/ipvsadm.md does not name the difference {:?}: {}", missing.name, missing.reason);
    }
    let cases = differences.into_iter().filter_map(|difference| Some((difference.case?, difference.reason)));
    Ok(cases.filter(|(case, _)| !case.starts_with("format/")).collect())
}

/// Reads the list of cases that cannot pass yet: `NAME  REASON` in each line, remarks begin with `#`.
fn read_pending(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, reason) = line.split_once(' ').with_context(|| format!("golden-pending.txt: {line} has no reason"))?;
            Ok((name.to_owned(), reason.trim().to_owned()))
        })
        .collect()
}

/// A directory with the programs under test, where any user may run them: one case asks as nobody.
fn programs(directory: &Path) -> Result<tempfile::TempDir> {
    let programs = tempfile::tempdir()?;
    fs::set_permissions(programs.path(), fs::Permissions::from_mode(0o755))?;
    fs::copy(bpfvs::binary()?, programs.path().join("bpfvs")).context("copy bpfvs")?;
    for name in ["ipvsadm", "ipvsadm-save", "ipvsadm-restore"] {
        symlink("bpfvs", programs.path().join(name))?;
    }
    executable(&programs.path().join("netpoke"), &fs::read(directory.join("lab/netpoke"))?)?;
    let ip = skip::find("ip").context("needs the program ip")?;
    executable(&programs.path().join("ip"), IP.replace("IP", &ip.display().to_string()).as_bytes())?;
    Ok(programs)
}

/// `ip` for kernels that were built without dummy devices: a bridge without ports swallows what it is given, too.
const IP: &str = r#"#!/bin/bash
case "$*" in *" type dummy") set -- "${@:1:$#-1}" bridge ;; esac
exec IP "$@"
"#;

fn executable(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content).with_context(|| format!("write {}", path.display()))?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

/// A case.
struct Case {
    name: String,
    /// The lines to type.
    lines: Vec<String>,
    /// What lab.sh is asked for.
    lab: String,
    needs: Vec<String>,
    expected: PathBuf,
}

/// What a run of a case comes to.
enum Outcome {
    /// The machine does not have this.
    Lacking(&'static str),
    Transcript(Vec<u8>),
}

impl Case {
    /// All cases of a directory, in order.
    fn read_all(directory: &Path) -> Result<Vec<Self>> {
        let entries = fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))?;
        let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        let commands = paths.iter().filter(|path| path.extension().is_some_and(|extension| extension == "cmds"));
        let mut cases = commands.map(|path| Self::read(path)).collect::<Result<Vec<_>>>()?;
        ensure!(!cases.is_empty(), "there are no cases in {}", directory.display());
        cases.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(cases)
    }

    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let name = path.file_stem().context("a case has a name")?.to_string_lossy().into_owned();
        let words = |word: &'static str| text.lines().filter_map(move |line| line.strip_prefix("#@ ")?.strip_prefix(word));
        Ok(Self {
            name,
            lab: words("lab ").next().unwrap_or("none").to_owned(),
            needs: words("needs ").flat_map(str::split_whitespace).map(str::to_owned).collect(),
            lines: text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect(),
            expected: path.with_extension("out"),
        })
    }

    /// The case with what our own case of this name needs of the machine, too.
    fn with_needs_of(mut self, own: &[Self]) -> Self {
        self.needs.extend(own.iter().filter(|case| case.name == self.name).flat_map(|case| case.needs.clone()));
        self
    }

    /// Types the lines in a network and with a daemon of the case's own.
    fn run(&self, directory: &Path, programs: &Path) -> Result<Outcome> {
        let lab = Lab::new(self, directory, programs)?;
        let director = lab.director()?;
        let lacking = NEEDS.iter().filter(|(word, _)| self.needs.iter().any(|need| need == word));
        for (word, probe) in lacking {
            let status = lab.shell(director, probe).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
            if !status.success() {
                return Ok(Outcome::Lacking(word));
            }
        }
        let bpfvs = Bpfvs::start(director, &[])?;
        let mut transcript = Vec::new();
        for line in &self.lines {
            let mut output = tempfile::tempfile()?;
            let mut error = tempfile::tempfile()?;
            // Files, not pipes: a line may leave processes behind that hold them open.
            let mut shell = lab.shell(director, line);
            shell.env("BPFVS_SOCKET", bpfvs.socket()).stdout(output.try_clone()?).stderr(error.try_clone()?);
            let status = shell.status().with_context(|| format!("run {line}"))?;
            transcript.extend_from_slice(format!("$ {line}\n").as_bytes());
            append(&mut transcript, &read_back(&mut output)?, b"");
            append(&mut transcript, &read_back(&mut error)?, b"stderr: ");
            let code = status.code().with_context(|| format!("{line} ended with {status}"))?;
            transcript.extend_from_slice(format!("[exit {code}]\n").as_bytes());
        }
        Ok(Outcome::Transcript(transcript))
    }

    /// How a transcript differs from the expected one.
    fn difference(&self, transcript: &[u8]) -> Result<Option<String>> {
        let expected = fs::read(&self.expected).with_context(|| format!("read {}", self.expected.display()))?;
        if expected == transcript {
            return Ok(None);
        }
        let got = tempfile::NamedTempFile::new()?;
        fs::write(got.path(), transcript)?;
        let mut diff = Command::new("diff");
        diff.args(["--unified", "--text", "--label", "expected", "--label", "got"]).arg(&self.expected).arg(got.path());
        let output = diff.output().context("start diff")?;
        Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()))
    }
}

/// What was written to a file.
fn read_back(file: &mut File) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut text)?;
    Ok(text)
}

/// Appends lines to a transcript, each behind a prefix; a last line without an end gets a remark.
fn append(transcript: &mut Vec<u8>, text: &[u8], prefix: &[u8]) {
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        transcript.extend_from_slice(prefix);
        transcript.extend_from_slice(line);
    }
    if !text.is_empty() && !text.ends_with(b"\n") {
        transcript.extend_from_slice(b"\n\\ no newline\n");
    }
}

/// The network of a case, made by lab.sh under names that no other case uses, and the words that lead into it.
struct Lab {
    /// Kept for their end.
    namespaces: Vec<Namespace>,
    /// The words, and what netpoke keeps.
    directory: tempfile::TempDir,
    path: String,
}

impl Lab {
    fn new(case: &Case, directory: &Path, programs: &Path) -> Result<Self> {
        let name = format!("bpfvsg-{}-{}", process::id(), case.name.split('-').next().unwrap_or_default());
        let words = tempfile::tempdir()?;
        for host in HOSTS.into_iter().filter(|host| *host != "dir") {
            let script = format!("#!/bin/sh\nexec nsenter --net=/run/netns/{name}-{host} \"$@\"\n");
            executable(&words.path().join(host), script.as_bytes())?;
        }
        let path = env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}:/usr/sbin:/sbin:{}", programs.display(), words.path().display());
        let mut lab = Self { namespaces: Vec::new(), directory: words, path };
        let mut command = Command::new("bash");
        command.arg("-c").arg(format!(". '{}' && lab_up {}", directory.join("lab/lab.sh").display(), case.lab));
        lab.equip(&mut command).env("GOLDEN_LAB", &name);
        let made = run(&mut command);
        let names = HOSTS.map(|host| format!("{name}-{host}"));
        let exists = |name: &String| Path::new("/run/netns").join(name).exists();
        lab.namespaces = names.into_iter().filter(exists).map(Namespace::adopt).collect();
        made.map(|_| lab)
    }

    fn director(&self) -> Result<&Namespace> {
        self.namespaces.iter().find(|namespace| namespace.name().ends_with("-dir")).context("lab.sh makes a director")
    }

    /// A line of shell, to be run in a namespace.
    fn shell(&self, namespace: &Namespace, line: &str) -> Command {
        let mut command = namespace.command("bash");
        command.args(["-c", line]).stdin(Stdio::null());
        self.equip(&mut command);
        command
    }

    fn equip<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("PATH", &self.path).env("LC_ALL", "C").env("NETPOKE_DIR", self.directory.path().join("held"))
    }
}
