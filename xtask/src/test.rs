//! `cargo xtask test`: all checks and tests, in an order in which the cheap ones fail first.
//!
//! | part | what | as |
//! | --- | --- | --- |
//! | `fmt` | the formatting | user |
//! | `clippy` | lints of the whole workspace, `lb-ebpf` among it, compiled for the host | user |
//! | `unit` | tests and examples inside `lb-common`, `bpfvs` and `xtask` | user |
//! | `budget` | the verifier's work: `tests/tests/verifier_budget.rs` | root |
//! | `demo` | `cargo xtask demo --once` | root |
//! | `netns` | tests in network namespaces: all of `tests/tests` and `lb-user/tests` that belongs to no other part | root |
//! | `vm` | other kernels in a virtual machine: `tests/tests/vm`, and `golden`, of which some cases want one | root |
//! | `timing` | what measures, or decides by the millisecond: [`TIMING`] | root |
//!
//! `cargo xtask test unit netns` runs these two. `netns` mostly waits and `vm` mostly computes, so they run side by side, and what
//! `vm` prints follows when both are over; `timing` has the machine to itself. A part that fails does not keep the next from
//! running: at the end stand the closing lines of all, with what was skipped. As everything that the tests call was installed before, a test that
//! skips itself fails; `--allow-skips` is for machines where something cannot be had. What this kernel or this version of bpfvs
//! cannot do is no failure, but is printed.
//!
//! Tests are built as the user: it is cargo that runs the finished test through sudo.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{
    build::{self, Profile},
    command::{as_root, assignment, cargo, repository, shown, target_directory},
    demo, package,
    setup::{self, Purpose},
};

/// The file with the test of the budget, and what it is called among the tests.
const BUDGET: &str = "verifier_budget";

/// The files of tests that must not share the machine.
const TIMING: [&str; 5] = ["picks_at_once", "restore", "scheduling", "speed", "vm_schedulers"];

/// What to test.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The parts to run; without any: all
    #[arg(value_enum, value_name = "PART")]
    parts: Vec<Part>,
    /// Lets a test skip itself that cannot run on this machine
    #[arg(long)]
    allow_skips: bool,
    /// Runs only black-box and unit tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
}

/// What to do about the budget.
#[derive(Clone, Copy, clap::Args)]
pub(crate) struct BudgetOptions {
    /// Writes what was measured to tests/data/verifier-budget.json
    #[arg(long)]
    update: bool,
}

/// A part of the tests. The order is the one in which they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Part {
    /// The formatting
    Fmt,
    /// Lints of the whole workspace
    Clippy,
    /// Tests of the libraries, on the host
    Unit,
    /// The verifier's work for each program
    Budget,
    /// The demo
    Demo,
    /// Black-box tests in network namespaces
    Netns,
    /// Other kernels, in a virtual machine
    Vm,
    /// Tests that measure time
    Timing,
}

impl Part {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Whether it runs as root, with the finished program.
    fn needs_root(self) -> bool {
        self >= Self::Budget
    }

    /// The part that a file of black-box tests belongs to.
    fn of_test(name: &str) -> Self {
        match name {
            BUDGET => Self::Budget,
            "golden" | "vm" => Self::Vm,
            _ if TIMING.contains(&name) => Self::Timing,
            _ => Self::Netns,
        }
    }
}

/// What is left of a part when it is over.
struct Report {
    part: Part,
    error: Option<anyhow::Error>,
    output: Output,
    duration: Duration,
}

/// What a part prints.
#[derive(Default)]
struct Output {
    /// What is held back until later, if it is.
    held: Option<Vec<String>>,
    /// What belongs to the end.
    closing_lines: Vec<String>,
}

impl Output {
    fn held_back() -> Self {
        Self { held: Some(Vec::new()), ..Self::default() }
    }

    fn say(&mut self, line: String) {
        if is_closing(&line) {
            self.closing_lines.push(line.trim().to_owned());
        }
        match &mut self.held {
            Some(held) => held.push(line),
            None => println!("{line}"),
        }
    }

    fn release(&mut self) {
        self.held.take().into_iter().flatten().for_each(|line| println!("{line}"));
    }
}

/// Runs the parts and prints their closing lines.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let mut parts = if options.parts.is_empty() { Part::value_variants().to_vec() } else { options.parts.clone() };
    parts.sort_unstable();
    parts.dedup();
    prepare(&parts)?;

    let mut reports = Vec::new();
    for part in &parts {
        match part {
            Part::Netns if parts.contains(&Part::Vm) => reports.extend(side_by_side([Part::Netns, Part::Vm], options)),
            Part::Vm if parts.contains(&Part::Netns) => {}
            part => reports.push(report(*part, options, Output::default())),
        }
    }
    Ok(summary(&reports))
}

