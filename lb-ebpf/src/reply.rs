//! Replies of masqueraded real servers, on their way back to clients.
//!
//! A reply is found by its source and destination in a table of its own ([`lb_common::reply`]). The common one ends nothing,
//! and another came in the last second: it is translated and sent by what stands there ([`plain`]). Every other is attended
//! to ([`attend`], then [`deliver`]): it moves its connection on and asks for the way to the client anew. `ipvs-semantics.md`, sections 2.3, 5.2 and 5.6.
//!
//! What belongs to no connection is left to the kernel as it is: a real server's own conversations.

use core::mem::zeroed;

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as FibLookup},
    cty::c_void,
    helpers::generated::bpf_fib_lookup,
};
use lb_common::{
    connection::{ConnectionKey, Leg, flags as connection_flags},
    family::Address,
    hop::link_addresses,
    packet::{
        Fragment,
        ethernet::{self, Link},
        protocol,
        transport::{self, Ports},
    },
    reason::Reason,
    reply::{self, Reply, flags},
    server::{NextHop, Status, flags as server_flags},
    tcp::Direction,
};
use lb_ebpf::packet::{Packet, Room, merged};

use crate::{
    account,
    forward::SEGMENT_HEADERS,
    local,
    maps::{CONFIG, DEVICES, Family, HZ, SERVERS},
    nat::{self, End, Ends},
    outcome::Outcome,
    template, toa, track,
};

/// Makes the entry for the replies of a new connection that has no local port. `false`: there is no room, and so no connection; the sweep will notice
/// that it was counted.
#[inline(never)]
pub fn expect<F: Family>(key: &ConnectionKey<F::Address>, server: u32) -> bool {
    let Some(entry) = SERVERS.get(server) else { return false };
    // An older entry is of a connection to another virtual address, whose replies cannot be told from these.
    let expected = {
        let reply_key = reply::key(key, entry, key.client, key.ports.source());
        F::replies().insert(&reply_key, &Reply::new(key, server, 0), 0).is_ok()
    };
    if !expected {
        F::connections().remove(key);
    }
    expected
}

/// Deletes the entry for the replies of a connection that is deleted.
#[inline(never)]
pub fn forget<F: Family>(key: &ConnectionKey<F::Address>, leg: Leg) {
    let Some(entry) = SERVERS.get(leg.server()) else { return };
    let mut reply_key = reply::key(key, entry, key.client, key.ports.source());
    let local = leg.local();
    if local.is_some() {
        let Some(address) = local::address::<F>(local) else { return };
        reply_key.vip = address;
        reply_key.ports = Ports::new(reply_key.ports.source(), local.port());
    }
    if let Some(found) = F::replies().get_ptr(&reply_key)
        // SAFETY: an element of the map.
        && unsafe { (*found).vip == key.vip && (*found).client == key.client && (*found).ports == key.ports }
    {
        local::release::<F>(&reply_key);
    }
}

/// The way of a plain packet that may be a reply. If it needs more attention, the outcome says so.
#[inline(always)]
pub fn plain<P: Packet, F: Family>(
    packet: &mut P,
    key: &ConnectionKey<F::Address>,
    length: usize,
    event: u8,
) -> Result<Outcome, Reason> {
    let known = F::replies().get_ptr(key).ok_or(Reason::NotOurs)?;
    // SAFETY: an element of the map; it may become another reply's under our hands, but it stays memory.
    let known = unsafe { &*known };
    let idle = track::jiffies().wrapping_sub(known.last_seen);
    let undisturbed = idle < HZ.load() && known.flags & ATTENDED == ATTENDED && transport::is_quiet(event);
    let mtu = known.hop.mtu;
    let fits = length <= mtu as usize || packet.fits_in_segments(SEGMENT_HEADERS + F::HEADER, mtu);
    let reaches = packet.reaches(&known.hop, known.flags & flags::REDIRECT != 0);
    if !undisturbed || !fits || !reaches {
        return Ok(Outcome::reply::<F>());
    }
    let translated = if known.flags & flags::LOCAL == 0 {
        nat::translate_plain::<P, F>(packet, key, length, End::Source, &known.vip, known.ports.destination())
    } else {
        nat::translate_plain_both::<P, F>(packet, key, length, &known.vip, &known.client, known.reply_ports())
    };
    match translated {
        Err(Reason::TtlExpired) => return Ok(Outcome::reply::<F>()),
        translated => translated?,
    }
    account::reply(known.server, length);
    packet.address(&Link::plain(F::ETHERTYPE), &known.hop, Room::NONE)?;
    Ok(Outcome::verdict(packet.send(&known.hop)))
}

