//! What a client and a masqueraded real server send each other, made up from a seed.
//!
//! ```
//! use bpfvs_tests::translation::conversation::Conversation;
//!
//! let conversation = Conversation::new(4);
//! assert_eq!(conversation.steps.len(), Conversation::new(4).steps.len());
//! println!("{conversation}");
//! // conversation 4: 10.9.0.4:41234 -> 10.99.0.1:81 -> 10.2.0.2:8080
//! //   0 Client: Tcp { flags: 2 }
//! //   1 Server: Tcp { flags: 18 }, 1 byte of checksum wrong
//! ```
//!
//! Nothing in it depends on what a director answers: a service has one real server.

use std::{fmt, net::SocketAddr};

use fastrand::Rng;

use super::wires::{self, NARROW_SERVERS, SERVERS, Side};
use crate::{
    frame::{ACK, Extension, FIN, Frame, RST, SYN, Transport},
    lab::Family,
};

/// The services: protocol, option of `ipvsadm`, virtual port, and the real server's port.
const SERVICES: [(Protocol, &str, u16, u16); 6] = [
    (Protocol::Tcp, "-t", 80, 80),
    (Protocol::Tcp, "-t", 81, 8080),
    (Protocol::Udp, "-u", 53, 53),
    (Protocol::Udp, "-u", 54, 5353),
    (Protocol::Sctp, "--sctp-service", 90, 90),
    (Protocol::Sctp, "--sctp-service", 91, 9090),
];
/// At each virtual port plus this there is the same service, with a real server behind a narrow way.
const NARROW_PORTS: u16 = 1000;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// All services, as one types them.
pub fn commands() -> String {
    let mut lines = String::new();
    for family in Family::ALL {
        for (number, (_, option, port, server_port)) in SERVICES.into_iter().enumerate() {
            for (first, port) in [(1, port), (NARROW_SERVERS, port + NARROW_PORTS)] {
                let vip = SocketAddr::new(wires::vip(family), port);
                let server = SocketAddr::new(wires::server(family, first + number as u8), server_port);
                lines.extend([format!("-A {option} {vip} -s rr\n"), format!("-a {option} {vip} -r {server} -m\n")]);
            }
        }
    }
    lines
}

const _: () = assert!(SERVICES.len() < NARROW_SERVERS as usize && SERVICES.len() as u8 + NARROW_SERVERS <= SERVERS + 1);

/// What passes between a client and its real server.
#[derive(Clone, Debug)]
pub struct Conversation {
    /// All the rest follows from it.
    pub seed: u64,
    /// The client.
    pub client: SocketAddr,
    /// To what it talks.
    pub vip: SocketAddr,
    /// Who answers.
    pub server: SocketAddr,
    protocol: Protocol,
    /// What is said.
    pub steps: Vec<Step>,
}

/// A packet, in one frame or in fragments.
#[derive(Clone, Debug)]
pub struct Step {
    /// Who sends it.
    pub from: Side,
    /// What it is, for people.
    pub what: String,
    /// Its frames.
    pub frames: Vec<Vec<u8>>,
    /// It is a UDP datagram without a checksum.
    pub unsummed: bool,
    /// It has TCP's SYN.
    pub begins: bool,
}

impl Conversation {
    /// Makes it up.
    pub fn new(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let family = random.choice(Family::ALL).unwrap_or(Family::Ipv4);
        let number = random.usize(..SERVICES.len());
        let (protocol, _, port, server_port) = SERVICES[number];
        let (narrow_client, narrow_server) = (random.u8(..4) == 0, random.u8(..4) == 0);
        let (first, port) = if narrow_server { (NARROW_SERVERS, port + NARROW_PORTS) } else { (1, port) };
        // Seeds that follow each other give clients that differ.
        let client = SocketAddr::new(wires::client(family, seed as u16, narrow_client), random.u16(1024..));
        let vip = SocketAddr::new(wires::vip(family), port);
        let server = SocketAddr::new(wires::server(family, first + number as u8), server_port);
        let mut talk = Talk { random, family, protocol, client, vip, server };
        let mut steps = Vec::new();
        // Linux answers SCTP that belongs to nothing only if its module is there.
        if protocol == Protocol::Sctp || talk.random.u8(..8) != 0 {
            talk.open(&mut steps);
        }
        for _ in 0..talk.random.u8(4..20) {
            let step = talk.step();
            steps.push(step);
        }
        Self { seed, client, vip, server, protocol, steps }
    }

    /// The protocol, as `ipvsadm` names it.
    pub const fn protocol(&self) -> &'static str {
        match self.protocol {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        }
    }
}

impl fmt::Display for Conversation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, client, vip, server, steps, .. } = self;
        writeln!(formatter, "conversation {seed}: {client} -> {vip} -> {server}")?;
        steps.iter().enumerate().try_for_each(|(number, step)| writeln!(formatter, "{number:>4} {:?}: {}", step.from, step.what))
    }
}

