//! From words to a decided [`Action`]: reads what was typed, value by value, then checks it as a whole.
//!
//! The order is part of the interface, for it decides which of several faults is reported: values as they come, then
//! left-over words, then scheduler flags, then the table of combinations ([`super::options`]), then the rules below.
//! Everything that IPVS knows is accepted here; what this director cannot do is the director's to refuse.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    complaint::Complaint,
    listing::{Columns, Listing},
    names::Names,
    options::{self, CommandName, Given, Meaning, OptionName},
    reader::{Occurrence, Reader},
    values,
};
use crate::director::model::{
    Command, Family, Method, Persistence, Protocol, ServerConfig, ServerId, ServiceConfig, ServiceId, SyncDaemon, SyncRole,
    Timeouts, Tunnel, TunnelChecksum,
};

/// What a command line asks for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Action {
    /// Print the help.
    Help,
    /// Print the version.
    Version,
    /// Change the table.
    Change(Command),
    /// Print the table, or a part of it.
    List(List),
    /// Print the table as command lines.
    Save {
        /// Without looking names up.
        numeric: bool,
    },
    /// Read command lines.
    Restore,
}

/// What to list.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum List {
    /// All services, or one.
    Services {
        /// Which; nothing for all.
        service: Option<ServiceId>,
        /// How.
        listing: Listing,
        /// Without looking names up.
        numeric: bool,
    },
    /// The connections.
    Connections {
        /// With the columns of persistence engines.
        engines: bool,
        /// Without looking names up.
        numeric: bool,
    },
    /// The timeouts.
    Timeouts,
    /// The synchronisation daemons.
    SyncDaemons,
}

/// Seconds that the original lets a template live if `-p` says nothing else.
const DEFAULT_PERSISTENCE: u32 = 360;
/// The greatest weight and threshold.
const MAXIMUM: u32 = i32::MAX.cast_unsigned();
/// The longest timeout: 31 days.
const LONGEST_TIMEOUT: u32 = 31 * 86400;

/// Decides what the words ask for. `restoring` is true for a line of `ipvsadm -R`.
pub(super) fn parse(words: &[String], restoring: bool, names: &Names) -> Result<Action, Complaint> {
    if words.is_empty() {
        return Ok(Action::List(List::Services { service: None, listing: Listing::default(), numeric: false }));
    }
    let mut reader = Reader::new(words);
    let first = reader.next().ok_or(Complaint::Hint)?.map_err(|_| Complaint::Hint)?;
    let command = match first.switch.meaning {
        Meaning::Help => return Ok(Action::Help),
        Meaning::Version => return Ok(Action::Version),
        Meaning::Command(CommandName::Restore) if restoring => return Err(Complaint::Hint),
        Meaning::Command(command) => command,
        _ => return Err(Complaint::Hint),
    };
    let mut typed = Typed::default();
    match (first.argument, command) {
        (Some("master"), _) => typed.sync.role = SyncRole::Master,
        (Some("backup"), _) => typed.sync.role = SyncRole::Backup,
        (Some(_), CommandName::StartDaemon) => return Err(Complaint::usage("illegal start-daemon parameter specified")),
        (Some(_), CommandName::StopDaemon) => return Err(Complaint::usage("illegal start_daemon specified")),
        _ => {}
    }
    while let Some(occurrence) = reader.next() {
        let occurrence = occurrence?;
        match (occurrence.option, occurrence.switch.meaning) {
            (Some(definition), _) => {
                if !typed.given.insert(definition.option) {
                    return Err(Complaint::Usage(format!("multiple '{}' options specified", definition.name)));
                }
                typed.take(definition.option, &occurrence, names)?;
            }
            (None, Meaning::Ipv6) => typed.ipv6_mark()?,
            (None, Meaning::Nothing) => {}
            (None, _) => return Err(Complaint::Usage(format!("invalid option `{}'", reader.last_word()))),
        }
    }

    let plain = reader.into_plain();
    let (timeouts, plain) = if command == CommandName::Set {
        let Some((values, rest)) = plain.split_first_chunk::<3>() else {
            return Err(Complaint::usage("--set option requires 3 timeout values"));
        };
        let [tcp, tcp_fin, udp] = values.map(|value| timeout(value, 0));
        (Timeouts { tcp: tcp?, tcp_fin: tcp_fin?, udp: udp? }, rest)
    } else {
        (Timeouts::default(), plain.as_slice())
    };
    if let Some(word) = plain.first() {
        return Err(Complaint::Usage(format!("unexpected argument {word}")));
    }

    let flags = values::scheduler_flags(&typed.flags, typed.scheduler())?;
    options::check(typed.given, command)?;
    typed.decide(command, flags, timeouts)
}

