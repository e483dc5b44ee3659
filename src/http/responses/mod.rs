//! OpenAI's responses: `POST /v1/responses`, and those that are kept.
//!
//! Unless a request says `store: false`, what it said and what was answered are kept in the data directory, as in
//! OpenAI's API, for as long as the configuration says (`[responses]`; 0 days: nothing is kept). They are their key's:
//! nobody else finds them. A response is kept once it is complete, `incomplete` ones too; one that failed or whose
//! client left is not. `previous_response_id` goes on from one; its instructions do not carry over.
//!
//! `usage.cost` and `usage.obol` are as everywhere; a stream tells them with its last event.

mod items;
mod kept;
mod request;
mod tell;

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::auth::Caller;
use super::error::ApiError;
use super::fields::Invalid;
use super::generate::{answer, received, refused};
use super::{Server, origin};
use crate::pipeline::{self, Prompt};
use crate::units::RequestId;
use kept::{Keeper, history};
pub(super) use kept::{cancel, delete, input_items, one};
pub(super) use request::Requested;
use request::read_to_count;

/// Answers what was said, and what was said before it.
pub(super) async fn create(
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
    let asker = origin::asker(server, caller.clone(), &head.headers, id.clone(), "/v1/responses")?;
    let mut requested = Requested::read(&bytes, &server.rules(app), &id)?;
    let keeper = keeper(server, &caller, &id, &requested)?;
    let history = history(server, &caller, requested.previous()).await?;
    let (mut settings, stream) = (std::mem::take(&mut requested.settings), requested.stream);
    let ask = requested.ask(&history, asker)?;
    settings.insert("service_tier".into(), json!(ask.tier.as_str()));
    let teller = tell::Response::new(app, &id, app.clock().wall(), settings, keeper);
    answer(server, app, ask, teller, stream, &head).await
}

/// What will keep the response, if it is to be kept.
fn keeper(
    server: &Server,
    caller: &Caller,
    request: &RequestId,
    requested: &Requested,
) -> Result<Option<Keeper>, Invalid> {
    let keeps = server.archive.keeps();
    if requested.store == Some(true) && !keeps {
        let message =
            "`store`: this server keeps no responses; leave it out, and send conversations as `input`";
        return Err(Invalid::new("store", message));
    }
    let keeper = || Keeper {
        archive: server.archive.clone(),
        request: request.clone(),
        owner: caller.owner(),
        previous: requested.previous().map(str::to_owned),
        items: requested.items().to_vec(),
    };
    Ok((keeps && requested.store != Some(false)).then(keeper))
}

/// Answers how many tokens the model would be told.
pub(super) async fn input_tokens(
    State(server): State<Arc<Server>>,
    Extension(id): Extension<RequestId>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let (_, bytes) = received(&server, request).await?;
    let app = server.app()?;
    let (model, spoken) = read_to_count(&bytes, &server.rules(app), &id)?;
    app.check_generates(&model)?;
    app.check_allowed(caller.key().map(|key| &**key), &model)?;
    let history = history(&server, &caller, spoken.previous.as_deref()).await?;
    let tokens = pipeline::tokenize(app, &model, Prompt::Chat(spoken.after(&history))).await?;
    Ok(Json(json!({"object": "response.input_tokens", "input_tokens": tokens.len()})))
}
