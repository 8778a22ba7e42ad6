//! What must hold for whatever servers a service has: laws of all schedulers, and rr and wrr against IPVS's own words.

use std::time::{Duration, Instant};

use lb_common::schedule::{INELIGIBLE, NOBODY, position};
use proptest::prelude::*;

use super::{Arrivals, Candidate, Change, MAX_PICKS, Run, Scheduler, tests::candidates};
use crate::director::model::Family;

/// Longer than a compilation takes on a slow machine without optimisation, and far shorter than one that counts weights down.
const SOON: Duration = Duration::from_secs(20);

fn scheduler(name: &str, flags: u8) -> Scheduler {
    Scheduler::from_name(name, flags, Family::Ipv4).expect("it is in the list")
}

/// What the kernel takes as its pick number `taken` of a cursor's run.
fn taken(run: &Run, taken: u32) -> Option<u32> {
    let position = position(run.base.wrapping_add(taken), run.base, run.head, run.picks.len() as u32 - run.head)?;
    Some(run.picks[position as usize]).filter(|&pick| pick != NOBODY)
}

/// IPVS's wrr and rr as they are described, without any shortcut.
struct Plain {
    name: &'static str,
    /// Index of the server where the search begins; nothing for the head of the list.
    last: Option<u32>,
    bar: i64,
}

impl Plain {
    fn bars(servers: &[Candidate]) -> (i64, i64) {
        let weights = || servers.iter().map(|server| i64::from(server.weight));
        let step = (1..=weights().max().unwrap_or(0)).rev().find(|step| weights().all(|weight| weight % step == 0));
        let step = step.unwrap_or(1);
        (weights().max().unwrap_or(0) - (step - 1), step)
    }

    fn servers_changed(&mut self, servers: &[Candidate], change: Change) {
        if self.name == "rr" {
            if let Change::Removed { position, index } = change
                && self.last == Some(index)
            {
                self.last = (position > 0).then(|| servers[position - 1].index);
            }
            return;
        }
        let (highest, step) = Self::bars(servers);
        self.last = None;
        if self.bar > highest || self.bar == 0 {
            self.bar = highest;
        } else if step > 1 {
            self.bar = self.bar / step * step + 1;
        }
    }

