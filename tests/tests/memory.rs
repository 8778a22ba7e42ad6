//! `--memory on-demand`: the tables of connections grow and shrink with what is in them. (What a full one does, the flood tests say.)

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use bpfvs_tests::{
    bench::{Addresses, Bench, socket},
    bpfvs::Bpfvs,
    frame::{ACK, Frame, SYN},
    lab::Family,
    needs, needs_bpfvs,
    netns::Namespace,
    speed::{harness::Harness, stage::round},
    test_run::Hook,
    wait,
};
use lb_common::floor::Round;

const FLOWS: u64 = 1 << 16;
/// Connections that fit.
const ROOM: u64 = 1 << 18;
/// What a connection of IPv4 takes at least: the kernel's element, key and value.
const ELEMENT: u64 = 80;

/// The kernel says how much it is since Linux 6.4; before that, it reckons with a full table.
#[test]
fn tables_grow_and_shrink_with_their_connections() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let room = ROOM.to_string();
    let bench = Bench::new(&["--memory", "on-demand", "--max-connections", &room, "--max-half-open", &room])?;
    let addresses = Addresses::of(Family::Ipv4);
    bench.bpfvs.ipvsadm(&format!("-A -t {}:80 -s rr", addresses.vip))?;
    bench.bpfvs.ipvsadm(&format!("-a -t {}:80 -r {} -g", addresses.vip, addresses.servers[0]))?;
    bench.bpfvs.wait_for_servers()?;
    let memory = || bench.pinned.memory("CONNECTIONS_V4");
    let empty = memory()?;
    ensure!(empty < ROOM * ELEMENT / 2, "the empty table takes {empty} bytes");

    let (client, vip): (SocketAddr, _) = ("10.9.0.0:1".parse()?, socket(addresses.vip, 80));
    let mut harness = Harness::load(1)?;
    harness.test(Hook::Xdp, bench.pinned.descriptor(Hook::Xdp)?)?;
    for flags in [SYN, ACK] {
        let frame = Frame { payload: vec![0; 10], ..Frame::tcp(client, vip, flags) }.build();
        harness.begin(&Round { flows: FLOWS, first_client: 0x0a09_0000, port: 80_u16.to_be(), ..round(&frame) })?;
        bench.director.enter(|| harness.run(Hook::Xdp, &frame, FLOWS as u32))?;
    }
    let connections = bench.pinned.connections_v4()?.len() as u64;
    ensure!(connections == FLOWS, "{connections} of {FLOWS} connections have come");
    let full = memory()?;
    ensure!(full >= empty + FLOWS * ELEMENT, "{FLOWS} connections take {full} bytes, none {empty}");

    bench.bpfvs.ipvsadm("--set 1 1 1")?;
    wait::until("the memory to be given back", wait::SOON, || memory().is_ok_and(|memory| memory <= empty + (1 << 20)))
}

#[test]
fn tables_at_work_keep_their_way() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let director = Namespace::new("memory")?;
    let mut first = Bpfvs::start(&director, &["--memory", "on-demand"])?;
    ensure!(first.get("/v1/status")?["memory"] == "on-demand", "{}", first.log());
    first.stop()?;
    let second = Bpfvs::start(&director, &["--memory", "at-start"])?;
    ensure!(second.get("/v1/status")?["memory"] == "on-demand", "{}", second.log());
    ensure!(
        second.log().contains("take their memory on demand, as they were made to, instead of at the start"),
        "{}",
        second.log()
    );
    Ok(())
}
