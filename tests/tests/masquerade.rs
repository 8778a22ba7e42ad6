//! Masquerading, with real programs: the how-to's layout as people type it, and every kind of traffic through it in both
//! directions; both families, tc and XDP.

use anyhow::{Result, ensure};
use bpfvs_tests::{
    balanced::Balanced,
    lab::{Family, Lab, Layout},
    needs, needs_bpfvs,
    pass::PassProgram,
    programs::{Capture, curl_times, host},
};

/// The layout of the how-to: the director is the real servers' default gateway.
fn balanced(hook: &str) -> Result<(Balanced, Option<PassProgram>)> {
    let lab = Lab::new(Layout::Masquerade, 2)?;
    let pass = if hook == "xdp" { Some(lab.prepare_for_xdp()?) } else { None };
    Ok((Balanced::in_lab(lab, &["--hook", hook])?, pass))
}

/// Requests alternate, the real servers see the client's own address, and the client sees the virtual one only.
fn the_how_to(hook: &str) -> Result<()> {
    let (balanced, _pass) = balanced(hook)?;
    for family in Family::ALL {
        let vip = host(balanced.lab.vip.of(family));
        for port in [80, 8080] {
            balanced.bpfvs.ipvsadm(&format!("-A -t {vip}:80 -s rr"))?;
            for address in &balanced.lab.server_addresses {
                balanced.bpfvs.ipvsadm(&format!("-a -t {vip}:80 -r {}:{port} -m", host(address.of(family))))?;
            }
            balanced.bpfvs.wait_for_servers()?;
            let (client, server) = (balanced.lab.client_address.of(family), balanced.lab.server_addresses[1].of(family));
            let arriving = Capture::start(
                &balanced.lab.servers[1],
                "eth0",
                &format!("src host {client} and dst host {server} and tcp dst port {port}"),
            )?;
            let inner = Capture::start(&balanced.lab.client, "eth0", &format!("host {server}"))?;
            let answers = curl_times(&balanced.lab.client, balanced.lab.vip.of(family), 8)?;
            ensure!(answers == ["rs2", "rs1"].repeat(4), "{family:?}, port {port}: {answers:?}");
            arriving.wait_for(4 * 4)?;
            ensure!(inner.finish()?.is_empty(), "{family:?}, port {port}: the client meets a real server's own address");
            balanced.bpfvs.ipvsadm(&format!("-D -t {vip}:80"))?;
        }
    }
    Ok(())
}

#[test]
fn the_how_to_by_tc() -> Result<()> {
    needs!(root, "nginx", "curl", "tcpdump");
    needs_bpfvs!();
    the_how_to("auto")
}

#[test]
fn the_how_to_by_xdp() -> Result<()> {
    needs!(root, "nginx", "curl", "tcpdump", "ethtool");
    needs_bpfvs!();
    the_how_to("xdp")
}
