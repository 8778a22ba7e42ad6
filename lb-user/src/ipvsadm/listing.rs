//! The listings of `-L`: services with their real servers in six formats, and connections.
//!
//! ```text
//! TCP  192.0.2.1:80 wrr persistent 360
//!   -> 192.0.2.11:80                Route   5      0          0
//! ```
//!
//! Pure functions from the director's views to text. Trailing blanks are part of the format: columns keep their width at
//! the end of a line.

use super::{format, names::Names, sort, values};
use crate::director::model::{ConnectionView, ServerView, ServiceView, SyncDaemon, Timeouts, Totals};

/// The first line of a listing of everything. The versions are those of the kernel's IPVS, for scripts that look at them.
pub(super) const TITLE: &str = "IP Virtual Server version 1.2.1 (size=4096)\n";

/// What is shown of services and servers.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) enum Columns {
    /// Forwarding method, weight and connections.
    #[default]
    Plain,
    /// Counters.
    Stats,
    /// Counters per second.
    Rate,
    /// Limits of connections.
    Thresholds,
    /// Templates.
    Persistent,
    /// As plain, with the kind of tunnel.
    Tunnel,
}

/// How services are listed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Listing {
    /// What is shown.
    pub(super) columns: Columns,
    /// All digits of counters.
    pub(super) exact: bool,
    /// In order, or as they are.
    pub(super) sorted: bool,
}

impl Default for Listing {
    fn default() -> Self {
        Self { columns: Columns::Plain, exact: false, sorted: true }
    }
}

/// Lists services under their two title lines.
pub(super) fn services(services: &[ServiceView], listing: Listing, names: Option<&Names>) -> String {
    let mut text = titles(listing.columns);
    let in_order = if listing.sorted { sort::services(services) } else { services.iter().collect() };
    for service in in_order {
        text.push_str(&service_line(service, listing, names));
        let servers = if listing.sorted { sort::servers(&service.servers) } else { service.servers.iter().collect() };
        for server in servers {
            text.push_str(&server_line(server, service, listing, names));
        }
    }
    text
}

fn titles(columns: Columns) -> String {
    const LOCAL: &str = "Prot LocalAddress:Port";
    let counters = |names: [&str; 5]| names.into_iter().fold(format!("{LOCAL:<33}"), |line, name| format!("{line} {name:>8}"));
    let limits = |first, second, width| format!("{LOCAL:<33} {first:<10} {second:<width$} ActiveConn InActConn ");
    let (first, second) = match columns {
        Columns::Plain => (format!("{LOCAL} Scheduler Flags"), "           Forward Weight ActiveConn InActConn"),
        Columns::Tunnel => (format!("{LOCAL} Scheduler Flags"), "           Forward TunnelInfo    Weight ActiveConn InActConn"),
        Columns::Stats => (counters(["Conns", "InPkts", "OutPkts", "InBytes", "OutBytes"]), ""),
        Columns::Rate => (counters(["CPS", "InPPS", "OutPPS", "InBPS", "OutBPS"]), ""),
        Columns::Thresholds => (limits("Uthreshold", "Lthreshold", 10), ""),
        // The title of the first column is one narrower than that of the thresholds.
        Columns::Persistent => (limits("Weight", "PersistConn", 11).replacen("Weight     ", "Weight    ", 1), ""),
    };
    format!("{first}\n  -> RemoteAddress:Port{second}\n")
}

fn service_line(service: &ServiceView, listing: Listing, names: Option<&Names>) -> String {
    let name = format::service(&service.id, names);
    match listing.columns {
        Columns::Stats => return format!("{name:<33}{}\n", counters(&service.traffic.totals, listing.exact)),
        Columns::Rate => return format!("{name:<33}{}\n", counters(&service.traffic.rates, listing.exact)),
        Columns::Plain | Columns::Thresholds | Columns::Persistent | Columns::Tunnel => {}
    }
    let config = &service.config;
    let mut pieces = vec![name, config.scheduler.clone()];
    if config.flags != 0 {
        pieces.push(format!("({})", values::scheduler_flag_names(config.flags, &config.scheduler)));
    }
    if let Some(persistence) = config.persistence {
        pieces.push(format!("persistent {}", persistence.timeout));
        pieces.extend(format::mask(persistence.mask, service.id.family()).map(|mask| format!("mask {mask}")));
        pieces.extend(config.engine.as_ref().map(|engine| format!("pe {engine}")));
    }
    if config.one_packet {
        pieces.push("ops".to_owned());
    }
    format!("{}\n", pieces.join(" "))
}