struct Talk {
    random: Rng,
    family: Family,
    protocol: Protocol,
    client: SocketAddr,
    vip: SocketAddr,
    server: SocketAddr,
}

impl Talk {
    /// The way in which conversations begin.
    fn open(&mut self, steps: &mut Vec<Step>) {
        use Side::{Client, Server};
        let opening: &[(Side, u8)] = match self.protocol {
            Protocol::Tcp => &[(Client, SYN), (Server, SYN | ACK), (Client, ACK)],
            Protocol::Udp => &[(Client, 0), (Server, 0)],
            // INIT, INIT ACK, COOKIE ECHO, COOKIE ACK
            Protocol::Sctp => &[(Client, 1), (Server, 2), (Client, 10), (Server, 11)],
        };
        for &(from, kind) in opening {
            let frame = self.packet(from, kind);
            steps.push(Step::of(from, &frame));
        }
    }

    /// What one side sends the other, with nothing special: `kind` are TCP's flags, or the type of SCTP's chunk.
    fn packet(&self, from: Side, kind: u8) -> Frame {
        let transport = match self.protocol {
            Protocol::Tcp => Transport::Tcp { flags: kind },
            Protocol::Udp => Transport::Udp,
            Protocol::Sctp => Transport::Sctp { chunk: kind },
        };
        match from {
            Side::Client => Frame::new(self.client, self.vip, transport),
            Side::Server => Frame::new(self.server, self.client, transport),
        }
    }

    fn step(&mut self) -> Step {
        let from = self.random.choice([Side::Client, Side::Server]).unwrap_or(Side::Client);
        match self.random.u8(..20) {
            0..=9 => {
                let frame = self.dressed(from);
                Step::of(from, &frame)
            }
            10 | 11 => self.fragments(from),
            12..=15 => self.error(from),
            16 | 17 => self.wrong_checksum(from),
            18 => self.big(from),
            _ => self.stranger(from),
        }
    }

    /// A packet in any of the forms that packets take.
    fn dressed(&mut self, from: Side) -> Frame {
        let kinds: &[u8] = match self.protocol {
            Protocol::Tcp => {
                &[ACK, ACK, ACK, ACK, ACK | 8, ACK | 8, SYN, SYN | ACK, FIN | ACK, FIN | ACK, RST, RST | ACK, SYN | FIN, 0]
            }
            Protocol::Udp => &[0],
            Protocol::Sctp => &[0, 0, 0, 3, 3, 4, 5, 1, 2, 6, 7, 8, 9, 10, 11, 14, 128],
        };
        let kind = self.random.choice(kinds).copied().unwrap_or_default();
        let random = &mut self.random;
        let options = if random.u8(..6) == 0 { 4 * random.usize(1..11) } else { 0 };
        let odd = [
            vec![Extension::HopByHop],
            vec![Extension::DestinationOptions],
            vec![Extension::HopByHop, Extension::DestinationOptions],
        ];
        let extensions = if random.u8(..6) == 0 { random.choice(odd).unwrap_or_default() } else { Vec::new() };
        let ttl = if random.u8(..12) == 0 { random.choice([1, 2, 255]).unwrap_or(1) } else { 64 };
        let payload = (0..random.usize(..60)).map(|_| random.u8(..)).collect();
        let (traffic_class, id, dont_fragment) = (random.u8(..), random.u16(..), random.bool());
        Frame { ttl, traffic_class, dont_fragment, id, options, extensions, payload, ..self.packet(from, kind) }
    }

    /// A packet in fragments, in their order. IPVS puts them together and cuts them again as they were; what that makes of
    /// options, extension headers and times to live is not a question of translation.
    fn fragments(&mut self, from: Side) -> Step {
        let plain = Frame { options: 0, extensions: Vec::new(), ttl: 64, ..self.dressed(from) };
        let data = self.random.usize(200..900);
        let whole = Frame { payload: vec![self.random.u8(..); data], dont_fragment: false, ..plain };
        // As senders do it: nothing that follows is larger than the first.
        let first = (data / 2 + self.random.usize(40..90)).next_multiple_of(8);
        if self.protocol == Protocol::Sctp && self.vip.port() != self.server.port() {
            // Without its other parts, a fragment's checksum cannot be corrected: bpfvs drops it and says so.
            return Step::of(from, &whole);
        }
        Step {
            frames: whole.fragments(first).to_vec(),
            what: format!("{:?} in two fragments, the first of {first} bytes", whole.transport),
            ..Step::of(from, &whole)
        }
    }

