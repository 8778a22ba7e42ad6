//! SIP messages, well-formed and odd, each made from a number: for stories about services with `--pe sip`.
//!
//! Most name one of a few calls, in one of the ways in which that can be done. The others are put together from pieces that
//! matter to whoever looks for a Call-ID.

use fastrand::Rng;

/// Calls that messages are about; one of them has a Call-ID that is too long. (The original ipvsadm
/// crashes over lines that are longer than 255 bytes, so none has the longest.)
fn call(random: &mut Rng) -> String {
    match random.u8(..7) {
        0 => "x".repeat(256),
        1 => "y".repeat(64),
        number => format!("call-{number}@example.org"),
    }
}

/// The message with a number.
pub fn message(number: u64) -> Vec<u8> {
    let mut random = Rng::with_seed(number);
    let mut message = b"INVITE sip:bob@example.org SIP/2.0\r\nVia: SIP/2.0/UDP 192.0.2.7;branch=z9hG4bK1\r\n".to_vec();
    let call = call(&mut random);
    if random.u8(..4) > 0 {
        let header = match random.u8(..8) {
            0 => format!("i: {call}"),
            1 => format!("CALL-ID:{call}"),
            2 => format!("call-id \t:\t {call}"),
            3 => format!("Call-ID:\r\n {call}"),
            _ => format!("Call-ID: {call}"),
        };
        let end = if random.u8(..4) == 0 { "\n" } else { "\r\n" };
        message.extend(format!("{header}{end}CSeq: 1 INVITE\r\nContent-Length: 0\r\n\r\n").as_bytes());
        return message;
    }
    let pieces: [&[u8]; 25] = [
        b"Call-ID",
        b"i",
        b"I:",
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b":",
        b"@",
        b"word",
        b"i\xe9",
        b"i\xd7",
        b"a\xd7",
        b",",
        b"a@b\r\n",
        b"\r\nCall-ID: ",
        b"\r\ni:",
        b"\r\n\r\n",
        b"\n\n",
        b"c",
        b"-",
        b"Subject: x\r\n",
        b"\r\nCall-ID: @\r\n",
        b"\r\nCall-ID\r\n : ",
    ];
    for _ in 0..random.u8(1..16) {
        message.extend(pieces[random.usize(..pieces.len())]);
    }
    if random.bool() {
        message.extend(format!("\r\nCall-ID: {call}\r\n").as_bytes());
    }
    message
}
