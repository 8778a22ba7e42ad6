//! The layouts that every LVS how-to teaches, with real requests: direct routing in one segment and in several, tunnels,
//! weights; both families, tc and XDP.

use anyhow::{Result, ensure};
use bpfvs_tests::{
    balanced::Balanced,
    frame::{check, ip},
    lab::{Family, Lab, Layout, Offloads, VipPlace},
    needs, needs_bpfvs,
    programs::{Capture, curl_times, host},
};

/// The commands of the how-to, word for word but for the addresses.
fn type_the_how_to(balanced: &Balanced, family: Family, method: &str) -> Result<()> {
    let vip = host(balanced.lab.vip.of(family));
    balanced.bpfvs.ipvsadm(&format!("-A -t {vip}:80 -s rr"))?;
    for address in &balanced.lab.server_addresses {
        balanced.bpfvs.ipvsadm(&format!("-a -t {vip}:80 -r {}:80 {method}", host(address.of(family))))?;
    }
    Ok(())
}

/// Who answers alternates, from the newest real server on, as IPVS has it.
fn assert_alternates(balanced: &Balanced, family: Family) -> Result<()> {
    let answers = curl_times(&balanced.lab.client, balanced.lab.vip.of(family), 8)?;
    ensure!(answers == ["rs2", "rs1"].repeat(4), "{family:?}: {answers:?}");
    Ok(())
}

/// Direct routing: requests alternate, and the answers do not pass the director.
fn direct_routing(layout: Layout, place: VipPlace, hook: &str) -> Result<()> {
    let lab = Lab::with_vip_on(layout, 2, place)?;
    let pass = if hook == "xdp" { Some(lab.prepare_for_xdp()?) } else { None };
    let balanced = Balanced::in_lab(lab, &["--hook", hook])?;
    let director = &balanced.lab.director;
    for family in Family::ALL {
        type_the_how_to(&balanced, family, "-g")?;
        assert_alternates(&balanced, family)?;

        // By capture: a packet that the director sees is never an answer.
        let (vip, client) = (balanced.lab.vip.of(family), balanced.lab.client_address.of(family));
        let answers = Capture::start(director, "eth0", &format!("src host {vip} and dst host {client} and tcp"))?;
        assert_alternates(&balanced, family)?;
        ensure!(answers.finish()?.is_empty(), "{family:?}: answers pass the director");
    }
    // By the director's own counters: what it balanced in, and nothing out.
    let services = balanced.bpfvs.get("/v1/services")?;
    for service in services.as_array().into_iter().flatten() {
        let totals = &service["traffic"]["totals"];
        ensure!(totals["connections"] == 16 && totals["packets_out"] == 0, "{service:#}");
    }
    drop(balanced);
    drop(pass);
    Ok(())
}

#[test]
fn direct_routing_in_one_segment() -> Result<()> {
    needs!(root, "nginx", "curl", "tcpdump");
    needs_bpfvs!();
    direct_routing(Layout::OneSegment, VipPlace::Loopback, "auto")
}

#[test]
fn direct_routing_with_the_virtual_address_on_the_interface() -> Result<()> {
    needs!(root, "nginx", "curl", "tcpdump");
    needs_bpfvs!();
    direct_routing(Layout::OneSegment, VipPlace::Interface, "tc")
}

#[test]
fn direct_routing_in_several_segments() -> Result<()> {
    needs!(root, "nginx", "curl", "tcpdump");
    needs_bpfvs!();
    direct_routing(Layout::SeveralSegments, VipPlace::Loopback, "auto")
}

#[test]
fn direct_routing_by_xdp() -> Result<()> {
    needs!(root, "nginx", "curl", "tcpdump", "ethtool");
    needs_bpfvs!();
    direct_routing(Layout::OneSegment, VipPlace::Loopback, "xdp")
}

#[test]
fn a_director_with_two_arms() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::TwoArmed, 2, &[])?;
    for family in Family::ALL {
        type_the_how_to(&balanced, family, "-g")?;
        assert_alternates(&balanced, family)?;
    }
    Ok(())
}

