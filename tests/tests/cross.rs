//! FULLNAT for clients of IPv6 whose real servers have IPv4 only, with real programs; tc and XDP.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use bpfvs_tests::{
    balanced::Balanced,
    lab::{Family, Lab, Layout, Offloads},
    needs, needs_bpfvs,
    pass::PassProgram,
    programs::{
        Capture, Download, IperfServer, NameServer, UdpServer, ask_udp, curl_times, host, iperf, iperf_reverse, resolve, upload,
    },
};

/// The local address, on the director's inner side.
const LOCAL: &str = "10.0.0.230";

/// The how-to's layout for masquerading; real servers have no gateway, and no IPv6.
fn balanced(hook: &str) -> Result<(Balanced, Option<PassProgram>)> {
    let lab = Lab::new(Layout::Masquerade, 2)?;
    let pass = if hook == "xdp" { Some(lab.prepare_for_xdp()?) } else { None };
    for (server, address) in lab.servers.iter().zip(&lab.server_addresses) {
        server.ip(&format!("route del default\nroute del ::/0\naddr del {}/64 dev eth0", address.ipv6))?;
    }
    lab.director.ip(&format!("addr add {LOCAL}/32 dev eth0"))?;
    let balanced = Balanced::in_lab(lab, &["--hook", hook])?;
    balanced.bpfvs.succeed(&["localaddr", "add", LOCAL])?;
    Ok((balanced, pass))
}

fn vip(balanced: &Balanced) -> IpAddr {
    balanced.lab.vip.of(Family::Ipv6)
}

/// A service at the IPv6 address with all real servers at their IPv4 addresses, on a port of their own if it is not 0.
fn serve(balanced: &Balanced, protocol: &str, port: u16, scheduler: &str, server_port: u16) -> Result<()> {
    let service = format!("{protocol} {}:{port}", host(vip(balanced)));
    balanced.bpfvs.ipvsadm(&format!("-A {service} -s {scheduler}"))?;
    for address in &balanced.lab.server_addresses {
        balanced.bpfvs.ipvsadm(&format!("-a {service} -r {}:{server_port} -m --fullnat", address.ipv4))?;
    }
    balanced.bpfvs.wait_for_servers()
}

/// Requests alternate; real servers see the local address, and clients the virtual one.
fn the_how_to(hook: &str) -> Result<()> {
    let (balanced, _pass) = balanced(hook)?;
    let vip = vip(&balanced);
    for port in [80, 8080] {
        serve(&balanced, "-t", 80, "rr", port)?;
        let server = balanced.lab.server_addresses[1].ipv4;
        let filter = format!("src host {LOCAL} and dst host {server} and tcp dst port {port}");
        let arriving = Capture::start(&balanced.lab.servers[1], "eth0", &filter)?;
        let inner = Capture::start(&balanced.lab.client, "eth0", "ip or (ip6 and net ::ffff:0:0/96)")?;
        let answers = curl_times(&balanced.lab.client, vip, 8)?;
        ensure!(answers == ["rs2", "rs1"].repeat(4), "port {port}: {answers:?}");
        arriving.wait_for(4 * 4)?;
        ensure!(inner.finish()?.is_empty(), "port {port}: the client meets an inner address");
        balanced.bpfvs.ipvsadm(&format!("-D -t {}:80", host(vip)))?;
    }
    Ok(())
}

#[test]
fn clients_of_ipv6_reach_real_servers_of_ipv4_at_tc() -> Result<()> {
    needs!(root, "nginx", "curl", "tcpdump");
    needs_bpfvs!();
    the_how_to("auto")
}

#[test]
fn clients_of_ipv6_reach_real_servers_of_ipv4_at_xdp() -> Result<()> {
    needs!(root, "nginx", "curl", "tcpdump", "ethtool");
    needs_bpfvs!();
    the_how_to("xdp")
}

/// Bulk TCP both ways, and content that is checked.
fn bulk(hook: &str, states: &[Offloads]) -> Result<()> {
    let (balanced, _pass) = balanced(hook)?;
    let (client, vip) = (&balanced.lab.client, vip(&balanced));
    serve(&balanced, "-t", 80, "rr", 80)?;
    serve(&balanced, "-t", 5201, "sh", 5201)?;
    let _servers = balanced.lab.servers.iter().map(IperfServer::start).collect::<Result<Vec<_>>>()?;
    for &offloads in states {
        if hook != "xdp" {
            balanced.lab.set_offloads(offloads)?;
        }
        for throughput in [iperf(client, vip, 1)?, iperf_reverse(client, vip, 1)?] {
            println!("{hook}, {offloads:?}: {:.0} Mbit/s", throughput.bits_per_second / 1e6);
            ensure!(throughput.bits_per_second > 20e6, "{offloads:?}: {throughput:?}");
        }
        Download::start(client, vip, "big")?.finish()?;
        upload(client, vip)?;
    }
    Ok(())
}

#[test]
fn bulk_tcp_both_ways_with_offloads_and_without() -> Result<()> {
    needs!(root, "nginx", "curl", "iperf3", "ethtool");
    needs_bpfvs!();
    bulk("auto", &[Offloads::On, Offloads::Off])
}

#[test]
fn bulk_tcp_both_ways_by_xdp() -> Result<()> {
    needs!(root, "nginx", "curl", "iperf3", "ethtool");
    needs_bpfvs!();
    bulk("xdp", &[Offloads::Off])
}

