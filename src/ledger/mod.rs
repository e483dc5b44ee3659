//! The ledger: what each request and the house cost, in money, kept for good.
//!
//! Does: adopt requests, turn the meter's reports into receipts and balanced entries, commit them, and
//! only then hand the receipts out; reports and audits over what is written.
//! Does not know: tokenizers, devices, HTTP, JSON of any API.
//! Invariants: posted + open + house = the bill, at every commit; a receipt that was handed out is
//! durable; nothing written is ever changed.

mod audit;
mod books;
mod calendar;
mod coarse;
mod entry;
mod focus;
mod group;
mod migrate;
mod parties;
mod price;
mod query;
mod receipt;
mod recovery;
mod render;
mod report;
mod rollup;
mod rollup_check;
mod rows;
#[cfg(test)]
mod scale;
mod showback;
mod spent;
mod store;
mod sums;
mod totals;
mod writer;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::oneshot;

pub use audit::{Audit, AuditTotals, audit};
pub use calendar::{Calendar, CalendarError};
pub use focus::focus;
pub use price::{Prices, RateCard, RateError};
pub use query::{Page, ReceiptFilter, ReceiptPage};
pub use receipt::{Attribution, Line, Receipt};
pub use render::csv;
pub use report::{Balance, By, HouseRow, Report, ReportQuery, Row, Spend, report};
pub use spent::{Charge, charges};
pub use totals::{DeviceTotals, ModelTotals, Totals, Used};

use writer::{Adopted, Answer, Shared, Writer};

use crate::request::Tier;
use crate::units::{Picos, RequestId, Ticket, UnixNanos};
use crate::usage::{MeterReport, Purse};

/// Whom a request belongs to and what it asked for: what the ledger needs to know before it runs.
#[derive(Debug, Clone)]
pub struct RequestContext {
    pub request: RequestId,
    /// The client's own id, as it sent it.
    pub client_request_id: Option<String>,
    /// Scoped to `key_id`.
    pub idempotency_key: Option<String>,
    pub key_id: Option<String>,
    pub tenant: String,
    pub user: Option<String>,
    pub metadata: BTreeMap<String, String>,
    /// Team, feature, environment, task.
    pub tags: BTreeMap<String, String>,
    pub model: String,
    pub precision: String,
    /// Route, such as `/v1/chat/completions`.
    pub endpoint: &'static str,
    pub tier: Tier,
    /// `None`: whoever asked pays what it costs.
    pub purse: Option<Arc<dyn Purse>>,
}

/// The device whose time is booked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Short and stable: `cpu`, `cuda:0`. Appears in receipts and account names.
    pub id: String,
    /// `cpu` or `cuda`.
    pub kind: String,
    /// For people: the processor's or card's name.
    pub name: String,
}

/// A device and what it costs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeteredDevice {
    pub info: DeviceInfo,
    pub rate: RateCard,
}

/// What `Ledger::open` starts epochs with.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// The devices of each engine. Those of one engine run each step together, from its start to its end, and
    /// hold an equal part of each of its blocks. All rates are in one currency.
    pub engines: Vec<Vec<MeteredDevice>>,
    pub wall: UnixNanos,
    /// New for each start of the server.
    pub boot_id: String,
}

impl OpenOptions {
    /// For one engine on one device.
    #[must_use]
    pub fn one(info: DeviceInfo, rate: RateCard, wall: UnixNanos, boot_id: String) -> Self {
        Self { engines: vec![vec![MeteredDevice { info, rate }]], wall, boot_id }
    }

    fn devices(&self) -> impl Iterator<Item = &MeteredDevice> {
        self.engines.iter().flatten()
    }

    fn currency(&self) -> Result<&str, LedgerError> {
        let mut currencies = self.devices().map(|device| device.rate.currency());
        let first = currencies.next().ok_or(LedgerError::NoDevice)?;
        match currencies.find(|currency| *currency != first) {
            None => Ok(first),
            Some(other) => Err(LedgerError::Currencies { one: first.to_owned(), other: other.to_owned() }),
        }
    }
}

/// A way of splitting steps, with its coefficients: receipts name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MethodRecord {
    pub id: String,
    pub json: String,
}

