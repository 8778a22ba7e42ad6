//! How much work the verifier has with each program: a budget, kept in `data/verifier-budget.json`.
//!
//! The number of verified instructions is the best warning before a program that loads here is refused by another kernel
//! or after the next change. More than 5 % above the committed number fails; on purpose it is raised by
//! `cargo xtask budget --update`, and the change of the file shows the price. Kernels count a little differently, so that
//! the number belongs to the kernel where it was measured.

use std::{collections::BTreeMap, env, fs, path::Path};

use anyhow::{Context, Result, ensure};
use aya::programs::ProgramInfo;
use bpfvs_tests::{bpfvs::Bpfvs, needs, needs_bpfvs, netns::Namespace};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/verifier-budget.json");

/// Verified instructions by the program's name.
type Budget = BTreeMap<String, u32>;

#[test]
fn programs_stay_within_their_budget() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let director = Namespace::new("budget")?;
    let bpfvs = Bpfvs::start(&director, &[])?;
    let measured = measure(&bpfvs.pins().join("programs"))?;
    for (program, instructions) in &measured {
        println!("{program}: {instructions} verified instructions");
    }
    if env::var_os("BPFVS_BUDGET_UPDATE").is_some() {
        let text = serde_json::to_string_pretty(&measured)? + "\n";
        return fs::write(FILE, text).with_context(|| format!("{FILE} cannot be written"));
    }
    let text =
        fs::read_to_string(FILE).with_context(|| format!("{FILE} cannot be read: `cargo xtask budget --update` writes it"))?;
    let budget =
        serde_json::from_str(&text).with_context(|| format!("{FILE} is damaged: `cargo xtask budget --update` writes it"))?;
    let complaints = compare(&budget, &measured);
    ensure!(
        complaints.is_empty(),
        "{}; make the programs smaller, or raise the budget on purpose: `cargo xtask budget --update`",
        complaints.join("; ")
    );
    Ok(())
}

/// Asks the kernel about all pinned programs.
fn measure(pins: &Path) -> Result<Budget> {
    let entries = fs::read_dir(pins).with_context(|| format!("the daemon has no programs in {}", pins.display()))?;
    let measured: Budget = entries
        .map(|entry| {
            let path = entry?.path();
            let info = ProgramInfo::from_pin(&path).with_context(|| format!("ask the kernel about {}", path.display()))?;
            let instructions = info.verified_instruction_count().context("this kernel does not count (5.16 and newer do)")?;
            let name = path.file_name().context("a pin has a name")?;
            Ok((name.to_string_lossy().into_owned(), instructions))
        })
        .collect::<Result<_>>()?;
    ensure!(!measured.is_empty(), "the daemon has no programs in {}", pins.display());
    Ok(measured)
}

/// What is wrong with what was measured, in sentences.
fn compare(budget: &Budget, measured: &Budget) -> Vec<String> {
    let mut complaints = Vec::new();
    for (program, instructions) in measured {
        match budget.get(program) {
            None => complaints.push(format!("{program} has no budget")),
            Some(allowed) if u64::from(*instructions) * 100 > u64::from(*allowed) * 105 => {
                complaints.push(format!("{program} takes {instructions} verified instructions, over 5 % more than {allowed}"));
            }
            Some(_) => {}
        }
    }
    complaints
        .extend(budget.keys().filter(|program| !measured.contains_key(*program)).map(|program| format!("{program} is not loaded")));
    complaints
}

#[test]
fn growth_of_more_than_five_per_cent_is_told() {
    let budget = Budget::from([("a".to_owned(), 1000), ("b".to_owned(), 1000)]);
    assert!(compare(&budget, &Budget::from([("a".to_owned(), 1050), ("b".to_owned(), 10)])).is_empty());
    let complaints = compare(&budget, &Budget::from([("a".to_owned(), 1051), ("c".to_owned(), 1)]));
    assert_eq!(complaints, ["a takes 1051 verified instructions, over 5 % more than 1000", "c has no budget", "b is not loaded"]);
}
