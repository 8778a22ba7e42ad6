//! Firewall marks: the how-to's commands with real iptables and nft through the mark device, and mark rules of our own, which
//! keep to the fast path.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    balanced::Balanced,
    bench::{Addresses, Bench, bracketed},
    frame::{ACK, Frame, SYN},
    lab::{Family, Lab, Layout},
    needs, needs_bpfvs,
    netns::Namespace,
    programs::{FtpServer, UdpServer, ask_udp, curl, host, is_big_file, upload},
    skip,
    test_run::{Hook, Verdict},
    wait,
};
use tempfile::TempDir;

/// A way to mark packets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Firewall {
    IptablesLegacy,
    IptablesNft,
    Nft,
}

impl Firewall {
    /// Marks TCP packets to these ports of an address with 10, as every how-to does.
    fn mark(self, director: &Namespace, vip: IpAddr, ports: &str) -> Result<()> {
        let (command, family) = if vip.is_ipv4() { ("iptables", "ip") } else { ("ip6tables", "ip6") };
        let line = match self {
            Self::Nft => {
                director.run("nft", [format!("add table {family} lvs")])?;
                let chain = "{ type filter hook prerouting priority mangle; }";
                director.run("nft", [format!("add chain {family} lvs prerouting {chain}")])?;
                let rule = format!("{family} daddr {vip} tcp dport {{ {ports} }} meta mark set 10");
                return director.run("nft", [format!("add rule {family} lvs prerouting {rule}")]).map(|_| ());
            }
            Self::IptablesLegacy | Self::IptablesNft => {
                format!("-t mangle -A PREROUTING -d {vip} -p tcp -m multiport --dports {ports} -j MARK --set-mark 10")
            }
        };
        director.run(self.program(command), line.split(' ')).map(|_| ())
    }

    fn program(self, command: &str) -> String {
        match self {
            Self::IptablesLegacy => format!("{command}-legacy"),
            Self::IptablesNft => format!("{command}-nft"),
            Self::Nft => "nft".to_owned(),
        }
    }

    /// Takes the marks away again.
    fn forget(self, director: &Namespace) -> Result<()> {
        for command in ["iptables", "ip6tables"] {
            match self {
                Self::Nft => director.run("nft", ["flush", "ruleset"])?,
                Self::IptablesLegacy | Self::IptablesNft => director.run(self.program(command), ["-t", "mangle", "-F"])?,
            };
        }
        Ok(())
    }
}

/// Who answers on a port.
fn answer(client: &Namespace, address: IpAddr, port: u16) -> Result<String> {
    let url = format!("http://{}:{port}/", host(address));
    let text = client.run("curl", ["--silent", "--show-error", "--fail", "--noproxy", "*", "--max-time", "5", &url])?;
    Ok(text.trim_end().to_owned())
}

/// `-f 10`, or `-f 10 -6`.
const fn option(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "-f 10",
        Family::Ipv6 => "-f 10 -6",
    }
}

/// The how-to's `ipvsadm` commands for mark 10, as they stand there.
fn add_services(balanced: &Balanced, method: &str) -> Result<()> {
    for family in Family::ALL {
        balanced.bpfvs.ipvsadm(&format!("-A {} -s rr", option(family)))?;
        for address in &balanced.lab.server_addresses {
            balanced.bpfvs.ipvsadm(&format!("-a {} -r {} {method}", option(family), bare(address.of(family))))?;
        }
    }
    balanced.bpfvs.wait_for_servers()
}

/// An address as `-r` takes it without a port.
fn bare(address: IpAddr) -> String {
    address.to_string()
}

/// Both ports belong to one service: the servers alternate over them.
fn answers_alternate(balanced: &Balanced, what: &str) -> Result<()> {
    for family in Family::ALL {
        let vip = balanced.lab.vip.of(family);
        let ports = [80, 8080, 80, 8080, 8080, 80];
        let answers = ports
            .iter()
            .map(|port| answer(&balanced.lab.client, vip, *port))
            .collect::<Result<Vec<_>>>()
            .context(what.to_owned())?;
        let alternate = answers.windows(2).all(|pair| pair[0] != pair[1]) && answers.iter().all(|answer| answer.starts_with("rs"));
        ensure!(alternate, "{what}, {family:?}: {answers:?}");
    }
    Ok(())
}

/// Once a connection is there, its packets need no mark.
fn only_beginnings_take_the_detour(balanced: &Balanced) -> Result<()> {
    let packets = || Ok::<_, anyhow::Error>(balanced.lab.director.packets("bpfvs-mark1")?.received);
    for family in Family::ALL {
        let before = packets()?;
        upload(&balanced.lab.client, balanced.lab.vip.of(family))?;
        let detours = packets()? - before;
        ensure!((1..20).contains(&detours), "{family:?}: {detours} packets of a big upload took the detour");
    }
    Ok(())
}

/// The host's routing rules and its devices, as people see them.
fn traces(director: &Namespace) -> Result<String> {
    let rules = director.run("ip", ["rule"])? + &director.run("ip", ["-6", "rule"])?;
    let routes =
        director.run("ip", ["route", "show", "table", "all"])? + &director.run("ip", ["-6", "route", "show", "table", "all"])?;
    let devices = director.run("ip", ["-brief", "link"])?;
    let devices: String =
        devices.lines().map(|line| line.split_whitespace().next().unwrap_or_default().to_owned() + "\n").collect();
    let mut routes: Vec<&str> = routes.lines().collect();
    routes.sort_unstable();
    Ok(format!("{rules}{devices}{}", routes.join("\n")))
}

