//! What a director is told and what it answers: the vocabulary of the API, of the state file and of both command lines.
//!
//! All of it is plain data with serde names; nothing here decides anything.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use crate::synchronisation;

/// The transport protocol of a service.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Transmission control protocol.
    Tcp,
    /// User datagram protocol.
    Udp,
    /// Stream control transmission protocol.
    Sctp,
}

impl Protocol {
    /// Its IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The protocol with this number.
    pub fn of_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|protocol| protocol.number() == number)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// An address family.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl Family {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    /// The family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Ipv4,
            IpAddr::V6(_) => Self::Ipv6,
        }
    }

    /// The address of all zeros.
    pub const fn unspecified(self) -> IpAddr {
        match self {
            Self::Ipv4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Self::Ipv6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }
    }
}

/// What makes a virtual service the one that it is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ServiceId {
    /// Protocol, virtual address and port.
    Address {
        /// The protocol.
        protocol: Protocol,
        /// The virtual address (VIP).
        address: IpAddr,
        /// The virtual port; 0 for all ports (persistent services only).
        port: u16,
    },
    /// A firewall mark.
    Mark {
        /// The mark, never 0.
        mark: u32,
        /// The family of the marked packets.
        family: Family,
    },
}

/// The port of FTP's control connections.
const FTP: u16 = 21;

impl ServiceId {
    /// How bpfvs's own commands write it: `tcp://10.0.0.200:80`, `udp://[2001:db8::1]:53`, `mark:10`, `mark6:10`.
    pub fn name(&self) -> String {
        match self {
            Self::Address { protocol, address, port } => {
                format!("{}://{}", protocol.to_string().to_lowercase(), SocketAddr::new(*address, *port))
            }
            Self::Mark { mark, family: Family::Ipv4 } => format!("mark:{mark}"),
            Self::Mark { mark, family: Family::Ipv6 } => format!("mark6:{mark}"),
        }
    }

    /// The family of the service's packets.
    pub const fn family(&self) -> Family {
        match self {
            Self::Address { address, .. } => Family::of(*address),
            Self::Mark { family, .. } => *family,
        }
    }

    /// Its firewall mark; 0 if it has an address.
    pub const fn mark(&self) -> u32 {
        match self {
            Self::Address { .. } => 0,
            Self::Mark { mark, .. } => *mark,
        }
    }

    /// Whether persistence keeps a client with its real server whatever the port: where the service has more than one, and for
    /// FTP, whose data connections have other ports than its own.
    pub const fn spans_ports(&self) -> bool {
        matches!(self, Self::Address { port: 0, .. } | Self::Mark { .. }) || self.is_ftp()
    }

    /// Whether it is where FTP's control connections go.
    pub const fn is_ftp(&self) -> bool {
        matches!(self, Self::Address { protocol: Protocol::Tcp, port: FTP, .. })
    }

    /// Whether its connections are active from their first packet ([`crate::scheduler::Arrivals::active`]). The packets of a
    /// mark are taken for TCP, as most are.
    pub const fn arrives_active(&self) -> bool {
        matches!(self, Self::Address { protocol: Protocol::Tcp, .. } | Self::Mark { .. })
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { protocol, address: IpAddr::V4(address), port } => write!(formatter, "{protocol} {address}:{port}"),
            Self::Address { protocol, address: IpAddr::V6(address), port } => write!(formatter, "{protocol} [{address}]:{port}"),
            Self::Mark { mark, family: Family::Ipv4 } => write!(formatter, "FWM {mark}"),
            Self::Mark { mark, family: Family::Ipv6 } => write!(formatter, "FWM {mark} IPv6"),
        }
    }
}

/// Bits of [`ServiceConfig::flags`], as `ipvsadm -b` knows them.
pub mod service_flags {
    /// `flag-1`: `sh-fallback`, `mh-fallback`.
    pub const FLAG_1: u8 = 1;
    /// `flag-2`: `sh-port`, `mh-port`.
    pub const FLAG_2: u8 = 2;
    /// `flag-3`: no scheduler uses it.
    pub const FLAG_3: u8 = 4;
}

