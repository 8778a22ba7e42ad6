//! The daemon: one director, its datapath, and the life around them.
//!
//! [`serve`] is the way of a daemon from its options to its end; [`Daemon`] is what it has in between. The API and the
//! clock both call the daemon, one after the other, on one thread. Everything that forwards packets is in the kernel
//! and goes on without it: ending the daemon ends nothing but changes.

pub mod environment;
mod flood;
pub mod kernel;
pub mod lock;
pub mod namespace;
pub mod serve;
pub mod synchronisation;

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    future,
    net::{IpAddr, UdpSocket},
    path::{Path, PathBuf},
    process,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use lb_common::reason::Reason;
use tokio::sync::Notify;
use tracing::{error, info, warn};

use self::{
    flood::FloodWatch,
    namespace::Identity,
    synchronisation::{Counters, Synchronisation},
};
use crate::{
    datapath::{Datapath, Visit, take_over::Place, tell::Told},
    director::{
        Director,
        model::{
            Command, FloodView, Hook, InterfaceView, LocalAddressView, LocalAddresses, LocalUsage, MarkRule, Outcome, ReasonView,
            ServiceView, Status, SysctlView, TableMemory, Timeouts, Traffic,
        },
    },
    synchronisation::{
        LeftOut,
        changes::Changes,
        message::{Entry, Fault},
    },
};

/// A datapath that lives in a kernel: what the daemon needs of it beside the director.
///
/// It follows interfaces, routes and neighbours by itself, in tasks of its own.
pub trait Instance: Datapath + Send + Sized + 'static {
    /// Takes over the instance at these pins, or makes one. Nothing is attached yet.
    fn open(opening: &Opening) -> anyhow::Result<Self>;

    /// Removes an instance that no daemon serves.
    fn remove(pins: &Path) -> impl Future<Output = anyhow::Result<()>>;

    /// Attaches the interfaces that it was opened for, and follows the network from now on.
    fn start(&mut self) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Takes everything out of the kernel: links, filters, pins.
    fn shut_down(&mut self) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Resolves when the way to every real server that was made known so far has been looked for.
    fn settled(&self) -> impl Future<Output = ()> + Send + use<Self>;

    /// Resolves when connections have come, gone or changed their state since this was called; now and then without that.
    fn changed(&mut self) -> impl Future<Output = ()> + Send + use<Self>;

    /// Deletes the connections that are over.
    fn sweep(&self) -> impl Future<Output = anyhow::Result<Swept>> + Send + use<Self>;

    /// Attaches an interface; one that is attached already changes its hook.
    fn attach(&mut self, interface: &str, hook: Hook) -> anyhow::Result<()>;

    /// Detaches an interface.
    fn detach(&mut self, interface: &str) -> anyhow::Result<()>;

    /// The interfaces that are attached.
    fn interfaces(&self) -> Vec<InterfaceView>;

    /// How the mark device is, in words.
    fn mark_device(&self) -> String;

    /// What shows all connections and templates, one after the other, beside everything else.
    fn listing(&self) -> anyhow::Result<impl FnOnce(Visit<'_>) -> anyhow::Result<()> + Send + use<Self>>;

    /// Finds how much of each local address is in use, beside everything else; those that are not need not be named.
    fn local_usage(&self) -> impl Future<Output = anyhow::Result<HashMap<IpAddr, LocalUsage>>> + Send + use<Self>;

    /// How many connections each of the tables can hold.
    fn max_connections(&self) -> u32;

    /// When they take the memory for their entries.
    fn memory(&self) -> TableMemory;

    /// The reason counters.
    fn reasons(&self) -> anyhow::Result<Vec<ReasonView>>;

    /// How flood mode is.
    fn flood(&self) -> anyhow::Result<FloodView>;

    /// Finds what a master has to tell other directors, beside everything else.
    fn tell(&self, changes: Arc<Mutex<Changes>>) -> impl Future<Output = anyhow::Result<Told>> + Send + use<Self>;

    /// Takes over what another director tells of a connection, at its place here.
    fn take_over(&mut self, entry: &Entry, place: Place) -> Result<(), LeftOut>;
}

