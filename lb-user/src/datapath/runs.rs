//! Schedules, published: where runs of picks stand in the one big array, and how a new one takes an old one's place.
//!
//! The kernel must never see half of a run. So a new run is written beside the old one, and then one store of eight bytes,
//! the service's [`Pointer`], makes it the service's. A program that read the old pointer just before may still be reading
//! the old run: its room is given away again only after [`GRACE`], which is thousands of times longer than any program runs.
//!
//! ```text
//! RUNS:       [ ..free.. | old run of 3 | ..free.. | new run of 3 | ..free.. ]
//! SCHEDULES:    3 -> old run    store    3 -> new run
//! ```
//!
//! Room is dealt by first fit from a list of free regions; a run is a few pairs, or a few thousand for hash tables. Nothing
//! here knows how a run is compiled.
//!
//! [`Pointer`]: lb_common::schedule::Pointer

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    thread,
    time::{Duration, Instant},
};

use lb_common::schedule::{HEADER, NOBODY};

use super::{
    Error,
    shared::{Words, halves, pair},
};
use crate::scheduler::Run;

/// How long an old run may still be read.
const GRACE: Duration = Duration::from_millis(100);

/// A part of the array, in pairs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Region {
    offset: u32,
    length: u32,
}

impl Region {
    /// What a run of this many picks takes.
    const fn length_for(picks: u32) -> u32 {
        HEADER + picks.div_ceil(2)
    }
}

/// The free regions of the array.
#[derive(Debug)]
struct Space {
    /// Offset to length; neighbours are always joined.
    free: BTreeMap<u32, u32>,
}

impl Space {
    fn new(length: u32) -> Self {
        Self { free: BTreeMap::from([(0, length)]) }
    }

    /// Takes the first free region that is large enough.
    fn take(&mut self, length: u32) -> Option<Region> {
        let (&offset, &found) = self.free.iter().find(|(_, found)| **found >= length)?;
        self.free.remove(&offset);
        if found > length {
            self.free.insert(offset + length, found - length);
        }
        Some(Region { offset, length })
    }

    /// Takes just this region. `false` if a part of it is not free.
    fn reserve(&mut self, region: Region) -> bool {
        let Some((&offset, &length)) = self.free.range(..=region.offset).next_back() else { return false };
        let Some(end) = region.offset.checked_add(region.length) else { return false };
        if end > offset + length {
            return false;
        }
        self.free.remove(&offset);
        if region.offset > offset {
            self.free.insert(offset, region.offset - offset);
        }
        if offset + length > end {
            self.free.insert(end, offset + length - end);
        }
        true
    }

    /// Gives a region back.
    fn give(&mut self, region: Region) {
        let mut joined = region;
        if let Some((&offset, &length)) = self.free.range(..region.offset).next_back()
            && offset + length == region.offset
        {
            self.free.remove(&offset);
            joined = Region { offset, length: length + region.length };
        }
        if let Some(length) = self.free.remove(&(region.offset + region.length)) {
            joined.length += length;
        }
        self.free.insert(joined.offset, joined.length);
    }
}

/// What a run is for.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Use {
    /// New connections, as the service's scheduler has it.
    Schedule,
    /// New connections in flood mode: the picks are a table.
    Flood,
}

/// The published schedules, and the tables for flood mode.
#[derive(Debug)]
pub struct Runs {
    schedules: Words,
    floods: Words,
    cursors: Words,
    pairs: Words,
    space: Space,
    published: HashMap<(Use, u32), Region>,
    retired: VecDeque<(Instant, Region)>,
}

impl Runs {
    /// Takes over what is published already.
    pub fn new(schedules: Words, floods: Words, cursors: Words, pairs: Words) -> Self {
        let mut space = Space::new(pairs.length());
        let mut published = HashMap::new();
        for (purpose, pointers) in [(Use::Schedule, &schedules), (Use::Flood, &floods)] {
            for service in 0..pointers.length() {
                let (offset, picks) = halves(pointers.load(service));
                if picks == 0 {
                    continue;
                }
                let region = Region { offset, length: Region::length_for(picks) };
                if space.reserve(region) {
                    published.insert((purpose, service), region);
                } else {
                    tracing::warn!(service, offset, picks, "a schedule that was found points outside its room; it is cleared");
                    pointers.store(service, 0);
                }
            }
        }
        Self { schedules, floods, cursors, pairs, space, published, retired: VecDeque::new() }
    }

    const fn pointers(&self, purpose: Use) -> &Words {
        match purpose {
            Use::Schedule => &self.schedules,
            Use::Flood => &self.floods,
        }
    }

