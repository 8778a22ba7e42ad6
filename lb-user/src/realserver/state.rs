//! The memory of `setup`: which virtual addresses this host serves, and what was changed for them.
//!
//! The file is replaced as a whole, so that it is never half written, and always *before* a change is made: an entry whose
//! change did not happen is harmless, because undoing looks at what is there.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use super::{Hook, TunnelType, instance::Instance};

/// The layout of the file.
const VERSION: u32 = 1;

/// What stands in the file.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct State {
    version: u32,
    /// The virtual addresses that are served.
    pub(super) vips: Vec<Vip>,
    /// What was changed for them, oldest first.
    pub(super) changes: Vec<Change>,
}

/// A virtual address.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Vip {
    /// The address.
    pub(super) address: IpAddr,
    /// Where the director's packets for it arrive.
    pub(super) interface: String,
    /// How they come.
    #[serde(flatten)]
    pub(super) arrival: Arrival,
}

/// How packets come from the director.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase", tag = "method")]
pub(super) enum Arrival {
    /// As they are.
    Route,
    /// In a tunnel that a kernel device ends.
    Device {
        /// The devices.
        devices: Vec<String>,
    },
    /// In a tunnel that our program ends.
    Program {
        /// Where it is attached.
        hook: Hook,
        /// The kind of tunnel.
        tunnel: TunnelType,
        /// The UDP port of gue, else 0.
        port: u16,
    },
}

/// Something that was changed.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "change")]
pub(super) enum Change {
    /// An address was added to `lo`.
    Address {
        /// The address.
        address: IpAddr,
    },
    /// A setting was changed.
    Sysctl {
        /// Its path below `/proc/sys`.
        key: String,
        /// Its value before.
        before: String,
        /// The value that was set.
        set: String,
    },
    /// A tunnel device was made.
    DeviceMade {
        /// Its name.
        name: String,
    },
    /// A tunnel device was set up that was down.
    DeviceUp {
        /// Its name.
        name: String,
    },
    /// A clsact qdisc was added.
    Qdisc {
        /// The interface.
        interface: String,
    },
    /// The program was attached.
    Program(Attachment),
}

/// An attached program.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Attachment {
    /// The interface.
    pub(super) interface: String,
    /// Its index at that time.
    pub(super) index: u32,
    /// Where.
    pub(super) hook: Hook,
    /// The directory with the pins of program, maps and link.
    pub(super) pins: PathBuf,
    /// The priority and handle of the filter, where the kernel has no links for tc.
    pub(super) filter: Option<(u16, u32)>,
}

impl State {
    /// The state before any setup.
    const fn empty() -> Self {
        Self { version: VERSION, vips: Vec::new(), changes: Vec::new() }
    }

    /// Reads the state of this namespace.
    pub(super) fn load(instance: &Instance) -> Result<Self> {
        let path = instance.state_file();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::empty()),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}: see the cause; run as root", path.display())),
        };
        let damaged = || format!("cannot understand {}: it is damaged; undo what it lists by hand, then remove it", path.display());
        let state: Self = serde_json::from_str(&text).with_context(damaged)?;
        if state.version != VERSION {
            bail!(
                "cannot use {}: its version is {} and this bpfvs knows {VERSION}; run teardown with the bpfvs that wrote it",
                path.display(),
                state.version
            );
        }
        Ok(state)
    }

    /// Writes the state of this namespace, or removes the file if there is nothing to remember.
    pub(super) fn save(&self, instance: &Instance) -> Result<()> {
        let path = instance.state_file();
        let save = || -> Result<()> {
            if self.vips.is_empty() && self.changes.is_empty() {
                return match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
                    _ => Ok(()),
                };
            }
            let directory = directory(&path)?;
            fs::create_dir_all(directory)?;
            let temporary = path.with_extension("new");
            let mut file = File::create(&temporary)?;
            file.write_all(serde_json::to_string_pretty(self)?.as_bytes())?;
            file.sync_all()?;
            Ok(fs::rename(&temporary, &path)?)
        };
        save().with_context(|| format!("cannot write {}: see the cause; run as root, with room in /run", path.display()))
    }
}

/// Keeps other commands of this kind away until it is dropped.
pub(super) fn lock(instance: &Instance) -> Result<File> {
    let path = instance.state_file();
    let lock = || -> Result<File> {
        let directory = directory(&path)?;
        fs::create_dir_all(directory)?;
        let file = File::open(directory)?;
        file.lock()?;
        Ok(file)
    };
    lock().with_context(|| format!("cannot lock the directory of {}: see the cause; run as root", path.display()))
}

fn directory(path: &Path) -> Result<&Path> {
    path.parent().ok_or_else(|| anyhow!("the state file {} has no directory: report this", path.display()))
}
