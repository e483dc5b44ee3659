//! Alerting: watches what settles and what budgets and books say, writes alerts down, and tells webhooks of them.
//!
//! Does: all of it on one thread of its own. Does not know: HTTP servers, the engine, what an alert means.
//! Invariants: nobody waits for it: what it cannot take in is counted and left out; an alert is sent only after it is
//! durable, and until a webhook has acknowledged it or it is given up.

mod webhook;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};

pub use webhook::{Format, Webhook, WebhookError};

use crate::clock::Clock;
use crate::control::alerts::rules::Rules;
use crate::control::alerts::{Alert, Kind, Settled, Watch};
use crate::control::budgets::{Budgets, Spender};
use crate::control::outbox::{Outbox, Target};
use crate::control::{Control, ControlError};
use crate::ledger::{Ledger, LedgerError, Page, Receipt, ReceiptFilter};
use crate::units::UnixNanos;

/// Settled requests that may wait to be looked at.
const WAITING_MAX: usize = 1 << 16;
/// Alerts that may wait for the disk.
const UNWRITTEN_MAX: usize = 10_000;
/// Requests before the start that are looked at for costs that a crash kept from being written down.
const LOOK_BACK: u32 = 1_000;

/// Pace and patience; the defaults are for production.
#[derive(Debug, Clone, Copy)]
pub struct Tuning {
    /// How often budgets and books are looked at.
    pub tick: Duration,
    /// How long a webhook may take to answer.
    pub timeout: Duration,
    /// After the first failed attempt; then twice as long each time, up to `backoff_max`, half of it by chance.
    pub backoff: Duration,
    pub backoff_max: Duration,
    /// What is to be sent when the server stops gets so long; the rest is sent after the next start.
    pub farewell: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            tick: Duration::from_millis(200),
            timeout: Duration::from_secs(10),
            backoff: Duration::from_secs(1),
            backoff_max: Duration::from_secs(60),
            farewell: Duration::from_secs(2),
        }
    }
}

/// What alerting is put together from.
pub struct Parts {
    /// Where `control.db` is.
    pub data_dir: PathBuf,
    pub rules: Rules,
    pub webhooks: Vec<Webhook>,
    pub budgets: Budgets,
    pub ledger: Ledger,
    /// Knows keys by other names than their ids.
    pub control: Option<Control>,
    pub clock: Arc<dyn Clock>,
    pub currency: String,
    pub tuning: Tuning,
}

/// Why alerting cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AlertingError {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Webhook(#[from] WebhookError),
    #[error("cannot start the thread of alerts: {0}")]
    Thread(std::io::Error),
}

/// What happened since the start, for `/metrics`.
#[derive(Debug, Default)]
struct Counts {
    raised: [AtomicU64; Kind::ALL.len()],
    left_out: AtomicU64,
    unsent: AtomicU64,
}

struct Inner {
    settled: mpsc::Sender<Settled>,
    counts: Arc<Counts>,
    stop: watch::Sender<bool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Handle to the alerts of a server; cheap to clone. The default one takes nothing in.
#[derive(Clone, Default)]
pub struct Alerting(Option<Arc<Inner>>);

impl Alerting {
    /// Opens the outbox and starts to watch.
    ///
    /// # Errors
    /// When the outbox or the ledger cannot be read, or a webhook cannot be called at all.
    pub fn start(parts: Parts) -> Result<Self, AlertingError> {
        let now = parts.clock.wall();
        let targets: Vec<Target> = parts.webhooks.iter().map(|webhook| webhook.target().clone()).collect();
        let mut outbox = Outbox::open(&parts.data_dir)?;
        outbox.begin(&targets, now)?;
        let counts = Arc::new(Counts::default());
        let (settled, observed) = mpsc::channel(WAITING_MAX);
        let (stop, stopped) = watch::channel(false);
        let outbox = Arc::new(Mutex::new(outbox));
        let mut watch = Watch::new(parts.rules, &parts.currency);
        let rules = parts.budgets.rules();
        if let Some(since) = watch.counts_since(&rules, now) {
            parts.ledger.charges(since, |charge| {
                let who = Spender::of(charge.key_id, &charge.tenant, charge.user, &charge.tags);
                watch.replay(&rules, &who, charge.at, charge.amount);
            })?;
        }
        let watcher = Watcher {
            watch,
            outbox: Arc::clone(&outbox),
            budgets: parts.budgets,
            ledger: parts.ledger,
            control: parts.control,
            clock: Arc::clone(&parts.clock),
            counts: Arc::clone(&counts),
            targets,
            news: Arc::default(),
            unwritten: Vec::new(),
            started: now,
            tick: parts.tuning.tick,
        };
        let courier = |webhook: Webhook| {
            Ok(webhook::Courier {
                client: webhook::client(&webhook, parts.tuning.timeout)?,
                webhook,
                outbox: Arc::clone(&outbox),
                clock: Arc::clone(&parts.clock),
                tuning: parts.tuning,
                news: Arc::clone(&watcher.news),
                stopped: stopped.clone(),
            })
        };
        let couriers = parts.webhooks.into_iter().map(courier).collect::<Result<Vec<_>, WebhookError>>()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(AlertingError::Thread)?;
        let work = move || runtime.block_on(run(watcher, couriers, observed, stopped));
        let thread = std::thread::Builder::new()
            .name("alerts".to_owned())
            .spawn(work)
            .map_err(AlertingError::Thread)?;
        Ok(Self(Some(Arc::new(Inner { settled, counts, stop, thread: Mutex::new(Some(thread)) }))))
    }

