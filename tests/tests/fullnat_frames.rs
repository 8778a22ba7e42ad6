//! FULLNAT, frame by frame: the loaded programs, run by the kernel, for both hooks and both families.
//!
//! Which local port a connection gets is drawn by lot, so a conversation reads it from the connection's entry, and from then on
//! every byte is foreseen.

use std::{
    cell::{Cell, RefCell},
    collections::HashSet,
    net::SocketAddr,
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    bench::{Addresses, Bench, MTU, ROUTER_MAC, SERVER_MACS, bracketed, socket},
    frame::{ACK, DATA, Extension, FIN, Frame, INIT, RST, SYN, check, ip, same},
    lab::Family,
    needs, needs_bpfvs,
    test_run::{Hook, Run, Verdict},
    wait,
};
use lb_common::{local::PORTS, reason::Reason};

/// A director with a local address in each family, `10.1.255.2` and `fd01::1:2`.
fn bench() -> Result<Bench> {
    let bench = Bench::new(&[])?;
    bench.director.ip("addr add 10.1.255.2/32 dev eth0\naddr add fd01::1:2/128 dev eth0 nodad")?;
    bench.bpfvs.succeed(&["localaddr", "add", "10.1.255.2,fd01::1:2"])?;
    Ok(bench)
}

const fn local_address(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "10.1.255.2",
        Family::Ipv6 => "fd01::1:2",
    }
}

/// A conversation between a client and a real server behind FULLNAT.
struct Conversation<'a> {
    bench: &'a Bench,
    hook: Hook,
    client: SocketAddr,
    vip: SocketAddr,
    server: SocketAddr,
    /// Known after the first packet.
    local: Cell<SocketAddr>,
}

impl<'a> Conversation<'a> {
    fn new(bench: &'a Bench, hook: Hook, family: Family, client_port: u16, server_port: u16) -> Self {
        let addresses = Addresses::of(family);
        Self {
            bench,
            hook,
            client: socket(addresses.client, client_port),
            vip: socket(addresses.vip, 80),
            server: socket(addresses.servers[0], server_port),
            local: Cell::new(socket(local_address(family), 0)),
        }
    }

    fn run(&self, frame: &[u8]) -> Result<Run> {
        let (bench, hook) = (self.bench, self.hook);
        bench.director.enter(|| bench.pinned.run(hook, frame))
    }

    /// Runs a frame that must be sent on, and returns its packet.
    fn sent(&self, frame: &[u8], next_hop: [u8; 6]) -> Result<Vec<u8>> {
        Ok(ip(&self.sent_frame(frame, next_hop)?)?.to_vec())
    }

    /// The same with all that stands before the packet.
    fn sent_frame(&self, frame: &[u8], next_hop: [u8; 6]) -> Result<Vec<u8>> {
        let before = self.bench.pinned.reasons()?;
        let run = self.run(frame)?;
        let after = self.bench.pinned.reasons()?;
        let counted: Vec<_> = Reason::ALL.iter().filter(|reason| before[**reason as usize] != after[**reason as usize]).collect();
        ensure!(run.verdict == Verdict::Send, "the verdict is {:?}, because of {counted:?}", run.verdict);
        ensure!(run.frame[..6] == next_hop, "the frame goes to {:02x?}", &run.frame[..6]);
        ensure!(run.frame[6..12] == self.bench.director_mac, "the frame comes from {:02x?}", &run.frame[6..12]);
        Ok(run.frame)
    }

    /// A packet from the client, and what the real server must get.
    fn request(&self, frame: &Frame) -> Result<()> {
        let got = self.sent(&frame.build(), SERVER_MACS[0])?;
        self.learn()?;
        same(&got, &self.inside(frame).packet()).with_context(|| format!("request {frame:?}"))
    }

    /// The same packet, as the real server must see it.
    fn inside(&self, frame: &Frame) -> Frame {
        Frame { source: self.local.get(), destination: self.server, ttl: frame.ttl - 1, ..frame.clone() }
    }

