//! FULLNAT, with real programs: real servers that have no route but to their own segment, and all traffic through one local
//! address.

use std::{
    collections::HashSet,
    io::{Read, Write},
    net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    balanced::Balanced,
    both_ways,
    lab::{Family, Lab, Layout, Offloads, Twins},
    needs, needs_bpfvs,
    netns::Namespace,
    pass::PassProgram,
    programs::{Capture, Download, curl, curl_times, host},
    test_run::Pinned,
    wait,
};

/// An address beside the director's inner one.
fn local(lab: &Lab, number: u8) -> Twins {
    let [a, b, c, _] = lab.director_address.ipv4.octets();
    let mut segments = lab.director_address.ipv6.segments();
    segments[7] = 0x1000 + u16::from(number);
    Twins { ipv4: [a, b, c, number].into(), ipv6: Ipv6Addr::from(segments) }
}

/// Gives the director a local address.
fn add_local(balanced: &Balanced, number: u8, arguments: &[&str]) -> Result<Twins> {
    let twins = local(&balanced.lab, number);
    balanced.lab.director.ip(&format!("addr add {}/32 dev eth0\naddr add {}/128 dev eth0 nodad", twins.ipv4, twins.ipv6))?;
    let both = format!("{},{}", twins.ipv4, twins.ipv6);
    balanced.bpfvs.succeed(&[&["localaddr", "add", &both], arguments].concat())?;
    Ok(twins)
}

/// The how-to's layout for masquerading, but nobody has told the real servers of a gateway.
fn balanced(hook: &str) -> Result<(Balanced, Option<PassProgram>)> {
    let lab = Lab::new(Layout::Masquerade, 2)?;
    let pass = if hook == "xdp" { Some(lab.prepare_for_xdp()?) } else { None };
    for server in &lab.servers {
        server.ip("route del default\nroute del ::/0")?;
    }
    let balanced = Balanced::in_lab(lab, &["--hook", hook])?;
    add_local(&balanced, 230, &[])?;
    Ok((balanced, pass))
}

const FULLNAT: [&str; 2] = ["-m --fullnat", "-m --fullnat"];

/// Requests alternate, real servers see a local address only, and clients the virtual one.
fn the_how_to(hook: &str) -> Result<()> {
    let (balanced, _pass) = balanced(hook)?;
    for family in Family::ALL {
        let vip = host(balanced.lab.vip.of(family));
        for port in [80, 8080] {
            balanced.bpfvs.ipvsadm(&format!("-A -t {vip}:80 -s rr"))?;
            for address in &balanced.lab.server_addresses {
                balanced.bpfvs.ipvsadm(&format!("-a -t {vip}:80 -r {}:{port} -m --fullnat", host(address.of(family))))?;
            }
            balanced.bpfvs.wait_for_servers()?;
            let server = balanced.lab.server_addresses[1].of(family);
            let local = local(&balanced.lab, 230).of(family);
            let arriving = Capture::start(
                &balanced.lab.servers[1],
                "eth0",
                &format!("src host {local} and dst host {server} and tcp dst port {port}"),
            )?;
            let strangers =
                Capture::start(&balanced.lab.servers[1], "eth0", &format!("host {}", balanced.lab.client_address.of(family)))?;
            let inner = Capture::start(&balanced.lab.client, "eth0", &format!("host {server} or host {local}"))?;
            let answers = curl_times(&balanced.lab.client, balanced.lab.vip.of(family), 8)?;
            ensure!(answers == ["rs2", "rs1"].repeat(4), "{family:?}, port {port}: {answers:?}");
            arriving.wait_for(4 * 4)?;
            ensure!(strangers.finish()?.is_empty(), "{family:?}, port {port}: a real server meets the client's address");
            ensure!(inner.finish()?.is_empty(), "{family:?}, port {port}: the client meets an inner address");
            balanced.bpfvs.ipvsadm(&format!("-D -t {vip}:80"))?;
        }
    }
    Ok(())
}

#[test]
fn real_servers_need_no_route_through_the_director_at_tc() -> Result<()> {
    needs!(root, "nginx", "curl", "tcpdump");
    needs_bpfvs!();
    the_how_to("auto")
}

#[test]
fn real_servers_need_no_route_through_the_director_at_xdp() -> Result<()> {
    needs!(root, "nginx", "curl", "tcpdump", "ethtool");
    needs_bpfvs!();
    the_how_to("xdp")
}

