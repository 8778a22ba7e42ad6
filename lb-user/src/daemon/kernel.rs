//! The daemon's datapath in this machine's kernel.

use anyhow::bail;

use super::serve::Options;

/// Runs a daemon until it is told to end.
pub fn run(_options: Options) -> anyhow::Result<()> {
    bail!("cannot run the daemon: this build has no datapath; build it with the eBPF toolchain (`cargo xtask setup`)")
}

/// Takes away what a daemon of this network namespace left in the kernel when it was killed.
pub fn remove_leftovers() -> anyhow::Result<()> {
    bail!("cannot remove the datapath: this build has none; build it with the eBPF toolchain (`cargo xtask setup`)")
}
