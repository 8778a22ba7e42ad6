//! Takes packets out of the director's tunnel on a real server.
//!
//! For hosts whose kernel has no tunnel device for what the director sends. A frame is opened by
//! [`lb_common::packet::tunnel`]; if the packet inside is for a virtual address of this host that accepts this kind of
//! tunnel, and the tunnel ends here, the outer headers go, and the host's own stack receives the client's packet as if
//! it had come directly. Everything else passes untouched.
//!
//! There are two programs. `tc_decap` is for every interface: it takes whole GSO packets, and leaves the kernel's notes
//! about unfinished checksums true. `xdp_decap` is for drivers with XDP that bring packets from a real wire.
//!
//! It does not reassemble: a director must not send tunnel packets in fragments (bpfvs tells clients the right size).
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs {
    use core::mem::{offset_of, zeroed};

    use aya_ebpf::{
        bindings::{
            BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_RECOMPUTE_CSUM, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH,
            BPF_FIB_LKUP_RET_SUCCESS, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, bpf_fib_lookup as FibLookup, xdp_action,
        },
        cty::c_void,
        helpers::{bpf_fib_lookup, bpf_xdp_adjust_head, bpf_xdp_get_buff_len},
        macros::{classifier, map, xdp},
        maps::{HashMap, PerCpuArray},
        programs::{TcContext, XdpContext},
    };
    use lb_common::{
        Plain, checksum,
        family::{AF_INET, AF_INET6, Ipv6},
        packet::{
            Bytes, Ipv4Header, Ipv6Header, Network, V4, V6,
            ethernet::{self, EthernetHeader, Link, VlanTag},
            tunnel::{self, Accepts, Opened, Outcome},
        },
    };

    /// Virtual addresses of this host, as [`tunnel::key`], and which tunnels may bring packets for them. Written by
    /// `bpfvs realserver`. An address that does not fit is refused there.
    #[map]
    static VIPS: HashMap<Ipv6, Accepts> = HashMap::with_max_entries(1024, 0);

    /// Frames by [`Outcome`]. Written here, read by `bpfvs realserver check`.
    #[map]
    static OUTCOMES: PerCpuArray<u64> = PerCpuArray::with_max_entries(Outcome::ALL.len() as u32, 0);

    /// Continue with the next program of the chain, then with the stack (`TC_ACT_UNSPEC`, which tcx calls `TCX_NEXT`).
    const TC_NEXT: i32 = -1;
    /// Drop (`TC_ACT_SHOT`).
    const TC_DROP: i32 = 2;
    /// `PACKET_HOST`: the frame is for this host's MAC address.
    const PACKET_HOST: u32 = 0;
    /// Headers that have to be in the linear part of a packet: Ethernet with tags, IPv6 with some extensions, UDP, GUE, IPv6.
    const HEADERS: u32 = 192;

    /// The readable part of a packet.
    struct Window {
        start: usize,
        end: usize,
        /// Bytes of the whole packet, of which not all need to be readable.
        length: usize,
    }

    impl Window {
        fn at<T>(&self, offset: usize) -> Option<*mut T> {
            let place = self.start + offset;
            if place + size_of::<T>() > self.end { None } else { Some(place as *mut T) }
        }
    }

    impl Bytes for Window {
        #[inline(always)]
        fn read<T: Plain>(&self, offset: usize) -> Option<T> {
            // SAFETY: `at` compared the place with the packet's end, and a Plain type takes every bit pattern.
            Some(unsafe { self.at::<T>(offset)?.read() })
        }

        #[inline(always)]
        fn len(&self) -> usize {
            self.length
        }
    }

    /// A packet at a hook.
    trait Packet {
        fn window(&self) -> Window;
        fn context(&self) -> *mut c_void;
        fn interface(&self) -> u32;
        /// Removes the headers between the link header and the packet inside, and says in the link header what follows now.
        fn strip(&self, link: &Link, opened: &Opened) -> Option<()>;
        /// Marks the packet inside, which now follows the link header, with these ECN bits.
        fn mark(&self, link: &Link, opened: &Opened, congestion: u8) -> Option<()>;
    }

    #[classifier]
    fn tc_decap(context: TcContext) -> i32 {
        // SAFETY: the field of the context that the verifier knows.
        if unsafe { (*context.skb.skb).pkt_type } != PACKET_HOST {
            return TC_NEXT;
        }
        let packet = Skb(context);
        match count(decapsulate(&packet)) {
            Outcome::Congested | Outcome::Failed => TC_DROP,
            _ => TC_NEXT,
        }
    }

    #[xdp(frags)]
    fn xdp_decap(context: XdpContext) -> u32 {
        match count(decapsulate(&Frame(context))) {
            Outcome::Congested | Outcome::Failed => xdp_action::XDP_DROP,
            _ => xdp_action::XDP_PASS,
        }
    }

    #[inline(always)]
    fn count(result: Result<(), Outcome>) -> Outcome {
        let outcome = result.err().unwrap_or(Outcome::Decapsulated);
        if let Some(counter) = OUTCOMES.get_ptr_mut(outcome as u32) {
            // SAFETY: a pointer into this CPU's own array, and programs at a hook do not interrupt each other on it.
            unsafe { *counter += 1 };
        }
        outcome
    }

    #[inline(always)]
    fn decapsulate<P: Packet>(packet: &P) -> Result<(), Outcome> {
        let window = packet.window();
        let link = ethernet::parse(&window)?;
        let opened = tunnel::open(&window, &link)?;
        // SAFETY: the value is two words that userspace replaces as a whole, and is copied at once.
        let accepts = unsafe { VIPS.get(&opened.destination) }.ok_or(Outcome::NotServed)?;
        if !accepts.allows(&opened) {
            return Err(Outcome::NotServed);
        }
        if is_forwarded(packet, &window, &link).ok_or(Outcome::Malformed)? {
            return Err(Outcome::NotHere);
        }
        let congestion = tunnel::congestion(opened.outer_class, opened.inner_class).ok_or(Outcome::Congested)?;
        packet.strip(&link, &opened).ok_or(Outcome::Failed)?;
        if congestion != opened.inner_class & 3 {
            packet.mark(&link, &opened, congestion).ok_or(Outcome::Failed)?;
        }
        Ok(())
    }

    /// Whether this host is a router for the tunnel's destination: then the tunnel ends elsewhere. For its own addresses
    /// the lookup says "not forwarded", and "forwarding disabled" on a host that is no router.
    #[inline(always)]
    fn is_forwarded<P: Packet>(packet: &P, window: &Window, link: &Link) -> Option<bool> {
        // SAFETY: integers and unions of integers.
        let mut lookup: FibLookup = unsafe { zeroed() };
        lookup.ifindex = packet.interface();
        if link.ethertype == V4::ETHERTYPE {
            let outer: Ipv4Header = window.read(link.payload)?;
            lookup.family = AF_INET;
            lookup.__bindgen_anon_3.ipv4_src = outer.source;
            lookup.__bindgen_anon_4.ipv4_dst = outer.destination;
        } else {
            let outer: Ipv6Header = window.read(link.payload)?;
            lookup.family = AF_INET6;
            lookup.__bindgen_anon_3.ipv6_src = outer.source;
            lookup.__bindgen_anon_4.ipv6_dst = outer.destination;
        }
        // SAFETY: the context is the program's own, the structure is on the stack and its size is right.
        let result = unsafe { bpf_fib_lookup(packet.context(), &raw mut lookup, size_of::<FibLookup>() as i32, 0) } as u32;
        Some(matches!(result, BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED))
    }

    const fn inner_ethertype(opened: &Opened) -> u16 {
        if opened.inner_v6 { V6::ETHERTYPE.to_be() } else { V4::ETHERTYPE.to_be() }
    }

    /// Where the type of the link header's payload stands.
    const fn ethertype_offset(link: &Link) -> usize {
        link.payload - size_of::<u16>()
    }

    /// The IPv4 header's second byte and checksum with new ECN bits.
    fn marked_v4(header: &Ipv4Header, congestion: u8) -> (u8, u16) {
        let tos = header.tos & !3 | congestion;
        let old = u16::from_ne_bytes([header.version_length, header.tos]);
        let new = u16::from_ne_bytes([header.version_length, tos]);
        (tos, checksum::update(header.checksum, old, new))
    }

    /// The first word of the IPv6 header with new ECN bits.
    const fn marked_v6(header: &Ipv6Header, congestion: u8) -> u32 {
        (u32::from_be(header.version_class_flow) & !(3 << 20) | (congestion as u32) << 20).to_be()
    }

    /// A packet at tc.
    struct Skb(TcContext);

    impl Packet for Skb {
        #[inline(always)]
        fn window(&self) -> Window {
            let length = self.0.len();
            if self.0.data_end() - self.0.data() < HEADERS as usize {
                // Refused only without memory; then the parser finds headers missing, and the packet passes.
                let _ = self.0.pull_data(if length < HEADERS { length } else { HEADERS });
            }
            Window { start: self.0.data(), end: self.0.data_end(), length: length as usize }
        }

        fn context(&self) -> *mut c_void {
            self.0.skb.skb.cast()
        }

        fn interface(&self) -> u32 {
            // SAFETY: the field of the context that the verifier knows.
            unsafe { (*self.0.skb.skb).ingress_ifindex }
        }

        /// Across families the kernel first has to be told of the new one, because local delivery goes by `skb->protocol`.
        /// `bpf_skb_change_proto` does that on every kernel; it also makes the network header longer or shorter by the 20
        /// bytes in which the families differ, which is made good in the next step. (The flags `DECAP_L3` of
        /// `bpf_skb_adjust_room` would say it in one step, from Linux 6.3 on.)
        #[inline(always)]
        fn strip(&self, link: &Link, opened: &Opened) -> Option<()> {
            const DIFFERENCE: i32 = (V6::HEADER - V4::HEADER) as i32;
            let outer_v6 = link.ethertype == V6::ETHERTYPE;
            let mut surplus = (opened.offset - link.payload) as i32;
            if outer_v6 != opened.inner_v6 {
                self.0.change_proto(inner_ethertype(opened), 0).ok()?;
                surplus += if opened.inner_v6 { DIFFERENCE } else { -DIFFERENCE };
            }
            // The segment size of a GSO packet is that of the client's TCP, with or without the tunnel.
            self.0.adjust_room(-surplus, BPF_ADJ_ROOM_MAC, u64::from(BPF_F_ADJ_ROOM_FIXED_GSO)).ok()?;
            if outer_v6 != opened.inner_v6 {
                self.0.store(ethertype_offset(link), &inner_ethertype(opened), 0).ok()?;
            }
            Some(())
        }

        /// With `RECOMPUTE_CSUM`, because the network card's sum over the packet (`CHECKSUM_COMPLETE`) must stay true.
        #[inline(always)]
        fn mark(&self, link: &Link, opened: &Opened, congestion: u8) -> Option<()> {
            let recompute = u64::from(BPF_F_RECOMPUTE_CSUM);
            let ip = link.payload;
            if opened.inner_v6 {
                let header: Ipv6Header = self.window().read(ip)?;
                return self.0.store(ip, &marked_v6(&header, congestion), recompute).ok();
            }
            let header: Ipv4Header = self.window().read(ip)?;
            let (tos, checksum) = marked_v4(&header, congestion);
            self.0.store(ip + offset_of!(Ipv4Header, tos), &tos, recompute).ok()?;
            self.0.store(ip + offset_of!(Ipv4Header, checksum), &checksum, recompute).ok()
        }
    }

    /// A packet at XDP.
    struct Frame(XdpContext);

    impl Packet for Frame {
        #[inline(always)]
        fn window(&self) -> Window {
            // SAFETY: the context is the program's own.
            let length = unsafe { bpf_xdp_get_buff_len(self.0.ctx) } as usize;
            Window { start: self.0.data(), end: self.0.data_end(), length }
        }

        fn context(&self) -> *mut c_void {
            self.0.ctx.cast()
        }

        fn interface(&self) -> u32 {
            self.0.ingress_ifindex() as u32
        }

        /// Moves the link header up to the packet inside, then the start of the frame up to the link header.
        #[inline(always)]
        fn strip(&self, link: &Link, opened: &Opened) -> Option<()> {
            let surplus = opened.offset - link.payload;
            let window = self.window();
            let header: EthernetHeader = window.read(0)?;
            let outer: Option<VlanTag> = tag(&window, link, 1);
            let inner: Option<VlanTag> = tag(&window, link, 2);
            // SAFETY: the verifier knows the context.
            if unsafe { bpf_xdp_adjust_head(self.0.ctx, surplus as i32) } != 0 {
                return None;
            }
            let window = self.window();
            let mut end = ethernet::HEADER;
            // SAFETY: `at` compared each place with the packet's end.
            unsafe {
                window.at::<EthernetHeader>(0)?.write(header);
                if let Some(outer) = outer {
                    window.at::<VlanTag>(ethernet::HEADER)?.write(outer);
                    end += ethernet::TAG;
                }
                if let Some(inner) = inner {
                    window.at::<VlanTag>(ethernet::HEADER + ethernet::TAG)?.write(inner);
                    end += ethernet::TAG;
                }
                window.at::<u16>(end - size_of::<u16>())?.write(inner_ethertype(opened));
            }
            Some(())
        }

        #[inline(always)]
        fn mark(&self, link: &Link, opened: &Opened, congestion: u8) -> Option<()> {
            let window = self.window();
            // SAFETY: `at` compared each place with the packet's end.
            unsafe {
                if opened.inner_v6 {
                    let word = window.at::<u32>(link.payload)?;
                    let header: Ipv6Header = window.read(link.payload)?;
                    word.write(marked_v6(&header, congestion));
                } else {
                    let place = window.at::<Ipv4Header>(link.payload)?;
                    let (tos, checksum) = marked_v4(&place.read(), congestion);
                    (&raw mut (*place).tos).write(tos);
                    (&raw mut (*place).checksum).write(checksum);
                }
            }
            Some(())
        }
    }

    /// The tag with this number, if the link header has so many.
    #[inline(always)]
    fn tag(window: &Window, link: &Link, number: usize) -> Option<VlanTag> {
        let offset = ethernet::HEADER + number * ethernet::TAG - ethernet::TAG;
        if link.payload >= offset + ethernet::TAG { window.read(offset) } else { None }
    }
}

lb_ebpf::object!();
