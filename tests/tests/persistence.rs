//! Persistence: clients stay with their real servers, by IPVS's rules, also when two CPUs, a restart or an operator get in between.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    balanced::Balanced,
    bench::{Addresses, Bench, bracketed},
    frame::{ACK, Frame, SYN},
    lab::{Family, Layout},
    needs, needs_bpfvs,
    programs::{curl_port, host},
    test_run::{Hook, Verdict},
    wait,
};
use lb_common::{
    config::flags,
    family::{ipv4, ipv6},
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

/// A persistent service on port 80 of a family's virtual address, with both real servers.
struct Service<'a> {
    bench: &'a Bench,
    family: Family,
    vip: SocketAddr,
    /// Index of the first real server.
    first: u32,
}

impl<'a> Service<'a> {
    fn new(bench: &'a Bench, family: Family, options: &str) -> Result<Self> {
        let addresses = Addresses::of(family);
        let mut service = Self { bench, family, vip: SocketAddr::new(addresses.vip.parse()?, 80), first: 0 };
        bench.bpfvs.ipvsadm(&format!("-A -t {} -s rr {options}", service.vip))?;
        for server in addresses.servers {
            bench.bpfvs.ipvsadm(&format!("-a -t {} -r {}:80 -g", service.vip, bracketed(server)))?;
        }
        bench.bpfvs.wait_for_servers()?;
        service.first = bench.server_index(addresses.servers[0])?;
        Ok(service)
    }

    /// The real server's part of an `ipvsadm` line.
    fn server(&self, number: usize) -> String {
        format!("-t {} -r {}:80", self.vip, bracketed(Addresses::of(self.family).servers[number]))
    }

    /// A client's first packet; nothing comes back if nobody takes it.
    fn open(&self, hook: Hook, client: SocketAddr) -> Result<Option<usize>> {
        let frame = Frame::tcp(client, self.vip, SYN).build();
        let verdict = self.bench.director.enter(|| self.bench.pinned.run(hook, &frame))?.verdict;
        ensure!(matches!(verdict, Verdict::Send), "the verdict is {verdict:?}");
        let Some(index) = self.bench.pinned.server_of(client, self.vip.port())? else { return Ok(None) };
        Ok(Some(usize::from(index != self.first)))
    }

    fn client(&self, number: u16, port: u16) -> SocketAddr {
        let address = match self.family {
            Family::Ipv4 => Ipv4Addr::from(0x0a09_0000 + u32::from(number)).into(),
            Family::Ipv6 => Ipv6Addr::new(0xfd09, 0, 0, number, 0, 0, 0, 2).into(),
        };
        SocketAddr::new(address, port)
    }
}

#[test]
fn a_client_stays_with_its_real_server() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = Bench::new(&[])?;
    for family in Family::ALL {
        let service = Service::new(&bench, family, "-p 300")?;
        let mut port = 1000;
        let mut open = |hook, client| {
            port += 1;
            service.open(hook, service.client(client, port))
        };
        for hook in Hook::ALL {
            let base = if hook == Hook::Xdp { 10 } else { 20 };
            // Round robin for clients; each that has been there goes where it was.
            let servers = [1, 2, 1, 3, 2, 1].map(|client| open(hook, base + client));
            let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
            ensure!(servers == [1, 0, 1, 1, 0, 1].map(Some) || servers == [0, 1, 0, 0, 1, 0].map(Some), "{family:?}: {servers:?}");
        }
    }
    Ok(())
}

