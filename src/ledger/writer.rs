//! The two threads behind the handle.
//!
//! The inbox takes reports from the meter the moment they come, whatever the disk does, and watches the
//! clock for those who wait. The writer books what has come, commits it in one transaction, and resolves
//! the waiters. A commit that fails is tried again until it succeeds; what came meanwhile waits in order.
//!
//! Does not know: SQL, prices.
//! Invariants: each report is booked once, whatever happens to its commit; a waiter that resolves with a
//! receipt resolves after the commit; neither thread panics on what the disk or the meter does, and if the
//! writer panics all the same, nothing more is written and nobody waits for it.

use std::collections::HashMap;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::books::{Books, NextTransaction, Record};
use super::entry::IDLE;
use super::group::Group;
use super::receipt::{Attribution, Claim, Receipt};
use super::recovery::Opened;
use super::store::Store;
use super::totals::Totals;
use super::{LedgerUnavailable, MethodRecord, Tuning, coarse, lock};
use crate::units::{RequestId, Ticket};
use crate::usage::{MeterReport, Purse, Snapshot, Usage};

pub(super) type Answer = Result<Arc<Receipt>, LedgerUnavailable>;

/// How often the inbox looks at the clock.
const TICK: Duration = Duration::from_millis(50);
/// While only idle time grows, the checkpoint is written this much less often.
const IDLE_FACTOR: u32 = 10;
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// A request between adoption and the commit of its receipt.
pub(super) struct Adopted {
    pub(super) who: Attribution,
    pub(super) purse: Option<Arc<dyn Purse>>,
    pub(super) waiter: Option<oneshot::Sender<Answer>>,
    /// When the meter reported it.
    pub(super) reported: Option<Instant>,
    /// Its receipt is made; a second report of it would be a bug.
    pub(super) booked: bool,
}

#[derive(Default)]
pub(super) struct Adoptions {
    pub(super) by_ticket: HashMap<Ticket, Adopted>,
    /// Scope and key of each adopted request that has one.
    pub(super) idempotency: HashMap<(String, String), RequestId>,
    /// How many have left `idempotency`.
    pub(super) keys_left: u64,
}

/// The scope and the idempotency key of a request that has one. No `key_id` is the empty one, as in the
/// database's index.
pub(super) fn scope(who: &Attribution) -> Option<(String, String)> {
    let key = who.idempotency_key.clone()?;
    Some((who.key_id.clone().unwrap_or_default(), key))
}

impl Adoptions {
    pub(super) fn remove(&mut self, ticket: Ticket) -> Option<Adopted> {
        let adopted = self.by_ticket.remove(&ticket)?;
        if let Some(scope) = scope(&adopted.who) {
            self.idempotency.remove(&scope);
            self.keys_left += 1;
        }
        Some(adopted)
    }

    /// A reported ticket stays: its receipt will be written, and its key must not be given out before.
    pub(super) fn release(&mut self, ticket: Ticket) {
        if self.by_ticket.get(&ticket).is_some_and(|adopted| adopted.reported.is_some()) {
            tracing::error!(ticket = ticket.0, "a request that has ended was released: its receipt stands");
        } else {
            self.remove(ticket);
        }
    }
}

/// What the handle, the inbox and the writer share.
pub(super) struct Shared {
    pub(super) adoptions: Mutex<Adoptions>,
    pub(super) totals: Mutex<Totals>,
    state: Mutex<State>,
    wake: Condvar,
    pub(super) tuning: Tuning,
}

#[derive(Default)]
struct State {
    inbox: Vec<Message>,
    closing: bool,
    /// The writer has ended, cleanly or not.
    ended: Option<bool>,
    /// The last commit failed.
    failing: bool,
    /// The meter broke the law, or the writer panicked; nothing is written any more.
    fault: bool,
    committing_since: Option<Instant>,
}

/// Of an engine, by its number, where one is given.
enum Message {
    Report(usize, MeterReport),
    Method(usize, MethodRecord),
    /// The engine's meter is gone: no report follows.
    MeterGone(usize),
    /// All reports that the engine sent before the close have come.
    Close(usize),
}

