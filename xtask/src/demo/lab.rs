//! The hosts of the demo: network namespaces, the wires between them, and what runs on them.
//!
//! Everything has the prefix `bpfvs-demo-`, and everything else is in `/run/bpfvs-demo`, so that [`clear`] takes away what
//! this run made, or an earlier one that was killed: processes, namespaces (and with them their interfaces), pins, sockets.
//! One lab at a time: a lock says so.

use std::{
    fs::{self, File, TryLockError},
    os::unix::{
        fs::{MetadataExt as _, symlink},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use super::{
    interrupt, process,
    screen::{heading, prompt, said},
};
use crate::command::{output, path, quietly, shown};

/// The real servers.
pub(super) const SERVERS: [Host; 3] = [Host::Server1, Host::Server2, Host::Server3];

const PREFIX: &str = "bpfvs-demo-";
const DIRECTORY: &str = "/run/bpfvs-demo";
const LOCK: &str = "/run/bpfvs-demo.lock";
const NAMESPACES: &str = "/run/netns";
const PINS: &str = "/sys/fs/bpf/bpfvs";
const SOCKETS: &str = "/run/bpfvs";

/// The hosts on the switch.
const INSIDE: [Host; 5] = [Host::Router, Host::Director, Host::Server1, Host::Server2, Host::Server3];

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
    pub(super) fn address(self, family: Family) -> String {
        let (network, host) = match self {
            Self::Client => (family.outside(), "12"),
            Self::Director => (family.inside(), "204"),
            Self::Router => (family.inside(), "207"),
            Self::Server1 => (family.inside(), "205"),
            Self::Server2 => (family.inside(), "206"),
            Self::Server3 => (family.inside(), "208"),
            // It has none.
            Self::Switch => ("", ""),
        };
        format!("{network}{host}")
    }

    fn namespace(self) -> String {
        format!("{PREFIX}{}", self.name())
    }
}

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    /// Those that this machine has.
    pub(super) fn all() -> &'static [Self] {
        if Path::new("/proc/net/if_inet6").exists() { &[Self::V4, Self::V6] } else { &[Self::V4] }
    }

    /// The address that the client asks.
    pub(super) fn vip(self) -> String {
        format!("{}200", self.inside())
    }

    /// An address and a port, as ipvsadm and URLs have it.
    pub(super) fn port_80(self, address: &str) -> String {
        match self {
            Self::V4 => format!("{address}:80"),
            Self::V6 => format!("[{address}]:80"),
        }
    }

    /// What the client asks for.
    pub(super) fn url(self) -> String {
        match self {
            Self::V4 => format!("http://{}/", self.vip()),
            Self::V6 => format!("http://[{}]/", self.vip()),
        }
    }

    /// The beginning of the addresses behind the router.
    fn inside(self) -> &'static str {
        match self {
            Self::V4 => "10.0.0.",
            Self::V6 => "2001:db8:10::",
        }
    }

    /// The beginning of the addresses where the client is.
    fn outside(self) -> &'static str {
        match self {
            Self::V4 => "192.168.74.",
            Self::V6 => "2001:db8:74::",
        }
    }

    /// How many bits of an address name its network, and how many there are.
    fn bits(self) -> (u32, u32) {
        match self {
            Self::V4 => (24, 32),
            Self::V6 => (64, 128),
        }
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
        // A group of its own: a second Ctrl-C does not keep it from cleaning up.
        quietly(Command::new("ip").args(["netns", "delete", name]).env("PATH", path()).process_group(0))?;
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
    pub(super) fn build(program: &Path, verbose: bool) -> Result<Self> {
        // From here on, whatever fails, it is cleared.
        let lab = Self { keep: false };
        fs::create_dir_all(programs()).with_context(|| format!("{DIRECTORY} cannot be made; is /run writable?"))?;
        for name in ["bpfvs", "ipvsadm"] {
            symlink(program, programs().join(name)).with_context(|| format!("{DIRECTORY} cannot be filled"))?;
        }
        heading(
            "Seven network namespaces become a small data centre",
            &[
                "client 192.168.74.12 --- router --- switch -+- director 10.0.0.204, which has the VIP 10.0.0.200",
                "                                            +- server1  10.0.0.205",
                "                                            +- server2  10.0.0.206",
                "                                            +- server3  10.0.0.208",
            ],
        );
        wire(verbose)?;
        for server in SERVERS {
            serve_web(server)?;
        }
        heading(
            "The director's daemon",
            &["It attaches the eBPF programs to the director's interface, and hears what ipvsadm says."],
        );
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

/// Runs a line of shell on a host, and shows it and what it prints.
pub(super) fn type_at(host: Host, line: &str) -> Result<()> {
    prompt(host, line);
    said(&run(at(host, "sh").args(["-c", line]))?);
    Ok(())
}

/// The same without its output, which somebody has just seen from another host.
pub(super) fn type_again_at(host: Host, line: &str) -> Result<()> {
    prompt(host, line);
    run(at(host, "sh").args(["-c", line]))?;
    Ok(())
}

/// Sends one request; returns which real server answered.
pub(super) fn request(family: Family) -> Result<Option<usize>> {
    go_on()?;
    let mut command = at(Host::Client, &format!("curl --globoff --silent --max-time 3 {}", family.url()));
    let name = output(command.stderr(Stdio::null())).unwrap_or_default();
    Ok(SERVERS.iter().position(|server| server.name() == name))
}

/// Makes the hosts and joins them. Shows how, if asked to: it is the same that everybody does to join namespaces.
fn wire(verbose: bool) -> Result<()> {
    let ip = |line: &str| {
        if verbose {
            println!("$ ip {line}");
        }
        run(&mut words(&format!("ip {line}"))).map(drop)
    };
    let sysctl = |host: Host, setting: &str| {
        if verbose {
            prompt(host, &format!("sysctl -qw {setting}"));
        }
        run(&mut at(host, &format!("sysctl -qw {setting}"))).map(drop)
    };
    for host in Host::ALL {
        ip(&format!("netns add {}", host.namespace()))?;
        ip(&format!("-n {} link set lo up", host.namespace()))?;
        if Family::all().contains(&Family::V6) {
            // Nobody else has these addresses: they need not be asked for a second each.
            sysctl(host, "net.ipv6.conf.default.dad_transmits=0")?;
        }
    }
    let (switch, client, router) = (Host::Switch.namespace(), Host::Client.namespace(), Host::Router.namespace());
    ip(&format!("-n {switch} link add br0 type bridge"))?;
    ip(&format!("-n {switch} link set br0 up"))?;
    for host in INSIDE {
        let (name, namespace) = (host.name(), host.namespace());
        ip(&format!("-n {switch} link add {name} type veth peer name eth0 netns {namespace}"))?;
        ip(&format!("-n {switch} link set {name} master br0 up"))?;
        ip(&format!("-n {namespace} link set eth0 up"))?;
    }
    ip(&format!("-n {client} link add eth0 type veth peer name eth1 netns {router}"))?;
    ip(&format!("-n {client} link set eth0 up"))?;
    ip(&format!("-n {router} link set eth1 up"))?;
    for family in Family::all() {
        let (outside, inside) = (format!("{}207", family.outside()), Host::Router.address(*family));
        let (network, whole) = family.bits();
        let add = |host: Host, address: &str, bits: u32, interface: &str| {
            ip(&format!("-n {} address add {address}/{bits} dev {interface}", host.namespace()))
        };
        let route = |host: Host, router: &str| ip(&format!("-n {} route add default via {router}", host.namespace()));
        for host in INSIDE {
            add(host, &host.address(*family), network, "eth0")?;
        }
        add(Host::Client, &Host::Client.address(*family), network, "eth0")?;
        add(Host::Router, &outside, network, "eth1")?;
        add(Host::Director, &family.vip(), whole, "eth0")?;
        route(Host::Client, &outside)?;
        for host in SERVERS.into_iter().chain([Host::Director]) {
            route(host, &inside)?;
        }
        sysctl(
            Host::Router,
            match family {
                Family::V4 => "net.ipv4.ip_forward=1",
                Family::V6 => "net.ipv6.conf.all.forwarding=1",
            },
        )?;
    }
    Ok(())
}

fn serve_web(server: Host) -> Result<()> {
    let directory = Path::new(DIRECTORY).join(server.name());
    let place = directory.display();
    let name = server.name();
    let identity = directory.join("nginx.pid");
    let configuration = directory.join("nginx.conf");
    let listen_v6 = if Family::all().contains(&Family::V6) { "        listen [::]:80;\n" } else { "" };
    fs::create_dir_all(&directory).with_context(|| format!("{place} cannot be made; is /run writable?"))?;
    let text = format!(
        "daemon off;\nworker_processes 1;\npid {};\nerror_log stderr;\nevents {{}}\nhttp {{\n    \
         access_log off;\n    client_body_temp_path {place}/body;\n    proxy_temp_path {place}/proxy;\n    \
         fastcgi_temp_path {place}/fastcgi;\n    uwsgi_temp_path {place}/uwsgi;\n    scgi_temp_path {place}/scgi;\n    \
         server {{\n        listen 80;\n{listen_v6}        default_type text/plain;\n        return 200 \"{name}\\n\";\n    }}\n}}\n",
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
    prompt(Host::Director, &format!("{line} &"));
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

/// Runs a command, and returns what it printed.
fn run(command: &mut Command) -> Result<String> {
    go_on()?;
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("`{}` cannot be run; is it installed?", shown(command)))?;
    // Ctrl-C on the terminal reaches every program, and is the reason if one fails now.
    go_on()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("`{}` failed ({}); it said:\n{}", shown(command), output.status, said.trim());
    }
    Ok(said)
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