/// Bulk TCP both ways, and content that is checked.
fn bulk(hook: &str, states: &[Offloads]) -> Result<()> {
    let (balanced, _pass) = balanced(hook)?;
    both_ways::bulk(&balanced, hook, &FULLNAT, states)
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

/// A narrow link behind the director, on either side: it tells the sender, who knows the local or the virtual address only.
#[test]
fn narrow_links_are_reported_to_either_side() -> Result<()> {
    needs!(root, "nginx", "curl", "ethtool");
    needs_bpfvs!();
    for narrow in ["eth0", "eth1"] {
        let (balanced, _pass) = balanced("auto")?;
        balanced.service("rr", &FULLNAT)?;
        balanced.lab.set_offloads(Offloads::Off)?;
        balanced.lab.director.ip(&format!("link set {narrow} mtu 1300"))?;
        both_ways::towards(&balanced, narrow)?;
    }
    Ok(())
}

/// A server that sends back what it gets.
struct Echo<'a> {
    namespace: &'a Namespace,
    address: SocketAddr,
}

/// How long anybody waits for a packet.
const PATIENCE: Duration = Duration::from_secs(10);

impl Echo<'_> {
    /// Echoes eight bytes of each TCP connection until `done`; notes who was connected.
    fn serve_tcp(&self, done: &AtomicBool, peers: &Mutex<Vec<SocketAddr>>, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let listener = self.namespace.enter(|| TcpListener::bind(self.address))?;
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while let Ok((mut stream, peer)) = listener.accept() {
                        if done.load(Ordering::Relaxed) {
                            break;
                        }
                        let mut token = [0; 8];
                        // Whatever fails here, the client sees.
                        let _ = stream.set_read_timeout(Some(PATIENCE));
                        let _ = stream.read_exact(&mut token).and_then(|()| stream.write_all(&token));
                        let _ = stream.read(&mut token);
                        peers.lock().expect("nobody panics with the lock").push(peer);
                    }
                });
            }
            let outcome = work();
            done.store(true, Ordering::Relaxed);
            for _ in 0..8 {
                // Each wakes one of the threads.
                let _ = self.namespace.enter(|| TcpStream::connect(self.address));
            }
            outcome
        })
    }
}

