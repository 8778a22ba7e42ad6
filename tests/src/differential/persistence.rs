//! Clients that come back: whether bpfvs leads them where the kernel's IPVS does, and remembers the same of them, whatever IPVS's sysctls
//! say.
//!
//! A story is a persistent service of some kind, made up from a seed, and what happens to it: clients of a few networks begin
//! connections to several ports, establish and end them; weights change, real servers go and come back, the service is edited.
//! After each packet both directors must have sent it the same way; in the end both must list the same connections and
//! templates, times aside.
//!
//! One thing is left out: of calls that lead nowhere IPVS lists what their templates were, and bpfvs does not.

use std::{
    fmt::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context, Result};
use fastrand::Rng;
use serde::{Deserialize, Serialize};

use super::{
    player::{Director, stay_on_this_processor},
    sip,
    wire::{Sight, Wire},
};
use crate::{
    frame::{ACK, FIN, Frame, RST, SYN},
    wait,
};

/// Things that happen in a story.
const STEPS: usize = 60;
/// How often the entries are listed until they are the same twice.
const LISTINGS: usize = 10;
/// Real servers of a story.
const SERVERS: u8 = 4;

/// A kind of persistent service: options of `ipvsadm -A`, port, protocol and family, and an edit.
struct Kind {
    protocol: char,
    ipv6: bool,
    port: u16,
    /// It is a firewall mark that names the service, instead of address and port.
    mark: bool,
    options: &'static str,
    /// Options after an edit.
    edited: &'static str,
    /// Ports that clients ask for.
    ports: &'static [u16],
    /// Of these, the ones whose packets are marked, if the service has a mark; none for all.
    marked: &'static [u16],
    /// Ports of services by address beside it that are not persistent.
    beside: &'static [u16],
    /// Clients send SIP messages.
    messages: bool,
    /// IPVS's sysctls that are turned, each up to a value. Then there are also packets in the middle of connections that nobody knows of,
    /// and SYNs on old ones.
    sysctls: &'static [(&'static str, u32)],
}

/// Those that persistence and the beginning of connections go by.
const SYSCTLS: &[(&str, u32)] =
    &[("expire_nodest_conn", 1), ("expire_quiescent_template", 1), ("sloppy_tcp", 1), ("conn_reuse_mode", 3)];

/// What most of them have.
const PLAIN: Kind = Kind {
    protocol: 't',
    ipv6: false,
    port: 80,
    mark: false,
    options: "-p 300",
    edited: "-p 300",
    ports: &[80],
    marked: &[],
    beside: &[],
    messages: false,
    sysctls: &[],
};

/// What those have that keep calls together.
const CALLS: Kind =
    Kind { protocol: 'u', port: 5060, options: "-p 300 -o --pe sip", ports: &[5060, 5061], messages: true, ..PLAIN };

const KINDS: &[Kind] = &[
    Kind { edited: "-p 600", ports: &[80, 81], ..PLAIN },
    Kind { options: "-p 300 -M 255.255.255.0", ..PLAIN },
    Kind { port: 0, edited: "-p 300 -M 255.255.255.0", ports: &[80, 443, 9000], ..PLAIN },
    Kind { port: 0, ports: &[80, 443], beside: &[443], ..PLAIN },
    Kind { port: 21, ports: &[21, 1024, 20_000, 80], ..PLAIN },
    Kind { protocol: 'u', port: 53, edited: "", ports: &[53], ..PLAIN },
    Kind { protocol: 'u', port: 53, options: "-p 300 -o", ports: &[53], ..PLAIN },
    Kind { protocol: 'u', port: 53, options: "-o", edited: "-p 300 -o", ports: &[53], ..PLAIN },
    Kind { ipv6: true, options: "-p 300 -M 64", ..PLAIN },
    Kind { ipv6: true, port: 0, edited: "-p 300 -M 64", ports: &[80, 443], ..PLAIN },
    Kind { protocol: 'u', ipv6: true, port: 53, options: "-p 300 -o", ports: &[53], ..PLAIN },
    Kind { mark: true, port: 0, edited: "-p 600", ports: &[80, 443], ..PLAIN },
    Kind { mark: true, port: 0, options: "-p 300 -M 255.255.255.0", ports: &[80, 443], ..PLAIN },
    Kind { mark: true, protocol: 'u', port: 0, ports: &[53, 54], ..PLAIN },
    Kind { mark: true, ipv6: true, port: 0, edited: "-p 300 -M 64", ports: &[80, 443], ..PLAIN },
    Kind { mark: true, port: 0, ports: &[80, 443, 8080], marked: &[80, 443], beside: &[443, 8080], ..PLAIN },
    Kind { mark: true, ipv6: true, port: 0, ports: &[80, 443, 8080], marked: &[80], beside: &[80, 443], ..PLAIN },
    Kind { options: "", edited: "-p 300", sysctls: SYSCTLS, ..PLAIN },
    Kind { options: "-p 300 --pe sip", ..CALLS },
    Kind { options: "-p 300 --pe sip -M 255.255.255.0 -o", edited: "-p 300 --pe sip -o -M 255.255.255.0", ..CALLS },
    Kind { ipv6: true, edited: "-p 600 --pe sip", ..CALLS },
    Kind { mark: true, port: 0, edited: "-p 300 --pe sip", ..CALLS },
    Kind { ipv6: true, edited: "-p 600", sysctls: SYSCTLS, ..PLAIN },
];

