//! `cargo xtask attach`: the daemon of the working tree, on real interfaces.
//!
//! It runs in the foreground, and Ctrl-C ends the daemon; as always with bpfvs, traffic goes on without it. The line that
//! takes everything away is printed.

use std::os::unix::process::CommandExt as _;

use anyhow::{Context as _, Result};

use crate::{
    build::{self, Profile},
    command::{as_root, say, shown},
};

/// Where to attach, and how.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// An interface; may be repeated. Without it: every interface that is up
    #[arg(value_name = "INTERFACE")]
    interfaces: Vec<String>,
    /// Where the programs hook in
    #[arg(long, default_value = "auto", value_parser = ["auto", "xdp", "tc"])]
    hook: String,
    /// Works in this network namespace
    #[arg(long, value_name = "NAME|PATH")]
    netns: Option<String>,
}

/// Builds and runs.
pub(crate) fn run(options: &Options) -> Result<()> {
    let program = build::bpfvs(Profile::Release)?;
    let mut command = as_root(&program)?;
    command.args(["serve", "--hook", &options.hook]);
    for interface in &options.interfaces {
        command.args(["--interface", interface]);
    }
    if let Some(netns) = &options.netns {
        command.args(["--netns", netns]);
    }
    say("Ctrl-C ends the daemon, and traffic goes on. This takes everything away, while the daemon runs:");
    say(&format!("  {} stop --detach", program.display()));
    // In place of this program, so that signals reach the daemon itself.
    Err(command.exec()).with_context(|| format!("cannot run {}", shown(&command)))
}
