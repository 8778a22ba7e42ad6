//! The way of a daemon, from its options to its end.
//!
//! ```text
//! rights, kernel -> namespace -> lock -> state file -> socket -> datapath -> director -> rules -> "ready" -> requests and ticks
//! ```
//!
//! Everything that can be wrong is looked at before anything is changed, so that a daemon that cannot start leaves no
//! trace. SIGTERM and SIGINT end the daemon and leave the datapath at work; so does SIGKILL, but for the socket's file,
//! which the next daemon replaces.

use std::{
    fs,
    io::{self, Write},
    net::{SocketAddr, TcpListener},
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use lb_common::{
    config::Config,
    flood::{batch, default_limit},
};
use listenfd::ListenFd;
use sd_notify::NotifyState;
use tempfile::NamedTempFile;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Mutex, Notify},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tracing::{info, warn};

use super::{
    Daemon, Instance, Opening, StateFile, environment,
    lock::Lock,
    namespace::{self, Identity},
    remove_file,
    synchronisation::{keep_listening, keep_telling},
};
use crate::{
    api::server::{metrics_alone, router},
    director::{
        Director,
        model::{Command, Hook, Outcome, ServiceView, SyncRole, TableMemory},
        state::State,
    },
};

/// Pauses between two looks at the live counters while they change: the shortest and the longest.
const SHORTEST_LOOK: Duration = Duration::from_millis(1);
const LONGEST_LOOK: Duration = Duration::from_millis(50);

/// Pauses between two sweeps: the shortest, the longest, and that of a director without connections.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
const IDLE_PAUSE: Duration = Duration::from_secs(5);
/// A director without connections sweeps after so long all the same: its counters may have drifted.
const LONGEST_REST: Duration = Duration::from_secs(60);

/// How long requests may take to end when the daemon ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// What a daemon is told at its start.
#[derive(Clone, Debug)]
pub struct Options {
    /// The interfaces to attach; none: every one that is up, now and later.
    pub interfaces: Vec<String>,
    /// Where packets are met.
    pub hook: Hook,
    /// The network namespace to serve, if it is another than this process's: a name or a path.
    pub netns: Option<String>,
    /// Where to listen, if not at the namespace's own place.
    pub socket: Option<PathBuf>,
    /// Where to keep the state, if not at the namespace's own place.
    pub state: Option<PathBuf>,
    /// How many connections each of the two tables can hold; nothing: what suits the machine's memory.
    pub max_connections: Option<u32>,
    /// When they take the memory for their entries; nothing: at the start.
    pub memory: Option<TableMemory>,
    /// How many picks of a service a CPU takes at once.
    pub picks_at_once: u32,
    /// With how many half-open connections flood mode begins; nothing for an eighth of the table.
    pub max_half_open: Option<u32>,
    /// Seconds that it lasts after the last packet that found no room.
    pub flood_hold: u32,
    /// What to begin with, if there is nothing to take over.
    pub rules: Option<Rules>,
    /// Where to offer the metrics besides.
    pub metrics: Option<SocketAddr>,
}

/// Rules from a file.
#[derive(Clone, Debug)]
pub struct Rules {
    /// The file.
    pub file: PathBuf,
    /// What stands there.
    pub commands: Vec<Command>,
    /// If it is to be written anew at the end: how.
    pub save: Option<fn(&[ServiceView]) -> String>,
}

