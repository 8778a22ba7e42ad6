//! `bpfvs service`: virtual services.

use anyhow::anyhow;
use clap::{Args, Subcommand};

use super::{
    Global,
    names::ServiceName,
    table::{number, table, text},
};
use crate::director::model::{Command, ServiceConfig, ServiceView, service_flags};

#[derive(Debug, Subcommand)]
pub(super) enum Service {
    /// Add a virtual service
    Add {
        /// The service: `tcp://10.0.0.200:80`, `mark:10`, `mark6:10`
        service: ServiceName,
        #[command(flatten)]
        settings: Settings,
    },
    /// Change a virtual service; what is not named stays as it is
    Edit {
        /// The service: `tcp://10.0.0.200:80`, `mark:10`, `mark6:10`
        service: ServiceName,
        #[command(flatten)]
        settings: Settings,
    },
    /// Remove a virtual service and its real servers
    Remove {
        /// The service: `tcp://10.0.0.200:80`, `mark:10`, `mark6:10`
        service: ServiceName,
    },
    /// List virtual services
    List,
}

/// How a service behaves.
#[derive(Args, Debug)]
pub(super) struct Settings {
    /// How real servers are chosen: rr, wrr, sh, dh, mh [default: wrr]
    #[arg(long, short, value_name = "NAME")]
    scheduler: Option<String>,
    /// sh, mh: look for another real server if the hashed one takes no connections [default: false]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    fallback: Option<bool>,
    /// sh, mh: hash the client's port, too [default: false]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    client_port: Option<bool>,
}

impl Settings {
    /// Puts what was named in the place of what was there.
    fn apply(self, mut config: ServiceConfig) -> ServiceConfig {
        if let Some(scheduler) = self.scheduler {
            config.scheduler = scheduler;
        }
        for (setting, flag) in [(self.fallback, service_flags::FLAG_1), (self.client_port, service_flags::FLAG_2)] {
            match setting {
                Some(true) => config.flags |= flag,
                Some(false) => config.flags &= !flag,
                None => (),
            }
        }
        config
    }
}

impl Service {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        match self {
            Self::Add { service, settings } => {
                let config =
                    ServiceConfig { scheduler: "wrr".to_owned(), flags: 0, persistence: None, one_packet: false, engine: None };
                global.change(Command::AddService { service: service.0, config: settings.apply(config) })
            }
            Self::Edit { service, settings } => {
                let config = find(global.client()?.services()?, &service)?.config;
                global.change(Command::EditService { service: service.0, config: settings.apply(config) })
            }
            Self::Remove { service } => global.change(Command::RemoveService { service: service.0 }),
            Self::List => {
                let services = global.client()?.services()?;
                global.answer(&services, || list(&services))
            }
        }
    }
}

/// The service of this name.
pub(super) fn find(services: Vec<ServiceView>, name: &ServiceName) -> anyhow::Result<ServiceView> {
    let found = services.into_iter().find(|service| service.id == name.0);
    found.ok_or_else(|| anyhow!("there is no service {name}; see `bpfvs service list`, or add it first"))
}

fn list(services: &[ServiceView]) -> String {
    let columns = [text("SERVICE"), text("SCHEDULER"), text("FLAGS"), number("SERVERS"), number("ACTIVE"), number("INACTIVE")];
    let rows = services.iter().map(|service| {
        let count = |of: fn(&crate::director::model::ServerView) -> u32| {
            service.servers.iter().map(|server| u64::from(of(server))).sum::<u64>().to_string()
        };
        [
            ServiceName(service.id).to_string(),
            service.config.scheduler.clone(),
            flags(service.config.flags),
            service.servers.len().to_string(),
            count(|server| server.active),
            count(|server| server.inactive),
        ]
    });
    table(columns, rows)
}

fn flags(flags: u8) -> String {
    let names = [(service_flags::FLAG_1, "fallback"), (service_flags::FLAG_2, "client-port"), (service_flags::FLAG_3, "flag-3")];
    let set: Vec<&str> = names.into_iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| name).collect();
    if set.is_empty() { "-".to_owned() } else { set.join(",") }
}
