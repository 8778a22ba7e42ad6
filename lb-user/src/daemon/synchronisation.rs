//! The synchronisation daemons: a master that tells, a backup that listens, either or both.
//!
//! ```text
//! ipvsadm --start-daemon ─> Synchronisation::execute ─ Work ─> keep_telling     walks, packs, sends
//!                                                    └ Work ─> keep_listening   receives, unpacks, takes over
//! ```
//!
//! Both are tasks that live as long as the daemon and wait for [`Work`]. What cannot be done for now (an interface that is
//! not there yet or not up) is tried again each second, and stands in the status meanwhile.
//!
//! There is no worker in the kernel: when the daemon ends, nobody is told any more, and the next one goes on from the state file.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::net::if_::if_nametoindex;
use tokio::{
    net::UdpSocket,
    sync::{Mutex as AsyncMutex, watch},
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{Daemon, Instance};
use crate::{
    datapath::{system::interface_mtu, tell::Told},
    director::model::{Command, Outcome, Refusal, RefusalKind, SyncDaemon, SyncDaemonView, SyncRole},
    synchronisation::{
        LeftOut,
        changes::Changes,
        channel,
        message::{self, Writer},
    },
};

/// Pauses between two walks of a master: the shortest and the longest. Walking shall take a tenth of one CPU at most.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// A master sends so many messages, and rests so long, for the sake of the backup's socket: 160 000 connections in a second.
const BURST: usize = 4;
const REST: Duration = Duration::from_millis(1);

/// When a backup hears nothing for so long, it looks whether its interface is still the one that it listens at.
const SILENCE: Duration = Duration::from_secs(5);

/// After what failed, a pause.
const RETRY: Duration = Duration::from_secs(1);

/// The longest name of an interface.
const LONGEST_NAME: usize = 15;

/// The synchronisation daemons that were started.
#[derive(Debug)]
pub struct Synchronisation {
    master: watch::Sender<Option<Arc<Work>>>,
    backup: watch::Sender<Option<Arc<Work>>>,
}

/// What one daemon does, and how it goes.
#[derive(Debug)]
pub struct Work {
    daemon: SyncDaemon,
    progress: Mutex<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    /// Opened when it was started.
    socket: Option<UdpSocket>,
    obstacle: Option<String>,
    messages: u64,
    counters: Counters,
}

/// What became of entries.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    entries: u64,
    left_out: BTreeMap<LeftOut, u64>,
}

impl Counters {
    /// Counts an entry.
    pub fn count(&mut self, outcome: Result<(), LeftOut>) {
        match outcome {
            Ok(()) => self.entries += 1,
            Err(reason) => *self.left_out.entry(reason).or_default() += 1,
        }
    }
}

impl Default for Synchronisation {
    fn default() -> Self {
        Self { master: watch::Sender::new(None), backup: watch::Sender::new(None) }
    }
}

impl Synchronisation {
    /// Starts or stops a daemon.
    pub fn execute(&self, command: &Command) -> Outcome {
        let done = match command {
            Command::StartSync(daemon) => self.start(daemon),
            Command::StopSync(role) => self.stop(*role),
            _ => return Outcome::Ok,
        };
        done.map_or_else(Outcome::Refused, |()| Outcome::Ok)
    }

    /// Goes on with what an earlier daemon did. What it needs may come later.
    pub fn resume(&self, daemons: Vec<SyncDaemon>) {
        for daemon in daemons {
            self.channel(daemon.role).send_replace(Some(Arc::new(Work { daemon, progress: Mutex::default() })));
        }
    }

    /// Where the task with this role hears of its work.
    pub fn work(&self, role: SyncRole) -> watch::Receiver<Option<Arc<Work>>> {
        self.channel(role).subscribe()
    }

    /// The daemons that were started, the master first.
    pub fn daemons(&self) -> Vec<SyncDaemon> {
        self.running().map(|work| work.daemon.clone()).collect()
    }

    /// The same, as listed.
    pub fn views(&self) -> Vec<SyncDaemonView> {
        self.running().map(|work| work.view()).collect()
    }

    fn running(&self) -> impl Iterator<Item = Arc<Work>> {
        SyncRole::ALL.into_iter().filter_map(|role| self.channel(role).borrow().clone())
    }

    const fn channel(&self, role: SyncRole) -> &watch::Sender<Option<Arc<Work>>> {
        match role {
            SyncRole::Master => &self.master,
            SyncRole::Backup => &self.backup,
        }
    }

