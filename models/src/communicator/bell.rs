//! A counter that threads wait for: spinning for a while, as what they wait for mostly comes soon, then asleep.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Turns of the spin loop before a thread sleeps: some 50 microseconds.
const SPINS: u32 = 2_000;

/// How often something has happened.
#[derive(Default)]
pub(crate) struct Bell {
    rung: AtomicU64,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

impl Bell {
    pub(crate) fn count(&self) -> u64 {
        self.rung.load(Ordering::SeqCst)
    }

    /// What was written before is seen by those that this wakes.
    pub(crate) fn ring(&self) {
        self.rung.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            // Who counts itself as asleep holds the lock until it really is.
            drop(self.lock());
            self.wake.notify_all();
        }
    }

    /// Waits until the count is another than `seen`, and returns it.
    pub(crate) fn wait_past(&self, seen: u64) -> u64 {
        for _ in 0..SPINS {
            let count = self.count();
            if count != seen {
                return count;
            }
            std::hint::spin_loop();
        }
        let mut guard = self.lock();
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let count = loop {
            let count = self.count();
            if count != seen {
                break count;
            }
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        count
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.sleep.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
