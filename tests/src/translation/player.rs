//! Conversations become frames, and a record of what came out.

use std::{collections::HashMap, thread, time::Duration};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    conversation::{Conversation, commands},
    wires::Wires,
};
use crate::differential::player::{Director, stay_on_this_processor};

/// So many conversations are had before connections are listed: one that is closed lives for ten seconds, and a machine may be slow.
const AT_ONCE: usize = 10;

/// What a director did with a conversation.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Record {
    /// For each step what came out to the client and what to the real server, in hexadecimal digits.
    pub steps: Vec<[Vec<String>; 2]>,
    /// The client's connections as `ipvsadm -Lnc` lists them, without the time left.
    pub connections: Vec<String>,
}

/// What a director did with all of them.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Account {
    /// One for each.
    pub records: Vec<Record>,
    /// What has been counted, as `ipvsadm -Ln --stats --exact` lists it.
    pub statistics: String,
}

/// Types the services.
pub fn set_up(director: &dyn Director) -> Result<()> {
    director.type_lines(&commands())
}

/// Has the conversations, one after the other.
pub fn play(conversations: &[Conversation], director: &dyn Director, wires: &Wires) -> Result<Account> {
    stay_on_this_processor()?;
    let mut records = Vec::new();
    for some in conversations.chunks(AT_ONCE) {
        let begin = records.len();
        for conversation in some {
            records.push(Record { steps: hold(conversation, wires)?, connections: Vec::new() });
        }
        // Twice: when connections come to their end meanwhile, the kernel leaves others out of its list.
        let listing = director.ipvsadm("-Lnc")? + &director.ipvsadm("-Lnc")?;
        let mut by_client: HashMap<&str, Vec<String>> = HashMap::new();
        for line in listing.lines() {
            // Protocol, time left, state, client, VIP, real server.
            if let [protocol, _, state, client, vip, server] = line.split_whitespace().collect::<Vec<_>>()[..] {
                by_client.entry(client).or_default().push(format!("{protocol} {state} {client} {vip} {server}"));
            }
        }
        for (conversation, record) in some.iter().zip(&mut records[begin..]) {
            record.connections = by_client.remove(conversation.client.to_string().as_str()).unwrap_or_default();
            record.connections.sort();
            record.connections.dedup();
        }
    }
    Ok(Account { records, statistics: statistics(director)? })
}

/// What has been counted. IPVS brings it up to date every two seconds: it is complete when it stays as it is for longer.
fn statistics(director: &dyn Director) -> Result<String> {
    let mut before = String::new();
    loop {
        let now = director.ipvsadm("-Ln --stats --exact")?;
        if now == before {
            return Ok(now);
        }
        before = now;
        thread::sleep(Duration::from_secs(3));
    }
}

fn hold(conversation: &Conversation, wires: &Wires) -> Result<Vec<[Vec<String>; 2]>> {
    let mut seen = Vec::new();
    for (number, step) in conversation.steps.iter().enumerate() {
        let packets = wires.exchange(step.from, &step.frames).with_context(|| format!("step {number} of {conversation}"))?;
        seen.push(packets.map(|packets| packets.iter().map(|packet| digits(packet)).collect()));
    }
    Ok(seen)
}

/// Bytes as hexadecimal digits.
pub(super) fn digits(bytes: &[u8]) -> String {
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).filter_map(|digit| char::from_digit(digit.into(), 16)).collect()
}
