//! IPVS's sysctls: typed as for sysctl(8), kept by the daemon, and honoured by the packet path. That they do what they do in the
//! kernel's IPVS, `vm_persistence` has seen to.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    bench::{Addresses, Bench, bracketed, socket},
    bpfvs::Bpfvs,
    frame::{ACK, Frame, SYN},
    lab::Family,
    needs, needs_bpfvs,
    netns::Namespace,
    test_run::{Hook, Verdict},
    wait,
};

#[test]
fn they_are_typed_as_for_sysctl_and_survive_the_daemon() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let namespace = Namespace::new("sysctl")?;
    let mut bpfvs = Bpfvs::start(&namespace, &[])?;
    let sysctl = |bpfvs: &Bpfvs, words: &[&str]| bpfvs.succeed(&[&["sysctl"], words].concat());
    let listing = sysctl(&bpfvs, &[])?;
    for part in ["NAME ", "sloppy_tcp ", "conntrack ", "netfilter's connection tracking"] {
        ensure!(listing.contains(part), "no {part:?} in\n{listing}");
    }
    ensure!(sysctl(&bpfvs, &["net.ipv4.vs.sloppy_tcp"])? == "net.ipv4.vs.sloppy_tcp = 0\n");
    let changed = sysctl(&bpfvs, &["-w", "net.ipv4.vs.sloppy_tcp=1", "net/ipv4/vs/conn_reuse_mode=3"])?;
    ensure!(changed == "net.ipv4.vs.sloppy_tcp = 1\nnet.ipv4.vs.conn_reuse_mode = 3\n", "{changed}");
    ensure!(
        sysctl(&bpfvs, &["lblc_expiration=60", "sloppy_tcp"])? == "net.ipv4.vs.lblc_expiration = 60\nnet.ipv4.vs.sloppy_tcp = 1\n"
    );
    let all = sysctl(&bpfvs, &["-a"])?;
    ensure!(all.lines().count() == 9 && all.contains("net.ipv4.vs.lblc_expiration = 60\n"), "{all}");

    for (words, part) in [
        (["sysctl", "sloppy_tcp=yes"], "\"yes\" is no number"),
        (["sysctl", "sloppy_tcp=2"], "from 0 to 1"),
        (["sysctl", "conntrack=1"], "no meaning"),
        (["sysctl", "conntrack"], "no value here"),
        (["sysctl", "ip_forward=1"], "`bpfvs sysctl`"),
        (["sysctl", "net.ipv4.ip_forward"], "`bpfvs sysctl`"),
    ] {
        let output = bpfvs.output(&words)?;
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{words:?}: {output:?}");
        ensure!(complaint.lines().count() == 1 && complaint.contains(part), "{words:?}: {complaint}");
    }

    bpfvs.kill9()?;
    bpfvs.serve()?;
    ensure!(sysctl(&bpfvs, &["-a"])? == all, "another daemon has other values:\n{}", sysctl(&bpfvs, &["-a"])?);
    Ok(())
}

/// A service with both real servers, and two connections. Returns the client of the first.
fn begin(bench: &Bench, family: Family, options: &str) -> Result<SocketAddr> {
    let addresses = Addresses::of(family);
    let vip = socket(addresses.vip, 80);
    bench.bpfvs.ipvsadm(&format!("-A -t {vip} -s rr {options}"))?;
    for server in addresses.servers {
        bench.bpfvs.ipvsadm(&format!("-a -t {vip} -r {}:80 -g", bracketed(server)))?;
    }
    bench.bpfvs.wait_for_servers()?;
    for port in [1024, 1025] {
        for flags in [SYN, ACK] {
            let verdict = send(bench, Hook::Tc, socket(addresses.client, port), vip, flags)?;
            ensure!(verdict == Verdict::Send, "{family:?}: port {port} was not balanced: {verdict:?}");
        }
    }
    Ok(socket(addresses.client, 1024))
}

fn send(bench: &Bench, hook: Hook, client: SocketAddr, vip: SocketAddr, flags: u8) -> Result<Verdict> {
    let frame = Frame::tcp(client, vip, flags).build();
    Ok(bench.director.enter(|| bench.pinned.run(hook, &frame))?.verdict)
}

fn entries(bench: &Bench, server: &str) -> Result<usize> {
    let server = format!(" {}:80", bracketed(server));
    Ok(bench.bpfvs.ipvsadm("-Lnc")?.lines().filter(|line| line.ends_with(&server)).count())
}

#[test]
fn connections_and_templates_go_with_their_real_server() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = Bench::new(&[])?;
    // The client of a persistent service has both connections, and its template, at one real server: the newest is the first.
    for (family, options, count) in [(Family::Ipv4, "", 1), (Family::Ipv6, "-p 300", 3)] {
        let Addresses { vip, servers: [left, gone], .. } = Addresses::of(family);
        let vip = socket(vip, 80);
        let client = begin(&bench, family, options)?;
        let before = entries(&bench, gone)?;
        ensure!(before == count, "{family:?}: {before} entries");

        // Without it, they are left to die, and their packets are dropped.
        bench.bpfvs.ipvsadm(&format!("-d -t {vip} -r {}:80", bracketed(gone)))?;
        for hook in Hook::ALL {
            ensure!(send(&bench, hook, client, vip, ACK)? == Verdict::Drop, "{family:?}, {hook:?}: it goes on");
        }
        ensure!(entries(&bench, gone)? == before, "{family:?}: {} of {before} entries are left", entries(&bench, gone)?);

        // With it, at once: packets are nobody's, and the director's own stack answers them.
        bench.bpfvs.succeed(&["sysctl", "expire_nodest_conn=1"])?;
        let nobodys = || entries(&bench, gone).is_ok_and(|count| count == 0);
        wait::until("the connections of a removed real server to go", wait::SOON, nobodys)?;
        for hook in Hook::ALL {
            ensure!(send(&bench, hook, client, vip, ACK)? == Verdict::Pass, "{family:?}, {hook:?}: it is not forgotten");
        }

        // A new connection in the place of one to a real server of weight 0.
        bench.bpfvs.ipvsadm(&format!("-a -t {vip} -r {}:80 -g -w 0", bracketed(gone)))?;
        bench.bpfvs.wait_for_servers()?;
        for flags in [SYN, ACK] {
            send(&bench, Hook::Xdp, client, vip, flags)?;
        }
        bench.bpfvs.succeed(&["sysctl", "expire_quiescent_template=1"])?;
        for server in [left, gone] {
            bench.bpfvs.ipvsadm(&format!("-e -t {vip} -r {}:80 -g -w 0", bracketed(server)))?;
            let other = if server == left { gone } else { left };
            bench.bpfvs.ipvsadm(&format!("-e -t {vip} -r {}:80 -g -w 1", bracketed(other)))?;
            ensure!(send(&bench, Hook::Xdp, client, vip, SYN)? == Verdict::Send);
            let listed = bench.bpfvs.ipvsadm("-Lnc")?;
            let row = listed.lines().find(|line| line.contains(&format!(" {client} "))).context("it is listed")?;
            ensure!(row.contains("SYN_RECV") && row.ends_with(&format!(" {}:80", bracketed(other))), "{family:?}: {row}");
        }
        for setting in ["expire_nodest_conn=0", "expire_quiescent_template=0"] {
            bench.bpfvs.succeed(&["sysctl", setting])?;
        }
    }
    Ok(())
}
