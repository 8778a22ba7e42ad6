//! The state file: all that a director knows, so that the next one can go on where this one stopped.
//!
//! JSON, because people look into it. It is replaced as a whole: written beside the old one, flushed to the disk, and
//! renamed over it, so that whoever reads it sees one state or the other. A file that cannot be understood is never
//! overwritten: reading it fails, and the daemon does not start.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write},
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    model::{MarkRule, SyncDaemon, Timeouts},
    service::Service,
    sysctl,
    traffic::Overall,
    trash::Removed,
};

/// Changes whenever an older bpfvs could not understand the file.
const VERSION: u32 = 1;

/// What a state file says.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct State {
    /// The cookie of the network namespace that the state belongs to: inode numbers of namespaces are used again.
    pub netns_cookie: u64,
    pub(super) timeouts: Timeouts,
    #[serde(default)]
    pub(super) sysctls: sysctl::Values,
    #[serde(default)]
    pub(super) overall: Overall,
    /// FULLNAT's local addresses for all services.
    #[serde(default)]
    pub(super) locals: Vec<IpAddr>,
    pub(super) services: Vec<Service>,
    #[serde(default)]
    pub(super) mark_rules: Vec<MarkRule>,
    pub(super) trash: Vec<Removed>,
    pub(super) next_incarnation: u64,
    /// The synchronisation daemons: not the director's, but of the same life.
    #[serde(default)]
    pub sync_daemons: Vec<SyncDaemon>,
}

/// The outermost part of the file: the version is looked at before anything else.
#[derive(Deserialize, Serialize)]
struct Envelope<T> {
    version: u32,
    state: T,
}

/// Why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It contradicts itself, or is no JSON.
    #[error(
        "cannot use the state file {path}: it is damaged ({cause}); put a good copy in its place, or move it away to start \
         without services"
    )]
    Damaged {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// It was written by another version of bpfvs.
    #[error(
        "cannot use the state file {path}: it has version {found}, and this bpfvs understands version {VERSION}; run the bpfvs \
         that wrote it, or move the file away to start without services"
    )]
    Version {
        /// Its path.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// The operating system says no.
    #[error("cannot {what} the state file {path}: {cause}; see that its directory exists and that there is room")]
    System {
        /// What was tried.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
}

impl Error {
    /// A file that contradicts itself.
    pub fn damaged(path: &Path, cause: &impl ToString) -> Self {
        Self::Damaged { path: path.to_owned(), cause: cause.to_string() }
    }
}

impl State {
    /// Reads a state file; nothing if there is none.
    pub fn read(path: &Path) -> Result<Option<Self>, Error> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(Error::System { what: "read", path: path.to_owned(), cause }),
        };
        let damaged = |cause| Error::damaged(path, &cause);
        let envelope: Envelope<serde_json::Value> = serde_json::from_slice(&text).map_err(damaged)?;
        if envelope.version != VERSION {
            return Err(Error::Version { path: path.to_owned(), found: u64::from(envelope.version) });
        }
        let state: Self = serde_json::from_value(envelope.state).map_err(damaged)?;
        state.check().map_err(|cause| Error::damaged(path, &cause))?;
        Ok(Some(state))
    }

    /// Whether everything is there once only; if not, what is there twice.
    fn check(&self) -> Result<(), String> {
        let mut services = BTreeSet::new();
        let mut service_indices = BTreeSet::new();
        let mut server_indices = BTreeSet::new();
        for service in &self.services {
            if !services.insert(service.id) {
                return Err(format!("it has {} twice", service.id));
            }
            if !service_indices.insert(service.index) {
                return Err(format!("two services have the index {}", service.index));
            }
            let mut servers = BTreeSet::new();
            if let Some(server) = service.servers.iter().find(|server| !servers.insert(server.id)) {
                return Err(format!("{} has the server {} twice", service.id, server.id));
            }
        }
        let servers = self.services.iter().flat_map(|service| &service.servers).map(|server| server.index);
        for index in servers.chain(self.trash.iter().map(|removed| removed.index)) {
            if !server_indices.insert(index) {
                return Err(format!("two servers have the index {index}"));
            }
        }
        Ok(())
    }

    /// Replaces a state file.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let failed = |cause| Error::System { what: "write", path: path.to_owned(), cause };
        self.replace(path).map_err(failed)
    }

    fn replace(&self, path: &Path) -> io::Result<()> {
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        let mut text = serde_json::to_vec(&Envelope { version: VERSION, state: self })?;
        text.push(b'\n');
        file.write_all(&text)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        // The rename itself is on the disk only when the directory is.
        File::open(directory)?.sync_all()
    }
}
