//! A million frames, made up and mutilated, through the loaded programs: never a crash, a hang or a byte outside its place, and
//! the verdict is that of the host's model (`lb_common::model`), which has read no line of the datapath.
//!
//! The model knows no history. When the two disagree, the tables are emptied and the program is asked again: an earlier
//! frame may have made a connection. `BPFVS_FUZZ_FRAMES` and `BPFVS_FUZZ_SEED` choose how many and which.
//!
//! Masquerading lives from what was before, so no model says what has to come out there. What came out is judged by what went in:
//! nothing but addresses, ports, time to live and checksums may change, to what they have to be; and whether a checksum is right,
//! and if not by how much, may not.

use std::{
    env,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bpfvs_tests::{
    bench::{Addresses, Bench, MTU, bracketed},
    frame::{Extension, Frame, Transport, around, check, crc32c, ip},
    lab::Family,
    needs, needs_bpfvs,
    test_run::{Hook, Verdict},
};
use fastrand::Rng;
use lb_common::{
    checksum::{fold, sum},
    model::{self, Model, VirtualService},
    packet::{Fragment, Network, V4, V6, protocol},
    reason::Reason,
};

/// Frames for each hook.
const FRAMES: u64 = 500_000;
/// The test gives up (and fails) if it takes longer.
const DEADLINE: Duration = Duration::from_secs(300);
/// How often the counted reason is compared, too: reading the counters costs much more than a frame.
const SAMPLE: u64 = 50;

#[test]
fn programs_and_model_agree_on_a_million_frames() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let number = |name: &str, default| {
        env::var(name).map_or(Ok(default), |text| text.parse::<u64>().with_context(|| format!("read {name}")))
    };
    let (frames, seed) = (number("BPFVS_FUZZ_FRAMES", FRAMES)?, number("BPFVS_FUZZ_SEED", fastrand::u64(..))?);
    println!("BPFVS_FUZZ_SEED={seed}");

    // A small table is quickly emptied.
    let bench = Bench::new(&["--max-connections", "1024"])?;
    // Nor is any of this a flood.
    bench.bpfvs.succeed(&["sysctl", "secure_tcp=0"])?;
    bench.pinned.lift_answer_limit()?;
    let model = set_up(&bench)?;
    bench.director.enter(|| {
        for hook in Hook::ALL {
            fuzz(&bench, &model, hook, frames, seed).with_context(|| format!("{hook:?}, BPFVS_FUZZ_SEED={seed}"))?;
        }
        Ok(())
    })
}

/// A service for each protocol and family, each with one real server.
fn set_up(bench: &Bench) -> Result<Model> {
    let mut model = Model::default();
    for family in Family::ALL {
        let addresses = Addresses::of(family);
        for (protocol, option) in [(6, "-t"), (17, "-u"), (132, "--sctp-service")] {
            let vip = bracketed(addresses.vip);
            bench.bpfvs.ipvsadm(&format!("-A {option} {vip}:80 -s rr"))?;
            bench.bpfvs.ipvsadm(&format!("-a {option} {vip}:80 -r {}:80 -g", bracketed(addresses.servers[0])))?;
            model.services.push(VirtualService { protocol, vip: addresses.vip.parse()?, port: 80, mtu: MTU });
        }
    }
    bench.bpfvs.wait_for_servers()?;
    Ok(model)
}