/// Why a request was not adopted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdoptError {
    #[error("this Idempotency-Key was used by request {request}; its receipt stands, nothing was run again")]
    IdempotencyKeyReused { request: RequestId },
    #[error("the ledger cannot write receipts at the moment; retry later")]
    Unavailable,
}

/// The receipt could not be made durable in time. It is kept and written as soon as the disk allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the ledger could not write the receipt in time; it is kept and written later")]
pub struct LedgerUnavailable;

/// Why the ledger could not be opened, read or closed.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error(
        "data directory {path}: {source}; create it and make it writable, or choose another with --data-dir"
    )]
    DataDir { path: PathBuf, source: std::io::Error },
    #[error("data directory {path} is in use by {holder}; stop that server or choose another --data-dir")]
    InUse { path: PathBuf, holder: String },
    #[error("{path} is not a ledger of ours; move it away or choose another --data-dir")]
    NotALedger { path: PathBuf },
    #[error("{path} has schema version {found}, this build knows versions up to {known}; use a newer build")]
    SchemaVersion { path: PathBuf, found: i64, known: i64 },
    #[error("{path} is damaged ({detail}); restore it from a backup, nothing was changed")]
    Corrupt { path: PathBuf, detail: String },
    #[error("{path}: {source}")]
    Database { path: PathBuf, source: rusqlite::Error },
    #[error("there is no ledger at {path}; has a server run with this --data-dir?")]
    NoLedger { path: PathBuf },
    #[error("rate version {version:?} is in the ledger as {known}; a changed rate needs a new version")]
    RateVersion { version: String, known: String },
    #[error("devices are priced in {one} and in {other}; the books of one server are in one currency")]
    Currencies { one: String, other: String },
    #[error("cannot write what was asked for: {source}")]
    Output { source: std::io::Error },
    #[error("there is no device whose time could be booked")]
    NoDevice,
    #[error("cannot start a thread: {source}")]
    Thread { source: std::io::Error },
    #[error("the books could not be closed in time; the next start closes them")]
    NotClosed,
}

impl LedgerError {
    fn unreadable(path: &Path, source: rusqlite::Error) -> Self {
        let path = path.to_owned();
        match source.sqlite_error_code() {
            Some(rusqlite::ErrorCode::NotADatabase) => Self::NotALedger { path },
            Some(rusqlite::ErrorCode::DatabaseCorrupt) => Self::Corrupt { path, detail: source.to_string() },
            _ => Self::Database { path, source },
        }
    }
}

/// Resolves when the request's receipt is durable, or cannot be made so in time.
#[derive(Debug)]
pub struct ReceiptWaiter(oneshot::Receiver<Answer>);

impl Future for ReceiptWaiter {
    type Output = Result<Arc<Receipt>, LedgerUnavailable>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|answer| answer.unwrap_or(Err(LedgerUnavailable)))
    }
}

impl ReceiptWaiter {
    /// The same for a thread that may block. Not from within async code.
    ///
    /// # Errors
    /// As the future.
    pub fn wait(self) -> Result<Arc<Receipt>, LedgerUnavailable> {
        self.0.blocking_recv().unwrap_or(Err(LedgerUnavailable))
    }
}

/// Patience and pace; the defaults are for production.
#[derive(Debug, Clone, Copy)]
pub struct Tuning {
    /// How long a commit or a waiter may take before the ledger counts as unavailable.
    pub patience: Duration,
    /// How often the checkpoint is written when no receipt is.
    pub checkpoint: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { patience: Duration::from_secs(5), checkpoint: Duration::from_secs(1) }
    }
}

struct Handle {
    shared: Arc<Shared>,
    /// For idempotency keys and single receipts: held for one point query at a time.
    lookup: Mutex<Connection>,
    /// For pages of receipts, which may take long.
    pages: Mutex<Connection>,
    path: PathBuf,
    next_ticket: AtomicU64,
}

/// Handle to the ledger; cheap to clone. When the last one and the meter's sender are gone, what was
/// reported is written and the epoch stays open: only `close` ends it.
#[derive(Clone)]
pub struct Ledger(Arc<Handle>);

