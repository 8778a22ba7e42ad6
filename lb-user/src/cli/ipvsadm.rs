//! `ipvsadm`, `ipvsadm-save`, `ipvsadm-restore` and `bpfvs ipvsadm`: the [personality](crate::ipvsadm) over the daemon's API.

use std::{ffi::OsString, io, ops::ControlFlow, path::PathBuf, process::ExitCode};

use crate::{
    api::client::{Client, Error},
    director::model::{Command, ConnectionView, Outcome, ServiceView, SyncDaemon, Timeouts},
    ipvsadm::{self, Streams, Table, Unreachable},
};

/// Runs one of the programs against the daemon at this socket, or at that of this process's network namespace.
pub fn run(program: &str, arguments: &[OsString], socket: Option<PathBuf>) -> ExitCode {
    let socket = socket.or_else(|| std::env::var_os("BPFVS_SOCKET").map(PathBuf::from));
    let mut table = Daemon { client: super::client(socket).map_err(|error| Unreachable::Other(format!("{error:#}"))) };
    let (mut input, mut output, mut error) = (io::stdin(), io::stdout(), io::stderr());
    let streams = Streams { input: &mut input, output: &mut output, error: &mut error };
    let status = ipvsadm::run(program, arguments, &mut table, streams);
    ExitCode::from(status)
}

/// The daemon's table, if it can be told where the daemon is.
struct Daemon {
    client: Result<Client, Unreachable>,
}

impl Daemon {
    fn ask<T>(&mut self, request: impl FnOnce(&mut Client) -> Result<T, Error>) -> Result<T, Unreachable> {
        let client = self.client.as_mut().map_err(|error| error.clone())?;
        request(client).map_err(|error| match error {
            Error::NotPermitted { .. } => Unreachable::NotPermitted,
            Error::NotRunning { socket } => Unreachable::NotRunning { socket },
            other => Unreachable::Other(other.to_string()),
        })
    }
}

impl Table for Daemon {
    fn connect(&mut self) -> Result<(), Unreachable> {
        self.ask(Client::connect)
    }

    fn commands(&mut self, commands: &[Command]) -> Result<Vec<Outcome>, Unreachable> {
        self.ask(|client| client.commands(commands))
    }

    fn commands_before_more(&mut self, commands: &[Command]) -> Result<Vec<Outcome>, Unreachable> {
        self.ask(|client| client.commands_before_more(commands))
    }

    fn services(&mut self) -> Result<Vec<ServiceView>, Unreachable> {
        self.ask(Client::services)
    }

    fn connections(&mut self, visit: &mut dyn FnMut(ConnectionView) -> ControlFlow<()>) -> Result<(), Unreachable> {
        self.ask(|client| client.each_connection(visit))
    }

    fn timeouts(&mut self) -> Result<Timeouts, Unreachable> {
        self.ask(Client::timeouts)
    }

    fn sync_daemons(&mut self) -> Result<Vec<SyncDaemon>, Unreachable> {
        Ok(self.ask(Client::sync_daemons)?.into_iter().map(|view| view.daemon).collect())
    }
}
