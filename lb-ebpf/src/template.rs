//! Persistence: where did the client go before? [`lb_common::template`] says what a template is.
//!
//! New connections of persistent services come here, after their service is found and before they begin:
//!
//! ```text
//! usable template           its server; its time starts again
//! no template               pick, insert if absent; if present by now: the server that stands there
//! template not usable       pick, compare and swap;  if changed by now: the server that stands there
//! ```
//!
//! What a template was before it led elsewhere is left behind under another key, for those who look, until its time is over.
//!
//! Every change of a template's choice is one atomic step, and who comes second takes what it finds. So two first connections
//! of a client, at the same moment on two CPUs, go to one server. The sweep marks a template in the same way before it deletes
//! it; whoever meets that mark drops the packet, rather than make a connection that no template knows of.
//!
//! The stack is full when a new connection comes here. So what has to be kept in mind stands in a map, the [`Arrival`] of
//! this CPU.

use aya_ebpf::maps::HashMap;
use lb_common::{
    call::CallKey,
    config::{Config, SweptTable, flags as settings},
    connection::{Connection, ConnectionKey, flags},
    flood::{self as floods, Part},
    packet::{V4, V6, ethernet, protocol, transport::Ports},
    reason::Reason,
    schedule::NOBODY,
    server::Status,
    service::{Service, flags as service_flags},
    tcp,
    template::{Choice, Scope, Template, TemplateKey, scope_flags},
};

use crate::{
    atomic, bell, classify, flood,
    maps::{ARRIVALS, CONFIG, Family, HZ, PERSISTED, SCOPES, SERVERS},
    newcomers, pick,
    table::EEXIST,
    track::{self, CONTROLLED, FLOODED, ONCE, PREFIX_SHIFT, jiffies},
};

/// A new connection of a persistent service.
#[repr(C)]
pub struct Arrival {
    /// A template for a client that has none.
    fresh: Template,
    /// What a template was that leads nowhere.
    left: Template,
    service: Service,
    /// The [`ConnectionKey`], of either family.
    connection: [u32; 10],
    /// The [`TemplateKey`], of either family.
    key: [u32; 9],
    /// Whether flood mode is on: no template is made.
    flooded: u32,
    /// What the packet is to that mode: a [`Part`].
    part: u32,
    /// The connection whose call was read, and what [`choose`] shall answer for it; 0: nothing.
    called: [u32; 10],
    answer: u32,
}

/// A kind of templates: where they stand, and by which key.
pub trait Kind<F: Family> {
    type Key: 'static;
    /// What their table is to the sweep, for IPv4 and IPv6.
    const TABLES: [SweptTable; 2];
    /// Whether what leads nowhere is left behind.
    const LEAVES_BEHIND: bool;

    fn table() -> &'static HashMap<Self::Key, Template>;
}

/// The templates of clients.
pub struct OfClients;

impl<F: Family> Kind<F> for OfClients {
    type Key = TemplateKey<F::Address>;
    const TABLES: [SweptTable; 2] = [SweptTable::TemplatesV4, SweptTable::TemplatesV6];
    const LEAVES_BEHIND: bool = true;

    #[inline(always)]
    fn table() -> &'static HashMap<Self::Key, Template> {
        F::templates()
    }
}

/// The templates of calls.
pub struct OfCalls;

impl<F: Family> Kind<F> for OfCalls {
    type Key = CallKey<F::Address>;
    const TABLES: [SweptTable; 2] = [SweptTable::CallsV4, SweptTable::CallsV6];
    const LEAVES_BEHIND: bool = false;

    #[inline(always)]
    fn table() -> &'static HashMap<Self::Key, Template> {
        F::calls()
    }
}

impl Arrival {
    #[inline(always)]
    fn key<F: Family>(arrival: *mut Self) -> *mut TemplateKey<F::Address> {
        // SAFETY: an element of the map; the field is large enough for either family.
        unsafe { (&raw mut (*arrival).key).cast() }
    }

    #[inline(always)]
    fn connection<F: Family>(arrival: *mut Self) -> *mut ConnectionKey<F::Address> {
        // SAFETY: as above.
        unsafe { (&raw mut (*arrival).connection).cast() }
    }

    #[inline(always)]
    fn called<F: Family>(arrival: *mut Self) -> *mut ConnectionKey<F::Address> {
        // SAFETY: as above.
        unsafe { (&raw mut (*arrival).called).cast() }
    }

