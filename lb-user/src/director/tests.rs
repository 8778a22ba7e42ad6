//! The director's rules, with a datapath in memory.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
    time::Duration,
};

use lb_common::{
    local::SHARED,
    server::Counters,
    service::flags,
    statistics::Statistics,
    tcp,
    template::{Scope, scope_flags},
};

use super::{
    model::{
        Command, Family, Method, Outcome, Persistence, Protocol, ServerConfig, ServerId, ServiceConfig, Tunnel, TunnelChecksum,
    },
    state::State,
    testing::Memory,
    *,
};

fn service() -> ServiceId {
    ServiceId::Address { protocol: Protocol::Tcp, address: Ipv4Addr::new(10, 0, 0, 200).into(), port: 80 }
}

fn scheduled(scheduler: &str) -> ServiceConfig {
    ServiceConfig { scheduler: scheduler.to_owned(), flags: 0, persistence: None, one_packet: false, engine: None }
}

fn persistent(timeout: u32, mask: u32) -> ServiceConfig {
    ServiceConfig { persistence: Some(Persistence { timeout, mask }), ..scheduled("rr") }
}

fn server(last: u8) -> ServerId {
    ServerId { address: Ipv4Addr::new(10, 0, 0, last).into(), port: 80 }
}

fn weight(weight: u32) -> ServerConfig {
    ServerConfig { method: Method::Route, weight, upper_threshold: 0, lower_threshold: 0 }
}

fn add_service(scheduler: &str) -> Command {
    Command::AddService { service: service(), config: scheduled(scheduler) }
}

fn add_server(last: u8) -> Command {
    Command::AddServer { service: service(), server: server(last), config: weight(1) }
}

fn remove_server(last: u8) -> Command {
    Command::RemoveServer { service: service(), server: server(last) }
}

fn director() -> Director<Memory> {
    Director::new(Memory::default(), Config { netns_cookie: 7, ..Config::DEFAULT }).expect("memory refuses nothing")
}

/// A director with a service, and servers that were added in this order.
fn with_servers(scheduler: &str, servers: &[u8]) -> Director<Memory> {
    let mut director = director();
    let mut commands = vec![add_service(scheduler)];
    commands.extend(servers.iter().map(|last| add_server(*last)));
    accept(&mut director, &commands);
    director
}

#[track_caller]
fn accept(director: &mut Director<Memory>, commands: &[Command]) {
    let outcomes = director.execute(commands);
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Ok), "{outcomes:?}");
}

/// Does one command that has to be refused, and returns why. Nothing may have changed.
#[track_caller]
fn refused(director: &mut Director<Memory>, command: Command) -> RefusalKind {
    let before = serde_json::to_value(director.state()).expect("a state is JSON");
    let journal = director.datapath().journal.len();
    let outcome = director.execute(&[command]).remove(0);
    let Outcome::Refused(refusal) = outcome else { panic!("it was accepted") };
    assert_eq!(serde_json::to_value(director.state()).expect("a state is JSON"), before, "{refusal}");
    assert_eq!(director.datapath().journal.len(), journal, "{refusal}");
    assert!(refusal.message.contains("; "), "the message says what to do: {refusal}");
    refusal.kind
}

/// The last bytes of the next picks.
fn picks(director: &mut Director<Memory>, count: usize) -> Vec<u8> {
    let index = director.services[&service()].index;
    (0..count)
        .map(|_| match director.datapath_mut().pick(index) {
            Some(IpAddr::V4(address)) => address.octets()[3],
            _ => 0,
        })
        .collect()
}

fn index_of(director: &Director<Memory>, last: u8) -> u32 {
    let service = &director.services[&service()];
    service.servers[service.servers.position(&server(last)).expect("the server is there")].index
}

fn set_connections(director: &mut Director<Memory>, index: u32, total: u32) {
    director.datapath_mut().counters.insert(index, Counters { active: total, total });
}

fn count_packets(director: &mut Director<Memory>, index: u32, packets: u64) {
    let entry = director.datapath_mut().statistics.entry(index).or_default();
    *entry = Statistics { packets_in: entry.packets_in + packets, ..*entry };
}

#[test]
fn the_newest_server_comes_first() {
    let mut director = with_servers("rr", &[1, 2, 3]);
    assert_eq!(picks(&mut director, 4), [3, 2, 1, 3]);
}

#[test]
fn changes_go_on_where_the_cursor_stands() {
    let mut director = with_servers("rr", &[1, 2, 3]);
    assert_eq!(picks(&mut director, 1), [3]);
    accept(&mut director, &[remove_server(1)]);
    assert_eq!(picks(&mut director, 3), [2, 3, 2]);
    accept(&mut director, &[add_server(4)]);
    assert_eq!(picks(&mut director, 3), [4, 3, 2]);
}

