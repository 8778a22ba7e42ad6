//! Telling a FULLNAT server who its client is, frame by frame: the loaded programs, run by the kernel, for both hooks and both
//! families.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    bench::{Addresses, Bench, MTU, ROUTER_MAC, SERVER_MACS, bracketed, socket},
    frame::{ACK, Extension, Frame, RST, SYN, Transport, ip, same},
    lab::Family,
    needs, needs_bpfvs,
    test_run::{Hook, Run, Verdict},
};
use lb_common::reason::Reason;

/// No-operations and timestamps, as most segments carry them.
const TIMESTAMPS: [u8; 12] = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];

/// A connection, as its client, its server, and the virtual address between them know it.
struct Conversation<'a> {
    bench: &'a Bench,
    hook: Hook,
    client: SocketAddr,
    vip: SocketAddr,
    local: SocketAddr,
    server: SocketAddr,
}

/// A segment's special parts.
#[derive(Clone, Default)]
struct Segment {
    flags: u8,
    options: Vec<u8>,
    data: Vec<u8>,
    /// IPv4 options and IPv6 extension headers.
    odd: bool,
}

impl<'a> Conversation<'a> {
    /// Begins it: a SYN and its answer, in which the client is told a smaller segment size.
    fn begin(bench: &'a Bench, hook: Hook, family: Family, port: u16) -> Result<Self> {
        let addresses = Addresses::of(family);
        let (client, vip) = (socket(addresses.client, port), socket(addresses.vip, 80));
        let server = socket(addresses.servers[0], 80);
        let mut talk = Self { bench, hook, client, vip, local: socket(addresses.client, 0), server };
        let size = |bytes: u16| [&[2, 4], &bytes.to_be_bytes()[..]].concat();
        let syn = Segment { flags: SYN, options: size(1460), ..Segment::default() };
        let sent = talk.sent(&Conversation::frame(talk.client, talk.vip, &syn), SERVER_MACS[0])?;
        let local = bench.pinned.local_of(client, 80)?.context("there is a connection")?;
        talk.local = socket(local_address(family), u16::from_be(local.port()));
        // A SYN completes no handshake.
        same(&sent, &Conversation::aged(talk.local, talk.server, &syn))?;
        let answer = |bytes| Segment { flags: SYN | ACK, options: [&size(bytes)[..], &TIMESTAMPS].concat(), ..Segment::default() };
        let sent = talk.sent(&Conversation::frame(talk.server, talk.local, &answer(1460)), ROUTER_MAC)?;
        same(&sent, &Conversation::aged(talk.vip, talk.client, &answer(1460 - talk.option().len() as u16)))
            .context("SYN and ACK")?;
        Ok(talk)
    }

    /// The option that names the client.
    fn option(&self) -> Vec<u8> {
        option(self.client)
    }

    /// A segment from the real server that acknowledges this number.
    fn answer(&self, acknowledgement: u32, data: &[u8]) -> Result<()> {
        let transport = Transport::Segment { flags: ACK, sequence: 2002, acknowledgement, options: TIMESTAMPS.to_vec() };
        let frame = Frame { payload: data.to_vec(), ..Frame::new(self.server, self.local, transport) };
        let outside = Frame { source: self.vip, destination: self.client, ttl: frame.ttl - 1, ..frame.clone() };
        same(&self.sent(&frame, ROUTER_MAC)?, &outside.packet())
    }

    fn frame(source: SocketAddr, destination: SocketAddr, segment: &Segment) -> Frame {
        let Segment { flags, odd, .. } = *segment;
        let transport = Transport::Segment { flags, sequence: 1001, acknowledgement: 2002, options: segment.options.clone() };
        Frame {
            payload: segment.data.clone(),
            options: if odd { 40 } else { 0 },
            extensions: if odd { vec![Extension::HopByHop, Extension::DestinationOptions] } else { Vec::new() },
            ..Frame::new(source, destination, transport)
        }
    }

    /// The packet behind the director.
    fn aged(source: SocketAddr, destination: SocketAddr, segment: &Segment) -> Vec<u8> {
        let frame = Self::frame(source, destination, segment);
        Frame { ttl: frame.ttl - 1, ..frame }.packet()
    }

    fn run(&self, frame: &Frame) -> Result<Run> {
        let bytes = frame.build();
        self.bench.director.enter(|| self.bench.pinned.run(self.hook, &bytes))
    }

    /// Runs a frame that must be sent on, and returns its packet.
    fn sent(&self, frame: &Frame, next_hop: [u8; 6]) -> Result<Vec<u8>> {
        let before = self.bench.pinned.reasons()?;
        let run = self.run(frame)?;
        let after = self.bench.pinned.reasons()?;
        let counted: Vec<_> = Reason::ALL.iter().filter(|reason| before[**reason as usize] != after[**reason as usize]).collect();
        ensure!(run.verdict == Verdict::Send, "the verdict is {:?}, because of {counted:?}", run.verdict);
        ensure!(run.frame[..6] == next_hop, "the frame goes to {:02x?}", &run.frame[..6]);
        Ok(ip(&run.frame)?.to_vec())
    }

