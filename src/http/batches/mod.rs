//! `/v1/batches`: many requests in one file, run when nobody else waits. A batch is its maker's; to others it does not
//! exist. Here it is made, told of and cancelled; `runner` runs it.

mod line;
mod runner;

use std::sync::Arc;

use axum::extract::{Path, RawQuery, Request, State};
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::auth::Caller;
use super::error::ApiError;
use super::fields::{Fields, Invalid};
use super::files::{found as found_file, on_disk, pairs};
use super::openai::metadata;
use super::receipts::number;
use super::{Server, body, origin};
use crate::batches::{Batch, Batches, BatchesError, NewBatch, Page, Purpose, Sort, Tokens};
use crate::control::Span;
use crate::units::UnixNanos;
pub use runner::Runner;

/// What lines may ask.
const ENDPOINTS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"];
const PAGE: usize = 20;
const PAGE_MAX: u64 = 100;
/// Longest window, in seconds: a week.
const WINDOW_MAX: u64 = 7 * 86_400;

pub(super) async fn create(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let batches = server.batches()?;
    let (head, given) = request.into_parts();
    let bytes = body::read(&server.config, &head.headers, given).await?;
    let mut fields = Fields::parse(&bytes)?;
    let text = |fields: &mut Fields, name: &'static str| {
        let found = fields.string(name)?;
        found.ok_or_else(|| Invalid::new(name, format!("`{name}` is required: a string")))
    };
    let input_file = text(&mut fields, "input_file_id")?;
    let endpoint = text(&mut fields, "endpoint")?;
    if !ENDPOINTS.contains(&endpoint.as_str()) {
        let message = format!("`endpoint` = {endpoint:?}: batches run {}", ENDPOINTS.join(", "));
        return Err(Invalid::new("endpoint", message).into());
    }
    let window = text(&mut fields, "completion_window")?;
    let seconds = seconds(&window)?;
    let metadata = metadata(&mut fields)?;
    fields.only("output_expires_after", &[], "files are kept until they are deleted")?;
    fields.finish(server.config.unknown_fields)?;
    let input = match found_file(batches, &caller, &input_file).await {
        Err(ApiError::FileNotFound { id }) => return Err(BatchesError::NoSuchFile { id }.into()),
        found => found?,
    };
    if input.purpose != Purpose::Batch {
        let message =
            format!("`{}` is what a batch has written: upload the input with the purpose `batch`", input.id);
        return Err(Invalid::new("input_file_id", message).into());
    }
    let new = NewBatch {
        owner: caller.maker(),
        tenant: caller.tenant().to_owned(),
        endpoint,
        window: (window, seconds),
        input_file,
        metadata,
        headers: origin::tag_headers(&head.headers)?,
    };
    let made = on_disk(batches, move |batches| batches.create(new)).await?;
    Ok(Json(shape(&made, &server.config.currency)))
}

/// OpenAI has "24h" alone; other windows are taken too.
fn seconds(window: &str) -> Result<u64, Invalid> {
    let wrong = |problem: &str| {
        let message =
            format!("`completion_window` = {window:?} is not a time such as 24h, from 1s to 7d{problem}");
        Invalid::new("completion_window", message)
    };
    let span: Span = window.parse().map_err(|problem: String| wrong(&format!(": {problem}")))?;
    let seconds = span.after(UnixNanos(0)).0 / 1_000_000_000;
    (seconds <= WINDOW_MAX).then_some(seconds).ok_or_else(|| wrong(""))
}

pub(super) async fn list(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let batches = server.batches()?;
    let mut page = Page { limit: PAGE, after: None, sort: Sort::NewestFirst };
    for (name, value) in pairs(query.as_deref().unwrap_or_default())? {
        match name.as_str() {
            "limit" => page.limit = number(&name, &value, 1..=PAGE_MAX)? as usize,
            "after" => page.after = Some(value),
            _ => return Err(Invalid::new(&name, format!("unknown query parameter `{name}`")).into()),
        }
    }
    let owner = caller.key().is_some().then(|| caller.maker());
    let (found, more) = on_disk(batches, move |batches| batches.batches(owner.as_ref(), &page)).await?;
    let currency = &server.config.currency;
    Ok(Json(json!({
        "object": "list",
        "data": found.iter().map(|batch| shape(batch, currency)).collect::<Vec<_>>(),
        "first_id": found.first().map(|batch| &batch.id),
        "last_id": found.last().map(|batch| &batch.id),
        "has_more": more,
    })))
}

/// A batch that the caller may see.
async fn found(batches: &Batches, caller: &Caller, id: &str) -> Result<Batch, ApiError> {
    let wanted = id.to_owned();
    let batch = on_disk(batches, move |batches| batches.batch(&wanted)).await?;
    let batch = batch.filter(|batch| caller.may_read(batch.owner.key_id.as_deref()));
    batch.ok_or_else(|| ApiError::BatchNotFound { id: id.to_owned() })
}

pub(super) async fn one(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let batch = found(server.batches()?, &caller, &id).await?;
    Ok(Json(shape(&batch, &server.config.currency)))
}

pub(super) async fn cancel(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let batches = server.batches()?;
    let batch = found(batches, &caller, &id).await?;
    let cancelled = on_disk(batches, move |batches| batches.cancel(&batch.id)).await?;
    Ok(Json(shape(&cancelled, &server.config.currency)))
}

fn shape(batch: &Batch, currency: &str) -> Value {
    let Batch { times, counts, .. } = batch;
    let errors = batch.problems.as_ref().map(|problems| json!({"object": "list", "data": problems}));
    let Tokens { prompt, cached, completion, cost } = batch.tokens;
    json!({
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors,
        "input_file_id": batch.input_file,
        "completion_window": batch.window,
        "status": batch.status.as_str(),
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "created_at": times.created,
        "in_progress_at": times.in_progress,
        "expires_at": times.expires,
        "finalizing_at": times.finalizing,
        "completed_at": times.completed,
        "failed_at": times.failed,
        "expired_at": times.expired,
        "cancelling_at": times.cancelling,
        "cancelled_at": times.cancelled,
        "request_counts": {
            "total": counts.total,
            "completed": counts.completed,
            "failed": counts.failed,
        },
        "metadata": batch.metadata,
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + completion,
            "cost": cost.as_f64(),
            "obol": {"cost": {"total": cost.decimal(), "currency": currency}},
        },
    })
}