    /// Services that fit.
    pub const fn capacity(&self) -> u32 {
        self.schedules.length()
    }

    /// Where a service's cursor stands.
    pub fn cursor(&self, service: u32) -> u32 {
        halves(self.cursors.load(service)).0
    }

    /// Makes `run` the schedule of a service.
    pub fn publish(&mut self, service: u32, run: &Run) -> Result<(), Error> {
        self.publish_for(Use::Schedule, service, run)
    }

    /// Makes `picks` the table that a service has for flood mode.
    pub fn publish_flood(&mut self, service: u32, picks: &[u32]) -> Result<(), Error> {
        self.publish_for(Use::Flood, service, &Run { picks: picks.to_vec(), ..Run::default() })
    }

    fn publish_for(&mut self, purpose: Use, service: u32, run: &Run) -> Result<(), Error> {
        if service >= self.schedules.length() {
            return Err(full("the table of services", self.schedules.length(), "remove services that are not needed"));
        }
        let picks = u32::try_from(run.picks.len()).unwrap_or(u32::MAX);
        if picks == 0 {
            self.withdraw_from(purpose, service);
            return Ok(());
        }
        let region = self.room(picks)?;
        let head = run.head.min(picks);
        self.pairs.store(region.offset, pair(run.base, head));
        let witness = run.locality.as_ref().and_then(|locality| locality.witness).unwrap_or(NOBODY);
        self.pairs.store(region.offset + 1, pair(picks - head, witness));
        for (index, two) in (region.offset + HEADER..).zip(run.picks.chunks(2)) {
            self.pairs.store(index, pair(two[0], two.get(1).copied().unwrap_or(NOBODY)));
        }
        self.pointers(purpose).store(service, pair(region.offset, picks));
        if let Some(old) = self.published.insert((purpose, service), region) {
            self.retired.push_back((Instant::now(), old));
        }
        Ok(())
    }

    /// Leaves a service without a schedule.
    pub fn withdraw(&mut self, service: u32) {
        self.withdraw_from(Use::Schedule, service);
        self.withdraw_from(Use::Flood, service);
    }

    fn withdraw_from(&mut self, purpose: Use, service: u32) {
        self.pointers(purpose).store(service, 0);
        if let Some(old) = self.published.remove(&(purpose, service)) {
            self.retired.push_back((Instant::now(), old));
        }
    }

    /// Finds room, and waits for old runs to become free if there is no other.
    fn room(&mut self, picks: u32) -> Result<Region, Error> {
        // No array of the kernel is as long as the largest numbers; then `take` finds nothing.
        let length = if picks > self.pairs.length() { u32::MAX } else { Region::length_for(picks) };
        loop {
            self.reclaim();
            if let Some(region) = self.space.take(length) {
                return Ok(region);
            }
            let Some((since, _)) = self.retired.front() else {
                return Err(full(
                    "the table of schedules",
                    self.pairs.length(),
                    "use fewer services with hash schedulers, or weights with a large common divisor",
                ));
            };
            thread::sleep(GRACE.saturating_sub(since.elapsed()));
        }
    }

    /// Gives the room of old runs back that nobody can be reading any more.
    fn reclaim(&mut self) {
        while let Some((since, region)) = self.retired.front().copied()
            && since.elapsed() >= GRACE
        {
            self.space.give(region);
            self.retired.pop_front();
        }
    }
}

