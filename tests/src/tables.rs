//! A prototype of another connection table beside the kernel's hash map (`lb_common::lines`): the eBPF object `lines`, loaded.
//!
//! What it is for, and what came out: `docs/decisions/connection-table.md`. `cargo xtask bench table` measures both tables in one
//! run; a test lets all CPUs quarrel over few keys, and userspace with them, by mapped memory.
//!
//! Userspace has the same algorithm as the programs, over another [`Memory`]; it can do all but insert, which a program that is run
//! for it must do: a program always comes to its end, and a daemon may be killed with a slot in its hands.
//!
//! There is `unsafe` code here, in one line: memory that programs in the kernel change is read by atomic operations.

use std::{
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{HashMap, Map, MapData},
    programs::{RawTracePoint, RawTracePointRunOptions, TestRun as _},
};
use lb_common::{
    connection::ConnectionKey,
    family::{Ipv4, Ipv6},
    lines::{Key, LINE, Memory, Refusal, Seed},
    quarrel::{Numbered, Run},
};
use memmap2::{MmapOptions, MmapRaw};

use crate::speed::harness;

/// The loaded object.
#[derive(Debug)]
pub struct Tables {
    ebpf: Ebpf,
    seed: Seed,
}

/// How large the tables are, those of each family.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Lines of 64 bytes: an even number.
    pub lines: [u32; 2],
    /// Entries of the stash.
    pub stash: u32,
    /// Entries of the kernel's hash map.
    pub hash: [u32; 2],
}

/// What a key of a table must be for userspace.
pub trait UserKey: Key + Numbered + Pod {
    /// Its place in what is one for each family.
    const INDEX: usize;
    /// How its maps' names end.
    const SUFFIX: &'static str;
}

impl UserKey for ConnectionKey<Ipv4> {
    const INDEX: usize = 0;
    const SUFFIX: &'static str = "V4";
}

impl UserKey for ConnectionKey<Ipv6> {
    const INDEX: usize = 1;
    const SUFFIX: &'static str = "V6";
}

impl Tables {
    /// Loads the object.
    pub fn load(sizes: Sizes) -> Result<Self> {
        let path: PathBuf = harness::object()?.with_file_name("lines");
        let numbers = || std::array::from_fn(|_| fastrand::u64(..));
        let seed = Seed { home: numbers(), second: numbers() };
        let mut loader = EbpfLoader::new();
        loader.override_global("LINES", &sizes.lines, true).override_global("SEED", &seed, true);
        loader.map_max_entries("STASH_V4", sizes.stash).map_max_entries("STASH_V6", sizes.stash);
        loader.map_max_entries("LINES_V4", sizes.lines[0]).map_max_entries("LINES_V6", sizes.lines[1]);
        loader.map_max_entries("HASH_V4", sizes.hash[0]).map_max_entries("HASH_V6", sizes.hash[1]);
        let mut ebpf = loader.load_file(&path).with_context(|| format!("load {}; `cargo build` makes it", path.display()))?;
        for (name, program) in ebpf.programs_mut() {
            let program: &mut RawTracePoint = program.try_into()?;
            program.load().with_context(|| format!("load {name}"))?;
        }
        Ok(Self { ebpf, seed })
    }

    /// Runs a program on this CPU with so many flows, for a thread of this number, and says what it has done.
    pub fn run(&self, program: &str, thread: usize, run: Run, times: u64) -> Result<Run> {
        let runs = self.words("RUNS")?;
        let first = thread * WORDS_OF_RUN;
        for (at, word) in [run.flow, run.flows, run.part, run.done, run.torn].into_iter().enumerate() {
            runs.at(first + at).store(word, Ordering::Relaxed);
        }
        let mut options = RawTracePointRunOptions::new();
        (options.args[0], options.args[1]) = (times, thread as u64);
        let name = program;
        let program: &RawTracePoint = self.ebpf.program(name).with_context(|| format!("no {name} in the object"))?.try_into()?;
        program.test_run(options).with_context(|| format!("run {name}"))?;
        let [flow, flows, part, done, torn] = std::array::from_fn(|at| runs.at(first + at).load(Ordering::Relaxed));
        Ok(Run { flow, flows, part, done, torn })
    }