    /// An answer to such a packet, and what the client must get.
    fn reply(&self, frame: &Frame) -> Result<()> {
        let inside = Frame { source: self.server, destination: self.local.get(), ..frame.clone() };
        let outside = Frame { source: self.vip, destination: self.client, ttl: frame.ttl - 1, ..frame.clone() };
        let got = self.sent(&inside.build(), ROUTER_MAC)?;
        same(&got, &outside.packet()).with_context(|| format!("reply {frame:?}"))
    }

    /// Reads the local port from the connection's entry.
    fn learn(&self) -> Result<()> {
        let local = self.bench.pinned.local_of(self.client, self.vip.port())?.context("there is a connection")?;
        let port = u16::from_be(local.port());
        ensure!(port >= 1024, "the local port is {port}");
        self.local.set(SocketAddr::new(self.local.get().ip(), port));
        Ok(())
    }
}

/// Types a service on port 80 with the first real server on another port.
fn serve(bench: &Bench, protocol: &str, family: Family, server_port: u16) -> Result<()> {
    let addresses = Addresses::of(family);
    let (vip, server) = (bracketed(addresses.vip), bracketed(addresses.servers[0]));
    bench.bpfvs.ipvsadm(&format!("-A --{protocol}-service {vip}:80 -s rr"))?;
    bench.bpfvs.ipvsadm(&format!("-a --{protocol}-service {vip}:80 -r {server}:{server_port} -m --fullnat"))?;
    bench.bpfvs.wait_for_servers()
}

