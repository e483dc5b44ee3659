//! Runs batches that have not ended, whoever made them and whichever process began with them: reads their input, keeps
//! some of their lines running, writes down what comes of them, and their files at the end.
//!
//! Knows no answer's contents. Invariant: of all batches together no more lines run than `max_running` allows.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use futures::FutureExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{Id, JoinHandle, JoinSet};
use tokio::time::Instant;

use super::line::{Order, Ran, Running};
use crate::batches::{
    Batch, Batches, BatchesError, FileFacts, Line, Outcome, Problem, Rules, Scanned, Status, scan,
};
use crate::control::Key;
use crate::http::envelope::panic_message;
use crate::http::error::ApiError;
use crate::http::files::on_disk;
use crate::http::{Server, router};

/// Batches that run at the same time; the others wait for their turn.
const BATCHES_MAX: usize = 64;
/// How often is looked for what was missed, or failed.
const LOOK: Duration = Duration::from_secs(1);
/// A line that met a bug is tried again after so long: a build without it may run then.
const AFTER_PANIC: Duration = Duration::from_secs(60);
/// Lines that run when their batch is cancelled get so long to end, and are charged then; the others are given up.
const CANCEL_PATIENCE: Duration = Duration::from_secs(600);
/// Lines that run beside as many as there are sequences, so that none of these waits for the next one's request.
const RUNNING_SPARE: usize = 4;

/// The task that runs a server's batches.
pub struct Runner {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Runner {
    /// Goes on with what has not ended. The server's model is loaded.
    ///
    /// # Panics
    /// When it is not, or the server keeps no batches.
    #[must_use]
    pub fn start(server: &Arc<Server>) -> Self {
        let app = server.app().expect("the server is ready");
        let batches = server.batches().expect("a server that keeps batches").clone();
        let sequences = app.engines().config().max_sequences * app.engines().each().len();
        let places = batches.limits().running.unwrap_or(sequences + RUNNING_SPARE);
        let shop = Arc::new(Shop {
            router: router(Arc::clone(server)),
            server: Arc::clone(server),
            batches,
            places: Arc::new(Semaphore::new(places)),
        });
        let (stop, stopped) = watch::channel(false);
        Self { stop, task: tokio::spawn(shop.open(stopped)) }
    }

    /// Gives up the lines that run, at nobody's cost, and returns when none runs; the next start goes on.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        if self.task.await.is_err() {
            tracing::error!("the task that runs batches ended in a panic");
        }
    }
}

struct Shop {
    server: Arc<Server>,
    router: Router,
    batches: Batches,
    /// For lines that run.
    places: Arc<Semaphore>,
}

/// Why no further line of a batch begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    /// Each has its result.
    Done,
    Cancelled,
    Expired,
    Stopped,
}

/// One batch's lines.
struct Queue {
    running: Arc<Running>,
    todo: VecDeque<Line>,
    /// Of lines that run, each holding a place.
    lines: JoinSet<(Line, Ran)>,
    orders: watch::Sender<Order>,
    /// No line begins before.
    paused: Option<Instant>,
}

impl Shop {
    async fn open(self: Arc<Self>, mut stopped: watch::Receiver<bool>) {
        let mut changes = self.batches.changes();
        let mut tasks = JoinSet::new();
        let mut driven: HashMap<Id, String> = HashMap::new();
        while !*stopped.borrow() {
            changes.borrow_and_update();
            match on_disk(&self.batches, Batches::unfinished).await {
                Ok(ids) => {
                    for id in ids {
                        if driven.len() < BATCHES_MAX && !driven.values().any(|known| *known == id) {
                            let drive = Arc::clone(&self).drive(id.clone(), stopped.clone());
                            driven.insert(tasks.spawn(drive).id(), id);
                        }
                    }
                }
                Err(error) => tracing::error!(?error, "batches cannot be read; they are looked at again"),
            }
            tokio::select! {
                _ = stopped.changed() => {}
                _ = changes.changed() => {}
                Some(ended) = tasks.join_next_with_id(), if !tasks.is_empty() => {
                    let task = match ended {
                        Ok((task, ())) => task,
                        Err(panic) => panic.id(),
                    };
                    driven.remove(&task);
                }
                () = tokio::time::sleep(LOOK) => {}
            }
        }
        while tasks.join_next().await.is_some() {}
    }

    async fn drive(self: Arc<Self>, id: String, mut stopped: watch::Receiver<bool>) {
        if let Err(error) = self.run(&id, &mut stopped).await {
            tracing::error!(batch = id, ?error, "a batch cannot go on; it is tried again");
            // Whoever drops the sender stops too.
            let _stopped = tokio::time::timeout(LOOK, stopped.wait_for(|stopped| *stopped)).await;
        }
    }

