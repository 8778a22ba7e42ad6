//! As many real servers as an address has ports, in one service: from `ipvsadm -R` to the packet path, and back to the listing.
//!
//! Whether schedulers choose as IPVS does is the question of other tests (`scheduling.rs`, `vm_schedulers.rs`). Here it is
//! whether everything is large enough and quick enough, and whether the choices are still exact then.

use std::{
    collections::HashMap,
    fmt::Write as _,
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{arrivals::Arrivals, bench::Bench, needs, needs_bpfvs, wait};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// How many real servers there are.
const SERVERS: usize = 65_535;
const SERVICE: &str = "-t 10.99.0.1:80";
/// As far as a forecast looks ahead at most.
const FORECAST: usize = 8192;
/// What nobody would wait for. The daemon may be a debug build, and the machine may have other work.
const SLOW: Duration = Duration::from_secs(60);

/// Does one part of the test, says how long it took, and fails if that was slow.
fn timed<T>(what: &str, part: impl FnOnce() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    let result = part().with_context(|| what.to_owned())?;
    let seconds = begin.elapsed().as_secs_f64();
    println!("{what}: {seconds:.2} s");
    ensure!(begin.elapsed() < SLOW, "{what} took {seconds:.1} s");
    Ok(result)
}

/// Makes the service with all its real servers, which are behind one router.
fn restore(bench: &Bench) -> Result<()> {
    bench.director.ip("route add 10.64.0.0/16 via 10.1.0.1")?;
    let mut lines = format!("-A {SERVICE} -s wlc\n");
    for number in 1..=SERVERS as u32 {
        writeln!(lines, "-a {SERVICE} -r {} -g -w 1", Ipv4Addr::from(0x0a40_0000 + number))?;
    }
    timed("ipvsadm -R", || bench.bpfvs.restore(&lines))?;
    timed("the way to each real server", || {
        wait::until("every real server to be ready", SLOW, || bench.pinned.ready_servers().is_ok_and(|ready| ready == SERVERS))
    })
}

/// The indices of the real servers, the newest first.
fn newest_first(bench: &Bench) -> Result<Vec<u32>> {
    let services = bench.bpfvs.get("/v1/services")?;
    let servers = services[0]["servers"].as_array().context("the service has servers")?;
    let by_address = servers.iter().map(|server| {
        let address: Ipv4Addr = server["address"].as_str().context("a server has an address")?.parse()?;
        Ok((address, u32::try_from(server["index"].as_u64().context("a server has an index")?)?))
    });
    let mut by_address = by_address.collect::<Result<Vec<_>>>()?;
    // They were added in the order of their addresses.
    by_address.sort_unstable_by(|one, other| other.cmp(one));
    Ok(by_address.into_iter().map(|(_, index)| index).collect())
}

/// Waits until the daemon has taken in all that happened.
fn rest(bench: &Bench) -> Result<()> {
    wait::until("the daemon to sleep", SLOW, || bench.pinned.is_at_rest(0).unwrap_or(false))
}

/// Connections begin, faster than anybody can look: the daemon stands still meanwhile.
fn burst(bench: &Bench, arrivals: &mut Arrivals<'_>, count: usize) -> Result<Vec<SocketAddr>> {
    let daemon = Pid::from_raw(bench.bpfvs.pid()?.cast_signed());
    kill(daemon, Signal::SIGSTOP)?;
    let clients = (0..count).map(|_| arrivals.begin()).collect();
    kill(daemon, Signal::SIGCONT)?;
    clients
}

/// Who got these clients' connections.
fn servers_of(bench: &Bench, clients: &[SocketAddr]) -> Result<Vec<u32>> {
    let connections = bench.pinned.connections_v4()?.into_iter().map(|(key, connection)| {
        let client = SocketAddr::new(Ipv4Addr::from(key.client.to_ne_bytes()).into(), u16::from_be(key.ports.source()));
        (client, connection.server)
    });
    let servers: HashMap<_, _> = connections.collect();
    clients.iter().map(|client| servers.get(client).copied().with_context(|| format!("{client} has no connection"))).collect()
}

/// Where two sequences differ first.
fn difference(picked: &[u32], expected: &[u32]) -> Option<String> {
    let place = (0..expected.len()).find(|place| picked.get(*place) != expected.get(*place))?;
    Some(format!("connection {place} went to {:?} instead of {:?}", picked.get(place), expected.get(place)))
}

#[test]
fn one_service_has_65_535_real_servers() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    // More than a few begin connections here, and none goes on with one: it is no flood.
    let bench = Bench::new(&["--max-half-open", "1000000"])?;
    restore(&bench)?;
    let expected = newest_first(&bench)?;
    bench.director.enter(|| {
        let mut arrivals = Arrivals::new(&bench)?;
        for scheduler in ["wlc", "rr"] {
            bench.bpfvs.ipvsadm(&format!("-E {SERVICE} -s {scheduler}"))?;
            let clients = timed(&format!("a connection to each by {scheduler}"), || {
                let mut clients = Vec::new();
                while clients.len() < SERVERS {
                    if scheduler == "wlc" {
                        rest(&bench)?;
                    }
                    clients.extend(burst(&bench, &mut arrivals, FORECAST.min(SERVERS - clients.len()))?);
                }
                Ok(clients)
            })?;
            let difference = difference(&servers_of(&bench, &clients)?, &expected);
            ensure!(difference.is_none(), "{scheduler}: {}", difference.unwrap_or_default());
        }
        Ok(())
    })?;
    let listing = timed("ipvsadm -Ln", || bench.bpfvs.ipvsadm("-Ln"))?;
    let listed = listing.lines().filter(|line| line.trim_end().ends_with("Route   1      2          0")).count();
    ensure!(listed == SERVERS, "{listed} real servers are listed with two connections");
    Ok(())
}
