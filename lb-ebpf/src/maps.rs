//! The maps: who writes, who reads, how big, and what happens when they are full.
//!
//! Sizes are defaults; userspace may load other ones. Array elements are addressed by the indices that userspace deals.

use core::cell::UnsafeCell;

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, RingBuf},
};
use lb_common::{
    call::{CallKey, Caller},
    checksum,
    config::{Config, SweepReport},
    connection::{ConnectionKey, FragmentKey},
    family::{Ipv4, Ipv6},
    filter,
    flood::word,
    hop::Device,
    local::{LocalAddress, Pool, PoolKey},
    locality::{Destination, DestinationKey},
    mark,
    packet::{Ipv4Header, Ipv6Header, Network, V4, V6, ethernet, mapped::is_mapped, transport::Ports},
    reason::Reason,
    reply::Reply,
    schedule::{Hand, Pair},
    server::{NextHop, Server},
    service::{Service, ServiceKey},
    statistics::Statistics,
    template::{Scope, Template, TemplateKey},
};
use lb_ebpf::packet::{Packet, apart};

use crate::{atomic, local::Claim, locality::Case, sip::Inquiry, table::Connections, template::Arrival};

/// `BPF_F_MMAPABLE`: userspace reads and writes the array without system calls.
const MMAPABLE: u32 = 1 << 10;
const SERVICE_COUNT: u32 = 1 << 16;
/// More than services: a mark rule takes a key for each port.
const SERVICE_KEY_COUNT: u32 = 1 << 17;
const NETWORK_COUNT: u32 = 1 << 16;
const SERVER_COUNT: u32 = 1 << 17;
const CONNECTION_COUNT: u32 = 1 << 20;
const CALL_COUNT: u32 = 1 << 17;
const FRAGMENT_COUNT: u32 = 1 << 14;
const DEVICE_COUNT: u32 = 1 << 12;
const LOCAL_COUNT: u32 = 1 << 16;
const DESTINATION_COUNT: u32 = 1 << 15;
/// A power of two.
pub const HAND_COUNT: u32 = 1 << 8;

/// Kernel clock ticks in a second; userspace writes it before it loads the programs.
#[unsafe(no_mangle)]
pub static HZ: Global<u32> = Global::new(250);

/// How many picks a CPU takes from a service's cursor at once; userspace writes it before it loads the programs.
#[unsafe(no_mangle)]
pub static PICKS_AT_ONCE: Global<u32> = Global::new(1);

/// The picks that this CPU has in hand, if it takes more than one at once. Services share them by the end of their number: who finds
/// another's puts them away.
#[map]
pub static HANDS: PerCpuArray<Hand> = PerCpuArray::with_max_entries(HAND_COUNT, 0);

/// Settings. Userspace writes, the slow paths read.
#[map]
pub static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// One bit for each hashed virtual address, and a word of exceptions. Userspace writes, every packet reads. New connections by a
/// mark add their destinations, until userspace writes anew.
///
/// Not a map of its own but a global variable (in the map `.bss`), because then its address stands in the program: no
/// look-up, no call, no check for null. So each loaded program has a filter of its own, which is filled before it is
/// attached.
#[unsafe(no_mangle)]
pub static FILTER: Filter = Filter(UnsafeCell::new([0; filter::LENGTH]));

/// The same for addresses of masqueraded real servers (in the map `.bss.sources`). Packets read that are to no virtual address.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".bss.sources")]
pub static SOURCES: Filter = Filter(UnsafeCell::new([0; filter::LENGTH]));

/// See [`FILTER`].
#[repr(transparent)]
pub struct Filter(UnsafeCell<[u64; filter::LENGTH]>);

// SAFETY: programs read it word by word, and set bits atomically.
unsafe impl Sync for Filter {}

impl Filter {
    /// The word at an index, which wraps.
    #[inline(always)]
    pub fn word(&self, index: u32) -> u64 {
        // SAFETY: within the array by the mask; volatile, because others write it.
        unsafe { self.0.get().cast::<u64>().add((index & (filter::WORDS - 1)) as usize).read_volatile() }
    }

    /// Sets bits of the word at an index, which wraps.
    #[inline(always)]
    pub fn set(&self, index: u32, bits: u64) {
        // SAFETY: as above, and atomic.
        unsafe { atomic::or(self.0.get().cast::<u64>().add((index & (filter::WORDS - 1)) as usize), bits) };
    }