/// Runs a daemon until it is told to end. It takes over the datapath that it finds, or loads one.
///
/// No other thread may have been made before: this one may have to enter another network namespace.
pub fn serve<I: Instance>(options: Options) -> anyhow::Result<()> {
    environment::check(options.netns.is_some())?;
    if let Some(netns) = &options.netns {
        namespace::enter(netns)?;
    }
    let identity = Identity::current()?;
    let netns_cookie = namespace::cookie()?;
    let lock = Lock::take().context("cannot run the daemon")?;
    let state_file = match options.state {
        Some(path) => StateFile { path, named: true },
        None => StateFile { path: identity.state_file(), named: false },
    };
    let state = read_state(&state_file, netns_cookie)?;
    make_run_directory()?;
    let socket = options.socket.unwrap_or_else(|| identity.socket());
    let metrics = options.metrics.map(listen_for_metrics).transpose()?;
    let door = match activated()? {
        Some(listener) => Door { listener, path: socket, own: false, metrics },
        None => Door { listener: listen(&socket)?, path: socket, own: true, metrics },
    };
    let opening = Opening {
        pins: identity.pins(),
        netns_cookie,
        interfaces: options.interfaces,
        hook: options.hook,
        max_connections: options.max_connections,
        memory: options.memory,
        picks_at_once: options.picks_at_once,
    };
    let limits = Limits { half_open: options.max_half_open, hold: options.flood_hold };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot run the daemon: there is no event loop to be had; see the limits of open files")?;
    let (socket, own) = (door.path.clone(), door.own);
    let outcome = runtime.block_on(async {
        let found = opening.pins.exists();
        let sync_daemons = state.as_ref().map_or_else(Vec::new, |state| state.sync_daemons.clone());
        let director = match start::<I>(&opening, limits, state, &state_file, options.rules.as_ref()).await {
            Ok(director) => director,
            // What could not begin leaves no trace; what was at work before stays at work.
            Err(error) if !found => {
                return Err(match I::remove(&opening.pins).await {
                    Ok(()) => error,
                    Err(remains) => error.context(format!("{remains:#}")),
                });
            }
            Err(error) => return Err(error),
        };
        info!("instance {} listens at {}", identity.name(), socket.display());
        let daemon = Daemon::new(director, identity, state_file);
        daemon.synchronisation().resume(sync_daemons);
        run(daemon, door, lock, options.rules).await
    });
    // A sweep or a listing may be under way on a thread of its own, and may take long; it may as well break off.
    runtime.shutdown_background();
    if outcome.is_err() && own {
        remove_file(&socket);
    }
    outcome
}

/// The limits of flood mode.
#[derive(Clone, Copy, Debug)]
struct Limits {
    half_open: Option<u32>,
    hold: u32,
}

/// Opens the datapath, and lets the director take it over.
async fn start<I: Instance>(
    opening: &Opening,
    limits: Limits,
    state: Option<State>,
    state_file: &StateFile,
    rules: Option<&Rules>,
) -> anyhow::Result<Director<I>> {
    let rules = rules.filter(|_| state.is_none());
    let datapath = I::open(opening)?;
    // Not by what was asked for: a table that was found keeps its size.
    let half_open_limit = limits.half_open.unwrap_or_else(|| default_limit(datapath.max_connections()));
    let config = Config {
        netns_cookie: opening.netns_cookie,
        half_open_limit,
        half_open_batch: batch(half_open_limit),
        midst_limit: half_open_limit.saturating_mul(2),
        flood_hold: limits.hold,
        ..Config::DEFAULT
    };
    let mut director = match state {
        Some(state) => Director::adopt(datapath, config, state, &state_file.path)?,
        None => Director::new(datapath, config)?,
    };
    director.datapath_mut().start().await?;
    if let Some(Rules { file, commands, .. }) = rules {
        info!("{} rules come from {}", commands.len(), file.display());
        for outcome in director.execute(commands) {
            if let Outcome::Refused(refusal) = outcome {
                warn!("a rule in {} is refused: {refusal}", file.display());
            }
        }
    }
    director.datapath().settled().await;
    Ok(director)
}

/// Reads the state, unless it is another namespace's that had the same name.
fn read_state(file: &StateFile, netns_cookie: u64) -> anyhow::Result<Option<State>> {
    let state = State::read(&file.path)?;
    let stale = state.as_ref().is_some_and(|state| !file.named && state.netns_cookie != netns_cookie);
    if stale {
        warn!("the state in {} is of a network namespace that has gone; starting without services", file.path.display());
        return Ok(None);
    }
    Ok(state)
}

fn make_run_directory() -> anyhow::Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(namespace::RUN_DIRECTORY);
    made.with_context(|| format!("cannot make the directory {}; see that /run can be written", namespace::RUN_DIRECTORY))
}

