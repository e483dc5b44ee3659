//! One line of a batch, from its request to its record: the request goes the way of any other, as if it had come over
//! the network, and so meets the same checks, limits, budgets and books.
//!
//! **Charged once.** A receipt is durable before its answer is, as with every request. So a crash can leave a line
//! that was charged and has no result. Two ways lead out of that. Results could be written before their receipts: then
//! the books would wait for this database, and a result could stand without ever being charged. We do the other:
//! every attempt at a line has an idempotency key of its own, of the batch, the line and a number, so the ledger knows
//! of each attempt how it ended, whatever this process forgot. Before a line is run its receipts are looked at:
//!
//! - none: the attempt begins, and whoever made the batch pays for it;
//! - one that charged nothing (a crash, an error, a refusal, given up by us): the next attempt begins likewise;
//! - one that charged: the answer is lost, and is computed again, for the house. It is the same one, as a line without
//!   a seed has its seed from the batch and its number, and rows depend on nothing else; and it is told with the
//!   receipt that was charged.
//!
//! An attempt that is adopted and not settled yet, as when the disk is slow, holds its key: the next one waits for it.
//! What is given up (the window ended, the server stops) is on the house, unless it was booked already, which is found
//! out before anything else happens to the line. So a line is charged at most once, and none without its result.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::sync::watch;
use tower::ServiceExt;

use crate::batches::{Batch, Line, Outcome, Tokens};
use crate::control::{Denied, Key, KeyId};
use crate::http::Server;
use crate::http::auth::Behalf;
use crate::http::error::ApiError;
use crate::http::receipts::from_ledger;
use crate::ledger::{Ledger, LedgerError, Receipt};
use crate::pipeline::BatchLine;
use crate::request::Finish;
use crate::units::Picos;

/// How often it is looked whether others wait, or an attempt is settled.
const LOOK: Duration = Duration::from_millis(20);
/// A given up attempt is settled in this time, or never began.
const SETTLED_WITHIN: Duration = Duration::from_secs(3);
/// The longest that a line waits for its key's budget before it asks again: the budget may be raised.
const BUDGET_WAIT_MAX: u64 = 300;
const FAULTS_MAX: u32 = 3;

/// What the lines of a batch are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    GoOn,
    /// Their results are not wanted any more.
    GiveUp,
    /// The server stops: the next start goes on.
    Stop,
}

/// What came of a line.
pub(super) enum Ran {
    Ended(Outcome),
    /// It cannot run now; in so long it may.
    Later(Duration),
    /// It has no result, and nobody was charged for it.
    GivenUp,
}

/// A batch that runs.
pub(super) struct Running {
    pub(super) server: Arc<Server>,
    /// All routes of the server.
    pub(super) router: Router,
    pub(super) batch: Batch,
    pub(super) input: File,
}

/// What the ledger knows of a line.
struct Past {
    /// Attempts that have a receipt.
    attempts: u32,
    /// The one that was charged.
    charged: Option<Receipt>,
}

/// An attempt's answer.
struct Answered {
    status: StatusCode,
    headers: HeaderMap,
    body: Value,
    /// The same as it would have gone over the network: reading its numbers and writing them again may change them.
    text: String,
}

impl Running {
    pub(super) async fn run(self: Arc<Self>, line: Line, mut orders: watch::Receiver<Order>) -> Ran {
        match self.attempt(line, &mut orders).await {
            Ok(ran) => ran,
            Err(error) => {
                tracing::warn!(batch = self.batch.id, line = line.number, ?error, "a line cannot be run now");
                Ran::Later(Duration::from_secs(1))
            }
        }
    }

