//! The sweep: deletes the connections that are over, and counts the others anew; then deletes the templates that are over and
//! have no connections. With IPVS's `expire_nodest_conn` both go as well if their real server was removed.
//!
//! Userspace begins it by `BPF_PROG_TEST_RUN`, and then reads the tables through iterators, one after another. The programs here
//! see each entry as the kernel passes it, so that millions of them never cross into userspace; what userspace reads is a byte now
//! and then, which means nothing but this: a read that has got its byte ends, and with it a slice of the walk.
//!
//! ```text
//! sweep                the clock is read, the report begins
//! sweep_ipv4           read, read, read … end of the table
//! sweep_ipv6           …
//! sweep_callers_…      after all connections: which calls have some
//! sweep_templates_…    a template lives as long as one of its connections does
//! sweep_calls_…        the same for those of calls
//! ```
//!
//! A slice ends after [`SLICE`] entries, or at the first one after a tick of the kernel's clock: in a large table with few entries it is
//! not these that take the time. Between two slices the kernel holds nothing: no lock, no read-side section of RCU, no CPU. A slice begins at the bucket where the
//! last one ended and passes over as many entries as that one had seen of it. Was one of those deleted meanwhile, another is not
//! seen by this walk. Nothing depends on every entry being seen every time: counters are corrected only if two walks agree.

use aya_ebpf::{
    cty::c_void,
    helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns, bpf_probe_read_kernel, bpf_seq_write},
    macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use lb_common::{
    call::{CallKey, Caller},
    config::SweepReport,
    connection::{Connection, ConnectionKey, flags},
    family::{Ipv4, Ipv6},
    packet::{V4, V6},
    template::{Template, TemplateKey},
};

use crate::{
    maps::{CONFIG, Family, HZ, SWEEP, SWEPT, SWEPT_KEY},
    reply,
    template::{self, Kind, OfCalls, OfClients},
    track,
};

/// Entries in a slice: what a CPU does in less than a tenth of a millisecond, even if each of them has to come from memory.
const SLICE: u64 = 256;

/// Begins a sweep. The report also tells the kernel's clocks.
#[raw_tracepoint]
pub fn sweep(_context: RawTracePointContext) -> i32 {
    // SAFETY: helpers without arguments.
    let (jiffies, monotonic_ns) = unsafe { (bpf_jiffies64(), bpf_ktime_get_ns()) };
    let report = SweepReport { jiffies, monotonic_ns, examined: 0, expired: 0, half_open: 0, passed: 0, slice: jiffies };
    let _ = SWEEP.set(0, &report, 0);
    0
}

/// What the kernel hands to an iterator of a map: an element, or nothing at the end of the table.
#[repr(C)]
struct Element<K, V> {
    meta: *const Meta,
    map: *const c_void,
    key: *const K,
    value: *const V,
}

/// The beginning of what the kernel says of an iteration.
#[repr(C)]
struct Meta {
    output: *mut c_void,
}

/// A program that the kernel runs for each element of a table. There is no macro for these.
macro_rules! iterator {
    ($name:ident, $element:ty, $visit:expr) => {
        #[unsafe(no_mangle)]
        #[unsafe(link_section = "iter/bpf_map_elem")]
        extern "C" fn $name(element: *const $element) -> i32 {
            // SAFETY: the kernel hands over a context of this form; of the map's elements it makes sure when the iterator is made.
            unsafe {
                let (key, value) = ((*element).key, (*element).value);
                if !key.is_null() && !value.is_null() {
                    $visit(key, value);
                    step((*element).meta);
                }
            }
            0
        }
    };
}

iterator!(sweep_ipv4, Element<ConnectionKey<Ipv4>, Connection>, visit::<V4>);
iterator!(sweep_ipv6, Element<ConnectionKey<Ipv6>, Connection>, visit::<V6>);
iterator!(sweep_callers_ipv4, Element<ConnectionKey<Ipv4>, Caller<Ipv4>>, visit_caller::<V4>);
iterator!(sweep_callers_ipv6, Element<ConnectionKey<Ipv6>, Caller<Ipv6>>, visit_caller::<V6>);
iterator!(sweep_templates_ipv4, Element<TemplateKey<Ipv4>, Template>, visit_template::<V4, OfClients>);
iterator!(sweep_templates_ipv6, Element<TemplateKey<Ipv6>, Template>, visit_template::<V6, OfClients>);
iterator!(sweep_calls_ipv4, Element<CallKey<Ipv4>, Template>, visit_template::<V4, OfCalls>);
iterator!(sweep_calls_ipv6, Element<CallKey<Ipv6>, Template>, visit_template::<V6, OfCalls>);