/// What a sweep found.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Swept {
    /// Connections that are left.
    pub left: u64,
    /// How long a CPU was busy with it.
    pub worked: Duration,
}

/// What a datapath is told when it is opened.
#[derive(Clone, Debug)]
pub struct Opening {
    /// Where its maps, programs and links are pinned, or will be.
    pub pins: PathBuf,
    /// The cookie of the network namespace: pins with another one are of a namespace that has gone.
    pub netns_cookie: u64,
    /// The interfaces to attach; none: every one that is up, now and later.
    pub interfaces: Vec<String>,
    /// Where packets are met.
    pub hook: Hook,
    /// How many connections each of the two tables can hold.
    pub max_connections: Option<u32>,
    /// When they take the memory for their entries.
    pub memory: Option<TableMemory>,
    /// How many picks of a service a CPU takes at once.
    pub picks_at_once: u32,
}

/// Where the state is written.
#[derive(Clone, Debug)]
pub struct StateFile {
    /// Its path.
    pub path: PathBuf,
    /// Whether the user named it. One that was not named belongs to the datapath and goes with it.
    pub named: bool,
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon<I> {
    director: Director<I>,
    identity: Identity,
    state: StateFile,
    unsaved: bool,
    /// What the last sweep found.
    swept: Swept,
    started: Instant,
    commanded: Arc<Notify>,
    forsaken: Arc<Notify>,
    stopping: Arc<Notify>,
    synchronisation: Synchronisation,
    /// Whether the state file does not know of it yet.
    sync_changed: bool,
    flood: FloodWatch,
}

impl<I: Instance> Daemon<I> {
    /// A daemon around a director.
    pub fn new(director: Director<I>, identity: Identity, state: StateFile) -> Self {
        Self {
            director,
            identity,
            state,
            unsaved: false,
            swept: Swept::default(),
            started: Instant::now(),
            commanded: Arc::default(),
            forsaken: Arc::default(),
            stopping: Arc::default(),
            synchronisation: Synchronisation::default(),
            sync_changed: false,
            flood: FloodWatch::default(),
        }
    }

    /// The synchronisation daemons.
    pub fn synchronisation(&self) -> &Synchronisation {
        &self.synchronisation
    }

    /// Finds what a master has to tell, beside everything else; nothing if there are no connections.
    pub fn tell(&self, changes: Arc<Mutex<Changes>>) -> Option<impl Future<Output = anyhow::Result<Told>> + Send + use<I>> {
        self.director.has_connections().then(|| self.director.datapath().tell(changes))
    }

    /// Takes over what a message tells.
    pub fn take_over(&mut self, entries: impl Iterator<Item = Result<Entry, Fault>>, counters: &mut Counters) {
        for entry in entries {
            let outcome = entry.map_err(LeftOut::from).and_then(|entry| {
                let place = self.director.place(&entry)?;
                self.director.datapath_mut().take_over(&entry, place)
            });
            counters.count(outcome);
        }
        // Schedules may depend on it.
        self.commanded.notify_one();
    }

    /// Told when commands were done.
    pub fn commanded(&self) -> Arc<Notify> {
        Arc::clone(&self.commanded)
    }

    /// Told when connections may have lost their real server, and are to go with it.
    pub fn forsaken(&self) -> Arc<Notify> {
        Arc::clone(&self.forsaken)
    }

    /// Told when the daemon has to end.
    pub fn stopping(&self) -> Arc<Notify> {
        Arc::clone(&self.stopping)
    }

