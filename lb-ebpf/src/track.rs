//! Which connection does the packet belong to, and what does it do to it?
//!
//! The common packet finds its connection by one look-up. The rest is cold: a packet that begins a connection
//! ([`begin`]), a connection that was left alone for a second or that a packet changes ([`attend`]), parts of fragmented
//! packets, ICMP errors. IPVS's rules: `ipvs-semantics.md`, sections 2.2 to 2.10.

use aya_ebpf::{cty::c_void, helpers::generated::bpf_jiffies64};
use lb_common::{
    config::{Config, flags as settings},
    connection::{Connection, ConnectionKey, FragmentKey, Leg, flags},
    flood::{self as floods, Part},
    packet::{
        Fragment, IpHeader,
        icmp::IcmpHeader,
        protocol,
        transport::{self, Ports},
    },
    reason::Reason,
    schedule::NOBODY,
    sctp,
    server::{Counters, Method, Status, flags::TOA},
    service::{Service, flags as service_flags},
    tcp::{self, Direction},
    template::scope_flags,
    udp,
};
use lb_ebpf::packet::{Packet, REACH, merged};

use crate::{
    account, atomic, bell,
    classify::{self, Origin},
    flood, local,
    maps::{CONFIG, COUNTERS, Family, HZ, PEAKS, SCOPES, SERVERS},
    pick, reply,
    table::Refusal,
    template,
};

/// Source port of active FTP's data connections, which IPVS never schedules.
const FTP_DATA: u16 = 20;

/// Kernel clock ticks, the low 32 bits: comparisons are by wrapping difference.
#[inline(always)]
pub fn jiffies() -> u32 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_jiffies64() as u32 }
}

/// Finds or makes the packet's connection, and moves its state on. Returns where its packets go.
#[inline(always)]
pub fn connection<P: Packet, F: Family>(
    packet: &P,
    key: &ConnectionKey<F::Address>,
    event: u8,
    fragment: Fragment,
) -> Result<Leg, Reason> {
    if let Some(known) = F::connections().find(key) {
        // First of all: what is read before a call has to be put aside for it.
        let now = jiffies();
        // SAFETY: an element of the map; it may become another connection's under our hands, but it stays memory.
        let (last_seen, settled) = unsafe { ((*known).last_seen, (*known).flags & flags::SETTLED != 0) };
        let leg = leg(known);
        let idle = now.wrapping_sub(last_seen);
        let undisturbed = settled && transport::is_quiet(event) && idle < HZ.load();
        if undisturbed {
            return Ok(leg);
        }
        match attend::<F>(key, known, idle, event) {
            HELD => return Ok(leg),
            HELD_UNNAMED => return Err(Reason::Unnamed),
            GONE => {}
            masqueraded => reply::forget::<F>(key, Leg(masqueraded)),
        }
    }
    let picked = schedule::<F>(key, event, Origin::of(packet, fragment))?;
    let local = local::of_new::<F>(key, picked & !BITS)?;
    match begin::<F>(key, event, Leg::new(picked, local)) {
        NO_SERVER => Err(Reason::NoServer),
        FULL => Err(Reason::TableFull),
        leg if leg & EXPECTS == 0 => Ok(Leg(leg)),
        leg => {
            let leg = Leg(leg & !EXPECTS);
            if reply::expect::<F>(key, leg.server()) { Ok(leg) } else { Err(Reason::TableFull) }
        }
    }
}

/// Where the packets of a connection go: one read of eight bytes.
#[inline(always)]
fn leg(connection: *const Connection) -> Leg {
    // SAFETY: an element of the map, as in `connection`, which begins with these bytes.
    unsafe { Leg(connection.cast::<u64>().read()) }
}

