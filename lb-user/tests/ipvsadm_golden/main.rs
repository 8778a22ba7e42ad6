//! Golden cases of the command line: the shell lines that the original ipvsadm and the kernel's IPVS were asked, and what
//! they answered, byte for byte.
//!
//! A case of `tests/data/ipvsadm-golden`, or of `tests/data/ipvsadm-lines`, is a list of shell lines (`.cmds`) and the transcript of the original (`.out`).
//! The lines are run by bash, with pipes and loops as they stand; `ipvsadm` in them is this very test program, called by
//! that name, with its table in a file ([`table`]). Here are the cases without traffic; those with traffic need the
//! datapath.
//!
//! Words on the command line select cases: `cargo test -p bpfvs --test ipvsadm_golden -- restore`.

mod table;

use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use bpfvs::ipvsadm::{self, Streams};
use table::FileTable;

/// Names the file of the table to the program under test.
const TABLE: &str = "BPFVS_GOLDEN_TABLE";
/// The programs.
const PROGRAMS: [&str; 3] = ["ipvsadm", "ipvsadm-save", "ipvsadm-restore"];
/// Where the cases are: those that everybody has, and command lines that were made up at random.
const DIRECTORIES: [&str; 2] = ["ipvsadm-golden", "ipvsadm-lines"];
/// The last case without traffic.
const LAST: u32 = 63;

/// Lines whose answer is another one here. No line: the whole case cannot be run.
const EXCEPTIONS: [(&str, &[&str], &str); 1] =
    [("55-sync-daemon", &[], "it makes a network interface; tests/tests/golden runs it")];

fn main() -> ExitCode {
    let mut arguments = env::args_os();
    let program = arguments.next().map(|program| program.to_string_lossy().into_owned()).unwrap_or_default();
    let arguments: Vec<OsString> = arguments.collect();
    let name = Path::new(&program).file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if PROGRAMS.contains(&name) { program_under_test(&program, &arguments) } else { run_cases(&arguments) }
}

fn program_under_test(program: &str, arguments: &[OsString]) -> ExitCode {
    let mut table = FileTable::new(env::var_os(TABLE).expect("the test names the table").into());
    let streams = Streams { input: &mut std::io::stdin().lock(), output: &mut std::io::stdout(), error: &mut std::io::stderr() };
    ExitCode::from(ipvsadm::run(program, arguments, &mut table, streams))
}

fn run_cases(selection: &[OsString]) -> ExitCode {
    let words: Vec<_> = selection.iter().filter_map(|word| word.to_str()).filter(|word| !word.starts_with('-')).collect();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
    let mut cases: Vec<PathBuf> = DIRECTORIES
        .iter()
        .flat_map(|directory| fs::read_dir(data.join(directory)).expect("the cases belong to the repository"))
        .map(|entry| entry.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cmds"))
        // Cases without a number have no traffic.
        .filter(|path| case_name(path).split('-').next().and_then(|number| number.parse().ok()).is_none_or(|n: u32| n <= LAST))
        .filter(|path| words.is_empty() || words.iter().any(|word| case_name(path).contains(word)))
        .collect();
    cases.sort();

    let bench = Bench::new();
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for case in &cases {
        let name = case_name(case);
        let commands = fs::read_to_string(case).expect("a case");
        if let Some(reason) = obstacle(name, &commands) {
            println!("SKIPPED {name}: {reason}");
            skipped += 1;
            continue;
        }
        let golden = fs::read_to_string(case.with_extension("out")).expect("a transcript");
        let exceptions = EXCEPTIONS.iter().find(|(case, ..)| *case == name).map_or(&[][..], |(_, lines, _)| lines);
        let differences = bench.compare(name, &commands, &golden, exceptions);
        if differences.is_empty() {
            passed += 1;
        } else {
            failed += 1;
            println!("FAILED {name}\n{differences}");
        }
    }
    println!("golden cases of the command line: {passed} of {} passed, {failed} failed, {skipped} skipped", cases.len());
    // Words that select nothing were meant for another test.
    if failed == 0 && (passed > 0 || !words.is_empty()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn case_name(path: &Path) -> &str {
    path.file_stem().and_then(|name| name.to_str()).expect("names of cases are ASCII")
}

/// Why this case cannot be run here.
fn obstacle(name: &str, commands: &str) -> Option<String> {
    if let Some((_, _, reason)) = EXCEPTIONS.iter().find(|(case, lines, _)| *case == name && lines.is_empty()) {
        return Some((*reason).to_owned());
    }
    if commands.contains("setpriv") && !nix::unistd::geteuid().is_root() {
        return Some("it gives up the rights of root, so it needs them: run the test as root".to_owned());
    }
    let has_names = fs::read_to_string("/etc/services").is_ok_and(|text| text.contains("http-alt"));
    if commands.contains(":http") && !has_names {
        return Some("it needs the names of /etc/services: install the package netbase".to_owned());
    }
    None
}

/// Where the programs and tables are.
struct Bench {
    directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        // Case 62 uses the programs as another user, who must get there but not read the table.
        let directory = tempfile::Builder::new().prefix("bpfvs-golden").tempdir().expect("a directory for temporary files");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("our own directory");
        let programs = directory.path().join("bin");
        fs::create_dir(&programs).expect("our own directory");
        let this = env::current_exe().expect("this program has a path");
        fs::copy(this, programs.join(PROGRAMS[0])).expect("room for a copy of this program");
        for other in &PROGRAMS[1..] {
            symlink(PROGRAMS[0], programs.join(other)).expect("our own directory");
        }
        Self { directory }
    }

    /// Runs a case and describes what differs.
    fn compare(&self, name: &str, commands: &str, golden: &str, exceptions: &[&str]) -> String {
        let table = self.directory.path().join(format!("{name}.json"));
        FileTable::new(table.clone()).create();
        fs::set_permissions(&table, fs::Permissions::from_mode(0o600)).expect("our own file");
        let mut rest = golden;
        let mut differences = String::new();
        for line in commands.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let end = rest[1..].find("\n$ ").map_or(rest.len(), |end| end + 2);
            let (wanted, behind) = rest.split_at(end);
            rest = behind;
            let actual = self.transcript(line, &table);
            if actual != wanted && !exceptions.contains(&line) {
                differences.extend(["--- wanted\n", wanted, "--- got\n", &actual]);
            }
        }
        if !rest.is_empty() {
            differences.extend(["--- wanted as well\n", rest]);
        }
        differences
    }

    /// Runs a line and writes down what came of it, in the form of the golden transcripts.
    fn transcript(&self, line: &str, table: &Path) -> String {
        let programs = self.directory.path().join("bin");
        let path = format!("{}:{}", programs.display(), env::var("PATH").unwrap_or_default());
        let script = line.replace("/tmp/", &format!("{}/", self.directory.path().display()));
        let output = Command::new("bash")
            .args(["-c", &script])
            .env("PATH", path)
            .env("LC_ALL", "C")
            .env(TABLE, table)
            .stdin(Stdio::null())
            .output()
            .expect("bash can be run");
        let errors =
            String::from_utf8_lossy(&output.stderr).lines().map(|line| format!("stderr: {line}\n")).collect::<Vec<_>>().concat();
        let status = output.status.code().expect("no line ends by a signal");
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !text.is_empty() && !text.ends_with('\n') {
            text += "\n\\ no newline\n";
        }
        format!("$ {line}\n{text}{errors}[exit {status}]\n")
    }
}
