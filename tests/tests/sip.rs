//! SIP's persistence engine, `--pe sip`: calls stay with their real servers, whoever sends their messages from which port.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    balanced::Balanced,
    bench::{Addresses, Bench, SERVER_MACS, bracketed},
    frame::{Frame, SYN},
    lab::{Family, Lab, Layout},
    needs, needs_bpfvs,
    programs::{UdpServer, host},
    test_run::{Hook, Verdict},
    wait,
};
use lb_common::reason::Reason;

const PORT: u16 = 5060;

/// A message about a call, with so many bytes of headers before its Call-ID.
fn message(call: &str, before: usize) -> Vec<u8> {
    let subject = "x".repeat(before);
    format!("INVITE sip:b@example.org SIP/2.0\r\nSubject: {subject}\r\n{call}\r\nCSeq: 1 INVITE\r\nContent-Length: 0\r\n\r\n")
        .into()
}

/// A service of a family, with both real servers.
struct Service<'a> {
    bench: &'a Bench,
    family: Family,
    vip: SocketAddr,
}

impl<'a> Service<'a> {
    fn new(bench: &'a Bench, family: Family, options: &str) -> Result<Self> {
        let addresses = Addresses::of(family);
        let vip = SocketAddr::new(addresses.vip.parse()?, PORT);
        bench.bpfvs.ipvsadm(&format!("-A -u {vip} -s rr {options}"))?;
        for server in addresses.servers {
            bench.bpfvs.ipvsadm(&format!("-a -u {vip} -r {}:{PORT} -g", bracketed(server)))?;
        }
        bench.bpfvs.wait_for_servers()?;
        Ok(Self { bench, family, vip })
    }

    /// Sends what is no message, or one. Answers which real server gets it; nothing if none does.
    fn send(&self, hook: Hook, client: u8, port: u16, payload: Vec<u8>) -> Result<Option<usize>> {
        let frame = Frame { payload, ..Frame::udp(SocketAddr::new(self.client(client), port), self.vip) }.build();
        self.bench.director.enter(|| self.run(hook, &frame))
    }

    fn run(&self, hook: Hook, frame: &[u8]) -> Result<Option<usize>> {
        let run = self.bench.pinned.run(hook, frame)?;
        match run.verdict {
            Verdict::Send => Ok(SERVER_MACS.iter().position(|address| run.frame.starts_with(address))),
            Verdict::Drop => Ok(None),
            other => anyhow::bail!("the verdict is {other:?}"),
        }
    }

    fn client(&self, number: u8) -> IpAddr {
        match self.family {
            Family::Ipv4 => Ipv4Addr::new(10, 9, 0, number).into(),
            Family::Ipv6 => Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, number.into()).into(),
        }
    }

    /// The Call-IDs of the templates, in order.
    fn calls(&self) -> Result<Vec<String>> {
        let listed = self.bench.bpfvs.ipvsadm("-Lnc --persistent-conn")?;
        let is_ours = |line: &&str| line.contains(&format!(" {} ", self.vip)) && line.contains(" sip ");
        let mut calls: Vec<_> =
            listed.lines().filter(is_ours).filter_map(|line| line.split_whitespace().last()).map(str::to_owned).collect();
        calls.sort();
        Ok(calls)
    }
}

