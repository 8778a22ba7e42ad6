//! `bpfvs connections`: who talks to whom.

use std::net::{IpAddr, SocketAddr};

use clap::Args;

use super::{
    Global,
    names::ServiceName,
    table::{number, table, text},
};
use crate::director::model::{ConnectionView, ServiceId};

#[derive(Args, Debug)]
pub(super) struct Connections {
    /// Only those of this service: `tcp://10.0.0.200:80`
    #[arg(long)]
    service: Option<ServiceName>,
}

impl Connections {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        let mut connections = global.client()?.connections()?;
        if let Some(service) = self.service {
            connections.retain(|connection| belongs(connection, &service.0));
        }
        global.answer(&connections, || list(&connections))
    }
}

fn belongs(connection: &ConnectionView, service: &ServiceId) -> bool {
    match service {
        ServiceId::Address { protocol, address, port } => {
            connection.protocol == protocol.to_string() && connection.vip == *address && connection.vip_port == *port
        }
        // Connections do not remember that a mark brought them.
        ServiceId::Mark { .. } => false,
    }
}

fn list(connections: &[ConnectionView]) -> String {
    let columns =
        [text("PROTOCOL"), text("STATE"), number("EXPIRES"), text("CLIENT"), text("VIRTUAL"), text("SERVER"), text("COUNTED")];
    let address = |address: IpAddr, port: u16| SocketAddr::new(address, port).to_string();
    let rows = connections.iter().map(|connection| {
        [
            connection.protocol.clone(),
            connection.state.clone(),
            format!("{}s", connection.expires),
            address(connection.client, connection.client_port),
            address(connection.vip, connection.vip_port),
            address(connection.server, connection.server_port),
            if connection.active { "active" } else { "inactive" }.to_owned(),
        ]
    });
    table(columns, rows)
}
