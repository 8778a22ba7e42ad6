//! `bpfvs serve`, `stop`, `attach`, `detach`: the daemon's life.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;

use super::{Global, rule_file};
use crate::{
    api::client::Error,
    daemon::{kernel, serve::Options},
    director::model::{Hook, TableMemory},
};

#[derive(Args, Debug)]
pub(super) struct Serve {
    /// Attach this interface (can be repeated) [default: every interface that is up]
    #[arg(long = "interface", short, value_name = "NAME")]
    interfaces: Vec<String>,
    /// Where packets are met
    #[arg(long, value_enum, default_value_t)]
    hook: Hook,
    /// Serve this network namespace, a name or a path
    #[arg(long, value_name = "NAME|PATH")]
    netns: Option<String>,
    /// Keep the state in this file [default: one below /run/bpfvs, which goes with the datapath]
    #[arg(long, env = "BPFVS_STATE", value_name = "FILE")]
    state: Option<PathBuf>,
    /// How many connections each table (IPv4, IPv6) can hold [default: by the machine's memory, 65,536 to 8,388,608]
    #[arg(long, env = "BPFVS_MAX_CONNECTIONS", value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    max_connections: Option<u32>,
    /// When the tables of connections take the memory for their entries [default: at-start]
    #[arg(long, value_enum, env = "BPFVS_MEMORY", value_name = "WHEN")]
    memory: Option<TableMemory>,
    /// How many picks a CPU takes from a service's schedule at a time. With 1, connections get real servers in IPVS's order, whatever
    /// CPU they come by. More save CPUs that begin connections of one service from waiting for each other
    #[arg(long, default_value_t = 1, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1024))]
    picks_at_once: u32,
    /// Begin flood mode with so many half-open connections [default: an eighth of --max-connections]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    max_half_open: Option<u32>,
    /// Seconds that flood mode lasts after the last packet that found no room
    #[arg(long, default_value_t = lb_common::flood::HOLD, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    flood_hold: u32,
    /// Begin with the rules in this file (those of `ipvsadm-save`), unless there is something to take over; `auto` stands for
    /// the distribution's, if its own ipvsadm would restore them
    #[arg(long, env = "BPFVS_RULES", value_name = "FILE|auto")]
    rules: Option<PathBuf>,
    /// Offer the metrics (and nothing else) to Prometheus at this address, too: 127.0.0.1:9117
    #[arg(long, env = "BPFVS_METRICS", value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
    /// Write the rules to that file at the end
    #[arg(long, requires = "rules")]
    save_rules: bool,
}

impl Serve {
    pub(super) fn run(self, socket: Option<PathBuf>) -> anyhow::Result<()> {
        let rules = self.rules.map(|file| rule_file::find(&file, self.save_rules)).transpose()?.flatten();
        kernel::run(Options {
            interfaces: self.interfaces,
            hook: self.hook,
            netns: self.netns,
            socket,
            state: self.state,
            max_connections: self.max_connections,
            memory: self.memory,
            picks_at_once: self.picks_at_once,
            max_half_open: self.max_half_open,
            flood_hold: self.flood_hold,
            rules,
            metrics: self.metrics,
        })
    }
}

#[derive(Args, Debug)]
pub(super) struct Stop {
    /// Take the datapath away, too: traffic is not balanced any more, and all connections are forgotten
    #[arg(long)]
    detach: bool,
}

impl Stop {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        match global.client()?.stop(self.detach) {
            // A daemon that was killed leaves its datapath at work.
            Err(Error::NotRunning { .. }) if self.detach => kernel::remove_leftovers()?,
            outcome => outcome?,
        }
        done(global)
    }
}

#[derive(Args, Debug)]
pub(super) struct Attach {
    /// The interface's name
    interface: String,
    /// Where packets are met
    #[arg(long, value_enum, default_value_t)]
    hook: Hook,
}

impl Attach {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        global.client()?.attach(&self.interface, self.hook)?;
        done(global)
    }
}

#[derive(Args, Debug)]
pub(super) struct Detach {
    /// The interface's name
    interface: String,
}

impl Detach {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        global.client()?.detach(&self.interface)?;
        done(global)
    }
}

/// Says that it is done, to programs; people see that there is no error.
fn done(global: &Global) -> anyhow::Result<()> {
    global.answer("ok", String::new)
}
