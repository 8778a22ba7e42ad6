//! Waiting for a condition instead of sleeping: it ends as soon as the condition holds, and fails with its name.
//!
//! ```no_run
//! use std::time::Duration;
//! use bpfvs_tests::wait;
//!
//! wait::until("the file to appear", Duration::from_secs(5), || std::path::Path::new("/tmp/file").exists())?;
//! let text = wait::for_some("the file to have text", Duration::from_secs(5), || std::fs::read_to_string("/tmp/file").ok())?;
//! # anyhow::Ok(())
//! ```

use std::{
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How long to wait for what should take a moment. Generous: machines under load are slow, and a passing test never waits it out.
pub const SOON: Duration = Duration::from_secs(15);

/// Waits until a condition holds, and fails after the deadline, naming what did not happen.
pub fn until(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    for_some(what, deadline, || condition().then_some(()))
}

/// Waits until there is a value.
pub fn for_some<T>(what: &str, deadline: Duration, mut attempt: impl FnMut() -> Option<T>) -> Result<T> {
    let begin = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(value) = attempt() {
            return Ok(value);
        }
        if begin.elapsed() > deadline {
            bail!("waited {} seconds in vain for {what}", deadline.as_secs());
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// So long may a thread that wants to run not run, or the machine counts as disturbed.
const PAUSE: Duration = Duration::from_secs(1);
/// So often work is begun that is disturbed each time.
const ATTEMPTS: usize = 4;

/// Does work that means something only if the machine does not stand still meanwhile: connections end by the clock. If it did, the
/// work is done again.
pub fn undisturbed<T>(mut work: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 0..ATTEMPTS {
        let (done, is_done) = channel::<()>();
        let watcher = thread::spawn(move || {
            let tick = PAUSE / 20;
            let mut longest = Duration::ZERO;
            loop {
                let begin = Instant::now();
                let ended = is_done.recv_timeout(tick) != Err(RecvTimeoutError::Timeout);
                longest = longest.max(begin.elapsed().saturating_sub(tick));
                if ended {
                    return longest;
                }
            }
        });
        let outcome = work();
        drop(done);
        let longest = watcher.join().unwrap_or_default();
        if longest < PAUSE {
            return outcome;
        }
        println!("The machine stood still for {:.1} s; once more.", longest.as_secs_f32());
    }
    bail!("the machine stood still for more than {} s each time, in {ATTEMPTS} attempts", PAUSE.as_secs())
}