    /// Whether the service's templates are those of calls.
    #[inline(always)]
    fn is_call(arrival: *mut Self) -> bool {
        // SAFETY: as above.
        unsafe { (*arrival).service.flags & service_flags::SIP != 0 }
    }

    /// What was found out about this connection's call. It is taken: the next packet has to ask anew.
    #[inline(always)]
    fn take_answer<F: Family>(arrival: *mut Self) -> u32 {
        // SAFETY: as above.
        unsafe {
            let answer = (*arrival).answer;
            (*arrival).answer = 0;
            if answer != 0 && *Self::called::<F>(arrival) == *Self::connection::<F>(arrival) { answer } else { UNREAD }
        }
    }

    /// Whether the service is FTP's, and the connection to another port.
    #[inline(always)]
    fn may_be_foreign<F: Family>(arrival: *mut Self) -> bool {
        // SAFETY: as above.
        unsafe {
            (*arrival).service.flags & service_flags::FTP != 0
                && (*Self::connection::<F>(arrival)).ports.destination() != classify::FTP.to_be()
        }
    }

    /// Whether no connection will follow.
    #[inline(always)]
    fn is_once<F: Family>(arrival: *mut Self) -> bool {
        // SAFETY: as above.
        unsafe { track::is_once(&(*arrival).service, (*Self::connection::<F>(arrival)).protocol as u8) }
    }
}

/// Notes a new connection of a persistent service, and the event that begins it, for [`choose`].
#[inline(always)]
pub fn note<F: Family>(service: *const Service, connection: &ConnectionKey<F::Address>, event: u8, admission: u32) {
    use tcp::flags::{ACK, FIN, RST, SYN};
    let Some(arrival) = ARRIVALS.get_ptr_mut(0) else { return };
    // With `sloppy_tcp` a connection may begin as one that is established. (`begin` knows that better, but there the verifier would
    // follow both answers.)
    let established = connection.protocol == u32::from(protocol::TCP) && event & (SYN | FIN | RST | ACK) == ACK;
    // SAFETY: elements of the maps; the arrival is this CPU's own.
    unsafe {
        (*arrival).fresh.assured = established.into();
        (*arrival).service = *service;
        (*arrival).flooded = admission & flood::FLOODED;
        (*arrival).part = Part::of(connection.protocol as u8, event) as u32;
        Arrival::connection::<F>(arrival).write(*connection);
    }
}

/// Chooses the real server of the connection that was noted. The answer is the index of the server, with bits of
/// [`track::begin`]'s, or [`NOBODY`].
#[inline(always)]
pub fn choose<F: Family>() -> Result<u32, Reason> {
    let answer = if F::ETHERTYPE == ethernet::IPV4 { persist_ipv4() } else { persist_ipv6() };
    // No question like those below: of four, LLVM would make a table, and of what is read there the verifier knows nothing.
    if answer >> 30 == UNREAD >> 30 {
        // Not yet: whoever delivers the packet leaves it to the program that reads it.
        return Err(Reason::NoCallId);
    }
    match answer {
        TABLE_FULL => Err(Reason::TableFull),
        OVER => Err(Reason::TemplateOver),
        LEFT => Err(Reason::NoConnection),
        server => Ok(server),
    }
}

const TABLE_FULL: u32 = NOBODY - 1;
const OVER: u32 = NOBODY - 2;
const LEFT: u32 = NOBODY - 3;
/// The highest bit and not the second highest, which all of the above have.
const UNREAD: u32 = 1 << 31;

/// Global functions without arguments: the verifier looks at each once, and not once for each way that leads to it.
#[unsafe(no_mangle)]
extern "C" fn persist_ipv4() -> u32 {
    persist::<V4>()
}

#[unsafe(no_mangle)]
extern "C" fn persist_ipv6() -> u32 {
    persist::<V6>()
}

#[inline(always)]
fn persist<F: Family>() -> u32 {
    let Some(arrival) = ARRIVALS.get_ptr_mut(0) else { return NOBODY };
    if Arrival::is_call(arrival) { Arrival::take_answer::<F>(arrival) } else { lead::<F, OfClients>(arrival, key::<F>(arrival)) }
}

/// Finds out where the call goes whose connection was noted, for [`choose`]. `key` is that of the call's template, without whom it is for,
/// in memory of a map. The answer is whether the call has to know of the connection.
///
/// # Safety
/// Nobody else writes the key.
#[inline(always)]
pub unsafe fn answer<F: Family>(call: *mut CallKey<F::Address>) -> bool {
    let Some(arrival) = ARRIVALS.get_ptr_mut(0) else { return false };
    // SAFETY: the caller's promise; an arrival is this CPU's own.
    unsafe {
        (*call).whom = *key::<F>(arrival);
        let answer = lead::<F, OfCalls>(arrival, call);
        *Arrival::called::<F>(arrival) = *Arrival::connection::<F>(arrival);
        (*arrival).answer = answer;
        answer < UNREAD && answer & (ONCE | FLOODED) == 0
    }
}

