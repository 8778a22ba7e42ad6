//! Traffic of other kinds than small HTTP requests: UDP, bulk TCP with the offloads of network cards on and off, uploads
//! through tunnels, VLANs, and first packets to neighbours that nobody knows yet.

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    balanced::Balanced,
    lab::{Family, Lab, Layout, Offloads},
    needs, needs_bpfvs,
    netns::Namespace,
    programs::{Capture, Download, IperfServer, UdpServer, ask_udp, curl, curl_times, host, iperf, upload},
    skip_kernel,
};

#[test]
fn udp_takes_turns() -> Result<()> {
    needs!(root, "nginx", "socat");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::OneSegment, 2, &[])?;
    balanced.service_on("-u", 5353, "rr", &["-g", "-g"])?;
    for family in Family::ALL {
        let vip = balanced.lab.vip.of(family);
        let servers = balanced.lab.servers.iter().zip(["rs1", "rs2"]);
        let _servers = servers.map(|(server, name)| UdpServer::start(server, vip, 5353, name)).collect::<Result<Vec<_>>>()?;
        let answers = (0..6).map(|_| ask_udp(&balanced.lab.client, vip, 5353)).collect::<Result<Vec<_>>>()?;
        ensure!(answers == ["rs2", "rs1"].repeat(3), "{family:?}: {answers:?}");
    }
    Ok(())
}

#[test]
fn bulk_tcp_with_offloads_and_without() -> Result<()> {
    needs!(root, "nginx", "iperf3", "ethtool");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::OneSegment, 2, &[])?;
    // iperf3 has two connections that must meet: the client's address decides.
    balanced.service_on("-t", 5201, "sh", &["-g", "-g"])?;
    let _servers = balanced.lab.servers.iter().map(IperfServer::start).collect::<Result<Vec<_>>>()?;
    for offloads in [Offloads::On, Offloads::Off] {
        balanced.lab.set_offloads(offloads)?;
        for family in Family::ALL {
            let throughput = iperf(&balanced.lab.client, balanced.lab.vip.of(family), 2)?;
            println!(
                "{offloads:?}, {family:?}: {:.0} Mbit/s, {} retransmits",
                throughput.bits_per_second / 1e6,
                throughput.retransmits
            );
            // A machine under load is slow; a wrong checksum or a lost segment makes it a hundred times slower still.
            ensure!(throughput.bits_per_second > 50e6, "{offloads:?}, {family:?}: {throughput:?}");
        }
    }
    Ok(())
}

#[test]
fn bulk_tcp_by_xdp() -> Result<()> {
    needs!(root, "nginx", "iperf3", "ethtool");
    needs_bpfvs!();
    let lab = Lab::new(Layout::OneSegment, 2)?;
    let _pass = lab.prepare_for_xdp()?;
    let balanced = Balanced::in_lab(lab, &["--hook", "xdp"])?;
    balanced.service_on("-t", 5201, "sh", &["-g", "-g"])?;
    let _servers = balanced.lab.servers.iter().map(IperfServer::start).collect::<Result<Vec<_>>>()?;
    for family in Family::ALL {
        let throughput = iperf(&balanced.lab.client, balanced.lab.vip.of(family), 2)?;
        ensure!(throughput.bits_per_second > 20e6, "{family:?}: {throughput:?}");
    }
    Ok(())
}

#[test]
fn downloads_arrive_whole() -> Result<()> {
    needs!(root, "nginx", "curl", "ethtool");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::OneSegment, 2, &[])?;
    balanced.service("rr", &["-g", "-g"])?;
    for offloads in [Offloads::On, Offloads::Off] {
        balanced.lab.set_offloads(offloads)?;
        for family in Family::ALL {
            let vip = balanced.lab.vip.of(family);
            let downloads = (0..2).map(|_| Download::start(&balanced.lab.client, vip, "big")).collect::<Result<Vec<_>>>()?;
            for download in downloads {
                download.finish()?;
            }
        }
    }
    Ok(())
}

/// Full-sized segments do not fit the tunnel: the director has to tell the client, and the client has to believe it.
#[test]
fn uploads_through_a_tunnel_find_its_mtu() -> Result<()> {
    needs!(root, "nginx", "curl", "ethtool");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::Tunnel, 2, &[])?;
    balanced.service("rr", &["-i", "-i"])?;
    for offloads in [Offloads::Off, Offloads::On] {
        balanced.lab.set_offloads(offloads)?;
        for family in Family::ALL {
            upload(&balanced.lab.client, balanced.lab.vip.of(family))?;
        }
    }
    Ok(())
}

