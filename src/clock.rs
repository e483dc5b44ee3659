//! Time as a value that is passed in: one monotonic clock for measuring, one wall clock for people.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::units::{DeviceNanos, UnixNanos};

pub trait Clock: Send + Sync {
    /// Nanoseconds since the clock was made. Monotonic; the only clock that durations come from.
    fn now(&self) -> DeviceNanos;
    /// Wall-clock time, for receipts and reports. May jump.
    fn wall(&self) -> UnixNanos;
}

/// The machine's clocks.
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    #[must_use]
    pub fn start() -> Self {
        Self { start: Instant::now() }
    }
}

impl Clock for SystemClock {
    fn now(&self) -> DeviceNanos {
        DeviceNanos(u64::try_from(self.start.elapsed().as_nanos()).expect("uptime fits in 584 years"))
    }

    fn wall(&self) -> UnixNanos {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        UnixNanos(u64::try_from(since.as_nanos()).expect("the year is before 2554"))
    }
}

/// A clock that stands still until told; for tests and simulation.
#[derive(Default)]
pub struct ManualClock {
    now: AtomicU64,
    wall_offset: AtomicU64,
}

impl ManualClock {
    #[must_use]
    pub fn at_wall(start: UnixNanos) -> Self {
        Self { now: AtomicU64::new(0), wall_offset: AtomicU64::new(start.0) }
    }

    pub fn advance(&self, by: DeviceNanos) {
        self.now.fetch_add(by.0, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> DeviceNanos {
        DeviceNanos(self.now.load(Ordering::SeqCst))
    }

    fn wall(&self) -> UnixNanos {
        UnixNanos(self.wall_offset.load(Ordering::SeqCst) + self.now().0)
    }
}