/// What was typed, so far.
#[derive(Debug)]
struct Typed {
    given: Given,
    protocol: Option<Protocol>,
    address: IpAddr,
    port: u16,
    mark: Option<u32>,
    family: Family,
    scheduler: String,
    flags: String,
    engine: Option<String>,
    persistence: u32,
    mask: u32,
    server: ServerId,
    method: Method,
    weight: u32,
    upper_threshold: u32,
    lower_threshold: u32,
    tunnel_type: String,
    tunnel_port: u16,
    sync: SyncDaemon,
}

impl Default for Typed {
    fn default() -> Self {
        let address = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        Self {
            given: Given::default(),
            protocol: None,
            address,
            port: 0,
            mark: None,
            family: Family::Ipv4,
            scheduler: String::new(),
            flags: String::new(),
            engine: None,
            persistence: 0,
            mask: u32::MAX,
            server: ServerId { address, port: 0 },
            method: Method::Route,
            weight: 1,
            upper_threshold: 0,
            lower_threshold: 0,
            tunnel_type: "ipip".to_owned(),
            tunnel_port: 0,
            sync: SyncDaemon::new(SyncRole::Master, "eth0".to_owned()),
        }
    }
}

impl Typed {
    /// Takes the value of an option.
    fn take(&mut self, option: OptionName, occurrence: &Occurrence<'_>, names: &Names) -> Result<(), Complaint> {
        let value = occurrence.argument.unwrap_or_default();
        let limited = |range, complaint| values::number(value, range).ok_or_else(|| Complaint::usage(complaint));
        match option {
            OptionName::ServiceAddress => self.take_service(occurrence.switch.meaning, value, names)?,
            OptionName::Scheduler => values::cut(value, 15).clone_into(&mut self.scheduler),
            OptionName::Persistent => {
                self.persistence = match occurrence.argument {
                    Some(value) => timeout(value, 1)?,
                    None => DEFAULT_PERSISTENCE,
                }
            }
            OptionName::Netmask => self.mask = self.netmask(value, names)?,
            OptionName::RealServer => {
                // The names of ports are those of the service's protocol, so `-r` before `-t` knows none.
                let protocol = self.protocol.map(protocol_name).or(self.mark.map(|_| "tcp"));
                let (address, port) = values::endpoint(value, protocol, names)
                    .ok_or_else(|| Complaint::usage("illegal real server address[:port] specified"))?;
                self.server = ServerId { address, port: port.unwrap_or(self.port) };
            }
            OptionName::ForwardingMethod => {
                self.method = match occurrence.switch.meaning {
                    Meaning::Ipip => Method::Tunnel(Tunnel::Ipip),
                    Meaning::Masquerading => Method::Masquerade,
                    _ => Method::Route,
                }
            }
            OptionName::Weight => self.weight = limited(0..=MAXIMUM, "illegal weight specified")?,
            OptionName::UpperThreshold => {
                self.upper_threshold = limited(0..=MAXIMUM, "illegal u_threshold specified")?;
            }
            OptionName::LowerThreshold => {
                self.lower_threshold = limited(0..=MAXIMUM, "illegal l_threshold specified")?;
            }
            OptionName::Engine => self.engine = Some(values::cut(value, 16).to_owned()).filter(|engine| !engine.is_empty()),
            OptionName::SchedulerFlags => value.clone_into(&mut self.flags),
            OptionName::TunnelType => {
                if !options::is_tunnel_type(value) {
                    return Err(Complaint::usage("illegal tunnel type specified"));
                }
                value.clone_into(&mut self.tunnel_type);
            }
            OptionName::TunnelPort => self.tunnel_port = limited(1..=65535, "illegal tunnel port specified")? as u16,
            OptionName::SyncId => self.sync.sync_id = limited(0..=255, "illegal syncid specified")? as u8,
            OptionName::SyncMaxlen => self.sync.max_length = limited(1..=65507, "illegal sync-maxlen specified")? as u16,
            OptionName::McastPort => self.sync.port = limited(1..=65535, "illegal mcast-port specified")? as u16,
            OptionName::McastTtl => self.sync.ttl = limited(1..=255, "illegal mcast-ttl specified")? as u8,
            OptionName::McastGroup => self.sync.group = multicast_group(value)?,
            OptionName::McastInterface => values::cut(value, 15).clone_into(&mut self.sync.interface),
            OptionName::Numeric
            | OptionName::Connection
            | OptionName::Timeout
            | OptionName::Daemon
            | OptionName::Stats
            | OptionName::Rate
            | OptionName::Thresholds
            | OptionName::PersistentConn
            | OptionName::NoSort
            | OptionName::Exact
            | OptionName::OnePacket
            | OptionName::TunnelInfo
            | OptionName::TunnelNoChecksum
            | OptionName::TunnelChecksum
            | OptionName::TunnelRemoteChecksum
            | OptionName::FullNat
            | OptionName::Toa => {}
        }
        Ok(())
    }

