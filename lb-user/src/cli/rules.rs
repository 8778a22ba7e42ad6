//! `bpfvs save` and `bpfvs restore`: the whole table in a file, and the table of a file instead of what is there.
//!
//! Unlike `ipvsadm-restore`, a restore is all or nothing. Before anything is asked of the daemon the file is read to its end,
//! and a director on paper tries it; every fault is told with its line. Only what differs is changed, so that connections, and
//! counters of what stays, go on. If the daemon then refuses something all the same (there is no room left), what was done is
//! undone.

use std::{
    fs,
    io::{self, Read as _},
    path::PathBuf,
};

use anyhow::{Context, bail};
use lb_common::config::Config;

use super::Global;
use crate::{
    api::client::Client,
    director::{
        Director,
        difference::difference,
        model::{Command, Method, Outcome, ServiceView, Timeouts},
        paper::Paper,
    },
    ipvsadm::rules::{self, Rule},
};

/// How many faults are told of.
const SHOWN: usize = 20;

/// Options of `bpfvs restore`.
#[derive(clap::Args, Debug)]
pub(super) struct Restore {
    /// Only say what is wrong with the file: nothing is changed, and no daemon is needed
    #[arg(long)]
    check: bool,
    /// The file; without, or as -, standard input
    file: Option<PathBuf>,
}

/// Prints the table as a rule file.
pub(super) fn save(global: &Global) -> anyhow::Result<()> {
    let services = global.client()?.services()?;
    global.answer(&services, || rules::write(&services))
}

impl Restore {
    pub(super) fn run(self, global: &Global) -> anyhow::Result<()> {
        let file = self.file.filter(|file| *file != PathBuf::from("-"));
        let name = file.as_ref().map_or_else(|| "standard input".to_owned(), |file| file.display().to_string());
        let text = match &file {
            Some(file) => fs::read_to_string(file),
            None => io::read_to_string(io::stdin().lock().by_ref()),
        };
        let text = text.with_context(|| format!("cannot read the rules in {name}; see that it is a text that you may read"))?;
        let rules = rules::read(&text).or_else(|faults| refuse(&name, faults.into_iter().map(|fault| (fault.line, fault.text))))?;
        let is_fullnat = |rule: &Rule| {
            matches!(rule.command, Command::AddServer { config, .. } | Command::EditServer { config, .. }
                if matches!(config.method, Method::FullNat { .. }))
        };
        // Only FULLNAT depends on what the daemon has: its local addresses.
        let mut client = if self.check && !rules.iter().any(is_fullnat) { None } else { Some(global.client()?) };
        let locals = match &mut client {
            Some(client) => client.local_addresses()?.addresses,
            None => Vec::new(),
        };
        let mut director = Director::new(Paper::default(), Config::DEFAULT)?;
        let shared = locals.iter().filter(|local| local.service.is_none());
        let shared: Vec<_> = shared.map(|local| Command::AddLocalAddress { address: local.address, service: None }).collect();
        director.execute(&shared);
        // A service's own local addresses come with it.
        let own = |command: &Command| {
            let Command::AddService { service, .. } = command else { return Vec::new() };
            let own = locals.iter().filter(|local| local.service == Some(*service));
            own.map(|local| Command::AddLocalAddress { address: local.address, service: Some(*service) }).collect()
        };
        let steps: Vec<(usize, Command)> = rules
            .into_iter()
            .flat_map(|Rule { line, command }| {
                let own = own(&command);
                std::iter::once(command).chain(own).map(move |command| (line, command))
            })
            .collect();
        let (lines, commands): (Vec<_>, Vec<_>) = steps.into_iter().unzip();
        let outcomes = director.execute(&commands);
        let refusals: Vec<_> =
            lines.into_iter().zip(outcomes).filter_map(|(line, outcome)| Some((line, refusal(outcome)?))).collect();
        if !refusals.is_empty() {
            refuse(&name, refusals.into_iter())?;
        }
        if self.check {
            return Ok(());
        }
        let timeouts = commands.iter().any(|command| matches!(command, Command::SetTimeouts(_))).then(|| director.timeouts());
        match client {
            Some(mut client) => replace(&mut client, &director.services()?, timeouts),
            None => Ok(()),
        }
    }
}

/// Makes the daemon's table this one, or leaves it as it is.
fn replace(client: &mut Client, wanted: &[ServiceView], timeouts: Option<Timeouts>) -> anyhow::Result<()> {
    let (before, timeouts_before) = (client.services()?, client.timeouts()?);
    let mut commands = difference(&before, wanted);
    commands.extend(timeouts.map(Command::SetTimeouts));
    let Some(refusal) = client.commands(&commands)?.into_iter().find_map(refusal) else { return Ok(()) };
    let mut back = difference(&client.services()?, &before);
    back.push(Command::SetTimeouts(timeouts_before));
    match client.commands(&back)?.into_iter().find_map(self::refusal) {
        None => bail!("{refusal}. The rules were not restored: the table is what it was"),
        Some(remains) => bail!("{refusal}. The rules were restored in part, and what was done cannot be undone: {remains}"),
    }
}

fn refusal(outcome: Outcome) -> Option<String> {
    match outcome {
        Outcome::Ok => None,
        Outcome::Refused(refusal) => Some(refusal.message),
    }
}

/// Tells the faults of a file, by their lines.
fn refuse<T>(name: &str, faults: impl ExactSizeIterator<Item = (usize, String)>) -> anyhow::Result<T> {
    let count = faults.len();
    let mut told: Vec<_> = faults.take(SHOWN).map(|(line, text)| format!("{name}:{line}: {text}")).collect();
    if count > SHOWN {
        told.push(format!("{} more", count - SHOWN));
    }
    told.push(format!(
        "the rules in {name} cannot be restored: {count} of its lines are refused; nothing was changed. Mend them first"
    ));
    bail!("{}", told.join("\nbpfvs: "))
}