/// Ten thousand clients, twenty in each network.
#[test]
fn networks_are_spread_and_stick() -> Result<()> {
    const NETWORKS: u16 = 500;
    const CLIENTS: u16 = 20;
    needs!(root);
    needs_bpfvs!();
    let bench = Bench::new(&[])?;
    for (family, mask) in [(Family::Ipv4, "255.255.255.0"), (Family::Ipv6, "64")] {
        let service = Service::new(&bench, family, &format!("-p 300 -M {mask}"))?;
        let address = |network: u16, client: u16| -> IpAddr {
            match family {
                Family::Ipv4 => Ipv4Addr::from(0x1400_0000 | u32::from(network) << 8 | u32::from(client)).into(),
                Family::Ipv6 => Ipv6Addr::new(0x2001, 0xdb8, 0, network, client, 0, 0, 1).into(),
            }
        };
        let mut buffer = vec![0; 4096];
        bench.director.enter(|| {
            for client in 0..CLIENTS {
                for network in 0..NETWORKS {
                    let frame = Frame::tcp(SocketAddr::new(address(network, client), 1024), service.vip, SYN).build();
                    let hook = Hook::ALL[usize::from(client % 2)];
                    let (verdict, _) = bench.pinned.run_into(hook, &frame, &mut buffer)?;
                    ensure!(verdict == Verdict::Send, "{family:?}, client {client} of network {network}: {verdict:?}");
                }
            }
            Ok(())
        })?;
        let connections: Vec<(IpAddr, u32)> = match family {
            Family::Ipv4 => {
                let all = bench.pinned.connections_v4()?;
                all.iter().map(|(key, connection)| (Ipv4Addr::from(key.client.to_ne_bytes()).into(), connection.server)).collect()
            }
            Family::Ipv6 => {
                let address = |words: [u32; 4]| {
                    let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
                    Ipv6Addr::from(<[u8; 16]>::try_from(bytes).expect("four words are sixteen bytes"))
                };
                let all = bench.pinned.connections_v6()?;
                all.iter().map(|(key, connection)| (address(key.client).into(), connection.server)).collect()
            }
        };
        ensure!(connections.len() == usize::from(NETWORKS * CLIENTS), "{family:?}: {} connections", connections.len());
        let mut networks: BTreeMap<IpAddr, BTreeSet<u32>> = BTreeMap::new();
        for (client, server) in connections {
            let network = match client {
                IpAddr::V4(client) => Ipv4Addr::from(u32::from(client) & 0xffff_ff00).into(),
                IpAddr::V6(client) => Ipv6Addr::from_bits(client.to_bits() >> 64 << 64).into(),
            };
            networks.entry(network).or_default().insert(server);
        }
        let parted: Vec<_> = networks.iter().filter(|(_, servers)| servers.len() != 1).collect();
        ensure!(parted.is_empty(), "{family:?}: networks with more than one real server: {parted:?}");
        let mut count: BTreeMap<u32, u32> = BTreeMap::new();
        networks.values().flatten().for_each(|server| *count.entry(*server).or_default() += 1);
        ensure!(count.values().eq(&[u32::from(NETWORKS) / 2; 2]), "{family:?}: networks of each real server: {count:?}");
        let listed = bench.bpfvs.succeed(&["persistence", "list", "--service", &format!("tcp://{}", service.vip)])?;
        ensure!(listed.lines().count() == usize::from(NETWORKS) + 1, "{family:?}: {} lines", listed.lines().count());
    }
    Ok(())
}

/// Two CPUs have a client's first connections at the same moment, time after time. Afterwards each client is with one real
/// server, also when all had to leave one that was removed.
#[test]
fn two_cpus_never_part_a_client() -> Result<()> {
    const BATCH: u16 = 2000;
    const LONGEST: Duration = Duration::from_secs(30);
    needs!(root);
    needs_bpfvs!();
    let cpus = thread::available_parallelism()?.get();
    if cpus < 2 {
        bpfvs_tests::skip!("one CPU can race with nobody");
    }
    let bench = Bench::new(&[])?;
    let service = Service::new(&bench, Family::Ipv4, "-p 300")?;
    let begin = Instant::now();
    let (mut clients, mut races) = (0, 0);
    // The first round is for clients that have no template, the second for those whose template leads nowhere.
    for (round, port) in [(1, 1024), (2, 2048)] {
        if round == 2 {
            bench.bpfvs.ipvsadm(&format!("-d {}", service.server(0)))?;
            bench.bpfvs.ipvsadm(&format!("-a -t {} -r 10.1.0.77:80 -g", service.vip))?;
            bench.bpfvs.ipvsadm(&format!("-a -t {} -r 10.1.0.254:80 -g", service.vip))?;
        }
        let picked_before = bench.pinned.first_cursor()?;
        let leaving = if round == 1 { 0 } else { led_nowhere(&bench, &service)? };
        let mut done = 0;
        while round == 1 && (races == 0 && begin.elapsed() < LONGEST || done == 0) || round == 2 && done < clients {
            race(&bench, &service, done..done + BATCH, port)?;
            done += BATCH;
            let picked = bench.pinned.first_cursor()?.wrapping_sub(picked_before);
            let needed = if round == 1 { u32::from(done) } else { leaving };
            races = picked.saturating_sub(needed);
        }
        println!("round {round}: {done} clients, {races} of them picked twice");
        clients = done;
        let mut servers: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        for (key, connection) in bench.pinned.connections_v4()? {
            if u16::from_be(key.ports.source()) / 1024 == port / 1024 {
                servers.entry(key.client).or_default().insert(connection.server);
            }
        }
        ensure!(servers.len() == usize::from(clients), "round {round}: {} of {clients} clients have connections", servers.len());
        let parted = servers.values().filter(|servers| servers.len() != 1).count();
        ensure!(parted == 0, "round {round}: {parted} of {clients} clients are parted");
        if round == 1 {
            ensure!(races > 0, "the two CPUs never met, so this test tests nothing");
        }
    }
    Ok(())
}

