//! Kernel settings below `/proc/sys`, of the network namespace that this thread is in.

use std::{fs, path::Path};

use anyhow::{Context, Result};

/// A setting of an interface: `net/ipv4/conf/<interface>/<name>`. With slashes, because an interface's name may have dots.
pub(super) fn ipv4(interface: &str, name: &str) -> String {
    format!("net/ipv4/conf/{interface}/{name}")
}

/// The key as `sysctl` prints it.
pub(super) fn dotted(key: &str) -> String {
    if key.contains('.') { key.to_owned() } else { key.replace('/', ".") }
}

/// Reads a setting.
pub(super) fn read(key: &str) -> Result<String> {
    fs::read_to_string(Path::new("/proc/sys").join(key))
        .map(|value| value.trim().to_owned())
        .with_context(|| format!("cannot read the setting {}: the kernel does not have it or /proc is not mounted", dotted(key)))
}

/// Writes a setting.
pub(super) fn write(key: &str, value: &str) -> Result<()> {
    fs::write(Path::new("/proc/sys").join(key), value).with_context(|| {
        format!(
            "cannot set {} to {value}: the kernel refused; run as root, and outside containers that have /proc/sys read-only",
            dotted(key)
        )
    })
}

/// What counts for an interface: the kernel takes the larger one of the interface's value and that of `all`.
pub(super) fn effective(interface: &str, name: &str) -> Result<i64> {
    let number = |key: String| -> Result<i64> {
        let value = read(&key)?;
        value
            .parse()
            .with_context(|| format!("cannot understand the setting {}: {value:?} is no number; set it anew", dotted(&key)))
    };
    Ok(number(ipv4("all", name))?.max(number(ipv4(interface, name))?))
}