#[test]
fn ipvs_refusals_in_the_order_of_ipvs() {
    use RefusalKind::{
        Invalid, NoSuchServer, NoSuchService, OutOfRange, SchedulerNotFound, ServerExists, ServiceExists, Unsupported,
    };
    let mut director = with_servers("rr", &[1]);
    let other = ServiceId::Address { protocol: Protocol::Udp, address: [10, 0, 0, 200].into(), port: 80 };
    let add = |service, scheduler: &str| Command::AddService { service, config: scheduled(scheduler) };
    let server_with = |id: ServerId, config| Command::AddServer { service: service(), server: id, config };
    let edit_with = |id: ServerId, config| Command::EditServer { service: service(), server: id, config };
    let address = |text: &str| ServerId { address: text.parse().expect("an address"), port: 80 };
    let tunnel = ServerConfig { method: Method::Tunnel(Tunnel::Ipip), ..weight(1) };
    let gue = |port, checksum| ServerConfig { method: Method::Tunnel(Tunnel::Gue { port, checksum }), ..weight(1) };
    let gre = |checksum| ServerConfig { method: Method::Tunnel(Tunnel::Gre { checksum }), ..weight(1) };
    let thresholds = |upper_threshold, lower_threshold| ServerConfig { upper_threshold, lower_threshold, ..weight(1) };
    for (command, kind) in [
        (add(service(), "nonsense"), ServiceExists),
        (add(other, "nonsense"), SchedulerNotFound),
        (add(ServiceId::Mark { mark: 1, family: Family::Ipv4 }, "nonsense"), SchedulerNotFound),
        (add(ServiceId::Mark { mark: 0, family: Family::Ipv4 }, "rr"), Invalid),
        (
            Command::AddService {
                service: other,
                config: ServiceConfig { engine: Some("nonsense".to_owned()), ..scheduled("rr") },
            },
            SchedulerNotFound,
        ),
        (
            Command::AddService {
                service: ServiceId::Address { protocol: Protocol::Tcp, address: [10, 0, 0, 200].into(), port: 81 },
                config: ServiceConfig { one_packet: true, ..scheduled("rr") },
            },
            Invalid,
        ),
        (add(ServiceId::Address { protocol: Protocol::Tcp, address: [10, 0, 0, 200].into(), port: 0 }, "rr"), Invalid),
        (Command::AddService { service: other, config: persistent(0, u32::MAX) }, Invalid),
        (Command::AddService { service: other, config: persistent(31 * 86400 + 1, u32::MAX) }, Invalid),
        (
            Command::AddService {
                service: ServiceId::Address { protocol: Protocol::Tcp, address: std::net::Ipv6Addr::LOCALHOST.into(), port: 80 },
                config: persistent(60, 129),
            },
            Invalid,
        ),
        (Command::FlushTemplates { service: Some(other) }, NoSuchService),
        (Command::EditService { service: other, config: scheduled("nonsense") }, NoSuchService),
        (Command::EditService { service: service(), config: scheduled("nonsense") }, SchedulerNotFound),
        (Command::RemoveService { service: other }, NoSuchService),
        (Command::Zero { service: Some(other) }, NoSuchService),
        (Command::AddServer { service: other, server: address("0.0.0.0"), config: thresholds(1, 2) }, NoSuchService),
        (server_with(server(1), thresholds(1, 2)), OutOfRange),
        (server_with(server(2), thresholds(0, 2)), OutOfRange),
        (server_with(server(2), weight(1 << 31)), OutOfRange),
        (server_with(server(1), ServerConfig { method: Method::Masquerade, ..weight(1) }), ServerExists),
        (server_with(server(2), gue(0, TunnelChecksum::None)), Invalid),
        (server_with(server(2), gre(TunnelChecksum::Remote)), Unsupported),
        (server_with(address("0.0.0.0"), weight(1)), Invalid),
        (server_with(address("224.0.0.1"), weight(1)), Invalid),
        (server_with(address("255.255.255.255"), weight(1)), Invalid),
        (server_with(address("2001:db8::1"), weight(1)), Invalid),
        (server_with(address("fe80::1"), tunnel), Invalid),
        (server_with(address("::"), tunnel), Invalid),
        (server_with(address("ff02::1"), tunnel), Invalid),
        (edit_with(address("0.0.0.0"), weight(1)), NoSuchServer),
        (edit_with(server(2), thresholds(1, 2)), OutOfRange),
        (remove_server(2), NoSuchServer),
        (Command::SetTimeouts(Timeouts { tcp: u32::MAX, tcp_fin: 0, udp: 0 }), Invalid),
    ] {
        let text = format!("{command:?}");
        assert_eq!(refused(&mut director, command), kind, "{text}");
    }
    accept(&mut director, &[server_with(address("2001:db8::1"), tunnel), server_with(address("127.0.0.1"), weight(0))]);
}