/// Runs two parts at once, and prints what the second one says when both are over.
fn side_by_side([first, second]: [Part; 2], options: &Options) -> [Report; 2] {
    std::thread::scope(|scope| {
        let beside = scope.spawn(|| report(second, options, Output::held_back()));
        let first = report(first, options, Output::default());
        let mut second = beside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        second.output.release();
        [first, second]
    })
}

fn report(part: Part, options: &Options, mut output: Output) -> Report {
    output.say(format!("\n{}", part.name()));
    let begin = Instant::now();
    let error = run_part(part, options, &mut output).err();
    if let Some(error) = &error {
        output.say(format!("{} failed: {error:#}", part.name()));
    }
    Report { part, error, output, duration: begin.elapsed() }
}

/// Measures the verifier's work and compares it with the committed file, or writes that file.
pub(crate) fn budget(options: BudgetOptions) -> Result<()> {
    prepare(&[Part::Budget])?;
    let environment: &[_] = if options.update { &["BPFVS_BUDGET_UPDATE=1"] } else { &[] };
    watched(with_root(&[BUDGET.to_owned()], environment)?.args(["--", "--nocapture"]), &mut Output::default())
}

/// The cases that `cargo xtask golden` runs.
#[derive(clap::Args)]
pub(crate) struct GoldenOptions {
    /// The directory of the cases; without: the copy in tests/data/ipvsadm-golden
    #[arg(value_name = "DIRECTORY")]
    directory: Option<PathBuf>,
}

/// Runs the golden cases of ipvsadm: first those of printing, then those that a daemon answers.
pub(crate) fn golden(options: &GoldenOptions) -> Result<()> {
    // Some cases want another kernel.
    prepare(&[Part::Vm])?;
    let mut environment = Vec::new();
    if let Some(directory) = &options.directory {
        let directory = fs::canonicalize(directory)
            .with_context(|| format!("there is no directory {}; name one with NN-name.cmds files", directory.display()))?;
        environment.push(format!("BPFVS_GOLDEN={}", directory.display()));
    }
    let environment: Vec<_> = environment.iter().map(String::as_str).collect();
    let mut output = Output::default();
    let printing = watched(
        cargo().args(["test", "--quiet", "--package", "bpfvs", "--test", "ipvsadm_format", "--", "--nocapture"]),
        &mut Output::default(),
    );
    let answering = watched(&mut with_root(&["golden".to_owned()], &environment)?, &mut output);
    // Behind what cargo says about a failure.
    output.closing_lines.iter().filter(|line| line.starts_with("golden: ")).for_each(|line| println!("{line}"));
    printing.and(answering)
}

/// Installs what the parts need, and builds the program that they test.
fn prepare(parts: &[Part]) -> Result<()> {
    if parts.iter().any(|part| *part <= Part::Clippy) {
        setup::lints()?;
    }
    if parts.iter().any(|part| *part != Part::Fmt) {
        setup::toolchain()?;
    }
    if let Some(last) = parts.iter().max().filter(|part| part.needs_root()) {
        setup::programs(if *last >= Part::Vm { Purpose::Machine } else { Purpose::Test })?;
        build::bpfvs(Profile::Debug)?;
    }
    if parts.contains(&Part::Netns) {
        package::deb(Profile::Debug)?;
    }
    Ok(())
}

fn run_part(part: Part, options: &Options, output: &mut Output) -> Result<()> {
    let filter = options.filter.as_slice();
    match part {
        Part::Fmt => watched(cargo().args(["fmt", "--all", "--check"]), output),
        Part::Clippy => {
            let arguments = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "--deny", "warnings"];
            watched(cargo().args(arguments), output)
        }
        Part::Unit => {
            let libraries = ["--package", "lb-common", "--package", "bpfvs"];
            let mut tests = cargo();
            tests.arg("test").args(libraries).args(["--package", "xtask", "--lib", "--bins", "--no-fail-fast", "--"]);
            let mut examples = cargo();
            examples.args(["test", "--doc"]).args(libraries).arg("--");
            watched(tests.args(filter), output)?;
            watched(examples.args(filter), output)
        }
        Part::Budget | Part::Netns | Part::Vm | Part::Timing => {
            let tests: Vec<_> = root_tests()?.into_iter().filter(|name| Part::of_test(name) == part).collect();
            if tests.is_empty() {
                bail!("there is no file of tests for this part");
            }
            let environment: &[_] = if options.allow_skips { &[] } else { &["BPFVS_TESTS_MUST_RUN=1"] };
            watched(with_root(&tests, environment)?.arg("--").args(filter), output)
        }
        Part::Demo => watched(&mut demo::once()?, output),
    }
}

/// The files of tests that need root.
fn root_tests() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for directory in ["tests/tests", "lb-user/tests"].map(|directory| repository().join(directory)) {
        let entries = fs::read_dir(&directory);
        let entries = entries.with_context(|| format!("the tests in {} cannot be listed", directory.display()))?;
        names.extend(entries.map_while(Result::ok).filter_map(|entry| test_name(&entry.path())));
    }
    names.sort();
    names.dedup();
    Ok(names)
}

