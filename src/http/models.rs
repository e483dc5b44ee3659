//! `GET /v1/models` and `/v1/models/{id}`.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::Server;
use super::auth::Caller;
use super::error::ApiError;
use crate::pipeline::{App, Served};

/// What the caller may ask for.
pub(super) async fn list(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<Value>, ApiError> {
    let app = server.app()?;
    let allowed = app.check_allowed(caller.key().map(|key| &**key), &app.served().id).is_ok();
    let models: Vec<Value> = allowed.then(|| model(app.served())).into_iter().collect();
    Ok(Json(json!({"object": "list", "data": models})))
}

/// Ids may contain slashes, as in `organisation/model`.
pub(super) async fn one(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let app: &App = server.app()?;
    app.check_model(&id)?;
    app.check_allowed(caller.key().map(|key| &**key), &id)?;
    Ok(Json(model(app.served())))
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