/// How a virtual service behaves.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ServiceConfig {
    /// Name of the scheduler; `none` if there is none.
    pub scheduler: String,
    /// Scheduler flags: bits of [`service_flags`].
    #[serde(default)]
    pub flags: u8,
    /// Persistence, if asked for.
    #[serde(default)]
    pub persistence: Option<Persistence>,
    /// One-packet scheduling.
    #[serde(default)]
    pub one_packet: bool,
    /// Name of the persistence engine.
    #[serde(default)]
    pub engine: Option<String>,
}

/// Persistence of a service.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Persistence {
    /// Seconds that a template lives.
    pub timeout: u32,
    /// The netmask for IPv4 (as a number in host order, `0xffff_ffff` for one client), the prefix length for IPv6.
    pub mask: u32,
}

/// What makes a real server the one that it is, within its service.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct ServerId {
    /// Its address (RIP).
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
}

impl fmt::Display for ServerId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            IpAddr::V4(address) => write!(formatter, "{address}:{}", self.port),
            IpAddr::V6(address) => write!(formatter, "[{address}]:{}", self.port),
        }
    }
}

/// A network: an address whose bits behind the prefix are zero. With the longest prefix it is one host.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Network {
    /// The address.
    pub address: IpAddr,
    /// The length of the prefix.
    pub prefix: u8,
}

impl Network {
    /// Its family.
    pub const fn family(&self) -> Family {
        Family::of(self.address)
    }

    /// The longest prefix of its family.
    pub const fn longest_prefix(&self) -> u8 {
        match self.address {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        }
    }

    /// Its address, if that is all that there is.
    pub const fn host(&self) -> Option<IpAddr> {
        if self.prefix == self.longest_prefix() { Some(self.address) } else { None }
    }

    /// Whether the prefix is no longer than the address, and nothing stands behind it.
    pub fn is_valid(&self) -> bool {
        let behind = self.longest_prefix().checked_sub(self.prefix);
        behind.is_some_and(|behind| match self.address {
            IpAddr::V4(address) => u64::from(address.to_bits()) & ((1 << behind) - 1) == 0,
            IpAddr::V6(address) => behind == 0 || address.to_bits() << (128 - u32::from(behind)) == 0,
        })
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is no address and no network; write 10.0.0.200 or 10.1.0.0/16");
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix.parse().map_err(|_| wrong())?)),
            None => (text, None),
        };
        let whole = Self { address: address.parse().map_err(|_| wrong())?, prefix: 0 };
        Ok(Self { prefix: prefix.unwrap_or_else(|| whole.longest_prefix()), ..whole })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host() {
            Some(address) => address.fmt(formatter),
            None => write!(formatter, "{}/{}", self.address, self.prefix),
        }
    }
}

/// A mark rule: bpfvs itself takes packets for marked, so that no firewall need do it.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct MarkRule {
    /// The mark, never 0.
    pub mark: u32,
    /// Where the packets go.
    pub destination: Network,
    /// Their protocol; nothing for TCP, UDP and SCTP.
    #[serde(default)]
    pub protocol: Option<Protocol>,
    /// The ports that they go to, each range with its first and its last; none for all.
    #[serde(default)]
    pub ports: Vec<(u16, u16)>,
}

impl MarkRule {
    /// The protocols that it is for.
    pub fn protocols(&self) -> impl Iterator<Item = Protocol> + use<> {
        let only = self.protocol;
        Protocol::ALL.into_iter().filter(move |protocol| only.is_none_or(|only| only == *protocol))
    }

    /// Its ports, one by one.
    pub fn each_port(&self) -> impl Iterator<Item = u16> + '_ {
        self.ports.iter().flat_map(|&(first, last)| first..=last)
    }
}

impl fmt::Display for MarkRule {
    /// `10.0.0.200 TCP 80,443 -> 10`
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} ", self.destination)?;
        match self.protocol {
            Some(protocol) => write!(formatter, "{protocol} ")?,
            None => formatter.write_str("any protocol ")?,
        }
        write!(formatter, "{} -> {}", port_list(&self.ports), self.mark)
    }
}

