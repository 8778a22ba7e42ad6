//! The mark device: how packets that iptables or nft mark before routing come back to the packet path.
//!
//! tc sees packets before the firewall has marked them. So the daemon makes a veth pair and has the kernel route marked packets
//! into one end; at the other end they come in again, and tc finds the mark.
//!
//! ```text
//! eth0 -> tc: no mark, pass -> PREROUTING: mark 10 -> rule "fwmark 10" -> bpfvs-mark0 ═ bpfvs-mark1 -> tc: service FWM 10
//! ```
//!
//! Rules, in the order of their preference, for each family that has mark services:
//!
//! | preference | rule | why |
//! | --- | --- | --- |
//! | 40 | from either end of the pair: go to 42 | what tc passes on shall not come again |
//! | 41 | fwmark N: table 26214, which leads into the pair | one for each service |
//! | 42 | from this host itself: go to 44 | its own connections are none of ours, unless it marks them |
//! | 43 | ports: a table that leads into the pair | services by address that wait for marks ([`super::detour`]) |
//! | 44 | nothing | where 40 and 42 lead to |
//! | 45 | the local table, if its rule was the first of all (preference 0) | a virtual address of our own must not go before the mark |
//!
//! All that [`keep`] does it does only where it is not done, so that it can be asked at each event: what somebody takes away
//! comes back. Rules are known by the number of their protocol, so that the next daemon adopts them. [`remove`] leaves nothing.
//!
//! The kernel forwards into the pair, so the host must be a router (`net.ipv4.ip_forward`). That is the user's to decide:
//! [`obstacles`] says what is missing. All other settings are the pair's own.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex},
};

use anyhow::{Context as _, anyhow};
use futures_util::TryStreamExt as _;
use rtnetlink::{
    Handle, IpVersion, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        AddressFamily, IpProtocol,
        address::AddressScope,
        route::{RouteMessage, RouteProtocol, RouteScope},
        rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
    },
};

use super::{
    detour::{Demand, Detours, Ports},
    links::{self, Link, Links},
};
use crate::director::model::{Family, Protocol};

/// The end that marked packets are sent into.
pub const ENTRANCE: &str = "bpfvs-mark0";
/// The end that they come out of, where tc waits.
pub const EXIT: &str = "bpfvs-mark1";

/// Both ends have this address, so that what goes in at one end is for the other: locally administered, "bpfvs".
const MAC: [u8; 6] = [0x02, 0x62, 0x70, 0x66, 0x76, 0x73];
/// The dummy address of RFC 7600.
const DUMMY: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
/// No packet is too big for it.
const MTU: u32 = 65535;

/// The routing table that leads into the pair: "ff".
const TABLE: u32 = 0x6666;
/// The table of the host's own addresses (`RT_TABLE_LOCAL`).
const LOCAL_TABLE: u8 = 255;
/// By this our rules are known.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(0xb5);

const BYPASS: u32 = 40;
const MARKS: u32 = 41;
const OWN: u32 = 42;
const PORTS: u32 = 43;
const LANDING: u32 = 44;
const LOCAL: u32 = 45;

/// Where packets of this host itself come from, as rules see it.
const LOOPBACK: &str = "lo";

/// The marks that name services.
pub type Marks = BTreeSet<(Family, u32)>;

/// How the mark device is.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct MarkDevice {
    /// Whether there are services that need it.
    pub present: bool,
    /// Whether new connections of services by address take the detour over it.
    pub detour: bool,
    /// Why it does not work, if it does not.
    pub obstacle: Option<String>,
}

/// What whoever guards the mark device has in hand.
#[expect(missing_debug_implementations, reason = "aya's maps have none")]
pub struct Guard {
    /// How it is; told to others.
    pub device: Arc<Mutex<MarkDevice>>,
    /// What it is for; told by others.
    pub demand: Arc<Mutex<Demand>>,
    /// What is led over it without a mark.
    pub detours: Detours,
}

