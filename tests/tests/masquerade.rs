//! Masquerading, with real programs: the how-to's layout as people type it, and every kind of traffic through it in both
//! directions; both families, tc and XDP.

use anyhow::{Result, ensure};
use bpfvs_tests::{
    balanced::Balanced,
    both_ways,
    lab::{Family, Lab, Layout, Offloads},
    needs, needs_bpfvs,
    pass::PassProgram,
    programs::{Capture, NameServer, UdpServer, ask_udp, curl_times, host, resolve},
    wait,
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

#[test]
fn udp_is_answered_from_the_virtual_address() -> Result<()> {
    needs!(root, "nginx", "socat");
    needs_bpfvs!();
    let (balanced, _pass) = balanced("auto")?;
    balanced.service_on("-u", 5353, "rr", &["-m", "-m"])?;
    for family in Family::ALL {
        let servers = balanced.lab.servers.iter().zip(&balanced.lab.server_addresses).zip(["rs1", "rs2"]);
        let _servers = servers
            .map(|((server, address), name)| UdpServer::start(server, address.of(family), 5353, name))
            .collect::<Result<Vec<_>>>()?;
        let answers =
            (0..6).map(|_| ask_udp(&balanced.lab.client, balanced.lab.vip.of(family), 5353)).collect::<Result<Vec<_>>>()?;
        ensure!(answers == ["rs2", "rs1"].repeat(3), "{family:?}: {answers:?}");
    }
    Ok(())
}

#[test]
fn names_are_resolved_by_two_name_servers_in_turn() -> Result<()> {
    needs!(root, "nginx", "dnsmasq", "busybox");
    needs_bpfvs!();
    let (balanced, _pass) = balanced("auto")?;
    balanced.service_on("-u", 53, "rr", &["-m", "-m"])?;
    let servers = balanced.lab.servers.iter().zip(1..);
    let _servers = servers.map(|(server, number)| NameServer::start(server, number)).collect::<Result<Vec<_>>>()?;
    for family in Family::ALL {
        let vip = balanced.lab.vip.of(family);
        let answers = (0..4).map(|_| resolve(&balanced.lab.client, vip)).collect::<Result<Vec<_>>>()?;
        ensure!(answers == [2, 1, 2, 1], "{family:?}: {answers:?}");
    }
    Ok(())
}

/// The director counts as a router; it and the real server behind it both speak as the virtual address.
#[test]
fn traceroute_sees_the_director_and_the_real_server_behind_it() -> Result<()> {
    needs!(root, "nginx", "traceroute");
    needs_bpfvs!();
    let (balanced, _pass) = balanced("auto")?;
    balanced.service_on("-u", 33434, "rr", &["-m", "-m"])?;
    for family in Family::ALL {
        let vip = balanced.lab.vip.of(family).to_string();
        // Nobody listens there, so that the real server says "port unreachable".
        let text = balanced.lab.client.run("traceroute", ["-n", "-U", "-p", "33434", "-q", "1", "-m", "4", &vip])?;
        let hops: Vec<_> = text.lines().skip(1).map(|line| line.split_whitespace().take(2).collect::<Vec<_>>()).collect();
        ensure!(hops == [["1", &vip], ["2", &vip]], "{text}");
    }
    Ok(())
}

/// Without forwarding, replies go no further; the log says what to set.
#[test]
fn a_director_that_does_not_forward_says_so() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let lab = Lab::new(Layout::Masquerade, 2)?;
    let off = [("net.ipv4.ip_forward", "0"), ("net.ipv6.conf.all.forwarding", "0")];
    lab.director.sysctl(&off)?;
    let balanced = Balanced::in_lab(lab, &[])?;
    balanced.service("rr", &["-m", "-m"])?;
    let log = balanced.bpfvs.log();
    ensure!(off.iter().all(|(setting, _)| log.contains(setting)), "{log}");
    for family in Family::ALL {
        let url = bpfvs_tests::programs::url(balanced.lab.vip.of(family), "");
        let answer = balanced.lab.client.run("curl", ["--silent", "--max-time", "1", &url]);
        ensure!(answer.is_err(), "{family:?}: {answer:?}");
    }
    wait::until("the reason to be counted", wait::SOON, || balanced.bpfvs.reason("no-way-back").is_ok_and(|count| count > 0))?;
    balanced.lab.director.sysctl(&off.map(|(setting, _)| (setting, "1")))?;
    for family in Family::ALL {
        curl_times(&balanced.lab.client, balanced.lab.vip.of(family), 2)?;
    }
    Ok(())
}

