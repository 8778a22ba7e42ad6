//! `bpfvs persistence`: which clients stay with which real servers.

use clap::Subcommand;

use super::{
    Global,
    connections::{belongs, endpoint},
    names::ServiceName,
    service,
    table::{Column, Pages, number, text},
};
use crate::director::model::{Command, ConnectionView};

/// What is listed of a template. Those of clients have no call.
const COLUMNS: [Column; 7] =
    [text("PROTOCOL"), text("CLIENT"), text("VIRTUAL"), text("SERVER"), number("EXPIRES"), text("STATE"), text("CALL-ID")];

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
                let is_wanted =
                    |template: &ConnectionView| template.template && service.as_ref().is_none_or(|name| belongs(template, &name.0));
                let mut pages = Pages::new(COLUMNS);
                global.stream(&mut client, is_wanted, |template| pages.take(template.map(row)))
            }
            Self::Flush { service } => global.change(Command::FlushTemplates { service: service.map(|service| service.0) }),
        }
    }
}

fn row(template: &ConnectionView) -> [String; 7] {
    [
        template.protocol.clone(),
        template.client.to_string(),
        endpoint(template.vip, template.vip_port),
        endpoint(template.server, template.server_port),
        format!("{}s", template.expires),
        template.state.to_lowercase(),
        template.engine.as_ref().map_or_else(String::new, |engine| engine.data.clone()),
    ]
}