fn fuzz(bench: &Bench, model: &Model, hook: Hook, frames: u64, seed: u64) -> Result<()> {
    let mut random = Rng::with_seed(seed);
    let mut buffer = vec![0; 8192];
    let (begin, mut refused, mut sent, mut asked_again) = (Instant::now(), 0_u64, 0_u64, 0_u64);
    for number in 0..frames {
        ensure!(begin.elapsed() < DEADLINE, "only {number} frames in {} seconds", DEADLINE.as_secs());
        let frame = make_frame(&mut random);
        let wanted = model.verdict(&frame);
        let sampled = number % SAMPLE == 0;
        let before = if sampled { Some(bench.pinned.reasons()?) } else { None };
        let Ok((mut verdict, mut length)) = bench.pinned.run_into(hook, &frame, &mut buffer) else {
            // The kernel runs tc on no IP packet without a whole IP header, and neither program on no frame at all.
            ensure!(frame.len() < 14 + 40, "the kernel refused {frame:02x?}");
            refused += 1;
            continue;
        };
        let mut agreed = agrees(hook, &frame, wanted, verdict, before.as_deref(), bench)?;
        if !agreed {
            asked_again += 1;
            bench.pinned.forget_connections()?;
            bench.pinned.forget_fragments()?;
            let before = bench.pinned.reasons()?;
            (verdict, length) = bench.pinned.run_into(hook, &frame, &mut buffer)?;
            agreed = agrees(hook, &frame, wanted, verdict, Some(&before), bench)?;
        }
        ensure!(agreed, "frame {number}: the model says {wanted:?}, the program {verdict:?}: {frame:02x?}");
        sent += u64::from(verdict == Verdict::Send);
        in_its_place(wanted, verdict, &frame, &buffer[..length])
            .with_context(|| format!("frame {number}: {wanted:?}: {frame:02x?}"))?;
    }
    println!(
        "{hook:?}: {frames} frames in {:?}; {sent} sent, {asked_again} asked again, {refused} refused by the kernel",
        begin.elapsed()
    );
    // A fuzzer that reaches nothing shows nothing.
    ensure!(sent > frames / 20, "only {sent} of {frames} frames were sent");
    ensure!(asked_again < frames / 4, "{asked_again} of {frames} frames depended on earlier ones");
    Ok(())
}

/// Whether verdict and (if counters of before are given) reason are those of the model.
fn agrees(
    hook: Hook,
    frame: &[u8],
    wanted: model::Verdict,
    verdict: Verdict,
    before: Option<&[u64]>,
    bench: &Bench,
) -> Result<bool> {
    let (expected, reason) = match wanted {
        model::Verdict::Forwarded(_) => (Verdict::Send, None),
        model::Verdict::Answered(reason) => (Verdict::Send, Some(reason)),
        model::Verdict::Dropped(reason) => (Verdict::Drop, Some(reason)),
        model::Verdict::Passed(reason) => (Verdict::Pass, Some(reason)),
    };
    // The model has no opinion on tags; the hooks may leave them to others.
    let tagged = matches!(frame.get(12..14), Some([0x81, 0] | [0x88, 0xa8]));
    if tagged && matches!(wanted, model::Verdict::Forwarded(_) | model::Verdict::Answered(_)) && verdict == Verdict::Pass {
        return Ok(true);
    }
    if verdict != expected {
        return Ok(false);
    }
    let Some(before) = before else { return Ok(true) };
    let after = bench.pinned.reasons()?;
    let counted: Vec<_> =
        Reason::ALL.iter().copied().filter(|reason| after[*reason as usize] != before[*reason as usize]).collect();
    let wanted: Vec<_> = reason.into_iter().collect();
    if counted != wanted && hook == Hook::Tc && tagged {
        // The kernel's test run leaves tags in the data, where tc finds none on a real wire.
        return Ok(true);
    }
    Ok(counted == wanted)
}

/// What was passed is untouched; what was sent by direct routing differs in its hardware addresses, its TTL and the checksum.
fn in_its_place(wanted: model::Verdict, verdict: Verdict, before: &[u8], after: &[u8]) -> Result<()> {
    match (wanted, verdict) {
        (_, Verdict::Pass) => ensure!(before == after, "a passed frame was changed: {after:02x?}"),
        (model::Verdict::Forwarded(_), Verdict::Send) => {
            let (Ok(old), Ok(new)) = (ip(before), ip(after)) else { bail!("what was sent is no IP: {after:02x?}") };
            ensure!(old.len() == new.len(), "the packet has {} bytes instead of {}", new.len(), old.len());
            let changed = |at: &usize| old[*at] != new[*at];
            let allowed: &[usize] = if old[0] >> 4 == 4 { &[8, 10, 11] } else { &[7] };
            let wrong: Vec<_> = (0..old.len()).filter(changed).filter(|at| !allowed.contains(at)).collect();
            ensure!(wrong.is_empty(), "bytes {wrong:?} of the packet were changed: {after:02x?}");
        }
        // Answers are checked byte by byte in the table of cases.
        _ => {}
    }
    Ok(())
}

