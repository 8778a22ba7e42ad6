//! Golden cases of printing: made-up tables in, the text of the original ipvsadm out.
//!
//! The cases in `tests/data/ipvsadm-golden/format` were made by feeding tables with every magnitude of every number to
//! the original program; the form of a table is told at the head of `fakevs.c` beside them. Here the same tables are
//! turned into the director's views. Where bpfvs differs on purpose, or a table holds what its model cannot hold,
//! `tests/data/golden-differences.json` says so, line by line; everything else is compared byte for byte.

use std::{
    collections::HashMap,
    ffi::OsString,
    net::{IpAddr, Ipv4Addr},
    ops::ControlFlow,
    path::Path,
};

use bpfvs::{
    director::model::{
        Command, ConnectionView, EngineData, Family, Method, Outcome, Persistence, Protocol, ServerConfig, ServerId, ServerView,
        ServiceConfig, ServiceId, ServiceView, SyncDaemon, SyncRole, Timeouts, Totals, Traffic, Tunnel, TunnelChecksum,
    },
    ipvsadm::{self, Streams, Table, Unreachable},
};
use serde::Deserialize;

/// A difference that is wanted: lines that are left out of both transcripts, and lines of the table that are not read.
#[derive(Deserialize)]
struct Exception {
    case: Option<String>,
    /// Lines of the table with this text.
    table: Option<String>,
    /// Lines of the transcripts with one of these texts.
    #[serde(default)]
    lines: Vec<String>,
    reason: String,
}

/// The wanted differences, as all runners of golden cases read them.
fn exceptions() -> Vec<Exception> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/golden-differences.json");
    let text = std::fs::read(path).expect("the list of differences belongs to the repository");
    serde_json::from_slice(&text).expect("the list of differences is JSON")
}

/// A table that was read from a file.
#[derive(Default)]
struct Fixed {
    services: Vec<ServiceView>,
    connections: Vec<ConnectionView>,
    timeouts: Timeouts,
    sync_daemons: Vec<SyncDaemon>,
}

impl Table for Fixed {
    fn connect(&mut self) -> Result<(), Unreachable> {
        Ok(())
    }

    fn commands(&mut self, commands: &[Command]) -> Result<Vec<Outcome>, Unreachable> {
        panic!("a case of printing changes nothing: {commands:?}")
    }

    fn services(&mut self) -> Result<Vec<ServiceView>, Unreachable> {
        Ok(self.services.clone())
    }

    fn connections(&mut self, visit: &mut dyn FnMut(ConnectionView) -> ControlFlow<()>) -> Result<(), Unreachable> {
        let _ = self.connections.iter().cloned().try_for_each(visit);
        Ok(())
    }

    fn timeouts(&mut self) -> Result<Timeouts, Unreachable> {
        Ok(self.timeouts)
    }

    fn sync_daemons(&mut self) -> Result<Vec<SyncDaemon>, Unreachable> {
        Ok(self.sync_daemons.clone())
    }
}

/// The `key=value` words of a line.
struct Words<'a>(HashMap<&'a str, &'a str>);

impl<'a> Words<'a> {
    fn of(line: &'a str) -> Self {
        Self(line.split(' ').filter_map(|word| word.split_once('=')).filter(|(_, value)| !value.is_empty()).collect())
    }

