//! Where what two directors made of a conversation may differ, and whether it does elsewhere.
//!
//! | what | IPVS | bpfvs |
//! | --- | --- | --- |
//! | what the director itself says | an identification or flow label that it makes up; in errors, bits of the other packet's TOS | others |
//! | an error to a real server | comes from the director's address, and may quote the time to live as it came | comes from the client's, and quotes it lowered |
//! | a connection, after a reply that was answered by an error | has not noticed | has |
//! | fragments of IPv6 | put together and cut again, with a new identification | each by itself |
//! | a UDP datagram without a checksum | gets one | has none |
//!
//! Whatever these are, checksums have to be right.

use std::ops::Range;

use super::{
    conversation::{Conversation, Step},
    player::Record,
    wires::Side,
};
use crate::frame::check;

/// How bpfvs differs from IPVS, if it does.
pub fn difference(conversation: &Conversation, kernel: &Record, bpfvs: &Record) -> Option<String> {
    for (number, ((step, kernel), bpfvs)) in conversation.steps.iter().zip(&kernel.steps).zip(&bpfvs.steps).enumerate() {
        if comparable(step, kernel) != comparable(step, bpfvs) {
            let sent: Vec<_> =
                step.frames.iter().map(|frame| frame[14..].iter().map(|byte| format!("{byte:02x}")).collect::<String>()).collect();
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
    (!answered && kernel.connections != bpfvs.connections)
        .then(|| format!("{conversation}IPVS has the connections {:#?}, and bpfvs {:#?}\n", kernel.connections, bpfvs.connections))
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
    let forget = |packet: &mut [u8], what: &[Range<usize>]| what.iter().for_each(|range| packet[range.clone()].fill(0));
    // Identification and checksum, or the flow label.
    forget(&mut packet, if is_v4 { &[4..6, 10..12] } else { &[1..4] });
    if is_error {
        forget(&mut packet, if is_v4 { &[1..2] } else { &[] });
    }
    if is_error && to == Side::Server {
        // Source; checksum of ICMP; time to live and checksum in the quote.
        let quote = headers + 8;
        forget(&mut packet, if is_v4 { &[12..16, 22..24] } else { &[8..24, 42..44] });
        forget(&mut packet[quote..], if is_v4 { &[8..9, 10..12] } else { &[7..8] });
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