#[test]
fn the_how_tos_commands_work_as_they_stand() -> Result<()> {
    needs!(root, "nginx", "curl", "nft", "iptables-nft", "iptables-legacy");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::OneSegment, 2, &[])?;
    let director = &balanced.lab.director;
    // As distributions have it.
    director.sysctl(&[("net.ipv4.conf.all.rp_filter", "1"), ("net.ipv4.conf.eth0.rp_filter", "1")])?;
    let before = traces(director)?;
    add_services(&balanced, "-g")?;
    for firewall in [Firewall::IptablesNft, Firewall::IptablesLegacy, Firewall::Nft] {
        for family in Family::ALL {
            let vip = balanced.lab.vip.of(family);
            if let Err(error) = firewall.mark(director, vip, "80,8080") {
                skip!("this machine cannot mark by {firewall:?}: {error:#}");
            }
        }
        answers_alternate(&balanced, &format!("{firewall:?}"))?;
        only_beginnings_take_the_detour(&balanced)?;
        firewall.forget(director)?;
    }
    let listing = balanced.bpfvs.ipvsadm("-Ln")?;
    ensure!(listing.contains("FWM  10 rr\n") && listing.contains("FWM  10 IPv6 rr\n"), "{listing}");
    balanced.bpfvs.ipvsadm("-C")?;
    wait::until("the mark device to go without a trace", wait::SOON, || traces(director).is_ok_and(|now| now == before))
        .with_context(|| format!("before:\n{before}\nnow:\n{}", traces(director).unwrap_or_default()))
}

#[test]
fn marked_packets_are_masqueraded() -> Result<()> {
    needs!(root, "nginx", "curl", "nft");
    needs_bpfvs!();
    let balanced = Balanced::in_lab(Lab::new(Layout::Masquerade, 2)?, &[])?;
    for family in Family::ALL {
        Firewall::Nft.mark(&balanced.lab.director, balanced.lab.vip.of(family), "80,8080")?;
    }
    add_services(&balanced, "-m")?;
    answers_alternate(&balanced, "masquerading")
}

#[test]
fn marked_packets_go_through_tunnels() -> Result<()> {
    needs!(root, "nginx", "curl", "nft");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::Tunnel, 2, &[])?;
    for family in Family::ALL {
        Firewall::Nft.mark(&balanced.lab.director, balanced.lab.vip.of(family), "80,8080")?;
    }
    add_services(&balanced, "-i")?;
    answers_alternate(&balanced, "tunnels")
}

/// A connection to a web server that stays open.
struct Visit(BufReader<TcpStream>);

