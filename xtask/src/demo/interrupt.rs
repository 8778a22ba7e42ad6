//! Ctrl-C, a closed terminal, a polite kill: the demo cleans up before it goes.
//!
//! A signal only sets a flag, which is looked at between two steps. Programs that the demo starts know nothing of this:
//! a handler does not survive the start of another program (a blocked signal would).

use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicBool, Ordering},
};

use anyhow::{Context as _, Result};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag::register,
};

static HAPPENED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Begins to catch the signals.
pub(super) fn catch() -> Result<()> {
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        register(signal, Arc::clone(&HAPPENED))
            .with_context(|| format!("the kernel does not let this program handle signal {signal}; is it confined?"))?;
    }
    Ok(())
}

/// Whether somebody wants the demo to end.
pub(super) fn happened() -> bool {
    HAPPENED.load(Ordering::Relaxed)
}
