//! Two directors: one tells the other what connections there are, and the other goes on with them when it gets the addresses.

use std::{
    net::{IpAddr, Ipv4Addr, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    balanced::Balanced,
    bpfvs::Bpfvs,
    lab::{Family, Lab, Layout},
    needs, needs_bpfvs,
    netns::Namespace,
    programs::{Download, curl, curl_times, host},
    wait,
};
use serde_json::Value;

/// How long a backup may take to learn of something. The master looks each second.
const TOLD: Duration = Duration::from_secs(20);

/// Two directors with the same services, each of which tells the other. The first has the addresses.
struct Pair {
    second: Bpfvs,
    first: Balanced,
    second_director: Namespace,
}

impl Pair {
    fn new(layout: Layout, method: &str, options: &str) -> Result<Self> {
        let first = Balanced::in_lab(Lab::new(layout, 2)?, &["--max-connections", "65536"])?;
        let second_director = first.lab.second_director()?;
        let second = Bpfvs::start(&second_director, &["--max-connections", "65536"])?;
        let pair = Self { second, first, second_director };
        for (director, own, other) in [(&pair.first.bpfvs, 1, 2), (&pair.second, 2, 1)] {
            director.ipvsadm(&format!("--start-daemon master --mcast-interface eth0 --syncid {own}"))?;
            director.ipvsadm(&format!("--start-daemon backup --mcast-interface eth0 --syncid {other}"))?;
            for family in Family::ALL {
                let vip = host(pair.first.lab.vip.of(family));
                director.ipvsadm(&format!("-A -t {vip}:80 -s rr {options}"))?;
            }
            for number in [1, 2] {
                pair.add_server(director, number, method)?;
            }
        }
        Ok(pair)
    }

    fn add_server(&self, director: &Bpfvs, number: usize, method: &str) -> Result<()> {
        for family in Family::ALL {
            director.ipvsadm(&format!("-a {} {method}", self.first.server(number, family)))?;
        }
        director.wait_for_servers()
    }

    /// The addresses move to the second director.
    fn fail_over(&self) -> Result<()> {
        self.first.lab.fail_over(&self.second_director)
    }

    /// What both know, for people.
    fn account(&self) -> String {
        let known = |director: &Bpfvs| {
            let entries = director.ipvsadm("-Lnc").unwrap_or_default();
            entries
                + &director.succeed(&["status"]).unwrap_or_default()
                + &director.succeed(&["stats", "--reasons"]).unwrap_or_default()
        };
        format!("the first knows\n{}the second knows\n{}", known(&self.first.bpfvs), known(&self.second))
    }

    fn vip(&self, family: Family) -> IpAddr {
        self.first.lab.vip.of(family)
    }
}

/// What a director knows of the connections, or templates, to a virtual address.
fn entries(director: &Bpfvs, vip: IpAddr, template: bool) -> Result<Vec<Value>> {
    let Value::Array(entries) = director.get("/v1/connections")? else { return Ok(Vec::new()) };
    let vip = vip.to_string();
    Ok(entries.into_iter().filter(|entry| entry["vip"] == *vip && entry["template"] == template).collect())
}

/// Waits until a director knows the only connection to an address in this state.
fn wait_for_state(director: &Bpfvs, vip: IpAddr, state: &str) -> Result<Value> {
    let mut last = Vec::new();
    wait::for_some(&format!("a connection to {vip} to be {state}"), TOLD, || {
        last = entries(director, vip, false).unwrap_or_default();
        last.iter().find(|entry| entry["state"] == state).cloned()
    })
    .with_context(|| format!("it knows {last:?}"))
}

/// Active connections of all real servers of an address, and packets that came for them.
fn sums(director: &Bpfvs, vip: IpAddr) -> Result<(u64, u64, u64)> {
    let services = director.get("/v1/services")?;
    let service = services.as_array().into_iter().flatten().find(|service| service["id"]["address"]["address"] == vip.to_string());
    let service = service.with_context(|| format!("no service at {vip} in {services}"))?;
    let servers = service["servers"].as_array().context("servers")?;
    let sum = |name: &str| servers.iter().filter_map(|server| server[name].as_u64()).sum();
    let packets = service["traffic"]["totals"]["packets_in"].as_u64().context("packets")?;
    Ok((sum("active"), sum("inactive"), packets))
}

/// A transfer goes on when the addresses move, on the same real server, and the first director hears of its end.
fn a_transfer_survives(layout: Layout, method: &str) -> Result<()> {
    let pair = Pair::new(layout, method, "")?;
    let client = &pair.first.lab.client;
    let downloads = Family::ALL.map(|family| Download::start(client, pair.vip(family), "slow"));
    for (family, download) in Family::ALL.into_iter().zip(&downloads) {
        let download = download.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
        download.wait_for_bytes(100_000).with_context(|| pair.account())?;
        let own = wait_for_state(&pair.first.bpfvs, pair.vip(family), "ESTABLISHED")?;
        let told = wait_for_state(&pair.second, pair.vip(family), "ESTABLISHED")?;
        for name in ["protocol", "client", "client_port", "vip_port", "server", "server_port", "active"] {
            ensure!(own[name] == told[name], "{name}: {own} was told as {told}");
        }
        let remaining = |entry: &Value| entry["expires"].as_u64().unwrap_or_default();
        ensure!(remaining(&own).abs_diff(remaining(&told)) < 10, "{own} was told as {told}");
        ensure!(sums(&pair.second, pair.vip(family))? == (1, 0, 0), "the counters of the second director");
    }
    pair.fail_over()?;
    for (family, download) in Family::ALL.into_iter().zip(downloads) {
        let download = download?;
        download.wait_for_bytes(download.received() + (1 << 20)).with_context(|| format!("{family:?}: {}", pair.account()))?;
        let (active, _, packets) = sums(&pair.second, pair.vip(family))?;
        ensure!(active == 1 && packets > 0, "{family:?}: {active} active connections, {packets} packets by the second director");
        drop(download);
        let vip = pair.vip(family);
        let state = |director| Some(entries(director, vip, false).ok()?.pop()?["state"].clone());
        // CLOSE is over so soon that it may never be told.
        wait::until("both to know how the connection ended", TOLD, || {
            let [told, own] = [&pair.first.bpfvs, &pair.second].map(state);
            own.as_ref().is_none_or(|own| own == "CLOSE") || own == told && own.is_some_and(|own| own != "ESTABLISHED")
        })
        .with_context(|| pair.account())?;
    }
    Ok(())
}

#[test]
fn direct_routing_goes_on() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    a_transfer_survives(Layout::OneSegment, "-g")
}