#[test]
fn a_list_compiles_each_service_once() {
    let director = with_servers("rr", &[1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(director.datapath().published[&0], 1);
}

#[test]
fn the_packet_path_meets_whole_services_only() {
    // The datapath in memory asserts the order of schedule, service and servers at each call.
    let mut director = with_servers("rr", &[1, 2]);
    accept(&mut director, &[remove_server(1), add_server(1), remove_server(2), Command::Clear]);
    accept(&mut director, &[add_service("rr"), add_server(2), Command::Clear, add_service("rr"), add_server(2)]);
    assert_eq!(picks(&mut director, 2), [2, 2]);
    assert_eq!(director.datapath().services.len(), 1);
}

#[test]
fn a_service_that_changes_its_mode_moves_in_one_step() {
    let mut director = with_servers("rr", &[1, 2]);
    let before = director.services[&service()].index;
    accept(&mut director, &[Command::EditService { service: service(), config: scheduled("mh") }]);
    let after = director.services[&service()].index;
    assert_ne!(before, after);
    assert_eq!(director.datapath().services.values().next().map(|entry| entry.id), Some(after));
    assert!(director.datapath().schedules[&before].picks.is_empty());
    accept(&mut director, &[Command::EditService { service: service(), config: scheduled("rr") }]);
    assert_eq!(director.services[&service()].index, before);
}

#[test]
fn without_room_for_the_schedule_the_service_stays_as_it_was() {
    let mut director = with_servers("rr", &[1, 2]);
    director.datapath_mut().room = Some(2);
    let outcomes = director.execute(&[
        remove_server(1),
        add_server(3),
        add_server(4),
        Command::EditService { service: service(), config: scheduled("wrr") },
        Command::AddServer { service: service(), server: server(9), config: weight(1 << 31) },
    ]);
    let kinds: Vec<_> = outcomes
        .iter()
        .map(|outcome| match outcome {
            Outcome::Ok => None,
            Outcome::Refused(refusal) => Some(refusal.kind),
        })
        .collect();
    let (full, range) = (Some(RefusalKind::NoRoom), Some(RefusalKind::OutOfRange));
    assert_eq!(kinds, [full, full, full, full, range]);
    assert_eq!(picks(&mut director, 4), [2, 1, 2, 1]);
    assert_eq!(director.datapath().retired.len(), 2);
    let views = director.services().expect("memory refuses nothing");
    assert_eq!(views[0].config.scheduler, "rr");
    assert_eq!(views[0].servers.iter().map(|view| view.id).collect::<Vec<_>>(), [server(2), server(1)]);
}

#[test]
fn a_removed_server_comes_back_with_its_connections() {
    let mut director = with_servers("rr", &[1, 2]);
    let index = index_of(&director, 1);
    set_connections(&mut director, index, 5);
    count_packets(&mut director, index, 10);
    accept(&mut director, &[remove_server(1)]);
    assert!(director.datapath().retired.contains(&index));
    director.tick(Instant::now());
    let edited = Command::AddServer { service: service(), server: server(1), config: weight(7) };
    accept(&mut director, &[edited]);
    let views = director.services().expect("memory refuses nothing");
    let view = &views[0].servers[0];
    assert_eq!((view.index, view.active, view.config.weight, view.traffic.totals.packets_in), (index, 5, 7, 10));
    assert_eq!(views[0].traffic.totals.packets_in, 10);
    assert!(!director.datapath().retired.contains(&index));

    // A new service of the same name counts from zero, but has the connections.
    accept(&mut director, &[Command::Clear, add_service("rr"), add_server(1)]);
    let views = director.services().expect("memory refuses nothing");
    let view = &views[0].servers[0];
    assert_eq!((view.index, view.active, view.traffic.totals.packets_in), (index, 5, 0));
    assert_eq!(views[0].traffic.totals.packets_in, 0);
}

/// Found by comparing scripts with the kernel's IPVS.
#[test]
fn a_server_that_comes_back_with_weight_0_has_no_last_weight() {
    let mut director = with_servers("mh", &[1, 2]);
    let back = Command::AddServer { service: service(), server: server(2), config: weight(0) };
    accept(&mut director, &[remove_server(2), back]);
    let (service, stays) = (director.services[&service()].index, index_of(&director, 1));
    assert!(director.datapath().schedules[&service].picks.iter().all(|pick| *pick == stays));
}

#[test]
fn a_removed_server_is_forgotten_after_two_minutes_without_connections() {
    let mut director = with_servers("rr", &[1]);
    let index = index_of(&director, 1);
    set_connections(&mut director, index, 1);
    accept(&mut director, &[remove_server(1)]);
    let start = Instant::now();
    let after = |seconds| start + Duration::from_secs(seconds);
    director.tick(after(0));
    director.tick(after(500));
    set_connections(&mut director, index, 0);
    director.tick(after(501));
    director.tick(after(620));
    assert!(director.datapath().servers.contains_key(&index), "119 seconds");
    director.tick(after(621));
    assert!(!director.datapath().servers.contains_key(&index), "120 seconds");
    accept(&mut director, &[add_server(9)]);
    assert_eq!(index_of(&director, 9), index);
}

#[test]
fn an_index_is_not_used_again_while_connections_name_it() {
    let mut director = with_servers("rr", &[1]);
    let index = index_of(&director, 1);
    accept(&mut director, &[Command::Clear, add_service("rr"), add_server(2)]);
    assert_ne!(index_of(&director, 2), index);
}

#[test]
fn removed_servers_make_room_when_indices_run_short() {
    let most = director().datapath().server_capacity() as u8;
    let mut director = with_servers("rr", &(1..=most).collect::<Vec<_>>());
    let named = index_of(&director, 1);
    set_connections(&mut director, named, 1);
    accept(&mut director, &[Command::Clear]);
    accept(&mut director, &[add_service("rr")]);
    let deadline = Instant::now() + Duration::from_secs(10);
    for other in most + 1..2 * most {
        while director.execute(&[add_server(other)]) != [Outcome::Ok] {
            assert!(Instant::now() < deadline, "there is no room for server {other}");
        }
        assert_ne!(index_of(&director, other), named);
    }
    assert_eq!(refused(&mut director, add_server(2 * most)), RefusalKind::NoRoom, "the last index is named by a connection");
}

#[test]
fn an_overloaded_server_gets_nothing_until_it_has_room() {
    let mut director = with_servers("rr", &[1]);
    let limited = ServerConfig { upper_threshold: 4, lower_threshold: 2, ..weight(1) };
    assert!(!director.is_live());
    accept(&mut director, &[Command::AddServer { service: service(), server: server(2), config: limited }]);
    assert!(director.is_live());
    let index = index_of(&director, 2);
    assert_eq!(picks(&mut director, 3), [2, 1, 2]);
    set_connections(&mut director, index, 4);
    director.refresh();
    assert_eq!(picks(&mut director, 3), [1, 1, 1]);
    set_connections(&mut director, index, 2);
    director.refresh();
    assert_eq!(picks(&mut director, 2), [1, 1]);
    set_connections(&mut director, index, 1);
    director.refresh();
    assert_eq!(picks(&mut director, 3), [2, 1, 2]);
    let published = director.datapath().published[&0];
    director.refresh();
    assert_eq!(director.datapath().published[&0], published, "nothing changed, nothing is published");
}

#[test]
fn a_threshold_is_reached_while_one_connection_takes_the_place_of_another() {
    let mut director = with_servers("rr", &[1]);
    let limited = ServerConfig { upper_threshold: 5, lower_threshold: 3, ..weight(1) };
    accept(&mut director, &[Command::AddServer { service: service(), server: server(2), config: limited }]);
    let index = index_of(&director, 2);
    let mut reach = |peak| {
        set_connections(&mut director, index, 4);
        director.datapath_mut().peaks.get_mut().insert(index, peak);
        director.refresh();
        picks(&mut director, 2)
    };
    assert!(reach(4).contains(&2), "nothing is reached");
    assert_eq!(reach(5), [1, 1]);
    set_connections(&mut director, index, 3);
    director.refresh();
    assert_eq!(picks(&mut director, 2), [1, 1], "the lower threshold decides");
    set_connections(&mut director, index, 2);
    director.refresh();
    assert!(picks(&mut director, 2).contains(&2));
    // What was before an edit is past.
    director.datapath_mut().peaks.get_mut().insert(index, 5);
    accept(&mut director, &[Command::EditServer { service: service(), server: server(2), config: limited }]);
    director.refresh();
    assert!(picks(&mut director, 2).contains(&2));
}

#[test]
fn a_forecast_follows_connections() {
    let mut director = with_servers("wlc", &[1, 2]);
    assert!(director.is_live());
    assert!(!director.refresh(), "nothing has happened");
    assert_eq!(picks(&mut director, 1), [2]);
    let (first, second) = (index_of(&director, 1), index_of(&director, 2));
    set_connections(&mut director, second, 1);
    assert!(director.refresh());
    assert_eq!(picks(&mut director, 2), [1, 2]);
    // Both were taken, and the connection to the second server is over.
    set_connections(&mut director, first, 1);
    set_connections(&mut director, second, 0);
    assert!(director.refresh());
    assert_eq!(picks(&mut director, 1), [2]);
    set_connections(&mut director, second, 1);
    assert!(director.refresh());
    assert!(!director.refresh(), "what was read is not read as new again");
}

#[test]
fn a_forecast_knows_when_a_threshold_is_reached() {
    let mut director = with_servers("lc", &[1]);
    let limited = ServerConfig { upper_threshold: 2, ..weight(1) };
    accept(&mut director, &[Command::AddServer { service: service(), server: server(2), config: limited }]);
    let (first, second) = (index_of(&director, 1), index_of(&director, 2));
    assert_eq!(picks(&mut director, 6), [2, 1, 2, 1, 1, 1]);
    set_connections(&mut director, first, 4);
    set_connections(&mut director, second, 2);
    director.refresh();
    assert_eq!(picks(&mut director, 2), [1, 1]);
    set_connections(&mut director, second, 1);
    director.refresh();
    assert_eq!(picks(&mut director, 2), [2, 1], "there is room for one");
}

#[test]
fn zeroing_hides_what_was_counted() {
    let mut director = with_servers("rr", &[1, 2]);
    for last in [1, 2] {
        let index = index_of(&director, last);
        count_packets(&mut director, index, 100);
    }
    // What a server did stays with the service when it leaves.
    accept(&mut director, &[remove_server(2)]);
    let totals = |director: &Director<Memory>| {
        let view = director.services().expect("memory refuses nothing").remove(0);
        (view.traffic.totals.packets_in, view.servers[0].traffic.totals.packets_in)
    };
    assert_eq!(totals(&director), (200, 100));
    accept(&mut director, &[Command::Zero { service: None }]);
    assert_eq!(totals(&director), (0, 0));
    let index = index_of(&director, 1);
    count_packets(&mut director, index, 5);
    assert_eq!(totals(&director), (5, 5));
}

#[test]
fn rates_follow_the_ticks() {
    let mut director = with_servers("rr", &[1]);
    let index = index_of(&director, 1);
    let start = Instant::now();
    director.tick(start);
    set_connections(&mut director, index, 1);
    count_packets(&mut director, index, 800);
    director.tick(start + Duration::from_secs(1));
    let rates = |director: &Director<Memory>| {
        let view = director.services().expect("memory refuses nothing").remove(0);
        (view.traffic.rates.packets_in, view.servers[0].traffic.rates.packets_in)
    };
    assert_eq!(rates(&director), (0, 0), "a tick is two seconds");
    director.tick(start + Duration::from_secs(2));
    assert_eq!(rates(&director), (100, 100));
    set_connections(&mut director, index, 0);
    director.tick(start + Duration::from_secs(4));
    assert_eq!(rates(&director), (75, 75));
    director.tick(start + Duration::from_secs(6));
    assert_eq!(rates(&director), (56, 56), "they fade without connections, too");
}

#[test]
fn timeouts_of_zero_keep_the_old_value() {
    let mut director = director();
    accept(&mut director, &[Command::SetTimeouts(Timeouts { tcp: 0, tcp_fin: 7, udp: 0 })]);
    assert_eq!(director.timeouts(), Timeouts { tcp: 900, tcp_fin: 7, udp: 300 });
    let config = director.datapath().config.expect("it was configured");
    assert_eq!(config.tcp_timeouts[tcp::State::FinWait as usize], 7);
    assert_eq!(config.tcp_timeouts[tcp::State::Established as usize], 900);
    assert_eq!(config.netns_cookie, 7);
}

/// Writes the state down, and lets another director go on with it.
fn restart(director: Director<Memory>) -> Director<Memory> {
    let directory = tempfile::tempdir().expect("there is a place for temporary files");
    let path = directory.path().join("state.json");
    director.state().write(&path).expect("it can be written");
    let state = State::read(&path).expect("it can be read").expect("it is there");
    Director::adopt(director.into_datapath(), Config { netns_cookie: 7, ..Config::DEFAULT }, state, &path).expect("it fits")
}

#[test]
fn another_director_goes_on_exactly_where_the_last_one_stopped() {
    for scheduler in ["rr", "wrr"] {
        let mut whole = with_servers(scheduler, &[1, 2, 3, 4]);
        let mut cut = with_servers(scheduler, &[1, 2, 3, 4]);
        for director in [&mut whole, &mut cut] {
            let heavy = Command::EditServer { service: service(), server: server(2), config: weight(3) };
            accept(director, &[heavy, remove_server(3), Command::SetTimeouts(Timeouts { tcp: 5, tcp_fin: 0, udp: 0 })]);
        }
        assert_eq!(picks(&mut whole, 5), picks(&mut cut, 5));
        let mut cut = restart(cut);
        assert_eq!(picks(&mut whole, 20), picks(&mut cut, 20), "{scheduler}");
        // Picks that the kernel took after the state was written count, too.
        let state = cut.state();
        assert_eq!(picks(&mut whole, 3), picks(&mut cut, 3));
        let mut cut =
            Director::adopt(cut.into_datapath(), Config::DEFAULT, state, Path::new("state.json")).expect("it is the same state");
        assert_eq!(picks(&mut whole, 20), picks(&mut cut, 20), "{scheduler}");
        assert_eq!(cut.timeouts().tcp, 5);
        // The trash was handed over.
        accept(&mut whole, &[add_server(3)]);
        accept(&mut cut, &[add_server(3)]);
        assert_eq!(index_of(&whole, 3), index_of(&cut, 3));
    }
}

#[test]
fn what_no_state_tells_of_is_taken_away() {
    let mut director = with_servers("rr", &[1]);
    let index = index_of(&director, 1);
    set_connections(&mut director, index, 1);
    let mut director = Director::new(director.into_datapath(), Config::DEFAULT).expect("memory refuses nothing");
    assert!(director.datapath().services.is_empty());
    assert!(director.datapath().retired.contains(&index));
    accept(&mut director, &[add_service("rr"), add_server(1)]);
    assert_ne!(index_of(&director, 1), index, "connections may name it");
}

#[test]
fn a_damaged_state_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().expect("there is a place for temporary files");
    let path = directory.path().join("state.json");
    assert!(State::read(&path).expect("no file is no error").is_none());
    let director = with_servers("rr", &[1, 2]);
    director.state().write(&path).expect("it can be written");
    let text = std::fs::read_to_string(&path).expect("it is there");
    for (bad, expected) in [
        (text[..text.len() / 2].to_owned(), "it is damaged (EOF"),
        (text.replacen("\"version\":1", "\"version\":99", 1), "it has version 99"),
        (text.replacen("\"services\"", "\"secrets\"", 1), "missing field `services`"),
        (String::new(), "it is damaged"),
    ] {
        assert_ne!(bad, text);
        std::fs::write(&path, &bad).expect("it can be written");
        let error = State::read(&path).expect_err("it is damaged").to_string();
        assert!(error.contains(expected) && error.contains("state.json") && error.contains("; "), "{error}");
        assert_eq!(std::fs::read_to_string(&path).expect("it is there"), bad);
    }
    let mut state = director.state();
    state.services[0].servers[0].index = state.services[0].servers[1].index;
    state.write(&path).expect("it can be written");
    let error = State::read(&path).expect_err("two servers have one index").to_string();
    assert!(error.contains("two servers have the index"), "{error}");
    state.services[0].servers[0].index = 1 << 20;
    let error = Director::adopt(Memory::default(), Config::DEFAULT, state, &path).expect_err("there are not so many");
    assert!(error.to_string().contains("the index 1048576 is too large"), "{error}");
}

#[test]
fn a_state_outlives_the_datapath() {
    let mut director = with_servers("rr", &[1, 2]);
    let index = index_of(&director, 1);
    count_packets(&mut director, index, 100);
    accept(&mut director, &[Command::Zero { service: None }, remove_server(2)]);
    picks(&mut director, 3);
    let state = director.state();
    let mut director = Director::adopt(Memory::default(), Config::DEFAULT, state, Path::new("state.json")).expect("it fits");
    assert!(director.datapath().retired.is_empty(), "no connection of a removed server can be left");
    count_packets(&mut director, index, 5);
    let view = director.services().expect("memory refuses nothing").remove(0);
    assert_eq!((view.traffic.totals.packets_in, view.servers[0].traffic.totals.packets_in), (5, 5));
    accept(&mut director, &[add_server(2)]);
    assert_eq!(picks(&mut director, 2), [2, 1]);
}

/// The scheduler hears of servers that are added together at the end; it must not notice.
#[test]
fn one_list_of_commands_comes_to_the_same_as_many() {
    let add = |last: u8, heavy| Command::AddServer { service: service(), server: server(last), config: weight(heavy) };
    let edit = |last: u8, heavy| Command::EditServer { service: service(), server: server(last), config: weight(heavy) };
    for scheduler in ["rr", "wrr", "sh", "dh", "mh"] {
        let commands = [
            add_service(scheduler),
            add(1, 6),
            add(2, 4),
            edit(1, 9),
            add(3, 12),
            add(4, 8),
            remove_server(2),
            add(5, 10),
            Command::EditService { service: service(), config: scheduled("wrr") },
            add(6, 15),
            add(7, 5),
        ];
        let (mut together, mut apart) = (director(), director());
        accept(&mut together, &commands);
        // The datapath in memory does not know the hash tables of services without servers.
        let (first, others) = commands.split_at(2);
        accept(&mut apart, first);
        for command in others {
            accept(&mut apart, std::slice::from_ref(command));
        }
        let schedulers = [&together, &apart].map(|director| director.services[&service()].scheduler.clone());
        assert_eq!(schedulers[0], schedulers[1]);
        assert_eq!(picks(&mut together, 60), picks(&mut apart, 60), "{scheduler}");
    }
}

#[test]
fn a_month_is_not_too_long_for_a_clock_of_250_ticks() {
    let month = 31 * 86400;
    let mut director = director();
    accept(&mut director, &[Command::SetTimeouts(Timeouts { tcp: month, tcp_fin: month, udp: month })]);
    let limit = i32::MAX.cast_unsigned() / 250;
    let too_long = Command::SetTimeouts(Timeouts { tcp: limit + 1, tcp_fin: 0, udp: 0 });
    assert_eq!(refused(&mut director, too_long), RefusalKind::Invalid);
}

#[test]
fn a_persistent_service_says_how_its_templates_are_found() {
    let mut director = director();
    let mask = 0xffff_ff00;
    let config = ServerConfig { method: Method::Masquerade, ..weight(1) };
    let server_on = |port| ServerId { port, ..server(1) };
    for (port, server_port, any_port, packet_port) in
        [(80, 8080, 0, 8080), (0, 8080, flags::ANY_PORT, 0), (21, 21, flags::ANY_PORT | flags::FTP, 0)]
    {
        let service = ServiceId::Address { protocol: Protocol::Tcp, address: [10, 0, 0, 200].into(), port };
        let add = Command::AddService { service, config: persistent(300, mask) };
        accept(&mut director, &[add, Command::AddServer { service, server: server_on(server_port), config }]);

        let entry = director.datapath().services[&service];
        assert_eq!((entry.persistence, entry.netmask, entry.flags), (300, mask.to_be(), any_port));
        let (index, target) = director.datapath().servers.iter().next_back().expect("it was added");
        assert_eq!(target.port, packet_port, "port {port}: where packets go");
        let scope = Scope::of(&entry);
        assert_eq!(director.datapath().scopes[index], scope);
        let index = *index;
        accept(
            &mut director,
            &[Command::EditServer { service, server: server_on(server_port), config: ServerConfig { weight: 0, ..config } }],
        );
        assert_eq!(director.datapath().scopes[&index], Scope { flags: scope.flags | scope_flags::QUIESCENT, ..scope });
    }
}

#[test]
fn a_service_may_become_persistent() {
    let mut director = with_servers("rr", &[1]);
    accept(&mut director, &[Command::EditService { service: service(), config: persistent(300, u32::MAX) }]);
    let entry = *director.datapath().services.values().next().expect("it is there");
    assert_eq!((entry.persistence, director.datapath().scopes[&0]), (300, Scope::of(&entry)));
    accept(&mut director, &[Command::EditService { service: service(), config: scheduled("rr") }]);
    assert_eq!(director.datapath().scopes[&0], Scope::default());
}

#[test]
fn a_persistence_engine_works_with_persistence_only() {
    let mut director = with_servers("rr", &[1]);
    for (config, expected) in [(persistent(300, u32::MAX), flags::SIP), (scheduled("rr"), 0)] {
        let config = ServiceConfig { engine: Some("sip".to_owned()), ..config };
        accept(&mut director, &[Command::EditService { service: service(), config }]);
        let entry = *director.datapath().services.values().next().expect("it is there");
        assert_eq!(entry.flags & flags::SIP, expected);
    }
}

#[test]
fn templates_are_counted_flushed_and_keep_removed_servers() {
    let mut director = with_servers("rr", &[1]);
    director.datapath_mut().templates.insert(0, 3);
    let services = director.services().expect("memory refuses nothing");
    assert_eq!(services[0].servers[0].persistent, 3);
    assert!(director.has_connections());

    accept(&mut director, &[remove_server(1)]);
    let now = Instant::now();
    for seconds in [0, 300, 600] {
        director.tick(now + Duration::from_secs(seconds));
    }
    assert!(director.datapath().servers.contains_key(&0), "templates lead there");

    accept(&mut director, &[Command::FlushTemplates { service: Some(service()) }, Command::FlushTemplates { service: None }]);
    assert!(director.datapath().journal.ends_with(&[format!("flush_templates {}", service()), "flush_templates".to_owned()]));
    for seconds in [700, 900] {
        director.tick(now + Duration::from_secs(seconds));
    }
    assert!(!director.datapath().servers.contains_key(&0));
}

const LOCAL: [u8; 4] = [10, 0, 0, 230];

fn fullnat() -> ServerConfig {
    ServerConfig { method: Method::FullNat { toa: false }, ..weight(1) }
}

fn add_local(address: impl Into<IpAddr>, service: Option<ServiceId>) -> Command {
    Command::AddLocalAddress { address: address.into(), service }
}

fn remove_local(address: impl Into<IpAddr>, service: Option<ServiceId>) -> Command {
    Command::RemoveLocalAddress { address: address.into(), service }
}

#[test]
fn a_fullnat_server_always_has_a_local_address() {
    use RefusalKind::*;
    let other = [10, 0, 0, 231];
    let add = || Command::AddServer { service: service(), server: server(1), config: fullnat() };
    let mut director = with_servers("rr", &[2]);
    assert_eq!(refused(&mut director, add()), NoLocalAddress);
    let edit = Command::EditServer { service: service(), server: server(2), config: fullnat() };
    assert_eq!(refused(&mut director, edit), NoLocalAddress);
    accept(&mut director, &[add_local("2001:db8::230".parse::<IpAddr>().expect("an address"), None)]);
    assert_eq!(refused(&mut director, add()), NoLocalAddress, "it is of the other family");
    accept(&mut director, &[add_local(LOCAL, None), add()]);
    assert_eq!(refused(&mut director, remove_local(LOCAL, None)), Invalid, "the server needs it");
    accept(&mut director, &[add_local(other, Some(service())), remove_local(LOCAL, None)]);
    assert_eq!(refused(&mut director, remove_local(other, Some(service()))), Invalid, "the server needs it");
    accept(&mut director, &[remove_server(1), remove_local(other, Some(service()))]);
    assert_eq!(director.local_addresses().count(), 1);
}

#[test]
fn fullnat_leads_from_ipv6_to_ipv4_and_not_back() {
    use RefusalKind::*;
    let ipv6: IpAddr = "2001:db8::80".parse().expect("an address");
    let outside = ServiceId::Address { protocol: Protocol::Tcp, address: ipv6, port: 80 };
    let add = |service, server, method| Command::AddServer { service, server, config: ServerConfig { method, ..weight(1) } };
    let mut director = with_servers("rr", &[]);
    accept(&mut director, &[Command::AddService { service: outside, config: scheduled("rr") }]);
    let fullnat = |toa| Method::FullNat { toa };
    assert_eq!(refused(&mut director, add(outside, server(1), fullnat(false))), NoLocalAddress);
    accept(&mut director, &[add_local("2001:db8::230".parse::<IpAddr>().expect("an address"), None)]);
    assert_eq!(refused(&mut director, add(outside, server(1), fullnat(false))), NoLocalAddress, "it is of the other family");
    accept(&mut director, &[add_local(LOCAL, None)]);
    assert_eq!(refused(&mut director, add(outside, server(1), fullnat(true))), Unsupported);
    assert_eq!(refused(&mut director, add(outside, server(1), Method::Masquerade)), Invalid);
    let server_of_ipv6 = ServerId { address: "2001:db8::5".parse().expect("an address"), port: 80 };
    assert_eq!(refused(&mut director, add(service(), server_of_ipv6, fullnat(false))), Unsupported);
    accept(&mut director, &[add(outside, server(1), fullnat(false)), add(outside, server_of_ipv6, fullnat(false))]);
    let targets: Vec<_> = director.datapath().servers.values().map(datapath::Target::crosses).collect();
    assert_eq!(targets, [true, false]);
    assert_eq!(refused(&mut director, remove_local(LOCAL, None)), Invalid, "the server needs it");
}

/// A claim to a local port would never be given back: there is no connection that could end.
#[test]
fn fullnat_does_not_go_with_one_packet_scheduling() {
    use RefusalKind::Unsupported;
    let udp = ServiceId::Address { protocol: Protocol::Udp, address: Ipv4Addr::new(10, 0, 0, 200).into(), port: 53 };
    let mark = ServiceId::Mark { family: Family::Ipv4, mark: 7 };
    let each = || ServiceConfig { one_packet: true, ..scheduled("rr") };
    let masquerade = || ServerConfig { method: Method::Masquerade, ..weight(1) };
    for service in [udp, mark] {
        let add = |config| Command::AddServer { service, server: server(1), config };
        let edit = |config| Command::EditServer { service, server: server(1), config };
        let mut director = director();
        accept(&mut director, &[add_local(LOCAL, None), Command::AddService { service, config: each() }]);
        assert_eq!(refused(&mut director, add(fullnat())), Unsupported);
        accept(&mut director, &[add(masquerade())]);
        assert_eq!(refused(&mut director, edit(fullnat())), Unsupported);
        accept(&mut director, &[Command::EditService { service, config: scheduled("rr") }, edit(fullnat())]);
        assert_eq!(refused(&mut director, Command::EditService { service, config: each() }), Unsupported);
        accept(&mut director, &[edit(masquerade()), Command::EditService { service, config: each() }]);
    }
}

#[test]
fn local_addresses_that_cannot_be_are_refused() {
    use RefusalKind::*;
    let mut director = with_servers("rr", &[]);
    accept(&mut director, &[add_local(LOCAL, None)]);
    let other = ServiceId::Address { protocol: Protocol::Udp, address: Ipv4Addr::new(10, 0, 0, 200).into(), port: 80 };
    let virtual_local = ServiceId::Address { protocol: Protocol::Tcp, address: LOCAL.into(), port: 80 };
    for (command, kind) in [
        (add_local(LOCAL, None), LocalAddressExists),
        (add_local(LOCAL, Some(other)), NoSuchService),
        (add_local([0, 0, 0, 0], None), Invalid),
        (add_local([127, 0, 0, 1], None), Invalid),
        (add_local([224, 0, 0, 1], None), Invalid),
        (add_local("fe80::1".parse::<IpAddr>().expect("an address"), None), Invalid),
        (add_local([10, 0, 0, 200], None), Invalid),
        (Command::AddService { service: virtual_local, config: scheduled("rr") }, Invalid),
        (remove_local([10, 0, 0, 231], None), NoSuchLocalAddress),
        (remove_local(LOCAL, Some(service())), NoSuchLocalAddress),
    ] {
        let text = format!("{command:?}");
        assert_eq!(refused(&mut director, command), kind, "{text}");
    }
    let full: Vec<_> = (1..64).map(|last| add_local([10, 0, 1, last], None)).collect();
    accept(&mut director, &full);
    assert_eq!(refused(&mut director, add_local([10, 0, 1, 64], None)), NoRoom);
}

/// The pools of the datapath follow the model: when a director comes back, when a service goes, and when the state is lost.
#[test]
fn pools_follow_the_model() {
    let own = [10, 0, 0, 231];
    let mut director = with_servers("rr", &[]);
    let add = Command::AddServer { service: service(), server: server(1), config: fullnat() };
    accept(&mut director, &[add_local(LOCAL, None), add_local(own, Some(service())), add]);
    let pool = director.services[&service()].pool();
    let index = index_of(&director, 1);
    assert_eq!(director.datapath().servers[&index].pool, pool);
    let pools = director.datapath().pools.clone();
    assert_eq!(pools, [(pool, vec![IpAddr::from(own)]), (SHARED, vec![IpAddr::from(LOCAL)])].into());
    // Another mode gives the service another index, but not another pool.
    accept(&mut director, &[Command::EditService { service: service(), config: scheduled("sh") }]);
    assert_eq!(director.datapath().pools, pools);

    let state = serde_json::to_string(&director.state()).expect("it can be written");
    let state = serde_json::from_str(&state).expect("it can be read");
    let mut director = Director::adopt(Memory::default(), Config::DEFAULT, state, Path::new("state.json")).expect("it fits");
    assert_eq!(director.datapath().pools, pools);
    accept(&mut director, &[Command::RemoveService { service: service() }]);
    assert_eq!(director.datapath().pools.keys().copied().collect::<Vec<_>>(), [SHARED]);

    let director = Director::new(director.into_datapath(), Config::DEFAULT).expect("memory refuses nothing");
    assert!(director.datapath().pools.is_empty(), "nobody knows of them any more");
}
