//! `bpfvs realserver` in real network namespaces: it leaves no trace, it finds every fault, and packets leave the tunnel.
//!
//! Needs root; without it every test prints that it was skipped.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{FromRawFd, OwnedFd},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use bpfvs::realserver::{self, Args, Report};
use clap::{Args as _, FromArgMatches};
use lb_common::checksum;
use nix::{
    libc,
    sched::{CloneFlags, setns},
    sys::socket::{setsockopt, sockopt},
};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Whether this test can run here; says so loudly if not.
fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: {test}: it makes network namespaces, which needs root");
    }
    root
}

fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let program = words.next().expect("a program");
    let output = Command::new(program).args(words).output().unwrap_or_else(|error| panic!("{command}: {error}"));
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A network namespace that goes with its owner.
struct Namespace(String);

impl Namespace {
    fn new() -> Self {
        let name = format!("realserver-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        run(&format!("ip netns add {name}"));
        let namespace = Self(name);
        namespace.ip("link set lo up");
        namespace
    }

    fn ip(&self, arguments: &str) -> String {
        run(&format!("ip -n {} {arguments}", self.0))
    }

    fn sysctl(&self, setting: &str) {
        run(&format!("ip netns exec {} sysctl -qw {setting}", self.0));
    }

    fn sysctl_value(&self, key: &str) -> String {
        run(&format!("ip netns exec {} sysctl -n {key}", self.0)).trim().to_owned()
    }

    /// Runs something in this namespace, and returns what it returns: a socket, for instance.
    fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let path = format!("/run/netns/{}", self.0);
        let inside = move || {
            setns(File::open(path).expect("the namespace"), CloneFlags::CLONE_NEWNET).expect("root may enter");
            work()
        };
        thread::spawn(inside).join().expect("the work does not panic")
    }

    fn realserver(&self, arguments: &str) -> anyhow::Result<Report> {
        let words = ["realserver"].into_iter().chain(arguments.split_whitespace()).chain(["--netns", &self.0]);
        let matches = Args::augment_args(clap::Command::new("realserver")).get_matches_from(words);
        realserver::execute(Args::from_arg_matches(&matches).expect("arguments"))
    }

    fn setup(&self, arguments: &str) -> Report {
        self.realserver(&format!("setup {arguments}")).unwrap_or_else(|error| panic!("setup {arguments}: {error:#}"))
    }