/// One thing that happens.
#[derive(Clone, Debug)]
pub enum Step {
    /// Somebody types a line of `ipvsadm`.
    Line(String),
    /// Somebody turns one of IPVS's sysctls.
    Sysctl(&'static str, u32),
    /// Connections to a removed real server are to be gone.
    Gone(SocketAddr),
    /// Somebody types a line of `nft`.
    Rule(String),
    /// A client sends a packet.
    Packet(SocketAddr, SocketAddr, Meaning),
}

/// What a packet means to its connection.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names are those of TCP's flags")]
pub enum Meaning {
    Syn,
    Ack,
    Fin,
    Rst,
    Datagram,
    /// The SIP message with this number.
    Message(u64),
}

/// A service, and what happens to it.
#[derive(Clone, Debug)]
pub struct Story {
    /// All the rest follows from it.
    pub seed: u64,
    vip: IpAddr,
    /// The service's mark.
    mark: Option<u32>,
    steps: Vec<Step>,
}

/// What a director did.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Record {
    /// What became of each packet.
    pub sights: Vec<String>,
    /// Connections and templates in the end, times aside.
    pub entries: Vec<String>,
}

impl Story {
    /// Makes a story up.
    pub fn new(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let kind = &KINDS[seed as usize % KINDS.len()];
        // Of its own, so that stories do not meet.
        let number = (seed / KINDS.len() as u64 % 250) as u8 + 1;
        let row = (seed % KINDS.len() as u64) as u8;
        let vip: IpAddr = if kind.ipv6 {
            Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, row.into(), number.into()).into()
        } else {
            Ipv4Addr::new(10, 99, row, number).into()
        };
        let mark = u32::from(row) << 8 | u32::from(number);
        let service = |port| match kind.mark && port == 0 {
            true if kind.ipv6 => format!("-f {mark} -6"),
            true => format!("-f {mark}"),
            false => format!("-{} {}", kind.protocol, SocketAddr::new(vip, port)),
        };
        let server = |number: u8, port| {
            let address: IpAddr = if kind.ipv6 {
                Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, number.into()).into()
            } else {
                Ipv4Addr::new(10, 1, 0, number).into()
            };
            SocketAddr::new(address, port)
        };
        let mut steps = Vec::new();
        if kind.mark {
            let family = if kind.ipv6 { "ip6" } else { "ip" };
            steps.push(Step::Rule("add table inet stories".to_owned()));
            steps.push(Step::Rule("add chain inet stories marks { type filter hook prerouting priority mangle ; }".to_owned()));
            let marked = kind.marked.iter().map(|port| format!("tcp dport {port} ")).collect::<Vec<_>>();
            for port in if marked.is_empty() { vec![String::new()] } else { marked } {
                steps.push(Step::Rule(format!("add rule inet stories marks {family} daddr {vip} {port}meta mark set {mark}")));
            }
        }
        let line = |steps: &mut Vec<Step>, line: String| steps.push(Step::Line(line));
        for (port, options) in [(kind.port, kind.options)].into_iter().chain(kind.beside.iter().map(|port| (*port, ""))) {
            line(&mut steps, format!("-A {} -s rr {options}", service(port)));
            for number in 1..=SERVERS {
                line(&mut steps, format!("-a {} -r {} -g -w 1", service(port), server(number, port)));
            }
        }
        let mut present: Vec<u8> = (1..=SERVERS).collect();
        let mut open: Vec<(SocketAddr, SocketAddr)> = Vec::new();
        let mut forsakes = false;
        for step in 0..STEPS {
            match random.u8(..20) {
                _ if !kind.sysctls.is_empty() && random.u8(..6) == 0 => {
                    let (name, most) = kind.sysctls[random.usize(..kind.sysctls.len())];
                    let value = random.u32(..=most);
                    match name {
                        // Of those that were removed before, bpfvs lets go at once, and IPVS packet by packet.
                        "expire_nodest_conn" if present.len() < usize::from(SERVERS) => continue,
                        "expire_nodest_conn" => forsakes = value != 0,
                        _ => {}
                    }
                    steps.push(Step::Sysctl(name, value));
                }
                5 if !kind.sysctls.is_empty() && !open.is_empty() => {
                    let (client, vip) = open[random.usize(..open.len())];
                    steps.push(Step::Packet(client, vip, Meaning::Syn));
                }
                0 => {
                    let number = present[random.usize(..present.len())];
                    let weight = random.u8(..3);
                    line(&mut steps, format!("-e {} -r {} -g -w {weight}", service(kind.port), server(number, kind.port)));
                }
                1 if present.len() > 1 => {
                    let number = present.swap_remove(random.usize(..present.len()));
                    line(&mut steps, format!("-d {} -r {}", service(kind.port), server(number, kind.port)));
                    if forsakes {
                        steps.push(Step::Gone(server(number, kind.port)));
                    }
                }
                2 | 3 if present.len() < usize::from(SERVERS) => {
                    let number = (1..=SERVERS).find(|number| !present.contains(number)).unwrap_or(1);
                    present.push(number);
                    line(&mut steps, format!("-a {} -r {} -g -w 1", service(kind.port), server(number, kind.port)));
                }
                4 if step == STEPS / 2 || random.u8(..4) == 0 => {
                    line(&mut steps, format!("-E {} -s rr {}", service(kind.port), kind.edited));
                }
                5..8 if !open.is_empty() && kind.protocol == 't' => {
                    let (client, vip) = open[random.usize(..open.len())];
                    let meaning = [Meaning::Ack, Meaning::Ack, Meaning::Fin, Meaning::Rst][random.usize(..4)];
                    steps.push(Step::Packet(client, vip, meaning));
                }
                8 if !open.is_empty() && kind.protocol == 'u' => {
                    let (client, vip) = open[random.usize(..open.len())];
                    let meaning = if kind.messages { Meaning::Message(random.u64(..)) } else { Meaning::Datagram };
                    steps.push(Step::Packet(client, vip, meaning));
                }
                _ => {
                    let (network, host) = (random.u8(..3), random.u8(2..5));
                    let address: IpAddr = if kind.ipv6 {
                        Ipv6Addr::new(0xfd09, 0, 0, 0, network.into(), 0, 0, host.into()).into()
                    } else {
                        Ipv4Addr::new(10, 9, network, host).into()
                    };
                    let client = SocketAddr::new(address, 2000 + step as u16);
                    let vip = SocketAddr::new(vip, kind.ports[random.usize(..kind.ports.len())]);
                    let meaning = match kind.protocol {
                        't' if !kind.sysctls.is_empty() && random.u8(..3) == 0 => {
                            [Meaning::Ack, Meaning::Fin, Meaning::Rst][random.usize(..3)]
                        }
                        't' => Meaning::Syn,
                        _ if kind.messages => Meaning::Message(random.u64(..)),
                        _ => Meaning::Datagram,
                    };
                    open.push((client, vip));
                    steps.push(Step::Packet(client, vip, meaning));
                }
            }
        }
        // For the next story.
        steps.extend(kind.sysctls.iter().map(|&(name, _)| Step::Sysctl(name, (name == "conn_reuse_mode").into())));
        Self { seed, vip, mark: kind.mark.then_some(mark), steps }
    }

    /// Whether a firewall mark names its service.
    pub fn is_of_a_mark(&self) -> bool {
        self.mark.is_some()
    }

    /// Plays it on a director.
    pub fn play(&self, director: &dyn Director, wire: &Wire) -> Result<Record> {
        stay_on_this_processor()?;
        let mut record = Record::default();
        for step in &self.steps {
            match step {
                Step::Line(line) => drop(director.ipvsadm(line).with_context(|| format!("type {line}"))?),
                Step::Sysctl(name, value) => director.set(name, *value)?,
                Step::Gone(server) => {
                    let mut listing = String::new();
                    let gone = || {
                        listing = director.ipvsadm("-Lnc").unwrap_or_default();
                        self.entries(&listing).iter().all(|entry| !entry.ends_with(&format!(" {server}")))
                    };
                    wait::until("connections to a removed real server to go", wait::SOON, gone).with_context(|| listing.clone())?;
                }
                Step::Rule(line) => drop(wire.director.run("nft", line.split_whitespace())?),
                Step::Packet(client, vip, meaning) => {
                    let frame = match meaning {
                        Meaning::Syn => Frame::tcp(*client, *vip, SYN),
                        Meaning::Ack => Frame::tcp(*client, *vip, ACK),
                        Meaning::Fin => Frame::tcp(*client, *vip, FIN | ACK),
                        Meaning::Rst => Frame::tcp(*client, *vip, RST),
                        Meaning::Datagram => Frame::udp(*client, *vip),
                        Meaning::Message(number) => Frame { payload: sip::message(*number), ..Frame::udp(*client, *vip) },
                    };
                    record.sights.push(match wire.exchange(&[frame])?.first() {
                        Some(Sight::Forwarded(_, server)) => format!("server {server}"),
                        Some(Sight::Refused(_)) => "refused".to_owned(),
                        Some(Sight::Stack(_)) => "stack".to_owned(),
                        None => "nothing".to_owned(),
                    });
                }
            }
        }
        record.entries = self.entries(&director.ipvsadm("-Lnc --persistent-conn")?);
        // The kernel skips some where others, of earlier stories, expire while it is read.
        for _ in 0..LISTINGS {
            let again = self.entries(&director.ipvsadm("-Lnc --persistent-conn")?);
            if std::mem::replace(&mut record.entries, again.clone()) == again {
                break;
            }
        }
        Ok(record)
    }

    /// What is listed about the service, but for times.
    fn entries(&self, listing: &str) -> Vec<String> {
        let vip = match self.vip {
            IpAddr::V4(vip) => format!(" {vip}:"),
            IpAddr::V6(vip) => format!(" [{vip}]:"),
        };
        // The template of a mark has it in the place of the address, with a port of 0, or of 65535 if it leads nowhere.
        let template = self.mark.map(|mark| match self.vip {
            IpAddr::V4(_) => format!(" {}:", Ipv4Addr::from_bits(mark)),
            IpAddr::V6(_) => format!(" [{}]:", Ipv6Addr::from_bits(u128::from(mark) << 96)),
        });
        let is_ours = |line: &str| line.contains(&vip) || template.as_ref().is_some_and(|template| line.contains(template));
        let lines = listing.lines().filter(|line| is_ours(line) && !(line.contains(":65535 ") && line.contains(" sip ")));
        let without_time = |line: &str| {
            let mut words: Vec<_> = line.split_whitespace().collect();
            words.remove(1);
            words.join(" ")
        };
        let mut entries: Vec<_> = lines.map(without_time).collect();
        entries.sort();
        entries
    }

    /// Says how two directors differ about it, if they do.
    pub fn difference(&self, kernel: &Record, bpfvs: &Record) -> Option<String> {
        if kernel == bpfvs {
            return None;
        }
        let mut text = format!("story {}\n", self.seed);
        let mut sights = kernel.sights.iter().zip(&bpfvs.sights);
        for step in &self.steps {
            let _ = write!(text, "  {step}");
            if let Step::Packet(..) = step
                && let Some((kernel, bpfvs)) = sights.next()
            {
                let _ = write!(text, ": {bpfvs}");
                if kernel != bpfvs {
                    return Some(text + &format!(", but IPVS: {kernel}\n"));
                }
            }
            text.push('\n');
        }
        for (owner, entries, others) in [("IPVS", &kernel.entries, &bpfvs.entries), ("bpfvs", &bpfvs.entries, &kernel.entries)] {
            let own: Vec<_> = entries.iter().filter(|entry| !others.contains(entry)).map(String::as_str).collect();
            let _ = writeln!(text, "only {owner} lists\n  {}", own.join("\n  "));
        }
        Some(text)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(formatter, "ipvsadm {line}"),
            Self::Sysctl(name, value) => write!(formatter, "sysctl net.ipv4.vs.{name}={value}"),
            Self::Gone(server) => write!(formatter, "connections to {server} are gone"),
            Self::Rule(line) => write!(formatter, "nft {line}"),
            Self::Packet(client, vip, meaning) => write!(formatter, "{client} -> {vip} {meaning:?}"),
        }
    }
}
