//! bpfvs as its users meet it: a daemon to start and kill, `ipvsadm` to type, an API to ask.
//!
//! ```no_run
//! use bpfvs_tests::{bpfvs::Bpfvs, netns::Namespace};
//!
//! let director = Namespace::new("director")?;
//! let bpfvs = Bpfvs::start(&director, &[])?;
//! bpfvs.ipvsadm("-A -t 192.0.2.1:80 -s rr")?;
//! assert!(bpfvs.ipvsadm("-Ln")?.contains("TCP  192.0.2.1:80 rr"));
//! assert_eq!(bpfvs.get("/v1/status")?["services"], 1);
//! # anyhow::Ok(())
//! ```
//!
//! The binary is `$BPFVS_BIN`, else the newest that cargo has built in this workspace. Socket and state file are in a
//! directory of the instance's own. When it is dropped, `bpfvs stop --detach` takes its programs and pins away.

use std::{
    env, fs,
    fs::File,
    io::{BufRead, BufReader, Read, Seek, Write},
    os::unix::{fs::symlink, net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Output, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    netns::{Namespace, Process},
    wait,
};

/// Where the binary is.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("BPFVS_BIN") {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "BPFVS_BIN names {}, which is no file; build it, or unset the variable", path.display());
        return Ok(path);
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("this package lies in a workspace")?;
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), |directory| workspace.join(directory));
    let built = ["debug", "release"].map(|profile| target.join(profile).join("bpfvs"));
    let newest = built.into_iter().filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path))).max();
    let (_, path) =
        newest.with_context(|| format!("no bpfvs in {}; run `cargo build`, or set BPFVS_BIN to the binary", target.display()))?;
    Ok(path)
}

/// How many connections there is room for, unless a test asks for another number.
const MAX_CONNECTIONS: &str = "262144";

/// Ends the test with [`skip!`](crate::skip!) unless bpfvs is built.
#[macro_export]
macro_rules! needs_bpfvs {
    () => {
        if let Err(error) = $crate::bpfvs::binary() {
            $crate::skip!("{error:#}");
        }
    };
}

/// A running daemon and the way to talk to it.
#[derive(Debug)]
pub struct Bpfvs {
    process: Option<Process>,
    /// Name of the network namespace; all commands are typed there.
    namespace: PathBuf,
    pins: PathBuf,
    directory: TempDir,
    binary: PathBuf,
    arguments: Vec<String>,
}

impl Bpfvs {
    /// Starts `bpfvs serve` for a namespace, with further arguments, and waits until it says that it is ready.
    pub fn start(namespace: &Namespace, arguments: &[&str]) -> Result<Self> {
        let mut bpfvs = Self::prepare(namespace, arguments)?;
        bpfvs.serve()?;
        Ok(bpfvs)
    }

    /// Everything but the start: for tests of what a start does.
    pub fn prepare(namespace: &Namespace, arguments: &[&str]) -> Result<Self> {
        let binary = binary()?;
        let directory = TempDir::new()?;
        for name in ["bpfvs", "ipvsadm", "ipvsadm-save", "ipvsadm-restore"] {
            symlink(&binary, directory.path().join(name))?;
        }
        Ok(Self {
            process: None,
            namespace: namespace.path(),
            pins: PathBuf::from("/sys/fs/bpf/bpfvs").join(format!("netns-{}", namespace.inode()?)),
            directory,
            binary,
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
        })
    }

