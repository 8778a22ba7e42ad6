//! `bpfvs server`: the real servers of a service.

use anyhow::anyhow;
use clap::{Args, Subcommand, ValueEnum};

use super::{
    Global,
    names::{ServerName, ServiceName},
    service::find,
    table::{number, table, text},
};
use crate::director::model::{Command, Method, ServerConfig, ServiceView, Tunnel, TunnelChecksum};

#[derive(Debug, Subcommand)]
pub(super) enum Server {
    /// Add a real server
    Add {
        /// The service: `tcp://10.0.0.200:80`, `mark:10`, `mark6:10`
        service: ServiceName,
        /// The real server: 10.0.0.205 or 10.0.0.205:80
        server: ServerName,
        #[command(flatten)]
        settings: Settings,
    },
    /// Change a real server; what is not named stays as it is
    Edit {
        /// The service: `tcp://10.0.0.200:80`, `mark:10`, `mark6:10`
        service: ServiceName,
        /// The real server: 10.0.0.205 or 10.0.0.205:80
        server: ServerName,
        #[command(flatten)]
        settings: Settings,
    },
    /// Remove a real server
    Remove {
        /// The service: `tcp://10.0.0.200:80`, `mark:10`, `mark6:10`
        service: ServiceName,
        /// The real server: 10.0.0.205 or 10.0.0.205:80
        server: ServerName,
    },
    /// List real servers, in the order in which schedulers visit them
    List {
        /// The service; none for all
        service: Option<ServiceName>,
    },
}

