//! `bpfvs mark`: mark rules, by which bpfvs itself takes packets for marked.

mod import;

use std::str::FromStr;

use anyhow::bail;
use clap::{Args, Subcommand};

use super::{
    Global, names,
    table::{number, table, text},
};
use crate::director::model::{Command, MarkRule, Network, Outcome, Protocol, port_list};

#[derive(Debug, Subcommand)]
pub(super) enum Mark {
    /// Add a mark rule
    Add(Rule),
    /// Delete a mark rule
    Delete(Rule),
    /// List mark rules
    List,
    /// Read the rules of iptables and nft that mark packets for a service, and say how to have them as mark rules
    Import {
        /// Add the mark rules
        #[arg(long)]
        apply: bool,
    },
}

/// A rule, as it is typed.
#[derive(Args, Debug)]
pub(super) struct Rule {
    /// The mark
    #[arg(value_parser = names::mark)]
    mark: u32,
    /// Where the packets go: 10.0.0.200, 10.1.0.0/16, `2001:db8::/32`
    #[arg(long = "dst", value_name = "ADDRESS|NETWORK")]
    destination: Network,
    /// Their protocol [default: tcp, udp and sctp]
    #[arg(long = "proto", value_enum)]
    protocol: Option<Protocol>,
    /// The ports that they go to: 80,443,10000-20000 [default: all]
    #[arg(long, default_value = "", hide_default_value = true)]
    ports: Ports,
}

impl Rule {
    fn into_rule(self) -> MarkRule {
        MarkRule { mark: self.mark, destination: self.destination, protocol: self.protocol, ports: self.ports.0 }
    }
}

/// Ports and ranges of ports.
#[derive(Clone, Debug)]
struct Ports(Vec<(u16, u16)>);

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| text.parse().map_err(|_| format!("\"{text}\" is no port; write 80,443,10000-20000"));
        let range = |text: &str| match text.split_once('-') {
            Some((first, last)) => Ok((port(first)?, port(last)?)),
            None => port(text).map(|port| (port, port)),
        };
        text.split(',').filter(|part| !part.is_empty()).map(range).collect::<Result<_, _>>().map(Self)
    }
}

impl Mark {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        match self {
            Self::Add(rule) => global.change(Command::AddMarkRule(rule.into_rule())),
            Self::Delete(rule) => global.change(Command::RemoveMarkRule(rule.into_rule())),
            Self::List => {
                let rules = global.client()?.mark_rules()?;
                global.answer(&rules, || list(&rules))
            }
            Self::Import { apply } => import(global, apply),
        }
    }
}

fn list(rules: &[MarkRule]) -> String {
    let rows = rules.iter().map(|rule| {
        let protocol = rule.protocol.map_or_else(|| "any".to_owned(), |protocol| protocol.to_string());
        [rule.mark.to_string(), rule.destination.to_string(), protocol, port_list(&rule.ports)]
    });
    table([number("MARK"), text("DESTINATION"), text("PROTOCOL"), text("PORTS")], rows)
}

/// The command line that adds a rule.
fn line(rule: &MarkRule) -> String {
    let MarkRule { mark, destination, protocol, ports } = rule;
    let protocol = protocol.map(|protocol| format!(" --proto {}", protocol.to_string().to_lowercase())).unwrap_or_default();
    let ports = if ports.is_empty() { String::new() } else { format!(" --ports {}", port_list(ports)) };
    format!("bpfvs mark add {mark} --dst {destination}{protocol}{ports}")
}

fn import(global: &Global, apply: bool) -> anyhow::Result<()> {
    let mut client = global.client()?;
    let marks: Vec<_> = client.services()?.iter().map(|service| (service.id.mark(), service.id.family())).collect();
    let known = client.mark_rules()?;
    let found = import::read()?;
    let (mut rules, mut lines) = (Vec::new(), Vec::new());
    for import::Found { origin, mark, family, rule } in found {
        if !marks.contains(&(mark, family)) {
            continue;
        }
        match rule {
            Ok(rule) if known.contains(&rule) || rules.contains(&rule) => {}
            Ok(rule) => {
                lines.push(format!("{}    # {origin}\n", line(&rule)));
                rules.push(rule);
            }
            Err(why) => lines.push(format!("# stays with the firewall, because {why}: {origin}\n")),
        }
    }
    global.answer(&rules, || if lines.is_empty() { "# nothing to import\n".to_owned() } else { lines.concat() })?;
    if !apply {
        return Ok(());
    }
    let commands: Vec<_> = rules.into_iter().map(Command::AddMarkRule).collect();
    let outcomes = client.commands(&commands)?;
    let refused: Vec<_> = outcomes
        .into_iter()
        .filter_map(|outcome| match outcome {
            Outcome::Ok => None,
            Outcome::Refused(refusal) => Some(refusal.message),
        })
        .collect();
    if refused.is_empty() { Ok(()) } else { bail!("{}", refused.join("\nbpfvs: ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_numbers_and_ranges() {
        let ports = |text: &str| text.parse::<Ports>().map(|ports| ports.0);
        assert_eq!(ports("80,443,10000-20000"), Ok(vec![(80, 80), (443, 443), (10000, 20000)]));
        assert_eq!(ports(""), Ok(vec![]));
        for wrong in ["http", "1-", "65536", "80 443", "-"] {
            ports(wrong).expect_err(wrong);
        }
    }
}
