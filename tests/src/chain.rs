//! A wire to a director and back, and packets that are driven through it: what a packet costs from end to end.
//!
//! ```text
//! source ── c0 ══════ d0 ── director
//! sink   ──┘
//! ```
//!
//! Clients and real server are both at the far end, as in a segment with one router. The source fills live frames
//! (`BPF_F_TEST_XDP_LIVE_FRAMES`) and puts them on the wire, the sink counts and drops them; so what else is in the figures is the
//! cheapest there is. What is reported is the kernel's own mean over the packets of a run: to set a run up and to take it down costs
//! as much as many packets. In a guest whose clock counts instructions ([`deterministic`](crate::vm::Machine::deterministic)) a nanosecond
//! is one instruction, and figures of one run can be compared with those of another.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use aya::{
    Ebpf, EbpfLoader, TestRun, TestRunOptions,
    maps::{Array, HashMap, MapData, PerCpuArray},
    programs::{
        SchedClassifier, TcAttachType, TestRunAttrs, Xdp,
        tc::qdisc_add_clsact,
        xdp::{XdpLinkId, XdpMode},
    },
};
use lb_common::{
    connection::{Connection, ConnectionKey},
    family::{Ipv4, ipv4},
    floor::{Role, Round},
    hop::{Hop, KEEP_VLAN, link_addresses},
    packet::protocol,
    server::{Server, Status},
};

use crate::{
    frame::{ACK, Frame},
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
/// Connections that the steps know.
const FLOWS: u32 = 4096;
/// The first client's address.
const CLIENTS: u32 = 0x0a10_0000;

/// Which way packets go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// From clients, with these TCP flags.
    Request(u8),
    /// From the real server, to clients that it has seen by their own addresses.
    Reply,
}

/// The chain. Whoever balances in the director is not there yet.
#[derive(Debug)]
pub struct Chain {
    /// The director.
    pub director: Namespace,
    outside: Namespace,
    ebpf: Ebpf,
    /// The program in the director's place, by its name.
    instead: Option<(String, XdpLinkId)>,
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

        let mut ebpf = EbpfLoader::new().map_max_entries("FLOOR_V4", FLOWS).map_max_entries("FLOOR_V6", 1).load_file(object()?)?;
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
        Ok(Self { director, outside, ebpf, instead: None })
    }

    /// Puts a program in the director's place that sends each frame back at once: what the rest of the chain costs.
    pub fn send_back(&mut self) -> Result<()> {
        self.replace("nothing_xdp")
    }

    /// Puts a program in the director's place that goes so many steps of an established packet's way
    /// (`lb-ebpf/src/bin/floor/steps.rs`), and then sends it back. It knows the connections of so many clients to a port.
    pub fn walk(&mut self, steps: usize, port: u16, clients: u64) -> Result<()> {
        let d0 = self.director.index("d0")?;
        let hop = Hop {
            ifindex: d0,
            port_ifindex: d0,
            mtu: 1500,
            link: link_addresses([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]),
            vlan: KEEP_VLAN,
        };
        let server = Server { status: Status::Ready as u8, hop, ..Server::default() };
        Array::try_from(self.ebpf.map_mut("FLOOR_SERVERS").context("steps know a server")?)?.set(0, server, 0)?;
        let round = Round { flows: clients, first_client: CLIENTS, port: port.to_be(), ..Round::default() };
        let mut connections: HashMap<_, ConnectionKey<Ipv4>, Connection> =
            HashMap::try_from(self.ebpf.map_mut("FLOOR_V4").context("steps know connections")?)?;
        for (client, ports) in (0..clients).map(|flow| round.client(flow)) {
            let key = ConnectionKey { client, vip: ipv4(VIP.parse()?), ports, protocol: protocol::TCP.into() };
            connections.insert(key, Connection::default(), 0)?;
        }
        self.replace(&format!("step_{steps}_xdp"))
    }

    /// Puts one of the object's programs in the director's place, and takes the one before it away.
    fn replace(&mut self, name: &str) -> Result<()> {
        if let Some((name, link)) = self.instead.take() {
            let before: &mut Xdp = program(&mut self.ebpf, &name)?.try_into()?;
            before.detach(link)?;
        }
        let next: &mut Xdp = program(&mut self.ebpf, name)?.try_into()?;
        next.load()?;
        let link = self.director.enter(|| next.attach("d0", XdpMode::Driver))?;
        self.instead = Some((name.to_owned(), link));
        Ok(())
    }

    /// Sends so many packets of so many clients in turn (a power of two), to a port of the virtual address or from that of the real
    /// server, and waits until all have arrived. Returns nanoseconds for each.
    pub fn send(&mut self, port: u16, way: Way, clients: u64, count: u32) -> Result<u32> {
        let client: SocketAddr = "10.16.0.0:1".parse()?;
        let (frame, role) = match way {
            Way::Request(flags) => (Frame::tcp(client, format!("{VIP}:{port}").parse()?, flags), Role::Source),
            Way::Reply => (Frame::tcp(format!("{SERVER}:{port}").parse()?, client, ACK), Role::Destination),
        };
        let mut bytes = Frame { payload: vec![0; 10], ..frame }.build();
        bytes[..6].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
        bytes[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        let mut rounds: Array<_, Round> = Array::try_from(self.ebpf.map_mut("ROUND").context("the source has a round")?)?;
        let round = Round { flows: clients, first_client: CLIENTS, port: port.to_be(), role: role as u16, ..round(&bytes) };
        rounds.set(0, round, 0)?;
        let before = self.arrived()?;
        let source: &Xdp = self.ebpf.program("source_xdp").context("the object has a source")?.try_into()?;
        let result = self.outside.enter(|| {
            source.test_run(TestRunOptions {
                data_in: Some(&bytes),
                repeat: count,
                attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
                ..TestRunOptions::new()
            })
        })?;
        let all = format!("{count} packets to arrive");
        wait::until(&all, wait::SOON, || self.arrived().is_ok_and(|arrived| arrived - before >= u64::from(count)))?;
        Ok(result.duration.as_nanos() as u32)
    }

    fn arrived(&self) -> Result<u64> {
        let arrived: PerCpuArray<&MapData, u64> = PerCpuArray::try_from(self.ebpf.map("ARRIVED").context("the sink counts")?)?;
        Ok(arrived.get(&0, 0)?.iter().sum())
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut aya::programs::Program> {
    ebpf.program_mut(name).with_context(|| format!("the object `floor` has no {name}; build bpfvs anew"))
}
