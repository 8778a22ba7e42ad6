//! The table under several threads, which the host interrupts wherever it likes, and how full it gets.

use core::sync::atomic::{
    AtomicI32, AtomicU32, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};
use std::{collections::HashMap, println, sync::Mutex, thread, vec::Vec};

use super::*;
use crate::quarrel::{connection, is_whole};

/// Lines of this process, and a stash whose values are used again at once, as the kernel's are.
struct Table<K> {
    lines: Vec<[AtomicU64; LINE]>,
    seed: Seed,
    stash: Mutex<(HashMap<K, usize>, Vec<usize>)>,
    values: Vec<[AtomicU64; LINE]>,
    nonce: AtomicU32,
}

#[derive(Clone, Copy)]
enum Line {
    Of(usize),
    Stashed(usize),
}

/// xorshift, with a good end.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

impl<K> Table<K> {
    fn new(lines: usize, stash: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut numbers = || core::array::from_fn(|_| random.next());
        Self {
            lines: (0..lines).map(|_| Default::default()).collect(),
            seed: Seed { home: numbers(), second: numbers() },
            stash: Mutex::new((HashMap::new(), (0..stash).collect())),
            values: (0..stash).map(|_| Default::default()).collect(),
            nonce: AtomicU32::new(0),
        }
    }

    fn word(&self, line: Line, word: usize) -> &AtomicU64 {
        match line {
            Line::Of(index) => &self.lines[index][word],
            Line::Stashed(index) => &self.values[index][word],
        }
    }
}

impl<K: Key + core::hash::Hash> Memory<K> for Table<K> {
    type Line = Line;

    fn lines(&self) -> u32 {
        self.lines.len() as u32
    }

    fn home_number(&self, index: usize) -> u64 {
        self.seed.home[index]
    }

    fn second_number(&self, index: usize) -> u64 {
        self.seed.second[index]
    }

    fn line(&self, index: u32) -> Option<Line> {
        Some(Line::Of(index as usize))
    }

    fn load(&self, line: Line, word: usize) -> u64 {
        self.word(line, word).load(SeqCst)
    }

    fn store(&self, line: Line, word: usize, value: u64) {
        self.word(line, word).store(value, SeqCst);
    }

    fn store_56(&self, line: Line, word: usize, value: u64) {
        let put = |old| Some(old & !(OVERFLOW - 1) | value);
        let _ = self.word(line, word).fetch_update(SeqCst, SeqCst, put);
    }

    fn compare_exchange(&self, line: Line, word: usize, old: u64, new: u64) -> bool {
        self.word(line, word).compare_exchange(old, new, SeqCst, SeqCst).is_ok()
    }

    fn add(&self, line: Line, word: usize, addend: u64) {
        self.word(line, word).fetch_add(addend, SeqCst);
    }

    fn stashed(&self, key: &K) -> Option<Line> {
        self.stash.lock().expect("no thread panics with it").0.get(key).copied().map(Line::Stashed)
    }

    fn stash(&self, key: &K, slot: &[u64; LINE]) -> Result<(), Refusal> {
        let (entries, free) = &mut *self.stash.lock().expect("no thread panics with it");
        if entries.contains_key(key) {
            return Err(Refusal::Exists);
        }
        let index = free.pop().ok_or(Refusal::Full)?;
        self.values[index].iter().zip(slot).for_each(|(word, value)| word.store(*value, SeqCst));
        entries.insert(*key, index);
        Ok(())
    }

    fn unstash(&self, key: &K) {
        let (entries, free) = &mut *self.stash.lock().expect("no thread panics with it");
        let index = entries.remove(key).expect("an entry is taken out once, by its owner");
        free.push(index);
    }

    fn nonce(&self) -> u32 {
        self.nonce.fetch_add(1, Relaxed)
    }
}

fn key_v4(number: u32) -> ConnectionKey<Ipv4> {
    let ports = Ports::new((number % 7) as u16, 80);
    ConnectionKey { client: number / 7, vip: 0x0a63_0001, ports, protocol: if number.is_multiple_of(2) { 6 } else { 17 } }
}

fn key_v6(number: u32) -> ConnectionKey<Ipv6> {
    let ports = Ports::new((number % 7) as u16, 80);
    ConnectionKey { client: [0xfd09, 0, number / 49, number / 7 % 7], vip: [0xfd99, 0, 0, 1], ports, protocol: 6 }
}

