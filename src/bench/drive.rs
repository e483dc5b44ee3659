//! Loads: closed and open loops of conversations against anything that answers. Knows no protocol.
//!
//! Time counts from when a request should have been sent: in an open loop that is its arrival, even if a
//! limit or a busy load generator kept it back.

use std::cell::Cell;
use std::time::{Duration, Instant};

use futures::future::join_all;
use tokio::sync::Semaphore;

use super::plan::Load;
use super::workload::{Dialogue, Script};
use crate::measure::asking::closed_loop;

/// What came back.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Reply {
    pub(super) sent: Instant,
    /// When parts of the answer came; not empty.
    pub(super) came: Vec<Instant>,
    pub(super) text: String,
    pub(super) output_tokens: u64,
    pub(super) told: Told,
}

/// What a server told about a request; an engine's meter tells it of all requests together.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Told {
    pub(super) input_tokens: Option<u64>,
    pub(super) cached_tokens: Option<u64>,
    pub(super) cost: Option<f64>,
    pub(super) device_seconds: Option<f64>,
}

/// One request.
#[derive(Debug, Clone)]
pub(super) struct Record {
    /// When it should have been sent.
    pub(super) due: Instant,
    pub(super) outcome: Result<Reply, String>,
}

/// One load's requests, from its beginning to the last one's end.
pub(super) struct Driven {
    pub(super) records: Vec<Record>,
    pub(super) duration: Duration,
    /// Most requests that were under way at once.
    pub(super) in_flight_max: usize,
}

/// Counts what is under way.
#[derive(Default)]
struct InFlight {
    now: Cell<usize>,
    max: Cell<usize>,
}

impl InFlight {
    fn enter(&self) {
        self.now.set(self.now.get() + 1);
        self.max.set(self.max.get().max(self.now.get()));
    }

    fn leave(&self) {
        self.now.set(self.now.get() - 1);
    }
}

/// Runs all `scripts` under a load; `arrivals` are the open loop's instants. `told` hears how many
/// conversations have ended.
pub(super) async fn drive(
    load: &Load,
    scripts: &[Script],
    arrivals: &[Duration],
    ask: impl AsyncFn(&Dialogue) -> Result<Reply, String>,
    told: impl Fn(u64),
) -> Driven {
    let begin = Instant::now();
    let (in_flight, ended) = (InFlight::default(), Cell::new(0));
    let converse = async |script: &Script, due: Instant| {
        let records = conversation(script, due, &in_flight, &ask).await;
        ended.set(ended.get() + 1);
        told(ended.get());
        records
    };
    let records: Vec<Vec<Record>> = match load {
        Load::Closed { concurrency } => {
            let each = scripts.len() / concurrency;
            closed_loop(*concurrency, each, async |client, index| {
                converse(&scripts[index * concurrency + client], Instant::now()).await
            })
            .await
        }
        Load::Open(open) => {
            let limit = Semaphore::new(open.max_concurrency.unwrap_or(Semaphore::MAX_PERMITS));
            let all = scripts.iter().zip(arrivals).map(async |(script, &after)| {
                let due = begin + after;
                tokio::time::sleep_until(due.into()).await;
                let _permit = limit.acquire().await.expect("nobody closes the semaphore; this is a bug");
                converse(script, due).await
            });
            join_all(all).await
        }
    };
    Driven {
        records: records.into_iter().flatten().collect(),
        duration: begin.elapsed(),
        in_flight_max: in_flight.max.get(),
    }
}

/// A conversation's turns, one after another. What follows a failed turn cannot be asked, and is a failure too.
async fn conversation(
    script: &Script,
    mut due: Instant,
    in_flight: &InFlight,
    ask: &impl AsyncFn(&Dialogue) -> Result<Reply, String>,
) -> Vec<Record> {
    let mut dialogue = Dialogue::new(script);
    let mut records: Vec<Record> = Vec::with_capacity(script.questions.len());
    for turn in 0..script.questions.len() {
        in_flight.enter();
        let outcome = ask(&dialogue).await;
        in_flight.leave();
        let answer = outcome.as_ref().ok().map(|reply| reply.text.clone());
        records.push(Record { due, outcome });
        due = Instant::now();
        match (answer, script.questions.get(turn + 1)) {
            (Some(answer), Some(question)) => dialogue.go_on(answer, question),
            (None, Some(_)) => {
                let unasked = || Err("not asked, since the turn before it failed".to_owned());
                records.resize_with(script.questions.len(), || Record { due, outcome: unasked() });
                break;
            }
            (_, None) => {}
        }
    }
    records
}