/// Ends the slice if it is long enough: whoever reads gets a byte.
///
/// # Safety
/// It is what the kernel says of this iteration.
#[inline(always)]
unsafe fn step(meta: *const Meta) {
    let Some(report) = SWEEP.get_ptr_mut(0) else { return };
    // SAFETY: the caller's promise; an element of the map, which one sweep at a time writes.
    unsafe {
        (*report).passed += 1;
        let jiffies = bpf_jiffies64();
        if (*report).passed.is_multiple_of(SLICE) || jiffies != (*report).slice {
            (*report).slice = jiffies;
            let byte = 0_u8;
            bpf_seq_write((*meta).output.cast(), (&raw const byte).cast(), 1);
        }
    }
}

/// Looks at one connection.
///
/// # Safety
/// Both are of an element of the map.
#[inline(always)]
unsafe fn visit<F: Family>(key: *const ConnectionKey<F::Address>, connection: *const Connection) {
    let (Some(config), Some(report)) = (CONFIG.get(0), SWEEP.get_ptr_mut(0)) else { return };
    // SAFETY: the caller's promise; an element of the map. What is handed on has to be a copy.
    unsafe {
        (*report).examined += 1;
        let (key, known) = (*key, *connection);
        let idle = ((*report).jiffies as u32).wrapping_sub(known.last_seen);
        // A connection that was seen after the sweep began has a negative idle time.
        let over = (idle as i32) >= 0 && idle >= track::lifetime(config, key.protocol as u8, &known);
        if over || known.flags & flags::LEAVING != 0 || track::is_forsaken(config, known.server) {
            if F::connections().remove(&key) {
                track::forget(&known);
                if known.flags & flags::MASQUERADED != 0 {
                    reply::forget::<F>(&key, known.leg());
                }
                (*report).expired += 1;
            }
            return;
        }
        (*report).half_open += u64::from(known.half_open);
        if let Some(counter) = SWEPT.get_ptr_mut(known.server) {
            // One sweep at a time: others only read, and a CPU that adds atomically waits for all that it has asked of memory.
            *counter = (*counter).wrapping_add(track::share(&known));
        }
        template::meet::<F>(&key, &known);
    }
}

/// Looks at the call of one connection, and forgets it if there is no such connection.
///
/// # Safety
/// Both are of an element of the map.
#[inline(always)]
unsafe fn visit_caller<F: Family>(key: *const ConnectionKey<F::Address>, caller: *const Caller<F::Address>) {
    let Some(report) = SWEEP.get_ptr_mut(0) else { return };
    // SAFETY: the caller's promise; an element of the map. What is handed on has to be a copy.
    unsafe {
        let (key, since) = (*key, (*caller).since);
        // The connection begins after its call was read.
        let idle = ((*report).jiffies as u32).wrapping_sub(since) as i32;
        if !template::meet_caller::<F>(&key) && idle > HZ.load() as i32 {
            let _ = F::callers().remove(&key);
        }
    }
}

/// Looks at one template.
///
/// # Safety
/// The key is of an element of the map.
#[inline(always)]
unsafe fn visit_template<F: Family, K: Kind<F>>(key: *const K::Key, _template: *const Template) {
    let (Some(config), Some(report), Some(copy)) = (CONFIG.get(0), SWEEP.get_ptr(0), SWEPT_KEY.get_ptr_mut(0)) else { return };
    let copy = copy.cast::<K::Key>();
    // SAFETY: the caller's promise; elements of the maps. What is handed on has to be a copy, for which the stack may be too small, and what
    // is changed the element itself. The kernel copies what LLVM would copy by way of the stack.
    unsafe {
        if bpf_probe_read_kernel(copy.cast(), size_of::<K::Key>() as u32, key.cast()) != 0 {
            return;
        }
        if let Some(known) = K::table().get_ptr_mut(&*copy) {
            template::expire::<F, K>(config, copy, known, (*report).jiffies as u32);
        }
    }
}
