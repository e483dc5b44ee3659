//! One thread that owns the device: its queue, its blocks, its sequences. Knows no HTTP, account or
//! price; a `Ticket` is handed back unread.
//!
//! Everybody else holds an `EngineHandle`, and per request an `EventStream`; dropping the stream
//! cancels the request. The engine never waits for a reader or for the disk.

pub mod blocks;
mod device;
mod draft;
mod fair;
mod flight;
mod lane;
mod lines;
mod pool;
pub mod prefix;
pub mod sampler;
pub mod scheduler;
mod sequence;
mod speculate;
mod step;
mod texts;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use obol_models::batch::CausalLm;
use obol_models::encoder::TextEncoder;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use crate::clock::Clock;
use crate::config::{Speculative, Weights};
use crate::meter::calibration::Calibration;
use crate::meter::energy::EnergyMeter;
use crate::meter::partition::Partition;
use crate::request::{Event, NewRequest};
use crate::units::{DeviceNanos, RequestId};
use crate::usage::{HouseTime, MeterReport, PoolInfo};

use blocks::BlockCounts;
use prefix::PrefixKey;

/// What is fixed for the life of an engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    pub blocks: usize,
    pub block_size: usize,
    pub bytes_per_block: u64,
    /// Prompt and generated tokens of one sequence; its blocks fit in the pool.
    pub max_model_len: usize,
    pub max_sequences: usize,
    pub step_tokens: usize,
    /// Requests that may wait; one more is refused.
    pub queue_depth: usize,
    pub prefix_caching: bool,
    pub speculative: Speculative,
    /// By which tenants share the device; `None`: first come, first served.
    pub weights: Option<Weights>,
    /// Tokens that end a sequence.
    pub end_tokens: Vec<u32>,
}

impl EngineConfig {
    #[must_use]
    pub fn pool(&self, since: DeviceNanos) -> PoolInfo {
        PoolInfo { blocks: self.blocks as u64, bytes_per_block: self.bytes_per_block, since }
    }
}

/// What an engine is made of. The KV pool of `model` has `config.blocks` blocks already.
pub struct Parts {
    pub model: Box<dyn CausalLm>,
    /// Makes vectors of texts beside the model, in steps of its own.
    pub encoder: Option<Box<dyn TextEncoder>>,
    pub config: EngineConfig,
    pub calibration: Calibration,
    pub clock: Arc<dyn Clock>,
    /// Loading and warm-up are booked in it.
    pub partition: Partition,
    /// Of the device, where it has one.
    pub energy: Option<Box<dyn EnergyMeter>>,
    pub reports: mpsc::Sender<MeterReport>,
}

/// The engine at one moment; counters since its start.
#[derive(Debug, Clone, Default)]
pub struct EngineStats {
    pub running: usize,
    pub waiting: usize,
    pub blocks: BlockCounts,
    pub blocks_total: u64,
    pub steps: u64,
    pub preemptions: u64,
    /// Tokens looked up in the prefix cache when requests first ran, and found there.
    pub prefix_queries: u64,
    pub prefix_hits: u64,
    pub prompt_tokens: u64,
    pub generation_tokens: u64,
    /// Proposals that were verified, their tokens, and how many of those held.
    pub drafts: u64,
    pub draft_tokens: u64,
    pub draft_tokens_accepted: u64,
    /// In the order of `HouseTime::ALL`.
    pub house: [DeviceNanos; HouseTime::ALL.len()],
    pub charged: DeviceNanos,
    /// What steps took by the device's own clock, nothing clipped: to be compared with what else watches it.
    pub device_busy: DeviceNanos,
    pub now: DeviceNanos,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the queue is full ({waiting} requests wait); retry later")]
    QueueFull { waiting: usize },
    #[error("the server is shutting down")]
    Draining,
    #[error("the engine has stopped")]
    Dead,
}

pub(crate) enum Command {
    Submit(Box<Submission>),
    StopChoice { request: RequestId, choice: u32 },
    Cancel { request: RequestId },
    Ping(oneshot::Sender<()>),
    Shutdown,
}

/// A request on its way to the engine.
pub(crate) struct Submission {
    request: NewRequest,
    /// Keys of each prompt's full blocks, hashed before the engine's thread sees them.
    keys: Vec<Vec<PrefixKey>>,
    events: UnboundedSender<Event>,
    place: Place,
    at: DeviceNanos,
}

/// State that handles read without asking the engine's thread.
#[derive(Debug, Default)]
struct Shared {
    queued: AtomicUsize,
    draining: AtomicBool,
    dead: AtomicBool,
    stats: Mutex<EngineStats>,
}

