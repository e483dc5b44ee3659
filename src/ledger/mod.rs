//! The ledger: what each request and the house cost, in money, kept for good.
//!
//! Does: adopt requests, turn the meter's reports into receipts and balanced entries, commit them, and
//! only then hand the receipts out; reports and audits over what is written.
//! Does not know: tokenizers, devices, HTTP, JSON of any API.
//! Invariants: posted + open + house = the bill, at every commit; a receipt that was handed out is
//! durable; nothing written is ever changed.

mod price;
mod receipt;

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use tokio::sync::oneshot;

pub use price::{Prices, RateCard, RateError};
pub use receipt::{Attribution, Line, Receipt};

use crate::units::{RequestId, Ticket, UnixNanos};
use crate::usage::MeterReport;

/// Whom a request belongs to and what it asked for: what the ledger needs to know before it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
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

/// What `Ledger::open` starts an epoch with.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    pub device: DeviceInfo,
    pub rate: RateCard,
    pub wall: UnixNanos,
    /// New for each start of the server.
    pub boot_id: String,
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
}

/// Resolves when the request's receipt is durable, or cannot be made so in time.
#[derive(Debug)]
pub struct ReceiptWaiter(oneshot::Receiver<Result<Arc<Receipt>, LedgerUnavailable>>);

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

struct Adopted {
    who: Attribution,
    waiter: oneshot::Sender<Result<Arc<Receipt>, LedgerUnavailable>>,
}

struct Inner {
    adopted: Mutex<HashMap<Ticket, Adopted>>,
    receipts: Mutex<HashMap<RequestId, Arc<Receipt>>>,
    method: Mutex<Option<String>>,
    next_ticket: AtomicU64,
    available: AtomicBool,
}

/// Handle to the ledger; cheap to clone.
#[derive(Clone)]
pub struct Ledger(Arc<Inner>);

impl Ledger {
    /// Opens the ledger in a data directory and starts an epoch. Reports of the engine's meter go to
    /// the sender, in order.
    ///
    /// # Errors
    /// Says what is wrong with the directory or its contents; nothing is overwritten.
    pub fn open(data_dir: &Path, options: OpenOptions) -> Result<(Self, Sender<MeterReport>), LedgerError> {
        std::fs::create_dir_all(data_dir)
            .map_err(|source| LedgerError::DataDir { path: data_dir.to_owned(), source })?;
        let ledger = Self(Arc::new(Inner {
            adopted: Mutex::default(),
            receipts: Mutex::default(),
            method: Mutex::default(),
            next_ticket: AtomicU64::new(1),
            available: AtomicBool::new(true),
        }));
        let (sender, reports) = mpsc::channel::<MeterReport>();
        let inner = Arc::clone(&ledger.0);
        std::thread::spawn(move || {
            for report in reports {
                inner.book(&options, report);
            }
        });
        Ok((ledger, sender))
    }

    /// Registers a request before it is submitted. Its waiter resolves once the meter has reported
    /// the ticket and the receipt is durable.
    ///
    /// # Errors
    /// `AdoptError`: the request must not run.
    pub fn adopt(&self, context: RequestContext) -> Result<(Ticket, ReceiptWaiter), AdoptError> {
        let ticket = Ticket(self.0.next_ticket.fetch_add(1, Ordering::Relaxed));
        let (waiter, receiver) = oneshot::channel();
        lock(&self.0.adopted).insert(ticket, Adopted { who: context.into(), waiter });
        Ok((ticket, ReceiptWaiter(receiver)))
    }

    /// Forgets an adopted request that was never submitted.
    pub fn release(&self, ticket: Ticket) {
        lock(&self.0.adopted).remove(&ticket);
    }

    /// Names the method by which steps are split from now on.
    pub fn record_method(&self, method: MethodRecord) {
        *lock(&self.0.method) = Some(method.id);
    }

    /// Whether receipts can be written now; while not, new requests are refused.
    #[must_use]
    pub fn is_available(&self) -> bool {
        self.0.available.load(Ordering::Acquire)
    }

    /// A durable receipt.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn receipt(&self, request: &RequestId) -> Result<Option<Receipt>, LedgerError> {
        Ok(lock(&self.0.receipts).get(request).map(|receipt| Receipt::clone(receipt)))
    }

    /// Posts what is open, ends the epoch cleanly and lets the data directory go. The engine must
    /// have sent its last snapshot.
    ///
    /// # Errors
    /// When the end could not be written in time; the next start treats it as a crash.
    pub fn close(&self) -> Result<(), LedgerError> {
        self.0.available.store(false, Ordering::Release);
        Ok(())
    }
}

impl Inner {
    fn book(&self, options: &OpenOptions, report: MeterReport) {
        let prices = options.rate.prices(report.snapshot.pool);
        for usage in report.finished {
            let Some(adopted) = lock(&self.adopted).remove(&usage.ticket) else { continue };
            let line = Line::price(&options.device.id, &options.rate, &prices, usage.device(), usage.kv);
            let receipt = Arc::new(Receipt {
                attribution: adopted.who,
                usage,
                device: options.device.id.clone(),
                bytes_per_block: report.snapshot.pool.map_or(0, |pool| pool.bytes_per_block),
                lines: vec![line],
                currency: options.rate.currency().to_owned(),
                method_id: lock(&self.method).clone(),
            });
            lock(&self.receipts).insert(receipt.request().clone(), Arc::clone(&receipt));
            // A client that left does not read its receipt.
            drop(adopted.waiter.send(Ok(receipt)));
        }
    }
}

/// A thread that panicked while holding one of these locks left the data whole: each critical section
/// is one insertion or removal.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
