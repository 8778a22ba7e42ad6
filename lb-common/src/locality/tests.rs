//! The datapath's judgements against the model of IPVS, over random histories of a service.

use std::{collections::HashMap, vec, vec::Vec};

use proptest::prelude::*;

use super::*;
use crate::{
    model::locality::{Locality, Server},
    schedule::NOBODY,
};

/// Index of the service, and ticks until a set loses a member.
const SERVICE: u32 = 0xfffe;
const EXPIRATION: u32 = 50;

/// A service: what IPVS makes of it, and what the datapath does. Servers have their indices as names.
struct World {
    ipvs: Locality<u32>,
    standings: HashMap<u32, Standing>,
    destinations: HashMap<u32, Destination>,
    witness: u32,
    replicas: bool,
    /// Where the open connections are.
    connections: Vec<u32>,
    now: u64,
}

/// What the datapath finds in its arrays.
struct Arrays<'a> {
    standings: &'a HashMap<u32, Standing>,
    counters: HashMap<u32, Counters>,
    witness: u32,
    now: u32,
}

impl Service for Arrays<'_> {
    fn index(&self) -> u32 {
        SERVICE
    }

    fn witness(&self) -> u32 {
        self.witness
    }

    fn expiration(&self) -> u32 {
        EXPIRATION
    }

    fn now(&self) -> u32 {
        self.now
    }

    fn standing(&self, index: u32) -> Option<Standing> {
        self.standings.get(&index).copied()
    }

    fn counters(&self, index: u32) -> Option<Counters> {
        self.counters.get(&index).copied()
    }
}

impl World {
    fn new(replicas: bool, weights: &[u32]) -> Self {
        let mut world = Self {
            ipvs: Locality::new(replicas, EXPIRATION.into()),
            standings: HashMap::new(),
            destinations: HashMap::new(),
            witness: NOBODY,
            replicas,
            connections: Vec::new(),
            now: u64::from(u32::MAX) - 100, // so that the datapath's clock wraps
        };
        for (index, &weight) in (0..).zip(weights) {
            world.ipvs.add(index, Server { weight, ..Server::default() });
            world.standings.insert(index, Standing::new(SERVICE as u16, weight, false, 0x3fff));
        }
        world
    }

    /// What the daemon does before each arrival, if arrivals are far apart.
    fn refresh(&mut self) {
        let order = self.ipvs.order().to_vec();
        for (&index, standing) in &mut self.standings {
            let server = self.ipvs.server(index);
            let present = Standing::new(SERVICE as u16, server.weight, server.overloaded, standing.generation());
            *standing = if order.contains(&index) { present } else { present.removed() };
        }
        let has_room = |index: &u32| u64::from(self.ipvs.server(*index).active) * 2 < u64::from(self.ipvs.server(*index).weight);
        self.witness = order.iter().copied().find(has_room).unwrap_or(NOBODY);
    }

    /// What the datapath does with a new connection.
    fn pick(&mut self, address: u32) -> Option<u32> {
        let scheduled = self.ipvs.weighted_least();
        let now = self.now as u32;
        let servers: Vec<u32> = self.standings.keys().copied().collect();
        let counters = |index| {
            let server = self.ipvs.server(index);
            (index, Counters { active: server.active, total: server.total })
        };
        let counters = servers.into_iter().map(counters).collect();
        let arrays = Arrays { counters, standings: &self.standings, witness: self.witness, now };
        let mut place = 1;
        if let Some(destination) = self.destinations.get_mut(&address) {
            let mut survey = Survey::default();
            let chosen = if self.replicas {
                let chosen = destination.choose_replica(&arrays, &mut survey);
                place = survey.place();
                chosen
            } else {
                destination.choose_only(&arrays)
            };
            if chosen.is_some() {
                return chosen;
            }
        }
        let member = self.standings[&scheduled?].member(scheduled?);
        let fresh = Destination { last_used: now, last_changed: now, ..Destination::default() };
        self.destinations.entry(address).or_insert(fresh).learn(member, place, &arrays);
        scheduled
    }

    /// Both pick for a connection, which is then counted.
    fn arrive(&mut self, address: u32, active: bool) -> (Option<u32>, Option<u32>) {
        self.refresh();
        let datapath = self.pick(address);
        let ipvs = self.ipvs.pick(address, self.now);
        if let Some(index) = ipvs {
            let server = self.ipvs.server(index);
            server.total += 1;
            server.active += u32::from(active);
            self.connections.push(index);
        }
        (datapath, ipvs)
    }

    /// The names that the datapath remembers of a destination.
    fn remembered(&self, address: u32) -> Vec<u32> {
        let members = self.destinations.get(&address).map_or([0; MEMBERS], |destination| destination.members);
        members.iter().take_while(|member| **member != 0).map(|member| (member & 0x3ffff) - 1).collect()
    }
}

#[derive(Clone, Debug)]
enum Event {
    Arrive { address: u32, active: bool },
    Close { connection: prop::sample::Index },
    Calm { server: prop::sample::Index },
    Weigh { server: prop::sample::Index, weight: u32 },
    Overload { server: prop::sample::Index },
    Remove { server: prop::sample::Index },
    AddBack { server: prop::sample::Index },
    Wait { ticks: u64 },
}

