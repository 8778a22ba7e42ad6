//! Frame in, frame out: the loaded programs, run by the kernel, for both hooks and both families.
//!
//! There is one table, [`CASES`]. A case is a name, the `ipvsadm` commands that set it up, and steps: a frame, the verdict, the
//! frame that must come out, and what must have been counted, and why. Each case runs four times, for XDP and tc, IPv4 and
//! IPv6, and each run uses a client port of its own.
//!
//! [`recordings_of_the_kernels_ipvs`] does the same with what the kernel's IPVS did, byte for byte.

use std::{cell::Cell, env, fs, net::SocketAddr};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    bench::{Addresses, Bench, MTU, ROUTER_MAC, SERVER_MACS, bracketed, socket},
    frame::{self, ACK, DATA, Extension, FIN, Frame, INIT, RST, SYN, Transport, around, check, ip},
    lab::Family,
    needs, needs_bpfvs,
    test_run::{Hook, Verdict},
};
use lb_common::{checksum, reason::Reason, server::Counters};
use serde::Deserialize;

/// A case of the table.
struct Case {
    name: &'static str,
    /// Commands before the first frame.
    commands: fn(&World<'_>) -> Vec<String>,
    /// What happens then.
    steps: fn(&World<'_>) -> Result<Vec<Step>>,
}

/// What happens, one after the other.
enum Step {
    /// A frame comes in.
    Frame { frame: Vec<u8>, outcome: Outcome },
    /// Somebody types `ipvsadm`.
    Command(String),
    /// The first real server must have so many active connections, and so many in all.
    Connections { active: u32, total: u32 },
}

/// What must become of a frame.
#[derive(Clone, Debug)]
enum Outcome {
    /// The kernel has it unchanged.
    Passed(Reason),
    /// It is dropped.
    Dropped(Reason),
    /// It goes to a real server by direct routing; `new` says whether a connection was made.
    Routed { server: usize, new: bool },
    /// It goes to a real server in another packet of its own family.
    Tunnelled { server: usize, new: bool },
    /// The first real server gets this packet in its place; `new` as above.
    Translated { packet: Vec<u8>, new: bool },
    /// The client gets this packet in the place of a reply of the first real server.
    Replied { packet: Vec<u8> },
    /// It is for the kernel's neighbour code: XDP leaves it to tc, which sends it.
    Resolving,
    /// An ICMP error goes back to the client.
    Answered { reason: Reason, kind: u8, code: u8, rest: u32 },
}

/// One run of a case: bench, hook, family and a fresh client port.
struct World<'a> {
    bench: &'a Bench,
    hook: Hook,
    family: Family,
    addresses: Addresses,
    port: u16,
}

impl World<'_> {
    fn client(&self) -> SocketAddr {
        socket(self.addresses.client, self.port)
    }

    /// Another connection of the same client.
    fn client_again(&self, number: u16) -> SocketAddr {
        socket(self.addresses.client, self.port + number)
    }

    fn vip(&self) -> SocketAddr {
        socket(self.addresses.vip, 80)
    }

    fn by_family<T>(&self, ipv4: T, ipv6: T) -> T {
        match self.family {
            Family::Ipv4 => ipv4,
            Family::Ipv6 => ipv6,
        }
    }

    /// `-A` for a service on port 80 with a letter of `ipvsadm` for the protocol.
    fn service(&self, protocol: &str) -> String {
        format!("-A --{protocol}-service {}:80 -s rr", bracketed(self.addresses.vip))
    }

    /// `-a` for a real server.
    fn server(&self, protocol: &str, address: &str, options: &str) -> String {
        format!("-a --{protocol}-service {}:80 -r {}:80 {options}", bracketed(self.addresses.vip), bracketed(address))
    }

    /// A service on port 80 with the first real server, masqueraded, on port 8080.
    fn masqueraded(&self, protocol: &str) -> Vec<String> {
        let (vip, server) = (bracketed(self.addresses.vip), bracketed(self.addresses.servers[0]));
        vec![self.service(protocol), format!("-a --{protocol}-service {vip}:80 -r {server}:8080 -m")]
    }

    /// The first real server, where it is masqueraded.
    fn masked(&self) -> SocketAddr {
        socket(self.addresses.servers[0], 8080)
    }

    /// A packet of the client to the virtual address, and what the masqueraded real server gets.
    fn request(&self, frame: &Frame, new: bool) -> Step {
        let inside = Frame { destination: self.masked(), ttl: frame.ttl - 1, ..frame.clone() };
        step(frame, Outcome::Translated { packet: inside.packet(), new })
    }

    /// The real server's answer to such a packet, and what the client gets.
    fn reply(&self, frame: &Frame) -> Step {
        let inside = Frame { source: self.masked(), destination: frame.source, ..frame.clone() };
        let outside = Frame { source: self.vip(), ttl: frame.ttl - 1, ..inside.clone() };
        step(&inside, Outcome::Replied { packet: outside.packet() })
    }

    /// A service with the first real server, by direct routing.
    fn one_server(&self, protocol: &str) -> Vec<String> {
        vec![self.service(protocol), self.server(protocol, self.addresses.servers[0], "-g")]
    }
}

fn step(frame: &Frame, outcome: Outcome) -> Step {
    Step::Frame { frame: frame.build(), outcome }
}

