//! Reads what the machine's firewall marks before routing, and says it in mark rules.
//!
//! ```text
//! iptables  -A PREROUTING -d 192.0.2.1/32 -p tcp -m multiport --dports 80,443 -j MARK --set-xmark 0xa/0xffffffff
//! nft       ip daddr 192.0.2.1 tcp dport { 80, 443 } meta mark set 10
//! both      192.0.2.1 TCP 80,443 -> 10
//! ```
//!
//! A rule that looks at anything but destination, protocol and ports, or that sets parts of a mark, cannot be said so: it
//! stays where it is. Programs that are not there have no rules; what iptables writes through nft is read by iptables.

use std::{io, net::IpAddr, process::Command};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::director::model::{Family, MarkRule, Network, Protocol};

/// A rule of the firewall that sets a mark.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Found {
    /// Its own words.
    pub(super) origin: String,
    /// The mark that it sets.
    pub(super) mark: u32,
    /// The packets that it is for.
    pub(super) family: Family,
    /// What it says, or why that cannot be said.
    pub(super) rule: Result<MarkRule, String>,
}

/// Programs that list the rules of iptables: its two kinds, for two families.
const SAVES: [(&str, Family); 4] = [
    ("iptables-nft-save", Family::Ipv4),
    ("iptables-legacy-save", Family::Ipv4),
    ("ip6tables-nft-save", Family::Ipv6),
    ("ip6tables-legacy-save", Family::Ipv6),
];

/// Asks iptables and nft.
pub(super) fn read() -> anyhow::Result<Vec<Found>> {
    let mut found = Vec::new();
    for (program, family) in SAVES {
        found.extend(iptables(&output(program, &["-t", "mangle"])?, family));
    }
    let ruleset = output("nft", &["-j", "list", "ruleset"])?;
    if !ruleset.is_empty() {
        let ruleset = serde_json::from_str(&ruleset).context("cannot understand what `nft -j list ruleset` writes")?;
        found.extend(nft(&ruleset));
    }
    Ok(found)
}