    fn text(&self, key: &str) -> Option<&'a str> {
        self.0.get(key).copied()
    }

    fn number(&self, key: &str) -> u64 {
        self.text(key).map_or(0, |text| text.parse().unwrap_or_else(|error| panic!("{key}={text}: {error}")))
    }

    fn address(&self) -> IpAddr {
        self.text("addr").map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |text| text.parse().expect("an address"))
    }

    fn traffic(&self) -> Traffic {
        let totals = |[connections, packets_in, packets_out, bytes_in, bytes_out]: [&str; 5]| Totals {
            connections: self.number(connections),
            packets_in: self.number(packets_in),
            packets_out: self.number(packets_out),
            bytes_in: self.number(bytes_in),
            bytes_out: self.number(bytes_out),
        };
        Traffic {
            totals: totals(["conns", "inpkts", "outpkts", "inbytes", "outbytes"]),
            rates: totals(["cps", "inpps", "outpps", "inbps", "outbps"]),
        }
    }

    fn service(&self) -> ServiceView {
        let flags = self.number("flags");
        let address = self.address();
        let id = match self.number("fwmark") {
            0 => {
                let protocol = match self.text("proto") {
                    Some("TCP") => Protocol::Tcp,
                    Some("UDP") => Protocol::Udp,
                    Some("SCTP") => Protocol::Sctp,
                    other => panic!("protocol {other:?}"),
                };
                ServiceId::Address { protocol, address, port: self.number("port") as u16 }
            }
            mark => {
                let family = if self.text("af") == Some("inet6") { Family::Ipv6 } else { Family::Ipv4 };
                ServiceId::Mark { mark: mark as u32, family }
            }
        };
        let mask = match (self.text("mask"), id.family()) {
            (Some(mask), Family::Ipv4) => mask.parse::<Ipv4Addr>().expect("a mask").into(),
            (None, Family::Ipv4) => u32::MAX,
            (Some(length), Family::Ipv6) => length.parse().expect("a length"),
            (None, Family::Ipv6) => 128,
        };
        let persistence = Persistence { timeout: self.number("timeout") as u32, mask };
        let config = ServiceConfig {
            scheduler: self.text("sched").unwrap_or("wlc").to_owned(),
            flags: (flags >> 3) as u8,
            persistence: (flags & 1 != 0).then_some(persistence),
            one_packet: flags & 4 != 0,
            engine: self.text("pe").map(str::to_owned),
        };
        ServiceView { id, config, traffic: self.traffic(), servers: Vec::new() }
    }

    fn server(&self) -> ServerView {
        let checksum = match self.number("tflags") {
            0 => TunnelChecksum::None,
            1 => TunnelChecksum::Full,
            _ => TunnelChecksum::Remote,
        };
        let tunnel = match self.text("tun") {
            None | Some("ipip") => Tunnel::Ipip,
            Some("gue") => Tunnel::Gue { port: self.number("tport") as u16, checksum },
            Some(_) => Tunnel::Gre { checksum },
        };
        let method = match self.text("fwd") {
            Some("masq") => Method::Masquerade,
            Some("tunnel") => Method::Tunnel(tunnel),
            None | Some("route") => Method::Route,
            other => panic!("method {other:?}"),
        };
        // The original takes these from 32-bit attributes.
        let number = |key| self.number(key) as u32;
        let config = ServerConfig { method, weight: number("weight"), upper_threshold: number("u"), lower_threshold: number("l") };
        ServerView {
            id: ServerId { address: self.address(), port: self.number("port") as u16 },
            config,
            active: number("active"),
            inactive: number("inact"),
            persistent: number("persist"),
            traffic: self.traffic(),
            reachability: "ready".to_owned(),
            index: 0,
        }
    }
}

/// A line of `/proc/net/ip_vs_conn`.
fn connection(line: &str) -> ConnectionView {
    let words: Vec<&str> = line.split_whitespace().collect();
    let hexadecimal = |word: &str| u32::from_str_radix(word, 16).expect("a hexadecimal number");
    let address = |word: &str| match word.parse() {
        Ok(address) => IpAddr::V6(address),
        Err(_) => IpAddr::V4(hexadecimal(word).into()),
    };
    let port = |word| hexadecimal(word) as u16;
    ConnectionView {
        protocol: words[0].to_owned(),
        client: address(words[1]),
        client_port: port(words[2]),
        vip: address(words[3]),
        vip_port: port(words[4]),
        server: address(words[5]),
        server_port: port(words[6]),
        state: words[7].to_owned(),
        expires: words[8].parse().expect("seconds"),
        active: words[7] == "ESTABLISHED",
        template: false,
        engine: words.get(9).map(|name| EngineData { name: (*name).to_owned(), data: words[10].to_owned() }),
    }
}

