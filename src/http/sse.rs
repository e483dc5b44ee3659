//! Answers as server-sent events, and behind them, for clients that take them, the cost headers as trailers. What the
//! events are is their API's.
//!
//! Invariant: an answer's last events follow a durable receipt only, and whatever else its API keeps.

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

use super::envelope::{panic_message, put};
use super::error::ApiError;
use super::telling::{End, SoFar, Teller};
use crate::ledger::Receipt;
use crate::pipeline::{Answer, Piece};
use crate::text::turn::TurnReader;

/// What `Receipt::headers` gives, announced before the receipt exists. The last one only in dollars.
const COST_TRAILERS: &str = "x-obol-gpu-seconds, x-obol-kv-byte-seconds, x-obol-kv-peak-bytes, \
    x-obol-cached-tokens, x-obol-cost, server-timing, x-litellm-response-cost";

/// The response in which `teller` streams `answer`.
pub(super) fn response(
    answer: Answer,
    teller: impl Teller,
    choices: u32,
    keep_alive: Duration,
    request: &HeaderMap,
) -> Response {
    let trailers = takes_trailers(request);
    let readers = (0..choices).map(|_| TurnReader::new(answer.form().clone())).collect();
    let frames =
        Frames { answer, teller, trailers, keep_alive, readers, ready: VecDeque::new(), at: At::Beginning };
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

struct Frames<T> {
    answer: Answer,
    teller: T,
    trailers: bool,
    keep_alive: Duration,
    /// Of the choices.
    readers: Vec<TurnReader>,
    ready: VecDeque<Frame<Bytes>>,
    at: At,
}

enum At {
    Beginning,
    Telling,
    Ended,
}

impl<T: Teller> Frames<T> {
    fn into_stream(self) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> + Send {
        let frames = stream::unfold(self, |mut frames| async move { Some((frames.next().await?, frames)) });
        AssertUnwindSafe(frames)
            .catch_unwind()
            .map(|frame| Ok(frame.unwrap_or_else(|panic| bug::<T>(&*panic))))
    }

    async fn next(&mut self) -> Option<Frame<Bytes>> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                return Some(frame);
            }
            match self.at {
                At::Ended => return None,
                At::Beginning => {
                    self.at = At::Telling;
                    let told = self.teller.begins(self.so_far());
                    self.send(told);
                    continue;
                }
                At::Telling => {}
            }
            match tokio::time::timeout(self.keep_alive, self.answer.next()).await {
                Err(_) => return Some(Frame::data(Bytes::from_static(T::KEEP_ALIVE.as_bytes()))),
                Ok(None) => self.at = At::Ended,
                Ok(Some(Ok(piece))) => self.take(piece).await,
                Ok(Some(Err(failure))) => {
                    let told = self.teller.fails(ApiError::from(failure));
                    self.send(told);
                    self.at = At::Ended;
                }
            }
        }
    }

    async fn take(&mut self, piece: Piece) {
        let so_far = self.so_far();
        match piece {
            Piece::Text { choice, text, scored } => {
                let parts = self.readers[choice as usize].push(&text);
                let told = self.teller.parts(choice, parts, &scored, so_far);
                self.send(told);
            }
            Piece::Finished { choice, text, scored, finish, stop } => {
                let reader = &mut self.readers[choice as usize];
                let mut parts = reader.push(&text);
                parts.extend(reader.finish());
                let told = self.teller.parts(choice, parts, &scored, so_far);
                self.send(told);
                let told = self.teller.finishes(choice, End { finish, stop }, so_far);
                self.send(told);
            }
            Piece::Prompt { .. } => unreachable!("prompts are not scored for streams"),
            Piece::Vector { .. } => unreachable!("vectors are not streamed"),
            Piece::Settled(receipt) => {
                let told = match self.teller.keep(&receipt).await {
                    Ok(()) => self.teller.ends(&receipt),
                    Err(error) => self.teller.fails(error),
                };
                self.send(told);
                if self.trailers {
                    self.ready.push_back(Frame::trailers(cost_headers(&receipt)));
                }
                self.at = At::Ended;
            }
        }
    }

    fn so_far(&self) -> SoFar {
        SoFar { prompt: self.answer.prompt_tokens(), completion: self.answer.completion_tokens() }
    }

    fn send(&mut self, told: Vec<Bytes>) {
        self.ready.extend(told.into_iter().map(Frame::data));
    }
}

/// The last event of a stream whose teller panicked.
fn bug<T: Teller>(panic: &(dyn Any + Send)) -> Frame<Bytes> {
    tracing::error!("a stream panicked: {}", panic_message(panic));
    Frame::data(T::broke())
}