/// What a program writes; nothing if there is no such program, or no such table.
fn output(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    match Command::new(program).args(arguments).output() {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        // A kernel without the old tables.
        Ok(output) if program.contains("legacy") => {
            tracing::debug!(program, "{}", String::from_utf8_lossy(&output.stderr));
            Ok(String::new())
        }
        Ok(output) => {
            bail!(
                "cannot read the firewall's rules: {program} says: {}; run it by hand",
                String::from_utf8_lossy(&output.stderr).trim()
            )
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => {
            Err(error).with_context(|| format!("cannot read the firewall's rules: {program} does not start; run it by hand"))
        }
    }
}

/// What is known of a rule while it is read.
#[derive(Default)]
struct Draft {
    mark: Option<u32>,
    destinations: Vec<Network>,
    protocol: Option<Protocol>,
    ports: Vec<(u16, u16)>,
    obstacle: Option<String>,
}

impl Draft {
    fn obstacle(&mut self, why: &str) {
        self.obstacle.get_or_insert_with(|| why.to_owned());
    }

    /// One rule for each destination; none if no mark is set.
    fn finish(self, origin: &str, family: Family) -> Vec<Found> {
        let Some(mark) = self.mark.filter(|mark| *mark != 0) else { return Vec::new() };
        let found = |rule| Found { origin: origin.to_owned(), mark, family, rule };
        if let Some(why) = self.obstacle {
            return vec![found(Err(why))];
        }
        let everywhere = Network { address: family.unspecified(), prefix: 0 };
        let destinations = if self.destinations.is_empty() { vec![everywhere] } else { self.destinations };
        let rule = |destination| MarkRule { mark, destination, protocol: self.protocol, ports: self.ports.clone() };
        destinations.into_iter().map(|destination| found(Ok(rule(destination)))).collect()
    }
}

fn protocol(name: &str) -> Option<Protocol> {
    Protocol::ALL.into_iter().find(|protocol| protocol.to_string().eq_ignore_ascii_case(name))
}

/// Reads what `iptables-save` writes.
fn iptables(text: &str, family: Family) -> Vec<Found> {
    let rules = text.lines().filter(|line| line.starts_with("-A PREROUTING "));
    rules.flat_map(|line| iptables_rule(line).finish(line, family)).collect()
}

fn iptables_rule(line: &str) -> Draft {
    let mut draft = Draft::default();
    let mut words = line.split_ascii_whitespace().skip(2);
    while let Some(word) = words.next() {
        if word == "!" {
            draft.obstacle("it says what packets are not");
            continue;
        }
        let Some(value) = words.next() else { break };
        match word {
            "-d" => match value.parse() {
                Ok(network) => draft.destinations.push(network),
                Err(_) => draft.obstacle("its destination is no network"),
            },
            "-p" => match protocol(value) {
                Some(protocol) => draft.protocol = Some(protocol),
                None => draft.obstacle("its protocol is not TCP, UDP or SCTP"),
            },
            "-m" if matches!(value, "tcp" | "udp" | "sctp" | "multiport") => {}
            "--dport" | "--dports" => match value.split(',').map(port_range).collect() {
                Some(ports) => draft.ports = ports,
                None => draft.obstacle("its ports are no numbers"),
            },
            "-j" if value == "MARK" => {}
            "--set-mark" | "--set-xmark" => {
                let (mark, mask) = value.split_once('/').unwrap_or((value, "0xffffffff"));
                draft.mark = number(mark);
                if number(mask) != Some(u32::MAX) {
                    draft.obstacle("it sets some bits of the mark only");
                }
            }
            _ => draft.obstacle("it looks at more than destination, protocol and ports"),
        }
    }
    draft
}

/// `80` or `10000:20000`.
fn port_range(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once(':').unwrap_or((text, text));
    Some((first.parse().ok()?, last.parse().ok()?))
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Reads what `nft -j list ruleset` writes.
fn nft(ruleset: &Value) -> Vec<Found> {
    let objects = || ruleset["nftables"].as_array().into_iter().flatten();
    let place = |value: &Value, chain: &str| [value["family"].clone(), value["table"].clone(), value[chain].clone()];
    let chains: Vec<_> = objects()
        .map(|object| &object["chain"])
        .filter(|chain| chain["hook"] == "prerouting")
        .map(|chain| place(chain, "name"))
        .collect();
    let rules = objects().map(|object| &object["rule"]).filter(|rule| chains.contains(&place(rule, "chain")));
    rules.flat_map(nft_rule).collect()
}

fn nft_rule(rule: &Value) -> Vec<Found> {
    let mut draft = Draft::default();
    let mut family = match rule["family"].as_str() {
        Some("ip") => Some(Family::Ipv4),
        Some("ip6") => Some(Family::Ipv6),
        Some("inet") => None,
        _ => return Vec::new(),
    };
    for expression in rule["expr"].as_array().into_iter().flatten() {
        let (matched, mangle) = (&expression["match"], &expression["mangle"]);
        if mangle["key"]["meta"]["key"] == "mark" {
            draft.mark = mangle["value"].as_u64().and_then(|mark| u32::try_from(mark).ok());
            if draft.mark.is_none() {
                // What mark that would be nobody knows; the service's name does not tell either.
                return Vec::new();
            }
        } else if matched["op"] == "==" || matched["op"] == "in" {
            nft_match(&mut draft, &mut family, &matched["left"], &matched["right"]);
        } else if !expression["counter"].is_object() && expression.get("counter").is_none() {
            draft.obstacle("it looks at more than destination, protocol and ports");
        }
    }
    let origin = format!(
        "nft rule, handle {} in {} {} {}",
        rule["handle"],
        text(&rule["family"]),
        text(&rule["table"]),
        text(&rule["chain"])
    );
    let families = family.map_or_else(|| vec![Family::Ipv4, Family::Ipv6], |family| vec![family]);
    let Draft { mark, destinations, protocol, ports, obstacle } = draft;
    let draft = || Draft { mark, destinations: destinations.clone(), protocol, ports: ports.clone(), obstacle: obstacle.clone() };
    families.into_iter().flat_map(|family| draft().finish(&origin, family)).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn nft_match(draft: &mut Draft, family: &mut Option<Family>, left: &Value, right: &Value) {
    let values = right["set"].as_array().cloned().unwrap_or_else(|| vec![right.clone()]);
    let (header, field) = (text(&left["payload"]["protocol"]), text(&left["payload"]["field"]));
    match (header, field, text(&left["meta"]["key"])) {
        ("ip" | "ip6", "daddr", _) => {
            *family = Some(if header == "ip" { Family::Ipv4 } else { Family::Ipv6 });
            match values.iter().map(nft_network).collect() {
                Some(networks) => draft.destinations = networks,
                None => draft.obstacle("its destinations are no networks"),
            }
        }
        ("tcp" | "udp" | "sctp" | "th", "dport", _) => {
            draft.protocol = protocol(header).or(draft.protocol);
            match values.iter().map(nft_ports).collect() {
                Some(ports) => draft.ports = ports,
                None => draft.obstacle("its ports are no numbers"),
            }
        }
        ("ip", "protocol", _) | ("ip6", "nexthdr", _) | (_, _, "l4proto") => match (protocol(text(right)), right["set"].is_array())
        {
            (Some(protocol), false) => draft.protocol = Some(protocol),
            _ => draft.obstacle("it names no single protocol"),
        },
        (_, _, "nfproto") => *family = Some(if right == "ipv6" { Family::Ipv6 } else { Family::Ipv4 }),
        _ => draft.obstacle("it looks at more than destination, protocol and ports"),
    }
}

fn nft_network(value: &Value) -> Option<Network> {
    let (address, prefix) = match &value["prefix"] {
        Value::Null => (value, None),
        prefix => (&prefix["addr"], Some(u8::try_from(prefix["len"].as_u64()?).ok()?)),
    };
    let address: IpAddr = address.as_str()?.parse().ok()?;
    let network = Network { address, prefix: 0 };
    Some(Network { prefix: prefix.unwrap_or_else(|| network.longest_prefix()), ..network })
}

fn nft_ports(value: &Value) -> Option<(u16, u16)> {
    let port = |value: &Value| u16::try_from(value.as_u64()?).ok();
    match value["range"].as_array().map(Vec::as_slice) {
        Some([first, last]) => Some((port(first)?, port(last)?)),
        _ => port(value).map(|port| (port, port)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What was found, shortly: the rule, or `-`.
    fn said(found: &[Found]) -> Vec<String> {
        found.iter().map(|found| found.rule.as_ref().map_or_else(|_| format!("- {}", found.mark), ToString::to_string)).collect()
    }

    #[test]
    fn the_how_tos_rule_is_understood() {
        let saved = "# Generated\n*mangle\n:PREROUTING ACCEPT [0:0]\n\
            -A PREROUTING -d 192.0.2.1/32 -p tcp -m multiport --dports 80,443,10000:20000 -j MARK --set-xmark 0xa/0xffffffff\n\
            -A PREROUTING -d 198.51.100.0/24 -p udp -m udp --dport 53 -j MARK --set-xmark 0xb/0xffffffff\n\
            -A PREROUTING -j MARK --set-xmark 0xc/0xffffffff\n\
            -A PREROUTING -s 10.0.0.0/8 -d 192.0.2.1/32 -j MARK --set-xmark 0xd/0xffffffff\n\
            -A PREROUTING ! -d 192.0.2.1/32 -p tcp -j MARK --set-xmark 0xe/0xffffffff\n\
            -A PREROUTING -d 192.0.2.1/32 -j MARK --set-xmark 0xf/0xff\n\
            -A PREROUTING -d 192.0.2.1/32 -j ACCEPT\nCOMMIT\n";
        assert_eq!(
            said(&iptables(saved, Family::Ipv4)),
            [
                "192.0.2.1 TCP 80,443,10000-20000 -> 10",
                "198.51.100.0/24 UDP 53 -> 11",
                "0.0.0.0/0 any protocol all ports -> 12",
                "- 13",
                "- 14",
                "- 15"
            ]
        );
    }

    #[test]
    fn nfts_rules_are_understood() {
        let rule = |expr: Value| json!({"rule": {"family": "ip", "table": "t", "chain": "c", "handle": 4, "expr": expr}});
        let daddr = |right: Value| json!({"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": right}});
        let dport = |right: Value| json!({"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": right}});
        let set = json!({"mangle": {"key": {"meta": {"key": "mark"}}, "value": 10}});
        let source = json!({"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "10.0.0.1"}});
        let ruleset = json!({"nftables": [
            {"chain": {"family": "ip", "table": "t", "name": "c", "hook": "prerouting"}},
            {"chain": {"family": "ip", "table": "t", "name": "other"}},
            rule(json!([daddr(json!("192.0.2.1")), dport(json!({"set": [80, 443, {"range": [1000, 2000]}]})), {"counter": {"packets": 0}}, set])),
            rule(json!([daddr(json!({"prefix": {"addr": "198.51.100.0", "len": 24}})), dport(json!(80)), set])),
            rule(json!([daddr(json!({"set": ["192.0.2.1", "192.0.2.2"]})), set])),
            rule(json!([source, set])),
            {"rule": {"family": "ip", "table": "t", "chain": "other", "handle": 5, "expr": [set]}},
        ]});
        assert_eq!(
            said(&nft(&ruleset)),
            [
                "192.0.2.1 TCP 80,443,1000-2000 -> 10",
                "198.51.100.0/24 TCP 80 -> 10",
                "192.0.2.1 any protocol all ports -> 10",
                "192.0.2.2 any protocol all ports -> 10",
                "- 10"
            ]
        );
    }
}