/// Listens at a socket that only its owner and group may open. A socket that nobody listens at any more is replaced.
pub(super) fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            bail!("cannot listen at {}: something that is no socket stands there; name another place (`--socket`)", path.display())
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            bail!("cannot listen at {}: another program listens there; name another place (`--socket`)", path.display())
        }
        Ok(_) => remove_file(path),
        Err(_) => (),
    }
    let listen = || {
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
        listener.set_nonblocking(true)?;
        io::Result::Ok(listener)
    };
    listen().with_context(|| format!("cannot listen at {}; see that its directory exists and can be written", path.display()))
}

/// Listens where the metrics are to be offered.
fn listen_for_metrics(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listen = || {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        io::Result::Ok(listener)
    };
    listen().with_context(|| {
        format!("cannot offer the metrics at {address}; name a free port of an address of this host (`--metrics`)")
    })
}

/// The socket that a service manager has opened for the daemon, if there is one: whoever knocked there first has started it.
fn activated() -> anyhow::Result<Option<UnixListener>> {
    let taken = ListenFd::from_env().take_unix_listener(0).and_then(|listener| {
        listener.as_ref().map_or(Ok(()), |listener| listener.set_nonblocking(true))?;
        Ok(listener)
    });
    taken.context("cannot listen at what the service manager hands over (LISTEN_FDS); it has to be one Unix stream socket")
}

/// Where the daemon listens.
pub(super) struct Door {
    pub(super) listener: UnixListener,
    pub(super) path: PathBuf,
    /// Whether the daemon has made it, and takes it away.
    pub(super) own: bool,
    /// Where others read the metrics.
    pub(super) metrics: Option<TcpListener>,
}

/// Serves requests and ticks until the daemon is told to end.
pub(super) async fn run<I: Instance>(
    mut daemon: Daemon<I>,
    Door { listener, path, own, metrics }: Door,
    lock: Lock,
    rules: Option<Rules>,
) -> anyhow::Result<()> {
    daemon.save();
    let listener = tokio::net::UnixListener::from_std(listener).context("cannot serve the socket; see the limits of open files")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM; see the limits of open files")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT; see the limits of open files")?;
    let (commanded, forsaken, stopping) = (daemon.commanded(), daemon.forsaken(), daemon.stopping());
    let [master, backup] = SyncRole::ALL.map(|role| daemon.synchronisation().work(role));
    let daemon = Arc::new(Mutex::new(daemon));
    let closing = Arc::new(Notify::new());
    let closed = Arc::clone(&closing);
    let server = axum::serve(listener, router(Arc::clone(&daemon))).with_graceful_shutdown(async move { closed.notified().await });
    let server = tokio::spawn(server.into_future());
    if let Some(listener) = metrics {
        let listener =
            tokio::net::TcpListener::from_std(listener).context("cannot offer the metrics; see the limits of open files")?;
        tokio::spawn(axum::serve(listener, metrics_alone(Arc::clone(&daemon))).into_future());
    }

    let mut seconds = interval(Duration::from_secs(1));
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let tasks = [
        tokio::spawn(keep_sweeping(Arc::clone(&daemon), forsaken)),
        tokio::spawn(keep_true(Arc::clone(&daemon), commanded)),
        tokio::spawn(keep_telling(Arc::clone(&daemon), master)),
        tokio::spawn(keep_listening(Arc::clone(&daemon), backup)),
    ];
    // Nobody may be there to read it; that is no reason to end.
    drop(writeln!(io::stdout(), "ready").and_then(|()| io::stdout().flush()));
    notify(NotifyState::Ready);
    loop {
        tokio::select! {
            _ = seconds.tick() => daemon.lock().await.tick(),
            () = stopping.notified() => break info!("told to stop"),
            _ = terminate.recv() => break info!("told to stop by SIGTERM"),
            _ = interrupt.recv() => break info!("told to stop by SIGINT"),
        }
    }
    notify(NotifyState::Stopping);
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    daemon.lock().await.save();
    if let Some(Rules { file, save: Some(write), .. }) = rules {
        let written = daemon.lock().await.services().and_then(|services| replace(&file, &write(&services)));
        if let Err(error) = written {
            warn!("the rules are not saved: {error:#}");
        }
    }
    // In this order: whoever sees the connection closed may start the next daemon.
    if own {
        remove_file(&path);
    }
    drop(lock);
    closing.notify_one();
    drop(timeout(FAREWELL, server).await);
    Ok(())
}