impl Visit {
    fn begin(client: &Namespace, address: IpAddr, port: u16) -> Result<Self> {
        let stream = client.enter(|| TcpStream::connect_timeout(&SocketAddr::new(address, port), wait::SOON))?;
        stream.set_read_timeout(Some(wait::SOON))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Who answers now.
    fn ask(&mut self) -> Result<String> {
        self.0.get_mut().write_all(b"GET / HTTP/1.1\r\nHost: vip\r\n\r\n")?;
        let mut header = String::new();
        while !header.ends_with("\r\n\r\n") {
            ensure!(self.0.read_line(&mut header)? > 0, "the server has hung up after {header:?}");
        }
        let mut answer = String::new();
        self.0.read_line(&mut answer)?;
        Ok(answer.trim_end().to_owned())
    }
}

/// Services by address for ports 80 and 8080, whose one real server is rs2.
fn add_services_by_address(balanced: &Balanced, method: &str) -> Result<()> {
    for (family, port) in Family::ALL.into_iter().flat_map(|family| [(family, 80), (family, 8080)]) {
        let (vip, server) = (host(balanced.lab.vip.of(family)), host(balanced.lab.server_addresses[1].of(family)));
        balanced.bpfvs.ipvsadm(&format!("-A -t {vip}:{port} -s rr"))?;
        balanced.bpfvs.ipvsadm(&format!("-a -t {vip}:{port} -r {server}:{port} {method}"))?;
    }
    balanced.bpfvs.wait_for_servers()
}

/// A service for mark 10, whose one real server is rs1.
fn add_service_by_mark(balanced: &Balanced, method: &str) -> Result<()> {
    for family in Family::ALL {
        balanced.bpfvs.ipvsadm(&format!("-A {} -s rr", option(family)))?;
        let server = balanced.lab.server_addresses[0].of(family);
        balanced.bpfvs.ipvsadm(&format!("-a {} -r {} {method}", option(family), bare(server)))?;
    }
    balanced.bpfvs.wait_for_servers()
}

/// Who answers several times on a port, for both families.
fn all_answer(balanced: &Balanced, port: u16, name: &str, what: &str) -> Result<()> {
    for family in Family::ALL {
        for _ in 0..3 {
            let got = answer(&balanced.lab.client, balanced.lab.vip.of(family), port)
                .with_context(|| format!("{what}, {family:?}, port {port}"))?;
            ensure!(got == name, "{what}, {family:?}, port {port}: {got} instead of {name}");
        }
    }
    Ok(())
}

fn the_firewalls_marks_go_before_addresses(hook: &str) -> Result<()> {
    needs!(root, "nginx", "curl", "nft", "iptables-nft", "iptables-legacy");
    needs_bpfvs!();
    let lab = Lab::new(Layout::OneSegment, 2)?;
    let _pass = if hook == "xdp" { Some(lab.prepare_for_xdp()?) } else { None };
    let balanced = Balanced::in_lab(lab, &["--hook", hook])?;
    let (director, client) = (&balanced.lab.director, &balanced.lab.client);
    let before = traces(director)?;
    let begin = |port| -> Result<Vec<Visit>> {
        let vips = Family::ALL.map(|family| balanced.lab.vip.of(family));
        vips.into_iter().map(|vip| Visit::begin(client, vip, port)).collect()
    };
    let go_on = |visits: &mut Vec<Visit>, what: &str| -> Result<()> {
        for visit in visits {
            let name = visit.ask().context(what.to_owned())?;
            ensure!(name == "rs2", "{what}: {name}");
        }
        Ok(())
    };
    add_services_by_address(&balanced, "-g")?;
    let mut visits = begin(80)?;
    go_on(&mut visits, "before there are marks")?;
    add_service_by_mark(&balanced, "-g")?;
    for firewall in [Firewall::IptablesNft, Firewall::IptablesLegacy, Firewall::Nft] {
        all_answer(&balanced, 80, "rs2", &format!("before the marks of {firewall:?}"))?;
        for family in Family::ALL {
            firewall.mark(director, balanced.lab.vip.of(family), "80,443")?;
        }
        all_answer(&balanced, 80, "rs1", &format!("marked by {firewall:?}"))?;
        all_answer(&balanced, 8080, "rs2", &format!("not marked by {firewall:?}"))?;
        firewall.forget(director)?;
    }
    // A mark that names no service changes nothing.
    director.run("nft", "add table inet other".split(' '))?;
    director.run("nft", ["add chain inet other prerouting { type filter hook prerouting priority mangle; meta mark set 99; }"])?;
    all_answer(&balanced, 80, "rs2", "with a mark of no service")?;
    director.run("nft", ["flush", "ruleset"])?;
    for family in Family::ALL {
        Firewall::Nft.mark(director, balanced.lab.vip.of(family), "80,443")?;
    }
    go_on(&mut visits, "established ones stay")?;
    visits.extend(begin(8080)?);
    go_on(&mut visits, "and so do those that came by the detour")?;
    // A rule of our own says what the mark means: nothing has to wait.
    let vips = Family::ALL.map(|family| balanced.lab.vip.of(family).to_string());
    let rules = |word| {
        vips.iter().try_for_each(|vip| balanced.bpfvs.succeed(&["mark", word, "10", "--dst", vip, "--ports", "80"]).map(drop))
    };
    rules("add")?;
    let packets = || Ok::<_, anyhow::Error>(director.packets("bpfvs-mark1")?.received);
    let count = packets()?;
    all_answer(&balanced, 80, "rs1", "marked by ourselves")?;
    all_answer(&balanced, 8080, "rs2", "not marked by ourselves")?;
    ensure!(packets()? == count, "there is a detour all the same");
    rules("delete")?;
    all_answer(&balanced, 80, "rs1", "marked by nft again")?;
    // Without forwarding no mark would come back.
    director.sysctl(&[("net.ipv4.ip_forward", "0"), ("net.ipv6.conf.all.forwarding", "0")])?;
    wait::until("connections to begin where they come in", wait::SOON, || {
        Family::ALL.into_iter().all(|family| answer(client, balanced.lab.vip.of(family), 8080).is_ok_and(|name| name == "rs2"))
    })?;
    director.sysctl(&[("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1")])?;
    wait::until("marks to count again", wait::SOON, || {
        Family::ALL.into_iter().all(|family| answer(client, balanced.lab.vip.of(family), 80).is_ok_and(|name| name == "rs1"))
    })?;
    for family in Family::ALL {
        balanced.bpfvs.ipvsadm(&format!("-D {}", option(family)))?;
    }
    all_answer(&balanced, 80, "rs2", "at once without the mark's service")?;
    go_on(&mut visits, "established ones stay to the end")?;
    wait::until("the detour to go without a trace", wait::SOON, || traces(director).is_ok_and(|now| now == before))
        .with_context(|| format!("before:\n{before}\nnow:\n{}", traces(director).unwrap_or_default()))
}

#[test]
fn the_firewalls_marks_go_before_addresses_by_tc() -> Result<()> {
    the_firewalls_marks_go_before_addresses("tc")
}

#[test]
fn the_firewalls_marks_go_before_addresses_by_xdp() -> Result<()> {
    the_firewalls_marks_go_before_addresses("xdp")
}

/// So it is for tunnels, for masquerading, and if the virtual address is not the director's own.
#[test]
fn the_firewalls_marks_go_before_addresses_by_every_way() -> Result<()> {
    needs!(root, "nginx", "curl", "nft");
    needs_bpfvs!();
    for (layout, method, own) in [
        (Layout::Tunnel, "-i", true),
        (Layout::Masquerade, "-m", true),
        (Layout::SeveralSegments, "-g", true),
        (Layout::SeveralSegments, "-g", false),
    ] {
        let what = format!("{layout:?}, {method}, own: {own}");
        let balanced = Balanced::new(layout, 2, &[])?;
        if !own {
            let (vip, device) = (balanced.lab.vip, "lo");
            balanced.lab.director.ip(&format!("addr del {}/32 dev {device}\naddr del {}/128 dev {device}", vip.ipv4, vip.ipv6))?;
        }
        add_services_by_address(&balanced, method)?;
        add_service_by_mark(&balanced, method)?;
        all_answer(&balanced, 80, "rs2", &format!("{what}, without marks"))?;
        for family in Family::ALL {
            Firewall::Nft.mark(&balanced.lab.director, balanced.lab.vip.of(family), "80,443")?;
        }
        all_answer(&balanced, 80, "rs1", &format!("{what}, marked"))?;
        all_answer(&balanced, 8080, "rs2", &format!("{what}, not marked"))?;
    }
    Ok(())
}

/// Whoever takes a part of the mark device away gets it back; the next daemon adopts it, and a killed one's is removed.
#[test]
fn the_mark_device_is_guarded() -> Result<()> {
    needs!(root, "nginx", "curl", "nft");
    needs_bpfvs!();
    let mut balanced = Balanced::new(Layout::OneSegment, 2, &["--interface", "eth0"])?;
    let before = traces(&balanced.lab.director)?;
    for family in Family::ALL {
        Firewall::Nft.mark(&balanced.lab.director, balanced.lab.vip.of(family), "80,8080")?;
    }
    add_services(&balanced, "-g")?;
    // Services by address wait for marks, and have rules and routes for that.
    for family in Family::ALL {
        balanced.bpfvs.ipvsadm(&format!("-A -t {}:9000 -s rr", host(balanced.lab.vip.of(family))))?;
    }
    answers_alternate(&balanced, "at first")?;
    let whole = traces(&balanced.lab.director)?;
    for damage in [
        "link del bpfvs-mark0",
        "rule del fwmark 10",
        "-6 rule del fwmark 10",
        "rule add pref 0 lookup local",
        "link set bpfvs-mark1 down",
        "address flush dev bpfvs-mark0",
        "route flush table 26214",
        "-6 route flush table 26214",
        "rule del ipproto tcp dport 9000",
        "-6 rule del iif lo",
        "route flush table 2621409000",
        "-6 route flush table 2621409000",
    ] {
        balanced.lab.director.run("ip", damage.split(' '))?;
        wait::until(&format!("`ip {damage}` to be mended"), wait::SOON, || {
            traces(&balanced.lab.director).is_ok_and(|now| now == whole)
        })
        .with_context(|| format!("whole:\n{whole}\nnow:\n{}", traces(&balanced.lab.director).unwrap_or_default()))?;
        answers_alternate(&balanced, damage)?;
    }
    balanced.bpfvs.kill9()?;
    answers_alternate(&balanced, "without a daemon")?;
    ensure!(traces(&balanced.lab.director)? == whole, "without a daemon nothing changes");
    balanced.bpfvs.serve()?;
    answers_alternate(&balanced, "with the next daemon")?;
    ensure!(traces(&balanced.lab.director)? == whole, "the next daemon changes nothing");
    let status = balanced.bpfvs.get("/v1/status")?;
    ensure!(status["mark_device"].as_str().is_some_and(|text| text.starts_with("at work; ")), "{status:#}");
    balanced.bpfvs.stop_and_detach()?;
    ensure!(traces(&balanced.lab.director)? == before, "traces stay:\n{}\nbefore:\n{before}", traces(&balanced.lab.director)?);
    Ok(())
}

/// What is wrong reaches whoever asks: nobody answers, nobody serves, this host does not forward.
#[test]
fn what_marked_packets_lack_is_said() -> Result<()> {
    needs!(root, "nginx", "curl", "nft");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::OneSegment, 1, &[])?;
    let vip = balanced.lab.vip.of(Family::Ipv4);
    Firewall::Nft.mark(&balanced.lab.director, vip, "80")?;
    balanced.bpfvs.ipvsadm("-A -f 10 -s rr")?;
    // Port unreachable, or a reset: no client waits for its own deadline.
    let refused = |client: &Namespace| {
        let begin = std::time::Instant::now();
        curl(client, vip).is_err() && begin.elapsed() < Duration::from_secs(4)
    };
    ensure!(refused(&balanced.lab.client), "a service without servers refuses at once");
    balanced.lab.director.sysctl(&[("net.ipv4.ip_forward", "0")])?;
    balanced.bpfvs.ipvsadm("-A -f 11 -s rr")?;
    let status = balanced.bpfvs.get("/v1/status")?;
    ensure!(status["mark_device"].as_str().is_some_and(|text| text.contains("net.ipv4.ip_forward=1")), "{status:#}");
    Ok(())
}

