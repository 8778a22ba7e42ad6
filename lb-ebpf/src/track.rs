//! Which connection does the packet belong to, and what does it do to it?
//!
//! The common packet finds its connection by one look-up. The rest is cold: a packet that begins a connection
//! ([`begin`]), a connection that was left alone for a second or meets a new SYN ([`revisit`]), parts of fragmented packets,
//! ICMP errors. IPVS's rules: `ipvs-semantics.md`, sections 2.2 to 2.10.

use aya_ebpf::{cty::c_void, helpers::generated::bpf_jiffies64};
use lb_common::{
    config::{Config, flags as settings},
    connection::{Connection, ConnectionKey, FragmentKey, flags},
    packet::{
        Fragment, IpHeader, Payload,
        icmp::IcmpHeader,
        protocol,
        transport::{self, Ports},
    },
    reason::Reason,
    sctp,
    server::Counters,
    service::ServiceKey,
    tcp::{self, Direction},
};
use lb_ebpf::packet::Packet;

use crate::{
    account, atomic,
    maps::{CONFIG, COUNTERS, Family, HZ},
    pick,
};

/// Source port of active FTP's data connections, which IPVS never schedules.
const FTP_DATA: u16 = 20;
const EEXIST: i32 = -17;

/// What is known of a packet's connection.
pub struct Tracked {
    /// Index of the real server.
    pub server: u32,
    /// The connection whose state the packet moves on, if it does.
    connection: Option<*mut Connection>,
    protocol: u8,
    event: u8,
    quiet: bool,
}

impl Tracked {
    #[inline(always)]
    const fn stateless(server: u32) -> Self {
        Self { server, connection: None, protocol: 0, event: 0, quiet: true }
    }
}

/// Kernel clock ticks, the low 32 bits: comparisons are by wrapping difference.
#[inline(always)]
fn jiffies() -> u32 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_jiffies64() as u32 }
}

/// Finds or makes the packet's connection.
#[inline(always)]
pub fn track<P: Packet, F: Family>(packet: &P, header: &IpHeader<F::Address>, payload: &Payload) -> Result<Tracked, Reason> {
    if payload.fragment == Fragment::Later {
        let protocol = u32::from(payload.protocol);
        let server = later_fragment::<P, F>(packet.context(), header.offset as u32, payload.fragment_id, protocol);
        return u32::try_from(server).map(Tracked::stateless).map_err(|_| Reason::FragmentUnknown);
    }
    if payload.protocol == F::ICMP {
        return icmp_error::<P, F>(packet.context(), payload.offset as u32).map(Tracked::stateless);
    }
    let segment = transport::parse(packet, payload, header.offset + header.length)?;
    let quiet = segment.is_quiet(payload.protocol);
    let key = ConnectionKey {
        client: header.source,
        vip: header.destination,
        ports: segment.ports,
        protocol: u32::from(payload.protocol),
    };
    let mut connection = F::connections().get_ptr_mut(&key);
    if let Some(known) = connection {
        let now = jiffies();
        // SAFETY: an element of the map; it may become another connection's under our hands, but it stays memory.
        let idle = now.wrapping_sub(unsafe { (*known).last_seen });
        if idle >= HZ.load() || !quiet {
            if revisit::<F>(&key, known, idle, segment.event) {
                // SAFETY: as above.
                unsafe { (*known).last_seen = now };
            } else {
                connection = None;
            }
        }
    }
    let server = match connection {
        // SAFETY: as above.
        Some(known) => unsafe { (*known).server },
        None => begin::<F>(&key, segment.event)?,
    };
    if payload.fragment == Fragment::First {
        first_fragment::<P, F>(packet.context(), header.offset as u32, payload.fragment_id, u32::from(payload.protocol), server);
    }
    Ok(Tracked { server, connection, protocol: payload.protocol, event: segment.event, quiet })
}

/// Moves the connection's state on. An established connection that hears nothing new stays as it is.
#[inline(always)]
pub fn advance(tracked: &Tracked) {
    const ESTABLISHED: u8 = tcp::State::Established as u8;
    let Some(connection) = tracked.connection else { return };
    // SAFETY: an element of the map, as in `track`.
    let settled = tracked.quiet && (tracked.protocol == protocol::UDP || unsafe { (*connection).state } == ESTABLISHED);
    if !settled {
        move_on(connection, tracked.protocol, tracked.event, tracked.server);
    }
}

