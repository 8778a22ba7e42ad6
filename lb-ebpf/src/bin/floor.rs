//! Floors, and the harness that measures them beside the datapath.
//!
//! A floor is the smallest program that does a part of a director's work: what no director can go below. The bench
//! (`cargo xtask bench`) runs floors and the director's programs in one go and prints the ratio.
//!
//! `BPF_PROG_TEST_RUN` with a repeat count hands a program its own output again, so that a second round would see a packet
//! that was forwarded already. The `wrap` programs undo the change, walk through as many flows as asked for, and then
//! tail-call the program under test; their own cost is that of a run with `nothing` as the target.
//!
//! What a director's single steps cost, tell the programs of [`steps`].
//!
//! For whole packets there are a `source`, which fills live frames with the flows of a round and puts them on a wire, and the
//! `sink` at the end of the wires, which counts them.
//!
//! A floor sends in the cheapest way that its hook has: XDP by a verdict, tc, where there is no such verdict, by a redirect.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![allow(clippy::needless_pass_by_value, reason = "the macros of aya-ebpf hand contexts over by value")]
#![allow(clippy::needless_borrows_for_generic_args, reason = "keys and values by value would be copied once more on the stack")]
#![allow(missing_docs, reason = "the macros of aya-ebpf add functions of their own to each program")]
#![allow(
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "verdicts and lengths change sign at the border to the helpers"
)]

#[path = "floor/steps.rs"]
mod steps;

use aya_ebpf::{
    EbpfContext,
    bindings::xdp_action,
    helpers::generated::{bpf_redirect, bpf_xdp_adjust_head},
    macros::{classifier, map, xdp},
    maps::{Array, HashMap, PerCpuArray, ProgramArray},
    programs::{TcContext, XdpContext},
};
use lb_common::{
    checksum::gain,
    connection::{Connection, ConnectionKey},
    family::{Ipv4, Ipv6},
    floor::{Role, Round},
    packet::{
        Bytes, Ipv4Header, Ipv6Header, ethernet,
        ethernet::EthernetHeader,
        protocol,
        transport::{Ports, TcpHeader},
    },
    server::Server,
};
use lb_ebpf::packet::{Packet, TcBuffer, XdpFrame};

/// What the wrapper does in each round. Userspace writes it, the wrapper counts in it.
#[map]
static ROUND: Array<Round> = Array::with_max_entries(1, 0);
/// The program under test: 0 for XDP.
#[map]
static UNDER_TEST_XDP: ProgramArray = ProgramArray::with_max_entries(1, 0);
/// The program under test: 0 for tc.
#[map]
static UNDER_TEST_TC: ProgramArray = ProgramArray::with_max_entries(1, 0);
/// The floor's connections: tables of the same kind as the director's, and of the same size, which the bench chooses.
#[map]
static FLOOR_V4: HashMap<ConnectionKey<Ipv4>, Connection> = HashMap::with_max_entries(1 << 20, 0);
#[map]
static FLOOR_V6: HashMap<ConnectionKey<Ipv6>, Connection> = HashMap::with_max_entries(1 << 20, 0);
/// The floor's real servers.
#[map]
static FLOOR_SERVERS: Array<Server> = Array::with_max_entries(16, 0);

/// The device by which the source sends: its index.
#[map]
static WIRE: Array<u32> = Array::with_max_entries(1, 0);
/// How many frames have come to the sink.
#[map]
static ARRIVED: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

const TX: i32 = xdp_action::XDP_TX as i32;

/// The target of a calibration: what the harness itself costs.
#[xdp]
pub fn nothing_xdp(_context: XdpContext) -> u32 {
    TX as u32
}

/// The target of a calibration for tc.
#[classifier]
pub fn nothing_tc(_context: TcContext) -> i32 {
    TX
}

/// Nothing, but in a frame that has grown: half of what it takes more than `nothing` is what the wrapper takes to undo that.
#[xdp]
pub fn grown_xdp(context: XdpContext) -> u32 {
    // SAFETY: the context is the kernel's own; the bytes of a refusal are the same.
    unsafe { bpf_xdp_adjust_head(context.as_ptr().cast(), -(size_of::<Ipv4Header>() as i32)) };
    TX as u32
}

/// Parse, one hash hit, the next hop's MAC address, out.
#[xdp]
pub fn floor_xdp(context: XdpContext) -> u32 {
    // SAFETY: the context is the kernel's own.
    floor(&mut unsafe { XdpFrame::new(context.as_ptr()) }).map_or(xdp_action::XDP_PASS, |_| TX as u32)
}

