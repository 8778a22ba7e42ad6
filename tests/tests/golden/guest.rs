//! Cases for which this machine's kernel has no modules, on one that has them: Debian's, in a virtual machine.
//!
//! The guest gets this very program with its data and its directory of cases, and runs the named ones as this machine runs the
//! others. What it says of each case is printed here, and counts here.

use std::{collections::BTreeMap, env, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    bpfvs,
    netns::run,
    skip,
    vm::{Machine, Version, machine},
};

use super::Verdict;

/// Set in the guest, which must not start another one.
const INSIDE: &str = "BPFVS_GOLDEN_GUEST";

/// Files that the test reads, from the root of the repository.
const READ: [&str; 3] = ["README.md", "docs/ipvsadm.md", "tests/data"];

/// Why there can be no guest, if so.
pub(super) fn obstacle() -> Option<String> {
    let inside = env::var_os(INSIDE).is_some();
    inside.then(|| "this is a virtual machine already".to_owned()).or_else(machine::obstacle)
}

/// Runs the cases of these names in a guest.
pub(super) fn judge(names: &[&str], other: Option<&Path>) -> Result<BTreeMap<String, Verdict>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut machine = Machine::new(Version::V6_12)?
        .add(&env::current_exe()?, "/usr/local/bin/golden")?
        .add(&bpfvs::binary()?, "/usr/local/bin/bpfvs")?
        .deterministic();
    for program in ["diff", "perl"] {
        let path = skip::find(program).with_context(|| format!("needs the program {program}"))?;
        machine = machine.add(&path, &format!("/usr/bin/{program}"))?;
    }
    // What netpoke asks for stands in one directory: Debian's perl-base.
    let modules = run(Command::new("perl").args(["-MPOSIX", "-MSocket", "-e", r#"print "$INC{'POSIX.pm'}""#]))?;
    let modules = Path::new(modules.trim()).parent().context("a module of perl is in a directory")?;
    machine = machine.add(modules, &modules.display().to_string())?;
    for name in READ {
        let path = root.join(name);
        machine = machine.add(&path, &path.display().to_string())?;
    }
    let mut other_directory = String::new();
    if let Some(other) = other {
        machine = machine.add(other, &other.display().to_string())?;
        other_directory = format!("BPFVS_GOLDEN='{}'", other.display());
    }
    let names_of_all = names.join(" ");
    let script = format!("{INSIDE}=1 BPFVS_BIN=/usr/local/bin/bpfvs {other_directory} golden {names_of_all}");
    let outcome = machine.run(&script)?;
    // But for what it sums up: the sum is ours.
    let sums = [" failed, ", "golden: "];
    outcome.output.lines().filter(|line| !sums.iter().any(|sum| line.contains(sum))).for_each(|line| println!("{line}"));
    let verdict = |line: &str| {
        let (word, name) = line.split_once(char::is_whitespace)?;
        let name = name.trim().trim_end_matches(':');
        let word = match word {
            "ok" => Verdict::Passed,
            "FAIL" => Verdict::Failed,
            _ => return None,
        };
        names.contains(&name).then(|| (name.to_owned(), word))
    };
    let verdicts: BTreeMap<_, _> = outcome.output.lines().filter_map(verdict).collect();
    ensure!(!verdicts.is_empty(), "the virtual machine judged no case; status {}:\n{}", outcome.status, outcome.output);
    Ok(verdicts)
}