impl Shared {
    pub(super) fn new(tuning: Tuning, totals: Totals) -> Self {
        Self {
            adoptions: Mutex::default(),
            totals: Mutex::new(totals),
            state: Mutex::default(),
            wake: Condvar::new(),
            tuning,
        }
    }

    pub(super) fn is_available(&self) -> bool {
        let state = lock(&self.state);
        let slow = state.committing_since.is_some_and(|since| since.elapsed() > self.tuning.patience);
        !(state.failing || state.fault || state.closing || state.ended.is_some() || slow)
    }

    pub(super) fn send_method(&self, engine: usize, method: MethodRecord) {
        self.push(Message::Method(engine, method));
    }

    fn push(&self, message: Message) {
        lock(&self.state).inbox.push(message);
        self.wake.notify_all();
    }

    /// Asks for the end and waits for it; `false`: the books could not be closed in time.
    pub(super) fn close(&self) -> bool {
        let deadline = Instant::now() + self.tuning.patience + Duration::from_secs(1);
        let mut state = lock(&self.state);
        state.closing = true;
        self.wake.notify_all();
        loop {
            if let Some(clean) = state.ended {
                return clean;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.wait(state, left);
        }
    }

    fn wait<'a>(
        &self,
        state: std::sync::MutexGuard<'a, State>,
        limit: Duration,
    ) -> std::sync::MutexGuard<'a, State> {
        self.wake.wait_timeout(state, limit).unwrap_or_else(std::sync::PoisonError::into_inner).0
    }

    /// Gives up on those who have waited too long; their receipts are still written.
    fn release_overdue(&self) {
        let overdue = |since: Instant| since.elapsed() > self.tuning.patience;
        for adopted in lock(&self.adoptions).by_ticket.values_mut() {
            if adopted.reported.is_some_and(overdue) {
                resolve(&mut adopted.waiter, Err(LedgerUnavailable));
            }
        }
    }
}

fn resolve(waiter: &mut Option<oneshot::Sender<Answer>>, answer: Answer) {
    if let Some(waiter) = waiter.take()
        && waiter.send(answer).is_err()
    {
        tracing::trace!("nobody waits for the receipt any more");
    }
}

/// Takes an engine's reports until its meter is gone or the ledger closes.
pub(super) fn run_inbox(shared: &Shared, engine: usize, reports: &Receiver<MeterReport>) {
    let take = |report: MeterReport| {
        let now = Instant::now();
        let mut adoptions = lock(&shared.adoptions);
        for usage in &report.finished {
            if let Some(adopted) = adoptions.by_ticket.get_mut(&usage.ticket) {
                adopted.reported = Some(now);
            }
        }
        drop(adoptions);
        shared.push(Message::Report(engine, report));
    };
    let mut meter_gone = false;
    loop {
        if meter_gone {
            std::thread::sleep(TICK);
        } else {
            match reports.recv_timeout(TICK) {
                Ok(report) => take(report),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    meter_gone = true;
                    shared.push(Message::MeterGone(engine));
                }
            }
        }
        shared.release_overdue();
        let state = lock(&shared.state);
        let (closing, ended) = (state.closing, state.ended.is_some());
        drop(state);
        if ended {
            return;
        }
        if closing && !meter_gone {
            // What was sent before the close is in the channel by now.
            reports.try_iter().for_each(take);
            shared.push(Message::Close(engine));
            meter_gone = true;
        } else if closing {
            shared.push(Message::Close(engine));
        }
    }
}

