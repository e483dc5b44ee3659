//! Answers that clients asked to be kept, and what they answered, so that a conversation can go on where it was left:
//! `responses.db`.
//!
//! Does not know: HTTP, what the texts mean, who an owner is.
//! Invariants: what `keep` acknowledged is durable, what `remove` acknowledged is gone from the disk too; an entry is
//! found by its owner only, and never after its time; a file that is not ours is not written to.
//!
//! One thread writes; what comes to it meanwhile is one transaction, so that many answers wait for the disk once.

mod store;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::clock::Clock;
use crate::config::Retention;
use crate::units::UnixNanos;
use store::{SWEEP_MAX, Store};

/// Entries that may wait to be written; who comes later waits for a place.
const WAITING_MAX: usize = 64;
/// How often what is too old is looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(60);
const DAY_NANOS: u64 = 86_400 * 1_000_000_000;

/// Why nothing could be kept or read; nothing was changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArchiveError {
    #[error("data directory {path}: {problem}; make it writable, or choose another with --data-dir")]
    DataDir { path: PathBuf, problem: String },
    #[error("{path} is not a file of responses of ours; move it away or choose another --data-dir")]
    NotOurs { path: PathBuf },
    #[error("{path} has schema version {found}, which this build does not read; use the build that wrote it")]
    SchemaVersion { path: PathBuf, found: i64 },
    #[error("{path}: the disk is full; nothing was changed")]
    DiskFull { path: PathBuf },
    #[error("{path}: {problem}; nothing was changed")]
    Database { path: PathBuf, problem: String },
    #[error("no thread can be started to write responses: {0}")]
    Thread(String),
    #[error("the thread that writes responses has ended")]
    Stopped,
}

/// One answer, and what was said for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub id: String,
    pub owner: String,
    /// The entry that it goes on from.
    pub previous: Option<String>,
    pub created: UnixNanos,
    /// What the client said with it, the entries before it left out.
    pub input: String,
    pub response: String,
}

/// What an entry goes on from, itself included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Conversation {
    /// Oldest first.
    Whole(Vec<Entry>),
    /// This entry is not there, or no longer.
    Lacks(String),
}

enum Order {
    Keep(Entry),
    Remove { id: String, owner: String },
}

struct Command {
    order: Order,
    /// Whether something was written or removed.
    done: oneshot::Sender<Result<bool, ArchiveError>>,
    /// Among those that may wait.
    place: OwnedSemaphorePermit,
}

struct Inner {
    /// Both until it is dropped.
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
    places: Arc<Semaphore>,
    reader: Mutex<Store>,
    clock: Arc<dyn Clock>,
    retention: Retention,
}

impl Drop for Inner {
    /// What waits is written first.
    fn drop(&mut self) {
        drop(self.commands.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that writes responses panicked");
        }
    }
}

/// Handle to what is kept in a data directory; cheap to clone. With the last one the file is closed.
#[derive(Clone)]
pub struct Archive(Arc<Inner>);

impl Archive {
    /// Opens what a data directory has, and makes what is missing. What is too old goes first.
    ///
    /// # Errors
    /// Says what is wrong with the directory or the file; nothing is overwritten.
    pub fn open(data_dir: &Path, retention: Retention, clock: Arc<dyn Clock>) -> Result<Self, ArchiveError> {
        let mut store = Store::open(data_dir)?;
        let reader = Store::open_for_reading(data_dir)?;
        let oldest = oldest(retention, clock.as_ref());
        while store.write(&[], Some(oldest), retention.bytes)?.swept == SWEEP_MAX {}
        let (commands, orders) = mpsc::channel();
        let writer = Writer { store, clock: Arc::clone(&clock), retention, sweeps_at: Instant::now() };
        let thread = std::thread::Builder::new()
            .name("responses".into())
            .spawn(move || writer.run(&orders))
            .map_err(|error| ArchiveError::Thread(error.to_string()))?;
        Ok(Self(Arc::new(Inner {
            commands: Some(commands),
            thread: Some(thread),
            places: Arc::new(Semaphore::new(WAITING_MAX)),
            reader: Mutex::new(reader),
            clock,
            retention,
        })))
    }

