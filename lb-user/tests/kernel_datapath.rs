//! The datapath over a real kernel: network namespaces, veth pairs, pinned maps and links.
//!
//! Each test makes a namespace with two veth pairs, enters it with a thread of its own (`ip netns exec` would hide
//! /sys/fs/bpf), opens a datapath there, and looks at what stands in the maps after routes, neighbours and devices have
//! changed. Namespaces and pins are removed afterwards, also when a test fails.
//!
//! Needs root and a BPF file system at /sys/fs/bpf; without them the tests say so and pass.

use std::{
    fs::File,
    future::Future,
    io::Write as _,
    net::IpAddr,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use bpfvs::{
    datapath::{Datapath as _, Hook, KernelDatapath, Options, Target, attach::Attachments, netns_cookie},
    director::model::{ConnectionView, Family, Method, Protocol, ServiceId, TableMemory, Tunnel},
    scheduler::Run,
};
use lb_common::{
    config::{Config, SweepReport},
    connection::{Connection, ConnectionKey},
    hop::KEEP_VLAN,
    local::Local,
    packet::transport::Ports,
    server::{self, NextHop, Server, Status},
    service::Service,
    tcp,
};
use nix::sched::{CloneFlags, setns};

const fn address(protocol: Protocol, address: IpAddr, port: u16) -> ServiceId {
    ServiceId::Address { protocol, address, port }
}

/// How long the kernel and the resolver may take to agree.
const DEADLINE: Duration = Duration::from_secs(10);

/// A director's namespace with two neighbours, each in a namespace of its own behind a veth pair.
///
/// ```text
/// director: east 10.1.0.1/24, 2001:db8:1::1/64 ── neighbour 10.1.0.2, 2001:db8:1::2
///           west 10.2.0.1/24, 2001:db8:2::1/64 ── neighbour 10.2.0.2, 2001:db8:2::2
/// ```
struct Lab {
    name: String,
}

impl Lab {
    fn new(test: &str) -> Self {
        let lab = Self { name: format!("kernel-{}-{test}", std::process::id()) };
        for part in ["", "-east", "-west"] {
            shell(&format!("ip netns add {}{part}", lab.name));
            shell(&format!("ip -n {}{part} link set lo up", lab.name));
            shell(&format!(
                "nsenter --net=/run/netns/{}{part} sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0",
                lab.name
            ));
        }
        for (side, number) in [("east", 1), ("west", 2)] {
            let name = &lab.name;
            shell(&format!("ip -n {name} link add {side} type veth peer name eth0 netns {name}-{side}"));
            shell(&format!("ip -n {name} link set {side} up"));
            shell(&format!("ip -n {name}-{side} link set eth0 address 02:00:00:00:0{number}:02 up"));
            shell(&format!("ip -n {name} address add 10.{number}.0.1/24 dev {side}"));
            shell(&format!("ip -n {name} address add 2001:db8:{number}::1/64 nodad dev {side}"));
            shell(&format!("ip -n {name}-{side} address add 10.{number}.0.2/24 dev eth0"));
            shell(&format!("ip -n {name}-{side} address add 2001:db8:{number}::2/64 nodad dev eth0"));
        }
        lab
    }

    /// Runs `ip` in the director's namespace.
    fn ip(&self, arguments: &str) -> String {
        shell(&format!("ip -n {} {arguments}", self.name))
    }

    fn directory(&self) -> PathBuf {
        Path::new("/sys/fs/bpf/bpfvs").join(format!("test-{}", self.name))
    }

    fn ifindex(&self, device: &str) -> u32 {
        let output = self.ip(&format!("-o link show {device}"));
        output.split(':').next().and_then(|index| index.parse().ok()).expect("`ip -o link` begins with an index")
    }

    fn mac(&self, device: &str) -> [u8; 6] {
        let output = self.ip(&format!("-o link show {device}"));
        mac(output.split_whitespace().skip_while(|word| !word.starts_with("link/")).nth(1).expect("a MAC address"))
    }

    fn options(&self) -> Options {
        Options {
            directory: self.directory(),
            netns_cookie: netns_cookie().expect("a kernel with cookies"),
            max_connections: Some(1000),
            memory: None,
            picks_at_once: 1,
            hook: Hook::Auto,
            interfaces: Vec::new(),
            tcx: Attachments::kernel_has_tcx(),
        }
    }

    /// Opens and starts a datapath.
    async fn start(&self) -> KernelDatapath {
        let mut datapath = KernelDatapath::open(&self.options()).expect("the datapath opens");
        datapath.start().await.expect("the datapath starts");
        datapath
    }

    fn links(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.directory().join("links"))
            .expect("the directory of links")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
            .collect();
        names.sort();
        names
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for part in ["", "-east", "-west"] {
            let _ = Command::new("ip").args(["netns", "delete", &format!("{}{part}", self.name)]).status();
        }
        for part in ["links", "programs", "maps"] {
            let _ = std::fs::remove_dir_all(self.directory().join(part));
        }
        let _ = std::fs::remove_dir(self.directory());
    }
}