/// The connection that was noted.
#[inline(always)]
pub fn noted<F: Family>() -> Option<*mut ConnectionKey<F::Address>> {
    ARRIVALS.get_ptr_mut(0).map(Arrival::connection::<F>)
}

/// The key of the client's template.
#[inline(always)]
fn key<F: Family>(arrival: *mut Arrival) -> *mut TemplateKey<F::Address> {
    let key = Arrival::key::<F>(arrival);
    // SAFETY: elements of the map, this CPU's own.
    unsafe { key.write(Scope::of(&(*arrival).service).key(&*Arrival::connection::<F>(arrival))) };
    key
}

/// Where a template leads, or the scheduler.
#[inline(always)]
fn lead<F: Family, K: Kind<F>>(arrival: *mut Arrival, key: *const K::Key) -> u32 {
    // SAFETY: an element of the map.
    let prefix = u32::from(unsafe { (*arrival).service.prefix }) << PREFIX_SHIFT;
    let kind = prefix | if Arrival::is_once::<F>(arrival) { ONCE } else { CONTROLLED };
    // SAFETY: elements of maps. A template may become another one under our hands, but it stays memory. An arrival is
    // this CPU's own.
    let choice = unsafe {
        match K::table().get_ptr_mut(&*key) {
            Some(known) => return_to::<F, K>(arrival, key, known),
            None => go::<F, K>(arrival, key),
        }
    };
    match choice {
        Ok(Choice::OVER) => OVER,
        // SAFETY: as above.
        Ok(server) if unsafe { (*arrival).flooded != 0 } => {
            // SAFETY: as above.
            let begins = unsafe { (*arrival).part == Part::Beginning as u32 };
            if !begins && flood::needs_entry(server) { LEFT } else { server | kind | FLOODED }
        }
        Ok(server) => server | kind,
        // As in IPVS: of a port that is not the service's own nobody knows whether FTP uses it.
        Err(NOBODY) if Arrival::may_be_foreign::<F>(arrival) => LEFT,
        Err(why) => why,
    }
}

/// The client has a template.
///
/// # Safety
/// Both are elements of their maps.
#[inline(always)]
unsafe fn return_to<F: Family, K: Kind<F>>(arrival: *mut Arrival, key: *const K::Key, known: *mut Template) -> Result<u32, u32> {
    // SAFETY: the caller's promise.
    unsafe {
        let word = (&raw const (*known).choice).read_volatile();
        let (choice, now) = (Choice::from_word(word), jiffies());
        if choice.server == Choice::OVER {
            return Ok(Choice::OVER);
        }
        let is_alive = (*known).held != 0 || choice.idle(now) < (*known).timeout;
        let is_usable = is_alive && leads_somewhere(choice.server);
        let server = if is_usable { choice.server } else { pick::<F>(arrival).unwrap_or(NOBODY) };
        if server == NOBODY {
            // As in IPVS, the client is free even if its old server comes back.
            if is_alive {
                leave_behind::<F, K>(arrival, known, choice);
            }
            end::<F, K>(key, known, word);
            return Err(NOBODY);
        }
        // Many connections of a client in one tick need not all write.
        if !is_usable || choice.last_seen != now {
            let found = atomic::compare_exchange(&raw mut (*known).choice, word, Choice { server, last_seen: now }.word());
            if found != word {
                return Ok(Choice::from_word(found).server);
            }
        }
        if !is_usable {
            if is_alive {
                leave_behind::<F, K>(arrival, known, choice);
            }
            (*known).timeout = timeout(arrival);
            (*known).assured = 0;
            count(choice.server, LESS);
            count(server, MORE);
        }
        if !Arrival::is_once::<F>(arrival) {
            (*known).held = 1;
        }
        if (*arrival).fresh.assured != 0 {
            (*known).assured = 1;
        }
        Ok(server)
    }
}