    /// Whether there is one of these [exceptions](filter::exceptions).
    #[inline(always)]
    pub fn excepts<F: Family>(&self, exceptions: u64) -> bool {
        let exceptions = filter::exceptions::of(F::ETHERTYPE == ethernet::IPV6, exceptions);
        // SAFETY: the last word; volatile as above.
        unsafe { self.0.get().cast::<u64>().add(filter::WORDS as usize).read_volatile() & exceptions != 0 }
    }
}

/// Virtual services, by address and by mark. Userspace writes, new connections read.
#[map]
static SERVICES_V4: HashMap<ServiceKey<Ipv4>, Service> = HashMap::with_max_entries(SERVICE_KEY_COUNT, BPF_F_NO_PREALLOC);
#[map]
static SERVICES_V6: HashMap<ServiceKey<Ipv6>, Service> = HashMap::with_max_entries(SERVICE_KEY_COUNT, BPF_F_NO_PREALLOC);

/// For IPv4 and IPv6, the device at which packets have all marks that a firewall gives them, if new connections wait for those; 0: none
/// waits. Userspace writes, new connections of services by address read.
#[map]
pub static AFTER_MARKS: Array<u32> = Array::with_max_entries(2, 0);

/// The marks of packets to networks, and to all ports of an address. Userspace writes, new connections read if the filter's
/// last word says so.
#[map]
static NETWORKS_V4: LpmTrie<mark::Destination<Ipv4>, u32> = LpmTrie::with_max_entries(NETWORK_COUNT, BPF_F_NO_PREALLOC);
#[map]
static NETWORKS_V6: LpmTrie<mark::Destination<Ipv6>, u32> = LpmTrie::with_max_entries(NETWORK_COUNT, BPF_F_NO_PREALLOC);

/// Where each service's run of picks stands: a [`lb_common::schedule::Pointer`] as one word. Userspace publishes, new
/// connections read.
#[map]
pub static SCHEDULES: Array<u64> = Array::with_max_entries(SERVICE_COUNT, MMAPABLE);

/// The same for the table that each service has for flood mode. Userspace publishes; in that mode, new connections read.
#[map]
pub static FLOODS: Array<u64> = Array::with_max_entries(SERVICE_COUNT, MMAPABLE);

/// What flood mode goes by: see [`lb_common::flood::word`]. New connections and the ends of connections write, userspace reads, and
/// corrects what has drifted.
#[map]
pub static FLOOD: Array<u64> = Array::with_max_entries(word::COUNT, MMAPABLE);

/// What each CPU has not added to the count of half-open connections yet (signed). The same write, userspace reads.
#[map]
pub static HALF_OPEN: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// How many picks each service has dealt (the low 32 bits). New connections advance it, userspace reads.
#[map]
pub static CURSORS: Array<u64> = Array::with_max_entries(SERVICE_COUNT, MMAPABLE);

/// All runs of picks. Userspace writes, new connections read.
#[map]
pub static RUNS: Array<Pair> = Array::with_max_entries(1 << 21, MMAPABLE);

/// Real servers. Userspace writes, every packet of a connection reads. Can be mapped, because then each entry is a cache line
/// (`docs/decisions/entries-on-cache-lines.md`).
#[map]
pub static SERVERS: Array<Server> = Array::with_max_entries(SERVER_COUNT, MMAPABLE);

/// Next hops of real servers whose MAC address is not known yet. Userspace writes, tc reads.
#[map]
pub static NEXT_HOPS: Array<NextHop> = Array::with_max_entries(SERVER_COUNT, 0);

/// Live connection counters of real servers: [`lb_common::server::Counters`]. Changes of connections write, userspace
/// reads.
#[map]
pub static COUNTERS: Array<u64> = Array::with_max_entries(SERVER_COUNT, MMAPABLE);

/// How many connections a real server had in the moment when one took the place of another. Such changes of connections
/// write, userspace takes it out (0: none).
#[map]
pub static PEAKS: Array<u64> = Array::with_max_entries(SERVER_COUNT, MMAPABLE);

