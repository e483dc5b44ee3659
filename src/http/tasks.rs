//! `GET /v1/tasks/{id}`: what an agent's run has done and cost so far.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::Server;
use super::auth::Caller;
use super::error::ApiError;
use super::receipts::from_ledger;
use crate::ledger::{By, ReportQuery, Spend};
use crate::units::Picos;

/// Of the caller's own tenant: calls that ended, with what they used and cost; and, of those since this server
/// started, how deep they were nested and how often the last prompt came again.
pub(super) async fn one(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(task): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let tenant = caller.tenant().to_owned();
    let query = ReportQuery {
        only: vec![(By::Task, vec![task.clone()]), (By::Tenant, vec![tenant.clone()])],
        ..ReportQuery::by(&[By::Task])
    };
    let report = from_ledger(&server, move |ledger| ledger.report(&query)).await?;
    let spend = report.rows.into_iter().map(|row| row.spend).next();
    let progress = server.app()?.admission().progress(&tenant, &task);
    if spend.is_none() && progress.is_none() {
        return Err(ApiError::TaskNotFound { id: task });
    }
    let (spend, progress) = (spend.unwrap_or_default(), progress.unwrap_or_default());
    let Spend { requests, prompt_tokens, cached_tokens, completion_tokens, device_time, usage_cost, .. } =
        spend;
    Ok(Json(json!({
        "task": task,
        "tenant": tenant,
        "calls": progress.calls.max(requests),
        "settled": requests,
        "refused": progress.refused,
        "depth": progress.depth,
        "repeats": progress.repeats,
        "tokens": {"prompt": prompt_tokens, "cached": cached_tokens, "completion": completion_tokens},
        "gpu_seconds": device_time.seconds(),
        "cost": Picos::decimal(usage_cost),
    })))
}