    /// From wherever it stands to its end, unless the server stops before.
    async fn run(&self, id: &str, stopped: &mut watch::Receiver<bool>) -> Result<(), ApiError> {
        let Some(batch) = self.batch(id).await? else { return Ok(()) };
        let Some(input) = self.input(&batch).await? else {
            // A file that a batch reads cannot be deleted; somebody has tampered with it.
            let message = "the input file is gone".to_owned();
            let problem = Problem { code: "file_not_found".into(), line: None, message, param: None };
            return self.fail(id, vec![problem]).await;
        };
        let lines = match self.validated(&batch, &input).await? {
            Ok(lines) => lines,
            Err(problems) => return self.fail(id, problems).await,
        };
        let Some(batch) = self.batch(id).await? else { return Ok(()) };
        let path = self.batches.path(&input);
        let input = on_disk(&self.batches, move |_| {
            File::open(&path).map_err(|source| BatchesError::Disk { path, source })
        });
        let ended = id.to_owned();
        let ended = on_disk(&self.batches, move |batches| batches.ended_lines(&ended)).await?;
        let todo = lines.into_iter().filter(|line| !ended.contains(&line.number)).collect();
        let (server, router) = (Arc::clone(&self.server), self.router.clone());
        let running = Arc::new(Running { server, router, batch, input: input.await? });
        let (orders, lines) = (watch::Sender::new(Order::GoOn), JoinSet::new());
        let mut queue = Queue { running, todo, lines, orders, paused: None };
        let over = self.work(&mut queue, stopped).await?;
        self.end(queue, over).await
    }

    async fn batch(&self, id: &str) -> Result<Option<Batch>, ApiError> {
        let id = id.to_owned();
        on_disk(&self.batches, move |batches| batches.batch(&id)).await
    }

    async fn input(&self, batch: &Batch) -> Result<Option<FileFacts>, ApiError> {
        let id = batch.input_file.clone();
        on_disk(&self.batches, move |batches| batches.file(&id)).await
    }

    async fn fail(&self, id: &str, problems: Vec<Problem>) -> Result<(), ApiError> {
        let id = id.to_owned();
        on_disk(&self.batches, move |batches| batches.fail(&id, &problems)).await
    }

    /// The lines of the input; where that is new, they were found good.
    async fn validated(&self, batch: &Batch, input: &FileFacts) -> Result<Scanned, ApiError> {
        let is_new = batch.status == Status::Validating;
        let key = self.key_of(batch);
        let (server, endpoint) = (Arc::clone(&self.server), batch.endpoint.clone());
        let (path, line_bytes_max) = (self.batches.path(input), self.server.config.body_bytes_max);
        let id = batch.id.clone();
        on_disk(&self.batches, move |batches| {
            let is_served = |model: &str| {
                let Ok(app) = server.app() else { return false };
                app.check_model(model).is_ok() && app.check_allowed(key.as_deref(), model).is_ok()
            };
            let anything = |_: &str| true;
            let rules = match is_new {
                true => {
                    let lines_max = batches.limits().lines;
                    Rules { endpoint: &endpoint, lines_max, line_bytes_max, is_served: &is_served }
                }
                // It was good when it began; what the server serves now is for each line to find out.
                false => Rules {
                    endpoint: &endpoint,
                    lines_max: usize::MAX,
                    line_bytes_max: usize::MAX,
                    is_served: &anything,
                },
            };
            let scanned = scan(&path, &rules).map_err(|source| BatchesError::Disk { path, source })?;
            if let (Ok(lines), true) = (&scanned, is_new) {
                batches.begin(&id, lines.len())?;
            }
            Ok(scanned)
        })
        .await
    }

    fn key_of(&self, batch: &Batch) -> Option<Arc<Key>> {
        let control = self.server.access.control.as_ref()?;
        control.resolve(batch.owner.key_id.as_ref()?).ok().map(|(key, _)| key)
    }