#[test]
fn a_call_stays_with_its_real_server() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let mut bench = Bench::new(&[])?;
    let longest = "y".repeat(255);
    let mut known = Vec::new();
    for family in Family::ALL {
        let service = Service::new(&bench, family, "-p 300 --pe sip")?;
        for hook in Hook::ALL {
            let mut port = if hook == Hook::Xdp { 1000 } else { 2000 };
            let mut send = |client, header: &str, before| {
                port += 1;
                service.send(hook, client, port, message(header, before))
            };
            let name = |call: &str| format!("{call}-{hook:?}");
            let (a, b, c) = (name("a@b"), name("b@b"), name("c@b"));
            let at = send(1, &format!("Call-ID: {a}"), 0)?.context("somebody takes it")?;
            let other = Some(1 - at);
            let at = Some(at);
            let answers = [
                // A client's calls are spread, and each stays, however it is spelled, and wherever in the message.
                send(1, &format!("Call-ID: {b}"), 0)?,
                send(1, &format!("i: {a}"), 0)?,
                send(1, &format!("call-id:\t{a}"), 1200)?,
                send(1, &format!("Call-ID: {b}"), 900)?,
                // As in IPVS: the other client's call of that name is another.
                send(2, &format!("Call-ID: {a}"), 0)?,
                send(1, &format!("Call-ID: {c}"), 3)?,
                send(2, &format!("Call-ID: {a}"), 1)?,
            ];
            ensure!(answers == [other, at, at, other, at, other, at], "{family:?}, {hook:?}: {answers:?}, and first {at:?}");
            // The longest is one that counts, and one byte more makes none.
            ensure!(send(3, &format!("i:{}{longest}", &name("")[1..2]), 0)?.is_none(), "{family:?}, {hook:?}: 256 bytes");
            let first = send(3, &format!("i:{longest}"), 0)?;
            ensure!(first.is_some() && first == send(3, &format!("i:{longest}"), 7)?, "{family:?}, {hook:?}: 255 bytes");
        }
        let calls = service.calls()?;
        let expected = ["a@b-Tc", "a@b-Tc", "a@b-Xdp", "a@b-Xdp", "b@b-Tc", "b@b-Xdp", "c@b-Tc", "c@b-Xdp", &longest];
        ensure!(calls == expected, "{family:?}: {calls:?}");
        known.push((family, service.vip));
    }
    let listed = bench.bpfvs.succeed(&["persistence", "list"])?;
    ensure!(listed.contains("CALL-ID") && listed.contains(" c@b-Xdp\n"), "{listed}");

    // Another daemon leads them on.
    bench.bpfvs.kill9()?;
    bench.bpfvs.serve()?;
    for (family, vip) in known {
        let service = Service { bench: &bench, family, vip };
        let before = service.calls()?.len();
        for hook in Hook::ALL {
            let [a, b] = [("a", 3000), ("b", 3001)]
                .map(|(call, port)| service.send(hook, 1, port, message(&format!("i:{call}@b-{hook:?}"), 0)));
            let (a, b) = (a?, b?);
            ensure!(a.is_some() && b.is_some() && a != b, "{family:?}, {hook:?}: {a:?}, {b:?}");
        }
        ensure!(service.calls()?.len() == before, "{family:?}: {:?}", service.calls()?);
        bench.bpfvs.succeed(&["persistence", "flush", &format!("udp://{vip}")])?;
        ensure!(service.calls()?.is_empty(), "{family:?}: {:?}", service.calls()?);
    }
    Ok(())
}

/// One after the other with one daemon, because the verifier takes its time for the programs.
#[test]
fn calls_and_what_is_none() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = Bench::new(&[])?;
    for check in [what_names_no_call_is_dropped, each_datagram_follows_its_call, a_call_ends_after_its_time] {
        check(&bench)?;
        bench.bpfvs.ipvsadm("-C")?;
        bench.bpfvs.succeed(&["persistence", "flush"])?;
        bench.pinned.forget_connections()?;
    }
    Ok(())
}