fn full(what: &'static str, limit: u32, advice: &'static str) -> Error {
    Error::Full { what, limit, advice }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_region_that_was_given_back_is_dealt_again() {
        let mut space = Space::new(10);
        let first = space.take(4).expect("there is room");
        let second = space.take(6).expect("there is room");
        assert_eq!(space.take(1), None);
        space.give(first);
        space.give(second);
        assert_eq!(space.take(10), Some(Region { offset: 0, length: 10 }));
    }

    #[test]
    fn a_region_can_be_reserved_once() {
        let mut space = Space::new(10);
        assert!(space.reserve(Region { offset: 3, length: 4 }));
        assert!(!space.reserve(Region { offset: 6, length: 1 }));
        assert!(!space.reserve(Region { offset: 8, length: 3 }));
        assert!(space.reserve(Region { offset: 0, length: 3 }));
        assert!(space.reserve(Region { offset: 7, length: 3 }));
        assert!(space.free.is_empty());
    }

    fn runs(schedules: Words, pairs: Words) -> Runs {
        Runs::new(schedules, Words::anonymous(8), Words::anonymous(8), pairs)
    }

    /// The run of a service as the kernel reads it: base, head, period, picks.
    fn read(runs: &Runs, service: u32) -> (u32, u32, u32, Vec<u32>) {
        let (offset, count) = halves(runs.schedules.load(service));
        let ((base, head), (period, _)) = (halves(runs.pairs.load(offset)), halves(runs.pairs.load(offset + 1)));
        let pick = |position| halves(runs.pairs.load(offset + HEADER + position / 2));
        let picks = (0..count).map(|position| if position % 2 == 0 { pick(position).0 } else { pick(position).1 });
        (base, head, period, picks.collect())
    }

    #[test]
    fn a_run_is_published_as_the_kernel_reads_it() {
        let mut runs = runs(Words::anonymous(8), Words::anonymous(64));
        runs.publish(3, &Run { base: 17, head: 2, picks: vec![9, 8, 7, 6, 5], truncated: false, locality: None })
            .expect("there is room");
        assert_eq!(read(&runs, 3), (17, 2, 3, vec![9, 8, 7, 6, 5]));
        runs.publish(3, &Run { base: 18, head: 0, picks: vec![4], truncated: false, locality: None }).expect("there is room");
        assert_eq!(read(&runs, 3), (18, 0, 1, vec![4]));
        runs.publish(3, &Run::default()).expect("an empty run needs no room");
        assert_eq!(runs.schedules.load(3), 0);
        assert!(runs.publish(8, &Run::default()).is_err(), "there is no such service");
    }

    #[test]
    fn an_old_run_is_not_written_over_at_once() {
        let mut runs = runs(Words::anonymous(8), Words::anonymous(16));
        let run = |pick| Run { base: 0, head: 0, picks: vec![pick; 8], truncated: false, locality: None };
        runs.publish(0, &run(1)).expect("there is room");
        let (first, _) = halves(runs.schedules.load(0));
        runs.publish(0, &run(2)).expect("there is room");
        assert_eq!(halves(runs.pairs.load(first + HEADER)), (1, 1), "somebody may still be reading it");
        let begin = Instant::now();
        runs.publish(0, &run(3)).expect("the first run makes room");
        assert!(begin.elapsed() >= GRACE / 2, "but not before its time");
        assert_eq!(read(&runs, 0).3, vec![3; 8]);
    }

    #[test]
    fn runs_that_are_found_are_kept() {
        let schedules = Words::anonymous(8);
        schedules.store(1, pair(10, 8));
        schedules.store(2, pair(60, 100)); // beyond the end
        let mut runs = runs(schedules, Words::anonymous(64));
        assert_eq!(runs.schedules.load(1), pair(10, 8));
        assert_eq!(runs.schedules.load(2), 0);
        for service in 3..8 {
            runs.publish(service, &Run { base: 0, head: 0, picks: vec![1; 8], truncated: false, locality: None })
                .expect("there is room");
            let (offset, _) = halves(runs.schedules.load(service));
            assert!(offset + 6 <= 10 || offset >= 16, "the found run at 10 is not written over by one at {offset}");
        }
    }

    #[test]
    fn a_service_has_a_schedule_and_a_table_for_floods() {
        let mut runs = runs(Words::anonymous(8), Words::anonymous(64));
        runs.publish(2, &Run { picks: vec![1, 2], ..Run::default() }).expect("there is room");
        runs.publish_flood(2, &[3, 4, 5]).expect("there is room");
        assert_eq!(read(&runs, 2).3, [1, 2]);
        let (offset, picks) = halves(runs.floods.load(2));
        assert_eq!((halves(runs.pairs.load(offset + HEADER)), picks), ((3, 4), 3));
        runs.withdraw(2);
        assert_eq!((runs.schedules.load(2), runs.floods.load(2), runs.retired.len()), (0, 0, 2));
    }

    proptest! {
        /// Whatever is taken and given back: regions never overlap, and in the end all room is one region again.
        #[test]
        fn regions_never_overlap(steps in prop::collection::vec((any::<bool>(), 1..40_u32, any::<prop::sample::Index>()), 0..200)) {
            let mut space = Space::new(256);
            let mut taken: Vec<Region> = Vec::new();
            for (take, length, which) in steps {
                if take {
                    if let Some(region) = space.take(length) {
                        for other in &taken {
                            prop_assert!(region.offset + region.length <= other.offset || other.offset + other.length <= region.offset);
                        }
                        prop_assert!(region.offset + region.length <= 256);
                        taken.push(region);
                    }
                } else if !taken.is_empty() {
                    space.give(taken.swap_remove(which.index(taken.len())));
                }
            }
            for region in taken {
                space.give(region);
            }
            prop_assert_eq!(space.free, BTreeMap::from([(0, 256)]));
        }
    }
}
