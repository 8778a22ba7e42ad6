//! IPVS's sysctls (`net.ipv4.vs.*`): the ones that bpfvs honours, and what became of the others.
//!
//! ```text
//! name ──► Knob ──► a place in Values ──► Config, which the packet path reads
//!              └──► no place: a sentence that says why
//! ```
//!
//! One table, [`KNOBS`], has all of them. To honour another one takes a member of [`Values`], a place in the table, and whoever
//! reads it. Values are IPVS's, and so are the defaults.

use lb_common::config::{Config, flags};
use serde::{Deserialize, Serialize};

use super::{
    model::{Refusal, RefusalKind, SysctlView},
    rules::refuse,
};

/// What all names begin with, in the kernel; it may be left out.
pub const PREFIX: &str = "net.ipv4.vs.";

/// The values of those that are honoured.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Values {
    conn_reuse_mode: u32,
    drop_entry: u32,
    expire_nodest_conn: u32,
    expire_quiescent_template: u32,
    lblc_expiration: u32,
    lblcr_expiration: u32,
    secure_tcp: u32,
    sloppy_sctp: u32,
    sloppy_tcp: u32,
}

impl Default for Values {
    fn default() -> Self {
        Self {
            conn_reuse_mode: 1,
            drop_entry: 1,
            expire_nodest_conn: 0,
            expire_quiescent_template: 0,
            lblc_expiration: 24 * 60 * 60,
            lblcr_expiration: 24 * 60 * 60,
            secure_tcp: 1,
            sloppy_sctp: 0,
            sloppy_tcp: 0,
        }
    }
}

/// A sysctl of IPVS.
struct Knob {
    name: &'static str,
    /// Where its value is and the largest that it may have; nothing if it is not honoured.
    place: Option<(Place, u32)>,
    /// What it does here, or why it does nothing.
    text: &'static str,
}

type Place = fn(&mut Values) -> &mut u32;

/// The longest time in seconds: IPVS counts it in ticks of up to a thousandth of a second, and keeps 31 bits.
const LONGEST: u32 = i32::MAX as u32 / 1000;

const fn honoured(name: &'static str, place: Place, most: u32, text: &'static str) -> Knob {
    Knob { name, place: Some((place, most)), text }
}

const fn without_meaning(name: &'static str, text: &'static str) -> Knob {
    Knob { name, place: None, text }
}

/// When IPVS's automatic defence begins.
const MEMORY: &str = "no meaning: the tables have a fixed size, so that there is no memory to run out of; flood mode begins with so many \
                      half-open connections as `bpfvs serve --max-half-open` says";
/// What IPVS drops.
const DROPPING: &str =
    "no meaning: in flood mode no new connection is dropped, they are balanced without an entry; secure_tcp says when";
/// The largest value of the defence's switches; 1 and 2 are one mode, which IPVS itself changes from one to the other.
const ALWAYS: u32 = 3;
/// Of the estimators in the kernel.
const ESTIMATION: &str = "no meaning: the daemon makes the rates, two seconds apart; the packet path has no part in it";
/// Of the synchronisation of connections.
const SYNCHRONISATION: &str = "no meaning: synchronisation has no settings but the options of `ipvsadm --start-daemon`";

