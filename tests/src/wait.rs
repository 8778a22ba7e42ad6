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