/// Writes a new state, if there is one, and moves the connection between the active and the inactive ones.
#[inline(never)]
fn move_on(connection: *mut Connection, protocol: u8, event: u8, server: u32) {
    // SAFETY: an element of the map, as in `track`; of the counter array, if there.
    unsafe {
        let next = next_state(protocol, (*connection).state, event);
        if next == (*connection).state {
            return;
        }
        let active = is_active(protocol, next);
        let was_active = (*connection).flags & flags::ACTIVE != 0;
        (*connection).state = next;
        (*connection).last_seen = jiffies();
        if active != was_active {
            (*connection).flags ^= flags::ACTIVE;
            if let Some(counter) = COUNTERS.get_ptr_mut(server) {
                atomic::add(counter, if active { Counters::ACTIVE } else { Counters::ACTIVE.wrapping_neg() });
            }
        }
    }
}

/// The state after an event. Real servers answer their clients directly: only the client's half is ever seen.
#[inline(always)]
fn next_state(protocol: u8, state: u8, event: u8) -> u8 {
    match protocol {
        protocol::TCP => tcp::next(false, Direction::InputOnly, state, event),
        protocol::SCTP => sctp::next(Direction::InputOnly, state, event),
        _ => state,
    }
}

#[inline(always)]
fn is_active(protocol: u8, state: u8) -> bool {
    match protocol {
        protocol::TCP => tcp::is_active(state),
        protocol::SCTP => sctp::is_active(state),
        _ => false,
    }
}

/// Whether a packet asks for a new connection even if there is one.
#[inline(always)]
fn starts(protocol: u8, event: u8) -> bool {
    match protocol {
        protocol::TCP => event & tcp::flags::SYN != 0,
        protocol::SCTP => event == sctp::chunk::INIT,
        _ => false,
    }
}

/// Looks again at a connection that was idle for a second or more, or that meets the start of a new one. `false`: it is
/// over and gone.
#[inline(never)]
fn revisit<F: Family>(key: &ConnectionKey<F::Address>, connection: *mut Connection, idle: u32, event: u8) -> bool {
    let Some(config) = CONFIG.get(0) else { return true };
    // SAFETY: an element of the map, as in `track`.
    let known = unsafe { *connection };
    let protocol = key.protocol as u8;
    let over = idle >= lifetime(config, protocol, known.state)
        || (starts(protocol, event) && is_reusable(config.connection_reuse, protocol, &known));
    if over && F::connections().remove(key).is_ok() {
        forget(&known);
    }
    !over
}

/// IPVS's `conn_reuse_mode`: whether the start of a new connection may take the place of this one.
#[inline(always)]
fn is_reusable(mode: u32, protocol: u8, known: &Connection) -> bool {
    const CLOSE: u8 = tcp::State::Close as u8;
    const FIN_WAIT: u8 = tcp::State::FinWait as u8;
    const TIME_WAIT: u8 = tcp::State::TimeWait as u8;
    match (protocol, known.state) {
        (protocol::TCP, TIME_WAIT | CLOSE) => mode != 0,
        (protocol::TCP, FIN_WAIT) => mode & 2 != 0 && known.flags & flags::NO_OUTPUT != 0,
        (protocol::SCTP, state) => mode != 0 && state == sctp::State::Closed as u8,
        _ => false,
    }
}

/// Ticks that a connection in this state lives without a packet.
#[inline(always)]
pub fn lifetime(config: &Config, protocol: u8, state: u8) -> u32 {
    let state = (state & 0xf) as usize;
    let seconds = match protocol {
        protocol::TCP => config.tcp_timeouts[state],
        protocol::SCTP => config.sctp_timeouts[state],
        _ => config.udp_timeout,
    };
    seconds.wrapping_mul(HZ.load())
}

/// Takes a deleted connection out of its real server's counters.
#[inline(always)]
pub fn forget(connection: &Connection) {
    let mut share = Counters::TOTAL;
    if connection.flags & flags::ACTIVE != 0 {
        share += Counters::ACTIVE;
    }
    if let Some(counter) = COUNTERS.get_ptr_mut(connection.server) {
        // SAFETY: an element of the counter array.
        unsafe { atomic::add(counter, share.wrapping_neg()) };
    }
}

