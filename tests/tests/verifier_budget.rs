//! How much work the verifier has with each program: a budget, kept in `data/verifier-budget.json`.
//!
//! ```json
//! { "6.18": { "tc_director": 8000, "xdp_director": 7000 } }
//! ```
//!
//! The number of verified instructions is the best warning before a program that loads here is refused by another kernel
//! or after the next change. More than 5 % above the committed number fails; on purpose it is raised by
//! `cargo xtask budget --update`, and the change of the file shows the price.
//!
//! Every kernel release counts differently, so that each has numbers of its own. On one that is not in the file nothing is
//! compared, which is said aloud; `--update` adds the numbers of the kernel that runs, and leaves the others alone.

use std::{collections::BTreeMap, env, fs, io::Write as _, path::Path};

use anyhow::{Context, Result, ensure};
use aya::programs::ProgramInfo;
use bpfvs_tests::{bpfvs::Bpfvs, needs, needs_bpfvs, netns::Namespace};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/verifier-budget.json");

/// Verified instructions by the program's name.
type Budget = BTreeMap<String, u32>;

/// Budgets by the kernel's release, as in `6.18`.
type Budgets = BTreeMap<String, Budget>;

#[test]
fn programs_stay_within_their_budget() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let director = Namespace::new("budget")?;
    // The programs for XDP are loaded with the first interface that wants them, those for translation with the first real
    // server that needs them, those for SIP with the first service.
    director.ip("link add eth0 type veth peer name far
         link set eth0 up")?;
    let bpfvs = Bpfvs::start(&director, &["--hook", "xdp"])?;
    bpfvs.succeed(&["localaddr", "add", "192.0.2.3"])?;
    bpfvs.ipvsadm("-A -t [2001:db8::1]:80 -s rr")?;
    bpfvs.ipvsadm("-a -t [2001:db8::1]:80 -r 192.0.2.2:80 -m --fullnat")?;
    bpfvs.ipvsadm("-A -u [2001:db8::1]:5060 -s rr -p 60 --pe sip")?;
    let measured = measure(&bpfvs.pins().join("programs"))?;
    for (program, instructions) in &measured {
        println!("{program}: {instructions} verified instructions");
    }
    let release = release()?;
    if env::var_os("BPFVS_BUDGET_UPDATE").is_some() {
        let mut budgets = if Path::new(FILE).exists() { read()? } else { Budgets::new() };
        budgets.insert(release, measured);
        let text = serde_json::to_string_pretty(&budgets)? + "\n";
        return fs::write(FILE, text).with_context(|| format!("{FILE} cannot be written"));
    }
    let budgets = read()?;
    let Some(budget) = budgets.get(&release) else {
        let known = budgets.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        // Not the macro `skip!`: on somebody's newer kernel this must not fail. Nor `eprintln!`, which is heard of failures only.
        writeln!(
            std::io::stderr().lock(),
            "SKIPPED the verifier's budget: there is none for kernel {release}, only for {known}, so nothing was compared; \
             `cargo xtask budget --update` adds this kernel"
        )?;
        return Ok(());
    };
    let complaints = compare(budget, &measured);
    ensure!(
        complaints.is_empty(),
        "{}; make the programs smaller, or raise the budget on purpose: `cargo xtask budget --update`",
        complaints.join("; ")
    );
    Ok(())
}

/// The kernel's release without what only its maker knows: `6.18` of `6.18.44-cloud`.
fn release() -> Result<String> {
    let name = nix::sys::utsname::uname().context("ask the kernel for its name")?;
    let release = name.release().to_string_lossy();
    let mut numbers = release.split(['.', '-']);
    let (major, minor) = numbers.next().zip(numbers.next()).with_context(|| format!("{release} is no kernel release"))?;
    Ok(format!("{major}.{minor}"))
}

/// The committed budgets.
fn read() -> Result<Budgets> {
    let text =
        fs::read_to_string(FILE).with_context(|| format!("{FILE} cannot be read: `cargo xtask budget --update` writes it"))?;
    serde_json::from_str(&text)
        .with_context(|| format!("{FILE} is damaged: remove it, and `cargo xtask budget --update` writes it"))
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