/// Flags of an entry whose reply needs no attention.
const ATTENDED: u8 = flags::SETTLED | flags::KNOWN;
/// The first half of the way of a packet that may be a reply and is not plain or not quiet: its connection is moved on and
/// the way to its client is made sure of. What follows is [`deliver`]'s, if the outcome says so.
#[inline(never)]
pub fn attend<P: Packet, F: Family>(context: *mut c_void) -> Outcome {
    found::<P, F>(context).unwrap_or_else(Outcome::left::<P>)
}

#[inline(always)]
fn found<P: Packet, F: Family>(context: *mut c_void) -> Result<Outcome, Reason> {
    let mut key = F::no_key();
    let event = identify::<P, F>(context, &mut key);
    // Who reports an error reports it to whom he quotes.
    if event == NOT_OURS || (event == NO_EVENT && !is_to::<P, F>(context, &key.vip)) {
        return Err(Reason::NotOurs);
    }
    let known = F::replies().get_ptr_mut(&key).ok_or(Reason::NotOurs)?;
    // SAFETY: an element of the map, as in `plain`.
    if unsafe { (*known).flags & flags::CROSS != 0 } {
        return Ok(Outcome::verdict(Outcome::NEXT_CROSS));
    }
    // SAFETY: as above.
    let (idle, known_way) = unsafe { (track::jiffies().wrapping_sub((*known).last_seen), (*known).flags & flags::KNOWN != 0) };
    if event != NO_EVENT && !move_on::<F>(&key, known, event) {
        return Err(Reason::NotOurs);
    }
    let verdict = if known_way && idle < HZ.load() { NO_VERDICT } else { find_way::<P, F>(context, known)? };
    Ok(Outcome::translate_reply::<F>(verdict))
}

/// In the place of a verdict: the entry's next hop sends the packet.
const NO_VERDICT: i32 = i32::MIN;

/// The second half: the packet is translated and sent, by the kernel's neighbour code if there is a verdict.
#[inline(never)]
pub fn deliver<P: Packet, F: Family>(context: *mut c_void, verdict: i32) -> Outcome {
    // SAFETY: the context is the kernel's own.
    let packet = &mut unsafe { P::view(context) };
    translate::<P, F>(packet, verdict).unwrap_or_else(Outcome::left::<P>)
}

#[inline(always)]
fn translate<P: Packet, F: Family>(packet: &mut P, verdict: i32) -> Result<Outcome, Reason> {
    let link = ethernet::parse(packet)?;
    let header = F::parse(packet, link.payload)?;
    let payload = merged(packet, &F::transport(packet, &header)?);
    let mut key = F::no_key();
    if identify::<P, F>(packet.context(), &mut key) == NOT_OURS {
        return Err(Reason::NotOurs);
    }
    let known = F::replies().get_ptr(&key).ok_or(Reason::NotOurs)?;
    // SAFETY: an element of the map, as in `plain`.
    let known = unsafe { &*known };
    if verdict == NO_VERDICT && !packet.reaches(&known.hop, known.flags & flags::REDIRECT != 0) {
        return Err(Reason::OtherDevice);
    }
    let mtu = known.hop.mtu;
    let too_big = header.length > mtu as usize && !packet.fits_in_segments(SEGMENT_HEADERS + F::HEADER, mtu);
    if too_big && !packet.takes_headers(&link) {
        return Err(Reason::Vlan);
    }
    let aged = F::age(packet, header.offset);
    if let Err(why) = aged.and(if too_big { Err(Reason::TooBig) } else { Ok(()) }) {
        // A packet that was of IPv4 has been looked at before ([`crate::cross`]); here is the wrong answer for it.
        let answerable = payload.protocol != F::ICMP && payload.fragment != Fragment::Later && F::unmapped(&key).is_none();
        return if answerable { Ok(Outcome::refused::<P, F>(why, mtu, &link, header.length)) } else { Err(why) };
    }
    account::reply(known.server, header.length);
    if payload.fragment == Fragment::First {
        track::remember_first_fragment::<P, F>(packet.context(), header.offset as u32, key.ports);
    }
    if names_clients(known.server) && payload.protocol == protocol::TCP && payload.fragment == Fragment::Whole {
        let end = (header.offset + header.length) as u32;
        let acknowledged = (&raw const known.acknowledged).cast_mut();
        if toa::reply::<P, F>(packet.context(), payload.offset as u32, end, acknowledged)? {
            named::<F>(known, key.protocol);
        }
    }
    // Without a local address, a reply's destination is the client already, and becomes what it is.
    let ends = Ends { source: &known.vip, destination: &known.client, ports: known.reply_ports() };
    nat::translate::<P, F>(packet.context(), &ends, false)?;
    // The kernel may have moved the packet.
    // SAFETY: the context is the kernel's own.
    *packet = unsafe { P::view(packet.context()) };
    packet.address(&link, &known.hop, Room::NONE)?;
    Ok(Outcome::verdict(if verdict == NO_VERDICT { packet.send(&known.hop) } else { verdict }))
}