/// Puts a copy of a template aside that leads nowhere.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn leave_behind<F: Family, K: Kind<F>>(arrival: *mut Arrival, known: *const Template, choice: Choice) {
    if !K::LEAVES_BEHIND {
        return;
    }
    // SAFETY: the caller's promise; the arrival is this CPU's own.
    unsafe {
        let (key, left) = (Arrival::key::<F>(arrival), &raw mut (*arrival).left);
        (*left).choice = choice.word();
        (*left).timeout = (*known).timeout;
        (*left).assured = (*known).assured;
        (*left).held = (*known).held;
        let port = (*key).port;
        for number in 1..=TemplateKey::<F::Address>::LEFT_BEHIND {
            key.write((*key).left_behind(choice.server, number));
            match F::templates().insert(&*key, &*left, 1 /* BPF_NOEXIST */) {
                Ok(()) => {
                    count(choice.server, MORE);
                    break;
                }
                Err(EEXIST) => {}
                // Nobody will miss it who does not look.
                Err(_) => break,
            }
        }
        (*key).port = port;
        (*key).zero = 0;
    }
}

/// The client has none.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn go<F: Family, K: Kind<F>>(arrival: *mut Arrival, key: *const K::Key) -> Result<u32, u32> {
    let server = pick::<F>(arrival)?;
    // SAFETY: the caller's promise.
    unsafe {
        if (*arrival).flooded != 0 {
            return Ok(server);
        }
        let fresh = &raw mut (*arrival).fresh;
        (*fresh).choice = Choice { server, last_seen: jiffies() }.word();
        (*fresh).timeout = timeout(arrival);
        (*fresh).held = (!Arrival::is_once::<F>(arrival)).into();
        match K::table().insert(&*key, &*fresh, 1 /* BPF_NOEXIST */) {
            Ok(()) => {
                newcomers::note(K::TABLES[usize::from(F::ETHERTYPE == ethernet::IPV6)]);
                count(server, MORE);
                Ok(server)
            }
            // Another CPU was faster: one client, one server.
            Err(EEXIST) => {
                let known = K::table().get_ptr(&*key).ok_or(OVER)?;
                Ok(Choice::from_word((&raw const (*known).choice).read_volatile()).server)
            }
            Err(_) => Err(TABLE_FULL),
        }
    }
}

#[inline(always)]
fn pick<F: Family>(arrival: *mut Arrival) -> Result<u32, u32> {
    // SAFETY: an element of the map.
    let picked = unsafe {
        let connection = &*Arrival::connection::<F>(arrival);
        if (*arrival).flooded != 0 {
            // All that would have one template go to one real server.
            let client = (*Arrival::key::<F>(arrival)).client;
            let flow = floods::flow(&client, &connection.vip, Ports::new(0, 0));
            return match flood::pick((*arrival).service.id, flow, Part::Beginning) {
                NOBODY => Err(NOBODY),
                server => Ok(server),
            };
        }
        pick::pick::<F>(&raw const (*arrival).service, &connection.client, connection.ports.source(), &connection.vip)
    };
    picked.ok_or_else(|| {
        bell::ring();
        NOBODY
    })
}

/// Ticks that a new template lives.
#[inline(always)]
fn timeout(arrival: *const Arrival) -> u32 {
    // SAFETY: an element of the map.
    unsafe { (*arrival).service.persistence.wrapping_mul(HZ.load()) }
}

/// Whether new connections go to the real server that a template names.
#[inline(always)]
fn leads_somewhere(server: u32) -> bool {
    const FREE: u8 = Status::Free as u8;
    const REMOVED: u8 = Status::Removed as u8;
    let removed = SERVERS.get(server).is_none_or(|server| matches!(server.status, FREE | REMOVED));
    let passed_over = CONFIG.get(0).is_some_and(|config| config.flags & settings::EXPIRE_QUIESCENT != 0)
        && SCOPES.get(server).is_some_and(|scope| scope.flags & scope_flags::QUIESCENT != 0);
    !removed && !passed_over
}

const MORE: u64 = 1;
const LESS: u64 = 1_u64.wrapping_neg();

/// Counts the templates that lead to a real server.
#[inline(always)]
fn count(server: u32, change: u64) {
    if let Some(counter) = PERSISTED.get_ptr_mut(server) {
        // SAFETY: an element of the array.
        unsafe { atomic::add(counter, change) };
    }
}

/// The template that chose a connection's real server: the client's, if it still leads there, or else one that was left behind, of which
/// it may have one of these numbers.
#[inline(always)]
fn of<F: Family>(key: &ConnectionKey<F::Address>, server: u32, prefix: u8, numbers: u8) -> Option<*mut Template> {
    let mut key = SCOPES.get(server)?.at::<F::Address>(prefix).key(key);
    if let Some(known) = F::templates().get_ptr_mut(&key)
        && let Some(known) = leading_to(known, server)
    {
        return Some(known);
    }
    for number in 1..=numbers {
        key = key.left_behind(server, number);
        if let Some(known) = F::templates().get_ptr_mut(&key) {
            return Some(known);
        }
    }
    None
}

