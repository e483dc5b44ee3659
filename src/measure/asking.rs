//! Requests through the engine that the server uses, and closed loops of clients. A closed loop sends its
//! next request when the last one has ended. What the meter charged comes after the answers.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use futures::future::join_all;

use crate::engine::{EngineHandle, EventStream, Seat};
use crate::request::{CacheSalt, Event, Finish, NewRequest, Sampling, Stops, Tier};
use crate::units::{RequestId, Ticket};
use crate::usage::{MeterReport, Usage};

/// How long the meter's report may take after the last answer.
const REPORT: Duration = Duration::from_secs(30);

/// Why there is no answer, for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NoAnswer(pub String);

/// An engine over a model, and what its meter reports.
pub struct Running {
    pub engine: EngineHandle,
    pub reports: Receiver<MeterReport>,
}

impl Drop for Running {
    /// The model goes with the engine's thread; the next one needs the memory.
    fn drop(&mut self) {
        self.engine.shutdown();
    }
}

/// One request's tokens and when they came.
pub struct Answer {
    pub tokens: Vec<u32>,
    pub sent: Instant,
    pub came: Vec<Instant>,
}

/// A runtime on this thread alone: load may take one core at most.
///
/// # Errors
/// When the operating system refuses.
pub fn runtime() -> Result<tokio::runtime::Runtime, NoAnswer> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| NoAnswer(error.to_string()))
}

/// A greedy request for so many tokens. Without a salt it gets one of its own, and finds nobody's prefix.
#[must_use]
pub fn request(prompt: Arc<[u32]>, tokens: usize, ignore_eos: bool, salt: Option<CacheSalt>) -> NewRequest {
    let id = RequestId::new();
    NewRequest {
        allowance: None,
        grammar: None,
        score_prompts: false,
        vectors: None,
        tenant: "anonymous".into(),
        tier: Tier::Default,
        ticket: Ticket(0),
        salt: salt.unwrap_or_else(|| CacheSalt(*blake3::hash(id.0.as_bytes()).as_bytes())),
        id,
        prompt: prompt.into(),
        choices: 1,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        stops: Stops { max_tokens: tokens as u32, min_tokens: 0, ignore_eos, stop_token_ids: Vec::new() },
    }
}

/// Asks and waits for the answer's end.
///
/// # Errors
/// When the queue is full or the engine fails.
pub async fn ask(engine: &EngineHandle, request: NewRequest) -> Result<Answer, NoAnswer> {
    answer(reserve(engine)?, request).await
}

/// A place in the queue, of which every one that is used is settled.
///
/// # Errors
/// When there is none.
pub fn reserve(engine: &EngineHandle) -> Result<Seat, NoAnswer> {
    engine.reserve().map_err(|refused| NoAnswer(refused.to_string()))
}

/// The answer to a request that has a place in the queue.
///
/// # Errors
/// When the engine fails.
pub async fn answer(seat: Seat, request: NewRequest) -> Result<Answer, NoAnswer> {
    let mut answer = Answer { tokens: Vec::new(), sent: Instant::now(), came: Vec::new() };
    let mut events: EventStream = seat.submit(request);
    loop {
        match events.next().await {
            Some(Event::Token { token, .. }) => {
                answer.came.push(Instant::now());
                answer.tokens.push(token);
            }
            // Nobody asks for these here.
            Some(Event::Prompt { .. } | Event::Vector { .. }) => {}
            Some(Event::Finished { finish: Finish::Stop | Finish::Length, .. }) => return Ok(answer),
            Some(Event::Finished { .. }) | None => {
                return Err(NoAnswer("the engine failed; the log says why".into()));
            }
        }
    }
}

/// Takes the meter's reports until `requests` requests have been settled.
///
/// # Errors
/// When the meter falls silent before.
///
/// # Panics
/// When more requests are settled than were asked.
pub fn settled(reports: &Receiver<MeterReport>, requests: usize) -> Result<Vec<Usage>, NoAnswer> {
    let mut usages = Vec::with_capacity(requests);
    while usages.len() < requests {
        let report = reports.recv_timeout(REPORT);
        let report = report.map_err(|_| NoAnswer("the meter does not report".into()))?;
        usages.extend(report.finished);
    }
    assert_eq!(usages.len(), requests, "every request is settled once");
    Ok(usages)
}

/// A closed loop: `clients` clients at once, each asking `requests` times, one after another. `ask` gets the
/// client's number and its request's.
pub async fn closed_loop<T>(clients: usize, requests: usize, ask: impl AsyncFn(usize, usize) -> T) -> Vec<T> {
    let ask = &ask;
    let loops = (0..clients).map(async |client| {
        let mut answers = Vec::with_capacity(requests);
        for index in 0..requests {
            answers.push(ask(client, index).await);
        }
        answers
    });
    join_all(loops).await.into_iter().flatten().collect()
}