/// The thread that owns the database.
pub(super) struct Writer {
    shared: Arc<Shared>,
    store: Store,
    /// One for each engine.
    groups: Vec<Group>,
    next: NextTransaction,
    lock: File,
    /// Booked but not committed, in order.
    records: Vec<Record>,
    methods: Vec<MethodRecord>,
    /// Where each group stood at the last commit.
    written: Vec<Snapshot>,
    written_at: Instant,
    backoff: Duration,
    retry_at: Option<Instant>,
    coarse: coarse::Progress,
    faulty: bool,
    /// Engines of which all has come that was sent before the close.
    closing: Vec<bool>,
    ending: bool,
    /// Whether nobody holds the handle any more.
    handles_gone: Box<dyn Fn() -> bool + Send>,
    /// Engines whose meter is gone.
    meters_gone: Vec<bool>,
}

impl Writer {
    pub(super) fn new(
        shared: Arc<Shared>,
        opened: Opened,
        handles_gone: Box<dyn Fn() -> bool + Send>,
    ) -> Self {
        let Opened { store, groups, next_transaction, lock } = opened;
        let engines = groups.len();
        Self {
            shared,
            store,
            written: groups.iter().map(|group| group.last().clone()).collect(),
            groups,
            next: next_transaction,
            lock,
            records: Vec::new(),
            methods: Vec::new(),
            written_at: Instant::now(),
            backoff: BACKOFF_MIN,
            retry_at: None,
            coarse: coarse::Progress::default(),
            faulty: false,
            closing: vec![false; engines],
            ending: false,
            handles_gone,
            meters_gone: vec![false; engines],
        }
    }