const CASES: &[Case] = &[
    Case {
        name: "a frame that is no IP is not ours",
        commands: |world| world.one_server("tcp"),
        steps: |_| {
            let arp = [&[0xff; 6][..], &frame::SOURCE_MAC, &[8, 6], &[0; 46]].concat();
            Ok(vec![Step::Frame { frame: arp, outcome: Outcome::Passed(Reason::NotIp) }])
        },
    },
    Case {
        name: "a foreign destination is not ours, with tags or without",
        commands: |world| world.one_server("tcp"),
        steps: |world| {
            let foreign = Frame::tcp(world.client(), socket(world.addresses.foreign, 80), SYN);
            let tagged = |vlans: &[u16]| Frame { vlans: vlans.to_vec(), ..foreign.clone() };
            Ok([&[][..], &[7], &[7, 8]].map(|vlans| step(&tagged(vlans), Outcome::Passed(Reason::NotOurs))).into())
        },
    },
    Case {
        name: "a port without a service is the director's own",
        commands: |world| world.one_server("tcp"),
        steps: |world| {
            let other_port = Frame::tcp(world.client(), socket(world.addresses.vip, 81), SYN);
            let other_protocol = Frame::udp(world.client(), world.vip());
            Ok([other_port, other_protocol].iter().map(|frame| step(frame, Outcome::Passed(Reason::NoService))).collect())
        },
    },
    Case {
        name: "an echo request to the virtual address is the director's own",
        commands: |world| world.one_server("tcp"),
        steps: |world| {
            let kind = world.by_family(8, 128);
            let echo = Frame::new(world.client(), world.vip(), Transport::Icmp { kind, code: 0, rest: 0x0001_0001 });
            Ok(vec![step(&echo, Outcome::Passed(Reason::NotTransport))])
        },
    },
    Case {
        name: "a cut-off transport header is the kernel's business",
        commands: |world| world.one_server("tcp"),
        steps: |world| {
            let cut = Frame { payload: vec![0; 6], ..Frame::new(world.client(), world.vip(), Transport::Raw { protocol: 6 }) };
            Ok(vec![step(&cut, Outcome::Passed(Reason::Malformed))])
        },
    },
    Case {
        name: "TCP that begins nothing is the director's own",
        commands: |world| world.one_server("tcp"),
        steps: |world| {
            let passed = Outcome::Passed(Reason::NoConnection);
            Ok([ACK, FIN | ACK, RST, RST | ACK, SYN | RST, 0]
                .map(|flags| step(&Frame::tcp(world.client(), world.vip(), flags), passed.clone()))
                .into())
        },
    },
    Case {
        name: "a TCP conversation goes to one real server and is counted as IPVS does",
        commands: |world| world.one_server("tcp"),
        steps: |world| {
            let segment = |flags, data: &[u8]| Frame { payload: data.to_vec(), ..Frame::tcp(world.client(), world.vip(), flags) };
            let routed = |new| Outcome::Routed { server: 0, new };
            Ok(vec![
                step(&segment(SYN, b""), routed(true)),
                Step::Connections { active: 1, total: 1 },
                step(&segment(ACK, b""), routed(false)),
                step(&segment(ACK, b"GET / HTTP/1.0\r\n\r\n"), routed(false)),
                Step::Connections { active: 1, total: 1 },
                step(&segment(FIN | ACK, b""), routed(false)),
                Step::Connections { active: 0, total: 1 },
                step(&segment(ACK, b""), routed(false)),
                Step::Connections { active: 0, total: 1 },
            ])
        },
    },
    Case {
        name: "the type of service and the ECN bits stay",
        commands: |world| world.one_server("tcp"),
        steps: |world| {
            let marked = Frame { traffic_class: 0xbb, ..Frame::tcp(world.client(), world.vip(), SYN) };
            Ok(vec![step(&marked, Outcome::Routed { server: 0, new: true })])
        },
    },
    Case {
        name: "options and extension headers are stepped over",
        commands: |world| world.one_server("tcp"),
        steps: |world| {
            let extensions = vec![Extension::HopByHop, Extension::DestinationOptions];
            let frame = Frame { options: 40, extensions, ..Frame::tcp(world.client(), world.vip(), SYN) };
            Ok(vec![step(&frame, Outcome::Routed { server: 0, new: true })])
        },
    },
    Case {
        name: "UDP goes to a real server from its first packet on, and is never active",
        commands: |world| world.one_server("udp"),
        steps: |world| {
            let datagram = Frame::udp(world.client(), world.vip());
            Ok(vec![
                step(&datagram, Outcome::Routed { server: 0, new: true }),
                step(&datagram, Outcome::Routed { server: 0, new: false }),
                Step::Connections { active: 0, total: 1 },
            ])
        },
    },
    Case {
        name: "an SCTP association begins with INIT",
        commands: |world| world.one_server("sctp"),
        steps: |world| {
            let chunk = |kind| Frame::sctp(world.client(), world.vip(), kind);
            Ok(vec![
                step(&chunk(DATA), Outcome::Passed(Reason::NoConnection)),
                step(&chunk(INIT), Outcome::Routed { server: 0, new: true }),
                step(&chunk(DATA), Outcome::Routed { server: 0, new: false }),
            ])
        },
    },
    Case {
        name: "round robin takes turns, the newest real server first",
        commands: |world| {
            let mut commands = world.one_server("tcp");
            commands.push(world.server("tcp", world.addresses.servers[1], "-g"));
            commands
        },
        steps: |world| {
            let syn = |number| Frame::tcp(world.client_again(number), world.vip(), SYN);
            Ok([1, 0, 1, 0]
                .into_iter()
                .zip(0..)
                .map(|(server, number)| step(&syn(number), Outcome::Routed { server, new: true }))
                .collect())
        },
    },
    Case {
        name: "a real server of weight zero keeps its connections and takes no others",
        commands: |world| world.one_server("tcp"),
        steps: |world| {
            let vip = bracketed(world.addresses.vip);
            let server = bracketed(world.addresses.servers[0]);
            let (kind, code) = world.by_family((3, 3), (1, 4));
            Ok(vec![
                step(&Frame::tcp(world.client(), world.vip(), SYN), Outcome::Routed { server: 0, new: true }),
                Step::Command(format!("-e -t {vip}:80 -r {server}:80 -g -w 0")),
                step(&Frame::tcp(world.client(), world.vip(), ACK), Outcome::Routed { server: 0, new: false }),
                step(
                    &Frame::tcp(world.client_again(1), world.vip(), SYN),
                    Outcome::Answered { reason: Reason::NoServer, kind, code, rest: 0 },
                ),
            ])
        },
    },
    Case {
        name: "a service without real servers answers that the port is unreachable",
        commands: |world| vec![world.service("tcp"), world.service("udp")],
        steps: |world| {
            let (kind, code) = world.by_family((3, 3), (1, 4));
            let answered = Outcome::Answered { reason: Reason::NoServer, kind, code, rest: 0 };
            Ok(vec![
                step(&Frame::tcp(world.client(), world.vip(), SYN), answered.clone()),
                step(&Frame::udp(world.client(), world.vip()), answered),
            ])
        },
    },
    Case {
        name: "a connection of a removed real server is dropped, not sent elsewhere",
        commands: |world| {
            let mut commands = world.one_server("tcp");
            commands.push(world.server("tcp", world.addresses.servers[1], "-g"));
            commands
        },
        steps: |world| {
            let (vip, server) = (bracketed(world.addresses.vip), bracketed(world.addresses.servers[1]));
            Ok(vec![
                step(&Frame::tcp(world.client(), world.vip(), SYN), Outcome::Routed { server: 1, new: true }),
                Step::Command(format!("-d -t {vip}:80 -r {server}:80")),
                step(&Frame::tcp(world.client(), world.vip(), ACK), Outcome::Dropped(Reason::ServerRemoved)),
            ])
        },
    },
    Case {
        name: "a packet whose time ends here is answered",
        commands: |world| world.one_server("tcp"),
        steps: |world| {
            let kind = world.by_family(11, 3);
            let late = Frame { ttl: 1, ..Frame::tcp(world.client(), world.vip(), SYN) };
            Ok(vec![step(&late, Outcome::Answered { reason: Reason::TtlExpired, kind, code: 0, rest: 0 })])
        },
    },
    Case {
        name: "a packet too big for the wire is answered with the wire's MTU",
        commands: |world| world.one_server("udp"),
        steps: |world| {
            let (kind, code) = world.by_family((3, 4), (2, 0));
            let big = Frame { payload: vec![0; 1600], ..Frame::udp(world.client(), world.vip()) };
            Ok(vec![step(&big, Outcome::Answered { reason: Reason::TooBig, kind, code, rest: MTU.into() })])
        },
    },
    Case {
        name: "a packet too big for the tunnel is answered with the tunnel's MTU",
        commands: |world| vec![world.service("udp"), world.server("udp", world.addresses.servers[0], "-i")],
        steps: |world| {
            let (kind, code) = world.by_family((3, 4), (2, 0));
            let room = u32::from(MTU) - world.by_family(20, 40);
            let headers = world.by_family(20, 40) + 8;
            let fits = Frame { payload: vec![0; room as usize - headers], ..Frame::udp(world.client(), world.vip()) };
            let big = Frame { payload: vec![0; fits.payload.len() + 1], ..fits.clone() };
            Ok(vec![
                step(&fits, Outcome::Tunnelled { server: 0, new: true }),
                step(&big, Outcome::Answered { reason: Reason::TooBig, kind, code, rest: room }),
            ])
        },
    },
    Case {
        name: "a tunnel wraps every packet of a connection",
        commands: |world| vec![world.service("tcp"), world.server("tcp", world.addresses.servers[0], "-i")],
        steps: |world| {
            let segment =
                |flags, payload: usize| Frame { payload: vec![5; payload], ..Frame::tcp(world.client(), world.vip(), flags) };
            Ok(vec![
                step(&segment(SYN, 0), Outcome::Tunnelled { server: 0, new: true }),
                step(&segment(ACK, 0), Outcome::Tunnelled { server: 0, new: false }),
                step(&segment(ACK, 777), Outcome::Tunnelled { server: 0, new: false }),
                Step::Connections { active: 1, total: 1 },
            ])
        },
    },
    Case {
        name: "later fragments follow the first",
        commands: |world| world.one_server("udp"),
        steps: |world| {
            let whole =
                Frame { payload: vec![1; 100], dont_fragment: false, id: world.port, ..Frame::udp(world.client(), world.vip()) };
            let [first, later] = whole.fragments(64);
            Ok(vec![
                Step::Frame { frame: later.clone(), outcome: Outcome::Passed(Reason::FragmentUnknown) },
                Step::Frame { frame: first, outcome: Outcome::Routed { server: 0, new: true } },
                Step::Frame { frame: later, outcome: Outcome::Routed { server: 0, new: false } },
            ])
        },
    },
    Case {
        name: "an ICMP error about a connection goes to its real server",
        commands: |world| world.one_server("udp"),
        steps: |world| {
            let (kind, code) = world.by_family((3, 4), (2, 0));
            let answer = Frame { payload: vec![3; 64], ..Frame::udp(world.vip(), world.client()) };
            let foreign = Frame::udp(world.vip(), world.client_again(9));
            let hop = socket(world.addresses.client, 0).ip();
            let error = |quoted: &Frame| Frame::error(hop, world.vip().ip(), kind, code, 1300, &quoted.packet());
            Ok(vec![
                step(&error(&answer), Outcome::Passed(Reason::NoConnection)),
                step(&Frame::udp(world.client(), world.vip()), Outcome::Routed { server: 0, new: true }),
                step(&error(&answer), Outcome::Routed { server: 0, new: false }),
                step(&error(&foreign), Outcome::Passed(Reason::NoConnection)),
            ])
        },
    },
    Case {
        name: "a masqueraded TCP conversation is translated both ways, and its states follow both sides",
        commands: |world| world.masqueraded("tcp"),
        steps: |world| {
            let segment = |flags, data: &[u8]| Frame { payload: data.to_vec(), ..Frame::tcp(world.client(), world.vip(), flags) };
            Ok(vec![
                world.request(&segment(SYN, b""), true),
                world.reply(&segment(SYN | ACK, b"")),
                Step::Connections { active: 1, total: 1 },
                world.request(&segment(ACK, b""), false),
                world.request(&segment(ACK, b"GET / HTTP/1.0\r\n\r\n"), false),
                world.reply(&segment(ACK, b"an odd number of bytes.")),
                world.reply(&segment(ACK, b"and an even one.")),
                // CLOSE_WAIT, and then TIME_WAIT, where only one side seen would be FIN_WAIT: neither is active.
                world.reply(&segment(FIN | ACK, b"")),
                Step::Connections { active: 0, total: 1 },
                world.request(&segment(FIN | ACK, b""), false),
                world.reply(&segment(ACK, b"")),
            ])
        },
    },
    Case {
        name: "a masqueraded connection takes the place of another, at the same real server and then elsewhere",
        commands: |world| {
            let mut commands = world.masqueraded("tcp");
            commands.push(world.server("tcp", world.addresses.servers[1], "-g -w 0"));
            commands
        },
        steps: |world| {
            let segment = |flags| Frame::tcp(world.client(), world.vip(), flags);
            let [vip, masked, other] = [world.addresses.vip, world.addresses.servers[0], world.addresses.servers[1]].map(bracketed);
            let weigh = |options: &str| Step::Command(format!("-e -t {vip}:80 -r {options}"));
            let late = Frame { source: world.masked(), destination: world.client(), ..segment(ACK) };
            Ok(vec![
                world.request(&segment(SYN), true),
                world.request(&segment(ACK), false),
                // CLOSE: from here on a SYN begins anew.
                world.request(&segment(RST), false),
                Step::Connections { active: 0, total: 1 },
                world.request(&segment(SYN), true),
                Step::Connections { active: 1, total: 1 },
                world.reply(&segment(SYN | ACK)),
                world.request(&segment(ACK), false),
                world.request(&segment(RST), false),
                weigh(&format!("{masked}:8080 -m -w 0")),
                weigh(&format!("{other}:80 -g -w 1")),
                step(&segment(SYN), Outcome::Routed { server: 1, new: true }),
                Step::Connections { active: 0, total: 0 },
                step(&late, Outcome::Passed(Reason::NotOurs)),
            ])
        },
    },
    Case {
        name: "a masqueraded UDP conversation is translated both ways",
        commands: |world| world.masqueraded("udp"),
        steps: |world| {
            let datagram = |data: &[u8]| Frame { payload: data.to_vec(), ..Frame::udp(world.client(), world.vip()) };
            Ok(vec![
                world.request(&datagram(b"question"), true),
                world.reply(&datagram(b"answer")),
                world.request(&datagram(b"?"), false),
                world.reply(&datagram(b"!")),
                Step::Connections { active: 0, total: 1 },
            ])
        },
    },
    Case {
        name: "a masqueraded SCTP association is translated both ways, with its checksum",
        commands: |world| world.masqueraded("sctp"),
        steps: |world| {
            let chunk = |kind, data: usize| Frame { payload: vec![7; data], ..Frame::sctp(world.client(), world.vip(), kind) };
            Ok(vec![
                world.request(&chunk(INIT, 16), true),
                world.reply(&chunk(2, 300)),
                world.request(&chunk(10, 256), false),
                world.reply(&chunk(11, 0)),
                Step::Connections { active: 1, total: 1 },
                world.request(&chunk(DATA, 1200), false),
                world.reply(&chunk(DATA, 64)),
            ])
        },
    },
    Case {
        name: "masqueraded packets with tags, options and extension headers are translated",
        commands: |world| world.masqueraded("tcp"),
        steps: |world| {
            let extensions = vec![Extension::HopByHop, Extension::DestinationOptions];
            let odd =
                |flags| Frame { options: 40, extensions: extensions.clone(), ..Frame::tcp(world.client(), world.vip(), flags) };
            Ok(vec![
                world.request(&odd(SYN), true),
                world.reply(&odd(SYN | ACK)),
                world.request(&odd(ACK), false),
                world.reply(&odd(ACK)),
            ])
        },
    },
    Case {
        name: "fragments of masqueraded packets follow the first, in both directions",
        commands: |world| world.masqueraded("udp"),
        steps: |world| {
            let whole = |data: u8| Frame {
                payload: vec![data; 100],
                dont_fragment: false,
                id: world.port ^ u16::from(data),
                ..Frame::udp(world.client(), world.vip())
            };
            let (question, answer) = (whole(1), whole(2));
            let inside = Frame { destination: world.masked(), ttl: 63, ..question.clone() };
            let answer = Frame { source: world.masked(), destination: world.client(), ..answer };
            let outside = Frame { source: world.vip(), ttl: 63, ..answer.clone() };
            let packets = |frame: &Frame| -> Result<Vec<Vec<u8>>> {
                frame.fragments(64).iter().map(|frame| Ok(ip(frame)?.to_vec())).collect()
            };
            let mut steps = Vec::new();
            for ((frame, packet), new) in question.fragments(64).into_iter().zip(packets(&inside)?).zip([true, false]) {
                steps.push(Step::Frame { frame, outcome: Outcome::Translated { packet, new } });
            }
            for (frame, packet) in answer.fragments(64).into_iter().zip(packets(&outside)?) {
                steps.push(Step::Frame { frame, outcome: Outcome::Replied { packet } });
            }
            Ok(steps)
        },
    },
    Case {
        name: "what a masqueraded real server says to others is the kernel's business",
        commands: |world| world.masqueraded("tcp"),
        steps: |world| {
            let own = |destination| Frame::tcp(world.masked(), destination, ACK);
            Ok(vec![
                step(&own(world.client()), Outcome::Passed(Reason::NotOurs)),
                world.request(&Frame::tcp(world.client(), world.vip(), SYN), true),
                step(&own(world.client_again(1)), Outcome::Passed(Reason::NotOurs)),
                step(&Frame::udp(world.masked(), world.client()), Outcome::Passed(Reason::NotOurs)),
            ])
        },
    },
    Case {
        name: "a reply whose time ends here, or that is too big for its way, is answered",
        commands: |world| world.masqueraded("udp"),
        steps: |world| {
            let (expired, too_big) = world.by_family(((11, 0), (3, 4)), ((3, 0), (2, 0)));
            let datagram = Frame::udp(world.client(), world.vip());
            let late = Frame { ttl: 1, ..Frame::udp(world.masked(), world.client()) };
            let big = Frame { payload: vec![0; 1600], ..Frame::udp(world.masked(), world.client()) };
            let answered = |reason, (kind, code), rest| Outcome::Answered { reason, kind, code, rest };
            Ok(vec![
                world.request(&datagram, true),
                step(&late, answered(Reason::TtlExpired, expired, 0)),
                step(&big, answered(Reason::TooBig, too_big, MTU.into())),
                world.reply(&datagram),
            ])
        },
    },
    Case {
        name: "a removed real server may still finish its sentence",
        commands: |world| world.masqueraded("tcp"),
        steps: |world| {
            let (vip, server) = (bracketed(world.addresses.vip), bracketed(world.addresses.servers[0]));
            Ok(vec![
                world.request(&Frame::tcp(world.client(), world.vip(), SYN), true),
                Step::Command(format!("-d -t {vip}:80 -r {server}:8080")),
                step(&Frame::tcp(world.client(), world.vip(), ACK), Outcome::Dropped(Reason::ServerRemoved)),
                world.reply(&Frame::tcp(world.client(), world.vip(), SYN | ACK)),
            ])
        },
    },
    Case {
        name: "a real server's method may change while a connection lives: its packets go by the new one, its replies are translated",
        commands: |world| vec![world.service("tcp"), world.server("tcp", world.addresses.servers[0], "-m")],
        steps: |world| {
            let server = socket(world.addresses.servers[0], 80);
            let method =
                |option: &str| Step::Command(world.server("tcp", world.addresses.servers[0], option).replacen("-a", "-e", 1));
            let packet = |flags| Frame::tcp(world.client(), world.vip(), flags);
            let request = |flags, new| {
                let inside = Frame { destination: server, ttl: 63, ..packet(flags) };
                step(&packet(flags), Outcome::Translated { packet: inside.packet(), new })
            };
            let reply = |flags| {
                let inside = Frame::tcp(server, world.client(), flags);
                let outside = Frame { source: world.vip(), ttl: 63, ..inside.clone() };
                step(&inside, Outcome::Replied { packet: outside.packet() })
            };
            Ok(vec![
                request(SYN, true),
                reply(SYN | ACK),
                method("-g"),
                step(&packet(ACK), Outcome::Routed { server: 0, new: false }),
                reply(ACK),
                method("-m"),
                request(ACK, false),
                reply(ACK),
            ])
        },
    },
    Case {
        name: "a connection that began by direct routing is never half translated: replies to what is translated later are not known",
        commands: |world| {
            let (vip, server) = (bracketed(world.addresses.vip), bracketed(world.addresses.servers[0]));
            vec![world.service("tcp"), format!("-a -t {vip}:80 -r {server}:80 -g")]
        },
        steps: |world| {
            let (vip, server) = (bracketed(world.addresses.vip), bracketed(world.addresses.servers[0]));
            let old = Frame::tcp(world.client(), world.vip(), ACK);
            let masked = socket(world.addresses.servers[0], 80);
            let translated = Frame { destination: masked, ttl: 63, ..old.clone() };
            Ok(vec![
                step(&Frame::tcp(world.client(), world.vip(), SYN), Outcome::Routed { server: 0, new: true }),
                Step::Command(format!("-e -t {vip}:80 -r {server}:80 -m")),
                step(&old, Outcome::Translated { packet: translated.packet(), new: false }),
                step(&Frame::tcp(masked, world.client(), RST), Outcome::Passed(Reason::NotOurs)),
            ])
        },
    },
    Case {
        name: "an SCTP fragment cannot get another port",
        commands: |world| world.masqueraded("sctp"),
        steps: |world| {
            let whole =
                |kind| Frame { payload: vec![7; 200], dont_fragment: false, ..Frame::sctp(world.client(), world.vip(), kind) };
            let [first, _] = whole(DATA).fragments(64);
            Ok(vec![
                world.request(&whole(INIT), true),
                Step::Frame { frame: first, outcome: Outcome::Dropped(Reason::SctpFragment) },
            ])
        },
    },
    Case {
        name: "a real server that is the director itself gets its packets from the kernel",
        commands: |world| vec![world.service("tcp"), world.server("tcp", world.addresses.director, "-g")],
        steps: |world| Ok(vec![step(&Frame::tcp(world.client(), world.vip(), SYN), Outcome::Passed(Reason::LocalServer))]),
    },
    Case {
        name: "a real server without a route is answered as an unreachable host",
        commands: |world| vec![world.service("tcp"), world.server("tcp", world.addresses.unroutable, "-i")],
        steps: |world| {
            let (kind, code) = world.by_family((3, 1), (1, 3));
            let answered = Outcome::Answered { reason: Reason::NoRoute, kind, code, rest: 0 };
            Ok(vec![step(&Frame::tcp(world.client(), world.vip(), SYN), answered)])
        },
    },
    Case {
        name: "a real server that is not resolved yet is no black hole",
        commands: |world| vec![world.service("tcp"), world.server("tcp", world.addresses.silent_server, "-g")],
        steps: |world| Ok(vec![step(&Frame::tcp(world.client(), world.vip(), SYN), Outcome::Resolving)]),
    },
    Case {
        name: "a service of all ports takes what no other service does, and keeps a client together",
        commands: |world| {
            let [first, second] = world.addresses.servers.map(bracketed);
            let vip = bracketed(world.addresses.vip);
            vec![
                format!("-A -t {vip}:0 -s rr -p 60"),
                format!("-a -t {vip}:0 -r {first}:0 -g"),
                format!("-A -t {vip}:80 -s rr"),
                format!("-a -t {vip}:80 -r {second}:80 -g"),
            ]
        },
        steps: |world| {
            let syn = |port| Frame::tcp(world.client(), socket(world.addresses.vip, port), SYN);
            Ok(vec![
                step(&syn(81), Outcome::Routed { server: 0, new: true }),
                step(&syn(80), Outcome::Routed { server: 1, new: true }),
                step(&syn(50_000), Outcome::Routed { server: 0, new: true }),
                step(&Frame::udp(world.client(), world.vip()), Outcome::Passed(Reason::NoService)),
            ])
        },
    },
    Case {
        name: "a service of all ports keeps the port of each packet, whatever the real server's",
        commands: |world| {
            let (vip, server) = (bracketed(world.addresses.vip), bracketed(world.addresses.servers[0]));
            vec![format!("-A -t {vip}:0 -s rr -p 60"), format!("-a -t {vip}:0 -r {server}:8080 -m")]
        },
        steps: |world| {
            let request = Frame::tcp(world.client(), world.vip(), SYN);
            let server = socket(world.addresses.servers[0], 80);
            let inside = Frame { destination: server, ttl: request.ttl - 1, ..request.clone() };
            let reply = Frame::tcp(server, world.client(), SYN | ACK);
            let outside = Frame { source: world.vip(), ttl: reply.ttl - 1, ..reply.clone() };
            Ok(vec![
                step(&request, Outcome::Translated { packet: inside.packet(), new: true }),
                step(&reply, Outcome::Replied { packet: outside.packet() }),
            ])
        },
    },
    Case {
        name: "a persistent FTP service takes the data connections of its clients, too",
        commands: |world| {
            let [first, second] = world.addresses.servers.map(bracketed);
            let vip = bracketed(world.addresses.vip);
            let mut commands = vec![format!("-A -t {vip}:21 -s rr -p 60")];
            commands.extend([first, second].map(|server| format!("-a -t {vip}:21 -r {server}:21 -g")));
            commands.extend([format!("-A -t {vip}:80 -s rr")]);
            commands
        },
        steps: |world| {
            let syn = |port| Frame::tcp(world.client(), socket(world.addresses.vip, port), SYN);
            let routed = |port| step(&syn(port), Outcome::Routed { server: 1, new: true });
            let vip = bracketed(world.addresses.vip);
            let [first, second] = world.addresses.servers.map(bracketed);
            let (kind, code) = world.by_family((3, 3), (1, 4));
            Ok(vec![
                routed(21),
                routed(20_000),
                routed(1024),
                step(&syn(1023), Outcome::Passed(Reason::NoService)),
                Step::Command(format!("-e -t {vip}:21 -r {first}:21 -g -w 0")),
                Step::Command(format!("-d -t {vip}:21 -r {second}:21")),
                // Whether it was FTP's data, nobody knows.
                step(&syn(1025), Outcome::Passed(Reason::NoConnection)),
                step(
                    &Frame::tcp(world.client_again(1), socket(world.addresses.vip, 21), SYN),
                    Outcome::Answered { reason: Reason::NoServer, kind, code, rest: 0 },
                ),
            ])
        },
    },
    Case {
        name: "one-packet scheduling picks for every datagram, and remembers nothing",
        commands: |world| {
            let mut commands = world.one_server("udp");
            commands[0].push_str(" -o");
            commands.push(world.server("udp", world.addresses.servers[1], "-g"));
            commands
        },
        steps: |world| {
            let datagram = Frame::udp(world.client(), world.vip());
            let mut steps: Vec<_> =
                [1, 0, 1, 0].map(|server| step(&datagram, Outcome::Routed { server, new: true })).into_iter().collect();
            steps.push(Step::Connections { active: 0, total: 0 });
            Ok(steps)
        },
    },
    Case {
        name: "one-packet scheduling translates requests, and knows nothing of the replies",
        commands: |world| {
            let mut commands = world.masqueraded("udp");
            commands[0].push_str(" -o");
            commands
        },
        steps: |world| {
            let reply = Frame::udp(world.masked(), world.client());
            Ok(vec![
                world.request(&Frame::udp(world.client(), world.vip()), true),
                world.request(&Frame::udp(world.client(), world.vip()), true),
                step(&reply, Outcome::Passed(Reason::NotOurs)),
                Step::Connections { active: 0, total: 0 },
            ])
        },
    },
];