/// The same of a connection's call.
#[inline(always)]
fn of_call<F: Family>(key: &ConnectionKey<F::Address>, server: u32) -> Option<*mut Template> {
    let caller = F::callers().get_ptr(key)?;
    // SAFETY: an element of the map.
    leading_to(F::calls().get_ptr_mut(unsafe { &(*caller).key })?, server)
}

/// The template, if it leads to this real server.
#[inline(always)]
fn leading_to(known: *mut Template, server: u32) -> Option<*mut Template> {
    // SAFETY: an element of the map.
    let choice = Choice::from_word(unsafe { (&raw const (*known).choice).read_volatile() });
    (choice.server == server).then_some(known)
}

/// Notes that a connection was established, or a datagram answered. Of several templates that were left behind the first is taken for
/// its own: nothing tells them apart, and the verifier would follow each look-up.
#[inline(never)]
pub fn assure<F: Family>(key: &ConnectionKey<F::Address>, server: u32, prefix: u32) {
    if let Some(known) = of::<F>(key, server, prefix as u8, 1) {
        // SAFETY: an element of the map.
        unsafe { (*known).assured = 1 };
    }
}

/// The same for a call, of which only datagrams can be.
#[inline(never)]
pub fn assure_call<F: Family>(key: &ConnectionKey<F::Address>, server: u32) {
    if let Some(known) = of_call::<F>(key, server) {
        // SAFETY: an element of the map.
        unsafe { (*known).assured = 1 };
    }
}

/// The sweep has met a connection that lives.
#[inline(always)]
pub fn meet<F: Family>(key: &ConnectionKey<F::Address>, connection: &Connection) {
    if connection.flags & flags::CONTROLLED != 0
        && let Some(known) = of::<F>(key, connection.server, connection.prefix, TemplateKey::<F::Address>::LEFT_BEHIND)
    {
        // SAFETY: an element of the map.
        unsafe { (*known).met = 1 };
    }
}

/// The sweep has met a caller. Answers whether there is its connection.
#[inline(always)]
pub fn meet_caller<F: Family>(key: &ConnectionKey<F::Address>) -> bool {
    let Some(connection) = F::connections().find(key) else { return false };
    // SAFETY: elements of the maps.
    unsafe {
        if let Some(known) = of_call::<F>(key, (*connection).server) {
            (*known).met = 1;
        }
        (*connection).flags & flags::CONTROLLED != 0
    }
}

/// Deletes a template, unless it has another choice by now than this one.
///
/// # Safety
/// Both are of an element of the map, or the key is another copy.
#[inline(always)]
unsafe fn end<F: Family, K: Kind<F>>(key: *const K::Key, known: *mut Template, word: u64) {
    let choice = Choice::from_word(word);
    let over = Choice { server: Choice::OVER, ..choice };
    // SAFETY: the caller's promise.
    unsafe {
        if atomic::compare_exchange(&raw mut (*known).choice, word, over.word()) == word && K::table().remove(&*key).is_ok() {
            count(choice.server, LESS);
        }
    }
}

/// Seconds more for a template whose time is over while it has connections; from then on it is what it lives.
const RESPITE: u32 = 60;

/// The sweep looks at a template, after it has met all connections. `now` is when it began.
///
/// # Safety
/// Both are of an element of the map.
#[inline(always)]
pub unsafe fn expire<F: Family, K: Kind<F>>(config: &Config, key: *const K::Key, known: *mut Template, now: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        let word = (&raw const (*known).choice).read_volatile();
        let choice = Choice::from_word(word);
        let has_connections = (*known).met != 0;
        (*known).met = 0;
        if track::is_forsaken(config, choice.server) {
            return end::<F, K>(key, known, word);
        }
        if choice.idle(now) < (*known).timeout {
            // A connection that came after the sweep began was not met.
            if has_connections || choice.idle(now) > 0 {
                (*known).held = has_connections.into();
            }
            return;
        }
        if !has_connections {
            return end::<F, K>(key, known, word);
        }
        let renewed = Choice { last_seen: now, ..choice };
        // Unless a new connection has come in this moment.
        if atomic::compare_exchange(&raw mut (*known).choice, word, renewed.word()) == word {
            (*known).timeout = HZ.load().wrapping_mul(RESPITE);
        }
    }
}
