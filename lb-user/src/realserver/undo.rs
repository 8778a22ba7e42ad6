//! `teardown`: takes back what `setup` changed, newest first, and nothing that somebody else has changed since.

use std::{mem, net::IpAddr};

use anyhow::Result;

use super::{
    decap,
    instance::Instance,
    network::Network,
    plan,
    report::Report,
    state::{self, Change, State},
    sysctl, validate,
};

/// Takes virtual addresses back, or all of them if none is named.
pub(super) async fn teardown(instance: &Instance, network: &Network, vips: &[IpAddr]) -> Result<Report> {
    let _lock = state::lock(instance)?;
    let mut state = State::load(instance)?;
    let mut report = Report { otherwise: "nothing is set up here: nothing to take back", ..Report::default() };
    for vip in vips {
        validate(*vip)?;
        if !state.vips.iter().any(|known| known.address == *vip) {
            report.note(
                "vip",
                format!("{vip} was not set up by bpfvs in this network namespace, so that nothing is known to take back."),
                "see `bpfvs realserver check` for those that were".into(),
            );
        }
    }
    state.vips.retain(|known| !vips.is_empty() && !vips.contains(&known.address));
    let removed = remove_what_nobody_needs(network, &mut state, &mut report).await;
    for change in &state.changes {
        if let Change::Program(attachment) = change
            && removed.is_ok()
        {
            decap::accept(attachment, &state.vips)?;
        }
    }
    state.save(instance)?;
    removed?;
    Ok(report)
}

/// Undoes every change that the addresses of the state do not need.
pub(super) async fn remove_what_nobody_needs(network: &Network, state: &mut State, report: &mut Report) -> Result<()> {
    let mut result = Ok(());
    let mut kept = Vec::new();
    for change in mem::take(&mut state.changes).into_iter().rev() {
        if plan::needs(&state.vips, &change) {
            kept.push(change);
        } else if let Err(error) = undo(network, &change, report).await {
            // The others are undone all the same; this one stays on record for the next time.
            kept.push(change);
            result = Err(error);
        }
    }
    kept.reverse();
    state.changes = kept;
    result
}

/// Undoes one change, if it is still there.
pub(super) async fn undo(network: &Network, change: &Change, report: &mut Report) -> Result<()> {
    match change {
        Change::Address { address } => {
            let loopback = network.loopback().await?;
            let prefix = plan::prefix(*address);
            if network.remove_address(loopback.index, *address, prefix).await? {
                report.changes.push(format!("{address}/{prefix} removed from {}", loopback.name));
            }
        }
        Change::Sysctl { key, before, set } => match sysctl::read(key) {
            Ok(now) if now == *set => {
                sysctl::write(key, before)?;
                report.changes.push(format!("{}: {set} -> {before}", sysctl::dotted(key)));
            }
            // The change was written down and never made, or somebody has taken it back.
            Ok(now) if now == *before => {}
            Ok(now) => report.note(
                "sysctl",
                format!(
                    "{} is {now} and not {set}, as setup had left it: somebody else has changed it, so that it stays.",
                    sysctl::dotted(key)
                ),
                format!("if nobody needs it: sysctl -w {}={before}", sysctl::dotted(key)),
            ),
            // The interface is gone, and its settings with it.
            Err(_) => {}
        },
        Change::DeviceMade { name } => {
            if let Some(interface) = network.find(name).await? {
                network.remove_interface(&interface).await?;
                report.changes.push(format!("tunnel device {name} removed"));
            }
        }
        Change::DeviceUp { name } => {
            if let Some(interface) = network.find(name).await?
                && interface.is_up
            {
                network.set_up(&interface, false).await?;
                report.changes.push(format!("tunnel device {name} set down"));
            }
        }
        Change::Qdisc { interface } => {
            if let Some(interface) = network.find(interface).await? {
                network.remove_clsact(&interface).await?;
                report.changes.push(format!("clsact qdisc of {} removed", interface.name));
            }
        }
        Change::Program(attachment) => {
            if decap::detach(network, attachment).await? {
                report.changes.push(format!("decapsulation program detached from {}", attachment.interface));
            }
        }
    }
    Ok(())
}
