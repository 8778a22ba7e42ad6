//! `cargo xtask demo`: real HTTP requests, balanced before your eyes.
//!
//! A small data centre of network namespaces is built (`lab`), the layout that every LVS how-to begins with:
//!
//! ```text
//! client 192.168.74.12 --- 192.168.74.207 router 10.0.0.207 ---+--- director 10.0.0.204, VIP 10.0.0.200
//!                                                              +--- server1 10.0.0.205
//!                                                              +--- server2 10.0.0.206
//!                                                              +--- server3 10.0.0.208
//! ```
//!
//! Then what an administrator would type is typed, and shown with the name of the host as the prompt. The client sends
//! requests, and who answered them is counted and compared with what the scheduler promises (`promise`): first `rr`, then
//! `wrr` with the weights 2:1:1; first by direct routing, then through tunnels.
//!
//! With `--once`, and wherever no terminal is looking on, it ends by itself, with success only if every promise was
//! kept. On a terminal the table lives on until Enter. Only namespaces are touched, never the machine's own network.

mod interrupt;
mod lab;
mod process;
mod promise;
mod table;

use std::{
    env,
    ffi::OsString,
    io::{self, IsTerminal as _},
    path::PathBuf,
    process::{Command, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use self::{
    lab::{Host, Lab, SERVERS, VIP},
    promise::Promise,
    table::Table,
};
use crate::{
    build::{self, Profile},
    command::{as_root, quietly, say, target_directory},
    setup::{self, Purpose},
};

/// How the demo goes on and ends.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// Runs through and ends; fails if a scheduler's promise is not kept. So it is without a terminal, too
    #[arg(long)]
    once: bool,
    /// Leaves everything standing and prints how to look around
    #[arg(long, conflicts_with = "clean")]
    keep: bool,
    /// Takes away what an earlier run left, and does nothing else
    #[arg(long)]
    clean: bool,
    /// Shows only this forwarding method
    #[arg(long, value_enum, value_name = "METHOD")]
    method: Option<Method>,
    /// Shows the program that was built last
    #[arg(long)]
    no_build: bool,
}

/// A forwarding method.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    /// Direct routing (DR)
    Route,
    /// Tunnels (TUN)
    Tunnel,
}

impl Method {
    fn name(self) -> &'static str {
        match self {
            Self::Route => "route",
            Self::Tunnel => "tunnel",
        }
    }

    /// What ipvsadm calls it.
    fn option(self) -> &'static str {
        match self {
            Self::Route => "-g",
            Self::Tunnel => "-i",
        }
    }
}

/// The demo as one command, for the tests: it runs through with the program that was built.
pub(crate) fn once() -> Result<Command> {
    let mut command = as_root(own_program()?)?;
    command.args(["demo", "--once", "--no-build"]);
    Ok(command)
}

/// Builds as the user, and shows as root.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if !options.clean {
        setup::programs(Purpose::Demo)?;
        if !options.no_build {
            build::bpfvs(Profile::Debug)?;
        }
    }
    if !nix::unistd::geteuid().is_root() {
        // Not `once`: the options have to be handed on as they are.
        let mut command = as_root(own_program()?)?;
        command.args(env::args_os().skip(1)).args((!options.no_build && !options.clean).then(|| OsString::from("--no-build")));
        quietly(&mut command)?;
        return Ok(ExitCode::SUCCESS);
    }
    interrupt::catch()?;
    let _alone = lab::lock()?;
    lab::clear()?;
    if options.clean {
        say("Nothing of the demo is left.");
        return Ok(ExitCode::SUCCESS);
    }
    let program = target_directory().join("debug/bpfvs");
    if !program.is_file() {
        bail!("there is no {}: leave out --no-build", program.display());
    }
    let lab = Lab::build(&program)?;
    let shown = show(options);
    if interrupt::happened() {
        say("\nInterrupted: cleaning up.");
        return Ok(ExitCode::from(130));
    }
    if options.keep {
        lab.keep();
        look_around();
    }
    let broken = shown?;
    if broken > 0 {
        bail!("{broken} of the schedulers' promises were not kept: see the lines with NOT above");
    }
    say("Every request was answered by the real server that the scheduler had promised.");
    Ok(ExitCode::SUCCESS)
}

