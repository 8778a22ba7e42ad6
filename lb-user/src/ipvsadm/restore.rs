//! Command lines from standard input (`-R`), and the program `ipvsadm-restore`.
//!
//! Each line is a command line of its own: words between white space, no quoting, no remarks; a word `ipvsadm` is dropped
//! wherever it stands. Refused commands do not stop the rest, a wrong line does.
//!
//! A table of many thousand lines should not mean as many requests, so changes are collected and sent together, but never
//! held back: when the input that has arrived is used up, or something else than a change comes, they go out. A pipe brings 64
//! KiB at a time; only at the end has the table to keep safe what came through it.

use std::io::{BufRead, BufReader, Read};

use super::{
    Streams, Table, complain,
    execute::{self, Session},
    parse::{self, Action},
};
use crate::director::model::Command;

/// How much input is read at once: all of a usual file, so that each service that it speaks of is made up once.
const BUFFER: usize = 8 << 20;

/// Runs the program `ipvsadm-restore`: all of the input but remarks, over an empty table.
pub(super) fn program(table: &mut dyn Table, streams: Streams<'_>) -> u8 {
    let Streams { input, output, error } = streams;
    let mut text = Vec::new();
    if let Err(reason) = input.read_to_end(&mut text) {
        // What could not be read must not empty the table.
        complain(error, &format!("ipvsadm-restore: cannot read standard input: {reason}; the table was left as it was"));
        return super::STATUS_UNREADABLE;
    }
    let lines: Vec<&[u8]> = text.split_inclusive(|byte| *byte == b'\n').filter(|line| !line.starts_with(b"#")).collect();
    let mut rules: &[u8] = &lines.concat();
    let mut run = |option: &str, input: &mut dyn Read| {
        execute::run("ipvsadm", &[option.to_owned()], table, Streams { input, output: &mut *output, error: &mut *error })
    };
    // The status of -C is of no interest to the original.
    run("-C", &mut std::io::empty());
    run("-R", &mut rules)
}

/// Runs `ipvsadm -R`; gives back the status of the last line.
pub(super) fn run(session: &mut Session<'_>, input: &mut dyn Read) -> u8 {
    let mut input = BufReader::with_capacity(BUFFER, input);
    let mut changes = Changes::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        if !input.buffer().contains(&b'\n') {
            changes.send(session);
        }
        // Input that cannot be read any more is at its end.
        if input.read_until(b'\n', &mut line).unwrap_or(0) == 0 {
            changes.finish(session);
            return changes.status;
        }
        let words: Vec<String> = words(&String::from_utf8_lossy(&line));
        if words.is_empty() {
            continue;
        }
        let parsed = parse::parse(&words, true, &session.names);
        if let Ok(Action::Change(command)) = parsed {
            changes.commands.push(command);
            continue;
        }
        changes.send(session);
        let (status, ends) = match parsed {
            Ok(action) => {
                let ends = matches!(action, Action::Help | Action::Version);
                let status = session.execute(action);
                (status, ends || status == super::STATUS_UNREADABLE)
            }
            Err(complaint) => {
                complain(session.error, &complaint.text(session.program));
                (complaint.status(), complaint.ends_restore())
            }
        };
        changes.status = status;
        if ends {
            changes.finish(session);
            return status;
        }
    }
}

/// The changes that were read and not yet asked for, and the status of the last line.
#[derive(Default)]
struct Changes {
    commands: Vec<Command>,
    /// Whether the table waits for the end.
    unfinished: bool,
    status: u8,
}

impl Changes {
    /// Asks for what was read, and says that more may follow.
    fn send(&mut self, session: &mut Session<'_>) {
        if !self.commands.is_empty() {
            let outcomes = session.table.commands_before_more(&self.commands);
            self.status = session.report(&self.commands, outcomes);
            self.commands.clear();
            self.unfinished = true;
        }
    }

    /// Asks for the rest, and says that this was all.
    fn finish(&mut self, session: &mut Session<'_>) {
        if !self.commands.is_empty() || self.unfinished {
            let outcomes = session.table.commands(&self.commands);
            let status = session.report(&self.commands, outcomes);
            if !self.commands.is_empty() {
                self.status = status;
            }
        }
    }
}

/// The words of a line.
fn words(line: &str) -> Vec<String> {
    let words = line.split([' ', '\t', '\r', '\n']).filter(|word| !word.is_empty() && *word != "ipvsadm");
    words.map(str::to_owned).collect()
}