    fn problems(&self, arguments: &str) -> Vec<&'static str> {
        let report = self.realserver(&format!("check {arguments}")).expect("check");
        let problems = report.findings.iter().filter(|finding| finding.level == realserver::Level::Problem);
        problems.map(|finding| finding.subject).collect()
    }

    /// Everything that setup may touch.
    fn snapshot(&self) -> String {
        let inode = run(&format!("stat -L -c %i /run/netns/{}", self.0)).trim().to_owned();
        let left = [format!("/sys/fs/bpf/bpfvs/netns-{inode}"), format!("/run/bpfvs/realserver-netns-{inode}.json")];
        [
            self.ip("-o addr"),
            self.ip("-d link"),
            self.ip("route show table all"),
            run(&format!("tc -n {} qdisc", self.0)),
            run(&format!("ip netns exec {} bpftool net show", self.0)),
            run(&format!("ip netns exec {} sysctl -a -r arp_ignore|arp_announce|rp_filter", self.0)),
            left.map(|path| fs::exists(path).expect("a path").to_string()).join(" "),
        ]
        .join("\n")
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.realserver("teardown");
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// A director's place and a real server, with a wire between them.
struct Pair {
    director: Namespace,
    server: Namespace,
}

fn pair() -> Pair {
    let (director, server) = (Namespace::new(), Namespace::new());
    run(&format!("ip link add wire netns {} type veth peer name eth0 netns {}", director.0, server.0));
    for (namespace, device, last) in [(&director, "wire", 1), (&server, "eth0", 2)] {
        namespace.ip(&format!("addr add 10.9.0.{last}/24 dev {device}"));
        namespace.ip(&format!("addr add fd09::{last}/64 dev {device} nodad"));
        namespace.ip(&format!("link set {device} up"));
    }
    server.ip("route add default via 10.9.0.1");
    server.ip("-6 route add default via fd09::1");
    let deadline = Instant::now() + Duration::from_secs(10);
    for namespace in [&director, &server] {
        while namespace.ip("-o -6 addr").contains("tentative") || !namespace.ip("-o -6 addr").contains("fe80") {
            assert!(Instant::now() < deadline, "the link-local addresses do not come");
            thread::sleep(Duration::from_millis(20));
        }
    }
    Pair { director, server }
}

#[test]
fn teardown_leaves_everything_as_it_was() {
    if !is_root("teardown_leaves_everything_as_it_was") {
        return;
    }
    for arguments in [
        "--method route",
        "--method tunnel --decap bpf",
        "--method tunnel --decap bpf --hook clsact",
        "--method tunnel --decap bpf --hook xdp",
        "--method tunnel --tunnel-type gue --tunnel-port 5555",
    ] {
        let Pair { director: _director, server } = pair();
        server.sysctl("net.ipv4.conf.all.rp_filter=1");
        let before = server.snapshot();
        let arguments = format!("--vip 10.9.0.200 --vip fd09::200 {arguments}");
        assert!(!server.setup(&arguments).changes.is_empty());
        assert_eq!(server.problems(""), Vec::<&str>::new(), "{arguments}");
        assert_ne!(server.snapshot(), before);

        assert_eq!(server.setup(&arguments).changes, Vec::<String>::new(), "a second setup changes nothing");
        let report = server.realserver("teardown").expect("teardown");
        assert!(report.is_ok() && report.findings.is_empty(), "{report}");
        assert_eq!(server.snapshot(), before, "{arguments}");
        assert!(server.realserver("teardown").expect("again").changes.is_empty());
    }
}

#[test]
fn what_was_there_before_stays() {
    if !is_root("what_was_there_before_stays") {
        return;
    }
    let Pair { director: _director, server } = pair();
    server.ip("addr add 10.9.0.200/32 dev lo");
    server.sysctl("net.ipv4.conf.eth0.arp_ignore=2");
    server.setup("--vip 10.9.0.200 --method route");
    server.setup("--vip 10.9.0.201 --method tunnel --decap bpf");
    assert_eq!(server.sysctl_value("net.ipv4.conf.eth0.arp_ignore"), "2", "the stricter value serves");
    assert_eq!(server.problems(""), Vec::<&str>::new());

    server.realserver("teardown --vip 10.9.0.201").expect("teardown");
    assert!(!server.ip("addr show lo").contains("10.9.0.201"));
    assert_eq!(server.sysctl_value("net.ipv4.conf.all.arp_ignore"), "1", "the other address still needs it");
    assert_eq!(server.problems(""), Vec::<&str>::new());

    server.sysctl("net.ipv4.conf.lo.arp_announce=1");
    let report = server.realserver("teardown").expect("teardown");
    assert!(server.ip("addr show lo").contains("10.9.0.200/32"), "the address was there before");
    assert_eq!(server.sysctl_value("net.ipv4.conf.lo.arp_announce"), "1", "somebody else set it");
    assert_eq!(server.sysctl_value("net.ipv4.conf.all.arp_announce"), "0");
    assert_eq!(report.findings.len(), 1, "{report}");
}

#[test]
fn a_setup_that_fails_changes_nothing() {
    if !is_root("a_setup_that_fails_changes_nothing") {
        return;
    }
    let Pair { director: _director, server } = pair();
    let refused = |arguments: &str, why: &str| {
        let before = server.snapshot();
        let error = format!("{:#}", server.realserver(&format!("setup {arguments}")).expect_err(arguments));
        assert!(error.contains(why), "{error}");
        assert_eq!(server.snapshot(), before, "{arguments}");
    };
    refused("--vip 10.9.0.2 --method route", "answer for it");
    refused("--vip 127.0.0.1 --method route", "not the address of a host");
    refused("--vip 10.9.0.200 --method route --interface eth7", "there are: eth0");
    refused("--vip 10.9.0.200 --method tunnel --tunnel-type gue", "--tunnel-port");
    refused("--vip 10.9.0.200 --method tunnel --tunnel-type gue --tunnel-port 5555 --decap kernel", "--decap bpf");
    // A program that is there already keeps ours away.
    server.setup("--vip 10.9.0.200 --method tunnel --decap bpf --hook xdp --interface eth0");
    let inode = run(&format!("stat -L -c %i /run/netns/{}", server.0)).trim().to_owned();
    let state = format!("/run/bpfvs/realserver-netns-{inode}.json");
    let pins = format!("/sys/fs/bpf/bpfvs/netns-{inode}");
    let aside = format!("/sys/fs/bpf/bpfvs-aside-{inode}");
    let kept = fs::read(&state).expect("the state");
    fs::rename(&pins, &aside).expect("pins that nobody knows");
    fs::remove_file(&state).expect("a state that nobody knows");
    refused("--vip 10.9.0.201 --method tunnel --decap bpf --hook xdp --interface eth0", "another program is there");
    fs::create_dir_all("/sys/fs/bpf/bpfvs").expect("the directory, which went when it was empty");
    fs::rename(&aside, &pins).expect("known again");
    fs::write(&state, kept).expect("known again");
    assert!(server.realserver("teardown").expect("teardown").is_ok());
}

#[test]
fn check_finds_each_fault() {
    if !is_root("check_finds_each_fault") {
        return;
    }
    let Pair { director: _director, server } = pair();
    assert_eq!(server.problems(""), ["nothing"]);
    assert_eq!(server.problems("--vip 10.9.0.200"), ["vip-missing", "arp-ignore", "arp-announce"]);
    assert_eq!(server.problems("--vip fd09::200"), ["vip-missing"]);
    assert_eq!(server.problems("--vip 10.9.0.2"), ["vip-announced", "arp-ignore", "arp-announce"]);

    server.setup("--vip 10.9.0.200 --vip fd09::200 --method tunnel --decap bpf");
    assert_eq!(server.problems(""), Vec::<&str>::new());
    let all = |commands: &str| {
        for command in commands.split(';') {
            run(&command.replace("NS", &server.0));
        }
    };
    let fault = |make: &str, mend: &str, expected: &[&str]| {
        all(make);
        assert_eq!(server.problems(""), expected, "{make}");
        all(mend);
        assert_eq!(server.problems(""), Vec::<&str>::new(), "{mend}");
    };
    fault("ip -n NS addr del 10.9.0.200/32 dev lo", "ip -n NS addr add 10.9.0.200/32 dev lo", &["vip-missing"]);
    fault("ip -n NS addr add 10.9.0.200/24 dev lo", "ip -n NS addr del 10.9.0.200/24 dev lo", &["vip-prefix"]);
    fault("ip -n NS addr add 10.9.0.200/32 dev eth0", "ip -n NS addr del 10.9.0.200/32 dev eth0", &["vip-announced"]);
    fault("ip -n NS route del default", "ip -n NS route add default via 10.9.0.1", &["route-back"]);
    fault("ip -n NS -6 route del default", "ip -n NS -6 route add default via fd09::1", &["route-back"]);
    fault(
        "ip netns exec NS sysctl -qw net.ipv4.conf.all.arp_ignore=3",
        "ip netns exec NS sysctl -qw net.ipv4.conf.all.arp_ignore=1",
        &["arp-ignore"],
    );
    fault(
        "ip netns exec NS sysctl -qw net.ipv4.conf.all.arp_announce=0 net.ipv4.conf.eth0.arp_announce=1",
        "ip netns exec NS sysctl -qw net.ipv4.conf.all.arp_announce=2 net.ipv4.conf.eth0.arp_announce=2",
        &["arp-announce"],
    );
    // The way back leads elsewhere: only then does a strict filter drop.
    fault(
        "ip -n NS link add other type veth peer name rehto;ip -n NS link set other up;ip -n NS route replace default dev other;\
         ip netns exec NS sysctl -qw net.ipv4.conf.all.rp_filter=1",
        "ip netns exec NS sysctl -qw net.ipv4.conf.all.rp_filter=0;ip -n NS link del other;\
         ip -n NS route replace default via 10.9.0.1",
        &["rp-filter"],
    );

    server.ip("link set eth0 down");
    assert!(server.problems("").contains(&"interface"));
    server.ip("link del eth0");
    assert!(server.problems("").contains(&"decap-program"));
}

/// An IP packet with a UDP datagram.
fn datagram(source: IpAddr, destination: SocketAddr, ecn: u8, data: &[u8]) -> Vec<u8> {
    let bytes = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let length = (8 + data.len()) as u16;
    let mut udp = [&7_u16.to_be_bytes()[..], &destination.port().to_be_bytes(), &length.to_be_bytes(), &[0, 0], data].concat();
    let pseudo = [&bytes(source)[..], &bytes(destination.ip()), &[0, 17], &length.to_be_bytes()].concat();
    let check = checksum::finish(checksum::sum(&pseudo) + checksum::sum(&udp));
    udp[6..8].copy_from_slice(&check.to_ne_bytes());
    let addresses = [bytes(source), bytes(destination.ip())].concat();
    if destination.is_ipv4() {
        let total = (20 + length).to_be_bytes();
        let mut header = [&[0x45, ecn, total[0], total[1], 0, 1, 0, 0, 64, 17, 0, 0], &addresses[..]].concat();
        let check = checksum::finish(checksum::sum(&header));
        header[10..12].copy_from_slice(&check.to_ne_bytes());
        [header, udp].concat()
    } else {
        let length = length.to_be_bytes();
        [&[0x60, ecn << 4, 0, 0, length[0], length[1], 17, 64], &addresses[..], &udp].concat()
    }
}

/// A socket whose payload follows an IP header of this protocol; as a UDP socket, for its `send_to`.
fn raw_socket(ipv6: bool, protocol: u8) -> UdpSocket {
    let family = if ipv6 { libc::AF_INET6 } else { libc::AF_INET };
    // SAFETY: a system call without pointers; the descriptor is checked and owned by nobody else.
    let descriptor = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol)) };
    assert!(descriptor >= 0, "raw socket: {}", io::Error::last_os_error());
    // SAFETY: as above.
    unsafe { OwnedFd::from_raw_fd(descriptor) }.into()
}