fn own_program() -> Result<PathBuf> {
    env::current_exe().context("this program cannot find itself: was it deleted while it ran?")
}

/// Shows everything, and returns how many promises were broken.
fn show(options: &Options) -> Result<usize> {
    let methods = options.method.map_or_else(|| vec![Method::Route, Method::Tunnel], |method| vec![method]);
    let mut broken = 0;
    for (index, method) in methods.iter().enumerate() {
        if index > 0 {
            lab::heading("The same service goes; the real servers are taken back");
            lab::type_at(Host::Director, "ipvsadm -C")?;
            for server in SERVERS {
                lab::type_at(server, "bpfvs realserver teardown")?;
            }
        }
        broken += show_method(*method)?;
    }
    let forever = !options.once && !options.keep && io::stdin().is_terminal() && io::stdout().is_terminal();
    if forever {
        lab::heading("The requests go on: press Enter to end");
        broken += usize::from(!go_on()?);
    }
    Ok(broken)
}

fn show_method(method: Method) -> Result<usize> {
    let service = format!("{VIP}:80");
    lab::heading(match method {
        Method::Route => "Direct routing: the real servers hold the VIP in silence, and answer to the client themselves",
        Method::Tunnel => "Tunnels: the director wraps each packet; the real servers unwrap it, and answer themselves",
    });
    let decapsulation = if method == Method::Tunnel { " --decap bpf" } else { "" };
    for server in SERVERS {
        let place = format!("--vip {VIP} --interface eth0 --method {}{decapsulation}", method.name());
        lab::type_at(server, &format!("bpfvs realserver setup {place}"))?;
    }
    lab::type_at(Host::Director, &format!("ipvsadm -A -t {service} -s rr"))?;
    for server in SERVERS {
        lab::type_at(Host::Director, &format!("ipvsadm -a -t {service} -r {}:80 {}", server.address(), method.option()))?;
    }
    lab::type_at(Host::Director, "ipvsadm -Ln")?;
    let mut broken = usize::from(!ask(&Promise::new("rr", [1, 1, 1]), 12)?);

    lab::heading("The first real server gets twice the weight");
    lab::type_at(Host::Director, &format!("ipvsadm -E -t {service} -s wrr"))?;
    let first = SERVERS[0].address();
    lab::type_at(Host::Director, &format!("ipvsadm -e -t {service} -r {first}:80 {} -w 2", method.option()))?;
    broken += usize::from(!ask(&weighted(), 16)?);

    lab::heading("What the director knows about it");
    lab::type_at(Host::Director, "ipvsadm -Lnc")?;
    lab::type_at(Host::Director, "ipvsadm -Ln --stats")?;
    Ok(broken)
}

/// What stands at the end of each method.
fn weighted() -> Promise {
    Promise::new("wrr", [2, 1, 1])
}

/// Sends requests, shows who answers, and says whether the promise was kept.
fn ask(promise: &Promise, requests: usize) -> Result<bool> {
    lab::prompt(Host::Client, &format!("curl http://{VIP}/    ({requests} times)"));
    let mut table = Table::new(promise);
    for _ in 0..requests {
        table.add(lab::request()?);
    }
    Ok(table.verdict())
}

/// Sends requests until somebody presses Enter.
fn go_on() -> Result<bool> {
    let enter = Arc::new(AtomicBool::new(false));
    let pressed = Arc::clone(&enter);
    thread::spawn(move || {
        // An end of the input, or an error, ends the demo as well.
        let _ = io::stdin().read_line(&mut String::new());
        pressed.store(true, Ordering::Relaxed);
    });
    let promise = weighted();
    let mut table = Table::new(&promise);
    while !enter.load(Ordering::Relaxed) || !table.is_whole() {
        table.add(lab::request()?);
        thread::sleep(Duration::from_millis(50));
    }
    Ok(table.verdict())
}

fn look_around() {
    let inside = lab::typed_for(Host::Director, "ipvsadm -Ln --stats");
    let client = lab::typed_for(Host::Client, &format!("curl http://{VIP}/"));
    let path = lab::programs().display().to_string();
    say(&format!(
        "Everything is left standing. To look around, as root:\n  \
         export PATH={path}:$PATH\n  \
         {inside}\n  \
         {client}\n  \
         ip netns list\n\
         To take it away: cargo xtask demo --clean"
    ));
}
