//! What the golden cases cannot show: absent tables, closed pipes, slow input, and words that nobody would type.

use std::{
    cell::RefCell,
    ffi::OsString,
    io::{Error, ErrorKind, Read, Result as IoResult, Write},
    ops::ControlFlow,
    path::PathBuf,
};

use proptest::prelude::*;

use super::{Streams, Table, Unreachable, names::Names, options, parse, run};
use crate::director::model::{Command, ConnectionView, Outcome, Refusal, RefusalKind, ServiceView, SyncDaemon, Timeouts};

/// A table that notes what happens to it, together with its input.
#[derive(Default)]
struct Noted<'a> {
    absent: Option<Unreachable>,
    refusal: Option<Refusal>,
    notes: Option<&'a RefCell<Vec<String>>>,
}

impl Table for Noted<'_> {
    fn connect(&mut self) -> Result<(), Unreachable> {
        self.absent.clone().map_or(Ok(()), Err)
    }

    fn commands(&mut self, commands: &[Command]) -> Result<Vec<Outcome>, Unreachable> {
        if let Some(notes) = self.notes {
            notes.borrow_mut().push(format!("{} commands", commands.len()));
        }
        let outcome = self.refusal.clone().map_or(Outcome::Ok, Outcome::Refused);
        Ok(vec![outcome; commands.len()])
    }

    fn services(&mut self) -> Result<Vec<ServiceView>, Unreachable> {
        Ok(Vec::new())
    }

    fn connections(&mut self, _visit: &mut dyn FnMut(ConnectionView) -> ControlFlow<()>) -> Result<(), Unreachable> {
        Ok(())
    }

    fn timeouts(&mut self) -> Result<Timeouts, Unreachable> {
        Ok(Timeouts::default())
    }

    fn sync_daemons(&mut self) -> Result<Vec<SyncDaemon>, Unreachable> {
        Ok(Vec::new())
    }
}

/// Input that arrives in pieces.
struct Pieces<'a> {
    pieces: Vec<&'a str>,
    notes: &'a RefCell<Vec<String>>,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> IoResult<usize> {
        if self.pieces.is_empty() {
            return Ok(0);
        }
        let piece = self.pieces.remove(0);
        self.notes.borrow_mut().push("read".to_owned());
        piece.as_bytes().read(buffer)
    }
}

/// A pipe that nobody reads from.
struct Closed;

impl Write for Closed {
    fn write(&mut self, _: &[u8]) -> IoResult<usize> {
        Err(Error::from(ErrorKind::BrokenPipe))
    }

    fn flush(&mut self) -> IoResult<()> {
        Err(Error::from(ErrorKind::BrokenPipe))
    }
}

/// Runs a program; gives back its status and both outputs.
fn answer(program: &str, words: &[&str], table: &mut Noted<'_>, input: &mut dyn Read) -> (u8, String, String) {
    let arguments: Vec<OsString> = words.iter().map(OsString::from).collect();
    let (mut output, mut error) = (Vec::new(), Vec::new());
    let status = run(program, &arguments, table, Streams { input, output: &mut output, error: &mut error });
    let text = |bytes| String::from_utf8(bytes).expect("all text is UTF-8");
    (status, text(output), text(error))
}

#[test]
fn an_absent_table_comes_before_any_look_at_the_words() {
    let socket = PathBuf::from("/run/bpfvs/bpfvs.sock");
    for reason in [Unreachable::NotPermitted, Unreachable::NotRunning { socket }, Unreachable::Other("why".to_owned())] {
        for word in ["-h", "-v", "-Ln", "--nonsense"] {
            let mut table = Noted { absent: Some(reason.clone()), ..Noted::default() };
            let (status, output, error) = answer("ipvsadm", &[word], &mut table, &mut std::io::empty());
            assert_eq!((status, output.as_str()), (2, ""));
            let second = "Are you sure that IP Virtual Server is built in the kernel or as module?";
            assert_eq!(error, format!("Can't initialize ipvs: {reason}\n{second}\n"));
        }
    }
}