    /// Takes a durable receipt in. Never waits: with too many before it, it is left out and counted.
    pub fn settled(&self, receipt: &Receipt) {
        let Some(inner) = &self.0 else { return };
        // Where nobody is charged there is nothing to say.
        if receipt.usage.status == crate::request::Finish::Error {
            return;
        }
        if inner.settled.try_send(settled(receipt)).is_err() {
            inner.counts.left_out.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Alerts that were raised since the start, by kind.
    pub fn raised(&self) -> impl Iterator<Item = (Kind, u64)> + '_ {
        let count =
            |at: usize| self.0.as_ref().map_or(0, |inner| inner.counts.raised[at].load(Ordering::Relaxed));
        Kind::ALL.into_iter().enumerate().map(move |(at, kind)| (kind, count(at)))
    }

    /// Settled requests that were not looked at, as too many came at once.
    #[must_use]
    pub fn left_out(&self) -> u64 {
        self.0.as_ref().map_or(0, |inner| inner.counts.left_out.load(Ordering::Relaxed))
    }

    /// Alerts that webhooks have not acknowledged yet.
    #[must_use]
    pub fn unsent(&self) -> u64 {
        self.0.as_ref().map_or(0, |inner| inner.counts.unsent.load(Ordering::Relaxed))
    }

    /// Writes down what was taken in, and gives webhooks a moment to hear of it. Blocks.
    pub fn close(&self) {
        let Some(inner) = &self.0 else { return };
        inner.stop.send_replace(true);
        let thread = lock(&inner.thread).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(
                "the thread of alerts has panicked; what it had written down is sent after the next start"
            );
        }
    }
}

fn settled(receipt: &Receipt) -> Settled {
    let who = &receipt.attribution;
    Settled {
        request: who.request.clone(),
        who: Spender::of(who.key_id.clone(), &who.tenant, who.user.clone(), &who.tags),
        at: receipt.usage.submitted_at,
        ended: receipt.usage.finished_at,
        cost: receipt.total(),
    }
}

/// What is behind it is whole after a panic: each critical section is one transaction, or one move.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Until it is told to stop: the watcher in the foreground, a courier for each webhook beside it.
async fn run(
    mut watcher: Watcher,
    couriers: Vec<webhook::Courier>,
    mut observed: mpsc::Receiver<Settled>,
    mut stopped: watch::Receiver<bool>,
) {
    let farewell = couriers.first().map(|courier| courier.tuning.farewell);
    let couriers: Vec<_> = couriers.into_iter().map(|courier| tokio::spawn(courier.run())).collect();
    watcher.catch_up();
    let mut tick = tokio::time::interval(watcher.tick);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut batch = Vec::new();
    loop {
        tokio::select! {
            // The sender lives as long as somebody may stop this.
            _ = stopped.wait_for(|stopped| *stopped) => break,
            _ = tick.tick() => watcher.look(),
            _ = observed.recv_many(&mut batch, 256) => {
                batch.drain(..).for_each(|settled| watcher.settled(&settled));
            }
        }
    }
    observed.close();
    while let Ok(settled) = observed.try_recv() {
        watcher.settled(&settled);
    }
    watcher.look();
    let parting = futures::future::join_all(couriers);
    if tokio::time::timeout(farewell.unwrap_or_default(), parting).await.is_err() {
        tracing::info!("alerts that webhooks have not acknowledged are sent after the next start");
    }
}

/// The side that looks.
struct Watcher {
    watch: Watch,
    outbox: Arc<Mutex<Outbox>>,
    budgets: Budgets,
    ledger: Ledger,
    control: Option<Control>,
    clock: Arc<dyn Clock>,
    counts: Arc<Counts>,
    targets: Vec<Target>,
    /// Wakes the couriers.
    news: Arc<Notify>,
    /// Alerts that the disk did not take.
    unwritten: Vec<Alert>,
    started: UnixNanos,
    tick: Duration,
}

impl Watcher {
    /// Raises what a crash may have kept from being written down. What was is not raised again.
    fn catch_up(&mut self) {
        let now = self.clock.wall();
        let due = self.watch.due(&self.budgets.standings(now), now);
        due.into_iter().for_each(|alert| self.raise(alert));
        let page = Page { limit: LOOK_BACK, ..Page::default() };
        match self.ledger.receipts(&ReceiptFilter::default(), &page) {
            Ok(page) => {
                let charged = |receipt: &&Receipt| receipt.usage.status != crate::request::Finish::Error;
                let alerts: Vec<Alert> = page
                    .receipts
                    .iter()
                    .rev()
                    .filter(charged)
                    .filter_map(|receipt| self.watch.expensive(&settled(receipt)))
                    .collect();
                alerts.into_iter().for_each(|alert| self.raise(alert));
            }
            Err(error) => tracing::error!(%error, "costs before the start were not looked at for alerts"),
        }
        self.write();
    }

