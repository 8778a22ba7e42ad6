//! `bpfvs proc`: what monitoring reads from `/proc/net/ip_vs*` on a machine with IPVS, in the same bytes.
//!
//! ```text
//! IP Virtual Server version 1.2.1 (size=4096)
//! Prot LocalAddress:Port Scheduler Flags
//!   -> RemoteAddress:Port Forward Weight ActiveConn InActConn
//! TCP  0A0000C8:0050 wrr  persistent 90000 FFFFFFFF
//!   -> 0A0000CD:0050      Route   1      0          2
//! ```
//!
//! Addresses, ports and netmasks are hexadecimal, and times of persistence in ticks of the kernel's clock, because those files
//! have them so. The order of services and of connections means nothing, in the kernel neither. With `--json` the answers are
//! those of the API.

use std::net::IpAddr;

use clap::{Args, ValueEnum};

use super::Global;
use crate::director::model::{ConnectionView, Family, Method, ServerView, ServiceId, ServiceView, Totals, Traffic};

#[derive(Args, Debug)]
pub(super) struct Proc {
    /// The file's name below /proc/net
    #[arg(value_enum, value_name = "FILE")]
    file: File,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum File {
    /// Services and real servers
    #[value(name = "ip_vs")]
    Services,
    /// Connections and templates
    #[value(name = "ip_vs_conn")]
    Connections,
    /// Counters and rates of everything together
    #[value(name = "ip_vs_stats")]
    Statistics,
}

impl Proc {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        let mut client = global.client()?;
        match self.file {
            File::Services => {
                let clock_rate = client.status()?.clock_rate;
                let services = client.services()?;
                global.answer(&services, || ip_vs(&services, clock_rate))
            }
            File::Connections => {
                let mut titles = Some("Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData\n");
                let words = |connection: Option<&ConnectionView>| {
                    titles.take().unwrap_or_default().to_owned() + &connection.map_or_else(String::new, connection_line)
                };
                global.stream(&mut client, |_| true, words)
            }
            File::Statistics => {
                let traffic = client.traffic()?;
                global.answer(&traffic, || ip_vs_stats(&traffic))
            }
        }
    }
}

fn ip_vs(services: &[ServiceView], clock_rate: u32) -> String {
    let mut text = "IP Virtual Server version 1.2.1 (size=4096)\n\
                    Prot LocalAddress:Port Scheduler Flags\n  \
                    -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n"
        .to_owned();
    for service in services {
        text.push_str(&service_line(service, clock_rate));
        for server in &service.servers {
            text.push_str(&server_line(server));
        }
    }
    text
}

fn service_line(service: &ServiceView, clock_rate: u32) -> String {
    let scheduler = &service.config.scheduler;
    let once = if service.config.one_packet { "ops " } else { "" };
    let name = match service.id {
        ServiceId::Address { protocol, address: address @ IpAddr::V4(_), port } => {
            format!("{protocol}  {}:{port:04X} {scheduler} {once} ", hexadecimal(address))
        }
        // Here the kernel says nothing of single packets.
        ServiceId::Address { protocol, address, port } => {
            format!("{protocol}  [{}]:{port:04X} {scheduler} ", hexadecimal(address))
        }
        ServiceId::Mark { mark, .. } => format!("FWM  {mark:08X} {scheduler} {once}"),
    };
    let persistence = service.config.persistence.map_or_else(String::new, |persistence| {
        let mask = match service.id.family() {
            Family::Ipv4 => persistence.mask,
            // The length of a prefix, which the kernel takes for a number in network order.
            Family::Ipv6 => persistence.mask.swap_bytes(),
        };
        format!("persistent {} {mask:08X}", u64::from(persistence.timeout) * u64::from(clock_rate))
    });
    format!("{name}{persistence}\n")
}

fn server_line(server: &ServerView) -> String {
    let address = match server.id.address {
        address @ IpAddr::V4(_) => hexadecimal(address),
        address @ IpAddr::V6(_) => format!("[{}]", hexadecimal(address)),
    };
    let method = match server.config.method {
        Method::Route => "Route",
        Method::Tunnel(_) => "Tunnel",
        Method::Masquerade => "Masq",
        Method::FullNat { .. } => "FullNat",
    };
    let (port, weight) = (server.id.port, server.config.weight);
    format!("  -> {address}:{port:04X}      {method:<7} {weight:<6} {:<10} {:<10}\n", server.active, server.inactive)
}

fn connection_line(connection: &ConnectionView) -> String {
    let ConnectionView { protocol, client_port, vip_port, server_port, state, expires, .. } = connection;
    let [client, vip, server] = [connection.client, connection.vip, connection.server].map(hexadecimal);
    let engine = connection.engine.as_ref().map_or_else(String::new, |engine| format!(" {} {}", engine.name, engine.data));
    format!(
        "{protocol:<3} {client} {client_port:04X} {vip} {vip_port:04X} {server} {server_port:04X} {state:<11} {expires:>7}{engine}\n"
    )
}

fn ip_vs_stats(traffic: &Traffic) -> String {
    let numbers = |totals: &Totals| {
        let Totals { connections, packets_in, packets_out, bytes_in, bytes_out } = totals;
        format!("{connections:8X} {packets_in:8X} {packets_out:8X} {bytes_in:16X} {bytes_out:16X}\n")
    };
    let titles = "   Total Incoming Outgoing         Incoming         Outgoing\n   \
                  Conns  Packets  Packets            Bytes            Bytes\n";
    let rates = " Conns/s   Pkts/s   Pkts/s          Bytes/s          Bytes/s\n";
    format!("{titles}{}\n{rates}{}", numbers(&traffic.totals), numbers(&traffic.rates))
}

/// An address as the kernel writes it there.
fn hexadecimal(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => format!("{:08X}", address.to_bits()),
        IpAddr::V6(address) => address.segments().map(|segment| format!("{segment:04x}")).join(":"),
    }
}
