//! The command lines' side of the API. It blocks: a command line has nothing else to do.
//!
//! One [`Client`] keeps one connection for all its requests; it is made at the first one.

use std::{
    io::{self, Read},
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    header,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, runtime::Runtime, task::JoinHandle};

use super::{Attach, Detach, Failure, MORE, Stop, array};
use crate::director::model::{
    Command, ConnectionView, Hook, LocalAddresses, MarkRule, Outcome, ReasonView, ServiceView, Status, SyncDaemonView, SysctlView,
    Timeouts, Traffic,
};

/// How long a daemon may take to end after it said that it would.
const FAREWELL: Duration = Duration::from_secs(10);

/// A daemon, seen from outside.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    connection: Option<Connection>,
}

/// An open connection, and what drives it.
#[derive(Debug)]
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
    runtime: Runtime,
}

/// The body of an answer, as it comes.
struct Pieces<'a> {
    runtime: &'a Runtime,
    body: Incoming,
    piece: Bytes,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.runtime.block_on(self.body.frame()) {
                None => return Ok(0),
                Some(frame) => self.piece = frame.map_err(io::Error::other)?.into_data().unwrap_or_default(),
            }
        }
        let length = buffer.len().min(self.piece.len());
        buffer[..length].copy_from_slice(&self.piece.split_to(length));
        Ok(length)
    }
}

/// Why the daemon gave no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The connection broke, or the answer is none that this version understands.
    #[error("the daemon at {socket} gave no answer that can be understood: {cause}; see its log, and that it is of this version")]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// What happened.
        cause: String,
    },
    /// The user may not open the socket.
    #[error("cannot talk to the daemon at {socket}: you may not open this socket; run the command as root")]
    NotPermitted {
        /// The socket.
        socket: PathBuf,
    },
    /// Nobody listens at the socket.
    #[error("cannot talk to the daemon: nobody listens at {socket}; start it with `bpfvs serve`, or name its socket (`--socket`)")]
    NotRunning {
        /// The socket.
        socket: PathBuf,
    },
    /// The daemon said no, in these words.
    #[error("{0}")]
    Refused(String),
    /// The operating system says no.
    #[error("cannot talk to the daemon at {socket}: {cause}; see that it is a socket of bpfvs")]
    System {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
}

