//! `bpfvs connections`: who talks to whom.

use std::net::{IpAddr, SocketAddr};

use clap::Args;

use super::{
    Global,
    names::ServiceName,
    table::{Pages, number, text},
};
use crate::director::model::{ConnectionView, Family, ServiceId};

#[derive(Args, Debug)]
pub(super) struct Connections {
    /// Only those of this service: `tcp://10.0.0.200:80`
    #[arg(long)]
    service: Option<ServiceName>,
}

impl Connections {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        let is_wanted = |connection: &ConnectionView| {
            !connection.template && self.service.as_ref().is_none_or(|service| belongs(connection, &service.0))
        };
        let columns =
            [text("PROTOCOL"), text("STATE"), number("EXPIRES"), text("CLIENT"), text("VIRTUAL"), text("SERVER"), text("COUNTED")];
        let mut pages = Pages::new(columns);
        global.stream(&mut global.client()?, is_wanted, |connection| pages.take(connection.map(row)))
    }
}

/// Whether a connection or a template is of a service.
pub(super) fn belongs(connection: &ConnectionView, service: &ServiceId) -> bool {
    match *service {
        ServiceId::Address { protocol, address, port } => {
            let port_fits = match (connection.template, port) {
                (true, _) => connection.vip_port == if service.spans_ports() { 0 } else { port },
                (false, 0) => true,
                (false, _) => connection.vip_port == port,
            };
            connection.protocol == protocol.to_string() && connection.vip == address && port_fits
        }
        ServiceId::Mark { mark, family } => {
            let is_of_mark = match connection.vip {
                IpAddr::V4(address) => u32::from(address) == mark,
                IpAddr::V6(address) => address.to_bits() >> 96 == mark.into(),
            };
            connection.template && connection.protocol == "IP" && is_of_mark && Family::of(connection.vip) == family
        }
    }
}

/// An address and a port.
pub(super) fn endpoint(address: IpAddr, port: u16) -> String {
    SocketAddr::new(address, port).to_string()
}

fn row(connection: &ConnectionView) -> [String; 7] {
    [
        connection.protocol.clone(),
        connection.state.clone(),
        format!("{}s", connection.expires),
        endpoint(connection.client, connection.client_port),
        endpoint(connection.vip, connection.vip_port),
        endpoint(connection.server, connection.server_port),
        if connection.active { "active" } else { "inactive" }.to_owned(),
    ]
}