impl Shared {
    fn stats(&self) -> MutexGuard<'_, EngineStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the bounded queue, free again when dropped.
pub(crate) struct Place(Option<Arc<Shared>>);

impl Drop for Place {
    fn drop(&mut self) {
        // Those beside the queue are not counted.
        if let Some(shared) = &self.0 {
            shared.queued.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

#[derive(Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    config: Arc<EngineConfig>,
    scores_prompts: bool,
    hidden_size: Option<usize>,
    clock: Arc<dyn Clock>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl EngineHandle {
    /// Starts the engine's thread.
    ///
    /// # Panics
    /// When the operating system gives no thread.
    #[must_use]
    pub fn start(mut parts: Parts) -> Self {
        let (commands, inbox) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let config = Arc::new(parts.config.clone());
        let clock = parts.clock.clone();
        // A device that draws itself keeps its logits.
        let scores_prompts = parts.model.queue().is_none();
        let hidden_size = parts.model.hidden_size().filter(|_| scores_prompts);
        let for_thread = shared.clone();
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || step::run(parts, inbox, for_thread))
            .expect("a thread for the engine");
        let thread = Arc::new(Mutex::new(Some(thread)));
        Self { commands, shared, config, scores_prompts, hidden_size, clock, thread }
    }

    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Whether it can say how likely a prompt's tokens were.
    #[must_use]
    pub fn scores_prompts(&self) -> bool {
        self.scores_prompts
    }

    /// Size of the vectors that it makes of prompts; none: it makes none, as its device keeps the hidden states.
    #[must_use]
    pub fn hidden_size(&self) -> Option<usize> {
        self.hidden_size
    }

    /// Takes a place in the queue.
    ///
    /// # Errors
    /// At once, without waiting, when there is none.
    pub fn reserve(&self) -> Result<Seat, Refused> {
        if self.is_dead() {
            return Err(Refused::Dead);
        }
        if self.shared.draining.load(Ordering::Acquire) {
            return Err(Refused::Draining);
        }
        let depth = self.config.queue_depth;
        let take = |queued: usize| (queued < depth).then_some(queued + 1);
        match self.shared.queued.fetch_update(Ordering::AcqRel, Ordering::Acquire, take) {
            Ok(_) => Ok(self.seat(Place(Some(self.shared.clone())))),
            Err(waiting) => Err(Refused::QueueFull { waiting }),
        }
    }

    /// Takes a place beside the queue, of which there are as many as are asked for.
    ///
    /// # Errors
    /// When nothing is taken any more.
    pub fn reserve_aside(&self) -> Result<Seat, Refused> {
        match self.shared.draining.load(Ordering::Acquire) {
            _ if self.is_dead() => Err(Refused::Dead),
            true => Err(Refused::Draining),
            false => Ok(self.seat(Place(None))),
        }
    }

    fn seat(&self, place: Place) -> Seat {
        let (commands, clock) = (self.commands.clone(), self.clock.clone());
        Seat { place, commands, clock, block_size: self.config.block_size }
    }

    /// Places of the queue that are taken.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.shared.queued.load(Ordering::Acquire)
    }

    #[must_use]
    pub fn stats(&self) -> EngineStats {
        self.shared.stats().clone()
    }

    /// Whether the engine's thread answers within `patience`.
    pub async fn ping(&self, patience: Duration) -> bool {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Ping(reply)).is_ok()
            && matches!(tokio::time::timeout(patience, answer).await, Ok(Ok(())))
    }

    /// Whether the engine's thread has ended.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.shared.dead.load(Ordering::Acquire)
    }

    /// From now on new requests are refused; running ones go on.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Release);
    }

    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.shared.draining.load(Ordering::Acquire)
    }

    /// Cancels what still runs, sends the last report, and ends the thread. Blocks until then.
    pub fn shutdown(&self) {
        self.drain();
        // An engine that is gone already needs no telling.
        let _gone = self.commands.send(Command::Shutdown);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the engine's thread ended in a panic");
        }
    }
}

/// A place in the queue that no request has taken yet.
#[must_use]
pub struct Seat {
    place: Place,
    commands: mpsc::Sender<Command>,
    clock: Arc<dyn Clock>,
    block_size: usize,
}

impl Seat {
    /// Hands the request to the engine. Should the engine have died, the stream ends without a
    /// `Finished` event.
    pub fn submit(self, request: NewRequest) -> EventStream {
        let (events, receiver) = unbounded_channel();
        let stream = EventStream {
            request: request.id.clone(),
            open: request.choices,
            receiver,
            commands: self.commands.clone(),
        };
        let at = self.clock.now();
        let root = prefix::root(request.salt);
        let keys = request.prompt.each().map(|prompt| {
            let mut keys = Vec::new();
            prefix::extend(&mut keys, root, prompt, self.block_size);
            keys
        });
        let keys = keys.collect();
        let submission = Submission { request, keys, events, place: self.place, at };
        let submit = Command::Submit(Box::new(submission));
        // On failure the sender of events is dropped with the command, which ends the stream.
        let _dead = self.commands.send(submit);
        stream
    }
}

/// What the engine says about one request. Dropping it cancels what still runs.
pub struct EventStream {
    request: RequestId,
    open: u32,
    receiver: UnboundedReceiver<Event>,
    commands: mpsc::Sender<Command>,
}

impl EventStream {
    /// The next event; `None` after the last choice has finished, or when the engine died before.
    pub async fn next(&mut self) -> Option<Event> {
        let event = self.receiver.recv().await;
        if matches!(event, Some(Event::Finished { .. })) {
            self.open -= 1;
        }
        event
    }

    /// Choices that have not finished yet.
    #[must_use]
    pub fn open(&self) -> u32 {
        self.open
    }

    /// A stop string was found: the choice ends with `Finish::Stop`.
    pub fn stop_choice(&self, choice: u32) {
        // An engine that is gone ends the stream by itself.
        let _gone = self.commands.send(Command::StopChoice { request: self.request.clone(), choice });
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        if self.open > 0 {
            // An engine that is gone runs nothing that could be cancelled.
            let _gone = self.commands.send(Command::Cancel { request: self.request.clone() });
        }
    }
}