    /// Does commands, and writes the state down; if `more` of them follow at once, only the next tick does.
    pub fn execute(&mut self, commands: &[Command], more: bool) -> Vec<Outcome> {
        let mut outcomes = Vec::with_capacity(commands.len());
        for together in commands.chunk_by(|one, other| one.is_sync() == other.is_sync()) {
            if together[0].is_sync() {
                self.sync_changed = true;
                outcomes.extend(together.iter().map(|command| self.synchronisation.execute(command)));
            } else {
                outcomes.extend(self.director.execute(together));
            }
        }
        report(commands, &outcomes);
        if !more {
            self.save();
        }
        self.commanded.notify_one();
        if self.director.sysctls().forsakes_connections() {
            self.forsaken.notify_one();
        }
        outcomes
    }

    /// All services.
    pub fn services(&self) -> anyhow::Result<Vec<ServiceView>> {
        Ok(self.director.services()?)
    }

    /// What shows all connections and templates, one after the other. It works beside the daemon.
    pub fn listing(&self) -> anyhow::Result<impl FnOnce(Visit<'_>) -> anyhow::Result<()> + Send + use<I>> {
        self.director.datapath().listing()
    }

    /// The mark rules.
    pub fn mark_rules(&self) -> Vec<MarkRule> {
        self.director.mark_rules().to_vec()
    }

    /// Finds how much of each local address is in use, beside everything else.
    pub fn local_usage(&self) -> impl Future<Output = anyhow::Result<HashMap<IpAddr, LocalUsage>>> + Send + use<I> {
        self.director.datapath().local_usage()
    }

    /// FULLNAT's local addresses, of which so much is in use.
    pub fn local_addresses(&self, usage: &HashMap<IpAddr, LocalUsage>) -> anyhow::Result<LocalAddresses> {
        let view = |(address, service)| LocalAddressView {
            address,
            service,
            here: is_here(address),
            usage: usage.get(&address).copied().unwrap_or_default(),
        };
        let reasons = self.director.datapath().reasons()?;
        let refused = reasons.iter().find(|reason| reason.name == Reason::LocalPorts.name()).map_or(0, |reason| reason.packets);
        Ok(LocalAddresses { addresses: self.director.local_addresses().map(view).collect(), refused })
    }

    /// The timeouts.
    pub fn timeouts(&self) -> Timeouts {
        self.director.timeouts()
    }

    /// IPVS's sysctls.
    pub fn sysctls(&self) -> Vec<SysctlView> {
        self.director.sysctls().list()
    }

    /// What all real servers together do.
    pub fn traffic(&self) -> anyhow::Result<Traffic> {
        Ok(self.director.traffic()?)
    }

    /// The reason counters.
    pub fn reasons(&self) -> anyhow::Result<Vec<ReasonView>> {
        self.director.datapath().reasons()
    }

    /// How the daemon is.
    pub fn status(&self) -> Status {
        let datapath = self.director.datapath();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: process::id(),
            instance: self.identity.name(),
            pins: self.identity.pins().display().to_string(),
            uptime: self.started.elapsed().as_secs(),
            interfaces: datapath.interfaces(),
            mark_device: datapath.mark_device(),
            services: self.director.service_count(),
            servers: self.director.server_count(),
            connections: self.swept.left,
            max_connections: datapath.max_connections(),
            memory: datapath.memory(),
            flood: datapath.flood().unwrap_or_default(),
            sweep_milliseconds: self.swept.worked.as_millis() as u64,
            clock_rate: self.director.clock_rate(),
            sync_daemons: self.synchronisation.views(),
        }
    }

    /// Attaches an interface.
    pub fn attach(&mut self, interface: &str, hook: Hook) -> anyhow::Result<()> {
        self.director.datapath_mut().attach(interface, hook)
    }

    /// Detaches an interface.
    pub fn detach(&mut self, interface: &str) -> anyhow::Result<()> {
        self.director.datapath_mut().detach(interface)
    }

    /// Asks the daemon to end, if wanted with everything that it has in the kernel.
    pub async fn stop(&mut self, detach: bool) -> anyhow::Result<()> {
        if detach {
            self.director.datapath_mut().shut_down().await?;
            if !self.state.named {
                remove_file(&self.state.path);
            }
            // What is not there any more must not be written down again.
            self.director.take_changed();
            self.sync_changed = false;
            self.unsaved = false;
        }
        self.stopping.notify_one();
        Ok(())
    }