/// How many templates lead to the first real server, which was removed.
fn led_nowhere(bench: &Bench, service: &Service<'_>) -> Result<u32> {
    let [_, second] = Addresses::of(service.family).servers;
    let second = bench.server_index(second)?;
    let templates = bench.pinned.templates_v4()?;
    Ok(templates.iter().filter(|(_, template)| template.choice as u32 != second).count() as u32)
}

/// Each client begins two connections, one on each of two CPUs, as nearly at once as they can.
fn race(bench: &Bench, service: &Service<'_>, clients: std::ops::Range<u16>, port: u16) -> Result<()> {
    let here = AtomicU32::new(0);
    let run = |cpu: usize| -> Result<()> {
        bench.director.enter(|| {
            let mut set = CpuSet::new();
            set.set(cpu)?;
            sched_setaffinity(Pid::from_raw(0), &set).context("stay on one CPU")?;
            let mut buffer = vec![0; 4096];
            for (round, client) in clients.clone().enumerate() {
                let client = service.client(client, port + cpu as u16);
                let frame = Frame::tcp(client, service.vip, SYN).build();
                here.fetch_add(1, Ordering::AcqRel);
                while here.load(Ordering::Acquire) < 2 * (round as u32 + 1) {
                    std::hint::spin_loop();
                }
                bench.pinned.run_into(Hook::ALL[cpu], &frame, &mut buffer)?;
            }
            Ok(())
        })
    };
    thread::scope(|scope| {
        let other = scope.spawn(|| run(1));
        run(0)?;
        other.join().expect("nobody panics there")
    })
}

