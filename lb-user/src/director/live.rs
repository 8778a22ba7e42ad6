//! Keeping schedules true while connections come and go.
//!
//! Three kinds of schedule become untrue without a command: a dynamic scheduler's forecast, one with real servers that
//! have thresholds, and one that was cut off. [`Director::refresh`] reads what the packet path counts, and
//! publishes those anew that it has left behind. It costs a read for each such service and each of its servers, and no
//! system call.
//!
//! What is read must be of one moment, or connections are forecast twice or not at all: the counters hold exactly the
//! connections of the picks before the cursor. So the cursor is read before and after them, and if it has moved they are
//! read again:
//!
//! ```text
//! packet path   cursor + 1, insert the connection, counter + 1
//! here          cursor = 7, counters, cursor = 8: again; cursor = 8, rest, counters, cursor = 8: the forecast begins at 8
//! ```
//!
//! A packet that has moved the cursor has not yet moved the counter, for less than a microsecond. So where the cursor has moved,
//! counters are read a microsecond after it. Where it moves faster than that, a connection may be missed once: the counter's change is
//! seen by the next refresh.

use std::{
    hint,
    time::{Duration, Instant},
};

use tracing::warn;

use super::{Director, model::ServiceId, service::Service};
use crate::{datapath::Datapath, scheduler::Arrivals};

/// How far a dynamic schedule looks ahead at least, and at most. A long one lasts longer in a burst and when the daemon
/// dies; a short one is compiled sooner and takes less room.
const AHEAD: [u32; 2] = [32, 8192];

/// It looks so many times as far ahead as there were picks since the last one.
const RESERVE: u32 = 8;

/// How often counters are read while the cursor moves, before what was read has to do.
const ATTEMPTS: u32 = 16;

/// How long after the cursor a packet moves its counter, at the most.
const SETTLED: Duration = Duration::from_micros(1);

impl Service {
    /// Whether connections can make its schedule untrue.
    fn is_live(&self) -> bool {
        self.scheduler.is_dynamic() || self.lasts.is_some() || self.servers.iter().any(|server| server.config.upper_threshold > 0)
    }

    /// Reads the live counters. Returns where the cursor stands, and whether a counter is not what it was.
    fn read(&mut self, datapath: &impl Datapath) -> (u32, bool) {
        let (mut cursor, mut changed) = (datapath.cursor(self.index), false);
        self.servers.iter_mut().for_each(|server| server.peak = 0);
        let mut moves = cursor != self.base;
        for _ in 0..ATTEMPTS {
            if moves {
                let since = Instant::now();
                while since.elapsed() < SETTLED {
                    hint::spin_loop();
                }
            }
            for server in self.servers.iter_mut() {
                let live = datapath.counters(server.index);
                changed |= live != server.live;
                server.live = live;
                if server.config.upper_threshold > 0 {
                    server.peak = server.peak.max(datapath.take_peak(server.index));
                }
            }
            let before = std::mem::replace(&mut cursor, datapath.cursor(self.index));
            moves = before != cursor;
            if !moves {
                break;
            }
        }
        (cursor, changed)
    }

    /// Sets the overload flags by what was read. Returns whether one has changed.
    fn flag(&mut self) -> bool {
        let mut flipped = false;
        for server in self.servers.iter_mut() {
            let overloaded = server.is_overloaded();
            flipped |= overloaded != server.overloaded;
            server.overloaded = overloaded;
        }
        flipped
    }

    /// Looks whether the schedule is still true, and if not, takes in what has made it untrue.
    fn is_left_behind(&mut self, datapath: &impl Datapath) -> Option<Untrue> {
        let (cursor, changed) = self.read(datapath);
        let moved = cursor.wrapping_sub(self.base);
        let forecast = self.scheduler.is_dynamic() && (changed || moved > 0);
        let used_up = self.lasts.is_some_and(|picks| moved > picks / 2);
        let flipping = self.servers.iter().any(|server| server.is_overloaded() != server.overloaded);
        (forecast || used_up || flipping).then(|| {
            self.ahead = moved.saturating_mul(RESERVE);
            // The picks until now were made with the old flags.
            self.advance(cursor);
            Untrue { flipped: self.flag() }
        })
    }

    /// The arrivals that its next schedule is for: those from [`Service::base`] on.
    pub(super) fn arrivals(&self, seed: u64) -> Arrivals {
        let servers = u32::try_from(self.servers.len()).unwrap_or(u32::MAX);
        let [least, most] = AHEAD;
        Arrivals {
            base: self.base,
            count: self.ahead.max(servers).clamp(least, most),
            active: self.id.arrives_active(),
            seed: seed.wrapping_add(u64::from(self.index)),
        }
    }
}

/// A schedule has to be made anew.
struct Untrue {
    /// An overload flag has changed: that is state.
    flipped: bool,
}

impl<D: Datapath> Director<D> {
    /// Whether there is any schedule that [`Director::refresh`] has to keep true.
    pub fn is_live(&self) -> bool {
        self.services.values().any(Service::is_live)
    }

    /// Publishes schedules anew that are not true any more. Returns whether there were any.
    pub fn refresh(&mut self) -> bool {
        let mut left_behind = Vec::new();
        for service in self.services.values_mut().filter(|service| service.is_live()) {
            if let Some(untrue) = service.is_left_behind(&self.datapath) {
                self.changed |= untrue.flipped;
                left_behind.push((service.id, untrue.flipped));
            }
        }
        for (id, flipped) in &left_behind {
            let flood = if *flipped { self.publish_flood(id) } else { Ok(()) };
            let outcome = flood.and_then(|()| self.publish(id));
            let Some(service) = self.services.get_mut(id) else { continue };
            let was_stuck = std::mem::replace(&mut service.stuck, outcome.is_err());
            // This may go on a thousand times in a second.
            if let (Err(error), false) = (outcome, was_stuck) {
                warn!("{id} keeps its old schedule until there is room: {error}");
            }
        }
        !left_behind.is_empty()
    }

    /// The next schedule of a service is for the arrivals from now on, whatever was picked until now.
    pub(super) fn start_from_now(&mut self, id: &ServiceId) {
        if let Some(service) = self.services.get_mut(id) {
            let (cursor, _) = service.read(&self.datapath);
            service.base = cursor;
            service.flag();
        }
    }
}