#[test]
fn the_table_holds_for_both_hooks_and_families() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let bench = Bench::new(&[])?;
    let port = Cell::new(10_000_u16);
    let mut failures = Vec::new();
    let mut runs = 0;
    for case in CASES {
        for hook in Hook::ALL {
            for family in Family::ALL {
                let world = World { bench: &bench, hook, family, addresses: Addresses::of(family), port: port.get() };
                port.set(port.get() + 16);
                runs += 1;
                if let Err(error) = run(&world, case) {
                    failures.push(format!("{} [{hook:?}, {family:?}]: {error:#}", case.name));
                }
            }
        }
    }
    ensure!(failures.is_empty(), "{} of {runs} runs failed:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

fn run(world: &World<'_>, case: &Case) -> Result<()> {
    let bpfvs = &world.bench.bpfvs;
    bpfvs.ipvsadm("-C")?;
    bpfvs.succeed(&["persistence", "flush"])?;
    world.bench.pinned.forget_connections()?;
    for command in (case.commands)(world) {
        bpfvs.ipvsadm(&command)?;
    }
    let servers: Vec<Option<u32>> = world.addresses.servers.iter().map(|server| world.bench.server_index(server).ok()).collect();
    if servers.iter().any(Option::is_some) {
        bpfvs.wait_for_servers()?;
    }
    // A real server that comes back has the connections that it had, and those were forgotten behind the director's back.
    for index in servers.iter().flatten() {
        world.bench.pinned.forget_counters(*index)?;
    }
    for (number, step) in (case.steps)(world)?.into_iter().enumerate() {
        let at = || format!("step {}", number + 1);
        match step {
            Step::Command(line) => bpfvs.ipvsadm(&line).map(|_| ()).with_context(at)?,
            Step::Connections { active, total } => {
                let index = servers[0].context("the case has the first real server")?;
                let got = world.bench.pinned.counters(index)?;
                ensure!(got == Counters { active, total }, "step {}: the real server has {got:?}", number + 1);
            }
            Step::Frame { frame, outcome } => run_frame(world, &servers, &frame, &outcome).with_context(at)?,
        }
    }
    Ok(())
}

fn run_frame(world: &World<'_>, servers: &[Option<u32>], frame: &[u8], outcome: &Outcome) -> Result<()> {
    let pinned = &world.bench.pinned;
    let statistics =
        || servers.iter().map(|index| index.map(|index| pinned.statistics(index)).transpose()).collect::<Result<Vec<_>>>();
    let (reasons_before, statistics_before) = (pinned.reasons()?, statistics()?);
    let result = world.bench.director.enter(|| pinned.run(world.hook, frame))?;
    let (reasons_after, statistics_after) = (pinned.reasons()?, statistics()?);

    let changed = |&reason: &Reason| reasons_after[reason as usize] - reasons_before[reason as usize];
    let reasons: Vec<_> =
        Reason::ALL.iter().filter(|reason| changed(reason) != 0).map(|reason| (reason, changed(reason))).collect();
    let (verdict, reason) = expectation(world.hook, outcome);
    let wanted: Vec<_> = reason.iter().map(|reason| (reason, 1)).collect();
    ensure!(result.verdict == verdict && reasons == wanted, "{outcome:?} was expected, but: {:?}, {reasons:?}", result.verdict);

    for (number, (before, after)) in statistics_before.iter().zip(&statistics_after).enumerate() {
        let (Some(before), Some(after)) = (before, after) else { continue };
        let got = (after.connections - before.connections, after.packets_in - before.packets_in, after.bytes_in - before.bytes_in);
        let counted = match outcome {
            Outcome::Routed { server, new } | Outcome::Tunnelled { server, new } if *server == number => {
                Some((u64::from(*new), 1, ip(frame)?.len() as u64))
            }
            Outcome::Translated { new, .. } if number == 0 => Some((u64::from(*new), 1, ip(frame)?.len() as u64)),
            // IPVS counts what it then cannot send, too; which server that was depends on the case.
            Outcome::Answered { reason: Reason::NoRoute | Reason::TtlExpired | Reason::TooBig, .. }
            | Outcome::Dropped(Reason::SctpFragment) => None,
            _ => Some((0, 0, 0)),
        };
        if let Some(counted) = counted {
            ensure!(got == counted, "real server {number}: connections, packets, bytes: {counted:?} were expected, but: {got:?}");
        }
        let got = (after.packets_out - before.packets_out, after.bytes_out - before.bytes_out);
        let replied = matches!(outcome, Outcome::Replied { .. }) && number == 0;
        let counted = if replied { (1, ip(frame)?.len() as u64) } else { (0, 0) };
        ensure!(got == counted, "real server {number}: packets and bytes out: {counted:?} were expected, but: {got:?}");
    }
    compare(world, frame, &result.frame, outcome).with_context(|| format!("{outcome:?}: {:02x?}", result.frame))
}

fn expectation(hook: Hook, outcome: &Outcome) -> (Verdict, Option<Reason>) {
    match outcome {
        Outcome::Passed(reason) => (Verdict::Pass, Some(*reason)),
        Outcome::Dropped(reason) => (Verdict::Drop, Some(*reason)),
        Outcome::Resolving if hook == Hook::Xdp => (Verdict::Pass, Some(Reason::Unresolved)),
        Outcome::Resolving
        | Outcome::Routed { .. }
        | Outcome::Tunnelled { .. }
        | Outcome::Translated { .. }
        | Outcome::Replied { .. } => (Verdict::Send, None),
        Outcome::Answered { reason, .. } => (Verdict::Send, Some(*reason)),
    }
}

/// Compares what came out with what must come out.
fn compare(world: &World<'_>, before: &[u8], after: &[u8], outcome: &Outcome) -> Result<()> {
    match *outcome {
        Outcome::Translated { ref packet, .. } => {
            check_ethernet(world, after, SERVER_MACS[0], before)?;
            ensure!(ip(after)? == packet, "the packet is another:\n  got    {:02x?}\n  wanted {packet:02x?}", ip(after)?);
            Ok(())
        }
        Outcome::Replied { ref packet } => {
            check_ethernet(world, after, ROUTER_MAC, before)?;
            ensure!(ip(after)? == packet, "the packet is another:\n  got    {:02x?}\n  wanted {packet:02x?}", ip(after)?);
            Ok(())
        }
        Outcome::Dropped(_) | Outcome::Resolving => Ok(()),
        Outcome::Passed(_) => {
            ensure!(after == before, "the frame was changed");
            Ok(())
        }
        Outcome::Routed { server, .. } => {
            check_ethernet(world, after, SERVER_MACS[server], before)?;
            ensure!(ip(after)? == aged(ip(before)?), "the packet is not the same with a TTL less by one");
            Ok(())
        }
        Outcome::Tunnelled { server, .. } => {
            check_ethernet(world, after, SERVER_MACS[server], before)?;
            check(ip(after)?)?;
            let ends = [world.addresses.director, world.addresses.servers[server]].map(|address| socket(address, 0));
            let inner = aged(ip(before)?);
            let protocol = world.by_family(4, 41);
            // Identification is the sender's to choose.
            let id = u16::from_be_bytes([ip(after)?[4], ip(after)?[5]]);
            let mut outer = Frame { payload: inner, id, ..Frame::new(ends[0], ends[1], Transport::Raw { protocol }) };
            outer.ttl = ip(after)?[world.by_family(8, 7)];
            ensure!(outer.ttl >= 62, "the outer TTL is {}", outer.ttl);
            ensure!(ip(after)? == outer.packet(), "the outer header is another");
            Ok(())
        }
        Outcome::Answered { kind, code, rest, .. } => {
            ensure!(after[..6] == before[6..12] && after[6..12] == before[..6], "the hardware addresses are not exchanged");
            let packet = ip(after)?;
            check(packet)?;
            let quoted = ip(before)?;
            let header = world.by_family(20, 40);
            let protocol = packet[world.by_family(9, 6)];
            ensure!(protocol == world.by_family(1, 58), "the answer's protocol is {protocol}");
            let (source, destination) = world.by_family((12..16, 16..20), (8..24, 24..40));
            ensure!(packet[source.clone()] == quoted[destination.clone()], "the answer does not come from the virtual address");
            ensure!(packet[destination] == quoted[source], "the answer does not go to the client");
            let icmp = &packet[header..];
            let got = (icmp[0], icmp[1], u32::from_be_bytes([icmp[4], icmp[5], icmp[6], icmp[7]]));
            ensure!(got == (kind, code, rest), "type, code and rest are {got:?}");
            let (quote, ttl) = (&icmp[8..], world.by_family(8, 7));
            ensure!(
                quote.len() >= 28.min(quoted.len()) && packet.len() <= world.by_family(576, 1280),
                "it quotes {} bytes",
                quote.len()
            );
            // Too-big answers of IPVS quote a TTL that is less by one already; the header's checksum goes with it.
            let same = |at: usize| quote[at] == quoted[at] || at == ttl || world.family == Family::Ipv4 && (at == 10 || at == 11);
            ensure!((0..quote.len()).all(same), "what it quotes is not the packet");
            Ok(())
        }
    }
}

fn check_ethernet(world: &World<'_>, after: &[u8], next_hop: [u8; 6], before: &[u8]) -> Result<()> {
    ensure!(after[..6] == next_hop, "the frame goes to {:02x?}", &after[..6]);
    ensure!(after[6..12] == world.bench.director_mac, "the frame comes from {:02x?}", &after[6..12]);
    ensure!(after[12..14] == before[12..14], "the ethertype is another");
    Ok(())
}

/// The packet with a time to live that is less by one.
fn aged(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 6 {
        packet[7] -= 1;
        return packet;
    }
    packet[8] -= 1;
    packet[10..12].fill(0);
    let header = usize::from(packet[0] & 15) * 4;
    let value = checksum::finish(checksum::sum(&packet[..header]));
    packet[10..12].copy_from_slice(&value.to_ne_bytes());
    packet
}

/// What `ipvs-vectors.json` holds.
#[derive(Deserialize)]
struct Vectors {
    packets: Vec<Recording>,
}

/// Packets through the kernel's IPVS.
#[derive(Deserialize)]
struct Recording {
    id: String,
    ipvsadm: Vec<String>,
    nondeterministic: String,
    steps: Vec<Exchange>,
}

#[derive(Deserialize)]
struct Exchange {
    ip: String,
    to_rs: Vec<String>,
    to_client: Vec<String>,
}

#[test]
fn recordings_of_the_kernels_ipvs() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let path =
        env::var("BPFVS_VECTORS").unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/data/ipvs-vectors.json").to_owned());
    let text = fs::read_to_string(&path).with_context(|| format!("read the recordings in {path}"))?;
    let vectors: Vectors = serde_json::from_str(&text).with_context(|| format!("{path} is not what it should be"))?;
    let bench = Bench::new(&[])?;
    let (mut replayed, mut failures) = (0, Vec::new());
    for recording in &vectors.packets {
        for hook in Hook::ALL {
            replayed += 1;
            if let Err(error) = replay(&bench, hook, recording) {
                failures.push(format!("{} [{hook:?}]: {error:#}", recording.id));
            }
        }
    }
    ensure!(replayed > 0, "no recording in {path} was replayed");
    ensure!(failures.is_empty(), "{} of {replayed} replays failed:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

fn replay(bench: &Bench, hook: Hook, recording: &Recording) -> Result<()> {
    bench.bpfvs.ipvsadm("-C")?;
    bench.pinned.forget_connections()?;
    for line in &recording.ipvsadm {
        bench.bpfvs.ipvsadm(line)?;
    }
    bench.bpfvs.wait_for_servers()?;
    for exchange in &recording.steps {
        let frame = around(&unhex(&exchange.ip)?);
        let result = bench.director.enter(|| bench.pinned.run(hook, &frame))?;
        ensure!(result.verdict == Verdict::Send, "the verdict is {:?}", result.verdict);
        let recorded = exchange.to_rs.first().or(exchange.to_client.first()).context("IPVS sent something")?;
        let (got, recorded) = (ip(&result.frame)?, unhex(recorded)?);
        check(got)?;
        let mask = ignored(&recording.nondeterministic, &recorded);
        let differs = |at: usize| got.get(at) != recorded.get(at) && !mask.contains(&at);
        let differing: Vec<_> = (0..got.len().max(recorded.len())).filter(|at| differs(*at)).collect();
        ensure!(differing.is_empty(), "bytes {differing:?} differ:\n  bpfvs {got:02x?}\n  IPVS  {recorded:02x?}");
    }
    Ok(())
}

/// Positions of the fields that may differ from run to run, from their description in words.
fn ignored(description: &str, packet: &[u8]) -> Vec<usize> {
    let transport = if packet[0] >> 4 == 4 { 20 } else { 40 };
    let mut positions = Vec::new();
    for field in description.split(';').map(str::trim) {
        match field {
            "outer IPv4 id and header checksum" | "icmp outer ip id/checksum" => positions.extend([4, 5, 10, 11]),
            "gue udp source port (flow hash)" => positions.extend([transport, transport + 1]),
            "gue udp source port and hence checksum" => positions.extend([0, 1, 6, 7].map(|at| transport + at)),
            "icmpv6 flow label" => positions.extend([1, 2, 3]),
            "" => {}
            other => panic!("the recordings name a field that this test does not know: {other}"),
        }
    }
    positions
}

fn unhex(text: &str) -> Result<Vec<u8>> {
    text.as_bytes().chunks(2).map(|digits| Ok(u8::from_str_radix(std::str::from_utf8(digits)?, 16)?)).collect()
}