/// A frame: often right, often nearly right, sometimes noise.
fn make_frame(random: &mut Rng) -> Vec<u8> {
    let mut frame = match random.u8(..20) {
        0 => (0..random.usize(14..200)).map(|_| random.u8(..)).collect(),
        1 => around(&(0..random.usize(1..120)).map(|_| random.u8(..)).collect::<Vec<_>>()),
        _ => {
            let recipe = recipe(random);
            if random.u8(..8) == 0 {
                let cut = 8 * random.usize(1..3);
                let whole = Frame { payload: vec![0; 64], ..recipe };
                let [first, later] = whole.fragments(cut);
                if random.bool() { first } else { later }
            } else {
                recipe.build()
            }
        }
    };
    spoil(random, &mut frame);
    frame
}

/// Mutilates a frame, more often than not.
fn spoil(random: &mut Rng, frame: &mut Vec<u8>) {
    for _ in 0..[0, 0, 0, 1, 1, 2, 5][random.usize(..7)] {
        let at = random.usize(..frame.len());
        match random.u8(..4) {
            0 => frame[at] ^= 1 << random.u8(..8),
            1 => frame[at] = random.choice([0, 1, 4, 5, 0x0f, 0x40, 0x45, 0x60, 0x7f, 0x80, 0xff]).unwrap_or(0),
            2 => frame[at] = random.u8(..),
            _ if at >= 14 => frame.truncate(at),
            _ => {}
        }
    }
    // Below the least that the kernel takes.
    frame.resize(frame.len().max(14), 0);
}

fn recipe(random: &mut Rng) -> Frame {
    let addresses = Addresses::of(random.choice(Family::ALL).unwrap_or(Family::Ipv4));
    let address = |text: &str| -> IpAddr { text.parse().expect("the bench's addresses are well-formed") };
    let client = match address(addresses.client) {
        IpAddr::V4(client) => IpAddr::V4((client.to_bits() & !0xff | random.u32(1..255)).into()),
        IpAddr::V6(client) => IpAddr::V6((client.to_bits() | u128::from(random.u32(..))).into()),
    };
    let vip = address(if random.u8(..12) == 0 { addresses.foreign } else { addresses.vip });
    let source = SocketAddr::new(client, if random.u8(..30) == 0 { 20 } else { random.u16(..) });
    let destination = SocketAddr::new(vip, if random.u8(..10) == 0 { random.u16(..) } else { 80 });
    dressed(random, source, destination)
}

/// A packet between two sockets, in any of the forms that packets take.
fn dressed(random: &mut Rng, source: SocketAddr, destination: SocketAddr) -> Frame {
    let transport = match random.u8(..12) {
        0..=4 => Transport::Tcp { flags: if random.bool() { 2 } else { random.u8(..) } },
        5..=7 => Transport::Udp,
        8 | 9 => Transport::Sctp { chunk: if random.bool() { 1 } else { random.u8(..16) } },
        10 => Transport::Icmp {
            kind: random.choice([0, 1, 2, 3, 4, 5, 8, 11, 12, 128, 135]).unwrap_or(0),
            code: random.u8(..16),
            rest: 1300,
        },
        _ => Transport::Raw { protocol: random.u8(..) },
    };
    let payload = match (&transport, random.u8(..24)) {
        (Transport::Icmp { .. }, _) => Frame::tcp(destination, source, 16).packet(),
        (_, 0) => vec![0; random.usize(1400..1600)],
        _ => vec![0; random.usize(..80)],
    };
    Frame {
        vlans: [vec![], vec![], vec![], vec![], vec![], vec![7], vec![7, 8]][random.usize(..7)].clone(),
        ttl: if random.u8(..20) == 0 { random.u8(..3) } else { 64 },
        traffic_class: random.u8(..),
        dont_fragment: random.bool(),
        id: random.u16(..),
        options: if random.u8(..6) == 0 { 4 * random.usize(..11) } else { 0 },
        extensions: [vec![], vec![], vec![], vec![Extension::HopByHop], vec![Extension::HopByHop, Extension::DestinationOptions]]
            [random.usize(..5)]
        .clone(),
        payload,
        ..Frame::new(source, destination, transport)
    }
}

/// A connection's ends, as its real server sees them.
#[derive(Clone, Copy)]
struct Living {
    client: SocketAddr,
    server: SocketAddr,
    protocol: u8,
}

/// The virtual ports of masqueraded services, and the real server's.
const PORTS: [(u16, u16); 2] = [(80, 8080), (81, 81)];
/// How many connections may be living at a time; then all are forgotten.
const LIVING: usize = 400;