/// Passive FTP, whose data connections go to ports that the server chooses: one mark for all of them, and persistence, so that they
/// go to the server that chose. Its client is curl, which asks for EPSV, or for PASV if it is told to.
#[test]
fn passive_ftp_needs_one_mark_and_persistence() -> Result<()> {
    needs!(root, "nginx", "curl", "vsftpd", "iptables-nft");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::OneSegment, 2, &[])?;
    let servers = balanced.lab.servers.iter().zip(["rs1", "rs2"]);
    let _servers = servers.map(|(server, name)| FtpServer::start(server, name)).collect::<Result<Vec<_>>>()?;
    let client = &balanced.lab.client;
    client.ip("addr add 192.168.74.13/24 dev eth0")?;
    for family in Family::ALL {
        balanced.bpfvs.ipvsadm(&format!("-A {} -s rr -p 300", option(family)))?;
        for address in &balanced.lab.server_addresses {
            balanced.bpfvs.ipvsadm(&format!("-a {} -r {} -g", option(family), bare(address.of(family))))?;
        }
        Firewall::IptablesNft.mark(&balanced.lab.director, balanced.lab.vip.of(family), "21,10000:20000")?;
    }
    balanced.bpfvs.wait_for_servers()?;
    for family in Family::ALL {
        let vip = balanced.lab.vip.of(family);
        ftp(&balanced, vip, &[]).with_context(|| format!("marks of the firewall, {family:?}"))?;
    }
    let (vip, first) = (balanced.lab.vip.of(Family::Ipv4), balanced.lab.client_address.of(Family::Ipv4).to_string());
    let by_first = ftp(&balanced, vip, &["--interface", &first, "--disable-epsv"])?;
    let by_second = ftp(&balanced, vip, &["--interface", "192.168.74.13", "--disable-epsv"])?;
    ensure!(by_first != by_second, "two clients take turns, and {by_first} served both");

    Firewall::IptablesNft.forget(&balanced.lab.director)?;
    for family in Family::ALL {
        let vip = balanced.lab.vip.of(family);
        balanced.bpfvs.succeed(&["mark", "add", "10", "--dst", &vip.to_string(), "--proto", "tcp", "--ports", "21,10000-20000"])?;
        let again = ftp(&balanced, vip, &[]).with_context(|| format!("mark rules, {family:?}"))?;
        ensure!(vip.is_ipv6() || again == by_first, "the client was with {by_first}, and is now with {again}");
    }
    Ok(())
}