    /// An ICMP error about what the other side has sent, or would have: by its receiver or by a router on the way.
    fn error(&mut self, from: Side) -> Step {
        let mut quoted = self.dressed(from.other());
        match from {
            // As it arrives at the client.
            Side::Client => quoted.source = self.vip,
            // As it arrives at the real server.
            Side::Server => quoted.destination = self.server,
        }
        let at_end = self.random.bool();
        let reporter = match (from, at_end) {
            (Side::Client, true) => self.client.ip(),
            (Side::Server, true) => self.server.ip(),
            (Side::Client, false) => wires::client(self.family, 0x7f01, false),
            (Side::Server, false) => wires::server(self.family, SERVERS),
        };
        let kinds: &[(u8, u8, u32)] = match self.family {
            Family::Ipv4 => &[
                (3, 0, 0),
                (3, 1, 0),
                (3, 3, 0),
                (3, 4, 1400),
                (3, 13, 0),
                (4, 0, 0),
                (11, 0, 0),
                (11, 1, 0),
                (5, 1, 0),
                (12, 0, 0),
            ],
            Family::Ipv6 => &[(1, 0, 0), (1, 3, 0), (1, 4, 0), (2, 0, 1400), (3, 0, 0), (3, 1, 0), (4, 1, 40)],
        };
        let (kind, code, rest) = self.random.choice(kinds).copied().unwrap_or_default();
        let mut quote = quoted.packet();
        // Eight bytes of the transport are what every error quotes.
        if self.random.bool() {
            let headers = if self.family == Family::Ipv4 { 20 + quoted.options } else { 40 + 8 * quoted.extensions.len() };
            quote.truncate(headers + 8);
        }
        let destination = if from == Side::Client { self.vip.ip() } else { self.client.ip() };
        let ttl = if self.random.u8(..12) == 0 { 1 } else { 63 };
        let error = Frame { ttl, traffic_class: 0xc0, ..Frame::error(reporter, destination, kind, code, rest, &quote) };
        Step { what: format!("{:?} about {:?}", error.transport, quoted.transport), ..Step::of(from, &error) }
    }

    /// A packet whose checksum is wrong, or a datagram that has none.
    fn wrong_checksum(&mut self, from: Side) -> Step {
        let frame = Frame { options: 0, extensions: Vec::new(), ..self.dressed(from) };
        let mut bytes = frame.build();
        let headers = 14 + if self.family == Family::Ipv4 { 20 } else { 40 };
        let at = headers + if self.protocol == Protocol::Tcp { 16 } else { 6 };
        let unsummed = self.protocol == Protocol::Udp && self.random.bool();
        match self.protocol {
            Protocol::Udp if unsummed => bytes[at..at + 2].fill(0),
            Protocol::Tcp | Protocol::Udp => bytes[at] ^= 1 << self.random.u8(..8),
            // Of SCTP's, IPVS makes a right one.
            Protocol::Sctp => {}
        }
        Step {
            frames: vec![bytes],
            unsummed,
            what: format!("{:?}, checksum {}", frame.transport, if unsummed { "0" } else { "wrong" }),
            ..Step::of(from, &frame)
        }
    }

    /// A packet that is too big for a narrow way.
    fn big(&mut self, from: Side) -> Step {
        let plain = Frame { options: 0, extensions: Vec::new(), ttl: 64, dont_fragment: true, ..self.dressed(from) };
        let frame = Frame { payload: vec![self.random.u8(..); self.random.usize(1220..1420)], ..plain };
        Step { what: format!("{:?} with {} bytes", frame.transport, frame.payload.len()), ..Step::of(from, &frame) }
    }

    /// A packet that belongs to nothing.
    fn stranger(&mut self, from: Side) -> Step {
        let mut frame = self.dressed(from);
        match (from, self.random.u8(..3)) {
            (Side::Client, 0) if self.protocol != Protocol::Sctp => frame.destination.set_port(7),
            (Side::Client, _) => {
                frame.transport = Transport::Icmp { kind: if self.family == Family::Ipv4 { 8 } else { 128 }, code: 0, rest: 1 }
            }
            (Side::Server, 0) => frame.source.set_port(7),
            (Side::Server, 1) => frame.destination.set_port(self.client.port() ^ 1),
            (Side::Server, _) => frame.source.set_ip(wires::server(self.family, SERVERS)),
        }
        Step { what: format!("{:?} from {} to {}", frame.transport, frame.source, frame.destination), ..Step::of(from, &frame) }
    }
}

impl Step {
    fn of(from: Side, frame: &Frame) -> Self {
        let Frame { ttl, options, extensions, payload, .. } = frame;
        let what = format!(
            "{:?}, time to live {ttl}, {options} bytes of options, {extensions:?}, {} bytes",
            frame.transport,
            payload.len()
        );
        Self {
            from,
            what,
            frames: vec![frame.build()],
            unsummed: false,
            begins: matches!(frame.transport, Transport::Tcp { flags } if flags & SYN != 0),
        }
    }
}