/// What cargo calls a file of tests: `tests/NAME.rs` or `tests/NAME/main.rs`.
fn test_name(path: &Path) -> Option<String> {
    let is_test = path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file();
    is_test.then(|| path.file_stem().map(|stem| stem.to_string_lossy().into_owned())).flatten()
}

/// The command that builds tests as this user and runs them as root, with further assignments of variables.
fn with_root(tests: &[String], environment: &[&str]) -> Result<Command> {
    let mut command = cargo();
    command.args(["test", "--package", "bpfvs-tests", "--package", "bpfvs", "--no-fail-fast"]);
    for name in tests {
        command.args(["--test", name]);
    }
    // sudo hands on no variables, so the runner has to name them.
    let program = target_directory().join("debug/bpfvs");
    let mut runner = as_root("env")?;
    runner.arg(assignment("BPFVS_BIN", program.as_os_str()));
    runner.arg(assignment("BPFVS_DEB", package::file().as_os_str())).args(environment);
    let words = std::iter::once(runner.get_program()).chain(runner.get_args());
    let words: Vec<_> = words.map(|word| format!("{:?}", word.to_string_lossy())).collect();
    command.arg("--config").arg(format!("target.'cfg(all())'.runner=[{}]", words.join(",")));
    Ok(command)
}

/// Runs a command, passes on what it prints, and keeps the lines that belong to the end.
fn watched(command: &mut Command, output: &mut Output) -> Result<()> {
    output.say(format!("$ {}", shown(command)));
    // One pipe for both, so that the lines stay in their order.
    let (reader, writer) = std::io::pipe().context("no pipe for the output of the tests: too many files are open")?;
    let error_writer = writer.try_clone().context("no pipe for the output of the tests: too many files are open")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(error_writer)
        .spawn()
        .with_context(|| format!("`{}` cannot be run; is it installed?", shown(command)))?;
    // The command still holds the writing end, and the reader waits until all are closed.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    for line in BufReader::new(reader).lines() {
        output.say(line.context("the output of the tests cannot be read: is it text?")?);
    }
    let status = child.wait().context("the tests cannot be waited for")?;
    if !status.success() {
        bail!("`{}` ended with {status}", command.get_program().to_string_lossy());
    }
    Ok(())
}

/// Whether a line should be seen again at the end: which tests, how they ended, what was skipped.
fn is_closing(line: &str) -> bool {
    let line = line.trim_start();
    (line.starts_with("test result: ") && !line.contains(" 0 passed; 0 failed; 0 ignored"))
        || line.starts_with("SKIPPED ")
        || line.starts_with("golden: ")
        || line.starts_with("FAIL ")
        || (line.starts_with("test ") && line.ends_with("FAILED"))
}

fn summary(reports: &[Report]) -> ExitCode {
    println!("\n{:-<72}", "");
    for Report { part, error, output, duration } in reports {
        let verdict = if error.is_some() { "FAILED" } else { "ok" };
        println!("{:<8} {verdict:<6} {:>6.1} s", part.name(), duration.as_secs_f32());
        for line in &output.closing_lines {
            println!("         {line}");
        }
    }
    let failed: Vec<_> = reports.iter().filter(|report| report.error.is_some()).map(|report| report.part.name()).collect();
    if failed.is_empty() {
        println!("All {} parts passed.", reports.len());
        return ExitCode::SUCCESS;
    }
    println!("Failed: {}. Once more alone: `cargo xtask test {}`.", failed.join(", "), failed.join(" "));
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_tests_belong_to_parts() {
        assert_eq!(Part::of_test("vm"), Part::Vm);
        assert_eq!(Part::of_test("golden"), Part::Vm);
        assert_eq!(Part::of_test("vm_schedulers"), Part::Timing);
        assert_eq!(Part::of_test("vmware"), Part::Netns);
        assert_eq!(Part::of_test(BUDGET), Part::Budget);
        assert_eq!(Part::of_test("direct_routing"), Part::Netns);
    }

    #[test]
    fn closing_lines_are_results_failures_and_skips() {
        assert!(is_closing("test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s"));
        assert!(!is_closing("test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s"));
        assert!(is_closing("SKIPPED ipv6::tunnel: needs root (1 skipped so far in this run)"));
        assert!(is_closing("test tunnel ... FAILED"));
        assert!(!is_closing("test tunnel ... ok"));
    }

    #[test]
    fn output_keeps_its_order_and_its_closing_lines() {
        let mut output = Output::default();
        let script = "echo 'SKIPPED a'; echo 'SKIPPED b' >&2; echo other; echo 'SKIPPED c'";
        watched(Command::new("sh").args(["-c", script]), &mut output).expect("the script succeeds");
        assert_eq!(output.closing_lines, ["SKIPPED a", "SKIPPED b", "SKIPPED c"]);
        assert!(watched(Command::new("sh").args(["-c", "exit 3"]), &mut output).is_err());
    }
}
