//! Probes: `/health` (restart me?) and `/ready` (send me requests?).

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::Server;
use super::error::ApiError;

/// How long the engines' threads may take to answer. Longer than any step.
const ENGINE_PATIENCE: Duration = Duration::from_secs(5);

pub(super) async fn health(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    let Ok(app) = server.app() else { return Ok(Json(json!({"status": "loading"}))) };
    if app.engines().ping(ENGINE_PATIENCE).await {
        Ok(Json(json!({"status": "ok"})))
    } else {
        Err(ApiError::EngineSilent)
    }
}

pub(super) async fn ready(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    let app = server.app()?;
    app.check_accepting()?;
    if !app.engines().ping(ENGINE_PATIENCE).await {
        return Err(ApiError::EngineSilent);
    }
    Ok(Json(json!({"status": "ready", "model": app.served().id})))
}
