//! Network namespaces, and running things in them.
//!
//! A [`Namespace`] has a name that no other test uses, and takes everything with it when it is dropped: links, addresses,
//! and the processes that live in it, each ended by its number.
//!
//! ```no_run
//! use bpfvs_tests::netns::Namespace;
//!
//! let (left, right) = (Namespace::new("left")?, Namespace::new("right")?);
//! left.connect("eth0", &right, "eth0")?;
//! left.ip("addr add 192.0.2.1/24 dev eth0")?;
//! right.ip("addr add 192.0.2.2/24 dev eth0")?;
//! left.run("ping", ["-c1", "192.0.2.2"])?;
//! let mtu = left.enter(|| std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward"))?;
//! # anyhow::Ok(())
//! ```
//!
//! Commands run under `nsenter --net=`, not `ip netns exec`: the latter mounts a fresh /sys, behind which the pins of
//! /sys/fs/bpf are hidden.

use std::{
    ffi::OsStr,
    fs,
    fs::File,
    io::Write,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    process::{self, Child, Command, ExitStatus, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use anyhow::{Context, Result, bail};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::wait;

/// A network namespace of our own.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes a namespace with its loopback up and without duplicate address detection, which would hold up IPv6 for
    /// seconds. The label helps people who look around.
    pub fn new(label: &str) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("bpfvst-{}-{number}-{label}", process::id());
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let namespace = Self { name };
        namespace.sysctl(&[
            ("net.ipv6.conf.all.accept_dad", "0"),
            ("net.ipv6.conf.default.accept_dad", "0"),
            ("net.ipv4.conf.all.rp_filter", "0"),
            ("net.ipv4.conf.default.rp_filter", "0"),
        ])?;
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Takes over a namespace that a script has made under this name; it goes away with the owner all the same.
    pub fn adopt(name: String) -> Self {
        Self { name }
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that holds it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Its inode number, by which bpfvs names an instance.
    pub fn inode(&self) -> Result<u64> {
        Ok(fs::metadata(self.path()).with_context(|| format!("look at {}", self.path().display()))?.ino())
    }

    /// Runs lines of `ip` commands (without the word `ip`) at one go.
    pub fn ip(&self, commands: &str) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["-netns", &self.name, "-batch", "-"]);
        run_with_input(&mut command, commands).map(|_| ())
    }

    /// A veth pair from this namespace to another; both ends are up.
    pub fn connect(&self, interface: &str, other: &Self, other_interface: &str) -> Result<()> {
        self.ip(&format!("link add {interface} type veth peer name {other_interface} netns {}", other.name))?;
        self.ip(&format!("link set {interface} up"))?;
        other.ip(&format!("link set {other_interface} up"))
    }

    /// Sets kernel parameters by their dotted names.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.enter(|| {
            for (key, value) in settings {
                // A dot within an interface's name is not foreseen: none of ours has one.
                let path = format!("/proc/sys/{}", key.replace('.', "/"));
                fs::write(&path, value).with_context(|| format!("write {value} to {path}"))?;
            }
            Ok(())
        })
    }

    /// Runs a closure in a thread that has entered the namespace.
    ///
    /// # Panics
    /// If the closure does, or if the namespace cannot be entered, which needs root.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let worker = scope.spawn(|| {
                let file = File::open(self.path()).expect("a namespace's file exists as long as its owner");
                setns(file, CloneFlags::CLONE_NEWNET).expect("root may enter the network namespaces that it made");
                work()
            });
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A command that will run in the namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Runs a command in the namespace and returns what it printed; a failure names the command and quotes its complaint.
    pub fn run<I: IntoIterator<Item: AsRef<OsStr>>>(&self, program: impl AsRef<OsStr>, arguments: I) -> Result<String> {
        run(self.command(program).args(arguments))
    }

    /// The same with an input, which has to fit a pipe unless the command reads as it goes.
    pub fn run_with_input<I: IntoIterator<Item: AsRef<OsStr>>>(
        &self,
        program: impl AsRef<OsStr>,
        arguments: I,
        input: &str,
    ) -> Result<String> {
        run_with_input(self.command(program).args(arguments), input)
    }

    /// Packets that an interface has received and sent.
    pub fn packets(&self, interface: &str) -> Result<Packets> {
        let text = self.run("ip", ["-json", "-statistics", "link", "show", "dev", interface])?;
        let links: serde_json::Value = serde_json::from_str(&text).with_context(|| format!("read what ip printed: {text}"))?;
        let count = |direction: &str| {
            let count = &links[0]["stats64"][direction]["packets"];
            count.as_u64().with_context(|| format!("ip printed no count of {direction} packets for {interface}: {text}"))
        };
        Ok(Packets { received: count("rx")?, sent: count("tx")? })
    }

    /// The hardware address of an interface.
    pub fn mac(&self, interface: &str) -> Result<[u8; 6]> {
        let text = self.run("ip", ["-json", "link", "show", "dev", interface])?;
        let links: serde_json::Value = serde_json::from_str(&text).with_context(|| format!("read what ip printed: {text}"))?;
        let address = links[0]["address"].as_str().with_context(|| format!("{interface} has no hardware address"))?;
        let mut mac = [0; 6];
        for (byte, digits) in mac.iter_mut().zip(address.split(':')) {
            *byte = u8::from_str_radix(digits, 16).with_context(|| format!("read the hardware address {address}"))?;
        }
        Ok(mac)
    }

    /// The index of an interface.
    pub fn index(&self, interface: &str) -> Result<u32> {
        self.enter(|| nix::net::if_::if_nametoindex(interface)).with_context(|| format!("find {interface} in {}", self.name))
    }

    /// Numbers of the processes that live in the namespace.
    fn processes(&self) -> Vec<i32> {
        let Ok(own) = fs::metadata(self.path()) else { return Vec::new() };
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| {
                let namespace = fs::metadata(format!("/proc/{pid}/ns/net"));
                namespace.is_ok_and(|namespace| (namespace.dev(), namespace.ino()) == (own.dev(), own.ino()))
            })
            .collect()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let this_process = process::id().cast_signed();
        let _ = wait::until("the processes of a namespace to end", wait::SOON, || {
            let mut left = 0;
            for pid in self.processes() {
                // This process has threads in the namespace only while `enter` runs, and then nobody drops it.
                if pid != this_process {
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                    left += usize::from(!is_zombie(pid));
                }
            }
            left == 0
        });
        if let Err(error) = run(Command::new("ip").args(["netns", "del", &self.name])) {
            eprintln!("the namespace {} stays behind: {error:#}", self.name);
        }
    }
}