    /// Takes `-t`, `-u`, `--sctp-service` or `-f`.
    fn take_service(&mut self, meaning: Meaning, value: &str, names: &Names) -> Result<(), Complaint> {
        let protocol = match meaning {
            Meaning::UdpService => Protocol::Udp,
            Meaning::SctpService => Protocol::Sctp,
            Meaning::MarkService => {
                let mark = values::number(value, 1..=u32::MAX);
                let invalid = || Complaint::Usage(format!("invalid fwmark value `{value}' specified"));
                self.mark = Some(mark.ok_or_else(invalid)?);
                return Ok(());
            }
            _ => Protocol::Tcp,
        };
        let (address, port) = values::endpoint(value, Some(protocol_name(protocol)), names)
            .ok_or_else(|| Complaint::usage("illegal virtual server address[:port] specified"))?;
        self.protocol = Some(protocol);
        self.address = address;
        self.port = port.unwrap_or(0);
        if address.is_ipv6() {
            self.make_ipv6();
        }
        Ok(())
    }

    /// Takes `-6`.
    fn ipv6_mark(&mut self) -> Result<(), Complaint> {
        if self.mark.is_none() {
            return Err(Complaint::usage("-6 used before -f\n"));
        }
        self.make_ipv6();
        Ok(())
    }

    /// The service is one of IPv6: a mask that was typed before is lost.
    const fn make_ipv6(&mut self) {
        self.family = Family::Ipv6;
        self.mask = 128;
    }

    fn netmask(&self, value: &str, names: &Names) -> Result<u32, Complaint> {
        match self.family {
            Family::Ipv4 => values::host(value, names)
                .map(u32::from)
                .ok_or_else(|| Complaint::usage("illegal virtual server persistent mask specified")),
            Family::Ipv6 => values::prefix_length(value).ok_or_else(|| Complaint::usage("illegal ipv6 netmask specified")),
        }
    }

    /// The scheduler, or the default.
    const fn scheduler(&self) -> &str {
        if self.scheduler.is_empty() { "wlc" } else { self.scheduler.as_str() }
    }

