//! The table as command lines (`-S`), and the program `ipvsadm-save`.
//!
//! Thresholds are not saved: the original forgets them, and files made by either program should be the same.

use super::{format, names::Names, sort, values};
use crate::director::model::{Method, ServerView, ServiceView, Tunnel, TunnelChecksum};

/// What `ipvsadm-save` says about a word that it does not know.
pub(super) const HELP: &str = "ipvsadm-save: Script to save the IPVS table to stdout.\n   \
     With the -n option, prints out the table in numeric format.\n";

/// The arguments for ipvsadm that these arguments of `ipvsadm-save` mean; nothing if one is unknown.
pub(super) fn arguments(words: &[String]) -> Option<Vec<String>> {
    let mut arguments = vec!["-S".to_owned()];
    for word in words.iter().filter(|word| word.starts_with('-')) {
        if word != "-n" {
            return None;
        }
        if arguments.len() == 1 {
            arguments.push("-n".to_owned());
        }
    }
    Some(arguments)
}

/// Writes the command lines that make these services and their servers.
pub(super) fn services(services: &[ServiceView], names: Option<&Names>) -> String {
    let mut text = String::new();
    for service in sort::services(services) {
        let option = format::service_option(&service.id, names);
        text.push_str(&service_line(service, &option));
        for server in sort::servers(&service.servers) {
            text.push_str(&server_line(server, service, &option, names));
        }
    }
    text
}

fn service_line(service: &ServiceView, option: &str) -> String {
    let config = &service.config;
    let mut line = format!("-A {option} -s {}", config.scheduler);
    if let Some(persistence) = config.persistence {
        line.push_str(&format!(" -p {}", persistence.timeout));
        if let Some(mask) = format::mask(persistence.mask, service.id.family()) {
            line.push_str(&format!(" -M {mask}"));
        }
    }
    if let Some(engine) = &config.engine {
        line.push_str(&format!(" --pe {engine}"));
    }
    if config.one_packet {
        line.push_str(" -o");
    }
    if config.flags != 0 {
        line.push_str(&format!(" -b {}", values::scheduler_flag_names(config.flags, &config.scheduler)));
    }
    line.push('\n');
    line
}

fn server_line(server: &ServerView, service: &ServiceView, option: &str, names: Option<&Names>) -> String {
    let name = format::server(&server.id, &service.id, names);
    let checksum = |checksum| match checksum {
        TunnelChecksum::None => "--tun-nocsum",
        TunnelChecksum::Full => "--tun-csum",
        TunnelChecksum::Remote => "--tun-remcsum",
    };
    let (method, tunnel) = match server.config.method {
        Method::Route => ("-g", String::new()),
        Method::Masquerade => ("-m", String::new()),
        Method::Tunnel(Tunnel::Ipip) => ("-i", " --tun-type ipip".to_owned()),
        Method::Tunnel(Tunnel::Gue { port, checksum: sum }) => {
            ("-i", format!(" --tun-type gue --tun-port {port} {}", checksum(sum)))
        }
        Method::Tunnel(Tunnel::Gre { checksum: sum }) => ("-i", format!(" --tun-type gre {}", checksum(sum))),
    };
    format!("-a {option} -r {name} {method} -w {}{tunnel}\n", server.config.weight.cast_signed())
}