/// 50 000 short connections through one local address to one real server: none is lost, each gets its own answer, and no two
/// that live have the same port.
#[test]
fn fifty_thousand_short_connections_through_one_local_address() -> Result<()> {
    const CONNECTIONS: u32 = 50_000;
    needs!(root, "nginx");
    needs_bpfvs!();
    let (balanced, _pass) = balanced("auto")?;
    let lab = &balanced.lab;
    lab.client.sysctl(&[("net.ipv4.ip_local_port_range", "1024 65535")])?;
    let (vip, server) = (lab.vip.of(Family::Ipv4), lab.server_addresses[0].of(Family::Ipv4));
    balanced.bpfvs.ipvsadm(&format!("-A -t {vip}:7007 -s rr"))?;
    balanced.bpfvs.ipvsadm(&format!("-a -t {vip}:7007 -r {server}:7007 -m --fullnat"))?;
    balanced.bpfvs.wait_for_servers()?;
    let echo = Echo { namespace: &lab.servers[0], address: (server, 7007).into() };
    let (done, peers, next) = (AtomicBool::new(false), Mutex::new(Vec::new()), AtomicU32::new(0));
    let one = |number: u32| -> Result<()> {
        let mut stream = TcpStream::connect_timeout(&(vip, 7007).into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let token = (u64::from(number) << 32 | u64::from(number ^ 0x5a5a_5a5a)).to_be_bytes();
        stream.write_all(&token)?;
        let mut answer = [0; 8];
        stream.read_exact(&mut answer)?;
        ensure!(answer == token, "it got {answer:02x?} for {token:02x?}");
        stream.shutdown(Shutdown::Both).or(Ok(()))
    };
    let began = Instant::now();
    echo.serve_tcp(&done, &peers, || {
        lab.client.enter(|| {
            thread::scope(|scope| {
                let workers: Vec<_> = (0..8)
                    .map(|_| {
                        scope.spawn(|| -> Result<()> {
                            loop {
                                let number = next.fetch_add(1, Ordering::Relaxed);
                                if number >= CONNECTIONS {
                                    return Ok(());
                                }
                                one(number).with_context(|| format!("connection {number}"))?;
                            }
                        })
                    })
                    .collect();
                workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
            })
        })
    })?;
    println!("{CONNECTIONS} connections in {:.1} s", began.elapsed().as_secs_f64());
    let peers = peers.into_inner().expect("nobody panics with the lock");
    let from: HashSet<IpAddr> = peers.iter().map(SocketAddr::ip).collect();
    ensure!(from == HashSet::from([local(lab, 230).of(Family::Ipv4)]), "the real server was connected from {from:?}");
    ensure!(peers.len() == CONNECTIONS as usize, "the real server saw {} connections", peers.len());
    let live = Pinned::open(balanced.bpfvs.pins())?.connections_v4()?;
    let ports: HashSet<u32> = live.iter().map(|(_, connection)| connection.local.0).collect();
    println!("{} connections are not over yet", live.len());
    ensure!(ports.len() == live.len(), "{} of {} ports were given twice", live.len() - ports.len(), live.len());
    Ok(())
}

/// More conversations than there are ports: those that are over give theirs back, and nobody gets another's answer.
#[test]
fn ports_come_back_and_cross_no_two_conversations() -> Result<()> {
    const CONVERSATIONS: u32 = 70_000;
    needs!(root, "nginx");
    needs_bpfvs!();
    let (balanced, _pass) = balanced("auto")?;
    let lab = &balanced.lab;
    let (vip, server) = (lab.vip.of(Family::Ipv4), lab.server_addresses[0].of(Family::Ipv4));
    balanced.bpfvs.ipvsadm(&format!("-A -u {vip}:7007 -s rr"))?;
    balanced.bpfvs.ipvsadm(&format!("-a -u {vip}:7007 -r {server}:7007 -m --fullnat"))?;
    balanced.bpfvs.ipvsadm("--set 0 0 1")?;
    balanced.bpfvs.wait_for_servers()?;
    let socket = lab.servers[0].enter(|| UdpSocket::bind((server, 7007)))?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let done = AtomicBool::new(false);
    let ports = Mutex::new(vec![0_u32; 1 << 16]);
    thread::scope(|scope| -> Result<()> {
        scope.spawn(|| {
            let mut data = [0; 64];
            while !done.load(Ordering::Relaxed) {
                if let Ok((length, peer)) = socket.recv_from(&mut data) {
                    ports.lock().expect("nobody panics with the lock")[usize::from(peer.port())] += 1;
                    // Whatever fails here, the client sees.
                    let _ = socket.send_to(&data[..length], peer);
                }
            }
        });
        let outcome = lab.client.enter(|| -> Result<()> {
            for number in 0..CONVERSATIONS {
                let client = UdpSocket::bind((lab.client_address.of(Family::Ipv4), 0))?;
                client.connect((vip, 7007))?;
                client.set_read_timeout(Some(PATIENCE))?;
                client.send(&number.to_be_bytes())?;
                let mut answer = [0; 64];
                let length = client.recv(&mut answer).with_context(|| format!("conversation {number}"))?;
                ensure!(answer[..length] == number.to_be_bytes(), "conversation {number} got {:02x?}", &answer[..length]);
            }
            Ok(())
        });
        done.store(true, Ordering::Relaxed);
        outcome
    })?;
    let ports = ports.into_inner().expect("nobody panics with the lock");
    let (used, again) = (ports.iter().filter(|count| **count > 0).count(), ports.iter().filter(|count| **count > 1).count());
    println!("{CONVERSATIONS} conversations had {used} ports, {again} of them more than once");
    wait::until("all ports to be free again", Duration::from_secs(20), || {
        balanced.bpfvs.get("/v1/local-addresses").is_ok_and(|list| list["addresses"][0]["used"] == 0)
    })
}

/// A service's own addresses are its alone, and connections outlive the address, the daemon, and the pool.
#[test]
fn pools_change_and_connections_stay() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let (mut balanced, _pass) = balanced("auto")?;
    balanced.service("rr", &FULLNAT)?;
    let vip = balanced.lab.vip.of(Family::Ipv4);
    let service = format!("tcp://{vip}:80");
    add_local(&balanced, 231, &[])?;
    let [shared, other, own] = [230, 231, 232].map(|number| local(&balanced.lab, number).of(Family::Ipv4));
    let used = |balanced: &Balanced, address: IpAddr| -> Result<u64> {
        let list = balanced.bpfvs.get("/v1/local-addresses")?;
        let views = list["addresses"].as_array().context("a list")?;
        let of_address = views.iter().filter(|view| view["address"] == address.to_string());
        Ok(of_address.filter_map(|view| view["used"].as_u64()).sum())
    };
    let downloads = (0..4).map(|_| Download::start(&balanced.lab.client, vip, "slow")).collect::<Result<Vec<_>>>()?;
    for download in &downloads {
        download.wait_for_bytes(1)?;
    }
    ensure!(used(&balanced, shared)? + used(&balanced, other)? == 4, "four downloads have a port each");

    balanced.bpfvs.succeed(&["localaddr", "delete", &shared.to_string()])?;
    let refused = balanced.bpfvs.output(&["localaddr", "delete", &other.to_string()])?;
    ensure!(!refused.status.success(), "the last address can be deleted");
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(message.contains("it is the last one for the real server"), "{message}");
    let before = used(&balanced, other)?;
    curl_times(&balanced.lab.client, vip, 4)?;
    ensure!(used(&balanced, other)? == before + 4, "new connections use the address that is left");

    // An address of its own for the service: from now on it has that one only.
    balanced.lab.director.ip(&format!("addr add {own}/32 dev eth0"))?;
    balanced.bpfvs.succeed(&["localaddr", "add", &own.to_string(), "--service", &service])?;
    curl_times(&balanced.lab.client, vip, 4)?;
    ensure!(used(&balanced, own)? == 4 && used(&balanced, other)? == before + 4, "the service has another's address");

    balanced.bpfvs.kill9()?;
    ensure!(["rs1", "rs2"].contains(&curl(&balanced.lab.client, vip)?.as_str()), "it does not go on without the daemon");
    balanced.bpfvs.serve()?;
    ensure!(used(&balanced, own)? == 5, "the next daemon does not know the addresses");
    let list = balanced.bpfvs.succeed(&["localaddr", "list"])?;
    ensure!(list.lines().any(|line| line.starts_with(&own.to_string()) && line.contains(&service)), "{list}");
    downloads.into_iter().try_for_each(Download::finish)
}

