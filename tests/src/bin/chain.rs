//! Drives packets through a director, and prints what each cost as a line of JSON. It runs in the guest of a virtual machine: see
//! [`bpfvs_tests::chain`].
//!
//! ```text
//! chain bare            nobody: each packet is sent back at once
//! chain steps           the steps of a director's way, one more each: a line for each
//! chain ipvs -g         the kernel's own IPVS
//! chain xdp -g -i       bpfvs, by XDP; direct routing, then tunnels: a line for each
//! ```

use anyhow::Result;
use bpfvs_tests::{
    bpfvs::Bpfvs,
    chain::{Chain, SERVER, VIP, Way},
    frame::{ACK, SYN},
    speed::harness,
    test_run::Hook,
};
use clap::{Parser, ValueEnum};
use serde_json::json;

/// Clients of established connections.
const CLIENTS: u32 = 1024;
/// Packets of a measurement.
const PACKETS: u32 = 16 * CLIENTS;
/// The smallest of so many counts.
const ROUNDS: usize = 3;

/// Drive packets through a director.
#[derive(Debug, Parser)]
struct Options {
    /// Who balances.
    director: Director,
    /// How `ipvsadm -a` is told to forward: `-g`, `-i`, `-m`. Each has a service of its own.
    #[arg(allow_hyphen_values = true)]
    methods: Vec<String>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Director {
    Bare,
    Steps,
    Ipvs,
    Xdp,
    Tc,
}

fn main() -> Result<()> {
    let Options { director, methods } = Options::parse();
    let is_xdp = !matches!(director, Director::Ipvs | Director::Tc);
    let mut chain = Chain::new(if is_xdp { Hook::Xdp } else { Hook::Tc })?;
    if director == Director::Bare {
        chain.send_back()?;
        return measure(&mut chain, 80, false);
    }
    if director == Director::Steps {
        for steps in 1..=harness::STEPS.len() {
            chain.walk(steps, 80, CLIENTS.into())?;
            println!("{}", json!({ "established": established(&mut chain, 80)? }));
        }
        return Ok(());
    }
    let services: Vec<(u16, String)> = (80..).zip(methods).collect();
    let lines = services.iter().flat_map(|(port, method)| {
        [format!("-A -t {VIP}:{port} -s rr"), format!("-a -t {VIP}:{port} -r {SERVER}:{port} {method}")]
    });
    let _bpfvs = if director == Director::Ipvs {
        for line in lines {
            chain.director.run("ipvsadm", line.split_whitespace())?;
        }
        None
    } else {
        let hook = if director == Director::Xdp { "xdp" } else { "tc" };
        let bpfvs = Bpfvs::start(&chain.director, &["--interface", "d0", "--hook", hook, "--max-connections", "65536"])?;
        for line in lines {
            bpfvs.ipvsadm(&line)?;
        }
        bpfvs.wait_for_servers()?;
        Some(bpfvs)
    };
    services.iter().try_for_each(|(port, method)| measure(&mut chain, *port, method == "-m"))
}

fn measure(chain: &mut Chain, port: u16, replies: bool) -> Result<()> {
    // Each of these connections is new.
    let new = chain.send(port, Way::Request(SYN), (2 * CLIENTS).into(), 2 * CLIENTS)?;
    let request = established(chain, port)?;
    let reply = if replies { Some(least(chain, port, Way::Reply)?) } else { None };
    println!("{}", json!({ "new": new, "established": request, "reply": reply }));
    Ok(())
}

fn established(chain: &mut Chain, port: u16) -> Result<u32> {
    least(chain, port, Way::Request(ACK))
}

fn least(chain: &mut Chain, port: u16, way: Way) -> Result<u32> {
    chain.send(port, way, CLIENTS.into(), CLIENTS)?;
    (0..ROUNDS).try_fold(u32::MAX, |least, _| Ok(least.min(chain.send(port, way, CLIENTS.into(), PACKETS)?)))
}
