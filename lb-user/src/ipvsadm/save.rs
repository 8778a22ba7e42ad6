//! The table as command lines (`-S`), and the program `ipvsadm-save`.
//!
//! Thresholds are not saved: the original forgets them, and files made by either program should be the same.

use super::{STATUS_UNREADABLE, Streams, Table, execute, format, names::Names, print, sort, values};
use crate::director::model::{Method, ServerView, ServiceView, Tunnel, TunnelChecksum};

/// What `ipvsadm-save` says about an option that it does not know.
const HELP: &str = "ipvsadm-save: Script to save the IPVS table to stdout.\n   \
     With the -n option, prints out the table in numeric format.\n";

/// Runs the program `ipvsadm-save`. Words that are no options do not matter to it.
pub(super) fn program(words: &[String], table: &mut dyn Table, streams: Streams<'_>) -> u8 {
    let mut options = words.iter().filter(|word| word.starts_with('-'));
    let numeric = options.next();
    if numeric.into_iter().chain(options).any(|option| option != "-n") {
        print(streams.error, HELP);
        return STATUS_UNREADABLE;
    }
    let save = if numeric.is_some() { "-Sn" } else { "-S" };
    execute::run("ipvsadm", &[save.to_owned()], table, streams)
}

/// Writes the command lines that make these services and their servers.
pub(super) fn services(services: &[ServiceView], names: Option<&Names>) -> String {
    lines(services, names, |_| String::new())
}

/// The same in numbers, with the thresholds.
pub(super) fn services_with_thresholds(services: &[ServiceView]) -> String {
    lines(services, None, |server| {
        let threshold = |option, value| if value == 0 { String::new() } else { format!(" {option} {value}") };
        threshold("-x", server.config.upper_threshold) + &threshold("-y", server.config.lower_threshold)
    })
}

/// Writes command lines; `more` says what stands behind a server's.
fn lines(services: &[ServiceView], names: Option<&Names>, more: impl Fn(&ServerView) -> String) -> String {
    let mut text = String::new();
    for service in sort::services(services) {
        let option = format::service_option(&service.id, names);
        text.push_str(&service_line(service, &option));
        for server in sort::servers(&service.servers) {
            text.push_str(&server_line(server, service, &option, names));
            text.push_str(&more(server));
            text.push('\n');
        }
    }
    text
}

fn service_line(service: &ServiceView, option: &str) -> String {
    let config = &service.config;
    let mut pieces = vec![format!("-A {option} -s {}", config.scheduler)];
    if let Some(persistence) = config.persistence {
        pieces.push(format!("-p {}", persistence.timeout));
        pieces.extend(format::mask(persistence.mask, service.id.family()).map(|mask| format!("-M {mask}")));
    }
    pieces.extend(config.engine.as_ref().map(|engine| format!("--pe {engine}")));
    if config.one_packet {
        pieces.push("-o".to_owned());
    }
    if config.flags != 0 {
        pieces.push(format!("-b {}", values::scheduler_flag_names(config.flags, &config.scheduler)));
    }
    format!("{}\n", pieces.join(" "))
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
        Method::FullNat { toa: false } => ("-m --fullnat", String::new()),
        Method::FullNat { toa: true } => ("-m --fullnat --toa", String::new()),
        Method::Tunnel(Tunnel::Ipip) => ("-i", " --tun-type ipip".to_owned()),
        Method::Tunnel(Tunnel::Gue { port, checksum: sum }) => {
            ("-i", format!(" --tun-type gue --tun-port {port} {}", checksum(sum)))
        }
        Method::Tunnel(Tunnel::Gre { checksum: sum }) => ("-i", format!(" --tun-type gre {}", checksum(sum))),
    };
    format!("-a {option} -r {name} {method} -w {}{tunnel}", server.config.weight.cast_signed())
}
