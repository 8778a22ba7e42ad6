//! Schedules that follow connections: the daemon, the loaded programs and the counters between them.
//!
//! Which of IPVS's choices are right is known from recordings (`lb-user/src/scheduler/vectors.rs`). Here the question is
//! whether they are still right when connections come and go under a living daemon, or without one.
//!
//! `BPFVS_SCHEDULING_SEED` chooses the script of opens and closes.

use std::{
    collections::BTreeMap,
    env, fs,
    net::Ipv4Addr,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bpfvs_tests::{
    arrivals::{self, Arrivals, Connection},
    bench::Bench,
    book::{Entry, choice},
    needs, needs_bpfvs,
};
use fastrand::Rng;

const SERVICE: &str = "-t 10.99.0.1:80";

/// Between two events: so long apart, every choice must be IPVS's.
const APART: Duration = Duration::from_millis(20);

/// The tests take turns: one of them keeps a core busy, which another one's daemon would have to wait for.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A real server as the test keeps it in its own books.
#[derive(Clone, Debug)]
struct Server {
    address: Ipv4Addr,
    index: u32,
    entry: Entry,
}

/// A service with real servers of these weights and upper thresholds, the newest first. Servers that were there before come
/// back with their connections, so the tests do not use their numbers twice.
fn service(bench: &Bench, scheduler: &str, first: u16, servers: &[(u32, u32)]) -> Result<Vec<Server>> {
    let addresses = arrivals::servers(bench, first..first + servers.len() as u16)?;
    bench.bpfvs.ipvsadm(&format!("-A {SERVICE} -s {scheduler}"))?;
    let mut newest_first = Vec::new();
    for (&address, &(weight, upper_threshold)) in addresses.iter().zip(servers) {
        bench.bpfvs.ipvsadm(&format!("-a {SERVICE} -r {address} -g -w {weight} -x {upper_threshold}"))?;
        let index = bench.server_index(&address.to_string())?;
        newest_first.insert(0, Server { address, index, entry: Entry { weight, upper_threshold, ..Entry::default() } });
    }
    bench.bpfvs.wait_for_servers()?;
    Ok(newest_first)
}

#[test]
fn connections_that_are_apart_are_balanced_as_by_ipvs() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let _turn = turn();
    let seed = env::var("BPFVS_SCHEDULING_SEED").map_or(Ok(fastrand::u64(..)), |text| text.parse())?;
    println!("BPFVS_SCHEDULING_SEED={seed}");
    let bench = Bench::new(&[])?;
    for (scheduler, first) in ["lc", "wlc", "sed", "nq", "fo", "ovf"].into_iter().zip((0..).step_by(10)) {
        let mut random = Rng::with_seed(seed);
        let weights: Vec<_> = (0..5).map(|_| (random.u32(0..6), if random.bool() { random.u32(3..10) } else { 0 })).collect();
        let servers = service(&bench, scheduler, first, &weights)?;
        let story = format!("{scheduler}, weights and thresholds {weights:?}, BPFVS_SCHEDULING_SEED={seed}");
        bench.director.enter(|| script(&bench, scheduler, servers, &mut random)).context(story)?;
        bench.bpfvs.ipvsadm("-C")?;
        bench.pinned.forget_connections()?;
    }
    Ok(())
}

/// Opens and closes connections one by one, and compares who gets them.
fn script(bench: &Bench, scheduler: &str, mut servers: Vec<Server>, random: &mut Rng) -> Result<()> {
    let mut arrivals = Arrivals::new(bench)?;
    let mut open: Vec<Connection> = Vec::new();
    let mut happened = Vec::new();
    for step in 0..50 {
        // On a machine with too much to do the daemon may not have had a processor since the last event.
        bench.bpfvs.get("/v1/status")?;
        // Now and then there is a rest, in which the daemon goes to sleep.
        thread::sleep(if random.u8(..) < 20 { 10 * APART } else { APART });
        if random.u8(..) < 100 && !open.is_empty() {
            let connection = open.swap_remove(random.usize(..open.len()));
            arrivals.finish(&connection)?;
            let server = servers.iter_mut().find(|server| Some(server.index) == connection.server);
            server.context("only connections with a server end")?.entry.active -= 1;
            happened.push(None);
            continue;
        }
        let connection = arrivals.open()?;
        let expected = choice(scheduler, servers.iter().map(|server| &server.entry));
        let got = servers.iter().position(|server| Some(server.index) == connection.server);
        happened.push(Some(got));
        ensure!(
            got == expected,
            "step {step}: number {got:?} instead of {expected:?} of {servers:#?}; who got the connections (None: one ended): {happened:?}"
        );
        if let Some(position) = got {
            servers[position].entry.active += 1;
            servers[position].entry.total += 1;
            open.push(connection);
        }
    }
    Ok(())
}

#[test]
fn a_burst_stops_at_the_thresholds() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let _turn = turn();
    let bench = Bench::new(&[])?;
    for (scheduler, first) in ["wlc", "lc", "twos", "fo"].into_iter().zip((0..).step_by(10)) {
        let servers = service(&bench, scheduler, first, &[(3, 7), (2, 6), (2, 5)])?;
        bench.director.enter(|| {
            let mut arrivals = Arrivals::new(&bench)?;
            for _ in 0..25 {
                arrivals.begin()?;
            }
            anyhow::Ok(())
        })?;
        let totals = servers.iter().map(|server| Ok(bench.pinned.counters(server.index)?.total)).collect::<Result<Vec<_>>>()?;
        ensure!(totals == [5, 6, 7], "{scheduler}: thresholds of 5, 6 and 7 let {totals:?} connections through");
        bench.bpfvs.ipvsadm("-C")?;
        bench.pinned.forget_connections()?;
    }
    Ok(())
}