/// Ports as people write them: `80,443,10000-20000`; nothing listed means all.
pub fn port_list(ports: &[(u16, u16)]) -> String {
    if ports.is_empty() {
        return "all ports".to_owned();
    }
    let range = |&(first, last): &(u16, u16)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    ports.iter().map(range).collect::<Vec<_>>().join(",")
}

/// How packets reach a real server.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Direct routing (`-g`).
    Route,
    /// A tunnel (`-i`).
    Tunnel(Tunnel),
    /// Network address translation (`-m`).
    Masquerade,
    /// Translation of both addresses (`-m --fullnat`): the real server sees a local address of the director.
    #[serde(rename = "fullnat")]
    FullNat {
        /// Whether the real server is told who its TCP clients are, in a TCP option (`--toa`).
        #[serde(default)]
        toa: bool,
    },
}

/// The kind of a tunnel.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tunnel {
    /// IP in IP.
    Ipip,
    /// Generic UDP encapsulation.
    Gue {
        /// UDP port at the real server, never 0.
        port: u16,
        /// Outer checksum.
        checksum: TunnelChecksum,
    },
    /// Generic routing encapsulation.
    Gre {
        /// Outer checksum.
        checksum: TunnelChecksum,
    },
}

/// The outer checksum of a tunnel.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TunnelChecksum {
    /// None (`--tun-nocsum`).
    #[default]
    None,
    /// A full one (`--tun-csum`).
    Full,
    /// Remote checksum offload (`--tun-remcsum`).
    Remote,
}

/// How a real server is used.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ServerConfig {
    /// Forwarding method.
    pub method: Method,
    /// Weight; 0: no new connections. At most 2^31 - 1.
    pub weight: u32,
    /// Upper threshold of connections; 0 for none. At most 2^31 - 1.
    #[serde(default)]
    pub upper_threshold: u32,
    /// Lower threshold of connections; 0 for none.
    #[serde(default)]
    pub lower_threshold: u32,
}

/// Settable connection timeouts, in seconds. In a request, 0 keeps the old value.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Timeouts {
    /// Established TCP connections.
    pub tcp: u32,
    /// TCP connections after a FIN.
    pub tcp_fin: u32,
    /// UDP.
    pub udp: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { tcp: 900, tcp_fin: 120, udp: 300 }
    }
}

/// What a synchronisation daemon does.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SyncRole {
    /// Tells other directors what connections there are.
    Master,
    /// Listens to a master.
    Backup,
}

impl SyncRole {
    /// Both, the master first.
    pub const ALL: [Self; 2] = [Self::Master, Self::Backup];
}

impl fmt::Display for SyncRole {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Master => "master",
            Self::Backup => "backup",
        })
    }
}

/// A synchronisation daemon (`--start-daemon`).
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct SyncDaemon {
    /// What it does.
    pub role: SyncRole,
    /// The interface that messages leave or come by.
    pub interface: String,
    /// Which messages are heard: a backup with 0 hears all.
    #[serde(default)]
    pub sync_id: u8,
    /// The largest message, in bytes behind the UDP header; 0 for what suits the interface.
    #[serde(default)]
    pub max_length: u16,
    /// The multicast group.
    #[serde(default = "default_group")]
    pub group: IpAddr,
    /// The UDP port.
    #[serde(default = "default_port")]
    pub port: u16,
    /// How many routers messages may pass, and one: their time to live.
    #[serde(default = "default_ttl")]
    pub ttl: u8,
}

const fn default_group() -> IpAddr {
    synchronisation::GROUP
}

const fn default_port() -> u16 {
    synchronisation::PORT
}

const fn default_ttl() -> u8 {
    1
}

impl SyncDaemon {
    /// A daemon with IPVS's own group and port, that hears or says everything.
    pub const fn new(role: SyncRole, interface: String) -> Self {
        Self { role, interface, sync_id: 0, max_length: 0, group: default_group(), port: default_port(), ttl: default_ttl() }
    }
}