/// A narrow link on either side of the director: whoever sends too much is told in its own version.
#[test]
fn narrow_links_are_reported_to_either_side() -> Result<()> {
    needs!(root, "nginx", "curl", "ethtool");
    needs_bpfvs!();
    let (balanced, _pass) = balanced("auto")?;
    let (client, vip) = (&balanced.lab.client, vip(&balanced));
    serve(&balanced, "-t", 80, "rr", 80)?;
    balanced.lab.set_offloads(Offloads::Off)?;
    for (narrow, wide) in [("eth0", "eth1"), ("eth1", "eth0")] {
        balanced.lab.director.ip(&format!("link set {narrow} mtu 1300\nlink set {wide} mtu 1500"))?;
        if narrow == "eth0" { upload(client, vip)? } else { Download::start(client, vip, "big")?.finish()? }
    }
    Ok(())
}

/// Datagrams with offloaded checksums and without, and a name server that talks IPv4 only.
fn datagrams(hook: &str) -> Result<()> {
    let (balanced, _pass) = balanced(hook)?;
    serve(&balanced, "-u", 53, "rr", 53)?;
    serve(&balanced, "-u", 5353, "rr", 5353)?;
    let servers = || balanced.lab.servers.iter().zip(&balanced.lab.server_addresses).zip(1..);
    let _names = servers().map(|((server, _), number)| NameServer::start(server, number)).collect::<Result<Vec<_>>>()?;
    let _echoes = servers()
        .map(|((server, address), number)| UdpServer::start(server, address.ipv4.into(), 5353, &format!("rs{number}")))
        .collect::<Result<Vec<_>>>()?;
    let answers = (0..4).map(|_| resolve(&balanced.lab.client, vip(&balanced))).collect::<Result<Vec<_>>>()?;
    ensure!(answers == [2, 1, 2, 1], "{answers:?}");
    let answers = (0..4).map(|_| ask_udp(&balanced.lab.client, vip(&balanced), 5353)).collect::<Result<Vec<_>>>()?;
    ensure!(answers == ["rs2", "rs1", "rs2", "rs1"], "{answers:?}");
    Ok(())
}

#[test]
fn datagrams_at_tc() -> Result<()> {
    needs!(root, "nginx", "dnsmasq", "busybox", "socat");
    needs_bpfvs!();
    datagrams("auto")
}

#[test]
fn datagrams_at_xdp() -> Result<()> {
    needs!(root, "nginx", "dnsmasq", "busybox", "socat", "ethtool");
    needs_bpfvs!();
    datagrams("xdp")
}

/// The director, and the real server behind it that nobody listens on, both speak as the virtual address.
#[test]
fn traceroute_sees_the_director_and_the_real_server_behind_it() -> Result<()> {
    needs!(root, "nginx", "traceroute");
    needs_bpfvs!();
    let (balanced, _pass) = balanced("auto")?;
    serve(&balanced, "-u", 33434, "rr", 33434)?;
    let vip = vip(&balanced).to_string();
    let text = balanced.lab.client.run("traceroute", ["-n", "-U", "-p", "33434", "-q", "1", "-m", "4", &vip])?;
    let hops: Vec<_> = text.lines().skip(1).map(|line| line.split_whitespace().take(2).collect::<Vec<_>>()).collect();
    ensure!(hops == [["1", &vip], ["2", &vip]], "{text}");
    Ok(())
}

/// Listings show each side in its own version, both directions are counted, and what was saved can be restored; a daemon that is
/// killed finds everything again.
#[test]
fn listings_statistics_and_restarts() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let (mut balanced, _pass) = balanced("auto")?;
    let vip = vip(&balanced);
    serve(&balanced, "-t", 80, "rr", 8080)?;
    let saved = balanced.bpfvs.ipvsadm("-Sn")?;
    let rules = [205, 206].map(|last| format!("-a -t {}:80 -r 10.0.0.{last}:8080 -m --fullnat -w 1", host(vip)));
    ensure!(rules.iter().all(|rule| saved.contains(rule)), "{saved}");
    let slow = Download::start(&balanced.lab.client, vip, "slow")?;
    slow.wait_for_bytes(1)?;
    curl_times(&balanced.lab.client, vip, 3)?;
    let list = balanced.bpfvs.ipvsadm("-Lnc")?;
    let connections: Vec<_> = list.lines().filter(|line| line.starts_with("TCP ")).collect();
    let whole = |line: &&str| {
        line.contains(&format!("{}:80", host(vip))) && (line.contains("10.0.0.205:8080") || line.contains("10.0.0.206:8080"))
    };
    ensure!(connections.len() == 4 && connections.iter().all(whole), "{list}");
    let used = balanced.bpfvs.succeed(&["localaddr", "list"])?;
    ensure!(used.lines().any(|line| line.starts_with(LOCAL) && line.contains(" 4 ")), "{used}");
    let services = balanced.bpfvs.get("/v1/services")?;
    let totals = &services[0]["traffic"]["totals"];
    for (counter, least) in [("connections", 4), ("packets_in", 12), ("packets_out", 9), ("bytes_in", 800), ("bytes_out", 800)] {
        ensure!(totals[counter].as_u64().is_some_and(|value| value >= least), "{counter}: {totals:#}");
    }
    balanced.bpfvs.kill9()?;
    balanced.bpfvs.serve()?;
    balanced.bpfvs.wait_for_servers()?;
    ensure!(balanced.bpfvs.ipvsadm("-Sn")? == saved, "the rules are others");
    curl_times(&balanced.lab.client, vip, 2)?;
    slow.finish()?;
    balanced.bpfvs.ipvsadm("-C")?;
    balanced.bpfvs.restore(&saved)?;
    balanced.bpfvs.wait_for_servers()?;
    curl_times(&balanced.lab.client, vip, 2)?;
    // What there is no way for is refused.
    let refused = balanced.bpfvs.ipvsadm(&format!("-a -t {}:80 -r 10.0.0.207:80 -m", host(vip)));
    ensure!(refused.is_err(), "masquerading between two versions");
    Ok(())
}