#[test]
fn masquerading_goes_on() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    a_transfer_survives(Layout::Masquerade, "-m")
}

/// By round robin, the second director would send the client to the other real server.
#[test]
fn a_client_stays_with_its_real_server() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let pair = Pair::new(Layout::OneSegment, "-g", "-p 300")?;
    let directors = [&pair.first.bpfvs, &pair.second];
    for family in Family::ALL {
        directors.iter().try_for_each(|director| director.ipvsadm(&format!("-d {}", pair.first.server(2, family))).map(|_| ()))?;
        ensure!(curl(&pair.first.lab.client, pair.vip(family))? == "rs1");
    }
    directors.iter().try_for_each(|director| pair.add_server(director, 2, "-g"))?;
    for family in Family::ALL {
        let vip = pair.vip(family);
        let own = entries(&pair.first.bpfvs, vip, true)?;
        let told = wait::for_some("a template that is assured", TOLD, || {
            entries(&pair.second, vip, true).ok()?.pop().filter(|template| template["state"] == "ASSURED")
        })?;
        ensure!(own.len() == 1, "{own:?}");
        for name in ["protocol", "client", "client_port", "vip_port", "server", "server_port"] {
            ensure!(own[0][name] == told[name], "{name}: {} was told as {told}", own[0]);
        }
    }
    pair.fail_over()?;
    for family in Family::ALL {
        let answers = curl_times(&pair.first.lab.client, pair.vip(family), 3)?;
        ensure!(answers == ["rs1"; 3], "{family:?}: {answers:?}");
    }
    Ok(())
}

