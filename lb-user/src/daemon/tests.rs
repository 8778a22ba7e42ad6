//! The daemon behind its socket, with a datapath in memory.

use std::{collections::HashMap, future, net::IpAddr, os::unix::fs::PermissionsExt, path::Path, thread, time::Duration};

use lb_common::config::Config;

use super::*;
use crate::{
    api::client::{Client, Error},
    director::{
        model::{Protocol, RefusalKind, ServiceConfig, ServiceId, TableMemory},
        state::State,
        testing::Memory,
    },
};

impl Instance for Memory {
    fn open(_opening: &Opening) -> anyhow::Result<Self> {
        Ok(Self::default())
    }

    async fn remove(_pins: &Path) -> anyhow::Result<()> {
        Ok(())
    }

    async fn start(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    async fn shut_down(&mut self) -> anyhow::Result<()> {
        self.journal.push("shut_down".to_owned());
        Ok(())
    }

    fn settled(&self) -> impl Future<Output = ()> + Send + use<> {
        future::ready(())
    }

    fn changed(&mut self) -> impl Future<Output = ()> + Send + use<> {
        future::pending()
    }

    fn sweep(&self) -> impl Future<Output = anyhow::Result<Swept>> + Send + use<> {
        future::ready(Ok(Swept { left: 3, worked: Duration::ZERO }))
    }

    fn attach(&mut self, interface: &str, _hook: Hook) -> anyhow::Result<()> {
        anyhow::bail!("cannot attach {interface}: this datapath is in memory; use another")
    }

    fn detach(&mut self, _interface: &str) -> anyhow::Result<()> {
        Ok(())
    }

    fn interfaces(&self) -> Vec<InterfaceView> {
        vec![]
    }

    fn mark_device(&self) -> String {
        "not needed".to_owned()
    }

    fn listing(&self) -> anyhow::Result<impl FnOnce(Visit<'_>) -> anyhow::Result<()> + Send + use<>> {
        Ok(|_: Visit<'_>| Ok(()))
    }

    fn local_usage(&self) -> impl Future<Output = anyhow::Result<HashMap<IpAddr, LocalUsage>>> + Send + use<> {
        future::ready(Ok(HashMap::new()))
    }

    fn max_connections(&self) -> u32 {
        1000
    }

    fn memory(&self) -> TableMemory {
        TableMemory::default()
    }

    fn reasons(&self) -> anyhow::Result<Vec<ReasonView>> {
        Ok(vec![])
    }

    fn flood(&self) -> anyhow::Result<FloodView> {
        Ok(FloodView::default())
    }

    fn tell(&self, _changes: Arc<Mutex<Changes>>) -> impl Future<Output = anyhow::Result<Told>> + Send + use<> {
        future::ready(Ok(Told::default()))
    }

    fn take_over(&mut self, _entry: &Entry, _place: Place) -> Result<(), LeftOut> {
        Ok(())
    }
}

/// Runs a daemon in a thread of its own while `talk` talks to it.
fn with_daemon(directory: &Path, named: bool, talk: impl FnOnce(Client)) {
    let socket = directory.join("socket");
    let state = StateFile { path: directory.join("state.json"), named };
    let director = Director::new(Memory::default(), Config::DEFAULT).expect("memory refuses nothing");
    let daemon = Daemon::new(director, Identity::current().expect("/proc is mounted"), state);
    let listener = serve::listen(&socket).expect("the directory is new");
    let lock = lock::Lock::take_name(socket.to_string_lossy().as_bytes()).expect("the name is new");
    let server = thread::spawn({
        let socket = socket.clone();
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("there are resources");
            runtime
                .block_on(serve::run(daemon, serve::Door { listener, path: socket, own: true, metrics: None }, lock, None))
                .expect("it runs");
        }
    });
    talk(Client::new(socket.clone()));
    server.join().expect("it ended well");
    assert!(!socket.exists());
}

fn add(scheduler: &str) -> Command {
    let service = ServiceId::Address { protocol: Protocol::Tcp, address: [10, 0, 0, 200].into(), port: 80 };
    let config = ServiceConfig { scheduler: scheduler.to_owned(), flags: 0, persistence: None, one_packet: false, engine: None };
    Command::AddService { service, config }
}

#[test]
fn a_conversation() {
    let directory = tempfile::tempdir().expect("there is a place for temporary files");
    with_daemon(directory.path(), true, |mut client| {
        let mode = std::fs::metadata(client.socket()).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
        let outcomes = client.commands(&[add("rr"), add("rr"), Command::Clear, add("nonsense")]).expect("it answers");
        let kinds: Vec<_> = outcomes
            .iter()
            .map(|outcome| match outcome {
                Outcome::Ok => None,
                Outcome::Refused(refusal) => Some(refusal.kind),
            })
            .collect();
        assert_eq!(kinds, [None, Some(RefusalKind::ServiceExists), None, Some(RefusalKind::SchedulerNotFound)]);
        client.commands(&[add("wrr")]).expect("it answers");
        assert_eq!(client.services().expect("it answers")[0].config.scheduler, "wrr");
        assert_eq!(client.timeouts().expect("it answers"), Timeouts::default());
        client.each_connection(&mut |view| panic!("nobody has connected, but {view:?}")).expect("it answers");
        let deadline = Instant::now() + Duration::from_secs(10);
        let status = loop {
            let status = client.status().expect("it answers");
            if status.connections > 0 {
                break status;
            }
            assert!(Instant::now() < deadline, "no sweep was made");
            thread::yield_now();
        };
        assert_eq!((status.services, status.servers, status.connections), (1, 0, 3));
        let error = client.attach("eth9", Hook::Xdp).expect_err("it cannot").to_string();
        assert_eq!(error, "cannot attach eth9: this datapath is in memory; use another");
        client.stop(false).expect("it ends");
    });
    assert!(State::read(&directory.path().join("state.json")).expect("it is whole").is_some());
}

#[test]
fn nothing_is_left_after_stop_with_detach() {
    let directory = tempfile::tempdir().expect("there is a place for temporary files");
    with_daemon(directory.path(), false, |mut client| {
        client.commands(&[add("rr")]).expect("it answers");
        client.stop(true).expect("it ends");
    });
    assert_eq!(std::fs::read_dir(directory.path()).expect("it is there").count(), 0);
}

#[test]
fn without_a_daemon_the_error_says_what_to_do() {
    let directory = tempfile::tempdir().expect("there is a place for temporary files");
    let socket = directory.path().join("socket");
    let error = Client::new(socket.clone()).status().expect_err("nobody is there");
    assert!(matches!(error, Error::NotRunning { .. }));
    assert!(error.to_string().contains(&socket.display().to_string()) && error.to_string().contains("bpfvs serve"), "{error}");
    // A socket file without a listener, as SIGKILL leaves it.
    drop(std::os::unix::net::UnixListener::bind(&socket).expect("the directory is new"));
    assert!(matches!(Client::new(socket.clone()).connect(), Err(Error::NotRunning { .. })));
    serve::listen(&socket).expect("it is replaced");
}
