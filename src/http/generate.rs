//! The two generating endpoints: parse, run, answer whole or as a stream.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, request};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use bytes::Bytes;

use super::auth::Caller;
use super::envelope::{DEVICE, put};
use super::error::ApiError;
use super::openai::{Choice, Delivery, Echo, Reply, Shape, best, parse_chat, parse_completion};
use super::{Server, body, origin, sse};
use crate::control::Key;
use crate::control::limits::{Allotment, Left};
use crate::ledger::Receipt;
use crate::pipeline::{self, Answer, App, Ask, Failure, Piece};
use crate::request::TokenLogprobs;
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
    answer(server, app, shape, ask, delivery, &head).await
}

/// The error, with what is left of the limits of whoever asked: who is told to wait can see for what.
fn refused(server: &Server, key: Option<&Key>, error: ApiError) -> Response {
    let mut response = error.into_response();
    if let (Ok(app), Some(key)) = (server.app(), key) {
        rate_limit_headers(response.headers_mut(), &app.admission().left(app, key));
    }
    response
}

async fn received(server: &Server, request: Request) -> Result<(request::Parts, Bytes), ApiError> {
    let (head, body) = request.into_parts();
    // A server that cannot answer does not read megabytes first.
    server.app()?.check_accepting()?;
    let bytes = body::read(&server.config, &head.headers, body).await?;
    Ok((head, bytes))
}

async fn answer(
    server: &Server,
    app: &Arc<App>,
    shape: Shape,
    ask: Ask,
    delivery: Delivery,
    head: &request::Parts,
) -> Result<Response, ApiError> {
    let mut reply = Reply::new(app, shape, &ask.origin.request, delivery.scored);
    let each = ask.choices;
    let choices = each * u32::try_from(ask.prompts.len()).expect("requests have few prompts");
    let texts = delivery.echo.then(|| ask.prompts.iter().map(|prompt| app.text_of(prompt)).collect());
    let answer = pipeline::run(app, ask).await?;
    if let Some(texts) = texts {
        let prompts = answer.prompts().clone();
        reply.echo(Echo { each: delivery.best.unwrap_or(each), texts, prompts, scores: Vec::new() });
    }
    let device = answer.device().to_owned();
    let left = answer.left();
    let mut response = if delivery.stream {
        let keep_alive = server.config.keep_alive;
        sse::response(answer, reply, delivery, choices, keep_alive, &head.headers)
    } else {
        let (mut choices, scores, receipt) = collect(answer, choices).await?;
        reply.score(scores);
        if let Some(shown) = delivery.best {
            choices = best(choices, each, shown);
        }
        let mut response = Json(reply.body(choices, &receipt)).into_response();
        response.headers_mut().extend(sse::cost_headers(&receipt));
        response
    };
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

/// The choices, how likely each prompt's tokens were where that was asked for, and the receipt.
type Collected = (Vec<Choice>, Vec<Vec<TokenLogprobs>>, Arc<Receipt>);

/// The whole answer. Dropping this future (the client left) drops the answer, which cancels it.
async fn collect(mut answer: Answer, choices: u32) -> Result<Collected, Failure> {
    let mut whole: Vec<Choice> = (0..choices).map(|_| Choice::new(answer.form())).collect();
    let prompts = answer.prompts().count();
    let mut prompt_scores = vec![Vec::new(); prompts];
    while let Some(piece) = answer.next().await {
        match piece? {
            Piece::Text { choice, text, scored } => {
                whole[choice as usize].push(&text, scored);
            }
            Piece::Prompt { choice, scores } => {
                prompt_scores[choice as usize * prompts / choices as usize].extend(scores);
            }
            Piece::Finished { choice, text, scored, finish } => {
                let choice = &mut whole[choice as usize];
                choice.push(&text, scored);
                choice.finish(finish);
            }
            Piece::Settled(receipt) => return Ok((whole, prompt_scores, receipt)),
        }
    }
    Err(Failure::LedgerUnavailable)
}
