//! Arrays of 64-bit words that the daemon and the kernel's programs share as memory.
//!
//! Counters, cursors, schedules and the filter are read or written thousands of times in a second; a system call for
//! each would cost more than the work. `BPF_F_MMAPABLE` arrays can be mapped: what one side stores, the other sees.
//! Every element is a word of eight bytes, and every access goes through an atomic, so that nobody sees half of one.
//!
//! ```text
//! kernel:  atomic add on COUNTERS[7]     daemon:  counters.load(7)
//! ```
//!
//! This module is the only one that touches shared memory. It gives no meaning to the words.
#![expect(unsafe_code, reason = "memory that is shared with the kernel has no safe type")]

use std::{
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::Context as _;
use aya::maps::MapData;
use memmap2::{MmapOptions, MmapRaw};

/// A mapped array.
#[derive(Debug)]
pub struct Words {
    memory: MmapRaw,
    length: u32,
}

impl Words {
    /// Maps the array that is pinned there.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let data = MapData::from_pin(path).with_context(|| format!("the pinned map {} cannot be opened", path.display()))?;
        let info = data.info().with_context(|| format!("the kernel does not describe the map {}", path.display()))?;
        anyhow::ensure!(
            info.value_size() == size_of::<u64>() as u32,
            "the map {} has elements of {} bytes instead of 8: it belongs to another version of bpfvs",
            path.display(),
            info.value_size()
        );
        let length = info.max_entries();
        let bytes = (length as usize * size_of::<u64>()).next_multiple_of(page_size());
        let memory = MmapOptions::new()
            .len(bytes)
            .map_raw(data.fd().as_fd().as_raw_fd())
            .with_context(|| format!("the map {} cannot be mapped into memory", path.display()))?;
        Ok(Self { memory, length })
    }

    /// Memory that no kernel shares, for tests of what is done with it.
    #[cfg(test)]
    pub(crate) fn anonymous(length: u32) -> Self {
        let bytes = (length as usize * size_of::<u64>()).next_multiple_of(page_size());
        let memory = MmapOptions::new().len(bytes).map_anon().expect("there is memory").into();
        Self { memory, length }
    }

    /// How many words there are.
    pub const fn length(&self) -> u32 {
        self.length
    }

    /// One word; nothing if the index is out of range.
    #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins at a page")]
    pub fn word(&self, index: u32) -> Option<&AtomicU64> {
        if index >= self.length {
            return None;
        }
        // SAFETY: the index is below the length, for which `open` mapped enough memory; the mapping is page-aligned and
        // lives as long as `self`; all accesses on both sides are atomic.
        Some(unsafe { AtomicU64::from_ptr(self.memory.as_mut_ptr().cast::<u64>().add(index as usize)) })
    }

    /// Reads a word; zero if the index is out of range.
    pub fn load(&self, index: u32) -> u64 {
        self.word(index).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Reads a word that is zero as a rule, and makes it so.
    pub fn take(&self, index: u32) -> u64 {
        // To write costs more than to read.
        let word = self.word(index).filter(|word| word.load(Ordering::Relaxed) != 0);
        word.map_or(0, |word| word.swap(0, Ordering::AcqRel))
    }

    /// Writes a word, after everything that was written before; nothing happens if the index is out of range.
    pub fn store(&self, index: u32, value: u64) {
        if let Some(word) = self.word(index) {
            word.store(value, Ordering::Release);
        }
    }
}

/// Two halves as they stand in memory: the first at the lower address. BPF objects here are little-endian, as the host is.
pub const fn pair(first: u32, second: u32) -> u64 {
    first as u64 | (second as u64) << 32
}

/// The opposite of [`pair`].
pub const fn halves(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

fn page_size() -> usize {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| usize::try_from(size).ok())
        .unwrap_or(4096)
}

#[cfg(target_endian = "big")]
compile_error!("the eBPF objects are built for little-endian machines");