/// The real server has been told who the client of this connection is: its state may settle.
#[inline(never)]
fn named<F: Family>(known: &Reply<F::Address>, protocol: u32) {
    if let Some(connection) = F::connections().find(&known.connection(protocol)) {
        // SAFETY: an element of the map, as in `plain`. Should it be another connection's by now, that one goes without the option.
        unsafe { (*connection).flags &= !connection_flags::UNNAMED };
    }
}

/// Whether a real server is told who its clients are.
#[inline(always)]
fn names_clients(server: u32) -> bool {
    SERVERS.get(server).is_some_and(|server| server.flags & server_flags::TOA != 0)
}

/// In the place of an event: the packet is about a connection, but none that moves it.
const NO_EVENT: u32 = 1 << 8;
/// In the place of an event: the packet can be no reply.
const NOT_OURS: u32 = 1 << 9;

/// Finds the key of a packet that may be a reply, or of the replies that an ICMP error may be about. Returns the packet's event
/// for the state machine. In a function of its own, for the sake of the stack.
#[inline(never)]
fn identify<P: Packet, F: Family>(context: *mut c_void, key: &mut ConnectionKey<F::Address>) -> u32 {
    // SAFETY: the context is the kernel's own.
    let packet = &unsafe { P::view(context) };
    match identity::<P, F>(packet) {
        Some((found, event)) => {
            *key = found;
            event
        }
        None => NOT_OURS,
    }
}

#[inline(always)]
fn identity<P: Packet, F: Family>(packet: &P) -> Option<(ConnectionKey<F::Address>, u32)> {
    let link = ethernet::parse(packet).ok()?;
    let header = F::parse(packet, link.payload).ok()?;
    let payload = merged(packet, &F::transport(packet, &header).ok()?);
    if payload.protocol == F::ICMP && payload.fragment == Fragment::Whole {
        // Routers on the way to the real server report, too: only the quote tells.
        let end = (header.offset + header.length) as u32;
        return track::quoted::<P, F>(packet, payload.offset as u32, end).ok().map(|key| (key, NO_EVENT));
    }
    let (ports, event) = if payload.fragment == Fragment::Later {
        (track::ports_of_first_fragment::<P, F>(packet.context(), header.offset as u32).ok()?, NO_EVENT)
    } else {
        let segment = transport::parse(packet, payload.offset, payload.protocol, header.offset + header.length).ok()?;
        (segment.ports, segment.event.into())
    };
    Some((ConnectionKey { client: header.source, vip: header.destination, ports, protocol: payload.protocol.into() }, event))
}

/// Whether a packet is addressed to somebody.
#[inline(never)]
fn is_to<P: Packet, F: Family>(context: *mut c_void, address: &F::Address) -> bool {
    // SAFETY: the context is the kernel's own.
    let packet = &unsafe { P::view(context) };
    let header = ethernet::parse(packet).and_then(|link| F::parse(packet, link.payload));
    header.is_ok_and(|header| header.destination == *address)
}

