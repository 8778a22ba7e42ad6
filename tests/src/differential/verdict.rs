//! Whether two directors agree, and how they do not.
//!
//! Everything has to be equal: what became of each packet, and the listing in the end, with its counters. `twos` draws
//! lots, so there two runs of IPVS itself differ. What is compared then: each pick is of a server that may be picked,
//! whoever stays on a connection stays on its server, refusals are equal, and so are the sums of the counters.

use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
    net::SocketAddr,
};

use super::{
    player::{Answer, Record, counters},
    script::{Edit, Event, RANDOM, Script},
};

/// Says how bpfvs and the kernel's IPVS differ about a script, if they do.
pub fn difference(script: &Script, kernel: &Record, bpfvs: &Record) -> Option<String> {
    if script.scheduler == RANDOM {
        return difference_but_for_luck(script, kernel, bpfvs);
    }
    if let Some(round) = (0..script.rounds.len()).find(|round| kernel.answers[*round] != bpfvs.answers[*round]) {
        let mut text = told(script, bpfvs, round);
        for (packet, (kernel, bpfvs)) in script.rounds[round].packets().zip(kernel.answers[round].iter().zip(&bpfvs.answers[round]))
        {
            if kernel != bpfvs {
                let _ = writeln!(text, "round {round}: {packet}: IPVS says {kernel:?}, bpfvs says {bpfvs:?}");
            }
        }
        return Some(text);
    }
    if kernel.listing == bpfvs.listing {
        return None;
    }
    let mut text = told(script, bpfvs, script.rounds.len() - 1);
    for (owner, listing) in [("IPVS", &kernel.listing), ("bpfvs", &bpfvs.listing)] {
        let _ = writeln!(text, "in the end {owner} lists\n  {}", listing.join("\n  "));
    }
    Some(text)
}

/// The script up to a round, with what bpfvs made of it.
fn told(script: &Script, record: &Record, last: usize) -> String {
    let mut script = script.clone();
    script.rounds.truncate(last + 1);
    let mut text = script.to_string();
    for (number, answers) in record.answers[..=last].iter().enumerate().filter(|(_, answers)| !answers.is_empty()) {
        let _ = write!(text, "{number}:{answers:?} ");
    }
    text + "\n"
}

/// What can be compared where lots are drawn.
fn difference_but_for_luck(script: &Script, kernel: &Record, bpfvs: &Record) -> Option<String> {
    for (owner, record) in [("IPVS", kernel), ("bpfvs", bpfvs)] {
        if let Some(complaint) = inadmissible(script, record) {
            return Some(format!("{script}{owner}: {complaint}\n"));
        }
    }
    let [kernel, bpfvs] = [kernel, bpfvs].map(|record| {
        let counters: Vec<_> = record.listing[1..].iter().map(|line| counters(line)).collect();
        counters.into_iter().fold([0, 0], |sum, counters| [sum[0] + counters[0], sum[1] + counters[1]])
    });
    (kernel != bpfvs).then(|| format!("{script}active and inactive connections: IPVS has {kernel:?}, bpfvs {bpfvs:?}\n"))
}

/// The first answer that no luck explains.
fn inadmissible(script: &Script, record: &Record) -> Option<String> {
    let mut weights: HashMap<u8, u32> = HashMap::new();
    let mut servers: HashMap<SocketAddr, u8> = HashMap::new();
    let mut over: HashSet<SocketAddr> = HashSet::new();
    for (number, (round, answers)) in script.rounds.iter().zip(&record.answers).enumerate() {
        for edit in &round.edits {
            match edit {
                Edit::AddServer(server) | Edit::EditServer(server) => drop(weights.insert(server.number, server.weight)),
                Edit::RemoveServer(server) => drop(weights.remove(server)),
                Edit::AddService(..) | Edit::EditService(..) => {}
            }
        }
        let someone = weights.values().any(|weight| *weight > 0);
        for (packet, answer) in round.packets().zip(answers) {
            let known = servers.get(&packet.client).copied();
            let chosen = packet.event == Event::Begin && (known.is_none() || over.contains(&packet.client));
            let right = match *answer {
                Answer::Server(server) if known == Some(server) => true,
                Answer::Server(server) => chosen && weights.get(&server).is_some_and(|weight| *weight > 0),
                Answer::Refused => chosen && !someone,
                Answer::NotSent => known.is_none(),
                Answer::Stack | Answer::Dropped => false,
            };
            if !right {
                return Some(format!(
                    "round {number}: {packet}: {answer:?}, but its server is {known:?}, and the weights are {weights:?}"
                ));
            }
            if let Answer::Server(server) = *answer {
                servers.insert(packet.client, server);
            } else if *answer == Answer::Refused {
                servers.remove(&packet.client);
            }
            // Whether a closed connection is scheduled anew depends on how far it had come; both are possible here.
            match packet.event {
                Event::End | Event::Abort => drop(over.insert(packet.client)),
                Event::Begin => drop(over.remove(&packet.client)),
                Event::Continue => {}
            }
        }
    }
    None
}
