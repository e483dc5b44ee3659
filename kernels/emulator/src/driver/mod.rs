//! The driver: contexts, memory, streams, events, modules and graphs behind the functions `cu*`.
//!
//! A [`Driver`] is one machine with its devices. Programs meet one for each process, made from the
//! environment at the first call; a test may [enter](Driver::enter) its own, and all calls of its thread
//! go there.
//!
//! The lock of [`state`] is never held while work runs: [`queue`] takes an entry from a stream, runs it
//! by [`perform`] and then says that it is done.

mod activity;
mod allocate;
pub mod api;
mod attributes;
mod capture;
pub mod codes;
mod collective;
pub mod config;
mod contexts;
mod copy;
mod event;
mod graph;
mod launch;
mod modules;
mod perform;
mod queue;
mod state;
mod streams;

use std::cell::RefCell;
use std::marker::PhantomData;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

pub(crate) use activity::Activity;
pub use codes::{Error, Result};
pub(crate) use collective::{Call, Clique, Element, Reduction, Shape};
pub use config::Config;
pub(crate) use state::State;

use crate::memory::Memory;

/// One device.
pub(crate) struct Device {
    pub(crate) ordinal: usize,
    pub(crate) memory: Memory,
    pub(crate) activity: Activity,
}

/// One emulated machine.
pub struct Driver {
    /// Tells machines of one process apart.
    id: u64,
    pub(crate) config: Config,
    pub(crate) devices: Vec<Arc<Device>>,
    started: AtomicBool,
    /// How often monitoring was started and not ended.
    pub(crate) monitors: AtomicUsize,
    state: Mutex<State>,
    /// Told whenever a stream has moved on or has more to do.
    changed: Condvar,
}

impl Driver {
    /// A machine of its own.
    pub fn new(mut config: Config) -> Arc<Self> {
        if config.threads == 0 {
            config.threads = thread::available_parallelism().map_or(1, NonZero::get);
        }
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let device = |ordinal| {
            Arc::new(Device { ordinal, memory: Memory::new(config.memory_bytes), activity: Activity::new() })
        };
        Arc::new(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            devices: (0..config.devices).map(device).collect(),
            state: Mutex::new(State::new(config.devices)),
            config,
            started: AtomicBool::new(false),
            monitors: AtomicUsize::new(0),
            changed: Condvar::new(),
        })
    }

    /// Sends the calls of this thread here until the value is dropped.
    pub fn enter(self: &Arc<Self>) -> Entered {
        ENTERED.with_borrow_mut(|entered| entered.push(Arc::clone(self)));
        Entered(PhantomData)
    }

    /// The machine that the calls of this thread go to.
    pub fn current() -> Arc<Self> {
        ENTERED.with_borrow(|entered| entered.last().cloned()).unwrap_or_else(|| Arc::clone(of_process()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `cuInit` does.
    ///
    /// # Errors
    /// On a machine without devices.
    pub(crate) fn start(&self) -> Result<()> {
        if self.devices.is_empty() {
            return Err(Error::NO_DEVICE);
        }
        self.started.store(true, Ordering::Release);
        Ok(())
    }

    pub(crate) fn is_started(&self) -> Result<()> {
        if self.started.load(Ordering::Acquire) { Ok(()) } else { Err(Error::NOT_INITIALIZED) }
    }

    /// The device of an ordinal.
    pub(crate) fn device(&self, ordinal: usize) -> Result<&Arc<Device>> {
        self.devices.get(ordinal).ok_or(Error::INVALID_DEVICE)
    }

    /// The device whose memory holds `address`.
    fn device_of(&self, address: u64) -> Option<&Arc<Device>> {
        self.devices.iter().find(|device| device.memory.find(address).is_some())
    }

    /// Whether a kernel has failed on the device.
    pub(crate) fn has_failed(&self, device: usize) -> bool {
        self.lock().healthy(device).is_err()
    }

    /// One line about what was done, for a human.
    fn stats(&self) -> String {
        let counts = self.lock().counts.clone();
        let usage = self.devices.iter().map(|device| device.memory.usage());
        let (mut allocations, mut peak, mut held) = (0, 0, counts.leaked_bytes);
        for usage in usage {
            allocations += usage.allocations;
            peak += usage.peak;
            held += usage.used;
        }
        format!(
            "{} launches, {allocations} allocations, peak {peak} bytes, {held} bytes still held, \
             copied {} bytes to devices, {} from them, {} between",
            counts.launches, counts.bytes_up, counts.bytes_down, counts.bytes_between
        )
    }
}

thread_local! {
    static ENTERED: RefCell<Vec<Arc<Driver>>> = const { RefCell::new(Vec::new()) };
}

/// While this lives, calls of its thread go to the machine that was entered.
#[must_use]
pub struct Entered(PhantomData<*const ()>);

impl Drop for Entered {
    fn drop(&mut self) {
        ENTERED.with_borrow_mut(|entered| entered.pop());
    }
}

fn of_process() -> &'static Arc<Driver> {
    static PROCESS: OnceLock<Arc<Driver>> = OnceLock::new();
    PROCESS.get_or_init(|| {
        let config = Config::from_env();
        if config.stats {
            // SAFETY: the function lives as long as the process; this library is never unloaded then.
            let status = unsafe { libc::atexit(tell_stats) };
            assert_eq!(status, 0, "a handler for the end of the process can be set");
        }
        Driver::new(config)
    })
}

extern "C" fn tell_stats() {
    tell(of_process().stats());
}

/// Says something to whoever reads the test's output.
pub(crate) fn tell(text: impl std::fmt::Display) {
    eprintln!("obol-emulator: {text}");
}
