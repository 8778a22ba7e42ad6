//! `bpfvs service`: virtual services.

use std::net::Ipv4Addr;

use anyhow::{anyhow, bail};
use clap::{Args, Subcommand};

use super::{
    Global,
    names::{Netmask, ServiceName},
    table::{number, table, text},
};
use crate::director::model::{Command, Family, Persistence, ServiceConfig, ServiceId, ServiceView, service_flags};

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
    /// Keep a client with its real server for so long after its last new connection; 0: not at all [default: 0]
    #[arg(long, value_name = "SECONDS")]
    persistence: Option<u32>,
    /// With --persistence: take all clients of such a network for one, 255.255.255.0 or 24 (IPv6: 64) [default: each for itself]
    #[arg(long, value_name = "MASK")]
    netmask: Option<Netmask>,
    /// With --persistence: keep calls with their real servers instead of clients, by the Call-ID of SIP over UDP: sip; none
    /// [default: none]
    #[arg(long, value_name = "NAME")]
    engine: Option<String>,
    /// UDP: schedule each datagram by itself, and remember no connections [default: false]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    one_packet: Option<bool>,
}

impl Settings {
    /// Puts what was named in the place of what was there.
    fn apply(self, service: &ServiceId, mut config: ServiceConfig) -> anyhow::Result<ServiceConfig> {
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
        let family = service.family();
        match self.persistence {
            Some(0) => config.persistence = None,
            Some(timeout) => {
                let mask = config.persistence.map_or(Netmask::one_client(family), |known| known.mask);
                config.persistence = Some(Persistence { timeout, mask });
            }
            None => (),
        }
        if let Some(netmask) = self.netmask {
            let Some(persistence) = &mut config.persistence else {
                bail!(
                    "a netmask says whom persistence takes for one client, and {service} has no persistence; add --persistence SECONDS"
                );
            };
            persistence.mask = netmask.of(family)?;
        }
        if let Some(engine) = self.engine {
            config.engine = Some(engine).filter(|engine| engine != "none");
            if config.engine.is_some() && config.persistence.is_none() {
                bail!("an engine says what persistence goes by, and {service} has no persistence; add --persistence SECONDS");
            }
        }
        config.one_packet = self.one_packet.unwrap_or(config.one_packet);
        Ok(config)
    }
}

impl Service {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        match self {
            Self::Add { service, settings } => {
                let config =
                    ServiceConfig { scheduler: "wrr".to_owned(), flags: 0, persistence: None, one_packet: false, engine: None };
                global.change(Command::AddService { service: service.0, config: settings.apply(&service.0, config)? })
            }
            Self::Edit { service, settings } => {
                let config = find(global.client()?.services()?, &service)?.config;
                global.change(Command::EditService { service: service.0, config: settings.apply(&service.0, config)? })
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
    let columns = [
        text("SERVICE"),
        text("SCHEDULER"),
        text("FLAGS"),
        text("PERSISTENCE"),
        number("SERVERS"),
        number("ACTIVE"),
        number("INACTIVE"),
    ];
    let rows = services.iter().map(|service| {
        let count = |of: fn(&crate::director::model::ServerView) -> u32| {
            service.servers.iter().map(|server| u64::from(of(server))).sum::<u64>().to_string()
        };
        [
            ServiceName(service.id).to_string(),
            service.config.scheduler.clone(),
            flags(&service.config),
            persistence(service),
            service.servers.len().to_string(),
            count(|server| server.active),
            count(|server| server.inactive),
        ]
    });
    table(columns, rows)
}

fn flags(config: &ServiceConfig) -> String {
    let names = [(service_flags::FLAG_1, "fallback"), (service_flags::FLAG_2, "client-port"), (service_flags::FLAG_3, "flag-3")];
    let mut set: Vec<&str> = names.into_iter().filter(|(flag, _)| config.flags & flag != 0).map(|(_, name)| name).collect();
    set.extend(config.one_packet.then_some("one-packet"));
    set.extend(config.engine.as_deref());
    if set.is_empty() { "-".to_owned() } else { set.join(",") }
}

/// `300s`, or `300s/24`: for how long, and whom it takes for one client.
fn persistence(service: &ServiceView) -> String {
    let Some(Persistence { timeout, mask }) = service.config.persistence else { return "-".to_owned() };
    let family = service.id.family();
    match family {
        _ if mask == Netmask::one_client(family) => format!("{timeout}s"),
        Family::Ipv4 if mask.leading_ones() == mask.count_ones() => format!("{timeout}s/{}", mask.leading_ones()),
        Family::Ipv4 => format!("{timeout}s/{}", Ipv4Addr::from(mask)),
        Family::Ipv6 => format!("{timeout}s/{mask}"),
    }
}