    /// Until no line of the batch runs any more.
    async fn work(&self, queue: &mut Queue, stopped: &mut watch::Receiver<bool>) -> Result<Over, ApiError> {
        let mut changes = self.batches.changes();
        let batch = &queue.running.batch;
        let left = batch.times.expires.saturating_sub(self.batches.now());
        let expires = Instant::now() + Duration::from_secs(left);
        let id = batch.id.clone();
        let over = loop {
            if *stopped.borrow() {
                break Over::Stopped;
            }
            if queue.todo.is_empty() && queue.lines.is_empty() {
                break Over::Done;
            }
            if self.batch(&id).await?.is_none_or(|batch| batch.status == Status::Cancelling) {
                break Over::Cancelled;
            }
            if Instant::now() >= expires {
                break Over::Expired;
            }
            let begins = !queue.todo.is_empty();
            let paused = queue.paused;
            let place = async {
                if let Some(until) = paused {
                    tokio::time::sleep_until(until).await;
                }
                Arc::clone(&self.places).acquire_owned().await.expect("it is never closed")
            };
            tokio::select! {
                biased;
                _ = stopped.changed() => {}
                _ = changes.changed() => {}
                () = tokio::time::sleep_until(expires) => {}
                Some(ended) = queue.lines.join_next(), if !queue.lines.is_empty() => {
                    self.take(queue, ended).await;
                }
                place = place, if begins => queue.begin(place),
            }
        };
        self.wind_up(queue, over, stopped).await;
        Ok(over)
    }

    /// What runs when no further line begins: it may end, or is given up.
    async fn wind_up(&self, queue: &mut Queue, over: Over, stopped: &mut watch::Receiver<bool>) {
        if over == Over::Cancelled {
            let patience = Instant::now() + CANCEL_PATIENCE;
            while !queue.lines.is_empty() && !*stopped.borrow() {
                tokio::select! {
                    _ = stopped.changed() => {}
                    () = tokio::time::sleep_until(patience) => break,
                    Some(ended) = queue.lines.join_next() => self.take(queue, ended).await,
                }
            }
        }
        let stops = over == Over::Stopped || *stopped.borrow();
        queue.orders.send_replace(if stops { Order::Stop } else { Order::GiveUp });
        while let Some(ended) = queue.lines.join_next().await {
            self.take(queue, ended).await;
        }
    }

    /// Writes down what came of a line.
    async fn take(&self, queue: &mut Queue, ended: Result<(Line, Ran), tokio::task::JoinError>) {
        // Lines are aborted by nobody, and catch their panics.
        let (line, ran) = ended.expect("a line's task ends by itself");
        match ran {
            Ran::Ended(outcome) => self.record(&queue.running.batch.id, outcome).await,
            Ran::Later(wait) => {
                queue.paused = Some(Instant::now() + wait);
                queue.todo.push_front(line);
            }
            Ran::GivenUp => queue.todo.push_front(line),
        }
    }

    /// For as long as it takes: what was charged is not given up for a full disk.
    async fn record(&self, id: &str, outcome: Outcome) {
        let outcome = Arc::new(outcome);
        loop {
            let (id, outcome) = (id.to_owned(), Arc::clone(&outcome));
            let line = outcome.line;
            match on_disk(&self.batches, move |batches| batches.record(&id, &outcome)).await {
                Ok(()) => return,
                // The runtime is being shut down; the next start finds the receipt.
                Err(ApiError::Loading) => return,
                Err(error) => {
                    tracing::error!(line, ?error, "a batch's result cannot be written; it is tried again");
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
    }

    async fn end(&self, queue: Queue, over: Over) -> Result<(), ApiError> {
        let Queue { running, todo, .. } = queue;
        let id = running.batch.id.clone();
        let now = self.batch(&id).await?.map(|batch| batch.status);
        let end = match over {
            Over::Stopped => return Ok(()),
            _ if now == Some(Status::Cancelling) => Status::Cancelled,
            _ if todo.is_empty() => Status::Completed,
            _ => Status::Expired,
        };
        let mut left = Vec::new();
        if end == Status::Expired {
            for line in todo {
                left.push(running.expired(line).await?);
            }
        }
        drop(running);
        on_disk(&self.batches, move |batches| batches.finish(&id, end, &left)).await
    }
}

impl Queue {
    fn begin(&mut self, place: OwnedSemaphorePermit) {
        self.paused = None;
        let Some(line) = self.todo.pop_front() else { return };
        let (running, orders) = (Arc::clone(&self.running), self.orders.subscribe());
        self.lines.spawn(async move {
            let ran = AssertUnwindSafe(Arc::clone(&running).run(line, orders)).catch_unwind().await;
            drop(place);
            let ran = ran.unwrap_or_else(|panic| {
                let (batch, panic) = (&running.batch.id, panic_message(&*panic));
                tracing::error!(batch, line = line.number, "a line of a batch panicked, a bug: {panic}");
                Ran::Later(AFTER_PANIC)
            });
            (line, ran)
        });
    }
}