impl Ledger {
    /// Opens the ledger in a data directory for one engine: takes its lock, ends epochs that crashed, starts new
    /// ones. Reports of the engine's meter go to the sender, in order.
    ///
    /// # Errors
    /// Says what is wrong with the directory or its contents; nothing is overwritten.
    ///
    /// # Panics
    /// When the options name several engines.
    pub fn open(data_dir: &Path, options: &OpenOptions) -> Result<(Self, Sender<MeterReport>), LedgerError> {
        assert_eq!(options.engines.len(), 1, "one engine");
        let (ledger, mut senders) = Self::open_tuned(data_dir, options, Tuning::default())?;
        Ok((ledger, senders.remove(0)))
    }

    /// `open` for any number of engines, with a sender for each, and with another patience and pace.
    ///
    /// # Errors
    /// As `open`.
    pub fn open_tuned(
        data_dir: &Path,
        options: &OpenOptions,
        tuning: Tuning,
    ) -> Result<(Self, Vec<Sender<MeterReport>>), LedgerError> {
        let totals = Totals::new(options.currency()?, options.devices().map(|device| device.info.id.clone()));
        let opened = recovery::open(data_dir, options)?;
        let (lookup, path) = rows::open_for_reading(data_dir)?;
        let (pages, _) = rows::open_for_reading(data_dir)?;
        let shared = Arc::new(Shared::new(tuning, totals));
        let ledger = Self(Arc::new(Handle {
            shared: Arc::clone(&shared),
            lookup: Mutex::new(lookup),
            pages: Mutex::new(pages),
            path,
            next_ticket: AtomicU64::new(1),
        }));
        let handle = Arc::downgrade(&ledger.0);
        let handles_gone = Box::new(move || handle.strong_count() == 0);
        let writer = Writer::new(Arc::clone(&shared), opened, handles_gone);
        let spawned = |source| LedgerError::Thread { source };
        std::thread::Builder::new().name("ledger".to_owned()).spawn(move || writer.run()).map_err(spawned)?;
        let mut senders = Vec::with_capacity(options.engines.len());
        for engine in 0..options.engines.len() {
            let (sender, reports) = mpsc::channel::<MeterReport>();
            senders.push(sender);
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("ledger-inbox-{engine}"))
                .spawn(move || writer::run_inbox(&shared, engine, &reports))
                .map_err(spawned)?;
        }
        Ok((ledger, senders))
    }

    /// Registers a request before it is submitted. Its waiter resolves once the meter has reported
    /// the ticket and the receipt is durable.
    ///
    /// # Errors
    /// `AdoptError`: the request must not run.
    pub fn adopt(&self, context: RequestContext) -> Result<(Ticket, ReceiptWaiter), AdoptError> {
        let shared = &self.0.shared;
        if !shared.is_available() {
            return Err(AdoptError::Unavailable);
        }
        let purse = context.purse.clone();
        let who = Attribution::from(context);
        let scope = writer::scope(&who);
        let mut adoptions = lock(&shared.adoptions);
        if let Some(scope) = &scope {
            // The database is asked without the lock, for a disk may be slow. A request leaves `idempotency`
            // only after its receipt is in the database: if one has left meanwhile, ask again.
            loop {
                if let Some(request) = adoptions.idempotency.get(scope).cloned() {
                    return Err(AdoptError::IdempotencyKeyReused { request });
                }
                let left = adoptions.keys_left;
                drop(adoptions);
                if let Some(request) = self.receipt_of_key(scope)? {
                    return Err(AdoptError::IdempotencyKeyReused { request });
                }
                adoptions = lock(&shared.adoptions);
                if adoptions.keys_left == left && !adoptions.idempotency.contains_key(scope) {
                    break;
                }
            }
        }
        // Asked again under the lock: who makes the ledger unavailable for good fails all waiters after that.
        if !shared.is_available() {
            return Err(AdoptError::Unavailable);
        }
        let ticket = Ticket(self.0.next_ticket.fetch_add(1, Ordering::Relaxed));
        let (waiter, receiver) = oneshot::channel();
        if let Some(scope) = scope {
            adoptions.idempotency.insert(scope, who.request.clone());
        }
        let adopted = Adopted { who, purse, waiter: Some(waiter), reported: None, booked: false };
        adoptions.by_ticket.insert(ticket, adopted);
        Ok((ticket, ReceiptWaiter(receiver)))
    }

    fn receipt_of_key(&self, (key_id, key): &(String, String)) -> Result<Option<RequestId>, AdoptError> {
        query::by_idempotency_key(&lock(&self.0.lookup), key_id, key).map_err(|error| {
            tracing::error!(%error, "cannot look up an idempotency key");
            AdoptError::Unavailable
        })
    }

    /// Forgets an adopted request that was never submitted: its waiter resolves with `LedgerUnavailable`,
    /// its idempotency key is free again. Without effect once the meter has reported the ticket.
    pub fn release(&self, ticket: Ticket) {
        lock(&self.0.shared.adoptions).release(ticket);
    }

    /// Stores a method and names it on every receipt of that engine from now on.
    pub fn record_method(&self, engine: usize, method: MethodRecord) {
        self.0.shared.send_method(engine, method);
    }

    /// Whether receipts can be written now; while not, new requests are refused.
    #[must_use]
    pub fn is_available(&self) -> bool {
        self.0.shared.is_available()
    }

    /// A durable receipt.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn receipt(&self, request: &RequestId) -> Result<Option<Receipt>, LedgerError> {
        let mut found = rows::receipts(&lock(&self.0.lookup), "WHERE request_id = ?1", &[&request.0])
            .map_err(|source| LedgerError::unreadable(&self.0.path, source))?;
        Ok(found.pop().map(|(_, receipt)| receipt))
    }

    /// The durable receipt on which an idempotency key stands, in its API key's scope.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn receipt_of(
        &self,
        key_id: Option<&str>,
        idempotency_key: &str,
    ) -> Result<Option<Receipt>, LedgerError> {
        let key_id = key_id.unwrap_or_default();
        let found = query::by_idempotency_key(&lock(&self.0.lookup), key_id, idempotency_key);
        match found.map_err(|source| LedgerError::unreadable(&self.0.path, source))? {
            Some(request) => self.receipt(&request),
            None => Ok(None),
        }
    }

    /// Durable receipts, newest first.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn receipts(&self, filter: &ReceiptFilter, page: &Page) -> Result<ReceiptPage, LedgerError> {
        query::receipts(&lock(&self.0.pages), filter, page)
            .map_err(|source| LedgerError::unreadable(&self.0.path, source))
    }

    /// What was spent, as `report` reads it.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn report(&self, query: &ReportQuery) -> Result<Report, LedgerError> {
        report(self.0.path.parent().expect("the database is in a directory"), query)
    }

    /// As `charges`, of one key.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn charges_of_key(
        &self,
        key_id: &str,
        since: UnixNanos,
        each: impl FnMut(Charge),
    ) -> Result<(), LedgerError> {
        spent::read(&lock(&self.0.pages), (Some(key_id), None), since, each)
            .map_err(|source| LedgerError::unreadable(&self.0.path, source))
    }

    /// What requests were charged that were submitted at or after `since`, in parts.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn charges(&self, since: UnixNanos, each: impl FnMut(Charge)) -> Result<(), LedgerError> {
        spent::read(&lock(&self.0.pages), (None, None), since, each)
            .map_err(|source| LedgerError::unreadable(&self.0.path, source))
    }

    /// What the receipts of a key charged it, by currency.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn spent_by_key(&self, key_id: &str) -> Result<BTreeMap<String, Picos>, LedgerError> {
        rollup::spent_by_key(&lock(&self.0.pages), key_id)
            .map_err(|source| LedgerError::unreadable(&self.0.path, source))
    }

    /// What the books of this start say, as of the last commit.
    #[must_use]
    pub fn totals(&self) -> Totals {
        lock(&self.0.shared.totals).clone()
    }

    /// Posts what is open, ends the epochs cleanly and lets the data directory go. The engines must
    /// have sent their last snapshots. Blocks for as long as a commit may take.
    ///
    /// # Errors
    /// When the end could not be written in time; the next start treats it as a crash.
    pub fn close(&self) -> Result<(), LedgerError> {
        if self.0.shared.close() { Ok(()) } else { Err(LedgerError::NotClosed) }
    }
}

