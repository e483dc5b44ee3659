//! `GET /v1/models` and `/v1/models/{id}`.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::Server;
use super::auth::Caller;
use super::error::ApiError;
use crate::pipeline::Served;

/// What the caller may ask for.
pub(super) async fn list(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<Value>, ApiError> {
    let app = server.app()?;
    let key = caller.key().map(|key| &**key);
    let allowed = app.models().filter(|served| app.check_allowed(key, &served.id).is_ok());
    Ok(Json(json!({"object": "list", "data": allowed.map(model).collect::<Vec<_>>()})))
}

/// Ids may contain slashes, as in `organisation/model`.
pub(super) async fn one(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let app = server.app()?;
    let served = app.check_model(&id)?;
    app.check_allowed(caller.key().map(|key| &**key), &id)?;
    Ok(Json(model(served)))
}

fn model(served: &Served) -> Value {
    json!({
        "id": served.id,
        "object": "model",
        "created": served.created,
        "owned_by": "obol",
        "max_model_len": served.context_length,
        "obol": {
            "aliases": served.aliases,
            "precision": served.precision,
            "device": served.device,
            "row_invariant": served.row_invariant,
        },
    })
}