/// Bulk TCP both ways, and content that is checked.
fn bulk(hook: &str, states: &[Offloads]) -> Result<()> {
    let (balanced, _pass) = balanced(hook)?;
    both_ways::bulk(&balanced, hook, &["-m", "-m"], states)
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

/// A narrow link behind the director, on either side: it tells the sender, be it a client or a real server that only knows
/// the client.
#[test]
fn narrow_links_are_reported_to_either_side() -> Result<()> {
    needs!(root, "nginx", "curl", "ethtool");
    needs_bpfvs!();
    let (balanced, _pass) = balanced("auto")?;
    balanced.service("rr", &["-m", "-m"])?;
    balanced.lab.set_offloads(Offloads::Off)?;
    for (narrow, wide) in [("eth0", "eth1"), ("eth1", "eth0")] {
        balanced.lab.director.ip(&format!("link set {narrow} mtu 1300\nlink set {wide} mtu 1500"))?;
        both_ways::towards(&balanced, narrow)?;
    }
    Ok(())
}

#[test]
fn statistics_count_both_directions_and_connections_are_listed_once() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let (balanced, _pass) = balanced("auto")?;
    balanced.service("rr", &["-m", "-m"])?;
    curl_times(&balanced.lab.client, balanced.lab.vip.of(Family::Ipv4), 4)?;
    // The last packets of a conversation may still be under way when curl has ended.
    let least = [("connections", 4), ("packets_in", 16), ("packets_out", 12), ("bytes_in", 800), ("bytes_out", 800)];
    wait::until("both directions to be counted", wait::SOON, || {
        let totals =
            balanced.bpfvs.get("/v1/services").map(|services| services[0]["traffic"]["totals"].clone()).unwrap_or_default();
        least.iter().all(|(counter, least)| totals[*counter].as_u64().is_some_and(|value| value >= *least))
    })?;
    let list = balanced.bpfvs.ipvsadm("-Lnc")?;
    let connections: Vec<_> = list.lines().filter(|line| line.starts_with("TCP ")).collect();
    ensure!(connections.len() == 4, "{list}");
    ensure!(connections.iter().all(|line| line.contains("192.168.74.12:") && line.contains("192.168.74.204:80")), "{list}");
    let rules = balanced.bpfvs.ipvsadm("-Ln")?;
    ensure!(rules.contains("  -> 10.0.0.205:80                Masq    1"), "{rules}");
    Ok(())
}

/// What real servers say on their own account passes the director as a router, untouched.
#[test]
fn real_servers_reach_the_world_by_themselves() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let (balanced, _pass) = balanced("auto")?;
    balanced.service("rr", &["-m", "-m"])?;
    balanced.lab.client.ip("route add 10.0.0.0/24 via 192.168.74.204")?;
    let _nginx = bpfvs_tests::programs::Nginx::start(&balanced.lab.client, "client")?;
    let answers = curl_times(&balanced.lab.servers[0], balanced.lab.client_address.of(Family::Ipv4), 2)?;
    ensure!(answers == ["client", "client"], "{answers:?}");
    // And past the director's service, the real server itself.
    let answers = curl_times(&balanced.lab.client, balanced.lab.server_addresses[0].of(Family::Ipv4), 2)?;
    ensure!(answers == ["rs1", "rs1"], "{answers:?}");
    Ok(())
}
