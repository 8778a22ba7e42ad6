//! Watches flood mode, to tell people: the packet path enters and leaves it by itself.

use std::time::Instant;

use tracing::{info, warn};

use crate::director::model::FloodView;

/// What was seen at the last look.
#[derive(Debug, Default)]
pub(super) struct FloodWatch {
    /// Since when it is on, and how many packets had gone on without a connection by then.
    on: Option<(Instant, u64)>,
}

impl FloodWatch {
    /// Looks again. `stateless` counts the packets that went on without a connection.
    pub(super) fn look(&mut self, view: &FloodView, stateless: impl Fn() -> u64) {
        match (self.on, view.on) {
            (None, true) => {
                self.on = Some((Instant::now(), stateless()));
                warn!(
                    "flood mode begins: {} connections are half-open (the limit is {}), or the table is full, or secure_tcp is 3; \
                     what begins a connection now makes no entry",
                    view.half_open, view.limit
                );
            }
            (Some((since, before)), false) => {
                self.on = None;
                info!(
                    "flood mode ends after {} s, in which {} packets went on without a connection",
                    since.elapsed().as_secs(),
                    stateless().saturating_sub(before)
                );
            }
            _ => {}
        }
    }

    /// Whether it was on.
    pub(super) const fn is_on(&self) -> bool {
        self.on.is_some()
    }
}