/// Sends a packet through a tunnel to the real server, as a director would.
fn send(director: &Namespace, tunnel: &str, outer_ipv6: bool, ecn: i32, inner: &[u8]) {
    let inner_ipv6 = inner[0] >> 4 == 6;
    let protocol = if inner_ipv6 { 41 } else { 4 };
    let ethertype: u16 = if inner_ipv6 { 0x86dd } else { 0x0800 };
    let (protocol, port, payload) = match tunnel {
        "ipip" => (protocol, 0, inner.to_vec()),
        "gre" => (47, 0, [&[0, 0], &ethertype.to_be_bytes()[..], inner].concat()),
        _ => (17, 5555, [&[0, protocol, 0, 0], inner].concat()),
    };
    let to = if outer_ipv6 { format!("[fd09::2]:{port}") } else { format!("10.9.0.2:{port}") };
    let to: SocketAddr = to.parse().expect("an address");
    director.inside(move || {
        let socket = if protocol == 17 {
            UdpSocket::bind(if outer_ipv6 { "[::]:0" } else { "0.0.0.0:0" }).expect("a socket")
        } else {
            raw_socket(outer_ipv6, protocol)
        };
        if outer_ipv6 {
            setsockopt(&socket, sockopt::Ipv6TClass, &ecn).expect("a traffic class");
        } else {
            setsockopt(&socket, sockopt::Ipv4Tos, &ecn).expect("a type of service");
        }
        socket.send_to(&payload, to).expect("sent");
    });
}