/// One change that a director is asked for. The API takes lists of them (`POST /v1/commands`), done in order, each on
/// its own: one that is refused changes nothing and does not stop the others.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Adds a virtual service (`-A`).
    AddService {
        /// Which.
        service: ServiceId,
        /// How.
        config: ServiceConfig,
    },
    /// Replaces everything about a virtual service but its servers (`-E`).
    EditService {
        /// Which.
        service: ServiceId,
        /// How.
        config: ServiceConfig,
    },
    /// Removes a virtual service and its servers (`-D`).
    RemoveService {
        /// Which.
        service: ServiceId,
    },
    /// Adds a real server (`-a`).
    AddServer {
        /// To which service.
        service: ServiceId,
        /// Which.
        server: ServerId,
        /// How.
        config: ServerConfig,
    },
    /// Replaces everything about a real server (`-e`).
    EditServer {
        /// Of which service.
        service: ServiceId,
        /// Which.
        server: ServerId,
        /// How.
        config: ServerConfig,
    },
    /// Removes a real server (`-d`).
    RemoveServer {
        /// Of which service.
        service: ServiceId,
        /// Which.
        server: ServerId,
    },
    /// Removes all services (`-C`).
    Clear,
    /// Sets the shown counters of a service, or of all, to zero (`-Z`).
    Zero {
        /// Which; nothing for all.
        service: Option<ServiceId>,
    },
    /// Deletes the templates of a persistent service, or of all. Connections stay.
    FlushTemplates {
        /// Which; nothing for all.
        service: Option<ServiceId>,
    },
    /// Sets timeouts (`--set`).
    SetTimeouts(Timeouts),
    /// Sets one of IPVS's sysctls.
    SetSysctl {
        /// Its name, with `net.ipv4.vs.` or without.
        name: String,
        /// Its value.
        value: u32,
    },
    /// Adds a mark rule.
    AddMarkRule(MarkRule),
    /// Removes a mark rule.
    RemoveMarkRule(MarkRule),
    /// Adds a local address for FULLNAT.
    AddLocalAddress {
        /// Which: an address of this host.
        address: IpAddr,
        /// For which service alone; nothing for all that have none of their own.
        #[serde(default)]
        service: Option<ServiceId>,
    },
    /// Removes a local address. New connections do not use it any more; those that exist keep it.
    RemoveLocalAddress {
        /// Which.
        address: IpAddr,
        /// Of which service alone; nothing for that of all.
        #[serde(default)]
        service: Option<ServiceId>,
    },
    /// Starts a synchronisation daemon (`--start-daemon`).
    StartSync(SyncDaemon),
    /// Stops the synchronisation daemon with this role (`--stop-daemon`).
    StopSync(SyncRole),
}

impl Command {
    /// Whether it is about synchronisation, and not about services.
    pub const fn is_sync(&self) -> bool {
        matches!(self, Self::StartSync(_) | Self::StopSync(_))
    }
}

/// Why a director refused a command.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// The kernel did not do what the director asked of it. The message has its words.
    Failed,
    /// A real server's address is not unicast, or cannot be combined with the service. IPVS: EINVAL.
    Invalid,
    /// The local address exists.
    LocalAddressExists,
    /// A FULLNAT server would have no local address.
    NoLocalAddress,
    /// There is no such network device. IPVS: ENODEV.
    NoSuchDevice,
    /// There is no such local address.
    NoSuchLocalAddress,
    /// There is no such real server. IPVS: ENOENT.
    NoSuchServer,
    /// There is no such mark rule.
    NoSuchRule,
    /// IPVS has no such sysctl.
    NoSuchSysctl,
    /// There is no such service. IPVS: ESRCH.
    NoSuchService,
    /// No synchronisation daemon has this role. IPVS: ESRCH.
    NoSuchSync,
    /// A number is out of its range. IPVS: ERANGE.
    OutOfRange,
    /// There is no room left in a table of the kernel. IPVS: ENOMEM.
    NoRoom,
    /// The mark rule exists.
    RuleExists,
    /// No scheduler or persistence engine of this name exists. IPVS: ENOENT.
    SchedulerNotFound,
    /// The real server exists. IPVS: EEXIST.
    ServerExists,
    /// The service exists. IPVS: EEXIST.
    ServiceExists,
    /// A synchronisation daemon has this role already. IPVS: EEXIST.
    SyncExists,
    /// IPVS can do it, this version of bpfvs cannot. The message says what.
    Unsupported,
}

