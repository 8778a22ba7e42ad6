//! The daemon dies, and nothing else does: traffic goes on, connections stay, and the next daemon goes on where it was.

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    balanced::Balanced,
    lab::{Family, Layout},
    needs, needs_bpfvs,
    programs::{Download, curl_times},
    wait,
};
use serde_json::Value;

/// MiB that must have come before something happens to the director.
const BEGUN: u64 = 2 << 20;

/// Downloads that take 24 seconds survive a kill, a restart, and the removal of the server that they do not come from.
#[test]
fn a_running_download_survives() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let mut balanced = Balanced::new(Layout::OneSegment, 2, &[])?;
    balanced.service("rr", &["-g", "-g"])?;
    let downloads = Family::ALL
        .map(|family| Ok((family, Download::start(&balanced.lab.client, balanced.lab.vip.of(family), "slow")?)))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    for (_, download) in &downloads {
        download.wait_for_bytes(BEGUN)?;
    }

    balanced.bpfvs.kill9()?;
    for (_, download) in &downloads {
        download.wait_for_bytes(download.received() + BEGUN).context("while there is no daemon")?;
    }

    balanced.bpfvs.serve()?;
    for (_, download) in &downloads {
        download.wait_for_bytes(download.received() + BEGUN).context("after the new daemon began")?;
    }

    for (family, download) in &downloads {
        let other = if download.server()? == "rs1" { 2 } else { 1 };
        balanced.bpfvs.ipvsadm(&format!("-d {}", balanced.server(other, *family)))?;
    }
    for (family, download) in downloads {
        download.finish().with_context(|| format!("{family:?}"))?;
    }
    Ok(())
}

/// What a list of services says without what changes by itself.
fn configuration(services: &Value) -> Value {
    let mut services = services.clone();
    for service in services.as_array_mut().into_iter().flatten() {
        service["traffic"] = Value::Null;
        for server in service["servers"].as_array_mut().into_iter().flatten() {
            server["traffic"]["rates"] = Value::Null;
        }
    }
    services
}

fn sorted_connections(balanced: &Balanced) -> Result<Vec<String>> {
    let connections = balanced.bpfvs.get("/v1/connections")?;
    let mut lines: Vec<_> = connections
        .as_array()
        .into_iter()
        .flatten()
        .map(|connection| format!("{} {} -> {}", connection["client"], connection["client_port"], connection["server"]))
        .collect();
    lines.sort();
    Ok(lines)
}

#[test]
fn the_next_daemon_adopts_everything() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let mut balanced = Balanced::new(Layout::OneSegment, 3, &[])?;
    balanced.service("wrr", &["-g -w 2", "-g -w 1", "-g -w 1"])?;
    balanced.bpfvs.ipvsadm("--set 800 90 200")?;
    let vip = balanced.lab.vip.of(Family::Ipv4);
    // Five of a period of four: the sequence stands in its middle.
    let begun = curl_times(&balanced.lab.client, vip, 5)?;
    ensure!(begun == ["rs3", "rs2", "rs1", "rs1", "rs3"], "{begun:?}");
    let (saved, services, connections) =
        (balanced.bpfvs.ipvsadm("-Sn")?, balanced.bpfvs.get("/v1/services")?, sorted_connections(&balanced)?);
    ensure!(connections.len() == 5, "{connections:?}");

    balanced.bpfvs.kill9()?;
    // Two while nobody is there.
    let orphaned = curl_times(&balanced.lab.client, vip, 2)?;
    ensure!(orphaned == ["rs2", "rs1"], "without a daemon: {orphaned:?}");

    balanced.bpfvs.serve()?;
    ensure!(balanced.bpfvs.ipvsadm("-Sn")? == saved, "the rules are others");
    ensure!(balanced.bpfvs.ipvsadm("-L --timeout")?.contains("800 90 200"), "the timeouts are others");
    let after = sorted_connections(&balanced)?;
    ensure!(after.len() == 7 && connections.iter().all(|connection| after.contains(connection)), "{after:?}");
    let now = balanced.bpfvs.get("/v1/services")?;
    ensure!(configuration(&now)[0]["servers"].as_array().map(Vec::len) == Some(3), "{now:#}");
    ensure!(configuration(&services)[0]["id"] == configuration(&now)[0]["id"], "{now:#}");
    let next = curl_times(&balanced.lab.client, vip, 5)?;
    ensure!(next == ["rs1", "rs3", "rs2", "rs1", "rs1"], "the sequence does not go on: {next:?}");
    Ok(())
}

#[test]
fn a_polite_stop_lets_traffic_go_on_and_detach_takes_everything_away() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let mut balanced = Balanced::new(Layout::OneSegment, 2, &[])?;
    balanced.service("rr", &["-g", "-g"])?;
    let vip = balanced.lab.vip.of(Family::Ipv4);
    balanced.bpfvs.stop()?;
    let answers = curl_times(&balanced.lab.client, vip, 4)?;
    ensure!(answers == ["rs2", "rs1"].repeat(2), "after a stop: {answers:?}");

    balanced.bpfvs.serve()?;
    balanced.bpfvs.stop_and_detach()?;
    ensure!(!balanced.bpfvs.pins().exists(), "{} is still there", balanced.bpfvs.pins().display());
    let left = balanced.lab.director.run("tc", ["filter", "show", "dev", "eth0", "ingress"])?;
    ensure!(left.is_empty(), "tc still has filters: {left}");
    let link = balanced.lab.director.run("ip", ["link", "show", "dev", "eth0"])?;
    ensure!(!link.contains("xdp"), "XDP is still attached: {link}");
    Ok(())
}

/// Counters that a crash left wrong are put right by the sweep, and connections that are over go away.
#[test]
fn connections_expire_after_their_timeout() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::OneSegment, 1, &[])?;
    balanced.service("rr", &["-g"])?;
    balanced.bpfvs.ipvsadm("--set 0 2 0")?;
    curl_times(&balanced.lab.client, balanced.lab.vip.of(Family::Ipv4), 3)?;
    wait::until("the connections to expire", wait::SOON, || sorted_connections(&balanced).is_ok_and(|left| left.is_empty()))?;
    // The listing leaves out what is over at once; the counters follow with the next sweep.
    wait::until("the counters to follow", wait::SOON, || {
        let services = balanced.bpfvs.get("/v1/services").unwrap_or_default();
        let mut servers = services.as_array().into_iter().flatten().filter_map(|service| service["servers"].as_array()).flatten();
        servers.all(|server| server["active"] == 0 && server["inactive"] == 0)
    })
}
