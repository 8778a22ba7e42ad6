//! The maps on disk, so to speak: where they are pinned, whether those found there fit, and how they are opened.
//!
//! ```text
//! /sys/fs/bpf/bpfvs/main/maps/CONNECTIONS_V4    programs/xdp_director    links/xdp-2, links/tc-2
//! ```
//!
//! Pins outlive the daemon: traffic goes on without it, and the next one takes over what it finds. It must not take over
//! maps of another shape (the kernel would read and write past their ends), nor those of a network namespace that is gone
//! and whose inode number was dealt again. So before anything is loaded, [`inspect`] looks at what is there.
//!
//! Loading programs is [`super::programs`]'s part; each user of a map then opens it by its pin.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use aya::maps::{Array, Map, MapData, MapError};
use lb_common::config::{Config, LAYOUT};

/// The compiled programs.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/director"));

/// A map takes the memory for its entries as they come.
pub const BPF_F_NO_PREALLOC: u32 = 1;

/// The tables of connections themselves, whose user chooses when they take their memory.
pub const PREALLOCATED_TABLES: [&str; 2] = ["CONNECTIONS_V4", "CONNECTIONS_V6"];

/// The tables with an entry for each connection or client, whose size the user chooses.
pub const CONNECTION_TABLES: [&str; 6] =
    ["CONNECTIONS_V4", "CONNECTIONS_V6", "REPLIES_V4", "REPLIES_V6", "TEMPLATES_V4", "TEMPLATES_V6"];

/// The pins of one instance.
#[derive(Clone, Debug)]
pub struct Pins {
    directory: PathBuf,
}

impl Pins {
    /// The pins below this directory, which need not exist.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// The instance's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where a map is pinned.
    pub fn map(&self, name: &str) -> PathBuf {
        self.directory.join("maps").join(name)
    }

    /// Where a program is pinned.
    pub fn program(&self, name: &str) -> PathBuf {
        self.directory.join("programs").join(name)
    }

    /// Where the link of a hook (`xdp`, `tc`) to an interface is pinned.
    pub fn link(&self, hook: &str, ifindex: u32) -> PathBuf {
        self.directory.join("links").join(format!("{hook}-{ifindex}"))
    }

    /// The interfaces that links are pinned for, with their hooks.
    pub fn links(&self) -> Vec<(String, u32)> {
        let Ok(entries) = fs::read_dir(self.directory.join("links")) else { return Vec::new() };
        let parse = |name: &str| {
            let (hook, ifindex) = name.split_once('-')?;
            Some((hook.to_owned(), ifindex.parse().ok()?))
        };
        entries.filter_map(|entry| parse(entry.ok()?.file_name().to_str()?)).collect()
    }

    /// Makes the directories.
    pub fn create(&self) -> anyhow::Result<()> {
        for part in ["maps", "programs", "links"] {
            let directory = self.directory.join(part);
            fs::create_dir_all(&directory).with_context(|| {
                format!(
                    "{} cannot be created; bpfvs must run as root, with a BPF file system at /sys/fs/bpf (`mount -t bpf bpf /sys/fs/bpf`)",
                    directory.display()
                )
            })?;
        }
        let kind = nix::sys::statfs::statfs(&self.directory)
            .with_context(|| format!("the file system of {} cannot be examined", self.directory.display()))?
            .filesystem_type();
        if kind != nix::sys::statfs::BPF_FS_MAGIC {
            // Leave nothing behind where nothing can be pinned.
            let _ = fs::remove_dir_all(&self.directory);
            bail!(
                "{} is not on a BPF file system, so nothing can be pinned there; mount one with `mount -t bpf bpf /sys/fs/bpf`, and do not \
                 use `ip netns exec`, which hides it: `bpfvs serve --netns NAME` enters a namespace without",
                self.directory.display()
            );
        }
        Ok(())
    }

