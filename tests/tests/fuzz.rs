//! A million frames, made up and mutilated, through the loaded programs: never a crash, a hang or a byte outside its place, and
//! the verdict is that of the host's model (`lb_common::model`), which has read no line of the datapath.
//!
//! The model knows no history. When the two disagree, the tables are emptied and the program is asked again: an earlier
//! frame may have made a connection. `BPFVS_FUZZ_FRAMES` and `BPFVS_FUZZ_SEED` choose how many and which.

use std::{
    env,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bpfvs_tests::{
    bench::{Addresses, Bench, MTU, bracketed},
    frame::{Extension, Frame, Transport, around, ip},
    lab::Family,
    needs, needs_bpfvs,
    test_run::{Hook, Verdict},
};
use fastrand::Rng;
use lb_common::{
    model::{self, Model, VirtualService},
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
    frame
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
