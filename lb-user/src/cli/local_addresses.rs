//! `bpfvs localaddr`: where FULLNAT's connections come from, as real servers see them.

use std::{
    io::{self, Write},
    net::IpAddr,
};

use anyhow::bail;
use clap::Subcommand;

use super::{
    Global,
    names::ServiceName,
    table::{number, table, text},
};
use crate::director::model::{Command, LocalAddresses as Listed, Outcome};

#[derive(Debug, Subcommand)]
pub(super) enum LocalAddresses {
    /// Add local addresses; they must be addresses of this host that nothing else uses
    Add {
        /// The addresses: `10.0.0.230,2001:db8:2::230`
        #[arg(required = true, value_delimiter = ',')]
        addresses: Vec<IpAddr>,
        /// For this service alone: `tcp://10.0.0.200:80` [default: for all that have none of their own]
        #[arg(long)]
        service: Option<ServiceName>,
    },
    /// Delete local addresses; connections that have them keep them
    #[command(alias = "remove")]
    Delete {
        /// The addresses
        #[arg(required = true, value_delimiter = ',')]
        addresses: Vec<IpAddr>,
        /// Those of this service alone: `tcp://10.0.0.200:80`
        #[arg(long)]
        service: Option<ServiceName>,
    },
    /// List local addresses, with their ports that are in use and free
    List,
}

impl LocalAddresses {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        match self {
            Self::Add { addresses, service } => {
                let service = service.map(|name| name.0);
                change(global, addresses.iter().map(|&address| Command::AddLocalAddress { address, service }))?;
                warn_of_strangers(global, &addresses)
            }
            Self::Delete { addresses, service } => {
                let service = service.map(|name| name.0);
                change(global, addresses.iter().map(|&address| Command::RemoveLocalAddress { address, service }))
            }
            Self::List => {
                let listed = global.client()?.local_addresses()?;
                global.answer(&listed, || list(&listed))
            }
        }
    }
}

/// Has the daemon do several things; what it refuses is told together.
fn change(global: &Global, commands: impl Iterator<Item = Command>) -> anyhow::Result<()> {
    let outcomes = global.client()?.commands(&commands.collect::<Vec<_>>())?;
    if global.json {
        global.answer(&outcomes, String::new)?;
    }
    let refusal = |outcome| match outcome {
        Outcome::Ok => None,
        Outcome::Refused(refusal) => Some(refusal.message),
    };
    let refusals: Vec<String> = outcomes.into_iter().filter_map(refusal).collect();
    if refusals.is_empty() {
        return Ok(());
    }
    bail!("{}", refusals.join("\nbpfvs: "))
}

/// Says what to do about addresses that are none of this host.
fn warn_of_strangers(global: &Global, addresses: &[IpAddr]) -> anyhow::Result<()> {
    let listed = global.client()?.local_addresses()?;
    for &address in addresses {
        if listed.addresses.iter().any(|view| view.address == address && !view.here) {
            let bits = if address.is_ipv6() { 128 } else { 32 };
            // Nobody hears it if standard error is closed.
            drop(writeln!(
                io::stderr(),
                "bpfvs: {address} is no address of this host yet, so replies will not come here; give it to the interface on the real \
                 servers' side: `ip address add {address}/{bits} dev INTERFACE`"
            ));
        }
    }
    Ok(())
}

fn list(listed: &Listed) -> String {
    let columns = [text("ADDRESS"), text("SERVICE"), number("USED"), number("FREE"), text("STATE")];
    let rows = listed.addresses.iter().map(|view| {
        [
            view.address.to_string(),
            view.service.map_or_else(|| "all".to_owned(), |service| ServiceName(service).to_string()),
            view.usage.used.to_string(),
            view.usage.free.to_string(),
            if view.here { "ready" } else { "not of this host" }.to_owned(),
        ]
    });
    let refused = match listed.refused {
        0 => String::new(),
        count => format!("\n{count} packets began no connection, because every local port was taken; add local addresses\n"),
    };
    table(columns, rows) + &refused
}
