//! `bpfvs sysctl`: IPVS's knobs, typed as for sysctl(8).
//!
//! ```text
//! bpfvs sysctl                                   all, with what each does here
//! bpfvs sysctl net.ipv4.vs.sloppy_tcp            one
//! bpfvs sysctl -w net.ipv4.vs.sloppy_tcp=1       another value; `sloppy_tcp=1` will do
//! ```

use anyhow::{Context, bail};
use clap::Args;

use super::{
    Global,
    table::{number, table, text},
};
use crate::director::{
    model::{Command, Outcome, SysctlView},
    sysctl::PREFIX,
};

#[derive(Args, Debug)]
pub(super) struct Sysctl {
    /// Names to show, and NAME=VALUE to set; all are listed if there are none. `net.ipv4.vs.` may be left out
    #[arg(value_name = "NAME[=VALUE]")]
    words: Vec<String>,
    /// Every word is NAME=VALUE
    #[arg(short, long, requires = "words")]
    write: bool,
    /// Values alone, without names
    #[arg(short = 'n', long)]
    values: bool,
    /// Only those that can be set here
    #[arg(short = 'a', long, conflicts_with = "words")]
    all: bool,
}

impl Sysctl {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        let mut client = global.client()?;
        let mut changes = Vec::new();
        let mut names = Vec::new();
        for word in &self.words {
            // As with sysctl(8), slashes separate as dots do.
            let word = word.replace('/', ".");
            let (name, value) = word.split_once('=').map_or((word.as_str(), None), |(name, value)| (name, Some(value)));
            let name = name.trim();
            names.push(name.strip_prefix(PREFIX).unwrap_or(name).to_owned());
            match value.map(str::trim) {
                Some(value) => {
                    let value = value.parse().ok().with_context(|| {
                        format!("{name} cannot be set: \"{value}\" is no number from 0 on; write it as in {name}=1")
                    })?;
                    changes.push(Command::SetSysctl { name: name.to_owned(), value });
                }
                None if self.write => bail!("{name} cannot be set: there is no value; write it as in {name}=1"),
                None => {}
            }
        }
        if !changes.is_empty() {
            let refused = client.commands(&changes)?.into_iter().find_map(|outcome| match outcome {
                Outcome::Ok => None,
                Outcome::Refused(refusal) => Some(refusal),
            });
            if let Some(refusal) = refused {
                return Err(refusal.into());
            }
        }
        let sysctls = client.sysctls()?;
        if names.is_empty() && !self.all && !self.values {
            return global.answer(&sysctls, || describe(&sysctls));
        }
        let shown = if names.is_empty() {
            sysctls.into_iter().filter(|sysctl| sysctl.value.is_some()).collect()
        } else {
            names.iter().map(|name| find(&sysctls, name)).collect::<anyhow::Result<Vec<_>>>()?
        };
        global.answer(&shown, || shown.iter().map(|sysctl| line(sysctl, self.values)).collect())
    }
}

fn find(sysctls: &[SysctlView], name: &str) -> anyhow::Result<SysctlView> {
    let Some(found) = sysctls.iter().find(|sysctl| sysctl.name == name) else {
        bail!("{name} cannot be shown: IPVS has no sysctl of this name; `bpfvs sysctl` lists them")
    };
    if found.value.is_none() {
        bail!("{PREFIX}{name} has no value here ({}); `bpfvs sysctl` lists those that have", found.text)
    }
    Ok(found.clone())
}

/// `net.ipv4.vs.sloppy_tcp = 0`
fn line(sysctl: &SysctlView, value_alone: bool) -> String {
    let value = value(sysctl.value);
    if value_alone { format!("{value}\n") } else { format!("{PREFIX}{} = {value}\n", sysctl.name) }
}

fn value(value: Option<u32>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Those that can be set, and then the others.
fn describe(sysctls: &[SysctlView]) -> String {
    let row = |sysctl: &SysctlView| [sysctl.name.clone(), value(sysctl.value), value(sysctl.default), sysctl.text.clone()];
    let (here, others): (Vec<_>, Vec<_>) = sysctls.iter().partition(|sysctl| sysctl.value.is_some());
    table([text("NAME"), number("VALUE"), number("DEFAULT"), text("MEANING")], here.into_iter().chain(others).map(row))
}
