//! Drives packets through a director, and prints what each cost as a line of JSON. It runs in the guest of a virtual machine: see
//! [`bpfvs_tests::chain`].
//!
//! ```text
//! chain bare            nobody: each packet is sent back at once
//! chain ipvs -g         the kernel's own IPVS
//! chain xdp -g -i       bpfvs, by XDP; direct routing, then tunnels: a line for each
//! ```

use anyhow::Result;
use bpfvs_tests::{
    bpfvs::Bpfvs,
    chain::{Chain, SERVER, VIP, Way},
    frame::{ACK, SYN},
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
    Ipvs,
    Xdp,
    Tc,
}

fn main() -> Result<()> {
    let Options { director, methods } = Options::parse();
    let is_xdp = matches!(director, Director::Bare | Director::Xdp);
    let mut chain = Chain::new(if is_xdp { Hook::Xdp } else { Hook::Tc })?;
    if director == Director::Bare {
        chain.send_back()?;
        return measure(&mut chain, 80, false);
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
    let established = Way::Request(ACK);
    // Each of these connections is new.
    let new = chain.send(port, Way::Request(SYN), (2 * CLIENTS).into(), 2 * CLIENTS)?;
    let mut best = |way| -> Result<u32> {
        chain.send(port, way, CLIENTS.into(), CLIENTS)?;
        (0..ROUNDS).try_fold(u32::MAX, |best, _| Ok(best.min(chain.send(port, way, CLIENTS.into(), PACKETS)?)))
    };
    let request = best(established)?;
    let reply = if replies { Some(best(Way::Reply)?) } else { None };
    println!("{}", json!({ "new": new, "established": request, "reply": reply }));
    Ok(())
}