/// Replaces a file as a whole; its mode stays as it is.
fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let replace = || {
        let mut file = NamedTempFile::new_in(path.parent().unwrap_or(Path::new("/")))?;
        file.write_all(text.as_bytes())?;
        let mode = fs::metadata(path).map_or_else(|_| fs::Permissions::from_mode(0o644), |found| found.permissions());
        file.as_file().set_permissions(mode)?;
        file.as_file().sync_all()?;
        file.persist(path).map(|_| ()).map_err(|failed| failed.error)
    };
    replace().with_context(|| format!("cannot write {}; see that its directory can be written", path.display()))
}

/// Keeps schedules true for ever. While they become untrue it looks again and again; when they are at rest it sleeps until
/// the packet path wakes it, or somebody commands.
async fn keep_true<I: Instance>(daemon: Arc<Mutex<Daemon<I>>>, commanded: Arc<Notify>) {
    loop {
        let begin = Instant::now();
        let busy = daemon.lock().await.refresh();
        // Even if there was nothing: what wakes it may be traffic of services that are always true.
        sleep(look_pause(begin.elapsed())).await;
        if busy {
            continue;
        }
        let untrue = daemon.lock().await.untrue();
        // What happened before it began to listen.
        if daemon.lock().await.refresh() {
            continue;
        }
        tokio::select! {
            () = untrue => (),
            () = commanded.notified() => (),
        }
    }
}

/// How long to wait for the next look, so that looking takes a fifth of one CPU at most.
fn look_pause(took: Duration) -> Duration {
    (took * 4).clamp(SHORTEST_LOOK, LONGEST_LOOK)
}

/// Sweeps for ever, beside everything else: a sweep of many connections takes longer than anybody should wait. If connections are
/// to go with their real server, it sweeps at once.
async fn keep_sweeping<I: Instance>(daemon: Arc<Mutex<Daemon<I>>>, forsaken: Arc<Notify>) {
    loop {
        let begin = Instant::now();
        let outcome = daemon.lock().await.sweep();
        let outcome = outcome.await;
        let is_empty = outcome.as_ref().is_ok_and(|swept| swept.left == 0);
        let worked = outcome.as_ref().map_or(Duration::ZERO, |swept| swept.worked);
        let flooded = {
            let mut daemon = daemon.lock().await;
            daemon.swept(outcome);
            daemon.is_flooded()
        };
        let rest = async {
            sleep(if flooded { flood_pause(worked) } else { pause(worked, is_empty) }).await;
            while is_empty && begin.elapsed() < LONGEST_REST && !daemon.lock().await.has_connections() {
                sleep(IDLE_PAUSE).await;
            }
        };
        tokio::select! {
            () = rest => (),
            () = forsaken.notified() => (),
        }
    }
}

/// How long to wait for the next sweep, so that sweeping takes a hundredth of one CPU, as a rule: a second or some.
///
/// Nothing depends on it but the counters of connections that are over: the packet path looks at a connection's age itself.
fn pause(worked: Duration, is_empty: bool) -> Duration {
    if is_empty { IDLE_PAUSE } else { (worked * 100).clamp(SHORTEST_PAUSE, LONGEST_PAUSE) }
}

/// The same in flood mode: the sooner the half-open connections go, the more of those that mean it are tracked. At most a fifth of
/// one CPU.
fn flood_pause(worked: Duration) -> Duration {
    (worked * 4).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
}

/// Tells the service manager, if there is one.
fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        warn!("the service manager was not told: {error}");
    }
}
