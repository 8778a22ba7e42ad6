//! What the kernel knows of programs and tables: verified instructions, bytes of machine code, bytes for each connection.
//!
//! The memory of a table is what the kernel says of it in `/proc/self/fdinfo` (`memlock`): elements, buckets, and what stands
//! ready for each CPU. It does not say what an allocator adds to elements that are taken as they are needed.

use std::{
    fmt::{self, Display, Formatter},
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
};

use anyhow::{Context, Result};
use aya::{maps::MapData, programs::ProgramInfo};
use lb_common::{
    connection::{Connection, ConnectionKey},
    family::{Ipv4, Ipv6},
    reply::Reply,
};
use serde::{Deserialize, Serialize};

use super::stage::Stage;
use crate::{bench::Bench, lab::Family};

/// A loaded program.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Program {
    /// Its name.
    pub name: String,
    /// Instructions that the verifier looked at.
    pub verified: u32,
    /// Bytes of its machine code.
    pub machine_code: u32,
}

impl Program {
    /// The names of the columns.
    pub fn heading() -> String {
        format!("{:<16} {:>22} {:>22}", "program", "verified instructions", "bytes of machine code")
    }
}

impl Display for Program {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:<16} {:>22} {:>22}", self.name, self.verified, self.machine_code)
    }
}

/// The programs of a director, by name.
pub fn programs(bench: &Bench) -> Result<Vec<Program>> {
    let pins = bench.bpfvs.pins().join("programs");
    let mut pinned: Vec<_> = fs::read_dir(&pins)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    pinned.sort();
    pinned.iter().map(|path| program(path)).collect()
}

fn program(path: &Path) -> Result<Program> {
    let info = ProgramInfo::from_pin(path).with_context(|| format!("ask the kernel about {}", path.display()))?;
    let verified = info.verified_instruction_count().context("this kernel does not count verified instructions (5.16 does)")?;
    let name = path.file_name().context("a pin has a name")?.to_string_lossy().into_owned();
    let machine_code = info.size_jitted();
    Ok(Program { name, verified, machine_code })
}

/// What a connection takes.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Connections {
    /// The table.
    pub table: String,
    /// Bytes of a key and a value, by the layout.
    pub layout: usize,
    /// Bytes for each connection, by the kernel's account of the table when it is full.
    pub bytes: f64,
}

/// What a connection must keep to, and what would be fine: bytes, IPv4.
const MUST: (f64, f64) = (113.0, 64.0);

impl Connections {
    /// The names of the columns.
    pub fn heading() -> String {
        format!("{:<16} {:>14} {:>18} {:>13}", "table", "bytes, layout", "bytes, measured", "must/stretch")
    }

    /// Whether it is met what a connection must keep to, if there is such a thing.
    pub fn keeps(&self) -> Option<bool> {
        (self.table == "CONNECTIONS_V4").then_some(self.bytes <= MUST.0)
    }
}

impl Display for Connections {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let target = if self.keeps().is_some() { format!("{:.0}/{:.0}", MUST.0, MUST.1) } else { "-".to_owned() };
        write!(formatter, "{:<16} {:>14} {:>18.1} {target:>13}", self.table, self.layout, self.bytes)
    }
}

/// The memory of the tables of a director for `capacity` connections: first empty, then with `flows` connections of `family`, or
/// replies, in them.
pub fn tables(stage: &mut Stage, cpu: usize, capacity: u32) -> Result<Vec<Connections>> {
    const FLOWS: u64 = 1 << 16;
    let names = |family| if family == Family::Ipv4 { ("CONNECTIONS_V4", "REPLIES_V4") } else { ("CONNECTIONS_V6", "REPLIES_V6") };
    let layout = |family| match family {
        Family::Ipv4 => (size_of::<(ConnectionKey<Ipv4>, Connection)>(), size_of::<(ConnectionKey<Ipv4>, Reply<Ipv4>)>()),
        Family::Ipv6 => (size_of::<(ConnectionKey<Ipv6>, Connection)>(), size_of::<(ConnectionKey<Ipv6>, Reply<Ipv6>)>()),
    };
    let mut weights = Vec::new();
    for family in Family::ALL {
        let (connections, replies) = names(family);
        let empty = [memory(stage.bench(), connections)?, memory(stage.bench(), replies)?];
        stage.enter(cpu, |act| act.set(family, super::Path::Masqueraded, FLOWS))?;
        let filled = [memory(stage.bench(), connections)?, memory(stage.bench(), replies)?];
        // What a table has from the beginning is there for as many as it can hold. In tenths of a byte.
        let each = |at: usize| -> Result<f64> {
            let grown = filled[at].saturating_sub(empty[at]);
            let tenths = 10 * empty[at] / u64::from(capacity) + 10 * grown / FLOWS;
            Ok(f64::from(u32::try_from(tenths)?) / 10.0)
        };
        let layouts: (usize, usize) = layout(family);
        weights.push(Connections { table: connections.to_owned(), layout: layouts.0, bytes: each(0)? });
        weights.push(Connections { table: replies.to_owned(), layout: layouts.1, bytes: each(1)? });
    }
    Ok(weights)
}

/// Bytes that the kernel says a map takes.
fn memory(bench: &Bench, name: &str) -> Result<u64> {
    let map =
        MapData::from_pin(bench.bpfvs.pins().join("maps").join(name)).with_context(|| format!("open the pinned map {name}"))?;
    let file = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    let bytes = text.lines().find_map(|line| line.strip_prefix("memlock:")).map(str::trim);
    bytes.and_then(|bytes| bytes.parse().ok()).with_context(|| format!("the kernel does not say how much memory {name} takes"))
}