/// A refused command.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Why, for programs.
    pub kind: RefusalKind,
    /// What, why, and what to do, for people.
    pub message: String,
}

/// Answer to one command of a list: `"ok"` or `{"refused": {...}}`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Done.
    Ok,
    /// Not done.
    Refused(Refusal),
}

/// Traffic counters. Bytes count from the IP header.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Totals {
    /// Connections scheduled.
    pub connections: u64,
    /// Packets from clients.
    pub packets_in: u64,
    /// Packets to clients that passed the director.
    pub packets_out: u64,
    /// Bytes from clients.
    pub bytes_in: u64,
    /// Bytes to clients that passed the director.
    pub bytes_out: u64,
}

/// Counters and their rates per second (IPVS's estimator: a moving average over ticks of two seconds).
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Traffic {
    /// Since the start or the last zeroing.
    pub totals: Totals,
    /// Per second.
    pub rates: Totals,
}

/// One of IPVS's sysctls, as listed.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct SysctlView {
    /// Its name, without `net.ipv4.vs.`.
    pub name: String,
    /// Its value; nothing if it cannot be set here.
    pub value: Option<u32>,
    /// What it is if nobody sets it; nothing if it cannot be set here.
    pub default: Option<u32>,
    /// What it does here, or why it does nothing.
    pub text: String,
}

/// A real server, as listed.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ServerView {
    /// Which.
    #[serde(flatten)]
    pub id: ServerId,
    /// How.
    #[serde(flatten)]
    pub config: ServerConfig,
    /// Active connections.
    pub active: u32,
    /// Other connections.
    pub inactive: u32,
    /// Persistence templates.
    pub persistent: u32,
    /// Traffic.
    pub traffic: Traffic,
    /// Whether packets can be sent there, in words: `ready`, `unresolved`, `no route`, `local`.
    pub reachability: String,
    /// Its index in the datapath's server array.
    pub index: u32,
}

/// A virtual service, as listed; its real servers in IPVS's order, the newest first.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ServiceView {
    /// Which.
    pub id: ServiceId,
    /// How.
    #[serde(flatten)]
    pub config: ServiceConfig,
    /// Traffic.
    pub traffic: Traffic,
    /// The real servers.
    pub servers: Vec<ServerView>,
}

/// A connection or a template, as listed.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ConnectionView {
    /// `TCP`, `UDP`, `SCTP`; `IP` for the template of a mark.
    pub protocol: String,
    /// Seconds until it expires.
    pub expires: u32,
    /// State, as IPVS names it.
    pub state: String,
    /// The client's address.
    pub client: IpAddr,
    /// The client's port.
    pub client_port: u16,
    /// The virtual address.
    pub vip: IpAddr,
    /// The virtual port.
    pub vip_port: u16,
    /// The real server's address.
    pub server: IpAddr,
    /// The real server's port.
    pub server_port: u16,
    /// Whether it counts as active.
    pub active: bool,
    /// Whether it is no connection, but the template of a persistent service. Its client is a network, and a port of 0
    /// stands for all. That of a mark has the mark as its virtual address.
    #[serde(default)]
    pub template: bool,
    /// What a persistence engine found, for the templates that one made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineData>,
}

/// What a persistence engine tells connections apart by.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct EngineData {
    /// The engine's name.
    pub name: String,
    /// What it found in the packet, as text.
    pub data: String,
}

/// FULLNAT's local addresses, as listed.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct LocalAddresses {
    /// The addresses, those of all services first.
    pub addresses: Vec<LocalAddressView>,
    /// Packets that would have begun a connection, but found no free port.
    pub refused: u64,
}

