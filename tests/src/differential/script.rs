//! What happens to a virtual service, made up from a seed.
//!
//! A script prints as one would type and draw it, which is what a failure shows:
//!
//! ```
//! use bpfvs_tests::differential::script::Script;
//!
//! let script = Script::new(4);
//! assert_eq!(script.to_string(), Script::new(4).to_string());
//! println!("{script}");
//! // script 4
//! //   0  ipvsadm -A -t 10.99.0.4:80 -s mh -b mh-port
//! //      ipvsadm -a -t 10.99.0.4:80 -r 10.1.0.66:80 -g -w 3 -x 0 -y 0
//! //   1  10.9.17.4:41234 begins
//! //   2  10.9.17.4:41234 continues, 10.9.3.200:1025 begins
//! ```
//!
//! In the middle is a [farewell](FAREWELL): connections that are over come to their end, which makes room below thresholds.
//!
//! The seed also chooses scheduler and VIP, so seeds that follow each other give every scheduler its turn, and services
//! that do not meet.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use fastrand::Rng;

use crate::frame::{ACK, FIN, Frame, RST, SYN, Transport};

/// Every scheduler that is compared.
pub const SCHEDULERS: [&str; 14] = ["rr", "wrr", "sh", "dh", "mh", "lc", "wlc", "sed", "nq", "fo", "ovf", "lblc", "lblcr", RANDOM];
/// The one that draws lots, so that two directors cannot agree on a pick.
pub const RANDOM: &str = "twos";
/// Rounds after the first, which sets the service up.
const ROUNDS: usize = 40;
/// The round in which everybody who has ended a connection, and every client of UDP, sends a last packet. Its timeout is
/// short, and the next round begins when these connections are forgotten.
///
/// They do so in the round before, too. In IPVS a new timeout is that of packets to come, in bpfvs also of connections that
/// have been silent for longer: nobody has.
pub const FAREWELL: usize = 20;
/// The most real servers that a service begins with.
const SERVERS: usize = 16;
/// Real servers that a script knows: some join later.
const KNOWN_SERVERS: usize = 20;
/// The highest number of a real server; numbers beyond are those of routers.
const LAST_SERVER: u8 = 250;
/// The port of every service.
const PORT: u16 = 80;

/// One service, and what happens to it.
#[derive(Clone, Debug)]
pub struct Script {
    /// All the rest follows from it.
    pub seed: u64,
    /// The scheduler that the service begins with.
    pub scheduler: &'static str,
    /// The service's protocol.
    pub protocol: Protocol,
    /// The service's address.
    pub vip: SocketAddr,
    /// What happens, in steps that are 20 ms apart.
    pub rounds: Vec<Round>,
}

/// A service's protocol.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "the names are the protocols' own")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// What happens at one time: first what is typed, then what arrives.
#[derive(Clone, Debug, Default)]
pub struct Round {
    /// Commands to the director.
    pub edits: Vec<Edit>,
    /// Packets from clients. Those of a wave come all at once, each of another connection; the next wave comes when
    /// everybody has seen what became of the last one.
    pub waves: [Vec<Packet>; 2],
}

impl Round {
    /// All packets.
    pub fn packets(&self) -> impl Iterator<Item = &Packet> {
        self.waves.iter().flatten()
    }
}

/// A packet from a client.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    /// Who sends it.
    pub client: SocketAddr,
    /// What it means.
    pub event: Event,
}

/// What a packet means to its connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Event {
    /// A SYN, an INIT, a datagram.
    Begin,
    /// An ACK, a COOKIE ECHO, a datagram.
    Continue,
    /// A FIN, a SHUTDOWN.
    End,
    /// A RST, an ABORT.
    Abort,
}

/// A command to the director.
#[derive(Clone, Debug)]
pub enum Edit {
    /// `ipvsadm -A`, with a scheduler and its flags.
    AddService(&'static str, Option<&'static str>),
    /// `ipvsadm -E`: another scheduler.
    EditService(&'static str, Option<&'static str>),
    /// `ipvsadm -a`
    AddServer(Server),
    /// `ipvsadm -e`
    EditServer(Server),
    /// `ipvsadm -d`
    RemoveServer(u8),
}