/// Fetches by FTP, several times: each answer is from the same server, and whole. Returns its name.
fn ftp(balanced: &Balanced, vip: IpAddr, options: &[&str]) -> Result<String> {
    let directory = TempDir::new()?;
    let big = directory.path().join("big").display().to_string();
    let fetch = |file: &str, more: &[&str]| {
        let url = format!("ftp://{}/{file}", host(vip));
        let common = ["--silent", "--show-error", "--noproxy", "*", "--max-time", "20", &url];
        balanced.lab.client.run("curl", common.iter().chain(options).chain(more))
    };
    let names = (0..4).map(|_| fetch("name", &[])).collect::<Result<Vec<_>>>()?;
    ensure!(names.iter().all(|name| *name == names[0] && name.starts_with("rs")), "one client, several servers: {names:?}");
    fetch("big", &["--output", &big])?;
    is_big_file(directory.path().join("big").as_path())?;
    Ok(names[0].clone())
}

/// Several protocols and several addresses in one service, by rules of our own: no firewall, no mark device on the way.
#[test]
fn mark_rules_need_no_firewall() -> Result<()> {
    needs!(root, "nginx", "curl", "socat");
    needs_bpfvs!();
    let balanced = Balanced::new(Layout::OneSegment, 2, &[])?;
    add_services(&balanced, "-g")?;
    let mut servers = Vec::new();
    for family in Family::ALL {
        let vip = balanced.lab.vip.of(family);
        balanced.bpfvs.succeed(&["mark", "add", "10", "--dst", &vip.to_string(), "--proto", "tcp", "--ports", "80,8080"])?;
        balanced.bpfvs.succeed(&["mark", "add", "10", "--dst", &vip.to_string(), "--proto", "udp", "--ports", "5350-5359"])?;
        for (server, name) in balanced.lab.servers.iter().zip(["rs1", "rs2"]) {
            servers.push(UdpServer::start(server, vip, 5353, name)?);
        }
    }
    answers_alternate(&balanced, "mark rules")?;
    for family in Family::ALL {
        let vip = balanced.lab.vip.of(family);
        let by_tcp = answer(&balanced.lab.client, vip, 80)?;
        let by_udp = ask_udp(&balanced.lab.client, vip, 5353)?;
        ensure!(by_tcp != by_udp, "{family:?}: both protocols take turns, and {by_tcp} answered twice");
    }
    let packets = balanced.lab.director.packets("bpfvs-mark1")?;
    // The host's own IPv6 says a word there now and then.
    ensure!(packets.received < 10, "mark rules send nothing through the mark device, which got {packets:?}");
    let listing = balanced.bpfvs.succeed(&["mark", "list"])?;
    ensure!(listing.contains("UDP") && listing.contains("5350-5359"), "{listing}");
    Ok(())
}

/// One run on the bench: what becomes of a first packet.
struct Trial<'a> {
    bench: &'a Bench,
    family: Family,
    next_client: u16,
}

impl Trial<'_> {
    fn client(&mut self) -> Result<SocketAddr> {
        self.next_client += 1;
        Ok(SocketAddr::new(Addresses::of(self.family).client.parse()?, self.next_client))
    }

    /// Who gets a SYN to there: a real server's number, or nobody.
    fn syn(&mut self, hook: Hook, destination: SocketAddr) -> Result<Option<usize>> {
        let client = self.client()?;
        let frame = Frame::tcp(client, destination, SYN).build();
        let run = self.bench.director.enter(|| self.bench.pinned.run(hook, &frame))?;
        self.who(run.verdict, client, destination.port())
    }

    /// The same for a marked one.
    fn marked_syn(&mut self, destination: SocketAddr, mark: u32) -> Result<Option<usize>> {
        let client = self.client()?;
        let frame = Frame::tcp(client, destination, SYN).build();
        let verdict = self.bench.director.enter(|| self.bench.pinned.run_marked(&frame, mark))?;
        self.who(verdict, client, destination.port())
    }

    fn who(&self, verdict: Verdict, client: SocketAddr, port: u16) -> Result<Option<usize>> {
        let server = self.bench.pinned.server_of(client, port)?;
        ensure!((verdict == Verdict::Send) == server.is_some(), "{verdict:?}, and the connection's server is {server:?}");
        server.map(|index| self.number(index)).transpose()
    }

    /// Which of the two real servers has this index: each has one in every service.
    fn number(&self, index: u32) -> Result<usize> {
        let services = self.bench.bpfvs.get("/v1/services")?;
        let mut servers = services.as_array().into_iter().flatten().filter_map(|service| service["servers"].as_array()).flatten();
        let server =
            servers.find(|server| server["index"] == index).with_context(|| format!("no server {index} in {services:#}"))?;
        let address: IpAddr = server["address"].as_str().context("a server has an address")?.parse()?;
        let numbers = Addresses::of(self.family).servers.iter().position(|text| text.parse() == Ok(address));
        numbers.with_context(|| format!("{address} is none of the bench's servers"))
    }
}

