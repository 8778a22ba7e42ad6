//! `bpfvs stats`: what was forwarded, how fast, and why packets were not.

use clap::Args;

use super::{
    Global,
    names::ServiceName,
    table::{number, table, text},
};
use crate::director::model::{ReasonView, ServiceView, Totals, Traffic};

#[derive(Args, Debug)]
pub(super) struct Stats {
    /// Why packets were passed on, dropped or answered instead of being forwarded
    #[arg(long)]
    reasons: bool,
    /// Per second instead of since the start
    #[arg(long, conflicts_with = "reasons")]
    rate: bool,
}

impl Stats {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        let mut client = global.client()?;
        if self.reasons {
            let reasons = client.reasons()?;
            return global.answer(&reasons, || list_reasons(&reasons));
        }
        let services = client.services()?;
        global.answer(&services, || list(&services, self.rate))
    }
}

fn list(services: &[ServiceView], rate: bool) -> String {
    let columns = [
        text("SERVICE"),
        text("SERVER"),
        number("CONNECTIONS"),
        number("PACKETS IN"),
        number("PACKETS OUT"),
        number("BYTES IN"),
        number("BYTES OUT"),
    ];
    let row = |service: String, server: String, traffic: &Traffic| {
        let Totals { connections, packets_in, packets_out, bytes_in, bytes_out } =
            if rate { traffic.rates } else { traffic.totals };
        let numbers = [connections, packets_in, packets_out, bytes_in, bytes_out].map(|number| number.to_string());
        let [connections, packets_in, packets_out, bytes_in, bytes_out] = numbers;
        [service, server, connections, packets_in, packets_out, bytes_in, bytes_out]
    };
    let mut rows = Vec::new();
    for service in services {
        let name = ServiceName(service.id).to_string();
        rows.push(row(name.clone(), "all".to_owned(), &service.traffic));
        rows.extend(service.servers.iter().map(|server| row(name.clone(), server.id.to_string(), &server.traffic)));
    }
    table(columns, rows)
}

fn list_reasons(reasons: &[ReasonView]) -> String {
    let columns = [text("REASON"), text("FATE"), number("PACKETS"), text("MEANING")];
    let rows =
        reasons.iter().map(|reason| [reason.name.clone(), reason.fate.clone(), reason.packets.to_string(), reason.text.clone()]);
    table(columns, rows)
}