/// What comes from the network, and what is not known here, is counted and does no harm.
#[test]
fn what_cannot_be_taken_over_is_counted() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let pair = Pair::new(Layout::OneSegment, "-g", "")?;
    let vip = host(pair.vip(Family::Ipv4));
    pair.second.ipvsadm(&format!("-D -t {vip}:80"))?;
    for number in [1, 2] {
        pair.second.ipvsadm(&format!("-d {}", pair.first.server(number, Family::Ipv6)))?;
    }
    for family in Family::ALL {
        curl(&pair.first.lab.client, pair.vip(family))?;
    }
    // A stranger's messages, with the right sync id and the wrong one, of version 0, and no message at all.
    let good = "0001002c 01010000 00060024 00000103 0001 03e8 0050 0050 00000000 00000384 0a090002 0a630001 0a010001";
    let bytes = |text: &str| -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).filter_map(|pair| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok()).collect()
    };
    let mut other_id = bytes(good);
    other_id[1] = 9;
    let mut version = bytes(good);
    version[0] = 1;
    let messages = [bytes(good), other_id, version, b"hello".to_vec(), Vec::new()];
    pair.first.lab.director.enter(|| -> Result<()> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        for message in messages {
            socket.send_to(&message, (Ipv4Addr::new(224, 0, 0, 81), 8848))?;
        }
        Ok(())
    })?;
    let mut last = Value::Null;
    wait::until("what is refused to be counted", TOLD, || {
        last = pair.second.get("/v1/sync-daemons").unwrap_or_default()[1].clone();
        let count = |reason: &str| last["refused"][reason].as_u64().unwrap_or_default();
        count("no_service") >= 2
            && count("no_server") >= 1
            && count("other_sync_id") == 1
            && count("version") == 1
            && count("malformed") == 2
    })
    .with_context(|| format!("the backup says {last:#}"))?;
    ensure!(pair.second.ipvsadm("-Lnc")?.lines().count() == 2, "nothing was taken over");
    let status = pair.second.succeed(&["status"])?;
    ensure!(status.contains("backup       eth0") && status.contains("no_server 1"), "{status}");
    Ok(())
}

/// A stranger who speaks IPVS's protocol, in the segment of a director.
struct Master {
    namespace: Namespace,
}

/// The flags of an entry.
const ROUTE: u32 = 0x83;
const INACTIVE: u32 = 0x100;
const TEMPLATE: u32 = 0x1000;
/// States of TCP.
const ESTABLISHED: u16 = 1;
const FIN_WAIT: u16 = 4;

impl Master {
    /// Tells of a connection from 192.0.2.9, or a template of it.
    fn tell(&self, flags: u32, state: u16, client_port: u16, server: u8, timeout: u32) -> Result<()> {
        let mut message = vec![0, 5, 0, 44, 1, 1, 0, 0, 0, 6, 0, 36];
        message.extend(flags.to_be_bytes());
        for number in [state, client_port, 80, 80] {
            message.extend(number.to_be_bytes());
        }
        message.extend([0; 4]);
        message.extend(timeout.to_be_bytes());
        message.extend([192, 0, 2, 9, 10, 9, 9, 9, 10, 0, 0, server]);
        self.namespace.enter(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.send_to(&message, (Ipv4Addr::new(224, 0, 0, 81), 8848))
        })?;
        Ok(())
    }
}

/// What a message makes of what is known, step by step.
#[test]
fn messages_become_connections() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let (director, master) = (Namespace::new("director")?, Master { namespace: Namespace::new("master")? });
    director.connect("eth0", &master.namespace, "eth0")?;
    director.ip("addr add 10.0.0.204/24 dev eth0")?;
    master.namespace.ip("addr add 10.0.0.203/24 dev eth0\nroute add default dev eth0")?;
    let bpfvs = Bpfvs::start(&director, &["--max-connections", "3"])?;
    bpfvs.restore(
        "-A -t 10.9.9.9:80 -s rr -p 60\n-a -t 10.9.9.9:80 -r 10.0.0.1:80 -g\n-a -t 10.9.9.9:80 -r 10.0.0.2:80 -g\n\
         --start-daemon backup --mcast-interface eth0 --syncid 5",
    )?;
    // After each message: the entries, and active, inactive and persistent ones of both real servers.
    let after = |expected: &[&str], counts: [[u64; 3]; 2]| -> Result<()> {
        let mut last = (Vec::new(), Vec::new());
        wait::until("what was told to be known", wait::SOON, || {
            let listing = bpfvs.ipvsadm("-Lnc").unwrap_or_default();
            let mut entries: Vec<String> = listing.lines().skip(2).map(words_without_time).collect();
            entries.sort();
            let services = bpfvs.get("/v1/services").unwrap_or_default();
            let servers = services[0]["servers"].as_array().cloned().unwrap_or_default();
            let numbers = |server: &Value| ["active", "inactive", "persistent"].map(|name| server[name].as_u64().unwrap_or(9));
            last = (entries, servers.iter().rev().map(numbers).collect());
            last.0 == expected && last.1 == counts
        })
        .with_context(|| format!("{expected:?} {counts:?} became {last:?}"))
    };
    master.tell(ROUTE, ESTABLISHED, 1000, 1, 900)?;
    after(&["TCP ESTABLISHED 192.0.2.9:1000 10.0.0.1:80"], [[1, 0, 0], [0, 0, 0]])?;
    // Another state; the time that is left is told.
    master.tell(ROUTE | INACTIVE, FIN_WAIT, 1000, 1, 30)?;
    after(&["TCP FIN_WAIT 192.0.2.9:1000 10.0.0.1:80"], [[0, 1, 0], [0, 0, 0]])?;
    let expires = entries(&bpfvs, [10, 9, 9, 9].into(), false)?[0]["expires"].as_u64().context("a time")?;
    ensure!((20..=30).contains(&expires), "{expires} s are left of 30");
    // The end of a connection with another server is not this one's; its beginning is.
    master.tell(ROUTE | INACTIVE, FIN_WAIT, 1000, 2, 120)?;
    master.tell(ROUTE | TEMPLATE | INACTIVE, 0, 0, 1, 50)?;
    after(&["TCP FIN_WAIT 192.0.2.9:1000 10.0.0.1:80", "TCP NONE 192.0.2.9:0 10.0.0.1:80"], [[0, 1, 1], [0, 0, 0]])?;
    master.tell(ROUTE, ESTABLISHED, 1000, 2, 900)?;
    after(&["TCP ESTABLISHED 192.0.2.9:1000 10.0.0.2:80", "TCP NONE 192.0.2.9:0 10.0.0.1:80"], [[0, 0, 1], [1, 0, 0]])?;
    // A template that leads elsewhere, and is assured.
    master.tell(ROUTE | TEMPLATE | INACTIVE, 1, 0, 2, 60)?;
    after(&["TCP ASSURED 192.0.2.9:0 10.0.0.2:80", "TCP ESTABLISHED 192.0.2.9:1000 10.0.0.2:80"], [[0, 0, 0], [1, 0, 1]])?;
    // No state of TCP's; then more than there is room for.
    master.tell(ROUTE, 11, 1001, 1, 60)?;
    (1002..1010).try_for_each(|port| master.tell(ROUTE, ESTABLISHED, port, 1, 900))?;
    wait::until("the table to be full", wait::SOON, || {
        let daemon = bpfvs.get("/v1/sync-daemons").unwrap_or_default()[0].clone();
        let count = |reason: &str| daemon["refused"][reason].as_u64().unwrap_or_default();
        daemon["messages"] == 15 && count("table_full") >= 1 && count("unsupported") == 1 && count("stale") == 1
    })
    .with_context(|| format!("{:#}", bpfvs.get("/v1/sync-daemons").unwrap_or_default()))
}

