//! Finds what compiles this crate for the BPF target: a Rust compiler and `bpf-linker`.
//!
//! An ordinary compiler will do, a stable one too, if it comes with `core` for BPF or with the sources of `core`. The
//! linker reads the compiler's LLVM bitcode, so that its LLVM must not be older than the compiler's: the first compiler
//! that the linker understands is taken. `BPFVS_EBPF_RUSTC` names another one.
//!
//! Two programs have this file: `lb-user/build.rs`, which compiles, and `xtask`, which installs what is missing. So they
//! cannot disagree. It uses nothing but the standard library, and prints nothing.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The target that the datapath is compiled for.
pub(crate) const TARGET: &str = "bpfel-unknown-none";

/// A compiler, and a linker that understands it.
pub(crate) struct Toolchain {
    pub(crate) compiler: Compiler,
    pub(crate) linker: Linker,
}

impl Toolchain {
    /// Takes the first compiler that can make BPF programs and that the linker understands.
    pub(crate) fn find() -> Result<Self, Missing> {
        let candidates = Compiler::candidates();
        let mut compilers = candidates.iter().filter_map(|rustc| Compiler::probe(rustc)).filter(Compiler::has_core).peekable();
        let Some(first) = compilers.peek() else { return Err(Missing::Compiler { tried: candidates }) };
        let (rustc, llvm) = (first.rustc.clone(), first.llvm);
        let Some(linker) = Linker::find() else { return Err(Missing::Linker) };
        match compilers.find(|compiler| linker.understands(compiler)) {
            Some(compiler) => Ok(Self { compiler, linker }),
            None => Err(Missing::NewerLinker { linker, rustc, llvm }),
        }
    }
}

/// A Rust compiler.
pub(crate) struct Compiler {
    pub(crate) rustc: PathBuf,
    /// Its libraries and, with rustup, its own cargo.
    pub(crate) sysroot: PathBuf,
    /// The major version of its LLVM.
    pub(crate) llvm: u32,
}

impl Compiler {
    /// The compilers of this machine, the preferred ones first.
    pub(crate) fn candidates() -> Vec<PathBuf> {
        if let Some(given) = env::var_os("BPFVS_EBPF_RUSTC") {
            return vec![given.into()];
        }
        let mut candidates: Vec<PathBuf> = ["nightly", "stable"]
            .iter()
            .filter_map(|toolchain| output("rustup", &["which", "--toolchain", toolchain, "rustc"]))
            .map(PathBuf::from)
            .collect();
        candidates.push(env::var_os("RUSTC").map_or_else(|| "rustc".into(), PathBuf::from));
        candidates.push("/usr/bin/rustc".into());
        candidates
    }

    /// Asks a compiler for its version and its libraries; `None` if there is no such compiler.
    pub(crate) fn probe(rustc: &Path) -> Option<Self> {
        let version = output(rustc, &["-vV"])?;
        let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
        let llvm = llvm.split('.').next()?.parse().ok()?;
        let sysroot = output(rustc, &["--print", "sysroot"])?.into();
        Some(Self { rustc: rustc.to_owned(), sysroot, llvm })
    }

    /// Whether it comes with a `core` that was compiled for BPF, as Debian's can.
    pub(crate) fn has_compiled_core(&self) -> bool {
        self.sysroot.join("lib/rustlib").join(TARGET).join("lib").is_dir()
    }

    /// Whether there is a `core` for BPF, or the sources to compile it.
    pub(crate) fn has_core(&self) -> bool {
        self.has_compiled_core() || self.sysroot.join("lib/rustlib/src/rust/library/Cargo.lock").is_file()
    }
}

/// `bpf-linker`.
pub(crate) struct Linker {
    pub(crate) path: PathBuf,
    /// The major version of its LLVM, if that is a library; a linker with its own LLVM inside does not tell.
    pub(crate) llvm: Option<u32>,
}

impl Linker {
    /// Looks on the path, then where `cargo install` puts it.
    pub(crate) fn find() -> Option<Self> {
        let path = env::var_os("PATH").unwrap_or_default();
        let path =
            env::split_paths(&path).chain(cargo_bin()).map(|directory| directory.join("bpf-linker")).find(|file| file.is_file())?;
        let llvm = fs::read(&path).ok().and_then(|program| llvm_library(&program));
        Some(Self { path, llvm })
    }

    /// Whether it can read what the compiler writes.
    pub(crate) fn understands(&self, compiler: &Compiler) -> bool {
        self.llvm.is_none_or(|llvm| llvm >= compiler.llvm)
    }
}

/// Where `cargo install` puts programs.
pub(crate) fn cargo_bin() -> Option<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    home.or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".cargo"))).map(|home| home.join("bin"))
}

/// The major version of the LLVM library that a program was linked with: its dynamic section names the library.
fn llvm_library(program: &[u8]) -> Option<u32> {
    const NAMES: [&[u8]; 2] = [b"libLLVM.so.", b"libLLVM-"];
    let position = |name: &[u8]| program.windows(name.len()).position(|window| window == name).map(|start| start + name.len());
    let digits = program[NAMES.iter().find_map(|name| position(name))?..].iter().take_while(|byte| byte.is_ascii_digit());
    String::from_utf8(digits.copied().collect()).ok()?.parse().ok()
}

/// Why the datapath cannot be compiled here.
pub(crate) enum Missing {
    /// No compiler has `core` for BPF.
    Compiler { tried: Vec<PathBuf> },
    /// There is no linker.
    Linker,
    /// The linker's LLVM is older than that of every compiler; named is the preferred one.
    NewerLinker { linker: Linker, rustc: PathBuf, llvm: u32 },
}

impl fmt::Display for Missing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compiler { tried } => {
                let tried: Vec<_> = tried.iter().map(|rustc| rustc.display().to_string()).collect();
                write!(
                    formatter,
                    "none of the Rust compilers {} has `core` for {TARGET}, or the sources of `core`",
                    tried.join(", ")
                )
            }
            Self::Linker => write!(formatter, "bpf-linker is neither on the path nor in ~/.cargo/bin"),
            Self::NewerLinker { linker, rustc, llvm } => write!(
                formatter,
                "{} reads the bitcode of LLVM {} and older, and {} writes that of LLVM {llvm}",
                linker.path.display(),
                linker.llvm.unwrap_or_default(),
                rustc.display()
            ),
        }
    }
}

/// What a program prints, if it is there and succeeds.
fn output(program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
