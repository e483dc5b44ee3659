//! `GET /v1/models` and `/v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::Server;
use super::error::ApiError;
use crate::pipeline::{App, Served};

pub(super) async fn list(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    let app = server.app()?;
    Ok(Json(json!({"object": "list", "data": [model(app.served())]})))
}

/// Ids may contain slashes, as in `organisation/model`.
pub(super) async fn one(
    State(server): State<Arc<Server>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let app: &App = server.app()?;
    app.check_model(&id)?;
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