/// Whether the daemon sleeps until `COUNTERS` or `CURSORS` change: 1 or 0. Userspace sets it, the first change clears it.
#[map]
pub static SLEEPING: Array<u64> = Array::with_max_entries(1, MMAPABLE);

/// What wakes the daemon. The change that finds it sleeping writes a word, which means nothing; userspace takes it out.
#[map]
pub static BELL: RingBuf = RingBuf::with_byte_size(4096, 0);

/// For each [`lb_common::config::SweptTable`], whether it has got entries since the sweep last looked: 1 or 0. Whoever inserts one
/// sets it, userspace clears it.
#[map]
pub static NEWCOMERS: Array<u64> = Array::with_max_entries(8, MMAPABLE);

/// The sweep's recount of `COUNTERS`. The sweep adds, userspace clears and compares.
#[map]
pub static SWEPT: Array<u64> = Array::with_max_entries(SERVER_COUNT, MMAPABLE);

/// The template's key that the sweep has at hand, of any kind: the longest is that of an IPv6 call.
#[map]
pub static SWEPT_KEY: Array<[u32; 73]> = Array::with_max_entries(1, 0);

/// What the locality modes must know of real servers: [`lb_common::locality::Standing`] as one word. Userspace writes, new
/// connections of such services read.
#[map]
pub static STANDINGS: Array<u64> = Array::with_max_entries(SERVER_COUNT, MMAPABLE);

/// Traffic of real servers. Every forwarded packet writes, userspace reads.
#[map]
pub static STATISTICS: PerCpuArray<Statistics> = PerCpuArray::with_max_entries(SERVER_COUNT, 0);

/// Packets that left without being forwarded, by [`Reason`]. Each of them writes, userspace reads.
#[map]
pub static REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Reason::ALL.len() as u32, 0);

/// Connections. New connections insert, and userspace what other directors tell; the sweep deletes. Full: new connections are refused and counted; none that
/// exists is ever pushed out.
#[map]
static CONNECTIONS_V4: Connections<Ipv4> = Connections::with_capacity(CONNECTION_COUNT);
#[map]
static CONNECTIONS_V6: Connections<Ipv6> = Connections::with_capacity(CONNECTION_COUNT);

/// What the replies of masqueraded connections need. Who inserts a connection inserts it, replies read and write, whoever deletes the
/// connection deletes. Takes memory for what is in it only; as large as the connection tables, so never full before them.
#[map]
static REPLIES_V4: HashMap<ConnectionKey<Ipv4>, Reply<Ipv4>> = HashMap::with_max_entries(CONNECTION_COUNT, BPF_F_NO_PREALLOC);
#[map]
static REPLIES_V6: HashMap<ConnectionKey<Ipv6>, Reply<Ipv6>> = HashMap::with_max_entries(CONNECTION_COUNT, BPF_F_NO_PREALLOC);

/// Templates. New connections of persistent services insert and change, and userspace what other directors tell; the sweep deletes. Takes memory for what is in it
/// only. Full: clients that have none are refused and counted.
#[map]
static TEMPLATES_V4: HashMap<TemplateKey<Ipv4>, Template> = HashMap::with_max_entries(CONNECTION_COUNT, BPF_F_NO_PREALLOC);
#[map]
static TEMPLATES_V6: HashMap<TemplateKey<Ipv6>, Template> = HashMap::with_max_entries(CONNECTION_COUNT, BPF_F_NO_PREALLOC);

/// The same of calls, for services with `--pe sip`.
#[map]
static CALLS_V4: HashMap<CallKey<Ipv4>, Template> = HashMap::with_max_entries(CALL_COUNT, BPF_F_NO_PREALLOC);
#[map]
static CALLS_V6: HashMap<CallKey<Ipv6>, Template> = HashMap::with_max_entries(CALL_COUNT, BPF_F_NO_PREALLOC);

/// The calls of connections. Whoever finds a connection's call inserts, the sweep deletes. Takes memory for what is in it only. Full: as
/// above.
#[map]
static CALLERS_V4: HashMap<ConnectionKey<Ipv4>, Caller<Ipv4>> = HashMap::with_max_entries(CALL_COUNT, BPF_F_NO_PREALLOC);
#[map]
static CALLERS_V6: HashMap<ConnectionKey<Ipv6>, Caller<Ipv6>> = HashMap::with_max_entries(CALL_COUNT, BPF_F_NO_PREALLOC);