    /// The service that was named, if any.
    fn service(&self) -> Option<ServiceId> {
        match (self.mark, self.protocol) {
            (Some(mark), _) => Some(ServiceId::Mark { mark, family: self.family }),
            (None, Some(protocol)) => Some(ServiceId::Address { protocol, address: self.address, port: self.port }),
            (None, None) => None,
        }
    }

    /// The service that was named, for commands that cannot do without.
    fn required_service(&self) -> ServiceId {
        self.service().expect("the table of options requires a service for this command")
    }

    /// Applies the rules that no table can express, and decides.
    fn decide(self, command: CommandName, flags: u8, timeouts: Timeouts) -> Result<Action, Complaint> {
        Ok(Action::Change(match command {
            CommandName::AddService => {
                Command::AddService { service: self.required_service(), config: self.service_config(flags)? }
            }
            CommandName::EditService => {
                Command::EditService { service: self.required_service(), config: self.service_config(flags)? }
            }
            CommandName::DeleteService => Command::RemoveService { service: self.required_service() },
            CommandName::AddServer => {
                let (server, config) = self.server()?;
                Command::AddServer { service: self.required_service(), server, config }
            }
            CommandName::EditServer => {
                let (server, config) = self.server()?;
                Command::EditServer { service: self.required_service(), server, config }
            }
            CommandName::DeleteServer => Command::RemoveServer { service: self.required_service(), server: self.server },
            CommandName::Clear => Command::Clear,
            CommandName::Zero => {
                // To IPVS a service of all zeros is no service at all, and so means every service.
                let is_everything = self.mark.is_none() && self.address.is_unspecified() && self.port == 0;
                Command::Zero { service: self.service().filter(|_| !is_everything) }
            }
            CommandName::Set => Command::SetTimeouts(timeouts),
            CommandName::List => return self.list().map(Action::List),
            CommandName::Save => return Ok(Action::Save { numeric: self.given.has(OptionName::Numeric) }),
            CommandName::Restore => return Ok(Action::Restore),
            CommandName::StartDaemon => Command::StartSync(self.sync),
            CommandName::StopDaemon => Command::StopSync(self.sync.role),
        }))
    }

    /// The rules of `-A` and `-E`.
    fn service_config(&self, flags: u8) -> Result<ServiceConfig, Complaint> {
        let is_persistent = self.given.has(OptionName::Persistent);
        let one_packet = self.given.has(OptionName::OnePacket);
        if self.mark.is_none() && self.port == 0 && !is_persistent {
            return Err(Complaint::usage("Zero port specified for non-persistent service"));
        }
        if one_packet && self.mark.is_none() && self.protocol != Some(Protocol::Udp) {
            return Err(Complaint::usage("One-Packet Scheduling is only for UDP virtual services"));
        }
        Ok(ServiceConfig {
            scheduler: self.scheduler().to_owned(),
            flags,
            persistence: is_persistent.then_some(Persistence { timeout: self.persistence, mask: self.mask }),
            one_packet,
            engine: self.engine.clone(),
        })
    }