/// How a real server is used.
#[derive(Args, Debug)]
pub(super) struct Settings {
    /// How packets get there [default: route]
    #[arg(long, short, value_enum)]
    method: Option<MethodName>,
    /// The tunnel [default: ipip]
    #[arg(long, value_enum)]
    tunnel: Option<TunnelName>,
    /// GUE: the UDP port at the real server
    #[arg(long, value_name = "PORT", required_if_eq("tunnel", "gue"), value_parser = clap::value_parser!(u16).range(1..))]
    tunnel_port: Option<u16>,
    /// GUE, GRE: the outer checksum [default: none]
    #[arg(long, value_enum, requires = "tunnel")]
    tunnel_checksum: Option<ChecksumName>,
    /// Fullnat: tells the real server the addresses of TCP clients, in a TCP option (see `bpfvs realserver toa`)
    #[arg(long)]
    toa: bool,
    /// Its share of connections; 0 for no new ones [default: 1]
    #[arg(long, short)]
    weight: Option<u32>,
    /// From this number of connections on it gets no new ones; 0 for no limit [default: 0]
    #[arg(long, short = 'x', value_name = "CONNECTIONS")]
    upper_threshold: Option<u32>,
    /// Below this number it gets new ones again; 0 for three quarters of the upper threshold [default: 0]
    #[arg(long, short = 'y', value_name = "CONNECTIONS")]
    lower_threshold: Option<u32>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum MethodName {
    /// The packet goes to the real server's MAC address (direct routing)
    Route,
    /// The packet goes there inside another
    Tunnel,
    /// The packet's addresses are translated
    Masquerade,
    /// Both addresses are: the real server sees a local address of the director (see `bpfvs localaddr`)
    #[value(name = "fullnat")]
    FullNat,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum TunnelName {
    /// IP in IP
    Ipip,
    /// Generic UDP encapsulation
    Gue,
    /// Generic routing encapsulation
    Gre,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ChecksumName {
    /// None
    None,
    /// A full one
    Full,
    /// Remote checksum offload
    Remote,
}

impl Settings {
    /// Puts what was named in the place of what was there.
    fn apply(&self, old: ServerConfig) -> anyhow::Result<ServerConfig> {
        Ok(ServerConfig {
            method: self.method(old.method)?,
            weight: self.weight.unwrap_or(old.weight),
            upper_threshold: self.upper_threshold.unwrap_or(old.upper_threshold),
            lower_threshold: self.lower_threshold.unwrap_or(old.lower_threshold),
        })
    }

    fn method(&self, old: Method) -> anyhow::Result<Method> {
        let checksum = match self.tunnel_checksum {
            None | Some(ChecksumName::None) => TunnelChecksum::None,
            Some(ChecksumName::Full) => TunnelChecksum::Full,
            Some(ChecksumName::Remote) => TunnelChecksum::Remote,
        };
        let tunnel = match (self.tunnel, self.tunnel_port) {
            (Some(TunnelName::Gue), Some(port)) => Some(Tunnel::Gue { port, checksum }),
            (_, Some(_)) => return Err(anyhow!("--tunnel-port cannot be used: only GUE tunnels have a port; add --tunnel gue")),
            (Some(TunnelName::Ipip), None) if self.tunnel_checksum.is_some() => {
                return Err(anyhow!("--tunnel-checksum cannot be used: IPIP tunnels have no checksum; use --tunnel gue or gre"));
            }
            (Some(TunnelName::Ipip), None) => Some(Tunnel::Ipip),
            (Some(TunnelName::Gre), None) => Some(Tunnel::Gre { checksum }),
            // clap asks for the port of a GUE tunnel.
            (Some(TunnelName::Gue) | None, None) => None,
        };
        let fullnat = self.method == Some(MethodName::FullNat) || (self.method.is_none() && matches!(old, Method::FullNat { .. }));
        if self.toa && !fullnat {
            return Err(anyhow!("--toa cannot be used: only FULLNAT hides clients; use --method fullnat"));
        }
        match (self.method, tunnel, old) {
            (None | Some(MethodName::Tunnel), Some(tunnel), _) => Ok(Method::Tunnel(tunnel)),
            (Some(_), Some(_), _) => Err(anyhow!("--tunnel cannot be used: the method is no tunnel; use --method tunnel")),
            (None, None, Method::FullNat { toa }) => Ok(Method::FullNat { toa: toa || self.toa }),
            (None, None, old) => Ok(old),
            (Some(MethodName::Tunnel), None, Method::Tunnel(old)) => Ok(Method::Tunnel(old)),
            (Some(MethodName::Tunnel), None, _) => Ok(Method::Tunnel(Tunnel::Ipip)),
            (Some(MethodName::Route), None, _) => Ok(Method::Route),
            (Some(MethodName::Masquerade), None, _) => Ok(Method::Masquerade),
            (Some(MethodName::FullNat), None, _) => Ok(Method::FullNat { toa: self.toa }),
        }
    }
}

impl Server {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        match self {
            Self::Add { service, server, settings } => {
                let default = ServerConfig { method: Method::Route, weight: 1, upper_threshold: 0, lower_threshold: 0 };
                let config = settings.apply(default)?;
                global.change(Command::AddServer { service: service.0, server: server.of(&service), config })
            }
            Self::Edit { service, server, settings } => {
                let id = server.of(&service);
                let servers = find(global.client()?.services()?, &service)?.servers;
                let old = servers.iter().find(|server| server.id == id).ok_or_else(|| {
                    anyhow!("the service {service} has no real server {id}; see `bpfvs server list`, or add it first")
                })?;
                global.change(Command::EditServer { service: service.0, server: id, config: settings.apply(old.config)? })
            }
            Self::Remove { service, server } => {
                global.change(Command::RemoveServer { service: service.0, server: server.of(&service) })
            }
            Self::List { service } => {
                let mut services = global.client()?.services()?;
                if let Some(name) = service {
                    services = vec![find(services, &name)?];
                }
                global.answer(&services, || list(&services))
            }
        }
    }
}

fn list(services: &[ServiceView]) -> String {
    let columns = [
        text("SERVICE"),
        text("SERVER"),
        text("METHOD"),
        number("WEIGHT"),
        number("ACTIVE"),
        number("INACTIVE"),
        number("UPPER"),
        number("LOWER"),
        text("STATE"),
    ];
    let rows = services.iter().flat_map(|service| {
        service.servers.iter().map(|server| {
            [
                ServiceName(service.id).to_string(),
                server.id.to_string(),
                method(server.config.method),
                server.config.weight.to_string(),
                server.active.to_string(),
                server.inactive.to_string(),
                server.config.upper_threshold.to_string(),
                server.config.lower_threshold.to_string(),
                server.reachability.clone(),
            ]
        })
    });
    table(columns, rows)
}

fn method(method: Method) -> String {
    match method {
        Method::Route => "route".to_owned(),
        Method::Masquerade => "masquerade".to_owned(),
        Method::FullNat { toa: false } => "fullnat".to_owned(),
        Method::FullNat { toa: true } => "fullnat toa".to_owned(),
        Method::Tunnel(Tunnel::Ipip) => "tunnel ipip".to_owned(),
        Method::Tunnel(Tunnel::Gue { port, checksum }) => format!("tunnel gue:{port}{}", checksum_suffix(checksum)),
        Method::Tunnel(Tunnel::Gre { checksum }) => format!("tunnel gre{}", checksum_suffix(checksum)),
    }
}

const fn checksum_suffix(checksum: TunnelChecksum) -> &'static str {
    match checksum {
        TunnelChecksum::None => "",
        TunnelChecksum::Full => "+checksum",
        TunnelChecksum::Remote => "+remote-checksum",
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        settings: Settings,
    }

    fn method_of(line: &[&str], old: Method) -> Result<Method, String> {
        let line = Line::try_parse_from([&["x"], line].concat()).map_err(|error| error.to_string())?;
        line.settings.method(old).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_not_named_stays() {
        let gue = Method::Tunnel(Tunnel::Gue { port: 6080, checksum: TunnelChecksum::Full });
        assert_eq!(method_of(&[], gue), Ok(gue));
        assert_eq!(method_of(&["--method", "tunnel"], gue), Ok(gue));
        assert_eq!(method_of(&["--method", "tunnel"], Method::Route), Ok(Method::Tunnel(Tunnel::Ipip)));
        assert_eq!(method_of(&["--method", "route"], gue), Ok(Method::Route));
        let line = ["--tunnel", "gue", "--tunnel-port", "6080", "--tunnel-checksum", "full"];
        assert_eq!(method_of(&line, Method::Route), Ok(gue));
    }

    #[test]
    fn contradictions_are_refused() {
        for line in [
            &["--tunnel", "gue"][..],
            &["--tunnel-port", "6080"],
            &["--tunnel", "gre", "--tunnel-port", "6080"],
            &["--tunnel", "ipip", "--tunnel-checksum", "full"],
            &["--method", "route", "--tunnel", "ipip"],
        ] {
            method_of(line, Method::Route).expect_err("it contradicts itself");
        }
    }
}