/// The message in which each CPU looks for a call.
#[map]
pub static INQUIRIES: PerCpuArray<Inquiry> = PerCpuArray::with_max_entries(1, 0);

/// How the templates of real servers' connections are found. Userspace writes, connections of persistent services read that
/// are established, and the sweep.
#[map]
pub static SCOPES: Array<Scope> = Array::with_max_entries(SERVER_COUNT, 0);

/// How many templates lead to each real server. Whoever changes a template writes, userspace reads.
#[map]
pub static PERSISTED: Array<u64> = Array::with_max_entries(SERVER_COUNT, MMAPABLE);

/// The new connection of a persistent service that each CPU has at hand.
#[map]
pub static ARRIVALS: PerCpuArray<Arrival> = PerCpuArray::with_max_entries(1, 0);
/// Local addresses, by index, IPv4 mapped. Userspace writes each once, packets of FULLNAT connections read.
#[map]
pub static LOCALS: Array<LocalAddress> = Array::with_max_entries(LOCAL_COUNT, 0);

/// The pools of local addresses. Userspace writes, new FULLNAT connections read.
#[map]
pub static POOLS: HashMap<PoolKey, Pool> = HashMap::with_max_entries(SERVICE_COUNT, BPF_F_NO_PREALLOC);

/// When this CPU last searched long for a local port, in jiffies.
#[map]
pub static SEARCHES: PerCpuArray<u32> = PerCpuArray::with_max_entries(1, 0);

/// How many CPUs would take a claim back that was left over.
#[map]
pub static TAKING_BACK: Array<u64> = Array::with_max_entries(1, 0);

/// What this CPU tries to claim.
#[map]
static CLAIMS_V4: PerCpuArray<Claim<Ipv4>> = PerCpuArray::with_max_entries(1, 0);
#[map]
static CLAIMS_V6: PerCpuArray<Claim<Ipv6>> = PerCpuArray::with_max_entries(1, 0);

/// The network devices, by index. Userspace writes, whoever looks for a way back to a client reads.
#[map]
pub static DEVICES: HashMap<u32, Device> = HashMap::with_max_entries(DEVICE_COUNT, BPF_F_NO_PREALLOC);

/// The ports of fragmented packets that are under way. First fragments insert, later ones read. Full: the oldest go.
#[map]
static FRAGMENTS_V4: LruHashMap<FragmentKey<Ipv4>, Ports> = LruHashMap::with_max_entries(FRAGMENT_COUNT, 0);
#[map]
static FRAGMENTS_V6: LruHashMap<FragmentKey<Ipv6>, Ports> = LruHashMap::with_max_entries(FRAGMENT_COUNT, 0);

/// Destinations, and the real servers that they went to. New connections of locality services read and write, userspace
/// deletes those that nobody asks for. Full: the oldest go.
#[map]
static DESTINATIONS_V4: LruHashMap<DestinationKey<Ipv4>, Destination> = LruHashMap::with_max_entries(DESTINATION_COUNT, 0);
#[map]
static DESTINATIONS_V6: LruHashMap<DestinationKey<Ipv6>, Destination> = LruHashMap::with_max_entries(DESTINATION_COUNT, 0);

/// What each CPU keeps in mind while it looks for a destination's real server.
#[map]
pub static CASES: PerCpuArray<Case> = PerCpuArray::with_max_entries(1, 0);

/// What the last run of the sweep found.
#[map]
pub static SWEEP: Array<SweepReport> = Array::with_max_entries(1, 0);

/// ICMP errors that this CPU has sent in the present second: when it began (jiffies), and how many.
#[map]
pub static ANSWERS: PerCpuArray<[u32; 2]> = PerCpuArray::with_max_entries(1, 0);

/// What this CPU has left to the program for translation: an outcome.
#[map]
pub static DEFERRED: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// The programs that others call last, for each hook. Userspace writes.
#[map]
pub static XDP_NEXT: ProgramArray = ProgramArray::with_max_entries(4, 0);
#[map]
pub static TC_NEXT: ProgramArray = ProgramArray::with_max_entries(4, 0);

