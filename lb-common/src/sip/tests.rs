use std::{format, string::String, vec::Vec};

use proptest::{collection::vec, prelude::*, sample::select};

use super::*;

/// The search, as programs lead it.
fn found(message: &[u8]) -> Option<&[u8]> {
    let mut search = Search::NEW;
    while !search.is_over() {
        let rest = message.get(search.position() as usize..).unwrap_or_default();
        if let Some(bytes) = rest.first_chunk::<8>()
            && search.pass(u64::from_ne_bytes(*bytes))
        {
            continue;
        }
        search.take(*rest.first()?);
    }
    search.found().map(|(start, length)| &message[start as usize..][..length as usize])
}

/// What IPVS does, said with slices: it looks for a header with a value from some place on, and if that has none from the sum of
/// both places on.
fn expected(message: &[u8]) -> Option<&[u8]> {
    let mut origin = 0;
    loop {
        let start = value_from(message, origin)?;
        let length = value_length(&message[start..]);
        if length == 0 {
            origin += start;
            continue;
        }
        let is_ended = matches!(message.get(start + length), Some(b'\r' | b'\n'));
        return (length <= LONGEST && is_ended).then(|| &message[start..start + length]);
    }
}

/// Where the value of the next header begins, behind `origin`.
fn value_from(message: &[u8], origin: usize) -> Option<usize> {
    let mut at = origin;
    while at < message.len() {
        let rest = &message[at..];
        let end = match rest {
            [b'\r', b'\n', ..] => 2,
            [b'\r' | b'\n', ..] => 1,
            _ => {
                at += 1;
                continue;
            }
        };
        let line = &rest[end..];
        let name = match line {
            [first, second, ..] if first.eq_ignore_ascii_case(&b'i') && !is_letter(*second) => 1,
            _ if line.get(..7).is_some_and(|name| name.eq_ignore_ascii_case(b"Call-ID")) => 7,
            [] => return None,
            _ => {
                // The line's first byte is done with, whatever it is.
                at += end + 1;
                continue;
            }
        };
        let colon = name + blanks(&line[name..])?;
        if line.get(colon) != Some(&b':') {
            return None;
        }
        let value = colon + 1 + blanks(&line[colon + 1..])?;
        return (value < line.len()).then_some(at + end + value);
    }
    None
}

/// How many blanks, with one end of a line among them if a blank follows.
fn blanks(text: &[u8]) -> Option<usize> {
    let count = |text: &[u8]| text.iter().take_while(|byte| is_blank(**byte)).count();
    let first = count(text);
    let end = match &text[first..] {
        [b'\r', b'\n', ..] => 2,
        [b'\r' | b'\n', ..] => 1,
        _ => return Some(first),
    };
    let folded = count(&text[first + end..]);
    (folded > 0).then_some(first + end + folded)
}

fn value_length(text: &[u8]) -> usize {
    let word = |text: &[u8]| text.iter().take_while(|byte| is_word(**byte)).count();
    let user = word(text);
    if user == 0 || text.get(user) != Some(&b'@') {
        return user;
    }
    match word(&text[user + 1..]) {
        0 => 0,
        host => user + 1 + host,
    }
}

fn message(headers: &str) -> String {
    format!("INVITE sip:b@192.0.2.1 SIP/2.0\r\nVia: SIP/2.0/UDP 192.0.2.7;branch=z9hG4bK1\r\n{headers}")
}

#[test]
fn the_call_is_found() {
    for (headers, call) in [
        ("Call-ID: a@b\r\n\r\n", "a@b"),
        ("CALL-id:a@b\r\n", "a@b"),
        ("i: a@b\r\n", "a@b"),
        ("I\t:\t a\r\n", "a"),
        ("Call-ID: a@b\nCSeq: 1 INVITE\r\n", "a@b"),
        ("Call-ID: a@b\r", "a@b"),
        ("Call-ID:\r\n a@b\r\n", "a@b"),
        ("Call-ID\r\n : a@b\r\n", "a@b"),
        // Not these, but what follows.
        ("Info: x\r\nic: y\r\nCall-Info: z\r\nCall-ID: a@b\r\n", "a@b"),
        ("Subject: x\r\n Call-ID: no\r\nCall-ID: yes\r\n", "yes"),
        ("Call-ID: @\r\nCall-ID: second\r\n", "second"),
        // Its body is text, too.
        ("Content-Length: 0\r\n\r\nCall-ID: body\r\n", "body"),
    ] {
        assert_eq!(found(message(headers).as_bytes()), Some(call.as_bytes()), "{headers:?}");
    }
    let long = "x".repeat(LONGEST);
    assert_eq!(found(message(&format!("i:{long}\r\n")).as_bytes()), Some(long.as_bytes()));
}

#[test]
fn there_is_no_call() {
    for headers in [
        "",
        "\r\n",
        "Call-ID",
        "Call-ID:",
        "Call-ID: ",
        "Call-ID: a@b",
        "Call-ID: a b\r\n",
        "Call-ID: a@b@c\r\n",
        "Call-ID: a@\r\n",
        "Call-ID: a,b\r\n",
        "Call-IDs: a\r\nCall-ID: b\r\n",
        "Call-ID:\r\na@b\r\n",
        "X-Call-ID: a@b\r\n",
        "Subject: x\n\nCall-ID: a\r\n",
    ] {
        assert_eq!(found(message(headers).as_bytes()), None, "{headers:?}");
    }
    assert_eq!(found(message(&format!("i:{}\r\n", "x".repeat(LONGEST + 1))).as_bytes()), None);
    assert_eq!(found(b"Call-ID: in the first line\r\n"), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn it_finds_what_ipvs_finds(pieces in vec(piece(), 0..24)) {
        let message: Vec<u8> = pieces.concat();
        prop_assert_eq!(found(&message), expected(&message), "{:?}", String::from_utf8_lossy(&message));
    }
}

/// What messages that may be odd are made of.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    let words: &[&[u8]] = &[
        b"Call-ID",
        b"call-id:",
        b"i",
        b"I:",
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b":",
        b"@",
        b"a",
        b"host",
        b"\xe9",
        b"\xd7",
        b",",
        b"\r\nCall-ID: ",
        b"\r\ni:",
        b"c",
        b"Subject: something\r\n",
    ];
    prop_oneof![
        12 => select(words).prop_map(<[u8]>::to_vec),
        1 => vec(any::<u8>(), 0..40),
        1 => (200_usize..300).prop_map(|length| [b'x'].repeat(length)),
    ]
}
