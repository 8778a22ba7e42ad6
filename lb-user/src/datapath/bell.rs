//! What wakes the daemon when connections come or go.
//!
//! Schedules may have to follow the live counters, which stand in shared memory: as long as they change, the daemon simply
//! looks again. When they are at rest it wants to sleep, and not to miss the next change:
//!
//! ```text
//! let changed = bell.listen();      from now on the first change rings
//! look once more                    what changed before is seen here
//! changed.await
//! ```
//!
//! The packet path reads one word to find out whether anybody listens; only a change that finds somebody costs more.
#![expect(unsafe_code, reason = "tokio takes the caller's word that a descriptor stays open")]

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use anyhow::Context as _;
use aya::maps::{MapData, RingBuf};
use tokio::io::{Interest, unix::AsyncFd};

use super::{maps::Pins, shared::Words};

/// The bell of one instance.
pub struct Bell {
    sleeping: Words,
    rings: RingBuf<MapData>,
    /// The same buffer, to wait for.
    readable: Arc<AsyncFd<OwnedFd>>,
}

impl Bell {
    /// Opens the pinned bell, on this runtime.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        let rings: RingBuf<MapData> = pins.typed("BELL")?;
        let file = rings.as_fd().try_clone_to_owned().context("a file cannot be opened twice; see the limits of open files")?;
        // SAFETY: an owned descriptor stays the same, and open, as long as it lives; it lives in the result.
        let readable = unsafe { AsyncFd::register_with_interest(file, Interest::READABLE) };
        let readable = readable.context("the bell cannot be waited for; see the limits of open files")?;
        Ok(Self { sleeping: Words::open(&pins.map("SLEEPING"))?, rings, readable: Arc::new(readable) })
    }

    /// Resolves at the first change after this call, or without a reason.
    pub fn listen(&mut self) -> impl Future<Output = ()> + Send + use<> {
        while self.rings.next().is_some() {}
        if let Some(sleeping) = self.sleeping.word(0) {
            // Sequentially consistent, as the kernel's atomic additions are: the counters are read after this.
            sleeping.swap(1, std::sync::atomic::Ordering::SeqCst);
        }
        let readable = Arc::clone(&self.readable);
        async move {
            // It fails only with the runtime, and then nothing will ever be looked at again.
            if let Ok(mut ready) = readable.readable().await {
                ready.clear_ready();
            }
        }
    }
}