/// Their places.
pub mod next {
    /// What looks at odd packets.
    pub const ODD: u32 = 0;
    /// What translates. Loaded for the first real server that needs it.
    pub const TRANSLATE: u32 = 1;
    /// What makes packets of the other version. Loaded for the first real server of IPv4 that has clients of IPv6.
    pub const CROSS: u32 = 2;
    /// What reads the Call-ID of SIP messages. Loaded for the first service that wants that.
    pub const SIP: u32 = 3;
}

/// A family's own maps.
pub trait Family: Network {
    fn services() -> &'static HashMap<ServiceKey<Self::Address>, Service>;
    fn networks() -> &'static LpmTrie<mark::Destination<Self::Address>, u32>;
    fn connections() -> &'static Connections<Self::Address>;
    fn replies() -> &'static HashMap<ConnectionKey<Self::Address>, Reply<Self::Address>>;
    fn claims() -> &'static PerCpuArray<Claim<Self::Address>>;
    fn fragments() -> &'static LruHashMap<FragmentKey<Self::Address>, Ports>;
    fn templates() -> &'static HashMap<TemplateKey<Self::Address>, Template>;
    fn calls() -> &'static HashMap<CallKey<Self::Address>, Template>;
    fn callers() -> &'static HashMap<ConnectionKey<Self::Address>, Caller<Self::Address>>;
    /// The key of nothing, to be filled in.
    fn no_key() -> ConnectionKey<Self::Address>;
    fn destinations() -> &'static LruHashMap<DestinationKey<Self::Address>, Destination>;
    /// The same key in IPv4, if it is mapped.
    fn unmapped(key: &ConnectionKey<Self::Address>) -> Option<ConnectionKey<Ipv4>>;
    /// Takes one off the time to live of the packet whose header begins at `offset`, if there is more than one left.
    fn age<P: Packet>(packet: &mut P, offset: usize) -> Result<(), Reason>;
    /// The same for a packet whose addresses are about to change, and with them the header's checksum, if it has one: by what their
    /// words gain, not folded.
    fn age_and_gain<P: Packet>(packet: &mut P, offset: usize, gained: u64) -> Result<(), Reason>;
}

impl Family for V4 {
    #[inline(always)]
    fn services() -> &'static HashMap<ServiceKey<Ipv4>, Service> {
        &SERVICES_V4
    }

    #[inline(always)]
    fn networks() -> &'static LpmTrie<mark::Destination<Ipv4>, u32> {
        &NETWORKS_V4
    }

    #[inline(always)]
    fn connections() -> &'static Connections<Ipv4> {
        &CONNECTIONS_V4
    }

    #[inline(always)]
    fn no_key() -> ConnectionKey<Ipv4> {
        ConnectionKey { client: 0, vip: 0, ports: Ports::new(0, 0), protocol: 0 }
    }

    #[inline(always)]
    fn unmapped(_key: &ConnectionKey<Ipv4>) -> Option<ConnectionKey<Ipv4>> {
        None
    }

    #[inline(always)]
    fn replies() -> &'static HashMap<ConnectionKey<Ipv4>, Reply<Ipv4>> {
        &REPLIES_V4
    }

    #[inline(always)]
    fn claims() -> &'static PerCpuArray<Claim<Ipv4>> {
        &CLAIMS_V4
    }

    #[inline(always)]
    fn fragments() -> &'static LruHashMap<FragmentKey<Ipv4>, Ports> {
        &FRAGMENTS_V4
    }

    #[inline(always)]
    fn templates() -> &'static HashMap<TemplateKey<Ipv4>, Template> {
        &TEMPLATES_V4
    }

    #[inline(always)]
    fn calls() -> &'static HashMap<CallKey<Ipv4>, Template> {
        &CALLS_V4
    }

    #[inline(always)]
    fn callers() -> &'static HashMap<ConnectionKey<Ipv4>, Caller<Ipv4>> {
        &CALLERS_V4
    }

    #[inline(always)]
    fn destinations() -> &'static LruHashMap<DestinationKey<Ipv4>, Destination> {
        &DESTINATIONS_V4
    }

    #[inline(always)]
    fn age<P: Packet>(packet: &mut P, offset: usize) -> Result<(), Reason> {
        // Time to live, protocol and checksum stand in one word, the first of them lowest: one load, one store.
        let word = packet.pointer::<u32>(offset + Ipv4Header::TTL).ok_or(Reason::Malformed)?;
        // SAFETY: `pointer` checked the bounds.
        unsafe {
            let old = u32::from_le(word.read());
            if old & 0xff <= 1 {
                return Err(apart(Reason::TtlExpired));
            }
            // RFC 1624 for a word whose high byte lost one: the checksum gains it, with the carry around the end.
            let carry = if old >= 0xfffe_0000 { 0x1_0000 } else { 0 };
            word.write(old.wrapping_add(0x1_0000 - 1).wrapping_add(carry).to_le());
        }
        Ok(())
    }

    #[inline(always)]
    fn age_and_gain<P: Packet>(packet: &mut P, offset: usize, gained: u64) -> Result<(), Reason> {
        /// What a word gains that loses one.
        const LOST_ONE: u64 = 0xfffe;
        let word = packet.pointer::<u32>(offset + Ipv4Header::TTL).ok_or(Reason::Malformed)?;
        // SAFETY: `pointer` checked the bounds.
        unsafe {
            let old = u32::from_le(word.read());
            if old & 0xff <= 1 {
                return Err(apart(Reason::TtlExpired));
            }
            let checksum = checksum::gain((old >> 16) as u16, gained + LOST_ONE);
            word.write(((u32::from(checksum) << 16) | ((old & 0xffff) - 1)).to_le());
        }
        Ok(())
    }
}

