//! FULLNAT between clients of IPv6 and real servers of IPv4, frame by frame: the loaded programs, run by the kernel, for both hooks.
//!
//! The local port is drawn by lot; it is read from the connection's entry, and from then on every byte is foreseen.

use std::{cell::Cell, collections::HashSet, net::SocketAddr};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    bench::{Addresses, Bench, MTU, ROUTER_MAC, SERVER_MACS, bracketed, socket},
    frame::{ACK, DATA, Extension, FIN, Frame, INIT, SYN, Transport, check, ip, same},
    lab::Family,
    needs, needs_bpfvs,
    test_run::{Hook, Run, Verdict},
    wait,
};
use lb_common::reason::Reason;

const LOCAL: &str = "10.1.255.2";
const SERVER: &str = "10.1.0.1";

/// A director with a local address of IPv4, and the first real server behind services of IPv6.
fn bench() -> Result<Bench> {
    let bench = Bench::new(&[])?;
    bench.director.ip(&format!("addr add {LOCAL}/32 dev eth0"))?;
    bench.bpfvs.succeed(&["localaddr", "add", LOCAL])?;
    let vip = bracketed(Addresses::of(Family::Ipv6).vip);
    for protocol in ["tcp", "udp", "sctp"] {
        bench.bpfvs.ipvsadm(&format!("-A --{protocol}-service {vip}:80 -s rr"))?;
        bench.bpfvs.ipvsadm(&format!("-a --{protocol}-service {vip}:80 -r {SERVER}:8080 -m --fullnat"))?;
    }
    bench.bpfvs.wait_for_servers()?;
    Ok(bench)
}

/// A conversation between a client of IPv6 and a real server of IPv4.
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
    fn new(bench: &'a Bench, hook: Hook, client_port: u16) -> Self {
        let addresses = Addresses::of(Family::Ipv6);
        Self {
            bench,
            hook,
            client: socket(addresses.client, client_port),
            vip: socket(addresses.vip, 80),
            server: socket(SERVER, 8080),
            local: Cell::new(socket(LOCAL, 0)),
        }
    }

    /// Runs a frame, and says what was counted.
    fn run(&self, frame: &[u8]) -> Result<(Run, Vec<Reason>)> {
        let (bench, hook) = (self.bench, self.hook);
        let before = bench.pinned.reasons()?;
        let run = bench.director.enter(|| bench.pinned.run(hook, frame))?;
        let after = bench.pinned.reasons()?;
        let counted = Reason::ALL.iter().copied().filter(|reason| before[*reason as usize] != after[*reason as usize]);
        Ok((run, counted.collect()))
    }

    /// Runs a frame that must be sent on, and returns it.
    fn sent_frame(&self, frame: &[u8], next_hop: [u8; 6]) -> Result<Vec<u8>> {
        let (run, counted) = self.run(frame)?;
        ensure!(run.verdict == Verdict::Send && counted.is_empty(), "the verdict is {:?}, because of {counted:?}", run.verdict);
        ensure!(run.frame[..6] == next_hop, "the frame goes to {:02x?}", &run.frame[..6]);
        ensure!(run.frame[6..12] == self.bench.director_mac, "the frame comes from {:02x?}", &run.frame[6..12]);
        Ok(run.frame)
    }

    fn sent(&self, frame: &[u8], next_hop: [u8; 6]) -> Result<Vec<u8>> {
        Ok(ip(&self.sent_frame(frame, next_hop)?)?.to_vec())
    }

    /// A packet from the client, and what the real server must get.
    fn request(&self, frame: &Frame) -> Result<()> {
        let got = self.sent(&frame.build(), SERVER_MACS[0])?;
        self.learn()?;
        same(&got, &self.inside(frame).packet()).with_context(|| format!("request {frame:?}"))
    }

    /// The same packet, as the real server must see it.
    fn inside(&self, frame: &Frame) -> Frame {
        Frame {
            source: self.local.get(),
            destination: self.server,
            ttl: frame.ttl - 1,
            id: 0,
            dont_fragment: true,
            ..frame.clone()
        }
    }

    /// The real server's packet that is an answer to such a one.
    fn answer(&self, frame: &Frame) -> Frame {
        Frame { source: self.server, destination: self.local.get(), ..frame.clone() }
    }

    /// An answer, and what the client must get.
    fn reply(&self, frame: &Frame) -> Result<()> {
        let outside = Frame { source: self.vip, destination: self.client, ttl: frame.ttl - 1, ..frame.clone() };
        let got = self.sent(&self.answer(frame).build(), ROUTER_MAC)?;
        same(&got, &outside.packet()).with_context(|| format!("reply {frame:?}"))
    }

    /// A frame that must be dropped, because it cannot be told in the other version.
    fn untold(&self, frame: &[u8]) -> Result<()> {
        let (run, counted) = self.run(frame)?;
        ensure!(run.verdict == Verdict::Drop && counted == [Reason::Untold], "{:?}, {counted:?}", run.verdict);
        Ok(())
    }

    /// Reads the local port from the connection's entry.
    fn learn(&self) -> Result<()> {
        let local = self.bench.pinned.local_of(self.client, self.vip.port())?.context("there is a connection")?;
        self.local.set(SocketAddr::new(self.local.get().ip(), u16::from_be(local.port())));
        Ok(())
    }
}