/// Protocol, state, client and real server of a line of `ipvsadm -Lnc`.
fn words_without_time(line: &str) -> String {
    let words: Vec<_> = line.split_whitespace().collect();
    [0, 2, 3, 5].map(|place| words.get(place).copied().unwrap_or_default()).join(" ")
}

/// The daemons outlive `-C` and a killed bpfvs, and end by `--stop-daemon`.
#[test]
fn they_come_back_with_the_daemon() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let (director, other) = (Namespace::new("director")?, Namespace::new("other")?);
    director.connect("eth0", &other, "eth0")?;
    director.ip("addr add 10.0.0.204/24 dev eth0")?;
    let mut bpfvs = Bpfvs::start(&director, &["--max-connections", "1024"])?;
    bpfvs.ipvsadm("--start-daemon master --mcast-interface eth0 --syncid 7 --mcast-ttl 2")?;
    bpfvs.ipvsadm("--start-daemon backup --mcast-interface eth0 --mcast-group ff02::99 --mcast-port 9000")?;
    let listing = bpfvs.ipvsadm("-L --daemon")?;
    bpfvs.ipvsadm("-C")?;
    ensure!(bpfvs.ipvsadm("-S -n")?.is_empty() && bpfvs.ipvsadm("-L --daemon")? == listing, "{listing}");
    bpfvs.kill9()?;
    // An interface that is gone is waited for.
    director.ip("link del eth0")?;
    bpfvs.serve()?;
    ensure!(bpfvs.ipvsadm("-L --daemon")? == listing);
    let obstacles = || -> Result<Vec<bool>> {
        let daemons = bpfvs.get("/v1/sync-daemons")?;
        Ok(daemons.as_array().into_iter().flatten().map(|daemon| daemon["obstacle"].is_string()).collect())
    };
    wait::until("both to say what holds them up", wait::SOON, || obstacles().is_ok_and(|obstacles| obstacles == [true, true]))?;
    director.connect("eth0", &other, "eth0")?;
    wait::until("both to go on", wait::SOON, || obstacles().is_ok_and(|obstacles| obstacles == [false, false]))?;
    bpfvs.ipvsadm("--stop-daemon master")?;
    ensure!(bpfvs.ipvsadm("-L --daemon")?.lines().count() == 1);
    bpfvs.ipvsadm("--stop-daemon backup")?;
    bpfvs.kill9()?;
    bpfvs.serve()?;
    ensure!(bpfvs.ipvsadm("-L --daemon")?.is_empty());
    Ok(())
}