#[test]
fn weight_thresholds_and_removal() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = Bench::new(&[])?;
    for family in Family::ALL {
        let service = Service::new(&bench, family, "-p 300")?;
        let mut port = 1000;
        let mut open = |client| {
            port += 1;
            service.open(Hook::Tc, service.client(client, port))
        };
        let at = open(1)?.context("somebody takes it")?;
        let other = 1 - at;

        // A client that is persistent is not refused, whatever the weight and the thresholds say about new ones.
        bench.bpfvs.ipvsadm(&format!("-e {} -g -w 0", service.server(at)))?;
        ensure!(open(1)? == Some(at), "{family:?}: it left a real server of weight 0");
        ensure!([open(2)?, open(3)?] == [Some(other); 2], "{family:?}: a real server of weight 0 got a new client");
        bench.bpfvs.ipvsadm(&format!("-e {} -g -w 1 -x 1", service.server(at)))?;
        ensure!(open(1)? == Some(at), "{family:?}: it left a real server that is full");
        ensure!([open(4)?, open(5)?] == [Some(other); 2], "{family:?}: a full real server got a new client");

        // Unless the settings say so.
        bench.bpfvs.ipvsadm(&format!("-e {} -g -w 0", service.server(at)))?;
        bench.pinned.set_flags(flags::EXPIRE_QUIESCENT)?;
        ensure!(open(1)? == Some(other), "{family:?}: it stayed, with expire_quiescent_template");
        bench.pinned.set_flags(0)?;
        ensure!(open(1)? == Some(other), "{family:?}: it did not stay where it went then");
        // IPVS still lists the way that leads nowhere.
        let old: Vec<_> = templates(&bench)?.into_iter().filter(|(line, _)| line.contains(":65535 ")).collect();
        ensure!(old.len() == 1 && old[0].0.trim_end().ends_with(":65535") && (1..=300).contains(&old[0].1), "{family:?}: {old:?}");
        let counts = bench.template_counts()?;
        ensure!(counts.len() == 2 && counts.iter().sum::<u32>() == 6, "{family:?}: {counts:?}");

        // A real server that is removed loses its clients; those that come meanwhile stay where they went.
        bench.bpfvs.ipvsadm(&format!("-e {} -g -w 1", service.server(at)))?;
        let absent = (10..14).map(|client| Ok((client, open(client)?))).collect::<Result<Vec<_>>>()?;
        bench.bpfvs.ipvsadm(&format!("-d {}", service.server(at)))?;
        let moved = absent.iter().find(|(_, server)| *server == Some(at)).context("round robin")?.0;
        let waiting = absent.iter().rfind(|(_, server)| *server == Some(at)).context("round robin")?.0;
        ensure!(moved != waiting, "{absent:?}");
        ensure!(open(moved)? == Some(other), "{family:?}: it went to a removed real server");
        bench.bpfvs.ipvsadm(&format!("-a {} -g", service.server(at)))?;
        bench.bpfvs.wait_for_servers()?;
        ensure!(open(moved)? == Some(other), "{family:?}: it did not stay");
        ensure!(open(waiting)? == Some(at), "{family:?}: a real server that is back did not get its client back");

        // A client that was refused is free.
        bench.bpfvs.ipvsadm(&format!("-e {} -g -w 0", service.server(other)))?;
        bench.bpfvs.ipvsadm(&format!("-d {}", service.server(at)))?;
        ensure!(service.open(Hook::Tc, service.client(waiting, 1999))?.is_none(), "{family:?}: nobody is there");
        bench.bpfvs.ipvsadm(&format!("-a {} -g -w 0", service.server(at)))?;
        bench.bpfvs.ipvsadm(&format!("-e {} -g -w 1", service.server(other)))?;
        bench.bpfvs.wait_for_servers()?;
        ensure!(open(waiting)? == Some(other), "{family:?}: it went back to where it had left");
        let (waiting, at) = (waiting, other);

        // Templates outlive the services, as connections do.
        bench.bpfvs.ipvsadm(&format!("-D -t {}", service.vip))?;
        let service = Service::new(&bench, family, "-p 300")?;
        ensure!(service.open(Hook::Tc, service.client(waiting, 2000))? == Some(at), "{family:?}: the client is forgotten");
        bench.bpfvs.succeed(&["persistence", "flush", &format!("tcp://{}", service.vip)])?;
        let left = bench.pinned.templates_v4()?.len() + bench.pinned.templates_v6()?.len();
        ensure!(left == 0, "{family:?}: {left} templates are left");
        let counts = bench.template_counts()?;
        ensure!(counts == [0; 2], "{counts:?}");
        bench.bpfvs.ipvsadm("-C")?;
    }
    Ok(())
}

/// The lines of `-Lnc` about templates, with seconds that are left.
fn templates(bench: &Bench) -> Result<Vec<(String, u32)>> {
    let listed = bench.bpfvs.ipvsadm("-Lnc")?;
    let lines = listed.lines().filter(|line| line.contains(" NONE ") || line.contains(" ASSURED "));
    let seconds = |text: &str| -> Result<u32> {
        let (minutes, seconds) = text.split_once(':').context("minutes:seconds")?;
        Ok(minutes.parse::<u32>()? * 60 + seconds.parse::<u32>()?)
    };
    lines.map(|line| Ok((line.to_owned(), seconds(line.split_whitespace().nth(1).unwrap_or_default())?))).collect()
}