#[test]
fn listings_and_saved_rules_say_fullnat() -> Result<()> {
    needs!(root, "nginx", "curl");
    needs_bpfvs!();
    let (balanced, _pass) = balanced("auto")?;
    balanced.service("rr", &FULLNAT)?;
    curl_times(&balanced.lab.client, balanced.lab.vip.of(Family::Ipv4), 4)?;
    let rules = balanced.bpfvs.ipvsadm("-Ln")?;
    ensure!(rules.contains("  -> 10.0.0.205:80                FullNat 1"), "{rules}");
    let saved = balanced.bpfvs.ipvsadm("-Sn")?;
    ensure!(saved.contains("-a -t 192.168.74.204:80 -r 10.0.0.205:80 -m --fullnat -w 1"), "{saved}");
    let list = balanced.bpfvs.ipvsadm("-Lnc")?;
    let connections: Vec<_> = list.lines().filter(|line| line.starts_with("TCP ")).collect();
    ensure!(connections.len() == 4, "{list}");
    ensure!(connections.iter().all(|line| line.contains("192.168.74.12:") && line.contains("192.168.74.204:80")), "{list}");
    let services = balanced.bpfvs.get("/v1/services")?;
    let totals = &services[0]["traffic"]["totals"];
    for (counter, least) in [("connections", 4), ("packets_in", 16), ("packets_out", 12), ("bytes_in", 800), ("bytes_out", 800)] {
        ensure!(totals[counter].as_u64().is_some_and(|value| value >= least), "{counter}: {totals:#}");
    }
    // What was saved can be restored.
    balanced.bpfvs.ipvsadm("-C")?;
    let mut restore = balanced.bpfvs.command("ipvsadm-restore");
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), &saved)?;
    let output = restore.stdin(std::fs::File::open(file.path())?).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let sorted = |rules: &str| {
        let mut lines: Vec<_> = rules.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let restored = balanced.bpfvs.ipvsadm("-Sn")?;
    ensure!(sorted(&restored) == sorted(&saved), "the rules are others:\n{restored}");
    Ok(())
}

/// An address that is none of this host is accepted, and said to be none.
#[test]
fn an_address_that_is_not_here_is_pointed_out() -> Result<()> {
    needs!(root, "nginx");
    needs_bpfvs!();
    let (balanced, _pass) = balanced("auto")?;
    let output = balanced.bpfvs.output(&["localaddr", "add", "10.0.0.240"])?;
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success() && message.contains("ip address add 10.0.0.240/32"), "{message}");
    ensure!(balanced.bpfvs.succeed(&["localaddr", "list"])?.contains("not of this host"));
    Ok(())
}