    async fn attempt(
        self: &Arc<Self>,
        line: Line,
        orders: &mut watch::Receiver<Order>,
    ) -> Result<Ran, ApiError> {
        let (custom_id, body) = self.read(line).await?;
        let mut faults = 0;
        loop {
            let past = self.past(line).await?;
            let key = match self.key(past.charged.is_some()).await {
                Ok(key) => key,
                Err(denied) => {
                    let answered = told(ApiError::from(denied).into_response()).await?;
                    return Ok(Ran::Ended(self.ended(line, &custom_id, answered, None)));
                }
            };
            let charged = past.charged.is_some();
            if self.waits_for_others(orders, charged).await == Order::GiveUp {
                return Ok(Ran::GivenUp);
            }
            let terms = BatchLine::new(self.attempt_key(line, past.attempts), self.seed(line), charged);
            let request = self.request(line, &body, key, &terms);
            let answered = tokio::select! {
                response = self.router.clone().oneshot(request) => match response {
                    Ok(response) => told(response).await?,
                    Err(never) => match never {},
                },
                order = given_up(orders), if !charged => {
                    terms.give_up();
                    if order == Order::GiveUp {
                        self.settled(line, past.attempts).await?;
                        if self.past(line).await?.charged.is_some() {
                            // It was booked in that moment: it has its result like any other.
                            continue;
                        }
                    }
                    return Ok(Ran::GivenUp);
                }
            };
            match verdict(&answered, self.left()) {
                Verdict::Result => {
                    return Ok(Ran::Ended(self.ended(line, &custom_id, answered, past.charged)));
                }
                Verdict::Later(wait) => return Ok(Ran::Later(wait)),
                Verdict::Underway => tokio::time::sleep(LOOK).await,
                Verdict::Fault => {
                    faults += 1;
                    if faults == FAULTS_MAX {
                        return Ok(Ran::Ended(self.ended(line, &custom_id, answered, None)));
                    }
                }
            }
        }
    }

    async fn read(self: &Arc<Self>, line: Line) -> Result<(String, Value), ApiError> {
        let running = Arc::clone(self);
        let read = tokio::task::spawn_blocking(move || line.read(&running.input));
        read.await.map_err(|_| ApiError::Bug)?.map_err(|error| {
            tracing::error!(batch = self.batch.id, line = line.number, %error, "a batch's input cannot be read");
            ApiError::Bug
        })
    }

    /// The record of a line that never ran, as the window ended before.
    pub(super) async fn expired(self: &Arc<Self>, line: Line) -> Result<String, ApiError> {
        let (custom_id, _) = self.read(line).await?;
        let message = "the batch's completion window ended before this request was run";
        Ok(json!({
            "id": self.record_id(line),
            "custom_id": custom_id,
            "response": null,
            "error": {"code": "batch_expired", "message": message},
        })
        .to_string())
    }

    /// Seconds until the window ends.
    fn left(&self) -> u64 {
        let now = self.server.config.batches.as_ref().map_or(0, |batches| batches.now());
        self.batch.times.expires.saturating_sub(now)
    }

    // A client's key is printable ASCII: it has no tab.
    fn attempt_key(&self, line: Line, attempt: u32) -> String {
        format!("{}\t{}\t{attempt}", self.batch.id, line.number)
    }

    fn hash(&self, line: Line) -> blake3::Hash {
        blake3::hash(format!("{}\t{}", self.batch.id, line.number).as_bytes())
    }

    /// In 53 bits, as other drawn seeds.
    fn seed(&self, line: Line) -> u64 {
        let head: [u8; 8] = self.hash(line).as_bytes()[..8].try_into().expect("a hash has 32 bytes");
        u64::from_le_bytes(head) >> 11
    }

    fn record_id(&self, line: Line) -> String {
        format!("batch_req_{}", &self.hash(line).to_hex()[..32])
    }

    async fn past(&self, line: Line) -> Result<Past, ApiError> {
        let key_id = self.batch.owner.key_id.clone();
        let stem = self.attempt_key(line, 0);
        let stem = stem.strip_suffix('0').expect("it ends with the attempt").to_owned();
        from_ledger(&self.server, move |ledger| past(ledger, key_id.as_deref(), &stem)).await
    }