    /// Whether anything is kept at all.
    #[must_use]
    pub fn keeps(&self) -> bool {
        self.0.retention.days > 0
    }

    /// Durable when it returns. Once it waits no longer for a place, dropping the future changes nothing.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn keep(&self, entry: Entry) -> Result<(), ArchiveError> {
        self.order(Order::Keep(entry)).await.map(drop)
    }

    /// Whether there was such an entry of this owner's; it is gone when this returns.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub async fn remove(&self, id: &str, owner: &str) -> Result<bool, ArchiveError> {
        self.order(Order::Remove { id: id.to_owned(), owner: owner.to_owned() }).await
    }

    async fn order(&self, order: Order) -> Result<bool, ArchiveError> {
        let place = Arc::clone(&self.0.places).acquire_owned().await.map_err(|_| ArchiveError::Stopped)?;
        let (done, outcome) = oneshot::channel();
        let commands = self.0.commands.as_ref().ok_or(ArchiveError::Stopped)?;
        commands.send(Command { order, done, place }).map_err(|_| ArchiveError::Stopped)?;
        outcome.await.map_err(|_| ArchiveError::Stopped)?
    }

    /// Reads the disk: not for async threads.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn find(&self, id: &str, owner: &str) -> Result<Option<Entry>, ArchiveError> {
        lock(&self.0.reader).find(id, owner, oldest(self.0.retention, self.0.clock.as_ref()))
    }

    /// An entry and those before it. Reads the disk: not for async threads.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn conversation(&self, id: &str, owner: &str) -> Result<Conversation, ArchiveError> {
        let oldest = oldest(self.0.retention, self.0.clock.as_ref());
        let entries = lock(&self.0.reader).conversation(id, owner, oldest)?;
        Ok(match entries.first() {
            None => Conversation::Lacks(id.to_owned()),
            Some(Entry { previous: Some(lacking), .. }) => Conversation::Lacks(lacking.clone()),
            Some(_) => Conversation::Whole(entries),
        })
    }
}

fn lock(store: &Mutex<Store>) -> MutexGuard<'_, Store> {
    // A reader that panicked has changed nothing.
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was made before this has had its time.
fn oldest(retention: Retention, clock: &dyn Clock) -> UnixNanos {
    let now = clock.wall().0;
    if retention.days == 0 {
        return UnixNanos(now.saturating_add(1));
    }
    UnixNanos(now.saturating_sub(u64::from(retention.days).saturating_mul(DAY_NANOS)))
}

/// The side that owns the connection for changes.
struct Writer {
    store: Store,
    clock: Arc<dyn Clock>,
    retention: Retention,
    sweeps_at: Instant,
}

impl Writer {
    fn run(mut self, commands: &Receiver<Command>) {
        loop {
            let patience = self.sweeps_at.saturating_duration_since(Instant::now());
            let first = match commands.recv_timeout(patience) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let rest = commands.try_iter().take(WAITING_MAX);
            self.write(first.into_iter().chain(rest).collect());
        }
    }

    fn write(&mut self, batch: Vec<Command>) {
        let (orders, told): (Vec<Order>, Vec<_>) =
            batch.into_iter().map(|command| (command.order, (command.done, command.place))).unzip();
        let now = Instant::now();
        let sweeps = now >= self.sweeps_at;
        let oldest = sweeps.then(|| oldest(self.retention, self.clock.as_ref()));
        let outcome = self.store.write(&orders, oldest, self.retention.bytes);
        // A sweep that found as many as it may is followed by another, after what waits now.
        if sweeps && !outcome.as_ref().is_ok_and(|written| written.swept == SWEEP_MAX) {
            self.sweeps_at = now + SWEEP_EVERY;
        }
        if let Err(error) = &outcome {
            tracing::error!(%error, "responses cannot be written");
        }
        for (at, (done, place)) in told.into_iter().enumerate() {
            drop(place);
            let outcome = outcome.as_ref().map(|written| written.done[at]).map_err(Clone::clone);
            if done.send(outcome).is_err() {
                tracing::trace!("nobody waits any more for what was written");
            }
        }
    }
}