#[test]
fn masquerading_changes_only_what_it_has_to() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let number = |name: &str, default| {
        env::var(name).map_or(Ok(default), |text| text.parse::<u64>().with_context(|| format!("read {name}")))
    };
    let (frames, seed) = (number("BPFVS_FUZZ_FRAMES", FRAMES)? / 5, number("BPFVS_FUZZ_SEED", fastrand::u64(..))?);
    println!("BPFVS_FUZZ_SEED={seed}");
    let bench = Bench::new(&["--max-connections", "4096"])?;
    bench.bpfvs.succeed(&["sysctl", "secure_tcp=0"])?;
    bench.pinned.lift_answer_limit()?;
    for family in Family::ALL {
        let addresses = Addresses::of(family);
        let (vip, server) = (bracketed(addresses.vip), bracketed(addresses.servers[0]));
        for option in ["-t", "-u", "--sctp-service"] {
            for (port, server_port) in PORTS {
                bench.bpfvs.ipvsadm(&format!("-A {option} {vip}:{port} -s rr"))?;
                bench.bpfvs.ipvsadm(&format!("-a {option} {vip}:{port} -r {server}:{server_port} -m"))?;
            }
        }
    }
    bench.bpfvs.wait_for_servers()?;
    bench.director.enter(|| {
        for hook in Hook::ALL {
            fuzz_masquerading(&bench, hook, frames, seed).with_context(|| format!("{hook:?}, BPFVS_FUZZ_SEED={seed}"))?;
        }
        Ok(())
    })
}

fn fuzz_masquerading(bench: &Bench, hook: Hook, frames: u64, seed: u64) -> Result<()> {
    let mut random = Rng::with_seed(seed);
    let mut buffer = vec![0; 8192];
    let mut living: Vec<Living> = Vec::new();
    let mut seen = Seen::default();
    let begin = Instant::now();
    for number in 0..frames {
        ensure!(begin.elapsed() < DEADLINE, "only {number} frames in {} seconds", DEADLINE.as_secs());
        if living.len() >= LIVING {
            bench.pinned.forget_connections()?;
            bench.pinned.forget_fragments()?;
            living.clear();
        }
        let (frame, whole) = masqueraded_frame(&mut random, &living);
        let Ok((verdict, length)) = bench.pinned.run_into(hook, &frame, &mut buffer) else {
            ensure!(frame.len() < 14 + 40, "the kernel refused {frame:02x?}");
            continue;
        };
        let after = &buffer[..length];
        judge(hook, verdict, &frame, after, &mut seen)
            .with_context(|| format!("frame {number}, {verdict:?}: {frame:02x?} became {after:02x?}"))?;
        if let (Some(begun), Verdict::Send) = (whole, verdict) {
            living.push(begun);
        }
    }
    println!("{hook:?}: {frames} frames in {:?}: {seen:?}", begin.elapsed());
    // A fuzzer that reaches nothing shows nothing.
    let least = [seen.requests, seen.replies, seen.errors, seen.answers, seen.later_fragments].into_iter().min();
    ensure!(least.is_some_and(|least| least > frames / 400), "not everything was reached by {frames} frames: {seen:?}");
    Ok(())
}