/// The order of look-ups is IPVS's, whoever sets the mark, for both families and hooks.
#[test]
fn a_mark_goes_before_a_port() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = Bench::new(&[])?;
    for family in Family::ALL {
        let addresses = Addresses::of(family);
        let [by_mark, by_port] = addresses.servers;
        let socket = |text: &str, port| -> Result<SocketAddr> { Ok(SocketAddr::new(text.parse()?, port)) };
        let (vip, foreign) = (socket(addresses.vip, 80)?, socket(addresses.foreign, 80)?);
        let mark = if family == Family::Ipv4 { "mark:10" } else { "mark6:10" };
        bench.bpfvs.ipvsadm(&format!("-A -t {vip} -s rr"))?;
        bench.bpfvs.ipvsadm(&format!("-a -t {vip} -r {} -g", bracketed_port(by_port, 80)))?;
        let mut trial = Trial { bench: &bench, family, next_client: 2000 };
        ensure!(trial.marked_syn(vip, 10)? == Some(1), "{family:?}: a mark that names no service changes nothing");
        ensure!(trial.marked_syn(foreign, 10)?.is_none());
        bench.bpfvs.succeed(&["service", "add", mark, "--scheduler", "rr"])?;
        bench.bpfvs.succeed(&["server", "add", mark, by_mark])?;
        bench.bpfvs.wait_for_servers()?;

        // As long as only a firewall can give the mark, nobody else takes what it has not seen.
        waits_for_marks(&mut trial, vip)?;
        let elsewhere = if family == Family::Ipv4 { "192.0.2.99" } else { "2001:db8::99" };
        let ours = ["--dst", elsewhere, "--proto", "udp", "--ports", "9"];
        bench.bpfvs.succeed(&[&["mark", "add", "10"], &ours[..]].concat())?;

        // Marks that are on the packet.
        ensure!(trial.marked_syn(vip, 10)? == Some(0), "{family:?}: the mark goes first");
        ensure!(trial.marked_syn(vip, 11)? == Some(1), "{family:?}: another mark is none");
        ensure!(trial.marked_syn(foreign, 10)? == Some(0), "{family:?}: of a marked packet the address does not matter");
        ensure!(trial.marked_syn(foreign, 11)?.is_none());
        let client = trial.client()?;
        let segment = Frame::tcp(client, foreign, ACK).build();
        let passed = bench.director.enter(|| bench.pinned.run_marked(&segment, 10))?;
        ensure!(passed == Verdict::Pass, "{family:?}: what begins nothing belongs to nobody");
        ensure!(bench.pinned.server_of(client, 80)?.is_none());

        for hook in Hook::ALL {
            ensure!(trial.syn(hook, vip)? == Some(1), "{family:?}, {hook:?}: without a mark the port counts");
            ensure!(trial.syn(hook, foreign)?.is_none());
        }
        // Rules for single ports, for all ports, and for networks.
        let network = if family == Family::Ipv4 { "10.99.0.0/24" } else { "fd99::/64" };
        for rule in [
            vec!["--dst", addresses.vip, "--proto", "tcp", "--ports", "80"],
            vec!["--dst", addresses.vip, "--proto", "tcp"],
            vec!["--dst", addresses.vip],
            vec!["--dst", network, "--ports", "80-90"],
            vec!["--dst", network],
        ] {
            let command = |word| [&["mark", word, "10"], rule.as_slice()].concat();
            bench.bpfvs.succeed(&command("add"))?;
            for hook in Hook::ALL {
                let other_port = SocketAddr::new(vip.ip(), 81);
                ensure!(trial.syn(hook, vip)? == Some(0), "{family:?}, {hook:?}, {rule:?}: the rule's mark goes first");
                let has_81 = !rule.contains(&"80");
                ensure!(trial.syn(hook, other_port)? == has_81.then_some(0), "{family:?}, {hook:?}, {rule:?}: port 81");
                let is_network = rule.contains(&network);
                ensure!(trial.syn(hook, foreign)? == is_network.then_some(0), "{family:?}, {hook:?}, {rule:?}: another address");
                ensure!(trial.syn(hook, socket(addresses.unroutable, 80)?)?.is_none());
            }
            bench.bpfvs.succeed(&command("delete"))?;
            for hook in Hook::ALL {
                ensure!(trial.syn(hook, vip)? == Some(1), "{family:?}, {hook:?}, {rule:?}: without the rule the port counts again");
            }
        }
        // A rule whose service goes does nothing.
        bench.bpfvs.succeed(&["mark", "add", "10", "--dst", addresses.vip, "--ports", "80"])?;
        bench.bpfvs.succeed(&["service", "remove", mark])?;
        ensure!(trial.syn(Hook::Xdp, vip)? == Some(1));
        bench.bpfvs.succeed(&["mark", "delete", "10", "--dst", addresses.vip, "--ports", "80"])?;
        bench.bpfvs.succeed(&[&["mark", "delete", "10"], &ours[..]].concat())?;
    }
    Ok(())
}

