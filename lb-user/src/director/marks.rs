//! The mark rules: which packets bpfvs itself takes for marked.
//!
//! A rule is written once, and no two rules may say different things of the same packet, so that their order means nothing. Of
//! rules for networks of different lengths the longest prefix decides, and a rule that names the port goes before one for all.
//!
//! ```text
//! 192.0.2.1 TCP 80,443 -> 10     192.0.2.1 TCP 443 -> 11     refused: TCP port 443 to 192.0.2.1 has the mark 10
//! ```

use super::{
    model::{MarkRule, Network, Refusal, RefusalKind, port_list},
    rules::refuse,
};

/// Ports of one rule at most: each takes a key.
const MOST_PORTS: usize = 1 << 14;

/// All rules, sorted.
#[derive(Clone, Debug, Default)]
pub(super) struct MarkRules(Vec<MarkRule>);

impl From<Vec<MarkRule>> for MarkRules {
    fn from(rules: Vec<MarkRule>) -> Self {
        Self(rules)
    }
}

impl MarkRules {
    /// The rules.
    pub(super) fn list(&self) -> &[MarkRule] {
        &self.0
    }

    /// These rules and another one.
    pub(super) fn with(&self, rule: &MarkRule) -> Result<Self, Refusal> {
        let rule = checked(rule)?;
        let Err(place) = self.0.binary_search(&rule) else {
            return refuse(RefusalKind::RuleExists, format!("the mark rule {rule} cannot be added: it exists; leave it as it is"));
        };
        if let Some(other) = self.0.iter().find(|other| other.mark != rule.mark && overlap(other, &rule)) {
            return refuse(
                RefusalKind::Invalid,
                format!(
                    "the mark rule {rule} cannot be added: some of its packets get another mark by the rule {other}; remove that one \
                     first (`bpfvs mark delete`), or name other ports"
                ),
            );
        }
        let mut rules = self.0.clone();
        rules.insert(place, rule);
        Ok(Self(rules))
    }

    /// These rules but one.
    pub(super) fn without(&self, rule: &MarkRule) -> Result<Self, Refusal> {
        let rule = checked(rule)?;
        let Ok(place) = self.0.binary_search(&rule) else {
            return refuse(
                RefusalKind::NoSuchRule,
                format!("there is no mark rule {rule}; `bpfvs mark list` lists those that there are"),
            );
        };
        let mut rules = self.0.clone();
        rules.remove(place);
        Ok(Self(rules))
    }
}

/// The rule with its ports in order, if it makes sense.
fn checked(rule: &MarkRule) -> Result<MarkRule, Refusal> {
    let refused = |why: String| refuse(RefusalKind::Invalid, format!("the mark rule {rule} makes no sense: {why}"));
    let Network { address, prefix } = rule.destination;
    if rule.mark == 0 {
        return refused("0 stands for no mark; name a mark from 1 on".to_owned());
    }
    if prefix > rule.destination.longest_prefix() {
        return refused(format!(
            "{address} has no prefix of {prefix} bits; name one of at most {}",
            rule.destination.longest_prefix()
        ));
    }
    if !rule.destination.is_valid() {
        return refused(format!("{address} has bits behind its prefix of {prefix}; write the network's own address"));
    }
    if let Some((first, last)) = rule.ports.iter().find(|(first, last)| *first == 0 || first > last) {
        return refused(format!("there is no port range {first}-{last}; write the smaller port first, from 1 on"));
    }
    let ports = merged(&rule.ports);
    let count: usize = ports.iter().map(|(first, last)| usize::from(last - first) + 1).sum();
    if count > MOST_PORTS {
        return refused(format!(
            "{} are {count} ports, and a rule has room for {MOST_PORTS}; name no ports to mean all",
            port_list(&ports)
        ));
    }
    Ok(MarkRule { ports, ..rule.clone() })
}

/// Ranges in order; what touches is one.
fn merged(ports: &[(u16, u16)]) -> Vec<(u16, u16)> {
    let mut sorted = ports.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::with_capacity(sorted.len());
    for (first, last) in sorted {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// Whether two rules speak of the same packets, at the same length of the prefix.
fn overlap(one: &MarkRule, other: &MarkRule) -> bool {
    let same_protocol = one.protocol.is_none() || other.protocol.is_none() || one.protocol == other.protocol;
    let meets = |&(first, last): &(u16, u16)| other.ports.iter().any(|&(from, to)| first <= to && from <= last);
    let same_port = one.ports.iter().any(meets) || one.ports.is_empty() && other.ports.is_empty();
    one.destination == other.destination && same_protocol && same_port
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::director::model::Protocol;

    fn rule(mark: u32, destination: &str, prefix: u8, ports: &[(u16, u16)]) -> MarkRule {
        let address = destination.parse().expect("an address");
        MarkRule { mark, destination: Network { address, prefix }, protocol: Some(Protocol::Tcp), ports: ports.to_vec() }
    }

    #[test]
    fn a_rule_is_itself_however_its_ports_are_written() {
        let rules = MarkRules::default().with(&rule(10, "192.0.2.1", 32, &[(443, 443), (80, 81), (81, 90)])).expect("it is new");
        assert_eq!(rules.list()[0].ports, [(80, 90), (443, 443)]);
        let same = rule(10, "192.0.2.1", 32, &[(80, 90), (443, 443)]);
        assert_eq!(rules.with(&same).expect_err("it exists").kind, RefusalKind::RuleExists);
        assert!(rules.without(&same).expect("it is there").list().is_empty());
        let other = rule(10, "192.0.2.1", 32, &[(80, 80)]);
        assert_eq!(rules.without(&other).expect_err("there is none").kind, RefusalKind::NoSuchRule);
    }

    #[test]
    fn no_packet_has_two_marks() {
        let rules = MarkRules::default().with(&rule(10, "192.0.2.1", 32, &[(80, 90)])).expect("it is new");
        for other in [rule(11, "192.0.2.1", 32, &[(90, 91)]), MarkRule { protocol: None, ..rule(11, "192.0.2.1", 32, &[(80, 80)]) }]
        {
            assert_eq!(rules.with(&other).expect_err("it contradicts").kind, RefusalKind::Invalid, "{other}");
        }
        for other in [
            rule(11, "192.0.2.1", 32, &[(91, 91)]),
            rule(11, "192.0.2.1", 32, &[]),
            rule(11, "192.0.2.0", 24, &[(80, 90)]),
            rule(10, "192.0.2.1", 32, &[(85, 95)]),
            MarkRule { protocol: Some(Protocol::Udp), ..rule(11, "192.0.2.1", 32, &[(80, 90)]) },
        ] {
            rules.with(&other).unwrap_or_else(|refusal| panic!("{refusal}"));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for nonsense in [
            rule(0, "192.0.2.1", 32, &[]),
            rule(1, "192.0.2.1", 33, &[]),
            rule(1, "192.0.2.1", 24, &[]),
            rule(1, "2001:db8::1", 64, &[]),
            rule(1, "192.0.2.1", 32, &[(0, 1)]),
            rule(1, "192.0.2.1", 32, &[(2, 1)]),
            rule(1, "192.0.2.1", 32, &[(1, 65535)]),
        ] {
            assert_eq!(MarkRules::default().with(&nonsense).expect_err("it is nonsense").kind, RefusalKind::Invalid, "{nonsense}");
        }
        for fine in [rule(1, "0.0.0.0", 0, &[]), rule(1, "::", 0, &[]), rule(1, "2001:db8::", 64, &[(1, 1 << 14)])] {
            MarkRules::default().with(&fine).unwrap_or_else(|refusal| panic!("{refusal}"));
        }
    }
}