    pub(super) fn run(mut self) {
        let mut panicked = false;
        let clean = loop {
            match catch_unwind(AssertUnwindSafe(|| self.serve())) {
                Ok(clean) => break clean && !panicked,
                Err(_) if panicked => break false,
                Err(_) => {
                    // The hook has printed where. Half-changed books are never looked at again: `serve` only
                    // answers those who wait, until the end.
                    panicked = true;
                    tracing::error!("the ledger's writer panicked: this is a bug; the books are stopped");
                    self.stop();
                }
            }
        };
        self.fail_all_waiters();
        let Self { shared, lock: directory, .. } = self;
        if panicked {
            #[expect(
                clippy::disallowed_methods,
                reason = "nobody else may write here before this process is gone"
            )]
            std::mem::forget(directory);
        } else {
            // The directory is free before anybody hears of the end.
            drop(directory);
        }
        lock(&shared.state).ended = Some(clean);
        shared.wake.notify_all();
    }

    /// Until the books are closed (true), broken, or nobody is left to write for (false).
    fn serve(&mut self) -> bool {
        loop {
            for message in self.next_messages() {
                match message {
                    Message::Report(engine, report) => self.book(engine, report),
                    Message::Method(engine, method) => {
                        self.groups[engine].method = Some(method.id.clone());
                        self.methods.push(method);
                    }
                    Message::MeterGone(engine) => self.meters_gone[engine] = true,
                    Message::Close(engine) => self.closing[engine] = true,
                }
            }
            let closing = self.closing.iter().all(|closing| *closing);
            if self.faulty {
                self.fail_all_waiters();
                if closing || (self.handles_gone)() {
                    return false;
                }
                continue;
            }
            if closing && !self.ending {
                self.ending = true;
                for group in &mut self.groups {
                    self.records.extend(group.end(&mut self.next, attribution(&self.shared)));
                }
            }
            if self.is_due() {
                self.commit();
            }
            if self.records.is_empty() {
                if self.ending {
                    self.store.fold();
                    return true;
                }
                if self.meters_gone.iter().all(|gone| *gone) && (self.handles_gone)() {
                    return false;
                }
                let hours = self.groups.iter().flat_map(|group| &group.books).map(|books| books.hour);
                self.coarse.extend(&mut self.store, hours.min().unwrap_or(0));
            }
        }
    }

    /// What has come; waits for it, but not beyond the next checkpoint or retry.
    fn next_messages(&self) -> Vec<Message> {
        let mut state = lock(&self.shared.state);
        if state.inbox.is_empty() && !self.is_due() {
            let retry = self.retry_at.map(|at| at.saturating_duration_since(Instant::now()));
            let limit = retry.unwrap_or(TICK * 2).min(self.shared.tuning.checkpoint);
            state = self.shared.wait(state, limit.max(Duration::from_millis(1)));
        }
        std::mem::take(&mut state.inbox)
    }

    fn book(&mut self, engine: usize, report: MeterReport) {
        if self.faulty {
            return;
        }
        let who = attribution(&self.shared);
        match self.groups[engine].apply(report, &mut self.next, who) {
            Ok(records) => self.records.extend(records),
            Err(fault) => {
                tracing::error!(%fault, "the books are stopped: nothing is written that does not add up");
                self.stop();
            }
        }
    }

    /// For good: what is not committed stays unwritten, and the next start closes the epoch at its last
    /// checkpoint.
    fn stop(&mut self) {
        self.faulty = true;
        lock(&self.shared.state).fault = true;
    }

    fn has_work(&self) -> bool {
        !self.records.is_empty() || !self.methods.is_empty()
    }

    /// Records are committed at once, a mere change of the checkpoint from time to time.
    fn is_due(&self) -> bool {
        if self.faulty || self.retry_at.is_some_and(|at| Instant::now() < at) {
            return false;
        }
        if self.has_work() {
            return true;
        }
        let mut stands = self.written.iter().zip(self.groups.iter().map(Group::last));
        if stands.clone().all(|(written, last)| written == last) {
            return false;
        }
        let every = self.shared.tuning.checkpoint;
        let since = self.written_at.elapsed();
        since >= every * IDLE_FACTOR
            || (since >= every && !stands.all(|(written, last)| only_idle_grew(written, last)))
    }

    fn commit(&mut self) {
        lock(&self.shared.state).committing_since = Some(Instant::now());
        let shared = Arc::clone(&self.shared);
        let mut stored = |ticket: Ticket| {
            let adoptions = lock(&shared.adoptions);
            let who = &adoptions.by_ticket.get(&ticket)?.who;
            Some(serde_json::to_string(who).expect("strings and maps of strings are JSON"))
        };
        let running = self.groups.iter().filter(|_| !self.ending);
        let books: Vec<&Books> = running.flat_map(|group| &group.books).collect();
        let result = self.store.commit(&self.records, &self.methods, &books, &mut stored);
        let mut state = lock(&self.shared.state);
        state.committing_since = None;
        match result {
            Ok(()) => {
                if state.failing {
                    tracing::info!("the ledger can write again");
                }
                state.failing = false;
                drop(state);
                self.backoff = BACKOFF_MIN;
                self.retry_at = None;
                self.committed();
            }
            Err(error) if is_permanent(&error) => {
                drop(state);
                self.stop();
                tracing::error!(%error, "the books are stopped: the database refuses what does not fit together");
            }
            Err(error) => {
                if !state.failing {
                    tracing::error!(%error, "the ledger cannot write; receipts are kept and tried again");
                }
                state.failing = true;
                drop(state);
                self.retry_at = Some(Instant::now() + self.backoff);
                self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
            }
        }
    }

    fn committed(&mut self) {
        self.written.clear();
        self.written.extend(self.groups.iter().map(|group| group.last().clone()));
        self.written_at = Instant::now();
        self.methods.clear();
        let records = std::mem::take(&mut self.records);
        let mut totals = lock(&self.shared.totals);
        for record in &records {
            totals.add(record);
        }
        let books = self.groups.iter().flat_map(|group| &group.books);
        totals.stand(books.map(|books| &books.last));
        drop(totals);
        let mut adoptions = lock(&self.shared.adoptions);
        for record in records {
            if let Record::Receipt { receipt, .. } = record
                && let Some(mut adopted) = adoptions.remove(receipt.usage.ticket)
            {
                resolve(&mut adopted.waiter, Ok(receipt));
            }
        }
    }

    fn fail_all_waiters(&self) {
        for adopted in lock(&self.shared.adoptions).by_ticket.values_mut() {
            resolve(&mut adopted.waiter, Err(LedgerUnavailable));
        }
    }
}