/// A frame of a client, of a real server or of a router, often about a connection that lives; and the connection that it begins if
/// it is forwarded.
fn masqueraded_frame(random: &mut Rng, living: &[Living]) -> (Vec<u8>, Option<Living>) {
    let known = if random.u8(..4) == 0 { None } else { random.choice(living).copied() };
    let Some(Living { client, server, protocol }) = known else {
        let mut request = recipe(random);
        let (port, server_port) = random.choice(PORTS).unwrap_or_default();
        request.destination.set_port(port);
        request.ttl = 64;
        let protocol = match request.transport {
            Transport::Tcp { ref mut flags } => {
                *flags = 2;
                6
            }
            Transport::Udp => 17,
            Transport::Sctp { ref mut chunk } => {
                *chunk = 1;
                132
            }
            _ => return (request.build(), None),
        };
        let addresses = Addresses::of(if request.source.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 });
        let address: IpAddr = addresses.servers[0].parse().expect("the bench's addresses are well-formed");
        return (request.build(), Some(Living { client: request.source, server: (address, server_port).into(), protocol }));
    };
    let addresses = Addresses::of(if client.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 });
    let port = PORTS.into_iter().find(|(_, server_port)| *server_port == server.port()).map_or(0, |(port, _)| port);
    let vip = SocketAddr::new(addresses.vip.parse().expect("the bench's addresses are well-formed"), port);
    let from_client = random.bool();
    let of_this = |mut frame: Frame, random: &mut Rng| {
        frame.transport = match protocol {
            6 => Transport::Tcp { flags: if random.bool() { 16 } else { random.u8(..) } },
            17 => Transport::Udp,
            _ => Transport::Sctp { chunk: random.u8(..16) },
        };
        frame
    };
    let packet = if from_client { dressed(random, client, vip) } else { dressed(random, server, client) };
    let packet = of_this(packet, random);
    let mut frame = match random.u8(..4) {
        0 => {
            // An error about what went the other way.
            let quoted = if from_client { dressed(random, vip, client) } else { dressed(random, client, server) };
            let quoted = of_this(Frame { payload: vec![1; random.usize(..60)], ..quoted }, random).packet();
            let kinds = if client.is_ipv4() { [3, 3, 11, 4] } else { [1, 2, 3, 4] };
            let reporter = if random.bool() { packet.source.ip() } else { addresses.foreign.parse().expect("well-formed") };
            Frame::error(reporter, packet.destination.ip(), random.choice(kinds).unwrap_or(3), random.u8(..5), 1400, &quoted)
                .build()
        }
        1 => {
            let [first, later] = Frame { payload: vec![2; 64], id: client.port(), ..packet }.fragments(8 * random.usize(3..6));
            if random.bool() { first } else { later }
        }
        _ => packet.build(),
    };
    if random.bool() {
        spoil(random, &mut frame);
    }
    (frame, None)
}

/// How often what came out.
#[derive(Debug, Default)]
struct Seen {
    requests: u64,
    replies: u64,
    errors: u64,
    answers: u64,
    later_fragments: u64,
}

fn judge(hook: Hook, verdict: Verdict, before: &[u8], after: &[u8], seen: &mut Seen) -> Result<()> {
    match verdict {
        Verdict::Pass => ensure!(before == after, "it was passed, and changed"),
        Verdict::Drop => {}
        Verdict::Send if ip(before)?[0] >> 4 == 4 => translated::<V4>(ip(before)?, ip(after)?, seen)?,
        Verdict::Send => translated::<V6>(ip(before)?, ip(after)?, seen)?,
        Verdict::Other(_) => bail!("that is no verdict at {hook:?}"),
    }
    Ok(())
}