/// All of them, by their names.
const KNOBS: &[Knob] = &[
    without_meaning("am_droprate", DROPPING),
    without_meaning("amemthresh", MEMORY),
    without_meaning("backup_only", "always 0: a director that is a backup balances what comes to it"),
    without_meaning(
        "cache_bypass",
        "not yet: packets of a firewall mark that no real server takes are refused, and do not go on to where they were sent",
    ),
    honoured(
        "conn_reuse_mode",
        |values| &mut values.conn_reuse_mode,
        3,
        "a SYN on a connection that has ended: 0 it goes where the old one went, 1 it is scheduled anew; 2, 3 also after a FIN, if \
         replies do not pass here",
    ),
    without_meaning("conntrack", "no meaning: what is balanced never meets netfilter's connection tracking"),
    honoured(
        "drop_entry",
        |values| &mut values.drop_entry,
        ALWAYS,
        "how long half-open connections live: 0 as long as ever, 1 and 2 five seconds in flood mode, 3 five seconds always; none that \
         is established is ever dropped",
    ),
    without_meaning("drop_packet", DROPPING),
    without_meaning("est_cpulist", ESTIMATION),
    without_meaning("est_nice", ESTIMATION),
    honoured(
        "expire_nodest_conn",
        |values| &mut values.expire_nodest_conn,
        1,
        "1: the connections and templates of a removed real server go at once, and a SYN on a connection to one of weight 0 is \
         scheduled anew; 0: packets to a removed one are dropped until their connections end",
    ),
    honoured(
        "expire_quiescent_template",
        |values| &mut values.expire_quiescent_template,
        1,
        "1: persistent clients leave a real server of weight 0 with their next connection; 0: they stay",
    ),
    without_meaning("ignore_tunneled", "always 0: a packet that comes out of a tunnel of this host is balanced as any other"),
    honoured(
        "lblc_expiration",
        |values| &mut values.lblc_expiration,
        LONGEST,
        "seconds until lblc forgets a destination that nobody asks for",
    ),
    honoured(
        "lblcr_expiration",
        |values| &mut values.lblcr_expiration,
        LONGEST,
        "the same for lblcr; also seconds until a set of real servers that does not change loses one",
    ),
    without_meaning(
        "nat_icmp_send",
        "always 0: what a masqueraded real server sends, and belongs to no connection, is the kernel's to forward",
    ),
    without_meaning(
        "pmtu_disc",
        "always 1: a packet that is too big for a tunnel is answered by ICMP, so that smaller ones are sent",
    ),
    without_meaning("run_estimation", ESTIMATION),
    without_meaning("schedule_icmp", "always 0: an ICMP error never begins a connection"),
    honoured(
        "secure_tcp",
        |values| &mut values.secure_tcp,
        ALWAYS,
        "flood mode, in which what begins a connection makes no entry: 0 never, 1 and 2 with too many half-open connections or a full \
         table, 3 always",
    ),
    honoured(
        "sloppy_sctp",
        |values| &mut values.sloppy_sctp,
        1,
        "1: any SCTP packet but an ABORT begins a connection if there is none; 0: an INIT alone does",
    ),
    honoured(
        "sloppy_tcp",
        |values| &mut values.sloppy_tcp,
        1,
        "1: any TCP packet but a RST begins a connection if there is none, as after a change of directors; 0: a SYN alone does",
    ),
    without_meaning(
        "snat_reroute",
        "always 1: replies of masqueraded real servers take the way to the client that the routing table has now",
    ),
    without_meaning("sync_persist_mode", SYNCHRONISATION),
    without_meaning("sync_ports", SYNCHRONISATION),
    without_meaning("sync_qlen_max", SYNCHRONISATION),
    without_meaning("sync_refresh_period", SYNCHRONISATION),
    without_meaning("sync_retries", SYNCHRONISATION),
    without_meaning("sync_sock_size", SYNCHRONISATION),
    without_meaning("sync_threshold", SYNCHRONISATION),
    without_meaning("sync_version", SYNCHRONISATION),
];

impl Values {
    /// These values with another one.
    pub fn with(&self, name: &str, value: u32) -> Result<Self, Refusal> {
        let short = name.strip_prefix(PREFIX).unwrap_or(name);
        let Some(knob) = KNOBS.iter().find(|knob| knob.name == short) else {
            let message = format!("{name} cannot be set: IPVS has no sysctl of this name; `bpfvs sysctl` lists them");
            return refuse(RefusalKind::NoSuchSysctl, message);
        };
        let Some((place, most)) = knob.place else {
            let message = format!("{PREFIX}{short} cannot be set ({}); leave it out", knob.text);
            return refuse(RefusalKind::Unsupported, message);
        };
        if value > most {
            let message = format!("{PREFIX}{short} cannot be {value}: it takes numbers from 0 to {most} ({})", knob.text);
            return refuse(RefusalKind::OutOfRange, message);
        }
        let mut changed = *self;
        *place(&mut changed) = value;
        Ok(changed)
    }