/// Makes the pair if it is not there, and sees that it is up. Returns its ends.
pub async fn keep(handle: &Handle, links: &Links) -> anyhow::Result<[Link; 2]> {
    const WHAT: &str = "the mark device cannot be made; the kernel needs CONFIG_VETH";
    let found = |links: &Links| [ENTRANCE, EXIT].map(|name| links.values().find(|link| link.name == name).cloned());
    if let [Some(entrance), Some(exit)] = found(links)
        && entrance.up
        && exit.up
    {
        add_address(handle, &entrance).await?;
        add_address(handle, &exit).await?;
        return Ok([entrance, exit]);
    }
    // What was heard may be old.
    let mut present = links::list(handle).await?;
    if found(&present).iter().any(Option::is_none) {
        delete(handle, &present).await?;
        handle.link().add(LinkVeth::new(ENTRANCE, EXIT).build()).execute().await.context(WHAT)?;
        present = links::list(handle).await?;
    }
    for end in found(&present).into_iter().flatten() {
        configure(&end.name);
        let settings = LinkUnspec::new_with_index(end.index).address(MAC.to_vec()).mtu(MTU).arp(false).up();
        handle.link().set(settings.build()).execute().await.with_context(|| format!("{} cannot be set up", end.name))?;
        add_address(handle, &end).await?;
    }
    match found(&links::list(handle).await?) {
        [Some(entrance), Some(exit)] => Ok([entrance, exit]),
        _ => Err(anyhow!("the mark device is gone as soon as it is made; see who removes {ENTRANCE}")),
    }
}

/// Gives one end an address that means nothing outside: a device without any takes no packets as long as `rp_filter` is on
/// anywhere.
async fn add_address(handle: &Handle, end: &Link) -> anyhow::Result<()> {
    let mut request = handle.address().add(end.index, DUMMY.into(), 32);
    request.message_mut().header.scope = AddressScope::Host;
    match request.execute().await {
        Err(error) if !is(&error, libc::EEXIST) => Err(error).with_context(|| format!("{} cannot get an address", end.name)),
        _ => Ok(()),
    }
}

/// Settings of one end: packets come in there that come from anywhere, and are forwarded from there.
fn configure(name: &str) {
    let settings = [
        ("ipv4", "rp_filter", "2"),
        ("ipv4", "accept_local", "1"),
        ("ipv4", "forwarding", "1"),
        ("ipv4", "send_redirects", "0"),
        // No address of its own, which would be announced.
        ("ipv6", "addr_gen_mode", "1"),
        ("ipv6", "accept_ra", "0"),
    ];
    for (family, setting, value) in settings {
        let path = format!("/proc/sys/net/{family}/conf/{name}/{setting}");
        if let Err(error) = fs::write(&path, value) {
            tracing::debug!(path, %error, "a setting of the mark device stays as it is");
        }
    }
}

/// Sends packets with these marks, and no others, into the pair; and those to these ports where their tables say so.
pub async fn lead(handle: &Handle, entrance: &Link, marks: &Marks, ports: &BTreeSet<(Family, Ports)>) -> anyhow::Result<()> {
    for family in Family::ALL {
        let marks: Vec<u32> = marks.iter().filter(|(of, _)| *of == family).map(|(_, mark)| *mark).collect();
        let ports: Vec<Ports> = ports.iter().filter(|(of, _)| *of == family).map(|(_, ports)| *ports).collect();
        if !marks.is_empty() {
            match handle.route().add(route(entrance.index, family, TABLE, None)).execute().await {
                Err(error) if !is(&error, libc::EEXIST) => {
                    return Err(error).context("the route into the mark device cannot be added");
                }
                _ => {}
            }
        }
        keep_rules(handle, family, &marks, &ports).await?;
    }
    Ok(())
}

/// Takes the pair and all rules away, if they are there.
pub async fn remove(handle: &Handle) -> anyhow::Result<()> {
    for family in Family::ALL {
        keep_rules(handle, family, &[], &[]).await?;
    }
    delete(handle, &links::list(handle).await?).await
}

