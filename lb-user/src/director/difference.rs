//! The commands that lead from one table of services to another.
//!
//! What is in both stays untouched, with its connections, its counters, and its place in the schedule. Real servers come in the
//! order in which they came to the wanted table, as the newest is the first that schedulers look at.
//!
//! ```text
//! TCP 192.0.2.1:80 rr: A, B     ->     TCP 192.0.2.1:80 wrr: B, C          edit the service, remove A, add C
//! ```

use std::collections::HashMap;

use super::model::{Command, ServerId, ServerView, ServiceId, ServiceView};

/// What has to be done to the table `from` to make it `to`.
pub fn difference(from: &[ServiceView], to: &[ServiceView]) -> Vec<Command> {
    let wanted: HashMap<&ServiceId, &ServiceView> = to.iter().map(|service| (&service.id, service)).collect();
    let present: HashMap<&ServiceId, &ServiceView> = from.iter().map(|service| (&service.id, service)).collect();
    let gone = from.iter().filter(|service| !wanted.contains_key(&service.id));
    let mut commands: Vec<_> = gone.map(|service| Command::RemoveService { service: service.id }).collect();
    for service in to {
        let (id, config) = (service.id, service.config.clone());
        let servers = match present.get(&id) {
            Some(old) => {
                if old.config != config {
                    commands.push(Command::EditService { service: id, config });
                }
                old.servers.as_slice()
            }
            None => {
                commands.push(Command::AddService { service: id, config });
                &[]
            }
        };
        commands.extend(servers_of(id, servers, &service.servers));
    }
    commands
}

/// The same for the real servers of a service.
fn servers_of(service: ServiceId, from: &[ServerView], to: &[ServerView]) -> Vec<Command> {
    let wanted: HashMap<&ServerId, &ServerView> = to.iter().map(|server| (&server.id, server)).collect();
    let present: HashMap<&ServerId, &ServerView> = from.iter().map(|server| (&server.id, server)).collect();
    let gone = from.iter().filter(|server| !wanted.contains_key(&server.id));
    let gone = gone.map(|server| Command::RemoveServer { service, server: server.id });
    let changed = to.iter().rev().filter_map(|server| match present.get(&server.id) {
        None => Some(Command::AddServer { service, server: server.id, config: server.config }),
        Some(old) if old.config != server.config => Some(Command::EditServer { service, server: server.id, config: server.config }),
        Some(_) => None,
    });
    gone.chain(changed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::director::{
        Director,
        model::{Method, Outcome, Protocol, ServerConfig, ServiceConfig},
        paper::Paper,
    };

    fn id(port: u16) -> ServiceId {
        ServiceId::Address { protocol: Protocol::Tcp, address: [192, 0, 2, 1].into(), port }
    }

    fn add(port: u16, scheduler: &str, servers: &[(u8, u32)]) -> Vec<Command> {
        let config =
            ServiceConfig { scheduler: scheduler.to_owned(), flags: 0, persistence: None, one_packet: false, engine: None };
        let mut commands = vec![Command::AddService { service: id(port), config }];
        commands.extend(servers.iter().map(|(number, weight)| Command::AddServer {
            service: id(port),
            server: ServerId { address: [10, 0, 0, *number].into(), port },
            config: ServerConfig { method: Method::Route, weight: *weight, upper_threshold: 0, lower_threshold: 0 },
        }));
        commands
    }

    fn director(commands: &[Command]) -> Director<Paper> {
        let mut director = Director::new(Paper::default(), lb_common::config::Config::DEFAULT).expect("paper is patient");
        assert!(director.execute(commands).iter().all(|outcome| *outcome == Outcome::Ok));
        director
    }

    /// What people chose of a table; the numbers of its parts are of no interest.
    fn choices(services: &[ServiceView]) -> Vec<(ServiceId, ServiceConfig, Vec<(ServerId, ServerConfig)>)> {
        let servers = |service: &ServiceView| service.servers.iter().map(|server| (server.id, server.config)).collect();
        services.iter().map(|service| (service.id, service.config.clone(), servers(service))).collect()
    }

    #[test]
    fn the_commands_lead_from_one_table_to_the_other_and_back() {
        let one = [add(80, "rr", &[(1, 1), (2, 1)]), add(81, "rr", &[(1, 1)]), add(82, "wlc", &[(3, 1), (4, 1)])].concat();
        let other = [add(80, "wrr", &[(2, 5), (3, 1), (9, 1)]), add(82, "wlc", &[(3, 1), (4, 1)]), add(90, "sh", &[(7, 2)])];
        let (one, other) = (director(&one), director(&other.concat()));
        let views = |director: &Director<Paper>| director.services().expect("paper is patient");
        let (from, to) = (views(&one), views(&other));
        for (mut start, from, to) in [(one, &from, &to), (other, &to, &from)] {
            let commands = difference(from, to);
            assert!(!commands.iter().any(|command| format!("{command:?}").contains("port: 82")), "{commands:?}");
            assert!(start.execute(&commands).iter().all(|outcome| *outcome == Outcome::Ok), "{commands:?}");
            assert_eq!(choices(&views(&start)), choices(to));
            assert_eq!(difference(&views(&start), to), []);
        }
    }
}