/// A local address.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct LocalAddressView {
    /// Which.
    pub address: IpAddr,
    /// The service that has it alone; nothing for all that have none of their own.
    pub service: Option<ServiceId>,
    /// Whether it is an address of this host, so that replies come here.
    pub here: bool,
    /// Connections from it.
    #[serde(flatten)]
    pub usage: LocalUsage,
}

/// How much of a local address is in use.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct LocalUsage {
    /// Ports in use, over all real servers.
    pub used: u64,
    /// Ports that are left towards the real server that has the fewest: each has all ports to itself.
    pub free: u32,
}

impl Default for LocalUsage {
    fn default() -> Self {
        Self { used: 0, free: lb_common::local::PORTS }
    }
}

/// One reason counter.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ReasonView {
    /// Its short name.
    pub name: String,
    /// What became of the packets: `passed`, `dropped`, `answered`.
    pub fate: String,
    /// What it means.
    pub text: String,
    /// Packets.
    pub packets: u64,
}

/// Where packets are met.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Hook {
    /// XDP in the driver of a network card, tc on virtual devices.
    #[default]
    Auto,
    /// tc alone.
    Tc,
    /// XDP, and tc for what XDP leaves to it.
    Xdp,
}

/// When the tables of connections take the memory for their entries.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TableMemory {
    /// All at once, when they are made: a new connection costs no allocation, and never fails for want of memory.
    #[default]
    AtStart,
    /// With each connection, and give it back after it: what is not used costs nothing, a new connection more.
    OnDemand,
}

impl fmt::Display for TableMemory {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::AtStart => "at the start",
            Self::OnDemand => "on demand",
        })
    }
}

/// An interface that the datapath is attached to.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct InterfaceView {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// `xdp`, `xdp-generic`, or nothing.
    pub xdp: Option<String>,
    /// Whether tc is attached.
    pub tc: bool,
}

/// A synchronisation daemon, as listed.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct SyncDaemonView {
    /// Which, and how.
    #[serde(flatten)]
    pub daemon: SyncDaemon,
    /// What keeps it from its work, if anything does.
    #[serde(default)]
    pub obstacle: Option<String>,
    /// Messages sent or received.
    pub messages: u64,
    /// Connections and templates in them that others were told of, or that were taken over.
    pub entries: u64,
    /// What was left out or not taken over, by reason: messages if they could not be understood or sent, else entries.
    pub refused: BTreeMap<String, u64>,
}

/// How flood mode is: [`lb_common::flood`].
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct FloodView {
    /// Whether it is on.
    pub on: bool,
    /// Connections that have shown no more than their beginning.
    pub half_open: u64,
    /// With so many of them the mode begins.
    pub limit: u32,
}

/// How the daemon is.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Status {
    /// Version of bpfvs.
    pub version: String,
    /// The daemon's process.
    pub pid: u32,
    /// Name of the instance: `main`, or `netns-<inode>`.
    pub instance: String,
    /// Where maps, programs and links are pinned.
    pub pins: String,
    /// Seconds since the daemon started.
    pub uptime: u64,
    /// Attached interfaces.
    pub interfaces: Vec<InterfaceView>,
    /// How packets that iptables or nft mark reach their services: `not needed`, `at work`, or what keeps them from it.
    #[serde(default)]
    pub mark_device: String,
    /// Number of virtual services.
    pub services: usize,
    /// Number of real servers.
    pub servers: usize,
    /// Connections in the tables.
    pub connections: u64,
    /// Capacity of each connection table.
    pub max_connections: u32,
    /// When these take the memory for their entries.
    #[serde(default)]
    pub memory: TableMemory,
    /// Flood mode.
    #[serde(default)]
    pub flood: FloodView,
    /// How long a CPU was busy with the last walk through the tables that deletes what is over.
    #[serde(default)]
    pub sweep_milliseconds: u64,
    /// Ticks of the kernel's clock in a second (`CONFIG_HZ`).
    #[serde(default)]
    pub clock_rate: u32,
    /// The synchronisation daemons.
    #[serde(default)]
    pub sync_daemons: Vec<SyncDaemonView>,
}