/// Who has how many connections, by index.
fn shares(connections: &[Connection]) -> BTreeMap<Option<u32>, usize> {
    let mut shares = BTreeMap::new();
    for connection in connections {
        *shares.entry(connection.server).or_default() += 1;
    }
    shares
}

#[test]
fn without_a_daemon_the_last_run_goes_on() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let _turn = turn();
    let mut bench = Bench::new(&[])?;
    let servers = service(&bench, "wlc", 0, &[(4, 0), (2, 0), (2, 0)])?;
    let open = |bench: &Bench, count: usize| {
        bench.director.enter(|| {
            let mut arrivals = Arrivals::new(bench)?;
            (0..count).map(|_| arrivals.open()).collect::<Result<Vec<_>>>()
        })
    };
    open(&bench, 100)?;
    bench.pinned.forget_connections()?;
    bench.bpfvs.kill9()?;
    let shares = shares(&open(&bench, 800)?);
    for server in &servers {
        let (share, wanted) = (shares.get(&Some(server.index)).copied().unwrap_or_default(), server.entry.weight as usize * 100);
        ensure!(share.abs_diff(wanted) <= wanted / 4, "weight {} got {share} of 800: {shares:?}", server.entry.weight);
    }
    bench.bpfvs.serve()
}

#[test]
fn commands_under_load_move_no_connection() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let _turn = turn();
    // As many as this machine can begin, and no flood.
    let bench = Bench::new(&["--max-connections", "1048576", "--max-half-open", "1048576"])?;
    let servers = service(&bench, "wlc", 0, &[(1, 0), (2, 0), (3, 0), (4, 0)])?;
    let done = AtomicBool::new(false);
    let removed = AtomicBool::new(false);
    let gone = servers[0].index;
    let connections = thread::scope(|scope| {
        let load = scope.spawn(|| {
            bench.director.enter(|| {
                let mut arrivals = Arrivals::new(&bench)?;
                let mut connections = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let was_removed = removed.load(Ordering::SeqCst);
                    let connection = arrivals.open()?;
                    ensure!(connection.server.is_some(), "a connection was refused");
                    ensure!(!was_removed || connection.server != Some(gone), "a removed server got a connection");
                    connections.push(connection);
                }
                for connection in connections.iter().filter(|connection| connection.server != Some(gone)) {
                    ensure!(arrivals.talk(connection)?, "a connection broke");
                    let server = bench.pinned.connection_v4(connection.client, "10.99.0.1:80".parse()?)?.map(|now| now.server);
                    ensure!(server == connection.server, "a connection moved from {:?} to {server:?}", connection.server);
                }
                Ok(connections)
            })
        });
        let commands = || -> Result<()> {
            for round in 1..4 {
                for scheduler in ["rr", "sed", "wrr", "nq", "mh", "twos", "lc", "sh", "wlc"] {
                    bench.bpfvs.ipvsadm(&format!("-E {SERVICE} -s {scheduler}"))?;
                    let weight = round + 3;
                    bench.bpfvs.ipvsadm(&format!("-e {SERVICE} -r {} -g -w {weight}", servers[3].address))?;
                }
                bench.bpfvs.ipvsadm(&format!("-d {SERVICE} -r {}", servers[2].address))?;
                bench.bpfvs.ipvsadm(&format!("-a {SERVICE} -r {} -g", servers[2].address))?;
            }
            bench.bpfvs.ipvsadm(&format!("-d {SERVICE} -r {}", servers[0].address))?;
            removed.store(true, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(200));
            Ok(())
        };
        let commanded = commands();
        done.store(true, Ordering::Relaxed);
        let connections = load.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        commanded.map(|()| connections)
    })?;
    let shares = shares(&connections);
    ensure!(shares.len() == servers.len(), "not all servers took part: {shares:?}");
    Ok(())
}

/// The CPU time that all threads of a process have used.
fn cpu_time(pid: u32) -> Result<Duration> {
    let mut nanoseconds = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("schedstat"))?;
        nanoseconds += text.split(' ').next().context("schedstat begins with the time")?.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

#[test]
fn a_thousand_idle_services_cost_next_to_nothing() -> Result<()> {
    const PERIOD: Duration = Duration::from_secs(4);
    needs!(root);
    needs_bpfvs!();
    let _turn = turn();
    let bench = Bench::new(&[])?;
    let servers = arrivals::servers(&bench, 0..2)?;
    let mut lines = Vec::new();
    for service in 0..1000 {
        let vip = format!("10.99.{}.{}:80", 1 + service / 250, 1 + service % 250);
        lines.push(format!("-A -t {vip} -s wlc"));
        lines.extend(servers.iter().map(|server| format!("-a -t {vip} -r {server} -g")));
    }
    bench.bpfvs.restore(&lines.join("\n"))?;
    bench.bpfvs.wait_for_servers()?;
    let pid = bench.bpfvs.pid()?;
    // What else the machine does can only add to it, so the best of some periods counts.
    let mut shares = Vec::new();
    let deadline = Instant::now() + 4 * PERIOD;
    while Instant::now() < deadline {
        let (begin, used_before) = (Instant::now(), cpu_time(pid)?);
        thread::sleep(PERIOD);
        let share = cpu_time(pid)?.saturating_sub(used_before).as_secs_f64() / begin.elapsed().as_secs_f64();
        shares.push(format!("{:.2} %", share * 100.0));
        if share < 0.005 {
            println!("an idle director with 1000 services of the scheduler wlc used {} of a core", shares.join(", "));
            return Ok(());
        }
    }
    bail!("an idle director with 1000 services used {} of a core", shares.join(", "))
}