#[test]
fn a_template_ends_after_its_time_but_not_before_its_connections() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = Bench::new(&[])?;
    let service = Service::new(&bench, Family::Ipv4, "-p 2")?;
    let client = service.client(1, 1024);
    service.open(Hook::Tc, client)?;
    let [(line, seconds)] = &templates(&bench)?[..] else { anyhow::bail!("one template: {:?}", templates(&bench)?) };
    ensure!(line.contains(" NONE ") && *seconds <= 2, "{line}");
    let frame = Frame::tcp(client, service.vip, ACK).build();
    bench.director.enter(|| bench.pinned.run(Hook::Xdp, &frame))?;
    let (line, _) = &templates(&bench)?[0];
    ensure!(line.contains(" ASSURED "), "an established connection assures: {line}");

    // Its time is over, but its connection lives: a minute more.
    wait::until("a template whose connection lives", wait::SOON, || {
        templates(&bench).is_ok_and(|all| all.first().is_some_and(|(_, seconds)| (50..60).contains(seconds)))
    })?;
    thread::sleep(Duration::from_secs(3));
    ensure!(templates(&bench)?.len() == 1, "it went before its connection");
    // From now on that is its time, until it is made anew: 60 s with each new connection.
    service.open(Hook::Tc, service.client(1, 1025))?;
    ensure!(templates(&bench)?[0].1 > 55, "{:?}", templates(&bench)?);

    // Without a connection it ends after its time.
    bench.bpfvs.succeed(&["persistence", "flush"])?;
    bench.pinned.forget_connections()?;
    let at = service.open(Hook::Tc, service.client(2, 1024))?;
    bench.pinned.forget_connections()?;
    wait::until("the template to end", wait::SOON, || bench.pinned.templates_v4().is_ok_and(|all| all.is_empty()))?;
    let counts = bench.template_counts()?;
    ensure!(counts == [0; 2], "{counts:?}");
    ensure!(service.open(Hook::Tc, service.client(2, 1025))? != at, "round robin goes on");
    Ok(())
}

#[test]
fn templates_survive_the_daemon() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let mut bench = Bench::new(&[])?;
    let mut known = Vec::new();
    for family in Family::ALL {
        let service = Service::new(&bench, family, "-p 300")?;
        known.push((family, service.vip, service.first));
    }
    let open_all = |bench: &Bench, port: u16| -> Result<Vec<Option<usize>>> {
        let mut all = Vec::new();
        for &(family, vip, first) in &known {
            let service = Service { bench, family, vip, first };
            for client in 1..=5 {
                all.push(service.open(Hook::Tc, service.client(client, port))?);
            }
        }
        Ok(all)
    };
    let before = open_all(&bench, 1024)?;
    let counts = bench.template_counts()?;
    ensure!(counts.iter().sum::<u32>() == 10, "five clients of each family: {counts:?}");
    bench.bpfvs.kill9()?;
    ensure!(open_all(&bench, 1025)? == before, "without a daemon clients go elsewhere");
    bench.bpfvs.serve()?;
    ensure!(open_all(&bench, 1026)? == before, "with another daemon clients go elsewhere");
    let later = bench.template_counts()?;
    ensure!(later == counts, "{counts:?} became {later:?}");
    let is_for = |vip: IpAddr| match vip {
        IpAddr::V4(vip) => bench.pinned.templates_v4().is_ok_and(|all| all.iter().all(|(key, _)| key.vip == ipv4(vip))),
        IpAddr::V6(vip) => bench.pinned.templates_v6().is_ok_and(|all| all.iter().all(|(key, _)| key.vip == ipv6(vip))),
    };
    ensure!(known.iter().all(|(_, vip, _)| is_for(vip.ip())), "templates are for the virtual addresses");
    Ok(())
}

/// As people type it, with real requests: one real server for all ports of a client.
#[test]
fn a_service_of_all_ports_answers_from_one_real_server() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::OneSegment, 3, &[])?;
    for family in Family::ALL {
        let vip = balanced.lab.vip.of(family);
        balanced.bpfvs.ipvsadm(&format!("-A -t {}:0 -s rr -p 60", host(vip)))?;
        for address in &balanced.lab.server_addresses {
            balanced.bpfvs.ipvsadm(&format!("-a -t {}:0 -r {} -g", host(vip), address.of(family)))?;
        }
        balanced.bpfvs.wait_for_servers()?;
        for _ in 0..2 {
            let answers = [80, 8080, 80, 8080]
                .map(|port| curl_port(&balanced.lab.client, vip, port))
                .into_iter()
                .collect::<Result<BTreeSet<_>>>()?;
            ensure!(answers.len() == 1, "{family:?}: {answers:?}");
        }
        let listed = balanced.bpfvs.ipvsadm("-Lnc")?;
        let client = host(balanced.lab.client_address.of(family));
        let template = listed.lines().find(|line| line.contains(&format!(" {client}:0 "))).context("a template")?;
        ensure!(template.contains(" ASSURED ") && template.contains(&format!(" {}:0 ", host(vip))), "{template}");
    }
    Ok(())
}