/// Of the packets to a service by address, those that begin something go to the firewall first: each of them, whole as it is, and in
/// peace.
fn waits_for_marks(trial: &mut Trial<'_>, vip: SocketAddr) -> Result<()> {
    let (bench, family) = (trial.bench, trial.family);
    for hook in Hook::ALL {
        let before = bench.bpfvs.reason("unmarked")?;
        for _ in 0..3 {
            ensure!(trial.syn(hook, vip)?.is_none(), "{family:?}, {hook:?}: nobody has seen whether it has a mark");
        }
        ensure!(bench.bpfvs.reason("unmarked")? == before + 3, "{family:?}, {hook:?}: it was not counted");
        // The kernel's routing rules see no ports in fragments, so these would not come back.
        let client = trial.client()?;
        let fragments = Frame { payload: vec![7; 64], ..Frame::tcp(client, vip, SYN) }.fragments(40);
        let run = bench.director.enter(|| bench.pinned.run(hook, &fragments[0]))?;
        ensure!(trial.who(run.verdict, client, vip.port())? == Some(1), "{family:?}, {hook:?}: a fragment waits");
        // In a flood, the way through the kernel would be too long. (Afterwards there is none any more, so that this one is over at once.)
        bench.bpfvs.succeed(&["sysctl", "-w", "secure_tcp=3"])?;
        let frame = Frame::tcp(trial.client()?, vip, SYN).build();
        let run = bench.director.enter(|| bench.pinned.run(hook, &frame))?;
        ensure!(run.verdict == Verdict::Send, "{family:?}, {hook:?}: {:?} in flood mode", run.verdict);
        bench.bpfvs.succeed(&["sysctl", "-w", "secure_tcp=0"])?;
    }
    ensure!(trial.marked_syn(vip, 11)?.is_none(), "{family:?}: a mark that names no service may still become another");
    ensure!(trial.marked_syn(vip, 10)? == Some(0), "{family:?}: but this one is known");
    Ok(())
}

fn bracketed_port(address: &str, port: u16) -> String {
    format!("{}:{port}", bracketed(address))
}

/// Packets that are nobody's are left alone, also while a rule for everything has all of them looked at.
#[test]
fn what_is_nobodys_passes_a_rule_for_a_network() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = Bench::new(&[])?;
    bench.bpfvs.ipvsadm("-A -f 10 -s rr")?;
    bench.bpfvs.ipvsadm("-A -f 10 -6 -s rr")?;
    for everything in ["0.0.0.0/0", "::/0"] {
        bench.bpfvs.succeed(&["mark", "add", "10", "--dst", everything, "--proto", "tcp", "--ports", "80"])?;
    }
    for family in Family::ALL {
        let addresses = Addresses::of(family);
        let client = SocketAddr::new(addresses.client.parse()?, 3000);
        let other = |port| -> Result<SocketAddr> { Ok(SocketAddr::new(addresses.foreign.parse()?, port)) };
        let long = Frame { payload: vec![7; 64], ..Frame::udp(client, other(9)?) };
        let frames = [
            Frame::tcp(client, other(80)?, ACK).build(),
            Frame::tcp(client, other(81)?, SYN).build(),
            Frame::udp(client, other(80)?).build(),
            // A ping.
            Frame::error(client.ip(), other(0)?.ip(), if family == Family::Ipv4 { 8 } else { 128 }, 0, 1, &[]).build(),
        ];
        for hook in Hook::ALL {
            for frame in frames.iter().chain(&long.fragments(32)) {
                let before = bench.bpfvs.reason("not-ours")?;
                let run = bench.director.enter(|| bench.pinned.run(hook, frame))?;
                ensure!(
                    run.verdict == Verdict::Pass && run.frame == *frame,
                    "{family:?}, {hook:?}: {:?}, {frame:02x?}",
                    run.verdict
                );
                ensure!(bench.bpfvs.reason("not-ours")? == before + 1, "{family:?}, {hook:?}: it was not counted: {frame:02x?}");
            }
            let refused = bench.director.enter(|| bench.pinned.run(hook, &Frame::tcp(client, other(80)?, SYN).build()))?;
            ensure!(refused.verdict == Verdict::Send, "{family:?}, {hook:?}: the service has no server: {:?}", refused.verdict);
        }
    }
    Ok(())
}

/// A transparent cache: clients ask for anything, and what they ask for sticks to a server.
#[test]
fn destinations_of_a_network_stick_to_servers() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = Bench::new(&[])?;
    for (scheduler, port) in [("lblc", 80), ("dh", 3128)] {
        for family in Family::ALL {
            let addresses = Addresses::of(family);
            let (mark, everything) = if family == Family::Ipv4 { ("mark:20", "0.0.0.0/0") } else { ("mark6:20", "::/0") };
            bench.bpfvs.succeed(&["service", "add", mark, "--scheduler", scheduler])?;
            for server in addresses.servers {
                bench.bpfvs.succeed(&["server", "add", mark, server, "--weight", "5"])?;
            }
            let port_text = port.to_string();
            let rule = ["20", "--dst", everything, "--proto", "tcp", "--ports", &port_text];
            bench.bpfvs.succeed(&[&["mark", "add"], &rule[..]].concat())?;
            bench.bpfvs.wait_for_servers()?;
            let mut trial = Trial { bench: &bench, family, next_client: 5000 };
            let site = |number: u32| -> Result<SocketAddr> {
                let address = match family {
                    Family::Ipv4 => IpAddr::from([203, 0, 113, number as u8]),
                    Family::Ipv6 => format!("2001:db8:113::{number:x}").parse()?,
                };
                Ok(SocketAddr::new(address, port))
            };
            let mut first = Vec::new();
            for number in 1..=8 {
                first.push(trial.syn(Hook::Xdp, site(number)?)?);
            }
            ensure!(first.iter().all(Option::is_some), "{scheduler}, {family:?}: {first:?}");
            ensure!(first.contains(&Some(0)) && first.contains(&Some(1)), "{scheduler}, {family:?}: one server has all: {first:?}");
            for hook in Hook::ALL {
                for (number, server) in (1..).zip(&first) {
                    let again = trial.syn(hook, site(number)?)?;
                    ensure!(again == *server, "{scheduler}, {family:?}, {hook:?}, site {number}: {again:?} instead of {server:?}");
                }
            }
            bench.bpfvs.succeed(&[&["mark", "delete"], &rule[..]].concat())?;
            bench.bpfvs.succeed(&["service", "remove", mark])?;
        }
    }
    Ok(())
}