impl Family for V6 {
    #[inline(always)]
    fn services() -> &'static HashMap<ServiceKey<Ipv6>, Service> {
        &SERVICES_V6
    }

    #[inline(always)]
    fn networks() -> &'static LpmTrie<mark::Destination<Ipv6>, u32> {
        &NETWORKS_V6
    }

    #[inline(always)]
    fn connections() -> &'static Connections<Ipv6> {
        &CONNECTIONS_V6
    }

    #[inline(always)]
    fn no_key() -> ConnectionKey<Ipv6> {
        ConnectionKey { client: [0; 4], vip: [0; 4], ports: Ports::new(0, 0), protocol: 0 }
    }

    #[inline(always)]
    fn unmapped(key: &ConnectionKey<Ipv6>) -> Option<ConnectionKey<Ipv4>> {
        let unmapped = ConnectionKey { client: key.client[3], vip: key.vip[3], ports: key.ports, protocol: key.protocol };
        (is_mapped(&key.client) && is_mapped(&key.vip)).then_some(unmapped)
    }

    #[inline(always)]
    fn replies() -> &'static HashMap<ConnectionKey<Ipv6>, Reply<Ipv6>> {
        &REPLIES_V6
    }

    #[inline(always)]
    fn claims() -> &'static PerCpuArray<Claim<Ipv6>> {
        &CLAIMS_V6
    }

    #[inline(always)]
    fn fragments() -> &'static LruHashMap<FragmentKey<Ipv6>, Ports> {
        &FRAGMENTS_V6
    }

    #[inline(always)]
    fn templates() -> &'static HashMap<TemplateKey<Ipv6>, Template> {
        &TEMPLATES_V6
    }

    #[inline(always)]
    fn calls() -> &'static HashMap<CallKey<Ipv6>, Template> {
        &CALLS_V6
    }

    #[inline(always)]
    fn callers() -> &'static HashMap<ConnectionKey<Ipv6>, Caller<Ipv6>> {
        &CALLERS_V6
    }

    #[inline(always)]
    fn destinations() -> &'static LruHashMap<DestinationKey<Ipv6>, Destination> {
        &DESTINATIONS_V6
    }

    #[inline(always)]
    fn age<P: Packet>(packet: &mut P, offset: usize) -> Result<(), Reason> {
        let header = packet.pointer::<Ipv6Header>(offset).ok_or(Reason::Malformed)?;
        // SAFETY: `pointer` checked the bounds.
        unsafe {
            let hop_limit = (*header).hop_limit;
            if hop_limit <= 1 {
                return Err(apart(Reason::TtlExpired));
            }
            (*header).hop_limit = hop_limit - 1;
        }
        Ok(())
    }

    #[inline(always)]
    fn age_and_gain<P: Packet>(packet: &mut P, offset: usize, _gained: u64) -> Result<(), Reason> {
        Self::age(packet, offset)
    }
}