fn shell(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().expect("sh runs");
    assert!(output.status.success(), "`{line}` failed: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn mac(text: &str) -> [u8; 6] {
    let bytes: Vec<_> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).expect("hexadecimal")).collect();
    bytes.try_into().expect("six bytes")
}

/// Says that a test was not run, past the harness, which hides what tests print.
fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED {why}");
}

/// Runs a test in a new laboratory, on a thread that is in the director's namespace.
fn in_lab<T: Future<Output = ()>>(test: &'static str, body: impl FnOnce(Arc<Lab>) -> T + Send + 'static) {
    if !nix::unistd::geteuid().is_root() || !Path::new("/sys/fs/bpf").is_dir() {
        skipped(&format!("{test}: needs root and a BPF file system at /sys/fs/bpf; `cargo xtask test` runs it so"));
        return;
    }
    let lab = Arc::new(Lab::new(test));
    let inner = Arc::clone(&lab);
    let result = thread::spawn(move || {
        let namespace = File::open(format!("/run/netns/{}", inner.name)).expect("the namespace is there");
        setns(namespace, CloneFlags::CLONE_NEWNET).expect("root may enter namespaces");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(body(inner));
    })
    .join();
    drop(lab);
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

/// Waits until the entries of a real server are as they should be.
async fn entry_becomes(datapath: &KernelDatapath, index: u32, what: &str, holds: impl Fn(&Server, &NextHop) -> bool) -> Server {
    let begin = Instant::now();
    loop {
        let (server, next_hop) = datapath.server_entry(index).expect("the entry can be read");
        if holds(&server, &next_hop) {
            return server;
        }
        assert!(begin.elapsed() < DEADLINE, "{what}, but after {DEADLINE:?} the entry is {server:?}, {next_hop:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn becomes(what: &str, holds: impl Fn() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < DEADLINE, "{what}, but not within {DEADLINE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn target(address: &str) -> Target {
    let address: IpAddr = address.parse().expect("an address");
    Target { address, port: 80, method: Method::Route, pool: 0, clients: Family::of(address) }
}

/// MAC address of the next hop.
fn next_hop(server: &Server) -> [u8; 6] {
    server.hop.link.map(u32::to_ne_bytes).concat()[..6].try_into().expect("six bytes")
}

/// MAC address that frames are sent from.
fn source(server: &Server) -> [u8; 6] {
    server.hop.link.map(u32::to_ne_bytes).concat()[6..].try_into().expect("six bytes")
}

fn is(server: &Server, status: Status) -> bool {
    server.status == status as u8
}

#[test]
fn a_server_on_the_link_becomes_ready() {
    in_lab("ready", async |lab| {
        let mut datapath = lab.start().await;
        datapath.set_server(5, &target("10.1.0.2")).expect("the server is taken");
        datapath.set_server(6, &target("2001:db8:1::2")).expect("the server is taken");
        datapath.settled().await;
        assert_ne!(datapath.reachability(5), Status::NoRoute, "settled means that the route was looked for");
        let ready = |server: &Server, _: &NextHop| is(server, Status::Ready);
        for (index, address) in [(5, "10.1.0.2"), (6, "2001:db8:1::2")] {
            let server = entry_becomes(&datapath, index, "the neighbour answers", ready).await;
            assert_eq!(next_hop(&server), [2, 0, 0, 0, 1, 2]);
            assert_eq!(source(&server), lab.mac("east"));
            assert_eq!((server.hop.ifindex, server.hop.port_ifindex), (lab.ifindex("east"), lab.ifindex("east")));
            assert_eq!((server.hop.vlan, server.hop.mtu, server.port), (KEEP_VLAN, 1500, 80_u16.to_be()));
            let neighbours = lab.ip(&format!("neighbour show {address}"));
            assert!(neighbours.contains("managed"), "the kernel keeps it resolved: {neighbours}");
        }
        assert_eq!(datapath.reachability(7), Status::Free);
        datapath.shut_down().await.expect("it shuts down");
        for address in ["10.1.0.2", "2001:db8:1::2"] {
            let neighbours = lab.ip(&format!("neighbour show {address}"));
            assert!(!neighbours.contains("managed"), "it is let go: {neighbours}");
        }
    });
}

#[test]
fn routes_are_followed() {
    in_lab("routes", async |lab| {
        let mut datapath = lab.start().await;
        datapath.set_server(1, &target("192.0.2.7")).expect("the server is taken");
        datapath.set_server(2, &target("10.1.0.1")).expect("the server is taken");
        datapath.settled().await;
        assert_eq!(datapath.reachability(1), Status::NoRoute);
        assert_eq!(datapath.reachability(2), Status::Local);

        lab.ip("route add 192.0.2.0/24 via 10.1.0.2 mtu 1400");
        let east = lab.ifindex("east");
        let server =
            entry_becomes(&datapath, 1, "a route appears", |server, _| is(server, Status::Ready) && server.hop.ifindex == east)
                .await;
        assert_eq!((next_hop(&server), server.hop.mtu), ([2, 0, 0, 0, 1, 2], 1400));

        lab.ip("route change 192.0.2.0/24 via 10.2.0.2");
        let west = lab.ifindex("west");
        let server =
            entry_becomes(&datapath, 1, "the route moves", |server, _| is(server, Status::Ready) && server.hop.ifindex == west)
                .await;
        assert_eq!((next_hop(&server), source(&server), server.hop.mtu), ([2, 0, 0, 0, 2, 2], lab.mac("west"), 1500));
        let left = lab.ip("neighbour show 10.1.0.2");
        assert!(!left.contains("managed"), "nobody needs the old gateway: {left}");

        lab.ip("route change unreachable 192.0.2.0/24");
        entry_becomes(&datapath, 1, "the route becomes unreachable", |server, _| is(server, Status::NoRoute)).await;
        lab.ip("route change 192.0.2.0/24 via 10.2.0.2");
        entry_becomes(&datapath, 1, "the route is back", |server, _| is(server, Status::Ready)).await;
        lab.ip("link set west down");
        entry_becomes(&datapath, 1, "the device goes down", |server, _| is(server, Status::NoRoute)).await;
        lab.ip("link set west up");
        lab.ip("route replace 192.0.2.0/24 via 10.2.0.2");
        entry_becomes(&datapath, 1, "the device is back", |server, _| is(server, Status::Ready)).await;

        lab.ip("address add 192.0.2.7/32 dev lo");
        entry_becomes(&datapath, 1, "the address becomes the director's", |server, _| is(server, Status::Local)).await;
        datapath.shut_down().await.expect("it shuts down");
    });
}

#[test]
fn neighbours_and_devices_are_followed() {
    in_lab("neighbours", async |lab| {
        let mut datapath = lab.start().await;
        datapath.set_server(1, &target("10.1.0.2")).expect("the server is taken");
        let has = |mac: [u8; 6]| move |server: &Server, _: &NextHop| is(server, Status::Ready) && next_hop(server) == mac;
        entry_becomes(&datapath, 1, "the neighbour answers", has([2, 0, 0, 0, 1, 2])).await;

        lab.ip("neighbour replace 10.1.0.2 lladdr 02:00:00:00:aa:aa dev east nud permanent");
        entry_becomes(&datapath, 1, "the neighbour gets another address", has([2, 0, 0, 0, 0xaa, 0xaa])).await;
        lab.ip("neighbour delete 10.1.0.2 dev east");
        entry_becomes(&datapath, 1, "the neighbour is asked again", has([2, 0, 0, 0, 1, 2])).await;

        lab.ip("link set east address 02:00:00:00:bb:bb");
        entry_becomes(&datapath, 1, "the device gets another address", |server, _| source(server) == [2, 0, 0, 0, 0xbb, 0xbb])
            .await;
        lab.ip("link set east mtu 1300");
        entry_becomes(&datapath, 1, "the device gets another MTU", |server, _| server.hop.mtu == 1300).await;

        datapath.set_server(2, &target("10.1.0.99")).expect("the server is taken");
        datapath.settled().await;
        entry_becomes(&datapath, 2, "nobody answers", |server, next_hop| {
            is(server, Status::Unresolved) && next_hop.address[0].to_ne_bytes() == [10, 1, 0, 99] && next_hop.family == 2
        })
        .await;

        // A fixed entry that was there before stays as it is.
        lab.ip("neighbour replace 10.1.0.50 lladdr 02:00:00:00:cc:cc dev east nud permanent");
        datapath.set_server(3, &target("10.1.0.50")).expect("the server is taken");
        entry_becomes(&datapath, 3, "the fixed neighbour is used", has([2, 0, 0, 0, 0xcc, 0xcc])).await;
        assert!(lab.ip("neighbour show 10.1.0.50").contains("PERMANENT"));
        datapath.shut_down().await.expect("it shuts down");
        assert!(lab.ip("neighbour show 10.1.0.50").contains("PERMANENT"));
    });
}

#[test]
fn vlans_leave_by_their_port() {
    in_lab("vlan", async |lab| {
        let link = "link add link east name east.7 type vlan id 7".split(' ');
        let made = Command::new("ip").args(["-n", &lab.name]).args(link).status().expect("ip runs");
        if !made.success() {
            skipped("vlan: this kernel cannot make VLAN devices (CONFIG_VLAN_8021Q)");
            return;
        }
        lab.ip("link set east.7 up");
        lab.ip("address add 10.7.0.1/24 dev east.7");
        shell(&format!("ip -n {}-east link add link eth0 name eth0.7 type vlan id 7", lab.name));
        shell(&format!("ip -n {0}-east link set eth0.7 up && ip -n {0}-east address add 10.7.0.2/24 dev eth0.7", lab.name));
        let mut datapath = lab.start().await;
        for (index, address) in [(1, "10.7.0.2"), (2, "10.1.0.2"), (3, "10.2.0.2")] {
            datapath.set_server(index, &target(address)).expect("the server is taken");
        }
        let ready = |server: &Server, _: &NextHop| is(server, Status::Ready);
        let tagged = entry_becomes(&datapath, 1, "the neighbour in the VLAN answers", ready).await;
        assert_eq!((tagged.hop.ifindex, tagged.hop.port_ifindex, tagged.hop.vlan), (lab.ifindex("east.7"), lab.ifindex("east"), 7));
        assert_eq!(entry_becomes(&datapath, 2, "the neighbour beside it answers", ready).await.hop.vlan, 0);
        assert_eq!(entry_becomes(&datapath, 3, "the other neighbour answers", ready).await.hop.vlan, KEEP_VLAN);
        lab.ip("link delete east.7");
        entry_becomes(&datapath, 2, "the VLAN is gone", |server, _| server.hop.vlan == KEEP_VLAN).await;
        entry_becomes(&datapath, 1, "the VLAN is gone", |server, _| is(server, Status::NoRoute)).await;
        datapath.shut_down().await.expect("it shuts down");
    });
}

#[test]
fn devices_without_addresses_are_left_to_tc() {
    in_lab("tun", async |lab| {
        if !Path::new("/dev/net/tun").exists() {
            skipped("tun: this kernel cannot make tun devices (CONFIG_TUN)");
            return;
        }
        lab.ip("tuntap add mode tun name tunnel");
        lab.ip("link set tunnel up");
        lab.ip("address add 10.8.0.1/24 dev tunnel");
        let mut datapath = lab.start().await;
        datapath.set_server(4, &target("10.8.0.2")).expect("the server is taken");
        let tunnel = lab.ifindex("tunnel");
        entry_becomes(&datapath, 4, "tc sends into the tun device", |server, next_hop| {
            is(server, Status::Unresolved) && server.hop.ifindex == tunnel && next_hop.family == 2
        })
        .await;
        datapath.shut_down().await.expect("it shuts down");
    });
}

#[test]
fn tunnels_have_a_source_and_less_room() {
    in_lab("tunnels", async |lab| {
        let mut datapath = lab.start().await;
        for (index, address) in [(1, "10.1.0.2"), (2, "2001:db8:1::2")] {
            let target = Target { method: Method::Tunnel(Tunnel::Ipip), ..target(address) };
            datapath.set_server(index, &target).expect("the server is taken");
        }
        let ready = |server: &Server, _: &NextHop| is(server, Status::Ready);
        let ipv4 = entry_becomes(&datapath, 1, "the neighbour answers", ready).await;
        assert_eq!((ipv4.method, ipv4.hop.mtu), (server::Method::Tunnel as u8, 1480));
        assert_eq!(ipv4.outer_source[0].to_ne_bytes(), [10, 1, 0, 1]);
        let ipv6 = entry_becomes(&datapath, 2, "the neighbour answers", ready).await;
        assert_eq!(ipv6.hop.mtu, 1460);
        let source: std::net::Ipv6Addr = "2001:db8:1::1".parse().expect("an address");
        assert_eq!(ipv6.outer_source.map(u32::to_ne_bytes).concat(), source.octets());
        datapath.shut_down().await.expect("it shuts down");
    });
}

#[test]
fn a_routers_report_narrows_a_tunnel() {
    in_lab("path-mtu", |lab| async move {
        let mut datapath = lab.start().await;
        let tunnel = Target { method: Method::Tunnel(Tunnel::Ipip), ..target("10.1.0.2") };
        datapath.set_server(1, &tunnel).expect("a server");
        entry_becomes(&datapath, 1, "the device's MTU less the outer header", |server, _| server.hop.mtu == 1480).await;
        // The neighbour plays the router: fragmentation needed, MTU 1400, about IPIP from the director to the server.
        let quoted = "4500 05dc 0000 4000 3f04 0000 0a01 0001 0a01 0002 4500 05c8 0000 4000";
        let report = format!("0304 8ed5 0000 0578 {quoted}").replace(' ', "");
        let send = format!(
            "nsenter --net=/run/netns/{}-east perl -e 'use Socket; socket(S, PF_INET, SOCK_RAW, 1) or die $!; \
             send(S, pack(\"H*\", \"{report}\"), 0, pack_sockaddr_in(0, inet_aton(\"10.1.0.1\"))) or die $!'",
            lab.name
        );
        shell(&send);
        entry_becomes(&datapath, 1, "the reported MTU less the outer header", |server, _| server.hop.mtu == 1380).await;
    });
}

#[test]
fn removed_servers_stay_removed() {
    in_lab("removed", async |lab| {
        let mut datapath = lab.start().await;
        datapath.set_server(1, &target("10.1.0.2")).expect("the server is taken");
        datapath.set_server(2, &target("10.1.0.2")).expect("the server is taken");
        entry_becomes(&datapath, 1, "the neighbour answers", |server, _| is(server, Status::Ready)).await;
        datapath.retire_server(1).expect("the server is retired");
        lab.ip("link set east mtu 1400");
        entry_becomes(&datapath, 2, "the device gets another MTU", |server, _| server.hop.mtu == 1400).await;
        assert_eq!(datapath.reachability(1), Status::Removed);
        datapath.retire_server(2).expect("the server is retired");
        becomes("nobody needs the neighbour", || !lab.ip("neighbour show 10.1.0.2").contains("managed")).await;

        datapath.set_server(1, &target("10.1.0.2")).expect("the server comes back");
        entry_becomes(&datapath, 1, "the neighbour answers", |server, _| is(server, Status::Ready)).await;
        datapath.free_server(1).expect("the server is freed");
        datapath.free_server(2).expect("the server is freed");
        assert_eq!(datapath.server_entry(1).expect("the entry can be read"), (Server::default(), NextHop::default()));
        assert_eq!(datapath.reachability(2), Status::Free);
        assert_eq!(datapath.statistics(1).expect("the statistics can be read"), lb_common::statistics::Statistics::default());
        let beyond = datapath.server_capacity();
        assert!(datapath.set_server(beyond, &target("10.1.0.2")).is_err());
        datapath.shut_down().await.expect("it shuts down");
    });
}

#[test]
fn an_instance_is_taken_over_and_removed() {
    in_lab("adopt", async |lab| {
        let vip: IpAddr = "10.9.9.9".parse().expect("an address");
        let run = Run { picks: vec![1, 2, 1], ..Run::default() };
        let service = Service { id: 3, ..Service::default() };
        let mut first = lab.start().await;
        assert!(!first.adopted());
        first.configure(&Config { udp_timeout: 77, ..Config::DEFAULT }).expect("the settings are written");
        first.publish(3, &run).expect("the schedule is published");
        first.set_service(&address(Protocol::Tcp, vip, 80), service).expect("the service is written");
        first.set_server(1, &target("10.1.0.2")).expect("the server is taken");
        let entry = entry_becomes(&first, 1, "the neighbour answers", |server, _| is(server, Status::Ready)).await;
        let attached = [format!("tc-{}", lab.ifindex("east")), format!("tc-{}", lab.ifindex("west"))];
        assert_eq!(lab.links(), attached);
        let (hz, cookie) = (first.config().hz, first.config().netns_cookie);
        assert!([100, 250, 300, 1000].contains(&hz));
        drop(first);
        assert_eq!(lab.links(), attached, "links outlive the daemon");
        let program = attached_program(&lab, "east");
        let other = Options { netns_cookie: cookie + 1, ..lab.options() };

        let mut second = KernelDatapath::open(&lab.options()).expect("the instance is taken over");
        assert!(second.adopted());
        assert_eq!((second.config().udp_timeout, second.config().hz, second.config().netns_cookie), (77, hz, cookie));
        assert_eq!(second.service_entries(), [(address(Protocol::Tcp, vip, 80), service)]);
        assert!(second.filter_contains(vip));
        assert_eq!(second.server_entries().expect("the servers can be read"), [(1, entry)]);
        second.set_server(1, &target("10.1.0.2")).expect("the server is taken");
        assert_eq!(second.server_entry(1).expect("the entry can be read").0, entry, "what was known is not forgotten");
        second.start().await.expect("it starts");
        assert_eq!(lab.links(), attached);
        assert_ne!(attached_program(&lab, "east"), program, "the new daemon's program is in the old link");
        second.remove_service(&address(Protocol::Tcp, vip, 80)).expect("the service is removed");
        assert!(!second.filter_contains(vip));
        drop(second);

        let small = Options { max_connections: Some(10), memory: Some(TableMemory::OnDemand), ..lab.options() };
        let third = KernelDatapath::open(&small).expect("the instance is taken over");
        assert_eq!((third.max_connections(), third.memory()), (1000, TableMemory::AtStart), "tables stay as they are");
        drop(third);
        let fresh = KernelDatapath::open(&other).expect("leftovers of a dead namespace are no hindrance");
        assert!(!fresh.adopted());
        drop(fresh);
        KernelDatapath::remove(lab.directory()).await.expect("it is removed");
        assert!(!lab.directory().exists(), "no pin is left");
        KernelDatapath::remove(lab.directory()).await.expect("removing nothing is no error");
    });
}

/// The identifier of the program that tcx runs on an interface; of the netlink filter's on old kernels.
fn attached_program(lab: &Lab, device: &str) -> String {
    let (_, programs) =
        aya::programs::SchedClassifier::query_tcx(device, aya::programs::TcAttachType::Ingress).expect("tcx can be asked");
    assert_eq!(programs.len(), 1, "one program on {device} of {}", lab.name);
    programs[0].id().to_string()
}

#[test]
fn maps_of_another_shape_are_refused() {
    in_lab("shape", async |lab| {
        drop(lab.start().await);
        let pin = lab.directory().join("maps/SERVERS");
        std::fs::remove_file(&pin).expect("the pin is there");
        let odd = aya::maps::Array::<_, u64>::create(7, 0).expect("a map");
        odd.pin(&pin).expect("it can be pinned");
        let refusal = KernelDatapath::open(&lab.options()).err().expect("it must be refused").to_string();
        assert!(refusal.contains("SERVERS") && refusal.contains("another version"), "{refusal}");
        assert_eq!(lab.links().len(), 2, "nothing is changed");

        let nowhere = Options { directory: "/tmp/bpfvs-kernel-test".into(), ..lab.options() };
        let refusal = KernelDatapath::open(&nowhere).err().expect("it must be refused").to_string();
        assert!(refusal.contains("BPF file system"), "{refusal}");
    });
}

#[test]
fn interfaces_come_and_go() {
    in_lab("interfaces", async |lab| {
        let mut datapath = lab.start().await;
        let names = || datapath.interfaces().into_iter().map(|interface| interface.name).collect::<Vec<_>>();
        assert_eq!(names(), ["east", "west"].map(str::to_owned));
        lab.ip("link add later type bridge");
        lab.ip("link set later up");
        becomes("a new interface is attached to", || names().contains(&"later".to_owned())).await;
        let later = lab.ifindex("later");
        assert!(lab.links().contains(&format!("tc-{later}")));
        lab.ip("link delete later");
        becomes("a gone interface is forgotten", || !names().contains(&"later".to_owned())).await;
        assert!(!lab.links().contains(&format!("tc-{later}")));

        datapath.detach("west").expect("it is detached");
        assert_eq!(lab.links(), [format!("tc-{}", lab.ifindex("east"))]);
        lab.ip("link set west down");
        lab.ip("link set west up");
        lab.ip("link add another type bridge");
        lab.ip("link set another up");
        becomes("a new interface is attached to", || names().contains(&"another".to_owned())).await;
        assert!(!names().contains(&"west".to_owned()), "what was detached is left alone");
        assert!(datapath.detach("west").is_err());
        assert!(datapath.detach("nowhere").is_err());

        datapath.attach("west", Hook::Xdp).expect("it is attached");
        let west = datapath.interfaces().into_iter().find(|interface| interface.name == "west").expect("it is listed");
        assert_eq!((west.xdp.as_deref(), west.tc), (Some("xdp"), true));
        assert!(lab.ip("link show west").contains("xdp"), "the kernel runs XDP");
        datapath.attach("west", Hook::Tc).expect("it is attached anew");
        assert!(!lab.ip("link show west").contains("xdp"), "XDP is off again");
        datapath.shut_down().await.expect("it shuts down");
        assert!(!lab.directory().exists(), "no pin is left");
    });
}

#[test]
fn named_interfaces_only() {
    in_lab("named", async |lab| {
        let options = Options { interfaces: vec!["east".into()], hook: Hook::Xdp, ..lab.options() };
        let mut datapath = KernelDatapath::open(&options).expect("it opens");
        datapath.start().await.expect("it starts");
        let index = lab.ifindex("east");
        assert_eq!(lab.links(), [format!("tc-{index}"), format!("xdp-{index}")]);
        drop(datapath);
        // The next daemon wants another interface, and another hook.
        let options = Options { interfaces: vec!["west".into()], ..lab.options() };
        let mut datapath = KernelDatapath::open(&options).expect("it opens");
        datapath.start().await.expect("it starts");
        assert_eq!(lab.links(), [format!("tc-{}", lab.ifindex("west"))]);
        datapath.shut_down().await.expect("it shuts down");

        let options = Options { interfaces: vec!["nowhere".into()], ..lab.options() };
        let mut datapath = KernelDatapath::open(&options).expect("it opens");
        let refusal = datapath.start().await.expect_err("it must be refused").to_string();
        assert!(refusal.contains("nowhere") && refusal.contains("east"), "{refusal}");
    });
}

#[test]
fn netlink_filters_are_replaced_and_removed() {
    in_lab("filters", async |lab| {
        let options = Options { tcx: false, ..lab.options() };
        let filters = || shell("tc filter show dev east ingress").matches("handle 0xb5f").count();
        for _ in 0..2 {
            let mut datapath = KernelDatapath::open(&options).expect("it opens");
            datapath.start().await.expect("it starts");
            assert_eq!(filters(), 1);
            drop(datapath);
            assert_eq!(filters(), 1, "the filter outlives the daemon");
        }
        let mut datapath = KernelDatapath::open(&options).expect("it opens");
        datapath.start().await.expect("it starts");
        datapath.shut_down().await.expect("it shuts down");
        assert_eq!(filters(), 0);
    });
}

#[test]
fn services_and_schedules() {
    in_lab("services", async |lab| {
        let mut datapath = KernelDatapath::open(&lab.options()).expect("it opens");
        for vip in ["10.9.9.9", "2001:db8::9"] {
            let vip: IpAddr = vip.parse().expect("an address");
            let service = Service { id: 0, ..Service::default() };
            datapath.set_service(&address(Protocol::Tcp, vip, 80), service).expect("the service is written");
            datapath.set_service(&address(Protocol::Udp, vip, 53), service).expect("the service is written");
            datapath.remove_service(&address(Protocol::Tcp, vip, 80)).expect("the service is removed");
            assert!(datapath.filter_contains(vip), "another service has the address");
            datapath.remove_service(&address(Protocol::Udp, vip, 53)).expect("the service is removed");
            assert!(!datapath.filter_contains(vip));
            datapath.remove_service(&address(Protocol::Udp, vip, 53)).expect("removing nothing is no error");
        }
        // Four times what there is room for: old runs make room for new ones.
        let picks = vec![7; 1 << 20];
        for service in [0, 1, 0, 1, 0, 1, 0, 1] {
            datapath.publish(service, &Run { picks: picks.clone(), ..Run::default() }).expect("old runs make room");
        }
        let whole = Run { picks: vec![7; 1 << 22], ..Run::default() };
        let full = datapath.publish(2, &whole).expect_err("a run as large as the table does not fit").to_string();
        assert!(full.contains("schedules"), "{full}");
        datapath.publish(0, &Run::default()).expect("an empty run fits always");
        assert_eq!(datapath.cursor(0), 0);
    });
}

#[test]
fn connections_are_listed() {
    in_lab("list", async |lab| {
        let options = Options { max_connections: Some(20_000), ..lab.options() };
        let mut datapath = KernelDatapath::open(&options).expect("it opens");
        datapath.set_server(4, &target("10.1.0.2")).expect("the server is taken");
        datapath.write_servers().expect("it is written");
        let clock = datapath.sweep().await.expect("the sweep runs");
        assert_eq!(clock.examined, 0);
        let report: aya::maps::Array<_, SweepReport> = pinned(&lab, "SWEEP");
        let now = report.get(&0, 0).expect("the report").jiffies as u32;
        let hz = datapath.config().hz;
        let mut ipv4: aya::maps::HashMap<_, ConnectionKey<u32>, Connection> = pinned(&lab, "CONNECTIONS_V4");
        let mut ipv6: aya::maps::HashMap<_, ConnectionKey<[u32; 4]>, Connection> = pinned(&lab, "CONNECTIONS_V6");
        let connection = |state, flags, idle: u32| Connection {
            server: 4,
            local: Local::NONE,
            last_seen: now - idle * hz,
            state,
            flags,
            half_open: 0,
            prefix: 0,
        };
        for client in 0..10_000_u32 {
            let key = ConnectionKey {
                client: (0x0a01_0000 + client).to_be(),
                vip: 0x0a09_0909_u32.to_be(),
                ports: Ports::new(1234_u16.to_be(), 80_u16.to_be()),
                protocol: 6,
            };
            // Every tenth is over: nothing was heard of it for longer than IPVS's 900 seconds.
            let entry = connection(tcp::State::Established as u8, 1, if client % 10 == 0 { 1000 } else { 100 });
            ipv4.insert(key, entry, 0).expect("there is room");
        }
        let key = ConnectionKey {
            client: [1, 2, 3, 4].map(u32::to_be),
            vip: [5, 6, 7, 8].map(u32::to_be),
            ports: Ports::new(9_u16.to_be(), 53_u16.to_be()),
            protocol: 17,
        };
        ipv6.insert(key, connection(0, 0, 0), 0).expect("there is room");
        let mut views = listed(&datapath);
        assert_eq!(views.len(), 9_001);
        let last = views.pop().expect("the IPv6 connection comes last");
        assert_eq!((last.protocol.as_str(), last.state.as_str(), last.active), ("UDP", "UDP", false));
        assert_eq!((last.client, last.client_port, last.vip_port), ("0:1:0:2:0:3:0:4".parse().expect("an address"), 9, 53));
        assert!((295..=300).contains(&last.expires), "{last:?}");
        for view in views {
            assert_eq!((view.protocol.as_str(), view.state.as_str(), view.active), ("TCP", "ESTABLISHED", true));
            assert_eq!((view.server, view.server_port), ("10.1.0.2".parse().expect("an address"), 80));
            assert_eq!((view.vip, view.vip_port, view.client_port), ("10.9.9.9".parse().expect("an address"), 80, 1234));
            assert!((790..=800).contains(&view.expires), "{view:?}");
        }
    });
}

/// All connections and templates.
fn listed(datapath: &KernelDatapath) -> Vec<ConnectionView> {
    let mut views = Vec::new();
    let mut visit = |view| {
        views.push(view);
        ControlFlow::Continue(())
    };
    datapath.listing().expect("the tables can be opened").show(&mut visit).expect("the connections can be listed");
    views
}

/// A map of the instance, opened beside the datapath.
fn pinned<T: TryFrom<aya::maps::Map, Error = aya::maps::MapError>>(lab: &Lab, name: &str) -> T {
    let data = aya::maps::MapData::from_pin(lab.directory().join("maps").join(name)).expect("the map is pinned");
    aya::maps::Map::from_map_data(data).and_then(T::try_from).expect("the map is what it should be")
}

#[test]
fn the_sweep_of_an_empty_table() {
    in_lab("sweep", async |lab| {
        let datapath = KernelDatapath::open(&lab.options()).expect("it opens");
        let outcome = datapath.sweep().await.expect("the sweep runs");
        assert_eq!((outcome.examined, outcome.expired), (0, 0));
        assert!(outcome.corrected.is_empty());
        assert_eq!(listed(&datapath), []);
        let reasons = datapath.reasons().expect("the reasons can be listed");
        assert_eq!(reasons.len(), lb_common::reason::Reason::ALL.len());
        // XDP's come with the first interface that wants them.
        assert_eq!(datapath.verified_instructions().len(), 11);
    });
}
