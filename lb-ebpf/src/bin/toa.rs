//! Shows programs on a real server who their client is, where FULLNAT hides it.
//!
//! The director names the client in a TCP option ([`lb_common::toa`]). `toa_segments` reads it from the segment that
//! completes a connection and keeps it with the socket; `toa_peer4` and `toa_peer6` answer `accept` and `getpeername` with it.
//! Nothing else changes: routing, the firewall and `ss` go on with the addresses of the packets.
//!
//! An established connection costs nothing: the kernel asks `toa_segments` once for each new connection. Only if the option was
//! not in that segment, it asks again about segments with an option that it does not know itself, until one of them names
//! the client or the first data are there: by then programs have been told who it is, and a client might forge one.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs {
    use core::ptr::from_mut;

    use aya_ebpf::{
        bindings::{
            BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_PARSE_HDR_OPT_CB, BPF_SOCK_OPS_PARSE_UNKNOWN_HDR_OPT_CB_FLAG,
            BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        },
        btf_maps::SkStorage,
        cty::c_void,
        helpers::bpf_sk_storage_get,
        macros::{btf_map, cgroup_sock_addr, map, sock_ops},
        maps::{
            PerCpuArray,
            lpm_trie::{Key, LpmTrie},
        },
        programs::{SockAddrContext, SockOpsContext},
    };
    use lb_common::{
        Plain,
        family::{AF_INET, Ipv6},
        packet::Bytes,
        toa::{self, Client, Outcome},
    };

    /// Who the client of a socket is. An entry goes with its socket.
    #[btf_map]
    static CLIENTS: SkStorage<Client> = SkStorage::new();

    /// Whose options count: networks of directors, IPv4 as `::ffff:a.b.c.d`. Written by `bpfvs realserver toa`.
    #[map]
    static TRUSTED: LpmTrie<Ipv6, u8> = LpmTrie::with_max_entries(1024, 1 /* BPF_F_NO_PREALLOC, which the kernel demands */);

    /// Options by [`Outcome`]. Written here, read by `bpfvs realserver toa status`.
    #[map]
    static OUTCOMES: PerCpuArray<u64> = PerCpuArray::with_max_entries(Outcome::ALL.len() as u32, 0);

    /// What the kernel wants to hear: "go on".
    const GO_ON: u32 = 1;
    const LOOK_AGAIN: u32 = BPF_SOCK_OPS_PARSE_UNKNOWN_HDR_OPT_CB_FLAG;

    #[sock_ops]
    fn toa_segments(context: SockOpsContext) -> u32 {
        match context.op() {
            BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => established(&context),
            BPF_SOCK_OPS_PARSE_HDR_OPT_CB => look_again(&context),
            _ => {}
        }
        GO_ON
    }

    #[inline(always)]
    fn established(context: &SockOpsContext) {
        let trusted = TRUSTED.get(&Key::new(128, peer(context))).is_some();
        match toa::find(&header(context)) {
            Some(_) if !trusted => count(Outcome::Untrusted),
            Some(client) => keep(context, client),
            // Other programs may have asked to be called, too. Refused only if the flag is unknown: then all would have failed.
            None if trusted => drop(context.set_cb_flags((context.cb_flags() | LOOK_AGAIN) as i32)),
            None => {}
        }
    }

    #[inline(always)]
    fn look_again(context: &SockOpsContext) {
        if context.cb_flags() & LOOK_AGAIN == 0 {
            return;
        }
        // SAFETY: a field of the context that the verifier knows.
        let too_late = unsafe { (*context.ops).bytes_received } > 0;
        let client = if too_late { None } else { toa::find(&header(context)) };
        if let Some(client) = client {
            keep(context, client);
        }
        if too_late || client.is_some() {
            let _ = context.set_cb_flags((context.cb_flags() & !LOOK_AGAIN) as i32);
        }
    }

    #[inline(always)]
    fn keep(context: &SockOpsContext, mut client: Client) {
        // SAFETY: a field of the context that the verifier knows.
        let socket = unsafe { (*context.ops).__bindgen_anon_2.sk };
        if socket.is_null() {
            return;
        }
        let map = (&raw const CLIENTS).cast_mut().cast::<c_void>();
        let flags = u64::from(BPF_SK_STORAGE_GET_F_CREATE);
        // SAFETY: map and socket are the kernel's, and the value is as long as the map says.
        let kept = unsafe { bpf_sk_storage_get(map, socket.cast(), from_mut(&mut client).cast(), flags) };
        if !kept.is_null() {
            count(Outcome::Taken);
        }
    }

    #[cgroup_sock_addr(getpeername4)]
    fn toa_peer4(context: SockAddrContext) -> i32 {
        if let Some(client) = client(&context) {
            match client.ipv4() {
                Some(address) => {
                    // SAFETY: fields of the context that the verifier lets this hook write.
                    unsafe {
                        (*context.sock_addr).user_ip4 = address;
                        (*context.sock_addr).user_port = u32::from(client.port);
                    }
                }
                None => count(Outcome::Unshowable),
            }
        }
        GO_ON as i32
    }

    #[cgroup_sock_addr(getpeername6)]
    fn toa_peer6(context: SockAddrContext) -> i32 {
        if let Some(client) = client(&context) {
            // SAFETY: fields of the context that the verifier lets this hook write.
            unsafe {
                (*context.sock_addr).user_ip6 = client.address;
                (*context.sock_addr).user_port = u32::from(client.port);
            }
        }
        GO_ON as i32
    }

    /// Who the client of this socket is, if an option named it.
    #[inline(always)]
    fn client(context: &SockAddrContext) -> Option<Client> {
        // SAFETY: the context is the program's own.
        let client = unsafe { CLIENTS.get_ptr_mut(context) };
        // SAFETY: the kernel's pointer to a value of this type, which lives as long as the socket.
        if client.is_null() { None } else { Some(unsafe { client.read() }) }
    }

    /// Who sends the segments: the director, or a client without one.
    #[inline(always)]
    fn peer(context: &SockOpsContext) -> Ipv6 {
        // Volatile, or the compiler makes one read of both at an offset that it computes, which the verifier does not take.
        // SAFETY: fields of the context that the verifier knows.
        let (ipv4, ipv6) = unsafe {
            let words = &raw const (*context.ops).remote_ip6;
            let word = |number| words.cast::<u32>().add(number).read_volatile();
            ((&raw const (*context.ops).remote_ip4).read_volatile(), [word(0), word(1), word(2), word(3)])
        };
        if context.family() == u32::from(AF_INET) { toa::mapped(ipv4) } else { ipv6 }
    }

    #[inline(always)]
    fn count(outcome: Outcome) {
        if let Some(counter) = OUTCOMES.get_ptr_mut(outcome as u32) {
            // SAFETY: a pointer into this CPU's own array. An interrupted count may be lost, which a counter for people bears.
            unsafe { *counter += 1 };
        }
    }

    /// The TCP header of the segment that the kernel asks about.
    struct Header {
        start: usize,
        end: usize,
    }

    #[inline(always)]
    fn header(context: &SockOpsContext) -> Header {
        // SAFETY: fields of the context that the verifier knows.
        unsafe {
            Header {
                start: (*context.ops).__bindgen_anon_3.skb_data as usize,
                end: (*context.ops).__bindgen_anon_4.skb_data_end as usize,
            }
        }
    }

    impl Bytes for Header {
        #[inline(always)]
        fn read<T: Plain>(&self, offset: usize) -> Option<T> {
            let place = self.start + offset;
            if place + size_of::<T>() > self.end {
                return None;
            }
            // SAFETY: the place was compared with the header's end, and a Plain type takes every bit pattern.
            Some(unsafe { (place as *const T).read() })
        }

        #[inline(always)]
        fn len(&self) -> usize {
            self.end - self.start
        }
    }
}

lb_ebpf::object!();
