//! Setting up the other machines: real servers that receive a director's packets by `route` or by `tunnel`.
//!
//! Such a real server must hold the virtual address (VIP) itself, and must not tell anybody: the network has to bring
//! packets for it to the director. This is the classic list of Linux settings that every LVS how-to teaches, and that is
//! easy to get half right. `bpfvs realserver setup` makes them, `check` says in words what is wrong with them (also where
//! somebody made them by hand), and `teardown` takes back exactly what `setup` changed:
//!
//! ```text
//! bpfvs realserver setup --vip 10.0.0.200 --method route
//! bpfvs realserver setup --vip 10.0.0.200 --method tunnel --tunnel-type gue --tunnel-port 5555
//! bpfvs realserver check
//! bpfvs realserver teardown
//! ```
//!
//! [`plan`] says what a set of VIPs needs, as data. [`apply`] and [`undo`] bring the host there and back, and write every change
//! down in the [`state`] file before it is made, so that a crash in between loses nothing. No daemon is needed, and none runs:
//! addresses, settings, devices and the pinned [`decap`] program stay by themselves until teardown or reboot.
//!
//! `bpfvs realserver toa` is for another kind of real server: one behind FULLNAT, which needs no address and no route, but whose
//! programs would take the director for their client. See [`toa`].
//!
//! What is not done: firewall rules, the service itself, and anything that survives a reboot (run `setup` at boot: it
//! changes only what is missing). IPv6 needs no settings against answering for the VIP: Linux answers neighbour
//! solicitations only for addresses of the interface where they arrive, never for those of `lo`.

mod apply;
mod check;
mod control_group;
mod decap;
mod instance;
mod network;
mod plan;
mod report;
mod state;
mod sysctl;
mod toa;
mod undo;

use std::{net::IpAddr, process::ExitCode, thread};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use instance::Instance;
use network::Network;
pub use report::{Finding, Level, Report};
pub use toa::Watched;

/// Sets up this machine as a real server, checks it, or takes the set-up back.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Holds virtual addresses on this machine without announcing them. Changes only what is missing; a further VIP extends the set-up.
    Setup(SetupArgs),
    /// Takes back what `setup` changed, and nothing else.
    Teardown(TeardownArgs),
    /// Says what keeps this real server from serving its virtual addresses. Exit code 1 if there is anything.
    Check(CheckArgs),
    /// Lets programs on this machine see the addresses of clients behind FULLNAT.
    Toa(toa::Args),
}

/// What `setup` is told.
#[derive(Clone, Debug, clap::Args)]
struct SetupArgs {
    /// A virtual address; may be repeated.
    #[arg(long = "vip", value_name = "VIP", required = true)]
    vips: Vec<IpAddr>,
    /// How the director forwards: route (direct routing) or tunnel.
    #[arg(long, value_enum)]
    method: Method,
    #[command(flatten)]
    place: Place,
    /// The kind of tunnel, as the director's service has it (ipvsadm: --tun-type).
    #[arg(long, value_enum, default_value_t = TunnelType::Ipip)]
    tunnel_type: TunnelType,
    /// The UDP port of a gue tunnel (ipvsadm: --tun-port).
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    tunnel_port: Option<u16>,
    /// Who takes packets out of the tunnel: the kernel's tunnel device, the program of bpfvs, or whichever there is.
    #[arg(long, value_enum, default_value_t = Decapsulation::Auto)]
    decap: Decapsulation,
    /// Where the program of bpfvs is attached.
    #[arg(long, value_enum, default_value_t = Hook::Tc)]
    hook: Hook,
    #[command(flatten)]
    common: Common,
}

/// What `teardown` is told.
#[derive(Clone, Debug, clap::Args)]
struct TeardownArgs {
    /// Only this virtual address and what no other one needs; may be repeated. Without it: everything.
    #[arg(long = "vip", value_name = "VIP")]
    vips: Vec<IpAddr>,
    #[command(flatten)]
    common: Common,
}

