//! How many connections the tables are made for, and when these take their memory.
//!
//! The tables of connections take their memory when they are made, so that a new connection costs no allocation and never fails for
//! want of memory (`docs/decisions/preallocated-connections.md`), unless [`TableMemory::OnDemand`] is asked for; of the others, only
//! what stands in them takes memory. But for each place a table takes sixteen bytes in any case. So the number has to be known
//! beforehand:
//!
//! ```text
//! asked for                   as long as the tables fit into the memory that is available
//! nobody asks                 the largest power of two whose empty tables take no more than a sixteenth of this machine's memory:
//!                             1 GiB: 131,072    8 GiB: 1,048,576    64 GiB and more: 8,388,608
//! the tables are there        what they were made for
//! ```
//!
//! Where a control group limits the daemon's memory, that limit stands for the machine's memory: the kernel charges the tables to it.

use std::{fs, path::Path};

use anyhow::{Context as _, bail};

use crate::director::model::TableMemory;

/// The least and the most that is chosen if nobody asks.
const CHOSEN: std::ops::RangeInclusive<u32> = 1 << 16..=1 << 23;
/// The part of the memory that the tables take then.
const SHARE: u64 = 16;

/// What a connection's place takes in the tables of connections: the kernel's element, key and value, for IPv4 and IPv6.
const ELEMENTS: u64 = 80 + 104;
/// What a bucket takes in all tables. A table has as many buckets as places, rounded up to a power of two.
const BUCKETS: u64 = 6 * 16;

/// How the tables are made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tables {
    /// How many connections fit into each.
    pub max_connections: u32,
    /// When those of connections take the memory for their entries.
    pub memory: TableMemory,
}

impl Tables {
    /// New ones, if somebody asks for a size and a way to take memory, or for neither.
    pub fn new(asked: Option<u32>, memory: Option<TableMemory>) -> anyhow::Result<Self> {
        let (available, memory) = (Memory::read()?, memory.unwrap_or_default());
        let max_connections = match asked {
            None => suitable(available.total, memory),
            Some(asked) => available.check(asked, memory).map(|()| asked)?,
        };
        Ok(Self { max_connections, memory })
    }

    /// Bytes that they take while they are empty.
    pub const fn size(self) -> u64 {
        size(self.max_connections, self.memory)
    }
}

/// Bytes that empty tables for so many connections take.
const fn size(connections: u32, memory: TableMemory) -> u64 {
    let elements = match memory {
        TableMemory::AtStart => ELEMENTS,
        TableMemory::OnDemand => 0,
    };
    connections as u64 * elements + (connections as u64).next_power_of_two() * BUCKETS
}

/// What suits a machine with so many bytes of memory.
fn suitable(total: u64, memory: TableMemory) -> u32 {
    let mut connections = *CHOSEN.end();
    while connections > *CHOSEN.start() && size(connections, memory) > total / SHARE {
        connections /= 2;
    }
    connections
}

/// The memory that there is for this process, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Memory {
    total: u64,
    available: u64,
}

impl Memory {
    fn read() -> anyhow::Result<Self> {
        let text =
            fs::read_to_string("/proc/meminfo").context("how much memory there is cannot be found out; is /proc mounted?")?;
        let machine =
            Self::parse(&text).context("/proc/meminfo does not say how much memory there is; choose --max-connections")?;
        let group = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| group_limit(&text, Path::new("/sys/fs/cgroup")));
        Ok(group.map_or(machine, |limit| Self { total: machine.total.min(limit), available: machine.available.min(limit) }))
    }

    fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
        };
        Some(Self { total: value("MemTotal")?, available: value("MemAvailable")? })
    }

    fn check(self, asked: u32, memory: TableMemory) -> anyhow::Result<()> {
        if asked == 0 {
            bail!("the connection tables cannot have room for 0 connections; choose at least 1 with --max-connections");
        }
        if size(asked, memory) <= self.available {
            return Ok(());
        }
        let does_fit = |connections: &u32| size(*connections, memory) <= self.available;
        let fits = (0..u32::BITS).map(|bit| 1_u32 << bit).take_while(does_fit).last();
        bail!(
            "empty tables for {asked} connections would take {} MiB of memory, and only {} MiB are available here; choose at most {} with \
             --max-connections",
            size(asked, memory) >> 20,
            self.available >> 20,
            fits.unwrap_or(1)
        );
    }
}

/// The least memory that a control group of version 2 lets its processes have, this process's or one that it lies in.
fn group_limit(groups: &str, root: &Path) -> Option<u64> {
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let limit = |directory: &Path| fs::read_to_string(directory.join("memory.max")).ok()?.trim().parse().ok();
    root.join(group).ancestors().take_while(|directory| directory.starts_with(root)).filter_map(limit).min()
}

#[cfg(test)]
mod tests {
    use super::{TableMemory::*, *};

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_default_follows_the_memory() {
        // A machine has a little less than what its owner paid for.
        let memory = |gib: u64| gib * GIB * 95 / 100;
        let cases =
            [(1, 1 << 17), (2, 1 << 18), (4, 1 << 19), (8, 1 << 20), (16, 1 << 21), (32, 1 << 22), (64, 1 << 23), (512, 1 << 23)];
        for (gib, connections) in cases {
            assert_eq!(suitable(memory(gib), AtStart), connections, "{gib} GiB");
        }
        assert_eq!(suitable(64 << 20, AtStart), 1 << 16);
        // Empty, they take a third; full, not much more than the others.
        for (gib, connections) in [(1, 1 << 19), (8, 1 << 22), (16, 1 << 23)] {
            assert_eq!(suitable(memory(gib), OnDemand), connections, "{gib} GiB");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_would() {
        let memory = Memory { total: 8 * GIB, available: GIB };
        assert!(memory.check(3_000_000, AtStart).is_ok());
        let refusal = memory.check(100_000_000, AtStart).expect_err("28 GiB do not fit").to_string();
        assert!(refusal.contains("100000000") && refusal.contains("1024 MiB") && refusal.contains("at most 2097152"), "{refusal}");
        assert!(memory.check(2_097_152, AtStart).is_ok());
        assert!(memory.check(8_388_608, AtStart).is_err() && memory.check(8_388_608, OnDemand).is_ok());
        assert!(memory.check(u32::MAX, OnDemand).is_err() && memory.check(0, OnDemand).is_err());
    }

    #[test]
    fn memory_is_read() {
        let text = "MemTotal:       24553128 kB\nMemFree:        22001232 kB\nMemAvailable:   23165752 kB\n";
        assert_eq!(Memory::parse(text), Some(Memory { total: 24_553_128 << 10, available: 23_165_752 << 10 }));
        assert_eq!(Memory::parse("MemFree: 1 kB"), None);
    }

    #[test]
    fn the_tightest_control_group_counts() {
        let root = tempfile::tempdir().expect("a directory can be made");
        let inner = root.path().join("outer/inner");
        fs::create_dir_all(&inner).expect("it can be made");
        fs::write(inner.join("memory.max"), "max\n").expect("it can be written");
        assert_eq!(group_limit("0::/outer/inner\n", root.path()), None);
        fs::write(root.path().join("outer/memory.max"), "1073741824\n").expect("it can be written");
        assert_eq!(group_limit("1:net_cls:/x\n0::/outer/inner\n", root.path()), Some(GIB));
        assert_eq!(group_limit("1:memory:/x\n", root.path()), None);
    }
}
