//! `cargo xtask build`: bpfvs, built as the user who asks for it.
//!
//! The datapath is built on the way, optimised in both profiles, and lies inside the program.

use std::path::PathBuf;

use anyhow::Result;

use crate::{
    command::{cargo, run as execute, say, target_directory},
    setup,
};

/// What to build.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Optimised
    #[arg(long)]
    release: bool,
}

/// Builds, and says where the program is.
pub(crate) fn run(options: &Options) -> Result<()> {
    let program = bpfvs(if options.release { Profile::Release } else { Profile::Debug })?;
    say(&format!("Built {}.", program.display()));
    Ok(())
}

/// How cargo compiles.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Debug,
    Release,
}

/// Builds bpfvs and returns the program.
pub(crate) fn bpfvs(profile: Profile) -> Result<PathBuf> {
    setup::toolchain()?;
    let mut command = cargo();
    command.args(["build", "--package", "bpfvs"]);
    let directory = match profile {
        Profile::Debug => "debug",
        Profile::Release => {
            command.arg("--release");
            "release"
        }
    };
    execute(&mut command)?;
    Ok(target_directory().join(directory).join("bpfvs"))
}