/// Several threads insert, find and delete few keys in few lines, beside one that sweeps.
///
/// Whoever inserts or deletes counts that; so at the end each key has to be there as often as its count says, and that has to be 0 or 1.
fn stress<K: Key + core::hash::Hash + Sync + Send>(key: fn(u32) -> K, keys: u32, lines: usize, stash: usize, seed: u64)
where
    Table<K>: Sync,
{
    let table = &Table::new(lines, stash, seed);
    let counts: &Vec<AtomicI32> = &(0..keys).map(|_| AtomicI32::new(0)).collect();
    thread::scope(|scope| {
        for worker in 0..4 {
            scope.spawn(move || {
                let mut random = Random(seed ^ (worker + 1) << 40);
                for round in 0..3_000 {
                    let number = (random.next() >> 33) as u32 % keys;
                    match random.next() >> 62 {
                        0 | 1 => {
                            if insert(table, &key(number), &connection(number, round)).is_ok() {
                                counts[number as usize].fetch_add(1, SeqCst);
                            }
                        }
                        2 => {
                            if remove(table, &key(number)) {
                                counts[number as usize].fetch_sub(1, SeqCst);
                            }
                        }
                        _ => {
                            let known = find(table, &key(number)).and_then(|found| read::<K, _>(table, &found));
                            assert!(known.is_none_or(|known| is_whole(number, &known)), "torn: {known:?} of {number}");
                        }
                    }
                }
            });
        }
        scope.spawn(move || {
            for _ in 0..100 {
                for index in 0..lines as u32 {
                    visit(table, index, |met: &K, found| {
                        let number = (0..keys).find(|number| key(*number) == *met).expect("a key that somebody inserted");
                        if let Some(known) = read::<K, _>(table, found) {
                            assert!(is_whole(number, &known), "torn in the sweep: {known:?} of {number}");
                            if known.server.is_multiple_of(8) && remove_found(table, met, found) {
                                counts[number as usize].fetch_sub(1, SeqCst);
                            }
                        }
                    });
                }
            }
        });
    });
    let mut met = HashMap::new();
    for index in 0..lines as u32 {
        visit(table, index, |key: &K, _| *met.entry(*key).or_insert(0) += 1);
    }
    for key in table.stash.lock().expect("all are done").0.keys() {
        *met.entry(*key).or_insert(0) += 1;
    }
    let mut live = 0;
    for number in 0..keys {
        let (count, met) = (counts[number as usize].load(SeqCst), met.get(&key(number)).copied().unwrap_or(0));
        assert!(
            count == met && (0..=1).contains(&count),
            "key {number} was inserted {count} times more than deleted, and is there {met} times"
        );
        assert_eq!(find(table, &key(number)).is_some(), count == 1, "key {number}");
        live += count;
    }
    for number in 0..keys {
        assert_eq!(remove(table, &key(number)), counts[number as usize].load(SeqCst) == 1);
    }
    for line in &table.lines {
        assert_eq!(line[K::ADDRESSES + 2].load(SeqCst) >> 56, 0, "an overflow that is over");
        assert!((0..LINE).step_by(K::STRIDE).all(|first| line[first + K::ADDRESSES].load(SeqCst) & STATES == FREE));
    }
    assert!(live > 0 || keys < 8);
}

#[test]
fn no_ipv4_entry_is_lost_or_there_twice() {
    for seed in 1..=6 {
        // Two keys that always meet; more than fit into the lines; a stash that is too small.
        stress(key_v4, 2, 2, 8, seed);
        stress(key_v4, 24, 4, 64, seed << 8);
        stress(key_v4, 24, 4, 4, seed << 16);
        stress(key_v4, 12, 16, 8, seed << 24);
    }
}

#[test]
fn no_ipv6_entry_is_lost_or_there_twice() {
    for seed in 1..=6 {
        stress(key_v6, 2, 2, 8, seed);
        stress(key_v6, 24, 8, 64, seed << 8);
        stress(key_v6, 24, 8, 4, seed << 16);
    }
}

/// How many entries are where, at several loads. Printed, with `--nocapture`, for `docs/decisions/connection-table.md`.
#[test]
fn the_stash_stays_small() {
    const LINES: u32 = 1 << 16;
    fn fill<K: Key + core::hash::Hash>(name: &str, key: impl Fn(u32) -> K, most: f64) {
        for percent in [50_u32, 60, 75, 90] {
            let slots = LINES * (LINE / K::STRIDE) as u32;
            let entries = slots / 100 * percent;
            let table = Table::new(LINES as usize, entries as usize, 77 + u64::from(percent));
            let stashed = || table.stash.lock().expect("one thread").0.len() as u32;
            let mut first = None;
            for number in 0..entries {
                insert(&table, &key(number), &connection(1, 1)).expect("room");
                if first.is_none() && stashed() > 0 {
                    first = Some(number);
                }
            }
            let home = (0..entries).filter(|number| !find(&table, &key(*number)).expect("each is found").away).count() as u32;
            let overflowing = table.lines.iter().filter(|line| line[K::ADDRESSES + 2].load(SeqCst) >= OVERFLOW).count() as u32;
            let share = |part: u32, whole: u32| 100.0 * f64::from(part) / f64::from(whole);
            println!(
                "{name} {percent} %: home {:.1} %, stash {:.2} %, the first at {:.0?} % of the slots; overflow of {:.1} % of the lines",
                share(home, entries),
                share(stashed(), entries),
                first.map(|first| share(first, slots)),
                share(overflowing, LINES),
            );
            assert!(percent > 75 || share(stashed(), entries) <= most, "{name}: {} in the stash", stashed());
        }
    }
    let mut random = Random(4711);
    let clients: Vec<u64> = (0..1 << 17).map(|_| random.next()).collect();
    let random_v4 = |number: u32| {
        let client = clients[number as usize];
        ConnectionKey { client: client as u32, ports: Ports::new((client >> 32) as u16, 80), ..key_v4(6) }
    };
    fill("random IPv4", random_v4, 4.0);
    fill("dense IPv4", key_v4, 4.0);
    fill("dense IPv6", key_v6, 10.0);
}

#[test]
fn secrets_decide_where_a_key_is() {
    let places = |seed| {
        let table: Table<ConnectionKey<Ipv4>> = Table::new(1 << 12, 0, seed);
        (0..1000).map(|number| index(key_v4(number).hash(|index| table.seed.home[index]), 1 << 12)).collect::<Vec<_>>()
    };
    let same = places(1).iter().zip(places(2)).filter(|(one, other)| **one == *other).count();
    assert!(same < 10, "{same} of 1000 keys stay where they are");
}