/// Tunnels: requests alternate, and what travels between director and real server is a packet in a packet.
fn tunnels(hook: &str) -> Result<()> {
    let lab = Lab::new(Layout::Tunnel, 2)?;
    let pass = if hook == "xdp" { Some(lab.prepare_for_xdp()?) } else { None };
    let balanced = Balanced::in_lab(lab, &["--hook", hook])?;
    // Complete checksums, so that the capture can be checked.
    balanced.lab.set_offloads(Offloads::Off)?;
    for family in Family::ALL {
        type_the_how_to(&balanced, family, "-i")?;
        let protocol = if family == Family::Ipv4 { 4 } else { 41 };
        let server = balanced.lab.server_addresses[0].of(family);
        let version = if family == Family::Ipv4 { "ip" } else { "ip6" };
        let wrapped =
            Capture::start(&balanced.lab.servers[0], "eth0", &format!("dst host {server} and {version} proto {protocol}"))?;
        let bare = Capture::start(&balanced.lab.servers[0], "eth0", &format!("dst host {}", balanced.lab.vip.of(family)))?;
        assert_alternates(&balanced, family)?;

        // Four connections; each has a SYN, an ACK, a request, an ACK of the answer, a FIN.
        let frames = wrapped.wait_for(12)?;
        for frame in &frames {
            check(ip(frame)?)?;
        }
        ensure!(bare.finish()?.is_empty(), "{family:?}: packets reach the real server without a tunnel");
    }
    drop(balanced);
    drop(pass);
    Ok(())
}

#[test]
fn tunnels_by_tc() -> Result<()> {
    needs!(root, "nginx", "curl", "tcpdump", "ethtool");
    needs_bpfvs!();
    tunnels("auto")
}

#[test]
fn tunnels_by_xdp() -> Result<()> {
    needs!(root, "nginx", "curl", "tcpdump", "ethtool");
    needs_bpfvs!();
    tunnels("xdp")
}

#[test]
fn the_other_tunnels() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    for (ipvsadm, realserver) in [
        ("-i --tun-type gue --tun-port 6080", &["--tunnel-type", "gue", "--tunnel-port", "6080"][..]),
        ("-i --tun-type gre", &["--tunnel-type", "gre"]),
        ("-i --tun-type gre --tun-csum", &["--tunnel-type", "gre"]),
    ] {
        let balanced = Balanced::new(Layout::Tunnel, 2, &[])?;
        balanced.set_up_tunnels(realserver)?;
        for family in Family::ALL {
            type_the_how_to(&balanced, family, ipvsadm)?;
            assert_alternates(&balanced, family)?;
        }
    }
    Ok(())
}

#[test]
fn weights_are_kept_in_the_order_of_ipvs() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::OneSegment, 3, &[])?;
    balanced.service("wrr", &["-g -w 2", "-g -w 1", "-g -w 1"])?;
    for family in Family::ALL {
        let answers = curl_times(&balanced.lab.client, balanced.lab.vip.of(family), 12)?;
        // All in turn, the newest first; then the one that is owed a second turn. A service that grows server by server
        // begins with the plain round (`ipvs-semantics.md`, 1.3, note b).
        ensure!(answers == ["rs3", "rs2", "rs1", "rs1"].repeat(3), "{family:?}: {answers:?}");
    }
    Ok(())
}

#[test]
fn connections_are_listed_as_ipvsadm_lists_them() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::OneSegment, 2, &[])?;
    type_the_how_to(&balanced, Family::Ipv4, "-g")?;
    curl_times(&balanced.lab.client, balanced.lab.vip.of(Family::Ipv4), 2)?;
    let list = balanced.bpfvs.ipvsadm("-Lnc")?;
    let connections: Vec<_> = list.lines().filter(|line| line.contains("192.168.74.12:")).collect();
    ensure!(connections.len() == 2, "{list}");
    for server in ["10.0.0.205:80", "10.0.0.206:80"] {
        let found =
            connections.iter().any(|line| line.starts_with("TCP ") && line.contains("10.0.0.200:80") && line.ends_with(server));
        ensure!(found, "no connection to {server} in\n{list}");
    }
    Ok(())
}