/// What the host's own settings keep the mark device from, in words; nothing if all is well.
pub fn obstacles(marks: &Marks) -> Option<String> {
    let settings = [(Family::Ipv4, "net.ipv4.ip_forward"), (Family::Ipv6, "net.ipv6.conf.all.forwarding")];
    let missing: Vec<&str> = settings
        .into_iter()
        .filter(|(family, _)| marks.iter().any(|(of, _)| of == family) && !forwards(*family))
        .map(|(_, name)| name)
        .collect();
    (!missing.is_empty()).then(|| {
        format!(
            "packets that iptables or nft mark do not reach their services: this host is no router; set {}=1, or use mark rules (`bpfvs \
             mark add`), which need no forwarding",
            missing.join("=1 and ")
        )
    })
}

/// Whether this host is a router.
pub fn forwards(family: Family) -> bool {
    let path = if family == Family::Ipv4 { "net/ipv4/ip_forward" } else { "net/ipv6/conf/all/forwarding" };
    !fs::read_to_string(format!("/proc/sys/{path}")).is_ok_and(|value| value.trim() == "0")
}

/// Deletes what there is of the pair.
async fn delete(handle: &Handle, links: &Links) -> anyhow::Result<()> {
    // With one end the other goes.
    if let Some(end) = links.values().find(|link| link.name == ENTRANCE || link.name == EXIT) {
        handle.link().del(end.index).execute().await.with_context(|| format!("the mark device {} cannot be deleted", end.name))?;
    }
    Ok(())
}

/// A route into the pair, to an address or to all.
pub fn route(entrance: u32, family: Family, table: u32, to: Option<IpAddr>) -> RouteMessage {
    match family {
        Family::Ipv4 => {
            let route = RouteMessageBuilder::<Ipv4Addr>::new().output_interface(entrance).table_id(table).scope(RouteScope::Link);
            if let Some(IpAddr::V4(address)) = to { route.destination_prefix(address, 32) } else { route }.build()
        }
        Family::Ipv6 => {
            let route = RouteMessageBuilder::<Ipv6Addr>::new().output_interface(entrance).table_id(table);
            if let Some(IpAddr::V6(address)) = to { route.destination_prefix(address, 128) } else { route }.build()
        }
    }
}

/// A rule of ours, or that of the local table where the kernel puts it.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Rule {
    Bypass(String),
    Mark(u32),
    Own,
    Ports(Ports),
    Landing,
    Local,
    /// The kernel's own, before all others.
    LocalFirst,
}

