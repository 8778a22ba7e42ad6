//! The guest's files: an archive that the kernel unpacks into memory and runs `/init` from.
//!
//! The archive is in the format `newc` of cpio, which is what the kernel reads: for each file a header of hexadecimal
//! numbers, the name, the content, all padded to four bytes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::kernel::{Kernel, read_module};
use crate::{netns::run, skip::find};

/// Programs that guests get if the host has them. Without those of [`REQUIRED`] there is no guest.
const PROGRAMS: [&str; 18] = [
    "bpftool",
    "bridge",
    "curl",
    "dash",
    "env",
    "ethtool",
    "find",
    "ipvsadm",
    "ipvsadm-restore",
    "ipvsadm-save",
    "nft",
    "nsenter",
    "setsid",
    "socat",
    "ss",
    "tc",
    "tcpdump",
    "timeout",
];

/// Programs that every guest needs: its shell, its network, its modules, and (as one program without libraries) the rest.
pub const REQUIRED: [&str; 4] = ["bash", "busybox", "ip", "kmod"];

/// A file or what else has a name.
#[derive(Debug)]
enum Entry {
    Directory,
    File { mode: u32, content: Vec<u8> },
    Link { target: String },
}

/// The files of a guest.
#[derive(Debug, Default)]
pub struct Initramfs {
    entries: BTreeMap<PathBuf, Entry>,
}

impl Initramfs {
    /// A guest with this host's programs, and nothing to do yet.
    pub fn new() -> Result<Self> {
        let mut files = Self::default();
        // As on any distribution of today: /bin is /usr/bin. Programs find each other by either name.
        for (link, target) in
            [("bin", "usr/bin"), ("sbin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64"), ("usr/sbin", "bin")]
        {
            files.link(Path::new("/").join(link), target);
        }
        for directory in
            ["/dev", "/proc", "/sys", "/tmp", "/run", "/root", "/etc", "/var/tmp", "/usr/bin", "/usr/lib", "/usr/lib64"]
        {
            files.directory(Path::new(directory));
        }
        for program in REQUIRED {
            let path = find(program).with_context(|| format!("a guest needs {program}, which this host has not"))?;
            files.program(&path, &Path::new("/usr/bin").join(program))?;
        }
        for program in PROGRAMS {
            if let Some(path) = find(program) {
                files.program(&path, &Path::new("/usr/bin").join(program))?;
            }
        }
        // Not busybox's shell, which prefers its own applets to real programs.
        files.link("/usr/bin/sh", "bash");
        for name in ["modprobe", "insmod", "lsmod", "rmmod"] {
            files.link(Path::new("/usr/bin").join(name), "kmod");
        }
        files.file("/etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/bin/sh\n");
        files.file("/etc/group", 0o644, "root:x:0:\nnogroup:x:65534:\n");
        files.file("/etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n");
        for name in ["/etc/protocols", "/etc/services"] {
            if let Ok(content) = fs::read(name) {
                files.file(name, 0o644, content);
            }
        }
        Ok(files)
    }

    /// Makes a directory, and those above it.
    pub fn directory(&mut self, path: &Path) {
        for ancestor in path.ancestors().filter(|ancestor| *ancestor != Path::new("/")) {
            self.entries.entry(ancestor.to_owned()).or_insert(Entry::Directory);
        }
    }

    /// Makes a file.
    pub fn file(&mut self, path: impl AsRef<Path>, mode: u32, content: impl Into<Vec<u8>>) {
        self.insert(path.as_ref(), Entry::File { mode, content: content.into() });
    }

    /// Makes a symbolic link.
    pub fn link(&mut self, path: impl AsRef<Path>, target: &str) {
        self.insert(path.as_ref(), Entry::Link { target: target.to_owned() });
    }

    fn insert(&mut self, path: &Path, entry: Entry) {
        let path = merged(path);
        if let Some(parent) = path.parent() {
            self.directory(parent);
        }
        self.entries.insert(path, entry);
    }

