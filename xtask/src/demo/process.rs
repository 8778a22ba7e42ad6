//! Processes in the background: web servers and the daemon.
//!
//! Each is written down in a file as soon as it runs, with its start time, so that the next run finds what a crash of this
//! one left behind, and never ends a stranger's process that got the same number since. They are in process groups of their own:
//! Ctrl-C on the terminal is for the demo, which ends them in order.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::command::shown;

/// How long a process may take to start, or to end before it is killed.
const PATIENCE: Duration = Duration::from_secs(20);

/// Starts a process whose output goes to `log`, writes it down in `record`, and waits until `ready` is true.
pub(super) fn start(command: &mut Command, log: &Path, record: &Path, ready: impl Fn() -> bool) -> Result<()> {
    let output = File::create(log).with_context(|| format!("{} cannot be written", log.display()))?;
    let errors = output.try_clone().with_context(|| format!("{} cannot be written", log.display()))?;
    command.process_group(0).stdin(Stdio::null()).stdout(output).stderr(errors);
    let mut child = command.spawn().with_context(|| format!("`{}` cannot be run; is it installed?", shown(command)))?;
    write_down(&child, record)?;
    let deadline = Instant::now() + PATIENCE;
    while !ready() {
        let ended = child.try_wait().with_context(|| format!("`{}` cannot be waited for", shown(command)))?;
        if ended.is_some() || Instant::now() > deadline || super::interrupt::happened() {
            let state = ended.map_or_else(|| format!("is not ready after {PATIENCE:?}"), |status| format!("ended ({status})"));
            let said = fs::read_to_string(log).unwrap_or_default();
            bail!("`{}` {state}; it said:\n{}", shown(command), said.trim());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Ends all processes that are written down in `record`, politely first.
pub(super) fn end_all(record: &Path) {
    let Ok(text) = fs::read_to_string(record) else { return };
    let processes: Vec<Process> = text.lines().filter_map(Process::parse).collect();
    for (signal, patience) in [(Signal::SIGTERM, PATIENCE), (Signal::SIGKILL, PATIENCE)] {
        for process in processes.iter().filter(|process| process.lives()) {
            // It may have ended just now.
            let _ = kill(Pid::from_raw(process.id), signal);
        }
        let deadline = Instant::now() + patience;
        while processes.iter().any(Process::lives) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn write_down(child: &Child, record: &Path) -> Result<()> {
    let id = child.id().cast_signed();
    let begin = begin_of(id).with_context(|| format!("process {id} ended at once"))?;
    let file = File::options().create(true).append(true).open(record);
    file.and_then(|mut file| writeln!(file, "{id} {begin}")).with_context(|| format!("{} cannot be written", record.display()))
}

/// A process, by its number and its start time, which tell it from all others since the machine's start.
#[derive(Debug, PartialEq)]
struct Process {
    id: i32,
    begin: u64,
}

impl Process {
    fn parse(line: &str) -> Option<Self> {
        let (id, begin) = line.split_once(' ')?;
        Some(Self { id: id.parse().ok().filter(|id| *id > 1)?, begin: begin.parse().ok()? })
    }

    fn lives(&self) -> bool {
        begin_of(self.id) == Some(self.begin)
    }
}

/// When a process began, in clock ticks since the machine's start; `None` when it is over, waited for or not.
fn begin_of(id: i32) -> Option<u64> {
    begin_in(&fs::read_to_string(format!("/proc/{id}/stat")).ok()?)
}

/// The name in the second field may contain anything, so the count begins behind it: state, and 19 fields later the begin.
fn begin_in(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_stands_behind_any_name() {
        let stat = "42 (a) R (b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21";
        assert_eq!(begin_in(stat), Some(4711));
        assert_eq!(begin_in(&stat.replace(" S ", " Z ")), None);
    }

    #[test]
    fn only_the_process_that_was_written_down_is_ended() {
        let record = std::env::temp_dir().join(format!("bpfvs-xtask-record-{}", std::process::id()));
        let mut ours = Command::new("sleep").arg("60").spawn().expect("sleep runs");
        let mut stranger = Command::new("sleep").arg("60").spawn().expect("sleep runs");
        write_down(&ours, &record).expect("it runs");
        // The stranger has a number that was once ours, and an init process is never one of ours.
        let file = File::options().append(true).open(&record);
        file.and_then(|mut file| write!(file, "{} 1\n1 1\nnonsense\n", stranger.id())).expect("it was just written");
        end_all(&record);
        assert!(!ours.wait().expect("it ended").success());
        assert!(stranger.try_wait().expect("it is our child").is_none(), "the stranger must live");
        stranger.kill().expect("it is our child");
        stranger.wait().expect("it was killed");
        fs::remove_file(&record).expect("it is there");
    }
}
