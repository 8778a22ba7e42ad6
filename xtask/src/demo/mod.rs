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
//! Then what an administrator would type is typed, and shown with the name of the host as the prompt (`screen`). The client
//! sends requests, and who answered them (`table`) is compared with what the scheduler promises (`promise`): first `rr`,
//! then `wrr` with the weights 2:1:1, then the same over IPv6; first by direct routing, then through tunnels.
//!
//! With `--once`, and wherever no terminal is looking on, it ends by itself, with success only if every promise was
//! kept. On a terminal the table lives on until Enter. Only namespaces are touched, never the machine's own network.

mod interrupt;
mod lab;
mod process;
mod promise;
mod screen;
mod table;

use std::{
    env,
    ffi::OsString,
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
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
    lab::{Family, Host, Lab, SERVERS},
    promise::Promise,
    screen::{Look, explain, heading, is_live, paint},
    table::Table,
};
use crate::{
    build::{self, Profile},
    command::{as_root, say, shown, target_directory},
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
    /// Shows the commands that make the network, too
    #[arg(long)]
    verbose: bool,
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

/// Each real server in turn.
const EQUAL: Promise = Promise { scheduler: "rr", weights: [1, 1, 1] };

/// What stands at the end of each method.
const WEIGHTED: Promise = Promise { scheduler: "wrr", weights: [2, 1, 1] };

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
        // Ctrl-C reaches both, and the one that is root has to clean up before this one goes.
        interrupt::catch()?;
        let status = command.status().with_context(|| format!("`{}` cannot be run; is it installed?", shown(&command)))?;
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        return Ok(code.map_or(ExitCode::FAILURE, ExitCode::from));
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
    let outcome = demonstrate(&program, options);
    if interrupt::happened() {
        say("\nInterrupted, and cleaned up.");
        return Ok(ExitCode::from(130));
    }
    outcome.map(|()| ExitCode::SUCCESS)
}

/// Builds the lab and shows everything in it. Fails if a promise was broken.
fn demonstrate(program: &Path, options: &Options) -> Result<()> {
    let lab = Lab::build(program, options.verbose)?;
    let broken = show(options);
    if let Ok(0) = broken {
        println!("\n{} every request was answered by the real server whose turn it was.", paint(Look::Good, "Done:"));
    }
    // What went wrong is worth a look, too.
    if options.keep && !interrupt::happened() {
        lab.keep();
        look_around();
    }
    match broken? {
        0 => Ok(()),
        broken => bail!("{broken} of the schedulers' promises were not kept: see the lines with WRONG above"),
    }
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
            heading(
                "The services go, and the real servers are as they were before",
                &["Connections are kept until their time is over, and will be counted again."],
            );
            lab::type_at(Host::Director, "ipvsadm -C")?;
            for server in SERVERS {
                lab::type_again_at(server, "bpfvs realserver teardown")?;
            }
        }
        broken += show_method(*method)?;
    }
    if !options.once && !options.keep && io::stdin().is_terminal() && is_live() {
        heading("The requests go on: press Enter to end", &[]);
        broken += usize::from(!go_on()?);
    }
    Ok(broken)
}

