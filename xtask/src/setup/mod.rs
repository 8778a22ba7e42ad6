//! `cargo xtask setup`: finds what the build needs, and installs what is missing.
//!
//! The datapath takes a Rust compiler with `core` for BPF, or with its sources, and a `bpf-linker` whose LLVM is not older
//! than the compiler's (the module [`toolchain`] finds both, here and in `lb-user/build.rs`). What is missing is
//! tried in this order, the cheapest first:
//!
//! | missing | first | then |
//! | --- | --- | --- |
//! | `bpf-linker` | `cargo binstall`, if there is one | built against the distribution's LLVM |
//! | `core` for BPF | rustup's `rust-src` for a toolchain that the linker understands | the distribution's compiler |
//! | rustfmt, clippy | rustup's components | the distribution's packages |
//!
//! Other programs, for the demo and the tests, are in [`programs`]. Packages are installed on Debian and its relatives
//! ([`debian`]); elsewhere the error says what to install by hand. Where nothing is missing, nothing is printed, and it
//! takes some milliseconds: every other command begins with it.

mod debian;
mod programs;

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Result, bail};

use self::debian::Apt;
pub(crate) use self::programs::{Purpose, programs};
use crate::{
    command::{attempt, cargo, find, output, path, run, say},
    toolchain::{Compiler, Linker, Missing, Toolchain},
};

const LINKER_VERSION: &str = "0.13.0";
const DEB_VERSION: &str = "3.8.0";

/// The LLVM versions that this version of the linker can be built against, the newest first.
const LINKER_LLVM: [u32; 3] = [23, 22, 21];

/// How long rustup may take. Where it cannot reach its server, it should not take long to find out.
const RUSTUP_LIMIT: Duration = Duration::from_secs(60);

/// Installs what the build needs, and says what there is.
pub(crate) fn setup() -> Result<()> {
    toolchain()?;
    if let Ok(toolchain) = Toolchain::find() {
        let Toolchain { compiler, linker } = toolchain;
        let core = if compiler.has_compiled_core() { "compiled" } else { "as source" };
        say(&format!(
            "The build has what it needs: {} (LLVM {}, `core` for BPF {core}) and {}.",
            compiler.rustc.display(),
            compiler.llvm,
            linker.path.display()
        ));
    }
    Ok(())
}

/// Sees to it that the datapath can be compiled.
pub(crate) fn toolchain() -> Result<()> {
    let Err(missing) = Toolchain::find() else { return Ok(()) };
    say(&format!("The datapath cannot be compiled yet: {missing}."));
    let apt = Apt::find();
    // Which compilers will do depends on the linker, so it comes first.
    let too_old = |linker: &Linker| matches!(missing, Missing::NewerLinker { .. }) && linker.llvm < newest_llvm(apt.as_ref());
    if Linker::find().is_none_or(|linker| too_old(&linker)) {
        install_linker(apt.as_ref())?;
    }
    if Toolchain::find().is_err() {
        rust_sources_from_rustup();
    }
    if let (Err(_), Some(apt)) = (Toolchain::find(), &apt) {
        compiler_from_debian(apt)?;
    }
    match Toolchain::find() {
        Ok(_) => Ok(()),
        Err(missing) => bail!("the datapath cannot be compiled: {missing}.\n{}", by_hand()),
    }
}

/// Sees to it that `cargo fmt` and `cargo clippy` are there.
pub(crate) fn lints() -> Result<()> {
    for (tool, component, packages) in
        [("fmt", "rustfmt", ["rustfmt-web", "rustfmt"]), ("clippy", "clippy", ["rust-web-clippy", "rust-clippy"])]
    {
        let there = || output(cargo().args([tool, "--version"])).is_some();
        if there() {
            continue;
        }
        say(&format!("`cargo {tool}` is missing."));
        let toolchain = output(Command::new("rustup").args(["show", "active-toolchain"]).env("PATH", path()));
        if let Some(toolchain) = toolchain.as_deref().and_then(|line| line.split_whitespace().next()) {
            add_component(component, toolchain);
        }
        if let (false, Some(apt)) = (there(), Apt::find()) {
            // The one that goes with the installed compiler is the one that does not conflict with it.
            let rust = if debian::installed("rustc-web") { packages[0] } else { packages[1] };
            apt.install(&[rust.to_owned()])?;
        }
        if !there() {
            bail!(
                "`cargo {tool}` is missing and cannot be installed here: install it (with rustup: `rustup component add {component}`)"
            );
        }
    }
    Ok(())
}

