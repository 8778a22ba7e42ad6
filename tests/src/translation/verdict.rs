//! Where what two directors made of a conversation may differ, and whether it does elsewhere.
//!
//! | what | IPVS | bpfvs |
//! | --- | --- | --- |
//! | what the director itself says | an identification or flow label that it makes up; in errors, bits of the other packet's TOS | others |
//! | an error to a real server | comes from the director's address, and may quote the time to live as it came | comes from the client's, and quotes it lowered |
//! | a connection, after a reply that was answered by an error | has not noticed | has |
//! | a connection whose client begins anew before it is over | follows both sides | does not ask replies that begin or end nothing, for a second |
//! | fragments of IPv6 | put together and cut again, with a new identification | each by itself |
//! | a UDP datagram without a checksum | gets one | has none |
//! | statistics | count what fragments were put together to | count fragments |
//!
//! Whatever these are, checksums have to be right.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Context, Result};

use super::{
    conversation::{Conversation, Step},
    player::{Account, Record, digits},
    wires::Side,
};
use crate::frame::check;

/// How bpfvs differs from IPVS, if it does.
pub fn difference(conversation: &Conversation, kernel: &Record, bpfvs: &Record) -> Option<String> {
    for (number, ((step, kernel), bpfvs)) in conversation.steps.iter().zip(&kernel.steps).zip(&bpfvs.steps).enumerate() {
        if comparable(step, kernel) != comparable(step, bpfvs) {
            let sent: Vec<_> = step.frames.iter().map(|frame| digits(&frame[14..])).collect();
            return Some(format!(
                "{conversation}in step {number}, which is\n  {sent:?}\nIPVS sends\n  {kernel:?}\nand bpfvs\n  {bpfvs:?}\n"
            ));
        }
    }
    let answered = conversation
        .steps
        .iter()
        .zip(&kernel.steps)
        .any(|(step, seen)| step.from == Side::Server && !seen[Side::Server as usize].is_empty());
    let mut heard = conversation.steps.iter().skip_while(|step| step.from == Side::Client);
    let restarted = heard.any(|step| step.from == Side::Client && step.begins);
    (!answered && !restarted && kernel.connections != bpfvs.connections)
        .then(|| format!("{conversation}IPVS has the connections {:#?}, and bpfvs {:#?}\n", kernel.connections, bpfvs.connections))
}

/// How bpfvs's statistics differ from IPVS's, if they do.
pub fn difference_of_statistics(conversations: &[Conversation], kernel: &Account, bpfvs: &Account) -> Result<Option<String>> {
    let (mut wanted, mut counted) = (by_service(&kernel.statistics)?, by_service(&bpfvs.statistics)?);
    for (conversation, record) in conversations.iter().zip(&kernel.records) {
        for (step, seen) in conversation.steps.iter().zip(&record.steps) {
            let (vip, headers) = (conversation.vip, if conversation.vip.is_ipv4() { 20 } else { 40 + 8 + 8 });
            let passed = &seen[step.from.other() as usize];
            // What a real server says before it is asked is nobody's.
            let is_nobodys = step.from == Side::Server && !passed.iter().all(|packet| source_is(packet, vip.ip()));
            if passed.len() > 1 && !is_nobodys {
                let service = wanted.get_mut(&format!("{} {vip}", conversation.protocol()));
                let service = service.with_context(|| format!("IPVS has no statistics of {vip}"))?;
                let [_, packets_in, packets_out, bytes_in, bytes_out] = service;
                let (packets, bytes) = if step.from == Side::Client { (packets_in, bytes_in) } else { (packets_out, bytes_out) };
                *packets += 1;
                *bytes += headers;
            }
        }
    }
    for (service, numbers) in wanted.iter_mut().chain(&mut counted) {
        if !service.starts_with("UDP") {
            // Which connections give way to new ones depends on their states, in which the two may differ.
            numbers[0] = 0;
        }
    }
    Ok((wanted != counted).then(|| format!("for IPVS's counters {wanted:?}\nbpfvs has {counted:?}")))
}

/// Whether a packet, in hexadecimal digits, comes from this address.
fn source_is(packet: &str, address: IpAddr) -> bool {
    let (at, octets) = match address {
        IpAddr::V4(address) => (2 * 12, digits(&address.octets())),
        IpAddr::V6(address) => (2 * 8, digits(&address.octets())),
    };
    packet[at..].starts_with(&octets)
}

/// Connections, packets in and out, bytes in and out, of each service.
fn by_service(listing: &str) -> Result<BTreeMap<String, [u64; 5]>> {
    let services = listing.lines().filter(|line| ["TCP ", "UDP ", "SCTP"].iter().any(|protocol| line.starts_with(protocol)));
    let entry = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let numbers: Vec<u64> = words.iter().skip(2).map(|word| word.parse()).collect::<Result<_, _>>()?;
        let numbers = <[u64; 5]>::try_from(numbers).ok().with_context(|| format!("five numbers are expected in {line}"))?;
        Ok((words[..2].join(" "), numbers))
    };
    services.map(entry).collect()
}

/// What came out, without that in which directors may differ.
fn comparable(step: &Step, seen: &[Vec<String>; 2]) -> [Vec<Vec<u8>>; 2] {
    [Side::Client, Side::Server].map(|side| {
        let packets = seen[side as usize].iter().map(|digits| bytes(digits));
        packets
            .map(|packet| if side == step.from { comparable_answer(side, packet) } else { comparable_packet(step, packet) })
            .collect()
    })
}

/// What the director itself has said.
fn comparable_answer(to: Side, mut packet: Vec<u8>) -> Vec<u8> {
    if check(&packet).is_err() {
        return b"an answer with a wrong checksum".to_vec();
    }
    let is_v4 = packet[0] >> 4 == 4;
    let headers = if is_v4 { 20 } else { 40 };
    let is_error = packet[if is_v4 { 9 } else { 6 }] == if is_v4 { 1 } else { 58 };
    let forget = |packet: &mut [u8], what: &[(usize, usize)]| what.iter().for_each(|(from, to)| packet[*from..*to].fill(0));
    // Identification and checksum, or the flow label.
    forget(&mut packet, if is_v4 { &[(4, 6), (10, 12)] } else { &[(1, 4)] });
    if is_error {
        forget(&mut packet, if is_v4 { &[(1, 2)] } else { &[] });
    }
    if is_error && to == Side::Server {
        // Source; checksum of ICMP; time to live and checksum in the quote.
        let quote = headers + 8;
        forget(&mut packet, if is_v4 { &[(12, 16), (22, 24)] } else { &[(8, 24), (42, 44)] });
        forget(&mut packet[quote..], if is_v4 { &[(8, 9), (10, 12)] } else { &[(7, 8)] });
    }
    packet
}

/// What the director has passed on.
fn comparable_packet(step: &Step, mut packet: Vec<u8>) -> Vec<u8> {
    let is_v4 = packet[0] >> 4 == 4;
    let headers = if is_v4 { 20 } else { 40 };
    if step.unsummed && packet[headers + 6..headers + 8] != [0, 0] && check(&packet).is_ok() {
        packet[headers + 6..headers + 8].fill(0);
    }
    if !is_v4 && step.frames.len() > 1 {
        packet[headers + 4..headers + 8].fill(0);
    }
    packet
}

fn bytes(digits: &str) -> Vec<u8> {
    let value = |digit: u8| (digit as char).to_digit(16).unwrap_or_default() as u8;
    digits.as_bytes().chunks(2).map(|pair| value(pair[0]) << 4 | value(pair[1])).collect()
}
