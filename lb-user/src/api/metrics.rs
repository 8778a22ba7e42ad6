//! `GET /metrics`: what a Prometheus server asks for, in the `OpenMetrics` text format.
//!
//! ```text
//! bpfvs_server_active_connections{service="tcp://10.0.0.200:80",server="10.0.0.205:80"} 17
//! bpfvs_unforwarded_packets_total{reason="no-connection",fate="passed"} 4
//! ```
//!
//! A page is made of the same views as the other routes' answers, when it is asked for; nothing is kept between two of them. Times
//! are in seconds, sizes in bytes. Counters begin anew with a service that is zeroed (`ipvsadm -Z`) or made again.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::Registry,
};

use crate::director::model::{ReasonView, ServerView, ServiceView, Status};

/// The value of `Content-Type`.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What a page is made of.
#[derive(Debug)]
pub struct Snapshot {
    /// How the daemon is.
    pub status: Status,
    /// The services with their real servers.
    pub services: Vec<ServiceView>,
    /// Why packets were not forwarded.
    pub reasons: Vec<ReasonView>,
}

impl Snapshot {
    /// The page.
    pub fn page(self) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("bpfvs");
        registry.register_collector(Box::new(self));
        let mut page = String::new();
        text::encode(&mut page, &registry)?;
        Ok(page)
    }
}

/// A measure of each real server: how it is counted, its name, what it means, where it stands.
type OfServer = (MetricType, &'static str, &'static str, fn(&ServerView) -> u64);

const OF_SERVERS: [OfServer; 10] = {
    use MetricType::{Counter, Gauge};
    [
        (Gauge, "server_weight", "Weight; 0 takes no new connections", |server| server.config.weight.into()),
        (Gauge, "server_ready", "Whether packets can be sent there", |server| (server.reachability == "ready").into()),
        (Gauge, "server_active_connections", "Connections that are established", |server| server.active.into()),
        (Gauge, "server_inactive_connections", "Connections in other states", |server| server.inactive.into()),
        (Gauge, "server_templates", "Clients that persistence keeps there", |server| server.persistent.into()),
        (Counter, "server_connections", "Connections scheduled", |server| server.traffic.totals.connections),
        (Counter, "server_in_packets", "Packets from clients", |server| server.traffic.totals.packets_in),
        (Counter, "server_in_bytes", "Bytes from clients", |server| server.traffic.totals.bytes_in),
        (Counter, "server_out_packets", "Packets to clients that passed the director", |server| server.traffic.totals.packets_out),
        (Counter, "server_out_bytes", "Bytes to clients that passed the director", |server| server.traffic.totals.bytes_out),
    ]
};

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        use MetricType::{Counter, Gauge};
        let page = &mut encoder;
        let status = &self.status;
        let one = |value| [([] as [(&str, &str); 0], value)];

        write(page, Gauge, "build", "The running program", [([("version", status.version.as_str())], 1)])?;
        write(page, Gauge, "uptime_seconds", "How long the daemon has been running", one(status.uptime))?;
        write(page, Gauge, "services", "Virtual services", one(status.services as u64))?;
        write(page, Gauge, "servers", "Real servers of all services", one(status.servers as u64))?;
        write(page, Gauge, "connections", "Connections in the tables at the last sweep", one(status.connections))?;
        write(page, Gauge, "connections_capacity", "Room in each table (IPv4, IPv6)", one(status.max_connections.into()))?;

        write(
            page,
            Gauge,
            "flood_mode",
            "Whether new connections go without entries for lack of room",
            one(status.flood.on.into()),
        )?;
        write(page, Gauge, "half_open_connections", "Connections that have only begun", one(status.flood.half_open))?;
        write(page, Gauge, "half_open_connections_limit", "With so many, flood mode begins", one(status.flood.limit.into()))?;

        let attached = status.interfaces.iter().flat_map(|interface| {
            let hooks = [("xdp", interface.xdp.is_some()), ("tc", interface.tc)];
            hooks.map(|(hook, attached)| ([("interface", interface.name.as_str()), ("hook", hook)], attached.into()))
        });
        write(page, Gauge, "interface_attached", "Whether packets are met there", attached)?;

        let (forwarded, reasons): (Vec<_>, Vec<_>) = self.reasons.iter().partition(|view| view.fate == "forwarded");
        let stateless = forwarded.iter().map(|view| view.packets).sum();
        write(page, Counter, "stateless_packets", "Packets that were forwarded without a connection", one(stateless))?;
        let reasons = reasons.into_iter();
        let reasons = reasons.map(|view| ([("reason", view.name.as_str()), ("fate", view.fate.as_str())], view.packets));
        write(page, Counter, "unforwarded_packets", "Packets that left without being forwarded, by reason", reasons)?;

        let names: Vec<_> = self.services.iter().map(|service| service.id.name()).collect();
        for (kind, name, help, value) in OF_SERVERS {
            let servers = self.services.iter().zip(&names).flat_map(|(service, name)| {
                let labels = |server: &ServerView| [("service", name.clone()), ("server", server.id.to_string())];
                service.servers.iter().map(move |server| (labels(server), value(server)))
            });
            write(page, kind, name, help, servers)?;
        }
        Ok(())
    }
}

/// Writes one measure with all its samples.
fn write<const LABELS: usize, T: AsRef<str>>(
    page: &mut DescriptorEncoder<'_>,
    kind: MetricType,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = ([(&'static str, T); LABELS], u64)>,
) -> fmt::Result {
    let mut measure = page.encode_descriptor(name, help, None, kind)?;
    for (labels, value) in samples {
        let labels = labels.each_ref().map(|(name, value)| (*name, value.as_ref()));
        // Without this, no labels would be written as `{}`.
        if LABELS == 0 { sample(&mut measure, kind, value)? } else { sample(&mut measure.encode_family(&labels)?, kind, value)? }
    }
    Ok(())
}

fn sample(to: &mut MetricEncoder<'_>, kind: MetricType, value: u64) -> fmt::Result {
    match kind {
        MetricType::Counter => to.encode_counter::<NoLabelSet, _, u64>(&value, None),
        _ => to.encode_gauge(&value),
    }
}