type Talk = fn(&Conversation<'_>) -> Result<()>;

/// What is said, in which protocol.
const TALKS: &[(&str, &str, Talk)] = &[
    ("a TCP conversation", "tcp", |talk| {
        let segment = |flags, data: &[u8]| Frame { payload: data.to_vec(), ..Frame::tcp(talk.client, talk.vip, flags) };
        talk.request(&segment(SYN, b""))?;
        talk.reply(&segment(SYN | ACK, b""))?;
        talk.request(&segment(ACK, b""))?;
        talk.request(&segment(ACK, b"GET / HTTP/1.0\r\n\r\n"))?;
        talk.reply(&segment(ACK, b"an odd number of bytes."))?;
        talk.reply(&segment(ACK, b"and an even one."))?;
        talk.reply(&segment(FIN | ACK, b""))?;
        talk.request(&segment(FIN | ACK, b""))?;
        talk.reply(&segment(ACK, b""))
    }),
    ("a UDP conversation", "udp", |talk| {
        for data in [&b"question"[..], b"?"] {
            let datagram = Frame { payload: data.to_vec(), ..Frame::udp(talk.client, talk.vip) };
            talk.request(&datagram)?;
            talk.reply(&datagram)?;
        }
        Ok(())
    }),
    ("an SCTP association", "sctp", |talk| {
        let chunk = |kind, data: usize| Frame { payload: vec![7; data], ..Frame::sctp(talk.client, talk.vip, kind) };
        talk.request(&chunk(INIT, 16))?;
        talk.reply(&chunk(2, 300))?;
        talk.request(&chunk(10, 256))?;
        talk.reply(&chunk(11, 0))?;
        talk.request(&chunk(DATA, 1200))?;
        talk.reply(&chunk(DATA, 64))
    }),
    ("options and extension headers", "tcp", |talk| {
        let extensions = vec![Extension::HopByHop, Extension::DestinationOptions];
        let odd = |flags| Frame { options: 40, extensions: extensions.clone(), ..Frame::tcp(talk.client, talk.vip, flags) };
        talk.request(&odd(SYN))?;
        talk.reply(&odd(SYN | ACK))?;
        talk.request(&odd(ACK))?;
        talk.reply(&odd(ACK))
    }),
    ("fragments follow the first", "udp", |talk| {
        let whole = |id| Frame {
            payload: vec![id as u8; 100],
            dont_fragment: false,
            id: talk.client.port() ^ id,
            ..Frame::udp(talk.client, talk.vip)
        };
        talk.request(&whole(3))?;
        let question = whole(1);
        let answer = Frame { source: talk.server, destination: talk.local.get(), ..whole(2) };
        let outside = Frame { source: talk.vip, destination: talk.client, ttl: answer.ttl - 1, ..answer.clone() };
        for (frame, wanted) in question.fragments(64).into_iter().zip(talk.inside(&question).fragments(64)) {
            ensure!(talk.sent(&frame, SERVER_MACS[0])? == ip(&wanted)?, "a fragment of the question is another");
        }
        for (frame, wanted) in answer.fragments(64).into_iter().zip(outside.fragments(64)) {
            ensure!(talk.sent(&frame, ROUTER_MAC)? == ip(&wanted)?, "a fragment of the answer is another");
        }
        Ok(())
    }),
    ("ICMP errors in both directions, about packets as each side knows them", "udp", |talk| {
        let datagram = Frame { payload: b"too long".to_vec(), ..Frame::udp(talk.client, talk.vip) };
        talk.request(&datagram)?;
        let (kind, code) = if talk.client.is_ipv4() { (3, 4) } else { (2, 0) };
        let error = |source, destination, quoted: &Frame| Frame::error(source, destination, kind, code, 1300, &quoted.packet());
        // A router behind the director reports to the local address; the client hears of it from the virtual one.
        let router = socket(if talk.client.is_ipv4() { "10.1.0.254" } else { "fd01::fe" }, 0).ip();
        let inside = error(router, talk.local.get().ip(), &talk.inside(&datagram));
        let quoted = Frame { ttl: datagram.ttl - 1, ..datagram.clone() };
        let outside = Frame { ttl: inside.ttl - 1, ..error(talk.vip.ip(), talk.client.ip(), &quoted) };
        same_error(&talk.sent(&inside.build(), ROUTER_MAC)?, &outside.packet()).context("an error for the client")?;
        // A router before the director reports to the virtual address; the real server hears of it from the local one.
        let router = socket(if talk.client.is_ipv4() { "10.9.0.254" } else { "fd09::fe" }, 0).ip();
        let reply = Frame { source: talk.vip, destination: talk.client, ..datagram.clone() };
        let before = Frame { source: talk.server, destination: talk.local.get(), ..reply.clone() };
        let outside = error(router, talk.vip.ip(), &reply);
        let inside = Frame { ttl: outside.ttl - 1, ..error(talk.local.get().ip(), talk.server.ip(), &before) };
        same_error(&talk.sent(&outside.build(), SERVER_MACS[0])?, &inside.packet()).context("an error for the real server")
    }),
    ("a reply whose time ends here, or that is too big, is answered to the real server", "udp", |talk| {
        let datagram = Frame::udp(talk.client, talk.vip);
        talk.request(&datagram)?;
        let reply = |frame: Frame| Frame { source: talk.server, destination: talk.local.get(), ..frame };
        let late = reply(Frame { ttl: 1, ..datagram.clone() });
        let big = reply(Frame { payload: vec![0; usize::from(MTU) + 100], ..datagram.clone() });
        for frame in [late, big] {
            let run = talk.run(&frame.build())?;
            ensure!(run.verdict == Verdict::Send, "the verdict is {:?}", run.verdict);
            let packet = ip(&run.frame)?;
            check(packet)?;
            let (source, destination) = if talk.client.is_ipv4() { (12..16, 16..20) } else { (8..24, 24..40) };
            let sent = frame.packet();
            ensure!(packet[source.clone()] == sent[destination.clone()] && packet[destination] == sent[source], "{packet:02x?}");
        }
        talk.reply(&datagram)
    }),
    ("what a real server says to the local address on its own account is the kernel's business", "tcp", |talk| {
        talk.request(&Frame::tcp(talk.client, talk.vip, SYN))?;
        let other = SocketAddr::new(talk.local.get().ip(), talk.local.get().port() ^ 1);
        for frame in [Frame::tcp(talk.server, other, SYN), Frame::udp(talk.server, talk.local.get())] {
            let run = talk.run(&frame.build())?;
            ensure!(run.verdict == Verdict::Pass && run.frame == frame.build(), "{:?}", run.verdict);
        }
        Ok(())
    }),
    ("a connection that is begun anew gets a port of its own, and the old one is free", "tcp", |talk| {
        talk.request(&Frame::tcp(talk.client, talk.vip, SYN))?;
        talk.reply(&Frame::tcp(talk.client, talk.vip, SYN | ACK))?;
        talk.request(&Frame::tcp(talk.client, talk.vip, ACK))?;
        let first = talk.local.get();
        talk.request(&Frame::tcp(talk.client, talk.vip, RST))?;
        let entries = talk.bench.pinned.replies()?;
        talk.request(&Frame::tcp(talk.client, talk.vip, SYN))?;
        ensure!(talk.bench.pinned.replies()? == entries, "a port was lost");
        ensure!(talk.local.get() != first, "the port was taken at once again, which happens once in 64512 times");
        talk.reply(&Frame::tcp(talk.client, talk.vip, SYN | ACK))
    }),
];

/// The checksum of an error over a quoted UDP packet: the quoted one's own checksum is that of other addresses, as with NAT.
fn same_error(got: &[u8], wanted: &[u8]) -> Result<()> {
    check(got)?;
    let header = if got[0] >> 4 == 4 { 20 } else { 40 };
    // Quoted UDP checksum, and the checksum of the error that covers it.
    let ignored = [header + 2, header + 3, 2 * header + 8 + 6, 2 * header + 8 + 7];
    ensure!(got.len() == wanted.len(), "it has {} bytes, not {}", got.len(), wanted.len());
    let differing: Vec<_> = (0..got.len()).filter(|at| got[*at] != wanted[*at] && !ignored.contains(at)).collect();
    ensure!(differing.is_empty(), "bytes {differing:?} differ:\n  got    {got:02x?}\n  wanted {wanted:02x?}");
    Ok(())
}

#[test]
fn conversations_are_translated_on_both_hooks_and_in_both_families() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = bench()?;
    let port = Cell::new(20_000_u16);
    let failures = RefCell::new(Vec::new());
    for (name, protocol, talk) in TALKS {
        for hook in Hook::ALL {
            for family in Family::ALL {
                for server_port in [80, 8080] {
                    port.set(port.get() + 1);
                    bench.bpfvs.ipvsadm("-C")?;
                    bench.pinned.forget_connections()?;
                    serve(&bench, protocol, family, server_port)?;
                    let conversation = Conversation::new(&bench, hook, family, port.get(), server_port);
                    if let Err(error) = talk(&conversation) {
                        failures.borrow_mut().push(format!("{name} [{hook:?}, {family:?}, port {server_port}]: {error:#}"));
                    }
                }
            }
        }
    }
    let failures = failures.into_inner();
    ensure!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

/// What stands between a frame's addresses and its packet: tags and the ethertype.
fn tags(frame: &[u8]) -> Result<&[u8]> {
    Ok(&frame[12..frame.len() - ip(frame)?.len()])
}

/// Frames with tags are translated, and keep them where the port has no VLAN of its own that could add or take one.
///
/// VLANs, and real servers in one, are `vm::kernels::vlans_and_direct_routing_on_debians_newer_kernel`'s.
#[test]
fn frames_with_tags_are_translated() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = bench()?;
    for family in Family::ALL {
        bench.bpfvs.ipvsadm("-C")?;
        serve(&bench, "tcp", family, 8080)?;
        for hook in Hook::ALL {
            let talk = Conversation::new(&bench, hook, family, 30_000 + hook as u16, 8080);
            for (vlans, flags) in [(vec![7], SYN), (vec![], ACK), (vec![7], ACK), (vec![7, 8], ACK)] {
                let case = || format!("{hook:?}, {family:?}, tags {vlans:?}, flags {flags}");
                let tagged = |frame: &Frame| Frame { vlans: vlans.clone(), ..frame.clone() }.build();
                let request = Frame::tcp(talk.client, talk.vip, flags);
                let got = talk.sent_frame(&tagged(&request), SERVER_MACS[0]).with_context(case)?;
                talk.learn()?;
                same(ip(&got)?, &talk.inside(&request).packet()).with_context(case)?;
                ensure!(tags(&got)? == tags(&tagged(&request))?, "request, {}: {:02x?}", case(), tags(&got)?);

                let reply =
                    Frame { source: talk.server, destination: talk.local.get(), ..Frame::tcp(talk.vip, talk.client, flags | ACK) };
                let outside = Frame { source: talk.vip, destination: talk.client, ttl: reply.ttl - 1, ..reply.clone() };
                let got = talk.sent_frame(&tagged(&reply), ROUTER_MAC).with_context(case)?;
                same(ip(&got)?, &outside.packet()).with_context(case)?;
                ensure!(tags(&got)? == tags(&tagged(&reply))?, "reply, {}: {:02x?}", case(), tags(&got)?);
            }
        }
    }
    Ok(())
}