#[test]
fn messages_quote_the_program_as_it_was_typed() {
    let (status, _, error) = answer("/sbin/ipvsadm", &["-n"], &mut Noted::default(), &mut std::io::empty());
    assert_eq!(status, 255);
    assert_eq!(error, "Try `/sbin/ipvsadm -h' or '/sbin/ipvsadm --help' for more information.\n");
    let (_, output, _) = answer("./ipvsadm", &["-h"], &mut Noted::default(), &mut std::io::empty());
    assert!(output.contains("\n  ./ipvsadm -Z [virtual-service]\n"), "{output}");
    assert!(!output.contains("{program}"), "{output}");
}

#[test]
fn what_the_director_cannot_do_it_says_itself() {
    let refusal = Refusal { kind: RefusalKind::Unsupported, message: "not yet".to_owned() };
    let mut table = Noted { refusal: Some(refusal), ..Noted::default() };
    let (status, _, error) = answer("ipvsadm", &["-A", "-f", "1"], &mut table, &mut std::io::empty());
    assert_eq!((status, error.as_str()), (255, "not yet\n"));
}

#[test]
fn restoring_sends_together_what_arrived_together_and_holds_nothing_back() {
    let notes = RefCell::new(Vec::new());
    let pieces = vec!["-C\n-A -f 1\n-A -f 2\n-A", " -f 3\n", "-A -f 4\n-L --timeout\n-A -f 5\n"];
    let mut input = Pieces { pieces, notes: &notes };
    let mut table = Noted { notes: Some(&notes), ..Noted::default() };
    let (status, output, error) = answer("ipvsadm", &["-R"], &mut table, &mut input);
    assert_eq!((status, error.as_str()), (0, ""));
    assert_eq!(output, "Timeout (tcp tcpfin udp): 900 120 300\n");
    // The last one says that this was all.
    let wanted = ["read", "3 commands", "read", "1 commands", "read", "1 commands", "1 commands", "0 commands"];
    assert_eq!(*notes.borrow(), wanted);
}

#[test]
fn nobody_has_to_read_the_answer() {
    for words in [&["-h"][..], &["-Ln"], &["--nonsense"], &["-A", "-f", "0"]] {
        let arguments: Vec<OsString> = words.iter().map(OsString::from).collect();
        let streams = Streams { input: &mut std::io::empty(), output: &mut Closed, error: &mut Closed };
        let status = run("ipvsadm", &arguments, &mut Noted::default(), streams);
        assert!([0, 2, 255].contains(&status), "{words:?}: {status}");
    }
}

fn switches() -> impl Iterator<Item = String> {
    let switches = || options::COMMANDS.iter().chain(options::OPTIONS.iter().flat_map(|definition| definition.switches));
    let letters = switches().flat_map(|switch| switch.letters.chars()).map(|letter| format!("-{letter}"));
    switches().map(|switch| format!("--{}", switch.word)).chain(letters)
}

/// A word of a command line: switches, values, and nonsense.
fn word() -> impl Strategy<Value = String> {
    let values = ["192.0.2.1:80", "[2001:db8::1]:80", "[", "]:", "1", "0", "-1", "", "-", "--", "gue", "master", ",", "sh", "é"];
    prop_oneof![
        4 => proptest::sample::select(switches().collect::<Vec<_>>()),
        4 => proptest::sample::select(values.map(str::to_owned).to_vec()),
        1 => "-[A-Za-z0-9=]{1,6}",
        1 => "[0-9.:\\[\\]]{0,12}",
    ]
}

fn command() -> impl Strategy<Value = String> {
    let commands = options::COMMANDS.iter().flat_map(|switch| switch.letters.chars()).map(|letter| format!("-{letter}"));
    proptest::sample::select(commands.collect::<Vec<_>>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]
    #[test]
    fn no_command_line_is_too_strange(command in command(), words in proptest::collection::vec(word(), 0..8)) {
        let words: Vec<String> = std::iter::once(command).chain(words).collect();
        if let Err(complaint) = parse::parse(&words, true, &Names::of_test("http 80/tcp")) {
            prop_assert!([2, 255].contains(&complaint.status()));
        }
    }
}
