//! The laboratory itself, without bpfvs: what these layouts are wired to do, they do.
//!
//! Every client reaches a real server at its own address, by plain routing; the virtual address leads to the director. If a
//! test here fails, no other failure means anything.

use anyhow::{Result, ensure};
use bpfvs_tests::{
    frame::{check, ip},
    lab::{Family, Lab, Layout, Offloads, VipPlace},
    needs,
    netns::Namespace,
    programs::{Capture, Download, IperfServer, Nginx, UdpServer, ask_udp, curl, iperf, upload},
};

#[test]
fn clients_reach_real_servers_by_plain_routing() -> Result<()> {
    needs!(root, "nginx", "curl");
    for layout in [Layout::OneSegment, Layout::SeveralSegments, Layout::Tunnel, Layout::TwoArmed] {
        let lab = Lab::new(layout, 2)?;
        for (number, (server, address)) in lab.servers.iter().zip(&lab.server_addresses).enumerate() {
            let name = format!("rs{}", number + 1);
            let _nginx = Nginx::start(server, &name)?;
            for family in Family::ALL {
                ensure!(curl(&lab.client, address.of(family))? == name, "{layout:?}, {family:?}: someone else answered");
            }
        }
    }
    Ok(())
}

#[test]
fn the_virtual_address_leads_to_the_director_and_not_to_a_real_server() -> Result<()> {
    needs!(root, "nginx", "curl");
    for (layout, place) in [
        (Layout::OneSegment, VipPlace::Loopback),
        (Layout::OneSegment, VipPlace::Interface),
        (Layout::SeveralSegments, VipPlace::Loopback),
        (Layout::Tunnel, VipPlace::Interface),
        (Layout::TwoArmed, VipPlace::Loopback),
    ] {
        let lab = Lab::with_vip_on(layout, 2, place)?;
        lab.add_vip_to_servers()?;
        let _director = Nginx::start(&lab.director, "director")?;
        let _servers = lab.servers.iter().map(|server| Nginx::start(server, "server")).collect::<Result<Vec<_>>>()?;
        for family in Family::ALL {
            ensure!(curl(&lab.client, lab.vip.of(family))? == "director", "{layout:?}, {place:?}, {family:?}");
        }
    }
    Ok(())
}

#[test]
fn programs_do_their_work() -> Result<()> {
    needs!(root, "nginx", "curl", "socat", "iperf3", "tcpdump", "ethtool");
    let lab = Lab::new(Layout::OneSegment, 1)?;
    let server = &lab.servers[0];
    let _nginx = Nginx::start(server, "rs1")?;
    let _iperf = IperfServer::start(server)?;
    for family in Family::ALL {
        let address = lab.server_addresses[0].of(family);
        let capture = Capture::start(&lab.client, "eth0", "tcp port 80 or tcp port 5201")?;
        for offloads in [Offloads::Off, Offloads::On] {
            lab.set_offloads(offloads)?;
            let download = Download::start(&lab.client, address, "big")?;
            ensure!(download.server()? == "rs1");
            download.finish()?;
            ensure!(iperf(&lab.client, address, 1)?.bits_per_second > 1e6);
        }
        upload(&lab.client, address)?;
        let frames = capture.finish()?;
        ensure!(frames.len() > 20, "only {} frames were captured", frames.len());
        ensure!(frames.iter().any(|frame| frame.len() > 2000), "with offloads on, frames are larger than the MTU");
        // The last packet of a conversation has no data: nothing is left for an offload to do but its checksum.
        ip(&frames[0])?;

        let _udp = UdpServer::start(server, address, 5353, "rs1")?;
        ensure!(ask_udp(&lab.client, address, 5353)? == "rs1");
    }
    Ok(())
}

#[test]
fn without_offloads_packets_are_whole_on_the_cable() -> Result<()> {
    needs!(root, "nginx", "curl", "tcpdump", "ethtool");
    let lab = Lab::new(Layout::OneSegment, 1)?;
    lab.set_offloads(Offloads::Off)?;
    let _nginx = Nginx::start(&lab.servers[0], "rs1")?;
    let capture = Capture::start(&lab.servers[0], "eth0", "tcp port 80")?;
    curl(&lab.client, lab.server_addresses[0].of(Family::Ipv4))?;
    curl(&lab.client, lab.server_addresses[0].of(Family::Ipv6))?;
    for frame in capture.wait_for(16)? {
        check(ip(&frame)?)?;
    }
    Ok(())
}

#[test]
fn xdp_at_the_far_end_lets_everything_pass() -> Result<()> {
    needs!(root, "nginx", "curl", "ethtool");
    let lab = Lab::new(Layout::TwoArmed, 1)?;
    let _pass = lab.prepare_for_xdp()?;
    let _nginx = Nginx::start(&lab.servers[0], "rs1")?;
    for family in Family::ALL {
        ensure!(curl(&lab.client, lab.server_addresses[0].of(family))? == "rs1");
    }
    Ok(())
}

#[test]
fn a_namespace_takes_its_processes_with_it() -> Result<()> {
    needs!(root);
    let namespace = Namespace::new("short")?;
    let path = namespace.path();
    let mut sleeper = namespace.command("sleep").arg("1000").spawn()?;
    bpfvs_tests::wait::until("sleep to be there", bpfvs_tests::wait::SOON, || {
        std::fs::read_to_string(format!("/proc/{}/comm", sleeper.id())).is_ok_and(|name| name.trim() == "sleep")
    })?;
    drop(namespace);
    ensure!(!path.exists(), "the namespace is still there");
    ensure!(!sleeper.wait()?.success(), "the process lived on");
    Ok(())
}