    fn pick(&mut self, servers: &[Candidate]) -> Option<u32> {
        let start = self.last.map(|last| servers.iter().position(|server| server.index == last).expect("it follows changes"));
        if self.name == "rr" {
            let behind = start.map_or(0, |start| start + 1);
            let chosen = (behind..servers.len()).chain(0..behind).find(|&at| servers[at].eligible())?;
            self.last = Some(servers[chosen].index);
            return self.last;
        }
        let (highest, step) = Self::bars(servers);
        if highest == 0 {
            return None;
        }
        let (mut stop, mut last_pass, mut restarted, mut next) = (None, false, false, start.map_or(0, |start| start + 1));
        loop {
            for (at, server) in servers.iter().enumerate().skip(next) {
                if !server.overloaded && i64::from(server.weight) >= self.bar {
                    self.last = Some(server.index);
                    return self.last;
                }
                if stop == Some(at) {
                    self.last = Some(server.index);
                    return None;
                }
            }
            next = 0;
            self.bar -= step;
            if self.bar <= 0 {
                self.bar = highest;
                if last_pass || start.is_none() {
                    self.last = None;
                    return None;
                }
                restarted = true;
            }
            last_pass = self.bar <= step;
            if last_pass && restarted && start.is_some() {
                stop = start;
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Event {
    Add(u32),
    Remove(prop::sample::Index),
    Edit(prop::sample::Index, u32),
    Overload(prop::sample::Index, bool),
    OverloadAll(bool),
    Take(u32),
}

fn event() -> impl Strategy<Value = Event> {
    let weight = || prop_oneof![Just(0), 0..5_u32, (1..5_u32).prop_map(|weight| weight * 6)];
    prop_oneof![
        weight().prop_map(Event::Add),
        any::<prop::sample::Index>().prop_map(Event::Remove),
        (any::<prop::sample::Index>(), weight()).prop_map(|(which, weight)| Event::Edit(which, weight)),
        (any::<prop::sample::Index>(), any::<bool>()).prop_map(|(which, overloaded)| Event::Overload(which, overloaded)),
        any::<bool>().prop_map(Event::OverloadAll),
        (0..40_u32).prop_map(Event::Take),
    ]
}

proptest! {
    #[test]
    fn runs_are_what_ipvs_would_choose(name in prop_oneof![Just("rr"), Just("wrr")], events in prop::collection::vec(event(), 1..60)) {
        let mut plain = Plain { name, last: None, bar: 0 };
        let mut compiled = scheduler(name, 0);
        let mut servers: Vec<Candidate> = Vec::new();
        let (mut next_index, mut cursor) = (0, u32::MAX - 50);
        for event in events {
            let change = match event {
                Event::Add(weight) => {
                    let mut server = candidates(&[weight])[0];
                    server.index = next_index;
                    next_index += 1;
                    servers.insert(0, server);
                    Some(Change::Added)
                }
                Event::Take(count) => {
                    let run = compiled.compile(&servers, Arrivals::after(cursor));
                    prop_assert!(!run.truncated);
                    for number in 0..count {
                        prop_assert_eq!(taken(&run, number), plain.pick(&servers));
                    }
                    compiled.advance(&servers, count);
                    cursor = cursor.wrapping_add(count);
                    None
                }
                Event::OverloadAll(overloaded) => {
                    for server in &mut servers {
                        server.overloaded = overloaded;
                    }
                    None
                }
                _ if servers.is_empty() => None,
                Event::Remove(which) => {
                    let position = which.index(servers.len());
                    let index = servers.remove(position).index;
                    Some(Change::Removed { position, index })
                }
                Event::Edit(which, weight) => {
                    let position = which.index(servers.len());
                    servers[position].weight = weight;
                    Some(Change::Edited { position })
                }
                Event::Overload(which, overloaded) => {
                    let position = which.index(servers.len());
                    servers[position].overloaded = overloaded;
                    None
                }
            };
            if let Some(change) = change {
                compiled.servers_changed(&servers, change);
                plain.servers_changed(&servers, change);
            }
        }
    }

    #[test]
    fn nobody_who_takes_no_connections_is_named(
        name in prop::sample::select(Scheduler::NAMES),
        flags in 0..4_u8,
        servers in prop::collection::vec((0..5_u32, any::<bool>()), 0..8),
    ) {
        let mut list = candidates(&servers.iter().map(|server| server.0).collect::<Vec<_>>());
        for (candidate, (_, overloaded)) in list.iter_mut().zip(&servers) {
            candidate.overloaded = *overloaded;
        }
        let mut scheduler = scheduler(name, flags);
        scheduler.servers_changed(&list, Change::Started);
        for pick in scheduler.compile(&list, Arrivals::after(0)).picks {
            if pick & INELIGIBLE == 0 {
                prop_assert!(list.iter().any(|server| server.index == pick && server.eligible()));
            }
        }
    }

    #[test]
    fn many_picks_at_once_are_as_many_one_by_one(
        name in prop::sample::select(Scheduler::NAMES),
        weights in prop::collection::vec(0..7_u32, 0..6),
        before in 0..20_u32,
        count in 0..200_u32,
    ) {
        let servers = candidates(&weights);
        let mut at_once = scheduler(name, 0);
        at_once.servers_changed(&servers, Change::Started);
        at_once.advance(&servers, before);
        let mut one_by_one = at_once.clone();
        at_once.advance(&servers, count);
        for _ in 0..count {
            one_by_one.advance(&servers, 1);
        }
        prop_assert_eq!(at_once, one_by_one);
    }
}

#[test]
fn huge_weights_take_no_time() {
    let started = Instant::now();
    let heaviest = i32::MAX as u32;
    for weights in [[heaviest, 1, 0], [1, heaviest, heaviest - 1], [heaviest; 3], [1, 1, heaviest]] {
        for name in Scheduler::NAMES {
            let mut servers = candidates(&weights);
            let mut scheduler = scheduler(name, 3);
            scheduler.servers_changed(&servers, Change::Started);
            let run = scheduler.compile(&servers, Arrivals::after(0));
            assert!(run.picks.len() <= MAX_PICKS);
            scheduler.advance(&servers, u32::MAX);
            // The heaviest is out, so the bar of wrr begins far above the others.
            for server in servers.iter_mut().filter(|server| server.weight == heaviest) {
                server.overloaded = true;
            }
            scheduler.compile(&servers, Arrivals::after(0));
            scheduler.advance(&servers, 7);
        }
    }
    assert!(started.elapsed() < SOON, "it took {:?}", started.elapsed());
}

#[test]
fn a_run_that_is_cut_off_goes_on_where_it_ended() {
    let servers = candidates(&[100_000, 99_999]);
    let mut wrr = scheduler("wrr", 0);
    wrr.servers_changed(&servers, Change::Started);
    let first = wrr.compile(&servers, Arrivals::after(0));
    assert!(first.truncated);
    assert_eq!(first.picks.len(), MAX_PICKS);
    let mut step_by_step = wrr.clone();
    wrr.advance(&servers, MAX_PICKS as u32);
    for _ in 0..MAX_PICKS / 64 {
        step_by_step.advance(&servers, 64);
    }
    assert_eq!(wrr, step_by_step);
    assert_ne!(wrr.compile(&servers, Arrivals::after(0)).picks, first.picks);
}

#[test]
fn as_many_servers_as_fit_compile() {
    let started = Instant::now();
    let weights: Vec<u32> = (0..65_535).map(|number| if number % 1000 == 0 { i32::MAX as u32 } else { number % 7 }).collect();
    let servers = candidates(&weights);
    for name in Scheduler::NAMES {
        let mut scheduler = scheduler(name, 3);
        scheduler.servers_changed(&servers[1..], Change::Started);
        scheduler.servers_changed(&servers, Change::Added);
        scheduler.compile(&servers, Arrivals::after(0));
        scheduler.advance(&servers, 1_000_000);
    }
    let mut rr = scheduler("rr", 0);
    let everybody = candidates(&vec![1; 100_000]);
    let run = rr.compile(&everybody, Arrivals::after(0));
    assert!(!run.truncated);
    assert_eq!(run.picks.len(), everybody.len(), "a round of rr is never cut off");
    assert!(started.elapsed() < SOON, "it took {:?}", started.elapsed());
}