/// Begins a connection: finds the service, picks a real server, makes the entry. Returns the server's index.
#[inline(never)]
fn begin<F: Family>(key: &ConnectionKey<F::Address>, event: u8) -> Result<u32, Reason> {
    let protocol = key.protocol as u8;
    let service_key = ServiceKey { vip: key.vip, port: key.ports.destination(), protocol, zero: 0 };
    let service = F::services().get_ptr(&service_key).ok_or(Reason::NoService)?;
    let sloppy = CONFIG.get(0).map_or(0, |config| config.flags);
    if !may_begin(protocol, event, sloppy) || key.ports.source() == FTP_DATA.to_be() {
        return Err(Reason::NoConnection);
    }
    let server = pick::pick(service, &key.client, key.ports.source(), &key.vip).ok_or(Reason::NoServer)?;
    let state = next_state(protocol, 0, event);
    let active = is_active(protocol, state);
    let connection = Connection {
        server,
        last_seen: jiffies(),
        state,
        flags: flags::NO_OUTPUT | if active { flags::ACTIVE } else { 0 },
        zero: [0; 6],
    };
    match F::connections().insert(key, &connection, 1 /* BPF_NOEXIST */) {
        Ok(()) => {}
        // Another CPU was faster: one connection, one server.
        // SAFETY: an element of the map, as in `track`.
        Err(EEXIST) => return F::connections().get_ptr(key).map(|known| unsafe { (*known).server }).ok_or(Reason::TableFull),
        Err(_) => return Err(Reason::TableFull),
    }
    if let Some(counter) = COUNTERS.get_ptr_mut(server) {
        // SAFETY: an element of the counter array.
        unsafe { atomic::add(counter, if active { Counters::TOTAL + Counters::ACTIVE } else { Counters::TOTAL }) };
    }
    account::connection(server);
    Ok(server)
}

/// Whether a packet without a connection may begin one.
#[inline(always)]
fn may_begin(protocol: u8, event: u8, sloppy: u32) -> bool {
    match protocol {
        protocol::TCP => event & tcp::flags::RST == 0 && (event & tcp::flags::SYN != 0 || sloppy & settings::SLOPPY_TCP != 0),
        protocol::SCTP => event == sctp::chunk::INIT || (sloppy & settings::SLOPPY_SCTP != 0 && event != sctp::chunk::ABORT),
        _ => true,
    }
}

/// The key of a fragmented packet, read once more from its headers.
#[inline(always)]
fn fragment_key<P: Packet, F: Family>(
    context: *mut c_void,
    offset: u32,
    id: u32,
    protocol: u32,
) -> Option<FragmentKey<F::Address>> {
    // SAFETY: the context is the kernel's own.
    let packet = unsafe { P::view(context) };
    // The parser's offset, in a form that the verifier can bound.
    let header = F::parse(&packet, offset as usize & 0x1f).ok()?;
    Some(FragmentKey { source: header.source, destination: header.destination, id, protocol })
}

/// Remembers where the parts that follow must go.
#[inline(never)]
fn first_fragment<P: Packet, F: Family>(context: *mut c_void, offset: u32, id: u32, protocol: u32, server: u32) {
    if let Some(key) = fragment_key::<P, F>(context, offset, id, protocol) {
        // If it fails, the later parts are dropped and counted, and the sender repeats.
        let _ = F::fragments().insert(&key, server, 0);
    }
}

/// Follows the first fragment: the server's index, or more than 32 bits if it is not known.
#[inline(never)]
fn later_fragment<P: Packet, F: Family>(context: *mut c_void, offset: u32, id: u32, protocol: u32) -> u64 {
    let Some(key) = fragment_key::<P, F>(context, offset, id, protocol) else { return u64::MAX };
    // SAFETY: an element of the map.
    F::fragments().get_ptr(&key).map_or(u64::MAX, |server| u64::from(unsafe { *server }))
}

/// How far into a frame an ICMP header may begin: a bound that the verifier needs.
const REACH: usize = 0x7ff;

/// Finds the real server that an ICMP error is about: the packet that it quotes went from there to the client.
#[inline(never)]
fn icmp_error<P: Packet, F: Family>(context: *mut c_void, offset: u32) -> Result<u32, Reason> {
    // SAFETY: the context is the kernel's own.
    let packet = unsafe { P::view(context) };
    let offset = offset as usize;
    if offset > REACH {
        return Err(Reason::Malformed);
    }
    let icmp: IcmpHeader = packet.read(offset).ok_or(Reason::Malformed)?;
    if !F::is_error(icmp.kind) {
        return Err(Reason::NotTransport);
    }
    let (source, destination, payload) = F::quoted(&packet, offset + size_of::<IcmpHeader>()).ok_or(Reason::Malformed)?;
    if payload.fragment == Fragment::Later {
        return Err(Reason::NoConnection);
    }
    let ports: Ports = packet.read(payload.offset).ok_or(Reason::Malformed)?;
    let key = ConnectionKey { client: destination, vip: source, ports: ports.reversed(), protocol: u32::from(payload.protocol) };
    // SAFETY: an element of the map.
    F::connections().get_ptr(&key).map(|known| unsafe { (*known).server }).ok_or(Reason::NoConnection)
}