fn show_method(method: Method) -> Result<usize> {
    match method {
        Method::Route => heading(
            "Direct routing (DR)",
            &[
                "The director sends each packet on as it is, in a new Ethernet frame. The real",
                "servers have the VIP too, but keep quiet about it. They answer the client",
                "themselves: no answer passes the director.",
            ],
        ),
        Method::Tunnel => heading(
            "Tunnels (TUN)",
            &[
                "The director wraps each packet into another one, so that a real server may be",
                "anywhere. A program of bpfvs unwraps it there, and the real server answers the",
                "client itself.",
            ],
        ),
    }
    let vips: Vec<_> = Family::all().iter().map(|family| format!("--vip {}", family.vip())).collect();
    let decapsulation = if method == Method::Tunnel { " --decap bpf" } else { "" };
    let set_up = format!("bpfvs realserver setup {} --method {}{decapsulation}", vips.join(" "), method.name());
    lab::type_at(SERVERS[0], &set_up)?;
    for server in &SERVERS[1..] {
        lab::type_again_at(*server, &set_up)?;
    }

    heading(
        "A virtual service with three real servers, in turn (rr)",
        &["As in IPVS, the real server that was added last comes first."],
    );
    add_service(method, Family::V4, &EQUAL)?;
    lab::type_at(Host::Director, "ipvsadm -Ln")?;
    let mut broken = usize::from(!ask(&EQUAL, Family::V4, 12)?);

    heading("The first real server gets twice the weight (wrr)", &[]);
    let service = Family::V4.port_80(&Family::V4.vip());
    let first = Family::V4.port_80(&SERVERS[0].address(Family::V4));
    lab::type_at(Host::Director, &format!("ipvsadm -E -t {service} -s wrr"))?;
    lab::type_at(Host::Director, &format!("ipvsadm -e -t {service} -r {first} {} -w 2", method.option()))?;
    broken += usize::from(!ask(&WEIGHTED, Family::V4, 16)?);

    if Family::all().contains(&Family::V6) {
        heading("The same over IPv6", &[]);
        add_service(method, Family::V6, &WEIGHTED)?;
        broken += usize::from(!ask(&WEIGHTED, Family::V6, 8)?);
    } else {
        heading("This kernel has no IPv6: that part is left out", &[]);
    }

    heading(
        "What the director knows",
        &[
            "The connections; the counters (OutPkts is 0: no answer came this way); and why",
            "other packets were not forwarded (not-ip is ARP).",
        ],
    );
    lab::type_at(Host::Director, "ipvsadm -Lnc | head -n 8")?;
    lab::type_at(Host::Director, "ipvsadm -Ln --stats")?;
    lab::type_at(Host::Director, "bpfvs stats --reasons | grep -vw 0")?;
    Ok(broken)
}

/// Types what makes a service with all real servers.
fn add_service(method: Method, family: Family, promise: &Promise) -> Result<()> {
    let service = family.port_80(&family.vip());
    lab::type_at(Host::Director, &format!("ipvsadm -A -t {service} -s {}", promise.scheduler))?;
    for (server, weight) in SERVERS.iter().zip(promise.weights) {
        let server = family.port_80(&server.address(family));
        let weight = if weight == 1 { String::new() } else { format!(" -w {weight}") };
        lab::type_at(Host::Director, &format!("ipvsadm -a -t {service} -r {server} {}{weight}", method.option()))?;
    }
    Ok(())
}

/// Sends requests, shows who answers, and says whether the promise was kept.
fn ask(promise: &Promise, family: Family, requests: usize) -> Result<bool> {
    println!();
    screen::prompt(Host::Client, &format!("for request in $(seq {requests}); do curl {}; done", family.url()));
    let mut table = Table::new(promise, family);
    for _ in 0..requests {
        table.add(lab::request(family)?);
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
    let mut table = Table::new(&WEIGHTED, Family::V4);
    while !enter.load(Ordering::Relaxed) || !table.is_whole() {
        table.add(lab::request(Family::V4)?);
        thread::sleep(Duration::from_millis(50));
    }
    Ok(table.verdict())
}

fn look_around() {
    let path = lab::programs().display().to_string();
    let url = Family::V4.url();
    heading("Everything is left standing", &["To look around, as root:"]);
    explain(&[
        &format!("  export PATH={path}:$PATH"),
        &format!("  {}", lab::typed_for(Host::Director, "ipvsadm -Ln --stats")),
        &format!("  {}", lab::typed_for(Host::Client, &format!("curl {url}"))),
        &format!("  {}", lab::typed_for(Host::Director, "bash")),
        "To take it away:",
        "  cargo xtask demo --clean",
    ]);
}