/// As many connections as a local address has ports: each gets one of its own, the next one is refused and counted, and what
/// is given back can be had again, to the last port.
#[test]
fn every_port_is_used_once_and_the_next_connection_is_refused() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = bench()?;
    let family = Family::Ipv4;
    serve(&bench, "udp", family, 80)?;
    let frame = |number: u32| {
        let client = SocketAddr::new([10, 9, (1 + number / 60_000) as u8, 2].into(), (1000 + number % 60_000) as u16);
        Frame::udp(client, socket(Addresses::of(family).vip, 80)).build()
    };
    let mut buffer = vec![0; 2048];
    let begun = |number, buffer: &mut [u8]| -> Result<Option<u16>> {
        let (verdict, _) = bench.pinned.run_into(Hook::Xdp, &frame(number), buffer)?;
        Ok((verdict == Verdict::Send).then(|| u16::from_be_bytes([buffer[34], buffer[35]])))
    };
    let mut taken = HashSet::new();
    bench.director.enter(|| -> Result<()> {
        let mut number = 0;
        let mut refused = 0;
        // Near the end a search may give up before it has found the last ports; a thorough one is due ten times a second.
        let deadline = std::time::Instant::now() + wait::SOON;
        while taken.len() < PORTS as usize {
            ensure!(std::time::Instant::now() < deadline, "{} of {PORTS} ports after {refused} refusals", taken.len());
            match begun(number, &mut buffer)? {
                Some(port) => ensure!(port >= 1024 && taken.insert(port), "port {port} was given twice"),
                None => refused += 1,
            }
            number += 1;
        }
        println!("all {PORTS} ports; {refused} connections were refused before the last one was found");
        ensure!(begun(number, &mut buffer)?.is_none(), "there is a port that does not exist");
        Ok(())
    })?;
    let counted = bench.pinned.reasons()?[Reason::LocalPorts as usize];
    ensure!(counted > 0, "refusals are not counted");
    let list = bench.bpfvs.succeed(&["localaddr", "list"])?;
    let line = list.lines().find(|line| line.starts_with("10.1.255.2 ")).context("the address is listed")?;
    ensure!(line.split_whitespace().collect::<Vec<_>>() == ["10.1.255.2", "all", "64512", "0", "ready"], "{list}");
    ensure!(list.contains("began no connection"), "{list}");

    // Another real server has all its ports.
    let (vip, other) = (Addresses::of(family).vip, Addresses::of(family).servers[1]);
    bench.bpfvs.ipvsadm(&format!("-a -u {vip}:80 -r {other}:80 -m --fullnat"))?;
    bench.bpfvs.ipvsadm(&format!("-e -u {vip}:80 -r {}:80 -m --fullnat -w 0", Addresses::of(family).servers[0]))?;
    bench.bpfvs.wait_for_servers()?;
    ensure!(bench.director.enter(|| begun(80_000, &mut buffer))?.is_some(), "another real server's ports are taken, too");

    // A claim that was left without its connection is taken back.
    bench.bpfvs.ipvsadm(&format!("-d -u {vip}:80 -r {other}:80"))?;
    bench.bpfvs.ipvsadm(&format!("-e -u {vip}:80 -r {}:80 -m --fullnat -w 1", Addresses::of(family).servers[0]))?;
    bench.bpfvs.wait_for_servers()?;
    bench.pinned.lose_connections()?;
    bench.director.enter(|| {
        wait::until("a port to be taken back", wait::SOON, || begun(90_000, &mut buffer).is_ok_and(|port| port.is_some()))
    })
}
