//! The metrics: what a Prometheus server reads is what happened, on the socket and on the port that was asked for.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    balanced::Balanced,
    bpfvs::http,
    lab::{Family, Layout},
    needs, needs_bpfvs, wait,
};

/// What Prometheus asks for, and may ask for nothing else.
const ADDRESS: &str = "127.0.0.1:9117";

/// The samples of a page, by name with labels.
fn samples(page: &str) -> Result<HashMap<&str, u64>> {
    ensure!(page.ends_with("# EOF\n"), "a page ends as OpenMetrics wants it:\n{page}");
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').with_context(|| format!("no sample: {line}"))?;
            Ok((name, value.parse().with_context(|| format!("no whole number: {line}"))?))
        })
        .collect()
}

#[test]
fn they_count_what_clients_did() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::OneSegment, 2, &["--metrics", ADDRESS])?;
    balanced.service("rr", &["-g", "-g"])?;
    let lab = &balanced.lab;
    let vip = lab.vip.of(Family::Ipv4);
    for _ in 0..4 {
        lab.client.run("curl", ["--silent", "--fail", "--max-time", "10", &format!("http://{vip}/")])?;
    }
    let page = || lab.director.run("curl", ["--silent", "--fail", "--max-time", "10", &format!("http://{ADDRESS}/metrics")]);
    let text = page()?;
    let found = samples(&text)?;
    let of = |name: &str, server: &str| {
        let labels = format!("{name}{{service=\"tcp://{vip}:80\",server=\"{server}\"}}");
        found.get(labels.as_str()).copied().with_context(|| format!("no {labels} in\n{text}"))
    };
    let services = balanced.bpfvs.get("/v1/services")?;
    let service =
        services.as_array().context("a list")?.iter().find(|service| service["id"]["address"]["address"] == vip.to_string());
    for server in service.context("the service")?["servers"].as_array().context("a list")? {
        let name = format!("{}:{}", server["address"].as_str().context("an address")?, server["port"]);
        ensure!(of("bpfvs_server_connections_total", &name)? == 2, "each of two real servers has two of four connections\n{text}");
        ensure!(of("bpfvs_server_ready", &name)? == 1 && of("bpfvs_server_weight", &name)? == 1, "{text}");
        let totals = &server["traffic"]["totals"];
        for (metric, member) in [("in_packets", "packets_in"), ("in_bytes", "bytes_in"), ("out_bytes", "bytes_out")] {
            let value = of(&format!("bpfvs_server_{metric}_total"), &name)?;
            ensure!(totals[member] == value, "{metric} of {name} is {value}, elsewhere {}", totals[member]);
        }
    }
    ensure!(found.contains_key("bpfvs_unforwarded_packets_total{reason=\"not-ip\",fate=\"passed\"}"), "{text}");
    ensure!(found["bpfvs_services"] > 0 && found["bpfvs_connections_capacity"] > 0, "{text}");
    wait::until("a sweep that counts the connections", std::time::Duration::from_secs(10), || {
        page().is_ok_and(|text| samples(&text).is_ok_and(|found| found["bpfvs_connections"] >= 4))
    })?;

    let (status, page) = http(&balanced.bpfvs.socket(), "GET", "/metrics", None)?;
    ensure!(status == 200 && samples(&page)?.len() == found.len(), "the socket has another page: {status}\n{page}");
    // Whoever reaches the port may read, and command nothing.
    let refused = lab.director.run(
        "curl",
        ["--silent", "--output", "/dev/null", "--write-out", "%{http_code}", &format!("http://{ADDRESS}/v1/status")],
    )?;
    ensure!(refused == "404", "the port answers more than it should: {refused}");
    Ok(())
}