/// What the receipts of each of these keys charged it, by currency; a server may be running. Without a ledger, nothing.
///
/// # Errors
/// When there is one and it cannot be read.
pub fn spent_by_keys(data_dir: &Path, key_ids: &[&str]) -> Result<Vec<BTreeMap<String, Picos>>, LedgerError> {
    let (mut connection, path) = match rows::open_for_reading(data_dir) {
        Err(LedgerError::NoLedger { .. }) => return Ok(vec![BTreeMap::new(); key_ids.len()]),
        opened => opened?,
    };
    rows::in_snapshot(&mut connection, &path, |connection| {
        key_ids.iter().map(|key_id| rollup::spent_by_key(connection, key_id)).collect()
    })
}

/// A thread that panicked while holding one of these locks left the data whole: each critical section
/// is one insertion or removal.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> (Ledger, Sender<MeterReport>) {
        let device = DeviceInfo { id: "cpu".into(), kind: "cpu".into(), name: "a processor".into() };
        let rate = RateCard::parse("1", "0.2", "USD", None).unwrap();
        let wall = UnixNanos(1_790_000_000_000_000_000);
        Ledger::open(dir, &OpenOptions::one(device, rate, wall, "boot".into())).unwrap()
    }

    fn context(id: &str, key_id: Option<&str>) -> RequestContext {
        RequestContext {
            request: RequestId(id.to_owned()),
            client_request_id: None,
            idempotency_key: Some("once".into()),
            key_id: key_id.map(str::to_owned),
            tenant: "anonymous".into(),
            user: None,
            metadata: BTreeMap::new(),
            tags: BTreeMap::new(),
            model: "small".into(),
            precision: "Q4_1".into(),
            endpoint: "/v1/completions",
            tier: Tier::Default,
            purse: None,
        }
    }

    /// The value of `work` on another thread, unless that is stuck.
    fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || sender.send(work()));
        receiver.recv_timeout(Duration::from_secs(5)).expect("stuck")
    }

    #[test]
    fn a_slow_page_of_receipts_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let (ledger, _sender) = open(dir.path());
        let _page = lock(&ledger.0.pages);
        let other = ledger.clone();
        let (ticket, _waiter) = in_time(move || other.adopt(context("a", None))).unwrap();
        let other = ledger.clone();
        assert_eq!(in_time(move || other.receipt(&RequestId("a".into())).unwrap()), None);
        ledger.release(ticket);
    }

    #[test]
    fn a_slow_look_up_of_a_key_holds_only_its_request_up() {
        let dir = tempfile::tempdir().unwrap();
        let (ledger, _sender) = open(dir.path());
        let slow = lock(&ledger.0.lookup);
        let other = ledger.clone();
        let adopting = std::thread::spawn(move || other.adopt(context("slow", None)).map(drop));
        std::thread::sleep(Duration::from_millis(50));
        let other = ledger.clone();
        in_time(move || {
            let mut without_key = context("quick", None);
            without_key.idempotency_key = None;
            other.release(other.adopt(without_key).unwrap().0);
        });
        drop(slow);
        assert_eq!(adopting.join().unwrap(), Ok(()));
    }

    #[test]
    fn a_released_ticket_frees_its_key_and_its_waiter() {
        let dir = tempfile::tempdir().unwrap();
        let (ledger, _sender) = open(dir.path());
        let (ticket, waiter) = ledger.adopt(context("a", None)).unwrap();
        let reused = AdoptError::IdempotencyKeyReused { request: RequestId("a".into()) };
        // No key and an empty one are the same scope, as in the database.
        assert_eq!(ledger.adopt(context("b", Some(""))).map(drop), Err(reused));
        ledger.release(ticket);
        assert_eq!(in_time(move || waiter.wait()), Err(LedgerUnavailable));
        ledger.adopt(context("b", Some(""))).unwrap();
    }
}