impl Rule {
    /// Reads a rule; nothing if it is somebody else's.
    fn parse(message: &RuleMessage) -> Option<Self> {
        let (mut priority, mut protocol, mut mark, mut interface, mut selects) = (0, None, None, None, false);
        let (mut transport, mut range) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Priority(value) => priority = *value,
                RuleAttribute::Protocol(value) => protocol = Some(*value),
                RuleAttribute::FwMark(value) => mark = Some(*value),
                RuleAttribute::Iifname(value) => interface = Some(value.clone()),
                RuleAttribute::IpProtocol(value) => transport = u8::try_from(i32::from(*value)).ok().and_then(Protocol::of_number),
                RuleAttribute::DestinationPortRange(RulePortRange { start, end }) => range = Some((*start, *end)),
                RuleAttribute::Table(_) | RuleAttribute::SuppressPrefixLen(_) | RuleAttribute::FwMask(_) => {}
                _ => selects = true,
            }
        }
        if protocol == Some(PROTOCOL) {
            return match (priority, mark, interface) {
                (BYPASS, None, Some(interface)) => Some(Self::Bypass(interface)),
                (MARKS, Some(mark), None) => Some(Self::Mark(mark)),
                (OWN, ..) => Some(Self::Own),
                (PORTS, ..) => Some(Self::Ports(Ports { protocol: transport?, range })),
                (LANDING, ..) => Some(Self::Landing),
                (LOCAL, ..) => Some(Self::Local),
                _ => None,
            };
        }
        let selects = selects || mark.is_some() || interface.is_some() || transport.is_some() || range.is_some();
        let is_local = message.header.table == LOCAL_TABLE && message.header.action == RuleAction::ToTable;
        (priority == 0 && is_local && !selects).then_some(Self::LocalFirst)
    }

    fn message(&self, family: Family) -> RuleMessage {
        use RuleAttribute as A;
        let (priority, action, table, own) = match self {
            Self::Bypass(interface) => (BYPASS, RuleAction::Goto, 0, vec![A::Iifname(interface.clone()), A::Goto(LANDING)]),
            Self::Mark(mark) => (MARKS, RuleAction::ToTable, TABLE, vec![A::FwMark(*mark), A::FwMask(u32::MAX)]),
            Self::Own => (OWN, RuleAction::Goto, 0, vec![A::Iifname(LOOPBACK.to_owned()), A::Goto(LANDING)]),
            Self::Ports(ports) => {
                let range = ports.range.map(|(start, end)| A::DestinationPortRange(RulePortRange { start, end }));
                let protocol = A::IpProtocol(IpProtocol::from(i32::from(ports.protocol.number())));
                (PORTS, RuleAction::ToTable, ports.table(), [protocol].into_iter().chain(range).collect())
            }
            Self::Landing => (LANDING, RuleAction::Nop, 0, vec![]),
            Self::Local => (LOCAL, RuleAction::ToTable, LOCAL_TABLE.into(), vec![]),
            Self::LocalFirst => (0, RuleAction::ToTable, LOCAL_TABLE.into(), vec![]),
        };
        let protocol = if *self == Self::LocalFirst { RouteProtocol::Kernel } else { PROTOCOL };
        let mut message = RuleMessage::default();
        message.header.family = if family == Family::Ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.action = action;
        message.attributes = own;
        message.attributes.extend([A::Priority(priority), A::Protocol(protocol)]);
        match u8::try_from(table) {
            Ok(table) => message.header.table = table,
            Err(_) => message.attributes.push(A::Table(table)),
        }
        message
    }
}

