//! Does what a command line asks for, and turns the director's answers into ipvsadm's messages and exit statuses.
//!
//! The answers of the kernel's IPVS are bare error numbers, and ipvsadm has a text for each. The director's refusals have
//! texts of their own, better ones, but scripts look for the old ones; so those are printed, unless the kernel would have
//! done what the director cannot: then the director's own words say so.

use std::{
    io::{BufWriter, Write},
    ops::ControlFlow,
};

use super::{
    STATUS_OK, STATUS_REFUSED, STATUS_UNREADABLE, STATUS_USAGE, Streams, Table, Unreachable, complain,
    listing::{self, TITLE},
    names::Names,
    parse::{self, Action, List},
    print, restore, save,
};
use crate::director::model::{Command, Outcome, Refusal, RefusalKind};

/// The version line.
const VERSION: &str = "ipvsadm v1.31 2019/12/24 (compiled with popt and IPVS v1.2.1)\n";
/// The help behind it.
pub(super) const HELP: &str = include_str!("help.txt");

/// One run of ipvsadm.
pub(super) struct Session<'a> {
    pub(super) program: &'a str,
    pub(super) table: &'a mut dyn Table,
    pub(super) output: &'a mut dyn Write,
    pub(super) error: &'a mut dyn Write,
    pub(super) names: Names,
}

/// Runs ipvsadm with these words.
pub(super) fn run(program: &str, words: &[String], table: &mut dyn Table, streams: Streams<'_>) -> u8 {
    let Streams { input, output, error } = streams;
    if !connect(table, error) {
        return STATUS_USAGE;
    }
    let mut session = Session { program, table, output, error, names: Names::of_system() };
    match parse::parse(words, false, &session.names) {
        Ok(Action::Restore) => restore::run(&mut session, input),
        Ok(action) => session.execute(action),
        Err(complaint) => {
            complain(session.error, &complaint.text(program));
            complaint.status()
        }
    }
}

/// Makes sure that there is a table, or says why not.
pub(super) fn connect(table: &mut dyn Table, error: &mut dyn Write) -> bool {
    let Err(reason) = table.connect() else { return true };
    complain(error, &format!("Can't initialize ipvs: {reason}"));
    complain(error, "Are you sure that IP Virtual Server is built in the kernel or as module?");
    false
}

impl Session<'_> {
    /// Does anything but reading further command lines.
    pub(super) fn execute(&mut self, action: Action) -> u8 {
        match action {
            Action::Help => {
                print(self.output, &format!("{VERSION}{}", HELP.replace("{program}", self.program)));
                STATUS_OK
            }
            Action::Version => {
                print(self.output, VERSION);
                STATUS_OK
            }
            Action::Change(command) => {
                let outcomes = self.table.commands(std::slice::from_ref(&command));
                self.report(&[command], outcomes)
            }
            Action::List(list) => self.list(&list).unwrap_or_else(|reason| self.unreadable(&reason)),
            Action::Save { numeric } => match self.table.services() {
                Ok(services) => {
                    print(self.output, &save::services(&services, names(&self.names, numeric)));
                    STATUS_OK
                }
                Err(reason) => self.unreadable(&reason),
            },
            Action::Restore => unreachable!("a line of ipvsadm -R is never another -R, and `run` has seen to the first"),
        }
    }

    /// Prints what was refused of some commands, and gives back the status of the last one.
    pub(super) fn report(&mut self, commands: &[Command], outcomes: Result<Vec<Outcome>, Unreachable>) -> u8 {
        let outcomes = match outcomes {
            Ok(outcomes) => outcomes,
            Err(reason) => {
                complain(self.error, &reason.to_string());
                return STATUS_REFUSED;
            }
        };
        let mut status = STATUS_OK;
        for (command, outcome) in commands.iter().zip(outcomes) {
            status = match outcome {
                Outcome::Ok => STATUS_OK,
                Outcome::Refused(refusal) => {
                    complain(self.error, refusal_text(&refusal, command));
                    STATUS_REFUSED
                }
            };
        }
        status
    }

    fn list(&mut self, list: &List) -> Result<u8, Unreachable> {
        let text = match list {
            List::Services { service: None, listing, numeric } => {
                let services = self.table.services()?;
                format!("{TITLE}{}", listing::services(&services, *listing, names(&self.names, *numeric)))
            }
            List::Services { service: Some(wanted), listing, numeric } => {
                let mut services = self.table.services()?;
                services.retain(|service| service.id == *wanted);
                if services.is_empty() {
                    complain(self.error, NO_SUCH_SERVICE);
                    return Ok(STATUS_UNREADABLE);
                }
                listing::services(&services, *listing, names(&self.names, *numeric))
            }
            List::Connections { engines, numeric } => {
                self.list_connections(*engines, *numeric)?;
                return Ok(STATUS_OK);
            }
            List::Timeouts => listing::timeouts(self.table.timeouts()?),
            List::SyncDaemons => listing::sync_daemons(&self.table.sync_daemons()?),
        };
        print(self.output, &text);
        Ok(STATUS_OK)
    }

    /// There may be millions: each is printed as it comes.
    fn list_connections(&mut self, engines: bool, numeric: bool) -> Result<(), Unreachable> {
        let names = names(&self.names, numeric);
        let mut output = BufWriter::new(&mut *self.output);
        // Nobody listening any more is no error, but enough.
        let mut is_heard = output.write_all(listing::connection_titles(engines).as_bytes()).is_ok();
        self.table.connections(&mut |connection| {
            is_heard = is_heard && output.write_all(listing::connection(&connection, engines, names).as_bytes()).is_ok();
            if is_heard { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        if is_heard {
            output.flush().unwrap_or_default();
        }
        Ok(())
    }

    fn unreadable(&mut self, reason: &Unreachable) -> u8 {
        complain(self.error, &reason.to_string());
        STATUS_UNREADABLE
    }
}

/// The names to use, if any.
const fn names(names: &Names, numeric: bool) -> Option<&Names> {
    if numeric { None } else { Some(names) }
}

const NO_SUCH_SERVICE: &str = "No such service";

/// What ipvsadm says about a refusal.
fn refusal_text<'a>(refusal: &'a Refusal, command: &Command) -> &'a str {
    match refusal.kind {
        RefusalKind::Invalid => "Invalid operation.  Possibly wrong module version, address not unicast, ...",
        RefusalKind::NoSuchDevice => "No such device",
        RefusalKind::NoSuchSync => "No daemon is running",
        RefusalKind::SyncExists => "Daemon has already run",
        RefusalKind::NoSuchServer => "No such destination",
        RefusalKind::NoSuchService => match command {
            Command::AddServer { .. } | Command::EditServer { .. } | Command::RemoveServer { .. } => "Service not defined",
            _ => NO_SUCH_SERVICE,
        },
        RefusalKind::OutOfRange => "Numerical result out of range",
        RefusalKind::NoRoom => "Memory allocation problem",
        RefusalKind::SchedulerNotFound => "Scheduler or persistence engine not found",
        RefusalKind::ServerExists => "Destination already exists",
        RefusalKind::ServiceExists => "Service already exists",
        RefusalKind::Failed
        | RefusalKind::LocalAddressExists
        | RefusalKind::NoLocalAddress
        | RefusalKind::NoSuchLocalAddress
        | RefusalKind::NoSuchRule
        | RefusalKind::NoSuchSysctl
        | RefusalKind::RuleExists
        | RefusalKind::Unsupported => &refusal.message,
    }
}
