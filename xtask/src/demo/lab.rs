//! The hosts of the demo: network namespaces, the wires between them, and what runs on them.
//!
//! Everything has the prefix `bpfvs-demo-`, and everything else is in `/run/bpfvs-demo`, so that [`clear`] takes away what
//! this run made, or an earlier one that was killed: processes, namespaces (and with them their interfaces), pins, sockets.
//! One lab at a time: a lock says so.

use std::{
    fs::{self, File, TryLockError},
    os::unix::fs::{MetadataExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use super::{interrupt, process};
use crate::command::{announce, output, path, quietly};

/// The address that the client asks.
pub(super) const VIP: &str = "10.0.0.200";

/// The real servers.
pub(super) const SERVERS: [Host; 3] = [Host::Server1, Host::Server2, Host::Server3];

const PREFIX: &str = "bpfvs-demo-";
const DIRECTORY: &str = "/run/bpfvs-demo";
const LOCK: &str = "/run/bpfvs-demo.lock";
const NAMESPACES: &str = "/run/netns";
const PINS: &str = "/sys/fs/bpf/bpfvs";
const SOCKETS: &str = "/run/bpfvs";

/// A host of the demo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Host {
    Client,
    Director,
    Router,
    Server1,
    Server2,
    Server3,
    /// No host that anybody would log in to: it holds the bridge that joins the others.
    Switch,
}

impl Host {
    const ALL: [Self; 7] = [Self::Switch, Self::Router, Self::Client, Self::Director, Self::Server1, Self::Server2, Self::Server3];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Director => "director",
            Self::Router => "router",
            Self::Server1 => "server1",
            Self::Server2 => "server2",
            Self::Server3 => "server3",
            Self::Switch => "switch",
        }
    }

    /// Its own address.
    pub(super) fn address(self) -> &'static str {
        match self {
            Self::Client => "192.168.74.12",
            Self::Director => "10.0.0.204",
            Self::Router => "10.0.0.207",
            Self::Server1 => "10.0.0.205",
            Self::Server2 => "10.0.0.206",
            Self::Server3 => "10.0.0.208",
            Self::Switch => "",
        }
    }

    fn namespace(self) -> String {
        format!("{PREFIX}{}", self.name())
    }
}

/// The standing lab. It is cleared when it is dropped, unless it is kept.
pub(super) struct Lab {
    keep: bool,
}

/// Only one lab at a time: the lock lives as long as what is returned.
pub(super) fn lock() -> Result<File> {
    let file = File::options().create(true).truncate(false).write(true).open(LOCK);
    let file = file.with_context(|| format!("{LOCK} cannot be opened; is /run writable?"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!("another demo is running on this machine: end it first, or wait for it"),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("{LOCK} cannot be locked")),
    }
}

/// Takes everything away that belongs to a lab, standing or in ruins.
pub(super) fn clear() -> Result<()> {
    let names: Vec<String> = entries(NAMESPACES).into_iter().filter(|name| name.starts_with(PREFIX)).collect();
    // The inode of a namespace is in the names of pins and sockets, and is known only while the namespace is there.
    let instances: Vec<String> = names
        .iter()
        .filter_map(|name| fs::metadata(Path::new(NAMESPACES).join(name)).ok())
        .map(|metadata| format!("netns-{}", metadata.ino()))
        .collect();
    process::end_all(&record());
    for name in &names {
        quietly(Command::new("ip").args(["netns", "delete", name]).env("PATH", path()))?;
    }
    for instance in &instances {
        remove(&Path::new(PINS).join(instance))?;
        for name in entries(SOCKETS).into_iter().filter(|name| name.split('.').next().is_some_and(|name| name.ends_with(instance)))
        {
            remove(&Path::new(SOCKETS).join(name))?;
        }
    }
    remove(Path::new(DIRECTORY))
}

impl Lab {
    /// Builds the hosts and starts the web servers and the daemon.
    pub(super) fn build(program: &Path) -> Result<Self> {
        // From here on, whatever fails, it is cleared.
        let lab = Self { keep: false };
        fs::create_dir_all(programs()).with_context(|| format!("{DIRECTORY} cannot be made; is /run writable?"))?;
        for name in ["bpfvs", "ipvsadm"] {
            symlink(program, programs().join(name)).with_context(|| format!("{DIRECTORY} cannot be filled"))?;
        }
        heading("Seven network namespaces: a client, a router, a director, three real servers and a switch");
        wire()?;
        heading("On each real server, nginx answers with the server's name");
        for server in SERVERS {
            serve_web(server)?;
        }
        heading("On the director, the daemon");
        serve()?;
        Ok(lab)
    }

    /// Leaves everything standing.
    pub(super) fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = clear() {
            eprintln!("xtask: something of the demo is left: {error:#}; `cargo xtask demo --clean` tries again");
        }
    }
}

/// Runs a line on a host, and shows it and what it prints.
pub(super) fn type_at(host: Host, line: &str) -> Result<()> {
    prompt(host, line);
    runs(&mut at(host, line))
}

/// Sends one request; returns which real server answered.
pub(super) fn request() -> Result<Option<usize>> {
    go_on()?;
    let mut command = at(Host::Client, &format!("curl --silent --max-time 3 http://{VIP}/"));
    let name = output(command.stderr(Stdio::null())).unwrap_or_default();
    Ok(SERVERS.iter().position(|server| server.name() == name))
}