fn what_names_no_call_is_dropped(bench: &Bench) -> Result<()> {
    let count = || Ok::<_, anyhow::Error>(bench.pinned.reasons()?[Reason::NoCallId as usize]);
    for family in Family::ALL {
        let service = Service::new(bench, family, "-p 300 --pe sip")?;
        bench.bpfvs.ipvsadm(&format!("-A -t {} -s rr -p 300 --pe sip", service.vip))?;
        bench.bpfvs.ipvsadm(&format!("-a -t {} -r {}:{PORT} -g", service.vip, bracketed(Addresses::of(family).servers[0])))?;
        for hook in Hook::ALL {
            let before = count()?;
            let payloads = [vec![], b"hi".to_vec(), vec![b'\n'; 1400], message("Call-ID:", 0), message("Call-ID: a b", 0)];
            for (payload, port) in payloads.into_iter().zip(1000..) {
                let text = String::from_utf8_lossy(&payload).into_owned();
                ensure!(service.send(hook, 1, port, payload)?.is_none(), "{family:?}, {hook:?}: {text:?} was sent");
            }
            let syn = Frame::tcp(SocketAddr::new(service.client(1), 1000), service.vip, SYN).build();
            ensure!(bench.director.enter(|| service.run(hook, &syn))?.is_none(), "{family:?}, {hook:?}: TCP was sent");
            ensure!(count()? == before + 6, "{family:?}, {hook:?}: {} were counted", count()? - before);
            // A datagram of a connection needs no call.
            ensure!(service.send(hook, 1, 2000, message("i:a", 0))?.is_some(), "{family:?}, {hook:?}: the call was not taken");
            ensure!(service.send(hook, 1, 2000, b"hi".to_vec())?.is_some(), "{family:?}, {hook:?}: the connection is unknown");
        }
    }
    Ok(())
}

/// Each datagram by itself: there are no connections, and the call alone leads.
fn each_datagram_follows_its_call(bench: &Bench) -> Result<()> {
    for (family, mask) in [(Family::Ipv4, "255.255.255.0"), (Family::Ipv6, "64")] {
        let service = Service::new(bench, family, &format!("-p 300 -M {mask} -o --pe sip"))?;
        for hook in Hook::ALL {
            let send = |client, call: &str| service.send(hook, client, PORT, message(&format!("Call-ID: {call}"), 0));
            // One client, one port, several calls; and several clients of a network with one call.
            let answers = [send(1, "a")?, send(1, "b")?, send(1, "a")?, send(2, "b")?, send(3, "a")?];
            let [a, b] = [answers[0], answers[1]];
            ensure!(a != b && answers == [a, b, a, b, a], "{family:?}, {hook:?}: {answers:?}");
            let frame =
                Frame { payload: message("Call-ID: b", 600), ..Frame::udp(SocketAddr::new(service.client(4), PORT), service.vip) };
            if family == Family::Ipv4 {
                let [first, _] = frame.fragments(680);
                ensure!(bench.director.enter(|| service.run(hook, &first))? == b, "{hook:?}: a fragment");
            }
        }
        ensure!(bench.pinned.connections_v4()?.is_empty() && bench.pinned.connections_v6()?.is_empty(), "connections were made");
        ensure!(service.calls()? == ["a", "b"], "{family:?}: {:?}", service.calls()?);
    }
    Ok(())
}

/// But not before its connections.
fn a_call_ends_after_its_time(bench: &Bench) -> Result<()> {
    for family in Family::ALL {
        let service = Service::new(bench, family, "-p 2 --pe sip")?;
        let send = |port, call: &str| service.send(Hook::Tc, 1, port, message(&format!("Call-ID: {call}"), 0));
        send(1000, "a")?.context("somebody takes it")?;
        let line = || -> Result<String> {
            let listed = bench.bpfvs.ipvsadm("-Lnc --persistent-conn")?;
            let line = listed.lines().find(|line| line.contains(&format!(" {} ", service.vip)) && line.ends_with(" a"));
            line.map(str::to_owned).context("the call is gone")
        };
        // Its time is over, but its connection lives: a minute more.
        wait::until("a call whose connection lives", wait::SOON, || line().is_ok_and(|line| !line.contains(" 00:0")))?;
        // Without a connection it ends after its time.
        bench.bpfvs.succeed(&["persistence", "flush"])?;
        bench.pinned.forget_connections()?;
        send(1001, "b")?.context("somebody takes it")?;
        bench.pinned.forget_connections()?;
        wait::until("the call to end, and not to count any more", wait::SOON, || {
            let counts = bench.template_counts().unwrap_or_default();
            service.calls().is_ok_and(|calls| calls.is_empty()) && counts.len() >= 2 && counts.iter().all(|&count| count == 0)
        })?;
    }
    Ok(())
}

