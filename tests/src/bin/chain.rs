//! Drives packets through a director, and prints what each cost as a line of JSON. It runs in the guest of a virtual machine: see
//! [`bpfvs_tests::chain`].
//!
//! ```text
//! chain ipvs -g         the kernel's own IPVS
//! chain xdp -g -i       bpfvs, by XDP; direct routing, then tunnels: a line for each
//! ```

use anyhow::Result;
use bpfvs_tests::{
    bpfvs::Bpfvs,
    chain::{Chain, SERVER, VIP},
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
    #[arg(allow_hyphen_values = true, required = true)]
    methods: Vec<String>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Director {
    Ipvs,
    Xdp,
    Tc,
}

fn main() -> Result<()> {
    let Options { director, methods } = Options::parse();
    let mut chain = Chain::new(if director == Director::Xdp { Hook::Xdp } else { Hook::Tc })?;
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
    for (port, _) in services {
        let mut cost = |flags, clients: u32, packets: u32| -> Result<f64> {
            Ok(chain.send(port, flags, clients.into(), packets)?.as_secs_f64() * 1e9 / f64::from(packets))
        };
        // Each of these connections is new.
        let new = cost(SYN, 2 * CLIENTS, 2 * CLIENTS)?;
        cost(ACK, CLIENTS, CLIENTS)?;
        let mut established = f64::INFINITY;
        for _ in 0..ROUNDS {
            established = established.min(cost(ACK, CLIENTS, PACKETS)?);
        }
        println!("{}", json!({ "new": new, "established": established }));
    }
    Ok(())
}
