//! `bpfvs status`: how the daemon is.

use super::{
    Global,
    table::{number, table, text},
};
use crate::director::model::{FloodView, InterfaceView, Status, SyncDaemonView, TableMemory};

pub(super) fn run(global: &Global) -> anyhow::Result<()> {
    let status = global.client()?.status()?;
    global.answer(&status, || describe(&status))
}

fn describe(status: &Status) -> String {
    let lines = [
        ("version", status.version.clone()),
        ("process", status.pid.to_string()),
        ("instance", status.instance.clone()),
        ("pins", status.pins.clone()),
        ("running for", format!("{} s", status.uptime)),
        ("mark device", status.mark_device.clone()),
        ("services", status.services.to_string()),
        ("servers", status.servers.to_string()),
        ("connections", connections(status)),
        ("flood mode", flood(&status.flood)),
    ];
    let text: Vec<String> = lines.into_iter().map(|(name, value)| format!("{name:<13}{value}\n")).collect();
    text.concat() + "\n" + &interfaces(&status.interfaces) + &sync_daemons(&status.sync_daemons)
}

fn connections(status: &Status) -> String {
    let Status { connections, max_connections, memory, .. } = status;
    let memory = if *memory == TableMemory::default() { String::new() } else { format!(", and takes memory {memory}") };
    format!("{connections} (each table has room for {max_connections}{memory})")
}

fn flood(flood: &FloodView) -> String {
    let FloodView { on, half_open, limit } = flood;
    format!("{} ({half_open} half-open connections; begins with {limit})", if *on { "ON" } else { "off" })
}

/// Nothing if there are none: most directors stand alone.
fn sync_daemons(daemons: &[SyncDaemonView]) -> String {
    if daemons.is_empty() {
        return String::new();
    }
    let columns = [text("SYNC DAEMON"), text("INTERFACE"), number("SYNC ID"), number("MESSAGES"), number("ENTRIES"), text("STATE")];
    let rows = daemons.iter().map(|view| {
        let mut state = vec![view.obstacle.clone().unwrap_or_else(|| "at work".to_owned())];
        state.extend(view.refused.iter().map(|(reason, count)| format!("{reason} {count}")));
        [
            view.daemon.role.to_string(),
            view.daemon.interface.clone(),
            view.daemon.sync_id.to_string(),
            view.messages.to_string(),
            view.entries.to_string(),
            state.join(", "),
        ]
    });
    format!("\n{}", table(columns, rows))
}

fn interfaces(interfaces: &[InterfaceView]) -> String {
    let rows = interfaces.iter().map(|interface| {
        let tc = if interface.tc { "attached" } else { "-" };
        [interface.name.clone(), interface.xdp.clone().unwrap_or_else(|| "-".to_owned()), tc.to_owned()]
    });
    table([text("INTERFACE"), text("XDP"), text("TC")], rows)
}
