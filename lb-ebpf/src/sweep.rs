//! The sweep: deletes the connections that are over, and counts the others anew; then deletes the templates that are over and
//! have no connections. With IPVS's `expire_nodest_conn` both go as well if their real server was removed.
//!
//! Userspace runs it by `BPF_PROG_TEST_RUN`; it is attached to nothing. It walks the tables within the kernel, so that
//! millions of entries never cross into userspace.

use aya_ebpf::{
    cty::c_void,
    helpers::generated::{bpf_for_each_map_elem, bpf_jiffies64, bpf_ktime_get_ns},
    macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use lb_common::{
    config::SweepReport,
    connection::{Connection, ConnectionKey, flags},
    packet::{V4, V6},
    template::{Template, TemplateKey},
};

use crate::{
    atomic,
    maps::{CONFIG, Family, SWEEP, SWEPT},
    reply, template, track,
};

/// The walk through all tables.
#[raw_tracepoint]
pub fn sweep(_context: RawTracePointContext) -> i32 {
    // SAFETY: helpers without arguments.
    let (jiffies, monotonic_ns) = unsafe { (bpf_jiffies64(), bpf_ktime_get_ns()) };
    let mut report = SweepReport { jiffies, monotonic_ns, examined: 0, expired: 0, half_open: 0 };
    walk::<V4>(&mut report);
    walk::<V6>(&mut report);
    walk_templates::<V4>(&mut report);
    walk_templates::<V6>(&mut report);
    let _ = SWEEP.set(0, &report, 0);
    0
}

#[inline(always)]
fn walk<F: Family>(report: &mut SweepReport) {
    // SAFETY: `visit` takes what the kernel hands to a callback for this table, and the report as its context.
    unsafe { F::connections().walk(visit::<F> as *mut c_void, core::ptr::from_mut(report).cast()) };
}

#[inline(always)]
fn walk_templates<F: Family>(report: &mut SweepReport) {
    let map = core::ptr::from_ref(F::templates()).cast_mut().cast::<c_void>();
    // SAFETY: as above.
    unsafe { bpf_for_each_map_elem(map, visit_template::<F> as *mut c_void, core::ptr::from_mut(report).cast(), 0) };
}

/// Looks at one connection.
unsafe extern "C" fn visit<F: Family>(
    _map: *mut c_void,
    key: *const ConnectionKey<F::Address>,
    connection: *const Connection,
    report: *mut SweepReport,
) -> i64 {
    let Some(config) = CONFIG.get(0) else { return 1 };
    // SAFETY: the kernel hands over an element of the map, and the context that `walk` gave it.
    unsafe {
        (*report).examined += 1;
        let known = *connection;
        let idle = ((*report).jiffies as u32).wrapping_sub(known.last_seen);
        // A connection that was seen after the sweep began has a negative idle time.
        let over = (idle as i32) >= 0 && idle >= track::lifetime(config, (*key).protocol as u8, &known);
        if over || known.flags & flags::LEAVING != 0 || track::is_forsaken(config, known.server) {
            if F::connections().remove(&*key) {
                track::forget(&known);
                if known.flags & flags::MASQUERADED != 0 {
                    reply::forget::<F>(&*key, known.leg());
                }
                (*report).expired += 1;
            }
            return 0;
        }
        (*report).half_open += u64::from(known.half_open);
        if let Some(counter) = SWEPT.get_ptr_mut(known.server) {
            atomic::add(counter, track::share(&known));
        }
        template::meet::<F>(&*key, &known);
    }
    0
}

/// Looks at one template.
unsafe extern "C" fn visit_template<F: Family>(
    _map: *mut c_void,
    key: *const TemplateKey<F::Address>,
    known: *mut Template,
    report: *mut SweepReport,
) -> i64 {
    let Some(config) = CONFIG.get(0) else { return 1 };
    // SAFETY: as in `visit`.
    unsafe { template::expire::<F>(config, key, known, (*report).jiffies as u32) };
    0
}