/// A real server as it is to be.
#[derive(Clone, Copy, Debug)]
pub struct Server {
    /// The last byte of its addresses.
    pub number: u8,
    /// Its weight.
    pub weight: u32,
    /// `-x`: so many connections are too many; 0 is no limit.
    pub upper: u32,
    /// `-y`: below so many it takes new ones again.
    pub lower: u32,
}

impl Script {
    /// Makes up a script.
    pub fn new(seed: u64) -> Self {
        Writer::new(seed).write()
    }

    /// A command as one types it, without the word `ipvsadm`.
    pub fn line(&self, edit: &Edit) -> String {
        let option = match self.protocol {
            Protocol::Tcp => "-t",
            Protocol::Udp => "-u",
            Protocol::Sctp => "--sctp-service",
        };
        let service = format!("{option} {}", self.vip);
        let scheduler = |name: &str, flags: Option<&str>| {
            let flags = flags.map(|flags| format!(" -b {flags}")).unwrap_or_default();
            format!("{service} -s {name}{flags}")
        };
        let address = |number| SocketAddr::new(server_address(self.vip.ip(), number), PORT);
        let server = |server: &Server| {
            let Server { number, weight, upper, lower } = *server;
            format!("{service} -r {} -g -w {weight} -x {upper} -y {lower}", address(number))
        };
        match edit {
            Edit::AddService(name, flags) => format!("-A {}", scheduler(name, *flags)),
            Edit::EditService(name, flags) => format!("-E {}", scheduler(name, *flags)),
            Edit::AddServer(added) => format!("-a {}", server(added)),
            Edit::EditServer(edited) => format!("-e {}", server(edited)),
            Edit::RemoveServer(number) => format!("-d {service} -r {}", address(*number)),
        }
    }

    /// The frame of a packet, but for its hardware addresses.
    pub fn frame(&self, packet: Packet) -> Frame {
        let transport = match (self.protocol, packet.event) {
            (Protocol::Tcp, Event::Begin) => Transport::Tcp { flags: SYN },
            (Protocol::Tcp, Event::Continue) => Transport::Tcp { flags: ACK },
            (Protocol::Tcp, Event::End) => Transport::Tcp { flags: FIN | ACK },
            (Protocol::Tcp, Event::Abort) => Transport::Tcp { flags: RST },
            (Protocol::Udp, _) => Transport::Udp,
            (Protocol::Sctp, Event::Begin) => Transport::Sctp { chunk: 1 },
            (Protocol::Sctp, Event::Continue) => Transport::Sctp { chunk: 10 },
            (Protocol::Sctp, Event::End) => Transport::Sctp { chunk: 7 },
            (Protocol::Sctp, Event::Abort) => Transport::Sctp { chunk: 6 },
        };
        Frame { payload: b"hi".to_vec(), ..Frame::new(packet.client, self.vip, transport) }
    }
}

/// The address of a real server, in the family of a VIP.
pub fn server_address(vip: IpAddr, number: u8) -> IpAddr {
    if vip.is_ipv4() {
        Ipv4Addr::new(10, 1, 0, number).into()
    } else {
        Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, number.into()).into()
    }
}

impl fmt::Display for Script {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(formatter, "script {}", self.seed)?;
        for (number, round) in self.rounds.iter().enumerate() {
            let edits = round.edits.iter().map(|edit| format!("ipvsadm {}", self.line(edit)));
            let packets: Vec<_> = round.packets().map(ToString::to_string).collect();
            let packets = (!packets.is_empty()).then(|| packets.join(", "));
            for (position, line) in edits.chain(packets).enumerate() {
                let number = if position == 0 { number.to_string() } else { String::new() };
                writeln!(formatter, "{number:>4}  {line}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let event = match self.event {
            Event::Begin => "begins",
            Event::Continue => "continues",
            Event::End => "ends",
            Event::Abort => "aborts",
        };
        write!(formatter, "{} {event}", self.client)
    }
}

/// What a client believes about a connection of its own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    /// It has sent the first packet.
    Begun,
    /// And another.
    Established,
    /// It has said good-bye.
    Ended,
}

/// A script while it is made up.
struct Writer {
    random: Rng,
    script: Script,
    /// How this script's weights look.
    weights: [u32; 2],
    /// Whether this script's servers have thresholds.
    thresholds: bool,
    present: Vec<Server>,
    absent: Vec<u8>,
    connections: Vec<(SocketAddr, Phase)>,
    /// The connection that began in the last round, if its client goes on.
    answered: Option<usize>,
    /// The connection that was aborted in the last round.
    aborted: Option<usize>,
}

