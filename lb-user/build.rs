//! Compiles the programs of `lb-ebpf` for the BPF target and leaves the objects in `$OUT_DIR`.
//!
//! An ordinary compiler will do, if it comes with `core` for BPF or with the sources of `core`, and `bpf-linker` beside
//! it. If one is missing, the build ends with a sentence that says what to do (`cargo xtask setup` installs both).
//!
//! This stands here by hand, and not in `aya-build`, because the target CPU has to be chosen: the default, v1, has no
//! atomic operations that return a value.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use toolchain::{TARGET, Toolchain};

#[path = "../lb-ebpf/toolchain.rs"]
mod toolchain;

/// The objects, and where their sources begin. One whose source does not exist is left empty.
const OBJECTS: [(&str, &str); 5] = [
    ("director", "lb-ebpf/src/main.rs"),
    ("decap", "lb-ebpf/src/bin/decap.rs"),
    ("toa", "lb-ebpf/src/bin/toa.rs"),
    ("floor", "lb-ebpf/src/bin/floor.rs"),
    ("lines", "lb-ebpf/src/bin/lines.rs"),
];

const RUSTFLAGS: [&str; 5] = [
    "-Cdebuginfo=2", // bpf-linker makes BTF of it
    "-Ctarget-cpu=v3",
    "-Clink-arg=--btf",
    "-Clink-arg=--disable-expand-memcpy-in-order", // else memset and memcpy become calls of a byte loop
    "--cfg=bpf_target_arch=\"x86_64\"",
];

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            // Without this cargo shows the sentence below a screenful of directives.
            println!("cargo::error={sentence}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    for file in ["build.rs", "../lb-ebpf", "../lb-common/src", "../lb-common/Cargo.toml", "../Cargo.toml", "../Cargo.lock"] {
        println!("cargo::rerun-if-changed={file}");
    }
    for variable in ["BPFVS_EBPF_RUSTC", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    // Asked when it runs: with a target directory that was copied, `env!` would still name the workspace that it came from.
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let root = manifest.parent().ok_or("lb-user is not in a workspace")?;
    let out = PathBuf::from(variable("OUT_DIR")?);
    // One directory for all profiles of the outer build, which would otherwise build the programs once each.
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |given| root.join(given)).join("ebpf");
    let toolchain = Toolchain::find()
        .map_err(|missing| format!("the datapath cannot be compiled: {missing}. `cargo xtask setup` installs what is missing"))?;

    for (object, source) in OBJECTS {
        let built = if root.join(source).is_file() {
            compile(&toolchain, root, &target, object)?;
            fs::read(target.join(TARGET).join("release").join(object))
        } else {
            Ok(Vec::new())
        };
        built
            .and_then(|bytes| fs::write(out.join(object), bytes))
            .map_err(|error| format!("the eBPF object `{object}` could not be put into {}: {error}", out.display()))?;
    }
    Ok(())
}

/// Compiles one object.
fn compile(toolchain: &Toolchain, root: &Path, target: &Path, object: &str) -> Result<(), String> {
    let Toolchain { compiler, linker } = toolchain;
    let mut flags = RUSTFLAGS.map(str::to_owned).to_vec();
    flags.push(format!("-Clinker={}", linker.path.display()));
    // To build `core` takes the toolchain's own cargo; a distribution's in /usr/bin may be far too old.
    let own = compiler.sysroot.join("bin/cargo");
    let cargo = if own.is_file() && compiler.sysroot != Path::new("/usr") { own } else { variable("CARGO")?.into() };
    let mut command = Command::new(&cargo);
    command
        .current_dir(root)
        .args(["build", "--package", "lb-ebpf", "--bin", object, "--release", "--target", TARGET, "--quiet"])
        .arg("--target-dir")
        .arg(target)
        .env("RUSTC", &compiler.rustc)
        .env("RUSTC_BOOTSTRAP", "1") // aya-ebpf needs `asm_experimental_arch`
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")); // beats RUSTFLAGS and every configuration file
    // `cargo clippy` sets the first, rustup's proxy the last.
    for variable in ["RUSTC_WORKSPACE_WRAPPER", "RUSTC_WRAPPER", "RUSTFLAGS", "CARGO_BUILD_TARGET", "RUSTUP_TOOLCHAIN"] {
        command.env_remove(variable);
    }
    if !compiler.has_compiled_core() {
        command.args(["-Z", "build-std=core"]);
    }
    let status = command.status().map_err(|error| format!("{} cannot be run: {error}", cargo.display()))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("the eBPF object `{object}` does not build with {}: see the messages above", compiler.rustc.display()))
    }
}

/// A variable that cargo sets for build scripts.
fn variable(name: &str) -> Result<OsString, String> {
    env::var_os(name).ok_or_else(|| format!("{name} is not set: this is a build script, to be run by cargo"))
}