    fn start(&self, daemon: &SyncDaemon) -> Result<(), Refusal> {
        check(daemon)?;
        let failed = |error: &io::Error| cannot_start(daemon, error);
        let mtu = interface_mtu(&daemon.interface).map_err(|error| failed(&error))?;
        let role = daemon.role;
        if self.channel(role).borrow().is_some() {
            return refuse(
                RefusalKind::SyncExists,
                format!(
                    "the synchronisation daemon cannot be started: one is {role} already; stop it first (`--stop-daemon {role}`)"
                ),
            );
        }
        let socket = channel::open(daemon).map_err(|error| failed(&error))?;
        let daemon = SyncDaemon { max_length: channel::max_length(daemon, mtu), ..daemon.clone() };
        let progress = Progress { socket: Some(socket), ..Progress::default() };
        self.channel(role).send_replace(Some(Arc::new(Work { daemon, progress: Mutex::new(progress) })));
        Ok(())
    }

    fn stop(&self, role: SyncRole) -> Result<(), Refusal> {
        match self.channel(role).send_replace(None) {
            Some(_) => Ok(()),
            None => refuse(
                RefusalKind::NoSuchSync,
                format!("the synchronisation daemon cannot be stopped: none is {role}; see `ipvsadm -L --daemon`"),
            ),
        }
    }
}

fn refuse(kind: RefusalKind, message: String) -> Result<(), Refusal> {
    Err(Refusal { kind, message })
}

/// What ipvsadm checks itself.
fn check(daemon: &SyncDaemon) -> Result<(), Refusal> {
    let fault = if daemon.interface.is_empty() || daemon.interface.len() > LONGEST_NAME {
        format!("\"{}\" is no name of an interface; use one of 1 to {LONGEST_NAME} characters", daemon.interface)
    } else if !daemon.group.is_multicast() {
        format!("{} is no multicast address; use one, such as 224.0.0.81", daemon.group)
    } else if daemon.port == 0 || daemon.ttl == 0 {
        "port and TTL have to be 1 at least; the usual ones are 8848 and 1".to_owned()
    } else {
        return Ok(());
    };
    refuse(RefusalKind::Invalid, format!("the synchronisation daemon cannot be started: {fault}"))
}

fn cannot_start(daemon: &SyncDaemon, error: &io::Error) -> Refusal {
    let interface = &daemon.interface;
    if error.raw_os_error() == Some(libc::ENODEV) {
        let message = format!(
            "the synchronisation daemon cannot be started: there is no interface {interface}; see `ip link`, and name one \
             (`--mcast-interface`)"
        );
        return Refusal { kind: RefusalKind::NoSuchDevice, message };
    }
    let message = format!(
        "the synchronisation daemon cannot be started: the socket for {} port {} on {interface} cannot be had ({error}); choose another \
         group or port",
        daemon.group, daemon.port
    );
    Refusal { kind: RefusalKind::Failed, message }
}

impl Work {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        // Numbers cannot be left half-way.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn view(&self) -> SyncDaemonView {
        let progress = self.progress();
        let refused = progress.counters.left_out.iter().map(|(reason, count)| (reason.name().to_owned(), *count)).collect();
        SyncDaemonView {
            daemon: self.daemon.clone(),
            obstacle: progress.obstacle.clone(),
            messages: progress.messages,
            entries: progress.counters.entries,
            refused,
        }
    }

    /// The socket that was opened at the start, or another.
    async fn socket(&self) -> UdpSocket {
        if let Some(socket) = self.progress().socket.take() {
            return socket;
        }
        let mut tried = false;
        loop {
            match channel::open(&self.daemon) {
                Ok(socket) => {
                    // What came of an earlier one, the next message shows.
                    if tried {
                        self.goes_on();
                    }
                    return socket;
                }
                Err(error) => self.stumbles(&error),
            }
            tried = true;
            sleep(RETRY).await;
        }
    }

    fn stumbles(&self, error: &dyn std::fmt::Display) {
        let obstacle = format!("{}: {error}; see `ip link show {}`", self.daemon.interface, self.daemon.interface);
        let mut progress = self.progress();
        if progress.obstacle.as_ref() != Some(&obstacle) {
            warn!("the {} synchronisation daemon is held up: {obstacle}", self.daemon.role);
            progress.obstacle = Some(obstacle);
        }
    }

    fn goes_on(&self) {
        if self.progress().obstacle.take().is_some() {
            info!("the {} synchronisation daemon goes on", self.daemon.role);
        }
    }
}

