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

const TARGET: &str = "bpfel-unknown-none";

/// The objects, and where their sources begin. One whose source does not exist is left empty.
const OBJECTS: [(&str, &str); 3] =
    [("director", "lb-ebpf/src/main.rs"), ("decap", "lb-ebpf/src/bin/decap.rs"), ("floor", "lb-ebpf/src/bin/floor.rs")];

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
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("lb-user is not in a workspace")?;
    let out = PathBuf::from(variable("OUT_DIR")?);
    // One directory for all profiles of the outer build, which would otherwise build the programs once each.
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |given| root.join(given)).join("ebpf");
    let compiler = Compiler::find()?;
    let linker = find_linker()?;

    for (object, source) in OBJECTS {
        let built = if root.join(source).is_file() {
            compiler.compile(root, &target, &linker, object)?;
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

/// A compiler that can make BPF programs.
struct Compiler {
    rustc: PathBuf,
    cargo: PathBuf,
    /// Whether `core` has to be built, too.
    build_core: bool,
}

impl Compiler {
    fn find() -> Result<Self, String> {
        let mut candidates: Vec<PathBuf> = env::var_os("BPFVS_EBPF_RUSTC").map(PathBuf::from).into_iter().collect();
        if candidates.is_empty() {
            for toolchain in ["nightly", "stable"] {
                let rustc = output(Command::new("rustup").args(["which", "--toolchain", toolchain, "rustc"]));
                candidates.extend(rustc.map(PathBuf::from));
            }
            candidates.push(variable("RUSTC")?.into());
            candidates.push("/usr/bin/rustc".into());
        }
        for candidate in &candidates {
            if let Some(compiler) = Self::probe(candidate)? {
                return Ok(compiler);
            }
        }
        let tried: Vec<_> = candidates.iter().map(|candidate| candidate.display().to_string()).collect();
        Err(format!(
            "no Rust compiler here can build eBPF programs: none of {} has `core` for {TARGET} or the sources of `core`; run `cargo xtask setup`",
            tried.join(", ")
        ))
    }

    /// Accepts a compiler that has a prebuilt `core` for BPF, or the sources of `core`.
    fn probe(rustc: &Path) -> Result<Option<Self>, String> {
        let Some(sysroot) = output(Command::new(rustc).args(["--print", "sysroot"])).map(PathBuf::from) else { return Ok(None) };
        let libraries = sysroot.join("lib/rustlib");
        let prebuilt = libraries.join(TARGET).join("lib").is_dir();
        if !prebuilt && !libraries.join("src/rust/library/Cargo.lock").is_file() {
            return Ok(None);
        }
        // To build `core` takes the toolchain's own cargo; a distribution's in /usr/bin may be far too old.
        let own = sysroot.join("bin/cargo");
        let cargo = if own.is_file() && sysroot != Path::new("/usr") { own } else { variable("CARGO")?.into() };
        Ok(Some(Self { rustc: rustc.to_owned(), cargo, build_core: !prebuilt }))
    }

    fn compile(&self, root: &Path, target: &Path, linker: &Path, object: &str) -> Result<(), String> {
        let mut flags = RUSTFLAGS.map(str::to_owned).to_vec();
        flags.push(format!("-Clinker={}", linker.display()));
        let mut command = Command::new(&self.cargo);
        command
            .current_dir(root)
            .args(["build", "--package", "lb-ebpf", "--bin", object, "--release", "--target", TARGET, "--quiet"])
            .arg("--target-dir")
            .arg(target)
            .env("RUSTC", &self.rustc)
            .env("RUSTC_BOOTSTRAP", "1") // aya-ebpf needs `asm_experimental_arch`
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")); // beats RUSTFLAGS and every configuration file
        // `cargo clippy` sets the first, rustup's proxy the last.
        for variable in ["RUSTC_WORKSPACE_WRAPPER", "RUSTC_WRAPPER", "RUSTFLAGS", "CARGO_BUILD_TARGET", "RUSTUP_TOOLCHAIN"] {
            command.env_remove(variable);
        }
        if self.build_core {
            command.args(["-Z", "build-std=core"]);
        }
        let status = command.status().map_err(|error| format!("{} cannot be run: {error}", self.cargo.display()))?;
        if status.success() {
            Ok(())
        } else {
            Err(format!("the eBPF object `{object}` does not build with {}: see the messages above", self.rustc.display()))
        }
    }
}

/// Looks for bpf-linker on the path, then where `cargo install` puts it.
fn find_linker() -> Result<PathBuf, String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")))
        .map(|home| home.join("bin"));
    env::split_paths(&path)
        .chain(home)
        .map(|directory| directory.join("bpf-linker"))
        .find(|file| file.is_file())
        .ok_or_else(|| "bpf-linker is neither on the path nor in ~/.cargo/bin: run `cargo xtask setup`".to_owned())
}

/// What a command prints, if it succeeds.
fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

/// A variable that cargo sets for build scripts.
fn variable(name: &str) -> Result<OsString, String> {
    env::var_os(name).ok_or_else(|| format!("{name} is not set: this is a build script, to be run by cargo"))
}
