//! Packages on Debian and its relatives.
//!
//! Nothing is ever removed for a new package (a Debian `rustup` would have to make room for `rustc-web`: then apt says so,
//! and the person decides), and no service is started: nginx's package would take port 80 of this machine.

use std::{cell::Cell, process::Command};

use anyhow::Result;

use crate::command::{as_root, find, output, run, say};

/// `apt-get`, where there is one.
pub(super) struct Apt {
    /// Whether the lists of packages were fetched in this run.
    updated: Cell<bool>,
}

/// Installs packages without starting their services. `policy-rc.d` is Debian's way to ask "may this service start?"; one
/// that stands here already knows better than we do. What was enabled would start with the machine's next start.
const INSTALL: &str = "\
set -eu
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT HUP INT TERM
    printf '#!/bin/sh\\nexit 101\\n' >$policy
    chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
apt-get install --yes --quiet --no-install-recommends --no-remove \"$@\"
";

impl Apt {
    pub(super) fn find() -> Option<Self> {
        (find("apt-get").is_some() && find("dpkg").is_some()).then(|| Self { updated: Cell::new(false) })
    }

    /// Whether there is such a package. Fetches the lists of packages first, as those of a fresh machine may be empty.
    pub(super) fn offers(&self, package: &str) -> bool {
        self.update();
        let policy = output(Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C")).unwrap_or_default();
        policy.lines().any(|line| line.trim().strip_prefix("Candidate: ").is_some_and(|version| version != "(none)"))
    }

    pub(super) fn install(&self, packages: &[String]) -> Result<()> {
        self.update();
        say(&format!("Installing {} (services are not started).", packages.join(", ")));
        run(as_root("sh")?.args(["-c", INSTALL, "install"]).args(packages))
    }

    fn update(&self) {
        if self.updated.replace(true) {
            return;
        }
        // Some repository of this machine may be out of reach without anybody missing it: what is missing shows later.
        if let Err(error) = as_root("apt-get").and_then(|mut command| run(command.args(["update", "--quiet"]))) {
            say(&format!("The lists of packages are perhaps not up to date: {error}."));
        }
    }
}

/// Whether a package is installed.
pub(super) fn installed(package: &str) -> bool {
    output(Command::new("dpkg-query").args(["--show", "--showformat", "${db:Status-Status}", package]))
        .is_some_and(|status| status == "installed")
}