/// The same at the tc hook.
#[classifier]
pub fn floor_tc(context: TcContext) -> i32 {
    // SAFETY: the context is the kernel's own.
    let buffer = &mut unsafe { TcBuffer::new(context.as_ptr()) };
    floor(buffer).map_or(TcBuffer::PASS, |server| buffer.send(&server.hop))
}

#[inline(always)]
fn floor<P: Packet>(packet: &mut P) -> Option<&'static Server> {
    const TCP_V4: usize = ethernet::HEADER + size_of::<Ipv4Header>();
    const TCP_V6: usize = ethernet::HEADER + size_of::<Ipv6Header>();
    let ethernet: EthernetHeader = packet.read(0)?;
    let known = if ethernet.ethertype == ethernet::IPV4.to_be() {
        packet.read::<TcpHeader>(TCP_V4)?;
        let ip: Ipv4Header = packet.read(ethernet::HEADER)?;
        let ports: Ports = packet.read(TCP_V4)?;
        if ip.version_length != 0x45 || ip.fragment & 0x3fff_u16.to_be() != 0 || !has_ports(ip.protocol) {
            return None;
        }
        hit(&FLOOR_V4, &ConnectionKey { client: ip.source, vip: ip.destination, ports, protocol: ip.protocol as u32 })?
    } else {
        packet.read::<TcpHeader>(TCP_V6)?;
        let ip: Ipv6Header = packet.read(ethernet::HEADER)?;
        let ports: Ports = packet.read(TCP_V6)?;
        if !has_ports(ip.next_header) {
            return None;
        }
        hit(&FLOOR_V6, &ConnectionKey { client: ip.source, vip: ip.destination, ports, protocol: ip.next_header as u32 })?
    };
    let server = FLOOR_SERVERS.get(known)?;
    packet.write(0, server.hop.link).ok()?;
    Some(server)
}

#[inline(always)]
const fn has_ports(protocol: u8) -> bool {
    protocol == protocol::TCP || protocol == protocol::UDP
}

/// The server of a connection; a connection that is not there yet is made, so that a first run fills the table.
#[inline(always)]
fn hit<K>(connections: &HashMap<K, Connection>, key: &K) -> Option<u32> {
    match connections.get_ptr(key) {
        // SAFETY: an element of the map.
        Some(known) => Some(unsafe { (*known).server }),
        None => connections.insert(key, Connection::default(), 0).ok().map(|()| 0),
    }
}

/// Undoes what the last round did to a frame, goes on to the next flow, and runs the XDP program under test.
#[xdp]
pub fn wrap_xdp(context: XdpContext) -> u32 {
    let Some(round) = ROUND.get_ptr_mut(0) else { return xdp_action::XDP_ABORTED };
    // SAFETY: an element of the array; the context is the kernel's own.
    unsafe {
        let frame = XdpFrame::view(context.as_ptr());
        // Opaque, or LLVM takes the wanted length from a pointer before it takes the difference of both.
        let grown = frame.opaque(frame.len()) as i32 - (*round).length as i32;
        if grown != 0 && bpf_xdp_adjust_head(context.as_ptr().cast(), grown) != 0 {
            return xdp_action::XDP_ABORTED;
        }
        if restore(&mut XdpFrame::view(context.as_ptr()), round).is_some() {
            UNDER_TEST_XDP.tail_call(&context, 0);
        }
    }
    xdp_action::XDP_ABORTED
}

/// The same for tc. Outer headers cannot be taken off here: only programs that change nothing but bytes can be measured.
#[classifier]
pub fn wrap_tc(context: TcContext) -> i32 {
    let Some(round) = ROUND.get_ptr_mut(0) else { return 0 };
    // SAFETY: an element of the array; the context is the kernel's own.
    unsafe {
        if restore(&mut TcBuffer::new(context.as_ptr()), round).is_some() {
            UNDER_TEST_TC.tail_call(&context, 0);
        }
    }
    0
}