/// Mark rules outlive the daemon, and ten thousand ports are one rule.
#[test]
fn mark_rules_stay() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let mut bench = Bench::new(&[])?;
    let addresses = Addresses::of(Family::Ipv4);
    bench.bpfvs.ipvsadm("-A -f 21 -s rr")?;
    bench.bpfvs.ipvsadm(&format!("-a -f 21 -r {} -g", addresses.servers[0]))?;
    bench.bpfvs.succeed(&["mark", "add", "21", "--dst", addresses.vip, "--proto", "tcp", "--ports", "21,10000-20000"])?;
    bench.bpfvs.succeed(&["mark", "add", "21", "--dst", "198.51.100.0/24"])?;
    bench.bpfvs.wait_for_servers()?;
    let rules = bench.bpfvs.get("/v1/mark-rules")?;
    for life in ["first", "second"] {
        let mut trial = Trial { bench: &bench, family: Family::Ipv4, next_client: if life == "first" { 6000 } else { 7000 } };
        for (destination, expected) in [
            (format!("{}:21", addresses.vip), Some(0)),
            (format!("{}:10000", addresses.vip), Some(0)),
            (format!("{}:20000", addresses.vip), Some(0)),
            (format!("{}:20001", addresses.vip), None),
            ("198.51.100.7:7".to_owned(), Some(0)),
        ] {
            let got = trial.syn(Hook::Xdp, destination.parse()?)?;
            ensure!(got == expected, "{life} daemon, {destination}: {got:?}");
        }
        if life == "first" {
            bench.bpfvs.kill9()?;
            bench.bpfvs.serve()?;
            bench.pinned = bpfvs_tests::test_run::Pinned::open(bench.bpfvs.pins())?;
            ensure!(bench.bpfvs.get("/v1/mark-rules")? == rules);
        }
    }
    // One that does not fit is refused whole.
    let output = bench.bpfvs.output(&["mark", "add", "22", "--dst", addresses.vip, "--ports", "1-65535"])?;
    ensure!(output.status.code() == Some(1) && String::from_utf8_lossy(&output.stderr).contains("name no ports to mean all"));
    let output = bench.bpfvs.output(&["mark", "add", "22", "--dst", addresses.vip, "--proto", "tcp", "--ports", "21"])?;
    ensure!(output.status.code() == Some(1) && String::from_utf8_lossy(&output.stderr).contains("another mark"));
    ensure!(bench.bpfvs.get("/v1/mark-rules")? == rules);
    Ok(())
}

/// What the firewall marks can be had as mark rules.
#[test]
fn the_firewalls_rules_are_imported() -> Result<()> {
    needs!(root, "nft", "iptables-nft", "iptables-legacy");
    needs_bpfvs!();
    let bench = Bench::new(&[])?;
    let vip: IpAddr = Addresses::of(Family::Ipv4).vip.parse()?;
    let vip6: IpAddr = Addresses::of(Family::Ipv6).vip.parse()?;
    bench.bpfvs.ipvsadm("-A -f 10 -s rr")?;
    bench.bpfvs.ipvsadm("-A -f 10 -6 -s rr")?;
    Firewall::IptablesNft.mark(&bench.director, vip, "80,443")?;
    Firewall::IptablesLegacy.mark(&bench.director, vip, "25")?;
    Firewall::Nft.mark(&bench.director, vip6, "80-90")?;
    bench.director.run("nft", ["add rule ip6 lvs prerouting ip6 saddr fd00::/8 meta mark set 10"])?;
    bench.director.run("nft", ["add rule ip6 lvs prerouting ip6 daddr fd00::/8 meta mark set 77"])?;
    let text = bench.bpfvs.succeed(&["mark", "import"])?;
    let lines: Vec<&str> = text.lines().filter_map(|line| line.split("    # ").next()).collect();
    ensure!(
        lines[..3]
            == [
                format!("bpfvs mark add 10 --dst {vip} --proto tcp --ports 80,443"),
                format!("bpfvs mark add 10 --dst {vip} --proto tcp --ports 25"),
                format!("bpfvs mark add 10 --dst {vip6} --proto tcp --ports 80-90"),
            ],
        "{text}"
    );
    ensure!(lines.len() == 4 && lines[3].starts_with("# stays with the firewall"), "{text}");
    ensure!(bench.bpfvs.get("/v1/mark-rules")?.as_array().is_some_and(Vec::is_empty), "nothing is done unasked");
    bench.bpfvs.succeed(&["mark", "import", "--apply"])?;
    ensure!(bench.bpfvs.get("/v1/mark-rules")?.as_array().is_some_and(|rules| rules.len() == 3));
    let again = bench.bpfvs.succeed(&["mark", "import"])?;
    ensure!(!again.contains("bpfvs mark add"), "{again}");
    Ok(())
}