    /// A segment from the client, with what the real server gets in front of its options.
    fn request(&self, segment: &Segment, inserted: &[u8]) -> Result<()> {
        let sent = self.sent(&Self::frame(self.client, self.vip, segment), SERVER_MACS[0])?;
        let inside = Segment { options: [inserted, &segment.options].concat(), ..segment.clone() };
        same(&sent, &Self::aged(self.local, self.server, &inside))
    }

    fn reply(&self, segment: &Segment) -> Result<()> {
        let sent = self.sent(&Self::frame(self.server, self.local, segment), ROUTER_MAC)?;
        same(&sent, &Self::aged(self.vip, self.client, segment))
    }
}

const fn local_address(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "10.1.255.2",
        Family::Ipv6 => "fd01::1:2",
    }
}

fn option(client: SocketAddr) -> Vec<u8> {
    let address = match client.ip() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    [&[254, 4 + address.len() as u8], &client.port().to_be_bytes()[..], &address].concat()
}

fn bench() -> Result<Bench> {
    let bench = Bench::new(&[])?;
    bench.director.ip("addr add 10.1.255.2/32 dev eth0\naddr add fd01::1:2/128 dev eth0 nodad")?;
    bench.bpfvs.succeed(&["localaddr", "add", "10.1.255.2,fd01::1:2"])?;
    for family in Family::ALL {
        let addresses = Addresses::of(family);
        let (vip, server) = (bracketed(addresses.vip), bracketed(addresses.servers[0]));
        bench.bpfvs.succeed(&["service", "add", &format!("tcp://{vip}:80")])?;
        bench.bpfvs.succeed(&["server", "add", &format!("tcp://{vip}:80"), &format!("{server}:80"), "-m", "fullnat", "--toa"])?;
    }
    bench.bpfvs.wait_for_servers()?;
    Ok(bench)
}

#[test]
fn segments_name_the_client_until_the_first_answer() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = bench()?;
    let mut port = 40_000;
    for (hook, family) in Hook::ALL.iter().flat_map(|hook| Family::ALL.map(|family| (*hook, family))) {
        let mut begin = || {
            port += 1;
            Conversation::begin(&bench, hook, family, port)
        };
        let acknowledgement = Segment { flags: ACK, options: TIMESTAMPS.to_vec(), ..Segment::default() };
        let data = |bytes: usize| Segment { data: (0..bytes).map(|byte| byte as u8).collect(), ..acknowledgement.clone() };
        (|| -> Result<()> {
            let talk = begin()?;
            let option = talk.option();
            talk.request(&acknowledgement, &option).context("the handshake's last segment")?;
            // Of all lengths, because they are moved in pieces; the longest just fits.
            let longest = usize::from(MTU) - if family == Family::Ipv4 { 20 } else { 40 } - 32 - option.len();
            for bytes in [1, 115, 116, 117, 500, longest - 1, longest] {
                talk.request(&data(bytes), &option).with_context(|| format!("{bytes} bytes of data, unanswered"))?;
            }
            let plain = Segment { options: Vec::new(), ..data(3) };
            talk.request(&plain, &option).context("without other options")?;
            talk.request(&Segment { odd: true, ..data(10) }, &option).context("with headers that are odd")?;
            // The first of its kind counts.
            let forged = Segment { options: self::option("192.0.2.66:66".parse()?), ..data(3) };
            talk.request(&forged, &option).context("with a forged option")?;

            let unnamed = bench.pinned.reasons()?[Reason::Unnamed as usize];
            let full = Segment { options: vec![1; 40], ..data(3) };
            let run = talk.run(&Conversation::frame(talk.client, talk.vip, &full))?;
            ensure!(run.verdict == Verdict::Drop, "a full header: {:?}", run.verdict);
            ensure!(bench.pinned.reasons()?[Reason::Unnamed as usize] == unnamed + 1, "a full header was not counted");
            let run = talk.run(&Conversation::frame(talk.client, talk.vip, &data(longest + 1)))?;
            ensure!(ip(&run.frame)?.len() != usize::from(MTU), "one byte too many goes to the server");

            // Repeated by a server whose connection is not complete yet, for segments that it did not expect.
            talk.answer(2002, b"").context("an acknowledgement of nothing")?;
            talk.request(&acknowledgement, &option).context("after an answer that proves nothing")?;
            let (number, said) = if talk.client.port() % 2 == 0 { (2003, &b""[..]) } else { (2002, &b"hello"[..]) };
            talk.answer(number, said).context("the first answer")?;
            for segment in [&acknowledgement, &data(100), &full, &forged] {
                talk.request(segment, &[]).context("answered")?;
            }
            talk.reply(&data(7)).context("a later answer")?;

            let talk = begin()?;
            talk.request(&Segment { flags: RST, ..Segment::default() }, &[]).context("a reset")
        })()
        .with_context(|| format!("{hook:?}, {family:?}"))?;
    }
    Ok(())
}