/// Whether a packet that came out is what went in, translated.
fn translated<N: Network>(before: &[u8], after: &[u8], seen: &mut Seen) -> Result<()> {
    let why = |reason: Reason| anyhow!("the packet that was sent is {}", reason.name());
    let header = N::parse(before, 0).map_err(why)?;
    let payload = N::transport(before, &header).map_err(why)?;
    let of = |packet: &[u8]| N::protocol(packet, 0);
    if of(after) == Some(N::ICMP) && of(before) != Some(N::ICMP) && payload.protocol != N::ICMP {
        seen.answers += 1;
        return check(after);
    }
    ensure!(before.len() == after.len(), "its length has changed");
    let addresses = Addresses::of(if N::HEADER == V4::HEADER { Family::Ipv4 } else { Family::Ipv6 });
    let bytes = |text: &str| match text.parse() {
        Ok(IpAddr::V4(address)) => address.octets().to_vec(),
        Ok(IpAddr::V6(address)) => address.octets().to_vec(),
        Err(_) => Vec::new(),
    };
    let (vip, server) = (bytes(addresses.vip), bytes(addresses.servers[0]));
    let size = vip.len();
    let [source, destination] = [N::ADDRESSES, N::ADDRESSES + size];
    let [segment, end] = [payload.offset, header.length];
    // An error goes where what it quotes came from, whatever address it is sent to itself, as in IPVS.
    let error = (payload.fragment != Fragment::Later && payload.protocol == N::ICMP).then_some(segment + 8);
    let is_request = match error {
        Some(quote) => before[quote + source..quote + source + size] == vip,
        None => before[destination..destination + size] == vip,
    };

    // What has to come out, but for checksums. They are looked at by themselves.
    let mut wanted = before.to_vec();
    let ttl = if size == 4 { 8 } else { 7 };
    wanted[ttl] = wanted[ttl].wrapping_sub(1);
    let replace = |packet: &mut [u8], at: usize, new: &[u8]| packet[at..at + new.len()].copy_from_slice(new);
    if is_request {
        replace(&mut wanted, destination, &server);
    } else {
        replace(&mut wanted, source, &vip);
    }
    let mut sums = Vec::new();
    if size == 4 {
        sums.push(10..12);
    }
    // The end whose port is translated, and from which of the pair of ports to which.
    let translate_port = |packet: &mut [u8], at: usize, to_server: bool| -> Result<()> {
        let old = u16::from_be_bytes([packet[at], packet[at + 1]]);
        let pair = PORTS.into_iter().find(|(port, server)| old == if to_server { *port } else { *server });
        let (port, server) = pair.with_context(|| format!("port {old} is nobody's"))?;
        packet[at..at + 2].copy_from_slice(&if to_server { server } else { port }.to_be_bytes());
        Ok(())
    };
    if payload.fragment == Fragment::Later {
        seen.later_fragments += 1;
    } else if let Some(quote) = error {
        seen.errors += 1;
        let (.., quoted) = N::quoted(before, quote).context("it quotes nothing")?;
        // It quotes what went the other way.
        if is_request {
            replace(&mut wanted, quote + source, &server);
        } else {
            replace(&mut wanted, quote + destination, &vip);
        }
        translate_port(&mut wanted, quoted.offset + if is_request { 0 } else { 2 }, is_request)?;
        sums.push(segment + 2..segment + 4);
        if size == 4 {
            sums.push(quote + 10..quote + 12);
            let inner = quoted.offset - quote;
            same_sum(&before[quote..quote + inner], &after[quote..quote + inner]).context("the quoted header")?;
        }
        // IPv4's covers no addresses.
        let from = if size == 4 { segment } else { source };
        let parts = |packet: &[u8]| {
            [&packet[from..from.max(source + if size == 4 { 0 } else { 2 * size })], &packet[segment..end]].concat()
        };
        same_sum(&parts(before), &parts(after)).context("ICMP")?;
    } else {
        if is_request {
            seen.requests += 1;
        } else {
            seen.replies += 1;
        }
        translate_port(&mut wanted, segment + if is_request { 2 } else { 0 }, is_request)?;
        let at = segment
            + match payload.protocol {
                protocol::TCP => 16,
                protocol::UDP => 6,
                _ => 8,
            };
        let length = if payload.protocol == protocol::SCTP { 4 } else { 2 };
        sums.push(at..at + length);
        let none = payload.protocol == protocol::UDP && before[at..at + 2] == [0, 0];
        if none {
            ensure!(after[at..at + 2] == [0, 0], "a datagram without a checksum has got one");
        } else if payload.protocol == protocol::SCTP {
            let residue = |packet: &[u8]| {
                let mut segment = packet[segment..end].to_vec();
                let stored = segment[8..12].to_vec();
                segment[8..12].fill(0);
                crc32c(&segment) ^ u32::from_le_bytes([stored[0], stored[1], stored[2], stored[3]])
            };
            ensure!(residue(before) == residue(after), "the checksum of SCTP is as wrong as it was not");
        } else {
            let parts = |packet: &[u8]| [&packet[source..source + 2 * size], &packet[segment..end]].concat();
            same_sum(&parts(before), &parts(after)).context("the transport")?;
        }
    }
    if size == 4 {
        same_sum(&before[..segment], &after[..segment]).context("the header")?;
    }
    let is_sum = |at: usize| sums.iter().any(|range| range.contains(&at));
    let wrong: Vec<_> = (0..before.len()).filter(|at| wanted[*at] != after[*at] && !is_sum(*at)).collect();
    ensure!(wrong.is_empty(), "bytes {wrong:?} are not what they have to be: {wanted:02x?}");
    Ok(())
}

/// Whether what a checksum covers, itself included, adds up to what it did: one that was right is right, and one that was wrong is
/// wrong by as much.
fn same_sum(before: &[u8], after: &[u8]) -> Result<()> {
    let of = |bytes: &[u8]| fold(sum(bytes)) % 0xffff;
    ensure!(of(before) == of(after), "the sum is {:#06x} instead of {:#06x}", of(after), of(before));
    Ok(())
}
