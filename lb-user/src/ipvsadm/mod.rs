//! The programs `ipvsadm`, `ipvsadm-save` and `ipvsadm-restore`, byte for byte as people and scripts know them.
//!
//! ```text
//! ipvsadm -A -t 192.0.2.1:80 -s wrr
//! ipvsadm -a -t 192.0.2.1:80 -r 192.0.2.11 -g -w 5
//! ipvsadm -Ln --stats
//! ```
//!
//! A run goes one way: `reader` takes words apart, `parse` decides what they ask for, `execute` asks the director
//! for it, `listing` and `save` write the answer down. What the options are stands in one table, `options`. The
//! director is known only as a [`Table`], so that all of this can be tested without one.
//!
//! Nothing here decides what the director can do: marks, persistence and all schedulers are understood, and the
//! director's refusal is printed.

mod complaint;
mod execute;
mod format;
mod listing;
mod names;
mod options;
mod parse;
mod reader;
mod restore;
pub mod rules;
mod save;
mod sort;
#[cfg(test)]
mod tests;
mod values;

use std::{
    ffi::OsString,
    io::{Read, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use crate::director::model::{Command, ConnectionView, Outcome, ServiceView, SyncDaemon, Timeouts};

/// The exit status when all went well.
const STATUS_OK: u8 = 0;
/// The exit status when something could not be read.
const STATUS_UNREADABLE: u8 = 1;
/// The exit status of a wrong command line, and when there is no table.
const STATUS_USAGE: u8 = 2;
/// The exit status of a refused command, and of words that the reader cannot take.
const STATUS_REFUSED: u8 = 255;

/// The table of services, wherever it is.
pub trait Table {
    /// Makes sure that the table is there. Called before anything else, even before a look at the arguments.
    fn connect(&mut self) -> Result<(), Unreachable>;

    /// Does these commands, one after the other, each on its own; one answer for each.
    fn commands(&mut self, commands: &[Command]) -> Result<Vec<Outcome>, Unreachable>;

    /// As [`Table::commands`], if more of them follow at once: the table may be late with what only the last ones need.
    fn commands_before_more(&mut self, commands: &[Command]) -> Result<Vec<Outcome>, Unreachable> {
        self.commands(commands)
    }

    /// All services; the servers of each with the newest first.
    fn services(&mut self) -> Result<Vec<ServiceView>, Unreachable>;

    /// Shows all connections and templates one after the other, until somebody has enough.
    fn connections(&mut self, visit: &mut dyn FnMut(ConnectionView) -> ControlFlow<()>) -> Result<(), Unreachable>;

    /// The timeouts.
    fn timeouts(&mut self) -> Result<Timeouts, Unreachable>;

    /// The synchronisation daemons, the master first.
    fn sync_daemons(&mut self) -> Result<Vec<SyncDaemon>, Unreachable>;
}

/// Why there is no table. The text is the reason alone: `Can't initialize ipvs: «reason»`.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Unreachable {
    /// The user may not use it.
    #[error("Permission denied (you must be root)")]
    NotPermitted,
    /// Nobody listens at the socket.
    #[error("the bpfvs daemon does not answer at {}; start it with `bpfvs serve'", .socket.display())]
    NotRunning {
        /// The socket that was tried.
        socket: PathBuf,
    },
    /// Anything else, in words.
    #[error("{0}")]
    Other(String),
}

/// What `ipvsadm -h` prints after the version.
pub fn help() -> String {
    execute::HELP.replace("{program}", "ipvsadm")
}

/// Where a run reads from and writes to. Nobody listening any more is no error.
pub struct Streams<'a> {
    /// Standard input: read by `-R` and `ipvsadm-restore` only.
    pub input: &'a mut dyn Read,
    /// Standard output.
    pub output: &'a mut dyn Write,
    /// Standard error.
    pub error: &'a mut dyn Write,
}

/// Writes, and lets it be if the reader has gone: `ipvsadm -Ln | head` ends quietly.
fn print(stream: &mut dyn Write, text: &str) {
    if stream.write_all(text.as_bytes()).is_ok() {
        stream.flush().unwrap_or_default();
    }
}

/// Prints a line.
fn complain(stream: &mut dyn Write, line: &str) {
    print(stream, &format!("{line}\n"));
}

/// Runs one of the three programs and gives back its exit status. Which one, the last part of `program` says; messages
/// quote `program` as it was typed. Arguments that are not UTF-8 are never valid, and are quoted with replacements.
pub fn run(program: &str, arguments: &[OsString], table: &mut dyn Table, streams: Streams<'_>) -> u8 {
    let words: Vec<String> = arguments.iter().map(|argument| argument.to_string_lossy().into_owned()).collect();
    match Path::new(program).file_name().and_then(|name| name.to_str()) {
        Some("ipvsadm-save") => save::program(&words, table, streams),
        Some("ipvsadm-restore") => restore::program(table, streams),
        _ => execute::run(program, &words, table, streams),
    }
}