/// Bit of a real server's index that [`begin`] returns: the new connection's replies are to be expected. Not its own business,
/// for the sake of the stack.
const EXPECTS: u64 = 1 << 31;
/// Bit of a real server's index that [`begin`] takes: a template chose the server.
pub const CONTROLLED: u32 = 1 << 30;
/// The same: for this packet alone, if it is one of UDP.
pub const ONCE: u32 = 1 << 29;
/// The same: it was picked in flood mode.
pub const FLOODED: u32 = 1 << 27;
/// From the prefix by which its template was found to its place in what [`begin`] takes.
pub const PREFIX_SHIFT: u32 = 18;
/// All of them.
const BITS: u32 = CONTROLLED | ONCE | FLOODED | 0xff << PREFIX_SHIFT;
/// In the place of a picked server: its template knows it.
const PERSISTENT: u32 = 1 << 28;
/// Answer of [`begin`]: no real server takes the connection.
const NO_SERVER: u64 = u64::MAX;
/// Answer of [`begin`]: the table is full.
const FULL: u64 = u64::MAX - 1;

/// State and flags of a connection.
#[derive(Clone, Copy)]
pub struct Standing {
    state: u8,
    flags: u8,
    half_open: u8,
}

impl Standing {
    /// What follows on an event in a state; `side` are the flags that do not follow from the state.
    #[inline(always)]
    fn after(protocol: u8, direction: Direction, state: u8, event: u8, side: u8) -> Self {
        Self::from_word(after(protocol.into(), direction as u32, state.into(), event.into()), side)
    }

    /// Where a new connection stands. In flood mode the packet may be another than its first, and does not prove that anybody listens
    /// to the real server.
    #[inline(always)]
    fn of_new(protocol: u8, direction: Direction, event: u8, side: u8, flooded: u32) -> Self {
        Self::from_word(opening(protocol.into(), direction as u32, event.into(), flooded), side)
    }

    #[inline(always)]
    fn from_word(word: u32, side: u8) -> Self {
        let settled = if side & flags::UNNAMED == 0 { flags::SETTLED } else { 0 };
        Self {
            state: word as u8,
            flags: (word >> 8) as u8 & (flags::ACTIVE | settled) | side,
            half_open: (word >> HALF_OPEN_SHIFT) as u8 & 1,
        }
    }
}

/// State and flags after an event, in one word. A global function, so that the verifier follows its many ways once.
#[unsafe(no_mangle)]
extern "C" fn after(protocol: u32, direction: u32, state: u32, event: u32) -> u32 {
    const ESTABLISHED: u8 = tcp::State::Established as u8;
    const NORMAL: u8 = udp::State::Normal as u8;
    let (protocol, state, event) = (protocol as u8, state as u8, event as u8);
    let direction = match direction {
        0 => Direction::Input,
        1 => Direction::Output,
        _ => Direction::InputOnly,
    };
    let (next, active, settled) = match protocol {
        protocol::TCP => {
            let next = tcp::next(false, direction, state, event);
            (next, tcp::is_active(next), next == ESTABLISHED)
        }
        protocol::SCTP => {
            let next = sctp::next(direction, state, event);
            (next, sctp::is_active(next), false)
        }
        _ => {
            let next = udp::next(state);
            (next, false, next == NORMAL)
        }
    };
    let half_open = floods::is_half_open(protocol, next);
    u32::from(next) | u32::from(active) << 8 | u32::from(settled) << 10 | u32::from(half_open) << HALF_OPEN_SHIFT
}

/// The same for a new connection.
#[unsafe(no_mangle)]
extern "C" fn opening(protocol: u32, direction: u32, event: u32, flooded: u32) -> u32 {
    const TCP: u32 = protocol::TCP as u32;
    const UDP: u32 = protocol::UDP as u32;
    if flooded != 0 && Part::of(protocol as u8, event as u8) == Part::Midst {
        let active = if protocol == TCP { flags::ACTIVE } else { 0 };
        return u32::from(floods::midst_state(protocol as u8)) | u32::from(active) << 8 | 1 << HALF_OPEN_SHIFT;
    }
    let none = if protocol == UDP { udp::State::None as u32 } else { 0 };
    after(protocol, direction, none, event)
}

/// Where [`after`] says whether the connection is half-open.
const HALF_OPEN_SHIFT: u32 = 16;

const _: () = assert!(flags::ACTIVE == 1 && flags::SETTLED == 1 << 2, "`after` puts them there");