/// Sees to it that `cargo deb` is there.
pub(crate) fn cargo_deb() -> Result<()> {
    if find("cargo-deb").is_some() {
        return Ok(());
    }
    // Without optimisation, and without a compressor of C's: neither matters to a package that is made now and then.
    run(cargo()
        .args(["install", "cargo-deb", "--version", DEB_VERSION, "--locked", "--debug", "--no-default-features"])
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET"))
}

/// The newest LLVM that apt offers and that the linker can be built against.
fn newest_llvm(apt: Option<&Apt>) -> Option<u32> {
    let apt = apt?;
    LINKER_LLVM.into_iter().find(|version| apt.offers(&format!("llvm-{version}-dev")))
}

fn install_linker(apt: Option<&Apt>) -> Result<()> {
    if find("cargo-binstall").is_some() {
        let arguments = ["binstall", "--no-confirm", "--force", &format!("bpf-linker@{LINKER_VERSION}")];
        if attempt(cargo().args(arguments), Duration::from_secs(120)) {
            return Ok(());
        }
    }
    let Some(apt) = apt else { bail!("bpf-linker has to be installed by hand.\n{}", by_hand()) };
    let Some(version) = newest_llvm(Some(apt)) else {
        let wanted: Vec<_> = LINKER_LLVM.iter().map(|version| format!("llvm-{version}-dev")).collect();
        bail!("bpf-linker cannot be built here: apt offers none of {}.\n{}", wanted.join(", "), by_hand());
    };
    // The library itself, what its parts are linked with, and a linker.
    let packages = ["llvm-N-dev", "libpolly-N-dev", "libxml2-dev", "libzstd-dev", "zlib1g-dev", "g++"];
    let packages = packages.map(|package| package.replace('N', &version.to_string()));
    apt.install(&packages)?;
    let prefix = format!("/usr/lib/llvm-{version}");
    // Without optimisation it builds in a third of the time, and links as fast: LLVM does the work.
    run(cargo()
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--debug", "--force"])
        .args(["--no-default-features", "--features", &format!("llvm-{version}")])
        .env("LLVM_PREFIX", &prefix)
        .env(format!("LLVM_SYS_{version}1_PREFIX"), &prefix)
        // Of the workspace's own build, which must not decide about a tool.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET"))
}

/// Adds the sources of `core` to a toolchain of rustup that the linker understands.
fn rust_sources_from_rustup() {
    let Some(linker) = Linker::find() else { return };
    for toolchain in ["nightly", "stable"] {
        let rustc = output(Command::new("rustup").args(["which", "--toolchain", toolchain, "rustc"]).env("PATH", path()));
        let compiler = rustc.and_then(|rustc| Compiler::probe(Path::new(&rustc)));
        let suits = compiler.is_some_and(|compiler| linker.understands(&compiler));
        if suits && add_component("rust-src", toolchain) {
            return;
        }
    }
}

fn add_component(component: &str, toolchain: &str) -> bool {
    let added = attempt(
        Command::new("rustup")
            .args(["component", "add", component, "--toolchain", toolchain])
            .env("PATH", path())
            .env("RUSTUP_MAX_RETRIES", "0")
            .env("RUSTUP_DOWNLOAD_TIMEOUT", "15"),
        RUSTUP_LIMIT,
    );
    if !added {
        say(&format!("rustup could not add {component} to {toolchain}; trying something else."));
    }
    added
}

fn compiler_from_debian(apt: &Apt) -> Result<()> {
    const CHOICES: [&[&str]; 3] =
        [&["rustc-web", "libstd-rust-web-dev-bpf", "rust-web-src"], &["rustc-web", "rust-web-src"], &["rustc", "rust-src"]];
    let Some(packages) = CHOICES.iter().find(|packages| packages.iter().all(|package| apt.offers(package))) else {
        return Ok(());
    };
    apt.install(&packages.iter().map(|&package| package.to_owned()).collect::<Vec<_>>())
}

/// What to do where nothing can be installed from here.
fn by_hand() -> String {
    let system = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let packages = distribution_hint(&system).map_or_else(String::new, |hint| format!("\n  On this distribution: {hint}"));
    format!(
        "Install by hand:\n  \
         1. bpf-linker {LINKER_VERSION} or newer, in a directory on the path: `cargo binstall bpf-linker`, or the program of \
         https://github.com/aya-rs/bpf-linker/releases;\n  \
         2. a Rust compiler with the sources of `core`, whose LLVM (`rustc -vV`) is not newer than bpf-linker's: \
         `rustup component add rust-src`.{packages}\n\
         Then run this command again."
    )
}

/// What to type on the distribution that an os-release file tells of.
fn distribution_hint(os_release: &str) -> Option<&'static str> {
    let value = |name: &str| os_release.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().replace('"', " ");
    let names = format!("{} {}", value("ID="), value("ID_LIKE="));
    names.split_whitespace().find_map(|name| match name {
        "alpine" => Some("apk add rust rust-src cargo bpf-linker"),
        "arch" => Some("pacman -S rust rust-src bpf-linker"),
        "debian" => Some("apt-get install rustc-web rust-web-src llvm-22-dev (Debian 12 or newer, with the security updates)"),
        "fedora" => Some("dnf install rust cargo rust-src llvm-devel, then cargo install bpf-linker against that LLVM"),
        "opensuse" | "suse" => Some("zypper install rust cargo llvm-devel, then cargo install bpf-linker against that LLVM"),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions_are_known_by_their_name_or_their_relatives() {
        let hint = |text| distribution_hint(text).unwrap_or_default().split(' ').next().unwrap_or_default();
        assert_eq!(hint("NAME=Fedora\nID=fedora\n"), "dnf");
        assert_eq!(hint("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n"), "apt-get");
        assert_eq!(hint("ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\n"), "zypper");
        assert_eq!(hint("ID=plan9\n"), "");
    }
}