/// Requests come tagged with a VLAN and leave without a tag, because the real servers are in another one.
///
/// A bridge tags: the router sends requests into VLAN 7, which the director's port carries tagged; real servers and the way
/// back are in VLAN 1, untagged. The director's device for VLAN 7 has no address, so what bpfvs does not take is lost.
fn requests_in_a_vlan(hook: &str) -> Result<()> {
    let lab = Lab::new(Layout::OneSegment, 2)?;
    let pass = if hook == "xdp" { Some(lab.prepare_for_xdp()?) } else { None };
    let balanced = Balanced::in_lab(lab, &["--hook", hook])?;
    balanced.service("rr", &["-g", "-g"])?;
    let lab = &balanced.lab;
    let router = lab.router.as_ref().context("this layout has a router")?;
    router.connect("eth7", &lab.switches, "vlan7")?;
    lab.director.ip("link add link eth0 name eth0.7 type vlan id 7\nlink set eth0.7 up")?;
    lab.switches.ip("link set vlan7 master inside\nlink set inside type bridge vlan_filtering 1")?;
    for arguments in ["del dev vlan7 vid 1", "add dev vlan7 vid 7 pvid untagged", "add dev director vid 7"] {
        lab.switches.run("bridge", ["vlan"].into_iter().chain(arguments.split(' ')))?;
    }
    router.run("ethtool", ["-K", "eth7", "tx", "off"])?;
    // XDP sees the tags that stand within the frame, as on a real wire.
    lab.switches.run("ethtool", ["-K", "director", "txvlan", "off"])?;
    let mac = lab.director.mac("eth0")?.map(|byte| format!("{byte:02x}")).join(":");
    for family in Family::ALL {
        let vip = lab.vip.of(family);
        router.ip(&format!("route add {vip} dev eth7\nneigh add {vip} lladdr {mac} dev eth7 nud permanent"))?;
        let seen = Capture::start(&lab.director, "eth0", "vlan 7")?;
        let answers = curl_times(&lab.client, vip, 4)?;
        ensure!(answers == ["rs2", "rs1"].repeat(2), "{family:?}: {answers:?}");
        // XDP is before the capture.
        ensure!(hook == "xdp" || !seen.finish()?.is_empty(), "{family:?}: the requests were not tagged");
    }
    drop(balanced);
    drop(pass);
    Ok(())
}

/// What VLANs need and this kernel has not, if anything.
fn vlan_obstacle() -> Result<Option<String>> {
    let probe = Namespace::new("probe")?;
    probe.ip("link add port type veth peer name far")?;
    let parts = ["link add link port name port.7 type vlan id 7", "link add bridge7 type bridge vlan_filtering 1"];
    Ok(parts.into_iter().find_map(|part| probe.ip(part).err().map(|error| format!("{error:#}").trim().replace('\n', " "))))
}

#[test]
fn requests_in_a_vlan_by_tc() -> Result<()> {
    needs!(root, "nginx", "curl", "bridge", "tcpdump", "ethtool");
    needs_bpfvs!();
    if let Some(obstacle) = vlan_obstacle()? {
        skip_kernel!("vm::kernels::vlans_and_direct_routing_on_debians_newer_kernel", "{obstacle}");
    }
    requests_in_a_vlan("tc")
}

#[test]
fn requests_in_a_vlan_by_xdp() -> Result<()> {
    needs!(root, "nginx", "curl", "bridge", "tcpdump", "ethtool");
    needs_bpfvs!();
    if let Some(obstacle) = vlan_obstacle()? {
        skip_kernel!("vm::kernels::vlans_and_direct_routing_on_debians_newer_kernel", "{obstacle}");
    }
    requests_in_a_vlan("xdp")
}

/// The very first packet to a real server whose hardware address nobody knows is not lost.
#[test]
fn the_first_request_waits_for_nobody() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::OneSegment, 2, &[])?;
    for family in Family::ALL {
        let vip = host(balanced.lab.vip.of(family));
        let address = host(balanced.lab.server_addresses[0].of(family));
        balanced.bpfvs.ipvsadm(&format!("-A -t {vip}:80 -s rr"))?;
        balanced.bpfvs.ipvsadm(&format!("-a -t {vip}:80 -r {address}:80 -g"))?;
        let begin = std::time::Instant::now();
        ensure!(curl(&balanced.lab.client, balanced.lab.vip.of(family))? == "rs1");
        // A lost SYN is sent again after a second.
        ensure!(begin.elapsed() < std::time::Duration::from_millis(900), "{family:?}: it took {:?}", begin.elapsed());
    }
    Ok(())
}