fn server_line(server: &ServerView, service: &ServiceView, listing: Listing, names: Option<&Names>) -> String {
    let name = format::server_column(&server.id, &service.id, names);
    let config = &server.config;
    let method = format::method(config.method);
    let (weight, active, inactive) = (config.weight, server.active, server.inactive);
    let connections = format!("{active:<10} {inactive:<10}");
    let columns = match listing.columns {
        Columns::Plain => format!(" {method:<7} {:<6} {connections}", weight.cast_signed()),
        Columns::Tunnel => {
            format!(" {method:<7} {:<13} {:<6} {connections}", format::tunnel(config.method), weight.cast_signed())
        }
        Columns::Stats => counters(&server.traffic.totals, listing.exact),
        Columns::Rate => {
            // Unlike those of services, these three are never scaled.
            let Totals { connections, packets_in, packets_out, bytes_in, bytes_out } = server.traffic.rates;
            let [bytes_in, bytes_out] = [bytes_in, bytes_out].map(|bytes| format::counter(bytes, listing.exact));
            format!(" {connections:>8} {packets_in:>8} {packets_out:>8}{bytes_in}{bytes_out}")
        }
        Columns::Thresholds => format!(" {:<10} {:<10} {connections}", config.upper_threshold, config.lower_threshold),
        Columns::Persistent => format!(" {weight:<9} {:<11} {connections}", server.persistent),
    };
    format!("  -> {name}{columns}\n")
}

fn counters(totals: &Totals, exact: bool) -> String {
    let Totals { connections, packets_in, packets_out, bytes_in, bytes_out } = *totals;
    [connections, packets_in, packets_out, bytes_in, bytes_out].map(|value| format::counter(value, exact)).concat()
}

/// The lines above connections; with the columns of persistence engines, if asked for.
pub(super) fn connection_titles(engines: bool) -> String {
    let engines = if engines { "        pe name          pe_data" } else { "" };
    format!("IPVS connection entries\npro expire state       source             virtual            destination{engines}\n")
}

/// The line of a connection.
pub(super) fn connection(connection: &ConnectionView, engines: bool, names: Option<&Names>) -> String {
    let protocol = connection.protocol.to_ascii_lowercase();
    let endpoint = |address, port| format::endpoint(address, port, Some(&protocol), names);
    let expires = format!("{:02}:{:02}", connection.expires / 60, connection.expires % 60);
    let client = endpoint(connection.client, connection.client_port);
    let vip = endpoint(connection.vip, connection.vip_port);
    let server = endpoint(connection.server, connection.server_port);
    let server = match &connection.engine {
        Some(engine) if engines => format!("{server:<16} {:<18} {}", engine.name, engine.data),
        _ => server,
    };
    let (protocol, state) = (&connection.protocol, &connection.state);
    format!("{protocol:<3} {expires:<6} {state:<11} {client:<18} {vip:<18} {server}\n")
}

/// The line of `-L --timeout`.
pub(super) fn timeouts(timeouts: Timeouts) -> String {
    let [tcp, tcp_fin, udp] = [timeouts.tcp, timeouts.tcp_fin, timeouts.udp].map(u32::cast_signed);
    format!("Timeout (tcp tcpfin udp): {tcp} {tcp_fin} {udp}\n")
}

/// Lists the synchronisation daemons. What is 0 is not known, as of kernels before Linux 4.3.
pub(super) fn sync_daemons(daemons: &[SyncDaemon]) -> String {
    let line = |daemon: &SyncDaemon| {
        let SyncDaemon { role, interface, sync_id, max_length, group, port, ttl } = daemon;
        let mut line = format!("{role} sync daemon (mcast={interface}, syncid={sync_id}");
        let pieces = [
            (*max_length != 0, format!(", maxlen={max_length}")),
            (!group.is_unspecified(), format!(", group={group}")),
            (*port != 0, format!(", port={port}")),
            (*ttl != 0, format!(", ttl={ttl}")),
        ];
        line.extend(pieces.into_iter().filter(|(is_known, _)| *is_known).map(|(_, piece)| piece));
        line + ")\n"
    };
    daemons.iter().map(line).collect()
}