fn sync_daemon(line: &str) -> SyncDaemon {
    let words: Vec<&str> = line.split(' ').collect();
    let values = Words::of(line);
    let number = |name| values.0.get(name).map_or(0, |value| value.parse().expect("a number"));
    SyncDaemon {
        role: if words[1] == "master" { SyncRole::Master } else { SyncRole::Backup },
        interface: words[2].to_owned(),
        sync_id: words[3].parse().expect("a number"),
        max_length: number("maxlen"),
        group: values.0.get("group").copied().unwrap_or("0.0.0.0").parse().expect("an address"),
        port: number("port"),
        ttl: number("ttl") as u8,
    }
}

fn table(text: &str, left_out: Option<&str>) -> Fixed {
    let mut table = Fixed::default();
    for line in text.lines().filter(|line| left_out.is_none_or(|part| !line.contains(part))) {
        let kind = line.split(' ').next().unwrap_or_default();
        match kind {
            "" | "#" => {}
            "svc" => table.services.push(Words::of(line).service()),
            "dst" => {
                let service = table.services.last_mut().expect("a service before its servers");
                service.servers.push(Words::of(line).server());
            }
            "conn" => table.connections.push(connection(&line[5..])),
            "timeout" => {
                let numbers: Vec<u32> = line.split(' ').skip(1).map(|word| word.parse().expect("a number")).collect();
                table.timeouts = Timeouts { tcp: numbers[0], tcp_fin: numbers[1], udp: numbers[2] };
            }
            "daemon" => table.sync_daemons.push(sync_daemon(line)),
            _ => panic!("what is {line:?}?"),
        }
    }
    table
}

/// Runs the lines of a case and writes the transcript.
fn transcript(commands: &str, table: &mut Fixed) -> String {
    let mut transcript = Vec::new();
    for line in commands.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        let (mut output, mut error) = (Vec::new(), Vec::new());
        let streams = Streams { input: &mut std::io::empty(), output: &mut output, error: &mut error };
        let status = ipvsadm::run("ipvsadm", &words[1..], table, streams);
        let errors = String::from_utf8_lossy(&error).lines().map(|line| format!("stderr: {line}\n")).collect::<Vec<_>>().concat();
        transcript.push(format!("$ {line}\n{}{errors}[exit {status}]\n", String::from_utf8_lossy(&output)));
    }
    transcript.concat()
}

#[test]
fn every_table_prints_as_the_original_does() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/ipvsadm-golden/format");
    let mut cases: Vec<_> = std::fs::read_dir(&directory)
        .expect("the golden cases belong to the repository")
        .map(|entry| entry.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cmds"))
        .collect();
    cases.sort();
    assert_eq!(cases.len(), 15);

    let exceptions = exceptions();
    let mut failures = Vec::new();
    for case in &cases {
        let name = case.file_stem().and_then(|name| name.to_str()).expect("a name");
        let read = |extension| std::fs::read_to_string(case.with_extension(extension)).expect("a file of the case");
        let exception =
            exceptions.iter().find(|exception| exception.case.as_deref().is_some_and(|case| case == format!("format/{name}")));
        let is_compared =
            |line: &&str| exception.is_none_or(|exception| !exception.lines.iter().any(|part| line.contains(part.as_str())));
        let golden = read("out");
        let wanted: Vec<&str> = golden.lines().filter(is_compared).collect();
        if let Some(exception) = exception {
            assert!(wanted.len() < golden.lines().count(), "{name} is not needed as an exception: {}", exception.reason);
        }
        let mut table = table(&read("table"), exception.and_then(|exception| exception.table.as_deref()));
        let actual = transcript(&read("cmds"), &mut table);
        let actual: Vec<&str> = actual.lines().filter(is_compared).collect();
        let differences = wanted.iter().zip(&actual).filter(|(wanted, actual)| wanted != actual);
        for (wanted, actual) in differences.take(5) {
            failures.push(format!("{name}:\n  wanted {wanted:?}\n  got    {actual:?}\n"));
        }
        if wanted.len() != actual.len() {
            failures.push(format!("{name}: wanted {} lines, got {}\n", wanted.len(), actual.len()));
        }
    }
    assert!(failures.is_empty(), "{}", failures.concat());
    println!("golden format: {} of {} passed", cases.len(), cases.len());
}
