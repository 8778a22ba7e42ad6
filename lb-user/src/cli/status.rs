//! `bpfvs status`: how the daemon is.

use super::{
    Global,
    table::{table, text},
};
use crate::director::model::{InterfaceView, Status};

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
        ("connections", format!("{} (each table has room for {})", status.connections, status.max_connections)),
    ];
    let text: Vec<String> = lines.into_iter().map(|(name, value)| format!("{name:<13}{value}\n")).collect();
    text.concat() + "\n" + &interfaces(&status.interfaces)
}

fn interfaces(interfaces: &[InterfaceView]) -> String {
    let rows = interfaces.iter().map(|interface| {
        let tc = if interface.tc { "attached" } else { "-" };
        [interface.name.clone(), interface.xdp.clone().unwrap_or_else(|| "-".to_owned()), tc.to_owned()]
    });
    table([text("INTERFACE"), text("XDP"), text("TC")], rows)
}