    /// Until the attempt has a receipt, or cannot get one any more.
    async fn settled(&self, line: Line, attempt: u32) -> Result<(), ApiError> {
        let until = tokio::time::Instant::now() + SETTLED_WITHIN;
        while tokio::time::Instant::now() < until {
            let (key_id, key) = (self.batch.owner.key_id.clone(), self.attempt_key(line, attempt));
            let receipt = from_ledger(&self.server, move |ledger| ledger.receipt_of(key_id.as_deref(), &key));
            if receipt.await?.is_some() {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// The key of whoever made the batch, which must still be good for something new.
    async fn key(&self, charged: bool) -> Result<Option<Arc<Key>>, Denied> {
        let (Some(id), Some(control)) = (&self.batch.owner.key_id, &self.server.access.control) else {
            return Ok(None);
        };
        let (id, control) = (KeyId(id.clone()), control.clone());
        let look = tokio::task::spawn_blocking(move || match charged {
            true => Ok(control.resolve(&id.0)?.0),
            false => control.usable(&id),
        });
        match look.await {
            Ok(key) => key.map(Some),
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(Denied::Unknown),
        }
    }

    /// Waits while others wait, unless it is given up meanwhile.
    async fn waits_for_others(&self, orders: &mut watch::Receiver<Order>, charged: bool) -> Order {
        let others = || self.server.app().is_ok_and(|app| app.engines().queued() > 0);
        loop {
            match *orders.borrow_and_update() {
                Order::GoOn => {}
                Order::Stop | Order::GiveUp if !charged => return Order::GiveUp,
                Order::Stop | Order::GiveUp => return Order::GoOn,
            }
            if !others() {
                return Order::GoOn;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn request(
        &self,
        line: Line,
        body: &Value,
        key: Option<Arc<Key>>,
        terms: &Arc<BatchLine>,
    ) -> Request<Body> {
        let behalf = Behalf { key, tenant: self.batch.tenant.clone(), line: Arc::clone(terms) };
        let mut request = Request::post(&self.batch.endpoint)
            .header(header::CONTENT_TYPE, "application/json")
            .header("x-client-request-id", format!("{}:{}", self.batch.id, line.number))
            .extension(Arc::new(behalf));
        for (name, value) in &self.batch.headers {
            request = request.header(name, value);
        }
        request.body(Body::from(body.to_string())).expect("all of it was a request's before")
    }

    /// The line's record, with the receipt that was charged where that is another attempt's.
    fn ended(&self, line: Line, custom_id: &str, answered: Answered, charged: Option<Receipt>) -> Outcome {
        let Answered { status, headers, mut body, mut text } = answered;
        let request_id = headers.get("x-request-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
        let request_id = match charged.filter(|_| status.is_success()) {
            None => request_id,
            Some(receipt) => {
                body["usage"]["cost"] = json!(receipt.total().as_f64());
                body["usage"]["obol"] = receipt.to_json();
                text = body.to_string();
                Some(receipt.request().0.clone())
            }
        };
        let tokens = if status.is_success() { tokens(&body["usage"]) } else { Tokens::default() };
        let (id, custom_id, request_id) = (json!(self.record_id(line)), json!(custom_id), json!(request_id));
        let record = format!(
            r#"{{"id":{id},"custom_id":{custom_id},"response":{{"status_code":{},"request_id":{request_id},"body":{text}}},"error":null}}"#,
            status.as_u16()
        );
        Outcome { line: line.number, completed: status.is_success(), record, tokens }
    }
}

fn past(ledger: &Ledger, key_id: Option<&str>, stem: &str) -> Result<Past, LedgerError> {
    let mut past = Past { attempts: 0, charged: None };
    while let Some(receipt) = ledger.receipt_of(key_id, &format!("{stem}{}", past.attempts))? {
        past.attempts += 1;
        if was_charged(&receipt) {
            past.charged.get_or_insert(receipt);
        }
    }
    Ok(past)
}

/// Whether whoever asked has paid for an answer; where the device costs nothing, as if it cost something.
fn was_charged(receipt: &Receipt) -> bool {
    let whole = matches!(receipt.usage.status, Finish::Stop | Finish::Length);
    let error = receipt.usage.status == Finish::Error;
    !error && (receipt.total() > Picos::ZERO || (whole && receipt.overrun == Picos::ZERO))
}

/// Resolves when the line is to be given up.
async fn given_up(orders: &mut watch::Receiver<Order>) -> Order {
    match orders.wait_for(|order| *order != Order::GoOn).await {
        Ok(order) => *order,
        // Who gives orders is gone, and so will be the server.
        Err(_) => Order::Stop,
    }
}

async fn told(response: Response) -> Result<Answered, ApiError> {
    let (head, body) = response.into_parts();
    let bytes = body.collect().await.map_err(|_| ApiError::Bug)?.to_bytes();
    let text = String::from_utf8(bytes.into()).map_err(|_| ApiError::Bug)?;
    let body = serde_json::from_str(&text).map_err(|_| ApiError::Bug)?;
    Ok(Answered { status: head.status, headers: head.headers, body, text })
}

/// What an answer means for its line.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Result,
    Later(Duration),
    /// Another attempt is not settled yet, or was settled in this moment.
    Underway,
    /// Ours; it may be gone the next time.
    Fault,
}

/// `left`: seconds until the window ends.
fn verdict(answered: &Answered, left: u64) -> Verdict {
    let Answered { status, headers, body, .. } = answered;
    if status.is_success() {
        return Verdict::Result;
    }
    let after =
        headers.get(header::RETRY_AFTER).and_then(|seconds| seconds.to_str().ok()?.parse::<u64>().ok());
    let later = |seconds: u64| Verdict::Later(Duration::from_secs(seconds.max(1)));
    match (body["error"]["code"].as_str(), after) {
        (Some("idempotency_key_reused"), _) => Verdict::Underway,
        // A budget that begins anew in time is waited for.
        (Some("budget_exceeded"), Some(seconds)) if seconds <= left => later(seconds.min(BUDGET_WAIT_MAX)),
        (Some("budget_exceeded"), _) => Verdict::Result,
        (Some("queue_full" | "rate_limit_exceeded"), Some(seconds)) => later(seconds),
        _ if *status == StatusCode::SERVICE_UNAVAILABLE => later(after.unwrap_or(1)),
        _ if status.is_server_error() => Verdict::Fault,
        _ => Verdict::Result,
    }
}

/// Of an answer's usage, in any API's words.
fn tokens(usage: &Value) -> Tokens {
    let count = |names: [&str; 2]| names.iter().find_map(|name| usage[*name].as_u64()).unwrap_or(0);
    let cached = ["prompt_tokens_details", "input_tokens_details"];
    let cached = cached.iter().find_map(|details| usage[*details]["cached_tokens"].as_u64());
    let cost = usage["obol"]["cost"]["total"].as_str().and_then(|cost| Picos::parse(cost).ok());
    Tokens {
        prompt: count(["prompt_tokens", "input_tokens"]),
        cached: cached.unwrap_or(0),
        completion: count(["completion_tokens", "output_tokens"]),
        cost: cost.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn answered(status: u16, code: Option<&str>, after: Option<u64>) -> Answered {
        let mut headers = HeaderMap::new();
        headers.extend(after.map(|after| (header::RETRY_AFTER, HeaderValue::from(after))));
        let status = StatusCode::from_u16(status).unwrap();
        let body = json!({"error": {"code": code}});
        Answered { status, headers, text: body.to_string(), body }
    }

    #[test]
    fn what_may_be_gone_later_is_waited_for() {
        let check = |status, code, after, expected| {
            assert_eq!(verdict(&answered(status, code, after), 1_000), expected, "{status} {code:?}");
        };
        let later = |seconds| Verdict::Later(Duration::from_secs(seconds));
        check(200, None, None, Verdict::Result);
        check(400, None, None, Verdict::Result);
        check(404, Some("model_not_found"), None, Verdict::Result);
        check(409, Some("idempotency_key_reused"), None, Verdict::Underway);
        check(429, Some("rate_limit_exceeded"), Some(7), later(7));
        check(429, Some("rate_limit_exceeded"), None, Verdict::Result);
        check(429, Some("queue_full"), Some(1), later(1));
        check(429, Some("budget_exceeded"), Some(900), later(300));
        check(429, Some("budget_exceeded"), Some(1_001), Verdict::Result);
        check(429, Some("budget_exceeded"), None, Verdict::Result);
        check(429, Some("task_limit_exceeded"), None, Verdict::Result);
        check(503, Some("draining"), Some(5), later(5));
        check(500, None, None, Verdict::Fault);
    }

    #[test]
    fn usage_is_read_in_any_words() {
        let chat = json!({"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2},
            "obol": {"cost": {"total": "0.000000000009"}}});
        assert_eq!(tokens(&chat), Tokens { prompt: 5, cached: 2, completion: 3, cost: Picos(9) });
        let responses =
            json!({"input_tokens": 5, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 2}});
        assert_eq!(tokens(&responses), Tokens { prompt: 5, cached: 2, completion: 3, cost: Picos(0) });
        assert_eq!(tokens(&Value::Null), Tokens::default());
    }
}
