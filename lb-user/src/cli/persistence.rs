//! `bpfvs persistence`: which clients stay with which real servers.

use std::ops::ControlFlow;

use clap::Subcommand;

use super::{
    Global,
    connections::{belongs, endpoint},
    names::ServiceName,
    service,
    table::{number, table, text},
};
use crate::director::model::{Command, ConnectionView};

#[derive(Debug, Subcommand)]
pub(super) enum Persistence {
    /// List the templates: each leads a client's new connections to a real server
    List {
        /// Only those of this service: `tcp://10.0.0.200:80`
        #[arg(long)]
        service: Option<ServiceName>,
    },
    /// Delete templates, so that clients may go elsewhere with their next connections; those that they have stay
    Flush {
        /// The service: `tcp://10.0.0.200:80`; all if none is named
        service: Option<ServiceName>,
    },
}

impl Persistence {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        match self {
            Self::List { service } => {
                let mut client = global.client()?;
                if let Some(name) = &service {
                    service::find(client.services()?, name)?;
                }
                let mut templates = Vec::new();
                client.each_connection(&mut |view| {
                    if view.template && service.as_ref().is_none_or(|name| belongs(&view, &name.0)) {
                        templates.push(view);
                    }
                    ControlFlow::Continue(())
                })?;
                global.answer(&templates, || list(&templates))
            }
            Self::Flush { service } => global.change(Command::FlushTemplates { service: service.map(|service| service.0) }),
        }
    }
}

fn list(templates: &[ConnectionView]) -> String {
    let [protocol, client, vip, server, expires, state] =
        [text("PROTOCOL"), text("CLIENT"), text("VIRTUAL"), text("SERVER"), number("EXPIRES"), text("STATE")];
    if templates.iter().all(|template| template.engine.is_none()) {
        return table([protocol, client, vip, server, expires, state], templates.iter().map(row));
    }
    let rows = templates.iter().map(|template| {
        let [protocol, client, vip, server, expires, state] = row(template);
        let call = template.engine.as_ref().map_or_else(String::new, |engine| engine.data.clone());
        [protocol, client, vip, server, expires, state, call]
    });
    table([protocol, client, vip, server, expires, state, text("CALL-ID")], rows)
}

fn row(template: &ConnectionView) -> [String; 6] {
    [
        template.protocol.clone(),
        template.client.to_string(),
        endpoint(template.vip, template.vip_port),
        endpoint(template.server, template.server_port),
        format!("{}s", template.expires),
        template.state.to_lowercase(),
    ]
}