    /// An array's elements as words, by mapped memory.
    pub fn words(&self, name: &str) -> Result<Words> {
        let Map::Array(data) = self.map(name)? else { bail!("{name} is no array") };
        let info = data.info()?;
        let length = info.value_size() as usize * info.max_entries() as usize;
        let memory = MmapOptions::new().len(length.next_multiple_of(4096)).map_raw(data.fd().as_fd().as_raw_fd());
        Ok(Words { memory: memory.with_context(|| format!("map {name}"))?, length: length / 8 })
    }

    fn map(&self, name: &str) -> Result<&Map> {
        self.ebpf.map(name).with_context(|| format!("no {name} in the object"))
    }

    /// The lines of a family, for the algorithm in userspace.
    pub fn lines<K: UserKey>(&self) -> Result<Mapped<K>> {
        Ok(Mapped { lines: self.words(&format!("LINES_{}", K::SUFFIX))?, seed: self.seed, key: PhantomData })
    }

    /// The keys in the stash.
    pub fn stashed<K: UserKey>(&self) -> Result<Vec<K>> {
        let map: HashMap<&MapData, K, [u64; LINE]> = self.map(&format!("STASH_{}", K::SUFFIX))?.try_into()?;
        map.keys().map(|key| key.context("read the stash")).collect()
    }
}

/// Words of a [`Run`], in memory.
const WORDS_OF_RUN: usize = size_of::<Run>() / 8;

/// An array's memory.
#[derive(Debug)]
pub struct Words {
    memory: MmapRaw,
    length: usize,
}

impl Words {
    /// How many there are.
    pub const fn length(&self) -> usize {
        self.length
    }

    /// One of them.
    ///
    /// # Panics
    /// If there is no such word.
    #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins with a page")]
    pub fn at(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.length, "word {index} of {}", self.length);
        // SAFETY: aligned, within the mapped memory, which lives as long as this does; everybody's accesses to it are atomic.
        unsafe { AtomicU64::from_ptr(self.memory.as_mut_ptr().cast::<u64>().add(index)) }
    }
}

/// The lines as userspace sees them: all but insertions, and the stash.
#[derive(Debug)]
pub struct Mapped<K> {
    lines: Words,
    seed: Seed,
    key: PhantomData<K>,
}

impl<K: UserKey> Memory<K> for Mapped<K> {
    type Line = usize;

    fn lines(&self) -> u32 {
        (self.lines.length() / LINE) as u32
    }

    fn home_number(&self, index: usize) -> u64 {
        self.seed.home[index]
    }

    fn second_number(&self, index: usize) -> u64 {
        self.seed.second[index]
    }

    fn line(&self, index: u32) -> Option<usize> {
        Some(index as usize * LINE)
    }

    fn load(&self, line: usize, word: usize) -> u64 {
        self.lines.at(line + word).load(Ordering::Acquire)
    }

    fn store(&self, _: usize, _: usize, _: u64) {
        unreachable!("userspace inserts nothing");
    }

    fn store_56(&self, _: usize, _: usize, _: u64) {
        unreachable!("userspace inserts nothing");
    }

    fn compare_exchange(&self, line: usize, word: usize, old: u64, new: u64) -> bool {
        self.lines.at(line + word).compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    fn add(&self, line: usize, word: usize, addend: u64) {
        self.lines.at(line + word).fetch_add(addend, Ordering::SeqCst);
    }

    fn stashed(&self, _: &K) -> Option<usize> {
        None
    }

    fn stash(&self, _: &K, _: &[u64; LINE]) -> Result<(), Refusal> {
        Err(Refusal::Full)
    }

    fn unstash(&self, _: &K) {}

    fn nonce(&self) -> u32 {
        0
    }
}
