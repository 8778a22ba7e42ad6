//! `cargo xtask deb` and `cargo xtask man`: what distributions want beside the program.
//!
//! Everything that goes into the package is put into `target/package` first: the program, its manual pages and its completions,
//! which it prints itself. What goes where stands in `lb-user/Cargo.toml`, and the scripts and units in `packaging`; cargo-deb
//! does the rest.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    build::{self, Profile},
    command::{cargo, output, run as execute, say, target_directory},
    setup,
};

/// How to make a package.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Takes the program of the last tests, which is large and slow
    #[arg(long)]
    debug: bool,
}

/// Shells, and the files that have their completions.
const SHELLS: [&str; 3] = ["bash", "fish", "zsh"];

/// Makes a package, and says where it is.
pub(crate) fn run(options: &Options) -> Result<()> {
    deb(if options.debug { Profile::Debug } else { Profile::Release })?;
    say(&format!("Made {}.", file().display()));
    Ok(())
}

/// Makes the manual pages, and says where they are.
pub(crate) fn man() -> Result<()> {
    let program = build::bpfvs(Profile::Debug)?;
    let directory = target_directory().join("man");
    execute(Command::new(program).arg("man").arg(&directory))?;
    say(&format!("Made the pages in {}; `man {}/bpfvs.8` shows the first.", directory.display(), directory.display()));
    Ok(())
}

/// Where the package is.
pub(crate) fn file() -> PathBuf {
    directory().join("bpfvs.deb")
}

fn directory() -> PathBuf {
    target_directory().join("package")
}

/// Makes a package of a program that is built in this way.
pub(crate) fn deb(profile: Profile) -> Result<()> {
    setup::cargo_deb()?;
    let program = build::bpfvs(profile)?;
    let (man, completions) = (directory().join("man"), directory().join("completions"));
    // Without pages that were removed.
    let _ = fs::remove_dir_all(directory());
    fs::create_dir_all(&completions).with_context(|| format!("cannot make {}", completions.display()))?;
    execute(Command::new("strip").args(["--strip-debug", "-o"]).arg(directory().join("bpfvs")).arg(&program))?;
    execute(Command::new(&program).arg("man").arg(&man))?;
    for shell in SHELLS {
        let text = output(Command::new(&program).args(["completions", shell]));
        let text = text.with_context(|| format!("`{} completions {shell}` failed", program.display()))?;
        fs::write(completions.join(format!("bpfvs.{shell}")), text).context("the completions cannot be written")?;
    }
    // Not below /usr/share/man, where cargo-deb would do it: these are alternatives.
    let pages = ["ipvsadm.8", "ipvsadm-save.8", "ipvsadm-restore.8"].map(|page| man.join(page));
    execute(Command::new("gzip").args(["--best", "--no-name", "--force"]).args(pages))?;
    execute(cargo().args(["deb", "--package", "bpfvs", "--no-build", "--no-strip", "--fast", "--quiet", "--output"]).arg(file()))
}