    /// Removes everything: links first, so that no packet meets programs whose maps are going.
    pub fn remove(&self) -> anyhow::Result<()> {
        for part in ["links", "programs", "maps"] {
            remove_directory(&self.directory.join(part))?;
        }
        match fs::remove_dir(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("{} cannot be removed", self.directory.display()))
            }
            _ => Ok(()),
        }
    }

    /// Opens a pinned map.
    pub fn data(&self, name: &str) -> anyhow::Result<MapData> {
        let path = self.map(name);
        MapData::from_pin(&path).with_context(|| {
            format!("the map {} cannot be opened; `bpfvs stop --detach` removes a damaged instance", path.display())
        })
    }

    /// Opens a pinned map as what it is.
    pub fn typed<T: TryFrom<Map, Error = MapError>>(&self, name: &str) -> anyhow::Result<T> {
        Map::from_map_data(self.data(name)?).and_then(T::try_from).with_context(|| {
            format!("the map {} is not what it should be; `bpfvs stop --detach` removes it", self.map(name).display())
        })
    }
}

/// Whether it is about a key that is not there: aya has a word for it, but a deletion hands on the kernel's.
pub fn is_missing(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(error) => error.io_error.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}

fn remove_directory(directory: &Path) -> anyhow::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("{} cannot be read", directory.display())),
    };
    for entry in entries {
        let path = entry.with_context(|| format!("{} cannot be read", directory.display()))?.path();
        remove_pin(&path).with_context(|| format!("the pin {} cannot be removed", path.display()))?;
    }
    fs::remove_dir(directory).with_context(|| format!("{} cannot be removed", directory.display()))
}

/// Removes a pin, if it is there.
pub fn remove_pin(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What stands at an instance's pins.
#[derive(Debug)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// Leftovers that nobody can use: of a start that failed half-way, or of a namespace that is gone.
    Leftovers(&'static str),
    /// An instance that can be taken over, with its settings.
    Instance(Config),
}

/// Looks at the pins of an instance without changing anything.
///
/// It is an error if they belong to another version of bpfvs.
pub fn inspect(pins: &Pins, netns_cookie: u64) -> anyhow::Result<Found> {
    if !pins.directory().join("maps").exists() {
        return Ok(Found::Nothing);
    }
    if !pins.map("CONFIG").exists() {
        return Ok(Found::Leftovers("a start that failed"));
    }
    // These may be of any version.
    if let Ok(config) = pins.typed::<Array<MapData, Config>>("CONFIG")
        && let Ok(config) = config.get(&0, 0)
    {
        if config.layout == 0 {
            return Ok(Found::Leftovers("a start that failed"));
        }
        if config.netns_cookie != netns_cookie {
            return Ok(Found::Leftovers("a network namespace that is gone"));
        }
    }
    let object = aya_obj::Object::parse(OBJECT).context("the compiled eBPF object is damaged; build bpfvs anew")?;
    for (name, expected) in &object.maps {
        let path = pins.map(name);
        if !path.exists() {
            continue;
        }
        let data = MapData::from_pin(&path).with_context(|| format!("the pinned map {} cannot be opened", path.display()))?;
        let info = data.info().with_context(|| format!("the kernel does not describe the map {}", path.display()))?;
        let sized_by_user = CONNECTION_TABLES.contains(&name.as_str());
        let expected_entries = if sized_by_user { info.max_entries() } else { expected.max_entries() };
        let expected = (expected.key_size(), expected.value_size(), expected_entries);
        let found = (info.key_size(), info.value_size(), info.max_entries());
        if found != expected {
            bail!(
                "the map {} has keys of {} bytes, values of {} bytes and {} entries, but this version of bpfvs needs {}, {} and {}: another \
                 version made it; run that version, or remove its instance (and with it all connections) by `bpfvs stop --detach`",
                path.display(),
                found.0,
                found.1,
                found.2,
                expected.0,
                expected.1,
                expected.2
            );
        }
    }
    let config: Array<MapData, Config> = pins.typed("CONFIG")?;
    let config = config.get(&0, 0).with_context(|| format!("the map {} cannot be read", pins.map("CONFIG").display()))?;
    if config.layout != LAYOUT {
        bail!(
            "the maps below {} have layout {}, but this version of bpfvs knows layout {LAYOUT}: another version made them; run that version, \
             or remove its instance (and with it all connections) by `bpfvs stop --detach`",
            pins.directory().display(),
            config.layout
        );
    }
    Ok(Found::Instance(config))
}
