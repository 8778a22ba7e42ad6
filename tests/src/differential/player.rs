//! A script becomes frames, and frames become answers.
//!
//! Many scripts are played side by side: in each round first everything is typed, in one go, then every script has its
//! packets sent. The next round begins 20 ms after the last packet of the one before.

use std::{
    collections::{HashMap, HashSet},
    fs,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sched::{CpuSet, sched_getcpu, sched_setaffinity},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::{
    script::{Event, FAREWELL, Script},
    wire::{Flow, Sight, Wire},
};
use crate::{bpfvs::Bpfvs, netns::Namespace, wait};

/// From one round to the next. In a tenth of it a director that looks at its counters would have to notice a change.
pub const PAUSE: Duration = Duration::from_millis(20);
/// So many scripts are played side by side.
const SIDE_BY_SIDE: usize = 70;

/// Who is asked to balance.
pub trait Director {
    /// Feeds `ipvsadm -R`.
    fn type_lines(&self, lines: &str) -> Result<()>;
    /// Types a line of `ipvsadm`, and returns what it printed.
    fn ipvsadm(&self, line: &str) -> Result<String>;
    /// Sets one of IPVS's sysctls.
    fn set(&self, name: &str, value: u32) -> Result<()>;
    /// Reads a file of /proc/net.
    fn proc(&self, name: &str) -> Result<String>;
}

impl Director for Bpfvs {
    fn type_lines(&self, lines: &str) -> Result<()> {
        self.restore(lines)
    }

    fn ipvsadm(&self, line: &str) -> Result<String> {
        Self::ipvsadm(self, line)
    }

    fn set(&self, name: &str, value: u32) -> Result<()> {
        self.succeed(&["sysctl", &format!("{name}={value}")]).map(|_| ())
    }

    fn proc(&self, name: &str) -> Result<String> {
        self.succeed(&["proc", name])
    }
}

/// The kernel's own IPVS, in a namespace.
impl Director for Namespace {
    fn type_lines(&self, lines: &str) -> Result<()> {
        self.run_with_input("ipvsadm", ["-R"], lines).map(|_| ())
    }

    fn ipvsadm(&self, line: &str) -> Result<String> {
        self.run("ipvsadm", line.split_whitespace())
    }

    fn set(&self, name: &str, value: u32) -> Result<()> {
        self.sysctl(&[(&format!("net.ipv4.vs.{name}"), &value.to_string())])
    }

    fn proc(&self, name: &str) -> Result<String> {
        // Not /proc/net: that is the first thread's, which has entered nothing.
        let path = format!("/proc/thread-self/net/{name}");
        self.enter(|| fs::read_to_string(&path)).with_context(|| format!("read {path}"))
    }
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Answer {
    /// It was forwarded to this real server.
    Server(u8),
    /// The client was told "port unreachable".
    Refused,
    /// The director's own stack answered it.
    Stack,
    /// It was dropped.
    Dropped,
    /// It was not sent, because its connection had not been taken.
    NotSent,
}

/// What a director did with a script.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Record {
    /// What became of each packet, round by round.
    pub answers: Vec<Vec<Answer>>,
    /// The service as `ipvsadm -Ln` lists it in the end.
    pub listing: Vec<String>,
}

/// Plays scripts on a director, and says what it did with each.
pub fn play(scripts: &[Script], director: &dyn Director, wire: &Wire) -> Result<Vec<Record>> {
    stay_on_this_processor()?;
    let mut records = Vec::new();
    for scripts in scripts.chunks(SIDE_BY_SIDE) {
        records.extend(play_side_by_side(scripts, director, wire)?);
        director.type_lines("-C\n")?;
    }
    Ok(records)
}

fn play_side_by_side(scripts: &[Script], director: &dyn Director, wire: &Wire) -> Result<Vec<Record>> {
    let mut records = vec![Record::default(); scripts.len()];
    let mut refused: Vec<Vec<SocketAddr>> = vec![Vec::new(); scripts.len()];
    let rounds = scripts.iter().map(|script| script.rounds.len()).max().unwrap_or_default();
    for number in 0..rounds {
        let rounds =
            || scripts.iter().enumerate().filter_map(|(position, script)| Some((position, script, script.rounds.get(number)?)));
        let mut lines = String::new();
        for (position, script, round) in rounds() {
            lines.extend(round.edits.iter().map(|edit| script.line(edit) + "\n"));
            records[position].answers.push(Vec::new());
        }
        if number == FAREWELL {
            lines += "--set 0 2 2\n";
        }
        if !lines.is_empty() {
            director.type_lines(&lines).with_context(|| format!("type in round {number}:\n{lines}"))?;
        }
        for wave in 0..rounds().map(|(_, _, round)| round.waves.len()).max().unwrap_or_default() {
            let mut frames = Vec::new();
            let mut waiting = HashMap::new();
            for (position, script, round) in rounds() {
                let answers = &mut records[position].answers[number];
                for packet in round.waves.get(wave).into_iter().flatten() {
                    if packet.event != Event::Begin && refused[position].contains(&packet.client) {
                        answers.push(Answer::NotSent);
                        continue;
                    }
                    let flow = Flow { client: packet.client, vip: script.vip };
                    let earlier = waiting.insert(flow, (position, answers.len(), packet.event));
                    ensure!(earlier.is_none(), "script {}, round {number}: two packets of one connection at once", script.seed);
                    answers.push(Answer::Dropped);
                    frames.push(script.frame(*packet));
                }
            }
            for sight in wire.exchange(&frames).with_context(|| format!("in round {number}"))? {
                let (flow, answer) = match sight {
                    Sight::Forwarded(flow, server) => (flow, Answer::Server(server)),
                    Sight::Refused(flow) => (flow, Answer::Refused),
                    Sight::Stack(flow) => (flow, Answer::Stack),
                };
                let Some(&(position, packet, event)) = waiting.get(&flow) else {
                    bail!("{sight:?} came out in round {number}, in which no such packet was sent")
                };
                let place = &mut records[position].answers[number][packet];
                ensure!(
                    *place == Answer::Dropped,
                    "the packet of {flow:?} came out twice in round {number}: {place:?}, {answer:?}"
                );
                *place = answer;
                if event == Event::Begin {
                    refused[position].retain(|client| *client != flow.client);
                    if !matches!(answer, Answer::Server(_)) {
                        refused[position].push(flow.client);
                    }
                }
            }
        }
        let next = Instant::now() + PAUSE;
        if number == FAREWELL {
            wait_for_the_end(scripts, director)?;
            director.type_lines("--set 0 120 300\n")?;
        }
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let listing = director.ipvsadm("-Ln")?;
    for (script, record) in scripts.iter().zip(&mut records) {
        record.listing = listed(&listing, script)?;
    }
    Ok(records)
}

/// Waits until the connections of the farewell are forgotten, and their servers' counters know.
fn wait_for_the_end(scripts: &[Script], director: &dyn Director) -> Result<()> {
    wait::until("connections with a short timeout to be forgotten", wait::SOON, || is_over(scripts, director).unwrap_or_default())
}

/// Whether no connection is left that could come to its end, and each service's counters say how many there are.
fn is_over(scripts: &[Script], director: &dyn Director) -> Result<bool> {
    let (connections, services) = (director.ipvsadm("-Lnc")?, director.ipvsadm("-Ln")?);
    let mut alive: HashMap<&str, u64> = HashMap::new();
    let mut mortal = HashSet::new();
    for line in connections.lines() {
        // Protocol, time left, state, client, VIP, real server.
        if let [_, _, state, _, vip, _] = line.split_whitespace().collect::<Vec<_>>()[..] {
            *alive.entry(vip).or_default() += 1;
            if ["UDP", "FIN_WAIT"].contains(&state) {
                mortal.insert(vip);
            }
        }
    }
    for script in scripts {
        let vip = script.vip.to_string();
        let counted: u64 = listed(&services, script)?[1..].iter().flat_map(|line| counters(line)).sum();
        if mortal.contains(vip.as_str()) || alive.get(vip.as_str()).copied().unwrap_or_default() != counted {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Active and inactive connections in a line of a listing.
pub fn counters(line: &str) -> [u64; 2] {
    let mut words = line.rsplit(' ').map(|word| word.parse().unwrap_or_default());
    let (inactive, active) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    [active, inactive]
}

/// A service's part of a listing.
fn listed(listing: &str, script: &Script) -> Result<Vec<String>> {
    let vip = script.vip.to_string();
    let mut lines = listing.lines().skip_while(|line| line.split_whitespace().nth(1) != Some(&vip));
    let service = lines.next().with_context(|| format!("the service {vip} of script {} is not in {listing}", script.seed))?;
    let servers = lines.take_while(|line| line.starts_with("  -> "));
    Ok([service].into_iter().chain(servers).map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect())
}

/// What a CPU sends by a wire arrives on that CPU, in order; from two CPUs it would not.
pub(crate) fn stay_on_this_processor() -> Result<()> {
    let mut this = CpuSet::new();
    this.set(sched_getcpu()?)?;
    sched_setaffinity(Pid::from_raw(0), &this).context("stay on one CPU")
}
