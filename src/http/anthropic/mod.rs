//! Anthropic's messages: `POST /v1/messages` and `/v1/messages/count_tokens`.
//!
//! The answer's usage counts the prompt's tokens that were computed as `input_tokens` and those found in the prefix
//! cache as `cache_read_input_tokens`; nothing is paid for writing to the cache, so `cache_creation_input_tokens` is 0.
//! A stream tells them with its last usage, in `message_delta`: at its beginning only the prompt's length is known,
//! and `message_start` says that. `usage.cost` and `usage.obol` are as everywhere. `cache_control` is taken and changes
//! nothing, as all prefixes are cached; the header `anthropic-version` is not looked at.

mod request;
mod tell;

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::auth::Caller;
use super::error::ApiError;
use super::generate::{answer, received, refused};
use super::{Server, origin};
use crate::pipeline::{self, Prompt};
use crate::units::RequestId;
pub(super) use request::{parse, parse_count};
use tell::Message;

/// Answers a conversation.
pub(super) async fn messages(
    State(server): State<Arc<Server>>,
    Extension(id): Extension<RequestId>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    let key = caller.key().cloned();
    let answered = answered(&server, id, caller, request).await;
    answered.unwrap_or_else(|error| refused(&server, key.as_deref(), error))
}

async fn answered(
    server: &Server,
    id: RequestId,
    caller: Caller,
    request: Request,
) -> Result<Response, ApiError> {
    let (head, bytes) = received(server, request).await?;
    let app = server.app()?;
    let asker = origin::asker(server, caller, &head.headers, id, "/v1/messages")?;
    let (ask, stream) = parse(&bytes, &server.rules(app), asker)?;
    let teller = Message::new(app, &ask.origin.request);
    answer(server, app, ask, teller, stream, &head).await
}

/// Answers `{input_tokens}`: the length of the prompt that a request would have.
pub(super) async fn count_tokens(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let (_, bytes) = received(&server, request).await?;
    let app = server.app()?;
    let (model, chat) = parse_count(&bytes, &server.rules(app))?;
    app.check_generates(&model)?;
    app.check_allowed(caller.key().map(|key| &**key), &model)?;
    let tokens = pipeline::tokenize(app, &model, Prompt::Chat(chat)).await?;
    Ok(Json(json!({"input_tokens": tokens.len()})))
}