/// Where the client's packets stand in the tables of states: most real servers answer their clients directly, so that only
/// the client's half is ever seen.
#[inline(always)]
const fn from_client(flags: u8) -> Direction {
    if flags & flags::NO_OUTPUT != 0 { Direction::InputOnly } else { Direction::Input }
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

/// Answer of [`attend`]: the connection goes on.
const HELD: u64 = u64::MAX;
/// Answer of [`attend`]: the connection goes on, and the packet has to tell the real server who its client is.
const HELD_UNNAMED: u64 = u64::MAX - 2;
/// Answer of [`attend`]: the connection is gone, or to make way for another.
const GONE: u64 = u64::MAX - 1;

/// Looks closely at a connection: it was idle for a second or more, is not settled yet, or its packet begins or ends
/// something. If it was over, and masqueraded, the answer is the [`Leg`] whose replies are to be forgotten.
#[inline(never)]
fn attend<F: Family>(key: &ConnectionKey<F::Address>, connection: *mut Connection, idle: u32, event: u8) -> u64 {
    let Some(config) = CONFIG.get(0) else { return HELD };
    // SAFETY: an element of the map, as in `connection`.
    let known = unsafe { *connection };
    let protocol = key.protocol as u8;
    let replies = if known.flags & flags::MASQUERADED != 0 { known.leg().0 } else { GONE };
    let over = known.flags & flags::LEAVING != 0 || idle >= lifetime(config, protocol, &known);
    if over || is_forsaken(config, known.server) {
        if !F::connections().remove(key) {
            return GONE;
        }
        forget(&known);
        return replies;
    }
    if starts(protocol, event) && (is_reusable(config.connection_reuse, protocol, &known) || is_to_quiescent(config, known.server))
    {
        // SAFETY: as above.
        unsafe { (*connection).flags = known.flags & !flags::SETTLED | flags::LEAVING };
        return replies;
    }
    // A removed server's connections are left to die: neither their state nor their time moves on.
    if !is_removed(known.server) {
        move_on(connection, protocol, from_client(known.flags), event, SIDE);
        // SAFETY: as above.
        if establishes(&known, unsafe { &*connection }, protocol) {
            template::assure::<F>(key, known.server, known.prefix.into());
        }
    }
    let names = known.flags & flags::UNNAMED != 0 && event & (tcp::flags::SYN | tcp::flags::RST) == 0;
    if names { HELD_UNNAMED } else { HELD }
}

/// Whether a packet has established a connection that a template is to know of.
#[inline(always)]
pub fn establishes(before: &Connection, after: &Connection, protocol: u8) -> bool {
    const TCP: u8 = tcp::State::Established as u8;
    const SCTP: u8 = sctp::State::Established as u8;
    let established = match protocol {
        protocol::TCP => after.state == TCP,
        protocol::SCTP => after.state == SCTP,
        _ => false,
    };
    before.flags & flags::CONTROLLED != 0 && established && before.state != after.state
}

/// Deletes the connection that is to make way for a new one, whose server is picked now. `false`: there is none.
///
/// Not before: for IPVS the old connection is there until its timer runs, soon after. So schedulers count it, and if both
/// have the same server, its upper threshold may be reached for that moment. Userspace, which could not see it, is told.
#[inline(never)]
fn make_way<F: Family>(key: &ConnectionKey<F::Address>, picked: u32) -> bool {
    let Some(known) = F::connections().find(key) else { return false };
    // SAFETY: an element of the map, as in `connection`.
    let known = unsafe { *known };
    if known.flags & flags::LEAVING == 0 || !F::connections().remove(key) {
        return false;
    }
    if known.server == picked
        && let (Some(counter), Some(peak)) = (COUNTERS.get_ptr(picked), PEAKS.get_ptr_mut(picked))
    {
        // SAFETY: elements of the arrays.
        unsafe { peak.write_volatile(u64::from(Counters::from_word(counter.read_volatile()).total) + 1) };
    }
    forget(&known);
    true
}

/// Moves a connection's state and time on after a packet. Of its flags that do not follow from the state, `side` stay.
#[inline(always)]
pub fn move_on(connection: *mut Connection, protocol: u8, direction: Direction, event: u8, side: u8) -> u8 {
    // SAFETY: an element of the map, as in `connection`.
    unsafe {
        let (state, before) = ((*connection).state, (*connection).flags);
        let next = Standing::after(protocol, direction, state, event, before & side);
        (*connection).last_seen = jiffies();
        if next.state != state || next.flags != before {
            (*connection).state = next.state;
            (*connection).flags = next.flags;
            let half_open = (*connection).half_open;
            (*connection).half_open = next.half_open;
            flood::count(half_open, next.half_open);
        }
        recount((*connection).server, before, next.flags);
        next.flags
    }
}

/// Flags that do not follow from the state.
pub const SIDE: u8 = flags::NO_OUTPUT | flags::MASQUERADED | flags::CONTROLLED | flags::UNNAMED;

/// Moves a connection between the active and the inactive ones of its real server.
#[inline(always)]
fn recount(server: u32, before: u8, after: u8) {
    if (before ^ after) & flags::ACTIVE != 0
        && let Some(counter) = COUNTERS.get_ptr_mut(server)
    {
        let change = if after & flags::ACTIVE != 0 { Counters::ACTIVE } else { Counters::ACTIVE.wrapping_neg() };
        // SAFETY: an element of the counter array.
        unsafe { atomic::add(counter, change) };
        bell::ring();
    }
}

/// IPVS's `conn_reuse_mode`: whether the start of a new connection may take the place of this one.
#[inline(always)]
fn is_reusable(mode: u32, protocol: u8, known: &Connection) -> bool {
    const CLOSE: u8 = tcp::State::Close as u8;
    const FIN_WAIT: u8 = tcp::State::FinWait as u8;
    const TIME_WAIT: u8 = tcp::State::TimeWait as u8;
    if known.flags & flags::CONTROLLED != 0 {
        return false;
    }
    match (protocol, known.state) {
        (protocol::TCP, TIME_WAIT | CLOSE) => mode != 0,
        (protocol::TCP, FIN_WAIT) => mode & 2 != 0 && known.flags & flags::NO_OUTPUT != 0,
        (protocol::SCTP, state) => mode != 0 && state == sctp::State::Closed as u8,
        _ => false,
    }
}

#[inline(always)]
fn is_removed(server: u32) -> bool {
    SERVERS.get(server).is_none_or(|server| server.status == Status::Removed as u8)
}

/// Whether what leads to a real server is to go, because that was removed: IPVS's `expire_nodest_conn`.
#[inline(always)]
pub fn is_forsaken(config: &Config, server: u32) -> bool {
    config.flags & settings::EXPIRE_NODEST != 0 && is_removed(server)
}

/// Whether a packet that asks for a new connection goes elsewhere, because the real server has the weight 0 by now: that is
/// `expire_nodest_conn`, too.
#[inline(always)]
fn is_to_quiescent(config: &Config, server: u32) -> bool {
    config.flags & settings::EXPIRE_NODEST != 0 && SCOPES.get(server).is_some_and(|scope| scope.flags & scope_flags::QUIESCENT != 0)
}

/// Ticks that a connection in this state lives without a packet.
///
/// A packet within a second after another is not noted, so of a timeout of one second nothing would be left for an answer to it:
/// it counts as two.
#[inline(always)]
pub fn lifetime(config: &Config, protocol: u8, connection: &Connection) -> u32 {
    let ticks = lifetime_in(config, protocol, connection.state);
    if connection.half_open == 0 {
        return ticks;
    }
    ticks.min(flood::half_open_lifetime())
}

#[inline(always)]
fn lifetime_in(config: &Config, protocol: u8, state: u8) -> u32 {
    let state = (state & 0xf) as usize;
    let seconds = match protocol {
        protocol::TCP => config.tcp_timeouts[state],
        protocol::SCTP => config.sctp_timeouts[state],
        _ => config.udp_timeout,
    };
    if seconds < 2 { 2 * HZ.load() } else { seconds.wrapping_mul(HZ.load()) }
}

/// What a connection adds to its real server's counters.
#[inline(always)]
pub const fn share(connection: &Connection) -> u64 {
    connection.share()
}

/// Takes a deleted connection out of its real server's counters.
#[inline(always)]
pub fn forget(connection: &Connection) {
    flood::count(connection.half_open, 0);
    if let Some(counter) = COUNTERS.get_ptr_mut(connection.server) {
        // SAFETY: an element of the counter array.
        unsafe { atomic::add(counter, share(connection).wrapping_neg()) };
        bell::ring();
    }
}

/// Finds a real server for a packet without a connection: its index, with bits for [`begin`], or
/// [`NOBODY`].
#[inline(always)]
fn schedule<F: Family>(key: &ConnectionKey<F::Address>, event: u8, origin: Origin) -> Result<u32, Reason> {
    let picked = pick_for::<F>(key, event, origin)?;
    // For the sake of the stack, not by that one.
    if picked == PERSISTENT { template::choose::<F>() } else { Ok(picked) }
}

/// Finds the service for a packet without a connection, and picks a real server, or [`NOBODY`].
#[inline(never)]
fn pick_for<F: Family>(key: &ConnectionKey<F::Address>, event: u8, origin: Origin) -> Result<u32, Reason> {
    let protocol = key.protocol as u8;
    let service = classify::service::<F>(key, origin.mark()).ok_or(Reason::NoService)?;
    let admission = flood::admission(protocol, event);
    if admission == flood::LEFT || key.ports.source() == FTP_DATA.to_be() {
        return Err(Reason::NoConnection);
    }
    if admission == flood::SCHEDULED && classify::waits::<F>(service, origin) {
        return Err(Reason::Unmarked);
    }
    // SAFETY: an element of the map.
    let (persistence, flags) = unsafe { ((*service).persistence, (*service).flags) };
    if persistence != 0 {
        template::note::<F>(service, key, event, admission);
        return Ok(PERSISTENT);
    }
    let picked = if admission == flood::FLOODED {
        // SAFETY: as above.
        let id = unsafe { (*service).id };
        flood::pick(id, floods::flow(&key.client, &key.vip, key.ports), Part::of(protocol, event))
    } else {
        pick::pick::<F>(service, &key.client, key.ports.source(), &key.vip).unwrap_or_else(|| {
            // The cursor has moved, and that the forecast says "nobody" may be out of date.
            bell::ring();
            NOBODY
        })
    };
    if picked == flood::NEEDS_ENTRY {
        return Err(Reason::NoConnection);
    }
    // Without questions, of which the verifier would follow both answers to the end.
    Ok(picked | u32::from(flags & service_flags::ONE_PACKET) << ONCE_SHIFT | (admission & flood::FLOODED) << FLOODED_SHIFT)
}

/// From an [admission](flood::admission) to [`FLOODED`].
const FLOODED_SHIFT: u32 = FLOODED.trailing_zeros() - flood::FLOODED.trailing_zeros();

/// From the flag of a service to [`ONCE`].
const ONCE_SHIFT: u32 = ONCE.trailing_zeros() - service_flags::ONE_PACKET.trailing_zeros();

/// Whether a service takes each packet of a protocol for itself.
#[inline(always)]
pub const fn is_once(service: &Service, protocol: u8) -> bool {
    service.flags & service_flags::ONE_PACKET != 0 && protocol == protocol::UDP
}

/// Begins a connection to a real server, if there is one: makes the entry. Returns where its packets go, as a [`Leg`].
#[inline(never)]
fn begin<F: Family>(key: &ConnectionKey<F::Address>, event: u8, to: Leg) -> u64 {
    let (picked, local) = (to.server(), to.local());
    if picked == NOBODY {
        make_way::<F>(key, NOBODY);
        return NO_SERVER;
    }
    let server = picked & !BITS;
    let protocol = key.protocol as u8;
    let to = Leg::new(server, local);
    if picked & ONCE != 0 && protocol == protocol::UDP {
        account::connection(server);
        return to.0;
    }
    let (masqueraded, named) =
        SERVERS.get(server).map_or((false, false), |server| (Method::translates(server.method), server.flags & TOA != 0));
    let controlled = if picked & CONTROLLED != 0 { flags::CONTROLLED } else { 0 };
    let unnamed = if named && protocol == protocol::TCP { flags::UNNAMED } else { 0 };
    let side = controlled | if masqueraded { flags::MASQUERADED | unnamed } else { flags::NO_OUTPUT };
    let stateless = picked & FLOODED != 0 && !masqueraded;
    if stateless && !flood::admits(protocol, event) {
        flood::pass(server, protocol, event);
        return to.0;
    }
    let Standing { state, flags, half_open } = Standing::of_new(protocol, from_client(side), event, side, picked & FLOODED);
    let connection =
        Connection { server, local, last_seen: jiffies(), state, flags, half_open, prefix: (picked >> PREFIX_SHIFT) as u8 };
    let insert = || F::connections().insert(key, &connection);
    let inserted = match insert() {
        Err(Refusal::Exists) if make_way::<F>(key, server) => insert(),
        outcome => outcome,
    };
    if inserted.is_err() && local.is_some() {
        reply::forget::<F>(key, to);
    }
    match inserted {
        Ok(()) => {}
        // Another CPU was faster: one connection, one server.
        Err(Refusal::Exists) => return F::connections().find(key).map_or(FULL, |known| leg(known).0),
        Err(Refusal::Full) if stateless => {
            flood::pass(server, protocol, event);
            flood::full();
            return to.0;
        }
        Err(Refusal::Full) => {
            flood::full();
            return FULL;
        }
    }
    flood::count(0, half_open);
    if let Some(counter) = COUNTERS.get_ptr_mut(server) {
        // SAFETY: an element of the counter array.
        unsafe { atomic::add(counter, share(&connection)) };
        bell::ring();
    }
    account::connection(server);
    // With a local port, the entry for the replies is there already.
    if masqueraded && !local.is_some() { to.0 | EXPECTS } else { to.0 }
}

/// Whether a packet without a connection may begin one.
#[inline(always)]
pub fn may_begin(protocol: u8, event: u8, sloppy: u32) -> bool {
    match protocol {
        protocol::TCP => event & tcp::flags::RST == 0 && (event & tcp::flags::SYN != 0 || sloppy & settings::SLOPPY_TCP != 0),
        protocol::SCTP => event == sctp::chunk::INIT || (sloppy & settings::SLOPPY_SCTP != 0 && event != sctp::chunk::ABORT),
        _ => true,
    }
}

/// The same for a packet of any kind: fragments and ICMP errors belong to connections, too.
#[inline(always)]
pub fn anything<P: Packet, F: Family>(
    packet: &P,
    header: &IpHeader<F::Address>,
    offset: usize,
    protocol: u8,
    fragment: Fragment,
) -> Result<Leg, Reason> {
    if protocol == F::ICMP && fragment != Fragment::Later {
        return found(icmp_error::<P, F>(packet.context(), offset as u32, (header.offset + header.length) as u32));
    }
    if fragment == Fragment::Later {
        return found(later::<P, F>(packet.context(), header.offset as u32));
    }
    let segment = transport::parse(packet, offset, protocol, header.offset + header.length)?;
    let key = ConnectionKey { client: header.source, vip: header.destination, ports: segment.ports, protocol: u32::from(protocol) };
    let leg = connection::<P, F>(packet, &key, segment.event, fragment)?;
    if fragment == Fragment::First {
        remember_first_fragment::<P, F>(packet.context(), header.offset as u32, segment.ports);
    }
    Ok(leg)
}

/// Finds out where a later fragment goes, by the ports of the first. It moves nothing on: the first has.
#[inline(never)]
fn later<P: Packet, F: Family>(context: *mut c_void, offset: u32) -> u64 {
    // SAFETY: the context is the kernel's own.
    let Ok(key) = fragment_key::<P, F>(&unsafe { P::view(context) }, offset) else { return MALFORMED };
    let Ok(ports) = ports_of::<F>(&key) else { return FRAGMENT_UNKNOWN };
    let key = ConnectionKey { client: key.source, vip: key.destination, ports, protocol: key.protocol };
    F::connections().find(&key).map_or(NO_CONNECTION, |known| leg(known).0)
}

/// Remembers the ports, which the parts that follow a first fragment do not have.
#[inline(never)]
pub fn remember_first_fragment<P: Packet, F: Family>(context: *mut c_void, offset: u32, ports: Ports) {
    // SAFETY: the context is the kernel's own.
    let packet = unsafe { P::view(context) };
    if let Ok(key) = fragment_key::<P, F>(&packet, offset) {
        // If it fails, the later parts are counted and lost, and the sender repeats.
        let _ = F::fragments().insert(&key, ports, 0);
    }
}

/// The ports of a later fragment: those of the first.
#[inline(never)]
pub fn ports_of_first_fragment<P: Packet, F: Family>(context: *mut c_void, offset: u32) -> Result<Ports, Reason> {
    // SAFETY: the context is the kernel's own.
    ports_of::<F>(&fragment_key::<P, F>(&unsafe { P::view(context) }, offset)?)
}

#[inline(always)]
fn ports_of<F: Family>(key: &FragmentKey<F::Address>) -> Result<Ports, Reason> {
    // SAFETY: an element of the map.
    F::fragments().get_ptr(key).map(|ports| unsafe { *ports }).ok_or(Reason::FragmentUnknown)
}

/// The key of a fragmented packet, read once more from its headers: what is rare shall not take up the stack of what is not.
#[inline(always)]
fn fragment_key<P: Packet, F: Family>(packet: &P, offset: u32) -> Result<FragmentKey<F::Address>, Reason> {
    // The parser's offset, in a form that the verifier can bound.
    let header = F::parse(packet, offset as usize & 0x1f)?;
    let payload = F::transport(packet, &header)?;
    let protocol = u32::from(payload.protocol);
    Ok(FragmentKey { source: header.source, destination: header.destination, id: payload.fragment_id, protocol })
}

/// Answers of [`icmp_error`] and [`later`] in the place of a [`Leg`]: a result of both would need memory on the stack.
const NO_CONNECTION: u64 = u64::MAX;
const NOT_TRANSPORT: u64 = u64::MAX - 1;
const MALFORMED: u64 = u64::MAX - 2;
const FRAGMENT_UNKNOWN: u64 = u64::MAX - 3;

#[inline(always)]
const fn found(leg: u64) -> Result<Leg, Reason> {
    match leg {
        NO_CONNECTION => Err(Reason::NoConnection),
        NOT_TRANSPORT => Err(Reason::NotTransport),
        MALFORMED => Err(Reason::Malformed),
        FRAGMENT_UNKNOWN => Err(Reason::FragmentUnknown),
        leg => Ok(Leg(leg)),
    }
}

/// Finds out where an ICMP error goes: the packet that it quotes went from there to the client.
#[inline(never)]
fn icmp_error<P: Packet, F: Family>(context: *mut c_void, offset: u32, end: u32) -> u64 {
    // SAFETY: the context is the kernel's own.
    match quoted::<P, F>(&unsafe { P::view(context) }, offset, end) {
        Ok(key) => F::connections().find(&key).map_or(NO_CONNECTION, |known| leg(known).0),
        Err(Reason::NotTransport) => NOT_TRANSPORT,
        Err(Reason::NoConnection) => NO_CONNECTION,
        Err(_) => MALFORMED,
    }
}

/// The key of the packets that go against those that an ICMP error quotes: the error is to go with them. It begins at `offset` and
/// ends at `end`; behind that, a frame may hold anything.
#[inline(always)]
pub fn quoted<P: Packet, F: Family>(packet: &P, offset: u32, end: u32) -> Result<ConnectionKey<F::Address>, Reason> {
    let offset = offset as usize;
    if offset > REACH {
        return Err(Reason::Malformed);
    }
    let icmp: IcmpHeader = packet.read(offset).ok_or(Reason::Malformed)?;
    if !F::is_error(icmp.kind) {
        return Err(Reason::NotTransport);
    }
    let (source, destination, payload) = F::quoted(packet, offset + size_of::<IcmpHeader>()).ok_or(Reason::Malformed)?;
    let payload = merged(packet, &payload);
    if payload.fragment == Fragment::Later {
        return Err(Reason::NoConnection);
    }
    let ports: Ports = packet.read(payload.offset).ok_or(Reason::Malformed)?;
    // Hidden, or LLVM takes this for the check of the read.
    if packet.opaque(payload.offset) + size_of::<Ports>() > end as usize {
        return Err(Reason::Malformed);
    }
    Ok(ConnectionKey { client: destination, vip: source, ports: ports.reversed(), protocol: u32::from(payload.protocol) })
}