/// With real messages: whoever of a network sends them, one real server answers.
#[test]
fn one_real_server_answers_a_call() -> Result<()> {
    needs!(root, "nginx", "socat");
    needs_bpfvs!();
    for (layout, hook, method) in [(Layout::OneSegment, "xdp", "-g"), (Layout::Masquerade, "tc", "-m")] {
        let lab = Lab::new(layout, 2)?;
        let _pass = if hook == "xdp" { Some(lab.prepare_for_xdp()?) } else { None };
        let balanced = Balanced::in_lab(lab, &["--hook", hook])?;
        let lab = &balanced.lab;
        let mut servers = Vec::new();
        for (family, mask) in [(Family::Ipv4, "255.255.255.0"), (Family::Ipv6, "64")] {
            let vip = lab.vip.of(family);
            for ((namespace, address), name) in lab.servers.iter().zip(&lab.server_addresses).zip(["rs1", "rs2"]) {
                let answering = if method == "-g" { vip } else { address.of(family) };
                servers.push(UdpServer::start(namespace, answering, PORT, name)?);
            }
            balanced.bpfvs.ipvsadm(&format!("-A -u {}:{PORT} -s rr -p 300 -M {mask} --pe sip", host(vip)))?;
            for address in &lab.server_addresses {
                let address = host(address.of(family));
                balanced.bpfvs.ipvsadm(&format!("-a -u {}:{PORT} -r {address}:{PORT} {method}", host(vip)))?;
            }
        }
        balanced.bpfvs.wait_for_servers()?;
        for family in Family::ALL {
            let (vip, own) = (lab.vip.of(family), lab.client_address.of(family));
            let neighbour: IpAddr = match own {
                IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() ^ 1).into(),
                IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() ^ 1).into(),
            };
            let nodad = if neighbour.is_ipv6() { "/64 dev eth0 nodad" } else { "/24 dev eth0" };
            lab.client.ip(&format!("addr add {neighbour}{nodad}"))?;
            let ask = |client: IpAddr, call: &str| -> Result<String> {
                let socket = lab.client.enter(|| UdpSocket::bind((client, 0)).context("bind a socket"))?;
                socket.set_read_timeout(Some(Duration::from_secs(5)))?;
                socket.send_to(&message(&format!("Call-ID: {call}@example.org"), 0), (vip, PORT))?;
                let mut answer = [0; 64];
                let (length, _) = socket.recv_from(&mut answer).with_context(|| format!("{client}, {call}: no answer"))?;
                Ok(String::from_utf8_lossy(&answer[..length]).trim_end().to_owned())
            };
            let (first, second) = (ask(own, "first")?, ask(own, "second")?);
            ensure!(first != second, "{layout:?}, {family:?}: both calls went to {first}");
            for client in [own, neighbour, own, neighbour] {
                let (one, other) = (ask(client, "first")?, ask(client, "second")?);
                ensure!((&one, &other) == (&first, &second), "{layout:?}, {family:?}: {client} was answered by {one} and {other}");
            }
            let listed = balanced.bpfvs.ipvsadm("-Lnc --persistent-conn")?;
            // As in IPVS, the answers of masqueraded real servers assure it.
            let state = if method == "-m" { " ASSURED " } else { " NONE " };
            let assured = listed.lines().filter(|line| line.contains(" sip ") && line.contains(&format!(" {}:", host(vip))));
            ensure!(assured.clone().count() == 2 && assured.clone().all(|line| line.contains(state)), "{layout:?}: {listed}");
        }
    }
    Ok(())
}
