//! A table of services in a JSON file, with the refusals of the kernel's IPVS. No traffic ever meets it, and it has no network
//! interfaces.

use std::{fs, io::ErrorKind, net::IpAddr, ops::ControlFlow, path::PathBuf};

use bpfvs::{
    director::model::{
        Command, ConnectionView, Outcome, Refusal, RefusalKind, ServerConfig, ServerView, ServiceConfig, ServiceId, ServiceView,
        SyncDaemon, Timeouts, Traffic,
    },
    ipvsadm::{Table, Unreachable},
};
use serde::{Deserialize, Serialize};

/// The schedulers of kernel 6.12.
const SCHEDULERS: [&str; 14] = ["rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "fo", "ovf", "mh", "twos"];

/// What the file holds.
#[derive(Default, Deserialize, Serialize)]
struct Content {
    services: Vec<ServiceView>,
    timeouts: Timeouts,
}

/// The table.
pub(crate) struct FileTable {
    path: PathBuf,
    content: Content,
}

impl FileTable {
    /// The table in this file.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, content: Content::default() }
    }

    /// Writes an empty table.
    pub(crate) fn create(&self) {
        self.store();
    }

    fn store(&self) {
        let text = serde_json::to_vec(&self.content).expect("views have JSON forms");
        fs::write(&self.path, text).expect("the table's file can be written");
    }

    fn service(&mut self, wanted: ServiceId) -> Result<&mut ServiceView, RefusalKind> {
        self.content.services.iter_mut().find(|service| service.id == wanted).ok_or(RefusalKind::NoSuchService)
    }

    fn command(&mut self, command: Command) -> Result<(), RefusalKind> {
        match command {
            Command::AddService { service: id, config } => {
                if self.service(id).is_ok() {
                    return Err(RefusalKind::ServiceExists);
                }
                check_service(&config)?;
                self.content.services.push(ServiceView { id, config, traffic: Traffic::default(), servers: Vec::new() });
            }
            Command::EditService { service, config } => {
                let service = self.service(service)?;
                check_service(&config)?;
                service.config = config;
            }
            Command::RemoveService { service } => {
                self.service(service)?;
                self.content.services.retain(|other| other.id != service);
            }
            Command::AddLocalAddress { .. } | Command::RemoveLocalAddress { .. } => return Err(RefusalKind::Unsupported),
            Command::AddServer { service, server: id, config } => {
                let service = self.service(service)?;
                check_server(&config)?;
                if !is_unicast(id.address) {
                    return Err(RefusalKind::Invalid);
                }
                if service.servers.iter().any(|server| server.id == id) {
                    return Err(RefusalKind::ServerExists);
                }
                let reachability = "ready".to_owned();
                let traffic = Traffic::default();
                let server = ServerView { id, config, active: 0, inactive: 0, persistent: 0, traffic, reachability, index: 0 };
                service.servers.insert(0, server);
            }
            Command::EditServer { service, server, config } => {
                let service = self.service(service)?;
                check_server(&config)?;
                let server = service.servers.iter_mut().find(|other| other.id == server);
                server.ok_or(RefusalKind::NoSuchServer)?.config = config;
            }
            Command::RemoveServer { service, server } => {
                let service = self.service(service)?;
                let index = service.servers.iter().position(|other| other.id == server).ok_or(RefusalKind::NoSuchServer)?;
                service.servers.remove(index);
            }
            Command::Clear => self.content.services.clear(),
            Command::FlushTemplates { service } | Command::Zero { service } => {
                if let Some(service) = service {
                    self.service(service)?;
                }
            }
            Command::StartSync(_) => return Err(RefusalKind::NoSuchDevice),
            Command::StopSync(_) => return Err(RefusalKind::NoSuchSync),
            Command::AddMarkRule(_) | Command::RemoveMarkRule(_) => unreachable!("ipvsadm has no mark rules"),
            Command::SetSysctl { .. } => unreachable!("ipvsadm has no sysctls"),
            Command::SetTimeouts(wanted) => {
                let timeouts = &mut self.content.timeouts;
                let pairs =
                    [(&mut timeouts.tcp, wanted.tcp), (&mut timeouts.tcp_fin, wanted.tcp_fin), (&mut timeouts.udp, wanted.udp)];
                for (timeout, wanted) in pairs.into_iter().filter(|(_, wanted)| *wanted != 0) {
                    *timeout = wanted;
                }
            }
        }
        Ok(())
    }
}

fn check_service(config: &ServiceConfig) -> Result<(), RefusalKind> {
    let is_known = SCHEDULERS.contains(&config.scheduler.as_str()) && config.engine.as_ref().is_none_or(|engine| engine == "sip");
    is_known.then_some(()).ok_or(RefusalKind::SchedulerNotFound)
}

fn check_server(config: &ServerConfig) -> Result<(), RefusalKind> {
    (config.lower_threshold <= config.upper_threshold).then_some(()).ok_or(RefusalKind::OutOfRange)
}

fn is_unicast(address: IpAddr) -> bool {
    let is_special = match address {
        IpAddr::V4(address) => address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !(address.is_unspecified() || address.is_multicast() || is_special)
}

impl Table for FileTable {
    fn connect(&mut self) -> Result<(), Unreachable> {
        let text = fs::read(&self.path).map_err(|error| match error.kind() {
            ErrorKind::PermissionDenied => Unreachable::NotPermitted,
            ErrorKind::NotFound => Unreachable::NotRunning { socket: self.path.clone() },
            _ => Unreachable::Other(error.to_string()),
        })?;
        self.content = serde_json::from_slice(&text).map_err(|error| Unreachable::Other(error.to_string()))?;
        Ok(())
    }

    fn commands(&mut self, commands: &[Command]) -> Result<Vec<Outcome>, Unreachable> {
        let refused = |kind| Outcome::Refused(Refusal { kind, message: format!("{kind:?}") });
        let outcomes =
            commands.iter().map(|command| self.command(command.clone()).map_or_else(refused, |()| Outcome::Ok)).collect();
        self.store();
        Ok(outcomes)
    }

    fn services(&mut self) -> Result<Vec<ServiceView>, Unreachable> {
        Ok(self.content.services.clone())
    }

    fn connections(&mut self, _visit: &mut dyn FnMut(ConnectionView) -> ControlFlow<()>) -> Result<(), Unreachable> {
        Ok(())
    }

    fn timeouts(&mut self) -> Result<Timeouts, Unreachable> {
        Ok(self.content.timeouts)
    }

    fn sync_daemons(&mut self) -> Result<Vec<SyncDaemon>, Unreachable> {
        Ok(Vec::new())
    }
}
