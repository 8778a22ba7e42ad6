//! What monitoring reads: `/proc/net/ip_vs`, `ip_vs_conn` and `ip_vs_stats` of the kernel's IPVS, and what `bpfvs proc` prints, after the
//! same commands and the same packets; and the names and defaults of IPVS's sysctls.
//!
//! What may differ is made the same: the order of services and connections, seconds that are left, the rate of the clock in which
//! persistence is counted, and rates, which depend on the moment.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{player::Director, wire::Wire};
use crate::{
    frame::{ACK, FIN, Frame, SYN},
    wait,
};

/// One service of each kind, each with what it shows of itself.
const SERVICES: &str = "\
-A -t 10.99.0.1:80 -s wrr
-a -t 10.99.0.1:80 -r 10.1.0.1:80 -g -w 1
-a -t 10.99.0.1:80 -r 10.1.0.2:80 -i -w 1234567
-A -t 10.99.0.1:443 -s rr -p 300 -M 255.255.255.0
-a -t 10.99.0.1:443 -r 10.1.0.3:443 -g -w 0
-a -t 10.99.0.1:443 -r 10.1.0.4:443 -g -w 2
-A -u 10.99.0.1:53 -s rr -o
-a -u 10.99.0.1:53 -r 10.1.0.5:53 -g
-A -u 10.99.0.2:53 -s rr -p 300 -o
-A -t 10.99.0.3:8080 -s wlc
-a -t 10.99.0.3:8080 -r 10.1.0.6:80 -m
-A --sctp-service 10.99.0.1:9 -s sh -b sh-port
-A -t [fd99::1]:80 -s rr -p 360 -M 64
-a -t [fd99::1]:80 -r [fd01::1]:80 -g
-A -u [fd99::1]:53 -s rr -o
-A -f 10 -s wlc -p 50
-a -f 10 -r 10.1.0.7 -g
-A -f 255 -6 -s rr
";

/// What a director shows.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Files {
    /// `ip_vs`: a service and its real servers in each.
    pub services: Vec<String>,
    /// `ip_vs_conn`.
    pub connections: Vec<String>,
    /// `ip_vs_stats`.
    pub statistics: Vec<String>,
}

/// Connections that are begun.
const BEGUN: usize = 7;

/// Sets services up, sends packets, and reads. `clock_rate` is the kernel's number of ticks in a second.
pub fn play(director: &dyn Director, wire: &Wire, clock_rate: u64) -> Result<Files> {
    director.type_lines(SERVICES)?;
    let frame = |client: &str, vip: &str, flags: u8| -> Result<Frame> {
        let (client, vip) = (client.parse()?, vip.parse()?);
        Ok(if flags == 0 { Frame::udp(client, vip) } else { Frame::tcp(client, vip, flags) })
    };
    let packets = [
        ("10.9.0.2:1024", "10.99.0.1:80", SYN),
        ("10.9.0.2:1024", "10.99.0.1:80", ACK),
        ("10.9.0.2:1025", "10.99.0.1:80", SYN),
        ("10.9.0.2:1025", "10.99.0.1:80", FIN | ACK),
        ("10.9.0.2:1026", "10.99.0.1:443", SYN),
        ("10.9.0.3:40000", "10.99.0.1:53", 0),
        ("10.9.0.3:40000", "10.99.0.3:8080", SYN),
        ("[fd09::2]:1024", "[fd99::1]:80", SYN),
        ("[fd09::2]:1024", "[fd99::1]:80", ACK),
        ("[fd09::3]:1024", "[fd99::1]:80", SYN),
    ];
    for (client, vip, flags) in packets {
        wire.exchange(&[frame(client, vip, flags)?])?;
    }
    // The kernel shows what its estimator has seen, every two seconds.
    let mut statistics = String::new();
    let counted = || {
        statistics = director.proc("ip_vs_stats").unwrap_or_default();
        let numbers = statistics.lines().nth(2).unwrap_or_default();
        let connections = numbers.split_whitespace().next().and_then(|number| usize::from_str_radix(number, 16).ok());
        connections >= Some(BEGUN)
    };
    wait::until("all connections to be counted", wait::SOON, counted).with_context(|| statistics.clone())?;
    let connections = director.proc("ip_vs_conn")?;
    let mut rows = connections.lines().map(without_seconds);
    let title = rows.next().context("ip_vs_conn has no title")?;
    let mut connections: Vec<_> = rows.collect();
    connections.sort();
    connections.insert(0, title);
    Ok(Files { services: services(&director.proc("ip_vs")?, clock_rate)?, connections, statistics: without_rates(&statistics) })
}

/// The services by their names, after the titles.
fn services(text: &str, clock_rate: u64) -> Result<Vec<String>> {
    let mut blocks: Vec<String> = Vec::new();
    let (titles, rest) = text.match_indices('\n').nth(2).map(|(end, _)| text.split_at(end + 1)).context("three titles")?;
    for line in rest.split_inclusive('\n') {
        match blocks.last_mut() {
            Some(block) if line.starts_with("  ->") => block.push_str(line),
            _ => blocks.push(in_seconds(line, clock_rate)?),
        }
    }
    blocks.sort();
    blocks.insert(0, titles.to_owned());
    Ok(blocks)
}

/// A service's line with the time of its persistence in seconds.
fn in_seconds(line: &str, clock_rate: u64) -> Result<String> {
    let Some((before, after)) = line.split_once("persistent ") else { return Ok(line.to_owned()) };
    let (ticks, mask) = after.split_once(' ').context("a netmask follows the time")?;
    let ticks: u64 = ticks.parse()?;
    ensure!(ticks.is_multiple_of(clock_rate), "{line}: no whole seconds of {clock_rate} ticks");
    Ok(format!("{before}persistent {} s {mask}", ticks / clock_rate))
}

/// A line of `ip_vs_conn` without the seconds that are left, which take up seven columns.
fn without_seconds(line: &str) -> String {
    match line.char_indices().rev().nth(6) {
        Some((start, _)) if line[start..].trim().parse::<u32>().is_ok() => format!("{}{:>7}", &line[..start], "SECONDS"),
        _ => line.to_owned(),
    }
}

/// `ip_vs_stats` without its last line.
fn without_rates(text: &str) -> Vec<String> {
    let lines = text.split_inclusive('\n');
    let count = lines.clone().count();
    lines.take(count.saturating_sub(1)).map(str::to_owned).collect()
}