impl Writer {
    fn new(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let scheduler = SCHEDULERS[(seed % SCHEDULERS.len() as u64) as usize];
        // SCTP and UDP have a turn now and then: what they do to the counters differs.
        let protocol =
            [Protocol::Tcp, Protocol::Tcp, Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Sctp][random.usize(..6)];
        let [high, low] = (seed as u16).to_be_bytes();
        let vip: IpAddr = if random.u8(..4) > 0 {
            Ipv4Addr::new(10, 99, high, low).into()
        } else {
            Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, seed as u16).into()
        };
        let mut absent: Vec<u8> = (1..=LAST_SERVER).collect();
        random.shuffle(&mut absent);
        absent.truncate(KNOWN_SERVERS);
        let weights = [[1, 1], [7, 7], [0, 3], [0, 6], [1, 5], [1, 100]][random.usize(..6)];
        let thresholds = scheduler != RANDOM && random.u8(..4) == 0;
        let script = Script { seed, scheduler, protocol, vip: SocketAddr::new(vip, PORT), rounds: Vec::new() };
        Self {
            random,
            script,
            weights,
            thresholds,
            present: Vec::new(),
            absent,
            connections: Vec::new(),
            answered: None,
            aborted: None,
        }
    }

    fn write(mut self) -> Script {
        let mut first = Round::default();
        first.edits.push(Edit::AddService(self.script.scheduler, self.flags(self.script.scheduler)));
        // Few servers as often as many; but many would never reach their thresholds.
        let most = if self.thresholds { SERVERS / 4 } else { self.random.usize(1..=SERVERS) };
        for _ in 0..self.random.usize(1..=most) {
            first.edits.extend(self.add_server());
        }
        self.script.rounds.push(first);
        while self.script.rounds.len() <= ROUNDS {
            let mut round = Round::default();
            let number = self.script.rounds.len();
            if self.random.u8(..8) == 0 && number != FAREWELL {
                round.edits.extend(self.edit());
            }
            if (FAREWELL - 1..=FAREWELL).contains(&number) {
                self.farewell(&mut round);
            } else {
                self.arrival(&mut round);
            }
            self.script.rounds.push(round);
        }
        self.script
    }

    /// What arrives in a round.
    fn arrival(&mut self, round: &mut Round) {
        if let Some(number) = self.aborted.take() {
            self.begin(round, number);
            return;
        }
        let continued = self.continuation(round);
        let others = |phase: Phase| {
            let numbers = self.connections.iter().enumerate().filter(move |(_, connection)| connection.1 == phase);
            numbers.map(|(number, _)| number).filter(|number| Some(*number) != continued).collect::<Vec<_>>()
        };
        let (begun, established, ended) = (others(Phase::Begun), others(Phase::Established), others(Phase::Ended));
        let before_farewell = self.script.rounds.len() + 2 == FAREWELL;
        match self.random.u8(..100) {
            0..5 => {}
            5..10 if !begun.is_empty() => drop(self.one_of(&begun, Event::End, round)),
            10..20 if !established.is_empty() => drop(self.one_of(&established, Event::End, round)),
            // What was aborted is forgotten after ten seconds; it is replaced long before.
            20..28 if !established.is_empty() && !before_farewell => {
                self.aborted = Some(self.one_of(&established, Event::Abort, round));
            }
            28..32 if !established.is_empty() => drop(self.one_of(&established, Event::Continue, round)),
            32..38 if !ended.is_empty() => {
                let number = ended[self.random.usize(..ended.len())];
                self.begin(round, number);
            }
            _ => {
                let client = self.new_client();
                self.connections.push((client, Phase::Begun));
                self.begin(round, self.connections.len() - 1);
            }
        }
    }

    /// Connections that are over, and all of UDP, come to their end.
    fn farewell(&mut self, round: &mut Round) {
        self.continuation(round);
        for number in 0..self.connections.len() {
            if self.script.protocol == Protocol::Udp || self.connections[number].1 == Phase::Ended {
                self.send(round, number, Event::End);
            }
        }
    }

    /// The second packet of what began in the last round, if it is still to come.
    fn continuation(&mut self, round: &mut Round) -> Option<usize> {
        let number = self.answered.take()?;
        self.send(round, number, Event::Continue);
        Some(number)
    }

    fn begin(&mut self, round: &mut Round, number: usize) {
        self.send(round, number, Event::Begin);
        match self.script.protocol {
            // Some clients never come back.
            Protocol::Tcp => self.answered = (self.random.u8(..5) > 0).then_some(number),
            Protocol::Udp => {}
            // The first state of an association is over in four seconds: it does not stay there.
            Protocol::Sctp => {
                let client = self.connections[number].0;
                round.waves[1].push(Packet { client, event: Event::Continue });
                self.connections[number].1 = Phase::Established;
            }
        }
    }

    fn one_of(&mut self, numbers: &[usize], event: Event, round: &mut Round) -> usize {
        let number = numbers[self.random.usize(..numbers.len())];
        self.send(round, number, event);
        number
    }

    fn send(&mut self, round: &mut Round, number: usize, event: Event) {
        let connection = &mut self.connections[number];
        round.waves[0].push(Packet { client: connection.0, event });
        connection.1 = match event {
            Event::Begin => Phase::Begun,
            Event::Continue => Phase::Established,
            Event::End | Event::Abort => Phase::Ended,
        };
    }

    /// A client that has no connection from this port yet; its address may have others.
    fn new_client(&mut self) -> SocketAddr {
        loop {
            let address = match self.connections.last() {
                Some((client, _)) if self.random.u8(..4) == 0 => client.ip(),
                _ if self.script.vip.is_ipv4() => Ipv4Addr::new(10, 9, self.random.u8(..250), self.random.u8(..)).into(),
                _ => Ipv6Addr::from(0xfd09_u128 << 112 | u128::from(self.random.u64(..))).into(),
            };
            let client = SocketAddr::new(address, self.random.u16(1024..));
            if self.connections.iter().all(|(known, _)| *known != client) {
                return client;
            }
        }
    }

    fn edit(&mut self) -> Option<Edit> {
        let random_scheduler = self.script.scheduler == RANDOM;
        match self.random.u8(..10) {
            0..2 => self.add_server(),
            // Of two directors that draw lots, each would lose other connections. And who has lost its server cannot say
            // farewell: IPVS keeps such a connection for the time that it had.
            2..4 if !random_scheduler && !self.present.is_empty() && self.script.rounds.len() > FAREWELL => {
                let removed = self.present.swap_remove(self.random.usize(..self.present.len()));
                self.absent.push(removed.number);
                Some(Edit::RemoveServer(removed.number))
            }
            4 if !random_scheduler => {
                let others: Vec<_> = SCHEDULERS.into_iter().filter(|name| *name != RANDOM).collect();
                let scheduler = others[self.random.usize(..others.len())];
                Some(Edit::EditService(scheduler, self.flags(scheduler)))
            }
            _ if !self.present.is_empty() => {
                let position = self.random.usize(..self.present.len());
                let server = self.server(self.present[position].number);
                self.present[position] = server;
                Some(Edit::EditServer(server))
            }
            _ => None,
        }
    }

    /// A server that was there before, as often as a new one.
    fn add_server(&mut self) -> Option<Edit> {
        if self.absent.is_empty() {
            return None;
        }
        let position = if self.random.bool() { self.absent.len() - 1 } else { self.random.usize(..self.absent.len()) };
        let server = self.server(self.absent[position]);
        self.absent.remove(position);
        self.present.push(server);
        Some(Edit::AddServer(server))
    }

    fn server(&mut self, number: u8) -> Server {
        let [least, most] = self.weights;
        // Any server may be quiesced.
        let weight = if self.random.u8(..12) == 0 { 0 } else { self.random.u32(least..=most) };
        let upper = if self.thresholds { self.random.u32(..=5) } else { 0 };
        Server { number, weight, upper, lower: self.random.u32(..=upper) }
    }

    fn flags(&mut self, scheduler: &str) -> Option<&'static str> {
        let choices: [Option<&str>; 4] = match scheduler {
            "sh" => [None, Some("sh-fallback"), Some("sh-port"), Some("sh-fallback,sh-port")],
            "mh" => [None, Some("mh-fallback"), Some("mh-port"), Some("mh-fallback,mh-port")],
            _ => [None; 4],
        };
        choices[self.random.usize(..4)]
    }
}
