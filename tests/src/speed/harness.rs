//! The harness and the floors: the eBPF object `floor`, loaded.
//!
//! Nothing of it is pinned or attached; it goes away with its owner. The object is `$BPFVS_FLOOR`, else the one that the
//! build of bpfvs has left in cargo's target directory.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod, TestRun, TestRunOptions, TestRunResult,
    maps::{Array, HashMap, MapData, ProgramArray},
    programs::{ProgramFd, SchedClassifier, Xdp},
};
use lb_common::{floor::Round, server::Server};

use crate::{
    lab::Family,
    test_run::{Hook, marked},
};

/// The programs that go one step after the other.
pub const STEPS: [&str; 7] = ["step_1_xdp", "step_2_xdp", "step_3_xdp", "step_4_xdp", "step_5_xdp", "step_6_xdp", "step_7_xdp"];

/// The loaded object.
#[derive(Debug)]
pub struct Harness {
    ebpf: Ebpf,
}

/// A program of the object that can be put under test.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Floor {
    /// Sends at once: what the harness itself costs.
    Nothing,
    /// The same for a frame that has grown by an IP header; only at XDP.
    Grown,
    /// Parse, one hash hit or insert, rewrite, send.
    Forward,
    /// So many steps of a director's way; only at XDP.
    Steps(usize),
}

impl Harness {
    /// Loads the object with tables for so many connections, as the director's.
    pub fn load(max_connections: u32) -> Result<Self> {
        let path = object()?;
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("FLOOR_V4", max_connections)
            .map_max_entries("FLOOR_V6", max_connections)
            .load_file(&path)
            .with_context(|| format!("load the harness {}", path.display()))?;
        for name in ["wrap_xdp", "nothing_xdp", "grown_xdp", "floor_xdp"].into_iter().chain(STEPS) {
            let program: &mut Xdp = ebpf.program_mut(name).with_context(|| missing(name))?.try_into()?;
            program.load().with_context(|| format!("load {name}"))?;
        }
        for name in ["wrap_tc", "nothing_tc", "floor_tc"] {
            let program: &mut SchedClassifier = ebpf.program_mut(name).with_context(|| missing(name))?.try_into()?;
            program.load().with_context(|| format!("load {name}"))?;
        }
        Ok(Self { ebpf })
    }

    /// Puts one of the object's own programs under test.
    pub fn test_floor(&mut self, hook: Hook, floor: Floor) -> Result<()> {
        let name = match (hook, floor) {
            (Hook::Xdp, Floor::Nothing) => "nothing_xdp",
            (Hook::Xdp, Floor::Forward) => "floor_xdp",
            (Hook::Xdp, Floor::Grown) => "grown_xdp",
            (_, Floor::Steps(steps)) => STEPS.get(steps - 1).context("there are not so many steps")?,
            (Hook::Tc, Floor::Nothing | Floor::Grown) => "nothing_tc",
            (Hook::Tc, Floor::Forward) => "floor_tc",
        };
        let program = self.ebpf.program(name).with_context(|| missing(name))?.fd()?.try_clone()?;
        self.test(hook, &program)
    }

    /// Puts a program under test.
    pub fn test(&mut self, hook: Hook, program: &ProgramFd) -> Result<()> {
        let name = match hook {
            Hook::Xdp => "UNDER_TEST_XDP",
            Hook::Tc => "UNDER_TEST_TC",
        };
        let mut under_test = ProgramArray::try_from(self.ebpf.map_mut(name).with_context(|| missing(name))?)?;
        under_test.set(0, program, 0).with_context(|| {
            format!("put a program under test at {hook:?}: the kernel asks that it was loaded in the same way as the wrapper")
        })
    }

    /// Says what the wrapper does from now on.
    pub fn begin(&mut self, round: &Round) -> Result<()> {
        let mut rounds: Array<_, Round> = Array::try_from(self.ebpf.map_mut("ROUND").with_context(|| missing("ROUND"))?)?;
        rounds.set(0, round, 0).context("tell the wrapper what to do")
    }

    /// The floor's only real server.
    pub fn set_server(&mut self, server: &Server) -> Result<()> {
        let servers = self.ebpf.map_mut("FLOOR_SERVERS").with_context(|| missing("FLOOR_SERVERS"))?;
        let mut servers: Array<_, Server> = Array::try_from(servers)?;
        servers.set(0, server, 0).context("tell the floor its real server")
    }

    /// The floor's connections.
    pub fn connections<K: Pod, V: Pod>(&mut self, family: Family) -> Result<HashMap<&mut MapData, K, V>> {
        let name = match family {
            Family::Ipv4 => "FLOOR_V4",
            Family::Ipv6 => "FLOOR_V6",
        };
        Ok(HashMap::try_from(self.ebpf.map_mut(name).with_context(|| missing(name))?)?)
    }

    /// Runs the wrapper, and with it the program under test, so many times.
    pub fn run(&self, hook: Hook, frame: &[u8], repeat: u32) -> Result<TestRunResult> {
        self.run_marked(hook, frame, repeat, 0)
    }

    /// The same with a firewall's mark on the packet, which tc sees.
    pub fn run_marked(&self, hook: Hook, frame: &[u8], repeat: u32, mark: u32) -> Result<TestRunResult> {
        let context = marked(mark);
        let ctx_in = (mark != 0).then_some(&context[..]);
        let options = TestRunOptions { data_in: Some(frame), ctx_in, repeat, ..TestRunOptions::new() };
        let result = match hook {
            Hook::Xdp => <&Xdp>::try_from(self.ebpf.program("wrap_xdp").with_context(|| missing("wrap_xdp"))?)?.test_run(options),
            Hook::Tc => {
                let program = self.ebpf.program("wrap_tc").with_context(|| missing("wrap_tc"))?;
                <&SchedClassifier>::try_from(program)?.test_run(options)
            }
        };
        result.with_context(|| format!("run the wrapper at {hook:?}"))
    }
}

fn missing(name: &str) -> String {
    format!("the object `floor` has no {name}; build bpfvs anew")
}

/// Where the object is.
pub fn object() -> Result<PathBuf> {
    let path = env::var_os("BPFVS_FLOOR").map_or_else(built, PathBuf::from);
    ensure!(path.is_file(), "the harness {} does not exist; run `cargo build`, or name it in BPFVS_FLOOR", path.display());
    Ok(path)
}

/// Where the build of bpfvs leaves it.
fn built() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), |directory| workspace.join(directory));
    target.join("ebpf/bpfel-unknown-none/release/floor")
}