    /// The rules of `-a` and `-e`.
    fn server(&self) -> Result<(ServerId, ServerConfig), Complaint> {
        let mut server = self.server;
        let is_fullnat = self.given.has(OptionName::FullNat);
        if is_fullnat && self.given.has(OptionName::ForwardingMethod) && self.method != Method::Masquerade {
            return Err(Complaint::usage("FULLNAT conflicts with forward method"));
        }
        let toa = self.given.has(OptionName::Toa);
        if toa && !is_fullnat {
            return Err(Complaint::usage("TOA is for FULLNAT only"));
        }
        if self.mark.is_none() && self.method != Method::Masquerade && !is_fullnat {
            // Without address translation the packet keeps its port.
            server.port = self.port;
        }
        let is_tunnel = matches!(self.method, Method::Tunnel(_));
        if Family::of(server.address) != self.family && !is_tunnel && !is_fullnat {
            return Err(Complaint::usage("Different address family is allowed only for tunneling servers"));
        }
        let tunnel_options = [
            OptionName::TunnelType,
            OptionName::TunnelPort,
            OptionName::TunnelNoChecksum,
            OptionName::TunnelChecksum,
            OptionName::TunnelRemoteChecksum,
        ];
        if !is_tunnel && tunnel_options.into_iter().any(|option| self.given.has(option)) {
            return Err(Complaint::usage("Tunnel options conflict with forward method"));
        }
        options::check_tunnel(self.given, &self.tunnel_type)?;
        let config = ServerConfig {
            method: match self.method {
                _ if is_fullnat => Method::FullNat { toa },
                Method::Tunnel(_) => Method::Tunnel(self.tunnel()),
                method => method,
            },
            weight: self.weight,
            upper_threshold: self.upper_threshold,
            lower_threshold: self.lower_threshold,
        };
        Ok((server, config))
    }

    fn tunnel(&self) -> Tunnel {
        let checksum = if self.given.has(OptionName::TunnelChecksum) {
            TunnelChecksum::Full
        } else if self.given.has(OptionName::TunnelRemoteChecksum) {
            TunnelChecksum::Remote
        } else {
            TunnelChecksum::None
        };
        match self.tunnel_type.as_str() {
            "gue" => Tunnel::Gue { port: self.tunnel_port, checksum },
            "gre" => Tunnel::Gre { checksum },
            _ => Tunnel::Ipip,
        }
    }

    /// The rules of `-L`.
    fn list(&self) -> Result<List, Complaint> {
        let has = |option| self.given.has(option);
        let is_settings = has(OptionName::Timeout) || has(OptionName::Daemon);
        let has_counters = has(OptionName::Stats) || has(OptionName::Rate) || has(OptionName::Thresholds);
        let is_table = !has(OptionName::Connection) && !is_settings;
        if !is_table && has_counters || is_settings && has(OptionName::PersistentConn) {
            return Err(Complaint::usage("options conflicts in the list command"));
        }
        let numeric = has(OptionName::Numeric);
        Ok(if has(OptionName::Connection) {
            List::Connections { engines: has(OptionName::PersistentConn), numeric }
        } else if has(OptionName::Timeout) {
            List::Timeouts
        } else if has(OptionName::Daemon) {
            List::SyncDaemons
        } else {
            let choices = [
                (OptionName::Stats, Columns::Stats),
                (OptionName::Rate, Columns::Rate),
                (OptionName::Thresholds, Columns::Thresholds),
                (OptionName::PersistentConn, Columns::Persistent),
                (OptionName::TunnelInfo, Columns::Tunnel),
            ];
            let columns = choices.into_iter().find(|(option, _)| has(*option)).map_or(Columns::Plain, |(_, columns)| columns);
            let listing = Listing { columns, exact: has(OptionName::Exact), sorted: !has(OptionName::NoSort) };
            List::Services { service: self.service(), listing, numeric }
        })
    }
}

/// The protocol's name in /etc/services.
const fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// Reads a number of seconds.
fn timeout(value: &str, least: u32) -> Result<u32, Complaint> {
    let seconds = values::number(value, least..=LONGEST_TIMEOUT);
    seconds.ok_or_else(|| Complaint::Usage(format!("invalid timeout value `{value}' specified")))
}

/// Reads the value of `--mcast-group`.
fn multicast_group(value: &str) -> Result<IpAddr, Complaint> {
    let (family, group) = if value.contains(':') {
        ("IPv6", value.parse::<Ipv6Addr>().ok().map(IpAddr::from))
    } else {
        ("IPv4", value.parse::<Ipv4Addr>().ok().map(IpAddr::from))
    };
    let invalid = || Complaint::Usage(format!("invalid {family} mcast-group `{value}'"));
    group.filter(IpAddr::is_multicast).ok_or_else(invalid)
}