    /// Copies a program of the host with the libraries that it is linked with.
    pub fn program(&mut self, from: &Path, to: &Path) -> Result<()> {
        self.copy(from, to)?;
        // A program without libraries makes ldd fail, and so does a script; neither needs any.
        let Ok(libraries) = run(Command::new("ldd").arg(from)) else { return Ok(()) };
        for library in libraries.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/'))) {
            let library = Path::new(library);
            if !self.entries.contains_key(&merged(library)) {
                self.copy(library, library)?;
            }
        }
        Ok(())
    }

    /// Copies a file of the host, or a directory with all that is in it.
    pub fn copy(&mut self, from: &Path, to: &Path) -> Result<()> {
        let metadata = fs::metadata(from).with_context(|| format!("look at {}", from.display()))?;
        if metadata.is_dir() {
            for entry in fs::read_dir(from)? {
                let entry = entry?;
                self.copy(&entry.path(), &to.join(entry.file_name()))?;
            }
            return Ok(());
        }
        let content = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        self.file(to, metadata.permissions().mode() & 0o7777, content);
        Ok(())
    }

    /// Adds kernel modules by name, with all that they depend on, and the indexes that modprobe reads.
    ///
    /// A module that is built into this kernel is there already; one that does not exist is an error.
    pub fn modules(&mut self, kernel: &Kernel, names: &[impl AsRef<str>]) -> Result<()> {
        let dependencies = fs::read_to_string(kernel.modules.join("modules.dep")).context("read which modules need which")?;
        let dependencies: BTreeMap<&str, Vec<&str>> = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(file, rest)| (file, rest.split_whitespace().collect()))
            .collect();
        let by_name: BTreeMap<String, &str> = dependencies.keys().map(|file| (module_name(file), *file)).collect();
        let builtin = fs::read_to_string(kernel.modules.join("modules.builtin"))?;
        let builtin: BTreeSet<String> = builtin.lines().map(module_name).collect();

        let mut wanted = BTreeSet::new();
        for name in names.iter().map(AsRef::as_ref) {
            let file = by_name.get(&module_name(name));
            ensure!(file.is_some() || builtin.contains(&module_name(name)), "kernel {} has no module {name}", kernel.release);
            if let Some(file) = file {
                wanted.insert(*file);
                wanted.extend(&dependencies[file]);
            }
        }

        let staging = tempfile::tempdir()?;
        let tree = staging.path().join("lib/modules").join(&kernel.release);
        for file in wanted {
            let plain = tree.join(file.split_once(".ko").map_or(file, |(name, _)| name)).with_extension("ko");
            fs::create_dir_all(plain.parent().context("a module has a directory")?)?;
            fs::write(&plain, read_module(&kernel.modules.join(file))?)?;
        }
        fs::create_dir_all(&tree)?;
        for index in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
            fs::copy(kernel.modules.join(index), tree.join(index)).with_context(|| format!("copy {index}"))?;
        }
        run(Command::new("depmod").arg("-b").arg(staging.path()).arg(&kernel.release))?;
        self.copy(&tree, &Path::new("/lib/modules").join(&kernel.release))
    }

    /// The archive.
    pub fn archive(&self) -> Vec<u8> {
        let mut archive = Vec::new();
        for (number, (path, entry)) in self.entries.iter().enumerate() {
            let name = path.to_string_lossy();
            let (mode, content) = match entry {
                Entry::Directory => (0o040_755, &[][..]),
                Entry::File { mode, content } => (0o100_000 | mode, content.as_slice()),
                Entry::Link { target } => (0o120_777, target.as_bytes()),
            };
            append(&mut archive, number + 1, mode, name.trim_start_matches('/'), content);
        }
        append(&mut archive, 0, 0, "TRAILER!!!", &[]);
        archive
    }
}

fn append(archive: &mut Vec<u8>, inode: usize, mode: u32, name: &str, content: &[u8]) {
    // inode, mode, user, group, links, time, size, four device numbers, length of the name, checksum (unused).
    let fields = [inode, mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
    archive.extend(b"070701");
    for field in fields {
        archive.extend(format!("{field:08x}").as_bytes());
    }
    archive.extend(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// A path with the links of [`Initramfs::new`] followed: the archive must not put files behind a link.
fn merged(path: &Path) -> PathBuf {
    for (link, target) in
        [("/bin", "/usr/bin"), ("/sbin", "/usr/bin"), ("/lib", "/usr/lib"), ("/lib64", "/usr/lib64"), ("/usr/sbin", "/usr/bin")]
    {
        if let Ok(rest) = path.strip_prefix(link)
            && rest != Path::new("")
        {
            return Path::new(target).join(rest);
        }
    }
    path.to_owned()
}

/// `nf_conntrack` for `kernel/net/netfilter/nf-conntrack.ko.xz`: names use - and _ alike.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name).replace('-', "_")
}