/// What `check` is told.
#[derive(Clone, Debug, clap::Args)]
struct CheckArgs {
    /// A virtual address that was set up by hand; may be repeated. Without it: those of `setup`.
    #[arg(long = "vip", value_name = "VIP")]
    vips: Vec<IpAddr>,
    /// How the director forwards to the virtual addresses that are named here.
    #[arg(long, value_enum, default_value_t = Method::Route)]
    method: Method,
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    common: Common,
}

/// Where the director's packets arrive.
#[derive(Clone, Debug, clap::Args)]
struct Place {
    /// The interface to which the director sends; by default the one with the default route.
    #[arg(long, value_name = "IF")]
    interface: Option<String>,
}

/// What all three share.
#[derive(Clone, Debug, clap::Args)]
struct Common {
    /// Works in this network namespace, given by name or by path.
    #[arg(long, value_name = "NAME|PATH")]
    netns: Option<String>,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// How packets come from the director.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Method {
    /// As they are, on the same network segment (LVS: direct routing, `-g`).
    Route,
    /// Inside a tunnel (`-i`).
    Tunnel,
}

/// The kind of a tunnel.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum TunnelType {
    /// IP in IP.
    Ipip,
    /// Generic UDP encapsulation.
    Gue,
    /// Generic routing encapsulation.
    Gre,
}

/// Who takes packets out of a tunnel, as asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Decapsulation {
    /// The kernel's device where there is one, else the program.
    Auto,
    /// The program of bpfvs.
    Bpf,
    /// The kernel's tunnel device.
    Kernel,
}

/// Where the program hooks in.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Hook {
    /// Traffic control: for every interface.
    Tc,
    /// Traffic control by a filter of a clsact qdisc, as `tc` does on kernels before 6.6; for debugging on newer ones.
    #[value(hide = true)]
    Clsact,
    /// The driver: faster, for packets that come from a wire.
    Xdp,
}

/// Runs the command and prints what it has to say.
pub fn run(args: Args) -> Result<ExitCode> {
    let json = match &args.command {
        Command::Setup(setup) => setup.common.json,
        Command::Teardown(teardown) => teardown.common.json,
        Command::Check(check) => check.common.json,
        Command::Toa(toa) => toa.json(),
    };
    let report = execute(args)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&report).context("cannot write the report as JSON")?);
    } else {
        print!("{report}");
    }
    Ok(if report.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the command and returns what it has to say.
///
/// It works in a thread of its own, so that entering a network namespace concerns nobody else.
pub fn execute(args: Args) -> Result<Report> {
    thread::Builder::new()
        .name("realserver".into())
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("cannot start the event loop: the system refused a resource; see the cause")?;
            match args.command {
                Command::Setup(setup) => {
                    let instance = Instance::enter(setup.common.netns.as_deref())?;
                    runtime.block_on(async { apply::setup(&instance, &Network::connect()?, &setup).await })
                }
                Command::Teardown(teardown) => {
                    let instance = Instance::enter(teardown.common.netns.as_deref())?;
                    runtime.block_on(async { undo::teardown(&instance, &Network::connect()?, &teardown.vips).await })
                }
                Command::Toa(toa) => toa::run(&toa),
                Command::Check(check) => {
                    let instance = Instance::enter(check.common.netns.as_deref())?;
                    runtime.block_on(async { check::check(&instance, &Network::connect()?, &check).await })
                }
            }
        })
        .context("cannot start a thread: the system refused it; see the cause")?
        .join()
        .map_err(|_| anyhow!("the command ended by a bug of bpfvs: see the message above; please report it"))?
}

/// Refuses what cannot be a virtual address.
fn validate(vip: IpAddr) -> Result<()> {
    if vip.is_loopback() || vip.is_multicast() || vip.is_unspecified() {
        bail!("cannot serve {vip}: it is not the address of a host; name the address of the director's virtual service");
    }
    Ok(())
}