/// Waits for work, does it until there is other work, and so on.
async fn keep_working<W: Future<Output = ()>>(mut work: watch::Receiver<Option<Arc<Work>>>, task: impl Fn(Arc<Work>) -> W) {
    loop {
        let current = work.borrow_and_update().clone();
        let changed = match current {
            None => work.changed().await,
            Some(current) => tokio::select! {
                changed = work.changed() => changed,
                () = task(current) => return,
            },
        };
        if changed.is_err() {
            // The daemon is gone.
            return;
        }
    }
}

/// Tells other directors what connections there are, while there is a master.
pub(super) async fn keep_telling<I: Instance>(daemon: Arc<AsyncMutex<Daemon<I>>>, work: watch::Receiver<Option<Arc<Work>>>) {
    keep_working(work, |work| {
        let daemon = Arc::clone(&daemon);
        async move {
            loop {
                let socket = work.socket().await;
                let error = tell(&daemon, &work, &socket).await;
                work.stumbles(&error);
                sleep(RETRY).await;
            }
        }
    })
    .await;
}

/// Tells until that fails.
async fn tell<I: Instance>(daemon: &AsyncMutex<Daemon<I>>, work: &Work, socket: &UdpSocket) -> anyhow::Error {
    let changes = Arc::new(Mutex::new(Changes::default()));
    loop {
        let walk = daemon.lock().await.tell(Arc::clone(&changes));
        let mut took = Duration::ZERO;
        if let Some(walk) = walk {
            let told = match walk.await {
                Ok(told) => told,
                Err(error) => return error,
            };
            took = told.took;
            if let Err(error) = send(work, socket, told).await {
                work.progress().counters.count(Err(LeftOut::NotSent));
                return error.into();
            }
        }
        sleep((took * 9).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)).await;
    }
}

async fn send(work: &Work, socket: &UdpSocket, told: Told) -> io::Result<()> {
    let mut writer = Writer::new(work.daemon.sync_id, work.daemon.max_length);
    let mut sent = 0;
    let mut entries = told.entries.iter();
    loop {
        let entry = entries.next();
        let message = match entry {
            Some(entry) => writer.add(entry),
            None => writer.finish(),
        };
        if let Some(message) = message {
            socket.send(&message).await?;
            work.goes_on();
            work.progress().messages += 1;
            sent += 1;
            if sent % BURST == 0 {
                sleep(REST).await;
            }
        }
        if entry.is_none() {
            break;
        }
    }
    let mut progress = work.progress();
    progress.counters.entries += told.entries.len() as u64;
    told.left_out.into_iter().for_each(|reason| progress.counters.count(Err(reason)));
    Ok(())
}

/// Takes over what masters tell, while there is a backup.
pub(super) async fn keep_listening<I: Instance>(daemon: Arc<AsyncMutex<Daemon<I>>>, work: watch::Receiver<Option<Arc<Work>>>) {
    keep_working(work, |work| {
        let daemon = Arc::clone(&daemon);
        async move {
            loop {
                let socket = work.socket().await;
                work.goes_on();
                let error = listen(&daemon, &work, &socket).await;
                work.stumbles(&error);
                sleep(RETRY).await;
            }
        }
    })
    .await;
}

/// Listens until that fails.
async fn listen<I: Instance>(daemon: &AsyncMutex<Daemon<I>>, work: &Work, socket: &UdpSocket) -> io::Error {
    let index = if_nametoindex(work.daemon.interface.as_str());
    let mut buffer = vec![0; work.daemon.max_length.into()];
    loop {
        match timeout(SILENCE, socket.recv(&mut buffer)).await {
            Ok(Ok(length)) => hear(&mut *daemon.lock().await, work, &buffer[..length]),
            Ok(Err(error)) => return error,
            // One of the same name is another, and its packets are not heard.
            Err(_) if if_nametoindex(work.daemon.interface.as_str()) != index => return io::Error::from_raw_os_error(libc::ENODEV),
            Err(_) => {}
        }
    }
}

/// Takes over what one message tells.
fn hear<I: Instance>(daemon: &mut Daemon<I>, work: &Work, datagram: &[u8]) {
    let mut progress = work.progress();
    progress.messages += 1;
    let message = match message::read(datagram) {
        Ok(message) => message,
        Err(fault) => {
            debug!("a message of {} bytes was refused: {fault}", datagram.len());
            return progress.counters.count(Err(fault.into()));
        }
    };
    if work.daemon.sync_id != 0 && message.sync_id != work.daemon.sync_id {
        return progress.counters.count(Err(LeftOut::OtherSyncId));
    }
    daemon.take_over(message, &mut progress.counters);
}
