//! The command line of `bpfvs`: what was typed becomes requests to the daemon, and its answers become tables or JSON.
//!
//! ```text
//! bpfvs serve --interface eth0
//! bpfvs service add tcp://10.0.0.200:80 --scheduler rr
//! bpfvs server add tcp://10.0.0.200:80 10.0.0.205 --method route
//! bpfvs service list
//! ```
//!
//! A service is written as a URL: `tcp://10.0.0.200:80`, `udp://[2001:db8::1]:53`; one that a firewall mark names as `mark:10`, or
//! `mark6:10` for IPv6. A real server is an address with a port or without; without one it has the service's.
//!
//! Exit codes: 0 when all went well, 1 when something was refused or failed (one sentence on standard error says why), 2
//! when the command line cannot be understood. With `--json` the answer is JSON on standard output, of the types in
//! [`crate::director::model`]; a change answers `"ok"` or `{"refused": ...}`.

mod connections;
mod daemon;
pub mod ipvsadm;
mod local_addresses;
mod manual;
mod mark;
mod names;
mod persistence;
mod proc;
mod rule_file;
mod rules;
mod server;
mod service;
mod stats;
mod status;
mod sysctl;
mod table;

use std::{
    ffi::OsString,
    io::{self, BufWriter, IsTerminal, Write},
    ops::ControlFlow,
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use tracing_subscriber::EnvFilter;

use crate::{
    api::client::Client,
    daemon::namespace::Identity,
    director::model::{Command as Change, ConnectionView, Outcome},
    realserver,
};

/// The Linux Virtual Server, rebuilt on eBPF.
#[derive(Debug, Parser)]
#[command(name = "bpfvs", version, after_help = EXIT_CODES, subcommand_required = true, arg_required_else_help = true)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// The end of the help text.
const EXIT_CODES: &str = "Exit codes: 0 done, 1 refused or failed, 2 wrong usage.\n\
    Services are written as tcp://10.0.0.200:80, udp://[2001:db8::1]:53, mark:10 or mark6:10.";

/// Options of every command.
#[derive(Args, Clone, Debug)]
struct Global {
    /// The daemon's socket [default: the one of this network namespace]
    #[arg(long, global = true, env = "BPFVS_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Answer in JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon
    Serve(daemon::Serve),
    /// End the daemon; traffic goes on unless --detach is given
    Stop(daemon::Stop),
    /// Attach an interface
    Attach(daemon::Attach),
    /// Detach an interface
    Detach(daemon::Detach),
    /// Show how the daemon is
    Status,
    /// Add, edit, remove and list virtual services
    #[command(subcommand)]
    Service(service::Service),
    /// Add, edit, remove and list real servers
    #[command(subcommand)]
    Server(server::Server),
    /// Add, delete, list and import mark rules: bpfvs's own firewall marks
    #[command(subcommand)]
    Mark(mark::Mark),
    /// Add, delete and list local addresses of FULLNAT
    #[command(subcommand, name = "localaddr")]
    LocalAddresses(local_addresses::LocalAddresses),
    /// List connections
    Connections(connections::Connections),
    /// See which clients stay with which real servers, or let go of them
    #[command(subcommand)]
    Persistence(persistence::Persistence),
    /// Show what was forwarded, or why packets were not
    Stats(stats::Stats),
    /// Print what one of IPVS's files in /proc/net would say
    Proc(proc::Proc),
    /// Show and set IPVS's sysctls
    Sysctl(sysctl::Sysctl),
    /// Print the services as a rule file: ipvsadm's, with the thresholds
    Save,
    /// Replace all services by those of a rule file, or leave all as it is
    Restore(rules::Restore),
    /// Set up a real server, on the real server itself; needs no daemon
    Realserver(realserver::Args),
    /// Print the completions of a shell
    Completions(manual::Completions),
    /// Write the manual pages into a directory
    Man(manual::Man),
    /// Everything that ipvsadm does, with its own options
    #[command(disable_help_flag = true)]
    Ipvsadm {
        /// ipvsadm's options
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

/// Runs the command line, and gives back the exit code.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let Arguments { global, command } = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are no errors, and go to standard output.
            let code = u8::try_from(error.exit_code()).unwrap_or(2);
            drop(error.print());
            return ExitCode::from(code);
        }
    };
    start_log(if matches!(command, Command::Serve(_)) { "info" } else { "warn" });
    let outcome = match command {
        Command::Serve(serve) => serve.run(global.socket),
        Command::Stop(stop) => stop.run(&global),
        Command::Attach(attach) => attach.run(&global),
        Command::Detach(detach) => detach.run(&global),
        Command::Status => status::run(&global),
        Command::Service(service) => service.run(&global),
        Command::Server(server) => server.run(&global),
        Command::Mark(mark) => mark.run(&global),
        Command::LocalAddresses(addresses) => addresses.run(&global),
        Command::Connections(connections) => connections.run(&global),
        Command::Persistence(persistence) => persistence.run(&global),
        Command::Stats(stats) => stats.run(&global),
        Command::Proc(proc) => proc.run(&global),
        Command::Sysctl(sysctl) => sysctl.run(&global),
        Command::Save => rules::save(&global),
        Command::Restore(restore) => restore.run(&global),
        Command::Realserver(args) => {
            return realserver::run(args).unwrap_or_else(|error| {
                drop(writeln!(io::stderr(), "bpfvs: {error:#}"));
                ExitCode::FAILURE
            });
        }
        Command::Completions(completions) => completions.run(),
        Command::Man(man) => man.run(),
        Command::Ipvsadm { arguments } => return ipvsadm::run("ipvsadm", &arguments, global.socket),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            drop(writeln!(io::stderr(), "bpfvs: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Starts the log on standard error; `BPFVS_LOG` says what is in it (`debug`, `bpfvs::director=trace`).
fn start_log(level: &str) {
    let filter = EnvFilter::try_from_env("BPFVS_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let colours = io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(colours).with_target(false).init();
}

impl Global {
    /// The daemon.
    fn client(&self) -> anyhow::Result<Client> {
        client(self.socket.clone())
    }

    /// Has the daemon do one thing.
    fn change(&self, change: Change) -> anyhow::Result<()> {
        let outcome = self.client()?.commands(&[change])?.pop().context("the daemon gave no answer")?;
        if self.json {
            self.answer(&outcome, String::new)?;
        }
        match outcome {
            Outcome::Ok => Ok(()),
            Outcome::Refused(refusal) => Err(refusal.into()),
        }
    }

    /// Prints an answer: as JSON if that is wanted, else in words.
    fn answer<T: Serialize + ?Sized>(&self, value: &T, words: impl FnOnce() -> String) -> anyhow::Result<()> {
        let text = if self.json {
            serde_json::to_string_pretty(value).context("the answer cannot be written as JSON; please report this")? + "\n"
        } else {
            words()
        };
        printed(io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()))
    }

    /// Prints all connections and templates that are wanted while they come, because there may be millions: as JSON, or in words. For words,
    /// `words` gets one after the other, and nothing at the end, and gives back what is to be printed now.
    fn stream(
        &self,
        client: &mut Client,
        is_wanted: impl Fn(&ConnectionView) -> bool,
        mut words: impl FnMut(Option<&ConnectionView>) -> String,
    ) -> anyhow::Result<()> {
        let mut array = Array::default();
        let mut text = |view: Option<&ConnectionView>| if self.json { array.take(view) } else { Ok(words(view)) };
        let mut output = BufWriter::new(io::stdout().lock());
        let mut outcome = Ok(());
        client.each_connection(&mut |view| {
            if is_wanted(&view) {
                outcome = text(Some(&view)).and_then(|text| output.write_all(text.as_bytes()));
            }
            if outcome.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        printed(outcome.and_then(|()| output.write_all(text(None)?.as_bytes())).and_then(|()| output.flush()))
    }
}

/// Whether an answer could be printed.
fn printed(outcome: io::Result<()>) -> anyhow::Result<()> {
    match outcome {
        // `bpfvs service list | head` ends quietly.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot print the answer; see where standard output goes")
        }
        _ => Ok(()),
    }
}

/// An array as [`serde_json::to_string_pretty`] writes it, element by element.
#[derive(Debug, Default)]
struct Array {
    has_elements: bool,
}

impl Array {
    /// Takes an element, or none at the end, and gives back what is to be printed.
    fn take(&mut self, element: Option<&impl Serialize>) -> io::Result<String> {
        let had_elements = std::mem::replace(&mut self.has_elements, true);
        let Some(element) = element else { return Ok(if had_elements { "\n]\n" } else { "[]\n" }.to_owned()) };
        let begin = if had_elements { ",\n  " } else { "[\n  " };
        // In JSON, no text has a line break in it.
        Ok(begin.to_owned() + &serde_json::to_string_pretty(element)?.replace('\n', "\n  "))
    }
}

/// The daemon at this socket, or at that of this process's network namespace.
pub fn client(socket: Option<PathBuf>) -> anyhow::Result<Client> {
    Ok(Client::new(match socket {
        Some(socket) => socket,
        None => Identity::current()?.socket(),
    }))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn ipvsadm_keeps_its_own_options() {
        let line = ["bpfvs", "ipvsadm", "-L", "-n", "--stats", "-h"];
        let arguments = Arguments::try_parse_from(line).expect("ipvsadm's options are no business of clap's");
        let Command::Ipvsadm { arguments } = arguments.command else { panic!("it is ipvsadm") };
        assert_eq!(arguments, ["-L", "-n", "--stats", "-h"]);
    }

    #[test]
    fn arrays_are_written_as_if_they_were_one() {
        for elements in [&[][..], &[[Some("one\ntwo"), None]], &[[Some("a"), None], [None, Some("b")], [None, None]]] {
            let mut array = Array::default();
            let mut text: String = elements.iter().map(|element| array.take(Some(element)).expect("it is JSON")).collect();
            text += &array.take(None::<&()>).expect("it is the end");
            assert_eq!(text, serde_json::to_string_pretty(elements).expect("it is JSON") + "\n");
        }
    }

    #[test]
    fn a_wrong_line_is_wrong_usage() {
        for line in [
            &["bpfvs", "service", "add"][..],
            &["bpfvs", "service", "add", "10.0.0.200:80"],
            &["bpfvs", "serve", "--hook", "nonsense"],
            &["bpfvs", "nonsense"],
            &["bpfvs", "server", "add", "tcp://10.0.0.1:80", "10.0.0.2", "--tunnel", "gue"],
        ] {
            let error = Arguments::try_parse_from(line).map(|_| ()).expect_err("it is wrong");
            assert_eq!(error.exit_code(), 2, "{line:?}");
        }
    }
}