/// Looks a finished request up; a ticket that is not known, or another request's, or reported before,
/// is a bug elsewhere.
fn attribution(shared: &Arc<Shared>) -> impl FnMut(&Usage) -> Option<Claim> + use<> {
    let shared = Arc::clone(shared);
    move |usage| {
        let mut adoptions = lock(&shared.adoptions);
        let known = adoptions
            .by_ticket
            .get_mut(&usage.ticket)
            .filter(|adopted| adopted.who.request == usage.request && !adopted.booked);
        if let Some(adopted) = known {
            adopted.booked = true;
            return Some(Claim { who: adopted.who.clone(), purse: adopted.purse.take() });
        }
        tracing::error!(
            request = %usage.request,
            ticket = usage.ticket.0,
            "the meter reports a request that was never adopted, or twice: booked to house:error"
        );
        None
    }
}

fn only_idle_grew(old: &Snapshot, new: &Snapshot) -> bool {
    let mut busy = (old.house_time, new.house_time);
    busy.0[IDLE] = busy.1[IDLE];
    busy.0 == busy.1
        && old.settled_device == new.settled_device
        && old.open == new.open
        && old.pool == new.pool
}

/// Errors that no retry heals: a row that breaks a constraint or does not fit its column, a statement that the
/// database does not understand.
fn is_permanent(error: &rusqlite::Error) -> bool {
    use rusqlite::Error::{SqlInputError, ToSqlConversionFailure};
    matches!(error, ToSqlConversionFailure(_) | SqlInputError { .. })
        || error.sqlite_error_code() == Some(rusqlite::ErrorCode::ConstraintViolation)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::ledger::{DeviceInfo, LedgerError, OpenOptions, RateCard, recovery};
    use crate::units::UnixNanos;

    #[test]
    fn a_panic_of_the_writer_answers_all_and_keeps_the_directory_locked() {
        let dir = tempfile::tempdir().unwrap();
        let device = DeviceInfo { id: "cpu".into(), kind: "cpu".into(), name: "a processor".into() };
        let rate = RateCard::parse("1", "0.2", "USD", None).unwrap();
        let wall = UnixNanos(1_790_000_000_000_000_000);
        let options = OpenOptions::one(device, rate, wall, "boot".into());
        let in_use = || matches!(recovery::open(dir.path(), &options), Err(LedgerError::InUse { .. }));
        let tuning = Tuning { patience: Duration::from_secs(5), checkpoint: Duration::from_millis(10) };
        let shared = Arc::new(Shared::new(tuning, Totals::new("USD", ["cpu".into()])));
        let (waiter, answer) = oneshot::channel();
        let who = Attribution {
            request: RequestId("a".into()),
            client_request_id: None,
            idempotency_key: None,
            key_id: None,
            tenant: "anonymous".into(),
            user: None,
            metadata: Default::default(),
            tags: Default::default(),
            model: "small".into(),
            precision: "Q4_1".into(),
            endpoint: "/v1/completions".into(),
            tier: crate::request::Tier::Default,
        };
        let adopted = Adopted { who, purse: None, waiter: Some(waiter), reported: None, booked: false };
        lock(&shared.adoptions).by_ticket.insert(Ticket(1), adopted);
        let first = AtomicBool::new(true);
        let handles_gone = Box::new(move || {
            assert!(!first.swap(false, Ordering::SeqCst), "a panic for the test");
            false
        });
        let opened = recovery::open(dir.path(), &options).unwrap();
        let writer = Writer::new(Arc::clone(&shared), opened, handles_gone);
        let thread = std::thread::spawn(move || writer.run());
        assert!(shared.is_available());
        shared.push(Message::MeterGone(0));
        assert_eq!(answer.blocking_recv().unwrap(), Err(LedgerUnavailable));
        assert!(!shared.is_available());
        assert!(in_use(), "while the server runs on");
        shared.push(Message::Close(0));
        assert!(!shared.close(), "not clean");
        thread.join().unwrap();
        assert!(in_use(), "until the process ends");
    }
}
