//! What is sent through a peer, and what that took.
//!
//! wrk asks for a page of a few bytes, again and again, over connections that stay or over a new one each time; iperf3 sends as
//! much as it can. Beside what they report stands how long all CPUs of this machine were busy meanwhile: the kernel charges a
//! forwarded packet to whoever happens to run, so that no account of single processes would be true. On a machine that has
//! nothing else to do, the difference to plain routing is what the peer costs.

use std::{fs, net::IpAddr};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::{
    netns::Namespace,
    programs::{iperf, url},
};

/// The kernel's unit in /proc/stat: 100 in a second, on every architecture.
const MICROSECONDS_PER_TICK: f64 = 10_000.0;

/// What wrk saw, and what it took.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Requests {
    /// Requests in a second.
    pub per_second: f64,
    /// Half of them were answered within so many microseconds.
    pub p50_us: f64,
    /// 99 of 100 were.
    pub p99_us: f64,
    /// Microseconds of CPU for a request: client, real server, director and kernel together.
    pub cpu_us: f64,
    /// Connections that failed, requests that were not answered or not well.
    pub errors: u64,
}

/// What iperf3 saw, and what it took.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Bulk {
    /// Gigabits in a second, at the receiver.
    pub gbits_per_second: f64,
    /// Seconds of CPU for a gigabyte.
    pub cpu_s_per_gbyte: f64,
}

/// Asks for pages for so many seconds.
pub fn requests(client: &Namespace, target: IpAddr, keep_alive: bool, connections: u32, seconds: u32) -> Result<Requests> {
    let (connections, duration) = (format!("-c{connections}"), format!("-d{seconds}s"));
    let mut arguments = vec!["-t1", &connections, &duration, "--latency"];
    if !keep_alive {
        arguments.extend(["-H", "Connection: close"]);
    }
    let page = url(target, "");
    arguments.push(&page);
    let before = busy_us()?;
    let text = client.run("wrk", arguments)?;
    let busy = busy_us()? - before;
    read(&text, busy).with_context(|| format!("read wrk's report:\n{text}"))
}

/// Sends TCP for so many seconds.
pub fn bulk(client: &Namespace, target: IpAddr, seconds: u32) -> Result<Bulk> {
    let before = busy_us()?;
    let throughput = iperf(client, target, seconds)?;
    let busy = busy_us()? - before;
    let gbytes = throughput.bits_per_second * f64::from(seconds) / 8e9;
    ensure!(gbytes > 0.0, "iperf3 got nothing through");
    Ok(Bulk { gbits_per_second: throughput.bits_per_second / 1e9, cpu_s_per_gbyte: busy / 1e6 / gbytes })
}

/// Reads wrk's report; `busy` are microseconds of CPU.
fn read(text: &str, busy: f64) -> Result<Requests> {
    let line = |label: &str| text.lines().find_map(|line| line.trim().strip_prefix(label)).map(str::trim);
    let number = |text: &str| text.parse::<f64>().with_context(|| format!("`{text}` is no number"));
    let per_second = number(line("Requests/sec:").context("there is no rate")?)?;
    let count = text.lines().find_map(|line| line.trim().split_once(" requests in ")).context("there is no count")?.0;
    let count = number(count)?;
    ensure!(count > 0.0, "no request was answered");
    let failures = |label: &str| -> u64 {
        let numbers = line(label).unwrap_or_default().split([' ', ',']).filter_map(|word| word.parse::<u64>().ok());
        numbers.sum()
    };
    Ok(Requests {
        per_second,
        p50_us: microseconds(line("50%").context("there is no median")?)?,
        p99_us: microseconds(line("99%").context("there is no 99th percentile")?)?,
        cpu_us: busy / count,
        errors: failures("Socket errors:") + failures("Non-2xx or 3xx responses:"),
    })
}

/// A time as wrk writes it: `61.00us`, `1.25ms`, `2.00s`.
fn microseconds(text: &str) -> Result<f64> {
    let (number, factor) = [("us", 1.0), ("ms", 1e3), ("s", 1e6)]
        .into_iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))
        .with_context(|| format!("`{text}` is no time"))?;
    Ok(number.parse::<f64>().with_context(|| format!("`{text}` is no time"))? * factor)
}

/// Microseconds for which this machine's CPUs were busy since it came up.
fn busy_us() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let ticks = text.lines().next().and_then(|line| line.strip_prefix("cpu ")).context("/proc/stat does not begin with `cpu`")?;
    let ticks: Vec<f64> = ticks.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq; then time that belongs to guests and hosts.
    let [user, nice, system, _, _, irq, softirq, ..] = ticks[..] else { anyhow::bail!("/proc/stat has only {ticks:?}") };
    Ok((user + nice + system + irq + softirq) * MICROSECONDS_PER_TICK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_wrk_is_read() {
        let text = "Running 5s test @ http://10.0.0.200/\n  1 threads and 50 connections\n  Thread Stats   Avg      Stdev     Max   +/- \
                    Stdev\n    Latency     1.38ms    1.52ms  27.47ms   92.49%\n  Latency Distribution\n     50%    1.05ms\n     75%    \
                    1.43ms\n     90%    2.31ms\n     99%  876.00us\n  206450 requests in 5.00s, 31.50MB read\n  Socket errors: connect 1, \
                    read 2, write 0, timeout 3\nRequests/sec:  41273.59\nTransfer/sec:      6.30MB\n";
        let requests = read(text, 206_450.0 * 30.0).expect("this is how wrk 4.1 writes");
        assert_eq!(
            format!(
                "{:.2} {:.0} {:.0} {:.0} {}",
                requests.per_second, requests.p50_us, requests.p99_us, requests.cpu_us, requests.errors
            ),
            "41273.59 1050 876 30 6"
        );
    }

    #[test]
    fn a_machine_has_been_busy() {
        assert!(busy_us().expect("every Linux has /proc/stat") > 0.0);
    }
}