type Talk = fn(&Conversation<'_>) -> Result<()>;

const TALKS: &[(&str, Talk)] = &[
    ("a TCP conversation", |talk| {
        let segment = |flags, options: &[u8], data: &[u8]| {
            let transport = Transport::Segment { flags, sequence: 7, acknowledgement: 9, options: options.to_vec() };
            Frame { payload: data.to_vec(), traffic_class: 0xb8, ..Frame::new(talk.client, talk.vip, transport) }
        };
        talk.request(&segment(SYN, &[2, 4, 5, 0xa0], b""))?;
        talk.reply(&segment(SYN | ACK, &[2, 4, 5, 0xb4], b""))?;
        talk.request(&segment(ACK, &[], b""))?;
        talk.request(&segment(ACK, &[1; 12], b"GET / HTTP/1.0\r\n\r\n"))?;
        talk.reply(&segment(ACK, &[], b"an odd number of bytes."))?;
        talk.reply(&segment(ACK, &[1; 40], b"and an even one."))?;
        talk.reply(&segment(FIN | ACK, &[], b""))?;
        talk.request(&segment(FIN | ACK, &[], b""))?;
        talk.reply(&segment(ACK, &[], b""))
    }),
    ("a UDP conversation", |talk| {
        for data in [&b"question"[..], b"?", &[0xff; 1400]] {
            let datagram = Frame { payload: data.to_vec(), traffic_class: 3, ..Frame::udp(talk.client, talk.vip) };
            talk.request(&datagram)?;
            talk.reply(&datagram)?;
            talk.reply(&Frame { dont_fragment: false, ..datagram })?;
        }
        Ok(())
    }),
    ("an SCTP association", |talk| {
        let chunk = |kind, data: usize| Frame { payload: vec![7; data], ..Frame::sctp(talk.client, talk.vip, kind) };
        talk.request(&chunk(INIT, 16))?;
        talk.reply(&chunk(2, 300))?;
        talk.request(&chunk(10, 256))?;
        talk.reply(&chunk(11, 0))?;
        talk.request(&chunk(DATA, 1200))?;
        talk.reply(&chunk(DATA, 64))
    }),
    ("ICMP errors in both directions", |talk| {
        let datagram = Frame { payload: b"too long".to_vec(), ..Frame::udp(talk.client, talk.vip) };
        talk.request(&datagram)?;
        talk.reply(&datagram)?;
        // Type, code and MTU in IPv4 and in IPv6, towards the client and towards the real server.
        let towards_client =
            [((3, 4, 1300), (2, 0, 1320)), ((3, 1, 0), (1, 0, 0)), ((3, 3, 0), (1, 4, 0)), ((11, 0, 0), (3, 0, 0))];
        for (inner, outer) in towards_client {
            let error = |source, destination, (kind, code, rest), quoted: &Frame| {
                Frame::error(source, destination, kind, code, rest, &quoted.packet())
            };
            let router = socket("10.1.0.254", 0).ip();
            let inside = error(router, talk.local.get().ip(), inner, &talk.inside(&datagram));
            let quoted = Frame { ttl: datagram.ttl - 1, ..datagram.clone() };
            let outside = Frame { ttl: inside.ttl - 1, ..error(talk.vip.ip(), talk.client.ip(), outer, &quoted) };
            same_error(&talk.sent(&inside.build(), ROUTER_MAC)?, &outside.packet()).with_context(|| format!("{inner:?}"))?;
        }
        let towards_server =
            [((3, 4, 1380), (2, 0, 1400)), ((3, 3, 0), (1, 4, 0)), ((3, 10, 0), (1, 1, 0)), ((11, 0, 0), (3, 0, 0))];
        for (inner, outer) in towards_server {
            let error = |source, destination, (kind, code, rest), quoted: &Frame| {
                Frame::error(source, destination, kind, code, rest, &quoted.packet())
            };
            let router = socket("fd09::fe", 0).ip();
            let reply = Frame { source: talk.vip, destination: talk.client, ..datagram.clone() };
            let outside = error(router, talk.vip.ip(), outer, &reply);
            let before = Frame { id: 0, dont_fragment: true, ..talk.answer(&reply) };
            let error = error(talk.local.get().ip(), talk.server.ip(), inner, &before);
            let inside = Frame { ttl: outside.ttl - 1, id: 0, dont_fragment: true, ..error };
            same_error(&talk.sent(&outside.build(), SERVER_MACS[0])?, &inside.packet()).with_context(|| format!("{outer:?}"))?;
        }
        Ok(())
    }),
    ("what ends here, or is too big for its way, is answered in the sender's version", |talk| {
        let datagram = Frame::udp(talk.client, talk.vip);
        talk.request(&datagram)?;
        talk.reply(&datagram)?;
        // As a packet of IPv6 it has so many bytes.
        let sized = |bytes: u16| Frame { payload: vec![0; usize::from(bytes) - 48], ..datagram.clone() };
        talk.request(&sized(MTU + 20))?;
        talk.reply(&sized(MTU))?;
        let late = Frame { ttl: 1, ..datagram.clone() };
        for (frame, inside, wanted) in [
            (late.clone(), false, (3, 0, 0)),
            (sized(MTU + 21), false, (2, 0, u32::from(MTU) + 20)),
            (talk.answer(&late), true, (11, 0, 0)),
            (talk.answer(&sized(MTU + 1)), true, (3, 4, u32::from(MTU) - 20)),
        ] {
            let (run, counted) = talk.run(&frame.build())?;
            ensure!(run.verdict == Verdict::Send, "{wanted:?}: {:?}, {counted:?}", run.verdict);
            let packet = ip(&run.frame)?;
            check(packet)?;
            let (source, destination, icmp) = if inside { (12..16, 16..20, 20) } else { (8..24, 24..40, 40) };
            let sent = frame.packet();
            ensure!(packet[source.clone()] == sent[destination.clone()] && packet[destination] == sent[source], "{packet:02x?}");
            let rest = u32::from_be_bytes([packet[icmp + 4], packet[icmp + 5], packet[icmp + 6], packet[icmp + 7]]);
            ensure!((packet[icmp], packet[icmp + 1], rest) == wanted, "{wanted:?}: {packet:02x?}");
        }
        talk.reply(&datagram)
    }),
    ("what has no counterpart is dropped and counted", |talk| {
        let whole =
            Frame { payload: vec![1; 100], dont_fragment: false, id: talk.client.port(), ..Frame::udp(talk.client, talk.vip) };
        talk.request(&whole)?;
        talk.reply(&whole)?;
        let extended = Frame { extensions: vec![Extension::DestinationOptions], ..whole.clone() };
        talk.untold(&extended.build()).context("an extension header")?;
        talk.untold(&talk.answer(&Frame { options: 8, ..whole.clone() }).build()).context("options")?;
        for part in whole.fragments(64).iter().chain(&talk.answer(&whole).fragments(64)) {
            talk.untold(part).context("a fragment")?;
        }
        let mut unsummed = talk.answer(&whole).build();
        unsummed[14 + 20 + 6..][..2].fill(0);
        talk.untold(&unsummed).context("no checksum")?;
        let quench = Frame::error(talk.server.ip(), talk.local.get().ip(), 4, 0, 0, &talk.inside(&whole).packet());
        talk.untold(&quench.build()).context("source quench")?;
        let reply = Frame { source: talk.vip, destination: talk.client, ..whole.clone() };
        let problem = Frame::error(socket("fd09::fe", 0).ip(), talk.vip.ip(), 4, 0, 40, &reply.packet());
        talk.untold(&problem.build()).context("a parameter problem")?;
        talk.reply(&whole)
    }),
    ("tags are kept at XDP; at tc the kernel cannot change what they stand before", |talk| {
        let datagram = Frame::udp(talk.client, talk.vip);
        talk.request(&datagram)?;
        talk.reply(&datagram)?;
        for vlans in [vec![7], vec![7, 8]] {
            let request = Frame { vlans: vlans.clone(), ..datagram.clone() };
            let reply = Frame { vlans, ..talk.answer(&datagram) };
            let outside = Frame { source: talk.vip, destination: talk.client, ttl: reply.ttl - 1, ..datagram.clone() };
            for (frame, wanted, next_hop) in [(&request, talk.inside(&datagram), SERVER_MACS[0]), (&reply, outside, ROUTER_MAC)] {
                let frame_before = frame.build();
                if talk.hook == Hook::Tc {
                    let (run, counted) = talk.run(&frame_before)?;
                    ensure!(run.frame == frame_before, "the frame was changed");
                    ensure!(
                        (run.verdict, counted.as_slice()) == (Verdict::Pass, &[Reason::Vlan][..]),
                        "{:?}, {counted:?}",
                        run.verdict
                    );
                    continue;
                }
                let got = talk.sent_frame(&frame_before, next_hop)?;
                same(ip(&got)?, &wanted.packet())?;
                let tags = 4 * frame.vlans.len();
                ensure!(got[12..12 + tags] == frame_before[12..12 + tags], "the tags are others: {:02x?}", &got[..22]);
            }
        }
        Ok(())
    }),
    ("what a real server says to the local address on its own account is the kernel's business", |talk| {
        talk.request(&Frame::tcp(talk.client, talk.vip, SYN))?;
        let other = SocketAddr::new(talk.local.get().ip(), talk.local.get().port() ^ 1);
        for frame in [Frame::tcp(talk.server, other, SYN), Frame::udp(talk.server, talk.local.get())] {
            let (run, _) = talk.run(&frame.build())?;
            ensure!(run.verdict == Verdict::Pass && run.frame == frame.build(), "{:?}", run.verdict);
        }
        Ok(())
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
fn conversations_are_told_in_the_other_version() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = bench()?;
    let mut failures = Vec::new();
    for (number, (name, talk)) in (0_u16..).zip(TALKS) {
        for hook in Hook::ALL {
            let conversation = Conversation::new(&bench, hook, 20_000 + 2 * number + hook as u16);
            if let Err(error) = talk(&conversation) {
                failures.push(format!("{name} [{hook:?}]: {error:#}"));
            }
        }
    }
    ensure!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

/// One local address serves clients of both families, and no port twice: replies could not be told apart.
#[test]
fn ports_are_shared_with_clients_of_ipv4() -> Result<()> {
    const EACH: u32 = 12_000;
    needs!(root);
    needs_bpfvs!();
    let bench = bench()?;
    let vip = Addresses::of(Family::Ipv4).vip;
    bench.bpfvs.ipvsadm(&format!("-A -u {vip}:80 -s rr"))?;
    bench.bpfvs.ipvsadm(&format!("-a -u {vip}:80 -r {SERVER}:8080 -m --fullnat"))?;
    bench.bpfvs.wait_for_servers()?;
    let mut buffer = vec![0; 2048];
    let mut taken = HashSet::new();
    bench.director.enter(|| -> Result<()> {
        for number in 0..2 * EACH {
            let addresses = Addresses::of(Family::ALL[number as usize % 2]);
            let frame = Frame::udp(socket(addresses.client, (2000 + number / 2) as u16), socket(addresses.vip, 80)).build();
            let (verdict, _) = bench.pinned.run_into(Hook::ALL[number as usize / 2 % 2], &frame, &mut buffer)?;
            ensure!(verdict == Verdict::Send, "connection {number}: {verdict:?}");
            let port = u16::from_be_bytes([buffer[34], buffer[35]]);
            ensure!(buffer[14] == 0x45 && taken.insert(port), "connection {number}: port {port} was given twice");
        }
        Ok(())
    })?;
    bench.bpfvs.ipvsadm("--set 0 0 1")?;
    wait::until("all ports to be given back", wait::SOON, || bench.pinned.replies().is_ok_and(|replies| replies == 0))
}
