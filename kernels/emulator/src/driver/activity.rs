//! How long kernels ran on a device, in real time, and the energy that stands for.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Watts of a device on which nothing runs.
const IDLE_WATTS: u64 = 50;
/// Watts more while a kernel runs.
const BUSY_WATTS: u64 = 250;
/// The time over which the busy share is taken.
const WINDOW: Duration = Duration::from_secs(1);

/// When kernels ran on one device.
pub(crate) struct Activity {
    since: Instant,
    log: Mutex<Log>,
}

#[derive(Default)]
struct Log {
    /// Kernels that run now, and since when any has.
    running: usize,
    began: Option<Instant>,
    busy: Duration,
    /// Ended spans of the last window.
    recent: VecDeque<(Instant, Instant)>,
}

impl Activity {
    pub(crate) fn new() -> Self {
        Self { since: Instant::now(), log: Mutex::default() }
    }

    /// Counts time as busy until the span is dropped.
    pub(crate) fn begin(&self) -> Span<'_> {
        let mut log = self.lock();
        log.running += 1;
        if log.began.is_none() {
            log.began = Some(Instant::now());
        }
        Span(self)
    }

    /// Millijoules since the driver started.
    pub(crate) fn millijoules(&self) -> u64 {
        let busy = self.lock().busy_until(Instant::now());
        let micros = u128::from(IDLE_WATTS) * self.since.elapsed().as_micros()
            + u128::from(BUSY_WATTS) * busy.as_micros();
        u64::try_from(micros / 1000).unwrap_or(u64::MAX)
    }

    /// Milliwatts now.
    pub(crate) fn milliwatts(&self) -> u32 {
        let watts = if self.lock().running > 0 { IDLE_WATTS + BUSY_WATTS } else { IDLE_WATTS };
        watts as u32 * 1000
    }

    /// Share of the last second in which a kernel ran, in percent.
    pub(crate) fn busy_percent(&self) -> u32 {
        let now = Instant::now();
        let mut log = self.lock();
        log.forget(now);
        let window = WINDOW.min(now - self.since);
        let Some(start) = now.checked_sub(window) else { return 0 };
        let current = log.began.map(|began| (began, now));
        let spans = log.recent.iter().copied().chain(current);
        let busy: Duration =
            spans.map(|(began, ended)| ended.saturating_duration_since(began.max(start))).sum();
        let share = busy.as_secs_f64() / window.as_secs_f64().max(f64::MIN_POSITIVE);
        (share * 100.0).round().min(100.0) as u32
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log {
    fn busy_until(&self, now: Instant) -> Duration {
        self.busy + self.began.map_or(Duration::ZERO, |began| now.saturating_duration_since(began))
    }

    fn forget(&mut self, now: Instant) {
        while self.recent.front().is_some_and(|span| now.saturating_duration_since(span.1) > WINDOW) {
            self.recent.pop_front();
        }
    }
}

/// A kernel runs.
pub(crate) struct Span<'a>(&'a Activity);

impl Drop for Span<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut log = self.0.lock();
        log.running -= 1;
        if log.running > 0 {
            return;
        }
        if let Some(began) = log.began.take() {
            log.busy += now - began;
            log.recent.push_back((began, now));
        }
        log.forget(now);
    }
}
