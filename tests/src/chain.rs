//! A wire to a director and back, and packets that are driven through it: what a packet costs from end to end.
//!
//! ```text
//! source ── c0 ══════ d0 ── director
//! sink   ──┘
//! ```
//!
//! Clients and real server are both at the far end, as in a segment with one router. The source fills live frames
//! (`BPF_F_TEST_XDP_LIVE_FRAMES`) and puts them on the wire, the sink counts and drops them; so what else is in the figures is the
//! cheapest there is. In a guest whose clock counts instructions ([`deterministic`](crate::vm::Machine::deterministic)) a nanosecond
//! is one instruction, and figures of one run can be compared with those of another.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use aya::{
    Ebpf, EbpfLoader, TestRun, TestRunOptions,
    maps::{Array, MapData, PerCpuArray},
    programs::{SchedClassifier, TcAttachType, TestRunAttrs, Xdp, tc::qdisc_add_clsact, xdp::XdpMode},
};
use lb_common::floor::Round;

use crate::{
    frame::Frame,
    netns::Namespace,
    speed::{harness::object, stage::round},
    test_run::Hook,
    wait,
};

/// The virtual address.
pub const VIP: &str = "10.99.0.1";
/// The real server's address.
pub const SERVER: &str = "10.1.0.2";
/// Frames that are under way at a time.
const BATCH: u32 = 64;
/// The first client's address.
const CLIENTS: u32 = 0x0a10_0000;

/// The chain. Whoever balances in the director is not there yet.
#[derive(Debug)]
pub struct Chain {
    /// The director.
    pub director: Namespace,
    outside: Namespace,
    ebpf: Ebpf,
}

impl Chain {
    /// Makes the wires; `hook` says how packets come to the sink.
    pub fn new(hook: Hook) -> Result<Self> {
        let (director, outside) = (Namespace::new("director")?, Namespace::new("outside")?);
        // Nothing but our frames shall be on the wire.
        outside.sysctl(&[("net.ipv6.conf.default.disable_ipv6", "1")])?;
        director.sysctl(&[("net.ipv6.conf.default.disable_ipv6", "1")])?;
        director.connect("d0", &outside, "c0")?;
        outside.ip("link set c0 address 02:00:00:00:00:01")?;
        director.ip(&format!(
            "link set d0 address 02:00:00:00:00:02
             addr add 10.1.0.1/16 dev d0
             addr add {VIP}/32 dev lo
             neigh add 10.1.0.254 lladdr 02:00:00:00:00:01 dev d0 nud permanent
             neigh add {SERVER} lladdr 02:00:00:00:00:01 dev d0 nud permanent
             route add 10.16.0.0/12 via 10.1.0.254"
        ))?;
        director.sysctl(&[
            ("net.ipv4.ip_forward", "1"),
            ("net.ipv4.conf.all.rp_filter", "0"),
            ("net.ipv4.conf.d0.rp_filter", "0"),
            ("net.ipv4.conf.all.send_redirects", "0"),
            ("net.ipv4.conf.d0.send_redirects", "0"),
        ])?;
        // A veth device takes live frames only if its other end polls.
        director.run("ethtool", ["-K", "d0", "gro", "on"])?;
        outside.run("ethtool", ["-K", "c0", "gro", "on"])?;

        let mut ebpf = EbpfLoader::new().map_max_entries("FLOOR_V4", 1).map_max_entries("FLOOR_V6", 1).load_file(object()?)?;
        let source: &mut Xdp = program(&mut ebpf, "source_xdp")?.try_into()?;
        source.load()?;
        match hook {
            Hook::Xdp => {
                let sink: &mut Xdp = program(&mut ebpf, "sink_xdp")?.try_into()?;
                sink.load()?;
                outside.enter(|| sink.attach("c0", XdpMode::Driver))?;
            }
            Hook::Tc => {
                let sink: &mut SchedClassifier = program(&mut ebpf, "sink_tc")?.try_into()?;
                sink.load()?;
                outside.enter(|| -> Result<()> {
                    qdisc_add_clsact("c0").ok();
                    sink.attach("c0", TcAttachType::Ingress)?;
                    Ok(())
                })?;
            }
        }
        let mut wire: Array<_, u32> = Array::try_from(ebpf.map_mut("WIRE").context("the source has a wire")?)?;
        wire.set(0, outside.index("c0")?, 0)?;
        Ok(Self { director, outside, ebpf })
    }

    /// Sends so many packets with these TCP flags to a port, of so many clients in turn (a power of two), and waits until all have
    /// arrived.
    pub fn send(&mut self, port: u16, flags: u8, clients: u64, count: u32) -> Result<Duration> {
        let sockets: [SocketAddr; 2] = ["10.16.0.0:1".parse()?, format!("{VIP}:{port}").parse()?];
        let frame = Frame::tcp(sockets[0], sockets[1], flags);
        let bytes = Frame { payload: vec![0; 10], ..frame }.build();
        let mut rounds: Array<_, Round> = Array::try_from(self.ebpf.map_mut("ROUND").context("the source has a round")?)?;
        let mut bytes = bytes;
        bytes[..6].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
        bytes[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        rounds.set(0, Round { flows: clients, first_client: CLIENTS, port: port.to_be(), ..round(&bytes) }, 0)?;
        let before = self.arrived()?;
        let source: &Xdp = self.ebpf.program("source_xdp").context("the object has a source")?.try_into()?;
        let begin = Instant::now();
        self.outside.enter(|| {
            source.test_run(TestRunOptions {
                data_in: Some(&bytes),
                repeat: count,
                attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
                ..TestRunOptions::new()
            })
        })?;
        let mut took = begin.elapsed();
        let mut arrived = self.arrived()? - before;
        if arrived < u64::from(count) {
            wait::until("all packets to arrive", wait::SOON, || {
                took = begin.elapsed();
                arrived = self.arrived().map_or(0, |now| now - before);
                arrived >= u64::from(count)
            })
            .with_context(|| format!("{arrived} of {count} have arrived"))?;
        }
        Ok(took)
    }

    fn arrived(&self) -> Result<u64> {
        let arrived: PerCpuArray<&MapData, u64> = PerCpuArray::try_from(self.ebpf.map("ARRIVED").context("the sink counts")?)?;
        Ok(arrived.get(&0, 0)?.iter().sum())
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut aya::programs::Program> {
    ebpf.program_mut(name).with_context(|| format!("the object `floor` has no {name}; build bpfvs anew"))
}
