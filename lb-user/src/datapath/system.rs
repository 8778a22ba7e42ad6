//! System calls that no crate offers: reading and writing a map in batches, taking an entry out of a hash map, having a program
//! see every entry of a map, the cookie of a network namespace, and the MTU of an interface.
//!
//! Nothing else here; every call checks its result and returns an [`io::Error`].
#![expect(unsafe_code, reason = "raw system calls")]

use std::{
    fs::File,
    io,
    ops::ControlFlow,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use aya::maps::MapData;
use lb_common::Plain;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_long = 21;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_ITER_CREATE: libc::c_long = 33;
const BPF_TRACE_ITER: u32 = 28;
const SO_NETNS_COOKIE: libc::c_int = 71;

/// The cookie of this thread's network namespace: a number that is never used again, unlike its inode. Kernel 5.14.
pub fn netns_cookie() -> io::Result<u64> {
    let any = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, which is that large.
    let result =
        unsafe { libc::getsockopt(any.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, (&raw mut cookie).cast(), &raw mut length) };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// The MTU of an interface in this thread's network namespace.
pub fn interface_mtu(name: &str) -> io::Result<u32> {
    let any = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut request: libc::ifreq =
        libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_mtu: 0 } };
    // The last byte stays 0.
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    // SAFETY: the kernel reads the name, which ends with 0, and writes the number, both within `request`.
    let result = unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: this request's answer is this number.
    Ok(unsafe { request.ifr_ifru.ifru_mtu }.cast_unsigned())
}

/// The part of `union bpf_attr` that batches use.
#[repr(C)]
struct Batch {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    element_flags: u64,
    flags: u64,
}

/// Calls `visit` for every entry of a hash map, a thousand at a time.
///
/// An entry that comes or goes meanwhile may be missed or seen. `K` and `V` must be as large as the map's keys and values.
pub fn for_each_entry<K: Plain, V: Plain>(map: &MapData, mut visit: impl FnMut(&K, &V)) -> io::Result<()> {
    let visit = |key: &K, value: &V| {
        visit(key, value);
        ControlFlow::Continue(())
    };
    for_entries(map, visit).map(|_| ())
}

/// The same, until `visit` has enough.
pub fn for_entries<K: Plain, V: Plain>(
    map: &MapData,
    mut visit: impl FnMut(&K, &V) -> ControlFlow<()>,
) -> io::Result<ControlFlow<()>> {
    let mut capacity = 1024_usize;
    let mut position = None::<u32>;
    loop {
        let mut keys: Vec<K> = vec![zeroed(); capacity];
        let mut values: Vec<V> = vec![zeroed(); capacity];
        let mut next = 0_u32;
        let mut batch = Batch {
            from: position.as_ref().map_or(0, |position| std::ptr::from_ref(position) as u64),
            to: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: capacity as u32,
            map_fd: map.fd().as_fd().as_raw_fd().cast_unsigned(),
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: all pointers lead to live memory of the sizes that the kernel derives from the map and from `count`;
        // `Plain` types may be filled with any bytes.
        let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut batch, size_of::<Batch>()) };
        let error = (result < 0).then(io::Error::last_os_error);
        match error.as_ref().and_then(io::Error::raw_os_error) {
            // One bucket alone holds more than there is room for.
            Some(libc::ENOSPC) if batch.count == 0 || capacity < 1 << 20 => {
                capacity *= 4;
                continue;
            }
            Some(code) if code != libc::ENOENT => return Err(io::Error::from_raw_os_error(code)),
            _ => {}
        }
        let count = (batch.count as usize).min(capacity);
        let enough = keys[..count].iter().zip(&values[..count]).try_for_each(|(key, value)| visit(key, value));
        if enough.is_break() || error.is_some() {
            return Ok(enough);
        }
        position = Some(next);
    }
}

/// Writes entries of a map, all with one call.
///
/// `K` and `V` must be as large as the map's keys and values.
pub fn write_entries<K: Plain, V: Plain>(map: &MapData, entries: &[(K, V)]) -> io::Result<()> {
    let (keys, values): (Vec<K>, Vec<V>) = entries.iter().copied().unzip();
    let mut done = 0;
    while done < keys.len() {
        let mut batch = Batch {
            from: 0,
            to: 0,
            keys: keys[done..].as_ptr() as u64,
            values: values[done..].as_ptr() as u64,
            count: (keys.len() - done) as u32,
            map_fd: map.fd().as_fd().as_raw_fd().cast_unsigned(),
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: both pointers lead to `count` live elements of the sizes that the kernel knows from the map; it only reads them.
        let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_UPDATE_BATCH, &raw mut batch, size_of::<Batch>()) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // Interrupted, it says how far it came.
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
        done += batch.count as usize;
    }
    Ok(())
}

/// The part of `union bpf_attr` that makes an iterator of a program and a map.
#[repr(C)]
struct Link {
    program_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    info: u64,
    info_length: u32,
    zero: u32,
}

/// The part that begins an iteration.
#[repr(C)]
struct Iteration {
    link_fd: u32,
    flags: u32,
}

/// Makes an iterator: a program that is to see each entry of a map. Kernel 5.9.
pub fn iterator(program: &impl AsFd, map: &MapData) -> io::Result<OwnedFd> {
    let map_fd = map.fd().as_fd().as_raw_fd();
    let mut link = Link {
        program_fd: program.as_fd().as_raw_fd().cast_unsigned(),
        target_fd: 0,
        attach_type: BPF_TRACE_ITER,
        flags: 0,
        info: &raw const map_fd as u64,
        info_length: size_of_val(&map_fd) as u32,
        zero: 0,
    };
    // SAFETY: the information is the descriptor of the map, which lives, and of which the kernel reads as much as it is long.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw mut link, size_of::<Link>()) };
    owned(result)
}

/// Begins an iteration. Whoever reads the file makes the program see entries, until there are as many bytes of the program's as
/// fit, or no more entries.
pub fn iterate(iterator: &OwnedFd) -> io::Result<File> {
    let mut iteration = Iteration { link_fd: iterator.as_raw_fd().cast_unsigned(), flags: 0 };
    // SAFETY: the kernel reads what it is given, and nothing else.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_ITER_CREATE, &raw mut iteration, size_of::<Iteration>()) };
    owned(result).map(File::from)
}

/// The descriptor that a system call has opened.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match libc::c_int::try_from(result) {
        // SAFETY: the kernel has just opened it, for nobody else.
        Ok(descriptor) if descriptor >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The part of `union bpf_attr` that single entries use.
#[repr(C)]
struct Element {
    map_fd: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Takes an entry out of a hash map; nothing if it is not there. Kernel 5.14.
///
/// `K` and `V` must be as large as the map's keys and values.
pub fn take<K: Plain, V: Plain>(map: &MapData, key: &K) -> io::Result<Option<V>> {
    let mut value: V = zeroed();
    let mut element = Element {
        map_fd: map.fd().as_fd().as_raw_fd().cast_unsigned(),
        zero: 0,
        key: std::ptr::from_ref(key) as u64,
        value: &raw mut value as u64,
        flags: 0,
    };
    // SAFETY: both pointers lead to live memory of the sizes that the kernel knows from the map; a `Plain` type may be filled
    // with any bytes.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_AND_DELETE_ELEM, &raw mut element, size_of::<Element>()) };
    if result == 0 {
        return Ok(Some(value));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENOENT) { Ok(None) } else { Err(error) }
}

fn zeroed<T: Plain>() -> T {
    // SAFETY: every pattern of bits is a value of a `Plain` type.
    unsafe { std::mem::zeroed() }
}
