//! Several engines with the same model behind one bounded queue.
//!
//! Knows which engine takes a request (`placement`), and nothing of what an engine does with it. Invariant: of
//! seats that are taken and requests that wait there are never more than the queue's depth, all engines together.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future;

use super::placement::{Candidate, Recent, place};
use crate::engine::{self, EngineConfig, EngineHandle, EngineStats, EventStream, Refused, prefix};
use crate::ledger::{Prices, RateCard};
use crate::request::{CacheSalt, NewRequest};
use crate::units::DeviceNanos;

/// An answer is counted as at most this many tokens of load: most end long before their limit.
const ANSWER_TOKENS_MAX: u64 = 256;

/// One engine, and what it is called on receipts.
pub struct Replica {
    pub engine: EngineHandle,
    /// Its device, or its devices with commas between.
    pub device: Arc<str>,
    /// Of its devices, as the ledger has them.
    pub rates: Vec<RateCard>,
}

impl Replica {
    fn prices(&self) -> Vec<Prices> {
        let pool = self.engine.config().pool(DeviceNanos::ZERO);
        self.rates.iter().map(|rate| rate.prices(Some(pool))).collect()
    }
}

/// All engines of a server; cheap to clone.
#[derive(Clone)]
pub struct Replicas(Arc<Inner>);

struct Inner {
    replicas: Vec<Replica>,
    prices: Vec<Vec<Prices>>,
    /// Tokens of each one's requests that wait or run.
    loads: Vec<AtomicU64>,
    queue_depth: usize,
    draining: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Seats that no request has taken yet.
    seats: usize,
    /// Requests given to each so far, and the prompts among them.
    placed: Vec<(u64, Recent)>,
}

impl Inner {
    fn queued(&self) -> usize {
        self.replicas.iter().map(|replica| replica.engine.queued()).sum()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each critical section leaves whole counts, whatever panics after it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Replicas {
    /// The engines' queues are one, as deep as the first one's.
    ///
    /// # Panics
    /// When there is no engine.
    #[must_use]
    pub fn new(replicas: Vec<Replica>) -> Self {
        let config = replicas.first().expect("a server has an engine").engine.config();
        let queue_depth = config.queue_depth;
        let recent = |replica: &Replica| Recent::new(replica.engine.config().blocks);
        let placed = replicas.iter().map(|replica| (0, recent(replica))).collect();
        Self(Arc::new(Inner {
            loads: replicas.iter().map(|_| AtomicU64::new(0)).collect(),
            prices: replicas.iter().map(Replica::prices).collect(),
            replicas,
            queue_depth,
            draining: AtomicBool::new(false),
            state: Mutex::new(State { seats: 0, placed }),
        }))
    }

    /// A server of one engine.
    #[must_use]
    pub fn one(engine: EngineHandle, device: impl Into<Arc<str>>, rate: RateCard) -> Self {
        Self::new(vec![Replica { engine, device: device.into(), rates: vec![rate] }])
    }

    #[must_use]
    pub fn each(&self) -> &[Replica] {
        &self.0.replicas
    }

    /// What all engines have in common.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        self.0.replicas[0].engine.config()
    }

    /// Takes a place in the queue.
    ///
    /// # Errors
    /// At once, without waiting, when there is none.
    pub fn reserve(&self) -> Result<Seat, Refused> {
        if self.is_dead() {
            return Err(Refused::Dead);
        }
        if self.0.draining.load(Ordering::Acquire) {
            return Err(Refused::Draining);
        }
        let mut state = self.0.state();
        let waiting = state.seats + self.0.queued();
        if waiting >= self.0.queue_depth {
            return Err(Refused::QueueFull { waiting });
        }
        state.seats += 1;
        Ok(Seat { inner: Arc::clone(&self.0), aside: false })
    }

    /// Takes a place beside the queue, which nobody else misses: for what gives way to everybody. Who asks for such
    /// places bounds their number.
    ///
    /// # Errors
    /// When the engines take nothing any more.
    pub fn reserve_aside(&self) -> Result<Seat, Refused> {
        if self.is_dead() {
            return Err(Refused::Dead);
        }
        if self.0.draining.load(Ordering::Acquire) {
            return Err(Refused::Draining);
        }
        Ok(Seat { inner: Arc::clone(&self.0), aside: true })
    }

    /// Requests that wait in the queue.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.0.queued()
    }

