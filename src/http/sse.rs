//! Answers as server-sent events: chunks as they come, the usage when it is durable, then `[DONE]` and,
//! for clients that take them, the cost headers as trailers.
//!
//! Invariant: `[DONE]` follows a durable receipt only; a stream that ends without it has failed.

use std::any::Any;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use http_body::Frame;
use http_body_util::StreamBody;
use serde_json::{Map, Value};

use super::envelope::{panic_message, put};
use super::error::ApiError;
use super::openai::{Delivery, Reply, usage, usage_so_far};
use crate::ledger::Receipt;
use crate::pipeline::{Answer, Failure, Piece, Scored};
use crate::request::Finish;
use crate::text::turn::{Part, TurnReader};

/// What `Receipt::headers` gives, announced before the receipt exists. The last one only in dollars.
const COST_TRAILERS: &str = "x-obol-gpu-seconds, x-obol-kv-byte-seconds, x-obol-kv-peak-bytes, \
    x-obol-cached-tokens, x-obol-cost, server-timing, x-litellm-response-cost";

const DONE: &str = "data: [DONE]\n\n";
const KEEP_ALIVE: &str = ": keep-alive\n\n";

/// The response that streams `answer`.
pub(super) fn response(
    answer: Answer,
    reply: Reply,
    delivery: Delivery,
    choices: u32,
    keep_alive: Duration,
    request: &HeaderMap,
) -> Response {
    let trailers = takes_trailers(request);
    let readers = (0..choices).map(|_| TurnReader::new(answer.form().clone())).collect();
    let frames = Frames {
        answer,
        reply,
        delivery,
        trailers,
        keep_alive,
        readers,
        started: vec![false; choices as usize],
        running: choices,
        last_finish: None,
        ready: VecDeque::new(),
        ended: false,
    };
    let mut response = Response::new(Body::new(StreamBody::new(frames.into_stream())));
    let headers = response.headers_mut();
    put(headers, "content-type", "text/event-stream; charset=utf-8");
    put(headers, "cache-control", "no-cache");
    put(headers, "x-accel-buffering", "no");
    if trailers {
        put(headers, "trailer", COST_TRAILERS);
    }
    response
}

/// Whether the client says `TE: trailers`.
fn takes_trailers(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::TE).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|coding| coding.trim().eq_ignore_ascii_case("trailers"))
}

/// The receipt's headers as HTTP headers or trailers.
pub(super) fn cost_headers(receipt: &Receipt) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in receipt.headers() {
        let value = HeaderValue::from_str(&value).expect("digits and ASCII words are a header value");
        headers.insert(HeaderName::from_static(name), value);
    }
    headers
}

struct Frames {
    answer: Answer,
    reply: Reply,
    delivery: Delivery,
    trailers: bool,
    keep_alive: Duration,
    /// Of the choices.
    readers: Vec<TurnReader>,
    /// Per choice: whether its first chunk is out.
    started: Vec<bool>,
    running: u32,
    /// The chunk that ends the last choice waits here for the usage it carries.
    last_finish: Option<Map<String, Value>>,
    ready: VecDeque<Frame<Bytes>>,
    ended: bool,
}

impl Frames {
    fn into_stream(self) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> + Send {
        let frames = stream::unfold(self, |mut frames| async move { Some((frames.next().await?, frames)) });
        AssertUnwindSafe(frames).catch_unwind().map(|frame| Ok(frame.unwrap_or_else(|panic| bug(&*panic))))
    }

    async fn next(&mut self) -> Option<Frame<Bytes>> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                return Some(frame);
            }
            if self.ended {
                return None;
            }
            match tokio::time::timeout(self.keep_alive, self.answer.next()).await {
                Err(_) => return Some(Frame::data(Bytes::from_static(KEEP_ALIVE.as_bytes()))),
                Ok(None) => self.ended = true,
                Ok(Some(Ok(piece))) => self.take(piece),
                Ok(Some(Err(failure))) => self.fail(failure),
            }
        }
    }

    fn take(&mut self, piece: Piece) {
        match piece {
            Piece::Text { choice, text, scored } => {
                let parts = self.readers[choice as usize].push(&text);
                self.parts(choice, parts, &scored);
            }
            Piece::Finished { choice, text, scored, finish } => {
                self.running -= 1;
                let reader = &mut self.readers[choice as usize];
                let mut parts = reader.push(&text);
                parts.extend(reader.finish());
                if !self.started[choice as usize] && parts.is_empty() {
                    parts.push(Part::Text(String::new()));
                }
                self.parts(choice, parts, &scored);
                self.finish(choice, finish);
            }
            Piece::Prompt { .. } => unreachable!("prompts are not scored for streams"),
            Piece::Settled(receipt) => self.settled(&receipt),
        }
    }

    /// The tokens of a text go with its first part, or with an empty one while its characters are held back.
    fn parts(&mut self, choice: u32, mut parts: Vec<Part>, mut scored: &[Scored]) {
        if parts.is_empty() && !scored.is_empty() {
            parts.push(Part::Text(String::new()));
        }
        for part in &parts {
            let first = !std::mem::replace(&mut self.started[choice as usize], true);
            let chunk = self.reply.part_chunk(choice, first, part, std::mem::take(&mut scored));
            self.send(chunk);
        }
    }

    fn finish(&mut self, choice: u32, finish: Finish) {
        if matches!(finish, Finish::Error | Finish::Cancelled) {
            // No way to end that OpenAI's clients know: an error event follows.
            return;
        }
        let called = self.readers[choice as usize].calls() > 0;
        let chunk = self.reply.finish_chunk(choice, finish, called);
        if self.running == 0 && !self.delivery.include_usage {
            self.last_finish = Some(chunk);
        } else {
            self.send(chunk);
        }
    }

    fn settled(&mut self, receipt: &Receipt) {
        let mut chunk = self.last_finish.take().unwrap_or_else(|| self.reply.chunk(Vec::new()));
        chunk.insert("usage".into(), usage(receipt));
        self.ready.push_back(data(&Value::Object(chunk)));
        self.ready.push_back(Frame::data(Bytes::from_static(DONE.as_bytes())));
        if self.trailers {
            self.ready.push_back(Frame::trailers(cost_headers(receipt)));
        }
        self.ended = true;
    }

    fn fail(&mut self, failure: Failure) {
        self.ready.push_back(data(&ApiError::from(failure).into_object()));
        self.ended = true;
    }

    /// A chunk that is not the last, with the usage that its place asks for.
    fn send(&mut self, mut chunk: Map<String, Value>) {
        if self.delivery.continuous_usage {
            let so_far = usage_so_far(self.answer.prompt_tokens(), self.answer.completion_tokens());
            chunk.insert("usage".into(), so_far);
        } else if self.delivery.include_usage {
            chunk.insert("usage".into(), Value::Null);
        }
        self.ready.push_back(data(&Value::Object(chunk)));
    }
}

fn data(value: &Value) -> Frame<Bytes> {
    Frame::data(Bytes::from(format!("data: {value}\n\n")))
}

/// The last event of a stream whose writer panicked.
fn bug(panic: &(dyn Any + Send)) -> Frame<Bytes> {
    tracing::error!("a stream panicked: {}", panic_message(panic));
    data(&ApiError::Bug.into_object())
}