/// Makes a family's rules those for these marks and ports. At no time is there no rule for the local table.
async fn keep_rules(handle: &Handle, family: Family, marks: &[u32], ports: &[Ports]) -> anyhow::Result<()> {
    let version = if family == Family::Ipv4 { IpVersion::V4 } else { IpVersion::V6 };
    let messages: Vec<RuleMessage> = match handle.rule().get(version).execute().try_collect().await {
        Ok(messages) => messages,
        // A kernel without this family has no rules to take away.
        Err(error) if marks.is_empty() => {
            tracing::debug!(%error, ?family, "the routing rules cannot be listed");
            return Ok(());
        }
        Err(error) => return Err(error).context("the routing rules cannot be listed; the kernel needs CONFIG_IP_MULTIPLE_TABLES"),
    };
    let found: BTreeMap<Rule, &RuleMessage> =
        messages.iter().filter_map(|message| Rule::parse(message).map(|rule| (rule, message))).collect();
    let present: BTreeSet<Rule> = found.keys().cloned().collect();
    let wanted = wanted(&present, marks, ports);
    let add = |rule: Rule| async move {
        let mut request = handle.rule().add();
        *request.message_mut() = rule.message(family);
        match request.execute().await {
            Err(error) if !is(&error, libc::EEXIST) => {
                Err(error).with_context(|| format!("the routing rule {rule:?} cannot be added"))
            }
            _ => Ok(()),
        }
    };
    // Where packets are led last is made first.
    let added = [&Rule::LocalFirst, &Rule::Local, &Rule::Landing, &Rule::Own].into_iter().filter(|rule| wanted.contains(rule));
    let added = added.chain(wanted.iter()).filter(|rule| !present.contains(rule));
    for rule in added {
        add(rule.clone()).await?;
    }
    // As it was found: the kernel compares even who made it.
    for (rule, message) in found.into_iter().filter(|(rule, _)| !wanted.contains(rule)) {
        match handle.rule().del(message.clone()).execute().await {
            Err(error) if !is(&error, libc::ENOENT) => {
                return Err(error).with_context(|| format!("the routing rule {rule:?} cannot be removed"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// What the rules should be, of those that [`Rule::parse`] knows.
fn wanted(present: &BTreeSet<Rule>, marks: &[u32], ports: &[Ports]) -> BTreeSet<Rule> {
    // Somebody else may have moved the local table already: that is not ours to move back.
    let ours_to_move = present.contains(&Rule::Local) || present.contains(&Rule::LocalFirst);
    if marks.is_empty() {
        return BTreeSet::from_iter(ours_to_move.then_some(Rule::LocalFirst));
    }
    let bypasses = [ENTRANCE, EXIT].map(|name| Rule::Bypass(name.to_owned()));
    let marks = marks.iter().map(|mark| Rule::Mark(*mark));
    let own = (!ports.is_empty()).then_some(Rule::Own);
    let ports = ports.iter().map(|ports| Rule::Ports(*ports));
    let local = ours_to_move.then_some(Rule::Local);
    bypasses.into_iter().chain(marks).chain(own).chain(ports).chain([Rule::Landing]).chain(local).collect()
}

/// Whether this is that answer of the kernel.
pub fn is(error: &rtnetlink::Error, code: i32) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == -code)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HTTP: Ports = Ports { protocol: Protocol::Tcp, range: Some((80, 81)) };

    fn rules(rules: &[Rule]) -> BTreeSet<Rule> {
        rules.iter().cloned().collect()
    }

    #[test]
    fn the_local_table_moves_down_and_back() {
        let untouched = rules(&[Rule::LocalFirst]);
        let marked = wanted(&untouched, &[10], &[]);
        let bypass = |name: &str| Rule::Bypass(name.to_owned());
        assert_eq!(marked, rules(&[bypass(ENTRANCE), bypass(EXIT), Rule::Mark(10), Rule::Landing, Rule::Local]));
        assert_eq!(wanted(&marked, &[10], &[]), marked, "nothing is left to do");
        let led = wanted(&marked, &[10], &[HTTP]);
        assert_eq!(led.difference(&marked).cloned().collect::<Vec<_>>(), [Rule::Own, Rule::Ports(HTTP)]);
        assert_eq!(wanted(&led, &[10], &[]), marked);
        assert_eq!(wanted(&led, &[], &[]), untouched);
        assert_eq!(wanted(&rules(&[Rule::Local, Rule::LocalFirst]), &[], &[]), untouched, "half-way back");
    }

    #[test]
    fn a_local_table_that_somebody_else_moved_stays_there() {
        let elsewhere = rules(&[]);
        let marked = wanted(&elsewhere, &[10], &[]);
        assert!(!marked.contains(&Rule::Local) && !marked.contains(&Rule::LocalFirst));
        assert_eq!(wanted(&marked, &[], &[]), elsewhere);
    }

    #[test]
    fn our_rules_are_known_again() {
        let all_ports = Rule::Ports(Ports { protocol: Protocol::Sctp, range: None });
        let bypass = Rule::Bypass(EXIT.to_owned());
        let ports = Rule::Ports(HTTP);
        for rule in [bypass, Rule::Mark(u32::MAX), Rule::Own, ports, all_ports, Rule::Landing, Rule::Local, Rule::LocalFirst] {
            assert_eq!(Rule::parse(&rule.message(Family::Ipv6)), Some(rule));
        }
        let mut foreign = Rule::Mark(10).message(Family::Ipv4);
        foreign.attributes.retain(|attribute| !matches!(attribute, RuleAttribute::Protocol(_)));
        assert_eq!(Rule::parse(&foreign), None);
    }
}
