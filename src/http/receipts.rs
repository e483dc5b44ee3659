//! `GET /v1/requests/{id}` and `/v1/requests`: receipts, as the ledger has them.

use std::sync::Arc;

use axum::extract::{Path, RawQuery, State};
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::Server;
use super::auth::Caller;
use super::error::ApiError;
use super::fields::Invalid;
use crate::ledger::{Ledger, LedgerError, Page, Receipt, ReceiptFilter};
use crate::request::Finish;
use crate::units::{RequestId, UnixNanos};

const PAGE_MAX: u32 = 1000;

pub(super) async fn one(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let request = bare_id(&id);
    let receipt = from_ledger(&server, move |ledger| ledger.receipt(&request)).await?;
    // Another's receipt is as one that does not exist.
    let receipt = receipt.filter(|receipt| caller.may_read(receipt.attribution.key_id.as_deref()));
    let receipt = receipt.ok_or(ApiError::ReceiptNotFound { id })?;
    Ok(Json(receipt.to_json()))
}

/// A page, newest first, in the shape of OpenAI's lists: `?limit=100&after=ID` and the filters `model`,
/// `user`, `tenant`, `key_id`, `endpoint`, `status`, `since`, `until` (Unix seconds, of the end). A key sees its own.
pub(super) async fn list(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let (mut filter, page) = filter_of(query.as_deref().unwrap_or_default())?;
    if let Some(key) = caller.key() {
        if filter.key_id.as_ref().is_some_and(|other| *other != key.id.0) {
            return Err(ApiError::AdminOnly);
        }
        filter.key_id = Some(key.id.0.clone());
    }
    let page = from_ledger(&server, move |ledger| ledger.receipts(&filter, &page)).await?;
    let id_of = |receipt: Option<&Receipt>| receipt.map(|receipt| receipt.request().clone());
    Ok(Json(json!({
        "object": "list",
        "data": page.receipts.iter().map(Receipt::to_json).collect::<Vec<_>>(),
        "first_id": id_of(page.receipts.first()),
        "last_id": id_of(page.receipts.last()),
        "has_more": page.has_more,
    })))
}

fn filter_of(query: &str) -> Result<(ReceiptFilter, Page), Invalid> {
    let (mut filter, mut page) = (ReceiptFilter::default(), Page::default());
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = decoded(value)
            .ok_or_else(|| Invalid::new(name, format!("`{name}` is not percent-encoded UTF-8")))?;
        match name {
            "limit" => page.limit = number(name, &value, 1..=u64::from(PAGE_MAX))? as u32,
            "after" => page.after = Some(bare_id(&value)),
            "model" => filter.model = Some(value),
            "user" => filter.user = Some(value),
            "tenant" => filter.tenant = Some(value),
            "key_id" => filter.key_id = Some(value),
            "endpoint" => filter.endpoint = Some(value),
            "status" => filter.status = Some(status(&value)?),
            "since" => filter.since = Some(instant(name, &value)?),
            "until" => filter.until = Some(instant(name, &value)?),
            _ => return Err(Invalid::new(name, format!("unknown query parameter `{name}`"))),
        }
    }
    Ok((filter, page))
}

fn status(value: &str) -> Result<Finish, Invalid> {
    let all = [Finish::Stop, Finish::Length, Finish::Cancelled, Finish::Budget, Finish::Error];
    all.into_iter().find(|finish| finish.as_str() == value).ok_or_else(|| {
        let names = all.map(Finish::as_str).join(", ");
        Invalid::new("status", format!("`status` = {value:?}: use one of {names}"))
    })
}

fn instant(name: &str, value: &str) -> Result<UnixNanos, Invalid> {
    let seconds = number(name, value, 0..=u64::MAX / 1_000_000_000)?;
    Ok(UnixNanos(seconds * 1_000_000_000))
}

pub(super) fn number(name: &str, value: &str, range: std::ops::RangeInclusive<u64>) -> Result<u64, Invalid> {
    let parsed = value.parse().ok().filter(|number| range.contains(number));
    parsed.ok_or_else(|| {
        let (least, most) = (range.start(), range.end());
        Invalid::new(name, format!("`{name}` must be a whole number from {least} to {most}"))
    })
}

/// Undoes percent-encoding; `None` where it is broken or no UTF-8.
pub(super) fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
                let (high, low) = (digit(rest.next())?, digit(rest.next())?);
                u8::try_from(high * 16 + low).expect("two hexadecimal digits")
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// The ids of answers are made from the request's: either finds the receipt.
pub(super) fn bare_id(id: &str) -> RequestId {
    let bare = ["chatcmpl-", "cmpl-", "resp_", "msg_"].into_iter().find_map(|prefix| id.strip_prefix(prefix));
    RequestId(bare.unwrap_or(id).to_owned())
}

/// Reads the database on a thread that may block.
pub(super) async fn from_ledger<T: Send + 'static>(
    server: &Server,
    read: impl FnOnce(&Ledger) -> Result<T, LedgerError> + Send + 'static,
) -> Result<T, ApiError> {
    let ledger = server.ledger.clone();
    let work = tokio::task::spawn_blocking(move || read(&ledger));
    match work.await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => {
            tracing::error!(%error, "the ledger cannot be read");
            Err(ApiError::LedgerUnreadable)
        }
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // Only a runtime that is being shut down cancels blocking work.
        Err(_) => Err(ApiError::Loading),
    }
}
