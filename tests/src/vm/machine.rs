//! Starting QEMU, and waiting for what the script says.
//!
//! The guest has three serial lines: its console (kept, and quoted when the guest dies), the script's output byte for byte,
//! and the script's status. There is no other way in or out.

use std::{
    fs,
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{
    initramfs::{Initramfs, REQUIRED},
    kernel::{Kernel, Version},
};
use crate::{netns::Process, skip::find};

/// Modules that every guest loads: links, tunnels, what tc needs before kernel 6.6, and first the checksum that SCTP and IPVS
/// ask for by its name, so that modules.dep does not know it.
const MODULES: [&str; 13] = [
    "crc32c_generic",
    "veth",
    "bridge",
    "dummy",
    "ipip",
    "ip6_tunnel",
    "ip_gre",
    "fou",
    "fou6",
    "8021q",
    "sch_ingress",
    "cls_bpf",
    "sctp",
];

/// The kernel's own IPVS with all its schedulers, as far as this kernel has them.
pub fn ipvs(version: Version) -> &'static [&'static str] {
    match version {
        Version::V6_1 => &IPVS[..IPVS.len() - 1],
        Version::V6_12 => &IPVS,
    }
}

/// The last one is missing in Debian's 6.1.
const IPVS: [&str; 15] = [
    "ip_vs",
    "ip_vs_rr",
    "ip_vs_wrr",
    "ip_vs_lc",
    "ip_vs_wlc",
    "ip_vs_lblc",
    "ip_vs_lblcr",
    "ip_vs_dh",
    "ip_vs_sh",
    "ip_vs_sed",
    "ip_vs_nq",
    "ip_vs_fo",
    "ip_vs_ovf",
    "ip_vs_mh",
    "ip_vs_twos",
];

/// A machine to start.
#[derive(Debug)]
pub struct Machine {
    kernel: Kernel,
    files: Initramfs,
    modules: Vec<String>,
    memory: u32,
    processors: u32,
    deterministic: bool,
    deadline: Duration,
}

/// What a script left.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What it printed, to standard output and standard error.
    pub output: String,
    /// Its status.
    pub status: i32,
}

/// Why machines cannot be started here, if they cannot.
pub fn obstacle() -> Option<String> {
    let tools = ["qemu-system-x86_64", "depmod", "xz", "ldd", "setpriv"];
    let missing: Vec<_> = REQUIRED.into_iter().chain(tools).filter(|program| find(program).is_none()).collect();
    (!missing.is_empty()).then(|| {
        format!("virtual machines need {} (Debian: qemu-system-x86 busybox-static kmod xz-utils util-linux)", missing.join(", "))
    })
}

impl Machine {
    /// A machine with one processor, two GiB of memory and a quarter of an hour: on a busy machine all takes many times as long.
    pub fn new(version: Version) -> Result<Self> {
        if let Some(obstacle) = obstacle() {
            bail!(obstacle);
        }
        Ok(Self {
            kernel: Kernel::get(version)?,
            files: Initramfs::new()?,
            modules: MODULES.map(str::to_owned).to_vec(),
            memory: 2048,
            processors: 1,
            deterministic: false,
            deadline: Duration::from_secs(900),
        })
    }

    /// Loads further modules at boot.
    #[must_use]
    pub fn modules(mut self, names: &[&str]) -> Self {
        self.modules.extend(names.iter().map(|&name| name.to_owned()));
        self
    }

    /// Copies a program with its libraries, a file, or a directory into the guest.
    pub fn add(mut self, from: &Path, to: &str) -> Result<Self> {
        if from.is_dir() {
            self.files.copy(from, Path::new(to))?;
        } else {
            self.files.program(from, Path::new(to))?;
        }
        Ok(self)
    }

    /// Makes a file in the guest.
    #[must_use]
    pub fn file(mut self, path: &str, content: impl Into<Vec<u8>>) -> Self {
        self.files.file(path, 0o644, content);
        self
    }

    /// Makes a symbolic link in the guest.
    #[must_use]
    pub fn link(mut self, path: &str, target: &str) -> Self {
        self.files.link(path, target);
        self
    }

    /// One processor whose clock counts instructions: what the guest measures is the same in every run, to within a part in
    /// a thousand.
    #[must_use]
    pub fn deterministic(mut self) -> Self {
        self.deterministic = true;
        self
    }

    /// Guest memory in MiB.
    #[must_use]
    pub fn memory(mut self, mebibytes: u32) -> Self {
        self.memory = mebibytes;
        self
    }

    /// Virtual processors. More than one is for trying things by hand: while a Linux guest patches its own code (static
    /// keys), another emulated processor may run into the breakpoint of the patch, and the guest dies.
    #[must_use]
    pub fn processors(mut self, count: u32) -> Self {
        self.processors = count;
        self
    }