fn event() -> impl Strategy<Value = Event> {
    let server = any::<prop::sample::Index>;
    prop_oneof![
        12 => (0..4_u32, prop::bool::weighted(0.9)).prop_map(|(address, active)| Event::Arrive { address, active }),
        3 => any::<prop::sample::Index>().prop_map(|connection| Event::Close { connection }),
        1 => server().prop_map(|server| Event::Calm { server }),
        1 => (server(), weight()).prop_map(|(server, weight)| Event::Weigh { server, weight }),
        1 => server().prop_map(|server| Event::Overload { server }),
        1 => server().prop_map(|server| Event::Remove { server }),
        2 => server().prop_map(|server| Event::AddBack { server }),
        2 => (0..100_u64).prop_map(|ticks| Event::Wait { ticks }),
    ]
}

fn weight() -> impl Strategy<Value = u32> {
    prop_oneof![1 => Just(0), 8 => 1..6_u32, 1 => 0..=i32::MAX as u32]
}

/// Lets an event happen, if it is no arrival.
fn happen(world: &mut World, event: &Event) {
    let count = world.standings.len();
    let order = world.ipvs.order().to_vec();
    match event {
        Event::Arrive { .. } => {}
        Event::Close { connection } => {
            if !world.connections.is_empty() {
                let index = world.connections.swap_remove(connection.index(world.connections.len()));
                let server = world.ipvs.server(index);
                server.total -= 1;
                server.active = server.active.min(server.total);
            }
        }
        Event::Calm { server } => world.ipvs.server(server.index(count) as u32).active = 0,
        Event::Weigh { server, weight } => world.ipvs.server(server.index(count) as u32).weight = *weight,
        Event::Overload { server } => world.ipvs.server(server.index(count) as u32).overloaded ^= true,
        Event::Remove { server } => world.ipvs.remove(server.index(count) as u32),
        Event::AddBack { server } => {
            let index = server.index(count) as u32;
            if !order.contains(&index) {
                let server = *world.ipvs.server(index);
                world.ipvs.add(index, server);
            }
        }
        Event::Wait { ticks } => world.now += ticks,
    }
}

proptest! {
    /// As long as a set has room for all servers, every choice is IPVS's, and so is what is remembered.
    #[test]
    fn every_choice_is_ipvs_s(
        replicas: bool,
        weights in prop::collection::vec(weight(), 1..MEMBERS),
        events in prop::collection::vec(event(), 1..300),
    ) {
        let mut world = World::new(replicas, &weights);
        for event in events {
            if let Event::Arrive { address, active } = event {
                let (datapath, ipvs) = world.arrive(address, active);
                prop_assert_eq!(datapath, ipvs);
                prop_assert_eq!(&world.remembered(address)[..], world.ipvs.remembered(&address));
            } else {
                happen(&mut world, &event);
            }
        }
    }

    /// A set has a limit, the load of a destination that everybody wants has not: in the end all servers bear their share.
    #[test]
    fn a_full_set_is_no_cage(count in MEMBERS + 1..40, weight in 1..4_u32) {
        let mut world = World::new(true, &vec![weight; count]);
        for _ in 0..count as u32 * (weight + 3) {
            world.refresh();
            let index = world.pick(7).expect("all take connections");
            let server = world.ipvs.server(index);
            (server.active, server.total) = (server.active + 1, server.total + 1);
            prop_assert!(world.remembered(7).len() <= MEMBERS);
        }
        for index in 0..count as u32 {
            prop_assert_eq!(world.ipvs.server(index).active, weight + 3);
        }
    }
}

#[test]
fn a_standing_is_one_word() {
    let standing = Standing::new(0xfffe, 0x7fff_ffff, false, 0x3fff);
    assert_eq!((standing.service(), standing.weight(), standing.generation()), (0xfffe, 0x7fff_ffff, 0x3fff));
    assert!(standing.is_available() && !standing.is_overloaded());
    let overloaded = Standing::new(1, 0, true, 2);
    assert!(overloaded.is_available() && overloaded.is_overloaded());
    let removed = overloaded.removed();
    assert_eq!((removed.service(), removed.generation(), removed.is_available()), (1, 2, false));
    assert_eq!(removed.dealt_anew(), Standing::from_word(3), "nothing but the generation is left");
    assert_eq!(standing.dealt_anew(), Standing::default(), "it wraps");
    assert_ne!(Standing::default().member(0), 0, "zero is nobody");
}

#[test]
fn an_index_that_was_dealt_anew_is_not_meant() {
    let changes: [fn(&mut Standing); 2] = [
        |standing| *standing = Standing::new(SERVICE as u16, 1, false, 0),
        |standing| *standing = Standing::new(3, 1, false, 0x3fff),
    ];
    for change in changes {
        let mut world = World::new(false, &[1, 1]);
        assert_eq!(world.arrive(7, true).0, Some(1));
        world.ipvs.server(1).total = 5;
        world.refresh();
        assert_eq!(world.pick(7), Some(1), "remembered");
        change(world.standings.get_mut(&1).expect("it is there"));
        assert_eq!(world.pick(7), Some(0), "by the schedule");
    }
}