/// Writes the template's headers, with the client of the next flow in them.
///
/// Word by word as they are read, and addresses, which a director may read by two words, by two: a processor cannot hand a load
/// what two stores have just written, and waits for the cache instead. No frame that a network card has brought would cost that.
#[inline(always)]
unsafe fn restore<P: Packet>(packet: &mut P, round: *mut Round) -> Option<()> {
    // SAFETY: the caller's element of the array.
    unsafe {
        packet.pointer::<u16>(0)?.write((*round).start);
        let flow = (*round).flow;
        (*round).flow = flow + 1;
        let (client, ports) = (*round).client(flow);
        let (role, is_v6) = ((*round).role, (*round).is_v6 != 0);
        let mut words = (*round).headers;
        let (source, destination) = if is_v6 { (8, 12) } else { (6, 7) };
        if role == Role::Source as u16 {
            words[source] = client;
        } else if role == Role::Destination as u16 {
            words[destination] = client;
        }
        let two = |at: usize| u64::from(words[at]) | u64::from(words[at + 1]) << 32;
        if is_v6 {
            packet.pointer::<[u32; 5]>(2)?.write([words[0], words[1], words[2], words[3], words[4]]);
            packet.pointer::<[u64; 4]>(22)?.write([two(5), two(7), two(9), two(11)]);
            packet.pointer::<[u32; 5]>(54)?.write((*round).more_headers);
        } else {
            packet.pointer::<[u32; 6]>(2)?.write([words[0], words[1], words[2], words[3], words[4], words[5]]);
            packet.pointer::<u64>(26)?.write(two(6));
            packet.pointer::<[u32; 5]>(34)?.write([words[8], words[9], words[10], words[11], words[12]]);
        }
        let behind = if is_v6 { 54 } else { 34 };
        if role == Role::Source as u16 {
            packet.write(behind, ports).ok()?;
        } else if role == Role::Destination as u16 {
            packet.write(behind, ports.reversed()).ok()?;
        } else {
            let (address, behind) = if is_v6 { (98, 102) } else { (58, 62) };
            packet.write(address, client).ok()?;
            packet.write(behind, ports.reversed()).ok()?;
        }
        Some(())
    }
}

/// Makes a live frame the next flow's packet, and sends it by the wire.
#[xdp]
pub fn source_xdp(context: XdpContext) -> u32 {
    let (Some(round), Some(wire)) = (ROUND.get_ptr_mut(0), WIRE.get(0)) else { return xdp_action::XDP_ABORTED };
    // SAFETY: an element of the array; the context is the kernel's own; the helper asks for nothing.
    unsafe {
        if fill(&mut XdpFrame::view(context.as_ptr()), round).is_none() {
            return xdp_action::XDP_ABORTED;
        }
        bpf_redirect(*wire, 0) as u32
    }
}

/// Writes the headers of a TCP segment over IPv4. Its checksums are right, because the kernel's own stack looks at them, and does less
/// for a segment that is broken.
#[inline(always)]
unsafe fn fill<P: Packet>(packet: &mut P, round: *mut Round) -> Option<()> {
    // SAFETY: the caller's element of the array.
    unsafe {
        let flow = (*round).flow;
        (*round).flow = flow + 1;
        let (client, ports) = (*round).client(flow);
        let mut words = (*round).headers;
        let before = [words[6], words[7], words[8]];
        if (*round).role == Role::Source as u16 {
            (words[6], words[8]) = (client, ports.word());
        } else {
            (words[7], words[8]) = (client, ports.reversed().word());
        }
        let gained = [0, 1, 2].map(|word| u64::from(words[6 + word]) + u64::from(!before[word]));
        let addresses = gained[0] + gained[1];
        // The header's checksum is the upper half of its word, as this architecture reads it, and the segment's the lower.
        words[5] = words[5] & 0xffff | u32::from(gain((words[5] >> 16) as u16, addresses)) << 16;
        words[12] = words[12] & 0xffff_0000 | u32::from(gain(words[12] as u16, addresses + gained[2]));
        packet.pointer::<[u32; 13]>(2)?.write(words);
        packet.pointer::<u16>(0)?.write((*round).start);
        Some(())
    }
}

/// Counts a frame, which ends here.
#[xdp]
pub fn sink_xdp(_context: XdpContext) -> u32 {
    arrived();
    xdp_action::XDP_DROP
}

/// The same at tc.
#[classifier]
pub fn sink_tc(_context: TcContext) -> i32 {
    arrived();
    TcBuffer::DROP
}

#[inline(always)]
fn arrived() {
    if let Some(count) = ARRIVED.get_ptr_mut(0) {
        // SAFETY: this CPU's element.
        unsafe { *count += 1 };
    }
}

lb_ebpf::object!();