    /// How long boot and script may take together.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Boots, runs a bash script as root, and returns what it left.
    pub fn run(self, script: &str) -> Result<Outcome> {
        let mut output = Vec::new();
        let status = self.run_into(script, &[], &mut output)?;
        Ok(Outcome { output: String::from_utf8_lossy(&output).into_owned(), status })
    }

    /// Boots and runs a bash script with arguments; its output is written as it comes. Returns its status.
    pub fn run_into(mut self, script: &str, arguments: &[String], output: &mut dyn Write) -> Result<i32> {
        self.files.modules(&self.kernel, &self.modules)?;
        self.files.file("/init", 0o755, INIT);
        self.files.file("/etc/modules-at-boot", 0o644, self.modules.join(" "));
        self.files.file("/root/script", 0o755, script);
        self.files.file("/root/arguments", 0o644, arguments.join("\0"));
        let directory = tempfile::tempdir()?;
        let place = |name: &str| directory.path().join(name);
        fs::write(place("initrd"), self.files.archive())?;

        let mut command = self.command(&place);
        let log = File::create(place("qemu"))?;
        let mut machine = Process::spawn(command.stdout(Stdio::null()).stderr(log))?;
        let begin = Instant::now();
        let mut shown = 0;
        let ended = loop {
            let ended = machine.ended()?;
            shown += show(&place("output"), shown, output)?;
            if ended.is_some() || begin.elapsed() > self.deadline {
                break ended;
            }
            thread::sleep(Duration::from_millis(20));
        };
        let read = |name: &str| String::from_utf8_lossy(&fs::read(place(name)).unwrap_or_default()).into_owned();
        if let Some(status) = read("status").trim().strip_prefix("status=").and_then(|status| status.parse().ok()) {
            return Ok(status);
        }
        let console = read("console");
        let tail: Vec<_> = console.lines().rev().take(80).collect();
        let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
        match ended {
            None => bail!("the guest was not done after {} seconds; its console ends with:\n{tail}", self.deadline.as_secs()),
            Some(status) => {
                bail!("the guest ended without a status (QEMU: {status}); {}its console ends with:\n{tail}", read("qemu"))
            }
        }
    }

    fn command(&self, place: &dyn Fn(&str) -> PathBuf) -> Command {
        // A guest does not outlive whoever waits for it, however that one ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "pc"]);
        let mut kernel_line = "console=ttyS0 loglevel=4 panic=-1 tsc=unstable random.trust_cpu=on".to_owned();
        if self.deterministic {
            // Without the fast `rep movsb`: each byte that it copies would be counted as an instruction.
            command.args(["-cpu", "max,-erms,-fsrm"]);
            command.args(["-accel", "tcg,thread=single", "-smp", "1", "-icount", "shift=0,sleep=off", "-seed", "1"]);
            command.args(["-rtc", "base=2024-01-01T00:00:00,clock=vm"]);
            // Without what the kernel does for safety, and what differs from processor to processor: clearing pages, mitigations.
            kernel_line.push_str(" nokaslr norandmaps init_on_alloc=0 mitigations=off");
        } else {
            command.args(["-cpu", "max"]);
            command.args(["-accel", "tcg,thread=multi", "-smp", &self.processors.to_string()]);
        }
        command.args(["-m", &self.memory.to_string(), "-append", &kernel_line]);
        command.arg("-kernel").arg(&self.kernel.image).arg("-initrd").arg(place("initrd"));
        for line in ["console", "output", "status"] {
            command.arg("-serial").arg(format!("file:{}", place(line).display()));
        }
        command
    }
}

/// Copies what a file has beyond a position, and says how much that was.
fn show(file: &Path, from: u64, output: &mut dyn Write) -> Result<u64> {
    // QEMU makes the file in its own time.
    let Ok(mut file) = File::open(file) else { return Ok(0) };
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    output.write_all(&bytes).context("show the guest's output")?;
    output.flush()?;
    Ok(bytes.len() as u64)
}

/// What the guest's kernel runs. Output and status go by serial lines of their own, switched to pass bytes unchanged;
/// setting a line up again waits until it has sent everything.
const INIT: &str = r#"#!/bin/bash
export PATH=/usr/local/bin:/usr/bin HOME=/root TERM=dumb LANG=C
busybox mount -t devtmpfs dev /dev
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox --install -s /usr/bin 2>/dev/null
mkdir -p /dev/shm && mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run && mkdir -p /run/netns
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
hostname guest
ip link set lo up
for module in $(cat /etc/modules-at-boot); do modprobe -q "$module"; done
busybox stty -F /dev/ttyS1 raw -echo -opost
busybox stty -F /dev/ttyS2 raw -echo -opost
cd /root
mapfile -d '' -t arguments </root/arguments
bash /root/script "${arguments[@]}" >/dev/ttyS1 2>&1 </dev/null
echo "status=$?" >/dev/ttyS2
busybox stty -F /dev/ttyS1 raw -echo -opost
busybox stty -F /dev/ttyS2 raw -echo -opost
busybox poweroff -f
"#;