/// A socket in the real server that waits for datagrams to a virtual address, within a deadline.
fn receiver(server: &Namespace, address: SocketAddr) -> UdpSocket {
    server.inside(move || {
        let socket = UdpSocket::bind(address).expect("the virtual address");
        socket.set_read_timeout(Some(Duration::from_secs(5))).expect("a deadline");
        socket
    })
}

fn received(server: &Namespace, socket: &UdpSocket, what: &str) -> String {
    let mut buffer = [0; 100];
    let (length, from) = socket
        .recv_from(&mut buffer)
        .unwrap_or_else(|error| panic!("{what}: {error}; check says: {}", server.realserver("check").expect("check")));
    assert_eq!(from.port(), 7);
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

#[test]
fn packets_leave_every_tunnel_at_every_hook_in_all_family_combinations() {
    if !is_root("packets_leave_every_tunnel_at_every_hook_in_all_family_combinations") {
        return;
    }
    for hook in ["tc", "clsact", "xdp"] {
        let Pair { director, server } = pair();
        for (tunnel, port) in [("ipip", ""), ("gre", ""), ("gue", "--tunnel-port 5555")] {
            server.setup(&format!(
                "--vip 10.9.0.200 --vip fd09::200 --method tunnel --decap bpf --hook {hook} --tunnel-type {tunnel} {port}"
            ));
            for vip in ["10.9.0.200:53", "[fd09::200]:53"] {
                let vip: SocketAddr = vip.parse().expect("an address");
                let client: IpAddr = if vip.is_ipv4() { "192.0.2.7" } else { "2001:db8::7" }.parse().expect("an address");
                let socket = receiver(&server, vip);
                for outer_ipv6 in [false, true] {
                    let what = format!("{tunnel} at {hook} to {vip}, outer IPv6: {outer_ipv6}");
                    // These stay behind: congestion that the sender cannot hear of, and a tunnel that is not agreed on.
                    send(&director, tunnel, outer_ipv6, 3, &datagram(client, vip, 0, b"congested"));
                    let other = if tunnel == "gre" { "ipip" } else { "gre" };
                    send(&director, other, outer_ipv6, 0, &datagram(client, vip, 0, b"other tunnel"));
                    // And these arrive; the second is marked on the way, which its checksums must survive.
                    send(&director, tunnel, outer_ipv6, 0, &datagram(client, vip, 0, what.as_bytes()));
                    assert_eq!(received(&server, &socket, &what), what);
                    send(&director, tunnel, outer_ipv6, 3, &datagram(client, vip, 2, b"marked"));
                    assert_eq!(received(&server, &socket, &what), "marked", "{what}");
                }
            }
        }
    }
}

#[test]
fn ipv6_addresses_on_lo_are_not_announced() {
    if !is_root("ipv6_addresses_on_lo_are_not_announced") {
        return;
    }
    let Pair { director, server } = pair();
    server.setup("--vip fd09::200 --method route");
    let is_answered = |address: Ipv6Addr| {
        director.inside(move || {
            let socket = UdpSocket::bind("[::]:0").expect("a socket");
            socket.send_to(b"?", (address, 9)).expect("asked");
        });
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let neighbour = director.ip(&format!("-6 neigh show {address}"));
            if ["REACHABLE", "STALE", "DELAY", "FAILED"].iter().any(|state| neighbour.contains(state)) {
                return !neighbour.contains("FAILED");
            }
            assert!(Instant::now() < deadline, "no answer and no end: {neighbour}");
            thread::sleep(Duration::from_millis(50));
        }
    };
    assert!(is_answered("fd09::2".parse().expect("an address")));
    assert!(!is_answered("fd09::200".parse().expect("an address")));
}