    /// Puts them where the packet path looks.
    pub fn write_to(&self, config: &mut Config) {
        let switches = [
            (self.sloppy_tcp, flags::SLOPPY_TCP),
            (self.sloppy_sctp, flags::SLOPPY_SCTP),
            (self.expire_nodest_conn, flags::EXPIRE_NODEST),
            (self.expire_quiescent_template, flags::EXPIRE_QUIESCENT),
        ];
        let defences = [
            (self.secure_tcp == 0, flags::FLOOD_NEVER),
            (self.secure_tcp == ALWAYS, flags::FLOOD_ALWAYS),
            (self.drop_entry == 0, flags::HURRY_NEVER),
            (self.drop_entry == ALWAYS, flags::HURRY_ALWAYS),
        ];
        for (on, flag) in switches.map(|(value, flag)| (value != 0, flag)).into_iter().chain(defences) {
            config.flags = if on { config.flags | flag } else { config.flags & !flag };
        }
        config.connection_reuse = self.conn_reuse_mode;
        config.lblc_expiration = self.lblc_expiration;
        config.lblcr_expiration = self.lblcr_expiration;
    }

    /// Whether connections go with their real server.
    pub const fn forsakes_connections(&self) -> bool {
        self.expire_nodest_conn != 0
    }

    /// All sysctls, by their names.
    pub fn list(&self) -> Vec<SysctlView> {
        let (mut now, mut default) = (*self, Self::default());
        let view = |knob: &Knob| SysctlView {
            name: knob.name.to_owned(),
            value: knob.place.map(|(place, _)| *place(&mut now)),
            default: knob.place.map(|(place, _)| *place(&mut default)),
            text: knob.text.to_owned(),
        };
        KNOBS.iter().map(view).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_those_of_the_packet_path() {
        let mut config = Config { flags: flags::FLOOD_NEVER, connection_reuse: 7, ..Config::DEFAULT };
        Values::default().write_to(&mut config);
        assert_eq!(config, Config::DEFAULT);
    }

    #[test]
    fn each_has_a_place_of_its_own() {
        let mut seen = Vec::new();
        for Knob { name, place, .. } in KNOBS {
            let Some((place, most)) = place else { continue };
            let value = if *place(&mut Values::default()) == *most { 0 } else { *most };
            let values = Values::default().with(name, value).expect("it is in range");
            let mut config = Config::DEFAULT;
            values.write_to(&mut config);
            assert!(config != Config::DEFAULT && !seen.contains(&config), "{name}");
            seen.push(config);
            assert_eq!(values.list().iter().filter(|view| view.value != view.default).count(), 1, "{name}");
            let refusal = values.with(&format!("{PREFIX}{name}"), most + 1).expect_err("it is out of range");
            assert_eq!(refusal.kind, RefusalKind::OutOfRange);
        }
        assert_eq!(seen.len(), 9);
        assert!(KNOBS.is_sorted_by_key(|knob| knob.name));
    }

    #[test]
    fn what_cannot_be_set_says_why() {
        for (name, kind, part) in [
            ("sloppy", RefusalKind::NoSuchSysctl, "`bpfvs sysctl`"),
            ("net.ipv4.ip_forward", RefusalKind::NoSuchSysctl, "net.ipv4.ip_forward"),
            ("net.ipv4.vs.conntrack", RefusalKind::Unsupported, "netfilter"),
            ("drop_packet", RefusalKind::Unsupported, "secure_tcp"),
        ] {
            let refusal = Values::default().with(name, 1).expect_err("it cannot be set");
            assert_eq!(refusal.kind, kind, "{name}");
            assert!(refusal.message.contains(part), "{refusal}");
        }
    }
}