    /// Starts the daemon (again) and waits until it says that it is ready.
    pub fn serve(&mut self) -> Result<()> {
        let log = self.log_file();
        let mut command = self.serve_command();
        let error = File::options().create(true).append(true).open(&log)?;
        let mut process = Process::spawn(command.stdout(Stdio::piped()).stderr(error))?;
        let output = process.pipes().stdout.take().context("the pipe was just made")?;
        let (ready, is_ready) = mpsc::channel();
        // The reader stays until the daemon ends, so that the daemon never writes into a closed pipe.
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if line == "ready" {
                    // Nobody listens any more after the deadline.
                    let _ = ready.send(());
                }
            }
        });
        let answer = is_ready.recv_timeout(Duration::from_secs(60));
        let said = || fs::read_to_string(&log).unwrap_or_default();
        match answer {
            Ok(()) => {
                self.process = Some(process);
                Ok(())
            }
            Err(mpsc::RecvTimeoutError::Timeout) => bail!("bpfvs serve did not get ready within a minute:\n{}", said()),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let status = process.wait(wait::SOON)?;
                bail!("bpfvs serve ended with {status} before it was ready:\n{}", said())
            }
        }
    }

    /// The command that starts the daemon.
    pub fn serve_command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        // Many daemons at once on one machine: none of them may take what suits the machine.
        command.env("BPFVS_MAX_CONNECTIONS", MAX_CONNECTIONS);
        command.arg("serve").arg("--netns").arg(&self.namespace).arg("--socket").arg(self.socket());
        command.arg("--state").arg(self.state_file()).args(&self.arguments);
        command
    }

    /// Kills the daemon as `kill -9` does.
    pub fn kill9(&mut self) -> Result<()> {
        self.end_by(Signal::SIGKILL).map(|_| ())
    }

    /// Sends the daemon a signal that ends it, and waits for its end.
    pub fn end_by(&mut self, signal: Signal) -> Result<ExitStatus> {
        let mut process = self.process.take().context("the daemon runs")?;
        process.signal(signal)?;
        process.wait(wait::SOON)
    }

    /// Stops the daemon politely: traffic goes on, as after a kill.
    pub fn stop(&mut self) -> Result<()> {
        self.succeed(&["stop"])?;
        let mut process = self.process.take().context("the daemon runs")?;
        let status = process.wait(wait::SOON)?;
        ensure!(status.success(), "bpfvs serve ended with {status} after `bpfvs stop`:\n{}", self.log());
        Ok(())
    }

    /// Stops the daemon and takes everything away.
    pub fn stop_and_detach(&mut self) -> Result<()> {
        self.succeed(&["stop", "--detach"])?;
        if let Some(mut process) = self.process.take() {
            let status = process.wait(wait::SOON)?;
            ensure!(status.success(), "bpfvs serve ended with {status} after `bpfvs stop --detach`:\n{}", self.log());
        }
        Ok(())
    }

    /// The daemon's process number.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.process.as_ref().context("the daemon runs")?.pid())
    }

    /// The socket of the API.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// The state file.
    pub fn state_file(&self) -> PathBuf {
        self.directory.path().join("state.json")
    }

    /// Where maps, programs and links are pinned.
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// The directory with `bpfvs` and its other names, for a path.
    pub fn programs(&self) -> &Path {
        self.directory.path()
    }

    /// What the daemon has written to standard error.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn log_file(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    /// A command of one of the personalities, typed in the namespace: `bpfvs`, `ipvsadm`, `ipvsadm-save`, `ipvsadm-restore`.
    pub fn command(&self, personality: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.namespace.display())).arg("--").arg(self.directory.path().join(personality));
        command.env("BPFVS_SOCKET", self.socket()).stdin(Stdio::null());
        command
    }

    /// Runs a native command that must succeed, and returns what it printed.
    pub fn succeed(&self, arguments: &[&str]) -> Result<String> {
        printed("bpfvs", arguments, &self.command("bpfvs").args(arguments).output()?)
    }

    /// Runs a native command, whatever comes of it.
    pub fn output(&self, arguments: &[&str]) -> Result<Output> {
        self.command("bpfvs").args(arguments).output().context("start bpfvs")
    }

    /// Types one line of `ipvsadm` that must succeed, and returns what it printed. Words are separated by spaces.
    pub fn ipvsadm(&self, line: &str) -> Result<String> {
        let arguments: Vec<_> = line.split_whitespace().collect();
        printed("ipvsadm", &arguments, &self.command("ipvsadm").args(&arguments).output()?)
    }

    /// Feeds `ipvsadm -R` with lines, as from a file.
    pub fn restore(&self, lines: &str) -> Result<()> {
        let mut rules = tempfile::tempfile().context("make a file of rules")?;
        rules.write_all(lines.as_bytes())?;
        rules.rewind()?;
        printed("ipvsadm", &["-R"], &self.command("ipvsadm").arg("-R").stdin(rules).output()?).map(|_| ())
    }

    /// Asks the API.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.request("GET", path, None)
    }

    /// Tells the API.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.request("POST", path, Some(body))
    }

    fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let (status, answer) = http(&self.socket(), method, path, body)?;
        ensure!((200..300).contains(&status), "{method} {path}: status {status}: {answer}");
        if answer.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&answer).with_context(|| format!("{method} {path} answered with no JSON: {answer}"))
    }

    /// Waits until every real server can be reached, so that the first packets need nobody's help.
    pub fn wait_for_servers(&self) -> Result<()> {
        let mut last = Value::Null;
        wait::until("every real server to be ready", wait::SOON, || {
            last = self.get("/v1/services").unwrap_or_default();
            let mut servers = last.as_array().into_iter().flatten().filter_map(|service| service["servers"].as_array()).flatten();
            servers.all(|server| server["reachability"] == "ready")
        })
        .with_context(|| format!("the services are {last:#}"))
    }

    /// How many packets left for a reason, by its short name.
    pub fn reason(&self, name: &str) -> Result<u64> {
        let reasons = self.get("/v1/reasons")?;
        let found = reasons.as_array().into_iter().flatten().find(|reason| reason["name"] == name);
        found.and_then(|reason| reason["packets"].as_u64()).with_context(|| format!("no reason {name} in {reasons}"))
    }
}

impl Drop for Bpfvs {
    fn drop(&mut self) {
        if !self.pins.exists() {
            return;
        }
        // A killed daemon leaves its programs, as it should; a new one takes them away.
        if self.process.is_none()
            && let Err(error) = self.serve()
        {
            eprintln!("cannot start bpfvs again to take its pins away: {error:#}");
        }
        if let Err(error) = self.stop_and_detach() {
            eprintln!("the pins in {} stay behind: {error:#}", self.pins.display());
        }
        if thread::panicking() {
            eprintln!("bpfvs serve said:\n{}", self.log());
        }
    }
}

fn printed(program: &str, arguments: &[&str], output: &Output) -> Result<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {}: {}{text}", arguments.join(" "), output.status, complaint.trim());
    Ok(text)
}

/// One request over a Unix socket, and the status and body of the answer.
///
/// HTTP/1.0, in which a body is sent in one piece and ends with the connection.
pub fn http(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, String)> {
    let mut stream = UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let body = body.map(Value::to_string).unwrap_or_default();
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: bpfvs\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).with_context(|| format!("read the answer to {method} {path}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no HTTP answer to {method} {path}: {answer}"))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.with_context(|| format!("no HTTP status in {head}"))?, body.to_owned()))
}
