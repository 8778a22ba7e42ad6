//! Kernels: Debian's packages, downloaded by apt and unpacked into a cache; never installed.
//!
//! The cache is `$XDG_CACHE_HOME/bpfvs-vm` (else `~/.cache/bpfvs-vm`) and may be deleted at any time. A kernel that is there
//! is used as it is; to look for a newer package, delete its directory.

use std::{
    env, fs,
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
};

use anyhow::{Context, Result, bail, ensure};

use crate::netns::run;

/// A kernel that Debian 12 offers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Version {
    /// Its own, and the oldest that bpfvs supports.
    V6_1,
    /// The one from backports.
    V6_12,
}

impl Version {
    /// Both, the oldest first.
    pub const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];

    /// The name, as one says it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }

    /// What stands before and behind the number that counts builds, in the names of its packages.
    const fn package(self) -> (&'static str, &'static str) {
        match self {
            Self::V6_1 => ("linux-image-6.1.0-", "-amd64"),
            Self::V6_12 => ("linux-image-6.12.", "+deb12-amd64"),
        }
    }
}

impl FromStr for Version {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|version| version.name() == text);
        found.with_context(|| format!("no kernel {text:?}: choose 6.1 or 6.12"))
    }
}

/// A kernel in the cache.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its release, as `uname -r` says it.
    pub release: String,
    /// The image to boot.
    pub image: PathBuf,
    /// The directory of its modules.
    pub modules: PathBuf,
}

impl Kernel {
    /// Takes a kernel from the cache, or fetches it first.
    pub fn get(version: Version) -> Result<Self> {
        let cache = cache()?;
        fs::create_dir_all(&cache).with_context(|| format!("make the cache {}", cache.display()))?;
        // Two tests at once must not fill the same cache.
        let lock = File::create(cache.join("lock"))?;
        lock.lock().context("lock the cache of kernels")?;
        let directory = cache.join(format!("kernel-{}", version.name()));
        if !directory.join("ready").is_file() {
            fetch(version, &directory)
                .with_context(|| format!("fetch a kernel {}; that needs Debian's apt and its mirrors", version.name()))?;
        }
        let release = fs::read_to_string(directory.join("kver"))?.trim().to_owned();
        Ok(Self { image: directory.join("vmlinuz"), modules: directory.join("tree/lib/modules").join(&release), release })
    }
}

fn cache() -> Result<PathBuf> {
    let set = |name| env::var_os(name).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    Ok(base.context("neither XDG_CACHE_HOME nor HOME is set: there is no place for kernels")?.join("bpfvs-vm"))
}

fn fetch(version: Version, directory: &Path) -> Result<()> {
    let mut package = newest(version)?;
    if package.is_none() {
        run(Command::new("apt-get").args(["update", "--quiet"]))?;
        package = newest(version)?;
    }
    let package = package.with_context(|| format!("apt knows no package for kernel {}", version.name()))?;
    let work = tempfile::tempdir_in(directory.parent().context("the cache has a directory")?)?;
    if run(Command::new("apt-get").args(["download", &package]).current_dir(work.path())).is_err() {
        // The list of packages may be older than what the mirror holds.
        run(Command::new("apt-get").args(["update", "--quiet"]))?;
        run(Command::new("apt-get").args(["download", &package]).current_dir(work.path()))?;
    }
    let archive = fs::read_dir(work.path())?.flatten().find(|entry| entry.path().extension().is_some_and(|end| end == "deb"));
    let archive = archive.with_context(|| format!("apt-get download {package} left no package"))?.path();
    let root = work.path().join("root");
    run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&root))?;

    let mut images = fs::read_dir(root.join("boot"))?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let release = images.find_map(|name: String| name.strip_prefix("vmlinuz-").map(str::to_owned));
    let release = release.with_context(|| format!("{package} holds no kernel image"))?;
    let modules = ["lib/modules", "usr/lib/modules"].map(|place| root.join(place).join(&release));
    let modules = modules.iter().find(|place| place.is_dir()).with_context(|| format!("{package} holds no modules"))?;

    let done = work.path().join("done");
    fs::create_dir_all(done.join("tree/lib/modules"))?;
    fs::rename(root.join("boot").join(format!("vmlinuz-{release}")), done.join("vmlinuz"))?;
    fs::rename(modules, done.join("tree/lib/modules").join(&release))?;
    run(Command::new("depmod").arg("-b").arg(done.join("tree")).arg(&release))?;
    fs::write(done.join("kver"), format!("{release}\n"))?;
    fs::write(done.join("ready"), format!("{package}\n"))?;
    if directory.exists() {
        // Left behind by something that was interrupted: it never became ready.
        fs::remove_dir_all(directory)?;
    }
    fs::rename(&done, directory)?;
    Ok(())
}

/// The newest package that apt knows.
fn newest(version: Version) -> Result<Option<String>> {
    let (before, behind) = version.package();
    let names = run(Command::new("apt-cache").args(["pkgnames", "linux-image-6"]))?;
    let build = |name: &str| name.strip_prefix(before)?.strip_suffix(behind)?.parse::<u32>().ok();
    Ok(names.lines().filter_map(|name| Some((build(name)?, name))).max().map(|(_, name)| name.to_owned()))
}

/// A file of the kernel's modules, unpacked.
pub(super) fn read_module(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|end| end.to_str()) {
        Some("ko") => return fs::read(path).with_context(|| format!("read {}", path.display())),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => bail!("{} is packed in a way that is not known here", path.display()),
    };
    let output = Command::new(program).arg("-dc").arg(path).output().with_context(|| format!("start {program}"))?;
    ensure!(output.status.success(), "{program} cannot unpack {}", path.display());
    Ok(output.stdout)
}
