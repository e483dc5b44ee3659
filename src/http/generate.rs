//! The generating endpoints: parse, run, answer whole or as a stream, in the words of the API that was spoken.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, request};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use bytes::Bytes;
use serde_json::Value;

use super::auth::Caller;
use super::envelope::{DEVICE, put};
use super::error::ApiError;
use super::openai::{Chunks, Reply, Shape, parse_chat, parse_completion};
use super::telling::{Teller, collect, collect_vectors};
use super::{Server, body, origin, sse};
use crate::control::Key;
use crate::control::limits::{Allotment, Left};
use crate::ledger::Receipt;
use crate::pipeline::{self, App, Ask};
use crate::units::RequestId;

pub(super) async fn chat(
    State(server): State<Arc<Server>>,
    Extension(id): Extension<RequestId>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    let key = caller.key().cloned();
    let answered = generated(&server, Shape::Chat, id, caller, request).await;
    answered.unwrap_or_else(|error| refused(&server, key.as_deref(), error))
}

pub(super) async fn completions(
    State(server): State<Arc<Server>>,
    Extension(id): Extension<RequestId>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    let key = caller.key().cloned();
    let answered = generated(&server, Shape::Completion, id, caller, request).await;
    answered.unwrap_or_else(|error| refused(&server, key.as_deref(), error))
}

async fn generated(
    server: &Server,
    shape: Shape,
    id: RequestId,
    caller: Caller,
    request: Request,
) -> Result<Response, ApiError> {
    let (head, bytes) = received(server, request).await?;
    let app = server.app()?;
    let asker = |endpoint| origin::asker(server, caller, &head.headers, id, endpoint);
    let rules = server.rules(app);
    let (ask, delivery) = match shape {
        Shape::Chat => parse_chat(&bytes, &rules, asker("/v1/chat/completions")?)?,
        Shape::Completion => parse_completion(&bytes, &rules, asker("/v1/completions")?)?,
    };
    let reply = Reply::new(app, shape, &ask, delivery.scored);
    let echo = delivery.echo.then(|| ask.prompts.iter().map(|prompt| app.text_of(prompt)).collect());
    let teller = Chunks::new(reply, delivery, (ask.choices, ask.prompts.len()), echo);
    answer(server, app, ask, teller, delivery.stream, &head).await
}

/// The error, with what is left of the limits of whoever asked: who is told to wait can see for what.
pub(super) fn refused(server: &Server, key: Option<&Key>, error: ApiError) -> Response {
    let mut response = error.into_response();
    if let (Ok(app), Some(key)) = (server.app(), key) {
        rate_limit_headers(response.headers_mut(), &app.admission().left(app, key));
    }
    response
}

pub(super) async fn received(server: &Server, request: Request) -> Result<(request::Parts, Bytes), ApiError> {
    let (head, body) = request.into_parts();
    // A server that cannot answer does not read megabytes first.
    server.app()?.check_accepting()?;
    let bytes = body::read(&server.config, &head.headers, body).await?;
    Ok((head, bytes))
}

/// Runs what was asked and answers it in the teller's words, whole or as a stream.
pub(super) async fn answer(
    server: &Server,
    app: &Arc<App>,
    ask: Ask,
    mut teller: impl Teller,
    stream: bool,
    head: &request::Parts,
) -> Result<Response, ApiError> {
    let choices = ask.choices * u32::try_from(ask.prompts.len()).expect("requests have few prompts");
    let answer = pipeline::run(app, ask).await?;
    teller.takes(answer.prompts());
    let device = answer.device().to_owned();
    let left = answer.left();
    let mut response = if stream {
        sse::response(answer, teller, choices, server.config.keep_alive, &head.headers)
    } else {
        let (whole, receipt) = collect(answer, choices).await?;
        let body = teller.whole(whole, &receipt);
        let mut response = match teller.keep(&receipt).await {
            Ok(()) => Json(body).into_response(),
            Err(error) => error.into_response(),
        };
        response.headers_mut().extend(sse::cost_headers(&receipt));
        response
    };
    put(response.headers_mut(), DEVICE, &device);
    rate_limit_headers(response.headers_mut(), &left);
    Ok(response)
}

/// Makes the vectors that were asked for, and answers what `tell` makes of them.
pub(super) async fn answer_vectors(
    app: &Arc<App>,
    ask: Ask,
    tell: impl FnOnce(Vec<Vec<f32>>, &Receipt) -> Value,
) -> Result<Response, ApiError> {
    let answer = pipeline::run(app, ask).await?;
    let (device, left) = (answer.device().to_owned(), answer.left());
    let (vectors, receipt) = collect_vectors(answer).await?;
    let mut response = Json(tell(vectors, &receipt)).into_response();
    response.headers_mut().extend(sse::cost_headers(&receipt));
    put(response.headers_mut(), DEVICE, &device);
    rate_limit_headers(response.headers_mut(), &left);
    Ok(response)
}

/// OpenAI's six headers, as far as there are limits.
fn rate_limit_headers(headers: &mut HeaderMap, left: &Left) {
    let mut say = |of: &str, allotment: Option<Allotment>| {
        let Some(Allotment { limit, remaining, full_after }) = allotment else { return };
        let milliseconds = full_after.0.div_ceil(1_000_000);
        let reset = format!("{}.{:03}s", milliseconds / 1_000, milliseconds % 1_000);
        for (what, value) in
            [("limit", limit.to_string()), ("remaining", remaining.to_string()), ("reset", reset)]
        {
            let name = HeaderName::try_from(format!("x-ratelimit-{what}-{of}")).expect("a header's name");
            headers.insert(name, HeaderValue::try_from(value).expect("digits are a header's value"));
        }
    };
    say("requests", left.requests);
    say("tokens", left.tokens);
}