    /// To be called each second.
    pub fn tick(&mut self) {
        self.director.tick(Instant::now());
        self.watch_flood();
        self.save();
    }

    fn watch_flood(&mut self) {
        let datapath = self.director.datapath();
        match datapath.flood() {
            Ok(view) => self.flood.look(&view, || stateless_packets(datapath)),
            Err(error) => warn!("flood mode is not watched: {error:#}"),
        }
    }

    /// Whether flood mode was on at the last tick.
    pub const fn is_flooded(&self) -> bool {
        self.flood.is_on()
    }

    /// Resolves when the way to every real server has been looked for.
    pub fn settled(&self) -> impl Future<Output = ()> + Send + use<I> {
        self.director.datapath().settled()
    }

    /// Deletes the connections that are over. It works beside the daemon, which hears of the outcome by
    /// [`Daemon::swept`].
    pub fn sweep(&self) -> impl Future<Output = anyhow::Result<Swept>> + Send + use<I> {
        self.director.datapath().sweep()
    }

    /// Whether there is anything that could be over.
    pub fn has_connections(&self) -> bool {
        self.director.has_connections()
    }

    /// Takes in what a sweep found.
    pub fn swept(&mut self, outcome: anyhow::Result<Swept>) {
        match outcome {
            Ok(swept) => self.swept = swept,
            Err(error) => error!("connections do not expire: {error:#}"),
        }
    }

    /// Keeps schedules true that connections can make untrue. Returns whether one was not.
    pub fn refresh(&mut self) -> bool {
        self.director.refresh()
    }

    /// Resolves when a schedule may have become untrue since this was called; never, if none can.
    pub fn untrue(&mut self) -> impl Future<Output = ()> + Send + use<I> {
        let changed = self.director.is_live().then(|| self.director.datapath_mut().changed());
        async move {
            match changed {
                Some(changed) => changed.await,
                None => future::pending().await,
            }
        }
    }

    /// Writes the state down if it has changed; if that fails, again at the next tick.
    pub fn save(&mut self) {
        let changed = self.director.take_changed() | std::mem::take(&mut self.sync_changed);
        if !changed && !self.unsaved {
            return;
        }
        let mut state = self.director.state();
        state.sync_daemons = self.synchronisation.daemons();
        let outcome = state.write(&self.state.path);
        if let Err(error) = &outcome
            && !self.unsaved
        {
            error!("{error}; trying again each second");
        }
        self.unsaved = outcome.is_err();
    }
}

/// Notes what was done, and what was not. Of many commands at once only how many they were, and what was refused: thousands
/// of lines say less, and take longer than the commands.
fn report(commands: &[Command], outcomes: &[Outcome]) {
    const MANY: usize = 100;
    let mut done = 0_usize;
    for (command, outcome) in commands.iter().zip(outcomes) {
        match outcome {
            Outcome::Ok if commands.len() < MANY => info!("done: {command:?}"),
            Outcome::Ok => done += 1,
            Outcome::Refused(refusal) => info!("refused: {refusal}"),
        }
    }
    if done > 0 {
        info!("done: {done} of {} commands", commands.len());
    }
}

/// Whether packets to an address come to this host's own sockets: the kernel lets one have it.
fn is_here(address: IpAddr) -> bool {
    UdpSocket::bind((address, 0)).is_ok()
}

/// Packets that were forwarded without a connection.
fn stateless_packets(datapath: &impl Instance) -> u64 {
    let reasons = datapath.reasons().unwrap_or_default();
    reasons.iter().find(|reason| reason.name == Reason::Stateless.name()).map_or(0, |reason| reason.packets)
}

/// Removes a file that may not be there.
fn remove_file(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        warn!("the file {} stays: {error}", path.display());
    }
}