fn wire() -> Result<()> {
    for host in Host::ALL {
        ip(&format!("ip netns add {}", host.namespace()))?;
        ip(&format!("ip -n {} link set lo up", host.namespace()))?;
    }
    let switch = Host::Switch.namespace();
    ip(&format!("ip -n {switch} link add br0 type bridge"))?;
    ip(&format!("ip -n {switch} link set br0 up"))?;
    for host in Host::ALL.into_iter().filter(|host| !matches!(host, Host::Switch | Host::Client)) {
        let (name, namespace) = (host.name(), host.namespace());
        ip(&format!("ip -n {switch} link add {name} type veth peer name eth0 netns {namespace}"))?;
        ip(&format!("ip -n {switch} link set {name} master br0 up"))?;
        ip(&format!("ip -n {namespace} link set eth0 up"))?;
        ip(&format!("ip -n {namespace} address add {}/24 dev eth0", host.address()))?;
    }
    let (client, router) = (Host::Client.namespace(), Host::Router.namespace());
    ip(&format!("ip -n {client} link add eth0 type veth peer name eth1 netns {router}"))?;
    ip(&format!("ip -n {client} link set eth0 up"))?;
    ip(&format!("ip -n {router} link set eth1 up"))?;
    type_at(Host::Client, &format!("ip address add {}/24 dev eth0", Host::Client.address()))?;
    type_at(Host::Client, "ip route add default via 192.168.74.207")?;
    type_at(Host::Router, "ip address add 192.168.74.207/24 dev eth1")?;
    type_at(Host::Router, "sysctl -w net.ipv4.ip_forward=1")?;
    for host in SERVERS.into_iter().chain([Host::Director]) {
        type_at(host, &format!("ip route add default via {}", Host::Router.address()))?;
    }
    type_at(Host::Director, &format!("ip address add {VIP}/32 dev eth0"))
}

fn serve_web(server: Host) -> Result<()> {
    let directory = Path::new(DIRECTORY).join(server.name());
    let place = directory.display();
    let name = server.name();
    let identity = directory.join("nginx.pid");
    let configuration = directory.join("nginx.conf");
    fs::create_dir_all(&directory).with_context(|| format!("{place} cannot be made; is /run writable?"))?;
    let text = format!(
        "daemon off;\nworker_processes 1;\npid {};\nerror_log stderr;\nevents {{}}\nhttp {{\n    \
         access_log off;\n    client_body_temp_path {place}/body;\n    proxy_temp_path {place}/proxy;\n    \
         fastcgi_temp_path {place}/fastcgi;\n    uwsgi_temp_path {place}/uwsgi;\n    scgi_temp_path {place}/scgi;\n    \
         server {{\n        listen 80;\n        default_type text/plain;\n        return 200 \"{name}\\n\";\n    }}\n}}\n",
        identity.display()
    );
    fs::write(&configuration, text).with_context(|| format!("{} cannot be written", configuration.display()))?;
    // Errors before the configuration is read go where -e says, not to the machine's own log.
    let line = format!("nginx -e stderr -c {}", configuration.display());
    background(server, &line, || fs::read_to_string(&identity).is_ok_and(|text| !text.trim().is_empty()))
}

fn serve() -> Result<()> {
    go_on()?;
    // The daemon enters the namespace by itself: `ip netns exec` would hide /sys/fs/bpf from it.
    let state = format!("{DIRECTORY}/state.json");
    let line = format!("bpfvs serve --netns {} --state {state}", Host::Director.namespace());
    let mut command = words(&line);
    announce(&command);
    let log = Path::new(DIRECTORY).join("director.log");
    let ready = || fs::read_to_string(&log).is_ok_and(|text| text.lines().any(|line| line == "ready"));
    process::start(&mut command, &log, &record(), ready)
}

fn background(host: Host, line: &str, ready: impl Fn() -> bool) -> Result<()> {
    go_on()?;
    prompt(host, &format!("{line} &"));
    let log = Path::new(DIRECTORY).join(format!("{}.log", host.name()));
    process::start(&mut at(host, line), &log, &record(), ready)
}

/// Runs a line of `ip`, and shows it.
fn ip(line: &str) -> Result<()> {
    let mut command = words(line);
    announce(&command);
    runs(&mut command)
}

fn runs(command: &mut Command) -> Result<()> {
    go_on()?;
    quietly(command.stdin(Stdio::null()))
}

/// Fails if somebody wants the demo to end.
fn go_on() -> Result<()> {
    if interrupt::happened() {
        bail!("interrupted");
    }
    Ok(())
}

/// The directory that has bpfvs under its names.
pub(super) fn programs() -> PathBuf {
    Path::new(DIRECTORY).join("bin")
}

/// Prints what happens next.
pub(super) fn heading(text: &str) {
    println!("\n== {text}");
}

/// Prints a line as it is typed on a host.
pub(super) fn prompt(host: Host, line: &str) {
    println!("{}# {line}", host.name());
}

/// What to type on this machine to run a line on a host.
pub(super) fn typed_for(host: Host, line: &str) -> String {
    format!("nsenter --net={NAMESPACES}/{} {line}", host.namespace())
}

fn at(host: Host, line: &str) -> Command {
    words(&typed_for(host, line))
}

/// A command from a line without quotes, with the programs of the demo first on its path.
fn words(line: &str) -> Command {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or_default());
    let mut path_of_demo = programs().into_os_string();
    path_of_demo.push(":");
    path_of_demo.push(path());
    command.args(words).env("PATH", path_of_demo);
    command
}

/// The file in which the lab's processes are written down.
fn record() -> PathBuf {
    Path::new(DIRECTORY).join("processes")
}

/// The names in a directory; none if there is no such directory.
fn entries(directory: &str) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().map_while(Result::ok);
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Removes a file or a directory, if it is there.
fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed", path.display()))
        }
        _ => Ok(()),
    }
}
