//! The hashes and state machines of this crate against what the kernel's IPVS computes (`ipvs-vectors.json`).

use std::net::IpAddr;

use lb_common::{
    family::{self, Address},
    hash::{MAGLEV_KEY_1, MAGLEV_KEY_2, hash_32, maglev},
    sctp,
    tcp::{self, Direction, flags},
};
use serde_json::Value;

fn vectors() -> Value {
    let path = std::env::var("BPFVS_VECTORS")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/ipvs-vectors.json").to_owned());
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path} cannot be read: {error}"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path} is not JSON: {error}"))
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    let list = value[name].as_array().unwrap_or_else(|| panic!("no list \"{name}\""));
    assert!(!list.is_empty(), "the list \"{name}\" is empty");
    list
}

fn number(value: &Value) -> u32 {
    value.as_u64().and_then(|number| number.try_into().ok()).unwrap_or_else(|| panic!("{value} is not a number of 32 bits"))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is not a string"))
}

#[test]
fn hashes() {
    let functions = &vectors()["hash_functions"];
    for case in list(functions, "hash_32") {
        assert_eq!(hash_32(number(&case["val"]), number(&case["bits"])), number(&case["out"]), "{case}");
    }
    for case in list(functions, "mh_hash") {
        let value = number(&case["v"]);
        assert_eq!(maglev(MAGLEV_KEY_1, value), number(&case["hash1"]), "{case}");
        assert_eq!(maglev(MAGLEV_KEY_2, value), number(&case["hash2"]), "{case}");
    }
    for case in list(functions, "fold") {
        let folded = match text(&case["addr"]).parse().expect("an address") {
            IpAddr::V4(address) => family::ipv4(address).fold(),
            IpAddr::V6(address) => family::ipv6(address).fold(),
        };
        assert_eq!(folded, number(&case["folded"]), "{case}");
    }
}

const DIRECTIONS: [(&str, Direction); 3] =
    [("INPUT", Direction::Input), ("OUTPUT", Direction::Output), ("INPUT_ONLY", Direction::InputOnly)];

/// Compares every cell of a protocol's table with what `next` makes of direction, state and event.
fn compare(table: &Value, events: &[(&str, u8)], states: &[&str], next: impl Fn(Direction, u8, u8) -> u8) {
    for (name, direction) in DIRECTIONS {
        for (event_name, event) in events {
            let row = table[name][event_name].as_object().unwrap_or_else(|| panic!("no row {name} {event_name}"));
            assert_eq!(row.len(), states.len(), "{name} {event_name}");
            for (state, state_name) in (0..).zip(states) {
                let got = states[next(direction, state, *event) as usize];
                assert_eq!(got, text(&row[*state_name]), "{name} {event_name} in {state_name}");
            }
        }
    }
}

#[test]
fn tcp_tables() {
    let events = [("syn", flags::SYN), ("fin", flags::FIN), ("ack", flags::ACK), ("rst", flags::RST)];
    let states = tcp::State::ALL.map(tcp::State::name);
    for (name, secure) in [("normal", false), ("secure", true)] {
        let table = &vectors()["state_tables"]["tcp"][name];
        compare(table, &events, &states, |direction, state, event| tcp::next(secure, direction, state, event));
    }
}

/// The states as the vectors, and the kernel's source, spell them; in the order of their numbers.
const SCTP_STATES: [&str; 14] = [
    "NONE",
    "INIT1",
    "INIT",
    "COOKIE_SENT",
    "COOKIE_REPLIED",
    "COOKIE_WAIT",
    "COOKIE",
    "COOKIE_ECHOED",
    "ESTABLISHED",
    "SHUTDOWN_SENT",
    "SHUTDOWN_RECEIVED",
    "SHUTDOWN_ACK_SENT",
    "REJECTED",
    "CLOSED",
];

#[test]
fn sctp_table() {
    let events = [
        ("DATA", sctp::chunk::DATA),
        ("INIT", sctp::chunk::INIT),
        ("INIT_ACK", sctp::chunk::INIT_ACK),
        ("COOKIE_ECHO", sctp::chunk::COOKIE_ECHO),
        ("COOKIE_ACK", sctp::chunk::COOKIE_ACK),
        ("SHUTDOWN", sctp::chunk::SHUTDOWN),
        ("SHUTDOWN_ACK", sctp::chunk::SHUTDOWN_ACK),
        ("SHUTDOWN_COMPLETE", sctp::chunk::SHUTDOWN_COMPLETE),
        ("ERROR", sctp::chunk::ERROR),
        ("ABORT", sctp::chunk::ABORT),
    ];
    compare(&vectors()["state_tables"]["sctp"], &events, &SCTP_STATES, sctp::next);
    // Chunks without a row of their own, such as SACK and HEARTBEAT, count as data.
    for (_, direction) in DIRECTIONS {
        for state in 0..SCTP_STATES.len() as u8 {
            for chunk in [3, 4, 5, 12, 13, 15, 64, 192, 255] {
                let as_data = sctp::next(direction, state, sctp::chunk::DATA);
                assert_eq!(sctp::next(direction, state, chunk), as_data, "chunk {chunk}");
            }
        }
    }
}

#[test]
fn tcp_walks() {
    for walk in list(&vectors(), "tcp_walks") {
        let secure = text(&walk["table"]) == "secure";
        // Until a packet of the real server is seen, direct routing goes by the client's half alone.
        let mut no_output = text(&walk["method"]) == "dr";
        let mut state = tcp::State::None as u8;
        for (position, step) in list(walk, "steps").iter().enumerate() {
            let direction = match text(&step[0]) {
                "out" => {
                    no_output = false;
                    Direction::Output
                }
                _ if no_output => Direction::InputOnly,
                _ => Direction::Input,
            };
            let bit = |letter| match letter {
                'S' => flags::SYN,
                'F' => flags::FIN,
                'A' => flags::ACK,
                'R' => flags::RST,
                'P' => 0x08, // push, which moves nothing
                other => panic!("unknown flag {other}"),
            };
            state = tcp::next(secure, direction, state, text(&step[1]).chars().map(bit).fold(0, |all, bit| all | bit));
            let got = (tcp::State::ALL[state as usize].name(), tcp::is_active(state), tcp::TIMEOUTS[state as usize]);
            let wanted = (text(&step[2]), step[3].as_bool().expect("active or not"), number(&step[4]));
            assert_eq!(got, wanted, "{}, step {position}: {step}", walk["id"]);
        }
    }
}