    /// Each engine's figures, with its device.
    pub fn stats(&self) -> impl Iterator<Item = (&str, EngineStats)> {
        self.0.replicas.iter().map(|replica| (&*replica.device, replica.engine.stats()))
    }

    /// Whether all engines' threads answer within `patience`.
    pub async fn ping(&self, patience: Duration) -> bool {
        let pings = self.0.replicas.iter().map(|replica| replica.engine.ping(patience));
        future::join_all(pings).await.into_iter().all(|answered| answered)
    }

    /// Whether an engine's thread has ended.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.0.replicas.iter().any(|replica| replica.engine.is_dead())
    }

    /// From now on new requests are refused; running ones go on.
    pub fn drain(&self) {
        self.0.draining.store(true, Ordering::Release);
    }

    /// Cancels what still runs, has the last reports sent, and ends the threads. Blocks until then.
    pub fn shutdown(&self) {
        self.drain();
        self.0.replicas.iter().for_each(|replica| replica.engine.shutdown());
    }
}

/// A place in the queue that no request has taken yet; free again when dropped.
#[must_use]
pub struct Seat {
    inner: Arc<Inner>,
    /// It is none of the queue's.
    aside: bool,
}

impl Drop for Seat {
    fn drop(&mut self) {
        if !self.aside {
            self.inner.state().seats -= 1;
        }
    }
}

impl Seat {
    /// Chooses the engine for prompts of which `choices` answers in all, of up to `max_tokens`, are wanted. Where
    /// there are several, by the first.
    ///
    /// # Errors
    /// When that engine has stopped.
    pub fn place(
        self,
        salt: CacheSalt,
        prompts: &[Vec<u32>],
        choices: u32,
        max_tokens: u32,
    ) -> Result<Placed, Refused> {
        let inner = &self.inner;
        let config = inner.replicas[0].engine.config();
        let mut keys = Vec::new();
        if config.prefix_caching && inner.replicas.len() > 1 {
            prefix::extend(&mut keys, prefix::root(salt), &prompts[0], config.block_size);
        }
        let mut state = inner.state();
        let candidate = |(load, (placed, recent)): (&AtomicU64, &(u64, Recent))| Candidate {
            cached: (recent.held(&keys) * config.block_size) as u64,
            load: load.load(Ordering::Acquire),
            placed: *placed,
        };
        let candidates: Vec<Candidate> = inner.loads.iter().zip(&state.placed).map(candidate).collect();
        let at = place(&candidates);
        // Never full: this seat is one of those that all queues together have.
        let engine = &inner.replicas[at].engine;
        let seat = if self.aside { engine.reserve_aside()? } else { engine.reserve()? };
        let (placed, recent) = &mut state.placed[at];
        *placed += 1;
        recent.touch(&keys);
        let prompt: usize = prompts.iter().map(Vec::len).sum();
        let tokens = prompt as u64 + u64::from(choices) * u64::from(max_tokens).min(ANSWER_TOKENS_MAX);
        inner.loads[at].fetch_add(tokens, Ordering::AcqRel);
        drop(state);
        Ok(Placed { seat, load: Load { inner: Arc::clone(inner), at, tokens } })
    }
}

/// Tokens that an engine has to compute, until this is dropped.
struct Load {
    inner: Arc<Inner>,
    at: usize,
    tokens: u64,
}

impl Drop for Load {
    fn drop(&mut self) {
        self.inner.loads[self.at].fetch_sub(self.tokens, Ordering::AcqRel);
    }
}

/// A place in the queue of the engine that takes the request.
#[must_use]
pub struct Placed {
    seat: engine::Seat,
    load: Load,
}

impl Placed {
    /// The device, or the devices, of the engine.
    #[must_use]
    pub fn device(&self) -> Arc<str> {
        Arc::clone(&self.load.inner.replicas[self.load.at].device)
    }

    /// What a nanosecond of each of the engine's devices costs.
    #[must_use]
    pub fn prices(&self) -> &[Prices] {
        &self.load.inner.prices[self.load.at]
    }

    /// As [`engine::Seat::submit`].
    pub fn submit(self, request: NewRequest) -> Events {
        Events { stream: self.seat.submit(request), _load: self.load }
    }
}

/// What the engine says about a request; as long as it is held, the request is part of the engine's load.
pub struct Events {
    pub stream: EventStream,
    _load: Load,
}