/// Moves the connection of a reply on. `false`: there is none any more.
#[inline(never)]
fn move_on<F: Family>(key: &ConnectionKey<F::Address>, known: *mut Reply<F::Address>, event: u32) -> bool {
    let Some(config) = CONFIG.get(0) else { return false };
    // SAFETY: elements of the maps, as in `plain`.
    unsafe {
        let protocol = key.protocol as u8;
        let connection = F::connections().find(&(*known).connection(key.protocol)).filter(|connection| {
            let connection = &**connection;
            let idle = track::jiffies().wrapping_sub(connection.last_seen);
            (*known).belongs(connection) && idle < track::lifetime(config, protocol, connection)
        });
        let Some(connection) = connection else { return false };
        // A removed server's connections are left to die, but it may say its last words.
        if SERVERS.get((*known).server).is_none_or(|server| server.status == Status::Removed as u8) {
            return true;
        }
        let before = *connection;
        // The first sight of the other direction.
        let side = track::SIDE & !connection_flags::NO_OUTPUT;
        let now = track::move_on(connection, protocol, Direction::Output, event as u8, side);
        let answers = protocol == protocol::UDP && before.flags & connection_flags::CONTROLLED != 0;
        if answers || track::establishes(&before, &*connection, protocol) {
            template::assure::<F>(&(*known).connection(key.protocol), before.server, before.prefix.into());
        }
        if answers {
            template::assure_call::<F>(&(*known).connection(key.protocol), before.server);
        }
        let settled = if now & connection_flags::SETTLED != 0 { flags::SETTLED } else { 0 };
        (*known).last_seen = track::jiffies();
        (*known).flags = (*known).flags & !flags::SETTLED | settled;
    }
    true
}

/// Asks the kernel for the way to a client, and notes it. A verdict means that the kernel's neighbour code sends the packet.
///
/// As if the director itself sent from the virtual address, so that rules about sources apply. At tc, the packet is then left to
/// the kernel's neighbour code even if the neighbour is known: so it learns that the neighbour is needed, and confirms it.
#[inline(never)]
fn find_way<P: Packet, F: Family>(context: *mut c_void, known: *mut Reply<F::Address>) -> Result<i32, Reason> {
    // SAFETY: the context is the kernel's own; integers and unions of integers; an element of the map, as in `plain`.
    unsafe {
        let packet = P::view(context);
        let mut lookup: FibLookup = zeroed();
        lookup.family = F::AF;
        lookup.ifindex = packet.interface();
        // Any length that fits: for its sake the kernel tells how much would.
        lookup.__bindgen_anon_1.tot_len = 1;
        lookup.__bindgen_anon_3.ipv6_src = (*known).vip.words();
        lookup.__bindgen_anon_4.ipv6_dst = (*known).client.words();
        let result = bpf_fib_lookup(context, &raw mut lookup, size_of::<FibLookup>() as i32, 0);
        let resolved = result == i64::from(BPF_FIB_LKUP_RET_SUCCESS);
        if !resolved && result != i64::from(BPF_FIB_LKUP_RET_NO_NEIGH) {
            return Err(Reason::NoWayBack);
        }
        if !resolved && !P::RESOLVES {
            return Err(Reason::Unresolved);
        }
        let hop = &mut (*known).hop;
        let (mut port, mut vlan, mut redirect) = (lookup.ifindex, 0, 0);
        let ifindex = lookup.ifindex;
        if let Some(device) = DEVICES.get_ptr(&ifindex) {
            port = (*device).port_ifindex;
            vlan = (*device).vlan;
            redirect = if (*device).redirects != 0 { flags::REDIRECT } else { 0 };
        }
        hop.ifindex = ifindex;
        hop.port_ifindex = port;
        hop.vlan = vlan;
        // Of a way whose neighbour is not known the kernel does not tell how much fits: it has to see for itself this time.
        hop.mtu = if resolved { lookup.__bindgen_anon_1.mtu_result } else { u16::MAX };
        hop.link = link_addresses(lookup.dmac, lookup.smac);
        let learnt = if resolved { flags::KNOWN } else { 0 } | redirect;
        (*known).flags = (*known).flags & !(flags::KNOWN | flags::REDIRECT) | learnt;
        if !P::RESOLVES {
            return Ok(NO_VERDICT);
        }
        let next_hop = NextHop { family: lookup.family.into(), address: lookup.__bindgen_anon_4.ipv6_dst, zero: 0 };
        Ok(packet.send_unresolved(ifindex, &next_hop))
    }
}
