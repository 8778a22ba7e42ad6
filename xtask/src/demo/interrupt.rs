//! Ctrl-C, and a polite kill: the demo cleans up before it goes.
//!
//! The signals are blocked and waited for by a thread. Programs that the demo starts do not inherit this: the standard
//! library gives every child an empty signal mask.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, Signal};

static HAPPENED: AtomicBool = AtomicBool::new(false);

/// Begins to catch the signals. To be called before there are other threads.
pub(super) fn catch() -> Result<()> {
    let signals: SigSet = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    signals.thread_block().context("the kernel does not let this program block signals; is it confined?")?;
    thread::spawn(move || {
        while signals.wait().is_ok() {
            HAPPENED.store(true, Ordering::Relaxed);
        }
    });
    Ok(())
}

/// Whether somebody wants the demo to end.
pub(super) fn happened() -> bool {
    HAPPENED.load(Ordering::Relaxed)
}
