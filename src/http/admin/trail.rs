//! `GET /v1/organization/audit_logs`: what administrators did, newest first, in the shape of OpenAI's lists.

use std::sync::Arc;

use axum::extract::{RawQuery, State};
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::{blocking, pairs, refuse_rest};
use crate::control::{AuditEntry, AuditPage};
use crate::http::Server;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::fields::Invalid;
use crate::http::receipts::number;

const PAGE_MAX: u64 = 100;
const PAGE: u64 = 20;

/// `?limit=20&after=audit_7&target=key_...`
pub(super) async fn list(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let (control, _) = server.access.administrator(caller)?;
    let mut query = pairs(query.as_deref())?;
    let limit = match query.remove("limit") {
        None => PAGE,
        Some(text) => number("limit", &text, 1..=PAGE_MAX)?,
    };
    let before = query.remove("after").map(|text| {
        let number = text.strip_prefix("audit_").and_then(|number| number.parse::<i64>().ok());
        number.ok_or_else(|| Invalid::new("after", "`after` is an id of this list, such as audit_7"))
    });
    let before = before.transpose()?;
    let target = query.remove("target");
    refuse_rest(&query)?;
    let limit = u32::try_from(limit).expect("at most 100");
    // One more tells whether there is more.
    let page = AuditPage { target, before, limit: limit + 1 };
    let mut entries = blocking(move || control.trail(&page)).await?;
    let has_more = entries.len() > limit as usize;
    entries.truncate(limit as usize);
    let data: Vec<Value> = entries.iter().map(AuditEntry::to_json).collect();
    Ok(Json(json!({
        "object": "list",
        "first_id": data.first().map(|entry| &entry["id"]),
        "last_id": data.last().map(|entry| &entry["id"]),
        "has_more": has_more,
        "data": data,
    })))
}