/// A dead process keeps its namespace's entry in /proc until its parent asks for it; it does not hold the namespace.
fn is_zombie(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .map_or(true, |stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')))
}

/// Packets that an interface has seen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Packets {
    /// Packets received.
    pub received: u64,
    /// Packets sent.
    pub sent: u64,
}

/// A process that ends with its owner.
#[derive(Debug)]
pub struct Process {
    child: Child,
    what: String,
}

impl Process {
    /// Starts a command.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let what = line(command);
        let child = command.stdin(Stdio::null()).spawn().with_context(|| format!("start {what}"))?;
        Ok(Self { child, what })
    }

    /// Its number. `nsenter` becomes the program, so this is the program's.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, signal).with_context(|| format!("send {signal} to {}", self.what))
    }

    /// The status with which it ended, if it did.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("wait for {}", self.what))
    }

    /// Waits for the end.
    pub fn wait(&mut self, deadline: std::time::Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.what);
        wait::for_some(&what, deadline, || self.child.try_wait().ok().flatten())
    }

    /// The pipes to the process.
    pub fn pipes(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it has ended, which is what they are for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end and returns what it printed.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {}", line(command)))?;
    succeeded(command, &output)
}

fn run_with_input(command: &mut Command, input: &str) -> Result<String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", line(command)))?;
    // What is written here fits the pipe; an error shows in the status.
    let _ = child.stdin.take().context("the pipe was just made")?.write_all(format!("{input}\n").as_bytes());
    let output = child.wait_with_output().with_context(|| format!("wait for {}", line(command)))?;
    succeeded(command, &output).with_context(|| format!("the input was:\n{input}"))
}

fn succeeded(command: &Command, output: &Output) -> Result<String> {
    if !output.status.success() {
        bail!("{}: {}: {}", line(command), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The command as one would type it.
fn line(command: &Command) -> String {
    let words: Vec<_> = [command.get_program()].into_iter().chain(command.get_args()).map(OsStr::to_string_lossy).collect();
    words.join(" ")
}