impl Client {
    /// A client of the daemon that listens there. Nothing is sent yet.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, connection: None }
    }

    /// Where the daemon listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Connects, unless it is done already.
    pub fn connect(&mut self) -> Result<(), Error> {
        self.connection().map(|_| ())
    }

    /// Does commands; one outcome for each.
    pub fn commands(&mut self, commands: &[Command]) -> Result<Vec<Outcome>, Error> {
        self.commands_at("/v1/commands", commands)
    }

    /// Does commands of which more follow at once: the answer does not wait until they are kept safe.
    pub fn commands_before_more(&mut self, commands: &[Command]) -> Result<Vec<Outcome>, Error> {
        self.commands_at(&format!("/v1/commands?{MORE}"), commands)
    }

    fn commands_at(&mut self, path: &str, commands: &[Command]) -> Result<Vec<Outcome>, Error> {
        let outcomes: Vec<Outcome> = self.post(path, &commands)?;
        if outcomes.len() == commands.len() {
            Ok(outcomes)
        } else {
            let cause = format!("{} outcomes for {} commands", outcomes.len(), commands.len());
            Err(Error::Broken { socket: self.socket.clone(), cause })
        }
    }

    /// All services; the servers of each with the newest first.
    pub fn services(&mut self) -> Result<Vec<ServiceView>, Error> {
        self.get("/v1/services")
    }

    /// Shows all connections and templates one after the other, until somebody has enough.
    pub fn each_connection(&mut self, visit: &mut dyn FnMut(ConnectionView) -> ControlFlow<()>) -> Result<(), Error> {
        let response = self.send(Method::GET, "/v1/connections", Bytes::new())?;
        if response.status() != StatusCode::OK {
            return self.understand(response);
        }
        let Connection { runtime, .. } = self.answering()?;
        let pieces = Pieces { runtime, body: response.into_body(), piece: Bytes::new() };
        let outcome = array::read(io::BufReader::new(pieces), visit);
        if !matches!(outcome, Ok(true)) {
            // What is left of the answer will not be read.
            self.connection = None;
        }
        outcome.map(|_| ()).map_err(|error| self.broken(&error))
    }

    /// IPVS's sysctls.
    pub fn sysctls(&mut self) -> Result<Vec<SysctlView>, Error> {
        self.get("/v1/sysctls")
    }

    /// What all real servers together do.
    pub fn traffic(&mut self) -> Result<Traffic, Error> {
        self.get("/v1/traffic")
    }

    /// The mark rules.
    pub fn mark_rules(&mut self) -> Result<Vec<MarkRule>, Error> {
        self.get("/v1/mark-rules")
    }

    /// FULLNAT's local addresses.
    pub fn local_addresses(&mut self) -> Result<LocalAddresses, Error> {
        self.get("/v1/local-addresses")
    }

    /// The timeouts.
    pub fn timeouts(&mut self) -> Result<Timeouts, Error> {
        self.get("/v1/timeouts")
    }

    /// The synchronisation daemons, the master first.
    pub fn sync_daemons(&mut self) -> Result<Vec<SyncDaemonView>, Error> {
        self.get("/v1/sync-daemons")
    }

    /// How the daemon is.
    pub fn status(&mut self) -> Result<Status, Error> {
        self.get("/v1/status")
    }

    /// Why packets were not forwarded.
    pub fn reasons(&mut self) -> Result<Vec<ReasonView>, Error> {
        self.get("/v1/reasons")
    }

    /// Attaches an interface.
    pub fn attach(&mut self, interface: &str, hook: Hook) -> Result<(), Error> {
        self.post("/v1/attach", &Attach { interface: interface.to_owned(), hook })
    }

    /// Detaches an interface.
    pub fn detach(&mut self, interface: &str) -> Result<(), Error> {
        self.post("/v1/detach", &Detach { interface: interface.to_owned() })
    }

    /// Ends the daemon, and waits until it has ended.
    pub fn stop(mut self, detach: bool) -> Result<(), Error> {
        let () = self.post("/v1/stop", &Stop { detach })?;
        if let Some(Connection { sender, driver, runtime }) = self.connection {
            // The daemon closes the connection when it ends; until then this end stays open.
            let closed = runtime.block_on(async { tokio::time::timeout(FAREWELL, driver).await });
            drop(sender);
            if closed.is_err() {
                let cause = format!("it has not ended {} s after it said that it would", FAREWELL.as_secs());
                return Err(Error::Broken { socket: self.socket, cause });
            }
        }
        Ok(())
    }

    fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, Error> {
        self.request(Method::GET, path, Bytes::new())
    }

    fn post<T: DeserializeOwned>(&mut self, path: &str, body: &impl Serialize) -> Result<T, Error> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken(&error))?;
        self.request(Method::POST, path, body.into())
    }

    fn request<T: DeserializeOwned>(&mut self, method: Method, path: &str, body: Bytes) -> Result<T, Error> {
        let response = self.send(method, path, body)?;
        self.understand(response)
    }

    /// Sends a request, and waits until the answer begins.
    fn send(&mut self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, Error> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "bpfvs")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| self.broken(&error))?;
        let Connection { sender, runtime, .. } = self.connection()?;
        let exchange = async {
            sender.ready().await?;
            sender.send_request(request).await
        };
        let answer = runtime.block_on(exchange);
        self.unless_broken(answer)
    }

    /// What an answer says.
    fn understand<T: DeserializeOwned>(&mut self, response: Response<Incoming>) -> Result<T, Error> {
        let status = response.status();
        let body = self.answering()?.runtime.block_on(response.into_body().collect());
        let body = self.unless_broken(body)?.to_bytes();
        if status == StatusCode::OK {
            return serde_json::from_slice(&body).map_err(|error| self.broken(&error));
        }
        match serde_json::from_slice(&body) {
            Ok(Failure { error }) => Err(Error::Refused(error)),
            Err(_) => Err(self.broken(&status)),
        }
    }

    /// Gives the connection up if something has gone wrong with it.
    fn unless_broken<T>(&mut self, outcome: hyper::Result<T>) -> Result<T, Error> {
        outcome.map_err(|error| {
            self.connection = None;
            self.broken(&error)
        })
    }

    fn broken(&self, cause: &dyn std::fmt::Display) -> Error {
        Error::Broken { socket: self.socket.clone(), cause: cause.to_string() }
    }

    /// The connection whose answer is being read, and which the daemon may have closed behind it.
    fn answering(&self) -> Result<&Connection, Error> {
        self.connection.as_ref().ok_or_else(|| self.broken(&"the connection is gone"))
    }

    fn connection(&mut self) -> Result<&mut Connection, Error> {
        let connection = match self.connection.take() {
            Some(connection) if !connection.sender.is_closed() => connection,
            _ => self.open()?,
        };
        Ok(self.connection.insert(connection))
    }

    fn open(&self) -> Result<Connection, Error> {
        let socket = || self.socket.clone();
        let failed = |cause: io::Error| match cause.kind() {
            io::ErrorKind::PermissionDenied => Error::NotPermitted { socket: socket() },
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::NotRunning { socket: socket() },
            _ => Error::System { socket: socket(), cause },
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let stream = runtime.block_on(UnixStream::connect(&self.socket)).map_err(failed)?;
        let handshake = runtime.block_on(http1::handshake(TokioIo::new(stream)));
        let (sender, connection) = handshake.map_err(|error| self.broken(&error))?;
        let driver = runtime.spawn(async {
            // A broken connection shows at the request that waits for its answer.
            drop(connection.await);
        });
        Ok(Connection { sender, driver, runtime })
    }
}