    fn settled(&mut self, settled: &Settled) {
        for alert in self.watch.settled(&self.budgets.rules(), settled) {
            self.raise(alert);
        }
    }

    /// Looks at budgets and books, and writes down what is to be raised.
    fn look(&mut self) {
        let now = self.clock.wall();
        for crossing in self.budgets.take_crossings() {
            let alert = self.watch.crossed(&crossing, now);
            self.raise(alert);
        }
        for alert in self.watch.close(now, || self.budgets.standings(now)) {
            self.raise(alert);
        }
        if let Some(foreseen) = self.watch.take_foreseen()
            && let Err(error) = lock(&self.outbox).foresee(&foreseen)
        {
            tracing::error!(%error, "where budgets will end cannot be written down; it is tried again in a minute");
        }
        for device in &self.ledger.totals().devices {
            let errors = (device.conservation_error_ns, device.kv_conservation_error);
            let alert = self.watch.conservation(&device.device, errors, (self.started, now));
            if let Some(alert) = alert {
                self.raise(alert);
            }
        }
        self.write();
    }

    fn raise(&mut self, mut alert: Alert) {
        if let (Some(control), Some(key)) = (&self.control, alert.key().map(str::to_owned)) {
            match control.resolve(&key) {
                Ok((key, token)) => {
                    alert.name_key(&token.to_string(), key.settings.alias.as_deref());
                }
                Err(ControlError::NoSuchKey { .. }) => {}
                Err(error) => tracing::warn!(%error, "an alert goes without its key's alias"),
            }
        }
        if self.unwritten.len() >= UNWRITTEN_MAX {
            self.counts.left_out.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.unwritten.push(alert);
    }

    /// Writes alerts down; those that the disk does not take are tried again at the next look.
    fn write(&mut self) {
        let mut outbox = lock(&self.outbox);
        let mut raised = false;
        while let Some(alert) = self.unwritten.first() {
            match outbox.record(alert, &self.targets) {
                Ok(is_new) => {
                    let alert = self.unwritten.remove(0);
                    if is_new {
                        let message = alert.event()["event_message"].as_str().unwrap_or_default();
                        tracing::warn!(alert = alert.id, kind = alert.kind.name(), "{message}");
                        let at = Kind::ALL.iter().position(|kind| *kind == alert.kind);
                        self.counts.raised[at.expect("all kinds are there")].fetch_add(1, Ordering::Relaxed);
                        raised = true;
                    }
                }
                Err(error) => {
                    tracing::error!(%error, waiting = self.unwritten.len(), "an alert cannot be written down");
                    break;
                }
            }
        }
        match outbox.unsent() {
            Ok(unsent) => self.counts.unsent.store(unsent, Ordering::Relaxed),
            Err(error) => tracing::error!(%error, "cannot count alerts that are not sent"),
        }
        drop(outbox);
        if raised {
            self.news.notify_waiters();
        }
    }
}
